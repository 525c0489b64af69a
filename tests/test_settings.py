"""The law of lib/layouts/settings.py: change any setting of config.json, and either our logits are still those of transformers,
or one line names the setting. All settings that the config classes of transformers have are changed, those of 4.57 that 5 no
longer declares, and those that its models look up without declaring them."""

import json

import pytest
import torch

from lib.checkpoint import from_pretrained, understand

tf = pytest.importorskip("transformers", reason="parity is measured against transformers")

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
UNDECLARED = {  # of 4.57's base class, and what models or rotary embeddings look up
    **{"is_causal": False, "partial_rotary_factor": 0.5, "head_dim": 12, "sliding_window": 3, "use_sliding_window": True},
    **{"rope_theta": 77.0, "rope_scaling": {"type": "yarn", "factor": 2.0}, "layer_types": ["sliding_attention"] * 2},
    **{"pruned_heads": {"0": [0]}, "tie_word_embeddings": True, "add_cross_attention": True, "is_decoder": True},
    **{"torchscript": True, "use_bfloat16": True, "tie_encoder_decoder": True, "repetition_penalty": 1.5, "max_length": 3},
    **{"suppress_tokens": [1, 2], "pooling": "mean", "attention_bias": True, "qkv_bias": False, "vision_use_head": False},
    **{"quantization_config": {"quant_method": "gptq"}, "pixel_shuffle_factor": 2, "use_resampler": True, "num_labels": 7},
    **{"rope_interleaved": True, "qk_layer_norms": True, "text_config_dict": {"hidden_size": 99}},
}
OTHER = {  # values for settings whose type does not say one
    **{"hidden_act": "gelu_new", "activation_function": "quick_gelu", "projector_hidden_act": "relu", "n_inner": 20},
    **{"num_attention_heads": 2, "num_key_value_heads": 4, "n_head": 2, "image_size": 24, "patch_size": 4, "num_channels": 1},
    **{"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0}, "sliding_window": 3, "layer_types": None},
    **{"id2label": {"0": "a", "1": "b", "2": "c"}, "vision_feature_layer": -1, "vision_feature_select_strategy": "default"},
    **{"layer_norm_eps": 0.1, "layer_norm_epsilon": 0.1, "rms_norm_eps": 0.1, "image_token_id": 48, "image_token_index": 48},
    **{"summary_type": "first", "pooler_act": "relu", "scale_factor": 1, "head_dim": 8, "hidden_size": 32, "n_embd": 32},
    **{"max_window_layers": 0, "intermediate_size": 64, "projection_size": 20, "num_labels": 3, "label2id": {"a": 0}},
}
NOT_SETTINGS = {"model_type", "architectures", "vision_config", "text_config", "dtype", "transformers_version"}
NOT_SETTINGS |= {"output_attentions", "return_dict"}  # transformers does not save the one; the other makes tuples of outputs


def changed(key: str, value):
    """Another value for a setting, or None where there is none to try."""
    if key in OTHER:
        return OTHER[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 or 1
    return UNDECLARED.get(key)


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


@torch.no_grad()
def compare(theirs, kind: str, published: dict, folder) -> None:
    """A model of transformers, and ours from its weights and this config.json."""
    theirs.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(published))
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
    assert (found - expected).abs().max().item() <= 2e-5 * max(1.0, expected.abs().max().item()), published


APART = {"rope_scaling", "use_sliding_window", "sliding_window", "max_window_layers"}  # together they would change something


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_setting_changes_our_logits_as_theirs_or_is_named(kind, tmp_path):
    """GPT-2's scale_attn_weights: false, a decoder's is_causal: false and a ViT's head_dim were ignored."""
    config_class, _, small = KINDS[kind]
    base = {**as_json(config_class(**small).to_dict()), **small, "model_type": kind}
    for key in (*[key for key in base if key.startswith("_")], "dtype", "layer_types"):
        base.pop(key, None)
    compare(their_model(kind, base), kind, base, tmp_path)
    values = {key: changed(key, value) for key, value in base.items()} | {k: v for k, v in UNDECLARED.items() if k not in base}
    plain, harmless = understand(tmp_path, base)[1], {}
    for key in values.keys() - NOT_SETTINGS:
        if values[key] is None:
            continue
        published = {**base, key: values[key]}
        try:
            _, config = understand(tmp_path, published)
        except ValueError as error:
            assert key in str(error) or str(values[key]) in str(error), error
            continue
        if config == plain and key not in APART:
            harmless[key] = values[key]
        elif theirs := their_model(kind, published):
            compare(theirs, kind, published, tmp_path)
    assert len(harmless) > 10
    compare(their_model(kind, base | harmless), kind, base | harmless, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_what_config_json_leaves_out_is_what_transformers_takes(kind, tmp_path):
    """transformers writes only what differs from its defaults. A DINOv2 with registers has patches of 16, not DINOv2's 14."""
    config_class = KINDS[kind][0]
    text = {"text_config": {"model_type": "llama"}}
    siglip = {"vision_feature_select_strategy": "full", "vision_config": {"model_type": "siglip_vision_model"}}
    idefics3 = {"vision_config": {"patch_size": 14}, **text}  # by default its grid of 224 / 32 patches is odd
    least = {"model_type": kind, **{"llava": siglip | text, "idefics3": idefics3, "smolvlm": idefics3}.get(kind, {})}
    if kind == "gpt2":
        least |= {key: getattr(config_class(), key) for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    full = as_json(config_class.from_dict(least).to_dict())
    if kind == "mistral":
        pytest.skip("its default window is shorter than its default context")
    assert understand(tmp_path, least)[1] == understand(tmp_path, {**full, "id2label": None})[1]


def test_an_old_clip_says_its_sizes_in_vision_config_dict(tmp_path):
    """OpenAI's own ViT-L/14 does; its vision_config was read, which may be smaller."""
    small, text = {**TOWER, "hidden_size": 12}, {**CAPTION, "eos_token_id": 2}
    config = tf.CLIPConfig(vision_config=small, vision_config_dict=TOWER, text_config=text)
    assert config.vision_config.hidden_size == 24
    published = {"model_type": "clip", "vision_config": small, "vision_config_dict": TOWER, "text_config": text}
    assert understand(tmp_path, published)[1] == understand(tmp_path, as_json({**TOWER, "model_type": "clip_vision_model"}))[1]


def test_a_setting_that_nobody_knows_is_named_once(tmp_path, capsys):
    for _ in range(2):
        understand(tmp_path, {**DECODER, "model_type": "llama", "attention_mood": "calm", "unsloth_version": "2024.9"})
    assert capsys.readouterr().err == ("config.json of a llama has attention_mood, which is not known here and has no effect\n")
