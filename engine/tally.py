"""Going through an epoch's batches with a progress bar, and keeping what each image got."""

import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import zip_longest

import torch
from torch import Tensor
from tqdm import tqdm

from . import ranks
from .data import Loader
from .part import Part

SHOWN = {"correct": "acc", "reward": "reward", "policy": "blocks", "loss": "loss"}


class Tally:
    """Iterates over an epoch's batches and gathers (B, ...) results by name.

    `skip` batches are left out, of which `results` are known already. The bar shows running means
    of this process; it is quiet where the output is no terminal.
    """

    def __init__(
        self,
        loader: Loader,
        epoch: int,
        label: str,
        skip: int = 0,
        results: Mapping[str, Tensor] | None = None,
    ):
        self.loader, self.epoch, self.skip = loader, epoch, skip
        # what is known already stands once, though every rank may have read it
        self.known = {n: t if ranks.is_main() else t[:0] for n, t in (results or {}).items()}
        self.results: dict[str, list[Tensor]] = {}
        self.seconds = 0.0
        quiet = None if ranks.is_main() else True
        self.bar = tqdm(
            total=-(-loader.num_images // ranks.world()), desc=label, unit="img", disable=quiet,
            leave=False,
        )  # fmt: skip

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Part]]:
        start = time.perf_counter()
        with self.bar:
            yield from self.loader.epoch(self.epoch, self.skip)
        self.seconds = time.perf_counter() - start

    def add(self, **results: Tensor) -> None:
        """Keep one batch's results; a policy is kept as bytes, the rest as it comes."""
        for name, value in results.items():
            value = value.detach()
            if name == "policy":
                value = value.round().to(torch.uint8)
            self.results.setdefault(name, []).append(value)
        if not self.bar.disable:
            self.bar.set_postfix({SHOWN[n]: f"{mean(n, v):.3f}" for n, v in self.results.items()
                                  if n in SHOWN})  # fmt: skip
            self.bar.update(len(value))

    def __getitem__(self, name: str) -> Tensor:
        """All images' results of one name, once there is no more to add; every rank has to ask."""
        return self._final[name]

    @cached_property
    def _final(self) -> dict[str, Tensor]:
        return self.gather()

    def of_policies(self) -> tuple[Tensor, Tensor, Tensor]:
        """Policies (N, K), rewards (N,) and correctness (N,), as `utils.performance_stats` asks."""
        return self["policy"], self["reward"], self["correct"]

    def gather(self) -> dict[str, Tensor]:
        """All images' results by name, on the CPU, those of all ranks in the loader's order."""
        own = {name: [tensor] for name, tensor in self.known.items()}
        for name, tensors in self.results.items():
            own.setdefault(name, []).extend(tensor.cpu() for tensor in tensors)
        if ranks.world() == 1:
            return {name: torch.cat(tensors) for name, tensors in own.items()}
        everyones = ranks.gather(own)
        return {
            name: torch.cat([
                tensor
                for batch in zip_longest(*(rank.get(name, []) for rank in everyones))
                for tensor in batch if tensor is not None
            ])
            for name in everyones[0]
        }  # fmt: skip


def mean(name: str, batches: list[Tensor]) -> float:
    """What the bar shows: the mean over the last batches, blocks counted a policy at a time."""
    recent = torch.cat(batches[-20:]).float()
    return (recent.sum(1) if name == "policy" else recent).mean().item()
