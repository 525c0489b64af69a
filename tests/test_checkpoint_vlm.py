"""Laws of checkpoint.py and layouts.py for SigLIP, LLaMA and VLMs: transformers' logits, both ways, through real files, in
every spelling; what has no published layout is refused with the reason and comes back as our own; adapters are PEFT's."""

import json
import runpy
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from extras.cross_attention import CrossAttentionConfig, CrossAttentionVLM
from lib import adapters, convert, files, weights
from lib.adapters import load_lora, save_lora
from lib.checkpoint import from_pretrained, save_pretrained
from lib.convert import show
from lib.layouts import llama as llama_layout
from lib.layouts import siglip as siglip_layout
from lib.layouts import vlm as vlm_layout
from lib.layouts.common import TOKEN_IDS
from lib.positions import resized_tower
from model import (
    Linear_LORA,
    Llama3ForCausalLM,
    LLAMA32Config,
    MLLAMAConfig,
    MllamaForConditionalGeneration,
    convert_linears_to_lora,
)
from siglip import SiglipConfig, SiglipModel, SiglipTwoTower, SiglipVisionConfig

tf = pytest.importorskip("transformers", reason="parity is measured against transformers")

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 32, "patch_size": 8}
CAPTION = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
CAPTION |= {"max_position_embeddings": 16}
TEXT = {"vocab_size": 99, "hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 9}
TEXT |= {"num_key_value_heads": 3, "max_position_embeddings": 128, "pad_token_id": 0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 500000.0}
IMAGE_TOKEN = 98


def siglip(vision=None, text=None):
    return tf.SiglipModel(tf.SiglipConfig(vision_config=VISION | (vision or {}), text_config=CAPTION | (text or {})))


def vision(**changes):
    return tf.SiglipVisionModel(tf.SiglipVisionConfig(**{**VISION, **changes}))


def caption(**changes):
    return tf.SiglipTextModel(tf.SiglipTextConfig(**{**CAPTION, **changes}))


def llama(**changes):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**TEXT, **changes}))


def llava(text=None, vision=None, **changes):
    towers = {"vision_config": tf.SiglipVisionConfig(**VISION, **(vision or {}))}
    towers["text_config"] = tf.LlamaConfig(**{**TEXT, **(text or {})})
    settings = {"vision_feature_select_strategy": "full", "image_seq_length": 16, "image_token_index": IMAGE_TOKEN}
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(**towers, **{**settings, **changes}))


def idefics3(text=None, name="Idefics3", **changes):
    towers = {"vision_config": VISION, "text_config": tf.LlamaConfig(**{**TEXT, **(text or {})})}
    config = getattr(tf, f"{name}Config")(**towers, **{"scale_factor": 2, "image_token_id": IMAGE_TOKEN, **changes})
    return getattr(tf, f"{name}ForConditionalGeneration")(config)


def smolvlm(**changes):
    return idefics3(name="SmolVLM", **changes)


CASES = {
    "siglip": (siglip, {}),
    "siglip, other epsilon, exact GELU": (
        siglip,
        {"vision": {"layer_norm_eps": 1e-2}, "text": {"hidden_act": "gelu", "layer_norm_eps": 1e-1}},
    ),
    "siglip, texts of another width": (siglip, {"text": {"hidden_size": 24, "projection_size": 32}}),
    "siglip_vision_model": (vision, {}),
    "siglip_vision_model, cut-off rest, grey": (vision, {"image_size": 37, "num_channels": 1}),
    "siglip_vision_model without head": (vision, {"vision_use_head": False}),
    "siglip_text_model": (caption, {}),
    "llama, 9 query and 3 key heads": (llama, {}),
    "llama, tied": (llama, {"tie_word_embeddings": True}),
    "llama, llama3 rope": (llama, {"rope_parameters": LLAMA3}),
    "llama, linear rope": (llama, {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 999.0}}),
    "llama, biases, wide heads, epsilon": (
        llama,
        {"attention_bias": True, "mlp_bias": True, "head_dim": 10, "rms_norm_eps": 1e-1},
    ),
    "llava, layer -2": (llava, {"text": {"tie_word_embeddings": False}}),
    "llava, layer -1, tied": (llava, {"vision_feature_layer": -1, "text": {"tie_word_embeddings": True}}),
    "llava, layer 1, plain projector, no head": (
        llava,
        {"vision_feature_layer": 1, "multimodal_projector_bias": False, "vision": {"vision_use_head": False}},
    ),
    "llava, llama3 rope": (llava, {"text": {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-1}}),
    "idefics3": (idefics3, {}),
    "idefics3, tied, 4x4 to one": (idefics3, {"scale_factor": 4, "tie_word_embeddings": True}),
    "idefics3, no shuffle, llama3 rope": (idefics3, {"scale_factor": 1, "text": {"rope_parameters": LLAMA3}}),
    "smolvlm": (smolvlm, {}),
}


