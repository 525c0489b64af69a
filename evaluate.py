"""Measure a vision-language model: exact match by kind of question, with and without its image, perplexity, captions.

    python evaluate.py runs/vlm                                       # what it was trained for, by its settings.json
    python evaluate.py runs/vlm --blind --blind-run runs/vlm-blind    # and what can be guessed without images
    python evaluate.py runs/vlm --data test.json --images images      # or .csv, .parquet, ...: whatever finetune_vlm.py reads

Answers are generated, greedily or with --beams, and are right if they are the true one but for case and spaces. Beside the
share of right ones stands the interval that holds it in 95 % of cases (Wilson). --blind asks the same model with every image
replaced by the mean colour; --swapped shows another image of the file; --blind-run asks a second model, one that was trained
without images. Perplexity and loss are those of the true answers, with the standard error over images; beside others stands on
how many images the model that sees has the lower loss. Questions of kind "caption", and those that come with several answers
about the same image, also get BLEU and CIDEr-D over all answers given to them. Of a question that lists options ("A. cat") the
letter counts, or the option's own words. Writes eval.json, eval.png and answers.jsonl, a line for each answer with its row's
id; the last line printed is one JSON object.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

from data.scenes import KINDS, final_number
from lib import figures
from lib.answers import (
    MOST_NEW_TOKENS,
    Item,
    answer,
    answer_losses,
    image_key,
    prompt_rows,
    row_items,
    scene_items,
)
from lib.caption_scores import bleu, cider_d
from lib.checkpoint import load_vlm
from lib.cli import Parser, not_negative_int, positive_int, run_cli
from lib.devices import find_device
from lib.figures.common import new_figure
from lib.files import check_output, find_source, make_folder, naming, read_if_there, write_atomic, write_json
from lib.generation import say_unlike
from lib.photo_losses import by_photo, compare, mean_and_error, swapped
from lib.scores import is_right, score
from model import MllamaForConditionalGeneration
from processing_mllama import IMAGE_TOKEN, MllamaImageProcessor

ASKED = {  # who answers, as eval.json calls it, and as it is printed
    "model": "with the image",
    "swapped": "another image",
    "blanked": "image blanked",
    "blind": "trained blind",
}
COLOURS = {"model": figures.BLUE, "swapped": figures.RED, "blanked": figures.ORANGE, "blind": figures.GREY}
BLEU = {"bleu1": "BLEU-1", "bleu2": "BLEU-2", "bleu3": "BLEU-3", "bleu4": "BLEU-4"}
SCENE_SPLITS = ("test", "compositional")
MOST_BARS = 40  # kinds in a panel, the most frequent: a data set may have thousands


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="the folder of a trained model")
    add("--dataset", choices=["scenes", "llava"], help="default: what RUN was trained on")
    add("--data", metavar="FILE", help="llava: the questions, in any file that finetune_vlm.py reads")
    add("--images", metavar="DIR", help="llava: the images; default: the file's folder, or images/ in it")
    add("--skip-unusable", action="store_true", help="llava: leave out rows with faults such as a missing image")
    add("--split", choices=SCENE_SPLITS, help="scenes: only this one of the two; default: both")
    add("--count", type=positive_int, help="scenes of each split (default 200), or rows of FILE (default: all)")
    add("--seed", type=not_negative_int, default=0, help="of the scenes")
    add("--swapped", action="store_true", help="ask the same model with each image swapped for another one, too")
    add("--split-images", action=argparse.BooleanOptionalAction, help="cut images into tiles, or take them whole; default: as "
        "RUN says")  # fmt: skip
    add("--blind", action="store_true", help="ask the same model without its images, too")
    add("--blind-run", metavar="RUN2", type=Path, help="ask a second model, which was trained without images, too")
    add("--batch-size", type=positive_int, help="questions at once; default: 256, or what 128 MB of keys and values hold")
    add("--max-new-tokens", type=positive_int, default=MOST_NEW_TOKENS, help="of an answer")
    add("--beams", type=positive_int, default=1, help="search for the likeliest answers with so many beams; 1: greedy")
    add("--device", help="cpu, cuda, mps; default: the best there is")
    add("--out", metavar="FOLDER", type=Path, help="where eval.json and eval.png go; default: RUN")
    return parser.parse_args(argv)


# ---- the model ---------------------------------------------------------------------------------------------------------


def load_run(
    folder: Path, device, split_images: bool | None = None
) -> tuple[MllamaForConditionalGeneration, MllamaImageProcessor, dict]:
    """A run's model, its processor and what settings.json says ({} without one). Raises ValueError or an OSError unless the
    folder holds a vision-language model, with the tokenizer and the image settings it was trained with."""
    folder = find_source(folder)
    model, processor = load_vlm(folder, device, split_images=split_images)
    say_unlike(model, processor.tokenizer)
    settings = read_if_there(folder / "settings.json")
    return model, processor, settings


def load_twin(folder: Path, device, settings: dict):
    """The blind twin's model and processor. Raises as load_run, and ValueError for one that has seen, or of other data."""
    with naming("--blind-run", folder):
        model, processor, theirs = load_run(folder, device)
    if not theirs.get("blind", True):
        raise ValueError(f"--blind-run {folder} was trained with its images: a blind twin is trained with --blind")
    datasets = settings.get("dataset", "scenes"), theirs.get("dataset", "scenes")
    if datasets[0] != datasets[1]:
        raise ValueError(f"--blind-run {folder} was trained on {datasets[1]}, RUN on {datasets[0]}: they cannot be compared")
    return model, processor


