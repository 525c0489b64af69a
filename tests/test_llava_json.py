"""Laws of llava_json.py: a bad row is named and dropped, never met later; pictures stay on one side; pixels are the
processor's; converters write all or nothing, and nowhere else."""

import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import llava as llava_json
from data import scenes
from data.llava import LlavaRows, PictureCache, count_images, easy_vqa_kind, main, questions
from lib.run import run_cli
from lib.tokenizer import BPETokenizer
from processing_mllama import MllamaImageProcessor, process_images

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def picture(seed: int = 0, size=(12, 8), mode: str = "RGB", kind: str = "PNG", **options) -> bytes:
    values = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


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
        (tmp_path / f"{name}.png").write_bytes(picture(seed))
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
        row(None, said("No picture.", "None."), id=None, kinds=None),
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


def test_rows_that_name_their_picture_and_rows_that_do_not_share_a_batch(folder):
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
    (row(turns=said({"text": "?"}, "x")), "conversations[0].value"), (row(turns=said("?", 5)), "conversations[1].value"),
    (row(turns=said("?", "half \ud800")), "conversations[1].value"),
    (row(turns=said("<image>", "")), "conversations[1].value"), (row(turns=said("<image>", " \n")), "conversations[1].value"),
    (row(turns=said("Draw.", "<image>")), "conversations[1].value"),
    (row(turns=said("<image>", "x", "y")), "conversations[2]"), (row(turns=said("<image>")), "conversations[0]"),
    (row(turns=said("<image>", "x")[::-1]), "conversations[0].from"),
    (row(turns=said("a", "b")[:1] * 2 + said("a", "b")[1:]), "conversations[1].from"),
    (row(turns=said("a", "b") + said("a", "b")[1:]), "conversations[2].from"),
    (row(turns=said("a", "b") + [{"from": "system", "value": "x"}]), "conversations[2].from"),
    (row(turns=[{"from": "system", "value": "x"}]), "conversations[0]"),
    (row(id=1.5), "id"), (row(id=True), "id"), (row(id=["x"]), "id"), (row(id={}), "id"),
    (row(3), "image"), (row(True), "image"), (row({"path": "a.png"}), "image"), (row(""), "image"), (row("a\0.png"), "image"),
    (row("\ud83d.png"), "image"), (row(["a.png", 3]), "image[1]"), (row([None]), "image[0]"), (row([["a.png"]]), "image[0]"),
    (row("../data.json"), "image"), (row(".."), "image"), (row("x/../../a.png"), "image"), (row("/etc/hostname"), "image"),
    (row("C:\\a.png"), "image"), (row(["a.png", "../b.png"], said("<image><image>", "x")), "image[1]"),
    (row("no.png"), "image"), (row("."), "image"), (row("n" * 5000), "image"), (row("data.json"), "image"),
    (row(["a.png", "no.png"], said("<image><image>", "x")), "image[1]"),
    (row("no.png", id=[]), "id"),  # the first problem of a row is the one that is told
    (row(["a.png", "b.png"]), "image"), (row(["a.png", "b.png"], said("none", "x")), "image"), (row([]), "image"),
    (row(None), "image"), (row(turns=said("<image><image>", "x")), "image"),
    (row(kinds="one"), "kinds"), (row(kinds=[]), "kinds"), (row(kinds=["a", "b"]), "kinds"), (row(kinds=[3]), "kinds[0]"),
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
def test_no_name_leads_out_of_the_images_folder_even_to_a_whole_picture(folder, name):
    (folder / "x").mkdir()
    rows = [row(name.format(absolute=(folder / "a.png").resolve())), row(None, said("text", "x"))]
    ((number, field, what),) = read(folder, rows, images_dir=folder / "x").problems
    assert (number, field) == (1, "image") and ("leaves the images folder" in what or "absolute path" in what)


