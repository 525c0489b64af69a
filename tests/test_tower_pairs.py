"""Laws of train_siglip.py --vision: features stand for pixels; a frozen tower stays what it was; the run folder is read by all
that reads two towers or one; of a row with several captions one is drawn at a time, and all are true."""

import json

import pytest
import torch
from PIL import Image

import finetune_vlm
import generate
from calls import learned, printed, refused, stop_and_resume, weights
from data.features import FrozenFeatures, keep_for_run
from data.image_settings import ImageSettings
from data.llava import LlavaRows
from extras import caption_pairs, train_siglip
from extras.caption_pairs import Test
from extras.tower_pairs import TowerPair, tower_pair
from extras.train_siglip import best_ranks, groups_of, measure, pair_loss
from lib.checkpoint import from_pretrained, save_pretrained
from lib.image_settings import read_image_settings, write_image_settings
from lib.vlm_parts import find_part
from siglip import SiglipModel, SiglipTextConfig, SiglipVisionConfig
from toys import close, shaken
from vit_scratch import ViTConfig, ViTModel

Test.__test__ = False  # no test of pytest's
SIZES = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WANTS = ImageSettings((16, 16), image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.2), size={"shortest_edge": 18}, fit="crop")
COLORS = "red green blue yellow white black orange brown grey pink".split()
CAPTIONS = ("a {} square", "a square that is {}", "all is {}")
COMMON = "--dataset llava --size tiny --device cpu --workers 1 --batch-size 4 --steps 4 --test-part 0.3".split()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A ViT and a SigLIP with its own head, and rows of three captions each."""
    root = tmp_path_factory.mktemp("pairs")
    torch.manual_seed(0)
    found = {
        "vit": ViTModel(ViTConfig(**SIZES, num_labels=0)),
        "siglip": SiglipModel(SiglipVisionConfig(**SIZES, intermediate_size=64)),
    }
    for name, tower in found.items():
        save_pretrained(shaken(tower), root / name)
        write_image_settings(root / name, WANTS)
    (root / "images").mkdir()
    rows = []
    for k, color in enumerate(COLORS):
        Image.new("RGB", (24, 20), color).save(root / "images" / f"{k}.png")
        rows.append({"image": f"{k}.png", "captions": [caption.format(color) for caption in CAPTIONS]})
    (root / "rows.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(autouse=True, scope="module")
def quick():
    """No figures are drawn; quick evaluations take two images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_siglip, "draw", lambda *args: None)
        patch.setattr(caption_pairs, "GALLERY", 2)
        yield


def flags_of(folders, *flags) -> list[str]:
    return [*COMMON, "--data", str(folders / "rows.json"), "--images", str(folders / "images"), *map(str, flags)]


def train(folders, *flags) -> dict:
    """The script's last line."""
    return json.loads(printed(train_siglip.main, *flags_of(folders, *flags))[-1])


@pytest.fixture(scope="module", params=["vit", "siglip"])
def finished(request, folders):
    """A tower's folder, and a run on it."""
    run = folders / f"run {request.param}"
    return folders / request.param, run, train(folders, "--vision", folders / request.param, "--out", run)


def towers(folders, kind: str) -> TowerPair:
    torch.manual_seed(1)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
    text = SiglipTextConfig(**text, max_position_embeddings=6, projection_size=32)
    return tower_pair(find_part(folders / kind, "vision"), text)


def pair_of(folders, *flags):
    """(pairs, model) as the script makes them."""
    args = train_siglip.parse_args(flags_of(folders, *flags))
    run = train_siglip.Run(args)
    tower, settings = train_siglip.trained_tower(args)
    pairs = caption_pairs.RowPairs(args, run, settings)
    return pairs, train_siglip.build(args, pairs, tower)[0], args, run


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "siglip"])
def test_features_stand_for_pixels(folders, kind):
    """In embeddings, in the loss, and in the gradients of all that is not the tower."""
    model, pixels, ids = towers(folders, kind), torch.rand(5, 3, 16, 16), torch.randint(40, (5, 6))
    model.vision_tower.requires_grad_(False)
    features, found = model.vision_features(pixels), []
    close(features, find_part(folders / kind, "vision").features(pixels))
    for images in (pixels, features):
        out = model(images, ids)
        embeddings = out["image_embeddings"], out["text_embeddings"]
        loss = pair_loss(*embeddings, model.logit_scale.exp(), model.logit_bias, torch.eye(5).bool())
        trained = [p for p in model.parameters() if p.requires_grad]
        found.append((out["image_embeddings"], loss, *torch.autograd.grad(loss, trained)))
    for by_pixels, by_features in zip(*found, strict=True):
        close(by_pixels, by_features)


