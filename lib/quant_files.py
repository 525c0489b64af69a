"""Linear layers of four bits in files, as bitsandbytes keeps them: so transformers opens what we quantise, and we what it
does."""

import json
from collections.abc import Iterable, Sequence

import torch
import torch.nn as nn

from lib.layouts.common import Layout, Name, renamed
from lib.quant import BLOCK, NESTED_BLOCK, Linear4bit, Packed, dynamic_code, nf4_code

STATE = ".quant_state.bitsandbytes__nf4"  # a JSON object as bytes
SUFFIXES = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)  # what follows the weight's name
CONFIG = {
    **{"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
    **{"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8"},
}


def quantization_config(in_floats: Sequence[str]) -> dict:
    """What config.json says of a model with such layers, for transformers. in_floats: the parts of it without any."""
    return {**CONFIG, "bnb_4bit_compute_dtype": "float32", "llm_int8_skip_modules": list(in_floats)}


def is_nf4(found) -> bool:
    """Whether a quantization_config says nothing else. (Each tensor says once more what it is.)"""
    return isinstance(found, dict) and CONFIG.items() <= {**CONFIG, **found}.items()


def weight_to_file(layer: Linear4bit) -> dict[str, torch.Tensor]:
    """{one of SUFFIXES: tensor}."""
    state = {
        **{"quant_type": "nf4", "blocksize": BLOCK, "dtype": str(layer.like.dtype).removeprefix("torch.")},
        **{"shape": [layer.out_features, layer.in_features], "nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"},
        "nested_offset": layer.offset.item(),
    }
    cpu = torch.device("cpu")
    tensors = {
        "": layer.codes[:, None],
        ".absmax": layer.absmax,
        ".quant_map": nf4_code(cpu),
        ".nested_absmax": layer.nested_absmax,
        ".nested_quant_map": dynamic_code(cpu),
        STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    return {suffix: tensor.detach().to(cpu, copy=True) for suffix, tensor in tensors.items()}  # a file refuses shared ones


def linear_from_file(tensors: dict[str, torch.Tensor], shape: torch.Size, bias=None, dtype=None) -> Linear4bit:
    """weight_to_file backwards, for a matrix [out, in] of `shape`. dtype None: as the file says. Raises ValueError for what is
    not NF4 with double quantisation, block sizes 64 and 256 and the published code books."""
    cpu = torch.device("cpu")
    if missing := [name.removeprefix(".") or "weight" for name in SUFFIXES if name not in tensors]:
        raise ValueError(f"its {', '.join(missing)} is missing: only NF4 with double quantisation is implemented")
    try:
        state = json.loads(bytes(tensors[STATE].tolist()))
        found = state["quant_type"], state["blocksize"], state["nested_blocksize"]
        stored, offset = getattr(torch, state["dtype"]), torch.tensor(float(state["nested_offset"]))
        found_shape = list(state["shape"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its quant_state is damaged ({error})") from None
    if found != ("nf4", BLOCK, NESTED_BLOCK):
        raise ValueError(f"it has type and block sizes {found}: only ('nf4', {BLOCK}, {NESTED_BLOCK}) is implemented")
    if found_shape != list(shape):
        raise ValueError(f"it is a matrix {found_shape}, {list(shape)} was expected")
    for name, code in ((".quant_map", nf4_code(cpu)), (".nested_quant_map", dynamic_code(cpu))):
        if tensors[name].shape != code.shape or not torch.allclose(tensors[name].float(), code, atol=1e-6):
            raise ValueError(f"its {name[1:]} is not the published one")
    packed = Packed(tensors[""].flatten(), tensors[".absmax"], tensors[".nested_absmax"], offset)
    kinds = [tensor.dtype for tensor in packed]
    if kinds != [torch.uint8, torch.uint8, torch.float32, torch.float32]:
        raise ValueError(f"its weight and constants are {kinds}, uint8, uint8 and float32 were expected")
    return Linear4bit(shape[1], shape[0], packed, bias, dtype or stored)


def place_quantised(model: nn.Module, tensors: dict, names: list[Name], source: str, dtype: torch.dtype | None) -> list[Name]:
    """Move the 4-bit weights out of `tensors` into a model on the meta device, as Linear4bit; the names of all others."""
    others = []
    for name in names:
        theirs = name.theirs[0]
        if theirs + STATE not in tensors:
            others.append(name)
            continue
        path = name.ours.removesuffix(".weight")
        linear, parts = model.get_submodule(path), {suffix: theirs + suffix for suffix in SUFFIXES}
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{source}: {theirs} is in 4 bits, which is implemented for linear layers alone")
        found = {suffix: tensors.pop(part) for suffix, part in parts.items() if part in tensors}
        try:
            layer = linear_from_file(found, linear.weight.shape, linear.bias, dtype)
        except ValueError as error:
            raise ValueError(f"{source}: {theirs}: {error}") from None
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return others


def quantised_weights(model: nn.Module, layout: Layout) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    """{name of a 4-bit layer's weight: its tensors as in files, by suffix}, and what config.json says of them. Those inside
    LoRA layers are left out, since these are written merged. Raises ValueError where the model's layout holds none."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit) and not name.endswith(".linear")}
    if layers and layout.modules is None:
        raise ValueError(f"4-bit layers of a {type(model).__name__} have no layout: only those of LLaMA and VLMs do")
    weights = {f"{name}.weight": weight_to_file(layer) for name, layer in layers.items()}
    return weights, quantization_config(parts_in_floats(model, layers, layout))


def parts_in_floats(model: nn.Module, quantised: Iterable[str], layout: Layout) -> list[str]:
    """The largest parts of a model, under the names that transformers has for them, without a 4-bit layer and with a linear
    one."""
    prefixes = layout.modules or {}
    in_bits = [f"{renamed(name, prefixes)}." for name in quantised]
    found = {}  # as an ordered set
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            parts = renamed(name, prefixes).split(".")
            paths = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
            found[next(path for path in paths if not any(other.startswith(f"{path}.") for other in in_bits))] = None
    return list(found)
