"""The scripts end to end on a small data set: what they write, and their losses by hand."""

import json
import math
import re
import statistics
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, metrics, named, options_of, refused, script_module, write_base

import models
import utils
from engine import Shard, cifar, storage

LINE = r"A: \d\.\d{3} \| R: -?\d\.\d\dE[+-]\d\d \| S: \d+\.\d{3} \| V: \d+\.\d{3} \| #: \d+"


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
    content = storage.content(named(tmp_path)[1])
    assert content["epoch"] == 3 and "resnet" not in content
    assert content["acc"] == metrics(tmp_path)[2]["test_accuracy"]
    assert storage.content(tmp_path)["epoch"] == 3
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
    storage.write({"state_dict": classifier}, tmp_path / "r8.t7")
    status, _, err = run(
        "cl_training", *common, "--base", base_file, "--cv_dir", tmp_path / "cl",
        "--max_epochs", 1, "--batch_size", 120, "--lr", 1e-9, "--policy_init", tmp_path / "r8.t7",
    )  # fmt: skip
    assert status == 0, err
    agent = storage.content(tmp_path / "cl")["agent"]
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
    agent, source = storage.content(tmp_path / "cl")["agent"], storage.content(start)["agent"]
    learned = [name for name in source if name.endswith(("weight", "logit.bias"))]
    assert len(learned) == 17
    for name in learned:
        torch.testing.assert_close(agent[name], source[name], rtol=0, atol=1e-6)
    assert storage.content(tmp_path / "cl")["base"] != storage.content(start)["base"]

    torch.manual_seed(0)
    deeper = models.build("R26_C10")[1].state_dict()
    storage.write({"agent": deeper, "model": "R26_C10"}, tmp_path / "deeper.t7")
    status, _, err = run("cl_training", *common, "--base", base_file, "--cv_dir", tmp_path / "no",
                         *learn, tmp_path / "deeper.t7")  # fmt: skip
    assert status == 2 and "deeper.t7" in err and "logit" in err


def test_the_resnet_is_frozen_in_stage_1_and_learns_in_stage_2(
    run, common, base_file, stage_1, tmp_path
):
    base = storage.content(base_file)["state_dict"]
    status, _, err = run(
        "finetune", *options_of("finetune", common, base_file, stage_1), "--cv_dir", tmp_path,
        "--max_epochs", 2, "--penalty", -10, "--lr", 1e-3,
    )  # fmt: skip
    assert status == 0, err
    content = storage.content(named(tmp_path)[0])
    start = storage.content(named(stage_1)[1])
    assert content["stage"] == 2
    assert not torch.equal(content["resnet"]["conv1.weight"], base["conv1.weight"])
    assert not torch.equal(content["resnet"]["bn1.running_mean"], base["bn1.running_mean"])
    assert not torch.equal(content["agent"]["logit.weight"], start["agent"]["logit.weight"])
    assert torch.equal(content["agent"]["vnet.weight"], start["agent"]["vnet.weight"])
    assert start["base"] == content["base"]


