"""Conversations as token ids: written by a chat template, with a mask of what are answers.

    ids, mask = encode_conversation(tokenizer, messages)     # messages: [{"role": "user", "content": "What is it?"}, ...]

The ids are those of transformers' apply_chat_template. The mask is 1 on the tokens of the assistant's answers and on the token
that ends each: there a loss counts. An answer is what the text gains when the answer comes in.
`MllamaForConditionalGeneration._create_conversation_mask` shows the idea on ids alone.

Text is data: with our tokenizer (lib/tokenizer.py) special-token text inside a message stays text, where transformers parses
it. For this each such text is one private character while the template runs. A template that looks into messages may then
write something else; there the ids are transformers' own.
"""

import itertools
import re
from collections.abc import Collection, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

from lib.chat_template import OURS, render
from lib.files import need

PROBE, KEY = "\U0010fffc", "\U0010fffd"  # private characters: a message's text, and what no template asks a part for
EXAMPLE = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is red."}]
HIDDEN = 0x100000  # from here on: special-token text inside messages


# ---- what a template is like -------------------------------------------------------------------------------------------


def template_of(tokenizer) -> str:
    """The template that conversations are written in. Raises ValueError where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several, by name
        need("default" in template, "chat", f"of the templates {', '.join(template)} none is called default")
        template = template["default"]
    need(template, "chat", "the tokenizer has no chat_template to write conversations with: set one, or give texts to continue")
    return template


def named_tokens(tokenizer) -> dict[str, str]:
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


def as_parts(content: str, image_token: str | None) -> list[dict]:
    """A message's text as a list of parts. A line break between image and text is the template's affair."""
    parts = []
    for number, text in enumerate(content.split(image_token) if image_token else [content]):
        last = number == (content.count(image_token) if image_token else 0)
        text = text[number > 0 and text.startswith("\n") :]
        text = text[: len(text) - (not last and text.endswith("\n"))]
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts


@lru_cache(maxsize=64)
def message_form(template: str, tokens: tuple[tuple[str, str], ...], image_token: str | None) -> str:
    """What the template takes as a message's content: "images", a list of images and texts, wherever it writes both; else a
    "text"; else a "list" of one text, images and all. Raises ValueError for a template that shows none."""

    def written(content) -> str:
        try:
            return render(template, [{"role": "user", "content": content}], True, **dict(tokens))
        except ValueError as error:
            reasons.append(str(error))
            return ""

    reasons, text = [], {"type": "text", "text": PROBE, KEY: ""}
    pictured = written([{"type": "image", KEY: ""}, text]) if image_token else ""
    if pictured.count(PROBE) == 1 == pictured.count(image_token or KEY) and KEY not in pictured:
        return "images"
    if PROBE in written(PROBE):
        return "text"
    listed = written([text])
    if PROBE not in listed or KEY in listed:
        raise ValueError(reasons[0] if reasons else "the chat template leaves out what users say")
    return "list"


def takes_parts(tokenizer, image_token: str) -> bool:
    """Whether its template takes a message's content as a list of images and texts."""
    return message_form(template_of(tokenizer), tuple(named_tokens(tokenizer).items()), image_token) == "images"


def shape(messages: list[dict], form: str, image_token: str | None) -> list[dict]:
    """The messages as a template of this form takes them."""
    if form == "text":
        return messages
    return [m | {"content": as_parts(m["content"], image_token if form == "images" else None)} for m in messages]


@lru_cache(maxsize=64)
def answer_opening(template: str, tokens: tuple[tuple[str, str], ...]) -> str:
    chat = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": KEY}]
    chat = shape(chat, message_form(template, tokens, None), None)
    before, after = render(template, chat[:1], True, **dict(tokens)), render(template, chat, **dict(tokens))
    between = after.removeprefix(before).partition(KEY)[0]
    return between if between.isspace() else ""


def answer_prefix(tokenizer) -> str:
    """The white space that the template writes before an answer, and a model says first."""
    return answer_opening(template_of(tokenizer), tuple(named_tokens(tokenizer).items()))


def end_of_turn(tokenizer) -> int:
    """The token that ends an answer in the tokenizer's template, or as it is trained with. Raises ValueError where no special
    one does."""
    ids, mask = encode_conversation(tokenizer, EXAMPLE)
    return ids[len(mask) - 1 - mask[::-1].index(1)]


