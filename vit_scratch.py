"""A Vision Transformer: the block of gpt.py without its causal mask, over patches of an image instead of words.

Mirrors: "An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021) and Google's published ViT checkpoints, whose logits
it reproduces (tests/test_checkpoint.py). Read gpt.py first. Three things change from there to here: patches take the place
of words (PatchEmbedding), the mask goes (ViTMultiHeadAttention), a CLS token is read at the end.

    model = ViTModel(ViTConfig.preset("vit-s16", num_labels=10))
    model(pixel_values)                                  # [B, num_labels]; the same as model(pixel_values).logits
    out = model(pixel_values, output_hidden_states=True) # [B, N+1, D]: CLS first, then the patches row by row
    out.hidden_states[layer]                             # the same before the final norm, after so many blocks: 0, 1, ...
    model.features(pixel_values, layer=-2)               # [B, N, D]: patches alone, as a language model gets them
    python train_vit.py                                  # train one on handwritten digits in two minutes

Axes: B batch, C channels, N patches, D width, H and W pixels.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt import Block, MultiHeadAttention

# ---- configuration ---------------------------------------------------------------------------------------------------


@dataclass
class ViTConfig:
    image_size: int | tuple[int, int] = 224  # pixels: one number for a square, or (height, width)
    patch_size: int | tuple[int, int] = 16
    num_channels: int = 3
    num_labels: int = 1000  # 0: no classifier
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None  # 4 x hidden_size unless given
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    dropout: float = 0.0
    drop_path: float = 0.0  # chance to skip a branch of the last block; earlier blocks proportionally less
    qkv_bias: bool = True
    patch_bias: bool = True  # CLIP's patches have none
    pre_norm: bool = False  # CLIP: a norm before the blocks
    num_registers: int = 0  # DINOv2: learned tokens between CLS and the patches that no one reads (Darcet et al. 2024)
    attention: str = "sdpa"
    pooling: str = "cls"  # what the classifier reads: the CLS token, or the "mean" of the patches
    position_init: str = "normal"  # "sincos": learned as well, but starting from 2-D sines and cosines
    id2label: dict | None = None  # {number: name} of what the classifier tells apart

    # What differs from the defaults above (which are ViT-B/16), per size. Tiny sizes learn from little data.
    PRESETS = {
        "tiny-digits": {
            **{"image_size": 16, "patch_size": 4, "num_channels": 1, "num_labels": 10, "pooling": "mean"},
            **{"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "position_init": "sincos"},
        },
        "tiny": {
            **{"image_size": 32, "patch_size": 4, "num_labels": 10, "pooling": "mean", "position_init": "sincos"},
            **{"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6},
        },
        "vit-s16": {"hidden_size": 384, "num_attention_heads": 6},
        "vit-b16": {},
    }

    def __post_init__(self):
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        D, H = self.hidden_size, self.num_attention_heads
        assert D % H == 0, f"hidden_size {D} cannot be split over {H} attention heads: choose a multiple"
        assert self.position_init != "sincos" or D % 4 == 0, f"sincos positions need a hidden_size divisible by 4, not {D}"

    @classmethod
    def preset(cls, name: str, **changes) -> "ViTConfig":
        return cls(**{**cls.PRESETS[name], **changes})

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return count_patches(pair(self.image_size), pair(self.patch_size))


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def count_patches(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """How many patches fit down and across."""
    (H, W), (h, w) = image_size, patch_size
    assert H % h == 0 and W % w == 0, f"a {H}x{W} image cannot be cut into {h}x{w} patches: choose sizes that divide"
    return H // h, W // w


# ---- patches ---------------------------------------------------------------------------------------------------------


def sincos_positions(grid: tuple[int, int], width: int) -> torch.Tensor:
    """[N, D]: half of the width says the row, half the column, in sines and cosines of falling frequency, the 2-D form of
    Vaswani et al. 2017, section 3.5. A ViT on 1,400 digits gains two points from starting here."""
    assert width % 4 == 0, f"sincos positions need a hidden_size divisible by 4, not {width}"
    frequency = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n).float() for n in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (rows, columns)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)


class PatchEmbedding(nn.Module):
    """Cut the image into patches, map each to a vector, put a CLS token before them and add a position to each."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.image_size, self.patch_size, self.grid = pair(config.image_size), pair(config.patch_size), config.grid
        D, N = config.hidden_size, math.prod(config.grid)
        # A convolution whose stride is its kernel: one and the same linear layer for every patch.
        cut = {"kernel_size": self.patch_size, "stride": self.patch_size}
        self.projection = nn.Conv2d(config.num_channels, D, **cut, bias=config.patch_bias)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.position_embedding = nn.Parameter(torch.zeros(1, N + 1, D))
        if config.num_registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_registers, D))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, 1+R+N, D]: CLS, any registers, patches. Raises ValueError for images of another size."""
        if (expected := (self.projection.in_channels, *self.image_size)) != tuple(pixel_values.shape[1:]):
            raise ValueError(f"pixel_values is {list(pixel_values.shape)}, the model reads {['B', *expected]}: resize them")
        patches = self.projection(pixel_values).flatten(2).transpose(1, 2)  # [B, N, D]
        cls = self.cls_token.expand(len(patches), -1, -1)
        x = torch.cat([cls, patches], dim=1) + self.position_embedding
        if not hasattr(self, "register_tokens"):
            return x
        return torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)


# ---- block -----------------------------------------------------------------------------------------------------------


class ViTMultiHeadAttention(MultiHeadAttention):
    """GPT-2's attention without its causal mask: every patch attends to every other, since an image has no "later"."""

    causal = False


