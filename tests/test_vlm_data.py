"""Laws of the batches of data/ and of the losses of the recipes' first stages: every usable row once an epoch, the right image
beside each question, the same batches after a stop; kept features are those of these weights and these images."""

import json
import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data import features as data_features
from data.batches import IGNORE, with_shares
from data.common import CommonAnswers, common_questions, questions_of
from data.features import FrozenFeatures
from data.image_cache import ImageCache
from data.image_settings import ImageSettings
from data.llava import LlavaRows, isolated_turns
from data.llava_batches import LlavaBatches
from data.packing import AttentionBlocks, ids_and_labels
from data.scene_batches import PatchLabels, SceneBatches
from data.scenes import COLOURS, HELD_OUT, corpus, make_scenes
from extras.cross_attention import CrossAttentionConfig, CrossAttentionVLM
from finetune_vlm import common_loss
from lib.tokenizer import BPETokenizer
from model import MLLAMAConfig, MllamaForConditionalGeneration
from processing_mllama import IDEFICS3_AROUND, MllamaImageProcessor
from train_vlm import LABEL_WEIGHTS, LABELS, scene_loss

EYES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
WORDS = {"hidden_size": 48, "n_heads": 4, "n_kv_groups": 2, "n_layers": 2, "hidden_dim": 64, "initializer_range": 0.2}


def same(one, two) -> bool:
    """Of what stands in a batch: tensors, and blocks of them."""
    parts = [list(vars(each).values()) if isinstance(each, AttentionBlocks) else [each] for each in (one, two)]
    return all(map(torch.equal, *parts))


