"""SigLIP: one tower or both. siglip.py carries the published names, so prefixes say it all."""

from dataclasses import replace
from functools import partial

from lib.checks import checked
from lib.layouts.common import PUBLISHED_ACTIVATION, activation, own_layout, prefix_layout, size_from_json, with_defaults
from lib.layouts.settings import check_settings
from siglip import SiglipConfig, SiglipModel, SiglipTextConfig, SiglipTextTransformer, SiglipTwoTower, SiglipVisionConfig
from vit_scratch import pair

SIGLIP_TOWER = {
    **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    **{"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}
SIGLIP_VISION = {**SIGLIP_TOWER, "image_size": 224, "patch_size": 16, "num_channels": 3, "vision_use_head": True}
SIGLIP_TEXT = {**SIGLIP_TOWER, "vocab_size": 32000, "max_position_embeddings": 64, "projection_size": None}
# max_image_size, size, use_base_siglip: left by SmolVLM's training code. How to prepare images stands in another file.
HARMLESS = "tie_word_embeddings max_image_size size use_base_siglip projection_dim"


def read_tower(published: dict, config_class, defaults: dict):
    """A SiglipVisionConfig or SiglipTextConfig. defaults: what an absent setting means, and so which settings there are."""
    check_settings(published, published.get("model_type") or "SigLIP tower", defaults, {}, HARMLESS)
    given = with_defaults(published, defaults)
    settings = {key: size_from_json(given[key]) for key in defaults}
    return checked(config_class, **{**settings, "hidden_act": activation(settings["hidden_act"])})


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
    check_settings(published, "siglip", ("vision_config", "text_config"), {}, HARMLESS)
    towers = [published.get(key) or {} for key in ("vision_config", "text_config")]
    return checked(SiglipConfig, vision_config=read_vision(towers[0]), text_config=read_siglip_text(towers[1]))


def write_siglip(config: SiglipConfig) -> dict:
    towers = {"vision_config": write_vision(config.vision_config), "text_config": write_siglip_text(config.text_config)}
    return {**towers, "architectures": ["SiglipModel"]}


def other_towers(config: SiglipConfig) -> str:
    """Of a subclass of SiglipTwoTower, which no layout here can hold."""
    return "" if type(config) is SiglipConfig else "needs SigLIP's own image tower and head"


LAYOUTS = {
    "siglip": prefix_layout(
        SiglipTwoTower, read_siglip, write_siglip,
        misfit=lambda config: other_towers(config) or vision_misfit(config.vision_config),
    ),
    "siglip_scratch": replace(own_layout(SiglipTwoTower, SiglipConfig), misfit=other_towers),
    "siglip_vision_model": prefix_layout(
        SiglipModel, read_vision, write_vision, spellings={r"^(?!vision_model\.)": "vision_model."}, misfit=vision_misfit
    ),
    "siglip_vision_scratch": own_layout(SiglipModel, SiglipVisionConfig),
    "siglip_text_model": prefix_layout(
        SiglipTextTransformer, read_siglip_text, write_siglip_text, {"": "text_model."}, {r"^(?!text_model\.)": "text_model."}
    ),
}  # fmt: skip
