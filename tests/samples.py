"""What tests of data read: images of noise as files."""

import io

import numpy as np
from PIL import Image


def image_bytes(seed: int = 0, size=(12, 8), mode: str = "RGB", kind: str = "PNG", **options) -> bytes:
    """An image file of noise; size: (width, height)."""
    values = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()
