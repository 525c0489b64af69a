"""Linear layers whose frozen weights take four bits each: what QLoRA puts under its low-rank corrections.

Mirrors NF4 with double quantisation (Dettmers et al. 2023, "QLoRA", sections 2 and 3, appendix E), number for number as
bitsandbytes stores it; tests/test_quant.py compares the two, quant_files.py has the files. Weights fall into blocks of 64,
each divided by its largest absolute value (absmax). What is left lies in [-1, 1] and becomes the nearest of 16 values that
are equally likely under a normal distribution. The absmax themselves, less their mean, become 8 bits each, in blocks of 256
with one fp32 absmax. So a weight costs 4 + 8 / 64 + 32 / (64 x 256) = 4.127 bits. Expect a price: SmolLM2-135M, read from a
Q4_1 file, is left with 0.516 bytes a weight in its linear layers and about a fifth more perplexity; in models of billions the
loss is small.

    quantize_(model, targets=["q_proj", "v_proj"])                    # in place; None: all linear layers but lm_head
    model.requires_grad_(False)
    convert_linears_to_lora(model, 8, 16, target_module_classes=(Linear4bit,), targets=["q_proj", "v_proj"])        # QLoRA
    lib.lora.merge_lora(model)                                               # plain linear layers again, LoRA added
    quantised_memory(model)["bytes_per_weight"]
    python -m bench.peers quant --source model.gguf                   # time, memory and perplexity against floats

The weights are never trained: a layer's backward gives the gradient of its input and keeps nothing but the packed weights.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lib.lora import find_linears
from lib.memory import bytes_of

BLOCK, NESTED_BLOCK = 64, 256  # weights that share an absmax, absmax that share one
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)  # appendix E

# ---- code books --------------------------------------------------------------------------------------------------------


@cache
def nf4_code(device: torch.device) -> torch.Tensor:
    """fp32 [16], ascending."""
    return torch.tensor(NF4, device=device)


@cache
def nf4_pairs(device: torch.device) -> torch.Tensor:
    """The two fp32 values that each byte stands for, the first in its upper half, as one fp64 [256]: looking up single
    numbers is several times as fast as looking up rows of two."""
    code, byte = nf4_code(device), torch.arange(256, device=device)
    return torch.stack([code[byte // 16], code[byte % 16]], dim=1).view(torch.float64).flatten()


@cache
def dynamic_code(device: torch.device) -> torch.Tensor:
    """fp32 [256], ascending: the 8-bit code of the absmax. +-10^(i - 6) times the middles of 2^i equal parts of [0.1, 1] for i
    in 0 ... 6, and 0 and 1: finer where numbers are large (Dettmers 2015, "8-Bit Approximations for Parallelism")."""
    magnitudes = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, device="cpu")
        magnitudes.append(10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2))
    positive = torch.cat(magnitudes)
    return torch.cat([-positive, torch.tensor([0.0, 1.0], device="cpu"), positive]).sort().values.to(device)


# ---- numbers to codes and back -----------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """n weights as they are kept. Their shape stands elsewhere."""

    codes: torch.Tensor  # uint8 [n / 2, rounded up], the earlier weight in the upper half
    absmax: torch.Tensor  # uint8 [blocks of 64]
    nested_absmax: torch.Tensor  # fp32 [blocks of 256 blocks]
    offset: torch.Tensor  # fp32 [], the mean of the absmax before they became codes


def to_codes(x: torch.Tensor, code: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x fp32 [n] -> uint8 [n], the index of the nearest value of `code` after each block is divided by its absmax; and
    fp32 [blocks], those absmax. The last block may be shorter."""
    blocks = F.pad(x, (0, -len(x) % block)).view(-1, block)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1 / absmax.clamp(min=1e-38))[:, None]).flatten()[: len(x)]
    between = (code[:-1] + code[1:]) / 2
    return torch.bucketize(scaled, between, out_int32=True).to(torch.uint8), absmax


def in_fp32(weight: torch.Tensor) -> torch.Tensor:
    """Raises ValueError where a weight is not finite."""
    weight = weight.detach().float()
    if bad := weight.numel() - int(weight.isfinite().sum()):
        raise ValueError(f"{bad} of {weight.numel()} weights are inf or nan: they have no code")
    return weight


def quantize_nf4(weight: torch.Tensor) -> Packed:
    """Any float tensor, row by row, as NF4. Raises ValueError where a weight is not finite."""
    flat = in_fp32(weight).flatten()
    codes, absmax = to_codes(flat, nf4_code(flat.device), BLOCK)
    codes = F.pad(codes, (0, len(codes) % 2), value=NF4.index(0.0))
    offset = absmax.mean()
    absmax_codes, nested = to_codes(absmax - offset, dynamic_code(flat.device), NESTED_BLOCK)
    return Packed(codes[::2] << 4 | codes[1::2], absmax_codes, nested, offset)


