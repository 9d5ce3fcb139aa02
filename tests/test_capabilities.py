"""Processors and builds that lack something: each lack is pretended, on any machine."""

import os
import select
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_models import random_norms

import engine
import models
from engine import UserError, pictures, process, ranks
from engine.storage import ROOT
from models import capabilities


@pytest.fixture(params=["no bfloat16", "no oneDNN"])
def lacking(request, monkeypatch):
    name = {"no bfloat16": "bf16_onednn", "no oneDNN": "onednn"}[request.param]
    monkeypatch.setattr(capabilities, name, lambda: False)
    # what a processor without the instructions answers to a packing
    reorder = torch.ops.mkldnn._reorder_convolution_weight

    def refuse(weight, *args):
        if request.param == "no oneDNN" or weight.dtype == torch.bfloat16:
            raise RuntimeError("mkldnn_reorder_conv2d_weight: bf16 path needs the cpu support")
        return reorder(weight, *args)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_convolution_weight", refuse)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_deployed_networks_go_the_plain_way(lacking, dtype, tolerance):
    torch.manual_seed(0)
    resnet, policy_net = map(random_norms, models.build("R14_C10"))
    fast, fast_policy = models.deploy(resnet, models.GreedyPolicy(policy_net), dtype)
    x = torch.randn(5, 3, 32, 32)
    policy = (torch.rand(5, 6) < 0.5).float()
    for found, expected in (
        (fast(x, policy), resnet(x.double(), policy)),
        (fast(x[:1], policy[:1]), resnet(x[:1].double(), policy[:1])),
        (fast_policy.policy_net(x)[0], policy_net(x.double())[0]),
    ):
        error = (found - expected).abs().max() / expected.abs().max().clamp_min(0.1)
        assert error < tolerance


def test_bf16_training_runs_and_says_that_it_is_slow(lacking, run, cifar_dir, base_file, tmp_path):
    status, _, err = run(
        "cl_training", "--model", "R14_C10", "--data_dir", cifar_dir, "--skip_data_check", "--base",
        base_file, "--cv_dir", tmp_path, "--max_epochs", 1, "--precision", "bf16",
    )  # fmt: skip
    assert status == 0, err
    assert err.count("this processor has no bfloat16") == 1


@pytest.mark.skipif(not capabilities.onednn(), reason="no oneDNN in this build")
def test_weights_are_packed_for_one_image_for_batches_and_for_the_threads_in_use(monkeypatch):
    resnet, _ = models.build("R14_C10")
    fast, _ = models.deploy(resnet)
    sizes = []
    reorder = torch.ops.mkldnn._reorder_convolution_weight

    def note(weight, *args):
        sizes.append(args[-1][0])
        return reorder(weight, *args)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_convolution_weight", note)
    before = torch.get_num_threads()
    try:
        for batch, expected in ((1, {1}), (1, set()), (3, {16}), (40, set())):
            sizes.clear()
            fast(torch.randn(batch, 3, 32, 32))
            assert set(sizes) == expected
        torch.set_num_threads(before + 1)
        fast(torch.randn(1, 3, 32, 32))
        assert set(sizes) == {1}
    finally:
        torch.set_num_threads(before)


