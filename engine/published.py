"""Weights that torchvision publishes, fetched and checked by its own mechanism."""

import torch

from .errors import UserError


def resnet(depth: int, way_out: str) -> dict[str, torch.Tensor]:
    """ResNet weights IMAGENET1K_V1, from torch's cache or downloaded into it.

    Raises UserError, ending in `way_out`, where they cannot be had.
    """
    from torchvision.models import get_model_weights  # slow to import, and CIFAR does without

    weights = get_model_weights(f"resnet{depth}").IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"torchvision's ResNet-{depth} weights cannot be fetched ({reason}): {way_out}"
        ) from error
