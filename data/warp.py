"""Images turned, moved, scaled and sheared, each in its own way, in one resampling. Axes: B images, H and W their sides."""

import math

import torch
import torch.nn.functional as F

GEOMETRY = ("rotate", "shift_x", "shift_y", "scale", "shear_x", "shear_y")  # columns of `geometry` [B, 6]


def warp(x: torch.Tensor, geometry: torch.Tensor, padding: str) -> torch.Tensor:
    """Rotates (degrees), shifts (fractions of the side), scales, shears about the centre, in one bilinear resampling.

    The matrix maps output to input positions. Its off-diagonal terms carry the aspect ratio, so that images that are
    not square turn without shearing.
    """
    B, _, H, W = x.shape
    angle, shift_x, shift_y, scale, shear_x, shear_y = geometry.unbind(1)
    cos, sin = (f(angle * (math.pi / 180)) / (1 + scale) for f in (torch.cos, torch.sin))
    row_x = torch.stack([cos - sin * shear_y, (cos * shear_x - sin) * (H / W), 2 * shift_x], dim=1)
    row_y = torch.stack([(sin + cos * shear_y) * (W / H), sin * shear_x + cos, 2 * shift_y], dim=1)
    grid = F.affine_grid(torch.stack([row_x, row_y], dim=1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode=padding, align_corners=False)
