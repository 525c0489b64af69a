"""Laws of data/convert.py: converters write all or nothing, and nowhere else."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import convert
from data.convert import easy_vqa_kind, main
from data.datasets import load_images
from data.image_cache import ImageCache
from data.llava import LlavaRows, questions_of_row
from lib.cli import run_cli
from processing_mllama import process_images
from samples import image_bytes

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


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
    files |= {"train/images/0.png": image_bytes(0), "train/images/1.png": image_bytes(1), "test/images/0.png": image_bytes(2)}
    return {prefix + name: data for name, data in files.items()} | {"LICENSE": b"MIT"} | more


def coco(photos=PHOTOS) -> dict[str, bytes]:
    files = {f"images/{k}.jpg": image_bytes(k, kind="JPEG") for k in range(6)}
    return files | {"annotations.json": json.dumps(photos).encode()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("pack", [as_tar, as_folder])
@pytest.mark.parametrize("prefix", ["", "./", "easy_vqa/data/"])
def test_easy_vqa_becomes_a_row_per_image(tmp_path, pack, prefix):
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
    assert written["images/test/0.png"] == image_bytes(2)


@pytest.mark.parametrize("pack", [as_tar, as_folder])
def test_coco_photos_stay_on_one_side_with_their_credit(tmp_path, pack):
    source = pack(tmp_path / "source", coco())
    main(["coco-captions", str(source), str(tmp_path / "out"), "--test-photos", "2"])
    train, test = (LlavaRows.read(tmp_path / "out" / f"{part}.json") for part in ("train", "test"))
    assert (len(train), len(test)) == (8, 4) and not {r.images for r in train} & {r.images for r in test}
    for r in [*train, *test]:
        k = r.images[0].stem
        assert r.messages[0]["content"] == "<image>\nDescribe the picture." and r.kinds == ("caption",)
        assert r.messages[1]["content"] in (f"Photo {k} .", "Again.") and r.images[0].read_bytes() == image_bytes(
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
    asked = [turn for row in all_turns for turn in questions_of_row(row, isolated=True)]
    assert len(all_turns) == 4 and asked == [turn for row in one for turn in questions_of_row(row)]
    assert (tmp_path / "photo" / "test.json").read_bytes() == (tmp_path / "caption" / "test.json").read_bytes()
    said = [line.split(":")[1] for line in capsys.readouterr().out.splitlines()]
    assert said == [" 4 train photos with 8 captions, 2 test photos with 4"] * 2


@pytest.mark.parametrize("pack", [as_tar, as_folder])
def test_classes_become_captions(tmp_path, pack):
    first = {"cat": 10, "guinea_pig": 0}
    files = {f"pets/{label}/{k}.png": image_bytes(first[label] + k) for label in first for k in range(10)}
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
    assert seen == {caption: {image_bytes(k) for k in numbers} for caption, numbers in expected.items()}
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
    ("classes", {"a.png": b"x"}, "0 training and 0 test images"), ("classes", {"cat/1.png": b"x"}, "1 training and 0 test"),
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
    (tmp_path / "secret").write_bytes(image_bytes(99))
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
        patch.setattr(convert, "write_json", full)
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
    every = [question for r in rows for question in questions_of_row(r)]
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
    cache, paths = ImageCache(32), sorted({path for rows in (train, test) for r in rows for path in r.images})
    cache.load(paths[:8], 2)
    assert len(paths) == 83 and not cache.unreadable
    assert torch.equal(torch.cat([cache[path] for path in paths[:8]]), process_images(paths[:8], (32, 32)))
    assert set(json.loads((tmp_path / "out" / "credits.json").read_text())) == {path.name for path in paths}


def test_digits_are_named_in_words_in_the_split_of_the_classifier(tmp_path, capsys):
    main(["digits", str(tmp_path / "digits")])
    assert "1,437 train and 360 test images" in capsys.readouterr().out
    rows = json.loads((tmp_path / "digits" / "test.json").read_text())
    _, test = load_images("digits", image_size=16)
    words = "zero one two three four five six seven eight nine".split()
    assert [row["conversations"][1]["value"] for row in rows] == [words[label] for label in test.labels.tolist()]


# ---- captions ----------------------------------------------------------------------------------------------------------

SAID = {"a.jpg": ["A cat.", "A cat asleep ."], "b.jpg": ["Two dogs"]}
TOKENS = "a.jpg#0\tA cat.\na.jpg#1\tA cat  asleep .\r\nb.jpg#0\tTwo dogs\n"
COCO_SAID = {
    "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "b.jpg"}, {"id": 11, "file_name": "c.jpg"}],
    "annotations": [{"image_id": 7, "caption": "A cat."}, {"image_id": 9, "caption": "Two dogs\n"},
                    {"image_id": 7, "caption": "A cat asleep ."}],
}  # fmt: skip
KARPATHY = {"images": [
    {"filename": "a.jpg", "filepath": "val", "split": "restval", "sentences": [{"raw": text} for text in SAID["a.jpg"]]},
    {"filename": "b.jpg", "split": "test", "sentences": [{"raw": "Two dogs"}]},
]}  # fmt: skip
CAPTION_FILES = {
    "x.token.txt": (TOKENS, {"captions": SAID}),
    "captions.txt": ('image,caption\na.jpg,A cat.\na.jpg,A cat asleep .\nb.jpg,"Two dogs"\n', {"captions": SAID}),
    "captions_val2017.json": (json.dumps(COCO_SAID), {"captions": SAID}),
    "dataset_flickr8k.json": (json.dumps(KARPATHY), {"train": {"val/a.jpg": SAID["a.jpg"]}, "test": {"b.jpg": SAID["b.jpg"]}}),
    "dev.json": (json.dumps([{"image": name, "captions": texts} for name, texts in SAID.items()]), {"dev": SAID}),
}


def written_captions(folder: Path) -> dict[str, dict]:
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return {name: {row["image"]: row["captions"] for row in rows} for name, rows in found.items()}


@pytest.mark.parametrize("name", CAPTION_FILES)
def test_all_captions_of_a_photo_share_a_row(tmp_path, name):
    text, wanted = CAPTION_FILES[name]
    (tmp_path / name).write_text(text, newline="")
    main(["captions", str(tmp_path / name), str(tmp_path / "out")])
    found = written_captions(tmp_path / "out")
    assert found == {part: {image: [" ".join(text.split()) for text in texts] for image, texts in rows.items()}
                     for part, rows in wanted.items()}  # fmt: skip


def test_flickr_s_own_lists_split_its_captions(tmp_path):
    (tmp_path / "Flickr8k.token.txt").write_text(TOKENS)
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("a.jpg\nnone.jpg\n")
    (tmp_path / "Flickr_8k.devImages.txt").write_text("b.jpg\n")
    main(["captions", str(tmp_path / "Flickr8k.token.txt"), str(tmp_path / "out")])
    assert written_captions(tmp_path / "out") == {"train": {"a.jpg": SAID["a.jpg"]}, "dev": {"b.jpg": SAID["b.jpg"]}}


@pytest.mark.parametrize("pack", [as_tar, as_folder])
@pytest.mark.parametrize("prefix", ["", "./", "flickr/"])
def test_captioned_photos_become_rows_that_are_looked_at_once(tmp_path, pack, prefix):
    rows = [{"image": name, "captions": texts} for name, texts in SAID.items()]
    files = {"train.json": json.dumps(rows).encode(), "test.json": json.dumps(rows[:1]).encode()}
    files |= {f"images/{name}": image_bytes(k, kind="JPEG") for k, name in enumerate(SAID)}
    source = pack(tmp_path / "source", {prefix + name: content for name, content in files.items()})
    main(["captions", str(source), str(tmp_path / "out")])
    found = LlavaRows.read(tmp_path / "out" / "train.json")
    assert [len(row.conversations) for row in found] == [2, 1] and all(len(row.images) == 1 for row in found)
    assert contents(tmp_path / "out")["images/a.jpg"] == files["images/a.jpg"]


@pytest.mark.parametrize("spoil", [lambda tar, end: tar[:end], lambda tar, end: tar[:end] + b"?" + tar[end + 1 :]])
def test_a_tar_that_ends_early_is_refused(tmp_path, spoil):
    """Where it was cut between two files, or a header was damaged, tarfile ended there: there was no test.json, and no word."""
    rows = json.dumps([{"image": "a.jpg", "captions": ["A cat."]}]).encode()
    files = {"train.json": rows, "images/a.jpg": image_bytes(0, kind="JPEG"), "test.json": rows}
    source = as_tar(tmp_path / "source.tar", files)
    with tarfile.open(source) as archive:
        end = archive.getmember("test.json").offset
    source.write_bytes(spoil(source.read_bytes(), end))
    with pytest.raises(ValueError, match="cut off, or a header in it is damaged"):
        main(["captions", str(source), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_photos_come_once_more_in_a_mirror(tmp_path):
    photo = Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3))
    (tmp_path / "images" / "val").mkdir(parents=True)
    photo.save(tmp_path / "images" / "val" / "a.png")
    rows = [{"image": "val/a.png", "captions": ["A cat.", "One."]}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    main(["mirrored", str(tmp_path / "train.json"), str(tmp_path / "out")])
    found = LlavaRows.read(tmp_path / "out" / "train.json")
    seen, twin = (np.asarray(Image.open(row.images[0])) for row in found)
    assert (twin == seen[:, ::-1]).all() and (seen == np.asarray(photo)).all()
    assert [row.messages for row in found] == [found[0].messages] * 2 and not found.problems
    (tmp_path / "images" / "val" / "a.png").write_bytes(b"junk")
    with pytest.raises(ValueError, match="--images .*a.png: not an image"):
        main(["mirrored", str(tmp_path / "train.json"), str(tmp_path / "again")])
    assert not (tmp_path / "again").exists()


def test_the_splits_of_an_archive_are_all_written(tmp_path):
    """Karpathy's JSON beside its photos became one dataset.json, of the last split alone."""
    text, wanted = CAPTION_FILES["dataset_flickr8k.json"]
    photos = {f"images/{name}": image_bytes(0, kind="JPEG") for rows in wanted.values() for name in rows}
    source = as_tar(tmp_path / "source.tar", {"dataset_flickr8k.json": text.encode(), **photos})
    main(["captions", str(source), str(tmp_path / "out")])
    assert {part: [*rows] for part, rows in written_captions(tmp_path / "out").items()} == {k: [*v] for k, v in wanted.items()}


