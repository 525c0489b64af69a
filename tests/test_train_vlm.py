"""Laws of train_vlm.py: stopped and resumed is uninterrupted, in every stage; only what a stage names is trained; a run leaves
what is promised, and a fault leaves the state before it."""

import contextlib
import json
import os
import re
import resource
import shutil

import pytest
import torch

import calls
import train_vlm
from data import scenes
from lib import run_state, vlm_report, weights
from lib.vlm_parts import train_tokenizer

DRAW = vlm_report.draw
pytestmark = pytest.mark.usefixtures("undrawn")  # but for one test
FLAGS = "--size tiny --device cpu --workers 1 --batch-size 4 --per-scene 2 --eval-count 1 --save-every 1000".split()
FLAGS += "--vision-steps 2 --projector-steps 2 --steps 3".split()  # stages end after steps 2, 4 and 7


def printed(*flags) -> list[str]:
    return calls.printed(train_vlm.main, *FLAGS, *flags)


def train(*flags) -> dict:
    """The script's last line."""
    return json.loads(printed(*flags)[-1])


def refused(capsys, *flags) -> str:
    return calls.refused(capsys, train_vlm.main, *FLAGS, *flags)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(runs):
    """A run through all three stages; what it printed, and its learner's weights at the start of each stage and at the end."""
    found, inner = {}, train_vlm.train_only

    def recorded(learner, stage, args):
        found[stage.name] = {name: p.detach().clone() for name, p in learner.named_parameters()}
        found["end"] = dict(learner.named_parameters())
        return inner(learner, stage, args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_vlm, "train_only", recorded)
        lines = printed("--out", runs / "whole")
    return runs / "whole", lines, found


# ---- resume, kills, full disks -----------------------------------------------------------------------------------------


def test_stopped_and_resumed_is_uninterrupted_byte_for_byte(runs):
    """Stopped in each stage and at its end; a kill goes back to the state of --save-every."""
    flags = ["--ema", 0.9, "--grad-accum", 2, "--eval-every", 2, "--save-every", 2]
    train(*flags, "--out", runs / "straight")
    stops = [("term", 1), ("term", 2), ("term", 3), ("term", 4), ("kill", 5), ("term", 6)]
    calls.stop_and_resume(lambda *more: train(*flags, "--out", runs / "parts", *more), stops)
    assert calls.weights(runs / "parts") == calls.weights(runs / "straight")
    assert calls.learned(runs / "parts") == calls.learned(runs / "straight")


def test_a_finished_run_that_is_resumed_writes_the_same_again_beside_its_twin(runs, whole):
    run = shutil.copytree(whole[0], runs / "again")
    (runs / "again-blind").mkdir()
    (runs / "again-blind" / "result.json").write_text('{"answer_loss": 1.5, "steps": 7}')
    last, first = train("--out", run, "--resume"), json.loads(whole[1][-1])
    assert calls.weights(run) == calls.weights(whole[0])
    assert last.pop("blind_answer_loss") == 1.5 and last.keys() == first.keys()


