"""Laws of lib/scores.py: intervals and captions get the numbers that are published, or that the authors' own code gives."""

import math
import random
import statistics

import pytest

from lib.answers import Item
from lib.caption_scores import bleu, cider_d, words
from lib.photo_losses import by_photo, compare, mean_and_error, swapped
from lib.scores import is_right, options_in, score, wilson

# ---- scores --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right, n, low, high",
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17, table I, method 3; so are the next three
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),  # the mirror image of 0 of 29: 0 to 0.1170
        (0, 0, 0.0, 1.0),
    ],
)
def test_intervals_are_the_published_ones(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=5.1e-5)


def test_an_interval_holds_the_share_and_ends_at_0_and_1():
    for n in (1, 7, 30, 1000):
        assert wilson(0, n)[0] == 0 and wilson(n, n)[1] == 1
        assert all(0 <= low <= right / n <= high <= 1 for right in range(n + 1) for low, high in [wilson(right, n)])


@pytest.mark.parametrize("right, n", [(3, 2), (-1, 5)])
def test_more_right_than_asked_is_refused(right, n):
    with pytest.raises(ValueError, match="it must be"):
        wilson(right, n)


def test_scores_ignore_case_and_spaces_and_nothing_else():
    truths = (("a red 7", "x"), ("a red 7", "x"), ("yes", "y"), ("12", "y"))
    items = [Item(None, [], truth, kind) for truth, kind in truths]
    found = score(items, ["A red\n 7 ", "a red 7.", "yes", "1 2"])
    assert (found["n"], found["right"], found["exact_match"]) == (4, 2, 0.5)
    assert {kind: row["right"] for kind, row in found["by_kind"].items()} == {"x": 1, "y": 1}
    assert (found["low"], found["high"]) == wilson(2, 4)


MMSTAR = "Which animal is it?\nOptions: A: cat, B: dog, C: a cow, near B. Smith, D: none"
AI2D = "A. Miller asks: which is it?\nA. cat\nB. dog\nC. horse\nAnswer with the letter of the right option."
BRACKETS = "Which? (A) cat (B) dog"


def test_options_are_read_from_the_question():
    assert options_in(MMSTAR) == {"A": "cat", "B": "dog", "C": "a cow, near B. Smith", "D": "none"}
    assert options_in(AI2D) == {"A": "cat", "B": "dog", "C": "horse"}
    assert options_in(BRACKETS) == {"A": "cat", "B": "dog"}
    assert options_in("What is it?") == options_in("Does A. like it?") == options_in("B. or C.?") == {}


@pytest.mark.parametrize("question", [MMSTAR, AI2D, BRACKETS])
@pytest.mark.parametrize("true", ["B", "(B)", "Answer: B", "dog"])
def test_of_several_options_the_one_that_is_named_counts(question, true):
    """MMStar and AI2D want the letter: models say it in many ways."""
    item = Item(None, [{"role": "user", "content": question}], true)
    for said in ("B", "b", "B.", "(B)", "B. dog", "Answer: B", "The correct answer is (B).", "Dog", "dog.", "B dog"):
        assert is_right(item, said), said
    for said in ("A", "A. dog", "C", "", "A dog or a cat", "Bad", "Both", "I see a dog and more"):
        assert not is_right(item, said), said


def test_what_is_accepted_is_right_too():
    item = Item(None, [{"role": "user", "content": "What?"}], "cup", accepted=("a mug", "Tea cup"))
    assert [is_right(item, said) for said in ("Cup", "A  mug", "tea cup", "B", "glass")] == [True, True, True, False, False]


# ---- captions ------------------------------------------------------------------------------------------------------------

CAPTIONS = [
    "a man rides a brown horse on the beach",
    "two dogs play in the snow",
    "A red bus, parked near the old station!",
    "the cat sat on the mat",
    "a small child eats a piece of chocolate cake",
]
REFERENCES = [
    [
        "a man riding a horse along the beach",
        "a man rides a brown horse on the sand near the sea",
        "someone on horseback at the beach",
    ],
    ["two dogs are playing in the snow", "two brown dogs play together in deep snow"],
    [
        "a red double decker bus parked near a station",
        "the old red bus is near the station",
        "a bus waits at the old station",
    ],
    ["the cat is on the mat", "there is a cat on the mat"],
    [
        "a child eating cake",
        "a small boy eats a piece of chocolate cake at a table",
        "a young child with a slice of cake",
    ],
]


def test_captions_get_the_figures_of_the_authors_code():
    """On the same lower-case words: nltk 3.10.4 corpus_bleu and sacrebleu 2.6.0 (no smoothing, tokenize none) both give
    0.6156708526941972, pycocoevalcap 1.2, the authors' CIDEr-D, 3.015130043401014."""
    assert bleu(CAPTIONS, REFERENCES)[3] == pytest.approx(0.6156708526941972, abs=1e-12)
    assert cider_d(CAPTIONS, REFERENCES) == pytest.approx(3.015130043401014, abs=1e-12)


CUT = [
    "A man's dog can't swim (yet).",
    "Two kids, both 10-year-olds, play at the U.S. beach",
    "a red bus parks at 5:30 p.m. near St. Mary's",
    "the cat sat on the mat",
]
CUT_REFERENCES = [
    ["the man's dog can't swim well", "a dog (wet) that can't swim"],
    ["two kids play at the beach in the U.S.", "Two 10-year-olds don't play"],
    ["A red bus, parked at 5:30 p.m.", "the bus near St. Mary's church!"],
    ["the cat is on the mat", "there is a cat on the mat"],
]


