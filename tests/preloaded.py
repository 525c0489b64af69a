"""What conftest.py's nursery does once, before it is forked: seconds of imports, and the handwriting of scenes cut."""

import matplotlib.figure  # noqa: F401
import torch._dynamo  # noqa: F401  the first step of an optimiser imports it
import torch.distributed.fsdp  # noqa: F401

import finetune_vlm  # noqa: F401
import train_vit  # noqa: F401
import train_vlm  # noqa: F401
from data.scene_batches import FULL_SCENES
from data.scenes import make_scenes
from extras import train_llmvit, train_siglip  # noqa: F401

torch.set_num_threads(1)
for split, config in (("train", None), ("test", None), ("train", FULL_SCENES)):
    make_scenes(split, 1, config=config)
