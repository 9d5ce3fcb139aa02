"""Checkpoint files: whole or not at all, and one line about every bad one."""

import argparse
import collections
import os
import pickle
import subprocess
import sys
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import torch

import engine
import models
from engine import UserError, bases, storage


def test_written_is_read(tmp_path):
    content = {"agent": {"w": torch.arange(3.0)}, "epoch": 7, "args": {"lr": 0.1, "load": None}}
    storage.write(content, tmp_path / "a.t7")
    loaded = storage.content(tmp_path / "a.t7")
    assert loaded["epoch"] == 7 and loaded["args"] == content["args"]
    assert torch.equal(loaded["agent"]["w"], content["agent"]["w"])
    assert os.listdir(tmp_path) == ["a.t7"]


def test_a_directory_stands_for_its_last_checkpoint(tmp_path):
    storage.write({"epoch": 3}, tmp_path / "last.t7")
    assert storage.content(tmp_path)["epoch"] == 3


def test_a_directory_stands_for_its_newest_or_only_checkpoint(tmp_path):
    first, second = tmp_path / "ckpt_E_1.t7", tmp_path / "ckpt_E_2.t7"
    storage.write({"epoch": 1}, first)
    assert storage.content(tmp_path)["epoch"] == 1
    base = tmp_path / "base" / "pk_E_9_A_0.100.t7"
    base.parent.mkdir()
    storage.write({"epoch": 9}, base)
    assert storage.content(base.parent)["epoch"] == 9
    storage.write({"epoch": 2}, second)
    with pytest.raises(UserError, match="last.t7: no such checkpoint"):
        storage.content(tmp_path)
    storage.write({"epoch": 3}, tmp_path / "last.t7")
    assert storage.content(tmp_path)["epoch"] == 3


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.t7"
    storage.write({"epoch": 1}, path)

    def no_space(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match="last.t7: No space left on device"):
        storage.write({"epoch": 2}, path)
    assert storage.content(path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["last.t7"]


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def damaged_files(tmp_path):
    good = tmp_path / "good.t7"
    storage.write({"agent": {"w": torch.zeros(100)}}, good)
    raw = good.read_bytes()
    files = {
        "truncated": raw[: len(raw) // 2],
        "empty": b"",
        "text": b"hello, I am a README\n",
        "zeros": bytes(4096),
        "a list": None,
        "a number": pickle.dumps(3),
    }
    for name, content in files.items():
        path = tmp_path / f"{name}.t7"
        if content is None:
            torch.save([1, 2], path)
        else:
            path.write_bytes(content)
        yield path


def test_bad_files_are_told_in_one_line(tmp_path):
    for path in [*damaged_files(tmp_path), tmp_path / "missing.t7", tmp_path]:
        with pytest.raises(UserError) as error:
            storage.content(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2], {"agent": torch.zeros(3)}, {"agent": {3: torch.zeros(1)}}, {3: torch.zeros(1)},
        {"agent": {"w": "text"}}, {"agent": {}, "epoch": "two"}, {"agent": {}, "args": 3},
    ],
)  # fmt: skip
def test_other_contents_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.t7")
    with pytest.raises(UserError, match="x.t7: readable, but no checkpoint"):
        storage.content(tmp_path / "x.t7")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"agent": RunsCode()}, "evil.t7", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="wants to run code .*mkdir.*never"):
        storage.content("evil.t7")
    assert not os.path.exists("ran")


@pytest.mark.parametrize("key", ["agent", "net", "state_dict", "bare", "layer"])
def test_checkpoints_of_another_model_are_refused(tmp_path, key):
    resnet, policy_net = models.build("R32_C10")
    if key in ("agent", "net"):
        content = {key: policy_net.state_dict()}
    elif key == "state_dict":
        content = {"state_dict": resnet.state_dict(), "model": "R32_C10"}
    elif key == "bare":
        content = dict(resnet.state_dict())
    else:
        content = {n.replace("blocks.", "layer"): t for n, t in resnet.state_dict().items()}
    torch.save(content, tmp_path / "x.t7")
    with pytest.raises(UserError, match=r"x.t7 is for .*15 blocks\)?, not R110_C10 \(54\)"):
        bases.read_for(models.config("R110_C10"), tmp_path / "x.t7")
    bases.read_for(models.config("R32_C10"), tmp_path / "x.t7")


