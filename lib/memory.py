"""How much memory a step of training takes: measured, and estimated by `--dry-run` on every training script.

The estimate comes from the run's own first batches: a few of their samples go forward and backward on the device they are
meant for, one and then several at once, and what autograd keeps for them grows along a straight line from there. Weights,
gradients and the optimiser's averages are counted. `recompute_blocks` is --grad-checkpoint.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from gpt import KVCache

MOST_TRIED = 4  # parts of a step


def recompute_blocks(model: nn.Module) -> None:
    """In training, keep only the input of every block of an nn.ModuleList and compute the rest again in the backward pass: less
    memory, a third more time (Chen et al. 2016)."""
    for blocks in model.modules():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                block.forward = recomputed(block.forward)


def recomputed(forward: Callable) -> Callable:
    """The same function, recomputed in the backward pass; not where no gradient is asked for, nor with a cache, which must not
    be written twice."""

    def run(*args, **options):
        has_cache = any(isinstance(value, KVCache) for value in (*args, *options.values()))
        if has_cache or not torch.is_grad_enabled():
            return forward(*args, **options)
        return checkpoint(forward, *args, use_reentrant=False, **options)

    return run


# ---- measuring -------------------------------------------------------------------------------------------------------


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """The memory behind tensors; what several share is counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


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


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """After the block, the list holds the most bytes that tensors made inside it took up at once."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        torch.cuda.synchronize()
        found.append(torch.cuda.max_memory_allocated() - before)
        return
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with silent():
        profile.start()
    try:
        yield found
    finally:
        with silent():
            profile.stop()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    found.append(peak)


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes that tensors made during step() take up at once."""
    with peak_memory(device) as peak:
        step()
    return peak[0]


# ---- estimating ------------------------------------------------------------------------------------------------------


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
        """Going backward, gradients take the space that activations leave: the peak is where it begins or where it ends."""
        both = self.gradients + self.activations if self.gradients_wait else max(self.gradients, self.activations)
        return self.weights + self.optimizer + both

    def __str__(self) -> str:
        parts = {key: value for key, value in asdict(self).items() if key != "gradients_wait"}
        return ", ".join(f"{key} {mib(value)}" for key, value in parts.items()) + f": {mib(self.peak)} MiB at the peak"


def mib(count: int) -> str:
    return f"{count / 2**20:,.1f}"


class DryRun:
    """Steps that are measured and not taken: the first in parts of one sample, the second in parts of several."""

    def __init__(self, args, device: torch.device):
        self.args, self.device, self.asked_parts = args, device, args.grad_accum

    def begin(self, model: nn.Module, batches) -> None:
        """Before the first step of a stage. The model keeps no gradients from now on. Some batches come in parts."""
        self.args.grad_accum = batches.grad_accum = self.args.batch_size
        self.model, self.tried, self.peaks = model, {}, []  # tried: bytes of activations by the number of samples
        trained = [p for p in model.parameters() if p.requires_grad]
        self.hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in trained]

    def parts(self, parts: Iterable) -> Iterator:
        """The first few parts of a batch. Measured is what is allocated from where one is asked for to where its backward pass
        has ended; not for the first, in which things are made once and for all."""
        parts = iter(parts)
        for number in range(MOST_TRIED + 1):
            with peak_memory(self.device) as peak:
                part = next(parts, None)
                if part is None:
                    return
                yield part
            if number:
                self.peaks.append(peak[0])

    def step(self, batches, optimizers: Iterable[torch.optim.Optimizer], averaged: bool) -> "StepMemory | None":
        """After the parts of a step: what a step takes, or None where another one has to be measured first. averaged: there is
        a second copy of the weights. Raises ValueError for a batch of one sample."""
        args, batch = self.args, self.args.batch_size
        if not self.peaks:
            raise ValueError("--dry-run compares several samples: give it a --batch-size of 2 or more")
        self.tried[batch // args.grad_accum] = sum(self.peaks) / len(self.peaks)
        self.peaks = []
        count = batch // self.asked_parts
        several = max(n for n in range(1, 9) if batch % n == 0 and n <= count and (n == 1 or n <= batch // 2))
        if several not in self.tried:
            args.grad_accum = batches.grad_accum = batch // several
            return None
        args.grad_accum = self.asked_parts
        for hook in self.hooks:
            hook.remove()
        activations = along_a_line(self.tried, count)
        return step_memory(self.model, optimizers, activations, 2 if averaged else 1, wait=self.asked_parts > 1)


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
