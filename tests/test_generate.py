"""Laws of generate.py: what it prints is what the model says, streamed or tabled, of texts and images, or how well captions
fit, as in transformers; an adapter takes the place of a run's own; a wrong pair is one line."""

import functools
import io
import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import generate
from calls import refused
from data.scenes import make_scenes
from extras.cross_attention import CrossAttentionConfig, CrossAttentionVLM
from gpt import GPT, GPTConfig
from lib import conversation, convert, figures
from lib.adapters import lora_layers, put_adapter, save_lora
from lib.beam_search import continue_prompts
from lib.checkpoint import from_pretrained, load_vlm, save_pretrained
from lib.cli import run_cli
from lib.conversation import Conversation
from lib.fast_decode import fast_step
from lib.generation import stop_tokens
from lib.int8 import Linear8bit, quantize_8bit_
from lib.quant import Linear4bit, quantize_
from lib.tokenizer import BPETokenizer
from model import (
    Llama3ForCausalLM,
    LLAMA32Config,
    MLLAMAConfig,
    MllamaForConditionalGeneration,
    convert_linears_to_lora,
)
from processing_mllama import MllamaImageProcessor
from siglip import SiglipModel

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


def test_a_classifier_names_the_five_likeliest_classes(tmp_path, capsys):
    """By the folder's own names and image settings: a grey classifier of six classes, and the same image twice."""
    from lib.classification import save_classifier
    from vit_scratch import ViTConfig, ViTModel

    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=6, **size)
    model, names = ViTModel(config).eval(), ["ant", "bee", "cat", "dog", "eel", "fox"]
    save_classifier(tmp_path / "run", model, names, [0.3], [0.2], {})
    image = Image.fromarray(torch.randint(0, 256, (8, 8), dtype=torch.uint8).numpy())
    image.save(tmp_path / "a.png")
    lines = call(capsys, tmp_path / "run", "--image", tmp_path / "a.png", tmp_path / "a.png").splitlines()
    assert call(capsys, tmp_path / "run", *["--image", tmp_path / "a.png"] * 2).splitlines() == lines
    assert len(lines) == 12 and lines[0] == str(tmp_path / "a.png") and lines[1:6] == lines[7:]
    pixels = torch.from_numpy(np.array(image)).float().div(255).sub(0.3).div(0.2)[None, None]
    expected = model(pixels).softmax(dim=-1)[0]
    found = {line.split("%")[1].strip(): float(line.split("%")[0]) for line in lines[1:6]}
    best = sorted(zip(expected.tolist(), names, strict=True), reverse=True)[:5]
    assert list(found) == [name for _, name in best]
    assert list(found.values()) == pytest.approx([100 * p for p, _ in best], rel=1e-3)
    # --beams, --attention, --int8 and the like were taken, and changed nothing.
    line = refused(capsys, generate.main, tmp_path / "run", "--image", tmp_path / "a.png", "--beams", 3, "--int8")
    assert "is a classifier: it takes --image, --device, --dtype; leave out --beams, --int8" in line


def test_a_continued_text_begins_with_itself_and_repeats(run, capsys):
    first, again = (call(capsys, run, "The dog jumped", "--max-new-tokens", 12) for _ in range(2))
    assert first == again and first.startswith("The dog jumped") and len(first) > len("The dog jumped\n")


