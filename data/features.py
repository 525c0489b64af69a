"""What a frozen vision tower makes of each image, [n, N, Dv]: computed once, and kept in memory or in a file.

    features = FrozenFeatures(model, images)           # images: an ImageCache; the tower must not train any more
    features[path]                                     # [n, N, Dv], or None for an image that cannot be read
    features.keep(Path("features.npy"), paths)         # all of them, in a file that later runs read

Axes: n tiles of an image (data/tiles.py), 1 unless images are cut; N patches, Dv width of the tower.
"""

import hashlib
import itertools
import math
import tokenize
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.batches import blind_pixels
from data.image_cache import ImageCache
from data.tiles import tile_count
from lib.files import check_output, naming, read_json, write_atomic, write_json

IN_OUT = "in the run folder"  # --cache-features without a value
AT_ONCE = 64  # images that are decoded ahead of the tower


def features_for_run(model, images: ImageCache, rows, args, run) -> "FrozenFeatures":
    """The rows' images as features that are computed when first asked for and kept in memory. Prints a line where they do not
    fit in there and no file is to hold them."""
    features = FrozenFeatures(model, images, getattr(args, "blind", False))
    needed = features.bytes_of({path for row in rows for path in row.images})
    if needed > features.room and args.cache_features is None:
        why = f"the images have {needed / 1e9:.1f} GB of features, more than is kept in memory"
        run.print(f"{why}: --cache-features keeps them in a file, else some are computed anew in each epoch")
    return features


def keep_for_run(features: "FrozenFeatures | None", rows, args, run) -> None:
    """--cache-features: keep those of the rows' images, in that file or in the run's folder. The first process makes it, the
    others read it."""
    if args.cache_features is not None and not args.dry_run:
        file = run.folder / "features.npy" if args.cache_features == IN_OUT else Path(args.cache_features)
        with run.main_first(), naming("--cache-features", file):
            paths = [path for row in rows for path in row.images]
            features.keep(file, paths, args.workers, run.is_main, lambda: run.stop_signal is not None)


