"""Vision-language models: LLaVA, of any tower and any decoder that have layouts of their own; Idefics3 and SmolVLM, of SigLIP
and LLaMA."""

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial

import torch

from gpt import GPT, GPTConfig
from lib.checks import checked
from lib.layouts.common import (
    NO_PARAMETER,
    Layout,
    Name,
    own_settings,
    part_class,
    prefix_layout,
    respell,
    unusual,
    with_defaults,
)
from lib.layouts.gpt2 import GPT2_BLOCK
from lib.layouts.gpt2 import LAYOUTS as GPT2_LAYOUTS
from lib.layouts.llama import DEFAULTS as LLAMA_KINDS
from lib.layouts.llama import LAYOUTS as LLAMA_LAYOUTS
from lib.layouts.llama import llama_misfit, read_llama, write_llama
from lib.layouts.settings import check_settings
from lib.layouts.siglip import LAYOUTS as SIGLIP_LAYOUTS
from lib.layouts.siglip import SIGLIP_VISION, read_tower, vision_misfit, write_vision
from lib.layouts.vit import LAYOUTS as VIT_LAYOUTS
from model import Llama3ForCausalLM, LLAMA32Config, MLLAMAConfig, MllamaForConditionalGeneration
from siglip import SiglipModel, SiglipVisionConfig
from vit_scratch import ViTConfig, ViTModel

