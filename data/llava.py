"""LLaVA-style JSON, the interchange format of visual conversations: checked before training, read without surprises after.

    rows = LlavaRows.read("train.json", "images")            # every row is checked now, not at hour three
    print(rows.report())                                     # rows, usable rows, the first ten problems
    train, held_out = rows.split(0.1, seed=0)                # no picture is on both sides
    cache = PictureCache(224)
    pixels = cache[train[0].images[0]]                       # float32 [3, S, S], or None for a picture that is damaged

    python llava_json.py check train.json --images images    # the report; exit code 1 if rows had to be dropped
    python llava_json.py easy-vqa easy_vqa.tar FOLDER        # FOLDER/train.json, test.json and images/
    python llava_json.py coco-captions coco_captions_permissive.tar FOLDER
    python llava_json.py classes photos.zip FOLDER           # class/*.jpg, each answered with "A photo of a CLASS."

The file is a list of {"id", "image": name, [names] or absent, "conversations": [{"from": "human" | "gpt" | "system", "value":
text}, ...]} (Liu et al. 2023, Visual Instruction Tuning), or .jsonl with one such object a line. Each <image> in the texts
is one of the row's pictures, in order. Beside that we know "kinds", one word a question, by which evaluation sorts its scores.
Rows are counted from 1; those of a .jsonl are its lines.
"""

import argparse
import collections
import json
import os
import re
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from threading import Lock

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data.folders import _FORMATS, DAMAGED, arrange, one_line, open_source
from lib.files import write_json
from lib.run import not_negative_int, positive_int, run_cli
from processing_mllama import (
    IMAGE_TOKEN,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    MAX_ASPECT,
    RESAMPLE,
    ROLES,
    fit,
    normalize,
    rescale,
)
from vit_scratch import pair

# ---- one row ---------------------------------------------------------------------------------------------------------


class Wrong(ValueError):
    """(field, what): what makes a row unusable."""


@dataclass(frozen=True)
class Row:
    """A conversation that passed all checks. Each picture has its <image> in the messages: where the file names none for its
    one picture, the first question begins with it, as the processor would have it, so that rows of both sorts share a batch.
    """

    number: int  # in the file, from 1
    id: str
    images: tuple[Path, ...]
    messages: list[dict[str, str]]  # {"role": "system", "user" or "assistant", "content": text}
    kinds: tuple[str, ...] | None  # one per question


