"""ImageNet, or any folder of pictures in its layout, decoded by worker processes."""

import argparse
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models import Config, capabilities

from . import process, ranks
from .class_folders import turns
from .process import UserError
from .shard import AUGMENTATION, STEP, Shard, derived_seed, shards
from .storage import digest

ENDINGS = {f".{ending}" for ending in (
    "jpg jpeg jpe jfif png bmp gif webp avif tif tiff jp2 j2k ppm pgm pbm pnm".split()
)}  # fmt: skip
LEFT_BEHIND = {"__MACOSX", "@eaDir", "lost+found"}
PREFETCH = 4  # batches that each worker keeps ready


class Pictures(Dataset):
    """Pictures as uint8 (3, size, size) in RGB: short side resized, then a crop.

    Asked for (row, seed); with a seed the crop is random and half of the pictures are flipped,
    without (None) it is the centre. Third comes the path of a picture that could not be read, and
    in whose place the next one stands; a centre crop has none. Last comes what is wrong where
    nothing could be read: raised in a worker it would come with the worker's traceback.
    """

    def __init__(self, files: list[tuple[str, int]], size: int):
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, asked: tuple[int, int | None]) -> tuple[Tensor, int, str, str]:
        try:
            return *self.read(*asked), ""
        except UserError as error:
            blank = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
            return blank, 0, "", str(error)

    def read(self, row: int, seed: int | None) -> tuple[Tensor, int, str]:
        """The first three. Raises UserError where nothing can be read."""
        path, label = self.files[row]
        damaged = ""
        for offset in range(1, len(self.files) + 1):
            try:
                pixels = decode(path)
                break
            except MemoryError:
                raise
            except Exception as error:  # decoders raise anything at all on damaged files
                if seed is None:
                    raise UserError(f"{path}: no picture that can be read ({error})") from error
                damaged = damaged or path
                path, label = self.files[(row + offset) % len(self.files)]
        else:
            raise UserError(f"{path}: no picture of this folder can be read")
        return self.crop(pixels, seed), label, damaged

    def crop(self, pixels: Tensor, seed: int | None) -> Tensor:
        from torchvision.transforms.v2 import functional as transforms

        pixels = transforms.resize(pixels, [self.size * 256 // 224], antialias=True)
        if seed is None:
            return transforms.center_crop(pixels, [self.size, self.size])
        generator = torch.Generator().manual_seed(seed)
        height, width = (side - self.size for side in pixels.shape[-2:])
        top = int(torch.randint(height + 1, (), generator=generator))
        left = int(torch.randint(width + 1, (), generator=generator))
        pixels = pixels[:, top : top + self.size, left : left + self.size]
        flip = torch.rand((), generator=generator) < 0.5
        return pixels.flip(-1) if flip else pixels.contiguous()


def decode(path: str) -> Tensor:
    """A picture file as uint8 (3, H, W), turned as its EXIF says; gray, palette and transparent
    ones become RGB. What kind of file it is its first bytes say, not its name.
    """
    data = Path(path).read_bytes()
    # libjpeg fills what a truncated file lacks with gray and only warns
    if data[:2] == SOI and not is_whole(data):
        raise ValueError("truncated")
    if data.startswith((SOI, PNG)):
        from torchcodec.decoders import decode_image  # slow to import, and CIFAR does without

        with suppress(RuntimeError):  # of a kind of JPEG or PNG that Pillow may know
            return decode_image(data)
    return decode_with_pillow(data)


def decode_with_pillow(data: bytes) -> Tensor:
    """See `decode`. Of an animation, the first picture."""
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        turned = ImageOps.exif_transpose(picture)
        sixteen = turned.mode.startswith("I;16") or (turned.mode, picture.format) == ("I", "PPM")
        if sixteen:  # the upper byte, as of a PNG file
            bits, white_is_zero = tiff_kind(picture)
            gray = np.asarray(turned).astype(np.int32) >> (bits - 8)
            gray = gray.clip(0, 255).astype(np.uint8)
            turned = Image.fromarray(255 - gray if white_is_zero else gray)
        elif turned.mode in ("I", "F"):
            raise ValueError("pixels of 32 bits, of which none is known to be white: save 8 or 16")
        return torch.from_numpy(np.array(turned.convert("RGB"))).permute(2, 0, 1)


def tiff_kind(picture: Image.Image) -> tuple[int, bool]:
    """Of a gray picture of more than 8 bits: how many, and whether 0 is white, as scanners have it,
    neither of which Pillow takes into account.
    """
    tags = getattr(picture, "tag_v2", {})
    bits, photometric = tags.get(258, 16), tags.get(262, 1)
    return (bits[0] if isinstance(bits, tuple) else bits), photometric == 0


PNG = b"\x89PNG"
SOI, EOI, SOS = b"\xff\xd8", b"\xff\xd9", 0xDA  # JPEG's markers: start and end of image, scan


def is_whole(data: bytes) -> bool:
    """Whether a JPEG file has an end after its first scan; cameras may append more to it."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == SOS:
            return data.find(EOI, at) >= 0
        if data[at + 1] == 0xFF:  # padding
            at += 1
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


class Rows:
    """This rank's batches of an epoch, as what `Pictures` is asked for."""

    def __init__(self, num_images: int, batch_size: int, seed: int | None):
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.shards: list[Shard] = []
        self.order: list[int] = list(range(num_images))

    def start(self, epoch: int, skip: int) -> None:
        self.epoch, training = epoch, self.seed is not None
        seed = (self.seed or 0, epoch, STEP)
        self.shards = list(shards(self.num_images, self.batch_size, seed, skip, training))
        if training:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
            self.order = torch.randperm(self.num_images, generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.shards)

    def __iter__(self) -> Iterator[list[tuple[int, int | None]]]:
        for shard in self.shards:
            first = shard.step * self.batch_size
            rows = self.order[first + shard.start : first + shard.stop]
            yield [(row, self._seed_of(row)) for row in rows]

    def _seed_of(self, row: int) -> int | None:
        if self.seed is None:
            return None
        return derived_seed(self.seed, self.epoch, AUGMENTATION, row)


class FolderLoader:
    """Pictures by class; order, crops and flips are drawn from (seed, epoch) alone.

    Without a `seed` they come in order and cropped at the centre. `damaged` are the files that
    could not be read in the last epoch of training.
    """

    def __init__(
        self,
        files,
        config: Config,
        batch_size: int,
        device: torch.device,
        seed: int | None = None,
        workers: int | None = None,
    ):
        self.num_images, self.batch_size, self.device = len(files), batch_size, device
        self.mean = torch.tensor(config.mean, device=device).view(3, 1, 1) * 255
        self.std = torch.tensor(config.std, device=device).view(3, 1, 1) * 255
        self.rows = Rows(len(files), batch_size, seed)
        self.damaged: list[str] = []
        self.class_names: list[str] = []
        self.pictures = Pictures(files, config.image_size)
        workers = default_workers() if workers is None else workers
        self.loader = DataLoader(
            self.pictures,
            batch_sampler=self.rows,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            pin_memory=device.type == "cuda",
            worker_init_fn=partial(start_worker, process.shared_patience()),
        )

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor, Shard]]:
        self.rows.start(epoch, skip)
        self.damaged = []
        batches = zip(self.rows.shards, told_of_memory(self.loader), strict=True)
        for shard, (pixels, labels, damaged, errors) in batches:
            for error in filter(None, errors):
                raise UserError(error)
            self.damaged += filter(None, damaged)
            images = pixels.to(self.device, non_blocking=True)
            images = images.contiguous(memory_format=torch.channels_last)
            images = (images.float() - self.mean) / self.std
            yield images, labels.to(self.device, non_blocking=True), shard

    def picture(self, row: int) -> np.ndarray:
        """One image as an evaluation sees it, uint8 (H, W, 3)."""
        return self.pictures.read(row, None)[0].permute(1, 2, 0).numpy()

    def fingerprint(self) -> str:
        """The same files of the same sizes, the same fingerprint."""
        files = self.pictures.files
        return digest([(path, label, os.path.getsize(path)) for path, label in files])


