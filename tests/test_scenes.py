"""Laws of scenes.py: images show what the labels say, splits keep apart, every question has exactly one true answer."""

import hashlib
import itertools
import json
import re
from collections import Counter, defaultdict
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image

from data import convert, show_scenes
from data import scenes as module
from data.convert import convert_scenes
from data.digits import load_digits
from data.scenes import (
    COLOURS,
    HELD_OUT,
    IGNORE,
    INKS,
    KINDS,
    MIX,
    PAPERS,
    PLACES,
    SLOTS,
    SPLITS,
    TEMPLATES,
    SceneConfig,
    Scenes,
    SceneStream,
    corpus,
    final_number,
    make_scenes,
    normalize_answer,
    questions,
)
from lib.cli import run_cli
from lib.tokenizer import BPETokenizer

GOLDEN = ["fb03d454e4e022ed", "e36f66af19e1c7b3", "9576766df32d39c1"]  # sha256 of images, boxes, questions

S = SceneConfig().size
EVERY_KIND = dict.fromkeys(KINDS, 1)
made = pytest.fixture(scope="module", params=SPLITS)(lambda request: (request.param, make_scenes(request.param, 1000, 3)))


def assert_same(some: Scenes, other: Scenes) -> None:
    for f in fields(Scenes):
        assert torch.equal(getattr(some, f.name), getattr(other, f.name)), f.name


def digits_of(scenes: Scenes):
    """(scene, slot, digit, colour name, cell, box) of every digit."""
    for n, k in (scenes.digits >= 0).nonzero().tolist():
        colour = COLOURS[scenes.colours[n, k]]
        yield n, k, scenes.digits[n, k].item(), colour, scenes.cells[n, k].item(), scenes.boxes[n, k].tolist()


# ---- the same everywhere ----


def test_scenes_and_questions_are_those_of_every_other_machine():
    scenes = make_scenes("train", 100, seed=7)
    texts = repr(questions(scenes, seed=7))
    parts = (scenes.images.numpy().tobytes(), scenes.boxes.numpy().tobytes(), texts.encode())
    assert [hashlib.sha256(part).hexdigest()[:16] for part in parts] == GOLDEN


def test_the_number_of_threads_changes_nothing():
    first = make_scenes("test", 64, seed=1)
    module._cut_glyphs.cache_clear()
    torch.set_num_threads(2)
    try:
        assert_same(make_scenes("test", 64, seed=1), first)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("size", [1, 37, 64, 100])
def test_a_scene_depends_on_its_number_not_on_its_batch(size):
    whole = make_scenes("train", 200, seed=2)
    stream, turns = SceneStream("train", size, seed=2), questions(whole, seed=5)
    for position in range(0, 201 - size, size):
        batch = next(stream)
        assert_same(batch, whole[position : position + size])
        assert questions(batch, seed=5) == turns[position : position + size]


def test_a_resumed_stream_goes_on_and_ranks_share_one_sequence():
    stream = SceneStream("train", 24, seed=4)
    batches = [next(stream) for _ in range(4)]
    resumed = SceneStream("train", 24, seed=4)
    stream = SceneStream("train", 24, seed=4)
    next(stream)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert_same(next(resumed), batches[1])
    ranks = [SceneStream("train", 24, seed=4, rank=rank, world_size=2) for rank in (0, 1)]
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert_same(next(ranks[0]), first)
        assert_same(next(ranks[1]), second)
    for other in (("train", 5, None), ("test", 4, None), ("train", 4, SceneConfig(noise=0))):
        with pytest.raises(ValueError, match="cannot resume: the saved run's scenes have"):
            SceneStream(other[0], 24, *other[1:]).load_state_dict(stream.state_dict())


@pytest.mark.parametrize("other", [{"seed": 9}, {"split": "test"}])
def test_seeds_and_splits_differ(other):
    a, b = (make_scenes(**{"split": "train", "count": 50, "seed": 8} | change) for change in ({}, other))
    assert (a.digits != b.digits).any() and (a.images != b.images).float().mean() > 0.5


# ---- which digits, which pairs ----


