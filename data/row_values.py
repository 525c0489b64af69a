"""The values of a row, whatever wrote them: texts, numbers, lists in a cell of a table, and what is as good as nothing."""

import ast
import json
import math
import re
from collections.abc import Mapping


class RowError(ValueError):
    """(field, what): what makes a row unusable."""

    def __str__(self) -> str:
        return ": ".join(self.args)


class DamagedRow(RowError):
    """(field, what) of one whose bytes cannot be read, whatever it says."""


class Fields:
    """The values of a row that hold something, by their keys in lower case, and which of them were read."""

    def __init__(self, raw: Mapping):
        self.values = {printable(key).strip().lower(): value for key, value in raw.items() if not is_absent(value)}
        self.read: set[str] = set()

    def take(self, *keys: str):
        """(key, value) of the first of these keys that there is, or (the first key, None)."""
        found = next((key for key in keys if key in self.values), None)
        self.read.update([found] if found else [])
        return found or keys[0], self.values.get(found)

    def numbered(self, key: str) -> list[tuple[str, object]]:
        """key_1, key_2 and so on, in order."""
        found = [(int(match[1]), name) for name in self.values if (match := re.fullmatch(rf"{key}_?(\d+)", name))]
        self.read.update(name for _, name in found)
        return [(name, self.values[name]) for _, name in sorted(found)]

    @property
    def unread(self) -> dict[str, object]:
        return {key: value for key, value in self.values.items() if key not in self.read}


def printable(key) -> str:
    """A key as it can be named in a message."""
    return str(key).encode("utf-8", "replace").decode()


def is_absent(value) -> bool:
    """None, NaN (as pandas writes it) and what is empty."""
    return value is None or (isinstance(value, (str, bytes, list, dict)) and not value) or value != value


def kind_of(value) -> str:
    """What a JSON value is, in words. Its content stays out of it: that may be long, or nested without end."""
    names = {bool: "true or false", str: "a text", list: "a list", dict: "an object", bytes: "bytes"}
    if value is None or isinstance(value, (int, float)) and not isinstance(value, bool):
        return "missing" if value is None or value != value else "a number"
    return names.get(type(value), f"a {type(value).__name__}")


def text_of(field: str, value) -> str:
    """A text, or a number as it is written. Raises RowError."""
    if isinstance(value, float) and math.isfinite(value):  # pandas makes 3 a 3.0
        return str(int(value) if value.is_integer() and abs(value) < 2**53 else value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError(field, f"is {kind_of(value)}: a text was expected")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(field, "holds half of a surrogate pair, which is no text") from None
    return value


def listed(value):
    """A list that a CSV cell or a column holds as text (JSON, or as Python prints it), as the list; {"user": [...],
    "assistant": [...]} (a list of objects as datasets stores it) as [{"user", "assistant"}, ...]; all else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(value)
                break
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) == 1:
            return [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)]
    return value
