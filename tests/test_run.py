"""Laws of lib/run.py and lib/optim.py: a resumed run is the uninterrupted run, bit for bit; parts, processes change nothing."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file
from tqdm import tqdm

import train_vit
from calls import Killed, interrupt, printed, refused
from lib.checkpoint import from_pretrained
from lib.cli import argument_parser, run_cli
from lib.devices import find_device
from lib.loggers import check_installed
from lib.memory import recompute_blocks
from lib.metrics import Metrics, read_metrics
from lib.optim import EMA, cosine_schedule, make_optimizers, parameter_groups, set_learning_rate
from lib.run import Run
from lib.run_state import save_state
from vit_scratch import ViTConfig, ViTModel

ROOT = Path(__file__).resolve().parents[1]
TINY = "--hidden-size 32 --layers 2 --heads 2 --pooling cls --batch-size 32 --epochs 1 --eval-every 16".split()  # 44 steps
STATEFUL = ["--ema", 0.9, "--dropout", 0.1]  # with everything on that has a state


train = partial(printed, train_vit.main, *TINY)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from its first step to its last, and what it printed."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    return run, train("--out", run, *STATEFUL)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run whose random numbers do not depend on how a batch is split."""
    run = tmp_path_factory.mktemp("runs") / "plain"
    train("--out", run, *SPLITTABLE)
    return run


SPLITTABLE = "--drop-path 0 --augment none --epochs 0.5 --eval-every 8".split()


def test_a_finished_run_leaves_what_is_promised(finished):
    run, lines = finished
    result = json.loads(lines[-1])
    assert {"test_accuracy", "seconds", "images_per_second", "parameters"} <= result.keys()
    left = {path.name for path in run.iterdir()}
    assert {"config.json", "model.safetensors", "metrics.jsonl", "state.pt", "preprocessor_config.json"} <= left
    assert {"curves.png", "samples.png", "mistakes.png", "confusion.png", "filters.png"} <= left
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [16, 20, 32, 40, 44, 44]  # evaluated at 16, 32 and the end, logged at the others
    assert {"step", "loss", "lr", "images_per_second"} <= rows[1].keys()
    assert rows[-1]["test_accuracy"] == pytest.approx(result["test_accuracy"], abs=1e-4)


def test_transformers_opens_the_run_folder(finished):
    transformers = pytest.importorskip("transformers")
    run, _ = finished
    x = torch.randn(2, 1, 16, 16)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(run).eval()
    torch.testing.assert_close(theirs(x).logits, from_pretrained(run)(x), atol=1e-5, rtol=1e-5)
    assert theirs.config.id2label[3] == "3"


def left_by(run: Path) -> tuple[dict, list[dict]]:
    """The weights and, except for what a clock says, the metrics of a run."""
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in read_metrics(run / "metrics.jsonl")]
    return {name: tensor.tolist() for name, tensor in load_file(run / "model.safetensors").items()}, rows


@pytest.mark.parametrize("where, which, stops_at", [("set_learning_rate", signal.SIGINT, 25), ("predict", signal.SIGTERM, 16)])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(finished, tmp_path, monkeypatch, where, which, stops_at):
    """Asked in the middle of step 25, it ends with that step; in an evaluation, where the model has other weights, the averaged
    ones, at once and with what the step before it left."""
    run, function, calls = tmp_path / "run", getattr(train_vit, where), []

    def call(*args):
        calls.append(1)
        if len(calls) == (25 if where == "set_learning_rate" else 1):
            os.kill(os.getpid(), which)
        return function(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train_vit, where, call)
        train_vit.main([*TINY, "--out", str(run), *map(str, STATEFUL)])
    assert stop.value.code == 128 + which
    assert torch.load(run / "state.pt")["steps_done"] == stops_at
    train("--out", run, *STATEFUL, "--resume")
    assert left_by(run) == left_by(finished[0])


def test_a_stopped_run_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_vit.py", "--epochs", "3"])
    monkeypatch.setattr(train_vit, "cosine_schedule", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or 1.0)
    with pytest.raises(SystemExit):
        train_vit.main([*TINY, "--out", str(tmp_path)])
    assert "stopped after step 1; go on with: python train_vit.py --epochs 3 --resume" in capsys.readouterr().out


def same_learning(a: Path, b: Path) -> None:
    """The same losses on the way and the same answers at the end, to rounding. (Weights that change no answer, such as the
    bias of a key, follow the rounding errors: Adam divides their noise by its own size.)"""
    x = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(from_pretrained(a)(x), from_pretrained(b)(x), atol=5e-3, rtol=0)
    losses = [[row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row] for run in (a, b)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3) and len(losses[0]) == 2


