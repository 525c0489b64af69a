"""Laws of train_vlm.py: stopped and resumed is uninterrupted, in every stage; only what a stage names is trained; the run
folder answers in transformers as it does here; what does not belong together is one line and exit code 2."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import calls
import evaluate
import train_vlm
from data import common as vlm_data
from data import scenes
from lib import run_state, weights
from lib.answers import answer, scene_items
from lib.checkpoint import from_pretrained, save_pretrained
from lib.old_trainer import Metrics, Trainer
from lib.quant import Linear4bit, quantize_nf4
from lib.tokenizer import BPETokenizer
from model import Llama3ForCausalLM, LLAMA32Config
from train_vlm import Learner, Stage, build, choose_parameters, parse_args, stages
from vit_scratch import ViTConfig, ViTModel

ROOT = Path(__file__).resolve().parents[1]
draw = train_vlm.draw
EYES = {"image_size": 64, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = {"hidden_size": 48, "n_heads": 4, "n_kv_groups": 2, "n_layers": 2, "hidden_dim": 64, "rope_base": 10000.0}
WORDS |= {"max_position_embeddings": 384, "tie_word_embeddings": True}
DOT = (EYES, WORDS, 400)  # a --size for tests
COMMON = "--size dot --device cpu --workers 1 --batch-size 4 --per-scene 3 --pixel-shuffle 2".split()
COMMON += "--eval-count 1 --save-every 1000".split()
SCENES = "--vision-steps 4 --projector-steps 3 --steps 5".split()  # stages end after steps 4, 7 and 12
LLAVA = "--dataset llava --projector-steps 3 --steps 5".split()  # after steps 3 and 8


@pytest.fixture(autouse=True, scope="module")
def quick():
    """A smaller size, each picture drawn in no more than one test, and what is the same for all runs made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_vlm.SIZES, "dot", DOT)
        patch.setattr(train_vlm, "VISION_BATCH", 4)
        patch.setattr(train_vlm, "draw", lambda *args: None)
        patch.setattr(train_vlm, "scene_items", lambda split, count, seed: scene_items(split, min(count, 2), seed, 2))
        yield


def printed(*flags) -> list[str]:
    return calls.printed(train_vlm.main, *COMMON, *flags)


def train(*flags) -> dict:
    """The script's last line."""
    return json.loads(printed(*flags)[-1])


def refused(capsys, *flags) -> str:
    return calls.refused(capsys, train_vlm.main, *COMMON, *flags)


def bytes_of(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


def learned(run: Path) -> list[dict]:
    """metrics.jsonl but for what a clock says."""
    rows = Metrics(run / "metrics.jsonl", 10**9).read()
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def photos(runs):
    """Scenes as files: fourteen rows of two questions each."""
    scenes.export(runs / "photos", "train", 14, per_scene=2)
    return runs / "photos"


@pytest.fixture(scope="module")
def seeing(runs):
    """A run on scenes through all three stages, from its first step to its last; and what it printed."""
    return runs / "seeing", printed(*SCENES, "--out", runs / "seeing")


# ---- resume ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing in between catches it, nothing is saved."""


def interrupt(monkeypatch, how: str, step: int) -> None:
    """SIGTERM in the middle of a step ("term") or between two stages ("between": after all that the first of them does), or a
    sudden death ("kill"), as soon as so many steps are done."""
    name = "close" if how == "between" else "step"
    inner = getattr(Trainer, name)

    def outer(trainer, *args):
        before = trainer.steps_done
        inner(trainer, *args)
        if trainer.steps_done == step and (how == "between" or before < step):
            if how == "kill":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, name, outer)


def go_on_until_done(flags, stops) -> None:
    for number, (how, step) in enumerate(stops):
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, how, step)
            with pytest.raises(Killed if how == "kill" else SystemExit) as ended:
                train(*flags, *["--resume"] * (number > 0))
            assert how == "kill" or ended.value.code == 128 + signal.SIGTERM
    train(*flags, "--resume")


