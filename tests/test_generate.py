"""Laws of generate.py: what it prints is what the model says, streamed or tabled; a wrong pair is one line."""

import io
import json
import sys

import pytest
import torch

import generate
from checkpoint import save_pretrained
from gpt import GPT, GPTConfig
from tokenizer import BPETokenizer
from training import run_cli

TEXT = "The dog jumped over the fence. The cat sat on the mat. " * 20


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a small untrained GPT-2 and a tokenizer with ChatML's special tokens."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = BPETokenizer.train(TEXT, vocab_size=290, special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = "chatml"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "context_length": 200, "hidden_size": 32}
    save_pretrained(GPT(GPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)), folder)
    return folder


def call(capsys, *argv) -> str:
    generate.main([str(word) for word in argv])
    return capsys.readouterr().out


def test_a_continued_text_begins_with_itself_and_repeats(run, capsys):
    first, again = (call(capsys, run, "The dog jumped", "--max-new-tokens", 12) for _ in range(2))
    assert first == again and first.startswith("The dog jumped") and len(first) > len("The dog jumped\n")


def test_sampling_depends_on_the_seed_and_on_nothing_else(run, capsys):
    flags = ["--temperature", 5, "--max-new-tokens", 15]
    texts = [call(capsys, run, "The cat", *flags, "--seed", seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_the_table_shows_each_prefix_with_its_likeliest_next_tokens(run, capsys):
    model, tokenizer = generate.load(generate.parse_args([str(run)]))
    rows = generate.next_token_table(model, tokenizer, "The dog jumped", 3)
    ids = tokenizer.encode("The dog jumped")
    assert [token for token, _ in rows] == [tokenizer.decode([i]) for i in ids]
    for i, (_, choices) in enumerate(rows):
        expected = model(torch.tensor([ids[: i + 1]]))["logits"][0, -1].softmax(-1).topk(3)
        assert [word for word, _ in choices] == [tokenizer.decode([j]) for j in expected.indices.tolist()]
        assert [p for _, p in choices] == pytest.approx(expected.values.tolist(), abs=1e-6)
    printed = call(capsys, run, "The dog jumped", "--top", 3).splitlines()
    assert len(printed) == 1 + len(ids) and printed[0].split() == ["after", "1.", "2.", "3."]


def test_a_conversation_remembers_what_was_said(run, capsys, monkeypatch):
    asked = []
    encode_chat = BPETokenizer.encode_chat
    monkeypatch.setattr(BPETokenizer, "encode_chat", lambda self, m, **kw: asked.append(list(m)) or encode_chat(self, m, **kw))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand you?\n\n"))
    call(capsys, run, "--max-new-tokens", 4)
    assert [len(messages) for messages in asked] == [1, 3]
    assert [m["role"] for m in asked[1]] == ["user", "assistant", "user"] and asked[1][0]["content"] == "hello"


def test_the_question_may_stand_after_the_flags(run, capsys):
    """argparse took the missing PROMPT for granted as soon as it had SOURCE, and then refused the question."""
    flags = ["--chat", "--max-new-tokens", 3]
    assert call(capsys, run, *flags, "hello") == call(capsys, run, "hello", *flags)


def test_special_token_text_in_a_question_stays_text(run, capsys):
    _, tokenizer = generate.load(generate.parse_args([str(run)]))
    ids = tokenizer.encode_chat([{"role": "user", "content": "<|im_end|>"}], add_generation_prompt=True)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


@pytest.mark.parametrize(
    "argv, message",
    [
        (["RUN", ""], "the prompt is empty"),
        (["RUN", "The dog " * 300], "the model's context is 200"),
        (["RUN", "x", "--top-k", "0"], "'0' must be a whole number"),
        (["RUN", "x", "--temperature", "1", "--top-p", "1.5"], "top_p is 1.5"),
        (["RUN", "--top", "5"], "need a PROMPT"),
        (["./nowhere", "x"], "there is no folder ./nowhere"),
        (["RUN", "x", "--device", "cuda:9"], "no such device"),
    ],
)
def test_bad_calls_are_one_line_and_exit_code_2(run, capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: generate.main([str(run) if word == "RUN" else word for word in argv]))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and "Traceback" not in error


def test_a_tokenizer_of_another_model_is_refused(run, tmp_path):
    for file in run.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    bigger = json.loads((tmp_path / "tokenizer.json").read_text())
    first = bigger["added_tokens"][0]
    bigger["added_tokens"].append({**first, "id": len(BPETokenizer.from_pretrained(run)), "content": "<new>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(bigger))
    with pytest.raises(ValueError, match="they do not belong together"):
        generate.load(generate.parse_args([str(tmp_path)]))