@pytest.mark.parametrize("split", SPLITS)
def test_train_scenes_use_training_samples_only_and_the_others_test_samples_only(split, monkeypatch):
    """Training samples are replaced by full squares, test samples by small dots."""
    parts = load_digits()
    dot = torch.zeros(8, 8, dtype=torch.uint8)
    dot[3:5, 3:5] = 255
    fakes = [torch.full((8, 8), 255, dtype=torch.uint8), dot]
    faked = [(fake.expand_as(images), labels) for fake, (images, labels) in zip(fakes, parts, strict=True)]
    monkeypatch.setattr(module, "load_digits", lambda: faked)
    module._cut_glyphs.cache_clear()
    try:
        boxes = make_scenes(split, 60, config=SceneConfig(rotate=0, shear=0)).boxes
    finally:
        module._cut_glyphs.cache_clear()
    width = (boxes[..., 2] - boxes[..., 0])[boxes[..., 2] > 0]
    assert (width >= S / 4).all() if split == "train" else (width < S / 4).all()


def test_held_out_pairs_are_in_compositional_scenes_only_and_every_digit_and_colour_is_trained(made):
    split, scenes = made
    assert [digit for digit, _ in HELD_OUT] == list(range(10)) and {colour for _, colour in HELD_OUT} == set(COLOURS)
    pairs = Counter((digit, colour) for _, _, digit, colour, *_ in digits_of(scenes))
    if split != "compositional":
        assert len(pairs) == 70 and not set(HELD_OUT) & set(pairs)
    else:
        with_one = {n for n, _, digit, colour, *_ in digits_of(scenes) if (digit, colour) in HELD_OUT}
        assert len(with_one) == len(scenes) and set(HELD_OUT) < set(pairs)
        for n, turns in enumerate(questions(scenes, seed=1, per_scene=1)):
            held = {k for m, k, digit, colour, *_ in digits_of(scenes[n : n + 1]) if (digit, colour) in HELD_OUT}
            assert held & set(turns[0].about)


def test_numbers_places_digits_and_colours_come_up_alike(made):
    _, scenes = made
    for found, classes in ((scenes.counts, 4), (scenes.layouts, 2), (scenes.digits[scenes.digits >= 0], 10)):
        shares = torch.unique(found, return_counts=True)[1] / len(found)
        assert len(shares) == classes and (shares * classes - 1).abs().max() < 0.25
    for layout in PLACES:
        cells = scenes.cells[scenes.layouts == layout]
        shares = torch.bincount(cells[cells >= 0]) / (cells >= 0).sum()
        assert len(shares) == layout**2 and (shares * layout**2 - 1).abs().max() < 0.3


# ---- images show what the labels say ----


def test_digits_lie_in_their_own_cells_in_reading_order_and_wander_all_over_them(made):
    _, scenes = made
    assert torch.equal((scenes.digits >= 0).sum(1), scenes.counts)
    assert torch.equal(scenes.digits >= 0, torch.arange(SLOTS) < scenes.counts[:, None])
    reach = defaultdict(list)
    for n, k, _, _, cell, (x0, y0, x1, y1) in digits_of(scenes):
        layout = scenes.layouts[n].item()
        side, row, column = S / layout, *divmod(cell, layout)
        assert column * side - 1e-4 <= x0 < x1 <= (column + 1) * side + 1e-4
        assert row * side - 1e-4 <= y0 < y1 <= (row + 1) * side + 1e-4
        assert k == 0 or scenes.cells[n, k - 1] < cell
        reach[layout, cell].append((x0 - column * side, y0 - row * side, (column + 1) * side - x1, (row + 1) * side - y1))
    for gaps in reach.values():
        assert (np.min(gaps, axis=0) < 3).all()  # pixels; a digit is a little narrower than the room it is given


def test_the_middle_of_a_box_tells_the_place_whatever_the_layout(made):
    _, scenes = made
    for n, _, _, _, cell, (x0, y0, x1, y1) in digits_of(scenes):
        across, down = (["left", "", "right"], ["top", "", "bottom"])
        column, row = (int(12 * middle > 5) + int(12 * middle > 7) for middle in ((x0 + x1) / 2 / S, (y0 + y1) / 2 / S))
        name = f"{down[row]} {across[column]}".strip() or "centre"
        assert PLACES[scenes.layouts[n].item()][cell] == name


