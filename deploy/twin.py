"""Inference-only twins of the networks, for when the clock counts.

Weights and activations stay in one dtype; `block` has what makes a block fast.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial, wraps

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import utils
from models import (
    GatedResNet,
    GreedyPolicy,
    PenaltyPolicy,
    PolicyNet,
    ResNet,
    StaticPolicy,
    execution,
)
from models.aig import CLOSED, OPEN, Gate

from . import parts, reading
from .block import Batch, Block, Conv

# Images that pass through the network together on a CPU: few make the overhead of a call weigh,
# many leave the cache (benchmarks/README.md has the figures). A GPU takes the whole batch.
CPU_CHUNK = 512


def inference(forward: Callable) -> Callable:
    """A twin's method, run without gradients; what it returns may go into a network that learns.

    torch.compile leaves it alone: the twin fuses by itself, and torch 2.15 fails to compile it.
    """
    forward = torch.inference_mode()(forward)

    @wraps(forward)
    def run(*args):
        execution.refuse_tracing()
        if torch.compiler.is_compiling():
            return torch.compiler.disable(run)(*args)
        out = forward(*args)
        if torch.is_inference_mode_enabled():  # a part of another twin's work
            return out
        return tuple(part.clone() for part in out) if isinstance(out, tuple) else out.clone()

    return run


class Twin(nn.Module):
    """An inference-only copy, whose weights lie as its kernels want them: it has no parameters."""

    def _apply(self, fn, recurse=True):
        raise TypeError(
            f"a {type(self).__name__} keeps its dtype and device: change the original's and deploy "
            "that"
        )

    def state_dict(self, *args, **options):
        raise TypeError(f"a {type(self).__name__} has no state dict: save the original's")


def deploy(
    resnet: ResNet | GatedResNet,
    policy: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple["DeployedResNet | DeployedGatedResNet", nn.Module | None]:
    """Inference-only copies of a ResNet and its policy on their device, all in `dtype`.

    policy: a `GreedyPolicy`, `PenaltyPolicy` or `StaticPolicy`; None where there is none. The
    copies are called like the originals in evaluation mode, also under autocast; logits are
    float32, or float64 where `dtype` is that. Later changes of the originals do not reach them.
    Raises ValueError naming a module that they have no twin for; warns of forward hooks, which stay
    behind.
    """
    if not isinstance(resnet, (ResNet, GatedResNet)):
        kind = type(resnet).__name__
        raise ValueError(
            f"deploy takes a ResNet of `models`, not a {kind}: of a wrapped one its .module; what "
            "torch.hub loads deploys itself"
        )
    # a weight under spectral norm changes where it is read in training mode
    with torch.no_grad(), utils.evaluating(resnet, policy):
        twin = DeployedGatedResNet if resnet.decides else DeployedResNet
        return twin(resnet, dtype), policy and deploy_policy(policy, dtype)


def deploy_policy(policy: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The inference-only copy of a policy module; see `deploy`."""
    if isinstance(policy, StaticPolicy):
        return deepcopy(policy)
    if isinstance(policy, (GreedyPolicy, PenaltyPolicy)):
        reading.check_policy(policy)
    if isinstance(policy, GreedyPolicy):
        return GreedyPolicy(DeployedPolicyNet(policy.policy_net, dtype))
    if isinstance(policy, PenaltyPolicy):
        return DeployedPenaltyPolicy(policy, dtype)
    raise ValueError(
        f"deploy takes a policy module, not a {type(policy).__name__}: wrap a policy network in "
        "GreedyPolicy"
    )


