"""Conversations about images, checked before training, read without surprises after.

    rows = LlavaRows.read("train.json", "images")            # every row is checked now, not at hour three
    print(rows.report())                                     # rows, usable rows, the first ten problems
    train, held_out = rows.split(0.1, seed=0)                # no image is on both sides

The format that all others are read as is LLaVA's JSON: a list of {"id", "image": name, [names] or absent, "conversations":
[{"from": "human" | "gpt" | "system", "value": text}, ...]} (Liu et al. 2023, Visual Instruction Tuning). Each <image> in the
texts is one of the row's images, in order. Beside that we know "kinds", one word a question, by which evaluation sorts its
scores; "accepted", for each question a list of other right answers; "isolated": true, where questions are asked apart from each
other. What else is read: data/spellings.py (rows), data/row_files.py (files). Rows are counted from 1; those of a .jsonl or
.csv are its lines. check.py is the command that reports on a file, convert.py makes some.
"""

import io
import os
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.images import FORMATS, decode_image, decoding_threads
from data.row_files import RowFile, is_streamed, keep_image, read_file
from data.row_values import RowError
from data.spellings import Row, read_row
from data.tiles import MAX_ASPECT
from lib.files import one_line
from processing_mllama import IMAGE_TOKEN

# ---- one row ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LlavaRow:
    """A conversation that passed all checks. Each image has its <image> in the messages: where the file names none, the first
    question begins with them, as the processor would have it, so that rows of both sorts share a batch.
    """

    number: int  # in the file, from 1
    id: str
    images: tuple[Path, ...]
    messages: list[dict[str, str]]  # {"role": "system", "user" or "assistant", "content": text}
    kinds: tuple[str, ...] | None  # one per question
    accepted: tuple[tuple[str, ...], ...] | None = None  # for each question, what else is right
    isolated: bool = False  # its questions are asked apart from each other: captions of one image

    @classmethod
    def of(cls, number: int, row: Row, images: Iterable) -> "LlavaRow":
        name = str(number) if row.id is None else row.id
        return cls(number, name, tuple(images), row.messages, row.kinds, row.accepted, row.isolated)

    @property
    def conversations(self) -> list[list[dict[str, str]]]:
        """What is learned from it: the conversation, or one for each of its isolated questions."""
        return isolated_turns(self.messages) if self.isolated else [self.messages]


def checked_path(field: str, name: str, folder: Path) -> Path:
    """Where the image lies. Links inside the folder may lead out of it: they are its owner's. Raises RowError."""
    if not name or "\0" in name:
        raise RowError(field, f"is {name[:40]!r}: the name of an image was expected")
    if "\\" in name and not os.path.lexists(folder / name):  # written on Windows
        if PureWindowsPath(name).drive:
            raise RowError(field, f"is {name[:80]!r}, an absolute path: name it from the images folder on")
        name = name.replace("\\", "/")
    if os.path.isabs(name) or PureWindowsPath(name).is_absolute():
        inside = os.path.relpath(os.path.normpath(name), os.path.abspath(folder))
        if inside.split(os.sep)[0] == os.pardir:
            raise RowError(field, f"is {name[:80]!r}, an absolute path outside {folder}: pass --images with a folder above it")
        return folder / inside
    inside = os.path.normpath(name)
    if inside.split(os.sep)[0] == os.pardir or os.path.isabs(inside):
        raise RowError(field, f"is {name[:80]!r}, which leaves the images folder")
    return folder / inside


def count_images(messages: Iterable[dict[str, str]]) -> int:
    """How many images the messages speak of."""
    return sum(message["content"].count(IMAGE_TOKEN) for message in messages)