def test_ink_has_its_colours_name_and_stays_in_its_box(made):
    _, scenes = made
    names, inks = list(INKS), np.array(list(INKS.values()))
    pixels = scenes.images.permute(0, 2, 3, 1).numpy().astype(float)
    paper = np.median(pixels, axis=(1, 2))
    contrast = np.abs(pixels - paper[:, None, None]).max(axis=-1)
    outside = np.ones_like(contrast, dtype=bool)
    for n, _, _, colour, _, box in digits_of(scenes):
        x0, y0, x1, y1 = (round(edge) for edge in box)
        crop, strength = pixels[n, y0:y1, x0:x1].reshape(-1, 3), contrast[n, y0:y1, x0:x1].ravel()
        strongest = crop[strength.argsort()[-8:]].mean(axis=0)
        assert names[np.square(inks - strongest).sum(1).argmin()] == colour
        outside[n, max(y0 - 3, 0) : y1 + 3, max(x0 - 3, 0) : x1 + 3] = False  # its rim is faint
    assert contrast[outside].max() <= 2 * SceneConfig().noise + 2


def test_digits_look_like_their_labels():
    """Each digit, cut out by its box and compared with all 1,797 samples: the nearest is of its class."""
    samples = [torch.cat(part) for part in zip(*load_digits(), strict=True)]
    config = SceneConfig(noise=0, ink_noise=0)
    bank = shrink_to_ink(samples[0][:, 0].float())
    for split in SPLITS:
        scenes, right = make_scenes(split, 150, 11, config), []
        for n, _, digit, colour, _, box in digits_of(scenes):
            x0, y0, x1, y1 = (round(edge) for edge in box)
            crop = scenes.images[n, :, y0:y1, x0:x1].float()
            paper = scenes.images[n].flatten(1).median(dim=1).values.float()[:, None, None]
            direction = torch.tensor(INKS[colour])[:, None, None] - paper
            opacity = ((crop - paper) * direction).sum(0) / (direction**2).sum()
            nearest = (bank - shrink_to_ink(opacity[None])).square().sum((1, 2)).argmin()
            right.append(samples[1][nearest].item() == digit)
        assert np.mean(right) > 0.95


