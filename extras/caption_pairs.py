"""Images and captions that are true of them, for train_siglip.py: drawn for a batch, and to test with.

Of scenes of digits, which never end; of images with classes, whose caption names the class; of rows of LLaVA-style JSON, whose
captions are their own or the first answer; of shards of such rows. Each has draw, tests, texts, settings (of its images) and
what run.steps asks of batches.
Axes: B images of the batch; N of a test; M captions; S the image's side.
"""

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from data.augment import PRESETS as AUGMENTATIONS
from data.augment import Augment
from data.batches import Batches, InOrder, OfRows, fit_batch_size
from data.features import FrozenFeatures
from data.image_cache import ImageCache
from data.image_settings import ImageSettings
from data.llava import LlavaRow, questions_of_row
from data.rows import FIRST_ROWS, load_rows
from data.scenes import COLOURS, PLACES, SLOTS, SceneConfig, Scenes, SceneStream, corpus, make_scenes, with_article
from data.shard_stream import ShardStream
from data.shards import ShardImages
from lib.classification import load_data
from processing_mllama import denormalize, rescale, scale_pixels

GALLERY = 200  # test images that a caption has to be found among; of rows only until the last evaluation, which takes them all
ALONE = 0.5  # of a run on scenes, the part with one digit an image
SINGLES = 3  # captions of a single digit that come with each scene


class Pairs(NamedTuple):
    """Images, captions drawn for them, as many for each, and of each image all the captions that are true."""

    pixels: torch.Tensor  # float32 [B, 3, S, S], normalised, or features of a frozen tower [B, patches, D]
    captions: list[str]  # M
    true: list[frozenset[str]]  # B


@dataclass(frozen=True)
class Test:
    """Images, and captions to choose from: one or more of each image, or, with `classes`, a few for all of them."""

    images: torch.Tensor  # uint8 [N, 1 or 3, h, w]
    captions: list[str]  # M
    true: list[frozenset[str]]  # N
    classes: bool = False
    words: tuple[str, ...] = ()  # what the words of a class's caption stand for, from the second on
    starts: Sequence[int] = ()  # where the captions of each image begin; (): it has one
    paths: Sequence[Path] = ()
    features: FrozenFeatures | None = None  # of the images at `paths`, in place of pixels

    @property
    def first(self) -> list[int]:
        """Where the first caption of each image stands."""
        return list(self.starts or range(len(self.true)))

    def own(self, i: int) -> str:
        """The caption of image i; of several the first."""
        return next(c for c in self.captions if c in self.true[i]) if self.classes else self.captions[self.first[i]]

    def inputs(self, part: slice, settings: ImageSettings) -> torch.Tensor:
        """What the image tower gets of these images, as in Pairs."""
        if self.features is not None:
            return torch.cat([self.features[path] for path in self.paths[part]])
        return scale_pixels(self.images[part].expand(-1, 3, -1, -1), settings)


def true_pairs(true: Sequence[frozenset[str]], captions: Sequence[str]) -> torch.Tensor:
    """bool [N images, M captions]: which are true of which."""
    columns: dict[str, list[int]] = {}
    for column, caption in enumerate(captions):
        columns.setdefault(caption, []).append(column)
    pairs = [(row, j) for row, known in enumerate(true) for caption in known for j in columns.get(caption, ())]
    found = torch.zeros(len(true), len(captions), dtype=torch.bool)
    if pairs:
        found[tuple(torch.tensor(pairs).T)] = True
    return found


def scene_captions(scenes: Scenes) -> list[tuple[str, str, list[str], frozenset[str]]]:
    """Of each scene: all its digits with their places; without; each digit alone, with its colour and without; and all that is
    true of it: any of its digits, in reading order, all with their places or all without, and each without its colour."""
    found = []
    columns = (getattr(scenes, name).tolist() for name in ("digits", "colours", "cells", "layouts", "counts"))
    for digits, colours, cells, layout, count in zip(*columns, strict=True):
        things = [with_article(f"{COLOURS[colours[i]]} {digits[i]}") for i in range(count)]
        placed = [f"{thing} at the {PLACES[layout][cells[i]]}" for i, thing in enumerate(things)]
        single = things + [with_article(digit) for digit in digits[:count]]
        parts = [part for said in (things, placed) for n in range(count) for part in itertools.combinations(said, n + 1)]
        found.append((", ".join(placed), ", ".join(things), single, frozenset([*map(", ".join, parts), *single])))
    return found


