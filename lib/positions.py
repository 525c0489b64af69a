"""A vision tower for images of another size: its learned positions are resized once, when it is loaded."""

from dataclasses import fields

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.checks import checked
from lib.weights import empty_model


def resize_positions(positions: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Position embeddings [N, D] of a grid `old` -> [N', D] of a grid `new`, bicubic as in the published code."""
    if old == new:
        return positions
    grid = positions.T.reshape(1, -1, *old)
    return F.interpolate(grid.float(), size=new, mode="bicubic", align_corners=False).flatten(2)[0].T.to(positions.dtype)


def resized_tower(tower: nn.Module, image_size: int | tuple[int, int]) -> nn.Module:
    """A SiglipModel, its vision transformer or a ViTModel for images of image_size pixels, with the weights of `tower`. Raises
    ValueError for a size that its patches do not divide."""
    settings = {field.name: getattr(tower.config, field.name) for field in fields(tower.config)}
    config = checked(type(tower.config), **{**settings, "image_size": image_size})
    new = empty_model(type(tower), config)
    state = tower.state_dict()
    (name,) = (name for name in state if "embeddings.position_embedding" in name)
    positions = state[name]
    if positions.ndim == 3:  # a ViT's, after the position of its CLS token
        cls, patches = positions[0, :1], positions[0, 1:]
        state[name] = torch.cat([cls, resize_positions(patches, tower.config.grid, config.grid)])[None]
    else:
        state[name] = resize_positions(positions, tower.config.grid, config.grid)
    new.load_state_dict(state, assign=True)
    return new.train(tower.training)
