"""SigLIP: one tower reads pictures, the other captions, and both learn which belong together. Our VLM sees with the first.

Mirrors: "Sigmoid Loss for Language Image Pre-Training" (Zhai et al., 2023) and google's published SigLIP checkpoints (the
fixed-size SigLIP 2 ones as well), whose outputs it reproduces (tests/test_siglip.py). Read vit_scratch.py first. What
changes from there to here: no CLS token, a learned probe that asks all patches instead (the pooling head), a text tower of
the same blocks, and a loss that judges every pair of picture and caption on its own. Parameters carry the published names.

    vision = SiglipModel(SiglipVisionConfig.preset("base-p16-224"))
    vision(pixel_values)                                 # [B, N, D], what a language model gets to see
    vision(pixel_values, vision_feature_layer=-2)        # the same one layer earlier, before the final norm, as for LLaVA
    towers = SiglipTwoTower(SiglipConfig.preset("tiny"))
    towers.logits(pixel_values, input_ids)               # [B images, B captions]

Axes: B batch, C channels, N patches, T text tokens, H heads, D width, P width of the shared space, V vocabulary.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from gpt import check_block_config, explicit_attention, preset_settings, products_win
from vit_scratch import pair, resize_positions

# What differs from the defaults below (which are B/16 at 224 pixels), per published size: (vision tower, text tower). The
# multilingual and SigLIP 2 checkpoints are these sizes with a vocab_size of 250,000 and 256,000. "tiny" is ours.
TINY = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
PRESETS = {
    "tiny": ({**TINY, "image_size": 64, "patch_size": 8}, TINY),
    "base-p16-224": ({}, {}),
    "base-p16-256": ({"image_size": 256}, {}),
    "base-p16-384": ({"image_size": 384}, {}),
    "base-p16-512": ({"image_size": 512}, {}),
    "large-p16-256": ({**LARGE, "image_size": 256}, LARGE),
    "large-p16-384": ({**LARGE, "image_size": 384}, LARGE),
    "so400m-p14-224": ({**SO400M, "patch_size": 14}, {**SO400M, "max_position_embeddings": 16}),
    "so400m-p14-384": ({**SO400M, "image_size": 384, "patch_size": 14}, SO400M),
}


@dataclass
class SiglipTowerConfig:
    """What the two towers have in common."""

    hidden_size: int = 768
    intermediate_size: int | None = None  # width inside the MLP; 4 x hidden_size unless given
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    attention: str = "sdpa"  # or "explicit": softmax(QK^T)V spelled out, the same numbers more slowly

    def __post_init__(self):
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        check_block_config(self)

    @classmethod
    def preset(cls, name: str, **changes):
        return cls(**{**preset_settings(cls.PRESETS, name), **changes})


@dataclass
class SiglipVisionConfig(SiglipTowerConfig):
    image_size: int | tuple[int, int] = 224  # pixels: one number for a square, or (height, width)
    patch_size: int | tuple[int, int] = 16
    num_channels: int = 3
    vision_use_head: bool = True  # the pooling head; a VLM has no use for it

    PRESETS = {name: vision for name, (vision, _) in PRESETS.items()}

    def __post_init__(self):
        super().__post_init__()
        self.grid  # noqa: B018  raises for a picture smaller than a patch

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return whole_patches(pair(self.image_size), pair(self.patch_size))


@dataclass
class SiglipTextConfig(SiglipTowerConfig):
    vocab_size: int = 32000
    max_position_embeddings: int = 64
    projection_size: int | None = None  # P; hidden_size unless given

    PRESETS = {name: text for name, (_, text) in PRESETS.items()}

    def __post_init__(self):
        super().__post_init__()
        self.projection_size = self.projection_size or self.hidden_size
        for name in ("vocab_size", "max_position_embeddings", "projection_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")


@dataclass
class SiglipConfig:
    """Both towers; either may be given as a dict of its settings."""

    vision_config: SiglipVisionConfig | dict = field(default_factory=dict)
    text_config: SiglipTextConfig | dict = field(default_factory=dict)

    def __post_init__(self):
        if isinstance(self.vision_config, dict):
            self.vision_config = SiglipVisionConfig(**self.vision_config)
        if isinstance(self.text_config, dict):
            self.text_config = SiglipTextConfig(**self.text_config)
        if not self.vision_config.vision_use_head:
            raise ValueError("vision_use_head is False: two towers compare pooled pictures, which only the head makes")
        if self.vision_config.hidden_size != self.text_config.projection_size:
            raise ValueError(
                f"pictures come out {self.vision_config.hidden_size} wide and texts {self.text_config.projection_size}: "
                "the text's projection_size must be the vision tower's hidden_size"
            )

    @classmethod
    def preset(cls, name: str, vision: dict | None = None, text: dict | None = None) -> "SiglipConfig":
        """A published size, with changes to its vision and text settings."""
        return cls(SiglipVisionConfig.preset(name, **(vision or {})), SiglipTextConfig.preset(name, **(text or {})))


def whole_patches(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """How many patches fit down and across. Unlike in vit_scratch.py a rest is cut off, because so400m-p14-384 was
    trained that way: of 384 pixels it sees 27 x 14 = 378. Raises ValueError where not even one fits."""
    (H, W), (h, w) = image_size, patch_size
    if min(h, w) < 1 or H < h or W < w:
        raise ValueError(f"a {H}x{W} picture holds no {h}x{w} patch: choose a larger picture or smaller patches")
    return H // h, W // w


def note(trace: dict | None, name: str, x: torch.Tensor) -> torch.Tensor:
    """x, after writing it down under its name where somebody wants to know."""
    if trace is not None:
        trace[name] = x
    return x


class SiglipVisionEmbeddings(nn.Module):
    """Cut the picture into patches, map each to a vector and tell it where it stands."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.image_size, self.patch_size, self.grid = pair(config.image_size), pair(config.patch_size), config.grid
        D = config.hidden_size
        self.patch_embedding = nn.Conv2d(config.num_channels, D, kernel_size=self.patch_size, stride=self.patch_size)
        self.position_embedding = nn.Embedding(math.prod(self.grid), D)

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """[B, C, height, width] -> [B, N, D]. Another size than the configured one is a ValueError, or, when asked for,
        gets position embeddings resized to its grid."""
        conv = self.patch_embedding
        if pixel_values.ndim != 4 or pixel_values.shape[1] != conv.in_channels:
            raise ValueError(
                f"pixel_values is {list(pixel_values.shape)}: it must be [batch, {conv.in_channels}, height, width]"
            )
        size = tuple(pixel_values.shape[-2:])
        if size != self.image_size and not interpolate_pos_encoding:
            raise ValueError(
                f"the picture is {size[0]}x{size[1]}, the model was made for {self.image_size[0]}x{self.image_size[1]}: "
                "resize it, or pass interpolate_pos_encoding=True"
            )
        positions = resize_positions(self.position_embedding.weight, self.grid, whole_patches(size, self.patch_size))
        return conv(pixel_values.to(conv.weight.dtype)).flatten(2).transpose(1, 2) + positions


