"""What batches of all data sets share: a shuffled order that can stop anywhere and go on, what a blind model gets, and how much
each part of a batch counts.

    batches = Batches(len(train), batch_size=64, seed=0)
    images = train.images[next(batches)]                      # uint8 [B, C, H, W]
    batches.load_state_dict(state)                            # of batches.state_dict(): the very batches that were to follow
"""

import functools
import hashlib

import torch

IGNORE = -100  # torch's label for "not counted"


class Batches:
    """Endless stream of index batches (int64 [batch_size]) over n samples, shuffled anew each epoch.

    batch_size is per rank: the ranks share one shuffled order and take turns in it, so that each sample is seen once an
    epoch by one of them. The end of the order, where it fills no batch on every rank, is left out. The order
    depends on seed and epoch alone. Raises ValueError where batches would be empty.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.n, self.seed, self.rank, self.world_size = n, seed, rank, world_size
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world_size}: sizes start at 1, ranks at 0")
        self.step = batch_size * world_size  # samples of all ranks together
        self.end = n - n % self.step
        if self.end == 0:
            raise ValueError(f"{n} samples do not fill a batch of {batch_size} on {world_size} ranks: lower --batch-size")
        self.epoch, self.position, self._order = 0, 0, None

    def __len__(self) -> int:
        """Batches an epoch."""
        return self.end // self.step

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> torch.Tensor:
        if self._order is None:
            # Seeds an epoch apart must not repeat another run's epochs: 0 + epoch 1 is not 1 + epoch 0.
            digest = hashlib.sha256(f"{self.seed}/{self.epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
            self._order = torch.randperm(self.n, generator=generator)
        batch = self._order[self.position : self.position + self.step][self.rank :: self.world_size]
        self.position += self.step
        if self.position >= self.end:
            self.epoch, self.position, self._order = self.epoch + 1, 0, None
        return batch

    @property
    def fraction(self) -> float:
        """Epochs done so far."""
        return self.epoch + self.position / self.end

    def state_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("n", "seed", "step", "epoch", "position")}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ValueError if the state is that of other data, another seed or batch size (of all ranks together)."""
        names = {"n": "number of samples", "seed": "seed", "step": "batch size over all ranks"}
        for key, words in names.items():
            if state[key] != getattr(self, key):
                raise ValueError(
                    f"cannot resume: the saved run has {words} {state[key]}, this one {getattr(self, key)}"
                )
        self.epoch, self.position, self._order = state["epoch"], state["position"], None


class InOrder:
    """What makes its batches from an order of samples, `order`: it stands where that stands, and resumes where it resumes."""

    def __len__(self) -> int:
        """Batches an epoch; TypeError for an order without end."""
        return len(self.order)

    @property
    def fraction(self) -> float:
        return self.order.fraction

    def state_dict(self) -> dict:
        return self.order.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.order.load_state_dict(state)


class OfRows(InOrder):
    """Batches of `rows`, with what knows them again, `known_by`: a run goes on with the rows that it was started with."""

    @functools.cached_property
    def rows_hash(self) -> str:
        return hashlib.sha256(repr(self.known_by()).encode()).hexdigest()

    def state_dict(self) -> dict:
        return {"rows": self.rows_hash, **super().state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError if the state is that of other rows."""
        if state["rows"] != self.rows_hash:
            raise ValueError(f"cannot resume: {self.rows.source} holds other rows now than when the run was started")
        super().load_state_dict(state)


def fit_batch_size(run, n: int, what: str) -> None:
    """Lower --batch-size to what n samples fill, and say so. Raises ValueError where they are fewer than a step's parts."""
    args, unit = run.args, run.world_size * run.args.grad_accum
    if n < unit:
        smaller = "raise --chunk" if getattr(args, "chunk", None) else "lower --grad-accum"
        smaller += ", or start fewer processes" if run.world_size > 1 else ""
        raise ValueError(f"{n} training {what} are fewer than the {unit} parts of a step: {smaller}")
    if n < args.batch_size:
        run.print(f"--batch-size {args.batch_size} becomes {n - n % unit}: there are {n} training {what}")
        args.batch_size = n - n % unit


def blind_pixels(pixel_values: torch.Tensor) -> torch.Tensor:
    """The same number of images of nothing but the mean colour: 0 everywhere, after normalisation."""
    return torch.zeros_like(pixel_values)


def with_shares(run, parts: list[dict]) -> list[dict]:
    """The parts of a batch, each with what its losses are to be multiplied by: "share", fp32 [kinds].

    A loss is the mean over the labels of a part, and parts have unequal numbers of them. Multiplied by these shares and added
    up over the parts, then averaged over the processes (as DDP does with gradients), it is the mean over the whole batch. A
    part has one kind of labels (of tokens, or answers to common questions), or the three of patch_labels.
    """
    counts = torch.stack([count_labels(**part) for part in parts])  # [parts, kinds]
    shares = counts * run.world_size / run.sum(counts.sum(dim=0)).clamp(min=1)
    return [part | {"share": share} for part, share in zip(parts, shares, strict=True)]


def count_labels(labels=None, patch_labels=None, answers=None, **batch) -> torch.Tensor:
    """How many labels of a part of a batch count, int64 [kinds]."""
    if patch_labels is not None:
        return (patch_labels != IGNORE).sum(dim=(0, 2))
    return ((labels if answers is None else answers) != IGNORE).sum()[None]
