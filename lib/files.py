"""Files: found here or on the hub, read with one line about what is wrong, written whole or not at all."""

import glob
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
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


@contextmanager
def naming(flag: str, source):
    """What is wrong with a file or folder is said with the flag that names it."""
    try:
        yield
    except (ValueError, OSError) as error:
        words = words_of(error)
        if words.startswith("--"):
            raise
        words = f"{flag} {words}" if words.startswith(str(source)) else f"{flag} {source}: {words}"
        raise (FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError)(words) from None


def make_folder(flag: str, folder: Path) -> None:
    """Raises an OSError that names the flag where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{flag} {folder} cannot be made a folder ({error.strerror}): name another") from None


def check_output(flag: str, path: str | Path, inputs: Iterable = ()) -> None:
    """Raises an OSError now, not after the work, for a file that cannot be written, and ValueError for one of those that are
    read, which would be lost."""
    path = Path(path)
    if path.is_dir() or not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise OSError(f"{flag} {path} cannot be written: give a file in a folder that is there and may be written to")
    if path.exists() and any(os.path.exists(file) and os.path.samefile(file, path) for file in inputs):
        raise ValueError(f"{flag} {path} is one of the files that are read, and would be lost: name another")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which takes its name when all is written. Raises FileExistsError if it holds something already."""
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already: name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        whole = Path(temporary) / "whole"
        whole.mkdir()
        yield whole
        os.replace(whole, folder)


def sweep(folder: Path) -> None:
    """Delete what writes have left that a kill cut short, write_atomic's and safetensors' (.tmpXXXXXX). The caller is
    the only writer of the folder."""
    for file in folder.glob(".*tmp*"):
        if file.is_file() and re.fullmatch(r"\..+\.\d+\.tmp|\.tmp\w{6}", file.name):
            file.unlink(missing_ok=True)


def write_json(path: Path | str, value) -> None:
    write_atomic(path, lambda tmp: tmp.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def read_text(path: Path | str) -> str:
    """A UTF-8 file. Raises ValueError where it is none."""
    try:
        return Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): it may be damaged, get it again") from None


def read_json(path: Path | str) -> dict:
    """The JSON object in a file. Raises ValueError where it holds anything else."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): it may be damaged, get it again") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deep: it may be damaged, get it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, an object was expected")
    return value


def read_if_there(path: Path) -> dict:
    """The same; {} where there is no such file."""
    return read_json(path) if path.is_file() else {}


def matching_files(pattern: str | Path) -> list[Path]:
    """The files that a pattern such as 'DIR/shard-*.tar' names, sorted. Square brackets are taken as they stand wherever there
    is such a folder or file. Raises FileNotFoundError where there is none."""
    if Path(pattern).exists():
        return [Path(pattern)]
    folder, name = os.path.split(pattern)
    folder = glob.escape(folder) if os.path.isdir(folder) else folder
    found = glob.glob(os.path.join(folder, name)) or glob.glob(os.path.join(folder, name.replace("[", "[[]")))
    if not found:
        raise FileNotFoundError(f"{pattern} names no file: give several as 'DIR/shard-*.tar', in quotes")
    return sorted(map(Path, found))


def need(condition, source, reason: str) -> None:
    """Raise ValueError(source: reason) unless the condition holds. source: the file, or what was called."""
    if not condition:
        raise ValueError(f"{source}: {reason}")


def words_of(error: Exception) -> str:
    """An exception's own words; of the system's the file and the reason. one_line is for where the file is named already."""
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(map(str, filter(None, (error.filename, error.strerror))))
    return str(error) or type(error).__name__


def one_line(error: Exception) -> str:
    """An exception's own words, for a message of ours."""
    return " ".join(str(getattr(error, "strerror", None) or error).strip("<>").split()) or type(error).__name__


def find_source(source: str | Path, patterns=("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")) -> Path:
    """A folder or .gguf file on this disk, or a hub name, whose files that fit the patterns are fetched with huggingface_hub
    when that is installed. Raises FileNotFoundError where there is none, ValueError for a file of another kind."""
    path = Path(source)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise ValueError(f"{source} is a file: give the folder that holds config.json and model.safetensors, or a .gguf file")
    if path.suffix in (".gguf", ".json"):
        raise FileNotFoundError(f"there is no file {source}")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(source)):
        raise FileNotFoundError(f"there is no folder {source}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"there is no folder {source}; if it is a name on the hub, `pip install huggingface_hub` to fetch it"
        ) from None
    try:
        return Path(snapshot_download(str(source), allow_patterns=list(patterns)))
    except (OSError, ValueError, RuntimeError) as error:  # offline, unknown or private name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"there is no folder {source}, and the hub did not give it ({reason})") from None
