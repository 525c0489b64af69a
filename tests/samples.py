"""What tests of data read: images of noise, and images as the bytes of a file."""

import io

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """An image file; options: see Pillow's Image.save."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 12, height: int = 8, mode: str = "RGB", seed: int = 0) -> Image.Image:
    values = np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(values).convert(mode)


def image_bytes(seed: int = 0, size=(12, 8), mode: str = "RGB", kind: str = "PNG", **options) -> bytes:
    """An image file of noise; size: (width, height)."""
    return encoded(noise(*size, mode, seed), kind, **options)
