"""Schedules, optimizers and statistics against a closed form or an independent computation."""

import io
import math
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import engine
import models
from engine import loop, process, ranks, schedule, storage
from engine.data import TensorLoader
from engine.logs import Logs


def settings(**given):
    plain = {"schedule": "step", "lr_decay_ratio": 0.1, "epoch_step": 3, "max_epochs": 5}
    plain |= {"lr_steps": None, "warmup": 0.0}
    return Namespace(**plain | {"alpha": 0.8, "penalty": -2.0} | given)


def test_learning_rates_step_as_released():
    factors = [schedule.lr_factor(settings(), done) for done in range(7)]
    assert factors == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01])


def test_learning_rates_fall_in_a_cosine():
    args = settings(schedule="cosine", max_epochs=4)
    factors = [schedule.lr_factor(args, done) for done in range(4)]
    half = math.sqrt(0.5)
    assert factors == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert [schedule.cosine(p, warmup=0.5) for p in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(
        [0, 0.5, 1, 0.5, 0]
    )


def test_learning_rates_step_after_named_epochs():
    args = settings(lr_steps=[2, 3])
    factors = [schedule.lr_factor(args, epoch - 0.5) for epoch in range(1, 6)]
    assert factors == pytest.approx([1, 1, 0.1, 0.01, 0.01])


def test_only_weights_decay_and_rates_scale_from_the_first():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    optimizer = schedule.sgd(network, lr=0.2, wd=0.3)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for parameter in network.parameters():
        assert decay[id(parameter)] == (0.3 if parameter.ndim > 1 else 0.0)
    for factor in (0.5, 0.1):
        schedule.scale_lr(optimizer, factor)
        assert all(g["lr"] == pytest.approx(0.2 * factor) for g in optimizer.param_groups)


def test_what_ranks_exchange_is_no_larger_than_what_they_found(monkeypatch):
    """A part of a tensor that shares its memory would be sent with all of it."""
    sent = []
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "gather", lambda own: sent.append(own) or [own, {}])
    results = loop.Results(64, "")
    for _ in range(16):
        results.add(4, {"correct": torch.ones(4, dtype=torch.bool)})
    assert results["correct"].tolist() == [True] * 64
    assert [t.untyped_storage().nbytes() for t in sent[0]["correct"]] == [4] * 16


def test_the_bar_counts_images_also_those_of_an_earlier_run(monkeypatch):
    shown, bar = {"disable": False, "file": io.StringIO()}, loop.tqdm
    monkeypatch.setattr(loop, "tqdm", lambda **options: bar(**options | shown))
    images, labels = torch.zeros(10, 32, 32, 3, dtype=torch.uint8), torch.zeros(10)
    data = TensorLoader(images, labels, models.config("R32_C10"), 4)
    layer = nn.Linear(1, 1)
    training = loop.Training([layer], [torch.optim.SGD(layer.parameters(), 0.1)])
    counts = []
    for _ in training.batches(data, 1, skip=1):
        counts.append(training.results.bar.n)
        loss = layer(torch.zeros(1)).sum()  # of one image a batch, as in the warm start
        training.step(loss, {"loss": loss.detach()[None]})
    assert [*counts, training.results.bar.n] == [4, 8, 10]


def test_a_stop_waits_for_a_step_and_for_a_file():
    process.listen()
    try:
        with process.patiently():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # torchrun and a cluster may both tell
            assert process.stop_requested
            with process.undisturbed():
                os.kill(os.getpid(), signal.SIGALRM)  # its seconds are over: not while writing
            with pytest.raises(process.Stopped):
                os.kill(os.getpid(), signal.SIGALRM)
        process.listen()
        with pytest.raises(process.Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        process.stop_requested = False


@pytest.mark.parametrize("ending, status", [("pass", 0), ("raise engine.UserError('why')", 2)])
def test_one_of_several_processes_ends_without_finalization(ending, status, tmp_path):
    script = f"""
import atexit, os, torch.distributed, engine
def main():
    store = torch.distributed.FileStore({str(tmp_path / "store")!r}, 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    atexit.register(os.abort)
    print("done")
    {ending}
engine.run_script(main)
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, cwd=storage.ROOT)
    assert (result.returncode, result.stdout) == (status, "done\n"), result.stderr


def test_backward_runs_outside_autocast():
    """As PyTorch's documentation of autocast asks."""
    layer = nn.Linear(4, 2)
    seen = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch.is_autocast_enabled("cpu"))
            return grad

    class OneBatch:
        num_images = 3
        batch_size = 3

        def epoch(self, epoch, skip=0):
            yield torch.randn(3, 4), torch.zeros(3), engine.Shard(0, 3, 3)

        def __len__(self):
            return 1

    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    training = loop.Training([layer], [optimizer])
    for images, labels, _ in training.batches(OneBatch(), 1):
        with engine.device.autocast(images.device, "bf16"):
            loss = Watch.apply(layer(images)).float().mean()
        training.step(loss, {"correct": labels == 0})
    assert seen == [True, False]


