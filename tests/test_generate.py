"""Laws of generate.py: what it prints is what the model says, streamed or tabled, of texts and pictures; a wrong pair is one
line."""

import io
import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import figures
import generate
from checkpoint import from_pretrained, save_pretrained
from gpt import GPT, GPTConfig
from model import MLLAMAConfig, MllamaForConditionalGeneration, OneToken, convert_linears_to_lora
from processing_mllama import MllamaImageProcessor
from scenes import make_scenes
from siglip import SiglipModel
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


# ---- pictures --------------------------------------------------------------------------------------------------------

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 8}
WORDS = {"hidden_size": 32, "n_heads": 4, "n_kv_groups": 2, "n_layers": 4, "hidden_dim": 48, "max_position_embeddings": 160}
KINDS = {
    "idefics3": {"projector_type": "linear", "pixel_shuffle": 2},
    "llava": {"vision_feature_layer": -2},
    "mllama_scratch": {"pixel_shuffle": 2},
    "cross": {"fusion": "cross", "cross_every": 2},
}
QUESTION = "What is left of the red 3?"


def make_vlm(folder, kind: str, rows: int = 0):
    """A run folder with a random VLM whose answers depend on what it sees. rows: of its vocabulary beyond the tokenizer's."""
    tokenizer = BPETokenizer.train(QUESTION + TEXT, vocab_size=300, special_tokens=("<|im_start|>", "<|im_end|>"))
    tokenizer.chat_template = "chatml"
    tokenizer.add_special_tokens(["<image>"])
    torch.manual_seed(0)
    text = WORDS | {"vocab_size": len(tokenizer) + rows}
    config = MLLAMAConfig(VISION, text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), **KINDS[kind])
    model = MllamaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        for p in model.multi_modal_projector.parameters():
            p.mul_(5)
    written = save_pretrained(model, folder)
    processor = MllamaImageProcessor(tokenizer, config.text_config.num_image_tokens, 32, add_location_tokens=False)
    processor.save_pretrained(folder, config.layout)
    assert written == kind or kind == "cross"
    return folder