def make_processor(fusion="early", size=32):
    tokenizer = BPETokenizer.train(corpus(), 420, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tokenizer.chat_template = "chatml"
    places, around = (4, IDEFICS3_AROUND) if fusion == "early" else (1, ("", ""))
    return MllamaImageProcessor(tokenizer, places, size, add_location_tokens=False, around_image=around)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def make_model(processor, fusion="early", **eyes):
    torch.manual_seed(0)
    words = WORDS | {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 400, "tie_word_embeddings": True}
    join = {"image_token_id": processor.image_token_id, "pixel_shuffle": 2 if eyes else 1}
    if fusion == "cross":
        model = CrossAttentionVLM(CrossAttentionConfig(EYES | eyes, words, cross_every=1, **join)).eval()
    else:
        model = MllamaForConditionalGeneration(MLLAMAConfig(EYES | eyes, words, **join)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # closed gates would hide what leaks through them
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(1.0)
    return model


def about(names, *said) -> dict:
    """A row of the file: images by name, then a question, an answer, and so on; the images stand before the first."""
    texts = ["<image>" * len(names) + ("\n" if names else "") + said[0], *said[1:]]
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"image": [f"{name}.png" for name in names], "conversations": turns}


def write(folder: Path, rows: list[dict]) -> LlavaRows:
    """A file of these rows and twelve images 0.png to 11.png, each of another colour."""
    for k in range(12):
        Image.new("RGB", (20, 16), (20 * k, 255 - 20 * k, 90)).save(folder / f"{k}.png")
    (folder / "data.json").write_text(json.dumps(rows))
    return LlavaRows.read(folder / "data.json", folder)


def numbered(folder: Path, count: int = 12) -> LlavaRows:
    """Rows whose answers are their numbers, from 0."""
    return write(folder, [about([k % 12], "Which one?", f"number {k}") for k in range(count)])


def batches_of(rows, processor, batch_size=3, length=200, seed=0, **options) -> LlavaBatches:
    return LlavaBatches(rows, processor, ImageCache(32), batch_size, seed, length, **options)


def answers_in(processor, batch) -> list[str]:
    """What is to be learned from a batch, one text for each stretch of labels."""
    found = []
    for row in batch["labels"].tolist():
        stretch = []
        for label in [*row, -100]:
            if label != -100:
                stretch.append(label)
            elif stretch:
                found.append(processor.tokenizer.decode(stretch, skip_special_tokens=True).strip())
                stretch = []
    return found


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 3])
def test_each_row_comes_once_an_epoch(tmp_path, processor, parts):
    batches, everything = batches_of(numbered(tmp_path), processor, grad_accum=parts), sorted(f"number {k}" for k in range(12))
    assert len(batches) == 4
    orders = []
    for epoch in range(2):
        assert batches.fraction == epoch
        found = [answers_in(processor, part) for _ in range(4) for part in next(batches)]
        orders.append(sum(found, []))
        assert sorted(orders[-1]) == everything and all(len(part) == 3 // parts for part in found)
    assert orders[0] != orders[1]


def test_the_parts_of_a_batch_together_hold_its_rows(tmp_path, processor):
    rows = numbered(tmp_path)
    whole, parted = (batches_of(rows, processor, 4, grad_accum=parts) for parts in (1, 2))
    for _ in range(3):
        (one,), two = next(whole), next(parted)
        assert len(two) == 2 and sorted(answers_in(processor, one)) == sorted(sum((answers_in(processor, p) for p in two), []))


def test_ranks_share_an_epoch(tmp_path, processor):
    rows = numbered(tmp_path)
    found = []
    for rank in (0, 1):
        batches = batches_of(rows, processor, 2, rank=rank, world_size=2)
        found += [text for _ in range(len(batches)) for text in answers_in(processor, next(batches)[0])]
    assert sorted(found) == sorted(f"number {k}" for k in range(12))


@pytest.mark.parametrize("batch_size, parts", [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_rows_that_cannot_be_used_are_left_out_and_counted_and_no_other(tmp_path, processor, batch_size, parts):
    """A vanished image, a damaged one and a row that is too long, after the file was found to be in order."""
    raw = [about([k], "Which one?", f"number {k}") for k in range(12)]
    raw[5] = about([5], "Which one? " * 60, "number 5")
    rows = write(tmp_path, raw)
    (tmp_path / "2.png").unlink()
    (tmp_path / "7.png").write_bytes((tmp_path / "7.png").read_bytes()[:50])
    batches, found = batches_of(rows, processor, batch_size, grad_accum=parts), []
    while batches.order.epoch == 0:  # the last call may go on into the next epoch
        found += [text for part in next(batches) for text in answers_in(processor, part)]
    assert sorted(found[:9]) == sorted(f"number {k}" for k in range(12) if k not in (2, 5, 7))
    assert {path.name for path in batches.images.unreadable} == {"2.png", "7.png"}
    assert all(reason for reason in batches.images.unreadable.values()) and batches.too_long == {6}


def test_an_epoch_without_a_usable_batch_says_why(tmp_path, processor):
    rows = numbered(tmp_path)
    for k in range(5):
        (tmp_path / f"{k}.png").unlink()
    batches = batches_of(rows, processor, 4, length=3)
    with pytest.raises(ValueError, match="no batch is left; .* 12 rows are over 3 tokens") as error:
        next(batches)
    assert "\n" not in str(error.value)


def test_a_conversation_is_learned_whole_or_each_question_alone(tmp_path, processor):
    (row,) = write(tmp_path, [about([0], "Which one?", "number 0", "Is there a 5?", "no", "How many?", "3")])
    (whole,) = next(batches_of([row], processor, 1))
    assert answers_in(processor, whole) == ["number 0", "no", "3"]
    assert torch.equal(whole["attention_mask"][0, 0], torch.ones_like(whole["attention_mask"][0, 0]).tril())
    sample = batches_of([row], processor, 1, isolated=True).sample(row)
    alone = [ids_and_labels(processor, turns, 1) for turns in isolated_turns(row.messages)]
    assert [(sample.prefix[0] + ids, sample.prefix[1] + labels) for ids, labels in sample.continuations] == alone


@pytest.mark.parametrize("isolated", [False, True])
def test_batches_go_on_where_they_stopped(tmp_path, processor, isolated):
    """Also over the end of an epoch, and where a batch has been passed over."""
    rows = numbered(tmp_path)
    for k in (1, 4, 6, 9):
        (tmp_path / f"{k}.png").unlink()
    options = {"isolated": isolated, "grad_accum": 2, "seed": 3}
    straight = batches_of(rows, processor, 4, **options)
    for stop in range(5):
        state = json.loads(json.dumps(straight.state_dict()))  # as it comes back from a file
        resumed = batches_of(rows, processor, 4, **options)
        resumed.load_state_dict(state)
        assert resumed.fraction == straight.fraction
        for one, two in zip(next(straight), next(resumed), strict=True):
            assert one.keys() == two.keys() and all(same(one[key], two[key]) for key in one), stop


# ---- images beside their questions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["early", "cross"])
@pytest.mark.parametrize("frozen", [False, True])
@torch.no_grad()
def test_several_images_a_row_arrive_at_their_places_after_packing(tmp_path, fusion, frozen):
    """The logits of each answer are those of its row alone. Packing puts the longest row first, so order changes."""
    processor = make_processor(fusion)
    model = make_model(processor, fusion)
    rows = write(tmp_path, [
        about([3], "Which one?", "number 0"),
        about([], "Is there a picture?", "number 1"),
        about([5, 1], "What is left of the red 7, and what is above the blue 3?", "number 2"),
        about([2], "How many digits are there? Name the colour of the 7.", "number 3", "And?", "number 4"),
        about([1, 5, 4], "Which?", "number 5"),
    ])  # fmt: skip
    batches = batches_of(rows, processor, 5, length=150)
    batches.features = FrozenFeatures(model, batches.images) if frozen else None
    (batch,) = next(batches)
    assert ("vision_features" in batch) == frozen and len(batch["input_ids"]) < len(rows)
    labels = batch.pop("labels")
    logits = model(**batch)["logits"]
    for row in rows:
        alone = processor.conversation(row.messages, [str(path) for path in row.images] or None)
        truth = alone.pop("labels")[0]
        n = int((truth != -100).nonzero()[-1]) + 1
        expected, truth = model(**alone)["logits"][0], truth[:n]
        places = [(b, t) for b, given in enumerate(labels) for t in range(len(given)) if torch.equal(given[t : t + n], truth)]
        ((b, t),) = places
        answers = (truth[1:] != -100).nonzero()[:, 0]
        torch.testing.assert_close(logits[b, t + answers], expected[answers], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("isolated", [False, True])
def test_blind_batches_say_the_same_and_show_nothing(tmp_path, processor, isolated):
    rows = numbered(tmp_path)
    (seeing,), (blind,) = (next(batches_of(rows, processor, blind=blind, isolated=isolated)) for blind in (False, True))
    assert not blind["pixel_values"].any() and blind["pixel_values"].shape == seeing["pixel_values"].shape
    assert all(same(blind[key], seeing[key]) for key in seeing.keys() - {"pixel_values"})


# ---- features that are kept --------------------------------------------------------------------------------------------


@pytest.fixture
def looks(monkeypatch):
    """How many images have gone through the tower."""
    seen, inner = [], FrozenFeatures.encode
    monkeypatch.setattr(FrozenFeatures, "encode", lambda self, pixels: seen.append(1) or inner(self, pixels))
    return seen


def kept(model, file, paths, **settings) -> FrozenFeatures:
    features = FrozenFeatures(model, ImageCache(ImageSettings(32, **settings)))
    features.keep(file, paths)
    return features


@pytest.fixture
def image_files(tmp_path):
    return [path for row in numbered(tmp_path) for path in row.images]


def test_kept_features_are_those_that_are_looked_at(tmp_path, processor, image_files, looks):
    """To the last bit; an image that cannot be read has none, and one that was not kept is looked at."""
    model = make_model(processor)
    image_files[3].unlink()
    first = kept(model, tmp_path / "f.npy", image_files[:10] + image_files[:2])
    assert len(looks) == 9 and first[image_files[3]] is None
    looks.clear()
    again, fresh = kept(model, tmp_path / "f.npy", image_files[:10]), FrozenFeatures(model, ImageCache(32))
    for features in (first, again):
        assert all(torch.equal(features[path], fresh[path]) for path in image_files[:10] if path != image_files[3])
    assert len(looks) == 9  # fresh ones, and they stay in memory
    looks.clear()
    assert again[image_files[11]].shape == again[image_files[0]].shape and len(looks) == 1 and again[image_files[3]] is None


def new_weights(model, image_files):
    model.vision_tower.vision_model.encoder.layers[0].mlp.fc1.bias.data[0] += 1
    return {}


def new_image(model, image_files):
    Image.new("RGB", (20, 16), "white").save(image_files[0])
    return {}


CHANGES = {  # and how many of twelve images are made anew
    "weights": (new_weights, 12),
    "the scale of pixels": (lambda model, image_files: {"image_mean": (0.1, 0.2, 0.3)}, 12),
    "an image": (new_image, 1),
    "nothing": (lambda model, image_files: {}, 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_made_of_something_else_is_made_anew(tmp_path, processor, image_files, looks, change):
    model, (make, count) = make_model(processor), CHANGES[change]
    kept(model, tmp_path / "f.npy", image_files)
    looks.clear()
    settings = make(model, image_files)
    features = kept(model, tmp_path / "f.npy", image_files, **settings)
    assert len(looks) == count and len(image_files) == 12
    assert_as_fresh(features, model, image_files, **settings)
    assert not torch.equal(features[image_files[0]], features[image_files[1]])


def assert_as_fresh(features, model, image_files, **settings):
    fresh = FrozenFeatures(model, ImageCache(ImageSettings(32, **settings)))
    assert all(torch.equal(features[path], fresh[path]) for path in image_files)


def test_the_images_of_several_data_sets_share_a_file(tmp_path, processor, image_files, looks):
    """A run on 300 of 6,000 photos, with the same --cache-features, threw those of the others away."""
    model, file = make_model(processor), tmp_path / "f.npy"
    for part, new in ((slice(4, 9), 5), (slice(0, 6), 4), (slice(5, 8), 0), (slice(3, 11), 2)):
        kept(model, file, image_files[part])
        assert len(looks) == new
        looks.clear()
    assert_as_fresh(kept(model, file, image_files), model, image_files)


def test_a_stop_keeps_what_was_made(tmp_path, processor, image_files, looks, monkeypatch):
    """A signal in those sixteen minutes was heard after them, and a kill lost them."""
    monkeypatch.setattr(data_features, "AT_ONCE", 3)
    model, file, asked = make_model(processor), tmp_path / "f.npy", iter([False, False, False, True])
    features = FrozenFeatures(model, ImageCache(32))
    features.keep(file, image_files, stopped=lambda: next(asked))
    assert len(looks) == 6
    looks.clear()
    assert torch.equal(features[image_files[0]], FrozenFeatures(model, ImageCache(32))[image_files[0]])
    looks.clear()
    again = kept(model, file, image_files)
    assert len(looks) == 6
    assert_as_fresh(again, model, image_files)


BESIDE = {"made_by": "?", "images": {"x.png": [1, 2, 1]}}


@pytest.mark.parametrize(
    "held, about, words",
    [
        (b"[1, 2]", None, "has no f.npy.json beside it"),  # --cache-features train.json put features in its place
        (None, [1], "holds a JSON list"),
        (None, {}, "does not describe a file of features"),
        (b"", {"made_by": "?"}, "does not describe"),
        (b"", {**BESIDE, "images": [1]}, "does not describe"),
        (b"", {**BESIDE, "images": {"x.png": [1]}}, "does not describe"),
        (b"", {**BESIDE, "images": {"x.png": [1, 2, "1"]}}, "does not describe"),
        (b"", "WHOLE", "is damaged"),  # an EOFError's traceback
        (b"\0" * 3000, "WHOLE", "is damaged: remove it"),  # numpy advised to unpickle it
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4'," + b" " * 60, "WHOLE", "is damaged"),  # a TokenError out of numpy
        (np.zeros((2, 3)), "WHOLE", "holds float64"),  # another file with that description was read as it stood
    ],
)
def test_what_is_no_file_of_features_is_left_as_it_is(tmp_path, processor, image_files, held, about, words):
    model, file = make_model(processor), tmp_path / "f.npy"
    if about == "WHOLE":
        kept(model, file, image_files)
    elif about is not None:
        Path(f"{file}.json").write_text(json.dumps(about))
    if isinstance(held, bytes):
        file.write_bytes(held)
    elif held is not None:
        np.save(file, held)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("f.npy*")}
    with pytest.raises(ValueError, match=words):
        kept(model, file, image_files)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("f.npy*")} == before


def test_a_blind_model_encodes_nothing_once(tmp_path, processor, image_files, looks):
    """It sent the same blank image through the tower for every photo of the data, and kept each: 2.4 GB for 6,000."""
    image_files[3].unlink()
    features = FrozenFeatures(make_model(processor), ImageCache(32), blind=True)
    features.keep(tmp_path / "f.npy", image_files)
    assert features[image_files[0]] is features[image_files[1]] and features[image_files[3]] is None
    assert len(looks) == 1 and not (tmp_path / "f.npy").exists()


@pytest.mark.parametrize("blind", [False, True])
def test_tiles_of_an_image_stay_together(tmp_path, processor, blind):
    """Packed rows, kept features, and an epoch of images cut into 1 to 17 tiles: as many placeholders as features, and the loss
    of pixels is that of kept features. A blind model is told nothing of an image's proportions."""
    processor.split_images(True)
    rows = numbered(tmp_path)
    for k, path in enumerate(paths := [path for row in rows for path in row.images]):
        Image.new("RGB", (10 + 9 * k, 60), (20 * k % 256, 50, 90)).save(path)
    model, images = make_model(processor), ImageCache(processor.image_settings)
    kept_features = FrozenFeatures(model, images, blind)
    kept_features.keep(tmp_path / "f.npy", paths)
    seen = LlavaBatches(rows, processor, images, 4, 0, 4000, blind=blind)
    frozen = LlavaBatches(rows, processor, images, 4, 0, 4000, blind=blind, features=kept_features)
    tiles = 0
    for (one,), (two,) in zip((next(seen) for _ in range(2)), (next(frozen) for _ in range(2)), strict=True):
        places = (one["input_ids"] == processor.image_token_id).sum()
        assert places == processor.num_image_token * len(one["pixel_values"])
        assert len(two["vision_features"]) == len(one["pixel_values"])
        torch.testing.assert_close(model(**one).loss, model(**two).loss, atol=1e-4, rtol=1e-4)
        tiles += len(one["pixel_values"])
    assert (tiles == 8) == blind


def test_a_death_between_the_file_and_what_describes_it_does_not_mix_two_models(tmp_path, processor, image_files, monkeypatch):
    """The second model's file is there, its description not yet: the first model must not take one for its own."""
    one, two, file = make_model(processor), make_model(processor), tmp_path / "f.npy"
    new_weights(two, image_files)
    kept(one, file, image_files)

    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data_features, "write_json", die)
        with pytest.raises(KeyboardInterrupt):
            kept(two, file, image_files)
    features, fresh = kept(one, file, image_files), FrozenFeatures(one, ImageCache(32))
    assert all(torch.equal(features[path], fresh[path]) for path in image_files)


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, processor, image_files):
    """A limit on the size of files stands for it: the same failing write."""
    one, two, file = make_model(processor), make_model(processor), tmp_path / "f.npy"
    new_weights(two, image_files)
    kept(one, file, image_files[:4])
    before, limit = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 500, limit[1]))
    try:
        with pytest.raises(OSError):
            kept(two, file, image_files)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert file.read_bytes() == before and not list(tmp_path.glob(".*"))


