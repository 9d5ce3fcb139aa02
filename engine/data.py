"""Batches of images and labels on the run's device, the same for the same seed and epoch."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import models
from models import Config

from . import bases, cifar, class_folders, pictures, ranks, storage
from .device import free_memory, send
from .process import UserError
from .shard import AUGMENTATION, STEP, Shard, derived_seed, shards

PADDING = 4


class DataSet(NamedTuple):
    """Small images that are held in memory.

    read(data_dir, check) gives train_images, test_images (N, H, W, 3) and train_labels, test_labels
    (N,), all uint8; with `check` it makes sure that they are the published ones. `superclasses`
    are of classes that are alike, by name.
    """

    read: Callable[[str, bool], Mapping[str, Tensor]]
    classes: Sequence[str]
    superclasses: Mapping[str, Sequence[str]] = {}


DATA_SETS = {
    name: DataSet(partial(cifar.load, name), classes, cifar.SUPERCLASSES.get(name, {}))
    for name, classes in cifar.CLASS_NAMES.items()
}


class Loader(Protocol):
    """A data set that can be gone through any number of times."""

    num_images: int
    batch_size: int

    def __len__(self) -> int:
        """Batches an epoch."""

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor, Shard]]:
        """This rank's part of an epoch's batches, the first `skip` left out.

        Images (n, 3, H, W), float32 and channels_last, labels (n,), and what part they are.
        """


class EvaluationLoader(Loader, Protocol):
    """One whose images stay in order and can be shown."""

    class_names: Sequence[str]

    def picture(self, row: int) -> np.ndarray:
        """One image as it was before normalising, uint8 (H, W, 3)."""

    def fingerprint(self) -> str:
        """The same images, the same fingerprint."""


class TensorLoader:
    """Images that live on the device as uint8 (N, H, W, 3), cropped and flipped there in batches.

    With `augment`, order, crops and flips are drawn from (seed, epoch) alone: the batch size, the
    device and what ran before do not change what an image looks like in an epoch.
    """

    def __init__(self, images: Tensor, labels: Tensor, config: Config, batch_size: int, **options):
        self.labels = labels.long()
        self.num_images, self.size = images.shape[:2]
        self.batch_size = batch_size
        self.augment = options.get("augment", False)
        self.seed = options.get("seed", 0)
        self.images = images
        self.class_names: list[str] = []
        self.mean = torch.tensor(config.mean, device=images.device) * 255
        self.std = torch.tensor(config.std, device=images.device) * 255

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor, Shard]]:
        order, corners, flips = self._draw(epoch)
        for shard in shards(
            self.num_images, self.batch_size, (self.seed, epoch, STEP), skip, self.augment
        ):
            first = shard.step * self.batch_size
            rows = order[first + shard.start : first + shard.stop]
            yield self._pixels(rows, corners[rows], flips[rows]), self.labels[rows], shard

    def picture(self, row: int) -> np.ndarray:
        """One image as it was, uint8 (H, W, 3)."""
        return self.images[row].cpu().numpy()

    def fingerprint(self) -> str:
        """The same images in the same order, the same fingerprint."""
        return storage.digest([self.images, self.labels])

    @cached_property
    def _padded(self) -> Tensor:
        # padded before normalising, as the released code does: the border is black
        border = PADDING if self.augment else 0
        return F.pad(self.images, (0, 0, border, border, border, border))

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """The epoch's order (N,), crop corners (N, 2) and flips (N,), drawn on the CPU."""
        n, device = self.num_images, self.images.device
        if not self.augment:
            nothing = torch.zeros(n, 2, dtype=torch.long, device=device)
            return torch.arange(n, device=device), nothing, nothing[:, 0].bool()
        generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch, AUGMENTATION))
        order = torch.randperm(n, generator=generator)
        corners = torch.randint(2 * PADDING + 1, (n, 2), generator=generator)
        flips = torch.rand(n, generator=generator) < 0.5
        return send(order, device), send(corners, device), send(flips, device)

    def _pixels(self, rows: Tensor, corners: Tensor, flips: Tensor) -> Tensor:
        """Crop, flip and normalise in one gather: (B, 3, H, W) seen through NHWC memory."""
        steps = torch.arange(self.size, device=rows.device)
        y = corners[:, :1] + steps
        x = corners[:, 1:] + torch.where(flips[:, None], steps.flip(0), steps)
        pixels = self._padded[rows[:, None, None], y[:, :, None], x[:, None, :]]
        return ((pixels.float() - self.mean) / self.std).permute(0, 3, 1, 2)