def test_sampling_depends_on_the_seed_and_on_nothing_else(run, capsys):
    flags = ["--temperature", 5, "--max-new-tokens", 15]
    texts = [call(capsys, run, "The cat", *flags, "--seed", seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_the_table_shows_each_prefix_with_its_likeliest_next_tokens(run, capsys):
    model, tokenizer, _ = generate.load(generate.parse_args([str(run)]))
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
    asked, encode = [], conversation.encode_conversation
    monkeypatch.setattr(conversation, "encode_conversation", lambda t, m, **kw: asked.append(list(m)) or encode(t, m, **kw))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand you?\n\n"))
    call(capsys, run, "--max-new-tokens", 4)
    assert [len(messages) for messages in asked] == [1, 3]
    assert [m["role"] for m in asked[1]] == ["user", "assistant", "user"] and asked[1][0]["content"] == "hello"


def test_the_space_that_the_template_writes_before_an_answer_is_not_shown(run, capsys, monkeypatch):
    """Nor does it come in twice, when the answer is put before the next question."""
    model, tokenizer, _ = generate.load(generate.parse_args([str(run)]))
    tokenizer.chat_template = "chatml_spaced"
    monkeypatch.setattr(model, "stream", lambda *_, **__: ([token] for token in tokenizer.encode("  red and ")))
    talk = Conversation(model, tokenizer)
    generate.answer(talk, "hello")
    assert capsys.readouterr().out == " red and \n"
    assert talk.messages[-1] == {"role": "assistant", "content": " red and "}


def test_the_question_may_stand_after_the_flags(run, capsys):
    """argparse took the missing PROMPT for granted as soon as it had SOURCE, and then refused the question."""
    flags = ["--chat", "--max-new-tokens", 3]
    assert call(capsys, run, *flags, "hello") == call(capsys, run, "hello", *flags)


def test_special_token_text_in_a_question_stays_text(run, capsys):
    _, tokenizer, _ = generate.load(generate.parse_args([str(run)]))
    ids = tokenizer.encode_chat([{"role": "user", "content": "<|im_end|>"}], add_generation_prompt=True)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


@pytest.mark.parametrize(
    "argv, message",
    [
        (["RUN", ""], "the prompt is empty"),
        (["RUN", "The dog " * 300], "the model's context is 200"),
        (["RUN", "x", "--top-k", "0"], "'0' must be a whole number"),
        (["RUN", "x", "--temperature", "1", "--top-p", "1.5"], "--top-p is 1.5"),
        (
            ["RUN", "x", "--beams", "3", "--top-k", "5"],
            "--beams looks for the likeliest text, which draws nothing: leave out --top-k",
        ),
        (["RUN", "x", "--top-k", "5", "--min-p", "0.1"], "--min-p, --top-k: without --temperature above 0"),
        (["RUN", "x", "--beams", "999"], "--beams 999: it must be 1 to"),
        (["RUN", "x", "--beams", "3", "--length-penalty", "nan"], "'nan' must be a number from -10 to 10"),
        (["RUN", "x", "--beams", "3", "--length-penalty", "1000"], "'1000' must be a number from -10 to 10"),
        (["RUN", "x", "--temperature", "1e-300"], "'1e-300' must be 0, for the likeliest token, or from 0.001"),
        (["RUN", "--top", "5"], "need a PROMPT"),
        (["RUN", "x", "--top", "5", "--chat"], "--top is about the next tokens of a text: leave out --chat"),  # it was ignored
        (["RUN", "x", "--system", "y"], "--system begins a chat, and PROMPT is a text to continue: add --chat"),
        (["./nowhere", "x"], "there is no folder ./nowhere"),
        (["RUN", "x", "--device", "cuda:9"], "no such device"),
    ],
)
def test_bad_calls_are_one_line_and_exit_code_2(run, capsys, argv, message):
    assert message in refused(capsys, generate.main, *(run if word == "RUN" else word for word in argv))


def add_a_token(folder, special: bool) -> None:
    """One more than the model has rows for; not special: recognised wherever it stands in a text."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    new = {"id": len(BPETokenizer.from_pretrained(folder)), "content": "<new>", "special": special}
    spec["added_tokens"].append(spec["added_tokens"][0] | new)
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def test_a_token_without_a_row_is_refused_when_a_text_has_it_and_not_before(run, tmp_path, capsys):
    """transformers' Idefics3Processor adds <end_of_utterance> to what it saves: our own run, saved by it, was refused."""
    for file in run.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rows = len(BPETokenizer.from_pretrained(run))
    add_a_token(tmp_path, special=True)
    assert call(capsys, tmp_path, "The dog <new>") == call(capsys, run, "The dog <new>")
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["added_tokens"][-1]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    message = f"the text has the token '<new>' with id {rows}, the model has rows for {rows} tokens"
    for flags in ([], ["--top", "2"], ["--chat"]):
        with pytest.raises(ValueError, match=message):
            call(capsys, tmp_path, "The <new> dog", *flags)


# ---- images --------------------------------------------------------------------------------------------------------

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 8}
WORDS = {"hidden_size": 32, "n_heads": 4, "n_kv_groups": 2, "n_layers": 4, "hidden_dim": 48, "max_position_embeddings": 160}
KINDS = {
    "idefics3": {"projector_type": "linear", "pixel_shuffle": 2},
    "llava": {"vision_feature_layer": -2},
    "mllama_scratch": {"pixel_shuffle": 2},
    "cross": {"cross_every": 2},
}
QUESTION = "What is left of the red 3?"


def make_vlm(folder, kind: str, rows: int = 0):
    """A run folder with a random VLM whose answers depend on what it sees. rows: of its vocabulary beyond the tokenizer's."""
    tokenizer = BPETokenizer.train(QUESTION + TEXT, vocab_size=300, special_tokens=("<|im_start|>", "<|im_end|>"))
    tokenizer.chat_template = "chatml"
    tokenizer.add_special_tokens(["<image>"])
    torch.manual_seed(0)
    text = WORDS | {"vocab_size": len(tokenizer) + rows}
    make_config = CrossAttentionConfig if kind == "cross" else MLLAMAConfig
    config = make_config(VISION, text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), **KINDS[kind])
    model = (CrossAttentionVLM if kind == "cross" else MllamaForConditionalGeneration)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        for p in model.multi_modal_projector.parameters():
            p.mul_(5)
    written = save_pretrained(model, folder)
    processor = MllamaImageProcessor(tokenizer, config.text_config.num_image_tokens, 32, add_location_tokens=False)
    processor.save_pretrained(folder, kind if kind in ("llava", "idefics3") else None)
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


