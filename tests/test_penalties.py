"""One policy network for every penalty: its warm start, its head and stage 2 for many."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, named, refused, script_module, trained
from faults import same

import engine
import models
import utils
from engine import Shard, storage


class Depth(torch.nn.Module):
    """A ResNet that is right about an image whose first pixel is d from d blocks on. The second
    pixel tells it the class, 0 or 1e-4 for 1, too little for another network to see.
    """

    def forward(self, images, policies):
        right = policies.sum(-1) >= images[:, 0, 0, 0]
        answer = right == (images[:, 0, 0, 1] > 5e-5)
        return torch.stack([1 - answer.float(), answer.float()], -1)


def nested() -> torch.Tensor:
    """Candidates of a ResNet of three stages of two blocks: 3 to 6 blocks."""
    return utils.candidate_policies((2, 2, 2), lambda policy: 0.0)


def test_candidates_are_found_by_the_loss_on_training_images(monkeypatch):
    """Each is the one before, one block more, of smallest loss by a plain loop."""
    torch.manual_seed(0)
    resnet, _ = models.build(TINY)
    resnet.double().eval()
    images = torch.randint(256, (50, 32, 32, 3), dtype=torch.uint8)
    loader = engine.data.TensorLoader(
        images, torch.randint(10, (50,)), models.config(TINY), 16, augment=True
    )
    pixels, labels = (torch.cat(parts) for parts in list(zip(*loader.epoch(0), strict=True))[:2])
    plain = loader.epoch
    loader.epoch = lambda epoch: ((x.double(), y, shard) for x, y, shard in plain(epoch))
    monkeypatch.setattr(engine.candidates, "IMAGES", 40)
    found = engine.candidates.find(resnet, loader, (2, 2, 2), "fp32")
    for shorter, longer in zip(found, found[1:], strict=False):
        losses = {}
        for stage in range(3):
            policy = shorter.clone()
            policy[2 * stage + 1] = 1
            with torch.no_grad():
                logits = resnet(pixels[:40].double(), policy.double().expand(40, -1))
            error = torch.nn.functional.cross_entropy(logits, labels[:40])
            if not torch.equal(policy, shorter):
                losses[error.item()] = policy
        assert torch.equal(losses[min(losses)], longer)


def test_the_warm_steps_table_and_loss_by_hand(monkeypatch):
    cl_training = script_module("cl_training")
    torch.manual_seed(0)
    candidates = nested()
    _, policy_net = models.build(TINY)
    net = models.WithConfidence(
        policy_net, models.Confidence(policy_net.features.num_features, 10, candidates)
    ).double()
    net.confidence.candidates = candidates.double()
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
    """Images of which brightness tells the class need three blocks; others, whose class nothing
    tells, all of them. Only one in 8 is looked at with the ResNet.
    """
    cl_training = script_module("cl_training")
    torch.manual_seed(0)
    candidates = nested()
    _, policy_net = models.build(TINY)
    confidence = models.Confidence(policy_net.features.num_features, 10, candidates)
    net = models.WithConfidence(policy_net, confidence)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    args = SimpleNamespace(penalty=-1.0)

    def batch(size):
        is_hard = torch.rand(size) < 0.5
        labels = torch.randint(2, (size,))
        shown = torch.where(is_hard, 1.0, 2.0 * labels)
        images = shown[:, None, None, None] + 0.1 * torch.randn(size, 3, 32, 32)
        images[:, 0, 0, 0] = torch.where(is_hard, 6.0, 3.0)
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
    needed = torch.where(is_hard, 6, 3)
    with torch.no_grad():
        learned = utils.greedy(policy_net(images)[0])
        at = models.PenaltyPolicy(policy_net, confidence, -1.0)
        policy = at(images)
        _, fast = models.deploy(models.build(TINY)[0], at)
        assert torch.equal(fast(images), policy)
        assert (policy.sum(1) == needed).float().mean() > 0.9
        assert (learned.sum(1) == needed).float().mean() > 0.8
        at.penalty = 0.9  # a wrong prediction is worth nearly as much as a right one
        assert at(images).sum(1).mean() < 3.3


def test_a_step_for_many_penalties_by_hand():
    """Each batch has one penalty; the policies are those that the head chooses for it."""
    finetune = script_module("finetune")
    resnet, policy_net = models.build(TINY)
    candidates = torch.tensor([[1.0, 0, 0, 0, 0, 0], [1.0] * 6])
    head = models.Confidence(policy_net.features.num_features, 10, candidates)
    with torch.no_grad():  # right with one block in 60 %, with all in 90 % of all images
        head.linear.weight.zero_()
        head.linear.bias.copy_(torch.logit(torch.tensor([0.6, 0.9])))
    at = models.PenaltyPolicy(policy_net, head, 0.0)
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
    for penalty in (0, -100):
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
    before, after = (storage.content(where / "last.t7") for where in (warm, tuned))
    assert all(same(before[name], after[name]) for name in ("agent", "correctness"))
    assert not same(storage.content(base_file)["state_dict"], after["resnet"])
    assert run("test", *common, "--load", tuned, "--penalty", -7)[0] == 0
    # the curriculum goes on from there, in one run or in two
    assert run("cl_training", *options, "--max_epochs", 4, "--load", warm)[0] == 0
    assert run("cl_training", *options, "--max_epochs", 4, "--cv_dir", whole)[0] == 0
    assert same(trained(warm), trained(whole))
    # a curve and its stage 1 stand in one report
    page[page.index("--load") + 1 : page.index("--out")] = [named(warm)[1], warm]
    status, _, err = run(*page, "--penalty", -1)
    assert status == 0, err
    refused(run("test", *common, "--base", base_file, "--load", warm, "--penalty", -1),
            "has gone on since", "the last epoch of cl_training.py --warm_start")  # fmt: skip
    plain = tmp_path / "plain"
    assert run("cl_training", *options[:-4], "--max_epochs", 1, "--cv_dir", plain)[0] == 0
    refused(run("test", *common, "--base", base_file, "--load", plain, "--penalty", -1),
            "cl_training.py --warm_start")  # fmt: skip
