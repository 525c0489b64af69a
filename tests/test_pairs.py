"""Any tower, any decoder: published ones against transformers at toy size, alone and joined, read and written.

Towers: the features of every layer. Decoders: logits and greedy words. Pairs, as LLaVA: logits and greedy words, both ways.
"""

import pytest
import torch

from lib.checkpoint import from_pretrained, save_pretrained
from lib.positions import resized_tower
from model import MllamaForConditionalGeneration

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


@pytest.mark.parametrize(
    ("make", "window"),
    [
        (lambda: tf.MistralForCausalLM(tf.MistralConfig(**DECODER, sliding_window=32)), 32),
        (lambda: tf.Qwen2ForCausalLM(
            tf.Qwen2Config(**DECODER, use_sliding_window=True, sliding_window=16, max_window_layers=1)), 16),
    ],
)  # fmt: skip
def test_a_window_shorter_than_the_context_is_refused(tmp_path, make, window):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"sliding_window is {window}, shorter than the context of 64"):
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
    model = shaken(tf.LlavaForConditionalGeneration(config))
    if decoder == "gpt2":  # transformers cannot tie it here, gpt.py knows no other
        model.lm_head.weight.data.copy_(model.model.language_model.wte.weight.data)
    return model


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


def test_a_gpt2_with_a_head_of_its_own_is_refused(tmp_path):
    """Dropping it, and writing with the embedding instead, was 16 off in the logits."""
    model = llava("clip", "gpt2")
    model.lm_head.weight.data.add_(1.0)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lm_head.weight differs from .*wte.weight"):
        from_pretrained(tmp_path)


@torch.no_grad()
def test_a_pair_that_no_published_layout_holds_comes_back_in_ours(tmp_path):
    ours = from_pretrained_pair(tmp_path)
    ours.config.vision_feature_layer = None
    assert save_pretrained(ours, tmp_path / "own") == "mllama_scratch"
    again = from_pretrained(tmp_path / "own")
    assert again.config == ours.config and type(again.vision_tower) is type(ours.vision_tower)
    ids, x = torch.arange(12).view(1, 12), pixels(1, 3, 28, 28)
    ids[:, 2:6] = IMAGE
    close(again(ids, x)["logits"], ours(ids, x)["logits"])


def from_pretrained_pair(folder):
    llava("dinov2", "gpt2").save_pretrained(folder / "theirs")
    return from_pretrained(folder / "theirs")
