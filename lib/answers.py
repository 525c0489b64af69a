"""Ask a vision-language model many questions at once and score what it says.

    items = scene_items("test", count=100, seed=0)             # or Items of your own: pictures, messages, the true answer
    said = answer(model, processor, items)                     # greedy decoding; the truth is not looked at
    figures = score(items, said)                               # exact match by kind of question, with 95 % intervals
    nll, tokens = mean_answer_loss(model, processor, items)    # exp(nll) is the perplexity of the true answers
    bleu4(captions, references), cider_d(captions, references)

What several questions share is computed once: all that comes up to the last picture of a prompt goes through the vision
tower and the decoder a single time for each different beginning, and its keys and values are copied to the rows that go on
from there; rows that have stopped leave the batch. A model of 1.8 M parameters, asked twelve questions a picture, answers 400
to 570 a second on one CPU core, more than twice what generate does with batches sorted by length.

Formulas: Wilson 1927 (interval); Papineni et al. 2002 (BLEU); Vedantam et al. 2015 (CIDEr-D).
Axes: B rows of a batch, P different beginnings in it, I images, T text tokens.
"""

import contextlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from data.llava import count_images
from data.llava import questions as questions_of_row
from data.scenes import make_scenes, normalise, questions
from gpt import KVCache, left_pad
from lib.chat import stop_tokens
from lib.checkpoint import from_pretrained
from lib.files import find_source
from model import MllamaForConditionalGeneration
from processing_mllama import IMAGE_TOKEN, LOCATION_TOKENS, MllamaImageProcessor, to_messages
from vit_scratch import pair

MOST_NEW_TOKENS = 64  # of an answer, unless told otherwise
CACHE_BYTES, MOST_ROWS = 2**27, 256  # of a batch, unless told otherwise; with 64 or 512 rows a small model was slower
LOSS_ROWS = 32  # go through the loss at once

# ---- questions -------------------------------------------------------------------------------------------------------


@dataclass
class Item:
    """One question. image: a picture (see processing_mllama.to_picture), a list of them, or None; items about the same path or
    the very same object share its cost. messages: {"role", "content"} turns that end with the question; where none says
    <image>, the pictures stand before the first question."""

    image: object
    messages: list[dict[str, str]]
    answer: str
    kind: str = "all"

    @property
    def images(self) -> list:
        return [] if self.image is None else list(self.image) if isinstance(self.image, (list, tuple)) else [self.image]


def load_vlm(source: str | Path, device="cpu") -> tuple[MllamaForConditionalGeneration, MllamaImageProcessor]:
    """A whole vision-language model with its processor. Raises ValueError or an OSError unless the folder, or hub name, holds a
    model that looks at pictures, with the tokenizer and the picture settings that belong to it."""
    folder = find_source(source)
    model = from_pretrained(folder, device=device)
    if not isinstance(model, MllamaForConditionalGeneration):
        raise ValueError(f"{folder} holds a {type(model).__name__}, which does not answer questions about pictures")
    processor = MllamaImageProcessor.from_pretrained(folder)
    check_pair(folder, model.config, processor)
    return model, processor


def check_pair(folder: Path, config, processor: MllamaImageProcessor) -> None:
    """Raises ValueError where tokenizer, model and picture settings do not belong together."""
    tokenizer, known = processor.tokenizer, config.text_config.vocab_size
    beyond = (tokenizer.convert_ids_to_tokens(token) for token in range(known, len(tokenizer)))
    rowless = {None, IMAGE_TOKEN, *LOCATION_TOKENS}  # tokens that a model need not have a row for
    if any(token not in rowless for token in beyond):
        raise ValueError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, the model knows {known}: they do not belong together"
        )
    if config.image_token_id not in (None, processor.image_token_id):
        raise ValueError(
            f"the tokenizer in {folder} calls {IMAGE_TOKEN} {processor.image_token_id}, the model {config.image_token_id}: "
            "they do not belong together"
        )
    theirs, wanted = processor.image_size, pair(config.vision_config.image_size)
    if theirs != wanted or processor.num_image_token != config.text_config.num_image_tokens:
        raise ValueError(
            f"{folder} makes pictures of {theirs[0]}x{theirs[1]} pixels and {processor.num_image_token} tokens, its model "
            f"takes {wanted[0]}x{wanted[1]} and {config.text_config.num_image_tokens}: its config files do not belong together"
        )


