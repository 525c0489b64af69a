"""How a checkpoint wants its images: preprocessor_config.json or processor_config.json, read and written in one place.

    settings = read_image_settings(folder)      # image_size, resample, image_mean, ...: arguments of ImageSettings
    write_image_settings(folder, ImageSettings((224, 224)))
    processor_settings(folder)                  # and what config.json says: arguments of MllamaImageProcessor

Files of transformers 4 and 5 are read: the processors of TYPES, with what each takes for granted where its file is silent. A
setting that would change pixels and is not done here is refused, and so is one that is not known.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.image_settings import RESAMPLE, ImageSettings, height_width
from lib.files import find_source, read_if_there, write_json
from lib.layouts.settings import say_once
from processing_mllama import IMAGE_TOKEN, IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, text_around_images

# ---- what the published processors are ---------------------------------------------------------------------------------

FLAGS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad", "do_image_splitting", "default_to_square")
SIGLIP = {
    **{"do_resize": True, "do_center_crop": False, "do_rescale": True, "do_normalize": True, "do_pad": False},
    **{"do_image_splitting": False, "default_to_square": False, "size": {"height": 224, "width": 224}, "crop_size": None},
    **{"max_image_size": None, "pad_size": None, "resample": RESAMPLE["bicubic"], "rescale_factor": 1 / 255},
    **{"image_mean": list(IMAGENET_STANDARD_MEAN), "image_std": list(IMAGENET_STANDARD_STD)},
}
VIT = {**SIGLIP, "default_to_square": True, "resample": RESAMPLE["bilinear"]}
CROP = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
CLIP = {
    **{**SIGLIP, **CROP, "size": {"shortest_edge": 224}},
    **{"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
}
IDEFICS3 = {
    **{**SIGLIP, "default_to_square": True, "resample": RESAMPLE["lanczos"], "do_image_splitting": True, "do_pad": True},
    **{"size": {"longest_edge": 4 * 364}, "max_image_size": {"longest_edge": 364}},
}
TYPES = {  # image_processor_type, also with Fast behind it: what is meant where the file says nothing
    "SiglipImageProcessor": SIGLIP,
    "ViTImageProcessor": VIT,
    "DeiTImageProcessor": {**SIGLIP, **CROP, "default_to_square": True, "size": {"height": 256, "width": 256}},
    "CLIPImageProcessor": CLIP,
    "BitImageProcessor": CLIP,
    "LlavaImageProcessor": CLIP,
    "Idefics3ImageProcessor": IDEFICS3,
    "SmolVLMImageProcessor": IDEFICS3,
}
OF_MODEL = {  # whose processor a model_type has, where no file names it
    **{"siglip": "Siglip", "siglip_vision_model": "Siglip", "vit": "ViT", "clip": "CLIP", "clip_vision_model": "CLIP"},
    **{"dinov2": "Bit", "dinov2_with_registers": "Bit", "llava": "Llava", "idefics3": "Idefics3", "smolvlm": "SmolVLM"},
}
CHANGE_NOTHING = {  # of an RGB image's pixels, whatever they say
    *("image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb", "auto_map", "device"),
    *("disable_grouping", "return_tensors", "input_data_format", "image_seq_length", "return_row_col_info", "backend"),
    *("video_sampling", "_valid_processor_keys", "image_token"),
}

MOST_PIXELS = 8192  # of a side that an image is resized to: twice what Idefics3 lets one have

# ---- reading -----------------------------------------------------------------------------------------------------------


def read_image_settings(folder: str | Path) -> dict:
    """What the files of a folder say about its images, as arguments of ImageSettings; {} where they say nothing, and without
    image_size where they leave that to the model. Raises ValueError for what is not done here."""
    folder = Path(folder)
    whole, path = read_if_there(folder / "processor_config.json"), folder / "processor_config.json"
    published = whole.get("image_processor")  # where transformers 5 writes it, and looks first
    if published is None:
        path = folder / "preprocessor_config.json"
        published = read_if_there(path)
    if not published:
        if (folder / "config.json").is_file():
            say_once(f"{folder} does not say how its images are prepared: they are squeezed, and scaled to -1..1")
        return {}
    if not isinstance(published, dict):
        raise ValueError(f"{path} has image_processor {published!r:.80}: it must be an object")
    try:
        return image_settings(published, read_if_there(folder / "config.json").get("model_type"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def image_settings(published: dict, model_type: str | None = None) -> dict:
    """The content of a preprocessor_config.json as arguments of ImageSettings. model_type: of config.json, for a file that does
    not name its processor. Raises ValueError as read_image_settings does."""
    kind = processor_type(published, model_type)
    given = {**TYPES[kind], **{key: value for key, value in published.items() if value is not None}}
    if unknown := given.keys() - SIGLIP.keys() - CHANGE_NOTHING - {"data_format"}:
        raise ValueError(f"the {kind} has settings that are not known here: {', '.join(sorted(unknown))}")
    for key in FLAGS:
        if not isinstance(given[key], bool):
            raise ValueError(f"{key} is {given[key]!r:.80}: it must be true or false")
    if given.get("data_format", "channels_first") != "channels_first":
        raise ValueError(f"data_format is {given['data_format']!r:.80}: only channels_first is done here")
    names = {number: name for name, number in RESAMPLE.items()}
    if not isinstance(given["resample"], int) or given["resample"] not in names:
        raise ValueError(f"resample is {given['resample']!r:.80}: it must be one of {', '.join(map(str, sorted(names)))}")
    settings = {"resample": names[given["resample"]], **geometry(given, kind)}
    settings["rescale_factor"] = given["rescale_factor"] if given["do_rescale"] else 1.0
    for key, nothing in (("image_mean", 0.0), ("image_std", 1.0)):
        value = given[key] if given["do_normalize"] else nothing
        value = value[0] if isinstance(value, list) and len(value) == 1 else value  # of a classifier of grey images
        settings[key] = tuple(value) if isinstance(value, list) else (value,) * 3
    ImageSettings(**{"image_size": 1, **settings})  # says what makes no sense
    return settings


def processor_type(published: dict, model_type: str | None) -> str:
    """A key of TYPES. Raises ValueError where it is none of them, or nothing says."""
    said = published.get("image_processor_type") or published.get("feature_extractor_type")
    kind = str(said).removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    if said is None:
        kind = f"{OF_MODEL.get(model_type)}ImageProcessor"
    if kind not in TYPES:
        unnamed = f"no image_processor_type, for a model of type {model_type!r:.80}"
        named = f"image_processor_type {said!r:.80}" if said else unnamed
        raise ValueError(f"{named}: known are {', '.join(TYPES)}, also with Fast behind it")
    return kind


def geometry(given: dict, kind: str) -> dict:
    """image_size (unless the model decides), size, fit and do_pad_square of ImageSettings."""
    size = read_size(given, "size", given["default_to_square"]) if given["do_resize"] else None
    if kind in ("Idefics3ImageProcessor", "SmolVLMImageProcessor"):
        return idefics3_geometry(given, size)
    for key, rightly in (("do_image_splitting", False), ("max_image_size", None)):
        if given[key] != rightly:
            raise ValueError(f"the {kind} has {key} {given[key]!r:.80}: only Idefics3's images are split")
    settings = {"do_pad_square": kind == "LlavaImageProcessor" and given["do_pad"]}
    if settings["do_pad_square"] and not given["do_normalize"]:
        raise ValueError("do_pad is true and do_normalize false: images are padded with the mean that is subtracted only")
    if size and "longest_edge" in size:
        raise ValueError(f"size is {given['size']!r:.80}: images of different sizes would come out; only Idefics3's may")
    crop = read_size(given, "crop_size", True) if given["do_center_crop"] else None
    if crop:
        if "height" not in crop:
            raise ValueError(f"crop_size is {given['crop_size']!r:.80}: it must have height and width")
        final = crop["height"], crop["width"]
        settings |= {"image_size": final, "fit": "crop", "size": size}
        if size == crop:  # nothing is left to cut off
            settings |= {"fit": "squeeze", "size": None}
    elif size is None:
        settings |= {"fit": "as_is"}
    elif "height" in size:
        settings |= {"image_size": (size["height"], size["width"]), "fit": "squeeze"}
    elif settings["do_pad_square"]:
        settings |= {"image_size": (size["shortest_edge"],) * 2, "fit": "squeeze"}
    else:
        raise ValueError(f"size is {given['size']!r:.80} without do_center_crop: images of different sizes would come out")
    padded = read_size(given, "pad_size", True) if given["do_pad"] and given["pad_size"] is not None else None
    if padded and (padded.get("height"), padded.get("width")) != settings.get("image_size"):
        raise ValueError(f"pad_size is {given['pad_size']!r:.80}: images are not padded here")
    return settings


def idefics3_geometry(given: dict, size: dict | None) -> dict:
    """As geometry, of Idefics3 and SmolVLM, who resize twice."""
    if given["do_center_crop"]:
        raise ValueError("do_center_crop is true: Idefics3's images are not cropped")
    tile = read_size(given, "max_image_size", True)
    if set(tile) != {"longest_edge"}:
        raise ValueError(f"max_image_size is {given['max_image_size']!r:.80}: it must be {{'longest_edge': pixels}}")
    if size and "shortest_edge" in size:
        raise ValueError(f"size is {given['size']!r:.80}: it must have longest_edge, or height and width")
    fit = "tiles" if given["do_image_splitting"] else "squeeze"
    return {"do_pad_square": False, "image_size": (tile["longest_edge"],) * 2, "size": size, "fit": fit}


def read_size(given: dict, key: str, square: bool) -> dict[str, int]:
    """A size in any of the published spellings as {"height", "width"}, {"shortest_edge"} or {"longest_edge"}; `square`: what a
    number alone means. Raises ValueError for others."""
    size = given[key]
    if isinstance(size, int) and not isinstance(size, bool):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    if isinstance(size, list) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    if not isinstance(size, dict) or set(size) not in ({"height", "width"}, {"shortest_edge"}, {"longest_edge"}):
        raise ValueError(f"{key} is {size!r:.80}: it must have height and width, or shortest_edge or longest_edge alone")
    if not all(isinstance(side, int) and not isinstance(side, bool) and 0 < side <= MOST_PIXELS for side in size.values()):
        raise ValueError(f"{key} is {size!r:.80}: sides must be numbers from 1 to {MOST_PIXELS}")
    return dict(size)


def processor_settings(source: str | Path, image_size: int | tuple[int, int] | None = None) -> dict:
    """Arguments of MllamaImageProcessor, of a checkpoint's files: num_image_token is there where it has a config.json, and
    around_image where its kind of model wants it; and image_token_id. image_size: overrules the files. Raises FileNotFoundError
    or ValueError."""
    folder = find_source(source)
    settings, has_config = read_image_settings(folder), (folder / "config.json").is_file()
    if not (settings or has_config):
        raise FileNotFoundError(f"{folder} has neither config.json nor preprocessor_config.json: is it a checkpoint?")
    whole = read_if_there(folder / "processor_config.json")
    settings |= {"image_token": text_of(whole["image_token"])} if "image_token" in whole else {}
    if has_config:
        from lib.checkpoint import read_config

        config = read_config(folder)
        tower = getattr(config, "vision_config", config)
        if not hasattr(tower, "grid"):
            raise ValueError(f"{folder} holds a {type(config).__name__.removesuffix('Config')}, which takes no images")
        size = height_width(image_size or settings.get("image_size") or tower.image_size)
        settings = for_size(settings, size) | {"num_image_token": count_image_tokens(config, size)}
        settings |= {"around_image": text_around_images(config), "image_token_id": getattr(config, "image_token_id", None)}
        tokens = count_image_tokens(config, tower.image_size)
        if (stated := whole.get("image_seq_len", tokens)) != tokens:
            has = f"processor_config.json has image_seq_len {stated!r:.80}, the model {tokens} tokens for an image"
            raise ValueError(f"{folder} contradicts itself: {has}")
    return settings


def text_of(token) -> str:
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str) or not token:
        raise ValueError(f"image_token is {token!r:.80}: it must be a text")
    return token


def image_token_of(tokenizer, stated: str | None, image_token_id: int | None) -> str:
    """The placeholder's spelling: what processor_config.json or tokenizer_config.json calls image_token, else <image> where the
    tokenizer has it, else the added token with the id that config.json states. Only where no file has one: <image>, as a new
    token."""
    named = stated or getattr(tokenizer, "image_token", None)
    if named or tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) not in (None, tokenizer.unk_token_id):
        return named or IMAGE_TOKEN
    token = None if image_token_id is None else tokenizer.convert_ids_to_tokens(image_token_id)
    return token if token and image_token_id >= getattr(tokenizer, "plain_size", len(tokenizer)) else IMAGE_TOKEN


def for_size(settings: dict, image_size: tuple[int, int]) -> dict:
    """Settings as of read_image_settings for a model that reads another size: what is cropped is resized in proportion."""
    before, size = settings.get("image_size"), settings.get("size")
    if before and size and before != image_size:
        size = {key: round(side * max(image_size) / max(before)) for key, side in size.items()}
    return {**settings, "image_size": image_size, "size": size}


def count_image_tokens(config, image_size: tuple[int, int]) -> int:
    """Placeholders per image of so many pixels: of the config of a vision-language model, or of a tower alone. Raises
    ValueError for a size that cannot be cut into patches."""
    try:
        if hasattr(config, "vision_config") and hasattr(config, "pixel_shuffle"):
            config = replace(config, vision_config=replace(config.vision_config, image_size=image_size))
            return config.text_config.num_image_tokens
        return math.prod(replace(getattr(config, "vision_config", config), image_size=image_size).grid)
    except AssertionError as error:
        raise ValueError(str(error)) from None


# ---- writing -----------------------------------------------------------------------------------------------------------


def write_image_settings(folder: str | Path, settings: ImageSettings, kind: str = "Siglip", **more) -> None:
    """preprocessor_config.json, which transformers' AutoImageProcessor opens. kind: of the processors that do no more than
    squeeze, as TYPES names them; more: further entries."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder) / "preprocessor_config.json", published_settings(settings, kind) | more)


