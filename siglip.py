"""SigLIP: one tower encodes images, the other captions, and both learn which belong together. Our VLM sees with the first.

Mirrors: "Sigmoid Loss for Language Image Pre-Training" (Zhai et al., 2023) and Google's published SigLIP checkpoints (the
fixed-size SigLIP 2 ones as well), whose outputs it reproduces (tests/core/test_siglip.py). Read vit_scratch.py first. What
changes from there to here: no CLS token, but a learned query that attends to all patches (the pooling head); a text tower of
the same blocks; and a loss that judges every pair of image and caption on its own. Parameters carry the published names.

    vision = SiglipModel(SiglipVisionConfig.preset("base-p16-224"))
    vision(pixel_values)                                 # [B, N, D], what a language model gets
    vision.features(pixel_values, layer=-2)              # the same one layer earlier, before the final norm, as for LLaVA
    towers = SiglipTwoTower(SiglipConfig.preset("tiny"))
    towers.logits(pixel_values, input_ids)               # [B images, B captions]

Axes: B batch, C channels, N patches, T text tokens, H heads, D width, P width of the shared space, V vocabulary.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt import ACTIVATIONS, Output, attention
from vit_scratch import pair

# ---- configuration ---------------------------------------------------------------------------------------------------

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
        D, H = self.hidden_size, self.num_attention_heads
        assert D % H == 0, f"hidden_size {D} cannot be split over {H} attention heads: choose a multiple"

    @classmethod
    def preset(cls, name: str, **changes):
        return cls(**{**cls.PRESETS[name], **changes})


@dataclass
class SiglipVisionConfig(SiglipTowerConfig):
    image_size: int | tuple[int, int] = 224  # pixels: one number for a square, or (height, width)
    patch_size: int | tuple[int, int] = 16
    num_channels: int = 3
    vision_use_head: bool = True  # the pooling head; a VLM has no use for it

    PRESETS = {name: vision for name, (vision, _) in PRESETS.items()}

    def __post_init__(self):
        super().__post_init__()
        (H, W), (h, w) = pair(self.image_size), pair(self.patch_size)
        assert H >= h and W >= w, f"a {H}x{W} image holds no {h}x{w} patch: choose larger images or smaller patches"

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across. Unlike in vit_scratch.py a remainder is cut off, because so400m-p14-384 was trained that
        way: of 384 pixels it sees 27 x 14 = 378."""
        (H, W), (h, w) = pair(self.image_size), pair(self.patch_size)
        return H // h, W // w


@dataclass
class SiglipTextConfig(SiglipTowerConfig):
    vocab_size: int = 32000
    max_position_embeddings: int = 64
    projection_size: int | None = None  # P; hidden_size unless given

    PRESETS = {name: text for name, (_, text) in PRESETS.items()}

    def __post_init__(self):
        super().__post_init__()
        self.projection_size = self.projection_size or self.hidden_size


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
        assert self.vision_config.vision_use_head, "vision_use_head is False: without the head there is no image embedding"
        widths = self.vision_config.hidden_size, self.text_config.projection_size
        assert widths[0] == widths[1], f"images come out {widths[0]} wide and texts {widths[1]}: they must be equal"

    @classmethod
    def preset(cls, name: str, vision: dict | None = None, text: dict | None = None) -> "SiglipConfig":
        """A published size, with changes to its vision and text settings."""
        return cls(SiglipVisionConfig.preset(name, **(vision or {})), SiglipTextConfig.preset(name, **(text or {})))


# ---- embeddings ------------------------------------------------------------------------------------------------------


class SiglipVisionEmbeddings(nn.Module):
    """Cut the image into patches, map each to a vector and add a position to each."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.image_size, self.patch_size, self.grid = pair(config.image_size), pair(config.patch_size), config.grid
        D = config.hidden_size
        self.patch_embedding = nn.Conv2d(config.num_channels, D, kernel_size=self.patch_size, stride=self.patch_size)
        self.position_embedding = nn.Embedding(math.prod(self.grid), D)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, C, height, width] -> [B, N, D]. Raises ValueError for images of another size than the model's."""
        conv = self.patch_embedding
        if (expected := (conv.in_channels, *self.image_size)) != tuple(pixel_values.shape[1:]):
            raise ValueError(f"pixel_values is {list(pixel_values.shape)}, the model reads {['B', *expected]}: resize them")
        return conv(pixel_values.to(conv.weight.dtype)).flatten(2).transpose(1, 2) + self.position_embedding.weight


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