def with_end_of_turn(settings: dict, tokenizer) -> dict:
    """The settings of a model that learns to answer in the tokenizer's template: what ends an answer there ends one here."""
    named = settings.get("eos_token_id", tokenizer.eos_token_id)
    ends = [i for i in (named if isinstance(named, list) else [named]) if i is not None]
    ends = list(dict.fromkeys([*ends, end_of_turn(tokenizer)]))
    return settings | {"eos_token_id": ends[0] if len(ends) == 1 else ends}


def writes_end(tokenizer) -> bool:
    """Whether the template itself writes the token that ends an answer."""
    return tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) in write(tokenizer, EXAMPLE).text


# ---- a conversation as it is written -------------------------------------------------------------------------------------


class Written(NamedTuple):
    """text; answers: [start, stop) of each in it, with what ends its turn; hidden: private characters -> special-token text."""

    text: str
    answers: list[tuple[int, int]]
    hidden: dict[str, str]


def check_messages(messages: Sequence[dict]) -> None:
    need(isinstance(messages, (list, tuple)) and messages, "chat", f"{messages!r} is not a list of messages")
    for message in messages:
        good = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        need(good, "chat", f"a message is {{'role': text, 'content': text}}, not {message!r}")


def hide(tokenizer, messages: list[dict], means_something: Collection[str]) -> tuple[list[dict], dict[str, str]]:
    """The messages, each special-token text in them but those that mean something as one private character; and what these
    stand for. With a tokenizer that obeys whatever it finds: as they are."""
    everything = "\0".join(message[key] for message in messages for key in ("role", "content"))
    special = tokenizer.special_in(everything) if hasattr(tokenizer, "special_in") else ()
    present = sorted(set(special) - {*means_something}, key=len, reverse=True)
    if not present:
        return messages, {}
    free = (chr(code) for code in range(HIDDEN, ord(PROBE)) if chr(code) not in everything)
    hidden = dict(zip(present, free, strict=False))
    finder = re.compile("|".join(map(re.escape, present)))
    found = [m | {key: finder.sub(lambda match: hidden[match[0]], m[key]) for key in ("role", "content")} for m in messages]
    return found, {char: token for token, char in hidden.items()}


def restore(text: str, hidden: dict[str, str]) -> str:
    return text.translate(str.maketrans(hidden)) if hidden else text


def write(
    tokenizer, messages: list[dict], add_generation_prompt: bool = False, special_in_content: Collection[str] = (),
    image_token: str | None = None, answers: str = "none",
) -> Written:  # fmt: skip
    """The conversation by the tokenizer's template. See encode_conversation."""
    check_messages(messages)
    template, tokens = template_of(tokenizer), named_tokens(tokenizer)
    form = message_form(template, tuple(tokens.items()), image_token)

    def shaped(turns):
        return shape(turns, form, image_token)

    plain = render(template, shaped(messages), add_generation_prompt, **tokens)
    safe, hidden = hide(tokenizer, messages, special_in_content)
    whole = render(template, shaped(safe), add_generation_prompt, **tokens) if hidden else plain
    if restore(whole, hidden) != plain:  # the template looks into messages
        safe, hidden, whole = messages, {}, plain
    if add_generation_prompt or answers == "none":
        return Written(whole, [], hidden)
    turns = shaped(safe)
    if template in OURS.values():  # they write each turn by itself, so that many turns cost no more than their number
        ends = [0, *itertools.accumulate(len(render(template, [turn])) for turn in turns)]
        opening = len(render(template, [], True))
        spans = zip(safe, itertools.pairwise(ends), strict=True)
        return Written(whole, [(start + opening, stop) for m, (start, stop) in spans if m["role"] == "assistant"], hidden)
    found = answers_in(whole, safe, turns, partial(render, template, **tokens), image_token, answers == "last")
    return Written(whole, found, hidden)


