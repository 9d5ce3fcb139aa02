"""A training run: its device, its directory of checkpoints and logs, and how it resumes."""

import argparse
import fcntl
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensorboardX import SummaryWriter
from torch import nn
from tqdm import tqdm

from . import checkpoint, device, loop, ranks, stopping
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

PIXELS = 8  # a block's side in TensorBoard's picture of keep rates

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
    "parallel",
    "resume",
    "micro_batch",
    "save_minutes",
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
        ranks.start(args.parallel)
        self.device = device.pick()
        self.done, self.steps_done = 0, 0
        self.partial: dict[str, torch.Tensor] = {}
        self.is_trained = False  # this epoch, its evaluation still to come
        self.wrapped: list[nn.Module] = []
        self.saved = time.monotonic()
        self.tracked: dict[str, Any] = {}
        self.loaded: dict[str, Any] = {}
        self.extras: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}
        self.writer: SummaryWriter | None = None
        source = args.load and Path(args.load)
        source = source.parent if source and not source.is_dir() else source
        target = Path(args.cv_dir or source or cv_dir)
        if (args.resume or ranks.was_restarted()) and (target / checkpoint.LAST).exists():
            args.load, source = str(target), target
        if args.load:
            self.loaded = checkpoint.read_for(spec, args.load)
            self._check_stage()
            self.done = int(self.loaded.get("epoch", 0))
            self.steps_done = int(self.loaded.get("steps_done", 0))
            self.partial = dict(self.loaded.get("partial", {}))
            self.extras = {n: self.loaded[n] for n in ("base",) if n in self.loaded}
            self._check_place_in_epoch()
        self.cv_dir = target
        self.lock = None
        if ranks.is_main():
            self._claim_directory(new=not source or target.resolve() != source.resolve())
        self._tell_changes()
        device.keep_freed_memory()
        device.seed_everything(args.seed, 0)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None and self.is_trained:
            with suppress(UserError):  # such as a full disk, which the error may be about
                self.save_partway()
        if self.lock:
            self.lock.close()
        if self.writer is None:
            return
        self.writer.close()
        if error is not None:
            last = self.cv_dir / checkpoint.LAST
            steps = f" and {self.steps_done} steps" if self.steps_done else ""
            error.add_note(f"epoch {self.done}{steps} is kept; go on with --load {last}")

    def load_base(self, resnet: nn.Module, load: Callable) -> None:
        """Load the base ResNet by `load(resnet, tensors)`; checkpoints then say which it was."""
        checkpoint.load_base(self.spec, self.args.base, resnet, load)
        self.extras["base"] = checkpoint.fingerprint(resnet)
        if self.stage == stage_of(self.loaded):
            checkpoint.check_base(self.loaded, self.args.load, resnet)

    def place(self, *networks: nn.Module) -> None:
        for network in networks:
            device.place(network, self.device)

    def wrap(self, module: nn.Module) -> nn.Module:
        """A module whose gradients are averaged over all ranks; see `engine.ranks.wrap`."""
        if self.args.sync_bn and ranks.world() > 1 and hasattr(module, "execution"):
            # every rank has to come to every BatchNorm, also where its images drop the block
            module.execution = "masked"
        self.wrapped.append(ranks.wrap(module, self.args.sync_bn))
        return self.wrapped[-1]

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

    def _check_place_in_epoch(self) -> None:
        """Refuse, inside an epoch, other batches than those that were done."""
        before, now = self.loaded.get("args", {}), vars(self.args)
        for name in ("batch_size", "subset", "val_split", "seed"):
            if self.steps_done and before.get(name, now[name]) != now[name]:
                raise UserError(
                    f"{self.args.load} is inside an epoch of --{name} {before[name]}: go on with "
                    f"that, or change it from an epoch's end, a ckpt_*.t7"
                )

    def note(self, text: str) -> None:
        """Tell the user something that the results do not show."""
        if ranks.is_main():
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
            # held until this process ends, however it ends
            self.lock = open(self.cv_dir / ".lock", "w")
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self.cv_dir}: another run is writing here: wait for it, or choose another "
                    "--cv_dir"
                ) from None
            # workers may outlive a killed run for some seconds, and must not hold its place
            os.register_at_fork(after_in_child=self.lock.close)

    def epochs(self) -> Iterator[int]:
        """The epochs still to run, counted from 1; after each, metrics and last.t7 are written."""
        if self.done >= self.args.max_epochs:
            if ranks.is_main():
                tqdm.write(f"{self.args.load}: all {self.args.max_epochs} epochs are done")
            return
        if ranks.is_main():
            self._open_logs()
        if not self.cv_dir.joinpath(checkpoint.LAST).exists():
            self.save(checkpoint.LAST)
        for epoch in range(self.done + 1, self.args.max_epochs + 1):
            device.seed_everything(self.args.seed, epoch, ranks.rank())
            self.metrics = {"epoch": epoch}
            start = time.perf_counter()
            yield epoch
            self.metrics["seconds"] = round(time.perf_counter() - start, 3)
            if ranks.is_main():
                with about(self.cv_dir), open(self.cv_dir / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(self.metrics) + "\n")
            self.save(checkpoint.LAST)
            self.done, self.steps_done, self.partial = epoch, 0, {}
            self.is_trained = False
            self._stop_if_asked()

    def train_epoch(
        self,
        step: loop.TrainStep,
        optimizers: Sequence[torch.optim.Optimizer],
        loader: Loader,
        **options,
    ) -> Tally:
        """This epoch of training, or what is left of it; see `engine.loop.train_epoch`."""
        epoch = self.metrics["epoch"]
        tally = Tally(loader, epoch, f"epoch {epoch}", self.steps_done, self.partial)
        with stopping.patiently():
            loop.train_epoch(
                step,
                self.wrapped,
                optimizers,
                tally,
                self.args.precision,
                micro_batch=self.args.micro_batch,
                after_step=partial(self._between_steps, tally),
                **options,
            )
            ranks.share_buffers(self.wrapped)
            self.steps_done, self.partial = len(loader), tally.gather()
            self.is_trained = True
            self._stop_if_asked()
        self._tell_damaged(loader)
        return tally

    def _tell_damaged(self, loader: Loader) -> None:
        """Count the pictures of all ranks in whose place another stood."""
        damaged = sorted(
            {f for files in ranks.gather(getattr(loader, "damaged", [])) for f in files}
        )
        if damaged:
            self.metrics["damaged_images"] = len(damaged)
            self.note(f"{len(damaged)} pictures cannot be read, the first {damaged[0]}: replaced")

    def _between_steps(self, tally: Tally, steps_done: int) -> None:
        """Write last.t7 every so many minutes, and before a stop that was asked for."""
        due = time.monotonic() - self.saved > 60 * self.args.save_minutes
        wish = ranks.largest(int(due or stopping.requested()), self.device)
        if wish and steps_done < len(tally.loader):
            ranks.share_buffers(self.wrapped)
            self.steps_done, self.partial = steps_done, tally.gather()
            self.save_partway()
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """Stop all ranks where one was asked to."""
        if ranks.largest(int(stopping.requested()), self.device):
            raise stopping.Stopped

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
        self.metrics |= {f"{split}_{name}": value for name, value in figures.items()}
        if not ranks.is_main():
            return
        if self.args.subset:
            line += f" | --subset {self.args.subset}"
        tqdm.write(line)
        sys.stdout.flush()
        for name, value in figures.items():
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
        for k, rate in enumerate(rates.tolist() if ranks.is_main() else []):
            self.writer.add_scalar(f"{split}_rate/block_{k:02d}", rate, self.metrics["epoch"])

    def log_kept(self, policies: torch.Tensor, labels: torch.Tensor) -> None:
        """Show in TensorBoard how often blocks are kept, by class, and how many an image keeps.

        policies: (N, K), labels: (N,). The picture has the blocks from left to right, all images
        in its first row and then one class a row, black for never and white for always.
        """
        if not ranks.is_main():
            return
        classes = labels.unique() if labels.max() < 100 else labels[:0]
        groups = [policies, *(policies[labels == label] for label in classes)]
        rates = torch.stack([group.double().mean(0) for group in groups])
        picture = rates.repeat_interleave(PIXELS, 0).repeat_interleave(PIXELS, 1)
        epoch = self.metrics["epoch"]
        self.writer.add_image("test_keep_rates", picture.numpy(), epoch, dataformats="HW")
        self.writer.add_histogram("test_blocks", policies.long().sum(1).numpy(), epoch)

    def save_evaluated(self) -> None:
        """Write the named checkpoint of an epoch whose test figures were logged."""
        epoch, accuracy = self.metrics["epoch"], self.metrics["test_accuracy"]
        blocks, unique = self.metrics["test_sparsity"], self.metrics["test_unique_policies"]
        name, figures = f"ckpt_E_{epoch}_A_{accuracy:.3f}", {"acc": accuracy}
        if "test_reward" in self.metrics:  # ConvNet-AIG has none
            figures["reward"] = self.metrics["test_reward"]
            name += f"_R_{figures['reward']:.2E}"
        self.save(f"{name}_S_{blocks:.2f}_#_{unique}.t7", **figures)

    def save_partway(self) -> None:
        """Write last.t7 inside an epoch, with what its batches gave so far."""
        part = {"steps_done": self.steps_done, "partial": self.partial}
        self.save(checkpoint.LAST, epoch=self.done, **part)

    def save(self, name: str, **figures: Any) -> None:
        """Write a checkpoint from which the run goes on exactly."""
        self.saved = time.monotonic()
        if not ranks.is_main():
            return
        content = {name: cpu(part.state_dict()) for name, part in self.tracked.items()}
        content |= {"model": self.spec.name, "stage": self.stage, "args": vars(self.args)}
        content |= {"epoch": self.metrics.get("epoch", self.done), **self.extras, **figures}
        with stopping.undisturbed():
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
