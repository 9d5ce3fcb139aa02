"""The scripts end to end on a small data set: what they write, resume and refuse."""

import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, script_module, write_base
from faults import same

import engine
import models
import utils
from engine import Shard, checkpoint, cifar

ROOT = checkpoint.ROOT
LINE = r"A: \d\.\d{3} \| R: -?\d\.\d\dE[+-]\d\d \| S: \d+\.\d{3} \| V: \d+\.\d{3} \| #: \d+"
NAMED = r"ckpt_E_\d+_A_\d\.\d{3}_R_-?\d\.\d\dE[+-]\d\d_S_\d+\.\d\d_#_\d+\.t7"


@pytest.fixture(scope="module")
def common(cifar_dir):
    return ["--model", TINY, "--data_dir", cifar_dir, "--skip_data_check"]


@pytest.fixture(scope="module")
def stage_1(common, base_file, tmp_path_factory):
    """A finished stage-1 run of two epochs, as its directory."""
    folder = tmp_path_factory.mktemp("stage1")
    script = [sys.executable, ROOT / "cl_training.py", *common, "--base", base_file]
    options = ["--cv_dir", folder, "--max_epochs", 2, "--batch_size", 40, "--test_every", 1]
    subprocess.run(list(map(str, script + options)), check=True, capture_output=True, env=ENV)
    return folder


ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def options_of(script, common, base_file, stage_1):
    """What each training script needs to run on the small data set."""
    options = [*common, "--batch_size", 40]
    if script != "pretrain":
        options += ["--base", base_file]
    if script == "finetune":
        options += ["--pretrained", named(stage_1)[0]]
    return options


def named(folder):
    return sorted(p for p in Path(folder).iterdir() if re.fullmatch(NAMED, p.name))


def metrics(folder):
    """The lines of metrics.jsonl without the times, which are never the same."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def trained(folder):
    content = checkpoint.read(folder)
    return {k: v for k, v in content.items() if k not in ("args",)}


def test_stage_1_writes_what_users_expect(run, common, base_file, tmp_path):
    status, out, err = run(
        "cl_training", *common, "--base", base_file, "--cv_dir", tmp_path, "--max_epochs", 3,
        "--batch_size", 40, "--test_every", 2, "--precision", "bf16",
    )  # fmt: skip
    assert status == 0, err
    lines = out.splitlines()
    assert [bool(re.fullmatch(rf"E: {n} \| {LINE}", lines[i])) for n, i in ((1, 0), (2, 1))]
    tests = [line for line in lines if line.startswith("TS - ")]
    # every second epoch, and the last
    assert len(tests) == 2 and all(re.fullmatch(f"TS - {LINE}", line) for line in tests)
    assert [path.name[:8] for path in named(tmp_path)] == ["ckpt_E_2", "ckpt_E_3"]
    content = checkpoint.read(named(tmp_path)[1])
    assert content["epoch"] == 3 and "resnet" not in content
    assert content["acc"] == metrics(tmp_path)[2]["test_accuracy"]
    assert checkpoint.read(tmp_path)["epoch"] == 3
    keys = {"accuracy", "reward", "sparsity", "variance", "unique_policies"}
    assert {f"{s}_{k}" for s in ("train", "test") for k in keys} < metrics(tmp_path)[1].keys()
    assert "test_accuracy" not in metrics(tmp_path)[0]
    assert "batch_size: 40" in (tmp_path / "args.txt").read_text()
    assert "--batch_size 40" in (tmp_path / "command.txt").read_text()
    (events,) = (tmp_path / "log").glob("events.*")
    for tag in (b"test_accuracy", b"test_keep_rates", b"test_blocks"):
        assert tag in events.read_bytes()


def test_curriculum_forces_blocks_in_training_and_evaluation(run, common, base_file, tmp_path):
    status, out, err = run(
        "cl_training", *common, "--base", base_file, "--cv_dir", tmp_path, "--max_epochs", 2,
        "--batch_size", 40, "--test_every", 1, "--cl_step", 1,
    )  # fmt: skip
    assert status == 0, err
    for learned, line in enumerate(metrics(tmp_path), 1):  # blocks, of six
        for mode in ("train", "test"):
            assert 6 - learned <= line[f"{mode}_sparsity"] <= 6
            assert line[f"{mode}_unique_policies"] <= 2**learned


def test_a_cifar_policy_starts_from_a_classifier(run, common, base_file, tmp_path):
    torch.manual_seed(0)
    classifier = models.build("R8_C10")[0].state_dict()
    checkpoint.write({"state_dict": classifier}, tmp_path / "r8.t7")
    status, _, err = run(
        "cl_training", *common, "--base", base_file, "--cv_dir", tmp_path / "cl",
        "--max_epochs", 1, "--batch_size", 120, "--lr", 1e-9, "--policy_init", tmp_path / "r8.t7",
    )  # fmt: skip
    assert status == 0, err
    agent = checkpoint.read(tmp_path / "cl")["agent"]
    learned = [name for name in classifier if name.endswith("weight") and "fc" not in name]
    for name in learned:
        torch.testing.assert_close(agent[f"features.{name}"], classifier[name], rtol=0, atol=1e-6)
    assert len(learned) == 14  # a stem and six convolutions, with their BatchNorm


@pytest.fixture(scope="module")
def other_base(tmp_path_factory):
    """A ResNet of the same shape as base_file's, with weights of its own."""
    return write_base(tmp_path_factory.mktemp("other") / "other.t7", seed=5)


def test_a_policy_starts_from_another_on_another_base(
    run, common, base_file, other_base, stage_1, tmp_path
):
    start = named(stage_1)[1]
    learn = ["--max_epochs", 1, "--batch_size", 120, "--lr", 1e-9, "--policy_init"]
    status, _, err = run("cl_training", *common, "--base", other_base, "--cv_dir", tmp_path / "cl",
                         *learn, start)  # fmt: skip
    assert status == 0, err
    agent, source = checkpoint.read(tmp_path / "cl")["agent"], checkpoint.read(start)["agent"]
    learned = [name for name in source if name.endswith(("weight", "logit.bias"))]
    assert len(learned) == 17
    for name in learned:
        torch.testing.assert_close(agent[name], source[name], rtol=0, atol=1e-6)
    assert checkpoint.read(tmp_path / "cl")["base"] != checkpoint.read(start)["base"]

    torch.manual_seed(0)
    deeper = models.build("R26_C10")[1].state_dict()
    checkpoint.write({"agent": deeper, "model": "R26_C10"}, tmp_path / "deeper.t7")
    status, _, err = run("cl_training", *common, "--base", base_file, "--cv_dir", tmp_path / "no",
                         *learn, tmp_path / "deeper.t7")  # fmt: skip
    assert status == 2 and "deeper.t7" in err and "logit" in err