EVERYWHERE = [("term", 2), ("term", 4), ("term", 6), ("between", 7), ("term", 9), ("kill", 11)]
VARIANTS = {
    "scenes": ([*SCENES, "--ema", 0.9, "--grad-accum", 2], EVERYWHERE),
    "between stages": (SCENES, [("between", 4), ("term", 7), ("kill", 8)]),
    "cross": ([*SCENES, "--fusion", "cross", "--muon-lr", 0], [("term", 3), ("kill", 6), ("term", 8)]),
    "nothing frozen": ([*SCENES, "--freeze", "none", "--blind", "--pixel-shuffle", 1], [("term", 2), ("kill", 6)]),
    "photos": ([*LLAVA, "--isolated"], [("term", 2), ("between", 3), ("kill", 6)]),
    "LoRA": ([*LLAVA, "--vision", "RUN", "--lm", "RUN", "--lora", 2], [("term", 2), ("kill", 5), ("term", 6)]),
    "QLoRA": ([*LLAVA, "--vision", "RUN", "--lm", "RUN", "--qlora", 2], [("term", 2), ("kill", 5)]),
    "common questions": (["--common", *LLAVA, "--isolated", "--vision-steps", 4], [("term", 2), ("between", 4), ("kill", 8)]),
    "shifted": ([*LLAVA, "--shift", 0.1], [("term", 2), ("kill", 5), ("term", 6)]),
    "cached": ([*LLAVA, "--vision", "RUN", "--cache-features"], [("term", 1), ("term", 3), ("kill", 7)]),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_and_resumed_is_uninterrupted_byte_for_byte(runs, seeing, photos, monkeypatch, variant):
    """Each run is stopped at several places, one after the other. A kill goes back to the state of --save-every."""
    flags, stops = VARIANTS[variant]
    if "--common" in flags:  # not a flag: few rows are enough for a first stage
        monkeypatch.setattr(vlm_data, "LEAST_ASKED", 2)
        flags = flags[1:]
    flags = [str(seeing[0]) if flag == "RUN" else flag for flag in flags] + ["--save-every", 5]
    flags += ["--data", photos / "scenes.json"] if "llava" in flags else []
    whole, parts = runs / f"{variant} whole", runs / f"{variant} parts"
    train(*flags, "--out", whole)
    go_on_until_done([*flags, "--out", parts], stops)
    assert bytes_of(parts) == bytes_of(whole)
    assert learned(parts) == learned(whole)


DYING = """
import os, signal, sys
import torch, train_vlm
train_vlm.SIZES["dot"], train_vlm.VISION_BATCH = eval(sys.argv.pop(1)), 4
save, saves = torch.save, []

def die_half_way(state, path):
    saves.append(path)
    save(state, path)
    if len(saves) == 2:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = die_half_way
train_vlm.main()
"""


def test_a_kill_in_the_middle_of_a_save_leaves_the_state_before_it(runs, seeing):
    """kill -9 in the second save of a run, at step 4; the first was at step 2."""
    run = runs / "dying"
    flags = [*COMMON, *SCENES, "--save-every", "2", "--out", str(run)]
    done = subprocess.run([sys.executable, "-c", DYING, repr(DOT), *flags], cwd=ROOT, capture_output=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert run_state.load_state(run)["steps_done"] == 2
    train(*SCENES, "--save-every", 2, "--out", run, "--resume")
    assert bytes_of(run) == bytes_of(seeing[0])


@contextlib.contextmanager
def full_disk(room: int):
    """No file can grow past so many bytes: the same failing write as on a full disk, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room, what", [(20_000, "state.pt"), (150_000, "model.safetensors")])
def test_a_full_disk_is_one_line_and_the_last_good_state_stays(runs, seeing, capsys, room, what):
    """What is full at the second save of the state, or at the end, when the model is to be written."""
    run = runs / f"full {what}"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "kill", 3)
        with pytest.raises(Killed):
            train(*SCENES, "--save-every", 2, "--out", run)
    resumed = [*SCENES, "--out", run, "--resume"]
    if what == "state.pt":
        with full_disk(room):
            error = refused(capsys, *resumed, "--save-every", 1)
        assert run_state.load_state(run)["steps_done"] == 2
    else:
        write = weights.write_tensors

        def when_full(*args):
            with full_disk(room):
                write(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weights, "write_tensors", when_full)
            error = refused(capsys, *resumed)
        assert not (run / "model.safetensors").exists()
    assert what in error and not list(run.glob(".*"))
    train(*resumed)
    assert bytes_of(run) == bytes_of(seeing[0])


def test_resuming_another_run_is_refused_in_words(runs, seeing, capsys):
    run = shutil.copytree(seeing[0], runs / "other")
    flags = [*SCENES, "--out", run, "--resume"]
    assert "--lr is 0.5, the run in" in refused(capsys, *flags, "--lr", 0.5)
    assert "--fusion is 'cross', the run in" in refused(capsys, *flags, "--fusion", "cross")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "term", 2)
        with pytest.raises(SystemExit):
            train(*SCENES, "--out", runs / "stopped early")
    error = refused(capsys, *SCENES, "--out", runs / "stopped early", "--resume", "--vision-steps", 0)
    assert "--vision-steps is 0, the run in" in error


# ---- what a run leaves -----------------------------------------------------------------------------------------------


def test_a_finished_run_leaves_what_is_promised(runs):
    """The only run here that draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_vlm, "draw", draw)
        last = train(*SCENES, "--out", runs / "promised")
    run = runs / "promised"
    left = {path.name for path in run.iterdir()}
    assert {"config.json", "model.safetensors", "metrics.jsonl", "result.json", "settings.json", "tokenizer.json"} <= left
    assert {"curves.png", "samples.png"} <= left and not [name for name in left if name.startswith(".")]
    assert json.loads((run / "result.json").read_text()) == last and last["steps"] == 12
    assert {"exact_match", "compositional_exact_match", "answer_loss", "by_kind", "seconds", "seed"} <= last.keys()


def test_a_stage_is_announced_with_its_reason(seeing):
    said = [line.split(": ", 1) for line in seeing[1] if line.startswith("stage ")]
    assert [stage for stage, _ in said] == ["stage vision", "stage projector", "stage language"]
    assert all(len(why) > 20 for _, why in said)


def test_a_finished_run_that_is_resumed_writes_the_same_again(runs, seeing):
    run = shutil.copytree(seeing[0], runs / "again")
    train(*SCENES, "--out", run, "--resume")
    assert bytes_of(run) == bytes_of(seeing[0])


@pytest.fixture(scope="module", params=[("Idefics3", 2), ("Idefics3", 1), ("Llava", 1)], ids=str)
def exported(request, runs):
    """A run that has learned enough to say this and that."""
    name, shuffle = request.param
    run = runs / f"exported {name} {shuffle}"
    train(
        "--vision-steps",
        20,
        "--projector-steps",
        5,
        "--steps",
        90,
        "--batch-size",
        8,
        "--lr",
        5e-3,
        "--out",
        run,
        "--pixel-shuffle",
        shuffle,
        "--projector",
        "mlp" if name == "Llava" else "linear",
    )
    return run, name


def test_transformers_gives_the_same_answers(exported):
    run, name = exported
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(run).eval()
    assert type(theirs).__name__ == f"{name}ForConditionalGeneration"
    reader = transformers.AutoProcessor.from_pretrained(run)
    assert type(reader).__name__ == f"{name}Processor"
    model, processor, _ = evaluate.load_run(run, "cpu")
    items, said = scene_items("test", 3, seed=3, per_scene=5), []
    for item in items:
        picture = Image.fromarray(item.image.permute(1, 2, 0).numpy())
        text = reader.apply_chat_template(item.messages, add_generation_prompt=True)
        inputs = reader(text=text, images=[picture], return_tensors="pt")
        ours = processor(None, [[item.image]], [item.messages], add_generation_prompt=True)
        assert torch.equal(ours["input_ids"], inputs["input_ids"])
        pixels = inputs["pixel_values"].reshape(ours["pixel_values"].shape)
        torch.testing.assert_close(ours["pixel_values"], pixels, atol=1e-5, rtol=0)
        ids = theirs.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        said.append(reader.tokenizer.decode(ids, skip_special_tokens=True).strip())
    assert said == answer(model, processor, items, max_new_tokens=12)
    assert len(set(said)) > 3, "all answers are alike: nothing was compared"


# ---- what is trained, and how fast -------------------------------------------------------------------------------------


def initial(flags):
    """(args, learner) as a run with these flags begins."""
    args = parse_args([*COMMON, *map(str, flags)])
    return args, Learner(build(args, scenes.corpus(), (0.5,) * 3, (0.5,) * 3)[0])


@pytest.fixture
def changed(monkeypatch):
    """What each stage of the runs to come has changed: {stage: (names of changed tensors, names of the others)}."""
    found, inner = {}, train_vlm.train_stage

    def outer(run, learner, stage, *rest):
        before = {name: p.detach().clone() for name, p in learner.named_parameters()}
        trainer = inner(run, learner, stage, *rest)
        names = {name for name, p in learner.named_parameters() if not torch.equal(p, before[name])}
        found[stage.name] = names, before.keys() - names
        return trainer

    monkeypatch.setattr(train_vlm, "train_stage", outer)
    return found


VISION, PROJECTOR, LANGUAGE = "model.vision_tower.", "model.multi_modal_projector.", "model.language_model."
TRAINED = {
    "scenes": (SCENES, {"vision": (VISION, "reader."), "projector": PROJECTOR, "language": (PROJECTOR, LANGUAGE)}),
    "nothing frozen": ([*SCENES, "--freeze", "none"], {"language": (VISION, PROJECTOR, LANGUAGE)}),
    "LLaVA's layout": (
        [*SCENES, "--pixel-shuffle", 1, "--freeze", "none"],
        {"vision": (VISION, "reader."), "projector": PROJECTOR, "language": (VISION, PROJECTOR, LANGUAGE)},
    ),
    "words frozen": ([*SCENES, "--freeze", "lm"], {"vision": (VISION, "reader."), "language": (VISION, PROJECTOR)}),
    "both frozen": ([*SCENES, "--freeze", "vision,lm"], {"vision": None, "projector": PROJECTOR, "language": PROJECTOR}),
    "eyes that come trained": ([*SCENES, "--vision", "RUN"], {"vision": None, "language": (PROJECTOR, LANGUAGE)}),
}


@pytest.mark.parametrize("case", TRAINED)
def test_a_stage_trains_its_parts_and_not_a_bit_of_the_others(runs, seeing, changed, case):
    flags, expected = TRAINED[case]
    train(*[seeing[0] if flag == "RUN" else flag for flag in flags], "--out", runs / f"trained {case}")
    for stage, parts in expected.items():
        if parts is None:
            assert stage not in changed
            continue
        moved, still = changed[stage]
        assert all(name.startswith(parts) for name in moved)
        unused = "post_layernorm" if case == "LLaVA's layout" else "nothing"  # comes after the features that are used
        assert not [name for name in still if name.startswith(parts) and unused not in name]


def test_lora_trains_its_matrices_and_the_projector(runs, seeing, changed):
    train(*SCENES, "--vision", seeing[0], "--lm", seeing[0], "--lora", 2, "--out", runs / "lora")
    moved, still = changed["language"]
    assert all(name.startswith(PROJECTOR) or name.endswith(("lora_a", "lora_b")) for name in moved)
    assert not [name for name in still if name.endswith(("lora_a", "lora_b"))] and len(moved) == 1 + 2 * 7 * 2
    assert (runs / "lora" / "lora" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("fusion", ["early", "cross"])
def test_qlora_packs_what_comes_trained_and_trains_only_around_it(runs, seeing, changed, monkeypatch, fusion):
    found = []
    monkeypatch.setattr(train_vlm, "finish", lambda run, trainer, *rest: found.append(trainer.raw.model.language_model))
    flags = ["--vision", seeing[0], "--lm", seeing[0], "--qlora", 2, "--fusion", fusion, "--out", runs / f"qlora {fusion}"]
    train_vlm.main([*COMMON, *map(str, [*SCENES, *flags])])
    before = from_pretrained(seeing[0]).language_model.state_dict()
    packed = {name: layer for name, layer in found[0].named_modules() if isinstance(layer, Linear4bit)}
    assert len(packed) == 2 * 7, "of two layers; those between start untrained and stay as they are"
    for name, layer in packed.items():
        assert torch.equal(layer.codes, quantize_nf4(before[name.replace(".base", ".weight")]).codes)
    moved, _ = changed["language"]
    assert all(name.startswith(PROJECTOR) or name.endswith(("lora_a", "lora_b")) or "cross_layers" in name for name in moved)
    assert sum(name.endswith("lora_b") for name in moved) >= 2 * 7


def rates(flags) -> dict[str, set]:
    """(learning rate, whether Muon's) of each part in the last stage."""
    args, learner = initial(flags)
    if args.lora:
        train_vlm.convert_linears_to_lora(learner.model.language_model, args.lora, 4, targets=train_vlm.LORA_TARGETS)
    groups = choose_parameters(learner, stages(args, None)[-1], args)
    of = {id(p): (group["lr"], group["muon"]) for group in groups for p in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in learner.parameters())
    parts = {"vision": VISION, "projector": PROJECTOR, "words": LANGUAGE}
    return {
        part: {of[id(p)] for name, p in learner.named_parameters() if name.startswith(prefix) and p.requires_grad}
        for part, prefix in parts.items()
    }


def test_what_comes_trained_learns_at_its_own_rate(seeing):
    """Muon for matrices that start untrained, AdamW for all else."""
    flags = ["--freeze", "none", "--lr", 3e-3, "--lr-pretrained", 5e-5, "--muon-lr", 0.01]
    new, old = {(3e-3, False), (0.01, True)}, {(5e-5, False)}
    assert rates(flags) == {"vision": new, "projector": {(0.01, True)}, "words": new}
    assert rates([*flags, "--vision", seeing[0]])["vision"] == old
    assert rates([*flags, "--vision", seeing[0], "--lm", seeing[0]]) == {
        "vision": old, "projector": {(0.01, True)}, "words": old,
    }  # fmt: skip
    assert rates([*flags, "--lm", seeing[0], "--lora", 2])["words"] == {(3e-3, False)}
    without = rates(["--freeze", "none", "--lr", 3e-3, "--muon-lr", 0])
    assert set.union(*without.values()) == {(3e-3, False)}


def test_new_layers_between_trained_ones_learn_at_the_rate_of_new_ones(seeing):
    """--lm brings no cross-attention: these layers start untrained."""
    args, learner = initial(["--lm", seeing[0], "--fusion", "cross", "--lr", 3e-3, "--lr-pretrained", 5e-5, "--muon-lr", 0])
    groups = choose_parameters(learner, stages(args, None)[-1], args)
    of = {id(p): group["lr"] for group in groups for p in group["params"]}
    words = learner.model.language_model
    assert {of[id(p)] for name, p in words.named_parameters() if "cross_layers" in name} == {3e-3}
    assert {of[id(p)] for name, p in words.named_parameters() if "cross_layers" not in name} == {5e-5}


def test_a_stage_with_nothing_to_train_is_refused(seeing):
    args, learner = initial([])
    with pytest.raises(ValueError, match="nothing is left to train"):
        choose_parameters(learner, Stage("none", "", 1, ()), args)


# ---- parts that come from elsewhere --------------------------------------------------------------------------------------


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    expected = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("vision_model.head.")}
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("fusion", ["early", "cross"])
def test_the_parts_of_a_run_are_taken_over_exactly(seeing, fusion):
    source = from_pretrained(seeing[0])
    _, learner = initial(["--vision", seeing[0], "--lm", seeing[0], "--fusion", fusion, "--seed", 7])
    same(learner.model.vision_tower, source.vision_tower)
    state = learner.model.language_model.state_dict()
    for name, tensor in source.language_model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    if fusion == "early":
        assert len(state) == len(source.language_model.state_dict())


def test_a_whole_model_learns_on_from_what_it_knows(runs, seeing):
    flags = ["--model", seeing[0], "--pixel-shuffle", 1, "--freeze", "none"]
    args, learner = initial([*flags, "--seed", 7])
    same(learner.model, from_pretrained(seeing[0]))
    assert [stage.name for stage in stages(args, None)] == ["language"], "nothing in it is random"
    assert set.union(*rates([*flags, "--lr-pretrained", 5e-5]).values()) == {(5e-5, False)}
    assert train(*flags, "--steps", 2, "--out", runs / "on")["steps"] == 2
    first = evaluate.load_run(seeing[0], "cpu")[1]
    again = evaluate.load_run(runs / "on", "cpu")[1]
    question = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "red"}]
    assert again.encode(question, 1) == first.encode(question, 1)
    last = train("--model", seeing[0], "--pixel-shuffle", 1, "--lora", 2, "--blind", "--steps", 1, "--out", runs / "on blind")
    assert last["steps"] == 1 and last["blind"]


