"""Vision Transformers under their published names: Google's ViT with and without a classifier, CLIP's image tower, DINOv2 with
and without registers. vit_scratch.py keeps queries, keys and values as one matrix, which the files keep apart.

DINOv2's LayerScale multiplies each branch by a vector, which is folded into the matrix before it when a file is read; when one
is written, the vectors are ones. Of CLIP only the image tower is read: the text tower and the projections are left out.
"""

from functools import partial

import torch

from lib.checks import checked
from lib.layouts.common import (
    PUBLISHED_ACTIVATION,
    Layout,
    Name,
    activation,
    block_names,
    respell,
    size_from_json,
    unusual,
    with_defaults,
)
from lib.layouts.settings import check_settings
from vit_scratch import ViTConfig, ViTModel

# ---- what config.json says -----------------------------------------------------------------------------------------------

SHARED = ("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads")
HANDLED = (*SHARED, "num_labels", "intermediate_size", "hidden_act", "layer_norm_eps", "dropout", "drop_path", "qkv_bias")
HANDLED += ("attention", "pooling", "position_init", "id2label")


def read_settings(published: dict, kind: str, defaults: dict, more: tuple = (), neutral: dict | None = None) -> dict:
    """The settings that all these towers share, by our names. defaults: what an absent one means; more, neutral: what this kind
    has besides (see check_settings)."""
    given = with_defaults(published, defaults)
    if "head_dim" in published:  # transformers' towers obey it, though their configs do not declare it
        neutral = {**(neutral or {}), "head_dim": (given["hidden_size"] // given["num_attention_heads"],)}
    check_settings(published, kind, (*defaults, *more), neutral or {}, HARMLESS)
    settings = {key: size_from_json(given[key]) for key in SHARED}
    return settings | {"hidden_act": activation(given["hidden_act"]), "layer_norm_eps": given["layer_norm_eps"]}


VIT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 16}
VIT |= {"num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
DINOV2 = {**VIT, "patch_size": 14, "layer_norm_eps": 1e-6}
REGISTERS = {**DINOV2, "patch_size": 16}
CLIP = {**VIT, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
# Of parts and outputs that are not read: poolers, decoders of masked images, features for backbones, CLIP's projections.
HARMLESS = "pooler_act pooler_output_size encoder_stride apply_layernorm out_features out_indices reshape_hidden_states"
HARMLESS += " stage_names use_mask_token projection_dim vocab_size tie_word_embeddings"


def read_vit_config(published: dict, pooling: tuple = ("cls",)) -> ViTConfig:
    labels = published.get("id2label")
    if labels and published.get("num_labels", len(labels)) != len(labels):
        raise ValueError(f"num_labels is {published['num_labels']}, but id2label names {len(labels)}")
    unlabelled = not published.get("architectures") and not labels and "num_labels" not in published
    bare = published.get("architectures") == ["ViTModel"] or unlabelled  # no classifier, as in Google's -in21k
    return checked(
        ViTConfig,
        **read_settings(published, "vit", VIT, ("intermediate_size", "qkv_bias"), {"pooling": pooling}),
        num_labels=0 if bare else len(labels) if labels else published.get("num_labels", 2),
        intermediate_size=published.get("intermediate_size", 3072),
        qkv_bias=published.get("qkv_bias", True),
        pooling=published.get("pooling", "cls"),
        id2label=read_labels(labels) if labels and not bare else None,
    )


def read_labels(labels: dict) -> dict[int, str]:
    """{number: name} of id2label, whose keys JSON makes texts. Raises ValueError unless they count from 0 on."""
    if sorted(labels, key=lambda key: (len(key), key)) != [str(i) for i in range(len(labels))]:
        raise ValueError(f"id2label names the classes {', '.join(labels):.80}: they must be counted from 0 on")
    return {int(number): name for number, name in labels.items()}


def write_shared(config: ViTConfig) -> dict:
    settings = {key: getattr(config, key) for key in (*SHARED, "layer_norm_eps")}
    return {**settings, "hidden_act": PUBLISHED_ACTIVATION[config.hidden_act]}


def write_vit_config(config: ViTConfig) -> dict:
    names = config.id2label or {i: f"LABEL_{i}" for i in range(config.num_labels)}
    labels = {str(number): name for number, name in names.items()}
    return {
        **write_shared(config),
        "architectures": ["ViTForImageClassification" if config.num_labels else "ViTModel"],
        **{key: getattr(config, key) for key in ("intermediate_size", "qkv_bias", "pooling")},
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        **({"id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}} if labels else {}),
    }


def vit_misfit(config: ViTConfig) -> str:
    if config.pooling != "cls":
        return f"it classifies by the CLS token, not by the {config.pooling} of the patches"
    return unusual(config, HANDLED)


def read_dinov2(published: dict, registers: int) -> ViTConfig:
    if published.get("use_swiglu_ffn"):
        raise ValueError("use_swiglu_ffn is true: DINOv2's giant, whose MLP is gated, is not implemented")
    kind, defaults = ("dinov2_with_registers", REGISTERS) if registers else ("dinov2", DINOV2)
    settings = read_settings(published, kind, defaults, ("mlp_ratio", "qkv_bias", "num_register_tokens", "use_swiglu_ffn"))
    return checked(
        ViTConfig,
        **settings,
        num_labels=0,
        intermediate_size=int(settings["hidden_size"] * published.get("mlp_ratio", 4)),
        qkv_bias=published.get("qkv_bias", True),
        num_registers=published.get("num_register_tokens", 4) if registers else 0,
    )


def write_dinov2(config: ViTConfig, registers: int) -> dict:
    return {
        **write_shared(config),
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "mlp_ratio": config.intermediate_size // config.hidden_size,
        "qkv_bias": config.qkv_bias,
        "layerscale_value": 1.0,
        **({"num_register_tokens": config.num_registers} if registers else {}),
    }


def dinov2_misfit(config: ViTConfig, registers: int) -> str:
    if config.num_labels:
        return "it has no classifier"
    if config.intermediate_size % config.hidden_size:
        return f"its MLP is a multiple of the width {config.hidden_size}, not {config.intermediate_size} wide"
    if bool(config.num_registers) != bool(registers):
        return "it has registers" if registers else "it has no registers"
    return unusual(config, (*HANDLED, "num_registers"))


def read_clip(published: dict) -> ViTConfig:
    return checked(
        ViTConfig,
        **read_settings(published, "clip_vision_model", CLIP, ("intermediate_size",)),
        intermediate_size=published.get("intermediate_size", 3072),
        num_labels=0,
        patch_bias=False,
        pre_norm=True,
    )


def read_whole_clip(published: dict) -> ViTConfig:
    """Old files say in vision_config_dict what holds; transformers lets it replace all of vision_config."""
    parts = ("vision_config", "text_config", "vision_config_dict", "text_config_dict")
    check_settings(published, "clip", parts, {}, "projection_dim")
    return read_clip(published.get("vision_config_dict") or published.get("vision_config") or {})


def write_clip(config: ViTConfig) -> dict:
    return {**write_shared(config), "architectures": ["CLIPVisionModel"], "intermediate_size": config.intermediate_size}


def clip_misfit(config: ViTConfig) -> str:
    if config.num_labels or config.patch_bias or not config.pre_norm or not config.qkv_bias:
        return "its tower has a norm before the blocks, patches without bias and no classifier"
    return unusual(config, (*HANDLED, "patch_bias", "pre_norm"))


# ---- which tensor is which parameter ---------------------------------------------------------------------------------------

QKV = "attn.qkv"
VIT_BLOCK = {
    "norm_1": "layernorm_before",
    QKV: tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    "attn.proj": "attention.output.dense",
    "norm_2": "layernorm_after",
    "mlp.fc": "intermediate.dense",
    "mlp.proj": "output.dense",
}
DINOV2_BLOCK = {**VIT_BLOCK, "norm_1": "norm1", "norm_2": "norm2", "mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2"}
CLIP_BLOCK = {
    "norm_1": "layer_norm1",
    QKV: tuple(f"self_attn.{part}_proj" for part in "qkv"),
    "attn.proj": "self_attn.out_proj",
    "norm_2": "layer_norm2",
    "mlp.fc": "mlp.fc1",
    "mlp.proj": "mlp.fc2",
}
VIT_PARTS = {
    "embeddings.cls_token": "embeddings.cls_token",
    "embeddings.register_tokens": "embeddings.register_tokens",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "embeddings.projection.weight": "embeddings.patch_embeddings.projection.weight",
    "embeddings.projection.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
CLIP_PARTS = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embedding": "embeddings.position_embedding.weight",
    "embeddings.projection.weight": "embeddings.patch_embedding.weight",
    **{f"pre_norm.{kind}": f"pre_layrnorm.{kind}" for kind in ("weight", "bias")},
    **{f"norm.{kind}": f"post_layernorm.{kind}" for kind in ("weight", "bias")},
}


def tower_names(model: ViTModel, parts: dict, block: dict, layers: str, prefix: str = "") -> list[Name]:
    """parts: our names: theirs; block: see block_names; layers: where their blocks are; prefix: before all but a classifier."""
    ours = model.state_dict()
    names = [Name(name, (prefix + theirs,)) for name, theirs in parts.items() if name in ours]
    for i in range(model.config.num_hidden_layers):
        names += block_names(f"blocks.{i}", f"{prefix}{layers}.{i}", block)
    names = [name for name in names if name.ours in ours]
    return names + [Name(name, (name,)) for name in ours if name.startswith("classifier.")]


def vit_names(model: ViTModel) -> list[Name]:
    return tower_names(model, VIT_PARTS, VIT_BLOCK, "encoder.layer", "vit." if model.config.num_labels else "")


dinov2_names = partial(tower_names, parts=VIT_PARTS, block=DINOV2_BLOCK, layers="encoder.layer")
clip_names = partial(tower_names, parts=CLIP_PARTS, block=CLIP_BLOCK, layers="encoder.layers")
NO_VIT_PARAMETER = r"^(vit\.)?(pooler\.|embeddings\.mask_token$)"  # of no use to a classifier by CLS, or to a tower
NO_CLIP_PARAMETER = r"^(text_model\.|text_projection\.|visual_projection\.|logit_scale$)|position_ids$"
clean_vit = partial(respell, spellings={}, no_parameter=NO_VIT_PARAMETER)
SCALED = {"layer_scale1": "attention.output.dense", "layer_scale2": "mlp.fc2"}  # DINOv2's vectors, and the layers before them


def clean_dinov2(tensors: dict) -> dict:
    """LayerScale folded into the layers before it."""
    tensors = respell(tensors, {r"^dinov2(_with_registers)?\.": ""}, NO_VIT_PARAMETER)
    for name in [name for name in tensors if name.endswith(".lambda1")]:
        scale, (block, part) = tensors.pop(name), name.removesuffix(".lambda1").rsplit(".", 1)
        for kind in ("weight", "bias"):
            layer = f"{block}.{SCALED[part]}.{kind}"
            tensors[layer] = tensors[layer] * (scale[:, None] if kind == "weight" else scale)
    return tensors


def finish_dinov2(tensors: dict) -> dict:
    """With the vectors that a file has and we have not: ones, and a mask token that nothing reads."""
    width = tensors["layernorm.weight"]
    layers = {name.split(".norm1")[0] for name in tensors if name.endswith("norm1.weight")}
    ones = {f"{layer}.{part}.lambda1": torch.ones_like(width) for layer in layers for part in SCALED}
    return {**tensors, **ones, "embeddings.mask_token": torch.zeros_like(width)[None]}


def clean_clip(tensors: dict) -> dict:
    """The image tower's tensors, by bare names and in our shapes."""
    tensors = respell(tensors, {r"^vision_model\.": ""}, NO_CLIP_PARAMETER)
    for name in ("embeddings.class_embedding", "embeddings.position_embedding.weight"):
        if name in tensors:
            tensors[name] = tensors[name].reshape(1, -1, tensors[name].shape[-1])
    return tensors


def finish_clip(tensors: dict) -> dict:
    flat = {"embeddings.class_embedding": (0, 0), "embeddings.position_embedding.weight": 0}
    return {name: tensor[flat[name]].contiguous() if name in flat else tensor for name, tensor in tensors.items()}


CLIP_LAYOUT = Layout(ViTModel, read_clip, write_clip, clip_names, clean_clip, clip_misfit, finish=finish_clip)
LAYOUTS = {
    "vit": Layout(ViTModel, read_vit_config, write_vit_config, vit_names, clean_vit, vit_misfit),
    **{
        kind: Layout(
            ViTModel, partial(read_dinov2, registers=registers), partial(write_dinov2, registers=registers), dinov2_names,
            clean_dinov2, partial(dinov2_misfit, registers=registers), finish=finish_dinov2,
        )
        for kind, registers in (("dinov2", 0), ("dinov2_with_registers", 1))
    },
    "clip_vision_model": CLIP_LAYOUT,
    "clip": Layout(
        ViTModel, read_whole_clip, write_clip, clip_names, clean_clip,
        lambda config: "it has a text tower, too",
    ),
    "vit_scratch": Layout(ViTModel, partial(read_vit_config, pooling=("cls", "mean")), write_vit_config, vit_names),
}  # fmt: skip
