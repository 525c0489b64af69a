"""What a layout of a published checkpoint is, and the tools that the readers of all model families share."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial

import torch.nn as nn

from lib.checks import checked
from lib.layouts.settings import check_settings


@dataclass(frozen=True)
class Name:
    """Where one of our parameters comes from. Several published names: their tensors, stacked along the first axis."""

    ours: str
    theirs: tuple[str, ...]
    transpose: bool = False  # GPT-2's files keep linear layers as [in, out]
    repeat: str | None = None  # under this name some files hold the same tensor once more: a head that is tied


@dataclass(frozen=True)
class Layout:
    model: type[nn.Module]
    read_config: Callable[[dict], object]
    write_config: Callable[[object], dict]
    names: Callable[[nn.Module], list[Name]]
    clean: Callable[[dict], dict] = lambda tensors: tensors  # drops what is no parameter, undoes spellings
    misfit: Callable[[object], str] = lambda config: ""  # why a model of this config cannot be saved so; "" where it can
    modules: dict[str, str] | None = None  # where transformers has our modules, by prefix; None: no adapters
    finish: Callable[[dict], dict] = lambda tensors: tensors  # adds what files have and we have not, redoes their shapes
    make: Callable[[object], nn.Module] | None = None  # from a config, where `model` alone does not do it

    special: Callable[["Layout", object, dict | None], "Layout"] | None = None  # see of

    def of(self, config, published: dict | None = None) -> "Layout":
        """This layout for models of a config: as config.json, `published`, has it, or to be written."""
        return self.special(self, config, published) if self.special else self

    def build(self, config) -> nn.Module:
        return (self.make or self.model)(config)


TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # entries of config.json that our configs do not hold
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
PUBLISHED_ACTIVATION = {"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}


def size_from_json(size):
    return tuple(size) if isinstance(size, list) else size


def activation(published: str) -> str:
    if published not in ACTIVATIONS:
        raise ValueError(f"the activation {published!r} is not implemented: known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[published]


def with_defaults(published: dict, defaults: dict) -> dict:
    """config.json leaves out, or gives as null, what equals the default of transformers."""
    return {**defaults, **{key: value for key, value in published.items() if value is not None}}


def renamed(name: str, prefixes: dict[str, str]) -> str:
    """The name with the first of the prefixes that fits replaced."""
    ours = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return prefixes.get(ours, "") + name.removeprefix(ours)


NO_PARAMETER = r"(^|\.)(rotary_emb\.inv_freq|embeddings\.position_ids)$"  # constants that older files keep


def names_by_prefix(model: nn.Module, prefixes: dict[str, str], no_parameter: str = NO_PARAMETER) -> list[Name]:
    """For models whose names are the published ones, but for what they begin with. A tied head is the embedding again."""
    first, names = {}, []
    for ours, parameter in model.state_dict(keep_vars=True).items():
        source, theirs = first.setdefault(id(parameter), ours), renamed(ours, prefixes)
        if not re.search(no_parameter, theirs):
            names.append(Name(ours, (renamed(source, prefixes),), repeat=theirs if source != ours else None))
    return names


def respell(tensors: dict, spellings: dict[str, str], no_parameter: str) -> dict:
    """Each name in the spelling that we write: all patterns are replaced, one after the other. Names that match
    no_parameter are left out. Raises ValueError where two names become one."""
    found, before = {}, {}
    for name, tensor in tensors.items():
        spelled = name
        for pattern, replacement in spellings.items():
            spelled = re.sub(pattern, replacement, spelled)
        if re.search(no_parameter, spelled):
            continue
        if spelled in found:
            raise ValueError(f"{before[spelled]} and {name} are two spellings of one parameter: one of them must go")
        found[spelled], before[spelled] = tensor, name
    return found


# What torch.compile, DDP, FSDP and checkpointing put before the names of the modules that they wrap.
WRAPPERS = {r"(^|\.)((_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+": r"\1"}
unwrapped = partial(respell, spellings=WRAPPERS, no_parameter=r"(?!)")  # which matches nothing


def prefix_layout(model, read_config, write_config, prefixes=None, spellings=None, no_parameter=NO_PARAMETER, **more) -> Layout:
    names = partial(names_by_prefix, prefixes=prefixes or {}, no_parameter=no_parameter)
    clean = partial(respell, spellings=spellings or {}, no_parameter=no_parameter)
    return Layout(model, read_config, write_config, names, clean, **more)


def own_settings(published: dict, config_class: type, harmless: str = "") -> dict:
    """What config.json says of the settings of one of our configs, with tuples again where JSON has lists. harmless: what may
    stand there besides."""
    check_settings(published, config_class.__name__, [f.name for f in fields(config_class)], {}, harmless)

    def tuples(value):
        return {key: tuples(inner) for key, inner in value.items()} if isinstance(value, dict) else size_from_json(value)

    return {f.name: tuples(published[f.name]) for f in fields(config_class) if f.name in published}


def part_class(published: dict, part: str, classes: Sequence[type]) -> type:
    """Of these classes of config the one that a part of config.json says it is; the first where it does not say. Raises
    ValueError for another."""
    kind = published[part].get("class", classes[0].__name__)
    found = next((each for each in classes if each.__name__ == kind), None)
    if found is None:
        raise ValueError(f"{part} has class {kind!r:.80}: known are {', '.join(each.__name__ for each in classes)}")
    return found


def own_layout(model: type[nn.Module], config_class: type) -> Layout:
    """Our own layout, for what no published one holds: config.json has the settings of our config, tensors have our names."""

    def read(published: dict):
        return checked(config_class, **own_settings(published, config_class))

    return prefix_layout(model, read, asdict, modules={})


def unusual(config, handled: Iterable[str]) -> str:
    """Why a published layout that knows only the settings `handled` cannot hold this config: another one is not its default.
    So a variant with a setting of its own is never written as what it is not."""
    for setting in fields(config):
        if setting.name not in handled and getattr(config, setting.name) != setting.default:
            return f"it has no {setting.name}"
    return ""


def block_names(ours: str, theirs: str, parts: dict[str, str | tuple[str, ...]], transpose: bool = False) -> list[Name]:
    """Weight and bias of the parts of one block: {our part: their part, or the parts it is stacked from}."""
    names = []
    for our_part, their_parts in parts.items():
        their_parts = (their_parts,) if isinstance(their_parts, str) else their_parts
        for kind in ("weight", "bias"):
            flip = transpose and kind == "weight" and "norm" not in our_part
            names.append(Name(f"{ours}.{our_part}.{kind}", tuple(f"{theirs}.{p}.{kind}" for p in their_parts), flip))
    return names
