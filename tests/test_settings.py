"""The law of lib/layouts/settings.py: change any setting of config.json, and either our logits are still those of transformers,
or one line names the setting. All settings that the config classes of transformers have are changed, those of 4.57 that 5 no
longer declares, and those that its models look up without declaring them."""

import pytest

from lib.checkpoint import understand

tf = pytest.importorskip("transformers", reason="parity is measured against transformers")
from their_models import CAPTION, DECODER, KINDS, TOWER, as_json, compare, save, small_config, their_model  # noqa: E402

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


APART = {"rope_scaling", "use_sliding_window", "sliding_window", "max_window_layers"}  # together they would change something


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_setting_changes_our_logits_as_theirs_or_is_named(kind, tmp_path):
    """GPT-2's scale_attn_weights: false, a decoder's is_causal: false and a ViT's head_dim were ignored."""

    def check(theirs, published):
        save(theirs, published, tmp_path)
        compare(theirs, kind, tmp_path)

    base = small_config(kind)
    check(their_model(kind, base), base)
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
            check(theirs, published)
    assert len(harmless) > 10
    check(their_model(kind, base | harmless), base | harmless)


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