BROKEN_FILES = {
    "empty": (b"", "empty"),
    "text": (b"this is no picture", "not a picture"),
    "cut in the header": (picture()[:20], None),
    "thin": (picture(size=(2010, 10)), "thin a strip"),
    "a program's format": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
}


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_a_picture_whose_header_is_of_no_use_costs_its_row(folder, kind):
    data, words = BROKEN_FILES[kind]
    (folder / "bad.png").write_bytes(data)
    rows = read(folder, [row("bad.png"), GOOD, row("bad.png")])
    assert [r.number for r in rows] == [2] and [number for number, *_ in rows.problems] == [1, 3]
    assert "'bad.png' " in rows.problems[0][2] and (words or "") in rows.problems[0][2]


def test_a_gigantic_picture_or_a_pipe_is_refused_without_a_warning_or_a_wait(folder, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # of the 96 that the others have
    (folder / "big.png").write_bytes(picture(size=(12, 9)))
    (folder / "bomb.png").write_bytes(picture(size=(120, 9)))
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
    with pytest.raises(ValueError, match="is not a file"):
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


def test_pictures_are_looked_for_beside_the_file_and_in_its_images_folder(folder):
    (folder / "images" / "deep").mkdir(parents=True)
    (folder / "images" / "deep" / "z.png").write_bytes(picture())
    assert read(folder, [GOOD]).folder == folder
    assert read(folder, [row("deep/z.png"), row(["deep/z.png"]), row("a.png")]).folder == folder / "images"
    assert read(folder, [row("images/deep/z.png")]).folder == folder
    assert len(read(folder, [row("z.png")], images_dir=str(folder / "images" / "deep"))) == 1


def test_each_picture_is_opened_once_and_the_bar_counts_them(folder, capsys, monkeypatch):
    opened = Counter()
    check = llava_json.header_problem
    monkeypatch.setattr(llava_json, "header_problem", lambda path: opened.update([path.name]) or check(path))
    read(folder, [row(f"{name}.png") for name in "abcabc"], progress=True)
    assert opened == {"a.png": 1, "b.png": 1, "c.png": 1} and "3/3" in capsys.readouterr().err
    read(folder, [GOOD])
    assert capsys.readouterr() == ("", "")


# ---- subsets, splits, questions ----


def test_a_split_keeps_every_picture_on_one_side(folder):
    """Among them a chain: a row with both pictures of two others ties all three together."""
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
    first, second = questions(rows[0])
    assert first == (rows[0].messages[:2], "A.", "x") and second == (rows[0].messages[:4], "B.", "y")
    assert [count_images(messages) for messages, *_ in (first, second)] == [1, 2]
    assert [kind for *_, kind in questions(rows[1])] == ["answer"]


def test_exported_scenes_are_read_whole(tmp_path):
    asked = scenes.export(tmp_path / "out", "test", 3)
    rows = LlavaRows.read(tmp_path / "out" / "scenes.json")
    every = [question for r in rows for question in questions(r)]
    assert len(rows) == 3 and not rows.problems and len(every) == asked and {kind for *_, kind in every} <= set(scenes.KINDS)


# ---- pixels ----

PICTURES = {
    "png": picture(1), "tall": picture(2, (9, 31)), "clear": picture(3, mode="RGBA"), "grey": picture(4, mode="L"),
    "jpeg": picture(5, (80, 60), kind="JPEG"), "large jpeg": picture(6, (640, 480), kind="JPEG"),
    "turned": picture(7, (40, 20), kind="JPEG", exif=(lambda e: e.__setitem__(0x0112, 6) or e)(Image.Exif())),
}  # fmt: skip
SETTINGS = [
    (16, (0.5,) * 3, (0.5,) * 3, "bicubic", False),
    ((9, 14), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), "bilinear", True),
    ((32, 32), (0.1, 0.2, 0.3), (1.0, 0.5, 2.0), "lanczos", False),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_pixels_are_those_of_process_images(tmp_path, settings):
    size, mean, std, resample, pad = settings
    cache = PictureCache(*settings)
    paths = [tmp_path / name for name in PICTURES]
    for path, data in zip(paths, PICTURES.values(), strict=True):
        path.write_bytes(data)
    expected = process_images(paths, cache.image_size, resample, mean, std, pad)
    for again in range(2):  # decoded, then kept
        found = [cache[str(path) if again else path] for path in paths]
        assert all(pixels.dtype == torch.float32 for pixels in found)
        assert torch.equal(torch.stack(found), expected)
    found[0].zero_()  # what was handed out is the caller's
    assert torch.equal(cache[paths[0]], expected[0])


@pytest.fixture
def decoded(monkeypatch):
    """How often each picture was decoded."""
    count, decode = Counter(), llava_json.fit
    monkeypatch.setattr(llava_json, "fit", lambda path, *how: count.update([path.name]) or decode(path, *how))
    return count


def test_pictures_are_decoded_once_while_there_is_room(folder, decoded):
    paths, room = [folder / f"{name}.png" for name in "abcdef"], 4 * 3 * 8 * 8
    cache = PictureCache(8, most_bytes=room + 5)
    first = [cache[path] for path in paths]
    again = [cache[path] for path in paths]
    assert [decoded[path.name] for path in paths] == [1, 1, 1, 1, 2, 2]
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_threads_fill_the_cache_and_stop_when_it_is_full(folder, decoded, workers):
    paths = [folder / f"{name}.png" for name in "abcdef"]
    cache = PictureCache(8)
    cache.load([*paths, *map(str, paths)], workers)
    cache.load(paths, workers)
    assert torch.equal(torch.stack([cache[path] for path in paths]), process_images(paths, (8, 8)))
    assert decoded == {path.name: 1 for path in paths}
    small = PictureCache(8, most_bytes=2 * 3 * 8 * 8)
    small.load(paths, workers)
    assert sum(decoded.values()) - 6 <= 2 + workers  # each thread may be at one when the room runs out


def test_a_picture_that_fails_later_is_counted_once_and_passed_over(folder, decoded):
    whole = picture(9, (64, 64))
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])  # its header is whole
    rows = read(folder, [row("cut.png"), row("a.png"), row("b.png")])
    assert not rows.problems
    (folder / "a.png").unlink()
    cache, paths = PictureCache(8), [r.images[0] for r in rows]
    cache.load(paths, 2)
    for _ in range(2):
        assert [cache[path] is None for path in paths] == [True, True, False]
    assert set(cache.unreadable) == set(paths[:2]) and decoded["cut.png"] == decoded["a.png"] == 1
    assert "cannot be decoded" in cache.unreadable[paths[0]] and "No such file" in cache.unreadable[paths[1]]
    (folder / "thin.png").write_bytes(picture(size=(2010, 10)))
    assert cache[folder / "thin.png"] is None and "thin" in cache.unreadable[folder / "thin.png"]


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="resample"):
        PictureCache(8, resample="nearest")


