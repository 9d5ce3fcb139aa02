"""What the pictures show, as plain functions of policies, labels and predictions.

N images, K blocks, C classes. policies: (N, K) of 0 and 1. labels: (N,) class numbers.
correct: (N,) bool. All are NumPy arrays.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy import ndarray


def distinct(policies: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """Distinct policies (U, K), most frequent first, how many images have each, and each image's.

    Ties are in lexical order. Returns (U, K), (U,) and (N,) indices into the first.
    """
    rows, which, counts = np.unique(policies, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return rows[order], counts[order], place[which.reshape(-1)]


def paths_of_class(
    policies: ndarray, labels: ndarray, label: int, paths: int, examples: int
) -> list[tuple[ndarray, int, ndarray]]:
    """The most frequent policies of a class: policy (K,), how many images, the first of them."""
    (of_class,) = np.nonzero(labels == label)
    if not len(of_class):
        return []
    rows, counts, which = distinct(policies[of_class])
    return [
        (rows[i], int(counts[i]), of_class[which == i][:examples])
        for i in range(min(paths, len(rows)))
    ]


def easy_and_hard(
    policies: ndarray, labels: ndarray, correct: ndarray, label: int, number: int
) -> tuple[ndarray, ndarray]:
    """Images of a class with the fewest and with the most blocks, of those it gets right.

    Ties go to the earlier image. Returns two arrays of at most `number` indices.
    """
    (of_class,) = np.nonzero((labels == label) & correct)
    blocks = policies[of_class].sum(1)
    easy = of_class[np.argsort(blocks, kind="stable")[:number]]
    hard = of_class[np.argsort(-blocks.astype(int), kind="stable")[:number]]
    return easy, hard


def keep_rates(policies: ndarray, labels: ndarray, num_classes: int) -> tuple[ndarray, ndarray]:
    """How often each block is kept, (K,), and the same by class, (C, K); NaN without images."""
    by_class = np.full((num_classes, policies.shape[1]), np.nan)
    for label in range(num_classes):
        if (labels == label).any():
            by_class[label] = policies[labels == label].mean(0)
    return policies.mean(0), by_class


def blocks_by_class(policies: ndarray, labels: ndarray, num_classes: int) -> list[ndarray]:
    """Blocks kept by each image, a list of (N_c,) arrays."""
    blocks = policies.sum(1)
    return [blocks[labels == label] for label in range(num_classes)]


def groups_of_classes(names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> ndarray:
    """The number of each class's group, (C,); -1 for a class of none."""
    numbers = {name: number for number, of in enumerate(groups.values()) for name in of}
    return np.array([numbers.get(name, -1) for name in names])


def extremes(values: ndarray, number: int) -> ndarray:
    """Indices of the `number` smallest and the `number` largest values, rising; NaN left out."""
    order = np.argsort(values, kind="stable")[: np.count_nonzero(~np.isnan(values))]
    return order if len(order) <= 2 * number else np.r_[order[:number], order[-number:]]


def coverage(counts: ndarray) -> ndarray:
    """Share of the images that the 1, 2, ... most frequent policies cover, (U,)."""
    return np.cumsum(counts) / np.sum(counts)


def accuracy_by_blocks(policies: ndarray, correct: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """Numbers of blocks that occur, how many images keep as many, and their accuracy."""
    blocks = policies.sum(1)
    numbers, which, counts = np.unique(blocks, return_inverse=True, return_counts=True)
    right = np.bincount(which.reshape(-1), weights=correct, minlength=len(numbers))
    return numbers, counts, right / counts


def accuracy_by_class(correct: ndarray, labels: ndarray, num_classes: int) -> ndarray:
    """(C,) accuracies; NaN for a class without images."""
    return np.array([
        correct[labels == label].mean() if (labels == label).any() else np.nan
        for label in range(num_classes)
    ])  # fmt: skip


def training_curves(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """From metrics.jsonl: by name of a figure, the epochs that have it and its values."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for line in path.read_text().splitlines():
        metrics = json.loads(line)
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and name != "epoch":
                epochs, values = curves.setdefault(name, ([], []))
                epochs.append(metrics["epoch"])
                values.append(value)
    return curves
