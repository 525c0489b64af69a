"""Linear layers whose weights take eight bits, for faster decoding on a CPU.

Whole numbers from -127 to 127 times one scale a row (as in Dettmers et al. 2022, "LLM.int8()", but with the activations in
floats). A new token reads every weight once, so a quarter of fp32's bytes is the gain. Not for files.

    quantize_8bit_(model)                                             # in place: a decoder's matrices, lm_head too
    python generate.py model.gguf "..." --int8
    python -m bench.peers decode --int8 --source model.gguf
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.fast_decode import read_together
from lib.lora import find_linears, merge_lora
from lib.quant import Linear4bit, QuantisedLinear, in_fp32, replace_linears
from model import Llama3ForCausalLM

# ---- numbers to codes and back -----------------------------------------------------------------------------------------


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] -> codes int8 [out, in] and one scale a row, bf16 [out], that maps its largest weight to 127: codes * scales
    is within half a scale of each weight. Raises ValueError where one is not finite."""
    weight = in_fp32(weight)
    scales = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()
    codes = (weight / scales.float()[:, None]).round().clamp(-127, 127)  # the scale's own rounding may give 127.4
    return codes.to(torch.int8, memory_format=torch.contiguous_format), scales


def dequantize_int8(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weights [out, in] that the codes stand for, computed in fp32."""
    return codes.float().mul_(scales.float()[:, None]).to(dtype)


# ---- the layer ----------------------------------------------------------------------------------------------------------


# torch's kernel for bf16 rows times int8 codes; not part of its public interface, so another version may be without it
INT8_PRODUCT = getattr(torch, "_weight_int8pack_mm", None)
# Measured on one core with AVX-512: faster than F.linear in fp32 up to 24 rows, as fast at 32, and there still at least 1.3
# times as fast as unpacking first.
FEW_ROWS = 32


def kernel_takes(codes: torch.Tensor) -> bool:
    """Whether there is a kernel, and these codes [out, in] fit it: it checks nothing, but reads 16 codes at a time, beyond the
    end of a row if need be, from addresses that it takes for multiples of 16."""
    fits = codes.is_contiguous() and codes.shape[1] % 16 == 0 and codes.data_ptr() % 16 == 0
    return INT8_PRODUCT is not None and codes.device.type == "cpu" and fits


def multiply_int8(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x [..., in] -> x W^T [..., out], in x's precision. Few rows on a CPU: x and the result are rounded to bf16, the sums are
    not; else with the weights unpacked, as exact as F.linear."""
    rows = x.shape[:-1].numel()
    learns = torch.is_grad_enabled() and x.requires_grad
    if not 0 < rows <= FEW_ROWS or learns or not kernel_takes(codes):
        return F.linear(x, dequantize_int8(codes, scales, x.dtype))
    copied = x.reshape(rows, -1).to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format)  # so it is aligned
    return INT8_PRODUCT(copied, codes, scales).to(x.dtype).view(*x.shape[:-1], -1)


class Linear8bit(QuantisedLinear):
    """Weights in 8 bits with a scale a row. See multiply_int8 for its precision."""

    constants, bits = ("scales",), "8 bits"

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, bias: nn.Parameter | None = None, dtype=torch.float32):
        super().__init__(codes.shape[1], codes.shape[0], bias, dtype, codes=codes, scales=scales)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "Linear8bit":
        """Its bias stays the parameter it is."""
        return cls(*quantize_int8(linear.weight), linear.bias, linear.weight.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """[out, in], unpacked: a new tensor every time, so that writing into it changes nothing."""
        return dequantize_int8(self.codes, self.scales, self.like.dtype)

    def forward(self, x):
        y = multiply_int8(x, self.codes, self.scales)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @staticmethod
    def lay_side_by_side(layers: Sequence["Linear8bit"]) -> None:
        """One after the other in memory, for side_by_side."""
        for name in ("codes", "scales"):
            block = torch.cat([getattr(layer, name) for layer in layers])
            for layer, part in zip(layers, block.split([layer.out_features for layer in layers]), strict=True):
                setattr(layer, name, part)

    @staticmethod
    def side_by_side(layers: Sequence["Linear8bit"]) -> Callable | None:
        """What fast_decode.side_by_side asks for."""
        codes, scales = (in_one_piece([getattr(layer, name) for layer in layers]) for name in ("codes", "scales"))
        return None if codes is None or scales is None else partial(multiply_int8, codes=codes, scales=scales)


def in_one_piece(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Tensors that follow each other in memory as one, along their first dimension; None where they do not."""
    first = parts[0]
    place = first.storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and part.is_contiguous()
        if not same or part.storage_offset() != place:
            return None
        place += part.numel()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


# ---- a whole model -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantize_8bit_(model: nn.Module) -> list[str]:
    """Put a Linear8bit in the place of every linear layer of a language model, or of a VLM's, lm_head among them; their names
    are returned. LoRA is merged first, and 4-bit layers get 8 bits too. Where the head was tied to the embedding, that stays
    in floats and is tied no more. Raises ValueError for another model and for weights that are not finite."""
    decoder = getattr(model, "language_model", model)
    if not isinstance(decoder, Llama3ForCausalLM):
        raise ValueError(f"a {type(model).__name__} has no decoder like LLaMA's: only the matrices of these are put in 8 bits")
    merge_lora(decoder)
    decoder.config = decoder.model.config = replace(decoder.config, tie_word_embeddings=False)
    if decoder is not model:
        model.config = replace(model.config, text_config=decoder.config)
    names = replace_linears(decoder, ["lm_head"], Linear8bit)
    names += replace_linears(decoder, list(find_linears(decoder, None, (nn.Linear, Linear4bit))), Linear8bit)
    for layers in read_together(decoder):
        Linear8bit.lay_side_by_side(layers)
    return names
