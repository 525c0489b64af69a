"""Batches of rows from shards, read from front to back, in an order that looks random and can be resumed.

    stream = ShardStream(shards, ShardImages(224), batch_size=16, seed=0, rank=0, world_size=8)
    rows = next(stream)                                    # llava.LlavaRows, their images read and decoded

The order of an epoch is a function of seed and epoch alone. The shards stand in random order; that sequence of rows is cut
into lanes of equal length, and a batch takes its rows from one lane after the other. Each lane is read from front to back,
through a buffer from which rows come in random order. Lanes are dealt to processes, and to the threads of each: all read other
parts of the data, each row once an epoch, and one number says where all of them stand. Lost rows leave gaps in their batches.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from data.batches import Batches
from data.llava import LlavaRow
from data.shards import ShardImages, Shards
from data.streamed import Lost

LANES, WINDOW = 16, 128  # at least so many lanes; rows that each holds back to shuffle them


def epoch_order(starts: np.ndarray, lanes: int, window: int, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """(row numbers in the order of training [n], the place of each in the order of reading [n]).

    Within a lane a row trains by less than `window` rows before or after its place in reading, so that no more are ever held
    in memory; lanes take turns, and only the last round may lack some.
    """
    shards = random.permutation(len(starts) - 1)
    reading = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards])
    places, turns, first = [], [], 0
    for lane, part in enumerate(np.array_split(reading, lanes)):
        moved = np.argsort(np.arange(len(part)) + random.random_sample(len(part)) * window, kind="stable")
        places.append(first + moved)
        turns.append(np.arange(len(part)) * lanes + lane)
        first += len(part)
    places = np.concatenate(places)[np.argsort(np.concatenate(turns))]
    return reading[places], places


class ShardStream(Batches):
    """Endless batches of this rank's rows, batch_size of them less those that are lost: `lost` and images.unreadable say why.
    Images are decoded by `workers` threads, a batch ahead.

    State and resumption are those of Batches, exact for any number of processes. There are as many lanes as a multiple of LANES
    needs for the processes of the first start; a number of processes that divides them has each read by one alone. window: see
    epoch_order.
    """

    def __init__(
        self, shards: Shards, images: ShardImages, batch_size: int, seed: int, rank: int = 0, world_size: int = 1,
        workers: int = 1, window: int = WINDOW,
    ):  # fmt: skip
        super().__init__(len(shards), batch_size, seed, rank=rank, world_size=world_size)
        self.shards, self.images, self.window = shards, images, window
        self.lanes = LANES * -(-world_size // LANES)
        self.lost: Lost = {}
        self._workers, self._pool, self._coming = max(1, workers), None, None

    def __next__(self) -> list[LlavaRow]:
        if self._coming is None:
            self._pool = self._pool or ThreadPoolExecutor(self._workers)
            self._coming = self._batches(self.epoch, self.position)
            self._ahead = next(self._coming)
        rows = self._ahead()
        self._ahead = next(self._coming)
        self.position += self.step
        if self.position >= self.end:
            self.epoch, self.position = self.epoch + 1, 0
        return rows

    def _batches(self, first_epoch: int, position: int) -> Iterator[Callable[[], list[LlavaRow]]]:
        """For each batch from there on, a function that waits for its rows; the threads are at work on them already."""
        for epoch in itertools.count(first_epoch):
            digest = hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()
            random = np.random.RandomState(np.frombuffer(digest[:16], dtype="<u4"))  # its stream is the same everywhere
            rows, places = epoch_order(self.shards.starts, self.lanes, self.window, random)
            mine = np.arange(position + self.rank, self.end, self.world_size)
            lanes = np.array([len(part) for part in np.array_split(rows, self.lanes)]).cumsum()
            lane_of = np.searchsorted(lanes, places[mine], side="right")
            readers = {lane: self._read(rows[mine[lane_of == lane]], places[mine[lane_of == lane]]) for lane in set(lane_of)}
            for batch in lane_of.reshape(-1, self.step // self.world_size):
                taken = {lane: self._pool.submit(self._take, readers[lane], n) for lane, n in Counter(batch).items()}
                yield partial(self._collect, batch, taken)
            position = 0

    def _read(self, rows: np.ndarray, places: np.ndarray) -> Iterator[LlavaRow | None]:
        """These rows, in this order, though they are read in that of their places. What was read too early waits."""
        in_order = rows[np.argsort(places)].tolist()
        coming, waiting = zip(in_order, self.shards.read(in_order, self.lost), strict=True), {}
        for wanted in rows.tolist():
            while wanted not in waiting:
                number, row = next(coming)
                waiting[number] = row
            yield waiting.pop(wanted)

    def _take(self, reader: Iterator[LlavaRow | None], count: int) -> list[LlavaRow | None]:
        """In a thread: the next rows of a lane, with their images decoded."""
        rows = list(itertools.islice(reader, count))
        for image in (image for row in rows if row for image in row.images):
            self.images.decode(image)
        return rows

    @staticmethod
    def _collect(batch: np.ndarray, taken: dict) -> list[LlavaRow]:
        found = {lane: iter(rows.result()) for lane, rows in taken.items()}
        return [row for row in (next(found[lane]) for lane in batch) if row]

    def state_dict(self) -> dict:
        return {**super().state_dict(), "lanes": self.lanes, "window": self.window, "shards": self.shards.fingerprint}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError as Batches does, and if the state is that of other shards."""
        if state.get("shards") != self.shards.fingerprint:
            raise ValueError(f"cannot resume: {self.shards.source} are other shards now than when the run was started")
        super().load_state_dict(state)
        self.lanes, self.window, self._coming = state["lanes"], state["window"], None
