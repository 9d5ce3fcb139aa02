"""Contenders of benchmarks/inference.py that only a GPU has: CUDA graphs and padded rows."""

import copy
from collections.abc import Callable, Iterator

import measure  # noqa: F401  it makes the packages beside this folder known
from torch import Tensor, nn

from models import DeployedResNet
from models.graphs import GraphPerBlock, OneGraph, Recorder, graph

PADDINGS = (8, 16, 32)


def contenders(
    fast: DeployedResNet,
    fast_policy: nn.Module | None,
    x: Tensor,
    policies: Iterator[Tensor],
    record: Recorder = graph,
) -> dict[str, Callable[[], object]]:
    """Name -> a call without arguments, for one batch, each time under the next policies."""
    full = OneGraph(fast, x, record)
    calls = {"full, deployed, CUDA graph": lambda: full(x)}
    if len(x) == 1:
        blocks = GraphPerBlock(fast, x, record)
        name = "ours, deployed, CUDA graph a block"
        calls[name] = lambda: blocks(x, next(policies))
        if fast_policy is not None:
            decide = OneGraph(lambda x: fast_policy(x)[0], x, record)
            calls[f"{name}, with policy net"] = lambda: (decide(x), blocks(x, next(policies)))[1]
    for multiple in PADDINGS:
        if len(x) > multiple:
            twin = copy.copy(fast)  # the same weights
            twin.row_multiple = multiple
            name = f"ours, deployed, rows padded to {multiple}"
            calls[name] = lambda twin=twin: twin(x, next(policies))
    return calls