# ---- command line ----


@pytest.mark.parametrize(("rows", "code"), [([GOOD], 0), ([GOOD, None], 1), ([None], 2), ([], 2)])
def test_the_exit_code_says_how_good_a_file_is(folder, capsys, rows, code):
    (folder / "data.json").write_text(json.dumps(rows))
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: main(["check", str(folder / "data.json"), "--images", str(folder)]))
    out, err = capsys.readouterr()
    assert stop.value.code == code and len(err.splitlines()) == (code == 2) and len(out.splitlines()) == (1, 2, 0)[code]


# ---- the two data sets ----


def as_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def as_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


ASKED = [
    ["what is the blue shape?", "circle", 0],
    ["is there not a circle?", "no", 1],
    ["what color is the circle?", "blue", 0],
]
PHOTOS = [
    {"file_name": f"{k}.jpg", "license": f"CC {k}", "flickr_url": f"http://x/{k}", "captions": [f"Photo {k}\n.", "Again."]}
    for k in range(6)
]


def easy(train=ASKED, prefix: str = "easy_vqa/data/", **more) -> dict[str, bytes]:
    files = {f"{part}/questions.json": json.dumps(rows).encode() for part, rows in (("train", train), ("test", ASKED[:1]))}
    files |= {"train/images/0.png": picture(0), "train/images/1.png": picture(1), "test/images/0.png": picture(2)}
    return {prefix + name: data for name, data in files.items()} | {"LICENSE": b"MIT"} | more


