"""Weights in and out: published checkpoints become our modules, what we train becomes a folder that others open.

    model = from_pretrained("runs/vit")           # a run folder, a Hugging Face folder, or a hub name
    save_pretrained(model, "my-vit")              # config.json + model.safetensors, which transformers opens

Loading is a name map plus set algebra: each of our parameters says which published tensors it is made of (the maps stand
at the end of this file), every shape is checked, and a tensor that is missing, left over or misshapen is an error that
names it. Nothing is skipped and nothing is unpickled: weights are safetensors. `save_state` and `load_state` keep what a
run needs to go on exactly where it stopped.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gpt import GPT, GPTConfig
from vit_scratch import ViTConfig, ViTModel

# ---- files -----------------------------------------------------------------------------------------------------------


def write_atomic(path: Path | str, write: Callable[[Path], None]) -> None:
    """Call write(temporary path beside `path`), then move the result into place: a reader sees the old file or the new
    one, never half of it, whatever kills the process in between."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder: model.safetensors, or the shards that model.safetensors.index.json lists."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        files = [single]
    elif index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"{index} lists no usable shards: it may be damaged, get it again")
        files = [folder / name for name in names]
    else:
        raise FileNotFoundError(f"{folder} has no model.safetensors: is it a checkpoint folder with safetensors weights?")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a valid safetensors file ({error}): it may be damaged, get it again") from None
    return tensors