def told_of_memory(batches: Iterable) -> Iterator:
    """The batches. Raises UserError where workers have no room for theirs, as in a container."""
    try:
        yield from batches
    except (RuntimeError, OSError) as error:
        if any(sign in str(error) for sign in ("Bus error", "shared memory", "No space left")):
            raise UserError(
                "/dev/shm is too small for what --workers read ahead: give the container more "
                "(docker run --shm-size 8g), or take --workers 0, or a smaller --batch_size"
            ) from error
        raise


def default_workers() -> int:
    """A processor each; the ranks of a host share its processors."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(capabilities.cpus() // ranks_here, 16))


def start_worker(patient, worker: int) -> None:
    torch.set_num_threads(1)
    process.listen_in_worker(patient)


def classes(path: Path) -> list[str]:
    """The class folders in path, by name. Raises UserError when there are none."""
    found = sorted(p.name for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
    found = [name for name in found if not is_hidden(name)]
    if not found:
        raise UserError(f"{path}: no folder of pictures, expected {path}/<class>/*.JPEG")
    for name in found:
        if not name.isprintable():
            raise UserError(f"{path}: the folder {name!r} has no printable name: rename it")
    return found


def is_hidden(name: str) -> bool:
    """Whether a file or folder is what programs leave behind: no class and no picture."""
    return name.startswith(".") or name in LEFT_BEHIND


def class_names(
    config: Config, root: Path, known: tuple[str | Path, Sequence[str]] | None = None
) -> list[str]:
    """The classes in the order of the logits: those that a file knows, or those of train/, or of
    val/ where it is alone.

    Raises UserError where there is a folder of another class, or ImageNet's model has too few.
    """
    folders = [root / split for split in ("train", "val") if (root / split).is_dir()]
    listed = classes(folders[0] if folders else root / "train")
    if known is not None:
        file, names = known
        for folder in folders:
            if extra := sorted(set(classes(folder)) - set(names)):
                raise UserError(f"{folder / extra[0]}: a class that {file} does not know")
        return list(names)
    if config.dataset != "Folder" and len(listed) != config.num_classes:
        raise UserError(
            f"{root}: {len(listed)} class folders, and {config.name} tells {config.num_classes} "
            f"classes: {config.name.replace('ImgNet', 'Folder')} takes any number"
        )
    return listed


def places_in(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A folder and those below it with their members, links followed; each once, since links may
    lead in circles.
    """
    seen = set()
    for place, folders, members in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield place, members


