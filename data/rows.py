"""The rows of a run on one's own data: those of a file or a folder, read whole or from front to back, and held-out ones.

rows, test_rows = load_rows(args, run)             # --data, --images, --test-data or --test-part
"""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from data.llava import LlavaRows, image_groups, noted, problem_lines
from data.row_files import is_streamed
from data.shards import Shards
from data.streamed import StreamedRows
from data.tables import Tables
from lib.files import matching_files, naming

FIRST_ROWS = 5000  # of rows that are streamed: what a tokenizer is trained on
LARGEST_WHOLE = 1 << 32  # bytes of such files that are read whole, for a part of them to be held out


def streams(args) -> bool:
    """Whether training reads --data from front to back: tars and tables, where --test-data says what is held out."""
    return is_streamed(args.data) and bool(args.test_data)


def open_streamed(source, images_dir=None, index: Path | None = None, progress: bool = False) -> StreamedRows:
    """Shards or tables. images_dir: of images that tables only name; index: see Shards.open. Raises ValueError or an OSError
    where they hold nothing."""
    return Shards.open(source, index, progress) if str(source).lower().endswith(".tar") else Tables.open(source, images_dir)


def load_rows(args, run) -> tuple[LlavaRows | StreamedRows, LlavaRows]:
    """(training, held-out) rows, after saying what is wrong with the others. Raises ValueError or an OSError where there is
    nothing to train on."""
    if streams(args):
        with run.main_first(), naming("--data", args.data):
            rows = open_streamed(args.data, args.images, None if args.dry_run else run.folder / "shards.npz", run.is_main)
        run.print(rows.report())
        check_first(rows, run.print)
    else:
        if is_streamed(args.data):
            with naming("--data", args.data):
                check_size(args.data)
        with run.main_first(), naming("--data", args.data):  # the main process writes the images that are no files of their own
            rows = LlavaRows.read(args.data, args.images, run.is_main)
        run.print(rows.report())
    if args.test_data:
        with naming("--test-data", args.test_data):
            test = LlavaRows.read(args.test_data, args.images, run.is_main)
            check_apart(args.data, args.test_data)
        run.print(test.report())
        return rows, test
    return held_out(rows, args.test_part, args.seed, run.print)


def check_apart(data: str, test_data: str) -> None:
    """Raises ValueError where a file is both trained on and held out."""
    trained = [path for path in matching_files(data) if path.is_file()]
    if both := [path for path in matching_files(test_data) if any(path.samefile(other) for other in trained)]:
        raise ValueError(f"{both[0]} is in --data, too: name other rows, or leave it out for --test-part of --data")


def held_out(rows: LlavaRows, part: float, seed: int, say: Callable[[str], None]) -> tuple[LlavaRows, LlavaRows]:
    """(training, held-out) rows, split by image. say() is told where that cannot be: rows about the same images are split as
    they are, and where nothing is held out, the very same rows are both."""
    groups = len(image_groups(rows))
    if part and groups > 1:
        return rows.split(part, seed)
    if part and len(rows) > 1:
        say(f"all {len(rows)} rows share images: held out are rows about images it trains on; give --test-data for others")
        order = random.Random(seed).sample(range(len(rows)), len(rows))
        count = min(len(rows) - 1, max(1, round(part * len(rows))))
        return rows.subset(sorted(order[count:])), rows.subset(sorted(order[:count]))
    why = f"--test-part {part:g}" if not part else "a single row cannot be split"
    say(f"{why}: nothing is held out, the figures are about what it has trained on; give --test-data for others")
    return rows, rows


def check_first(rows: StreamedRows, say: Callable[[str], None], count: int = 1000) -> None:
    """Say how many of the first rows are usable, what is wrong with the others and what is not used of them. Raises ValueError
    where none is: then hardly any other is."""
    lost, notes, count = {}, Counter(), min(count, len(rows))
    with_images = [bool(row.images) for row in rows.read(range(count), lost, notes) if row]
    if not with_images:
        place, why = next(iter(lost.items()))
        raise ValueError(f"{rows.source}: none of the first {count:,} rows is usable; {place}: {why}")
    usable = f"{len(with_images):,} usable, {sum(with_images):,} of them with images"
    lines = problem_lines("{}: {}", list(lost.items()))
    say("\n".join([f"of its first {count:,} rows {usable}", *lines, *noted(notes)]))


def check_size(source: str) -> None:
    """Raises ValueError where tars or tables are too large to be read whole."""
    size = sum(path.stat().st_size for path in open_streamed(source).paths)
    if size > LARGEST_WHOLE:
        raise ValueError(
            f"--data {source} holds {size / 1e9:.1f} GB: pass --test-data, and it is read from front to back; without, it is "
            f"read whole for --test-part to be held out, up to {LARGEST_WHOLE / 1e9:.1f} GB"
        )


def some(rows: LlavaRows, count: int) -> LlavaRows:
    """Up to `count` of the rows, in random order, the same each time: the first few of them stand for all."""
    return rows.subset(random.Random(0).sample(range(len(rows)), min(count, len(rows))))
