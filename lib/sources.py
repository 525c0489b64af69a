"""Where a checkpoint is found: a folder, a .gguf file, or a name on the hub."""

from collections.abc import Callable
from pathlib import Path

import torch

from lib.files import read_json
from lib.weights import read_safetensors


def find_source(source: str | Path) -> Path:
    """A folder or .gguf file on this disk, or a hub name, fetched with huggingface_hub when that is installed."""
    path = Path(source)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise ValueError(f"{source} is a file: give the folder that holds config.json and model.safetensors, or a .gguf file")
    if path.suffix == ".gguf":
        raise FileNotFoundError(f"there is no file {source}")
    if str(source).count("/") > 1 or str(source).startswith((".", "~", "/")):
        raise FileNotFoundError(f"there is no folder {source}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"there is no folder {source}; if it is a name on the hub, `pip install huggingface_hub` to fetch it"
        ) from None
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except (OSError, ValueError, RuntimeError) as error:  # offline, unknown or private name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"there is no folder {source}, and the hub did not give it ({reason})") from None


def open_source(path: Path) -> tuple[dict, Callable[[torch.dtype | None], dict[str, torch.Tensor]]]:
    """config.json, or what it would say for a .gguf file, and a function that reads the tensors."""
    if path.suffix == ".gguf":
        from lib.gguf_file import GGUFFile

        file = GGUFFile(path)
        return file.config(), file.tensors
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} has no config.json: is it a checkpoint folder?")
    return read_json(path / "config.json"), lambda dtype: read_safetensors(path)