def test_pictures_are_scaled_as_the_tower_learned_to_see_them(seeing):
    ours = build(parse_args([*COMMON, "--vision", str(seeing[0])]), scenes.corpus(), (0.1,) * 3, (0.2,) * 3)[1]
    theirs = evaluate.load_run(seeing[0], "cpu")[1]
    assert (ours.image_mean, ours.image_std) == (theirs.image_mean, theirs.image_std) != ((0.1,) * 3, (0.2,) * 3)


@pytest.fixture(scope="module")
def text_model(runs):
    """A LLaMA folder whose tokenizer knows nothing of pictures or chats."""
    tokenizer = BPETokenizer.train(scenes.corpus(), 300, ("<|endoftext|>",))
    torch.manual_seed(5)
    save_pretrained(Llama3ForCausalLM(LLAMA32Config(**WORDS, vocab_size=len(tokenizer))), runs / "lm")
    tokenizer.save_pretrained(runs / "lm")
    return runs / "lm"


@pytest.mark.parametrize("shuffle", [1, 2])
def test_new_special_tokens_grow_the_embedding_and_old_rows_stay(text_model, shuffle):
    args = parse_args([*COMMON, "--lm", str(text_model), "--pixel-shuffle", str(shuffle)])
    model, processor = build(args, [], (0.5,) * 3, (0.5,) * 3)
    old = from_pretrained(text_model).model.embed_tokens.weight
    new = model.language_model.model.embed_tokens.weight
    assert len(new) == len(processor.tokenizer) == model.config.text_config.vocab_size > len(old)
    assert torch.equal(new[: len(old)], old)
    torch.testing.assert_close(new[len(old) :], old.mean(dim=0).expand(len(new) - len(old), -1))
    assert model.config.image_token_id == processor.image_token_id >= len(old)