def lively(model):
    """Weights away from their starting values, so that everything shows in the logits."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def example(config):
    """Inputs for a model of this published config: two rows, for a VLM with one image each at different places."""
    torch.manual_seed(1)
    vlm = hasattr(config, "text_config") and config.model_type != "siglip"
    tower = getattr(config, "vision_config", config)
    inputs = {}
    if hasattr(tower, "image_size"):
        inputs["pixel_values"] = torch.randn(2, tower.num_channels, tower.image_size, tower.image_size)
    if config.model_type != "siglip_vision_model":
        inputs["input_ids"] = torch.randint(1, IMAGE_TOKEN, (2, 16 if not vlm else 30))
    if vlm:
        tokens = 16 // getattr(config, "scale_factor", 1) ** 2
        inputs["input_ids"][0, 2 : 2 + tokens] = inputs["input_ids"][1, 9 : 9 + tokens] = IMAGE_TOKEN
    return inputs


@torch.no_grad()
def published_logits(model, inputs):
    if model.config.model_type in ("idefics3", "smolvlm"):
        inputs = {**inputs, "pixel_values": inputs["pixel_values"][:, None]}
    out = model(**inputs)
    if model.config.model_type == "siglip":
        return out.logits_per_image
    return out.last_hidden_state if "siglip" in model.config.model_type else out.logits


@torch.no_grad()
def our_logits(model, inputs):
    out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out["logits" if "logits" in out else "logits_per_image"]


def close(a, b, bound=1e-5):
    assert a.shape == b.shape and (a - b).abs().max().item() <= bound * max(1.0, b.abs().max().item())


def reopen(theirs, folder):
    """The same class of transformers on another folder, which must hold exactly what it wants."""
    again, info = type(theirs).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return again.eval()


@pytest.fixture(params=CASES, scope="module")
def published(request, tmp_path_factory):
    make, changes = CASES[request.param]
    torch.manual_seed(0)
    theirs, folder = lively(make(**changes)), tmp_path_factory.mktemp("published")
    theirs.save_pretrained(folder)
    return theirs, folder, example(theirs.config)


def test_what_they_save_we_load_and_what_we_save_they_load(published, tmp_path):
    theirs, folder, inputs = published
    expected, ours = published_logits(theirs, inputs), from_pretrained(folder)
    close(our_logits(ours, inputs), expected)
    kind = theirs.config.model_type
    assert save_pretrained(ours, tmp_path, layout=kind) == kind
    close(published_logits(reopen(theirs, tmp_path), inputs), expected)
    again = from_pretrained(tmp_path)
    assert again.config == ours.config
    close(our_logits(again, inputs), expected)


def test_pooled_images_and_texts_too(tmp_path):
    theirs = lively(siglip())
    theirs.save_pretrained(tmp_path)
    inputs, ours = example(theirs.config), from_pretrained(tmp_path)
    with torch.no_grad():
        close(ours.vision_model.pooled(inputs["pixel_values"]), theirs.vision_model(inputs["pixel_values"]).pooler_output)
        close(ours.text_model.pooled(inputs["input_ids"]), theirs.text_model(inputs["input_ids"]).pooler_output)


def test_defaults_that_a_config_leaves_out_are_those_of_transformers():
    """google/siglip-base-patch16-224 and llava-1.5 say little more than their model_type."""
    tower = vlm_layout.IDEFICS3_VISION
    for ours, theirs in (
        (siglip_layout.write_vision(siglip_layout.read_vision({})), tf.SiglipVisionConfig()),
        (siglip_layout.write_siglip_text(siglip_layout.read_siglip_text({})), tf.SiglipTextConfig()),
        (llama_layout.write_llama(llama_layout.read_llama({})), tf.LlamaConfig()),
        (siglip_layout.write_tower(siglip_layout.read_tower({}, SiglipVisionConfig, tower), tower, ""),
         tf.models.idefics3.configuration_idefics3.Idefics3VisionConfig()),
    ):  # fmt: skip
        theirs = theirs.to_dict()
        known = ours.keys() & theirs.keys() - {"architectures", "model_type", *TOKEN_IDS}
        assert len(known) > 8 and {key: ours[key] for key in known} == {key: theirs[key] for key in known}


# ---- spellings of other times ----------------------------------------------------------------------------------------


def rename(folder, pairs, more=None):
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for old, new in pairs:
            name = new + name.removeprefix(old) if name.startswith(old) else name
        tensors[name] = tensor
    save_file({**tensors, **(more or {})}, folder / "model.safetensors")


SPELLINGS = {
    "llava: tower as in 4.x": (llava, [("vision_tower.", "vision_tower.vision_model.")]),
    "llava: modules of 4.52 and later": (
        llava,
        [
            ("language_model.model.", "model.language_model."),
            ("language_model.lm_head", "lm_head"),
            ("vision_tower.", "model.vision_tower.vision_model."),
            ("multi_modal_projector.", "model.multi_modal_projector."),
        ],
    ),
    "llava: modules of 5": (
        llava,
        [
            ("language_model.model.", "model.language_model."),
            ("language_model.lm_head", "lm_head"),
            ("vision_tower.", "model.vision_tower."),
            ("multi_modal_projector.", "model.multi_modal_projector."),
        ],
    ),
    "vision tower with its prefix": (vision, [("", "vision_model.")]),
    "text tower with its prefix": (caption, [("", "text_model.")]),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_other_spellings_of_the_same_tensors(tmp_path, case):
    make, pairs = SPELLINGS[case]
    theirs = lively(make())
    theirs.save_pretrained(tmp_path)
    rename(tmp_path, pairs)
    inputs = example(theirs.config)
    close(our_logits(from_pretrained(tmp_path), inputs), published_logits(theirs, inputs))


@pytest.mark.parametrize(
    "make, buffer",
    [
        (llama, "model.layers.0.self_attn.rotary_emb.inv_freq"),
        (llava, "language_model.model.layers.1.self_attn.rotary_emb.inv_freq"),
        (llava, "vision_tower.vision_model.embeddings.position_ids"),
        (idefics3, "model.vision_model.embeddings.position_ids"),
        (idefics3, "model.text_model.rotary_emb.inv_freq"),
        (siglip, "text_model.embeddings.position_ids"),
    ],
)
def test_constants_in_older_files_are_left_out_and_nothing_else(tmp_path, make, buffer):
    make().save_pretrained(tmp_path)
    rename(tmp_path, [], {buffer: torch.zeros(3)})
    from_pretrained(tmp_path)
    rename(tmp_path, [(buffer, buffer + "_too")])
    with pytest.raises(ValueError, match="left over: .*_too"):
        from_pretrained(tmp_path)


def edit_config(folder, *path, **changes):
    config = json.loads((folder / "config.json").read_text())
    part = config
    for key in path:
        part = part[key]
    part |= changes
    for key in [key for key, value in part.items() if value == "DROP"]:
        del part[key]
    (folder / "config.json").write_text(json.dumps(config))


ROPE_OF_4 = {
    "base only": {"rope_theta": 777.0, "rope_scaling": None},
    "nothing said": {},
    "linear": {"rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama3": {"rope_theta": 500000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
}


@pytest.mark.parametrize("case", ROPE_OF_4)
def test_rope_as_transformers_4_wrote_it(tmp_path, case):
    theirs = lively(llama())
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, rope_parameters="DROP", **ROPE_OF_4[case])
    theirs = type(theirs).from_pretrained(tmp_path).eval()
    inputs = example(theirs.config)
    close(our_logits(from_pretrained(tmp_path), inputs), published_logits(theirs, inputs))


def test_llava_may_say_only_of_its_text_model_that_the_head_is_tied(tmp_path):
    theirs = lively(llava(text={"tie_word_embeddings": True}))
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, tie_word_embeddings="DROP")
    inputs = example(theirs.config)
    close(our_logits(from_pretrained(tmp_path), inputs), published_logits(reopen(theirs, tmp_path), inputs))


@pytest.mark.parametrize("make, prefix", [(llama, ""), (llava, "language_model."), (idefics3, "")])
def test_a_tied_head_may_be_there_once_more_but_not_another_one(tmp_path, make, prefix):
    text = {"tie_word_embeddings": True}
    theirs = lively(make(**(text if make is llama else {"text": text, **text})))
    theirs.save_pretrained(tmp_path)
    inputs, head = example(theirs.config), theirs.lm_head.weight.detach().clone()
    rename(tmp_path, [], {f"{prefix}lm_head.weight": head})
    ours = from_pretrained(tmp_path)
    close(our_logits(ours, inputs), published_logits(theirs, inputs))
    text_model = getattr(ours, "language_model", ours)
    assert text_model.lm_head.weight is text_model.model.embed_tokens.weight
    rename(tmp_path, [], {f"{prefix}lm_head.weight": head + 1})
    with pytest.raises(ValueError, match="lm_head.weight differs from .*embed_tokens.weight.*set tie_word_embeddings to false"):
        from_pretrained(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=False)
    if make is llava:
        edit_config(tmp_path, "text_config", tie_word_embeddings=False)
    close(our_logits(from_pretrained(tmp_path), inputs), published_logits(type(theirs).from_pretrained(tmp_path), inputs))


# ---- what must not load ----------------------------------------------------------------------------------------------


def unshuffled():
    return idefics3(scale_factor=1)


OTHER = {"model_type": "clip_vision_model"}
REFUSED = {
    "CLIP with its class token": (llava, ("vision_config",), OTHER, "is 'full', with the class token: for a clip_vision_model"),
    "tower not named": (llava, ("vision_config",), {"model_type": "DROP"}, "for a clip_vision_model only default"),
    "another tower": (llava, ("vision_config",), {"model_type": "swin"}, "vision_config is a swin: only siglip_vision_model"),
    "Gemma's words": (llava, ("text_config",), {"model_type": "gemma"}, "text_config is a gemma: only llama or mistral or"),
    "biases missing": (llava, ("text_config",), {"model_type": "qwen2"}, "missing: language_model.model.layers.0"),
    "Mistral's words": (idefics3, ("text_config",), {"model_type": "mistral"}, "text_config is a mistral"),
    "CLIP in Idefics3": (idefics3, ("vision_config",), OTHER, "vision_config is a clip_vision_model"),
    "dropped patch": (llava, (), {"vision_feature_select_strategy": "default"}, "'default', which drops the first patch"),
    "strategy not named": (llava, (), {"vision_feature_select_strategy": "DROP"}, "'default', which drops the first patch"),
    "two feature layers": (llava, (), {"vision_feature_layer": [-2, -1]}, r"\[-2, -1\]: only a single layer"),
    "other projector": (llava, (), {"projector_hidden_act": "silu"}, "projector_hidden_act is 'silu'"),
    "other MLP": (llama, (), {"hidden_act": "gelu"}, "activation 'gelu' is not implemented for a llama"),
    "other GELU": (vision, (), {"hidden_act": "gelu_10"}, "activation 'gelu_10' is not implemented"),
    "other rope": (llama, (), {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
    "half a rope": (llama, (), {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary"),
    "wide head": (llama, (), {"head_dim": 8}, r"q_proj.weight is \[36, 36\], which does not make .* \[72, 36\]"),
    "quantised": (llama, (), {"quantization_config": {"quant_method": "gptq"}}, "has a quantization_config"),
    "shuffle that leaves a rest": (idefics3, (), {"scale_factor": 3}, "4x4 patches cannot be joined 3x3"),
    "misplaced patches": (unshuffled, ("vision_config",), {"image_size": 200}, "misplaces patches on its 25x25 grid"),
    "no square": (idefics3, ("vision_config",), {"image_size": [32, 64]}, "image_size is 32x64"),
    "text config a list": (llava, (), {"text_config": [1]}, "does not describe a llava"),
    "size is text": (llava, ("text_config",), {"hidden_size": "wide"}, "hidden_size is 'wide': it must be int"),
    "negative size": (siglip, ("vision_config",), {"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    "own layout, unknown setting": (
        None, (), {"model_type": "mllama_scratch", "vision_config": {"depth": 3}, "text_config": {}}, "no setting depth",
    ),
    "own layout without settings": (None, (), {"model_type": "mllama_scratch"}, "does not describe a mllama_scratch"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_by_name_in_one_line(tmp_path, case):
    make, path, changes, message = REFUSED[case]
    if make is None:
        (tmp_path / "config.json").write_text("{}")
    else:
        make().save_pretrained(tmp_path)
    edit_config(tmp_path, *path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


SPOILED = {
    "missing": (llava, lambda t: t.pop("multi_modal_projector.linear_2.bias"), "missing: multi_modal_projector.linear_2.bias"),
    "left over": (idefics3, lambda t: t.update(extra=torch.ones(1)), "left over: extra"),
    "one name twice": (
        llava,
        lambda t: t.update({"lm_head.weight": t["language_model.lm_head.weight"].clone()}),
        "language_model.lm_head.weight and lm_head.weight are two spellings|lm_head.weight and language_model.lm_head.weight",
    ),
    "whole numbers": (
        llama,
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int8)}),
        "model.norm.weight is torch.int8, which is no weight",
    ),
    "head with more": (vision, lambda t: t.update({"head.more": torch.ones(1)}), "left over: vision_model.head.more"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_files_are_refused_by_name(tmp_path, case):
    make, spoil, message = SPOILED[case]
    make().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    spoil(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)


# ---- saving: published where it fits, our own where not --------------------------------------------------------------

OUR_VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
OUR_TEXT = {"vocab_size": 99, "hidden_size": 24, "n_heads": 4, "n_kv_groups": 2, "n_layers": 2, "hidden_dim": 40}
OUR_TEXT |= {"max_position_embeddings": 64}
AS_LLAVA = {"vision_feature_layer": -2, "image_token_id": IMAGE_TOKEN}
AS_IDEFICS3 = {"projector_type": "linear", "pixel_shuffle": 2, "image_token_id": IMAGE_TOKEN}


def our_vlm(vision=None, text=None, **changes):
    parts = OUR_VISION | (vision or {}), OUR_TEXT | (text or {})
    if "cross_every" in changes:
        return lively(CrossAttentionVLM(CrossAttentionConfig(*parts, **changes)))
    return lively(MllamaForConditionalGeneration(MLLAMAConfig(*parts, **changes)))


FITS = {
    "llava": AS_LLAVA,
    "llava with its width spelled out": {**AS_LLAVA, "projection_dim": 24},
    "idefics3": AS_IDEFICS3,
    "idefics3 without shuffle": {**AS_IDEFICS3, "pixel_shuffle": 1},
}


@pytest.mark.parametrize("case", FITS)
def test_a_vlm_that_fits_a_published_layout_opens_in_transformers(tmp_path, case):
    ours = our_vlm(**FITS[case], vision={"vision_use_head": True})  # the head is dead weight, and not written
    kind = save_pretrained(ours, tmp_path, layout="published", eos_token_id=7)
    assert kind == case.split()[0]
    theirs, info = tf.AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    inputs = example(theirs.config)
    close(published_logits(theirs.eval(), inputs), our_logits(ours, inputs))
    close(our_logits(from_pretrained(tmp_path), inputs), our_logits(ours, inputs))
    assert theirs.generation_config.eos_token_id == theirs.config.text_config.eos_token_id == 7
    assert theirs.config.text_config.bos_token_id is None  # and not LLaMA's 1


MISFITS = {
    "cross": ({"cross_every": 4, "image_token_id": 98}, "llava, idefics3, smolvlm: needs images as tokens among"),
    "mlp with shuffle": ({**AS_LLAVA, "pixel_shuffle": 2}, "llava: needs an mlp projector, .* without pixel shuffle"),
    "wide mlp": ({**AS_LLAVA, "projection_dim": 30}, "llava: needs an mlp projector, 24 wide inside"),
    "mlp after the norm": ({"image_token_id": 98}, "llava: needs .* before the final norm"),
    "linear with bias": ({**AS_IDEFICS3, "projector_bias": True}, "smolvlm: needs a projector of one .* without bias"),
    "linear before the norm": ({**AS_IDEFICS3, "vision_feature_layer": -2}, "idefics3, smolvlm: .* after the final norm"),
    "placeholder unknown": ({"vision_feature_layer": -2, "image_token_id": None}, "llava: image_token_id is not set"),
    "placeholder outside": ({**AS_LLAVA, "image_token_id": 99}, "llava: image_token_id 99 is outside the vocabulary of 99"),
    "not square": ({**AS_LLAVA, "vision": {"image_size": (16, 40)}}, "llava: needs square images"),
    "biases of no kind": ({**AS_LLAVA, "text": {"attention_bias": True, "mlp_bias": True, "qk_norm": True}}, "its qk_norm is"),
    "grid that theirs misplaces": ({**AS_IDEFICS3, "pixel_shuffle": 5, "vision": {"image_size": 200}}, "25x25 grid"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_fits_none_is_refused_with_the_reason_and_comes_back_as_our_own(tmp_path, case):
    changes, reason = MISFITS[case]
    ours = our_vlm(**changes)
    with pytest.raises(ValueError, match=reason) as error:
        save_pretrained(ours, tmp_path, layout="published")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    assert save_pretrained(ours, tmp_path, eos_token_id=7) == "mllama_scratch"
    again = from_pretrained(tmp_path)
    assert again.config == ours.config and type(again) is type(ours)
    tokens, vision = ours.config.text_config.num_image_tokens, ours.config.vision_config
    ids = torch.full((1, 3 + tokens), 5)
    placeholder = ours.config.image_token_id or IMAGE_TOKEN
    ids[:, 1 : 1 + tokens] = placeholder
    size = vision.image_size if isinstance(vision.image_size, tuple) else (vision.image_size,) * 2
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, *size), "image_token_id": placeholder}
    close(our_logits(again, inputs), our_logits(ours, inputs), bound=0)
    with pytest.raises(ValueError, match="mllama_scratch"):
        tf.AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_towers_and_decoders_that_fit_none_come_back_too(tmp_path):
    oblong = {**OUR_VISION, "image_size": (16, 40)}
    for kind, model in {
        "siglip_vision_scratch": SiglipModel(SiglipVisionConfig(**oblong)),
        "siglip_scratch": SiglipTwoTower(SiglipConfig(oblong, {**CAPTION, "intermediate_size": 40})),
        "llama_scratch": tiny_llama(mlp_bias=True, qk_norm=True, tie_word_embeddings=True),
    }.items():
        with pytest.raises(ValueError, match="does not fit the published layout"):
            save_pretrained(model, tmp_path / kind, layout="published")
        assert save_pretrained(model, tmp_path / kind) == kind
        again = from_pretrained(tmp_path / kind)
        assert again.config == model.config
        for (name, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), name
    with pytest.raises(ValueError, match="is never a 'llava': choose published, llama, mistral, qwen2, qwen3, llama_scratch"):
        save_pretrained(model, tmp_path, layout="llava")


def test_our_rounding_rule_names_exactly_the_grids_on_which_idefics3_misplaces_patches():
    """Found with image_size 400, patch_size 16: all logits differed, because 25 x (1 / 25) is not quite 1 in fp32."""
    from transformers.models.idefics3 import configuration_idefics3, modeling_idefics3

    for side in range(1, 75):
        settings = {"num_attention_heads": 1, "image_size": side, "patch_size": 1}
        config = configuration_idefics3.Idefics3VisionConfig(hidden_size=1, **settings)
        theirs = modeling_idefics3.Idefics3VisionEmbeddings(config)
        with torch.no_grad():
            theirs.position_embedding.weight.copy_(torch.arange(side**2)[:, None])
            theirs.patch_embedding.weight.zero_(), theirs.patch_embedding.bias.zero_()
            places = theirs(torch.zeros(1, 3, side, side), torch.ones(1, side, side, dtype=torch.bool)).flatten()
        right = torch.equal(places, torch.arange(side**2).float())
        ours = SiglipVisionConfig(hidden_size=1, **settings)
        assert (vlm_layout.idefics3_position_misfit(ours) == "") == right, side


# ---- files: shards, precision, merged LoRA ---------------------------------------------------------------------------


def tiny_llama(**changes):
    torch.manual_seed(0)
    return lively(Llama3ForCausalLM(LLAMA32Config(**{**OUR_TEXT, **changes})))


IDS = {"input_ids": torch.arange(1, 25).view(2, 12)}


def test_shards_hold_all_and_leave_nothing_of_what_was_there_before(tmp_path):
    old, new = tiny_llama(n_layers=1), tiny_llama(n_layers=3)
    for model, limit, shards in ((old, 5e9, 0), (new, 15000, 6), (old, 15000, 3), (new, 15000, 6), (new, 5e9, 0)):
        save_pretrained(model, tmp_path, max_shard_bytes=limit)
        files = sorted(file.name for file in tmp_path.iterdir())
        weights = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)] or ["model.safetensors"]
        assert files == sorted(["config.json", *weights] + (["model.safetensors.index.json"] if shards else []))
        close(our_logits(from_pretrained(tmp_path), IDS), our_logits(model, IDS), bound=0)
        assert max((tmp_path / name).stat().st_size for name in weights) < limit + 1500  # a header
        theirs, info = tf.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys")), info
        close(published_logits(theirs.eval(), IDS), our_logits(model, IDS))


@pytest.mark.parametrize("limit", [9000, 5e9])
@pytest.mark.parametrize("killed_at", range(1, 10))  # 7 shards, the index, config.json
def test_killed_while_writing_shards_nobody_reads_two_models_as_one(tmp_path, monkeypatch, limit, killed_at):
    old, new = tiny_llama(), lively(tiny_llama())
    save_pretrained(old, tmp_path, max_shard_bytes=limit)
    real, calls = files.write_atomic, []

    def killed(path, write):
        calls.append(path)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        real(path, write)

    for module in (files, weights):
        monkeypatch.setattr(module, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(new, tmp_path, max_shard_bytes=9000)
    monkeypatch.undo()
    assert len(calls) == killed_at
    if killed_at == 9 or limit == 5e9:
        whole = new if killed_at == 9 else old
        close(our_logits(from_pretrained(tmp_path), IDS), our_logits(whole, IDS), bound=0)
    else:
        with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
            from_pretrained(tmp_path)


def test_others_may_read_what_we_write(tmp_path):
    """The safetensors library makes files of mode 600: a web server or a colleague could not open the model."""
    save_pretrained(tiny_llama(), tmp_path)
    save_lora(adapted(tiny_llama()), tmp_path)
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in tmp_path.iterdir())


def test_a_shard_that_is_not_there_is_named(tmp_path):
    save_pretrained(tiny_llama(), tmp_path, max_shard_bytes=9000)
    (tmp_path / "model-00002-of-00007.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00002-of-00007.safetensors, which its index lists"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_in_and_out(tmp_path, dtype, bound):
    ours = our_vlm(**AS_LLAVA)
    save_pretrained(ours, tmp_path, dtype=dtype)
    assert all(t.dtype == dtype for t in load_file(tmp_path / "model.safetensors").values())
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    stored, full = from_pretrained(tmp_path, dtype=None), from_pretrained(tmp_path)
    assert {p.dtype for p in stored.parameters()} == {dtype} and {p.dtype for p in full.parameters()} == {torch.float32}
    theirs = tf.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert theirs.dtype == dtype
    inputs = example(theirs.config)
    close(our_logits(full, inputs), our_logits(ours, inputs), bound)
    close(our_logits(full, inputs), published_logits(theirs.float().eval(), inputs))


def adapted(model, targets=("q_proj", "v_proj", "mlp.up_proj"), **settings):
    """LoRA on the words, with a correction that is not zero."""
    inner = getattr(model, "language_model", model)
    convert_linears_to_lora(inner, **{"rank": 3, "alpha": 6, "targets": list(targets), **settings})
    return lively(model)


def test_lora_is_saved_merged_and_the_model_stays_as_it_is(tmp_path):
    model = adapted(tiny_llama(attention_bias=True))
    before = our_logits(model, IDS)
    assert save_pretrained(model, tmp_path) == "llama"
    close(our_logits(from_pretrained(tmp_path), IDS), before)
    close(our_logits(model, IDS), before)


class Coarse(torch.nn.Module):
    """What a quantised linear layer looks like from outside."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("codes", (linear.weight * 50).to(torch.int8))

    def forward(self, x):
        return x @ (self.codes.float() / 50).T


