"""A LLaMA decoder, and the same decoder given eyes: pictures become tokens that stand among the words.

Mirrors: Llama 3.2 and SmolLM2 ("The Llama 3 Herd of Models", 2024), and the two published ways to give such a model SigLIP's
eyes, LLaVA-1.5 (Liu et al., 2023) and Idefics3 / SmolVLM (Laurencon et al., 2024); tests/test_model.py compares the logits
of each. Read gpt.py, then siglip.py. What changes from GPT-2: RMSNorm for LayerNorm, rotations (RoPE) for learned positions,
fewer key/value heads than query heads, a gated MLP. Parameters carry the published names.

    model = Llama3ForCausalLM(LLAMA32Config.preset("smollm2-135m"))
    model(input_ids, labels=input_ids)["loss"]           # labels stand where the tokens stand: the shift is done inside
    vlm = MllamaForConditionalGeneration(MLLAMAConfig(vision_config={...}, text_config={...}))
    vlm.generate(**processor(["What is this? <image>"], [image]), max_new_tokens=20)
    convert_linears_to_lora(vlm.language_model, rank=8, alpha=16, targets=["q_proj", "v_proj"])

Axes: B batch, T new tokens, S all tokens so far, H heads, D width, V vocabulary, I images of the whole batch, N patches of
an image, M the most images in one row.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from gpt import (
    KVCache,
    causal_mask,
    check_depth,
    collect,
    decode,
    explicit_attention,
    left_pad,
    positions_and_mask,
    preset_settings,
    products_win,
)
from siglip import SiglipModel, SiglipVisionConfig, note, whole_patches
from vit_scratch import pair

# ---- configuration ---------------------------------------------------------------------------------------------------

ROPE_SETTINGS = {  # what each kind of rope_scaling must say
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
LLAMA32_ROPE = {
    **{"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    **{"original_max_position_embeddings": 8192},
}
LLAMA32 = {"n_kv_groups": 8, "context_length": 131072, "rope_scaling": LLAMA32_ROPE, "tie_word_embeddings": True}


@dataclass
class LLAMA32Config:
    vocab_size: int = 128256
    hidden_size: int = 2048
    n_heads: int = 32
    n_layers: int = 16
    hidden_dim: int = 8192  # width inside the MLP
    n_kv_groups: int | None = None  # key/value heads; n_heads unless given
    head_dim: int | None = None  # hidden_size / n_heads unless given
    max_position_embeddings: int = 8192  # rotations kept in a table; those of later positions are computed when needed
    context_length: int | None = None  # positions past it are an error; max_position_embeddings unless given
    rope_base: float = 500000.0
    rope_scaling: dict | None = None  # {"rope_type": "llama3" | "linear" | "default", ...} with the published keys
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    dropout: float = 0.0
    initializer_range: float = 0.02
    attention: str = "sdpa"  # or "explicit": softmax(QK^T)V spelled out, the same numbers more slowly
    num_image_tokens: int | None = None  # placeholders per picture; MLLAMAConfig fills it in
    cross_every: int = 0  # a cross-attention layer before every so many blocks; MLLAMAConfig fills it in

    # What differs from the defaults above, per size. "tiny" is ours, the others are published.
    PRESETS = {
        "tiny": {
            **{"vocab_size": 512, "hidden_size": 128, "n_heads": 4, "n_kv_groups": 2, "n_layers": 4, "hidden_dim": 384},
            **{"max_position_embeddings": 512, "rope_base": 10000.0, "tie_word_embeddings": True},
        },
        "smollm2-135m": {
            **{"vocab_size": 49152, "hidden_size": 576, "n_heads": 9, "n_kv_groups": 3, "n_layers": 30, "hidden_dim": 1536},
            **{"rope_base": 100000.0, "tie_word_embeddings": True},
        },
        "llama-3.2-1b": LLAMA32,
        "llama-3.2-3b": {**LLAMA32, "hidden_size": 3072, "n_heads": 24, "n_layers": 28},
    }

    def __post_init__(self):
        self.n_kv_groups = self.n_heads if self.n_kv_groups is None else self.n_kv_groups
        self.context_length = self.max_position_embeddings if self.context_length is None else self.context_length
        sizes = ("vocab_size", "hidden_size", "n_heads", "n_layers", "hidden_dim", "n_kv_groups")
        for name in (*sizes, "max_position_embeddings", "context_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        check_depth(self.n_layers)
        if self.max_position_embeddings > 2**20:
            raise ValueError(
                f"max_position_embeddings is {self.max_position_embeddings}: a table of so many rotations does not fit into "
                "memory; give at most 2^20, and the rest as context_length"
            )
        if self.n_heads % self.n_kv_groups:
            raise ValueError(f"{self.n_heads} query heads cannot share {self.n_kv_groups} key/value heads: choose a divisor")
        if self.head_dim is None and self.hidden_size % self.n_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} cannot be split over {self.n_heads} heads: choose a multiple, or give head_dim"
            )
        self.head_dim = self.head_dim or self.hidden_size // self.n_heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: rotary positions turn pairs of numbers, so it must be even")
        if self.attention not in ("sdpa", "explicit"):
            raise ValueError(f"attention is {self.attention!r}: it must be sdpa or explicit")
        if not 0 < self.rms_norm_eps < 1:
            raise ValueError(f"rms_norm_eps is {self.rms_norm_eps}: it must be a small number above 0")
        if not 0 < self.rope_base < math.inf:
            raise ValueError(f"rope_base is {self.rope_base}: it must be a number above 0")
        self.rope_scaling = self._checked_rope_scaling()

    def _checked_rope_scaling(self) -> dict | None:
        if self.rope_scaling is None:
            return None
        given = dict(self.rope_scaling)
        kind = given.pop("type", None)  # the older spelling; some files have both
        kind = given.pop("rope_type", kind)
        if kind not in ROPE_SETTINGS:
            raise ValueError(f"rope_scaling has rope_type {kind!r}: known are {', '.join(ROPE_SETTINGS)}")
        if set(given) != set(ROPE_SETTINGS[kind]):
            wanted = ", ".join(ROPE_SETTINGS[kind]) or "nothing"
            raise ValueError(f"rope_scaling of type {kind} holds {', '.join(given) or 'nothing'} besides: it must be {wanted}")
        for name, value in given.items():
            if not 0 < value < math.inf:
                raise ValueError(f"rope_scaling has {name} {value!r}: it must be a number above 0")
        if kind == "llama3" and not given["low_freq_factor"] < given["high_freq_factor"]:
            raise ValueError(f"rope_scaling has low_freq_factor {given['low_freq_factor']}, not below its high_freq_factor")
        return {"rope_type": kind, **given}

    @classmethod
    def preset(cls, name: str, **changes) -> "LLAMA32Config":
        return cls(**{**preset_settings(cls.PRESETS, name), **changes})


@dataclass
class MLLAMAConfig:
    """Both towers, each a config or a dict of its settings (copied, never changed), and how they are joined."""

    vision_config: SiglipVisionConfig | dict
    text_config: LLAMA32Config | dict
    projection_dim: int | None = None  # inner width of the mlp projector; the text model's width unless given
    projector_type: str = "mlp"  # LLaVA's two layers, or "linear" as in Idefics3 and PaliGemma
    projector_bias: bool | None = None  # unless given: True for the mlp, False for linear (PaliGemma's has one)
    pixel_shuffle: int = 1  # r: r x r neighbouring patches become one token
    vision_feature_layer: int | None = None  # the tower's output after its last norm, or a hidden state before it: -2, ...
    image_token_id: int | None = None  # the placeholder's id; unless given, the model looks for it (see find_image_token)
    fusion: str = "early"  # pictures as tokens among the words, or "cross": layers between the blocks look at them
    cross_every: int = 4  # "cross" only: one such layer before blocks 0, 4, 8, ...

    def __post_init__(self):
        vision, text = self.vision_config, self.text_config
        if isinstance(vision, dict):  # a VLM looks at the patches; the pooling head would be dead weight
            vision = from_settings(SiglipVisionConfig, {"vision_use_head": False, **vision})
        if isinstance(text, dict):
            text = from_settings(LLAMA32Config, text)
        for name, known in (("projector_type", ("mlp", "linear")), ("fusion", ("early", "cross"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be {' or '.join(known)}")
        for name in ("pixel_shuffle", "cross_every", "projection_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.image_token_id is not None and not 0 <= self.image_token_id < 2**31:
            raise ValueError(f"image_token_id is {self.image_token_id}: it must be at least 0 and below 2^31")
        if self.projector_bias is None:
            self.projector_bias = self.projector_type == "mlp"
        cross = self.fusion == "cross"
        tokens = math.prod(shuffled_grid(vision.grid, self.pixel_shuffle))
        self.vision_config = replace(vision)
        # Under cross-attention one placeholder is enough: it only marks where the picture belongs.
        self.text_config = replace(
            text, num_image_tokens=1 if cross else tokens, cross_every=self.cross_every if cross else 0
        )

    @property
    def layout(self) -> str | None:
        """The published layout this model fits, "llava" or "idefics3", or None where there is none."""
        square = self.vision_config.grid[0] == self.vision_config.grid[1]
        if self.fusion == "cross" or not square:
            return None
        if self.projector_type == "linear":
            return None if self.projector_bias or self.vision_feature_layer is not None else "idefics3"
        plain = self.pixel_shuffle == 1 and self.projection_dim in (None, self.text_config.hidden_size)
        return "llava" if plain and self.vision_feature_layer is not None else None


def from_settings(cls, settings: dict):
    """A config from a dict. Raises ValueError for settings that it does not have."""
    unknown = settings.keys() - {field.name for field in fields(cls)}
    if unknown:
        raise ValueError(f"{cls.__name__} has no setting {', '.join(sorted(unknown))}")
    return cls(**settings)


# ---- the decoder -----------------------------------------------------------------------------------------------------


class LLAMARMSNorm(nn.Module):
    """Divide by the root of the mean square (Zhang and Sennrich 2019). In fp32: the squares of fp16 numbers overflow."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def rotary_frequencies(config: LLAMA32Config) -> torch.Tensor:
    """[head_dim / 2]: radians that each pair of numbers turns per position (Su et al. 2021, "RoFormer").

    linear: everything turns `factor` times slower. llama3: only what turns less than low_freq_factor times within the
    original context does; what turns more than high_freq_factor times stays; between them a blend of both (Llama 3.1).
    """
    frequencies = 1.0 / config.rope_base ** (torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim)
    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
    return frequencies