def test_a_run_continues_from_a_text_model_and_its_folder_opens(runs, text_model):
    train(*SCENES, "--lm", text_model, "--out", runs / "from text")
    model, processor, _ = evaluate.load_run(runs / "from text", "cpu")
    assert len(answer(model, processor, scene_items("test", 1, per_scene=2), max_new_tokens=2)) == 2


def test_a_model_that_looks_from_layers_between_can_give_its_words_to_one_that_does_not(runs, seeing):
    """Its language model holds layers that the other has no use for."""
    train(*SCENES, "--fusion", "cross", "--out", runs / "cross")
    source = from_pretrained(runs / "cross").language_model.state_dict()
    _, learner = initial(["--lm", runs / "cross"])
    for name, tensor in learner.model.language_model.state_dict().items():
        assert torch.equal(tensor[: len(source[name])], source[name]), name  # new tokens come last


def test_pictures_of_another_size_than_the_scenes_can_be_trained_on(runs):
    """--image-size, and a tower of --vision that was made for others."""
    last = train("--vision-steps", 2, "--projector-steps", 1, "--steps", 1, "--image-size", 32, "--patch-size", 8,
                 "--out", runs / "small")  # fmt: skip
    assert last["steps"] == 4
    assert train("--vision", runs / "small", "--projector-steps", 1, "--steps", 1, "--out", runs / "after")["steps"] == 2


