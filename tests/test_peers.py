"""What benchmarks/ hands to other tools is what it says: networks, policies and FLOPs."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, script_module
from test_models import random_norms
from torch import nn

import engine
import models
import utils


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return lambda name: script_module(f"benchmarks/{name}")


def test_counters_are_held_against_what_is_computed(benchmark, monkeypatch):
    counters = benchmark("counters")
    path = ROOT / "cv" / "R32_C10" / "stage2"
    monkeypatch.setattr("sys.argv", ["counters.py", "--model", "R32_C10", "--load", str(path)])
    cases = counters.cases(counters.parse_args())
    flops = {}
    for name, make in cases.items():
        network, inputs, flops[name] = make()
        with torch.no_grad():
            assert counters.by_torch(network, inputs) == flops[name], name
    # they differ, so that a tool that does not see what was dropped is seen
    assert len({float(count) for count in flops.values()}) == 5
    assert flops["masked, 8 images"] > flops["sparse, 8 images"] == flops["deployed, 8 images"]


def test_a_tool_that_fails_is_a_cell(benchmark):
    shown = benchmark("counters").shown
    assert [shown(0.5), shown("RuntimeError: no"), shown(None)] == ["0.5000", "raises", ""]


@pytest.mark.parametrize("clone", [True, False])
def test_a_cond_a_block_is_the_same_network(benchmark, clone):
    compilers = benchmark("compilers")
    torch.manual_seed(0)
    resnet = random_norms(models.build("R8_C10")[0])
    net = compilers.Conditional(resnet, clone).eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        for policy in ([1, 0, 1], [0, 1, 0]):
            policy = torch.tensor([policy], dtype=torch.float64)
            torch.testing.assert_close(net(x, policy), resnet(x, policy))


def test_a_difference_is_the_largest_over_policies(benchmark):
    compilers = benchmark("compilers")
    policies = torch.tensor([[[0.0]], [[1.0]]])

    def resnet(x, policy):
        return x * (1 + policy)

    def wrong(x, policy):
        return resnet(x, policy) + policy  # only where the block is kept

    x = torch.full((1, 1), 2.0)
    assert compilers.difference(resnet, resnet, x, policies) == 0
    assert compilers.difference(wrong, resnet, x, policies) == pytest.approx(1 / 4)


def test_stages_with_names_are_the_same_network(benchmark):
    exits = benchmark("early_exits")
    torch.manual_seed(0)
    resnet = random_norms(models.build("R14_C10")[0])
    stages = exits.Stages(resnet)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(stages(x), resnet(x))
    places = exits.exit_layers(resnet.stages)
    assert places["behind stages"] == ["stages.0", "stages.1"]
    assert places["behind every second block"] == ["stages.0.1", "stages.1.1", "stages.2.1"]
    for layer in sum(places.values(), []):
        stages.get_submodule(layer)


def test_an_exit_costs_what_was_run_and_the_heads_it_passed(benchmark):
    exits = benchmark("early_exits")
    resnet = models.build("R14_C10")[0].eval()
    head = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
    point = SimpleNamespace(name="e0", in_channels=16)
    model = SimpleNamespace(
        backbone=exits.Stages(resnet),
        exit_heads={"e0": head},
        config=SimpleNamespace(exit_points=[point]),
    )
    fixed, per_block = utils.block_flops(resnet, (3, 32, 32))
    for layer, blocks in (("stages.0", 2), ("stages.0.0", 1)):
        left, stayed = exits.exit_flops(model, [layer], (3, 32, 32)).tolist()
        assert left == fixed + per_block[:blocks].sum() + 2 * 16 * 10
        assert stayed == fixed + per_block.sum() + 2 * 16 * 10


def test_each_pass_is_another_epoch(benchmark):
    asked = []

    class Loader:
        def epoch(self, epoch):
            asked.append(epoch)
            yield torch.zeros(2), torch.ones(2), engine.Shard(0, 2, 2)

    batches = benchmark("early_exits").Batches(Loader())
    assert [len(pair) for _ in range(2) for pair in batches] == [2, 2]
    assert asked == [1, 2]


def test_forms_of_the_optimizer_do_the_same_step(benchmark, run):
    status, out, err = run("benchmarks/training", "--optimizers", "--model", "R8_C10", "--keep", 1,
                           "--batch_sizes", 8, 8, "--repeats", 1)  # fmt: skip
    assert status == 0, err
    rows = [line.split("|")[1:] for line in out.splitlines() if line.startswith("| stage ")]
    forms = [row[2].strip() for row in rows[1:]]
    assert forms == ["default", "foreach", "fused"] * 2
    assert all(float(row[3]) > 0 and float(row[5]) > 0 for row in rows[1:])


def test_slopes(benchmark):
    slope = benchmark("scaling").slope
    assert slope([1, 2, 4, 8], [3, 6, 12, 24]) == pytest.approx(1)
    assert slope([10, 100], [7, 7]) == pytest.approx(0)


def test_bookkeeping_is_that_of_an_evaluation(benchmark, monkeypatch):
    scaling = benchmark("scaling")
    asked = {}
    measure = engine.dependence.measure

    def spied(trained, test, policies, correct, full=None):
        asked.update(policies=policies, figures=measure(trained, test, policies, correct, full))
        return asked["figures"]

    monkeypatch.setattr(engine.dependence, "measure", spied)
    found = scaling.bookkeeping(2500)
    assert asked["policies"].shape == (2500, 33) and min(found.values()) > 0
    assert 0 < asked["figures"]["shuffled"]["accuracy"] < 0.3  # ten classes at random


def test_an_epoch_is_neither_the_first_nor_one_with_an_evaluation(benchmark, monkeypatch):
    processes = benchmark("processes")
    commands = []

    def run(command, env, **_):
        commands.append((command, env["OMP_NUM_THREADS"]))
        folder = command[command.index("--cv_dir") + 1]
        with open(f"{folder}/metrics.jsonl", "w") as file:
            file.write('{"seconds": 9}\n{"seconds": 5}\n{"seconds": 8}\n')
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(processes.subprocess, "run", run)
    assert processes.epoch(2, 1, "pretrain.py", "--subset", 8)["seconds"] == 5
    assert processes.epoch(1, 2, "pretrain.py")["peak"] > 0
    (shared, one), (alone, two) = commands
    assert "--nproc_per_node=2" in shared and "torch.distributed.run" not in alone
    assert (one, two) == ("1", "2") and shared[-2:] == ["--subset", "8"]
