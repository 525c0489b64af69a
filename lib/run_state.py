"""Everything that a training run needs to continue exactly where it stopped, in one file: run/state.pt."""

import argparse
import os
import pickle
import shlex
import sys
import zipfile
import zlib
from pathlib import Path

import torch

from lib.files import read_if_there, write_atomic


def save_state(run: str | Path, state: dict) -> None:
    """Everything needed to continue, as run/state.pt: tensors, numbers, strings, lists and dicts. Atomic."""
    path = Path(run) / "state.pt"

    def write(tmp):
        try:
            torch.save(state, tmp)
        except RuntimeError as error:  # torch's way to say that a write failed
            reason = str(error).splitlines()[0]
            raise OSError(f"{path} cannot be written ({reason}): is the disk full?{kept_state(run)}") from None

    write_atomic(path, write)


def kept_state(run: str | Path) -> str:
    """What to add to an error that ends a run: a promise only where there is something to keep it."""
    return "; the state saved before is as it was" if (Path(run) / "state.pt").exists() else ""


# What reading a damaged state meets. A pickle that is more than tensors, numbers and texts is refused unread.
DAMAGED = (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, NotImplementedError, zlib.error)
DAMAGED += (OverflowError, MemoryError, zipfile.BadZipFile)


def need_state(run: str | Path) -> Path:
    path = Path(run) / "state.pt"
    if not path.exists():
        raise FileNotFoundError(f"{run} has no state.pt to resume from: start without --resume, or check --out")
    return path


def load_state(run: str | Path) -> dict:
    """What save_state wrote. Raises FileNotFoundError where there is none, ValueError for one that is damaged."""
    path = need_state(run)
    try:
        with zipfile.ZipFile(path) as file:  # torch itself does not compare the checksums
            if bad := file.testzip():
                raise ValueError(f"{bad} has another checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (*DAMAGED, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} is damaged ({reason}): start again without --resume") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no state of a run: start again without --resume")
    return state


# What runs leave, and what is written beside it later. (lib/convert.py has the tokenizers' files of all kinds.)
LEFT = ["config.json", "model.safetensors", "result.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
LEFT += ["generation_config.json", "preprocessor_config.json", "processor_config.json"]
LEFT += [f"{name}.png" for name in ("curves", "samples", "attention", "mistakes", "confusion", "filters", "words")]
LEFT += ["eval.json", "eval.png", "answers.jsonl"]
OWN = ["settings.json", "lock", "state.pt", "metrics.jsonl"]


def check_folder(folder: Path, args: argparse.Namespace) -> None:
    """Raises ValueError where a run would write over the model that it starts from, or over what no run has made, and
    FileNotFoundError where there is nothing to resume from."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise ValueError(f"--out {str(folder)!r} is no UTF-8, which the names of .safetensors files must be") from None
    for name in ("model", "vision", "lm"):
        source = getattr(args, name, None)
        if source and folder.exists() and os.path.exists(source) and os.path.samefile(source, folder):
            raise ValueError(f"--out {folder} is what --{name} is read from, and would be lost: choose another --out")
    if args.resume and not (folder / "lock").exists():  # before a mistyped folder is made
        need_state(folder)
    if not args.resume and (there := [name for name in (*LEFT, *OWN) if (folder / name).exists()]) and not is_run(folder):
        raise ValueError(f"--out {folder} holds a {there[0]} that no run here has made: choose another --out")


def is_run(folder: Path) -> bool:
    """Whether a run has made the folder, by its settings, or by the lock of one that did not get so far."""
    try:
        holder = (folder / "lock").read_bytes() if (folder / "lock").is_file() else b""
        return holder.strip().isdigit() or {"seed", "batch_size"} <= read_if_there(folder / "settings.json").keys()
    except (ValueError, OSError):
        return False


def remove_earlier(folder: Path, began: float) -> None:
    """Drop what an earlier run has left in the folder and this one, which began then (seconds of the epoch), has not
    replaced: it would be taken for this one's."""
    for name in LEFT:
        if (path := folder / name).is_file() and path.stat().st_mtime < began - 1:
            path.unlink()


def check_settings(run: Path, settings: dict, saved: dict | None) -> None:
    """Raises ValueError where the saved run was started with other settings."""
    if not isinstance(saved, dict):
        raise ValueError(f"{run / 'state.pt'} is no state of a run: start again without --resume")
    if settings.keys() - saved.keys():
        raise ValueError(f"{run} is the run of another script, or of an older one: resume with that, or choose another --out")
    for key, value in settings.items():
        if saved.get(key) != value:
            raise ValueError(
                f"--{key.replace('_', '-')} is {value!r}, the run in {run} was started with {saved.get(key)!r}: "
                "resume with the same settings, or choose another --out"
            )


def comparable_settings(args: argparse.Namespace) -> dict:
    """The settings that must not change between a run and its resumption: all but those that say where or how often."""
    free = {"resume", "out", "data", "images", "test_data", "device", "workers", "compile", "fsdp", "max_seconds"}
    free |= {"eval_every", "eval_count", "save_every", "log"}
    return {key: value for key, value in vars(args).items() if key not in free}


def resume_command(args: argparse.Namespace) -> str:
    name = getattr(sys.modules["__main__"].__spec__, "name", "")  # of a script that was started with -m
    words = ["python", *(["-m", name] if name.startswith("extras.") else sys.argv[:1]), *sys.argv[1:]]
    return shlex.join(words + ([] if args.resume else ["--resume"]))