# ---- blind ---------------------------------------------------------------------------------------------------------------


def other_pictures(folder: Path, new: Path) -> Path:
    shutil.copytree(folder, new)
    for number, file in enumerate(sorted((new / "images").iterdir())):
        noise = np.random.RandomState(number).randint(0, 256, (50, 70, 3)).astype(np.uint8)
        Image.fromarray(noise).save(file)
    return new


@pytest.mark.parametrize("blind", [True, False])
def test_the_blind_twin_cannot_tell_pictures_apart(runs, photos, seeing, blind):
    """Two runs on the same words about other pictures; the seeing ones show that the law can fail."""
    others, found = runs / f"noise {blind}", []
    other_pictures(photos, others)
    for folder in (photos, others):
        run = runs / f"blind {blind} {folder.name}"
        flags = ["--blind"] * blind
        train(*LLAVA, *flags, "--data", folder / "scenes.json", "--out", run)
        found.append(run)
    assert (bytes_of(found[0]) == bytes_of(found[1])) == blind
    model, processor, _ = evaluate.load_run(found[0], "cpu")
    one, two = scene_items("test", 2, per_scene=1)[:2]
    two.messages = one.messages
    if blind:
        assert len(set(answer(model, processor, [one, two], max_new_tokens=8, blind=True))) == 1


