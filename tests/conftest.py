"""A CIFAR-format data set, a base ResNet and a way to run the scripts, all small."""

import importlib
import os
import pickle
import sys

# as many processes as cores run the tests; before torch is imported, and for the scripts as well
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

import engine
import models

TINY = "R14_C10"  # two blocks a stage: K = 6


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
    engine.checkpoint.write({"state_dict": resnet.state_dict()}, path)
    return path


@pytest.fixture(scope="session")
def policy_files(tmp_path_factory):
    """A random policy as stage 1 leaves it, and as a warm start does."""
    folder = tmp_path_factory.mktemp("policies")
    torch.manual_seed(0)
    _, policy_net = models.build(TINY)
    content = {"agent": policy_net.state_dict(), "model": TINY, "epoch": 1, "args": {}}
    engine.checkpoint.write(content, folder / "policy.t7")
    head = models.build_correctness(models.config(TINY), policy_net).state_dict()
    engine.checkpoint.write({**content, "correctness": head}, folder / "warm.t7")
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
    spec = importlib.util.spec_from_file_location(
        f"script_{name}", f"{engine.checkpoint.ROOT}/{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