def test_quantised_layers_cannot_be_saved_but_their_adapter_can(tmp_path):
    model = tiny_llama()
    attention = model.model.layers[0].self_attn
    attention.q_proj = Coarse(attention.q_proj)
    with pytest.raises(ValueError, match="no plain model.layers.0.self_attn.q_proj.weight to save"):
        save_pretrained(model, tmp_path)
    convert_linears_to_lora(model, 2, 4, target_module_classes=(torch.nn.Linear, Coarse), targets=["q_proj"])
    with pytest.raises(ValueError, match="q_proj: a Coarse has no plain weight to merge LoRA into.*save_lora keeps"):
        save_pretrained(model, tmp_path)
    lively(model)
    save_lora(model, tmp_path)
    fresh = tiny_llama()
    fresh.model.layers[0].self_attn.q_proj = Coarse(fresh.model.layers[0].self_attn.q_proj)
    expected = our_logits(fresh, IDS)
    load_lora(fresh, tmp_path)
    assert (our_logits(fresh, IDS) - expected).abs().max() > 1e-3


# ---- LoRA adapters ---------------------------------------------------------------------------------------------------


def unadapted(model):
    """The same model before LoRA was put in."""
    fresh = type(model)(model.config).eval()
    state = {name: t for name, t in model.state_dict().items() if "lora_" not in name}
    for layer in adapters.lora_layers(model):
        state = {name.replace(f"{layer}.linear.", f"{layer}."): t for name, t in state.items()}
    fresh.load_state_dict(state)
    return fresh


