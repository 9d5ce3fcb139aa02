"""CUDA graphs of a deployed network, for one image at a time.

A graph replays kernels that were recorded, without a launch by the host for each. It wants sizes
that never change, which the full network has, and one image that runs or drops whole blocks.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from models import execution

from .twin import DeployedResNet

Policy = Callable[[Tensor], Tensor]  # images to policies
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
    def __init__(
        self, call: Callable[[Tensor], Tensor], example: Tensor, recorder: Recorder = graph
    ):
        self.call = call  # a graph holds on to none of the tensors that it was recorded with
        self.input = example.clone()
        self.replay, self.result = recorder(partial(call, self.input))

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        self.input.copy_(alike(x, self.input))
        self.replay()
        return self.result


class GraphPerBlock:
    """A deployed ResNet for one image: a graph for each block, of which the kept ones are replayed.

    A block writes over its input, so all blocks of one shape share one tensor; where the shape
    changes, the kept and the dropped block write the next. The host waits once, for the policy.
    """

    @torch.inference_mode()
    def __init__(self, fast: DeployedResNet, example: Tensor, recorder: Recorder = graph):
        self.fast, self.input = fast, example.clone()
        self.start, x = recorder(partial(fast.stem, self.input))
        self.between = [x]  # what blocks read and write, which no graph holds on to
        self.kept, self.dropped = [], []
        for block in fast.blocks:
            if block.is_identity:
                replay, _ = recorder(partial(block.full, x))
                self.dropped.append(None)
            else:
                before, x = x, block.shortcut(x).clone()
                self.between.append(x)
                replay, _ = recorder(partial(copy_of, block.full, before, x))
                dropped, _ = recorder(partial(copy_of, block.shortcut, before, x))
                self.dropped.append(dropped)
            self.kept.append(replay)
        self.end, self.logits = recorder(partial(fast.head, x))

    @torch.inference_mode()
    def __call__(self, x: Tensor, policy: Tensor) -> Tensor:
        """x: (1, 3, H, W). policy: (1, K). Returns logits (1, classes)."""
        self.input.copy_(alike(x, self.input))
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


def alike(x: Tensor, recorded: Tensor) -> Tensor:
    """x. Raises ValueError where it has another shape, which a copy would spread in silence."""
    if x.shape != recorded.shape:
        raise ValueError(f"images {tuple(x.shape)}: recorded were {tuple(recorded.shape)}")
    return x


def copy_of(call: Callable[[Tensor], Tensor], x: Tensor, result: Tensor) -> Tensor:
    return result.copy_(call(x))


def record(
    fast: DeployedResNet, policy: Policy, example: Tensor, recorder: Recorder = graph
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A deployed ResNet and its policy, recorded for one image at a time.

    fast, policy: of `deploy`, on a GPU; a penalty that is set later does not reach them. example:
    an image (1, 3, H, W) there. Returns a function of such images that gives logits (1, classes)
    and the policy (1, K), tensors that its next call writes over. Raises ValueError where there is
    no GPU, another number of images, or networks that are none of those.
    """
    if not isinstance(fast, DeployedResNet) or policy is None:
        raise ValueError("graphs are recorded of what deploy gives for a ResNet and its policy")
    if recorder is graph and example.device.type != "cuda":
        raise ValueError(f"CUDA graphs need a GPU, and this image is on the {example.device.type}")
    if len(example) != 1:
        raise ValueError(f"{len(example)} images: graphs are recorded for one at a time")
    policy_of = OneGraph(policy, example, recorder)
    logits_of = GraphPerBlock(fast, example, recorder)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        chosen = policy_of(x)
        return logits_of(x, chosen), chosen

    return run