def shrink_to_ink(glyphs: torch.Tensor) -> torch.Tensor:
    """[N, h, w] -> [N, 12, 12]: the ink alone, stretched to a square, of length 1."""
    out = []
    for glyph in glyphs:
        rows, columns = ((glyph > 0.25 * glyph.max()).any(axis).nonzero()[:, 0] for axis in (1, 0))
        ink = glyph[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        ink = torch.nn.functional.interpolate(ink[None, None], size=(12, 12), mode="bilinear")[0, 0]
        # A 1 is little but width: keep how narrow it was.
        out.append(torch.cat([(ink / ink.norm()), torch.full((1, 12), 0.3 * len(columns) / len(rows))]))
    return torch.stack(out)


@pytest.mark.parametrize("grid", [4, 8])
def test_dense_labels_by_brute_force(made, grid):
    _, scenes = made
    scenes = scenes[:150]
    digits, colours, places = scenes.dense_labels(grid)
    square = S / grid
    expected = torch.stack([torch.full_like(digits, nothing) for nothing in (10, len(COLOURS), IGNORE)])
    by_scene = itertools.groupby(digits_of(scenes), key=lambda found: found[0])
    for n, found in by_scene:
        found = list(found)
        for row, column in itertools.product(range(grid), range(grid)):
            left, top = column * square, row * square
            middle, own, touched = None, None, False
            for _, _, digit, colour, cell, (x0, y0, x1, y1) in found:
                place = PLACES[3].index(PLACES[int(scenes.layouts[n])][cell])
                touched |= x0 < left + square and x1 > left and y0 < top + square and y1 > top
                if left <= (x0 + x1) / 2 < left + square and top <= (y0 + y1) / 2 < top + square:
                    assert own is None
                    own = digit, COLOURS.index(colour), place
                elif x0 <= left + square / 2 < x1 and y0 <= top + square / 2 < y1:
                    middle = digit, COLOURS.index(colour), place
            if own or middle or touched:
                expected[:, n, row, column] = torch.tensor(own or middle or (IGNORE,) * 3)
    assert torch.equal(torch.stack([digits, colours, places]), expected)
    assert all(set(digits[n].flatten().tolist()) > set(scenes.digits[n, : scenes.counts[n]].tolist()) for n in range(150))


def test_a_grid_in_which_digits_clash_is_refused():
    with pytest.raises(ValueError, match="grid 2 is too coarse"):
        make_scenes("train", 50).dense_labels(2)


# ---- questions: answered once more, from the description alone ----


def solve(text: str, things: list[dict]) -> tuple[str, set[str]]:
    """(kind, all the answers one could defend), by reading the question's words; things in reading order."""

    def article(thing):
        words = f"{thing['colour']} {thing['digit']}"
        return ("an " if words.startswith("orange") else "a ") + words

    def matching(words):
        colours = [c for c in COLOURS if c in words]
        numbers = [int(d) for d in re.findall(r"\d", words)]
        return [t for t in things if t["colour"] in (colours or COLOURS) and t["digit"] in (numbers or range(10))]

    words = text.lower().rstrip("?.")
    asked = matching(words)
    if re.search("left of|above", words):
        assert len(asked) == 1, "the digit asked about is not the only one"
        same, less = ("row", "column") if "left of" in words else ("column", "row")
        found = [t for t in things if t[same] == asked[0][same] and t[less] < asked[0][less]]
        kind, words = ("left_of", "left of it") if "left of" in words else ("above", "above it")
        steps = [f"at the {asked[0]['place']}; {words}, at the {t['place']}, {article(t)}" for t in found]
        return kind, {f"{i}: {step}" for i, step in enumerate(steps)}
    if " at the " in words:
        place = words.split(" at the ")[1]
        return "place", {article(t) for t in things if t["place"] == place}
    if "many" in words or words.startswith("count"):
        return "count", {str(len(things))}
    if "add up" in words or "sum" in words:
        steps, total = [str(things[0]["digit"])], things[0]["digit"]
        for thing in things[1:]:
            total += thing["digit"]
            steps.append(f"plus {thing['digit']} is {total}")
        return "sum", {" ".join(steps)}
    if re.search("is there|do you see an? |does the picture show", words):
        return "exists", {"yes" if asked else "no"}
    if "colour" in words:
        return "colour", {f"{i}: {t['colour']}" for i, t in enumerate(asked)}
    if any(colour in words for colour in COLOURS):
        return "digit", {f"{i}: {t['digit']}" for i, t in enumerate(asked)}
    assert re.search("describe|in the picture|tell me", words), text
    return "describe", {", ".join(f"{article(t)} at the {t['place']}" for t in things)}


def describe(scenes: Scenes) -> list[list[dict]]:
    described = [[] for _ in range(len(scenes))]
    for n, _, digit, colour, cell, _ in digits_of(scenes):
        layout = scenes.layouts[n].item()
        row, column = divmod(cell, layout)
        place = PLACES[layout][cell]
        described[n].append({"digit": digit, "colour": colour, "row": row, "column": column, "place": place})
    return described


def test_every_question_has_one_answer_and_it_is_the_one_given(made):
    _, scenes = made
    asked = Counter()
    for things, turns in zip(describe(scenes), questions(scenes, 6, per_scene=40, mix=EVERY_KIND), strict=True):
        for turn in turns:
            kind, answers = solve(turn.question, things)
            answers = {answer.split(": ")[-1] for answer in answers} if len(answers) == 1 else answers
            assert kind == turn.kind and answers == {turn.answer}, (turn, things)
            asked[kind] += 1
            for k in turn.about:  # these are the digits that question and answer name
                assert {things[k]["colour"], str(things[k]["digit"])} <= set(re.findall(r"\w+", turn.question + turn.answer))
    assert set(asked) == set(KINDS) and min(asked.values()) > 150


def test_wordings_all_come_up_and_no_question_twice_in_a_scene(made):
    _, scenes = made
    turns = questions(scenes, seed=2)
    patterns = {kind: [re.sub(r"{\w+}", ".+", text).replace("?", r"\?") for text in TEMPLATES[kind]] for kind in KINDS}
    used = defaultdict(set)
    for scene in turns:
        assert len(scene) <= 12 and len({(turn.kind, turn.answer, turn.about) for turn in scene}) == len(scene)
        for turn in scene:
            used[turn.kind] |= {i for i, pattern in enumerate(patterns[turn.kind]) if re.fullmatch(pattern, turn.question)}
    assert {kind: len(found) for kind, found in used.items()} == {kind: 3 for kind in KINDS}
    assert questions(scenes, seed=3) != turns


def test_lookups_reach_nearly_every_digit_and_the_mix_decides_what_is_asked(made):
    _, scenes = made
    lookups = [[turn for turn in turns if turn.kind in ("colour", "digit", "place")] for turns in questions(scenes)]
    looked_up = [{k for turn in turns for k in turn.about} for turns in lookups]
    assert sum(map(len, looked_up)) > 0.97 * scenes.counts.sum()
    only = {turn.kind for turns in questions(scenes, mix={"colour": 1, "sum": 2, "count": 0}) for turn in turns}
    assert only == {"colour", "sum"}
    first = [Counter(turn.kind for (turn,) in questions(scenes, per_scene=1, mix={"place": w, "describe": 1})) for w in (1, 9)]
    assert first[0]["place"] / len(scenes) == pytest.approx(0.5, abs=0.06)
    assert first[1]["place"] / len(scenes) == pytest.approx(0.9, abs=0.04)


def test_no_constant_answer_does_well(made):
    _, scenes = made
    answers = defaultdict(Counter)
    for turn in itertools.chain(*questions(scenes, 1, 12, EVERY_KIND)):
        answers[turn.kind][turn.answer] += 1
    best = {kind: found.most_common(1)[0][1] / found.total() for kind, found in answers.items()}
    limits = {"exists": 0.5, "count": 0.25, "digit": 0.1, "colour": 0.2, "place": 0.05, "left_of": 0.05, "above": 0.05,
              "sum": 0.05, "describe": 0.02}  # fmt: skip
    for kind, share in best.items():
        assert share < limits[kind] + 3 * (limits[kind] / answers[kind].total()) ** 0.5, kind


@pytest.mark.parametrize("mix", [{}, {"colour": 0}, {"size": 1}, {"colour": -1}])
def test_a_wrong_mix_is_refused(mix):
    with pytest.raises(ValueError, match="weights above 0 for some of count, colour"):
        questions(make_scenes("train", 1), mix=mix)


# ---- words ----


def test_words_are_few_and_a_tokenizer_trained_on_them_gives_every_answer_back(made):
    _, scenes = made
    words = set(re.findall(r"\w+|[^\w\s]", "\n".join(corpus())))
    texts = {text for turn in itertools.chain(*questions(scenes, 4, 40, EVERY_KIND)) for text in turn[1:3]}
    assert set(re.findall(r"\w+|[^\w\s]", " ".join(texts))) <= words and len(words) < 120
    tokenizer = BPETokenizer.train(corpus(), vocab_size=450, special_tokens=("<|endoftext|>",))
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) <= len(re.findall(r"\w+|[^\w\s]", text)) + 2  # a word is a token, but for some that begin a text