def test_the_resnet_is_frozen_in_stage_1_and_learns_in_stage_2(
    run, common, base_file, stage_1, tmp_path
):
    base = checkpoint.read(base_file)["state_dict"]
    status, _, err = run(
        "finetune", *options_of("finetune", common, base_file, stage_1), "--cv_dir", tmp_path,
        "--max_epochs", 2, "--penalty", -10, "--lr", 1e-3,
    )  # fmt: skip
    assert status == 0, err
    content = checkpoint.read(named(tmp_path)[0])
    start = checkpoint.read(named(stage_1)[1])
    assert content["stage"] == 2
    assert not torch.equal(content["resnet"]["conv1.weight"], base["conv1.weight"])
    assert not torch.equal(content["resnet"]["bn1.running_mean"], base["bn1.running_mean"])
    assert not torch.equal(content["agent"]["logit.weight"], start["agent"]["logit.weight"])
    assert torch.equal(content["agent"]["vnet.weight"], start["agent"]["vnet.weight"])
    assert start["base"] == content["base"]


def test_a_frozen_policy_stays_and_the_resnet_learns_under_it(
    run, common, base_file, stage_1, tmp_path
):
    options = options_of("finetune", common, base_file, stage_1)
    status, out, err = run("finetune", *options, "--cv_dir", tmp_path, "--max_epochs", 1,
                           "--freeze_policy", "--resnet_lr", 0.1)  # fmt: skip
    assert status == 0, err
    base = checkpoint.read(base_file)["state_dict"]
    content = checkpoint.read(tmp_path)
    assert same(content["agent"], checkpoint.read(named(stage_1)[0])["agent"])
    assert not torch.equal(content["resnet"]["conv1.weight"], base["conv1.weight"])
    assert "optimizer" not in content  # Adam would have nothing to do
    status, out, err = run("test", *common, "--load", tmp_path)
    assert status == 0 and f"Block Usage: {metrics(tmp_path)[0]['test_sparsity']:.3f}" in out, err
    refused(run("finetune", *common, "--policy", "first:2", "--freeze_policy"), "--freeze_policy")


def test_pretrain_learns_and_its_file_is_a_base(run, common, tmp_path):
    status, out, err = run(
        "pretrain", *common, "--cv_dir", tmp_path / "base", "--max_epochs", 12,
        "--batch_size", 20, "--lr", 0.05, "--test_every", 100, "--block_drop", 0.2,
    )  # fmt: skip
    assert status == 0, err
    (saved,) = (tmp_path / "base").glob("pk_E_12_A_*.t7")
    accuracy = metrics(tmp_path / "base")[-1]["test_accuracy"]
    assert accuracy > 0.5  # the classes differ in colour; chance is 0.1
    figures = tmp_path / "figures.json"
    status, out, err = run("test", *common, "--base", saved, "--json", figures)
    assert status == 0, err
    assert json.loads(figures.read_text())["accuracy"] == accuracy


@pytest.mark.parametrize("batch_size, multiple", [(1, 1), (7, 4), (1000, 1)])
def test_profile_prints_four_lines_at_any_batch_size(
    run, common, base_file, stage_1, cifar_dir, tmp_path, batch_size, multiple
):
    figures = tmp_path / "figures.json"
    status, out, err = run(
        "test", *common, "--base", base_file, "--load", named(stage_1)[1],
        "--batch_size", batch_size, "--json", figures, "--row_multiple", multiple,
    )  # fmt: skip
    assert status == 0, err
    number, power = r"\d+\.\d{3}", r"\d\.\d\dE[+-]\d\d"
    expected = (
        rf"    Accuracy: {number}\n    Block Usage: {number} ± {number}\n"
        rf"    FLOPs/img: {power} ± {power}\n    Unique Policies: \d+\n"
    )
    assert re.fullmatch(expected, out)
    content = json.loads(figures.read_text())
    expected = profile_by_hand(named(stage_1)[1], base_file, cifar_dir)
    for name, value in expected.items():
        assert content[name] == pytest.approx(value, rel=1e-9), name
    assert f"FLOPs/img: {expected['flops']:.2E} ± {expected['flops_std']:.2E}" in out


def profile_by_hand(path, base_file, cifar_dir):
    """What test.py should find, image by image."""
    resnet, policy_net = models.build(TINY)
    models.load_resnet(resnet, checkpoint.read(base_file)["state_dict"])
    models.load_policy(policy_net, checkpoint.read(path)["agent"])
    resnet.eval(), policy_net.eval()
    arrays = cifar.load("CIFAR10", cifar_dir, check=False)
    right, blocks, flops, policies = 0, [], [], set()
    for image, label in zip(arrays["test_images"], arrays["test_labels"].tolist(), strict=True):
        x = image.permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            policy = (policy_net(x)[0] >= 0.5).float()
            right += resnet(x, policy).argmax().item() == label
        kept = policy[0].tolist()
        policies.add(tuple(kept))
        blocks.append(sum(kept))
        total = utils.count_flops(policy_net, (3, 32, 32))
        total += utils.count_flops(resnet, (3, 32, 32), policy)
        flops.append(total)
    return {
        "accuracy": right / 40,
        "block_usage": statistics.mean(blocks),
        "block_usage_std": statistics.stdev(blocks),
        "flops": statistics.mean(flops),
        "flops_std": statistics.stdev(flops),
        "unique_policies": len(policies),
        "images": 40,
    }


def step_args(**given):
    options = {"alpha": 0.8, "beta": 0.1, "penalty": -3.0, "samples": 1, "distill": 0.0}
    return SimpleNamespace(**options | given)


def expected_policy_loss(probs, policy, policy_map, right, right_map, args, learned):
    """The sum of -A log pi over images and learned blocks, and of -s log s over all blocks."""
    policy_loss, entropy = 0.0, 0.0
    for i in range(len(probs)):
        rewards = [
            1 - (sum(u[i].tolist()) / 6) ** 2 if ok[i] else args.penalty
            for u, ok in ((policy, right), (policy_map, right_map))
        ]
        for k in range(6):
            s = args.alpha * probs[i, k].item() + (1 - args.alpha) * (1 - probs[i, k].item())
            entropy -= s * math.log(s)
            if k >= 6 - learned:
                log_pi = math.log(s if policy[i, k] else 1 - s)
                policy_loss -= (rewards[0] - rewards[1]) * log_pi
    return policy_loss, entropy


