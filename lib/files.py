"""Files that appear whole or not at all, and JSON, in and out: what every module writes with."""

import json
import os
import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path


def write_atomic(path: Path | str, write: Callable[[Path], None]) -> None:
    """Call write(temporary path beside `path`), then move the result into place: a reader sees the old file or the new
    one, never half of it, whatever kills the process in between."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path, temporary):
            write(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, temporary: Path | None = None):
    """A write that fails says which file it was of: the system's own words name none, once it is open, or the temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(f"{path} cannot be written ({error.strerror})") from None


def sweep(folder: Path) -> None:
    """Delete what writes have left that a kill cut short, write_atomic's and safetensors' (.tmpXXXXXX). Nobody else may be
    writing to the folder."""
    for file in folder.glob(".*tmp*"):
        if re.fullmatch(r"\..+\.\d+\.tmp|\.tmp\w{6}", file.name):
            file.unlink(missing_ok=True)


def write_json(path: Path | str, value) -> None:
    write_atomic(path, lambda tmp: tmp.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def read_json(path: Path | str) -> dict:
    """The JSON object in a file. Raises ValueError where it holds anything else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): it may be damaged, get it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, an object was expected")
    return value
