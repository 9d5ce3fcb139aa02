"""A part of a batch a thread: the same numbers, and nothing left behind."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from test_models import random_norms
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import models
from deploy import parts

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.fixture(params=[2, 3, 5])
def threads(request):
    """More threads than the suite's one, also more than images."""
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def network(name="R14_C10", seed=0):
    torch.manual_seed(seed)
    resnet, policy_net = models.build(name)
    random_norms(resnet)
    if policy_net is not None:
        random_norms(policy_net)
    return resnet.eval(), policy_net and policy_net.eval()


def policies(images, blocks):
    """One like those of training, one that is full, an empty one, three of them at once."""
    drawn = (torch.rand(images, blocks) < 0.4).float()
    full, empty = torch.ones_like(drawn), torch.zeros_like(drawn)
    return [drawn, full, empty, torch.stack([drawn, 1 - drawn, full]), None]


def close(found, expected, dtype):
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["R14_C10", "R50_ImgNet"])
def test_a_part_a_thread_gives_the_originals_logits(name, dtype, threads):
    resnet, policy_net = network(name)
    resnet, policy_net = resnet.to(dtype), policy_net.to(dtype)
    decide = models.GreedyPolicy(policy_net)
    fast, fast_decide = models.deploy(resnet, decide, dtype)
    side = 32 if name == "R14_C10" else 64
    sizes = [1, 2, 3, 4, 7, 31, 64] if side == 32 else [1, 2, 5]
    for size in sizes:
        x = torch.randn(size, 3, side, side, dtype=dtype)
        with torch.no_grad():
            for policy in policies(size, resnet.num_blocks):
                expected = resnet(x, policy)
                scale = expected.abs().amax(-1, keepdim=True)
                close(fast(x, policy) / scale, expected / scale, dtype)
            near, far = policy_net(x)[0], fast_decide.policy_net(x)[0]
            close(far, near, dtype)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gates_in_parts_decide_as_the_originals_do(dtype, threads):
    net, _ = network("AIG14_C10")
    net = net.to(dtype)
    fast, _ = models.deploy(net, None, dtype)
    for size in (1, 2, 3, 8, 64):
        x = torch.randn(size, 3, 32, 32, dtype=dtype)
        with torch.no_grad():
            logits, gates = net(x)
        found, decided = fast(x)
        assert torch.equal(decided, gates.float())
        close(found / logits.abs().max(), logits / logits.abs().max(), dtype)


@pytest.mark.parametrize("images", range(1, 65))
@pytest.mark.parametrize("number", [1, 2, 3, 8, 100])
def test_parts_hold_every_image_once_and_cost_alike(images, number):
    cost = torch.rand(images)
    shares = parts.balanced(cost, number)
    assert torch.cat(shares).sort().values.tolist() == list(range(images))
    totals = torch.tensor([cost[rows].sum() for rows in shares])
    assert totals.max() - totals.min() <= cost.max() + 1e-5
    for rows in shares:
        assert (cost[rows].diff() <= 0).all()


def test_blocks_that_are_large_run_where_their_images_are(monkeypatch):
    """At ImageNet's size nothing is gathered, at CIFAR's something is."""
    gathered = []
    gather = torch.Tensor.index_select
    monkeypatch.setattr(
        torch.Tensor, "index_select", lambda *given: gathered.append(1) or gather(*given)
    )
    for name, side, copies in (("R14_C10", 32, True), ("R50_ImgNet", 224, False)):
        resnet, _ = network(name)
        fast, _ = models.deploy(resnet)
        policy = torch.zeros(4, resnet.num_blocks)
        policy[[0, 2, 3], ::2] = policy[1, 1::2] = 1
        gathered.clear()
        fast(torch.randn(4, 3, side, side), policy)
        assert bool(gathered) == copies


def test_what_costs_an_image_is_a_blocks_flops():
    """The balance goes by multiply-adds, up to a factor."""
    import utils

    for name, side in (("R14_C10", 32), ("R50_ImgNet", 224)):
        resnet, _ = network(name)
        fast, _ = models.deploy(resnet)
        _, per_block = utils.block_flops(resnet, (3, side, side))
        quotient = per_block / fast.block_costs.double()
        assert quotient.max() / quotient.min() < 1.1  # normalisation and sums are not counted


