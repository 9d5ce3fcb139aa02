"""ResNets that run, for each image, only the residual blocks that its policy keeps."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import execution


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Residual branch F of two 3x3 convolutions; the caller adds the shortcut and the relu."""

    expansion = 1
    gives_away = True  # its output, which the caller may write over; a subclass has to say it anew

    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.bn2(self.conv2(x))


class Bottleneck(nn.Module):
    """Residual branch F of 1x1, 3x3, 1x1 convolutions, the stride on the 3x3 as in torchvision."""

    expansion = 4
    gives_away = True

    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return self.bn3(self.conv3(x))


class PoolAndPad(nn.Module):
    """Parameter-free shortcut: 2x2 average pooling, then zero channels up to `out_channels`.

    Raises ValueError for an odd height or width, which a convolution of stride 2 would round up.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.extra_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] % 2 or x.shape[-1] % 2:
            size = "x".join(map(str, x.shape[-2:]))
            raise ValueError(
                f"{size} cannot be halved: images need sides that are multiples of 4, "
                "or of 8 where a policy network looks at half of them"
            )
        return F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, self.extra_channels))


class SubsampleAndPad(nn.Module):
    """Another one: every second pixel, then zero channels before and behind, as the CIFAR ResNets
    of akamaster/pytorch_resnet_cifar10 have it.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        extra = out_channels - in_channels
        self.before, self.behind = extra // 2, extra - extra // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.behind))


