"""Rows that are read from front to back and never all in memory: what shards (shards.py) and tables (tables.py) share.

data/shard_stream.py draws batches from them, in an order that can be resumed.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.llava import LlavaRow, problem_lines
from data.row_files import RowFile
from data.row_values import RowError
from data.spellings import Row

Lost = dict[str, RowError]  # file and row -> why it cannot be used


@dataclass(eq=False)
class ShardImage:
    """An image of a row: its file's bytes, and once it was decoded its pixels, uint8 [n, 3, S, S], in their place."""

    name: str  # shard/member
    data: bytes
    pixels: torch.Tensor | None = None
    tiling: tuple[int, int] | None = None  # of rows and columns (data/tiles.py)


@dataclass(frozen=True)
class StreamedRows:
    """Where the rows of many files are, and what is wrong with the files as far as that tells."""

    source: str
    paths: list[Path]
    starts: np.ndarray  # int64 [parts + 1]: the first row of each part that is read from front to back
    problems: list[tuple[str, str]]  # (file, what)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def fingerprint(self) -> str:
        """Of the rows' places, by which a resumed run knows its data."""
        names = repr([path.name for path in self.paths]).encode()
        return hashlib.sha256(names + self.places.tobytes() + self.starts.tobytes()).hexdigest()

    @property
    def places(self) -> np.ndarray:
        """Where in their files the parts are, as numbers."""
        raise NotImplementedError

    def report(self) -> str:
        lines = [f"{self.source}: {len(self.paths):,} {self.called}, {len(self):,} rows"]
        return "\n".join(lines + problem_lines("{}: {}", self.problems))

    def read(self, numbers: Iterable[int], lost: Lost, notes: Counter | None = None) -> Iterator[LlavaRow | None]:
        """Rows by number, from 0; None for one that is damaged, the reason in `lost`. A file stays open for as long as one row
        after the other lies in it. notes: see spellings.read_row."""
        raise NotImplementedError

    def whole(self, notes: Counter, progress: bool = False) -> RowFile:
        """All rows, one after the other, as a file that is read whole; the images' bytes are in them. notes: see
        spellings.read_row."""
        lost = {}

        def rows() -> Iterator[tuple[int, Row | RowError]]:
            read = tqdm(self.read(range(len(self)), lost, notes), "reading", len(self), disable=not progress)
            for number, row in enumerate(read, start=1):
                if row is None:
                    place, why = next(reversed(lost.items()))
                    yield number, RowError(place, str(why))
                else:
                    images = [image.data for image in row.images]
                    yield number, Row(row.id, row.messages, images, row.kinds, row.accepted, row.isolated)

        return RowFile(self.paths[0], self.paths[0].parent, rows(), [(0, *problem) for problem in self.problems])

    def head(self, count: int) -> list[LlavaRow]:
        """The usable ones of the first rows."""
        return [row for row in self.read(range(min(count, len(self))), {}) if row]
