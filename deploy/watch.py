"""Whether a module's tensors or hooks have changed since they were looked at."""

from itertools import chain
from operator import attrgetter, is_

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class FusedSteps:
    """How many steps fused optimizers have made, which leave no trace in a tensor's version."""

    def __init__(self):
        self.made = 0
        register_optimizer_step_post_hook(self.see)

    def see(self, optimizer: torch.optim.Optimizer, *_) -> None:
        self.made += any(group.get("fused") for group in optimizer.param_groups)


FUSED_STEPS = FusedSteps()


class Watch:
    """A module's parameters, buffers and forward hooks, as they are now.

    `unchanged` sees that a tensor was replaced, moved or written into, also inside a part, and that
    there are more hooks or fewer; not that a tensor was written into through `.data`, nor that one
    was added.
    """

    def __init__(self, module: nn.Module):
        parts = list(module.modules())
        held = chain.from_iterable((part._parameters, part._buffers) for part in parts)
        found = [(place, name, t) for place in held for name, t in place.items() if t is not None]
        self.places = [(place, name) for place, name, _ in found]
        self.tensors = [tensor for *_, tensor in found]
        # one that was made in inference mode has no version, and cannot be changed outside
        self.versioned = [tensor for tensor in self.tensors if not tensor.is_inference()]
        self.hooks = [h for p in parts for h in (p._forward_hooks, p._forward_pre_hooks)]
        self.before = self.marks()

    def marks(self) -> tuple[int, list[int], int, int]:
        versions = sum(map(attrgetter("_version"), self.versioned))
        hooks = sum(map(len, self.hooks))
        return versions, list(map(Tensor.data_ptr, self.tensors)), hooks, FUSED_STEPS.made

    def unchanged(self) -> bool:
        now = (place.get(name) for place, name in self.places)
        return all(map(is_, now, self.tensors)) and self.marks() == self.before
