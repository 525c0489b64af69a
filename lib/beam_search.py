"""Beam search: several continuations of a prompt are followed at once, and the likeliest as a whole is the answer.

    (best, *others), = continue_prompts(model, [ids], beams=3, max_new_tokens=40, stop_tokens={2})
    best.ids, best.score

Greedy decoding takes the likeliest token at every step and cannot go back: where "a" is likelier than "two" but every word
after "a" is unlikely, it misses the sentence that begins with "two". A *beam* is one of the continuations kept. With three:

    step 1     a -1.0     two -1.2     the -1.9          log-probabilities of the three likeliest first tokens
    step 2     two dogs -1.3     a man -2.6     the dog -2.7    of all continuations of all beams again the three likeliest
    ...        until one ends: it is kept, with its score, and its place is free for another

The score of a continuation is the sum of its tokens' log-probabilities over length ** length_penalty. A sum alone falls with
every token and so prefers short answers; with 1.0 it is the mean over tokens; above it longer answers gain, below it shorter.
The search for a prompt ends when as many continuations have ended as there are beams, and the best of those that go on scores
no better than the worst of them. Figures for captions are often of 3 to 5 beams.

The numbers are those of transformers' generate(num_beams=..., early_stopping=False), which tests/test_beam_search.py compares.
Axes: P prompts that are still searched, n beams of each (1 before the first step), V vocabulary.
"""

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch

from gpt import KVCache, left_pad
from lib.generation import LogitRules


class Hypothesis(NamedTuple):
    """A continuation of a prompt. ids: without the token that ended it."""

    score: float
    ids: list[int]


@torch.no_grad()
def beam_search(
    step: Callable, logits: torch.Tensor, cache: KVCache, most: Sequence[int], stop: Collection[int], beams: int,
    length_penalty: float = 1.0, rules: LogitRules | None = None, prompts: Sequence[Sequence[int]] = (),
) -> list[list[Hypothesis]]:  # fmt: skip
    """From the last logits [P, V] of prompts and their filled cache: for each prompt up to `beams` hypotheses, the best first.

    step: a decoder, or anything else that maps (input_ids [B, 1], cache=cache) to {"logits": [B, 1, V]}; most: tokens of each
    continuation; stop: ids that end one; rules: those of the model's folder, which the ids of the prompts belong to. Raises
    ValueError for more beams than the vocabulary has tokens for.
    """
    V, stop = logits.shape[-1], set(stop)
    if not 1 <= beams <= V - len(stop):
        raise ValueError(f"--beams {beams}: it must be 1 to {V - len(stop)}, the tokens that do not end a text")
    ended: list[list[Hypothesis]] = [[] for _ in most]
    going = {prompt: [Hypothesis(0.0, [])] for prompt in range(len(most))}  # scores that are sums as yet; the best beam first
    for length in itertools.count(1):
        n = len(next(iter(going.values())))
        sums = torch.tensor([[beam.score for beam in running] for running in going.values()], device=logits.device)
        log_p = logits.float().log_softmax(dim=-1)
        if rules:
            texts = [[*prompts[prompt], *beam.ids] for prompt, running in going.items() for beam in running]
            log_p = rules(log_p, texts, [len(prompts[prompt]) for prompt in going for _ in range(n)])
        sums = sums[..., None] + log_p.view(len(going), n, V)
        # So many that, whichever of them end, as many as there are beams go on.
        best = sums.flatten(1).topk(min(n * V, beams * (1 + max(1, len(stop)))))
        rows, tokens = [], []  # of the cache: from which beam each beam goes on, and by which token
        for place, (prompt, running) in enumerate(list(going.items())):
            longer, beam_of = [], []
            for rank, (score, k) in enumerate(zip(best.values[place].tolist(), best.indices[place].tolist(), strict=True)):
                beam, token = divmod(k, V)
                ids = running[beam].ids
                if token in stop or length == most[prompt]:
                    if rank < beams:
                        ids = ids if token in stop else [*ids, token]
                        ended[prompt].append(Hypothesis(score / length**length_penalty, ids))
                elif len(longer) < beams:
                    longer.append(Hypothesis(score, [*ids, token]))
                    beam_of.append(place * n + beam)
            ended[prompt] = sorted(ended[prompt], key=lambda each: -each.score)[:beams]
            full = len(ended[prompt]) == beams
            if longer and not (full and longer[0].score / length**length_penalty <= ended[prompt][-1].score):
                going[prompt] = longer
                rows += beam_of
                tokens += [each.ids[-1] for each in longer]
            else:
                del going[prompt]
        if not going:
            return ended
        cache = cache.select(rows)
        logits = step(torch.tensor(tokens, device=logits.device)[:, None], cache=cache)["logits"][:, -1]


def continue_prompts(
    model, prompts: Sequence[Sequence[int]], beams: int, max_new_tokens: int, stop_tokens: Collection[int] = (),
    length_penalty: float = 1.0, step: Callable | None = None, rules: LogitRules | None = None, **images,
) -> list[list[Hypothesis]]:  # fmt: skip
    """The hypotheses for prompts of any lengths, by a language model or a vision-language model. images: what the latter's
    forward takes (pixel_values or image_features, image_token_id); step: see gpt.Decoder.stream."""
    decoder = getattr(model, "language_model", model)
    with torch.no_grad():
        input_ids, attention_mask = left_pad(prompts, decoder.lm_head.weight.device)
        cache = model.new_cache(len(input_ids), input_ids.shape[1] + max_new_tokens)
        out = model(input_ids, attention_mask=attention_mask, cache=cache, logits_to_keep=1, **images)
    most = [max_new_tokens] * len(input_ids)
    after = out["logits"][:, -1], cache, most, stop_tokens
    return beam_search(step or decoder, *after, beams, length_penalty, rules, [list(row) for row in prompts])