ADAPTED = {
    "llama": lambda: adapted(tiny_llama()),
    "llama, tied": lambda: adapted(tiny_llama(tie_word_embeddings=True)),
    "llama, the head too": lambda: adapted(tiny_llama(), ["o_proj", "lm_head"], alpha=5),
    "llama, several ranks": lambda: adapted(adapted(tiny_llama()), ["k_proj"], rank=2, alpha=7),
    "llava": lambda: adapted(our_vlm(**AS_LLAVA)),
    "idefics3": lambda: adapted(our_vlm(**AS_IDEFICS3)),
    "llava, eyes and projector": lambda: eyes_adapted(our_vlm(**AS_LLAVA)),
    "idefics3, eyes and projector": lambda: eyes_adapted(our_vlm(**AS_IDEFICS3)),
}


def eyes_adapted(model):
    convert_linears_to_lora(model, 2, 3, targets=r"vision_tower.*fc1|multi_modal_projector.*")
    return lively(model)


def inputs_of(model):
    if isinstance(model, Llama3ForCausalLM):
        return IDS
    tokens = model.config.text_config.num_image_tokens
    ids = torch.randint(1, IMAGE_TOKEN, (1, 20), generator=torch.Generator().manual_seed(0))
    ids[:, 1 : 1 + tokens] = IMAGE_TOKEN
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("case", ADAPTED)
def test_an_adapter_comes_back(tmp_path, case):
    model = ADAPTED[case]()
    save_lora(model, tmp_path)
    fresh, inputs = unadapted(model), inputs_of(model)
    assert (our_logits(fresh, inputs) - our_logits(model, inputs)).abs().max() > 1e-2
    names = load_lora(fresh, tmp_path)
    assert sorted(names) == sorted(adapters.lora_layers(model))
    close(our_logits(fresh, inputs), our_logits(model, inputs), bound=1e-6)


