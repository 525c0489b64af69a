"""Images as the processor makes them, decoded when first asked for and kept in memory as bytes.

    cache = ImageCache(224)
    pixels = cache["photo.jpg"]                        # float32 [3, S, S], or None for an image that is damaged
    cache.load(paths, workers=4)                       # decodes ahead, in threads
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Lock

import torch
from tqdm import tqdm

from data.images import decoding_threads, height_width
from lib.files import one_line
from processing_mllama import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    check_pixel_settings,
    normalize,
    rescale,
    to_pixels,
)


class ImageCache:
    """The settings are those of MllamaImageProcessor; most_bytes: of memory for the pixels. `unreadable`: path -> reason, for
    every image asked for that turned out damaged, or has gone since it was checked."""

    def __init__(
        self, image_size: int | tuple[int, int], image_mean: Sequence[float] = IMAGENET_STANDARD_MEAN,
        image_std: Sequence[float] = IMAGENET_STANDARD_STD, resample: str = "bicubic", do_pad_square: bool = False,
        most_bytes: int = 2**31,
    ):  # fmt: skip
        check_pixel_settings(image_mean, image_std, resample)
        self.image_size, self.image_mean, self.image_std = height_width(image_size), tuple(image_mean), tuple(image_std)
        self.resample, self.do_pad_square, self.room = resample, do_pad_square, most_bytes
        self.settings = self.image_size, self.image_mean, self.image_std, resample, do_pad_square
        self.unreadable: dict[Path, str] = {}
        self._kept: dict[Path, torch.Tensor] = {}  # uint8 [3, S, S]
        self._lock = Lock()

    def __getitem__(self, path: str | Path) -> torch.Tensor | None:
        """float32 [3, S, S], normalized, equal to process_images of the path; None if it cannot be decoded."""
        pixels = self._pixels(Path(path))
        return None if pixels is None else normalize(rescale(pixels), self.image_mean, self.image_std)

    def load(self, paths: Iterable[str | Path], workers: int, progress: bool = False) -> None:
        """Decodes with so many threads (Pillow lets go of the interpreter lock) until all are kept or the room is used up."""
        height, width = self.image_size
        paths = [path for path in dict.fromkeys(map(Path, paths)) if path not in self._kept]

        def fill(path):
            if self.room >= 3 * height * width:
                self._pixels(path)

        with decoding_threads(workers) as pool:
            for _ in tqdm(pool.map(fill, paths), "decoding", len(paths), unit=" images", disable=not progress):
                pass

    def _pixels(self, path: Path) -> torch.Tensor | None:
        if path in self._kept or path in self.unreadable:
            return self._kept.get(path)
        try:
            pixels = to_pixels(path, self.image_size, self.resample, self.image_mean, self.do_pad_square)
        except (ValueError, OSError) as error:
            self.unreadable[path] = one_line(error)
            return None
        with self._lock:
            if path not in self._kept and pixels.nbytes <= self.room:
                self._kept[path] = pixels
                self.room -= pixels.nbytes
        return pixels
