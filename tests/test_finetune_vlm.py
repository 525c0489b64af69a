"""Laws of finetune_vlm.py: stopped and resumed is uninterrupted, in every stage; only what a stage names is trained, at its own
rate; parts are taken over exactly; the run folder answers in transformers as here; what does not fit is one line."""

import functools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import calls
import evaluate
import finetune_vlm
from data import convert, scenes
from data.convert import convert_scenes
from data.features import FrozenFeatures
from data.spellings import DESCRIBE
from extras import caption_sheet
from finetune_vlm import Learner, Stage, build, parse_args, stages, train_only
from gpt import GPT, GPTConfig
from lib import vlm_report
from lib.answers import Item, answer, prompt_ids, scene_items
from lib.checkpoint import from_pretrained, load_vlm, save_pretrained
from lib.quant import Linear4bit, quantize_nf4
from lib.tokenizer import BPETokenizer
from lib.vlm_parts import SIZES, assemble, train_tokenizer
from model import Llama3ForCausalLM, LLAMA32Config
from siglip import SiglipVisionConfig
from vit_scratch import ViTConfig, ViTModel

pytestmark = pytest.mark.usefixtures("undrawn")
FLAGS = "--size tiny --device cpu --workers 1 --batch-size 4 --pixel-shuffle 2 --eval-count 1 --save-every 1000".split()
FLAGS += "--projector-steps 2 --steps 3".split()  # stages end after steps 2 and 5
VISION, PROJECTOR, LANGUAGE = "vlm.vision_tower.", "vlm.multi_modal_projector.", "vlm.language_model."


def printed(*flags) -> list[str]:
    return calls.printed(finetune_vlm.main, *FLAGS, *flags)


def train(*flags) -> dict:
    """The script's last line."""
    return json.loads(printed(*flags)[-1])


def initial(*flags):
    """(args, learner) as a run with these flags begins."""
    args = parse_args([*FLAGS, "--data", "rows.json", *map(str, flags)])
    model, _ = build(args, scenes.corpus())
    finetune_vlm.add_lora(args, model)
    return args, Learner(model)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def photos(runs):
    """Scenes as files: fourteen rows of two questions each."""
    convert_scenes(runs / "photos", "train", 14, per_scene=2)
    return runs / "photos"


@pytest.fixture(scope="module")
def common(photos):
    """A hundred and twenty rows about the same images, with a question that all ask."""
    rows = json.loads((photos / "scenes.json").read_text())
    said = [("human", "<image>\nIs it odd?"), ("gpt", "yes")], [("human", "<image>\nIs it odd?"), ("gpt", "no")]
    turns = [[{"from": who, "value": text} for who, text in said[k % 2]] for k in range(120)]
    rows = [{"image": rows[k % 14]["image"], "conversations": turn} for k, turn in enumerate(turns)]
    (photos / "common.json").write_text(json.dumps(rows))
    return photos / "common.json"


def assembled(folder, seed=0, **join):
    """A run folder with random weights that are far enough from zero for its words to depend on everything."""
    vision, text, vocabulary = SIZES["tiny"]
    parts = SiglipVisionConfig(**vision), LLAMA32Config(**text), train_tokenizer(scenes.corpus(), vocabulary)
    model, processor = assemble(*parts, {"image_mean": (0.4, 0.5, 0.6), "image_std": (0.3,) * 3}, seed, **join)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    vlm_report.save_run(folder, model.eval(), processor, {"dataset": "scenes", "blind": False})
    return folder


@pytest.fixture(scope="module")
def source(runs):
    """A whole model whose parts can be taken."""
    return assembled(runs / "source", projector_type="linear", pixel_shuffle=2)


# ---- few rows --------------------------------------------------------------------------------------------------------


FEW = [
    ("1 row", 1, 1, "", "a single row cannot be split: nothing is held out", None),
    ("1 image", 5, 1, "", "all 5 rows share images: held out are rows", 1),
    ("2 images", 2, 2, "", "--batch-size 4 becomes 1: there are 1 training rows", 1),
    ("all of 3", 3, 3, "--test-part 0", "--test-part 0: nothing is held out", None),
]


@pytest.mark.parametrize("name, rows, images, flags, said, seen", FEW)
def test_the_smallest_data_sets_train(runs, photos, name, rows, images, flags, said, seen):
    """Up to fifteen rows met "do not fill a batch of 16 ...: make it smaller", one image "cannot hold out 0.1 of 1 rows": no
    message named a flag. What is not held out is not asked twice. A resumed run fits its batch to the rows again."""
    known = json.loads((photos / "scenes.json").read_text())
    few = [known[k % images] | {"image": f"images/{known[k % images]['image']}"} for k in range(rows)]
    (photos / f"{name}.json").write_text(json.dumps(few))
    flags = ["--data", photos / f"{name}.json", "--steps", 2, *flags.split(), "--out", runs / name]
    lines = printed(*flags)
    assert any(said in line for line in lines)
    result = json.loads(lines[-1])
    assert (result["n"], result.get("seen_n")) == (2, seen and 2 * seen)  # --eval-count 1
    assert json.loads(printed(*flags, "--resume")[-1])["steps"] == result["steps"]