def test_features_are_kept_in_the_order_of_names_whatever_order_rows_have(tmp_path, processor, image_files, looks):
    model = make_model(processor)
    kept(model, tmp_path / "f.npy", image_files)
    looks.clear()
    kept(model, tmp_path / "f.npy", image_files[::-1])
    assert not looks


# ---- scenes ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene_reader():
    return make_processor(size=64)


def same_batches(one, two) -> bool:
    return all(same(a[key], b[key]) for a, b in zip(one, two, strict=True) for key in a)


def test_scene_batches_are_a_function_of_the_seed_and_go_on_where_they_stopped(scene_reader):
    one, two, other = (SceneBatches(scene_reader, 4, seed, 3, grad_accum=2) for seed in (1, 1, 2))
    for _ in range(3):
        batch = next(one)
        assert len(batch) == 2 and same_batches(batch, next(two))
        assert not torch.equal(batch[0]["pixel_values"], next(other)[0]["pixel_values"])
    resumed = SceneBatches(scene_reader, 4, 1, 3, grad_accum=2)
    resumed.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert same_batches(next(one), next(resumed)) and one.fraction == resumed.fraction > 0


@torch.no_grad()
def test_the_loss_of_a_batch_of_scenes_is_that_of_its_scenes_one_by_one(scene_reader):
    """So each scene's questions are about its own image, wherever packing puts them; and parts hold the whole batch."""
    model = make_model(scene_reader, image_size=64)
    batches = SceneBatches(scene_reader, 5, seed=0, per_scene=4)
    scenes = make_scenes("train", 5, seed=0)
    batch = batches.batch(scenes)
    single = [batches.batch(scenes[[k]]) for k in range(5)]
    counts = [int((one["labels"] != -100).sum()) for one in single]
    expected = sum(model(**one)["loss"] * n for one, n in zip(single, counts, strict=True)) / sum(counts)
    assert sum(counts) == int((batch["labels"] != -100).sum())
    torch.testing.assert_close(model(**batch)["loss"], expected, atol=1e-5, rtol=1e-5)
    order = [k for k in range(5) for one in batch["pixel_values"] if torch.equal(one, single[k]["pixel_values"][0])]
    assert sorted(order) == list(range(5))


