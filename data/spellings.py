"""A row of a data set, in any known spelling, as one conversation about its images: the only reader of rows there is.

    row = read_row({"image": "a.png", "captions": ["A cat.", "A cat asleep."]}, notes := Counter())
    row.messages, row.images, row.kinds, row.isolated        # [{"role", "content"}, ...], ["a.png"], ("caption",) * 2, True

| what a row has | as in |
|---|---|
| conversations: [{"from": "human", "value"}, {"from": "gpt", "value"}] | LLaVA (Liu et al. 2023), ShareGPT |
| messages: [{"role": "user", "content": text or [{"type": "image"}, {"type": "text", "text"}]}] | transformers, OpenAI |
| texts: [{"user", "assistant"}], or such pairs of question and answer | the_cauldron, FineVision |
| question, answer (a text, a number or several), and with options a letter, an option or its number | VQA, AI2D, MMMU |
| caption, captions, text: one or several | COCO, Flickr, img2dataset |

The images stand in `image`, `images` or one of IMAGES: names of files, bytes, {"bytes", "path"}, base64, one or a list. Each
has its <image> in a question. Placeholders of other models are read where they are as many as the images; where nothing is said
of the images, they stand before the first question. A row that hints at an image which is not there is refused: it would be
trained as text alone.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from data.row_images import image_of, images_of, placed, refuse_hints
from data.row_values import Fields, RowError, is_absent, kind_of, listed, text_of
from processing_mllama import IMAGE_TOKEN, ROLES

CONVERSATIONS = ("conversations", "conversation", "messages", "texts", "qa", "qas", "qa_pairs")
PAIRS = (("user", "assistant"), ("question", "answer"), ("human", "gpt"))  # of a turn that holds both sides
QUESTIONS = ("question", "query", "prompt", "instruction", "problem")
ANSWERS = ("answer", "multiple_choice_answer", "answers", "label", "correct_choice_idx", "response", "output")
CAPTIONS = ("caption", "captions", "sentences", "text", "txt", "description")
OPTIONS = ("options", "choices")
KINDS = ("kind", "category", "question_type", "answer_type")
IDS = ("id", "question_id", "uid", "index", "key")
TEXT_PARTS, IMAGE_PARTS = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")
DESCRIBE = "Describe the image."  # what a row of captions is asked
CHOOSE = "Answer with the letter of the right option."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Row(NamedTuple):
    """What a row says. images: names and bytes in the order of their <image>s. kinds, accepted: one for each question; accepted
    has what else would be right. isolated: the questions are asked apart from each other, whatever a run is told."""

    id: str | None
    messages: list[dict[str, str]]
    images: list[str | bytes]
    kinds: tuple[str, ...] | None = None
    accepted: tuple[tuple[str, ...], ...] | None = None
    isolated: bool = False


# ---- turns -----------------------------------------------------------------------------------------------------------


def content_of(field: str, value, images: list) -> str:
    """The text of a turn; parts that are images become <image>, and what they hold is added to `images`. Raises RowError."""
    if not isinstance(value, list):
        return text_of(field, value)
    said = []
    for k, part in enumerate(value):
        where = f"{field}[{k}]"
        if isinstance(part, str):
            said.append(text_of(where, part))
            continue
        if not isinstance(part, dict):
            raise RowError(where, f"is {kind_of(part)}: a text or an object was expected")
        kind = part.get("type") or ("text" if "text" in part else "none")
        if kind in TEXT_PARTS:
            said.append(text_of(f"{where}.text", part.get("text")))
        elif kind in IMAGE_PARTS:
            given = next((part[key] for key in ("image", "image_url", "url", "path") if not is_absent(part.get(key))), None)
            images += [] if given is None else [image_of(where, given)]
            number = part.get("index")
            numbered = given is None and isinstance(number, int | float) and 0 <= number < 999
            said.append(f"<image_{int(number) + 1}>" if numbered else IMAGE_TOKEN)
        else:
            raise RowError(where, f"is a part of type {str(kind)[:20]!r}: {', '.join(TEXT_PARTS + IMAGE_PARTS)} are read")
    return "".join(said)


def turns_of(field: str, turns, images: list) -> list[tuple[str, str, str]]:
    """(field, role, text) of each turn of a conversation. images: gains those that turns hold themselves. Raises RowError."""
    turns = listed(turns)
    if not isinstance(turns, (list, tuple)) or not turns:
        raise RowError(field, f"is {'empty' if turns == [] else kind_of(turns)}: a list of turns was expected")
    found = []
    for k, turn in enumerate(turns):
        where = f"{field}[{k}]"
        if not isinstance(turn, Mapping):
            raise RowError(where, f'is {kind_of(turn)}: {{"from": ..., "value": ...}} was expected')
        pair = next((keys for keys in PAIRS if all(key in turn for key in keys)), None)
        if pair and not turn.keys() & {"from", "role"}:
            found += [(f"{where}.{key}", role, content_of(f"{where}.{key}", turn[key], images))
                      for key, role in zip(pair, ("user", "assistant"), strict=True)]  # fmt: skip
            continue
        said_by, said = "role" if turn.get("role") else "from", "content" if "content" in turn else "value"
        who = turn.get(said_by)
        if not isinstance(who, str):
            raise RowError(f"{where}.{said_by}", f"is {kind_of(who)}: human, gpt or system was expected")
        if who.lower() not in ROLES:
            raise RowError(f"{where}.{said_by}", f"is {text_of(where, who)[:40]!r}: human, gpt or system was expected")
        found.append((f"{where}.{said}", ROLES[who.lower()], content_of(f"{where}.{said}", turn.get(said), images)))
    return found


def conversation_of(row) -> list[dict[str, str]]:
    """The turns {"role", "content"} of a row or a list of turns, whatever their order; the processor's images come by
    themselves. Raises ValueError."""
    try:
        if isinstance(row, Mapping):
            fields = Fields(row)
            turns = asked_of(fields, []).turns
        else:
            turns = turns_of("conversation", row, [])
    except RowError as wrong:
        wanted = '{"from": "human" or "gpt", "value": text} or {"role": "user" or "assistant", "content": text}'
        raise ValueError(
            f"{row!r:.200} is not a conversation ({': '.join(wrong.args)}): give a list of turns, each {wanted}"
        ) from None
    return [{"role": role, "content": text} for _, role, text in turns]


def checked_messages(turns: Sequence[tuple[str, str, str]], notes: Counter) -> list[dict[str, str]]:
    """Perhaps a system turn, then alternating human and gpt, to the last answer. Raises RowError."""
    first = next((k for k, (_, role, _) in enumerate(turns) if role != "system"), 0)
    if len(turns) > first + 1 and turns[first][1] == "assistant":
        turns = [*turns[:first], *turns[first + 1 :]]
        notes["the first turn is gpt's, which answers nothing: it is left out"] += 1
    messages, expected = [], ("system", "user")
    for field, role, text in turns:
        if role not in expected:
            where = re.sub(r"\.(value|content)$", lambda m: ".from" if m[1] == "value" else ".role", field)
            raise RowError(where, f"is {role!r}, out of turn: first system or not, then alternating human and gpt")
        if role == "assistant" and not text.strip():
            raise RowError(field, "is an empty answer")
        if role == "assistant" and IMAGE_TOKEN in text:
            raise RowError(field, f"has {IMAGE_TOKEN} in an answer: images belong to questions")
        messages.append({"role": role, "content": text})
        expected = ("assistant",) if role == "user" else ("user",)
    if role != "assistant":
        raise RowError(re.sub(r"\.\w+$", "", field), "has no answer: the last turn must be gpt's")
    return messages


# ---- questions, options, captions --------------------------------------------------------------------------------------


class Asked(NamedTuple):
    turns: list[tuple[str, str, str]]
    kinds: tuple[str, ...] | None
    accepted: tuple[tuple[str, ...], ...] | None = None
    isolated: bool = False


def asked_of(fields: Fields, own: list) -> Asked:
    """What a row asks: a conversation, a question with its answer, or captions. own: gains the images that turns hold
    themselves. Raises RowError."""
    field, turns = fields.take(*CONVERSATIONS)
    if turns is not None:
        found = turns_of(field, turns, own)
        if isinstance(fields.values.get("system"), str) and found[0][1] != "system":
            found = [("system", "system", fields.take("system")[1]), *found]
        return Asked(found, kinds_of(fields), accepted_of(fields))
    field, question = fields.take(*QUESTIONS)
    if question is not None and any(key in fields.values for key in ANSWERS):
        return answered_question(fields, text_of(field, question))
    captions = [fields.take(*CAPTIONS)] if any(key in fields.values for key in CAPTIONS) else fields.numbered("caption")
    texts = [text for name, value in captions for text in texts_of(name, value)]
    if not texts:
        if question is not None:
            raise RowError("answer", f"is missing: there is a {field} alone")
        keys = ", ".join(map(repr, list(fields.values)[:12])) or "none"
        raise RowError("conversations", f"is missing or empty, and there is no question or caption; the keys are {keys:.200}")
    ask = DESCRIBE if question is None else text_of(field, question)
    name = captions[0][0]
    turns = [turn for text in texts for turn in ((name, "user", ask), (name, "assistant", text))]
    return Asked(turns, ("caption",) * len(texts), isolated=len(texts) > 1)


def texts_of(field: str, value) -> list[str]:
    """One text or several: as they are, or as {"raw" (Karpathy's), "caption", "answer" (VQA) or "text": text}."""
    found = []
    for k, each in enumerate(value if isinstance(value, list) else [value]):
        if isinstance(each, Mapping):
            each = next((each[key] for key in ("raw", "caption", "answer", "text") if key in each), each)
        found += [] if is_absent(each) else [text_of(f"{field}[{k}]" if isinstance(value, list) else field, each)]
    return [text for text in found if text.strip()]


def answered_question(fields: Fields, question: str) -> Asked:
    """A question and its answer: of several the one that most give (Goyal et al. 2017), and the others are accepted."""
    kind = next((key for key in KINDS if isinstance(fields.values.get(key), str | int)), None)
    kinds = None if kind is None else (text_of(*fields.take(kind)),)
    hint, more = (fields.take(key)[1] for key in ("hint", "input"))  # ScienceQA's; Alpaca's, after the instruction
    question = "\n".join(text_of("question", text) for text in (hint, question, more) if text is not None)
    options = options_of(fields)
    field, value = fields.take(*ANSWERS)
    if options:
        letter = LETTERS[chosen_option(field, value, options)]
        listing = [f"{name}. {option}" for name, option in zip(LETTERS[: len(options)], options, strict=True)]
        question, answers = "\n".join([question, *listing, CHOOSE]), [letter]
        kinds = kinds or ("choice",)
    else:
        answers = [text for text, _ in Counter(texts_of(field, value)).most_common()]
        if not answers:
            raise RowError(field, "is an empty answer")
    accepted = (tuple(answers[1:]),) if len(answers) > 1 else None
    return Asked([(fields.take(*QUESTIONS)[0], "user", question), (field, "assistant", answers[0])], kinds, accepted)


def options_of(fields: Fields) -> list[str]:
    """The options to choose from: a list, {"A": text, ...}, {"label": [...], "text": [...]}, or columns A, B, C, ..."""
    field, value = fields.take(*OPTIONS)
    if value is None and {"a", "b"} <= fields.values.keys():
        value = {letter: fields.take(letter.lower())[1] for letter in LETTERS if letter.lower() in fields.values}
    value = listed(value)
    if isinstance(value, Mapping) and [*value] == [*LETTERS[: len(value)]]:
        value = [*value.values()]
    if value is None:
        return []
    options = texts_of(field, value) if isinstance(value, list) else []
    if not 2 <= len(options) <= len(LETTERS):
        raise RowError(field, f"is {kind_of(value)} of {len(options)} texts: a list of 2 to {len(LETTERS)} was expected")
    return options


def chosen_option(field: str, value, options: Sequence[str]) -> int:
    """Which option an answer means: by its letter, its own text, or its number from 0. Raises RowError where that is none, or
    two of these ways disagree."""
    said = text_of(field, value[0] if isinstance(value, list) and len(value) == 1 else value).strip()
    letter = re.fullmatch(r"\(?([A-Za-z])[).:]?\)?", said)
    ways = {k for k, option in enumerate(options) if option.strip().lower() == said.lower()}
    ways |= {LETTERS.index(letter[1].upper())} if letter else set()
    ways |= {int(said)} if re.fullmatch(r"\d{1,2}", said) else set()
    ways = {k for k in ways if k < len(options)}
    if len(ways) != 1:
        why = "may be two: name it by its letter" if ways else "is none: neither a letter, nor a text, nor a number from 0"
        raise RowError(field, f"is {said[:40]!r}, which of {len(options)} options {why}")
    return ways.pop()


# ---- a row -----------------------------------------------------------------------------------------------------------


def read_row(raw, notes: Counter, given: Sequence[bytes] | None = None) -> Row:
    """A row of any known spelling. notes: gains what was left out or not used, with how often. given: the row's images, where
    they come beside it (in a tar), in place of those that it names. Raises RowError."""
    if not isinstance(raw, Mapping):
        raise RowError("row", f"is {kind_of(raw)}: an object was expected")
    fields, said, own = Fields(raw), Counter(), []
    field, name = fields.take(*IDS)
    if not (name is None or (isinstance(name, (str, int, float)) and not isinstance(name, bool))):
        raise RowError(field, f"is {kind_of(name)}: a text or a number was expected")
    name = None if name is None else text_of(field, name)
    asked = asked_of(fields, own)
    messages = checked_messages(asked.turns, said)
    images, names = images_of(fields)
    if own and (images or given):
        raise RowError("image", f"there are {len(images or given)} beside the {len(own)} that the turns hold themselves")
    if given is not None and len(images) > len(given):
        raise RowError("image", f"there are {len(images)} named and {len(given)} in the shard")
    images = placed(messages, list(given or ()) or images or own, names)
    if not images:
        if asked.kinds and asked.kinds[0] == "caption":
            refuse_hints(fields)
            raise RowError("image", "is missing: a caption describes one")
        if "images" not in raw or not isinstance(raw["images"], list):
            refuse_hints(fields)
    questions = sum(message["role"] == "user" for message in messages)
    if asked.kinds is not None and len(asked.kinds) != questions:
        raise RowError("kinds", f"there are {len(asked.kinds)} kinds for {questions} questions")
    if asked.accepted is not None and len(asked.accepted) != questions:
        raise RowError("accepted", f"there are {len(asked.accepted)} lists for {questions} questions")
    isolated = asked.isolated or fields.take("isolated")[1] is True
    notes.update(said)
    notes.update(f"key {key[:40]!r} is not used" for key in fields.unread)
    return Row(name, messages, images, asked.kinds, asked.accepted, isolated)


def kinds_of(fields: Fields) -> tuple[str, ...] | None:
    """What sort each question is of, beside a conversation. Raises RowError."""
    kinds = fields.take("kinds")[1]
    if kinds is None:
        return None
    if not isinstance(kinds, list):
        raise RowError("kinds", f"is {kind_of(kinds)}: a list of texts was expected")
    return tuple(text_of(f"kinds[{k}]", kind) for k, kind in enumerate(kinds))


def accepted_of(fields: Fields) -> tuple[tuple[str, ...], ...] | None:
    """What else is right, for each question. Raises RowError."""
    accepted = fields.take("accepted")[1]
    if accepted is None:
        return None
    if not isinstance(accepted, list) or not all(isinstance(each, list) for each in accepted):
        raise RowError("accepted", f"is {kind_of(accepted)}: a list of lists of texts was expected")
    return tuple(tuple(texts_of(f"accepted[{k}]", each)) for k, each in enumerate(accepted))