def test_gradient_accumulation_changes_nothing_but_memory(plain, tmp_path):
    train("--out", tmp_path, *SPLITTABLE, "--grad-accum", 4)
    same_learning(plain, tmp_path)


@pytest.mark.long
def test_two_processes_train_as_one(plain, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train_vit.py"]
    done = subprocess.run(
        [*command, *TINY, *SPLITTABLE, "--grad-accum", "2", "--device", "cpu", "--out", str(tmp_path / "two")],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test_accuracy") == 4  # three evaluations and the last line: rank 0 alone speaks
    assert "Warning" not in done.stderr
    same_learning(plain, tmp_path / "two")


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(tmp_path, capsys):
    error = refused(capsys, train_vit.main, *TINY, "--out", tmp_path, "--lr", 1e30, "--clip", 1e30)
    assert re.search(r"error: the loss is not finite at step \d+: try a lower --lr", error)


def test_weights_that_the_last_step_has_spoiled_are_not_saved(tmp_path):
    """The loss was finite, since it was computed before; the run ended with exit code 0 and wrote what nothing here reads."""
    run = tiny_run(tmp_path)
    model = run.place(nn.Linear(1, 1))
    with pytest.raises(FloatingPointError, match="bias is not finite after step 1: try a lower --lr"):
        for _ in run.steps("", 1, NoData(), make_optimizers(parameter_groups(model, 0.05, 1e-2))):
            nn.init.constant_(model.bias, float("inf"))
            run.steps_done += 1
    assert not (tmp_path / "state.pt").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lr", "-1"], "argument --lr: '-1' must be a number above 0"),
        (["--batch-size", "0"], "argument --batch-size: '0' must be a whole number"),
        (["--epochs", "nan"], "'nan' must be a number above 0"),
        (["--batch-size", "30", "--grad-accum", "4"], "--batch-size 30 cannot be split"),
        (["--hidden-size", "6"], "sincos positions need a hidden_size divisible by 4, not 6"),
        (["--heads", "5"], "cannot be split over 5 attention heads: choose a multiple (--hidden-size, --heads)"),
        (["--patch-size", "5"], "choose sizes that divide (--patch-size, --image-size)"),
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


def test_a_second_process_may_not_write_to_the_folder_and_a_crash_leaves_no_lock(tmp_path, capsys):
    """Two runs with the same --out mixed their metrics, and each replaced the other's state. --dry-run writes nothing."""
    code = "import sys; from pathlib import Path; from lib.folder_lock import take_folder; take_folder(Path(sys.argv[1]))"
    code += "; print('taken', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "taken\n"
    for flags in ([], ["--resume"]):
        error = refused(capsys, train_vit.main, *TINY, "--out", tmp_path, *flags)
        assert f"process {other.pid} is writing to this folder" in error
    assert {path.name for path in tmp_path.iterdir()} == {"lock"}
    other.kill(), other.wait(), other.stdin.close(), other.stdout.close()
    for _ in range(2):  # and this process may, as often as it likes
        tiny_run(tmp_path)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_a_terminal_cannot_write_ends_nothing(monkeypatch, encoding):
    """A row's text, a file's name, an answer: one letter that the terminal's encoding lacks was a traceback in hour three."""
    text = "caf\u00e9 \u2192 \u4f60 \udcff"  # the last one: of a file name that is no UTF-8
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out), monkeypatch.setattr(sys, "stderr", err)

    def main():
        print(text)
        for _ in tqdm([1], desc=text):
            tqdm.write(text)
        raise ValueError(text)

    with pytest.raises(SystemExit, match="2"):
        run_cli(main)
    written = text.encode(encoding, "backslashreplace")
    assert out.buffer.getvalue() == written + b"\n" + written + b"\n" and b"error: " + written in err.buffer.getvalue()


@pytest.mark.parametrize("saved", [False, True])
def test_a_run_that_ends_promises_no_state_that_was_never_saved(tmp_path, monkeypatch, saved):
    """A full disk met by the first save said "The state before is still good"; so did a loss that is not finite."""
    if saved:
        save_state(tmp_path, {"settings": {}})
        (tmp_path / "lock").write_text("1\n")

    def full(state, file):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="is the disk full") as error:
        save_state(tmp_path, {"settings": {}})
    run = tiny_run(tmp_path)
    model = run.place(nn.Linear(1, 1))
    with pytest.raises(FloatingPointError, match="lower --lr") as loss:
        for _ in run.steps("", 1, NoData(), make_optimizers(parameter_groups(model, 0.05, 1e-2))):
            run.loss += float("nan")
            run.steps_done += 1
    assert {str(each.value).endswith("; the state saved before is as it was") for each in (error, loss)} == {saved}


