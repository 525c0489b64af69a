"""Numbers and words laid over images: where a model attends (extras/attention_maps.py), and a word for each patch."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from lib.figures.common import BLUE, GREY, RED, finish, new_figure, show_image, wrapped


def heat_over(image: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """image uint8 [3, h, w] as a dim grey, and over it heat [gh, gw] from 0 to 1: floats [h, w, 3]. The hotter, the brighter:
    it survives a grey print, and no part of the image itself is as bright. Heat of a single row is drawn as a strip below the
    image, for tokens that are no places in it: floats [h + h // 4, w, 3]."""
    from matplotlib import colormaps

    if len(heat) == 1 < heat.shape[1]:
        field = torch.arange(image.shape[2]) * heat.shape[1] // image.shape[2]  # of each column of pixels
        strip = torch.from_numpy(colormaps["inferno"](heat[0].numpy())[..., :3]).float()[field]
        return torch.cat([heat_over(image, torch.zeros(1, 1)), strip.expand(max(1, image.shape[1] // 4), -1, -1)])
    grey = (image.float() / 255).mean(dim=0)[..., None]
    low, high = grey.min(), grey.max()
    grey = 0.1 + 0.4 * (grey - low) / (high - low).clamp(min=0.1)
    heat = F.interpolate(heat[None, None].float(), image.shape[1:], mode="bicubic").clamp(0, 1)[0, 0]
    color = torch.from_numpy(colormaps["inferno"](heat.numpy())[..., :3]).float()
    strength = 0.7 * heat[..., None]
    return (1 - strength) * grey + strength * color


def attention_overlay(
    images: Sequence[torch.Tensor],
    words: Sequence[str],
    maps: torch.Tensor,
    path=None,
    title: str = "",
    columns: int = 7,
    most: int = 70,
):
    """What a model attended to for each word: images uint8 [3, h, w], maps [words, images, gh, gw] (attention_maps.py).

    A panel a word, with the images one below the other and the word's share of attention that went to them; at the left
    the images as they are. A word's hottest place is white-yellow whatever its share is. No more than `most` words.
    """
    count = min(len(words), most)
    columns = max(1, min(columns, count))
    lines, I = max(1, math.ceil(count / columns)), len(images)
    figure = new_figure(figsize=(1.5 * (columns + 1), lines * (1.5 * I + 0.45) + 0.5), layout="constrained")
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


def caption_sheet(images, captions: Sequence[str], words: Sequence[Sequence[str]], maps, path=None, columns: int = 3):
    """Images uint8 [3, h, w] with their captions, and beside each where the model looked for some words of it: maps
    [words, gh, gw] of each image, or None without words. A word's hottest place is white-yellow."""
    lines, most = max(1, math.ceil(len(images) / columns)), max(1, *map(len, words))
    figure = new_figure(figsize=(columns * (2.3 + 0.9), 2.9 * lines), layout="constrained")
    cells = figure.subfigures(lines, columns, squeeze=False).flatten()[: len(images)]
    for cell, image, caption, looked_up, heat in zip(cells, images, captions, words, maps, strict=True):
        cell.suptitle(wrapped(caption, 42, 3), fontsize=9, parse_math=False)
        grid = cell.add_gridspec(most, 2, width_ratios=(most, 1))
        show_image(cell.add_subplot(grid[:, 0]), image)
        for k, word in enumerate(looked_up):
            axes = cell.add_subplot(grid[k, 1])
            axes.imshow(heat_over(image, heat[k] / heat[k].max().clamp(min=1e-12)).numpy(), interpolation="nearest")
            axes.set_axis_off()
            axes.set_title(wrapped(word, 14, 1), fontsize=7, pad=2, parse_math=False)
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
):
    """Each patch with its word in it: images uint8 [N, C, H, W]; words of each image, by row and column of its grid of
    patches (height, width in pixels), which may reach over its edge; a caption over each image, coloured by good as in
    sheet."""
    columns = max(1, min(columns, len(images)))
    lines = max(1, math.ceil(len(images) / columns))
    across = max((len(row) for grid in words for row in grid), default=1)
    side = max(2.6, min(6.0, 0.72 * across))  # inches
    shade = {"facecolor": "black", "alpha": 0.5, "edgecolor": "none", "pad": 0.8}
    figure = new_figure(figsize=(side * columns, (side + 0.3) * lines + 0.4), layout="constrained")
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
        color = "black" if good is None else (BLUE if good[i] else RED)
        axes.set_title(caption, fontsize=9, color=color, parse_math=False)
    return finish(figure, path)
