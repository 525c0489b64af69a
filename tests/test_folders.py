"""Laws of data/folders.py: what is used and what is not, and why; a folder is decoded once."""

import io
import os
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from data import folders
from data.datasets import load_images
from data.folders import load_folder
from samples import encoded, noise

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "folders"


# ---- folders and archives ----

SUFFIXES = {"folder": "", "tar": ".tar", "tar.gz": ".tar.gz", "tgz": ".tgz", "zip": ".zip"}


def pack(tree: dict[str, bytes], where: Path, container: str = "folder") -> Path:
    """Writes path -> content (folders end in "/") as a folder or an archive, in the given order."""
    path = where / ("photos" + SUFFIXES[container])
    if container == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in tree.items():
                archive.writestr(name, content)
    elif container != "folder":
        with tarfile.open(path, "w" if container == "tar" else "w:gz") as archive:
            for name, content in tree.items():
                entry = tarfile.TarInfo(name.rstrip("/"))
                entry.type, entry.size = (tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE), len(content)
                archive.addfile(entry, io.BytesIO(content))
    for name, content in tree.items() if container == "folder" else ():
        target = path / name
        (target if name.endswith("/") else target.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            target.write_bytes(content)
    return path


def image_files(prefix: str, count: int, width: int = 12, height: int = 8) -> dict[str, bytes]:
    return {f"{prefix}/{i:02}.png": encoded(noise(width, height, seed=i)) for i in range(count)}


def load(path: Path, size=None, **options):
    return load_folder(path, size, progress=False, **options)


@pytest.mark.parametrize("container", SUFFIXES)
@pytest.mark.parametrize("wrapping", ["", "data/", "./a/b/"])
@pytest.mark.parametrize(
    ("parts", "counts"),
    [
        ({"cat": 12, "dog": 8}, (18, 2)),
        ({"train/cat": 3, "train/dog": 2, "test/cat": 1, "test/dog": 4}, (5, 5)),
        ({"Train/cat": 3, "Train/dog": 2, "valid/cat": 1, "valid/dog": 1}, (5, 2)),
        ({"train/cat": 12, "train/dog": 8}, (18, 2)),
        ({"train": 12, "car/old": 8}, (18, 2)),  # "train" is a class here
    ],
    ids=["classes", "train and test", "train and valid", "train alone", "a class called train"],
)
def test_layouts(tmp_path, container, wrapping, parts, counts):
    tree = {f"{wrapping}{name}": content for part, n in parts.items() for name, content in image_files(part, n).items()}
    found = load(pack(tree, tmp_path, container))
    assert (len(found.train[0]), len(found.test[0])) == counts
    assert found.classes == (["car", "train"] if "train" in parts else ["cat", "dog"])
    assert found.skipped == [] and len(found.notes) == 1
    assert found.train[0].dtype == torch.uint8 and found.train[1].dtype == torch.int64


@pytest.mark.parametrize("container", SUFFIXES)
def test_pixels_and_labels_stay_together(tmp_path, container):
    tree = {f"{part}/{c}/{i}.png": encoded(Image.new("RGB", (5, 7), (90 * c, i, 0)))
            for part in ("train", "test") for c in range(3) for i in range(40)}  # fmt: skip
    found = load(pack(dict(sorted(tree.items(), key=lambda item: item[0][::-1])), tmp_path, container))
    for images, labels in (found.train, found.test):
        assert images.shape == (120, 3, 7, 5)
        assert torch.equal(images[:, 0, 0, 0].long(), labels * 90)
        assert sorted(images[labels == 1][:, 1, 3, 2].tolist()) == list(range(40))


def test_the_split_goes_by_file_and_seed_not_by_order(tmp_path):
    tree = {f"{c}/{i}.png": encoded(Image.new("RGB", (4, 4), (i, 0, 0))) for c in "ab" for i in range(50)}
    turned = dict(reversed(tree.items()))
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    found = [load(pack(tree, tmp_path / "x", "tar")), load(pack(turned, tmp_path / "y", "zip"))]
    first, second = ({(int(i[0, 0, 0]), int(k)) for i, k in zip(*f.test, strict=True)} for f in found)
    assert first == second and len(first) == 10
    assert found[0].test[1].bincount().tolist() == [5, 5]
    other = load(tmp_path / "x" / "photos.tar", split_seed=1)
    assert {(int(i[0, 0, 0]), int(k)) for i, k in zip(*other.test, strict=True)} != first


def test_sizes(tmp_path):
    path = pack(image_files("cat", 2) | image_files("dog", 2), tmp_path)
    assert load(path).train[0].shape[1:] == (3, 8, 12)  # all of one size: untouched
    assert noise(seed=0).tobytes() in {image.permute(1, 2, 0).numpy().tobytes() for image in load(path).train[0]}
    assert load(path, 6).train[0].shape[1:] == (3, 6, 6)
    assert load(path, (6, 10)).train[0].shape[1:] == (3, 6, 10)
    pack(image_files("dog", 1, width=13), tmp_path)
    assert load(path).train[0].shape[1:] == (3, 224, 224)  # no longer
    (tmp_path / "large").mkdir()
    assert load(pack(image_files("cat", 2, width=600), tmp_path / "large")).train[0].shape[1:] == (3, 224, 224)


def test_resizing_keeps_the_centre_and_the_proportions(tmp_path):
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))  # the middle third, which is all that a square sees
    thin = Image.new("RGB", (30_000, 1), "blue")  # would need 4 GB if it were resized before it is cropped
    found = load(pack({"a/0.png": encoded(image), "a/1.png": encoded(thin)}, tmp_path), 200)
    for images in (found.train[0], found.test[0]):
        assert (images[0, 2, :, 4:-4] > 250).all() and (images[0, 0, :, 4:-4] < 5).all()


