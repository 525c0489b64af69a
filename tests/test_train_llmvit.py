"""Laws of train_llmvit.py: every combination runs and comes back from its folder; resumed is as good as uninterrupted."""

import json
import os
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import generate
from calls import printed, refused
from data import augment
from data.augment import mix, normalize_images
from data.datasets import load_images
from extras import train_llmvit
from extras.llmvit_backbones import LanguageClassifier, from_run, load_language_model, word_matrix
from gpt import GPT, GPTConfig
from lib import figures
from lib.checkpoint import from_pretrained, save_pretrained
from lib.files import read_json
from lib.run_state import load_state
from lib.tokenizer import BPETokenizer
from lib.trace import record
from model import Linear_LORA, Llama3ForCausalLM, LLAMA32Config

TINY = "--size tiny --batch-size 32 --epochs 0.1 --eval-every 1000".split()  # 4 steps
TEXT = "the cat and the dog saw that one bird fly over the sea and then the cat sat with the dog " * 20


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Figures are drawn only where a test is about one; the others took two thirds of a run."""
    if "figure" not in request.node.name:
        monkeypatch.setattr(train_llmvit, "draw_answers", lambda folder, *_: (folder / "curves.png").touch())
        monkeypatch.setattr(figures, "word_grid", lambda images, words, patch, captions, path, *_, **__: path.touch())


def train(*flags) -> dict:
    """The script's last line."""
    return json.loads(printed(train_llmvit.main, *TINY, *flags)[-1])


@pytest.fixture(scope="module")
def language_models(tmp_path_factory):
    """Folders with a LLaMA and a GPT-2, each with a tokenizer of some words."""
    tokenizer = BPETokenizer.train([TEXT], 300, ["<|endoftext|>"], at_most=True)
    torch.manual_seed(0)
    models = {
        "llama": Llama3ForCausalLM(
            LLAMA32Config(
                **{"vocab_size": 320, "hidden_size": 32, "n_heads": 4, "n_kv_groups": 2, "n_layers": 3, "hidden_dim": 64},
                rope_base=10000.0,
            )
        ),
        "gpt2": GPT(GPTConfig(len(tokenizer), 64, 32, 3, 4)),
    }
    folders = {}
    for name, model in models.items():
        folders[name] = tmp_path_factory.mktemp("lm") / name
        save_pretrained(model, folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders, models, tokenizer


@pytest.fixture(scope="module")
def distilbert(tmp_path_factory):
    """A folder as transformers writes it, with a WordPiece tokenizer."""
    tf, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("lm") / "distilbert"
    vocabulary = ["[PAD]", "[UNK]", "[MASK]", *"abc", "##ing", "the", "cat", "sat", "dog", "##dog", "bird", "of"]
    model = tokenizers.models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]")
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), unk_token="[UNK]").save_pretrained(folder)
    config = tf.DistilBertConfig(vocab_size=len(vocabulary), dim=32, n_layers=3, n_heads=4, hidden_dim=64)
    tf.DistilBertForMaskedLM(config).save_pretrained(folder)
    return folder


def test_a_distilbert_is_trained_with_lora_in_4_bits(distilbert, tmp_path):
    """Its words are those without ## and of three letters or more."""
    train("--out", tmp_path, "--lm", distilbert, "--lm-layers", 2, "--words", 8, "--qlora")
    model, config = from_run(tmp_path)
    assert config["words"] == ["the", "cat", "sat", "dog", "bird"] and len(model.model.decoder.blocks) == 2
    assert model.model.get_input_embeddings().weight.shape == (5, 32)


def flags_of(name: str, language_models) -> list:
    """The flags of a row of RUNS; LLAMA and GPT2 stand for their folders."""
    folders = language_models[0]
    return [folders.get(word.lower(), word) for word in RUNS[name].split()]


RUNS = {
    "scratch knn": "--embedder knn",
    "scratch max": "--embedder max --metric cosine_similarity --lm-layers 1",
    "scratch direct": "--embedder direct --embedding-loss 0.1 --pooling last",
    "scratch frozen for a while": "--frozen-steps 2 --encoder patch_embed",
    "scratch padded": "--patch-size 5 --embedder max",
    "pretrained": "--lm LLAMA --lm-layers 2 --words 8",
    "pretrained frozen": "--lm LLAMA --freeze-lm --words 0 --embedder max",
    "pretrained lora": "--lm LLAMA --lm-layers 1 --words 8 --lora 2",
    "pretrained qlora": "--lm LLAMA --lm-layers 1 --words 8 --qlora",
    "random lora": "--lm LLAMA --words 8 --lora 2 --random-lm",
    "gpt2 lora": "--lm GPT2 --lm-layers 2 --words 8 --lora 2",
    "no language model": "--lm LLAMA --no-lm",
}


