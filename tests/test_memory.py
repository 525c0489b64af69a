"""Laws of memory.py: what --dry-run estimates is what a step then takes, and a dry run leaves nothing behind."""

import re
import sys

import pytest
import torch

import finetune_vlm
import train_vit
import train_vlm
from data.convert import convert_scenes
from extras import train_llmvit, train_siglip
from lib.cli import run_cli
from lib.memory import StepMemory, bytes_of, peak_bytes, peak_memory
from lib.run import Run

VLM = [train_vlm, "--eval-count", "5"]
SCRIPTS = {
    "vit": [train_vit],
    "vit in parts": [train_vit, "--grad-accum", "4", "--ema", "0.99"],
    "vit recomputed": [train_vit, "--grad-checkpoint"],
    "tower": VLM,
    "vlm": [*VLM, "--vision-steps", "0", "--projector-steps", "0"],
    "vlm, LoRA": [finetune_vlm, "--vision-steps", "0", "--lora", "4", "--freeze", "vision,lm", "--projector-steps", "0"],
    "siglip": [train_siglip, "--batch-size", "64"],
    "siglip in chunks": [train_siglip, "--batch-size", "64", "--chunk", "16"],
    "llmvit": [train_llmvit],
}


class Measured(Exception):
    """Ends a run that was only there to be measured."""


def test_measuring_says_nothing_and_lets_errors_through(capfd):
    """torch 2.13's profiler wrote some thirty lines about itself to stderr in a --dry-run."""
    peak_bytes(lambda: torch.zeros(1000).add(1), torch.device("cpu"))
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 / 0, torch.device("cpu"))
    print("heard", file=sys.stderr)
    assert "heard" in capfd.readouterr().err


@pytest.mark.parametrize("script, flags", [(script, flags) for script, *flags in SCRIPTS.values()], ids=SCRIPTS)
def test_a_step_takes_what_the_dry_run_estimates(script, flags, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    if script is finetune_vlm:
        convert_scenes(tmp_path / "photos", "train", 40, per_scene=2)
        flags = [*flags, "--data", str(tmp_path / "photos" / "scenes.json"), "--eval-count", "2"]
    script.main([*flags, "--out", str(out), "--dry-run"])
    assert not out.exists()
    estimated = float(re.search(r"([\d,.]+) MiB at the peak", capsys.readouterr().out)[1].replace(",", ""))
    steps = Run.steps

    def measured(run, *args, **options):
        """The second step of a run, from where its batch is asked for to where it is taken."""
        for step in steps(run, *args, **options):
            if step == run.first_step:
                yield step
                continue
            states = [t for o in run.optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t)]
            averaged = run.ema.weights.values() if run.ema else ()
            lying = bytes_of([*run.raw.parameters(), *run.raw.buffers(), *states, *averaged])
            with peak_memory(run.device) as peak:
                yield step
            raise Measured(lying + peak[0])

    monkeypatch.setattr(Run, "steps", measured)
    with pytest.raises(Measured) as found:
        script.main([*flags, "--out", str(out)])
    assert estimated == pytest.approx(found.value.args[0] / 2**20, rel=0.15)


def test_a_dry_run_of_a_single_step_of_few_rows_estimates_too(tmp_path, capsys):
    """One step gave no estimate, since two are compared; few rows were called fewer than the parts of a step, whose number is
    the dry run's own."""
    convert_scenes(tmp_path / "photos", "train", 5, per_scene=1)
    flags = ["--size", "tiny", "--vision-steps", "0", "--projector-steps", "0", "--steps", "1", "--test-part", "0"]
    flags += ["--data", str(tmp_path / "photos" / "scenes.json"), "--out", str(tmp_path / "run"), "--dry-run"]
    finetune_vlm.main(flags)
    said = capsys.readouterr().out
    assert "--batch-size 16 becomes 5" in said and "MiB at the peak" in said


def test_at_the_peak_gradients_wait_only_for_other_parts():
    assert StepMemory(weights=10, gradients=5, optimizer=20, activations=7, gradients_wait=False).peak == 37
    assert StepMemory(weights=10, gradients=5, optimizer=20, activations=7, gradients_wait=True).peak == 42


@pytest.mark.parametrize("words", ["CUDA out of memory.", "[enforce fail] DefaultCPUAllocator: can't allocate memory"])
def test_out_of_memory_is_one_line_of_advice(words, capsys):
    def main():
        raise torch.OutOfMemoryError(words) if "CUDA" in words else RuntimeError(words)

    with pytest.raises(SystemExit) as stop:
        run_cli(main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "--grad-accum" in said and "--dry-run" in said and said.count("\n") == 1
