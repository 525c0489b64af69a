"""Laws of several processes: two (gloo) learn what one does from the same batches, by DDP and by FSDP2; a run goes on with
another number of them; a process that dies ends the job with its error, for which torchrun starts this very file."""

import contextlib
import io
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for torchrun, which knows nothing of pytest's settings

import finetune_vlm  # noqa: E402
import train_vit  # noqa: E402
import train_vlm  # noqa: E402
from data import shards  # noqa: E402
from data.llava import LlavaRows  # noqa: E402
from extras import train_siglip  # noqa: E402
from lib import run as running  # noqa: E402
from lib import vlm_report  # noqa: E402
from lib.checkpoint import from_pretrained  # noqa: E402
from lib.cli import run_cli  # noqa: E402
from lib.distributed import gathered  # noqa: E402

VIT = "--hidden-size 16 --layers 2 --heads 2 --pooling cls --batch-size 32 --epochs 0.05 --drop-path 0 --augment none".split()
SIGLIP = "--size tiny --dataset digits --batch-size 8 --steps 2 --tokens 8 --augment none".split()
SCENES = "--size tiny --batch-size 4 --per-scene 3 --vision-steps 1 --projector-steps 1 --steps 3 --eval-count 1".split()
SCENES += ["--save-every", "3"]
LLAVA = "--size tiny --batch-size 4 --image-size 32 --steps 3 --eval-count 1 --isolated".split()
RUNS = {  # those with --fsdp or --grad-accum are compared with the same run without
    "vit-fsdp": (train_vit, [*VIT, "--fsdp"]),
    "siglip": (train_siglip, SIGLIP),
    "siglip-fsdp": (train_siglip, [*SIGLIP, "--grad-accum", "2", "--fsdp"]),
    "scenes-fsdp": (train_vlm, [*SCENES, "--fsdp"]),
    "shards": (finetune_vlm, LLAVA),
    "cross-fsdp": (finetune_vlm, [*LLAVA, "--fusion", "cross", "--ema", "0.5", "--fsdp"]),
}
ALONE = {"vit": (train_vit, VIT), "siglip": (train_siglip, SIGLIP), "scenes": (train_vlm, SCENES),
         "shards": (finetune_vlm, LLAVA), "cross": (finetune_vlm, RUNS["cross-fsdp"][1][:-1])}  # fmt: skip


