"""Optimizers that several stages share."""

from torch import nn, optim


def sgd(network: nn.Module, lr: float, wd: float) -> optim.SGD:
    """SGD with Nesterov momentum; weight decay on convolution and linear weights only."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    plain = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": wd}, {"params": plain, "weight_decay": 0.0}]
    return optim.SGD(groups, lr, momentum=0.9, nesterov=True)


def scale_lr(optimizer: optim.Optimizer, factor: float) -> None:
    """Set learning rates to a multiple of those that the optimizer was made with.

    A group that is to have a rate of its own says so in `initial_lr`.
    """
    for group in optimizer.param_groups:
        group["lr"] = factor * group.get("initial_lr", optimizer.defaults["lr"])