def coco(photos=PHOTOS) -> dict[str, bytes]:
    return {"annotations.json": json.dumps(photos).encode()} | {f"images/{k}.jpg": picture(k, kind="JPEG") for k in range(6)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("pack", [as_tar, as_folder])
@pytest.mark.parametrize("prefix", ["", "./", "easy_vqa/data/"])
def test_easy_vqa_becomes_a_row_per_picture(tmp_path, pack, prefix):
    source = pack(tmp_path / "source", easy(prefix=prefix))
    main(["easy-vqa", str(source), str(tmp_path / "out")])
    rows = LlavaRows.read(tmp_path / "out" / "train.json")
    assert [r.id for r in rows] == ["train-0", "train-1"] and not rows.problems
    assert rows[0].messages == [
        {"role": "user", "content": "<image>\nwhat is the blue shape?"}, {"role": "assistant", "content": "circle"},
        {"role": "user", "content": "what color is the circle?"}, {"role": "assistant", "content": "blue"},
    ]  # fmt: skip
    assert [r.kinds for r in rows] == [("shape", "colour"), ("absent",)]
    written = contents(tmp_path / "out")
    assert set(written) == {
        "train.json",
        "test.json",
        "LICENSE",
        *(f"images/{x}.png" for x in ("train/0", "train/1", "test/0")),
    }
    assert written["images/test/0.png"] == picture(2)


@pytest.mark.parametrize("pack", [as_tar, as_folder])
def test_coco_photos_stay_on_one_side_with_their_credit(tmp_path, pack):
    source = pack(tmp_path / "source", coco())
    main(["coco-captions", str(source), str(tmp_path / "out"), "--test-photos", "2"])
    train, test = (LlavaRows.read(tmp_path / "out" / f"{part}.json") for part in ("train", "test"))
    assert (len(train), len(test)) == (8, 4) and not {r.images for r in train} & {r.images for r in test}
    for r in [*train, *test]:
        k = r.images[0].stem
        assert r.messages[0]["content"] == "<image>\nDescribe the picture." and r.kinds == ("caption",)
        assert r.messages[1]["content"] in (f"Photo {k} .", "Again.") and r.images[0].read_bytes() == picture(
            int(k), kind="JPEG"
        )
    credit = json.loads((tmp_path / "out" / "credits.json").read_text())
    assert credit == {f"{k}.jpg": {"license": f"CC {k}", "source": f"http://x/{k}"} for k in range(6)}
    held = set()
    for seed in "01234":  # other seeds hold out other photos; the order in the file does not matter
        found = []
        for photos in (PHOTOS, PHOTOS[::-1]):
            source = as_tar(tmp_path / f"again{len(list(tmp_path.iterdir()))}.tar", coco(photos))
            target = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
            main(["coco-captions", str(source), str(target), "--test-photos", "2", "--seed", seed])
            found.append((target / "test.json").read_bytes())
        assert found[0] == found[1]
        held.add(found[0])
    assert len(held) > 2


def test_captions_of_a_photo_become_turns_when_asked(tmp_path, capsys):
    source = as_tar(tmp_path / "source.tar", coco())
    for row_per in ("caption", "photo"):
        main(["coco-captions", str(source), str(tmp_path / row_per), "--test-photos", "2", "--row-per", row_per])
    one, all_turns = (LlavaRows.read(tmp_path / name / "train.json") for name in ("caption", "photo"))
    asked = [turn for row in all_turns for turn in questions(row, isolated=True)]
    assert len(all_turns) == 4 and asked == [turn for row in one for turn in questions(row)]
    assert (tmp_path / "photo" / "test.json").read_bytes() == (tmp_path / "caption" / "test.json").read_bytes()
    said = [line.split(":")[1] for line in capsys.readouterr().out.splitlines()]
    assert said == [" 4 train photos with 8 captions, 2 test photos with 4"] * 2


@pytest.mark.parametrize("pack", [as_tar, as_folder])
def test_classes_become_captions(tmp_path, pack):
    files = {f"pets/{label}/{k}.png": picture(10 * (label == "cat") + k) for label in ("cat", "guinea_pig") for k in range(10)}
    files |= {"pets/notes.txt": b"of no class"}
    source = pack(tmp_path / "source", files)
    main(["classes", str(source), str(tmp_path / "out")])
    parts = {part: LlavaRows.read(tmp_path / "out" / f"{part}.json") for part in ("train", "test")}
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 18, "test": 2}
    seen = {}
    for row in [*parts["train"], *parts["test"]]:
        assert row.messages[0]["content"] == "<image>\nDescribe the picture." and row.kinds == ("class",)
        seen.setdefault(row.messages[1]["content"], set()).add(row.images[0].read_bytes())
    expected = {"A photo of a cat.": range(10, 20), "A photo of a guinea pig.": range(10)}
    assert seen == {caption: {picture(k) for k in numbers} for caption, numbers in expected.items()}
    few = ["--per-class", "3", "--question", "What?", "--caption", "{}!{"]  # a lone brace was a traceback
    main(["classes", str(source), str(tmp_path / "few"), *few])
    rows = LlavaRows.read(tmp_path / "few" / "train.json")
    found = Counter(tuple(message["content"] for message in row.messages) for row in rows)
    assert found == {("<image>\nWhat?", "cat!{"): 3, ("<image>\nWhat?", "guinea pig!{"): 3}


