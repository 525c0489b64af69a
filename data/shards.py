"""Conversations about images, too many for memory or a local disk: tar files that are read from front to back.

    python -m data.shards pack train.json --images DIR OUT --per-shard 1000     OUT/shard-000000.tar and so on
    python -m data.shards check 'OUT/shard-*.tar'                               reads all of it; exit code 1 if rows are lost
    python -m data.shards unpack OUT/shard-000000.tar FOLDER                    FOLDER/rows.json and its images

    shards = Shards.open("OUT/shard-*.tar")                # where each row begins: memory holds some 50 bytes a row
    rows = shards.head(10)                                 # the usable ones of the first rows, as llava.LlavaRow

WebDataset's layout (Aizman et al. 2020): members that follow one another and have all up to the first dot of the file's name in
common, their key, are a row: KEY.json, one object of LLaVA-style JSON, and its images in order, KEY.0.jpg, KEY.1.png.
shard_stream.py draws batches from them.
"""

import contextlib
import io
import itertools
import json
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.image_cache import ImageCache
from data.images import decoding_threads
from data.llava import LlavaRow, LlavaRows, image_groups
from data.row_files import decoded, merged
from data.row_values import DamagedRow, RowError
from data.spellings import read_row
from data.streamed import Lost, ShardImage, StreamedRows
from data.tiles import find_tiling, to_pixels
from lib.cli import Parser, positive_int, run_cli
from lib.files import matching_files, new_folder, one_line, write_atomic, write_json
from processing_mllama import ROLES, scale_pixels

SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "ico", "jp2", "avif", "img")  # of images
LARGEST_ROW = 1 << 28  # bytes; nothing larger is read into memory
SAYS = {role: who for who, role in ROLES.items() if who in ("human", "gpt", "system")}


# ---- one shard -------------------------------------------------------------------------------------------------------


def split_name(name: str) -> tuple[str, str] | None:
    """(key, the rest) of a member's path; None for what belongs to no row."""
    folder, slash, file = name.rpartition("/")
    key, dot, rest = file.partition(".")
    return (folder + slash + key, rest.lower()) if key and dot and not key.startswith("__") else None


def members_in(path: Path) -> Iterator[tuple[tuple[str, str] | None, int, int]]:
    """(split_name, where it begins, where it ends) of all members, by their headers alone, to where the file ends. After damage
    the search goes on at the next header that is whole. Raises OSError for a file that cannot be opened."""
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
                for member in tar:
                    tar.members = []  # else it would keep all of them
                    plain = member.isreg() and not member.issparse()
                    yield split_name(member.name) if plain else None, member.offset, tar.offset
        except (tarfile.TarError, ValueError, OverflowError):
            return  # what comes is no tar any more: scan sees that the end is missing


def scan(path: Path) -> tuple[np.ndarray, list[str]]:
    """(int64 [rows, 2]: where each row begins and ends in the file, what is wrong with the rest of it)."""
    rows, problems, end = [], [], 0
    try:
        size = path.stat().st_size
        named = ((*(name or (None, None)), start, stop) for name, start, stop in members_in(path))
        for key, members in itertools.groupby(named, key=lambda member: member[0]):
            _, suffixes, starts, stops = zip(*members, strict=True)
            gaps = [start - before for before, start in zip([end, *stops[:-1]], starts, strict=True)]
            problems += [f"{gap:,} bytes before {key} or in it are damaged" for gap in gaps if gap]
            start, end = starts[0], stops[-1]
            if key is None:
                continue
            if end > size:
                problems.append(f"{key} is cut off")
            elif not {"json", "txt"} & {*suffixes}:
                problems.append(f"{key} has no .json or .txt")
            elif end - start > LARGEST_ROW:
                problems.append(f"{key} has {end - start:,} bytes, more than {LARGEST_ROW:,}")
            else:
                rows.append((start, end))
        rest = size - end
        if not end:
            problems.append("is no tar file without compression")
        elif 0 <= rest < 2 * tarfile.BLOCKSIZE:
            problems.append("ends early: what came after is lost")
        elif rest > 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE:
            problems.append(f"{rest:,} bytes at the end are damaged")
    except OSError as error:
        problems.append(f"cannot be read ({one_line(error)})")
    return np.array(rows, dtype=np.int64).reshape(-1, 2), problems