class SiglipTextEmbeddings(nn.Module):
    def __init__(self, config: SiglipTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, T, D]. Raises ValueError for more tokens than there are positions."""
        T, limit = input_ids.shape[-1], self.position_embedding.num_embeddings
        if T > limit:
            raise ValueError(f"a text of {T} tokens is longer than the {limit} this model reads: cut it off there")
        return self.token_embedding(input_ids) + self.position_embedding.weight[:T]


def attend(q, k, v, config, mask=None, dropout_p=0.0, trace=None, name="") -> torch.Tensor:
    """q [B, T, D] looks at k, v [B, S, D] with all heads: [B, T, D]. mask: bool [B, 1, 1, S], False where not to look."""
    q, k, v = (x.unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2) for x in (q, k, v))
    if config.attention == "explicit" or trace is not None or products_win(q, k):
        y, weights = explicit_attention(q, k, v, mask, dropout_p)
        note(trace, name, weights)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
    return y.transpose(1, 2).flatten(2)


class SiglipAttention(nn.Module):
    """Everybody looks at everybody: there is no causal mask, over words no more than over patches."""

    def __init__(self, config: SiglipTowerConfig):
        super().__init__()
        D = config.hidden_size
        self.config = config
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x, mask=None, layer=0, trace=None):
        dropout_p = self.config.attention_dropout if self.training else 0.0
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attend(q, k, v, self.config, mask, dropout_p, trace, f"encoder.layers.{layer}.attention"))


class SiglipMLP(nn.Module):
    def __init__(self, config: SiglipTowerConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.approximate = "tanh" if config.hidden_act == "gelu_tanh" else "none"

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class SiglipEncoderLayer(nn.Module):
    """The pre-norm residual block of gpt.py under its published names."""

    def __init__(self, config: SiglipTowerConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SiglipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(self, x, mask=None, layer=0, trace=None):
        x = x + self.self_attn(self.layer_norm1(x), mask, layer, trace)
        return note(trace, f"encoder.layers.{layer}", x + self.mlp(self.layer_norm2(x)))


class SiglipEncoder(nn.Module):
    def __init__(self, config: SiglipTowerConfig):
        super().__init__()
        self.grad_checkpoint = False  # recompute activations in the backward pass instead of keeping them
        self.layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x, mask=None, num_layers=None, trace=None):
        """x [B, T, D] through the first num_layers layers; all unless given."""
        for i, layer in enumerate(list(self.layers)[:num_layers]):
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(layer, x, mask, i, trace, use_reentrant=False)
            else:
                x = layer(x, mask, i, trace)
        return x


class SiglipPoolingAttention(nn.Module):
    """One question to all patches. q, k and v share a matrix here, as nn.MultiheadAttention keeps them in its files."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        D = config.hidden_size
        self.config = config
        self.in_proj_weight = nn.Parameter(torch.empty(3 * D, D))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * D))
        self.out_proj = nn.Linear(D, D)

    def forward(self, probe, x, trace=None):
        D = x.shape[-1]
        q = F.linear(probe, self.in_proj_weight[:D], self.in_proj_bias[:D]).expand(len(x), -1, -1)
        k, v = F.linear(x, self.in_proj_weight[D:], self.in_proj_bias[D:]).chunk(2, dim=-1)
        return self.out_proj(attend(q, k, v, self.config, trace=trace, name="head.attention"))


