"""benchmarks/ and what carries a data set to a GPU, as far as a CPU can tell."""

import argparse
import json
import subprocess
import sys

import pytest
import torch
from conftest import refused, script_module
from test_graphs import remember
from test_models import random_norms

import deploy
import engine
import models
import utils
from engine import UserError, trained
from engine.storage import ROOT


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return script_module("benchmarks/graphs")


def test_contenders_that_only_a_gpu_has_give_the_same_logits(graphs):
    torch.manual_seed(0)
    resnet, policy_net = map(random_norms, models.build("R14_C10"))
    twins = models.deploy(resnet, models.GreedyPolicy(policy_net), torch.float64)
    names = set()
    for batch in (1, 20):
        x = torch.randn(batch, 3, 32, 32, dtype=torch.float64)
        policy = (torch.rand(batch, 6) < 0.5).double()
        expected = {"full": resnet(x).detach(), "ours": resnet(x, policy).detach()}
        for name, call in graphs.contenders(*twins, x, policy[None], remember).items():
            torch.testing.assert_close(call(), expected[name[:4]])
            names.add(name)
    assert len(names) == 5


@pytest.fixture
def inference(graphs):
    return script_module("benchmarks/inference")


def test_contenders_run_under_one_policy_after_the_other(inference, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(deploy.twin, "CPU_CHUNK", 4)
    monkeypatch.setitem(inference.DTYPES, "fp32", torch.float64)
    x, policies = torch.randn(10, 3, 32, 32, dtype=torch.float64), torch.rand(2, 10, 6) < 0.5
    resnet, policy_net = map(random_norms, models.build("R14_C10"))
    args = argparse.Namespace(no_compile=True, model="R14_C10")
    policy = models.GreedyPolicy(policy_net)
    calls = inference.contenders(resnet, policy, x, policies.double(), "fp32", args)
    gated, _ = models.build("AIG14_C10")
    gated_calls = inference.gated_contenders(random_norms(gated), x, policies.double(), "fp32")
    for policy in (*policies, policies[0]):
        for name, call in calls.items():
            expected = resnet(x, policy.double() if name.startswith(("ours", "masked")) else None)
            torch.testing.assert_close(call(), expected.detach())
        _, gates = gated_calls["ours, deployed, with gates"]()
        assert torch.equal(gates.bool(), policy)
    assert len(calls) >= 6


class Five:
    """Five images, in batches of two."""

    num_images = 5

    def epoch(self, _):
        return ((torch.zeros(size), None, None) for size in (2, 2, 1))


def test_times_are_medians_of_whole_batches_after_the_first_pass(graphs, monkeypatch):
    """Here a call returns the seconds that it took."""
    module = script_module("benchmarks/checkpoints")
    monkeypatch.setattr(module, "timed", lambda call: call())
    monkeypatch.setattr(trained.device, "timed", lambda call, _: call())
    monkeypatch.setattr(trained, "TIMED_PASSES", 2)

    def taking(*seconds):
        coming = iter((70, 80, *seconds))
        return lambda images: next(coming)

    rows = [
        argparse.Namespace(name=name, call=taking(*seconds), test=Five())
        for name, seconds in {"full": (9, 8, 6, 8), "ours": (3, 2, 1, 4)}.items()
    ]
    found = module.measure(rows, size=2, passes=2)
    full = {"name": "full", "ms_per_image": 4000, "speed_up": 1, "batches": 4}
    assert found == [full, {"name": "ours", "ms_per_image": 1250, "speed_up": 3.5, "batches": 4}]
    model = trained.TrainedModel.__new__(trained.TrainedModel)
    model.deployed = lambda: (taking(3, 2, 1, 4), taking(9, 8, 6, 8))
    assert model.time(Five(), 2) == {
        "batch_size": 2, "ms_per_image": 1250, "full_ms_per_image": 4000, "speed_up": 3.5,
    }  # fmt: skip


def test_so_many_batches_are_timed_however_long_they_take():
    assert len(list(trained.whole_batches(Five(), 2, 9, seconds=0))) == 1
    assert len(list(trained.whole_batches(Five(), 2, 9, seconds=0, least=5))) == 5
    assert len(list(trained.whole_batches(Five(), 2, 2, seconds=0, least=5))) == 4
    assert len(list(trained.whole_batches(Five(), 2, 3))) == 6


def test_checkpoints_are_timed_in_turn(run, common, base_file, stage_1, tmp_path, graphs):
    base = f"--base '{base_file}'"
    rows = [f"full={base}", f"stage 1={base} --load '{stage_1}'", f"2={base} --policy first:2"]
    options = ["--batch_size", 16, "--passes", 3, "--json", tmp_path / "out.json"]
    status, out, err = run("benchmarks/checkpoints", *common, *rows, *options)
    assert status == 0, err
    found = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["name"] for row in found] == ["full", "stage 1", "2"]
    assert all(row["batches"] == 6 and f"| {row['ms_per_image']:.3f}" in out for row in found)


