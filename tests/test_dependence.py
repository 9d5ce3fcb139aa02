"""What the policies owe to the image, measured by dealing them to other images."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import metrics, named, refused

import engine
import models
import utils
from engine import Shard


class Deciding(torch.nn.Module):
    """A ResNet whose class is right exactly where the policy is the image's own."""

    decides = False

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
    trained.policy = models.GreedyPolicy(models.build("R14_C10")[1])
    trained.candidates = None
    per_block = torch.full((6,), 1e6, dtype=torch.float64)
    decision = utils.count_flops(trained.policy, (3, 32, 32))
    trained.resnet_flops = lambda: (100_000_000 - decision, per_block)
    found = engine.dependence.measure(trained, Loader(), policies, correct)
    own, shuffled = found["own"]["accuracy"], found["shuffled"]["accuracy"]
    if kind == "constant":
        assert own == shuffled == found["most_frequent"]["accuracy"] == 1
    elif kind == "random":
        assert abs(own - shuffled) < 0.02 and own < 0.1
    else:
        assert own == 1 and shuffled < 0.1 and found["most_frequent"]["accuracy"] < 0.1

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
    spent = utils.count_flops(trained.policy, (3, 32, 32)) / 1e6  # in blocks
    assert found["static_same_flops"]["blocks"] == pytest.approx(min(6, blocks + spent))
    assert found["static_same_flops"]["accuracy"] == pytest.approx(mixed(min(6, blocks + spent)))
    full = [all(row) for row in resnet.own.tolist()]
    known = engine.dependence.measure(trained, Loader(), policies, correct, torch.tensor(full))
    assert known == found
    kept = policies.sum(1).tolist()
    wrong = [n for n, right in zip(kept, full, strict=True) if not right]
    if wrong:
        assert found["blocks_where_full_is_wrong"] == pytest.approx(sum(wrong) / len(wrong))
    else:
        assert found["blocks_where_full_is_wrong"] is None
        assert engine.dependence.by_difficulty(found).count(":") == 1


def test_static_policies_are_compared_with_the_candidates_as_well():
    """Of a ResNet that is right with the last stage's blocks, one of which the candidates keep."""
    count = 90
    needed = torch.arange(count) % 3  # blocks of the last stage that an image needs

    class LastStage(torch.nn.Module):
        def forward(self, images, policy):
            right = policy[:, 4:].sum(1) >= images[:, 0, 0, 0]
            return torch.stack([right.float(), 1 - right.float()], 1)

    class Loader:
        num_images, batch_size = count, count

        def __len__(self):
            return 1

        def epoch(self, epoch, skip=0):
            images = needed.float()[:, None, None, None].expand(-1, 3, 32, 32)
            yield images, torch.zeros(count).long(), Shard(0, count, count, step=0)

    trained = object.__new__(engine.TrainedModel)
    trained.args = SimpleNamespace(precision="fp32")
    trained.config, trained.resnet = models.config("R14_C10"), LastStage()
    per_block = torch.full((6,), 1e6, dtype=torch.float64)
    trained.resnet_flops = lambda: (100_000_000, per_block)
    trained.candidates = torch.tensor([[0.0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1], [1] * 6])
    static = engine.dependence.StaticPolicies(trained, Loader(), count)
    assert static.best(per_block, 1e6)["policy"] in ("late:1", "0-0-1")
    found = static.best(per_block, 1.5e6)  # neither DistributeK nor LateK has two there
    assert found["policy"] == "0-0-1 and 0-0-2"
    assert found["accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["flops"] == pytest.approx(101.5e6)
    # less than the first candidate costs
    assert static.best(per_block, 0.5e6)["policy"] == "late:0 and late:1"
    trained.candidates = None
    static = engine.dependence.StaticPolicies(trained, Loader(), count)
    assert static.best(per_block, 1.5e6)["accuracy"] == pytest.approx(2 / 3)


def test_dependence_is_printed_and_kept(run, common, base_file, stage_1, tmp_path):
    figures = tmp_path / "figures.json"
    load = ["--base", base_file, "--load", named(stage_1)[1]]
    status, out, err = run("test", *common, *load, "--dependence", "--json", figures)
    assert status == 0, err
    assert len(re.findall(r"(?:own|shuffled|most frequent|static, .*): +0\.\d+ \| \d", out)) == 5
    found = json.loads(figures.read_text())
    assert found["dependence"]["own"]["accuracy"] == found["accuracy"]
    assert found["dependence"]["own"]["flops"] == pytest.approx(found["flops"])
    assert metrics(stage_1)[-1].keys() >= {"test_shuffled", "test_most_frequent"}
    refused(run("test", *common, "--base", base_file, "--dependence"), "--dependence")