def find_folder(source: str | Path) -> Path:
    """A folder on this disk, or a hub name, fetched with huggingface_hub when that is installed."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{source} is a file: give the folder that holds config.json and model.safetensors")
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


# ---- load and save ---------------------------------------------------------------------------------------------------


def from_pretrained(source: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> nn.Module:
    """A checkpoint as one of our modules, in eval mode, with its `.config`.

    source: a run folder, a folder with config.json and safetensors, or a hub name. config.json's model_type decides which
    module it is. Raises ValueError or FileNotFoundError, in one line, for anything that does not fit.
    """
    folder = find_folder(source)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json: is it a checkpoint folder?")
    published = read_json(folder / "config.json")
    layout = LAYOUTS.get(published.get("model_type"))
    if layout is None:
        raise ValueError(
            f"{folder}/config.json has model_type {published.get('model_type')!r}: known are {', '.join(LAYOUTS)}"
        )
    try:
        config = layout.read_config(published)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}/config.json does not describe a {published['model_type']}: {error}") from None
    with torch.device("meta"):
        model = layout.model(config)
    load_tensors(model, layout.clean(read_safetensors(folder)), layout.names(config), str(folder), dtype)
    return model.to(device).eval()


def save_pretrained(model: nn.Module, folder: str | Path, **extra_config) -> None:
    """Write config.json and model.safetensors in the published layout, each atomically. extra_config goes into config.json."""
    layout = next((layout for layout in LAYOUTS.values() if layout.can_save(model)), None)
    if layout is None:
        raise ValueError(f"{type(model).__name__} has no published layout to be saved in")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = published_tensors(model, layout.names(model.config))
    write_atomic(folder / "model.safetensors", lambda tmp: save_file(tensors, tmp, metadata={"format": "pt"}))
    write_json(folder / "config.json", {**layout.write_config(model.config), **extra_config})


@dataclass(frozen=True)
class Name:
    """Where one of our parameters comes from. Several published names: their tensors, stacked along the first axis."""

    ours: str
    theirs: tuple[str, ...]
    transpose: bool = False  # GPT-2's files keep linear layers as [in, out]


def load_tensors(model, tensors, names: Iterable[Name], source: str, dtype: torch.dtype) -> None:
    """Fill every parameter of a model made on the meta device, or raise ValueError listing what does not fit."""
    names = list(names)
    wanted = {theirs for name in names for theirs in name.theirs}
    missing, left_over = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
    if missing or left_over:
        wrong = {"missing": missing, "left over": left_over}
        lists = "; ".join(f"{what}: {shorten(which)}" for what, which in wrong.items() if which)
        raise ValueError(f"{source} does not fit its config.json: {lists}")
    expected, state = model.state_dict(), {}
    for name in names:
        parts = [tensors[theirs].T if name.transpose else tensors[theirs] for theirs in name.theirs]
        shape = expected[name.ours].shape
        stacked = (sum(part.shape[0] for part in parts if part.ndim), *parts[0].shape[1:]) if parts[0].ndim else ()
        if stacked != tuple(shape) or any(part.shape[1:] != parts[0].shape[1:] for part in parts):
            found = " + ".join(str(list(tensors[theirs].shape)) for theirs in name.theirs)
            raise ValueError(f"{source}: {', '.join(name.theirs)} is {found}, which does not make {name.ours} {list(shape)}")
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        state[name.ours] = tensor.to(dtype).contiguous()
    model.load_state_dict(state, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def published_tensors(model: nn.Module, names: Iterable[Name]) -> dict[str, torch.Tensor]:
    """Our parameters under their published names: load_tensors backwards."""
    state, tensors = model.state_dict(), {}
    for name in names:
        for theirs, part in zip(name.theirs, state[name.ours].detach().cpu().chunk(len(name.theirs)), strict=True):
            tensors[theirs] = (part.T if name.transpose else part).contiguous().clone()
    return tensors


def shorten(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---- the state of a run ----------------------------------------------------------------------------------------------


def save_state(run: str | Path, state: dict) -> None:
    """Everything needed to continue, as run/state.pt: tensors, numbers, strings, lists and dicts. Atomic."""
    write_atomic(Path(run) / "state.pt", lambda tmp: torch.save(state, tmp))


def load_state(run: str | Path) -> dict:
    path = Path(run) / "state.pt"
    if not path.exists():
        raise FileNotFoundError(f"{run} has no state.pt to resume from: start without --resume, or check --out")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}): start again without --resume") from None


# ---- the published layouts: config.json and name maps ------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    model: type[nn.Module]
    read_config: Callable[[dict], object]
    write_config: Callable[[object], dict]
    names: Callable[[object], list[Name]]
    clean: Callable[[dict], dict] = lambda tensors: tensors  # drops what is no parameter, undoes spellings
    can_save: Callable[[nn.Module], bool] = lambda model: False


ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def activation(published: str) -> str:
    if published not in ACTIVATIONS:
        raise ValueError(f"the activation {published!r} is not implemented: known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[published]


def block_names(ours: str, theirs: str, parts: dict[str, str | tuple[str, ...]], transpose: bool = False) -> list[Name]:
    """Weight and bias of the parts of one block: {our part: their part, or the parts it is stacked from}."""
    names = []
    for our_part, their_parts in parts.items():
        their_parts = (their_parts,) if isinstance(their_parts, str) else their_parts
        for kind in ("weight", "bias"):
            flip = transpose and kind == "weight" and "norm" not in our_part
            names.append(Name(f"{ours}.{our_part}.{kind}", tuple(f"{theirs}.{p}.{kind}" for p in their_parts), flip))
    return names


def read_gpt2_config(published: dict) -> GPTConfig:
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if published.get(key):
            raise ValueError(f"this GPT-2 has {key} set, which gpt.py does not implement")
    if published.get("tie_word_embeddings") is False:
        raise ValueError("this GPT-2 has an untied head, which gpt.py does not implement")
    return GPTConfig(
        vocab_size=published["vocab_size"],
        context_length=published["n_positions"],
        hidden_size=published["n_embd"],
        num_hidden_layers=published["n_layer"],
        num_attention_heads=published["n_head"],
        intermediate_size=published.get("n_inner"),
        hidden_act=activation(published.get("activation_function", "gelu_new")),
        layer_norm_eps=published.get("layer_norm_epsilon", 1e-5),
    )


def write_gpt2_config(config: GPTConfig) -> dict:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.intermediate_size,
        "activation_function": {"gelu_tanh": "gelu_new", "gelu": "gelu"}[config.hidden_act],
        "layer_norm_epsilon": config.layer_norm_eps,
        **{key: config.dropout for key in ("embd_pdrop", "attn_pdrop", "resid_pdrop")},
    }


GPT2_BLOCK = {
    "norm_1": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.proj": "attn.c_proj",
    "norm_2": "ln_2",
    "mlp.fc": "mlp.c_fc",
    "mlp.proj": "mlp.c_proj",
}


def gpt2_names(config: GPTConfig) -> list[Name]:
    names = [
        Name("token_embedding.weight", ("transformer.wte.weight",)),
        Name("lm_head.weight", ("transformer.wte.weight",)),
        Name("position_embedding.weight", ("transformer.wpe.weight",)),
    ]
    for i in range(config.num_hidden_layers):
        names += block_names(f"blocks.{i}", f"transformer.h.{i}", GPT2_BLOCK, transpose=True)
    return names + [Name(f"norm.{kind}", (f"transformer.ln_f.{kind}",)) for kind in ("weight", "bias")]


def clean_gpt2(tensors: dict) -> dict:
    """OpenAI's own upload has no "transformer." before its names and carries its causal masks as tensors; a tied head is
    the token embedding once more."""
    no_parameters = (".attn.bias", ".attn.masked_bias", "lm_head.weight")
    return {
        name if name.startswith("transformer.") else f"transformer.{name}": tensor
        for name, tensor in tensors.items()
        if not name.endswith(no_parameters)
    }


def read_vit_config(published: dict) -> ViTConfig:
    labels = published.get("id2label")
    return ViTConfig(
        image_size=size_from_json(published.get("image_size", 224)),
        patch_size=size_from_json(published.get("patch_size", 16)),
        num_channels=published.get("num_channels", 3),
        num_labels=len(labels) if labels else published.get("num_labels", 2),
        hidden_size=published["hidden_size"],
        num_hidden_layers=published["num_hidden_layers"],
        num_attention_heads=published["num_attention_heads"],
        intermediate_size=published.get("intermediate_size"),
        hidden_act=activation(published.get("hidden_act", "gelu")),
        layer_norm_eps=published.get("layer_norm_eps", 1e-12),
        qkv_bias=published.get("qkv_bias", True),
        pooling=published.get("pooling", "cls"),
    )


def size_from_json(size):
    return tuple(size) if isinstance(size, list) else size


def write_vit_config(config: ViTConfig) -> dict:
    """Google's layout reads the CLS token. A mean-pooled model is our own kind: transformers would open it and be wrong."""
    return {
        "model_type": "vit" if config.pooling == "cls" else "vit_scratch",
        "architectures": ["ViTForImageClassification"],
        **{
            key: getattr(config, key)
            for key in (
                *("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads"),
                *("intermediate_size", "layer_norm_eps", "qkv_bias", "pooling"),
            )
        },
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}[config.hidden_act],
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "id2label": {str(i): f"LABEL_{i}" for i in range(config.num_labels)},
        "label2id": {f"LABEL_{i}": i for i in range(config.num_labels)},
    }


