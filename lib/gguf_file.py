"""LLaMA models out of a .gguf file, llama.cpp's format, as what a Hugging Face folder would hold.

    file = GGUFFile("SmolLM2-135M-Instruct.Q4_1.gguf")
    file.config(), file.tensors(torch.float32)      # a config.json's content, and tensors under LLaMA's published names

Needs the gguf package, which reads the header and knows the block formats. What is done here: names and settings are
translated, quantised blocks become numbers again, and llama.cpp's order of the query and key rows is undone.
"""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from model import LLAMA32Config, rotary_frequencies

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
PARTS = {
    **{"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    **{"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"},
    **{"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
}
WHOLE = {
    **{"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"},
    **{"output.weight": "lm_head.weight"},
}
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
    """Raises ValueError, in one line, for a file that is damaged, not a LLaMA, or of a kind that is not read."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.settings, self.stored, byte_order = read_header(path, r"general\.|llama\.|split\.|.*_token_id$")
        kind = self.settings.get("general.architecture")
        self._need(kind == "llama", f"its architecture is {kind!r}: only llama is implemented")
        self._need(byte_order == "I", "it was written for a machine of the other byte order")
        self._need(self.settings.get("split.count", 1) <= 1, "it is one part of several: join them with llama-gguf-split")
        self._need(not self.settings.get("llama.expert_count"), "it is a mixture of experts, which is not implemented")

    def _need(self, condition, reason: str) -> None:
        if not condition:
            raise ValueError(f"{self.path}: {reason}")

    def _number(self, key: str, default: float | None = None) -> float:
        """A setting of the model; without a default one that must be there."""
        number = self.settings.get(f"llama.{key}", default)
        self._need(number is not None, f"it has no llama.{key}: it may be damaged, get it again")
        self._need(isinstance(number, int | float), f"llama.{key} is {number!r}: only a single number is implemented")
        return number

    def list_tensors(self) -> list[tuple[str, tuple[int, ...], str]]:
        """(name, shape, type) of every tensor as it is stored."""
        return [(name, tuple(t.shape.tolist()[::-1]), t.tensor_type.name) for name, t in self.stored.items()]

    def config(self) -> dict:
        """What a Hugging Face folder of this model would have as config.json."""
        self._need("token_embd.weight" in self.stored, "it has no token_embd.weight: it may be damaged, get it again")
        heads, kv_heads, head_dim = self._heads()
        layers, ids = self._number("block_count"), {"bos": "bos", "eos": "eos", "pad": "padding"}
        self._need(layers <= len(self.stored), f"it has {layers} layers, but only {len(self.stored)} tensors: is it damaged?")
        return {
            "model_type": "llama",
            "vocab_size": int(self.stored["token_embd.weight"].shape[-1]),
            "hidden_size": self._number("embedding_length"),
            "intermediate_size": self._number("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": self._number("context_length"),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "output.weight" not in self.stored,
            "attention_bias": "blk.0.attn_q.bias" in self.stored,
            "mlp_bias": "blk.0.ffn_up.bias" in self.stored,
            "rope_parameters": {"rope_theta": self._number("rope.freq_base", 10000.0), **self._rope_scaling()},
            **{f"{ours}_token_id": self.settings.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in ids.items()},
        }

    def _heads(self) -> tuple[int, int, int]:
        """Query heads, key/value heads, and the width of one."""
        heads = self._number("attention.head_count")
        kv_heads = self._number("attention.head_count_kv", heads)
        self._need(min(heads, kv_heads) > 0, f"it has {heads} query and {kv_heads} key/value heads: it may be damaged")
        head_dim = self._number("attention.key_length", self._number("embedding_length") // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            other = self._number(key, head_dim)
            self._need(other == head_dim, f"llama.{key} {other} other than the head width {head_dim} is not implemented")
        return heads, kv_heads, head_dim

    def _rope_scaling(self) -> dict:
        """How rotations are slowed down, as transformers says it."""
        factor = self._number("rope.scaling.factor", self._number("rope.scale_linear", 1.0))
        kind = self.settings.get("llama.rope.scaling.type", "none" if factor == 1.0 else "linear")
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
        queries, keys, _ = self._heads()
        rows = {"attn_q": queries, "attn_k": keys}
        found = {}
        for name in self.stored:
            if name == "rope_freqs.weight":
                continue
            kind, _, rest = name.partition(".")
            layer, _, rest = rest.partition(".")
            part, _, last = rest.partition(".")
            numbered = kind == "blk" and layer.isdecimal() and part in PARTS and last in ("weight", "bias")
            self._need(numbered or name in WHOLE, f"{name} is no tensor of a LLaMA that is implemented")
            numbers = self._numbers(name)
            if part in rows:
                numbers = self._in_halves(numbers, rows[part], name)
            found[WHOLE.get(name) or f"model.layers.{layer}.{PARTS[part]}.{last}"] = numbers.to(dtype or torch.float32)
        return found

    def _numbers(self, name: str) -> torch.Tensor:
        from gguf.quants import dequantize

        tensor = self.stored[name]
        kind = tensor.tensor_type.name
        self._need(kind in TYPES, f"{name} is of type {kind}: only {', '.join(TYPES)} are implemented")
        return torch.from_numpy(np.require(dequantize(tensor.data, tensor.tensor_type), requirements=["C", "W"]))

    def _in_halves(self, x: torch.Tensor, heads: int, name: str) -> torch.Tensor:
        """A rotation turns pairs of rows. llama.cpp stores the two of a pair next to each other, as Meta does: per head
        0, 0', 1, 1', ...; transformers, and so model.py, has all first ones before all second ones: 0, 1, ..., 0', 1', ..."""
        self._need(x.shape[0] % (2 * heads) == 0, f"{name} has {x.shape[0]} rows, which {heads} heads cannot share in pairs")
        return x.view(heads, -1, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)