@pytest.mark.parametrize(
    "keys, stage, holds",
    [
        (["agent"], 1, ["policy"]),
        (["net"], 1, ["policy"]),
        (["agent", "resnet"], 2, ["policy", "resnet"]),
        (["resnet"], 0, ["resnet"]),
        (["state_dict"], 0, ["resnet"]),
        (["model"], 0, ["resnet"]),
        ([], 0, ["resnet"]),
    ],
)
def test_what_a_file_holds_is_told_from_its_tensors(tmp_path, keys, stage, holds):
    resnet, policy_net = (network.state_dict() for network in models.build("R14_C10"))
    content = {key: policy_net if key in ("agent", "net") else resnet for key in keys}
    torch.save({**content, "epoch": 3} if keys else resnet, tmp_path / "x.t7")
    found = storage.read(tmp_path / "x.t7")
    assert (found.stage, found.epoch, found.num_blocks) == (stage, 3 if keys else 0, 6)
    assert [name for name in ("policy", "resnet") if getattr(found, name) is not None] == holds
    for network in models.build("R14_C10"):
        if ("policy" if isinstance(network, models.PolicyNet) else "resnet") in holds:
            found.load_into(network)
        else:
            with pytest.raises(ValueError, match="x.t7: .*(without a policy|holds no ResNet)"):
                found.load_into(network)


def test_a_resnet_under_another_codes_key_for_policies_is_a_resnet(tmp_path):
    torch.save({"net": models.build("R14_C10")[0].state_dict()}, tmp_path / "x.t7")
    found = storage.read(tmp_path / "x.t7")
    assert found.policy is None and found.stage == 0 and "fc.weight" in found.resnet


def test_same_shape_of_another_data_set_is_refused(tmp_path):
    storage.write({"agent": {}, "model": "R32_C100"}, tmp_path / "x.t7")
    with pytest.raises(UserError, match="is for R32_C100"):
        bases.read_for(models.config("R32_C10"), tmp_path / "x.t7")


def test_base_is_found_or_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "ROOT", tmp_path)
    with pytest.raises(UserError, match="pretrain.py --model R32_C10.*--base"):
        bases.find_base("R32_C10", None)
    folder = tmp_path / "cv" / "pretrained" / "R32_C10"
    folder.mkdir(parents=True)
    (folder / "pk_E_1_A_0.900.t7").touch()
    assert bases.find_base("R32_C10", None) == folder / "pk_E_1_A_0.900.t7"
    (folder / "pk_E_2_A_0.910.t7").touch()
    with pytest.raises(UserError, match="several.*--base"):
        bases.find_base("R32_C10", None)
    assert str(bases.find_base("R32_C10", "my.t7")) == "my.t7"


def test_a_base_of_any_name_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "ROOT", tmp_path)
    folder = tmp_path / "cv" / "pretrained" / "R32_C10"
    folder.mkdir(parents=True)
    (folder / "README.md").touch()
    with pytest.raises(UserError, match="no pretrained ResNet"):
        bases.find_base("R32_C10", None)
    (folder / "resnet32.pth").touch()
    assert bases.find_base("R32_C10", None) == folder / "resnet32.pth"
    assert bases.find_base("R32_C10", str(folder)) == folder / "resnet32.pth"
    (folder / "last.t7").touch()  # of a run that is under way
    with pytest.raises(UserError, match="no pretrained ResNet"):
        bases.find_base("R32_C10", None)
    (folder / "pk_E_1_A_0.900.t7").touch()
    assert bases.find_base("R32_C10", None) == folder / "pk_E_1_A_0.900.t7"


