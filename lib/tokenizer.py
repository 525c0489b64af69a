"""Byte-level BPE on tiktoken: text to token ids and back, with exactly the ids of Hugging Face's `tokenizers`.

A regular expression cuts text into pieces (pre-tokenisation), each piece becomes UTF-8 bytes, and on these the merges
learned in training are applied, earliest first (Sennrich et al. 2016; on bytes: GPT-2, Radford et al. 2019).

    tokenizer = BPETokenizer.from_pretrained(folder)   # tokenizer.json, vocab.bpe + encoder.json, .gguf or a hub name
    tokenizer = BPETokenizer.train(text, vocab_size=4096, special_tokens=("<|endoftext|>",))
    tokenizer.encode("The dog jumped over the")        # SmolLM2: [504, 2767, 25437, 690, 260]

Pre-tokenisers read: GPT-2's, SmolLM2's (digits apart), Llama 3's, Qwen2's, any other single Split regex. What is not
understood (Unigram, WordPiece, SentencePiece, normalizers other than NFC, ...) is refused with the reason.

Text is data: special-token text inside a text or a chat message stays text, unless `parse_special` (True, or the
tokens meant) or `special_in_content` says otherwise. Hugging Face's `__call__` always parses it; else ours is the same.
Added tokens that are not special ("special": false) are ordinary vocabulary and always recognised.

What both kinds of tokenizer have, so all a processor may ask for: `tok(text or list, padding=, truncation=,
max_length=, return_tensors="pt", add_special_tokens=)`, decode, batch_decode, convert_tokens_to_ids, len,
convert_ids_to_tokens, add_special_tokens({"additional_special_tokens": [...]}), save_pretrained, padding_side,
apply_chat_template(messages, tokenize=False), bos_token, eos_token, pad_token, unk_token and their _id.

Limits: chat templates are recognised, not executed ("llama3" is Llama 3's own, without the date lines of 3.1 and
later); letters and digits are those of each library's Unicode version, so the newest characters may be cut apart
differently; half a surrogate pair, which UTF-8 cannot hold, becomes U+FFFD; tiktoken before 0.13 takes quadratic time
on one word of many thousand letters.
"""

from __future__ import annotations

import codecs
import heapq
import itertools
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import tiktoken

from lib.files import write_atomic

# --- tables: pre-tokenisers and chat formats as published ---

GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits apart, then GPT-2's on what lies between: blanks before a digit end their part, so they stay together.
DIGITS_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_REGEX = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_REGEX = LLAMA3_REGEX.replace("{1,3}", "")
PUBLISHED_REGEXES = (GPT2_REGEX, DIGITS_REGEX, LLAMA3_REGEX, QWEN2_REGEX)
PROBE = "".join(map(chr, range(32, 127))) + "\n\t  a 12 \u00e9 \u4e2d \U0001f600\r\n"  # some of each kind of character


def _byte_level(use_regex: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(regex: str) -> dict:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}


PRE_TOKENIZERS = {
    "gpt2": _byte_level(True), "llama3": _split(LLAMA3_REGEX), "qwen2": _split(QWEN2_REGEX),
    "smollm2": {"type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(True)]}}
# llama.cpp's names for them (tokenizer.ggml.pre)
GGUF_PRE = {"gpt-2": "gpt2", "smollm": "smollm2", "starcoder": "smollm2", "refact": "smollm2", "llama-bpe": "llama3",
            "llama3": "llama3", "llama-v3": "llama3", "qwen2": "qwen2", "deepseek-r1-qwen": "qwen2"}
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")  # transformers' word for it up to 4, and from 5
LONG_RUN = 50_000  # characters; on a million blanks in a row the regex engine inside tiktoken panics, its stack full


class ChatFormat(NamedTuple):
    """A turn is start, role, middle, gap, content, end, tail. start, middle and end are special tokens (or empty).

    opens: bos_token comes before the first turn. strips: contents are trimmed. jinja: the same, for other tools.
    blank: what an answer begins with, and its reader strips.
    """

    start: str
    middle: str
    gap: str
    end: str
    tail: str
    opens: bool
    strips: bool
    jinja: str
    blank: str = ""


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
        r"{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"))}

# --- bytes and ranks ---


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes in vocabulary files: printable Latin-1 as it is, the other 68 from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTE_OF = _byte_alphabet()
CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}


def _to_bytes(token: str) -> bytes:
    return bytes(map(BYTE_OF.__getitem__, token))


