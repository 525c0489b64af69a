"""The README keeps its word: its code runs, its commands parse, its links lead somewhere, its test command is CI's."""

import re
import shlex
from pathlib import Path

import pytest

import demo
import evaluate
import generate
import llava_json
import train_llmvit
import train_siglip
import train_vit
import train_vlm

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
COMMANDS = [
    line.split("#")[0].strip()
    for kind, block in BLOCKS
    if kind == "bash"
    for line in block.splitlines()
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
