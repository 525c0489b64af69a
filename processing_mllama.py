"""Images and prompts in, tensors out: everything between a photo on disk and the model's arguments.

Pixels are those of transformers' SiglipImageProcessor, prompts follow LLaVA and PaliGemma: each `<image>` in a text becomes
num_image_token placeholders, which the model overwrites with the features of the image.

    processor = MllamaImageProcessor(tokenizer, num_image_token=196, image_size=224)
    batch = processor(["What is this? <image>"], ["photo.jpg"])        # pixel_values, input_ids, attention_mask
    batch = processor.conversation({"conversations": [...]}, image)    # and labels: -100 everywhere but the answers
    model(**batch)

The tokenizer is ours or any Hugging Face one. It gains `<image>`, then PaliGemma's 1,024 `<locNNNN>` and 128 `<segNNN>` (see
lib/boxes.py). A placeholder needs no row in the model's embedding table; location tokens do, before they are used:
lib.vocabulary.resize_token_embeddings(model, len(tokenizer)). MLLAMAConfig's image_token_id is processor.image_token_id; a
batch with images brings it along.

Text is data: with our tokenizer nothing but those tokens means anything inside it, and "<|im_end|>" stays text; a Hugging
Face tokenizer obeys every special token it finds. Every image is resized to one square, never cut into tiles.
Axes: B batch, T text tokens, I images of the whole batch, H and W an image's sides.
"""

import math
import os
import re
from collections.abc import Sequence
from itertools import groupby, islice

import numpy as np
import torch
from PIL import Image

from data.images import to_image

IMAGENET_STANDARD_MEAN = (0.5, 0.5, 0.5)  # so called in transformers; SigLIP's: they take 0..1 to -1..1
IMAGENET_STANDARD_STD = (0.5, 0.5, 0.5)
IMAGE_TOKEN = "<image>"
LOCATION_TOKENS = [f"<loc{i:04d}>" for i in range(1024)] + [f"<seg{i:03d}>" for i in range(128)]
IDEFICS3_AROUND = ("<fake_token_around_image><global-img>", "<fake_token_around_image>")  # around an image taken whole
RESAMPLE = {"lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers, as the published files hold them
ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("user", "assistant", "system")}
MAX_ASPECT = 200  # nothing is left of a longer strip once it is squeezed into a square (Qwen2-VL draws the same line)

# ---- images ----------------------------------------------------------------------------------------------------------


def pad_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """The image in the middle of a square of the mean colour, as LLaVA-1.5 pads. Raises ValueError for a gigantic square."""
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


