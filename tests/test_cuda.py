"""What only a GPU can show. Skipped without one; CUDA_TESTS_ON_CPU=1 rehearses what a CPU can."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import TINY, write_cifar
from faults import differing
from test_models import random_norms
from test_sync import FINITE, STEPS

import deploy
import engine
import models
from engine import storage
from models import capabilities

REHEARSED = bool(os.environ.get("CUDA_TESTS_ON_CPU"))
DEVICE = torch.device("cuda" if capabilities.gpu() else "cpu")
pytestmark = pytest.mark.skipif(not (capabilities.gpu() or REHEARSED), reason="no GPU here")
on_a_gpu = pytest.mark.skipif(not capabilities.gpu(), reason="nothing to rehearse on a CPU")

SIZES = {"R14_C10": 32, "R18_ImgNet": 64, "R50_ImgNet": 64}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 0.05}


@pytest.fixture(autouse=True)
def ieee():
    """float32 that is not rounded to TF32, whatever ran before."""
    engine.device.set_up("fp32")


def close(found, expected, dtype):
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error < TOLERANCE[dtype]


def batch_of(name, dtype, count=24):
    """A ResNet on the GPU with BatchNorms that are used, images, and policies that differ."""
    torch.manual_seed(0)
    resnet, _ = models.build(name)
    random_norms(resnet)
    engine.device.place(resnet.to(dtype), DEVICE)
    images = torch.randn(count, 3, SIZES[name], SIZES[name], dtype=dtype).to(DEVICE)
    policy = (torch.rand(count, resnet.num_blocks) < 0.5).to(DEVICE, dtype)
    policy[:, 1], policy[:, 2] = 0, 1
    return resnet, images, policy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_sparse_is_masked_forward_and_backward(name, dtype):
    resnet, images, policy = batch_of(name, dtype)
    found = {}
    for execution in ("masked", "sparse"):
        resnet.execution = execution
        resnet.zero_grad()
        logits = resnet(images.clone().requires_grad_(), policy)
        logits.square().mean().backward()
        gradients = [p.grad for p in resnet.parameters() if p.grad is not None]
        found[execution] = [logits.detach(), *gradients]
    dropped = {id(p) for p in resnet.units()[1][0].parameters()}
    kept = [p.grad is not None for p in resnet.parameters() if id(p) not in dropped]
    assert all(kept)
    masked = [g for g in found["masked"] if g.abs().max() > 0]
    sparse = [g for g in found["sparse"] if g.abs().max() > 0]
    for ours, theirs in zip(sparse, masked, strict=True):
        close(ours, theirs, dtype)


@pytest.mark.parametrize("name", SIZES)
def test_a_forward_pass_is_that_of_the_cpu(name):
    resnet, images, policy = batch_of(name, torch.float64)
    there = resnet(images, policy).cpu()
    here = resnet.cpu()(images.cpu(), policy.cpu())
    close(there, here, torch.float64)


@pytest.mark.parametrize("multiple", [1, 8, 16])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_deployed_networks_compute_the_same(name, dtype, multiple):
    resnet, images, policy = batch_of(name, torch.float64, count=40)
    expected = resnet(images, policy), resnet(images)
    resnet.row_multiple = multiple
    fast, _ = models.deploy(resnet, dtype=dtype)
    given = images if dtype == torch.float64 else images.float()
    for found, right in zip((fast(given, policy), fast(given)), expected, strict=True):
        close(found, right.detach(), dtype)
    close(fast(given[:1], policy[:1]), expected[0][:1].detach(), dtype)


@pytest.mark.parametrize("multiple", [1, 8])
def test_deployed_gates_compute_the_same(multiple):
    torch.manual_seed(0)
    net, _ = models.build("AIG14_C10")
    random_norms(net)
    engine.device.place(net, DEVICE)
    for gate in net.gates:
        gate.fc2.weight.data.mul_(1000)
    images = torch.randn(40, 3, 32, 32, dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        logits, gates = net(images)
        net.resnet.row_multiple = multiple
        fast, _ = models.deploy(net, dtype=torch.float64)
        for given, rows in ((images, slice(None)), (images[:1], slice(1))):
            found, opened = fast(given)
            assert torch.equal(opened.double(), gates[rows])
            close(found, logits[rows], torch.float64)


@on_a_gpu
@pytest.mark.parametrize("name", SIZES)
def test_recorded_graphs_compute_the_same(name):
    resnet, images, _ = batch_of(name, torch.float64, count=20)
    _, policy_net = models.build(name)
    engine.device.place(random_norms(policy_net).double(), DEVICE)
    policy_net.logit.weight.data.mul_(100)  # policies that differ
    decide = models.GreedyPolicy(policy_net)
    fast, fast_policy = models.deploy(resnet, decide, torch.float64)
    run = deploy.record(fast, fast_policy, images[:1])
    del fast, fast_policy
    # what was freed, if anything, is another's: blocks of each size, as the allocator keeps them
    taken = [torch.full((2**k,), torch.nan, device=DEVICE) for k in range(6, 22) for _ in range(20)]
    with torch.no_grad():
        for x in images.split(1):
            logits, policy = run(x)
            assert torch.equal(policy, decide(x))
            close(logits, resnet(x, policy), torch.float64)
    del taken


def test_autocast_gives_every_weight_a_gradient_and_float32_logits():
    resnet, images, _ = batch_of(TINY, torch.float32)
    policy = torch.ones(len(images), resnet.num_blocks, device=DEVICE)
    exact = resnet(images, policy).detach()
    policy[0] = 0
    with engine.device.autocast(DEVICE, "bf16"):
        with torch.no_grad():
            resnet(images, policy)
        logits = resnet(images, policy)
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in resnet.parameters())
    close(logits.detach()[1:], exact[1:], torch.bfloat16)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("training", [True, False])
def test_images_stay_channels_last(precision, training):
    """A layout that is lost costs a conversion at every convolution, and the fast way of `put_`."""
    resnet, images, policy = batch_of(TINY, torch.float32)
    resnet.train(training)
    lost = []

    def look(module, inputs, output):
        for tensor in (*inputs, output):
            if tensor.ndim == 4 and tensor.shape[1] > 3:
                last = tensor.is_contiguous(memory_format=torch.channels_last)
                lost.extend([] if last else [type(module).__name__])

    for branch, _ in resnet.units():
        branch.register_forward_hook(look)
    images = images.contiguous(memory_format=torch.channels_last)
    with engine.device.autocast(DEVICE, precision):
        resnet(images, policy)
    assert not lost


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_cifar(tmp_path_factory.mktemp("pictures"), 2050, 510)


def options_of(script, base_file, policy_files):
    if script == "pretrain":
        return ["--model", TINY, "--lr", 0.05]
    if script == "aig_training":
        return ["--model", "AIG14_C10", "--lr", 0.05]
    given = ["--model", TINY, "--base", base_file]
    if script == "finetune":
        given += ["--pretrained", policy_files / "policy.t7"]
    return given


@pytest.mark.parametrize("script", ["pretrain", "cl_training", "finetune", "aig_training"])
def test_an_epoch_ends_as_on_the_cpu(script, run, pictures, base_file, policy_files, tmp_path):
    figures = {}
    for device in ("cpu", DEVICE.type):
        status, _, err = run(
            script, *options_of(script, base_file, policy_files), "--data_dir", pictures,
            "--skip_data_check", "--cv_dir", tmp_path / device, "--max_epochs", 1, "--batch_size",
            128, "--device", device, *(["--resume"] if REHEARSED else []),
        )  # fmt: skip
        assert status == 0, err
        line = (tmp_path / device / "metrics.jsonl").read_text().splitlines()[0]
        figures[device] = json.loads(line)
    here, there = figures["cpu"], figures[DEVICE.type]
    for split in ("train", "test"):
        assert there[f"{split}_accuracy"] == pytest.approx(here[f"{split}_accuracy"], abs=0.08)
        if script != "pretrain":
            assert there[f"{split}_sparsity"] == pytest.approx(here[f"{split}_sparsity"], abs=0.4)


@pytest.mark.parametrize("script", ["cl_training", "finetune", "aig_training"])
def test_a_resumed_run_ends_in_the_same_bits(script, pictures, base_file, policy_files, tmp_path):
    def train(folder, *more):
        command = [sys.executable, f"{script}.py", *options_of(script, base_file, policy_files)]
        command += ["--data_dir", pictures, "--skip_data_check", "--device", DEVICE.type]
        command += ["--cv_dir", tmp_path / folder, "--subset", 512, "--batch_size", 128, *more]
        command += ["--deterministic", "--resume"]
        subprocess.run(list(map(str, command)), cwd=storage.ROOT, check=True)
        content = storage.content(tmp_path / folder)
        return {name: part for name, part in content.items() if name != "args"}

    whole = train("whole", "--max_epochs", 2)
    train("parts", "--max_epochs", 1)
    assert not differing(train("parts", "--max_epochs", 2), whole)


@on_a_gpu
def test_two_processes_on_one_gpu_are_refused(cifar_dir, base_file, tmp_path):
    gpus = torch.cuda.device_count()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={gpus + 1}", "cl_training.py", "--model", TINY, "--base"]
    command += [base_file, "--data_dir", cifar_dir, "--skip_data_check", "--cv_dir", tmp_path]
    done = subprocess.run(
        list(map(str, command)), cwd=storage.ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    told = f"{gpus + 1} processes want a GPU each and there are {gpus}"
    assert told in done.stdout + done.stderr


@on_a_gpu
def test_a_full_gpu_names_micro_batches(run, pictures, tmp_path):
    try:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(
            2**30 / torch.cuda.get_device_properties(0).total_memory
        )
        status, _, err = run(
            "pretrain", "--model", "R110_C10", "--data_dir", pictures, "--skip_data_check",
            "--cv_dir", tmp_path, "--max_epochs", 1, "--batch_size", 2048,
        )  # fmt: skip
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert status == 2 and "--micro_batch N" in err.splitlines()[-1]


@on_a_gpu
@pytest.mark.parametrize("stage", STEPS)
def test_cuda_counts_the_waits_that_were_counted_without_it(
    stage, run, pictures, base_file, policy_files, tmp_path, monkeypatch
):
    (script, *options), training, _ = STEPS[stage]
    if "--penalties" in options:
        options += ["--pretrained", policy_files / "warm.t7"]
    given = options_of(script, base_file, policy_files)
    given = given[:-2] if "--policy" in options else given
    batches, step, steps = engine.Run.batches, engine.Run.step, []

    def watched_batches(self, loader):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield from batches(self, loader)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def watched_step(self, *args):
        step(self, *args)
        steps.append(len(caught))

    monkeypatch.setattr(engine.Run, "batches", watched_batches)
    monkeypatch.setattr(engine.Run, "step", watched_step)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        status, _, err = run(
            script, *given, "--data_dir", pictures, "--skip_data_check", "--cv_dir", tmp_path,
            "--max_epochs", 1, "--subset", 384, "--batch_size", 128, *options,
        )  # fmt: skip
    assert status == 0, err
    told = [str(w.message) for w in caught[steps[1] : steps[2]]]
    waits = [text for text in told if "synchroniz" in text]
    assert len(waits) == sum((FINITE | training).values()), told