def test_resuming_with_other_settings_is_refused(finished, capsys):
    run, _ = finished
    flags = [*TINY, *STATEFUL, "--out", run, "--resume", "--lr", 0.5]
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
    """The evaluation after the step it resumes at, too."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 20, "lr": 1}\n{"step": 40, "lr": 1}\n{"step": 40, "accuracy": 1}\n{"step": 60, "lr": 1}\n{"ste')
    metrics = Metrics(path, resume_at=40)
    metrics.write(step=60, loss=1.0)
    assert metrics.read() == [{"step": 20, "lr": 1}, {"step": 40, "lr": 1}, {"step": 60, "loss": 1.0}]


def test_device_is_found_or_refused():
    assert find_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="--device nonsense"):
        find_device("nonsense")


@pytest.mark.parametrize("has, flags, said", [(True, [], True), (True, ["--dtype", "bf16"], False), (False, [], False)])
def test_the_opening_line_names_bf16_where_it_would_be_faster(tmp_path, monkeypatch, has, flags, said):
    monkeypatch.setattr("lib.run.has_bf16_products", lambda device: has)
    run = Run(argument_parser("", out=str(tmp_path)).parse_args(["--device", "cpu", *flags]))
    assert ("--dtype bf16 would be faster" in str(run)) == said


def tiny_run(folder: Path, *flags) -> Run:
    return Run(argument_parser("", out=str(folder)).parse_args(["--device", "cpu", *flags]))


class NoData:
    """What run.steps asks of batches."""

    fraction = 0.0

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_where_one_gradient_overflows_no_optimiser_steps_and_it_is_counted(tmp_path):
    """Clipping spreads what is not finite over all gradients. With AdamW and Muon side by side only one was told to skip, and
    the other's weights became NaN."""
    run = tiny_run(tmp_path)
    model = run.place(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    optimizers = make_optimizers(parameter_groups(model, 0.05, 1e-2, muon_lr=0.02))
    assert len(optimizers) == 2
    x, before = torch.randn(3, 4), {name: p.detach().clone() for name, p in model.named_parameters()}
    hook = model[1].bias.register_hook(lambda grad: grad * float("nan"))
    for step in run.steps("", 2, NoData(), optimizers):
        if step == 0:
            run.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        run.scaler.scale(model(x).square().mean()).backward()
        run.clip_and_step(optimizers, 1.0)
        assert run.skipped == 1 and run.scaler.get_scale() == 4
        assert step == 1 or all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        hook.remove()
    assert all(p.isfinite().all() and not torch.equal(p, before[name]) for name, p in model.named_parameters())


def three_stages(folder: Path, *flags, stop_in: int | None = None) -> list[tuple]:
    """A run in stages of two steps: (stage, step, weight before it) of each step that was taken."""
    run = tiny_run(folder, "--save-every", "1", *flags)
    torch.manual_seed(0)
    model, seen = run.place(nn.Linear(2, 1)), []
    for stage in ("a", "b", "c"):
        optimizers = make_optimizers(parameter_groups(model, 0.05, 1e-2))
        for step in run.steps(stage, 2, NoData(), optimizers):
            seen.append((stage, step, model.weight[0, 0].item()))
            run.seed_step(step)
            model(torch.randn(3, 2)).square().mean().backward()
            run.clip_and_step(optimizers, 1.0)
            if step == stop_in:
                run.stop_signal = signal.SIGTERM
    return seen


@pytest.mark.parametrize("stop_in", range(6))
def test_a_run_in_stages_goes_on_in_the_stage_where_it_stopped(tmp_path, stop_in):
    whole = three_stages(tmp_path / "whole")
    assert [step for _, step, _ in whole] == list(range(6))
    with pytest.raises(SystemExit):
        three_stages(tmp_path / "stopped", stop_in=stop_in)
    assert three_stages(tmp_path / "stopped", "--resume") == whole[stop_in + 1 :]


def test_more_figures_come_into_the_line_of_the_step_that_is_logged(tmp_path):
    run = tiny_run(tmp_path)
    model = run.place(nn.Linear(2, 1))
    optimizers = make_optimizers(parameter_groups(model, 0.05, 1e-2))
    for step in run.steps("", 30, NoData(), optimizers):
        model(torch.ones(3, 2)).square().mean().backward()
        if run.logs(step):
            run.log_with(grad_norm=model.weight.grad.norm())
        run.clip_and_step(optimizers, 1.0)
    assert [row["step"] for row in run.metrics.read() if row["grad_norm"] > 0] == [20, 30]


def test_blocks_are_recomputed_in_training_alone_and_change_nothing():
    """Of two equal models one keeps its activations; as often as a block runs, its norm does."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ViTModel(ViTConfig(**sizes, dropout=0.1))
    x, found = torch.randn(2, 3, 8, 8), []
    for recomputed in (False, True):
        if recomputed:
            recompute_blocks(model)
        ran = []
        hooks = [block.norm_1.register_forward_hook(lambda *_: ran.append(1)) for block in model.blocks]  # noqa: B023
        model.zero_grad()
        torch.manual_seed(1)
        model(x).square().sum().backward()
        in_training = len(ran)
        with torch.no_grad():
            model(x)
        assert (in_training, len(ran) - in_training) == (4 if recomputed else 2, 2)
        found.append([p.grad.clone() for p in model.parameters()])
        for hook in hooks:
            hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class FakeWandb(SimpleNamespace):
    """As much of wandb as lib/loggers.py calls, which keeps what it is given."""

    def __init__(self):
        self.begun, self.rows = [], []
        self.Settings = lambda **options: SimpleNamespace(project=None)
        self.errors, self.Image = SimpleNamespace(Error=ZeroDivisionError), lambda path: path
        run = SimpleNamespace(log=self.rows.append, finish=lambda: None, define_metric=lambda *args, **options: None)
        self.init = lambda **options: self.begun.append(options) or run


def test_other_logs_get_what_metrics_gets_and_a_resumed_run_goes_on_in_them(tmp_path, monkeypatch):
    """Killed after step 30, with a line of step 40 that comes again: TensorBoard has every step once, wandb the same run."""
    pytest.importorskip("tensorboard", reason="its files are read back")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin=name))
    flags = [*TINY, *map(str, STATEFUL), "--out", str(tmp_path), "--log", "tensorboard", "--log", "wandb", "--save-every", "30"]
    for again in ([], ["--resume"]):
        with pytest.MonkeyPatch.context() as patch:
            if not again:
                interrupt(patch, "kill", 42)
            with contextlib.suppress(Killed):
                printed(train_vit.main, *flags, *again)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0, "images": 0}).Reload()
    for name in ("loss", "test_accuracy", "seconds"):
        wanted = [(row["step"], pytest.approx(row[name])) for row in rows if name in row]
        assert [(event.step, event.value) for event in events.Scalars(name)] == wanted
    assert [event.step for event in events.Images("samples")] == [44]
    assert len({options["id"] for options in wandb.begun}) == 1 and len(wandb.begun) == 2
    assert wandb.rows[-1] == {"step": 44, "samples": str(tmp_path / "samples.png")}
    assert all(row in wandb.rows for row in rows)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_log_whose_package_is_missing_is_one_line(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = refused(capsys, train_vit.main, *TINY, "--out", tmp_path, "--log", name)
    assert error.endswith(f"--log {name} needs a package that is not installed: pip install {name}")


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    """wandb leaves a folder "wandb" where it is called: imported from there it was a module without anything in it."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match="pip install wandb"):
        check_installed(["wandb"])


def test_a_wandb_that_cannot_start_is_one_line(tmp_path, monkeypatch, capsys):
    wandb = FakeWandb()
    wandb.init = lambda **options: 1 / 0
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin=name))
    error = refused(capsys, train_vit.main, *TINY, "--out", tmp_path, "--log", "wandb")
    assert "--log wandb cannot start (division by zero): log in with `wandb login`, or set WANDB_MODE=offline" in error


def test_the_learning_rate_rises_from_the_first_step_on():
    optimizers = make_optimizers([{"params": [nn.Parameter(torch.ones(1))], "lr": 2.0, "weight_decay": 0.0, "muon": False}])
    set_learning_rate(optimizers, 0.25)
    set_learning_rate(optimizers, 0.5)
    assert optimizers[0].param_groups[0]["lr"] == 1.0  # of the peak, not of what it was