@torch.no_grad()
def test_losses_of_parts_add_up_to_that_of_the_whole_batch(scene_reader):
    """Whatever the number of answers in each part, in one process and, averaged, in two."""
    model = make_model(scene_reader, image_size=64)

    def loss(parts, run):
        return sum(model(**{k: v for k, v in part.items() if k != "share"})["loss"] * part["share"][0]
                   for part in with_shares(run, parts))  # fmt: skip

    alone, pair = SimpleNamespace(world_size=1, sum=lambda x: x), SimpleNamespace(world_size=2)
    (whole,), parts = (next(SceneBatches(scene_reader, 5, 0, 3, grad_accum=n)) for n in (1, 3))
    assert len({int((part["labels"] != -100).sum()) for part in parts}) == 3
    torch.testing.assert_close(loss(parts, alone), loss([whole], alone), atol=1e-5, rtol=1e-5)
    total = sum((part["labels"] != -100).sum() for part in parts)[None]
    pair.sum = lambda counts: total  # of both processes
    both = (loss(parts[:1], pair) + loss(parts[1:], pair)) / 2
    torch.testing.assert_close(both, loss([whole], alone), atol=1e-5, rtol=1e-5)

    labels = [next(PatchLabels(scene_reader, 4, 0, 4, grad_accum=n)) for n in (1, 3)]
    logits = torch.randn(4, 16, sum(LABELS), generator=torch.Generator().manual_seed(0))
    found = []
    for parts in labels:
        split = logits.split([len(part["patch_labels"]) for part in parts])
        pairs = zip(split, with_shares(alone, parts), strict=True)
        found.append(sum(scene_loss(x, part["patch_labels"], part["share"]) for x, part in pairs))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_blind_scenes_are_the_same_questions_about_nothing(scene_reader):
    (seeing,), (blind,) = (next(SceneBatches(scene_reader, 3, 0, 2, blind=blind)) for blind in (False, True))
    assert not blind["pixel_values"].any() and torch.equal(blind["input_ids"], seeing["input_ids"])