def _last_parts(token: str, rank_of: dict[tuple[str, str], int]) -> tuple[str, ...]:
    """What the characters of `token`, merged in rank order, come down to: two parts, or more where no merge applies."""
    parts, never = list(token), len(rank_of)
    while len(parts) > 2:
        ranks = [rank_of.get(pair, never) for pair in itertools.pairwise(parts)]
        best = min(ranks)
        if best == never:
            break
        i = ranks.index(best)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def _rank_table(vocab: dict[str, int], merges: list[tuple[str, str]], whole: Iterable[str]):
    """Ranks that make tiktoken merge exactly as a list of merges says: (ranks, ids by rank, ids looked up apart).

    `tokenizers` joins two neighbours if the pair is listed, tiktoken if their bytes are in its table. Let T be a token.
    Until T is built, no merge crosses the edges of its bytes; so in any text the last two parts of T are those T comes
    down to alone. If that pair is listed, its place is T's rank, whatever other pairs spell T; if not, T is never built
    and stays out of the table. So at every step both choose the same merge, for every vocabulary.

    `whole` (Llama 3's ignore_merges): tokens that also stand for a piece they equal. Those that merging cannot reach
    may join the table, unless two parts would be left, which tiktoken would join anywhere, or bytes without a token
    could vanish from a piece and leave one: these are looked up apart.
    """
    rank_of = {pair: i for i, pair in enumerate(merges)}
    ranks, apart = {bytes([byte]): byte for byte in range(256)}, {}
    ids = [vocab.get(CHAR_OF[byte]) for byte in range(256)] + [None] * len(merges)
    complete = None not in ids[:256]
    for token in {left + right: None for left, right in merges}:
        rank = rank_of.get(_last_parts(token, rank_of))
        if rank is not None:
            ranks[_to_bytes(token)] = 256 + rank
            ids[256 + rank] = vocab[token]
    for token in whole:
        data = _to_bytes(token)
        if data not in ranks and complete and len(_last_parts(token, rank_of)) > 2:
            ranks[data] = len(ids)
            ids.append(vocab[token])
        elif data not in ranks:
            apart[data] = vocab[token]
    return ranks, ids, apart


# --- tokenizer.json: what is understood of it ---


def _need(condition, source, reason: str) -> None:
    if not condition:
        raise ValueError(f"{source}: {reason}")


def _regex_of(pre: dict | None, source) -> str:
    """The one regex that cuts text as tokenizer.json's `pre_tokenizer` does."""
    parts = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre or {}]
    kinds = [part.get("type") for part in parts]
    _need(kinds in (["ByteLevel"], ["Digits", "ByteLevel"], ["Split", "ByteLevel"]), source,
          f"pre_tokenizer {kinds} is none of ByteLevel, Digits + ByteLevel, Split + ByteLevel")
    options = parts[-1].get("add_prefix_space", False), parts[-1].get("use_regex", True)
    _need(options == (False, kinds[0] != "Split"), source,
          f"after {kinds[:-1]}, ByteLevel with add_prefix_space, use_regex = {options} is not supported")
    if kinds[0] == "ByteLevel":
        return GPT2_REGEX
    if kinds[0] == "Digits":
        _need(parts[0]["individual_digits"], source, "Digits with individual_digits=false is not supported")
        return DIGITS_REGEX
    regex, behaviour = parts[0]["pattern"].get("Regex"), (parts[0]["behavior"], parts[0]["invert"])
    _need(regex and behaviour == ("Isolated", False), source,
          f"Split by {parts[0]['pattern']} with behavior, invert = {behaviour} is not supported")
    # Isolated keeps what the regex leaves out as pieces too; tiktoken would drop it. These two leave nothing out.
    return regex if regex in (LLAMA3_REGEX, QWEN2_REGEX) else rf"{regex}|(?:(?!{regex})[\s\S])+"


def _edges(post: dict | None, source) -> tuple[list[int], list[int]]:
    """Ids that `post_processor` puts before and after a text (Llama 3: <|begin_of_text|> before)."""
    kind = post["type"] if post else "ByteLevel"
    _need(kind in ("ByteLevel", "Sequence", "TemplateProcessing"), source, f"post_processor {kind!r} is not supported")
    before, after = [], []
    for part in post["processors"] if kind == "Sequence" else ():
        inner = _edges(part, source)
        before, after = inner[0] + before, after + inner[1]
    side = before
    for step in post["single"] if kind == "TemplateProcessing" else ():
        if "Sequence" in step:
            side = after
        else:
            side.extend(post["special_tokens"][step["SpecialToken"]["id"]]["ids"])
    return before, after


