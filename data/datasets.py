"""Image data sets for classification: digits (come with the code), MNIST, Fashion-MNIST, CIFAR-10, folders of images.

    train, test = load_images("digits")
    train, test = load_images("cifar10")                                    # downloaded once (170 MB), or data=DIR
    train, test = load_images("folder", data="photos.tar.gz", image_size=64)
    train.images[:64]                                                       # uint8 [64, C, H, W], for augment.py

Images stay uint8 until the batch. A folder's images are decoded once and then memory-mapped from the cache folder
(~/.cache/vlm-scratch, or VLM_CACHE), so they need not fit in memory. Under torchrun let rank 0 load first.
Axes: N images, C channels, H and W the image's sides.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from data.digits import load_digits
from data.downloads import load_cifar10, load_idx
from data.folders import load_folder
from data.image_settings import height_width

DATASETS = {  # name -> classes; a folder has its own
    "digits": list("0123456789"),
    "mnist": list("0123456789"),
    "fashion-mnist": ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"],
    "cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    "folder": None,
}


def evenly(count: int, most: int) -> torch.Tensor:
    """int64: indices of `most` out of so many things, or of all, evenly spread from the first to the last."""
    return torch.linspace(0, count - 1, min(most, count)).long()


@dataclass
class ImageDataset:
    images: torch.Tensor  # uint8 [N, C, H, W]; read-only where it is memory-mapped (a folder's images)
    labels: torch.Tensor  # int64 [N]
    classes: list[str]
    name: str
    # Of a folder, on its train part: (file, reason) of those not used, and what else is worth saying.
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def mean_std(self, limit: int = 8192) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, on the 0..1 scale, of at most `limit` evenly spread images."""
        count = min(limit, len(self))
        chosen = torch.arange(count) * len(self) // count
        counts = torch.zeros(self.images.shape[1], 256, dtype=torch.float64)
        for rows in chosen.split(256):
            for channel, values in enumerate(self.images[rows].transpose(0, 1)):
                counts[channel] += torch.bincount(values.flatten(), minlength=256).cpu()
        share, values = counts / counts.sum(1, keepdim=True), torch.arange(256) / 255
        mean = (share * values).sum(1)
        std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt().clamp_min(1 / 255)  # a constant channel has none
        return tuple(mean.tolist()), tuple(std.tolist())

    def describe_skipped(self, first: int = 10) -> str:
        """Lines to print: what a folder gave, and the first few unused files with the reason; "" if none."""
        lines = list(self.notes)
        if self.skipped:
            lines.append(f"skipped {len(self.skipped)} file{'s' if len(self.skipped) > 1 else ''}:")
            lines += [f"  {path}: {reason}" for path, reason in self.skipped[:first]]
            if len(self.skipped) > first:
                lines.append(f"  ... and {len(self.skipped) - first} more")
        return "\n".join(lines)


# ---- all of them ----


def _resize(images: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    if size is None or tuple(images.shape[2:]) == size:
        return images
    parts = [F.interpolate(part.float(), size, mode="bilinear", antialias=True) for part in images.split(1024)]
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])


def load_images(
    name: str,
    data: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    split_seed: int = 0,
    progress: bool = True,
    workers: int | None = None,
) -> tuple[ImageDataset, ImageDataset]:
    """(train, test) of one of DATASETS.

    data: the folder with the files of mnist, fashion-mnist or cifar10 (or its archive), which are otherwise downloaded;
    the folder or archive of images for "folder". image_size: side, or (height, width), in pixels; None keeps images
    as they are (a folder: see load_folder). split_seed chooses the test part where the data have none (digits, folder).
    Raises ValueError or an OSError with one line saying what is wrong.
    """
    if name not in DATASETS:
        raise ValueError(f"data set {name!r} is unknown: choose from {', '.join(DATASETS)}")
    data = Path(data).expanduser() if data else None
    if name == "folder":
        if data is None:
            raise ValueError("the data set 'folder' needs --data: a folder of class folders, or an archive of one")
        found = load_folder(data, image_size, split_seed, progress, workers)
        train = ImageDataset(*found.train, found.classes, data.name, found.skipped, found.notes)
        return train, ImageDataset(*found.test, found.classes, data.name)
    if data is not None:
        if name == "digits":
            raise ValueError(f"digits come with the code and take no --data (given: {data})")
        if not data.exists():
            raise FileNotFoundError(f"--data {data} does not exist")
    if name == "digits":
        parts = load_digits(split_seed)
    else:
        parts = load_cifar10(data, progress) if name == "cifar10" else load_idx(name, data, progress)
    size = None if image_size is None else height_width(image_size)
    resized = [_resize(images, size) for images, _ in parts]
    pairs = zip(resized, parts, strict=True)
    return tuple(ImageDataset(images, labels.long(), list(DATASETS[name]), name) for images, (_, labels) in pairs)
