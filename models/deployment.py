"""Inference-only twins of the networks, for when the clock counts.

BatchNorm is folded into the convolutions, weights and activations stay in one dtype, and the sum
and relu that end a block run inside its last convolution where the backend has such a kernel
(oneDNN on the CPU). A block writes over the rows that keep it, so the others are not touched.
"""

from collections.abc import Container
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from . import capabilities, execution
from .aig import CLOSED, OPEN, Gate, GatedResNet
from .execution import as_images, as_rows
from .policy import PolicyAtPenalty, PolicyNet, choose
from .resnet import BasicBlock, Bottleneck, PoolAndPad, ResNet

# Images that pass through the network together on a CPU: few make the overhead of a call weigh,
# many leave the cache (benchmarks/README.md has the figures). A GPU takes the whole batch.
CPU_CHUNK = 512


def deploy(
    resnet: ResNet | GatedResNet,
    policy_net: PolicyNet | PolicyAtPenalty | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple["DeployedResNet | DeployedGatedResNet", "DeployedPolicy | None"]:
    """Inference-only copies of both networks on their device, weights and activations in `dtype`.

    They are called like the originals and return float32, or float64 when `dtype` is that, under
    autocast as well. Later changes of the originals do not reach them. Raises ValueError naming a
    module that they have no twin for.
    """
    with torch.no_grad():
        if isinstance(resnet, GatedResNet):
            return DeployedGatedResNet(resnet, dtype), None
        if isinstance(policy_net, PolicyAtPenalty):
            return DeployedResNet(resnet, dtype), DeployedPolicyAtPenalty(policy_net, dtype)
        return DeployedResNet(resnet, dtype), policy_net and DeployedPolicy(policy_net, dtype)


# oneDNN orders weights for the batch that they will meet. With AVX2 an order for one image is up to
# seven times slower on ten, the other way round up to twenty times; one for this many serves all.
PACKED_BATCH = 16


class Conv:
    """A convolution with its BatchNorm folded in, and what follows it in a residual network."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype):
        conv, norm = deepcopy(conv).eval(), deepcopy(norm).eval()
        folded = fuse_conv_bn_eval(conv, norm)
        weight = folded.weight.detach().to(dtype)
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias = folded.bias.detach().to(dtype)
        self.geometry = (list(conv.padding), list(conv.stride), [1, 1], 1)
        self.onednn = conv.weight.device.type == "cpu" and capabilities.fused_convolutions(dtype)
        self.packed: dict[tuple[int, ...], Tensor] = {}
        self.threads = 0

    def weight_for(self, x: Tensor) -> Tensor:
        """The weight as oneDNN's kernels read it, made at the first batch of this kind.

        A packing holds for one number of threads as well: another costs a reordering a call.
        """
        threads = torch.get_num_threads()
        if threads != self.threads:
            self.packed, self.threads = {}, threads
        size = (1 if len(x) == 1 else PACKED_BATCH, *x.shape[1:])
        if size not in self.packed:
            self.packed[size] = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, *self.geometry, size
            )
        return self.packed[size]

    def plain(self, x: Tensor) -> Tensor:
        if self.onednn:
            return self.fused(x, "none")
        padding, stride, _, _ = self.geometry
        return F.conv2d(x, self.weight, self.bias, stride, padding)

    def relu(self, x: Tensor) -> Tensor:
        """relu(conv(x))."""
        return self.fused(x, "relu") if self.onednn else self.plain(x).relu_()

    def fused(self, x: Tensor, activation: str) -> Tensor:
        """Convolution and activation in one kernel, as torch.compile emits for frozen networks."""
        weight = self.weight_for(x)
        return torch.ops.mkldnn._convolution_pointwise.default(
            x, weight, self.bias, *self.geometry, activation, [], ""
        )

    def add_relu(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """relu(shortcut + conv(x)), written over `shortcut`."""
        if self.onednn:
            weight = self.weight_for(x)
            return torch.ops.mkldnn._convolution_pointwise_.binary(
                shortcut, x, weight, self.bias, *self.geometry, "add", 1.0, "relu", [], ""
            )
        return shortcut.add_(self.plain(x)).relu_()


class Batch:
    """Images (B, C, H, W), channels_last, and the same memory as a matrix with one row an image.

    Both views are made once and serve many blocks: at small batches making them anew would cost
    as much as the arithmetic.
    """

    def __init__(self, images: Tensor, matrix: Tensor | None = None):
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.matrix = as_rows(self.images) if matrix is None else matrix

    def take(self, rows: Tensor | range) -> "Batch":
        """A copy of some rows; of a range the rows themselves."""
        if isinstance(rows, range):
            span = slice(rows.start, rows.stop)
            return Batch(self.images[span], self.matrix[span])
        matrix = self.matrix.index_select(0, rows)
        return Batch(as_images(matrix, self.images), matrix)

    def put_(self, rows: Tensor | range, kept: "Batch") -> None:
        """Write back what `take` gave."""
        if not isinstance(rows, range):
            self.matrix.index_put_((rows,), kept.matrix)


def refuse_unknown(module: nn.Module, known: Container[str], what: str) -> None:
    """A part that a twin would leave out, or a network of another kind, is an error at once."""
    for name, child in module.named_children():
        if name not in known:
            kind = type(child).__name__
            raise ValueError(f"deploy does not know {name} ({kind}) of {what}")


class Block:
    """A residual block and its shortcut."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module, dtype: torch.dtype):
        if not isinstance(branch, (BasicBlock, Bottleneck)):
            raise ValueError(f"deploy does not know blocks of {type(branch).__name__}")
        count = 2 if isinstance(branch, BasicBlock) else 3
        known = {f"{part}{i}" for part in ("conv", "bn") for i in range(1, count + 1)}
        refuse_unknown(branch, known, f"a {type(branch).__name__}")
        self.convs = [
            Conv(getattr(branch, f"conv{i}"), getattr(branch, f"bn{i}"), dtype)
            for i in range(1, count + 1)
        ]
        self.is_identity = isinstance(shortcut, nn.Identity)
        self.shortcut = shortcut
        if isinstance(shortcut, nn.Sequential):
            refuse_unknown(shortcut, ("0", "1"), "a shortcut")
            self.shortcut = Conv(*shortcut, dtype).plain
        elif not isinstance(shortcut, (nn.Identity, PoolAndPad)):
            raise ValueError(f"deploy does not know shortcuts of {type(shortcut).__name__}")

    def run(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """relu(shortcut + F(x)), written over `shortcut`, which may be x itself."""
        for conv in self.convs[:-1]:
            x = conv.relu(x)
        return self.convs[-1].add_relu(x, shortcut)

    def full(self, x: Tensor) -> Tensor:
        return self.run(x, x if self.is_identity else self.shortcut(x))

    def passed(self, x: Tensor, rectify: bool) -> Tensor:
        """The block for images that drop it; see `sparse`."""
        if self.is_identity:
            return x
        return self.shortcut(x).relu_() if rectify else self.shortcut(x)

    def sparse(self, batch: Batch, rows: Tensor | range, rectify: bool = False) -> Batch:
        """The block on the rows that keep it, the shortcut on the others; may write over them.

        With `rectify` a shortcut that computes something is followed by relu (ConvNet-AIG).
        """
        if len(rows) == 0:
            return batch if self.is_identity else Batch(self.passed(batch.images, rectify))
        passed = batch if self.is_identity else Batch(self.shortcut(batch.images))
        if len(rows) == len(batch.images):
            self.run(batch.images, passed.images)
            return passed
        shortcut = passed.take(rows)
        kept = shortcut if self.is_identity else batch.take(rows)
        self.run(kept.images, shortcut.images)
        if rectify and not self.is_identity:
            passed.images.relu_()
        passed.put_(rows, shortcut)
        return passed


def linear(layer: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return layer.weight.detach().to(dtype), layer.bias.detach().to(dtype)


class DeployedResNet(nn.Module):
    """A ResNet's inference-only twin; see `deploy`."""

    def __init__(self, resnet: ResNet, dtype: torch.dtype):
        super().__init__()
        known = ("conv1", "bn1", "stem_pool", "blocks", "ds", "fc")
        refuse_unknown(resnet, known, f"a {type(resnet).__name__}")
        self.num_blocks, self.dtype = resnet.num_blocks, dtype
        self.row_multiple = resnet.row_multiple
        self.wide = torch.promote_types(dtype, torch.float32)  # of pooling and everything after
        self.conv1 = Conv(resnet.conv1, resnet.bn1, dtype)
        self.pool = resnet.stem_pool
        self.blocks = [Block(branch, shortcut, dtype) for branch, shortcut in resnet.units()]
        self.fc = None
        if resnet.fc is not None:
            self.fc = linear(resnet.fc, self.wide)

    @torch.inference_mode()
    def forward(self, x: Tensor, policy: Tensor | None = None) -> Tensor:
        """As `ResNet.forward`; policy None, (B, K) or (P, B, K)."""
        size = CPU_CHUNK if x.device.type == "cpu" else len(x)
        if policy is None:
            return torch.cat([self.head(self.full(self.stem(part))) for part in x.split(size)])
        parts = zip(x.split(size), policy.split(size, dim=-2), strict=True)
        return torch.cat([self.chunk(part, rows) for part, rows in parts], dim=-2)

    def chunk(self, x: Tensor, policy: Tensor) -> Tensor:
        x = self.stem(x)
        start, counts = 0, execution.kept_counts(policy)
        if policy.ndim == 3:
            start = execution.shared_prefix(counts, policy[..., 0].numel())
            for block in self.blocks[:start]:
                x = block.full(x)
            x = torch.cat([x] * len(policy))
        if len(x) == 1:
            x = self.alone(x, counts[start:], self.blocks[start:])
        else:
            x = self.together(x, policy[..., start:].flatten(0, -2), counts[start:])
        return self.head(x).unflatten(0, policy.shape[:-1])

    @staticmethod
    def alone(x: Tensor, kept: list[int], blocks: list[Block]) -> Tensor:
        """Blocks on a single image, whose rows need no gathering; kept: 0 or 1 a block."""
        for block, keep in zip(blocks, kept, strict=True):
            if keep:
                x = block.full(x)
            elif not block.is_identity:
                x = block.shortcut(x)
        return x

    def together(self, x: Tensor, policy: Tensor, counts: list[int]) -> Tensor:
        """The last k blocks on a batch, by their part of its policies (B, k), kept by so many."""
        # on a GPU a look at the policies is a wait, and padded rows lie together only by chance
        looks = policy.device.type == "cpu" and self.row_multiple == 1
        order = execution.nested_order(policy) if looks else None
        if order is not None:
            x, policy = execution.take(x, order), policy[order]
        rows = execution.kept_rows(policy, counts, self.row_multiple)
        if looks:
            spans = execution.spans(policy, counts)
            rows = [some if span is None else span for some, span in zip(rows, spans, strict=True)]
        batch = Batch(x)
        for block, some in zip(self.blocks[self.num_blocks - len(rows) :], rows, strict=True):
            batch = block.sparse(batch, some)
        return batch.images if order is None else execution.take(batch.images, order.argsort())

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


class DeployedPolicy(nn.Module):
    """A policy network's inference-only twin; see `deploy`."""

    def __init__(self, policy_net: PolicyNet, dtype: torch.dtype):
        super().__init__()
        refuse_unknown(policy_net, ("shrink", "features", "logit", "vnet"), "a policy network")
        self.num_blocks = policy_net.num_blocks
        self.shrink = policy_net.shrink
        self.features = DeployedResNet(policy_net.features, dtype)
        self.logit = linear(policy_net.logit, self.features.wide)
        self.vnet = linear(policy_net.vnet, self.features.wide)

    @torch.inference_mode()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `PolicyNet.forward`."""
        x = self.features(self.shrink(x))
        with torch.autocast(x.device.type, enabled=False):
            return torch.sigmoid(F.linear(x, *self.logit)), F.linear(x, *self.vnet)


class DeployedPolicyAtPenalty(nn.Module):
    """The inference-only twin of a `PolicyAtPenalty`; its penalty may be set anew as well."""

    def __init__(self, policy: PolicyAtPenalty, dtype: torch.dtype):
        super().__init__()
        self.num_blocks, self.penalty = policy.num_blocks, policy.penalty
        self.shrink = policy.shrink
        self.features = DeployedResNet(policy.features, dtype)
        self.correctness = deepcopy(policy.correctness).to(self.features.wide)

    @torch.inference_mode()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `PolicyAtPenalty.forward`."""
        x = self.features(self.shrink(x))
        with torch.autocast(x.device.type, enabled=False):
            return choose(self.correctness(x), self)


class DeployedGate:
    """A gate's inference-only twin: (B, C, H, W) to (B,) bool."""

    def __init__(self, gate: Gate, dtype: torch.dtype):
        refuse_unknown(gate, ("fc1", "fc1bn", "fc2"), "a gate")
        gate = deepcopy(gate).eval()
        self.wide = torch.promote_types(dtype, torch.float32)
        self.hidden = linear(fuse_linear_bn_eval(gate.fc1, gate.fc1bn), self.wide)
        weight, bias = linear(gate.fc2, self.wide)
        self.weight, self.bias = weight[OPEN] - weight[CLOSED], bias[OPEN] - bias[CLOSED]

    def __call__(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            hidden = F.linear(x.mean((2, 3), dtype=self.wide), *self.hidden).relu_()
            return torch.mv(hidden, self.weight) > -self.bias


class DeployedGatedResNet(nn.Module):
    """A ConvNet-AIG's inference-only twin, its gates deterministic; see `deploy`."""

    def __init__(self, net: GatedResNet, dtype: torch.dtype):
        super().__init__()
        refuse_unknown(net, ("resnet", "gates"), "a GatedResNet")
        self.num_blocks = net.num_blocks
        self.resnet = DeployedResNet(net.resnet, dtype)
        self.gates = [
            None if k in net.always_on else DeployedGate(gate, dtype)
            for k, gate in enumerate(net.gates)
        ]

    @torch.inference_mode()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `GatedResNet.forward` in evaluation mode; returns logits and gates (B, K)."""
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
                run = block.full if keep else partial(block.passed, rectify=True)
                batch = Batch(run(batch.images))
            else:
                rows = execution.open_rows(keep, self.resnet.row_multiple)
                batch = block.sparse(batch, rows, rectify=True)
            executed.append(keep)
        return self.resnet.head(batch.images), torch.stack(executed, 1).float()