def patch_labels(scenes, grid):
    return torch.stack(scenes.dense_labels(grid), dim=1).flatten(2)


@pytest.mark.parametrize("grid", [4, 8])
def test_the_loss_of_squares_is_their_mean_one_by_one(grid):
    scenes = make_scenes("train", 6, seed=4)
    logits = torch.randn(6, grid * grid, sum(LABELS), generator=torch.Generator().manual_seed(0)) * 3
    digits, colours, places = scenes.dense_labels(grid)
    losses = {"digit": [], "colour": [], "place": []}
    for n in range(6):
        for square in range(grid * grid):
            digit, colour = int(digits[n].flatten()[square]), int(colours[n].flatten()[square])
            if digit == IGNORE:
                assert colour == IGNORE
                continue
            possible = [d for d in range(11) if colour == len(COLOURS) or (d, COLOURS[colour]) not in HELD_OUT]
            by_digit = {d: logits[n, square, d] for d in possible}
            losses["digit"].append(torch.stack(list(by_digit.values())).logsumexp(0) - by_digit[digit])
            losses["colour"].append(F.cross_entropy(logits[n, square, 11:20], torch.tensor(colour)))
            if digit < 10:  # nothing is nowhere
                losses["place"].append(F.cross_entropy(logits[n, square, 20:], places[n].flatten()[square]))
    weights = dict(zip(("digit", "colour", "place"), LABEL_WEIGHTS, strict=True))
    expected = sum(weights[name] * torch.stack(each).mean() for name, each in losses.items())
    torch.testing.assert_close(scene_loss(logits, patch_labels(scenes, grid)), expected, atol=1e-5, rtol=1e-5)


