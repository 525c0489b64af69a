"""Every picture this project draws: curves, confusion matrices, sheets of pictures with captions or answers, patch filters,
and where a model looked.

Functions take tensors and write a PNG (or return the figure when path is None); they compute nothing about a model.
Colours are the colour-blind safe ones of Okabe and Ito, and of matplotlib's viridis and cividis.
"""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure

from checkpoint import write_atomic

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"


def finish(figure: Figure, path: Path | str | None) -> Figure:
    if path is not None:
        write_atomic(path, lambda tmp: figure.savefig(tmp, dpi=120, format="png"))
    return figure


def curves(rows: list[dict], path=None) -> Figure:
    """rows: metrics.jsonl. One panel for each figure in it, over the steps."""
    panels = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("step", "seconds", "epoch")]
    columns = min(4, max(1, len(panels)))
    lines = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(3.4 * columns, 2.6 * lines), layout="constrained")
    for i, key in enumerate(panels):
        axes = figure.add_subplot(lines, columns, i + 1)
        points = [(row["step"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points, strict=True), color=BLUE, marker="." if len(points) < 30 else None)
        axes.set_title(key.replace("_", " "))
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    return finish(figure, path)


def confusion(matrix: torch.Tensor, classes: Sequence[str], path=None) -> Figure:
    """matrix [K, K]: how often the true class (row) was called the predicted one (column). Numbers only where they fit."""
    K = len(classes)
    figure = Figure(figsize=(max(4.0, 0.5 * min(K, 40) + 1.5),) * 2, layout="constrained")
    axes = figure.add_subplot()
    share = matrix.float() / matrix.sum(dim=1, keepdim=True).clamp(min=1)
    axes.imshow(share.numpy(), cmap="cividis", vmin=0, vmax=1)
    if K <= 40:
        axes.set_xticks(range(K), classes, rotation=90)
        axes.set_yticks(range(K), classes)
    if K <= 20:
        for i, j in matrix.nonzero().tolist():
            colour = "black" if share[i, j] > 0.5 else "white"
            axes.text(j, i, int(matrix[i, j]), ha="center", va="center", color=colour, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"{int(matrix.diagonal().sum())} of {int(matrix.sum())} right")
    return finish(figure, path)


def sheet(images: torch.Tensor, captions: Sequence[str], path=None, title: str = "", columns: int = 8, good=None) -> Figure:
    """images uint8 [N, C, H, W] with a caption under each; good: a bool for each caption, which colours it."""
    columns = max(1, min(columns, len(images)))
    lines = max(1, math.ceil(len(images) / columns))
    height = 1.35 + 0.16 * max((caption.count("\n") for caption in captions), default=0)
    figure = Figure(figsize=(1.35 * columns, height * lines + 0.4), layout="constrained")
    figure.suptitle(title if len(images) else f"{title}: none")
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        axes = figure.add_subplot(lines, columns, i + 1)
        axes.imshow(image.permute(1, 2, 0).expand(-1, -1, 3).numpy(), interpolation="nearest")
        axes.set_axis_off()
        colour = "black" if good is None else (BLUE if good[i] else RED)
        axes.text(0.5, -0.05, caption, transform=axes.transAxes, ha="center", va="top", fontsize=8, color=colour)
    return finish(figure, path)


def patch_filters(weight: torch.Tensor, path=None, most: int = 128) -> Figure:
    """weight [D, C, h, w] of a patch embedding: what each of its outputs looks for, strongest first, each scaled alone."""
    order = weight.flatten(1).norm(dim=1).argsort(descending=True)[:most]
    filters = weight[order].detach().float().cpu()
    low, high = (f(filters, dim=(1, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    filters = (filters - low) / (high - low).clamp(min=1e-8)
    if filters.shape[1] not in (1, 3):
        filters = filters.mean(dim=1, keepdim=True)
    columns = 16
    lines = math.ceil(len(filters) / columns)
    figure = Figure(figsize=(0.5 * columns, 0.5 * lines + 0.5))
    figure.suptitle(f"patch filters: {len(filters)} of {len(weight)}, strongest first")
    for i, tile in enumerate(filters):
        axes = figure.add_subplot(lines, columns, i + 1)
        axes.imshow(tile.permute(1, 2, 0).expand(-1, -1, 3).numpy(), interpolation="nearest")
        axes.set_axis_off()
    return finish(figure, path)


def wrapped(text: str, width: int, lines: int) -> str:
    """The text in at most so many lines; three dots where it is cut. What no font can draw becomes a replacement character."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" ..."))


def answer_sheet(
    images: Sequence[torch.Tensor],
    questions: Sequence[str],
    answers: Sequence[str],
    truths: Sequence[str | None],
    path=None,
    title: str = "",
    columns: int = 4,
    good: Sequence[bool | None] | None = None,
) -> Figure:
    """Pictures uint8 [3, h, w], under each the question, what the model said and, where that is wrong, the truth.

    good: which answers count as right, None for one that is not judged; by default those that equal the truth but for case
    and blanks, and none is judged that has no truth. Right and wrong differ in colour and in the sign before the answer.
    """
    same = [None if t is None else a.lower().split() == t.lower().split() for a, t in zip(answers, truths, strict=True)]
    good = same if good is None else good
    looks = {True: ("\N{CHECK MARK} ", BLUE), False: ("\N{BALLOT X} ", RED), None: ("", "black")}
    captions = []  # of each picture, (text, colour) from top to bottom
    for question, answer, truth, right in zip(questions, answers, truths, good, strict=True):
        sign, colour = looks[right]
        captions.append([(wrapped(question, 34, 3), "black"), (wrapped(sign + answer, 34, 5), colour)])
        if truth is not None and not right:
            captions[-1].append((wrapped(f"truth: {truth}", 34, 5), "black"))
    columns = max(1, min(columns, len(captions)))
    rows = [captions[i : i + columns] for i in range(0, len(captions), columns)] or [[]]
    text = [max((sum(1 + t.count("\n") for t, _ in caption) for caption in row), default=0) * 0.15 + 0.1 for row in rows]
    figure = Figure(figsize=(2.5 * columns, sum(text) + 1.9 * len(rows) + 0.4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    grid = figure.add_gridspec(2 * len(rows), columns, height_ratios=[h for below in text for h in (1.9, below)])
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(i, columns)
        axes = figure.add_subplot(grid[2 * row, column])
        axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_axis_off()
        below, line = figure.add_subplot(grid[2 * row + 1, column]), 0
        below.set_axis_off()
        for words, colour in caption:
            y = 1 - line * 0.15 / text[row]
            below.text(0.5, y, words, ha="center", va="top", fontsize=8, color=colour, linespacing=1.25, parse_math=False)
            line += 1 + words.count("\n")
    return finish(figure, path)


def heat_over(image: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """image uint8 [3, h, w] as a dim grey, and over it heat [gh, gw] from 0 to 1: floats [h, w, 3]. The hotter, the brighter:
    that survives a grey print, and no picture is as bright as what is looked at."""
    grey = (image.float() / 255).mean(dim=0)[..., None]
    low, high = grey.min(), grey.max()
    grey = 0.1 + 0.4 * (grey - low) / (high - low).clamp(min=0.1)
    heat = F.interpolate(heat[None, None].float(), image.shape[1:], mode="bicubic").clamp(0, 1)[0, 0]
    colour = torch.from_numpy(colormaps["inferno"](heat.numpy())[..., :3]).float()
    strength = 0.7 * heat[..., None]
    return (1 - strength) * grey + strength * colour


def attention_overlay(
    images: Sequence[torch.Tensor],
    words: Sequence[str],
    maps: torch.Tensor,
    path=None,
    title: str = "",
    columns: int = 7,
    most: int = 70,
) -> Figure:
    """Where a model looked for each word: images uint8 [3, h, w], maps [words, images, gh, gw] (attention_maps.py).

    A panel a word, with the pictures one below the other and the word's share of attention that went to them; at the left
    the pictures as they are. A word's hottest place is white-yellow whatever its share is. No more than `most` words.
    """
    count = min(len(words), most)
    columns = max(1, min(columns, count))
    lines, I = max(1, math.ceil(count / columns)), len(images)
    figure = Figure(figsize=(1.5 * (columns + 1), lines * (1.5 * I + 0.45) + 0.5), layout="constrained")
    note = f" (the first {count} of {len(words)} words)" if count < len(words) else ""
    figure.suptitle(wrapped(title + note, 16 * (columns + 1), 4), fontsize=11, parse_math=False)

    def panel(line, i, column, pixels):
        axes = figure.add_subplot(lines * I, columns + 1, (line * I + i) * (columns + 1) + column + 1)
        axes.imshow(pixels, interpolation="nearest")
        axes.set_axis_off()
        return axes

    for line in range(lines):
        for i, image in enumerate(images):
            panel(line, i, 0, image.permute(1, 2, 0).numpy())
    for k in range(count):
        line, column = divmod(k, columns)
        hottest = maps[k].max().clamp(min=1e-12)
        for i, image in enumerate(images):
            axes = panel(line, i, column + 1, heat_over(image, maps[k, i] / hottest).numpy())
            if i == 0:
                axes.set_title(f"{wrapped(words[k], 16, 2)}\n{float(maps[k].sum()):.0%}", fontsize=9, parse_math=False)
    return finish(figure, path)


def word_grid(
    images: torch.Tensor,
    words: Sequence[Sequence[Sequence[str]]],
    patch: tuple[int, int],
    captions: Sequence[str],
    path=None,
    title: str = "",
    columns: int = 4,
    good=None,
) -> Figure:
    """Each patch with its word in it: images uint8 [N, C, H, W]; words of each picture, by row and column of its grid of
    patches (height, width in pixels), which may reach over its edge; a caption over each picture, coloured by good as in
    sheet."""
    columns = max(1, min(columns, len(images)))
    lines = max(1, math.ceil(len(images) / columns))
    across = max((len(row) for grid in words for row in grid), default=1)
    side = max(2.6, min(6.0, 0.72 * across))  # inches
    shade = {"facecolor": "black", "alpha": 0.5, "edgecolor": "none", "pad": 0.8}
    figure = Figure(figsize=(side * columns, (side + 0.3) * lines + 0.4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    for i, (image, grid, caption) in enumerate(zip(images, words, captions, strict=True)):
        axes = figure.add_subplot(lines, columns, i + 1)
        (h, w), (H, W) = patch, (len(grid) * patch[0], len(grid[0]) * patch[1])
        canvas = F.pad(image, (0, W - image.shape[2], 0, H - image.shape[1]))
        axes.imshow(canvas.permute(1, 2, 0).expand(-1, -1, 3).numpy(), interpolation="nearest", extent=(0, W, H, 0))
        axes.set_xticks(range(0, W + 1, w), [])
        axes.set_yticks(range(0, H + 1, h), [])
        axes.tick_params(length=0)
        axes.grid(color=GREY, linewidth=0.5)
        for row, inner in enumerate(grid):
            for column, word in enumerate(inner):
                size = min(9.0, 72 * side / across / (0.78 * max(1, len(word))))  # points, so that it fits into its patch
                axes.text(
                    (column + 0.5) * w, (row + 0.5) * h, wrapped(word, len(word) + 9, 1), color="white", fontsize=size,
                    ha="center", va="center", parse_math=False, bbox=shade,
                )  # fmt: skip
        colour = "black" if good is None else (BLUE if good[i] else RED)
        axes.set_title(caption, fontsize=9, color=colour, parse_math=False)
    return finish(figure, path)
