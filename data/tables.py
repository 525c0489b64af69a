"""Rows of .parquet files and of folders that datasets.save_to_disk wrote, read from front to back through pyarrow.

    tables = Tables.open("data/train-*.parquet")           # where each row group begins; nothing else is read yet
    for row in tables.read(range(100), lost := {}): ...    # llava.LlavaRow, its images as bytes

A column is a key of data/spellings.py; images are bytes or {"bytes", "path"} in their column (Hugging Face datasets,
minimind-v). What is read from front to back is a row group of a parquet file, or a batch of records of an Arrow stream: groups
of 100 to 1,000 rows are good, since a thread that begins within one has to pass over what is before.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.llava import LlavaRow, checked_path
from data.row_files import RowFile, is_saved_to_disk
from data.row_values import DamagedRow, RowError
from data.spellings import read_row
from data.streamed import Lost, ShardImage, StreamedRows
from lib.files import matching_files, one_line, read_json

AT_ONCE = 16  # rows that are turned into Python objects at a time


def arrow():
    """The module. Raises ValueError where it is missing."""
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ValueError(".parquet files and datasets.save_to_disk folders are read by pyarrow: pip install pyarrow") from None
    return pyarrow


@dataclass(frozen=True)
class Tables(StreamedRows):
    """Where the row groups are."""

    groups: np.ndarray  # int64 [parts, 2]: the file of each, and its number in there
    folder: Path | None  # of images that are only named; unless given: the file's own, or images/ in it
    called = "files"

    @classmethod
    def open(cls, source: str | Path, images_dir: str | Path | None = None) -> "Tables":
        """source: a pattern of .parquet files, or one folder. Raises FileNotFoundError where there are none, ValueError where
        they hold no row or pyarrow is missing."""
        paths = arrow_files(Path(source)) if is_saved_to_disk(Path(source)) else matching_files(source)
        counts, groups, problems = [], [], []
        for number, path in enumerate(paths):
            try:
                rows = parquet_groups(path) if path.suffix.lower() == ".parquet" else batch_sizes(path)
            except (OSError, arrow().ArrowException) as error:
                problems.append((path.name, f"cannot be read ({one_line(error)[:200]})"))
                continue
            counts += rows
            groups += [(number, k) for k in range(len(rows))]
        starts = np.cumsum([0, *counts], dtype=np.int64)
        if not starts[-1]:
            first = "; {}: {}".format(*problems[0]) if problems else ""
            raise ValueError(f"{source} holds no row{first}")
        groups = np.array(groups, dtype=np.int64).reshape(-1, 2)
        return cls(str(source), paths, starts, problems, groups, images_dir and Path(images_dir))

    @property
    def places(self) -> np.ndarray:
        return self.groups

    def raw(self, numbers: Iterable[int]) -> Iterator[dict | RowError]:
        """Rows as their columns say them, or what is wrong. Numbers of one group must rise: nothing is read twice."""
        for part, wanted in itertools.groupby(numbers, self.part_of):
            file, group = self.groups[part].tolist()
            rows, at = group_rows(self.paths[file], group), int(self.starts[part])
            for number in wanted:
                try:
                    yield next(itertools.islice(rows, number - at, None))
                    at = number + 1
                except (OSError, StopIteration, arrow().ArrowException) as error:  # of what comes after, nothing can be read
                    yield DamagedRow("row", f"cannot be read ({one_line(error)[:200]})")

    def whole(self, notes: Counter, progress: bool = False) -> RowFile:  # the rows are noted where they are spelled
        rows = tqdm(self.raw(range(len(self))), "reading", len(self), disable=not progress)
        problems = [(0, *problem) for problem in self.problems]
        return RowFile(self.paths[0], self.paths[0].parent, enumerate(rows, start=1), problems)

    def read(self, numbers: Iterable[int], lost: Lost, notes: Counter | None = None) -> Iterator[LlavaRow | None]:
        """See StreamedRows."""
        numbers, notes = list(numbers), Counter() if notes is None else notes
        for number, raw in zip(numbers, self.raw(numbers), strict=True):
            file = int(self.groups[self.part_of(number), 0])
            place = f"{self.paths[file].name} row {number - self.first_of(file) + 1}"
            try:
                if isinstance(raw, RowError):
                    raise raw
                row = read_row(raw, notes)
                images = [image if isinstance(image, bytes) else self.file_bytes(image, file) for image in row.images]
                yield LlavaRow.of(number + 1, row, [ShardImage(place, image) for image in images])
            except (RowError, OSError) as error:
                lost[place] = error if isinstance(error, RowError) else DamagedRow(f"cannot be read ({one_line(error)})")
                yield None

    def file_bytes(self, name: str, file: int) -> bytes:
        """Of an image that a table only names. Raises RowError and OSError."""
        folders = [self.folder] if self.folder else [self.paths[file].parent, self.paths[file].parent / "images"]
        paths = [checked_path("image", name, folder) for folder in folders]
        return next((path for path in paths if path.is_file()), paths[0]).read_bytes()

    def part_of(self, number: int) -> int:
        return int(np.searchsorted(self.starts, number, side="right")) - 1

    def first_of(self, file: int) -> int:
        """The number of a file's first row."""
        return int(self.starts[np.flatnonzero(self.groups[:, 0] == file)[0]])


# ---- files -------------------------------------------------------------------------------------------------------------


def parquet_groups(path: Path) -> list[int]:
    """The rows of each row group, by the file's footer."""
    with arrow().parquet.ParquetFile(path) as file:
        return [file.metadata.row_group(k).num_rows for k in range(file.metadata.num_row_groups)]


def batch_sizes(path: Path) -> list[int]:
    """The rows of each batch of an Arrow stream; a memory map, so that no image is read."""
    with arrow().memory_map(str(path)) as source, arrow().ipc.open_stream(source) as stream:
        return [batch.num_rows for batch in stream]


def arrow_files(folder: Path) -> list[Path]:
    """The files of one split that datasets.save_to_disk wrote. Raises ValueError for several splits, or a choice of rows."""
    if (folder / "dataset_dict.json").exists():
        splits = read_json(folder / "dataset_dict.json").get("splits") or []
        first = folder / str((splits or ["train"])[0])
        raise ValueError(f"{folder} holds the splits {', '.join(map(str, splits))}: name one, such as {first}")
    state = read_json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise ValueError(f"{folder} holds a choice of rows by number: flatten_indices() before save_to_disk() writes them out")
    names = [file.get("filename") for file in state.get("_data_files") or [] if isinstance(file, dict)]
    paths = [folder / Path(str(name)).name for name in names]
    if missing := [path.name for path in paths if not path.exists()]:
        raise FileNotFoundError(f"{folder} lacks {missing[0]}, which its state.json names: it is not whole")
    return paths


def group_rows(path: Path, group: int) -> Iterator[dict]:
    """The rows of a group, a few at a time as Python objects."""
    if path.suffix.lower() == ".parquet":
        with arrow().parquet.ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(AT_ONCE, row_groups=[group]):
                yield from batch.to_pylist()
        return
    with arrow().memory_map(str(path)) as source, arrow().ipc.open_stream(source) as stream:
        batch = next(itertools.islice(stream, group, None))
        for start in range(0, batch.num_rows, AT_ONCE):
            yield from batch.slice(start, AT_ONCE).to_pylist()
