"""Optimizers, and settings that change from epoch to epoch as functions of the epoch alone."""

import argparse
import math

from torch import nn, optim


def cosine(progress: float, warmup: float = 0.0) -> float:
    """Learning-rate factor at `progress` in [0, 1]: up to 1 in a line, then a cosine to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def lr_factor(args: argparse.Namespace, epochs_done: float) -> float:
    """Factor of the learning rate under `--schedule`, after so many epochs and parts of one.

    A cosine rises over the first `warmup` of all epochs; steps fall by `lr_decay_ratio` after the
    epochs of `lr_steps` or, without these, every `epoch_step` after a warm start.
    """
    if args.schedule == "cosine":
        return cosine(epochs_done / args.max_epochs, args.warmup)
    if args.lr_steps:
        return args.lr_decay_ratio ** sum(epochs_done > step for step in args.lr_steps)
    after = max(0, epochs_done - getattr(args, "warm_start", 0))
    return args.lr_decay_ratio ** (after // args.epoch_step)


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