@pytest.mark.filterwarnings("ignore:patches of 5")
@pytest.mark.parametrize("name", RUNS)
def test_every_combination_trains_and_comes_back_from_its_folder(name, language_models, tmp_path):
    result = train("--out", tmp_path, *flags_of(name, language_models))
    left = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "metrics.jsonl", "state.pt", "result.json"} <= left
    assert "curves.png" in left and ("words.png" in left) == ("no " not in name)
    model, config = from_run(tmp_path)
    mean, std = (read_json(tmp_path / "preprocessor_config.json")[key] for key in ("image_mean", "image_std"))
    _, test = load_images("digits", image_size=16)
    with torch.no_grad():
        said = model(normalize_images(test.images, mean, std))["logits"].argmax(dim=1)
    assert (said == test.labels).float().mean().item() == pytest.approx(result["test_accuracy"], abs=1e-4)
    assert not model.training and model.config.id2label[3] == "3"


def test_generate_names_the_likeliest_classes_of_images(tmp_path, capsys):
    """With the run's own names and image settings; two files after one --image."""
    train("--out", tmp_path / "run")
    train_images, test = load_images("digits", image_size=16)
    mean, std = train_images.mean_std()
    for i in (0, 1):
        Image.fromarray(test.images[i, 0].numpy()).save(tmp_path / f"{i}.png")
    lines = printed(generate.main, tmp_path / "run", "--image", tmp_path / "0.png", tmp_path / "1.png", "--device", "cpu")
    model = from_pretrained(tmp_path / "run")
    with torch.no_grad():
        expected = model(normalize_images(test.images[:2], mean, std)).logits.softmax(dim=1).topk(5)
    assert [line.split() for line in (lines[1], lines[7])] == [
        [f"{100 * p:.4g}", "%", model.config.id2label[i]]
        for p, i in zip(expected.values[:, 0].tolist(), expected.indices[:, 0].tolist(), strict=True)
    ]
    assert "is a classifier" in refused(capsys, generate.main, tmp_path / "run", "What is this?")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_language_model_is_cut_to_its_first_layers_and_whole_words(name, language_models):
    folders, models, tokenizer = language_models
    lm, words = load_language_model(folders[name], 2, 7)
    whole = [f" {word}" for word in set(TEXT.split())]
    assert len(words) == 7 and any(word in whole for word in words)
    assert all(word[0] == " " and word[1:].isalpha() and len(word) > 3 for word in words)
    ids = [next(i for i in range(len(tokenizer)) if tokenizer.decode([i]) == word) for word in words]
    assert ids == sorted(ids)
    x = torch.randn(2, 5, 32)
    cut = LanguageClassifier(lm.eval(), 3)
    torch.testing.assert_close(word_matrix(lm), word_matrix(models[name])[ids])
    with record(models[name].eval(), "*layers.1", "blocks.1") as seen, torch.no_grad():
        models[name](inputs_embeds=x)
    read = []
    cut.decoder.norm.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    cut(x)
    torch.testing.assert_close(read[0], next(iter(seen.values())), atol=1e-5, rtol=1e-4)


def test_what_is_trained(language_models, tmp_path):
    """Under LoRA the corrections, the encoder and the head; the words of a trained model keep their meaning."""
    for flags in ("--lora 2", "--qlora", ""):
        out = tmp_path / flags.replace(" ", "")
        train("--out", out, "--lm", language_models[0]["llama"], "--words", 8, *flags.split())
        model, _ = from_run(out)
        source = ["--size", "tiny", "--lm", str(language_models[0]["llama"]), "--words", "8"]
        start = train_llmvit.build(train_llmvit.parse_args([*source, *flags.split()]), 1, (16, 16), 10)[0].state_dict()
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])} - {"_extra_state"}
        in_lm = {name for name in moved if name.startswith("model.decoder")}
        assert moved - in_lm and "model.decoder.embed_tokens.weight" not in moved
        if flags:
            assert in_lm and all(name.endswith(("lora_a", "lora_b")) for name in in_lm)
            kinds = {type(m.linear).__name__ for m in model.modules() if isinstance(m, Linear_LORA)}
            assert kinds == {"Linear4bit" if "q" in flags else "Linear"}
        else:
            assert any("q_proj" in name for name in in_lm)


