"""What a folder says about generating: for each setting that changes a greedy answer, ours is that of transformers' generate
from the same folder; answers end where the files say, in transformers' order; what is not done is named."""

import json

import pytest
import torch

import generate
from calls import printed
from lib import generation
from lib.answers import Item, answer
from lib.chat import with_end_of_turn
from lib.checkpoint import from_pretrained, load_vlm, save_pretrained
from lib.conversation import stream_text
from lib.tokenizer import BPETokenizer, load_tokenizer
from lib.vlm_parts import find_part, with_chat_template
from lib.vlm_report import save_run
from processing_mllama import MllamaImageProcessor
from toys import make, make_vlm

transformers = pytest.importorskip("transformers", reason="its generate is the reference")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PROMPT = [5, 9, 5, 9, 11, 30]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model of 61 tokens, and a tokenizer for it."""
    path = tmp_path_factory.mktemp("model")
    save_pretrained(make(vocab_size=330), path)
    BPETokenizer.train("the dog jumped over the fence" * 9, 259, SPECIALS).save_pretrained(path)
    return path


def say(folder, **settings) -> None:
    (folder / "generation_config.json").write_text(json.dumps(settings))


def theirs(folder, count: int | None = 14) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    limit = {"max_new_tokens": count} if count else {}
    out = model.generate(torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT)), do_sample=False, **limit)
    stops = model.generation_config.eos_token_id
    new = out[0, len(PROMPT) :].tolist()
    return new[:-1] if new and new[-1] in (stops if isinstance(stops, list) else [stops]) else new


def ours(folder, count: int | None = 14) -> list[int]:
    model, tokenizer = from_pretrained(folder), BPETokenizer.from_pretrained(folder)
    return [token for _, token in stream_text(model, tokenizer, PROMPT, count) if token is not None]


def test_settings_that_change_a_greedy_answer_are_applied(folder):
    say(folder, eos_token_id=329)
    plain = theirs(folder)
    assert len(plain) == 14 == len(ours(folder))
    cases = {
        "a penalty": {"repetition_penalty": 1.7},
        "a bonus": {"repetition_penalty": 0.6},
        "no bigram twice": {"repetition_penalty": 0.6, "no_repeat_ngram_size": 2},
        "no token twice": {"no_repeat_ngram_size": 1},
        "suppressed": {"suppress_tokens": plain[:2]},
        "suppressed first": {"begin_suppress_tokens": [plain[0]]},
        "bad words": {"bad_words_ids": [[plain[3]], plain[:2], [PROMPT[-1], plain[0]]]},
        "an end": {"eos_token_id": plain[4]},
        "two ends": {"eos_token_id": [329, plain[2]]},
        "not so soon": {"eos_token_id": plain[2], "min_new_tokens": 8},
        "not so short": {"eos_token_id": plain[2], "min_length": 9},
        "an end is no bad word": {"eos_token_id": plain[4], "bad_words_ids": [[plain[4]]]},
    }
    for name, settings in cases.items():
        say(folder, **{"eos_token_id": 329, **settings})
        expected = theirs(folder)
        assert expected != plain and ours(folder) == expected, name


def test_a_penalty_makes_negative_logits_smaller_too():
    """Where a chosen token's logit is above 0 an answer does not show it; in beam search and sampling it counts."""
    logits, rows = torch.randn(2, 61, generator=torch.Generator().manual_seed(0)), [PROMPT, [*range(20, 26)]]
    found = generation.LogitRules({"repetition_penalty": 1.5}, [])(logits, rows, [4, 4])
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor(rows), logits)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("settings", [{"max_length": 11}, {"max_new_tokens": 3}, {"max_length": 9, "max_new_tokens": 4}])
def test_how_long_an_answer_is_unless_told_otherwise(folder, settings):
    say(folder, **settings)
    assert ours(folder, None) == theirs(folder, None) and 0 < len(ours(folder, None)) <= 5
    assert len(ours(folder, 7)) == 7
    say(folder, max_length=6)
    with pytest.raises(ValueError, match="the prompt has 6 tokens, and the folder's max_length is 6"):
        ours(folder, None)


def test_which_file_decides_where_answers_end(folder):
    """generation_config.json, else config.json, else its text_config, else the tokenizer."""
    config, end = json.loads((folder / "config.json").read_text()), BPETokenizer.from_pretrained(folder).eos_token_id
    (folder / "generation_config.json").unlink()

    def found(**more):
        (folder / "config.json").write_text(json.dumps(config | more))
        model, tokenizer = from_pretrained(folder), BPETokenizer.from_pretrained(folder)
        tokenizer.chat_template = None
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
        return generation.stop_tokens(model, tokenizer), reference

    assert found(eos_token_id=7) == ({7}, 7) and found(eos_token_id=[7, 8]) == ({7, 8}, [7, 8])
    assert found(eos_token_id=None)[0] == {end}
    say(folder, eos_token_id=9, top_p=0.5)
    assert found(eos_token_id=7) == ({9}, 9)
    (folder / "config.json").write_text(json.dumps(config))
    text = {"text_config": {"eos_token_id": 3, "max_length": 20}, "eos_token_id": None, "repetition_penalty": 1.5, "width": 8}
    assert generation.read_generation_config(folder / "nowhere", text) == {"eos_token_id": 3, "repetition_penalty": 1.5}


