"""Train two towers (siglip.py) to tell which caption belongs to which picture: sight that is learned from words alone.

    python train_siglip.py                                    scenes of handwritten digits and their captions, in five minutes
    python train_siglip.py --dataset llava --data train.json --images DIR            captions: each row's first answer
    python train_siglip.py --dataset llava --data 'OUT/shard-*.tar' --test-data test.json            see shards.py
    python train_siglip.py --dataset cifar10 --size small     "a photo of a {class}": a classifier made of captions
    python train_siglip.py --dataset folder --data photos.tar.gz
    python train_siglip.py --batch-size 2048 --chunk 128      a large batch in little memory, with the same gradients
    torchrun --nproc-per-node 8 train_siglip.py ...           on 8 GPUs; every picture still meets every caption
    python train_siglip.py --out runs/siglip-scenes --resume  go on after Ctrl-C, exactly

Mirrors: "Sigmoid Loss for Language Image Pre-Training" (Zhai et al. 2023), with gradient caching (Gao et al. 2021). A pair
counts as right wherever the caption is true of the picture, and not only where the two were drawn together.

Writes runs/siglip-DATASET/, which transformers opens as a SiglipModel: config.json, model.safetensors, the tokenizer,
preprocessor_config.json; metrics.jsonl, curves.png, samples.png, result.json. The last line printed is JSON. Then
`python generate.py RUN --image x.png --zero-shot "a red 3" "a blue 7"`, and `python train_vlm.py --vision RUN`.
Axes: B pictures of the batch, of all processes; N of a test; M captions; P width of the shared space.
"""

import hashlib
import itertools
import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data.augment import PRESETS as AUGMENTATIONS
from data.augment import Augment
from data.batches import Batches
from data.datasets import evenly
from data.image_cache import ImageCache
from data.llava import LlavaRow
from data.scenes import COLOURS, PLACES, SLOTS, SceneConfig, Scenes, SceneStream, corpus, make_scenes, with_article
from data.shard_stream import ShardStream
from data.shards import ShardImages
from lib import figures
from lib.checkpoint import from_pretrained, save_pretrained
from lib.classification import default_patch, load_data
from lib.files import read_json, write_json
from lib.image_settings import write_image_settings
from lib.old_trainer import (
    Run,
    Trainer,
    argument_parser,
    everyones,
    not_negative_float,
    not_negative_int,
    parameter_groups,
    positive_float,
    positive_int,
    run_cli,
)
from lib.tokenizer import BPETokenizer
from processing_mllama import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, denormalize, normalize, rescale
from siglip import SiglipConfig, SiglipTextConfig, SiglipTwoTower, SiglipVisionConfig
from train_vit import SIZES as VIT_SIZES
from train_vlm import FIRST_ROWS, is_sharded_data, load_rows
from vit_scratch import sincos_positions

# ---- settings --------------------------------------------------------------------------------------------------------