loaded = functools.cache(load_vlm)


def expected(folder, messages, images, count: int, model=None) -> str:
    """What the model says by the plain way: one batch of the processor, generate."""
    model, processor = model or loaded(folder)[0], loaded(folder)[1]
    batch = processor.conversation(messages, [str(path) for path in images] or None, add_generation_prompt=True)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    return processor.decode(model.generate(**batch, max_new_tokens=count, stop_tokens=[end])[0])


def flags(paths) -> list:
    return [word for path in paths for word in ("--image", path)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_answer_is_the_models_with_any_number_of_images(vlms, photos, capsys, kind, count):
    printed = call(capsys, vlms[kind], *flags(photos[:count]), QUESTION, "--max-new-tokens", 9)
    messages = [{"role": "user", "content": "<image>\n" * count + QUESTION}]
    assert printed == expected(vlms[kind], messages, photos[:count], 9) + "\n" != "\n"
    swapped = call(capsys, vlms[kind], *flags(photos[:count][::-1]), QUESTION, "--max-new-tokens", 9)
    assert (swapped != printed) == (count == 2 and kind != "cross")  # features of cross-attention have no positions


def test_beams_answer_with_the_likeliest_text(vlms, photos, capsys):
    """Which is another one than the likeliest words, here, and depends on the images and on the length penalty."""
    asked = [vlms["idefics3"], *flags(photos[:1]), QUESTION, "--max-new-tokens", 9]
    greedy, searched = call(capsys, *asked), call(capsys, *asked, "--beams", 4)
    model, processor = load_vlm(vlms["idefics3"])
    messages = [{"role": "user", "content": "<image>\n" + QUESTION}]
    batch = processor(None, [photos[:1]], [messages], add_generation_prompt=True)
    images = {key: batch[key] for key in batch if key not in ("input_ids", "attention_mask")}
    (rows,) = continue_prompts(model, batch["input_ids"], 4, 9, stop_tokens(model, processor.tokenizer), **images)
    assert searched.strip() == processor.decode(rows[0].ids).strip() != greedy.strip()


def test_images_stand_where_the_question_says_so(vlms, photos, capsys):
    question = "<image> What is left of <image>?"
    printed = call(capsys, vlms["idefics3"], *flags(photos[:2]), question, "--max-new-tokens", 9)
    assert printed == expected(vlms["idefics3"], [{"role": "user", "content": question}], photos[:2], 9) + "\n"


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_shows_each_image_to_the_tower_once(vlms, photos, capsys, monkeypatch, kind):
    seen, features = [], SiglipModel.features
    monkeypatch.setattr(SiglipModel, "features", lambda self, x, *rest: seen.append(len(x)) or features(self, x, *rest))
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
    model, tokenizer, _ = generate.load(generate.parse_args([str(vlms["llava"]), "x"]))
    tokenizer.add_special_tokens(["<loc0007>"])
    processor = MllamaImageProcessor(tokenizer, 16, 32, add_location_tokens=False)
    ids = tokenizer.encode("The cat<loc0007>", parse_special=True) + [tokenizer.convert_tokens_to_ids("<|im_start|>")]
    monkeypatch.setattr(model, "stream", lambda *prompt, **options: ([i] for i in ids))
    talk = Conversation(model, tokenizer, processor)
    generate.answer(talk, "Where is it?")
    assert talk.messages[-1]["content"] == "The cat<loc0007>" and talk.answer_ids == ids
    assert capsys.readouterr().out == "The cat<loc0007>\n"


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cpu_the_decoder_is_arranged_where_that_helps(vlms, kind):
    model, *_ = generate.load(generate.parse_args([str(vlms[kind]), "x", "--device", "cpu"]))
    assert (fast_step(model.language_model) is not None) == (kind != "cross")
    convert_linears_to_lora(model.language_model, rank=2, alpha=2, targets=["q_proj"])
    assert fast_step(model.language_model) is None


@pytest.mark.parametrize("kind", KINDS)
def test_int8_puts_the_words_in_8_bits_and_says_what_that_model_says(vlms, photos, capsys, monkeypatch, kind):
    argv = [vlms[kind], "--image", photos[0], QUESTION, "--max-new-tokens", 9, "--int8", "--device", "cpu"]
    model, *_ = generate.load(generate.parse_args([str(word) for word in argv]))
    assert {type(layer) for layer in model.modules() if hasattr(layer, "in_features")} == {torch.nn.Linear, Linear8bit}
    assert (fast_step(model.language_model) is not None) == (kind != "cross")
    plain = from_pretrained(vlms[kind])
    quantize_8bit_(plain)
    messages = [{"role": "user", "content": f"<image>\n{QUESTION}"}]
    assert call(capsys, *argv) == expected(vlms[kind], messages, photos[:1], 9, plain) + "\n" != "\n"


def test_int8_continues_and_tables_a_text(run, tmp_path, capsys):
    tokenizer = BPETokenizer.from_pretrained(run)
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = Llama3ForCausalLM(LLAMA32Config(**WORDS, vocab_size=len(tokenizer), tie_word_embeddings=True)).eval()
    save_pretrained(model, tmp_path)
    quantize_8bit_(model)
    ids = tokenizer.encode("The cat sat")
    said = tokenizer.decode(model.generate([ids], 8)[0])
    assert call(capsys, tmp_path, "The cat sat", "--int8", "--max-new-tokens", 8) == f"The cat sat{said}\n"
    table = call(capsys, tmp_path, "The cat sat", "--int8", "--top", 1)
    assert len(table.splitlines()) == 1 + len(ids)


def test_int8_where_it_cannot_be_is_one_line(run, vlms, towers, photos, capsys, monkeypatch):
    assert "a GPT has no decoder like LLaMA's" in refused(capsys, generate.main, run, "x", "--int8")
    flags = [towers, "--image", photos[0], "--zero-shot", "x", "--int8"]
    assert "only --device and --dtype beside it" in refused(capsys, generate.main, *flags)
    monkeypatch.setattr(generate, "find_device", lambda name: torch.device("cuda"))
    line = refused(capsys, generate.main, vlms["llava"], "x", "--int8")
    assert "--int8 is for decoding on a CPU, not on cuda: leave it out, or give --device cpu" in line


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("kind", KINDS)
def test_attention_draws_the_words_of_the_answer(vlms, photos, tmp_path, capsys, monkeypatch, kind):
    drawn, draw = [], figures.attention_overlay
    monkeypatch.setattr(figures, "attention_overlay", lambda *args, **rest: drawn.append((args, rest)) or draw(*args, **rest))
    file, words = tmp_path / "map.png", ["--max-new-tokens", 9]
    printed = call(capsys, vlms[kind], *flags(photos[:2]), QUESTION, *words, "--attention", file)
    messages = [{"role": "user", "content": f"<image>\n<image>\n{QUESTION}"}]
    assert printed == expected(vlms[kind], messages, photos[:2], 9) + "\n"
    [((shown, said, maps, path), rest)] = drawn
    assert "".join(said).split() == "".join(printed.split()).split() and rest["title"] == QUESTION
    assert path == str(file) and Image.open(file).format == "PNG" and os.listdir(tmp_path) == ["map.png"]
    grid = 4 if kind in ("llava", "cross") else 2
    assert maps.shape == (len(said), 2, grid, grid) and 0 < maps.sum(dim=(1, 2, 3)).max() <= 1 + 1e-5
    for panel, photo in zip(shown, photos[:2], strict=True):
        squeezed = np.asarray(Image.open(photo).resize((32, 32), Image.Resampling.BICUBIC))
        assert (panel.permute(1, 2, 0).numpy() == squeezed).all()


@pytest.mark.parametrize("argv", ["S --image A A Q --int8", "S Q --image A A --int8", "--image A --image A S Q --int8",
                                  "--int8 S --image=A A Q", "--image A A S Q --int8"])  # fmt: skip
def test_files_after_an_image_are_images_and_what_is_no_file_is_the_prompt(photos, argv):
    words = {"A": str(photos[0]), "--image=A": f"--image={photos[0]}", "Q": "What is that?"}
    args = generate.parse_args([words.get(word, word) for word in argv.split()])
    assert (args.source, args.prompt, args.image, args.int8) == ("S", "What is that?", [str(photos[0])] * 2, True)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["RUN", "x", "--image", "PHOTO"], "holds a GPT, which reads no images"),
        (["RUN", "--attention", "FOLDER/a.png"], "holds a GPT, which reads no images: leave out --attention"),
        (["RUN", "x", "--no-split-images"], "holds a GPT, which reads no images: leave out --split-images"),
        (["VLM", "x", "--image", "FOLDER/no.png"], "--image: there is no file"),
        (["VLM", "x", "--image", "PHOTO", "FOLDER/no.png"], "no.png (if it is the PROMPT, put it before --image)"),
        (["VLM", "x", "--image", "VLM/config.json"], "config.json): not an image"),
        (["VLM", "<image> x"], "says <image> 1 times and has 0 images"),
        (["VLM", "<image> x", *["--image", "PHOTO"] * 2], "says <image> 1 times and has 2 images"),
        (["VLM", "x", *["--image", "PHOTO"] * 60], "the model's context is 160"),
        (["VLM", "x", "--image", "PHOTO", "--attention", "FOLDER"], "cannot be written"),
        (["VLM", "x", "--image", "PHOTO", "--attention", "FOLDER/no/a.png"], "cannot be written"),
        (["VLM", "x", "--image", "PHOTO", "--attention", "PHOTO"], "is one of the files that are read, and would be lost"),
        (["VLM", "x", "--image", "PHOTO", "--attention", "FOLDER/a.txt"], "figures are .png files"),
        (["VLM", "x", "--attention", "FOLDER/a.png"], "give an --image"),
        (["TOWERS", "x", "--image", "PHOTO"], "does not write text: ask how well captions fit an image, with --zero-shot"),
        (["VLM", "--image", "PHOTO", "--zero-shot", "x"], "holds a MllamaForConditionalGeneration: --zero-shot compares"),
        (["TOWERS", "--zero-shot", "x"], "give an --image"),
        (["TOWERS", "--image", "PHOTO", "--zero-shot"], "expected at least one argument"),
        (["TOWERS", "--image", "PHOTO", "--zero-shot", "x", "--chat"], "only --device and --dtype beside it"),
        (["TOWERS", "--image", "PHOTO", "--image", "FOLDER/no.png", "--zero-shot", "x"], "there is no file"),
        (["TOWERS", "--image", "PHOTO", "--zero-shot", "x", "--beams", "3"], "only --device and --dtype beside it"),
        (["VLM", "x", "--image", "PHOTO", "--length-penalty", "2"], "--length-penalty is of --beams"),
        (["VLM", "x", "--image", ""], "argument --image: it is empty"),
        (["RUN", "x", "--adapter", "FOLDER"], "no adapter_config.json: is it a LoRA adapter?"),
        (["VLM", "x", "--top", "3", "--image", "PHOTO"], "--top is about the next tokens of a text: leave out --image"),
    ],
)
def test_bad_calls_with_images_are_one_line_and_exit_code_2(run, vlms, towers, photos, tmp_path, capsys, argv, message):
    known = {"RUN": run, "VLM": vlms["idefics3"], "TOWERS": towers, "PHOTO": photos[0], "FOLDER": tmp_path}
    for name, path in known.items():
        argv = [word.replace(name, str(path)) for word in argv]
    assert message in refused(capsys, generate.main, *argv)


