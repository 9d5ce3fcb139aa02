"""What numbers the convolutions of a network meet, from which its int8 form takes its scales."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Range(NamedTuple):
    """The smallest and the largest number seen."""

    low: float
    high: float

    def joined(self, x: Tensor) -> "Range":
        return Range(min(self.low, x.min().item()), max(self.high, x.max().item()))

    def scale(self) -> tuple[float, int]:
        """Step and zero point of uint8: x is near step * (q - zero). Zero is met exactly."""
        step = (self.high - self.low) / 255 or 1.0
        return step, round(-self.low / step)


LARGEST_BIAS = 2**30  # half of int32: products are added to it
NOTHING = Range(0.0, 0.0)  # zero is always in reach: borders are padded with it


class Ranges(dict[nn.Module, Range]):
    """By module: of a convolution, its input's range; of its BatchNorm, the output's."""

    def see(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0] if isinstance(module, nn.Conv2d) else output
        if x.numel():  # a block that no image keeps meets an empty batch
            self[module] = self.get(module, NOTHING).joined(x)


@torch.no_grad()
def observe(
    networks: Iterable[nn.Module], run: Callable[[Tensor], object], batches: Iterable[Tensor]
) -> Ranges:
    """Ranges of what `networks` meet while `run` is called with each batch.

    Not of a network's first convolution, where three channels leave nothing to be saved, nor of
    blocks that no image kept: these stay as they are.
    """
    ranges = Ranges()
    modules = [m for network in networks for m in network.modules()]
    watched = [
        m
        for m in modules
        if isinstance(m, nn.BatchNorm2d) or isinstance(m, nn.Conv2d) and m.in_channels > 3
    ]
    hooks = [module.register_forward_hook(partial(Ranges.see, ranges)) for module in watched]
    try:
        for images in batches:
            run(images)
    finally:
        for hook in hooks:
            hook.remove()
    return ranges


def weight_scales(weight: Tensor, bias: Tensor, step: float) -> Tensor:
    """Steps of int8 by output channel, (C,): the largest weight of each is 127 of them.

    They are larger where weights are so small that the bias, which is kept in steps of theirs
    times the input's `step`, would not fit into int32.
    """
    steps = weight.abs().flatten(1).amax(1).clamp_min(1e-12) / 127
    return torch.maximum(steps, bias.abs() / (step * LARGEST_BIAS))
