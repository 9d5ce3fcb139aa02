"""Everything around the method: data, checkpoints, devices, logs and shared options."""

from . import checkpoint, data, device, optim, options, schedule
from .errors import UserError, about, named, run_script
from .loop import evaluate
from .run import Run

__all__ = [
    "Run",
    "UserError",
    "about",
    "checkpoint",
    "data",
    "device",
    "evaluate",
    "named",
    "optim",
    "options",
    "run_script",
    "schedule",
]
