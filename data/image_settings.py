"""What is done to an image of any proportions before a tower sees it, as the published models have it. data/tiles.py does it.

    ImageSettings((224, 224))                                                     # SigLIP, ViT: squeezed to the square
    ImageSettings((224, 224), size={"shortest_edge": 256}, fit="crop")            # CLIP, DINOv2: the middle of it
    ImageSettings((336, 336), do_pad_square=True)                                 # LLaVA-1.5: in the middle of a square
    ImageSettings((512, 512), "lanczos", size={"longest_edge": 2048}, fit="tiles")  # SmolVLM, Idefics3: cut into tiles
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # Pillow's numbers
FITS = ("squeeze", "crop", "tiles", "as_is")


@dataclass(frozen=True)
class ImageSettings:
    """What becomes of an image, in this order: padded to a square, resized to `size`, fitted to image_size, scaled.

    size: {"height", "width"}, or {"shortest_edge"} or {"longest_edge"}, which keep the proportions; None: not resized yet.
    fit: squeeze, whatever the proportions; crop: the middle; tiles; as_is: an image of any other size is refused. A pixel is
    (byte * rescale_factor - mean) / std. Raises ValueError for settings that no image can be prepared by.
    """

    image_size: tuple[int, int]  # (height, width) of what the tower reads
    resample: str = "bicubic"  # of RESAMPLE
    image_mean: Sequence[float] = (0.5, 0.5, 0.5)
    image_std: Sequence[float] = (0.5, 0.5, 0.5)
    do_pad_square: bool = False
    size: dict[str, int] | None = None
    fit: str = "squeeze"
    rescale_factor: float = 1 / 255

    def __post_init__(self):
        mean, std = self.image_mean, self.image_std
        object.__setattr__(self, "image_size", height_width(self.image_size))
        threes = all(isinstance(values, (tuple, list)) and len(values) == 3 for values in (mean, std))
        if not threes or not all(is_number(x) for x in (*mean, *std)) or min(std) <= 0:
            raise ValueError(f"image_mean {mean!r:.80} and image_std {std!r:.80} must be three numbers, std above 0")
        object.__setattr__(self, "image_mean", tuple(mean))
        object.__setattr__(self, "image_std", tuple(std))
        if self.resample not in RESAMPLE:
            raise ValueError(f"resample is {self.resample!r}: it must be {', '.join(RESAMPLE)}")
        if self.fit == "tiles" and self.image_size[0] != self.image_size[1]:
            raise ValueError(f"image_size is {self.image_size}: tiles are squares")
        if self.fit not in FITS:
            raise ValueError(f"fit is {self.fit!r}: it must be {', '.join(FITS)}")
        if not is_number(self.rescale_factor) or self.rescale_factor <= 0:
            raise ValueError(f"rescale_factor is {self.rescale_factor!r}: it must be a number above 0")


def height_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Sides in pixels, from one of them or both. Raises ValueError unless they are whole numbers from 1."""
    sides = (image_size,) * 2 if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"image_size is {image_size!r:.80}: sides must be numbers from 1")
    return sides


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