def test_only_a_tower_that_trains_drops_anything(folders):
    model, x = towers(folders, "siglip"), torch.rand(2, 3, 16, 16)
    model.vision_tower.config.attention_dropout = 0.5
    torch.manual_seed(0)
    assert not torch.equal(model.train().vision_features(x), model.vision_features(x))
    model.vision_tower.requires_grad_(False)
    assert torch.equal(model.train().vision_features(x), model.vision_features(x))
    assert not model.vision_features(x).requires_grad and model.vision_model.head.training


def test_a_tower_that_trains_has_its_own_learning_rate_and_no_muon(folders):
    _, model, args, _ = pair_of(folders, "--vision", folders / "vit", "--freeze", "none", "--out", folders / "groups")
    tower = {id(p) for p in model.vision_tower.parameters()}
    groups = groups_of(model, args)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model.parameters()}
    for group in groups:
        inside = {id(p) in tower for p in group["params"]}
        assert len(inside) == 1, "one group for both"
        assert not inside.pop() or (group["lr"], group["muon"]) == (1e-4, False)
    assert any(group["muon"] for group in groups)


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_frozen_tower_stays_bit_for_bit_and_the_rest_learns(finished):
    source, run, found = finished
    before, after = find_part(source, "vision").state_dict(), find_part(run, "vision").state_dict()
    assert after and all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    model = from_pretrained(run)
    tower = {name for name, _ in model.named_parameters() if name.startswith("vision_model.tower.")}
    assert found["parameters"] == sum(p.numel() for name, p in model.named_parameters() if name not in tower)
    trained = find_part(source, "vision")
    torch.manual_seed(0)  # as the run began
    start = dict(tower_pair(trained, model.config.text_config).named_parameters())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    matrices = {name for name, p in start.items() if p.ndim > 1} - tower
    assert len(matrices) > 10 and matrices <= changed
    assert not changed & tower


def test_a_tower_that_is_not_frozen_learns(folders):
    source, run = folders / "vit", folders / "tuned"
    train(folders, "--vision", source, "--freeze", "none", "--out", run)
    before, after = find_part(source, "vision").state_dict(), find_part(run, "vision").state_dict()
    assert not torch.equal(before["blocks.0.attn.qkv.weight"], after["blocks.0.attn.qkv.weight"])


def test_the_run_is_read_as_two_towers_and_as_one(finished, folders):
    """What was saved has the embeddings of what was trained, images are prepared as the tower wants them, generate.py
    compares, and finetune_vlm.py takes the tower."""
    source, run, _ = finished
    model, pixels, photo = from_pretrained(run), torch.rand(2, 3, 16, 16), str(folders / "images" / "3.png")
    again = run / "again"
    assert save_pretrained(model, again) == "tower_pair_scratch"
    close(from_pretrained(again).image_embeddings(pixels), model.image_embeddings(pixels), 0)
    for kind in ("published", "siglip_scratch"):
        with pytest.raises(ValueError, match="needs SigLIP's own image tower and head"):
            save_pretrained(model, again, layout=kind)
    for found in (find_part(run, "vision"), find_part(run, "vision", 24)):
        size = found.image_size[0]
        x = torch.rand(1, 3, size, size)
        close(found.features(x), find_part(source, "vision", size).features(x))
        close(from_pretrained(run, image_size=size).vision_features(x), found.features(x))
    settings = read_image_settings(run)
    assert ImageSettings(**settings) == WANTS
    [[yes, no]] = generate.zero_shot(generate.parse_args([str(run), "--image", photo, "--zero-shot", "a red square", "x"]))
    assert 0 < yes < 1 and yes != no
    args = finetune_vlm.parse_args(["--data", "x", "--size", "tiny", "--vision", str(run)])
    vlm, processor = finetune_vlm.build(args, ["a red square"] * 9)
    close(vlm.vision_features(pixels), model.vision_features(pixels))
    assert processor.image_settings == WANTS


