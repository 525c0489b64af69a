"""Learning the merges of byte-level BPE from text (Sennrich et al. 2016), the same ones as Hugging Face's `tokenizers`."""

import heapq
import itertools
from collections import Counter, defaultdict

from lib.files import need


def learn_merges(words: Counter[str], names: list[str], vocab_size: int, at_most: bool) -> list[tuple[str, str]]:
    """Join the most frequent pair, again and again, until `names` (extended in place) holds `vocab_size` tokens, or, if
    at_most, until no pair is left.

    Of equally frequent pairs the one with the smaller ids is first, which makes the merges those of `tokenizers`.
    Pair counts are kept up to date; a heap entry whose count went stale goes back in with the present one.
    """
    index = {name: i for i, name in enumerate(names)}
    symbols, weight = [[index[char] for char in word] for word in words], list(words.values())
    count, where, merges = Counter(), defaultdict(set), []
    for w, word in enumerate(symbols):
        for pair in itertools.pairwise(word):
            count[pair] += weight[w]
            where[pair].add(w)
    heap = [(-count[pair], pair, at) for pair, at in where.items()]
    heapq.heapify(heap)
    while len(names) < vocab_size:
        negative, pair, at = heapq.heappop(heap) if heap else (0, None, None)
        if at_most and negative == 0:
            break
        need(negative < 0, "train", f"vocab_size {vocab_size} is too large: this corpus gives at most {len(names)}")
        if -negative != count[pair]:
            heapq.heappush(heap, (-count[pair], pair, at))
            continue
        left, right = pair
        merges.append((names[left], names[right]))
        new = index.setdefault(names[left] + names[right], len(names))  # two pairs may spell one token
        if new == len(names):
            names.append(names[left] + names[right])
        born = defaultdict(set)
        for w in at:
            word, i = symbols[w], 0
            while i < len(word) - 1:
                if word[i] == left and word[i + 1] == right:
                    word[i : i + 2] = [new]
                    before, after = word[i - 1 : i] if i else [], word[i + 1 : i + 2]
                    for pair in [(other, left) for other in before] + [(right, other) for other in after]:
                        count[pair] -= weight[w]
                    for pair in [(other, new) for other in before] + [(new, other) for other in after]:
                        count[pair] += weight[w]
                        born[pair].add(w)
                i += 1
        for pair, places in born.items():
            heapq.heappush(heap, (-count[pair], pair, places))
    return merges
