"""How good captions are: BLEU-1 to BLEU-4 and CIDEr-D, over several references each, as caption papers report them.

    bleu(captions, references)          # [BLEU-1, ..., BLEU-4], 0..1; tables often show them times 100
    cider_d(captions, references)       # 0..10; tables often show it times 100 over this 10

Formulas: Papineni et al. 2002 (BLEU); Vedantam et al. 2015 (CIDEr-D). The numbers are those of COCO's evaluation code, tokens
included, which needs Java (tests/test_scores.py).
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

CONTRACTED = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b", re.I)
JOINED = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(gim|lem)(me)\b", re.I)
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
WORD = re.compile(
    r"""n't\b | '(?:s|m|d|re|ve|ll)\b | 'n' | o'clock\b      # contractions, as CONTRACTED has cut them off, and two that stay
    | \b(?:mr|mrs|ms|dr|jr|sr|st)\. | (?:\b[a-z]\.){2,}     # abbreviations with their points
    | \b(?-i:[A-Z])\.(?=\s*\S)                             # initials
    | \d+(?:[.,:/]\d+)*(?:-?\w+)*                          # 5:30, 2,000, 3rd, 10-year-old
    | \w+(?:[-/]\w+)*(?:\.(?:com|org|net)\b)?              # words, with the hyphens inside them
    | [$%&#@+=*()\[\]{}]                                   # signs that are read""",
    re.I | re.X,
)


def words(text: str) -> list[str]:
    """The tokens that COCO's evaluation compares: the Penn Treebank's, in lower case and without punctuation. "A man's
    black-and-white dog can't swim." is a, man, 's, black-and-white, dog, ca, n't, swim; a bracket is -lrb-. All 40,415
    captions of Flickr8k and of 83 photos of COCO are cut as COCO's own tokenizer, Stanford's PTBTokenizer 3.4.1, cuts them."""
    text = re.sub("[\u2018\u2019\u02bc`]", "'", text)
    text = JOINED.sub(lambda found: " ".join(part for part in found.groups() if part), CONTRACTED.sub(r" \1", text))
    return [BRACKETS.get(word, word.lower()) for word in WORD.findall(text)]


def ngrams(tokens: Sequence[str], n: int) -> Counter:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def check_references(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(candidates) != len(references) or not candidates or not all(len(given) for given in references):
        raise ValueError(
            f"{len(candidates)} candidates and {len(references)} lists of references: give each candidate at least one"
        )


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]], most: int = 4) -> list[float]:
    """Corpus BLEU-1 to BLEU-4, 0..1: the geometric mean of how many of all n-grams (n = 1..N) occur in a reference, each
    counted at most as often as there, times exp(1 - r / c) where the candidates' length c is below r, the sum of the closest
    references' lengths (of two as close, the shorter). Not smoothed: 0 where no n-gram fits. Raises ValueError for unequal
    lists."""
    check_references(candidates, references)
    right, every, c, r = [0] * most, [0] * most, 0, 0
    for candidate, given in zip(candidates, references, strict=True):
        tokens, texts = words(candidate), [words(text) for text in given]
        c += len(tokens)
        r += min((abs(len(text) - len(tokens)), len(text)) for text in texts)[1]
        for n in range(1, most + 1):
            grams, allowed = ngrams(tokens, n), Counter()
            for text in texts:
                allowed |= ngrams(text, n)
            right[n - 1] += (grams & allowed).total()
            every[n - 1] += grams.total()
    brevity = min(1.0, math.exp(1 - r / c)) if c else 0.0
    precisions = [x / max(1, y) for x, y in zip(right, every, strict=True)]
    return [brevity * math.prod(precisions[:n]) ** (1 / n) for n in range(1, most + 1)]


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
