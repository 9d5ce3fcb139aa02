"""The policies that a policy network may choose among after a warm start, found on its ResNet."""

import torch
from torch import Tensor
from torch.nn import functional as F

import utils

from . import ranks
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
    batches = first_batches(loader)

    def loss(policy: Tensor) -> float:
        error = torch.zeros((), dtype=torch.float64, device=batches[0][0].device)
        for images, labels in batches:
            with autocast(images.device, precision):
                logits = resnet(images, policy.to(images).expand(len(images), -1))
            error += F.cross_entropy(logits.double(), labels, reduction="sum")
        return ranks.total(error).item()

    return utils.candidate_policies(stages, loss)


def first_batches(loader: Loader) -> list[tuple[Tensor, Tensor]]:
    """This rank's part of the first images of an epoch that no training has, and their labels."""
    batches, missing = [], IMAGES // ranks.world()
    for images, labels, _ in loader.epoch(0):
        batches.append((images[:missing], labels[:missing]))
        missing -= len(images)
        if missing <= 0:
            break
    return batches