def test_processors_are_counted_where_affinity_is_unknown(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert capabilities.cpus() == 6


def test_ranks_of_a_host_share_its_processors(monkeypatch):
    monkeypatch.setattr(capabilities, "cpus", lambda: 8)
    assert pictures.default_workers() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert pictures.default_workers() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert pictures.default_workers() == 1


def test_a_gpu_that_is_not_there_is_refused(monkeypatch, run):
    monkeypatch.setattr(capabilities, "gpu", lambda: False)
    assert engine.device.pick() == engine.device.pick("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cuda:1: PyTorch sees no GPU.*--device cpu"):
        engine.device.pick("cuda:1")
    status, _, err = run("test", "--device", "tpu")
    assert status == 2 and "'tpu' is not cpu, cuda or cuda:N" in err


def test_one_gpu_by_number_is_not_for_several_processes(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="several take --device cuda"):
        ranks.start(device="cuda:1")


@pytest.mark.parametrize("told", [{}, {"LOCAL_WORLD_SIZE": "3"}])
def test_two_processes_on_one_gpu_are_refused(told, monkeypatch):
    monkeypatch.setattr(capabilities, "gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    given = dict.fromkeys((*ranks.TORCHRUN, "LOCAL_RANK"), "1") | told
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    processes = "3" if told else "at least 2"
    with pytest.raises(UserError, match=f"{processes} processes want a GPU each and there are 1"):
        ranks.start()


@pytest.mark.parametrize("gpu, bf16", [(False, False), (False, True), (True, False), (True, True)])
def test_the_precision_that_recipes_take(gpu, bf16, monkeypatch):
    monkeypatch.setattr(capabilities, "gpu", lambda: gpu)
    monkeypatch.setattr(capabilities, "bf16_onednn", lambda: bf16 and not gpu)
    monkeypatch.setattr(capabilities, "bf16_gpu", lambda: bf16 and gpu)
    assert engine.device.fast_precision() == ("bf16" if bf16 else "fp32")


# what only POSIX has; the standard library and torch look for it when they are imported
ELSEWHERE = """
import logging, multiprocessing, random, subprocess, sys, threading
import filelock, numpy, tensorboardX, torch, torchvision, tqdm
import os, select, signal
for module, names in ((os, ("register_at_fork", "sched_getaffinity", "fork", "execv")),
                      (signal, ("SIGALRM", "alarm", "pthread_kill", "setitimer")),
                      (select, ("poll", "epoll"))):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", ["cl_training", "test"])
def test_scripts_run_where_there_is_no_posix(script, common, base_file, tmp_path):
    """As on Windows, as far as that can be taken away here."""
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    options = [*common, "--base", base_file, "--batch_size", 40]
    if script == "cl_training":
        options += ["--max_epochs", 1, "--cv_dir", tmp_path / "run"]
    command = [sys.executable, tmp_path / "elsewhere.py", ROOT / f"{script}.py", *options]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Block Usage" in done.stdout or (tmp_path / "run" / "last.t7").exists()


def test_a_stop_needs_no_alarm_and_an_end_no_poll(monkeypatch):
    monkeypatch.delattr(signal, "SIGALRM")
    monkeypatch.delattr(signal, "alarm")
    monkeypatch.delattr(select, "poll")
    before = signal.getsignal(signal.SIGTERM)
    try:
        process.listen()
        with process.patiently():
            os.kill(os.getpid(), signal.SIGTERM)
            assert process.stop_requested
    finally:
        process.stop_requested = False
        signal.signal(signal.SIGTERM, before)
    assert not process.output_is_read()


@pytest.mark.parametrize("missing", ranks.TORCHRUN[1:])
def test_a_rank_without_the_rest_is_told(monkeypatch, missing):
    for name in ranks.TORCHRUN:
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=f"RANK is set, {missing} is not: .*torchrun, or unset"):
        ranks.start()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"
        ),
        RuntimeError("unable to write to file </torch_7_1_0>: No space left on device (28)"),
        OSError(28, "No space left on device"),
        RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"),
    ],
)
def test_too_little_shared_memory_is_told(error):
    def batches():
        yield 1
        raise error

    found = []
    with pytest.raises(UserError, match="/dev/shm is too small .*--shm-size.*--workers 0"):
        found.extend(pictures.told_of_memory(batches()))
    with pytest.raises(RuntimeError, match="something else"):
        list(pictures.told_of_memory(raises(RuntimeError("something else"))))


def raises(error):
    yield 1
    raise error


WORKERS = """
import torch
from functools import partial
import engine

kept = []

def main():
    listen = partial(lambda patient, _: engine.process.listen_in_worker(patient),
                     engine.process.shared_patience())
    kept.append(iter(torch.utils.data.DataLoader(range(999), num_workers=6, worker_init_fn=listen)))
    next(kept[0])
    raise engine.UserError("no")

engine.run_script(main)
"""


def test_workers_that_are_ended_with_the_program_are_no_second_error():
    command = [sys.executable, "-W", "ignore", "-c", WORKERS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr == "-c: no\n"


def test_little_shared_memory_ends_a_training_in_one_line(tmp_path):
    """A real /dev/shm of half a MiB, where this process may mount one."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 60), ("val", 4)):
        for name in ("a", "b"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (80, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    options = ["--model", "R18_Folder", "--data_dir", tmp_path / "data", "--image_size", 64]
    options += ["--batch_size", 60, "--max_epochs", 1, "--workers", 2, "--cv_dir", tmp_path / "x"]
    script = [sys.executable, ROOT / "pretrain.py", "--from_scratch", *options]
    mount = "mount -t tmpfs -o size=512k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no mounts here")
    inside = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *map(str, script)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(inside, env=env, capture_output=True, text=True, timeout=200)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "/dev/shm is too small" in last, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate "
                     "memory: you tried to allocate 9 bytes. Error code 12"),
    ],
)  # fmt: skip
def test_full_memory_of_a_cpu_is_told_in_one_line(run, monkeypatch, error):
    def full():
        raise error

    monkeypatch.setattr("conftest.script_module", lambda name: SimpleNamespace(main=full))
    status, _, err = run("cl_training")
    assert status == 2 and len(err.splitlines()) == 1
    assert "machine's memory is full" in err and "--micro_batch N" in err