def _template_processing(before: dict[str, int], after: dict[str, int]) -> dict:
    text, more = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    single = [{"SpecialToken": {"id": token, "type_id": 0}} for token in (*before, *after)]
    single.insert(len(before), text)
    tokens = {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in (before | after).items()}
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, more], "special_tokens": tokens}


def _read_model(spec: dict, source) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The checked vocabulary and merges of a tokenizer.json."""
    model = spec.get("model")
    _need(isinstance(model, dict), source, "no `model`, so this is not a tokenizer.json")
    kind, decoder = model.get("type", "BPE"), (spec.get("decoder") or {}).get("type", "ByteLevel")
    _need(kind == "BPE" and decoder == "ByteLevel", source,
          f"model {kind!r} with decoder {decoder!r} is not byte-level BPE, the only kind read")
    for option in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk"):
        _need(not model.get(option), source, f"{option}={model.get(option)!r} is not supported")
    vocab, merges = model.get("vocab"), model.get("merges")
    _need(isinstance(vocab, dict) and vocab, source, "model.vocab is empty or not a table of tokens")
    wrong = next((token for token, i in vocab.items() if type(i) is not int or not 0 <= i < 2**31), None)
    _need(wrong is None, source, f"token {wrong!r} has id {vocab.get(wrong)!r}, not a number from 0")
    _need(len(set(vocab.values())) == len(vocab), source, "two tokens of the vocabulary have the same id")
    _need(isinstance(merges, list), source, "model.merges is not a list")
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    for pair in pairs:
        _need(len(pair) == 2, source, f"merge {pair} is not of two tokens")
        unknown = [token for token in (*pair, pair[0] + pair[1]) if token not in vocab]
        _need(not unknown, source, f"merge {pair} names {unknown}, not in the vocabulary")
    return vocab, pairs


def _added_entry(content: str, token_id: int, special: bool = True) -> dict:
    return {"id": token_id, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": special}


def _make_spec(vocab: dict[str, int], merges: list, pre: str, added: list[dict], ignore_merges: bool = False) -> dict:
    """A tokenizer.json, the one form that every source is brought into. pre: a name in PRE_TOKENIZERS or a regex."""
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges,
             "vocab": vocab, "merges": merges}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
            "pre_tokenizer": PRE_TOKENIZERS.get(pre) or _split(pre),
            "post_processor": None, "decoder": _byte_level(True), "model": model}


# --- sources, each read into (spec, config): a tokenizer.json and a tokenizer_config.json ---


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from error


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON (line {error.lineno}: {error.msg})") from error
    _need(isinstance(value, dict), path, f"holds a JSON {type(value).__name__}, not an object")
    return value


def _from_folder(folder: Path) -> tuple[dict, dict]:
    config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        config |= _read_json(folder / name) if (folder / name).is_file() else {}
    if (folder / "chat_template.jinja").is_file():
        config["chat_template"] = _read_text(folder / "chat_template.jinja")
    if (folder / "tokenizer.json").is_file():
        return _read_json(folder / "tokenizer.json"), config
    for vocab_name, merges_name in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if (folder / vocab_name).is_file() and (folder / merges_name).is_file():
            vocab, lines = _read_json(folder / vocab_name), _read_text(folder / merges_name).splitlines()
            if "<|endoftext|>" in vocab:
                config = {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")} | config
            merges = [line for line in lines if line and not line.startswith("#version")]
            pre = "qwen2" if str(config.get("tokenizer_class")).startswith("Qwen2") else "gpt2"
            return _make_spec(vocab, merges, pre, []), config
    raise FileNotFoundError(f"{folder}: no tokenizer.json, vocab.bpe with encoder.json, or merges.txt with vocab.json")


def _from_gguf(path: Path) -> tuple[dict, dict]:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError(f"{path}: reading a .gguf file needs the gguf package (pip install gguf)") from error
    try:
        fields = GGUFReader(path).fields
        get = {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}.get
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: not a readable GGUF file ({error})") from error
    kind, pre, tokens = (get(f"tokenizer.ggml.{key}") for key in ("model", "pre", "tokens"))
    _need(kind == "gpt2", path, f"its tokenizer is {kind!r}; only byte-level BPE, there called 'gpt2', is read")
    _need(pre in GGUF_PRE, path, f"pre-tokeniser {pre!r} is not known; known are {', '.join(GGUF_PRE)}")
    vocab = {token: i for i, token in enumerate(tokens)}
    _need(len(vocab) == len(tokens), path, "a token occurs twice in its vocabulary")
    types = enumerate(get("tokenizer.ggml.token_type", ()))  # 3: control token, 4: added by users
    added = [_added_entry(tokens[i], i, kind == 3) for i, kind in types if kind in (3, 4)]
    llama3 = GGUF_PRE[pre] == "llama3"  # llama.cpp too takes ignore_merges and bos from the name
    config = {"chat_template": get("tokenizer.chat_template"), "add_eos_token": get("tokenizer.ggml.add_eos_token"),
              "add_bos_token": get("tokenizer.ggml.add_bos_token", llama3)}
    for name, key in zip(NAMED_TOKENS, ("bos", "eos", "unknown", "padding"), strict=True):
        number = get(f"tokenizer.ggml.{key}_token_id")
        config[name] = None if number is None else tokens[number]
    return _make_spec(vocab, get("tokenizer.ggml.merges"), GGUF_PRE[pre], added, ignore_merges=llama3), config


def _from_hub(name: str) -> tuple[dict, dict]:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        hint = "a hub name needs the huggingface_hub package (pip install huggingface_hub)"
        raise FileNotFoundError(f"{name}: no such file or folder; {hint}") from error
    try:
        files = ["tokenizer*.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt"]
        folder = snapshot_download(name, allow_patterns=files)
    except Exception as error:  # which errors the hub's client raises depends on its version and HTTP library
        reason = str(error).strip().split("\n")[0]
        raise OSError(f"{name}: no such file or folder, and not to be had from the hub ({reason})") from error
    return _from_folder(Path(folder))


# --- training ---


def _learn_merges(words: Counter[str], names: list[str], vocab_size: int, at_most: bool) -> list[tuple[str, str]]:
    """Join the most frequent pair, again and again, until `names` (extended in place) holds `vocab_size` tokens, or, if
    at_most, until no pair is left.

    Of equally frequent pairs the one with the smaller ids is first, which makes the merges those of `tokenizers`.
    Pair counts are kept up to date; a heap entry whose count went stale goes back in with the present one.
    """
    index = {name: i for i, name in enumerate(names)}
    symbols, weight = [[index[char] for char in word] for word in words], list(words.values())
    count, where, merges = Counter(), defaultdict(set), []
    for w, word in enumerate(symbols):
        for pair in itertools.pairwise(word):
            count[pair] += weight[w]
            where[pair].add(w)
    heap = [(-count[pair], pair, at) for pair, at in where.items()]
    heapq.heapify(heap)
    while len(names) < vocab_size:
        negative, pair, at = heapq.heappop(heap) if heap else (0, None, None)
        if at_most and negative == 0:
            break
        _need(negative < 0, "train", f"vocab_size {vocab_size} is too large: this corpus gives at most {len(names)}")
        if -negative != count[pair]:
            heapq.heappush(heap, (-count[pair], pair, at))
            continue
        left, right = pair
        merges.append((names[left], names[right]))
        new = index.setdefault(names[left] + names[right], len(names))  # two pairs may spell one token
        if new == len(names):
            names.append(names[left] + names[right])
        born = defaultdict(set)
        for w in at:
            word, i = symbols[w], 0
            while i < len(word) - 1:
                if word[i] == left and word[i + 1] == right:
                    word[i:i + 2] = [new]
                    before, after = word[i - 1:i] if i else [], word[i + 1:i + 2]
                    for pair in [(other, left) for other in before] + [(right, other) for other in after]:
                        count[pair] -= weight[w]
                    for pair in [(other, new) for other in before] + [(new, other) for other in after]:
                        count[pair] += weight[w]
                        born[pair].add(w)
                i += 1
        for pair, places in born.items():
            heapq.heappush(heap, (-count[pair], pair, places))
    return merges


# --- the tokenizer ---


class _Part(NamedTuple):
    """A stretch of a rendered chat: a special token, or text of the template, of a message, of an answer."""

    text: str
    special: bool = False
    content: bool = False
    answer: bool = False


class StreamDecoder:
    """Text of ids that come one by one: push(id) gives what is complete, never half a character; flush() the rest."""

    def __init__(self, tokenizer: BPETokenizer, skip_special_tokens: bool = False):
        self._bytes_of = lambda token_id: tokenizer._decode_bytes([token_id], skip_special_tokens)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes_of(int(token_id)))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class BPETokenizer:
    """spec: the content of a tokenizer.json; config: of a tokenizer_config.json; source: what errors call them."""

    def __init__(self, spec: dict, config: dict | None = None, source="tokenizer.json"):
        self._vocab, merges = _read_model(spec, source)
        self._spec, self._added, self._finders, config = spec, {}, {}, config or {}
        self._token_of = {i: token for token, i in self._vocab.items()}
        slow = [entry | {"id": int(i)} for i, entry in config.get("added_tokens_decoder", {}).items()]
        for entry in [*spec.get("added_tokens", ()), *slow]:
            self._add(_added_entry(entry["content"], entry["id"]) | entry, source)
        self._configure(config, source)
        plain = [token for token in self._vocab if token not in self._added]
        odd = [token for token in plain if not token or not BYTE_OF.keys() >= set(token)]
        _need(not odd, source, f"tokens {odd[:3]} are not in GPT-2's byte alphabet, so this is not byte-level BPE")
        model = spec["model"]
        ranks, ids, self._apart = _rank_table(self._vocab, merges, plain if model.get("ignore_merges") else ())
        # SmolLM2 has no token for 21 bytes, such as 0x04: they become unk_token if the model names one, else nothing.
        unknown = self._vocab.get(model.get("unk_token"))
        self._lost = bytes(byte for byte in range(256) if ids[byte] is None and unknown is None)
        self._ids = [unknown if i is None else i for i in ids]
        normalizer = spec.get("normalizer") or {"normalizers": []}
        steps = [step["type"] for step in normalizer.get("normalizers", [normalizer])]
        _need(steps in ([], ["NFC"]), source, f"normalizer {steps} is not supported, only NFC is")
        self._nfc, self._regex = bool(steps), _regex_of(spec.get("pre_tokenizer"), source)
        try:
            self._bpe = tiktoken.Encoding("bpe", pat_str=self._regex, mergeable_ranks=ranks, special_tokens={})
        except ValueError as error:
            raise ValueError(f"{source}: the pre_tokenizer's regex does not compile: {self._regex!r}") from error
        # On a piece without a byte tiktoken panics, which no except clause for errors catches.
        _need(self._regex in PUBLISHED_REGEXES or all(self._pieces(PROBE)), source,
              f"the pre_tokenizer's regex cuts out empty pieces: {self._regex!r:.200}")

    def _add(self, entry: dict, source) -> None:
        content, token_id = entry["content"], entry["id"]
        _need(isinstance(content, str) and content and type(token_id) is int and token_id >= 0, source,
              f"added token {content!r} with id {token_id!r} needs a text and a number")
        owner, known = self._token_of.get(token_id, content), self._id(content)
        _need(owner == content and known in (None, token_id), source,
              f"added token {content!r} has id {token_id}, there {owner!r}; in the vocabulary it has {known}")
        flags = [flag for flag in ("single_word", "lstrip", "rstrip") if entry[flag]]
        _need(not flags, source, f"added token {content!r} with {flags} is not supported")
        self._added[content], self._token_of[token_id], self._finders = entry, content, {}

    def _configure(self, config: dict, source) -> None:
        """Take over a tokenizer_config.json. As in transformers, special tokens it names are added where missing."""
        def text(token):
            token = token["content"] if isinstance(token, dict) else token
            _need(token is None or isinstance(token, str), source, f"{token!r:.80} is named as a special token, and is no text")
            return token

        for name in NAMED_TOKENS:
            setattr(self, name, text(config.get(name)))
        extra = [text(token) for key in MORE_TOKENS for token in config.get(key) or ()]
        self.add_special_tokens([token for token in (*map(self.__dict__.get, NAMED_TOKENS), *extra) if token])
        limit = config.get("model_max_length") or 0
        self.model_max_length = int(limit) if 0 < limit < 10**9 else None  # published files write 1e30 for none
        self.padding_side = config.get("padding_side", "right")
        template = config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        fitting = [name for name, form in CHAT_FORMATS.items() if {form.start, form.end} <= self._added.keys()]
        self.chat_template = template or (fitting[0] if fitting else None)
        if "add_bos_token" in config or "add_eos_token" in config:  # these overrule the post_processor
            bos, eos = ({token: self._id(token)} if token and config.get(f"add_{key}_token") else {}
                        for key, token in (("bos", self.bos_token), ("eos", self.eos_token)))
            self._spec = self._spec | {"post_processor": _template_processing(bos, eos)}
        self._before, self._after = _edges(self._spec.get("post_processor"), source)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike) -> BPETokenizer:
        """Open a folder with tokenizer.json or GPT-2's two files, a tokenizer.json, a .gguf file, or a hub name.

        Raises FileNotFoundError or OSError if it is not to be had, ValueError if it is malformed or not byte-level BPE.
        """
        path = Path(source)
        if path.is_dir():
            spec, config = _from_folder(path)
        elif path.is_file():
            spec, config = _from_gguf(path) if path.suffix == ".gguf" else (_read_json(path), {})
        elif re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(source)) and path.suffix not in (".json", ".gguf"):
            spec, config = _from_hub(str(source))
        else:
            raise FileNotFoundError(f"{source}: no such file or folder")
        try:
            return cls(spec, config, source)
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"{source}: malformed tokenizer ({type(error).__name__}: {error})") from error

    @classmethod
    def train(cls, corpus, vocab_size: int, special_tokens: Iterable[str] = (), pattern: str = "gpt2",
              at_most: bool = False) -> BPETokenizer:
        """Learn a vocabulary of special tokens (ids from 0), the 256 bytes and merges, in this order.

        corpus: a text, a path (os.PathLike) of a UTF-8 file, or an iterable of both. pattern: a name in PRE_TOKENIZERS
        or a regex. eos_token and pad_token become the special token known to end a turn, or else a text.
        Raises ValueError if vocab_size does not hold bytes and special tokens, or is more than the corpus can give; at_most:
        then take what it gives.
        """
        special = list(dict.fromkeys(special_tokens))
        least, names = 256 + len(special), special + sorted(BYTE_OF)
        _need(vocab_size >= least, "train", f"vocab_size {vocab_size} is too small: bytes and specials take {least}")
        added = [_added_entry(token, i) for i, token in enumerate(special)]
        cutter = cls(_make_spec({name: i for i, name in enumerate(names)}, [], pattern, added), source="train")
        words = Counter()
        for item in [corpus] if isinstance(corpus, (str, os.PathLike)) else corpus:
            text = _read_text(Path(item)) if isinstance(item, os.PathLike) else item
            _need(isinstance(text, str), "train", f"the corpus holds a {type(text).__name__}, not text or a path")
            words.update(cutter._pieces(text))
        spelled = Counter({"".join(map(CHAR_OF.__getitem__, piece)): n for piece, n in words.items()})
        merges = [list(pair) for pair in _learn_merges(spelled, names, vocab_size, at_most)]
        ends = [end for end in ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>") if end in special]
        spec = _make_spec({name: i for i, name in enumerate(names)}, merges, pattern, added)
        return cls(spec, {"eos_token": ends[0], "pad_token": ends[0]} if ends else {}, "train")

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json and tokenizer_config.json; from_pretrained and transformers' AutoTokenizer open them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {name: getattr(self, name) for name in (*NAMED_TOKENS, "model_max_length") if getattr(self, name)}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": self.padding_side,
                   "clean_up_tokenization_spaces": False}
        spec = self._spec | {"added_tokens": sorted(self._added.values(), key=lambda entry: entry["id"])}
        files = {"tokenizer.json": json.dumps(spec, ensure_ascii=False)}
        if self._jinja:  # in both places: older and newer releases of transformers look in one each
            config["chat_template"] = files["chat_template.jinja"] = self._jinja
        else:
            (folder / "chat_template.jinja").unlink(missing_ok=True)
        files["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2)
        for name, text in files.items():
            write_atomic(folder / name, lambda tmp, text=text: tmp.write_bytes(text.encode()))

    # --- vocabulary ---

    def __len__(self) -> int:
        """Rows that an embedding table needs: the largest id + 1, added tokens included."""
        return max(self._token_of) + 1

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
            _need(not strange, "add_special_tokens", f"unknown keys {sorted(strange)}")
            named = {name: str(token) for name, token in tokens.items() if name in NAMED_TOKENS}
            self.__dict__.update(named)
            tokens = itertools.chain(named.values(), *(tokens[key] for key in MORE_TOKENS if key in tokens))
        _need(not isinstance(tokens, str), "add_special_tokens", f"takes a list of tokens, not the text {tokens!r}")
        before, free = len(self._token_of), len(self) if self._token_of else 0
        for token in map(str, tokens):
            known = self._id(token)
            self._add(_added_entry(token, free if known is None else known), "add_special_tokens")
            free += known is None
        return len(self._token_of) - before

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]):
        """Id of one token, or ids of several; unk_token_id (or None) for what is not in the vocabulary."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        known = self._id(tokens)
        return self.unk_token_id if known is None else known

    def convert_ids_to_tokens(self, ids: int | Iterable[int]):
        """Tokens as vocabulary files spell them (a blank is `Ġ`), None for ids without one."""
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

    def _cut(self, text: str, parse_special: bool | Collection[str]) -> list[str | int]:
        """The text cut at the added tokens that count here (leftmost, then longest): texts, and ids between them."""
        key = parse_special if isinstance(parse_special, bool) else frozenset(parse_special)
        if key not in self._finders:
            named = set(self._added if key is True else key or ())
            unknown = sorted(named - self._added.keys())
            _need(not unknown, "special tokens", f"{unknown} are not in the vocabulary; add_special_tokens first")
            named |= {token for token, entry in self._added.items() if not entry["special"]}
            longest_first = "|".join(map(re.escape, sorted(named, key=len, reverse=True)))
            self._finders[key] = re.compile(f"({longest_first})" if named else "(?!)()")
        parts = self._finders[key].split(text)
        return [self._added[part]["id"] if i % 2 else part for i, part in enumerate(parts) if part]

    def encode(self, text: str, add_special_tokens: bool = True,
               parse_special: bool | Collection[str] = False) -> list[int]:
        """Ids of a text.

        add_special_tokens: with what the vocabulary asks for around it (Llama 3: bos; GPT-2 and SmolLM2: nothing).
        parse_special: False keeps special-token text as text; True, or a collection of tokens, makes those special.
        """
        _need(isinstance(text, str), "encode", f"takes a text, not a {type(text).__name__}")
        ids = []
        for part in self._cut(text, parse_special):
            ids += [part] if isinstance(part, int) else self._encode_ordinary(part)
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def encode_batch(self, texts: Iterable[str], **options) -> list[list[int]]:
        return [self.encode(text, **options) for text in texts]

    def __call__(self, text: str | list[str], padding=False, truncation: bool = False, max_length: int | None = None,
                 return_tensors: str | None = None, add_special_tokens: bool = True, parse_special=False) -> dict:
        """{"input_ids", "attention_mask"} of a text, or of B texts.

        padding: True or "longest", or "max_length", on `padding_side`. truncation: drop the end, to max_length or
        model_max_length. return_tensors: None for lists, "pt" for int64 [B, T]. Raises ValueError if a pad token or a
        length is missing, or if rows of unequal length are to become a tensor.
        """
        before, after = (self._before, self._after) if add_special_tokens else ([], [])
        limit = max_length or self.model_max_length
        _need(padding in (False, True, "longest", "max_length"), "padding", f"{padding!r} is not True or 'max_length'")
        _need(limit or not (truncation or padding == "max_length"), "max_length", "is needed to cut or pad to it")
        room = max(limit - len(before) - len(after), 0) if truncation else None
        texts = [text] if isinstance(text, str) else text
        rows = [[*before, *self.encode(one, False, parse_special)[:room], *after] for one in texts]
        masks = [[1] * len(row) for row in rows]
        if padding:
            _need(self.pad_token_id is not None, "padding", "no pad token; set tokenizer.pad_token to one")
            _need(self.padding_side in ("left", "right"), "padding_side", f"{self.padding_side!r} is not left or right")
            width = limit if padding == "max_length" else max(map(len, rows), default=0)
            for row, mask in zip(rows, masks, strict=True):
                at, missing = 0 if self.padding_side == "left" else len(row), width - len(row)
                row[at:at], mask[at:at] = [self.pad_token_id] * missing, [0] * missing
        if return_tensors is None:
            rows, masks = (rows[0], masks[0]) if isinstance(text, str) else (rows, masks)
            return {"input_ids": rows, "attention_mask": masks}
        _need(return_tensors == "pt", "return_tensors", f"{return_tensors!r} is not None or 'pt'")
        _need(len({len(row) for row in rows}) == 1, "return_tensors", "no rows, or of unequal length; try padding=True")
        from torch import tensor

        return {"input_ids": tensor(rows), "attention_mask": tensor(masks)}

    # --- ids to text ---

    def _decode_bytes(self, ids: Iterable[int], skip_special_tokens: bool = False) -> bytes:
        out = []
        for i in ids:
            _need(i >= 0, "decode", f"{i} is not a token id (labels hold -100 where there is nothing to learn)")
            token = self._token_of.get(i, "")  # models may have more rows than tokens; these say nothing
            if token not in self._added:
                out.append(_to_bytes(token))
            elif not (skip_special_tokens and self._added[token]["special"]):
                out.append(token.encode())
        return b"".join(out)

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        """Text of a row of ids (a list, an array, a tensor, or one id); bytes that are not UTF-8 become U+FFFD."""
        return self._decode_bytes(_to_ints(ids), skip_special_tokens).decode("utf-8", "replace")

    def batch_decode(self, rows, skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(row, skip_special_tokens) for row in rows]

    def stream_decoder(self, skip_special_tokens: bool = False) -> StreamDecoder:
        return StreamDecoder(self, skip_special_tokens)

    # --- chat ---

    @property
    def chat_template(self) -> str | None:
        """A name in CHAT_FORMATS, or None. May be set to such a name, or to a published Jinja text to be recognised."""
        return self._chat_format

    @chat_template.setter
    def chat_template(self, value: str | None) -> None:
        self._jinja = CHAT_FORMATS[value].jinja if value in CHAT_FORMATS else value
        self._chat_format, self._system = None, None
        for name, form in CHAT_FORMATS.items():
            signs = [form.jinja] if form.blank else [form.start, form.end]
            if self._jinja and all(sign in self._jinja for sign in signs):
                opening = re.escape(form.start + "system" + form.middle) + r"(?:\n|\\n)+"
                system = re.search(opening + r"([^'\"{}<|]+)" + re.escape(form.end), self._jinja)
                self._chat_format, self._system = name, system[1] if system else None

    @property
    def answer_blank(self) -> str:
        """What the chat template writes before an answer, and a model says first."""
        return CHAT_FORMATS[self._chat_format].blank if self._chat_format else ""

    def _chat_parts(self, messages: list[dict], add_generation_prompt: bool) -> list[_Part]:
        _need(self._chat_format, "chat", f"no known template; set chat_template to one of {list(CHAT_FORMATS)}")
        form = CHAT_FORMATS[self._chat_format]
        lacking = [token for token in (form.start, form.middle, form.end) if token and token not in self._added]
        _need(not lacking, "chat", f"{self._chat_format} needs the tokens {lacking}; add_special_tokens first")
        _need(isinstance(messages, (list, tuple)) and messages, "chat", f"{messages!r} is not a list of messages")
        for message in messages:
            good = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
            _need(good, "chat", f"a message is {{'role': text, 'content': text}}, not {message!r}")

        def opening(role):
            return [_Part(form.start, special=True), _Part(role), _Part(form.middle, special=True), _Part(form.gap)]

        parts = [_Part(self.bos_token or "", special=True)] if form.opens else []
        if self._system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._system}, *messages]
        for message in messages:
            answer = message["role"] == "assistant"
            content = message["content"].strip() if form.strips else message["content"]
            parts += [*opening(message["role"]), _Part(form.blank if answer else ""),
                      _Part(content, content=True, answer=answer),
                      _Part(form.end, special=True, answer=answer), _Part(form.tail)]
        return [part for part in parts + (opening("assistant") if add_generation_prompt else []) if part.text]

    def encode_chat(self, messages: list[dict], add_generation_prompt: bool = False,
                    return_assistant_mask: bool = False, special_in_content: Collection[str] = ()):
        """Ids of a conversation [{"role": ..., "content": ...}, ...] in the chat template; with the mask: (ids, mask).

        The mask is 1 on the tokens of the assistant's answers and on the token that ends each: there a loss counts.
        Inside contents only the tokens in `special_in_content` are recognised; all other text stays text. What stands
        between two special tokens is encoded as one text, so the ids are those of the rendered template.
        """
        flat = []
        for part in self._chat_parts(messages, add_generation_prompt):
            pieces = self._cut(part.text, special_in_content) if part.content else [part.text]
            flat += [(self._id(piece) if part.special else piece, part.answer) for piece in pieces]
        ids, mask = [], []
        for is_text, group in itertools.groupby(flat, key=lambda item: isinstance(item[0], str)):
            run, answers = zip(*group, strict=True)
            if is_text:  # of the template, then perhaps of an answer, which begins `header` bytes into the run
                texts = zip(run, answers, strict=True)
                header = sum(len(text.encode("utf-8", "replace")) for text, answer in texts if not answer)
                run = self.encode("".join(run), add_special_tokens=False)
                ends = itertools.accumulate(len(self._decode_bytes([i])) for i in run)
                answers = [any(answers) and end > header for end in ends]
            ids += run
            mask += map(int, answers)
        return (ids, mask) if return_assistant_mask else ids

    def apply_chat_template(self, messages: list[dict], tokenize: bool = True, add_generation_prompt: bool = False):
        """A conversation as ids or, with tokenize=False, as text whose special tokens are still to be parsed."""
        if tokenize:
            return self.encode_chat(messages, add_generation_prompt)
        return "".join(part.text for part in self._chat_parts(messages, add_generation_prompt))


def _to_ints(ids) -> list[int]:
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    return [ids] if isinstance(ids, int) else [int(i) for i in ids]


def stop_tokens(tokenizer) -> set[int]:
    """Ids that end an answer: the tokenizer's eos_token and the ends of turn of known chat templates."""
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (*(f.end for f in CHAT_FORMATS.values()), "<|endoftext|>")]
    return ({*ends} - {None, tokenizer.unk_token_id} | {tokenizer.eos_token_id}) - {None}
