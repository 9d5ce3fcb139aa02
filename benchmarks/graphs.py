"""Contenders of benchmarks/inference.py that only a GPU has: CUDA graphs and padded rows."""

import copy
from collections.abc import Callable

from measure import under  # first: it makes the packages beside this folder known
from torch import Tensor, nn

from deploy import DeployedResNet
from deploy.graphs import GraphPerBlock, OneGraph, Recorder, graph

PADDINGS = (8, 16, 32)


def contenders(
    fast: DeployedResNet,
    fast_policy: nn.Module | None,
    x: Tensor,
    policies: Tensor,
    record: Recorder = graph,
) -> dict[str, Callable[[], object]]:
    """Name -> a call without arguments, for one batch; policies: as in benchmarks/inference.py."""
    full = OneGraph(fast, x, record)
    calls = {"full, deployed, CUDA graph": lambda: full(x)}
    if len(x) == 1:
        blocks = GraphPerBlock(fast, x, record)
        name = "ours, deployed, CUDA graph a block"
        calls[name] = under(policies, blocks, x)
        if fast_policy is not None:
            decide = OneGraph(fast_policy, x, record)
            calls[f"{name}, with policy net"] = under(policies, blocks, x, decide)
    for multiple in PADDINGS:
        if len(x) > multiple:
            twin = copy.copy(fast)  # the same weights
            twin.row_multiple = multiple
            calls[f"ours, deployed, rows padded to {multiple}"] = under(policies, twin, x)
    return calls
