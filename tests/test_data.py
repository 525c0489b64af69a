"""Laws of data/datasets.py and downloads.py: splits are fixed, file formats are read or named as broken, downloads resume,
batches repeat."""

import gzip
import hashlib
import io
import json
import re
import socket
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from data.batches import Batches
from data.datasets import DATASETS, ImageDataset, load_images
from data.downloads import SOURCES, download

DIGITS_TEST_PART = "43289c5d80f3d35f3072dd3d1e62fd8549e4af7f831c35eb2d55505f8d4c5428"  # SHA-256
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))


# ---- digits ----


def rows(*parts: ImageDataset) -> list[bytes]:
    return sorted(
        image.numpy().tobytes() + bytes([label])
        for part in parts
        for image, label in zip(part.images, part.labels, strict=True)
    )


def test_digits_are_the_published_ones_in_a_split_that_never_moves():
    with np.load(Path(__file__).parents[1] / "assets" / "digits.npz") as file:
        pixels = hashlib.sha256(file["images"].tobytes()).hexdigest()
    assert pixels == "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3"
    train, test = load_images("digits")
    assert (train.images.shape, test.images.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64
    assert train.images.max() == 255 and train.images.min() == 0
    found = hashlib.sha256(test.images.numpy().tobytes() + test.labels.numpy().tobytes()).hexdigest()
    assert found == DIGITS_TEST_PART


def test_every_split_of_the_digits_deals_out_the_same_samples_in_equal_shares():
    splits = [load_images("digits", split_seed=seed) for seed in (0, 1)]
    assert rows(*splits[0]) == rows(*splits[1]) and rows(splits[0][1]) != rows(splits[1][1])
    for train, test in splits:
        a, b = train.labels.bincount(), test.labels.bincount()
        assert ((b - (a + b) * 360 / 1797).abs() < 1).all()


# ---- mean and deviation, resizing ----


def test_mean_std_is_that_of_all_pixels_and_never_zero():
    images = torch.randint(0, 256, (300, 2, 5, 4), dtype=torch.uint8)
    images[:, 1] = 7
    mean, std = ImageDataset(images, torch.zeros(300).long(), ["a"], "x").mean_std()
    assert mean == pytest.approx((images / 255).mean((0, 2, 3)).tolist(), abs=1e-6)
    assert std[0] == pytest.approx((images[:, 0] / 255).std(unbiased=False).item(), abs=1e-6) and std[1] > 0


@pytest.mark.parametrize("size", [16, (4, 12)])
def test_image_size_resizes_and_keeps_the_brightness(size):
    small, large = load_images("digits")[0], load_images("digits", image_size=size)[0]
    assert tuple(large.images.shape[2:]) == ((size, size) if isinstance(size, int) else size)
    assert large.mean_std()[0] == pytest.approx(small.mean_std()[0], abs=0.01)


# ---- MNIST's and CIFAR-10's files ----


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">u4").tobytes() + values.tobytes()


