"""Laws of evaluate.py: what it writes is what the model says; blind twins stand beside; what does not belong together is one
line and exit code 2."""

import json
import shutil

import pytest
import torch
from PIL import Image

import evaluate
from calls import refused
from data import check
from data.scenes import KINDS, corpus
from lib.answers import Item, answer, mean_answer_loss, scene_items
from lib.checkpoint import from_pretrained, save_pretrained
from lib.scores import score, wilson
from lib.tokenizer import BPETokenizer
from model import MLLAMAConfig, MllamaForConditionalGeneration
from processing_mllama import MllamaImageProcessor
from samples import image_bytes

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 64, "patch_size": 16}
TEXT = {"hidden_size": 48, "n_heads": 4, "n_kv_groups": 2, "n_layers": 2, "hidden_dim": 64, "max_position_embeddings": 160}
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def save_run(folder, settings, seed=0):
    """A run folder as train_vlm.py leaves it, with an untrained model."""
    tokenizer = BPETokenizer.train(corpus(), vocab_size=320, special_tokens=CHATML)
    tokenizer.chat_template = "chatml"
    processor = MllamaImageProcessor(tokenizer, num_image_token=4, image_size=64, add_location_tokens=False)
    text = TEXT | {"vocab_size": len(tokenizer)}
    eyes = {"projector_type": "linear", "pixel_shuffle": 2, "image_token_id": processor.image_token_id}
    torch.manual_seed(seed)
    model = MllamaForConditionalGeneration(MLLAMAConfig(VISION, text, **eyes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    save_pretrained(model, folder)
    processor.save_pretrained(folder, "idefics3")
    (folder / "settings.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that sees and its blind twin."""
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "vlm", {"dataset": "scenes", "blind": False})
    save_run(folder / "blind", {"dataset": "scenes", "blind": True}, seed=1)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """Three images: two captions of the first, one of the second, two turns about the third."""
    folder = tmp_path_factory.mktemp("llava")
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (20, 30), colour).save(folder / f"{number}.png")
    said = [("0.png", "a red picture"), ("0.png", "all of it is red"), ("1.png", "green grass seen from above")]
    rows = [{"image": name, "conversations": turns(("Describe the picture.", text))} for name, text in said]
    rows.append({"image": "2.png", "conversations": turns(("What colour?", "blue"), ("Is it red?", "no"))})
    (folder / "test.json").write_text(json.dumps(rows))
    return folder


def turns(*asked):
    said = [{"from": who, "value": text} for pair in asked for who, text in zip(("human", "gpt"), pair, strict=True)]
    said[0]["value"] = "<image>\n" + said[0]["value"]
    return said


def call(capsys, *argv):
    """(the last line as an object, everything that was printed)"""
    evaluate.main([str(word) for word in argv])
    printed = capsys.readouterr().out
    return json.loads(printed.splitlines()[-1]), printed


def test_its_figures_are_what_the_models_say(runs, capsys, tmp_path):
    last, printed = call(
        capsys, runs / "vlm", "--count", 3, "--seed", 5, "--max-new-tokens", 4, "--blind", "--blind-run", runs / "blind",
        "--swapped", "--out", tmp_path,
    )  # fmt: skip
    written = json.loads((tmp_path / "eval.json").read_text())
    assert list(written["splits"]) == ["test", "compositional"]
    for split, found in written["splits"].items():
        items = scene_items(split, 3, seed=5)
        assert written["counts"][split] == {"questions": len(items), "images": 3, "too_long": 0}
        for who, folder, blind in (("model", "vlm", False), ("blanked", "vlm", True), ("blind", "blind", True)):
            model, processor, _ = evaluate.load_run(runs / folder, "cpu")
            wanted = score(items, answer(model, processor, items, max_new_tokens=4, blind=blind))
            for key in ("n", "right", "exact_match", "low", "high"):
                assert found[who][key] == wanted[key]
            assert found[who]["loss"] == pytest.approx(mean_answer_loss(model, processor, items, blind=blind)[0], rel=1e-5)
            assert list(found[who]["by_kind"]) == [kind for kind in KINDS if kind in wanted["by_kind"]]
        photos = list({id(item.image): item.image for item in items}.values())
        about = [[item for item in items if item.image is photo] for photo in photos]
        models = (evaluate.load_run(runs / "vlm", "cpu")[:2], False), (evaluate.load_run(runs / "blind", "cpu")[:2], True)
        own, twin = ([mean_answer_loss(*pair, each, blind=blind)[0] for each in about] for pair, blind in models)
        share = sum(x > y for x, y in zip(twin, own, strict=True)) / len(photos)
        assert found["blind"]["seeing"]["better"] == pytest.approx(share) and found["blind"]["seeing"]["photos"] == len(photos)
        assert found["swapped"]["loss"] != pytest.approx(found["model"]["loss"], abs=1e-6)
    assert last["exact_match"] == written["splits"]["test"]["model"]["exact_match"]
    assert last["compositional_blind_perplexity"] == written["splits"]["compositional"]["blind"]["perplexity"]
    assert last["blanked_perplexity"] != last["perplexity"] != last["blind_perplexity"]
    assert all(title in printed for title in evaluate.ASKED.values())
    assert Image.open(tmp_path / "eval.png").size[0] > 500


def test_without_flags_the_run_says_what_to_measure(runs, llava, capsys, tmp_path):
    run = shutil.copytree(runs / "vlm", tmp_path / "run")
    settings = {"dataset": "llava", "data": str(llava / "test.json"), "images": str(llava), "blind": False}
    (run / "settings.json").write_text(json.dumps(settings))
    last, printed = call(capsys, run, "--max-new-tokens", 3)
    assert "memorised" in printed and json.loads((run / "eval.json").read_text())["data"]["trained_on_it"]
    (run / "settings.json").unlink()
    again, printed = call(capsys, run, "--data", llava / "test.json", "--images", llava, "--max-new-tokens", 3)
    assert again == last and "memorised" not in printed


def test_a_run_that_was_trained_blind_is_measured_blind(runs, capsys, tmp_path):
    last, _ = call(capsys, runs / "blind", "--split", "test", "--count", 2, "--max-new-tokens", 3, "--out", tmp_path)
    model, processor, _ = evaluate.load_run(runs / "blind", "cpu")
    loss = mean_answer_loss(model, processor, scene_items("test", 2), blind=True)[0]
    assert json.loads((tmp_path / "eval.json").read_text())["splits"]["test"]["blind"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert "blind_exact_match" in last and "exact_match" not in last


def test_captions_are_grouped_by_image_and_question(llava):
    items, unusable = evaluate.llava_items(str(llava / "test.json"), None, None, False)
    assert unusable == 0 and len(items) == 5 and [len(item.messages) for item in items] == [1, 1, 1, 1, 3]
    said = ["a red picture", "a red picture", "not a caption question", "blue", "no"]
    found = evaluate.caption_figures(items, said)  # the second image has a single description, of no kind: a mere answer
    assert (found["captions"], found["references"], found["bleu4"]) == (1, 2, 0.0)  # three words have no four in a row
    named = [Item(item.images, item.messages, item.answer, "caption") for item in items[:3]]
    found = evaluate.caption_figures(named, ["all of it is red", "all of it is red", "green grass seen from above"])
    assert (found["captions"], found["references"], found["bleu4"]) == (2, 3, 1.0) and 0 < found["cider_d"] <= 10
    assert evaluate.caption_figures(items[3:], said[3:]) is None


def test_the_share_of_right_totals_is_apart_from_the_exact_match(runs, monkeypatch):
    model, processor, _ = evaluate.load_run(runs / "vlm", "cpu")
    items = [item for item in scene_items("test", 12) if item.kind == "sum"]
    said = [item.answer.rsplit(" ", 1)[-1] for item in items]  # the total alone
    monkeypatch.setattr(evaluate, "answer", lambda *args, **options: said)
    found = evaluate.measure(model, processor, items, "model", evaluate.parse_args(["run"]), "scenes")["by_kind"]["sum"]
    assert found["right_totals"] == found["n"] == len(items) > found["right"]


def test_questions_over_the_context_are_left_out_and_counted(runs, llava, capsys, tmp_path):
    rows = json.loads((llava / "test.json").read_text())
    rows[0]["conversations"] = turns(("What? " * 200, "nothing"))
    (llava / "long.json").write_text(json.dumps(rows))
    _, printed = call(capsys, runs / "vlm", "--data", llava / "long.json", "--max-new-tokens", 3, "--out", tmp_path)
    assert "data: 4 questions about 3 images, 1 left out as too long" in printed
    assert json.loads((tmp_path / "eval.json").read_text())["counts"]["data"]["too_long"] == 1


SPELLINGS = {
    "test.csv": "image,question,options,answer,question_id\n0.png,Which colour?,\"['red', 'green']\",red,7\n",
    "test.jsonl": json.dumps({"images": ["0.png"], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?\nA. red\nB. green"}]},
        {"role": "assistant", "content": "A"}], "id": 7}),
    "test.json": json.dumps([{"image": "0.png", "query": "Which colour?", "choices": ["red", "green"], "answer": 0, "id": 7}]),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_answers_of_every_spelling_are_written_with_their_ids(runs, llava, capsys, tmp_path, monkeypatch, name):
    (tmp_path / name).write_text(SPELLINGS[name], encoding="utf-8")
    monkeypatch.setattr(evaluate, "answer", lambda model, processor, items, *_, **more: ["A. red" for _ in items])
    flags = "--data", tmp_path / name, "--images", llava, "--blind", "--out", tmp_path / "out"
    last, printed = call(capsys, runs / "vlm", *flags)
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["id"], line["asked"], line["said"], line["right"]) for line in lines] == [
        ("7", "model", "A. red", True), ("7", "blanked", "A. red", True),
    ]  # fmt: skip
    assert lines[0]["question"].startswith("Which colour?\nA. red\nB. green") and lines[0]["answer"] == "A"
    assert last["exact_match"] == 1 and lines[0]["images"] == [str(llava / "0.png")] and "answers.jsonl" in printed


