"""What part of a batch a process is working on, and the random numbers of that part."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from . import ranks
from .device import send, wants_pinned

AUGMENTATION, STEP = 1, 2  # whose random numbers are drawn from (seed, epoch)


def derived_seed(*numbers: int) -> int:
    """One seed from several numbers, such as (seed, epoch), that differ in all their bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seed_everything(*numbers: int) -> None:
    """Seed every generator in use as a function of the numbers given."""
    seed = derived_seed(*numbers)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@dataclass(frozen=True)
class Shard:
    """Images `start` to `stop` of a batch of `total`, the `step`-th batch (from 0) of its epoch.

    A batch may be shared by several processes and cut into micro-batches. Losses that are weighted
    by `share` add up to that of the whole batch, and random numbers drawn here are slices of those
    of the whole batch, so that neither changes what is learned, but for BatchNorm's statistics.
    """

    start: int
    stop: int
    total: int
    seed: tuple[int, ...] = (0,)
    step: int = 0
    world: int = 1  # processes that share the batch

    @property
    def share(self) -> float:
        return (self.stop - self.start) / self.total

    @cached_property
    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(*self.seed, self.step))

    def noise(self, *sizes: int, device: torch.device | None = None) -> Tensor:
        """Uniform numbers in [0, 1), (images, *sizes), float32; anew at each call."""
        on_host = device is None or device.type == "cpu"
        # the same bits in pinned memory, which spares `send` a copy
        pinned = not on_host and wants_pinned(device)
        whole = torch.rand(self.total, *sizes, generator=self._generator, pin_memory=pinned)
        part = whole[self.start : self.stop]
        return part if on_host else send(part, device)

    def common_noise(self, *sizes: int) -> Tensor:
        """Uniform numbers in [0, 1), (*sizes), float32, the same for all images of the batch, on
        the host: what they decide is decided there, and one result is sent.
        """
        return torch.rand(*sizes, generator=self._generator)

    def split(self, pieces: int) -> Iterator[tuple[slice, "Shard"]]:
        """Micro-batches of even sizes: rows of this part, and what part they are."""
        count = self.stop - self.start
        bounds = [count * piece // pieces for piece in range(pieces + 1)]
        for first, last in pairwise(bounds):
            start, stop = self.start + first, self.start + last
            yield slice(first, last), replace(self, start=start, stop=stop)


def shards(
    num_images: int, batch_size: int, seed: tuple[int, ...], skip: int = 0, training: bool = False
) -> Iterator[Shard]:
    """This rank's part of each batch, the first `skip` left out.

    In training a batch of fewer images than ranks, at most the last, is left out by all of them,
    so that they stay in step.
    """
    rank, world = ranks.rank(), ranks.world()
    for step in range(skip, -(-num_images // batch_size)):
        total = min(batch_size, num_images - step * batch_size)
        start, stop = total * rank // world, total * (rank + 1) // world
        if start < stop and (total >= world or not training):
            yield Shard(start, stop, total, seed, step, world)