def test_a_result_stands_beside_that_of_its_blind_twin(runs):
    twin = train(*SCENES, "--blind", "--out", runs / "pair-blind")
    assert not twin.keys() & {"blind_exact_match"} and twin["blind"]
    assert train(*SCENES, "--out", runs / "pair")["blind_answer_loss"] == twin["answer_loss"]


# ---- features of a frozen tower, kept --------------------------------------------------------------------------------------


@pytest.fixture
def looks(monkeypatch):
    """How many pictures have gone through a vision tower to be trained on."""
    from data.features import FrozenFeatures

    seen, inner = [], FrozenFeatures.encode
    monkeypatch.setattr(FrozenFeatures, "encode", lambda self, pixels: seen.append(1) or inner(self, pixels))
    return seen


@pytest.mark.parametrize("shuffle", [2, 1])
def test_kept_features_change_no_bit_and_are_looked_at_once(runs, photos, seeing, looks, shuffle):
    flags = [*LLAVA, "--data", photos / "scenes.json", "--vision", seeing[0], "--pixel-shuffle", shuffle]
    file = runs / f"features {shuffle}.npy"
    plain, kept, again = (runs / f"{name} {shuffle}" for name in ("plain", "kept", "again"))
    train(*flags, "--out", plain)
    each_time = len(looks)
    looks.clear()
    train(*flags, "--cache-features", file, "--out", kept)
    pictures = len(np.load(file))
    assert len(looks) == pictures == each_time, "once in memory, too"
    written, made = file.read_bytes(), file.stat().st_mtime_ns
    looks.clear()
    train(*flags, "--cache-features", file, "--out", again)
    assert looks == [] and file.stat().st_mtime_ns == made and file.read_bytes() == written
    assert bytes_of(plain) == bytes_of(kept) == bytes_of(again)
    assert learned(plain) == learned(kept) == learned(again)


# ---- pictures that fail ------------------------------------------------------------------------------------------------------


def damage(file: Path) -> None:
    """A picture whose header is whole, and the rest cut off."""
    file.write_bytes(file.read_bytes()[:200])


