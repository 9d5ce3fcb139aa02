"""CIFAR-100 as PNG files: read from wherever they lie, and a sentence on each kind of damage."""

import hashlib
import pickle
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import engine
from engine import UserError, cifar, class_folders
from engine.data import mixed

CLASSES = cifar.CLASS_NAMES["CIFAR100"]
EACH = {"train": 2, "test": 1}  # images of a class
PNGS = "cifar100-png"


@pytest.fixture(scope="module")
def invented(tmp_path_factory):
    """300 images in class folders, and their arrays by split."""
    root = tmp_path_factory.mktemp("pngs")
    rng = np.random.default_rng(0)
    arrays = {}
    for split, each in EACH.items():
        pixels = rng.integers(0, 256, (100, each, 32, 32, 3), dtype=np.uint8)
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                Image.fromarray(pixels[label, i]).save(root / split / name / f"{name}_{i}.png")
        arrays[f"{split}_images"] = pixels.reshape(-1, 32, 32, 3)
        arrays[f"{split}_labels"] = np.arange(100).repeat(each).astype(np.uint8)
    return root, arrays


@pytest.fixture
def published(invented, monkeypatch):
    """Make the invented images the published data set."""
    folder, arrays = invented
    sums = tuple(hashlib.sha256(arrays[part].tobytes()).hexdigest() for part in cifar.PARTS)
    source = replace(cifar.SOURCES["CIFAR100"], png_sha256=sums)
    monkeypatch.setitem(cifar.SOURCES, "CIFAR100", source)
    images = {split: 100 * each for split, each in EACH.items()}
    monkeypatch.setattr(class_folders, "IMAGES", images)
    return folder, arrays


@pytest.fixture
def copy(published, tmp_path):
    """A copy of the class folders, to be damaged."""
    return shutil.copytree(published[0], tmp_path / "data")


def pack(folder, archive, above=""):
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for split in ("train", "test"):
            tar.add(folder / split, f"{above}{split}")
    return archive


def unpacked(folder, root):
    return shutil.copytree(folder, root / "pngs")


def unpacked_below(folder, root):
    shutil.copytree(folder, root / "data" / PNGS)
    return root / "data"


def archive_below(folder, root):
    return pack(folder, root / "data" / f"{PNGS}.tar.gz").parent


def archive_named(folder, root):
    return pack(folder, root / "other.tar.gz", above="./some/folders/")


WAYS = [unpacked, unpacked_below, archive_below, archive_named]


@pytest.mark.parametrize("way", WAYS)
def test_images_are_read_from_where_they_lie_and_cached(way, published, tmp_path):
    folder, expected = published
    data_dir = way(folder, tmp_path)
    for _ in range(2):  # the second time from the cache, the files are gone then
        arrays = cifar.load("CIFAR100", data_dir)
        for part in cifar.PARTS:
            assert arrays[part].dtype == torch.uint8
            assert np.array_equal(arrays[part].numpy(), expected[part])
        for path in [*data_dir.rglob("*.png"), *data_dir.rglob("*.tar.gz")]:
            path.unlink()
    assert (tmp_path / "CIFAR100.pt" if data_dir.is_file() else data_dir / "CIFAR100.pt").exists()


def spoil_checksum(folder):
    path = folder / "train" / "bear" / "bear_1.png"
    data = bytearray(path.read_bytes())
    data[data.index(b"IEND") - 5] ^= 1  # the last byte of the pixels' checksum
    path.write_bytes(data)


def truncate_picture(folder):
    path = folder / "test" / "worm" / "worm_0.png"
    path.write_bytes(path.read_bytes()[:200])


def save(mode, size):
    def damage(folder):
        Image.new(mode, size).save(folder / "train" / "apple" / "apple_0.png")

    return damage


def take_one_away(folder):
    (folder / "train" / "bee" / "bee_0.png").unlink()


def take_two_away(folder):
    take_one_away(folder)
    (folder / "test" / "fox" / "fox_0.png").unlink()


def add_one(folder):
    save("RGB", (32, 32))(folder)
    shutil.copy(folder / "test/apple/apple_0.png", folder / "test/fox/more.png")


def drop_class(folder):
    shutil.rmtree(folder / "train" / "cloud")


def drop_split(folder):
    shutil.rmtree(folder / "test")


def add_class(folder):
    shutil.copytree(folder / "train" / "fox", folder / "train" / "unicorn")


DAMAGES = [
    (spoil_checksum, "train/bear/bear_1.png: damaged, or no PNG file .*checksum"),
    (truncate_picture, "test/worm/worm_0.png: damaged, or no PNG file"),
    (save("RGB", (31, 32)), "train/apple/apple_0.png: 31x32 pixels in RGB, expected 32x32"),
    (save("L", (32, 32)), "train/apple/apple_0.png: 32x32 pixels in L, expected 32x32 in RGB"),
    (save("RGB", (32, 32)), "the train images are not the published ones"),
    (take_one_away, "train/bee: 1 images, published are 2: unpack or fetch"),
    (take_two_away, r"train/bee: 1 images, published are 2 \(1 more classes differ\)"),
    (add_one, "test/fox: 2 images, published are 1: unpack or fetch"),
    (drop_class, "train/cloud: 0 images, published are 2: unpack or fetch"),
    (drop_split, "no test/<class>/.*png: unpack or fetch it again"),
    (add_class, "train/unicorn: no class of this data set"),
]


