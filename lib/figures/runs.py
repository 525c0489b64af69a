"""What a training run draws: curves, confusion matrices, and sheets of images with captions or answers."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from lib.figures.common import BLUE, RED, finish, new_figure, show_image, wrapped


def curves(rows: list[dict], path=None):
    """rows: metrics.jsonl. One panel for each figure in it, over the steps from 0 on."""
    panels = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("step", "seconds", "epoch")]
    columns = min(4, max(1, len(panels)))
    lines = max(1, math.ceil(len(panels) / columns))
    figure = new_figure(figsize=(3.4 * columns, 2.6 * lines), layout="constrained")
    for i, key in enumerate(panels):
        axes = figure.add_subplot(lines, columns, i + 1)
        points = [(row["step"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points, strict=True), color=BLUE, marker="." if len(points) < 30 else None)
        axes.set_title(key.replace("_", " "))
        axes.set_xlabel("step")
        axes.set_xlim(0, 1.03 * max(1, rows[-1]["step"]))
        axes.xaxis.get_major_locator().set_params(integer=True)
        if key.endswith(("exact_match", "accuracy")):
            axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.3)
    return finish(figure, path)


def confusion(matrix: torch.Tensor, classes: Sequence[str], path=None):
    """matrix [K, K]: how often the true class (row) was called the predicted one (column). Numbers only where they fit."""
    K = len(classes)
    figure = new_figure(figsize=(max(4.0, 0.5 * min(K, 40) + 1.5),) * 2, layout="constrained")
    axes = figure.add_subplot()
    share = matrix.float() / matrix.sum(dim=1, keepdim=True).clamp(min=1)
    axes.imshow(share.numpy(), cmap="cividis", vmin=0, vmax=1)
    if K <= 40:
        axes.set_xticks(range(K), classes, rotation=90, parse_math=False)
        axes.set_yticks(range(K), classes, parse_math=False)
    if K <= 20:
        for i, j in matrix.nonzero().tolist():
            color = "black" if share[i, j] > 0.5 else "white"
            axes.text(j, i, int(matrix[i, j]), ha="center", va="center", color=color, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"{int(matrix.diagonal().sum())} of {int(matrix.sum())} right")
    return finish(figure, path)


def sheet(images, captions: Sequence[str], path=None, title: str = "", columns: int = 8, good=None, side=1.35):
    """images uint8 [N, C, H, W], or a list of them in several sizes, with a caption under each; good: a bool for each caption,
    which colours it; side: inches an image."""
    columns = max(1, min(columns, len(images)))
    lines = max(1, math.ceil(len(images) / columns))
    height = side + 0.16 * max((caption.count("\n") for caption in captions), default=0)
    figure = new_figure(figsize=(side * columns, height * lines + 0.4), layout="constrained")
    figure.suptitle(title if len(images) else f"{title}: none", parse_math=False)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        axes = figure.add_subplot(lines, columns, i + 1)
        show_image(axes, image)
        color = "black" if good is None else (BLUE if good[i] else RED)
        place = {"ha": "center", "va": "top", "transform": axes.transAxes}
        axes.text(0.5, -0.05, caption, fontsize=8, color=color, parse_math=False, **place)
    return finish(figure, path)


def patch_filters(weight: torch.Tensor, path=None, most: int = 128):
    """weight [D, C, h, w] of a patch embedding: what each of its outputs looks for, strongest first, each scaled alone."""
    order = weight.flatten(1).norm(dim=1).argsort(descending=True)[:most]
    filters = weight[order].detach().float().cpu()
    low, high = (f(filters, dim=(1, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    filters = (filters - low) / (high - low).clamp(min=1e-8)
    if filters.shape[1] not in (1, 3):
        filters = filters.mean(dim=1, keepdim=True)
    count, columns = len(filters), 16
    lines, zoom = math.ceil(count / columns), math.ceil(32 / max(filters.shape[2:]))
    tiles = filters.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    tiles = F.pad(tiles, (4, 4, 4, 4, 0, 0, 0, lines * columns - count), value=1.0)  # white between them and after the last
    figure = new_figure(figsize=(0.5 * columns, 0.5 * lines + 0.5), layout="constrained")
    figure.suptitle(f"patch filters: {count} of {len(weight)}, strongest first")
    # as one image: 128 axes would take a second
    show_image(figure.add_subplot(), torch.cat([torch.cat(list(line), dim=2) for line in tiles.split(columns)], dim=1))
    return finish(figure, path)


def answer_sheet(
    images: Sequence[torch.Tensor],
    questions: Sequence[str],
    answers: Sequence[str],
    truths: Sequence[str | None],
    path=None,
    title: str = "",
    columns: int = 4,
    good: Sequence[bool | None] | None = None,
):
    """Images uint8 [3, h, w], under each the question, what the model said and, where that is wrong, the truth.

    good: which answers count as right, None for one that is not judged; by default those that equal the truth but for case
    and spaces, and none is judged that has no truth. Right and wrong differ in colour and in the sign before the answer.
    """
    same = [None if t is None else a.lower().split() == t.lower().split() for a, t in zip(answers, truths, strict=True)]
    good = same if good is None else good
    looks = {True: ("\N{CHECK MARK} ", BLUE), False: ("\N{BALLOT X} ", RED), None: ("", "black")}
    captions = []  # of each image, (text, colour) from top to bottom
    for question, answer, truth, right in zip(questions, answers, truths, good, strict=True):
        sign, color = looks[right]
        captions.append([(wrapped(question, 34, 3), "black"), (wrapped(sign + answer, 34, 5), color)])
        if truth is not None and not right:
            captions[-1].append((wrapped(f"truth: {truth}", 34, 5), "black"))
    columns = max(1, min(columns, len(captions)))
    rows = [captions[i : i + columns] for i in range(0, len(captions), columns)] or [[]]
    text = [max((sum(1 + t.count("\n") for t, _ in caption) for caption in row), default=0) * 0.15 + 0.1 for row in rows]
    title = wrapped(title, 24 * columns, 3)
    height = sum(text) + 1.9 * len(rows) + 0.2 * (1 + title.count("\n")) + 0.2
    figure = new_figure(figsize=(2.5 * columns, height), layout="constrained")
    figure.suptitle(title, parse_math=False)
    grid = figure.add_gridspec(2 * len(rows), columns, height_ratios=[h for below in text for h in (1.9, below)])
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(i, columns)
        axes = figure.add_subplot(grid[2 * row, column])
        show_image(axes, image)
        below, line = figure.add_subplot(grid[2 * row + 1, column]), 0
        below.set_axis_off()
        for words, color in caption:
            y = 1 - line * 0.15 / text[row]
            below.text(0.5, y, words, ha="center", va="top", fontsize=8, color=color, linespacing=1.25, parse_math=False)
            line += 1 + words.count("\n")
    return finish(figure, path)
