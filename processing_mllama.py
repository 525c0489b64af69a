"""Pictures and prompts in, tensors out: everything between a photo on disk and the model's arguments.

Pixels are those of transformers' SiglipImageProcessor, prompts follow LLaVA and PaliGemma: each `<image>` in a text becomes
num_image_token placeholders, which the model overwrites with what the vision tower saw.

    processor = MllamaImageProcessor(tokenizer, num_image_token=196, image_size=224)
    batch = processor(["What is this? <image>"], ["photo.jpg"])        # pixel_values, input_ids, attention_mask
    batch = processor.conversation({"conversations": [...]}, image)    # and labels: -100 everywhere but the answers
    model(**batch)

The tokenizer is ours or any Hugging Face one. It gains `<image>`, then PaliGemma's 1,024 `<locNNNN>` and 128 `<segNNN>`. A
placeholder needs no row in the model's embedding table; location tokens do, before they are used:
lib.vocabulary.resize_token_embeddings(model, len(tokenizer)). MLLAMAConfig's image_token_id is processor.image_token_id; a
batch with images brings it along.

Text is data: with our tokenizer nothing but those tokens means anything inside it, and "<|im_end|>" stays text; a Hugging
Face tokenizer obeys every special token it finds. Pictures are squeezed into one square, never tiled.
Axes: B batch, T text tokens, I images of the whole batch, H and W a picture's sides.
"""

import math
import os
import re
from collections.abc import Sequence
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from data.folders import _to_rgb, decode_image, one_line
from lib.chat import encode_conversation
from lib.files import read_json, write_json
from lib.tokenizer import BPETokenizer
from vit_scratch import pair

IMAGENET_STANDARD_MEAN = (0.5, 0.5, 0.5)  # so called in transformers; SigLIP's: they take 0..1 to -1..1
IMAGENET_STANDARD_STD = (0.5, 0.5, 0.5)
IMAGE_TOKEN = "<image>"
LOCATION_TOKENS = [f"<loc{i:04d}>" for i in range(1024)] + [f"<seg{i:03d}>" for i in range(128)]
IDEFICS3_AROUND = ("<fake_token_around_image><global-img>", "<fake_token_around_image>")  # around a picture taken whole
RESAMPLE = {"lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers, as the published files hold them
ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("user", "assistant", "system")}
MAX_ASPECT = 200  # nothing is left of a longer strip once it is squeezed into a square (Qwen2-VL draws the same line)

# ---- pictures --------------------------------------------------------------------------------------------------------


def to_picture(image, at_least: int | None = None) -> Image.Image:
    """A path, bytes, PIL image, numpy [H, W, C] or torch [C, H, W] (uint8, or floats in 0..1; C = 1, 3, 4) as an upright RGB
    picture, transparency on white. at_least: see decode_image. Raises ValueError for anything else."""
    if isinstance(image, (str, os.PathLike, bytes)):
        return decode_image(image, at_least)
    if isinstance(image, (np.ndarray, torch.Tensor)):
        image = _from_array(image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"a {type(image).__name__} is not an image: give a path, bytes, a PIL image, an array or a tensor")
    if 0 in image.size:
        raise ValueError(f"a picture of {image.width}x{image.height} pixels is empty")
    try:  # an image that PIL has opened is read only now
        image = image if image.getexif().get(0x0112, 1) == 1 else ImageOps.exif_transpose(image)
        image.load()
        return image if image.mode == "RGB" and not image.has_transparency_data else _to_rgb(image)
    except Exception as error:  # decoders meet damaged bytes with almost any type of exception
        raise ValueError(f"cannot be decoded ({one_line(error)})") from None


def _from_array(array) -> Image.Image:
    shape, dtype = list(array.shape), array.dtype
    if isinstance(array, torch.Tensor):
        array = (array.float() if array.is_floating_point() else array).detach().cpu().numpy()
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or not array.size:
        raise ValueError(f"{shape} is not a picture's shape: numpy is [H, W, C], torch [C, H, W], with 1, 3 or 4 channels")
    if np.issubdtype(array.dtype, np.floating):
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):  # nor is NaN
            raise ValueError(f"a picture of floats lies in 0..1, this one in {low:.4g}..{high:.4g}: rescale it, or give uint8")
        array = (array * 255 + 0.5).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"a picture of {dtype} is not read: give uint8, or floats in 0..1")
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def pad_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """The picture in the middle of a square of the mean colour, as LLaVA-1.5 pads. Raises ValueError for a gigantic square."""
    side = max(image.size)
    if Image.MAX_IMAGE_PIXELS and side**2 > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width}x{image.height} padded to a square is over {Image.MAX_IMAGE_PIXELS:,} pixels")
    square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def resize(image: Image.Image, size: tuple[int, int], resample: str = "bicubic") -> Image.Image:
    """To (height, width), whatever the proportions. resample: bicubic (SigLIP), bilinear, lanczos (Idefics3)."""
    return image.resize((size[1], size[0]), RESAMPLE[resample])