def isolated_turns(messages: Sequence[dict[str, str]]) -> list[list[dict[str, str]]]:
    """A conversation as one conversation for each question: with the system's words and all that the first question has up to
    its last image, but without the other questions and answers. A question with images of its own stays a whole
    conversation, since what comes after may be about them."""
    head = [message for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    if any(IMAGE_TOKEN in message["content"] for message in turns[1:]):
        return [list(messages)]
    before, named, _ = turns[0]["content"].rpartition(IMAGE_TOKEN)
    opening = before + named
    rest = turns[0]["content"][len(opening) :]
    opening += "\n" if rest.startswith("\n") else ""
    asked = [rest.removeprefix("\n"), *(turn["content"] for turn in turns[2::2])]
    answers = turns[1::2]
    return [
        [*head, {"role": "user", "content": opening + question}, answer]
        for question, answer in zip(asked, answers, strict=True)
    ]


def questions_of_row(row: LlavaRow, isolated: bool = False) -> list[tuple[list[dict[str, str]], str, str]]:
    """For each answer: (the messages up to and including its question, the answer, the question's kind or "answer").

    Earlier questions and their true answers are among the messages, unless isolated (see isolated_turns). The images that go
    with the messages are row.images[: count_images(messages)].
    """
    turns = isolated_turns(row.messages) if isolated else row.conversations
    asked = [
        (turn[:k], turn[k]["content"]) for turn in turns for k, message in enumerate(turn) if message["role"] == "assistant"
    ]
    kinds = row.kinds or ("answer",) * len(asked)
    return [(*pair, kind) for pair, kind in zip(asked, kinds, strict=True)]


# ---- all rows --------------------------------------------------------------------------------------------------------


def find_images(folder: Path, rows: Iterable[Row]) -> Path:
    """The folder of the rows' file or its "images", whichever holds more of the first hundred images that are named."""
    named = [name for row in rows for name in row.images if isinstance(name, str)][:100]
    names = [name.replace("\\", "/") for name in named]
    return max((folder, folder / "images"), key=lambda where: sum(os.path.isfile(os.path.join(where, one)) for one in names))


def header_problem(image: Path | bytes) -> str | None:
    """Why an image can be of no use, by its header alone: damage further on shows when ImageCache decodes it."""
    try:
        if isinstance(image, Path):
            about = image.stat()
            if not stat.S_ISREG(about.st_mode):
                return "is not a file"
            size = about.st_size
        else:
            size, image = len(image), io.BytesIO(image)
        if not size:
            return "is empty (0 bytes)"
        with Image.open(image, formats=FORMATS) as opened:
            width, height = opened.size
    except Image.UnidentifiedImageError:
        return "is not an image in a format that is read here"
    except FileNotFoundError:
        return "does not exist"
    except Exception as error:  # decoders meet damaged bytes with almost any type of exception
        return f"cannot be opened ({one_line(error)})"
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        return f"has {width}x{height} pixels, more than {Image.MAX_IMAGE_PIXELS:,}"
    return size_problem(width, height)


def decoding_problem(image: Path) -> str | None:
    """Why an image file cannot be decoded to its end."""
    try:
        decode_image(image, at_least=32)
    except (ValueError, OSError) as error:
        return one_line(error)
    return None


def size_problem(width: int, height: int) -> str | None:
    if min(width, height) < 1:
        return f"of {width}x{height} pixels is empty"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"of {width}x{height} pixels is too thin a strip (over {MAX_ASPECT} to 1)"
    return None


def spelled_rows(file: RowFile, notes: Counter) -> list[tuple[int, Row]]:
    """(number, row) of those that can be read; file.problems gains those of the others. Images that are no files of their own
    become some, in the cache folder. notes: see read_row."""
    found = []
    for number, raw in file.rows:
        try:
            if isinstance(raw, RowError):
                raise raw
            row = raw if isinstance(raw, Row) else read_row(raw, notes)
            found.append((number, row._replace(images=[kept(image, k, row) for k, image in enumerate(row.images)])))
        except RowError as wrong:
            file.problems.append((number, *wrong.args))
    return found


def field_of(k: int, images: Sequence) -> str:
    return "image" if len(images) == 1 else f"image[{k}]"


def kept(image: str | bytes, k: int, row: Row) -> str | Path:
    """The file of an image that is bytes; a name as it is. Raises RowError."""
    if isinstance(image, bytes) and (problem := header_problem(image)):
        raise RowError(field_of(k, row.images), problem)
    return keep_image(image) if isinstance(image, bytes) else image


def with_whole_images(rows: Sequence[LlavaRow], folder: Path, progress: bool, problem_of=None):
    """(the rows whose images are whole, the problems of the others); by their headers alone, unless problem_of is another."""
    paths = list(dict.fromkeys(path for row in rows for path in row.images))
    with decoding_threads(16) as pool:
        found = pool.map(problem_of or header_problem, paths)
        found = list(tqdm(found, "checking", len(paths), unit=" images", disable=not progress))
    bad, usable, problems = {path: what for path, what in zip(paths, found, strict=True) if what}, [], []
    for row in rows:
        k = next((k for k, path in enumerate(row.images) if path in bad), None)
        if k is None:
            usable.append(row)
        else:
            name = os.path.relpath(row.images[k], folder)
            problems.append((row.number, field_of(k, row.images), f"{name[:80]!r} {bad[row.images[k]]}"))
    return usable, problems


def problem_lines(form: str, problems: Sequence[tuple], most: int = 10) -> list[str]:
    """The first of them, a line each, and how many more there are."""
    lines = [form.format(*problem) for problem in problems[:most]]
    return lines + [f"and {len(problems) - most:,} more"] * (len(problems) > most)


def noted(notes: Counter) -> tuple[str, ...]:
    """A line for each sort of note, the most frequent first."""
    return tuple(f"{count:,} rows: {what}" for what, count in notes.most_common())


@dataclass(frozen=True)
class LlavaRows(Sequence):
    """The usable rows of a file, and why the others are not: the first problem of each."""

    source: Path
    folder: Path  # of the images
    rows: list[LlavaRow]
    total: int  # rows in the file
    problems: list[tuple[int, str, str]]  # (row number, field, what)
    with_images: int = 0  # of the usable rows
    notes: tuple[str, ...] = ()  # what was read otherwise than it is written, and which keys are not used

    @classmethod
    def read(cls, source: str | Path, images_dir: str | Path | None = None, progress: bool = False) -> "LlavaRows":
        """Checks every row and opens every image's header. source: see data/row_files.py. images_dir: see find_images for what
        it is by default. Images that are no files of their own are written to the cache folder (keep_image).

        Raises FileNotFoundError for a file or folder that is not there, ValueError for one that has no usable row. Everything
        else is in `problems`.
        """
        from data.rows import open_streamed

        notes, name = Counter(), Path(source).name
        file = open_streamed(source, images_dir).whole(notes, progress) if is_streamed(source) else read_file(Path(source))
        spelled, found = spelled_rows(file, notes), []
        folder = find_images(file.folder, (row for _, row in spelled)) if images_dir is None else Path(images_dir)
        if not folder.is_dir():
            raise FileNotFoundError(f"--images {folder} is no folder: name the one that the images in {name} lie in")
        total, problems = len(spelled) + len(file.problems), file.problems
        for number, row in spelled:
            try:
                places = [image if isinstance(image, Path) else checked_path(field_of(k, row.images), image, folder)
                          for k, image in enumerate(row.images)]  # fmt: skip
                found.append(LlavaRow.of(number, row, places))
            except RowError as wrong:
                problems.append((number, *wrong.args))
        usable, unusable = with_whole_images(found, folder, progress)
        problems = sorted(problems + unusable, key=lambda problem: problem[0])
        if not usable:
            first = "; the first, row {}, {}: {}".format(*problems[0]) if problems else ""
            where = f" (images are looked for in {folder}: --images)" if "does not exist" in first else ""
            raise ValueError(f"{source} has {total} rows and none is usable{first}{where}")
        with_images = sum(bool(row.images) for row in usable)
        return cls(Path(source), folder, usable, total, problems, with_images, (*file.notes, *noted(notes)))

    def report(self) -> str:
        """What is in the file, in up to twelve lines, and one for each sort of thing that was read otherwise than written."""
        usable = f"{self.total - len(self.problems):,} usable, {self.with_images:,} of them with images"
        lines = [f"{self.source}: {self.total:,} rows, {usable}, in {self.folder}"]
        return "\n".join(lines + problem_lines("row {}, {}: {}", self.problems) + list(self.notes))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def subset(self, indices: Iterable[int]) -> "LlavaRows":
        """These rows alone, in this order; the report is still the file's."""
        return replace(self, rows=[self.rows[i] for i in indices])

    def split(self, fraction: float, seed: int) -> tuple["LlavaRows", "LlavaRows"]:
        """(train, held-out), both in the order of the file: about `fraction` of the rows are held out, at least one.

        Rows that share an image, or each share one with a third, stay together. numpy's RandomState: its stream is frozen,
        so the split is the same on every machine. Raises ValueError if it cannot be done.
        """
        groups = image_groups(self.rows)
        if not 0 < fraction < 1 or len(groups) < 2:
            raise ValueError(
                f"cannot hold out {fraction} of {len(self)} rows: give --test-part between 0 and 1, and two images or more"
            )
        wanted, held = max(fraction * len(self), 1), []
        for k in np.random.RandomState(seed).permutation(len(groups)):
            more = len(held) + len(groups[k])
            if abs(more - wanted) < abs(len(held) - wanted) and more < len(self):
                held += groups[k]
        held = set(held or min(groups, key=len))  # a share smaller than any group
        return self.subset(i for i in range(len(self)) if i not in held), self.subset(sorted(held))


def image_groups(rows: Sequence[LlavaRow]) -> list[list[int]]:
    """Indices of rows that share images, directly or by way of others: a union-find over paths."""
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