def photo(**changes) -> list[dict]:
    return [*PHOTOS[:3], PHOTOS[3] | changes]


BAD_SOURCES = [
    ("easy-vqa", {"other": b""}, "has no train/questions.json"),
    ("easy-vqa", easy([["?", "x", 2]]), "lacks easy_vqa/data/train/images/2.png"),
    ("easy-vqa", easy([["?", "x", "../../1"]]), "row 1 is not"), ("easy-vqa", easy([*ASKED, ["", "x", 0]]), "row 4 is not"),
    ("easy-vqa", easy([None]), "row 1 is not"), ("easy-vqa", easy({}), "is an object"), ("easy-vqa", easy([]), "is a list"),
    ("easy-vqa", easy(**{"easy_vqa/data/test/questions.json": b'[["wh'}), "cut off"),
    ("coco-captions", easy(), "has no annotations.json"), ("coco-captions", coco(PHOTOS[:2]), "16 test photos cannot"),
    ("classes", {"a.png": b"x"}, "0 training and 0 test pictures"), ("classes", {"cat/1.png": b"x"}, "1 training and 0 test"),
    ("classes --caption cat", {"cat/1.png": b"x"}, "has no {}"),
    ("coco-captions --test-photos 3", coco(PHOTOS[:3]), "ask for fewer"),
    ("coco-captions --test-photos 1", coco(PHOTOS[:2] * 2), "ask for fewer"),
    ("coco-captions --test-photos 1", coco(photo(file_name="9.jpg")), "lacks images/9.jpg"),
] + [
    ("coco-captions --test-photos 1", coco(photo(**change)), "row 4 is not a photo")
    for change in (
        {"file_name": "../evil.jpg"}, {"file_name": "/tmp/evil.jpg"}, {"file_name": "..\\evil.jpg"}, {"file_name": ".."},
        {"file_name": ""}, {"file_name": 3}, {"license": None}, {"captions": []}, {"captions": ["", "x"]}, {"captions": "x"},
    )
]  # fmt: skip


