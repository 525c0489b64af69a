"""How much memory a step of training takes: measured, and foretold by `--dry-run` on every training script.

What is foretold comes from the run's own first batches: a few of their samples go forward and backward on the device they are
meant for, one and then several at once, and what autograd keeps for them grows along a straight line from there.
Weights, gradients and the optimiser's averages are counted, which needs no trying.
"""

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice

import torch
import torch.nn as nn

from lib.quant import bytes_of

MOST_TRIED = 4  # parts of a step


@contextmanager
def silent():
    """Without what is written to stderr: torch 2.13's profiler says there when it starts and stops, and what it cannot see."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most memory that tensors made during step() take up at once."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with silent(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one step. gradients_wait: those of its first parts lie there while the others go forward (grad_accum)."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    gradients_wait: bool

    @property
    def peak(self) -> int:
        """Going backward, gradients take the room that activations leave: the peak is where it begins or where it ends."""
        both = self.gradients + self.activations if self.gradients_wait else max(self.gradients, self.activations)
        return self.weights + self.optimizer + both

    def __str__(self) -> str:
        parts = {key: value for key, value in asdict(self).items() if key != "gradients_wait"}
        return ", ".join(f"{key} {mib(value)}" for key, value in parts.items()) + f": {mib(self.peak)} MiB at the peak"


def mib(count: int) -> str:
    return f"{count / 2**20:,.1f}"


def activation_bytes(model: nn.Module, losses: Iterable[torch.Tensor], device: torch.device) -> float:
    """The most memory that a forward and a backward pass take beside weights and gradients: the mean over some of these losses,
    each computed as it is asked for. The model keeps no gradients."""
    dropping = [
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in model.parameters() if p.requires_grad
    ]
    losses = iter(losses)
    try:
        next(losses).backward()  # what is made once and for all is not counted
        found = []
        for _ in range(MOST_TRIED):
            loss = []

            def forward_and_backward(loss=loss):
                loss.extend(islice(losses, 1))
                if loss:
                    loss[0].backward()

            peak = peak_bytes(forward_and_backward, device)
            if not loss:
                break
            found.append(peak)
    finally:
        for hook in dropping:
            hook.remove()
    if not found:
        raise ValueError("--dry-run compares several samples: give it a --batch-size of 2 or more")
    return sum(found) / len(found)


def along_a_line(known: dict[int, float], count: float) -> int:
    """Activations of `count` samples from those of one or two other numbers of samples."""
    (few, least), (many, most) = min(known.items()), max(known.items())
    each = (most - least) / (many - few) if many > few else least / few
    return round(least + (count - few) * each)


def step_memory(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], activations: int, copies: int, wait: bool
) -> StepMemory:
    """copies: of the weights, 2 with an average of them. AdamW keeps two averages of a gradient, Muon one."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return StepMemory(
        weights=copies * bytes_of([*model.parameters(), *model.buffers()]),
        gradients=sum(p.nbytes for p in model.parameters() if p.requires_grad),
        optimizer=sum(p.nbytes * (1 if group["muon"] else 2) for group in groups for p in group["params"]),
        activations=activations,
        gradients_wait=wait,
    )