@pytest.fixture
def networks():
    """A policy network in double precision that wavers, and a ResNet whose answers vary."""
    torch.manual_seed(4)
    resnet, policy_net = models.build(TINY)
    with torch.no_grad():
        policy_net.logit.weight.mul_(20)
    images = torch.randn(12, 3, 32, 32, dtype=torch.float64)
    return resnet.double().eval(), policy_net.double().eval(), images


def test_stage_1_loss_is_the_equations(networks):
    resnet, policy_net, images = networks
    labels = resnet(images).argmax(1)
    mask = torch.tensor([False, False, True, True, True, True])
    args = step_args()
    loss, results = script_module("cl_training").train_step(
        policy_net, resnet, images, labels, Shard(0, 12, 12), mask, args
    )
    probs = policy_net(images)[0]
    policy_map = (probs >= 0.5).double()
    policy_map[:, :2] = 1
    policy = results["policy"]
    assert policy[:, :2].eq(1).all() and policy[:, 2:].mean() < 1
    right, right_map = (resnet(images, u).argmax(1) == labels for u in (policy, policy_map))
    policy_loss, entropy = expected_policy_loss(
        probs, policy, policy_map, right, right_map, args, learned=4
    )
    assert policy_loss != 0
    assert loss.item() == pytest.approx((policy_loss - 0.1 * entropy) / 12, rel=1e-9)
    assert torch.equal(results["correct"], right)


def test_several_samples_are_set_against_one_another(networks):
    resnet, policy_net, images = networks
    labels = resnet(images).argmax(1)
    mask = torch.ones(6, dtype=torch.bool)
    args = step_args(samples=2, beta=0.0)
    step = script_module("cl_training").train_step
    loss, results = step(policy_net, resnet, images, labels, Shard(0, 12, 12), mask, args)

    probs = policy_net(images)[0]
    bounded = 0.8 * probs + 0.2 * (1 - probs)
    noise = Shard(0, 12, 12).noise(2, 6)
    policies = [(noise[:, p] < bounded).double() for p in range(2)]
    policies.append((probs >= 0.5).double())
    assert torch.equal(results["policy"], policies[0])
    rewards = []
    for policy in policies:
        right = resnet(images, policy).argmax(1) == labels
        rewards.append(torch.where(right, 1 - (policy.mean(1)) ** 2, -3.0))
    expected = 0.0
    for own, other in ((0, 1), (1, 0)):
        advantage = rewards[own] - (rewards[other] + rewards[2]) / 2
        log_pi = torch.distributions.Bernoulli(probs=bounded).log_prob(policies[own]).sum(1)
        expected -= (advantage * log_pi).sum().item() / 2 / 12
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_distilling_adds_the_teacher_to_the_labels(networks):
    resnet, policy_net, images = networks
    labels = torch.arange(12) % 10
    finetune = script_module("finetune")
    logits, teacher = torch.randn(2, 12, 10, dtype=torch.float64)
    loss = finetune.task_loss(
        logits, images, labels, step_args(distill=0.25, temperature=3.0), lambda x: teacher
    )
    cross_entropy = torch.nn.CrossEntropyLoss()(logits, labels)
    agreement = utils.distillation(logits, teacher, 3.0)
    torch.testing.assert_close(loss, 0.75 * cross_entropy + 0.25 * agreement)
    plain = finetune.task_loss(logits, images, labels, step_args())
    torch.testing.assert_close(plain, cross_entropy)


def test_stage_2_loss_is_the_equations(networks):
    resnet, policy_net, images = networks
    labels = resnet(images).argmax(1)
    args = step_args()
    loss, results = script_module("finetune").train_step(
        policy_net, resnet, images, labels, Shard(0, 12, 12), args
    )
    probs = policy_net(images)[0]
    policy_map, policy = (probs >= 0.5).double(), results["policy"]
    logits = resnet(images, policy)
    right, right_map = logits.argmax(1) == labels, resnet(images, policy_map).argmax(1) == labels
    policy_loss, _ = expected_policy_loss(
        probs, policy, policy_map, right, right_map, args, learned=6
    )
    log_softmax = logits - logits.exp().sum(1, keepdim=True).log()
    cross_entropy = -sum(log_softmax[i, y].item() for i, y in enumerate(labels.tolist())) / 12
    assert policy_loss != 0
    assert loss.item() == pytest.approx(policy_loss + cross_entropy, rel=1e-9)


def test_both_passes_of_stage_2_update_the_running_statistics(networks):
    resnet, policy_net, images = networks
    labels = torch.zeros(12, dtype=torch.long)
    script_module("finetune").train_step(
        policy_net, resnet.train(), images, labels, Shard(0, 12, 12), step_args()
    )
    assert resnet.bn1.num_batches_tracked == 2


def test_masked_and_sparse_stage_1_learn_the_same(run, common, base_file, tmp_path):
    for execution in ("sparse", "masked"):
        status, _, err = run(
            "cl_training", *common, "--base", base_file, "--cv_dir", tmp_path / execution,
            "--max_epochs", 1, "--batch_size", 40, "--cl_step", 4, "--execution", execution,
        )  # fmt: skip
        assert status == 0, err
    sparse, masked = (metrics(tmp_path / name)[0] for name in ("sparse", "masked"))
    for name, value in masked.items():
        assert sparse[name] == pytest.approx(value, abs=0.03), name


def test_static_policies_pass_through_both_doors(run, common, base_file, tmp_path):
    for kind in ("first", "random", "distribute"):
        status, out, err = run("test", *common, "--base", base_file, "--policy", f"{kind}:4")
        assert status == 0 and "Block Usage: 4.000 ± 0.000" in out, err
    status, out, err = run(
        "finetune", *common, "--base", base_file, "--policy", "first:2", "--cv_dir", tmp_path,
        "--max_epochs", 1, "--batch_size", 40,
    )  # fmt: skip
    assert status == 0 and "S: 2.000 | V: 0.000 | #: 1" in out, err
    (saved,) = named(tmp_path)
    status, out, err = run("test", *common, "--load", saved)
    assert status == 0 and "Block Usage: 2.000" in out, err
    status, out, err = run("finetune", *common, "--load", tmp_path, "--max_epochs", 2,
                           "--base", base_file, "--batch_size", 40)  # fmt: skip
    assert status == 0 and "E: 2" in out and "S: 2.000" in out, err


