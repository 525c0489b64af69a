"""LoRA adapters as files, in PEFT's layout: what is trained on top of a checkpoint, without the checkpoint.

save_lora(model, "my-lora")              # PeftModel.from_pretrained opens it on the published model
load_lora(model, "my-lora")              # PEFT's adapters, or ours
put_adapter(model, "runs/vlm", "my-lora")        # in place of the adapter that the run's weights hold
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from safetensors.torch import load_file

from lib.checkpoint import choose_layout
from lib.files import find_source, read_json, write_json
from lib.layouts.common import Layout, renamed, unwrapped, with_defaults
from lib.lora import lora_layers, merge_lora, merged_weight
from lib.quant import Linear4bit
from lib.weights import empty_model, reading_safetensors, shorten, write_tensors
from model import convert_linears_to_lora

# What adapter_config.json may say of plain LoRA: which layers, how strong, and how training began where it left the base alone.
# Anything else that is set is of a kind that Linear_LORA does not compute.
PLAIN = {"peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version"}
PLAIN |= {"r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout", "fan_in_fan_out", "runtime_config"}
PLAIN |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core"}
PLAIN |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying"}
NEUTRAL = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica")}


class Pair(NamedTuple):
    """What an adapter holds of a layer: where it is in the file, B x A, and the layer's own weight where PEFT stores that, too,
    as it does of heads, whose rows may be others."""

    path: str
    a: torch.Tensor
    b: torch.Tensor
    base: torch.Tensor | None


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of the model without LoRA that computes the same."""
    state = model.state_dict()
    for prefix, layer in lora_layers(model).items():
        try:
            weight = merged_weight(layer)
        except ValueError as error:
            raise ValueError(f"{prefix}: {error}; save_lora keeps the correction by itself") from None
        bias = state.get(f"{prefix}.linear.bias")
        state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{prefix}.")}
        state |= {f"{prefix}.weight": weight} | ({} if bias is None else {f"{prefix}.bias": bias})
    return state


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
    read_again = our_layers(model, layout, [f"{path}.weight" for path in layers])
    if lost := [name for name in lora_layers(model) if name not in read_again.values()]:
        raise ValueError(f"a {kind} has no such layers as {shorten(lost)}: leave them out of the targets of LoRA")
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
    for name, (path, a, b, base) in pairs.items():
        layer, rank = model.get_submodule(name), a.shape[0] if a.ndim else 0
        expected = (getattr(layer, "out_features", None), rank, rank, getattr(layer, "in_features", None))
        if (*b.shape, *a.shape) != expected:
            raise ValueError(f"{folder}: {name} has LoRA matrices {list(b.shape)} x {list(a.shape)}, made for another layer")
        if base is not None and (isinstance(layer, Linear4bit) or base.shape != layer.weight.shape):
            raise ValueError(f"{folder}: {name} has a base weight {list(base.shape)}, made for another layer")
        special = (value for key, value in config["alpha_pattern"].items() if re.match(rf"(.*\.)?({key})$", path))
        alpha = next(special, config["lora_alpha"]) * (rank**0.5 if config.get("use_rslora") else 1)
        alike.setdefault((rank, alpha), []).append(name)
    for (rank, alpha), names in alike.items():
        targets = "|".join(map(re.escape, names))
        classes = tuple({type(model.get_submodule(name)) for name in names})
        convert_linears_to_lora(model, rank, alpha, config["lora_dropout"], classes, targets)
    for name, (_, a, b, base) in pairs.items():
        layer = model.get_submodule(name)
        with torch.no_grad():
            layer.lora_a.copy_(a)
            layer.lora_b.copy_(b)
            if base is not None:
                layer.linear.weight.copy_(base)
    return list(pairs)


def read_adapter_config(folder: Path) -> dict:
    """adapter_config.json, checked to be that of plain LoRA."""
    if not (folder / "adapter_config.json").exists():
        raise FileNotFoundError(f"{folder} has no adapter_config.json: is it a LoRA adapter?")
    defaults = {"lora_alpha": 8, "lora_dropout": 0.0, "alpha_pattern": {}}
    config = with_defaults(read_json(folder / "adapter_config.json"), defaults)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} is an adapter of type {config.get('peft_type')!r}: only LORA is implemented")
    for key, value in config.items():
        if key in NEUTRAL and value in NEUTRAL[key]:
            continue
        if key in NEUTRAL or (key not in PLAIN and value):
            raise ValueError(
                f"{folder} is LoRA with {key} {value!r:.80}, which Linear_LORA does not compute: merge it with PEFT "
                "(PeftModel.merge_and_unload) and save the whole model"
            )
    try:
        re.compile("|".join(config["alpha_pattern"]))
    except (re.error, TypeError) as error:
        raise ValueError(f"{folder} has an alpha_pattern that is no table of patterns ({error})") from None
    return config


def our_layers(model: nn.Module, layout: Layout, weights: list[str]) -> dict[str, str | None]:
    """{a weight's name in a file, in whichever spelling: our layer's; None where there is none, or it is made of several}."""
    names = layout.names(empty_model(layout.build, model.config))
    ours = {name.theirs[0]: name.ours for name in names if name.repeat is None and len(name.theirs) == 1}
    spelled = {weight: next(iter(layout.clean({weight: torch.empty(0)})), None) for weight in weights}
    return {weight: (name := ours.get(each)) and name.removesuffix(".weight") for weight, each in spelled.items()}


def read_adapter(model: nn.Module, layout: Layout, file: Path) -> dict[str, Pair]:
    """{name of our layer: what the file has of it}, whichever spelling the file has."""
    if not file.exists():
        raise FileNotFoundError(f"there is no {file}: save the adapter as safetensors")
    with reading_safetensors(file):
        tensors = unwrapped(load_file(file))
    matches = {key: re.fullmatch(r"base_model\.model\.(.+)\.(lora_A|lora_B|base_layer)\.weight", key) for key in tensors}
    ours = our_layers(model, layout, [f"{match[1]}.weight" for match in matches.values() if match])
    found: dict[str, dict[str, torch.Tensor]] = {}
    paths, strange = {}, []
    for key, match in matches.items():
        name = ours.get(f"{match[1]}.weight") if match else None
        if name is None:
            strange.append(key)
        else:
            found.setdefault(name, {})[match[2]], paths[name] = tensors[key], match[1]
    halves = [name for name, pair in found.items() if not {"lora_A", "lora_B"} <= pair.keys()]
    if strange or halves:
        wrong = {"no LoRA of a layer of the model": sorted(strange), "only one of two matrices": halves}
        raise ValueError(f"{file}: " + "; ".join(f"{what}: {shorten(which)}" for what, which in wrong.items() if which))
    return {name: Pair(paths[name], pair["lora_A"], pair["lora_B"], pair.get("base_layer")) for name, pair in found.items()}


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
    for layer in layers if same else ():
        layer.lora_b.data.zero_()  # nothing is left to add
    if not in_bits:
        merge_lora(model)
    where = ", which the weights held already" if same else ", in place of the run's own" if held else ""
    return f"LoRA in {len(layers)} layers, {trainable:,} trainable parameters, {trainable / total:.2%} of {total:,}{where}"