def kept(layer: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """A layer's weight and bias, which later changes of the original do not reach."""
    return [part.detach().to(dtype, copy=True) for part in layer]


class DeployedResNet(Twin):
    """A ResNet's inference-only twin; see `deploy`."""

    decides = False

    def __init__(self, resnet: ResNet, dtype: torch.dtype):
        super().__init__()
        reading.check_resnet(resnet)
        self.num_blocks, self.dtype = resnet.num_blocks, dtype
        self.row_multiple = resnet.row_multiple
        self.wide = torch.promote_types(dtype, torch.float32)  # of pooling and everything after
        self.conv1 = Conv(resnet.conv1, resnet.bn1, dtype)
        self.pool = deepcopy(resnet.stem_pool)
        self.blocks = [Block(branch, shortcut, dtype) for branch, shortcut in resnet.units()]
        area, costs = 1.0, []  # of a block's input, in parts of the first one's
        for block in self.blocks:
            costs.append(area * block.work)
            area *= block.shrinks
        self.block_costs = torch.tensor(costs)
        self.fc = None
        if resnet.fc is not None:
            self.fc = kept(reading.linear(resnet.fc), self.wide)

    @inference
    def forward(self, x: Tensor, policy: Tensor | None = None) -> Tensor:
        """As `ResNet.forward`; policy None, (B, K) or (P, B, K)."""
        if policy is not None:
            execution.check(policy, len(x), self.num_blocks)
        if policy is None:
            return parts.evenly(lambda part: (self.part(part),), x)[0]
        number = parts.count(x)
        if number == 1:
            return self.part(x, policy)
        shares = parts.balanced(self.costs(policy), number)
        calls = [partial(self.share, x, policy, rows) for rows in shares]
        return torch.cat(parts.run(calls), dim=-2)[..., torch.cat(shares).argsort(), :]

    def costs(self, policy: Tensor) -> Tensor:
        """What each image costs under its policy (B, K), or policies (P, B, K): (B,)."""
        cost = (policy.bool() * self.block_costs).sum(-1)
        return cost if policy.ndim == 2 else cost.sum(0)

    def share(self, x: Tensor, policy: Tensor, rows: Tensor) -> Tensor:
        return self.part(x[rows], policy[..., rows, :])

    def part(self, x: Tensor, policy: Tensor | None = None) -> Tensor:
        """`forward` in this thread."""
        size = CPU_CHUNK if x.device.type == "cpu" else len(x)
        if policy is None:
            return torch.cat([self.head(self.full(self.stem(part))) for part in x.split(size)])
        pieces = zip(x.split(size), policy.split(size, dim=-2), strict=True)
        return torch.cat([self.chunk(part, rows) for part, rows in pieces], dim=-2)

    def chunk(self, x: Tensor, policy: Tensor) -> Tensor:
        x = self.stem(x)
        start, counts = 0, execution.kept_counts(policy)
        if policy.ndim == 3:
            start = execution.shared_prefix(counts, policy[..., 0].numel())
            for block in self.blocks[:start]:
                x = block.full(x)
            x = torch.cat([x] * len(policy))
        if len(x) == 1:
            x = self.one_image(x, counts[start:], self.blocks[start:])
        else:
            x = self.batch(x, policy[..., start:].flatten(0, -2), counts[start:])
        return self.head(x).unflatten(0, policy.shape[:-1])

    @staticmethod
    def one_image(x: Tensor, kept: list[int], blocks: list[Block]) -> Tensor:
        """Blocks on a single image, whose rows need no gathering; kept: 0 or 1 a block."""
        for block, keep in zip(blocks, kept, strict=True):
            if keep:
                x = block.full(x)
            elif not block.is_identity:
                x = block.shortcut(x)
        return x

    def batch(self, x: Tensor, policy: Tensor, counts: list[int]) -> Tensor:
        """The last k blocks on a batch, by their part of its policies (B, k), kept by so many."""
        # on a GPU a look at the policies is a wait, and padded rows lie together only by chance
        looks = policy.device.type == "cpu" and self.row_multiple == 1 and len(policy) > 0
        order = execution.nested_order(policy) if looks else None
        if order is not None:
            x, policy = execution.gather(x, order), policy[order]
        rows = execution.kept_rows(policy, counts, self.row_multiple)
        if looks:
            spans = execution.kept_spans(policy, counts)
            rows = [some if span is None else span for some, span in zip(rows, spans, strict=True)]
        batch = Batch(x)
        for block, some in zip(self.blocks[self.num_blocks - len(rows) :], rows, strict=True):
            batch = block.sparse(batch, some)
        return batch.images if order is None else execution.gather(batch.images, order.argsort())

    def stem(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype, memory_format=torch.channels_last)
        return self.pool(self.conv1.relu(x))

    def full(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block.full(x)
        return x

    def head(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3), dtype=self.wide)
        if self.fc is None:
            return x
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, *self.fc)