# ---- the questions -----------------------------------------------------------------------------------------------------


def llava_items(data: str, images: str | None, count: int | None, skip: bool, isolated=False) -> tuple[list[Item], int]:
    """The questions of a file of rows, and how many of its rows are unusable, those of images that cannot be decoded included.
    Raises ValueError for such rows, unless they are to be skipped, and where none is left. isolated: each question without
    those before it, as the run was trained."""
    from data.llava import LlavaRows, decoding_problem, with_whole_images

    progress = sys.stderr.isatty()
    with naming("--data", data):
        rows = LlavaRows.read(data, images, progress)
    asked, damaged = with_whole_images(rows[:count], rows.folder, progress, decoding_problem)
    problems = rows.problems + damaged
    if problems and not (skip and asked):
        number, field, what = problems[0]
        raise ValueError(
            f"--data {data}: {len(problems)} of {rows.total} rows are unusable, the first row {number}, {field}: {what}; "
            + ("fix them, or pass --skip-unusable" if asked else "none is left")
        )
    return row_items(asked, isolated), len(problems)


def find_items(args, settings: dict) -> tuple[dict[str, list[Item]], dict]:
    """Items by split, and where they come from. Flags come first, then what the run was trained on."""
    dataset = args.dataset or ("llava" if args.data else settings.get("dataset", "scenes"))
    if dataset not in ("scenes", "llava"):
        raise ValueError(f"{args.run} was trained on {dataset!r}: pass --dataset scenes, or llava with --data")
    if dataset == "scenes":
        if args.data:
            raise ValueError(f"--data {args.data}: --dataset scenes makes its own questions")
        if args.images or args.skip_unusable:
            raise ValueError(f"--{'images' if args.images else 'skip-unusable'} is about rows of --data: scenes make their own")
        count = args.count or 200
        splits = [args.split] if args.split else SCENE_SPLITS
        items = {split: scene_items(split, count, args.seed) for split in splits}
        return items, {"dataset": dataset, "scenes": count, "seed": args.seed}
    if args.split:
        raise ValueError("--split is about scenes: a file of rows is measured whole, or its first --count rows")
    data, images = args.data or settings.get("test_data") or settings.get("data"), args.images
    if data is None:
        raise ValueError("--dataset llava needs --data FILE, the questions")
    images = images or (settings.get("images") if data in (settings.get("data"), settings.get("test_data")) else None)
    if not all(isinstance(value, str | None) for value in (data, images)):
        raise ValueError(f"{args.run / 'settings.json'} names no files with data {data!r:.80}, images {images!r:.80}")
    items, unusable = llava_items(data, images, args.count, args.skip_unusable, settings.get("isolated", False))
    where = {"dataset": dataset, "data": str(data), "images": images and str(images), "unusable_rows": unusable}
    return {"data": items}, where | {"trained_on_it": data == settings.get("data")}


