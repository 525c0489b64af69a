"""How two sides are compared: alternating in one process, time as the median over rounds, memory from the allocator's record.

    row = compare("inference", {"ours": step, "transformers": other_step}, items=8, rounds=7, device=device)
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn as nn

from lib.devices import find_dtype
from lib.memory import peak_bytes


def transformers_class(name: str) -> type:
    """The class of this name. Raises ValueError where transformers is not installed."""
    try:
        import transformers

        return getattr(transformers, name)
    except ImportError:
        raise ValueError("the benchmarks compare with transformers: pip install -r requirements-dev.txt") from None


def median_seconds(steps: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Each step's median time; the steps alternate, so that what disturbs the machine disturbs all of them."""
    seconds = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare(
    what: str, steps: dict[str, Callable], items: int, rounds: int, device: torch.device, tensors: bool = True, **facts
) -> dict:
    """One row: steps is {"ours": ..., PEER: ...}; items: images or tokens per step. tensors: whether these are what
    takes the memory, so that it can be counted."""
    peer = next(name for name in steps if name != "ours")
    memory = {name: peak_bytes(step, device) for name, step in steps.items()} if tensors else None
    seconds = median_seconds(steps, rounds, device)
    return {
        "what": what,
        **facts,
        "peer": peer,
        "per_second": round(items / seconds["ours"], 2),
        "speed_ratio": round(seconds[peer] / seconds["ours"], 3),
        "peak_mib": round(memory["ours"] / 2**20, 1) if memory else None,
        "memory_ratio": round(memory["ours"] / max(1, memory[peer]), 3) if memory else None,
    }


def training_step(model: nn.Module, loss: Callable, dtype: torch.dtype = torch.float32) -> Callable[[], torch.Tensor]:
    """Forward, loss(model), backward, AdamW on what is not frozen: the same optimiser for everyone. dtype: of
    the matrix products. What is returned calls for one such step, and gives the loss before it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, kind = torch.optim.AdamW(trained, fused=True), trained[0].device.type
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)

    def step():
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            value = loss(model)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return value.detach()

    return step


def precisions(args, device: torch.device) -> dict[str, torch.dtype]:
    """Of the matrix products of a training step: "ours" and "peer"."""
    return {"ours": find_dtype(args.dtype, device), "peer": find_dtype(args.peer_dtype or args.dtype, device)}


def dtype_suffix(dtypes: dict[str, torch.dtype]) -> str:
    """", bfloat16" or ", bfloat16 / float32", for a row; nothing where all is fp32."""
    names = [str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes.values())]
    return "" if names == ["float32"] else f", {' / '.join(names)}"