def test_few_rows_get_more_than_three_passes():
    """Three passes over ten photos are three steps, which teach nothing."""
    steps = {rows: stages(parse_args(["--data", "x.json"]), rows // 10, {})[-1].steps for rows in (10, 3000)}
    assert steps == {10: finetune_vlm.LEAST_STEPS, 3000: 900}
    assert stages(parse_args(["--data", "x.json", "--epochs", "2"]), 1, {})[-1].steps == 2


def test_what_was_learned_by_heart_is_said():
    found = {"test": {"n": 2, "right": 0, "answer_loss": 5.0}, "seen": {"n": 9, "right": 9, "answer_loss": 0.1}}
    words = vlm_report.memorised(found)
    assert "9 of 9 about training rows, 0 of 2 held out" in words and "overfit" in words
    assert "overfit" not in vlm_report.memorised({**found, "seen": {**found["seen"], "answer_loss": 4.0}})


# ---- resume ----------------------------------------------------------------------------------------------------------

VARIANTS = {  # of each kind of tower and decoder at least one; from nothing: SigLIP and LLaMA
    "common questions": "--data COMMON --isolated --vision-steps 2 --ema 0.9 --grad-accum 2 --shift 0.1",
    "LoRA, features kept": "--data ROWS --vision CLIP --lm GPT2 --lora 2 --cache-features --projector mlp --pixel-shuffle 1",
    "QLoRA, cross": "--data ROWS --vision GREY --lm QWEN3 --qlora 2 --fusion cross",
}


@pytest.fixture(scope="module")
def parts(runs):
    """A CLIP tower, a run of train_vit.py on grey images, a GPT-2 and a Qwen3 with tokenizers."""
    tokenizer = train_tokenizer(scenes.corpus(), 400)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    towers = {"image_size": 64, "patch_size": 16, **size}
    text = {**SIZES["tiny"][1], "qk_norm": True, "head_dim": 16}
    torch.manual_seed(3)
    for name, model in {
        "CLIP": ViTModel(ViTConfig(**towers, num_labels=0, patch_bias=False, pre_norm=True, hidden_act="quick_gelu")),
        "GREY": ViTModel(ViTConfig(**towers, num_channels=1, num_labels=4, pooling="mean")),
        "GPT2": GPT(GPTConfig(**size, vocab_size=len(tokenizer), context_length=384)),
        "QWEN3": Llama3ForCausalLM(LLAMA32Config(**text, vocab_size=len(tokenizer))),
    }.items():
        save_pretrained(model, runs / name)
        tokenizer.save_pretrained(runs / name)
    return {name: runs / name for name in ("CLIP", "GREY", "GPT2", "QWEN3")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_and_resumed_is_uninterrupted_byte_for_byte(runs, parts, photos, common, variant):
    """Stopped in each stage and at its end; a kill goes back to the state of --save-every."""
    names = {"COMMON": common, "ROWS": photos / "scenes.json", **parts}
    flags = [names.get(flag, flag) for flag in VARIANTS[variant].split()] + ["--save-every", 2]
    whole, parts = runs / f"{variant} whole", runs / f"{variant} parts"
    steps = train(*flags, "--out", whole)["steps"]
    stops = [("term", 1), ("term", 2), ("kill", 3)] + [("term", step) for step in range(4, steps, 2)]
    calls.stop_and_resume(lambda *more: train(*flags, "--out", parts, *more), stops)
    assert calls.weights(parts) == calls.weights(whole) and calls.learned(parts) == calls.learned(whole)


def test_resuming_another_run_is_refused_in_words(runs, photos, capsys):
    flags = ["--data", photos / "scenes.json", "--out", runs / "stopped early"]
    with pytest.MonkeyPatch.context() as patch:
        calls.interrupt(patch, "term", 1)
        with pytest.raises(SystemExit):
            train(*flags)
    error = calls.refused(capsys, finetune_vlm.main, *FLAGS, *flags, "--fusion", "cross", "--resume")
    assert "--fusion is 'cross', the run in" in error


# ---- transformers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, join", [
    ("Idefics3", {"projector_type": "linear", "pixel_shuffle": 2}), ("Idefics3", {"projector_type": "linear"}),
    ("Llava", {"projector_type": "mlp", "vision_feature_layer": -1}),
])  # fmt: skip
def test_transformers_gives_the_same_answers(tmp_path, name, join):
    run = assembled(tmp_path / "run", **join)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(run).eval()
    assert type(theirs).__name__ == f"{name}ForConditionalGeneration"
    reader = transformers.AutoProcessor.from_pretrained(run)
    assert type(reader).__name__ == f"{name}Processor"
    model, processor = load_vlm(run)
    items, said = scene_items("test", 3, seed=3, per_scene=3), []
    for item in items:
        image = Image.fromarray(item.image.permute(1, 2, 0).numpy())
        text = reader.apply_chat_template(item.messages, add_generation_prompt=True)
        inputs = reader(text=text, images=[image], return_tensors="pt")
        ours = processor(None, [[item.image]], [item.messages], add_generation_prompt=True)
        assert torch.equal(ours["input_ids"], inputs["input_ids"])
        pixels = inputs["pixel_values"].reshape(ours["pixel_values"].shape)
        torch.testing.assert_close(ours["pixel_values"], pixels, atol=1e-5, rtol=0)
        ids = theirs.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        said.append(reader.tokenizer.decode(ids, skip_special_tokens=True).strip())
    assert said == answer(model, processor, items, max_new_tokens=8)
    assert len(set(said)) > 3, "all answers are alike: nothing was compared"


# ---- what is trained, and how fast -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, common, expected",
    [
        ("", {"odd?": {"no": 0, "yes": 1}}, {"vision": (VISION, "probe."), "projector": (PROJECTOR,),
                                             "language": (PROJECTOR, LANGUAGE)}),
        ("", {}, {"projector": (PROJECTOR,), "language": (PROJECTOR, VISION, LANGUAGE)}),
        ("--freeze lm", {}, {"language": (PROJECTOR, VISION)}),
        ("--freeze vision,lm", {}, {"language": (PROJECTOR,)}),
        ("--vision RUN", {}, {"language": (PROJECTOR, LANGUAGE)}),
        ("--blind", {"odd?": {"no": 0, "yes": 1}}, {"language": (PROJECTOR, LANGUAGE)}),
        ("--fusion cross", {}, {"language": (PROJECTOR, VISION, LANGUAGE)}),
    ],
)  # fmt: skip
def test_a_stage_trains_its_parts_and_no_other(source, flags, common, expected):
    args, learner = initial(*flags.replace("RUN", str(source)).split())
    learner = Learner(learner.vlm, tuple(map(len, common.values())))
    plan = {stage.name: stage for stage in stages(args, 10, common)}
    names = [name for name, _ in learner.named_parameters()]
    for stage, parts in expected.items():
        train_only(learner, plan[stage], args)
        trained = {name for name, p in learner.named_parameters() if p.requires_grad}
        assert trained == {name for name in names if name.startswith(parts)}, stage
    assert ("vision" in plan) == ("vision" in expected)