def test_the_encoder_starts_the_same_with_every_language_model_and_without(language_models):
    source = ["--lm", str(language_models[0]["llama"]), "--words", "8"]
    starts = []
    for flags in ("", "--lora 2", "--random-lm", "--no-lm"):
        model, _ = train_llmvit.build(train_llmvit.parse_args(["--size", "tiny", *source, *flags.split()]), 1, (16, 16), 10)
        starts.append(model.encoder.vit.state_dict())
    for other in starts[1:]:
        assert all(torch.equal(tensor, starts[0][name]) for name, tensor in other.items())


def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, monkeypatch):
    """With a language model that unfreezes after the stop."""
    flags = ["--epochs", "0.5", "--frozen-steps", "14", "--ema", "0.9", "--dropout", "0.1"]  # 22 steps
    train("--out", tmp_path / "whole", *flags)
    calls = []

    def stopping(*given):
        calls.append(1)
        if len(calls) == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return mix(*given)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(augment, "mix", stopping)
        train("--out", tmp_path / "run", *flags)
    assert stopped.value.code == 130 and load_state(tmp_path / "run")["steps_done"] == 10
    train("--out", tmp_path / "run", *flags, "--resume")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_frozen_steps_count_steps_whatever_the_accumulation(tmp_path):
    """Four steps in two parts each, three of them frozen: the language model learns in the last one."""
    for steps in (3, 4):
        train("--out", tmp_path / str(steps), "--grad-accum", 2, "--frozen-steps", steps)
    moved = []
    start = train_llmvit.build(train_llmvit.parse_args(["--size", "tiny"]), 1, (16, 16), 10)[0].state_dict()
    for steps in (3, 4):
        state = from_run(tmp_path / str(steps))[0].state_dict()
        moved.append(not torch.equal(*(s["model.decoder.layers.0.self_attn.q_proj.weight"] for s in (state, start))))
    assert moved == [True, False]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--random-lm"], "--random-lm needs --lm"),
        (["--no-lm", "--lora", "4"], "--no-lm leaves no language model"),
        (["--no-lm", "--embedding-loss", "1"], "--no-lm leaves no words"),
        (["--freeze-lm", "--frozen-steps", "4"], "choose one"),
        (["--freeze-lm", "--lora", "4"], "would never learn; choose one"),
        (["--dropout", "1.5"], "argument --dropout: '1.5' must be"),
        (["--embedder", "near"], "invalid choice: 'near'"),
        (["--lm", "/nowhere"], "there is no folder /nowhere"),
        (["--lm", "LLAMA", "--lm-layers", "9"], "--lm-layers 9: the language model has 3"),
        (["--k", "300"], "k is 300, but there are 64 words"),
        (["--dataset", "mnist", "--data", "/nowhere"], "/nowhere"),
        (["--resume"], "no state.pt to resume from"),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_2(tmp_path, capsys, language_models, flags, message):
    flags = [language_models[0].get(word.lower(), word) for word in flags]
    assert message in refused(capsys, train_llmvit.main, *TINY, "--out", tmp_path / "run", *flags)


def test_other_folders_are_refused(tmp_path, language_models):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        from_run(tmp_path)
    with pytest.raises(ValueError, match="model_type 'llama'"):
        from_run(language_models[0]["llama"])


def test_the_figure_of_words_shows_each_in_its_patch(tmp_path):
    words = [[["up", "left"], ["a$b", "a very long word"]], [["x", ""], ["\x00", "é"]]]
    images = torch.zeros(2, 1, 7, 8, dtype=torch.uint8)
    figure = figures.word_grid(images, words, (4, 4), ["3", "5, is 8"], tmp_path / "words.png", "title", good=[True, False])
    for axes, grid in zip(figure.axes, words, strict=True):
        assert [text.get_position() for text in axes.texts] == [(2, 2), (6, 2), (2, 6), (6, 6)]
        assert axes.texts[0].get_text() == grid[0][0]
        assert axes.get_xlim() == (0, 8) and axes.get_ylim() == (8, 0)
    assert (tmp_path / "words.png").stat().st_size > 1000
