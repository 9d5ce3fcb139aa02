"""Everything around the method: data, checkpoints, devices, logs and shared options."""

from . import checkpoint, data, device, options
from .errors import UserError, about, run_script
from .loop import evaluate, set_lr, train_epoch
from .run import Run, place, stage_of

__all__ = [
    "Run",
    "UserError",
    "about",
    "checkpoint",
    "data",
    "device",
    "evaluate",
    "options",
    "place",
    "run_script",
    "set_lr",
    "stage_of",
    "train_epoch",
]
