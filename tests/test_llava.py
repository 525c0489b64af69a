"""Laws of data/llava.py and image_cache.py: a bad row is named and dropped, never met later; images stay on one side; pixels
are the processor's."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import image_cache, llava
from data.convert import convert_scenes
from data.image_cache import ImageCache
from data.image_settings import ImageSettings
from data.llava import LlavaRows, count_images, questions_of_row
from data.scenes import KINDS
from data.tiles import tile_count
from lib.tokenizer import BPETokenizer
from processing_mllama import MllamaImageProcessor, process_images
from samples import image_bytes

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def said(*texts: str, system: str | None = None) -> list[dict]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return ([] if system is None else [{"from": "system", "value": system}]) + turns


def row(image="a.png", turns=None, **more) -> dict:
    return {"id": "one", "image": image, "conversations": turns or said("<image>\nWhat?", "A thing.")} | more


GOOD = row()


@pytest.fixture
def folder(tmp_path):
    """a.png to f.png, whole ones."""
    for seed, name in enumerate("abcdef"):
        (tmp_path / f"{name}.png").write_bytes(image_bytes(seed))
    return tmp_path


def read(folder: Path, rows, name: str = "data.json", **options) -> LlavaRows:
    (folder / name).write_text(json.dumps(rows), encoding="utf-8")
    return LlavaRows.read(folder / name, **options)


# ---- reading ----


def test_every_sort_of_good_row_is_read(folder):
    two = said("First <image>, then <image>?", "Yes.", "And?", "No.", system="Be short.")
    rows = read(folder, [
        GOOD,
        {"conversations": said("Hello?", "Hi.")},
        row(["a.png", "b.png"], two, id=7, kinds=["order", "more"], model="ignored"),
        row("./c.png", said("What?", "This.", "Why?", "So.")),
        row(None, said("No image.", "None."), id=None, kinds=None),
        row([], said("", "Still an answer."), id="ünï"),
        row("x/../a.png", [{"from": "user", "value": "<image>"}, {"from": "assistant", "value": "<img> is text"}]),
    ])  # fmt: skip
    assert rows.problems == [] and len(rows) == rows.total == 7
    assert [r.id for r in rows] == ["one", "2", "7", "one", "5", "ünï", "one"]
    assert [r.number for r in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [[path.name for path in r.images] for r in rows] == [["a.png"], [], ["a.png", "b.png"], ["c.png"], [], [], ["a.png"]]
    assert rows[2].kinds == ("order", "more") and rows[0].kinds is None
    assert [m["role"] for m in rows[2].messages] == ["system", "user", "assistant", "user", "assistant"]
    assert all(count_images(r.messages) == len(r.images) for r in rows)
    with pytest.raises(AttributeError):
        rows[0].id = "other"


def test_rows_that_name_their_image_and_rows_that_do_not_share_a_batch(folder):
    """The processor takes such a batch only if every <image> is written; alone, each row gives what the raw one gives."""
    raw = [row(), row("b.png", said("What?", "This.")), row(["c.png", "d.png"], said("<image> or <image>?", "So."))]
    tokenizer = BPETokenizer.train(["What? This. A thing. or So."], 270, ["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = "chatml"
    processor = MllamaImageProcessor(tokenizer, 2, 8, add_location_tokens=False)
    rows = read(folder, raw)
    batch = processor(None, [list(r.images) for r in rows], [r.messages for r in rows])
    for k, (r, one) in enumerate(zip(rows, raw, strict=True)):
        alone = processor.conversation(one, [str(path) for path in r.images])
        length = alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][k, :length], alone["input_ids"][0])
        assert torch.equal(batch["labels"][k, :length], alone["labels"][0])
    assert batch["pixel_values"].shape[0] == 4


MALFORMED = [
    (None, "row"), (3, "row"), ("text", "row"), ([GOOD], "row"), (True, "row"),
    ({}, "conversations"), (row(turns=3), "conversations"), (row(turns={"from": "human"}), "conversations"),
    (row(turns="hello"), "conversations"), ({"conversations": []}, "conversations"),
    (row(turns=[None]), "conversations[0]"), (row(turns=["hi"]), "conversations[0]"), (row(turns=[[]]), "conversations[0]"),
    (row(turns=[{"value": "?"}]), "conversations[0].from"), (row(turns=[{"from": 1, "value": "?"}]), "conversations[0].from"),
    (row(turns=[{"from": ["human"], "value": "?"}]), "conversations[0].from"),
    (row(turns=[{"from": "bot", "value": "?"}]), "conversations[0].from"),
    (row(turns=[{"from": "human"}]), "conversations[0].value"), (row(turns=said("?", None)), "conversations[1].value"),
    (row(turns=said({"text": "?"}, "x")), "conversations[0].value"), (row(turns=said("?", True)), "conversations[1].value"),
    (row(turns=said("?", "half \ud800")), "conversations[1].value"),
    (row(turns=said("<image>", "")), "conversations[1].value"), (row(turns=said("<image>", " \n")), "conversations[1].value"),
    (row(turns=said("Draw.", "<image>")), "conversations[1].value"),
    (row(turns=said("<image>", "x", "y")), "conversations[2]"), (row(turns=said("<image>")), "conversations[0]"),
    (row(turns=said("<image>", "x")[::-1]), "conversations[1]"),  # without gpt's first turn there is no answer
    (row(turns=said("a", "b")[:1] * 2 + said("a", "b")[1:]), "conversations[1].from"),
    (row(turns=said("a", "b") + said("a", "b")[1:]), "conversations[2].from"),
    (row(turns=said("a", "b") + [{"from": "system", "value": "x"}]), "conversations[2].from"),
    (row(turns=[{"from": "system", "value": "x"}]), "conversations[0]"),
    (row(id=True), "id"), (row(id=["x"]), "id"), (row(id={"a": 1}), "id"),
    (row(3), "image"), (row(True), "image"), (row({"name": "a.png"}), "image"), (row(""), "image"), (row("a\0.png"), "image"),
    (row("\ud83d.png"), "image"), (row(["a.png", 3]), "image[1]"), (row([None]), "image[0]"), (row([["a.png"]]), "image[0]"),
    (row("../data.json"), "image"), (row(".."), "image"), (row("x/../../a.png"), "image"), (row("/etc/hostname"), "image"),
    (row("C:\\a.png"), "image"), (row(["a.png", "../b.png"], said("<image><image>", "x")), "image[1]"),
    (row("no.png"), "image"), (row("."), "image"), (row("n" * 5000), "image"), (row("data.json"), "image"),
    (row(["a.png", "no.png"], said("<image><image>", "x")), "image[1]"),
    (row("no.png", id=[1]), "id"),  # the first problem of a row is the one that is told
    (row(["a.png", "b.png"]), "image"), (row([]), "image"),
    (row(None), "image"), (row(turns=said("<image><image>", "x")), "image"),
    (row(kinds="one"), "kinds"), (row(kinds=["a", "b"]), "kinds"), (row(kinds=[True]), "kinds[0]"),
    (row(kinds={"a": 1}), "kinds"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "field"), MALFORMED)
def test_a_malformed_row_is_dropped_and_named(folder, bad, field):
    rows = read(folder, [GOOD, bad, GOOD])
    assert [r.number for r in rows] == [1, 3] and rows.total == 3
    ((number, where, what),) = rows.problems
    assert (number, where) == (2, field)
    report = rows.report().splitlines()
    assert len(report) == 2 and "3 rows, 2 usable" in report[0] and report[1] == f"row 2, {field}: {what}"
    assert len(what) < 200
    rows.report().encode()  # it can be printed, whatever the row held


@pytest.mark.parametrize("name", ["../a.png", "x/../../a.png", "{absolute}"])
def test_no_name_leads_out_of_the_images_folder_even_to_a_whole_image(folder, name):
    (folder / "x").mkdir()
    rows = [row(name.format(absolute=(folder / "a.png").resolve())), row(None, said("text", "x"))]
    ((number, field, what),) = read(folder, rows, images_dir=folder / "x").problems
    assert (number, field) == (1, "image") and ("leaves the images folder" in what or "absolute path" in what)


BROKEN_FILES = {
    "empty": (b"", "empty"),
    "text": (b"this is no image", "not an image"),
    "cut in the header": (image_bytes()[:20], None),
    "thin": (image_bytes(size=(2010, 10)), "thin a strip"),
    "a program's format": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
}


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_a_image_whose_header_is_of_no_use_costs_its_row(folder, kind):
    data, words = BROKEN_FILES[kind]
    (folder / "bad.png").write_bytes(data)
    rows = read(folder, [row("bad.png"), GOOD, row("bad.png")])
    assert [r.number for r in rows] == [2] and [number for number, *_ in rows.problems] == [1, 3]
    assert "'bad.png' " in rows.problems[0][2] and (words or "") in rows.problems[0][2]


def test_a_gigantic_image_or_a_pipe_is_refused_without_a_warning_or_a_wait(folder, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # of the 96 that the others have
    (folder / "big.png").write_bytes(image_bytes(size=(12, 9)))
    (folder / "bomb.png").write_bytes(image_bytes(size=(120, 9)))
    os.mkfifo(folder / "pipe.png")
    rows = read(folder, [row("big.png"), row("bomb.png"), row("pipe.png"), GOOD])
    what = [what for *_, what in rows.problems]
    assert "12x9 pixels, more than 100" in what[0] and "cannot be opened" in what[1] and "is not a file" in what[2]
    assert not len(recwarn)


def test_the_report_tells_ten_problems_in_order_and_counts_the_rest(folder):
    rows = read(folder, [GOOD] + [row("no.png") if i % 2 else None for i in range(1234)])
    lines = rows.report().splitlines()
    assert "1,235 rows, 1 usable" in lines[0] and lines[-1] == "and 1,224 more" and len(lines) == 12
    assert [line.split(",")[0] for line in lines[1:-1]] == [f"row {n}" for n in range(2, 12)]
    assert len(read(folder, [None] * 10 + [GOOD]).report().splitlines()) == 11


DAMAGED_FILES = [
    (b"", "is not valid JSON"), (b"[{", "cut off"), (json.dumps([GOOD] * 9).encode()[:-40], "cut off"),
    (b"\xff\xfe[]", "is not valid JSON"), (b"[" * 100_000, "nested too deeply"),
    (b'{"rows": []}', "holds an object"), (b"3", "holds a number"), (b"null", "not a list"), (b"[]", "0 rows"),
    (b"{}\n{}\n", "name it .jsonl"), (b"[null, 3]", "2 rows and none is usable; the first, row 1, row:"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "words"), DAMAGED_FILES)
def test_a_file_of_no_use_is_one_clear_line(tmp_path, content, words):
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(ValueError, match="data.json") as error:
        LlavaRows.read(tmp_path / "data.json")
    message = str(error.value)
    assert words in message and "\n" not in message and len(message) < 300 + len(str(tmp_path))


def test_what_is_not_there_is_a_file_not_found(folder):
    with pytest.raises(FileNotFoundError, match="none.json does not exist"):
        LlavaRows.read(folder / "none.json")
    for images in ("none", "a.png"):
        with pytest.raises(FileNotFoundError, match=f"{images} is no folder"):
            read(folder, [GOOD], images_dir=folder / images)
    with pytest.raises(ValueError, match="is a folder: name a file in it, such as .*data.json"):
        LlavaRows.read(folder)


def test_json_lines_lose_only_the_line_that_is_damaged(folder):
    line = json.dumps(row(turns=said("<image>", "a\u2028line end of another sort")), ensure_ascii=False).encode()
    parts = [b"\xef\xbb\xbf" + line, b"", line + b"\r", b"\xff" + line, line, line[:-30]]
    (folder / "data.jsonl").write_bytes(b"\n".join(parts))
    rows = LlavaRows.read(folder / "data.jsonl")
    assert [r.number for r in rows] == [1, 3, 5] and rows.total == 5
    assert [problem[:2] for problem in rows.problems] == [(4, "line"), (6, "line")]
    assert "cut off" in rows.problems[1][2] and len(rows.report().splitlines()) == 3
    assert rows[0].messages[1]["content"] == "a\u2028line end of another sort"


def test_images_are_looked_for_beside_the_file_and_in_its_images_folder(folder):
    (folder / "images" / "deep").mkdir(parents=True)
    (folder / "images" / "deep" / "z.png").write_bytes(image_bytes())
    assert read(folder, [GOOD]).folder == folder
    assert read(folder, [row("deep/z.png"), row(["deep/z.png"]), row("a.png")]).folder == folder / "images"
    assert read(folder, [row("images/deep/z.png")]).folder == folder
    assert len(read(folder, [row("z.png")], images_dir=str(folder / "images" / "deep"))) == 1


def test_each_image_is_opened_once_and_the_bar_counts_them(folder, capsys, monkeypatch):
    opened = Counter()
    check = llava.header_problem
    monkeypatch.setattr(llava, "header_problem", lambda path: opened.update([path.name]) or check(path))
    read(folder, [row(f"{name}.png") for name in "abcabc"], progress=True)
    assert opened == {"a.png": 1, "b.png": 1, "c.png": 1} and "3/3" in capsys.readouterr().err
    read(folder, [GOOD])
    assert capsys.readouterr() == ("", "")


# ---- subsets, splits, questions ----


def test_a_split_keeps_every_image_on_one_side(folder):
    """Among them a chain: a row with both images of two others ties all three together."""
    both = said("<image><image>", "x")
    raw = [row("a.png"), row("b.png"), row("c.png"), row(["b.png", "c.png"], both), row("./a.png"), row("d.png"), row("e.png")]
    raw += [row(None, said("text", "x"))] * 3
    rows, sides = read(folder, raw), set()
    for seed in range(20):
        train, held = rows.split(0.3, seed)
        assert sorted(r.number for r in [*train, *held]) == list(range(1, 11)) and len(train) and len(held)
        assert not {path for r in train for path in r.images} & {path for r in held for path in r.images}
        assert 1 <= len(held) <= 4
        for part in (train, held):
            assert [r.number for r in part] == sorted(r.number for r in part)
        assert held.rows == rows.split(0.3, seed)[1].rows
        sides.add(tuple(r.number for r in held))
    assert len(sides) > 5 and set().union(*sides) == set(range(1, 11))


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.9, 0.999])
def test_the_held_out_part_has_the_size_asked_for(folder, fraction):
    rows = read(folder, [row(None, said("text", "x"))] * 200)
    assert len(rows.split(fraction, 0)[1]) == min(max(round(200 * fraction), 1), 199)
    few = read(folder, [GOOD] * 9 + [row("b.png")])
    assert [len(part) for part in few.split(fraction, 0)] in ([9, 1], [1, 9])


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 2, float("nan")])
def test_a_split_that_cannot_be_is_refused(folder, fraction):
    with pytest.raises(ValueError, match="cannot hold out"):
        read(folder, [GOOD, row("b.png")]).split(fraction, 0)
    with pytest.raises(ValueError, match="cannot hold out"):
        read(folder, [GOOD, GOOD]).split(0.5, 0)


def test_a_subset_has_the_rows_asked_for(folder):
    rows = read(folder, [row(f"{name}.png", id=name) for name in "abc"] + [None])
    some = rows.subset(np.array([2, 0]))
    assert [r.id for r in some] == ["c", "a"] and some.report() == rows.report() and len(rows) == 3


def test_questions_end_before_their_answers(folder):
    turns = said("<image> What?", "A.", "And <image>?", "B.", system="Be short.")
    rows = read(folder, [row(["a.png", "b.png"], turns, kinds=["x", "y"]), GOOD])
    first, second = questions_of_row(rows[0])
    assert first == (rows[0].messages[:2], "A.", "x") and second == (rows[0].messages[:4], "B.", "y")
    assert [count_images(messages) for messages, *_ in (first, second)] == [1, 2]
    assert [kind for *_, kind in questions_of_row(rows[1])] == ["answer"]


def test_exported_scenes_are_read_whole(tmp_path):
    said = convert_scenes(tmp_path / "out", "test", 3)
    rows = LlavaRows.read(tmp_path / "out" / "scenes.json")
    every = [question for r in rows for question in questions_of_row(r)]
    assert len(rows) == 3 and not rows.problems and f"3 scenes, {len(every)} questions" in said
    assert {kind for *_, kind in every} <= set(KINDS)


# ---- pixels ----

IMAGE_FILES = {
    "png": image_bytes(1), "tall": image_bytes(2, (9, 31)),
    "clear": image_bytes(3, mode="RGBA"), "grey": image_bytes(4, mode="L"),
    "jpeg": image_bytes(5, (80, 60), kind="JPEG"), "large jpeg": image_bytes(6, (640, 480), kind="JPEG"),
    "turned": image_bytes(7, (40, 20), kind="JPEG", exif=(lambda e: e.__setitem__(0x0112, 6) or e)(Image.Exif())),
}  # fmt: skip
SETTINGS = [
    {"image_size": 16},
    {"image_size": (9, 14), "image_mean": (0.48, 0.46, 0.41), "resample": "bilinear", "do_pad_square": True},
    {"image_size": (32, 32), "image_std": (1.0, 0.5, 2.0), "size": {"shortest_edge": 40}, "fit": "crop"},
    {"image_size": 16, "resample": "lanczos", "size": {"longest_edge": 40}, "fit": "tiles"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_pixels_are_those_of_process_images(tmp_path, settings):
    settings = ImageSettings(**settings)
    cache = ImageCache(settings)
    paths = [tmp_path / name for name in IMAGE_FILES]
    for path, data in zip(paths, IMAGE_FILES.values(), strict=True):
        path.write_bytes(data)
    expected = process_images(paths, settings)
    for again in range(2):  # decoded, then kept
        found = [cache[str(path) if again else path] for path in paths]
        assert all(pixels.dtype == torch.float32 for pixels in found)
        assert torch.equal(torch.cat(found), expected)
        assert [len(pixels) for pixels in found] == [tile_count(cache.tiling(path)) for path in paths]
    found[0].zero_()  # what was handed out is the caller's
    assert torch.equal(cache[paths[0]], expected[: len(found[0])])


@pytest.fixture
def decoded(monkeypatch):
    """How often each image was decoded."""
    count, decode = Counter(), image_cache.to_pixels
    monkeypatch.setattr(image_cache, "to_pixels", lambda path, *how: count.update([path.name]) or decode(path, *how))
    return count


def test_images_are_decoded_once_while_there_is_room(folder, decoded):
    paths, room = [folder / f"{name}.png" for name in "abcdef"], 4 * 3 * 8 * 8
    cache = ImageCache(8, most_bytes=room + 5)
    first = [cache[path] for path in paths]
    again = [cache[path] for path in paths]
    assert [decoded[path.name] for path in paths] == [1, 1, 1, 1, 2, 2]
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_threads_fill_the_cache_and_stop_when_it_is_full(folder, decoded, workers):
    paths = [folder / f"{name}.png" for name in "abcdef"]
    cache = ImageCache(8)
    cache.load([*paths, *map(str, paths)], workers)
    cache.load(paths, workers)
    assert torch.equal(torch.cat([cache[path] for path in paths]), process_images(paths, (8, 8)))
    assert decoded == {path.name: 1 for path in paths}
    small = ImageCache(8, most_bytes=2 * 3 * 8 * 8)
    small.load(paths, workers)
    assert sum(decoded.values()) - 6 <= 2 + workers  # each thread may be at one when the room runs out


def test_a_image_that_fails_later_is_counted_once_and_passed_over(folder, decoded):
    whole = image_bytes(9, (64, 64))
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])  # its header is whole
    rows = read(folder, [row("cut.png"), row("a.png"), row("b.png")])
    assert not rows.problems
    (folder / "a.png").unlink()
    cache, paths = ImageCache(8), [r.images[0] for r in rows]
    cache.load(paths, 2)
    for _ in range(2):
        assert [cache[path] is None for path in paths] == [True, True, False]
    assert set(cache.unreadable) == set(paths[:2]) and decoded["cut.png"] == decoded["a.png"] == 1
    assert "cannot be decoded" in cache.unreadable[paths[0]] and "No such file" in cache.unreadable[paths[1]]
    (folder / "thin.png").write_bytes(image_bytes(size=(2010, 10)))
    assert cache[folder / "thin.png"] is None and "thin" in cache.unreadable[folder / "thin.png"]


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="resample"):
        ImageCache(ImageSettings(8, resample="sharp"))