def test_another_kind_of_tower_in_the_file_is_one_line(finished, tmp_path):
    _, run, _ = finished
    save_pretrained(from_pretrained(run), tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    said["vision_config"]["class"] = "Unknown"
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="vision_config has class 'Unknown': known are SiglipVisionConfig, ViTConfig"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("cached", [False, True])
def test_stopped_and_resumed_is_uninterrupted_byte_for_byte(folders, cached, tmp_path):
    """With captions that are drawn, by features in memory and in a file."""
    flags = ["--vision", folders / "vit", "--eval-every", 2, *["--cache-features"] * cached]
    train(folders, *flags, "--out", tmp_path / "whole")
    stop_and_resume(lambda *more: train(folders, *flags, "--out", tmp_path / "stopped", *more), [("term", 1), ("term", 3)])
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    assert learned(tmp_path / "stopped") == learned(tmp_path / "whole")
    assert (tmp_path / "whole" / "features.npy").exists() == cached


def test_each_image_goes_through_a_frozen_tower_once(folders, monkeypatch, tmp_path):
    """Seven training images by way of the file, three test images in the first evaluation that asks for them."""
    seen, encode = [], FrozenFeatures.encode
    monkeypatch.setattr(FrozenFeatures, "encode", lambda self, pixels: seen.append(len(pixels)) or encode(self, pixels))
    train(folders, "--vision", folders / "vit", "--eval-every", 1, "--cache-features", "--out", tmp_path)
    assert seen == [1] * 10


@pytest.mark.parametrize("flags, said", [((), 1), (("--cache-features",), 0)])
def test_features_that_memory_cannot_hold_are_said(folders, monkeypatch, tmp_path, flags, said):
    """finetune_vlm.py said so, this script made most of them anew in each epoch without a word."""
    inner = FrozenFeatures.__init__

    def small(self, model, images, blind=False, most_bytes=2**10):
        inner(self, model, images, blind, most_bytes)

    monkeypatch.setattr(FrozenFeatures, "__init__", small)
    lines = printed(train_siglip.main, *flags_of(folders, "--vision", folders / "vit", *flags, "--out", tmp_path))
    assert sum("--cache-features keeps them in a file" in line for line in lines) == said


def test_both_scripts_read_the_same_file_of_features(folders, monkeypatch, tmp_path):
    file = tmp_path / "features.npy"
    common = ["--vision", folders / "vit", "--vision-layers", 1, "--image-size", 24, "--cache-features", file]
    train(folders, *common, "--out", tmp_path / "towers")
    monkeypatch.setattr(FrozenFeatures, "_fill", lambda *args: pytest.fail("the file was made anew"))
    args = finetune_vlm.parse_args(flags_of(folders, *common, "--out", tmp_path / "vlm")[2:])
    run = finetune_vlm.Run(args)
    rows, _ = finetune_vlm.load_rows(args, run)
    model, processor = finetune_vlm.build(args, ["a red square"] * 9)
    batches = finetune_vlm.conversations(args, run, rows, model, processor, {})
    keep_for_run(batches.features, rows, args, run)
    path = rows[0].images[0]
    close(batches.features[path], model.vision_features(batches.images[path]))


# ---- captions --------------------------------------------------------------------------------------------------------


def test_one_of_a_rows_captions_is_drawn_and_all_are_true(folders):
    pairs, *_ = pair_of(folders, "--vision", folders / "vit", "--out", folders / "drawn")
    drawn, where = {}, pairs.state_dict()
    for step in range(20):
        pairs.load_state_dict(where)  # the same rows each time
        batch = pairs.draw(torch.Generator().manual_seed(step), 0.0)
        assert all(caption in true and len(true) == 3 for caption, true in zip(batch.captions, batch.true, strict=True))
        drawn[step] = batch.captions
    assert {len({captions[k] for captions in drawn.values()}) for k in range(4)} == {3}
    pairs.load_state_dict(where)
    assert pairs.draw(torch.Generator().manual_seed(7), 0.5).captions == drawn[7]
    assert len(pairs.texts()) == 3 * len(pairs.rows)


@pytest.mark.parametrize(
    "row, captions",
    [
        ({"captions": ["a  cat", "cats", "a cat"]}, ["a cat", "cats"]),
        ({"caption": "a cat"}, ["a cat"]),
        ({"texts": [{"user": "What is it?", "assistant": "a cat"}, {"user": "Alive?", "assistant": "yes"}]}, ["a cat"]),
    ],
)
def test_which_answers_are_captions(row, captions, folders, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "0.png", **row}]))
    rows = LlavaRows.read(tmp_path / "rows.json", folders / "images")
    assert caption_pairs.captions_of(rows[0]) == captions


