"""Images and prompts in, tensors out: everything between a photo on disk and the model's arguments.

Pixels are those of transformers' image processors, prompts follow LLaVA and PaliGemma: each `<image>` in a text becomes
num_image_token placeholders, which the model overwrites with the features of the image; an image that is cut into tiles
(data/tiles.py) becomes as many for each of them.

    processor = MllamaImageProcessor(tokenizer, num_image_token=196, image_size=224)
    batch = processor(["What is this? <image>"], ["photo.jpg"])        # pixel_values, input_ids, attention_mask
    batch = processor.conversation({"conversations": [...]}, image)    # and labels: -100 everywhere but the answers
    model(**batch)

The tokenizer is ours or any Hugging Face one. It gains `<image>`, then PaliGemma's 1,024 `<locNNNN>` and 128 `<segNNN>` (see
lib/boxes.py). A placeholder needs no row in the model's embedding table; location tokens do, before they are used:
lib.vocabulary.resize_token_embeddings(model, len(tokenizer)). MLLAMAConfig's image_token_id is processor.image_token_id; a
batch with images brings it along.

Text is data: with our tokenizer nothing but those tokens means anything inside it, and "<|im_end|>" stays text; a Hugging
Face tokenizer obeys every special token it finds.
Axes: B batch, T text tokens, I images of the whole batch, tiles counted one by one, H and W an image's sides.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby, islice

import torch

from data.image_settings import ImageSettings
from data.tiles import WHOLE, find_tiling, resize, to_pixels  # noqa: F401 -- the posts find `resize` here

IMAGENET_STANDARD_MEAN = (0.5, 0.5, 0.5)  # so called in transformers; SigLIP's: they take 0..1 to -1..1
IMAGENET_STANDARD_STD = (0.5, 0.5, 0.5)
IMAGE_TOKEN = "<image>"
LOCATION_TOKENS = [f"<loc{i:04d}>" for i in range(1024)] + [f"<seg{i:03d}>" for i in range(128)]
IDEFICS3_AROUND = ("<fake_token_around_image><global-img>", "<fake_token_around_image>")  # around an image taken whole
ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("user", "assistant", "system")}
TILE_TOKENS = [f"<row_{r + 1}_col_{c + 1}>" for r in range(6) for c in range(6)]  # those that published tokenizers have

# ---- images ----------------------------------------------------------------------------------------------------------


def rescale(pixels: torch.Tensor, scale: float = 1 / 255) -> torch.Tensor:
    """Bytes to floats in 0..1. A division: x / 255 is what transformers' x * (1 / 255), taken in doubles, rounds to; and in
    two steps, since one with mixed types is ten times slower on a CPU."""
    return pixels.to(torch.float32, copy=True).div_(1 / scale)


def normalize(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """[..., 3, H, W]: (pixels - mean) / std, channel by channel."""
    mean, std = (torch.tensor(value, dtype=pixels.dtype)[:, None, None] for value in (mean, std))
    return (pixels - mean).div_(std)


def scale_pixels(pixels: torch.Tensor, settings: ImageSettings) -> torch.Tensor:
    """uint8 [..., 3, H, W], as to_pixels makes them, to what the model reads, float32: rescale and normalize, in one memory."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (settings.image_mean, settings.image_std))
    return rescale(pixels, settings.rescale_factor).sub_(mean).div_(std)