@pytest.fixture(scope="module")
def vlms(tmp_path_factory):
    return {kind: make_vlm(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, scenes = tmp_path_factory.mktemp("photos"), make_scenes("test", 3, seed=0)
    scenes.images[1] = 255 - scenes.images[1]  # a light one, so that even a random model tells it from the others
    paths = [folder / f"{name}.png" for name in "abc"]
    for path, image in zip(paths, scenes.images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return paths


def expected(folder, messages, images, count: int) -> str:
    """What the model says by the plain way: one batch of the processor, generate."""
    model, processor = from_pretrained(folder), MllamaImageProcessor.from_pretrained(folder)
    batch = processor.conversation(messages, [str(path) for path in images] or None, add_generation_prompt=True)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    return processor.decode(model.generate(**batch, max_new_tokens=count, stop_tokens=[end])[0])


def flags(paths) -> list:
    return [word for path in paths for word in ("--image", path)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_answer_is_the_models_with_any_number_of_pictures(vlms, photos, capsys, kind, count):
    printed = call(capsys, vlms[kind], *flags(photos[:count]), QUESTION, "--max-new-tokens", 9)
    messages = [{"role": "user", "content": "<image>\n" * count + QUESTION}]
    assert printed == expected(vlms[kind], messages, photos[:count], 9) + "\n" != "\n"
    swapped = call(capsys, vlms[kind], *flags(photos[:count][::-1]), QUESTION, "--max-new-tokens", 9)
    assert (swapped != printed) == (count == 2 and kind != "cross")  # features of cross-attention have no positions


def test_pictures_stand_where_the_question_says_so(vlms, photos, capsys):
    question = "<image> What is left of <image>?"
    printed = call(capsys, vlms["idefics3"], *flags(photos[:2]), question, "--max-new-tokens", 9)
    assert printed == expected(vlms["idefics3"], [{"role": "user", "content": question}], photos[:2], 9) + "\n"


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_shows_each_picture_to_the_tower_once(vlms, photos, capsys, monkeypatch, kind):
    seen, forward = [], SiglipModel.forward
    monkeypatch.setattr(SiglipModel, "forward", lambda self, x, *rest: seen.append(len(x)) or forward(self, x, *rest))
    lines = ["What is it?", f"/image {photos[1]}", "/image nowhere.png", f"/image {photos[2]}", "And this?", "Really?", ""]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    generate.main([str(word) for word in (vlms[kind], "--image", photos[0], "--max-new-tokens", 6)])
    printed = capsys.readouterr()
    assert seen == [1, 1, 1] and printed.err.count("error:") == 1 and "nowhere.png" in printed.err
    messages, said = [], ""
    for question, images in (("<image>\nWhat is it?", 1), ("<image>\n<image>\nAnd this?", 3), ("Really?", 3)):
        messages.append({"role": "user", "content": question})
        answer = expected(vlms[kind], messages, photos[:images], 6)
        messages.append({"role": "assistant", "content": answer})
        said += answer + "\n"
    assert printed.out == said


def test_a_models_location_tokens_are_part_of_what_it_says(vlms, capsys, monkeypatch):
    args = generate.parse_args([str(vlms["llava"]), "x"])
    model, tokenizer = generate.load(args)
    tokenizer.add_special_tokens(["<loc0007>"])
    shown = generate.load_processor(args.source, model, tokenizer).locations
    ids = tokenizer.encode("The cat<loc0007>", parse_special=True) + [tokenizer.convert_tokens_to_ids("<|im_start|>")]
    monkeypatch.setattr(model, "stream", lambda *prompt, **options: ([i] for i in ids))
    assert generate.say(model, tokenizer, [1], args, shown=shown) == ("The cat<loc0007>", ids)
    assert capsys.readouterr().out == "The cat<loc0007>\n"


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cpu_the_decoder_is_arranged_where_that_helps(vlms, kind):
    model, _ = generate.load(generate.parse_args([str(vlms[kind]), "x", "--device", "cpu"]))
    assert isinstance(OneToken.for_model(model.language_model), OneToken) == (kind != "cross")
    convert_linears_to_lora(model.language_model, rank=2, alpha=2, targets=["q_proj"])
    assert OneToken.for_model(model.language_model) is model.language_model


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("kind", KINDS)
def test_attention_draws_the_words_of_the_answer(vlms, photos, tmp_path, capsys, monkeypatch, kind):
    drawn, draw = [], figures.attention_overlay
    monkeypatch.setattr(figures, "attention_overlay", lambda *args, **rest: drawn.append((args, rest)) or draw(*args, **rest))
    file, words = tmp_path / "map.png", ["--max-new-tokens", 9]
    printed = call(capsys, vlms[kind], *flags(photos[:2]), QUESTION, *words, "--attention", file)
    assert printed == call(capsys, vlms[kind], *flags(photos[:2]), QUESTION, *words)
    [((pictures, said, maps, path), rest)] = drawn
    assert "".join(said).split() == "".join(printed.split()).split() and rest["title"] == QUESTION
    assert path == str(file) and Image.open(file).format == "PNG" and os.listdir(tmp_path) == ["map.png"]
    grid = 4 if kind in ("llava", "cross") else 2
    assert maps.shape == (len(said), 2, grid, grid) and 0 < maps.sum(dim=(1, 2, 3)).max() <= 1 + 1e-5
    for picture, photo in zip(pictures, photos, strict=False):
        squeezed = np.asarray(Image.open(photo).resize((32, 32), Image.Resampling.BICUBIC))
        assert (picture.permute(1, 2, 0).numpy() == squeezed).all()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["RUN", "x", "--image", "PHOTO"], "holds a GPT, which sees no pictures"),
        (["RUN", "--attention", "FOLDER/a.png"], "holds a GPT, which sees no pictures"),
        (["VLM", "x", "--image", "FOLDER/no.png"], "No such file"),
        (["VLM", "x", "--image", "VLM/config.json"], "config.json): not a picture"),
        (["VLM", "<image> x"], "says <image> 1 times and has 0 images"),
        (["VLM", "<image> x", *["--image", "PHOTO"] * 2], "says <image> 1 times and has 2 images"),
        (["VLM", "x", *["--image", "PHOTO"] * 60], "the model's context is 160"),
        (["VLM", "x", "--image", "PHOTO", "--attention", "FOLDER"], "cannot be written"),
        (["VLM", "x", "--image", "PHOTO", "--attention", "FOLDER/no/a.png"], "cannot be written"),
        (["VLM", "x", "--attention", "FOLDER/a.png"], "give an --image"),
        (["VLM", "x", "--top", "3", "--image", "PHOTO"], "--top is about texts"),
    ],
)
def test_bad_calls_with_pictures_are_one_line_and_exit_code_2(run, vlms, photos, tmp_path, capsys, argv, message):
    for name, path in (("RUN", run), ("VLM", vlms["idefics3"]), ("PHOTO", photos[0]), ("FOLDER", tmp_path)):
        argv = [word.replace(name, str(path)) for word in argv]
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: generate.main(argv))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and "Traceback" not in error
    assert not error.startswith("error:") or error.count("\n") == 1


@pytest.mark.parametrize(
    "file, changes, message",
    [
        ("config.json", {"image_token_id": 5}, "the token id of <image>: 300 for its processor, 5 for its model"),
        ("preprocessor_config.json", {"max_image_size": {"longest_edge": 64}}, r"\(64, 64\) for its processor, \(32, 32\)"),
        ("preprocessor_config.json", {"do_rescale": False}, "only True is done here"),
    ],
)
def test_a_processor_that_does_not_fit_its_model_is_refused(tmp_path, capsys, file, changes, message):
    folder = make_vlm(tmp_path, "idefics3")
    content = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        generate.main([str(folder), "x"])


@pytest.mark.parametrize("rows, fits", [(-1, True), (-2, False), (3, True)])
def test_all_tokens_but_the_placeholder_need_a_row(tmp_path, photos, capsys, rows, fits):
    """A picture overwrites its placeholder, so a model that never got a row for <image> is whole."""
    argv = [make_vlm(tmp_path, "mllama_scratch", rows), *flags(photos[:1]), QUESTION, "--max-new-tokens", 3]
    if fits:
        call(capsys, *argv)
    else:
        with pytest.raises(ValueError, match="has 300 tokens, the model knows 299"):
            call(capsys, *argv)


def test_a_model_that_was_not_told_its_placeholder_asks_the_processor(tmp_path, photos, capsys):
    folder = make_vlm(tmp_path, "mllama_scratch")
    printed = call(capsys, folder, *flags(photos[:1]), QUESTION)
    content = json.loads((folder / "config.json").read_text())
    assert content.pop("image_token_id") == 300
    (folder / "config.json").write_text(json.dumps(content))
    assert call(capsys, folder, *flags(photos[:1]), QUESTION) == printed
