"""Laws of push.py: what goes to the hub opens in transformers and has a card that says what the run says; nothing else goes, no
token is printed, and what cannot be uploaded is one line. The hub is replaced at huggingface_hub's HfApi."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from calls import refused
from lib import convert
from lib.checkpoint import save_pretrained
from lib.files import write_json
from lib.tokenizer import BPETokenizer
from toys import make, make_vlm
from vit_scratch import ViTConfig, ViTModel

hub = pytest.importorskip("huggingface_hub", reason="it is what uploads")
tf = pytest.importorskip("transformers", reason="what is uploaded is opened by it")

SETTINGS = {"dataset": "own", "data": "/home/me/photos/train.json", "steps": 12, "lr": 3e-4, "out": "runs/mine", "lora": None,
            "freeze": ["vision"], "seed": 0, "workers": 4}  # fmt: skip
RESULT = {"exact_match": 0.75, "by_kind": {"colour": 0.5}, "seconds": 3.1, "run": "/home/me/runs/mine"}


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    save_pretrained(make_vlm(vision_feature_layer=-2), folder, layout="published")
    write_json(folder / "settings.json", SETTINGS)
    write_json(folder / "result.json", RESULT)
    for name in ("samples.png", "state.pt", "metrics.jsonl", "chat_template.jinja"):
        (folder / name).write_bytes(b"")
    return folder


def push(monkeypatch, *args) -> None:
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", "push", *map(str, args)])
    convert.main()


class Hub:
    """HfApi as far as push uses it: the files go to a folder beside it, or it fails."""

    def __init__(self, target: Path, error: Exception | None = None):
        self.target, self.error, self.calls = target, error, []

    def __call__(self):
        return self

    def create_repo(self, name, **options):
        self.calls.append((name, options))
        if self.error:
            raise self.error
        return f"https://huggingface.co/{name}"

    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
        for name in allow_patterns:
            (self.target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / name, self.target / name)


def test_what_is_uploaded_opens_in_transformers_and_nothing_else_goes(run, tmp_path, monkeypatch, capsys):
    api = Hub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", api)
    push(monkeypatch, run, "me/my-vlm", "--private")
    assert capsys.readouterr().out.splitlines()[-1] == "5 files are at https://huggingface.co/me/my-vlm"
    assert api.calls == [("me/my-vlm", {"private": True, "exist_ok": True})]
    names = {file.name for file in api.target.iterdir()}
    assert names == {"config.json", "model.safetensors", "chat_template.jinja", "README.md", "samples.png"}
    _, info = tf.AutoModelForImageTextToText.from_pretrained(api.target, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info


def test_the_card_says_what_the_run_says_and_no_path_of_this_disk(run, monkeypatch, capsys):
    push(monkeypatch, run, "me/my-vlm", "--dry-run")
    lines, card = capsys.readouterr().out.splitlines(), (run / "README.md").read_text()
    assert lines[-1] == "5 files would go to me/my-vlm; nothing was uploaded"
    assert any(line.split()[0] == "model.safetensors" and line.endswith(" bytes") for line in lines)
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n")
    for words in ("# my-vlm", 'pipeline("image-text-to-text", model="me/my-vlm")', "![samples](samples.png)", "A llava of "):
        assert words in card
    for row in ("| exact_match | 0.75 |", '| by_kind | {"colour": 0.5} |', "| steps | 12 |", '| freeze | ["vision"] |'):
        assert row in card
    assert "| data | train.json |" in card and "/home/me" not in card and "workers" not in card and "lora" not in card


@pytest.mark.parametrize("template, call", [
    ("chatml", '{"role": "user", "content": "<image>\\nWhat is this?"}'),
    ("{% for m in messages %}{% for part in m.content %}{{ part.text or '<image>' }}{% endfor %}<|im_end|>{% endfor %}",
     '{"type": "image", "url": "photo.jpg"}'),
])  # fmt: skip
def test_the_card_asks_as_the_template_takes_it(run, monkeypatch, template, call):
    """A template of texts, such as ours, fails on the list of images and texts that each card had."""
    tokenizer = BPETokenizer.train("a b", 259, ["<|im_start|>", "<|im_end|>", "<image>"])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(run)
    push(monkeypatch, run, "me/m", "--dry-run")
    assert call in (run / "README.md").read_text()


def test_a_card_that_somebody_wrote_stays_and_our_own_is_written_anew(run, monkeypatch, capsys):
    for _ in range(2):
        push(monkeypatch, run, "me/other", "--dry-run")
        assert "is the model card: add a license" in capsys.readouterr().out
    (run / "README.md").write_text("mine")
    push(monkeypatch, run, "me/other", "--dry-run")
    assert "README.md is not of this command" in capsys.readouterr().out and (run / "README.md").read_text() == "mine"


def test_shards_go_with_their_index_and_a_stale_one_does_not(tmp_path, monkeypatch, capsys):
    save_pretrained(make(), tmp_path / "m", max_shard_bytes=2e4)
    push(monkeypatch, tmp_path / "m", "me/m", "--dry-run")
    shown = capsys.readouterr().out
    assert "model.safetensors.index.json" in shown and "model-00002-of-" in shown
    assert 'pipeline("text-generation", model="me/m")' in (tmp_path / "m" / "README.md").read_text()


def fails(run, monkeypatch, capsys, folder, name, *flags) -> str:
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", "push", str(folder), name, *flags])
    return refused(capsys, lambda argv: convert.main())


@pytest.mark.parametrize(
    "error",
    [
        hub.errors.OfflineModeIsEnabled("offline mode is enabled: HF_HUB_OFFLINE=1"),
        hub.errors.HfHubHTTPError.__mro__[1]("[Errno -2] Name or service not known"),  # of its HTTP library
        ValueError("Invalid user token: hf_secret"),
        PermissionError(13, "Permission denied"),
    ],
)
def test_without_network_or_leave_it_is_one_line_without_the_token(run, tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(hub, "HfApi", Hub(tmp_path / "hub", error))
    monkeypatch.setattr(hub, "get_token", lambda: "hf_secret")
    line = fails(run, monkeypatch, capsys, run, "me/my-vlm")
    assert line.startswith("error: the hub did not take me/my-vlm (") and "hf auth login" in line and "hf_secret" not in line


def test_without_huggingface_hub_the_line_says_what_to_install(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in fails(run, monkeypatch, capsys, run, "me/my-vlm")


def test_folders_that_transformers_does_not_open_are_refused_before_anything_is_written(run, tmp_path, monkeypatch, capsys):
    small = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    save_pretrained(ViTModel(ViTConfig(**small, pooling="mean")), tmp_path / "own")
    line = fails(run, monkeypatch, capsys, tmp_path / "own", "me/vit", "--dry-run")
    assert "own holds a vit_scratch, which only this project opens: " in line and "not by the mean of the patches" in line
    assert not (tmp_path / "own" / "README.md").exists()
    assert "there is no folder" in fails(run, monkeypatch, capsys, tmp_path / "nowhere", "me/vit")
    assert "'vit' is no name on the hub: it must be user/name" in fails(run, monkeypatch, capsys, run, "vit")
    (run / "model.safetensors").write_bytes(b"cut")
    assert "not a valid safetensors file" in fails(run, monkeypatch, capsys, run, "me/my-vlm", "--dry-run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "model_type": "swin"}))
    assert "model_type 'swin'" in fails(run, monkeypatch, capsys, run, "me/my-vlm")