def config_of(
    args: argparse.Namespace,
    gated: bool | None = None,
    told_by: Sequence[str] = ("load", "pretrained", "base"),
) -> Config:
    """What `--model` stands for. Of pictures a file under one of the options `told_by` names the
    classes, in the order that its network learned them; without one, the folder does.

    `gated` says which method is asked for, ConvNet-AIG or BlockDrop.
    """
    try:
        config = models.config(args.model, gated)
    except ValueError as error:
        raise UserError(str(error)) from None
    if args.image_size and config.dataset != "Folder":
        raise UserError(f"--image_size is for folders of pictures: {args.model} has a size")
    if config.has_pictures:
        known = known_classes(config, args, told_by)
        names = pictures.class_names(config, Path(args.data_dir), known)
        size = args.image_size or config.image_size
        config = replace(config, num_classes=len(names), class_names=tuple(names), image_size=size)
    return config


def known_classes(
    config: Config, args: argparse.Namespace, told_by: Sequence[str]
) -> tuple[str | Path, Sequence[str]] | None:
    """The first file that names the classes of its network, and these; None where none does."""
    files = [getattr(args, option, None) for option in told_by]
    folder = getattr(args, "cv_dir", None)
    if folder and (args.resume or ranks.was_restarted()):
        files.insert(0, Path(folder) / storage.LAST)
    if "base" in told_by:
        with suppress(UserError):  # several, of which one has to be chosen, or none
            files.append(bases.find_base(config.name, None))
    for file in filter(None, files):
        if Path(file).exists() and (names := storage.read(file).class_names):
            return file, names
    return None


def load(
    config: Config, args: argparse.Namespace, device: torch.device, training: bool = True
) -> tuple[Loader | None, EvaluationLoader]:
    """The training and evaluation loaders that the options ask for; see `engine.options`.

    Without `training` no training images are loaded and their loader is None.

    `--val_split N` evaluates on the last N training images, of pictures on N that are drawn once,
    and training leaves these out; `--subset N` keeps the first N images of both.
    """
    read = pictures.load if config.has_pictures else load_arrays
    loaders = read(config, args, device, training)
    for loader in filter(None, loaders):
        check_shared(loader)
    return loaders


def load_arrays(
    config: Config, args: argparse.Namespace, device: torch.device, training: bool
) -> tuple[TensorLoader | None, TensorLoader]:
    """`load` for a data set that is held in memory."""
    with ranks.main_first():  # who may have to fetch it
        arrays = DATA_SETS[config.dataset].read(args.data_dir, not args.skip_data_check)
    train = mixed(arrays["train_images"], arrays["train_labels"])
    test = mixed(arrays["test_images"], arrays["test_labels"])
    side = config.image_size
    for images, _ in (train, test):
        if images.shape[1:] != (side, side, 3):  # FLOPs are counted, and files exported, for these
            found = "x".join(map(str, images.shape[1:]))
            raise UserError(
                f"images of {config.dataset} are {found}, where models/registry.py says {side} "
                "pixels a side"
            )
    if args.val_split:
        if args.val_split >= len(train[0]):
            raise UserError(
                f"--val_split {args.val_split}: there are {len(train[0])} images in all"
            )
        test = tuple(array[-args.val_split :] for array in train)
        train = tuple(array[: -args.val_split] for array in train)
    loaders = []
    for arrays, options in ((train, {"augment": True, "seed": args.seed}), (test, {})):
        if options and not training:
            loaders.append(None)
            continue
        images, labels = (array[: args.subset] for array in arrays)
        check_fits(images, device)
        arrays = images.to(device), labels.to(device)
        loader = TensorLoader(*arrays, config, args.batch_size, **options)
        loader.class_names = DATA_SETS[config.dataset].classes
        loaders.append(loader)
    return tuple(loaders)


def check_shared(loader: EvaluationLoader) -> None:
    """Refuse batches of which a process would get nothing."""
    images = min(loader.batch_size, loader.num_images)
    if images < ranks.world():
        raise UserError(
            f"{images} images a batch for {ranks.world()} processes: take a larger --batch_size or "
            "--subset, or fewer processes"
        )


def mixed(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Images that lie class by class in turns of one image a class, others as they are."""
    order = class_folders.turns(labels)
    return (images, labels) if order is None else (images[order], labels[order])


def check_fits(images: Tensor, device: torch.device) -> None:
    """Refuse images that would take more than a third of the device's free memory."""
    free = free_memory(device)
    if images.nbytes > free / 3:
        raise UserError(
            f"{images.nbytes / 2**20:.0f} MiB of images for {free / 2**20:.0f} MiB of free memory "
            f"on {device}: take fewer with --subset, or another --device"
        )
