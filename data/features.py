"""What a frozen vision tower makes of each image, [n, N, Dv]: computed once, and kept in memory or in a file.

    features = FrozenFeatures(model, images)           # images: a ImageCache; the tower must not train any more
    features[path]                                     # [n, N, Dv], or None for an image that cannot be read
    features.keep(Path("features.npy"), paths)         # all of them, in a file that later runs read

Axes: n tiles of an image (data/tiles.py), 1 unless images are cut; N patches, Dv width of the tower.
"""

import hashlib
import itertools
import math
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.batches import blind_pixels
from data.image_cache import ImageCache
from data.tiles import tile_count
from lib.files import read_json, write_atomic, write_json


def keep_for_run(features: "FrozenFeatures | None", rows, args, run) -> None:
    """--cache-features: keep those of the rows' images, in that file or in the run's folder. The first process makes it, the
    others read it."""
    if args.cache_features is not None and not args.dry_run:
        file = Path(args.cache_features or run.folder / "features.npy")
        with run.main_first():
            features.keep(file, [path for row in rows for path in row.images], args.workers, run.is_main)


class FrozenFeatures:
    """Images go through the tower one by one, since matrix products round differently in batches of other sizes: so training
    with the file and without it is the same to the last bit. The file is a numpy array [tiles, N, Dv], with a .json beside it
    that names the images with their numbers of tiles, and says by which weights and settings it was made; one that was made
    by others is made anew.
    """

    def __init__(self, model, images: ImageCache, blind: bool = False, most_bytes: int = 2**30):
        self.model, self.images, self.blind, self.room = model, images, blind, most_bytes
        self.device = next(model.vision_tower.parameters()).device
        self._places: dict[Path, slice] = {}
        self._kept: dict[Path, torch.Tensor] = {}

    def __getitem__(self, path: Path) -> torch.Tensor | None:
        """None for an image that cannot be read. Blind, all images are one: it is encoded once."""
        if self.blind:
            return None if self.images[path] is None else self._nothing
        if path in self._places:
            return torch.from_numpy(self._table[self._places[path]].copy())
        if path not in self._kept and (pixels := self.images[path]) is not None:
            features = self.encode(pixels)
            if features.nbytes > self.room:
                return features
            self.room -= features.nbytes
            self._kept[path] = features
        return self._kept.get(path)

    @cached_property
    def _nothing(self) -> torch.Tensor:
        return self.encode(blind_pixels(torch.empty(1, 3, *self.images.settings.image_size)))

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[n, 3, S, S] -> [n, N, Dv], in host memory."""
        return self.model.vision_features(pixels.to(self.device)).cpu()

    def bytes_of(self, paths: Collection[Path]) -> int:
        """What the features of so many images take, of images that are not cut into tiles."""
        config = self.model.config.vision_config
        return (1 if self.blind else len(paths)) * math.prod(config.grid) * config.hidden_size * 4

    def keep(self, file: Path, paths: Sequence[Path], workers: int = 1, progress: bool = False) -> None:
        """Read the features of all these images from the file, or make it; it appears whole or not at all. Blind, there is
        nothing to keep."""
        if self.blind:
            return
        paths, facts = sorted(set(paths)), Path(f"{file}.json")
        made_by = self._fingerprint(paths)
        known = read_json(facts) if file.exists() and facts.exists() else {}
        if known.get("made_by") != made_by or "images" not in known:
            facts.unlink(missing_ok=True)  # of the file before: from here on it describes nothing
            write_atomic(file, lambda tmp: self._fill(tmp, paths, workers, progress))
            readable = [path for path in paths if path not in self.images.unreadable]
            write_json(facts, {"made_by": made_by, "images": {str(path): self.count(path) for path in readable}})
        self._table, images = np.load(file, mmap_mode="r"), read_json(facts)["images"]
        ends = itertools.accumulate(images.values())
        self._places = {Path(path): slice(end - n, end) for (path, n), end in zip(images.items(), ends, strict=True)}

    def count(self, path: Path) -> int:
        """Tiles of an image that can be read."""
        return tile_count(self.images.tiling(path))

    def _fill(self, file: Path, paths: Sequence[Path], workers: int, progress: bool) -> None:
        config = self.model.config.vision_config
        rows = sum(self.count(path) for path in paths if self.images.tiling(path) is not None)
        shape = (rows, math.prod(config.grid), config.hidden_size)
        facts = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
        with file.open("wb") as out:  # not a memory map: a full disk would kill the process, without a word
            np.lib.format.write_array_header_1_0(out, facts)
            end = out.tell() + 4 * math.prod(shape)
            for start in tqdm(range(0, len(paths), 64), "encoding each image once", disable=not progress):
                self.images.load(paths[start : start + 64], workers)
                for path in paths[start : start + 64]:
                    if (pixels := self.images[path]) is not None:
                        out.write(self.encode(pixels).float().numpy().tobytes())
            out.truncate(end)  # zeros in place of images that cannot be read

    def _fingerprint(self, paths: Sequence[Path]) -> str:
        digest = hashlib.sha256(repr((self.images.settings, self.model.config.vision_feature_layer)).encode())
        for name, tensor in self.model.vision_tower.state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        for path in paths:
            facts = path.stat() if path.exists() else None
            digest.update(repr((str(path), facts and (facts.st_size, facts.st_mtime_ns))).encode())
        return digest.hexdigest()