class ScenePairs:
    """Fresh scenes, each with a caption of all its digits, now with their places and now without, and some of single digits.

    To tell whose a long caption is, colours and places suffice, and no digit is ever read; "a 3" asks for nothing else. And
    reading begins earlier where one digit is all there is to see: so it is in the first part of a run, ALONE of it.
    """

    def __init__(self, args, run):
        if args.data:
            raise ValueError(f"scenes are made on the fly and take no --data (given: {args.data})")
        self.seed, self.count, self.size = args.seed, args.eval_count, args.image_size
        several, alone = SceneConfig(size=self.size), SceneConfig(size=self.size, digits=(1, 1))
        size = args.batch_size // run.world_size
        self.streams = [SceneStream("train", size, args.seed, c, run.rank, run.world_size) for c in (alone, several)]
        pixels = rescale(make_scenes("train", 500, args.seed, several).images)
        mean, std = (tuple(f(pixels, dim=(0, 2, 3)).tolist()) for f in (torch.mean, torch.std))
        self.settings = ImageSettings(self.size, image_mean=mean, image_std=std)
        self.steps = 10_000 // args.batch_size

    def __len__(self) -> int:
        """Batches an epoch; as there is no end, 10,000 scenes are called one."""
        return self.steps

    @property
    def fraction(self) -> float:
        return sum(stream.fraction for stream in self.streams)

    def state_dict(self) -> dict:
        return {"streams": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: dict) -> None:
        for stream, saved in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(saved)

    def texts(self) -> list[str]:
        """To train a tokenizer on; the longest captions are among them."""
        spots = [f"{with_article(f'{c} {d}')} at the {place}" for c in COLOURS for d in range(10) for place in PLACES[3]]
        return corpus() + [", ".join([spot] * SLOTS) for spot in spots]

    def draw(self, generator: torch.Generator, progress: float) -> Pairs:
        """progress: of the run, 0..1."""
        scenes, captions = next(self.streams[progress >= ALONE]), []
        found = scene_captions(scenes)
        for number, (placed, things, single, _) in zip(scenes.numbers.tolist(), found, strict=True):
            pick = random.Random(f"{self.seed}/{number}/caption")
            captions.append((placed, things)[int(2 * pick.random())])
            captions += [single[int(len(single) * pick.random())] for _ in range(SINGLES)]
        return Pairs(scale_pixels(scenes.images, self.settings), captions, [true for *_, true in found])

    def tests(self, quick: bool = False) -> dict[str, Test]:
        """A gallery of whole captions; single digits with the 80 prompts "a COLOUR DIGIT", the pairs of colour and digit that
        no training scene shows apart from the others."""
        scenes = make_scenes("test", GALLERY, 0, SceneConfig(size=self.size))
        said = scene_captions(scenes)
        found = {"": Test(scenes.images, [placed for placed, *_ in said], [true for *_, true in said])}
        prompts = [with_article(f"{colour} {digit}") for colour in COLOURS for digit in range(10)]
        for split in ("test", "compositional"):
            one = make_scenes(split, self.count, 0, SceneConfig(size=self.size, digits=(1, 1)))
            true = [true for *_, true in scene_captions(one)]
            found[f"{split}_"] = Test(one.images, prompts, true, True, ("colour", "digit"))
        return found


