"""Several questions about one image, and several samples, in one row of a batch, none of which attends to the others.

    samples = [encode_sample(processor, conversations, images=1), ...]     # conversations about the same images
    batch = pack(samples, length=256)                                  # input_ids, labels, position_ids, attention_mask
    model(pixel_values=..., **batch)                                   # images in the order of batch.pop("order")

A sample is a prefix (the chat's opening and its images, which all its questions have in common) and continuations (a question
and its answer each). A token attends to its own continuation and its prefix, to nothing else, and its position counts from
the beginning of the prefix: each answer's logits are those of that question asked alone (tests/test_packing.py). Twelve
questions about an image encode the image once, and no answer leaks into the next question.

Short samples share a row, so that little is padding. Axes: B rows, T tokens of a row, H heads, KV key/value heads.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from gpt import attention

PADDING = -1  # in place of a sample's number


@dataclass(frozen=True)
class Sample:
    """Ids and labels (-100 where there is nothing to learn) of a prefix and its continuations."""

    prefix: tuple[list[int], list[int]]
    continuations: list[tuple[list[int], list[int]]]

    @property
    def lengths(self) -> list[int]:
        """Tokens of the prefix, and of each continuation."""
        return [len(ids) for ids, _ in (self.prefix, *self.continuations)]

    @property
    def depth(self) -> int:
        """Tokens of the longest conversation in it."""
        prefix, *continuations = self.lengths
        return prefix + max(continuations, default=0)

    def __len__(self) -> int:
        return sum(self.lengths)


# ---- conversations to samples ------------------------------------------------------------------------------------------


def encode_sample(processor, conversations: Sequence, images: int | Sequence[tuple[int, int]]) -> Sample:
    """Conversations about the same images as one sample: what their ids begin with alike is its prefix. images: as
    processor.encode. Raises ValueError for conversations without an answer, and where images and <image>s differ in number."""
    return share_prefix([ids_and_labels(processor, conversation, images) for conversation in conversations])


def ids_and_labels(processor, conversation, images) -> tuple[list[int], list[int]]:
    """(ids, labels) of one conversation up to the end of its last answer: what a template writes behind it teaches nothing."""
    ids, answers = processor.encode(conversation, images)
    if not any(answers):
        raise ValueError(f"{conversation!r:.80} has no answer to learn from")
    end = len(answers) - answers[::-1].index(1)
    return ids[:end], [token if learn else -100 for token, learn in zip(ids[:end], answers[:end], strict=True)]


def share_prefix(rows: Sequence[tuple[list[int], list[int]]]) -> Sample:
    """Rows of (ids, labels) that begin alike become a prefix and continuations of at least one token; a single row is all
    prefix."""
    if len(rows) == 1:
        return Sample(rows[0], [])
    first, shortest = rows[0], min(len(ids) for ids, _ in rows)
    alike = 0
    while alike < shortest - 1 and all(row[0][alike] == first[0][alike] and row[1][alike] == -100 for row in rows):
        alike += 1
    cut = [tuple(part[alike:] for part in row) for row in rows]
    return Sample((first[0][:alike], first[1][:alike]), cut)


# ---- samples to rows -----------------------------------------------------------------------------------------------------


def first_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which lengths, none above `room`, share a row of it: the longest first, each into the first row with room for it (at most
    11/9 of the fewest rows possible, and one: Johnson 1973)."""
    rows, left = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((row for row, rest in enumerate(left) if rest >= lengths[i]), len(rows))
        if place == len(rows):
            rows.append([])
            left.append(room)
        rows[place].append(i)
        left[place] -= lengths[i]
    return rows


