"""Weights in and out: published checkpoints become our modules, what we train becomes a folder that others open.

    model = from_pretrained("runs/vlm")             # a run folder, a Hugging Face folder, a .gguf file, or a hub name
    save_pretrained(model, "my-vlm")                # config.json + model.safetensors, which transformers opens
    save_lora(model, "my-lora"), load_lora(model, "my-lora")      # adapters as PEFT keeps them
    python checkpoint.py show SOURCE                # its tensors as a tree, parameters by part
    python checkpoint.py convert SOURCE FOLDER --dtype fp16
    python checkpoint.py merge-lora SOURCE FOLDER --adapter DIR   # default: the run's own adapter, SOURCE/lora

Loading is a name map plus set algebra: each of our parameters says which published tensors it is made of (the maps are in
layouts.py), every shape is checked, and a tensor that is missing, left over or misshapen is an error that names it. Nothing
is skipped and nothing is unpickled: weights are safetensors. A model that no published layout can hold is saved in our own,
whose model_type ends in "_scratch": transformers refuses it instead of misreading it. `save_state` and `load_state` keep
what a run needs to go on exactly where it stopped.
"""

import argparse
import itertools
import math
import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lib.files import read_json, write_atomic, write_json
from lib.layouts import LAYOUTS, TOKEN_IDS, Layout, Name, check_types, renamed, with_defaults
from lib.quant import STATE, SUFFIXES, Linear4bit, is_nf4, linear_from_file, quantization_config, weight_to_file
from model import Linear_LORA, convert_linears_to_lora, merge_lora

# ---- files -----------------------------------------------------------------------------------------------------------


