"""Policy networks: one look at the image, one keep-probability for every residual block."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .resnet import BasicBlock, CifarResNet, ImageNetResNet, ResNet


class PolicyNet(nn.Module):
    """Small ResNet with a head of K keep-probabilities (paper, section 3.2).

    `vnet` is a value head that no loss uses; it stays so that released checkpoints load.
    """

    def __init__(self, features: ResNet, num_blocks: int, shrink: nn.Module):
        super().__init__()
        self.shrink = shrink
        self.features = features
        self.num_blocks = num_blocks
        self.logit = nn.Linear(features.num_features, num_blocks)
        self.vnet = nn.Linear(features.num_features, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, 3, H, W). Returns probs (B, K) in (0, 1), float32 or wider, and value (B, 1)."""
        x = self.features(self.shrink(x))
        # under bfloat16 autocast a probability near 1 would round to 1 and its gradient to 0
        logits = self.logit(x)
        probs = torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        return probs, self.vnet(x)


class CifarPolicy(PolicyNet):
    """ResNet-8 on the 32x32 image."""

    def __init__(self, num_blocks: int):
        super().__init__(CifarResNet((1, 1, 1), None), num_blocks, nn.Identity())


class Halve(nn.Module):
    """2x2 average pooling, 224 -> 112; smaller pictures stay, or too little would be left."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if min(x.shape[-2:]) > 112 else x


class ImageNetPolicy(PolicyNet):
    """ResNet-10 on the image average-pooled 2x2, 224 -> 112."""

    def __init__(self, num_blocks: int):
        features = ImageNetResNet(BasicBlock, (1, 1, 1, 1), None)
        super().__init__(features, num_blocks, Halve())