@pytest.mark.parametrize(
    "file, changes, message",
    [
        ("config.json", {"image_token_id": 5}, "the token id of <image>: 300 for its processor, 5 for its model"),
        ("preprocessor_config.json", {"max_image_size": {"longest_edge": 64}}, r"\(64, 64\) for its processor, \(32, 32\)"),
        ("preprocessor_config.json", {"do_rescale": 5}, "do_rescale is 5: it must be true or false"),
        ("processor_config.json", {"image_seq_len": 9}, "image_seq_len 9, the model 4 tokens for an image"),
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
    """An image overwrites its placeholder, so a model that never got a row for <image> is whole."""
    argv = [make_vlm(tmp_path, "mllama_scratch", rows), *flags(photos[:1]), QUESTION, "--max-new-tokens", 3]
    if fits:
        call(capsys, *argv)
    else:
        with pytest.raises(ValueError, match="with id 299, the model has rows for 299 tokens"):
            call(capsys, *argv)


def test_a_model_that_was_not_told_its_placeholder_asks_the_processor(tmp_path, photos, capsys):
    folder = make_vlm(tmp_path, "mllama_scratch")
    printed = call(capsys, folder, *flags(photos[:1]), QUESTION)
    content = json.loads((folder / "config.json").read_text())
    assert content.pop("image_token_id") == 300
    (folder / "config.json").write_text(json.dumps(content))
    assert call(capsys, folder, *flags(photos[:1]), QUESTION) == printed


# ---- captions --------------------------------------------------------------------------------------------------------

CAPTIONS = ["the cat sat on the mat", "a dog", "The fence jumped over the dog. " * 9]  # the last is cut off


def make_towers(folder, tokenizer):
    """A folder with transformers' SiglipModel, its image processor and a tokenizer, as the published ones are."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    text = sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "projection_size": 24}
    torch.manual_seed(0)
    model = transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
        model.logit_bias.fill_(-1.0)
    model.save_pretrained(folder)
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    about = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_input_names": ["input_ids"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def byte_level():
    tokenizer = BPETokenizer.train(TEXT, vocab_size=280, special_tokens=("<|endoftext|>",))
    tokenizer.model_max_length = 64
    return tokenizer


def unigram():
    """Of the published SigLIPs' kind: SentencePiece's Unigram, </s> at the end and as padding."""
    tokenizers, transformers = (pytest.importorskip(name) for name in ("tokenizers", "transformers"))
    pieces = [("</s>", 0.0), ("<unk>", -9.0), *((c, -5.0) for c in "\u2581.abcdefghijklmnopqrstuvwxyzT"), ("\u2581the", -2.0)]
    inner = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=1))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    ends = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "model_max_length": 64}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **ends)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return make_towers(tmp_path_factory.mktemp("towers"), byte_level())


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", [byte_level, unigram])
def test_captions_fit_as_well_as_in_transformers_pipeline(tmp_path, photos, capsys, kind, count):
    folder, captions = make_towers(tmp_path, kind()), CAPTIONS[:count]
    printed = call(capsys, folder, *flags(photos[:2]), "--zero-shot", *captions).splitlines()
    assert len(printed) == 2 * (1 + count) and len(set(printed[1 : 1 + count])) == count
    transformers = pytest.importorskip("transformers")
    pipe = transformers.pipeline("zero-shot-image-classification", model=str(folder), device="cpu")
    for k, photo in enumerate(photos[:2]):
        block = printed[(1 + count) * k : (1 + count) * (k + 1)]
        assert block[0] == str(photo)
        rows = pipe(str(photo), captions, hypothesis_template="{}")
        assert [line.split(" %  ")[1] for line in block[1:]] == [row["label"] for row in rows]
        found = [float(line.split(" %  ")[0]) / 100 for line in block[1:]]
        assert found == pytest.approx([row["score"] for row in rows], rel=1e-3)


@pytest.mark.parametrize("installed", [True, False])
def test_a_tokenizer_that_nobody_reads_is_one_line(towers, tmp_path, photos, capsys, monkeypatch, installed):
    for file in towers.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": 7}}')
    if not installed:
        monkeypatch.setitem(sys.modules, "tokenizers", None)
    error = refused(capsys, generate.main, tmp_path, *flags(photos[:1]), "--zero-shot", "a dog")
    assert "not byte-level BPE" in error
    assert ("model.vocab is empty or not a table" if installed else "`pip install tokenizers` to read it") in error


def test_towers_that_do_not_fit_their_files_are_refused(towers, tmp_path, photos):
    for file in towers.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    args = generate.parse_args([str(tmp_path), *map(str, flags(photos[:1])), "--zero-shot", "a dog"])
    about = json.loads((towers / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about | {"size": {"height": 48, "width": 32}}))
    with pytest.raises(ValueError, match=r"contradicts itself: images of .*\(48, 32\) for its processor, \(32, 32\)"):
        generate.zero_shot(args)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    words = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(words | {"model_input_names": ["input_ids", "attention_mask"]}))
    with pytest.raises(ValueError, match="the padding of captions is masked.*model_input_names"):
        generate.zero_shot(args)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(words))
    add_a_token(tmp_path, special=False)
    args.zero_shot[0] += " <new>"
    with pytest.raises(ValueError, match="the text has the token '<new>'"):
        generate.zero_shot(args)


# ---- adapters --------------------------------------------------------------------------------------------------------


def with_lora(model, seed: int):
    """The model with random LoRA in two layers of each block."""
    torch.manual_seed(seed)
    convert_linears_to_lora(model, 2, 6, targets=["q_proj", "up_proj"])
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_b, std=0.5)
    return model


@pytest.fixture(scope="module", params=["llama", "idefics3"])
def adapted(request, tmp_path_factory):
    """A base; a run that trained adapter 1 of it and, as train_vlm.py does, keeps the sum and the adapter; and adapter 2."""
    folder = tmp_path_factory.mktemp("adapted")
    base, run, other = folder / "base", folder / "run", folder / "other"
    if request.param == "llama":
        tokenizer = BPETokenizer.train(TEXT, vocab_size=290, special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
        torch.manual_seed(0)
        save_pretrained(Llama3ForCausalLM(LLAMA32Config(**WORDS, vocab_size=290)), base)
    else:
        make_vlm(base, "idefics3")
        tokenizer = BPETokenizer.from_pretrained(base)
    for target in (base, run):
        tokenizer.save_pretrained(target)
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (base / name).exists():
            (run / name).write_bytes((base / name).read_bytes())
    save_pretrained(with_lora(from_pretrained(base), 1), run)
    save_lora(with_lora(from_pretrained(base), 1), run / "lora")
    save_lora(with_lora(from_pretrained(base), 2), other)
    return base, run, other


def same_weights(one, two, tolerance: float) -> bool:
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all((one[name] - two[name]).abs().max() <= tolerance for name in one)


@pytest.mark.parametrize("source", ["base", "run"])
def test_another_adapter_takes_the_place_of_the_runs_own(adapted, tmp_path, capsys, source):
    base, run, other = adapted
    folder = run if source == "run" else base
    save_pretrained(with_lora(from_pretrained(base), 2), tmp_path)
    for file in base.iterdir():
        if not (tmp_path / file.name).exists():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    model = from_pretrained(folder)
    about = put_adapter(model, folder, other)
    assert same_weights(model, from_pretrained(tmp_path), 1e-5)
    count = sum(tensor.numel() for tensor in load_file(other / "adapter_model.safetensors").values())
    assert f"{count:,} trainable parameters" in about and ("the run's own" in about) == (source == "run")
    words = ["The cat", "--max-new-tokens", 9]
    printed = call(capsys, folder, *words, "--adapter", other)
    assert printed == call(capsys, tmp_path, *words) != call(capsys, run, *words)


def test_a_runs_own_adapter_changes_nothing(adapted, capsys):
    _, run, other = adapted
    model = from_pretrained(run)
    assert "which the weights held already" in put_adapter(model, run, run / "lora")
    assert same_weights(model, from_pretrained(run), 0)
    with pytest.raises(ValueError, match="made for another layer|no LoRA of a layer"):
        put_adapter(Llama3ForCausalLM(LLAMA32Config(**(WORDS | {"hidden_size": 16}), vocab_size=290)), run, other)


def merge_lora_by_command(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", "merge-lora", *map(str, words)])
    run_cli(convert.main)


def test_merge_lora_writes_a_plain_folder(adapted, tmp_path, capsys, monkeypatch):
    base, run, other = adapted
    merge_lora_by_command(monkeypatch, run, tmp_path / "own")
    assert same_weights(from_pretrained(tmp_path / "own"), from_pretrained(run), 0)
    merge_lora_by_command(monkeypatch, base, tmp_path / "other", "--adapter", other)
    printed = capsys.readouterr().out
    assert printed.count("trainable parameters") == 2 and "without LoRA layers" in printed
    assert same_weights(from_pretrained(tmp_path / "other"), put_on(from_pretrained(run), run, other), 1e-5)
    kept = {path.name for path in base.iterdir()} - {"lora"}
    assert {path.name for path in (tmp_path / "other").iterdir()} == kept
    with pytest.raises(SystemExit):
        merge_lora_by_command(monkeypatch, base, tmp_path / "none")
    assert "no adapter_config.json" in capsys.readouterr().err and not (tmp_path / "none").exists()


def put_on(model, source, adapter):
    put_adapter(model, source, adapter)
    return model


def test_four_bits_keep_an_adapter_beside_them(adapted, tmp_path, capsys, monkeypatch):
    """Merged in place, it would be rounded away; merge-lora makes floats of the sums."""
    base, _, other = adapted
    model = from_pretrained(base)
    quantize_(model, targets=["q_proj", "up_proj"])
    save_pretrained(model, tmp_path / "small")
    small = put_on(from_pretrained(tmp_path / "small"), tmp_path / "small", other)
    assert lora_layers(small) and any(isinstance(layer.linear, Linear4bit) for layer in lora_layers(small).values())
    merge_lora_by_command(monkeypatch, tmp_path / "small", tmp_path / "large", "--adapter", other)
    large, ids = from_pretrained(tmp_path / "large"), torch.tensor([[5, 70, 80]])
    assert not [layer for layer in large.modules() if isinstance(layer, Linear4bit)]
    torch.testing.assert_close(large(input_ids=ids)["logits"], small(input_ids=ids)["logits"], atol=1e-4, rtol=1e-4)
