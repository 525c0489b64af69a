"""Laws of shards.py: what is packed comes out again; each row once an epoch, whatever the processes; a stopped stream goes on
with the very next batch, in any number of processes; damage costs the rows that it hits, and is counted."""

import gzip
import io
import itertools
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import finetune_vlm
from calls import refused
from data.image_cache import ImageCache
from data.llava import LlavaRows
from data.shard_stream import LANES, ShardStream, epoch_order
from data.shards import ShardImages, Shards, check_shards, main, pack_shards, scan, unpack_shards
from extras import train_siglip
from lib import run as training
from samples import image_bytes

ROWS, PER_SHARD = 60, 7


def write_rows(folder, count=ROWS):
    """Rows about no image, one or two; each says its number."""
    rows = []
    for k in range(count):
        names = [f"{k}.png", f"{k}.webp"][: (0, 1, 1, 2)[k % 4]]
        for name in names:
            Image.new("RGB", (12 + k % 5, 10), (k * 4, 255 - k, 9)).save(folder / name, lossless=True)
        turns = [("human", "<image>" * len(names) + "Which one?"), ("gpt", f"number {k}")]
        row = {"id": f"r{k}", "conversations": [{"from": who, "value": text} for who, text in turns], "kinds": ["n"]}
        rows.append(row | ({"image": names if len(names) > 1 else names[0]} if names else {}))
    (folder / "train.json").write_text(json.dumps(rows))
    return LlavaRows.read(folder / "train.json")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = write_rows(folder)
    pack_shards(rows, folder / "out", PER_SHARD)
    return rows, folder / "out"


@pytest.fixture
def out(packed, tmp_path):
    """A copy to be damaged: its shards, sorted."""
    for path in packed[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def stream(folder, batch_size=4, **settings):
    return ShardStream(Shards.open(folder / "shard-*.tar"), ShardImages(8), batch_size, seed=5, **settings)


def numbers(rows) -> list[int]:
    return [int(row.messages[-1]["content"].split()[1]) for row in rows]


def epoch(batches) -> list[list[int]]:
    return [numbers(next(batches)) for _ in range(len(batches))]


# ---- packed and read -------------------------------------------------------------------------------------------------


def test_what_is_packed_is_read_again(packed, tmp_path):
    rows, folder = packed
    assert len(list(folder.iterdir())) == -(-ROWS // PER_SHARD)
    found = {row.id: row for row in Shards.open(folder / "shard-*.tar").head(ROWS)}
    assert [*found] != [row.id for row in rows] and len(found) == ROWS  # in random order
    for row in rows:
        assert (found[row.id].messages, found[row.id].kinds) == (row.messages, row.kinds)
        assert [image.data for image in found[row.id].images] == [path.read_bytes() for path in row.images]
    unpack_shards(folder / "shard-*.tar", tmp_path / "back")
    back = LlavaRows.read(tmp_path / "back" / "rows.json")
    assert sorted((row.id, str(row.messages), row.kinds) for row in back) == sorted(
        (row.id, str(row.messages), row.kinds) for row in rows
    )


def test_images_of_one_name_in_two_shards_stay_two_files(tmp_path):
    """They were written to one file, and the first shard's row then had the second's image."""
    for colour in ("red", "blue"):
        Image.new("RGB", (9, 9), colour).save(tmp_path / "cat.png")
        turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": colour}]
        (tmp_path / "cat.json").write_text(json.dumps({"image": "cat.png", "conversations": turns}))
        with tarfile.open(tmp_path / f"{colour}.tar", "w") as tar:
            for name in ("cat.json", "cat.png"):
                tar.add(tmp_path / name, name)
    unpack_shards(str(tmp_path / "*.tar"), tmp_path / "back")
    found = {row.messages[1]["content"]: Image.open(*row.images) for row in LlavaRows.read(tmp_path / "back" / "rows.json")}
    assert found["red"].getpixel((0, 0)) == (255, 0, 0) and found["blue"].getpixel((0, 0)) == (0, 0, 255)


def test_rows_that_share_an_image_share_a_shard(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "It."}]
    rows = [{"image": "a.png", "conversations": turns} if k % 3 else {"conversations": turns} for k in range(12)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    pack_shards(LlavaRows.read(tmp_path / "train.json"), tmp_path / "out", 2)
    with_image = [any(row.images for row in Shards.open(path).head(99)) for path in (tmp_path / "out").iterdir()]
    assert sum(with_image) == 1


def test_pixels_are_those_of_the_files(packed):
    rows, folder = packed
    decoded, whole = ShardImages(8), {row.id: row for row in rows}
    for row in Shards.open(folder / "shard-*.tar").head(9):
        for path, image in zip(whole[row.id].images, row.images, strict=True):
            assert torch.equal(decoded[image], ImageCache(8)[path])


def test_other_tools_archives_are_read(tmp_path):
    """Images before their JSON, folders, capitals, other files, an old tar format."""
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "It."}]
    png = io.BytesIO()
    Image.new("RGB", (9, 9)).save(png, "png")
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        raw = json.dumps({"image": "photo.png", "conversations": turns}).encode()
        for name, content in [("x/1.PNG", png.getvalue()), ("x/1.json", raw), ("x/1.txt", b"-"), ("x/__meta.json", b"{}"),
                              ("README", b"hello"), ("x/" + "long" * 40 + ".png", png.getvalue()),
                              ("x/" + "long" * 40 + ".json", raw)]:  # fmt: skip
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    shards = Shards.open(tmp_path / "a.tar")
    assert not shards.problems and [len(row.images) for row in shards.head(9)] == [1, 1]


