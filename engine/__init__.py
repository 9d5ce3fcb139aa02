"""Everything around the method: data, checkpoints, devices, logs and shared options."""

from . import checkpoint, data, device, optim, options, published, ranks, schedule
from .errors import UserError, about, named
from .loop import evaluate
from .part import Part
from .run import Run
from .script import run_script

__all__ = [
    "Part",
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
    "published",
    "ranks",
    "run_script",
    "schedule",
]