def test_the_norm_after_the_features_that_are_used_is_not_trained():
    args, learner = initial("--projector", "mlp", "--pixel-shuffle", 1)
    train_only(learner, stages(args, 10, {})[-1], args)
    still = [name for name, p in learner.named_parameters() if not p.requires_grad]
    assert still and all("post_layernorm" in name for name in still)


def test_lora_trains_its_matrices_and_the_projector(runs, source, photos):
    run, before = runs / "lora", from_pretrained(source)
    train("--data", photos / "scenes.json", "--vision", source, "--lm", source, "--lora", 2, "--out", run)
    assert (run / "lora" / "adapter_model.safetensors").exists()
    args, learner = initial("--vision", source, "--lm", source, "--lora", 2)
    train_only(learner, stages(args, 10, {})[-1], args)
    moved = {name for name, p in learner.named_parameters() if p.requires_grad}
    assert all(name.startswith(PROJECTOR) or name.endswith(("lora_a", "lora_b")) for name in moved)
    assert len(moved) == 1 + 2 * 7 * 2
    after = from_pretrained(run)
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert len([name for name in changed if "_proj" in name and "projector" not in name]) == 2 * 7
    assert not [name for name in changed if name.startswith("vision_tower")]


def test_a_question_that_nearly_fills_the_context_ends_no_run(source, tmp_path):
    """All was trained and asked; then attention.png wanted room for 64 tokens of answer, and there was no result.json."""
    model, processor = load_vlm(source)
    limit, image = model.config.text_config.context_length, torch.zeros(3, 32, 32, dtype=torch.uint8)
    items = (Item(image, [{"role": "user", "content": "so " * n}], "") for n in range(limit))
    longest = next(item for item in items if len(prompt_ids(processor, item, True)[0]) > limit - 20)
    vlm_report.draw_attention(tmp_path / "attention.png", model, processor, longest)


