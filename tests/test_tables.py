"""Laws of tables.py: rows of .parquet files and of datasets.save_to_disk folders are those of the same JSON; each comes once an
epoch, whatever the row groups; a stopped stream goes on with the very next batch; damage costs what it hits, and is said."""

import builtins
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.check import main as check
from data.llava import LlavaRows
from data.row_values import DamagedRow, RowError
from data.rows import check_first, open_streamed
from data.shard_stream import ShardStream
from data.shards import ShardImages
from samples import image_bytes

ROWS = 50


def raw_rows() -> list[dict]:
    """As the_cauldron stores them: about one image or two."""
    return [
        {"images": [{"bytes": image_bytes(k + i), "path": None} for i in range(1 + k % 2)],
         "texts": [{"user": "Which one?", "assistant": f"number {k}"}], "source": "x"}
        for k in range(ROWS)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """a-*.parquet, in groups of 7 rows and 20; saved/, an Arrow stream in batches of 13, as datasets.save_to_disk leaves it."""
    folder, table = tmp_path_factory.mktemp("tables"), pa.Table.from_pylist(raw_rows())
    pq.write_table(table.slice(0, 30), folder / "a-0.parquet", row_group_size=7)
    pq.write_table(table.slice(30), folder / "a-1.parquet", row_group_size=20, compression="zstd")
    (folder / "saved").mkdir()
    path = folder / "saved" / "data-00000-of-00001.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        for batch in table.to_batches(max_chunksize=13):
            out.write_batch(batch)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_indices_data_files": None, "_split": "train"}
    (folder / "saved" / "state.json").write_text(json.dumps(state))
    return folder


@pytest.fixture(params=["a-*.parquet", "saved"])
def source(request, tables):
    return tables / request.param


def numbers(rows) -> list[int]:
    return [int(row.messages[-1]["content"].split()[1]) for row in rows]


def stream(source, batch_size=4, **settings):
    return ShardStream(open_streamed(source), ShardImages(8), batch_size, seed=5, **settings)


def test_rows_are_those_that_were_written(source, tmp_path, monkeypatch):
    """Streamed, and read whole; an image that comes again is one file of the cache folder, and stays on one side of a split."""
    monkeypatch.setenv("VLM_CACHE", str(tmp_path))
    rows, wanted = open_streamed(source).head(ROWS), raw_rows()
    assert numbers(rows) == list(range(ROWS)) and len(open_streamed(source)) == ROWS
    assert [[image.data for image in row.images] for row in rows] == [[i["bytes"] for i in raw["images"]] for raw in wanted]
    whole = LlavaRows.read(source)
    assert [row.messages for row in whole] == [row.messages for row in rows] and not whole.problems
    assert [[path.read_bytes() for path in row.images] for row in whole] == [[i.data for i in row.images] for row in rows]
    assert whole.notes == (f"{ROWS} rows: key 'source' is not used",) and len({*sum((r.images for r in whole), ())}) < 75
    train, test = whole.split(0.2, 0)
    assert not {path for row in train for path in row.images} & {path for row in test for path in row.images}


@pytest.mark.parametrize("done", [0, 5, 12, 17])
def test_a_stopped_stream_goes_on_with_the_very_next_batch(source, done):
    batches = stream(source, workers=3)
    for _ in range(done):
        next(batches)
    state = json.loads(json.dumps(batches.state_dict()))
    follow = [numbers(next(batches)) for _ in range(9)]
    again, two = stream(source), [stream(source, 2, rank=r, world_size=2) for r in (0, 1)]
    for other in (again, *two):
        other.load_state_dict(state)
    assert [numbers(next(again)) for _ in range(9)] == follow
    assert all([numbers(next(two[0])), numbers(next(two[1]))] == [batch[::2], batch[1::2]] for batch in follow)


def test_an_epoch_has_each_row_once(source):
    batches = stream(source, 5)
    assert sorted(sum((numbers(next(batches)) for _ in range(len(batches))), [])) == list(range(ROWS)) and batches.epoch == 1


def test_a_state_of_other_tables_is_refused(tables):
    state = stream(tables / "a-*.parquet").state_dict()
    with pytest.raises(ValueError, match="cannot resume"):
        stream(tables / "a-0.parquet").load_state_dict(state)


def test_damage_costs_what_it_hits_and_is_said(tables, tmp_path, capsys):
    """A file cut off has no footer; a page that is damaged costs the rest of its group; a row of no use itself alone."""
    data = (tables / "a-0.parquet").read_bytes()
    (tmp_path / "b-0.parquet").write_bytes(data[:-40])
    (tmp_path / "b-1.parquet").write_bytes((tables / "a-1.parquet").read_bytes())
    rows = [raw_rows()[0], {**raw_rows()[1], "images": [{"bytes": b"no image", "path": None}]}, {**raw_rows()[2], "texts": []}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b-2.parquet")
    found = LlavaRows.read(tmp_path / "b-*.parquet")
    assert len(found) == 21 and [number for number, *_ in found.problems] == [0, 22, 23]
    with pytest.raises(SystemExit) as stop:
        check([str(tmp_path / "b-*.parquet")])
    printed = capsys.readouterr().out
    assert stop.value.code == 1 and '"rows_usable": 21' in printed and "b-0.parquet: cannot be read" in printed
    cut = bytearray(data)
    cut[4:30] = bytes(26)  # the header of the first page
    (tmp_path / "c.parquet").write_bytes(cut)
    lost = {}
    rows = list(open_streamed(tmp_path / "c.parquet").read(range(30), lost))
    assert [row is None for row in rows] == [True] * 7 + [False] * 23 and isinstance(lost["c.parquet row 7"], DamagedRow)


def test_what_a_stream_leaves_out_is_said_before_it_trains(tables):
    """It said nothing of keys that it did not use, and rows left out for their spelling were counted as damaged."""
    rows = [*raw_rows()[:5], {**raw_rows()[5], "texts": [{"user": "?", "assistant": ""}]}]
    pq.write_table(pa.Table.from_pylist(rows), tables / "d.parquet")
    said, lost = [], {}
    check_first(open_streamed(tables / "d.parquet"), said.append)
    (lines,) = (words.splitlines() for words in said)
    assert "of its first 6 rows 5 usable, 5 of them with images" in lines and "5 rows: key 'source' is not used" in lines
    assert "d.parquet row 6: texts[0].assistant: is an empty answer" in lines
    list(open_streamed(tables / "d.parquet").read(range(6), lost))
    assert [type(why) for why in lost.values()] == [RowError]
    (tables / "d.parquet").unlink()


def test_images_that_a_table_only_names_are_found(tmp_path):
    """Beside it, in images/, or in --images."""
    table = pa.Table.from_pylist([{"image": "a.png", "caption": "x"}, {"image": "b.png", "caption": "y"}])
    pq.write_table(table, tmp_path / "x.parquet")
    (tmp_path / "images").mkdir()
    for name in "ab":
        (tmp_path / "images" / f"{name}.png").write_bytes(image_bytes())
    assert [row.images[0].name for row in LlavaRows.read(tmp_path / "x.parquet")] == ["a.png", "b.png"]
    for images in (None, tmp_path / "images"):
        assert [row.images[0].data for row in open_streamed(tmp_path / "x.parquet", images).head(9)] == [image_bytes()] * 2
    lost = {}
    assert list(open_streamed(tmp_path / "x.parquet", tmp_path).read([0], lost)) == [None] and "No such file" in str(lost)


def test_minimind_v_s_columns_are_read(tmp_path):
    turns = json.dumps([{"role": "user", "content": "What?\n<image>"}, {"role": "assistant", "content": "It."}])
    rows = [{"conversations": turns, "image_bytes": image_bytes(), "image_names": "x.jpg"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    (row,) = open_streamed(tmp_path / "x.parquet").head(9)
    assert row.messages[0]["content"] == "What?\n<image>" and row.images[0].data == image_bytes()


def test_what_cannot_be_opened_is_one_line(tables, tmp_path, monkeypatch):
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match="holds the splits train, test: name one, such as .*dict/train"):
        LlavaRows.read(tmp_path / "dict")
    (tmp_path / "chosen").mkdir()
    (tmp_path / "chosen" / "state.json").write_text('{"_indices_data_files": [{"filename": "i.arrow"}]}')
    with pytest.raises(ValueError, match="flatten_indices"):
        LlavaRows.read(tmp_path / "chosen")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="holds no row; x.parquet: cannot be read"):
        LlavaRows.read(tmp_path / "x.parquet")
    real = builtins.__import__

    def without(name, *args):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        LlavaRows.read(tables / "a-*.parquet")