def test_a_named_directory_without_a_base_is_refused(tmp_path):
    """Also for a model whose weights torchvision publishes, which are for where none is named."""
    with pytest.raises(engine.UserError, match="no pretrained ResNet"):
        bases.find_base("R101_ImgNet", str(tmp_path), is_published=True)
    assert bases.find_base("R101_ImgNet", None, is_published=True) is None


def test_a_runs_directory_may_be_a_base(tmp_path):
    """Its newest checkpoint counts, also where last.t7 was left out, as in what is shipped."""
    (tmp_path / "ckpt_E_6_A_0.920_R_1.00E-01_S_8.00_#_1.t7").touch()
    assert bases.find_base("R32_C10", str(tmp_path)) == tmp_path
    (tmp_path / "pk_E_6_A_0.920.t7").touch()
    assert bases.find_base("R32_C10", str(tmp_path)) == tmp_path / "pk_E_6_A_0.920.t7"


def test_fingerprint_tells_weights_apart():
    resnet, _ = models.build("R8_C10")
    before = bases.fingerprint(resnet)
    assert bases.fingerprint(resnet) == before
    with torch.no_grad():
        resnet.fc.bias[3] += 1e-6
    assert bases.fingerprint(resnet) != before


def test_seeds_are_functions_of_all_their_numbers():
    seeds = {engine.shard.derived_seed(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400


def test_models_that_may_be_shipped_are_not_hidden():
    """Runs are, and what a run goes on from."""

    def hidden(path):
        command = ["git", "check-ignore", "-q", "--no-index", path]
        return subprocess.run(command, cwd=storage.ROOT).returncode == 0

    if subprocess.run(["git", "rev-parse"], cwd=storage.ROOT, capture_output=True).returncode:
        pytest.skip("no git work tree")
    for model in ("R32_C10", "R32_C100", "R110_C100", "AIG32_C100", "R50_ImgNet"):
        assert not hidden(f"cv/{model}/stage1/ckpt_E_1_A_0.9.t7")
        assert hidden(f"cv/{model}/stage1/last.t7")
    for path in ("cv/tmp/ckpt.t7", "cv/demo/x", "cv/reproduce/R32_C10/base/pk.t7"):
        assert hidden(path)


def test_pixels_of_another_normalisation_are_said(tmp_path, capsys):
    config = models.config("R32_C10")
    bases.tell_other_pixels(config, models.Checkpoint.of({"model": "R32_C10"}, "a.t7"))
    bases.tell_other_pixels(config, models.Checkpoint.of({"model": "another code's"}, "a.t7"))
    own = [list(config.mean), list(config.std)]
    bases.tell_other_pixels(
        config, models.Checkpoint.of({"model": "R8_C10", "normalisation": own}, "a.t7")
    )
    assert not capsys.readouterr().err
    for content in ({"model": "R110_C10"}, {"normalisation": [[0.0] * 3, [1.0] * 3]}):
        bases.tell_other_pixels(config, models.Checkpoint.of(content, "b.t7"))
        assert "b.t7: learned from pixels of mean and deviation 0,0,0 / 1,1,1" in (
            capsys.readouterr().err
        )


def theirs(tmp_path, content):
    """A base of another code: its state dict, and what else that code writes."""
    torch.manual_seed(4)
    resnet, _ = models.build("R14_C10")
    torch.save({"state_dict": resnet.state_dict(), **content}, tmp_path / "x.pth")
    return resnet, tmp_path / "x.pth"


FOREIGN = {
    "a Namespace": {"args": argparse.Namespace(lr=0.1, policy="mlp", out=Path("a/b"))},
    "a numpy scalar": {"best_acc1": np.float64(92.6), "epoch": np.int64(3)},
    "a numpy array's scalar": {"acc": np.float32(1.5), "flag": np.bool_(True)},
    "a defaultdict": {"history": collections.defaultdict(list, a=[1, 2])},
    "a Counter": {"seen": collections.Counter("abc")},
    "paths": {"config": {"out": Path("a/b"), "pure": PurePosixPath("c"),
                         "windows": PureWindowsPath("C:/x")}},
    "fields of other types": {"epoch": "three", "args": [1], "stage": "train", "model": 7,
                              "base": None, "partial": 0.5, "targets": {}, "policy_size": "big",
                              "normalisation": "imagenet", "class_names": {"cat": 0}},
    "fields of another meaning": {"stage": 5, "args": {"policy": "cnn", "seed": "x"}, "epoch": 99,
                                  "class_names": [3, 4], "steps_done": 7},
    "an optimizer": {"optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}},
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_lies_beside_the_weights_of_other_codes_does_no_harm(kind, tmp_path, run, common):
    source, path = theirs(tmp_path, FOREIGN[kind])
    target, _ = models.build("R14_C10")
    found = bases.read_for(models.config("R14_C10"), path)
    assert (found.stage, found.static_policy) == (0, None)
    found.load_into(target)
    assert all(torch.equal(t, source.state_dict()[n]) for n, t in target.state_dict().items())
    for given in (["--base", path], ["--load", path]):
        status, out, err = run("test", *common, *given)
        assert status == 0 and "Block Usage: 6.000" in out, err


def test_safetensors_are_read(tmp_path, run, common):
    from safetensors.torch import save_file

    source, _ = theirs(tmp_path, {})
    path = tmp_path / "model.safetensors"
    save_file(source.state_dict(), path, metadata={"format": "pt"})
    target, _ = models.build("R14_C10")
    storage.read(path).load_into(target)
    assert all(torch.equal(t, source.state_dict()[n]) for n, t in target.state_dict().items())
    assert run("test", *common, "--base", path)[0] == 0
    raw = path.read_bytes()
    for part in (raw[: len(raw) // 2], raw[:50]):
        path.write_bytes(part)
        with pytest.raises(UserError, match="model.safetensors: truncated, damaged"):
            storage.read(path)


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "x.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match="x.safetensors: to read it, pip install safetensors"):
        storage.read(tmp_path / "x.safetensors")


class Unknown:
    """Of a class that the reading program may not know."""


@pytest.mark.filterwarnings("ignore")
def test_other_files_are_told_by_what_they_are(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    torch.save(network, tmp_path / "module.pt")
    torch.save({"state_dict": {}, "meter": Unknown()}, tmp_path / "object.pt")
    torch.jit.script(network).save(tmp_path / "script.pt")
    (tmp_path / "lua.t7").write_bytes(b"\4\0\0\0\1\0\0\0\3\0\0\0V 1")
    for name, said in (
        (
            "module.pt",
            r"its pickle .* \(torch.nn.*Sequential\).*save\(model.state_dict\(\)",
        ),
        (
            "object.pt",
            r"its pickle .* \(test_checkpoint.Unknown\).*save the weights alone",
        ),
        ("script.pt", "a TorchScript program, not weights: .*save the weights alone"),
        ("lua.t7", "a file of Lua's Torch7"),
    ):
        with pytest.raises(UserError, match=f"{name}: {said}") as error:
            storage.read(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "epoch, steps, chooses",
    [(0, 0, True), (1, 0, True), (0, 5, True), (1, 5, False), (2, 0, False)],
)
def test_a_head_is_stale_once_the_policy_has_gone_on(epoch, steps, chooses):
    """With one epoch of warm start."""
    content = {"agent": {}, "correctness": {"w": torch.ones(1)}, "args": {"warm_start": 1}}
    found = models.Checkpoint.of(content | {"epoch": epoch, "steps_done": steps}, "x.t7")
    assert found.can_choose == chooses
