"""Several processes, or micro-batches, against one process that takes whole batches."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from engine import loop, ranks, storage

ROOT = storage.ROOT
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def torchrun(processes, *command, check=True, **options):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*start, f"--nproc_per_node={processes}", *map(str, command)],
        check=check, capture_output=True, text=True, env=ENV, timeout=300, **options,
    )  # fmt: skip


def worker(folder, processes, micro_batch):
    path = folder / f"{processes}_{micro_batch}.pt"
    torchrun(processes, ROOT / "tests" / "ranks_worker.py", micro_batch, path)
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return worker(tmp_path_factory.mktemp("alone"), 1, 0)


@pytest.mark.parametrize("processes, micro_batch", [(2, 0), (1, 2), (3, 2)])
def test_gradients_and_figures_are_those_of_one_process(alone, tmp_path, processes, micro_batch):
    several = worker(tmp_path, processes, micro_batch)
    assert alone.keys() == several.keys()
    for name in ("stage 1", "stage 2", "aig"):
        # 23 images in batches of 7: the last has 2, which 3 processes leave out
        steps = 4 if processes < 3 else 3
        assert len(several[name]) == steps and len(alone[name]) == 4
        for ours, expected in zip(several[name], alone[name], strict=False):
            assert max(t.abs().max() for t in expected.values()) > 1e-3
            for key, gradient in expected.items():
                # a parameter that no image used has no gradient in one process, zeros in several
                found = ours.get(key, torch.zeros_like(gradient))
                torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-11)
        for key, value in alone[f"{name} results"].items():
            found = several[f"{name} results"][key]
            torch.testing.assert_close(found, value[: len(found)], rtol=1e-9, atol=1e-11)
            assert len(found) == (23 if processes < 3 else 21)
    for key, value in alone["evaluation"].items():
        assert torch.equal(several["evaluation"][key], value), key
    if processes < 3:
        assert torch.equal(several["candidates"], alone["candidates"])


def test_the_scripts_run_under_torchrun(cifar_dir, base_file, tmp_path):
    common = ["--model", "R14_C10", "--data_dir", cifar_dir, "--skip_data_check"]
    common += ["--base", base_file]
    cl, ft, scripts = tmp_path / "cl", tmp_path / "ft", ROOT
    train = ["--batch_size", 40, "--max_epochs", 1]
    result = torchrun(2, scripts / "cl_training.py", *common, *train, "--cv_dir", cl)
    assert result.stdout.count("E: 1 | ") == result.stdout.count("TS - ") == 1
    result = torchrun(
        2, scripts / "finetune.py", *common, *train, "--cv_dir", ft, "--pretrained", cl / "last.t7"
    )
    assert result.stdout.count("TS - ") == 1 and "FutureWarning" not in result.stderr
    assert len((ft / "metrics.jsonl").read_text().splitlines()) == 1
    figures = {}
    for processes in (1, 2):
        path = tmp_path / f"{processes}.json"
        result = torchrun(
            processes, scripts / "test.py", *common, "--load", ft, "--batch_size", 7,
            "--json", path,
        )  # fmt: skip
        assert result.stdout.count("Accuracy") == 1
        figures[processes] = json.loads(path.read_text())
        figures[processes].pop("images_per_second")
    assert figures[1] == figures[2] and figures[1]["images"] == 40


@pytest.mark.parametrize("cores, batch_size, processes, threads", [
    (8, 256, 8, "1"), (8, 64, 2, "4"), (6, 128, 4, "1"), (1, 128, 1, None), (8, 32, 1, None),
])  # fmt: skip
def test_parallel_without_a_gpu_is_a_process_a_core(
    cores, batch_size, processes, threads, monkeypatch
):
    """Of enough images each; their cores are shared out."""
    started = []
    monkeypatch.setattr(ranks.capabilities, "gpu", lambda: False)
    monkeypatch.setattr(ranks.capabilities, "cpus", lambda: cores)
    monkeypatch.setattr(ranks.os, "execv", lambda program, command: started.append(command))
    monkeypatch.setattr(sys, "argv", ["cl_training.py", "--parallel"])
    for name in ("OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL"):  # as they were, afterwards
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    ranks.start(True, None, batch_size)
    if processes == 1:
        assert not started
        return
    assert started[0][-3:] == [f"--nproc_per_node={processes}", "cl_training.py", "--parallel"]
    assert os.environ["OMP_NUM_THREADS"] == threads


def test_parallel_without_a_gpu_trains_and_says_it_once(cifar_dir, base_file, tmp_path):
    options = ["--model", "R14_C10", "--data_dir", cifar_dir, "--skip_data_check", "--base",
               base_file, "--batch_size", 64, "--max_epochs", 1, "--parallel", "--device", "cpu",
               "--cv_dir", tmp_path]  # fmt: skip
    done = subprocess.run(
        [sys.executable, ROOT / "cl_training.py", *map(str, options)],
        check=True, capture_output=True, text=True, env=ENV, timeout=300,
    )  # fmt: skip
    assert done.stdout.count("E: 1 | ") == done.stdout.count("TS - ") == 1
    assert "Warning" not in done.stderr, done.stderr
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_pace_that_fell_is_told_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    pace = loop.Pace()

    def steps(seconds, count):
        told = 0
        for _ in range(count):
            now[0] += seconds
            told += pace.fell()
        return told

    assert steps(1.0, 50) == 0 and steps(60.0, 1) == 0  # an evaluation between two epochs
    assert steps(2.9, 50) == 0
    assert steps(3.1, 50) == 1 and steps(9.0, 50) == 0


def test_synchronised_batchnorm_is_refused_on_cpus(cifar_dir, base_file, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = torchrun(
        2, ROOT / "cl_training.py", "--model", "R14_C10", "--data_dir", cifar_dir,
        "--skip_data_check", "--base", base_file, "--cv_dir", tmp_path, "--sync_bn", check=False,
    )  # fmt: skip
    assert result.returncode != 0 and "--sync_bn needs GPUs" in result.stderr


WAITS = """
import os, sys, time
from datetime import timedelta
import torch.distributed as dist
from engine import ranks
init = dist.init_process_group
dist.init_process_group = lambda backend: init(backend, timeout=timedelta(seconds=1))
ranks.start()
with ranks.main_first():
    if ranks.is_main():
        time.sleep(4)
        if sys.argv[1] == "dies":
            os._exit(7)
print("after")
ranks_left = dist.destroy_process_group()
"""


@pytest.mark.parametrize("ending", ["works", "dies"])
def test_the_others_wait_for_rank_0_as_long_as_it_lives(ending):
    """Also beyond the process group's own timeout."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", WAITS, ending], env=ENV | where | {"RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=60) for process in both]
    if ending == "works":
        assert [out for out, _ in outputs] == ["after\n"] * 2, outputs
    else:
        assert both[0].returncode == 7
        assert both[1].returncode != 0 and "after" not in outputs[1][0]
