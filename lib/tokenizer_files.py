"""What tokenizer files say: the pre-tokenisers that are known, and every source brought into one form, a tokenizer.json.

Sources: tokenizer.json, GPT-2's vocab.bpe + encoder.json, vocab.json + merges.txt, the header of a .gguf file. What is not
byte-level BPE, or not understood, is refused with the reason.
"""

import json
from pathlib import Path

from lib.chat_template import TEMPLATE_FILES, read_templates
from lib.files import need, read_if_there, read_json, read_text

GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits apart, then GPT-2's on what lies between: spaces before a digit end their part, so they stay together.
DIGITS_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_REGEX = LLAMA3_REGEX.replace("{1,3}", "")
PUBLISHED_REGEXES = (GPT2_REGEX, DIGITS_REGEX, LLAMA3_REGEX, QWEN2_REGEX)


def byte_level(use_regex: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def split_by(regex: str) -> dict:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level(False)]}


PRE_TOKENIZERS = {
    "gpt2": byte_level(True),
    "llama3": split_by(LLAMA3_REGEX),
    "qwen2": split_by(QWEN2_REGEX),
    "smollm2": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level(True)]},
}
# llama.cpp's names for them (tokenizer.ggml.pre)
GGUF_PRE = {
    "gpt-2": "gpt2",
    "smollm": "smollm2",
    "starcoder": "smollm2",
    "refact": "smollm2",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
}
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
NUMBERED_FIRST = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")  # of new ones
MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")  # transformers' word for it up to 4, and from 5

# What else of a tokenizer_config.json goes along when a tokenizer is saved.
CARRIED = ("clean_up_tokenization_spaces", "do_lower_case")

TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "vocab.json", "merges.txt", "*processor_config.json")
TOKENIZER_FILES += ("added_tokens.json", "*.model", *TEMPLATE_FILES)

# --- bytes as text ---


def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes in vocabulary files: printable Latin-1 as it is, the other 68 from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTE_OF = byte_alphabet()
CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}


def to_bytes(token: str) -> bytes:
    return bytes(map(BYTE_OF.__getitem__, token))


# --- tokenizer.json: what is understood of it ---


def regex_of(pre: dict | None, source) -> str:
    """The one regex that cuts text as tokenizer.json's `pre_tokenizer` does."""
    parts = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre or {}]
    kinds = [part.get("type") for part in parts]
    need(
        kinds in (["ByteLevel"], ["Digits", "ByteLevel"], ["Split", "ByteLevel"]),
        source,
        f"pre_tokenizer {kinds} is none of ByteLevel, Digits + ByteLevel, Split + ByteLevel",
    )
    options = parts[-1].get("add_prefix_space", False), parts[-1].get("use_regex", True)
    need(
        options == (False, kinds[0] != "Split"),
        source,
        f"after {kinds[:-1]}, ByteLevel with add_prefix_space, use_regex = {options} is not supported",
    )
    if kinds[0] == "ByteLevel":
        return GPT2_REGEX
    if kinds[0] == "Digits":
        need(parts[0]["individual_digits"], source, "Digits with individual_digits=false is not supported")
        return DIGITS_REGEX
    regex, behaviour = parts[0]["pattern"].get("Regex"), (parts[0]["behavior"], parts[0]["invert"])
    need(
        regex and behaviour == ("Isolated", False),
        source,
        f"Split by {parts[0]['pattern']} with behavior, invert = {behaviour} is not supported",
    )
    # Isolated keeps what the regex leaves out as pieces too; tiktoken would drop it. These two leave nothing out.
    return regex if regex in (LLAMA3_REGEX, QWEN2_REGEX) else rf"{regex}|(?:(?!{regex})[\s\S])+"


def edges_of(post: dict | None, source) -> tuple[list[int], list[int]]:
    """Ids that `post_processor` puts before and after a text (Llama 3: <|begin_of_text|> before)."""
    kind = post["type"] if post else "ByteLevel"
    need(kind in ("ByteLevel", "Sequence", "TemplateProcessing"), source, f"post_processor {kind!r} is not supported")
    before, after = [], []
    for part in post["processors"] if kind == "Sequence" else ():
        inner = edges_of(part, source)
        before, after = inner[0] + before, after + inner[1]
    side = before
    for step in post["single"] if kind == "TemplateProcessing" else ():
        if "Sequence" in step:
            side = after
        else:
            side.extend(post["special_tokens"][step["SpecialToken"]["id"]]["ids"])
    return before, after


