"""docs/extending.md: each change as it stands there, applied to a copy and run."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from engine.storage import ROOT

CHANGES = dict(
    re.findall(
        r"^## ([^\n]+)\n.*?```diff\n(.*?)```",
        (ROOT / "docs" / "extending.md").read_text(),
        re.DOTALL | re.MULTILINE,
    )
)
SHORT = ["--max_epochs", "1", "--batch_size", "20", "--lr", "0.01"]


@pytest.fixture
def extended(tmp_path):
    """extended(title) -> a function that runs python in a copy with that change."""

    def apply(title):
        copy = tmp_path / "copy"
        ignored = shutil.ignore_patterns("*.t7", "*.pt", ".venv", ".git", "__pycache__")
        for name in ("deploy", "engine", "models", "visual"):
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        for script in ROOT.glob("*.py"):
            shutil.copy(script, copy)
        command = ["git", "apply", "-C1", "-"]
        subprocess.run(command, cwd=copy, input=CHANGES[title], text=True, check=True)
        env = os.environ | {"OMP_NUM_THREADS": "1", "GIT_CEILING_DIRECTORIES": str(tmp_path)}

        def python(*arguments):
            result = subprocess.run(
                [sys.executable, *map(str, arguments)], cwd=copy, env=env, capture_output=True,
                text=True,
            )  # fmt: skip
            assert result.returncode == 0, result.stderr
            return result.stdout

        return python

    return apply


def test_each_change_is_short():
    assert len(CHANGES) == 4
    for change in CHANGES.values():
        lines = [line for line in change.splitlines() if re.match(r"[+-](?![+-]{2} )", line)]
        assert 1 <= len(lines) <= 20


def test_a_reward(extended):
    code = """
import torch, utils
logits, policy = torch.eye(2), torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0]])
print(utils.reward(logits, torch.tensor([0, 0]), policy, -3.0)[0].tolist())
"""
    assert extended("A reward")("-c", code) == "[0.75, -3.0]\n"


def test_a_gate(extended, cifar_dir, tmp_path):
    python = extended("A gate for ConvNet-AIG")
    common = ["--model", "MAX8_C10", "--data_dir", cifar_dir, "--skip_data_check"]
    python("aig_training.py", *common, *SHORT, "--cv_dir", tmp_path / "aig")
    out = python("test.py", *common, "--load", tmp_path / "aig", "--time", "--batch_size", "20")
    assert "Speed-up" in out
    code = """
import torch, models
torch.manual_seed(0)
x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
for name in ("AIG8_C10", "MAX8_C10"):
    net, _ = models.build(name)
    for gate in net.gates:
        torch.nn.init.normal_(gate.fc2.weight)
    fast, _ = models.deploy(net.eval(), None, torch.float64)
    for found, expected in zip(fast(x), net.double()(x)):
        torch.testing.assert_close(found.double(), expected.double())
    print(type(net.gates[0]).__name__, models.config(name).mean)
"""
    first, second = python("-c", code).splitlines()
    assert first == second.replace("MaxGate", "Gate") and second.startswith("MaxGate (0.49")


def test_a_data_set(extended, tmp_path):
    rng = np.random.default_rng(0)
    for split, size in (("train", 60), ("test", 20)):
        labels = rng.integers(0, 10, size).astype(np.uint8)
        images = rng.integers(0, 256, (size, 32, 32, 3)).astype(np.uint8)
        np.savez(tmp_path / f"svhn_{split}.npz", images=images, labels=labels)
    python = extended("A data set")
    common = ["--model", "R8_SVHN", "--data_dir", tmp_path]
    python("pretrain.py", *common, *SHORT, "--cv_dir", tmp_path / "base")
    out = python("test.py", *common, "--base", tmp_path / "base" / "last.t7")
    assert "Block Usage: 3.000" in out
    names = python("-c", "import models; print(*models.config('R8_SVHN').class_names)")
    assert names.split() == list("0123456789")


def test_a_data_set_of_another_size(extended, tmp_path):
    """FLOPs are counted for the size that the registry names, which is that of the images."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        images = rng.integers(0, 256, (20, 28, 28, 3)).astype(np.uint8)
        labels = (np.arange(20) % 10).astype(np.uint8)
        np.savez(tmp_path / f"svhn_{split}.npz", images=images, labels=labels)
    python = extended("A data set")
    registry = tmp_path / "copy" / "models" / "registry.py"
    common = ["--model", "R8_SVHN", "--data_dir", tmp_path]
    training = ["pretrain.py", *common, *SHORT, "--cv_dir", tmp_path / "base"]
    with pytest.raises(AssertionError, match="images of SVHN are 28x28x3, where .* says 32 pixels"):
        python(*training)
    registry.write_text(registry.read_text().replace('("SVHN", 10, 32)', '("SVHN", 10, 28)'))
    python(*training)
    out = python("test.py", *common, "--base", tmp_path / "base" / "last.t7")
    # a stem, three blocks of two convolutions, and a classifier, 2 FLOPs a multiply-add
    blocks = [(28, 16, 16), (28, 16, 16), (14, 16, 32), (14, 32, 32), (7, 32, 64), (7, 64, 64)]
    flops = 2 * sum(9 * side**2 * a * b for side, a, b in [(28, 3, 16), *blocks]) + 2 * 64 * 10
    assert f"FLOPs/img: {flops:.2E}" in out


def test_a_base_network(extended, cifar_dir, tmp_path):
    python = extended("A base network")
    common = ["--model", "WRN8_C10", "--data_dir", cifar_dir, "--skip_data_check"]
    python("pretrain.py", *common, *SHORT, "--cv_dir", tmp_path / "base")
    base = ["--base", tmp_path / "base" / "last.t7"]
    python("cl_training.py", *common, *base, *SHORT, "--cv_dir", tmp_path / "cl")
    assert "Unique Policies" in python("test.py", *common, *base, "--load", tmp_path / "cl")
