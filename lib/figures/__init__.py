"""Every figure that this project draws.

Functions take tensors and write a PNG (or return the figure when path is None); they compute nothing about a model. Colours are
safe for the colour-blind: those of Okabe and Ito, and of matplotlib's viridis and cividis. The first figure imports matplotlib.
"""

from lib.figures.common import BLUE, GREEN, GREY, ORANGE, RED, SHADES, finish, fitted, new_figure, visible, wrapped
from lib.figures.notebooks import (
    bar_chart,
    clouds,
    code_book,
    heat_map,
    line_chart,
    patch_grid,
    pca,
    pca_gif,
    pca_grid,
    stacked_bars,
    token_strip,
)  # fmt: skip
from lib.figures.overlays import attention_overlay, caption_sheet, heat_over, word_grid
from lib.figures.runs import answer_sheet, confusion, curves, patch_filters, sheet

__all__ = [
    "BLUE", "GREEN", "GREY", "ORANGE", "RED", "SHADES", "finish", "fitted", "new_figure", "visible", "wrapped",
    "bar_chart", "clouds", "code_book", "heat_map", "line_chart", "patch_grid", "pca", "pca_gif", "pca_grid", "stacked_bars",
    "token_strip", "attention_overlay", "caption_sheet", "heat_over", "word_grid",
    "answer_sheet", "confusion", "curves", "patch_filters", "sheet",
]  # fmt: skip