def test_captions_get_the_figures_of_cocos_evaluation_tokens_included():
    """pycocoevalcap 1.2 with its PTBTokenizer, which needs Java; it adds 1e-9 to what it divides by."""
    expected = [0.8888888888641976, 0.7264831572353377, 0.5733647943271388, 0.4210032559596233]
    assert bleu(CUT, CUT_REFERENCES) == pytest.approx(expected, abs=1e-9)
    assert cider_d(CUT, CUT_REFERENCES) == pytest.approx(3.2523665666108226, abs=1e-12)


HAND = (1 * 5 / 6 * 3 / 5 * 1 / 4) ** 0.25  # the seven words of the candidate below, its pairs, triples and fours


@pytest.mark.parametrize(
    "more, penalty",
    [
        ([], math.exp(1 - 8 / 7)),  # a word shorter than its reference
        (["a mat"], math.exp(1 - 8 / 7)),  # whose length is the closest, whatever else there is
        (["one two three four five six"], 1),  # and of two as close the shorter counts
    ],
)
def test_bleu_by_hand(more, penalty):
    found = bleu(["There is a cat on the mat"], [["there is a black cat on the mat", *more]])[3]
    assert found == pytest.approx(HAND * penalty, abs=1e-12)


def test_a_word_counts_as_often_as_one_reference_says_it():
    """As in Papineni et al. 2002, example 2, where of seven "the" two are right: saying it all again adds nothing right."""
    found = bleu(["a b c d a b c d"], [["a b c d"]])[3]
    assert found == pytest.approx((4 / 8 * 3 / 7 * 2 / 6 * 1 / 5) ** 0.25, abs=1e-12)


def test_more_of_the_same_words_is_no_better_caption():
    """What the D of CIDEr-D is about: saying a rare word again and again, or at great length, does not raise the figure."""
    references = [["a man rides a horse"], ["two dogs in snow"], ["a red bus"]]
    plain = cider_d(["a man rides a horse", "a dog", "a bus"], references)
    again = cider_d(["horse horse horse horse horse", "a dog", "a bus"], references)
    longer = cider_d(["a man rides a horse " * 4, "a dog", "a bus"], references)
    assert again < plain and longer < plain


@pytest.mark.parametrize("figure, best", [(lambda *texts: bleu(*texts)[3], 1.0), (cider_d, 10.0)])
def test_the_best_and_the_worst_caption(figure, best):
    references = [["a man rides a horse"], ["two dogs in deep snow"], ["one red bus stops here"]]
    assert figure([given[0] for given in references], references) == pytest.approx(best)
    assert figure(["nothing", "", "?!"], references) == 0


@pytest.mark.parametrize("figure", [bleu, cider_d])
@pytest.mark.parametrize("candidates, references", [(["a"], []), ([], []), (["a", "b"], [["a"], []])])
def test_captions_without_references_are_refused(figure, candidates, references):
    with pytest.raises(ValueError, match="give each candidate at least one"):
        figure(candidates, references)


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("A man\u2019s 2 dogs, black-and-white!", "a man 's 2 dogs black-and-white"),
        ("They'll cannot, don't ca n't; gonna", "they 'll can not do n't ca n't gon na"),
        ("A 4-wheeler (red) at 5:30 p.m., $5.50 & 10%", "a 4-wheeler -lrb- red -rrb- at 5:30 p.m. $ 5.50 & 10 %"),
        ("Mr. Potato at foo.com, the letter P. in o'clock ...", "mr. potato at foo.com the letter p. in o'clock"),
    ],
)
def test_words_are_those_of_the_penn_treebank_without_punctuation(text, tokens):
    """Each as Stanford's PTBTokenizer cuts it for COCO's evaluation."""
    assert words(text) == tokens.split()


# ---- losses by photo -----------------------------------------------------------------------------------------------------


def test_the_standard_error_is_that_of_drawing_photos():
    """Of 300 photos with few or many tokens, drawn again and again: the spread of the mean is the error named."""
    rng = random.Random(0)
    photos = [(tokens * (2 + rng.gauss(0, 0.5)), tokens) for tokens in (rng.randint(5, 50) for _ in range(300))]
    means = [mean_and_error(rng.choices(photos, k=300))[0] for _ in range(400)]
    assert mean_and_error(photos)[1] == pytest.approx(statistics.stdev(means), rel=0.15)
    assert mean_and_error(photos)[0] == pytest.approx(sum(x for x, _ in photos) / sum(n for _, n in photos))


def test_seeing_is_compared_photo_by_photo():
    items = [Item([name], [], "") for name in "aab"] + [Item(None, [], "")]
    mine, theirs = (by_photo(items, losses) for losses in ([(1, 2), (2, 2), (9, 3), (5, 1)], [(4, 2), (5, 2), (6, 3), (5, 1)]))
    assert mine == {("a",): (3, 4), ("b",): (9, 3)}
    found = compare(mine, theirs)
    assert (found["photos"], found["better"], found["gain"]) == (2, 0.5, (6 - 3) / 7) and found["gain_error"] > 0
    assert (found["low"], found["high"]) == wilson(1, 2)


def test_swapped_items_are_about_another_image_each():
    items = [Item([name], [], name) for name in "abcdaa"] + [Item(["a", "b"], [], "ab"), Item(None, [], "")]
    other = {item.answer: each.images for item, each in zip(items, swapped(items), strict=True)}
    assert sorted(sum((other[name] for name in "abcd"), [])) == list("abcd") and all(other[name] != [name] for name in "abcd")
    assert other["ab"] == other["a"] + other["b"] and other[""] == []
    with pytest.raises(ValueError, match="there is only one"):
        swapped(items[:1])
