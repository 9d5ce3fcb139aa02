"""How a batch passes through residual blocks under a policy.

A unit is one block as (residual branch, shortcut). `sparse` computes a branch only for the images
that keep it; `masked` computes it for all and throws results away, which is what the released code
did and what the tests compare with.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Unit = tuple[nn.Module, nn.Module]


def full(branch: nn.Module, shortcut: nn.Module, x: Tensor) -> Tensor:
    """One block, kept by every image."""
    return F.relu(shortcut(x) + branch(x), inplace=True)


def kept_rows(policy: Tensor) -> list[Tensor]:
    """For each of the K blocks the indices of the images that keep it, from a (B, K) policy.

    One `nonzero` and one copy of the K counts serve the whole network, so that a GPU is waited
    for twice a forward pass and not twice a block.
    """
    by_block = policy.bool().t()
    rows = by_block.nonzero()[:, 1]
    return list(rows.split(by_block.sum(1).tolist()))


def sparse(units: Sequence[Unit], x: Tensor, policy: Tensor) -> Tensor:
    """All blocks, each run on the rows of x that keep it."""
    for (branch, shortcut), rows in zip(units, kept_rows(policy), strict=True):
        if len(rows) == len(x):
            x = full(branch, shortcut, x)
        elif len(rows) == 0:
            x = shortcut(x)
        else:
            passed = shortcut(x)
            kept = F.relu(passed.index_select(0, rows) + branch(x.index_select(0, rows)))
            x = passed.index_copy(0, rows, kept.to(passed.dtype))
    return x


def masked(units: Sequence[Unit], x: Tensor, policy: Tensor) -> Tensor:
    """All blocks, each run on every row and then selected by the policy."""
    keep = policy.bool()
    for k, (branch, shortcut) in enumerate(units):
        passed = shortcut(x)
        x = torch.where(keep[:, k, None, None, None], F.relu(passed + branch(x)), passed)
    return x


FORMS = {"sparse": sparse, "masked": masked}
