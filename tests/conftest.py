"""A CIFAR-format data set, a base ResNet, a stage-1 run and ways to run the scripts, all small."""

import importlib
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

# as many processes as cores run the tests; before torch is imported, and for the scripts as well
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

import engine
import models

TINY = "R14_C10"  # two blocks a stage: K = 6
ROOT = engine.storage.ROOT
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
NAMED = r"ckpt_E_\d+_A_\d\.\d{3}_R_-?\d\.\d\dE[+-]\d\d_S_\d+\.\d\d_#_\d+\.t7"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cifar_dir(tmp_path_factory):
    return write_cifar(tmp_path_factory.mktemp("data"))


def write_cifar(root, train=120, test=40):
    """Pictures in the layout of the published CIFAR-10; each class has a colour."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 200, (10, 3))
    batches = [(f"data_batch_{i}", train // 5) for i in range(1, 6)]
    for name, size in [*batches, ("test_batch", test)]:
        labels = rng.integers(0, 10, size)
        pixels = colours[labels][:, :, None] + rng.integers(0, 56, (size, 3, 1024))
        batch = {"data": pixels.reshape(size, 3072).astype(np.uint8), "labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return root


@pytest.fixture(scope="session")
def base_file(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "pk_E_1_A_0.100.t7")


def write_base(path, seed=1):
    """A random ResNet as a pretrained file."""
    torch.manual_seed(seed)
    resnet, _ = models.build(TINY)
    engine.storage.write({"state_dict": resnet.state_dict()}, path)
    return path


@pytest.fixture(scope="session")
def policy_files(tmp_path_factory):
    """A random policy as stage 1 leaves it, and as a warm start does."""
    folder = tmp_path_factory.mktemp("policies")
    torch.manual_seed(0)
    _, policy_net = models.build(TINY)
    content = {"agent": policy_net.state_dict(), "model": TINY, "epoch": 1, "args": {}}
    engine.storage.write(content, folder / "policy.t7")
    head = models.build_confidence(models.config(TINY), policy_net).state_dict()
    engine.storage.write({**content, "correctness": head}, folder / "warm.t7")
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    """run("test", "--model", ...) -> (exit status, standard output, standard error)."""

    def call(script, *options):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, options)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            engine.run_script(script_module(script).main)
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return call


def script_module(name):
    """A stage script as a module; the standard library has a `test` of its own."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", f"{ROOT}/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def common(cifar_dir):
    return ["--model", TINY, "--data_dir", cifar_dir, "--skip_data_check"]


@pytest.fixture(scope="session")
def stage_1(common, base_file, tmp_path_factory):
    """A finished stage-1 run of two epochs, as its directory."""
    folder = tmp_path_factory.mktemp("stage1")
    script = [sys.executable, ROOT / "cl_training.py", *common, "--base", base_file]
    options = ["--cv_dir", folder, "--max_epochs", 2, "--batch_size", 40, "--test_every", 1]
    subprocess.run(list(map(str, script + options)), check=True, capture_output=True, env=ENV)
    return folder


def options_of(script, common, base_file, stage_1):
    """What each training script needs to run on the small data set."""
    options = [*common, "--batch_size", 40]
    if script != "pretrain":
        options += ["--base", base_file]
    if script == "finetune":
        options += ["--pretrained", named(stage_1)[0]]
    return options


def named(folder):
    return sorted(p for p in Path(folder).iterdir() if re.fullmatch(NAMED, p.name))


def metrics(folder):
    """The lines of metrics.jsonl without the times, which are never the same."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def trained(folder):
    content = engine.storage.content(folder)
    return {k: v for k, v in content.items() if k not in ("args",)}


def told(err):
    """Standard error without the warning that a random base knows nothing."""
    return "".join(line for line in err.splitlines(True) if "is near chance" not in line)


def refused(result, *words):
    """One line on standard error, status 2, with these words."""
    status, _, err = result
    err = told(err)
    assert status == 2, err
    assert err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert str(word) in err