# ---- block -----------------------------------------------------------------------------------------------------------


def attend(q, k, v, config, mask=None, dropout=0.0) -> torch.Tensor:
    """q [B, T, D] attends to k, v [B, S, D] with all heads: [B, T, D]. mask: bool [B, 1, 1, S], False for padding."""
    q, k, v = (x.unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2) for x in (q, k, v))
    return attention(q, k, v, mask, dropout=dropout, explicit=config.attention == "explicit").transpose(1, 2).flatten(2)


class SiglipAttention(nn.Module):
    """Bidirectional attention in both towers: no causal mask, over words no more than over patches."""

    def __init__(self, config: SiglipTowerConfig):
        super().__init__()
        D = config.hidden_size
        self.config = config
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x, mask=None):
        dropout = self.config.attention_dropout if self.training else 0.0
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.config, mask, dropout))


class SiglipMLP(nn.Module):
    def __init__(self, config: SiglipTowerConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class SiglipEncoderLayer(nn.Module):
    """The pre-norm residual block of gpt.py under its published names."""

    def __init__(self, config: SiglipTowerConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SiglipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(self, x, mask=None):
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class SiglipEncoder(nn.Module):
    def __init__(self, config: SiglipTowerConfig):
        super().__init__()
        self.layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x, mask=None, num_layers=None):
        """x [B, T, D] through the first num_layers layers; all unless given."""
        for layer in self.layers[:num_layers]:
            x = layer(x, mask)
        return x


# ---- one vector for an image -----------------------------------------------------------------------------------------


class SiglipPoolingAttention(nn.Module):
    """One query over all patches. q, k and v share a matrix here, as in the files of nn.MultiheadAttention."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        D = config.hidden_size
        self.config = config
        self.in_proj_weight = nn.Parameter(torch.empty(3 * D, D))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * D))
        self.out_proj = nn.Linear(D, D)

    def forward(self, probe, x):
        D = x.shape[-1]
        q = F.linear(probe, self.in_proj_weight[:D], self.in_proj_bias[:D]).expand(len(x), -1, -1)
        k, v = F.linear(x, self.in_proj_weight[D:], self.in_proj_bias[D:]).chunk(2, dim=-1)
        return self.out_proj(attend(q, k, v, self.config))


class SiglipMultiheadAttentionPoolingHead(nn.Module):
    """From all patches to one vector: the probe is a learned query, the same for every image."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.attention = SiglipPoolingAttention(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(self, x):
        """[B, N, D] -> [B, D]."""
        x = self.attention(self.probe, x)
        return (x + self.mlp(self.layernorm(x)))[:, 0]


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


# ---- towers ----------------------------------------------------------------------------------------------------------


class SiglipVisionTransformer(nn.Module):
    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = SiglipVisionEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = SiglipMultiheadAttentionPoolingHead(config) if config.vision_use_head else None
        init_weights(self)

    def forward(self, pixel_values: torch.Tensor, layer: int | None = None) -> torch.Tensor:
        """pixel_values [B, C, height, width] -> [B, N, D], after the final norm. layer: a hidden state before that norm
        instead, counted as in transformers: 0 the embeddings, 1 the first layer's output, -1 the last one's."""
        x = self.embeddings(pixel_values)
        if layer is not None:  # later layers are not computed
            return self.encoder(x, num_layers=range(len(self.encoder.layers) + 1)[layer])
        return self.post_layernorm(self.encoder(x))

    def pooled(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """One vector per image, [B, D]."""
        assert self.head is not None, "this vision tower has no pooling head: make or load one with vision_use_head=True"
        return self.head(self(pixel_values))


class SiglipModel(nn.Module):
    """The vision tower on its own, its parameters under "vision_model." as in the published files."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.vision_model = SiglipVisionTransformer(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, C, height, width] -> [B, N, D]."""
        return self.vision_model(pixel_values)

    def pooled(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, C, height, width] -> [B, D]."""
        return self.vision_model.pooled(pixel_values)

    # What a vision-language model asks of a tower (model.py): config.hidden_size, grid, image_size, features.

    @property
    def grid(self) -> tuple[int, int]:
        return self.config.grid

    @property
    def image_size(self) -> tuple[int, int]:
        return pair(self.config.image_size)

    def features(self, pixel_values: torch.Tensor, layer: int | None = None) -> torch.Tensor:
        """[B, C, height, width] -> [B, N, D]; see SiglipVisionTransformer."""
        return self.vision_model(pixel_values, layer)


class SiglipTextTransformer(nn.Module):
    def __init__(self, config: SiglipTextConfig):
        super().__init__()
        self.config = config
        self.embeddings = SiglipTextEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.projection_size)
        init_weights(self)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """input_ids [B, T] -> [B, T, D], after the final norm. attention_mask [B, T], 0 for padding. The published models want
        none: they were trained on texts padded to max_position_embeddings, and attend to the padding too."""
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None]
        assert mask is None or mask.any(dim=-1).all(), "attention_mask has a row of nothing but padding: leave that text out"
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids), mask))

    def pooled(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """One vector per text, [B, P]: that of the last position, be it padding, as in the published models."""
        return self.head(self(input_ids, attention_mask)[:, -1])


# ---- which belong together -------------------------------------------------------------------------------------------


def sigmoid_loss(image_emb: torch.Tensor, text_emb: torch.Tensor, scale, bias) -> torch.Tensor:
    """Algorithm 1 of Zhai et al. 2023: each of the B x B pairs is a yes-or-no question of its own; their sum, over B.

    image_emb, text_emb [B, P] of length 1, row i of one belonging to row i of the other; scale multiplies their products
    (exp of the learned logit_scale), bias is added. extras/train_siglip.py has the same in chunks, for large batches.
    """
    assert image_emb.shape == text_emb.shape, "images and texts do not pair up one to one"
    with torch.autocast(image_emb.device.type, enabled=False):  # half precision has steps of 0.06 at a logit of 100
        logits = image_emb.float() @ text_emb.float().T * scale + bias
    labels = 2 * torch.eye(len(logits), device=logits.device) - 1  # 1 for the true pairs, -1 for all others
    return -F.logsigmoid(labels * logits).sum() / len(logits)


class SiglipTwoTower(nn.Module):
    vision_class = SiglipVisionTransformer

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.config = config
        self.vision_model = self.vision_class(config.vision_config)
        self.text_model = SiglipTextTransformer(config.text_config)
        # Nearly all pairs are wrong ones: a bias that says so from the start (Zhai et al. 2023, section 3.2).
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.full((1,), -10.0))

    def image_embeddings(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, C, height, width] -> [B, P] of length 1."""
        return F.normalize(self.vision_model.pooled(pixel_values), dim=-1)

    def text_embeddings(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[B, T] -> [B, P] of length 1."""
        return F.normalize(self.text_model.pooled(input_ids, attention_mask), dim=-1)

    def logits(self, pixel_values, input_ids, attention_mask=None) -> torch.Tensor:
        """How well every image fits every text, [images, texts]; a sigmoid makes each a probability of its own."""
        return self(pixel_values, input_ids, attention_mask)["logits_per_image"]

    def forward(self, pixel_values, input_ids, attention_mask=None, return_loss: bool = False) -> Output:
        """pixel_values [B, C, height, width], input_ids [B', T] -> {"image_embeddings" [B, P], "text_embeddings" [B', P],
        "logits_per_image" [B, B']}, with "loss" when asked for (image i belongs to text i, B = B')."""
        images, texts = self.image_embeddings(pixel_values), self.text_embeddings(input_ids, attention_mask)
        scale, bias = self.logit_scale.exp(), self.logit_bias
        out = Output(image_embeddings=images, text_embeddings=texts)
        out["logits_per_image"] = lambda: images @ texts.T * scale + bias
        if return_loss:
            out["loss"] = sigmoid_loss(images, texts, scale, bias)
        return out
