"""Augmentation of whole batches in torch, on the device they lie on: uint8 images in, normalized floats out.

Every operation is vectorized over the batch (no loop over images), and every random number comes from the
torch.Generator passed in, so a resumed run sees the same images as an uninterrupted one. A generator on the CPU works
for a batch on any device, and then draws the same augmentation for all of them.

    augment = Augment(PRESETS["cifar10"], *train.mean_std())
    images = augment(train.images[batch], generator)                         # [B, C, H, W] uint8 -> float
    images, targets = mix(images, train.labels[batch], 10, generator, mixup_alpha=0.2, cutmix_alpha=1.0)

After: cutout (DeVries and Taylor, 2017), mixup (Zhang et al., 2018), CutMix (Yun et al., 2019); RandAugment is in
rand_augment.py. Axes: B batch, C channels, H and W the image's sides (no attention heads in this file).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data.rand_augment import rand_augment
from data.warp import GEOMETRY, warp


@dataclass(frozen=True)
class AugmentConfig:
    rotate: float = 0.0  # degrees, either way
    shift: float = 0.0  # fraction of the side, either way
    scale: float = 0.0  # size times 1 - scale .. 1 + scale
    shear: float = 0.0  # tangent of the angle, either way
    crop: float = 0.0  # fraction of the side added all round before cropping back; whole pixels, so nothing blurs
    flip: bool = False  # left-right, for half of the images
    padding: str = "zeros"  # what lies outside the image: "zeros" (black) or "reflection"
    policy: int = 0  # RandAugment operations an image
    magnitude: float = 0.5  # upper end of each operation's strength, 0..1
    cutout: float = 0.0  # probability that one box is filled with the mean colour
    cutout_size: float = 0.5  # that box's longest side, fraction of the image's; the shortest is a quarter of it
    mixup_alpha: float = 0.0  # these three are arguments of mix()
    cutmix_alpha: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self):
        if self.padding not in ("zeros", "reflection"):
            raise ValueError(f"padding is {self.padding!r}: it must be 'zeros' or 'reflection'")
        for name in ("scale", "crop", "magnitude", "cutout", "cutout_size", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must lie in 0..1")


_PHOTOS = AugmentConfig(
    crop=0.125, flip=True, padding="reflection", policy=2, magnitude=0.5, cutout=0.25,
    mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1,
)  # fmt: skip
PRESETS = {
    "none": AugmentConfig(),
    "light": AugmentConfig(crop=0.125, flip=True, padding="reflection", label_smoothing=0.1),  # for few epochs
    "digits": AugmentConfig(rotate=12, shift=0.06, scale=0.12, shear=0.1, label_smoothing=0.1),
    "mnist": AugmentConfig(rotate=12, shift=0.1, scale=0.12, shear=0.1, label_smoothing=0.1),
    "fashion-mnist": AugmentConfig(crop=0.07, flip=True, cutout=0.5, cutout_size=0.4, label_smoothing=0.1),
    "cifar10": _PHOTOS,
    "folder": _PHOTOS,
}


def normalize_images(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 [B, C, H, W] -> float32 with each channel's mean and std (on the 0..1 scale) taken out."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != len(mean):
        raise ValueError(
            f"images are {images.dtype} {list(images.shape)}: expected torch.uint8 [B, {len(mean)}, H, W]"
        )
    return _standardize(images.float() / 255, mean, std)


class Augment:
    """Callable: uint8 [B, C, H, W] -> float32 of that shape, augmented by `config` and normalized by mean and std."""

    def __init__(self, config: AugmentConfig, mean: Sequence[float], std: Sequence[float]):
        self.config, self.mean, self.std = config, tuple(mean), tuple(std)

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        c = self.config
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images are {images.dtype} {list(images.shape)}: expected torch.uint8 [B, C, H, W]")
        if c.crop or c.flip:
            images = crop_and_flip(images, c.crop, c.flip, c.padding, generator)
        x = images.float() / 255
        geometry = _random(generator, x.device, len(x), len(GEOMETRY), low=-1)
        limits = (c.rotate, c.shift, c.shift, c.scale, c.shear, c.shear)
        geometry = geometry * torch.tensor(limits, device=x.device)
        if c.policy:
            x, geometry = rand_augment(x, geometry, c.policy, c.magnitude, generator)
        if c.policy or any(limits):
            x = warp(x, geometry, c.padding)
        x = _standardize(x, self.mean, self.std)
        return cutout(x, c.cutout, c.cutout_size, generator) if c.cutout else x

    def parts(self, data, batch: torch.Tensor, count: int, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, ...]]:
        """A batch of a data.ImageDataset, by index, in `count` parts on the generator's device: (images as above, and targets
        [B, K], see mix). Each is made when it is asked for."""
        c = self.config
        for part in batch.to(data.images.device).chunk(count):
            images, labels = data.images[part].to(generator.device), data.labels[part].to(generator.device)
            images = self(images, generator)
            yield mix(images, labels, len(data.classes), generator, c.mixup_alpha, c.cutmix_alpha, c.label_smoothing)


def _standardize(x: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device).view(1, -1, 1, 1) for v in (mean, std))
    return (x - mean) / std


def _random(generator: torch.Generator, device, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """Uniform in low..high, drawn where the generator lives, delivered to `device`."""
    u = torch.rand(shape, generator=generator, device=generator.device)
    return (low + (high - low) * u).to(device, non_blocking=True)


# ---- geometry: everything that moves pixels ends in one gather and one resampling ----

def crop_and_flip(images: torch.Tensor, fraction: float, flip: bool, padding: str, generator) -> torch.Tensor:
    """Pads by `fraction` of each side, crops a random window of the old size, mirrors half of the batch: one gather."""
    B, C, H, W = images.shape
    offsets = _random(generator, images.device, 3, B)
    rows, rows_inside = _window(H, round(fraction * H), offsets[0])
    columns, columns_inside = _window(W, round(fraction * W), offsets[1])
    if flip:
        mirrored = (offsets[2] < 0.5)[:, None]
        columns = torch.where(mirrored, columns.flip(1), columns)
        columns_inside = torch.where(mirrored, columns_inside.flip(1), columns_inside)
    batch = torch.arange(B, device=images.device)[:, None, None, None]
    channel = torch.arange(C, device=images.device)[None, :, None, None]
    out = images[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]
    if padding == "zeros":
        out = out * (rows_inside[:, None, :, None] & columns_inside[:, None, None, :])
    return out


def _window(side: int, pad: int, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each u in 0..1, a window shifted by up to `pad`: its pixels' source indices [B, side], and which lie inside.

    Indices outside are reflected back (the edge pixel is not repeated, as in torch's "reflect").
    """
    shift = (u * (2 * pad + 1)).long().clamp_max(2 * pad) - pad
    index = torch.arange(side, device=u.device) + shift[:, None]
    reflected = (side - 1) - ((side - 1) - index.abs()).abs()
    return reflected.abs(), (index >= 0) & (index < side)