def without_long(items: list[Item], models) -> list[Item]:
    """The items that, with their true answers, fit the context of all models."""
    long = set()
    for model, processor in models:
        limit = model.config.text_config.context_length
        for row in prompt_rows(processor, items, blind=True, answered=True):
            long.update(row.items if row.length > limit else ())
    return [item for number, item in enumerate(items) if number not in long]


# ---- the figures ---------------------------------------------------------------------------------------------------------


def caption_figures(items: list[Item], said: list[str]) -> dict | None:
    """BLEU and CIDEr-D of the questions of kind "caption" and of those with different answers about the same images; None where
    there are no such questions. The answers to a question are its references, whichever row gives them."""
    groups: dict = {}
    for item, text in zip(items, said, strict=True):
        asked = tuple(map(image_key, item.images)), tuple((m["role"], m["content"]) for m in item.messages)
        groups.setdefault(asked, (text, item.kind, []))[2].append(item.answer)
    chosen = [(text, given) for text, kind, given in groups.values() if kind == "caption" or len(set(given)) > 1]
    if not chosen:
        return None
    candidates, references = zip(*chosen, strict=True)
    counts = {"captions": len(candidates), "references": sum(map(len, references))}
    return counts | dict(zip(BLEU, bleu(candidates, references), strict=True)) | {"cider_d": cider_d(candidates, references)}


def measure(model, processor, items: list[Item], who: str, args, dataset: str, encoded: dict | None = None) -> dict:
    """Everything about one model's answers to the items of one split, with "said", its words, and "losses" by photo. who: of
    ASKED. encoded: see answer."""
    start, blind = time.perf_counter(), who in ("blanked", "blind")
    shown = swapped(items) if who == "swapped" else items
    said = answer(model, processor, shown, args.batch_size, args.max_new_tokens, blind, beams=args.beams, encoded=encoded)
    seconds = time.perf_counter() - start
    losses = answer_losses(model, processor, shown, args.batch_size, blind, encoded=encoded)
    (loss, _), photos = mean_and_error(losses), by_photo(items, losses)
    found = score(items, said)
    if dataset == "scenes":
        found["by_kind"] = {kind: found["by_kind"][kind] for kind in KINDS if kind in found["by_kind"]}
    if dataset == "scenes" and "sum" in found["by_kind"]:  # the total may be right where a step on the way is not
        totals = [final_number(t) == final_number(i.answer) for i, t in zip(items, said, strict=True) if i.kind == "sum"]
        found["by_kind"]["sum"]["right_totals"] = sum(totals)
    if not math.isfinite(loss):
        raise ValueError(f"{args.run}: the loss of its answers is {loss}: was it trained at too high a --lr?")
    error = mean_and_error(photos.values())[1] if len(photos) > 1 else None
    found |= {"loss": loss, "loss_error": error, "perplexity": math.exp(min(loss, 700))}
    found |= {"answer_tokens": sum(n for _, n in losses), "captions": caption_figures(items, said), "losses": photos}
    return found | {"said": said, "seconds": round(seconds, 2), "questions_per_second": round(len(items) / seconds, 1)}


def answer_lines(split: str, who: str, items: list[Item], said: list[str]) -> list[str]:
    """A JSON object for each answer, for other scorers to read: which row's which question, what is true and what was said."""
    lines = []
    for place, (item, text) in enumerate(zip(items, said, strict=True)):
        asked = {"id": f"{split}-{place}" if item.id is None else item.id, "number": item.number, "split": split, "asked": who}
        images = [str(image) for image in item.images if isinstance(image, str | Path)]
        question = item.messages[-1]["content"].replace(IMAGE_TOKEN, "").strip()
        true = {"answer": item.answer} | ({"accepted": list(item.accepted)} if item.accepted else {})
        line = {**asked, "kind": item.kind, "images": images, "question": question, **true, "said": text}
        lines.append(json.dumps(line | {"right": is_right(item, text)}, ensure_ascii=False))
    return lines