def test_an_earlier_run_leaves_no_lora_behind(runs, source, tmp_path):
    """`generate.py RUN --adapter OTHER` takes the run's own corrections out of its weights: they were an earlier run's."""
    model, processor = load_vlm(source)
    (tmp_path / "lora").mkdir()
    vlm_report.save_run(tmp_path, model, processor, {})
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("fusion", ["early", "cross"])
def test_qlora_packs_what_comes_trained_and_trains_only_around_it(source, fusion):
    args, learner = initial("--vision", source, "--lm", source, "--qlora", 2, "--fusion", fusion)
    language, before = learner.vlm.language_model, from_pretrained(source).language_model.state_dict()
    packed = {name: layer for name, layer in language.named_modules() if isinstance(layer, Linear4bit)}
    assert len(packed) == 2 * 7, "of two layers; those between start untrained and stay as they are"
    for name, layer in packed.items():
        assert torch.equal(layer.codes, quantize_nf4(before[name.replace(".linear", ".weight")]).codes)
    train_only(learner, stages(args, 10, {})[-1], args)
    moved = {name for name, p in learner.named_parameters() if p.requires_grad}
    assert all(name.startswith(PROJECTOR) or name.endswith(("lora_a", "lora_b")) or "cross_layers" in name for name in moved)
    assert sum(name.endswith("lora_b") for name in moved) >= 2 * 7


def rates(*flags) -> dict[str, set]:
    """(learning rate, whether Muon's) of each part in the last stage."""
    args, learner = initial(*flags)
    groups = train_only(learner, stages(args, 10, {})[-1], args)
    of = {id(p): (group["lr"], group["muon"]) for group in groups for p in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in learner.parameters())
    parts = {"vision": VISION, "projector": PROJECTOR, "words": LANGUAGE}
    return {
        part: {of[id(p)] for name, p in learner.named_parameters() if name.startswith(prefix) and p.requires_grad}
        for part, prefix in parts.items()
    }


def test_what_comes_trained_learns_at_its_own_rate(source):
    """Muon for matrices that start untrained, AdamW for all else."""
    flags = ["--freeze", "none", "--lr", 3e-3, "--lr-pretrained", 5e-5, "--muon-lr", 0.01]
    new, old = {(3e-3, False), (0.01, True)}, {(5e-5, False)}
    assert rates(*flags) == {"vision": new, "projector": {(0.01, True)}, "words": new}
    assert rates(*flags, "--vision", source)["vision"] == old
    assert rates(*flags, "--vision", source, "--lm", source) == {"vision": old, "projector": {(0.01, True)}, "words": old}
    assert rates(*flags, "--lm", source, "--lora", 2)["words"] == {(3e-3, False)}
    assert set.union(*rates("--freeze", "none", "--lr", 3e-3, "--muon-lr", 0).values()) == {(3e-3, False)}
    assert set.union(*rates(*flags, "--model", source, "--pixel-shuffle", 1).values()) == old


def test_new_layers_between_trained_ones_learn_at_the_rate_of_new_ones(source):
    """--lm brings no cross-attention: these layers start untrained."""
    args, learner = initial("--lm", source, "--fusion", "cross", "--lr", 3e-3, "--lr-pretrained", 5e-5, "--muon-lr", 0)
    groups = train_only(learner, stages(args, 10, {})[-1], args)
    of = {id(p): group["lr"] for group in groups for p in group["params"]}
    words = learner.vlm.language_model
    assert {of[id(p)] for name, p in words.named_parameters() if "cross_layers" in name} == {3e-3}
    assert {of[id(p)] for name, p in words.named_parameters() if "cross_layers" not in name} == {5e-5}


def test_a_stage_with_nothing_to_train_is_refused():
    args, learner = initial()
    with pytest.raises(ValueError, match="nothing is left to train"):
        train_only(learner, Stage("language", "", 1, ()), args)


# ---- parts that come from elsewhere --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["early", "cross"])
def test_the_parts_of_a_run_are_taken_over_exactly(source, fusion):
    theirs, (_, learner) = from_pretrained(source), initial(
        "--vision", source, "--lm", source, "--fusion", fusion, "--seed", 7)  # fmt: skip
    for part in ("vision_tower", "language_model"):
        ours, given = getattr(learner.vlm, part).state_dict(), getattr(theirs, part).state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in given.items())
        assert len(ours) == len(given) or (fusion, part) == ("cross", "language_model")


def test_a_whole_model_learns_on_from_what_it_knows(runs, source, photos):
    flags = ["--model", source, "--pixel-shuffle", 1, "--freeze", "none", "--projector-steps", 0]
    _, learner = initial(*flags, "--seed", 7)
    theirs = from_pretrained(source).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in learner.vlm.state_dict().items())
    assert train(*flags, "--steps", 2, "--data", photos / "scenes.json", "--out", runs / "on")["steps"] == 2
    first, again = load_vlm(source)[1], load_vlm(runs / "on")[1]
    question = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "red"}]
    assert again.encode(question, 1) == first.encode(question, 1)


