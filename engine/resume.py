"""What a run goes on from: which checkpoint, and whether it may, under which options."""

import argparse
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import Checkpoint, Config

from . import bases, storage
from .process import UserError

STAGES = {
    0: "a pretrained ResNet",
    1: "a stage-1 checkpoint",
    2: "a stage-2 checkpoint",
    3: "a ConvNet-AIG checkpoint",
}
HINTS = {
    0: "give it to the stages with --base",
    1: "start stage 2 from it with finetune.py --pretrained",
    2: "go on from it with finetune.py",
    3: "go on from it with aig_training.py",
}

# options that may be others when a run is gone on with
FREE_OPTIONS = {
    *("load", "cv_dir", "data_dir", "base", "base_pixels", "pretrained", "policy_init"),
    "policy_size",  # the checkpoint's network has one
    *("max_epochs", "test_every", "save_minutes", "resume", "skip_data_check"),
    *("device", "parallel", "workers", "micro_batch", "precision", "deterministic"),
}

# those of them that change what is learned; under a cosine --max_epochs does, too
TOLD_OPTIONS = {"precision", "micro_batch"}

# options that there are no more, and how they stood where they were not used
REMOVED_OPTIONS = {
    "block_drop": 0.0,
    "freeze_policy": False,
    "recalibrate": False,
    "alpha_end": None,
}


@dataclass(frozen=True)
class Plan:
    """What a run goes on from, and where it writes.

    cv_dir: where it writes. load: the checkpoint that it goes on from, if any, `loaded` its
    content, `source` its directory. notes: what the user is to be told.
    """

    cv_dir: Path
    load: str | None = None
    source: Path | None = None
    loaded: Checkpoint = Checkpoint()
    notes: tuple[str, ...] = ()

    def progress(self) -> tuple[int, int, dict[str, Any]]:
        """Epochs done, steps of the next one, and what these steps gave."""
        return self.loaded.epoch, self.loaded.steps_done, dict(self.loaded.partial)

    def extras(self) -> dict[str, Any]:
        """What goes along into the run's own checkpoints."""
        return {"base": self.loaded.base} if self.loaded.base else {}


def plan(
    args: argparse.Namespace,
    stage: int,
    config: Config,
    cv_dir: str | Path,
    was_restarted: bool = False,
) -> Plan:
    """What the options say: begin, go on in the same directory, or go on in another one.

    cv_dir: where a run writes that names no place. was_restarted: torchrun has started this process
    anew, so that it goes on as with --resume. Writes nothing. Raises UserError where the run may
    not go on so, or its directory holds another one.
    """
    load = args.load
    source = load and Path(load)
    source = source.parent if source and not source.is_dir() else source
    target = Path(args.cv_dir or source or cv_dir)
    holds_run = (target / storage.LAST).exists()
    if (args.resume or was_restarted) and holds_run:
        load, source = str(target), target
    is_new = not source or target.resolve() != source.resolve()
    loaded = bases.read_for(config, load) if load else Checkpoint()
    if load:
        if loaded.stage != stage:
            other = loaded.stage
            raise UserError(f"{load}: {STAGES[other]} cannot be continued here: {HINTS[other]}")
        check_place(loaded, args, load)
    finished = loaded.epoch >= args.max_epochs  # such a run is only told of
    if not is_new and not finished:
        check_options(loaded, args, target)
    if is_new and holds_run:
        raise UserError(
            f"{target} already holds a run: go on with --load {target}, or choose another --cv_dir"
        )
    if is_new and any(target.glob("ckpt_*.t7")):  # as what is shipped, without optimizer states
        raise UserError(
            f"{target} holds checkpoints and no {storage.LAST}: go on with --load {target}, or one "
            "of them, or choose another --cv_dir"
        )
    told = changes(loaded, args) if is_new else []
    told += [] if finished else told_changes(loaded, args)
    notes = tuple(f"--{name} {now} (was {before})" for name, before, now in told)
    return Plan(target, load, source or None, loaded, notes)


def check_place(loaded: Checkpoint, args: argparse.Namespace, path: str) -> None:
    """Refuse, inside an epoch, other batches than those that were done."""
    before, now = loaded.args, vars(args)
    for name in ("batch_size", "subset", "val_split", "seed"):
        if loaded.steps_done and before.get(name, now[name]) != now[name]:
            raise UserError(
                f"{path} is inside an epoch of --{name} {before[name]}: go on with that, or "
                "change it from an epoch's end, a ckpt_*.t7"
            )


def changes(loaded: Checkpoint, args: argparse.Namespace) -> list[tuple[str, Any, Any]]:
    """Options of the loaded run that differ now: name, before, now."""
    free = FREE_OPTIONS | ({"policy"} if vars(args).get("policy") is None else set())  # as before
    return differences(loaded, args, vars(args).keys() - free)


def told_changes(loaded: Checkpoint, args: argparse.Namespace) -> list[tuple[str, Any, Any]]:
    """Those of the options that may be others which change what is learned: name, before, now."""
    moved = {"max_epochs"} if getattr(args, "schedule", None) == "cosine" else set()
    return differences(loaded, args, TOLD_OPTIONS | moved)


def differences(
    loaded: Checkpoint, args: argparse.Namespace, names: Set[str]
) -> list[tuple[str, Any, Any]]:
    """Options of these names that the loaded run had otherwise: name, before, now."""
    before, now = loaded.args, vars(args)
    names = sorted(names & before.keys() & now.keys())
    return [(n, before[n], now[n]) for n in names if before[n] != now[n]]


def check_options(loaded: Checkpoint, args: argparse.Namespace, cv_dir: Path) -> None:
    """Refuse other options than those that the run in this directory began with."""
    for name, unused in REMOVED_OPTIONS.items():
        if loaded.args.get(name, unused) != unused:
            raise UserError(
                f"{cv_dir} was begun with --{name}, which there is no more: go on without it in a "
                "new --cv_dir with --load"
            )
    for name, before, now in changes(loaded, args):
        raise UserError(
            f"{cv_dir} was begun with --{name} {before}, not {now}: go on with that, or change it "
            "in a new --cv_dir with --load"
        )
