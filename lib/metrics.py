"""metrics.jsonl: what a run writes down while it trains, one JSON object a line."""

import json
from collections.abc import Sequence
from pathlib import Path

from lib.files import write_atomic, writing


class Metrics:
    """The file of a run that starts, or of one that resumes after the step `resume_at`: lines that will come again are dropped,
    which are those of later steps and the evaluation after this one (it has no learning rate). logs: what gets the same figures
    (lib/loggers.py)."""

    def __init__(self, path: Path, resume_at: int | None = None, logs: Sequence = ()):
        self.path, self.logs = path, logs
        rows = [] if resume_at is None else self.read()
        kept = [row for row in rows if row["step"] < resume_at or (row["step"] == resume_at and "lr" in row)]
        write_atomic(path, lambda tmp: tmp.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8"))
        for log in logs:
            log.begin(kept)

    def write(self, **values) -> None:
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        for log in self.logs:
            log.write(values)

    def finish(self, step: int) -> None:
        """At the end of a run, whose samples.png is there."""
        for log in self.logs:
            log.finish(self.path.with_name("samples.png"), step)

    def read(self) -> list[dict]:
        return read_metrics(self.path)


def read_metrics(path: Path) -> list[dict]:
    """Whole lines only: the last one may have been cut by a kill. Raises ValueError for others that are no rows of ours."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    try:
        rows = [json.loads(line) for line in lines if line]
    except ValueError:
        rows = [None]
    if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
        raise ValueError(f"{path} has lines that are no JSON object with a step: it is damaged, delete it")
    return rows