@pytest.mark.parametrize("damage, message", DAMAGES, ids=[d.__name__ for d, _ in DAMAGES])
def test_damage_is_named_in_a_line_and_not_cached(damage, message, copy):
    damage(copy)
    with pytest.raises(UserError, match=message) as error:
        cifar.load("CIFAR100", copy)
    assert str(copy) in str(error.value) and "\n" not in str(error.value)
    assert not (copy / "CIFAR100.pt").exists()


def test_damage_within_an_archive_is_named(copy, tmp_path):
    spoil_checksum(copy)
    archive = pack(copy, tmp_path / "a.tar.gz")
    with pytest.raises(UserError, match="a.tar.gz/train/bear/bear_1.png: damaged"):
        cifar.load("CIFAR100", archive)


@pytest.mark.parametrize("size", [0, 100, 40_000])
def test_a_truncated_archive_is_named(size, published, tmp_path):
    archive = pack(published[0], tmp_path / f"{PNGS}.tar.gz")
    archive.write_bytes(archive.read_bytes()[:size])
    with pytest.raises(UserError, match="png.tar.gz: truncated, damaged") as error:
        cifar.load("CIFAR100", tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "CIFAR100.pt").exists()


def test_what_file_managers_leave_does_not_count(copy, tmp_path):
    for name in (".DS_Store", "._apple_0.png", "Thumbs.db"):
        (copy / "train" / "apple" / name).write_bytes(b"?")
    archive = pack(copy, tmp_path / "a.tar.gz")
    for data_dir in (copy, archive):
        assert len(cifar.load("CIFAR100", data_dir)["train_images"]) == 200


def test_fewer_images_are_accepted_unchecked(copy):
    drop_class(copy)
    arrays = cifar.load("CIFAR100", copy, check=False)
    expected = [label for label, name in enumerate(CLASSES) if name != "cloud" for _ in range(2)]
    assert arrays["train_labels"].tolist() == expected
    add_class(copy)
    with pytest.raises(UserError, match="unicorn"):
        cifar.load("CIFAR100", copy, check=False)


def test_the_sum_of_a_set_does_not_see_its_order(published, tmp_path):
    """The same images as torchvision's files, whose order is another."""
    folder, arrays = published
    (tmp_path / "cifar-100-python").mkdir()
    rng = np.random.default_rng(1)
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        order = rng.permutation(len(labels))
        rows = images[order].transpose(0, 3, 1, 2).reshape(len(order), -1)
        batch = {"data": rows, "fine_labels": labels[order].tolist()}
        (tmp_path / "cifar-100-python" / split).write_bytes(pickle.dumps(batch, protocol=2))
    ours = cifar.load("CIFAR100", folder, check=False)
    theirs = cifar.load("CIFAR100", tmp_path, check=False)
    for split in ("train", "test"):
        images, labels = theirs[f"{split}_images"], theirs[f"{split}_labels"]
        assert not torch.equal(labels, ours[f"{split}_labels"])
        of_set = cifar.digest_in_any_order(images, labels)
        mine = cifar.digest_in_any_order(ours[f"{split}_images"], ours[f"{split}_labels"])
        assert of_set == mine
        labels[0] += 1
        assert cifar.digest_in_any_order(images, labels) != mine


def test_images_of_class_after_class_come_in_turns():
    labels = torch.tensor([0, 0, 0, 2, 5, 5], dtype=torch.uint8)
    rows, mixed_labels = mixed(torch.arange(6), labels)
    assert rows.tolist() == [0, 3, 4, 1, 5, 2]
    assert mixed_labels.tolist() == [0, 2, 5, 0, 5, 0]
    rows, _ = mixed(torch.arange(6), labels.flip(0))
    assert rows.tolist() == list(range(6))


def test_a_training_runs_on_the_archive_as_it_lies(published, run, tmp_path):
    pack(published[0], tmp_path / f"{PNGS}.tar.gz")
    options = ["--model", "R14_C100", "--data_dir", tmp_path, "--max_epochs", 1, "--subset", 100]
    status, _, err = run("pretrain", *options, "--cv_dir", tmp_path / "run")
    assert status == 0, err
    args = engine.storage.content(tmp_path / "run")["args"]
    assert args["model"] == "R14_C100"

    (tmp_path / "CIFAR100.pt").unlink()
    (tmp_path / f"{PNGS}.tar.gz").write_bytes(b"nothing")
    status, _, err = run("pretrain", *options, "--cv_dir", tmp_path / "other")
    assert status == 2 and err.count("\n") == 1 and "tar.gz: truncated, damaged" in err
