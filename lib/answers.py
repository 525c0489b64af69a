"""Ask a vision-language model many questions at once. What it says is scored by lib/scores.py.

    items = scene_items("test", count=100, seed=0)             # or Items of your own: images, messages, the true answer
    said = answer(model, processor, items)                     # greedy decoding; the true answers are not used
    nll, tokens = mean_answer_loss(model, processor, items)    # exp(nll) is the perplexity of the true answers

What several questions share is computed once: all that comes up to the last image of a prompt, its prefix, goes through the
vision tower and the decoder a single time for each different prefix, and its keys and values are copied to the rows that
continue it; rows that have stopped leave the batch. A model of 1.8 M parameters, asked twelve questions an image, answers 400
to 570 a second on one CPU core, more than twice what generate does with batches sorted by length.

Axes: B rows of a batch, P different prefixes in it, I images, T text tokens.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from data.batches import blind_pixels
from data.llava import count_images, questions_of_row
from data.scene_batches import about_image
from data.scenes import make_scenes, questions
from data.tiles import WHOLE
from gpt import KVCache, left_pad
from lib.beam_search import beam_search
from lib.generation import LogitRules, stop_tokens
from lib.vocabulary import check_rows
from processing_mllama import to_messages

MOST_NEW_TOKENS = 64  # of an answer, unless told otherwise
ENCODED_BYTES = 2**30  # of image features that are kept for other questions
CACHE_BYTES, MOST_ROWS = 2**27, 256  # of a batch, unless told otherwise; with 64 or 512 rows a small model was slower
LOSS_ROWS = 32  # go through the loss at once

# ---- questions -------------------------------------------------------------------------------------------------------


@dataclass
class Item:
    """One question. image: one that the processor takes, a list of them, or None; items about the same path or the very same
    object share its cost. messages: {"role", "content"} turns that end with the question; where none says <image>, the images
    stand before the first question."""

    image: object
    messages: list[dict[str, str]]
    answer: str
    kind: str = "all"
    accepted: tuple[str, ...] = ()  # what else is right
    id: str | None = None  # of the row that asks it
    number: int = 0  # of the question in its row

    @property
    def images(self) -> list:
        return [] if self.image is None else list(self.image) if isinstance(self.image, (list, tuple)) else [self.image]


def scene_items(split: str, count: int, seed: int = 0, per_scene: int = 12) -> list[Item]:
    """All questions about `count` scenes (see scenes.questions), each asked by itself."""
    scenes = make_scenes(split, count, seed)
    turns = zip(scenes.images.unbind(), questions(scenes, seed, per_scene), strict=True)
    return [Item(image, about_image(t.question), t.answer, t.kind) for image, asked in turns for t in asked]


def row_items(rows: Sequence, isolated: bool = False) -> list[Item]:
    """All questions of rows of LLaVA-style JSON, each after what came before it, or alone (see llava.questions_of_row)."""
    items = []
    for row in rows:
        for number, (messages, truth, kind) in enumerate(questions_of_row(row, isolated)):
            accepted = row.accepted[number] if row.accepted else ()
            images = list(row.images[: count_images(messages)])
            items.append(Item(images, messages, truth, kind, accepted, row.id, number))
    return items


def image_key(image):
    """What tells one image from another: its path, or which object it is."""
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else id(image)


# ---- from items to rows of ids -----------------------------------------------------------------------------------------


class PromptRow(NamedTuple):
    """A prompt in two parts: `prefix`, up to its last image placeholder, and `own`. items: the numbers of those that ask it."""

    images: tuple  # keys
    prefix: tuple[int, ...]
    own: tuple[int, ...]
    answered: int  # how many of `own`, at its end, are the true answer and its end of turn
    items: list[int]

    @property
    def length(self) -> int:
        return len(self.prefix) + len(self.own)


def prompt_ids(processor, item: Item, answered: bool = False, tilings=None) -> tuple[list[int], int]:
    """Ids of the item's messages with the opening of an answer behind them; or with its true answer, and how many of the last
    ids that is, end of turn included. tilings: of its images, where they are known. Raises ValueError where images and <image>s
    differ in number."""
    tilings = processor.tilings(item.images) if tilings is None else tilings
    if item.messages[-1]["role"] == "assistant":
        raise ValueError("an item's messages end with an answer: they must end with the question")
    messages = [*item.messages, {"role": "assistant", "content": item.answer}] if answered else item.messages
    ids, mask = processor.encode(messages, tilings, add_generation_prompt=not answered, answers="last")
    if not answered:
        return ids, 0
    end = len(mask) - mask[::-1].index(1)  # what the template writes behind an answer is not said by anyone
    return ids[:end], mask[:end][::-1].index(0)


def prompt_rows(processor, items: Sequence[Item], blind: bool, answered: bool) -> list[PromptRow]:
    """The different rows that items make. When blind, all images are the same one, never cut into tiles."""
    encoded, rows = {}, {}
    images = {} if blind else {image_key(image): image for item in items for image in item.images}
    known = dict(zip(images, processor.tilings(list(images.values())), strict=True))
    for number, item in enumerate(items):
        said, tilings = item.answer if answered else None, tuple(known.get(image_key(image), WHOLE) for image in item.images)
        text = (tilings, said, *((m["role"], m["content"]) for m in to_messages(item.messages)))
        if text not in encoded:
            ids, answer_length = prompt_ids(processor, item, answered, tilings)
            places = [t for t, token in enumerate(ids) if token == processor.image_token_id]
            encoded[text] = tuple(ids), max(places, default=0) + 1, answer_length
        ids, split, answer_length = encoded[text]
        images = tuple("blind" if blind else image_key(image) for image in item.images)
        row = PromptRow(images, ids[:split], ids[split:], answer_length, [])
        # Asked once however often, but a true answer counts as often as it is given.
        rows.setdefault((*row[:4], number if answered else None), row).items.append(number)
    return list(rows.values())


def rows_for(model, processor, items: Sequence[Item], blind: bool, answered: bool) -> list[PromptRow]:
    """prompt_rows, checked for tokens that the model has no row for: ValueError."""
    rows, size = prompt_rows(processor, items, blind, answered), model.config.text_config.vocab_size
    for row in rows:
        check_rows(processor.tokenizer, [*row.prefix, *row.own], size, processor.image_token_id)
    return rows


def fitting_rows(model, tokens: int) -> int:
    """How many rows of so many tokens have keys and values of CACHE_BYTES; at most MOST_ROWS."""
    cache = model.new_cache(1, 1)
    each = tokens * (cache.keys.nbytes + cache.values.nbytes)
    return max(1, min(MOST_ROWS, CACHE_BYTES // max(1, each)))


def row_batches(rows: list[PromptRow], batch_size: int) -> Iterator[list[PromptRow]]:
    """Rows of the same prefix come together, and otherwise rows of about the same length."""
    groups = {}
    for row in rows:
        groups.setdefault((row.images, row.prefix), []).append(row)
    for group in groups.values():
        group.sort(key=lambda row: len(row.own))
    batch = []
    for group in sorted(groups.values(), key=lambda group: (len(group[0].prefix), len(group[-1].own))):
        if batch and len(batch) + len(group) > batch_size:
            yield batch
            batch = []
        batch = batch + group
        while len(batch) > batch_size:
            yield batch[:batch_size]
            batch = batch[batch_size:]
    if batch:
        yield batch


# ---- the model's side ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def eval_mode(model) -> Iterator[None]:
    """Inside the block: no dropout and no gradients. Afterwards each part of the model trains, or not, as it did before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def encode_images(model, processor, images: dict, blind: bool, encoded: dict) -> dict:
    """Image features [n, N', D] of images by key: one pass of the vision tower over all of them, or, where they are cut into
    n tiles, one for each. encoded: those of earlier calls, to which these are added while they are few."""
    weight, features = next(model.vision_tower.parameters()), {key: encoded[key] for key in images if key in encoded}
    images = {key: image for key, image in images.items() if key not in encoded}
    at_once = 1 if processor.image_settings.fit == "tiles" and not blind else max(1, len(images))
    for first in range(0, len(images), at_once):
        group = dict(itertools.islice(images.items(), first, first + at_once))
        if blind:
            pixel_values = blind_pixels(torch.empty(len(group), 3, *processor.image_size))
        else:
            pixel_values = processor.pixel_values(list(group.values()))
        found = model.image_features(pixel_values.to(weight.device, weight.dtype))
        features |= zip(group, found.split(len(found) // len(group)), strict=True)
    if images and sum(each.nbytes for each in (encoded | features).values()) < ENCODED_BYTES:
        encoded |= features
    return features


def prefill(model, processor, items, batch: list[PromptRow], blind: bool, room: int, encoded) -> tuple[KVCache, list[int]]:
    """A cache of the P different prefixes in a batch, with room for the rows' own parts and `room` new tokens; and which of
    the P is that of each row. encoded: see encode_images."""
    places = {}
    for row in batch:
        places.setdefault((row.images, row.prefix), len(places))
    wanted = {key: image for row in batch for key, image in zip(row.images, items[row.items[0]].images, strict=True)}
    features = encode_images(model, processor, wanted, blind, encoded)
    input_ids, attention_mask = left_pad([prefix for _, prefix in places], next(model.parameters()).device)
    shown = [features[key] for images, _ in places for key in images]
    cache = model.new_cache(len(places), input_ids.shape[1] + max(len(row.own) for row in batch) + room)
    image_features = torch.cat(shown) if shown else None
    model(input_ids, attention_mask=attention_mask, image_features=image_features, cache=cache, logits_to_keep=1)
    return cache, [places[row.images, row.prefix] for row in batch]


def own_parts(batch: list[PromptRow], cache: KVCache) -> dict[str, torch.Tensor]:
    input_ids, attention_mask = left_pad([row.own for row in batch], cache.keys.device)
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def continue_rows(
    model, logits, cache: KVCache, most: Sequence[int], stop: set[int], rules: LogitRules | None = None,
    prompts: Sequence[list[int]] = (),
) -> list[list[int]]:  # fmt: skip
    """gpt.decode at temperature 0 with a limit for each row, but rows that are done leave the batch as soon as they are half of
    it: short answers do not wait for the longest. logits [B, V] after the prompts -> the new ids of each row. rules: those of
    the model's folder, which the ids of the prompts belong to."""
    said, rows, ids = [[] for _ in most], list(range(len(most))), None
    going = set(rows)
    while True:
        if ids is not None:
            logits = model.language_model(ids[:, None], cache=cache)["logits"][:, -1]
        if rules:
            logits = rules(logits, [prompts[row] + said[row] for row in rows], [len(prompts[row]) for row in rows])
        ids, full = logits.argmax(dim=-1), False
        for row, token in zip(rows, ids.tolist(), strict=True):
            if row in going and token in stop:
                going.remove(row)
            elif row in going:
                said[row].append(token)
                if len(said[row]) == most[row]:
                    going.remove(row)
                    full = True  # perhaps of the context, where it may not take another step
        if not going:
            return said
        if full or 2 * len(going) <= len(rows):
            keep = [place for place, row in enumerate(rows) if row in going]
            cache, ids, rows = cache.select(keep), ids[keep], [rows[place] for place in keep]


def longest_row(model, rows: Sequence[PromptRow], room: int) -> int:
    """Tokens of the longest row. Raises ValueError where `room` more do not fit the context length."""
    longest, limit = max((row.length for row in rows), default=0), model.language_model.config.context_length
    if longest + room > limit:
        raise ValueError(
            f"a question has {longest} tokens and leaves no room for its answer in the context length of {limit}: leave it out"
        )
    return longest


def answer(
    model, processor, items: Sequence[Item], batch_size: int | None = None, max_new_tokens: int = MOST_NEW_TOKENS, blind=False,
    before_batch: Callable[[], None] = lambda: None, beams: int = 1, encoded: dict | None = None,
) -> list[str]:  # fmt: skip
    """What the model says to each item, by greedy decoding with a KV cache, or by a search with several beams
    (lib/beam_search.py); the items' answers are not used.

    batch_size: rows; unless given, what CACHE_BYTES hold. max_new_tokens: of an answer, or less where the context is full
    before. blind: every image is one of the mean colour (blind_pixels), and the real ones are not even opened.
    before_batch: called before each batch. encoded: a dict that carries image features from one call to the next with the same
    model and items. Works where the model is, and leaves it training or not as it was. Raises ValueError for prompts that
    fill the context, for images and <image>s that differ in number, for images that cannot be read.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    rows, limit = rows_for(model, processor, items, blind, answered=False), model.language_model.config.context_length
    longest, max_new_tokens = longest_row(model, rows, 1), min(max_new_tokens, limit)
    batch_size = batch_size or max(1, fitting_rows(model, longest + max_new_tokens) // beams)
    said, stop = [""] * len(items), stop_tokens(model, processor.tokenizer)
    rules, encoded = LogitRules.of(model, processor.tokenizer), {} if encoded is None else encoded
    with eval_mode(model):
        for batch in row_batches(rows, batch_size):
            before_batch()
            cache, prefixes = prefill(model, processor, items, batch, blind, max_new_tokens, encoded)
            cache = cache.select(prefixes)
            out = model.language_model(**own_parts(batch, cache), cache=cache, logits_to_keep=1)
            most = [min(max_new_tokens, limit - row.length) for row in batch]
            prompts = [[*row.prefix, *row.own] for row in batch] if rules else ()
            after = out["logits"][:, -1], cache, most, stop
            if beams == 1:
                new = continue_rows(model, *after, rules, prompts)
            else:
                found = beam_search(model.language_model, *after, beams, rules=rules, prompts=prompts)
                new = [best.ids for best, *_ in found]
            for row, ids in zip(batch, new, strict=True):
                text = processor.decode(ids).strip()
                for number in row.items:
                    said[number] = text
    return said


def own_losses(model, batch: list[PromptRow], cache: KVCache) -> list[float]:
    """For each row the summed loss of its answer's tokens after what the cache holds."""
    inputs = own_parts(batch, cache)
    ids, answered = inputs["input_ids"], torch.tensor([row.answered for row in batch], device=cache.keys.device)
    from_end = torch.arange(ids.shape[1], 0, -1, device=ids.device)
    labels = ids.masked_fill(from_end > answered[:, None], -100)
    decoder = model.language_model
    hidden = decoder.hidden_states(decoder.embed(ids), inputs["attention_mask"], cache=cache)
    losses = [decoder.loss(hidden[b : b + 1], labels[b : b + 1]) for b in range(len(batch))]
    return (torch.stack(losses) * answered).tolist()


def mean_answer_loss(*args, **settings) -> tuple[float, int]:
    """Mean negative log-likelihood of a token of the true answers, and how many tokens these are: (nan, 0) without items.
    Perplexity is exp of it. Arguments: those of answer_losses."""
    losses = answer_losses(*args, **settings)
    total, count = (sum(column) for column in zip(*losses, strict=True)) if losses else (0.0, 0)
    return total / count if count else math.nan, count


def answer_losses(
    model, processor, items: Sequence[Item], batch_size: int | None = None, blind: bool = False,
    before_batch: Callable[[], None] = lambda: None, encoded: dict | None = None,
) -> list[tuple[float, int]]:  # fmt: skip
    """For each item the negative log-likelihood of its true answer, end of turn included, and how many tokens that has. Other
    arguments and errors as `answer`."""
    rows, found = rows_for(model, processor, items, blind, answered=True), [(0.0, 0)] * len(items)
    batch_size, encoded = batch_size or fitting_rows(model, longest_row(model, rows, 0)), {} if encoded is None else encoded
    with eval_mode(model):
        for batch in row_batches(rows, batch_size):
            before_batch()
            cache, prefixes = prefill(model, processor, items, batch, blind, 0, encoded)
            order = sorted(range(len(batch)), key=lambda k: len(batch[k].own))  # answers differ in length: little padding
            for part in (order[k : k + LOSS_ROWS] for k in range(0, len(order), LOSS_ROWS)):
                losses = own_losses(model, [batch[k] for k in part], cache.select([prefixes[k] for k in part]))
                for row, loss in zip((batch[k] for k in part), losses, strict=True):
                    found[row.items[0]] = loss, row.answered  # a row of its own for each item: see prompt_rows
    return found