def results_table(found: dict[str, dict]) -> str:
    """Exact match by kind, a line each, and a column for each who was asked."""

    def cell(figures: dict) -> str:
        return f"{figures['exact_match']:6.1%} ({figures['low']:.1%} to {figures['high']:.1%})"

    first = next(iter(found.values()))
    lines = [["kind", "n", *(ASKED[who] for who in found)]]
    for kind, row in first["by_kind"].items():
        lines.append([kind, f"{row['n']:,}", *(cell(figures["by_kind"][kind]) for figures in found.values())])
    lines.append(["all", f"{first['n']:,}", *(cell(figures) for figures in found.values())])
    lines.append(["perplexity", "", *(f"{figures['perplexity']:6.3f}" for figures in found.values())])
    errors = [f" +- {each['loss_error']:.3f}" if each["loss_error"] else "" for each in found.values()]
    lines.append(["loss", "", *(f"{each['loss']:6.3f}{error}" for each, error in zip(found.values(), errors, strict=True))])
    if beside := [each["seeing"] | {"exact_match": each["seeing"]["better"]} for each in found.values() if "seeing" in each]:
        lines.append(["image helps on", f"{beside[0]['photos']:,}", "", *map(cell, beside)])
    if first["captions"]:
        for key, title in {**BLEU, "cider_d": "CIDEr-D"}.items():
            count = f"{first['captions']['captions']:,}"
            lines.append([title, count, *(f"{figures['captions'][key]:6.3f}" for figures in found.values())])
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    padded = ([line[0].ljust(widths[0]), line[1].rjust(widths[1])] + line[2:] for line in lines)
    return "\n".join("  ".join(x.ljust(width) for x, width in zip(line, widths, strict=True)).rstrip() for line in padded)


def draw_bars(splits: dict[str, dict[str, dict]], path: Path | None = None):
    """A panel for each split: bars of exact match by kind with their 95 % intervals, those without images below; of more
    than MOST_BARS kinds the most frequent."""
    firsts = [next(iter(found.values())) for found in splits.values()]
    answering = max(map(len, splits.values()))
    tallest, height = min(MOST_BARS, max(len(first["by_kind"]) for first in firsts)) + 1, 0.8 / answering
    size = (4.6 * len(splits) + 0.8, 1.4 + 0.2 * tallest * (1 + answering))
    figure = new_figure(figsize=size, layout="constrained")
    for i, (split, found) in enumerate(splits.items()):
        axes = figure.add_subplot(1, len(splits), i + 1)
        frequent = sorted(firsts[i]["by_kind"].items(), key=lambda kind: -kind[1]["n"])[:MOST_BARS]
        kinds = [kind for kind in firsts[i]["by_kind"] if kind in dict(frequent)]
        for k, (who, figures_of) in enumerate(found.items()):
            rows = [*(figures_of["by_kind"][kind] for kind in kinds), figures_of]
            shares = [row["exact_match"] for row in rows]
            reach = [[share - row["low"] for share, row in zip(shares, rows, strict=True)],
                     [row["high"] - share for share, row in zip(shares, rows, strict=True)]]  # fmt: skip
            at = [place + (k - (len(found) - 1) / 2) * height for place in range(len(rows))]
            style = {"error_kw": {"elinewidth": 1, "capsize": 2}, "color": COLOURS[who], "label": ASKED[who]}
            axes.barh(at, shares, height, xerr=reach, **style)
        names = [figures.wrapped(kind, 30, 1) for kind in kinds]
        axes.set_yticks(range(len(rows)), [*names, "all"], parse_math=False)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.axhline(len(rows) - 1.5, color="black", linewidth=0.5)
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.set_title(f"{split}: {firsts[i]['n']:,} questions")
    figure.suptitle("exact match and its 95 % interval")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figures.finish(figure, path)


