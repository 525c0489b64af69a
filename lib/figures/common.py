"""What all figures share: colours that the colour-blind tell apart, and matplotlib, imported when something is drawn."""

import textwrap
import warnings
from pathlib import Path

import torch

from lib.files import write_atomic

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"  # Okabe and Ito
SHADES = ("#E8E8E8", "#8EC9F0", "#F4C430", "#7FD6B8", "#F0A07C", "#D9A6C8", "#F5EE8B", "#B3B3E6")  # light: black letters fit


def new_figure(**options):
    """An empty figure that belongs to no window. (Importing matplotlib takes longer than a small model takes to answer.)"""
    from matplotlib.figure import Figure

    return Figure(**options)


def finish(figure, path: Path | str | None):
    """The figure; written as a PNG unless path is None. Letters that the font lacks, such as Chinese ones, are boxes in it."""
    if path is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # a line for each letter
            write_atomic(path, lambda tmp: figure.savefig(tmp, dpi=120, format="png"))
    return figure


def rectangle(*place, **options):
    from matplotlib.patches import Rectangle

    return Rectangle(*place, **options)


def show_image(axes, image: torch.Tensor, **options) -> None:
    """image [C, H, W], C = 1 or 3: uint8, or floats in 0..1."""
    axes.imshow(image.permute(1, 2, 0).expand(-1, -1, 3).numpy(), interpolation="nearest", **options)
    axes.set_axis_off()


def wrapped(text: str, width: int, lines: int) -> str:
    """The text in at most so many lines; three dots where it is cut. What no font can draw becomes a replacement character."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" ..."))


def visible(token: str) -> str:
    """A token as it can be printed: a space at either end and line breaks get a sign, what no font can draw a replacement
    character."""
    token = token.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
    bare = token.strip(" ")
    ends = token.split(bare, 1) if bare else [token, ""]
    token = bare.join("\N{OPEN BOX}" * len(end) for end in ends)
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in token)


def fitted(text: str, inches: float, most: float = 9.0) -> float:
    """The font size, in points, at which a text is no wider than so many inches."""
    return min(most, 72 * inches / (0.65 * max(1, len(text))))