def test_normalise_and_final_number():
    assert normalize_answer("  A Red\n 7 ") == normalize_answer("a red 7") == "a red 7" != normalize_answer("a red 8")
    assert final_number("3 plus 7 is 10 plus 2 is 12") == 12 and final_number("5") == 5 and final_number("none") is None


# ---- files ----


def test_export_is_llava_rows_with_the_very_images(tmp_path):
    folder = tmp_path / "deep" / "out"
    convert.main(["scenes", str(folder), "--split", "test", "--count", "5", "--seed", "3", "--per-scene", "4"])
    scenes = make_scenes("test", 5, 3)
    rows = json.loads((folder / "scenes.json").read_text())
    assert [path.name for path in sorted(folder.iterdir())] == ["images", "scenes.json"]
    assert len(rows) == len(list((folder / "images").iterdir())) == len({row["id"] for row in rows}) == 5
    for image, turns, row in zip(scenes.images, questions(scenes, 3, 4), rows, strict=True):
        with Image.open(folder / "images" / row["image"]) as opened:
            assert torch.equal(torch.from_numpy(np.array(opened)).permute(2, 0, 1), image)
        said = row["conversations"]
        assert [turn["from"] for turn in said] == ["human", "gpt"] * len(turns)
        assert said[0]["value"] == f"<image>\n{turns[0].question}" and not any("<image>" in turn["value"] for turn in said[1:])
        assert [turn["value"] for turn in said[1::2]] == [turn.answer for turn in turns]
        assert [turn["value"] for turn in said[2::2]] == [turn.question for turn in turns[1:]]
        assert row["kinds"] == [turn.kind for turn in turns]


