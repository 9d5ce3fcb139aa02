"""A training run: its device, its directory of checkpoints, and how it resumes."""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn
from tqdm import tqdm

import models
import utils
from deploy import deploy
from models import Config

from . import bases, device, loop, process, ranks, resume, storage
from .data import Loader
from .logs import Logs
from .process import UserError, user_errors
from .shard import Shard, seed_everything


class Run:
    """One run of a stage script (0 pretrain, 1 curriculum, 2 finetune, 3 ConvNet-AIG), a context.

        with Run(args, 1, config) as run:
            ...  # networks, optimizers
            run.restore(agent=policy_net, optimizer=optimizer)
            for epoch in run.epochs():
                for images, labels, shard in run.batches(train):
                    with run.autocast():
                        loss, outcome = train_step(...)
                    run.step(loss, outcome)

    On entry nothing is written but the directory. All random numbers of epoch t are drawn from
    generators seeded with (seed, t), so a resumed epoch is the epoch that was interrupted.
    """

    def __init__(
        self, args: argparse.Namespace, stage: int, config: Config, cv_dir: str | Path = "cv/tmp/"
    ):
        self.args, self.stage, self.config = args, stage, config
        ranks.start(args.parallel, args.device, args.batch_size)
        self.device = device.pick(args.device)
        device.set_up(args.precision, args.deterministic)
        if ranks.is_main():
            device.tell_if_slow(self.device, args.precision)
        self.plan = resume.plan(args, stage, config, cv_dir, ranks.was_restarted())
        args.load, self.cv_dir, self.loaded = self.plan.load, self.plan.cv_dir, self.plan.loaded
        self.done, self.steps_done, self.partial = self.plan.progress()
        self.is_trained = False  # this epoch, its evaluation still to come
        self.wrapped: list[nn.Module] = []
        self.kept: dict[str, Any] = {}  # in every checkpoint
        self.extras: dict[str, Any] = self.plan.extras()
        self.training: loop.Training | None = None
        self._autocast = device.autocast(self.device, args.precision)
        self.saved, self.pace = time.monotonic(), loop.Pace()
        self.logs = Logs(self.cv_dir, args)
        self.lock = claim(self.cv_dir) if ranks.is_main() else None
        for text in self.plan.notes:
            self.note(text)
        device.keep_freed_memory()
        seed_everything(args.seed, 0)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        process.be_impatient()
        if error is not None and self.is_trained:
            with suppress(UserError):  # such as a full disk, which the error may be about
                self.save_partway()
        if self.lock:
            self.lock.release()
        self.logs.close()
        if error is not None and self.logs.writer:
            last = self.cv_dir / storage.LAST
            steps = f"{self.steps_done} steps of epoch {self.done + 1}" if self.steps_done else ""
            done = " and ".join(filter(None, (f"epoch {self.done}" if self.done else "", steps)))
            verb = "are" if steps else "is"
            error.add_note(f"{done or 'the beginning'} {verb} kept; go on with --load {last}")

    def load_base(self, resnet: models.ResNet) -> None:
        """Load the base ResNet; checkpoints then say which it was."""
        bases.load_base(self.config, self.args.base, resnet, self.args.base_pixels)
        self.extras["base"] = bases.fingerprint(resnet)
        if self.stage == self.loaded.stage:
            bases.check_base(self.loaded, resnet)

    def tell_accuracy(self, resnet: models.ResNet, loader: Loader) -> None:
        """Say how good the ResNet is that the run begins with."""
        accuracy, count = loop.first_accuracy(resnet, loader, self.args.precision)
        said = f"the full ResNet is right about {accuracy:.1%} of {count} images"
        self.note(loop.near_chance(accuracy, self.config.num_classes) or said)

    def frozen(self, resnet: models.ResNet) -> nn.Module:
        """A ResNet that never changes: its deployed copy, or itself where `deploy` knows it not."""
        try:
            return deploy(resnet, dtype=device.dtype(self.args.precision))[0]
        except ValueError as error:
            self.note(f"{error}: the ResNet itself runs in its place, more slowly")
            return resnet

    def place(self, *networks: nn.Module) -> None:
        for network in networks:
            device.place(network, self.device)

    def wrap(self, module: nn.Module, drops: bool = False) -> nn.Module:
        """A module whose gradients are averaged over all ranks; see `engine.ranks.wrap`."""
        if self.args.sync_bn and ranks.world() > 1 and hasattr(module, "execution"):
            # every rank has to come to every BatchNorm, also where its images drop the block
            module.execution = "masked"
        self.wrapped.append(ranks.wrap(module, self.args.sync_bn, drops))
        return self.wrapped[-1]

    def restore(self, **parts: nn.Module | torch.optim.Optimizer) -> None:
        """Put networks and optimizers into the checkpoints under their names, and take them up from
        the states of these names after --load.
        """
        for name, part in parts.items():
            self.kept[name] = part
            if not self.args.load:
                continue
            if isinstance(part, torch.optim.Optimizer):
                with user_errors(self.args.load):
                    self._restore_optimizer(part, self.loaded.optimizers.get(name))
            else:
                bases.load_into(part, self.loaded)
        optimizers = [part for part in parts.values() if isinstance(part, torch.optim.Optimizer)]
        self.training = loop.Training(self.wrapped, optimizers, self.args.micro_batch)

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

    def epochs(self) -> Iterator[int]:
        """The epochs still to run, counted from 1; after each, metrics and last.t7 are written."""
        if self.done >= self.args.max_epochs:
            if ranks.is_main():
                tqdm.write(f"{self.args.load}: all {self.args.max_epochs} epochs are done")
            return
        self.logs.open(self.done, self.plan.source)
        self.save_partway()  # last.t7 is where this run begins, also after --load of an older file
        for epoch in range(self.done + 1, self.args.max_epochs + 1):
            seed_everything(self.args.seed, epoch, ranks.rank())
            self.logs.begin(epoch)
            yield epoch
            self.logs.end()
            self.save(storage.LAST)
            self.done, self.steps_done, self.partial = epoch, 0, {}
            self.is_trained = False
            self._stop_if_asked()

    def batches(self, loader: Loader) -> Iterator[tuple[torch.Tensor, torch.Tensor, Shard]]:
        """This rank's part of the epoch's batches, or of what is left of them: images
        (n, 3, H, W), labels (n,) and the shard that they are; see `loop.Training.batches`.
        """
        with process.patiently():
            batches = self.training.batches(loader, self.epoch, self.steps_done, self.partial)
            for batch in batches:
                yield batch
                self._tell_if_slowed_down()
            ranks.share_buffers(self.wrapped)
            self.steps_done, self.partial = len(loader), self.results.final
            self.is_trained = True
            self._stop_if_asked()
        self._tell_damaged(loader)

    def autocast(self) -> AbstractContextManager:
        """Context in which convolutions and linear layers run in --precision."""
        return self._autocast

    def step(
        self,
        loss: torch.Tensor,
        outcome: Mapping[str, torch.Tensor],
        clip_norm: float | None = None,
    ) -> None:
        """Learn from a shard's part of the loss, and save what is due; see `loop.Training.step`."""
        self.training.step(loss, outcome, clip_norm)
        if self.training.is_last:
            self._save_if_due(self.training.shard.step + 1)

    @property
    def epoch(self) -> int:
        """The epoch that runs, counted from 1."""
        return self.logs.metrics["epoch"]

    @property
    def results(self) -> loop.Results:
        """What the images of this epoch's training got."""
        return self.training.results

    def _tell_damaged(self, loader: Loader) -> None:
        """Count the pictures of all ranks in whose place another stood."""
        damaged = sorted(
            {f for files in ranks.gather(getattr(loader, "damaged", [])) for f in files}
        )
        if damaged:
            self.logs.metrics["damaged_images"] = len(damaged)
            what = f"{len(damaged)} pictures" if len(damaged) > 1 else "a picture"
            self.note(f"{what} cannot be read and another stood in: {damaged[0]}")

    def _tell_if_slowed_down(self) -> None:
        """Say once where other work on this machine holds the kernels' threads up."""
        threads = torch.get_num_threads()
        if self.device.type == "cpu" and threads > 1 and self.pace.fell():
            self.note(
                f"steps take over {loop.SLOWED_DOWN} times as long as they did: other work on this "
                f"machine holds up kernels of {threads} threads. --parallel --resume goes on in "
                "processes of one thread each, which it slows down less"
            )

    def _save_if_due(self, steps_done: int) -> None:
        """Write last.t7 every so many minutes, and before a stop that was asked for."""
        due = time.monotonic() - self.saved > 60 * self.args.save_minutes
        wish = due or process.stop_requested
        if self.training.world > 1:
            wish = ranks.largest(int(wish))
        if wish and steps_done < self.training.steps:
            ranks.share_buffers(self.wrapped)
            self.steps_done, self.partial = steps_done, self.results.gather()
            self.save_partway()
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """Stop all ranks where one was asked to."""
        if ranks.largest(int(process.stop_requested)):
            raise process.Stopped

    def evaluate(self, step: loop.TestStep, loader: Loader) -> loop.Results:
        """An evaluation; see `engine.loop.evaluate`."""
        return loop.evaluate(step, loader, self.args.precision)

    def log_policies(self, split: str, results: loop.Results) -> None:
        """The line of an epoch or an evaluation, in the released code's form."""
        self.logs.policies(split, *utils.performance_stats(*results.of_policies()))

    def dependence(self, resnet: loop.Network, results: loop.Results, loader: Loader) -> None:
        """Log an evaluation's accuracy where its policies are shuffled over the images, and where
        all images get the most frequent one: what its decisions owe to the image.
        """
        policies = results["policy"]
        if not len(policies):
            return
        frequent = utils.most_frequent(policies).expand_as(policies)
        found = {
            "shuffled": utils.shuffled(policies, self.args.seed),
            "most_frequent": frequent,
        }
        figures = {
            name: loop.correct_under(resnet, given, loader, self.args.precision, name)
            .double()
            .mean()
            .item()
            for name, given in found.items()
        }
        parts = [f"{name.replace('_', ' ')}: {value:.3f}" for name, value in figures.items()]
        shown = " | ".join(parts)
        self.logs.line(shown, "test", begin="SHUFFLED", **figures)

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
        self.save(storage.LAST, epoch=self.done, **part)

    def save(self, name: str, **figures: Any) -> None:
        """Write a checkpoint from which the run goes on exactly."""
        self.saved = time.monotonic()
        if not ranks.is_main():
            return
        content = {name: cpu(part.state_dict()) for name, part in self.kept.items()}
        content |= {"model": self.config.name, "stage": self.stage, "args": vars(self.args)}
        content["normalisation"] = self.config.normalisation
        content["class_names"] = list(self.config.class_names)
        for owner in self.kept.values():
            if isinstance(owner, models.PolicyNet) and owner.size is not None:
                content["policy_size"] = owner.size
            if getattr(owner, "shortcuts", None) not in (None, "pool"):
                content["shortcuts"] = owner.shortcuts
        content |= {"epoch": self.logs.metrics.get("epoch", self.done), **self.extras, **figures}
        with process.undisturbed():
            storage.write(content, self.cv_dir / name)


def claim(folder: Path) -> FileLock:
    """Make a run's directory, and hold it until this process ends, however it ends; workers, which
    may outlive it for some seconds, do not.

    Raises UserError where it cannot be written, or another run is writing there.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    with user_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                f"{folder}: another run is writing here: wait for it, or choose another --cv_dir"
            ) from None
    return lock


def cpu(state: Any) -> Any:
    """The same nested state with every tensor on the CPU, so that any machine can read it."""
    if isinstance(state, torch.Tensor):
        return state.cpu()
    if isinstance(state, Mapping):
        return {key: cpu(value) for key, value in state.items()}
    if isinstance(state, list):
        return [cpu(value) for value in state]
    return state
