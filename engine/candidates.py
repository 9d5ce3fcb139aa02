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
    images, labels = first_images(loader)

    def loss(policy: Tensor) -> float:
        error = torch.zeros((), dtype=torch.float64, device=images.device)
        for rows in torch.arange(len(labels), device=labels.device).split(loader.batch_size):
            x, y = images[rows], labels[rows]
            with autocast(x.device, precision):
                logits = resnet(x, policy.to(x).expand(len(x), -1))
            error += F.cross_entropy(logits.double(), y, reduction="sum")
        return ranks.total(error).item()

    return utils.candidate_policies(stages, loss)


def first_images(loader: Loader) -> tuple[Tensor, Tensor]:
    """This rank's part of the first images of an epoch that no training has."""
    batches, wanted, found = [], IMAGES // ranks.world(), 0
    for images, labels, _ in loader.epoch(0):
        batches.append((images, labels))
        found += len(images)
        if found >= wanted:
            break
    images, labels = (torch.cat(parts)[:wanted] for parts in zip(*batches, strict=True))
    return images, labels
