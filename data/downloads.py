"""MNIST, Fashion-MNIST and CIFAR-10: downloaded once, or found in a folder, and read from the formats they come in."""

import gzip
import hashlib
import http.client
import math
import os
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.archives import DAMAGED, open_archive
from data.folders import cache_folder
from lib.files import one_line

IDX_NAMES = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
SOURCES = {  # data set: where its files are, and their SHA-256 as tensorflow/datasets (url_checksums/) has it for the same URLs
    "mnist": ("https://storage.googleapis.com/cvdf-datasets/mnist/", dict(zip(IDX_NAMES, (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ), strict=True))),
    "fashion-mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", dict(zip(IDX_NAMES, (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ), strict=True))),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/",
                {"cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"}),
}  # fmt: skip


def download(url: str, path: str | Path, checksum: str, progress: bool = True) -> Path:
    """Fetches url to path, unless path is there. checksum: SHA-256.

    What arrived stays in `path`.part, from where a later call goes on; path itself appears only when whole and checked.
    Raises ConnectionError when it cannot be fetched, ValueError when the checksum is wrong (the part is then deleted).
    """
    path = Path(path)
    if path.exists():
        return path
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, part, progress)
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"cannot download {url} ({one_line(error)}): run again to go on, "
            "or get the file otherwise and name its folder with --data"
        ) from None
    digest = hashlib.sha256()
    with open(part, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if found != checksum.lower():
        part.unlink()
        raise ValueError(
            f"{url} has checksum {found}, expected {checksum}: deleted; run again, or use --data with a good copy"
        )
    os.replace(part, path)
    return path


def _fetch(url: str, part: Path, progress: bool) -> None:
    """Appends what is missing of url to `part`, or starts over if the server does not resume."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "vlm-scratch"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left to send: the checksum tells whether the part is whole
            return
        raise
    with response:
        if response.status != 206 or not (response.headers["Content-Range"] or "").startswith(f"bytes {have}-"):
            have = 0
        length = response.headers["Content-Length"]
        total = have + int(length) if length else None
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=not progress) as bar,
        ):
            while block := response.read(1 << 18):
                file.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size < total:
        raise ConnectionError(f"the connection closed after {part.stat().st_size:,} of {total:,} bytes")


def find_or_download(name: str, file: str, data: Path | None, progress: bool) -> Path:
    """Where `file` of data set `name` is: below --data (packed or not, also one or two folders down), or downloaded."""
    if data is None:
        url, checksums = SOURCES[name]
        return download(url + file, cache_folder() / name / file, checksums[file], progress)
    plain = file.removesuffix(".gz")
    wanted = (file, plain, plain.replace("-idx", ".idx"))
    patterns = [depth + spelling for depth in ("", "*/", "*/*/") for spelling in wanted]
    found = [path for pattern in patterns for path in sorted(data.glob(pattern))]
    if not found:
        raise FileNotFoundError(f"--data {data} holds no {file} (nor {plain}): name the folder with {name}'s files")
    return found[0]


def read_idx(path: Path, ndim: int) -> torch.Tensor:
    """The idx format of MNIST: two zero bytes, type 8 (uint8), the rank, big-endian sizes, then the values."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): get it again") from None
    head = 4 + 4 * ndim
    if raw[:4] != bytes([0, 0, 8, ndim]) or len(raw) < head:
        raise ValueError(f"{path} is no idx file of rank {ndim}: it starts with {raw[:4].hex()}")
    shape = np.frombuffer(raw, dtype=">u4", count=ndim, offset=4).tolist()
    values = np.frombuffer(raw, dtype=np.uint8, offset=head)
    if len(values) != math.prod(shape):
        raise ValueError(f"{path} holds {len(values):,} values, its header says {shape}: get it again")
    return torch.from_numpy(values.reshape(shape).copy())


def load_idx(name: str, data: Path | None, progress: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """MNIST or Fashion-MNIST: (images uint8 [N, 1, 28, 28], labels [N]) for training and for tests."""
    tensors = [read_idx(find_or_download(name, file, data, progress), 3 if "images" in file else 1) for file in IDX_NAMES]
    pairs = [(tensors[0][:, None], tensors[1]), (tensors[2][:, None], tensors[3])]
    for images, labels in pairs:
        if len(images) != len(labels) or (labels > 9).any() or images.shape[1:] != (1, 28, 28) or not len(labels):
            height, width = images.shape[2:]
            found = f"{len(images)} images of {height}x{width}, {len(labels)} labels up to {max([0, *labels.tolist()])}"
            raise ValueError(f"{data or name}: {found}: 28x28 and labels up to 9 were expected, get it again")
    return pairs


def load_cifar10(data: Path | None, progress: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """CIFAR-10's binary version, from its archive or the unpacked folder: records of label + 3x32x32 pixels. As load_idx."""
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    folders = [f for f in (data, data / "cifar-10-batches-bin") if (f / names[0]).exists()] if data else []
    if folders:
        source = folders[0]
        blobs = {name: (source / name).read_bytes() for name in names if (source / name).exists()}
    else:
        source = data if data and data.is_file() else find_or_download("cifar10", "cifar-10-binary.tar.gz", data, progress)
        try:
            with open_archive(source) as (entries, read):
                blobs = {Path(entry).name: read(entry) for entry in entries if Path(entry).name in names}
        except DAMAGED as error:
            raise ValueError(f"{source} is damaged ({one_line(error)}): get it again") from None
    records = []
    for name in names:
        raw = np.frombuffer(blobs.get(name, b""), dtype=np.uint8)
        if len(raw) == 0 or len(raw) % 3073 or raw[::3073].max() > 9:
            hint = "expected CIFAR-10's binary version; a folder of images is --dataset folder"
            raise ValueError(f"{source} has no usable {name} ({len(raw):,} bytes): {hint}")
        records.append(raw.reshape(-1, 3073))
    parts = [torch.from_numpy(np.concatenate(part)) for part in (records[:5], records[5:])]
    return [(part[:, 1:].reshape(-1, 3, 32, 32).contiguous(), part[:, 0]) for part in parts]