def about_picture(question: str) -> list[dict[str, str]]:
    """The messages of a single question about a single picture."""
    return [{"role": "user", "content": f"{IMAGE_TOKEN}\n{question}"}]


def scene_items(split: str, count: int, seed: int = 0, per_scene: int = 12) -> list[Item]:
    """All questions about `count` scenes (see scenes.questions), each asked by itself."""
    scenes = make_scenes(split, count, seed)
    turns = zip(scenes.images.unbind(), questions(scenes, seed, per_scene), strict=True)
    return [Item(image, about_picture(t.question), t.answer, t.kind) for image, asked in turns for t in asked]


def row_items(rows: Sequence, isolated: bool = False) -> list[Item]:
    """All questions of rows of LLaVA-style JSON, each after what came before it, or alone (see llava_json.questions)."""
    items = []
    for row in rows:
        for messages, truth, kind in questions_of_row(row, isolated):
            items.append(Item(list(row.images[: count_images(messages)]), messages, truth, kind))
    return items


def picture_key(image):
    """What tells one picture from another: its path, or which object it is."""
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else id(image)


def blind_pixels(pixel_values: torch.Tensor) -> torch.Tensor:
    """The same number of pictures of nothing but the mean colour: 0 everywhere, after normalisation."""
    return torch.zeros_like(pixel_values)


# ---- from items to rows of ids -----------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A prompt in two parts: `shared`, up to its last image placeholder, and `own`. items: the numbers of those that ask it."""

    pictures: tuple  # keys
    shared: tuple[int, ...]
    own: tuple[int, ...]
    answered: int  # how many of `own`, at its end, are the true answer and its end of turn
    items: list[int]

    @property
    def length(self) -> int:
        return len(self.shared) + len(self.own)


def prompt_ids(processor, item: Item, answered: bool = False) -> tuple[list[int], int]:
    """Ids of the item's messages with the opening of an answer behind them; or with its true answer, and how many of the last
    ids that is, end of turn included. Raises ValueError where pictures and <image>s differ in number."""
    if item.messages[-1]["role"] == "assistant":
        raise ValueError("an item's messages end with an answer: they must end with the question")
    messages = [*item.messages, {"role": "assistant", "content": item.answer}] if answered else item.messages
    ids, mask = processor.encode(messages, len(item.images), add_generation_prompt=not answered)
    if not answered:
        return ids, 0
    end = len(mask) - mask[::-1].index(1)  # what the template writes behind an answer is not said by anyone
    return ids[:end], mask[:end][::-1].index(0)


def prompt_rows(processor, items: Sequence[Item], blind: bool, answered: bool) -> list[Row]:
    """The different rows that items make. When blind, all pictures are the same one."""
    encoded, rows = {}, {}
    for number, item in enumerate(items):
        said = item.answer if answered else None
        text = (len(item.images), said, *((m["role"], m["content"]) for m in to_messages(item.messages)))
        if text not in encoded:
            ids, answer_length = prompt_ids(processor, item, answered)
            places = [t for t, token in enumerate(ids) if token == processor.image_token_id]
            encoded[text] = tuple(ids), max(places, default=0) + 1, answer_length
        ids, split, answer_length = encoded[text]
        pictures = tuple("blind" if blind else picture_key(image) for image in item.images)
        row = Row(pictures, ids[:split], ids[split:], answer_length, [])
        # Asked once however often, but a true answer counts as often as it is given.
        rows.setdefault((*row[:4], number if answered else None), row).items.append(number)
    return list(rows.values())