class FrozenFeatures:
    """Images go through the tower one by one, since matrix products round differently in batches of other sizes: so training
    with the file and without it is the same to the last bit. The file is a numpy array [tiles, N, Dv], with a .json beside it
    that says by which weights and settings it was made, and names the images in its order: each with its size and time, by
    which a changed one is known, and its number of tiles.
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

    def keep(self, file: Path, paths: Sequence[Path], workers: int = 1, progress: bool = False,
             stopped: Callable[[], bool] = lambda: False) -> None:
        """Read the features of these images from the file. Those that it lacks, or that are of an image changed since, are made
        and join the others, which may be of other data; a file by other weights or settings is made anew. Once `stopped` says
        so the file has what was made until then, and the next call makes the rest. Blind, there is nothing to keep. Raises
        ValueError or an OSError for files that are damaged, or not of this kind: they are left as they are."""
        if self.blind:
            return
        about, made_by = Path(f"{file}.json"), self._fingerprint()
        check_output("--cache-features", file)
        known = read_description(file, about)
        held = known["images"] if file.exists() and known["made_by"] == made_by else {}
        if held:
            self._open(file, held)
        marks = {str(path): mark(path) for path in sorted(set(paths))}
        missing = {path: now for path, now in marks.items() if held.get(path, [])[:2] != now}
        if missing and not stopped():
            old = [self._table[place] for path, place in places(held).items() if str(path) not in missing]
            held = {path: entry for path, entry in held.items() if path not in missing}

            def fill(temporary: Path) -> None:
                made = self._fill(temporary, old, list(map(Path, missing)), workers, progress, stopped)
                held.update({str(path): [*missing[str(path)], self.count(path)] for path in made})
                write_json(about, {"made_by": made_by, "images": {}})  # the file before is described no more

            write_atomic(file, fill)
            write_json(about, {"made_by": made_by, "images": held})
            self._open(file, held)

    def _open(self, file: Path, held: dict[str, list[int]]) -> None:
        """Raises ValueError for a file that does not hold what its description says."""
        try:
            table = np.load(file, mmap_mode="r")
        except (ValueError, EOFError, TypeError, OverflowError, SyntaxError, tokenize.TokenError):  # what its header can cause
            table = None
        if not isinstance(table, np.ndarray):
            raise ValueError(f"{file} is damaged: remove it, and it is made again")
        config = self.model.config.vision_config
        tiles, shape = sum(tiles for *_, tiles in held.values()), (math.prod(config.grid), config.hidden_size)
        if table.dtype != np.float32 or table.shape[1:] != shape or len(table) < tiles:  # more: of what was not made
            found = f"{table.dtype} {list(table.shape)}, its .json describes float32 {[tiles, *shape]}"
            raise ValueError(f"{file} holds {found}: remove it, and it is made again")
        self._table, self._places = table, places(held)

    def count(self, path: Path) -> int:
        """How many tiles an image has; 0 if it cannot be read."""
        tiling = self.images.tiling(path)
        return 0 if tiling is None or path in self.images.unreadable else tile_count(tiling)

    def _fill(
        self, file: Path, old: Sequence[np.ndarray], paths: Sequence[Path], workers: int, progress: bool, stopped: Callable
    ) -> Sequence[Path]:  # fmt: skip
        """Write the features [n, N, Dv] that are there already, then those of the images; returns which were made."""
        config = self.model.config.vision_config
        rows = sum(map(len, old)) + sum(map(self.count, paths))
        shape = (rows, math.prod(config.grid), config.hidden_size)
        facts = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
        with file.open("wb") as out:  # not a memory map: a full disk would kill the process, without a word
            np.lib.format.write_array_header_1_0(out, facts)
            end = out.tell() + 4 * math.prod(shape)
            for features in old:
                out.write(features.tobytes())
            for start in tqdm(range(0, len(paths), AT_ONCE), "encoding each image once", disable=not progress):
                if stopped():
                    paths = paths[:start]
                    break
                self.images.load(paths[start : start + AT_ONCE], workers)
                for path in paths[start : start + AT_ONCE]:
                    if (pixels := self.images[path]) is not None:
                        out.write(self.encode(pixels).float().numpy().tobytes())
            out.truncate(end)  # zeros in place of what cannot be read, or was not made
        return paths

    def _fingerprint(self) -> str:
        """A hash of the tower's weights and of the settings that its images are read with."""
        digest = hashlib.sha256(repr((self.images.settings, self.model.config.vision_feature_layer)).encode())
        for name, tensor in self.model.vision_tower.state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def read_description(file: Path, about: Path) -> dict:
    """What a file's .json says of it; of one that is not there, of nothing. Raises ValueError unless both are of this kind, or
    absent: they would be written over."""
    if not about.exists():
        if file.exists():
            raise ValueError(f"{file} has no {about.name} beside it, so it is no file of features: name another, or remove it")
        return {"made_by": None, "images": {}}
    known = read_json(about)
    images = known.get("images")
    if known.keys() != {"made_by", "images"} or not isinstance(images, dict) or not all(map(is_entry, images.values())):
        raise ValueError(f"{about} does not describe a file of features: name another file, or remove it")
    return known


def is_entry(entry) -> bool:
    """Whether it is [size, time, tiles] of an image."""
    return isinstance(entry, list) and [type(n) for n in entry] == [int] * 3 and min(entry) >= 0


def mark(path: Path) -> list[int]:
    """Size and time of a file, by which a change is noticed; zeros if there is no file."""
    facts = path.stat() if path.exists() else None
    return [facts.st_size, facts.st_mtime_ns] if facts else [0, 0]


def places(images: dict[str, list[int]]) -> dict[Path, slice]:
    """Where in the file each image's features are. images: the description's, each with its number of tiles last."""
    ends = itertools.accumulate(tiles for *_, tiles in images.values())
    return {Path(path): slice(end - n, end) for (path, (*_, n)), end in zip(images.items(), ends, strict=True) if n}