def test_a_kill_in_the_middle_of_a_save_leaves_the_state_before_it(runs, whole, monkeypatch):
    """In the second save of a run, at step 4; the first was at step 2."""
    run, saves, save = runs / "dying", [], torch.save

    def die_half_way(state, path):
        saves.append(path)
        save(state, path)
        if len(saves) == 2:
            os.truncate(path, path.stat().st_size // 2)
            raise calls.Killed

    with monkeypatch.context() as patch, pytest.raises(calls.Killed):
        patch.setattr(torch, "save", die_half_way)
        train("--save-every", 2, "--out", run)
    assert run_state.load_state(run)["steps_done"] == 2
    train("--save-every", 2, "--out", run, "--resume")
    assert calls.weights(run) == calls.weights(whole[0])


@contextlib.contextmanager
def full_disk(room: int):
    """No file can grow past so many bytes: the same failing write as on a full disk, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_the_last_good_state_stays(runs, whole, capsys, monkeypatch):
    """Full at the second save of the state, and later at the end, when the model is to be written."""
    run, write = runs / "full", weights.write_tensors
    with pytest.MonkeyPatch.context() as patch:
        calls.interrupt(patch, "kill", 3)
        with pytest.raises(calls.Killed):
            train("--save-every", 2, "--out", run)
    with full_disk(20_000):
        error = refused(capsys, "--save-every", 1, "--out", run, "--resume")
    assert "state.pt" in error and run_state.load_state(run)["steps_done"] == 2 and not list(run.glob(".*"))

    def when_full(*args):
        with full_disk(150_000):
            write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(weights, "write_tensors", when_full)
        error = refused(capsys, "--out", run, "--resume")
    assert "model.safetensors" in error and not (run / "model.safetensors").exists() and not list(run.glob(".*"))
    train("--out", run, "--resume")
    assert calls.weights(run) == calls.weights(whole[0])


def test_resuming_another_run_is_refused_in_words(whole, capsys):
    flags = ["--out", whole[0], "--resume"]
    assert "--lr is 0.5, the run in" in refused(capsys, *flags, "--lr", 0.5)
    assert "--vision-steps is 0, the run in" in refused(capsys, *flags, "--vision-steps", 0)


# ---- what a run leaves -----------------------------------------------------------------------------------------------


def test_a_finished_run_leaves_what_is_promised(runs, whole, monkeypatch):
    """Resumed at its end, and drawn."""
    run = shutil.copytree(whole[0], runs / "drawn")
    monkeypatch.setattr(vlm_report, "draw", DRAW)
    last = train("--out", run, "--resume")
    left = {path.name for path in run.iterdir()}
    assert {"curves.png", "samples.png", "attention.png"} <= left
    assert {"config.json", "model.safetensors", "metrics.jsonl", "result.json", "settings.json", "tokenizer.json"} <= left
    assert not [name for name in left if name.startswith(".")]
    assert json.loads((run / "result.json").read_text()) == last and last["steps"] == 7
    assert {"exact_match", "compositional_exact_match", "answer_loss", "by_kind", "seconds", "seed"} <= last.keys()
    assert json.loads((run / "settings.json").read_text())["dataset"] == "scenes"


def test_a_stage_is_announced_with_its_reason(whole):
    said = [line.split(": ", 1) for line in whole[1] if line.startswith("stage ")]
    assert [stage for stage, _ in said] == ["stage vision", "stage projector", "stage language"]
    assert all(len(why) > 20 for _, why in said)


# ---- what is trained ---------------------------------------------------------------------------------------------------

VISION, PROJECTOR, LANGUAGE = "vlm.vision_tower.", "vlm.multi_modal_projector.", "vlm.language_model."


def test_a_stage_trains_its_parts_and_not_a_bit_of_the_others(whole):
    expected = {"vision": (VISION, "probe."), "projector": (PROJECTOR,), "language": (PROJECTOR, LANGUAGE)}
    starts = ["vision", "projector", "language", "end"]
    for stage, after in zip(starts, starts[1:], strict=False):
        before, now = whole[2][stage], whole[2][after]
        moved = {name for name in before if not torch.equal(before[name], now[name])}
        assert moved == {name for name in before if name.startswith(expected[stage])}, stage


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--vision-steps 0", {"projector": (PROJECTOR,), "language": (PROJECTOR, VISION, LANGUAGE)}),
        ("--blind", {"projector": (PROJECTOR,), "language": (PROJECTOR, LANGUAGE)}),
        ("--vision RUN --projector-steps 0", {"language": (PROJECTOR, LANGUAGE)}),
    ],
)
def test_flags_choose_the_stages_and_their_parts(whole, flags, expected):
    args = train_vlm.parse_args([*FLAGS, *flags.replace("RUN", str(whole[0])).split()])
    learner, found = train_vlm.Learner(train_vlm.build(args)[0]), {}
    for stage in train_vlm.stages(args):
        train_vlm.train_only(learner, stage, args)
        found[stage.name] = {name for name, p in learner.named_parameters() if p.requires_grad}
    names = [name for name, _ in learner.named_parameters()]
    assert found == {stage: {name for name in names if name.startswith(parts)} for stage, parts in expected.items()}
    if args.vision:
        tower = {name: p for name, p in whole[2]["end"].items() if name.startswith(VISION)}
        assert tower and all(torch.equal(learner.state_dict()[name], p) for name, p in tower.items())


# ---- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--data photos.json", "your own --data are for finetune_vlm.py"),
        ("--vision /nowhere", "/nowhere"),
        ("--batch-size 4 --grad-accum 3", "choose a multiple of 3"),
        ("--resume", "no state.pt to resume from"),
    ],
)
def test_what_does_not_fit_is_one_line_and_exit_code_2(tmp_path, capsys, flags, message):
    assert re.search(message, refused(capsys, *flags.split(), "--out", tmp_path / "run"))


@pytest.mark.parametrize("texts, size", [(["what is the blue shape?", "red"] * 30, 450), (scenes.corpus(), 450)])
def test_a_tokenizer_takes_all_merges_that_a_poor_corpus_has(texts, size):
    """easy-VQA has too few words for 450 tokens; the tokenizer then fell back to single bytes, rows became three times as long
    and a third of them was dropped."""
    tokenizer = train_tokenizer(texts, size)
    assert len(tokenizer) <= size
    assert all(len(tokenizer.encode(word)) == 1 for word in (" blue", " shape") if word in " ".join(texts))