def template_processing(before: dict[str, int], after: dict[str, int]) -> dict:
    text, more = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    single = [{"SpecialToken": {"id": token, "type_id": 0}} for token in (*before, *after)]
    single.insert(len(before), text)
    tokens = {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in (before | after).items()}
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, more], "special_tokens": tokens}


def read_model(spec: dict, source) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The checked vocabulary and merges of a tokenizer.json."""
    model = spec.get("model")
    need(isinstance(model, dict), source, "no `model`, so this is not a tokenizer.json")
    kind, decoder = model.get("type", "BPE"), (spec.get("decoder") or {}).get("type", "ByteLevel")
    need(
        kind == "BPE" and decoder == "ByteLevel",
        source,
        f"model {kind!r} with decoder {decoder!r} is not byte-level BPE, the only kind read",
    )
    for option in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk"):
        need(not model.get(option), source, f"{option}={model.get(option)!r} is not supported")
    vocab, merges = model.get("vocab"), model.get("merges")
    need(isinstance(vocab, dict) and vocab, source, "model.vocab is empty or not a table of tokens")
    wrong = next((token for token, i in vocab.items() if type(i) is not int or not 0 <= i < 2**31), None)
    need(wrong is None, source, f"token {wrong!r} has id {vocab.get(wrong)!r}, not a number from 0")
    need(len(set(vocab.values())) == len(vocab), source, "two tokens of the vocabulary have the same id")
    need(isinstance(merges, list), source, "model.merges is not a list")
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    for pair in pairs:
        need(len(pair) == 2, source, f"merge {pair} is not of two tokens")
        unknown = [token for token in (*pair, pair[0] + pair[1]) if token not in vocab]
        need(not unknown, source, f"merge {pair} names {unknown}, not in the vocabulary")
    return vocab, pairs


def added_entry(content: str, token_id: int, special: bool = True) -> dict:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, **plain, "special": special}


def added_entries(spec: dict, config: dict, source) -> list[dict]:
    """The added tokens, each with the id that its file states: of tokenizer.json, then what tokenizer_config.json or
    added_tokens.json (see read_folder) say of the same or of more, by id."""
    slow = config.get("added_tokens_decoder", {})
    need(isinstance(slow, dict), source, f"added_tokens_decoder is {slow!r:.80}: it must be a table of tokens by id")
    entries = [{**entry, "id": int(i) if str(i).isdecimal() else i} for i, entry in slow.items()]
    found = [*(spec.get("added_tokens") or ()), *sorted(entries, key=lambda entry: entry["id"])]
    return [added_entry(entry["content"], entry["id"]) | entry for entry in found]


def special_tokens(config: dict, source) -> tuple[dict[str, str], list[str]]:
    """The special tokens that a tokenizer_config.json names: by name ("bos_token", ..., "image_token"), and the others."""

    def text(token):
        token = token.get("content", token) if isinstance(token, dict) else token
        need(token is None or isinstance(token, str), source, f"{token!r:.80} is named as a special token, and is no text")
        return token

    # "add_bos_token" and the like are no tokens: their values are true or false.
    named = {key: text(value) for key, value in config.items() if key.endswith("_token") and not isinstance(value, bool)}
    more = []
    for key in MORE_TOKENS:
        tokens = config.get(key) or []
        if isinstance(tokens, dict):  # by name, too
            named |= {name: text(token) for name, token in tokens.items()}
        else:
            need(isinstance(tokens, list), source, f"{key} is {tokens!r:.80}: it must be a list or a table of tokens")
            more += map(text, tokens)
    order = dict.fromkeys((*NUMBERED_FIRST, *named))
    return {name: named[name] for name in order if named.get(name)}, more


def make_spec(vocab: dict[str, int], merges: list, pre: str, added: list[dict], ignore_merges: bool = False) -> dict:
    """A tokenizer.json, the one form that every source is brought into. pre: a name in PRE_TOKENIZERS or a regex."""
    model = {"type": "BPE", **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))}
    model |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges, "vocab": vocab, "merges": merges}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": PRE_TOKENIZERS.get(pre) or split_by(pre),
        "post_processor": None,
        "decoder": byte_level(True),
        "model": model,
    }


# --- sources, each read into (spec, config): a tokenizer.json and a tokenizer_config.json ---


def read_folder(folder: Path) -> tuple[dict, dict]:
    """tokenizer_config.json, with what older folders have in files of their own, is believed in the order of transformers."""
    files = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    config, named, added = (read_if_there(folder / name) for name in files)
    if "added_tokens_decoder" not in config:
        config |= named
        special = {*special_tokens(config, folder)[0].values(), *special_tokens(config, folder)[1]}
        config["added_tokens_decoder"] = {
            i: added_entry(token, i, token in special) | {"normalized": token not in special} for token, i in added.items()
        }
    config["chat_template"] = read_templates(folder, config)
    need(not config.get("split_special_tokens"), folder, "split_special_tokens is true, which is not done: set it to false")
    if (folder / "tokenizer.json").is_file():  # which says itself what stands around a text
        config = {key: value for key, value in config.items() if key not in ("add_bos_token", "add_eos_token")}
        return with_prefix_space(read_json(folder / "tokenizer.json"), config, folder), config
    for vocab_name, merges_name in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if (folder / vocab_name).is_file() and (folder / merges_name).is_file():
            vocab, lines = read_json(folder / vocab_name), read_text(folder / merges_name).splitlines()
            if "<|endoftext|>" in vocab:
                config = {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")} | config
            merges = [line for line in lines if line and not line.startswith("#version")]
            pre = "qwen2" if str(config.get("tokenizer_class")).startswith("Qwen2") else "gpt2"
            return with_prefix_space(make_spec(vocab, merges, pre, []), config, folder), config
    for name in ("tokenizer.model", "spiece.model"):
        if (folder / name).is_file():
            from lib.sentencepiece_file import read_sentencepiece

            return read_sentencepiece(folder / name, config)
    raise FileNotFoundError(f"{folder}: no tokenizer.json, vocab.bpe with encoder.json, or merges.txt with vocab.json")


def with_prefix_space(spec: dict, config: dict, source) -> dict:
    """A tokenizer.json of GPT-2's class, whose tokenizer_config.json decides whether a text begins with a space. Raises
    ValueError where LLaMA's two files contradict each other in that."""
    pre, name, wanted = spec.get("pre_tokenizer") or {}, str(config.get("tokenizer_class")), config.get("add_prefix_space")
    prepends = pre.get("prepend_scheme", "never") != "never" or '"Prepend"' in json.dumps(spec.get("normalizer"))
    need(
        not (name.startswith("LlamaTokenizer") and wanted is False and prepends),
        source,
        "add_prefix_space is false, and tokenizer.json puts a space before a text: one of the two must be changed",
    )
    if not name.startswith("GPT2Tokenizer") or pre.get("type") != "ByteLevel":
        return spec
    return spec | {"pre_tokenizer": pre | {"add_prefix_space": bool(wanted)}}


