"""The laws of model.py. The reference is transformers, at toy sizes, with random weights that went through safetensors."""

import copy
import re
from dataclasses import asdict

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import model as m
from extras.cross_attention import CrossAttentionConfig, CrossAttentionVLM
from lib.checks import checked
from lib.fast_decode import fast_step
from lib.layouts.llama import read_llama
from lib.tokenizer import BPETokenizer
from lib.trace import record
from model import (
    Linear_LORA,
    Llama3ForCausalLM,
    LLAMA32Config,
    MLLAMAConfig,
    MllamaForConditionalGeneration,
    MultiModalProjector,
    convert_linears_to_lora,
    rotary_frequencies,
)
from processing_mllama import MllamaImageProcessor
from toys import (
    IMAGE,
    LLAMA3,
    TEXT,
    VISION,
    V,
    block_pattern,
    close,
    grads,
    make,
    make_vlm,
    padding,
    place,
    random_ids,
    shaken,
    words_and_images,
)
from vit_scratch import ViTAdapter


@pytest.fixture(scope="module")
def lm():
    return make()


@pytest.fixture(scope="module")
def ids():
    return random_ids(3, 12)


# ---- parity ----------------------------------------------------------------------------------------------------------


def their_llama(transformers, **changes):
    config = {"vocab_size": V, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": 9}
    config |= {"num_key_value_heads": 3, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "pad_token_id": 7}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "eos_token_id": None, "bos_token_id": None}
    return transformers.LlamaConfig(**{**config, **changes})


SPELLINGS = [  # what transformers 5 writes for a VLM -> our names
    (r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model."),
    (r"^model\.vision_model\.", "vision_tower.vision_model."),
    (r"^model\.connector\.modality_projection\.proj\.", "multi_modal_projector.linear."),
    (r"^model\.text_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
]


def ours_from(theirs, ours, folder):
    """Our module with the tensors of what transformers writes."""
    theirs.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    if isinstance(ours, MllamaForConditionalGeneration):
        for pattern, name in SPELLINGS:
            tensors = {re.sub(pattern, name, key): tensor for key, tensor in tensors.items()}
    for head in {name for name in ours.state_dict() if name.endswith("lm_head.weight")} - tensors.keys():
        tensors[head] = tensors[head.replace("lm_head", "model.embed_tokens")]  # tied
    ours.load_state_dict(tensors, strict=True)
    return ours.eval()


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers", reason="the reference for parity is transformers")


LLAMAS = {
    "9 query, 3 key heads": ({}, {}),
    "heads of odd width": ({"head_dim": 6}, {"head_dim": 6}),
    "no sharing, biases": (
        {"n_kv_groups": None, "attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 9, "attention_bias": True, "mlp_bias": True},
    ),
    "tied": ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    "llama3": (
        {"head_dim": 16, "rope_scaling": LLAMA3},
        {"head_dim": 16, "rope_parameters": {**LLAMA3, "rope_theta": 10000.0}},
    ),
    "linear, older spelling": (
        {"head_dim": 16, "rope_scaling": {"type": "linear", "factor": 3.0}},
        {"head_dim": 16, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}},
    ),
}


@pytest.mark.parametrize("case", LLAMAS)
def test_llama_has_transformers_logits_loss_and_hidden_states(transformers, tmp_path, ids, case):
    ours_settings, their_settings = LLAMAS[case]
    theirs = shaken(transformers.LlamaForCausalLM(their_llama(transformers, **their_settings)))
    ours = ours_from(theirs, Llama3ForCausalLM(checked(LLAMA32Config, **{**TEXT, **ours_settings})), tmp_path)
    for side in ("left", "right"):
        mask = padding((12, 7, 1), 12, side)
        labels = ids.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)  # nothing real stands before the first token
        expected = theirs(ids, attention_mask=mask, labels=labels, output_hidden_states=True)
        real = mask.bool()
        with record(ours, "model.embed_tokens", "model.layers.?", "model.norm") as seen:
            close(ours(ids, attention_mask=mask)["logits"][real], expected.logits[real])
        close(ours(ids, attention_mask=mask, labels=labels)["loss"], expected.loss)
        for name, state in zip(("embed_tokens", "layers.0", "layers.1", "norm"), expected.hidden_states, strict=True):
            close(seen[f"model.{name}"][real], state[real])


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        *(("smollm2-135m", 134_515_008), ("llama-3.2-1b", 1_235_814_400), ("llama-3.2-3b", 3_212_749_824)),
        *(("qwen2.5-0.5b", 494_032_768), ("qwen3-0.6b", 596_049_920)),
    ],
)
def test_published_sizes(preset, parameters):
    with torch.device("meta"):
        model = Llama3ForCausalLM(LLAMA32Config.preset(preset))
    assert sum(p.numel() for p in model.parameters()) == parameters