def train(script, flags, folder: Path) -> None:
    """A run in this process, of tiny models and without figures; FOLDER.pt has the gradients of its steps, FOLDER/STEP.pt
    what was saved."""
    rank, steps, take, save = int(os.environ.get("RANK", 0)), [], running.Run.clip_and_step, running.save_state

    def record(run, *args):
        found = {name: p.grad.detach().clone() for name, p in run.raw.named_parameters() if p.grad is not None}
        steps.append(gathered(found, True))
        take(run, *args)

    def keep(run, state):
        save(run, state)
        shutil.copy(run / "state.pt", run / f"{state['steps_done']}.pt")

    flags = [*flags, "--device", "cpu", "--workers", "2", "--seed", "3", "--out", str(folder)]
    if script is finetune_vlm:
        flags += ["--data", str(folder.parents[1] / "shard-*.tar"), "--test-data", str(folder.parents[1] / "test.json")]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        patch.setattr(running, "save_state", keep)
        patch.setattr(running.Run, "clip_and_step", record)
        patch.setattr(train_vlm, "VISION_BATCH", 8)
        patch.setattr(vlm_report, "draw", lambda *_: None)
        patch.setattr(train_siglip, "draw", lambda *_: None)
        patch.setattr(train_vit, "draw_answers", lambda *_: None)
        script.main(flags)
    if rank == 0:
        torch.save(steps, f"{folder}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, nursery):
    """one/ and two/ with all runs of one and two processes; what the two printed."""
    folder, chance, rows = tmp_path_factory.mktemp("runs"), random.Random(0), []
    for k in range(16):  # half of them without an image: then some batches of a process have none at all
        colour = ("red", "green", "blue", "black")[k % 4]
        Image.new("RGB", (40, 32), colour).save(folder / f"{k}.png")
        turns = [("human", f"What is it? {'Well? ' * chance.randrange(9)}"), ("gpt", f"{colour} " * chance.randrange(1, 9))]
        row = {"conversations": [{"from": who, "value": text} for who, text in turns]}
        rows.append(row | ({"image": f"{k}.png"} if k % 2 else {}))
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "test.json").write_text(json.dumps(rows[1:3]))
    shards.pack_shards(LlavaRows.read(folder / "train.json"), folder / "packed", 6)
    for path in (folder / "packed").iterdir():
        path.rename(folder / path.name)
    for name, (script, flags) in ALONE.items():
        train(script, flags, folder / "one" / name)
    resumed(folder / "one" / "scenes", folder / "two" / "resumed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = [nursery.Process(target=one_of_two, args=(folder, rank, port)) for rank in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(300)
    said = "".join((folder / f"said-{rank}").read_text() for rank in range(2))
    assert [process.exitcode for process in pair] == [0, 0], said
    return folder, said


def one_of_two(folder: Path, rank: int, port: int) -> None:
    """What torchrun starts, without its own ten seconds."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
    with open(folder / f"said-{rank}", "w") as said, contextlib.redirect_stdout(said):
        for name, (script, flags) in {**RUNS, "resumed": (train_vlm, [*SCENES, "--fsdp", "--resume"])}.items():
            train(script, flags, folder / "two" / name)


def resumed(whole: Path, folder: Path) -> None:
    """A run folder as it was after step 3."""
    folder.mkdir(parents=True)
    shutil.copy(whole / "3.pt", folder / "state.pt")


def assert_same_gradients(one: Path, two: Path, last: int | None = None) -> None:
    """Of all steps, or of the last ones. Later ones differ more: Adam divides rounding errors by their own size."""
    first, second = (torch.load(f"{path}.pt", weights_only=True) for path in (one, two))
    first = first[-last:] if last else first
    limits = [1e-5, 1e-3, *[1e-2] * len(first)][: len(first)]
    for ours, theirs, limit in zip(second, first, limits, strict=True):
        assert ours.keys() == theirs.keys()
        off = sum((ours[name] - theirs[name]).square().sum() for name in ours) ** 0.5
        size = sum(gradient.square().sum() for gradient in theirs.values()) ** 0.5
        assert off <= limit * size, (off / size, limit)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_what_one_does(runs, name):
    """From batches of which each has its part: unequal numbers of answers, images or none; SigLIP's pairs of all with all."""
    folder, _ = runs
    alone = folder / "one" / name.removesuffix("-fsdp")
    assert_same_gradients(alone, folder / "two" / name)


@pytest.mark.parametrize("name", RUNS)
def test_rank_0_alone_writes_and_speaks(runs, name):
    """The run folder is that of one process, and the model in it is whole."""
    folder, printed = runs
    alone = folder / "one" / name.removesuffix("-fsdp")
    assert {path.name for path in (folder / "two" / name).iterdir()} == {path.name for path in alone.iterdir()}
    first, second = (from_pretrained(path).state_dict() for path in (alone, folder / "two" / name))
    for key, weight in first.items():
        assert (second[key] - weight).abs().max() < 0.03, key
    assert printed.count(f'"run": "{folder / "two" / name}"}}') == 1


def test_what_one_process_saved_two_go_on_with(runs):
    folder, _ = runs
    assert_same_gradients(folder / "one" / "scenes", folder / "two" / "resumed", last=2)


def test_what_two_processes_saved_one_goes_on_with(runs):
    folder, _ = runs
    resumed(folder / "two" / "scenes-fsdp", folder / "one" / "resumed")
    train(train_vlm, [*SCENES, "--resume"], folder / "one" / "resumed")
    assert_same_gradients(folder / "two" / "scenes-fsdp", folder / "one" / "resumed", last=2)


def test_a_process_that_dies_ends_the_job_with_its_error(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        __file__,
        tmp_path,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode != 0
    assert "error: process 1: the disk of rank 1 is full" in done.stderr
    assert "the disk of rank 1 is full" in done.stderr.split("Root Cause")[1]  # torchrun's last words


def die(folder: Path) -> None:
    take = running.Run.clip_and_step

    def full(run, *args):
        if run.rank == 1 and run.steps_done == 2:
            raise OSError("the disk of rank 1 is full")
        take(run, *args)

    running.Run.clip_and_step = full
    run_cli(lambda: train_vit.main([*VIT, "--epochs", "9", "--device", "cpu", "--out", str(folder / "run")]))


def test_fsdp_needs_several_processes(tmp_path):
    with pytest.raises(ValueError, match="--fsdp .* torchrun"):
        train_vit.main([*VIT, "--fsdp", "--out", str(tmp_path)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    die(Path(sys.argv[1]))