def test_an_export_that_fails_leaves_nothing_and_an_old_one_is_not_touched(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    convert_scenes(folder, "train", 2)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    with pytest.raises(FileExistsError, match="exists already"):
        convert_scenes(folder, "train", 2)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "write_rows", full)
    with pytest.raises(OSError, match="No space left"):
        convert_scenes(tmp_path / "other", "train", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_show_draws_a_sheet(tmp_path):
    show_scenes.main([str(tmp_path / "sheet.png"), "--split", "compositional", "--seed", "1"])
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width > 1000 and image.height > 500 and len(image.convert("RGB").getcolors(1 << 24)) > 1000


def test_a_wrong_command_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "kept").write_text("")
    exports = (f"scenes {tmp_path}", "scenes x --split val", "scenes x --count 0", "draw")
    wrong = [(convert.main, words.split()) for words in exports] + [(show_scenes.main, [f"{tmp_path}/kept/a.png"])]
    for main, argv in wrong:
        with pytest.raises(SystemExit) as stop:
            run_cli(lambda main=main, argv=argv: main(argv))
        assert stop.value.code == 2
        assert capsys.readouterr().err.strip().splitlines()[-1].count("error: ") == 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"layouts": ()}, "layouts are"), ({"layouts": (2, 4)}, "layouts are"), ({"papers": ("grey",)}, "papers are"),
        ({"digits": (0, 3)}, "digits are"), ({"digits": (2, 5)}, "digits are"), ({"digits": (3, 2)}, "digits are"),
        ({"side": (0.1, 0.3)}, "above 1/6"), ({"side": (0.3, 0.4)}, "0.267 to fit a cell"), ({"side": (0.25, 0.2)}, "side is"),
        ({"size": 8}, "size is 8"), ({"noise": 300}, "noise is 300"), ({"rotate": 90}, "rotate is 90"),
        ({"variants": 0}, "variants is 0"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        SceneConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"split": "val"}, {"count": 0}, {"start": -1}])
def test_bad_requests_are_refused(wrong):
    with pytest.raises(ValueError):
        make_scenes(**{"split": "train", "count": 1} | wrong)
    with pytest.raises(ValueError):
        SceneStream("train", 0)


@pytest.mark.parametrize("change", [
    {"layouts": (2,)}, {"layouts": (3,), "side": (0.2, 0.3)}, {"digits": (4, 4)}, {"size": 96}, {"papers": ("light",)},
])  # fmt: skip
def test_settings_are_followed(change):
    config = replace(SceneConfig(), **change)
    scenes = make_scenes("train", 100, config=config)
    assert set(scenes.layouts.tolist()) == set(config.layouts) and scenes.images.shape[2:] == (config.size, config.size)
    assert scenes.counts.min() >= config.digits[0] and scenes.counts.max() <= config.digits[1]
    tall = (scenes.boxes[..., 3] - scenes.boxes[..., 1])[scenes.digits >= 0]
    assert tall.max() <= min(config.side[1], 1 / min(config.layouts)) * config.size * 1.25
    paper = scenes.images.flatten(2).median(dim=2).values.float().mean(dim=1)  # most of an image is paper
    assert all(any(PAPERS[name][0] - 8 < grey < PAPERS[name][1] + 8 for name in config.papers) for grey in paper.tolist())
    assert MIX.keys() == set(KINDS)