def messy() -> dict[str, bytes]:
    return {
        **image_files("train/cat", 4),
        **image_files("test/cat", 2),
        **image_files("train/dog", 3),
        **image_files("test/owl", 1),
        **image_files("val/cat", 2),
        "train/ant/": b"",
        "train/bee/x.jpg": b"",
        "train/cat/.DS_Store": b"x",
        "train/cat/._00.png": b"x",
        "train/cat/Thumbs.db": b"x",
        "__MACOSX/train/cat/00.png": b"x",
        "train/cat/notes.txt": b"my cats",
        "train/cat/cut.jpg": encoded(noise(64, 64), "JPEG")[:-500],
        "train/loose.png": encoded(noise()),
        "README.md": b"read me",
    }


@pytest.mark.parametrize("container", SUFFIXES)
def test_what_is_not_used_is_told_with_the_reason(tmp_path, container):
    train, test = load_images("folder", pack(messy(), tmp_path, container), progress=False)
    assert (len(train), len(test)) == (7, 3) and train.classes == test.classes == ["cat", "dog", "owl"]
    reasons = {"train/bee/x.jpg": "0 bytes", "train/cat/notes.txt": "not an image", "train/cat/cut.jpg": "truncated",
               "train/loose.png": "not in a class folder", "README.md": "not in a class folder"}  # fmt: skip
    assert sorted(name for name, _ in train.skipped) == sorted(reasons)
    assert all(reasons[name] in reason for name, reason in train.skipped) and test.skipped == []
    told = train.describe_skipped()
    assert "used 7 training and 3 test images of 3 classes" in told and "skipped 5 files" in told
    for note in (
        "'ant' has no usable",
        "'bee' has no usable",
        "'owl' has no training",
        "'dog' has no test",
        "val left alone",
    ):
        assert note in told
    assert "... and 3 more" in train.describe_skipped(first=2)
    again, _ = load_images("folder", tmp_path / ("photos" + SUFFIXES[container]), progress=False)
    assert again.describe_skipped() == told


def test_odd_names_do_not_break_the_report(tmp_path):
    path = pack({**image_files("c\u00e4t", 3), "c\u00e4t/li\nne.txt": b"x"}, tmp_path)
    with open(os.fsencode(path) + b"/c\xc3\xa4t/\xff.txt", "wb") as file:
        file.write(b"x")
    train, _ = load_images("folder", path, progress=False)
    assert train.classes == ["c\u00e4t"] and len(train.skipped) == 2
    train.describe_skipped().encode()
    assert len(train.describe_skipped().splitlines()) == 4


def test_links_that_loop_or_lead_nowhere_do_no_harm(tmp_path):
    path = pack(image_files("cat", 3), tmp_path)
    (path / "cat" / "again").symlink_to(path)
    (path / "cat" / "gone.png").symlink_to(path / "nowhere.png")
    found = load(path)
    assert len(found.train[0]) + len(found.test[0]) == 3
    assert [(name, "No such file" in reason) for name, reason in found.skipped] == [("cat/gone.png", True)]


def test_an_archive_writes_nowhere(tmp_path):
    """Members that would leave the folder when unpacked are only read."""
    tree = {**image_files("../../evil", 2), **{"/tmp/evil/" + k[-6:]: v for k, v in image_files("x", 2).items()}}
    path = pack(tree, tmp_path, "tar")
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("evil/passwd")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = {p for p in tmp_path.rglob("*") if "cache" not in p.parts}
    found = load(path)
    assert len(found.skipped) == 1 and "cannot be read" in found.skipped[0][1]
    assert {p for p in tmp_path.rglob("*") if "cache" not in p.parts} == before
    assert not (tmp_path.parent.parent / "evil").exists() and not Path("/tmp/evil").exists()


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({}, "0 training and 0 test"),
        ({"a.png": encoded(noise())}, "skipped 1 files; the first, a.png: not in a class folder"),
        ({"cat/a.txt": b"x"}, "not an image"),
        ({"cat/a.png": encoded(noise())}, "1 training and 0 test"),
        ({**image_files("train/cat", 2), "test/cat/x.png": b"x"}, "2 training and 0 test"),
        (
            {**image_files("Cat", 2), **image_files("cat", 2)},
            "'cat' and 'Cat' differ only in case|'Cat' and 'cat' differ only",
        ),
        ({**image_files("train/Cat", 2), **image_files("test/cat", 2)}, "differ only in case"),
    ],
)
def test_unusable_folders_are_one_clear_line(tmp_path, cache, tree, words):
    path = pack(tree, tmp_path, "tar")
    with pytest.raises(ValueError, match=words) as error:
        load(path)
    assert "\n" not in str(error.value) and list(cache.iterdir()) == []


