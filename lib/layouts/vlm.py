"""Vision-language models of SigLIP and LLaMA: LLaVA, and Idefics3 with SmolVLM."""

from dataclasses import asdict
from functools import partial

import torch

from lib.checks import checked
from lib.layouts.common import NO_PARAMETER, own_settings, prefix_layout, unusual, with_defaults
from lib.layouts.llama import llama_misfit, read_llama, write_llama
from lib.layouts.siglip import SIGLIP_VISION, read_tower, read_vision, vision_misfit, write_vision
from model import MLLAMAConfig, MllamaForConditionalGeneration
from siglip import SiglipVisionConfig

# LLaVA's files have our names. This undoes the other spellings of 4.x and of the modules in transformers.
LLAVA_SPELLINGS = {
    r"^model\.(?=vision_tower|multi_modal_projector|language_model)": "",
    r"^vision_tower\.(?!vision_model\.)": "vision_tower.vision_model.",
    r"^lm_head\.": "language_model.lm_head.",
    r"^language_model\.(?!model\.|lm_head\.)": "language_model.model.",
}
LLAVA_MODULES = {
    "vision_tower.vision_model.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head": "lm_head",
}
IDEFICS3_PREFIXES = {
    "vision_tower.": "model.",
    "multi_modal_projector.linear": "model.connector.modality_projection.proj",
    "language_model.model.": "model.text_model.",
    "language_model.lm_head": "lm_head",
}
NO_VLM_PARAMETER = NO_PARAMETER + r"|^(vision_tower|model)\.vision_model\.head\."  # a VLM never asks the pooling head


def read_part(published: dict, part: str, known: tuple[str, ...], default: str) -> dict:
    """vision_config or text_config. Raises ValueError where it is of a kind that is not implemented."""
    config = published.get(part) or {}
    kind = config.get("model_type", default)
    if kind not in known:
        raise ValueError(f"{part} is a {kind}: only {' or '.join(known)} is implemented")
    return config


