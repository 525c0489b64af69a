"""A LLaMA decoder, and the same decoder with a vision tower: images become tokens that stand among the words.

Mirrors: Llama 3.2 and SmolLM2 ("The Llama 3 Herd of Models", 2024), and the two published ways to join such a model to
SigLIP, LLaVA-1.5 (Liu et al., 2023) and Idefics3 / SmolVLM (Laurencon et al., 2024); tests/core/test_model.py compares the
logits of each. Read gpt.py, then siglip.py. What changes from GPT-2: RMSNorm for LayerNorm, rotations (RoPE) for learned
positions, fewer key/value heads than query heads, a gated MLP. Parameters carry the published names.

    model = Llama3ForCausalLM(LLAMA32Config.preset("smollm2-135m"))
    model(input_ids, labels=input_ids).loss              # labels stand where the tokens stand: the shift is done inside
    vlm = MllamaForConditionalGeneration(MLLAMAConfig(vision_config={...}, text_config={...}))
    vlm.generate(**processor(["What is this? <image>"], [image]), max_new_tokens=20)
    convert_linears_to_lora(vlm.language_model, rank=8, alpha=16, targets=["q_proj", "v_proj"])

Axes: B batch, T new tokens, S all tokens so far, H heads, D width, Dv width of the tower, V vocabulary, I images of the whole
batch, N patches of an image, N' tokens of an image (N / r^2 after pixel shuffle). The class names are the posts': Mllama here
is LLaVA's and Idefics3's way to join images and words, not Meta's.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt import GPT, Decoder, GPTConfig, KVCache, Output, attention, collect, positions_and_mask
from siglip import SiglipModel, SiglipVisionConfig
from vit_scratch import ViTConfig, ViTModel

# ---- configuration ---------------------------------------------------------------------------------------------------

LLAMA32_ROPE = {
    **{"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    **{"original_max_position_embeddings": 8192},
}
QWEN = {"vocab_size": 151936, "rope_base": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
LLAMA32 = {"n_kv_groups": 8, "context_length": 131072, "rope_scaling": LLAMA32_ROPE, "tie_word_embeddings": True}


@dataclass
class LLAMA32Config:
    vocab_size: int = 128256
    hidden_size: int = 2048
    n_heads: int = 32
    n_layers: int = 16
    hidden_dim: int = 8192  # width inside the MLP (transformers: intermediate_size)
    n_kv_groups: int | None = None  # key/value heads (transformers: num_key_value_heads); n_heads unless given
    head_dim: int | None = None  # hidden_size / n_heads unless given
    max_position_embeddings: int = 8192  # the context length unless that is given
    context_length: int | None = None  # positions past it are an error
    rope_base: float = 500000.0
    rope_scaling: dict | None = None  # {"rope_type": "llama3" | "linear" | "default", ...} with the published keys
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of queries, keys and values, and of their output unless output_bias says otherwise
    output_bias: bool | None = None  # Qwen2 has biases without this one
    qk_norm: bool = False  # Qwen3: RMSNorm of each head's queries and keys
    mlp_bias: bool = False
    dropout: float = 0.0
    initializer_range: float = 0.02
    attention: str = "sdpa"  # or "explicit": softmax(QK^T)V spelled out, the same numbers more slowly
    num_image_tokens: int | None = None  # placeholders per image; MLLAMAConfig fills it in

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
        "qwen2.5-0.5b": {
            **{**QWEN, "hidden_size": 896, "n_heads": 14, "n_kv_groups": 2, "n_layers": 24, "hidden_dim": 4864},
            **{"max_position_embeddings": 32768, "attention_bias": True, "output_bias": False},
        },
        "qwen3-0.6b": {
            **{**QWEN, "hidden_size": 1024, "n_heads": 16, "n_kv_groups": 8, "n_layers": 28, "hidden_dim": 3072},
            **{"max_position_embeddings": 40960, "head_dim": 128, "qk_norm": True},
        },
    }

    def __post_init__(self):
        self.n_kv_groups = self.n_kv_groups or self.n_heads
        self.head_dim = self.head_dim or self.hidden_size // self.n_heads
        self.context_length = self.context_length or self.max_position_embeddings
        self.output_bias = self.attention_bias if self.output_bias is None else self.output_bias
        H, groups = self.n_heads, self.n_kv_groups
        assert H % groups == 0, f"{H} query heads cannot share {groups} key/value heads: choose a divisor"
        assert self.head_dim % 2 == 0, f"head_dim is {self.head_dim}: rotary positions turn pairs of numbers, it must be even"

    @classmethod
    def preset(cls, name: str, **changes) -> "LLAMA32Config":
        return cls(**{**cls.PRESETS[name], **changes})


@dataclass
class MLLAMAConfig:
    """Tower and decoder, each a config or a dict of SigLIP's or LLaMA's settings (copied, never changed), and their join."""

    vision_config: SiglipVisionConfig | ViTConfig | dict
    text_config: LLAMA32Config | GPTConfig | dict
    projection_dim: int | None = None  # inner width of the mlp projector; the text model's width unless given
    projector_type: str = "mlp"  # LLaVA's two layers, or "linear" as in Idefics3 and PaliGemma
    projector_bias: bool | None = None  # unless given: True for the mlp, False for linear (PaliGemma's has one)
    pixel_shuffle: int = 1  # r: r x r neighbouring patches become one token
    vision_feature_layer: int | None = None  # the tower's output after its last norm, or a hidden state before it: -2, ...
    image_token_id: int | None = None  # the placeholder's id in the tokenizer; a processor's batch brings it too

    def __post_init__(self):
        vision, text, r = self.vision_config, self.text_config, self.pixel_shuffle
        if isinstance(vision, dict):  # a VLM reads the patches; the pooling head would be dead weight
            vision = SiglipVisionConfig(**{"vision_use_head": False, **vision})
        if isinstance(text, dict):
            text = LLAMA32Config(**text)
        if self.projector_bias is None:
            self.projector_bias = self.projector_type == "mlp"
        rows, columns = vision.grid
        assert rows % r == 0 and columns % r == 0, f"{rows}x{columns} patches cannot be joined {r}x{r} (pixel_shuffle)"
        layer, L = self.vision_feature_layer or 0, vision.num_hidden_layers
        assert -L - 1 <= layer <= L, f"vision_feature_layer is {layer}: the tower has 0 to {L}, or -1 to {-L - 1}"
        self.vision_config = replace(vision)
        self.text_config = replace(text, num_image_tokens=rows * columns // r**2)


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
    assert scaling["rope_type"] == "default", f"rope_scaling of type {scaling['rope_type']!r} is not implemented"
    return frequencies


class LLAMARotaryEmbedding(nn.Module):
    """cos and sin for the positions of a forward pass, once for all layers."""

    def __init__(self, config: LLAMA32Config):
        super().__init__()
        self.config = config
        self.frequencies = None  # no buffer: made on first use, since a model may be built on the meta device

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [T] or [B, T] -> cos and sin [1, T, head_dim] or [B, 1, T, head_dim]."""
        if self.frequencies is None or self.frequencies.device != positions.device:
            self.frequencies = rotary_frequencies(self.config).to(positions.device)
        angles = positions[..., None].float() * self.frequencies
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat([cos, cos], dim=-1).unsqueeze(-3), torch.cat([-sin, sin], dim=-1).unsqueeze(-3)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x[i], x[i + head_dim / 2]) by their angles: (a, b) -> (a cos - b sin, b cos + a sin). The minus sign
    is part of `sin`. Which two numbers make a pair is transformers' choice; Meta's own files pair neighbours."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class GroupQueryAttention(nn.Module):
    """Attention whose query heads share keys and values in groups (Ainslie et al. 2023): a smaller cache, little loss."""

    def __init__(self, config: LLAMA32Config):
        super().__init__()
        D, bias = config.hidden_size, config.attention_bias
        self.head_dim, self.dropout, self.explicit = config.head_dim, config.dropout, config.attention == "explicit"
        self.q_proj = nn.Linear(D, config.n_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(D, config.n_kv_groups * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(D, config.n_kv_groups * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.n_heads * self.head_dim, D, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = (LLAMARMSNorm(self.head_dim, config.rms_norm_eps) for _ in range(2))
        self.qk_norm = config.qk_norm

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, heads * head_dim] -> [B, heads, T, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def rotate(self, x: torch.Tensor, rope, layer: int) -> torch.Tensor:
        """The one place where positions enter: queries or keys [B, heads, T, head_dim], turned by their angles."""
        return rotate(x, *rope)

    def forward(self, x, rope, mask=None, cache=None, layer=0):
        """x [B, T, D] -> [B, T, D]. mask: see gpt.attention; None for the plain causal one (T = S, or T = 1)."""
        q, k, v = (self.heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotate(q, rope, layer), self.rotate(k, rope, layer)
        if cache is not None:
            k, v = cache.write(layer, k, v)
        return self.attend(q, k, v, mask, causal=mask is None and x.shape[1] > 1)

    def attend(self, q, k, v, mask, causal=False):
        """q [B, H, T, head_dim], k and v [B, KV heads, S, head_dim] -> [B, T, D]."""
        y = attention(q, k, v, mask, causal, self.dropout if self.training else 0.0, self.explicit)
        return F.dropout(self.o_proj(y.transpose(1, 2).flatten(2)), self.dropout, self.training)


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

    def forward(self, x, rope, mask=None, cache=None, layer=0):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama3Model(nn.Module):
    def __init__(self, config: LLAMA32Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.norm = LLAMARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LLAMARotaryEmbedding(config)

    def forward(self, inputs_embeds, attention_mask=None, position_ids=None, cache=None) -> torch.Tensor:
        """[B, T, D] -> [B, T, D], after the final norm. The arguments are those of Decoder.forward (gpt.py)."""
        limit = self.config.context_length
        positions, mask = positions_and_mask(inputs_embeds, attention_mask, position_ids, cache, limit)
        x, rope = inputs_embeds, self.rotary_emb(positions, inputs_embeds.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, mask, cache, i)
        return self.norm(x)


class Llama3ForCausalLM(Decoder):
    model_class = Llama3Model

    def __init__(self, config: LLAMA32Config):
        super().__init__()
        self.config = config
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():  # as gpt.py: what adds to the residual stream starts smaller
            last = name.endswith(("o_proj.weight", "down_proj.weight"))
            if weight.ndim == 2:
                nn.init.normal_(weight, std=config.initializer_range / (math.sqrt(2 * config.n_layers) if last else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
        self.tie_weights()

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, T, D]."""
        return self.model.embed_tokens(input_ids)

    def hidden_states(self, inputs_embeds, attention_mask=None, position_ids=None, cache=None) -> torch.Tensor:
        """[B, T, D] -> [B, T, D], after the final norm."""
        return self.model(inputs_embeds, attention_mask, position_ids, cache)

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty KVCache for so many rows of so many tokens."""
        config, weight = self.config, self.model.embed_tokens.weight
        shape = config.n_layers, batch_size, config.n_kv_groups, max_length, config.head_dim
        return KVCache(*shape, weight.dtype, weight.device)


# ---- LoRA: learn a small correction to a frozen matrix -------------------------------------------------------------------


class Linear_LORA(nn.Module):
    """linear(x) + alpha / rank * (x A^T) B^T with the linear layer frozen (Hu et al. 2021, "LoRA"). A [rank, in] is random, B
    [out, rank] zero, so that nothing changes at first. Both are fp32 whatever the layer is: a new nn.Linear, or `linear`, any
    module with in_features, out_features and forward. lib/lora.py merges the two into one."""

    def __init__(
        self, in_dim: int, out_dim: int, rank: int = 4, alpha: float = 16, dropout: float = 0.0, bias: bool = False,
        linear: nn.Module | None = None,
    ):  # fmt: skip
        super().__init__()
        assert rank >= 1, f"the LoRA rank is {rank}: it must be at least 1"
        self.linear = nn.Linear(in_dim, out_dim, bias=bias) if linear is None else linear
        self.linear.requires_grad_(False)
        device = next(t.device for t in self.linear.state_dict().values())
        self.lora_a = nn.Parameter(torch.empty(rank, in_dim, device=device))
        self.lora_b = nn.Parameter(torch.zeros(out_dim, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as in the authors' code
        self.in_features, self.out_features = in_dim, out_dim
        self.scaling, self.dropout = alpha / rank, dropout

    def forward(self, x):
        y = self.linear(x)
        x = F.dropout(x.to(self.lora_a.dtype), self.dropout, self.training)
        return y + F.linear(self.scaling * F.linear(x, self.lora_a), self.lora_b).to(y.dtype)


def convert_linears_to_lora(
    module: nn.Module, rank: int = 4, alpha: float = 16, dropout: float = 0.0,
    target_module_classes: tuple[type, ...] = (nn.Linear,), targets: Sequence[str] | str | None = None,
) -> list[str]:  # fmt: skip
    """Wrap linear layers in Linear_LORA, in place; their weights stay the tensors they are. Returns their names.

    targets: name endings (["q_proj", "mlp.up_proj"]), one regular expression for the whole name, or None for all but lm_head.
    All other parameters stay as trainable as they are: freeze them with requires_grad_(False) beforehand.
    """
    names = linear_names(module, target_module_classes, targets)
    for name in names:
        parent, _, child = name.rpartition(".")
        linear = module.get_submodule(name)
        lora = Linear_LORA(linear.in_features, linear.out_features, rank, alpha, dropout, linear=linear)
        setattr(module.get_submodule(parent), child, lora)
    return names


def linear_names(module: nn.Module, classes: tuple[type, ...], targets: Sequence[str] | str | None) -> list[str]:
    """The names of the layers of these classes that have no LoRA yet and that `targets` names; see convert_linears_to_lora."""

    def wanted(name: str) -> bool:
        if targets is None:
            return name.split(".")[-1] != "lm_head"
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        return any(f".{name}".endswith(f".{ending}") for ending in targets)

    inside = {f"{name}.linear" for name, layer in module.named_modules() if isinstance(layer, Linear_LORA)}
    layers = module.named_modules()
    return [name for name, layer in layers if isinstance(layer, classes) and name not in inside and wanted(name)]


# ---- images into the decoder -------------------------------------------------------------------------------------------


def pixel_shuffle(x: torch.Tensor, grid: tuple[int, int], r: int) -> torch.Tensor:
    """[I, N, D] on a grid -> [I, N / r^2, r^2 D]: each r x r square of patches becomes one token, its patches one after the
    other row by row (the order of transformers' Idefics3Connector)."""
    (I, _, D), (h, w) = x.shape, (grid[0] // r, grid[1] // r)
    return x.reshape(I, h, r, w, r, D).transpose(2, 3).reshape(I, h * w, r * r * D)


class MultiModalProjector(nn.Module):
    """From patches as the vision tower encodes them to tokens as the language model reads them.

    "mlp": two layers with a GELU between (LLaVA-1.5); "linear": one (Idefics3 without bias, PaliGemma with).
    """

    def __init__(
        self, in_dim: int, out_dim: int, hidden_dim: int | None = None, projector_type="mlp", bias=True, pixel_shuffle: int = 1
    ):
        super().__init__()
        assert projector_type in ("mlp", "linear"), f"projector_type is {projector_type!r}: it must be mlp or linear"
        self.projector_type, self.pixel_shuffle = projector_type, pixel_shuffle
        in_dim, hidden_dim = in_dim * pixel_shuffle**2, hidden_dim or out_dim
        if projector_type == "mlp":
            self.linear_1 = nn.Linear(in_dim, hidden_dim, bias=bias)
            self.linear_2 = nn.Linear(hidden_dim, out_dim, bias=bias)
        else:
            self.linear = nn.Linear(in_dim, out_dim, bias=bias)

    def forward(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """[I, N, Dv] -> [I, N / r^2, D]. grid: patches down and across; a square unless given."""
        if self.pixel_shuffle > 1:
            side = math.isqrt(x.shape[1])
            x = pixel_shuffle(x, grid or (side, side), self.pixel_shuffle)
        return self.linear(x) if self.projector_type == "linear" else self.linear_2(F.gelu(self.linear_1(x)))


class MllamaForConditionalGeneration(nn.Module):
    """vision_tower [I, N, Dv] -> multi_modal_projector [I, N', D] -> language_model, which reads the images as tokens in the
    places of the text's placeholders. (extras/cross_attention.py: layers between the decoder's blocks attend to them instead.)
    """

    decoders = {LLAMA32Config: Llama3ForCausalLM, GPTConfig: GPT}
    towers = {SiglipVisionConfig: SiglipModel, ViTConfig: ViTModel}

    def __init__(self, config: MLLAMAConfig):
        super().__init__()
        self.config = config
        vision, text = config.vision_config, config.text_config
        self.vision_tower = self.towers[type(vision)](vision)
        self.multi_modal_projector = MultiModalProjector(
            vision.hidden_size, text.hidden_size, config.projection_dim, config.projector_type, config.projector_bias,
            config.pixel_shuffle,
        )  # fmt: skip
        self.language_model = self.decoders[type(text)](text)

    def tie_weights(self):
        self.language_model.tie_weights()

    def vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[I, 3, height, width] -> [I, N, Dv], what the projector gets. A frozen tower keeps nothing for a backward pass."""
        learns = any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            return self.vision_tower.features(pixel_values, self.config.vision_feature_layer)

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[I, 3, height, width] -> [I, N', D], what the language model gets."""
        return self.multi_modal_projector(self.vision_features(pixel_values), self.vision_tower.grid)

    def find_placeholders(self, image_features, input_ids, attention_mask=None, image_token_id=None) -> torch.Tensor:
        """Where images belong, bool [B, T]. Raises ValueError unless there are as many places as features to fill them."""
        I, N = 0 if image_features is None else len(image_features), self.config.text_config.num_image_tokens
        if image_token_id is None:
            image_token_id = self.config.image_token_id
        assert image_token_id is not None or not I, "MLLAMAConfig needs image_token_id (a processor's batch brings it, too)"
        places = torch.zeros_like(input_ids, dtype=torch.bool) if image_token_id is None else input_ids == image_token_id
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            places = places & attention_mask.bool()
        if (found := int(places.sum())) != I * N:
            raise ValueError(
                f"the text has {found} image placeholders (token id {int(image_token_id)}), but {I} images x {N} features are "
                f"{I * N}: call MllamaImageProcessor(tokenizer, num_image_token={N}, ...) with the prompts "
                "and their images: it writes so many for each <image>"
            )
        return places

    def _merge_input_ids_with_image_features(self, image_features, input_ids, attention_mask=None, places=None) -> torch.Tensor:
        """Token embeddings with image features in the places of the placeholders: image_features [I, N', D] (or None), images
        in the order of their placeholders, row by row; input_ids [B, T] -> [B, T, D]. Gradients reach both.
        Raises ValueError, naming both numbers, where placeholders and features do not match."""
        if places is None:
            places = self.find_placeholders(image_features, input_ids, attention_mask)
        embeds = self.language_model.embed(input_ids.masked_fill(places, 0))  # the placeholder may have no row of its own
        if image_features is None:
            return embeds
        return embeds.masked_scatter(places[..., None], image_features.to(embeds.dtype))

    def hidden_states(self, image_features, input_ids, places, attention_mask=None, position_ids=None, cache=None):
        """Image features [I, N', D] (or None), tokens [B, T], places of images, bool [B, T] -> [B, T, D], after the
        decoder's final norm."""
        embeds = self._merge_input_ids_with_image_features(image_features, input_ids, places=places)
        return self.language_model.hidden_states(embeds, attention_mask, position_ids, cache)

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
        image_token_id: int | torch.Tensor | None = None,
    ) -> Output:
        """One pass over T tokens and I images.

        input_ids [B, T] with num_image_tokens placeholders per image, images in that order row by row, any number in any row;
        pixel_values [I, 3, height, width], or what was made of them before: vision_features [I, N, Dv] or image_features
        [I, N', D] (see the methods of these names); image_token_id: the placeholder's, unless the config has it; the rest as in
        gpt.Decoder.forward. Labels at placeholders and at padding never count. Returns as Decoder.forward; raises ValueError
        where placeholders and images do not match.
        """
        if image_features is None and vision_features is not None:
            image_features = self.multi_modal_projector(vision_features, self.vision_tower.grid)
        elif image_features is None and pixel_values is not None and len(pixel_values):
            image_features = self.image_features(pixel_values)
        places = self.find_placeholders(image_features, input_ids, attention_mask, image_token_id)
        hidden = self.hidden_states(image_features, input_ids, places, attention_mask, position_ids, cache)
        head = self.language_model.lm_head
        if labels is None:
            return Output(logits=head(hidden[:, -logits_to_keep:]))
        loss = self._compute_loss_with_masking(hidden, labels, places, attention_mask)
        return Output(loss=loss, logits=lambda: head(hidden[:, -logits_to_keep:]))

    def _compute_loss_with_masking(self, hidden, labels, places, attention_mask=None) -> torch.Tensor:
        """Mean cross-entropy of hidden [B, T, D] against the labels [B, T] of the next positions, leaving out -100, padding and
        the places of images, bool [B, T]."""
        return self.language_model.loss(hidden, labels.masked_fill(places, -100), attention_mask)

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
        self, input_ids, pixel_values=None, attention_mask=None, *, max_new_tokens: int, image_features=None,
        image_token_id=None, **options,
    ) -> Iterator[list[int | None]]:  # fmt: skip
        """As gpt.Decoder.stream, with the images of the prompts: the vision tower runs once, before the first token."""
        images = {"pixel_values": pixel_values, "image_features": image_features, "image_token_id": image_token_id}
        yield from self.language_model.stream(input_ids, max_new_tokens, attention_mask, partial(self, **images), **options)

    def generate(self, input_ids, pixel_values=None, attention_mask=None, **options) -> list[list[int]]:
        """generate(**batch, max_new_tokens=20) continues every prompt of the processor's batch: the new ids, row by row."""
        return collect(self.stream(input_ids, pixel_values, attention_mask, **options), len(input_ids))
