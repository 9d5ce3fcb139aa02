"""A user's own pictures, from the base ResNet to the report."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import models
import utils
from engine import storage


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three classes told apart by colour; one training picture cannot be read."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label, colour in enumerate([(220, 30, 30), (30, 220, 30), (30, 30, 220)]):
            folder = root / split / f"class {label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(colour, 40, (80, 96, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    damaged = root / "train" / "class 1" / "3.jpg"
    damaged.write_bytes(damaged.read_bytes()[:500])
    return root


@pytest.fixture(scope="module")
def common(pictures):
    return ["--model", "R18_Folder", "--data_dir", pictures, "--image_size", 64]


def test_all_stages_on_a_folder_of_pictures(run, common, pictures, tmp_path):
    train = ["--batch_size", 12, "--max_epochs", 1]
    base, cl, ft = (tmp_path / name for name in ("base", "cl", "ft"))
    status, _, err = run("pretrain", *common, "--from_scratch", "--lr", 0.05, "--batch_size", 12,
                         "--max_epochs", 6, "--cv_dir", base)  # fmt: skip
    assert status == 0 and "a picture cannot be read and another stood in: " in err, err
    (file,) = base.glob("pk_E_6_A_*.t7")
    content = storage.content(file)
    assert content["state_dict"]["fc.weight"].shape == (3, 512) and content["acc"] > 0.5
    metrics = json.loads((base / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics["damaged_images"] == 1
    given = [*common, "--base", file]
    status, _, err = run("cl_training", *given, *train, "--cv_dir", cl, "--policy_init", "none",
                         "--cl_step", 8)  # fmt: skip
    assert status == 0, err
    status, _, err = run("finetune", *given, *train, "--cv_dir", ft, "--pretrained", cl / "last.t7",
                         "--micro_batch", 5)  # fmt: skip
    assert status == 0, err
    status, out, err = run("test", *common, "--load", ft, "--time", "--batch_size", 4)
    assert status == 0 and "Block Usage" in out and "pixels" not in err, err
    status, _, err = run("test", *common[:-2], "--load", ft, "--batch_size", 4)
    assert status == 0 and "pictures of 64 x 64 pixels" in err and "--image_size 64" in err, err
    status, _, err = run("visualize", *given, "--load", ft, "--out", tmp_path / "report",
                         "--batch_size", 4)  # fmt: skip
    assert status == 0, err
    assert "class 2" in (tmp_path / "report" / "report.html").read_text()


def test_a_policy_network_starts_from_a_file(run, common, tmp_path):
    import torchvision

    torch.manual_seed(0)
    resnet = models.build("R18_Folder", 3)[0]
    storage.write({"state_dict": resnet.state_dict()}, tmp_path / "base.t7")
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "r18.pth")
    options = [*common, "--base", tmp_path / "base.t7", "--batch_size", 12, "--max_epochs", 1]
    status, _, err = run("cl_training", *options, "--lr", 1e-9, "--cv_dir", tmp_path / "cl",
                         "--policy_init", tmp_path / "r18.pth")  # fmt: skip
    assert status == 0, err
    learned = storage.content(tmp_path / "cl")["agent"]["features.blocks.1.0.conv1.weight"]
    published = torch.load(tmp_path / "r18.pth", weights_only=True)["layer2.0.conv1.weight"]
    torch.testing.assert_close(learned, published, rtol=0, atol=1e-6)


def test_micro_batches_learn_what_whole_batches_do(run, common, tmp_path):
    """That gradients add up is tested in test_ranks.py; this is the script."""
    torch.manual_seed(0)
    resnet = models.build("R18_Folder", 3)[0]
    storage.write({"state_dict": resnet.state_dict()}, tmp_path / "base.t7")
    options = [*common, "--base", tmp_path / "base.t7", "--batch_size", 12, "--max_epochs", 1]
    options += ["--policy_init", "none"]
    for name, extra in (("whole", ()), ("micro", ("--micro_batch", 4))):
        status, _, err = run("cl_training", *options, *extra, "--cv_dir", tmp_path / name)
        assert status == 0, err
    lines = [json.loads((tmp_path / n / "metrics.jsonl").read_text()) for n in ("whole", "micro")]
    assert abs(lines[0]["train_sparsity"] - lines[1]["train_sparsity"]) < 0.3


def test_published_flops_of_resnet_101():
    resnet, policy_net = models.build("R101_ImgNet")
    size = (3, 224, 224)
    fixed, per_block = utils.block_flops(resnet, size)
    full = fixed + per_block.sum().item()
    assert f"{full:.2E}" == "1.56E+10"
    # 24.77 of 33 blocks on average, the four that change the shape among them; 1.25E+10 published
    starts = [0, 3, 7, 30]
    droppable = [k for k in range(33) if k not in starts]
    mean = per_block[droppable].mean().item()
    kept = fixed + per_block[starts].sum().item() + (24.77 - 4) * mean
    kept += utils.count_flops(policy_net, size)
    assert kept == pytest.approx(1.25e10, rel=0.03)


@pytest.mark.parametrize("head", ["fc.weight", "fc.0.weight"])
@pytest.mark.parametrize("prefix", ["", "module.", "module.encoder_q."])
def test_a_base_of_other_classes_starts_wrapped_as_well(run, common, tmp_path, prefix, head):
    """The classifier is new anyway, whatever stood there."""
    state = dict(models.build("R18_Folder", 7)[0].state_dict())
    state[head] = state.pop("fc.weight")
    torch.save({"state_dict": {prefix + n: t for n, t in state.items()}}, tmp_path / "x.pth")
    status, _, err = run("pretrain", *common, "--batch_size", 12, "--max_epochs", 1, "--pretrained",
                         tmp_path / "x.pth", "--cv_dir", tmp_path / "run")  # fmt: skip
    assert status == 0, err
