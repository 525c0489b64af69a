"""How good answers are: exact match with its interval, the letter of a multiple choice, BLEU-4 and CIDEr-D of captions.

    score(items, said)                       # exact match by kind of question, with 95 % intervals
    is_right(item, "B. a dog")               # one of them
    bleu4(captions, references), cider_d(captions, references)

Formulas: Wilson 1927 (interval); Papineni et al. 2002 (BLEU); Vedantam et al. 2015 (CIDEr-D).
"""

import math
import re
from collections import Counter
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


# ---- captions ----------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Lower-case words and numbers, with the apostrophes inside them; punctuation is dropped. Figures for captions depend on
    such choices: these are not comparable with those of the Penn Treebank tokenizer that COCO's own server uses."""
    return re.findall(r"\w+(?:['\u2019]\w+)*", text.lower())


def ngrams(tokens: Sequence[str], n: int) -> Counter:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def check_references(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(candidates) != len(references) or not candidates or not all(len(given) for given in references):
        raise ValueError(
            f"{len(candidates)} candidates and {len(references)} lists of references: give each candidate at least one"
        )


def bleu4(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4, 0..1: the geometric mean of how many of all n-grams (n = 1..4) occur in a reference, each counted at most
    as often as there, times exp(1 - r / c) where the candidates' length c is below r, the sum of the closest references'
    lengths (of two as close, the shorter). Not smoothed: 0 where no 4-gram fits. Raises ValueError for unequal lists."""
    check_references(candidates, references)
    right, all_of_them, c, r = [0] * 4, [0] * 4, 0, 0
    for candidate, given in zip(candidates, references, strict=True):
        tokens, texts = words(candidate), [words(text) for text in given]
        c += len(tokens)
        r += min((abs(len(text) - len(tokens)), len(text)) for text in texts)[1]
        for n in range(1, 5):
            grams, most = ngrams(tokens, n), Counter()
            for text in texts:
                most |= ngrams(text, n)
            right[n - 1] += (grams & most).total()
            all_of_them[n - 1] += grams.total()
    if not all(right):
        return 0.0
    precision = math.exp(sum(math.log(x / y) for x, y in zip(right, all_of_them, strict=True)) / 4)
    return precision * min(1.0, math.exp(1 - r / c))


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D, 0..10 (tables often show it times 100, and divide by this 10): the mean likeness of n-grams (n = 1..4), weighted
    by how rare they are in the references of other images.

    An n-gram weighs its count * log(images / images whose references have it). For each n: the weights that candidate and
    reference share, clipped to the reference's, as a cosine; times exp(-(difference in words)^2 / (2 * 6^2)). The mean over n
    and references, times 10, averaged over candidates. Not on words' stems, as in the authors' code. With one image, where
    nothing is rare, it is 0. Raises ValueError for unequal lists.
    """
    check_references(candidates, references)
    tokens = [[words(text) for text in given] for given in references]
    images = Counter()  # in how many images' references an n-gram occurs
    for given in tokens:
        images.update({gram for text in given for n in range(1, 5) for gram in ngrams(text, n)})

    def vector(text: list[str], n: int) -> tuple[dict, float]:
        grams = ngrams(text, n).items()
        weights = {gram: count * math.log(len(references) / max(1, images[gram])) for gram, count in grams}
        return weights, math.sqrt(sum(weight**2 for weight in weights.values()))

    total = 0.0
    for candidate, given in zip(map(words, candidates), tokens, strict=True):
        for text in given:
            likeness = 0.0
            for n in range(1, 5):
                (mine, mine_norm), (theirs, norm) = vector(candidate, n), vector(text, n)
                shared = sum(min(mine[gram], theirs[gram]) * theirs[gram] for gram in mine.keys() & theirs.keys())
                likeness += shared / (mine_norm * norm) / 4 if mine_norm and norm else 0.0
            total += 10 * likeness * math.exp(-((len(candidate) - len(text)) ** 2) / (2 * 6**2)) / len(given)
    return total / len(candidates)
