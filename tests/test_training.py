"""Laws of training.py and of every training script's end: a resumed run is the uninterrupted run, bit for bit."""

import json
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

import train_vit
from calls import printed, refused
from lib.checkpoint import from_pretrained
from lib.run import EMA, Metrics, Run, Trainer, argument_parser, cosine_schedule, find_device, parameter_groups
from vit_scratch import ViTConfig, ViTModel

ROOT = Path(__file__).resolve().parents[1]
TINY = "--hidden-size 32 --layers 2 --heads 2 --pooling cls --batch-size 32 --epochs 1 --eval-every 1000".split()  # 44 steps


train = partial(printed, train_vit.main, *TINY)


def start(run: Path, *flags) -> subprocess.Popen:
    """The script in a process of its own, to be stopped from outside."""
    command = [sys.executable, "train_vit.py", *TINY, "--out", str(run), *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from its first step to its last, with everything on that has a state."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    return run, train("--out", run, "--ema", 0.9, "--dropout", 0.1), ["--ema", 0.9, "--dropout", 0.1]


def test_a_finished_run_leaves_what_is_promised(finished):
    run, lines, _ = finished
    result = json.loads(lines[-1])
    assert {"test_accuracy", "seconds", "images_per_second", "parameters"} <= result.keys()
    left = {path.name for path in run.iterdir()}
    assert {"config.json", "model.safetensors", "metrics.jsonl", "state.pt", "preprocessor_config.json"} <= left
    assert {"curves.png", "samples.png", "mistakes.png", "confusion.png", "filters.png"} <= left
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "loss", "lr", "images_per_second"} <= rows[0].keys()
    assert rows[-1]["test_accuracy"] == pytest.approx(result["test_accuracy"], abs=1e-4)


def test_transformers_opens_the_run_folder(finished):
    transformers = pytest.importorskip("transformers")
    run, _, _ = finished
    x = torch.randn(2, 1, 16, 16)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(run).eval()
    torch.testing.assert_close(theirs(x).logits, from_pretrained(run)(x), atol=1e-5, rtol=1e-5)
    assert theirs.config.id2label[3] == "3"


@pytest.mark.parametrize("which, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(finished, tmp_path, which, code):
    whole, _, flags = finished
    run = tmp_path / "run"
    process = start(run, *flags)
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():  # written every 20 steps
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(which)
    out, _ = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the run ended before the signal came")
    assert process.returncode == code
    stopped_at = int(re.search(r"stopped after step (\d+); go on with: .*--resume", out).group(1))
    assert 20 <= stopped_at < 44
    train("--out", run, *flags, "--resume")
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(run)[name]), name
    for a, b in zip(*(Metrics(r / "metrics.jsonl", 10**9).read() for r in (whole, run)), strict=True):
        assert {k: v for k, v in a.items() if "second" not in k} == {k: v for k, v in b.items() if "second" not in k}


def test_a_run_killed_without_warning_resumes_from_its_last_saved_state(finished, tmp_path):
    whole, _, flags = finished
    run = tmp_path / "run"
    process = start(run, *flags, "--save-every", 3)
    while not (run / "state.pt").exists():
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(0.1)
    process.kill()
    process.wait()
    train("--out", run, *flags, "--resume")
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(whole).items())


def same_learning(a: Path, b: Path) -> None:
    """The same losses on the way and the same answers at the end, to rounding. (Weights that change no answer, such as the
    bias of a key, follow the rounding errors: Adam divides their noise by its own size.)"""
    x = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(from_pretrained(a)(x), from_pretrained(b)(x), atol=5e-3, rtol=0)
    losses = [[row["loss"] for row in Metrics(run / "metrics.jsonl", 10**9).read() if "loss" in row] for run in (a, b)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3) and len(losses[0]) == 3


def test_gradient_accumulation_changes_nothing_but_memory(tmp_path):
    """Without drop-path, whose draws depend on the split."""
    for parts in (1, 4):
        train("--out", tmp_path / str(parts), "--grad-accum", parts, "--drop-path", 0, "--augment", "none")
    same_learning(tmp_path / "1", tmp_path / "4")