def summary(splits: dict[str, dict[str, dict]]) -> dict:
    """The figures in one flat object: those of the first split as they are, of others with the split's name before them."""
    flat = {}
    for number, (split, found) in enumerate(splits.items()):
        before = f"{split}_" if number else ""
        for who, figures_of in found.items():
            which = before + ("" if who == "model" else f"{who}_")
            flat |= {f"{which}{key}": figures_of[key] for key in ("exact_match", "perplexity")}
            flat |= {f"{which}{key}": figures_of["captions"][key] for key in (*BLEU, "cider_d") if figures_of["captions"]}
            flat |= {f"{which}{key}": figures_of["seeing"][key] for key in ("gain", "better") if "seeing" in figures_of}
            if who == "model":
                flat[f"{before}n"] = figures_of["n"]
                flat[f"{before}by_kind"] = {kind: row["exact_match"] for kind, row in figures_of["by_kind"].items()}
    return flat


# ---- all of it ---------------------------------------------------------------------------------------------------------


def main(argv=None) -> None:
    args = parse_args(argv)
    device = find_device(args.device)
    model, processor, settings = load_run(args.run, device, args.split_images)
    is_blind = bool(settings.get("blind", False))
    if is_blind and (args.swapped or args.blind or args.blind_run):
        beside = "--swapped, --blind and --blind-run stand beside a model that sees"
        raise ValueError(f"{args.run} was itself trained blind: {beside}")
    asked = {"blind" if is_blind else "model": (model, processor)}
    asked |= {"swapped": (model, processor)} if args.swapped else {}
    asked |= {"blanked": (model, processor)} if args.blind else {}
    asked |= {"blind": load_twin(args.blind_run, device, settings)} if args.blind_run else {}
    splits, where = find_items(args, settings)
    if where.get("trained_on_it"):
        print(f"{where['data']} is what {args.run} was trained on: what it has memorised counts as right here")

    out = args.out or args.run
    make_folder("--out", out)
    read = [where.get("data"), *(image for items in splits.values() for item in items for image in item.images)]
    read = {file for file in read if isinstance(file, str | Path)}
    for name in ("eval.json", "answers.jsonl", "eval.png"):
        check_output("--out", out / name, read)
    result, counts, answers = {}, {}, []
    for split, items in splits.items():
        kept = without_long(items, asked.values())
        if not kept:
            raise ValueError(f"none of {len(items)} questions fits the context of {model.config.text_config.context_length}")
        images = len({image_key(image) for item in kept for image in item.images})
        counts[split] = {"questions": len(kept), "images": images, "too_long": len(items) - len(kept)}
        left_out = f", {len(items) - len(kept)} left out as too long" if len(items) > len(kept) else ""
        print(f"\n{split}: {len(kept):,} questions about {images:,} images{left_out}", flush=True)
        encoded = {id(model): {} for model, _ in asked.values()}
        result[split] = {
            who: measure(*pair_of, kept, who, args, where["dataset"], encoded[id(pair_of[0])]) for who, pair_of in asked.items()
        }
        losses = {who: each.pop("losses") for who, each in result[split].items()}
        for who in asked.keys() - {"model"} if len(losses.get("model", ())) > 1 else ():
            result[split][who]["seeing"] = compare(losses["model"], losses[who])
        answers += [line for who, each in result[split].items() for line in answer_lines(split, who, kept, each.pop("said"))]
        print(results_table(result[split]), flush=True)

    flags = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    write_json(out / "eval.json", {"settings": flags, "data": where, "counts": counts, "splits": result})
    write_atomic(out / "answers.jsonl", lambda temporary: temporary.write_text("\n".join(answers) + "\n", encoding="utf-8"))
    draw_bars(result, out / "eval.png")
    print(f"\n{out / 'eval.json'}, {out / 'answers.jsonl'}, {out / 'eval.png'}")
    print(json.dumps(summary(result)))


if __name__ == "__main__":
    run_cli(main)
