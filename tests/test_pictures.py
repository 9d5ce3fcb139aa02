"""What counts as a picture and as a class, and what a picture's pixels are."""

import io
import json
import os
import shutil
import struct

import numpy as np
import pytest
from PIL import Image

import engine
import models
from engine import UserError, pictures, storage

RED, GREEN, BLUE = (220, 30, 30), (30, 220, 30), (30, 30, 220)


def decoded(path):
    return pictures.decode(str(path)).permute(1, 2, 0).numpy()


@pytest.fixture
def gray():
    """Gray values of 16 bits (H, W)."""
    return np.random.default_rng(0).integers(0, 2**16, (48, 64), dtype=np.uint16)


@pytest.mark.parametrize("name", ["x.tif", "x.tiff", "x.pgm", "x.jp2", "x.png", "x.dat"])
def test_sixteen_bits_are_scaled_alike(gray, tmp_path, name):
    """The upper byte, whatever the file."""
    kind = {"pgm": "PPM", "jp2": "JPEG2000", "png": "PNG"}.get(name[2:], "TIFF")
    options = {"irreversible": False} if kind == "JPEG2000" else {}
    picture = Image.fromarray(gray if kind != "PPM" else gray.astype(np.int32))
    picture.save(tmp_path / name, format=kind, **options)
    found = decoded(tmp_path / name).astype(int)
    assert (found == found[..., :1]).all()
    assert abs(found[..., 0] - gray / 257).max() <= 1


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_known_white_are_refused(gray, tmp_path, dtype):
    folder = tmp_path / "val" / "a"
    folder.mkdir(parents=True)
    Image.fromarray(gray.astype(dtype)).save(folder / "x.tif")
    with pytest.raises(ValueError, match="32 bits"):
        pictures.decode(str(folder / "x.tif"))
    loader = pictures.Pictures([(str(folder / "x.tif"), 0)], 32)
    with pytest.raises(UserError, match="x.tif: no picture that can be read .*32 bits"):
        loader.read(0, None)


LOSSLESS = (  # a gray JPEG of 6 x 4 pixels, predictor 1, 8 bits
    "ffd8ffc40017000101010100000000000000000000000005040608ffc3000b080004000601"
    "001100ffda0008010000060000e7fa28a28a350a28a28a6a14514514d428a28a28ffd9"
)


def test_a_lossless_gray_jpeg_is_read(tmp_path):
    """torchcodec does not read it, which Pillow does."""
    (tmp_path / "x.jpg").write_bytes(bytes.fromhex(LOSSLESS))
    expected = np.add.outer(np.arange(4) * 40, np.arange(6) * 8)
    assert (decoded(tmp_path / "x.jpg") == expected[..., None]).all()


