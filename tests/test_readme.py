"""The README keeps its word: its code and commands run, its links lead somewhere, its test command is CI's."""

import gzip
import io
import json
import re
import shlex
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import evaluate
import generate
import train_vit
import train_vlm
from data import llava as llava_json
from data import scenes, shards
from extras import demo, train_llmvit, train_siglip
from lib import convert
from lib.checkpoint import save_pretrained
from lib.tokenizer import BPETokenizer
from model import Llama3ForCausalLM, LLAMA32Config
from siglip import SiglipModel, SiglipVisionConfig
from test_data import mnist_files
from test_fuzz import gguf_bytes  # noqa: F401, a fixture

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
COMMANDS = [
    line.split("#")[0].strip()
    for kind, block in BLOCKS
    if kind == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith(("python ", "torchrun "))
]
MODULES = {"train_vit.py": train_vit, "train_vlm.py": train_vlm, "train_siglip.py": train_siglip,
           "train_llmvit.py": train_llmvit, "generate.py": generate, "evaluate.py": evaluate, "demo.py": demo}
PARSERS = {name: module.parse_args for name, module in {**MODULES, "llava_json.py": llava_json}.items()}


@pytest.mark.parametrize("code", [block for kind, block in BLOCKS if kind == "python" and "path/to" not in block])
def test_its_python_runs(code, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_name_scripts_and_settings_that_exist(command):
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).exists()
    if script in PARSERS and "--help" not in words:
        PARSERS[script](words[words.index(script) + 1 :])


# What makes a command short; and those that are not run here, with the reason.
BRIEF = {
    "train_vlm.py": "--vision-steps 2 --projector-steps 1 --steps 2 --eval-count 2 --batch-size 4 --per-scene 2",
    "train_siglip.py": "--steps 2 --eval-count 10 --batch-size 16", "train_llmvit.py": "--max-seconds 0.1",
    "train_vit.py": "--max-seconds 0.1 --batch-size 4",
}  # fmt: skip
ELSEWHERE = {"torchrun": "test_distributed.py", "demo.py": "test_demo.py, with a browser", "cifar10": "needs the network"}
SHARED = ROOT.parent / "shared" / "data"


def what_it_names(desk: Path) -> None:
    """The files and folders that the commands speak of."""
    shutil.copytree(ROOT / "assets", desk / "assets")
    for name in "ab":
        shutil.copy(ROOT / "assets" / "scene.png", desk / f"{name}.png")
    for name in ("train", "test"):
        scenes.export(desk / name, name, 8, per_scene=2)
        shutil.move(desk / name / "scenes.json", desk / f"{name}.json")
        shutil.copytree(desk / name / "images", desk / "photos", dirs_exist_ok=True)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    save_pretrained(SiglipModel(SiglipVisionConfig(**size, intermediate_size=64)), desk / "SIGLIP")
    tokenizer = BPETokenizer.train(scenes.corpus(), 300, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    size = {"hidden_size": 32, "n_heads": 4, "n_kv_groups": 2, "n_layers": 2, "hidden_dim": 48, "context_length": 512}
    lm = Llama3ForCausalLM(LLAMA32Config(**size, vocab_size=len(tokenizer), max_position_embeddings=512))
    for folder in ("SMOLLM2", "SOURCE"):
        save_pretrained(lm, desk / folder)
        tokenizer.save_pretrained(desk / folder)
    (desk / "DIR").mkdir()
    for name, content in mnist_files(10).items():
        (desk / "DIR" / f"{name}.gz").write_bytes(gzip.compress(content))
    with tarfile.open(desk / "photos.tar.gz", "w:gz") as archive:
        for k, path in enumerate(sorted((desk / "photos").iterdir())):
            archive.add(path, f"photos/{('light', 'dark')[k % 2]}/{path.name}")
    for name in ("easy_vqa.tar", "coco_captions_permissive.tar"):
        if (SHARED / name).exists():
            (desk / name).symlink_to(SHARED / name)


def test_its_commands_run_one_after_the_other(tmp_path, monkeypatch, capsys, request):
    """On small things of the names they use, with fewer steps."""
    what_it_names(tmp_path)
    (tmp_path / "model.gguf").write_bytes(request.getfixturevalue("gguf_bytes"))
    monkeypatch.chdir(tmp_path)
    scripts = {**MODULES, "llava_json.py": llava_json, "shards.py": shards, "checkpoint.py": convert}
    for command in ["python train_vlm.py", *COMMANDS]:
        _, script, *words = shlex.split(command)
        absent = any(name in command for name in ("easy", "coco")) and not (tmp_path / "easy_vqa.tar").exists()
        if absent or any(word in command for word in ELSEWHERE):
            continue
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        monkeypatch.setattr(sys, "argv", [script, *words, *BRIEF.get(script, "").split()])
        try:
            scripts[script].main()
        except SystemExit as stop:
            assert not stop.code, f"{command}: {capsys.readouterr().err}"
        said = capsys.readouterr()
        if script.startswith("train_") and "--help" not in words:
            assert json.loads(said.out.splitlines()[-1])["steps"], command
        if "--lora" in words:
            shutil.copytree("runs/vlm-llava", "RUN")
    assert Path("looks.png").stat().st_size > 5000 and Path("FOLDER", "model.safetensors").exists()


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_every_module_is_on_its_map():
    for path in ROOT.glob("*.py"):
        assert f"[{path.name}]({path.name})" in README, path.name


def test_ci_runs_its_commands():
    ci = (ROOT / ".ci" / "run").read_text()
    for command in ("python3 -m venv .venv", ". .venv/bin/activate", "-r requirements-dev.txt", "pytest"):
        assert command in README and command in ci