def test_a_model_s_tokens_are_counted_by_check(runs, llava, capsys):
    with pytest.raises(SystemExit):
        check.main([str(llava / "test.json"), "--model", str(runs / "vlm")])
    counted = json.loads(capsys.readouterr().out.splitlines()[-1])["longest_row_tokens"]
    _, processor, _ = evaluate.load_run(runs / "vlm", "cpu")
    rows = json.loads((llava / "test.json").read_text())
    assert counted == max(len(processor.encode(row["conversations"], 1)[0]) for row in rows) - 1  # the template's last line end


# ---- what cannot be measured -----------------------------------------------------------------------------------------------


def without_weights(run, runs, llava):
    (run / "model.safetensors").unlink()


def another_tokenizer(run, runs, llava):
    tokenizer = BPETokenizer.train(corpus(), vocab_size=360, special_tokens=CHATML)
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.save_pretrained(run)


def smaller_tokenizer(run, runs, llava):
    tokenizer = BPETokenizer.train(corpus(), vocab_size=300, special_tokens=CHATML)
    tokenizer.save_pretrained(run)


def other_pixels(run, runs, llava):
    preprocessor = json.loads((run / "preprocessor_config.json").read_text())
    preprocessor["max_image_size"] = {"longest_edge": 32}
    (run / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def no_eyes(run, runs, llava):
    model = from_pretrained(run)
    save_pretrained(model.language_model, run)


def unknown_dataset(run, runs, llava):
    (run / "settings.json").write_text('{"dataset": "digits"}')


def lost_image(run, runs, llava):
    for name in ("test.json", "0.png", "1.png"):
        shutil.copy(llava / name, run / name)


def nothing(run, runs, llava):
    pass


@pytest.mark.parametrize(
    "damage, flags, message",
    [
        (without_weights, "RUN", "has no model.safetensors"),
        (another_tokenizer, "RUN", "contradicts itself: the token id of <image>: 360 for its processor, 320 for its model"),
        (smaller_tokenizer, "RUN", "contradicts itself: the token id of <image>: 300 for its processor, 320 for its model"),
        (other_pixels, "RUN", "images of (height, width): (32, 32) for its processor, (64, 64) for its model"),
        (no_eyes, "RUN", "holds a Llama3ForCausalLM, which does not answer questions about images"),
        (unknown_dataset, "RUN", "was trained on 'digits'"),
        (lost_image, "RUN --data RUN/test.json", "1 of 4 rows are unusable, the first row 4, image: '2.png' does not exist"),
        (nothing, "RUN --dataset llava", "needs --data FILE"),
        (nothing, "RUN --dataset scenes --images x", "--images is about rows of --data"),
        (nothing, "RUN --data nowhere.json --split test", "--split is about scenes"),
        (nothing, "RUN --data nowhere.json", "nowhere.json does not exist"),
        (nothing, "nowhere/at/all", "there is no folder nowhere/at/all"),
        (nothing, "RUN --blind-run RUN", "was trained with its images"),
        (no_eyes, "RUNS/vlm --blind-run RUN", "holds a Llama3ForCausalLM"),
        (nothing, "RUNS/blind --blind-run RUN", "was itself trained blind"),
        (nothing, "RUN --device cuda:9", "no such device"),
        (nothing, "RUN --count 0", "at least 1"),
    ],
)
def test_bad_calls_are_one_line_and_exit_code_2(runs, llava, capsys, tmp_path, damage, flags, message):
    run = shutil.copytree(runs / "vlm", tmp_path / "run")
    damage(run, runs, llava)
    argv = [word.replace("RUNS", str(runs)).replace("RUN", str(run)) for word in flags.split()]
    assert message in refused(capsys, evaluate.main, *argv) and not list(run.glob("eval.*"))


def test_a_twin_of_other_data_is_refused(runs, tmp_path):
    run = shutil.copytree(runs / "blind", tmp_path / "run")
    (run / "settings.json").write_text('{"dataset": "llava", "blind": true}')
    with pytest.raises(ValueError, match="trained on llava, RUN on scenes"):
        evaluate.load_twin(run, "cpu", {"dataset": "scenes"})


def test_unusable_rows_are_skipped_when_asked(runs, llava, capsys, tmp_path):
    lost_image(tmp_path, runs, llava)
    _, printed = call(
        capsys, runs / "vlm", "--data", tmp_path / "test.json", "--skip-unusable", "--max-new-tokens", 2, "--out", tmp_path
    )
    assert "data: 3 questions about 2 images" in printed
    assert json.loads((tmp_path / "eval.json").read_text())["data"]["unusable_rows"] == 1


def test_an_image_that_is_damaged_behind_its_header_costs_its_row_alone(llava, tmp_path):
    """It ended the evaluation, --skip-unusable or not, after the model had answered others."""
    rows = [{"image": f"{name}.png", "question": "?", "answer": "x"} for name in "ab"]
    (tmp_path / "a.png").write_bytes(image_bytes())
    (tmp_path / "b.png").write_bytes(image_bytes(1, (90, 90))[:2000])
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    items, lost = evaluate.llava_items(tmp_path / "rows.json", None, None, skip=True)
    assert [item.images[0].name for item in items] == ["a.png"] and lost == 1
    with pytest.raises(ValueError, match="--data .*: 1 of 2 rows are unusable, the first row 2, image: 'b.png' .*--skip"):
        evaluate.llava_items(tmp_path / "rows.json", None, None, skip=False)
    (tmp_path / "a.png").write_bytes(image_bytes(1, (90, 90))[:2000])
    with pytest.raises(ValueError, match="2 of 2 rows are unusable, .* none is left"):
        evaluate.llava_items(tmp_path / "rows.json", None, None, skip=True)


def test_of_thousands_of_kinds_the_most_frequent_are_drawn(tmp_path):
    """A file whose "category" is another one in each row made a figure too high to be written, after all was measured."""
    row = {"n": 1, "right": 1, "exact_match": 1.0, "low": 0.2, "high": 1.0}
    by_kind = {f"costs ${k} and $x_{{": {**row, "n": 1 + (k == 2000)} for k in range(3000)}
    (axes,) = evaluate.draw_bars({"test": {"model": {**row, "by_kind": by_kind}}}, tmp_path / "eval.png").axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert len(names) == evaluate.MOST_BARS + 1 and "costs $2000 and $x_{" in names
    assert max(Image.open(tmp_path / "eval.png").size) < 3000


def test_bars_reach_from_0_to_their_share_and_whiskers_over_the_interval():
    def rows(right):
        low, high = wilson(right, 20)
        return {"n": 20, "right": right, "exact_match": right / 20, "low": low, "high": high}

    found = {who: {**rows(right), "by_kind": {"count": rows(right)}} for who, right in (("model", 18), ("blanked", 3))}
    (axes,) = evaluate.draw_bars({"test": found}).axes
    bars = [patch for patch in axes.patches if patch.get_width() in (18 / 20, 3 / 20)]
    assert len(bars) == 4 and len({bar.get_facecolor() for bar in bars}) == 2
    ends = sorted(float(x) for container in axes.collections for segment in container.get_segments() for x in segment[:, 0])
    assert ends == pytest.approx(sorted([*wilson(18, 20), *wilson(3, 20)] * 2))
