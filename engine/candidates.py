"""The policies that a policy network may choose among after a warm start, found on its ResNet."""

import torch
from torch import Tensor
from torch.nn import functional as F

import utils

from . import loop, ranks
from .data import Loader
from .device import autocast
from .loop import Network

IMAGES = 1000  # that a policy's loss is a mean of


@torch.no_grad()
def find(resnet: Network, loader: Loader, stages: tuple[int, ...], precision: str) -> Tensor:
    """Nested policies (C, K) of small cross-entropy on training images, the same on every rank.

    Cross-entropy, since what is right or wrong of images that the ResNet knows by heart says too
    little; see `utils.candidate_policies`.
    """
    batches = loop.first_batches(loader, IMAGES)

    def loss(policy: Tensor) -> float:
        error = torch.zeros((), dtype=torch.float64)  # a rank may have none of the first images
        for images, labels in batches:
            with autocast(images.device, precision):
                logits = resnet(images, policy.to(images).expand(len(images), -1))
            error += F.cross_entropy(logits.double(), labels, reduction="sum").cpu()
        return ranks.total(error).item()

    return utils.candidate_policies(stages, loss)