def rescale(pixels: torch.Tensor, scale: float = 1 / 255) -> torch.Tensor:
    """Bytes to floats in 0..1. In two steps: pixels * scale, with its mixed types, is ten times slower on a CPU."""
    return pixels.to(torch.float32, copy=True).mul_(scale)


def normalize(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """[..., 3, H, W]: (pixels - mean) / std, channel by channel."""
    mean, std = (torch.tensor(value, dtype=pixels.dtype)[:, None, None] for value in (mean, std))
    return (pixels - mean).div_(std)


def to_bytes(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """What rescale and normalize made of these, uint8 [..., 3, H, W]: pictures as they are drawn."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (mean, std))
    return ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def fit(image, size: tuple[int, int], resample: str, mean: Sequence[float], do_pad_square: bool, fast=False) -> np.ndarray:
    """One picture (see to_picture) as uint8 [height, width, 3]; see process_images. Raises ValueError for a thin strip."""
    picture = to_picture(image, -(-max(size) // 2) if fast else None)  # decoded to no less than `size`
    if max(picture.size) > MAX_ASPECT * min(picture.size):
        raise ValueError(f"{picture.width}x{picture.height} is too thin a strip (over {MAX_ASPECT} to 1): crop it")
    return np.asarray(resize(pad_square(picture, mean) if do_pad_square else picture, size, resample))


def process_images(
    images: Sequence, size: tuple[int, int], resample: str = "bicubic", mean: Sequence[float] = IMAGENET_STANDARD_MEAN,
    std: Sequence[float] = IMAGENET_STANDARD_STD, do_pad_square: bool = False, fast: bool = False,
) -> torch.Tensor:  # fmt: skip
    """I images (see to_picture) -> pixel_values, float32 [I, 3, height, width]; size: (height, width).

    fast: JPEGs far larger than `size` are decoded at a fraction of theirs, which changes pixels a little. Raises ValueError
    that names the image by its number and, if it has one, its path.
    """
    if not len(images):
        raise ValueError("there are no images to process: the list is empty")
    resized = []
    for number, image in enumerate(images):
        try:
            resized.append(fit(image, size, resample, mean, do_pad_square, fast))
        except ValueError as error:
            path = f" ({os.fspath(image)})" if isinstance(image, (str, os.PathLike)) else ""
            raise ValueError(f"image {number}{path}: {error}") from None
    # Bytes are cheap to move: one stacked tensor, then the arithmetic on all of it at once.
    return normalize(rescale(torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()), mean, std)


# ---- boxes -----------------------------------------------------------------------------------------------------------


def box_to_loc(box: Sequence[float], width: float, height: float) -> str:
    """(x_min, y_min, x_max, y_max) in pixels -> "<locYMIN><locXMIN><locYMAX><locXMAX>", as PaliGemma was trained on RefCOCO.

    The 1,024 tokens are evenly spaced marks, the first at 0 and the last at the far edge, side / 1023 apart: what comes back
    is at most half of that, side / 2046, away. Raises ValueError for a box that is not within the picture.
    """
    x0, y0, x1, y1 = box
    if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height and width > 0 and height > 0):
        raise ValueError(f"box {tuple(box)} is not (x_min, y_min, x_max, y_max) within {width}x{height} pixels")
    return "".join(f"<loc{round(v / side * 1023):04d}>" for v, side in ((y0, height), (x0, width), (y1, height), (x1, width)))


def loc_to_box(text: str, width: float, height: float) -> tuple[float, float, float, float]:
    """The first four location tokens in a row as (x_min, y_min, x_max, y_max) in pixels. Raises ValueError without any."""
    found = re.search(r"<loc(\d{4})>" * 4, text)
    if not found or max(map(int, found.groups())) > 1023:
        raise ValueError(f"{text!r} has no four location tokens <loc0000> to <loc1023> in a row")
    y0, x0, y1, x1 = (int(mark) / 1023 for mark in found.groups())
    return x0 * width, y0 * height, x1 * width, y1 * height


# ---- prompts ---------------------------------------------------------------------------------------------------------


def add_image_tokens_to_prompts(prompts: Sequence[str], num_image_token: int, around_image=("", "")) -> list[str]:
    """Each <image> becomes num_image_token of them, between the two texts of around_image."""
    return [prompt.replace(IMAGE_TOKEN, (IMAGE_TOKEN * num_image_token).join(around_image)) for prompt in prompts]


def to_messages(conversation) -> list[dict[str, str]]:
    """A LLaVA-style row, or turns {"from", "value"} or {"role", "content"}, as turns of the last kind. Raises ValueError."""
    turns = conversation.get("conversations") if isinstance(conversation, dict) else conversation
    try:
        turns = [(t.get("role") or t["from"], t["content"] if "content" in t else t["value"]) for t in turns]
    except (TypeError, AttributeError, KeyError):
        turns = []
    if not turns or not all(role in ROLES and isinstance(text, str) for role, text in turns):
        wanted = '{"from": "human" or "gpt", "value": text} or {"role": "user" or "assistant", "content": text}'
        raise ValueError(f"{conversation!r:.200} is not a conversation: give a list of turns, each {wanted}")
    return [{"role": ROLES[role], "content": text} for role, text in turns]


def share_out(images, named: Sequence[int]) -> list[list]:
    """One list of images per prompt: from such lists, from one list in the order of the placeholders, or from one image.

    named: how often each prompt says <image>; if none does, each may have one. Raises ValueError where counts differ.
    """
    if images is None:
        images = [[] for _ in named]
    images = images if isinstance(images, (list, tuple)) else [images]
    lists = sum(isinstance(image, (list, tuple)) for image in images)
    if not images:
        raise ValueError("images is an empty list: leave it out for text alone, or give one list per prompt")
    if 0 < lists < len(images):
        raise ValueError("images mixes images and lists of images: give all in one list, or one list per prompt")
    if not lists:
        rest = iter(images)
        images = [list(islice(rest, count)) for count in (named if any(named) else [1] * len(named))]
        images[-1] += rest
    if len(images) != len(named):
        raise ValueError(f"there are {len(images)} lists of images for {len(named)} prompts: give one list per prompt")
    counts = [len(row) for row in images]
    for number, (places, count) in enumerate(zip(named, counts, strict=True)):
        if places != count and (any(named) or set(counts) != {1}):
            raise ValueError(f"prompt {number} says {IMAGE_TOKEN} {places} times and has {count} images: give one for each")
    return images


# ---- what published files say ----------------------------------------------------------------------------------------


def check_scale(mean, std) -> None:
    """Raises ValueError unless pixels can be normalised by these."""
    threes = all(isinstance(values, (tuple, list)) and len(values) == 3 for values in (mean, std))
    if not threes or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in (*mean, *std)) or min(std) <= 0:
        raise ValueError(f"image_mean {mean!r:.80} and image_std {std!r:.80} must be three numbers each, std above 0")


def image_settings(published: dict) -> dict:
    """A published preprocessor_config.json as settings of ours. Raises ValueError for what would give other pixels, or none."""
    try:
        settings = _image_settings(published)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"the image preprocessor's settings make no sense ({type(error).__name__}: {error})") from None
    check_scale(settings.get("image_mean", IMAGENET_STANDARD_MEAN), settings.get("image_std", IMAGENET_STANDARD_STD))
    return settings


def _image_settings(published: dict) -> dict:
    tiles = published.get("max_image_size")  # Idefics3 and SmolVLM: a picture taken whole fills one tile
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
    names = {number: name for name, number in RESAMPLE.items()}
    number = published.get("resample", RESAMPLE["lanczos" if tiles else "bicubic"])
    settings = {"image_size": size, "resample": names.get(number, number), "do_pad_square": square}
    return settings | {key: published[key] for key in ("image_mean", "image_std") if key in published}


def count_image_tokens(config: dict, size: tuple[int, int]) -> int:
    """Placeholders per picture of (height, width), from a config.json: patches, over pixel shuffle's factor squared.

    SigLIP has no class token, so LLaVA's vision_feature_select_strategy, which is about that, changes nothing.
    """
    idefics = config.get("model_type") in ("idefics3", "smolvlm")  # with these defaults, which files leave out
    patch = pair(config.get("vision_config", config).get("patch_size", 32 if idefics else 16))
    r = config.get("scale_factor") or config.get("pixel_shuffle") or (2 if idefics else 1)
    return 1 if config.get("fusion") == "cross" else (size[0] // patch[0]) * (size[1] // patch[1]) // r**2


# ---- the processor ---------------------------------------------------------------------------------------------------


class MllamaImageProcessor:
    """Called with prompts or conversations, and images; gives what the model is called with.

    tokenizer: gains the tokens named above (add_location_tokens=False: only <image>); num_image_token: placeholders per
    image, the model's config.text_config.num_image_tokens; image_size: pixels, a number or (height, width); around_image:
    special tokens before and after each image (IDEFICS3_AROUND). Raises ValueError for settings that make no sense.
    """

    def __init__(
        self, tokenizer, num_image_token: int, image_size: int | tuple[int, int], *,
        image_mean: Sequence[float] = IMAGENET_STANDARD_MEAN, image_std: Sequence[float] = IMAGENET_STANDARD_STD,
        resample: str = "bicubic", do_pad_square: bool = False, add_location_tokens: bool = True, around_image=("", ""),
    ):  # fmt: skip
        self.tokenizer, self.num_image_token, self.image_size = tokenizer, num_image_token, pair(image_size)
        check_scale(image_mean, image_std)
        self.image_mean, self.image_std, self.resample = tuple(image_mean), tuple(image_std), resample
        self.do_pad_square, self.around_image = do_pad_square, tuple(around_image)
        numbers = [num_image_token, *self.image_size]
        if len(numbers) != 3 or not all(isinstance(number, int) and number > 0 for number in numbers):
            raise ValueError(f"num_image_token {num_image_token!r} and image_size {image_size!r} must be numbers from 1")
        if resample not in RESAMPLE:
            raise ValueError(f"resample is {resample!r}: it must be {', '.join(RESAMPLE)}")
        # <image> first: a model without a row for it takes the first id past its table for the placeholder.
        special = [IMAGE_TOKEN, *re.findall(r"<[^<>]+>", "".join(around_image))]
        locations = LOCATION_TOKENS if add_location_tokens else []
        self.ours = isinstance(tokenizer, BPETokenizer)
        if self.ours:
            tokenizer.add_special_tokens(special + locations)
        else:  # where add_special_tokens would forget the additional ones there were
            tokenizer.add_tokens(special, special_tokens=True)
            tokenizer.add_tokens(locations)
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        ids = tokenizer.convert_tokens_to_ids(LOCATION_TOKENS)
        absent = (None, tokenizer.unk_token_id)
        self.locations = {i: token for i, token in zip(ids, LOCATION_TOKENS, strict=True) if i not in absent}
        self.recognised = frozenset([*special, *self.locations.values()])

    def __call__(
        self, prompts: str | Sequence[str] | None = None, images=None, conversations: Sequence | None = None, *,
        padding: bool | str = True, padding_side: str | None = None, max_length: int | None = None, truncation: bool = False,
        pad_to_multiple_of: int = 1, add_generation_prompt: bool = False, add_special_tokens: bool = True, fast: bool = False,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """B prompts, or B conversations (see to_messages), and their images (see share_out and to_picture).

        Returns input_ids and attention_mask, int64 [B, T]; pixel_values [I, 3, height, width] if there are images; labels
        [B, T] with conversations, unless add_generation_prompt asks for the next answer. Where no text says <image>, the one
        of each prompt stands before it, or before the first question. padding: True, "max_length" or False; padding_side:
        right beside labels, else left. truncation: drop the end of what is over max_length, but never of an image.
        Raises ValueError for counts of images and <image> that differ, for texts over max_length, for unreadable images.
        """
        if (prompts is None) == (conversations is None):
            raise ValueError("give either prompts or conversations, and not both")
        rows = self._rows(prompts, conversations)
        named = [sum(message["content"].count(IMAGE_TOKEN) for message in row) for row in rows]
        shared = share_out(images, named)
        encoded, learn = [], conversations is not None and not add_generation_prompt
        for number, (row, places) in enumerate(zip(rows, named, strict=True)):
            row = self._with_placeholders(row, 0 if places else len(shared[number]))
            if conversations is None:
                ids = self._encode(row[0]["content"], add_special_tokens)
                answers = [0] * len(ids)
            else:
                ids, answers = encode_conversation(self.tokenizer, row, add_generation_prompt, self.recognised)
                if learn and not any(answers):
                    raise ValueError(f"conversation {number} has no answer: add_generation_prompt=True would ask for one")
            encoded.append(self._fitted(number, ids, answers, max_length, truncation))
        side = padding_side or ("right" if learn else "left")
        batch = self._padded(encoded, padding, side, max_length, pad_to_multiple_of)
        if not learn:
            del batch["labels"]
        if pictures := [image for row in shared for image in row]:
            batch["pixel_values"] = self.pixel_values(pictures, fast)
            batch["image_token_id"] = torch.tensor(self.image_token_id)
        return batch

    def conversation(self, conversation, images=None, **options) -> dict[str, torch.Tensor]:
        """A batch of one conversation, with its image or list of images."""
        return self(None, images, [conversation], **options)

    def pixel_values(self, images: Sequence, fast: bool = False) -> torch.Tensor:
        """I images as the model sees them; see process_images."""
        settings = self.image_size, self.resample, self.image_mean, self.image_std, self.do_pad_square
        return process_images(images, *settings, fast)

    def encode(self, conversation, num_images: int, add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
        """Ids of a conversation (see to_messages) about so many pictures, and a mask: 1 on its answers and the token that
        ends each. Where it says no <image>, they stand before its first question. Raises ValueError where counts differ."""
        messages = to_messages(conversation)
        named = sum(message["content"].count(IMAGE_TOKEN) for message in messages)
        if named not in (0, num_images):
            raise ValueError(f"a conversation says {IMAGE_TOKEN} {named} times and has {num_images} images: give one for each")
        messages = self._with_placeholders(messages, 0 if named else num_images)
        return encode_conversation(self.tokenizer, messages, add_generation_prompt, self.recognised)

    def decode(self, ids) -> str:
        """Text of ids without special tokens, but with <locNNNN> and <segNNN>, which are part of an answer."""
        text = ""
        for known, run in groupby(ids.tolist() if hasattr(ids, "tolist") else ids, key=self.locations.__contains__):
            run = list(run)
            text += "".join(map(self.locations.get, run)) if known else self.tokenizer.decode(run, skip_special_tokens=True)
        return text

    def batch_decode(self, rows) -> list[str]:
        return [self.decode(row) for row in rows]

    # --- text to ids ---

    def _rows(self, prompts, conversations) -> list[list[dict[str, str]]]:
        """Each prompt or conversation as a list of messages."""
        given = [prompts] if isinstance(prompts, str) else prompts if conversations is None else conversations
        if not isinstance(given, (list, tuple)) or not given:
            raise ValueError(f"prompts and conversations are lists, and not empty: {given!r:.80} is none")
        if conversations is not None:
            return [to_messages(conversation) for conversation in conversations]
        for number, prompt in enumerate(given):
            if not isinstance(prompt, str) or not prompt:
                raise ValueError(f"prompt {number} is {prompt!r:.80}: give a text that is not empty")
        return [[{"role": "user", "content": prompt}] for prompt in given]

    def _with_placeholders(self, messages: list[dict[str, str]], unnamed: int) -> list[dict[str, str]]:
        """The messages with every <image> written out, and so many more before the first question."""
        question = next((message for message in messages if message["role"] == "user"), messages[0])
        texts = [IMAGE_TOKEN * (unnamed if message is question else 0) + message["content"] for message in messages]
        texts = add_image_tokens_to_prompts(texts, self.num_image_token, self.around_image)
        return [message | {"content": text} for message, text in zip(messages, texts, strict=True)]

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        options = {"parse_special": self.recognised} if self.ours else {}
        return self.tokenizer(text, add_special_tokens=add_special_tokens, **options)["input_ids"]

    def _fitted(self, number: int, ids: list[int], answers: list[int], limit: int | None, truncation: bool):
        """(ids, labels) of a row, at most `limit` long."""
        if limit and len(ids) > limit:
            if not truncation:
                raise ValueError(f"prompt {number} has {len(ids)} tokens, more than max_length {limit}: shorten or truncate it")
            if self.image_token_id in ids[limit:]:
                raise ValueError(f"cutting prompt {number} from {len(ids)} to max_length {limit} tokens would cut an image")
            ids, answers = ids[:limit], answers[:limit]
        learned = [answer and i != self.image_token_id for i, answer in zip(ids, answers, strict=True)]
        return ids, [i if learn else -100 for i, learn in zip(ids, learned, strict=True)]

    def _padded(self, rows, padding, side, limit, multiple) -> dict[str, torch.Tensor]:
        if padding not in (True, False, "longest", "max_length") or side not in ("left", "right"):
            raise ValueError(f"padding {padding!r} on side {side!r} is not True, False or 'max_length' on left or right")
        if padding == "max_length" and not limit:
            raise ValueError("padding='max_length' needs a max_length")
        lengths = [len(ids) for ids, _ in rows]
        width = limit if padding == "max_length" else max(lengths)
        if not padding and min(lengths) < width:
            raise ValueError(f"rows of {min(lengths)} to {width} tokens make no tensor without padding=True")
        width += -width % multiple if padding else 0

        def fill(values, filler):
            gaps = ([filler] * (width - len(row)) for row in values)
            return torch.tensor([gap + row if side == "left" else row + gap for gap, row in zip(gaps, values, strict=True)])

        ids, labels = zip(*rows, strict=True)
        pad = self.tokenizer.pad_token_id or 0  # without one any id will do: the mask is 0 there
        mask = [[1] * length for length in lengths]
        return {"input_ids": fill(ids, pad), "attention_mask": fill(mask, 0), "labels": fill(labels, -100)}

    # --- files ---

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, tokenizer=None, **changes) -> "MllamaImageProcessor":
        """From a folder's config.json and preprocessor_config.json (or processor_config.json), whatever of them it has.

        tokenizer: the folder's own unless given. changes: arguments of the constructor that overrule the files. Raises
        FileNotFoundError or ValueError where the files are missing, damaged, or ask for what is not done here.
        """
        folder, names = Path(folder), ("config", "preprocessor_config", "processor_config")
        paths = [folder / f"{name}.json" for name in names]
        config, published, both = (read_json(path) if path.is_file() else {} for path in paths)
        published = published or both.get("image_processor", {})
        if not (config or published):
            raise FileNotFoundError(f"{folder} has neither config.json nor preprocessor_config.json: is it a checkpoint?")
        try:
            settings = {"image_size": config.get("vision_config", config).get("image_size", 224)}
            settings |= image_settings(published) if published else {}
            size = changes.get("image_size", settings["image_size"])
            settings |= {"num_image_token": count_image_tokens(config, pair(size))} if config else {}
        except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"{folder}: its config files give no way to see ({reason})") from None
        if tokenizer is None:  # the folder's own has the location tokens if its model knows them
            tokenizer, settings["add_location_tokens"] = BPETokenizer.from_pretrained(folder), False
        if config.get("model_type") in ("idefics3", "smolvlm"):
            known = tokenizer.convert_tokens_to_ids(IDEFICS3_AROUND[1]) not in (None, tokenizer.unk_token_id)
            settings["around_image"] = IDEFICS3_AROUND if known else ("", "")
        if "num_image_token" not in settings | changes:
            raise ValueError(f"{folder} has no config.json to say how many tokens an image is: give num_image_token")
        return cls(tokenizer, **settings | changes)

    def save_pretrained(self, folder: str | os.PathLike, layout: str | None = None) -> None:
        """Write the tokenizer's files and preprocessor_config.json, which transformers' AutoImageProcessor opens.

        layout: the model's config.layout, "llava" or "idefics3", adds processor_config.json for AutoProcessor.
        """
        (height, width), folder = self.image_size, Path(folder)
        size, extra = {"height": height, "width": width}, {}
        image = {"image_processor_type": "SiglipImageProcessor", "do_convert_rgb": True, "do_resize": True, "size": size,
                 "resample": RESAMPLE[self.resample], "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
                 "image_mean": self.image_mean, "image_std": self.image_std}  # fmt: skip
        if layout not in (None, "llava", "idefics3"):
            raise ValueError(f"layout is {layout!r}: it must be llava, idefics3 or None")
        if layout == "idefics3" and (self.do_pad_square or height != width):
            raise ValueError("Idefics3 knows neither padding to a square nor pictures that are not square")
        if self.do_pad_square:
            image |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_center_crop": False}
        if layout == "llava":
            patch = height // math.isqrt(self.num_image_token)
            extra = {"processor_class": "LlavaProcessor", "patch_size": patch, "vision_feature_select_strategy": "full"}
        if layout == "idefics3":
            edge = {"longest_edge": height}
            image |= {"image_processor_type": "Idefics3ImageProcessor", "do_resize": False, "size": edge}
            image |= {"do_image_splitting": False, "max_image_size": edge}
            extra = {"processor_class": "Idefics3Processor", "image_seq_len": self.num_image_token}
        self.tokenizer.save_pretrained(folder)
        write_json(folder / "preprocessor_config.json", image)
        if extra:
            write_json(folder / "processor_config.json", extra)