def kind_of(value) -> str:
    """What a JSON value is, in words. Its content stays out of it: that may be long, or nested without end."""
    names = {type(None): "missing", bool: "true or false", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def checked_text(field: str, value) -> str:
    if not isinstance(value, str):
        raise Wrong(field, f"is {kind_of(value)}: a text was expected")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Wrong(field, "holds half of a surrogate pair, which is no text") from None
    return value


def checked_messages(turns) -> list[dict[str, str]]:
    """Perhaps a system turn, then human and gpt by turns, to the last answer. Raises Wrong."""
    if not isinstance(turns, list) or not turns:
        raise Wrong("conversations", f"is {'empty' if turns == [] else kind_of(turns)}: a list of turns was expected")
    messages, expected = [], ("system", "user")
    for k, turn in enumerate(turns):
        field = f"conversations[{k}]"
        if not isinstance(turn, dict):
            raise Wrong(field, f'is {kind_of(turn)}: {{"from": ..., "value": ...}} was expected')
        who = checked_text(f"{field}.from", turn.get("from"))
        text = checked_text(f"{field}.value", turn.get("value"))
        role = ROLES.get(who)
        if role is None:
            raise Wrong(f"{field}.from", f"is {who[:40]!r}: human, gpt or system was expected")
        if role not in expected:
            raise Wrong(f"{field}.from", f"is {who!r}, out of turn: first system or not, then human and gpt by turns")
        if role == "assistant" and not text.strip():
            raise Wrong(f"{field}.value", "is an empty answer")
        if role == "assistant" and IMAGE_TOKEN in text:
            raise Wrong(f"{field}.value", f"has {IMAGE_TOKEN} in an answer: pictures belong to questions")
        messages.append({"role": role, "content": text})
        expected = ("assistant",) if role == "user" else ("user",)
    if role != "assistant":
        raise Wrong(field, "has no answer: the last turn must be gpt's")
    return messages


def checked_path(field: str, name, folder: Path) -> Path:
    """Where the picture lies. Links inside the folder may lead out of it: they are its owner's. Raises Wrong."""
    name = checked_text(field, name)
    if not name or "\0" in name:
        raise Wrong(field, f"is {name[:40]!r}: the name of a picture was expected")
    if os.path.isabs(name) or PureWindowsPath(name).is_absolute():
        raise Wrong(field, f"is {name[:80]!r}, an absolute path: name it from the images folder on")
    inside = os.path.normpath(name)
    if inside.split(os.sep)[0] == os.pardir or os.path.isabs(inside):
        raise Wrong(field, f"is {name[:80]!r}, which leaves the images folder")
    return folder / inside


def checked_row(number: int, raw, folder: Path) -> Row:
    """A row of the file, its pictures not yet opened. Raises Wrong."""
    if not isinstance(raw, dict):
        raise Wrong("row", f"is {kind_of(raw)}: an object was expected")
    name = number if raw.get("id") is None else raw["id"]
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise Wrong("id", f"is {kind_of(name)}: a text or a number was expected")
    messages = checked_messages(raw.get("conversations"))
    match raw.get("image"):
        case None:
            images = ()
        case list() as names:
            images = tuple(checked_path(f"image[{k}]", one, folder) for k, one in enumerate(names))
        case one:
            images = (checked_path("image", one, folder),)
    places = count_images(messages)
    if len(images) == 1 and not places:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = IMAGE_TOKEN + first["content"]
    elif len(images) != places:
        raise Wrong("image", f"there are {len(images)} pictures, but the conversation says {IMAGE_TOKEN} {places} times")
    kinds = raw.get("kinds")
    if kinds is not None:
        if not isinstance(kinds, list):
            raise Wrong("kinds", f"is {kind_of(kinds)}: a list of texts was expected")
        kinds = tuple(checked_text(f"kinds[{k}]", kind) for k, kind in enumerate(kinds))
        asked = sum(message["role"] == "user" for message in messages)
        if len(kinds) != asked:
            raise Wrong("kinds", f"there are {len(kinds)} kinds for {asked} questions")
    return Row(number, str(name), images, messages, kinds)


def count_images(messages: Iterable[dict[str, str]]) -> int:
    """How many pictures the messages speak of."""
    return sum(message["content"].count(IMAGE_TOKEN) for message in messages)


def isolated_turns(messages: Sequence[dict[str, str]]) -> list[list[dict[str, str]]]:
    """A conversation as one conversation for each question: with the system's words and all that the first question has up to
    its last picture, but without the other questions and answers. A question with pictures of its own stays a whole
    conversation, since what comes after may be about them."""
    head = [message for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    if any(IMAGE_TOKEN in message["content"] for message in turns[1:]):
        return [list(messages)]
    pictures, named, _ = turns[0]["content"].rpartition(IMAGE_TOKEN)
    opening = pictures + named
    rest = turns[0]["content"][len(opening) :]
    opening += "\n" if rest.startswith("\n") else ""
    asked = [rest.removeprefix("\n"), *(turn["content"] for turn in turns[2::2])]
    answers = turns[1::2]
    return [
        [*head, {"role": "user", "content": opening + question}, answer]
        for question, answer in zip(asked, answers, strict=True)
    ]


def questions(row: Row, isolated: bool = False) -> list[tuple[list[dict[str, str]], str, str]]:
    """For each answer: (the messages up to and including its question, the answer, the question's kind or "answer").

    Earlier questions and their true answers are among the messages, unless isolated (see isolated_turns). The pictures that go
    with the messages are row.images[: count_images(messages)].
    """
    turns = isolated_turns(row.messages) if isolated else [row.messages]
    asked = [
        (turn[:k], turn[k]["content"]) for turn in turns for k, message in enumerate(turn) if message["role"] == "assistant"
    ]
    kinds = row.kinds or ("answer",) * len(asked)
    return [(*pair, kind) for pair, kind in zip(asked, kinds, strict=True)]


# ---- all rows --------------------------------------------------------------------------------------------------------


def parsed(data: bytes):
    """JSON from bytes. Raises ValueError with the reason."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_rows(path: Path) -> tuple[list[tuple[int, object]], list[tuple[int, str, str]]]:
    """(number, row) of all that can be parsed, and the problems of lines that cannot. Raises ValueError for a file that is
    no JSON list; in a .jsonl only the line that is damaged, such as a last one cut short, is lost."""
    data = path.read_bytes()
    if path.suffix.lower() == ".jsonl":
        rows, problems = [], []
        for number, line in enumerate(data.split(b"\n"), start=1):
            if line.strip():
                try:
                    rows.append((number, parsed(line)))
                except ValueError as error:
                    problems.append((number, "line", f"is damaged or cut off ({one_line(error)})"))
        return rows, problems
    try:
        rows = parsed(data)
    except ValueError as error:
        hint = (
            "one object a line? Then name it .jsonl" if "Extra data" in str(error) else "it is damaged or cut off, get it again"
        )
        raise ValueError(f"{path} is not valid JSON ({one_line(error)}): {hint}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds {kind_of(rows)}, not a list of rows: is it LLaVA-style JSON?")
    return list(enumerate(rows, start=1)), []


def find_images(folder: Path, rows: Iterable[dict]) -> Path:
    """The folder of the JSON file or its "images", whichever holds more of the first hundred pictures that are named."""
    named = [row["image"] for row in rows if isinstance(row, dict) and isinstance(row.get("image"), (str, list))]
    named = [one for name in named[:100] for one in ([name] if isinstance(name, str) else name[:1]) if isinstance(one, str)]
    return max((folder, folder / "images"), key=lambda where: sum(os.path.isfile(os.path.join(where, one)) for one in named))


def header_problem(path: Path) -> str | None:
    """Why a picture can be of no use, by its header alone: what is damaged further on, PictureCache will meet."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            return "is not a file"
        if not about.st_size:
            return "is empty (0 bytes)"
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
    except Image.UnidentifiedImageError:
        return "is not a picture in a format that is read here"
    except FileNotFoundError:
        return "does not exist"
    except Exception as error:  # decoders meet damaged bytes with almost any type of exception
        return f"cannot be opened ({one_line(error)})"
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        return f"has {width}x{height} pixels, more than {Image.MAX_IMAGE_PIXELS:,}"
    return size_problem(width, height)


def size_problem(width: int, height: int) -> str | None:
    if min(width, height) < 1:
        return f"of {width}x{height} pixels is empty"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"of {width}x{height} pixels is too thin a strip (over {MAX_ASPECT} to 1)"
    return None


@contextmanager
def picture_threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that open pictures, without Pillow's warnings about odd but readable ones."""
    Image.init()  # loads Pillow's format plugins once, before the threads
    with warnings.catch_warnings(), ThreadPoolExecutor(max(workers, 1)) as pool:
        warnings.simplefilter("ignore")
        yield pool


@dataclass(frozen=True)
class LlavaRows(Sequence):
    """The usable rows of a file, and why the others are not: the first problem of each."""

    source: Path
    folder: Path  # of the images
    rows: list[Row]
    total: int  # rows in the file
    problems: list[tuple[int, str, str]]  # (row number, field, what)

    @classmethod
    def read(cls, json_path: str | Path, images_dir: str | Path | None = None, progress: bool = False) -> "LlavaRows":
        """Checks every row and opens every picture's header. images_dir: see find_images for what it is by default.

        Raises FileNotFoundError for a file or folder that is not there, ValueError for one that is no JSON list or has no
        usable row. Everything else is in `problems`.
        """
        source = Path(json_path)
        if not source.exists():
            raise FileNotFoundError(f"{source} does not exist: name a LLaVA-style .json or .jsonl file")
        if not source.is_file():
            raise ValueError(f"{source} is not a file: name a LLaVA-style .json or .jsonl file")
        raw, problems = read_rows(source)
        folder = find_images(source.parent, (row for _, row in raw)) if images_dir is None else Path(images_dir)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder: name the one that the pictures in {source.name} lie in")
        total, rows = len(raw) + len(problems), []
        for number, row in raw:
            try:
                rows.append(checked_row(number, row, folder))
            except Wrong as wrong:
                problems.append((number, *wrong.args))
        paths = list(dict.fromkeys(path for row in rows for path in row.images))
        with picture_threads(16) as pool:
            found = pool.map(header_problem, paths)
            found = list(tqdm(found, "checking", len(paths), unit=" pictures", disable=not progress))
        bad, usable = {path: what for path, what in zip(paths, found, strict=True) if what}, []
        for row in rows:
            k = next((k for k, path in enumerate(row.images) if path in bad), None)
            if k is None:
                usable.append(row)
            else:
                field = "image" if len(row.images) == 1 else f"image[{k}]"
                problems.append((row.number, field, f"{str(row.images[k].relative_to(folder))[:80]!r} {bad[row.images[k]]}"))
        problems.sort(key=lambda problem: problem[0])
        if not usable:
            first = "; the first, row {}, {}: {}".format(*problems[0]) if problems else ""
            raise ValueError(f"{source} has {total} rows and none is usable{first}")
        return cls(source, folder, usable, total, problems)

    def report(self) -> str:
        """What is in the file, in up to twelve lines."""
        lines = [f"{self.source}: {self.total:,} rows, {self.total - len(self.problems):,} usable, pictures in {self.folder}"]
        lines += ["row {}, {}: {}".format(*problem) for problem in self.problems[:10]]
        return "\n".join(lines + [f"and {len(self.problems) - 10:,} more"] * (len(self.problems) > 10))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def subset(self, indices: Iterable[int]) -> "LlavaRows":
        """These rows alone, in this order; the report is still the file's."""
        return replace(self, rows=[self.rows[i] for i in indices])

    def split(self, fraction: float, seed: int) -> tuple["LlavaRows", "LlavaRows"]:
        """(train, held-out), both in the order of the file: about `fraction` of the rows are held out, at least one.

        Rows that share a picture, or each share one with a third, stay together. numpy's RandomState: its stream is frozen,
        so the split is the same on every machine. Raises ValueError if it cannot be done.
        """
        groups = picture_groups(self.rows)
        if not 0 < fraction < 1 or len(groups) < 2:
            raise ValueError(
                f"cannot hold out {fraction} of {len(self)} rows: give a part between 0 and 1 of two pictures or more"
            )
        wanted, held = max(fraction * len(self), 1), []
        for k in np.random.RandomState(seed).permutation(len(groups)):
            more = len(held) + len(groups[k])
            if abs(more - wanted) < abs(len(held) - wanted) and more < len(self):
                held += groups[k]
        held = set(held or min(groups, key=len))  # a share smaller than any group
        return self.subset(i for i in range(len(self)) if i not in held), self.subset(sorted(held))


def picture_groups(rows: Sequence[Row]) -> list[list[int]]:
    """Indices of rows that share pictures, directly or by way of others: a union-find over paths."""
    parent: dict = {}

    def find(x):
        while (up := parent.setdefault(x, x)) != x:
            parent[x] = x = parent[up]  # halves the way for the next one
        return x

    for i, row in enumerate(rows):
        for path in row.images:
            parent[find(path)] = find(i)
    groups: dict = {}
    for i in range(len(rows)):
        groups.setdefault(find(i), []).append(i)
    return list(groups.values())


# ---- pixels ----------------------------------------------------------------------------------------------------------


class PictureCache:
    """Pictures as the processor makes them, decoded when first asked for and kept as bytes while there is room.

    The settings are those of MllamaImageProcessor; most_bytes: of memory for the pixels. `unreadable`: path -> reason, for
    every picture asked for that turned out damaged, or has gone since it was checked.
    """

    def __init__(
        self, image_size: int | tuple[int, int], image_mean: Sequence[float] = IMAGENET_STANDARD_MEAN,
        image_std: Sequence[float] = IMAGENET_STANDARD_STD, resample: str = "bicubic", do_pad_square: bool = False,
        most_bytes: int = 2**31,
    ):  # fmt: skip
        if resample not in RESAMPLE:
            raise ValueError(f"resample is {resample!r}: it must be {', '.join(RESAMPLE)}")
        self.image_size, self.image_mean, self.image_std = pair(image_size), tuple(image_mean), tuple(image_std)
        self.resample, self.do_pad_square, self.room = resample, do_pad_square, most_bytes
        self.settings = self.image_size, self.image_mean, self.image_std, resample, do_pad_square
        self.unreadable: dict[Path, str] = {}
        self._kept: dict[Path, torch.Tensor] = {}  # uint8 [3, S, S]
        self._lock = Lock()

    def __getitem__(self, path: str | Path) -> torch.Tensor | None:
        """float32 [3, S, S], normalised, equal to process_images of the path; None if it cannot be decoded."""
        pixels = self._pixels(Path(path))
        return None if pixels is None else normalize(rescale(pixels), self.image_mean, self.image_std)

    def load(self, paths: Iterable[str | Path], workers: int, progress: bool = False) -> None:
        """Decodes with so many threads (Pillow lets go of the interpreter lock) until all are kept or the room is used up."""
        height, width = self.image_size
        paths = [path for path in dict.fromkeys(map(Path, paths)) if path not in self._kept]

        def fill(path):
            if self.room >= 3 * height * width:
                self._pixels(path)

        with picture_threads(workers) as pool:
            for _ in tqdm(pool.map(fill, paths), "decoding", len(paths), unit=" pictures", disable=not progress):
                pass

    def _pixels(self, path: Path) -> torch.Tensor | None:
        if path in self._kept or path in self.unreadable:
            return self._kept.get(path)
        try:
            pixels = fit(path, self.image_size, self.resample, self.image_mean, self.do_pad_square)
        except (ValueError, OSError) as error:
            self.unreadable[path] = one_line(error)
            return None
        pixels = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        with self._lock:
            if path not in self._kept and pixels.nbytes <= self.room:
                self._kept[path] = pixels
                self.room -= pixels.nbytes
        return pixels


# ---- data sets as they come --------------------------------------------------------------------------------------------


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which takes its name when all is written. Raises FileExistsError if it holds something already."""
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already: name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        whole = Path(temporary) / "whole"
        whole.mkdir()
        yield whole
        os.replace(whole, folder)


@contextmanager
def data_source(source: Path, wanted: str) -> Iterator[tuple[str, list[str], Callable[[str], bytes]]]:
    """A folder or archive as (prefix, names, read), where prefix + wanted is a file in it, however deep. What is read is
    returned, never unpacked: nothing in an archive chooses where it is written. Raises ValueError, FileNotFoundError."""
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: name the data set's archive or folder")
    with open_source(source) as (sizes, read):
        found = [name.removesuffix(wanted) for name in sizes if f"/{name}".endswith(f"/{wanted}")]
        if not found:
            raise ValueError(f"{source} has no {wanted}: is it this data set?")

        def content(name: str) -> bytes:
            if name not in sizes:
                raise ValueError(f"{source} lacks {name}: it is damaged or not whole, get it again")
            try:
                return read(name)
            except DAMAGED as error:
                raise ValueError(f"{source}: {name} cannot be read ({one_line(error)}), get it again") from None

        yield min(found, key=len), list(sizes), content


def rows_of(name: str, data: bytes, good: Callable[[object], bool], wanted: str) -> list:
    """The rows of a data set's own JSON. Raises ValueError for the first that is not as wanted."""
    try:
        rows = parsed(data)
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON ({one_line(error)}): it is damaged or cut off, get it again") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{name} is {kind_of(rows)}: a list of rows was expected")
    for number, row in enumerate(rows, start=1):
        if not good(row):
            raise ValueError(f"{name}, row {number} is not {wanted}")
    return rows


def llava_row(name: str, image: str, turns: Sequence[tuple[str, str, str]]) -> dict:
    """A row from (question, answer, kind) about one picture."""
    said = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn[:2], strict=True)]
    said[0]["value"] = f"{IMAGE_TOKEN}\n{said[0]['value']}"
    return {"id": name, "image": image, "conversations": said, "kinds": [kind for *_, kind in turns]}


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    """One row a line, to find and to look at."""
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")


