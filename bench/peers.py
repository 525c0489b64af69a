"""Time and memory of this code against its peers: same weights, outputs compared first, both alternating in one process.

    python -m bench.peers vit                       our ViT against transformers' (S/16 at 224): inference and training
    python -m bench.peers vit --batch 8 64 --json
    python -m bench.peers vit --size tiny-digits --rounds 20
    python -m bench.peers decode --source model.gguf           one token after another, against transformers' generate
    python -m bench.peers decode --int8 --source model.gguf    ours with its matrices in 8 bits, transformers in fp32
    python -m bench.peers loss                      memory of the training loss: chunks against all logits at once
    python -m bench.peers vlm                       training SigLIP-B/16 + SmolLM2-135M, whole or in part, against Idefics3
    python -m bench.peers questions                 twelve questions an image, packed, against a padded row for each
    python -m bench.peers images --source DIR       JPEGs to pixel_values, against transformers' image processor
    python -m bench.peers bpe                       our tokenizer against the tokenizers library
    python -m bench.peers start                     from `python` to the first gradient
    python -m bench.peers quant --source model.gguf    4-bit layers against floats: time, memory, perplexity on --text FILE

Every figure is a ratio to the peer in the same run, since a machine's own speed drifts. Time: the median over rounds in
which the two alternate. Memory: the peak of what torch allocates in one step, beyond what lay there before, counted
from the allocator's own record, on a CPU too (so it is exact and the same every time). Needs transformers, and peft for a
peer that trains LoRA.
"""

import argparse
import json

import torch

from bench.inputs import bench_bpe, bench_images, bench_start
from bench.language import bench_decode, bench_loss, bench_quant
from bench.vit import bench_vit
from bench.vlm import VLM_SIZES, bench_questions, bench_vlm
from lib import figures
from lib.cli import Parser, not_negative_int, png_file, positive_int, run_cli
from lib.devices import DTYPES, find_device
from lib.files import check_output
from lib.vlm_parts import SIZES
from vit_scratch import ViTConfig


def print_table(rows: list[dict]) -> None:
    print("| what | size | batch | per second | speed, ours / peer | peak MiB | memory, ours / peer |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        memory = (row["peak_mib"], f"{row['memory_ratio']:.2f}x") if row["peak_mib"] is not None else ("", "")
        cells = (row["what"], row["size"], row["batch"], row["per_second"], f"{row['speed_ratio']:.2f}x", *memory)
        print("| " + " | ".join(map(str, cells)) + " |")


def notes(row: dict) -> list[str]:
    """What the table has no column for."""
    lines = []
    if "share_of_bound" in row:
        equal, share = row["equal_tokens"], row["share_of_bound"]
        lines += [f"batch {row['batch']}: {equal:.1%} of the tokens are equal; {share:.0%} of the bound (see bench_decode)"]
    if "perplexity" in row:
        before, after = row["perplexity_floats"], row["perplexity"]
        change = f"{before:.2f} in floats, {after:.2f} quantised ({after / before - 1:+.1%})"
        lines += [f"perplexity on {row['tokens']} tokens: {change}"]
    if "bytes_per_weight" in row:
        each = f"{row['layers']} layers of {row['weights'] / 1e6:.1f}M weights, {row['bytes_per_weight']:.4f} bytes each"
        whole = f"{row['weights_floats_mib']} -> {row['weights_mib']} MiB in {row['quantising_seconds']} s"
        lines += [f"{each}; the whole model: {whole}"]
    if "peak_total_mib" in row:
        size, ours, theirs = row["parameters"] / 1e6, row["peak_total_mib"], row["peer_peak_total_mib"]
        trained = f"{row['what']}, batch {row['batch']}: {row['trained'] / 1e6:.1f}M of {size:.1f}M parameters"
        lines += [f"{trained}; {ours:,.0f} MiB at the peak in all, {row['peer']} {theirs:,.0f}"]
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("work", choices=[*WORK, "all"], help="what to measure")
    sizes = {"vit": list(ViTConfig.PRESETS), "vlm": list(VLM_SIZES), "questions": list(SIZES)}
    choices = "; ".join(f"{work}: {', '.join(names)}" for work, names in sizes.items())
    parser.add_argument("--size", help=f"{choices}; default: vit-s16, 222m, small")
    parser.add_argument("--source", help="decode, quant: a LLaMA checkpoint, decode's default: SmolLM2-135M's shape, random; "
        "images: a folder of JPEGs")  # fmt: skip
    parser.add_argument("--text", metavar="FILE", help="quant, decode --int8: what --source reads, its first 2,048 tokens, "
        "default README.md; bpe: what it learns")  # fmt: skip
    parser.add_argument("--new-tokens", type=positive_int, default=64, help="decode: tokens per prompt")
    parser.add_argument("--int8", action="store_true", help="decode: ours in 8 bits, so that not all tokens are equal")
    parser.add_argument(
        "--batch", type=positive_int, nargs="+", help="default: vit 8 64, decode 1 16, vlm 2, questions 16, quant 1 256"
    )
    parser.add_argument("--rounds", type=positive_int, default=7, help="turns of each; their median counts")
    parser.add_argument("--device", help="cpu, cuda, mps; default: the best there is")
    parser.add_argument("--dtype", choices=DTYPES, help="vlm, vit (training): default fp16 on CUDA, else fp32")
    parser.add_argument("--peer-dtype", choices=DTYPES, help="vlm, vit (training): the peer's, where it is not ours")
    parser.add_argument("--seed", type=not_negative_int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object a line in place of the table")
    parser.add_argument("--chart", type=png_file, metavar="FILE.png", help="draw the ratios")
    args = parser.parse_args(argv)
    if args.int8 and args.work != "decode":
        parser.error("--int8 is for decode")
    if args.size and args.size not in (known := sizes.get(args.work, [])):
        parser.error(f"{args.work} has no size {args.size!r}: choose one of {', '.join(known) or 'none'}")
    if args.chart:
        check_output("--chart", args.chart)
    device, rows = find_device(args.device), []
    for work in WORK if args.work == "all" else [args.work]:
        batch = {"vit": [8, 64], "vlm": [2], "questions": [16], "quant": [1, 256]}.get(work, [1, 16])
        size = {"vit": "vit-s16", "vlm": "222m", "questions": "small"}.get(work)
        chosen = {**vars(args), "batch": args.batch or batch, "size": args.size or size}
        rows += WORK[work](argparse.Namespace(**chosen), device)
    where = {"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__, "seed": args.seed}
    if args.json:
        for row in rows:
            print(json.dumps({**row, **where}))
    else:
        print(", ".join(f"{key} {value}" for key, value in where.items()))
        print_table(rows)
        for line in [line for row in rows for line in notes(row)]:
            print(line)
    if args.chart:
        columns = {"speed, ours / peer": "speed_ratio", "memory, ours / peer": "memory_ratio"}
        groups = {name: [row[key] or float("nan") for row in rows] for name, key in columns.items()}
        labels = [f"{row['what']}, {row['size']}, {row['batch']}, against {row['peer']}" for row in rows]
        figures.bar_chart(groups, labels, args.chart, form="{:.2f}x")


WORK = {
    "vit": bench_vit, "decode": bench_decode, "loss": bench_loss, "vlm": bench_vlm, "questions": bench_questions,
    "quant": bench_quant, "images": bench_images, "bpe": bench_bpe, "start": bench_start,
}  # fmt: skip

if __name__ == "__main__":
    run_cli(main)