def fitting_rows(model, tokens: int) -> int:
    """How many rows of so many tokens have keys and values of CACHE_BYTES; at most MOST_ROWS."""
    cache = model.new_cache(1, 1)
    each = tokens * (cache.keys.nbytes + cache.values.nbytes)
    return max(1, min(MOST_ROWS, CACHE_BYTES // max(1, each)))


def batches(rows: list[Row], batch_size: int) -> Iterator[list[Row]]:
    """Rows of the same beginning come together, and otherwise rows of about the same length."""
    groups = {}
    for row in rows:
        groups.setdefault((row.pictures, row.shared), []).append(row)
    for group in groups.values():
        group.sort(key=lambda row: len(row.own))
    batch = []
    for group in sorted(groups.values(), key=lambda group: (len(group[0].shared), len(group[-1].own))):
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
def at_rest(model) -> Iterator[None]:
    """Inside the block: no dropout and no gradients. Afterwards each part of the model trains, or not, as it did before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def look(model, processor, pictures: dict, blind: bool) -> dict:
    """Image features [N', D] of pictures by key: one pass of the vision tower over all of them."""
    if not pictures:
        return {}
    weight = next(model.vision_tower.parameters())
    if blind:
        pixel_values = blind_pixels(torch.empty(len(pictures), 3, *processor.image_size))
    else:
        pixel_values = processor.pixel_values(list(pictures.values()))
    features = model.image_features(pixel_values.to(weight.device, weight.dtype))
    return dict(zip(pictures, features, strict=True))


def read_beginnings(model, processor, items, batch: list[Row], blind: bool, room: int) -> tuple[KVCache, list[int]]:
    """A cache of the P different shared parts in a batch, with room for the rows' own parts and so many new tokens; and which
    of the P is that of each row."""
    places = {}
    for row in batch:
        places.setdefault((row.pictures, row.shared), len(places))
    wanted = {key: image for row in batch for key, image in zip(row.pictures, items[row.items[0]].images, strict=True)}
    features = look(model, processor, wanted, blind)
    input_ids, attention_mask = left_pad(
        [shared for _, shared in places], model.language_model.model.embed_tokens.weight.device
    )
    seen = [features[key] for pictures, _ in places for key in pictures]
    cache = model.new_cache(len(places), input_ids.shape[1] + max(len(row.own) for row in batch) + room)
    image_features = torch.stack(seen) if seen else None
    model(input_ids, attention_mask=attention_mask, image_features=image_features, cache=cache, logits_to_keep=1)
    return cache, [places[row.pictures, row.shared] for row in batch]


def own_parts(batch: list[Row], cache: KVCache) -> dict[str, torch.Tensor]:
    input_ids, attention_mask = left_pad([row.own for row in batch], cache.keys.device)
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def continue_rows(model, logits, cache: KVCache, most: Sequence[int], stop: set[int]) -> list[list[int]]:
    """gpt.decode at temperature 0 with a limit for each row, but rows that are done leave the batch as soon as they are half of
    it: short answers do not wait for the longest. logits [B, V] after the prompts -> the new ids of each row."""
    said, rows, ids = [[] for _ in most], list(range(len(most))), None
    going = set(rows)
    while True:
        if ids is not None:
            logits = model.language_model(ids[:, None], cache=cache)["logits"][:, -1]
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


def longest_row(model, rows: Sequence[Row], room: int) -> int:
    """Tokens of the longest row. Raises ValueError where `room` more do not fit the context length."""
    longest, limit = max((row.length for row in rows), default=0), model.language_model.config.context_length
    if longest + room > limit:
        raise ValueError(
            f"a question has {longest} tokens and leaves no room for its answer in the context length of {limit}: leave it out"
        )
    return longest


def answer(
    model, processor, items: Sequence[Item], batch_size: int | None = None, max_new_tokens: int = MOST_NEW_TOKENS, blind=False
) -> list[str]:
    """What the model says to each item, by greedy decoding with a KV cache; the items' answers are not looked at.

    batch_size: rows; unless given, what CACHE_BYTES hold. max_new_tokens: of an answer, or less where the context is full
    before. blind: every picture is one of the mean colour (blind_pixels), and the real ones are not even opened. Works where
    the model is, and leaves it training or not as it was. Raises ValueError for prompts that fill the context, for pictures
    and <image>s that differ in number, for pictures that cannot be read.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    rows = prompt_rows(processor, items, blind, answered=False)
    longest, limit = longest_row(model, rows, 1), model.language_model.config.context_length
    batch_size = batch_size or fitting_rows(model, longest + max_new_tokens)
    said, stop = [""] * len(items), stop_tokens(processor.tokenizer)
    with at_rest(model):
        for batch in batches(rows, batch_size):
            cache, beginnings = read_beginnings(model, processor, items, batch, blind, max_new_tokens)
            cache = cache.select(beginnings)
            out = model.language_model(**own_parts(batch, cache), cache=cache, logits_to_keep=1)
            most = [min(max_new_tokens, limit - row.length) for row in batch]
            for row, ids in zip(batch, continue_rows(model, out["logits"][:, -1], cache, most, stop), strict=True):
                text = processor.decode(ids).strip()
                for number in row.items:
                    said[number] = text
    return said


def own_loss(model, batch: list[Row], cache: KVCache) -> tuple[float, int]:
    """Mean loss of the answers' tokens after what the cache holds, and how many they are."""
    inputs = own_parts(batch, cache)
    ids, answered = inputs["input_ids"], torch.tensor([row.answered for row in batch], device=cache.keys.device)
    from_end = torch.arange(ids.shape[1], 0, -1, device=ids.device)
    labels = ids.masked_fill(from_end > answered[:, None], -100)
    return float(model.language_model(**inputs, cache=cache, labels=labels)["loss"]), int(answered.sum())


def mean_answer_loss(
    model, processor, items: Sequence[Item], batch_size: int | None = None, blind: bool = False
) -> tuple[float, int]:
    """Mean negative log-likelihood of a token of the true answers, each with its end of turn, and how many tokens these are:
    (nan, 0) without items. Perplexity is exp of it. Other arguments and errors as `answer`."""
    rows, total, count = prompt_rows(processor, items, blind, answered=True), 0.0, 0
    batch_size = batch_size or fitting_rows(model, longest_row(model, rows, 0))
    with at_rest(model):
        for batch in batches(rows, batch_size):
            cache, beginnings = read_beginnings(model, processor, items, batch, blind, 0)
            order = sorted(range(len(batch)), key=lambda k: len(batch[k].own))  # answers differ in length: little padding
            for part in (order[k : k + LOSS_ROWS] for k in range(0, len(order), LOSS_ROWS)):
                loss, tokens = own_loss(model, [batch[k] for k in part], cache.select([beginnings[k] for k in part]))
                total, count = total + loss * tokens, count + tokens
    return total / count if count else math.nan, count


# ---- exact match -------------------------------------------------------------------------------------------------------


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval that holds the true share, after `right` of n, in 95 % of cases (z = 1.96): Wilson's score interval, which
    unlike share +- z * standard error stays within 0..1 and is sound for few or lop-sided samples. (0, 1) for n = 0."""
    if not 0 <= right <= n:
        raise ValueError(f"{right} right of {n}: it must be 0 to {n}")
    if n == 0:
        return 0.0, 1.0
    share, scale = right / n, 1 + z**2 / n
    middle = (share + z**2 / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return middle - half if right else 0.0, middle + half if right < n else 1.0  # and not a rounding error beside them


def score(items: Sequence[Item], said: Sequence[str]) -> dict:
    """{"n", "right", "exact_match", "low", "high"} of all answers, and "by_kind": the same for each kind of question, in the
    order in which they first come. An answer is right if it is the true one but for case and blanks (scenes.normalise)."""
    marks: dict[str, list[bool]] = {}
    for item, text in zip(items, said, strict=True):
        marks.setdefault(item.kind, []).append(normalise(text) == normalise(item.answer))

    def figures(right: int, n: int) -> dict:
        low, high = wilson(right, n)
        return {"n": n, "right": right, "exact_match": right / max(1, n), "low": low, "high": high}

    overall = figures(sum(map(sum, marks.values())), sum(map(len, marks.values())))
    return overall | {"by_kind": {kind: figures(sum(row), len(row)) for kind, row in marks.items()}}


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
    by how rare they are in the references of other pictures.

    An n-gram weighs its count * log(pictures / pictures whose references have it). For each n: the weights that candidate and
    reference share, clipped to the reference's, as a cosine; times exp(-(difference in words)^2 / (2 * 6^2)). The mean over n
    and references, times 10, averaged over candidates. Not on words' stems, as in the authors' code. With one picture, where
    nothing is rare, it is 0. Raises ValueError for unequal lists.
    """
    check_references(candidates, references)
    tokens = [[words(text) for text in given] for given in references]
    pictures = Counter()  # in how many pictures' references an n-gram occurs
    for given in tokens:
        pictures.update({gram for text in given for n in range(1, 5) for gram in ngrams(text, n)})

    def vector(text: list[str], n: int) -> tuple[dict, float]:
        grams = ngrams(text, n).items()
        weights = {gram: count * math.log(len(references) / max(1, pictures[gram])) for gram, count in grams}
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