class DeployedPolicyNet(Twin):
    """A policy network's inference-only twin; see `deploy`."""

    def __init__(self, policy_net: PolicyNet, dtype: torch.dtype):
        super().__init__()
        self.num_blocks = policy_net.num_blocks
        self.shrink = deepcopy(policy_net.shrink)
        self.features = DeployedResNet(policy_net.features, dtype)
        self.logit = kept(reading.linear(policy_net.logit), self.features.wide)
        self.vnet = kept(reading.linear(policy_net.vnet), self.features.wide)

    @inference
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `PolicyNet.forward`."""
        return parts.evenly(self.part, x)

    def part(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` in this thread."""
        x = self.features.part(self.shrink(x))
        with torch.autocast(x.device.type, enabled=False):
            return torch.sigmoid(F.linear(x, *self.logit)), F.linear(x, *self.vnet)

    @inference
    def look(self, x: Tensor) -> Tensor:
        """As `PolicyNet.look`."""
        return parts.evenly(lambda part: (self.features.part(self.shrink(part)),), x)[0]


class DeployedPenaltyPolicy(PenaltyPolicy):
    """The inference-only twin of a `PenaltyPolicy`; its penalty may be set anew as well."""

    def __init__(self, policy: PenaltyPolicy, dtype: torch.dtype):
        policy_net = DeployedPolicyNet(policy.policy_net, dtype)
        confidence = deepcopy(policy.confidence).to(policy_net.features.wide)
        super().__init__(policy_net, confidence, policy.penalty)

    @inference
    def forward(self, x: Tensor) -> Tensor:
        return parts.evenly(lambda part: (PenaltyPolicy.forward(self, part),), x)[0]

    @inference
    def choose(self, features: Tensor) -> Tensor:
        """As `PenaltyPolicy.choose`, in full precision under autocast too."""
        with torch.autocast(features.device.type, enabled=False):
            return super().choose(features)


class DeployedGate:
    """A gate's inference-only twin: (B, C, H, W) to (B,) bool."""

    def __init__(self, gate: Gate, dtype: torch.dtype):
        self.wide = torch.promote_types(dtype, torch.float32)
        self.hidden, (weight, bias) = (
            kept(layer, self.wide) for layer in reading.gate_layers(gate)
        )
        self.pool = deepcopy(gate).pool  # which may read parameters of a subclass
        self.weight, self.bias = weight[OPEN] - weight[CLOSED], bias[OPEN] - bias[CLOSED]

    def __call__(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            hidden = F.linear(self.pool(x, self.wide), *self.hidden).relu_()
            return torch.mv(hidden, self.weight) > -self.bias


class DeployedGatedResNet(Twin):
    """A ConvNet-AIG's inference-only twin, its gates deterministic; see `deploy`."""

    decides = True

    def __init__(self, net: GatedResNet, dtype: torch.dtype):
        super().__init__()
        reading.check_gated(net)
        self.num_blocks = net.num_blocks
        self.resnet = DeployedResNet(net.resnet, dtype)
        self.gates = [
            None if k in net.always_on else DeployedGate(gate, dtype)
            for k, gate in enumerate(net.gates)
        ]

    @inference
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `GatedResNet.forward` in evaluation mode; returns logits and gates (B, K)."""
        return parts.evenly(self.part, x)

    def part(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` in this thread."""
        size = CPU_CHUNK if x.device.type == "cpu" else len(x)
        logits, gates = zip(*(self.chunk(part) for part in x.split(size)), strict=True)
        return torch.cat(logits), torch.cat(gates)

    def chunk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch = Batch(self.resnet.stem(x))
        executed = []
        for block, gate in zip(self.resnet.blocks, self.gates, strict=True):
            keep = x.new_ones(len(x), dtype=torch.bool) if gate is None else gate(batch.images)
            if gate is None:
                batch = Batch(block.full(batch.images))
            elif len(x) == 1:  # needs no gathering
                run = block.full if keep else partial(block.dropped, relu_dropped=True)
                batch = Batch(run(batch.images))
            else:
                rows = execution.open_rows(keep, self.resnet.row_multiple)
                batch = block.sparse(batch, rows, relu_dropped=True)
            executed.append(keep)
        return self.resnet.head(batch.images), torch.stack(executed, 1).float()
