"""Going through an epoch's batches with a progress bar, and keeping what each image got."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from .data import Loader

SHOWN = {"correct": "acc", "reward": "reward", "policy": "blocks", "loss": "loss"}


class Tally:
    """Iterates over an epoch's batches and gathers (B, ...) results by name.

    The bar shows running means; it is quiet where the output is no terminal.
    """

    def __init__(self, loader: Loader, epoch: int, label: str):
        self.batches = loader.epoch(epoch)
        self.results: dict[str, list[Tensor]] = {}
        self.num_images = loader.num_images
        self.seconds = 0.0
        self.bar = tqdm(total=loader.num_images, desc=label, unit="img", disable=None, leave=False)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start = time.perf_counter()
        with self.bar:
            yield from self.batches
        self.seconds = time.perf_counter() - start

    def add(self, **results: Tensor) -> None:
        """Keep one batch's results; a policy is kept as bytes, the rest as it comes."""
        for name, value in results.items():
            value = value.detach()
            if name == "policy":
                value = value.to(torch.uint8)
            self.results.setdefault(name, []).append(value)
        if not self.bar.disable:
            self.bar.set_postfix({SHOWN[n]: f"{mean(n, v):.3f}" for n, v in self.results.items()})
            self.bar.update(len(value))

    def __getitem__(self, name: str) -> Tensor:
        """All images' results of one name, on the CPU."""
        return torch.cat(self.results[name]).cpu()

    def of_policies(self) -> tuple[Tensor, Tensor, Tensor]:
        """Policies (N, K), rewards (N,) and correctness (N,), as `utils.performance_stats` asks."""
        return self["policy"], self["reward"], self["correct"]


def mean(name: str, batches: list[Tensor]) -> float:
    """What the bar shows: the mean over the last batches, blocks counted a policy at a time."""
    recent = torch.cat(batches[-20:]).float()
    return (recent.sum(1) if name == "policy" else recent).mean().item()
