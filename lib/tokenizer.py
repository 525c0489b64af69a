"""Byte-level BPE on tiktoken: text to token ids and back, with exactly the ids of Hugging Face's `tokenizers`.

A regular expression cuts text into pieces (pre-tokenisation), each piece becomes UTF-8 bytes, and on these the merges
learned in training are applied, earliest first (Sennrich et al. 2016; on bytes: GPT-2, Radford et al. 2019).

    tokenizer = BPETokenizer.from_pretrained(folder)   # tokenizer.json, vocab.bpe + encoder.json, .gguf or a hub name
    tokenizer = BPETokenizer.train(text, vocab_size=4096, special_tokens=("<|endoftext|>",))
    tokenizer.encode("The dog jumped over the")        # SmolLM2: [504, 2767, 25437, 690, 260]

Which files and pre-tokenisers are read stands in tokenizer_files.py, how conversations are written in chat.py.

Text is data: special-token text inside a text or a chat message stays text, unless `parse_special` (True, or the
tokens meant) or `special_in_content` says otherwise. Hugging Face's `__call__` always parses it; else ours is the same.
Added tokens that are not special ("special": false) are ordinary vocabulary and always recognised.

What both kinds of tokenizer have, so all a processor may ask for: `tok(text or list, padding=, truncation=,
max_length=, return_tensors="pt", add_special_tokens=)`, decode, batch_decode, convert_tokens_to_ids, len,
convert_ids_to_tokens, add_special_tokens({"additional_special_tokens": [...]}), save_pretrained, padding_side,
apply_chat_template(messages, tokenize=False), bos_token, eos_token, pad_token, unk_token and their _id.

Limits: letters and digits are those of each library's Unicode version, so the newest characters may be cut apart
differently; half a surrogate pair, which UTF-8 cannot hold, becomes U+FFFD; tiktoken before 0.13 takes quadratic time
on one word of many thousand letters.
"""

from __future__ import annotations

import codecs
import itertools
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path

import tiktoken

from lib import chat
from lib.bpe_ranks import rank_table
from lib.bpe_training import learn_merges
from lib.chat_template import OURS, named, write_templates
from lib.files import find_source, need, one_line, read_json, read_text, write_atomic
from lib.tokenizer_files import (
    BYTE_OF,
    CARRIED,
    CHAR_OF,
    MORE_TOKENS,
    NAMED_TOKENS,
    PUBLISHED_REGEXES,
    TOKENIZER_FILES,
    added_entries,
    added_entry,
    edges_of,
    make_spec,
    read_folder,
    read_gguf,
    read_model,
    regex_of,
    special_tokens,
    template_processing,
    to_bytes,
)

PROBE = "".join(map(chr, range(32, 127))) + "\n\t  a 12 \u00e9 \u4e2d \U0001f600\r\n"  # some of each kind of character
LONG_RUN = 50_000  # characters; on a million spaces in a row the regex engine inside tiktoken panics, its stack full


