"""CIFAR as PNG files in class folders, unpacked or in the archive that holds them."""

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .process import UserError, reason, user_errors

SPLITS = ("train", "test")
IMAGES = {"train": 50_000, "test": 10_000}  # of the published data set, as many of each class

Files = dict[str, Callable[[], bytes]]  # by name, such as train/apple/apple_s_000027.png


def find(data_dir: Path, name: str, classes: Sequence[str]) -> Path | None:
    """Where the class folders are: data_dir itself, or `name` or `name`.tar.gz in it; or None."""
    if data_dir.is_file():
        return data_dir
    for folder in (data_dir, data_dir / name):
        if any((folder / split / label).is_dir() for split in SPLITS for label in classes):
            return folder
    archive = data_dir / f"{name}.tar.gz"
    return archive if archive.is_file() else None


def read(path: Path, classes: Sequence[str], check: bool = True) -> dict[str, Tensor]:
    """train_images, test_images (N, 32, 32, 3) and train_labels, test_labels (N,), all uint8.

    Labels are numbers of `classes`; images come class by class, in each by the names of the files.
    With `check` there have to be as many of each class as published. Raises UserError naming the
    file that is damaged or of another size, or the class that has too few or too many.
    """
    files = archived(path) if path.is_file() else unpacked(path)
    labels = {label: number for number, label in enumerate(classes)}
    check_classes(path, files, classes, check)
    arrays = {}
    with tqdm(total=len(files), desc=f"decoding {path.name}", disable=None, leave=False) as bar:
        for split in SPLITS:
            chosen = sorted(
                (labels[name.split("/")[1]], name) for name in files if name.startswith(split)
            )
            images = np.empty((len(chosen), 32, 32, 3), np.uint8)
            for row, (_, name) in enumerate(chosen):
                images[row] = decode(f"{path}/{name}", files[name])
                bar.update()
            arrays[f"{split}_images"] = torch.from_numpy(images)
            arrays[f"{split}_labels"] = torch.tensor([n for n, _ in chosen], dtype=torch.uint8)
    return arrays


def unpacked(folder: Path) -> Files:
    """The PNG files of a folder; hidden ones, which file managers leave, do not count."""
    with user_errors(folder):
        paths = [path for split in SPLITS for path in folder.glob(f"{split}/*/*.png")]
    return {
        path.relative_to(folder).as_posix(): path.read_bytes
        for path in paths
        if not path.name.startswith(".")
    }


def archived(archive: Path) -> Files:
    """The PNG files of a tar archive, in memory; folders above train/ and test/ do not count."""
    files: Files = {}
    size = archive.stat().st_size
    try:
        with (
            tqdm(total=size, desc=archive.name, unit="B", unit_scale=True, disable=None,
                 leave=False) as bar,
            open(archive, "rb") as raw,
            tarfile.open(fileobj=raw, mode="r:*") as tar,
        ):  # fmt: skip
            for member in tar:
                parts = PurePosixPath(member.name).parts[-3:]
                is_png = parts[-1:] and parts[-1].endswith(".png") and parts[-1][0] != "."
                if member.isfile() and is_png and len(parts) == 3 and parts[0] in SPLITS:
                    content = tar.extractfile(member).read()
                    files["/".join(parts)] = lambda content=content: content
                bar.update(raw.tell() - bar.n)
    except PermissionError as error:
        raise UserError(f"{archive}: {error.strerror}") from error
    except Exception as error:  # a damaged archive raises anything that its decoders do
        raise UserError(
            f"{archive}: truncated, damaged or no tar archive ({reason(error)}): fetch it again"
        ) from error
    return files


def check_classes(path: Path, files: Files, classes: Sequence[str], check: bool) -> None:
    """Raise UserError for folders of no class, and with `check` unless all images are there."""
    counts = {f"{split}/{label}": 0 for split in SPLITS for label in classes}
    for name in files:
        folder = name.rpartition("/")[0]
        if folder not in counts:
            raise UserError(f"{path}/{folder}: no class of this data set: move the folder away")
        counts[folder] += 1
    for split in SPLITS:
        if not any(name.startswith(split) for name in files):
            raise UserError(f"{path}: no {split}/<class>/*.png: unpack or fetch it again")
    wrong = {
        folder: expected
        for folder in counts
        if counts[folder] != (expected := IMAGES[folder.split("/")[0]] // len(classes))
    }
    if check and wrong:
        folder, expected = next(iter(wrong.items()))
        others = f" ({len(wrong) - 1} more classes differ)" if len(wrong) > 1 else ""
        raise UserError(
            f"{path}/{folder}: {counts[folder]} images, published are {expected}{others}: unpack "
            "or fetch it again, or accept it with --skip_data_check"
        )


def decode(name: str, content: Callable[[], bytes]) -> np.ndarray:
    """A PNG file of 32 x 32 RGB pixels as uint8 (32, 32, 3)."""
    with user_errors(name):
        data = content()
    try:
        # decoding skips the checksums, verifying reads nothing else
        Image.open(io.BytesIO(data), formats=["PNG"]).verify()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.load()
    except Exception as error:  # PIL's decoders raise anything at all on damaged files
        raise UserError(
            f"{name}: damaged, or no PNG file ({reason(error)}): fetch it again"
        ) from error
    if picture.size != (32, 32) or picture.mode != "RGB":
        size = "x".join(map(str, picture.size))
        raise UserError(f"{name}: {size} pixels in {picture.mode}, expected 32x32 in RGB")
    return np.asarray(picture)


def turns(labels: Tensor) -> Tensor | None:
    """The order (N,) of images that lie class by class in which they come in turns of one a class.

    labels: (N,). None where they do not lie so. --subset and --val_split take the first and the
    last images: in this order they are of all classes.
    """
    if (labels[1:] < labels[:-1]).any():
        return None
    number_in_class = torch.arange(len(labels)) - torch.searchsorted(labels, labels)
    return number_in_class.argsort(stable=True)