@pytest.mark.parametrize("container", ["tar", "tar.gz", "zip"])
def test_a_cut_or_foreign_archive_is_one_clear_line(tmp_path, container):
    path = pack(image_files("cat", 30, 40, 40), tmp_path, container)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no archive at all" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no folder, .tar") as error:
            load(path)
        assert "\n" not in str(error.value)


def test_a_damaged_member_is_named_and_the_others_are_used(tmp_path):
    path = pack(image_files("cat", 6, 40, 40), tmp_path, "zip")
    content = bytearray(path.read_bytes())
    content[content.index(b"cat/03.png") + 200] ^= 255
    path.write_bytes(content)
    found = load(path)
    assert [name for name, _ in found.skipped] == ["cat/03.png"] and "CRC" in found.skipped[0][1]


# ---- the cache ----


@pytest.fixture
def decodes(monkeypatch):
    """Counts the images decoded."""
    seen = []
    original = folders.decode_image
    monkeypatch.setattr(folders, "decode_image", lambda *a, **k: seen.append(1) or original(*a, **k))
    return seen


@pytest.mark.parametrize("container", ["folder", "tar.gz"])
def test_a_second_run_decodes_nothing_until_something_changes(tmp_path, decodes, container):
    tree = image_files("cat", 5)
    path = pack(tree, tmp_path, container)
    first, second = load(path), load(path)
    assert len(decodes) == 5
    assert all(torch.equal(a, b) for a, b in zip(first.train + first.test, second.train + second.test, strict=True))
    load(path, 6)
    load(path, split_seed=1)
    assert len(decodes) == 15  # other settings, another cache
    pack(tree | image_files("cat", 6), tmp_path, container)
    assert len(load(path).train[0]) == 5 and len(decodes) == 21


def test_torch_does_not_warn_of_the_read_only_file(tmp_path):
    torch.set_warn_always(True)  # else only the first time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(pack(image_files("cat", 5), tmp_path))
    finally:
        torch.set_warn_always(False)


def test_images_are_read_from_the_file_when_used(tmp_path, cache):
    images = load(pack(image_files("cat", 5), tmp_path)).train[0]
    with open(next(cache.iterdir()) / "train.npy", "r+b") as file:
        file.seek(128)  # the first pixel, after the header
        file.write(bytes([images[0, 0, 0, 0] ^ 255]))
    assert images[0, 0, 0, 0] == folders.np.load(next(cache.iterdir()) / "train.npy")[0, 0, 0, 0]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_decoding_leaves_nothing_that_is_used(tmp_path, cache, monkeypatch, stop):
    path = pack(image_files("cat", 5), tmp_path)
    with monkeypatch.context() as patch, pytest.raises(stop):
        patch.setattr(folders.np, "save", lambda *a: (_ for _ in ()).throw(stop()))
        load(path)
    assert list(cache.iterdir()) == []
    assert len(load(path).train[0]) == 4


@pytest.mark.parametrize("file", ["train.npy", "test.npy", "train-labels.npy", "about.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_cache_is_made_again(tmp_path, cache, file, damage):
    path = pack(image_files("cat", 5), tmp_path)
    before = load(path).train[0].clone()
    target = next(cache.iterdir()) / file
    content = target.read_bytes()
    target.unlink()
    if damage == "cut":
        target.write_bytes(content[: len(content) // 2])
    assert torch.equal(load(path).train[0], before)


def test_a_cache_of_another_process_made_meanwhile_is_used(tmp_path, cache, monkeypatch):
    path = pack(image_files("cat", 5), tmp_path)
    original = folders._write_index

    def and_another_is_faster(*arguments):
        original(*arguments)
        if len(list(cache.iterdir())) == 1:
            load(path)

    monkeypatch.setattr(folders, "_write_index", and_another_is_faster)
    assert len(load(path).train[0]) == 4
    assert [p.suffix for p in cache.iterdir()] == [""]


def test_a_cache_folder_that_cannot_be_written_is_one_clear_line(tmp_path, monkeypatch):
    path = pack(image_files("cat", 5), tmp_path)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="cannot write the decoded images.*VLM_CACHE") as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(
    not (SHARED / "coco_captions_permissive.tar").exists(),
    reason="../shared/data/coco_captions_permissive.tar is not here",
)
def test_real_photos():
    found = load(SHARED / "coco_captions_permissive.tar", 32)
    assert len(found.train[0]) + len(found.test[0]) == 83 and found.train[0].shape[1:] == (3, 32, 32)
    assert found.train[0].float().std() > 40
