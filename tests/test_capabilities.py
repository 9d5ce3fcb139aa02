"""Processors and builds that lack something: each lack is pretended, on any machine."""

import os

import pytest
import torch
from test_models import random_norms

import engine
import models
from engine import UserError, pictures, ranks
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
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", **told}.items():
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