def files_of(path: Path, names: Sequence[str]) -> list[tuple[str, int]]:
    """The pictures under path/<class>/ with their classes, numbered as in `names`.

    Says which classes have none, and how many files are left out because of their endings.
    """
    found = classes(path)
    if extra := sorted(set(found) - set(names)):
        raise UserError(f"{path / extra[0]}: a class that is not in {path.parent / 'train'}")
    files, left_out, empty = [], Counter(), []
    for label, name in enumerate(names):
        if name not in found:
            continue
        before = len(files)
        for place, members in sorted(places_in(path / name)):
            inside = Path(place).relative_to(path).parts
            for member in sorted(members):
                if any(map(is_hidden, (*inside, member))):
                    continue
                ending = os.path.splitext(member)[1].lower()
                if ending in ENDINGS:
                    files.append((os.path.join(place, member), label))
                elif not os.path.isdir(os.path.join(place, member)):
                    left_out[ending or member] += 1
        if len(files) == before:
            empty.append(name)
    if not files:
        raise UserError(f"{path}: no pictures, expected {path}/<class>/*.JPEG")
    if ranks.is_main():
        if empty:
            more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
            print(f"{path / empty[0]}{more}: a class without a picture", file=sys.stderr)
        if left_out:
            shown = ", ".join(f"{count} {ending}" for ending, count in left_out.most_common(5))
            print(f"{path}: files left out, which are no pictures: {shown}", file=sys.stderr)
    return files


def first(files: list[tuple[str, int]], count: int) -> list[tuple[str, int]]:
    """The first files, of all classes also where they lie class by class."""
    order = turns(torch.tensor([label for _, label in files], dtype=torch.long))
    return files[:count] if order is None else [files[row] for row in order[:count].tolist()]


def load(
    config: Config, args: argparse.Namespace, device: torch.device, training: bool
) -> tuple[FolderLoader | None, FolderLoader]:
    """Loaders over data_dir/train (None without `training`) and data_dir/val.

    Training: short side to 256, random 224 crop, flip. Evaluation: the same, centre crop.
    """
    root = Path(args.data_dir)
    names = config.class_names or class_names(config, root)
    needs_train = training or args.val_split
    train = files_of(root / "train", names) if needs_train else []
    if args.val_split:
        if args.val_split >= len(train):
            raise UserError(f"--val_split {args.val_split}: there are {len(train)} images in all")
        # the folders are in order of class, so the last N would be of few classes
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
        test = [train[row] for row in chosen[-args.val_split :]]
        train = [train[row] for row in chosen[: -args.val_split]]
    else:
        test = files_of(root / "val", names)
    if args.subset:
        train, test = (first(files, args.subset) for files in (train, test))
    common = {"config": config, "batch_size": args.batch_size, "device": device}
    common["workers"] = args.workers
    train = FolderLoader(train, seed=args.seed, **common) if training else None
    test = FolderLoader(test, **common)
    test.class_names = titles(list(names))
    return train, test


def titles(names: list[str]) -> list[str]:
    """Class names to show: ImageNet's in words, other folders' as they are."""
    if len(names) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in names):
        from torchvision.models import ResNet50_Weights

        return list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
    return names