def answers_in(
    whole: str, messages: list[dict], turns: list[dict], render, image_token: str | None, last: bool
) -> list[tuple[int, int]]:
    """Where the answers, or the last one alone, are in what a template writes, turn by turn. turns: the messages as the
    template takes them. Raises ValueError for a template that writes a turn in another way once others follow, or that leaves
    out what was said."""
    found = {}
    for k in [k for k, message in enumerate(messages) if message["role"] == "assistant"][-1 if last else 0 :]:
        before, after = render(turns[:k], True), render(turns[: k + 1], False)
        if not whole.startswith(after):
            raise changed(f"writes message {k} with", after, whole)
        found[k] = answer_start(before, after, messages[k]["content"].strip(), k), len(after)
    for number, message in enumerate(messages):
        if last and number not in found:
            continue
        start, stop = found.get(number, (0, len(whole)))
        said = message["content"].split(image_token) if image_token else [message["content"]]
        if not all(text.strip() in whole[start:stop] for text in said):
            raise ValueError(f"the chat template leaves out some of message {number}: it cannot be trained with")
    return list(found.values())


def answer_start(before: str, after: str, said: str, k: int) -> int:
    """Where in `after` the answer begins that `before` asks for: the end of `before`, or where the two openings differ by white
    space (LLaVA-interleave asks with "assistant\\n" and writes "assistant \\n"), the first word said."""
    if after.startswith(before):
        return len(before)
    start = after.find(said, shared_length(before, after)) if said else -1
    if start >= 0 and after[:start].split() == before.split():
        return start
    raise changed(f"opens message {k} for an answer with", before, after)


def changed(how: str, once: str, later: str) -> ValueError:
    at = shared_length(once, later)
    return ValueError(
        f"the chat template {how} {once[at : at + 40]!r}, and later has {later[at : at + 40]!r} there: it changes what stands "
        "before, so its answers cannot be told apart and it cannot be trained with"
    )


def put_images(written: Written, image_token: str, images: Sequence[str]) -> Written:
    """Each image token of the text becomes the text of its image. Raises ValueError where the template wrote another number."""
    pieces = written.text.split(image_token)
    if len(pieces) - 1 != len(images):
        raise ValueError(f"the chat template writes {image_token} {len(pieces) - 1} times for {len(images)} images")
    places, at = [], 0
    for piece, image in zip(pieces[:-1], images, strict=True):
        at += len(piece) + len(image_token)
        places.append((at, len(image) - len(image_token)))
    text = pieces[0] + "".join(image + piece for image, piece in zip(images, pieces[1:], strict=True))
    answers = [tuple(b + sum(grown for place, grown in places if place <= b) for b in answer) for answer in written.answers]
    return Written(text, answers, written.hidden)


# ---- as ids ------------------------------------------------------------------------------------------------------------