@pytest.mark.parametrize(("command", "files", "words"), BAD_SOURCES)
def test_a_bad_source_is_one_line_and_leaves_nothing(tmp_path, capsys, command, files, words):
    source = as_tar(tmp_path / "source.tar", files)
    name, *options = command.split()
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: main([name, str(source), str(tmp_path / "deep" / "out"), *options]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert contents(tmp_path) == {"source.tar": source.read_bytes()}


def test_members_that_climb_and_links_are_not_followed(tmp_path):
    """A member named ../../evil is only a name; a link in an archive is no way to a file outside it."""
    (tmp_path / "secret").write_bytes(picture(99))
    source = as_tar(tmp_path / "a.tar", easy(**{"../evil.png": b"evil", "/tmp/evil-llava.png": b"evil"}))
    main(["easy-vqa", str(source), str(tmp_path / "in" / "out")])
    assert not list(tmp_path.rglob("evil*")) and not Path("/tmp/evil-llava.png").exists()
    with tarfile.open(source, "a") as archive:
        link = tarfile.TarInfo("easy_vqa/data/train/images/0.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        archive.addfile(link)
    with pytest.raises(ValueError, match="0.png cannot be read"):
        main(["easy-vqa", str(source), str(tmp_path / "second")])
    assert not (tmp_path / "second").exists()


def test_a_folder_that_holds_something_is_not_touched(tmp_path, monkeypatch):
    source, out = as_tar(tmp_path / "a.tar", coco()), tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    command = ["coco-captions", str(source), str(out), "--test-photos", "1"]
    with pytest.raises(FileExistsError, match="exists already"):
        main(command)
    assert contents(out) == {"mine": b"mine"}
    (out / "mine").unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(llava_json, "write_json", full)
        with pytest.raises(OSError, match="No space left"):
            main(command)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "out"]
    main(command)  # an empty folder is as good as none
    assert (out / "credits.json").exists()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        main(["easy-vqa", str(tmp_path / "none.tar"), str(tmp_path / "third")])


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("what color is the shape?", "colour"), ("what is the colour of the circle?", "colour"),
        ("what is the red shape?", "shape"),
        ("what shape is present?", "shape"), ("is there a circle?", "exists"), ("does it contain a red shape?", "exists"),
        ("is no red shape present?", "absent"), ("does the image not contain a circle?", "absent"),
    ],
)  # fmt: skip
def test_kinds_of_easy_vqa(question, kind):
    assert easy_vqa_kind(question) == kind


@pytest.mark.skipif(not (SHARED / "easy_vqa.tar").exists(), reason="the shared data folder with easy_vqa.tar is absent")
def test_the_real_easy_vqa(tmp_path):
    main(["easy-vqa", str(SHARED / "easy_vqa.tar"), str(tmp_path / "out")])
    rows, answers = LlavaRows.read(tmp_path / "out" / "test.json"), {}
    every = [question for r in rows for question in questions(r)]
    assert (len(rows), len(every)) == (1000, 9673) and not rows.problems
    for _, answer, kind in every:
        answers.setdefault(kind, set()).add(answer)
    train = json.loads((tmp_path / "out" / "train.json").read_bytes())
    assert (len(train), sum(len(r["kinds"]) for r in train)) == (4000, 38575)
    assert len(list((tmp_path / "out" / "images" / "train").iterdir())) == 4000
    colours = {"green", "red", "gray", "teal", "black", "yellow", "brown", "blue"}
    shapes = {"circle", "rectangle", "triangle"}
    assert answers == {"colour": colours, "shape": shapes, "exists": {"yes", "no"}, "absent": {"yes", "no"}}


COCO = SHARED / "coco_captions_permissive.tar"


@pytest.mark.skipif(not COCO.exists(), reason="the shared data folder with coco_captions_permissive.tar is absent")
def test_the_real_captions(tmp_path):
    main(["coco-captions", str(COCO), str(tmp_path / "out")])
    train, test = (LlavaRows.read(tmp_path / "out" / f"{part}.json") for part in ("train", "test"))
    assert (len(train), len(test)) == (335, 80) and not train.problems and not test.problems
    cache, paths = PictureCache(32), sorted({path for rows in (train, test) for r in rows for path in r.images})
    cache.load(paths[:8], 2)
    assert len(paths) == 83 and not cache.unreadable
    assert torch.equal(torch.stack([cache[path] for path in paths[:8]]), process_images(paths[:8], (32, 32)))
    assert set(json.loads((tmp_path / "out" / "credits.json").read_text())) == {path.name for path in paths}
