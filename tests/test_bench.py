"""Laws of the benchmarks at tiny sizes: both sides are the same task, and what is called a total is one."""

import contextlib
import copy
import io
import json
import sys

import pytest
import torch

from bench import inputs, peers, vit, vlm
from calls import refused
from lib.checkpoint import save_pretrained
from lib.tokenizer import BPETokenizer
from model import Llama3ForCausalLM, LLAMA32Config

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return vlm.equal_vlms("tiny")


@pytest.fixture(scope="module")
def rows(pair):
    """What `vlm --json` prints, by mode; None: all of it, in order."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(vlm, "equal_vlms", lambda size: pair)
        peers.main("vlm --size tiny --batch 2 --rounds 1 --device cpu --json".split())
    found = [json.loads(line) for line in out.getvalue().splitlines()]
    return {None: found, **dict(zip(vlm.VLM_MODES, found, strict=True))}


def test_the_text_is_as_long_as_promised_and_half_of_it_is_to_be_learned(pair):
    config = pair[0].config
    batch = vlm.vlm_batch(config, 3)
    assert batch["input_ids"].shape == (3, config.text_config.num_image_tokens + 64)
    assert ((batch["input_ids"] == config.image_token_id).sum(dim=1) == config.text_config.num_image_tokens).all()
    learned = batch["labels"] != -100
    assert (learned.sum(dim=1) == 32).all() and torch.equal(batch["labels"][learned], batch["input_ids"][learned])


@pytest.mark.parametrize("mode", vlm.VLM_MODES)
def test_both_sides_train_as_many_parameters(pair, mode):
    pytest.importorskip("peft")
    ours, theirs = (vlm.freeze(copy.deepcopy(model), mode).parameters() for model in pair)
    assert sum(p.numel() for p in ours if p.requires_grad) == sum(p.numel() for p in theirs if p.requires_grad) > 0


def test_features_given_are_the_loss_of_the_images(pair):
    ours, theirs = pair
    batch = vlm.vlm_batch(ours.config, 2)
    given = {name: x for name, x in batch.items() if name != "pixel_values"}
    with torch.no_grad():
        given["vision_features"] = ours.vision_features(batch["pixel_values"])
        expected = ours(**batch)["loss"]
        for loss in (ours(**given)["loss"], vlm.idefics3(theirs, **given).loss, vlm.idefics3(theirs, **batch).loss):
            torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", vlm.VLM_MODES[:3])
def test_the_total_is_weights_and_optimiser_state_and_batch_and_what_a_step_needs(pair, rows, mode):
    row = rows[mode]
    batch = sum(x.nbytes for x in vlm.vlm_batch(pair[0].config, 2).values())
    lasting = 4 * row["parameters"] + 2 * 4 * row["trained"] + batch  # AdamW keeps two numbers a parameter
    assert row["peak_total_mib"] == pytest.approx(lasting / 2**20 + row["peak_mib"], rel=0.03)  # and the table of RoPE


def test_training_less_takes_less(rows):
    full, frozen, lora = (rows[mode] for mode in vlm.VLM_MODES[:3])
    for figure in ("trained", "peak_mib", "peak_total_mib", "peer_peak_total_mib"):
        assert full[figure] > frozen[figure] > lora[figure], figure


def test_models_that_differ_are_not_compared(pair, monkeypatch):
    ours, theirs = pair
    other = copy.deepcopy(theirs)
    with torch.no_grad():
        other.model.connector.modality_projection.proj.weight.mul_(3)
    monkeypatch.setattr(vlm, "equal_vlms", lambda size: (ours, other))
    with pytest.raises(ValueError, match="the two models differ by .* nothing to compare"):
        peers.main(["vlm", "--size", "tiny"])


def test_its_rows_as_json(rows):
    pytest.importorskip("peft")
    assert [row["what"] for row in rows[None]] == [f"VLM training step, {mode}" for mode in vlm.VLM_MODES]
    assert [row["peer"] for row in rows[None] if "LoRA" in row["what"]] == ["transformers with peft"]
    for row in rows[None]:
        assert (row["batch"], row["dtype"], row["size"]) == (2, "float32", "tiny")
        assert min(row[key] for key in ("per_second", "speed_ratio", "memory_ratio", "peer_peak_total_mib")) > 0


def test_a_peer_without_peft_and_half_precision_are_said(pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    mode, half = "frozen tower, LoRA", {"ours": torch.bfloat16, "peer": torch.bfloat16}
    sides = {
        "ours": (pair[0], lambda model, **inputs: model(**inputs)["loss"]),
        vlm.vlm_peer(mode): (pair[1], lambda model, **inputs: vlm.idefics3(model, **inputs).loss),
    }
    row = vlm.vlm_row(mode, sides, vlm.vlm_batch(pair[0].config, 1), half, 1, torch.device("cpu"))
    assert (row["peer"], row["dtype"]) == ("transformers, projector only (no peft)", "bfloat16")
    assert row["what"] == f"VLM training step, {mode}, bfloat16"


def test_each_side_has_its_precision(monkeypatch, capsys):
    seen, plain = [], vit.training_step
    monkeypatch.setattr(vit, "training_step", lambda *args: seen.append(args[2]) or plain(*args))
    peers.main("vit --size tiny-digits --batch 2 --rounds 1 --device cpu --dtype bf16 --peer-dtype fp32".split())
    assert seen == [torch.bfloat16, torch.float32]
    assert "ViT training step, bfloat16 / float32" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["vlm", "--size", "vit-s16"], "vlm has no size 'vit-s16': choose one of 222m, tiny"),
        (["vit", "--size", "222m"], "vit has no size '222m'"),
        (["vlm", "--dtype", "fp16", "--device", "cpu"], "--dtype fp16 needs a GPU"),
        (["quant", "--int8"], "--int8 is for decode"),
    ],
)
def test_what_cannot_be_measured_is_one_line(flags, words, capsys):
    assert words in refused(capsys, peers.main, *flags)


@pytest.mark.parametrize("work, rows", [("questions", 1), ("images", 4), ("bpe", 2)])
def test_work_on_what_a_model_is_fed_with_gives_ratios_and_a_chart(work, rows, tmp_path, capsys):
    """Each compares what both sides give before it times them, and raises where they differ."""
    text = tmp_path / "text.txt"
    text.write_text("a red 7 above a blue 3, and what is left of the green 5? " * 200 + "".join(map(chr, range(33, 2000))))
    chart = tmp_path / "ratios.png"
    peers.main([work, "--batch", "2", "--rounds", "1", "--json", "--text", str(text), "--chart", str(chart)])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(found) == rows and all(row["speed_ratio"] > 0 for row in found)
    assert all((row["memory_ratio"] is not None) == (work == "questions") for row in found)
    if work == "questions":  # packed, they share their image
        assert found[0]["memory_ratio"] < 0.5
    assert chart.stat().st_size > 5000


@pytest.mark.parametrize("int8", [False, True])
def test_decoding_in_8_bits_says_what_it_costs_and_saves(tmp_path, capsys, int8):
    torch.manual_seed(0)
    model, (text, run) = Llama3ForCausalLM(LLAMA32Config.preset("tiny")), (tmp_path / "text.txt", tmp_path / "run")
    save_pretrained(model, run)
    text.write_text("a red 7 above a blue 3, and what is left of the green 5? " * 30)
    BPETokenizer.train(text.read_text(), 280).save_pretrained(run)
    flags = f"decode --source {run} --text {text} --new-tokens 5 --batch 1 3 --rounds 1 --device cpu".split()
    flags += ["--int8"] if int8 else []
    peers.main([*flags, "--json"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["batch"] for row in found] == [1, 3]
    for row in found:
        assert row["speed_ratio"] > 0 and 0 <= row["equal_tokens"] <= 1 and (int8 or row["equal_tokens"] == 1)
        if int8:
            assert 0 < abs(row["perplexity"] / row["perplexity_floats"] - 1) < 0.02
            assert row["bytes_per_weight"] < 1.02 and row["weights_mib"] < 0.4 * row["weights_floats_mib"]
    lines = [line for row in found[:1] for line in peers.notes(row)]
    assert len(lines) == (3 if int8 else 1)


def test_8_bits_are_for_a_cpu(capsys, monkeypatch):
    monkeypatch.setattr(peers, "find_device", lambda name: torch.device("cuda"))
    assert "--int8 is for decoding on a CPU, not on cuda" in refused(capsys, peers.main, "decode", "--int8")


@pytest.mark.parametrize("side", inputs.FIRST_STEPS)
def test_the_lines_that_are_timed_from_nothing_run(side):
    exec(inputs.FIRST_STEPS[side], {})
