"""Laws of what befalls a run from outside: killed at any moment it goes on as if nothing had happened, asked to end it saves
within seconds whatever it is doing, a full disk costs nothing that was saved. Each test is about a process of its own, forked
from one that has imported the scripts already. At the end, bugs that test_fuzz.py has found, each with its story.
"""

import contextlib
import importlib
import io
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_vit
from calls import refused
from data import check
from data.images import decode_image
from extras import caption_sheet
from lib import checkpoint, run_state
from lib.answers import scene_items
from lib.checkpoint import save_pretrained
from lib.cli import run_cli
from lib.files import sweep
from lib.image_settings import image_settings
from lib.metrics import Metrics, read_metrics
from lib.run import Run
from lib.run_state import load_state
from lib.tokenizer import BPETokenizer
from lib.tokenizer_files import split_by
from model import Llama3ForCausalLM, LLAMA32Config

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")

SCRIPTS = ("train_vit", "train_vlm", "extras.train_siglip", "extras.train_llmvit")
COMMON = "--device cpu --workers 1 --save-every 2".split()
FLAGS = {  # small ones, of some ten steps
    "train_vit": "--hidden-size 32 --layers 2 --heads 2 --batch-size 64 --epochs 0.5 --ema 0.9 --dropout 0.1 --eval-every 4",
    "train_vlm": "--size tiny --batch-size 4 --per-scene 3 --eval-count 1 --vision-steps 3 "
    "--projector-steps 2 --steps 6 --eval-every 8 --ema 0.9",
    "extras.train_siglip": "--size tiny --batch-size 8 --eval-count 10 --steps 8 --tokens 64 --dropout 0.1 --eval-every 4",
    "extras.train_llmvit": "--size tiny --batch-size 32 --epochs 0.2 --frozen-steps 4 --grad-accum 2 --eval-every 4",
}


# ---- processes -------------------------------------------------------------------------------------------------------


def smaller(script) -> None:
    """Small models, and no images painted."""
    if script.__name__ == "train_vlm":
        script.VISION_BATCH = 4
        script.scene_items = lambda split, count, seed: scene_items(split, 1, seed, 2)
        sys.modules["lib.vlm_report"].draw = lambda *args: None
    script.draw = script.draw_answers = lambda *args: None  # whichever of the two it has
    script.draw_words = lambda *args: {}


