"""A SentencePiece file (tokenizer.model, spiece.model), as folders without tokenizer.json have it, made into a tokenizer.json.

The file is a protocol buffer: pieces of text with scores and kinds, how the model was trained, how text is normalized before
(sentencepiece_model.proto of https://github.com/google/sentencepiece; Kudo & Richardson 2018). What a tokenizer does around it
stands in no file, but in the class that tokenizer_config.json names: of those in CLASSES it is known here.
"""

import base64
import string
import struct
from collections.abc import Iterator
from pathlib import Path

from lib.files import need
from lib.tokenizer_files import added_entry

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # a space in pieces
BARE = {"version": "1.0", "normalizer": None, "pre_tokenizer": None, "post_processor": None}
UNIGRAM, BPE = 1, 2  # kinds of models
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces


# ---- the file --------------------------------------------------------------------------------------------------------


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A whole number, seven bits a byte, and where it ends."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """The fields of a message: (number, value)."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = varint(data, at)
        elif kind == 2:
            size, at = varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            size, form = {1: (8, "<d"), 5: (4, "<f")}[kind]
            (value,), at = struct.unpack(form, data[at : at + size]), at + size
        yield key >> 3, value


def read_pieces(path: Path) -> tuple[list[tuple[str, float, int]], dict, dict]:
    """(text, score, kind) of each piece in the order of ids; how it was trained and how it normalizes, by numbers of fields."""
    try:
        pieces, trained, normalized = [], {}, {}
        for key, value in fields(path.read_bytes()):
            if key == 1:
                piece = {1: b"", 2: 0.0, 3: NORMAL, **dict(fields(value))}
                pieces.append((piece[1].decode(), piece[2], piece[3]))
            elif key == 2:
                trained = dict(fields(value))
            elif key == 3:
                normalized = dict(fields(value))
    except (LookupError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{path} is not a SentencePiece model ({type(error).__name__}): it may be damaged") from None
    need(pieces, path, "is not a SentencePiece model: it has no pieces")
    return pieces, {3: UNIGRAM, 35: 0, 40: 0, **trained}, {2: b"", **normalized}


def merges_of(vocab: dict[str, int], scores: list[float] | None = None) -> list[tuple[str, str]]:
    """The merges that SentencePiece's BPE does: any two pieces that make a third, the one with the smallest id first, or with
    the highest score."""
    pairs = [(piece[:i], piece[i:]) for piece in vocab for i in range(1, len(piece))]
    pairs = [(left, right) for left, right in pairs if left in vocab and right in vocab]
    if scores:  # of pairs that make the same piece the order is transformers' in either case
        return sorted(pairs, key=lambda pair: (-scores[vocab[pair[0] + pair[1]]], -len(pair[0])))
    return sorted(pairs, key=lambda pair: (vocab[pair[0] + pair[1]], len(pair[0])))


def bpe_model(pieces: list[tuple[str, float, int]], unknown: int, by_score: bool = False, byte_fallback: bool = True) -> dict:
    """The "model" of a tokenizer.json."""
    vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
    merges = merges_of(vocab, [score for _, score, _ in pieces] if by_score else None)
    return {"type": "BPE", "unk_token": pieces[unknown][0], "fuse_unk": True, "byte_fallback": byte_fallback,
            "vocab": vocab, "merges": [list(pair) for pair in merges]}  # fmt: skip


def added_pieces(pieces: list[tuple[str, float, int]]) -> list[dict]:
    kinds = {CONTROL: True, USER_DEFINED: False}
    return [added_entry(text, i, kinds[kind]) for i, (text, _, kind) in enumerate(pieces) if kind in kinds]


# ---- what the classes of tokenizers do around it -----------------------------------------------------------------------


def replace(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(kind: str, parts: list[dict]) -> dict:
    return {"type": "Sequence", kind: parts}


def llama(config: dict) -> dict:
    scheme = "never" if config.get("add_prefix_space") is False else "always" if config.get("legacy") else "first"
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if scheme != "never" else []
    return {
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False},
        "decoder": sequence("decoders", [*TEXT_AGAIN, *strip]),
    }


def gemma(config: dict) -> dict:
    return {"normalizer": replace({"String": " "}, SPACE), "decoder": sequence("decoders", TEXT_AGAIN)}


def siglip(config: dict) -> dict:
    """As big_vision prepares captions: lower case, no punctuation, single spaces."""
    marks = "".join(f"\\{mark}" for mark in string.punctuation)
    lower = [] if config.get("do_lower_case") is False else [{"type": "Lowercase"}]
    steps = [replace({"Regex": f"[{marks}]"}, ""), replace({"Regex": r"\s+"}, " ")]
    return {
        "normalizer": sequence("normalizers", [*lower, *steps, {"type": "Strip", "strip_left": True, "strip_right": True}]),
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True},
        "decoder": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True},
    }


TEXT_AGAIN = [replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
# Of each class: what it does, the special tokens that it has unless the files name others, whether bos and eos stand around.
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
SIGLIP = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
CLASSES = {
    "LlamaTokenizer": (llama, LLAMA | {"add_bos_token": False, "add_eos_token": False}),
    "GemmaTokenizer": (gemma, GEMMA | {"add_bos_token": False, "add_eos_token": False}),
    "SiglipTokenizer": (siglip, SIGLIP | {"add_bos_token": False, "add_eos_token": True, "model_input_names": ["input_ids"]}),
}


def read_sentencepiece(path: Path, config: dict) -> tuple[dict, dict]:
    """(a tokenizer.json, a tokenizer_config.json) of the file and of the folder's tokenizer_config.json. Raises ValueError."""
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    need(
        kind in CLASSES,
        path,
        f"without a tokenizer.json it is read for a {', '.join(CLASSES)}, and this one is a {kind}: write one, with "
        "transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
    )
    around, defaults = CLASSES[kind]
    pieces, trained, normalized = read_pieces(path)
    need(trained[3] in (UNIGRAM, BPE), path, f"its model is of kind {trained[3]}: only Unigram and BPE are read")
    need(len({text for text, _, _ in pieces}) == len(pieces), path, "a piece occurs twice in it")
    if trained[3] == UNIGRAM:
        scored = [[text, score] for text, score, _ in pieces]
        model = {"type": "Unigram", "unk_id": trained[40], "vocab": scored, "byte_fallback": bool(trained[35])}
    else:
        model = bpe_model(pieces, trained[40], byte_fallback=bool(trained[35]))
    spec = BARE | {"model": model, "added_tokens": added_pieces(pieces)} | around(config)
    if normalized[2]:
        charsmap = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(normalized[2]).decode()}
        steps = [spec["normalizer"]] if spec["normalizer"] else []
        spec["normalizer"] = sequence("normalizers", [*steps, charsmap])
    return spec, defaults | config


def gguf_sentencepiece(tokens: list[str], scores: list[float], kinds: list[int], unknown: int, config: dict) -> dict:
    """A tokenizer.json of what the header of a .gguf file has of LLaMA's SentencePiece tokenizer."""
    pieces = list(zip(tokens, scores, kinds, strict=True))
    return BARE | {"model": bpe_model(pieces, unknown, by_score=True), "added_tokens": added_pieces(pieces)} | llama(config)