QWENS = {  # as config.json has it
    "qwen2.5-0.5b": {
        **{"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
        **{"num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "sliding_window": 32768},
    },
    "qwen3-0.6b": {
        **{"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
        **{"num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 40960, "head_dim": 128},
        **{"attention_bias": False, "rope_scaling": None, "sliding_window": None},
    },
}


@pytest.mark.parametrize("preset", QWENS)
def test_a_qwens_preset_is_what_its_published_config_says(transformers, preset):
    """Read as it is published, and as transformers writes it today."""
    published = {**QWENS[preset], "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "vocab_size": 151936}
    published |= {"rope_theta": 1000000, "initializer_range": 0.02, "attention_dropout": 0.0, "use_sliding_window": False}
    today = transformers.AutoConfig.for_model(**published).to_dict()
    for config in (published, today):
        assert read_llama(config, published["model_type"]) == LLAMA32Config.preset(preset)


@pytest.mark.parametrize("preset", ["llama-3.2-1b", "llama-3.2-3b", "smollm2-135m"])
def test_published_rotations(transformers, preset):
    config = LLAMA32Config.preset(preset)
    rope = {"rope_theta": config.rope_base, **(config.rope_scaling or {"rope_type": "default"})}
    theirs = transformers.LlamaConfig(
        hidden_size=config.hidden_size, num_attention_heads=config.n_heads, rope_parameters=rope, max_position_embeddings=8192
    )
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    torch.testing.assert_close(rotary_frequencies(config), theirs.inv_freq, atol=0, rtol=1e-6)
    positions = torch.tensor([[0, 5, 300, 2000]])
    cos, sin = m.LLAMARotaryEmbedding(config)(positions, torch.float32)
    their_cos, their_sin = theirs(torch.zeros(1), positions)
    sign = torch.tensor([-1.0, 1.0]).repeat_interleave(config.head_dim // 2)
    close(cos[:, 0], their_cos, 1e-3)  # at 2,000 radians the last digit of a float32 is 1e-4
    close(sin[:, 0], sign * their_sin, 1e-3)


@pytest.mark.parametrize("fast", [False, True])
def test_greedy_generation_is_that_of_transformers(transformers, tmp_path, fast):
    theirs = shaken(transformers.LlamaForCausalLM(their_llama(transformers, tie_word_embeddings=True)))
    ours = ours_from(theirs, Llama3ForCausalLM(LLAMA32Config(**TEXT, tie_word_embeddings=True)), tmp_path)
    step = fast_step(ours) if fast else None
    prompts = [random_ids(n, seed=n).tolist() for n in (9, 4, 1)]
    input_ids, mask = place(prompts, "left", 9)
    expected = theirs.generate(input_ids=input_ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, 9:].tolist()
    assert ours.generate(prompts, 12, step=step) == expected
    assert ours.generate(input_ids, 12, attention_mask=mask, step=step) == expected
    right, mask = place(prompts, "right", 11)
    assert ours.generate(right, 12, attention_mask=mask, step=step) == expected
    stopped = ours.generate(prompts, 12, stop_tokens=[expected[0][3]], step=step)
    assert stopped[0] == expected[0][: expected[0].index(expected[0][3])]


# ---- laws of the decoder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, padding((12, 5, 1), 12, "left"), padding((12, 5, 1), 12, "right"), "packed"])
def test_sdpa_equals_explicit_attention_in_outputs_and_gradients(ids, mask):
    mask = block_pattern((5, 4, 3))[0] if isinstance(mask, str) else mask
    real = torch.ones_like(ids) if mask is None or mask.ndim == 4 else mask
    results = []
    for attention in ("sdpa", "explicit"):
        model = make(attention=attention)
        out = model(ids, attention_mask=mask, labels=ids.masked_fill(real == 0, -100))
        out["loss"].backward()
        results.append((out["logits"][real.bool()], grads(model)))
    close(*results)


@pytest.mark.parametrize("mask", [None, padding((12, 5, 1), 12, "left"), "packed"])
def test_in_bf16_on_a_cpu_attention_is_two_products(ids, mask):
    mask = block_pattern((5, 4, 3))[0] if isinstance(mask, str) else mask
    with torch.autocast("cpu", torch.bfloat16):
        ours, explicit = (make(attention=kind)(ids, attention_mask=mask)["logits"] for kind in ("sdpa", "explicit"))
    assert torch.equal(ours, explicit)


def test_a_token_never_sees_later_ones(lm, ids):
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % V
    close(lm(ids)["logits"][:, :7], lm(changed)["logits"][:, :7])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_token_and_a_batch_is_its_rows(lm, ids, side):
    lengths = (12, 7, 1)
    together = lm(ids, attention_mask=padding(lengths, 12, side))["logits"]
    assert together.isfinite().all()
    for row, logits, n in zip(ids, together, lengths, strict=True):
        part = slice(None, n) if side == "right" else slice(12 - n, None)
        close(logits[part], lm(row[None, part])["logits"][0])


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
def test_packed_samples_are_separate_samples(ids, attention):
    lm, lengths = make(attention=attention), (5, 4, 3)
    pattern, positions = block_pattern(lengths)
    packed = lm(ids[:1], attention_mask=pattern, position_ids=positions, labels=ids[:1])
    losses = []
    for alone, logits in zip(ids[0].split(lengths), packed["logits"][0].split(lengths), strict=True):
        close(logits, lm(alone[None])["logits"][0])
        losses.append(lm(alone[None], labels=alone[None])["loss"] * (len(alone) - 1))
    close(packed["loss"], sum(losses) / 9)
    nobody = pattern.clone()
    nobody[..., -1, :] = False
    assert lm(ids[:1], attention_mask=nobody, position_ids=positions)["logits"].isfinite().all()


@pytest.mark.parametrize("fast", [False, True])
def test_cached_equals_uncached_token_by_token(ids, fast):
    model = make()
    mask = padding((12, 7, 6), 12, "left")
    expected = model(ids, attention_mask=mask)["logits"]
    step = fast_step(model) if fast else model
    with torch.no_grad():
        cache = model.new_cache(3, 12)
        first = model(ids[:, :7], attention_mask=mask[:, :7], cache=cache, logits_to_keep=1)["logits"]
        later = [step(ids[:, t : t + 1], cache=cache)["logits"] for t in range(7, 12)]
    close(torch.cat([first, *later], dim=1), expected[:, 6:])


def test_a_second_stretch_of_text_continues_the_first(lm, ids):
    cache = lm.new_cache(3, 12)
    parts = [lm(part, cache=cache)["logits"] for part in ids.split((5, 1, 6), dim=1)]
    close(torch.cat(parts, dim=1), lm(ids)["logits"])


def test_embeddings_and_logits_to_keep(lm, ids):
    logits = lm(ids)["logits"]
    close(lm(inputs_embeds=lm.model.embed_tokens(ids))["logits"], logits)
    close(lm(ids, logits_to_keep=2)["logits"], logits[:, -2:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_and_leaves_the_rotations_exact(lm, ids, dtype):
    expected = lm(ids)["logits"]
    half = copy.deepcopy(lm).to(dtype)
    with torch.no_grad():
        logits = half(ids)["logits"]
        assert logits.dtype == dtype and half.generate(ids, 3)
        close(half(ids, labels=ids)["loss"], lm(ids, labels=ids)["loss"], 0.02)
    assert (logits.float() - expected).abs().max() < 0.03 * expected.abs().max()
    back = half.float()
    back.load_state_dict(lm.state_dict())
    close(back(ids)["logits"], expected)


def test_the_norm_survives_numbers_whose_squares_fp16_cannot_hold():
    norm, x = m.LLAMARMSNorm(8, eps=1e-5), torch.linspace(-600, 900, 8)
    close(norm.half()(x.half()).float(), x / x.square().mean().sqrt(), 1e-3)


def test_a_model_made_on_the_meta_device_works_once_loaded(lm, ids):
    with torch.device("meta"):
        model = Llama3ForCausalLM(lm.config)
    model.load_state_dict(lm.state_dict(), assign=True)
    close(model.eval()(ids)["logits"], lm(ids)["logits"])


def test_generation_leaves_training_possible(ids):
    model = make()
    model.generate(ids, 2)  # the rotary table is made here, in inference mode
    model(ids, labels=ids)["loss"].backward()
    assert len(grads(model)) == len(list(model.parameters()))


def test_dropout_is_for_training_only(ids):
    model = make(dropout=0.3)
    close(model(ids)["logits"], make()(ids)["logits"])
    assert (model.train()(ids)["logits"] - model(ids)["logits"]).abs().max() > 0.1


def test_recorded_weights_are_those_of_every_query_head_and_causal(lm, ids):
    with record(lm, "*.weights") as seen:
        logits = lm(ids)["logits"]
    close(logits, lm(ids)["logits"])
    assert list(seen) == [f"model.layers.{i}.self_attn.weights" for i in range(3)]
    weights = seen["model.layers.1.self_attn.weights"]
    assert weights.shape == (3, 9, 12, 12)
    close(weights.sum(-1), torch.ones(3, 9, 12))
    assert weights.triu(1).abs().max() == 0
    with record(explicit := make(attention="explicit"), "*.layers.1.*.weights") as clear:
        explicit(ids)
    close(clear["model.layers.1.self_attn.weights"], weights)


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_the_head_is_applied_where_labels_count_and_logits_come_when_asked_for(ids):
    lm, seen = make(), []
    labels = ids.masked_fill(torch.arange(12) < 9, -100)
    logits = lm(ids)["logits"]
    lm.lm_head.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    out = lm(ids, labels=labels)
    assert seen == [(9, 36)]
    close(out["loss"], F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100))
    close(out["logits"], logits)
    with pytest.raises(KeyError):
        out["nothing"]


def test_a_batch_without_a_single_label_costs_nothing(ids):
    model = make()
    loss = model(ids, labels=torch.full_like(ids, -100))["loss"]
    loss.backward()
    assert loss == 0 and all(grad.abs().max() == 0 for grad in grads(model).values())


# ---- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_lora_starts_as_the_layer_it_wraps_and_is_its_formula(bias):
    linear, x = nn.Linear(6, 5, bias=bias), torch.randn(2, 3, 6)
    weight, layer = linear.weight, Linear_LORA(6, 5, rank=2, alpha=6, linear=linear)
    assert layer.linear is linear and layer.linear.weight is weight
    close(layer(x), linear(x))
    assert layer.lora_a.abs().max() > 0 and layer.lora_b.abs().max() == 0
    nn.init.normal_(layer.lora_b)
    close(layer(x), linear(x) + 3.0 * x @ layer.lora_a.T @ layer.lora_b.T)
    layer(x).sum().backward()
    assert set(grads(layer)) == {"lora_a", "lora_b"}


def test_the_posts_loop_that_puts_lora_in_changes_nothing_at_first(ids):
    """A layer made from sizes takes the weight that is copied in. A bias nobody asked for would stay random, and move the
    logits by 1.2."""

    def put_lora(module, rank=4, alpha=16, dropout=0.0):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                in_dim, out_dim = child.in_features, child.out_features
                lora = Linear_LORA(in_dim, out_dim, rank=rank, alpha=alpha, dropout=dropout)
                lora.linear.weight.data.copy_(child.weight.data)
                setattr(module, name, lora)
            else:
                put_lora(child, rank, alpha, dropout)

    model, same = make(), make()
    expected = model(ids).logits
    put_lora(model, dropout=0.1)
    close(model.eval()(ids).logits, expected)
    assert isinstance(model.lm_head, Linear_LORA)
    convert_linears_to_lora(same, rank=4, alpha=16, dropout=0.0, target_module_classes=(torch.nn.Linear,))
    close(same(ids).logits, expected)
    layers = [sum(isinstance(layer, Linear_LORA) for layer in each.modules()) for each in (model, same)]
    assert layers == [22, 21]  # ours leaves the head as it is
    assert Linear_LORA(6, 5).linear.bias is None and Linear_LORA(6, 5, bias=True).linear.bias is not None


@pytest.mark.parametrize(
    ("targets", "count"),
    [(None, 21), (["q_proj", "v_proj"], 6), (["up_proj"], 3), (["lm_head"], 1), (r".*layers\.[01]\..*_proj", 14), (["x"], 0)],
)
def test_lora_targets(ids, targets, count):
    model = make()
    names = convert_linears_to_lora(model, rank=2, alpha=4, targets=targets)
    assert len(names) == count == sum(isinstance(module, Linear_LORA) for module in model.modules())
    assert not convert_linears_to_lora(model, targets=targets)  # none twice
    if not names:
        return
    assert any("lm_head" in name for name in names) == (targets == ["lm_head"])
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(("lora_a", "lora_b")))
        if p.requires_grad:
            p.data.normal_(std=0.3)
    out = model(ids, labels=ids)
    close(out["loss"], F.cross_entropy(out["logits"][:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    out["loss"].backward()
    assert len(grads(model)) == 2 * count


def test_lora_dropout_is_for_training_only():
    layer, x = Linear_LORA(30, 4, 2, 4, dropout=0.5), torch.randn(5, 30)
    nn.init.normal_(layer.lora_b)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


# ---- the projector -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 2, 4])
def test_projector_is_idefics3s_connector(transformers, r):
    config = transformers.Idefics3Config(
        vision_config={"hidden_size": 6}, text_config={"model_type": "llama", "hidden_size": 32}, scale_factor=r
    )
    theirs = transformers.models.idefics3.modeling_idefics3.Idefics3Connector(config)
    ours = MultiModalProjector(6, 32, None, "linear", bias=False, pixel_shuffle=r)
    ours.linear.weight = theirs.modality_projection.proj.weight
    x = torch.randn(2, 64, 6)
    close(ours(x), theirs(x))


def test_pixel_shuffle_joins_neighbours_on_any_grid():
    h, w, r = 4, 6, 2
    x = torch.arange(h * w * 3.0).view(1, h * w, 3)
    joined = m.pixel_shuffle(x, (h, w), r)
    assert joined.shape == (1, 6, 12)
    for row in range(h // r):
        for column in range(w // r):
            square = [x[0, (row * r + i) * w + column * r + j] for i in range(r) for j in range(r)]
            assert torch.equal(joined[0, row * (w // r) + column], torch.cat(square))


@pytest.mark.parametrize(("adapter", "projector"), [("ffn", "mlp"), ("linear", "linear")])
def test_an_adapter_stands_in_the_projectors_place(adapter, projector):
    """vit_scratch.py's join is the same: its weights load into the projector, and a model that holds it computes the same."""
    vlm, x = make_vlm(projector_type=projector, projector_bias=True), torch.randn(1, 3, 16, 16)
    expected, joint = vlm.image_features(x), ViTAdapter(VISION["hidden_size"], TEXT["hidden_size"], adapter)
    joint.load_state_dict(vlm.multi_modal_projector.state_dict())
    vlm.multi_modal_projector = joint
    close(vlm.image_features(x), expected)


def test_projector_mistakes():
    with pytest.raises(AssertionError, match="projector_type is 'conv'"):
        MultiModalProjector(4, 4, projector_type="conv")


# ---- vision and language -----------------------------------------------------------------------------------------------

VLMS = {
    "llava": {"vision_feature_layer": -2},
    "llava, last layer": {"vision_feature_layer": -1},
    "idefics3": {"projector_type": "linear", "pixel_shuffle": 2},
    "smolvlm": {"projector_type": "linear", "pixel_shuffle": 2, "text": {"tie_word_embeddings": True}},
}


def their_vlm(transformers, case):
    ours = VLMS[case]
    text = their_llama(transformers, **ours.get("text", {}))
    if case.startswith("llava"):
        config = transformers.LlavaConfig(
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION}, text_config=text,
            image_token_index=IMAGE, vision_feature_select_strategy="full", vision_feature_layer=ours["vision_feature_layer"],
        )  # fmt: skip
        return shaken(transformers.LlavaForConditionalGeneration(config))
    name = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[case]
    config = getattr(transformers, f"{name}Config")(
        vision_config=VISION, text_config=text, image_token_id=IMAGE, scale_factor=2, tie_word_embeddings=case == "smolvlm"
    )
    return shaken(getattr(transformers, f"{name}ForConditionalGeneration")(config))


def by_row(pixels):
    """As Idefics3 wants them: [B, most images in a row, 3, H, W], blank ones ignored."""
    padded = torch.zeros(3, 2, *pixels.shape[1:])
    padded[0], padded[2, 0] = pixels[:2], pixels[2]
    return padded


@pytest.mark.parametrize("case", VLMS)
def test_vlm_has_transformers_logits_and_answers(transformers, tmp_path, case):
    theirs = their_vlm(transformers, case)
    ours = make_vlm(**VLMS[case])
    ours_from(theirs, ours, tmp_path)
    rows, pixels = words_and_images(ours.config.text_config.num_image_tokens)
    their_pixels = pixels if case.startswith("llava") else by_row(pixels)
    T = max(map(len, rows))
    for side in ("left", "right"):
        ids, mask = place(rows, side, T)
        labels = ids.masked_fill((mask == 0) | (mask.cumsum(1) == 1) | (ids == IMAGE), -100)
        expected = theirs(input_ids=ids, attention_mask=mask, pixel_values=their_pixels, labels=labels)
        close(ours(ids, pixels, mask)["logits"][mask.bool()], expected.logits[mask.bool()])
        close(ours(ids, pixels, mask, labels=labels)["loss"], expected.loss)
    ids, mask = place(rows, "left", T)
    answers = theirs.generate(
        input_ids=ids, attention_mask=mask, pixel_values=their_pixels, max_new_tokens=8, do_sample=False
    )[:, T:]  # fmt: skip
    assert ours.generate(input_ids=ids, pixel_values=pixels, attention_mask=mask, max_new_tokens=8) == answers.tolist()


@pytest.fixture(scope="module", params=["early", "cross"])
def vlm(request):
    return make_vlm(cross=request.param == "cross", pixel_shuffle=2)


@pytest.fixture
def batch(vlm):
    rows, pixels = words_and_images(vlm.config.text_config.num_image_tokens)
    ids, mask = place(rows, "left", max(map(len, rows)))
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}


def test_a_batch_is_its_rows_alone_and_padding_changes_nothing(vlm, batch):
    rows, pixels = words_and_images(vlm.config.text_config.num_image_tokens)
    for side in ("left", "right"):
        ids, mask = place(rows, side, len(rows[0]) + 2)
        ids[mask == 0] = IMAGE  # whatever stands there
        together = vlm(ids, pixels, mask)["logits"]
        assert together.isfinite().all()
        for row, own, logits, real in zip(rows, (pixels[:2], None, pixels[2:]), together, mask.bool(), strict=True):
            close(logits[real], vlm(torch.tensor([row]), own)["logits"][0])


def test_cached_answers_equal_uncached_ones_and_the_tower_runs_once(vlm, batch, monkeypatch):
    calls, features = [], vlm.vision_tower.features
    monkeypatch.setattr(vlm.vision_tower, "features", lambda *args: calls.append(1) or features(*args))
    keys, is_cross = [], isinstance(vlm, CrossAttentionVLM)
    for layer in vlm.language_model.model.cross_layers.values() if is_cross else ():
        monkeypatch.setattr(layer, "keys_and_values", lambda x, make=layer.keys_and_values: keys.append(1) or make(x))
    answers = vlm.generate(**batch, max_new_tokens=6)
    assert len(calls) == 1 and len(keys) == (2 if is_cross else 0)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for t in range(6):
        with torch.no_grad():
            best = vlm(ids, batch["pixel_values"], mask)["logits"][:, -1].argmax(-1)
        assert best.tolist() == [row[t] for row in answers]
        ids, mask = torch.cat([ids, best[:, None]], dim=1), F.pad(mask, (0, 1), value=1)


def test_what_an_image_became_may_be_given_in_its_place(vlm, batch):
    expected = vlm(**batch)["logits"]
    pixels = batch.pop("pixel_values")
    close(vlm(**batch, vision_features=vlm.vision_features(pixels))["logits"], expected)
    close(vlm(**batch, image_features=vlm.image_features(pixels))["logits"], expected)
    features = vlm.image_features(pixels)
    assert vlm.generate(**batch, image_features=features, max_new_tokens=3) == vlm.generate(
        **batch, pixel_values=pixels, max_new_tokens=3
    )


def test_text_alone_is_the_language_model_alone(vlm, ids):
    close(vlm(ids)["logits"], vlm.language_model(ids)["logits"])
    close(vlm(ids, torch.zeros(0, 3, 16, 16))["logits"], vlm.language_model(ids)["logits"])
    assert vlm.generate(ids, max_new_tokens=3) == vlm.language_model.generate(ids, 3)


def test_gradients_reach_everything_but_a_frozen_tower(batch, vlm):
    vlm = copy.deepcopy(vlm)
    vlm(**batch, labels=batch["input_ids"])["loss"].backward()
    missing = {name for name, _ in vlm.named_parameters()} - set(grads(vlm))
    assert not missing and all(grad.abs().max() > 0 for name, grad in grads(vlm).items() if "k_proj.bias" not in name)
    full, recorded, features = grads(vlm), [], vlm.vision_tower.features
    vlm.zero_grad()
    vlm.vision_tower.features = lambda *args: recorded.append(torch.is_grad_enabled()) or features(*args)
    vlm.image_features(batch["pixel_values"])
    with torch.no_grad():
        vlm.image_features(batch["pixel_values"])
    vlm.vision_tower.requires_grad_(False)
    vlm(**batch, labels=batch["input_ids"])["loss"].backward()
    assert recorded == [True, False, False]
    close(grads(vlm), {name: grad for name, grad in full.items() if not name.startswith("vision_tower.")})


def test_the_loss_counts_neither_images_nor_padding(batch, vlm):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    counts = (mask == 1) & (ids != IMAGE) & (mask.cumsum(1) > 1)
    expected = vlm(**batch, labels=ids.masked_fill(~counts, -100))
    close(vlm(**batch, labels=ids)["loss"], expected["loss"])
    logits, targets = expected["logits"][:, :-1].flatten(0, 1), ids[:, 1:].masked_fill(~counts[:, 1:], -100).flatten()
    close(expected["loss"], F.cross_entropy(logits, targets, ignore_index=-100))


def test_what_both_towers_computed_has_names(batch, vlm):
    with record(vlm) as seen:
        vlm(**batch)
    assert seen["vision_tower.vision_model.encoder.layers.0.self_attn.weights"].shape == (3, 4, 16, 16)
    assert seen["multi_modal_projector"].shape == (3, 4, 36)
    assert seen["language_model.model.layers.0.self_attn.weights"].shape[1] == 9
    cross = {name for name in seen if "cross_layers" in name and name.endswith("weights")}
    wanted = (0, 2) if isinstance(vlm, CrossAttentionVLM) else ()
    assert cross == {f"language_model.model.cross_layers.{i}.weights" for i in wanted}


def test_images_fill_their_places_in_order():
    vlm = make_vlm(pixel_shuffle=2)
    rows, _ = words_and_images(4)
    ids, mask = place(rows, "right", len(rows[0]))
    features = torch.arange(3 * 4 * 36.0).view(3, 4, 36)
    embeds = vlm._merge_input_ids_with_image_features(features, ids, mask)
    close(embeds[ids == IMAGE], features.flatten(0, 1))
    close(embeds[ids != IMAGE], vlm.language_model.model.embed_tokens(ids[ids != IMAGE]))


def test_images_of_any_shape():
    vlm = make_vlm(vision={"image_size": (16, 24)}, pixel_shuffle=2)
    assert vlm.config.text_config.num_image_tokens == 6
    assert vlm.image_features(torch.randn(2, 3, 16, 24)).shape == (2, 6, 36)
    with pytest.raises(ValueError, match="32, 16"):
        vlm.image_features(torch.randn(2, 3, 32, 16))


@pytest.mark.parametrize("token", [IMAGE, 3, V, V + 5])
def test_the_placeholder_comes_with_the_config_or_the_batch(token):
    """Inside the vocabulary, or added after its end: such a token has no row in the embedding table."""
    known, unknown = make_vlm(image_token_id=token), make_vlm(image_token_id=None)
    ids = torch.tensor([[5, 9, 9, *[token] * 16, 4, 8, *[token] * 16, 1]])
    pixels = torch.randn(2, 3, 16, 16)
    close(unknown(ids, pixels, image_token_id=torch.tensor(token))["logits"], known(ids, pixels)["logits"])
    with pytest.raises(ValueError, match=f"32 image placeholders .token id {token}.*1 images x 16 features are 16"):
        known(ids, pixels[:1])
    with pytest.raises(AssertionError, match="needs image_token_id"):
        unknown(ids, pixels)


def test_one_placeholder_for_an_image_is_refused_and_says_what_writes_all_of_them():
    """Ids made by hand, with the one <image> that other models expand."""
    with pytest.raises(ValueError, match=r"has 1 image .*call MllamaImageProcessor\(.*num_image_token=16, .*<image>"):
        make_vlm()(torch.tensor([[5, IMAGE, 9]]), torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("images", [None, 2, 4])
def test_images_and_placeholders_that_do_not_match_are_both_counted(vlm, batch, images):
    batch["pixel_values"] = None if images is None else torch.randn(images, 3, 16, 16)
    each = vlm.config.text_config.num_image_tokens
    with pytest.raises(ValueError, match=f"{3 * each} image placeholders .* are {each * (images or 0)}:"):
        vlm(**batch)


# ---- conversations, configurations, the quick start, mistakes --------------------------------------------------------


def test_conversation_mask_marks_answers_and_their_end():
    start, end = [1, 2], 9
    ids = torch.tensor([[5, 1, 2, 7, 8, 9, 6, 1, 2, 9, 4], [1, 2, 1, 2, 9, 2, 1, 7, 1, 2, 3]])
    marks = [[0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 0], [0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1]]
    mask = MllamaForConditionalGeneration._create_conversation_mask(ids, start, end)
    assert mask.int().tolist() == marks


def test_configurations_copy_what_they_are_given_and_come_back_from_their_dict():
    vision, text = dict(VISION), {**TEXT, "rope_scaling": dict(LLAMA3, head_dim=None)}
    text["rope_scaling"].pop("head_dim")
    given = copy.deepcopy((vision, text))
    config = MLLAMAConfig(vision, text, pixel_shuffle=2, image_token_id=IMAGE)
    assert (vision, text) == given
    assert (config.text_config.num_image_tokens, config.vision_config.vision_use_head) == (4, False)
    own = LLAMA32Config(**text)
    assert MLLAMAConfig(vision, own).text_config.num_image_tokens == 16 and own.num_image_tokens is None
    assert MLLAMAConfig(**asdict(config)) == config


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("vocab_size", [400, 280, 1600])
def test_quick_start_of_the_design(cross, vocab_size):
    """As written there, numbers smaller. The tokenizer gives <image> an id inside, at the end of or past the vocabulary."""
    tokenizer = BPETokenizer.train("the quick brown fox describes an image " * 20, 280)
    vision_cfg = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "image_size": 32, "patch_size": 8}  # fmt: skip
    text_cfg = {"vocab_size": vocab_size, "hidden_size": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 64,
                "max_position_embeddings": 16, "context_length": 128}  # fmt: skip
    config_class, model_class = MLLAMAConfig, MllamaForConditionalGeneration
    if cross:
        config_class, model_class = CrossAttentionConfig, CrossAttentionVLM
    cfg = config_class(vision_config=vision_cfg, text_config=text_cfg, projection_dim=20)
    assert cfg.text_config.num_image_tokens == (1 if cross else 16)
    model = model_class(cfg)
    processor = MllamaImageProcessor(
        tokenizer, num_image_token=cfg.text_config.num_image_tokens, image_size=cfg.vision_config.image_size
    )
    image = Image.new("RGB", (40, 30), "red")
    batch = processor(["Describe the image."], [image], padding=True)
    out = model(**batch)
    assert out.logits is out["logits"]
    assert out["logits"].shape == (1, batch["input_ids"].shape[1], vocab_size)
    assert len(model.generate(**batch, max_new_tokens=3)[0]) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_layers": 0}, "n_layers is 0"),
        ({"n_kv_groups": 4}, "9 query heads cannot share 4"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"head_dim": 5}, "head_dim is 5"),
        ({"rope_base": 0.0}, "rope_base is 0.0"),
        ({"rms_norm_eps": 2.0}, "rms_norm_eps is 2.0"),
        ({"attention": "flash"}, "attention is 'flash'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "linear holds nothing besides: it must be factor"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "default holds factor besides: it must be nothing"),
    ],
)
def test_impossible_text_configs(settings, message):
    with pytest.raises(ValueError, match=message):
        checked(LLAMA32Config, **{**TEXT, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projector_type": "conv"}, "projector_type is 'conv': it must be mlp or linear"),
        ({"fusion": "late"}, "MLLAMAConfig has no setting fusion"),
        ({"image_token_id": -1}, "image_token_id is -1"),
        ({"text_config": {**TEXT, "n_layers": 0}}, "n_layers is 0"),
        ({"pixel_shuffle": 0}, "pixel_shuffle is 0"),
        ({"pixel_shuffle": 3}, "4x4 patches cannot be joined 3x3"),
        ({"text_config": {"n_head": 2}}, "LLAMA32Config has no setting n_head"),
        ({"vision_config": {"depth": 2}}, "SiglipVisionConfig has no setting depth"),
    ],
)
def test_impossible_vlm_configs(settings, message):
    with pytest.raises(ValueError, match=message):
        checked(MLLAMAConfig, **{"vision_config": VISION, "text_config": TEXT, **settings})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": torch.ones(1, 65).long()}, "65 tokens are more than the context length of 64"),
        ({"input_ids": torch.ones(1, 2).long(), "position_ids": torch.tensor([[3, 64]])}, "65 tokens are more than"),
        ({"input_ids": torch.ones(1, 2).long(), "position_ids": torch.tensor([3, 4])}, r"position_ids is \[2\]"),
        ({"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 3)}, r"attention_mask is \[1, 3\]"),
    ],
)
def test_impossible_inputs(lm, call, message):
    with pytest.raises((ValueError, AssertionError), match=message):
        lm(**call)


def test_impossible_prompts(lm):
    with pytest.raises(ValueError, match="60 tokens and 5 new ones are 65"):
        lm.generate(random_ids(1, 60), 5)
    with pytest.raises(ValueError, match="empty prompt"):
        lm.generate([[3], []], 5)
