"""Any tower, any decoder: published ones against transformers at toy size, alone and joined, read and written.

Towers: the features of every layer. Decoders: logits and greedy words. Pairs, as LLaVA: logits and greedy words, both ways; and
what training asks of any pair, in both fusions: packing, frozen features, LoRA, QLoRA. What is refused, by name.
"""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from extras.cross_attention import CrossAttentionConfig, CrossAttentionVLM
from gpt import GPTConfig
from lib.adapters import load_lora, save_lora
from lib.checkpoint import from_pretrained, layout_line, load_vlm, read_config, save_pretrained
from lib.layouts import FAMILIES, NOT_READ
from lib.layouts.settings import say_once
from lib.positions import resized_tower
from lib.quant import Linear4bit, quantize_
from lib.vlm_parts import find_part
from model import LLAMA32Config, MLLAMAConfig, MllamaForConditionalGeneration, convert_linears_to_lora
from siglip import SiglipVisionConfig
from toys import block_pattern, grads
from vit_scratch import ViTAdapter, ViTConfig

tf = pytest.importorskip("transformers", reason="the reference for parity is transformers")

V, IMAGE = 61, 60
TOWER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
DECODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": V}
DECODER |= {"intermediate_size": 48, "max_position_embeddings": 64, **dict.fromkeys(("bos_token_id", "eos_token_id"))}
DECODER |= {"pad_token_id": None}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": V, "tie_word_embeddings": False}
GPT2 |= {"bos_token_id": None, "eos_token_id": None}
CLIP_TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
CLIP_TEXT |= {"bos_token_id": 0, "eos_token_id": 1}


def shaken(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def pixels(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# ---- towers ------------------------------------------------------------------------------------------------------------

TOWERS = {
    "vit": lambda: tf.ViTModel(tf.ViTConfig(**TOWER, intermediate_size=64)),
    "vit without pooler": lambda: tf.ViTModel(tf.ViTConfig(**TOWER, intermediate_size=64), add_pooling_layer=False),
    "vit with a classifier": lambda: tf.ViTForImageClassification(tf.ViTConfig(**TOWER, intermediate_size=64, num_labels=5)),
    "clip_vision_model": lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**TOWER, intermediate_size=64)),
    "clip": lambda: tf.CLIPModel(
        tf.CLIPConfig(vision_config={**TOWER, "intermediate_size": 64}, text_config=CLIP_TEXT)
    ),
    "dinov2": lambda: tf.Dinov2Model(tf.Dinov2Config(**TOWER)),
    "dinov2_with_registers": lambda: tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(**TOWER)),
    "siglip": lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**TOWER, intermediate_size=64)),
}


def their_states(theirs, x, first, **options):
    """The patches of every hidden state, and of the last after the final norm where transformers gives it."""
    theirs = theirs.vision_model if isinstance(theirs, tf.CLIPModel) else theirs
    with torch.no_grad():
        out = theirs(x, output_hidden_states=True, **options)
    normed = None if "CLIP" in type(theirs).__name__ else getattr(out, "last_hidden_state", None)
    return [state[:, first:] for state in out.hidden_states], None if normed is None else normed[:, first:]


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_a_tower_has_the_published_features_of_every_layer(tmp_path, kind):
    theirs, x = shaken(TOWERS[kind]()), pixels(2, 3, 28, 28)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs")
    first = 0 if kind == "siglip" else 1 + ours.config.num_registers
    states, normed = their_states(theirs, x, first)
    assert ours.grid == (2, 2) and ours.image_size == (28, 28) and ours.config.hidden_size == 32
    for layer in range(-4, 4):
        close(ours.features(x, layer), states[layer])
    if normed is not None:
        close(ours.features(x), normed)

    save_pretrained(ours, tmp_path / "ours", layout="published")
    back = tf.AutoModel.from_pretrained(tmp_path / "ours").eval()
    close(their_states(back, x, first)[0][-1], ours.features(x, -1))
    close(from_pretrained(tmp_path / "ours").features(x), ours.features(x))


