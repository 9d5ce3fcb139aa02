"""ImageNet, or any folder of pictures in its layout, through torchvision and worker processes."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from .device import derived_seed
from .errors import UserError
from .spec import Spec


class FolderLoader:
    """Pictures decoded by DataLoader workers; each epoch is drawn from (seed, epoch)."""

    def __init__(self, pictures, batch_size: int, device: torch.device, seed: int | None):
        self.num_images = len(pictures)
        self.device = device
        self.seed = seed
        self.generator = torch.Generator()
        workers = len(os.sched_getaffinity(0))
        self.loader = DataLoader(
            pictures,
            batch_size,
            shuffle=seed is not None,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            generator=self.generator,
        )

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.generator.manual_seed(derived_seed(self.seed or 0, epoch))
        for images, labels in self.loader:
            images = images.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            yield images.contiguous(memory_format=torch.channels_last), labels


def load(
    spec: Spec, args: argparse.Namespace, device: torch.device, training: bool
) -> tuple[FolderLoader | None, FolderLoader]:
    """Loaders over data_dir/train (None without `training`) and data_dir/val.

    Training: short side to 256, random crop, flip. Evaluation: short side to 256, centre crop.
    """
    from torchvision import transforms  # slow to import, and CIFAR does without

    size = spec.image_size
    resize = transforms.Resize(size * 256 // 224)
    finish = [transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)]
    augment = transforms.Compose(
        [resize, transforms.RandomCrop(size), transforms.RandomHorizontalFlip(), *finish]
    )
    centre = transforms.Compose([resize, transforms.CenterCrop(size), *finish])

    root = Path(args.data_dir)
    train = folder(root / "train", augment) if training or args.val_split else None
    if args.val_split:
        if args.val_split >= len(train):
            raise UserError(f"--val_split {args.val_split}: there are {len(train)} images in all")
        # the folders are in order of class, so the last N would be of few classes
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
        test = Subset(folder(root / "train", centre), chosen[-args.val_split :])
        train = Subset(train, chosen[: -args.val_split])
    else:
        test = folder(root / "val", centre)
    if args.subset:
        train = train and Subset(train, range(min(args.subset, len(train))))
        test = Subset(test, range(min(args.subset, len(test))))
    return (
        train and FolderLoader(train, args.batch_size, device, seed=args.seed),
        FolderLoader(test, args.batch_size, device, seed=None),
    )


def folder(path: Path, transform):
    """The pictures under path/<class>/. Raises UserError when there are none."""
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(path), transform)
    except (FileNotFoundError, OSError) as error:
        raise UserError(
            f"{path}: no folder of pictures, expected {path}/<class>/*.JPEG ({error})"
        ) from error
