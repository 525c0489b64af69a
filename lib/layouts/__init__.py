"""The layouts of published checkpoints: what config.json says, and which tensor is which parameter.

lib/checkpoint.py reads and writes the files and looks up here what is in them. A layout is a model class, two functions
between config.json and the model's config, and a map of names (common.py). GPT-2 and ViT are ours under other names, so their
maps are tables; SigLIP, LLaMA and the vision-language models carry the published names, so a few prefixes say it all. Mirrors
what transformers 5 writes; the spellings of 4.x are read as well. Settings that would change the logits and are not
implemented are refused by name. A family of models is imported when one of its checkpoints is read or written, not before.
"""

from importlib import import_module

import torch.nn as nn

from lib.layouts.common import Layout

FAMILIES = {  # model_type: the module of this package that knows it; of several that fit a model, the first is written
    "gpt2": "gpt2",
    **dict.fromkeys(("bert", "distilbert"), "bert"),
    **dict.fromkeys(("vit", "dinov2", "dinov2_with_registers", "clip_vision_model", "clip", "vit_scratch"), "vit"),
    **dict.fromkeys(
        ("siglip", "siglip_scratch", "siglip_vision_model", "siglip_vision_scratch", "siglip_text_model"), "siglip"
    ),
    "tower_pair_scratch": "tower_pairs",
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "llama_scratch"), "llama"),
    **dict.fromkeys(("llava", "idefics3", "smolvlm", "mllama_scratch"), "vlm"),
}
NOT_READ = {  # model_type: the one thing that is missing
    **dict.fromkeys(("swin", "swinv2"), "its stages merge patches, so it has no one grid of them"),
    **dict.fromkeys(("convnext", "convnextv2", "resnet"), "a network of convolutions, without patches that attend"),
    "deit": "DeiT with a distillation token; a DeiT without one is published as vit",
    "beit": "relative positions in its attention",
    "vit_mae": "a ViT that leaves out three quarters of its patches at random",
    "dinov3_vit": "2-D rotary positions",
    **dict.fromkeys(("siglip2", "siglip2_vision_model"), "NaFlex, for images of any proportions; fixed-size ones say siglip"),
    "clip_text_model": "CLIP's text tower: of CLIP only the image tower is read",
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GELU in the gated MLP, norms that add 1, scaled embeddings"),
    "smollm3": "layers without rotary positions (NoPE) between those with them",
    "phi3": "queries, keys and values in one matrix",
    **dict.fromkeys(("llava_next", "llava_onevision"), "images cut into tiles"),
    "idefics2": "a perceiver between tower and decoder",
    "paligemma": "Gemma, and bidirectional attention over image and prompt",
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "rotary positions in two (tower) and three (decoder) dimensions"),
    **dict.fromkeys(("pixtral", "mistral3"), "2-D rotary positions in the tower"),
    "molmo": "tiles, and attention that pools 2x2 patches",
    "mllama": "Meta's Llama 3.2 Vision: a tower of two stages over tiles, and cross-attention with norms of its own",
}
CLASSES = {  # model class: its family
    "GPT": "gpt2",
    "ViTModel": "vit",
    **dict.fromkeys(("SiglipTwoTower", "SiglipModel", "SiglipTextTransformer"), "siglip"),
    "TowerPair": "tower_pairs",
    "Llama3ForCausalLM": "llama",
    "MllamaForConditionalGeneration": "vlm",
}


def family(name: str) -> dict[str, Layout]:
    """{model_type: layout} of one family of models."""
    return import_module(f"lib.layouts.{name}").LAYOUTS


def find_layout(model_type: str) -> Layout:
    """Raises ValueError for a model_type that is not known, saying what is missing where that is known."""
    if isinstance(model_type, str) and model_type in NOT_READ.keys() - FAMILIES.keys():
        raise ValueError(f"model_type {model_type!r}, which is not read here: {NOT_READ[model_type]}")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r}: known are {', '.join(FAMILIES)}")
    return family(FAMILIES[model_type])[model_type]


def layouts_of(model: nn.Module) -> dict[str, Layout]:
    """{model_type: layout} of all layouts that there are for models of this class, the preferred first."""
    names = {CLASSES[cls.__name__]: None for cls in type(model).__mro__ if cls.__name__ in CLASSES}
    return {kind: layout for name in names for kind, layout in family(name).items() if isinstance(model, layout.model)}
