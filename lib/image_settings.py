"""How a checkpoint wants its images: preprocessor_config.json or processor_config.json, read and written in one place.

    settings = read_image_settings(folder)      # image_size, resample, image_mean, ...: arguments of process_images
    write_image_settings(folder, (224, 224), mean, std)
    processor_settings(folder)                  # and what config.json says: arguments of MllamaImageProcessor

Files of transformers 4 and 5 are read. What would give other pixels than ours is refused.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.images import height_width
from lib.files import find_source, read_json, write_json
from processing_mllama import (
    IDEFICS3_AROUND,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    RESAMPLE,
    check_pixel_settings,
)

# ---- reading ---------------------------------------------------------------------------------------------------------


def read_image_settings(folder: str | Path) -> dict:
    """What the files of a folder say about its images, as arguments of process_images; {} where they say nothing. Raises
    ValueError for what would give other pixels than ours, or none."""
    paths = [Path(folder) / f"{name}.json" for name in ("preprocessor_config", "processor_config")]
    published, whole = (read_json(path) if path.is_file() else {} for path in paths)
    published = published or whole.get("image_processor")
    return image_settings(published) if published else {}


def image_settings(published: dict) -> dict:
    """The content of a preprocessor_config.json as settings of ours. Raises ValueError as read_image_settings does."""
    try:
        settings = understand(published)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"the image preprocessor's settings make no sense ({type(error).__name__}: {error})") from None
    defaults = {"image_mean": IMAGENET_STANDARD_MEAN, "image_std": IMAGENET_STANDARD_STD}
    check_pixel_settings(*(settings.get(key, default) for key, default in defaults.items()), settings["resample"])
    return settings


def understand(published: dict) -> dict:
    tiles = published.get("max_image_size")  # Idefics3 and SmolVLM: an image that is not cut fills one tile
    square = published.get("image_processor_type", "").startswith("Llava") and published.get("do_pad", False)
    wanted = {"do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
    wanted |= {} if tiles else {"do_resize": True, "do_center_crop": square and published.get("do_center_crop", False)}
    for key, value in wanted.items():
        if published.get(key, value) != value:
            raise ValueError(f"the image preprocessor has {key} = {published[key]}, only {value} is done here")
    size = tiles or published.get("size", 224)
    if isinstance(size, dict):
        edge = size.get("longest_edge") if tiles else size.get("shortest_edge") if square else None
        size = edge or (size["height"], size["width"])
    size = (size, size) if isinstance(size, int) else size
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"the image preprocessor has size {size!r}: sides must be numbers from 1")
    names = {number: name for name, number in RESAMPLE.items()}
    number = published.get("resample", RESAMPLE["lanczos" if tiles else "bicubic"])
    settings = {"image_size": tuple(size), "resample": names.get(number, number), "do_pad_square": bool(square)}
    for key in {"image_mean", "image_std"} & published.keys():
        value = published[key]  # a classifier of grey images has one number for what are three equal channels here
        settings[key] = tuple(value * 3 if len(value) == 1 else value) if isinstance(value, list) else value
    return settings


def processor_settings(source: str | Path, image_size: int | tuple[int, int] | None = None) -> dict:
    """Arguments of MllamaImageProcessor, of a checkpoint's files: num_image_token is there where it has a config.json, and
    around_image where its kind of model wants it. image_size: overrules the files. Raises FileNotFoundError or ValueError."""
    folder = find_source(source)
    settings, has_config = read_image_settings(folder), (folder / "config.json").is_file()
    if not (settings or has_config):
        raise FileNotFoundError(f"{folder} has neither config.json nor preprocessor_config.json: is it a checkpoint?")
    if has_config:
        from lib.checkpoint import read_config

        config = read_config(folder)
        tower = getattr(config, "vision_config", config)
        if not hasattr(tower, "grid"):
            raise ValueError(f"{folder} holds a {type(config).__name__.removesuffix('Config')}, which takes no images")
        size = height_width(image_size or settings.get("image_size") or tower.image_size)
        settings |= {"image_size": size, "num_image_token": count_image_tokens(config, size)}
        settings["around_image"] = around_image(config)
    return settings


def around_image(config) -> tuple[str, str]:
    """What stands before and after the tokens of an image: Idefics3's special tokens where the model has its linear projector,
    in the published layout or in ours; nothing elsewhere."""
    joined_as_idefics3 = getattr(config, "projector_type", None) == "linear" and not hasattr(config, "cross_every")
    return IDEFICS3_AROUND if joined_as_idefics3 else ("", "")


def count_image_tokens(config, image_size: tuple[int, int]) -> int:
    """Placeholders per image of so many pixels: of the config of a vision-language model, or of a tower alone."""
    if hasattr(config, "vision_config") and hasattr(config, "pixel_shuffle"):
        config = replace(config, vision_config=replace(config.vision_config, image_size=image_size))
        return config.text_config.num_image_tokens
    rows, columns = replace(getattr(config, "vision_config", config), image_size=image_size).grid
    return rows * columns


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_image_settings(
    folder: str | Path, image_size: tuple[int, int], image_mean: Sequence[float], image_std: Sequence[float],
    resample: str = "bicubic", image_processor_type: str = "SiglipImageProcessor", **more,
) -> None:  # fmt: skip
    """preprocessor_config.json, which transformers' AutoImageProcessor opens. more: further entries."""
    size = dict(zip(("height", "width"), image_size, strict=True))
    write_json(Path(folder) / "preprocessor_config.json", {
        "image_processor_type": image_processor_type, "do_convert_rgb": len(image_mean) == 3, "do_resize": True, "size": size,
        "resample": RESAMPLE[resample], "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(image_mean), "image_std": list(image_std), **more,
    })  # fmt: skip


def write_processor_settings(folder: str | Path, processor, layout: str | None = None) -> None:
    """preprocessor_config.json, and with a layout processor_config.json for transformers' AutoProcessor. Raises ValueError for
    settings that the layout cannot express."""
    (height, width), folder, image, whole = processor.image_size, Path(folder), {}, {}
    if layout not in (None, "llava", "idefics3"):
        raise ValueError(f"layout is {layout!r}: it must be llava, idefics3 or None")
    if layout == "idefics3" and (processor.do_pad_square or height != width):
        raise ValueError("Idefics3 knows neither padding to a square nor images that are not square")
    if processor.do_pad_square:
        image = {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_center_crop": False}
    if layout == "llava":
        patch = height // math.isqrt(processor.num_image_token)
        whole = {"processor_class": "LlavaProcessor", "patch_size": patch, "vision_feature_select_strategy": "full"}
    if layout == "idefics3":
        edge = {"longest_edge": height}
        image |= {"image_processor_type": "Idefics3ImageProcessor", "do_resize": False, "size": edge}
        image |= {"do_image_splitting": False, "max_image_size": edge}
        whole = {"processor_class": "Idefics3Processor", "image_seq_len": processor.num_image_token}
    settings = processor.image_size, processor.image_mean, processor.image_std, processor.resample
    folder.mkdir(parents=True, exist_ok=True)
    write_image_settings(folder, *settings, **image)
    if whole:
        write_json(folder / "processor_config.json", whole)