def in_child(name: str, flags: list[str], log: str, arrange) -> None:
    """All of a process that runs a script. arrange(): what is to befall it."""
    out = os.open(log, os.O_WRONLY)
    os.dup2(out, 1), os.dup2(out, 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    script = importlib.import_module(name)
    smaller(script)
    if arrange is not None:
        arrange()
    sys.argv = [f"{name}.py", *flags]
    run_cli(script.main)


class Child:
    """A script under way. What it prints comes through a pipe, which is never full and has no size limit."""

    def __init__(self, nursery, name: str, run: Path, *flags, arrange=None):
        log, self.heard = Path(tempfile.mkdtemp(dir=run.parent)) / "log", b""
        os.mkfifo(log)
        self.log = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
        words = [*COMMON, *FLAGS[name].split(), "--out", str(run), *flags]
        self.process = nursery.Process(target=in_child, args=(name, words, str(log), arrange), daemon=True)
        self.process.start()

    def said(self) -> str:
        with contextlib.suppress(BlockingIOError):
            while more := os.read(self.log, 2**16):
                self.heard += more
        return self.heard.decode(errors="replace")

    def __del__(self):
        os.close(self.log)

    def wait(self, seconds: float = 60) -> int:
        """The exit code."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s: {self.said()}"
        return self.process.exitcode

    def until(self, condition, seconds: float = 60) -> float:
        """Seconds until condition() holds."""
        start = time.perf_counter()
        while not condition():
            assert time.perf_counter() - start < seconds, self.said()
            time.sleep(0.002)
        return time.perf_counter() - start

    def kill(self) -> int:
        self.process.kill()
        return self.wait()


def left_by(run: Path) -> tuple[bytes, list[dict]]:
    """The weights and, but for what a clock says, the metrics of a finished run."""
    rows = read_metrics(run / "metrics.jsonl")
    rows = [{key: value for key, value in row.items() if "second" not in key} for row in rows]
    return (run / "model.safetensors").read_bytes(), rows


def litter(run: Path) -> list[str]:
    return [path.name for path in run.iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="session")
def whole(nursery, tmp_path_factory):
    """What an uninterrupted run of a script leaves; made once."""
    made = {}

    def make(name: str):
        if name not in made:
            run = tmp_path_factory.mktemp("whole") / name
            child = Child(nursery, name, run)
            assert child.wait() == 0, child.said()
            made[name] = left_by(run)
        return made[name]

    return make


def goes_on(nursery, name: str, run: Path, expected) -> None:
    """Resumed, the run ends as the uninterrupted one did and leaves nothing half-written."""
    child = Child(nursery, name, run, "--resume")
    assert child.wait() == 0, child.said()
    assert left_by(run) == expected and not litter(run)


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


def die_at(number: int, folder: str) -> None:
    """SIGKILL at the so-manieth time that a file below the folder is opened, moved or deleted."""
    count = 0

    def hook(event: str, args) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.remove") and str(args[0]).startswith(folder):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def die_half_way(step: int, room: int) -> None:
    """The system kills the process in the middle of the first write after so many steps that makes a file over room long."""
    take = Run.clip_and_step

    def outer(run, *args):
        if run.steps_done >= step:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        take(run, *args)

    Run.clip_and_step = outer


KILLS = 20


@pytest.mark.long
def test_killed_at_twenty_random_moments_a_run_ends_as_if_uninterrupted(nursery, whole, tmp_path):
    """Some of them by the clock, from the first line of the script to the last; some as a file is about to be opened, moved or
    deleted; some in the middle of a write. The state is saved after each step. A run is killed again and again until it is
    through; then the next one is."""
    expected, rng, run, killed, number = whole("train_vit"), random.Random(0), None, 0, 0
    start = time.perf_counter()
    assert Child(nursery, "train_vit", tmp_path / "timed", "--save-every", "1").wait() == 0
    lasts = time.perf_counter() - start
    while killed < KILLS:
        if run is None:
            run, number = tmp_path / str(number), number + 1
        by_event = partial(die_at, rng.randint(1, 40), str(run))
        ways = None, by_event, partial(die_half_way, rng.randint(0, 9), rng.randint(0, 10**5))
        arrange = ways[killed % 3]
        again = ["--resume"] * (run / "state.pt").exists()
        child = Child(nursery, "train_vit", run, "--save-every", "1", *again, arrange=arrange)
        child.process.join(None if arrange else rng.uniform(0, lasts))
        code = child.kill()
        assert code in (0, -signal.SIGKILL, -signal.SIGXFSZ), child.said()
        if code == 0:
            assert left_by(run) == expected and not litter(run)
            run = None
        killed += code != 0
    if run is not None and (run / "state.pt").exists():
        goes_on(nursery, "train_vit", run, expected)


@pytest.mark.parametrize("name", ["train_vlm", "extras.train_siglip", "extras.train_llmvit"])
def test_the_other_scripts_killed_as_they_write(nursery, whole, tmp_path, name):
    expected, rng, run = whole(name), random.Random(name), tmp_path / name
    for _ in range(2):
        again = ["--resume"] * (run / "state.pt").exists()
        child = Child(nursery, name, run, *again, arrange=partial(die_at, rng.randint(4, 16), str(run)))
        assert child.wait() in (0, -signal.SIGKILL), child.said()
    goes_on(nursery, name, run, expected)


# ---- SIGTERM ---------------------------------------------------------------------------------------------------------


def ask_to_end(where: str) -> None:
    """SIGTERM in the middle of the third step, or in the first evaluation."""
    if where == "step":
        take, calls = Run.clip_and_step, []

        def step(run, *args):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            take(run, *args)

        Run.clip_and_step = step
    else:
        autocast = Run.autocast

        def between(run):
            if not run.raw.training and run.stop_signal is None:
                os.kill(os.getpid(), signal.SIGTERM)
            return autocast(run)

        Run.autocast = between


@pytest.mark.parametrize("name, where", [*((name, "step") for name in SCRIPTS), ("train_vit", "evaluation")])
def test_sigterm_ends_a_run_with_its_step_or_in_its_evaluation(nursery, whole, tmp_path, name, where):
    """In an evaluation the model even has other weights, the averaged ones; what is saved are its own."""
    run = tmp_path / "run"
    child = Child(nursery, name, run, "--save-every", "1000", arrange=partial(ask_to_end, where))
    assert child.wait() == 128 + signal.SIGTERM, child.said()
    assert "stopped after step" in child.said() and "--resume" in child.said()
    assert load_state(run)["steps_done"] == (3 if where == "step" else 4)
    goes_on(nursery, name, run, whole(name))


def test_sigterm_between_steps_ends_the_run_at_once(nursery, whole, tmp_path):
    run = tmp_path / "run"
    child = Child(nursery, "train_vit", run, "--epochs", "500")
    child.until(lambda: "--epochs" not in child.said() and (run / "state.pt").exists())
    child.process.terminate()
    start = time.perf_counter()
    assert child.wait() == 128 + signal.SIGTERM and time.perf_counter() - start < 5
    assert "go on with: python train_vit.py" in child.said()


# ---- a full disk -----------------------------------------------------------------------------------------------------


def die_in_step(step: int) -> None:
    take = Run.clip_and_step

    def outer(run, *args):
        if run.steps_done == step:
            os.kill(os.getpid(), signal.SIGKILL)
        take(run, *args)

    Run.clip_and_step = outer


def full_disk(room: int) -> None:
    """No file can grow past so many bytes: the same failing write as on a full disk, with another number."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_full_disk_is_one_line_and_what_was_saved_stays(nursery, whole, tmp_path, name):
    """Whichever file it is that does not fit: the metrics, the state, or one of what a finished run leaves."""
    expected, run = whole(name), tmp_path / "run"
    assert Child(nursery, name, run, arrange=partial(die_in_step, 3)).wait() == -signal.SIGKILL
    saved = (run / "state.pt").read_bytes()
    largest = max(len(saved), len(expected[0]))
    for room in (0, len(saved) // 3, largest - 1):
        child = Child(nursery, name, run, "--resume", arrange=partial(full_disk, room))
        code, lines = child.wait(), [line for line in child.said().splitlines() if "error: " in line]
        if code == 0:
            continue
        assert code == 2 and "Traceback" not in child.said() and len(lines) == 1, child.said()
        assert "cannot be written" in lines[0] and str(run) in lines[0] and not litter(run)
        assert load_state(run)["steps_done"] >= 2
        if room == 0:
            assert (run / "state.pt").read_bytes() == saved
    goes_on(nursery, name, run, expected)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system in memory, of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("this user may not mount a tmpfs; the tests above stop writes by a limit on file sizes")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_on_a_file_system_that_fills_up(nursery, whole, small_disk):
    run = small_disk / "run"
    assert Child(nursery, "train_vit", run, arrange=partial(die_in_step, 3)).wait() == -signal.SIGKILL
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    child = Child(nursery, "train_vit", run, "--resume")
    assert child.wait() == 2 and child.said().count("error: ") == 1 and "Traceback" not in child.said()
    assert "cannot be written" in child.said() and load_state(run)["steps_done"] == 2 and not litter(run)
    ballast.unlink()
    goes_on(nursery, "train_vit", run, whole("train_vit"))


# ---- bugs, each with its story ---------------------------------------------------------------------------------------


FLAGS_BEYOND_ALL_BOUNDS = [
    ("--batch-size", "1" + "0" * 400, "must be a whole number"),  # was an OverflowError's traceback, as for all whole numbers
    ("--seed", "9" * 20, "must be a whole number"),  # was a RuntimeError's, in the first step
    ("--seed", "-1", "must be a whole number"),  # some random generators took it, numpy's did not
    ("--drop-path", "nan", "must be a number"),  # trained, to weights that were no numbers
    ("--ema", "2", "below 1"),  # averaged as 1 does: not at all
    ("--device", "meta", "no such device"),  # has no numbers: a traceback at the end of the first step
    ("--image-size", 10**9, "out of memory"),  # was a RuntimeError's traceback
    ("--layers", 10**9, "exceeds the maximum of 1000"),  # built them, one after the other, until the memory was full
    ("--batch-size", 1, "2 or more"),  # of --dry-run: divided by zero
]


@pytest.mark.parametrize("flag, value, words", FLAGS_BEYOND_ALL_BOUNDS)
def test_a_flag_beyond_all_bounds(tmp_path, capsys, flag, value, words):
    """Each was a traceback, or worse, was taken."""
    small = ["--hidden-size", 16, "--layers", 1, "--heads", 1, "--dry-run", "--device", "cpu", "--out", tmp_path / "run"]
    assert words in refused(capsys, train_vit.main, *small, flag, value)


CONFIGS = [
    ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),  # the root of a negative number: every logit was NaN, without a word
    ({"rope_theta": 0, "rope_parameters": None}, "rope_base is 0"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0.0}}, "factor 0.0"),
    ({"num_hidden_layers": 10**9}, "exceeds the maximum of 1000"),  # built them, one after the other
    ({"hidden_size": 32.0}, "hidden_size is 32.0"),  # a TypeError's traceback
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),  # a text is true
    ({"model_type": "siglip_vision_model", "hidden_act": "gelu", "num_channels": 0}, "num_channels is 0"),  # divided by it
    ({"hidden_size": 10**18, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}, "does not describe"),
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("changes, words", CONFIGS)
def test_a_config_that_makes_no_sense(tmp_path, changes, words):
    settings = {"vocab_size": 20, "hidden_size": 32, "n_heads": 4, "n_layers": 1, "hidden_dim": 32, "context_length": 64}
    save_pretrained(Llama3ForCausalLM(LLAMA32Config(**settings)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=words):
        checkpoint.from_pretrained(tmp_path)


@pytest.mark.parametrize("scale", [[0.5, math.nan, 0.5], ["x", 1, 1], "x", [1, 1]])
def test_images_cannot_be_scaled_by_what_is_no_number(scale):
    """NaN is not below 0: it passed the check, and every pixel was NaN. A text was a TypeError's traceback."""
    with pytest.raises(ValueError, match="three numbers, std above 0"):
        image_settings({"image_processor_type": "SiglipImageProcessor", "image_std": scale})


def test_a_large_deep_grey_image_is_scaled_in_strips():
    """All of it as float64, several times over, took 24 bytes a pixel and more: a file of 160 kB made 2 GB of it."""
    buffer, side = io.BytesIO(), 2000
    Image.fromarray(np.arange(side * side, dtype=np.uint32).astype(np.uint16).reshape(side, side)).save(buffer, "PNG")
    tracemalloc.start()
    decoded = decode_image(buffer.getvalue())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * side * side and np.array_equal(np.asarray(decoded)[0, ::257, 0], np.round(np.arange(0, side, 257) / 257))


def test_other_weights_in_a_saved_state_are_noticed(tmp_path):
    """torch.load does not look at the checksums of the archive: a flipped bit on the disk went into the weights."""
    run_state.save_state(tmp_path, {"settings": {}, "model": torch.zeros(1000)})
    data = bytearray((tmp_path / "state.pt").read_bytes())
    data[data.index(bytes(4000)) + 2003] = 64
    (tmp_path / "state.pt").write_bytes(data)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["model"].count_nonzero() == 1
    with pytest.raises(ValueError, match="another checksum"):
        load_state(tmp_path)


@pytest.mark.parametrize("state, words", [(Path("x"), "is damaged"), ([1], "no state of a run"), ({}, "no state of a run")])
def test_a_saved_state_of_something_else_is_refused(tmp_path, capsys, state, words):
    """weights_only=True refuses to run it, by an UnpicklingError that nobody caught; of others the settings were missed."""
    torch.save(state, tmp_path / "state.pt")
    assert words in refused(capsys, train_vit.main, "--out", tmp_path, "--resume", "--device", "cpu")


def test_resuming_with_another_number_of_classes_says_so(tmp_path, capsys, monkeypatch):
    """The head did not fit: thirty lines of load_state_dict. Which data there were is compared first now."""
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    for name in ("ant", "bee", "cat"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (16, 16), (i * 20, 0, 0)).save(tmp_path / "photos" / name / f"{i}.png")
        if name != "ant":
            flags = ["--dataset", "folder", "--data", tmp_path / "photos", "--out", tmp_path / "run", "--device", "cpu"]
            flags += "--hidden-size 16 --layers 1 --heads 1 --patch-size 8 --batch-size 9 --epochs 1 --workers 1".split()
            monkeypatch.setattr(train_vit, "draw_answers", lambda *args: None)
            if name == "bee":
                train_vit.main(list(map(str, flags)))
    error = refused(capsys, train_vit.main, *flags, "--resume")
    assert "classes are ['ant', 'bee', 'cat'], when the run was started they were ['ant', 'bee']" in error


def test_a_figure_takes_the_place_of_no_other_file(tmp_path, monkeypatch, capsys):
    """`--sheet train.json`, `--out photo.jpg`: the rows were gone, the photo was a figure."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    Path("rows.json").write_text(json.dumps([{"image": "a.png", "captions": ["A dot."]}]))
    before = Path("a.png").read_bytes(), Path("rows.json").read_bytes()
    assert "figures are .png files" in refused(capsys, check.main, "rows.json", "--sheet", "rows.json")
    assert "one of the files that are read" in refused(capsys, check.main, "rows.json", "--sheet", "a.png")
    assert "cannot be written" in refused(capsys, check.main, "rows.json", "--sheet", "nowhere/b.png")
    Path("rows.json").write_text(json.dumps([{"image": "a.png", "captions": ["A dot."]}] * 2))
    assert "one of the files that are read" in refused(capsys, check.main, "rows.json", "--sheet", "a.png", "--samples", "1")
    Path("rows.json").write_bytes(before[1])
    assert "one of the files that are read" in refused(capsys, caption_sheet.main, "RUN", "--images", "a.png", "--out", "a.png")
    pq = pytest.importorskip("pyarrow.parquet")
    table = importlib.import_module("pyarrow").table({"image": ["a.png"], "question": ["What?"], "answer": ["A dot."]})
    pq.write_table(table, "rows.parquet")
    assert "may be one of the images" in refused(capsys, check.main, "rows.parquet", "--sheet", "a.png")
    assert before == (Path("a.png").read_bytes(), Path("rows.json").read_bytes())


def test_a_run_takes_no_folder_for_its_own_that_another_program_has_made(tmp_path, capsys):
    """Any settings.json, lock or state.pt counted as a run's: an editor's settings were overwritten, a lock emptied."""
    for name, content in {"settings.json": '{"editor.fontSize": 14}', "lock": "my own data", "state.pt": "x"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(content)
        error = refused(capsys, train_vit.main, "--out", tmp_path / name)
        assert f"holds a {name} that no run here has made" in error
        assert [path.read_text() for path in (tmp_path / name).iterdir()] == [content]


def test_what_an_earlier_run_left_is_not_taken_for_this_ones(tmp_path):
    """A ViT trained in the folder of a vision-language model kept its result.json, which a model card then showed."""
    took = time.time() - 100
    for name in ("result.json", "tokenizer.json", "mine.txt"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (took, took))
    (tmp_path / "lock").write_text("1\n")
    train_vit.main([*FLAGS["train_vit"].split(), "--device", "cpu", "--workers", "1", "--out", str(tmp_path)])
    assert (tmp_path / "mine.txt").exists() and (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "result.json").exists() and not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("pattern", ["x*", "(?=x)", "^", r"\b"])
def test_a_regex_that_cuts_out_empty_pieces_is_refused(pattern):
    """tiktoken panics on a piece without a byte, with forty lines of Rust and an exception that is not an Exception."""
    tokenizer = BPETokenizer.train("a b a b", 258)
    with pytest.raises(ValueError, match="cuts out empty pieces"):
        BPETokenizer({**tokenizer._spec, "pre_tokenizer": split_by(pattern)})


@pytest.mark.parametrize("token", [[], 7, {"content": ["x"]}])
def test_a_special_token_is_a_text(token):
    """An empty list counts as none where tokens are added, and was a TypeError's traceback at the end of the first answer."""
    with pytest.raises(ValueError, match="no text"):
        BPETokenizer(BPETokenizer.train("a b a b", 258)._spec, {"eos_token": token})


@pytest.mark.parametrize("line", [b"{", b"[]", b"{}", b'{"step": "x"}', b"\xff", b"null"])
def test_a_damaged_line_of_metrics_names_its_file(tmp_path, line):
    """A JSONDecodeError named no file, a list was an AttributeError's traceback."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 20}\n' + line + b'\n{"step": 40}\n')
    with pytest.raises(ValueError, match="metrics.jsonl has lines that are no JSON object with a step"):
        Metrics(tmp_path / "metrics.jsonl", 40)


def test_what_a_killed_write_left_goes_and_nothing_else(tmp_path):
    """safetensors writes beside its file, too: a kill in the middle of it left .tmpLNtnOx for good."""
    for name in (".model.safetensors.123.tmp", ".tmpLNtnOx", ".tmp-notes", "a.tmp", ".keep.tmp", "tmpLNtnOx"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".keep.tmp", ".tmp-notes", "a.tmp", "tmpLNtnOx"]
