"""Files for the released codes, and what compares these codes with ours."""

import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, refused, script_module
from test_models import random_norms

import models
from engine import UserError, storage

STEPS = "num_batches_tracked"


@pytest.fixture
def recipe(run, tmp_path):
    """recipe(content, *options) -> (status, out, err) and the folder that was written."""

    def call(content, *options):
        torch.save(content, tmp_path / "own.t7")
        command = ["recipes/to_released", tmp_path / "own.t7", tmp_path / "out", *options]
        return run(*command), tmp_path / "out"

    return call


def own(model="R32_C10", **more):
    torch.manual_seed(0)
    resnet, policy_net = (random_norms(net.half().float()) for net in models.build(model))
    halved = {n: t.half() if t.ndim > 1 else t for n, t in policy_net.state_dict().items()}
    content = {"agent": halved, "resnet": resnet.state_dict(), "model": model, "epoch": 7}
    return content | {"stage": 2, "policy_size": 32} | more


def test_both_files_are_as_the_released_code_reads_them(recipe):
    content = own()
    (status, out, err), folder = recipe(content)
    assert status == 0, err
    checkpoint = folder / "ckpt_E_7.t7"
    base = folder / "cv" / "pretrained" / "R32_C10" / "pk_E_164_A_0.923.t7"
    assert out.split() == [str(checkpoint), str(base)]
    for path in (checkpoint, base):
        assert not zipfile.is_zipfile(path)  # torch 1.1 reads the format before 1.6
    written = torch.load(checkpoint, weights_only=True)
    assert written["epoch"] == 7 and {"reward", "acc"} < written.keys()
    for part in ("agent", "resnet"):
        expected = {n: t.float() for n, t in content[part].items() if STEPS not in n}
        assert written[part].keys() == expected.keys()
        for name, tensor in written[part].items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name])
    layers = torch.load(base, weights_only=True)["state_dict"]
    # its reader of bases takes these names apart and knows no others
    assert {name.split(".")[0] for name in layers} == {
        *("conv1", "bn1", "fc", "layer1", "layer2", "layer3")
    }
    assert torch.equal(
        layers["layer2.3.conv2.weight"], content["resnet"]["blocks.1.3.conv2.weight"]
    )
    resnet, _ = models.build("R32_C10")
    storage.read(base).load_into(resnet)
    assert torch.equal(resnet.fc.weight, content["resnet"]["fc.weight"])


def test_projections_have_torchvisions_names(recipe):
    (status, _, err), folder = recipe(own("R101_ImgNet", policy_size=224))
    assert status == 0, err
    base = folder / "cv" / "pretrained" / "R101_ImgNet" / "ImageNet_R101_224_76.464"
    layers = torch.load(base, weights_only=True)["state_dict"]
    assert layers["layer3.0.downsample.0.weight"].shape == (1024, 512, 1, 1)
    assert "layer3.0.downsample.1.running_var" in layers


def test_convnet_aig_is_as_its_released_code_reads_it(run, tmp_path):
    path = ROOT / "cv" / "AIG32_C10" / "target0.6"
    status, out, err = run("recipes/to_released", path, tmp_path)
    assert status == 0, err
    assert "ResNet_cifar(BasicBlock, [5, 5, 5])" in out
    state = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)["state_dict"]
    assert state["module.layer3.4.fc1.weight"].shape == (16, 64, 1, 1)
    assert "module.layer2.0.shortcut.1.running_mean" in state and "module.linear.bias" in state
    (net, _), (other, _) = models.build("AIG32_C10"), models.build("AIG32_C10")
    storage.read(path).load_into(net)
    models.load_gated(other, state)
    for name, tensor in net.state_dict().items():
        assert STEPS in name or torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize(
    "more, words",
    [
        ({"policy_size": 16}, "looks at 16 pixels"),
        ({"shortcuts": "subsample"}, "shortcuts"),
        ({"normalisation": [[0.5] * 3, [0.2] * 3]}, "0.5,0.5,0.5"),
        ({"model": None}, "names no model"),
        ({"agent": None}, "no policy network"),
    ],
)
def test_what_the_released_code_cannot_run_is_refused(recipe, more, words):
    content = {name: value for name, value in (own() | more).items() if value is not None}
    result, folder = recipe(content)
    refused(result, words)
    assert not folder.exists()


def test_a_model_that_the_released_code_has_not_is_refused(recipe):
    result, _ = recipe(own("R14_C10"))
    refused(result, "R14_C10", "R32_C10, R110_C10")


@pytest.fixture
def released(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return script_module("benchmarks/released")


def test_figures_are_compared_as_they_are_printed(released):
    printed = "loaded\n    Accuracy: 0.919\n    Block Usage: 6.700 ± 0.776 \n    other: 1\n"
    theirs = released.lines(printed)
    assert theirs == {"Accuracy": "0.919", "Block Usage": "6.700 ± 0.776"}
    assert released.row("stage 2", theirs, dict(theirs))["same"]
    assert not released.row("stage 2", theirs, theirs | {"Accuracy": "0.918"})["same"]


def test_tensors_are_compared_by_name(released):
    theirs = {"a": np.array([3.0]), "b": np.array([[4.0]])}
    mine = {"b": torch.tensor([[4.0]]), "a": torch.tensor([3.5])}
    assert released.relative(theirs, mine) == pytest.approx(0.1)
    with pytest.raises(UserError, match="other tensors"):
        released.relative(theirs, {"a": mine["a"]})


def test_noise_is_what_was_given(released):
    noise = torch.rand(4, 6)
    shard = released.whole_batch(noise, 4)
    assert torch.equal(shard.noise(6), noise) and shard.share == 1
    assert torch.equal(shard.noise(1, 6).transpose(0, 1)[0], noise)


def test_one_without_the_other_is_refused(run):
    refused(run("benchmarks/released", "--blockdrop", ROOT), "--python27")


def test_a_folder_that_is_there_is_left_alone(run, tmp_path):
    own = tmp_path / "own.txt"
    own.touch()
    checkout = ["--blockdrop", ROOT, "--python27", ROOT]
    refused(run("benchmarks/released", *checkout, "--work", tmp_path), tmp_path, "another --work")
    assert own.exists()