def test_an_adapter_that_transformers_4_named_comes_back(tmp_path):
    model = adapted(our_vlm(**AS_LLAVA))
    save_lora(model, tmp_path)
    old, new = "base_model.model.model.language_model.", "base_model.model.language_model.model."
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(name.startswith(old) for name in tensors)
    save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    fresh, inputs = unadapted(model), inputs_of(model)
    load_lora(fresh, tmp_path)
    close(our_logits(fresh, inputs), our_logits(model, inputs), bound=1e-6)


def test_an_adapter_of_our_own_kind_of_model_comes_back(tmp_path):
    model = adapted(our_vlm(cross_every=4, image_token_id=IMAGE_TOKEN), ["cross_attn.q_proj", "self_attn.q_proj"])
    save_lora(model, tmp_path)
    fresh, inputs = unadapted(model), inputs_of(model)
    load_lora(fresh, tmp_path)
    close(our_logits(fresh, inputs), our_logits(model, inputs), bound=1e-6)


@pytest.mark.parametrize("case", ADAPTED)
def test_peft_opens_our_adapter(tmp_path, case):
    peft = pytest.importorskip("peft", reason="the adapter's layout is PEFT's")
    model = ADAPTED[case]()
    save_pretrained(unadapted(model), tmp_path / "base", layout="published")
    save_lora(model, tmp_path / "lora", base=tmp_path / "base")
    auto = tf.AutoModelForCausalLM if case.startswith("llama") else tf.AutoModelForImageTextToText
    theirs = peft.PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "lora").eval()
    close(published_logits(theirs, inputs_of(model)), our_logits(model, inputs_of(model)))
    loaded = [name for name, _ in theirs.named_parameters() if "lora_A" in name]
    assert len(loaded) == len(adapters.lora_layers(model))


