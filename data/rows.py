"""The rows of a run on one's own data: those of a LLaVA-style file or of shards, and held-out ones.

    rows, test_rows = load_rows(args, run)             # --data, --images, --test-data or --test-part
"""

import random

from data.llava import LlavaRows
from data.shards import Shards

FIRST_ROWS = 5000  # of shards: what a tokenizer is trained on


def is_sharded(data: str) -> bool:
    """Whether --data names shards, and no file."""
    return data.endswith(".tar")


def load_rows(args, run) -> tuple[LlavaRows | Shards, LlavaRows]:
    """(training, held-out) rows, after saying what is wrong with the others. Raises ValueError or an OSError where there is
    nothing to train on."""
    if is_sharded(args.data):
        with run.main_first():
            rows = Shards.open(args.data, None if args.dry_run else run.folder / "shards.npz", run.is_main)
    else:
        rows = LlavaRows.read(args.data, args.images, run.is_main)
    run.print(rows.report())
    if args.test_data:
        test = LlavaRows.read(args.test_data, args.images, run.is_main)
        run.print(test.report())
        return rows, test
    return rows.split(args.test_part, args.seed)


def some(rows: LlavaRows, count: int) -> LlavaRows:
    """Up to `count` of the rows, in random order, the same each time: the first few of them stand for all."""
    return rows.subset(random.Random(0).sample(range(len(rows)), min(count, len(rows))))
