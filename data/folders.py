"""A folder or archive of images, class by class, as uint8 arrays: decoded once, cached on disk, then memory-mapped.

    folder = load_folder("photos.tar.gz", image_size=64)     # .train and .test: images [N, 3, H, W], labels [N]

Layouts: class/*.jpg, or train/class/*.jpg and test/class/*.jpg (or val, valid, validation for test), in a folder, .tar,
.tar.gz, .tgz or .zip, with or without more folders around. Archives are read member by member, never unpacked.
Axes: N images, H and W the image's sides.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from data.archives import DAMAGED, open_archive, walk_folder
from data.digits import stratified_split
from data.image_settings import height_width
from data.images import decode_image
from lib.files import one_line

# ---- which file is of which class and part ----

_SPLITS = ("train", "test", "val", "valid", "validation")  # the first of the last four to be found is the test part
_LARGEST_FILE = 1 << 28  # bytes; nothing larger is read into memory


def _printable(text: str) -> str:
    """File names may hold line ends, or bytes that are no text: those are spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _is_litter(part: str) -> bool:
    """Files and folders that systems leave behind: passed over without a word."""
    return part.startswith(".") or part.lower() in ("__macosx", "thumbs.db", "desktop.ini")


@dataclass
class _Plan:
    files: list[tuple[str, str, str]] = field(default_factory=list)  # (entry, "train" or "test", class)
    folders: set[str] = field(default_factory=set)  # classes that have a folder, maybe an empty one
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (entry, reason)
    notes: list[str] = field(default_factory=list)
    has_parts: bool = False  # the files say themselves what is the test part


def arrange(entries: dict[str, int], split_seed: int) -> _Plan:
    """Which file belongs to which part and class. Raises ValueError for two classes that differ only in case."""
    parts = {name: [p for p in _printable(name).split("/") if p not in ("", ".")] for name in entries}
    parts = {name: p for name, p in parts.items() if p and not any(_is_litter(x) for x in p)}
    # One folder at the top is a wrapping, unless it is a part of the data or holds no folders (then it is a class).
    while len(tops := {p[0] for name, p in parts.items() if len(p) > 1 or name.endswith("/")}) == 1:
        if tops.pop().lower() in _SPLITS or all(len(p) < 3 for p in parts.values()):
            break
        parts = {name: p[1:] or p for name, p in parts.items() if not (len(p) == 1 and name.endswith("/"))}

    filled = {p[0].lower() for name, p in parts.items() if len(p) > 2 and not name.endswith("/")}
    has_parts = "train" in filled
    test = next((name for name in _SPLITS[1:] if name in filled), None)
    unused = (filled & set(_SPLITS)) - {"train", test}
    plan = _Plan()
    for name, p in parts.items():
        role = "train"
        if has_parts:
            top, *p = p
            if top.lower() in unused:
                continue
            role = {"train": "train", test: "test"}.get(top.lower())
        if name.endswith("/"):
            plan.folders.update(p[:1] if role else ())
        elif role is None or len(p) < 2:
            plan.skipped.append((name, "not in a class folder"))
        elif entries[name] > _LARGEST_FILE:
            plan.skipped.append((name, f"larger than {_LARGEST_FILE >> 20} MiB"))
        else:
            plan.files.append((name, role, p[0]))
            plan.folders.add(p[0])
    spellings = {name.casefold(): name for name in sorted(plan.folders)}
    for name in plan.folders:
        if spellings[name.casefold()] != name:
            raise ValueError(
                f"classes {name!r} and {spellings[name.casefold()]!r} differ only in case: rename one folder"
            )
    plan.has_parts = bool(has_parts and test)
    if not plan.has_parts:
        plan.files = _split(plan.files, split_seed)
    elif unused:
        plan.notes.append(f"{', '.join(sorted(unused))} left alone: {test}/ is the test part")
    return plan


def _split(files: list[tuple[str, str, str]], seed: int) -> list[tuple[str, str, str]]:
    """Gives 10 % of each class to the test part: by file name, whatever the order in the archive."""
    ordered = sorted(files)
    index = {name: i for i, name in enumerate(sorted({name for _, _, name in files}))}
    labels = np.array([index[name] for _, _, name in ordered], dtype=int)
    _, test = stratified_split(labels, max(round(0.1 * len(files)), int(len(files) > 1)), seed)
    chosen = {ordered[i][0] for i in test}
    return [(entry, "test" if entry in chosen else "train", name) for entry, _, name in files]


