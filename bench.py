"""Time and memory of this code against its peers: same weights, outputs compared first, both in one process by turns.

    python bench.py vit                    our ViT against transformers' (S/16 at 224): inference and training
    python bench.py vit --batch 8 64 --json
    python bench.py vit --size tiny-digits --rounds 20
    python bench.py decode --source model.gguf     one token after another, against transformers' generate
    python bench.py loss                           memory of the training loss: chunks against all logits at once

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

from checkpoint import from_pretrained, save_pretrained
from model import Llama3ForCausalLM, LLAMA32Config, arrange_for_decoding, chunked_cross_entropy
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


def memory_bandwidth(device: torch.device) -> float:
    """Bytes a second at which one matrix-vector product too large for the caches reads its matrix."""
    matrix, vector = torch.randn(8192, 8192, device=device), torch.randn(8192, device=device)
    seconds = median_seconds({"read": lambda: matrix @ vector}, 7, device)["read"]
    return matrix.nbytes / seconds


@torch.no_grad()
def bench_decode(args, device: torch.device) -> list[dict]:
    """Greedy decoding of the same weights: ours against transformers' generate. Also the share of the bound that is reached:
    every weight must be read once a token, so no more than bandwidth / bytes tokens a second are possible at batch 1."""
    try:
        from transformers import LlamaForCausalLM
    except ImportError:
        raise ValueError("bench.py compares with transformers: pip install -r requirements-dev.txt") from None
    torch.manual_seed(args.seed)
    ours = from_pretrained(args.source) if args.source else Llama3ForCausalLM(LLAMA32Config.preset("smollm2-135m"))
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours, folder)
        theirs = LlamaForCausalLM.from_pretrained(folder).eval().to(device)
    ours = arrange_for_decoding(ours.eval().to(device))
    weight_bytes = sum(p.nbytes for p in ours.parameters())
    bound = memory_bandwidth(device) / weight_bytes
    rows, new = [], args.new_tokens
    for batch in args.batch:
        ids = torch.randint(0, ours.config.vocab_size, (batch, 32), device=device)

        def run_theirs(ids=ids):
            mask = torch.ones_like(ids)
            out = theirs.generate(ids, attention_mask=mask, do_sample=False, min_new_tokens=new, max_new_tokens=new)
            return out[:, ids.shape[1] :].tolist()

        steps = {"ours": lambda ids=ids: ours.generate(ids, max_new_tokens=new), "transformers": run_theirs}
        first, second = (step() for step in steps.values())
        same = sum(a == b for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))
        row = compare("decoding", steps, batch * new, args.rounds, device, size="smollm2-135m", batch=batch)
        share = round(row["per_second"] / batch / bound, 3)
        rows.append({**row, "equal_tokens": same / (batch * new), "share_of_bound": share})
    return rows


def bench_loss(args, device: torch.device) -> list[dict]:
    """Forward and backward of the last layer and its loss, for SmolLM2's vocabulary: chunks of logits against all of them.
    The memory of the first does not grow with the text."""
    torch.manual_seed(args.seed)
    head = torch.randn(49152, 576, device=device, requires_grad=True)
    rows = []
    for tokens in (512, 2048):
        hidden = torch.randn(tokens, 576, device=device, requires_grad=True)
        targets = torch.randint(0, len(head), (tokens,), device=device)

        def plain(hidden=hidden, targets=targets):
            F.cross_entropy(hidden @ head.T, targets).backward()
            hidden.grad = head.grad = None

        def chunked(hidden=hidden, targets=targets):
            chunked_cross_entropy(hidden, head, targets).backward()
            hidden.grad = head.grad = None

        steps = {"ours": chunked, "all logits at once": plain}
        rows.append(compare("loss, forward and backward", steps, tokens, args.rounds, device, size="V 49152", batch=tokens))
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
    parser.add_argument("--source", help="decode: the LLaMA checkpoint; default SmolLM2-135M's shape with random weights")
    parser.add_argument("--new-tokens", type=positive_int, default=64, help="decode: tokens per prompt")
    parser.add_argument("--batch", type=positive_int, nargs="+", help="default: 8 and 64 pictures, 1 and 16 prompts")
    parser.add_argument("--rounds", type=positive_int, default=7, help="turns of each; their median counts")
    parser.add_argument("--device", help="cpu, cuda, mps; default: the best there is")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object a line in place of the table")
    args = parser.parse_args()
    device = find_device(args.device)
    args.batch = args.batch or ([8, 64] if args.work == "vit" else [1, 16])
    rows = WORK[args.work](args, device)
    where = {"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__, "seed": args.seed}
    if args.json:
        for row in rows:
            print(json.dumps({**row, **where}))
    else:
        print(", ".join(f"{key} {value}" for key, value in where.items()))
        print_table(rows)
        for row in rows:
            if "share_of_bound" in row:
                equal, share = row["equal_tokens"], row["share_of_bound"]
                print(f"batch {row['batch']}: {equal:.1%} of the tokens are equal; {share:.0%} of the bound (see bench_decode)")


WORK = {"vit": bench_vit, "decode": bench_decode, "loss": bench_loss}

if __name__ == "__main__":
    run_cli(main)
