"""Batches of conversations about images: rows of LLaVA-style JSON, or of shards, packed for the model.

    batches = LlavaBatches(rows, processor, images, batch_size=16, seed=0, length=1024)      # each row once an epoch
    batches = ShardBatches(shards, processor, images, batch_size=16, seed=0, length=1024)    # never all in memory
    model(**next(batches)[0])                          # a list: one part for each of grad_accum

Both can stop anywhere and go on with the very batch that was to follow (state_dict, load_state_dict).
"""

import functools
from collections.abc import Callable, Sequence

import torch

from data.batches import Batches, OfRows, blind_pixels
from data.features import FrozenFeatures
from data.image_cache import ImageCache
from data.llava import LlavaRow, LlavaRows, isolated_turns
from data.packing import Sample, encode_sample, pack
from data.shard_stream import ShardStream
from data.shards import Shards
from data.tiles import WHOLE
from processing_mllama import IMAGE_TOKEN


class LlavaBatches(OfRows):
    """Rows of LLaVA-style JSON, batch_size of them (on this rank) a batch, in grad_accum parts, each row once an epoch.

    isolated: every question of a row is asked alone, so that no answer helps with the next; else a row is one conversation.
    length: of packed rows, tokens, and context: of the model, for each conversation; what is longer is left out and counted
    in `too_long`. A row whose image cannot be read (any more) is left out too; images.unreadable has the reason.
    features: see FrozenFeatures. all_ranks: whether something holds in all processes; where one of them has no row left, all go
    on to the next batch, so that their epochs stay together. always_image: give a part that has no image an empty one, of
    which nothing is learned, since processes that share a model's weights must use the same parts of it (--fsdp).
    """

    def __init__(
        self, rows: LlavaRows, processor, images: ImageCache, batch_size: int, seed: int, length: int,
        isolated: bool = False, grad_accum: int = 1, blind: bool = False, workers: int = 1,
        features: FrozenFeatures | None = None, rank: int = 0, world_size: int = 1, context: int | None = None,
        all_ranks: Callable[[bool], bool] = bool, always_image: bool = False,
    ):  # fmt: skip
        self.all_ranks, self.always_image = all_ranks, always_image
        self.rows, self.processor, self.images, self.length, self.isolated = rows, processor, images, length, isolated
        self.grad_accum, self.blind, self.workers, self.features = grad_accum, blind, workers, features
        self.context = context or length
        self.order = Batches(len(rows), batch_size, seed, rank=rank, world_size=world_size)
        self.too_long: set[int] = set()

    def __next__(self) -> list[dict]:
        """Raises ValueError where of a whole epoch no batch has a row left in every part."""
        for _ in range(len(self) + 1):
            found = self.usable(self.next_rows())
            if self.all_ranks(len(found) >= self.grad_accum):
                return [self.packed(found[k :: self.grad_accum]) for k in range(self.grad_accum)]
        raise ValueError(
            f"{self.rows.source}: no batch is left; {len(self.images.unreadable)} images cannot be read, "
            f"{len(self.too_long)} rows are over {self.length} tokens: check the images, or raise --max-length"
        )

    def next_rows(self) -> Sequence[LlavaRow]:
        return [self.rows[i] for i in next(self.order).tolist()]

    def usable(self, rows: Sequence[LlavaRow]) -> list[tuple[Sample, list[torch.Tensor]]]:
        """(sample, what the model sees of its images) of each row that can be used."""
        if not self.features:
            self.images.load([path for row in rows for path in row.images], self.workers)
        return [(sample, seen) for row in rows if (sample := self.sample(row)) and (seen := self.vision_input(row)) is not None]

    def packed(self, found: Sequence[tuple[Sample, list[torch.Tensor]]]) -> dict[str, torch.Tensor]:
        """What the model is called with."""
        if self.always_image and not any(seen for _, seen in found):
            found = [*found, self._nothing]
        samples, seen = zip(*found, strict=True)
        packed = pack(samples, self.length, self.processor.tokenizer.pad_token_id or 0)
        seen = [image for i in packed.pop("order").tolist() for image in seen[i]]
        if seen:
            packed["vision_features" if self.features else "pixel_values"] = torch.cat(seen)
        return packed

    @functools.cached_property
    def _nothing(self) -> tuple[Sample, list[torch.Tensor]]:
        """A sample of one image, of which nothing is to be learned."""
        ids, _ = self.processor.encode([{"role": "user", "content": IMAGE_TOKEN}], 1)
        return Sample((ids, [-100] * len(ids)), []), [torch.zeros(1, 3, *self.processor.image_size)]

    def sample(self, row: LlavaRow) -> Sample | None:
        """The row's ids and labels, or None if it is too long, or an image cannot be read."""
        tilings = [self.images.tiling(path) for path in row.images]
        if None in tilings:
            return None
        conversations = isolated_turns(row.messages) if self.isolated else row.conversations
        sample = encode_sample(self.processor, conversations, [WHOLE] * len(tilings) if self.blind else tilings)
        if len(sample) <= self.length and sample.depth <= self.context:
            return sample
        self.too_long.add(row.number)
        return None

    def vision_input(self, row: LlavaRow) -> list[torch.Tensor] | None:
        """Pixels, or a frozen tower's features, of the row's images, tile by tile; None if one of them cannot be read."""
        seen = [(self.features or self.images)[path] for path in row.images]
        if any(image is None for image in seen):
            return None
        return [blind_pixels(image[-1:]) for image in seen] if self.blind and not self.features else seen

    def known_by(self) -> list:
        return [([path.name for path in row.images], row.messages) for row in self.rows]


class ShardBatches(LlavaBatches):
    """The same of Shards, with ShardImages: read from front to back, and never all in memory."""

    def __init__(self, rows: Shards, processor, images, batch_size: int, seed: int, length: int, **settings):
        super().__init__(rows, processor, images, batch_size, seed, length, **settings)
        ranks = {key: settings[key] for key in ("rank", "world_size", "workers") if key in settings}
        self.order = ShardStream(rows, images, batch_size, seed, **ranks)

    def next_rows(self) -> Sequence[LlavaRow]:
        return next(self.order)

    @property
    def rows_hash(self) -> str:
        return self.rows.fingerprint
