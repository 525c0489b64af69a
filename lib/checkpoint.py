"""Checkpoints in and out: published ones become our modules, what we train becomes a folder that others open.

    model = from_pretrained("runs/vlm")             # a run folder, a Hugging Face folder, a .gguf file, or a hub name
    model, processor = load_vlm("runs/vlm")         # a vision-language model with what makes its inputs
    save_pretrained(model, "my-vlm")                # config.json + model.safetensors, which transformers opens
    python -m lib.checkpoint show|convert|merge-lora|push ...   # see convert.py

Which tensor is which parameter stands in layouts/, how tensors are read and checked in weights.py, LoRA in adapters.py. A model
that no published layout can hold is saved in our own, whose model_type ends in "_scratch": transformers refuses it instead of
misreading it. Only what a checkpoint holds is imported: to read a ViT, no LLaMA, no 4-bit layers and no tokenizer.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from pathlib import Path

import torch
import torch.nn as nn

from lib.files import find_source, read_json, write_json
from lib.layouts import find_layout, layouts_of
from lib.layouts.common import TOKEN_IDS, Layout, unwrapped
from lib.weights import empty_model, load_tensors, published_tensors, read_safetensors, write_safetensors


def from_pretrained(
    source: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    image_size: int | tuple[int, int] | None = None,
) -> nn.Module:
    """A checkpoint as one of our modules, in eval mode, with its `.config`; one that writes text has a `.generation_config`,
    too (lib/generation.py).

    source: a run folder, a folder with config.json and safetensors, a LLaMA's .gguf file, or a hub name. config.json's
    model_type decides which module it is. dtype None: as stored (quantised .gguf tensors: fp32). image_size: make the vision
    tower read images of so many pixels, a number or (height, width), its positions resized. Raises ValueError or
    FileNotFoundError, in one line, for anything that does not fit.
    """
    path = find_source(source)
    published, read_tensors = open_source(path)
    if published.get("model_type") == "llmvit_scratch" and image_size is None:  # made of several models: no layout
        from extras.llmvit_backbones import from_run

        return from_run(path)[0].to(device, dtype)
    layout, config = understand(path, published)
    try:
        model = empty_model(layout.build, config)
    except (RuntimeError, TypeError, ArithmeticError) as error:  # torch's ways to say that a size exceeds what it can hold
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} does not describe a {published['model_type']}: {reason}") from None
    tensors, names = layout.clean(unwrapped(read_tensors(dtype))), layout.names(model)
    if published.get("quantization_config"):
        from lib.quant_files import place_quantised

        names = place_quantised(model, tensors, names, str(path), dtype)
    load_tensors(model, tensors, names, str(path), dtype)
    if image_size is not None:
        model = resize_images(model, image_size)
    if hasattr(model, "stream"):  # it writes text
        from lib.generation import read_generation_config

        model.generation_config = read_generation_config(path, published)
    return model.to(device).eval()


def resize_images(model: nn.Module, image_size: int | tuple[int, int]) -> nn.Module:
    """The model, its vision tower made for images of another size. Raises ValueError for a model without one."""
    from lib.positions import resized_tower

    if hasattr(model.config, "image_size"):  # it is a tower
        return resized_tower(model, image_size)
    part = "vision_model" if hasattr(model, "vision_model") else "vision_tower"
    if not hasattr(model, part):
        raise ValueError(f"a {type(model).__name__} reads no images: leave out image_size")
    setattr(model, part, resized_tower(getattr(model, part), image_size))
    model.config = replace(model.config, vision_config=getattr(model, part).config)
    return model


def load_vlm(
    source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32,
    split_images: bool | None = None,
):  # fmt: skip
    """A vision-language model and the processor that belongs to it. split_images: see load_processor. Raises ValueError or
    FileNotFoundError for a checkpoint of another kind, and for one whose files contradict each other."""
    from model import MllamaForConditionalGeneration

    model = from_pretrained(source, dtype, device)
    if not isinstance(model, MllamaForConditionalGeneration):
        raise ValueError(f"{source} holds a {type(model).__name__}, which does not answer questions about images")
    return model, load_processor(source, model, split_images)


def load_processor(source: str | Path, model: nn.Module, split_images: bool | None = None):
    """What makes images and questions the input of a vision-language model that was read from `source`. split_images: whether
    images are cut into tiles, unless the files are to say it. Raises ValueError where tokenizer, image settings and model do
    not belong together."""
    from processing_mllama import MllamaImageProcessor

    processor = MllamaImageProcessor.from_pretrained(find_source(source))
    if split_images is not None:
        processor.split_images(split_images)
    if model.config.image_token_id is None:
        model.config = replace(model.config, image_token_id=processor.image_token_id)
    for what, has, wants in (
        ("images of (height, width)", processor.image_size, model.vision_tower.image_size),
        ("tokens an image", processor.num_image_token, model.config.text_config.num_image_tokens),
        (f"the token id of {processor.image_token}", processor.image_token_id, model.config.image_token_id),
    ):
        if has != wants:
            raise ValueError(f"{source} contradicts itself: {what}: {has} for its processor, {wants} for its model")
    return processor


def read_config(source: str | Path):
    """The config of a checkpoint's model, as from_pretrained gives it, without the weights."""
    path = find_source(source)
    return understand(path, open_source(path)[0])[1]


