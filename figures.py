"""Every picture this project draws: training curves, confusion matrices, sheets of captioned pictures, patch filters.

Functions take tensors and write a PNG (or return the figure when path is None); they compute nothing about a model.
Colours are the colour-blind safe ones of Okabe and Ito, and of matplotlib's viridis and cividis.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
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
