"""Two towers whose image tower came trained (extras/tower_pairs.py): our own layout, in which vision_config says its class."""

from dataclasses import asdict

from extras.tower_pairs import TOWERS, TowerPair, TowerPairConfig
from lib.checks import checked
from lib.layouts.common import own_settings, part_class, prefix_layout


def read(published: dict) -> TowerPairConfig:
    settings = own_settings(published, TowerPairConfig)
    config_class = part_class(published, "vision_config", tuple(TOWERS))
    vision = {key: value for key, value in settings["vision_config"].items() if key != "class"}
    return checked(TowerPairConfig, **{**settings, "vision_config": checked(config_class, **vision)})


def write(config: TowerPairConfig) -> dict:
    found = asdict(config)
    found["vision_config"]["class"] = type(config.vision_config).__name__
    return found


LAYOUTS = {"tower_pair_scratch": prefix_layout(TowerPair, read, write, modules={})}