@pytest.mark.parametrize("rows, words", [
    (["full"], "full: expected NAME=OPTIONS"),
    (["a=--load 'x"], "a=--load 'x: No closing quotation"),
    (["a=--time"], "unrecognized arguments: --time"),
    (["a=--base {base}", "a=--base {base}"], "two rows have the same name"),
    (["a=--base {base}", "b=--model R8_C100"], "rows of different data sets"),
])  # fmt: skip
def test_rows_that_would_mean_nothing_are_refused(
    run, common, base_file, graphs, rows, words, monkeypatch
):
    monkeypatch.setattr(engine.bases, "load_base", lambda *given: None)
    rows = [row.format(base=base_file) for row in rows]
    status, _, err = run("benchmarks/checkpoints", *common, *rows)
    assert status == 2 and words in err and err.count("\n") == 1


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = script_module("benchmarks/gpu")
    monkeypatch.setattr(module.capabilities, "gpu", lambda: True)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    command = ["make", "--silent", "gpu", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    own = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode == 2 and not done.stdout
    assert own == ["gpu.py: PyTorch sees no GPU here, and there is nothing else to measure"]


def test_what_is_missing_is_named(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "NEEDED", ("json", "no_such_package"))
    monkeypatch.setattr(gpu, "TENSORBOARD", ("nor_this", "nor_that"))
    with pytest.raises(UserError, match="lacks no_such_package, nor_this or nor_that"):
        gpu.check()
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(UserError, match="2.9.1.*2.11 or newer"):
        gpu.check()


def test_its_commands_have_options_that_exist(gpu, tmp_path, monkeypatch):
    (tmp_path / "CIFAR10.pt").touch()
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--data_dir", str(tmp_path)])
    todo = gpu.steps(gpu.parse_args())
    scripts = set()
    for step in todo[1:]:
        monkeypatch.setattr(sys, "argv", step.command[1:])
        script_module(step.command[1].removesuffix(".py")).parse_args()
        scripts.add(step.command[1])
    assert len(scripts) == 5 and todo[0].command[3] == "tests/test_cuda.py"
    given = {b for step in todo if "benchmarks" in step.command[1] for b in step.command}
    assert set(map(str, gpu.BATCHES)) | set(gpu.PRECISIONS) <= given
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--data_dir", str(tmp_path / "none")])
    assert len(gpu.steps(gpu.parse_args())) == len(todo) - 3


INFERENCE = {"precision": "bf16", "batch": 32, "contender": "ours, deployed", "ms": 1.5,
             "speed_up": 2.0, "flop_ratio": 2.5, "efficiency": 0.8,
             "over_fastest_full": 1.9}  # fmt: skip
TRAINING = {"stage": "stage 1", "batch": 2048, "contender": "sparse", "images_per_second": 7e3,
            "over_masked": 5.0, "peak_mib": 900.0}  # fmt: skip


def test_figures_are_gathered_and_the_time_is_kept(gpu, tmp_path, monkeypatch, capsys):
    def step(name, code, rows=None):
        file = tmp_path / f"{name}.json" if rows else None
        if rows:
            code = f"open({str(file)!r}, 'w').write({json.dumps({'rows': rows})!r})"
        return gpu.Step(name, [sys.executable, "-c", code], file)

    todo = [
        step("tests", "print('3 passed')"),
        step("inference bf16", "", [INFERENCE, INFERENCE | {"contender": "full", "ms": 3.0}]),
        step("training bf16 2048", "", [TRAINING]),
        step("broken", "raise SystemExit('why')"),
        step("endless", "import time; time.sleep(60)"),
        step("late", "print('never')"),
    ]
    monkeypatch.setattr(gpu, "steps", lambda args: todo)
    monkeypatch.setattr(gpu, "ENOUGH", 0.5)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--max_minutes", "0.05", "--out", str(out)])
    with pytest.raises(UserError, match="some steps failed"):
        gpu.main()
    content = json.loads((out / "gpu.json").read_text())
    endings = [step["ending"] for step in content["steps"]]
    assert endings == ["done"] * 3 + ["failed, status 1", "cut off by the time"]
    assert content["left_out"] == ["late"] and "why" in capsys.readouterr().err
    assert content["steps"][1]["figures"]["rows"][0] == INFERENCE
    text = (out / "gpu.md").read_text()
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    for row in (
        ["tests", "done", "0", "3 passed"],
        ["bf16, 32", "1.5", "3"],
        ["bf16", "32", "ours, deployed", "2.00", "2.50", "0.80", "1.90"],
        ["bf16", "stage 1", "2048", "sparse", "7000", "5.00", "900"],
    ):
        assert row in rows


def test_a_data_set_travels_in_parts(tmp_path):
    parts = script_module("recipes/cifar_parts")
    content = bytes(range(256)) * 40
    (tmp_path / "whole.pt").write_bytes(content)
    made = parts.pack(tmp_path / "whole.pt", tmp_path / "parts", size=3000)
    assert [path.stat().st_size for path in made] == [3000, 3000, 3000, 1240]
    assert parts.PART < 50e6
    target = tmp_path / "data" / "CIFAR10.pt"
    moved = made[2].rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="whole.pt.02 of 4 parts not there yet"):
        parts.join(tmp_path / "parts", target)
    made[2].write_bytes(b"x" * 3000)
    with pytest.raises(UserError, match="whole.pt.02: damaged"):
        parts.join(tmp_path / "parts", target)
    assert not target.exists()
    moved.rename(made[2])
    parts.join(tmp_path / "parts", target)
    assert target.read_bytes() == content


