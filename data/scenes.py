"""Images of one to four handwritten digits in coloured ink, with questions and their true answers, made on the fly.

    train = make_scenes("train", 20_000, seed=0)                         # uint8 images and what is in them
    turns = questions(train[:64], seed=0)                                # for each image a list of Question
    for scenes in SceneStream("train", batch_size=64, seed=0): ...       # fresh ones for ever; it can be resumed

    python -m data.show_scenes scenes.png                                # a sheet to look at
    python -m data.convert scenes FOLDER --split test --count 200        # FOLDER/images/*.png and FOLDER/scenes.json

The digits are the 1,797 of UCI that come with the code (see digits.py): split "train" writes with the training samples,
slightly turned and sheared, "test" and "compositional" with the test samples as they are. HELD_OUT names one colour a
digit: those pairs are in no train or test scene, and in every compositional one.

A scene has 2x2 or 3x3 cells, which are not drawn, and at most one digit in each, lying anywhere inside it. Digits are
wider than a sixth of the image, so the middle of one tells its place whatever the layout: left below 5/12 of the
width, right above 7/12, else in the centre; so downwards. A question is asked only where exactly one answer is true.

Scene k is a function of (split, seed, k, config) alone, on any machine: random numbers come from numpy's RandomState,
whose stream is frozen, and the sums that make pixels are of whole numbers, so exact in any order.
Axes: N scenes, M digits of all of them, SLOTS digits at most in one, S the image's side in pixels.
"""

import bisect
import functools
import hashlib
import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data.batches import IGNORE
from data.digits import load_digits
from data.warp import GEOMETRY, warp

INKS = {  # far apart from each other, from near-black and from near-white
    "red": (220, 25, 30), "orange": (245, 130, 10), "yellow": (235, 215, 0), "green": (25, 150, 40),
    "cyan": (0, 195, 210), "blue": (25, 75, 240), "purple": (155, 45, 185), "pink": (255, 100, 180),
}  # fmt: skip
COLOURS = tuple(INKS)
_HELD = np.array([1, 4, 7, 2, 5, 0, 3, 6, 1, 4])  # of each digit, the colour that is held out
HELD_OUT = tuple((digit, COLOURS[colour]) for digit, colour in enumerate(_HELD))
PLACES = {  # by layout, in reading order
    2: ("top left", "top right", "bottom left", "bottom right"),
    3: ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right"),
}
PAPERS = {"dark": (15, 55), "light": (200, 240)}  # least and most grey
SPLITS = ("train", "test", "compositional")
SLOTS = 4
_FRAME, _POINTS = 10, 2  # a glyph is 8x8 pixels and one more all round, each of them 2x2 points


@dataclass(frozen=True)
class SceneConfig:
    size: int = 64  # side of the image, pixels
    layouts: tuple[int, ...] = (2, 3)  # cells a side
    digits: tuple[int, int] = (1, 4)  # fewest and most
    side: tuple[float, float] = (0.25, 0.375)  # of a digit, fraction of the image's; a cell may allow less than the most
    # Of PAPERS. With both, strokes are now brighter and now darker than their ground, which a small tower learns late:
    # after some 750 steps it knew 13 % of the digits, on dark paper alone 67 %.
    papers: tuple[str, ...] = ("dark",)
    noise: int = 10  # of each pixel, either way, in steps of 255
    ink_noise: int = 16  # of each digit's colour
    rotate: float = 10.0  # degrees either way; this and the next two for training samples only
    shear: float = 0.1  # tangent of the angle, either way
    variants: int = 16  # of each sample, the first of them as it is

    def __post_init__(self):
        low, high = self.side
        if not self.layouts or set(self.layouts) - set(PLACES):
            raise ValueError(f"layouts are {self.layouts}: choose from {tuple(PLACES)} cells a side")
        if not self.papers or set(self.papers) - set(PAPERS):
            raise ValueError(f"papers are {self.papers}: choose from {', '.join(PAPERS)}")
        if not 1 <= self.digits[0] <= self.digits[1] <= SLOTS:
            raise ValueError(f"digits are {self.digits}: (fewest, most) must lie in 1..{SLOTS}")
        if not (1 / 6 < low <= high and low * _FRAME / 8 <= 1 / max(self.layouts)):
            most = f"{0.8 / max(self.layouts):.3g} to fit a cell"
            raise ValueError(f"side is {self.side}: the smallest must be above 1/6 to keep places clear, and at most {most}")
        limits = {"size": (24, 1024), "noise": (0, 100), "ink_noise": (0, 60), "rotate": (0, 45), "shear": (0, 1)}
        for name, (least, most) in {**limits, "variants": (1, 1000)}.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}: it must lie in {least}..{most}")