# The one dial: (vision tower, text tower, vocabulary of the tokenizer that is trained here). "tiny" sees like train_vlm.py's
# "tiny", the others like train_vit.py's of the same name.
SIZES = {
    "tiny": (
        {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6},
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        2048,
    ),
    "small": (VIT_SIZES["small"], {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 6}, 4096),
    "medium": (VIT_SIZES["medium"], {"hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6}, 8192),
    "base": ({}, {}, 32000),
}
# Per data set. Every value has a flag that replaces it. Of scenes, which never end, 10,000 are called an epoch. With Muon at
# 0.03 in place of 0.01, 936 steps taught it half as many of the scenes' digits (14.6 % for 28.4); elsewhere it was not tried.
RECIPES = {
    "scenes": {"image_size": 64, "patch_size": 16, "epochs": 8, "batch_size": 64, "muon_lr": 0.01},
    "llava": {"image_size": 64, "patch_size": 8, "epochs": 30, "batch_size": 64},
    "digits": {"image_size": 16, "patch_size": 4, "epochs": 30, "batch_size": 64},
    "mnist": {"image_size": 28, "patch_size": 7, "epochs": 2, "batch_size": 64},
    "fashion-mnist": {"image_size": 28, "patch_size": 7, "epochs": 4, "batch_size": 64},
    "cifar10": {"image_size": 32, "patch_size": 4, "epochs": 100, "batch_size": 128},
    "folder": {"image_size": None, "patch_size": None, "epochs": 30, "batch_size": 128},
}
GALLERY = 200  # test pictures that a caption has to be found among
ALONE = 0.5  # of a run on scenes, the part with one digit a picture
SINGLES = 3  # captions of a single digit that come with each scene
CHOICES = 100  # captions that one is chosen from, the true one among them
MOST_TOKENS = 64  # the length of all texts of the published models
END = "<|endoftext|>"  # fills every text up to the text tower's length, as in the published models


def parse_args(argv=None):
    parser = argument_parser(__doc__, batch_size=None, lr=2e-3, eval_every=400)
    add = parser.add_argument
    add("--dataset", choices=list(RECIPES), default="scenes")
    add("--images", metavar="DIR", help="where the pictures of --data FILE.json are; default: beside it")
    add("--test-data", metavar="FILE.json", help="held-out rows; default: --test-part of --data, split by picture")
    add("--test-part", type=positive_float, default=0.1)
    add("--split-seed", type=not_negative_int, default=0, help="another test part, where a folder or digits come without")
    add("--size", choices=list(SIZES), default="tiny", help="width and depth of both towers")
    add("--image-size", type=positive_int, help="pixels; default depends on the data set")
    add("--patch-size", type=positive_int, help="pixels; default depends on the data set")
    add("--tokens", type=positive_int, help="to which every caption is filled up or cut; default: what the longest needs, at "
        f"most {MOST_TOKENS}; transformers' zero-shot pipeline wants {MOST_TOKENS}")  # fmt: skip
    add("--caption", default="a photo of a {}", help="what is said of a picture of a class, {} being the class")
    add("--augment", choices=list(AUGMENTATIONS), help="of pictures with classes; default: made for the data set")
    add("--dropout", type=not_negative_float, default=0.0, help="of attention weights, in both towers")
    add("--muon-lr", type=not_negative_float, help="Muon's: default 0.03, scenes 0.01; 0: AdamW for all (far slower)")
    add("--steps", type=positive_int, help="in place of --epochs")
    add("--chunk", type=positive_int, metavar="N", help="hold the activations of N pairs at a time (of each process); same "
        "gradients, half as much time again")  # fmt: skip
    add("--eval-count", type=positive_int, default=500, help="test scenes of one digit, with the 80 prompts")
    args = parser.parse_args(argv)
    for key, value in {"muon_lr": 0.03, **RECIPES[args.dataset]}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.dataset == "llava" and not args.data:
        parser.error("--dataset llava needs --data FILE.json, or shards: 'DIR/shard-*.tar'")
    if is_sharded_data(args) and not args.test_data:
        parser.error(f"--data {args.data}: shards need --test-data FILE.json")
    if args.caption.count("{}") != 1 or "{" in args.caption.replace("{}", ""):
        parser.error(f"--caption {args.caption!r} must hold {{}} once, where the class stands")
    if args.dropout >= 1:
        parser.error(f"--dropout {args.dropout:g} must be below 1")
    if args.chunk:  # for a contrastive loss the same thing: all negatives stay in it
        size = int(os.environ.get("WORLD_SIZE", 1)) * args.chunk
        if args.grad_accum > 1 or args.batch_size % size:
            parser.error(f"--chunk {args.chunk}: choose a part of --batch-size {args.batch_size}, and no --grad-accum")
        args.grad_accum = args.batch_size // size
    args.augment = args.augment or (args.dataset if args.dataset in AUGMENTATIONS else None)
    args.out = args.out or f"runs/siglip-{args.dataset}"
    return args


# ---- pairs -----------------------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """Pictures, captions drawn for them, as many for each, and of each picture all the captions that are true."""

    pixels: torch.Tensor  # float32 [B, 3, S, S], normalised
    captions: list[str]  # M
    true: list[frozenset[str]]  # B


@dataclass(frozen=True)
class Test:
    """Pictures, and captions to choose from: one each, or, with `classes`, a few for all of them."""

    images: torch.Tensor  # uint8 [N, 1 or 3, h, w]
    captions: list[str]  # M
    true: list[frozenset[str]]  # N
    classes: bool = False
    words: tuple[str, ...] = ()  # what the words of a class's caption stand for, from the second on

    def own(self, i: int) -> str:
        """The caption of picture i."""
        return next(c for c in self.captions if c in self.true[i]) if self.classes else self.captions[i]


def true_pairs(true: Sequence[frozenset[str]], captions: Sequence[str]) -> torch.Tensor:
    """bool [N pictures, M captions]: which are true of which."""
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
    reading begins sooner where one digit is all there is to see: so it is in the first part of a run, ALONE of it.
    """

    def __init__(self, args, run: Run):
        if args.data:
            raise ValueError(f"scenes are made on the fly and take no --data (given: {args.data})")
        self.seed, self.count, self.size = args.seed, args.eval_count, args.image_size
        several, alone = SceneConfig(size=self.size), SceneConfig(size=self.size, digits=(1, 1))
        size = args.batch_size // run.world_size
        self.streams = [SceneStream("train", size, args.seed, c, run.rank, run.world_size) for c in (alone, several)]
        pixels = rescale(make_scenes("train", 500, args.seed, several).images)
        self.mean, self.std = (tuple(f(pixels, dim=(0, 2, 3)).tolist()) for f in (torch.mean, torch.std))
        self.image_size = self.size, self.size
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
        return Pairs(normalize(rescale(scenes.images), self.mean, self.std), captions, [true for *_, true in found])

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


class Shuffled:
    """What pairs from a finite data set share: `batches` of it, which know where they stand."""

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def fraction(self) -> float:
        return self.batches.fraction

    def state_dict(self) -> dict:
        return self.batches.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.batches.load_state_dict(state)


class ClassPairs(Shuffled):
    """Pictures with classes, augmented; the caption says the class."""

    def __init__(self, args, run: Run):
        self.train, self.test = load_data(args, run)
        self.mean, self.std = (values * (3 // len(values)) for values in self.train.mean_std())  # grey becomes RGB
        self.captions = [args.caption.format(name.replace("_", " ")) for name in self.train.classes]
        self.image_size = tuple(self.train.images.shape[-2:])
        self.batches = Batches(len(self.train), args.batch_size // run.world_size, args.seed, True, run.rank, run.world_size)
        self.augment = Augment(AUGMENTATIONS[args.augment], self.mean, self.std)

    def texts(self) -> list[str]:
        return self.captions

    def draw(self, generator: torch.Generator, progress: float) -> Pairs:
        chosen = next(self.batches).to(self.train.images.device)
        images = self.train.images[chosen].to(generator.device).expand(-1, 3, -1, -1)
        captions = [self.captions[label] for label in self.train.labels[chosen].tolist()]
        return Pairs(self.augment(images, generator), captions, [frozenset([caption]) for caption in captions])

    def tests(self, quick: bool = False) -> dict[str, Test]:
        every = max(1, len(self.test) // 1000) if quick else 1
        true = [frozenset([self.captions[label]]) for label in self.test.labels[::every].tolist()]
        return {"test_": Test(self.test.images[::every], self.captions, true, classes=True)}


class RowPairs(Shuffled):
    """Rows of LLaVA-style JSON with one picture each; the caption is the first answer, and true of the picture wherever that
    comes again."""

    def __init__(self, args, run: Run):
        rows, test = load_rows(args, run)
        self.run, self.workers, self.size = run, args.workers, args.batch_size // run.world_size
        self.image_size = args.image_size, args.image_size
        self.mean, self.std = IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
        self.pictures = ImageCache(self.image_size)
        self.true: dict[Path, frozenset[str]] = {}
        self.test = self.checked(test)
        self.open(rows, args.seed)

    def checked(self, rows):
        """Those with one picture. Raises ValueError where there are none."""
        found = rows.subset(i for i, row in enumerate(rows) if len(row.images) == 1)
        if not len(found):
            raise ValueError(f"{rows.source}: none of {len(rows)} rows has exactly one picture")
        if left_out := len(rows) - len(found):
            self.run.print(f"{left_out} rows are left out: a pair is one picture and its caption")
        for row in found:
            self.true[row.images[0]] = self.true.get(row.images[0], frozenset()) | {first_answer(row)}
        return found

    def open(self, rows, seed: int) -> None:
        self.rows = self.checked(rows)
        self.batches = Batches(len(self.rows), self.size, seed, True, self.run.rank, self.run.world_size)

    def texts(self) -> list[str]:
        return [first_answer(row) for row in self.rows]

    def next_rows(self) -> list[tuple[LlavaRow, torch.Tensor]]:
        """The readable ones of the next batch."""
        rows = [self.rows[i] for i in next(self.batches).tolist()]
        self.pictures.load([row.images[0] for row in rows], self.workers)
        return [(row, pixels) for row in rows if (pixels := self.pictures[row.images[0]]) is not None]

    def draw(self, generator: torch.Generator, progress: float) -> Pairs:
        """A picture that cannot be read is replaced by another one of the batch: so batches keep their size. Raises ValueError
        where none can be read in a whole epoch."""
        for _ in range(len(self) + 1):
            good = self.next_rows()
            if self.run.all(bool(good)):  # to stay together
                chosen = [good[k % len(good)] for k in range(self.size)]
                captions = [first_answer(row) for row, _ in chosen]
                true = [self.true.get(row.images[0], frozenset([first_answer(row)])) for row, _ in chosen]
                return Pairs(torch.stack([pixels for _, pixels in chosen]), captions, true)
        raise ValueError(f"{self.rows.source}: none of its pictures can be read")

    def tests(self, quick: bool = False) -> dict[str, Test]:
        """A gallery of test pictures, each with the caption of its first row."""
        first = {row.images[0]: row for row in reversed(self.test) if self.pictures[row.images[0]] is not None}
        if not first:
            raise ValueError(f"{self.test.source}: none of the test pictures can be read")
        rows = list(reversed(first.values()))
        rows = rows[:: -(-len(rows) // GALLERY)]
        images = denormalize(torch.stack([self.pictures[row.images[0]] for row in rows]), self.mean, self.std)
        return {"": Test(images, [first_answer(row) for row in rows], [self.true[row.images[0]] for row in rows])}

    @cached_property
    def _rows_hash(self) -> str:
        rows = [(row.images[0].name, first_answer(row)) for row in self.rows]
        return hashlib.sha256(repr(rows).encode()).hexdigest()

    def state_dict(self) -> dict:
        return {"rows": self._rows_hash, **super().state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError if the state is that of other rows."""
        if state["rows"] != self._rows_hash:
            raise ValueError(f"cannot resume: {self.rows.source} holds other rows now than when the run was started")
        super().load_state_dict(state)


class ShardPairs(RowPairs):
    """The same of shards (shards.py). Whether a picture comes again with another caption is not known there."""

    state_dict, load_state_dict = Shuffled.state_dict, Shuffled.load_state_dict  # a ShardStream knows whose rows it has

    def open(self, rows, seed: int) -> None:
        self.rows, ranks = rows, (self.run.rank, self.run.world_size, self.workers)
        self.batches = ShardStream(rows, ShardImages(self.image_size), self.size, seed, *ranks)

    def texts(self) -> list[str]:
        return [first_answer(row) for row in self.rows.head(FIRST_ROWS)]

    def next_rows(self) -> list[tuple[LlavaRow, torch.Tensor]]:
        rows = [row for row in next(self.batches) if len(row.images) == 1]
        return [(row, pixels) for row in rows if (pixels := self.batches.images[row.images[0]]) is not None]


def first_answer(row) -> str:
    return " ".join(next(message["content"] for message in row.messages if message["role"] == "assistant").split())


# ---- model and loss --------------------------------------------------------------------------------------------------


def build(args, pairs) -> tuple[SiglipTwoTower, BPETokenizer]:
    """The towers, and the tokenizer, whose model_max_length is that of all texts."""
    vision, text, vocabulary = SIZES[args.size]
    texts = pairs.texts()
    tokenizer = BPETokenizer.train(texts, vocabulary, (END,), at_most=True)
    longest = 1 + max(map(len, tokenizer.encode_batch(texts)))  # and the token that ends it
    tokenizer.model_max_length = args.tokens or min(MOST_TOKENS, longest)
    height, width = pairs.image_size
    vision = vision | {"image_size": height if height == width else (height, width), "attention_dropout": args.dropout}
    vision = SiglipVisionConfig(**vision, patch_size=args.patch_size or default_patch(pairs.image_size))
    text = text | {"max_position_embeddings": tokenizer.model_max_length, "attention_dropout": args.dropout}
    text = SiglipTextConfig(**text, vocab_size=len(tokenizer), projection_size=vision.hidden_size)
    torch.manual_seed(args.seed)
    model = SiglipTwoTower(SiglipConfig(vision, text))
    with torch.no_grad():  # positions that say from the first step what is near what
        model.vision_model.embeddings.position_embedding.weight.copy_(sincos_positions(vision.grid, vision.hidden_size))
        model.logit_bias.fill_(-math.log(args.batch_size))  # one caption in so many is true; SigLIP's -10 is for 32,768
    return model, tokenizer


def pair_loss(images, texts, scale, bias, true: torch.Tensor, chunk_size: int | None = None) -> torch.Tensor:
    """sigmoid_loss of siglip.py for pictures [B, P] and captions [M, P] of which any may be true of any: `true` [B, M].

    Every pair is a question of its own, so one that is true is labelled so: where captions come again, as with ten classes,
    masking would leave out what is to be learned, and a wrong label teach the contrary. chunk_size: pictures at a time.
    """

    def some(images, true):
        logits = images @ texts.T * scale + bias
        return -F.logsigmoid(torch.where(true, logits, -logits)).sum()

    size = chunk_size or len(images)
    parts = zip(images.split(size), true.split(size), strict=True)
    again = {"use_reentrant": False, "preserve_rng_state": False}
    return sum(checkpoint(some, *part, **again) if chunk_size else some(*part) for part in parts) / len(images)


def losses(run: Run, model, towers: SiglipTwoTower, pixels, ids, true) -> Iterator[torch.Tensor]:
    """The loss of the batch of all processes, in --grad-accum parts whose gradients add up to its own (Trainer.step averages
    them). pixels, ids: of this process; true [B, M]: of all; model: the towers as they are called for training.

    The loss of any pair needs all embeddings, but no more than them: they are computed without a graph, then the gradients
    of the loss with respect to them; and a part at a time, computed once more, takes its own of these through its tower
    (GradCache, Gao et al. 2021). With dropout both times draw the same random numbers.
    """
    parts, seed = run.args.grad_accum, torch.initial_seed()
    pixels, ids = pixels.tensor_split(parts), ids.tensor_split(parts)

    def embed(k: int) -> list[torch.Tensor]:
        torch.manual_seed(seed + k)
        different, which = ids[k].unique(dim=0, return_inverse=True)  # a caption that comes again is read once
        with run.autocast():
            out = model(pixels[k], different, chunk_size=1)  # of whatever size: no logits, see SiglipTwoTower
        return [out["image_embeddings"].float(), out["text_embeddings"].float()[which]]

    if parts == run.world_size == 1:
        yield pair_loss(*embed(0), towers.logit_scale.exp(), towers.logit_bias, true)
        return
    with torch.no_grad():
        own = [torch.cat(rows) for rows in zip(*map(embed, range(parts)), strict=True)]
        leaves = [everyones(run, x) for x in own] + [towers.logit_scale.clone(), towers.logit_bias.clone()]
    images, texts, scale, bias = (x.requires_grad_() for x in leaves)
    loss = pair_loss(images, texts, scale.exp(), bias, true, len(pixels[0]) if parts > 1 else None)
    gradients = torch.autograd.grad(loss, leaves)
    # Several processes average their gradients: of embeddings each has its own, of scale and bias all have the same.
    mine = [g.chunk(run.world_size)[run.rank] * run.world_size for g in gradients[:2]]
    rows = [g.tensor_split(parts) for g in mine]
    for k in range(parts):
        slope = sum((x * g[k]).sum() for x, g in zip(embed(k), rows, strict=True)) * parts
        slope = slope + (towers.logit_scale * gradients[2] + towers.logit_bias * gradients[3]).sum()
        yield loss.detach() + (slope - slope.detach())  # the loss's value with this part's gradient


# ---- evaluation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits_of(model: SiglipTwoTower, tokenizer: BPETokenizer, test: Test, pairs, run: Run):
    """[N pictures, M captions], on the CPU."""
    images, texts, some = [], [], 250  # at a time
    with run.autocast():
        for part in test.images.split(some):
            pixels = normalize(rescale(part.to(run.device).expand(-1, 3, -1, -1)).cpu(), pairs.mean, pairs.std)
            images.append(model.image_embeddings(pixels.to(run.device)).float())
        for part in caption_ids(tokenizer, test.captions, model.config.text_config).split(some):
            texts.append(model.text_embeddings(part.to(run.device)).float())
    return (torch.cat(images) @ torch.cat(texts).T * model.logit_scale.exp() + model.logit_bias).cpu()


def measure(test: Test, logits: torch.Tensor) -> dict[str, float]:
    """Classes: how often the likeliest caption is true. A gallery: recall@1 both ways, what guessing would give, and how often
    a picture's own caption is chosen among CHOICES, the others of which are not true of it (chance: one in CHOICES)."""
    true, N = true_pairs(test.true, test.captions), len(test.true)
    said, every = logits.argmax(dim=1), torch.arange(N)
    found = {("zero_shot_accuracy" if test.classes else "image_to_text_recall"): true[every, said]}
    for k, word in enumerate(test.words, start=1):
        same = [test.captions[choice].split()[k] == test.own(i).split()[k] for i, choice in enumerate(said.tolist())]
        found[f"zero_shot_{word}"] = torch.tensor(same)
    if not test.classes:
        found["text_to_image_recall"] = true[logits.argmax(dim=0), every]
        found["recall_by_chance"] = true
        others = logits.masked_fill(true & ~torch.eye(N, dtype=torch.bool), -torch.inf)
        choices = (every[:, None] + torch.arange(min(CHOICES, N))) % N
        found[f"caption_among_{choices.shape[1]}"] = others.gather(1, choices).argmax(dim=1) == 0
    return {name: values.float().mean().item() for name, values in found.items()}


def evaluate(model, tokenizer, tests: dict[str, Test], pairs, run: Run) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """(figures of all tests, logits of each)."""
    logits = {name: logits_of(model, tokenizer, test, pairs, run) for name, test in tests.items()}
    found = [(name, figure, value) for name in tests for figure, value in measure(tests[name], logits[name]).items()]
    return {f"{name}{figure}": value for name, figure, value in found}, logits


# ---- what the run leaves ---------------------------------------------------------------------------------------------


def draw(folder: Path, test: Test, logits: torch.Tensor, rows: list[dict]) -> None:
    """curves.png; samples.png: pictures with the caption that the model finds likeliest of all, and a true one."""
    figures.curves(rows, folder / "curves.png")
    chosen = evenly(len(test.images), 24).tolist()
    best, said = logits[chosen].sigmoid().max(dim=1)
    answers = [test.captions[i] for i in said.tolist()]
    good = [answer in test.true[i] for i, answer in zip(chosen, answers, strict=True)]
    title = f"which of {len(test.captions)} captions it finds likeliest, and how likely"
    images, likely = [test.images[i].cpu().expand(3, -1, -1) for i in chosen], [f"{p:.0%}" for p in best.tolist()]
    figures.answer_sheet(images, likely, answers, list(map(test.own, chosen)), folder / "samples.png", title, good=good)


def caption_ids(tokenizer, captions: list[str], config) -> torch.Tensor:
    """[captions, T], cut off or filled with padding to the T tokens that a text tower of this SiglipTextConfig reads, as the
    published ones were trained."""
    length = {"max_length": config.max_position_embeddings, "truncation": True}
    return tokenizer(captions, padding="max_length", return_tensors="pt", **length)["input_ids"]


def save_run(folder: Path, model: SiglipTwoTower, tokenizer: BPETokenizer, pairs, args) -> None:
    """A published checkpoint folder, with what transformers' tokenizer and image processor need to know."""
    save_pretrained(model, folder)
    tokenizer.save_pretrained(folder)
    about = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", about | {"model_input_names": ["input_ids"]})  # padding is read, not masked
    write_image_settings(folder, pairs.image_size, pairs.mean, pairs.std)
    write_json(folder / "settings.json", vars(args))
    from_pretrained(folder)  # what was written can be read


# ---- the recipe ------------------------------------------------------------------------------------------------------


def main(argv=None) -> None:
    args = parse_args(argv)
    run = Run(args)
    rows = ShardPairs if is_sharded_data(args) else RowPairs
    pairs = {"scenes": ScenePairs, "llava": rows}.get(args.dataset, ClassPairs)(args, run)
    model, tokenizer = build(args, pairs)
    model = run.place(model)
    total_steps = args.steps or max(1, round(args.epochs * len(pairs)))
    groups = parameter_groups(model, args.weight_decay, args.lr, args.muon_lr)
    trainer = Trainer(run, model, total_steps, groups, pairs, "pairs")
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = model.config
    run.print(
        f"{args.dataset}: pictures of {'x'.join(map(str, pairs.image_size))} in {'x'.join(map(str, config.vision_config.grid))}"
        f" patches, captions of {config.text_config.max_position_embeddings} tokens out of {len(tokenizer)}\n"
        f"towers: vision {count['vision_model']:,}, text {count['text_model']:,} parameters, {trained:,} trained in all\n"
        f"{total_steps:,} steps of {args.batch_size} pairs in parts of {args.batch_size // args.grad_accum}, {run}"
    )

    def batch_losses(step: int):
        generator = run.seed_step(step)
        pixels, captions, true = pairs.draw(generator, trainer.progress)
        ids = caption_ids(tokenizer, captions, config.text_config)
        true = true_pairs(everyones(run, true), everyones(run, captions))
        yield from losses(run, trainer.model, model, *(x.to(run.device) for x in (pixels, ids, true)))

    quick = pairs.tests(quick=True)
    model.train()
    while not trainer.done():
        trainer.step(batch_losses(trainer.steps_done))
        if trainer.evaluates():
            with trainer.evaluation() as whole:
                trainer.log(**evaluate(whole, tokenizer, quick, pairs, run)[0])
    trainer.close()

    if run.is_main and not args.dry_run:
        with trainer.evaluation() as whole:
            tests = pairs.tests()
            found, logits = evaluate(whole, tokenizer, tests, pairs, run)
            trainer.log(**found)
            save_run(run.folder, whole, tokenizer, pairs, args)
            first = next(iter(tests))
            draw(run.folder, tests[first], logits[first], trainer.metrics.read())
        result = {name: round(value, 4) for name, value in found.items()}
        result |= {"parameters": trained, "seconds": round(trainer.seconds, 1), "steps": trainer.steps_done}
        result |= {"pairs_per_second": round(trainer.steps_done * args.batch_size / trainer.seconds, 1)}
        result |= {"seed": args.seed, "run": str(run.folder)}
        write_json(run.folder / "result.json", result)
        print(json.dumps(result))
    run.barrier()


if __name__ == "__main__":
    run_cli(main)