def denormalize(pixels: torch.Tensor, settings: ImageSettings) -> torch.Tensor:
    """The uint8 [..., 3, H, W] that scale_pixels made these of: images as they are drawn."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (settings.image_mean, settings.image_std))
    return ((pixels * std + mean) / settings.rescale_factor).round().clamp(0, 255).to(torch.uint8)


def process_images(
    images: Sequence, image_size: int | tuple[int, int] | ImageSettings, resample: str = "bicubic", fast: bool = False, **more
) -> torch.Tensor:
    """I images (see to_image) -> pixel_values, float32 [I, 3, height, width]; where they are cut into tiles, I counts these.

    image_size: (height, width), with more settings as ImageSettings has them, or all of them. fast: JPEGs far larger than that
    are decoded at a fraction of their size, which changes pixels a little. Raises ValueError that names the image by its number
    and, if it has one, its path.
    """
    settings = image_size if isinstance(image_size, ImageSettings) else ImageSettings(image_size, resample, **more)
    if not len(images):
        raise ValueError("there are no images to process: the list is empty")
    squares = each_image(images, lambda image: to_pixels(image, settings, fast))
    # Bytes are cheap to move: one tensor of them, then the arithmetic on all of it at once.
    return scale_pixels(torch.cat(squares), settings)


def each_image(images: Sequence, prepare: Callable) -> list:
    """prepare(image) of each; a ValueError names the image by its number and, if it has one, its path."""
    found = []
    for number, image in enumerate(images):
        try:
            found.append(prepare(image))
        except ValueError as error:
            path = f" ({os.fspath(image)})" if isinstance(image, (str, os.PathLike)) else ""
            raise ValueError(f"image {number}{path}: {error}") from None
    return found


# ---- prompts ---------------------------------------------------------------------------------------------------------


def text_around_images(config) -> tuple[str, str]:
    """What stands before and after the tokens of an image: Idefics3's special tokens where the model has its linear projector,
    in the published layout or in ours; nothing elsewhere."""
    joined_as_idefics3 = getattr(config, "projector_type", None) == "linear" and not hasattr(config, "cross_every")
    return IDEFICS3_AROUND if joined_as_idefics3 else ("", "")


def add_image_tokens_to_prompts(prompts: Sequence[str], num_image_token: int, around_image=("", "")) -> list[str]:
    """Each <image> becomes num_image_token of them, between the two texts of around_image."""
    return [prompt.replace(IMAGE_TOKEN, (IMAGE_TOKEN * num_image_token).join(around_image)) for prompt in prompts]


def write_image(tiling: tuple[int, int], num_image_token: int, around_image=("", ""), image_token: str = IMAGE_TOKEN) -> str:
    """What stands in a text for one image: num_image_token placeholders between the two texts of around_image. Where the image
    is cut (data/tiles.py), as many for each tile come first, row by row, as Idefics3 and SmolVLM write it."""
    (rows, columns), (_, fake), tokens = tiling, around_image, image_token * num_image_token
    lines = ["".join(f"{fake}<row_{r + 1}_col_{c + 1}>{tokens}" for c in range(columns)) + "\n" for r in range(rows)]
    return "".join(lines) + ("\n" if rows else "") + tokens.join(around_image)


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

    tokenizer: gains the tokens named above (add_location_tokens=False: only <image>); num_image_token: placeholders per image,
    or tile of one, the model's config.text_config.num_image_tokens; image_size: pixels, a number or (height, width), with more
    settings as in data/image_settings.py, or all of them; around_image: special tokens before and after each image
    (IDEFICS3_AROUND); image_token: the placeholder's spelling, where a model has another one for what texts call <image>.
    Raises ValueError for settings that make no sense.
    """

    def __init__(
        self, tokenizer, num_image_token: int, image_size: int | tuple[int, int] | ImageSettings, *,
        add_location_tokens: bool = True, around_image=("", ""), image_token: str = IMAGE_TOKEN, **image_settings,
    ):  # fmt: skip
        if not isinstance(num_image_token, int) or num_image_token < 1:
            raise ValueError(f"num_image_token is {num_image_token!r}: it must be a number from 1")
        if not isinstance(image_size, ImageSettings):
            image_size = ImageSettings(image_size, **image_settings)
        self.image_settings, self.around_image = image_size, tuple(around_image)
        self.tokenizer, self.num_image_token, self.image_token = tokenizer, num_image_token, image_token
        # <image> first: a model without a row for it takes the first id past its table for the placeholder.
        special = [image_token, *re.findall(r"<[^<>]+>", "".join(around_image))]
        locations = LOCATION_TOKENS if add_location_tokens else []
        self.ours = hasattr(tokenizer, "encode_chat")  # lib/tokenizer.py's, or Hugging Face's
        if self.ours:
            tokenizer.add_special_tokens(special + locations)
        else:  # where add_special_tokens would forget the additional ones there were
            tokenizer.add_tokens(special, special_tokens=True)
            tokenizer.add_tokens(locations)
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        absent, optional = (None, tokenizer.unk_token_id), LOCATION_TOKENS + TILE_TOKENS
        ids = zip(tokenizer.convert_tokens_to_ids(optional), optional, strict=True)
        known = {i: token for i, token in ids if i not in absent}
        self.locations = {i: token for i, token in known.items() if token not in TILE_TOKENS}
        self.recognised = frozenset([*special, *known.values()])

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of what the model reads."""
        return self.image_settings.image_size

    def split_images(self, on: bool) -> None:
        """From now on images are cut into tiles, or taken whole. Where no file says how large an image is before it is cut, its
        longer side is four tiles. Raises ValueError for a model of another kind than Idefics3."""
        settings = self.image_settings
        if on and self.around_image != IDEFICS3_AROUND:
            raise ValueError("only images between Idefics3's <fake_token_around_image> are split: leave out --split-images")
        if on != (settings.fit == "tiles"):
            size = settings.size or {"longest_edge": 4 * settings.image_size[0]}
            changes = {"fit": "tiles", "size": size} if on else {"fit": "squeeze"}
            self.image_settings = replace(settings, **changes)

    def __call__(
        self, prompts: str | Sequence[str] | None = None, images=None, conversations: Sequence | None = None, *,
        padding: bool | str = True, padding_side: str | None = None, max_length: int | None = None, truncation: bool = False,
        pad_to_multiple_of: int = 1, add_generation_prompt: bool = False, add_special_tokens: bool = True,
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
        flat = [image for row in shared for image in row]
        tilings = iter(self.tilings(flat))
        encoded, learn = [], conversations is not None and not add_generation_prompt
        for number, row in enumerate(rows):
            tiled = list(islice(tilings, len(shared[number])))
            if conversations is None:
                ids = self._encode(row[0]["content"], tiled, add_special_tokens)
                answers = [0] * len(ids)
            else:
                ids, answers = self._encode_conversation(row, tiled, add_generation_prompt)
                if learn and not any(answers):
                    raise ValueError(f"conversation {number} has no answer: add_generation_prompt=True would ask for one")
            encoded.append(self._truncated(number, ids, answers, max_length, truncation))
        side = padding_side or ("right" if learn else "left")
        batch = self._padded(encoded, padding, side, max_length, pad_to_multiple_of)
        if not learn:
            del batch["labels"]
        if flat:
            batch["pixel_values"] = self.pixel_values(flat)
            batch["image_token_id"] = torch.tensor(self.image_token_id)
        return batch

    def conversation(self, conversation, images=None, **options) -> dict[str, torch.Tensor]:
        """A batch of one conversation, with its image or list of images."""
        return self(None, images, [conversation], **options)

    def pixel_values(self, images: Sequence) -> torch.Tensor:
        """I images, or all tiles of some, as the model sees them; see process_images."""
        return process_images(images, self.image_settings)

    def tilings(self, images: Sequence) -> list[tuple[int, int]]:
        """Into how many rows and columns of tiles each is cut (see data/tiles.py); of files only the headers are read. Raises
        as process_images."""
        return each_image(images, lambda image: find_tiling(image, self.image_settings))

    def encode(
        self, conversation, images: int | Sequence[tuple[int, int]], add_generation_prompt: bool = False, answers: str = "all"
    ) -> tuple[list[int], list[int]]:
        """Ids of a conversation (see to_messages) about images, and a mask: 1 on its answers ("last": at least on that one) and
        the token that ends each. images: their tilings, or how many they are, each taken whole. Where it says no <image>, they
        stand before its first question. Raises ValueError where counts differ."""
        messages, tilings = to_messages(conversation), [WHOLE] * images if isinstance(images, int) else list(images)
        named, count = sum(message["content"].count(IMAGE_TOKEN) for message in messages), len(tilings)
        if named not in (0, count):
            raise ValueError(f"a conversation says {IMAGE_TOKEN} {named} times and has {count} images: give one for each")
        return self._encode_conversation(messages, tilings, add_generation_prompt, answers)

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

    def _written(self, tilings: Sequence[tuple[int, int]]) -> list[str]:
        return [write_image(tiling, self.num_image_token, self.around_image, self.image_token) for tiling in tilings]

    def _encode(self, text: str, tilings: Sequence[tuple[int, int]], add_special_tokens: bool) -> list[int]:
        text, written = text if IMAGE_TOKEN in text else IMAGE_TOKEN * len(tilings) + text, iter(self._written(tilings))
        text = re.sub(re.escape(IMAGE_TOKEN), lambda _: next(written), text)
        options = {"parse_special": self.recognised} if self.ours else {}
        return self.tokenizer(text, add_special_tokens=add_special_tokens, **options)["input_ids"]

    def _encode_conversation(self, messages: list[dict], tilings, ask: bool, answers: str = "all") -> tuple[list, list]:
        from lib.chat import encode_conversation

        images, messages = self._written(tilings), self._with_images(messages, len(tilings))
        messages = [m | {"content": m["content"].replace(IMAGE_TOKEN, self.image_token)} for m in messages]
        options = {"image_token": self.image_token, "images": images, "add_special_tokens": True, "answers": answers}
        return encode_conversation(self.tokenizer, messages, ask, self.recognised, **options)

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
        from lib.image_settings import image_token_of, processor_settings

        settings = processor_settings(source, changes.get("image_size"))
        if tokenizer is None:  # the folder's own has the location tokens if its model knows them
            from lib.tokenizer import load_tokenizer

            tokenizer, settings["add_location_tokens"] = load_tokenizer(source), False
        settings["image_token"] = image_token_of(tokenizer, settings.get("image_token"), settings.pop("image_token_id", None))
        known = tokenizer.convert_tokens_to_ids(IDEFICS3_AROUND[1]) not in (None, tokenizer.unk_token_id)
        if "around_image" in settings and not known:
            del settings["around_image"]
        if "num_image_token" not in settings | changes:
            raise ValueError(f"{source} has no config.json to say how many tokens an image is: give num_image_token")
        if "image_size" not in settings | changes:
            raise ValueError(f"{source} does not say what size of images its model reads: give image_size")
        return cls(tokenizer, **settings | changes)

    def save_pretrained(self, folder: str | os.PathLike, layout: str | None = None) -> None:
        """Write the tokenizer's files and preprocessor_config.json, which transformers' AutoImageProcessor opens. layout: that
        of the model, "llava" or "idefics3", adds processor_config.json for AutoProcessor."""
        from lib.image_settings import write_processor_settings

        write_processor_settings(folder, self, layout)
        self.tokenizer.save_pretrained(folder)
