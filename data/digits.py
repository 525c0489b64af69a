"""The 1,797 handwritten digits of UCI that come with the code (assets/digits.LICENSE.md), and a split by class."""

from pathlib import Path

import numpy as np
import torch


def load_digits(split_seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(images uint8 [N, 1, 8, 8], labels int64 [N]) for training and for tests, which are 360 of the 1,797."""
    with np.load(Path(__file__).parents[1] / "assets" / "digits.npz") as file:
        images, labels = file["images"], file["labels"]
    pixels = torch.from_numpy((images * (255 / 16) + 0.5).astype(np.uint8))[:, None]
    parts = stratified_split(labels, 360, split_seed)
    return [(pixels[part], torch.from_numpy(labels[part])) for part in parts]


def stratified_split(labels: np.ndarray, test_count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, test), each sorted, with the classes in equal shares (largest remainders make up test_count).

    numpy's RandomState: its stream is frozen, so the split is the same in every version and on every machine.
    """
    random = np.random.RandomState(seed)
    counts = np.bincount(labels)
    wanted = counts * test_count / max(len(labels), 1)
    quota = wanted.astype(int)
    # A class of one image comes last, so that it is not left without a training image.
    quota[np.argsort(quota - wanted + (counts < 2), kind="stable")[: test_count - quota.sum()]] += 1
    test = [random.permutation(np.flatnonzero(labels == k))[:count] for k, count in enumerate(quota)]
    test = np.sort(np.concatenate(test or [np.zeros(0, int)]))
    return np.setdiff1d(np.arange(len(labels)), test), test