def members_of_row(data: bytes) -> tuple[dict, list[tuple[str, bytes]]]:
    """(what a part of a shard says of its row, (name, content) of its images). Raises ValueError and TarError."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        plain = (member for member in tar if member.isreg() and not member.issparse())
        members = [(member.name, tar.extractfile(member).read()) for member in plain]
    said = {(split_name(name) or ("", ""))[1]: content for name, content in members}
    raw = merged(said.get("json"), None if "txt" not in said else decoded(said["txt"])[0])
    return raw, [(name, content) for name, content in members if name.rpartition(".")[2].lower() in SUFFIXES]


def row_of(data: bytes, shard: Path, number: int, notes: Counter) -> LlavaRow:
    """A row from its part of the shard, its images as ShardImage objects. Raises RowError, ValueError and TarError."""
    raw, images = members_of_row(data)
    row = read_row(raw, notes, [content for _, content in images])
    names = {content: f"{shard.name}/{name}" for name, content in images}
    return LlavaRow.of(number, row, (ShardImage(names[content], content) for content in row.images))


# ---- all shards ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shards(StreamedRows):
    """Where the rows of many shards are, and what is wrong with them as far as headers tell."""

    spans: np.ndarray  # int64 [rows, 2]: bytes of its shard
    called = "shards"

    @classmethod
    def open(cls, pattern: str | Path, index: Path | None = None, progress: bool = False) -> "Shards":
        """All files that the pattern names, in the order of their names. index: a file that keeps what was found in them, for
        as long as they stay as they are. Raises FileNotFoundError where there are none, ValueError where no row is whole."""
        paths = matching_files(pattern)
        facts = json.dumps([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths])
        known = read_index(index, facts) if index else None
        if known is None:
            with ThreadPoolExecutor(16) as pool:
                found = pool.map(scan, paths)
                found = list(tqdm(found, "looking through shards", len(paths), disable=not progress))
            spans = np.concatenate([rows for rows, _ in found])
            starts = np.cumsum([0, *(len(rows) for rows, _ in found)])
            problems = [(path.name, what) for path, (_, wrong) in zip(paths, found, strict=True) for what in wrong]
            known = starts, problems, spans
            if index:
                write_atomic(index, partial(write_index, facts, *known))
        shards = cls(str(pattern), paths, *known)
        if not len(shards):
            first = "; {}: {}".format(*shards.problems[0]) if shards.problems else ""
            raise ValueError(f"{pattern}: no shard holds a row that is whole{first}")
        return shards

    @property
    def places(self) -> np.ndarray:
        return self.spans

    def read(self, numbers: Iterable[int], lost: Lost, notes: Counter | None = None) -> Iterator[LlavaRow | None]:
        """See StreamedRows."""
        for shard, group in itertools.groupby(numbers, lambda number: np.searchsorted(self.starts, number, side="right") - 1):
            path, file = self.paths[shard], None
            with contextlib.ExitStack() as opened:
                for number in group:
                    start, end = self.spans[number].tolist()
                    try:
                        file = file or opened.enter_context(path.open("rb"))
                        file.seek(start)
                        row = row_of(file.read(end - start), path, number + 1, Counter() if notes is None else notes)
                    except (OSError, ValueError, OverflowError, tarfile.TarError) as error:
                        why = error if isinstance(error, RowError) else DamagedRow(f"cannot be read ({one_line(error)})")
                        row, lost[f"{path.name} row {number - self.starts[shard] + 1}"] = None, why
                    yield row


def write_index(facts: str, starts, problems, spans, path: Path) -> None:
    with path.open("wb") as file:
        texts = [np.frombuffer(text.encode(), np.uint8) for text in (facts, json.dumps(problems))]
        np.savez(file, spans=spans, starts=starts, facts=texts[0], problems=texts[1])


def read_index(path: Path, facts: str):
    """(starts, problems, spans), or None where there is no index of these very files."""
    try:
        with np.load(path, allow_pickle=False) as found:
            if found["facts"].tobytes().decode() != facts:
                return None
            problems = [tuple(problem) for problem in json.loads(found["problems"].tobytes())]
            return found["starts"], problems, found["spans"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


class ShardImages(ImageCache):
    """As ImageCache, of images that come with their rows: each is decoded once and not kept. Settings: ImageCache's."""

    def decode(self, image: ShardImage) -> None:
        try:
            image.tiling, image.pixels = find_tiling(image.data, self.settings), to_pixels(image.data, self.settings)
        except (ValueError, OSError) as error:
            self.unreadable[image.name] = one_line(error)
        image.data = b""

    def __getitem__(self, image: ShardImage) -> torch.Tensor | None:
        """float32 [n, 3, S, S], normalized; None if it cannot be decoded."""
        if image.data:
            self.decode(image)
        return None if image.pixels is None else scale_pixels(image.pixels, self.settings)

    def tiling(self, image: ShardImage) -> tuple[int, int] | None:
        if image.data:
            self.decode(image)
        return image.tiling

    def load(self, images, workers: int) -> None:
        """Nothing is left to do: ShardStream has decoded them."""


# ---- commands --------------------------------------------------------------------------------------------------------