def test_images_are_scaled_as_the_tower_learned_to_see_them(source):
    args = parse_args([*FLAGS, "--data", "rows.json", "--vision", str(source)])
    ours = build(args, scenes.corpus())[1]
    settings = ours.image_settings
    assert settings.image_mean == pytest.approx((0.4, 0.5, 0.6)) and settings.image_std == pytest.approx((0.3,) * 3)


@pytest.fixture(scope="module")
def text_model(runs):
    """A LLaMA folder whose tokenizer knows nothing of images or chats."""
    tokenizer = BPETokenizer.train(scenes.corpus(), 300, ("<|endoftext|>",))
    torch.manual_seed(5)
    save_pretrained(Llama3ForCausalLM(LLAMA32Config(**SIZES["tiny"][1], vocab_size=len(tokenizer))), runs / "lm")
    tokenizer.save_pretrained(runs / "lm")
    return runs / "lm"


@pytest.mark.parametrize("shuffle", [1, 2])
def test_new_special_tokens_grow_the_embedding_and_old_rows_stay(text_model, shuffle):
    args = parse_args([*FLAGS, "--data", "rows.json", "--lm", str(text_model), "--pixel-shuffle", str(shuffle)])
    model, processor = build(args, [])
    old = from_pretrained(text_model).model.embed_tokens.weight
    new = model.language_model.model.embed_tokens.weight
    assert len(new) == len(processor.tokenizer) == model.config.text_config.vocab_size > len(old)
    assert torch.equal(new[: len(old)], old)
    torch.testing.assert_close(new[len(old) :], old.mean(dim=0).expand(len(new) - len(old), -1))
    assert model.config.image_token_id == processor.image_token_id >= len(old)


def test_a_run_continues_from_a_text_model_and_its_folder_opens(runs, text_model, photos):
    """And a model with cross-attention can give its words to one without."""
    flags = ["--data", photos / "scenes.json", "--lm", text_model, "--fusion", "cross", "--image-size", 32, "--patch-size", 8]
    train(*flags, "--out", runs / "from text")
    model, processor = load_vlm(runs / "from text")
    assert len(answer(model, processor, scene_items("test", 1, per_scene=2), max_new_tokens=2)) == 2
    given = model.language_model.state_dict()
    _, learner = initial("--lm", runs / "from text", "--vision", runs / "from text")
    for name, tensor in learner.vlm.language_model.state_dict().items():
        assert torch.equal(tensor[: len(given[name])], given[name]), name  # new tokens come last


# ---- the recipe for photos -----------------------------------------------------------------------------------------------

COCO = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_captions_permissive.tar"


@pytest.mark.skipif(not COCO.exists(), reason="the shared data folder with coco_captions_permissive.tar is absent")
def test_ten_steps_of_the_command_for_photos_with_captions(tmp_path):
    """docs/finetuning.md's own command but for the size of its decoder, on real photos and a DINOv2 of random weights: the loss
    falls, and evaluate.py compares what it leaves with its blind twin."""
    tf = pytest.importorskip("transformers")
    tower = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
    tf.Dinov2Model(tf.Dinov2Config(**tower)).save_pretrained(tmp_path / "dinov2")
    convert.main(["captions", str(COCO), str(tmp_path / "coco")])
    rows = json.loads((tmp_path / "coco" / "annotations.json").read_text())
    for name, part in {"train": rows[:67], "test": rows[67:]}.items():
        (tmp_path / "coco" / f"{name}.json").write_text(json.dumps(part))
    recipe = f"--data {tmp_path}/coco/train.json --images {tmp_path}/coco/images --test-data {tmp_path}/coco/test.json "
    recipe += f"--vision {tmp_path}/dinov2 --vision-layers 2 --image-size 224 --pixel-shuffle 2 --size tiny --dropout 0.1 "
    recipe += "--projector-steps 0 --batch-size 8 --steps 10 --eval-count 1 --device cpu --workers 1"
    losses = {}
    for name, flags in {"sees": ["--cache-features"], "blind": ["--blind"]}.items():
        said = calls.printed(finetune_vlm.main, *recipe.split(), *flags, "--out", tmp_path / name)
        losses[name] = json.loads(said[-1])["answer_loss"]
    assert max(losses.values()) < math.log(from_pretrained(tmp_path / "sees").config.text_config.vocab_size) - 0.2
    asked = ["--data", tmp_path / "coco" / "test.json", "--count", 3, "--beams", 2]
    asked += ["--swapped", "--blind-run", tmp_path / "blind"]
    found = json.loads(calls.printed(evaluate.main, tmp_path / "sees", *asked, "--max-new-tokens", 8)[-1])
    assert found["n"] == 15 and {"bleu4", "cider_d", "swapped_gain", "blind_gain", "blind_better"} <= found.keys()
    photos = [str(tmp_path / "coco" / "images" / row["image"]) for row in rows[67:69]]
    shown = ["--images", *photos, "--beams", "2", "--max-new-tokens", "8", "--out", tmp_path / "sheet.png"]
    said = calls.printed(caption_sheet.main, tmp_path / "sees", *shown)
    model, processor = load_vlm(tmp_path / "sees")
    items = [Item(photo, [{"role": "user", "content": DESCRIBE}], "") for photo in photos]
    wanted = answer(model, processor, items, None, 8, beams=2)
    assert said[:-1] == [f"{photo}: {text}" for photo, text in zip(photos, wanted, strict=True)]


