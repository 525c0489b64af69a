"""Which layers get LoRA, and LoRA merged away again. The layer itself, Linear_LORA, is in model.py."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn as nn

from model import Linear_LORA, linear_names


def find_linears(
    module: nn.Module, targets: Sequence[str] | str | None = None, classes: tuple[type, ...] = (nn.Linear,)
) -> dict[str, nn.Module]:
    """The layers that convert_linears_to_lora would wrap, by name. Raises ValueError where there are none, and for a head that
    is tied to the embedding, which would be changed with it."""
    linears = {name: module.get_submodule(name) for name in linear_names(module, classes, targets)}
    if not linears:
        raise ValueError(f"the targets {targets!r} name no linear layer of this {type(module).__name__}")
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, linear in linears.items():
        if any(id(parameter) in embeddings for parameter in linear.parameters(recurse=False)):
            raise ValueError(f"{name} shares its weight with the embedding: leave it out of the targets, or untie it")
    return linears


def check_rank(module: nn.Module, rank: int, targets: Sequence[str] | str | None = None, classes=(nn.Linear,)) -> None:
    """Raises ValueError for a rank above that of every matrix it is to correct."""
    linears = [module.get_submodule(name) for name in linear_names(module, classes, targets)]
    most = max((min(linear.in_features, linear.out_features) for linear in linears), default=rank)
    if rank > most:
        raise ValueError(f"LoRA's rank is {rank}: the matrices that it corrects have {most} at most (--lora, --qlora)")


def lora_layers(module: nn.Module) -> dict[str, Linear_LORA]:
    """All Linear_LORA of a model by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Linear_LORA)}


def lora_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The names and tensors that LoRA trains."""
    return ((name, p) for name, p in module.named_parameters() if name.endswith(("lora_a", "lora_b")))


@torch.no_grad()
def merged_weight(layer: Linear_LORA) -> torch.Tensor:
    """[out, in]: the frozen weight with the correction added, in its dtype. ValueError for a layer that has no such matrix."""
    weight, shape = getattr(layer.linear, "weight", None), (layer.out_features, layer.in_features)
    if weight is None or not weight.is_floating_point() or tuple(weight.shape) != shape:
        raise ValueError(f"a {type(layer.linear).__name__} has no plain weight to merge LoRA into: dequantise it first")
    return (weight.float() + layer.scaling * (layer.lora_b @ layer.lora_a).float()).to(weight.dtype)


def merge_lora(module: nn.Module) -> None:
    """Merge every correction and put the plain linear layers back, in place. A quantised layer (lib/quant.py) becomes floats
    again, and takes their memory: four bits cannot hold the sum."""
    for name, layer in lora_layers(module).items():
        if hasattr(layer.linear, "to_linear"):
            layer.linear = layer.linear.to_linear()
        merged = merged_weight(layer)
        layer.linear.weight.data.copy_(merged)
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer.linear)
