"""The images of a row, and where they stand in its questions: each at its <image>, whatever the row calls it.

images, names = images_of(fields)            # names of files, or bytes
images = placed(messages, images, names)     # in the order of their <image>s, which the messages have from here on
"""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence

from data.row_values import Fields, RowError, is_absent, kind_of, listed, printable, text_of
from processing_mllama import IMAGE_TOKEN

IMAGES = ("image", "images", "image_bytes", "image_path", "image_paths", "image_file", "img", "img_path", "picture", "photo")
IMAGES += ("file_name", "filename", "jpg", "jpeg", "png", "webp")
NO_IMAGES = ("video", "audio", "speech", "sound")
IMAGE_KEY = re.compile(r"image|img|photo|picture|\bpic|video|frame|jpe?g|png|pixel", re.IGNORECASE)
ABOUT_IMAGES = re.compile(r"(ratings|min|max|size|width|height|count)$|^(num|n)_images$", re.IGNORECASE)
IMAGE_NAME = re.compile(r"\S\.(jpe?g|png|webp|gif|bmp|tiff?|ppm|jp2|avif)$", re.IGNORECASE)
MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif"}
PLACEHOLDER = re.compile(  # of an image, or of what is no image, in the words of other models
    r"<\|vision_start\|>(?:<\|image_pad\|>)?<\|vision_end\|>|<start_of_image>|\[(?:img|image)[ _-]?(?P<bracketed>\d{0,4})\]|"
    r"<\|?(?P<name>image|img|imagehere|img_?context|image[ _-]?(?:pad|placeholder|soft_token)|picture|photo|"
    r"video|video_?pad|audio|audio_?pad|speech|sound)[ _-]?(?P<number>\d{0,4})\|?>",
    re.IGNORECASE,
)


def image_of(field: str, value) -> str | bytes:
    """An image as the name of its file, or its bytes. Raises RowError."""
    if isinstance(value, Mapping):  # as datasets stores it, or a part of a message
        value = next((value[key] for key in ("bytes", "path", "url", "file_name") if not is_absent(value.get(key))), value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if not isinstance(value, str):
        raise RowError(field, f"is {kind_of(value)}: the name of an image was expected")
    if value.startswith(("http://", "https://")):
        raise RowError(field, f"is {value[:60]!r}, a web address: fetch the image and name its file")
    encoded = re.match(r"data:image/[\w.+-]+;base64,", value)
    if encoded or (len(value) > 256 and re.match(r"[A-Za-z0-9+/\s]{256}", value)):
        try:
            content = base64.b64decode(value[encoded.end() if encoded else 0 :], validate=False)
        except binascii.Error:
            raise RowError(field, "is damaged base64") from None
        if encoded or suffix_of(content) != "img":
            return content
    return text_of(field, value.removeprefix("file://"))


def suffix_of(content: bytes) -> str:
    """jpg, png and so on, by how the bytes of an image begin; img for what is not known."""
    return next((suffix for magic, suffix in MAGIC.items() if content.startswith(magic)), "img")


def images_of(fields: Fields) -> tuple[list[str | bytes], list[str]]:
    """(a row's images, the placeholders that it names them by, if it does). Raises RowError."""
    field, value = fields.take(*IMAGES)
    if value is None:
        return [image_of(name, each) for name, each in fields.numbered("image")], []
    value = listed(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if isinstance(value, Mapping) and all(str(key).startswith("<") for key in value):  # MiniCPM-V: {"<image_00>": name}
        return [image_of(f"{field}.{printable(key)}", each) for key, each in value.items()], [*map(str, value)]
    if isinstance(value, (list, tuple)):
        return [image_of(f"{field}[{k}]", each) for k, each in enumerate(value)], []
    return [image_of(field, value)], []


def placed(messages: list[dict[str, str]], images: list, names: Sequence[str] = ()) -> list:
    """The images in the order of their <image>s, which the questions have afterwards, whatever the row calls them. Raises
    RowError where they cannot be placed."""
    questions = [message for message in messages if message["role"] != "assistant"]
    for number, name in enumerate(names, start=1):
        for message in questions:
            message["content"] = message["content"].replace(name, f"<image_{number}>")
    said = "\n".join(message["content"] for message in questions)
    plain = said.count(IMAGE_TOKEN)
    others = [] if plain else [match for match in PLACEHOLDER.finditer(said) if match[0] != IMAGE_TOKEN]
    if not plain and not images and (inside := re.findall(r"<img>([^<>\n]+)</img>", said)):  # Qwen-VL: <img>name</img>
        for message in questions:
            message["content"] = re.sub(r"<img>[^<>\n]+</img>", IMAGE_TOKEN, message["content"])
        return [image_of("<img>", name.strip()) for name in inside]
    if plain or not (images or others):
        if plain != len(images):
            raise RowError("image", f"there are {len(images)} images, but the conversation says {IMAGE_TOKEN} {plain} times")
        return images
    if not others:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = IMAGE_TOKEN * len(images) + first["content"]
        return images
    media = next((m[0] for m in others if (m["name"] or "").lower().startswith(NO_IMAGES)), None)
    if media:
        raise RowError("conversations", f"says {media}, which is no image and not read")
    if not images:
        raise RowError("conversations", f"says {others[0][0]}, but the row has no image")
    return place_numbered(questions, images, others)


def place_numbered(questions: list[dict[str, str]], images: list, others: Sequence[re.Match]) -> list:
    """The same where the questions say each image as PLACEHOLDER has it: all without a number, or all with one, of which the
    second mention stays a mention ("image 2"). Raises RowError unless all images are named."""
    numbers = [match["number"] or match["bracketed"] for match in others]
    numbers = numbers if any(numbers) else range(len(others))
    order = list(dict.fromkeys(map(int, numbers))) if all(str(number).isdigit() for number in numbers) else []
    first = min(order, default=0)
    if first > 1 or sorted(order) != list(range(first, first + len(images))):
        raise RowError("image", f"there are {len(images)} images, but the conversation says {others[0][0]} {len(others)} times")
    unseen, coming = set(order), iter(numbers)

    def write(match: re.Match) -> str:
        number = int(next(coming))
        if number not in unseen:
            return f"image {number}"
        unseen.remove(number)
        return IMAGE_TOKEN

    for message in questions:
        message["content"] = PLACEHOLDER.sub(write, message["content"])
    return [images[number - first] for number in order]


def refuse_hints(fields: Fields) -> None:
    """Raises RowError where what was not read speaks of an image: the row came without."""
    for key, value in fields.unread.items():
        a_name = isinstance(value, str) and len(value) < 1000 and IMAGE_NAME.search(value)
        if a_name or isinstance(value, bytes) or (IMAGE_KEY.search(key) and not ABOUT_IMAGES.search(key)):
            raise RowError(key[:40], f"hints at an image that is not read: name it under {IMAGES[0]!r} or {IMAGES[1]!r}")
