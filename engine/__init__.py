"""Everything around the method: data, checkpoints, devices, logs and shared options."""

from . import checkpoint, data, device, options
from .errors import UserError, about, named, run_script
from .loop import evaluate, set_lr
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
    "options",
    "run_script",
    "set_lr",
]