def denormalize(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """The uint8 [..., 3, H, W] that rescale and normalize made these of: images as they are drawn."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (mean, std))
    return ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def to_pixels(
    image, image_size: tuple[int, int], resample: str, image_mean: Sequence[float], do_pad_square: bool, fast: bool = False
) -> torch.Tensor:
    """One image (see to_image) as uint8 [3, height, width]; see process_images. Raises ValueError for a thin strip."""
    image = to_image(image, -(-max(image_size) // 2) if fast else None)  # decoded to no less than `image_size`
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width}x{image.height} is too thin a strip (over {MAX_ASPECT} to 1): crop it")
    image = resize(pad_square(image, image_mean) if do_pad_square else image, image_size, resample)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def process_images(
    images: Sequence, image_size: tuple[int, int], resample: str = "bicubic",
    image_mean: Sequence[float] = IMAGENET_STANDARD_MEAN, image_std: Sequence[float] = IMAGENET_STANDARD_STD,
    do_pad_square: bool = False, fast: bool = False,
) -> torch.Tensor:  # fmt: skip
    """I images (see to_image) -> pixel_values, float32 [I, 3, height, width]; image_size: (height, width).

    fast: JPEGs far larger than that are decoded at a fraction of their size, which changes pixels a little. Raises ValueError
    that names the image by its number and, if it has one, its path.
    """
    if not len(images):
        raise ValueError("there are no images to process: the list is empty")
    resized = []
    for number, image in enumerate(images):
        try:
            resized.append(to_pixels(image, image_size, resample, image_mean, do_pad_square, fast))
        except ValueError as error:
            path = f" ({os.fspath(image)})" if isinstance(image, (str, os.PathLike)) else ""
            raise ValueError(f"image {number}{path}: {error}") from None
    # Bytes are cheap to move: one stacked tensor, then the arithmetic on all of it at once.
    return normalize(rescale(torch.stack(resized)), image_mean, image_std)


def check_pixel_settings(image_mean, image_std, resample: str) -> None:
    """Raises ValueError unless images can be resized and normalized by these."""
    threes = all(isinstance(values, (tuple, list)) and len(values) == 3 for values in (image_mean, image_std))
    numbers = threes and all(isinstance(x, (int, float)) and math.isfinite(x) for x in (*image_mean, *image_std))
    if not numbers or min(image_std) <= 0:
        raise ValueError(f"image_mean {image_mean!r:.80} and image_std {image_std!r:.80} must be three numbers, std above 0")
    if resample not in RESAMPLE:
        raise ValueError(f"resample is {resample!r}: it must be {', '.join(RESAMPLE)}")


# ---- prompts ---------------------------------------------------------------------------------------------------------


def add_image_tokens_to_prompts(prompts: Sequence[str], num_image_token: int, around_image=("", "")) -> list[str]:
    """Each <image> becomes num_image_token of them, between the two texts of around_image."""
    return [prompt.replace(IMAGE_TOKEN, (IMAGE_TOKEN * num_image_token).join(around_image)) for prompt in prompts]


def to_messages(conversation) -> list[dict[str, str]]:
    """A conversation as turns {"role", "content"}: of a row, or of turns in any spelling that data/spellings.py reads. Raises
    ValueError."""
    if isinstance(conversation, list) and conversation and all(map(is_turn, conversation)):
        return [dict(turn) for turn in conversation]
    from data.spellings import conversation_of

    return conversation_of(conversation)


def is_turn(turn) -> bool:
    """Whether it is {"role": "user", "assistant" or "system", "content": text}. Half a surrogate pair is no text."""
    if not isinstance(turn, dict) or turn.keys() != {"role", "content"} or turn["role"] not in ("user", "assistant", "system"):
        return False
    return isinstance(turn["content"], str) and turn["content"].encode(errors="ignore").decode() == turn["content"]


def images_per_prompt(images, named: Sequence[int]) -> list[list]:
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
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(sides) != 2 or not all(isinstance(number, int) and number > 0 for number in (num_image_token, *sides)):
            raise ValueError(f"num_image_token {num_image_token!r} and image_size {image_size!r} must be numbers from 1")
        check_pixel_settings(image_mean, image_std, resample)
        self.tokenizer, self.num_image_token, self.image_size = tokenizer, num_image_token, sides
        self.image_mean, self.image_std, self.resample = tuple(image_mean), tuple(image_std), resample
        self.do_pad_square, self.around_image = do_pad_square, tuple(around_image)
        # <image> first: a model without a row for it takes the first id past its table for the placeholder.
        special = [IMAGE_TOKEN, *re.findall(r"<[^<>]+>", "".join(around_image))]
        locations = LOCATION_TOKENS if add_location_tokens else []
        self.ours = hasattr(tokenizer, "encode_chat")  # lib/tokenizer.py's, or Hugging Face's
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
        self._places = num_image_token, self.around_image

    def __call__(
        self, prompts: str | Sequence[str] | None = None, images=None, conversations: Sequence | None = None, *,
        padding: bool | str = True, padding_side: str | None = None, max_length: int | None = None, truncation: bool = False,
        pad_to_multiple_of: int = 1, add_generation_prompt: bool = False, add_special_tokens: bool = True, fast: bool = False,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """B prompts, or B conversations (see to_messages), and their images (see images_per_prompt and to_image).

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
        shared = images_per_prompt(images, named)
        encoded, learn = [], conversations is not None and not add_generation_prompt
        for number, row in enumerate(rows):
            if conversations is None:
                ids = self._encode(self._with_images(row, len(shared[number]))[0]["content"], add_special_tokens)
                answers = [0] * len(ids)
            else:
                ids, answers = self._encode_conversation(row, len(shared[number]), add_generation_prompt)
                if learn and not any(answers):
                    raise ValueError(f"conversation {number} has no answer: add_generation_prompt=True would ask for one")
            encoded.append(self._truncated(number, ids, answers, max_length, truncation))
        side = padding_side or ("right" if learn else "left")
        batch = self._padded(encoded, padding, side, max_length, pad_to_multiple_of)
        if not learn:
            del batch["labels"]
        if flat := [image for row in shared for image in row]:
            batch["pixel_values"] = self.pixel_values(flat, fast)
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
        """Ids of a conversation (see to_messages) about so many images, and a mask: 1 on its answers and the token that
        ends each. Where it says no <image>, they stand before its first question. Raises ValueError where counts differ."""
        messages = to_messages(conversation)
        named = sum(message["content"].count(IMAGE_TOKEN) for message in messages)
        if named not in (0, num_images):
            raise ValueError(f"a conversation says {IMAGE_TOKEN} {named} times and has {num_images} images: give one for each")
        return self._encode_conversation(messages, num_images, add_generation_prompt)

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

    def _with_images(self, messages: list[dict[str, str]], num_images: int) -> list[dict[str, str]]:
        """The messages; where none says <image>, all of them stand before the first question."""
        if any(IMAGE_TOKEN in message["content"] for message in messages):
            return messages
        question = next((message for message in messages if message["role"] == "user"), messages[0])
        first = question | {"content": IMAGE_TOKEN * num_images + question["content"]}
        return [first if message is question else message for message in messages]

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        (text,) = add_image_tokens_to_prompts([text], *self._places)
        options = {"parse_special": self.recognised} if self.ours else {}
        return self.tokenizer(text, add_special_tokens=add_special_tokens, **options)["input_ids"]

    def _encode_conversation(self, messages: list[dict], num_images: int, ask: bool) -> tuple[list[int], list[int]]:
        from lib.chat import encode_conversation

        images = add_image_tokens_to_prompts([IMAGE_TOKEN] * num_images, *self._places)
        messages = self._with_images(messages, num_images)
        return encode_conversation(self.tokenizer, messages, ask, self.recognised, IMAGE_TOKEN, images, add_special_tokens=True)

    def _truncated(self, number: int, ids: list[int], answers: list[int], limit: int | None, truncation: bool):
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
    def from_pretrained(cls, source: str | os.PathLike, tokenizer=None, **changes) -> "MllamaImageProcessor":
        """The processor that belongs to a checkpoint, from what its files say (see lib/image_settings.py).

        tokenizer: the folder's own unless given. changes: arguments of the constructor that overrule the files. Raises
        FileNotFoundError or ValueError where the files are missing, damaged, or ask for what is not done here.
        """
        from lib.image_settings import processor_settings

        settings = processor_settings(source, changes.get("image_size"))
        if tokenizer is None:  # the folder's own has the location tokens if its model knows them
            from lib.tokenizer import load_tokenizer

            tokenizer, settings["add_location_tokens"] = load_tokenizer(source), False
        known = tokenizer.convert_tokens_to_ids(IDEFICS3_AROUND[1]) not in (None, tokenizer.unk_token_id)
        if "around_image" in settings and not known:
            del settings["around_image"]
        if "num_image_token" not in settings | changes:
            raise ValueError(f"{source} has no config.json to say how many tokens an image is: give num_image_token")
        return cls(tokenizer, **settings | changes)

    def save_pretrained(self, folder: str | os.PathLike, layout: str | None = None) -> None:
        """Write the tokenizer's files and preprocessor_config.json, which transformers' AutoImageProcessor opens. layout: that
        of the model, "llava" or "idefics3", adds processor_config.json for AutoProcessor."""
        from lib.image_settings import write_processor_settings

        write_processor_settings(folder, self, layout)
        self.tokenizer.save_pretrained(folder)