class LLAMARotaryEmbedding(nn.Module):
    """cos and sin for every position, once per forward pass for all layers."""

    def __init__(self, config: LLAMA32Config):
        super().__init__()
        self.config = config
        self.table = None  # no buffer: it is made on first use, where and in what precision it is used

    def forward(self, positions: torch.Tensor, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [T] or [B, T], all below count -> cos and sin [1, T, head_dim] or [B, 1, T, head_dim]."""
        length, device = self.config.max_position_embeddings, positions.device
        if count > length:
            return self._compute(positions, dtype).unsqueeze(-3).unbind()
        if self.table is None or self.table.device != device or self.table.dtype != dtype:
            self.table = self._compute(torch.arange(length, device=device), dtype)
        return self.table[:, positions].unsqueeze(-3).unbind()

    def _compute(self, positions, dtype):
        angles = positions[..., None].float() * rotary_frequencies(self.config).to(positions.device)
        cos, sin = angles.cos(), angles.sin()
        return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)]).to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x[i], x[i + head_dim / 2]) by their angles: (a, b) -> (a cos - b sin, b cos + a sin). The minus sign
    is part of `sin`. Which two numbers make a pair is transformers' choice; Meta's own files pair neighbours."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def kernel_shares_heads(q, k, v, mask, dropout_p, causal) -> bool:
    """Whether a fast kernel takes fewer key than query heads: the CPU's does, on a GPU only flash attention."""
    if q.device.type != "cuda":
        return True
    params = torch.backends.cuda.SDPAParams(q, k, v, mask, dropout_p, causal, True)
    return torch.backends.cuda.can_use_flash_attention(params)


class AttentionBlocks(NamedTuple):
    """Which tokens of packed rows look at which, without the large squares in which nobody looks at anybody: R blocks of L
    queries and S keys each, where a key may be in many blocks. Tokens are numbered b * T + t."""

    queries: torch.Tensor  # int64 [R, L]: tokens; what a block has too few of is filled up with any
    keys: torch.Tensor  # int64 [R, S]
    mask: torch.Tensor  # bool [R, 1, L, S]
    places: torch.Tensor  # int64 [B * T]: where among the R * L queries each token is

    def to(self, device) -> "AttentionBlocks":
        return AttentionBlocks(*(t.to(device) for t in self))


def take_tokens(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """x [B, H, T, head_dim], tokens [R, L] -> [R, H, L, head_dim]."""
    flat = x.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, tokens.flatten())
    return flat.view(*tokens.shape, x.shape[1], -1).transpose(1, 2)


class GroupQueryAttention(nn.Module):
    """Attention whose query heads share keys and values in groups (Ainslie et al. 2023): a smaller cache, little loss."""

    def __init__(self, config: LLAMA32Config):
        super().__init__()
        D, bias = config.hidden_size, config.attention_bias
        self.head_dim, self.group = config.head_dim, config.n_heads // config.n_kv_groups
        self.explicit, self.dropout = config.attention == "explicit", config.dropout
        self.q_proj = nn.Linear(D, config.n_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(D, config.n_kv_groups * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(D, config.n_kv_groups * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.n_heads * self.head_dim, D, bias=bias)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, heads * head_dim] -> [B, heads, T, head_dim]."""
        return x.view(x.shape[0], x.shape[1], -1, self.head_dim).transpose(1, 2)

    def forward(self, x, rope, mask=None, cache=None, layer=0, trace=None):
        """x [B, T, D] -> [B, T, D]. mask: bool [B, 1, T, S], AttentionBlocks, or None, which is plain causal (T = S or 1)."""
        q, k, v = (self.heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.write(layer, k, v)
        return self.attend(q, k, v, mask, mask is None and x.shape[1] > 1, trace, f"layers.{layer}.attention")

    def attend(self, q, k, v, mask, causal, trace, name):
        """q [B, H, T, head_dim], k and v [B, KV heads, S, head_dim] -> [B, T, D]."""
        if isinstance(mask, AttentionBlocks):
            B, _, T, _ = q.shape
            q, k, v = take_tokens(q, mask.queries), take_tokens(k, mask.keys), take_tokens(v, mask.keys)
            y = self.look(q, k, v, mask.mask, causal, trace, name)
            y = y.flatten(0, 1).index_select(0, mask.places).view(B, T, -1)
        else:
            y = self.look(q, k, v, mask, causal, trace, name)
        return F.dropout(self.o_proj(y), self.dropout, self.training)

    def look(self, q, k, v, mask, causal, trace, name):
        """As attend, before the last projection."""
        B, H, T, _ = q.shape
        dropout_p = self.dropout if self.training else 0.0
        if self.explicit or trace is not None or products_win(q, k):
            if causal:
                mask = causal_mask(torch.ones(1, T, dtype=torch.bool, device=q.device), T)
            # A group is one key/value head looked at by `group` queries per token: as a longer T nothing is repeated.
            folded = None if mask is None else mask.repeat(1, 1, self.group, 1)
            y, weights = explicit_attention(q.reshape(B, H // self.group, self.group * T, -1), k, v, folded, dropout_p)
            y = y.view(B, H, T, -1)
            note(trace, name, weights.view(B, H, T, -1))
        else:
            share = self.group > 1 and kernel_shares_heads(q, k, v, mask, dropout_p, causal)
            if self.group > 1 and not share:
                k, v = (t.repeat_interleave(self.group, dim=1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal, enable_gqa=share)
        return y.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): one layer proposes, a second decides how much of each proposal passes."""

    def __init__(self, config: LLAMA32Config):
        super().__init__()
        D, hidden, bias = config.hidden_size, config.hidden_dim, config.mlp_bias
        self.gate_proj = nn.Linear(D, hidden, bias=bias)
        self.up_proj = nn.Linear(D, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, D, bias=bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return F.dropout(x, self.dropout, self.training)


class TransformerBlock(nn.Module):
    def __init__(self, config: LLAMA32Config):
        super().__init__()
        self.input_layernorm = LLAMARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GroupQueryAttention(config)
        self.post_attention_layernorm = LLAMARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x, rope, mask=None, cache=None, layer=0, trace=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, layer, trace)
        return note(trace, f"layers.{layer}", x + self.mlp(self.post_attention_layernorm(x)))


class GatedCrossAttention(nn.Module):
    """Words look at pictures (Flamingo, Alayrac et al. 2022, section 2.2): a block whose keys and values come from the
    images. Both branches pass a gate tanh(0) = 0 at first, so that a trained text model starts out unchanged."""

    def __init__(self, config: LLAMA32Config):
        super().__init__()
        self.input_layernorm = LLAMARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn = GroupQueryAttention(config)
        self.post_attention_layernorm = LLAMARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)
        self.attn_gate, self.mlp_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def keys_and_values(self, features):
        """Image features [B, S, D] -> k and v [B, KV heads, S, head_dim]; they have no positions, so they stay as they are."""
        attn = self.cross_attn
        return attn.heads(attn.k_proj(features)), attn.heads(attn.v_proj(features))

    def forward(self, x, k, v, visible, layer=0, trace=None):
        """x [B, T, D]; visible: bool [B, T, S], which image features each token sees. One that sees none stays as it is."""
        sees = visible.any(dim=-1, keepdim=True)
        mask = (visible | ~sees)[:, None]  # a softmax over nothing is NaN
        q = self.cross_attn.heads(self.cross_attn.q_proj(self.input_layernorm(x)))
        y = self.cross_attn.attend(q, k, v, mask, False, trace, f"cross_layers.{layer}.attention")
        x = x + self.attn_gate.tanh() * y * sees
        x = x + self.mlp_gate.tanh() * self.mlp(self.post_attention_layernorm(x)) * sees
        return note(trace, f"cross_layers.{layer}", x)


class Llama3Model(nn.Module):
    def __init__(self, config: LLAMA32Config):
        super().__init__()
        self.config = config
        self.grad_checkpoint = False  # recompute activations in the backward pass instead of keeping them
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.norm = LLAMARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LLAMARotaryEmbedding(config)
        before = range(0, config.n_layers, config.cross_every) if config.cross_every else ()
        self.cross_layers = nn.ModuleDict({str(layer): GatedCrossAttention(config) for layer in before})

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, T, D]. Raises ValueError for an id outside the vocabulary (on a CPU; a GPU says so in its own way)."""
        try:
            return self.embed_tokens(input_ids)
        except IndexError:
            worst = int(input_ids.max() if input_ids.min() >= 0 else input_ids.min())
            raise ValueError(
                f"token id {worst} is outside the vocabulary of {self.embed_tokens.num_embeddings}: use the model's own "
                "tokenizer, or resize_token_embeddings after adding tokens to it"
            ) from None

    def forward(
        self, input_ids=None, inputs_embeds=None, attention_mask=None, position_ids=None, cache=None, images=None, trace=None,
        blocks=None,
    ) -> torch.Tensor:  # fmt: skip
        """-> [B, T, D], after the final norm. images: (features [B, S, D], visible bool [B, T, S]) for the cross-attention
        layers; a cache keeps what they need of it. The other arguments are those of MllamaForConditionalGeneration."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        rope, mask = self._rope_and_mask(x, attention_mask, position_ids, cache)
        mask = mask if blocks is None else blocks
        images, visible = self._keys_and_values(images, cache, x.shape[1])
        recompute = self.grad_checkpoint and torch.is_grad_enabled() and cache is None
        run = partial(checkpoint, use_reentrant=False) if recompute else lambda module, *args: module(*args)

        note(trace, "embeddings", x)
        for i, layer in enumerate(self.layers):
            if i in images:
                x = run(self.cross_layers[str(i)], x, *images[i], visible, i, trace)
            x = run(layer, x, rope, mask, cache, i, trace)
        return note(trace, "norm", self.norm(x))

    def _rope_and_mask(self, x, attention_mask, position_ids, cache):
        """How far each token is turned, and who may look at whom: bool [B, 1, T, S], or None for the plain causal mask."""
        B, T, _ = x.shape
        if position_ids is not None and tuple(position_ids.shape) != (B, T):
            raise ValueError(f"position_ids is {list(position_ids.shape)}, the input is [{B}, {T}]: they must agree")
        past = 0 if cache is None else cache.length
        pattern, real = checked_masks(attention_mask, B, T, past + T)
        if cache is not None:
            real = cache.open(real, T)
            padded = cache.padded
        else:  # padding on the right is hidden by the causal mask already, the one that fast kernels know
            padded = real is not None and not is_right_padded(real)
        count, limit = past + T, self.config.context_length
        allowed = limit if position_ids is None else count
        positions, mask = positions_and_mask(real, padded and pattern is None, past, T, allowed, x.device)
        if position_ids is not None:
            positions, count = position_ids, int(position_ids.max()) + 1
            if count > limit:
                raise ValueError(f"position {count - 1} is past the context length of {limit}: shorten the text")
        return self.rotary_emb(positions, count, x.dtype), mask if pattern is None else pattern

    def _keys_and_values(self, images, cache, T):
        """What each cross-attention layer looks at, {layer: (k, v)}, and which of it each token sees: made from `images`
        once, then kept with the cache. Without images the layers have nothing to do."""
        if images is not None:
            if cache is not None and cache.images is not None:
                raise ValueError("this cache holds images already: give all images of a text in the first call")
            features, visible = images
            images = {int(i): layer.keys_and_values(features) for i, layer in self.cross_layers.items()}
            if cache is not None:
                cache.images = images, visible[:, -1:]  # later tokens see what the last one saw
            return images, visible
        if cache is None or cache.images is None:
            return {}, None
        images, visible = cache.images
        return images, visible.expand(-1, T, -1)