PEFT_SETTINGS = [{}, {"use_rslora": True}, {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"0.mlp.up_proj": 9}}]


@pytest.mark.parametrize("kind", ["llama", "llava", "idefics3"])
@pytest.mark.parametrize("settings", PEFT_SETTINGS)
def test_we_open_pefts_adapter(tmp_path, kind, settings):
    peft = pytest.importorskip("peft", reason="the adapter's layout is PEFT's")
    ours = tiny_llama() if kind == "llama" else our_vlm(**(AS_LLAVA if kind == "llava" else AS_IDEFICS3))
    save_pretrained(ours, tmp_path / "base", layout="published")
    auto = tf.AutoModelForCausalLM if kind == "llama" else tf.AutoModelForImageTextToText
    targets = r".*(layers|text_model|language_model).*(v_proj|up_proj)"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **settings)
    theirs = peft.get_peft_model(auto.from_pretrained(tmp_path / "base"), config).eval()
    theirs.save_pretrained(tmp_path / "lora")
    load_lora(ours, tmp_path / "lora")
    close(our_logits(ours, inputs_of(ours)), published_logits(theirs, inputs_of(ours)))


PLAIN_LORA = {
    "a name each": {"target_modules": ["q_proj", "down_proj"]},
    "all linear layers": {"target_modules": "all-linear"},
    "the head too": {"target_modules": ["lm_head", "v_proj"]},
    "but some": {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
    "one block": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "the other way round": {"target_modules": ["q_proj"], "fan_in_fan_out": True},
    "ranks and strengths": {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"up_proj": 2},
                            "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3, "0.mlp.up_proj": 9}},
    "began gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "began orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "began as MiCA": {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
}  # fmt: skip
OTHER_LORA = {  # the line that refuses it, or none where it is right
    "PiSSA": ({"init_lora_weights": "pissa"}, "LoRA with init_lora_weights 'pissa'"),
    "PiSSA, fast": ({"init_lora_weights": "pissa_niter_4"}, "LoRA with init_lora_weights 'pissa_niter_4'"),
    "OLoRA": ({"init_lora_weights": "olora"}, "LoRA with init_lora_weights 'olora'"),
    **{kind: ({"begun": kind}, f"LoRA with init_lora_weights '{kind}'") for kind in ("loftq", "corda", "lora_ga", "new")},
    "DoRA": ({"use_dora": True}, "LoRA with use_dora True"),
    "biases": ({"bias": "lora_only"}, "LoRA with bias 'lora_only'"),
    "biases of LoRA": ({"lora_bias": True}, "LoRA with lora_bias True"),
    "a whole head": ({"modules_to_save": ["lm_head"]}, r"LoRA with modules_to_save \['lm_head'\]"),
    "a whole embedding": ({"modules_to_save": ["embed_tokens"]}, r"LoRA with modules_to_save \['embed_tokens'\]"),
    "some tokens": ({"trainable_token_indices": [3, 4]}, r"LoRA with trainable_token_indices \[3, 4\]"),
    "an embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, "no LoRA of a layer of the model: .*embed_tokens"),
    "a tied head": ({"target_modules": ["lm_head"], "tied": True}, "no LoRA of a layer of the model: .*lm_head"),
}


def pefts_adapter(folder, ours, **settings):
    """ours, saved as published and opened by transformers, with an adapter of PEFT that is saved in folder/lora."""
    peft = pytest.importorskip("peft", reason="the adapter's layout is PEFT's")
    save_pretrained(ours, folder / "base", layout="published")
    base = tf.AutoModelForCausalLM.from_pretrained(folder / "base")
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():  # away from B = 0
        for name, parameter in theirs.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 * ("lora_" in name))
    theirs.save_pretrained(folder / "lora")
    return theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", PLAIN_LORA)
def test_plain_lora_of_every_pattern_has_pefts_logits(tmp_path, case):
    ours = tiny_llama()
    theirs = pefts_adapter(tmp_path, ours, **PLAIN_LORA[case])
    layers = [name for name in theirs.state_dict() if name.endswith("lora_A.default.weight")]
    assert len(load_lora(ours, tmp_path / "lora")) == len(layers)
    close(our_logits(ours, IDS), published_logits(theirs, IDS))


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_peft_stores_beside_its_lora_takes_the_place_of_ours(tmp_path):
    """PEFT saves the weight of a head that has LoRA, too; such an adapter was refused."""
    ours = tiny_llama()
    theirs = pefts_adapter(tmp_path, ours, target_modules=["lm_head"])
    theirs.base_model.model.lm_head.base_layer.weight.data.mul_(2)
    theirs.save_pretrained(tmp_path / "lora")
    load_lora(ours, tmp_path / "lora")
    close(our_logits(ours, IDS), published_logits(theirs, IDS))
    edit_adapter(tmp_path / "lora", lambda t: t.update({"base_model.model.lm_head.base_layer.weight": torch.ones(100, 24)}))
    with pytest.raises(ValueError, match=r"lm_head has a base weight \[100, 24\], made for another layer"):
        load_lora(tiny_llama(), tmp_path / "lora")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", OTHER_LORA)
def test_lora_that_is_not_plain_is_refused_by_name(tmp_path, case):
    """An untrained PiSSA adapter, which changes nothing on the base that PEFT prepares for it, moved the logits by 4.75."""
    settings, line = OTHER_LORA[case]
    settings = {"target_modules": ["q_proj"], **settings}
    begun, ours = settings.pop("begun", None), tiny_llama(tie_word_embeddings=settings.pop("tied", False))
    pefts_adapter(tmp_path, ours, **settings)
    if begun:  # of which PEFT wants data or other libraries
        set_adapter(tmp_path / "lora", init_lora_weights=begun)
    with pytest.raises(ValueError, match=line) as error:
        load_lora(ours, tmp_path / "lora")
    assert "\n" not in str(error.value) and not adapters.lora_layers(ours)


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_other_kinds_are_refused_by_name(tmp_path):
    peft = pytest.importorskip("peft", reason="the adapter's layout is PEFT's")
    ours = tiny_llama()
    save_pretrained(ours, tmp_path / "base", layout="published")
    for config in (
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), peft.LoHaConfig(target_modules=["q_proj"]),
        peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4), peft.VeraConfig(target_modules=["q_proj"]),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ):  # fmt: skip
        base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        peft.get_peft_model(base, config).save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match=f"is an adapter of type '{config.peft_type.value}': only LORA"):
            load_lora(ours, tmp_path / "other")


