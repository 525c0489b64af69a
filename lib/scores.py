"""How good answers are: exact match with its interval, the letter of a multiple choice. (Captions: lib/caption_scores.py.)

    score(items, said)                       # exact match by kind of question, with 95 % intervals
    is_right(item, "B. a dog")               # one of them

Formula: Wilson 1927 (interval).
"""

import math
import re
from collections.abc import Sequence

from data.scenes import normalize_answer

# ---- exact match -------------------------------------------------------------------------------------------------------


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval that holds the true share, after `right` of n, in 95 % of cases (z = 1.96): Wilson's score interval, which
    unlike share +- z * standard error stays within 0..1 and is sound for few or lopsided samples. (0, 1) for n = 0."""
    if not 0 <= right <= n:
        raise ValueError(f"{right} right of {n}: it must be 0 to {n}")
    if n == 0:
        return 0.0, 1.0
    share, scale = right / n, 1 + z**2 / n
    middle = (share + z**2 / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return middle - half if right else 0.0, middle + half if right < n else 1.0  # and not a rounding error beside them


def score(items: Sequence, said: Sequence[str]) -> dict:
    """{"n", "right", "exact_match", "low", "high"} of all answers, and "by_kind": the same for each kind of question, in the
    order in which they first come; see is_right. items: those of lib/answers.py."""
    marks: dict[str, list[bool]] = {}
    for item, text in zip(items, said, strict=True):
        marks.setdefault(item.kind, []).append(is_right(item, text))

    def figures(right: int, n: int) -> dict:
        low, high = wilson(right, n)
        return {"n": n, "right": right, "exact_match": right / max(1, n), "low": low, "high": high}

    overall = figures(sum(map(sum, marks.values())), sum(map(len, marks.values())))
    return overall | {"by_kind": {kind: figures(sum(row), len(row)) for kind, row in marks.items()}}


def is_right(item, said: str) -> bool:
    """Whether it is the true answer, or one that is accepted, but for case and spaces (scenes.normalize_answer). Of a question
    that lists options, as MMStar, AI2D and data/spellings.py write them, whether it names the true one, in whichever way."""
    options = options_in(item.messages[-1]["content"]) if item.messages else {}
    if options and (true := option_named(item.answer, options)):
        return option_named(said, options) == true
    return normalize_answer(said) in {normalize_answer(text) for text in (item.answer, *item.accepted)}


def options_in(question: str) -> dict[str, str]:
    """Letter -> text of the options that a question lists from A on, as "A. ...", "A: ..." or "(A) ..."; {} for under two."""
    marks = [(found[1], found.start(), found.end()) for found in re.finditer(r"(?:(?<=[\s(])|^)\(?([A-Z])[.:)]\s", question)]
    first = max((k for k, mark in enumerate(marks) if mark[0] == "A"), default=len(marks))
    chosen = []
    for mark in marks[first:]:
        chosen += [mark] if mark[0] == chr(ord("A") + len(chosen)) else []
    ends = [start for _, start, _ in chosen[1:]] + [len(question)]
    texts = {letter: question[begin:end] for (letter, _, begin), end in zip(chosen, ends, strict=False)}
    return {letter: text.strip().split("\n")[0].strip(" ,;(") for letter, text in texts.items()} if len(texts) > 1 else {}


def option_named(said: str, options: dict[str, str]) -> str | None:
    """The letter of the option that a text names: by its letter ("B", "(B)", "B. a dog", "The answer is B."), or its words."""
    opening = r"\s*(?i:(?:the\s+)?(?:(?:correct|right|best)\s+)?(?:answer|option|choice)?(?:\s+is)?\s*:?\s*)"
    found = re.match(opening + r"\(?([A-Z])(?:[.):,]|\s*$)", said) or re.fullmatch(r"\s*\(?([a-z])\)?\.?\s*", said)
    if found and found[1].upper() in options:
        return found[1].upper()
    text = normalize_answer(said).rstrip(".")
    ways = {letter for letter, option in options.items() for way in (option, f"{letter} {option}")
            if normalize_answer(way).rstrip(".") == text}  # fmt: skip
    return ways.pop() if len(ways) == 1 else None