class ClassPairs(InOrder):
    """Images with classes, augmented; the caption says the class."""

    def __init__(self, args, run):
        self.train, self.test = load_data(args, run)
        fit_batch_size(run, len(self.train), "images")
        mean, std = (tuple(values) * (3 // len(values)) for values in self.train.mean_std())  # grey becomes RGB
        self.settings = ImageSettings(tuple(self.train.images.shape[-2:]), image_mean=mean, image_std=std)
        self.captions = [args.caption.format(name.replace("_", " ")) for name in self.train.classes]
        self.order = Batches(len(self.train), args.batch_size // run.world_size, args.seed, run.rank, run.world_size)
        self.augment = Augment(AUGMENTATIONS[args.augment], mean, std)

    def texts(self) -> list[str]:
        return self.captions

    def draw(self, generator: torch.Generator, progress: float) -> Pairs:
        chosen = next(self.order).to(self.train.images.device)
        images = self.train.images[chosen].to(generator.device).expand(-1, 3, -1, -1)
        captions = [self.captions[label] for label in self.train.labels[chosen].tolist()]
        return Pairs(self.augment(images, generator), captions, [frozenset([caption]) for caption in captions])

    def tests(self, quick: bool = False) -> dict[str, Test]:
        every = max(1, len(self.test) // 1000) if quick else 1
        true = [frozenset([self.captions[label]]) for label in self.test.labels[::every].tolist()]
        return {"test_": Test(self.test.images[::every], self.captions, true, classes=True)}


class RowPairs(OfRows):
    """Rows of LLaVA-style JSON with one image each; all captions of a row (see captions_of) are true of its image wherever that
    comes again. settings: of the images; default: squeezed to --image-size."""

    def __init__(self, args, run, settings: ImageSettings | None = None):
        rows, test = load_rows(args, run)
        self.run, self.workers = run, args.workers
        self.images = ImageCache(settings or args.image_size)
        self.settings = self.images.settings
        self.features: FrozenFeatures | None = None  # what draw takes of images in place of pixels
        self.test_features: FrozenFeatures | None = None
        self.true: dict[Path, frozenset[str]] = {}
        self.test = self.checked(test)
        self.open(rows, args.seed)

    def checked(self, rows):
        """Those with one image. Raises ValueError where there are none."""
        found = rows.subset(i for i, row in enumerate(rows) if len(row.images) == 1)
        if not len(found):
            raise ValueError(f"{rows.source}: none of {len(rows)} rows has exactly one image")
        if left_out := len(rows) - len(found):
            self.run.print(f"{left_out} rows are left out: a pair is one image and its caption")
        for path, captions in captions_by_image(found).items():
            self.true[path] = self.true.get(path, frozenset()) | {*captions}
        return found

    def open(self, rows, seed: int) -> None:
        self.rows = self.checked(rows)
        self.size = self.fitting_size()
        self.order = Batches(len(self.rows), self.size, seed, self.run.rank, self.run.world_size)

    def fitting_size(self) -> int:
        """Rows of a batch, in this process."""
        fit_batch_size(self.run, len(self.rows), "rows")
        return self.run.args.batch_size // self.run.world_size

    def texts(self) -> list[str]:
        return [caption for row in self.rows for caption in captions_of(row)]

    def next_rows(self) -> list[tuple[LlavaRow, torch.Tensor]]:
        """The readable ones of the next batch."""
        rows = [self.rows[i] for i in next(self.order).tolist()]
        if self.features is None:
            self.images.load([row.images[0] for row in rows], self.workers)
        seen = self.images if self.features is None else self.features
        return [(row, image) for row in rows if (image := seen[row.images[0]]) is not None]

    def draw(self, generator: torch.Generator, progress: float) -> Pairs:
        """Each image with one of its row's captions, whose choice depends on the generator's seed. An image that cannot be read
        is replaced by another one of the batch: so batches keep their size. Raises ValueError where none can be read in a
        whole epoch."""
        pick = random.Random(generator.initial_seed())
        for _ in range(len(self) + 1):
            good = self.next_rows()
            if self.run.all(bool(good)):  # to stay together
                chosen = [good[k % len(good)] for k in range(self.size)]
                said = [captions_of(row) for row, _ in chosen]
                captions = [own[int(len(own) * pick.random())] for own in said]
                true = [self.true.get(row.images[0], frozenset(own)) for (row, _), own in zip(chosen, said, strict=True)]
                return Pairs(torch.cat([image for _, image in chosen]), captions, true)
        raise ValueError(f"{self.rows.source}: none of its images can be read")

    def tests(self, quick: bool = False) -> dict[str, Test]:
        """A gallery of all test images with all their captions; quick: of the first GALLERY, which its name says, since among
        fewer more is found."""
        captions = captions_by_image(self.test)
        count = min(GALLERY, len(captions)) if quick else len(captions)
        self.images.load(itertools.islice(captions, count), self.workers)
        paths = list(itertools.islice((path for path in captions if self.images[path] is not None), count))
        if not paths:
            raise ValueError(f"{self.test.source}: none of the test images can be read")
        said = [caption for path in paths for caption in captions[path]]
        starts = list(itertools.accumulate((len(captions[path]) for path in paths), initial=0))[:-1]
        images = torch.cat([denormalize(self.images[path], self.settings) for path in paths])
        more = {"starts": starts, "paths": paths, "features": self.test_features}
        name = f"first_{len(paths)}_" if count < len(captions) else ""
        return {name: Test(images, said, [self.true[path] for path in paths], **more)}

    def known_by(self) -> list:
        return [(row.images[0].name, captions_of(row)) for row in self.rows]


class ShardPairs(RowPairs):
    """The same of shards (shards.py). Whether an image comes again with another caption is not known there."""

    state_dict, load_state_dict = InOrder.state_dict, InOrder.load_state_dict  # a ShardStream knows whose rows it has

    def open(self, rows, seed: int) -> None:
        self.rows, ranks = rows, (self.run.rank, self.run.world_size, self.workers)
        self.size = self.fitting_size()
        self.order = ShardStream(rows, ShardImages(self.settings), self.size, seed, *ranks)

    def texts(self) -> list[str]:
        return [caption for row in self.rows.head(FIRST_ROWS) for caption in captions_of(row)]

    def next_rows(self) -> list[tuple[LlavaRow, torch.Tensor]]:
        rows = [row for row in next(self.order) if len(row.images) == 1]
        return [(row, pixels) for row in rows if (pixels := self.order.images[row.images[0]]) is not None]


def captions_of(row: LlavaRow) -> list[str]:
    """The different answers that the row calls captions, as it does with {"image", "captions"}; else its first answer."""
    answers = [(" ".join(truth.split()), kind) for _, truth, kind in questions_of_row(row)]
    captions = [answer for answer, kind in answers if kind == "caption"] or [answers[0][0]]
    return list(dict.fromkeys(captions))


def captions_by_image(rows: Iterable[LlavaRow]) -> dict[Path, list[str]]:
    """Of rows with one image each: all that is said of it, each once."""
    found: dict[Path, dict[str, None]] = {}
    for row in rows:
        found.setdefault(row.images[0], {}).update(dict.fromkeys(captions_of(row)))
    return {path: list(captions) for path, captions in found.items()}