def easy_vqa_kind(question: str) -> str:
    """colour and shape ask for a word; exists ("is there a ...?") and absent ("is there not a ...?") for yes or no."""
    if question.startswith("what"):
        return "colour" if re.search(r"\bcolou?r\b", question) else "shape"
    return "absent" if re.search(r"\b(no|not)\b", question) else "exists"


def convert_easy_vqa(source: Path, folder: Path) -> str:
    """easy-VQA (Zhou 2019, MIT), 5,000 drawings of one shape each: one row per picture, all its questions as turns."""

    def good(row) -> bool:
        return isinstance(row, list) and list(map(type, row)) == [str, str, int] and all(row[:2])

    counts = []
    with data_source(source, "train/questions.json") as (prefix, names, read), new_folder(folder) as whole:
        for part in ("train", "test"):
            name = f"{prefix}{part}/questions.json"
            turns: dict[int, list] = {}
            for question, answer, number in rows_of(name, read(name), good, "[question, answer, number of the picture]"):
                turns.setdefault(number, []).append((question, answer, easy_vqa_kind(question)))
            (whole / "images" / part).mkdir(parents=True)
            rows = []
            for number in sorted(turns):
                image = f"{part}/{number}.png"
                (whole / "images" / image).write_bytes(read(f"{prefix}{part}/images/{number}.png"))
                rows.append(llava_row(f"{part}-{number}", image, turns[number]))
            write_rows(whole / f"{part}.json", rows)
            counts.append(f"{len(rows):,} {part} pictures with {sum(map(len, turns.values())):,} questions")
        for licence in [name for name in names if Path(name).name == "LICENSE"][:1]:  # which asks to be passed on
            (whole / "LICENSE").write_bytes(read(licence))
    return f"{folder}: {', '.join(counts)}"