# ---- blind, kept features ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blind", [True, False])
def test_the_blind_twin_cannot_tell_images_apart(runs, photos, blind):
    """Two runs on the same words about other images; the seeing ones show that the law can fail."""
    others = shutil.copytree(photos, runs / f"noise {blind}")
    for number, file in enumerate(sorted((others / "images").iterdir())):
        Image.fromarray(np.random.RandomState(number).randint(0, 256, (50, 70, 3)).astype(np.uint8)).save(file)
    found = [runs / f"blind {blind} {folder.name}" for folder in (photos, others)]
    for folder, run in zip((photos, others), found, strict=True):
        train(*["--blind"] * blind, "--data", folder / "scenes.json", "--out", run)
    assert (calls.weights(found[0]) == calls.weights(found[1])) == blind


def test_kept_features_change_no_bit_and_are_encoded_once(runs, photos, source, monkeypatch):
    seen, inner = [], FrozenFeatures.encode
    monkeypatch.setattr(FrozenFeatures, "encode", lambda self, pixels: seen.append(1) or inner(self, pixels))
    flags, file = ["--data", photos / "scenes.json", "--vision", source], runs / "features.npy"
    plain, kept, again = (runs / name for name in ("plain", "kept", "kept again"))
    train(*flags, "--out", plain)
    once = len(seen)
    seen.clear()
    train(*flags, "--cache-features", file, "--out", kept)
    assert len(seen) == len(np.load(file)) == once, "once in memory, too"
    written, made = file.read_bytes(), file.stat().st_mtime_ns
    seen.clear()
    train(*flags, "--cache-features", file, "--out", again)
    assert seen == [] and file.stat().st_mtime_ns == made and file.read_bytes() == written
    assert calls.weights(plain) == calls.weights(kept) == calls.weights(again)
    assert calls.learned(plain) == calls.learned(kept) == calls.learned(again)


@pytest.mark.parametrize("flags, said", [((), 1), (("--cache-features",), 0), (("--blind",), 0)])
def test_features_that_memory_cannot_hold_are_said(runs, photos, monkeypatch, flags, said):
    """6,000 photos of 256 patches: more than half of them went through the tower in every epoch, without a word."""
    inner = FrozenFeatures.__init__
    monkeypatch.setattr(FrozenFeatures, "__init__", lambda *args: inner(*args, most_bytes=2**14))  # of two photos' features
    run = runs / f"large{len(flags)}{said}{flags[:1]}"
    lines = printed("--data", photos / "scenes.json", "--freeze", "vision", *flags, "--out", run)
    assert sum("--cache-features keeps them in a file" in line for line in lines) == said


# ---- rows and images that fail -------------------------------------------------------------------------------------------


def damage(file: Path) -> None:
    """An image whose header is whole, and the rest cut off."""
    file.write_bytes(file.read_bytes()[:200])


def split(photos: Path, folder: Path, change=lambda folder, rows: None) -> list:
    """The flags of a run on twelve of the rows, tested on two, after a change."""
    shutil.copytree(photos, folder)
    rows = json.loads((folder / "scenes.json").read_text())
    change(folder, rows)
    for name, part in (("train.json", rows[:12]), ("test.json", rows[12:])):
        (folder / name).write_text(json.dumps(part))
    flags = ["--data", folder / "train.json", "--test-data", folder / "test.json", "--images", folder / "images"]
    return [*flags, "--out", folder / "run", "--eval-count", 2]