@pytest.mark.parametrize("kind", ["dinov2", "clip_vision_model", "vit"])
@torch.no_grad()
def test_positions_are_resized_once_at_load(tmp_path, kind):
    """As transformers does at every forward pass: DINOv2, published for 518 pixels, reads 224."""
    theirs, x = shaken(TOWERS[kind]()), pixels(1, 3, 56, 42)
    theirs.save_pretrained(tmp_path)
    ours = resized_tower(from_pretrained(tmp_path), (56, 42))
    options = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    states, _ = their_states(theirs, x, 1, **options)
    assert ours.grid == (4, 3)
    close(ours.features(x, -1), states[-1])


def test_layer_scale_is_folded_into_the_matrices_before_it(tmp_path):
    theirs = TOWERS["dinov2"]()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("lambda1"):
                parameter.uniform_(0.2, 3.0)
    theirs.eval().save_pretrained(tmp_path)
    x = pixels(1, 3, 28, 28)
    close(from_pretrained(tmp_path).features(x), their_states(theirs, x, 1)[1])


# ---- decoders ------------------------------------------------------------------------------------------------------------

DECODERS = {
    "llama": lambda **more: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, **more)),
    "mistral": lambda **more: tf.MistralForCausalLM(tf.MistralConfig(**DECODER, sliding_window=None, **more)),
    "qwen2": lambda **more: tf.Qwen2ForCausalLM(tf.Qwen2Config(**DECODER, **more)),
    "qwen2, tied": lambda **more: tf.Qwen2ForCausalLM(tf.Qwen2Config(**DECODER, tie_word_embeddings=True, **more)),
    "qwen3": lambda **more: tf.Qwen3ForCausalLM(tf.Qwen3Config(**DECODER, head_dim=16, **more)),
    "qwen3 with biases": lambda **more: tf.Qwen3ForCausalLM(tf.Qwen3Config(**DECODER, head_dim=8, attention_bias=True, **more)),
}


@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_a_decoder_has_the_published_logits_and_words(tmp_path, kind):
    theirs, ids = shaken(DECODERS[kind]()), torch.arange(24).view(2, 12)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs")
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    close(ours(ids, attention_mask=mask)["logits"][mask.bool()], theirs(ids, attention_mask=mask).logits[mask.bool()])
    words = theirs.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 12:].tolist()
    assert ours.generate(ids, 8, attention_mask=mask) == words

    save_pretrained(ours, tmp_path / "ours", layout="published")
    back = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    close(back(ids).logits, ours(ids)["logits"])


WINDOWS = {
    "sliding_window is 32, shorter than the context of 64": lambda: tf.MistralConfig(**DECODER, sliding_window=32),
    r"layer_types is .*sliding_attention": lambda: tf.Qwen2Config(
        **DECODER, use_sliding_window=True, sliding_window=16, max_window_layers=1
    ),
}


@pytest.mark.parametrize("message", WINDOWS)
def test_a_window_shorter_than_the_context_is_refused(tmp_path, message):
    WINDOWS[message]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)


# ---- pairs ---------------------------------------------------------------------------------------------------------------

PAIR_TOWERS = {
    "siglip": (lambda: tf.SiglipVisionConfig(**TOWER, intermediate_size=64, vision_use_head=False), "full"),
    "clip": (lambda: tf.CLIPVisionConfig(**TOWER, intermediate_size=64), "default"),
    "vit": (lambda: tf.ViTConfig(**TOWER, intermediate_size=64), "default"),
    "dinov2": (lambda: tf.Dinov2Config(**TOWER), "default"),
}
PAIR_DECODERS = {
    "llama": lambda: tf.LlamaConfig(**DECODER),
    "qwen2": lambda: tf.Qwen2Config(**DECODER),
    "qwen3": lambda: tf.Qwen3Config(**DECODER, head_dim=8),
    "gpt2": lambda: tf.GPT2Config(**GPT2),
}


def llava(tower, decoder, layer=-2):
    vision, strategy = PAIR_TOWERS[tower]
    config = tf.LlavaConfig(
        vision_config=vision(), text_config=PAIR_DECODERS[decoder](), image_token_index=IMAGE, vision_feature_layer=layer,
        vision_feature_select_strategy=strategy, tie_word_embeddings=False,
    )  # fmt: skip
    return shaken(tf.LlavaForConditionalGeneration(config))


