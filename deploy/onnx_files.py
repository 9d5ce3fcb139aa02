"""Trained networks as an ONNX model, and how what it gives compares with them.

The packages onnx and onnxruntime are imported where they are used: training does without.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

import models
import utils

from . import int8

CALIBRATION = 512  # training images that show int8 its scales


def build(
    resnet: nn.Module,
    policy: nn.Module | None,
    config: models.Config,
    opset: int,
    ranges: int8.Ranges | None = None,
    penalty_input: bool = False,
    fixed: Sequence[bool | None] | None = None,
):
    """The ONNX model of trained networks, checked; see `deploy.onnx_graph.build`."""
    import onnx

    from . import onnx_graph

    model = onnx_graph.build(resnet, policy, config, opset, ranges, penalty_input, fixed)
    onnx.checker.check_model(model, full_check=True)
    return model


def calibrate(
    resnet: nn.Module, policy: nn.Module | None, train, penalties: Sequence[float] = ()
) -> int8.Ranges:
    """What the networks meet on some training images, under their own policies, or under those for
    each of the penalties.
    """
    batches = islice(train.epoch(0), -(-CALIBRATION // train.batch_size))
    images = [
        images[: CALIBRATION - step * train.batch_size]
        for step, (images, _, _) in enumerate(batches)
    ]

    def run(images: Tensor) -> None:
        for penalty in penalties or (None,):
            with asked_for(policy, penalty):
                models.predict(resnet, policy, images)

    return int8.observe(filter(None, (resnet, policy)), run, images)


@torch.no_grad()
def fixed_blocks(resnet: nn.Module, policy: nn.Module | None, images) -> list[bool | None]:
    """For each block: whether all these images keep it, all drop it, or (None) neither."""
    policies = torch.cat([models.predict(resnet, policy, batch)[1] for batch in images]).bool()
    kept, dropped = policies.all(0).tolist(), (~policies).all(0).tolist()
    return [True if k else False if d else None for k, d in zip(kept, dropped, strict=True)]


def against_fixed(policies: Tensor, fixed: Sequence[bool | None]) -> Tensor:
    """Which of the N images with policies (N, K) decide otherwise about a block that is fixed."""
    told = [k for k, value in enumerate(fixed) if value is not None]
    values = torch.tensor([bool(fixed[k]) for k in told], dtype=torch.bool)
    return (policies[:, told].bool() != values).any(1)


@contextmanager
def asked_for(policy: nn.Module | None, penalty: float | None) -> Iterator[None]:
    """Inside, a `PenaltyPolicy` chooses for this penalty; with None any policy stays as it is."""
    if penalty is None:
        yield
        return
    before, policy.penalty = policy.penalty, penalty
    try:
        yield
    finally:
        policy.penalty = before


def session(content: bytes):
    """ONNX Runtime on a file's content, with as many threads as PyTorch has."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])


def compare(
    content: bytes, resnet: nn.Module, policy: nn.Module | None, test, penalty: float | None = None
) -> dict[str, Tensor]:
    """Run the file and PyTorch on the same N images, a file with a penalty input at this one.

    Returns policies (N, K) and whether the class is right (N,) as the file has them; the largest
    difference of logits, relative to the largest logit, whether policy and class are the same, and
    the margins, all (N,); and PyTorch's policies (N, K).
    """
    run = session(content)
    more = {} if penalty is None else {"penalty": np.array([penalty], np.float32)}
    parts: dict[str, list[Tensor]] = {}
    done = 0
    for images, labels, _ in test.epoch(0):
        with torch.no_grad(), asked_for(policy, penalty), Margins(resnet, policy) as margins:
            logits, chosen = (part.cpu() for part in models.predict(resnet, policy, images))
        rows = [
            run.run(["logits", "policy"], {"image": test.picture(done + row)[None], **more})
            for row in range(len(images))
        ]
        done += len(images)
        theirs, their_policy = (
            torch.from_numpy(np.concatenate(r)) for r in zip(*rows, strict=True)
        )
        found = {
            "policy": their_policy,
            "correct": theirs.argmax(1) == labels.cpu(),
            "difference": (theirs - logits).abs().amax(1) / logits.abs().amax(1),
            "same_policy": (their_policy == chosen).all(1),
            "pytorch_policy": chosen,
            "same_class": theirs.argmax(1) == logits.argmax(1),
            "margin": margins.nearest(len(images)).cpu(),
        }
        for name, part in found.items():
            parts.setdefault(name, []).append(part)
    return {name: torch.cat(part) for name, part in parts.items()}


class Margins:
    """How near, in probability, each image's nearest decision is to the other outcome.

    Inside, one batch runs; `nearest` then gives its margins.
    """

    def __init__(self, resnet: nn.Module, policy: nn.Module | None):
        self.found: list[Tensor] = []
        self.hooks = []
        if resnet.decides:
            for gate in resnet.gates:
                self.watch(gate, lambda z: (z.softmax(1)[:, 1] - 0.5).abs())
        elif isinstance(policy, models.PenaltyPolicy):
            self.watch(policy.confidence, lambda z: lead(z, policy))
        elif isinstance(policy, models.GreedyPolicy):
            self.watch(policy.policy_net.logit, lambda z: (z.sigmoid() - 0.5).abs().amin(1))

    def watch(self, module: nn.Module, margin) -> None:
        def see(_, __, output: Tensor) -> None:
            self.found.append(margin(output))

        self.hooks.append(module.register_forward_hook(see))

    def __enter__(self) -> "Margins":
        return self

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()

    def nearest(self, count: int) -> Tensor:
        """(B,) of a batch of `count` images."""
        return torch.stack(self.found).amin(0) if self.found else torch.ones(count)


def lead(logits: Tensor, policy: models.PenaltyPolicy) -> Tensor:
    """By how much the best candidate's expected reward leads, (B, C) to (B,)."""
    candidates = policy.confidence.candidates
    if len(candidates) == 1:  # as of a ResNet of one block a stage
        return torch.ones(len(logits))
    best = utils.expected_reward(logits.sigmoid(), candidates, policy.penalty).topk(2).values
    return best[:, 0] - best[:, 1]