def write_classifier_settings(folder: str | Path, image_size: tuple[int, int], mean: Sequence[float], std: Sequence[float]):
    """preprocessor_config.json of a classifier, of RGB images or of grey ones: of three numbers each, or of one."""
    three, channels = 3 // len(mean), {"image_mean": list(mean), "image_std": list(std), "do_convert_rgb": len(mean) == 3}
    settings = ImageSettings(image_size, image_mean=tuple(mean) * three, image_std=tuple(std) * three)
    write_image_settings(folder, settings, "ViT", **channels)


def published_settings(settings: ImageSettings, kind: str = "Siglip") -> dict:
    """What image_settings reads as these, in transformers' words."""
    height, width = settings.image_size
    final = {"height": height, "width": width}
    resized, crop = {"do_resize": settings.fit != "as_is", "size": final}, {"do_center_crop": False}
    if settings.fit == "crop":
        kind, crop = "CLIP", {"do_center_crop": True, "crop_size": final}
        resized = {"do_resize": settings.size is not None, "size": settings.size or final}
    if settings.do_pad_square:
        kind, crop = "Llava", {"do_pad": True, **crop}
    elif kind == "Idefics3" or settings.fit == "tiles" or (settings.fit == "squeeze" and settings.size):
        kind, crop = "Idefics3", {"do_image_splitting": settings.fit == "tiles", "max_image_size": {"longest_edge": height}}
        resized = {"do_resize": settings.size is not None, "size": settings.size or {"longest_edge": height}}
    return {
        "image_processor_type": f"{kind}ImageProcessor", "do_convert_rgb": True, **resized, **crop,
        "resample": RESAMPLE[settings.resample], "do_rescale": True, "rescale_factor": settings.rescale_factor,
        "do_normalize": True, "image_mean": list(settings.image_mean), "image_std": list(settings.image_std),
    }  # fmt: skip