# In LLaVA's files the names of tower and decoder follow a prefix each; so do ours. This undoes the other spellings of 4.x and
# of the modules in transformers.
LLAVA_SPELLINGS = {
    r"^model\.(?=vision_tower|multi_modal_projector|language_model)": "",
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
NO_VLM_PARAMETER = NO_PARAMETER + r"|^(vision_tower|model)\.(vision_model\.)?head\."  # a VLM never asks the pooling head


def read_part(published: dict, part: str, known: Sequence[str]) -> dict:
    """vision_config or text_config. Raises ValueError where it is absent or of a kind that is not implemented."""
    config = published.get(part)
    if config is None:
        raise ValueError(f"it has no {part}")
    kind = config.get("model_type")
    if kind is not None and kind not in known:
        raise ValueError(f"{part} is a {kind}: only {' or '.join(known)} is implemented")
    return config


# What LLaVA's parts may be, by model_type; of several that a part is, the first is written.
TOWER_KINDS = ("siglip_vision_model", "clip_vision_model", "dinov2", "vit")  # transformers' ViT has a pooler, which ours lacks
DECODER_KINDS = (*LLAMA_KINDS, "gpt2")


def part_layout(kind: str) -> Layout:
    families = SIGLIP_LAYOUTS | VIT_LAYOUTS | LLAMA_LAYOUTS | GPT2_LAYOUTS
    return families[kind]


def fitting_part(config, kinds: Sequence[str]) -> str | None:
    """The first of these kinds of tower or decoder that is one of this config."""
    for kind in kinds:
        layout = part_layout(kind)
        if type(config) is CONFIGS[layout.model] and not layout.misfit(config):
            return kind
    return None


CONFIGS = {SiglipModel: SiglipVisionConfig, ViTModel: ViTConfig, Llama3ForCausalLM: LLAMA32Config, GPT: GPTConfig}


def bare(config):
    """A tower's config without the parts that a vision-language model does not read."""
    return replace(config, **({"vision_use_head": False} if isinstance(config, SiglipVisionConfig) else {"num_labels": 0}))


LLAVA_READ = ("vision_config", "text_config", "vision_feature_layer", "vision_feature_select_strategy", "image_token_id")
LLAVA_READ += ("image_token_index", "projector_hidden_act", "multimodal_projector_bias", "tie_word_embeddings")


def read_llava(published: dict) -> MLLAMAConfig:
    check_settings(published, "llava", LLAVA_READ, {"is_causal": (True,)}, "image_seq_length vocab_size")
    given = with_defaults(published, {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"})
    tower, decoder = part_kinds(given)
    vision, text = given["vision_config"], given["text_config"]
    strategy, expected = given["vision_feature_select_strategy"], "full" if tower.startswith("siglip") else "default"
    if strategy != expected:
        why = "which drops the first patch of a tower without a class token" if expected == "full" else "with the class token"
        raise ValueError(f"vision_feature_select_strategy is {strategy!r}, {why}: for a {tower} only {expected} is implemented")
    if not isinstance(given["vision_feature_layer"], int):
        raise ValueError(f"vision_feature_layer is {given['vision_feature_layer']}: only a single layer is implemented")
    if given.get("projector_hidden_act", "gelu") != "gelu":
        raise ValueError(f"projector_hidden_act is {given['projector_hidden_act']!r}: only gelu is implemented")
    tied = given.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    text = {**text, "tie_word_embeddings": tied}
    return checked(
        MLLAMAConfig,
        vision_config=bare(part_layout(tower).read_config(vision)),
        text_config=part_layout(decoder).read_config(text),
        projector_bias=given.get("multimodal_projector_bias", True),
        vision_feature_layer=given["vision_feature_layer"],
        image_token_id=given.get("image_token_index", given.get("image_token_id", 32000)),
    )


def write_llava(config: MLLAMAConfig) -> dict:
    tower, decoder = fitting_part(config.vision_config, TOWER_KINDS), fitting_part(config.text_config, DECODER_KINDS)
    head = {"vision_use_head": False} if tower.startswith("siglip") else {}
    text = {**part_layout(decoder).write_config(config.text_config), "model_type": decoder}
    if decoder == "gpt2":
        text["tie_word_embeddings"] = False
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": {**part_layout(tower).write_config(config.vision_config), "model_type": tower, **head},
        "text_config": text,
        "image_token_index": config.image_token_id,
        "image_seq_length": config.text_config.num_image_tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": config.projector_bias,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": "full" if tower.startswith("siglip") else "default",
        "tie_word_embeddings": text.get("tie_word_embeddings", False),
    }


def part_kinds(published: dict) -> tuple[str, str]:
    """The model_types of tower and decoder in a LLaVA's config.json."""
    vision, text = read_part(published, "vision_config", TOWER_KINDS), read_part(published, "text_config", DECODER_KINDS)
    return vision.get("model_type", "clip_vision_model"), text.get("model_type", "llama")


def llava_layout(layout: Layout, config: MLLAMAConfig, published: dict | None) -> Layout:
    """LLaVA's layout for this pair of tower and decoder: their own layouts, after a prefix each."""
    if published is None:
        kinds = fitting_part(config.vision_config, TOWER_KINDS), fitting_part(config.text_config, DECODER_KINDS)
    else:
        kinds = part_kinds(published)
    tower, decoder = map(part_layout, kinds)
    parts = {"vision_tower.": tower, "language_model.": decoder}
    is_gpt2 = kinds[1] == "gpt2"

    def spelled(name: str) -> str:
        return name.replace("language_model.transformer.", "language_model.model.") if is_gpt2 else name

    def names(model: MllamaForConditionalGeneration) -> list[Name]:
        found = [Name(name, (name,)) for name in model.state_dict() if name.startswith("multi_modal_projector.")]
        for prefix, part in parts.items():
            for name in part.names(model.get_submodule(prefix[:-1])):
                theirs = tuple(spelled(prefix + each) for each in name.theirs)
                repeat = name.repeat and prefix + name.repeat
                found.append(replace(name, ours=prefix + name.ours, theirs=theirs, repeat=repeat))
        return [name for name in found if not re.search(NO_VLM_PARAMETER, name.ours)]

    def clean(tensors: dict) -> dict:
        tensors = respell(tensors, LLAVA_SPELLINGS, NO_VLM_PARAMETER)
        found = {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(parts))}
        for prefix, part in parts.items():
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if is_gpt2 and prefix == "language_model.":
                own = {name.replace("model.", "transformer.", 1): tensor for name, tensor in own.items()}
            found |= {spelled(prefix + name): tensor for name, tensor in part.clean(own).items()}
        return found

    def finish(tensors: dict) -> dict:
        own = {name.removeprefix("vision_tower."): t for name, t in tensors.items() if name.startswith("vision_tower.")}
        others = {name: t for name, t in tensors.items() if not name.startswith("vision_tower.")}
        if is_gpt2:  # transformers' LLaVA cannot tie this head to its embedding
            others.setdefault("language_model.lm_head.weight", others["language_model.model.wte.weight"].clone())
        return others | {f"vision_tower.{name}": tensor for name, tensor in tower.finish(own).items()}

    modules = LLAVA_MODULES
    if is_gpt2:
        each = [(i, *pair) for i in range(config.text_config.num_hidden_layers) for pair in GPT2_BLOCK.items()]
        modules = {f"language_model.blocks.{i}.{ours}": f"model.language_model.h.{i}.{theirs}" for i, ours, theirs in each}
        modules |= LLAVA_MODULES
    return replace(layout, names=names, clean=clean, finish=finish, modules=modules)


HANDLED = ("vision_config", "text_config", "projection_dim", "projector_type", "projector_bias", "pixel_shuffle")
HANDLED += ("vision_feature_layer", "image_token_id")
TOKENS_ONLY = "needs images as tokens among the words"


def vlm_misfit(config: MLLAMAConfig) -> str:
    token, V = config.image_token_id, config.text_config.vocab_size
    if token is None:
        return "image_token_id is not set: give the model's config the id of the tokenizer's <image>"
    if token >= V:
        return f"image_token_id {token} is outside the vocabulary of {V}: make room with lib.vocabulary.resize_token_embeddings"
    if config.vision_config.grid[0] != config.vision_config.grid[1]:
        return "needs square images"
    return unusual(config, HANDLED)


def llava_misfit(config: MLLAMAConfig) -> str:
    width = config.text_config.hidden_size
    if type(config) is not MLLAMAConfig:
        return TOKENS_ONLY
    if config.projector_type != "mlp" or config.pixel_shuffle != 1 or config.projection_dim not in (None, width):
        return f"needs an mlp projector, {width} wide inside like the text model, without pixel shuffle"
    if config.vision_feature_layer is None:
        return "needs the tower's features from before the final norm: set vision_feature_layer, to -2 for instance"
    if reason := vlm_misfit(config):
        return reason
    for part, kinds in ((config.vision_config, TOWER_KINDS), (config.text_config, DECODER_KINDS)):
        if fitting_part(part, kinds) is None:
            layouts = {kind: part_layout(kind) for kind in kinds if CONFIGS[part_layout(kind).model] is type(part)}
            return "; ".join(f"{kind}: {layout.misfit(part)}" for kind, layout in layouts.items())
    return ""


IDEFICS3_VISION = {**SIGLIP_VISION, "hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32, "vision_use_head": False}
MOST_PATCHES = 4096  # a side: the published models have 64 at most
IDEFICS3_KINDS = ("idefics3_vision", "idefics3", "smolvlm_vision", "smolvlm")  # Idefics3's own name for SigLIP's tower


def read_idefics3(published: dict, kind: str) -> MLLAMAConfig:
    read = ("vision_config", "text_config", "scale_factor", "image_token_id", "tie_word_embeddings")
    check_settings(published, kind, read, {"is_causal": (True,)}, "vocab_size image_seq_len")
    vision = read_part(published, "vision_config", IDEFICS3_KINDS)
    text = read_part(published, "text_config", ("llama",))
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
    if type(config) is not MLLAMAConfig:
        return TOKENS_ONLY
    if config.projector_type != "linear" or config.projector_bias:
        return "needs a projector of one linear layer without bias"
    if config.vision_feature_layer is not None:
        return "needs the tower's features from after the final norm: leave vision_feature_layer unset"
    if type(config.vision_config) is not SiglipVisionConfig or type(config.text_config) is not LLAMA32Config:
        return "needs SigLIP and LLaMA"
    parts = (check(part) for check, part in (
        (vlm_misfit, config), (vision_misfit, config.vision_config), (llama_misfit, config.text_config),
        (idefics3_position_misfit, config.vision_config),
    ))  # fmt: skip
    return next(filter(None, parts), "")


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


PART_CLASSES = {"vision_config": (SiglipVisionConfig, ViTConfig), "text_config": (LLAMA32Config, GPTConfig)}


def read_own(published: dict) -> MLLAMAConfig:
    settings = own_settings(published, MLLAMAConfig, "fusion cross_every")
    for name, classes in PART_CLASSES.items():  # what a part is stands beside its settings; older files have SigLIP and LLaMA
        part = dict(settings[name])
        settings[name] = part = {key: value for key, value in part.items() if key not in ("class", "cross_every")}
        config_class = part_class(published, name, classes)
        if config_class is not classes[0]:
            settings[name] = checked(config_class, **part)
    if published.get("fusion", "early") == "early":
        return checked(MLLAMAConfig, **settings)
    from extras.cross_attention import CrossAttentionConfig

    return checked(CrossAttentionConfig, **settings, cross_every=published["text_config"]["cross_every"])


def write_own(config: MLLAMAConfig) -> dict:
    found = {**asdict(config), "fusion": "early" if type(config) is MLLAMAConfig else "cross"}
    for name, classes in PART_CLASSES.items():
        found[name]["class"] = next(each.__name__ for each in classes if isinstance(getattr(config, name), each))
    return found


def make_own(config: MLLAMAConfig) -> MllamaForConditionalGeneration:
    if type(config) is MLLAMAConfig:
        return MllamaForConditionalGeneration(config)
    from extras.cross_attention import CrossAttentionVLM

    return CrossAttentionVLM(config)


LAYOUTS = {
    "llava": prefix_layout(
        MllamaForConditionalGeneration, read_llava, write_llava,
        misfit=llava_misfit, modules=LLAVA_MODULES, special=llava_layout,
    ),
    **{
        kind: prefix_layout(
            MllamaForConditionalGeneration, partial(read_idefics3, kind=kind), partial(write_idefics3, kind=kind, name=name),
            IDEFICS3_PREFIXES, {r"^(?=(vision_model|text_model|connector)\.)": "model."}, NO_VLM_PARAMETER,
            misfit=idefics3_misfit, modules=IDEFICS3_PREFIXES,
        )
        for kind, name in (("idefics3", "Idefics3"), ("smolvlm", "SmolVLM"))
    },
    "mllama_scratch": prefix_layout(MllamaForConditionalGeneration, read_own, write_own, modules={}, make=make_own),
}  # fmt: skip
