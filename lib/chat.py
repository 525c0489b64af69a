"""Conversations as token ids: chat formats, which tokens are answers, and the tokens that end one.

    ids, mask = encode_conversation(tokenizer, messages)     # messages: [{"role": "user", "content": "What is it?"}, ...]

The mask is 1 on the tokens of the assistant's answers and on the token that ends each: there a loss counts. A format that is
known (CHAT_FORMATS) is written part by part, so that special-token text inside a message stays text. A Hugging Face tokenizer
writes the conversation with its own template, and an answer is what the text gains when the answer comes in.
`MllamaForConditionalGeneration._create_conversation_mask` shows the idea on ids alone.
"""

import itertools
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from lib.files import need, one_line


class ChatFormat(NamedTuple):
    """A turn is start, role, middle, gap, content, end, tail. start, middle and end are special tokens (or empty)."""

    start: str
    middle: str
    gap: str
    end: str
    tail: str
    opens: bool  # bos_token comes before the first turn
    strips: bool  # contents are trimmed
    jinja: str  # the same, for other tools
    answer_prefix: str = ""  # what an answer begins with, and whoever reads it strips


CHAT_FORMATS = {
    "chatml": ChatFormat("<|im_start|>", "", "\n", "<|im_end|>", "\n", False, False, (
        r"{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
        r"{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")),
    # The first word of an answer is then the token that it is within a text: " red", not "re" and "d". A model that starts
    # from nothing learned most kinds of questions about scenes in half the steps.
    "chatml_spaced": ChatFormat("<|im_start|>", "", "\n", "<|im_end|>", "\n", False, False, (
        r"{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        r"{{ (' ' if message['role'] == 'assistant' else '') + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"), " "),
    "llama3": ChatFormat("<|start_header_id|>", "<|end_header_id|>", "\n\n", "<|eot_id|>", "", True, True, (
        r"{% if bos_token %}{{ bos_token }}{% endif %}{% for message in messages %}{{ '<|start_header_id|>' "
        r"+ message['role'] + '<|end_header_id|>\n\n' + (message['content'] | trim) + '<|eot_id|>' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")),
}  # fmt: skip


def recognise(jinja: str | None) -> tuple[str | None, str | None]:
    """The name of the format that a published template writes, and the system message that it adds by itself; or None."""
    known, system = None, None
    for name, form in CHAT_FORMATS.items():
        signs = [form.jinja] if form.answer_prefix else [form.start, form.end]
        if jinja and all(sign in jinja for sign in signs):
            opening = re.escape(form.start + "system" + form.middle) + r"(?:\n|\\n)+"
            found = re.search(opening + r"([^'\"{}<|]+)" + re.escape(form.end), jinja)
            known, system = name, found[1] if found else None
    return known, system


def stop_tokens(tokenizer) -> set[int]:
    """Ids that end an answer: the tokenizer's eos_token and the ends of turn of known chat formats."""
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (*(f.end for f in CHAT_FORMATS.values()), "<|endoftext|>")]
    return ({*ends} - {None, tokenizer.unk_token_id} | {tokenizer.eos_token_id}) - {None}


# ---- a known format, part by part --------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A stretch of a conversation as it is written: a special token, or text of the format, of a message, of an answer."""

    text: str
    special: bool = False
    content: bool = False
    answer: bool = False


def parts_of(
    form: ChatFormat, messages: Sequence[dict], bos_token: str | None, system: str | None, add_generation_prompt: bool
) -> list[Part]:
    """The messages in a chat format; system: the message to begin with where they have none of their own."""
    need(isinstance(messages, (list, tuple)) and messages, "chat", f"{messages!r} is not a list of messages")
    for message in messages:
        good = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        need(good, "chat", f"a message is {{'role': text, 'content': text}}, not {message!r}")

    def opening(role):
        return [Part(form.start, special=True), Part(role), Part(form.middle, special=True), Part(form.gap)]

    parts = [Part(bos_token or "", special=True)] if form.opens else []
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    for message in messages:
        answer = message["role"] == "assistant"
        content = message["content"].strip() if form.strips else message["content"]
        parts += [*opening(message["role"]), Part(form.answer_prefix if answer else "")]
        parts += [Part(content, content=True, answer=answer), Part(form.end, special=True, answer=answer), Part(form.tail)]
    return [part for part in parts + (opening("assistant") if add_generation_prompt else []) if part.text]


def encode_parts(tokenizer, parts: list[Part], special_in_content: Collection[str]) -> tuple[list[int], list[int]]:
    """Ids and mask. What stands between two special tokens is encoded as one text, so the ids are those of the written
    conversation; a token across the border of an answer's opening and the answer belongs to the answer."""
    flat = []
    for part in parts:
        pieces = tokenizer.split_at_added(part.text, special_in_content) if part.content else [part.text]
        flat += [(tokenizer.convert_tokens_to_ids(piece) if part.special else piece, part.answer) for piece in pieces]
    ids, mask = [], []
    for is_text, group in itertools.groupby(flat, key=lambda item: isinstance(item[0], str)):
        run, answers = zip(*group, strict=True)
        if is_text:  # of the format, then perhaps of an answer, which begins `opening` bytes into the run
            texts = zip(run, answers, strict=True)
            opening = sum(len(text.encode("utf-8", "replace")) for text, answer in texts if not answer)
            run = tokenizer.encode("".join(run), add_special_tokens=False)
            ends = itertools.accumulate(len(tokenizer.decode_bytes([i])) for i in run)
            answers = [any(answers) and end > opening for end in ends]
        ids += run
        mask += map(int, answers)
    return ids, mask


# ---- any tokenizer -----------------------------------------------------------------------------------------------------


def encode_conversation(
    tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool = False, special_in_content: Collection[str] = ()
) -> tuple[list[int], list[int]]:
    """Ids of a conversation in the tokenizer's chat template, and the mask of its answers.

    special_in_content: the tokens that mean something inside a message, with our tokenizer, which alone can tell; the location
    tokens among them are no end of an answer. With a Hugging Face tokenizer what the template writes for the first messages
    must begin what it writes for all. Raises ValueError for a template that is not like that, leaves something out, or ends
    answers without a special token: a model could not learn to stop.
    """
    if hasattr(tokenizer, "encode_chat"):
        return tokenizer.encode_chat(messages, add_generation_prompt, True, special_in_content)
    write = template_writer(tokenizer, messages)
    whole = write(len(messages), add_generation_prompt)
    ids = encode_text(tokenizer, whole)
    mask = [0] * len(ids)
    for k in [k for k, message in enumerate(messages) if message["role"] == "assistant"]:
        before, after = write(k, True), write(k + 1, False)
        if not (after.startswith(before) and whole.startswith(after)):
            raise ValueError(f"the chat template changes what stands before message {k}: its answers cannot be told apart")
        # A token across the border of opening and answer belongs to the answer, as in encode_parts.
        start, stop = (shared_length(encode_text(tokenizer, text), ids) for text in (before, after))
        while stop > start and not is_special(tokenizer, ids[stop - 1], special_in_content):
            stop -= 1
        if stop == start:
            raise ValueError("the chat template ends answers without a special token: a model could not learn to stop")
        mask[start:stop] = [1] * (stop - start)
    return ids, mask


def template_writer(tokenizer, messages: list[dict]):
    """write(n, ask): the first n messages as the tokenizer's template writes them, with the opening of an answer if `ask`.
    Templates of vision-language models want a list of parts where those of language models want a text: the form that
    leaves out nothing is taken."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat_template to write conversations with: set one, or give prompts")

    def write_with(turns, n, ask):
        try:
            return tokenizer.apply_chat_template(turns[:n], tokenize=False, add_generation_prompt=ask)
        except Exception as error:  # a template is a program, and may fail like one
            raise ValueError(f"the chat template cannot write this conversation ({one_line(error)})") from None

    listed = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]
    for turns in (messages, listed):
        whole = write_with(turns, len(turns), False)
        if all(message["content"].strip() in whole for message in messages):
            return lambda n, ask, turns=turns: write_with(turns, n, ask)
    raise ValueError("the chat template leaves out some of what the messages say: set another one")


def encode_text(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def is_special(tokenizer, token: int, except_for: Collection[str]) -> bool:
    shown, kept = (tokenizer.decode([token], skip_special_tokens=skip) for skip in (False, True))
    return bool(shown) and not kept and shown not in except_for


def shared_length(a: Sequence, b: Sequence) -> int:
    """How many items two sequences have in common at their beginning."""
    most = min(len(a), len(b))
    return next((i for i, (x, y) in enumerate(zip(a[:most], b[:most], strict=True)) if x != y), most)
