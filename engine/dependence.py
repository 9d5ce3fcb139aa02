"""What a network's decisions owe to the image, and whether looking at it pays."""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import utils

from . import loop
from .data import Loader
from .trained import TrainedModel

SHUFFLES = 3


def measure(
    trained: TrainedModel,
    test: Loader,
    policies: Tensor,
    correct: Tensor,
    full: Tensor | None = None,
) -> dict[str, Any]:
    """Accuracy, blocks and FLOPs of the same network under other ways to decide.

    policies (N, K) and correct (N,) are what the images of `test` have under their own ones, full
    (N,) whether all blocks recognise them, which is found out where it is not given.
    "shuffled" gives the same policies to other images, the mean of SHUFFLES; "most_frequent" is the
    most frequent policy for all; "static" is the best one of DistributeK, LateK and the candidates
    of the policy network, where it has some, with as many blocks, and "static_same_flops" with what
    deciding costs spent on blocks as well. Also how many blocks the images get that the full
    network recognises, and those that it does not.
    """

    def accuracy(policies: Tensor, label: str) -> float:
        found = loop.correct_under(trained.resnet, policies, test, trained.args.precision, label)
        return found.double().mean().item()

    static = StaticPolicies(trained, test, len(policies))
    decision = trained.decision_flops()
    kept = policies.count_nonzero(1).double()
    cost = {"blocks": kept.mean().item()}
    blocks_flops = decision + (policies.double() @ static.per_block).mean().item()
    cost["flops"] = static.fixed + blocks_flops
    shuffles = [accuracy(utils.shuffled(policies, seed), "shuffled") for seed in range(SHUFFLES)]
    if full is None:
        full = loop.correct_under(
            trained.resnet, torch.ones_like(policies), test, trained.args.precision, "full"
        )
    return {
        "own": {"accuracy": correct.double().mean().item(), **cost},
        "shuffled": {"accuracy": statistics.mean(shuffles), **cost, "each": shuffles},
        "most_frequent": static.under(utils.most_frequent(policies), "most frequent"),
        "static": static.best(torch.ones_like(static.per_block), cost["blocks"]),
        "static_same_flops": static.best(static.per_block, blocks_flops),
        "full": {"accuracy": full.double().mean().item(), "blocks": trained.config.num_blocks},
        "blocks_where_full_is_right": kept[full].mean().item() if full.any() else None,
        "blocks_where_full_is_wrong": kept[~full].mean().item() if not full.all() else None,
    }


def by_difficulty(figures: Mapping[str, Any]) -> str:
    """In words, how many blocks images get that the full network recognises, and the others."""
    found = {side: figures[f"blocks_where_full_is_{side}"] for side in ("right", "wrong")}
    return ", ".join(f"{side}: {n:.2f}" for side, n in found.items() if n is not None)


class StaticPolicies:
    """What a network gives where all its images get one policy, each policy tried once."""

    def __init__(self, trained: TrainedModel, test: Loader, num_images: int):
        self.trained, self.test, self.num_images = trained, test, num_images
        self.fixed, self.per_block = trained.resnet_flops()
        self.tried: dict[tuple[int, ...], dict[str, float]] = {}

    def under(self, policy: Tensor, label: str = "static") -> dict[str, float]:
        """Accuracy, blocks and FLOPs under a policy (K,)."""
        key = tuple(policy.int().tolist())  # several kinds may have it, under other names
        if key not in self.tried:
            same = policy.expand(self.num_images, -1)
            precision = self.trained.args.precision
            correct = loop.correct_under(self.trained.resnet, same, self.test, precision, label)
            self.tried[key] = {
                "accuracy": correct.double().mean().item(),
                "blocks": policy.sum().item(),
                "flops": self.fixed + (policy.double() @ self.per_block).item(),
            }
        return self.tried[key]

    def costing(
        self, policies: Mapping[str, Tensor], cost: Tensor, target: float
    ) -> dict[str, Any] | None:
        """Of ever longer policies (K,), by name, the one that meets the target, where a block costs
        so much, cost (K,); None where the first costs more.

        Where none costs just as much, images are shared out between two neighbouring ones.
        """
        names = list(policies)
        costs = torch.stack(list(policies.values())).double() @ cost
        fits = int((costs <= target * (1 + 1e-9)).sum()) - 1
        if fits < 0:
            return None
        row = {"policy": names[fits], **self.under(policies[names[fits]])}
        missing = target - costs[fits].item()
        if names[fits] == names[-1] or missing <= 1e-9 * target:
            return row
        more = self.under(policies[names[fits + 1]])
        share = missing / costs.diff()[fits].item()
        mixed = {n: (1 - share) * row[n] + share * more[n] for n in more}
        return {"policy": f"{names[fits]} and {names[fits + 1]}", **mixed}

    def best(self, cost: Tensor, target: float) -> dict[str, Any]:
        """The best one of all kinds; see `costing`."""
        found = [self.costing(policies, cost, target) for policies in self.kinds()]
        return max(filter(None, found), key=lambda row: row["accuracy"])

    def kinds(self) -> Iterator[dict[str, Tensor]]:
        """Policies (K,) by name, from few to many blocks: DistributeK, LateK and candidates."""
        stages = self.trained.config.stages
        for kind in ("distribute", "late"):
            names = [f"{kind}:{keep}" for keep in range(sum(stages) + 1)]
            yield {name: utils.static_policy(name, stages) for name in names}
        if self.trained.candidates is not None:
            yield {utils.shares_of(policy, stages): policy for policy in self.trained.candidates}