def test_pretrain_learns_and_its_file_is_a_base(run, common, tmp_path):
    status, out, err = run(
        "pretrain", *common, "--cv_dir", tmp_path / "base", "--max_epochs", 12,
        "--batch_size", 20, "--lr", 0.05, "--test_every", 100,
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
    assert content["kind"] == "BlockDrop" and content["base"] == str(base_file)
    assert content["seed"] == 0 and not content["val_split"] and not content["subset"]
    expected = profile_by_hand(named(stage_1)[1], base_file, cifar_dir)
    for name, value in expected.items():
        assert content[name] == pytest.approx(value, rel=1e-9), name
    assert f"FLOPs/img: {expected['flops']:.2E} ± {expected['flops_std']:.2E}" in out


def test_a_random_policy_is_named_with_its_seed(run, common, base_file, tmp_path):
    figures = tmp_path / "figures.json"
    for seed in (0, 3):
        options = ["--base", base_file, "--policy", "random:3", "--seed", seed, "--json", figures]
        status, _, err = run("test", *common, *options)
        assert status == 0, err
        content = json.loads(figures.read_text())
        assert content["policy"] == f"random:3:{seed}" and content["kind"] == "static"
    status, _, err = run("test", *common, "--base", base_file, "--json", figures)
    assert json.loads(figures.read_text())["kind"] == "full ResNet"


def profile_by_hand(path, base_file, cifar_dir):
    """What test.py should find, image by image."""
    resnet, policy_net = models.build(TINY)
    models.load_resnet(resnet, storage.content(base_file)["state_dict"])
    models.load_policy(policy_net, storage.content(path)["agent"])
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
        "flops_std": statistics.pstdev(flops),
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


@pytest.mark.parametrize("script", ["cl_training", "finetune", "test", "visualize", "export"])
def test_a_penalty_that_rewards_being_wrong_is_refused(script, run, common, base_file, tmp_path):
    for penalty in ("0.5", "1e-9", "inf", "nan"):
        status, _, err = run(script, *common, "--penalty", penalty)
        assert status == 2 and "0 or below" in err and err.count("\n") == 1


def test_a_base_that_is_not_used_is_told(run, common, base_file, stage_1, tmp_path):
    options = ["--base", base_file, "--pretrained", stage_1, "--max_epochs", 1, "--batch_size", 40]
    assert run("finetune", *common, *options, "--cv_dir", tmp_path)[0] == 0
    status, _, err = run("test", *common, "--load", tmp_path, "--base", tmp_path / "nothing.t7")
    assert status == 0 and "--base is not used: " in err and "a ResNet of its own" in err
    assert "--base is not used" not in run("test", *common, "--load", tmp_path)[2]


def test_a_random_static_policy_is_profiled_as_it_was_finetuned(run, common, base_file, tmp_path):
    options = ["--base", base_file, "--max_epochs", 1, "--batch_size", 40]
    for seed in (1, 2):
        status, _, err = run("finetune", *common, *options, "--policy", "random:3",
                             "--seed", seed, "--cv_dir", tmp_path / str(seed))  # fmt: skip
        assert status == 0, err
    content = storage.content(tmp_path / "2")
    assert content["args"]["policy"] == "random:3:2"
    figures = tmp_path / "figures.json"
    assert run("test", *common, "--load", tmp_path / "2", "--json", figures)[0] == 0
    assert json.loads(figures.read_text())["accuracy"] == content_accuracy(tmp_path / "2")


def content_accuracy(folder):
    return metrics(folder)[-1]["test_accuracy"]


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
    assert storage.content(cl)["policy_size"] == 16
    assert run("cl_training", *options[:-1], 2, "--load", cl)[0] == 0
    assert run("finetune", *options, "--pretrained", cl / "last.t7", "--cv_dir", ft)[0] == 0
    assert storage.content(ft)["policy_size"] == 16
    flops = {}
    for size in (16, 32):
        content = storage.content(ft)
        if size == 32:
            del content["policy_size"]  # as files were before there was a choice
        storage.write(content, tmp_path / "ckpt.t7")
        figures = tmp_path / "figures.json"
        assert run("test", *common, "--load", tmp_path / "ckpt.t7", "--json", figures)[0] == 0
        found = json.loads(figures.read_text())
        fixed, per_block = utils.block_flops(models.build("R14_C10")[0], (3, 32, 32))
        flops[size] = found["flops"] - found["block_usage"] * per_block.mean().item()
    policy_flops = utils.count_flops(models.build("R14_C10")[1], (3, 32, 32))
    assert flops[32] - flops[16] == pytest.approx(0.75 * policy_flops, rel=0.2)
    content["policy_size"] = 12
    storage.write(content, tmp_path / "ckpt.t7")
    refused(run("test", *common, "--load", tmp_path / "ckpt.t7"), "32 or 16 pixels, not 12")