def layout_misfit(settings: ImageSettings, layout: str) -> str:
    """Why the image processor of a published layout, "llava" or "idefics3", cannot prepare images so; "" where it can."""
    (height, width), two_steps = settings.image_size, settings.fit == "squeeze" and settings.size is not None
    if layout == "idefics3" and (settings.do_pad_square or settings.fit in ("crop", "as_is") or height != width):
        return "Idefics3 knows neither padding to a square nor crops, nor images that are not square"
    if layout == "llava" and (settings.fit == "tiles" or two_steps):
        return "LLaVA knows neither tiles nor images that are resized twice"
    return ""


def write_processor_settings(folder: str | Path, processor, layout: str | None = None) -> None:
    """preprocessor_config.json, and with a layout processor_config.json for transformers' AutoProcessor. Raises ValueError for
    settings that the layout cannot express."""
    if layout not in (None, "llava", "idefics3"):
        raise ValueError(f"layout is {layout!r}: it must be llava, idefics3 or None")
    settings, tokens = processor.image_settings, processor.num_image_token
    if layout and (reason := layout_misfit(settings, layout)):
        raise ValueError(reason)
    write_image_settings(folder, settings, "Idefics3" if layout == "idefics3" else "Siglip")
    if layout == "llava":
        whole = {"processor_class": "LlavaProcessor", "patch_size": settings.image_size[0] // math.isqrt(tokens)}
        whole |= {"vision_feature_select_strategy": "full", "image_token": processor.image_token}
        write_json(Path(folder) / "processor_config.json", whole)
    if layout == "idefics3":
        whole = {"processor_class": "Idefics3Processor", "image_seq_len": tokens}
        write_json(Path(folder) / "processor_config.json", whole)