class StreamDecoder:
    """Text of ids that come one by one: push(id) gives what is complete, never half a character; flush() the rest."""

    def __init__(self, tokenizer: BPETokenizer, skip_special_tokens: bool = False):
        self._bytes_of = lambda token_id: tokenizer.decode_bytes([token_id], skip_special_tokens)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes_of(int(token_id)))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class BPETokenizer:
    """spec: the content of a tokenizer.json; config: of a tokenizer_config.json; source: what errors call them."""

    REFUSED_FLAGS = ("single_word", "lstrip", "rstrip")  # of added tokens
    encodes_parts_alone = True  # what stands between two special tokens has the ids that it has by itself

    def __init__(self, spec: dict, config: dict | None = None, source="tokenizer.json"):
        self._spec, self._added, self._finders, config = spec, {}, {}, config or {}
        self._vocab = self._read_model(spec, source)
        self._token_of = {i: token for token, i in self._vocab.items()}
        for entry in added_entries(spec, config, source):
            self._add(entry, source)
        self._configure(config, source)
        self._prepare(source)

    def _read_model(self, spec: dict, source) -> dict[str, int]:
        """The vocabulary."""
        vocab, self._merges = read_model(spec, source)
        return vocab

    def _prepare(self, source) -> None:
        """tiktoken's tables, once it is known which tokens are added ones."""
        plain = [token for token in self._vocab if token not in self._added]
        odd = [token for token in plain if not token or not BYTE_OF.keys() >= set(token)]
        need(not odd, source, f"tokens {odd[:3]} are not in GPT-2's byte alphabet, so this is not byte-level BPE")
        spec, model = self._spec, self._spec["model"]
        ranks, ids, self._apart = rank_table(self._vocab, self._merges, plain if model.get("ignore_merges") else ())
        # SmolLM2 has no token for 21 bytes, such as 0x04: they become unk_token if the model names one, else nothing.
        unknown = self._vocab.get(model.get("unk_token"))
        self._lost = bytes(byte for byte in range(256) if ids[byte] is None and unknown is None)
        self._ids = [unknown if i is None else i for i in ids]
        normalizer = spec.get("normalizer") or {"normalizers": []}
        steps = [step["type"] for step in normalizer.get("normalizers", [normalizer])]
        need(steps in ([], ["NFC"]), source, f"normalizer {steps} is not supported, only NFC is")
        self._nfc, self._regex = bool(steps), regex_of(spec.get("pre_tokenizer"), source)
        try:
            self._bpe = tiktoken.Encoding("bpe", pat_str=self._regex, mergeable_ranks=ranks, special_tokens={})
        except ValueError as error:
            raise ValueError(f"{source}: the pre_tokenizer's regex does not compile: {self._regex!r}") from error
        # On a piece without a byte tiktoken panics, which no except clause for errors catches.
        need(
            self._regex in PUBLISHED_REGEXES or all(self._pieces(PROBE)),
            source,
            f"the pre_tokenizer's regex cuts out empty pieces: {self._regex!r:.200}",
        )

    def _add(self, entry: dict, source) -> None:
        content, token_id = entry["content"], entry["id"]
        need(
            isinstance(content, str) and content and type(token_id) is int and token_id >= 0,
            source,
            f"added token {content!r} with id {token_id!r} needs a text and a number",
        )
        owner, known = self._token_of.get(token_id, content), self._id(content)
        need(
            owner == content and known in (None, token_id),
            source,
            f"added token {content!r} has id {token_id}, there {owner!r}; in the vocabulary it has {known}",
        )
        flags = [flag for flag in self.REFUSED_FLAGS if entry[flag]]
        need(not flags, source, f"added token {content!r} with {flags} is not supported")
        self._added[content], self._token_of[token_id], self._finders = entry, content, {}

    def _configure(self, config: dict, source) -> None:
        """Take over a tokenizer_config.json. As in transformers, special tokens it names are added where missing."""

        named, more = special_tokens(config, source)
        self.__dict__.update(dict.fromkeys(NAMED_TOKENS) | named)
        self._carried = {key: config[key] for key in CARRIED if key in config} | {
            name: token for name, token in named.items() if name not in NAMED_TOKENS}  # fmt: skip
        for token in (*named.values(), *more):
            if token in self._added:
                self._add(self._added[token] | {"special": True}, source)
            else:
                self.add_special_tokens([token])
        self.model_input_names = config.get("model_input_names", ["input_ids", "attention_mask"])  # transformers' default
        limit = config.get("model_max_length") or 0
        self.model_max_length = int(limit) if 0 < limit < 10**9 else None  # published files write 1e30 for none
        self.padding_side = config.get("padding_side", "right")
        self.chat_template = config.get("chat_template")
        if "add_bos_token" in config or "add_eos_token" in config:  # these overrule the post_processor
            bos, eos = (
                {token: self._id(token)} if token and config.get(f"add_{key}_token") else {}
                for key, token in (("bos", self.bos_token), ("eos", self.eos_token))
            )
            self._spec = self._spec | {"post_processor": template_processing(bos, eos)}
        self._before, self._after = self._edges(source)

    def _edges(self, source) -> tuple[list[int], list[int]]:
        """Ids around a text."""
        return edges_of(self._spec.get("post_processor"), source)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike) -> BPETokenizer:
        """Open a folder with tokenizer.json or GPT-2's two files, a tokenizer.json, a .gguf file, or a hub name.

        Raises FileNotFoundError or OSError if it is not to be had, ValueError if it is malformed or not byte-level BPE.
        """
        return cls.of(*read_files(source), source)

    @classmethod
    def of(cls, spec: dict, config: dict, source) -> BPETokenizer:
        """Of what files hold. Raises ValueError where it makes no sense, or is of another kind."""
        try:
            return cls(spec, config, source)
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"{source}: malformed tokenizer ({type(error).__name__}: {error})") from error

    @classmethod
    def train(
        cls, corpus, vocab_size: int, special_tokens: Iterable[str] = (), pattern: str = "gpt2", at_most: bool = False
    ) -> BPETokenizer:
        """Learn a vocabulary of special tokens (ids from 0), the 256 bytes and merges, in this order.

        corpus: a text, a path (os.PathLike) of a UTF-8 file, or an iterable of both. pattern: a name in PRE_TOKENIZERS
        or a regex. eos_token and pad_token become the special token known to end a turn, or else a text; with ChatML's
        <|im_start|> and <|im_end|> it writes conversations in ChatML.
        Raises ValueError if vocab_size does not hold bytes and special tokens, or is more than the corpus can give; at_most:
        then take what it gives.
        """
        special = list(dict.fromkeys(special_tokens))
        least, names = 256 + len(special), special + sorted(BYTE_OF)
        need(vocab_size >= least, "train", f"vocab_size {vocab_size} is too small: bytes and specials take {least}")
        added = [added_entry(token, i) for i, token in enumerate(special)]
        cutter = cls(make_spec({name: i for i, name in enumerate(names)}, [], pattern, added), source="train")
        words = Counter()
        for item in [corpus] if isinstance(corpus, (str, os.PathLike)) else corpus:
            text = read_text(Path(item)) if isinstance(item, os.PathLike) else item
            need(isinstance(text, str), "train", f"the corpus holds a {type(text).__name__}, not text or a path")
            words.update(cutter._pieces(text))
        spelled = Counter({"".join(map(CHAR_OF.__getitem__, piece)): n for piece, n in words.items()})
        merges = [list(pair) for pair in learn_merges(spelled, names, vocab_size, at_most)]
        ends = [end for end in ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>") if end in special]
        spec = make_spec({name: i for i, name in enumerate(names)}, merges, pattern, added)
        config = {"eos_token": ends[0], "pad_token": ends[0]} if ends else {}
        config["chat_template"] = OURS["chatml"] if {"<|im_start|>", "<|im_end|>"} <= {*special} else None
        return cls(spec, config, "train")

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json and tokenizer_config.json; from_pretrained and transformers' AutoTokenizer open them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {name: getattr(self, name) for name in (*NAMED_TOKENS, "model_max_length") if getattr(self, name)}
        config |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "padding_side": self.padding_side,
            "clean_up_tokenization_spaces": False,
            "model_input_names": self.model_input_names,
            **self._carried,
        }
        spec = self._spec | {"added_tokens": sorted(self._added.values(), key=lambda entry: entry["id"])}
        files = {"tokenizer.json": json.dumps(spec, ensure_ascii=False)}
        if self._templates:  # in both places: older and newer releases of transformers look in one each
            several = [{"name": name, "template": text} for name, text in self._templates.items()]
            config["chat_template"] = self.chat_template if self._templates.keys() == {"default"} else several
        files["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2)
        for name, text in files.items():
            write_atomic(folder / name, lambda tmp, text=text: tmp.write_bytes(text.encode()))
        write_templates(folder, self._templates)

    # --- vocabulary ---

    def __len__(self) -> int:
        """Rows that an embedding table needs: the largest id + 1, added tokens included."""
        return max(self._token_of) + 1

    @property
    def plain_size(self) -> int:
        """The same without added tokens: a model of this tokenizer has at least so many rows."""
        return max((i for token, i in self._vocab.items() if token not in self._added), default=-1) + 1

    vocab_size = property(__len__)
    bos_token_id = property(lambda self: self._id(self.bos_token))
    eos_token_id = property(lambda self: self._id(self.eos_token))
    pad_token_id = property(lambda self: self._id(self.pad_token))
    unk_token_id = property(lambda self: self._id(self.unk_token))

    def _id(self, token: str | None) -> int | None:
        return self._added[token]["id"] if token in self._added else self._vocab.get(token)

    def add_special_tokens(self, tokens: Iterable[str] | dict) -> int:
        """Append special tokens to the vocabulary; returns how many of them are new.

        tokens: a list, or Hugging Face's {"pad_token": "<pad>", "additional_special_tokens": [...]}.
        """
        if isinstance(tokens, dict):
            strange = tokens.keys() - {*NAMED_TOKENS, *MORE_TOKENS}
            need(not strange, "add_special_tokens", f"unknown keys {sorted(strange)}")
            named = {name: str(token) for name, token in tokens.items() if name in NAMED_TOKENS}
            self.__dict__.update(named)
            tokens = itertools.chain(named.values(), *(tokens[key] for key in MORE_TOKENS if key in tokens))
        need(not isinstance(tokens, str), "add_special_tokens", f"takes a list of tokens, not the text {tokens!r}")
        before, free = len(self._token_of), len(self) if self._token_of else 0
        for token in map(str, tokens):
            known = self._id(token)
            self._add(added_entry(token, free if known is None else known), "add_special_tokens")
            free += known is None
        return len(self._token_of) - before

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]):
        """Id of one token, or ids of several; unk_token_id (or None) for what is not in the vocabulary."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        known = self._id(tokens)
        return self.unk_token_id if known is None else known

    def convert_ids_to_tokens(self, ids: int | Iterable[int]):
        """Tokens as vocabulary files spell them (a space is `Ġ`), None for ids without one."""
        return self._token_of.get(ids) if isinstance(ids, int) else [self._token_of.get(i) for i in _to_ints(ids)]

    # --- text to ids ---

    @cached_property
    def _compiled(self):
        import regex  # tiktoken depends on it

        try:
            return regex.compile(self._regex)
        except regex.error as error:
            raise ValueError(f"the pre_tokenizer's regex does not compile ({error}): {self._regex!r:.200}") from error

    def _clean(self, text: str) -> str:
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return unicodedata.normalize("NFC", text) if self._nfc else text

    def _pieces(self, text: str) -> Iterable[bytes]:
        return (match[0].encode() for match in self._compiled.finditer(self._clean(text)))

    def _encode_ordinary(self, text: str) -> list[int]:
        """Ids of text without added tokens: by tiktoken in one go, or piece by piece where it would not do the same."""
        text = self._clean(text)
        lost = self._lost and len(text.encode().translate(None, self._lost)) < len(text.encode())
        builtin = self._regex in PUBLISHED_REGEXES
        long = len(text) > LONG_RUN and (not builtin or re.search(rf"\s{{{LONG_RUN}}}", text))
        if not (lost or long or self._apart):
            return [self._ids[rank] for rank in self._bpe.encode_ordinary(text)]
        ids = []
        for piece in self._pieces(text):
            kept = piece.translate(None, self._lost)
            if piece in self._apart:
                ids.append(self._apart[piece])
            elif kept:
                ids += [self._ids[rank] for rank in self._bpe._encode_single_piece(kept)]
        return ids

    def split_at_added(self, text: str, parse_special: bool | Collection[str]) -> list[str | int]:
        """The text cut at the added tokens that count here (leftmost, then longest): texts, and ids between them."""
        key = parse_special if isinstance(parse_special, bool) else frozenset(parse_special)
        if key not in self._finders:
            named = set(self._added if key is True else key or ())
            unknown = sorted(named - self._added.keys())
            need(not unknown, "special tokens", f"{unknown} are not in the vocabulary; add_special_tokens first")
            named |= {token for token, entry in self._added.items() if not entry["special"]}
            longest_first = "|".join(map(re.escape, sorted(named, key=len, reverse=True)))
            self._finders[key] = re.compile(f"({longest_first})" if named else "(?!)()")
        parts = self._finders[key].split(text)
        return [self._added[part]["id"] if i % 2 else part for i, part in enumerate(parts) if part]

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool | Collection[str] = False) -> list[int]:
        """Ids of a text.

        add_special_tokens: with what the vocabulary asks for around it (Llama 3: bos; GPT-2 and SmolLM2: nothing).
        parse_special: False keeps special-token text as text; True, or a collection of tokens, makes those special.
        """
        need(isinstance(text, str), "encode", f"takes a text, not a {type(text).__name__}")
        ids = []
        for part in self.split_at_added(text, parse_special):
            ids += [part] if isinstance(part, int) else self._encode_ordinary(part)
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def encode_batch(self, texts: Iterable[str], **options) -> list[list[int]]:
        return [self.encode(text, **options) for text in texts]

    def __call__(
        self,
        text: str | list[str],
        padding=False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        parse_special=False,
    ) -> dict:
        """{"input_ids", "attention_mask"} of a text, or of B texts.

        padding: True or "longest", or "max_length", on `padding_side`. truncation: drop the end, to max_length or
        model_max_length. return_tensors: None for lists, "pt" for int64 [B, T]. Raises ValueError if a pad token or a
        length is missing, or if rows of unequal length are to become a tensor.
        """
        before, after = (self._before, self._after) if add_special_tokens else ([], [])
        limit = max_length or self.model_max_length
        need(padding in (False, True, "longest", "max_length"), "padding", f"{padding!r} is not True or 'max_length'")
        need(limit or not (truncation or padding == "max_length"), "max_length", "is needed to cut or pad to it")
        room = max(limit - len(before) - len(after), 0) if truncation else None
        texts = [text] if isinstance(text, str) else text
        rows = [[*before, *self.encode(one, False, parse_special)[:room], *after] for one in texts]
        masks = [[1] * len(row) for row in rows]
        if padding:
            need(self.pad_token_id is not None, "padding", "no pad token; set tokenizer.pad_token to one")
            need(self.padding_side in ("left", "right"), "padding_side", f"{self.padding_side!r} is not left or right")
            width = limit if padding == "max_length" else max(map(len, rows), default=0)
            for row, mask in zip(rows, masks, strict=True):
                at, missing = 0 if self.padding_side == "left" else len(row), width - len(row)
                row[at:at], mask[at:at] = [self.pad_token_id] * missing, [0] * missing
        if return_tensors is None:
            rows, masks = (rows[0], masks[0]) if isinstance(text, str) else (rows, masks)
            return {"input_ids": rows, "attention_mask": masks}
        need(return_tensors == "pt", "return_tensors", f"{return_tensors!r} is not None or 'pt'")
        need(len({len(row) for row in rows}) == 1, "return_tensors", "no rows, or of unequal length; try padding=True")
        from torch import tensor

        return {"input_ids": tensor(rows), "attention_mask": tensor(masks)}

    # --- ids to text ---

    def decode_bytes(self, ids: Iterable[int], skip_special_tokens: bool = False) -> bytes:
        out = []
        for i in ids:
            need(i >= 0, "decode", f"{i} is not a token id (labels hold -100 where there is nothing to learn)")
            token = self._token_of.get(i, "")  # models may have more rows than tokens; these say nothing
            if token not in self._added:
                out.append(to_bytes(token))
            elif not (skip_special_tokens and self._added[token]["special"]):
                out.append(token.encode())
        return b"".join(out)

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        """Text of a row of ids (a list, an array, a tensor, or one id); bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(_to_ints(ids), skip_special_tokens).decode("utf-8", "replace")

    def batch_decode(self, rows, skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(row, skip_special_tokens) for row in rows]

    def stream_decoder(self, skip_special_tokens: bool = False) -> StreamDecoder:
        return StreamDecoder(self, skip_special_tokens)

    # --- chat ---

    @property
    def chat_template(self) -> str | None:
        """The Jinja text that conversations are written by, or None. May be set to one, to several by name, of which "default"
        is used, or to the name of one of ours (lib/chat_template.py)."""
        return self._templates.get("default")

    @chat_template.setter
    def chat_template(self, value: str | dict | list | None) -> None:
        self._templates = named(OURS.get(value, value) if isinstance(value, str) else value, "chat_template")

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens that have a name, as chat templates use them."""
        more = {name: token for name, token in self._carried.items() if name.endswith("_token")}
        return {name: getattr(self, name) for name in NAMED_TOKENS if getattr(self, name)} | more

    @property
    def around(self) -> tuple[list[int], list[int]]:
        """Ids that the vocabulary asks for before and after a text."""
        return self._before, self._after

    def special_in(self, text: str) -> list[str]:
        """The special tokens that a text spells."""
        found = {part for part in self.split_at_added(text, True) if isinstance(part, int)}
        return [self._token_of[i] for i in found if self._added[self._token_of[i]]["special"]]

    def encode_chat(
        self,
        messages: list[dict],
        add_generation_prompt: bool = False,
        return_assistant_mask: bool = False,
        special_in_content: Collection[str] = (),
    ):
        """Ids of a conversation [{"role": ..., "content": ...}, ...] in the chat template; with the mask of its answers:
        (ids, mask), see lib/chat.py. Inside contents only the tokens in `special_in_content` are special."""
        options = {"special_in_content": special_in_content, "answers": "all" if return_assistant_mask else "none"}
        ids, mask = chat.encode_conversation(self, messages, add_generation_prompt, **options)
        return (ids, mask) if return_assistant_mask else ids

    def apply_chat_template(self, messages: list[dict], tokenize: bool = True, add_generation_prompt: bool = False):
        """A conversation as ids or, with tokenize=False, as text whose special tokens are still to be parsed."""
        if tokenize:
            return self.encode_chat(messages, add_generation_prompt)
        written = chat.write(self, messages, add_generation_prompt)
        return chat.restore(written.text, written.hidden)


def load_tokenizer(source: str | os.PathLike) -> BPETokenizer:
    """The tokenizer of a checkpoint: ours where it is byte-level BPE, else read by the `tokenizers` library. Raises ValueError
    or FileNotFoundError where neither can read it."""
    spec, config = read_files(source)
    try:
        return BPETokenizer.of(spec, config, source)
    except ValueError as error:
        ours = one_line(error)
    from lib.library_tokenizer import LibraryTokenizer

    try:
        return LibraryTokenizer.of(spec, config, source)
    except ValueError as error:
        raise ValueError(f"{ours}; {one_line(error).removeprefix(f'{source}: ')}") from None


def read_files(source: str | os.PathLike) -> tuple[dict, dict]:
    """(a tokenizer.json, a tokenizer_config.json) of a folder, a .gguf file, a hub name, or a tokenizer.json itself."""
    if Path(source).is_file() and Path(source).suffix != ".gguf":
        return read_json(source), {}
    path = find_source(source, TOKENIZER_FILES)
    return read_folder(path) if path.is_dir() else read_gguf(path)


def _to_ints(ids) -> list[int]:
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    return [ids] if isinstance(ids, int) else [int(i) for i in ids]