def test_two_processes_train_as_one(tmp_path):
    flags = ["--drop-path", "0", "--augment", "none"]
    train("--out", tmp_path / "one", *flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train_vit.py"]
    done = subprocess.run(
        [*command, *TINY, *flags, "--device", "cpu", "--out", str(tmp_path / "two")],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test_accuracy") == 2  # the evaluation and the last line, once each: rank 0 alone speaks
    same_learning(tmp_path / "one", tmp_path / "two")


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(tmp_path, capsys):
    error = refused(capsys, train_vit.main, *TINY, "--out", tmp_path, "--lr", 1e30, "--clip", 1e30)
    assert re.search(r"error: the loss is not finite at step \d+: try a lower --lr", error)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lr", "-1"], "argument --lr: '-1' must be a number above 0"),
        (["--batch-size", "0"], "argument --batch-size: '0' must be a whole number"),
        (["--epochs", "nan"], "'nan' must be a number above 0"),
        (["--batch-size", "30", "--grad-accum", "4"], "--batch-size 30 cannot be split"),
        (["--batch-size", "5000"], "5000"),
        (["--heads", "5"], "hidden_size 32 cannot be split over 5 attention heads"),
        (["--patch-size", "5"], "16x16 picture cannot be cut into 5x5 patches"),
        (["--device", "cuda:7"], "--device cuda:7: this machine or this build of torch has no such device"),
        (["--dtype", "fp16", "--device", "cpu"], "--dtype fp16 needs a GPU"),
        (["--dataset", "folder"], "--data"),
        (["--dataset", "mnist", "--data", "/nowhere"], "/nowhere"),
        (["--resume"], "no state.pt to resume from"),
        (["--lerning-rate", "1"], "unrecognized arguments"),
        (["--compile", "False"], "unrecognized arguments: False"),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_2(tmp_path, capsys, flags, message):
    assert message in refused(capsys, train_vit.main, *TINY, "--out", tmp_path / "run", *flags)


def test_resuming_with_other_settings_is_refused(finished, capsys):
    run, _, flags = finished
    flags = [*TINY, *flags, "--out", run, "--resume", "--lr", 0.5]
    assert "--lr is 0.5, the run in" in refused(capsys, train_vit.main, *flags)


# ---- parts -------------------------------------------------------------------------------------------------------------


def test_schedule_rises_then_falls():
    factors = [cosine_schedule(p / 100, warmup=0.1, floor=0.01) for p in range(101)]
    assert factors[0] == 0 and max(factors) == factors[10] == 1
    assert factors[55] == pytest.approx(0.505, abs=1e-3) and factors[100] == pytest.approx(0.01)


def test_norms_biases_positions_and_tokens_are_not_decayed():
    model = ViTModel(ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    decay, keep = parameter_groups(model, 0.05, lr=1e-3)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith("weight") and "norm" not in names[id(p)] for p in decay["params"])
    kept = {names[id(p)] for p in keep["params"]}
    assert {"embeddings.position_embedding", "embeddings.cls_token", "norm.weight", "classifier.bias"} <= kept
    assert len(decay["params"]) + len(keep["params"]) == len(names) and keep["weight_decay"] == 0


def test_ema_is_the_weighted_mean_and_gives_the_weights_back():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    ema = EMA(model, decay=0.5)
    expected = 0.0
    for step in range(1, 60):
        nn.init.constant_(model.weight, float(step))
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with ema.applied(model):
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 59


def test_metrics_drop_what_will_come_again_and_a_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 20}\n{"step": 40}\n{"step": 60}\n{"ste')
    metrics = Metrics(path, resume_at=40)
    metrics.write(step=60, loss=1.0)
    assert metrics.read() == [{"step": 20}, {"step": 40}, {"step": 60, "loss": 1.0}]


def test_device_is_found_or_refused():
    assert find_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="--device nonsense"):
        find_device("nonsense")


@pytest.mark.parametrize("has, flags, said", [(True, [], True), (True, ["--dtype", "bf16"], False), (False, [], False)])
def test_the_opening_line_names_bf16_where_it_would_be_faster(tmp_path, monkeypatch, has, flags, said):
    monkeypatch.setattr("training.has_bf16_products", lambda device: has)
    run = Run(argument_parser("", out=str(tmp_path)).parse_args(["--device", "cpu", *flags]))
    assert ("--dtype bf16 would be faster" in str(run)) == said


def test_where_one_gradient_overflows_no_optimiser_steps_and_it_is_counted(tmp_path):
    """Clipping spreads what is not finite over all gradients. With AdamW and Muon side by side only one was told to skip, and
    the other's weights became NaN."""
    run = Run(argument_parser("", out=str(tmp_path)).parse_args(["--device", "cpu"]))
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    groups = parameter_groups(model, 0.05, 1e-2, muon_lr=0.02)
    trainer = Trainer(run, model, 10, groups, SimpleNamespace(state_dict=dict, fraction=0.0))
    assert len(trainer.optimizers) == 2
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x, before = torch.randn(3, 4), {name: p.detach().clone() for name, p in model.named_parameters()}
    hook = model[1].bias.register_hook(lambda grad: grad * float("nan"))
    trainer.step([model(x).square().mean()])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert trainer.skipped == 1 and trainer.scaler.get_scale() == 4
    hook.remove()
    trainer.step([model(x).square().mean()])
    assert trainer.skipped == 1 and trainer.steps_done == 2
    assert all(p.isfinite().all() and not torch.equal(p, before[name]) for name, p in model.named_parameters())