def mnist_files(count: int = 5) -> dict[str, bytes]:
    random = np.random.RandomState(0)
    files = {}
    for part in ("train", "t10k"):
        files[f"{part}-images-idx3-ubyte"] = idx(random.randint(0, 256, (count, 28, 28)).astype(np.uint8))
        files[f"{part}-labels-idx1-ubyte"] = idx(np.arange(count).astype(np.uint8))
    return files


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("spelling", ["{}.gz", "{}", "MNIST/raw/{}", "dots"])
def test_idx_files_are_found_packed_or_not(tmp_path, name, spelling):
    for file, content in mnist_files().items():
        path = tmp_path / (file.replace("-idx", ".idx") if spelling == "dots" else spelling.format(file))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    train, test = load_images(name, tmp_path)
    assert train.images.numpy().tobytes() == mnist_files()["train-images-idx3-ubyte"][16:]
    assert train.images.shape == (5, 1, 28, 28) and test.labels.tolist() == list(range(5))
    assert len(train.classes) == 10


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("train-images-idx3-ubyte.gz", lambda raw: gzip.compress(raw)[:-9], "damaged"),
        ("train-images-idx3-ubyte.gz", lambda raw: raw, "damaged"),
        ("train-images-idx3-ubyte", lambda raw: b"<html>" + raw, "no idx file"),
        ("train-images-idx3-ubyte", lambda raw: raw[:-1], "its header says"),
        ("t10k-labels-idx1-ubyte", lambda raw: idx(np.arange(4).astype(np.uint8)), "5 images of 28x28, 4 labels"),
        ("t10k-labels-idx1-ubyte", lambda raw: idx(np.full(5, 10, np.uint8)), "5 labels up to 10"),
        ("t10k-labels-idx1-ubyte", None, "holds no t10k-labels-idx1-ubyte"),
    ],
)
def test_broken_idx_files_are_named(tmp_path, file, damage, words):
    for name, content in mnist_files().items():
        (tmp_path / name).write_bytes(content)
    raw = (tmp_path / file.removesuffix(".gz")).read_bytes()
    (tmp_path / file.removesuffix(".gz")).unlink()
    if damage:
        (tmp_path / file).write_bytes(damage(raw))
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        load_images("mnist", tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.skipif(not (SHARED / "mnist").exists(), reason="../shared/data/mnist is not here")
def test_real_mnist():
    train, test = load_images("mnist", SHARED / "mnist")
    assert (len(train), len(test)) == (60_000, 10_000)
    mean, std = train.mean_std(limit=60_000)
    assert (mean[0], std[0]) == pytest.approx((0.1307, 0.3081), abs=1e-4)  # the figures everyone normalises with


def cifar_files(records: int = 3) -> dict[str, bytes]:
    random = np.random.RandomState(0)
    files = {}
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        content = random.randint(0, 256, (records, 3073)).astype(np.uint8)
        content[:, 0] = random.randint(0, 10, records)
        files[name] = content.tobytes()
    return files


def write_cifar(files: dict[str, bytes], where: Path, layout: str) -> Path:
    if layout in ("archive", "archive inside"):
        with tarfile.open(where / "cifar-10-binary.tar.gz", "w:gz") as archive:
            for name, content in files.items():
                entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        return where / "cifar-10-binary.tar.gz" if layout == "archive" else where
    folder = where / "cifar-10-batches-bin"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder if layout == "folder" else where


@pytest.mark.parametrize("layout", ["archive", "archive inside", "folder", "folder inside"])
def test_cifar10_is_read_from_its_binary_version(tmp_path, layout):
    files = cifar_files()
    train, test = load_images("cifar10", write_cifar(files, tmp_path, layout))
    assert train.images.shape == (15, 3, 32, 32) and test.images.shape == (3, 3, 32, 32)
    record = files["data_batch_2.bin"][3073 : 2 * 3073]
    assert train.labels[4] == record[0] and train.images[4].numpy().tobytes() == record[1:]


@pytest.mark.parametrize("layout", ["archive", "folder"])
@pytest.mark.parametrize(
    "damage",
    [{"data_batch_3.bin": None}, {"test_batch.bin": b"x" * 3073}, {"test_batch.bin": b"\0" * 3072}],
    ids=["missing", "label above 9", "cut"],
)
def test_broken_cifar10_is_named(tmp_path, layout, damage):
    files = {name: content for name, content in {**cifar_files(), **damage}.items() if content is not None}
    with pytest.raises(ValueError, match=f"no usable {next(iter(damage))}.*--dataset folder"):
        load_images("cifar10", write_cifar(files, tmp_path, layout))


def test_a_cut_cifar10_archive_is_named(tmp_path):
    path = write_cifar(cifar_files(), tmp_path, "archive")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="damaged"):
        load_images("cifar10", path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("imagenet",), "'imagenet' is unknown: choose from digits"),
        (("folder",), "needs --data"),
        (("digits", "somewhere"), "take no --data"),
        (("mnist", "/no/such/folder"), "/no/such/folder does not exist"),
        (("folder", "/no/such/folder"), "/no/such/folder does not exist"),
        (("digits", None, 0), "image_size is 0"),
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_images(*arguments)


# ---- downloads ----