@dataclass(frozen=True)
class Scenes:
    """Images and what is in them. The first `counts` slots hold digits, in reading order; the rest -1 (boxes 0)."""

    images: torch.Tensor  # uint8 [N, 3, S, S]
    boxes: torch.Tensor  # float32 [N, SLOTS, 4]: x0, y0, x1, y1 in pixels, around the ink that is a quarter opaque or more
    digits: torch.Tensor  # int64 [N, SLOTS], 0..9
    colours: torch.Tensor  # int64 [N, SLOTS], index into COLOURS
    cells: torch.Tensor  # int64 [N, SLOTS], index into PLACES[layout]
    layouts: torch.Tensor  # int64 [N], cells a side
    counts: torch.Tensor  # int64 [N]
    numbers: torch.Tensor  # int64 [N], which scene of its split and seed

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: slice | list[int] | torch.Tensor) -> "Scenes":
        return Scenes(*(getattr(self, f.name)[rows] for f in fields(self)))

    def dense_labels(self, grid: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a vision tower can be taught to see: (digit, colour, place), int64 [N, grid, grid], for squares of the image.

        A square is a digit's if the middle of its box lies in it, or else if the digit's box covers the square's own
        middle. Squares that a box only touches are IGNORE, the others "nothing": 10 for digits, 8 for colours, and for places,
        which are the digit's in PLACES[3] whatever the layout, IGNORE. So no
        two squares of almost the same content get contrary labels. A ViT with grid 4 (patch 16, width 128, depth 4) got
        82 % of the digits and 99.9 % of the colours of test scenes right after 1,500 steps of 64 scenes. Raises
        ValueError where two middles share a square, which needs squares wider than the smallest digit: by default never
        from grid 4 on.
        """
        N, S = len(self), self.images.shape[-1]
        low, high = self.boxes[..., None, :2] * (grid / S), self.boxes[..., None, 2:] * (grid / S)  # in squares
        line = torch.arange(grid)[:, None]
        filled = (self.digits >= 0)[:, :, None, None]

        def squares(inside: torch.Tensor) -> torch.Tensor:
            """bool [N, SLOTS, grid, 2] for x and y -> [N, SLOTS, grid, grid], rows first."""
            return inside[..., 1][..., :, None] & inside[..., 0][..., None, :] & filled

        own = squares(((low + high) / 2).floor() == line)
        if (own.sum(1) > 1).any():
            raise ValueError(f"grid {grid} is too coarse: the middles of two digits lie in one square")
        covered = squares((low <= line + 0.5) & (line + 0.5 < high)) & ~own.any(1, keepdim=True)
        touched = squares((low < line + 1) & (high > line)).any(1)
        mine = own | covered
        labels = []
        corners = torch.tensor([PLACES[3].index(name) for name in PLACES[2]])
        places = torch.where(self.layouts[:, None] == 2, corners[self.cells.clamp(0, 3)], self.cells)
        for values, nothing in ((self.digits, 10), (self.colours, len(COLOURS)), (places, IGNORE)):
            label = torch.where(touched, IGNORE, nothing).expand(N, grid, grid)
            labels.append(torch.where(mine.any(1), (values[:, :, None, None] * mine).sum(1), label))
        return tuple(labels)


# ---- glyphs: the handwriting ----


class _Glyphs(NamedTuple):
    ink: np.ndarray  # uint8 [variants * samples, 20, 20], 255 = opaque; samples sorted by digit
    boxes: np.ndarray  # [variants * samples, 4]: x0, y0, x1, y1 of the visible ink, in pixels of the 10x10 frame
    starts: np.ndarray  # [11]: where each digit's samples start; the last, how many samples


def _glyphs(split: str, config: SceneConfig) -> _Glyphs:
    if split == "train":
        return _cut_glyphs(0, config.variants, config.rotate, config.shear)
    return _cut_glyphs(1, 1, 0.0, 0.0)


@functools.lru_cache(maxsize=4)
def _cut_glyphs(part: int, variants: int, rotate: float, shear: float) -> _Glyphs:
    """In float64 and rounded to 255 steps, so that the last bits, which differ between machines, decide nothing."""
    images, labels = load_digits()[part]
    order = labels.argsort(stable=True)
    ink = F.pad(images[order].double() / 255, (1, 1, 1, 1))
    ink = F.interpolate(ink * 1.2, scale_factor=_POINTS, mode="bicubic").clamp(0, 1)  # 1.2: thin strokes are pale
    limits = [{"rotate": rotate, "shear_x": shear, "shear_y": shear}.get(name, 0.0) for name in GEOMETRY]
    draw = np.random.RandomState(0)
    turns = [draw.uniform(-1, 1, (len(ink), len(GEOMETRY))) * limits for _ in range(variants - 1)]
    ink = torch.cat([ink, *(warp(ink, torch.from_numpy(turn), "zeros") for turn in turns)])
    ink = (ink[:, 0] * 255 + 1e-7).round().to(torch.uint8).numpy()  # many lie half-way: now all above it
    visible, edges = ink >= 64, []
    for axis in (1, 2):  # any() over the rows leaves x
        line = visible.any(axis)
        edges.append((line.argmax(1), line.shape[1] - line[:, ::-1].argmax(1)))
    (x0, x1), (y0, y1) = edges
    starts = np.searchsorted(labels[order].numpy(), np.arange(11))
    return _Glyphs(ink, np.stack([x0, y0, x1, y1], axis=1) / _POINTS, starts)


# ---- scenes: lots are drawn, then images ----

_BLOCK = 64  # scenes that share one random stream


def _plan(split: str, seed: int, block: int, config: SceneConfig, glyphs: _Glyphs) -> dict[str, np.ndarray]:
    """Every random decision for the scenes of one block. Lengths are in pixels."""
    draw = np.random.RandomState(np.frombuffer(hashlib.sha256(f"{split}/{seed}/{block}".encode()).digest(), "<u4"))
    N, S, shape = _BLOCK, config.size, (_BLOCK, SLOTS)
    layouts = np.array(config.layouts)[draw.randint(len(config.layouts), size=N)]
    counts = draw.randint(config.digits[0], config.digits[1] + 1, size=N)
    lots = draw.random_sample((N, max(PLACES) ** 2))
    lots[np.arange(lots.shape[1]) >= layouts[:, None] ** 2] = 2  # not a cell of this layout: comes last
    filled = np.arange(SLOTS) < counts[:, None]
    cells = np.sort(np.where(filled, lots.argsort(axis=1)[:, :SLOTS], lots.shape[1]), axis=1)

    digits = draw.randint(10, size=shape)
    colours = draw.randint(len(COLOURS) - 1, size=shape)
    colours += colours >= _HELD[digits]
    if split == "compositional":  # one pair is held out for certain, the others are any of the 80
        chosen = np.arange(SLOTS) == (draw.random_sample(N) * counts).astype(int)[:, None]
        colours = np.where(chosen, _HELD[digits], draw.randint(len(COLOURS), size=shape))
    inks = np.array(list(INKS.values()))[colours] + draw.randint(-config.ink_noise, config.ink_noise + 1, (*shape, 3))
    least, most = np.array([PAPERS[name] for name in config.papers])[draw.randint(len(config.papers), size=N)].T
    grey = (least + draw.random_sample(N) * (most - least)).astype(int)[:, None]

    samples = glyphs.starts[:-1][digits] + (draw.random_sample(shape) * np.diff(glyphs.starts)[digits]).astype(int)
    variants = draw.randint(len(glyphs.ink) // glyphs.starts[-1], size=shape)
    chosen = variants * glyphs.starts[-1] + samples
    low, high = np.moveaxis(glyphs.boxes[chosen].reshape(*shape, 2, 2), 2, 0)
    room = np.maximum(high - low, 8)  # x and y; a narrow digit keeps the distance of a wide one
    cell = S / layouts[:, None]
    most = np.minimum(config.side[1] * S / 8, cell / room.max(2))
    unit = config.side[0] * S / 8 + draw.random_sample(shape) * (most - config.side[0] * S / 8)  # of a glyph's pixel
    unit, cell = unit[..., None], cell[..., None]
    corner = np.stack([cells % layouts[:, None], cells // layouts[:, None]], axis=2) * cell
    centre = corner + room * unit / 2 + draw.random_sample((*shape, 2)) * (cell - room * unit)
    half = (high - low) * unit / 2
    boxes = np.concatenate([centre - half, centre + half], axis=2) * filled[..., None]
    digits, colours, cells = (np.where(filled, values, -1) for values in (digits, colours, cells))
    return {
        "boxes": boxes.astype(np.float32), "digits": digits, "colours": colours, "cells": cells, "layouts": layouts,
        "counts": counts, "glyphs": chosen, "unit": unit[..., 0], "origin": centre - (low + high) / 2 * unit,
        "inks": inks.clip(0, 255), "paper": grey + draw.randint(-6, 7, (N, 3)),
        "noise": draw.randint(256, size=(N, 3, S, S), dtype=np.uint8),
    }  # fmt: skip


def _paint(plan: dict[str, np.ndarray], glyphs: _Glyphs, config: SceneConfig) -> np.ndarray:
    """uint8 [N, 3, S, S]. Whole numbers below 2^24 throughout, which float32 adds and multiplies exactly.

    In numpy, in place: on a busy machine torch's threads, woken for each of these small steps, took ten times as long.
    """
    N, S = len(plan["counts"]), config.size
    filled = plan["digits"] >= 0
    step = (64 * _POINTS / plan["unit"][filled]).astype(np.float32)[:, None, None]  # 64ths of a point per pixel
    pixel = np.arange(S, dtype=np.float32)[:, None] + 0.5
    point = 64 * np.arange(_FRAME * _POINTS, dtype=np.float32) + 32

    def weights(origin: np.ndarray) -> np.ndarray:
        """[M] -> [M, S, 20]: bilinear, in 64ths."""
        distance = (pixel - origin.astype(np.float32)[:, None, None]) * step - point
        return np.rint(np.maximum(64 - np.abs(distance, out=distance), 0))

    x, y = map(weights, plan["origin"][filled].T)
    ink = y @ glyphs.ink[plan["glyphs"][filled]].astype(np.float32) @ x.transpose(0, 2, 1)
    layers = np.zeros((N, SLOTS + 1, S * S), dtype=np.float32)  # how much of each ink, and last of paper, of 255
    layers[:, :SLOTS][filled] = np.minimum(np.floor(ink / 64**2 + 0.5), 255).reshape(len(ink), -1)
    layers[:, SLOTS] = np.maximum(255 - layers.sum(axis=1), 0)  # of two digits side by side, faint rims may overlap
    paints = np.concatenate([plan["inks"], plan["paper"][:, None]], axis=1).astype(np.float32)
    image = (paints.transpose(0, 2, 1) @ layers).reshape(N, 3, S, S)
    np.rint(np.divide(image, 255, out=image), out=image)
    image += plan["noise"].astype(np.uint16) * (2 * config.noise + 1) // 256
    image -= config.noise
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


def make_scenes(split: str, count: int, seed: int = 0, config: SceneConfig | None = None, start: int = 0) -> Scenes:
    """Scenes number start .. start + count - 1 of one of SPLITS. Raises ValueError for another split or no scene."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown: choose from {', '.join(SPLITS)}")
    if count < 1 or start < 0:
        raise ValueError(f"count {count}, start {start}: ask for at least one scene, from 0 on")
    config = config or SceneConfig()
    glyphs, end, plans = _glyphs(split, config), start + count, []
    images = np.empty((count, 3, config.size, config.size), dtype=np.uint8)
    for first in range(start - start % _BLOCK, end, _BLOCK):
        plan = _plan(split, seed, first // _BLOCK, config, glyphs)
        plan = {name: values[max(start - first, 0) : end - first] for name, values in plan.items()}
        at = max(first - start, 0)
        images[at : at + len(plan["counts"])] = _paint(plan, glyphs, config)
        plans.append({name: plan[name] for name in ("boxes", "digits", "colours", "cells", "layouts", "counts")})
    found = {name: torch.from_numpy(np.concatenate([plan[name] for plan in plans])) for name in plans[0]}
    return Scenes(torch.from_numpy(images), **found, numbers=torch.arange(start, end))


class SceneStream:
    """Endless batches of fresh scenes, the same sequence whatever the batch size; ranks take turns, a batch each.

    After load_state_dict the stream goes on with the very scenes that were to follow.
    """

    def __init__(self, split: str, batch_size: int, seed: int = 0, config: SceneConfig | None = None, rank=0, world_size=1):
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world_size}: sizes start at 1, ranks at 0")
        self.split, self.batch_size, self.seed, self.config = split, batch_size, seed, config or SceneConfig()
        self.rank, self.world_size, self.position = rank, world_size, 0

    def __iter__(self) -> "SceneStream":
        return self

    def __next__(self) -> Scenes:
        start = self.position + self.rank * self.batch_size
        self.position += self.batch_size * self.world_size
        return make_scenes(self.split, self.batch_size, self.seed, self.config, start)

    @property
    def fraction(self) -> float:
        """How much was seen, in epochs; as there is no end, 10,000 scenes are called one."""
        return self.position / 10_000

    def state_dict(self) -> dict:
        return {"split": self.split, "seed": self.seed, "config": repr(self.config), "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError if the state is that of other scenes."""
        for key, value in self.state_dict().items():
            if key != "position" and state[key] != value:
                raise ValueError(f"cannot resume: the saved run's scenes have {key} {state[key]}, these {value}")
        self.position = state["position"]


# ---- questions ----

TEMPLATES = {
    "count": ("How many digits are there?", "How many digits do you see?", "Count the digits."),
    "colour": ("What colour is the {digit}?", "Which colour does the {digit} have?", "Name the colour of the {digit}."),
    "digit": ("Which digit is {colour}?", "What is the {colour} digit?", "Name the digit that is {colour}."),
    "place": ("What is at the {place}?", "What do you see at the {place}?", "Name what is at the {place}."),
    "left_of": ("What is left of the {thing}?", "What is to the left of the {thing}?", "Name what is left of the {thing}."),
    "above": ("What is above the {thing}?", "What do you see above the {thing}?", "Name what is above the {thing}."),
    "exists": ("Is there {a_digit}?", "Do you see {a_digit}?", "Does the picture show {a_digit}?"),
    "sum": ("What is the sum of the digits?", "Add up the digits.", "What do the digits add up to?"),
    "describe": ("Describe the picture.", "What is in the picture?", "Tell me what you see."),
}
KINDS = tuple(TEMPLATES)
# How often each kind is drawn while it has something left to ask; look-ups lead, as each teaches one digit.
MIX = {"count": 1, "colour": 3, "digit": 3, "place": 3, "left_of": 2, "above": 2, "exists": 1, "sum": 2, "describe": 2}


class Question(NamedTuple):
    kind: str
    question: str
    answer: str
    about: tuple[int, ...]  # slots whose digit and colour both matter; () for count, exists and sum


def with_article(thing: str | int) -> str:
    """With its article: a 7, an 8, an orange 3."""
    return f"an {thing}" if str(thing)[0] in "8o" else f"a {thing}"


def running_sum(digits: Sequence[int]) -> str:
    """[3, 7, 2] -> "3 plus 7 is 10 plus 2 is 12": each step is one small addition, which a small model can learn."""
    total, text = digits[0], str(digits[0])
    for digit in digits[1:]:
        total += digit
        text += f" plus {digit} is {total}"
    return text


def found_from(kind: str, place: str, other: str, thing: str) -> str:
    """"at the top right; left of it, at the top left, a red 7": first where the digit is that the question names, then where
    the one is that it asks for. Each step is one look at the image; both at once a small model learns late."""
    return f"at the {place}; {kind.replace('_', ' ')} it, at the {other}, {with_article(thing)}"


def _askable(digits: list[int], colours: list[int], cells: list[int], layout: int, pick: random.Random) -> dict[str, list]:
    """Of each kind, all that can be asked about one scene: (words for the template, answer, slots it is about)."""
    slots, places = range(len(digits)), PLACES[layout]
    things = [f"{COLOURS[colour]} {digit}" for colour, digit in zip(colours, digits, strict=True)]
    rows, columns = [cell // layout for cell in cells], [cell % layout for cell in cells]
    absent = [digit for digit in range(10) if digit not in digits]
    exists = ((digits[_index(pick, len(digits))], "yes"), (absent[_index(pick, len(absent))], "no"))
    caption = ", ".join(f"{with_article(thing)} at the {places[cell]}" for thing, cell in zip(things, cells, strict=True))
    ask = {
        "count": [({}, str(len(digits)), ())],
        "colour": [({"digit": digits[i]}, COLOURS[colours[i]], (i,)) for i in slots if digits.count(digits[i]) == 1],
        "digit": [({"colour": COLOURS[colours[i]]}, str(digits[i]), (i,)) for i in slots if colours.count(colours[i]) == 1],
        "place": [({"place": places[cells[i]]}, with_article(things[i]), (i,)) for i in slots],
        "left_of": [],
        "above": [],
        "exists": [({"a_digit": with_article(digit)}, answer, ()) for digit, answer in exists],
        "sum": [({}, running_sum(digits), ())],
        "describe": [({}, caption, tuple(slots))],
    }
    for i in slots:
        if things.count(things[i]) == 1:
            left = [k for k in slots if rows[k] == rows[i] and columns[k] < columns[i]]
            above = [k for k in slots if columns[k] == columns[i] and rows[k] < rows[i]]
            for kind, found in (("left_of", left), ("above", above)):
                if len(found) == 1:  # with two, some would name the nearer and some either
                    k = found[0]
                    answer = found_from(kind, places[cells[i]], places[cells[k]], things[k])
                    ask[kind].append(({"thing": things[i]}, answer, (k, i)))
    return ask


def _index(pick: random.Random, n: int) -> int:
    return int(pick.random() * n)  # of all its methods only random() is promised to stay the same


def questions(scenes: Scenes, seed: int = 0, per_scene: int = 12, mix: Mapping[str, float] = MIX) -> list[list[Question]]:
    """For each scene up to per_scene different questions, in random order; fewer where there is no more to ask.

    mix: kinds and their weights, of which each turn draws one that has something left. A scene offers one question a
    digit and kind at most (two for exists: yes and no). Where a scene shows a held-out pair, the first question is
    about it, so with a mix of count, exists and sum alone there is no such question. The same scene number, seed and
    mix give the same questions, whatever the other scenes. Raises ValueError for an unknown kind or a bad weight.
    """
    weights = {kind: weight for kind, weight in mix.items() if weight}
    if not weights or set(weights) - set(KINDS) or per_scene < 1 or not all(0 < w < math.inf for w in weights.values()):
        raise ValueError(f"mix {dict(mix)}, per_scene {per_scene}: weights above 0 for some of {', '.join(KINDS)}")
    columns = (getattr(scenes, name).tolist() for name in ("digits", "colours", "cells", "layouts", "counts", "numbers"))
    turns = []
    for digits, colours, cells, layout, count, number in zip(*columns, strict=True):
        pick = random.Random(f"{seed}/{number}")
        ask = _askable(digits[:count], colours[:count], cells[:count], layout, pick)
        held = {i for i in range(count) if colours[i] == _HELD[digits[i]]}
        about = {kind: [x for x in ask[kind] if held.intersection(x[2])] for kind in weights} if held else {}
        turns.append([])
        while len(turns[-1]) < per_scene:
            offer = about if any(about.values()) and not turns[-1] else ask
            kinds = [kind for kind in weights if offer[kind]]
            if not kinds:
                break
            totals = list(itertools.accumulate(weights[kind] for kind in kinds))
            kind = kinds[bisect.bisect(totals, pick.random() * totals[-1], hi=len(kinds) - 1)]
            words, answer, slots = chosen = offer[kind][_index(pick, len(offer[kind]))]
            ask[kind].remove(chosen)
            template = TEMPLATES[kind][_index(pick, len(TEMPLATES[kind]))]
            turns[-1].append(Question(kind, template.format(**words), answer, slots))
    return turns


# ---- answers and words ----


def normalize_answer(answer: str) -> str:
    """For exact match, which every kind is scored by: lower case, single spaces."""
    return " ".join(answer.lower().split())


def final_number(answer: str) -> int | None:
    """The last number in an answer: the total of a running sum, for a milder score beside the exact match."""
    numbers = re.findall(r"\d+", answer)
    return int(numbers[-1]) if numbers else None


def corpus() -> list[str]:
    """Lines that hold every question and, in parts, every answer: to train a tokenizer on (450 tokens: most are words)."""
    digits, places = range(10), sorted({place for names in PLACES.values() for place in names})
    things = [f"{colour} {digit}" for colour in COLOURS for digit in digits]
    words = {"digit": digits, "colour": COLOURS, "place": places, "thing": things, "a_digit": [with_article(d) for d in digits]}
    lines = []
    for template in itertools.chain(*TEMPLATES.values()):
        name = (re.findall(r"{(\w+)}", template) or [None])[0]
        lines += [template.format(**{name: word}) for word in words[name]] if name else [template]
    lines += ["yes", "no", *map(str, digits), *COLOURS]
    spots = [f"{with_article(thing)} at the {place}" for thing in things for place in places]
    lines += [f"{spot}, {spot}" for spot in spots]
    lines += [found_from(kind, place, place, thing) for kind in ("left_of", "above") for place in places for thing in things]
    return lines + [running_sum([x, y]) for x in range(9 * (SLOTS - 1) + 1) for y in digits]