def safetensors_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json lists."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise FileNotFoundError(f"{folder} has no model.safetensors: is it a checkpoint folder with safetensors weights?")
    where = read_json(index).get("weight_map")
    names = sorted(set(map(str, where.values()))) if isinstance(where, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{index} lists no usable shards: it may be damaged, get it again")
    if missing := [name for name in names if not (folder / name).exists()]:
        raise FileNotFoundError(f"{folder} lacks {shorten(missing)}, which its index lists: get it again")
    return [folder / name for name in names]


@contextmanager
def naming(file: Path):
    """What the safetensors library says, in a line that names the file."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{file} is not a valid safetensors file ({error!s:.200}): it may be damaged, get it again") from None


def read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    tensors: dict[str, torch.Tensor] = {}
    for file in safetensors_files(folder):
        with naming(file):
            tensors |= load_file(file)
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


# ---- load and save ---------------------------------------------------------------------------------------------------


def from_pretrained(
    source: str | Path, dtype: torch.dtype | None = torch.float32, device: str | torch.device = "cpu"
) -> nn.Module:
    """A checkpoint as one of our modules, in eval mode, with its `.config`.

    source: a run folder, a folder with config.json and safetensors, a LLaMA's .gguf file, or a hub name. config.json's
    model_type decides which module it is. dtype None: as stored (quantised .gguf tensors: fp32). Raises ValueError or
    FileNotFoundError, in one line, for anything that does not fit.
    """
    path = find_source(source)
    return build(path, *open_source(path), dtype).to(device).eval()


def build(path: Path, published: dict, read_tensors: Callable, dtype: torch.dtype | None) -> nn.Module:
    kind = published.get("model_type")
    layout = LAYOUTS.get(kind) if isinstance(kind, str) else None
    where = path if path.suffix == ".gguf" else path / "config.json"
    if layout is None:
        raise ValueError(f"{where} has model_type {kind!r}: known are {', '.join(LAYOUTS)}")
    quantised = published.get("quantization_config")
    if quantised and not is_nf4(quantised):
        raise ValueError(f"{where} has a quantization_config that is not NF4: get the weights in full precision, or as .gguf")
    if quantised and layout.modules is None:
        raise ValueError(f"{where} is a {kind} in 4 bits: only LLaMA and VLMs are implemented so")
    try:
        config = layout.read_config(published)
        check_types(config)
    except (AttributeError, KeyError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{where} does not describe a {kind}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    try:
        with torch.device("meta"):
            model = layout.model(config)
    except (RuntimeError, TypeError, ArithmeticError) as error:  # torch's ways to say that a size is beyond all bounds
        raise ValueError(f"{where} does not describe a {kind}: {str(error).splitlines()[0]}") from None
    tensors, names = layout.clean(read_tensors(dtype)), layout.names(model)
    if quantised:
        names = place_quantised(model, tensors, names, str(path), dtype)
    load_tensors(model, tensors, names, str(path), dtype)
    return model


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    layout: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
    **extra_config,
) -> str:
    """Write config.json and the weights, each file atomically; the model_type written is returned.

    layout: None for a published one where the model fits one and our own elsewhere; "published", or a model_type, to be told
    (ValueError) why it does not fit. dtype: None keeps the model's. LoRA layers are written merged, which makes floats of
    their 4-bit bases; other 4-bit layers are written as bitsandbytes keeps them. The model stays as it is. extra_config goes
    into config.json, token ids (bos_token_id, ...) to where transformers looks for them.
    """
    kind, chosen = choose_layout(model, layout)
    quantised = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit) and not name.endswith(".base")}
    if quantised and chosen.modules is None:
        raise ValueError(f"4-bit layers of a {type(model).__name__} have no layout: only those of LLaMA and VLMs do")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        names = chosen.names(chosen.model(model.config))
    state = {**plain_state(model), **{f"{name}.weight": layer for name, layer in quantised.items()}}
    tensors = published_tensors(state, names, dtype)
    stored = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    config = {"model_type": kind, **chosen.write_config(model.config), "dtype": str(stored).removeprefix("torch.")}
    if quantised:
        config["quantization_config"] = quantization_config(parts_in_floats(model, quantised, chosen))
    text = config.get("text_config", config) if is_published(kind) else config
    text.update({key: extra_config.pop(key) for key in TOKEN_IDS if key in extra_config})
    write_safetensors(folder, tensors, max_shard_bytes)
    write_json(folder / "config.json", {**config, **extra_config})
    return kind


def is_published(kind: str) -> bool:
    return not kind.endswith("_scratch")


def choose_layout(model: nn.Module, wanted: str | None) -> tuple[str, Layout]:
    """The first layout that fits, of those for this kind of model and of the wanted sort. See save_pretrained."""
    kinds = [kind for kind, layout in LAYOUTS.items() if isinstance(model, layout.model)]
    if not kinds:
        raise ValueError(f"{type(model).__name__} has no layout to be saved in")
    if wanted == "published":
        kinds = [kind for kind in kinds if is_published(kind)]
    elif wanted is not None:
        if wanted not in kinds:
            raise ValueError(f"{type(model).__name__} is never a {wanted!r}: choose published, {', '.join(kinds)}")
        kinds = [wanted]
    reasons: dict[str, list[str]] = {}
    for kind in kinds:
        reason = LAYOUTS[kind].misfit(model.config)
        if not reason:
            return kind, LAYOUTS[kind]
        reasons.setdefault(reason, []).append(kind)
    why = "; ".join(f"{', '.join(which)}: {reason}" for reason, which in reasons.items())
    raise ValueError(f"this {type(model).__name__} does not fit the published layout ({why})")


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
    wanted = {theirs for name in names for theirs in name.theirs}
    missing, left_over = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
    if missing or left_over:
        wrong = {"missing": missing, "left over": left_over}
        lists = "; ".join(f"{what}: {shorten(which)}" for what, which in wrong.items() if which)
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
        if not tensor.is_floating_point():
            raise ValueError(f"{source}: {', '.join(name.theirs)} is {tensor.dtype}, which is no weight: is it quantised?")
        if bad := tensor.numel() - int(tensor.isfinite().sum()):
            what = f"{bad:,} of its {tensor.numel():,} numbers are not finite"
            raise ValueError(f"{source}: {', '.join(name.theirs)} is damaged, {what}: get it again")
        state[name.ours] = tensor.to(dtype or tensor.dtype).contiguous()
    model.load_state_dict(state, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def place_quantised(model: nn.Module, tensors: dict, names: list[Name], source: str, dtype: torch.dtype | None) -> list[Name]:
    """Move the 4-bit weights out of `tensors` into a model on the meta device, as Linear4bit; the names of all others."""
    others = []
    for name in names:
        theirs = name.theirs[0]
        if theirs + STATE not in tensors:
            others.append(name)
            continue
        path = name.ours.removesuffix(".weight")
        linear, parts = model.get_submodule(path), {suffix: theirs + suffix for suffix in SUFFIXES}
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{source}: {theirs} is in 4 bits, which is implemented for linear layers alone")
        found = {suffix: tensors.pop(part) for suffix, part in parts.items() if part in tensors}
        try:
            layer = linear_from_file(found, linear.weight.shape, linear.bias, dtype)
        except ValueError as error:
            raise ValueError(f"{source}: {theirs}: {error}") from None
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return others


def parts_in_floats(model: nn.Module, quantised: Iterable[str], layout: Layout) -> list[str]:
    """The largest parts of a model, under the names that transformers has for them, without a 4-bit layer and with a linear
    one."""
    prefixes = layout.modules or {}
    in_bits = [f"{renamed(name, prefixes)}." for name in quantised]
    found = {}  # as an ordered set
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            parts = renamed(name, prefixes).split(".")
            paths = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
            found[next(path for path in paths if not any(other.startswith(f"{path}.") for other in in_bits))] = None
    return list(found)


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of the model without LoRA that computes the same."""
    state = model.state_dict()
    for prefix, layer in lora_layers(model).items():
        weight = getattr(layer.base, "weight", None)
        if weight is None or not weight.is_floating_point():
            raise ValueError(f"{prefix} is a {type(layer.base).__name__}, too coarse to merge LoRA into: use save_lora")
        bias = state.get(f"{prefix}.base.bias")
        state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{prefix}.")}
        state |= {f"{prefix}.weight": layer.weight} | ({} if bias is None else {f"{prefix}.bias": bias})
    return state


def published_tensors(
    state: dict[str, torch.Tensor], names: Iterable[Name], dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Our parameters under their published names: load_tensors backwards."""
    tensors = {}
    for name in names:
        if name.ours not in state:
            raise ValueError(f"the model has no plain {name.ours} to save: are its weights quantised or its layers replaced?")
        if name.repeat is not None:
            continue
        whole = state[name.ours]
        if isinstance(whole, Linear4bit):
            tensors |= {name.theirs[0] + suffix: tensor for suffix, tensor in weight_to_file(whole).items()}
        else:
            whole = whole.detach().cpu()
            for theirs, part in zip(name.theirs, whole.chunk(len(name.theirs)), strict=True):
                tensors[theirs] = (part.T if name.transpose else part).to(dtype or part.dtype, copy=True).contiguous()
    return tensors


def shorten(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---- LoRA adapters, in PEFT's layout ---------------------------------------------------------------------------------

# What else PEFT can put into an adapter, which Linear_LORA does not compute.
NOT_LORA = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "modules_to_save")
NOT_LORA += ("trainable_token_indices", "target_parameters", "layer_replication")


def lora_layers(model: nn.Module) -> dict[str, Linear_LORA]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear_LORA)}


def adapter_layout(model: nn.Module) -> tuple[str, Layout]:
    kind, layout = choose_layout(model, None)
    if layout.modules is None:
        raise ValueError(f"LoRA adapters of a {type(model).__name__} have no layout: only those of LLaMA and VLMs do")
    return kind, layout


def save_lora(model: nn.Module, folder: str | Path, base: str | None = None) -> None:
    """Write the LoRA layers alone: adapter_model.safetensors, then adapter_config.json, which PeftModel.from_pretrained opens
    on the published model. base: where that is (a folder or hub name), for those who open the adapter without naming it.
    Raises ValueError for a model without LoRA layers."""
    kind, layout = adapter_layout(model)
    layers = {renamed(name, layout.modules): layer for name, layer in lora_layers(model).items()}
    if not layers:
        raise ValueError("the model has no LoRA layers to save: convert_linears_to_lora makes them")
    tensors, ranks, alphas = {}, {}, {}
    for path, layer in layers.items():
        for letter, tensor in (("A", layer.lora_a), ("B", layer.lora_b)):
            tensors[f"base_model.model.{path}.lora_{letter}.weight"] = tensor.detach().cpu().contiguous()
        ranks[path], alphas[path] = len(layer.lora_a), layer.scaling * len(layer.lora_a)
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if kind == "llama" else None,
        "base_model_name_or_path": None if base is None else str(base),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": next(iter(layers.values())).dropout,
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {path: a for path, a in alphas.items() if a != alpha},
        "target_modules": list(layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", config)


def load_lora(model: nn.Module, folder: str | Path) -> list[str]:
    """Wrap the layers that an adapter of save_lora or PEFT names in Linear_LORA, in place, and fill them; their names are
    returned. Raises ValueError for an adapter that is no plain LoRA, does not fit the model, or is one too many."""
    folder = Path(folder)
    config = read_adapter_config(folder)
    if lora_layers(model):
        raise ValueError("the model has LoRA layers already: merge_lora them, or load the adapter into a fresh model")
    _, layout = adapter_layout(model)
    pairs = read_adapter(model, layout, folder / "adapter_model.safetensors")
    alike: dict[tuple, list[str]] = {}
    for name, (a, b) in pairs.items():
        layer, rank = model.get_submodule(name), a.shape[0] if a.ndim else 0
        expected = (getattr(layer, "out_features", None), rank, rank, getattr(layer, "in_features", None))
        if (*b.shape, *a.shape) != expected:
            raise ValueError(f"{folder}: {name} has LoRA matrices {list(b.shape)} x {list(a.shape)}, made for another layer")
        path = renamed(name, layout.modules)
        special = (value for key, value in config["alpha_pattern"].items() if re.match(rf"(.*\.)?({key})$", path))
        alpha = next(special, config["lora_alpha"]) * (rank**0.5 if config.get("use_rslora") else 1)
        alike.setdefault((rank, alpha), []).append(name)
    for (rank, alpha), names in alike.items():
        convert_linears_to_lora(model, rank, alpha, config["lora_dropout"], "|".join(map(re.escape, names)))
    for name, (a, b) in pairs.items():
        layer = model.get_submodule(name)
        with torch.no_grad():
            layer.lora_a.copy_(a)
            layer.lora_b.copy_(b)
    return list(pairs)


def read_adapter_config(folder: Path) -> dict:
    """adapter_config.json, checked to be that of plain LoRA."""
    if not (folder / "adapter_config.json").exists():
        raise FileNotFoundError(f"{folder} has no adapter_config.json: is it a LoRA adapter?")
    defaults = {"lora_alpha": 8, "lora_dropout": 0.0, "alpha_pattern": {}}
    config = with_defaults(read_json(folder / "adapter_config.json"), defaults)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} is an adapter of type {config.get('peft_type')!r}: only LORA is implemented")
    extra = [key for key in NOT_LORA if config.get(key)] + (["bias"] if config.get("bias", "none") != "none" else [])
    if extra:
        raise ValueError(f"{folder} is LoRA with {', '.join(extra)}, which Linear_LORA does not compute")
    return config


def read_adapter(model: nn.Module, layout: Layout, file: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{name of our layer: (A, B)}, whichever spelling the file has."""
    if not file.exists():
        raise FileNotFoundError(f"there is no {file}: save the adapter as safetensors")
    with torch.device("meta"):
        ours = {name.theirs[0]: name.ours for name in layout.names(layout.model(model.config)) if name.repeat is None}
    with naming(file):
        tensors = load_file(file)
    found: dict[str, dict[str, torch.Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        spelled = layout.clean({f"{match[1]}.weight": tensor}) if match else {}
        name = ours.get(next(iter(spelled), None))
        if name is None:
            strange.append(key)
        else:
            found.setdefault(name.removesuffix(".weight"), {})[match[2]] = tensor
    halves = [name for name, pair in found.items() if len(pair) < 2]
    if strange or halves:
        wrong = {"no LoRA of a layer of the model": sorted(strange), "only one of two matrices": halves}
        raise ValueError(f"{file}: " + "; ".join(f"{what}: {shorten(which)}" for what, which in wrong.items() if which))
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


# ---- the state of a run ----------------------------------------------------------------------------------------------


def save_state(run: str | Path, state: dict) -> None:
    """Everything needed to continue, as run/state.pt: tensors, numbers, strings, lists and dicts. Atomic."""
    path = Path(run) / "state.pt"

    def write(tmp):
        try:
            torch.save(state, tmp)
        except RuntimeError as error:  # torch's way to say that a write failed
            reason = str(error).splitlines()[0]
            raise OSError(f"{path} cannot be written ({reason}): is the disk full? The state before is still good") from None

    write_atomic(path, write)


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


# ---- command line ----------------------------------------------------------------------------------------------------

# What stands beside the weights and goes along when a folder is converted.
COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "encoder.json", "vocab.bpe"),
    *("preprocessor_config.json", "processor_config.json", "generation_config.json"),
)
KEPT = (*TOKEN_IDS, "id2label", "label2id")  # entries of config.json that our configs do not hold
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def convert(source: str, folder: str | Path, dtype: torch.dtype | None = None) -> str:
    """Read a checkpoint and write it as a folder, with its tokenizer; the model_type written is returned."""
    path = find_source(source)
    published, read_tensors = open_source(path)
    return write_folder(build(path, published, read_tensors, dtype), path, published, Path(folder))


def write_folder(model: nn.Module, path: Path, published: dict, folder: Path) -> str:
    """A model that was read from `path`, with what stands beside it there; the model_type written is returned."""
    if path.suffix == ".gguf":
        from lib.tokenizer import BPETokenizer

        BPETokenizer.from_pretrained(path).save_pretrained(folder)
    known = {**(published.get("text_config") or {}), **published}
    kind = save_pretrained(model, folder, **{key: known[key] for key in KEPT if key in known})
    for name in COMPANIONS:
        if (path / name).is_file() and path.resolve() != folder.resolve():
            write_atomic(folder / name, partial(shutil.copyfile, path / name))
    return kind


def put_adapter(model: nn.Module, source: str | Path, adapter: str | Path) -> str:
    """Merge an adapter of save_lora or PEFT into a model that was read from `source`, in place; a line about it is returned.

    The weights of a run hold its own adapter, which lies in its folder lora/: that is taken out first, to rounding. 4-bit
    layers keep the adapter beside them. Raises ValueError and OSError as load_lora does, the model then being of no use.
    """
    adapter, own = Path(adapter), find_source(source) / "lora"
    held, in_bits = own.is_dir(), [m for m in model.modules() if isinstance(m, Linear4bit)]
    total = sum(p.numel() for p in model.parameters()) + sum(m.in_features * m.out_features for m in in_bits)
    same = held and adapter.resolve() == own.resolve()
    if held and not same:
        load_lora(model, own)
        for layer in lora_layers(model).values():
            layer.lora_b.data.neg_()
        merge_lora(model)
    layers = [model.get_submodule(name) for name in load_lora(model, adapter)]
    trainable = sum(layer.lora_a.numel() + layer.lora_b.numel() for layer in layers)
    for layer in layers:
        layer.merged = same
    if not in_bits:
        merge_lora(model)
    where = ", which the weights held already" if same else ", in place of the run's own" if held else ""
    return f"LoRA in {len(layers)} layers, {trainable:,} trainable parameters, {trainable / total:.2%} of {total:,}{where}"


def merge_adapter(source: str, folder: str | Path, adapter: str | None = None) -> tuple[str, str]:
    """Write a checkpoint with an adapter (a run's own unless given) merged into it; the model_type written and put_adapter's
    line are returned."""
    path = find_source(source)
    published, read_tensors = open_source(path)
    model = build(path, published, read_tensors, None)
    about = put_adapter(model, source, adapter or path / "lora")
    return write_folder(model, path, published, Path(folder)), about


def list_tensors(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, type) of every tensor, from the headers of the files: no weights are read."""
    if path.suffix == ".gguf":
        from lib.gguf_file import GGUFFile

        return GGUFFile(path).list_tensors()
    found = []
    for file in safetensors_files(path):
        with naming(file), safe_open(file, framework="pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}
            found += [(name, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()]
    return found


def show(source: str) -> Iterator[str]:
    """The lines of a checkpoint's tree: parts with their parameters, tensors with shape and type, layers that are alike in
    one."""
    path = find_source(source)
    tensors = list_tensors(path)
    tree: dict = {}
    for name, shape, kind in sorted(tensors):
        *parents, leaf = name.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(f"{part}.", {})
        node[leaf] = (shape, kind)
    yield f"{source}: {count_parameters(tree):,} parameters in {len(tensors)} tensors"
    yield from tree_lines(tree, "  ")


def count_parameters(node) -> int:
    return sum(map(count_parameters, node.values())) if isinstance(node, dict) else math.prod(node[0])


def tree_lines(tree: dict, indent: str) -> Iterator[str]:
    """One line per part and per tensor. Parts called 0, 1, 2, ... that hold the same share a line, "0-29"; a part with a
    single thing in it shares that one's."""
    children = sorted(tree.items(), key=lambda child: int(child[0][:-1]) if child[0][:-1].isdigit() else -1)
    for _, group in itertools.groupby(children, lambda child: (child[0][:-1].isdigit() and repr(child[1])) or child[0]):
        (label, node), *others = group
        each, times = count_parameters(node), 1 + len(others)
        label = label.removesuffix(".") + (f"-{others[-1][0][:-1]}" if others else "")
        while isinstance(node, dict) and len(node) == 1:
            ((below, node),) = node.items()
            label += f".{below.removesuffix('.')}"
        label += f" ({times} x {each:,})" if others else ""
        if not isinstance(node, dict):
            label += f"  {list(node[0])} {node[1]}"
        yield f"{indent + label:<80}{times * each:>16,}"
        if isinstance(node, dict):
            yield from tree_lines(node, indent + "  ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    source = {"metavar": "SOURCE", "help": "a run folder, a Hugging Face folder, a .gguf file, or a hub name"}
    commands.add_parser("show", help="print the tree of tensors").add_argument("source", **source)
    to = commands.add_parser("convert", help="write it as a folder that transformers opens, tokenizer included")
    to.add_argument("source", **source)
    to.add_argument("folder", metavar="FOLDER", help="where to write config.json and the weights")
    to.add_argument("--dtype", choices=DTYPES, help="precision to write; default: as stored (quantised .gguf: fp32)")
    merge = commands.add_parser("merge-lora", help="write it with a LoRA adapter merged into its weights")
    merge.add_argument("source", **source)
    merge.add_argument("folder", metavar="FOLDER", help="where to write config.json and the weights")
    merge.add_argument("--adapter", metavar="DIR", help="PEFT's or ours; default: the run's own, its folder lora/")
    args = parser.parse_args()
    if args.command == "show":
        print("\n".join(show(args.source)))
    elif args.command == "merge-lora":
        kind, about = merge_adapter(args.source, args.folder, args.adapter)
        print(f"{about}\n{args.folder} holds a {kind} now, without LoRA layers")
    else:
        kind = convert(args.source, args.folder, DTYPES.get(args.dtype))
        print(f"{args.folder} holds a {kind} now" + ("" if is_published(kind) else ", which only this project opens"))


if __name__ == "__main__":
    from lib.run import run_cli  # stands below this file, and is needed by this one line alone

    run_cli(main)
