"""Batches of images and labels on the run's device, the same for the same seed and epoch."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import checkpoint, cifar, imagenet, ranks
from .device import derived_seed
from .errors import UserError, named
from .part import AUGMENTATION, STEP, Part, parts
from .spec import Spec

PADDING = 4


class Loader(Protocol):
    """A data set that can be gone through any number of times."""

    num_images: int

    def __len__(self) -> int:
        """Batches an epoch."""

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor, Part]]:
        """This rank's part of an epoch's batches, the first `skip` left out.

        Images (n, 3, H, W), float32 and channels_last, labels (n,), and what part they are.
        """


class TensorLoader:
    """Images that live on the device as uint8 (N, H, W, 3), cropped and flipped there in batches.

    With `augment`, order, crops and flips are drawn from (seed, epoch) alone: the batch size, the
    device and what ran before do not change what an image looks like in an epoch.
    """

    def __init__(self, images: Tensor, labels: Tensor, spec: Spec, batch_size: int, **options):
        self.labels = labels.long()
        self.num_images, self.size = images.shape[:2]
        self.batch_size = batch_size
        self.augment = options.get("augment", False)
        self.seed = options.get("seed", 0)
        self.images = images
        self.class_names: list[str] = []
        self.mean = torch.tensor(spec.mean, device=images.device) * 255
        self.std = torch.tensor(spec.std, device=images.device) * 255

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor, Part]]:
        order, corners, flips = self._draw(epoch)
        for part in parts(
            self.num_images, self.batch_size, (self.seed, epoch, STEP), skip, self.augment
        ):
            first = part.step * self.batch_size
            rows = order[first + part.start : first + part.stop]
            yield self._pixels(rows, corners[rows], flips[rows]), self.labels[rows], part

    def picture(self, row: int) -> np.ndarray:
        """One image as it was, uint8 (H, W, 3)."""
        return self.images[row].cpu().numpy()

    def fingerprint(self) -> str:
        """The same images in the same order, the same fingerprint."""
        return checkpoint.digest([self.images, self.labels])

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
        return order.to(device), corners.to(device), flips.to(device)

    def _pixels(self, rows: Tensor, corners: Tensor, flips: Tensor) -> Tensor:
        """Crop, flip and normalise in one gather: (B, 3, H, W) seen through NHWC memory."""
        steps = torch.arange(self.size, device=rows.device)
        y = corners[:, :1] + steps
        x = corners[:, 1:] + torch.where(flips[:, None], steps.flip(0), steps)
        pixels = self._padded[rows[:, None, None], y[:, :, None], x[:, None, :]]
        return ((pixels.float() - self.mean) / self.std).permute(0, 3, 1, 2)


def spec_of(config: Callable[[str], Spec], args: argparse.Namespace) -> Spec:
    """What `--model` stands for, by `models.config`; a folder of pictures tells its classes."""
    spec = named(config, args.model)
    if spec.dataset == "Folder":
        size = args.image_size or spec.image_size
        spec = replace(spec, num_classes=imagenet.num_classes(args.data_dir), image_size=size)
    elif args.image_size:
        raise UserError(f"--image_size is for folders of pictures: {args.model} has a size")
    return spec


def load(
    spec: Spec, args: argparse.Namespace, device: torch.device, training: bool = True
) -> tuple[Loader | None, Loader]:
    """The training and evaluation loaders that the options ask for; see `engine.options`.

    Without `training`, ImageNet does without its training pictures and their loader is None.

    `--val_split N` evaluates on the last N training images, which training then leaves out;
    `--subset N` keeps the first N images of both.
    """
    if spec.has_pictures:
        return imagenet.load(spec, args, device, training)
    with ranks.main_first():  # who may have to fetch it
        arrays = cifar.load(spec.dataset, args.data_dir, check=not args.skip_data_check)
    train = arrays["train_images"], arrays["train_labels"]
    test = arrays["test_images"], arrays["test_labels"]
    if args.val_split:
        if args.val_split >= len(train[0]):
            raise UserError(
                f"--val_split {args.val_split}: there are {len(train[0])} images in all"
            )
        test = tuple(array[-args.val_split :] for array in train)
        train = tuple(array[: -args.val_split] for array in train)
    train, test = (
        tuple(array[: args.subset].to(device) for array in arrays) for arrays in (train, test)
    )
    train = TensorLoader(*train, spec, args.batch_size, augment=True, seed=args.seed)
    test = TensorLoader(*test, spec, args.batch_size)
    train.class_names = test.class_names = cifar.CLASS_NAMES[spec.dataset]
    return train, test