def dequantize_nf4(packed: Packed, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weights [*shape] that the codes stand for, computed in fp32."""
    codes, absmax, nested, offset = packed
    scale = dynamic_code(codes.device).index_select(0, absmax.int())
    scale = scale * nested.repeat_interleave(NESTED_BLOCK)[: len(scale)] + offset
    n = torch.Size(shape).numel()
    flat = nf4_pairs(codes.device).index_select(0, codes.int()).view(torch.float32)[:n]
    whole = n - n % BLOCK
    flat[:whole].view(-1, BLOCK).mul_(scale[: whole // BLOCK, None])
    flat[whole:].mul_(scale[whole // BLOCK :])  # what does not fill a block: all of it has one scale, or there is none
    return flat.view(shape).to(dtype)


# ---- layers ------------------------------------------------------------------------------------------------------------


class QuantisedLinear(nn.Module):
    """nn.Linear with frozen weights in codes. The bias stays a float parameter. dtype: what `weight` gives; like the bias it
    follows .half() and .to(dtype), the codes and their `constants` do not."""

    constants: tuple[str, ...]  # the names of buffers of floats
    bits: str

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, dtype: torch.dtype, **buffers):
        super().__init__()
        self.in_features, self.out_features, self.bias = in_features, out_features, bias
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=buffers["codes"].device), persistent=False)

    def to_linear(self) -> nn.Linear:
        """The same layer with its weights in floats again, frozen: what merge_lora adds the correction to."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.bias = self.bias
        return linear

    def _apply(self, fn, recurse=True):
        """What .to(), .half() and their kind call. The constants go along as integers, which no cast touches."""
        kept = {name: getattr(self, name) for name in self.constants}
        super()._apply(fn, recurse)
        for name, x in kept.items():
            as_integers = torch.int32 if x.element_size() == 4 else torch.int16
            setattr(self, name, fn(x.view(as_integers)).view(x.dtype))
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self.bits}"


class Multiply4bit(torch.autograd.Function):
    """x [..., in] -> x W^T [..., out]. W [out, in] is unpacked in forward and once more in backward, never kept."""

    @staticmethod
    def forward(ctx, x, shape, *packed):
        ctx.shape = shape
        ctx.save_for_backward(*packed)
        return F.linear(x, dequantize_nf4(Packed(*packed), shape, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight = dequantize_nf4(Packed(*ctx.saved_tensors), ctx.shape, grad.dtype)
        return grad @ weight, None, *(None for _ in Packed._fields)


class Linear4bit(QuantisedLinear):
    """Weights in NF4. Computes in the precision of its input, or autocast's."""

    constants, bits = ("nested_absmax", "offset"), "NF4"

    def __init__(
        self, in_features: int, out_features: int, packed: Packed, bias: nn.Parameter | None = None, dtype=torch.float32
    ):
        n = in_features * out_features
        blocks = -(-n // BLOCK)
        sizes = [list(tensor.shape) for tensor in packed]
        if sizes != [[-(-n // 2)], [blocks], [-(-blocks // NESTED_BLOCK)], []]:
            raise ValueError(f"packed weights of sizes {sizes} do not make a matrix [{out_features}, {in_features}]")
        super().__init__(in_features, out_features, bias, dtype, **packed._asdict())

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "Linear4bit":
        """Its bias stays the parameter it is."""
        weight = linear.weight
        return cls(linear.in_features, linear.out_features, quantize_nf4(weight), linear.bias, weight.dtype)

    @property
    def packed(self) -> Packed:
        return Packed(*(getattr(self, name) for name in Packed._fields))

    @property
    def weight(self) -> torch.Tensor:
        """[out, in], unpacked: a new tensor every time, so that writing into it changes nothing."""
        return dequantize_nf4(self.packed, (self.out_features, self.in_features), self.like.dtype)

    def forward(self, x):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = Multiply4bit.apply(x, (self.out_features, self.in_features), *self.packed)
        return y if self.bias is None else y + self.bias.to(y.dtype)


# ---- whole models --------------------------------------------------------------------------------------------------------


def quantize_(module: nn.Module, targets: Sequence[str] | str | None = None) -> list[str]:
    """Put a Linear4bit in the place of every nn.Linear that `targets` names; their names are returned.

    targets: as for convert_linears_to_lora, which comes after this. One layer at a time, so that its floats are free before
    the next. Raises ValueError where nothing fits, for a head that is tied to the embedding and weights that are not finite.
    """
    return replace_linears(module, list(find_linears(module, targets)), Linear4bit)


def replace_linears(module: nn.Module, names: list[str], kind: type[QuantisedLinear]) -> list[str]:
    for name in names:
        parent, _, child = name.rpartition(".")
        try:
            layer = kind.from_linear(module.get_submodule(name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        setattr(module.get_submodule(parent), child, layer)
    return names


# ---- memory ------------------------------------------------------------------------------------------------------------


def quantised_memory(module: nn.Module) -> dict[str, float]:
    """The quantised layers in a module: how many, of how many weights, and the bytes that all they keep takes (codes, all
    constants; not the biases), in total and per weight. The code books, 3.3 kB, are shared by everything and not counted."""
    layers = [m for m in module.modules() if isinstance(m, QuantisedLinear)]
    if not layers:
        raise ValueError(f"this {type(module).__name__} has no 4-bit or 8-bit layer: quantize_ or quantize_8bit_ make them")
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    total = bytes_of(buffer for layer in layers for buffer in layer.buffers())
    return {"layers": len(layers), "weights": weights, "bytes": total, "bytes_per_weight": total / weights}