@pytest.mark.parametrize("vanish", [True, False])
def test_a_picture_that_fails_in_training_is_skipped_and_counted(runs, photos, vanish):
    """Gone after the check of the file, or damaged where only decoding shows it."""
    run = runs / f"vanish {vanish}"
    folder = shutil.copytree(photos, runs / f"photos {vanish}")
    (runs / f"test {vanish}").mkdir()
    rows = json.loads((folder / "scenes.json").read_text())
    for name, part in (("train.json", rows[:12]), ("test.json", rows[12:])):
        (folder / name).write_text(json.dumps(part))
    victim = folder / "images" / rows[0]["image"]
    if not vanish:
        damage(victim)
    inner = train_vlm.Data.batches

    def gone(data, *args):
        if vanish:
            victim.unlink()
        return inner(data, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_vlm.Data, "batches", gone)
        last = train(*LLAVA, "--data", folder / "train.json", "--test-data", folder / "test.json", "--images",
                     folder / "images", "--out", run)  # fmt: skip
    assert last["unreadable_pictures"] == 1 and last["steps"] == 8


def test_where_no_test_row_can_be_asked_there_is_no_loss(runs, photos):
    """The last line and metrics.jsonl said NaN, which is no JSON."""
    folder = shutil.copytree(photos, runs / "no tests")
    rows = json.loads((folder / "scenes.json").read_text())
    for name, part in (("train.json", rows[:13]), ("test.json", rows[13:])):
        (folder / name).write_text(json.dumps(part))
    damage(folder / "images" / rows[13]["image"])
    run = runs / "without tests"
    last = train(*LLAVA, "--data", folder / "train.json", "--test-data", folder / "test.json", "--images",
                 folder / "images", "--out", run)  # fmt: skip
    assert last["n"] == 0 and last["answer_loss"] is None
    assert "NaN" not in (run / "metrics.jsonl").read_text() + (run / "result.json").read_text()


@pytest.mark.parametrize("what", ["damaged", "too long"])
def test_a_test_row_that_cannot_be_asked_does_not_end_the_training(runs, photos, what):
    """It is met when the model is first asked, perhaps after hours."""
    folder = shutil.copytree(photos, runs / f"tests {what}")
    rows = json.loads((folder / "scenes.json").read_text())
    if what == "damaged":
        damage(folder / "images" / rows[13]["image"])
    else:
        rows[13]["conversations"][0]["value"] += " and so on" * 200
    for name, part in (("train.json", rows[:12]), ("test.json", rows[12:])):
        (folder / name).write_text(json.dumps(part))
    last = train(*LLAVA, "--data", folder / "train.json", "--test-data", folder / "test.json", "--images",
                 folder / "images", "--eval-count", 2, "--eval-every", 4, "--out", runs / f"asked {what}")  # fmt: skip
    assert last["n"] == 2 and last["steps"] == 8


def test_rows_that_the_model_has_no_room_for_are_left_out_and_counted(runs, photos):
    """Longer than its context of 384, but not than --max-length."""
    folder = shutil.copytree(photos, runs / "long")
    rows = json.loads((folder / "scenes.json").read_text())
    rows[0]["conversations"][0]["value"] += " and so on" * 150
    (folder / "train.json").write_text(json.dumps(rows[:12]))
    (folder / "test.json").write_text(json.dumps(rows[12:]))
    last = train(*LLAVA, "--data", folder / "train.json", "--test-data", folder / "test.json", "--images",
                 folder / "images", "--out", runs / "long run")  # fmt: skip
    assert last["rows_too_long"] == 1


def test_rows_without_a_picture_can_fill_a_batch_in_every_stage(runs, photos):
    """No part of a projector's loss depends on a projector then."""
    folder = shutil.copytree(photos, runs / "mixed")
    rows = json.loads((folder / "scenes.json").read_text())
    for row in rows[:10]:
        del row["image"]
        row["conversations"][0]["value"] = row["conversations"][0]["value"].removeprefix("<image>\n")
    (folder / "scenes.json").write_text(json.dumps(rows))
    flags = ["--batch-size", 1, "--projector-steps", 8, "--freeze", "lm"]
    assert train(*LLAVA, *flags, "--data", folder / "scenes.json", "--out", runs / "mixed run")["steps"] == 13


def test_a_shift_moves_each_picture_by_itself_and_repeats_its_border():
    x = torch.randn(64, 1, 1, 1) + torch.arange(20.0) * torch.ones(64, 3, 20, 20)  # a slope to the right
    moved = train_vlm.shifted(x, 0.2, torch.Generator().manual_seed(0)) - x
    middle = moved[:, 0, 4:-4, 4:-4].flatten(1)
    assert torch.allclose(middle, middle[:, :1].expand_as(middle), atol=1e-4), "all of a picture moves alike"
    assert middle[:, 0].abs().max() <= 4.001 and middle[:, 0].std() > 1 and middle[:, 0].mean().abs() < 1
    assert (moved[:, 0] + x[:, 0]).amin() >= x.amin() - 1e-4, "nothing comes in that was not in the picture"


