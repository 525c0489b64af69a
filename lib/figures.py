"""Every picture this project draws: curves, confusion matrices, sheets of pictures with captions or answers, patch filters,
and where a model looked.

Functions take tensors and write a PNG (or return the figure when path is None); they compute nothing about a model.
Colours are the colour-blind safe ones of Okabe and Ito, and of matplotlib's viridis and cividis.
"""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageFont

from lib.files import write_atomic

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


def sheet(images, captions: Sequence[str], path=None, title: str = "", columns: int = 8, good=None, side=1.35) -> Figure:
    """images uint8 [N, C, H, W], or a list of them in several sizes, with a caption under each; good: a bool for each caption,
    which colours it; side: inches a picture."""
    columns = max(1, min(columns, len(images)))
    lines = max(1, math.ceil(len(images) / columns))
    height = side + 0.16 * max((caption.count("\n") for caption in captions), default=0)
    figure = Figure(figsize=(side * columns, height * lines + 0.4), layout="constrained")
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


# ---- for the notebooks: words, numbers and patches, one picture each --------------------------------------------------

# Told apart by the colour-blind, and light enough for black letters on them.
SHADES = ("#E8E8E8", "#8EC9F0", "#F4C430", "#7FD6B8", "#F0A07C", "#D9A6C8", "#F5EE8B", "#B3B3E6")


def visible(token: str) -> str:
    """A token as it can be printed: a blank at either end and line breaks get a sign, what no font can draw a replacement
    character."""
    token = token.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
    bare = token.strip(" ")
    ends = token.split(bare, 1) if bare else [token, ""]
    token = bare.join("\N{OPEN BOX}" * len(end) for end in ends)
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in token)


def fitted(text: str, inches: float, most: float = 9.0) -> float:
    """The font size, in points, at which a text is no wider than so many inches."""
    return min(most, 72 * inches / (0.65 * max(1, len(text))))


def token_strip(rows: Mapping[str, Sequence], kinds: Mapping[str, Sequence] | None = None, path=None, title="", columns=12):
    """Tokens as a strip of boxes. rows: name -> a text, or a patch uint8 [3, h, w], for each token; all of one length.
    kinds: row name -> a word for each token, such as "image" or "answer": equal words share a colour, and a legend says which.
    The strip goes on below after so many columns. Returns the figure."""
    count = max((len(cells) for cells in rows.values()), default=0)
    columns = max(1, min(columns, count))
    lines, R = max(1, math.ceil(count / columns)), len(rows)
    kinds = kinds or {}
    names = list(dict.fromkeys(str(kind) for row in kinds.values() for kind in row))
    if len(names) >= len(SHADES):
        raise ValueError(f"{len(names)} kinds of tokens: there are colours for {len(SHADES) - 1}")
    shade = dict(zip(names, SHADES[1 : len(names) + 1], strict=True))
    label = 0.3 + 0.08 * max((len(name) for name in rows), default=0)  # inches, on the left
    width, box = max(0.5, min(0.85, 10.5 / columns)), 0.34
    height = lines * (R * box + 0.15) + (0.35 if title else 0.05) + (0.35 if names else 0.05)
    figure = Figure(figsize=(label + width * columns + 0.1, height))
    axes = figure.add_axes([0, 0, 1, 1])
    axes.set_axis_off()
    top = 0.35 if title else 0.05
    axes.text(0.1, 0.18, title, va="center", fontsize=11, parse_math=False)
    for r, (name, cells) in enumerate(rows.items()):
        for line in range(lines):
            y = top + line * (R * box + 0.15) + r * box
            axes.text(label - 0.1, y + box / 2, name, ha="right", va="center", fontsize=9, parse_math=False)
        for i, cell in enumerate(cells):
            line, column = divmod(i, columns)
            x, y = label + column * width, top + line * (R * box + 0.15) + r * box
            colour = shade[str(kinds[name][i])] if name in kinds else SHADES[0]
            axes.add_patch(Rectangle((x + 0.02, y + 0.02), width - 0.04, box - 0.04, facecolor=colour, edgecolor=GREY, lw=0.5))
            if isinstance(cell, torch.Tensor):
                middle, side = x + width / 2, box / 2 - 0.03
                around = (middle - side, middle + side, y + box / 2 + side, y + box / 2 - side)
                axes.imshow(cell.permute(1, 2, 0).numpy(), extent=around, interpolation="nearest", zorder=3)
                continue
            text = visible(str(cell))
            size = fitted(text, width - 0.06)
            axes.text(x + width / 2, y + box / 2, text, ha="center", va="center", fontsize=size, parse_math=False)
    x = label
    for name in names:
        axes.add_patch(Rectangle((x, height - 0.26), 0.18, 0.18, facecolor=shade[name], edgecolor=GREY, lw=0.5))
        axes.text(x + 0.24, height - 0.17, name, va="center", fontsize=9, parse_math=False)
        x += 0.45 + 0.085 * len(name)
    axes.set(xlim=(0, figure.get_figwidth()), ylim=(height, 0), aspect="auto")
    return finish(figure, path)