def encode_conversation(
    tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool = False, special_in_content: Collection[str] = (),
    image_token: str | None = None, images: Sequence[str] | None = None, add_special_tokens: bool = False,
    answers: str = "all",
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Ids of a conversation in the tokenizer's chat template, and the mask of its answers; with add_generation_prompt, which
    asks for one more, and with answers="none" all 0. answers="last": at least the last, even where no special token ends it.

    special_in_content: the tokens that mean something inside a message, with our tokenizer, which alone can tell; none of them
    ends an answer. image_token: stands for an image in messages; images: what each becomes, in their order (else: itself).
    add_special_tokens: as transformers' processors, with what the tokenizer puts around any text unless it begins with bos.
    Where the template ends no answer with a special token (LLaVA-1.5's) and the mask is of all, each ends with eos_token.
    Raises ValueError for a template that cannot write the conversation and, where the mask is wanted, for one that writes turns
    in another way once others follow, leaves something out, or ends answers without a special token that the tokenizer has: a
    model could not learn to stop.
    """
    written = write(tokenizer, messages, add_generation_prompt, special_in_content, image_token, answers)
    if images is not None:
        written = put_images(written, image_token, images)
    bos = tokenizer.bos_token
    around = add_special_tokens and not (bos and written.text.startswith(bos))
    by_parts = written.hidden or getattr(tokenizer, "encodes_parts_alone", False)
    encode = encode_parts if by_parts else encode_whole
    ids, spans = encode(tokenizer, written, around)
    stops = [last_special(tokenizer, ids, span, special_in_content) for span in spans]
    if answers == "all" and spans and not any(stops) and tokenizer.eos_token:
        ids, spans = encode(tokenizer, end_answers(written, tokenizer.eos_token), around)
        stops = [last_special(tokenizer, ids, span, special_in_content) for span in spans]
    mask = [0] * len(ids)
    for (start, written_to), stop in zip(spans, stops, strict=True):
        stop = written_to if stop is None and answers == "last" else stop
        if stop is None:
            raise ValueError("the chat template ends answers without a special token: a model could not learn to stop")
        mask[start:stop] = [1] * (stop - start)
    return ids, mask


def last_special(tokenizer, ids: list[int], span: tuple[int, int], except_for: Collection[str]) -> int | None:
    """Where, behind the last special token of an answer, its turn ends; None where it has none."""
    start, stop = span
    return next((i for i in range(stop, start, -1) if is_special(tokenizer, ids[i - 1], except_for)), None)


def end_answers(written: Written, end: str) -> Written:
    """Each answer with the token `end` in place of the white space behind it: so LLaVA-1.5 was trained ("ASSISTANT: red</s>"),
    though its published template writes a space there."""
    text, at, answers = "", 0, []
    for start, stop in written.answers:
        text += written.text[at:start]
        answers.append((len(text), len(text) + len(said := written.text[start:stop].rstrip() + end)))
        text, at = text + said, stop
    return Written(text + written.text[at:], answers, written.hidden)


def encode_parts(tokenizer, written: Written, around: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids, and where the answers are in them, with our tokenizer. What stands between two special tokens is encoded as one
    text; a token across the border of an answer's opening and the answer belongs to the answer."""
    before, after = tokenizer.around if around else ([], [])
    ids, at, borders = [*before], 0, {border for answer in written.answers for border in answer}
    first = {}  # of each border: how many ids end before it
    for part in tokenizer.split_at_added(written.text, True):
        special = isinstance(part, int)
        text = tokenizer.convert_ids_to_tokens(part) if special else part
        new = [part] if special else encode_part(tokenizer, restore(text, written.hidden), follows=at > 0)
        for border in [border for border in borders if at <= border < at + len(text)]:
            opening = restore(text[: border - at], written.hidden)
            first[border] = len(ids) + count_inside(tokenizer, opening, new, follows=at > 0)
        ids, at = ids + new, at + len(text)
    first[at] = len(ids)
    return ids + [*after], [(first[start], first[stop]) for start, stop in written.answers]


def encode_part(tokenizer, text: str, follows: bool) -> list[int]:
    """Ids of what stands between two special tokens; follows: not at the beginning, where some tokenizers put a space."""
    options = {} if tokenizer.encodes_parts_alone else {"follows": follows}
    return tokenizer.encode(text, add_special_tokens=False, **options)


def count_inside(tokenizer, opening: str, ids: list[int], follows: bool) -> int:
    """How many of the ids of a text end within its opening."""
    if not tokenizer.encodes_parts_alone:
        return shared_length(encode_part(tokenizer, opening, follows), ids)
    ends = itertools.accumulate(len(tokenizer.decode_bytes([i])) for i in ids)
    return sum(end <= len(opening.encode("utf-8", "replace")) for end in ends)


def encode_whole(tokenizer, written: Written, around: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """The same with any other tokenizer: an answer's ids are those that the text before it, encoded alone, does not have."""

    def encode(text: str) -> list[int]:
        if hasattr(tokenizer, "encodes_parts_alone"):
            return tokenizer.encode(text, around, parse_special=True)
        return tokenizer(text, add_special_tokens=around)["input_ids"]

    ids = encode(written.text)
    return ids, [tuple(shared_length(encode(written.text[:end]), ids) for end in answer) for answer in written.answers]


def is_special(tokenizer, token: int, except_for: Collection[str]) -> bool:
    shown, kept = (tokenizer.decode([token], skip_special_tokens=skip) for skip in (False, True))
    return bool(shown) and not kept and shown not in except_for


def shared_length(a: Sequence, b: Sequence) -> int:
    """How many items two sequences have in common at their beginning."""
    most = min(len(a), len(b))
    return next((i for i, (x, y) in enumerate(zip(a[:most], b[:most], strict=True)) if x != y), most)