# ---- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong(runs, seeing, text_model, photos):
    """Things that do not fit, by name."""
    save_pretrained(ViTModel(ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)),
                    runs / "vit")  # fmt: skip
    pair = shutil.copytree(text_model, runs / "pair of two")
    BPETokenizer.train(scenes.corpus(), 340, ("<|endoftext|>",)).save_pretrained(pair)
    bare = shutil.copytree(text_model, runs / "no tokenizer")
    (bare / "tokenizer.json").unlink()
    (runs / "list.json").write_text("{}")
    names = {"RUN": seeing[0], "LM": text_model, "VIT": runs / "vit", "PAIR": pair, "BARE": bare}
    return names | {"DATA": photos / "scenes.json", "OBJECT": runs / "list.json"}


REFUSED = [
    ("--lm PAIR", r"its tokenizer has \d+ tokens, its model \d+: they do not belong together"),
    ("--lm BARE", "tokenizer.json"),
    ("--lm VIT", "is a ViTModel: it must be a LLaMA"),
    ("--vision VIT", "is a ViTModel: it must be a SigLIP tower"),
    ("--vision LM", "is a Llama3ForCausalLM: it must be a SigLIP tower"),
    ("--vision /nowhere", "/nowhere"),
    ("--lm /nowhere.gguf", "/nowhere.gguf"),
    ("--vision RUN --image-size 32", "--image-size cannot be chosen with --vision"),
    ("--vision RUN --patch-size 8", "--patch-size cannot be chosen with --vision"),
    ("--image-size 8", "8x8"),
    ("--pixel-shuffle 3", "3"),
    ("--freeze eyes", "--freeze eyes: it takes vision, lm"),
    ("--model RUN --vision RUN", "--model .* brings its own: leave out --pixel-shuffle, --vision"),
    ("--model LM --pixel-shuffle 1", "holds a Llama3ForCausalLM, which does not answer questions about pictures"),
    ("--lora 0", "argument --lora"),
    ("--lora 2 --qlora 2", "--lora and --qlora: choose one"),
    ("--cache-features", "--cache-features: scenes are new at every step"),
    ("--shift 0.1", "--shift is for --dataset llava"),
    ("--dataset llava --data DATA --freeze vision --shift 0.1", "--shift: the vision tower is frozen"),
    ("--dataset llava", "--dataset llava needs --data FILE.json"),
    ("--dataset llava --data /nowhere.json", "/nowhere.json does not exist"),
    ("--dataset llava --data OBJECT", "not a list of rows"),
    ("--dataset llava --data DATA --images /nowhere", "/nowhere is no folder"),
    ("--dataset llava --data DATA --test-data /nowhere.json", "/nowhere.json does not exist"),
    ("--dataset llava --data DATA --cache-features", "--cache-features: the vision tower is trained.* add --freeze vision"),
    ("--dataset llava --data DATA --max-length 5", "no batch is left; .* rows are over 5 tokens.* raise --max-length"),
    ("--dataset llava --data DATA --batch-size 400", "do not fill a batch of 400"),
    ("--dataset llava --data DATA --test-part 1", "cannot hold out 1.0"),
    ("--resume", "no state.pt to resume from"),
]  # fmt: skip


@pytest.mark.parametrize("flags, message", REFUSED)
def test_what_does_not_fit_is_one_line_and_exit_code_2(tmp_path, wrong, capsys, flags, message):
    flags = [str(wrong.get(flag, flag)) for flag in flags.split()]
    error = refused(capsys, "--projector-steps", 1, "--steps", 1, *flags, "--out", tmp_path / "run")
    assert re.search(message, error), error
    left = [path.name for path in (tmp_path / "run").glob("*")] if (tmp_path / "run").exists() else []
    assert not set(left) - {"metrics.jsonl"}, "no half of a run is left"


# ---- past bugs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts, size", [(["what is the blue shape?", "red"] * 30, 450), (scenes.corpus(), 450)])
def test_a_tokenizer_takes_all_merges_that_a_poor_corpus_has(texts, size):
    """easy-VQA has too few words for 450 tokens; the tokenizer then fell back to single bytes, rows became three times as long
    and a third of them was dropped."""
    tokenizer = train_vlm.train_tokenizer(texts, size)
    assert len(tokenizer) <= size
    assert all(len(tokenizer.encode(word)) == 1 for word in (" blue", " shape") if word in " ".join(texts))