def test_img2dataset_s_shards_are_captions(tmp_path):
    """KEY.jpg, KEY.txt, KEY.json, in the order in which it writes them; they were refused."""
    about = {
        "caption": "A cat.",
        "url": "http://x/cat.jpg",
        "key": "000000000",
        "status": "success",
        "width": 12,
        "sha256": "0",
    }
    jpg = image_bytes(kind="JPEG")
    members = {
        "0.jpg": jpg,
        "0.txt": b"A cat.",
        "0.json": json.dumps(about).encode(),
        "1.txt": "Une forêt.".encode(),
        "1.jpg": jpg,
    }
    members |= {"2.jpg": jpg, "3.txt": b"An image that was not loaded."}
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    shards, lost = Shards.open(tmp_path / "00000.tar"), {}
    rows = list(shards.read(range(3), lost))
    assert [row.messages[-1]["content"] for row in rows if row] == ["A cat.", "Une forêt."] and rows[0].images[0].data == jpg
    assert shards.problems == [("00000.tar", "2 has no .json or .txt")] and "image" in str(lost)
    whole = LlavaRows.read(tmp_path / "00000.tar")
    assert [len(row.images) for row in whole] == [1, 1] and "1 rows: key 'sha256' is not used" in whole.notes


def test_captions_of_one_image_stay_apart_from_each_other_when_packed(tmp_path):
    (tmp_path / "a.png").write_bytes(image_bytes())
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "a.png", "captions": ["A cat.", "It sleeps."]}]))
    rows = LlavaRows.read(tmp_path / "rows.json")
    pack_shards(rows, tmp_path / "out", 9)
    (row,) = Shards.open(tmp_path / "out" / "*.tar").head(9)
    assert row.isolated and row.conversations == rows[0].conversations and len(row.conversations) == 2


@pytest.mark.parametrize("name", ["data [v1]/s", "[a]/b [c]"])
def test_square_brackets_in_a_path_are_no_pattern(tmp_path, capsys, name):
    """'data [v1]/s' was packed and could not be opened."""
    write_rows(tmp_path, 5)
    main(["pack", str(tmp_path / "train.json"), str(tmp_path / name), "--per-shard", "2"])
    for pattern in ("shard-*.tar", "shard-00000[0-2].tar", "*"):
        with pytest.raises(SystemExit) as stop:
            main(["check", str(tmp_path / name / pattern)])
        assert stop.value.code == 0 and "5 rows are usable" in capsys.readouterr().out
    (tmp_path / name / "shard-000000.tar").rename(tmp_path / name / "x [1].tar")
    assert [len(Shards.open(tmp_path / name / pattern).paths) for pattern in ("x [1].tar", "x [1]*.tar", "x*")] == [1, 1, 1]


