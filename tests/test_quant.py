"""Laws of quant.py: NF4 is the published one and bitsandbytes' to the last bit, a layer computes with the weights it
unpacks and keeps nothing else, LoRA sits on top, and files come back, here and in transformers. Eight bits: each weight
within half a scale, and one token at a time, fused or not, gives what the whole text gives.

What compares with bitsandbytes runs where that is installed (its CPU part is enough)."""

import copy
import json
import math
import os
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from bench import language
from bench import peers as bench
from calls import refused
from extras.cross_attention import CrossAttentionConfig, CrossAttentionVLM
from lib import adapters, int8, quant, quant_files
from lib.adapters import load_lora, plain_state, save_lora
from lib.checkpoint import from_pretrained, save_pretrained
from lib.fast_decode import fast_step
from lib.int8 import Linear8bit, dequantize_int8, quantize_8bit_, quantize_int8
from lib.lora import lora_parameters, merge_lora
from lib.quant import Linear4bit, Packed, bytes_of, dequantize_nf4, quantised_memory, quantize_, quantize_nf4
from lib.tokenizer import BPETokenizer
from model import (
    Linear_LORA,
    Llama3ForCausalLM,
    LLAMA32Config,
    MLLAMAConfig,
    MllamaForConditionalGeneration,
    convert_linears_to_lora,
)

CPU = torch.device("cpu")
TEXT = {"vocab_size": 99, "hidden_size": 36, "n_heads": 9, "n_kv_groups": 3, "n_layers": 2, "hidden_dim": 40}
TEXT |= {"context_length": 128}
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 16, "patch_size": 8}
IDS = torch.arange(1, 25).view(2, 12)
SHAPES = [(576, 100), (7, 9), (1, 1), (5, 64), (33, 66), (300, 128)]  # blocks filled and not, an odd number of weights


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def llama(**changes):
    return Llama3ForCausalLM(LLAMA32Config(**{**TEXT, **changes})).eval()


def vlm(**changes):
    settings = {"projector_type": "linear", "pixel_shuffle": 2, "image_token_id": 98, **changes}
    if "cross_every" in changes:
        return CrossAttentionVLM(CrossAttentionConfig(VISION, TEXT, **settings)).eval()
    return MllamaForConditionalGeneration(MLLAMAConfig(VISION, TEXT, **settings)).eval()


def inputs_of(model):
    """Of ours: two rows, for a VLM with one image each."""
    if isinstance(model, Llama3ForCausalLM):
        return {"input_ids": IDS}
    ids = IDS.clone()
    ids[:, 3 : 3 + model.config.text_config.num_image_tokens] = 98
    return {"input_ids": ids, "pixel_values": torch.linspace(-1, 1, 2 * 3 * 256).view(2, 3, 16, 16)}


@torch.no_grad()
def logits(model):
    return model(**inputs_of(model))["logits"]


def close(a, b, bound=1e-5):
    assert a.shape == b.shape and (a - b).abs().max().item() <= bound * max(1.0, b.abs().max().item())


# ---- code books and codes ----------------------------------------------------------------------------------------------


def test_nf4_is_made_of_quantiles_of_the_normal_distribution():
    """The recipe of the paper's appendix E: eight steps up from zero and seven down, between equally likely quantiles."""
    normal, edge = torch.distributions.Normal(0, 1), 0.9677083
    up, down = normal.icdf(torch.linspace(edge, 0.5, 9)[:-1]), -normal.icdf(torch.linspace(edge, 0.5, 8)[:-1])
    made = torch.cat([down, torch.zeros(1), up]).sort().values
    torch.testing.assert_close(quant.nf4_code(CPU), made / made.max(), atol=2e-6, rtol=0)


def test_the_code_of_the_absmax_is_symmetric_but_for_one():
    code = quant.dynamic_code(CPU)
    assert len(code) == 256 and (code.diff() > 0).all() and code[-1] == 1 and code[127] == 0
    torch.testing.assert_close(code[:127], -code[128:255].flip(0))
    assert code[254] == pytest.approx(0.9 * (1 - 0.5 / 64) + 0.1)  # the middle of the last of 64 parts of [0.1, 1]