def test_what_fails_in_training_is_skipped_and_counted(photos, tmp_path, monkeypatch):
    """An image that is gone after the check of the file, one that is damaged where only decoding shows it, and a row that is
    longer than the context of 384, but not than --max-length."""

    def change(folder, rows):
        damage(folder / "images" / rows[1]["image"])
        rows[2]["conversations"][0]["value"] += " and so on" * 150

    flags, inner = split(photos, tmp_path / "data", change), finetune_vlm.conversations
    victim = json.loads((tmp_path / "data" / "train.json").read_text())[0]["image"]
    monkeypatch.setattr(finetune_vlm, "conversations",
                        lambda *args: (tmp_path / "data" / "images" / victim).unlink() or inner(*args))  # fmt: skip
    last = train(*flags)
    assert (last["unreadable_images"], last["rows_too_long"], last["steps"]) == (2, 1, 5)


def test_a_test_row_that_cannot_be_asked_does_not_end_the_training(photos, tmp_path):
    """It was met when the model was first asked, perhaps after hours. Without any there is no loss: NaN is no JSON."""

    def change(folder, rows):
        damage(folder / "images" / rows[13]["image"])
        rows[12]["conversations"][0]["value"] += " and so on" * 200
        rows[12]["conversations"] = rows[12]["conversations"][:2]

    last = train(*split(photos, tmp_path / "data", change), "--eval-every", 2)
    assert last["n"] == 0 and last["answer_loss"] is None and last["steps"] == 5
    run = tmp_path / "data" / "run"
    assert "NaN" not in (run / "metrics.jsonl").read_text() + (run / "result.json").read_text()


def test_rows_without_an_image_can_fill_a_batch_in_every_stage(photos, tmp_path):
    """No part of a projector's loss depends on a projector then."""

    def change(folder, rows):
        for row in rows[:10]:
            del row["image"]
            row["conversations"][0]["value"] = row["conversations"][0]["value"].removeprefix("<image>\n")

    flags = ["--batch-size", 1, "--projector-steps", 8, "--freeze", "lm"]
    assert train(*split(photos, tmp_path / "data", change), *flags)["steps"] == 11


def test_a_shift_moves_each_image_by_itself_and_repeats_its_border():
    x = torch.randn(64, 1, 1, 1) + torch.arange(20.0) * torch.ones(64, 3, 20, 20)  # a slope to the right
    moved = finetune_vlm.shifted(x, 0.2, torch.Generator().manual_seed(0)) - x
    middle = moved[:, 0, 4:-4, 4:-4].flatten(1)
    assert torch.allclose(middle, middle[:, :1].expand_as(middle), atol=1e-4), "all of an image moves alike"
    assert middle[:, 0].abs().max() <= 4.001 and middle[:, 0].std() > 1 and middle[:, 0].mean().abs() < 1
    assert (moved[:, 0] + x[:, 0]).amin() >= x.amin() - 1e-4, "nothing comes in that was not in the image"


# ---- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong(runs, source, text_model, photos):
    """Things that do not fit, by name."""
    save_pretrained(ViTModel(ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)),
                    runs / "vit")  # fmt: skip
    pair = shutil.copytree(text_model, runs / "pair of two")
    BPETokenizer.train(scenes.corpus(), 340, ("<|endoftext|>",)).save_pretrained(pair)
    bare = shutil.copytree(text_model, runs / "no tokenizer")
    (bare / "tokenizer.json").unlink()
    (runs / "list.json").write_text("{}")
    names = {"RUN": source, "LM": text_model, "VIT": runs / "vit", "PAIR": pair, "BARE": bare}
    return names | {"DATA": photos / "scenes.json", "OBJECT": runs / "list.json"}