def read_gguf(path: Path) -> tuple[dict, dict]:
    from lib.gguf_file import read_header

    get = read_header(path, r"tokenizer\.")[0].get
    kind, pre, tokens = (get(f"tokenizer.ggml.{key}") for key in ("model", "pre", "tokens"))
    need(kind in ("gpt2", "llama"), path, f"its tokenizer is {kind!r}: only 'gpt2' (byte-level BPE) and 'llama' are read")
    need(kind == "llama" or pre in GGUF_PRE, path, f"pre-tokeniser {pre!r} is not known; known are {', '.join(GGUF_PRE)}")
    vocab = {token: i for i, token in enumerate(tokens)}
    need(len(vocab) == len(tokens), path, "a token occurs twice in its vocabulary")
    types = get("tokenizer.ggml.token_type", ())  # 3: control token, 4: added by users
    added = [added_entry(tokens[i], i, type_ == 3) for i, type_ in enumerate(types) if type_ in (3, 4)]
    llama3 = kind == "gpt2" and GGUF_PRE[pre] == "llama3"  # llama.cpp too takes ignore_merges and bos from the name
    config = {
        "chat_template": get("tokenizer.chat_template"),
        "add_eos_token": get("tokenizer.ggml.add_eos_token"),
        "add_bos_token": get("tokenizer.ggml.add_bos_token", llama3 or kind == "llama"),
    }
    for name, key in zip(NAMED_TOKENS, ("bos", "eos", "unknown", "padding"), strict=True):
        number = get(f"tokenizer.ggml.{key}_token_id")
        config[name] = None if number is None else tokens[number]
    if kind == "llama":
        from lib.sentencepiece_file import gguf_sentencepiece

        scores, unknown = get("tokenizer.ggml.scores"), get("tokenizer.ggml.unknown_token_id", 0)
        need(scores and len(scores) == len(types) == len(tokens), path, "its tokenizer has no score and type for each token")
        prefix = {"add_prefix_space": get("tokenizer.ggml.add_space_prefix", True)}
        return gguf_sentencepiece(tokens, scores, types, unknown, prefix), config
    return make_spec(vocab, get("tokenizer.ggml.merges"), GGUF_PRE[pre], added, ignore_merges=llama3), config