def test_no_square_teaches_that_its_colour_is_never_that_digits():
    """A pair that is held out is not learned to be absent: no gradient of its digit comes from squares of its colour."""
    scenes = make_scenes("train", 60, seed=1)
    logits = torch.zeros(60, 16, sum(LABELS), requires_grad=True)
    scene_loss(logits, patch_labels(scenes, 4)).backward()
    _, colours, _ = scenes.dense_labels(4)
    for digit, colour in HELD_OUT:
        squares = colours.flatten(1) == COLOURS.index(colour)
        assert squares.any() and not logits.grad[..., digit][squares].any()
    nothing = colours.flatten(1) == len(COLOURS)
    assert (logits.grad[..., :11][nothing] != 0).all()


# ---- common questions ----------------------------------------------------------------------------------------------------


@pytest.fixture
def closed(tmp_path):
    """Rows of which two questions are asked often and answered in few ways; one never, one always in the same way, one in too
    many ways."""
    rows = []
    for k in range(12):
        said = ["Is it odd?", "yes" if k % 2 else "no", "Is it a picture?", "yes", "Which one?", f"number {k}"]
        rows.append(about([k], *said, *(["What is left over?", f"{k % 3}"] if k > 4 else [])))
    rows += [about([1], f"Is it number {k}?", "yes" if k == 1 else "no") for k in range(3)]  # each once
    rows += [about([1, 2], "Is it odd?", "both")] * 5  # not about one image
    return write(tmp_path, rows)


