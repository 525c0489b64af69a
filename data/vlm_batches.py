"""Batches for train_vlm.py: pictures and packed conversations, from generated scenes or from LLaVA-style JSON.

    batches = SceneBatches(processor, batch_size=64, seed=0)          # endless, fresh scenes with their questions
    batches = LlavaBatches(rows, processor, batch_size=16, seed=0)    # each row once an epoch; ShardBatches: from shards.py's
    batches = LabelledScenes(...), CommonAnswers(...)                 # for a vision tower alone: what there is to be seen
    model(**next(batches)[0])                                         # a list: one part for each of grad_accum

All can stop anywhere and go on with the very batch that was to follow (state_dict, load_state_dict).
"""

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.datasets import Batches
from data.llava import LlavaRows, PictureCache, Row, isolated_turns
from data.packing import Sample, encode_row, encode_sample, pack, share_beginning
from data.scenes import IGNORE, MIX, SLOTS, SceneConfig, Scenes, SceneStream, questions
from data.shards import Shards, ShardStream
from lib.answers import about_picture, blind_pixels
from lib.files import read_json, write_atomic, write_json
from processing_mllama import IMAGE_TOKEN, normalize, rescale

# As many digits as can be, and more handwritings than in the questions' scenes.
FULL_SCENES = SceneConfig(digits=(SLOTS, SLOTS), variants=64, rotate=12.0, shear=0.15)
TRAIN_MIX = {**MIX, "left_of": 5, "above": 5, "describe": 3, "sum": 3, "exists": 2, "digit": 2, "place": 2}


class SceneBatches:
    """batch_size scenes (of this rank) a batch, in grad_accum parts, each scene with up to per_scene isolated questions."""

    def __init__(
        self, processor, batch_size: int, seed: int, per_scene: int = 12, grad_accum: int = 1, mix: dict = TRAIN_MIX,
        blind: bool = False, rank: int = 0, world_size: int = 1, dense: bool = False,
    ):  # fmt: skip
        self.dense = dense
        self.processor, self.seed, self.per_scene, self.grad_accum = processor, seed, per_scene, grad_accum
        self.mix, self.blind = mix, blind
        self.stream = SceneStream("train", batch_size, seed, rank=rank, world_size=world_size)
        self._encoded: dict[tuple[str, str], tuple] = {}

    def __next__(self) -> list[dict]:
        return [self.batch(scenes) for scenes in scene_parts(next(self.stream), self.grad_accum)]

    def batch(self, scenes: Scenes) -> dict[str, torch.Tensor]:
        samples = [self._sample(turns) for turns in questions(scenes, self.seed, self.per_scene, self.mix)]
        packed = pack(samples, pad_token_id=self.processor.tokenizer.pad_token_id or 0, dense=self.dense)
        pixels = scene_pixels(self.processor, scenes)
        pixels = blind_pixels(pixels) if self.blind else pixels
        return {"pixel_values": pixels[packed.pop("order")], **packed}

    def _sample(self, turns) -> Sample:
        """What encode_sample makes of all the turns; each question is encoded once, as it comes again with other pictures."""
        return share_beginning([self.row(turn) for turn in turns])

    def row(self, turn) -> tuple[list[int], list[int]]:
        """(ids, labels) of one question."""
        key = turn.question, turn.answer
        if key not in self._encoded:
            if len(self._encoded) > 100_000:
                self._encoded.clear()
            conversation = [*about_picture(turn.question), {"role": "assistant", "content": turn.answer}]
            self._encoded[key] = encode_row(self.processor, conversation, 1)
        return self._encoded[key]

    @property
    def fraction(self) -> float:
        return self.stream.fraction

    def state_dict(self) -> dict:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.stream.load_state_dict(state)


class LabelledScenes(SceneStream):
    """Full scenes, for a vision tower that learns to name what is in each patch (Scenes.dense_labels)."""

    def __init__(self, processor, batch_size: int, seed: int, grad_accum: int = 1, rank: int = 0, world_size: int = 1):
        super().__init__("train", batch_size, seed, FULL_SCENES, rank, world_size)
        self.processor, self.grad_accum = processor, grad_accum

    def __next__(self) -> list[dict]:
        parts = scene_parts(super().__next__(), self.grad_accum)
        return [{"seen": scenes, "pixel_values": scene_pixels(self.processor, scenes)} for scenes in parts]