# ---- boxes and mixtures ----


def _boxes(centre: torch.Tensor, height: torch.Tensor, width: torch.Tensor, H: int, W: int) -> torch.Tensor:
    """True inside a box around centre [2, B] (fractions of H and W, as height and width [B] are): bool [B, 1, H, W]."""
    y = (torch.arange(H, device=centre.device) + 0.5) / H
    x = (torch.arange(W, device=centre.device) + 0.5) / W
    inside_y = (y - centre[0, :, None]).abs() * 2 < height[:, None]
    inside_x = (x - centre[1, :, None]).abs() * 2 < width[:, None]
    return (inside_y[:, :, None] & inside_x[:, None, :])[:, None]


def cutout(x: torch.Tensor, probability: float, size: float, generator: torch.Generator) -> torch.Tensor:
    """Sets one box an image, with the given probability, to 0: the mean colour, after normalization."""
    B, _, H, W = x.shape
    u = _random(generator, x.device, 5, B)
    box = _boxes(u[:2], size * (0.25 + 0.75 * u[2]), size * (0.25 + 0.75 * u[3]), H, W) & (u[4] < probability).view(
        -1, 1, 1, 1
    )
    return x.masked_fill(box, 0.0)


def _symmetric_beta(alpha: float, generator: torch.Generator, device, n: int) -> torch.Tensor:
    """n draws from Beta(alpha, alpha), in float64 as small alphas ask for: torch.distributions.Beta takes no generator.

    Devroye (1996): T / sqrt(2 alpha + T^2) of a Student t with 2 alpha degrees, itself by Bailey's polar method.
    """
    u, v = torch.rand(2, n, generator=generator, device=generator.device, dtype=torch.float64)
    cos = torch.cos(2 * math.pi * v)
    t_squared = (u.clamp_min(1e-16) ** (-1 / alpha) - 1) * cos**2  # may be infinite for small alpha, where 1 / inf = 0
    return (0.5 + 0.5 * cos.sign() / (1 + 1 / t_squared).sqrt()).float().to(device, non_blocking=True)


def mix(
    images: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    generator: torch.Generator,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes each image with another of the batch: float images [B, C, H, W], int64 labels [B] -> (images, targets).

    targets is float32 [B, num_classes]. mixup averages the two images, cutmix pastes a box of the other; both are a
    weight a pixel, and the targets are mixed by its mean. Each image draws its own share. With both alphas above 0, a
    coin decides for each image; with neither, only the smoothed one-hot targets are made.
    """
    targets = F.one_hot(labels, num_classes).float() * (1 - label_smoothing) + label_smoothing / num_classes
    if not (mixup_alpha or cutmix_alpha):
        return images, targets
    B, _, H, W = images.shape
    keep = torch.ones(B, 1, H, W, device=images.device)
    cut = _random(generator, images.device, B) < (0.5 if mixup_alpha else 1.0)
    if mixup_alpha:
        keep = _symmetric_beta(mixup_alpha, generator, images.device, B).view(-1, 1, 1, 1).expand_as(keep)
    if cutmix_alpha:
        side = (1 - _symmetric_beta(cutmix_alpha, generator, images.device, B)).clamp_min(0).sqrt()
        box = _boxes(_random(generator, images.device, 2, B), side, side, H, W)
        keep = torch.where(cut.view(-1, 1, 1, 1), (~box).float(), keep)
    other = torch.randperm(B, generator=generator, device=generator.device).to(images.device, non_blocking=True)
    share = keep.mean((1, 2, 3))[:, None]
    return keep * images + (1 - keep) * images[other], share * targets + (1 - share) * targets[other]