def test_codes_of_given_weights():
    """As bitsandbytes 0.50.2 packs them. 201 weights: three whole blocks, a short one and an odd number."""
    i = torch.arange(201)
    packed = quantize_nf4(((i * 37 % 101 - 50) * (1 + i // 64)).float() / 97)
    assert bytes(packed.codes.tolist()).hex() == (
        "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c16d18e3b04c17e29f3b05d17e2af4c06d18e2a04c16e29f3b05"
        "d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c16d18e3b04c17e29f3b05d17e2af3c05e18f27"
    )
    assert packed.absmax.tolist() == [0, 52, 217, 240]
    assert packed.nested_absmax.tolist() == [0.7010309100151062] and packed.offset.item() == 1.2164947986602783


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_weight_becomes_the_nearest_code(shape, dtype):
    """The slow way: each weight against all 16 values times its block's own absmax, which double quantisation then blurs."""
    weight = (torch.randn(shape) * 0.05).to(dtype)
    packed, flat = quantize_nf4(weight), weight.float().flatten()
    absmax = torch.stack([block.abs().max() for block in flat.split(64)])
    each = absmax.repeat_interleave(64)[: len(flat), None]
    codes = torch.stack([packed.codes >> 4, packed.codes & 15], dim=1).flatten()[: len(flat)].long()
    error = (flat[:, None] - quant.nf4_code(CPU) * each).abs()
    torch.testing.assert_close(error.gather(1, codes[:, None])[:, 0], error.min(dim=1).values, atol=1e-7, rtol=0)
    back = dequantize_nf4(packed, shape)
    found = torch.stack([block.abs().max() for block in back.flatten().split(64)])
    blur = (absmax - packed.offset).abs().max() * 0.9 / 128 + 1e-7  # half the widest step of the code
    assert ((found - absmax).abs() <= blur).all()
    assert (back - weight.float()).norm() < 0.13 * weight.float().norm() + 1e-9
    assert dequantize_nf4(packed, shape, dtype).equal(back.to(dtype))


def test_zeros_and_constants_come_back_exactly_and_what_is_not_finite_is_refused():
    for value in (0.0, 0.3, -2.0):
        assert dequantize_nf4(quantize_nf4(torch.full((5, 40), value)), (5, 40)).allclose(torch.full((5, 40), value))
    bad = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        bad[1].weight[0, 0] = math.nan
        bad[1].weight[1, 0] = math.inf
    with pytest.raises(ValueError, match="1: 2 of 16 weights are inf or nan"):
        quantize_(bad)


# ---- bitsandbytes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes to compare with it").functional


def test_the_code_books_are_those_of_bitsandbytes(bnb):
    assert bnb.get_4bit_type("nf4", "cpu").equal(quant.nf4_code(CPU))
    assert bnb.create_dynamic_map().equal(quant.dynamic_code(CPU))


@pytest.mark.parametrize("shape", [*SHAPES, (576, 1536)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_and_weights_are_those_of_bitsandbytes(bnb, shape, dtype):
    """To the last bit, but for absmax halfway between two codes: its CPU kernel rounds some of these the other way."""
    weight = (torch.randn(shape) * 0.05).to(dtype)
    ours = quantize_nf4(weight)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    theirs = Packed(codes.flatten(), state.absmax, state.state2.absmax, state.offset)
    for name in ("codes", "nested_absmax", "offset"):
        assert getattr(ours, name).equal(getattr(theirs, name)), name
    code, nested = quant.dynamic_code(CPU), ours.nested_absmax.repeat_interleave(256)[: len(ours.absmax)]
    absmax = torch.stack([block.abs().max() for block in weight.float().flatten().split(64)]) - ours.offset
    our_error, their_error = ((code[packed.absmax.long()] * nested - absmax).abs() for packed in (ours, theirs))
    assert (our_error <= their_error + 1e-7).all() and (their_error - our_error <= 1e-4 * nested + 1e-7).all()
    assert (ours.absmax != theirs.absmax).float().mean() <= (0.01 if len(absmax) > 1 else 1)
    expected = bnb.dequantize_4bit(codes, state).view(shape)
    found = dequantize_nf4(theirs, shape, dtype)
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-6 if dtype == torch.float32 else 1e-2)
    if weight.shape[-1] % 2 == 0:  # else it goes through a compiled kernel, which may round once less
        assert found.equal(expected)


# ---- the layer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 9), (5, 64), (33, 66)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_layer_is_a_linear_layer_of_the_weights_it_unpacks(shape, dtype, bias):
    linear = nn.Linear(shape[1], shape[0], bias=bias).to(dtype)
    layer = Linear4bit.from_linear(linear)
    plain = layer.to_linear()
    assert plain.weight.dtype == dtype and not plain.weight.requires_grad and plain.bias is linear.bias
    assert 0 < (plain.weight - linear.weight).float().norm() < 0.13 * linear.weight.float().norm()
    grads = []
    for module in (layer, plain):
        x = torch.linspace(-1, 1, 2 * 3 * shape[1]).view(2, 3, -1).to(dtype).requires_grad_()
        y = module(x)
        y.float().square().sum().backward()
        grads.append((y, x.grad, *([module.bias.grad.clone()] if bias else [])))
        linear.zero_grad()
    assert all(a.dtype == b.dtype == dtype for a, b in zip(*grads, strict=True))
    for a, b in zip(*grads, strict=True):
        close(a, b, 1e-6 if dtype == torch.float32 else 2e-2)


def test_backward_keeps_the_packed_weights_and_nothing_else():
    layer = Linear4bit.from_linear(nn.Linear(256, 512, bias=False))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(torch.randn(3, 256, requires_grad=True))
    assert not [value for value in vars(y.grad_fn).values() if isinstance(value, torch.Tensor)]
    assert {id(t) for t in kept} == {id(t) for t in layer.packed}
    assert sum(t.nbytes for t in kept) < 0.52 * 256 * 512


def test_autocast_and_half_models():
    layer = Linear4bit.from_linear(nn.Linear(64, 32))
    x = torch.randn(4, 64, requires_grad=True)
    expected = F.linear(x, layer.weight, layer.bias)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    close(y.float(), expected, 2e-2)
    before = copy.deepcopy(layer.packed)
    half = copy.deepcopy(layer).half()
    assert half.weight.dtype == half.bias.dtype == torch.float16 and half(x.half()).dtype == torch.float16
    assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(half.packed, before, strict=True))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(half.packed, layer.packed, strict=True))  # a real copy


def test_state_dict_and_devices():
    layer, other = (Linear4bit.from_linear(nn.Linear(70, 33)) for _ in range(2))
    assert not layer.weight.equal(other.weight)
    other.load_state_dict(layer.state_dict())
    assert layer.weight.equal(other.weight) and layer.bias.equal(other.bias)
    assert {name for name, _ in layer.named_parameters()} == {"bias"}
    meta = layer.to("meta")
    assert all(t.is_meta for t in (*meta.packed, meta.like))
    again = meta.to_empty(device="cpu")
    again.load_state_dict(other.state_dict())
    assert again.weight.equal(other.weight)
    with pytest.raises(RuntimeError, match="codes"):
        layer.load_state_dict(nn.Linear(70, 33).state_dict())
    with pytest.raises(ValueError, match=r"packed weights of sizes .* do not make a matrix \[33, 71\]"):
        Linear4bit(71, 33, other.packed)


# ---- models and LoRA -----------------------------------------------------------------------------------------------------

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    "targets, count", [(None, 14), (["q_proj", "mlp.up_proj"], 4), (r"model\.layers\.1\..*", 7), (["lm_head"], 1)]
)
def test_targets_are_those_of_lora(targets, count):
    model, other = llama(), llama()
    names = quantize_(model, targets)
    assert len(names) == count == sum(isinstance(m, Linear4bit) for m in model.modules())
    assert names == convert_linears_to_lora(other, 2, 2, targets=targets)
    assert model(IDS, labels=IDS)["loss"].isfinite()  # the loss works on the head's weight


def test_targets_that_are_refused():
    with pytest.raises(ValueError, match=r"the targets \['qproj'\] name no linear layer of this Llama3ForCausalLM"):
        quantize_(llama(), ["qproj"])
    with pytest.raises(ValueError, match="lm_head shares its weight with the embedding"):
        quantize_(llama(tie_word_embeddings=True), ["lm_head"])
    model = llama()
    quantize_(model)
    with pytest.raises(ValueError, match="name no linear layer"):
        quantize_(model)
    with pytest.raises(ValueError, match="has no 4-bit or 8-bit layer"):
        quantised_memory(llama())


def test_memory_is_counted_to_the_byte():
    model = llama(hidden_size=144, hidden_dim=640)
    before = bytes_of(model.parameters())
    weights = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    quantize_(model)
    found = quantised_memory(model)
    layers = [m.in_features * m.out_features for m in model.modules() if isinstance(m, Linear4bit)]
    blocks = [n // 64 for n in layers]
    assert all(n % 64 == 0 for n in layers) and sum(layers) == weights == found["weights"] and found["layers"] == 14
    expected = sum(n // 2 for n in layers) + sum(b + 4 * -(-b // 256) + 4 for b in blocks)
    assert found["bytes"] == expected and found["bytes_per_weight"] == expected / weights < 0.52
    after = bytes_of([*model.parameters(), *(b for m in model.modules() if isinstance(m, Linear4bit) for b in m.buffers())])
    assert before - after == 4 * weights - expected


def test_each_layers_floats_are_free_before_the_next_is_quantised(monkeypatch):
    """They were all held to the end, though the docstring promised this."""
    model, alive, from_linear = llama(), [], Linear4bit.from_linear
    weights = [weakref.ref(layer.weight) for name, layer in model.named_modules() if name.endswith("_proj")]
    count = lambda linear: alive.append(sum(w() is not None for w in weights)) or from_linear(linear)  # noqa: E731
    monkeypatch.setattr(Linear4bit, "from_linear", count)
    quantize_(model)
    assert alive == list(range(14, 0, -1))


@pytest.fixture
def qlora():
    model = llama()
    quantize_(model, PROJECTIONS)
    model.requires_grad_(False)
    convert_linears_to_lora(model, 4, 8, target_module_classes=(Linear4bit,), targets=PROJECTIONS)
    return model


def test_qlora_starts_as_the_quantised_model_and_only_lora_learns(qlora):
    before = {name: t.clone() for name, t in qlora.state_dict().items()}
    base = llama()
    base.load_state_dict(plain_state(qlora))
    close(logits(qlora), logits(base))
    optimizer = torch.optim.AdamW([p for p in qlora.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = qlora(IDS, labels=IDS)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    moved = {name for name, t in qlora.state_dict().items() if not t.equal(before[name])}
    assert moved == {name for name, _ in lora_parameters(qlora)}


def liven(model):
    for _, p in lora_parameters(model):
        nn.init.normal_(p, std=0.2)
    return model


def test_merging_makes_plain_layers_of_the_same_function(qlora):
    expected = logits(liven(qlora))
    merge_lora(qlora)
    assert not any(isinstance(m, (Linear4bit, Linear_LORA)) for m in qlora.modules())
    assert type(qlora.model.layers[0].mlp.up_proj) is nn.Linear
    close(logits(qlora), expected)


# ---- files -------------------------------------------------------------------------------------------------------------


MODELS = {
    "llama": (llama, None),
    "llama, biases, tied": (lambda: llama(attention_bias=True, tie_word_embeddings=True), None),
    "llama, in part": (llama, ["q_proj", "down_proj"]),
    "llama, the head": (llama, ["lm_head", "o_proj"]),
    "idefics3, its words": (vlm, r"language_model\.model\..*"),
    "idefics3, its eyes": (vlm, r"vision_tower\..*"),
    "llava": (lambda: vlm(projector_type="mlp", pixel_shuffle=1, vision_feature_layer=-2), r"language_model\.model\..*"),
    "our own, cross-attention": (lambda: vlm(cross_every=4), r"language_model\.model\..*"),
}


def quantised(case):
    make, targets = MODELS[case]
    model = make()
    for p in model.parameters():
        nn.init.normal_(p, std=0.15)
    quantize_(model, targets)
    return model


@pytest.mark.parametrize("case", MODELS)
def test_a_quantised_model_comes_back(tmp_path, case):
    model = quantised(case)
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    assert logits(again).equal(logits(model))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert quantised_memory(again) == quantised_memory(model)
    assert from_pretrained(tmp_path, dtype=None).state_dict().keys() == model.state_dict().keys()
    save_pretrained(again, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("case", [case for case in MODELS if not case.startswith("our own")])
def test_transformers_opens_it_with_bitsandbytes(tmp_path, bnb, case):
    tf = pytest.importorskip("transformers")
    model = quantised(case)
    save_pretrained(model, tmp_path, layout="published")
    auto = tf.AutoModelForCausalLM if case.startswith("llama") else tf.AutoModelForImageTextToText
    theirs, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    in_bits = [m for m in theirs.modules() if type(m).__name__ == "Linear4bit"]
    assert len(in_bits) == quantised_memory(model)["layers"]
    theirs = theirs.dequantize(torch.float32).eval()  # its kernel for CPUs computes in bf16
    inputs = inputs_of(model)
    if case.startswith("idefics3"):
        inputs["pixel_values"] = inputs["pixel_values"][:, None]
    with torch.no_grad():
        close(theirs(**inputs).logits, logits(model))


def test_what_bitsandbytes_quantised_opens_here(tmp_path, bnb):
    tf = pytest.importorskip("transformers")
    save_pretrained(llama(), tmp_path / "floats")
    settings = tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "floats", quantization_config=settings)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs")
    assert quantised_memory(ours)["layers"] == 14
    with torch.no_grad():
        close(theirs.dequantize(torch.float32).eval()(IDS).logits, logits(ours))


def test_qlora_is_saved_merged_and_its_adapter_fits_the_quantised_base(tmp_path, qlora):
    expected = logits(liven(qlora))
    save_pretrained(qlora, tmp_path / "merged")
    merged = from_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
    close(logits(merged), expected)
    save_lora(qlora, tmp_path / "lora")
    base = copy.deepcopy(qlora)
    for name, layer in adapters.lora_layers(base).items():
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, layer.linear)
    save_pretrained(base, tmp_path / "base")
    again = from_pretrained(tmp_path / "base")
    load_lora(again, tmp_path / "lora")
    assert isinstance(again.model.layers[0].mlp.up_proj.linear, Linear4bit)
    close(logits(again), expected, 1e-6)


STATE = "model.layers.0.mlp.up_proj.weight" + quant_files.STATE


def set_state(tensors, **changes):
    state = {**json.loads(bytes(tensors[STATE].tolist())), **changes}
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


UP = STATE.removesuffix(quant_files.STATE)
DAMAGED = {
    "no constants": (lambda t: t.pop(f"{UP}.nested_absmax"), "its nested_absmax is missing: only NF4 with double"),
    "no state": (lambda t: t.pop(STATE), f"left over: {UP}.absmax"),
    "broken state": (lambda t: t.update({STATE: t[STATE][:-5].clone()}), "its quant_state is damaged"),
    "other blocks": (lambda t: set_state(t, blocksize=128), r"type and block sizes \('nf4', 128, 256\)"),
    "other shape": (lambda t: set_state(t, shape=[3, 4]), r"it is a matrix \[3, 4\], \[40, 36\] was expected"),
    "another code": (lambda t: t[f"{UP}.quant_map"].mul_(2), "its quant_map is not the published one"),
    "cut short": (lambda t: t.update({UP: t[UP][1:].clone()}), "packed weights of sizes"),
    "absmax in floats": (lambda t: t.update({f"{UP}.absmax": t[f"{UP}.absmax"].float()}), "constants are .*float32.*expected"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path, damage):
    save_pretrained(quantised("llama"), tmp_path)
    change, words = DAMAGED[damage]
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=words) as error:
        from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("change", [{"bnb_4bit_quant_type": "fp4"}, {"load_in_8bit": True}, {"quant_method": "gptq"}])
def test_other_quantisations_are_refused(tmp_path, change):
    save_pretrained(quantised("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantization_config that is not NF4"):
        from_pretrained(tmp_path)


# ---- eight bits ----------------------------------------------------------------------------------------------------------

BF16 = 2**-8  # what rounding to bf16 may change, relatively
SIXTEENS = {"hidden_size": 48, "n_heads": 6, "n_kv_groups": 2, "hidden_dim": 64}  # sizes that torch's kernel takes


@pytest.mark.parametrize("shape", [*SHAPES, (1, 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_weight_is_within_half_a_scale(shape, dtype):
    weight = (torch.randn(shape) * torch.logspace(-5, 1, shape[0])[:, None]).to(dtype)
    codes, scales = quantize_int8(weight.t().contiguous().t())  # as arrange_for_decoding lays it out
    assert codes.dtype == torch.int8 and codes.is_contiguous() and codes.shape == shape and scales.shape == shape[:1]
    assert codes.min() >= -127 and (codes.abs().amax(dim=1) >= 126).all()
    error = (dequantize_int8(codes, scales) - weight.float()).abs()
    assert (error <= 0.5001 * scales.float()[:, None]).all()
    torch.testing.assert_close(scales.float(), weight.float().abs().amax(dim=1) / 127, rtol=BF16, atol=0)


def test_rows_of_zeros_come_back_and_what_is_not_finite_is_refused():
    assert not dequantize_int8(*quantize_int8(torch.zeros(3, 5))).any()
    bad = llama()
    with torch.no_grad():
        bad.model.layers[1].mlp.up_proj.weight[2, 3] = math.inf
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: 1 of 1440 weights are inf or nan"):
        quantize_8bit_(bad)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("rows", [(), (1, 1), (3, 1), (int8.FEW_ROWS,), (2, int8.FEW_ROWS), (0, 2)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(61, 36), (61, 48), (64, 80)])
def test_an_8_bit_layer_is_a_linear_layer_of_the_weights_it_unpacks(monkeypatch, shape, bias, rows, kernel):
    """Few rows to bf16, where torch has a kernel that takes them; else as exactly as floats."""
    if not kernel:
        monkeypatch.setattr(int8, "INT8_PRODUCT", None)
    linear = nn.Linear(shape[1], shape[0], bias=bias)
    layer, x = Linear8bit.from_linear(linear), torch.randn(*rows, shape[1])
    plain = layer.to_linear()
    assert plain.bias is linear.bias and not plain.weight.requires_grad
    few = kernel and shape[1] % 16 == 0 and math.prod(rows) <= int8.FEW_ROWS
    with torch.no_grad():
        found, exact, sizes = layer(x), plain(x), F.linear(x.abs(), plain.weight.abs())
    assert found.dtype == exact.dtype and found.shape == exact.shape
    assert ((found - exact).abs() <= (BF16 * (sizes + 1) if few else 1e-6 * (sizes + 1))).all()
    assert not few or not found.numel() or not found.equal(exact)


def test_the_kernel_gets_nothing_that_it_would_read_past_or_crash_on():
    """It checks nothing: with 9 or 36 inputs it gave garbage or a segmentation fault, as it does where codes or inputs are not
    aligned."""
    codes, scales = torch.randint(-127, 128, (16, 64), dtype=torch.int8), torch.full((16,), 2**-7, dtype=torch.bfloat16)
    shifted = torch.empty(16 * 64 + 1, dtype=torch.int8)[1:].view(16, 64).copy_(codes)
    assert [int8.kernel_takes(c) for c in (codes, codes[3:], codes[:, :48], shifted)] == [True, True, False, False]
    x = torch.ones(3 * 64 + 1, dtype=torch.bfloat16)[1:].view(3, 64)
    expected = (codes.float().sum(dim=1) / 128).expand(3, -1)
    for given, weights in ((x, codes), (x, shifted), (x.t().contiguous().t(), codes), (x.float(), codes)):
        close(int8.multiply_int8(given, weights, scales).float(), expected, BF16)


def test_an_8_bit_layer_passes_the_gradient_of_its_input_on():
    layer = Linear8bit.from_linear(nn.Linear(36, 20))
    x = torch.randn(2, 36, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    close(grad, layer.weight.sum(dim=0).expand(2, -1))


def test_casts_leave_codes_and_scales_alone():
    layer = Linear8bit.from_linear(nn.Linear(36, 20))
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    for dtype in (torch.float16, torch.float32):
        layer.to(dtype)
        assert layer.weight.dtype == layer.bias.dtype == layer(torch.randn(3, 36).to(dtype)).dtype == dtype
    for name in ("codes", "scales"):
        torch.testing.assert_close(getattr(layer, name), before[name], atol=0, rtol=0)  # and of the same type


def eight_bits(arranged=False, **changes):
    model = llama(**{**SIXTEENS, **changes})
    if arranged:
        fast_step(model)
    names = quantize_8bit_(model)
    assert len(names) == 15 and not [m for m in model.modules() if isinstance(m, nn.Linear)]
    return model


@pytest.mark.parametrize("arranged", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_an_8_bit_model_is_the_model_of_the_weights_it_unpacks(arranged, tied):
    """All 36 rows at once, so without bf16. A tied head gets codes of its own; the embedding keeps its floats."""
    embedding = llama(**SIXTEENS, tie_word_embeddings=tied).model.embed_tokens.weight
    torch.manual_seed(0)
    model = eight_bits(arranged, tie_word_embeddings=tied)
    assert model.model.embed_tokens.weight.equal(embedding)
    assert not model.config.tie_word_embeddings and model.config is model.model.config
    model.tie_weights()
    assert isinstance(model.lm_head, Linear8bit)
    base = llama(**SIXTEENS)
    layers = {f"{name}.weight": m.weight for name, m in model.named_modules() if isinstance(m, Linear8bit)}
    base.load_state_dict({name: (model.state_dict() | layers)[name] for name in base.state_dict()})
    ids = torch.arange(1, 37).view(3, 12)
    with torch.no_grad():
        found, expected = model(ids, labels=ids), base(ids, labels=ids)
    close(found["logits"], expected["logits"])
    assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-6)


@pytest.mark.parametrize("side", ["all real", "left padding"])
@pytest.mark.parametrize("kernel", [True, False])
def test_in_8_bits_cached_equals_uncached_token_by_token(monkeypatch, side, kernel):
    """The fast step is the model's own step; against the whole text, which is too many rows for bf16, within 2 % of the
    largest logit, exactly where torch has no such kernel."""
    if not kernel:
        monkeypatch.setattr(int8, "INT8_PRODUCT", None)
    model, ids = eight_bits(tie_word_embeddings=True), torch.arange(1, 37).view(3, 12)
    lengths = torch.tensor([12, 9, 6] if side == "left padding" else [12, 12, 12])
    mask = (torch.arange(12) >= 12 - lengths[:, None]).long()
    step = fast_step(model)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask)["logits"][:, 6:]
        for way in (step, model):
            cache = model.new_cache(3, 12)
            first = model(ids[:, :7], attention_mask=mask[:, :7], cache=cache, logits_to_keep=1)["logits"]
            later = [way(ids[:, t : t + 1], cache=cache)["logits"] for t in range(7, 12)]
            found = torch.cat([first, *later], dim=1)
            close(found, expected, 2e-2 if kernel else 1e-5)
            if way is step:
                fast = found
    close(fast, found, 1e-2 if kernel else 1e-5)  # the same products, whose inputs may round to a neighbouring bf16


def test_the_fast_step_needs_codes_in_one_piece_and_no_biases():
    model = eight_bits()
    attn = model.model.layers[0].self_attn
    multiply = Linear8bit.side_by_side([attn.q_proj, attn.k_proj, attn.v_proj])
    x = torch.randn(2, 1, 48)
    assert multiply(x).equal(torch.cat([layer(x) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)], dim=-1))
    assert multiply.keywords["codes"].data_ptr() == attn.q_proj.codes.data_ptr()  # no copy
    assert Linear8bit.side_by_side([attn.k_proj, attn.q_proj]) is None
    assert fast_step(copy.deepcopy(model).half().float()) is not None
    attn.k_proj.codes = attn.k_proj.codes.clone()
    assert fast_step(model) is None
    biased = eight_bits(attention_bias=True)
    assert fast_step(biased) is None
    assert len(biased.generate(IDS, 3)) == 2


def test_8_bits_take_a_byte_a_weight():
    model = llama(**SIXTEENS, tie_word_embeddings=True)
    embedding, norms = model.model.embed_tokens.weight.nbytes, sum(p.nbytes for p in model.parameters() if p.ndim == 1)
    quantize_8bit_(model)
    found = quantised_memory(model)
    rows = 2 * (48 + 16 + 16 + 48 + 64 + 64 + 48) + 99
    weights = 2 * (2 * 48 * 48 + 2 * 48 * 16 + 3 * 48 * 64) + 99 * 48
    assert (found["layers"], found["weights"], found["bytes"]) == (15, weights, weights + 2 * rows)
    assert bytes_of([*model.parameters(), *model.buffers()]) == embedding + norms + found["bytes"]


def test_8_bits_after_lora_and_after_four_bits(qlora):
    liven(qlora)
    before = logits(qlora)
    quantize_8bit_(qlora)
    assert sum(isinstance(m, Linear8bit) for m in qlora.modules()) == 15 and not list(lora_parameters(qlora))
    close(logits(qlora), before, 5e-2)


@pytest.mark.parametrize("cross", [{}, {"cross_every": 1}], ids=["early", "cross"])
def test_of_a_vlm_the_words_get_8_bits_and_no_file_is_made_of_it(tmp_path, cross):
    model = vlm(**cross)
    before = logits(model)
    quantize_8bit_(model)
    assert all(isinstance(m, Linear8bit) == n.startswith("language_model.") for n, m in model.named_modules()
               if isinstance(m, nn.Linear | Linear8bit))  # fmt: skip
    assert model.config.text_config == model.language_model.config
    close(logits(model), before, 5e-2)
    for whole in (model, eight_bits(tie_word_embeddings=True)):
        with pytest.raises(ValueError, match="the model has no plain .* to save: are its weights quantised"):
            save_pretrained(whole, tmp_path)
    assert not list(tmp_path.iterdir())


def test_models_without_such_a_decoder_get_no_8_bits():
    with pytest.raises(ValueError, match="a Linear has no decoder like LLaMA's"):
        quantize_8bit_(nn.Linear(3, 3))


# ---- bench.peers quant ---------------------------------------------------------------------------------------------------


def test_bench_measures_layers_and_refuses_what_has_no_words(tmp_path, capsys):
    bench.main("quant --batch 2 --rounds 1 --device cpu --json".split())
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["what"] for row in rows] == ["linear, forward + backward", "linear, forward"]
    assert all(row["speed_ratio"] > 0 and row["batch"] == 2 for row in rows)
    save_pretrained(vlm(), tmp_path)
    flags = ["quant", "--batch", 1, "--rounds", 1, "--device", "cpu", "--source", tmp_path]
    assert "reads a text with a language model" in refused(capsys, bench.main, *flags)


def test_perplexity_is_that_of_the_windows(monkeypatch):
    monkeypatch.setattr(language, "WINDOW", 40)
    model, ids = llama(), torch.arange(2, 92)
    with torch.no_grad():
        parts = [F.cross_entropy(model(w[None])["logits"][0, :-1], w[1:], reduction="sum") for w in ids.split(40)]
    assert language.perplexity(model, ids) == pytest.approx(math.exp(float(sum(parts)) / 87), rel=1e-5)


@pytest.mark.skipif("SMOLLM2_GGUF" not in os.environ, reason="set SMOLLM2_GGUF to SmolLM2-135M's .gguf file")
def test_smollm2_in_four_bits():
    model = from_pretrained(os.environ["SMOLLM2_GGUF"])
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    ids = torch.tensor(BPETokenizer.from_pretrained(os.environ["SMOLLM2_GGUF"]).encode(text)[:400])
    before = language.perplexity(model, ids)
    quantize_(model)
    found = quantised_memory(model)
    assert (found["layers"], found["weights"]) == (210, 106_168_320) and found["bytes_per_weight"] < 0.52
    assert language.perplexity(model, ids) < 1.5 * before
