"""The layouts of published checkpoints, one after the other: what config.json says, and which tensor is which parameter.

checkpoint.py reads and writes the files and looks up here what is in them. A layout is a model class, two functions between
config.json and the model's config, and a map of names. GPT-2 and ViT are ours under other names, so their maps are tables;
SigLIP, LLaMA and the VLMs carry the published names, so a few prefixes say it all. Mirrors what transformers 5 writes; the
spellings of 4.x are read as well. Settings that would change the logits and are not implemented are refused by name.
"""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial
from typing import get_args, get_origin

import torch
import torch.nn as nn

from gpt import GPT, GPTConfig
from model import Llama3ForCausalLM, LLAMA32Config, MLLAMAConfig, MllamaForConditionalGeneration
from siglip import SiglipConfig, SiglipModel, SiglipTextConfig, SiglipTextTransformer, SiglipTwoTower, SiglipVisionConfig
from vit_scratch import ViTConfig, ViTModel, pair

# ---- what a layout is ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Name:
    """Where one of our parameters comes from. Several published names: their tensors, stacked along the first axis."""

    ours: str
    theirs: tuple[str, ...]
    transpose: bool = False  # GPT-2's files keep linear layers as [in, out]
    repeat: str | None = None  # under this name some files hold the same tensor once more: a head that is tied


