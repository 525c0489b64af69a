"""From an image of any proportions to the squares that a vision tower reads, as the published models do it.

Tiles show a fixed-size tower more of a large image (UReader, Ye et al. 2023; Idefics3, Laurencon et al. 2024): the image is
enlarged until its longer side has 2048 pixels, both sides are stretched to multiples of 512, and what comes out is cut into
rows and columns of 512 x 512. A last tile, the global one, is the whole image squeezed to 512 x 512. Of a photo of 640 x 480:

    640 x 480 -> 2048 x 1536 -> 3 rows of 4 tiles, and the global one: 13 images for the tower

An image that comes out as one tile is not cut: its tiling is WHOLE. Axes: n tiles of one image, H and W the sides of each.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from data.image_settings import RESAMPLE, ImageSettings
from data.images import dimensions, to_image

WHOLE = (0, 0)  # rows and columns of an image that is not cut
MAX_ASPECT = 200  # nothing is left of a longer strip once it is squeezed into a square (Qwen2-VL draws the same line)
MAX_SIDE = 4096  # of an image before it is cut: Idefics3's limit


# ---- sizes -------------------------------------------------------------------------------------------------------------


def first_size(height: int, width: int, size: dict[str, int] | None) -> tuple[int, int]:
    """(height, width) of an image of these sides once it is resized to `size`."""
    if size is None:
        return height, width
    if "longest_edge" in size:
        return scale_longest(height, width, size["longest_edge"])
    if "shortest_edge" in size:
        short = size["shortest_edge"]
        long = int(short * max(height, width) / min(height, width))
        return (long, short) if width <= height else (short, long)
    return size["height"], size["width"]


def scale_longest(height: int, width: int, edge: int) -> tuple[int, int]:
    """The longer side becomes `edge`, the other one keeps the proportions and is made even; neither exceeds MAX_SIDE. The
    order of roundings is transformers'."""
    aspect = width / height
    if width >= height:
        height = int(edge / aspect)
        height, width = max(height + height % 2, 1), edge
    else:
        width = int(edge * aspect)
        height, width = edge, max(width + width % 2, 1)
    aspect = width / height
    if width >= height and width > MAX_SIDE:
        height, width = int(MAX_SIDE / aspect), MAX_SIDE
    elif height > width and height > MAX_SIDE:
        height, width = MAX_SIDE, int(MAX_SIDE * aspect)
    return max(height, 1), max(width, 1)


def whole_tiles(height: int, width: int, side: int) -> tuple[int, int]:
    """Both sides as multiples of `side`: the longer one rounded up, the shorter one stretched along and rounded up."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / side) * side
        height = math.ceil(int(width / aspect) / side) * side
    else:
        height = math.ceil(height / side) * side
        width = math.ceil(int(height * aspect) / side) * side
    return height, width


def tile_count(tiling: tuple[int, int]) -> int:
    """How many images the tower reads for one: its tiles and the global one, or one."""
    return tiling[0] * tiling[1] + 1


def global_tiles(tilings: Sequence[tuple[int, int]]) -> list[int]:
    """Where, among the tiles of several images, the global one of each stands: it is its last."""
    ends = np.cumsum([tile_count(tiling) for tiling in tilings], dtype=int)
    return (ends - 1).tolist()


def find_tiling(image, settings: ImageSettings) -> tuple[int, int]:
    """Rows and columns of tiles of any image (see data.images.to_image), WHOLE where it is not cut; of a file only the header
    is read. Raises ValueError or OSError as to_image."""
    if settings.fit != "tiles":
        return WHOLE
    side = settings.image_size[0]
    height, width = whole_tiles(*first_size(*dimensions(image), settings.size), side)
    return (height // side, width // side) if max(height, width) > side else WHOLE


# ---- pixels ------------------------------------------------------------------------------------------------------------


def pad_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """The image in the middle of a square of the mean colour, as LLaVA-1.5 pads. Raises ValueError for a gigantic square."""
    side = max(image.size)
    if Image.MAX_IMAGE_PIXELS and side**2 > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width}x{image.height} padded to a square is over {Image.MAX_IMAGE_PIXELS:,} pixels")
    square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def resize(image: Image.Image, size: tuple[int, int], resample: str = "bicubic") -> Image.Image:
    """To (height, width), whatever the proportions. resample: bicubic (SigLIP), bilinear (ViT), lanczos (Idefics3), ..."""
    return image.resize((size[1], size[0]), RESAMPLE[resample])


def center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle, (height, width); what lies outside the image is black."""
    left, top = (image.width - size[1]) // 2, (image.height - size[0]) // 2
    return image.crop((left, top, left + size[1], top + size[0]))


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 [3, H, W]."""
    return np.asarray(image).transpose(2, 0, 1)


def cut(image: Image.Image, side: int, resample: str) -> np.ndarray:
    """uint8 [n, 3, side, side]: the tiles of an image, row by row, and the global one; or the one that it fills."""
    image = resize(image, whole_tiles(image.height, image.width, side), resample)
    rows, columns = image.height // side, image.width // side
    if rows * columns == 1:
        return to_array(image)[None]
    tiles = np.empty((rows * columns + 1, 3, side, side), np.uint8)
    tiles[:-1].reshape(rows, columns, 3, side, side)[:] = (
        np.asarray(image).reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
    )
    tiles[-1] = to_array(resize(image, (side, side), resample))
    return tiles


def to_pixels(image, settings: ImageSettings, fast: bool = False) -> torch.Tensor:
    """One image (see data.images.to_image) as uint8 [n, 3, H, W]; n is 1 but for tiles. fast: a JPEG far larger than needed is
    decoded at a fraction of its size. Raises ValueError for a thin strip, and for a size that is not resized and not read."""
    (height, width), needed = settings.image_size, max(*settings.image_size, *(settings.size or {}).values())
    image = to_image(image, -(-needed // 2) if fast else None)  # decoded to no less than is needed
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width}x{image.height} is too thin a strip (over {MAX_ASPECT} to 1): crop it")
    image = pad_square(image, settings.image_mean) if settings.do_pad_square else image
    if settings.size is not None:
        image = resize(image, first_size(image.height, image.width, settings.size), settings.resample)
    if settings.fit == "tiles":
        return torch.from_numpy(np.ascontiguousarray(cut(image, height, settings.resample)))
    if settings.fit == "crop":
        image = center_crop(image, settings.image_size)
    elif settings.fit == "squeeze":
        image = resize(image, settings.image_size, settings.resample)
    elif image.size != (width, height):
        raise ValueError(f"{image.width}x{image.height} is not resized, and the model reads {width}x{height}: resize it")
    return torch.from_numpy(to_array(image)[None].copy())
