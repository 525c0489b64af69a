"""Tensors in safetensors files, and as the parameters of a model: nothing is skipped, nothing is unpickled.

Loading is a name map plus set algebra: each of our parameters says which published tensors it is made of (lib/layouts), every
shape is checked, and a tensor that is missing, left over or of another shape is an error that names it.
"""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from lib.files import read_json, write_atomic, write_json
from lib.layouts.common import Name

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# ---- files -----------------------------------------------------------------------------------------------------------


def safetensors_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json lists."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        why = f"{shorten(pickled)} is pickled, not read" if pickled else "is it a checkpoint folder with safetensors weights?"
        raise FileNotFoundError(f"{folder} has no model.safetensors: {why}")
    where = read_json(index).get("weight_map")
    names = sorted(set(map(str, where.values()))) if isinstance(where, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{index} lists no usable shards: it may be damaged, get it again")
    if missing := [name for name in names if not (folder / name).exists()]:
        raise FileNotFoundError(f"{folder} lacks {shorten(missing)}, which its index lists: get it again")
    return [folder / name for name in names]


@contextmanager
def reading_safetensors(file: Path):
    """What the safetensors library says, in a line that names the file."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{file} is not a valid safetensors file ({error!s:.200}): it may be damaged, get it again") from None


def read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder. Raises ValueError for a name that two shards have."""
    tensors: dict[str, torch.Tensor] = {}
    for file in safetensors_files(folder):
        with reading_safetensors(file):
            shard = load_file(file)
        if twice := sorted(tensors.keys() & shard.keys()):
            raise ValueError(f"{file} holds {shorten(twice)}, which another shard holds, too: shards of two models?")
        tensors |= shard
    return tensors


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    def write(tmp):
        try:
            save_file(tensors, tmp, metadata={"format": "pt"})
        except SafetensorError as error:  # also where a write failed
            raise OSError(f"{path} cannot be written ({error}): is the disk full?") from None
        tmp.chmod(0o644)  # the library makes files that nobody but their owner may read

    write_atomic(path, write)


def write_safetensors(folder: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: float) -> None:
    """model.safetensors or, above max_shard_bytes, shards and their index. The old index goes before the first new shard, the
    new one comes after the last: whatever kills the process in between, nobody reads shards of two models as one."""
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards, size = [*shards, {}], 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    sharded, files = len(shards) > 1, [single]
    if sharded:
        files = [folder / f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        index.unlink(missing_ok=True)
    for file, shard in zip(files, shards, strict=True):
        write_tensors(file, shard)
    if sharded:
        where = {name: file.name for file, shard in zip(files, shards, strict=True) for name in shard}
        write_json(index, {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where})
    else:
        index.unlink(missing_ok=True)
    for old in {single, *folder.glob("model-?????-of-?????.safetensors")} - set(files):
        old.unlink(missing_ok=True)


def list_safetensors(folder: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, type) of every tensor, from the headers of the files: no weights are read."""
    found = []
    for file in safetensors_files(folder):
        with reading_safetensors(file), safe_open(file, framework="pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}
            found += [(name, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()]
    return found


# ---- parameters ------------------------------------------------------------------------------------------------------


class WithoutValues(TorchFunctionMode):
    """Inside the block, initialising a tensor does nothing. (On the meta device there is nothing to initialise, but torch
    imports its compiler to find that out, which takes longer than reading a small model.)"""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in ("normal_", "uniform_", "trunc_normal_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def empty_model(build: Callable[[object], nn.Module], config) -> nn.Module:
    """build(config) with parameters that have shapes and no values."""
    with torch.device("meta"), WithoutValues():
        return build(config)


def load_tensors(
    model, tensors: dict[str, torch.Tensor], names: Iterable[Name], source: str, dtype: torch.dtype | None
) -> None:
    """Fill every parameter of a model made on the meta device, or raise ValueError listing what does not fit."""
    names, tensors = list(names), dict(tensors)
    for name in names:
        again, once = tensors.pop(name.repeat, None), tensors.get(name.theirs[0])
        if again is not None and once is not None and (again.shape != once.shape or bool((again != once).any())):
            raise ValueError(
                f"{source}: {name.repeat} differs from {name.theirs[0]}, though config.json says that they are tied: "
                "set tie_word_embeddings to false there"
            )
        if again is not None and once is None:
            tensors[name.theirs[0]] = again  # some writers keep the head of the two
    wanted = {theirs for name in names for theirs in name.theirs}
    missing, left_over = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
    if missing or left_over:
        wrong = {"missing": missing, "left over": left_over}
        lists = "; ".join(f"{what}: {shorten(which)}" for what, which in wrong.items() if which)
        if not left_over and len(missing) == 1 and missing[0].endswith("lm_head.weight"):
            lists += ": it is a base model, and config.json does not say that the embedding is its head (tie_word_embeddings)"
        raise ValueError(f"{source} does not fit its config.json: {lists}")
    expected = model.state_dict()
    state = {name: tensor for name, tensor in expected.items() if not tensor.is_meta}  # 4-bit layers are there already
    for name in names:
        parts = [tensors[theirs].T if name.transpose else tensors[theirs] for theirs in name.theirs]
        shape = expected[name.ours].shape
        stacked = (sum(part.shape[0] for part in parts if part.ndim), *parts[0].shape[1:]) if parts[0].ndim else ()
        if stacked != tuple(shape) or any(part.shape[1:] != parts[0].shape[1:] for part in parts):
            found = " + ".join(str(list(tensors[theirs].shape)) for theirs in name.theirs)
            raise ValueError(f"{source}: {', '.join(name.theirs)} is {found}, which does not make {name.ours} {list(shape)}")
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        state[name.ours] = converted(tensor, dtype, f"{source}: {', '.join(name.theirs)}").contiguous()
    model.load_state_dict(state, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def converted(tensor: torch.Tensor, dtype: torch.dtype | None, what: str) -> torch.Tensor:
    """The tensor in dtype (None: as it is). Raises ValueError(what ...) unless all its numbers are finite, then, too."""
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{what} is {tensor.dtype}, which is no weight: is it quantised?")
    result = tensor.to(dtype or tensor.dtype)
    if bool(result.isfinite().all()):
        return result
    if bad := tensor.numel() - int(tensor.isfinite().sum()):
        raise ValueError(f"{what} is damaged, {bad:,} of its {tensor.numel():,} numbers are not finite: get it again")
    largest, most = tensor.abs().max().item(), torch.finfo(dtype).max
    raise ValueError(f"{what} holds {largest:.4g}, more than the {most:.4g} of {dtype}: choose another precision")


def published_tensors(state: dict, names: Iterable[Name], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Our parameters under their published names: load_tensors backwards."""
    tensors = {}
    for name in names:
        if name.ours not in state:
            raise ValueError(f"the model has no plain {name.ours} to save: are its weights quantised or its layers replaced?")
        if name.repeat is not None:
            continue
        whole = state[name.ours]
        if isinstance(whole, dict):  # a 4-bit weight, which is several tensors: see quant_files.py
            tensors |= {name.theirs[0] + suffix: tensor for suffix, tensor in whole.items()}
        else:
            whole = whole.detach().cpu()
            for theirs, part in zip(name.theirs, whole.chunk(len(name.theirs)), strict=True):
                part = converted(part.T if name.transpose else part, dtype, theirs)
                tensors[theirs] = part.clone(memory_format=torch.contiguous_format)
    return tensors


def shorten(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
