"""A training run: its device, its directory of checkpoints and logs, and how it resumes."""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensorboardX import SummaryWriter
from torch import nn
from tqdm import tqdm

from . import checkpoint, device, loop
from .data import Loader
from .errors import UserError, about
from .spec import Spec
from .tally import Tally

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

# options that a resumed run may well be given anew
FREE_OPTIONS = {
    "load",
    "cv_dir",
    "data_dir",
    "policy",
    "max_epochs",
    "test_every",
    "base",
    "pretrained",
}


class Run:
    """One run of a stage script (0 pretrain, 1 curriculum, 2 finetune), used as a context.

    On entry nothing is written but the directory. What `track` is given goes into every checkpoint
    and comes back from the one that `--load` names. All random numbers of epoch t are drawn from
    generators seeded with (seed, t), so a resumed epoch is the epoch that was interrupted.
    """

    def __init__(
        self, args: argparse.Namespace, stage: int, spec: Spec, cv_dir: str | Path = "cv/tmp/"
    ):
        self.args, self.stage, self.spec = args, stage, spec
        self.device = device.pick()
        self.done = 0
        self.tracked: dict[str, Any] = {}
        self.loaded: dict[str, Any] = {}
        self.extras: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}
        self.writer: SummaryWriter | None = None
        if args.load:
            self.loaded = checkpoint.read_for(spec, args.load)
            self._check_stage()
            self.done = int(self.loaded.get("epoch", 0))
            self.extras = {n: self.loaded[n] for n in ("base",) if n in self.loaded}
            source = Path(args.load)
            cv_dir = source if source.is_dir() else source.parent
        self.cv_dir = Path(args.cv_dir or cv_dir)
        self._claim_directory(new=not args.load or self.cv_dir.resolve() != cv_dir.resolve())
        self._tell_changes()
        device.keep_freed_memory()
        device.seed_everything(args.seed, 0)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self.writer is None:
            return
        self.writer.close()
        if error is not None:
            last = self.cv_dir / checkpoint.LAST
            error.add_note(f"epoch {self.done} is kept; go on with --load {last}")

    def load_base(self, resnet: nn.Module, load: Callable) -> None:
        """Load the base ResNet by `load(resnet, tensors)`; checkpoints then say which it was."""
        checkpoint.load_base(self.spec, self.args.base, resnet, load)
        self.extras["base"] = checkpoint.fingerprint(resnet)
        if self.stage == stage_of(self.loaded):
            checkpoint.check_base(self.loaded, self.args.load, resnet)

    def place(self, *networks: nn.Module) -> None:
        for network in networks:
            device.place(network, self.device)

    def track(
        self, name: str, part: Any, load: Callable[[Any, Mapping], None] | None = None
    ) -> None:
        """Put a module or optimizer into the checkpoints under `name`, and restore it after --load.

        load(part, state) restores it where the plain `load_state_dict` would not do.
        """
        self.tracked[name] = part
        if not self.loaded:
            return
        with about(self.args.load):
            if isinstance(part, torch.optim.Optimizer):
                self._restore_optimizer(part, self.loaded.get(name))
            elif name == "agent":
                load(part, checkpoint.policy_weights(self.loaded, self.args.load))
            else:
                load(part, checkpoint.resnet_weights(self.loaded, self.args.load))

    def _restore_optimizer(self, optimizer: torch.optim.Optimizer, state: Any) -> None:
        """Moments come from the checkpoint, hyperparameters from the command line."""
        if state is None:  # the released code saves none
            self.note(f"{self.args.load} holds no optimizer state: it starts afresh")
            return
        own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, options in zip(optimizer.param_groups, own, strict=True):
            group.update(options)

    def _check_stage(self) -> None:
        stage = stage_of(self.loaded)
        if stage != self.stage:
            raise UserError(
                f"{self.args.load}: {STAGES[stage]} cannot be continued here: {HINTS[stage]}"
            )

    def note(self, text: str) -> None:
        """Tell the user something that the results do not show."""
        tqdm.write(text, file=sys.stderr)

    def _tell_changes(self) -> None:
        """Say which options differ from those that the run began with; the new ones hold."""
        before, now = self.loaded.get("args", {}), vars(self.args)
        for name in sorted(before.keys() & now.keys() - FREE_OPTIONS):
            if before[name] != now[name]:
                self.note(f"--{name} {now[name]} (was {before[name]})")

    def _claim_directory(self, new: bool) -> None:
        """Make sure that cv_dir can be written and, where a new one is meant, holds no run."""
        if new and self.cv_dir.joinpath(checkpoint.LAST).exists():
            raise UserError(
                f"{self.cv_dir} already holds a run: go on with --load {self.cv_dir}, "
                "or choose another --cv_dir"
            )
        with about(self.cv_dir):
            self.cv_dir.mkdir(parents=True, exist_ok=True)
            probe = self.cv_dir / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()

    def epochs(self) -> Iterator[int]:
        """The epochs still to run, counted from 1; after each, metrics and last.t7 are written."""
        if self.done >= self.args.max_epochs:
            tqdm.write(f"{self.args.load}: all {self.args.max_epochs} epochs are done")
            return
        self._open_logs()
        if not self.cv_dir.joinpath(checkpoint.LAST).exists():
            self.save(checkpoint.LAST)
        for epoch in range(self.done + 1, self.args.max_epochs + 1):
            device.seed_everything(self.args.seed, epoch)
            self.metrics = {"epoch": epoch}
            start = time.perf_counter()
            yield epoch
            self.metrics["seconds"] = round(time.perf_counter() - start, 3)
            with about(self.cv_dir), open(self.cv_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps(self.metrics) + "\n")
            self.done = epoch
            self.save(checkpoint.LAST)

    def train_epoch(
        self,
        step: loop.TrainStep,
        optimizers: Sequence[torch.optim.Optimizer],
        loader: Loader,
        **options,
    ) -> Tally:
        """This epoch of training; see `engine.loop.train_epoch`."""
        epoch, precision = self.metrics["epoch"], self.args.precision
        return loop.train_epoch(step, optimizers, loader, epoch, precision, **options)

    def evaluate(self, step: loop.TestStep, loader: Loader) -> Tally:
        """An evaluation; see `engine.loop.evaluate`."""
        return loop.evaluate(step, loader, self.args.precision)

    def recalibrate(
        self, forward: Callable[[torch.Tensor], object], network: nn.Module, loader: Loader
    ) -> None:
        """Statistics of this epoch's training images; see `engine.loop.recalibrate`."""
        loop.recalibrate(forward, network, loader, self.metrics["epoch"], self.args.precision)

    def tests(self, epoch: int) -> bool:
        """Whether this epoch ends with an evaluation: every so often, and always the last."""
        return epoch % self.args.test_every == 0 or epoch == self.args.max_epochs

    def log(self, line: str, split: str, **figures: float) -> None:
        """Print a line, and put figures into metrics.jsonl and TensorBoard as <split>_<name>."""
        if self.args.subset:
            line += f" | --subset {self.args.subset}"
        tqdm.write(line)
        sys.stdout.flush()
        for name, value in figures.items():
            self.metrics[f"{split}_{name}"] = value
            self.writer.add_scalar(f"{split}_{name}", value, self.metrics["epoch"])

    def log_policies(
        self,
        split: str,
        accuracy: float,
        reward: float,
        sparsity: float,
        variance: float,
        policy_set: set,
    ) -> None:
        """Log `utils.performance_stats` in the released code's format."""
        head = f"E: {self.metrics['epoch']} |" if split == "train" else "TS -"
        unique = len(policy_set)
        self.log(
            f"{head} A: {accuracy:.3f} | R: {reward:.2E} | S: {sparsity:.3f} | V: {variance:.3f} "
            f"| #: {unique}",
            split,
            accuracy=accuracy,
            reward=reward,
            sparsity=sparsity,
            variance=variance,
            unique_policies=unique,
        )

    def log_rates(self, split: str, rates: torch.Tensor) -> None:
        """Put how often each block was executed, (K,), into metrics.jsonl and TensorBoard."""
        self.metrics[f"{split}_rates"] = [round(rate, 4) for rate in rates.tolist()]
        for k, rate in enumerate(rates.tolist()):
            self.writer.add_scalar(f"{split}_rate/block_{k:02d}", rate, self.metrics["epoch"])

    def save_evaluated(self) -> None:
        """Write the named checkpoint of an epoch whose test figures were logged."""
        epoch, accuracy = self.metrics["epoch"], self.metrics["test_accuracy"]
        blocks, unique = self.metrics["test_sparsity"], self.metrics["test_unique_policies"]
        name, figures = f"ckpt_E_{epoch}_A_{accuracy:.3f}", {"acc": accuracy}
        if "test_reward" in self.metrics:  # ConvNet-AIG has none
            figures["reward"] = self.metrics["test_reward"]
            name += f"_R_{figures['reward']:.2E}"
        self.save(f"{name}_S_{blocks:.2f}_#_{unique}.t7", **figures)

    def save(self, name: str, **figures: float) -> None:
        """Write a checkpoint from which the run goes on exactly."""
        content = {name: cpu(part.state_dict()) for name, part in self.tracked.items()}
        content |= {"model": self.spec.name, "stage": self.stage, "args": vars(self.args)}
        content |= {"epoch": self.metrics.get("epoch", self.done), **self.extras, **figures}
        checkpoint.write(content, self.cv_dir / name)

    def _open_logs(self) -> None:
        args_file, commands = self.cv_dir / "args.txt", self.cv_dir / "command.txt"
        with about(self.cv_dir):
            lines = [f"{name}: {value}" for name, value in sorted(vars(self.args).items())]
            args_file.write_text("\n".join(lines) + "\n")
            with open(commands, "a" if self.loaded else "w") as file:
                file.write(shlex.join(["python", *sys.argv]) + "\n")
            self._forget_after(self.done)
            self.writer = SummaryWriter(
                str(self.cv_dir / "log"), purge_step=self.done + 1 if self.loaded else None
            )

    def _forget_after(self, epoch: int) -> None:
        """Drop metrics of epochs that are about to be run again."""
        path = self.cv_dir / "metrics.jsonl"
        if not path.exists():
            return
        lines = path.read_text().splitlines(keepends=True) if self.loaded else []
        kept = [
            line for line in lines if line.endswith("\n") and json.loads(line)["epoch"] <= epoch
        ]
        partial = path.with_suffix(".tmp")
        partial.write_text("".join(kept))
        partial.replace(path)


def stage_of(content: Mapping[str, Any]) -> int:
    """Which stage wrote a checkpoint; the released code's are told by what they hold."""
    if "stage" in content:
        return content["stage"]
    if "state_dict" in content:
        return 0
    return 2 if "resnet" in content else 1


def cpu(state: Any) -> Any:
    """The same nested state with every tensor on the CPU, so that any machine can read it."""
    if isinstance(state, torch.Tensor):
        return state.cpu()
    if isinstance(state, Mapping):
        return {key: cpu(value) for key, value in state.items()}
    if isinstance(state, list):
        return [cpu(value) for value in state]
    return state
