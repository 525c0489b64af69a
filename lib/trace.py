"""What a model computes on the way, by name, without an argument for it in any forward.

    with record(model, "blocks.*", "*.weights") as seen:
        model(input_ids)
    seen["blocks.3"]                # the output of the module model.blocks[3]
    seen["blocks.3.input"]          # its first input
    seen["blocks.3.attn.weights"]   # the attention weights [B, H, T, S] of the module model.blocks[3].attn
    first_difference(ours, theirs)  # the first name under which two such records part

Names are those of model.named_modules(). Hooks record inputs and outputs; attention weights are computed from the arguments
of scaled_dot_product_attention, or taken from the softmax of the explicit form (gpt.explicit_attention).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from gpt import causal_mask


@contextmanager
def record(model: nn.Module, *patterns: str, reduce: Callable | None = None) -> Iterator[dict[str, torch.Tensor]]:
    """Inside the block every forward pass of the model writes its intermediates into the dict, in the order in which they are
    computed; those of a later pass replace them. patterns: of the names, as in a shell ("layers.*.weights"); none: all.
    reduce: what to keep of each tensor, where all of it would be too much."""
    seen: dict[str, torch.Tensor] = {}
    inside: list[str] = []  # the modules that are being computed, outermost first

    def wanted(name: str) -> bool:
        return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)

    def keep(name: str, value) -> None:
        if isinstance(value, torch.Tensor) and wanted(name):
            seen.pop(name, None)
            seen[name] = reduce(value) if reduce else value

    def keep_weights(compute: Callable[[], torch.Tensor]) -> None:
        if not inside:  # the attention of another model
            return
        name = f"{inside[-1]}.weights" if inside[-1] else "weights"
        if wanted(name):
            keep(name, compute())

    def before(name, args):
        inside.append(name)
        if args:
            keep(f"{name}.input" if name else "input", args[0])

    def after(name, output):
        inside.pop()
        keep(name or "output", output)

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda module, args, name=name: before(name, args)))
        handles.append(module.register_forward_hook(lambda module, args, output, name=name: after(name, output)))
    try:
        with AttentionWeights(keep_weights):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


class AttentionWeights(TorchFunctionMode):
    """Hands a function that gives the weights to `keep`, at every attention."""

    def __init__(self, keep):
        super().__init__()
        self.keep = keep

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.softmax:
            self.keep(lambda: result)
        elif function is torch.nn.functional.scaled_dot_product_attention:
            self.keep(lambda: attention_weights(*args, **(kwargs or {})))
        return result


def attention_weights(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, enable_gqa=False) -> torch.Tensor:
    """The weights [B, H, T, S] that scaled_dot_product_attention uses for these arguments, and does not return."""
    if k.shape[1] < q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    if is_causal:
        attn_mask = causal_mask(torch.ones(1, k.shape[2], dtype=torch.bool, device=q.device), q.shape[2])
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    return (scores if attn_mask is None else scores.masked_fill(~attn_mask, float("-inf"))).softmax(dim=-1)


def first_difference(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], tolerance=1e-5) -> str | None:
    """Of two records the first name, in the order of ours, under which they differ by more than the tolerance; None if they
    agree in all names that both have. For finding out where a model parts from its published twin."""
    for name in ours:
        if name in theirs:
            a, b = ours[name], theirs[name]
            if a.shape != b.shape or not torch.allclose(a.float(), b.float(), atol=tolerance, rtol=tolerance):
                return name
    return None