@pytest.mark.parametrize("options", [("--batch_size", 1), ("--batch_size", 16), ()])
def test_timing_adds_two_lines(run, common, base_file, stage_1, options):
    checkpoint_options = ["--base", base_file, "--load", named(stage_1)[1]]
    for given in (checkpoint_options, ["--base", base_file, "--policy", "first:2"]):
        status, out, err = run("test", *common, *given, *options, "--time")
        assert status == 0, err
        lines = out.splitlines()
        assert len(lines) == 6 and lines[3].startswith("    Unique Policies: ")
        assert re.fullmatch(r"    Time/img: \d+\.\d{3} ms", lines[4])
        assert re.fullmatch(r"    Speed-up: \d+\.\d\d over the full ResNet, batch \d+", lines[5])


def test_a_subset_is_told(run, common, base_file):
    status, out, err = run("test", *common, "--base", base_file, "--subset", 10)
    assert status == 0 and "first 10 images only" in err


FASTER = {  # than the released recipe: what the README offers, all at once
    "cl_training": ["--schedule", "cosine", "--alpha_end", 0.95, "--samples", 2, "--cl_blocks", 3],
    "finetune": ["--schedule", "cosine", "--alpha_end", 0.95, "--resnet_lr", 0.01,
                 "--distill", 0.5, "--recalibrate"],
}  # fmt: skip


@pytest.mark.parametrize(
    "script, schedule",
    [
        ("pretrain", []),
        ("pretrain", ["--routes"]),
        ("cl_training", ["--epoch_step", 2]),
        ("cl_training", FASTER["cl_training"]),
        ("finetune", ["--epoch_step", 2]),
        ("finetune", FASTER["finetune"]),
    ],
)
def test_resumed_run_ends_bit_identical(
    script, schedule, run, common, base_file, stage_1, tmp_path
):
    options = options_of(script, common, base_file, stage_1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    schedule = [*schedule, "--test_every", 2, "--seed", 5]
    assert run(script, *options, *schedule, "--cv_dir", whole, "--max_epochs", 3)[0] == 0

    # stop after the first epoch, as a crash would, and go on in a new process's state
    command = [*options, *schedule, "--cv_dir", parts, "--max_epochs", 3]
    for _ in range(10):  # on a busy machine, tiny runs may end before they are killed
        shutil.rmtree(parts, ignore_errors=True)
        process = start(script, command)
        wait_for_epoch(process, parts, 1)
        process.send_signal(signal.SIGKILL)
        if process.wait() != 0:
            break
    assert process.returncode == -signal.SIGKILL  # before its end, so in mid-epoch
    done = checkpoint.read(parts)["epoch"]
    assert done < 3
    status, out, err = run(script, *options, *schedule, "--load", parts, "--max_epochs", 3)
    assert status == 0, err
    assert same(trained(whole), trained(parts)), done
    assert metrics(whole) == metrics(parts)


def start(script, options):
    def hear_interrupts():  # where a shell started the tests in the background, none are heard
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = [sys.executable, ROOT / f"{script}.py", *options]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV,
        preexec_fn=hear_interrupts,
    )  # fmt: skip


def wait_for_epoch(process, folder, epoch):
    """Until the run has finished an epoch, or all."""
    for _ in range(6000):
        if process.poll() is not None:
            return
        path = folder / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= epoch:
            return
        time.sleep(0.01)
    raise AssertionError("the run never got there")


def test_a_restart_goes_on_from_the_newest_state(run, common, base_file, tmp_path, monkeypatch):
    """Also where the command names an older checkpoint, or that of another directory."""
    options = [*common, "--base", base_file, "--batch_size", 40, "--test_every", 1]
    first, other = tmp_path / "first", tmp_path / "other"
    assert run("cl_training", *options, "--cv_dir", first, "--max_epochs", 2)[0] == 0
    older = named(first)[0]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    status, out, err = run("cl_training", *options, "--load", older, "--max_epochs", 3)
    assert status == 0 and out.startswith("E: 3 |"), err
    for epochs in (2, 3):
        status, out, err = run("cl_training", *options, "--load", older, "--cv_dir", other,
                               "--max_epochs", epochs)  # fmt: skip
        assert status == 0 and out.startswith(f"E: {epochs} |"), err
        assert [line["epoch"] for line in metrics(other)] == list(range(1, epochs + 1))


def test_inside_an_epoch_the_batches_stay_as_they_were(run, common, base_file, tmp_path):
    options = [*common, "--base", base_file, "--max_epochs", 2]
    assert run("cl_training", *options, "--batch_size", 40, "--cv_dir", tmp_path)[0] == 0
    content = checkpoint.read(tmp_path)
    content |= {"epoch": 1, "steps_done": 2, "partial": {}}
    checkpoint.write(content, tmp_path / "last.t7")
    refused(run("cl_training", *options, "--batch_size", 20, "--load", tmp_path),
            "inside an epoch of --batch_size 40")  # fmt: skip


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_a_run_that_goes_on(number, status, run, common, base_file, tmp_path):
    options = [*common, "--base", base_file, "--cv_dir", tmp_path, "--batch_size", 5]
    process = start("cl_training", [*options, "--max_epochs", 1000])
    wait_for_epoch(process, tmp_path, 1)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert err.count("\n") == 1 and f"go on with --load {tmp_path}/last.t7" in err
    done = checkpoint.read(tmp_path)["epoch"]
    code, out, err = run(
        "cl_training", *common, "--base", base_file, "--batch_size", 5, "--load", tmp_path,
        "--max_epochs", done + 1,
    )  # fmt: skip
    assert code == 0 and out.startswith(f"E: {done + 1} |"), err


def test_a_loss_that_is_not_finite_stops_the_run(run, common, tmp_path):
    status, out, err = run(
        "pretrain", *common, "--cv_dir", tmp_path, "--max_epochs", 30, "--batch_size", 40,
        "--lr", 1e30, "--clip_norm", 1e30, "--warmup", 0,
    )  # fmt: skip
    assert status == 2
    assert re.search(r"the loss is (nan|inf) .* in epoch \d+, step \d+ of 3 .*lower --lr", err)
    assert err.count("\n") == 1 and f"go on with --load {tmp_path}" in err
    assert all(t.isfinite().all() for t in checkpoint.read(tmp_path)["state_dict"].values())


def test_a_finished_run_is_left_alone(run, common, base_file, stage_1):
    before = {p: p.read_bytes() for p in stage_1.iterdir() if p.is_file()}
    status, out, err = run("cl_training", *common, "--base", base_file, "--load", stage_1,
                           "--max_epochs", 2)  # fmt: skip
    assert status == 0 and "all 2 epochs are done" in out
    assert before == {p: p.read_bytes() for p in stage_1.iterdir() if p.is_file()}


