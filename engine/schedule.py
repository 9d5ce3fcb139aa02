"""Settings that change from epoch to epoch, as functions of the epoch alone."""

import argparse
import math

MOVING = ("alpha", "beta", "penalty")  # each with an option <name>_end


def cosine(progress: float, warmup: float = 0.0) -> float:
    """Learning-rate factor at `progress` in [0, 1]: up to 1 in a line, then a cosine to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def lr_factor(args: argparse.Namespace, epoch: int) -> float:
    """Factor of the learning rate in an epoch (from 1) under `--schedule`."""
    if args.schedule == "cosine":
        return cosine((epoch - 1) / args.max_epochs)
    return args.lr_decay_ratio ** ((epoch - 1) // args.epoch_step)


def at(args: argparse.Namespace, epoch: int) -> argparse.Namespace:
    """The options as they hold in an epoch: those with an `_end` move there in a line."""
    progress = (epoch - 1) / max(args.max_epochs - 1, 1)
    now = argparse.Namespace(**vars(args))
    for name in MOVING:
        end = getattr(args, f"{name}_end", None)
        if end is not None:
            start = getattr(args, name)
            setattr(now, name, start + (end - start) * progress)
    return now