def heat_map(
    values: torch.Tensor, rows=None, columns=None, path=None, title="", text=None, low=None, high=None, x="", y="", scale=True
):
    """values [R, C] as coloured squares, brighter is more, white for nan; rows, columns: their names, [] for no ticks.
    text: what stands in each square, as [R][C] strings or a format such as "{:.2f}"; low, high: the ends of the colour scale,
    which is drawn beside it unless scale is False; x, y: what the axes are."""
    values = values.detach().float().cpu()
    R, C = values.shape
    known = values[~values.isnan()]
    low = float(known.min()) if low is None else low
    high = float(known.max()) if high is None else high
    cells = [[text.format(v) for v in row] for row in values.tolist()] if isinstance(text, str) else text
    widest = max((len(visible(cell)) for row in cells or () for cell in row), default=0)
    side = max(0.3, min(0.62, 5.5 / max(R, C)))
    across = max(side, 0.075 * widest + 0.15)
    if R > 20 or C > 20:
        side = across = max(0.02, 4.2 / max(R, C))
    margin = 0.5 + 0.075 * max((len(name) for name in rows or ()), default=0)
    turned = any(0.09 * len(name) > across for name in columns or ())
    foot = 0.5 + (0.08 * max(len(name) for name in columns) if turned else 0.1)
    figure = Figure(figsize=(margin + C * across + 1.0, foot + R * side + 0.5), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.imshow(values.numpy(), cmap="cividis", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    for axis, names, n in ((axes.xaxis, columns, C), (axes.yaxis, rows, R)):
        if names is not None:
            rotation = 90 if axis is axes.xaxis and turned else 0
            axis.set_ticks(range(n) if names else [], list(map(visible, names)), rotation=rotation, fontsize=min(9, 60 * side))
            for label in axis.get_ticklabels():
                label.set_parse_math(False)
    for r, row in enumerate(cells or ()):
        for c, cell in enumerate(row):
            colour = "black" if float(values[r, c]) > (low + high) / 2 else "white"
            size = fitted(cell, across - 0.06)
            axes.text(c, r, visible(cell), ha="center", va="center", color=colour, fontsize=size,
                      parse_math=False)  # fmt: skip
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=11, parse_math=False, wrap=True)
    if scale:
        figure.colorbar(drawn, fraction=0.05, pad=0.02)
    return finish(figure, path)


def bar_chart(groups: Mapping[str, Sequence[float]], labels: Sequence[str], path=None, title: str = "", form: str = "{:.1%}"):
    """A panel of horizontal bars for each group, side by side, with the number at the end of each bar; labels: of the bars,
    the same in all panels; where a number is NaN there is none. form: how a number is written."""
    most = max((float(v) for row in groups.values() for v in row if not math.isnan(v)), default=1.0) or 1.0
    left = 0.4 + 0.085 * max((len(label) for label in labels), default=0)
    size = (left + 2.3 * max(1, len(groups)), 0.27 * len(labels) + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    for i, (name, row) in enumerate(groups.items()):
        axes = figure.add_subplot(1, len(groups), i + 1)
        row, names = [float(value) for value in row], [""] * len(labels) if i else list(map(visible, labels))
        axes.barh(range(len(row)), row, color=BLUE)
        for k, value in enumerate(row):
            if not math.isnan(value):
                axes.text(value + 0.02 * most, k, form.format(value), va="center", fontsize=8)
        axes.set(xlim=(0, 1.35 * most), ylim=(len(row) - 0.4, -0.6))
        axes.set_yticks(range(len(row)), names)
        axes.set_xticks([])
        axes.set_title(name, fontsize=10, parse_math=False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    return finish(figure, path)


def line_chart(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], path=None, title="", x="", y="", log=False):
    """Several curves in one panel: name -> (xs, ys). Told apart by colour, by dashes and by their markers, so that a print in
    grey will do. log: a logarithmic y axis."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    styles = [*zip((BLUE, RED, GREEN, ORANGE, "black", GREY), ("-", "--", "-.", ":", "-", "--"), "os^Dvx", strict=True)]
    if len(series) > len(styles):
        raise ValueError(f"{len(series)} curves in one panel: six can be told apart")
    for (name, (xs, ys)), (colour, dash, marker) in zip(series.items(), styles[: len(series)], strict=True):
        axes.plot(xs, ys, dash, color=colour, label=name, marker=marker if len(xs) <= 30 else None, markersize=4)
    axes.set(xlabel=x, ylabel=y, yscale="log" if log else "linear")
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.grid(alpha=0.3)
    if series:
        axes.legend(frameon=False)
    return finish(figure, path)


def stacked_bars(parts: Mapping[str, Sequence[float]], labels: Sequence[str], path=None, title="", x="", form="{:,.0f}"):
    """A horizontal bar for each label, put together from the parts (name -> one number for each label), with the sum at its
    end. Parts are told apart by colour and by hatching. Raises ValueError for more than seven."""
    size = (0.8 + 0.085 * max((len(label) for label in labels), default=0) + 5.5, 0.36 * len(labels) + 1.2)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    ends = [0.0] * len(labels)
    styles = [*zip(SHADES[1:], ("", "///", "...", "xx", "---", "\\\\", "oo"), strict=True)]
    if len(parts) > len(styles):
        raise ValueError(f"{len(parts)} parts of a bar: seven can be told apart")
    for (name, row), (colour, hatch) in zip(parts.items(), styles[: len(parts)], strict=True):
        axes.barh(range(len(row)), row, left=ends, label=name, facecolor=colour, edgecolor="black", lw=0.4, hatch=hatch)
        ends = [end + float(value) for end, value in zip(ends, row, strict=True)]
    for k, end in enumerate(ends):
        axes.text(end + 0.01 * max(ends), k, form.format(end), va="center", fontsize=9)
    axes.set(xlim=(0, 1.15 * max(ends, default=1)), ylim=(len(labels) - 0.4, -0.6), xlabel=x)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return finish(figure, path)


def code_book(values: torch.Tensor, code: Sequence[float], path=None, title: str = "", bins: int = 80) -> Figure:
    """How often numbers come up, values [n] within the code's range, and the few numbers of a code that are to stand for them:
    a line each, with its index above and, between the lines, bands that go to one of them."""
    low, high = float(min(code)), float(max(code))
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    edges = [low, *((a + b) / 2 for a, b in zip(code[:-1], code[1:], strict=True)), high]
    for k, (left, right) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        axes.axvspan(left, right, color=SHADES[0] if k % 2 else "white", lw=0)
    counts = torch.histc(values.detach().float().cpu(), bins, low, high)
    width = (high - low) / bins
    axes.bar([low + (i + 0.5) * width for i in range(bins)], counts.tolist(), width, color=SHADES[1])
    axes.vlines(code, 0, float(counts.max()), color=RED, lw=1.2)
    for k, value in enumerate(code):
        axes.text(value, 1.02 * float(counts.max()), k, ha="center", va="bottom", fontsize=8)
    axes.set(xlim=(low - 0.02, high + 0.02), ylim=(0, 1.12 * float(counts.max())), yticks=[])
    axes.set_title(title, fontsize=11, parse_math=False)
    return finish(figure, path)


def clouds(groups: Mapping[str, torch.Tensor], names: Mapping[str, Sequence[str]] | None = None, path=None, title="") -> Figure:
    """Points in a plane: group -> [M, 2], told apart by colour and marker. names: of a group's points, written beside them."""
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    styles = [*zip((BLUE, RED, GREEN, ORANGE, "black"), "os^Dx", strict=True)]
    if len(groups) > len(styles):
        raise ValueError(f"{len(groups)} groups in one panel: five can be told apart")
    labelled = []
    for (group, points), (colour, marker) in zip(groups.items(), styles[: len(groups)], strict=True):
        points = points.detach().float().cpu()
        size = 70 if len(points) < 4 else 16
        axes.scatter(*points.T.tolist(), s=size, c=colour, marker=marker, alpha=0.7, label=group, linewidths=0.8)
        labelled += zip(points.tolist(), names[group], strict=True) if names and group in names else []
    everything = torch.cat([points.detach().float().cpu() for points in groups.values()])
    low, high = everything.amin(dim=0), everything.amax(dim=0)
    scale = torch.tensor([400.0, 280.0]) / (high - low).clamp(min=1e-12)  # about so many points of print
    taken = []  # middle and width of each name, in points
    line = {"arrowstyle": "-", "lw": 0.4, "color": GREY, "shrinkA": 0, "shrinkB": 2}
    for point, name in labelled:
        x, y = ((torch.tensor(point) - low) * scale).tolist()
        width = 5.0 * len(name) + 4
        for turn in range(200):  # outwards on a spiral, until there is room
            far, angle = 9 + 0.8 * turn, 0.7 * turn
            dx, dy = (far + width / 2) * math.cos(angle), far * math.sin(angle)
            if all(abs(x + dx - a) > (width + w) / 2 or abs(y + dy - b) > 10 for a, b, w in taken):
                break
        taken.append((x + dx, y + dy, width))
        about = {"textcoords": "offset points", "ha": "center", "va": "center", "arrowprops": line if turn > 2 else None}
        axes.annotate(visible(name), point, (dx, dy), fontsize=8, parse_math=False, **about)
    axes.set(xticks=[], yticks=[])
    axes.margins(0.12)
    axes.set_title(title, fontsize=11, parse_math=False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return finish(figure, path)


def patch_grid(image: torch.Tensor, patch: tuple[int, int], path=None, title="", apart=False, numbers=True, mark=()):
    """image uint8 [C, H, W] with the lines along which it is cut into patches (height, width in pixels), and the number of
    each; apart: the patches with gaps between them; mark: numbers of patches to frame. Raises ValueError unless they fit."""
    (H, W), (h, w) = image.shape[1:], patch
    if H % h or W % w:
        raise ValueError(f"a {H}x{W} picture cannot be cut into {h}x{w} patches")
    gap = max(1, round(0.12 * min(h, w))) if apart else 0
    across, down = W // w, H // h
    canvas = torch.full((3, H + gap * (down - 1), W + gap * (across - 1)), 255, dtype=torch.uint8)
    corners = [(r * (h + gap), c * (w + gap)) for r in range(down) for c in range(across)]
    for k, (top, left) in enumerate(corners):
        r, c = divmod(k, across)
        canvas[:, top : top + h, left : left + w] = image[:, r * h : (r + 1) * h, c * w : (c + 1) * w]
    figure = Figure(figsize=(3.9 * W / max(H, W) + 0.2, 3.9 * H / max(H, W) + 0.4), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(canvas.permute(1, 2, 0).numpy(), interpolation="nearest", extent=(0, canvas.shape[2], canvas.shape[1], 0))
    axes.set_axis_off()
    axes.set_title(title, fontsize=11, parse_math=False, wrap=True)
    for k, (top, left) in enumerate(corners):
        if not apart:
            axes.add_patch(Rectangle((left, top), w, h, fill=False, edgecolor="white", lw=1))
        if k in mark:
            axes.add_patch(Rectangle((left, top), w, h, fill=False, edgecolor=ORANGE, lw=3, zorder=3))
        if numbers and len(corners) <= 256:
            shade = {"facecolor": "black", "alpha": 0.55, "edgecolor": "none", "pad": 0.8}
            axes.text(left + w / 2, top + h / 2, k, color="white", ha="center", va="center", fontsize=min(10, 90 / across),
                      bbox=shade)  # fmt: skip
    return finish(figure, path)


def pca(layers: Sequence[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
    """The three directions in which a layer's tokens differ most, 0..1: layers of [N, D] -> [layers, 3, *grid].

    A direction may as well point the other way: each is turned to agree with the layer before. The faintest and the
    brightest fiftieth are cut off."""
    found = []
    for tokens in layers:
        tokens = tokens.detach().double().cpu()
        U, S, _ = torch.linalg.svd(tokens - tokens.mean(dim=0), full_matrices=False)
        parts = F.pad(U[:, :3] * S[:3], (0, max(0, 3 - U.shape[1]))).T
        if found:
            turn = torch.where((parts * found[-1]).sum(dim=1) < 0, -1.0, 1.0)
            parts = parts * turn[:, None]
        found.append(parts)
    parts = torch.stack(found)
    low, high = (parts.quantile(q, dim=2, keepdim=True) for q in (0.02, 0.98))
    return ((parts - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).float().unflatten(2, grid)


def pca_grid(image: torch.Tensor, parts: torch.Tensor, names: Sequence[str], path=None, title: str = "") -> Figure:
    """A picture, uint8 [C, H, W], and what its patches are like, layer by layer: parts [layers, 3, gh, gw] of `pca`. Above, the
    three directions as red, green and blue; below, the first alone, for all who see colours otherwise and for grey prints."""
    figure = Figure(figsize=(1.45 * (len(parts) + 1), 3.6), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    panels = [(0, image.permute(1, 2, 0).expand(-1, -1, 3).numpy(), "the picture", {})]
    for i, (part, name) in enumerate(zip(parts, names, strict=True), start=1):
        panels.append((i, part.permute(1, 2, 0).numpy(), name, {}))
        panels.append((i + len(parts) + 1, part[0].numpy(), "", {"cmap": "cividis", "vmin": 0, "vmax": 1}))
    for place, pixels, name, options in panels:
        axes = figure.add_subplot(2, len(parts) + 1, place + 1)
        axes.imshow(pixels, interpolation="nearest", **options)
        axes.set_axis_off()
        axes.set_title(name, fontsize=9, parse_math=False)
    return finish(figure, path)


def pca_gif(parts: torch.Tensor, names: Sequence[str], path=None, side: int = 320, still: float = 0.7) -> bytes:
    """The same as a moving picture, for ever: each layer stands `still` seconds and fades into the next. parts
    [layers, 3, gh, gw]; side: of the larger one of the picture's edges, in pixels, under a line with the layer's name."""
    scale = max(1, side // max(parts.shape[-2:]))
    large = parts.repeat_interleave(scale, -2).repeat_interleave(scale, -1).permute(0, 2, 3, 1)
    frames, times, steps = [], [], 4
    for i, name in enumerate(names):
        following = large[(i + 1) % len(large)]
        for k in range(steps):
            pixels = large[i] + (following - large[i]) * k / steps
            frame = Image.new("RGB", (pixels.shape[1], pixels.shape[0] + 28), "white")
            frame.paste(Image.fromarray((pixels * 255).round().to(torch.uint8).numpy()), (0, 28))
            ImageDraw.Draw(frame).text((6, 5), name, fill="black", font=ImageFont.load_default(16))
            frames.append(frame.quantize(128))
            times.append(int(1000 * still) if k == 0 else 80)
    out = io.BytesIO()
    frames[0].save(out, format="GIF", save_all=True, append_images=frames[1:], duration=times, loop=0, disposal=2)
    if path is not None:
        write_atomic(path, lambda tmp: Path(tmp).write_bytes(out.getvalue()))
    return out.getvalue()