def checked_masks(attention_mask, B, T, S) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """An attention_mask is either the whole pattern, bool [B or 1, 1, T, S], or says which tokens are real, [B, T]:
    (pattern, real), at least one of them None. Raises ValueError for anything else."""
    if attention_mask is None:
        return None, None
    if attention_mask.ndim == 2 and tuple(attention_mask.shape) == (B, T):
        return None, attention_mask
    if attention_mask.dtype == torch.bool and tuple(attention_mask.shape) in ((B, 1, T, S), (1, 1, T, S)):
        return attention_mask | ~attention_mask.any(dim=-1, keepdim=True), None  # a softmax over nothing is NaN
    raise ValueError(
        f"attention_mask is {list(attention_mask.shape)} of {attention_mask.dtype}: it must be [{B}, {T}], "
        f"or a bool pattern [{B}, 1, {T}, {S}]"
    )


def is_right_padded(attention_mask: torch.Tensor) -> bool:
    """Whether each row of [B, T] is real tokens, then padding or nothing."""
    return bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all() & attention_mask[:, 0].all())


class LazyLogits(dict):
    """What a model returns when labels are given. "logits" are computed when somebody asks for them; training never does,
    and the largest tensor of all, [B, T, V], is never made."""

    def __init__(self, head: Callable, hidden: torch.Tensor, **entries):
        super().__init__(entries)
        self.head, self.hidden = head, hidden

    def __missing__(self, key):
        if key != "logits":
            raise KeyError(key)
        self[key] = self.head(self.hidden)
        return self[key]


