"""What a network's decisions owe to the image, and whether looking at it pays."""

import statistics
from typing import Any

import torch
from torch import Tensor

import utils

from . import loop
from .data import Loader
from .trained import TrainedModel

DEALS = 3


def measure(
    trained: TrainedModel, test: Loader, policies: Tensor, correct: Tensor
) -> dict[str, Any]:
    """Accuracy, blocks and FLOPs of the same network under other ways to decide.

    policies (N, K) and correct (N,) are what the images of `test` have under their own ones.
    "shuffled" deals the same policies to other images, the mean of DEALS deals; "common" is the
    most frequent policy for all; "static" is the better one of DistributeK and LateK with as many
    blocks, and "static_same_flops" with what deciding costs spent on blocks as well. Also how many
    blocks the images get that the full network recognises, and those that it does not.
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
    deals = [accuracy(utils.deal(policies, seed), "shuffled") for seed in range(DEALS)]
    full = loop.correct_under(
        trained.resnet, torch.ones_like(policies), test, trained.args.precision, "full"
    )
    return {
        "own": {"accuracy": correct.double().mean().item(), **cost},
        "shuffled": {"accuracy": statistics.mean(deals), **cost, "deals": deals},
        "common": static.under(utils.most_frequent(policies), "common"),
        "static": static.best(torch.ones_like(static.per_block), cost["blocks"]),
        "static_same_flops": static.best(static.per_block, blocks_flops),
        "full": {"accuracy": full.double().mean().item(), "blocks": trained.config.num_blocks},
        "blocks_where_full_is_right": kept[full].mean().item(),
        "blocks_where_full_is_wrong": kept[~full].mean().item(),
    }


class StaticPolicies:
    """What a network gives where all its images get one policy, each policy tried once."""

    def __init__(self, trained: TrainedModel, test: Loader, num_images: int):
        self.trained, self.test, self.num_images = trained, test, num_images
        self.fixed, self.per_block = trained.resnet_flops()
        self.tried: dict[str, dict[str, Any]] = {}

    def under(self, policy: Tensor, label: str = "static") -> dict[str, float]:
        """Accuracy, blocks and FLOPs under a policy (K,)."""
        same = policy.expand(self.num_images, -1)
        precision = self.trained.args.precision
        correct = loop.correct_under(self.trained.resnet, same, self.test, precision, label)
        return {
            "accuracy": correct.double().mean().item(),
            "blocks": policy.sum().item(),
            "flops": self.fixed + (policy.double() @ self.per_block).item(),
        }

    def named(self, name: str) -> dict[str, Any]:
        """The same under a policy such as late:8."""
        if name not in self.tried:
            policy = utils.static_policy(name, self.trained.config.stages)
            self.tried[name] = {"policy": name, **self.under(policy)}
        return self.tried[name]

    def costing(self, kind: str, cost: Tensor, target: float) -> dict[str, Any]:
        """As many blocks as meet the target, where a block costs so much, cost (K,).

        Where no K costs just as much, images are shared out between two neighbouring ones.
        """
        config = self.trained.config
        names = [f"{kind}:{keep}" for keep in range(config.num_blocks + 1)]
        policies = torch.stack([utils.static_policy(name, config.stages) for name in names])
        costs = policies.double() @ cost
        fits = int((costs <= target * (1 + 1e-9)).sum()) - 1
        row, missing = self.named(names[fits]), target - costs[fits].item()
        if names[fits] == names[-1] or missing <= 1e-9 * target:
            return row
        more, share = self.named(names[fits + 1]), missing / costs.diff()[fits].item()
        mixed = {n: (1 - share) * row[n] + share * more[n] for n in row if n != "policy"}
        return {"policy": f"{names[fits]} and {names[fits + 1]}", **mixed}

    def best(self, cost: Tensor, target: float) -> dict[str, Any]:
        """The better one of DistributeK and LateK; see `costing`."""
        found = [self.costing(kind, cost, target) for kind in ("distribute", "late")]
        return max(found, key=lambda row: row["accuracy"])