def test_images_are_held_while_they_are_timed(monkeypatch):
    """A loader whose workers go on decoding would take their time from what is timed."""

    class Once(Five):
        asked = 0

        def epoch(self, _):
            self.asked += 1
            return super().epoch(_)

    test = Once()
    model = trained.TrainedModel.__new__(trained.TrainedModel)
    model.deployed = lambda: (lambda images: None, lambda images: None)
    model.time(test, 2)
    assert test.asked == 1
    monkeypatch.setattr(trained, "TIMED_BYTES", 4)
    held = trained.Held(Five(), 2)
    assert len(held.batches) == 1


def test_flops_of_masked_execution_are_of_the_blocks_that_any_image_keeps(graphs, monkeypatch):
    inference = script_module("benchmarks/inference")
    monkeypatch.setattr(inference, "interleaved", lambda calls, *_: dict.fromkeys(calls, 1.0))
    monkeypatch.setattr(inference, "conv_gflops", lambda *_: 1.0)
    config = models.config("R14_C10")
    resnet, _ = models.build("R14_C10")
    policies = torch.zeros(2, 3, 6)
    policies[0, 0, 0] = policies[0, 1, 1] = policies[1, :, 2] = 1
    args = argparse.Namespace(busy=[0], repeats=1, budget=1.0, only="", no_compile=True,
                              model="R14_C10")  # fmt: skip
    x = torch.randn(3, 3, 32, 32)
    rows = inference.rows_of(resnet.eval(), None, config, policies, x, "fp32", args)
    ratios = {row["contender"]: row["flop_ratio"] for row in rows}
    fixed, per_block = utils.block_flops(resnet, (3, 32, 32))
    full = fixed + per_block.sum().item()
    masked = fixed + (per_block[0] + per_block[1] + per_block[2]).item() / 2
    ours = fixed + (per_block[0] / 3 + per_block[1] / 3 + per_block[2]).item() / 2
    assert ratios["masked, eager"] == pytest.approx(full / masked)
    assert ratios["ours, deployed"] == pytest.approx(full / ours)


def test_a_benchmark_of_processes_passes_errors_on(run, cifar_dir, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    given = ["--model", "AIG8_C10", "--data_dir", cifar_dir, "--skip_data_check", "--rounds", 1]
    refused(run("benchmarks/processes", *given), "pretrain.py: ", "AIG8_C10 is a model of ConvNet")
