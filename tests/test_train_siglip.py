"""Laws of train_siglip.py: a caption counts as true where it is; pieces and processes change no gradient; stopped and resumed
is uninterrupted; the run folder is transformers' SiglipModel and train_vlm.py's tower; bad input is one line, exit code 2."""

import contextlib
import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import generate
import train_vlm
from calls import printed, refused
from data.convert import convert_scenes
from data.scenes import COLOURS, PLACES, make_scenes
from extras import caption_pairs, train_siglip
from extras.caption_pairs import SINGLES, RowPairs, ScenePairs, Test, scene_captions
from extras.train_siglip import measure, pair_loss, parse_args, part_losses
from lib.checkpoint import from_pretrained
from lib.optim import cosine_schedule
from lib.run_state import load_state
from siglip import SiglipConfig, SiglipTwoTower, sigmoid_loss

Test.__test__ = False  # no test of pytest's
draw = train_siglip.draw
VISION, TEXT, _ = train_siglip.SIZES["tiny"]
SAME = "--steps 3 --tokens 64".split()
COMMON = "--size tiny --device cpu --workers 1 --batch-size 8 --eval-count 10 --save-every 1000".split()


@pytest.fixture(autouse=True, scope="module")
def quick():
    """A smaller gallery, and images only where a test asks for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption_pairs, "GALLERY", 20)
        patch.setattr(train_siglip, "draw", lambda *args: None)
        yield


def train(*flags) -> dict:
    """The script's last line."""
    return json.loads(printed(train_siglip.main, *COMMON, *flags)[-1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def photos(runs):
    """Scenes as files with one described row each, the first two of them about one image."""
    convert_scenes(runs / "photos", "train", 30, per_scene=1, mix={"describe": 1})
    rows = json.loads((runs / "photos" / "scenes.json").read_text())
    for row in rows:
        row["image"] = f"images/{row['image']}"
    rows[1]["image"] = rows[0]["image"]
    (runs / "photos" / "scenes.json").write_text(json.dumps(rows))
    return runs / "photos"


@pytest.fixture(scope="module")
def finished(runs):
    return runs / "finished", train(*SAME, "--out", runs / "finished")


# ---- captions --------------------------------------------------------------------------------------------------------


def test_what_is_true_of_a_scene_is_what_the_scene_shows():
    """Against another way to tell: every caption is taken apart into digits, and each looked for in the scene."""
    found = make_scenes("train", 150, seed=3)
    captions = scene_captions(found)
    said = sorted({c for placed, things, single, _ in captions for c in (placed, things, *single)})
    for i, (*_, true) in enumerate(captions):
        n, names = int(found.counts[i]), PLACES[int(found.layouts[i])]
        cells = found.cells[i, :n].tolist()
        shown = [
            (COLOURS[c], str(d), names[cell])
            for c, d, cell in zip(found.colours[i, :n].tolist(), found.digits[i, :n].tolist(), cells, strict=True)
        ]
        for caption in said:
            rest, fits = list(shown), True
            for part in caption.split(", "):
                thing, _, place = part.partition(" at the ")
                words = tuple(thing.split()[1:])  # colour and digit, or the digit
                match = next((k for k, s in enumerate(rest) if s[2 - len(words) : 2] == words and place in ("", s[2])), None)
                fits = fits and match is not None
                rest = rest[match + 1 :] if fits else rest  # in reading order
            assert fits == (caption in true), (caption, shown)


def test_a_scenes_captions_are_true_of_it_and_come_in_all_kinds():
    pairs = ScenePairs(parse_args(["--batch-size", "200"]), SimpleNamespace(rank=0, world_size=1))
    assert max(caption.count(",") for caption in pairs.draw(torch.Generator(), 0.0).captions) == 0
    _, captions, true = pairs.draw(torch.Generator(), 1.0)
    each = SINGLES + 1
    assert len(captions) == 200 * each and all(caption in true[k // each] for k, caption in enumerate(captions))
    assert 60 < sum(" at the " in caption for caption in captions[::each]) < 140
    assert 200 < sum(len(caption.split()) == 2 for caption in captions) < 400  # of 600 single ones: "a 3", not "a red 3"
    assert not any(" at the " in caption or "," in caption for k, caption in enumerate(captions) if k % each)


# ---- the loss and its pieces -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("M, share", [(12, 0.0), (12, 0.3), (30, 0.2)])
def test_the_loss_is_a_question_about_every_pair(M, share, chunk):
    """Spelled out: -log sigmoid(x) where the caption is true, -log sigmoid(-x) elsewhere."""
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(n, 8, dtype=torch.float64), dim=1).requires_grad_() for n in (12, M))
    scale, bias = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (9.0, -2.0))
    inputs = images, texts, scale, bias
    true = (torch.rand(12, M) < share) | torch.eye(12, M, dtype=torch.bool)
    expected = 0.0
    for i in range(12):
        for j in range(M):
            x = (images[i] * texts[j]).sum() * scale + bias
            expected = expected - F.logsigmoid(x if true[i, j] else -x).squeeze() / 12
    loss = pair_loss(*inputs, true, chunk)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(*(torch.autograd.grad(x, inputs) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)
    if not share:
        torch.testing.assert_close(loss, sigmoid_loss(*(x.float() for x in inputs)).double())


def towers(dropout: float) -> SiglipTwoTower:
    torch.manual_seed(1)
    vision = VISION | {"image_size": 16, "patch_size": 8, "attention_dropout": dropout}
    text = TEXT | {"vocab_size": 40, "max_position_embeddings": 6, "projection_size": 32, "attention_dropout": dropout}
    return SiglipTwoTower(SiglipConfig(vision, text)).train()


def gradients_of(model, parts: int, batch, rank: int = 0, world_size: int = 1) -> tuple[float, list[torch.Tensor]]:
    """As the loop of the script adds them up."""
    run = SimpleNamespace(args=SimpleNamespace(grad_accum=parts), world_size=world_size, rank=rank, raw=model, model=model)
    run.device = torch.device("cpu")
    run.autocast = contextlib.nullcontext
    torch.manual_seed(5)
    total = 0.0
    part_loss = part_losses(run, *batch)
    for loss in map(part_loss, range(parts)):
        (loss / parts).backward()
        total += loss.item() / parts
    return total, [p.grad for p in model.parameters()]


@pytest.fixture
def batch():
    torch.manual_seed(2)
    true = torch.rand(12, 18) < 0.2
    ids = torch.randint(40, (18, 6)).unique(dim=0)  # in the order in which they are read, so that dropout is comparable
    return torch.randn(12, 3, 16, 16), ids, true


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_a_batch_in_pieces_has_the_gradients_of_the_whole(batch, parts):
    whole, pieces = gradients_of(towers(0.0), 1, batch), gradients_of(towers(0.0), parts, batch)
    assert pieces[0] == pytest.approx(whole[0], rel=1e-6)
    for ours, theirs in zip(pieces[1], whole[1], strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * max(1, theirs.abs().max())


def test_in_pieces_dropout_is_the_same_both_times(batch):
    """Against one graph through all pieces, each after the same seed."""
    parts, model = 3, towers(0.4)
    pixels, ids, true = batch
    found = []
    for k in range(parts):
        torch.manual_seed(5 + k)
        out = model(pixels.chunk(parts)[k], ids.chunk(parts)[k])
        found.append((out["image_embeddings"], out["text_embeddings"]))
    images, texts = (torch.cat(part) for part in zip(*found, strict=True))
    pair_loss(images, texts, model.logit_scale.exp(), model.logit_bias, true).backward()
    _, pieces = gradients_of(towers(0.4), parts, batch)
    for ours, parameter in zip(pieces, model.parameters(), strict=True):
        assert (ours - parameter.grad).abs().max() <= 1e-6 * max(1, parameter.grad.abs().max())
    without = gradients_of(towers(0.0), parts, batch)[1]
    assert any((ours - theirs).abs().max() > 1e-3 for ours, theirs in zip(pieces, without, strict=True))


@pytest.mark.parametrize("parts", [1, 3])
def test_processes_average_to_the_gradients_of_the_whole(batch, monkeypatch, parts):
    """Two of them, one after the other, each with half of the pairs and the embeddings of all; DDP averages their gradients."""
    pixels, ids, true = batch
    value, whole = gradients_of(towers(0.0), 1, batch)
    with torch.no_grad():
        known = towers(0.0)(pixels, ids)
    found = []
    for rank in range(2):
        gathered = iter([known["image_embeddings"].clone(), known["text_embeddings"].clone()])
        monkeypatch.setattr(train_siglip, "all_gather", lambda own, gathered=gathered: next(gathered))
        loss, own = gradients_of(towers(0.0), parts, (pixels.chunk(2)[rank], ids.chunk(2)[rank], true), rank, world_size=2)
        assert loss == pytest.approx(value, rel=1e-6)
        found.append(own)
    for first, second, theirs in zip(*found, whole, strict=True):
        assert ((first + second) / 2 - theirs).abs().max() <= 1e-6 * max(1, theirs.abs().max())


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_gallery():
    """Image 2 takes the caption of 0, which is true of it as well; image 1 that of 3, which is not."""
    names = [frozenset(x) for x in ("a", "b", "ca", "d")]
    logits = torch.tensor([[5.0, 0, 1, 0], [0, 1, 0, 2], [3, 0, 2, 0], [0, 0, 0, 4]])
    found = measure(Test(torch.zeros(4, 1, 2, 2), ["a", "b", "c", "d"], names), logits)
    assert found == {
        "image_to_text_recall_at_1": 0.75,
        "text_to_image_recall_at_1": 1.0,
        **{f"{way}_recall_at_{k}": 1.0 for way in ("image_to_text", "text_to_image") for k in (5, 10)},
        **{f"{way}_median_rank": 1.0 for way in ("image_to_text", "text_to_image")},
        "recall_by_chance": 5 / 16,
        "caption_among_4": 0.75,
    }


def test_the_figures_of_classes():
    prompts = ["a red 3", "a blue 3", "a red 4"]
    true = [frozenset([prompts[k], "else"]) for k in (0, 0, 1, 2)]
    logits = torch.eye(3)[[0, 1, 2, 2]]
    found = measure(Test(torch.zeros(4, 1, 2, 2), prompts, true, True, ("colour", "digit")), logits)
    assert found == {"zero_shot_accuracy": 0.5, "zero_shot_colour": 0.5, "zero_shot_digit": 0.75}


def test_it_learns(runs):
    """Here ten captions are all there is to learn: guessing would give 0.1."""
    found = train("--dataset", "digits", "--steps", 100, "--batch-size", 64, "--out", runs / "learning")
    assert found["test_zero_shot_accuracy"] > 0.3


# ---- resume ----------------------------------------------------------------------------------------------------------


VARIANTS = {
    "pieces": ["--chunk", 2, "--dropout", 0.1, "--ema", 0.9],
    "photos": ["--dataset", "llava", "--test-part", 0.2],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_and_resumed_is_uninterrupted_byte_for_byte(runs, photos, variant):
    flags = [*VARIANTS[variant], "--steps", 4, *(["--data", photos / "scenes.json"] if variant == "photos" else [])]
    whole, stopped, calls = runs / f"{variant} whole", runs / f"{variant} stopped", []
    expected = train(*flags, "--out", whole)

    def asked_in_the_second_step(progress, warmup):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return cosine_schedule(progress, warmup)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(train_siglip, "cosine_schedule", asked_in_the_second_step)
        train(*flags, "--out", stopped)
    assert ended.value.code == 128 + signal.SIGTERM and load_state(stopped)["steps_done"] == 2
    found = train(*flags, "--out", stopped, "--resume")
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    same = [key for key in expected if "second" not in key and key != "run"]
    assert len(same) > 3 and all(found[key] == expected[key] for key in same)


# ---- what a run leaves -----------------------------------------------------------------------------------------------


def test_a_finished_run_leaves_what_is_promised(runs):
    """The only run here that draws."""
    run = runs / "promised"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_siglip, "draw", draw)
        patch.setattr(caption_pairs, "GALLERY", 6)
        last = train("--steps", 2, "--out", run)
    left = {path.name for path in run.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "state.pt"} <= left
    assert {"metrics.jsonl", "result.json", "curves.png", "samples.png"} <= left and not [n for n in left if n[0] == "."]
    assert json.loads((run / "result.json").read_text()) == last
    assert {"text_to_image_recall_at_1", "image_to_text_median_rank", "recall_by_chance", "caption_among_6"} <= last.keys()
    assert {"test_zero_shot_accuracy", "compositional_zero_shot_digit", "parameters", "seed"} <= last.keys()


def test_a_sheet_of_classes_says_which_is_true(tmp_path, monkeypatch):
    drawn, sheet = [], train_siglip.figures.answer_sheet
    monkeypatch.setattr(
        train_siglip.figures, "answer_sheet", lambda *args, **more: drawn.append((args, more)) or sheet(*args, **more)
    )
    true = [frozenset([name]) for name in ("a 1", "a 0", "a 1")]
    test = Test(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), ["a 0", "a 1"], true, classes=True)
    draw(tmp_path, test, torch.tensor([[0.0, 3], [-1, 2], [1, 0]]), [])
    [((_, likely, said, truths, path, _), more)] = drawn
    assert (likely, said, truths) == (["95%", "88%", "73%"], ["a 1", "a 1", "a 0"], ["a 1", "a 0", "a 1"])
    assert more["good"] == [True, False, False] and Image.open(path).format == "PNG"


def test_transformers_opens_the_run_and_says_the_same(finished, tmp_path):
    """Tokenizer, pixels, logits; and its pipeline, which takes it for granted that texts have 64 tokens."""
    transformers = pytest.importorskip("transformers")
    run, _ = finished
    photo, captions = tmp_path / "a.png", ["a red 3", "an orange 8 at the top left", "Ein blaues Pferd"]
    Image.fromarray(make_scenes("test", 1).images[0].permute(1, 2, 0).numpy()).resize((90, 70)).save(photo)
    tokenizer, theirs = (getattr(transformers, f"Auto{kind}").from_pretrained(run) for kind in ("Tokenizer", "Model"))
    assert type(theirs).__name__ == "SiglipModel" and tokenizer.model_max_length == 64
    pixels = transformers.AutoImageProcessor.from_pretrained(run)(Image.open(photo), return_tensors="pt")
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    ours = generate.zero_shot(generate.parse_args([str(run), "--image", str(photo), "--zero-shot", *captions]))
    with torch.no_grad():
        scores = theirs.eval()(**ids, **pixels).logits_per_image.sigmoid()
    torch.testing.assert_close(torch.tensor(ours), scores, atol=1e-5, rtol=1e-4)
    pipe = transformers.pipeline("zero-shot-image-classification", model=str(run), device="cpu")
    scores = {row["label"]: row["score"] for row in pipe(str(photo), captions, hypothesis_template="{}")}
    assert ours[0] == pytest.approx([scores[caption] for caption in captions], abs=1e-5)


def test_the_tower_is_train_vlms_with_its_pixels(finished):
    run, _ = finished
    model, processor = train_vlm.build(train_vlm.parse_args(["--vision", str(run)]))
    towers, pixels = from_pretrained(run), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.vision_features(pixels), towers.vision_model(pixels))
    pairs = ScenePairs(parse_args([]), SimpleNamespace(rank=0, world_size=1))
    assert processor.image_size == (64, 64)
    assert processor.image_settings.image_mean == pytest.approx(pairs.settings.image_mean)
    assert processor.image_settings.image_std == pytest.approx(pairs.settings.image_std)


# ---- your own images -----------------------------------------------------------------------------------------------


def rows_of(photos, *flags):
    args = parse_args([*COMMON, "--dataset", "llava", "--data", str(photos / "scenes.json"), *flags])
    alone = {"rank": 0, "world_size": 1, "is_main": False, "print": print, "all": bool, "main_first": contextlib.nullcontext}
    return RowPairs(args, SimpleNamespace(args=args, **alone))


def test_rows_of_one_image_share_their_captions(photos):
    pairs = rows_of(photos)
    both = {row.images[0].name: pairs.true[row.images[0]] for row in (*pairs.rows, *pairs.test)}
    assert sorted(map(len, both.values())) == [1] * 28 + [2]


def test_an_image_that_cannot_be_read_is_replaced(photos):
    pairs = rows_of(photos)
    first = [pairs.rows[i].images[0] for i in next(rows_of(photos).order).tolist()]
    pairs.images.unreadable = dict.fromkeys(first[1:], "damaged")
    pixels, captions, true = pairs.draw(torch.Generator(), 0.0)
    assert pixels.shape == (8, 3, 64, 64) and len(set(captions)) == 1 and captions[0] in true[-1]
    pairs.images.unreadable = dict.fromkeys(pairs.true, "damaged")
    with pytest.raises(ValueError, match="none of its images can be read"):
        pairs.draw(torch.Generator(), 0.0)


def test_other_rows_than_before_are_refused(photos):
    state = rows_of(photos).state_dict()
    with pytest.raises(ValueError, match="holds other rows now"):
        rows_of(photos, "--seed", "1", "--test-part", "0.11").load_state_dict(state)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset", "llava"], "needs --data FILE.json"),
        (["--dataset", "llava", "--data", "nowhere.json"], "nowhere.json does not exist"),
        (["--data", "x.json"], "scenes are made on the fly and take no --data"),
        (["--dataset", "folder"], "the data set 'folder' needs --data"),
        (["--dataset", "folder", "--data", "nowhere"], "nowhere does not exist"),
        (["--dataset", "mnist", "--data", "FOLDER"], "holds no train-images-idx3-ubyte.gz"),
        (["--chunk", "3"], "--chunk 3: choose a part of --batch-size 8"),
        (["--chunk", "4", "--grad-accum", "2"], "no --grad-accum"),
        (["--caption", "a photo"], "must hold {} once"),
        (["--image-size", "64", "--patch-size", "80"], "64x64 image"),
        (["--tokens", "0"], "'0' must be a whole number"),
        (["--tokens", "100000"], "--tokens 100000: the longest caption has"),  # a step of it would run for a quarter hour
        (["--dropout", "1.5"], "below 1"),
        (["--dtype", "fp16"], "fp16 needs a GPU"),
        (["--resume", "--out", "FOLDER"], "no state.pt to resume from"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, flags, message):
    flags = [str(tmp_path) if flag == "FOLDER" else flag for flag in flags]
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, train_siglip.main, *COMMON, "--steps", 1, "--out", tmp_path / "run", *flags)


def test_another_runs_settings_are_refused(finished, capsys):
    run, _ = finished
    flags = [*COMMON, *SAME, "--out", run, "--resume", "--muon-lr", 0.5]
    assert "--muon-lr is 0.5, the run in" in refused(capsys, train_siglip.main, *flags)