def test_the_gallery_has_all_captions_of_all_test_images(folders):
    pairs, *_ = pair_of(folders, "--vision", folders / "vit", "--out", folders / "gallery")
    [(name, whole)], [(few, first)] = pairs.tests().items(), pairs.tests(quick=True).items()
    assert (name, few) == ("", "first_2_") and len(whole.images) == 3 and whole.starts == [0, 3, 6]
    assert len(whole.captions) == 9 and [whole.own(i) for i in range(3)] == whole.captions[::3]
    assert first.captions == whole.captions[:6] and torch.equal(first.images, whole.images[:2])


# ---- figures ---------------------------------------------------------------------------------------------------------


def ranks_by_sorting(logits, true):
    """Of each row: sorted by logit, of equal ones first those that are not true; where the first true one stands."""
    found = []
    for row, good in zip(logits.tolist(), true.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda j: (-row[j], good[j]))
        found.append(1 + [good[j] for j in order].index(True))
    return found


def test_recall_and_median_rank_are_those_of_a_sorted_list():
    """Five captions an image, few different logits, so that many tie."""
    generator = torch.Generator().manual_seed(0)
    N, each = 12, 5
    captions = [f"caption {k} of {i}" for i in range(N) for k in range(each)]
    true = [frozenset(captions[each * i : each * (i + 1)]) for i in range(N)]
    logits = torch.randint(8, (N, N * each), generator=generator).float()
    test = Test(torch.zeros(N, 1, 2, 2), captions, true, starts=range(0, N * each, each))
    found, own = measure(test, logits), torch.eye(N).bool().repeat_interleave(each, dim=1)
    for way, table, good in (("image_to_text", logits, own), ("text_to_image", logits.T, own.T)):
        ranks = sorted(ranks_by_sorting(table, good))
        assert best_ranks(table, good).sort().values.tolist() == ranks
        for k in (1, 5, 10):
            assert found[f"{way}_recall_at_{k}"] == pytest.approx(sum(rank <= k for rank in ranks) / len(ranks))
        middle = len(ranks) // 2
        assert found[f"{way}_median_rank"] == (ranks[middle - 1] + ranks[middle]) / 2
    assert found["recall_by_chance"] == pytest.approx(1 / N)
    nothing = measure(test, torch.full_like(logits, torch.nan))
    assert nothing["image_to_text_recall_at_10"] == nothing["text_to_image_recall_at_10"] == 0


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset", "scenes", "--vision", "VIT"], "--vision goes with --dataset llava"),
        (["--vision", "VIT", "--patch-size", "4"], "--patch-size cannot be chosen with --vision"),
        (["--vision", "VIT", "--image-size", "18"], "--image-size 18: a 18x18 image cannot be cut into 4x4 patches"),
        (["--vision", "VIT", "--vision-layers", "3"], "--vision-layers 3: the tower has 2"),
        (["--vision", "nowhere"], "nowhere"),
        (["--vision-layers", "1"], "--vision-layers is of --vision"),
        (["--freeze", "vision"], "--freeze is of --vision"),
        (["--lr-pretrained", "1e-3"], "--lr-pretrained is of --vision"),
        (["--cache-features"], "--cache-features is of --vision"),
        (["--vision", "VIT", "--lr-pretrained", "1e-3"], "--lr-pretrained is of a tower that trains: add --freeze none"),
        (["--vision", "VIT", "--freeze", "none", "--cache-features"], "leave out --freeze none"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folders, tmp_path, capsys, flags, message):
    flags = [str(folders / "vit") if flag == "VIT" else flag for flag in flags]
    assert message in refused(capsys, train_siglip.main, *flags_of(folders, "--out", tmp_path / "run", *flags))