class DropPath(nn.Module):
    """Leave a branch out for a random part of the batch (Huang et al. 2016, "Deep Networks with Stochastic Depth")."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.p
        return x * keep.to(x.dtype) / (1 - self.p)


class ViTBlock(Block):
    attention_class = ViTMultiHeadAttention

    def __init__(self, config: ViTConfig, drop_path: float = 0.0):
        super().__init__(config)
        self.drop_path = DropPath(drop_path)


# ---- model -----------------------------------------------------------------------------------------------------------


def with_names(x: torch.Tensor, **names) -> torch.Tensor:
    """x with these attributes, for readers who know transformers' outputs: out.logits."""
    out = x.view_as(x)  # the same numbers: a tensor with itself as an attribute would stay in memory
    for name, value in names.items():
        setattr(out, name, value)
    return out


class ViTModel(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        depth = config.num_hidden_layers
        self.embeddings = PatchEmbedding(config)
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(ViTBlock(config, config.drop_path * i / max(1, depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self):
        """As in the paper's own code: matrices by fan-in and fan-out (Xavier), so that activations are as large in a narrow
        model as in a wide one; with GPT-2's fixed 0.02 patches would be far smaller than the positions added to them."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                parts = 3 if module.weight.shape[0] == 3 * module.weight.shape[1] else 1  # q, k, v are three matrices
                for weight in module.weight.chunk(parts):
                    nn.init.xavier_uniform_(weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        projection = self.embeddings.projection
        nn.init.normal_(projection.weight, std=projection.weight[0].numel() ** -0.5)
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
        nn.init.normal_(self.embeddings.cls_token, std=0.02)
        nn.init.normal_(self.embeddings.position_embedding, std=0.02)
        if self.config.position_init == "sincos":
            self.embeddings.position_embedding[0, 1:] = sincos_positions(self.config.grid, self.config.hidden_size)

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False) -> torch.Tensor:
        """pixel_values [B, C, H, W] -> logits [B, num_labels], also as `.logits`; with output_hidden_states, the last normed
        [B, 1+R+N, D], also as `.last_hidden_state`. Its `.hidden_states`: what enters the first block, what each returns."""
        states = [] if output_hidden_states else None
        last = self.run_blocks(pixel_values, states=states)
        x = self.norm(last)
        if output_hidden_states:
            return with_names(x, last_hidden_state=x, hidden_states=(*states, last))
        logits = self.classifier(x[:, 0] if self.config.pooling == "cls" else x[:, 1 + self.config.num_registers :].mean(dim=1))
        return with_names(logits, logits=logits)

    def run_blocks(self, pixel_values: torch.Tensor, count: int | None = None, states: list | None = None) -> torch.Tensor:
        """[B, C, H, W] -> [B, 1+R+N, D], after the first `count` blocks; all unless given. states: a list for their inputs."""
        x = self.pre_norm(self.embeddings(pixel_values))
        for block in self.blocks[:count]:
            if states is not None:
                states.append(x)
            x = block(x)
        return x

    # What a vision-language model asks of a tower (model.py): config.hidden_size, grid, image_size, features.

    @property
    def grid(self) -> tuple[int, int]:
        return self.config.grid

    @property
    def image_size(self) -> tuple[int, int]:
        return pair(self.config.image_size)

    def features(self, pixel_values: torch.Tensor, layer: int | None = None) -> torch.Tensor:
        """[B, C, H, W] -> [B, N, D]: the patches row by row, without CLS and registers, after the final norm. layer: a hidden
        state before that norm instead, counted as in transformers: 0 the embeddings, 1 the first block's output, ..."""
        if layer is None:
            x = self.norm(self.run_blocks(pixel_values))
        else:  # later blocks are not computed
            x = self.run_blocks(pixel_values, range(len(self.blocks) + 1)[layer])
        return x[:, 1 + self.config.num_registers :]


# ---- into a language model -------------------------------------------------------------------------------------------


class ViTAdapter(nn.Module):
    """From the width of a vision model to the width of a language model: [B, N, vit_d_out] -> [B, N, llm_d_in].

    adapter_type: "linear", or "ffn" (two layers with a GELU between, as in LLaVA-1.5, Liu et al. 2023). The same join as
    model.py's MultiModalProjector without pixel shuffle, under the same names: either may stand in the other's place.
    """

    def __init__(self, vit_d_out: int, llm_d_in: int, adapter_type: str = "ffn"):
        super().__init__()
        assert adapter_type in ("linear", "ffn"), f"adapter_type is {adapter_type!r}: it must be linear or ffn"
        if adapter_type == "linear":
            self.linear = nn.Linear(vit_d_out, llm_d_in)
        else:
            self.linear_1, self.linear_2 = nn.Linear(vit_d_out, llm_d_in), nn.Linear(llm_d_in, llm_d_in)
        self.adapter_type = adapter_type

    def forward(self, vit_hidden_states: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """grid: where the patches are, which a projector that joins neighbours would ask."""
        if self.adapter_type == "linear":
            return self.linear(vit_hidden_states)
        return self.linear_2(F.gelu(self.linear_1(vit_hidden_states)))