@pytest.mark.parametrize("decoder", PAIR_DECODERS)
@pytest.mark.parametrize("tower", PAIR_TOWERS)
@torch.no_grad()
def test_a_pair_is_the_same_vision_language_model_here_and_there(tmp_path, tower, decoder):
    theirs = llava(tower, decoder)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs")
    assert isinstance(ours, MllamaForConditionalGeneration)
    ids, x = torch.arange(24).view(2, 12), pixels(2, 3, 28, 28)
    ids[:, 2:6] = IMAGE
    close(ours(ids, x)["logits"], theirs(input_ids=ids, pixel_values=x).logits)

    assert save_pretrained(ours, tmp_path / "ours") == "llava"
    back, info = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    close(back.eval()(input_ids=ids, pixel_values=x).logits, ours(ids, x)["logits"])
    words = back.generate(input_ids=ids, pixel_values=x, max_new_tokens=6, do_sample=False)[:, 12:].tolist()
    assert ours.generate(ids, x, max_new_tokens=6) == words
    close(from_pretrained(tmp_path / "ours")(ids, x)["logits"], ours(ids, x)["logits"])


@torch.no_grad()
def test_a_tied_gpt2_is_saved_with_its_head_a_second_time(tmp_path):
    """transformers' LLaVA cannot tie a GPT-2's head to its embedding."""
    ours, ids = own_pair("clip", "gpt2", "early"), torch.arange(12).view(1, 12)
    assert ours.config.text_config.tie_word_embeddings and save_pretrained(ours, tmp_path) == "llava"
    back = tf.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    close(back(input_ids=ids).logits, ours(ids)["logits"])
    close(from_pretrained(tmp_path)(ids)["logits"], ours(ids)["logits"])


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["early", "cross"])
def test_a_pair_that_no_published_layout_holds_comes_back_in_ours(tmp_path, capsys, fusion):
    """And nothing is said about its settings: fusion and cross_every "had no effect"."""
    ours = from_pretrained_pair(tmp_path) if fusion == "early" else own_pair("vit", "qwen3", "cross")
    ours.config.vision_feature_layer = None
    say_once.cache_clear()
    capsys.readouterr()
    assert save_pretrained(ours, tmp_path / "own") == "mllama_scratch"
    again = from_pretrained(tmp_path / "own")
    assert again.config == ours.config and type(again.vision_tower) is type(ours.vision_tower)
    assert capsys.readouterr() == ("", "")
    ids, x = expanded(ours, SAMPLES[0]), pixels(1, 3, *ours.vision_tower.image_size)
    close(again(ids, x)["logits"], ours(ids, x)["logits"])


def from_pretrained_pair(folder):
    llava("dinov2", "gpt2").save_pretrained(folder / "theirs")
    return from_pretrained(folder / "theirs")