def read_llava(published: dict) -> MLLAMAConfig:
    given = with_defaults(published, {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"})
    vision = read_part(given, "vision_config", ("siglip_vision_model",), default="clip_vision_model")
    text = read_part(given, "text_config", ("llama",), default="llama")
    if given["vision_feature_select_strategy"] != "full":
        raise ValueError(
            f"vision_feature_select_strategy is {given['vision_feature_select_strategy']!r}, which drops the first patch of a "
            "tower that, like SigLIP, has no CLS token: only full is implemented"
        )
    if not isinstance(given["vision_feature_layer"], int):
        raise ValueError(f"vision_feature_layer is {given['vision_feature_layer']}: only a single layer is implemented")
    if given.get("projector_hidden_act", "gelu") != "gelu":
        raise ValueError(f"projector_hidden_act is {given['projector_hidden_act']!r}: only gelu is implemented")
    tied = given.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    return checked(
        MLLAMAConfig,
        vision_config=read_vision({**vision, "vision_use_head": False}),
        text_config=read_llama({**text, "tie_word_embeddings": tied}),
        projector_bias=given.get("multimodal_projector_bias", True),
        vision_feature_layer=given["vision_feature_layer"],
        image_token_id=given.get("image_token_index", given.get("image_token_id", 32000)),
    )


def write_llava(config: MLLAMAConfig) -> dict:
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": {**write_vision(config.vision_config), "vision_use_head": False},
        "text_config": write_llama(config.text_config),
        "image_token_index": config.image_token_id,
        "image_seq_length": config.text_config.num_image_tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": config.projector_bias,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": config.text_config.tie_word_embeddings,
    }


HANDLED = ("vision_config", "text_config", "projection_dim", "projector_type", "projector_bias", "pixel_shuffle")
HANDLED += ("vision_feature_layer", "image_token_id")


def vlm_misfit(config: MLLAMAConfig) -> str:
    token, V = config.image_token_id, config.text_config.vocab_size
    if type(config) is not MLLAMAConfig:
        return "it knows images as tokens among the words only"
    if token is None:
        return "image_token_id is not set: give the model's config the id of the tokenizer's <image>"
    if token >= V:
        return f"image_token_id {token} is outside the vocabulary of {V}: make room with lib.vocabulary.resize_token_embeddings"
    if config.vision_config.grid[0] != config.vision_config.grid[1]:
        return "its images are squares"
    parts = vision_misfit(config.vision_config), llama_misfit(config.text_config), unusual(config, HANDLED)
    return next(filter(None, parts), "")


def llava_misfit(config: MLLAMAConfig) -> str:
    width = config.text_config.hidden_size
    if config.projector_type != "mlp" or config.pixel_shuffle != 1 or config.projection_dim not in (None, width):
        return f"its projector is an mlp, {width} wide inside like the text model, without pixel shuffle"
    if config.vision_feature_layer is None:
        return "it takes the tower's features from before the final norm: set vision_feature_layer, to -2 for instance"
    return vlm_misfit(config)


IDEFICS3_VISION = {**SIGLIP_VISION, "hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32, "vision_use_head": False}
MOST_PATCHES = 4096  # a side: the published models have 64 at most
IDEFICS3_KINDS = ("idefics3_vision", "idefics3", "smolvlm_vision", "smolvlm")  # Idefics3's own name for SigLIP's tower


def read_idefics3(published: dict) -> MLLAMAConfig:
    vision = read_part(published, "vision_config", IDEFICS3_KINDS, default="idefics3_vision")
    text = read_part(published, "text_config", ("llama",), default="llama")
    given = with_defaults(published, {"scale_factor": 2, "image_token_id": 128257, "tie_word_embeddings": False})
    config = checked(
        MLLAMAConfig,
        vision_config=read_tower({**vision, "vision_use_head": False}, SiglipVisionConfig, IDEFICS3_VISION),
        text_config=read_llama({**text, "tie_word_embeddings": given["tie_word_embeddings"]}),
        projector_type="linear",
        pixel_shuffle=given["scale_factor"],
        image_token_id=given["image_token_id"],
    )
    if reason := vision_misfit(config.vision_config) or idefics3_position_misfit(config.vision_config):
        raise ValueError(reason)
    return config


def write_idefics3(config: MLLAMAConfig, kind: str, name: str) -> dict:
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "vision_config": {**write_vision(config.vision_config), "vision_use_head": False, "model_type": f"{kind}_vision"},
        "text_config": write_llama(config.text_config),
        "image_token_id": config.image_token_id,
        "scale_factor": config.pixel_shuffle,
        "tie_word_embeddings": config.text_config.tie_word_embeddings,
    }


def idefics3_misfit(config: MLLAMAConfig) -> str:
    if config.projector_type != "linear" or config.projector_bias:
        return "its projector is one linear layer without bias"
    if config.vision_feature_layer is not None:
        return "it takes the tower's features from after the final norm: leave vision_feature_layer unset"
    return vlm_misfit(config) or idefics3_position_misfit(config.vision_config)


def idefics3_position_misfit(config: SiglipVisionConfig) -> str:
    """transformers computes the position of each patch of Idefics3 as a fraction of the image's side, and rounding sends
    some patches of some grids (19, 25, 29, 31, 38, ... a side) to a neighbour's position. This repeats that computation."""
    side = config.grid[0]
    if side > MOST_PATCHES:
        return f"a grid of {side}x{side} patches exceeds the maximum of {MOST_PATCHES} a side"
    patches, borders = torch.arange(side, device="cpu"), torch.arange(1 / side, 1.0, 1 / side, device="cpu")
    if torch.equal(torch.bucketize(patches * (1 / side), borders, right=True), patches):
        return ""
    return f"transformers misplaces patches on its {side}x{side} grid by rounding: choose another image_size"


def read_own(published: dict) -> MLLAMAConfig:
    settings = own_settings(published, MLLAMAConfig)
    if published.get("fusion", "early") == "early":
        settings["text_config"] = {k: v for k, v in settings["text_config"].items() if k != "cross_every"}  # 0, in older files
        return checked(MLLAMAConfig, **settings)
    from extras.cross_attention import CrossAttentionConfig

    cross_every = settings["text_config"].pop("cross_every")
    return checked(CrossAttentionConfig, **settings, cross_every=cross_every)


def write_own(config: MLLAMAConfig) -> dict:
    return {**asdict(config), "fusion": "early" if type(config) is MLLAMAConfig else "cross"}


def make_own(config: MLLAMAConfig) -> MllamaForConditionalGeneration:
    if type(config) is MLLAMAConfig:
        return MllamaForConditionalGeneration(config)
    from extras.cross_attention import CrossAttentionVLM

    return CrossAttentionVLM(config)


LAYOUTS = {
    "llava": prefix_layout(
        MllamaForConditionalGeneration, read_llava, write_llava,
        None, LLAVA_SPELLINGS, NO_VLM_PARAMETER, misfit=llava_misfit, modules=LLAVA_MODULES,
    ),
    **{
        kind: prefix_layout(
            MllamaForConditionalGeneration, read_idefics3, partial(write_idefics3, kind=kind, name=name),
            IDEFICS3_PREFIXES, None, NO_VLM_PARAMETER, misfit=idefics3_misfit, modules=IDEFICS3_PREFIXES,
        )
        for kind, name in (("idefics3", "Idefics3"), ("smolvlm", "SmolVLM"))
    },
    "mllama_scratch": prefix_layout(MllamaForConditionalGeneration, read_own, write_own, modules={}, make=make_own),
}  # fmt: skip