def test_what_is_not_done_is_named(folder, capsys):
    say(folder, do_sample=True, temperature=0.6, top_p=0.9, num_beams=1, guidance_scale=None, forced_eos_token_id=4,
        mystery="x", transformers_version="5", use_cache=True, pad_token_id=0)  # fmt: skip
    generate.main([str(folder), "the dog", "--max-new-tokens", "1"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "asks for do_sample = True, forced_eos_token_id = 4, mystery = 'x' when it generates, which is not done" in line
    # These are taken for settings of encoders, and transformers applies them to the prompt of a decoder, too.
    assert "encoder_repetition_penalty = 1.5, encoder_no_repeat_ngram_size = 2" in generation.unlike_generate(
        {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2}, load_tokenizer(folder)
    )
    say(folder, temperature=0.6, num_beams=1, eos_token_id=3, encoder_repetition_penalty=1.0, encoder_no_repeat_ngram_size=0)
    generate.main([str(folder), "the dog", "--max-new-tokens", "1"])
    assert not capsys.readouterr().err
    wrong = {"eos_token_id": "a", "repetition_penalty": 0, "bad_words_ids": [[]], "suppress_tokens": 3, "max_length": -1}
    for key, value in wrong.items():
        say(folder, **{key: value})
        with pytest.raises(ValueError, match=f"generation_config.json: {key} is .* it must be"):
            from_pretrained(folder)


def test_a_folder_that_names_no_end_is_told(folder, capsys):
    """transformers' generate would go on to the last token it may write; here the tokenizer's end of turn ends an answer."""
    say(folder, temperature=1.0)
    generate.main([str(folder), "the dog", "--max-new-tokens", "1"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "names no eos_token_id: answers end at its tokenizer's <|im_end|>" in line


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    path = tmp_path_factory.mktemp("vlm")
    tokenizer = BPETokenizer.train("What is in the image? A red dog." * 9, 290, SPECIALS, at_most=True)
    processor = MllamaImageProcessor(tokenizer, 16, 16, add_location_tokens=False)
    sizes = {"vocab_size": len(tokenizer) + 1, "max_position_embeddings": 128}
    model = make_vlm(sizes, image_token_id=processor.image_token_id)
    save_run(path, model, processor, {"lr": 1})
    return path


def test_a_batch_of_questions_follows_the_rules_too(vlm):
    about = json.loads((vlm / "generation_config.json").read_text())
    image, asked = torch.zeros(3, 16, 16, dtype=torch.uint8), ("What is it?", "Is it red, or what else is it?", "What?")
    said = []
    for settings in ({}, {"repetition_penalty": 1.6, "no_repeat_ngram_size": 2}):
        (vlm / "generation_config.json").write_text(json.dumps(about | settings))
        model, processor = load_vlm(vlm)
        items = [Item(image, [{"role": "user", "content": f"<image>\n{text}"}], "") for text in asked]
        alone = []
        for item in items:
            ids, _ = processor.encode(item.messages, 1, add_generation_prompt=True)
            with torch.no_grad():
                features = model.image_features(processor.pixel_values([image]))
            pieces = stream_text(model, processor.tokenizer, ids, 10, image_features=features, shown=processor.locations)
            alone.append("".join(text for text, _ in pieces).strip())
        said.append(answer(model, processor, items, max_new_tokens=10))
        assert said[-1] == alone
    assert said[0] != said[1]


def test_a_run_says_where_its_answers_end(vlm, folder):
    """A base model's own end stays one, and the end of a turn that it learns is another: transformers' generate stops there."""
    about = json.loads((vlm / "generation_config.json").read_text())
    tokenizer = BPETokenizer.from_pretrained(vlm)
    assert about["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert json.loads((vlm / "settings.json").read_text()) == {"lr": 1}
    say(folder, eos_token_id=0, repetition_penalty=1.2)
    lm, base = find_part(str(folder), "lm"), BPETokenizer.from_pretrained(folder)
    base.chat_template = None
    lines = printed(lambda _: with_chat_template(base, "BASE"))
    assert lines == ["BASE has no chat template: it learns ours, chatml_spaced, with <|im_start|> and <|im_end|>"]
    assert not printed(lambda _: with_chat_template(base, "BASE"))
    end = base.convert_tokens_to_ids("<|im_end|>")
    assert with_end_of_turn(lm.generation_config, base) == {"eos_token_id": [0, end], "repetition_penalty": 1.2}