# ---- decoding into the cache ----

_CACHE_VERSION = 1
_LARGEST_UNTOUCHED = 512  # pixels a side: images of one size are stored as they are up to here
_DEFAULT_SIZE = 224


@dataclass
class ImageFolder:
    train: tuple[torch.Tensor, torch.Tensor]  # images uint8 [N, 3, H, W], memory-mapped and read-only; labels int64 [N]
    test: tuple[torch.Tensor, torch.Tensor]
    classes: list[str]
    skipped: list[tuple[str, str]]  # (file, reason)
    notes: list[str]


def cache_folder() -> Path:
    return Path(os.environ.get("VLM_CACHE") or Path.home() / ".cache" / "vlm-scratch")


def load_folder(
    path: str | Path,
    image_size: int | tuple[int, int] | None = None,
    split_seed: int = 0,
    progress: bool = True,
    workers: int | None = None,
) -> ImageFolder:
    """Decodes the images below `path` (folder or archive) into the cache folder, or opens what an earlier call left.

    image_size: side, or (height, width), in pixels; None keeps images as they are if all have one size of up to 512 a
    side, else 224. split_seed chooses the 10 % test part of a folder that has none. The cache is keyed by the path, the
    files' names, sizes and times, and these settings. Files not used are listed in `skipped`, with the reason.
    Raises FileNotFoundError, ValueError (no archive, nothing usable in it), OSError (cache folder full or read-only).
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"--data {path} does not exist: name a folder of class folders, or an archive of one")
    size = None if image_size is None else height_width(image_size)
    stat = path.stat()
    state = list(walk_folder(path).items()) if path.is_dir() else (stat.st_size, stat.st_mtime_ns)
    key = json.dumps([_CACHE_VERSION, str(path.resolve()), state, size, split_seed])
    home = cache_folder() / "folders" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if (cached := _open_cache(home)) is None:
        try:
            _build_cache(path, home, size, split_seed, progress, workers)
        except OSError as error:
            reason = f"{one_line(error)}: set VLM_CACHE to a folder with room"
            raise OSError(f"cannot write the decoded images of {path} to {home.parent} ({reason})") from None
        cached = _open_cache(home)
    if cached is None:
        raise OSError(f"{home} was written but cannot be read back: set VLM_CACHE to another folder")
    return cached


def _open_cache(home: Path) -> ImageFolder | None:
    """What a finished _build_cache left, or None if there is none or it is damaged."""
    try:
        about = json.loads((home / "about.json").read_text(encoding="utf-8"))
        parts = []
        for part in ("train", "test"):
            images = np.load(home / f"{part}.npy", mmap_mode="r")[: about[part]]
            labels = torch.from_numpy(np.load(home / f"{part}-labels.npy"))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                parts.append((torch.from_numpy(images), labels))
        return ImageFolder(*parts, about["classes"], [tuple(pair) for pair in about["skipped"]], about["notes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build_cache(path: Path, home: Path, size, split_seed: int, progress: bool, workers: int | None) -> None:
    """Works in a folder of another name beside `home`, which takes the name only when all is written."""
    home.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=home.name, suffix=".part", dir=home.parent))
    try:
        with open_archive(path) as (entries, read):
            plan = arrange(entries, split_seed)
            # Without a size, the images are taken to be of one size until one is not.
            for attempt in [size] if size else [None, (_DEFAULT_SIZE, _DEFAULT_SIZE)]:
                skipped = list(plan.skipped)
                labels = _decode(plan.files, entries, read, part, attempt, skipped, progress, workers)
                if labels is not None:
                    break
        _write_index(part, path, plan, labels, skipped)
        try:
            os.replace(part, home)
        except OSError:  # something is there: another process's, if it is whole, is as good as this one
            if _open_cache(home) is None:
                shutil.rmtree(home)
                os.replace(part, home)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_index(folder: Path, source: Path, plan: _Plan, labels: dict[str, list[str]], skipped: list) -> None:
    """Writes the labels and about.json beside the pixels. Raises ValueError if a part came out empty."""
    counts = {part: len(names) for part, names in labels.items()}
    skipped = [(_printable(entry), reason) for entry, reason in skipped]
    if not counts["train"] or not counts["test"]:
        first = f" (skipped {len(skipped)} files; the first, {skipped[0][0]}: {skipped[0][1]})" if skipped else ""
        raise ValueError(
            f"--data {source} gave {counts['train']} training and {counts['test']} test images{first}: "
            "expected class/*.jpg with two images or more, or train/class/*.jpg and test/class/*.jpg"
        )
    train, test = set(labels["train"]), set(labels["test"])
    classes = sorted(train | test)
    used = f"used {counts['train']:,} training and {counts['test']:,} test images of {len(classes)} classes"
    notes = [used, *plan.notes]
    notes += [f"class {name!r} has no usable image: left out" for name in sorted(plan.folders - set(classes))]
    notes += [f"class {name!r} has no training image" for name in sorted(test - train)]
    notes += [f"class {name!r} has no test image" for name in sorted(train - test)]
    index = {name: i for i, name in enumerate(classes)}
    for part, names in labels.items():
        np.save(folder / f"{part}-labels.npy", np.array([index[name] for name in names], dtype=np.int64))
    about = {**counts, "classes": classes, "skipped": skipped, "notes": notes, "source": _printable(str(source))}
    (folder / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def _decode(files, entries, read, folder: Path, size, skipped, progress, workers) -> dict[str, list[str]] | None:
    """Decodes in threads (Pillow lets go of the interpreter lock), appending to train.npy and test.npy in `folder`.

    Returns each part's class names in that order, and adds to `skipped`; None if size is None and the images do not
    share one.
    """
    labels: dict[str, list[str]] = {"train": [], "test": []}
    rows = Counter(part for _, part, _ in files)
    shape = (3, *size) if size else None
    workers = workers or min(16, os.cpu_count() or 1)
    Image.init()  # loads Pillow's format plugins once, before the threads
    with (
        ThreadPoolExecutor(workers) as pool,
        warnings.catch_warnings(),
        open(folder / "train.npy", "wb") as train,
        open(folder / "test.npy", "wb") as test,
        tqdm(total=len(files), desc="decoding", unit=" images", disable=not progress) as bar,
    ):
        warnings.simplefilter("ignore")  # of Pillow, about odd but readable files
        outputs = {"train": train, "test": test}
        for group, results in _in_order(pool, 2 * workers, _groups(files, entries), read, size):
            for (entry, part, name), pixels in zip(group, results, strict=True):
                if isinstance(pixels, str):
                    skipped.append((entry, pixels))
                    continue
                if shape is None and max(pixels.shape) <= _LARGEST_UNTOUCHED:
                    shape = pixels.shape
                if pixels.shape != shape:
                    return None
                if not labels[part]:
                    _write_header(outputs[part], rows[part], shape)
                outputs[part].write(pixels.data)
                labels[part].append(name)
            bar.update(len(group))
        for part, found in labels.items():
            # The header promises a row for every file; those of bad files stay empty at the end, and are not read.
            if found:
                outputs[part].truncate(outputs[part].tell() + (rows[part] - len(found)) * math.prod(shape))
    return labels


def _write_header(file, rows: int, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (rows, *shape)})


def _groups(files, entries: dict[str, int], most: int = 32, most_bytes: int = 1 << 20) -> Iterator[list]:
    """Runs of files for one task: enough to make it worthwhile, little enough to hold many in memory."""
    group, total = [], 0
    for file in files:
        group.append(file)
        total += entries[file[0]]
        if len(group) == most or total > most_bytes:
            yield group
            group, total = [], 0
    if group:
        yield group


def _in_order(pool: ThreadPoolExecutor, ahead: int, groups: Iterator[list], read, size) -> Iterator[tuple[list, list]]:
    """Yields (group, decoded) in order, reading up to `ahead` groups early. One thread reads: a tar is one stream."""
    waiting = deque()
    for group in groups:
        contents = []
        for entry, _, _ in group:
            try:
                contents.append(read(entry))
            except DAMAGED as error:
                contents.append(f"cannot be read ({one_line(error)})")
        waiting.append((group, pool.submit(_pixels, contents, size)))
        if len(waiting) > ahead:
            group, future = waiting.popleft()
            yield group, future.result()
    for group, future in waiting:
        yield group, future.result()


def _pixels(contents: list[bytes | str], size) -> list[np.ndarray | str]:
    """File contents -> uint8 [3, H, W], or the reason why not."""
    results = []
    for content in contents:
        if isinstance(content, bytes):
            try:
                image = decode_image(content, at_least=max(size) if size else None)
                if size:
                    image = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)
                content = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
            except ValueError as error:
                content = str(error)
        results.append(content)
    return results