class SiglipMultiheadAttentionPoolingHead(nn.Module):
    """From all patches to one vector: the probe is a learned question, the same for every picture."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.attention = SiglipPoolingAttention(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(self, x, trace=None):
        """[B, N, D] -> [B, D]."""
        x = self.attention(self.probe, x, trace)
        return note(trace, "head", (x + self.mlp(self.layernorm(x)))[:, 0])


def init_weights(tower: nn.Module) -> None:
    """The initialisation of the original code (big_vision, models/vit.py and text_transformer.py): Xavier for what is
    inside blocks and head, embeddings N(0, 1 / D), LeCun for the patches and for the linear layer that ends the text tower."""
    for name, weight in tower.named_parameters():
        if "norm" in name:
            continue  # ones and zeros already
        elif name.endswith("bias"):
            nn.init.normal_(weight, std=1e-6 if "mlp" in name else 0.0)
        elif name.endswith(("position_embedding.weight", "token_embedding.weight")):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        elif name in ("embeddings.patch_embedding.weight", "head.weight"):
            std = weight[0].numel() ** -0.5 / 0.87962566103423978  # gives back what the cut at two sigmas takes away
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        else:
            for matrix in weight.chunk(3) if "in_proj" in name else [weight]:  # q, k and v are three layers in truth
                nn.init.xavier_uniform_(matrix)


class Checkpointing(nn.Module):
    """A model with `grad_checkpoint` as in gpt.py; here it is that of all the encoders inside."""

    @property
    def grad_checkpoint(self) -> bool:
        return all(module.grad_checkpoint for module in self.modules() if isinstance(module, SiglipEncoder))

    @grad_checkpoint.setter
    def grad_checkpoint(self, on: bool):
        for module in self.modules():
            if isinstance(module, SiglipEncoder):
                module.grad_checkpoint = on


class SiglipVisionTransformer(Checkpointing):
    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = SiglipVisionEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = SiglipMultiheadAttentionPoolingHead(config) if config.vision_use_head else None
        init_weights(self)

    def forward(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | None = None,
        interpolate_pos_encoding: bool = False,
        trace: dict | None = None,
    ) -> torch.Tensor:
        """pixel_values [B, C, height, width] -> [B, N, D], after the final norm.

        vision_feature_layer: what enters that norm or an earlier state instead, counted like transformers' hidden_states:
        0 the embeddings, 1 the first layer's output, -1 the last one's. Layers beyond it are not computed.
        trace: a dict to be filled with every named intermediate: "embeddings", "encoder.layers.0",
        "encoder.layers.0.attention" [B, heads, N, N], ..., "post_layernorm"; by `pooled` also "head.attention" and "head".
        Raises ValueError for a picture of another size (see SiglipVisionEmbeddings) and for a layer that is not there.
        """
        depth = len(self.encoder.layers)
        if vision_feature_layer is not None and not -depth - 1 <= vision_feature_layer <= depth:
            raise ValueError(f"vision_feature_layer is {vision_feature_layer}: it must be from {-depth - 1} to {depth}")
        x = note(trace, "embeddings", self.embeddings(pixel_values, interpolate_pos_encoding))
        if vision_feature_layer is not None:
            return self.encoder(x, num_layers=vision_feature_layer % (depth + 1), trace=trace)
        return note(trace, "post_layernorm", self.post_layernorm(self.encoder(x, trace=trace)))

    def pooled(self, pixel_values, interpolate_pos_encoding: bool = False, trace: dict | None = None) -> torch.Tensor:
        """One vector per picture, [B, D]. Raises ValueError where the tower has no head."""
        if self.head is None:
            raise ValueError("this vision tower has no pooling head: make or load one with vision_use_head=True")
        return self.head(self(pixel_values, None, interpolate_pos_encoding, trace), trace)


class SiglipModel(Checkpointing):
    """The vision tower on its own, its parameters under "vision_model." as in the published files."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.vision_model = SiglipVisionTransformer(config)

    def forward(self, pixel_values, vision_feature_layer=None, interpolate_pos_encoding=False, trace=None) -> torch.Tensor:
        """[B, C, height, width] -> [B, N, D]; see SiglipVisionTransformer."""
        return self.vision_model(pixel_values, vision_feature_layer, interpolate_pos_encoding, trace)

    def pooled(self, pixel_values, interpolate_pos_encoding=False, trace=None) -> torch.Tensor:
        """[B, C, height, width] -> [B, D]."""
        return self.vision_model.pooled(pixel_values, interpolate_pos_encoding, trace)