# What stands in the config.json of two published folders, as transformers 4 wrote it, and the sizes that make a toy of each.
LLAVA_1_5 = {
    "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000, "model_type": "llava",
    "pad_token_id": 32001, "projector_hidden_act": "gelu", "tie_word_embeddings": False, "torch_dtype": "float16",
    "text_config": {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096, "model_type": "llama",
                    "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064},
    "vision_config": {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
                      "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
                      "vocab_size": 32000},
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064,
}  # fmt: skip
INTERLEAVE = {
    "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 151646,
    "model_type": "llava", "projector_hidden_act": "gelu", "torch_dtype": "float16",
    "text_config": {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 1024, "intermediate_size": 2816,
                    "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 16,
                    "num_hidden_layers": 24, "num_key_value_heads": 16, "rope_theta": 1000000.0, "sliding_window": 32768,
                    "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 152000},
    "tie_word_embeddings": True, "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
    "vision_config": {"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "model_type": "siglip_vision_model",
                      "num_attention_heads": 16, "num_hidden_layers": 26, "patch_size": 14, "vision_use_head": False},
}  # fmt: skip
TOY_TEXT = {key: DECODER[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
TOY_TEXT |= {"num_key_value_heads": 4, "vocab_size": V, "torch_dtype": "float32"}
TOY_TEXT |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


@pytest.mark.parametrize("published, tokens, layers, width", [(LLAVA_1_5, 576, 32, 4096), (INTERLEAVE, 729, 24, 1024)])
@torch.no_grad()
def test_llava_1_5_and_llava_interleave_are_read_as_transformers_reads_them(tmp_path, published, tokens, layers, width):
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = read_config(tmp_path)
    text = config.text_config
    assert (text.num_image_tokens, text.n_layers, text.hidden_size) == (tokens, layers, width)
    assert config.projector_type == "mlp" and config.vision_feature_layer == published["vision_feature_layer"]

    sizes = {"vision_config": {**TOWER, "intermediate_size": 64}, "text_config": TOY_TEXT}
    toy = {**published, **{part: {**published[part], **changes} for part, changes in sizes.items()}}
    toy |= {"image_token_index": IMAGE, "pad_token_id": None}
    theirs = shaken(tf.LlavaForConditionalGeneration(tf.LlavaConfig.from_dict(toy)))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(toy))
    ours, ids, x = from_pretrained(tmp_path), torch.arange(24).view(2, 12), pixels(2, 3, 28, 28)
    ids[:, 2:6] = IMAGE
    close(ours(ids, x)["logits"], theirs(input_ids=ids, pixel_values=x).logits)
    words = theirs.generate(input_ids=ids, pixel_values=x, max_new_tokens=6, do_sample=False)[:, 12:].tolist()
    assert ours.generate(ids, x, max_new_tokens=6) == words
    assert save_pretrained(ours, tmp_path / "again") == "llava"
    assert layout_line(ours, "again", "llava") == "again is in the layout of llava, which transformers opens"


# ---- pairs in training -----------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
OWN_TOWERS = {
    "siglip": SiglipVisionConfig(**SMALL, intermediate_size=24, vision_use_head=False),
    "vit": ViTConfig(**SMALL, num_labels=0),
    "clip": ViTConfig(**SMALL, num_labels=0, patch_bias=False, pre_norm=True, hidden_act="quick_gelu"),
    "dinov2 with registers": ViTConfig(**SMALL, num_labels=0, num_registers=3),
}
OWN_TEXT = {"vocab_size": V, "hidden_size": 64, "n_heads": 4, "n_kv_groups": 2, "n_layers": 2, "hidden_dim": 64}
OWN_TEXT |= {"max_position_embeddings": 64, "rope_base": 1e4}
OWN_DECODERS = {
    "llama": LLAMA32Config(**OWN_TEXT),
    "qwen2": LLAMA32Config(**OWN_TEXT, attention_bias=True, output_bias=False, tie_word_embeddings=True),
    "qwen3": LLAMA32Config(**OWN_TEXT, qk_norm=True, head_dim=8),
    "gpt2": GPTConfig(vocab_size=V, context_length=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
}
PAIRS = [(tower, decoder, fusion) for tower in OWN_TOWERS for decoder in OWN_DECODERS for fusion in ("early", "cross")]
SAMPLES = [[*range(1, 4), IMAGE, *range(5, 9)], [IMAGE, *range(10, 14)], [*range(20, 25)]]


def own_pair(tower, decoder, fusion, projector="mlp"):
    config_class, model = {"early": (MLLAMAConfig, MllamaForConditionalGeneration),
                           "cross": (partial(CrossAttentionConfig, cross_every=1), CrossAttentionVLM)}[fusion]  # fmt: skip
    join = {"projector_type": projector, "vision_feature_layer": -1 if projector == "mlp" else None, "image_token_id": IMAGE}
    return shaken(model(config_class(OWN_TOWERS[tower], OWN_DECODERS[decoder], **join)))


def expanded(model, sample):
    """A sample with as many placeholders as the model wants for its image: [1, T]."""
    count = model.config.text_config.num_image_tokens
    return torch.tensor([[each for token in sample for each in [token] * (count if token == IMAGE else 1)]])


@pytest.mark.parametrize("tower, decoder, fusion", PAIRS)
def test_what_training_asks_of_any_pair(tmp_path, tower, decoder, fusion):
    """Samples packed in one row are what they are alone; features of a frozen tower, computed before, change no bit; beside the
    projector each matrix of LoRA learns, and no other; what is saved is what was trained, over floats and over four bits."""
    model, images = own_pair(tower, decoder, fusion), pixels(2, 3, 8, 8)
    rows = [expanded(model, sample) for sample in SAMPLES]
    pattern, positions = block_pattern([row.shape[1] for row in rows])
    packed = {"input_ids": torch.cat(rows, dim=1), "attention_mask": pattern, "position_ids": positions}
    with torch.no_grad():
        alone = [model(row, image)["logits"] for row, image in zip(rows, (images[:1], images[1:], None), strict=True)]
        close(model(**packed, pixel_values=images)["logits"], torch.cat(alone, dim=1))

    model.vision_tower.requires_grad_(False)
    model.language_model.requires_grad_(False)
    quantised = fusion == "early"
    if quantised:
        quantize_(model.language_model, r".*(q_proj|up_proj|attn\.qkv|mlp\.fc)")
    plain, targets = copy.deepcopy(model), ["q_proj", "k_proj", "up_proj", "attn.qkv", "mlp.fc"]
    wrapped = convert_linears_to_lora(model.language_model, 2, 4, 0.0, (torch.nn.Linear, Linear4bit), targets)
    labels = packed["input_ids"]
    model(**packed, labels=labels, vision_features=model.vision_features(images))["loss"].backward()
    learned = {name: grad.clone() for name, grad in grads(model).items()}
    model.zero_grad(set_to_none=True)
    model(**packed, labels=labels, pixel_values=images)["loss"].backward()
    assert learned.keys() == grads(model).keys() and all(torch.equal(grad, learned[k]) for k, grad in grads(model).items())
    moved = {name for name in learned if "multi_modal_projector" not in name}
    assert moved == {f"language_model.{name}.{part}" for name in wrapped for part in ("lora_a", "lora_b")}
    with torch.no_grad():
        for name in moved:
            model.get_parameter(name).add_(torch.randn_like(model.get_parameter(name)), alpha=0.1)
        kind = save_pretrained(model, tmp_path)
        expected = "llava" if fusion == "early" and "registers" not in tower else "mllama_scratch"
        assert kind == expected and ("transformers does not open" in layout_line(model, tmp_path, kind)) == (kind != "llava")
        save_lora(model, tmp_path / "lora")
        load_lora(plain, tmp_path / "lora")
        for again in (from_pretrained(tmp_path), plain):
            close(again(**packed, pixel_values=images)["logits"], model(**packed, pixel_values=images)["logits"])


@torch.no_grad()
def test_peft_opens_the_adapter_of_a_gpt2_in_a_llava(tmp_path):
    """A run with --lm GPT2 --lora had trained to its end, and then said that its adapter had no layout."""
    peft = pytest.importorskip("peft", reason="the adapter's layout is PEFT's")
    ours, (ids, x) = from_pretrained_pair(tmp_path), (torch.arange(12).view(1, 12), pixels(1, 3, 28, 28))
    ids[:, 2:6] = IMAGE
    before = ours(ids, x)["logits"]
    convert_linears_to_lora(ours.language_model, 2, 4, targets=["attn.qkv", "mlp.proj"])
    for name, parameter in ours.named_parameters():
        if name.endswith("lora_b"):
            parameter.copy_(torch.randn_like(parameter))
    save_lora(ours, tmp_path / "lora")
    base = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "theirs")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    close(theirs(input_ids=ids, pixel_values=x).logits, ours(ids, x)["logits"])
    assert (ours(ids, x)["logits"] - before).abs().max() > 0.1


def test_lora_in_a_layer_that_is_several_elsewhere_is_no_adapter(tmp_path):
    model = from_pretrained_pair(tmp_path)
    convert_linears_to_lora(model.vision_tower, 2, 4, targets=["attn.qkv"])
    with pytest.raises(ValueError, match="a llava has no such layers as vision_tower.blocks.0.attn.qkv"):
        save_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("decoder", OWN_DECODERS)
@pytest.mark.parametrize("fusion", ["early", "cross"])
def test_every_part_of_a_pair_that_trains_has_a_gradient(decoder, fusion):
    """Queries and keys of the layers between Qwen3's blocks were not normed: their norms were weights that nothing read."""
    for tower in OWN_TOWERS:
        model = own_pair(tower, decoder, fusion, "linear")
        ids = expanded(model, SAMPLES[0])
        model(ids, pixels(1, 3, 8, 8), labels=ids)["loss"].backward()
        assert set(grads(model)) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("fusion", ["early", "cross"])
@torch.no_grad()
def test_a_vit_adapter_joins_a_pair_and_is_saved_as_its_projector(tmp_path, fusion):
    model, images = own_pair("vit", "qwen2", fusion), pixels(1, 3, 8, 8)
    model.multi_modal_projector = shaken(ViTAdapter(16, 64, "ffn"))
    ids = expanded(model, SAMPLES[0])
    before = model(ids, images)["logits"]
    save_pretrained(model, tmp_path)
    close(from_pretrained(tmp_path)(ids, images)["logits"], before)


# ---- what is refused -------------------------------------------------------------------------------------------------------

CLIP_TOWER = {**TOWER, "intermediate_size": 64}
NO_GRID = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}


def their_llava(tower, **more):
    return tf.LlavaConfig(vision_config=tower, text_config=tf.LlamaConfig(**DECODER), image_token_index=IMAGE, **more)


REFUSED = {  # configs as transformers writes them, and what the one line says
    "swin": (lambda: tf.SwinConfig(**NO_GRID), "'swin', which is not read here: .*no one grid"),
    "convnext": (lambda: tf.ConvNextConfig(), "'convnext', .*without patches"),
    "deit": (lambda: tf.DeiTConfig(), "'deit', .*distillation token; a DeiT without one is published as vit"),
    "siglip2": (lambda: tf.Siglip2Config(), "'siglip2', .*NaFlex.*fixed-size ones say siglip"),
    "siglip2 tower": (lambda: tf.Siglip2VisionConfig(), "'siglip2_vision_model', .*NaFlex"),
    "clip text": (lambda: tf.CLIPTextConfig(), "'clip_text_model', .*only the image tower is read"),
    "dinov3": (lambda: tf.DINOv3ViTConfig(), "'dinov3_vit', .*2-D rotary positions"),
    "dinov2 giant": (lambda: tf.Dinov2Config(use_swiglu_ffn=True), "use_swiglu_ffn is true: DINOv2's giant"),
    "smollm3": (lambda: tf.SmolLM3Config(), "'smollm3', .*NoPE"),
    "gemma": (lambda: tf.GemmaConfig(), "'gemma', .*norms that add 1"),
    "qwen2-vl": (lambda: tf.Qwen2VLConfig(), "'qwen2_vl', .*two .tower. and three .decoder. dimensions"),
    "a tower that no LLaVA has": (lambda: their_llava(tf.SwinConfig(**NO_GRID)), "vision_config is a swin: only"),
    "grey tower": (
        lambda: their_llava(tf.CLIPVisionConfig(**CLIP_TOWER, num_channels=1)),
        "its tower reads images of 1 channels: it must be 3, RGB",
    ),
    "grey SigLIP": (
        lambda: their_llava(tf.SiglipVisionConfig(**CLIP_TOWER, num_channels=1), vision_feature_select_strategy="full"),
        "its tower reads images of 1 channels",
    ),
    **{
        f"layer {layer}": (
            lambda layer=layer: their_llava(tf.CLIPVisionConfig(**CLIP_TOWER), vision_feature_layer=layer),
            f"vision_feature_layer is {layer}: the tower has 0 to 3, or -1 to -4",
        )
        for layer in (4, -5)
    },
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_says_what_is_missing(tmp_path, case):
    """Before any weights are: there are none."""
    make, message = REFUSED[case]
    make().save_pretrained(tmp_path)
    for read in (from_pretrained, load_vlm, partial(find_part, part="vision"), partial(find_part, part="lm")):
        with pytest.raises(ValueError, match=message) as error:
            read(tmp_path)
        assert "\n" not in str(error.value) and "config.json" in str(error.value)


def test_the_reasons_are_those_of_the_docs_and_none_is_given_for_a_model_that_is_read():
    assert not NOT_READ.keys() & FAMILIES.keys()
    page = (Path(__file__).resolve().parents[1] / "docs" / "checkpoints.md").read_text()
    for kind in ("gemma", "idefics2", "paligemma", "qwen2_vl", "pixtral", "molmo"):
        assert f"| no | {NOT_READ[kind]} |" in page, kind
