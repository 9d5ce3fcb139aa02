"""Whether a run may go on from a checkpoint: of the same stage, under the same options."""

import argparse
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

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
    *("load", "cv_dir", "data_dir", "base", "pretrained", "policy_init"),
    "policy_size",  # the checkpoint's network has one
    *("max_epochs", "test_every", "save_minutes", "resume", "skip_data_check"),
    *("device", "parallel", "workers", "micro_batch", "precision", "deterministic"),
}

TOLD_OPTIONS = {"precision", "micro_batch"}  # those of them that change what is learned

# options that there are no more, and how they stood where they were not used
REMOVED_OPTIONS = {
    "block_drop": 0.0,
    "freeze_policy": False,
    "recalibrate": False,
    "alpha_end": None,
}


def stage_of(content: Mapping[str, Any]) -> int:
    """Which stage wrote a checkpoint; the released code's are told by what they hold."""
    if "stage" in content:
        return content["stage"]
    if "state_dict" in content:
        return 0
    return 2 if "resnet" in content else 1


def check_stage(loaded: Mapping[str, Any], stage: int, path: str) -> None:
    """Refuse the checkpoint of another stage."""
    other = stage_of(loaded)
    if other != stage:
        raise UserError(f"{path}: {STAGES[other]} cannot be continued here: {HINTS[other]}")


def check_place(loaded: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Refuse, inside an epoch, other batches than those that were done."""
    before, now = loaded.get("args", {}), vars(args)
    for name in ("batch_size", "subset", "val_split", "seed"):
        if loaded.get("steps_done") and before.get(name, now[name]) != now[name]:
            raise UserError(
                f"{args.load} is inside an epoch of --{name} {before[name]}: go on with that, or "
                "change it from an epoch's end, a ckpt_*.t7"
            )


def changes(loaded: Mapping[str, Any], args: argparse.Namespace) -> list[tuple[str, Any, Any]]:
    """Options of the loaded run that differ now: name, before, now."""
    free = FREE_OPTIONS | ({"policy"} if vars(args).get("policy") is None else set())  # as before
    return differences(loaded, args, vars(args).keys() - free)


def told_changes(loaded: Mapping[str, Any], args: argparse.Namespace) -> list[tuple[str, Any, Any]]:
    """Those of the options that may be others which change what is learned: name, before, now."""
    return differences(loaded, args, TOLD_OPTIONS)


def differences(
    loaded: Mapping[str, Any], args: argparse.Namespace, names: Set[str]
) -> list[tuple[str, Any, Any]]:
    """Options of these names that the loaded run had otherwise: name, before, now."""
    before, now = loaded.get("args", {}), vars(args)
    names = sorted(names & before.keys() & now.keys())
    return [(n, before[n], now[n]) for n in names if before[n] != now[n]]


def check_options(loaded: Mapping[str, Any], args: argparse.Namespace, cv_dir: Path) -> None:
    """Refuse other options than those that the run in this directory began with."""
    for name, unused in REMOVED_OPTIONS.items():
        if loaded.get("args", {}).get(name, unused) != unused:
            raise UserError(
                f"{cv_dir} was begun with --{name}, which there is no more: go on without it in a "
                "new --cv_dir with --load"
            )
    for name, before, now in changes(loaded, args):
        raise UserError(
            f"{cv_dir} was begun with --{name} {before}, not {now}: go on with that, or change it "
            "in a new --cv_dir with --load"
        )
