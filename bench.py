"""Time and memory of this code against its peers: same weights, outputs compared first, both in one process by turns.

    python bench.py vit                    our ViT against transformers' (S/16 at 224): inference and training
    python bench.py vit --batch 8 64 --json
    python bench.py vit --size tiny-digits --rounds 20

Every figure is a ratio to the peer in the same run, since a machine's own speed drifts. Time: the median over rounds in
which the two take turns. Memory: the peak of what torch allocates in one step, beyond what lay there before, counted
from the allocator's own record, on a CPU too (so it is exact and the same every time). Needs transformers.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import save_pretrained
from training import find_device, positive_int, run_cli
from vit_scratch import ViTConfig, ViTModel


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most memory that tensors made during step() take up at once."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def median_seconds(steps: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Each step's median time; the steps take turns, so that what disturbs the machine disturbs all of them."""
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


def compare(what: str, steps: dict[str, Callable], items: int, rounds: int, device: torch.device, **facts) -> dict:
    """One row: steps is {"ours": ..., PEER: ...}; items: pictures or tokens per step."""
    peer = next(name for name in steps if name != "ours")
    memory = {name: peak_bytes(step, device) for name, step in steps.items()}
    seconds = median_seconds(steps, rounds, device)
    return {
        "what": what,
        **facts,
        "peer": peer,
        "per_second": round(items / seconds["ours"], 2),
        "speed_ratio": round(seconds[peer] / seconds["ours"], 3),
        "peak_mib": round(memory["ours"] / 2**20, 1),
        "memory_ratio": round(memory["ours"] / max(1, memory[peer]), 3),
    }


def training_step(model: nn.Module, logits: Callable, labels: torch.Tensor) -> Callable[[], None]:
    """Forward, loss, backward, AdamW: the same optimiser for everyone."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        F.cross_entropy(logits(model), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bench_vit(args, device: torch.device) -> list[dict]:
    """Our ViT against transformers' ViTForImageClassification with the same weights and the same attention kernel."""
    try:
        from transformers import ViTForImageClassification
    except ImportError:
        raise ValueError("bench.py compares with transformers: pip install -r requirements-dev.txt") from None
    torch.manual_seed(args.seed)
    ours = ViTModel(ViTConfig.preset(args.size, pooling="cls")).to(device)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours, folder)
        theirs = ViTForImageClassification.from_pretrained(folder, attn_implementation="sdpa").to(device)
    size = ours.config.image_size
    rows = []
    for batch in args.batch:
        pixels = torch.randn(batch, ours.config.num_channels, size, size, device=device)
        labels = torch.randint(0, ours.config.num_labels, (batch,), device=device)
        with torch.no_grad():
            difference = (ours.eval()(pixels) - theirs.eval()(pixels).logits).abs().max().item()
            if difference > 1e-3:
                raise ValueError(f"the two models differ by {difference:g}: there is nothing to compare")
            infer = {"ours": lambda x=pixels: ours(x), "transformers": lambda x=pixels: theirs(x)}
            rows.append(compare("ViT inference", infer, batch, args.rounds, device, size=args.size, batch=batch))
        train = {
            "ours": training_step(copy.deepcopy(ours).train(), lambda model, x=pixels: model(x), labels),
            "transformers": training_step(copy.deepcopy(theirs).train(), lambda model, x=pixels: model(x).logits, labels),
        }
        for step in train.values():
            step()  # AdamW makes its state in the first step: not part of what a step costs
        rows.append(compare("ViT training step", train, batch, args.rounds, device, size=args.size, batch=batch))
    return rows


def print_table(rows: list[dict]) -> None:
    print("| what | size | batch | per second | speed, ours / peer | peak MiB | memory, ours / peer |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = (row["what"], row["size"], row["batch"], row["per_second"], f"{row['speed_ratio']:.2f}x")
        print("| " + " | ".join(map(str, (*cells, row["peak_mib"], f"{row['memory_ratio']:.2f}x"))) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=list(WORK), help="what to measure")
    parser.add_argument("--size", choices=list(ViTConfig.PRESETS), default="vit-s16")
    parser.add_argument("--batch", type=positive_int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=positive_int, default=7, help="turns of each; their median counts")
    parser.add_argument("--device", help="cpu, cuda, mps; default: the best there is")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object a line in place of the table")
    args = parser.parse_args()
    device = find_device(args.device)
    rows = WORK[args.work](args, device)
    where = {"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__, "seed": args.seed}
    if args.json:
        for row in rows:
            print(json.dumps({**row, **where}))
    else:
        print(", ".join(f"{key} {value}" for key, value in where.items()))
        print_table(rows)


WORK = {"vit": bench_vit}

if __name__ == "__main__":
    run_cli(main)
