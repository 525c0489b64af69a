"""Images as the processor makes them, decoded when first asked for and kept in memory as bytes.

    cache = ImageCache(processor.image_settings)       # or ImageCache(224)
    pixels = cache["photo.jpg"]                        # float32 [n, 3, S, S], or None for an image that is damaged
    cache.load(paths, workers=4)                       # decodes ahead, in threads

Axes: n tiles of an image, 1 unless images are cut (data/tiles.py), S their side.
"""

from collections.abc import Iterable
from pathlib import Path
from threading import Lock

import torch

from data.image_settings import ImageSettings
from data.images import decoding_threads
from data.tiles import find_tiling, to_pixels
from lib.files import one_line
from processing_mllama import scale_pixels


class ImageCache:
    """settings: ImageSettings, or the size of what the model reads; most_bytes: of memory for the pixels. `unreadable`:
    path -> reason, for every image asked for that turned out damaged, or has gone since it was checked."""

    def __init__(self, settings: ImageSettings | int | tuple[int, int], most_bytes: int = 2**31):
        self.settings, self.room = settings if isinstance(settings, ImageSettings) else ImageSettings(settings), most_bytes
        self.unreadable: dict[Path, str] = {}
        self._kept: dict[Path, torch.Tensor] = {}  # uint8 [n, 3, S, S]
        self._tilings: dict[Path, tuple[int, int] | None] = {}
        self._lock = Lock()

    def __getitem__(self, path: str | Path) -> torch.Tensor | None:
        """float32 [n, 3, S, S], normalized, equal to process_images of the path; None if it cannot be decoded."""
        pixels = self._pixels(Path(path))
        return None if pixels is None else scale_pixels(pixels, self.settings)

    def tiling(self, path: str | Path) -> tuple[int, int] | None:
        """Rows and columns of tiles, by the image's header; None if that cannot be read."""
        path = Path(path)
        if path not in self._tilings:
            try:
                self._tilings[path] = find_tiling(path, self.settings)
            except (ValueError, OSError) as error:
                self._tilings[path], self.unreadable[path] = None, one_line(error)
        return self._tilings[path]

    def load(self, paths: Iterable[str | Path], workers: int) -> None:
        """Decodes with so many threads (Pillow lets go of the interpreter lock) until all are kept or the room is used up."""
        height, width = self.settings.image_size
        paths = [path for path in dict.fromkeys(map(Path, paths)) if path not in self._kept]

        def fill(path):
            if self.room >= 3 * height * width:
                self._pixels(path)

        with decoding_threads(workers) as pool:
            list(pool.map(fill, paths))

    def _pixels(self, path: Path) -> torch.Tensor | None:
        if path in self._kept or path in self.unreadable:
            return self._kept.get(path)
        try:
            pixels = to_pixels(path, self.settings)
        except (ValueError, OSError) as error:
            self.unreadable[path] = one_line(error)
            return None
        with self._lock:
            if path not in self._kept and pixels.nbytes <= self.room:
                self._kept[path] = pixels
                self.room -= pixels.nbytes
        return pixels