CONTENT = bytes(range(256)) * 4000
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server():
    """Serves CONTENT on 127.0.0.1. `behaviour` says how it misbehaves, `seen` lists (Range asked for, bytes sent)."""

    class Handler(BaseHTTPRequestHandler):
        behaviour, seen = "good", []

        def do_GET(self):
            asked = self.headers["Range"]
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.behaviour != "ignores ranges" else 0
            if self.behaviour == "missing" or start >= len(CONTENT):
                self.seen.append((asked, 0))
                return self.send_error(404 if self.behaviour == "missing" else 416)
            body = CONTENT[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            body = body[:300_000] if self.behaviour == "hangs up" else body
            self.seen.append((asked, len(body)))
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        Handler.url = f"http://127.0.0.1:{running.server_address[1]}/file.gz"
        yield Handler
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("checksum", [SHA, SHA.upper()])
def test_a_download_is_whole_or_absent(server, tmp_path, checksum):
    path = download(server.url, tmp_path / "new" / "file.gz", checksum, progress=False)
    assert path.read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == ["file.gz"]
    download(server.url, path, checksum, progress=False)
    assert len(server.seen) == 1  # what is there is not fetched again


def test_a_cut_download_goes_on_where_it_stopped(server, tmp_path):
    server.behaviour = "hangs up"
    with pytest.raises(ConnectionError, match=r"300,000 of 1,024,000 bytes.*run again.*--data"):
        download(server.url, tmp_path / "file.gz", SHA, progress=False)
    assert not (tmp_path / "file.gz").exists()
    server.behaviour = "good"
    assert download(server.url, tmp_path / "file.gz", SHA, progress=False).read_bytes() == CONTENT
    assert server.seen == [(None, 300_000), ("bytes=300000-", len(CONTENT) - 300_000)]


@pytest.mark.parametrize(
    ("part", "behaviour"),
    [(CONTENT[:1000], "good"), (CONTENT[:1000], "ignores ranges"), (b"junk", "ignores ranges"), (CONTENT, "good")],
    ids=["resumes", "server starts over", "junk, server starts over", "part already whole"],
)
def test_a_part_left_behind_is_completed(server, tmp_path, part, behaviour):
    server.behaviour = behaviour
    (tmp_path / "file.gz.part").write_bytes(part)
    assert download(server.url, tmp_path / "file.gz", SHA, progress=False).read_bytes() == CONTENT
    assert server.seen[0][0] == f"bytes={len(part)}-"


@pytest.mark.parametrize("part", [None, b"junk", CONTENT + b"too long"])
def test_a_wrong_checksum_leaves_nothing_behind(server, tmp_path, part):
    if part:
        (tmp_path / "file.gz.part").write_bytes(part)
    with pytest.raises(ValueError, match="checksum"):
        download(server.url, tmp_path / "file.gz", SHA if part else "0" * 64, progress=False)
    assert list(tmp_path.glob("file.gz*")) == []


def test_a_missing_file_is_one_clear_line(server, tmp_path):
    server.behaviour = "missing"
    with pytest.raises(ConnectionError, match="404.*--data"):
        download(server.url, tmp_path / "file.gz", SHA, progress=False)


def test_offline_is_one_clear_line_that_names_data(monkeypatch):
    with socket.socket() as unused:  # a port where nothing listens
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        monkeypatch.setitem(SOURCES, "mnist", (url, SOURCES["mnist"][1]))
        with pytest.raises(ConnectionError, match="refused.*--data") as error:
            load_images("mnist", progress=False)
    assert "\n" not in str(error.value)


def test_a_data_set_is_downloaded_into_the_cache(server, tmp_path, monkeypatch):
    packed = {f"{name}.gz": gzip.compress(content) for name, content in mnist_files().items()}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in packed.items()}

    def get(self):
        content = packed[self.path.lstrip("/")]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    monkeypatch.setattr(server, "do_GET", get)
    monkeypatch.setitem(SOURCES, "mnist", (server.url.removesuffix("file.gz"), sums))
    assert len(load_images("mnist", progress=False)[0]) == 5
    assert sorted(p.name for p in (tmp_path / "cache" / "mnist").iterdir()) == sorted(packed)


def test_every_download_has_a_checksum():
    assert SOURCES.keys() == DATASETS.keys() - {"digits", "folder"}
    for _, checksums in SOURCES.values():
        assert checksums and all(re.fullmatch("[0-9a-f]{64}", checksum) for checksum in checksums.values())


# ---- batches ----


@pytest.mark.parametrize(("n", "size", "world"), [(23, 4, 1), (50, 4, 3), (48, 4, 4)])
def test_each_sample_is_seen_once_an_epoch_by_one_rank(n, size, world):
    ranks = [Batches(n, size, seed=0, rank=r, world_size=world) for r in range(world)]
    for _ in range(3):
        batches = [next(rank) for _ in range(len(ranks[0])) for rank in ranks]
        seen = torch.cat(batches)
        assert len(seen.unique()) == len(seen) == n - n % (size * world)
        assert all(len(batch) == size for batch in batches)
    assert all(rank.fraction == 3 for rank in ranks)


def test_epochs_and_seeds_shuffle_anew():
    first, second = (
        [torch.cat([next(b) for _ in range(10)]).tolist() for _ in range(2)]
        for b in (Batches(100, 10, 0), Batches(100, 10, 1))
    )
    assert len({tuple(order) for order in first + second}) == 4


@pytest.mark.parametrize("steps", [0, 1, 4, 5, 13])  # 5 batches an epoch
def test_a_resumed_stream_goes_on_with_the_very_batches(steps):
    stream = Batches(23, 4, seed=3)
    for _ in range(steps):
        next(stream)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = Batches(23, 4, seed=3)
    next(resumed)  # whatever it did before
    resumed.load_state_dict(state)
    assert resumed.fraction == stream.fraction == pytest.approx(steps / 5)
    assert all(torch.equal(next(stream), next(resumed)) for _ in range(12))


@pytest.mark.parametrize("changes", [{"n": 24}, {"seed": 1}, {"batch_size": 8}])
def test_a_cursor_of_another_run_is_refused(changes):
    settings = {"n": 23, "batch_size": 4, "seed": 0}
    with pytest.raises(ValueError, match="cannot resume"):
        Batches(**settings | changes).load_state_dict(Batches(**settings).state_dict())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n": 3, "batch_size": 4}, "do not fill a batch"),
        ({"n": 0, "batch_size": 4}, "do not fill a batch"),
        ({"n": 9, "batch_size": 0}, "batch_size 0"),
        ({"n": 9, "batch_size": 2, "rank": 2, "world_size": 2}, "rank 2 of 2"),
    ],
)
def test_empty_batches_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Batches(**settings, seed=0)
