"""Any image, good or bad, as upright RGB: a file, bytes, a PIL image, an array or a tensor.

    image = decode_image("photo.jpg")                        # any usual format, or one line that says what is wrong
    image = to_image(torch.rand(3, 8, 8))                    # [C, H, W]; numpy arrays are [H, W, C]

Axes: C channels, H and W the image's sides.
"""

import io
import math
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lib.files import one_line

# EPS and other formats that start a program are left out on purpose.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "AVIF")
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {  # orientation -> what undoes it; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip

SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange height and width


def decode_image(source: str | Path | bytes, at_least: int | None = None) -> Image.Image:
    """An image file, or its bytes, as an upright RGB PIL image.

    EXIF rotation is applied; transparency is composited on white; 16-bit grey is scaled, not clipped; an animation
    gives its first frame. at_least: a JPEG may come out smaller, which is faster, while both sides keep twice as much.
    Raises ValueError with the reason (empty, truncated, too many pixels, not an image, ...), or an OSError for a file
    that cannot be read.
    """
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    if not data:
        raise ValueError("the file is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            if at_least:
                image.draft(None, (2 * at_least, 2 * at_least))
            return upright_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels: a decompression bomb?") from None
    except Image.UnidentifiedImageError:
        raise ValueError("not an image in a format that is read here") from None
    except Exception as error:  # decoders meet damaged bytes with almost any type of exception
        raise ValueError(f"cannot be decoded ({one_line(error)})") from error


def to_image(image, at_least: int | None = None) -> Image.Image:
    """A path, bytes, PIL image, numpy [H, W, C] or torch [C, H, W] (uint8, or floats in 0..1; C = 1, 3, 4) as an upright RGB
    image, transparency on white. at_least: see decode_image. Raises ValueError for anything else."""
    if isinstance(image, (str, os.PathLike, bytes)):
        return decode_image(image, at_least)
    if isinstance(image, (np.ndarray, torch.Tensor)):
        image = array_to_image(image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"a {type(image).__name__} is not an image: give a path, bytes, a PIL image, an array or a tensor")
    if 0 in image.size:
        raise ValueError(f"an image of {image.width}x{image.height} pixels is empty")
    try:  # an image that PIL has opened is read only now
        return upright_rgb(image)
    except Exception as error:
        raise ValueError(f"cannot be decoded ({one_line(error)})") from None


def dimensions(image) -> tuple[int, int]:
    """(height, width) of what to_image gives; of a file only the header is read. Raises ValueError or OSError as to_image."""
    if isinstance(image, (str, os.PathLike, bytes)):
        try:
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS) as header:
                return dimensions(header)
        except Exception:
            image = decode_image(image)  # says what is wrong with it
    elif not isinstance(image, Image.Image) or 0 in image.size:
        image = to_image(image)
    turned = image.getexif().get(ORIENTATION) in SIDEWAYS
    return (image.width, image.height) if turned else (image.height, image.width)


def array_to_image(array: np.ndarray | torch.Tensor) -> Image.Image:
    """See to_image."""
    shape, dtype = list(array.shape), array.dtype
    if isinstance(array, torch.Tensor):
        array = (array.float() if array.is_floating_point() else array).detach().cpu().numpy()
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or not array.size:
        raise ValueError(f"{shape} is not an image's shape: numpy is [H, W, C], torch [C, H, W], with 1, 3 or 4 channels")
    if np.issubdtype(array.dtype, np.floating):
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):  # nor is NaN
            raise ValueError(f"an image of floats lies in 0..1, this one in {low:.4g}..{high:.4g}: rescale it, or give uint8")
        array = (array * 255 + 0.5).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"an image of {dtype} is not read: give uint8, or floats in 0..1")
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def upright_rgb(image: Image.Image) -> Image.Image:
    """EXIF rotation applied, transparency composited on white, deep grey scaled to 8 bits."""
    image.load()
    turn = UPRIGHT.get(image.getexif().get(ORIENTATION))
    if image.mode.startswith("I") or image.mode == "F":
        image = scale_deep_grey(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    rgb = image.convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


def scale_deep_grey(image: Image.Image) -> Image.Image:
    """16 or 32 bits a pixel, or floats, to 8. The full scale is 65535 (1.0 for floats); where values lie outside it, they are
    stretched between their own ends."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(high - low):
        raise ValueError("holds values that are not finite")
    full = 1.0 if image.mode == "F" else 65535.0
    low, high = (0.0, full) if 0 <= low and high <= full else (low, high)
    grey = np.empty(values.shape, np.uint8)
    for row in range(0, len(values), 64):  # in strips: as float64, all of a large image takes gigabytes
        grey[row : row + 64] = (values[row : row + 64].astype(np.float64) - low) * (255 / max(high - low, 1e-12)) + 0.5
    return Image.fromarray(grey)


@contextmanager
def decoding_threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that open images, without Pillow's warnings about odd but readable ones."""
    Image.init()  # loads Pillow's format plugins once, before the threads
    with warnings.catch_warnings(), ThreadPoolExecutor(max(workers, 1)) as pool:
        warnings.simplefilter("ignore")
        yield pool