@pytest.mark.parametrize("precision, rounds", [("fp32", False), ("tf32", True), ("bf16", False)])
def test_float32_on_a_gpu_is_what_the_precision_says(precision, rounds, monkeypatch):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    monkeypatch.setattr(cudnn, "benchmark", True)
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = not rounds
        engine.device.set_up(precision)
        assert matmul.allow_tf32 == cudnn.allow_tf32 == rounds
        assert not cudnn.benchmark
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def test_a_full_gpu_is_told_in_one_line(run, monkeypatch):
    def full():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has 79 GiB. Of the allocated"
        )

    monkeypatch.setattr("conftest.script_module", lambda name: SimpleNamespace(main=full))
    status, _, err = run("cl_training")
    assert status == 2 and len(err.splitlines()) == 1
    assert "GPU's memory is full" in err and "--micro_batch N" in err and "out of memory" in err


def test_determinism_is_asked_for_and_given_up_again(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        engine.device.set_up("fp32", deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        engine.device.set_up("fp32")
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_all_weights_learn_under_autocast_after_a_pass_without_gradients():
    """As stage 2 has one. Where autocast kept what that pass had cast, the next one would have no
    gradients (pytorch/pytorch#112583).
    """
    resnet, _ = models.build("R14_C10")
    images, policy = torch.rand(6, 3, 32, 32), torch.ones(6, 6)
    with engine.device.autocast(torch.device("cpu"), "bf16"):
        with torch.no_grad():
            resnet(images, policy)
        loss = resnet(images, policy).sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in resnet.parameters())


def test_tensorboards_writer_is_pytorchs_own_where_the_other_is_missing(monkeypatch, tmp_path):
    class Writer:
        def __init__(self, folder, purge_step, flush_secs):
            self.made = folder, purge_step

    own = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # an import of it fails
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", own)
    assert engine.logs.summary_writer(tmp_path, 3).made == (str(tmp_path), 3)


def test_another_pipes_end_is_seen():
    """Only a reader of the output that has gone is no error; see tests/test_refusals.py."""

    def main():
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        engine.run_script(main)


class Knows(torch.nn.Module):
    """A network that is right about the first `right` of every ten images."""

    def __init__(self, right):
        super().__init__()
        self.right, self.seen = right, []

    def forward(self, images):
        self.seen.append((len(images), self.training))
        numbers = images[:, 0, 0, 0].long()
        answers = torch.where(numbers % 10 < self.right, numbers % 7, numbers % 7 + 1)
        return torch.nn.functional.one_hot(answers, 8).float()


class Numbered:
    """A loader of 1,000 images that show their number, of class number % 7; a rank's part of it."""

    num_images, batch_size = 1000, 200

    def __init__(self, rank=0, world=1):
        self.rank, self.world = rank, world

    def epoch(self, epoch, skip=0):
        for first in range(0, 1000, 200):
            part = 200 // self.world
            start = self.rank * part
            numbers = torch.arange(first + start, first + start + part + 0.0)
            shard = engine.Shard(start, start + part, 200, step=first // 200)
            yield numbers.view(-1, 1, 1, 1).expand(-1, 3, 2, 2), numbers.long() % 7, shard


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_have_the_first_images(world):
    """As many processes find the same candidates."""
    found = []
    for rank in range(world):
        for images, labels in loop.first_batches(Numbered(rank, world), 450):
            assert len(images) == len(labels) > 0
            found += images[:, 0, 0, 0].long().tolist()
    assert sorted(found) == list(range(450))


def test_the_first_images_tell_how_good_a_resnet_is():
    network = Knows(7).train()
    assert loop.first_accuracy(network, Numbered(), "fp32") == (0.7, 500)
    assert network.seen == [(200, False), (200, False), (100, False)] and network.training


@pytest.mark.parametrize(
    "accuracy, classes, near",
    [(0.051, 10, True), (0.19, 10, True), (0.2, 10, False), (0.5, 2, True), (0.56, 2, False),
     (0.09, 1000, True), (0.76, 1000, False), (0.0, 1, True)],
)  # fmt: skip
def test_near_chance_is_told(accuracy, classes, near):
    assert (loop.near_chance(accuracy, classes) is not None) == near


def test_stages_begin_by_saying_how_good_the_base_is(run, common, base_file, stage_1, tmp_path):
    """A random one is near chance, and every script says so."""
    once = ["--max_epochs", 1, "--batch_size", 40, "--cv_dir"]
    base = ["--base", base_file]
    for script, options in (
        ("cl_training", [*base, *once, tmp_path / "1"]),
        ("finetune", [*base, *once, tmp_path / "2", "--pretrained", stage_1]),
        ("finetune", [*base, *once, tmp_path / "3", "--policy", "first:3"]),
        ("pretrain", [*once, tmp_path / "0", "--pretrained", base_file]),
        ("test", base),
        ("test", [*base, "--load", stage_1]),
    ):
        status, _, err = run(script, *common, *options)
        assert status == 0 and err.count("is near chance") == 1, err
    status, _, err = run("test", *common, *base, "--policy", "first:3")
    assert status == 0 and "near chance" not in err


@pytest.mark.parametrize("warm, rates", [(0, [1, 1, 0.1, 0.1, 0.01]), (2, [1, 1, 1, 1, 0.1])])
def test_steps_of_the_rate_are_counted_from_the_end_of_a_warm_start(warm, rates):
    args = Namespace(schedule="step", lr_steps=None, epoch_step=2, lr_decay_ratio=0.1)
    args.warm_start = warm
    found = [schedule.lr_factor(args, epochs_done) for epochs_done in range(5)]
    assert found == pytest.approx(rates)


def written(folder):
    events = b"".join(path.read_bytes() for path in (folder / "log").iterdir())
    return events.count(b"train_accuracy")


def test_each_epochs_figures_reach_tensorboard_soon(tmp_path, monkeypatch):
    """A run that is killed then has no fewer epochs there than in its checkpoint."""
    logs = Logs(tmp_path, Namespace(subset=None))
    logs.open(0, None)
    for epoch in (1, 2):
        logs.begin(epoch)
        logs.line("", "train", accuracy=0.5)
        logs.end()
        until = time.monotonic() + 5
        while time.monotonic() < until and written(tmp_path) < epoch:
            time.sleep(0.05)
        assert written(tmp_path) == epoch
    logs.close()


@pytest.mark.parametrize(
    "done, steps, said",
    [(0, 5, "5 steps of epoch 1 are kept"), (2, 3, "epoch 2 and 3 steps of epoch 3 are kept"),
     (2, 0, "epoch 2 is kept"), (0, 0, "the beginning is kept")],
)  # fmt: skip
def test_what_is_kept_is_said_in_words(done, steps, said, tmp_path):
    logs = SimpleNamespace(close=lambda: None, writer=1)
    run = SimpleNamespace(logs=logs, cv_dir=tmp_path, done=done, steps_done=steps)
    run.is_trained, run.lock = False, None
    error = ValueError()
    engine.Run.__exit__(run, ValueError, error, None)
    assert error.__notes__ == [f"{said}; go on with --load {tmp_path / 'last.t7'}"]


def test_a_second_step_on_a_shard_is_refused():
    """Its gradients would add up to the first one's, and its images would count twice."""

    class OneBatch:
        num_images = batch_size = 3

        def epoch(self, epoch, skip=0):
            yield torch.randn(3, 4), torch.zeros(3), engine.Shard(0, 3, 3)

        def __len__(self):
            return 1

    layer = nn.Linear(4, 2)
    training = loop.Training([layer], [torch.optim.SGD(layer.parameters(), 0.1)], micro_batch=2)
    steps = 0
    for images, labels, _ in training.batches(OneBatch(), 1):  # in two parts, a step each
        training.step(layer(images).mean(), {"correct": labels == 0})
        steps += 1
        with pytest.raises(RuntimeError, match="a second step on the same images"):
            training.step(layer(images).mean(), {"correct": labels == 0})
    assert steps == 2 and len(training.results["correct"]) == 3