# ---- the order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts, lanes, window", [([7] * 9, 4, 5), ([1, 30, 2], 3, 8), ([5], 16, 4), ([100, 0, 50], 2, 1)])
def test_an_epoch_has_each_row_once_and_no_more_than_a_window_in_memory(counts, lanes, window):
    rows, places = epoch_order(np.cumsum([0, *counts]), lanes, window, np.random.RandomState(1))
    n = sum(counts)
    assert sorted(rows) == sorted(places) == list(range(n))
    for part in np.array_split(np.arange(n), lanes):
        own = places[np.isin(places, part)]  # of one lane, in the order of training
        ahead = np.maximum.accumulate(own - part[:1]) - np.arange(len(own)) if len(own) else np.zeros(1)
        assert ahead.max() < window
        assert window > 1 or (ahead == 0).all()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_an_epoch(packed, world_size):
    """Together they have the batches of one: each row once, but for what fills no batch."""
    ranks = [epoch(stream(packed[1], 12 // world_size, rank=r, world_size=world_size, workers=2)) for r in range(world_size)]
    together = [sorted(sum(parts, [])) for parts in zip(*ranks, strict=True)]
    assert together == [sorted(batch) for batch in epoch(stream(packed[1], 12))]
    assert sorted(sum(together, [])) == list(range(ROWS))


def test_each_process_reads_lanes_of_its_own(packed, monkeypatch):
    """From front to back: no process seeks backwards in a lane, and none reads what another one trains on."""
    read, lanes = Shards.read, []
    for rank in range(2):
        batches, asked = stream(packed[1], 6, rank=rank, world_size=2, window=3), []

        def note(self, rows, lost, own=batches.shards, asked=asked):
            if self is own:  # streams of other tests may still be reading ahead
                asked.append(rows)
            return read(self, rows, lost)

        monkeypatch.setattr(Shards, "read", note)
        epoch(batches)
        batches._pool.shutdown()  # it is at work on the batch after
        lanes += asked[: LANES // 2]  # what follows is of the next epoch
    assert sorted(sum(lanes, [])) == list(range(ROWS))
    turns = [sum(b < a for a, b in itertools.pairwise(lane)) for lane in lanes]
    assert max(turns) <= 1  # where one shard ends and one of a lower number follows


def test_epochs_differ_and_seeds_do_not(packed):
    batches, again = stream(packed[1]), stream(packed[1])
    first, second = epoch(batches), epoch(batches)
    assert first != second and sorted(sum(first, [])) == sorted(sum(second, [])) and batches.epoch == 2
    assert epoch(again) == first and first != [sorted(batch) for batch in first]


@pytest.mark.parametrize("done", [0, 1, 14, 15, 22])
def test_a_stopped_stream_goes_on_with_the_very_next_batch(packed, done):
    batches = stream(packed[1], workers=3)
    for _ in range(done):
        next(batches)
    state = json.loads(json.dumps(batches.state_dict()))
    follow = [numbers(next(batches)) for _ in range(9)]
    again, two = stream(packed[1]), [stream(packed[1], 2, rank=r, world_size=2) for r in (0, 1)]
    for other in (again, *two):
        other.load_state_dict(state)
    assert [numbers(next(again)) for _ in range(9)] == follow
    for batch in follow:
        assert [numbers(next(two[0])), numbers(next(two[1]))] == [batch[::2], batch[1::2]]


def test_a_state_of_other_shards_is_refused(packed, out):
    state = stream(packed[1]).state_dict()
    (out / "shard-000000.tar").unlink()
    with pytest.raises(ValueError, match="other shards now"):
        stream(out).load_state_dict(state)


# ---- damage ----------------------------------------------------------------------------------------------------------


def spans(path):
    return scan(path)[0].tolist()


def damage(name: str, out) -> tuple[int, str]:
    """Do it to shard 1; (how many of its rows are lost, what is said)."""
    path = out / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    rows = spans(path)
    if name == "cut":
        path.write_bytes(data[: rows[4][0] + 600])
        return 3, "cut off"
    if name == "cut between rows":
        path.write_bytes(data[: rows[4][0]])
        return 3, "ends early"
    if name == "a header":
        data[rows[2][0] : rows[2][0] + 512] = b"\xff" * 512
    elif name == "a JSON":
        data[rows[2][0] + 514 : rows[2][0] + 516] = b"\xff\xfe"
    elif name == "nothing but noise":
        data = bytearray(np.random.RandomState(0).bytes(20_000))
    elif name == "compressed":
        data = bytearray(gzip.compress(bytes(data)))
    elif name == "empty":
        data = bytearray()
    path.write_bytes(data)
    return {"a header": (1, "damaged"), "a JSON": (1, "row 3")}.get(name, (PER_SHARD, "no tar file"))


@pytest.mark.parametrize("name", ["cut", "cut between rows", "a header", "a JSON", "nothing but noise", "compressed", "empty"])
def test_damage_costs_the_rows_that_it_hits_and_is_counted(packed, out, name):
    inside = set(numbers(Shards.open(out / "shard-000001.tar").head(99)))
    lost, words = damage(name, out)
    batches = stream(out, batch_size=1)
    found = sum(epoch(batches), [])
    assert len(found) == len(set(found)) == ROWS - lost and set(range(ROWS)) - set(found) <= inside
    said = str(batches.shards.problems) + str(batches.lost)
    assert words in said and "shard-000001" in said
    report, good = check_shards(out / "shard-*.tar", 2)
    assert not good and words in report and f"{ROWS - lost} rows are usable" in report


def test_a_damaged_image_costs_its_row(out):
    path = out / "shard-000002.tar"
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        member = next(member for member in tar if member.name.endswith(".png"))
    path.write_bytes(data[: member.offset_data + 30] + b"\0" * 20 + data[member.offset_data + 50 :])
    batches = stream(out, batch_size=1)
    rows = [row for _ in range(ROWS) for row in next(batches)]
    bad = [row for row in rows if any(batches.images[image] is None for image in row.images)]
    assert len(rows) == ROWS and len(bad) == 1 and list(batches.images.unreadable) == [f"{path.name}/{member.name}"]


def test_a_shard_that_has_gone_costs_its_rows(out):
    batches = stream(out, batch_size=1)
    (out / "shard-000003.tar").unlink()
    assert len(sum(epoch(batches), [])) == ROWS - PER_SHARD == ROWS - len(batches.lost)


def test_the_index_is_kept_and_made_anew_for_other_files(out, tmp_path):
    index = tmp_path / "index.npz"
    first = Shards.open(out / "shard-*.tar", index)
    again = Shards.open(out / "shard-*.tar", index)
    assert again.fingerprint == first.fingerprint and again.problems == first.problems
    (out / "shard-000000.tar").unlink()
    assert len(Shards.open(out / "shard-*.tar", index)) == ROWS - PER_SHARD
    index.write_bytes(b"PK\3\4" + b"\0" * 99)
    assert len(Shards.open(out / "shard-*.tar", index)) == ROWS - PER_SHARD


@pytest.mark.parametrize(
    "words, message",
    [
        (["check", "nowhere-*.tar"], "nowhere-*.tar names no file"),
        (["check", "empty.tar"], "no shard holds a row that is whole; empty.tar: "),
        (["pack", "train.json", "full"], "full exists already"),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path, 2)
    (tmp_path / "empty.tar").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert message in refused(capsys, main, *words)


# ---- training --------------------------------------------------------------------------------------------------------

VLM = "--size tiny --batch-size 4 --image-size 32 --steps 5 --eval-count 1 --save-every 3 --device cpu".split()
TOWERS = "--size tiny --dataset llava --batch-size 4 --image-size 32 --patch-size 16 --steps 4 --device cpu".split()


def data_flags(packed):
    return ["--data", str(packed[1] / "shard-*.tar"), "--test-data", str(packed[1].parent / "train.json")]


@pytest.fixture(scope="module")
def as_parquet(packed):
    """The rows of the shards as a table."""
    rows = [{"messages": row.messages, "images": [{"bytes": path.read_bytes(), "path": path.name} for path in row.images]}
            for row in packed[0]]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), packed[1].parent / "train.parquet", row_group_size=PER_SHARD)
    return packed[1].parent / "train.parquet"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("kind", ["shards", "parquet"])
def test_a_model_is_trained_from_front_to_back_and_resumed_bit_for_bit(packed, as_parquet, tmp_path, monkeypatch, capsys, kind):
    save = training.save_state

    def keep(run, state):
        save(run, state)
        (run / f"{state['steps_done']}.pt").write_bytes((run / "state.pt").read_bytes())

    monkeypatch.setattr(training, "save_state", keep)
    flags = [*VLM, *data_flags(packed), *(["--data", str(as_parquet)] if kind == "parquet" else [])]
    finetune_vlm.main([*flags, "--out", str(tmp_path / "whole")])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"unreadable_images": 0, "rows_too_long": 0, "damaged_rows": 0, "unusable_rows": 0}.items() <= result.items()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "state.pt").write_bytes((tmp_path / "whole" / "3.pt").read_bytes())
    finetune_vlm.main([*flags, "--out", str(tmp_path / "half"), "--resume"])
    first, second = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "half"))
    assert first == second


def test_towers_are_trained_from_shards(packed, tmp_path, monkeypatch, capsys):
    """Of rows with exactly one image."""
    monkeypatch.setattr(train_siglip, "draw", lambda *_: None)
    train_siglip.main([*TOWERS, *data_flags(packed), "--out", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 4
