"""RandAugment (Cubuk et al., 2020): operations drawn for each image, each run once a slot on the images that drew it.

Axes: B batch, C channels, H and W the image's sides.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from data.warp import GEOMETRY


def _grey(x: torch.Tensor) -> torch.Tensor:
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)  # ITU-R 601 luma


def _blend(x: torch.Tensor, other: torch.Tensor | float, strength: torch.Tensor) -> torch.Tensor:
    """Moves x away from (strength > 0) or towards (< 0) `other`; strength in -1..1 gives factors 0.1..1.9."""
    return other + (x - other) * (1 + 0.9 * strength)


def _smooth(x: torch.Tensor) -> torch.Tensor:
    """3x3 kernel with centre 5 and ones around it, over 13: what sharpness moves away from."""
    return (F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1) * 9 + x * 4) / 13


def _posterize(x: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    step = 2 ** (strength.abs() * 4).round()  # drops up to 4 of 8 bits
    return ((x * 255).round() / step).floor() * step / 255


def _solarize(x: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    return torch.where(x >= 1 - strength.abs(), 1 - x, x)


def _autocontrast(x: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp_min(1e-6), x)


def _equalize(x: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Histogram equalization of each channel: a value becomes the share of pixels at or below it."""
    values = (x * 255).round().long().flatten(0, 1).flatten(1)  # [B*C, H*W]
    counts = torch.zeros(len(values), 256, device=x.device).scatter_add_(
        1, values, torch.ones_like(values, dtype=x.dtype)
    )
    lowest = counts.gather(1, values.amin(1, keepdim=True))
    share = (counts.cumsum(1) - lowest) / (values.shape[1] - lowest).clamp_min(1)
    flat = lowest == values.shape[1]  # one value everywhere: nothing to equalize
    return torch.where(flat, x.flatten(0, 1).flatten(1), share.gather(1, values)).view_as(x)


COLOUR_OPS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "brightness": lambda x, s: _blend(x, 0.0, s),
    "contrast": lambda x, s: _blend(x, _grey(x).mean((2, 3), keepdim=True), s),
    "saturation": lambda x, s: _blend(x, _grey(x), s),
    "sharpness": lambda x, s: _blend(x, _smooth(x), s),
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
GEOMETRY_OPS = {"rotate": 30.0, "shift_x": 0.3, "shift_y": 0.3, "shear_x": 0.3, "shear_y": 0.3}  # at strength 1


def rand_augment(
    x: torch.Tensor, geometry: torch.Tensor, slots: int, magnitude: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws `slots` operations an image, each with a strength uniform in -magnitude..magnitude.

    x is float [B, C, H, W] in 0..1. Colours change at once; movements are added to `geometry` [B, 6] for the one warp()
    that follows, which blurs less than a resampling for each of them.
    """
    colours = [name for name in COLOUR_OPS if x.shape[1] == 3 or name != "saturation"]
    names = colours + list(GEOMETRY_OPS)
    # Drawn and sorted into groups on the CPU: a mask on the GPU would wait for the GPU at every operation.
    choice = torch.randint(len(names), (slots, len(x)), generator=generator, device=generator.device).cpu()
    u = torch.rand((slots, len(x)), generator=generator, device=generator.device)
    strength = (2 * magnitude * u - magnitude).to(x.device, non_blocking=True)
    for slot in range(slots):
        for i, name in enumerate(names):
            chosen = (choice[slot] == i).nonzero()[:, 0].to(x.device, non_blocking=True)
            if not len(chosen):
                continue
            s = strength[slot, chosen]
            if name in GEOMETRY_OPS:
                geometry[chosen, GEOMETRY.index(name)] += s * GEOMETRY_OPS[name]
            else:
                x[chosen] = COLOUR_OPS[name](x[chosen], s.view(-1, 1, 1, 1)).clamp(0, 1)
    return x, geometry
