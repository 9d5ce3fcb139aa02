"""A training run: its device, its directory of checkpoints, and how it resumes."""

import argparse
import fcntl
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import models
import utils
from models import Config

from . import checkpoint, device, loop, process, ranks, resume, weights
from .data import Loader
from .logs import Logs
from .process import UserError, user_errors

# what the released code calls a network that is tracked here
ALIASES = {"agent": ("agent", "net")}


class Run:
    """One run of a stage script (0 pretrain, 1 curriculum, 2 finetune, 3 ConvNet-AIG), a context.

    On entry nothing is written but the directory. What `track` is given goes into every checkpoint
    and comes back from the one that `--load` names. All random numbers of epoch t are drawn from
    generators seeded with (seed, t), so a resumed epoch is the epoch that was interrupted.
    """

    def __init__(
        self, args: argparse.Namespace, stage: int, config: Config, cv_dir: str | Path = "cv/tmp/"
    ):
        self.args, self.stage, self.config = args, stage, config
        ranks.start(args.parallel, args.device)
        self.device = device.pick(args.device)
        device.set_up(args.precision, args.deterministic)
        if ranks.is_main():
            device.tell_if_slow(self.device, args.precision)
        self.done, self.steps_done = 0, 0
        self.partial: dict[str, torch.Tensor] = {}
        self.is_trained = False  # this epoch, its evaluation still to come
        self.wrapped: list[nn.Module] = []
        self.saved = time.monotonic()
        self.tracked: dict[str, Any] = {}
        self.loaded: dict[str, Any] = {}
        self.extras: dict[str, Any] = {}
        source = args.load and Path(args.load)
        source = source.parent if source and not source.is_dir() else source
        target = Path(args.cv_dir or source or cv_dir)
        if (args.resume or ranks.was_restarted()) and (target / checkpoint.LAST).exists():
            args.load, source = str(target), target
        if args.load:
            self.loaded = weights.read_for(config, args.load)
            resume.check_stage(self.loaded, stage, args.load)
            self.done = int(self.loaded.get("epoch", 0))
            self.steps_done = int(self.loaded.get("steps_done", 0))
            self.partial = dict(self.loaded.get("partial", {}))
            self.extras = {n: self.loaded[n] for n in ("base",) if n in self.loaded}
            resume.check_place(self.loaded, args)
        self.source, self.cv_dir = source, target
        self.logs = Logs(target, args)
        self.lock = None
        new = not source or target.resolve() != source.resolve()
        if not new and self.done < args.max_epochs:  # a finished run is only told of
            resume.check_options(self.loaded, args, target)
        if ranks.is_main():
            self._claim_directory(new)
        changed = resume.changes(self.loaded, args) if new else []
        if self.done < args.max_epochs:
            changed += resume.told_changes(self.loaded, args)
        for name, before, now in changed:
            self.note(f"--{name} {now} (was {before})")
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
        self.logs.close()
        if error is not None and self.logs.writer:
            last = self.cv_dir / checkpoint.LAST
            steps = f" and {self.steps_done} steps" if self.steps_done else ""
            error.add_note(f"epoch {self.done}{steps} is kept; go on with --load {last}")

    def load_base(self, resnet: models.ResNet) -> None:
        """Load the base ResNet; checkpoints then say which it was."""
        weights.load_base(self.config, self.args.base, resnet)
        self.extras["base"] = weights.fingerprint(resnet)
        if self.stage == resume.stage_of(self.loaded):
            weights.check_base(self.loaded, self.args.load, resnet)

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

    def track(self, name: str, owner: nn.Module | torch.optim.Optimizer) -> None:
        """Put a network or optimizer into the checkpoints under `name`, and restore it from the
        state of that name after --load.
        """
        self.tracked[name] = owner
        if not self.loaded:
            return
        if isinstance(owner, torch.optim.Optimizer):
            with user_errors(self.args.load):
                self._restore_optimizer(owner, self.loaded.get(name))
            return
        found = {key: self.loaded[key] for key in ALIASES.get(name, (name,)) if key in self.loaded}
        if not found:
            raise UserError(f"{self.args.load}: holds no {name!r}, which this run goes on from")
        if "policy_size" in self.loaded:
            found["policy_size"] = self.loaded["policy_size"]
        weights.load_into(owner, found, self.args.load)

    def _restore_optimizer(self, optimizer: torch.optim.Optimizer, state: Any) -> None:
        """Moments come from the checkpoint, hyperparameters from the command line."""
        if state is None:  # the released code saves none
            self.note(f"{self.args.load} holds no optimizer state: it starts afresh")
            return
        own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, options in zip(optimizer.param_groups, own, strict=True):
            group.update(options)

    def note(self, text: str) -> None:
        """Tell the user something that the results do not show."""
        if ranks.is_main():
            tqdm.write(text, file=sys.stderr)

    def _claim_directory(self, new: bool) -> None:
        """Make sure that cv_dir can be written and, where a new one is meant, holds no run."""
        if new and self.cv_dir.joinpath(checkpoint.LAST).exists():
            raise UserError(
                f"{self.cv_dir} already holds a run: go on with --load {self.cv_dir}, "
                "or choose another --cv_dir"
            )
        with user_errors(self.cv_dir):
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
        self.logs.open(self.done, self.source)
        self.save_partway()  # last.t7 is where this run begins, also after --load of an older file
        for epoch in range(self.done + 1, self.args.max_epochs + 1):
            device.seed_everything(self.args.seed, epoch, ranks.rank())
            self.logs.begin(epoch)
            yield epoch
            self.logs.end()
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
    ) -> loop.Results:
        """This epoch of training, or what is left of it; see `engine.loop.train_epoch`."""
        epoch = self.logs.metrics["epoch"]
        results = loop.Results(loader, epoch, f"epoch {epoch}", self.steps_done, self.partial)
        with process.patiently():
            loop.train_epoch(
                step,
                self.wrapped,
                optimizers,
                results,
                self.args.precision,
                micro_batch=self.args.micro_batch,
                after_step=partial(self._between_steps, results),
                **options,
            )
            ranks.share_buffers(self.wrapped)
            self.steps_done, self.partial = len(loader), results.final
            self.is_trained = True
            self._stop_if_asked()
        self._tell_damaged(loader)
        return results

    def _tell_damaged(self, loader: Loader) -> None:
        """Count the pictures of all ranks in whose place another stood."""
        damaged = sorted(
            {f for files in ranks.gather(getattr(loader, "damaged", [])) for f in files}
        )
        if damaged:
            self.logs.metrics["damaged_images"] = len(damaged)
            self.note(f"{len(damaged)} pictures cannot be read, the first {damaged[0]}: replaced")

    def _between_steps(self, results: loop.Results, steps_done: int) -> None:
        """Write last.t7 every so many minutes, and before a stop that was asked for."""
        due = time.monotonic() - self.saved > 60 * self.args.save_minutes
        wish = ranks.largest(int(due or process.requested()))
        if wish and steps_done < len(results.loader):
            ranks.share_buffers(self.wrapped)
            self.steps_done, self.partial = steps_done, results.gather()
            self.save_partway()
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """Stop all ranks where one was asked to."""
        if ranks.largest(int(process.requested())):
            raise process.Stopped

    def evaluate(self, step: loop.TestStep, loader: Loader) -> loop.Results:
        """An evaluation; see `engine.loop.evaluate`."""
        return loop.evaluate(step, loader, self.args.precision)

    def dependence(self, resnet: loop.Network, results: loop.Results, loader: Loader) -> None:
        """Log an evaluation's accuracy where its policies are dealt to other images, and where all
        images get the most frequent one: what its decisions owe to the image.
        """
        policies = results["policy"]
        if not len(policies):
            return
        common = utils.most_frequent(policies).expand_as(policies)
        found = {"shuffled": utils.deal(policies, self.args.seed), "common": common}
        figures = {
            name: loop.correct_under(resnet, given, loader, self.args.precision, name)
            .double()
            .mean()
            .item()
            for name, given in found.items()
        }
        shown = " | ".join(f"{name}: {value:.3f}" for name, value in figures.items())
        self.logs.line(shown, "test", begin="DEALT", **figures)

    def tests(self, epoch: int) -> bool:
        """Whether this epoch ends with an evaluation: every so often, and always the last."""
        return epoch % self.args.test_every == 0 or epoch == self.args.max_epochs

    def save_evaluated(self) -> None:
        """Write the named checkpoint of an epoch whose test figures were logged."""
        metrics = self.logs.metrics
        epoch, accuracy = metrics["epoch"], metrics["test_accuracy"]
        blocks, unique = metrics["test_sparsity"], metrics["test_unique_policies"]
        name, figures = f"ckpt_E_{epoch}_A_{accuracy:.3f}", {"acc": accuracy}
        if "test_reward" in metrics:  # ConvNet-AIG has none
            figures["reward"] = metrics["test_reward"]
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
        content |= {"model": self.config.name, "stage": self.stage, "args": vars(self.args)}
        content["normalisation"] = [list(self.config.mean), list(self.config.std)]
        for owner in self.tracked.values():
            if isinstance(owner, models.PolicyNet) and owner.size is not None:
                content["policy_size"] = owner.size
        content |= {"epoch": self.logs.metrics.get("epoch", self.done), **self.extras, **figures}
        with process.undisturbed():
            checkpoint.write(content, self.cv_dir / name)


def cpu(state: Any) -> Any:
    """The same nested state with every tensor on the CPU, so that any machine can read it."""
    if isinstance(state, torch.Tensor):
        return state.cpu()
    if isinstance(state, Mapping):
        return {key: cpu(value) for key, value in state.items()}
    if isinstance(state, list):
        return [cpu(value) for value in state]
    return state