class SiglipTextTransformer(Checkpointing):
    def __init__(self, config: SiglipTextConfig):
        super().__init__()
        self.config = config
        self.embeddings = SiglipTextEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.projection_size)
        init_weights(self)

    def forward(self, input_ids, attention_mask=None, trace: dict | None = None) -> torch.Tensor:
        """input_ids [B, T] -> [B, T, D], after the final norm.

        attention_mask [B, T], 0 for tokens that nobody shall look at. The published models want none: they were trained on
        texts padded to max_position_embeddings, and look at the padding too. trace: as in SiglipVisionTransformer.
        Raises ValueError for a text that is too long, a mask of another shape and a row without a real token.
        """
        x, mask = note(trace, "embeddings", self.embeddings(input_ids)), None
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask is {list(attention_mask.shape)}, the input is {list(input_ids.shape)}: they must agree"
                )
            mask = attention_mask.bool()[:, None, None]
            if not mask.any(dim=-1).all():  # a softmax over nothing is NaN
                raise ValueError("attention_mask has a row of nothing but padding: leave that text out")
        return note(trace, "final_layer_norm", self.final_layer_norm(self.encoder(x, mask, trace=trace)))

    def pooled(self, input_ids, attention_mask=None, trace: dict | None = None) -> torch.Tensor:
        """One vector per text, [B, P]: what stands at the last position, be it padding, as in the published models."""
        return note(trace, "head", self.head(self(input_ids, attention_mask, trace)[:, -1]))


def pair_losses(images: torch.Tensor, texts: torch.Tensor, scale, bias, first: int = 0) -> torch.Tensor:
    """Sum of -log sigmoid(label x logit) over all pairs of images [b, P], numbers `first` and up of the batch, with all
    texts [B, P]; the label is 1 where both have the same number and -1 elsewhere."""
    with torch.autocast(images.device.type, enabled=False):  # half precision has steps of 0.06 at a logit of 100
        logits = images.float() @ texts.float().T * scale + bias
    labels = torch.full_like(logits, -1.0)
    labels.diagonal(first).fill_(1.0)
    return -F.logsigmoid(labels * logits).sum()


