"""ViT: vit_scratch.py's parameters under the published names, which keep queries, keys and values apart."""

from lib.checks import checked
from lib.layouts.common import PUBLISHED_ACTIVATION, Layout, Name, activation, block_names, size_from_json
from vit_scratch import ViTConfig, ViTModel


def read_vit_config(published: dict) -> ViTConfig:
    labels = published.get("id2label")
    return checked(
        ViTConfig,
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


LAYOUTS = {
    "vit": Layout(ViTModel, read_vit_config, write_vit_config, vit_names, misfit=vit_misfit),
    "vit_scratch": Layout(ViTModel, read_vit_config, write_vit_config, vit_names),
}