def convert_coco_captions(
    source: Path, folder: Path, test_photos: int = 16, seed: int = 0, row_per: str = "caption"
) -> str:
    """COCO 2017 photos (Lin et al. 2014), those whose licences let them be passed on, split by photo: one row per caption; with
    row_per "photo" a training row has all captions of its photo, as turns for train_vlm.py --isolated, which then reads the
    photo once for all of them.

    FOLDER/credits.json has the licence and the origin of each photo.
    """
    texts = {"file_name", "license", "flickr_url"}

    def good(row) -> bool:
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) and row[key] for key in texts):
            return False
        captions, name = row.get("captions"), row["file_name"]
        # A bare name, on any system: it decides where the photo is written.
        return bool(re.fullmatch(r"\w[\w.-]*", name)) and isinstance(captions, list) and bool(captions) and all(
            isinstance(caption, str) and caption.strip() for caption in captions
        )  # fmt: skip

    with data_source(source, "annotations.json") as (prefix, _, read), new_folder(folder) as whole:
        name = f"{prefix}annotations.json"
        wanted = 'a photo with "file_name", "license", "flickr_url" and "captions"'
        photos = sorted(rows_of(name, read(name), good, wanted), key=lambda photo: photo["file_name"])
        if not test_photos < len({photo["file_name"] for photo in photos}) == len(photos):
            raise ValueError(f"{test_photos} test photos cannot be held out of {len(photos)} different ones: ask for fewer")
        test = set(np.random.RandomState(seed).permutation(len(photos))[:test_photos].tolist())
        (whole / "images").mkdir()
        rows, said = {"train": [], "test": []}, collections.Counter()
        for k, photo in enumerate(photos):
            file = photo["file_name"]
            (whole / "images" / file).write_bytes(read(f"{prefix}images/{file}"))
            turns = [("Describe the picture.", " ".join(caption.split()), "caption") for caption in photo["captions"]]
            part = "test" if k in test else "train"
            said[part] += len(turns)
            if row_per == "photo" and part == "train":
                rows[part].append(llava_row(Path(file).stem, file, turns))
            else:
                rows[part] += [llava_row(f"{Path(file).stem}-{i}", file, [turn]) for i, turn in enumerate(turns)]
        for part, found in rows.items():
            write_rows(whole / f"{part}.json", found)
        credit = {photo["file_name"]: {"license": photo["license"], "source": photo["flickr_url"]} for photo in photos}
        write_json(whole / "credits.json", credit)
    counts = f"{len(photos) - test_photos} train photos with {said['train']} captions"
    return f"{folder}: {counts}, {test_photos} test photos with {said['test']}"