def test_common_questions_are_those_that_many_ask_and_few_answers_settle(closed):
    assert common_questions(closed, 4, 4) == {"Is it odd?": {"no": 0, "yes": 1}, "What is left over?": {"0": 0, "1": 1, "2": 2}}


def test_each_image_comes_with_its_answers_once_an_epoch(closed):
    image_files, common = ImageCache(32), common_questions(closed, 4, 4)
    batches = CommonAnswers(closed, common, image_files, 4, seed=0, grad_accum=2)
    found = {}
    for _ in range(3):
        for part in next(batches):
            for seen, pixels in zip(part["answers"].tolist(), part["pixel_values"], strict=True):
                (number,) = [k for k in range(12) if torch.equal(pixels[None], image_files[closed[k].images[0]])]
                found[number] = seen
    assert found == {k: [k % 2, k % 3 if k > 4 else IGNORE] for k in range(12)} and batches.fraction == 1
    again = CommonAnswers(closed, common, image_files, 4, seed=0, grad_accum=2)
    next(again)
    state = again.state_dict()
    expected = next(again)
    again = CommonAnswers(closed, common, image_files, 4, seed=0, grad_accum=2)
    again.load_state_dict(state)
    for part, other in zip(next(again), expected, strict=True):
        assert all(same(part[key], other[key]) for key in part)


def test_images_that_cannot_be_read_are_left_out_of_the_common_questions(closed):
    for row in closed[:11]:
        row.images[0].unlink()
    batches = CommonAnswers(closed, common_questions(closed, 4, 4), ImageCache(32), 6, seed=0)
    (part,) = next(batches)
    assert part["answers"].tolist() == [[1, 2]]
    closed[11].images[0].unlink()
    batches = CommonAnswers(closed, common_questions(closed, 4, 4), ImageCache(32), 6, seed=0)
    with pytest.raises(ValueError, match="12 images cannot be read"):
        next(batches)


def test_common_loss_is_the_mean_over_all_that_was_asked():
    logits = torch.randn(5, 5).split((2, 3), dim=1)
    seen = torch.tensor([[0, IGNORE], [1, 2], [IGNORE, IGNORE], [IGNORE, 0], [1, 1]])
    asked = [(n, q) for n in range(5) for q in range(2) if seen[n, q] != IGNORE]
    each = [F.cross_entropy(logits[q][n], seen[n, q]) for n, q in asked]
    torch.testing.assert_close(common_loss(logits, seen), torch.stack(each).mean())


def test_questions_of_a_row_are_without_its_image_mark(closed):
    assert questions_of(closed[0])[0] == ("Is it odd?", "no") and questions_of(closed[-1]) == []