def edit_adapter(folder, edit):
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def set_adapter(folder, **changes):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


PREFIX = "base_model.model.model."
Q = PREFIX + "layers.0.self_attn.q_proj.lora_"
BAD_ADAPTERS = {
    "no adapter": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "pickled weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "save the adapter as safetensors"),
    "another method": (lambda f: set_adapter(f, peft_type="IA3"), "type 'IA3': only LORA"),
    "DoRA": (lambda f: set_adapter(f, use_dora=True), "LoRA with use_dora"),
    "biases": (lambda f: set_adapter(f, bias="all"), "LoRA with bias"),
    "a whole head": (lambda f: set_adapter(f, modules_to_save=["lm_head"]), "LoRA with modules_to_save"),
    "unknown layer": (
        lambda f: edit_adapter(f, lambda t: t.update({Q.replace(".0.", ".7.") + "A.weight": torch.ones(3, 24)})),
        "no LoRA of a layer of the model: .*layers.7.self_attn.q_proj.lora_A.weight",
    ),
    "embedding": (
        lambda f: edit_adapter(f, lambda t: t.update({PREFIX + "embed_tokens.lora_embedding_A": torch.ones(3, 9)})),
        "no LoRA of a layer of the model: .*lora_embedding_A",
    ),
    "half a pair": (lambda f: edit_adapter(f, lambda t: t.pop(Q + "B.weight")), "only one of two matrices: .*q_proj"),
    "another width": (
        lambda f: edit_adapter(f, lambda t: t.update({Q + "A.weight": torch.ones(3, 25)})),
        r"q_proj has LoRA matrices \[24, 3\] x \[3, 25\], made for another layer",
    ),
    "no matrix": (lambda f: edit_adapter(f, lambda t: t.update({Q + "A.weight": torch.ones(())})), "made for another layer"),
    "another rank": (lambda f: edit_adapter(f, lambda t: t.update({Q + "A.weight": torch.ones(2, 24)})), "made for another"),
    "cut file": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"cut"), "not a valid safetensors file"),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_adapters_that_do_not_fit_are_refused_by_name(tmp_path, case):
    spoil, message = BAD_ADAPTERS[case]
    save_lora(adapted(tiny_llama()), tmp_path)
    spoil(tmp_path)
    model = tiny_llama()
    with pytest.raises((ValueError, OSError), match=message) as error:
        load_lora(model, tmp_path)
    assert "\n" not in str(error.value) and not any(isinstance(m, Linear_LORA) for m in model.modules())


def test_models_that_have_or_want_no_adapter(tmp_path):
    with pytest.raises(ValueError, match="no LoRA layers to save"):
        save_lora(tiny_llama(), tmp_path)
    model = adapted(tiny_llama())
    save_lora(model, tmp_path)
    with pytest.raises(ValueError, match="has LoRA layers already"):
        load_lora(model, tmp_path)
    with pytest.raises(ValueError, match="only those of LLaMA and VLMs"):
        load_lora(SiglipModel(SiglipVisionConfig(**OUR_VISION)), tmp_path)


# ---- command line ----------------------------------------------------------------------------------------------------


