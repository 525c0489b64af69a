"""Small models of transformers, one for each layout that is read, and the comparison of one with ours from its files."""

import json

import torch
import transformers as tf

from lib.checkpoint import from_pretrained

DECODER = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER |= {"num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 32}
TOWER = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWER |= {"image_size": 16, "patch_size": 8}
CAPTION = {**TOWER, "vocab_size": 50, "max_position_embeddings": 32, "projection_size": 24}
CAPTION = {key: value for key, value in CAPTION.items() if key not in ("image_size", "patch_size")}
SIGLIP_VISION = {**TOWER, "model_type": "siglip_vision_model"}
LLAVA = {"vision_config": SIGLIP_VISION, "text_config": {**DECODER, "model_type": "llama"}, "image_token_index": 49}
LLAVA |= {"vision_feature_select_strategy": "full"}
IDEFICS3 = {"vision_config": TOWER, "text_config": {**DECODER, "model_type": "llama"}, "image_token_id": 49}
GPT2 = {"vocab_size": 50, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32}
BERT = {key: value for key, value in DECODER.items() if key not in ("num_key_value_heads", "head_dim")}
DISTILBERT = {"vocab_size": 50, "dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 32, "max_position_embeddings": 32}
KINDS = {  # model_type: config class, model class, a small config
    "gpt2": (tf.GPT2Config, tf.GPT2LMHeadModel, GPT2),
    "bert": (tf.BertConfig, tf.BertModel, BERT),
    "distilbert": (tf.DistilBertConfig, tf.DistilBertModel, DISTILBERT),
    "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, DECODER),
    "mistral": (tf.MistralConfig, tf.MistralForCausalLM, DECODER),
    "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM, DECODER),
    "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM, DECODER),
    "vit": (tf.ViTConfig, tf.ViTForImageClassification, TOWER),
    "dinov2": (tf.Dinov2Config, tf.Dinov2Model, {**TOWER, "mlp_ratio": 2}),
    "dinov2_with_registers": (tf.Dinov2WithRegistersConfig, tf.Dinov2WithRegistersModel, {**TOWER, "mlp_ratio": 2}),
    "clip_vision_model": (tf.CLIPVisionConfig, tf.CLIPVisionModel, TOWER),
    "siglip_vision_model": (tf.SiglipVisionConfig, tf.SiglipVisionModel, TOWER),
    "siglip_text_model": (tf.SiglipTextConfig, tf.SiglipTextModel, CAPTION),
    "siglip": (tf.SiglipConfig, tf.SiglipModel, {"vision_config": TOWER, "text_config": CAPTION}),
    "llava": (tf.LlavaConfig, tf.LlavaForConditionalGeneration, LLAVA),
    "idefics3": (tf.Idefics3Config, tf.Idefics3ForConditionalGeneration, IDEFICS3),
    "smolvlm": (tf.SmolVLMConfig, tf.SmolVLMForConditionalGeneration, IDEFICS3),
}


def as_json(config: dict) -> dict:
    return json.loads(json.dumps(config))


def inputs_for(kind: str, config) -> dict:
    torch.manual_seed(1)
    tower, vlm = getattr(config, "vision_config", config), kind in ("llava", "idefics3", "smolvlm")
    inputs = {}
    if hasattr(tower, "image_size"):
        inputs["pixel_values"] = torch.randn(1, tower.num_channels, tower.image_size, tower.image_size)
    if vlm or kind == "siglip" or not inputs:
        inputs["input_ids"] = torch.randint(0, 48, (1, 20))
    if vlm:
        tokens = (tower.image_size // tower.patch_size) ** 2 // getattr(config, "scale_factor", 1) ** 2
        inputs["input_ids"][:, 1 : 1 + tokens] = getattr(config, "image_token_id", 49)
    return inputs


def their_model(kind: str, published: dict):
    """A model of transformers of this config.json, random everywhere; None where transformers refuses it, too."""
    config_class, model_class, _ = KINDS[kind]
    torch.manual_seed(0)
    try:
        theirs = model_class(config_class.from_dict(as_json(published))).eval()
    except Exception:  # whatever it says: there are no numbers to compare
        return None
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return theirs


def save(theirs, published: dict, folder) -> None:
    """The weights of a model of transformers, and this config.json."""
    theirs.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(published))


def small_config(kind: str) -> dict:
    """The config.json of one of KINDS with every setting spelled out."""
    config_class, _, small = KINDS[kind]
    config = {**as_json(config_class(**small).to_dict()), **small, "model_type": kind}
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in ("dtype", "layer_types")}


@torch.no_grad()
def compare(theirs, kind: str, folder) -> None:
    """The features or logits of a model of transformers, and of ours from this folder."""
    inputs, ours = inputs_for(kind, theirs.config), from_pretrained(folder)
    given = inputs | ({"pixel_values": inputs["pixel_values"][:, None]} if kind in ("idefics3", "smolvlm") else {})
    out = theirs(**given)
    if kind in ("dinov2", "dinov2_with_registers", "clip_vision_model"):
        expected = out.last_hidden_state[:, 1 + getattr(theirs.config, "num_register_tokens", 0) :]
        expected = ours.norm(expected) if kind == "clip_vision_model" else expected  # its norm is for the class token alone
        found = ours.features(inputs["pixel_values"])
    elif "bert" in kind:
        expected, found = out.last_hidden_state, ours.hidden_states(ours.embed(inputs["input_ids"]))
    else:
        found, name = ours(inputs["pixel_values"]) if kind == "vit" else ours(**inputs), "logits"
        name = {"siglip": "logits_per_image", "siglip_vision_model": "last_hidden_state"}.get(kind, name)
        name = "last_hidden_state" if kind == "siglip_text_model" else name
        expected = out[name]
        found = found if isinstance(found, torch.Tensor) else found[name]
    assert found.shape == expected.shape
    assert (found - expected).abs().max().item() <= 2e-5 * max(1.0, expected.abs().max().item())