REFUSED = [
    ("--lm PAIR", r"its tokenizer has \d+ tokens, its model \d+: they do not belong together"),
    ("--lm BARE", "tokenizer.json"),
    ("--lm VIT", "holds a ViTModel: it must be a decoder"),
    ("--vision LM", "holds a Llama3ForCausalLM: it must be a vision tower"),
    ("--vision /nowhere", "/nowhere"),
    ("--lm /nowhere.gguf", "/nowhere.gguf"),
    ("--vision VIT --image-size 33", "--image-size 33: a 33x33 image cannot be cut into 4x4 patches"),
    ("--vision RUN --image-size 512 --pixel-shuffle 1", "an image is 1024 tokens, the language model reads 384"),
    ("--vision RUN --patch-size 8", "--patch-size cannot be chosen with --vision"),
    ("--vision VIT --vision-layers 2", "--vision-layers 2: the tower has 1"),
    ("--vision-layers 2", "--vision-layers is of --vision, a tower that comes trained"),
    ("--lm LM --dropout 0.1", "--dropout 0.1 is of a language model that starts untrained"),
    ("--image-size 8", "8x8"),
    ("--pixel-shuffle 3", "3"),
    ("--freeze eyes", "--freeze eyes: it takes vision, lm"),
    ("--model RUN --vision RUN", "--model .* brings its own: leave out --pixel-shuffle, --vision"),
    ("--model LM --pixel-shuffle 1", "holds a Llama3ForCausalLM, which does not answer questions about"),
    ("--lora 0", "argument --lora"),
    ("--lora 2 --qlora 2", "--lora and --qlora: choose one"),
    ("--lora 100000000", r"LoRA's rank is 100000000: the matrices that it corrects have \d+ at most"),  # it took all memory
    ("--lora-alpha 4", "--lora-alpha 4 is of LoRA: add --lora"),
    ("--warmup 2", "argument --warmup: '2' must be a number of at least 0 and below 1"),
    ("--vision=", "argument --vision: it is empty"),  # of an unset variable: the tower was trained from nothing
    ("--vision DATA", "--vision .*scenes.json is a file"),
    ("--vision VIT --freeze vision --cache-features DATA", "--cache-features .*scenes.json has no scenes.json.json beside it"),
    ("--freeze vision --shift 0.1", "--shift: the vision tower is frozen"),
    ("--fusion cross --freeze lm", "--fusion cross --freeze lm: .* add --lora"),
    ("--data /nowhere.json", "--data /nowhere.json does not exist"),
    ("--data a-*.tar", "--data a-.*.tar names no file"),
    ("--data OBJECT", "not a list of rows"),
    ("--images /nowhere", "/nowhere is no folder"),
    ("--test-data /nowhere.json", "--test-data /nowhere.json does not exist"),
    ("--cache-features", "--cache-features: the vision tower is trained.* add --freeze vision"),
    ("--max-length 5", "no batch is left; .* rows are over 5 tokens.* raise --max-length"),
    ("--batch-size 400 --grad-accum 100", "13 training rows are fewer than the 100 parts of a step: lower --grad-accum"),
    ("--test-part 1", "argument --test-part: '1' must be a number of at least 0 and below 1"),
    ("--resume", "no state.pt to resume from"),
    ("--test-data DATA", "--test-data .*scenes.json is in --data, too"),
    ("--test-data /x.json --test-part 0.3", "--test-part 0.3 is of --data"),
    ("--freeze none,vision", "--freeze none,vision: it takes vision, lm"),
    ("--muon-lr 1e300", "argument --muon-lr: '1e300' must be a number of at least 0 and below 2"),  # a traceback
]  # fmt: skip


@pytest.mark.parametrize("flags, message", REFUSED)
def test_what_does_not_fit_is_one_line_and_exit_code_2(tmp_path, wrong, capsys, flags, message):
    flags = [str(wrong.get(flag, flag)) for flag in f"--data DATA {flags}".split()]
    error = calls.refused(capsys, finetune_vlm.main, *FLAGS, *flags, "--out", tmp_path / "run")
    assert re.search(message, error), error
    left = [path.name for path in (tmp_path / "run").glob("*")] if (tmp_path / "run").exists() else []
    assert not set(left) - {"metrics.jsonl", "lock"}, "no half of a run is left"


def test_an_image_size_is_measured_by_the_patches_of_the_tower_that_is_named(wrong):
    """--image-size 12 was refused, since --size's patches are of 16 pixels; the tower's are of 4."""
    flags = ["--data", "x.json", "--size", "tiny", "--vision", str(wrong["VIT"]), "--image-size", "12"]
    assert build(parse_args(flags), scenes.corpus())[0].vision_tower.grid == (3, 3)


def test_a_run_does_not_write_over_a_model_that_is_not_its_own(wrong, tmp_path, capsys):
    """`--model RUN --lora 8 --out RUN`, and without --out where RUN was runs/vlm-own, replaced what it had started from; and
    into any folder went a config.json and weights."""
    run, folder = wrong["RUN"], shutil.copytree(wrong["LM"], tmp_path / "lm")
    refused = functools.partial(calls.refused, capsys, finetune_vlm.main, *FLAGS, "--data", wrong["DATA"])
    before = calls.weights(run), calls.weights(folder)
    assert "is what --vision is read from" in refused("--vision", run, "--pixel-shuffle", 1, "--out", run)
    assert "is what --lm is read from" in refused("--lm", folder, "--out", folder)
    assert "holds a config.json that no run here has made" in refused("--out", folder)
    assert "cannot be made a folder" in refused("--out", folder / "config.json")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "samples.png").touch()  # somebody's
    assert "holds a samples.png that no run here has made" in refused("--out", tmp_path / "own")
    assert before == (calls.weights(run), calls.weights(folder))
    assert finetune_vlm.parse_args(["--data", "x.json", "--model", "runs/vlm-own"]).out == "runs/vlm-own-more"


def test_own_data_are_needed(capsys):
    assert "--data FILE is missing" in calls.refused(capsys, finetune_vlm.main, *FLAGS)