def refused(result, *words):
    """One line on standard error, status 2, with these words."""
    status, _, err = result
    assert status == 2, err
    assert err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert str(word) in err


@pytest.mark.parametrize("script", ["pretrain", "cl_training", "finetune", "test"])
def test_unknown_models_list_the_known(script, run):
    options = ["--pretrained", "x"] if script == "finetune" else []
    refused(run(script, "--model", "R31_C10", *options), f"{script}.py: ", "R31_C10", "R110_C10")


@pytest.mark.parametrize(
    "options",
    [
        ("--alpha", 0.5), ("--alpha", 1.1), ("--alpha", "nan"), ("--batch_size", 0),
        ("--cl_step", 0), ("--max_epochs", -1), ("--lr", 0), ("--lr", "inf"), ("--beta", -1),
        ("--penalty", "nan"), ("--precision", "fp16"), ("--no_such_flag",), ("--cl_blocks", 0.5),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(run, options, tmp_path):
    result = run("cl_training", "--cv_dir", tmp_path / "run", *options)
    refused(result, options[0])
    assert not (tmp_path / "run").exists()


def test_bad_checkpoints_are_refused(run, common, base_file, stage_1, tmp_path):
    base = ["--base", base_file]
    good = named(stage_1)[0]
    broken = tmp_path / "broken.t7"
    broken.write_bytes(good.read_bytes()[:5000])
    for script in ("cl_training", "finetune", "test"):
        refused(run(script, *common, *base, "--load", tmp_path / "none.t7"), "none.t7: no such")
        refused(run(script, *common, *base, "--load", broken), "broken.t7: ", "damaged")
        refused(run(script, *common[2:], "--model", "R20_C10", "--load", good), good, "not R20_C10")
    refused(run("finetune", *common, *base, "--pretrained", broken), "broken.t7")
    refused(run("finetune", *common, *base, "--load", good), "stage-1", "--pretrained")
    refused(run("finetune", *common, *base), "--pretrained")
    refused(run("cl_training", *common, *base, "--load", base_file), "pretrained ResNet", "--base")
    refused(run("test", *common, "--base", good), "stage-1", "no ResNet")
    refused(run("pretrain", *common, "--load", good), "stage-1")


def test_a_policy_learned_on_another_base_is_refused(run, common, stage_1, tmp_path, base_file):
    other = checkpoint.read(base_file)
    other["state_dict"]["fc.bias"] += 1
    checkpoint.write(other, tmp_path / "other.t7")
    refused(
        run("test", *common, "--load", named(stage_1)[0], "--base", tmp_path / "other.t7"),
        "another base",
    )


def test_a_used_directory_is_not_written_over(run, common, base_file, stage_1):
    before = (stage_1 / "metrics.jsonl").read_bytes()
    refused(run("cl_training", *common, "--base", base_file, "--cv_dir", stage_1),
            "already holds a run", "--load")  # fmt: skip
    assert (stage_1 / "metrics.jsonl").read_bytes() == before


def test_a_second_base_is_not_put_beside_the_first(run, common, tmp_path):
    (tmp_path / "pk_E_1_A_0.100.t7").write_text("mine")
    refused(run("pretrain", *common, "--cv_dir", tmp_path), "pk_E_1_A_0.100.t7 is there already")
    assert (tmp_path / "pk_E_1_A_0.100.t7").read_text() == "mine"


def test_a_run_killed_after_its_base_was_written_goes_on(run, common, tmp_path):
    options = [*common, "--max_epochs", 2, "--batch_size", 40, "--test_every", 1]
    assert run("pretrain", *options, "--cv_dir", tmp_path)[0] == 0
    (saved,) = tmp_path.glob("pk_E_2_*.t7")
    before = checkpoint.read(saved)
    content = checkpoint.read(tmp_path)
    assert run("pretrain", *options[:-6], "--max_epochs", 1, "--batch_size", 40,
               "--test_every", 1, "--cv_dir", tmp_path / "one")[0] == 0  # fmt: skip
    (tmp_path / "last.t7").write_bytes((tmp_path / "one" / "last.t7").read_bytes())
    status, out, err = run("pretrain", *options, "--load", tmp_path)
    assert status == 0, err
    assert checkpoint.read(tmp_path)["epoch"] == content["epoch"] == 2
    assert checkpoint.read(saved).keys() == before.keys()


def test_resuming_into_another_runs_directory_is_refused(run, common, base_file, stage_1, tmp_path):
    (tmp_path / "last.t7").write_text("another")
    refused(
        run("cl_training", *common, "--base", base_file, "--load", stage_1, "--cv_dir", tmp_path),
        "already holds a run",
    )


def test_a_directory_that_cannot_be_made_is_told(run, common, base_file, tmp_path):
    (tmp_path / "file").touch()
    refused(run("cl_training", *common, "--base", base_file, "--cv_dir", tmp_path / "file" / "x"),
            tmp_path / "file", "Not a directory")  # fmt: skip


def test_missing_data_is_told(run, base_file, tmp_path):
    refused(
        run("test", "--model", TINY, "--base", base_file, "--data_dir", tmp_path / "no",
            "--skip_data_check"),
        "no such directory",
    )  # fmt: skip


def test_a_random_static_policy_is_profiled_as_it_was_finetuned(run, common, base_file, tmp_path):
    options = ["--base", base_file, "--max_epochs", 1, "--batch_size", 40]
    for seed in (1, 2):
        status, _, err = run("finetune", *common, *options, "--policy", "random:3",
                             "--seed", seed, "--cv_dir", tmp_path / str(seed))  # fmt: skip
        assert status == 0, err
    content = checkpoint.read(tmp_path / "2")
    assert content["args"]["policy"] == "random:3:2"
    figures = tmp_path / "figures.json"
    assert run("test", *common, "--load", tmp_path / "2", "--json", figures)[0] == 0
    assert json.loads(figures.read_text())["accuracy"] == content_accuracy(tmp_path / "2")


def content_accuracy(folder):
    return metrics(folder)[-1]["test_accuracy"]


@pytest.mark.parametrize("policy", ["first", "last:3", "first:-1", "first:x", "first:7"])
def test_impossible_static_policies_are_refused(run, common, base_file, policy):
    refused(run("test", *common, "--base", base_file, "--policy", policy), policy)


def test_a_run_goes_on_under_its_own_options(run, common, base_file, tmp_path):
    options = [*common, "--base", base_file, "--batch_size", 40, "--test_every", 1]
    first = tmp_path / "first"
    assert run("cl_training", *options, "--cv_dir", first, "--max_epochs", 1)[0] == 0
    refused(run("cl_training", *options, "--load", first, "--max_epochs", 2, "--penalty", -4),
            "begun with --penalty -1.0, not -4.0", "--cv_dir")  # fmt: skip
    status, _, err = run("cl_training", *options, "--load", first, "--cv_dir", tmp_path / "other",
                         "--max_epochs", 2, "--penalty", -4)  # fmt: skip
    assert status == 0 and "--penalty -4.0 (was -1.0)" in err
    status, _, err = run("cl_training", *options, "--load", first, "--max_epochs", 2,
                         "--micro_batch", 20, "--precision", "bf16")  # fmt: skip
    assert status == 0, err


def test_a_network_that_the_checkpoint_lacks_is_said(run, common, base_file, stage_1, tmp_path):
    options = ["--base", base_file, "--batch_size", 40, "--cv_dir", tmp_path, "--max_epochs", 1]
    pretrained = ["--pretrained", named(stage_1)[0]]
    assert run("finetune", *common, *options, *pretrained)[0] == 0
    content = checkpoint.read(tmp_path)
    # the released code calls the policy network net
    for name, rest in (("agent", {"net": content["agent"]}), ("resnet", {})):
        kept = {n: value for n, value in content.items() if n != name} | rest
        checkpoint.write(kept | {"stage": 2}, tmp_path / "last.t7")
        result = run("finetune", *common, *options[:-1], 2, "--load", tmp_path)
        if rest:
            assert result[0] == 0, result[2]
        else:
            refused(result, "holds no 'resnet'")


def test_pretrain_under_routes_by_hand(run, common, tmp_path, monkeypatch):
    """One step's loss: labels in full, labels and the full pass's classes under the route."""
    pretrain = script_module("pretrain")
    shard = Shard(2, 7, 12, seed=(3,), step=4)
    policies = pretrain.full_and_route(shard, (2, 2, 2), 0.3, torch.device("cpu"))
    assert policies.shape == (2, 5, 6) and policies[0].eq(1).all()
    assert policies[1].eq(policies[1, 0]).all()  # one route for the batch
    other = Shard(7, 12, 12, seed=(3,), step=4)  # of which another process has the rest
    again = pretrain.full_and_route(other, (2, 2, 2), 0.3, torch.device("cpu"))
    assert torch.equal(again[1, 0], policies[1, 0])
    routes = {
        tuple(pretrain.full_and_route(Shard(0, 1, 1, step=n), (2, 2, 2), 0.3, None)[1, 0].tolist())
        for n in range(60)
    }
    assert len(routes) > 8

    torch.manual_seed(0)
    logits, full, labels = torch.randn(5, 10), torch.randn(5, 10), torch.randint(10, (5,))
    expected = 0.0
    for row, teacher, label in zip(logits.double(), full.double(), labels, strict=True):
        p, q = (teacher / 2).softmax(0), (row / 2).softmax(0)
        divergence = 4 * sum(a * (a / b).log() for a, b in zip(p, q, strict=True))
        expected += (0.3 * -row.softmax(0)[label].log() + 0.7 * divergence) / 5
    found = utils.route_loss(logits, full, labels, 0.7, 2.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_a_base_that_serves_routes_is_trained(run, common, tmp_path):
    options = [*common, "--cv_dir", tmp_path / "base", "--max_epochs", 12, "--batch_size", 20]
    options += ["--lr", 0.05, "--test_every", 100]
    refused(run("pretrain", *options, "--routes", "--block_drop", 0.2), "leave --block_drop out")
    status, out, err = run("pretrain", *options, "--routes")
    assert status == 0, err
    (saved,) = (tmp_path / "base").glob("pk_E_12_A_*.t7")
    for policy in ([], ["--policy", "distribute:3"]):
        figures = tmp_path / "figures.json"
        assert run("test", *common, "--base", saved, "--json", figures, *policy)[0] == 0
        assert json.loads(figures.read_text())["accuracy"] > 0.5  # chance is 0.1


def test_a_policy_network_of_16_pixels_stays_one(run, common, base_file, tmp_path):
    options = [*common, "--base", base_file, "--batch_size", 40, "--max_epochs", 1]
    cl, ft = tmp_path / "cl", tmp_path / "ft"
    assert run("cl_training", *options, "--policy_size", 16, "--cv_dir", cl)[0] == 0
    assert checkpoint.read(cl)["policy_size"] == 16
    assert run("cl_training", *options[:-1], 2, "--load", cl)[0] == 0
    assert run("finetune", *options, "--pretrained", cl / "last.t7", "--cv_dir", ft)[0] == 0
    assert checkpoint.read(ft)["policy_size"] == 16
    flops = {}
    for size in (16, 32):
        content = checkpoint.read(ft)
        if size == 32:
            del content["policy_size"]  # as files were before there was a choice
        checkpoint.write(content, tmp_path / "ckpt.t7")
        figures = tmp_path / "figures.json"
        assert run("test", *common, "--load", tmp_path / "ckpt.t7", "--json", figures)[0] == 0
        found = json.loads(figures.read_text())
        fixed, per_block = utils.block_flops(models.build("R14_C10")[0], (3, 32, 32))
        flops[size] = found["flops"] - found["block_usage"] * per_block.mean().item()
    policy_flops = utils.count_flops(models.build("R14_C10")[1], (3, 32, 32))
    assert flops[32] - flops[16] == pytest.approx(0.75 * policy_flops, rel=0.2)
    content["policy_size"] = 12
    checkpoint.write(content, tmp_path / "ckpt.t7")
    refused(run("test", *common, "--load", tmp_path / "ckpt.t7"), "32 or 16 pixels, not 12")


class Deciding(torch.nn.Module):
    """A ResNet whose class is right exactly where the policy is the image's own."""

    def forward(self, images, policy):
        own = self.own[images[:, 0, 0, 0].long()]
        right = (policy == own).all(1)
        return torch.stack([right.float(), 1 - right.float()], 1)


@pytest.mark.parametrize("kind", ["constant", "random", "perfect"])
def test_dependence_on_the_image(kind):
    """Of policies that are all the same, drawn at random, and the only right ones."""
    torch.manual_seed(0)
    count = 400
    drawn = (torch.rand(count, 6) < 0.5).to(torch.uint8)
    policies = torch.ones_like(drawn) if kind == "constant" else drawn
    resnet = Deciding()
    resnet.own = drawn if kind == "perfect" else torch.ones_like(drawn)
    images = torch.arange(count).float()[:, None, None, None].expand(-1, 3, 32, 32)

    class Loader:
        num_images, batch_size = count, 60

        def __len__(self):
            return 7

        def epoch(self, epoch, skip=0):
            for step, (x, y) in enumerate(
                zip(images.split(60), torch.zeros(count).long().split(60), strict=True)
            ):
                yield x, y, Shard(0, len(x), len(x), step=step)

    correct = engine.loop.correct_under(resnet, policies, Loader(), "fp32")
    expected = [
        all(a == b for a, b in zip(p, o, strict=True))
        for p, o in zip(policies.tolist(), resnet.own.tolist(), strict=True)
    ]
    assert correct.tolist() == expected

    trained = object.__new__(engine.TrainedModel)
    trained.args = SimpleNamespace(precision="fp32")
    trained.config, trained.resnet = models.config("R14_C10"), resnet
    trained.policy_net = models.build("R14_C10")[1]
    trained.flops = lambda: (100_000_000, torch.full((6,), 1e6, dtype=torch.float64))
    found = trained.dependence(Loader(), policies, correct)
    own, shuffled = found["own"]["accuracy"], found["shuffled"]["accuracy"]
    if kind == "constant":
        assert own == shuffled == found["common"]["accuracy"] == 1
    elif kind == "random":
        assert abs(own - shuffled) < 0.02 and own < 0.1
    else:
        assert own == 1 and shuffled < 0.1 and found["common"]["accuracy"] < 0.1

    def mixed(blocks):
        """The better one of both kinds, its images shared out between two neighbouring policies."""
        accuracies = []
        for kind in ("distribute", "late"):
            few, share = int(blocks), blocks % 1
            keeps = [utils.static_policy(f"{kind}:{min(6, few + n)}", (2, 2, 2)) for n in (0, 1)]
            less, more = ((resnet.own == keep).all(1).double().mean().item() for keep in keeps)
            accuracies.append((1 - share) * less + share * more)
        return max(accuracies)

    blocks = policies.sum(1).double().mean().item()
    assert found["own"]["blocks"] == pytest.approx(blocks)
    assert found["static"]["blocks"] == pytest.approx(blocks)
    assert found["static"]["accuracy"] == pytest.approx(mixed(blocks))
    spent = utils.count_flops(trained.policy_net, (3, 32, 32)) / 1e6  # in blocks
    assert found["static_same_flops"]["blocks"] == pytest.approx(min(6, blocks + spent))
    assert found["static_same_flops"]["accuracy"] == pytest.approx(mixed(min(6, blocks + spent)))
    full = [all(row) for row in resnet.own.tolist()]
    kept = policies.sum(1).tolist()
    wrong = [n for n, right in zip(kept, full, strict=True) if not right]
    if wrong:
        assert found["blocks_where_full_is_wrong"] == pytest.approx(sum(wrong) / len(wrong))
    else:
        assert math.isnan(found["blocks_where_full_is_wrong"])


def test_dependence_is_printed_and_kept(run, common, base_file, stage_1, tmp_path):
    figures = tmp_path / "figures.json"
    load = ["--base", base_file, "--load", named(stage_1)[1]]
    status, out, err = run("test", *common, *load, "--dependence", "--json", figures)
    assert status == 0, err
    assert len(re.findall(r"(?:own|shuffled|common|static, .*): +0\.\d+ \| \d", out)) == 5
    found = json.loads(figures.read_text())
    assert found["dependence"]["own"]["accuracy"] == found["accuracy"]
    assert found["dependence"]["own"]["flops"] == pytest.approx(found["flops"])
    assert metrics(stage_1)[-1].keys() >= {"test_shuffled", "test_common"}
    refused(run("test", *common, "--base", base_file, "--dependence"), "--dependence")


class Depth(torch.nn.Module):
    """A ResNet that is right about an image whose first pixel is d from d blocks on. The second
    pixel tells it the class, 0 or 1e-4 for 1, too little for another network to see.
    """

    def forward(self, images, policies):
        right = policies.sum(-1) >= images[:, 0, 0, 0]
        answer = right == (images[:, 0, 0, 1] > 5e-5)
        return torch.stack([1 - answer.float(), answer.float()], -1)


def test_the_warm_steps_table_and_loss_by_hand(monkeypatch):
    cl_training = script_module("cl_training")
    torch.manual_seed(0)
    candidates = utils.candidate_policies((2, 2, 2))
    _, policy_net = models.build(TINY)
    net = models.WithCorrectness(
        policy_net, models.Correctness(policy_net.features.num_features, 10, candidates)
    ).double()
    net.correctness.candidates = candidates.double()
    images = torch.rand(9, 3, 32, 32, dtype=torch.float64)
    images[:, 0, 0, 0] = torch.randint(1, 8, (9,))
    images[:, 0, 0, 1] = 0
    labels = torch.zeros(9, dtype=torch.long)
    args = SimpleNamespace(penalty=-1.5)
    monkeypatch.setattr(cl_training, "TABLE_EVERY", 4)
    shard = Shard(3, 12, 18)  # images 4 and 8 of 18 are in the table, with 0, 12 and 16
    step = partial(cl_training.warm_step, net, Depth(), candidates=candidates.double(), args=args)
    loss, results = step(images, labels, shard)
    probs, logits, classes = net(images)
    expected, found = 0.0, []
    for b in range(9):
        expected -= classes[b].log_softmax(0)[0] / 18
        needed, rewards = images[b, 0, 0, 0].item(), []
        for c, candidate in enumerate(candidates.tolist()):
            p, kept = logits[b, c].sigmoid(), sum(candidate)
            if b in (1, 5):
                right = kept >= needed
                expected -= (p if right else 1 - p).log() / len(candidates) / 5
            rewards.append((p * (1 - (kept / 6) ** 2) + (1 - p) * -1.5).item())
        chosen = candidates[max(range(len(rewards)), key=rewards.__getitem__)].tolist()
        for keep, prob in zip(chosen, probs[b], strict=True):
            expected -= (prob if keep else 1 - prob).log() / 6 / 18
        if b in (1, 5):
            right = sum(chosen) >= needed
            found.append((chosen, right, 1 - (sum(chosen) / 6) ** 2 if right else -1.5))
    assert loss.item() == pytest.approx(expected.item())
    policies, correct, rewards = zip(*found, strict=True)
    assert results["policy"].tolist() == list(policies)
    assert results["correct"].tolist() == list(correct)
    assert results["reward"].tolist() == pytest.approx(rewards)
    # a micro-batch without any of them learns the rest
    loss, results = step(images[2:4], labels[2:4], Shard(5, 7, 18))
    assert loss.item() > 0 and len(results["policy"]) == 0


def test_a_warm_start_learns_what_is_hard():
    """Images of which brightness tells the class need one block; others, whose class nothing
    tells, all of them. Only one in 8 is looked at with the ResNet.
    """
    cl_training = script_module("cl_training")
    torch.manual_seed(0)
    candidates = utils.candidate_policies((2, 2, 2))
    _, policy_net = models.build(TINY)
    correctness = models.Correctness(policy_net.features.num_features, 10, candidates)
    net = models.WithCorrectness(policy_net, correctness)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    args = SimpleNamespace(penalty=-1.0)

    def batch(size):
        is_hard = torch.rand(size) < 0.5
        labels = torch.randint(2, (size,))
        shown = torch.where(is_hard, 1.0, 2.0 * labels)
        images = shown[:, None, None, None] + 0.1 * torch.randn(size, 3, 32, 32)
        images[:, 0, 0, 0] = torch.where(is_hard, 6.0, 1.0)
        images[:, 0, 0, 1] = 1e-4 * labels
        return images, labels, is_hard

    for step in range(260):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 260)
        images, labels, _ = batch(128)
        loss, _ = cl_training.warm_step(
            net, Depth(), images, labels, Shard(0, 128, 128), candidates, args
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    images, labels, is_hard = batch(128)
    needed = torch.where(is_hard, 6, 1)
    with torch.no_grad():
        learned = utils.most_probable(policy_net(images)[0])
        at = models.PolicyAtPenalty(policy_net, correctness, -1.0)
        policy, reward = at(images)
        _, fast = models.deploy(models.build(TINY)[0], at)
        assert torch.equal(fast(images)[0], policy)
        assert (policy.sum(1) == needed).float().mean() > 0.9
        assert (learned.sum(1) == needed).float().mean() > 0.8
        torch.testing.assert_close(
            reward[:, 0].mean(), (1 - (needed / 6) ** 2).mean(), atol=0.1, rtol=0
        )
        at.penalty = 0.9  # a wrong prediction is worth nearly as much as a right one
        assert at(images)[0].sum(1).mean() < needed.float().mean() / 2


def test_a_step_for_many_penalties_by_hand():
    """Each batch has one penalty; the policies are those that the head chooses for it."""
    finetune = script_module("finetune")
    resnet, policy_net = models.build(TINY)
    candidates = torch.tensor([[1.0, 0, 0, 0, 0, 0], [1.0] * 6])
    head = models.Correctness(policy_net.features.num_features, 10, candidates)
    with torch.no_grad():  # right with one block in 60 %, with all in 90 % of all images
        head.linear.weight.zero_()
        head.linear.bias.copy_(torch.logit(torch.tensor([0.6, 0.9])))
    at = models.PolicyAtPenalty(policy_net, head, 0.0)
    images, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
    for mild, harsh, chosen in ((-0.1, -0.2, 0), (-10.0, -20.0, 1)):
        args = SimpleNamespace(penalties=(mild, harsh), distill=0.5, temperature=2.0)
        shard = Shard(0, 4, 8)
        loss, results = finetune.penalties_train_step(
            at, resnet.eval(), images, labels, shard, args
        )
        assert harsh < at.penalty < mild
        assert torch.equal(results["policy"], candidates[chosen].expand(4, -1))
        full = resnet(images, torch.ones(4, 6))
        routed = resnet(images, results["policy"])
        expected = torch.nn.functional.cross_entropy(full, labels)
        expected = expected + utils.route_loss(routed, full, labels, 0.5, 2.0)
        torch.testing.assert_close(loss, expected / 2)


def test_a_warm_started_run_chooses_for_penalties(run, common, base_file, tmp_path):
    options = [*common, "--base", base_file, "--batch_size", 40, "--test_every", 1]
    warm, whole, figures = tmp_path / "warm", tmp_path / "whole", tmp_path / "figures.json"
    options += ["--warm_start", 2, "--policy_size", 16]
    assert run("cl_training", *options, "--max_epochs", 2, "--cv_dir", warm)[0] == 0
    blocks = []
    for penalty in (0.9, -100):
        status, out, err = run(
            "test", *common, "--base", base_file, "--load", warm, "--penalty", penalty,
            "--dependence", "--time", "--json", figures,
        )  # fmt: skip
        assert status == 0, err
        blocks.append(json.loads(figures.read_text())["block_usage"])
    assert blocks[0] <= blocks[1]
    page = ["visualize", *common, "--base", base_file, "--load", warm, "--out", tmp_path / "report"]
    assert run(*page, "--penalty", -100)[0] == 0
    assert "--penalty -100" in (tmp_path / "report" / "report.html").read_text()
    # stage 2 for many penalties keeps that, in one run or in two
    tune = ["finetune", *common, "--base", base_file, "--pretrained", warm / "last.t7",
            "--penalties", -0.5, -50, "--distill", 0.5, "--batch_size", 40]  # fmt: skip
    halves, tuned = tmp_path / "halves", tmp_path / "tuned"
    assert run(*tune, "--max_epochs", 1, "--cv_dir", halves)[0] == 0
    assert run(*tune, "--max_epochs", 2, "--load", halves)[0] == 0
    assert run(*tune, "--max_epochs", 2, "--cv_dir", tuned)[0] == 0
    assert same(trained(halves), trained(tuned))
    before, after = (checkpoint.read(where / "last.t7") for where in (warm, tuned))
    assert all(same(before[name], after[name]) for name in ("agent", "correctness"))
    assert not same(checkpoint.read(base_file)["state_dict"], after["resnet"])
    assert run("test", *common, "--load", tuned, "--penalty", -7)[0] == 0
    # the curriculum goes on from there, in one run or in two
    assert run("cl_training", *options, "--max_epochs", 4, "--load", warm)[0] == 0
    assert run("cl_training", *options, "--max_epochs", 4, "--cv_dir", whole)[0] == 0
    assert same(trained(warm), trained(whole))
    refused(run("test", *common, "--base", base_file, "--load", warm, "--penalty", -1),
            "has gone on since", "the last epoch of cl_training.py --warm_start")  # fmt: skip
    plain = tmp_path / "plain"
    assert run("cl_training", *options[:-4], "--max_epochs", 1, "--cv_dir", plain)[0] == 0
    refused(run("test", *common, "--base", base_file, "--load", plain, "--penalty", -1),
            "cl_training.py --warm_start")  # fmt: skip