@dataclass(frozen=True)
class Layout:
    model: type[nn.Module]
    read_config: Callable[[dict], object]
    write_config: Callable[[object], dict]
    names: Callable[[nn.Module], list[Name]]
    clean: Callable[[dict], dict] = lambda tensors: tensors  # drops what is no parameter, undoes spellings
    misfit: Callable[[object], str] = lambda config: ""  # why a model of this config cannot be saved so; "" where it can
    modules: dict[str, str] | None = None  # where transformers has our modules, by prefix; None: no adapters


ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
PUBLISHED_ACTIVATION = {"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}


def size_from_json(size):
    return tuple(size) if isinstance(size, list) else size


def activation(published: str) -> str:
    if published not in ACTIVATIONS:
        raise ValueError(f"the activation {published!r} is not implemented: known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[published]


def check_types(config) -> None:
    """Raise ValueError where JSON gave a setting of a config another type than its dataclass says, which may well compute
    something: of "true" and 8.0 for a width as much as of NaN."""
    for field in fields(config):
        value, kinds = getattr(config, field.name), [get_origin(kind) or kind for kind in get_args(field.type) or (field.type,)]
        if is_dataclass(value):
            check_types(value)
        elif float in kinds and type(value) in (int, float):
            if not math.isfinite(value):
                raise ValueError(f"{field.name} is {value}: it must be finite")
        elif type(value) not in kinds or (isinstance(value, tuple) and [type(side) for side in value] != [int, int]):
            raise ValueError(f"{field.name} is {value!r:.80}: it must be {' or '.join(kind.__name__ for kind in kinds)}")


def with_defaults(published: dict, defaults: dict) -> dict:
    """config.json leaves out, or gives as null, what equals the default of transformers."""
    return {**defaults, **{key: value for key, value in published.items() if value is not None}}


def renamed(name: str, prefixes: dict[str, str]) -> str:
    """The name with the first of the prefixes that fits replaced."""
    ours = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return prefixes.get(ours, "") + name.removeprefix(ours)


NO_PARAMETER = r"(^|\.)(rotary_emb\.inv_freq|embeddings\.position_ids)$"  # constants that older files keep


def names_by_prefix(model: nn.Module, prefixes: dict[str, str], no_parameter: str = NO_PARAMETER) -> list[Name]:
    """For models whose names are the published ones, but for what they begin with. A tied head is the embedding again."""
    first, names = {}, []
    for ours, parameter in model.state_dict(keep_vars=True).items():
        source, theirs = first.setdefault(id(parameter), ours), renamed(ours, prefixes)
        if not re.search(no_parameter, theirs):
            names.append(Name(ours, (renamed(source, prefixes),), repeat=theirs if source != ours else None))
    return names


def respell(tensors: dict, spellings: dict[str, str], no_parameter: str) -> dict:
    """Each name in the spelling that we write: all patterns are replaced, one after the other. Names that match
    no_parameter are left out. Raises ValueError where two names become one."""
    found, before = {}, {}
    for name, tensor in tensors.items():
        spelled = name
        for pattern, replacement in spellings.items():
            spelled = re.sub(pattern, replacement, spelled)
        if re.search(no_parameter, spelled):
            continue
        if spelled in found:
            raise ValueError(f"{before[spelled]} and {name} are two spellings of one parameter: one of them must go")
        found[spelled], before[spelled] = tensor, name
    return found


def prefix_layout(model, read_config, write_config, prefixes=None, spellings=None, no_parameter=NO_PARAMETER, **more) -> Layout:
    names = partial(names_by_prefix, prefixes=prefixes or {}, no_parameter=no_parameter)
    clean = partial(respell, spellings=spellings or {}, no_parameter=no_parameter)
    return Layout(model, read_config, write_config, names, clean, **more)


# ---- GPT-2 -----------------------------------------------------------------------------------------------------------


def block_names(ours: str, theirs: str, parts: dict[str, str | tuple[str, ...]], transpose: bool = False) -> list[Name]:
    """Weight and bias of the parts of one block: {our part: their part, or the parts it is stacked from}."""
    names = []
    for our_part, their_parts in parts.items():
        their_parts = (their_parts,) if isinstance(their_parts, str) else their_parts
        for kind in ("weight", "bias"):
            flip = transpose and kind == "weight" and "norm" not in our_part
            names.append(Name(f"{ours}.{our_part}.{kind}", tuple(f"{theirs}.{p}.{kind}" for p in their_parts), flip))
    return names


def read_gpt2_config(published: dict) -> GPTConfig:
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if published.get(key):
            raise ValueError(f"this GPT-2 has {key} set, which gpt.py does not implement")
    if published.get("tie_word_embeddings") is False:
        raise ValueError("this GPT-2 has an untied head, which gpt.py does not implement")
    return GPTConfig(
        vocab_size=published["vocab_size"],
        context_length=published["n_positions"],
        hidden_size=published["n_embd"],
        num_hidden_layers=published["n_layer"],
        num_attention_heads=published["n_head"],
        intermediate_size=published.get("n_inner"),
        hidden_act=activation(published.get("activation_function", "gelu_new")),
        layer_norm_eps=published.get("layer_norm_epsilon", 1e-5),
    )


def write_gpt2_config(config: GPTConfig) -> dict:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.intermediate_size,
        "activation_function": {"gelu_tanh": "gelu_new", "gelu": "gelu"}[config.hidden_act],
        "layer_norm_epsilon": config.layer_norm_eps,
        **{key: config.dropout for key in ("embd_pdrop", "attn_pdrop", "resid_pdrop")},
    }


GPT2_BLOCK = {
    "norm_1": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.proj": "attn.c_proj",
    "norm_2": "ln_2",
    "mlp.fc": "mlp.c_fc",
    "mlp.proj": "mlp.c_proj",
}


def gpt2_names(model: GPT) -> list[Name]:
    names = [
        Name("token_embedding.weight", ("transformer.wte.weight",)),
        Name("lm_head.weight", ("transformer.wte.weight",)),
        Name("position_embedding.weight", ("transformer.wpe.weight",)),
    ]
    for i in range(model.config.num_hidden_layers):
        names += block_names(f"blocks.{i}", f"transformer.h.{i}", GPT2_BLOCK, transpose=True)
    return names + [Name(f"norm.{kind}", (f"transformer.ln_f.{kind}",)) for kind in ("weight", "bias")]


def clean_gpt2(tensors: dict) -> dict:
    """OpenAI's own upload has no "transformer." before its names and carries its causal masks as tensors; a tied head is
    the token embedding once more."""
    no_parameters = (".attn.bias", ".attn.masked_bias", "lm_head.weight")
    return {
        name if name.startswith("transformer.") else f"transformer.{name}": tensor
        for name, tensor in tensors.items()
        if not name.endswith(no_parameters)
    }


# ---- ViT -------------------------------------------------------------------------------------------------------------


def read_vit_config(published: dict) -> ViTConfig:
    labels = published.get("id2label")
    return ViTConfig(
        image_size=size_from_json(published.get("image_size", 224)),
        patch_size=size_from_json(published.get("patch_size", 16)),
        num_channels=published.get("num_channels", 3),
        num_labels=len(labels) if labels else published.get("num_labels", 2),
        hidden_size=published["hidden_size"],
        num_hidden_layers=published["num_hidden_layers"],
        num_attention_heads=published["num_attention_heads"],
        intermediate_size=published.get("intermediate_size"),
        hidden_act=activation(published.get("hidden_act", "gelu")),
        layer_norm_eps=published.get("layer_norm_eps", 1e-12),
        qkv_bias=published.get("qkv_bias", True),
        pooling=published.get("pooling", "cls"),
    )


def write_vit_config(config: ViTConfig) -> dict:
    return {
        "architectures": ["ViTForImageClassification"],
        **{
            key: getattr(config, key)
            for key in (
                *("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads"),
                *("intermediate_size", "layer_norm_eps", "qkv_bias", "pooling"),
            )
        },
        "hidden_act": PUBLISHED_ACTIVATION[config.hidden_act],
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "id2label": {str(i): f"LABEL_{i}" for i in range(config.num_labels)},
        "label2id": {f"LABEL_{i}": i for i in range(config.num_labels)},
    }


VIT_BLOCK = {
    "norm_1": "layernorm_before",
    "attn.qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    "attn.proj": "attention.output.dense",
    "norm_2": "layernorm_after",
    "mlp.fc": "intermediate.dense",
    "mlp.proj": "output.dense",
}


def vit_names(model: ViTModel) -> list[Name]:
    config, theirs = model.config, "vit.embeddings."
    names = [
        Name("embeddings.cls_token", (f"{theirs}cls_token",)),
        Name("embeddings.position_embedding", (f"{theirs}position_embeddings",)),
        Name("embeddings.projection.weight", (f"{theirs}patch_embeddings.projection.weight",)),
        Name("embeddings.projection.bias", (f"{theirs}patch_embeddings.projection.bias",)),
    ]
    for i in range(config.num_hidden_layers):
        names += block_names(f"blocks.{i}", f"vit.encoder.layer.{i}", VIT_BLOCK)
    if not config.qkv_bias:
        names = [name for name in names if not name.ours.endswith("attn.qkv.bias")]
    for ours, theirs in (("norm", "vit.layernorm"), ("classifier", "classifier")):
        names += [Name(f"{ours}.{kind}", (f"{theirs}.{kind}",)) for kind in ("weight", "bias")]
    return names


def vit_misfit(config: ViTConfig) -> str:
    return "" if config.pooling == "cls" else f"it classifies by the CLS token, not by the {config.pooling} of the patches"


# ---- SigLIP: one tower or both ---------------------------------------------------------------------------------------

SIGLIP_TOWER = {
    **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    **{"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}
SIGLIP_VISION = {**SIGLIP_TOWER, "image_size": 224, "patch_size": 16, "num_channels": 3, "vision_use_head": True}
SIGLIP_TEXT = {**SIGLIP_TOWER, "vocab_size": 32000, "max_position_embeddings": 64, "projection_size": None}
IDEFICS3_VISION = {**SIGLIP_VISION, "hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32, "vision_use_head": False}


def read_tower(published: dict, config_class, defaults: dict):
    """A SiglipVisionConfig or SiglipTextConfig. defaults: what an absent setting means, and so which settings there are."""
    given = with_defaults(published, defaults)
    settings = {key: size_from_json(given[key]) for key in defaults}
    return config_class(**{**settings, "hidden_act": activation(settings["hidden_act"])})


read_vision = partial(read_tower, config_class=SiglipVisionConfig, defaults=SIGLIP_VISION)
read_siglip_text = partial(read_tower, config_class=SiglipTextConfig, defaults=SIGLIP_TEXT)


def write_tower(config, defaults: dict, model_type: str) -> dict:
    settings = {key: getattr(config, key) for key in defaults} | {"attention_dropout": config.attention_dropout}
    for key in ("image_size", "patch_size"):
        if key in settings:
            settings[key] = pair(settings[key])[0]
    return {**settings, "hidden_act": PUBLISHED_ACTIVATION[config.hidden_act], "model_type": model_type}


def vision_misfit(config: SiglipVisionConfig) -> str:
    for key in ("image_size", "patch_size"):
        height, width = pair(getattr(config, key))
        if height != width:
            return f"{key} is {height}x{width}, and it knows squares only"
    return ""


def write_vision(config: SiglipVisionConfig) -> dict:
    return {**write_tower(config, SIGLIP_VISION, "siglip_vision_model"), "architectures": ["SiglipVisionModel"]}


def write_siglip_text(config: SiglipTextConfig) -> dict:
    return {**write_tower(config, SIGLIP_TEXT, "siglip_text_model"), "architectures": ["SiglipTextModel"]}


def read_siglip(published: dict) -> SiglipConfig:
    towers = [published.get(key) or {} for key in ("vision_config", "text_config")]
    return SiglipConfig(read_vision(towers[0]), read_siglip_text(towers[1]))


def write_siglip(config: SiglipConfig) -> dict:
    towers = {"vision_config": write_vision(config.vision_config), "text_config": write_siglip_text(config.text_config)}
    return {**towers, "architectures": ["SiglipModel"]}


# ---- LLaMA -----------------------------------------------------------------------------------------------------------

LLAMA = {
    **{"vocab_size": 32000, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None},
    **{"num_hidden_layers": 32, "intermediate_size": 11008, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    **{"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "initializer_range": 0.02},
}
LLAMA_SETTINGS = {  # ours: theirs
    **{"vocab_size": "vocab_size", "hidden_size": "hidden_size", "n_heads": "num_attention_heads", "head_dim": "head_dim"},
    **{"n_kv_groups": "num_key_value_heads", "n_layers": "num_hidden_layers", "hidden_dim": "intermediate_size"},
    **{"context_length": "max_position_embeddings", "rms_norm_eps": "rms_norm_eps", "mlp_bias": "mlp_bias"},
    **{key: key for key in ("tie_word_embeddings", "attention_bias", "initializer_range")},
}
LONGEST_TABLE = 8192  # positions whose rotations are kept; for a context of 131,072 that would be 67 MB


def read_llama(published: dict) -> LLAMA32Config:
    given = with_defaults(published, LLAMA)
    if given.get("hidden_act", "silu") != "silu":
        raise ValueError(f"the activation {given['hidden_act']!r} is not implemented for a LLaMA, only silu is")
    # transformers 5 has it all in rope_parameters; 4.x the base as rope_theta and the rest, if any, in rope_scaling
    rope = dict(given.get("rope_scaling") or given.get("rope_parameters") or {})
    base = rope.pop("rope_theta", given.get("rope_theta", 10000.0))
    return LLAMA32Config(
        **{ours: given[theirs] for ours, theirs in LLAMA_SETTINGS.items()},
        max_position_embeddings=min(given["max_position_embeddings"], LONGEST_TABLE),
        rope_base=base,
        rope_scaling=None if rope in ({}, {"rope_type": "default"}) else rope,
    )


def write_llama(config: LLAMA32Config) -> dict:
    rope = config.rope_scaling or {"rope_type": "default"}
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **{theirs: getattr(config, ours) for ours, theirs in LLAMA_SETTINGS.items()},
        "hidden_act": "silu",
        "attention_dropout": config.dropout,
        "rope_parameters": {"rope_theta": config.rope_base, **rope},
        "rope_theta": config.rope_base,  # what does not know rope_parameters yet would take the defaults, and be wrong
        "rope_scaling": config.rope_scaling,
        **dict.fromkeys(TOKEN_IDS),  # absent, transformers would take 1 and 2 for them
    }


TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def llama_misfit(config: LLAMA32Config) -> str:
    if config.cross_every:
        return "it has no cross-attention layers"
    if config.hidden_size % config.n_heads:
        return f"hidden_size {config.hidden_size} is no multiple of {config.n_heads} heads, which transformers insists on"
    return ""


# ---- LLaMA with SigLIP's eyes: LLaVA, Idefics3 and SmolVLM -----------------------------------------------------------

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
    return MLLAMAConfig(
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


NOT_CROSS = "it knows pictures as tokens among the words only, not fusion cross"


def vlm_misfit(config: MLLAMAConfig) -> str:
    token, V = config.image_token_id, config.text_config.vocab_size
    if token is None:
        return "image_token_id is not set: give the model's config the id of the tokenizer's <image>"
    if token >= V:
        return f"image_token_id {token} is outside the vocabulary of {V}: resize_token_embeddings to hold it"
    return vision_misfit(config.vision_config) or llama_misfit(config.text_config)


def llava_misfit(config: MLLAMAConfig) -> str:
    width = config.text_config.hidden_size
    if config.fusion != "early":
        return NOT_CROSS
    if config.projector_type != "mlp" or config.pixel_shuffle != 1 or config.projection_dim not in (None, width):
        return f"its projector is an mlp, {width} wide inside like the text model, without pixel shuffle"
    if config.vision_feature_layer is None:
        return "it takes the tower's features from before the final norm: set vision_feature_layer, to -2 for instance"
    return vlm_misfit(config)


MOST_PATCHES = 4096  # a side: the published models have 64 at most
IDEFICS3_KINDS = ("idefics3_vision", "idefics3", "smolvlm_vision", "smolvlm")  # Idefics3's own name for SigLIP's tower


def read_idefics3(published: dict) -> MLLAMAConfig:
    vision = read_part(published, "vision_config", IDEFICS3_KINDS, default="idefics3_vision")
    text = read_part(published, "text_config", ("llama",), default="llama")
    given = with_defaults(published, {"scale_factor": 2, "image_token_id": 128257, "tie_word_embeddings": False})
    config = MLLAMAConfig(
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
    if config.fusion != "early":
        return NOT_CROSS
    if config.projector_type != "linear" or config.projector_bias:
        return "its projector is one linear layer without bias"
    if config.vision_feature_layer is not None:
        return "it takes the tower's features from after the final norm: leave vision_feature_layer unset"
    return vlm_misfit(config) or idefics3_position_misfit(config.vision_config)


def idefics3_position_misfit(config: SiglipVisionConfig) -> str:
    """transformers computes the position of each patch of Idefics3 as a fraction of the picture's side, and rounding sends
    some patches of some grids (19, 25, 29, 31, 38, ... a side) to a neighbour's position. This repeats that computation."""
    side = config.grid[0]
    if side > MOST_PATCHES:
        return f"a grid of {side}x{side} patches is out of all proportion: over {MOST_PATCHES} a side"
    patches, borders = torch.arange(side, device="cpu"), torch.arange(1 / side, 1.0, 1 / side, device="cpu")
    if torch.equal(torch.bucketize(patches * (1 / side), borders, right=True), patches):
        return ""
    return f"transformers misplaces patches on its {side}x{side} grid by rounding: choose another image_size"


# ---- our own: whatever no published layout holds ---------------------------------------------------------------------


def own_layout(model: type[nn.Module], config_class: type) -> Layout:
    """config.json holds the settings of our config, the tensors have our names."""

    def tuples(value):  # JSON has lists only
        if isinstance(value, dict):
            return {key: tuples(inner) for key, inner in value.items()}
        return size_from_json(value)

    def read(published: dict):
        return config_class(**{f.name: tuples(published[f.name]) for f in fields(config_class) if f.name in published})

    return prefix_layout(model, read, asdict, modules={})


# ---- all of them; of several that fit a model, the first is the one to save it in ------------------------------------

LAYOUTS = {
    "gpt2": Layout(GPT, read_gpt2_config, write_gpt2_config, gpt2_names, clean_gpt2),
    "vit": Layout(ViTModel, read_vit_config, write_vit_config, vit_names, misfit=vit_misfit),
    "vit_scratch": Layout(ViTModel, read_vit_config, write_vit_config, vit_names),
    "siglip": prefix_layout(
        SiglipTwoTower, read_siglip, write_siglip, misfit=lambda config: vision_misfit(config.vision_config)
    ),
    "siglip_scratch": own_layout(SiglipTwoTower, SiglipConfig),
    "siglip_vision_model": prefix_layout(
        SiglipModel, read_vision, write_vision, spellings={r"^(?!vision_model\.)": "vision_model."}, misfit=vision_misfit
    ),
    "siglip_vision_scratch": own_layout(SiglipModel, SiglipVisionConfig),
    "siglip_text_model": prefix_layout(
        SiglipTextTransformer, read_siglip_text, write_siglip_text, {"": "text_model."}, {r"^(?!text_model\.)": "text_model."}
    ),
    "llama": prefix_layout(Llama3ForCausalLM, read_llama, write_llama, misfit=llama_misfit, modules={}),
    "llama_scratch": own_layout(Llama3ForCausalLM, LLAMA32Config),
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
    "mllama_scratch": own_layout(MllamaForConditionalGeneration, MLLAMAConfig),
}  # fmt: skip
