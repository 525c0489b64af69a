"""Batches of generated scenes: images and packed questions for the whole model, images and labels of patches for a tower alone.

    batches = SceneBatches(processor, batch_size=64, seed=0)          # endless, fresh scenes with their questions
    batches = PatchLabels(processor, batch_size=64, seed=0, grid=4)   # what there is to be seen in each patch
    model(**next(batches)[0])                                         # a list: one part for each of grad_accum

Both can stop anywhere and go on with the very batch that was to follow (state_dict, load_state_dict).
"""

import torch

from data.batches import InOrder, blind_pixels
from data.packing import ids_and_labels, pack, share_prefix
from data.scenes import MIX, SLOTS, SceneConfig, Scenes, SceneStream, questions
from processing_mllama import IMAGE_TOKEN, scale_pixels

# As many digits as can be, and more handwritings than in the questions' scenes.
FULL_SCENES = SceneConfig(digits=(SLOTS, SLOTS), variants=64, rotate=12.0, shear=0.15)
TRAIN_MIX = {**MIX, "left_of": 5, "above": 5, "describe": 3, "sum": 3, "exists": 2, "digit": 2, "place": 2}


class SceneBatches(InOrder):
    """batch_size scenes (of this rank) a batch, in grad_accum parts, each scene with up to per_scene isolated questions."""

    def __init__(
        self, processor, batch_size: int, seed: int, per_scene: int = 12, grad_accum: int = 1, mix: dict = TRAIN_MIX,
        blind: bool = False, rank: int = 0, world_size: int = 1,
    ):  # fmt: skip
        self.processor, self.seed, self.per_scene, self.grad_accum = processor, seed, per_scene, grad_accum
        self.mix, self.blind = mix, blind
        self.order = SceneStream("train", batch_size, seed, rank=rank, world_size=world_size)
        self._encoded: dict[tuple[str, str], tuple] = {}

    def __next__(self) -> list[dict]:
        return [self.batch(scenes) for scenes in scene_parts(next(self.order), self.grad_accum)]

    def batch(self, scenes: Scenes) -> dict[str, torch.Tensor]:
        """What the model is called with. attention_mask is a function here (see pack, and gpt.attention)."""
        asked = questions(scenes, self.seed, self.per_scene, self.mix)
        samples = [share_prefix([self.encoded(turn) for turn in turns]) for turns in asked]
        packed = pack(samples, pad_token_id=self.processor.tokenizer.pad_token_id or 0)
        pixels = scene_pixels(self.processor, scenes)
        pixels = blind_pixels(pixels) if self.blind else pixels
        return {"pixel_values": pixels[packed.pop("order")], **packed}

    def encoded(self, turn) -> tuple[list[int], list[int]]:
        """(ids, labels) of one question. Each is encoded once, since it comes again with other images."""
        key = turn.question, turn.answer
        if key not in self._encoded:
            if len(self._encoded) > 100_000:
                self._encoded.clear()
            conversation = [*about_image(turn.question), {"role": "assistant", "content": turn.answer}]
            self._encoded[key] = ids_and_labels(self.processor, conversation, 1)
        return self._encoded[key]


class PatchLabels(SceneStream):
    """Full scenes, for a vision tower that learns to name what is in each patch of its grid (Scenes.dense_labels):
    "patch_labels", int64 [N, 3, patches], are digit, colour and place."""

    def __init__(self, processor, batch_size, seed: int, grid: int, grad_accum: int = 1, rank: int = 0, world_size: int = 1):
        super().__init__("train", batch_size, seed, FULL_SCENES, rank, world_size)
        self.processor, self.grid, self.grad_accum = processor, grid, grad_accum

    def __next__(self) -> list[dict]:
        return [self.batch(scenes) for scenes in scene_parts(super().__next__(), self.grad_accum)]

    def batch(self, scenes: Scenes) -> dict[str, torch.Tensor]:
        labels = torch.stack(scenes.dense_labels(self.grid), dim=1).flatten(2)
        return {"pixel_values": scene_pixels(self.processor, scenes), "patch_labels": labels}


def about_image(question: str) -> list[dict[str, str]]:
    """The messages of a single question about a single image."""
    return [{"role": "user", "content": f"{IMAGE_TOKEN}\n{question}"}]


def scene_parts(scenes: Scenes, parts: int) -> list[Scenes]:
    return [scenes[part] for part in torch.arange(len(scenes)).chunk(parts)]


def scene_pixels(processor, scenes: Scenes) -> torch.Tensor:
    """pixel_values [N, 3, S, S], as the processor makes them."""
    if tuple(scenes.images.shape[-2:]) != processor.image_size:
        return processor.pixel_values(list(scenes.images))
    return scale_pixels(scenes.images, processor.image_settings)