def even_rows(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Which lengths share one of `count` rows, so that the longest row is short: the longest first, each into the row with the
    most room (at most 4/3 of the best: Graham 1969)."""
    rows, sums = [[] for _ in range(count)], [0] * count
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = sums.index(min(sums))
        rows[place].append(i)
        sums[place] += lengths[i]
    return rows


def longest_sum(lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> int:
    return max(sum(lengths[i] for i in row) for row in rows)


def pack(samples: Sequence[Sample], length: int = 0, pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """Samples in as few rows as have room for them, and these as short as may be: of at most `length`, or of the longest
    sample's length if that is more.

    Returns input_ids, labels, position_ids, int64 [B, T]; attention_mask: which tokens each may attend to, as AttentionBlocks,
    or bool [B, 1, T, T] where blocks would not save half of it; and "order" [samples]: which sample comes when, row by row, so
    that their images can be put in that order. The label of a token that does not attend to the one before it is -100.
    """
    lengths = [len(sample) for sample in samples]
    rows = first_fit(lengths, max(length, *lengths))
    rows = min(rows, even_rows(lengths, len(rows)), key=lambda rows: longest_sum(lengths, rows))
    T = longest_sum(lengths, rows)
    columns = [[], [], [], [], []]  # ids, labels, positions, sample, continuation (0: its prefix)
    for row in rows:
        tokens = [token for i in row for token in sample_tokens(samples[i], i)]
        tokens += [(pad_token_id, -100, 0, PADDING, t) for t in range(T - len(tokens))]  # each attends to itself alone
        for column, values in zip(columns, zip(*tokens, strict=True), strict=True):
            column.append(values)
    input_ids, labels, position_ids, sample, continuation = map(torch.tensor, columns)
    mask = attention_blocks([[samples[i] for i in row] for row in rows], continuation, position_ids)
    if mask is None:
        mask = (continuation[:, None, :] == 0) | (continuation[:, None, :] == continuation[:, :, None])
        mask &= (sample[:, None, :] == sample[:, :, None]) & torch.ones(T, T, dtype=torch.bool).tril()
        mask = mask[:, None]
    order = torch.tensor([i for row in rows for i in row])
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "attention_mask": mask, "order": order}


def sample_tokens(sample: Sample, number: int):
    """(id, label, position, sample, continuation) of each token."""
    start = len(sample.prefix[0])
    for part, (ids, labels) in enumerate([sample.prefix, *sample.continuations]):
        first = start if part else 0
        follows = part == 1 and start  # the others come after tokens that they do not attend to
        for t, (token, label) in enumerate(zip(ids, labels, strict=True)):
            yield token, label if t or follows else -100, first + t, number, part


# ---- attention between the tokens of packed rows ---------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionBlocks:
    """Which tokens of packed rows attend to which, without the large squares in which none attends to any: R blocks of L
    queries and S keys each, where a key may be in many blocks. Tokens are numbered b * T + t. A mask for gpt.attention."""

    queries: torch.Tensor  # int64 [R, L]: tokens; what a block has too few of is filled up with any
    keys: torch.Tensor  # int64 [R, S]
    mask: torch.Tensor  # bool [R, 1, L, S]
    places: torch.Tensor  # int64 [B * T]: where among the R * L queries each token is

    def to(self, device, **options) -> "AttentionBlocks":
        return AttentionBlocks(*(getattr(self, field.name).to(device, **options) for field in fields(self)))

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        """q [B, H, T, head_dim], k and v [B, KV, T, head_dim] -> [B, H, T, head_dim]."""
        B, H, T, width = q.shape
        q, k, v = take_tokens(q, self.queries), take_tokens(k, self.keys), take_tokens(v, self.keys)
        y = attention(q, k, v, self.mask, dropout=dropout).transpose(1, 2)  # [R, L, H, head_dim]
        return y.flatten(0, 1).index_select(0, self.places).view(B, T, H, width).transpose(1, 2)

    def pattern(self, T: int) -> torch.Tensor:
        """The same as bool [B, 1, T, T], for what has to look at single pairs of tokens."""
        L = self.queries.shape[1]
        allowed, keys = self.mask[self.places // L, 0, self.places % L], self.keys[self.places // L] % T  # [B * T, S]
        count = torch.zeros(len(keys), T, dtype=torch.int32, device=keys.device).scatter_add_(1, keys, allowed.int())
        return (count > 0).view(-1, 1, T, T)


def take_tokens(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """x [B, H, T, head_dim], tokens [R, L] -> [R, H, L, head_dim]."""
    flat = x.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, tokens.flatten())
    return flat.view(*tokens.shape, x.shape[1], -1).transpose(1, 2)


def attention_blocks(rows: Sequence[Sequence[Sample]], continuation, position) -> AttentionBlocks | None:
    """Blocks of a few continuations with their prefix; None where that would not save half of the whole pattern.
    continuation and position: int64 [B, T], of each token."""
    (B, T), queries, keys = position.shape, [], []
    room = max(length for row in rows for sample in row for length in sample.lengths)
    for b, row in enumerate(rows):
        start = b * T
        for sample in row:
            ends = itertools.accumulate(sample.lengths, initial=start)
            parts = [range(first, end) for first, end in itertools.pairwise(ends)]
            for block in first_fit(sample.lengths, room):
                queries.append([token for k in block for token in parts[k]])
                keys.append(queries[-1] if 0 in block else [*parts[0], *queries[-1]])
            start += len(sample)
    if 2 * len(queries) * room * max(map(len, keys)) > B * T * T:
        return None
    q, k = (torch.tensor(list(zip(*itertools.zip_longest(*part, fillvalue=-1), strict=True))) for part in (queries, keys))
    places = torch.zeros(B * T, dtype=torch.long)  # padding gets the output of another token: it has no label
    places[q[q >= 0]] = (q >= 0).flatten().nonzero()[:, 0]
    continuation, position = continuation.flatten(), position.flatten()
    of_key, of_query = continuation[k][:, None, :], continuation[q][:, :, None]
    mask = (k >= 0)[:, None, :] & ((of_key == 0) | (of_key == of_query))
    mask &= position[k][:, None, :] <= position[q][:, :, None]
    mask |= ~mask.any(dim=-1, keepdim=True)  # a softmax over nothing is NaN
    return AttentionBlocks(q.clamp(min=0), k.clamp(min=0), mask[:, None], places)