EXECUTIONS = ("sparse", "masked")
FREE_SHORTCUTS = {"pool": PoolAndPad, "subsample": SubsampleAndPad}  # those without parameters


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Shortcut of a 1x1 convolution with BatchNorm; the identity where the shape stays."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class ResNet(nn.Module):
    """What all ResNets here share: stages of blocks, run under a policy (paper, section 3.1).

    With u the policy and F_k the k-th residual branch, y_{k+1} = relu(shortcut(y_k) + F_k(y_k))
    where u_k = 1, and shortcut(y_k) where u_k = 0. With `num_classes` None there is no `fc` and
    the output is the pooled features, (B, `num_features`).
    """

    decides = False  # by itself which blocks an image runs
    _execution = "sparse"  # also of one that was pickled before this had its name
    shortcuts: str | None = None  # which of FREE_SHORTCUTS, where it has such

    def __init__(
        self, block: type, stages: Sequence[int], widths: Sequence[int], stem_channels: int
    ):
        super().__init__()
        self.stages = tuple(stages)
        self.num_blocks = sum(stages)
        self.num_features = widths[-1] * block.expansion
        self.execution = "sparse"
        self.row_multiple = 1  # in evaluation; what it is for: `execution.padded`
        self.blocks = nn.ModuleList()
        self.ds = nn.ModuleList()
        in_channels = stem_channels
        for stage, (depth, width) in enumerate(zip(stages, widths, strict=True)):
            stride = 1 if stage == 0 else 2
            self.ds.append(self.shortcut(in_channels, width * block.expansion, stride))
            branches = [block(in_channels, width, stride)]
            in_channels = width * block.expansion
            branches += [block(in_channels, width) for _ in range(depth - 1)]
            self.blocks.append(nn.ModuleList(branches))

    def finish(self, num_classes: int | None) -> None:
        """Append the classifier and initialise the convolutions: normal, He et al. by fan-out."""
        self.fc = None if num_classes is None else nn.Linear(self.num_features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def execution(self) -> str:
        """How a policy is executed, one of EXECUTIONS; see `execution`."""
        return self._execution

    @execution.setter
    def execution(self, name: str) -> None:
        if name not in EXECUTIONS:
            raise ValueError(f"execution {name!r}: only {' and '.join(EXECUTIONS)} are known")
        self._execution = name

    def units(self) -> list[tuple[nn.Module, nn.Module]]:
        """All K blocks in order, as (residual branch, shortcut)."""
        identity = nn.Identity()
        return [
            (branch, ds if b == 0 else identity)
            for branches, ds in zip(self.blocks, self.ds, strict=True)
            for b, branch in enumerate(branches)
        ]

    def forward(self, x: Tensor, policy: Tensor | None = None) -> Tensor:
        """Class scores of a batch, each image running exactly the blocks its policy keeps.

        x: (B, 3, H, W). policy: (B, K) of 0/1 in any dtype, or (P, B, K) for P policies an image;
        None keeps every block. Returns (B, classes) or (P, B, classes). Raises ValueError when the
        policy has another shape.
        """
        units = self.units()
        if policy is None:
            return self.head(execution.full(units, self.stem(x)))
        execution.check(policy, len(x), self.num_blocks)
        x = self.stem(x)
        if policy.ndim == 2:
            return self.head(self.run(units, x, policy))
        counts = execution.kept_counts(policy)  # what every policy keeps is computed once
        start = execution.shared_prefix(counts, policy[..., 0].numel())
        x = torch.cat([execution.full(units[:start], x)] * len(policy))
        x = self.run(units[start:], x, policy[..., start:].flatten(0, -2), counts[start:])
        return self.head(x).unflatten(0, policy.shape[:-1])

    def run(
        self,
        units: list[tuple[nn.Module, nn.Module]],
        x: Tensor,
        policy: Tensor,
        counts: list[int] | None = None,
    ) -> Tensor:
        """Some units in the form that `execution` names; policy (B, K), for as many units."""
        if self.execution == "masked":
            return execution.masked(units, x, policy, counts)
        rows = execution.kept_rows(policy, counts, self.multiple())
        return execution.sparse(units, x, rows)

    def multiple(self) -> int:
        """`row_multiple` where it changes nothing: twice the same row would count twice in
        BatchNorm's statistics, and in gradients.
        """
        return 1 if self.training or torch.is_grad_enabled() else self.row_multiple

    def stem(self, x: Tensor) -> Tensor:
        return self.stem_pool(F.relu(self.bn1(self.conv1(x)), inplace=True))

    def head(self, x: Tensor) -> Tensor:
        """Pooled features, or logits: float32 under autocast too, or near ones would be equal."""
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        if self.fc is None:
            return x
        wide = torch.promote_types(x.dtype, torch.float32)
        dtype = next((weight.dtype for weight in self.fc.parameters()), wide)
        with torch.autocast(x.device.type, enabled=False):
            return self.fc(x.to(dtype))


class CifarResNet(ResNet):
    """ResNet-(6n+2) for 32x32 images: n BasicBlocks a stage, 16/32/64 channels (He et al. 2016)."""

    widths = (16, 32, 64)
    shortcuts = "pool"

    def __init__(self, stages: Sequence[int], num_classes: int | None):
        super().__init__(BasicBlock, stages, self.widths, stem_channels=16)
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.stem_pool = nn.Identity()
        self.finish(num_classes)

    @staticmethod
    def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
        return nn.Identity() if stride == 1 else PoolAndPad(in_channels, out_channels)

    def take_shortcuts(self, kind: str) -> None:
        """Change shape by these of FREE_SHORTCUTS; weights and their names stay the same.

        Raises ValueError for another kind.
        """
        if kind not in FREE_SHORTCUTS:
            raise ValueError(f"shortcuts {kind!r}: only {' and '.join(FREE_SHORTCUTS)} are known")
        if self.shortcuts is not None:
            self.shortcuts = kind
            for stage, (before, after) in enumerate(pairwise(self.widths), 1):
                self.ds[stage] = FREE_SHORTCUTS[kind](before, after)


class ProjectedCifarResNet(CifarResNet):
    """The same with convolutions in the shape-changing shortcuts, as ConvNet-AIG has it."""

    shortcuts = None
    shortcut = staticmethod(projection)


class ImageNetResNet(ResNet):
    """ResNet for 224x224 images, layer for layer torchvision's, so that its weights fit."""

    def __init__(self, block: type, stages: Sequence[int], num_classes: int | None):
        super().__init__(block, stages, (64, 128, 256, 512), stem_channels=64)
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.stem_pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.finish(num_classes)

    shortcut = staticmethod(projection)