def test_many_callers_leave_nothing_behind(threads):
    resnet, policy_net = network()
    fast, decide = models.deploy(resnet, models.GreedyPolicy(policy_net))
    x = torch.randn(9, 3, 32, 32)
    expected = fast(x, decide(x))
    before = threading.active_count()
    wrong = []

    def caller():
        torch.set_num_threads(threads)
        for _ in range(250):
            if not torch.equal(fast(x, decide(x)), expected):
                wrong.append(1)
        if torch.get_num_threads() != threads:
            wrong.append("threads")

    callers = [threading.Thread(target=caller) for _ in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert not wrong and threading.active_count() == before
    assert torch.get_num_threads() == threads


def test_a_thread_that_is_born_later_has_the_programs_number(threads):
    parts.POOLS.forget()
    parts.run([threading.get_ident] * 2)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [threads]


def test_errors_come_through_when_all_have_ended(threads):
    ended = []

    def fails():
        raise RuntimeError("a part")

    with pytest.raises(RuntimeError, match="a part"):
        parts.run([fails, lambda: ended.append(1)])
    assert ended == [1]
    assert parts.run([lambda: 1, lambda: 2]) == [1, 2]


def test_parts_run_as_their_caller_does(threads):
    def states():
        autocast = torch.is_autocast_enabled("cpu")
        return torch.is_inference_mode_enabled(), autocast, torch.get_num_threads()

    assert parts.run([states] * 2) == [(True, False, 1)] * 2
    with torch.autocast("cpu", torch.bfloat16):
        assert parts.run([states] * 2) == [(True, True, 1)] * 2


def test_what_watches_a_thread_sees_the_whole_batch(threads):
    """A mode or a profiler of the caller's is not in other threads: the batch stays with it."""
    resnet, _ = network()
    fast, _ = models.deploy(resnet)
    x = torch.randn(4, 3, 32, 32)
    assert parts.count(x) == min(4, threads)
    with FlopCounterMode(display=False) as counter:
        fast(x)
    assert counter.get_total_flops() > 4 * 50e6
    with torch.profiler.profile() as profile:
        fast(x)
    assert sum("convolution" in event.key for event in profile.key_averages())


class Predicts(torch.utils.data.Dataset):
    """A data set that runs a twin, as one that looks for hard examples might."""

    def __init__(self, fast):
        self.fast = fast

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.fast(torch.full((3, 3, 32, 32), index / 4)), threading.active_count()


def test_workers_of_a_loader_have_no_pool(threads):
    fast, _ = models.deploy(network()[0])
    expected = torch.stack([logits for logits, _ in map(Predicts(fast).__getitem__, range(4))])
    for context in ("fork", "spawn"):
        loader = DataLoader(Predicts(fast), 4, num_workers=1, multiprocessing_context=context)
        ((logits, running),) = list(loader)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert running.max() <= 2  # its own and the queue's


SCRIPT = """
import os, threading, torch, models
torch.set_num_threads(2)
fast, _ = models.deploy(models.build("R14_C10")[0].eval())
x = torch.randn(4, 3, 32, 32)
before = fast(x)
child = os.fork()
if not child:
    torch.set_num_threads(2)
    os._exit(0 if torch.equal(fast(x), before) else 1)
print(os.waitpid(child, 0)[1], threading.active_count())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_and_the_end_of_a_program_find_no_pool():
    # Python 3.12 and newer warn of a fork beside threads
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.split() == ["0", "3"]  # the program's thread and two for parts


def test_the_same_bits_beside_a_busy_process(threads):
    fast, decide = models.deploy(network()[0], models.GreedyPolicy(network()[1]))
    x = torch.randn(33, 3, 32, 32)
    quiet = fast(x, decide(x))
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        for _ in range(20):
            assert torch.equal(fast(x, decide(x)), quiet)
    finally:
        busy.kill()
        busy.wait()