def sigmoid_loss(image_emb: torch.Tensor, text_emb: torch.Tensor, scale, bias, chunk_size: int | None = None) -> torch.Tensor:
    """Algorithm 1 of Zhai et al. 2023: each of the B x B pairs is a yes-or-no question of its own; their sum, over B.

    image_emb, text_emb [B, P] of length 1, row i of one belonging to row i of the other; scale multiplies their products
    (exp of the learned logit_scale), bias is added. chunk_size: take that many images at a time and recompute them in the
    backward pass: memory grows with chunk_size x B instead of B x B, loss and gradients are the same.
    Raises ValueError where the two do not pair up and for a chunk_size below 1.
    """
    if image_emb.shape != text_emb.shape:
        raise ValueError(f"images {list(image_emb.shape)} and texts {list(text_emb.shape)} do not pair up one to one")
    if chunk_size is None:
        return pair_losses(image_emb, text_emb, scale, bias) / len(image_emb)
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: it must be at least 1")
    total = 0.0
    for first in range(0, len(image_emb), chunk_size):
        images = image_emb[first : first + chunk_size]
        total = total + checkpoint(
            pair_losses, images, text_emb, scale, bias, first, use_reentrant=False, preserve_rng_state=False
        )
    return total / len(image_emb)


class SiglipTwoTower(Checkpointing):
    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.config = config
        self.vision_model = SiglipVisionTransformer(config.vision_config)
        self.text_model = SiglipTextTransformer(config.text_config)
        # Nearly all pairs are wrong ones: a bias that says so from the start (Zhai et al. 2023, section 3.2).
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.full((1,), -10.0))

    def image_embeddings(self, pixel_values, interpolate_pos_encoding=False, trace=None) -> torch.Tensor:
        """[B, C, height, width] -> [B, P] of length 1."""
        return self._embed("vision_model", trace, pixel_values, interpolate_pos_encoding)

    def text_embeddings(self, input_ids, attention_mask=None, trace=None) -> torch.Tensor:
        """[B, T] -> [B, P] of length 1."""
        return self._embed("text_model", trace, input_ids, attention_mask)

    def _embed(self, tower: str, trace: dict | None, *inputs) -> torch.Tensor:
        inner = None if trace is None else {}
        pooled = getattr(self, tower).pooled(*inputs, trace=inner)
        if trace is not None:
            trace.update({f"{tower}.{name}": value for name, value in inner.items()})
        return F.normalize(pooled, dim=-1)

    def logits(self, pixel_values, input_ids, attention_mask=None, interpolate_pos_encoding=False) -> torch.Tensor:
        """How well every picture fits every text, [images, texts]; a sigmoid makes each a probability of its own."""
        return self(pixel_values, input_ids, attention_mask, interpolate_pos_encoding)["logits_per_image"]

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        return_loss: bool = False,
        chunk_size: int | None = None,
        trace: dict | None = None,
    ) -> dict[str, torch.Tensor]:
        """pixel_values [B, C, height, width], input_ids [B', T] -> {"image_embeddings" [B, P], "text_embeddings" [B', P],
        "logits_per_image" [B, B']}, with "loss" when asked for (picture i belongs to text i, B = B'). With a chunk_size
        there are no logits, for they are what it avoids (see sigmoid_loss). trace: the intermediates of both towers, their
        names after "vision_model." and "text_model.". Raises ValueError as the towers and the loss do.
        """
        images = self.image_embeddings(pixel_values, interpolate_pos_encoding, trace)
        texts = self.text_embeddings(input_ids, attention_mask, trace)
        out = {"image_embeddings": images, "text_embeddings": texts}
        scale, bias = self.logit_scale.exp(), self.logit_bias
        if chunk_size is None:
            out["logits_per_image"] = images @ texts.T * scale + bias
        if return_loss:
            out["loss"] = sigmoid_loss(images, texts, scale, bias, chunk_size)
        return out
