"""What turns gradients into steps: parameter groups, their optimizers, the learning rate's schedule, averaged weights."""

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn as nn

from lib.muon import Muon


def cosine_schedule(progress: float, warmup: float = 0.05, floor: float = 0.01) -> float:
    """Factor on the peak learning rate at progress 0..1: a straight rise, then half a cosine down to `floor`
    (Loshchilov and Hutter 2017)."""
    if progress < warmup:
        return progress / warmup
    rest = min(1.0, (progress - warmup) / max(1e-9, 1 - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * rest))


def parameter_groups(model: nn.Module, weight_decay: float, lr: float, muon_lr: float | None = None) -> list[dict]:
    """What is trained of a model, in groups for make_optimizers. All decay but norms and biases, which have one axis, position
    embeddings and CLS. muon_lr: matrices go to Muon, at this learning rate, except for embeddings and a head, whose rows are
    words rather than directions."""
    matrices, decay, keep = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or "position_embedding" in name or "cls_token" in name:
            keep.append(parameter)
        elif muon_lr and parameter.ndim == 2 and "embed" not in name and "head" not in name:
            matrices.append(parameter)
        else:
            decay.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "lr": muon_lr, "muon": True},
        {"params": decay, "weight_decay": weight_decay, "lr": lr, "muon": False},
        {"params": keep, "weight_decay": 0.0, "lr": lr, "muon": False},
    ]
    return [group for group in groups if group["params"]]


def make_optimizers(groups: list[dict], betas: tuple[float, float] = (0.9, 0.98)) -> list[torch.optim.Optimizer]:
    """AdamW for the groups of parameter_groups and Muon for those that are meant for it."""
    adam, muon = ([dict(group, initial_lr=group["lr"]) for group in groups if group["muon"] == kind] for kind in (False, True))
    optimizers = [torch.optim.AdamW(adam, betas=betas, fused=True)] if adam else []
    return optimizers + ([Muon(muon)] if muon else [])


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Every group's learning rate becomes `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["initial_lr"]


class EMA:
    """An exponential moving average of the weights. In the first steps the decay is smaller, so that it forgets the
    random start: min(decay, (1 + step) / (10 + step))."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            self.weights[name].lerp_(parameter, 1 - decay)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside the block, the model has the averaged weights."""
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(self.weights[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(own[name])