def test_show_prints_every_tensor_once_and_adds_up(tmp_path):
    ours = our_vlm(**AS_LLAVA)
    save_pretrained(ours, tmp_path, dtype=torch.float16, max_shard_bytes=9000)
    text = "\n".join(show(tmp_path))
    total = sum(p.numel() for p in ours.parameters())
    assert f"{total:,} parameters in {len(ours.state_dict())} tensors" in text
    towers = {name: sum(p.numel() for p in part.parameters()) for name, part in ours.named_children()}
    for line in text.splitlines():
        name, _, count = line.strip().rpartition(" ")
        if name.strip() in towers:
            assert count == f"{towers.pop(name.strip()):,}"
    assert list(towers) == ["vision_tower"]  # which stands together with the single part it has
    assert "0-1 (2 x" in text and "down_proj.weight  [24, 40] F16" in text


def run_main(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", *map(str, args)])
    convert.main()


@torch.no_grad()
def test_a_vlm_may_be_loaded_for_images_of_another_size(tmp_path):
    save_pretrained(our_vlm(**FITS["llava"]), tmp_path)
    plain, larger = from_pretrained(tmp_path), from_pretrained(tmp_path, image_size=(48, 64))
    (rows, columns), before = larger.vision_tower.grid, plain.config.text_config.num_image_tokens
    assert larger.config.text_config.num_image_tokens == rows * columns != before and larger.vision_tower.image_size == (48, 64)
    x = torch.randn(1, 3, 48, 64)
    assert torch.equal(larger.vision_tower(x), resized_tower(plain.vision_tower, (48, 64))(x))
    ids = torch.tensor([[1, *[larger.config.image_token_id] * rows * columns, 2]])
    assert larger(ids, x).logits.isfinite().all()


def test_convert_rewrites_with_everything_that_belongs_to_it(tmp_path, monkeypatch, capsys):
    theirs = lively(llama(bos_token_id=3, eos_token_id=[4, 5], tie_word_embeddings=True))
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    run_main(monkeypatch, "convert", tmp_path / "theirs", tmp_path / "ours", "--dtype", "bf16")
    assert "is in the layout of llama now" in capsys.readouterr().out
    assert (tmp_path / "ours" / "tokenizer.json").exists() and (tmp_path / "ours" / "generation_config.json").exists()
    again = tf.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.dtype == torch.bfloat16 and again.config.eos_token_id == [4, 5] and again.config.bos_token_id == 3
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.bfloat16()), name
    run_main(monkeypatch, "show", tmp_path / "ours")
    assert "model.safetensors" not in (shown := capsys.readouterr().out) and "BF16" in shown


def test_convert_carries_what_belongs_to_the_model_and_names_what_it_leaves(tmp_path, monkeypatch, capsys):
    """chat_template.json, tokenizer.model and the templates of a folder were left without a word."""
    source, target = tmp_path / "theirs", tmp_path / "ours"
    llama().save_pretrained(source)
    edit_config(source, repetition_penalty=1.3, suppress_tokens=[3])  # where transformers 4 kept them
    along = ["chat_template.json", "tokenizer.model", "additional_chat_templates/tool.jinja", "vocab.txt"]
    for name in (*along, "README.md", "pytorch_model.bin", "notes/mine"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    run_main(monkeypatch, "convert", source, target)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"left in {source}: README.md, notes, pytorch_model.bin", f"{target} is in the layout of llama now"]
    assert all((target / name).read_text() == name for name in along) and not (target / "README.md").exists()
    config = json.loads((target / "config.json").read_text())
    assert config["repetition_penalty"] == 1.3 and config["suppress_tokens"] == [3]
    with pytest.raises(ValueError, match="ours exists already: name a new folder"):  # it may be another model, or a run
        run_main(monkeypatch, "convert", source, target)


def test_convert_to_a_precision_that_cannot_hold_the_weights_writes_nothing(tmp_path, monkeypatch):
    """--dtype fp16 made inf of 1e5, which was refused when the folder was read."""
    theirs = llama()
    theirs.model.norm.weight.data[3] = 1e5
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"model.norm.weight holds 1e\+05, more than the 6.55e\+04 of torch.float16"):
        run_main(monkeypatch, "convert", tmp_path / "theirs", tmp_path / "ours", "--dtype", "fp16")
    assert not (tmp_path / "ours").exists()


def test_an_old_vlm_is_brought_up_to_date(tmp_path, monkeypatch):
    theirs = lively(llava())
    theirs.save_pretrained(tmp_path / "old")
    rename(tmp_path / "old", SPELLINGS["llava: modules of 4.52 and later"][1])
    edit_config(tmp_path / "old", "text_config", bos_token_id=1, eos_token_id=2)
    run_main(monkeypatch, "convert", tmp_path / "old", tmp_path / "new")
    again = reopen(theirs, tmp_path / "new")
    inputs = example(theirs.config)
    close(published_logits(again, inputs), published_logits(theirs, inputs))
    assert again.config.text_config.eos_token_id == 2
    with safe_open(tmp_path / "new" / "model.safetensors", "pt") as file:
        assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in file.keys()  # noqa: SIM118


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", "show", str(tmp_path / "nowhere")])
    monkeypatch.delitem(sys.modules, "lib.checkpoint")  # as python -m lib.checkpoint finds it
    with pytest.raises(SystemExit) as done:
        runpy.run_module("lib.checkpoint", run_name="__main__")
    printed = capsys.readouterr()
    assert done.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: there is no folder") and printed.err.count("\n") == 1


def test_labels_and_notes_stay_with_a_converted_model(tmp_path, monkeypatch):
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    names = {0: "cat", 1: "dog", 2: "owl"}
    theirs = tf.ViTForImageClassification(tf.ViTConfig(**settings, id2label=names, label2id={v: k for k, v in names.items()}))
    theirs.save_pretrained(tmp_path / "theirs")
    run_main(monkeypatch, "convert", tmp_path / "theirs", tmp_path / "ours")
    run_main(monkeypatch, "convert", tmp_path / "ours", tmp_path / "ours")  # in place
    assert reopen(theirs, tmp_path / "ours").config.id2label == names
    save_pretrained(from_pretrained(tmp_path / "ours"), tmp_path, note="mine")
    assert json.loads((tmp_path / "config.json").read_text())["note"] == "mine"