FORMATS = {
    "png": {}, "bmp": {}, "tiff": {}, "gif": {}, "ppm": {}, "webp": {"lossless": True},
    "jpeg2000": {"irreversible": False}, "jpeg": {"quality": 100}, "avif": {"quality": 100},
}  # fmt: skip


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.bmp", "x"])
@pytest.mark.parametrize("kind", FORMATS)
def test_first_bytes_decide_not_the_name(tmp_path, kind, name):
    picture = Image.new("RGB", (40, 24), (200, 100, 50))
    picture.save(tmp_path / name, format=kind, **FORMATS[kind])
    found = decoded(tmp_path / name)
    assert found.shape == (24, 40, 3)
    assert abs(found.astype(int) - (200, 100, 50)).max() <= 4


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_of_an_animation_the_first_picture_counts(tmp_path, kind):
    first, *more = (Image.new("RGB", (40, 24), colour) for colour in (RED, GREEN, BLUE))
    first.save(tmp_path / "x.jpg", format=kind, save_all=True, append_images=more)
    assert abs(decoded(tmp_path / "x.jpg").astype(int) - RED).max() <= 12


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp", "avif"])
def test_pictures_are_turned_as_exif_says(tmp_path, kind, turned):
    """A red corner, which the eight orientations put into four places of a wide or high picture."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :32] = 255
    exif = Image.Exif()
    exif[274] = turned
    options = {"jpeg": {"quality": 100}, "webp": {"lossless": True}, "avif": {"quality": 100}}
    Image.fromarray(pixels).save(tmp_path / "x", format=kind, exif=exif, **options.get(kind, {}))
    found = decoded(tmp_path / "x")[..., 0] > 127
    expected = pixels[..., 0] > 127
    by_hand = {
        1: expected, 2: expected[:, ::-1], 3: expected[::-1, ::-1], 4: expected[::-1],
        5: expected.T, 6: expected.T[:, ::-1], 7: expected.T[::-1, ::-1], 8: expected.T[::-1],
    }  # fmt: skip
    assert found.shape == by_hand[turned].shape
    assert (found == by_hand[turned]).mean() > 0.97


def test_a_picture_that_is_too_large_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "val" / "a"
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(folder / "x.tif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="x.tif: no picture that can be read .*1600 pixels"):
        pictures.Pictures([(str(folder / "x.tif"), 0)], 32).read(0, None)


@pytest.mark.parametrize("kind", ["tiff", "bmp", "gif", "webp", "avif", "jpeg2000", "ppm", "png"])
def test_damaged_pictures_are_named_whatever_they_are(tmp_path, kind):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format=kind)
    raw = buffer.getvalue()
    for part in (raw[: len(raw) // 2], raw[:20], b""):
        (tmp_path / "x.jpg").write_bytes(part)
        with pytest.raises(UserError, match="x.jpg: no picture that can be read"):
            pictures.Pictures([(str(tmp_path / "x.jpg"), 0)], 32).read(0, None)


def write(folder, colour, count=3, ending="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (40, 40), colour).save(folder / f"{i}.{ending}", format=None)


def test_hidden_names_are_no_classes_and_no_pictures(tmp_path):
    for name, colour in (("a", RED), ("b", GREEN)):
        write(tmp_path / "train" / name, colour)
    for name in (".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir"):
        (tmp_path / "train" / name).mkdir()
    for hidden in ("._0.png", ".DS_Store", ".cache/0.png", "__MACOSX/0.png"):
        path = tmp_path / "train" / "a" / hidden
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no picture")
    assert pictures.classes(tmp_path / "train") == ["a", "b"]
    files = pictures.files_of(tmp_path / "train", ["a", "b"])
    assert [label for _, label in files] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("ending", ["jfif", "gif", "avif", "JPG", "TIF", "webp", "bmp", "jp2"])
def test_pictures_of_many_endings_count(tmp_path, ending):
    write(tmp_path / "a", RED, ending=ending)
    files = pictures.files_of(tmp_path, ["a"])
    assert len(files) == 3
    assert abs(decoded(files[0][0]).astype(int) - RED).max() <= 12


def test_what_is_left_out_is_told(tmp_path, capsys):
    write(tmp_path / "a", RED)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("")
    for name in ("1.heic", "2.HEIC", "x.mp4"):
        (tmp_path / "a" / name).write_bytes(b"")
    assert len(pictures.files_of(tmp_path, ["a", "b"])) == 3
    err = capsys.readouterr().err
    assert f"{tmp_path / 'b'}: a class without a picture" in err
    assert "files left out, which are no pictures: 2 .heic, 1 " in err


def test_pictures_come_in_torchvisions_order(tmp_path):
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    for place in ("b", "a", "a/x", "a/x-y", "a/x/z", "b/A", "c d"):
        write(tmp_path / place, RED, 2)
    names = pictures.classes(tmp_path)
    numbers = {name: number for number, name in enumerate(names)}
    assert pictures.files_of(tmp_path, names) == make_dataset(
        str(tmp_path), numbers, IMG_EXTENSIONS
    )


@pytest.fixture
def classes(tmp_path):
    """Three classes told apart by colour, and a base ResNet that knows them well."""
    for split in ("train", "val"):
        for name, colour in (("apple", RED), ("leaf", GREEN), ("sea", BLUE)):
            write(tmp_path / "data" / split / name, colour, 6 if split == "train" else 2)
    return tmp_path


def given(classes):
    return ["--model", "R18_Folder", "--data_dir", classes / "data", "--image_size", 64,
            "--workers", 0]  # fmt: skip


@pytest.fixture
def base(classes, run):
    options = [*given(classes), "--from_scratch", "--lr", 0.02, "--batch_size", 6]
    status, _, err = run("pretrain", *options, "--max_epochs", 4, "--cv_dir", classes / "0")
    assert status == 0, err
    (file,) = (classes / "0").glob("pk_*.t7")
    found = storage.read(file)
    assert list(found.class_names) == ["apple", "leaf", "sea"]
    return file


def accuracy(run, classes, *options):
    figures = classes / "figures.json"
    status, _, err = run("test", *given(classes), *options, "--json", figures)
    return (json.loads(figures.read_text())["accuracy"], err) if status == 0 else (None, err)


def test_labels_go_by_the_names_of_classes(classes, base, run):
    known, _ = accuracy(run, classes, "--base", base)
    assert known >= 0.8
    # a name that sorts elsewhere would shift every label
    for split in ("train", "val"):
        (classes / "data" / split / "sea").rename(classes / "data" / split / "abyss")
    for options in (["--base", base], ["--load", base]):
        _, err = accuracy(run, classes, *options)
        assert "abyss: a class that" in err and "does not know" in err and err.count("\n") == 1
    for split in ("train", "val"):
        (classes / "data" / split / "abyss").rename(classes / "data" / split / "sea")
    # some of the classes, without train/
    shutil.rmtree(classes / "data" / "train")
    shutil.rmtree(classes / "data" / "val" / "apple")
    some, _ = accuracy(run, classes, "--base", base)
    assert some >= 0.7


def test_every_stage_keeps_the_names(classes, base, run):
    onnx = pytest.importorskip("onnx")
    once = [*given(classes), "--batch_size", 6, "--max_epochs", 1]
    steps = (
        ("cl_training", ["--base", base, "--policy_init", "none", "--cv_dir", classes / "1"]),
        ("finetune", ["--base", base, "--pretrained", classes / "1", "--cv_dir", classes / "2"]),
    )
    for script, options in steps:
        status, _, err = run(script, *once, *options)
        assert status == 0, err
    (classes / "data" / "val" / "apple").rename(classes / "data" / "val" / "Apple")
    for script, folder in (("cl_training", "1"), ("finetune", "2")):
        assert list(storage.read(classes / folder).class_names) == ["apple", "leaf", "sea"]
        options = ["--resume", "--cv_dir", classes / folder]
        more = ["--base", base, "--pretrained", classes / "1"] if script == "finetune" else []
        status, _, err = run(script, *once[:-1], 2, *options, *more)
        assert status == 2 and "Apple: a class that" in err, err
    (classes / "data" / "val" / "Apple").rename(classes / "data" / "val" / "apple")
    status, _, err = run("export", *given(classes), "--load", classes / "2", "--out",
                         classes / "x.onnx")  # fmt: skip
    assert status == 0, err
    facts = {p.key: p.value for p in onnx.load(classes / "x.onnx").metadata_props}
    assert json.loads(facts["classes"]) == ["apple", "leaf", "sea"]


def test_a_new_base_learns_other_classes(classes, base, run):
    """What --pretrained knows of classes is not what the folder has."""
    for split in ("train", "val"):
        (classes / "data" / split / "sea").rename(classes / "data" / split / "abyss")
    options = [*given(classes), "--batch_size", 6, "--max_epochs", 1, "--pretrained", base]
    status, _, err = run("pretrain", *options, "--cv_dir", classes / "new")
    assert status == 0, err
    assert list(storage.read(classes / "new").class_names) == ["abyss", "apple", "leaf"]


def test_cifars_checkpoints_name_their_classes(stage_1):
    assert list(storage.read(stage_1).class_names) == list(models.config("R14_C10").class_names)
    assert (
        engine.data.DATA_SETS["CIFAR100"].classes == list(models.config("R32_C100").class_names)
        or tuple(engine.data.DATA_SETS["CIFAR100"].classes) == models.config("R32_C100").class_names
    )


def test_links_in_circles_count_once(tmp_path, capsys):
    write(tmp_path / "a", RED)
    write(tmp_path / "a" / "more", GREEN, 2)
    (tmp_path / "a" / "self").symlink_to(".")
    (tmp_path / "a" / "more" / "up").symlink_to("..")
    (tmp_path / "a" / "again").symlink_to("more")
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere, BLUE, 4)
    (tmp_path / "a" / "linked").symlink_to(elsewhere)
    assert len(pictures.files_of(tmp_path / ".", ["a", "elsewhere"])) == 3 + 2 + 4 + 4
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize("bits, white_is_zero", [(16, False), (16, True), (12, False)])
def test_scanners_pictures_are_neither_dark_nor_negatives(tmp_path, bits, white_is_zero):
    """Pillow tells neither of 12 bits nor that 0 is white."""
    ramp = np.linspace(0, 2**bits - 1, 64).astype(np.uint16)
    stored = 2**bits - 1 - ramp if white_is_zero else ramp
    rows = np.broadcast_to(stored, (48, 64)).astype("<u2")
    tags = [(256, 4, 64), (257, 4, 48), (258, 3, bits), (259, 3, 1),
            (262, 3, int(not white_is_zero)), (273, 4, 8), (277, 3, 1), (278, 4, 48)]  # fmt: skip
    data = rows.tobytes() if bits == 16 else packed_12(rows)
    tags.append((279, 4, len(data)))
    content = struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags))
    for tag, kind, value in tags:
        content += struct.pack("<HHII", tag, kind, 1, value)
    (tmp_path / "x.tif").write_bytes(content + bytes(4))
    found = decoded(tmp_path / "x.tif")[0, :, 0].astype(int)
    assert abs(found - np.linspace(0, 255, 64)).max() <= 1.5


def packed_12(rows):
    """Rows of 12-bit numbers as TIFF packs them: two in three bytes, high bits first."""
    first, second = rows[:, ::2].astype(int), rows[:, 1::2].astype(int)
    parts = (first >> 4, (first & 15) << 4 | second >> 8, second & 255)
    return np.stack(parts, -1).astype(np.uint8).tobytes()


def test_a_folder_without_a_printable_name_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    os.makedirs(os.fsencode(tmp_path / "train") + b"/caf\xe9")
    with pytest.raises(UserError, match="no printable name: rename it"):
        pictures.classes(tmp_path / "train")
