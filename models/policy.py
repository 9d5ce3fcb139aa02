"""Policy networks, and the policies that they and others decide.

A policy network gives a keep-probability for every residual block, by which it learns. A policy
module is called with images (B, 3, H, W) and returns policies (B, K) of 0 (drop) and 1 (keep).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import utils

from .resnet import BasicBlock, CifarResNet, ImageNetResNet, ResNet

POLICY_SIZES = (32, 16)  # pixels; 8 are measurably too few
SURELY_NOT = -12.0  # a log-probability; how much smaller another one is tells nothing


class PolicyNet(nn.Module):
    """Small ResNet with a head of K keep-probabilities (paper, section 3.2).

    `vnet` is a value head that no loss uses; it stays so that released checkpoints load. `size` is
    that of the images it looks at, where there is a choice.
    """

    size: int | None = None

    def __init__(self, features: ResNet, num_blocks: int, shrink: nn.Module):
        super().__init__()
        self.shrink = shrink
        self.features = features
        self.num_blocks = num_blocks
        self.logit = nn.Linear(features.num_features, num_blocks)
        self.vnet = nn.Linear(features.num_features, 1).requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, 3, H, W). Returns probs (B, K) in (0, 1), float32 or wider, and value (B, 1)."""
        return self.heads(self.look(x))

    def look(self, x: Tensor) -> Tensor:
        """Pooled features (B, num_features) of images (B, 3, H, W)."""
        return self.features(self.shrink(x))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and value from pooled features (B, num_features)."""
        # under bfloat16 autocast a probability near 1 would round to 1 and its gradient to 0
        logits = self.logit(x)
        probs = torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        return probs, self.vnet(x)


class CifarPolicy(PolicyNet):
    """ResNet-8 on the 32x32 image or, for a quarter of the cost, on that averaged to 16x16."""

    def __init__(self, num_blocks: int):
        super().__init__(CifarResNet((1, 1, 1), None), num_blocks, nn.Identity())
        self.size = 32

    def look_at(self, size: int) -> None:
        """Look at images of this size, 32 or 16; weights and their names stay the same."""
        if size not in POLICY_SIZES:
            raise ValueError(f"a policy network looks at 32 or 16 pixels, not {size}")
        self.size = size
        self.shrink = nn.Identity() if size == 32 else nn.AvgPool2d(2)


class Halve(nn.Module):
    """2x2 average pooling, 224 -> 112; smaller pictures stay, or too little would be left."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if min(x.shape[-2:]) > 112 else x


class ImageNetPolicy(PolicyNet):
    """ResNet-10 on the image average-pooled 2x2, 224 -> 112."""

    def __init__(self, num_blocks: int):
        features = ImageNetResNet(BasicBlock, (1, 1, 1, 1), None)
        super().__init__(features, num_blocks, Halve())


class Confidence(nn.Module):
    """A head that predicts under which of C policies the ResNet will be right.

    It does so from how sure the policy network itself is of the class, which `classes` tells: from
    the largest log-probabilities, sorted, and from nothing else. Confidence is a measure of
    difficulty that labels alone can teach, on images that the ResNet may know by heart.

    candidates: (C, K). Called with pooled features (B, num_features) it returns logits (B, C).
    """

    def __init__(self, num_features: int, num_classes: int, candidates: Tensor):
        super().__init__()
        self.register_buffer("candidates", candidates)
        self.classes = nn.Linear(num_features, num_classes)
        self.largest = min(num_classes, 10)
        self.hidden = nn.Linear(self.largest, 32)
        self.linear = nn.Linear(32, len(candidates))

    def forward(self, features: Tensor) -> Tensor:
        return self.of_classes(self.classes(features))

    def of_classes(self, logits: Tensor) -> Tensor:
        """The same from logits of the classes, (B, num_classes)."""
        sure = logits.log_softmax(-1).topk(self.largest).values.clamp_min(SURELY_NOT)
        return self.linear(self.hidden(sure).relu())


class WithConfidence(nn.Module):
    """A policy network and a `Confidence` head that look at the image together.

    Called with images it returns probabilities (B, K), the head's logits (B, C) and those of the
    classes. The head's loss does not reach the classes, which learn from labels.
    """

    def __init__(self, policy_net: PolicyNet, confidence: Confidence):
        super().__init__()
        self.policy_net, self.confidence = policy_net, confidence

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.policy_net.look(x)
        classes = self.confidence.classes(features)
        right = self.confidence.of_classes(classes.detach())
        return self.policy_net.heads(features)[0], right, classes


class GreedyPolicy(nn.Module):
    """The policy network's most probable policy: images (B, 3, H, W) to (B, K) of 0 and 1."""

    def __init__(self, policy_net: nn.Module):
        super().__init__()
        self.policy_net = policy_net

    def forward(self, x: Tensor) -> Tensor:
        return utils.greedy(self.policy_net(x)[0])


class StaticPolicy(nn.Module):
    """One policy (K,) for every image: images (B, 3, H, W) to (B, K)."""

    def __init__(self, policy: Tensor):
        super().__init__()
        self.register_buffer("policy", policy)

    def forward(self, x: Tensor) -> Tensor:
        return self.policy.expand(len(x), -1)


class PenaltyPolicy(nn.Module):
    """The candidate of largest expected reward (Eq. 3), for a penalty given when it is used.

    Called with images (B, 3, H, W) it returns (B, K) of 0 and 1. `penalty` may be set anew at any
    time.
    """

    def __init__(self, policy_net: nn.Module, confidence: Confidence, penalty: float):
        super().__init__()
        self.policy_net, self.confidence, self.penalty = policy_net, confidence, penalty

    def forward(self, x: Tensor) -> Tensor:
        return self.choose(self.policy_net.look(x))

    def choose(self, features: Tensor) -> Tensor:
        """The same from pooled features (B, num_features)."""
        right = self.confidence(features)
        right = torch.sigmoid(right.to(torch.promote_types(right.dtype, torch.float32)))
        candidates = self.confidence.candidates
        return candidates[utils.expected_reward(right, candidates, self.penalty).argmax(1)]


def predict(resnet: nn.Module, policy: nn.Module | None, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, classes) of images (B, 3, H, W), and the policies (B, K) that they ran under.

    A ResNet that decides by itself takes no policy: None.
    """
    if resnet.decides:
        return resnet(images)
    chosen = policy(images)
    return resnet(images, chosen), chosen