VIT_BLOCK = {
    "norm_1": "layernorm_before",
    "attn.qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    "attn.proj": "attention.output.dense",
    "norm_2": "layernorm_after",
    "mlp.fc": "intermediate.dense",
    "mlp.proj": "output.dense",
}


def vit_names(config: ViTConfig) -> list[Name]:
    theirs = "vit.embeddings."
    names = [
        Name("embeddings.cls_token", (f"{theirs}cls_token",)),
        Name("embeddings.position_embedding", (f"{theirs}position_embeddings",)),
        Name("embeddings.projection.weight", (f"{theirs}patch_embeddings.projection.weight",)),
        Name("embeddings.projection.bias", (f"{theirs}patch_embeddings.projection.bias",)),
    ]
    for i in range(config.num_hidden_layers):
        names += block_names(f"blocks.{i}", f"vit.encoder.layer.{i}", VIT_BLOCK)
    if not config.qkv_bias:
        names = [name for name in names if not name.ours.endswith("attn.qkv.bias")]
    for ours, theirs in (("norm", "vit.layernorm"), ("classifier", "classifier")):
        names += [Name(f"{ours}.{kind}", (f"{theirs}.{kind}",)) for kind in ("weight", "bias")]
    return names


def is_vit(pooling: str) -> Callable[[nn.Module], bool]:
    return lambda model: isinstance(model, ViTModel) and model.config.pooling == pooling


LAYOUTS = {
    "gpt2": Layout(GPT, read_gpt2_config, write_gpt2_config, gpt2_names, clean_gpt2, lambda model: isinstance(model, GPT)),
    "vit": Layout(ViTModel, read_vit_config, write_vit_config, vit_names, can_save=is_vit("cls")),
    "vit_scratch": Layout(ViTModel, read_vit_config, write_vit_config, vit_names, can_save=is_vit("mean")),
}