def scene_parts(scenes: Scenes, parts: int) -> list[Scenes]:
    return [scenes[part] for part in torch.arange(len(scenes)).chunk(parts)]


def scene_pixels(processor, scenes: Scenes) -> torch.Tensor:
    """pixel_values [N, 3, S, S], as the processor makes them."""
    if tuple(scenes.images.shape[-2:]) != processor.image_size:
        return processor.pixel_values(list(scenes.images))
    return normalize(rescale(scenes.images), processor.image_mean, processor.image_std)


class LlavaBatches:
    """Rows of LLaVA-style JSON, batch_size of them (on this rank) a batch, in grad_accum parts, each row once an epoch.

    isolated: every question of a row is asked alone, so that no answer helps with the next; else a row is one conversation.
    length: of packed rows, tokens, and context: of the model, for each conversation; what is longer is left out and counted
    in `too_long`. A row whose picture cannot be read (any more) is left out too; pictures.unreadable has the reason.
    features: see FrozenFeatures. all_ranks: whether something holds in all processes; where one of them has no row left, all go
    on to the next batch, so that their epochs stay together. always_see: give a part that has no picture an empty one, of
    which nothing is learned, since processes that share a model's weights must use the same parts of it (--fsdp).
    """

    def __init__(
        self, rows: LlavaRows, processor, pictures: PictureCache, batch_size: int, seed: int, length: int,
        isolated: bool = False, grad_accum: int = 1, blind: bool = False, workers: int = 1,
        features: "FrozenFeatures | None" = None, rank: int = 0, world_size: int = 1, context: int | None = None,
        all_ranks: Callable[[bool], bool] = bool, always_see: bool = False, dense: bool = False,
    ):  # fmt: skip
        self.dense = dense
        self.all_ranks, self.always_see = all_ranks, always_see
        self.rows, self.processor, self.pictures, self.length, self.isolated = rows, processor, pictures, length, isolated
        self.grad_accum, self.blind, self.workers, self.features = grad_accum, blind, workers, features
        self.context = context or length
        self.indices = Batches(len(rows), batch_size, seed, rank=rank, world_size=world_size)
        self.too_long: set[int] = set()

    def __len__(self) -> int:
        return len(self.indices)

    def __next__(self) -> list[dict]:
        """Raises ValueError where of a whole epoch no batch has a row left in every part."""
        for _ in range(len(self) + 1):
            found = self.usable(self.next_rows())
            if self.all_ranks(len(found) >= self.grad_accum):
                return [self.packed(found[k :: self.grad_accum]) for k in range(self.grad_accum)]
        raise ValueError(
            f"{self.rows.source}: no batch is left; {len(self.pictures.unreadable)} pictures cannot be read, "
            f"{len(self.too_long)} rows are over {self.length} tokens: check the pictures, or raise --max-length"
        )

    def next_rows(self) -> Sequence[Row]:
        return [self.rows[i] for i in next(self.indices).tolist()]

    def usable(self, rows: Sequence[Row]) -> list[tuple[Sample, list[torch.Tensor]]]:
        """Of those of these rows that can be used, the sample and its pictures."""
        if not self.features:
            self.pictures.load([path for row in rows for path in row.images], self.workers)
        return [(sample, seen) for row in rows if (sample := self.sample(row)) and (seen := self.see(row)) is not None]

    def packed(self, found: Sequence[tuple[Sample, list[torch.Tensor]]]) -> dict[str, torch.Tensor]:
        """What the model is called with."""
        if self.always_see and not any(seen for _, seen in found):
            found = [*found, self._nothing]
        samples, seen = zip(*found, strict=True)
        packed = pack(samples, self.length, self.processor.tokenizer.pad_token_id or 0, self.dense)
        seen = [picture for i in packed.pop("order").tolist() for picture in seen[i]]
        if seen:
            packed["vision_features" if self.features else "pixel_values"] = torch.stack(seen)
        return packed

    @functools.cached_property
    def _nothing(self) -> tuple[Sample, list[torch.Tensor]]:
        """A sample of one picture, of which nothing is to be learned."""
        ids, _ = self.processor.encode([{"role": "user", "content": IMAGE_TOKEN}], 1)
        return Sample((ids, [-100] * len(ids)), []), [torch.zeros(3, *self.processor.image_size)]

    def sample(self, row: Row) -> Sample | None:
        """The row's ids and labels, or None if it is too long."""
        sample = encode_sample(
            self.processor, isolated_turns(row.messages) if self.isolated else [row.messages], len(row.images)
        )
        if len(sample) <= self.length and sample.depth <= self.context:
            return sample
        self.too_long.add(row.number)
        return None

    def see(self, row: Row) -> list[torch.Tensor] | None:
        """Pixels, or a frozen tower's features, of the row's pictures; None if one of them cannot be read."""
        seen = [(self.features or self.pictures)[path] for path in row.images]
        if any(picture is None for picture in seen):
            return None
        return [blind_pixels(picture) for picture in seen] if self.blind and not self.features else seen

    @property
    def fraction(self) -> float:
        return self.indices.fraction

    @functools.cached_property
    def _rows_hash(self) -> str:
        rows = [([path.name for path in row.images], row.messages) for row in self.rows]
        return hashlib.sha256(repr(rows).encode()).hexdigest()

    def state_dict(self) -> dict:
        return {"rows": self._rows_hash, **self.indices.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError if the state is that of other rows."""
        if state["rows"] != self._rows_hash:
            raise ValueError(f"cannot resume: {self.rows.source} holds other rows now than when the run was started")
        self.indices.load_state_dict(state)


class ShardBatches(LlavaBatches):
    """The same of Shards, with ShardPictures: read from front to back, and never all in memory."""

    def __init__(self, rows: Shards, processor, pictures, batch_size: int, seed: int, length: int, **settings):
        super().__init__(rows, processor, pictures, batch_size, seed, length, **settings)
        ranks = {key: settings[key] for key in ("rank", "world_size", "workers") if key in settings}
        self.indices = ShardStream(rows, pictures, batch_size, seed, **ranks)

    def next_rows(self) -> Sequence[Row]:
        return next(self.indices)

    @property
    def _rows_hash(self) -> str:
        return self.rows.fingerprint


# What makes a question common: how many rows ask it, and how many different answers they give. At most so many questions.
LEAST_ASKED, MOST_ANSWERS, MOST_COMMON = 100, 50, 200


def questions_of(row: Row) -> list[tuple[str, str]]:
    """(question, answer) of all turns of a row with one picture; of others none."""
    if len(row.images) != 1:
        return []
    said = [message["content"].replace(IMAGE_TOKEN, "").strip() for message in row.messages if message["role"] != "system"]
    return list(zip(said[::2], said[1::2], strict=True))


def common_questions(rows: LlavaRows) -> dict[str, dict[str, int]]:
    """Those that many rows ask and few answers settle, such as "What shape is it?": question -> {answer: its number}."""
    found: dict[str, Counter] = {}
    for row in rows:
        for question, said in questions_of(row):
            found.setdefault(question, Counter())[said] += 1
    common = [q for q, n in found.items() if n.total() >= LEAST_ASKED and 2 <= len(n) <= MOST_ANSWERS]
    common = sorted(common, key=lambda question: -found[question].total())[:MOST_COMMON]
    return {question: {said: i for i, said in enumerate(sorted(found[question]))} for question in common}


class CommonAnswers:
    """Pictures with the answers to common questions about them: what a vision tower can learn to see, without a language model,
    from nothing but conversations. Batches of rows that have such answers, each once an epoch.

    `seen`: int64 [N, questions], the answer's number, or IGNORE where a question was not asked.
    """

    def __init__(
        self, rows: LlavaRows, common: dict[str, dict[str, int]], pictures: PictureCache, batch_size: int, seed: int,
        grad_accum: int = 1, workers: int = 1, rank: int = 0, world_size: int = 1, all_ranks: Callable[[bool], bool] = bool,
    ):  # fmt: skip
        self.pictures, self.grad_accum, self.workers, self.all_ranks = pictures, grad_accum, workers, all_ranks
        self.columns = {question: column for column, question in enumerate(common)}
        self.common, self.rows = common, [row for row in rows if not common.keys().isdisjoint(dict(questions_of(row)))]
        self.indices = Batches(len(self.rows), batch_size, seed, rank=rank, world_size=world_size)

    def __next__(self) -> list[dict]:
        """Raises ValueError where no picture of a whole epoch can be read."""
        for _ in range(len(self.indices) + 1):
            rows = [self.rows[i] for i in next(self.indices).tolist()]
            self.pictures.load([row.images[0] for row in rows], self.workers)
            rows = [(row, pixels) for row in rows if (pixels := self.pictures[row.images[0]]) is not None]
            if self.all_ranks(len(rows) >= self.grad_accum):
                return [self.part(rows[k :: self.grad_accum]) for k in range(self.grad_accum)]
        raise ValueError(f"no batch is left: {len(self.pictures.unreadable)} pictures cannot be read")

    def part(self, rows: list[tuple[Row, torch.Tensor]]) -> dict[str, torch.Tensor]:
        seen = torch.full((len(rows), len(self.common)), IGNORE)
        for number, (row, _) in enumerate(rows):
            for question, said in questions_of(row):
                if question in self.common:
                    seen[number, self.columns[question]] = self.common[question][said]
        return {"seen": seen, "pixel_values": torch.stack([pixels for _, pixels in rows])}

    @property
    def fraction(self) -> float:
        return self.indices.fraction

    def state_dict(self) -> dict:
        return self.indices.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.indices.load_state_dict(state)


class FrozenFeatures:
    """What a frozen vision tower makes of each picture, [N, Dv]: computed when asked for, or once for all and kept in a file.
    It must not train any more.

    Pictures go through the tower one by one, since matrix products round differently in batches of other sizes: so training
    with the file and without it is the same to the last bit. The file is a numpy array [pictures, N, Dv], with a .json beside
    it that names them and says by which weights and settings it was made; one that was made by others is made anew.
    """

    def __init__(self, model, pictures: PictureCache, blind: bool = False, most_bytes: int = 2**30):
        self.model, self.pictures, self.blind, self.room = model, pictures, blind, most_bytes
        self.device = next(model.vision_tower.parameters()).device
        self._places: dict[Path, int] = {}
        self._kept: dict[Path, torch.Tensor] = {}

    def __getitem__(self, path: Path) -> torch.Tensor | None:
        """None for a picture that cannot be read."""
        if path in self._places:
            return torch.from_numpy(self._table[self._places[path]].copy())
        if path not in self._kept and (pixels := self.pictures[path]) is not None:
            features = self._look(pixels)
            if features.nbytes > self.room:
                return features
            self.room -= features.nbytes
            self._kept[path] = features
        return self._kept.get(path)

    @torch.no_grad()
    def _look(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = blind_pixels(pixels) if self.blind else pixels
        return self.model.vision_features(pixels[None].to(self.device))[0].cpu()

    def keep(self, file: Path, paths: Sequence[Path], workers: int = 1, progress: bool = False) -> None:
        """Read the features of all these pictures from the file, or make it; it appears whole or not at all."""
        paths, facts = sorted(set(paths)), Path(f"{file}.json")
        made_by = self._fingerprint(paths)
        if not (file.exists() and facts.exists() and read_json(facts).get("made_by") == made_by):
            facts.unlink(missing_ok=True)  # of the file before: from here on it describes nothing
            write_atomic(file, lambda tmp: self._fill(tmp, paths, workers, progress))
            readable = [str(path) for path in paths if path not in self.pictures.unreadable]
            write_json(facts, {"made_by": made_by, "pictures": readable})
        self._table = np.load(file, mmap_mode="r")
        self._places = {Path(path): place for place, path in enumerate(read_json(facts)["pictures"])}

    def _fill(self, file: Path, paths: Sequence[Path], workers: int, progress: bool) -> None:
        config = self.model.config.vision_config
        shape = (len(paths), math.prod(config.grid), config.hidden_size)
        facts = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
        with file.open("wb") as out:  # not a memory map: a full disk would kill the process, without a word
            np.lib.format.write_array_header_1_0(out, facts)
            end = out.tell() + 4 * math.prod(shape)
            for start in tqdm(range(0, len(paths), 64), "looking at the pictures once", disable=not progress):
                self.pictures.load(paths[start : start + 64], workers)
                for path in paths[start : start + 64]:
                    if (pixels := self.pictures[path]) is not None:
                        out.write(self._look(pixels).float().numpy().tobytes())
            out.truncate(end)  # zeros in place of pictures that cannot be read

    def _fingerprint(self, paths: Sequence[Path]) -> str:
        digest = hashlib.sha256(repr((self.blind, self.pictures.settings, self.model.config.vision_feature_layer)).encode())
        for name, tensor in self.model.vision_tower.state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        for path in paths:
            facts = path.stat() if path.exists() else None
            digest.update(repr((str(path), facts and (facts.st_size, facts.st_mtime_ns))).encode())
        return digest.hexdigest()