def test_a_first_photo_called_image_is_no_heading(tmp_path):
    """`image1.jpg#0<tab>A cat.` was taken for the names of the columns, and the caption left out without a word."""
    (tmp_path / "x.token").write_text("image1.jpg#0\tA cat, asleep.\nimage1.jpg#1\tA cat.\n")
    main(["captions", str(tmp_path / "x.token"), str(tmp_path / "out")])
    assert written_captions(tmp_path / "out") == {"captions": {"image1.jpg": ["A cat, asleep.", "A cat."]}}


@pytest.mark.parametrize("name, text, words", [
    ("x.json", "[]", "x.json would have no photo in it"), ("x.json", '{"images": ["a.jpg"]}', "image 1 is a text"),
    ("x.json", json.dumps({"images": [{"filename": "a.jpg", "split": ["train"], "sentences": ["x"]}]}), "split is a list"),
    ("x.json", json.dumps({"images": [{"id": [1], "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "x"}]}),
     "annotation 1"),
    ("x.json", json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": [1], "caption": "x"}]}),
     "annotation 1"),
    ("x.txt", "no captions here\n", "NAME#0, a tab and a caption"), ("x.txt", "\n", "holds no caption"),
    ("x.json", "{", "is not valid JSON"), ("x.json", "{}", "captions are read from"),
    ("x.json", json.dumps({"images": [{"id": 1}], "annotations": [{"image_id": 2, "caption": "x"}]}), "annotation 1"),
    ("x.json", '[{"image": "../a.jpg", "captions": ["x"]}]', "row 1 is not the name"),
    ("x.json", '[{"image": "a.jpg", "captions": [true]}]', "captions.0.: is true or false"),
    ("x.txt", "image,caption,split\na.jpg,A cat.,train\n", "has the columns image, caption, split"),
])  # fmt: skip
def test_what_holds_no_captions_is_refused(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        main(["captions", str(tmp_path / name), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
