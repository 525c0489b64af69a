"""Where a user's flags or files become the config of a model: what no model can have is one clear line.

    config = checked(ViTConfig, image_size=16, patch_size=4, hidden_size=args.hidden_size, ...)

The configs themselves, in gpt.py and the other core files, hold only assertions for who calls them from code.
"""

import math
import re
from dataclasses import fields, is_dataclass
from typing import get_args, get_origin

AT_LEAST_ONE = (
    *("vocab_size", "context_length", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("n_heads", "n_layers", "hidden_dim", "n_kv_groups", "head_dim", "max_position_embeddings", "projection_size"),
    *("projection_dim", "pixel_shuffle", "cross_every", "image_size", "patch_size", "num_channels"),
)
MOST = {"num_hidden_layers": 1000, "n_layers": 1000, "image_token_id": 2**31 - 1}  # building a billion layers would take days
SMALL = ("layer_norm_eps", "rms_norm_eps")
PARTS = ("dropout", "drop_path", "attention_dropout")  # of a whole
CHOICES = {
    "hidden_act": ("gelu", "gelu_tanh", "quick_gelu"),
    "attention": ("sdpa", "explicit"),
    "pooling": ("cls", "mean"),
    "position_init": ("normal", "sincos"),
    "projector_type": ("mlp", "linear"),
}
ROPE_SETTINGS = {  # what each kind of rope_scaling must say
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def checked(config_class: type, **settings):
    """config_class(**settings), or ValueError, in one line, for settings that it does not have or no model can have."""
    unknown = settings.keys() - {field.name for field in fields(config_class)}
    if unknown:
        raise ValueError(f"{config_class.__name__} has no setting {', '.join(sorted(unknown))}")
    for name, value in settings.items():
        check_value(name, value)
    if isinstance(settings.get("rope_scaling"), dict):
        settings["rope_scaling"] = checked_rope_scaling(settings["rope_scaling"])
    try:
        config = config_class(**settings)
        getattr(config, "grid", None)
    except AssertionError as error:
        raise ValueError(str(error)) from None
    except TypeError as error:  # of a config inside this one
        if not (found := re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))):
            raise
        raise ValueError(f"{found[1]} has no setting {found[2]}") from None
    check_types(config)
    if hasattr(config, "projector_type") and config.vision_config.num_channels != 3:
        raise ValueError(f"its tower reads images of {config.vision_config.num_channels} channels: it must be 3, RGB")
    return config


# What a message says, and the setting and flag of a script by which it is chosen.
FLAGS = {
    "hidden_size": ("hidden_size", "--hidden-size"), "attention heads": ("num_attention_heads", "--heads"),
    "num_hidden_layers": ("num_hidden_layers", "--layers"), "patch": ("patch_size", "--patch-size"),
    "image": ("image_size", "--image-size"), "pixel_shuffle": ("pixel_shuffle", "--pixel-shuffle"),
}  # fmt: skip


def checked_flags(args, config_class: type, **settings):
    """checked, for settings from a command line: the error names the flags that choose what it is about."""
    try:
        return checked(config_class, **settings)
    except ValueError as error:
        flags = [flag for words, (name, flag) in FLAGS.items() if words in str(error) and hasattr(args, name)]
        raise ValueError(f"{error} ({', '.join(flags)})" if flags else str(error)) from None


def check_value(name: str, value) -> None:
    """Raises ValueError for a number that is out of the range of settings of this name."""
    if isinstance(value, dict) and name.endswith("_config"):
        for inner in value.items():
            check_value(*inner)
    if name in CHOICES and value not in CHOICES[name]:
        raise ValueError(f"{name} is {value!r}: it must be {' or '.join(CHOICES[name])}")
    for number in value if isinstance(value, tuple | list) else (value,):
        if not isinstance(number, int | float) or isinstance(number, bool):
            continue
        if name in AT_LEAST_ONE and not number >= 1:
            raise ValueError(f"{name} is {number}: it must be at least 1")
        if name in MOST and number > MOST[name]:
            raise ValueError(f"{name} is {number}: it exceeds the maximum of {MOST[name]}")
        if name in SMALL and not 0 < number < 1:
            raise ValueError(f"{name} is {number}: it must be a small number above 0")
        if name in PARTS and not 0 <= number < 1:
            raise ValueError(f"{name} is {number}: it must be at least 0 and below 1")
        if name == "rope_base" and not 0 < number < math.inf:
            raise ValueError(f"{name} is {number}: it must be a number above 0")
        if name in ("image_token_id", "num_labels", "num_registers") and number < 0:
            raise ValueError(f"{name} is {number}: it must be at least 0")


def checked_rope_scaling(given: dict) -> dict:
    """{"rope_type": ..., its settings}. Raises ValueError for a kind that is not implemented, and for settings it has not."""
    given = dict(given)
    kind = given.pop("type", None)  # the older spelling; some files have both
    kind = given.pop("rope_type", kind)
    if kind not in ROPE_SETTINGS:
        raise ValueError(f"rope_scaling has rope_type {kind!r}: known are {', '.join(ROPE_SETTINGS)}")
    if set(given) != set(ROPE_SETTINGS[kind]):
        wanted = ", ".join(ROPE_SETTINGS[kind]) or "nothing"
        raise ValueError(f"rope_scaling of type {kind} holds {', '.join(given) or 'nothing'} besides: it must be {wanted}")
    for name, value in given.items():
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"rope_scaling has {name} {value!r}: it must be a number above 0")
    if kind == "llama3" and not given["low_freq_factor"] < given["high_freq_factor"]:
        raise ValueError(f"rope_scaling has low_freq_factor {given['low_freq_factor']}, not below its high_freq_factor")
    return {"rope_type": kind, **given}


def check_types(config) -> None:
    """Raises ValueError where a setting has another type than its dataclass says, as JSON may give it: of "true" and 8.0 for a
    width as much as of NaN."""
    for field in fields(config):
        value, kinds = getattr(config, field.name), [get_origin(kind) or kind for kind in get_args(field.type) or (field.type,)]
        if is_dataclass(value):
            check_types(value)
        elif float in kinds and type(value) in (int, float):
            if not math.isfinite(value):
                raise ValueError(f"{field.name} is {value}: it must be finite")
        elif type(value) not in kinds or (isinstance(value, tuple) and [type(side) for side in value] != [int, int]):
            raise ValueError(f"{field.name} is {value!r:.80}: it must be {' or '.join(kind.__name__ for kind in kinds)}")
