"""LLaVA-style JSON, the interchange format of visual conversations: checked before training, read without surprises after.

    rows = LlavaRows.read("train.json", "images")            # every row is checked now, not at hour three
    print(rows.report())                                     # rows, usable rows, the first ten problems
    train, held_out = rows.split(0.1, seed=0)                # no image is on both sides

The file is a list of {"id", "image": name, [names] or absent, "conversations": [{"from": "human" | "gpt" | "system", "value":
text}, ...]} (Liu et al. 2023, Visual Instruction Tuning), or .jsonl with one such object a line. Each <image> in the texts
is one of the row's images, in order. Beside that we know "kinds", one word a question, by which evaluation sorts its scores.
Rows are counted from 1; those of a .jsonl are its lines. check.py is the command that reports on a file, convert.py makes some.
"""

import json
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.images import FORMATS, decoding_threads
from lib.files import one_line
from processing_mllama import IMAGE_TOKEN, MAX_ASPECT, ROLES

# ---- one row ---------------------------------------------------------------------------------------------------------


class RowError(ValueError):
    """(field, what): what makes a row unusable."""


@dataclass(frozen=True)
class LlavaRow:
    """A conversation that passed all checks. Each image has its <image> in the messages: where the file names none for its
    one image, the first question begins with it, as the processor would have it, so that rows of both sorts share a batch.
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
        raise RowError(field, f"is {kind_of(value)}: a text was expected")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(field, "holds half of a surrogate pair, which is no text") from None
    return value


def checked_messages(turns) -> list[dict[str, str]]:
    """Perhaps a system turn, then alternating human and gpt, to the last answer. Raises RowError."""
    if not isinstance(turns, list) or not turns:
        raise RowError("conversations", f"is {'empty' if turns == [] else kind_of(turns)}: a list of turns was expected")
    messages, expected = [], ("system", "user")
    for k, turn in enumerate(turns):
        field = f"conversations[{k}]"
        if not isinstance(turn, dict):
            raise RowError(field, f'is {kind_of(turn)}: {{"from": ..., "value": ...}} was expected')
        who = checked_text(f"{field}.from", turn.get("from"))
        text = checked_text(f"{field}.value", turn.get("value"))
        role = ROLES.get(who)
        if role is None:
            raise RowError(f"{field}.from", f"is {who[:40]!r}: human, gpt or system was expected")
        if role not in expected:
            raise RowError(f"{field}.from", f"is {who!r}, out of turn: first system or not, then alternating human and gpt")
        if role == "assistant" and not text.strip():
            raise RowError(f"{field}.value", "is an empty answer")
        if role == "assistant" and IMAGE_TOKEN in text:
            raise RowError(f"{field}.value", f"has {IMAGE_TOKEN} in an answer: images belong to questions")
        messages.append({"role": role, "content": text})
        expected = ("assistant",) if role == "user" else ("user",)
    if role != "assistant":
        raise RowError(field, "has no answer: the last turn must be gpt's")
    return messages


def checked_path(field: str, name, folder: Path) -> Path:
    """Where the image lies. Links inside the folder may lead out of it: they are its owner's. Raises RowError."""
    name = checked_text(field, name)
    if not name or "\0" in name:
        raise RowError(field, f"is {name[:40]!r}: the name of an image was expected")
    if os.path.isabs(name) or PureWindowsPath(name).is_absolute():
        raise RowError(field, f"is {name[:80]!r}, an absolute path: name it from the images folder on")
    inside = os.path.normpath(name)
    if inside.split(os.sep)[0] == os.pardir or os.path.isabs(inside):
        raise RowError(field, f"is {name[:80]!r}, which leaves the images folder")
    return folder / inside


def checked_row(number: int, raw, folder: Path) -> LlavaRow:
    """A row of the file, its images not yet opened. Raises RowError."""
    if not isinstance(raw, dict):
        raise RowError("row", f"is {kind_of(raw)}: an object was expected")
    name = number if raw.get("id") is None else raw["id"]
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise RowError("id", f"is {kind_of(name)}: a text or a number was expected")
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
        raise RowError("image", f"there are {len(images)} images, but the conversation says {IMAGE_TOKEN} {places} times")
    kinds = raw.get("kinds")
    if kinds is not None:
        if not isinstance(kinds, list):
            raise RowError("kinds", f"is {kind_of(kinds)}: a list of texts was expected")
        kinds = tuple(checked_text(f"kinds[{k}]", kind) for k, kind in enumerate(kinds))
        asked = sum(message["role"] == "user" for message in messages)
        if len(kinds) != asked:
            raise RowError("kinds", f"there are {len(kinds)} kinds for {asked} questions")
    return LlavaRow(number, str(name), images, messages, kinds)


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
    """The folder of the JSON file or its "images", whichever holds more of the first hundred images that are named."""
    named = [row["image"] for row in rows if isinstance(row, dict) and isinstance(row.get("image"), (str, list))]
    named = [one for name in named[:100] for one in ([name] if isinstance(name, str) else name[:1]) if isinstance(one, str)]
    return max((folder, folder / "images"), key=lambda where: sum(os.path.isfile(os.path.join(where, one)) for one in named))


def header_problem(path: Path) -> str | None:
    """Why an image can be of no use, by its header alone: damage further on shows when ImageCache decodes it."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            return "is not a file"
        if not about.st_size:
            return "is empty (0 bytes)"
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
    except Image.UnidentifiedImageError:
        return "is not an image in a format that is read here"
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


@dataclass(frozen=True)
class LlavaRows(Sequence):
    """The usable rows of a file, and why the others are not: the first problem of each."""

    source: Path
    folder: Path  # of the images
    rows: list[LlavaRow]
    total: int  # rows in the file
    problems: list[tuple[int, str, str]]  # (row number, field, what)

    @classmethod
    def read(cls, json_path: str | Path, images_dir: str | Path | None = None, progress: bool = False) -> "LlavaRows":
        """Checks every row and opens every image's header. images_dir: see find_images for what it is by default.

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
            raise FileNotFoundError(f"{folder} is no folder: name the one that the images in {source.name} lie in")
        total, rows = len(raw) + len(problems), []
        for number, row in raw:
            try:
                rows.append(checked_row(number, row, folder))
            except RowError as wrong:
                problems.append((number, *wrong.args))
        paths = list(dict.fromkeys(path for row in rows for path in row.images))
        with decoding_threads(16) as pool:
            found = pool.map(header_problem, paths)
            found = list(tqdm(found, "checking", len(paths), unit=" images", disable=not progress))
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
        lines = [f"{self.source}: {self.total:,} rows, {self.total - len(self.problems):,} usable, images in {self.folder}"]
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

        Rows that share an image, or each share one with a third, stay together. numpy's RandomState: its stream is frozen,
        so the split is the same on every machine. Raises ValueError if it cannot be done.
        """
        groups = image_groups(self.rows)
        if not 0 < fraction < 1 or len(groups) < 2:
            raise ValueError(
                f"cannot hold out {fraction} of {len(self)} rows: give a part between 0 and 1 of two images or more"
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
