"""The merges of a tokenizer.json as the table of ranks that tiktoken reads, so that both make the same tokens of any text.

    ranks, ids, apart = rank_table(vocab, merges, whole=())
    tiktoken.Encoding("bpe", pat_str=regex, mergeable_ranks=ranks, special_tokens={})      # its ids index `ids`
"""

import itertools
from collections.abc import Iterable

from lib.tokenizer_files import CHAR_OF, to_bytes


def last_parts(token: str, rank_of: dict[tuple[str, str], int]) -> tuple[str, ...]:
    """What the characters of `token`, merged in rank order, come down to: two parts, or more where no merge applies."""
    parts, never = list(token), len(rank_of)
    while len(parts) > 2:
        ranks = [rank_of.get(pair, never) for pair in itertools.pairwise(parts)]
        best = min(ranks)
        if best == never:
            break
        i = ranks.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def rank_table(vocab: dict[str, int], merges: list[tuple[str, str]], whole: Iterable[str]):
    """Ranks that make tiktoken merge exactly as a list of merges says: (ranks, ids by rank, ids looked up apart).

    `tokenizers` joins two neighbours if the pair is listed, tiktoken if their bytes are in its table. Let T be a token.
    Until T is built, no merge crosses the edges of its bytes; so in any text the last two parts of T are those T comes
    down to alone. If that pair is listed, its place is T's rank, whatever other pairs spell T; if not, T is never built
    and stays out of the table. So at every step both choose the same merge, for every vocabulary.

    `whole` (Llama 3's ignore_merges): tokens that also stand for a piece they equal. Those that merging cannot reach
    may join the table, unless two parts would be left, which tiktoken would join anywhere, or bytes without a token
    could vanish from a piece and leave one: these are looked up apart.
    """
    rank_of = {pair: i for i, pair in enumerate(merges)}
    ranks, apart = {bytes([byte]): byte for byte in range(256)}, {}
    ids = [vocab.get(CHAR_OF[byte]) for byte in range(256)] + [None] * len(merges)
    complete = None not in ids[:256]
    for token in {left + right: None for left, right in merges}:
        rank = rank_of.get(last_parts(token, rank_of))
        if rank is not None:
            ranks[to_bytes(token)] = 256 + rank
            ids[256 + rank] = vocab[token]
    for token in whole:
        data = to_bytes(token)
        if data not in ranks and complete and len(last_parts(token, rank_of)) > 2:
            ranks[data] = len(ids)
            ids.append(vocab[token])
        elif data not in ranks:
            apart[data] = vocab[token]
    return ranks, ids, apart
