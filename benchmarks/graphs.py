"""Contenders of benchmarks/inference.py that only a GPU has: CUDA graphs and padded rows.

A graph replays kernels that were recorded, without a launch by the host for each. It wants sizes
that never change, which the full network has, and one image that runs or drops whole blocks.
"""

import copy
from collections.abc import Callable
from functools import partial

import measure  # noqa: F401  it makes the packages beside this folder known
import torch
from torch import Tensor, nn

from models import DeployedResNet, execution

PADDINGS = (8, 16, 32)
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]


def graph(call: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """Record a call: what replays it, and the tensor that then holds its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is done at a first call only is not to be recorded
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        result = call()
    return recorded.replay, result


class OneGraph:
    """A function of one tensor as one graph, for inputs of one shape."""

    @torch.inference_mode()
    def __init__(self, call: Callable[[Tensor], Tensor], example: Tensor, record: Recorder = graph):
        self.input = example.clone()
        self.replay, self.result = record(lambda: call(self.input))

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        self.input.copy_(x)
        self.replay()
        return self.result


class GraphPerBlock:
    """A deployed ResNet for one image: a graph for each block, of which the kept ones are replayed.

    A block writes over its input, so all blocks of one shape share one tensor; where the shape
    changes, the kept and the dropped block write the next. The host waits once, for the policy.
    """

    @torch.inference_mode()
    def __init__(self, fast: DeployedResNet, example: Tensor, record: Recorder = graph):
        self.input = example.clone()
        start, x = record(lambda: fast.stem(self.input))
        self.start, self.kept, self.dropped = start, [], []
        for block in fast.blocks:
            if block.is_identity:
                replay, _ = record(partial(block.full, x))
                self.dropped.append(None)
            else:
                before, x = x, block.shortcut(x).clone()
                replay, _ = record(lambda b=block, i=before, o=x: o.copy_(b.full(i)))
                passed, _ = record(lambda b=block, i=before, o=x: o.copy_(b.shortcut(i)))
                self.dropped.append(passed)
            self.kept.append(replay)
        self.end, self.logits = record(partial(fast.head, x))

    @torch.inference_mode()
    def __call__(self, x: Tensor, policy: Tensor) -> Tensor:
        """x: (1, 3, H, W). policy: (1, K). Returns logits (1, classes)."""
        self.input.copy_(x)
        self.start()
        for keep, kept, dropped in zip(
            execution.kept_counts(policy), self.kept, self.dropped, strict=True
        ):
            if keep:
                kept()
            elif dropped is not None:
                dropped()
        self.end()
        return self.logits


def contenders(
    fast: DeployedResNet,
    fast_policy: nn.Module | None,
    x: Tensor,
    policy: Tensor,
    record: Recorder = graph,
) -> dict[str, Callable[[], object]]:
    """Name -> a call without arguments, for one batch; see benchmarks/inference.py."""
    full = OneGraph(fast, x, record)
    calls = {"full, deployed, CUDA graph": lambda: full(x)}
    if len(x) == 1:
        blocks = GraphPerBlock(fast, x, record)
        name = "ours, deployed, CUDA graph a block"
        calls[name] = lambda: blocks(x, policy)
        if fast_policy is not None:
            decide = OneGraph(lambda x: fast_policy(x)[0], x, record)
            calls[f"{name}, with policy net"] = lambda: (decide(x), blocks(x, policy))[1]
    for multiple in PADDINGS:
        if len(x) > multiple:
            twin = copy.copy(fast)  # the same weights
            twin.row_multiple = multiple
            calls[f"ours, deployed, rows padded to {multiple}"] = partial(twin, x, policy)
    return calls