def chunked_cross_entropy(hidden, head_weight, targets, chunk_size: int = 512) -> torch.Tensor:
    """Mean cross-entropy of hidden [M, D] @ head_weight [V, D]^T against targets [M], chunk_size rows of logits at a time.

    Each chunk is computed again in the backward pass, so that no more than chunk_size x V logits exist at any moment,
    however long the text. Without targets the loss is 0 (and not NaN, the mean of nothing).
    """

    def chunk_loss(hidden, targets):
        return F.cross_entropy(F.linear(hidden, head_weight).float(), targets, reduction="sum")

    chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    losses = [checkpoint(chunk_loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(losses).sum() / max(1, len(targets))


class Llama3ForCausalLM(nn.Module):
    def __init__(self, config: LLAMA32Config):
        super().__init__()
        self.config = config
        self.model = Llama3Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():  # as gpt.py: what adds to the residual stream starts smaller
            last = name.endswith(("o_proj.weight", "down_proj.weight"))
            if weight.ndim == 2:
                nn.init.normal_(weight, std=config.initializer_range / (math.sqrt(2 * config.n_layers) if last else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
        self.tie_weights()

    @property
    def grad_checkpoint(self) -> bool:
        return self.model.grad_checkpoint

    @grad_checkpoint.setter
    def grad_checkpoint(self, on: bool):
        self.model.grad_checkpoint = on

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
        trace: dict | None = None,
    ) -> dict[str, torch.Tensor]:
        """One pass over T tokens.

        input_ids [B, T] or inputs_embeds [B, T, D] (exactly one); attention_mask: [B, T], 1 for real tokens and 0 for padding
        on either side, or bool [B, 1, T, S], True where token t may look at token s (samples packed in one row);
        position_ids [B, T], unless given the real tokens counted; labels [B, T], as in transformers the ids themselves, -100
        where there is nothing to learn; cache: continues where it stands; logits_to_keep: only the last so many positions
        (0: all); trace: a dict to be filled with every named intermediate.
        Returns {"logits": [B, T, V]}; with labels {"loss"}, and "logits" when asked for (see LazyLogits).
        Raises ValueError for positions past the context length and for sizes that do not fit.
        """
        hidden = self.model(input_ids, inputs_embeds, attention_mask, position_ids, cache, trace=trace)
        loss = None if labels is None else self.loss(hidden, labels, attention_mask)
        return self.read_out(hidden[:, -logits_to_keep:], loss)

    def loss(self, hidden, labels, attention_mask=None, ignored=None) -> torch.Tensor:
        """hidden [B, T, D] at each position against the label [B, T] of the next one: the mean over all that count. Those do
        not that are -100 or `ignored` (bool [B, T]), are padding, or may not look at the token before them, since that is
        padding or of another sample (attention_mask as in forward)."""
        B, T = hidden.shape[:2]
        if tuple(labels.shape) != (B, T):
            raise ValueError(f"labels is {list(labels.shape)}, the input is [{B}, {T}]: they must agree")
        counts = labels[:, 1:] != -100
        if ignored is not None:
            counts = counts & ~ignored[:, 1:]
        if attention_mask is not None and attention_mask.ndim == 2:
            counts = counts & attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
        elif attention_mask is not None:
            counts = counts & attention_mask[:, 0, :, -T:].diagonal(-1, dim1=1, dim2=2)  # may t + 1 look at t?
        return chunked_cross_entropy(hidden[:, :-1][counts], self.lm_head.weight, labels[:, 1:][counts])

    def read_out(self, hidden: torch.Tensor, loss: torch.Tensor | None) -> dict[str, torch.Tensor]:
        return {"logits": self.lm_head(hidden)} if loss is None else LazyLogits(self.lm_head, hidden, loss=loss)

    @torch.no_grad()
    def resize_token_embeddings(self, num_tokens: int) -> None:
        """Make room for a vocabulary of num_tokens. New rows of embedding and head start as the mean of the old ones: a new
        word is an average one. Raises ValueError for fewer tokens than there are. Make optimisers afterwards."""
        old = self.config.vocab_size
        if num_tokens < old:
            raise ValueError(f"the vocabulary has {old} tokens: {num_tokens} would cut off {old - num_tokens} of them")
        for part in (self.model.embed_tokens, self.lm_head):
            weight = part.weight
            grown = torch.cat([weight, weight.mean(dim=0, keepdim=True).expand(num_tokens - old, -1)])
            part.weight = nn.Parameter(grown, requires_grad=weight.requires_grad)
        self.model.embed_tokens.num_embeddings = self.lm_head.out_features = num_tokens
        self.config = self.model.config = replace(self.config, vocab_size=num_tokens)
        self.tie_weights()

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        config, weight = self.config, self.model.embed_tokens.weight
        return KVCache(
            config.n_layers, batch_size, config.n_kv_groups, max_length, config.head_dim, weight.dtype, weight.device
        )

    @torch.inference_mode()
    def stream(
        self, input_ids, max_new_tokens: int, attention_mask=None, prefill: Callable | None = None, **sampling
    ) -> Iterator[list[int | None]]:
        """Yield the next token of every prompt as soon as it is there; None for a row that has stopped. See `generate`.
        prefill: what reads the prompts, if not this model itself."""
        if attention_mask is not None:  # a padded batch: back to rows of real tokens
            input_ids = [row[real].tolist() for row, real in zip(input_ids, attention_mask.bool(), strict=True)]
        input_ids, attention_mask = left_pad(input_ids, self.model.embed_tokens.weight.device)
        longest, limit = input_ids.shape[1] + max_new_tokens, self.config.context_length
        if longest > limit:
            raise ValueError(
                f"a prompt of {input_ids.shape[1]} tokens and {max_new_tokens} new ones are {longest}, more than the "
                f"context length of {limit}: shorten the prompt or lower max_new_tokens"
            )
        cache = self.new_cache(len(input_ids), longest)
        out = (prefill or self)(input_ids, attention_mask=attention_mask, cache=cache, logits_to_keep=1)
        yield from decode(OneToken.for_model(self), out["logits"][:, -1], cache, max_new_tokens, **sampling)

    def generate(self, input_ids, max_new_tokens: int, attention_mask=None, **sampling) -> list[list[int]]:
        """Continue every prompt (a list of id lists of any lengths, or a tensor [B, T], with attention_mask [B, T] where it
        holds padding): the new ids, row by row. sampling: temperature, top_k, ..., stop_tokens; see `gpt.decode`."""
        return collect(self.stream(input_ids, max_new_tokens, attention_mask, **sampling), len(input_ids))


# ---- decoding on a CPU: the same weights, laid out and walked through for one token at a time -------------------------------


def read_together(module: nn.Module) -> Iterator[tuple[nn.Module, ...]]:
    """The linear layers of a decoder that gain from lying side by side in memory, in groups that read the same input."""
    for part in module.modules():
        if isinstance(part, GroupQueryAttention):
            yield part.q_proj, part.k_proj, part.v_proj
            yield (part.o_proj,)
        elif isinstance(part, FeedForward):
            yield part.gate_proj, part.up_proj
        elif isinstance(part, Llama3ForCausalLM):
            yield (part.lm_head,)


@torch.no_grad()
def arrange_for_decoding(module: nn.Module) -> nn.Module:
    """Lay out a decoder's weights as a CPU reads them fastest for one new token: q, k and v side by side, gate and up side by
    side, the head column by column. Values, shapes and names stay; anything that copies the weights undoes it. Only such
    a decoder without biases gains from it, and FSDP refuses weights that are laid out like this."""
    for layers in read_together(module):
        if all(type(layer) is nn.Linear and layer.bias is None for layer in layers):
            block = torch.cat([layer.weight.t() for layer in layers], dim=1)  # [in, all out]
            for layer, part in zip(layers, block.split([layer.out_features for layer in layers], dim=1), strict=True):
                layer.weight.data = part.t()
    return module


def side_by_side(*layers: nn.Module) -> Callable | None:
    """Layers that read the same input as one function of it, x [B, 1, in] -> [B, 1, all out], where their weights lie in memory
    as arrange_for_decoding leaves them; None where they do not (any more). A class of layers that keeps its weights in
    another form than floats may have a function of the same name for them, as quant.Linear8bit has."""
    kind = type(layers[0])
    if any(type(layer) is not kind or getattr(layer, "bias", None) is not None for layer in layers):
        return None
    if kind is not nn.Linear:
        return kind.side_by_side(layers) if hasattr(kind, "side_by_side") else None
    first, rows = layers[0].weight, sum(layer.out_features for layer in layers)
    place = first.data_ptr()
    for layer in layers:
        if layer.weight.data_ptr() != place or layer.weight.stride() != (1, rows):
            return partial(linear_on_all_cores, weight=first) if len(layers) == 1 else None
        place += layer.out_features * first.element_size()
    return partial(linear_on_all_cores, weight=first.as_strided((rows, layers[0].in_features), (1, rows)))


def linear_on_all_cores(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """F.linear for one token, x [1, 1, in]: MKL multiplies a matrix and a vector on a single core, but a batch of slices of
    that matrix on all of them."""
    slices = math.gcd(len(weight), torch.get_num_threads()) if len(x) == 1 and x.device.type == "cpu" else 1
    if slices == 1:
        return F.linear(x, weight)
    blocks = weight.view(slices, -1, weight.shape[1]).transpose(1, 2)
    return torch.bmm(x.expand(slices, -1, -1), blocks).view(1, 1, -1)


class OneToken:
    """Llama3ForCausalLM.forward for T = 1 with a cache and nothing else, in one loop: in a small model on a CPU, what happens
    between the matrix products takes a third of the time. tests/test_model.py holds it to the same logits."""

    def __init__(self, model: "Llama3ForCausalLM"):
        self.model, self.head, self.layers = model, side_by_side(model.lm_head), []
        for attn, mlp in ((block.self_attn, block.mlp) for block in model.model.layers):
            qkv, gate_up = side_by_side(attn.q_proj, attn.k_proj, attn.v_proj), side_by_side(mlp.gate_proj, mlp.up_proj)
            self.layers.append((qkv, side_by_side(attn.o_proj), gate_up, side_by_side(mlp.down_proj)))

    @classmethod
    def for_model(cls, model: "Llama3ForCausalLM") -> Callable:
        """This faster step where the model is arranged for it, else the model itself."""
        config, step = model.config, cls(model)
        usual = config.attention == "sdpa" and not config.cross_every and not (config.dropout and model.training)
        arranged = all(linear is not None for linear in chain([step.head], *step.layers))
        return step if usual and arranged else model

    def __call__(self, input_ids: torch.Tensor, cache: KVCache) -> dict[str, torch.Tensor]:
        model, config, B = self.model.model, self.model.config, len(input_ids)
        H, KV = config.n_heads, config.n_kv_groups
        x = model.embed(input_ids)
        rope, mask = model._rope_and_mask(x, None, None, cache)
        for i, (block, (qkv, o, gate_up, down)) in enumerate(zip(model.layers, self.layers, strict=True)):
            heads = qkv(block.input_layernorm(x)).view(B, H + 2 * KV, 1, -1)
            turned = rotate(heads[:, : H + KV], *rope)
            k, v = cache.write(i, turned[:, H:], heads[:, H + KV :])
            q = turned[:, :H].reshape(B, KV, H // KV, -1)  # the queries of a group in the place of T
            y = F.scaled_dot_product_attention(q, k, v, mask)
            x = x + o(y.reshape(B, 1, -1))
            gate, up = gate_up(block.post_attention_layernorm(x)).chunk(2, dim=-1)
            x = x + down(F.silu(gate) * up)
        return {"logits": self.head(model.norm(x))}


# ---- LoRA: learn a small correction to a frozen matrix -------------------------------------------------------------------


class Linear_LORA(nn.Module):
    """base(x) + alpha / rank * (x A^T) B^T with the base frozen (Hu et al. 2021, "LoRA"). A [rank, in] is random, B
    [out, rank] zero, so that nothing changes at first. Both are fp32 whatever the base is: any module with in_features,
    out_features and forward."""

    def __init__(
        self, in_dim: int, out_dim: int, rank: int, alpha: float, dropout: float = 0.0, base: nn.Module | None = None
    ):
        super().__init__()
        if rank < 1:
            raise ValueError(f"the LoRA rank is {rank}: it must be at least 1")
        self.base = nn.Linear(in_dim, out_dim) if base is None else base
        self.base.requires_grad_(False)
        device = next(chain(self.base.parameters(), self.base.buffers())).device
        self.lora_a = nn.Parameter(torch.empty(rank, in_dim, device=device))
        self.lora_b = nn.Parameter(torch.zeros(out_dim, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as in the authors' code
        self.in_features, self.out_features = in_dim, out_dim
        self.scaling, self.dropout, self.merged = alpha / rank, dropout, False

    @classmethod
    def from_linear(cls, linear: nn.Module, rank: int, alpha: float, dropout: float = 0.0) -> "Linear_LORA":
        """Wrap a layer; its weight and bias stay the tensors they are."""
        return cls(linear.in_features, linear.out_features, rank, alpha, dropout, linear)

    def delta(self) -> torch.Tensor:
        """What is added to the base's weight, [out, in]."""
        return self.scaling * (self.lora_b @ self.lora_a)

    @property
    def weight(self) -> torch.Tensor:
        """Base and correction as one matrix [out, in]: for a head, whose loss works on its weight."""
        return self.base.weight if self.merged else self.base.weight + self.delta().to(self.base.weight.dtype)

    def forward(self, x):
        y = self.base(x)
        if self.merged:
            return y
        x = F.dropout(x.to(self.lora_a.dtype), self.dropout, self.training)
        return y + (self.scaling * F.linear(F.linear(x, self.lora_a), self.lora_b)).to(y.dtype)

    def merge(self) -> None:
        """Move the correction into the base: no cost at inference any more. ValueError where the base has no float weight."""
        self._add(1)

    def unmerge(self) -> None:
        """Take it out again, exact to 1e-6 in fp32."""
        self._add(-1)

    @torch.no_grad()
    def _add(self, sign: int):
        weight = getattr(self.base, "weight", None)
        # a quantised base unpacks its weight into a new tensor each time: what is added there is lost
        shape = (self.out_features, self.in_features)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point() or tuple(weight.shape) != shape:
            raise ValueError(f"a {type(self.base).__name__} has no plain weight to merge LoRA into: dequantise it first")
        if self.merged != (sign > 0):
            weight.copy_(weight.float() + sign * self.delta().float())
            self.merged = sign > 0


def find_linears(
    module: nn.Module, targets: Sequence[str] | str | None = None, kind: type | tuple[type, ...] = nn.Module
) -> dict[str, nn.Module]:
    """The linear layers of this kind, by name, that have no LoRA yet and that `targets` names.

    targets: a list of name endings (["q_proj", "mlp.up_proj"]), one regular expression for the whole name, or None for all
    but lm_head. Raises ValueError where nothing fits, and for a head that is tied to the embedding, which would be changed
    with it.
    """

    def wanted(name: str) -> bool:
        if targets is None:
            return name.split(".")[-1] != "lm_head"
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        return any(f".{name}".endswith(f".{ending}") for ending in targets)

    linears = {}
    for name, layer in module.named_modules():
        wrapped = isinstance(layer, Linear_LORA) or f".{name}".endswith(".base")
        linear = isinstance(layer, kind) and hasattr(layer, "in_features") and hasattr(layer, "out_features")
        if linear and not wrapped and wanted(name):
            linears[name] = layer
    if not linears:
        raise ValueError(f"the targets {targets!r} name no linear layer of this {type(module).__name__}")
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, linear in linears.items():
        if any(id(parameter) in embeddings for parameter in linear.parameters(recurse=False)):
            raise ValueError(f"{name} shares its weight with the embedding: leave it out of the targets, or untie it")
    return linears


def convert_linears_to_lora(
    module: nn.Module, rank: int, alpha: float, dropout: float = 0.0, targets: Sequence[str] | str | None = None
) -> list[str]:
    """Wrap the linear layers that `targets` names in Linear_LORA, in place; their names are returned.

    targets: see find_linears. All other parameters stay as trainable as they are: freeze them with requires_grad_(False)
    beforehand. Raises ValueError where nothing fits, and for a head that is tied to the embedding.
    """
    linears = find_linears(module, targets)
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, Linear_LORA.from_linear(linear, rank, alpha, dropout))
    return list(linears)


def lora_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The names and tensors that LoRA trains."""
    return ((name, p) for name, p in module.named_parameters() if name.endswith(("lora_a", "lora_b")))


def merge_lora(module: nn.Module) -> None:
    """Merge every correction and put the plain linear layers back, in place. A quantised base (quant.py) becomes floats
    again, and takes their memory: four bits cannot hold the sum."""
    for name, layer in [(n, m) for n, m in module.named_modules() if isinstance(m, Linear_LORA)]:
        if hasattr(layer.base, "to_linear"):
            layer.base = layer.base.to_linear()
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer.base)


# ---- eyes ----------------------------------------------------------------------------------------------------------------


def shuffled_grid(grid: tuple[int, int], r: int) -> tuple[int, int]:
    """Tokens down and across after pixel shuffle. Raises ValueError where r does not divide the grid."""
    if grid[0] % r or grid[1] % r:
        raise ValueError(f"{grid[0]}x{grid[1]} patches cannot be joined {r}x{r} (pixel_shuffle): choose a size that divides")
    return grid[0] // r, grid[1] // r


def pixel_shuffle(x: torch.Tensor, grid: tuple[int, int], r: int) -> torch.Tensor:
    """[I, N, D] on a grid -> [I, N / r^2, r^2 D]: each r x r square of patches becomes one token, its patches one after the
    other row by row (the order of transformers' Idefics3Connector)."""
    (I, _, D), (h, w) = x.shape, shuffled_grid(grid, r)
    return x.reshape(I, h, r, w, r, D).transpose(2, 3).reshape(I, h * w, r * r * D)


class MultiModalProjector(nn.Module):
    """From patches as the vision tower sees them to tokens as the language model reads them.

    "mlp": two layers with a GELU between (LLaVA-1.5); "linear": one (Idefics3 without bias, PaliGemma with).
    """

    def __init__(
        self, in_dim: int, out_dim: int, hidden_dim: int | None = None, projector_type="mlp", bias=True, pixel_shuffle: int = 1
    ):
        super().__init__()
        self.projector_type, self.pixel_shuffle = projector_type, pixel_shuffle
        in_dim, hidden_dim = in_dim * pixel_shuffle**2, hidden_dim or out_dim
        if projector_type == "mlp":
            self.linear_1 = nn.Linear(in_dim, hidden_dim, bias=bias)
            self.linear_2 = nn.Linear(hidden_dim, out_dim, bias=bias)
        elif projector_type == "linear":
            self.linear = nn.Linear(in_dim, out_dim, bias=bias)
        else:
            raise ValueError(f"projector_type is {projector_type!r}: it must be mlp or linear")

    def forward(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """[I, N, Dv] -> [I, N / r^2, D]. grid: patches down and across; a square unless given."""
        side = math.isqrt(x.shape[1])
        grid = grid or (side, side)
        if math.prod(grid) != x.shape[1]:
            raise ValueError(f"{x.shape[1]} patches do not fill a grid of {grid[0]}x{grid[1]}: say which grid they are on")
        if self.pixel_shuffle > 1:
            x = pixel_shuffle(x, grid, self.pixel_shuffle)
        return self.linear(x) if self.projector_type == "linear" else self.linear_2(F.gelu(self.linear_1(x)))


def find_image_token(input_ids: torch.Tensor, num_images: int, per_image: int, vocab_size: int) -> int:
    """The placeholder's id, for a model that was not told. Tokenizers add it at their end, so: the first id outside the
    vocabulary; else the id that stands there per_image times for each image, of several the last. Failing that, one that
    fills at least an image, for the sake of the error message; else vocab_size, which is nowhere."""
    ids, counts = input_ids.unique(return_counts=True)
    outside, fitting = ids[ids >= vocab_size], ids[counts == num_images * per_image]
    if len(outside) or not num_images:
        return int(outside.min()) if len(outside) else vocab_size
    if len(fitting):
        return int(fitting.max())
    return int(ids[counts.argmax()]) if 1 < per_image <= counts.max() else vocab_size


def images_by_row(features, places, pattern=None) -> tuple[torch.Tensor, torch.Tensor]:
    """For cross-attention: image features [I, N, D], sorted into the rows of their placeholders, bool [B, T], become
    [B, M * N, D], zeros where a row has fewer than M images; and which of them each token sees, bool [B, T, M * N]: those
    whose placeholder is at its own place or before it, or where `pattern`, bool [B or 1, 1, T, S], lets it look."""
    (B, T), (_, N, D) = places.shape, features.shape
    rows, at = places.nonzero(as_tuple=True)
    number = places.cumsum(dim=1)[places] - 1  # counted from 0 in each row
    M = int(places.sum(dim=1).max())
    sorted_features = features.new_zeros(B, M, N, D).index_put((rows, number), features)
    stands = torch.full((B, M), T, device=places.device).index_put((rows, number), at)  # T: there is no such image
    if pattern is None:
        visible = stands[:, None] <= torch.arange(T, device=places.device)[:, None]
    else:
        column = stands.clamp(max=T - 1)[:, None].expand(B, T, M)
        visible = pattern[:, 0, :, -T:].expand(B, T, T).gather(2, column) & (stands < T)[:, None]
    return sorted_features.flatten(1, 2), visible.repeat_interleave(N, dim=2)


class MllamaForConditionalGeneration(nn.Module):
    """vision_tower [I, N, Dv] -> multi_modal_projector [I, N', D] -> language_model, which reads the pictures as tokens in
    the place of the text's placeholders (fusion "early") or looks at them from layers between its blocks ("cross").

    Under "cross" a picture has a single placeholder, a word like any other (a zero vector where the vocabulary has no row
    for it). A token sees the pictures whose placeholder it may look at: all before it in its row, or in its own sample where
    samples are packed. (Flamingo lets it see the last of them only.)
    """

    def __init__(self, config: MLLAMAConfig):
        super().__init__()
        self.config = config
        vision, text = config.vision_config, config.text_config
        self.vision_tower = SiglipModel(vision)
        self.multi_modal_projector = MultiModalProjector(
            vision.hidden_size, text.hidden_size, config.projection_dim, config.projector_type, config.projector_bias,
            config.pixel_shuffle,
        )  # fmt: skip
        self.language_model = Llama3ForCausalLM(text)

    @property
    def grad_checkpoint(self) -> bool:
        return self.vision_tower.grad_checkpoint and self.language_model.grad_checkpoint

    @grad_checkpoint.setter
    def grad_checkpoint(self, on: bool):
        self.vision_tower.grad_checkpoint = self.language_model.grad_checkpoint = on

    def tie_weights(self):
        self.language_model.tie_weights()

    def resize_token_embeddings(self, num_tokens: int) -> None:
        """See Llama3ForCausalLM."""
        self.language_model.resize_token_embeddings(num_tokens)
        self.config = replace(self.config, text_config=self.language_model.config)

    def vision_features(self, pixel_values, interpolate_pos_encoding: bool = False, trace=None) -> torch.Tensor:
        """[I, 3, height, width] -> [I, N, Dv], what the projector gets. A frozen tower keeps nothing for a backward pass."""
        learns = any(p.requires_grad for p in self.vision_tower.parameters())
        inner = None if trace is None else {}
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            x = self.vision_tower(pixel_values, self.config.vision_feature_layer, interpolate_pos_encoding, inner)
        if trace is not None:
            trace.update({f"vision_tower.{name}": value for name, value in inner.items()})
        return x

    def image_features(self, pixel_values, interpolate_pos_encoding: bool = False, trace=None) -> torch.Tensor:
        """[I, 3, height, width] -> [I, N', D], what the language model gets. Raises ValueError for a picture of another size
        than the configured one, unless interpolate_pos_encoding allows it."""
        x = self.vision_features(pixel_values, interpolate_pos_encoding, trace)
        grid = whole_patches(tuple(pixel_values.shape[-2:]), pair(self.config.vision_config.patch_size))
        return note(trace, "image_features", self.multi_modal_projector(x, grid))

    def _find_placeholders(self, image_features, input_ids, attention_mask=None) -> torch.Tensor:
        """Where pictures belong, bool [B, T]. Raises ValueError unless there are as many places as features to fill them."""
        I, N = 0 if image_features is None else len(image_features), self.config.text_config.num_image_tokens
        if image_features is not None and self.config.fusion == "early":
            N = image_features.shape[1]  # another number than usual where the picture has another size
        real = attention_mask.bool() if attention_mask is not None and attention_mask.ndim == 2 else None
        image_token_id = self.config.image_token_id
        if image_token_id is None:
            tokens = input_ids if real is None else input_ids[real]
            image_token_id = find_image_token(tokens, I, N, self.config.text_config.vocab_size)
        places = input_ids == image_token_id
        if real is not None:
            places &= real
        if (found := int(places.sum())) != I * N:
            raise ValueError(
                f"the text has {found} image placeholders (token id {image_token_id}), but {I} images x {N} features are "
                f"{I * N}: give every image its <image>, and the processor the model's num_image_tokens"
            )
        return places

    def _merge_input_ids_with_image_features(self, image_features, input_ids, attention_mask=None) -> torch.Tensor:
        """Token embeddings with image features in the place of the placeholders: image_features [I, N', D] (or None), images
        in the order of their placeholders, row by row; input_ids [B, T] -> [B, T, D]. Gradients reach both.
        Raises ValueError, naming both numbers, where placeholders and features do not match."""
        places = self._find_placeholders(image_features, input_ids, attention_mask)
        return self._merge(image_features, input_ids, places)

    def _merge(self, image_features, input_ids, places):
        without_row = places & (input_ids >= self.config.text_config.vocab_size)
        embeds = self.language_model.model.embed(input_ids.masked_fill(without_row, 0))
        if self.config.fusion == "cross" or image_features is None:
            return embeds.masked_fill(without_row[..., None], 0)
        return embeds.masked_scatter(places[..., None], image_features.to(embeds.dtype))

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
        trace: dict | None = None,
        blocks: AttentionBlocks | None = None,
    ) -> dict[str, torch.Tensor]:
        """One pass over T tokens and I images.

        input_ids [B, T] with num_image_tokens placeholders per image, images in that order row by row, any number in any row;
        pixel_values [I, 3, height, width], or what was made of them before: vision_features [I, N, Dv] or image_features
        [I, N', D] (see the methods of these names); blocks: what attention_mask [B, 1, T, T] says, for a faster attention (see
        packing.py); the rest as in Llama3ForCausalLM. Labels at placeholders and at padding
        never count. Returns and raises as Llama3ForCausalLM, and ValueError where placeholders and images do not match.
        """
        if image_features is None and vision_features is not None:
            image_features = self.multi_modal_projector(vision_features, self.config.vision_config.grid)
        elif image_features is None and pixel_values is not None and len(pixel_values):
            image_features = self.image_features(pixel_values, trace=trace)
        places = self._find_placeholders(image_features, input_ids, attention_mask)
        embeds, images = self._merge(image_features, input_ids, places), None
        if self.config.fusion == "cross" and image_features is not None:
            pattern = attention_mask if attention_mask is not None and attention_mask.ndim == 4 else None
            images = images_by_row(image_features.to(embeds.dtype), places, pattern)
        hidden = self.language_model.model(None, embeds, attention_mask, position_ids, cache, images, trace, blocks)
        loss = None if labels is None else self._compute_loss_with_masking(hidden, labels, places, attention_mask)
        return self.language_model.read_out(hidden[:, -logits_to_keep:], loss)

    def _compute_loss_with_masking(self, hidden, labels, places, attention_mask=None) -> torch.Tensor:
        """Mean cross-entropy of hidden [B, T, D] against the labels [B, T] of the next positions, leaving out -100, padding and
        the places of images, bool [B, T]."""
        return self.language_model.loss(hidden, labels, attention_mask, places)

    @staticmethod
    def _create_conversation_mask(input_ids, assistant_start: Sequence[int], end_of_turn: int) -> torch.Tensor:
        """Which tokens are answers, bool [B, T]: all after assistant_start (the ids that open an assistant's turn) up to and
        including end_of_turn, or to the end of the row. labels = input_ids.masked_fill(~mask, -100)."""
        start, mask = list(assistant_start), torch.zeros_like(input_ids, dtype=torch.bool)
        for b, row in enumerate(input_ids.tolist()):
            answering = False
            for t, token in enumerate(row):
                if answering:
                    mask[b, t], answering = True, token != end_of_turn
                else:
                    answering = row[max(0, t + 1 - len(start)) : t + 1] == start
        return mask

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        return self.language_model.new_cache(batch_size, max_length)

    def stream(
        self, input_ids, pixel_values=None, attention_mask=None, *, max_new_tokens: int, image_features=None, **sampling
    ) -> Iterator[list[int | None]]:
        """As Llama3ForCausalLM.stream, with the images of the prompts: the vision tower runs once, before the first token."""
        prefill = partial(self, pixel_values=pixel_values, image_features=image_features)
        yield from self.language_model.stream(input_ids, max_new_tokens, attention_mask, prefill, **sampling)

    def generate(self, input_ids, pixel_values=None, attention_mask=None, **sampling) -> list[list[int]]:
        """generate(**batch, max_new_tokens=20) continues every prompt of the processor's batch: the new ids, row by row."""
        return collect(self.stream(input_ids, pixel_values, attention_mask, **sampling), len(input_ids))