def convert_classes(source: Path, folder: Path, per_class: int | None, question: str, caption: str) -> str:
    """A folder or archive of class/*.jpg (see image_folder), a row per picture: the first per_class of each class and part.

    caption: what is answered, {} being the class. Where no part is held out, a tenth of each class is.
    """
    if "{}" not in caption:
        raise ValueError(f"--caption {caption!r} has no {{}} where the class comes in")
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: name an archive or folder of classes")
    rows, counts = {"train": [], "test": []}, collections.Counter()
    with open_source(source) as (sizes, read), new_folder(folder) as whole:
        (whole / "images").mkdir()
        for name, part, label in arrange(sizes, split_seed=0).files:
            counts[part, label] += 1
            if per_class and counts[part, label] > per_class:
                continue
            image = f"{part}-{len(rows[part])}{re.sub(r'[^.a-z0-9]', '', Path(name).suffix.lower())}"
            try:
                (whole / "images" / image).write_bytes(read(name))
            except DAMAGED as error:
                raise ValueError(f"{source}: {name} cannot be read ({one_line(error)}), get it again") from None
            answer = caption.replace("{}", label.replace("_", " "))
            rows[part].append(llava_row(f"{part}-{len(rows[part])}", image, [(question, answer, "class")]))
        if not all(rows.values()):
            found = f"{len(rows['train'])} training and {len(rows['test'])} test pictures"
            raise ValueError(f"{source} has {found} in class folders: lay them out as class/picture.jpg")
        for part, found in rows.items():
            write_rows(whole / f"{part}.json", found)
    classes = len({label for _, label in counts})
    return f"{folder}: {len(rows['train']):,} train and {len(rows['test']):,} test pictures of {classes} classes"


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="validate a file; exit code 1 if rows had to be dropped", allow_abbrev=False)
    check.add_argument("file", metavar="FILE.json", type=Path)
    check.add_argument("--images", metavar="DIR", type=Path, help="default: the file's own folder, or its images/")
    easy = commands.add_parser("easy-vqa", help="convert easy-VQA", allow_abbrev=False)
    coco = commands.add_parser("coco-captions", help="convert captioned COCO photos", allow_abbrev=False)
    classes = commands.add_parser("classes", help="convert pictures in class folders", allow_abbrev=False)
    for command in (easy, coco, classes):
        command.add_argument("source", metavar="SOURCE", type=Path, help="an archive or a folder")
        command.add_argument("folder", metavar="FOLDER", type=Path, help="to be made")
    coco.add_argument("--test-photos", type=positive_int, default=16, help="photos held out (default 16)")
    coco.add_argument("--seed", type=not_negative_int, default=0, help="which (default 0)")
    rows = "of training rows; photo: all its captions as turns, for train_vlm.py --isolated (default: caption)"
    coco.add_argument("--row-per", choices=("caption", "photo"), default="caption", help=rows)
    classes.add_argument("--per-class", type=positive_int, help="most pictures of a class, in each part; default: all")
    classes.add_argument("--question", default="Describe the picture.")
    classes.add_argument("--caption", default="A photo of a {}.", help="the answer, {} being the class")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.command == "check":
        rows = LlavaRows.read(args.file, args.images, progress=sys.stderr.isatty())
        print(rows.report())
        sys.exit(1 if rows.problems else 0)
    elif args.command == "easy-vqa":
        print(convert_easy_vqa(args.source, args.folder))
    elif args.command == "classes":
        print(convert_classes(args.source, args.folder, args.per_class, args.question, args.caption))
    else:
        print(convert_coco_captions(args.source, args.folder, args.test_photos, args.seed, args.row_per))


if __name__ == "__main__":
    run_cli(main)
