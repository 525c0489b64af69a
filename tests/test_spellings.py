"""Laws of data/spellings.py and row_files.py: each known spelling of a row says the same as LLaVA's, and a row whose image
cannot be placed is left out and named, never trained as text alone."""

import base64
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.image_cache import ImageCache
from data.llava import LlavaRows
from data.row_values import RowError
from data.spellings import DESCRIBE, conversation_of, read_row
from processing_mllama import to_messages
from samples import image_bytes
from test_fuzz import spoiled

PNG = image_bytes(3)
PNG64 = base64.b64encode(PNG).decode()
DATA_URI = f"data:image/png;base64,{PNG64}"
ASKED = [("user", "<image>What?"), ("assistant", "A cat.")]
TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
MARKED = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}]
PART = {"type": "text", "text": "What?"}


def say(question="What?", answer="A cat.") -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def read(raw: dict, **more):
    notes = Counter()
    row = read_row(raw, notes, **more)
    return [(m["role"], m["content"]) for m in row.messages], row.images, row, notes


# A row of every spelling; all of them say: one image a.png, "What?", "A cat."
SAME = json.loads((Path(__file__).parent / "spellings.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SAME)
def test_every_spelling_says_the_same(name):
    said, images, row, _ = read(SAME[name])
    assert said == ASKED and images == ["a.png"] and not row.isolated


@pytest.mark.parametrize("image", [PNG, {"bytes": PNG, "path": None}, DATA_URI, {"url": DATA_URI}, bytearray(PNG)])
def test_images_that_are_no_files_are_bytes(image):
    assert read({"image": image, "question": "What?", "answer": "A cat."})[1] == [PNG]
    assert read({"messages": say([{"type": "image_url", "image_url": image}, PART])})[:2] == (ASKED, [PNG])
    large = base64.b64encode(image_bytes(1, (40, 30))).decode()
    assert read({"image": large, "caption": "x"})[1] == [image_bytes(1, (40, 30))]  # VLMEvalKit's columns


@pytest.mark.parametrize("name", [name for name in SAME if "image_url" not in str(SAME[name])])
def test_the_processor_reads_the_same_turns(name):
    """Its images come by themselves: the texts alone are read."""
    texts = [(m["role"], m["content"].split(">")[-1].split("]")[-1]) for m in to_messages(SAME[name])]
    assert texts == [("user", DESCRIBE if "caption" in name else "What?"), ("assistant", "A cat.")] or "caption" in name
    assert conversation_of(say()) == say()


def test_captions_of_an_image_are_questions_apart_from_each_other():
    """As turns of one conversation, the second caption would be learned with the first in sight."""
    for key in ("captions", "caption", "sentences"):
        given = ["A cat.", "A cat asleep.", " "]
        given = [{"raw": text, "tokens": text.split()} for text in given] if key == "sentences" else given
        said, images, row, _ = read({"filename": "a.png", key: given})
        assert said == [
            ("user", f"<image>{DESCRIBE}"),
            ("assistant", "A cat."),
            ("user", DESCRIBE),
            ("assistant", "A cat asleep."),
        ]
        assert row.isolated and row.kinds == ("caption", "caption") and images == ["a.png"]
    assert len(read({"image": "a.png", "caption_0": "x", "caption_1": "y", "caption_10": "z"})[0]) == 6
    assert not read({"image": "a.png", "caption": "x"})[2].isolated


def test_several_images_stand_where_they_are_named():
    two = {"images": ["a.png", "b.png"]}
    assert read({**two, "messages": say("Which?")})[0][0][1] == "<image><image>Which?"
    said, images, *_ = read({**two, "question": "Is <image 2> like <image 1>, or is <image 2> older?", "answer": "No."})
    assert said[0][1] == "Is <image> like <image>, or is image 2 older?" and images == ["b.png", "a.png"]
    parts = [{"type": "image", "path": "a.png"}, "or", {"type": "image", "path": "b.png"}, {"type": "input_text", "text": "?"}]
    assert read({"messages": say(parts)})[:2] == ([("user", "<image>or<image>?"), ("assistant", "A cat.")], two["images"])
    said, images, *_ = read({**two, "messages": say("<img> or <img>?")})
    assert said[0][1] == "<image> or <image>?" and images == two["images"]
    minicpm = {"image": {"<image_00>": "a.png", "<image_01>": "b.png"}, "conversations": say("<image_01> or <image_00>?")}
    assert read(minicpm)[1] == ["b.png", "a.png"]


WITHOUT = {  # field -> rows that would be text alone if what hints at an image were passed over
    "another key": ({"picture_name": "a.png", "conversations": TURNS}, "picture_name"),
    "a file": ({"source": "deep/a.JPG", "conversations": TURNS}, "source"),
    "a number": ({"image_id": 42, "question": "What?", "answer": "A cat."}, "image_id"),
    "bytes": ({"content": PNG, "question": "What?", "answer": "A cat."}, "content"),
    "a video": ({"video": "a.mp4", "conversations": TURNS}, "video"),
    "an address": ({"image": "http://x/a.png", "conversations": TURNS}, "image"),
    "a placeholder": ({"conversations": MARKED}, "image"),
    "another placeholder": ({"conversations": say("<img> What?")}, "conversations"),
    "a film": ({"conversations": say("<video> What?")}, "conversations"),
    "a film beside": ({"image": "a.png", "conversations": say("<video> What?")}, "conversations"),
    "a caption alone": ({"caption": "A cat."}, "image"),
    "too few": ({"images": ["a.png", "b.png"], "messages": say("<image>Which?")}, "image"),
    "too few numbers": ({"images": ["a.png", "b.png"], "messages": say("<image_1>Which?")}, "image"),
    "a number too high": ({"images": ["a.png"], "messages": say("<image_2>Which?")}, "image"),
    "twice": ({"image": "a.png", "messages": say([{"type": "image", "image": "b.png"}, PART])}, "image"),
    "sound": ({"image": "a.png", "messages": say([{"type": "audio"}, PART])}, "messages[0].content[0]"),
    "damaged base64": ({"image": "data:image/png;base64,AAAAA", "caption": "x"}, "image"),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_a_row_whose_image_cannot_be_placed_is_refused(name):
    """Rows with their images under another key were called usable, and trained as text alone."""
    raw, field = WITHOUT[name]
    with pytest.raises(RowError) as error:
        read(raw)
    assert error.value.args[0] == field


@pytest.mark.parametrize("more", [{}, {"image": None}, {"image": ""}, {"images": []}, {"images": [], "image_ratings": [1]}])
def test_text_alone_is_read_where_nothing_hints_at_an_image(more):
    assert read({"conversations": TURNS, "id": 3, "model": "", **more})[1] == []


def test_numbers_are_read_as_they_are_written():
    """A pandas float id cost the row; an answer that is a number did, too."""
    said, _, row, _ = read({"id": 7.0, "image": "a.png", "question": "How many?", "answer": 3.0})
    assert row.id == "7" and said[-1] == ("assistant", "3")
    assert read({"id": 1.5, "image": "a.png", "question": 12, "answer": 0.25})[0] == [
        ("user", "<image>12"),
        ("assistant", "0.25"),
    ]
    assert read({"id": float("nan"), "conversations": TURNS})[2].id is None
    for bad in (True, float("inf"), {"a": 1}):
        with pytest.raises(RowError):
            read({"image": "a.png", "question": "?", "answer": bad})


def test_what_is_left_out_or_not_used_is_noted():
    first = {"from": "gpt", "value": "Hello!"}
    said, images, row, notes = read({"image": "a.png", "conversations": [first, *MARKED], "model": "x", "height": 3})
    assert said == ASKED
    assert set(notes) == {"the first turn is gpt's, which answers nothing: it is left out", "key 'model' is not used",
                          "key 'height' is not used"}  # fmt: skip


def test_what_comes_beside_the_turns_is_read():
    said, *_ = read({"image": "a.png", "system": "Be short.", "conversations": TURNS})
    assert said == [("system", "Be short."), *ASKED]
    said, *_ = read({"image": "a.png", "instruction": "What?", "input": "In a word.", "hint": "A photo.", "output": "A cat."})
    assert said[0] == ("user", "<image>A photo.\nWhat?\nIn a word.")
    row = read({"image": "a.png", "question": "What?", "answer": "A cat.", "category": ["a", "b"], "question_type": "what"})[2]
    assert row.kinds == ("what",)


OPTIONS = {
    "a letter": ({"options": ["cat", "dog"], "answer": "B"}, "B"),
    "in brackets": ({"choices": ["cat", "dog"], "answer": "(b)"}, "B"),
    "its text": ({"options": ["cat", "dog"], "answer": "Dog"}, "B"),
    "its number from 0": ({"choices": ["cat", "dog"], "answer": 1}, "B"),
    "its number as text": ({"options": ["cat", "dog"], "answer": "0"}, "A"),
    "as Python prints it": ({"options": "['cat', 'dog']", "answer": "A"}, "A"),
    "by letters": ({"options": {"A": "cat", "B": "dog"}, "answer": "dog"}, "B"),
    "columns": ({"A": "cat", "B": "dog", "C": float("nan"), "answer": "A"}, "A"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_of_options_the_letter_is_learned(name):
    more, letter = OPTIONS[name]
    said, _, row, _ = read({"image": "a.png", "question": "Which?", "category": "animals", **more})
    assert said[0][1].splitlines()[:3] == ["<image>Which?", "A. cat", "B. dog"] and said[1][1] == letter
    assert row.kinds == ("animals",)


@pytest.mark.parametrize("answer", ["C", 2, "horse", "1", -1])
def test_an_answer_that_may_be_two_options_or_none_is_refused(answer):
    """ "1" is the text of A and the number of B."""
    with pytest.raises(RowError, match="answer"):
        read({"image": "a.png", "question": "Which?", "options": ["1", "3"], "answer": answer})


def test_the_answer_that_most_give_is_learned_and_the_others_are_accepted():
    _, _, row, _ = read({"image": "a.png", "question": "?", "answers": ["a mug", "cup", "cup", "Cup"]})
    assert row.messages[-1]["content"] == "cup" and row.accepted == (("a mug", "Cup"),)


# ---- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for k, name in enumerate("ab"):
        (folder / f"{name}.png").write_bytes(image_bytes(k))
    (folder / "sub dir").mkdir()
    (folder / "sub dir" / "é.png").write_bytes(image_bytes(5))
    return folder


def test_paths_are_read_as_other_systems_write_them(photos):
    """Backslashes, and absolute paths inside --images."""
    names = ["sub dir\\é.png", str(photos / "a.png"), f"{photos}/sub dir/../b.png", "./b.png", f"file://{photos}/a.png"]
    rows = [{"image": name, "question": "?", "answer": "x"} for name in [*names, "C:\\x\\a.png", "/etc/a.png", "..\\a.png"]]
    (photos / "paths.json").write_text(json.dumps(rows), encoding="utf-8")
    found = LlavaRows.read(photos / "paths.json", photos)
    assert [row.images[0].relative_to(photos).as_posix() for row in found] == [
        "sub dir/é.png",
        "a.png",
        "b.png",
        "b.png",
        "a.png",
    ]
    assert [number for number, *_ in found.problems] == [6, 7, 8] and "pass --images" in found.problems[1][2]


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_encodings_are_read_or_named(photos, encoding, suffix):
    raw = {"image": "a.png", "question": "Où est-ce ?", "answer": "Au café."}
    text = {"json": json.dumps([raw] * 2, ensure_ascii=False), "jsonl": "\r\n".join([json.dumps(raw, ensure_ascii=False)] * 2),
            "csv": "image;question;answer\r\n" + "a.png;Où est-ce ?;Au café.\r\n" * 2}[suffix]  # fmt: skip
    (photos / f"x.{suffix}").write_bytes(text.encode(encoding))
    rows = LlavaRows.read(photos / f"x.{suffix}")
    assert len(rows) == 2 and rows[0].messages == say("<image>Où est-ce ?", "Au café.") and not rows.problems
    assert ("read as cp1252, its first such word being 'Où'" in rows.report()) == (encoding == "cp1252")


def test_a_text_in_another_alphabet_is_no_cp1252(photos):
    (photos / "x.csv").write_bytes("image,caption\na.png,Кошка спит\n".encode("cp1251"))
    with pytest.raises(ValueError, match="x.csv: its text is neither UTF-8 nor cp1252 .* save it as UTF-8"):
        LlavaRows.read(photos / "x.csv")


def test_damage_among_utf8_costs_its_row_alone(photos):
    good = json.dumps({"image": "a.png", "question": "Où ?", "answer": "x"}, ensure_ascii=False).encode()
    (photos / "x.jsonl").write_bytes(b"\n".join([good, good.replace(b"x", b"\xff"), good]))
    rows = LlavaRows.read(photos / "x.jsonl")
    assert [row.number for row in rows] == [1, 3] and "surrogate" in rows.problems[0][2]


ROW = {"image": "a.png", "question": "What?", "answer": "x"}
OBJECTS = [  # how many rows, or what is said of it
    ({"data": [ROW, ROW], "version": 2}, 2),
    ({"info": {"year": 2014}, "questions": [ROW], "tags": ["a", "b"]}, 1),
    ({"annotations": [ROW] * 3}, 3),
    (ROW, 1),
    ({"train": [ROW], "test": [ROW]}, "holds an object with the keys 'train', 'test', not a list of rows"),
    ({"images": [{"id": 1, "file_name": "a.png"}], "annotations": [ROW]}, "data.convert captions"),
    ({"images": [{"filename": "a.png", "sentences": [{"raw": "x"}]}], "dataset": "x"}, "data.convert captions"),
    ({"image": ["a.png", "b.png"], "caption": ["x", "y"]}, "holds columns, .* orient='records'"),
    ({"image": {"0": "a.png", "1": "b.png"}, "caption": {"0": "x", "1": "y"}}, "holds columns, .* orient='records'"),
]


@pytest.mark.parametrize("about, found", OBJECTS)
def test_an_object_with_one_list_of_rows_is_read_and_others_are_refused(photos, about, found):
    """{"data": [...]} was refused though its rows are plain to find; what may be columns, or several parts, is so still."""
    (photos / "x.json").write_text(json.dumps(about))
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            LlavaRows.read(photos / "x.json")
        return
    rows = LlavaRows.read(photos / "x.json")
    assert len(rows) == found and rows[0].messages == say("<image>What?", "x")
    assert ("the rows are the list under" in rows.report()) == (about is not ROW)


CSV = [
    ("image,question,answer\na.png,What?,3\n", [3], []),
    ('\ufeffImage\tCaption\na.png\t"A cat,\nasleep."\n\nb.png\tX\n', ["A cat,\nasleep.", "X"], []),
    ("image,caption\na.png,one, two\nb.png,x\n", ["x"], [2]),
    ('image,caption\na.png,"one\nb.png,x\n', None, [2]),
    ('image,caption\na.png,"one" two\nb.png,x\n', ["x"], [2]),
    ("image;caption\na.png;x\n;y\n", ["x"], [3]),
    ("sep=;\r\nimage;caption\r\na.png;x, y\r\n;z\r\n", ["x, y"], [4]),  # Excel's
    ("image| caption\na.png| x, y\n", ["x, y"], []),
    ('image, caption\na.png, "x, y"\n', ["x, y"], []),  # the quotes were learned, and its comma cost the row
    ("image,caption\ra.png,x\r", ["x"], []),
]


@pytest.mark.parametrize("text, answers, bad", CSV)
def test_a_csv_loses_only_the_lines_that_are_damaged(photos, text, answers, bad):
    (photos / "x.csv").write_text(text, encoding="utf-8", newline="")
    if answers is None:
        with pytest.raises(ValueError, match="never closed: all from here on is lost"):
            LlavaRows.read(photos / "x.csv")
        return
    rows = LlavaRows.read(photos / "x.csv")
    assert [row.messages[-1]["content"] for row in rows] == list(map(str, answers))
    assert [number for number, *_ in rows.problems] == bad


def test_folders_say_what_is_on_their_images(tmp_path):
    """class/*.jpg; a text beside each image; metadata.csv; and one that says nothing."""
    for name in ("cat/1.png", "cat/2.png", "sea_lion/1.png"):
        (tmp_path / "classes" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "classes" / name).write_bytes(PNG)
    rows = LlavaRows.read(tmp_path / "classes")
    assert sorted(row.messages[-1]["content"] for row in rows) == ["A photo of a cat."] * 2 + ["A photo of a sea lion."]
    assert all(row.kinds == ("class",) and row.images[0].exists() for row in rows)
    (tmp_path / "beside").mkdir()
    for name, content in {"1.png": PNG, "1.txt": b"A cat.\n", "2.png": PNG, "3.png": PNG,
                          "3.json": json.dumps({"caption": "B", "url": "http://x/3.png"}).encode()}.items():  # fmt: skip
        (tmp_path / "beside" / name).write_bytes(content)
    rows = LlavaRows.read(tmp_path / "beside")
    assert [row.messages[-1]["content"] for row in rows] == ["A cat.", "B"] and [p[0] for p in rows.problems] == [2]
    (tmp_path / "beside" / "metadata.csv").write_text("file_name,text\n2.png,X\n")
    assert [row.messages[-1]["content"] for row in LlavaRows.read(tmp_path / "beside")] == ["X"]
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "1.png").write_bytes(PNG)
    for folder in ("flat", "classes/cat"):
        with pytest.raises(ValueError, match="images and nothing that is said of them"):
            LlavaRows.read(tmp_path / folder)
    (tmp_path / "classes" / "train.json").write_text("[]")  # then the folders may be anything
    with pytest.raises(ValueError, match="is a folder: name a file in it, such as .*train.json"):
        LlavaRows.read(tmp_path / "classes")


def test_bytes_become_files_by_their_content(tmp_path, monkeypatch):
    """The same image in two rows is one file, so that a split keeps it on one side."""
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    rows = [{"image": DATA_URI, "caption": "x"}] * 2 + [{"image": "data:image/png;base64,AAAA", "caption": "y"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = LlavaRows.read(tmp_path / "rows.json")
    assert found[0].images == found[1].images and found[0].images[0].suffix == ".png" and len(found) == 2
    assert found[0].images[0].read_bytes() == PNG and "not an image" in found.problems[0][2]
    assert len(list((tmp_path / "cache").rglob("*.*"))) == 1


# ---- mixtures ----------------------------------------------------------------------------------------------------------

GOOD, BAD = list(SAME.values()), [raw for raw, _ in WITHOUT.values() if "content" not in raw]
EXTRA = {"id": 3.0, "model": "x", "score": 0.5, "tags": ["a"], "meta": {"image": None}, "license": None}


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 99), st.sets(st.sampled_from(sorted(EXTRA)))), min_size=1, max_size=6))
def test_mixtures_of_spellings_are_read_row_by_row(photos, drawn):
    """Every row is usable with its image, or named; nothing of one row changes another."""
    rows = [(good, {**{key: EXTRA[key] for key in extra}, **pool[k % len(pool)]})
            for good, k, extra in drawn for pool in [GOOD if good else BAD]]  # fmt: skip
    (photos / "mixed.jsonl").write_text("\n".join(json.dumps(raw) for _, raw in rows))
    wanted = [number for number, (good, _) in enumerate(rows, start=1) if good]
    try:
        found = LlavaRows.read(photos / "mixed.jsonl")
    except ValueError as error:
        assert "none is usable" in str(error) and not wanted
        return
    assert [row.number for row in found] == wanted
    assert {number for number, *_ in found.problems} == set(range(1, len(rows) + 1)) - {*wanted}
    cache = ImageCache(8)
    for row in found:
        assert [(m["role"], m["content"]) for m in row.messages] == ASKED and cache[row.images[0]] is not None


@given(spoiled(list(SAME.values())) | spoiled([raw for raw, _ in WITHOUT.values()]))
def test_whatever_a_row_holds_it_is_read_or_refused_by_name(rows):
    """And what is read has an answer and as many <image>s as images, so that training never meets it."""
    for raw in rows if isinstance(rows, list) else [rows]:
        try:
            row = read_row(raw, Counter())
        except RowError as wrong:
            field, what = wrong.args
            assert f"{field}: {what}".encode() and len(what) < 300
            continue
        assert sum(message["content"].count("<image>") for message in row.messages) == len(row.images)
        assert row.messages[-1]["role"] == "assistant" and row.messages[-1]["content"].strip()
