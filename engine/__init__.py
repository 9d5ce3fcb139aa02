"""Everything around the method: data, checkpoints, devices, logs and shared options."""

from . import (
    bases,
    candidates,
    data,
    dependence,
    device,
    npm,
    options,
    ranks,
    schedule,
    storage,
)
from .loop import Results, evaluate
from .process import UserError, run_script, user_errors
from .run import Run
from .shard import Shard, seed_everything
from .trained import TrainedModel

__all__ = [
    "Results",
    "Run",
    "Shard",
    "TrainedModel",
    "UserError",
    "bases",
    "candidates",
    "data",
    "dependence",
    "device",
    "evaluate",
    "npm",
    "options",
    "ranks",
    "run_script",
    "schedule",
    "seed_everything",
    "storage",
    "user_errors",
]