def pack_shards(rows: LlavaRows, folder: Path, per_shard: int, seed: int = 0, progress: bool = False) -> str:
    """All rows as shards in a new folder, in random order, so that any part of them is a fair sample; rows that share images
    stay together. Raises FileExistsError where the folder holds something."""
    groups = image_groups(rows.rows)
    order = [groups[k] for k in np.random.RandomState(seed).permutation(len(groups))]
    count, lost, shard = 0, 0, 0
    with new_folder(folder) as whole, tqdm(total=len(rows), desc="packing", disable=not progress) as bar:
        while order:
            with tarfile.open(whole / f"shard-{shard:06d}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
                end = count + per_shard
                while order and count < end:
                    for i in order.pop():
                        bar.update()
                        try:
                            members = members_of(rows[i], f"{count:09d}")
                        except OSError:  # an image that has gone since it was checked
                            lost += 1
                            continue
                        for name, content in members:
                            about = tarfile.TarInfo(name)
                            about.size = len(content)
                            tar.addfile(about, io.BytesIO(content))
                        count += 1
            shard += 1
    without = f"; {lost:,} rows are left out, their images cannot be read" if lost else ""
    return f"{folder} holds {count:,} rows in {shard:,} shards now{without}"


def members_of(row: LlavaRow, key: str) -> list[tuple[str, bytes]]:
    """(name, content) of a row's files. The JSON comes first: who reads the images knows what they are for."""
    images = []
    for k, path in enumerate(row.images):
        suffix = path.suffix.lower().removeprefix(".")
        images.append((f"{key}.{k}.{suffix if suffix in SUFFIXES else 'img'}", path.read_bytes()))
    raw = json_of(row, [name for name, _ in images])
    return [(f"{key}.json", json.dumps(raw, ensure_ascii=False).encode()), *images]


def json_of(row: LlavaRow, images: Sequence[str]) -> dict:
    """A row as LLaVA-style JSON, with its images under these names."""
    raw = {"id": row.id, "conversations": [{"from": SAYS[m["role"]], "value": m["content"]} for m in row.messages]}
    raw |= {"image": images[0] if len(images) == 1 else list(images)} if images else {}
    raw |= {"kinds": list(row.kinds)} if row.kinds else {}
    raw |= {"accepted": [list(each) for each in row.accepted]} if row.accepted else {}
    return raw | ({"isolated": True} if row.isolated else {})


def unpack_shards(pattern: str, folder: Path) -> str:
    """rows.json and the images of these shards, in a new folder."""
    shards, lost, found = Shards.open(pattern), {}, []
    with new_folder(folder) as whole:
        for row in shards.read(range(len(shards)), lost):
            if row:
                # Numbers, as pack_shards gives: two shards, or two folders in one, may each hold a cat.jpg.
                names = [f"{len(found):09d}.{k}{Path(image.name).suffix}" for k, image in enumerate(row.images)]
                for name, image in zip(names, row.images, strict=True):
                    (whole / name).write_bytes(image.data)
                found.append(json_of(row, names))
        write_json(whole / "rows.json", found)
    return f"{folder}/rows.json has {len(found):,} rows now" + (f"; {len(lost):,} are damaged" if lost else "")


def check_shards(pattern: str, workers: int) -> tuple[str, bool]:
    """(the report, whether all is well) after every row was read and every image decoded."""
    shards, lost = Shards.open(pattern, progress=sys.stderr.isatty()), {}
    images, usable = ShardImages(32), 0

    def usable_row(row: LlavaRow | None) -> bool:
        return row is not None and all(images[image] is not None for image in row.images)

    bar = tqdm(total=len(shards), desc="checking", unit=" rows", disable=not sys.stderr.isatty())
    with decoding_threads(workers) as pool, bar:
        rows = shards.read(range(len(shards)), lost)
        while some := list(itertools.islice(rows, 256)):
            usable += sum(pool.map(usable_row, some))
            bar.update(len(some))
    problems = shards.problems + list(lost.items()) + list(images.unreadable.items())
    return f"{replace(shards, problems=problems).report()}\n{usable:,} rows are usable", not problems


def parse_args(argv=None):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="LLaVA-style JSON and its images into shards")
    packing.add_argument("file", metavar="FILE.json")
    packing.add_argument("folder", metavar="OUT", type=Path)
    packing.add_argument("--images", metavar="DIR", help="where the images are; default: beside the file")
    packing.add_argument(
        "--per-shard", type=positive_int, default=1000, metavar="ROWS", help="a shard of 100 MB to 1 GB is good"
    )
    packing.add_argument("--seed", type=int, default=0, help="of the order in which rows are packed")
    checking = commands.add_parser("check", help="read everything, and say what is damaged")
    checking.add_argument("pattern", metavar="'OUT/shard-*.tar'")
    checking.add_argument("--workers", type=positive_int, default=4, help="threads that decode images")
    unpacking = commands.add_parser("unpack", help="back to JSON and images")
    unpacking.add_argument("pattern", metavar="'OUT/shard-*.tar'")
    unpacking.add_argument("folder", metavar="FOLDER", type=Path)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.command == "pack":
        rows = LlavaRows.read(args.file, args.images, progress=sys.stderr.isatty())
        print(rows.report())
        print(pack_shards(rows, args.folder, args.per_shard, args.seed, sys.stderr.isatty()))
    elif args.command == "unpack":
        print(unpack_shards(args.pattern, args.folder))
    else:
        report, good = check_shards(args.pattern, args.workers)
        print(report)
        sys.exit(0 if good else 1)


if __name__ == "__main__":
    run_cli(main)
