"""What the image is worth, photo by photo: the loss of true answers beside that of a blind twin, or with another photo.

    each = by_photo(items, answer_losses(model, processor, items))          # {photo: (loss, tokens)}
    mean_and_error(each.values())                                           # loss of a token, and its standard error
    compare(each, by_photo(items, answer_losses(twin, processor, items, blind=True)))
    others = swapped(items)                                                 # the same questions, each about another photo

Photos are what was sampled: the captions of one are alike, and their tokens more so. So errors are over photos, not over
tokens: those of a ratio of sums (Cochran 1977, Sampling Techniques, section 6.4), and of the difference of two such ratios.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from lib.answers import Item, image_key
from lib.scores import wilson

Losses = dict[tuple, tuple[float, int]]  # of each photo (or what else stands together in a question): summed loss, tokens


def by_photo(items: Sequence[Item], losses: Sequence[tuple[float, int]]) -> Losses:
    """Losses of items, added up over those about the same images. Items without an image are left out."""
    found: Losses = {}
    for item, (loss, tokens) in zip(items, losses, strict=True):
        if item.images:
            key = tuple(map(image_key, item.images))
            before = found.get(key, (0.0, 0))
            found[key] = before[0] + loss, before[1] + tokens
    return found


def mean_and_error(each: Iterable[tuple[float, int]]) -> tuple[float, float]:
    """Loss of a token over all photos, and its standard error; nan for the error of a single one."""
    each = list(each)
    n, tokens = len(each), sum(count for _, count in each)
    mean = sum(loss for loss, _ in each) / tokens
    if n < 2:
        return mean, math.nan
    return mean, math.sqrt(n / (n - 1) * sum((loss - mean * count) ** 2 for loss, count in each)) / tokens


def compare(mine: Losses, theirs: Losses) -> dict[str, float]:
    """By how much their loss of a token is above mine, with its standard error, and on what share of the photos it is, with the
    interval that holds the share in 95 % of cases. Both of the same items, in the same order."""
    pairs = list(zip(mine.values(), theirs.values(), strict=True))
    gain, error = mean_and_error((other - own, tokens) for (own, tokens), (other, _) in pairs)
    better = sum(other > own for (own, _), (other, _) in pairs)
    low, high = wilson(better, len(pairs))
    return {"photos": len(pairs), "gain": gain, "gain_error": error, "better": better / len(pairs), "low": low, "high": high}


def swapped(items: Sequence[Item], seed: int = 0) -> list[Item]:
    """The items with each image replaced by another one, which takes the place of it alone. Raises ValueError for one image."""
    images = {image_key(image): image for item in items for image in item.images}
    order = random.Random(seed).sample(list(images), len(images))
    if len(order) < 2:
        raise ValueError("--swapped gives each image's questions another image: there is only one")
    other = {key: images[after] for key, after in zip(order, [*order[1:], order[0]], strict=True)}
    return [replace(item, image=[other[image_key(image)] for image in item.images] or None) for item in items]
