"""Boxes as location tokens, as PaliGemma was trained on RefCOCO, and back.

    box_to_loc((0, 0, 320, 480), 640, 480)      # "<loc0000><loc0000><loc1023><loc0512>"
"""

import re
from collections.abc import Sequence


def box_to_loc(box: Sequence[float], width: float, height: float) -> str:
    """(x_min, y_min, x_max, y_max) in pixels -> "<locYMIN><locXMIN><locYMAX><locXMAX>".

    The 1,024 tokens are evenly spaced marks, the first at 0 and the last at the far edge, side / 1023 apart: what comes back
    is at most half of that, side / 2046, away. Raises ValueError for a box that is not within the image.
    """
    x0, y0, x1, y1 = box
    if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height and width > 0 and height > 0):
        raise ValueError(f"box {tuple(box)} is not (x_min, y_min, x_max, y_max) within {width}x{height} pixels")
    return "".join(f"<loc{round(v / side * 1023):04d}>" for v, side in ((y0, height), (x0, width), (y1, height), (x1, width)))


def loc_to_box(text: str, width: float, height: float) -> tuple[float, float, float, float]:
    """The first four location tokens in a row as (x_min, y_min, x_max, y_max) in pixels. Raises ValueError without any."""
    found = re.search(r"<loc(\d{4})>" * 4, text)
    if not found or max(map(int, found.groups())) > 1023:
        raise ValueError(f"{text!r} has no four location tokens <loc0000> to <loc1023> in a row")
    y0, x0, y1, x1 = (int(mark) / 1023 for mark in found.groups())
    return x0 * width, y0 * height, x1 * width, y1 * height