def open_source(path: Path) -> tuple[dict, Callable[[torch.dtype | None], dict[str, torch.Tensor]]]:
    """config.json, or what it would say for a .gguf file, and a function that reads the tensors."""
    if path.suffix == ".gguf":
        from lib.gguf_file import GGUFFile

        file = GGUFFile(path)
        return file.config(), file.tensors
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} has no config.json: is it a checkpoint folder?")
    return read_json(path / "config.json"), lambda dtype: read_safetensors(path)


def understand(path: Path, published: dict) -> tuple[Layout, object]:
    """What config.json says, `published`: the layout and our config. Raises ValueError where it makes no sense."""
    kind, where = published.get("model_type"), path if path.suffix == ".gguf" else path / "config.json"
    try:
        layout = find_layout(kind)
    except ValueError as error:
        raise ValueError(f"{where} has {error}") from None
    if quantised := published.get("quantization_config"):
        from lib.quant_files import is_nf4

        if not is_nf4(quantised):
            raise ValueError(
                f"{where} has a quantization_config that is not NF4: get the weights in full precision, or as .gguf"
            )
        if layout.modules is None:
            raise ValueError(f"{where} is a {kind} in 4 bits: only LLaMA and VLMs are implemented so")
    try:
        config = layout.read_config(published)
    except (AttributeError, KeyError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{where} does not describe a {kind}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return layout.of(config, published), config


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
    state, more = model.state_dict(), {}
    if any(name.endswith(".lora_a") for name in state):
        from lib.adapters import plain_state

        state = plain_state(model)
    if any(name.endswith(".nested_absmax") for name in state):
        from lib.quant_files import quantised_weights

        weights, more["quantization_config"] = quantised_weights(model, chosen)
        state |= weights
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = chosen.names(empty_model(chosen.build, model.config))
    tensors = chosen.finish(published_tensors(state, names, dtype))
    stored = reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()})
    config = {"model_type": kind, **chosen.write_config(model.config), "dtype": str(stored).removeprefix("torch."), **more}
    text = config.get("text_config", config) if is_published(kind) else config
    text.update({key: extra_config.pop(key) for key in TOKEN_IDS if key in extra_config})
    write_safetensors(folder, tensors, max_shard_bytes)
    write_json(folder / "config.json", {**config, **extra_config})
    return kind


def layout_line(model: nn.Module, folder: str | Path, kind: str, why: str = "") -> str:
    """Which layout save_pretrained has chosen, `kind`, and where it is none that transformers opens, why: what the model says,
    unless it is told."""
    if is_published(kind):
        return f"{folder} is in the layout of {kind}, which transformers opens"
    try:
        choose_layout(model, "published")
    except ValueError as error:
        why = str(error)
    if why:
        return f"{folder} is in this project's own layout ({kind}), which transformers does not open: {why}"
    return f"{folder} is in this project's own layout ({kind}), as asked"


def is_published(kind: str) -> bool:
    return not kind.endswith("_scratch")


def choose_layout(model: nn.Module, wanted: str | None) -> tuple[str, Layout]:
    """The first layout that fits, of those for this kind of model and of the wanted sort. See save_pretrained."""
    layouts = layouts_of(model)
    kinds = list(layouts)
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
        reason = layouts[kind].misfit(model.config)
        if not reason:
            return kind, layouts[kind].of(model.config)
        reasons.setdefault(reason, []).append(kind)
    why = "; ".join(f"{', '.join(which)}: {reason}" for reason, which in reasons.items())
    raise ValueError(f"this {type(model).__name__} does not fit the published layout ({why})")


if __name__ == "__main__":
    from lib.cli import run_cli
    from lib.convert import main

    run_cli(main)
