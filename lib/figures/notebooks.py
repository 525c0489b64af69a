"""What the notebooks draw: tokens, tables of numbers, and patches."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from lib.figures.common import BLUE, GREEN, GREY, ORANGE, RED, SHADES, finish, fitted, new_figure, rectangle, visible
from lib.files import write_atomic


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
    figure = new_figure(figsize=(label + width * columns + 0.1, height))
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
            color = shade[str(kinds[name][i])] if name in kinds else SHADES[0]
            axes.add_patch(rectangle((x + 0.02, y + 0.02), width - 0.04, box - 0.04, facecolor=color, edgecolor=GREY, lw=0.5))
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
        axes.add_patch(rectangle((x, height - 0.26), 0.18, 0.18, facecolor=shade[name], edgecolor=GREY, lw=0.5))
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
    figure = new_figure(figsize=(margin + C * across + 1.0, foot + R * side + 0.5), layout="constrained")
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
            color = "black" if float(values[r, c]) > (low + high) / 2 else "white"
            size = fitted(cell, across - 0.06)
            axes.text(c, r, visible(cell), ha="center", va="center", color=color, fontsize=size,
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
    figure = new_figure(figsize=size, layout="constrained")
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
    figure = new_figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    styles = [*zip((BLUE, RED, GREEN, ORANGE, "black", GREY), ("-", "--", "-.", ":", "-", "--"), "os^Dvx", strict=True)]
    if len(series) > len(styles):
        raise ValueError(f"{len(series)} curves in one panel: six can be told apart")
    for (name, (xs, ys)), (color, dash, marker) in zip(series.items(), styles[: len(series)], strict=True):
        axes.plot(xs, ys, dash, color=color, label=name, marker=marker if len(xs) <= 30 else None, markersize=4)
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
    figure = new_figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    ends = [0.0] * len(labels)
    styles = [*zip(SHADES[1:], ("", "///", "...", "xx", "---", "\\\\", "oo"), strict=True)]
    if len(parts) > len(styles):
        raise ValueError(f"{len(parts)} parts of a bar: seven can be told apart")
    for (name, row), (color, hatch) in zip(parts.items(), styles[: len(parts)], strict=True):
        axes.barh(range(len(row)), row, left=ends, label=name, facecolor=color, edgecolor="black", lw=0.4, hatch=hatch)
        ends = [end + float(value) for end, value in zip(ends, row, strict=True)]
    for k, end in enumerate(ends):
        axes.text(end + 0.01 * max(ends), k, form.format(end), va="center", fontsize=9)
    axes.set(xlim=(0, 1.15 * max(ends, default=1)), ylim=(len(labels) - 0.4, -0.6), xlabel=x)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return finish(figure, path)


def code_book(values: torch.Tensor, code: Sequence[float], path=None, title: str = "", bins: int = 80):
    """How often numbers come up, values [n] within the code's range, and the few numbers of a code that are to stand for them:
    a line each, with its index above and, between the lines, bands that go to one of them."""
    low, high = float(min(code)), float(max(code))
    figure = new_figure(figsize=(8.4, 3.2), layout="constrained")
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


def clouds(groups: Mapping[str, torch.Tensor], names: Mapping[str, Sequence[str]] | None = None, path=None, title=""):
    """Points in a plane: group -> [M, 2], told apart by colour and marker. names: of a group's points, written beside them."""
    figure = new_figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    styles = [*zip((BLUE, RED, GREEN, ORANGE, "black"), "os^Dx", strict=True)]
    if len(groups) > len(styles):
        raise ValueError(f"{len(groups)} groups in one panel: five can be told apart")
    labelled = []
    for (group, points), (color, marker) in zip(groups.items(), styles[: len(groups)], strict=True):
        points = points.detach().float().cpu()
        size = 70 if len(points) < 4 else 16
        axes.scatter(*points.T.tolist(), s=size, c=color, marker=marker, alpha=0.7, label=group, linewidths=0.8)
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


def patch_grid(
    image: torch.Tensor, patch: int | tuple[int, int], path=None, title="", apart=False, numbers=True, mark=()
):  # fmt: skip
    """image uint8 [C, H, W] with the lines along which it is cut into patches (pixels: one number, or height and width), and
    the number of each; what is left over below and at the right is not drawn. apart: the patches with gaps between them; mark:
    numbers of patches to frame. Raises ValueError where not even one patch fits."""
    (H, W), (h, w) = image.shape[1:], (patch, patch) if isinstance(patch, int) else patch
    across, down = W // w, H // h
    if not across * down:
        raise ValueError(f"a {H}x{W} image cannot be cut into {h}x{w} patches")
    H, W = down * h, across * w
    gap = max(1, round(0.12 * min(h, w))) if apart else 0
    canvas = torch.full((3, H + gap * (down - 1), W + gap * (across - 1)), 255, dtype=torch.uint8)
    corners = [(r * (h + gap), c * (w + gap)) for r in range(down) for c in range(across)]
    for k, (top, left) in enumerate(corners):
        r, c = divmod(k, across)
        canvas[:, top : top + h, left : left + w] = image[:, r * h : (r + 1) * h, c * w : (c + 1) * w]
    figure = new_figure(figsize=(3.9 * W / max(H, W) + 0.2, 3.9 * H / max(H, W) + 0.4), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(canvas.permute(1, 2, 0).numpy(), interpolation="nearest", extent=(0, canvas.shape[2], canvas.shape[1], 0))
    axes.set_axis_off()
    axes.set_title(title, fontsize=11, parse_math=False, wrap=True)
    for k, (top, left) in enumerate(corners):
        if not apart:
            axes.add_patch(rectangle((left, top), w, h, fill=False, edgecolor="white", lw=1))
        if k in mark:
            axes.add_patch(rectangle((left, top), w, h, fill=False, edgecolor=ORANGE, lw=3, zorder=3))
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


def pca_grid(image: torch.Tensor, parts: torch.Tensor, names: Sequence[str], path=None, title: str = ""):
    """An image, uint8 [C, H, W], and what its patches are like, layer by layer: parts [layers, 3, gh, gw] of `pca`. Above, the
    three directions as red, green and blue; below, the first alone, for the colour-blind and for grey prints."""
    figure = new_figure(figsize=(1.45 * (len(parts) + 1), 3.6), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    panels = [(0, image.permute(1, 2, 0).expand(-1, -1, 3).numpy(), "the image", {})]
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
    """The same as an animation that repeats: each layer stays `still` seconds and fades into the next. parts
    [layers, 3, gh, gw]; side: of the larger one of the image's edges, in pixels, under a line with the layer's name."""
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
