"""Decoders out of a .gguf file, llama.cpp's format, as what a Hugging Face folder would hold: LLaMA (and Mistral, which has no
name of its own there), Qwen2, Qwen3 and GPT-2, in every block format that the gguf package dequantises.

    file = GGUFFile("SmolLM2-135M-Instruct.Q4_1.gguf")
    file.config(), file.tensors(torch.float32)      # a config.json's content, and tensors under their published names

Needs the gguf package, which reads the header and knows the block formats. What is done here: names and settings are
translated, quantised blocks become numbers again, and llama.cpp's orders are undone: a LLaMA's query and key rows, and GPT-2's
linear layers, which its published files keep as [in, out].
"""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from model import LLAMA32Config, rotary_frequencies

LLAMA_PARTS = {
    **{"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    **{"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"},
    **{"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
}
GPT2_PARTS = {
    **{"attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj"},
    **{"ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
}
PARTS = {  # architecture: what its layers are made of, and their published names
    **{"llama": LLAMA_PARTS, "qwen2": LLAMA_PARTS, "gpt2": GPT2_PARTS},
    "qwen3": {**LLAMA_PARTS, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
}
LLAMA_WHOLE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
GPT2_WHOLE = {
    **{"token_embd.weight": "transformer.wte.weight", "position_embd.weight": "transformer.wpe.weight"},
    **{"output_norm.weight": "transformer.ln_f.weight", "output_norm.bias": "transformer.ln_f.bias"},
}
READ = (  # the settings of an architecture that are read here
    *("block_count", "context_length", "embedding_length", "feed_forward_length"),
    *(f"attention.{key}" for key in ("head_count", "head_count_kv", "layer_norm_rms_epsilon", "layer_norm_epsilon")),
    *("attention.key_length", "attention.value_length", "attention.sliding_window"),
    *("rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
)
# Others are accepted with these values, or (None) with any: they say where a scaling came from, or how a file was made.
NEUTRAL = {"expert_count": (0,), "expert_used_count": (0,), "attention.causal": (True,), "rope.scaling.attn_factor": (1,)}
NEUTRAL |= dict.fromkeys(("vocab_size", "tensor_data_layout", "rope.scaling.original_context_length", "rope.scaling.finetuned"))
# What Llama 3.1 and later say besides the factor: llama.cpp keeps only the divisors that follow from it, as a tensor.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_header(path: str | Path, pattern: str) -> tuple[dict, dict, str]:
    """A .gguf file: its settings whose names match the pattern, its tensors as stored, by name, and its byte order ("I": this
    machine's). Raises ValueError, in one line, for a damaged file and without the gguf package."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError(f"{path}: reading a .gguf file needs the gguf package (pip install gguf)") from None
    try:
        reader = GGUFReader(path)
        settings = {name: field.contents() for name, field in reader.fields.items() if re.match(pattern, name)}
        return settings, {tensor.name: tensor for tensor in reader.tensors}, reader.byte_order
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{path} is not a readable GGUF file ({error}): it may be damaged, get it again") from None


class GGUFFile:
    """Raises ValueError, in one line, for a file that is damaged, of another architecture, or of a kind that is not read."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.settings, self.stored, byte_order = read_header(path, r"(?!tokenizer\.)|.*_token_id$")
        self.kind = self.settings.get("general.architecture")
        self._need(self.kind in PARTS, f"its architecture is {self.kind!r:.80}: only {', '.join(PARTS)} are implemented")
        self._need(byte_order == "I", "it was written for a machine of the other byte order")
        self._need(self.settings.get("split.count", 1) <= 1, "it is one part of several: join them with llama-gguf-split")
        for name, value in self.settings.items():
            key = name.removeprefix(f"{self.kind}.")
            if key == name or key in READ:
                continue
            known = key in NEUTRAL and (NEUTRAL[key] is None or value in NEUTRAL[key])
            self._need(known, f"{name} is {value!r:.80}, which is not implemented")

    def _need(self, condition, reason: str) -> None:
        if not condition:
            raise ValueError(f"{self.path}: {reason}")

    def _number(self, key: str, default: float | None = None) -> float:
        """A setting of the model; without a default one that must be there."""
        number = self.settings.get(f"{self.kind}.{key}", default)
        self._need(number is not None, f"it has no {self.kind}.{key}: it may be damaged, get it again")
        self._need(isinstance(number, int | float), f"{self.kind}.{key} is {number!r}: only a single number is implemented")
        return number

    def list_tensors(self) -> list[tuple[str, tuple[int, ...], str]]:
        """(name, shape, type) of every tensor as it is stored."""
        return [(name, tuple(t.shape.tolist()[::-1]), t.tensor_type.name) for name, t in self.stored.items()]

    def config(self) -> dict:
        """What a Hugging Face folder of this model would have as config.json."""
        self._need("token_embd.weight" in self.stored, "it has no token_embd.weight: it may be damaged, get it again")
        layers, context, ids = self._number("block_count"), self._number("context_length"), ("bos", "eos", "padding")
        self._need(layers <= len(self.stored), f"it has {layers} layers, but only {len(self.stored)} tensors: is it damaged?")
        window = self._number("attention.sliding_window", 0)
        self._need(not 0 < window < context, f"its sliding window {window} is shorter than the context of {context}")
        return {
            "model_type": self.kind,
            "vocab_size": int(self.stored["token_embd.weight"].shape[-1]),
            "tie_word_embeddings": "output.weight" not in self.stored,
            **{f"{name.removesuffix('ding')}_token_id": self.settings.get(f"tokenizer.ggml.{name}_token_id") for name in ids},
            **(self._gpt2() if self.kind == "gpt2" else self._llama()),
        }

    def _gpt2(self) -> dict:
        return {
            "n_positions": self._number("context_length"),
            "n_embd": self._number("embedding_length"),
            "n_layer": self._number("block_count"),
            "n_head": self._number("attention.head_count"),
            "n_inner": self._number("feed_forward_length"),
            "layer_norm_epsilon": self._number("attention.layer_norm_epsilon"),
        }

    def _llama(self) -> dict:
        heads, kv_heads, head_dim = self._heads()
        return {
            "hidden_size": self._number("embedding_length"),
            "intermediate_size": self._number("feed_forward_length"),
            "num_hidden_layers": self._number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": self._number("context_length"),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "attention_bias": "blk.0.attn_q.bias" in self.stored,
            "mlp_bias": "blk.0.ffn_up.bias" in self.stored,
            "rope_parameters": {"rope_theta": self._number("rope.freq_base", 10000.0), **self._rope_scaling()},
        }

    def _heads(self) -> tuple[int, int, int]:
        """Query heads, key/value heads, and the width of one."""
        heads = self._number("attention.head_count")
        kv_heads = self._number("attention.head_count_kv", heads)
        self._need(min(heads, kv_heads) > 0, f"it has {heads} query and {kv_heads} key/value heads: it may be damaged")
        head_dim = self._number("attention.key_length", self._number("embedding_length") // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            other = self._number(key, head_dim)
            self._need(other == head_dim, f"{self.kind}.{key} {other} other than the head width {head_dim} is not implemented")
        return heads, kv_heads, head_dim

    def _rope_scaling(self) -> dict:
        """How rotations are slowed down, as transformers says it."""
        factor = self._number("rope.scaling.factor", self._number("rope.scale_linear", 1.0))
        kind = self.settings.get(f"{self.kind}.rope.scaling.type", "none" if factor == 1.0 else "linear")
        self._need(kind in ("none", "linear"), f"rope scaling of type {kind!r} is not implemented")
        if "rope_freqs.weight" not in self.stored:
            return {"rope_type": "linear", "factor": factor} if kind == "linear" else {"rope_type": "default"}
        divisors = self._numbers("rope_freqs.weight")
        if bool((divisors == 1).all()) and kind == "none":
            return {"rope_type": "default"}
        llama3 = {"rope_type": "llama3", "factor": divisors.max().item(), **LLAMA3_ROPE}
        fits = kind == "none" and self._divides_like(divisors, llama3)
        self._need(fits, "rope_freqs.weight is not Llama 3's rope scaling, the only one of its sort that is implemented")
        return llama3

    def _divides_like(self, divisors: torch.Tensor, scaling: dict) -> bool:
        config = LLAMA32Config(head_dim=self._heads()[2], rope_base=self._number("rope.freq_base", 10000.0))
        plain, scaled = rotary_frequencies(config), rotary_frequencies(replace(config, rope_scaling=scaling))
        return divisors.shape == plain.shape and torch.allclose(plain / divisors, scaled, rtol=1e-4, atol=0)

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """The parameters under their published names, in dtype (fp32 unless given)."""
        is_gpt2, parts, found = self.kind == "gpt2", PARTS[self.kind], {}
        whole = {**(GPT2_WHOLE if is_gpt2 else LLAMA_WHOLE), "output.weight": "lm_head.weight"}
        rows = dict(zip(("attn_q", "attn_k"), self._heads()[:2], strict=True)) if self.kind == "llama" else {}
        for name in self.stored:
            if name == "rope_freqs.weight" and not is_gpt2:
                continue
            kind, _, rest = name.partition(".")
            layer, _, rest = rest.partition(".")
            part, _, last = rest.partition(".")
            numbered = kind == "blk" and layer.isdecimal() and part in parts and last in ("weight", "bias")
            self._need(numbered or name in whole, f"{name} is no tensor of a {self.kind} that is implemented")
            numbers = self._numbers(name)
            if part in rows:
                numbers = self._in_halves(numbers, rows[part], name)
            elif is_gpt2 and numbered and numbers.ndim == 2:
                numbers = numbers.T
            ours = whole.get(name) or f"{'transformer.h' if is_gpt2 else 'model.layers'}.{layer}.{parts[part]}.{last}"
            found[ours] = numbers.to(dtype or torch.float32)
        return found

    def _numbers(self, name: str) -> torch.Tensor:
        from gguf.quants import dequantize

        tensor = self.stored[name]
        try:
            numbers = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            self._need(False, f"{name} is of type {tensor.tensor_type.name}, which the gguf package does not dequantise")
        return torch.from_numpy(np.require(numbers, requirements=["C", "W"]))

    def _in_halves(self, x: torch.Tensor, heads: int, name: str) -> torch.Tensor:
        """A rotation turns pairs of rows. llama.cpp stores the two of a pair next to each other, as Meta does: per head
        0, 0', 1, 1', ...; transformers, and so model.py, has all first ones before all second ones: 0, 1, ..., 0', 1', ..."""
        self._need(x.shape[0] % (2 * heads) == 0, f"{name} has {x.shape[0]} rows, which {heads} heads cannot share in pairs")
        return x.view(heads, -1, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)
