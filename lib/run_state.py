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

from lib.files import write_atomic


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


def load_state(run: str | Path) -> dict:
    """What save_state wrote. Raises FileNotFoundError where there is none, ValueError for one that is damaged."""
    path = Path(run) / "state.pt"
    if not path.exists():
        raise FileNotFoundError(f"{run} has no state.pt to resume from: start without --resume, or check --out")
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


# What runs leave, but for the tokenizer's files.
LEFT = ["config.json", "model.safetensors", "metrics.jsonl", "result.json"]
LEFT += [f"{name}.png" for name in ("curves", "samples", "attention", "mistakes", "confusion", "filters", "words")]


def check_folder(folder: Path, args: argparse.Namespace) -> None:
    """Raises ValueError where a run would write over the model that it starts from, or over what no run has made."""
    for name in ("model", "vision", "lm"):
        source = getattr(args, name, None)
        if source and folder.exists() and os.path.exists(source) and os.path.samefile(source, folder):
            raise ValueError(f"--out {folder} is what --{name} is read from, and would be lost: choose another --out")
    there = [name for name in LEFT if (folder / name).exists()]
    if there and not any((folder / name).exists() for name in ("settings.json", "state.pt", "lock")):
        raise ValueError(f"--out {folder} holds a {there[0]} that no run here has made: choose another --out")


def check_settings(run: Path, settings: dict, saved: dict | None) -> None:
    """Raises ValueError where the saved run was started with other settings."""
    if not isinstance(saved, dict):
        raise ValueError(f"{run / 'state.pt'} is no state of a run: start again without --resume")
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
    words = [sys.executable if sys.argv[0].endswith("-c") else "python", *sys.argv]
    return shlex.join(words + ([] if args.resume else ["--resume"]))
