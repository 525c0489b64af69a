"""Two towers of which the one for images comes trained: any tower of this project, and SigLIP's pooling head on top of it.

Mirrors: "LiT: Zero-Shot Transfer with Locked-image text Tuning" (Zhai et al. 2022): the text tower learns captions of what a
frozen image tower sees already. Head, text tower and loss are those of siglip.py; only vision_model is another.

    towers = tower_pair(find_part("dinov2-s", "vision", 224), SiglipTextConfig(...))
    towers.image_embeddings(pixel_values)                # [B, P]
    features = towers.vision_features(pixel_values)      # [B, N, D]; those of a frozen tower never change: made once, and kept
    towers.image_embeddings(features)                    # the same embeddings
    python -m extras.train_siglip --dataset llava --data train.json --vision dinov2-s

Axes: B batch, N patches, D width of the image tower, P width of the shared space, which is D.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn as nn

from siglip import (
    SiglipConfig,
    SiglipModel,
    SiglipMultiheadAttentionPoolingHead,
    SiglipTextConfig,
    SiglipTowerConfig,
    SiglipTwoTower,
    SiglipVisionConfig,
    init_weights,
)
from vit_scratch import ViTConfig, ViTModel

TOWERS = {SiglipVisionConfig: SiglipModel, ViTConfig: ViTModel}


@dataclass
class TowerPairConfig(SiglipConfig):
    """vision_config is that of the image tower, of one of the classes in TOWERS; the head is as wide, with as many heads."""

    vision_feature_layer = None  # features are those after the tower's last norm; see data/features.py

    def __post_init__(self):
        if isinstance(self.text_config, dict):
            self.text_config = SiglipTextConfig(**self.text_config)
        assert type(self.vision_config) in TOWERS, f"a {type(self.vision_config).__name__} is no config of an image tower"
        if isinstance(self.vision_config, SiglipVisionConfig):  # whose own head would be a second one
            self.vision_config = replace(self.vision_config, vision_use_head=False)
        widths = self.vision_config.hidden_size, self.text_config.projection_size
        assert widths[0] == widths[1], f"images come out {widths[0]} wide and texts {widths[1]}: they must be equal"


class PooledTower(nn.Module):
    """A tower, and the head that makes one vector of its patches."""

    def __init__(self, config: SiglipVisionConfig | ViTConfig):
        super().__init__()
        self.config = config
        self.tower = TOWERS[type(config)](config)
        sizes = {"hidden_size": config.hidden_size, "num_attention_heads": config.num_attention_heads}
        self.head = SiglipMultiheadAttentionPoolingHead(SiglipTowerConfig(**sizes, attention=config.attention))
        init_weights(self.head)

    @property
    def frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.tower.parameters())

    def train(self, mode: bool = True) -> "PooledTower":
        """A frozen tower stays in eval mode: its features are to be the same each time."""
        super().train(mode)
        self.tower.train(mode and not self.frozen)
        return self

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, 3, height, width] -> [B, N, D]. A frozen tower keeps nothing for a backward pass."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.tower.features(pixel_values)

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """images: pixel_values [B, 3, height, width], or the features [B, N, D] made of them before -> [B, D]."""
        return self.head(self(images) if images.ndim == 4 else images)


class TowerPair(SiglipTwoTower):
    """What takes pixel_values in siglip.py takes the tower's features as well."""

    vision_class = PooledTower

    # What data/features.py asks of a model, to keep the features of a frozen tower.

    @property
    def vision_tower(self) -> nn.Module:
        return self.vision_model.tower

    def vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, 3, height, width] -> [B, N, D]."""
        return self.vision_model(pixel_values)


def tower_pair(tower: SiglipModel | ViTModel, text: SiglipTextConfig) -> TowerPair:
    """A trained tower with a head and a text tower that start untrained. Of a SigLIP the head stays behind."""
    towers = TowerPair(TowerPairConfig(tower.config, text))
    state = {name: tensor for name, tensor in tower.state_dict().items() if not name.startswith("vision_model.head.")}
    towers.vision_tower.load_state_dict(state)
    return towers
