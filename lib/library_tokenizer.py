"""A tokenizer of another kind than byte-level BPE, read by the `tokenizers` library: `pip install tokenizers`.

    tokenizer = load_tokenizer("llava-folder")      # lib/tokenizer.py: BPETokenizer where it can read the files, else this one
    tokenizer.encode("What is this?")

SigLIP's Unigram, LLaMA-2's and Gemma's BPE on pieces of text with bytes for the rest, CLIP's with ends of words, WordPiece:
what tokenizer.json says is done by the library it was written for. The methods are BPETokenizer's, and text is data here,
too: special tokens in it stay text unless parse_special says otherwise.
"""

import json
from collections.abc import Collection, Iterable

from lib.files import need, one_line
from lib.tokenizer import BPETokenizer


class LibraryStream:
    """Text of ids that come one by one: push(id) gives what is complete, never half a character; flush() the rest. Pieces of
    text can depend on those before them (the first one's space is left out), so all are decoded each time."""

    def __init__(self, tokenizer: "LibraryTokenizer", skip_special_tokens: bool = False):
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens)
        self._ids, self._said = [], 0

    def push(self, token_id: int) -> str:
        self._ids.append(int(token_id))
        text = self._decode(self._ids)
        return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else self._more(text)

    def flush(self) -> str:
        return self._more(self._decode(self._ids))

    def _more(self, text: str) -> str:
        new, self._said = text[self._said :], len(text)
        return new


class LibraryTokenizer(BPETokenizer):
    """spec, config, source: as BPETokenizer's."""

    REFUSED_FLAGS, _nfc, encodes_parts_alone = (), False, False

    def _read_model(self, spec: dict, source) -> dict[str, int]:
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{source} is not byte-level BPE: `pip install tokenizers` to read it") from None
        self._make, self._parsers, self._spec = tokenizers.Tokenizer.from_str, {}, spec | {"truncation": None, "padding": None}
        model = spec.get("model")
        need(isinstance(model, dict), source, "no `model`, so this is not a tokenizer.json")
        vocab = model.get("vocab")
        if isinstance(vocab, list):  # Unigram's has a score with each
            vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
        need(isinstance(vocab, dict) and vocab, source, "model.vocab is empty or not a table of tokens")
        return vocab

    def _prepare(self, source) -> None:
        """Nothing: the library does it."""

    def _edges(self, source) -> tuple[list[int], list[int]]:
        found = self._parser(True).encode("a")
        text = [i for i, special in enumerate(found.special_tokens_mask) if not special] or [len(found.ids)]
        ids = self._stated(found.ids)
        return ids[: text[0]], ids[text[-1] + 1 :]

    def _add(self, entry: dict, source) -> None:
        super()._add(entry, source)
        self._parsers = {}

    def _parser(self, parse_special: bool | Collection[str]):
        """The library's tokenizer for which these special tokens mean something in a text."""
        wanted = parse_special if isinstance(parse_special, bool) else frozenset(parse_special)
        if isinstance(wanted, frozenset):
            unknown = sorted(wanted - self._added.keys())
            need(not unknown, "special tokens", f"{unknown} are not in the vocabulary; add_special_tokens first")
        key = wanted if isinstance(wanted, frozenset) else ()
        if key not in self._parsers:  # the library knows all or none: those that are wanted are none of the special ones then
            entries = sorted(self._added.values(), key=lambda entry: entry["id"])
            entries = [entry | {"special": entry["special"] and entry["content"] not in key} for entry in entries]
            try:
                parser = self._make(json.dumps(self._spec | {"added_tokens": entries}))
            except Exception as error:  # the library raises nothing more specific
                raise ValueError(f"the tokenizers library cannot read it ({one_line(error)})") from None
            self._parsers[key] = parser
            # It numbers added tokens one by one, whatever the file states.
            theirs = {parser.token_to_id(token): entry["id"] for token, entry in self._added.items()}
            self._moved = {library: stated for library, stated in theirs.items() if library != stated}
        parser = self._parsers[key]
        parser.encode_special_tokens = wanted is not True
        return parser

    def _stated(self, ids: Iterable[int]) -> list[int]:
        """The ids that the files state, of the library's."""
        return [self._moved.get(i, i) for i in ids] if self._moved else list(ids)

    def split_at_added(self, text: str, parse_special: bool | Collection[str]) -> list[str | int]:
        found, parts, at = self._parser(parse_special).encode(self._clean(text), add_special_tokens=False), [], 0
        added = {entry["id"] for entry in self._added.values()}
        for token, (start, stop) in zip(self._stated(found.ids), found.offsets, strict=True):
            if token in added:
                parts += [text[at:start], token]
                at = stop
        return [part for part in [*parts, text[at:]] if part != ""]

    def encode(
        self, text: str, add_special_tokens: bool = True, parse_special: bool | Collection[str] = False, follows: bool = False
    ) -> list[int]:
        """As BPETokenizer's. follows: the text, alone and without special tokens, stands right behind one."""
        need(isinstance(text, str), "encode", f"takes a text, not a {type(text).__name__}")
        plain = ("single_word", "lstrip", "rstrip")
        before = follows and next((t for t, e in self._added.items() if t not in text and not any(e[f] for f in plain)), None)
        if before:
            return self._stated(self._parser({before}).encode(before + self._clean(text), add_special_tokens=False).ids)[1:]
        return self._stated(self._parser(parse_special).encode(self._clean(text), add_special_tokens=add_special_tokens).ids)

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        """Text of a row of ids (a list, an array, a tensor, or one id)."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        ids = [ids] if isinstance(ids, int) else [int(i) for i in ids]
        negative = [i for i in ids if i < 0]
        need(not negative, "decode", f"{negative[:1]} is not a token id (labels hold -100 where there is nothing to learn)")
        parser = self._parser(True)
        back = {stated: library for library, stated in self._moved.items()}
        return parser.decode([back.get(i, i) for i in ids], skip_special_tokens=skip_special_tokens)

    def decode_bytes(self, ids: Iterable[int], skip_special_tokens: bool = False) -> bytes:
        return self.decode(ids, skip_special_tokens).encode()

    def stream_decoder(self, skip_special_tokens: bool = False) -> LibraryStream:
        return LibraryStream(self, skip_special_tokens)
