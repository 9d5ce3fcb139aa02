"""ConvNet-AIG: its gates, its loss, its execution, its checkpoints and its script."""

import json
import math
import pickle
import re
import shutil

import pytest
import torch
from conftest import script_module
from torch import nn
from torch.nn import functional as F

import models
import utils
from engine import storage
from models import aig

TINY_AIG = "AIG14_C10"  # two blocks a stage: K = 6


@pytest.fixture
def net():
    """A gated ResNet in double precision whose gates differ from image to image."""
    torch.manual_seed(0)
    net, policy_net = models.build(TINY_AIG)
    assert policy_net is None
    with torch.no_grad():
        for gate in net.gates:
            gate.fc2.weight.mul_(3000)
            gate.fc2.bias.zero_()
        net.double().train()
        for module in net.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.momentum = 0.5
        for _ in range(6):  # BatchNorm then tells images apart
            net(varied_images(16))
    return net.eval()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return varied_images(12)


def varied_images(count):
    """Noise of one contrast and colour in each image."""
    noise = torch.randn(count, 3, 32, 32, dtype=torch.float64)
    return noise * 3 * torch.rand(count, 1, 1, 1) + torch.randn(count, 3, 1, 1)


def test_gumbel_draws_follow_the_softmax():
    torch.manual_seed(0)
    draws = 100_000
    for logits in ([0.1, 2.0], [1.0, -0.5, 0.3], [0.0, 0.0]):
        logits = torch.tensor(logits)
        counts = aig.gumbel_argmax(logits.expand(draws, -1)).sum(0).tolist()
        total = sum(math.exp(v) for v in logits.tolist())
        expected = [draws * math.exp(v) / total for v in logits.tolist()]
        statistic = sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))
        assert statistic < 16  # exceeded once in 2900 (3 outcomes) or 16000 (2) runs


def test_gumbel_gradient_is_that_of_the_soft_draw(monkeypatch):
    logits = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    exponential = torch.rand(5, 2, dtype=torch.float64) + 0.1
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.copy_(exponential))
    noise = -exponential.float().log().double()
    weight = torch.randn(5, 2, dtype=torch.float64)
    tau = 0.7
    drawn = aig.gumbel_argmax(logits, tau)
    noisy = (logits.detach() + noise).tolist()
    assert drawn.round().long().argmax(1).tolist() == [row.index(max(row)) for row in noisy]
    (gradient,) = torch.autograd.grad((drawn * weight).sum(), logits)
    for i, row in enumerate(noisy):
        e = [math.exp(v / tau) for v in row]
        p = [v / sum(e) for v in e]
        mean = sum(w * q for w, q in zip(weight[i].tolist(), p, strict=True))
        for j in range(2):  # of softmax: p_j (w_j - sum_k p_k w_k) / tau
            expected = p[j] * (weight[i, j].item() - mean) / tau
            assert gradient[i, j].item() == pytest.approx(expected, rel=1e-9)


def test_extreme_draws_stay_finite(monkeypatch):
    extremes = torch.tensor([0.0, 1e-45, 1e-30, 1.0, 100.0, float("inf")])

    def extreme(self):
        return self.copy_(extremes[torch.randint(len(extremes), self.shape)])

    monkeypatch.setattr(torch.Tensor, "exponential_", extreme)
    logits = (1e4 * torch.randn(1_000_000, 2)).requires_grad_()
    drawn = aig.gumbel_argmax(logits)
    drawn[:, 1].sum().backward()
    assert drawn.isfinite().all() and logits.grad.isfinite().all()
    assert drawn.detach().sum(1).eq(1).all() and drawn.detach().unique().tolist() == [0, 1]


def test_gates_start_mostly_open():
    torch.manual_seed(0)
    net, _ = models.build("AIG32_C10")
    with torch.no_grad():
        _, executed = net.train()(torch.randn(256, 3, 32, 32))
    rates = executed.mean(0)
    assert 0.8 < rates.mean() < 0.9 and rates.min() > 0.75
    _, executed = net.eval()(torch.randn(4, 3, 32, 32))
    assert executed.eq(1).all()  # the likelier outcome


def test_target_rate_loss_against_a_loop():
    executed = (torch.rand(9, 5) < 0.5).double()
    targets = torch.tensor([1.0, 0.6, 0.3, 1.0, 0.8], dtype=torch.float64)
    expected = 0.0
    for k, target in enumerate(targets.tolist()):
        if target < 1:
            expected += (sum(executed[:, k].tolist()) / 9 - target) ** 2
    loss = utils.target_rate_loss(executed.mean(0), targets)
    assert loss.item() == pytest.approx(expected / 5, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda e: utils.target_rate_loss(e.mean(0), targets), executed.requires_grad_()
    )


def by_hand(net, image):
    """One image through the network, block by block; logits and decisions."""
    x = F.relu(net.resnet.bn1(net.resnet.conv1(image)))
    decisions = []
    for k, (branch, shortcut) in enumerate(net.resnet.units()):
        gate = net.gates[k]
        pooled = x.flatten(2).mean(2)
        skip, execute = gate.fc2(gate.fc1bn(gate.fc1(pooled)).clamp_min(0))[0].tolist()
        decisions.append(float(execute > skip or k in net.always_on))
        x = (shortcut(x) + decisions[-1] * branch(x)).clamp_min(0)
    return net.resnet.fc(x.flatten(2).mean(2))[0], decisions


@pytest.mark.parametrize("always_on", [(), (0, 2, 5)])
def test_sparse_inference_is_the_dense_gated_form(net, images, always_on):
    net.always_on = frozenset(always_on)
    with torch.no_grad():
        logits, executed = net(images)
        fast, none = models.deploy(net, dtype=torch.float64)
        fast_logits, fast_executed = fast(images)
        assert none is None
        for i, image in enumerate(images):
            expected, decisions = by_hand(net, image[None])
            assert executed[i].tolist() == decisions
            torch.testing.assert_close(logits[i], expected, rtol=1e-9, atol=1e-9)
            alone, alone_executed = fast(image[None])
            torch.testing.assert_close(alone[0], expected, rtol=1e-9, atol=1e-9)
            assert alone_executed[0].tolist() == decisions
    torch.testing.assert_close(fast_logits, logits, rtol=1e-9, atol=1e-9)
    assert torch.equal(fast_executed.double(), executed)
    kept = executed.mean(0)
    assert (kept > 0).any() and (kept < 1).any() and executed.unique(dim=0).shape[0] > 1


@pytest.mark.parametrize("deployed", [False, True])
def test_padded_rows_change_nothing_but_their_number(net, images, deployed, monkeypatch):
    with torch.no_grad():
        expected = net(images)
        open_rows, sizes = models.execution.open_rows, []

        def note(gate, multiple):
            rows = open_rows(gate, multiple)
            sizes.append((int(gate.sum()), len(rows)))
            return rows

        monkeypatch.setattr(models.execution, "open_rows", note)
        net.resnet.row_multiple = 4
        twin = models.deploy(net, dtype=torch.float64)[0] if deployed else net
        for found, right in zip(twin(images), expected, strict=True):
            torch.testing.assert_close(found.double(), right.double(), rtol=1e-9, atol=1e-9)
    assert any(count % 4 for count, _ in sizes)
    last = len(images) - 1
    assert all(rows == count or rows in (4, 8, last) for count, rows in sizes)


@pytest.mark.parametrize("open_", [True, False])
def test_all_gates_open_and_all_closed(net, images, open_):
    with torch.no_grad():
        for gate in net.gates:
            gate.fc2.bias.copy_(torch.tensor([0.0, 1e6 if open_ else -1e6]))
        logits, executed = net(images)
        assert executed.eq(open_).all()
        expected = torch.stack([by_hand(net, image[None])[0] for image in images])
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
        fast, _ = models.deploy(net, dtype=torch.float64)
        torch.testing.assert_close(fast(images)[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_deployed_gates_in_other_precisions(net, images, dtype, tolerance):
    net = net.float()
    net.always_on = frozenset(range(6))  # so that rounding flips no gate
    fast, _ = models.deploy(net, dtype=dtype)
    with torch.no_grad():
        expected, _ = net(images.float())
        logits, executed = fast(images.float())
    assert executed.eq(1).all()
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()


def test_closed_gates_learn(net, images):
    net.train()
    for gate in net.gates:
        gate.fc2.bias.data = torch.tensor([50.0, 0.0], dtype=torch.float64)
    logits, executed = net(images)
    assert executed.detach().abs().max() < 1e-9
    (logits.sum() + 0 * executed.sum()).backward()
    assert all(gate.fc2.weight.grad is not None for gate in net.gates)


def test_a_single_image_trains(net, images):
    net.train()
    before = [gate.fc1bn.running_mean.clone() for gate in net.gates]
    logits, _ = net(images[:1])
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(torch.equal(a, g.fc1bn.running_mean) for a, g in zip(before, net.gates, strict=True))


def test_a_single_image_comes_to_a_norm_that_ranks_share(net, images, monkeypatch):
    """Else the others would wait for it."""
    came = []
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda norm, x: came.append(norm) or x)
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(net).train()
    shared(images[:1])
    assert {id(gate.fc1bn) for gate in shared.gates} <= {id(norm) for norm in came}


def test_gates_cost_next_to_nothing():
    net, _ = models.build("AIG101_ImgNet")
    fixed, per_block = utils.block_flops(net.resnet, (3, 224, 224))
    total = fixed + per_block.sum().item()
    gates = [utils.count_flops(g, (g.fc1.in_features, 1, 1)) for g in net.gates]
    assert gates[0] == 2 * (64 * 16 + 16 * 2)
    assert sum(gates) < 0.0001 * total
    # the published 0.04 %: the 25 gates that are not always open, the additions of their pooling
    # counted too, of 14x14 inputs but for the last two
    sizes = [14] * 23 + [7] * 2
    pooling = sum(g.fc1.in_features * size**2 for g, size in zip(net.gates[8:], sizes, strict=True))
    assert (sum(gates[8:]) + pooling) / total == pytest.approx(0.0004, abs=0.00005)


def released_names(net):
    """The state under the names and shapes of the authors' code."""
    state = {}
    for name, tensor in net.state_dict().items():
        gate = re.fullmatch(r"gates\.(\d+)\.(fc\d)(bn)?\.(\w+)", name)
        if gate:
            stage, block = divmod(int(gate[1]), 2)
            convolution = tensor.ndim == 2 and not gate[3]
            tensor = tensor[:, :, None, None] if convolution else tensor
            name = f"layer{stage + 1}.{block}.{gate[2]}{gate[3] or ''}.{gate[4]}"
        else:
            name = name.removeprefix("resnet.")
            name = re.sub(r"^ds\.(\d)\.", lambda m: f"layer{int(m[1]) + 1}.0.shortcut.", name)
            name = re.sub(r"^blocks\.(\d)\.", lambda m: f"layer{int(m[1]) + 1}.", name)
            name = re.sub(r"^fc\.", "linear.", name)
        if not name.endswith("num_batches_tracked"):
            state[f"module.{name}"] = tensor
    return state


def test_released_checkpoints_load(net, images):
    state = released_names(net)
    for name in ("layer1.0.conv1.weight", "layer2.0.shortcut.0.weight", "layer1.0.fc1.weight",
                 "layer1.0.fc1bn.weight", "layer1.0.fc2.weight", "linear.weight"):  # fmt: skip
        assert f"module.{name}" in state
    assert state["module.layer1.0.fc1.weight"].shape == (16, 16, 1, 1)
    other = models.build(TINY_AIG)[0].double().eval()
    models.load_gated(other, state)
    with torch.no_grad():
        assert torch.equal(other(images)[0], net(images)[0])
    del state["module.layer2.1.fc2.bias"]
    with pytest.raises(ValueError, match="lacks the tensor gates.3.fc2.bias"):
        models.load_gated(other, state)


def test_a_blockdrop_base_fits_but_for_shortcuts_and_gates():
    base = models.build("R14_C10")[0]
    net = models.build(TINY_AIG)[0]
    before = net.resnet.ds[1][0].weight.clone()
    models.load_ungated(net, base.state_dict())
    assert torch.equal(net.resnet.blocks[1][0].conv1.weight, base.blocks[1][0].conv1.weight)
    assert torch.equal(net.resnet.ds[1][0].weight, before)


def test_target_schedules():
    target_rates = script_module("aig_training").target_rates
    assert target_rates("0.5", 3).tolist() == [0.5] * 3
    assert target_rates("1,0.5,0.25", 3).tolist() == [1, 0.5, 0.25]
    fifty = target_rates("resnet50:0.5", 16).tolist()
    published = [1, 1, 0.8, 1, 0.5, 0.5, 0.5, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 1, 0.7, 1]
    assert fifty == pytest.approx(published)
    assert target_rates("resnet101:0.25", 33).tolist() == [1] * 8 + [0.25] * 25


@pytest.mark.parametrize(
    "options, word",
    [
        (("--target", "resnet50:0.5"), "one rate or 6"),
        (("--target", "resnet18:0.5"), "no schedule resnet18"),
        (("--target", "most"), "no numbers"),
        (("--target", "1.5"), "in [0, 1]"),
        (("--model", "R32_C10"), "AIG32_C10"),
    ],
)
def test_impossible_options_are_refused(run, tmp_path, options, word):
    status, _, err = run("aig_training", "--model", TINY_AIG, *options, "--cv_dir", tmp_path / "x")
    assert status == 2 and err.count("\n") == 1 and word in err
    assert not (tmp_path / "x").exists()


def test_the_other_method_is_pointed_to(run):
    for script in ("cl_training", "pretrain"):
        status, _, err = run(script, "--model", "AIG32_C10")
        assert status == 2 and "aig_training.py" in err and "R110_C10" in err
    status, _, err = run("test", "--model", "AIG32_C10")
    assert status == 2 and "--load" in err


@pytest.fixture
def common(cifar_dir):
    return ["--model", TINY_AIG, "--data_dir", cifar_dir, "--skip_data_check", "--batch_size", 40]


def test_training_profile_and_resume(run, common, tmp_path, base_file):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*common, "--target", "1,0.4,0.4,1,0.4,0.4", "--test_every", 1, "--lr_steps", 2,
               "--pretrained", base_file]  # fmt: skip
    status, out, err = run("aig_training", *options, "--cv_dir", whole, "--max_epochs", 3)
    assert status == 0, err
    line = r"A: \d\.\d{3} \| S: \d\.\d{3} \| V: \d\.\d{3} \| #: \d+"
    assert re.fullmatch("".join(rf"E: {n} \| {line}\nTS - {line}\n" for n in (1, 2, 3)), out)

    assert run("aig_training", *options, "--cv_dir", parts, "--max_epochs", 1)[0] == 0
    assert run("aig_training", *options, "--load", parts, "--max_epochs", 3)[0] == 0
    a, b = storage.content(whole), storage.content(parts)
    assert all(torch.equal(t, b["state_dict"][n]) for n, t in a["state_dict"].items())

    figures = tmp_path / "figures.json"
    status, out, err = run("test", *common, "--load", whole, "--json", figures, "--time")
    assert status == 0, err
    assert "\n    Unique Policies: " in out and "\n    Gates: argmax\n    Execution rate: 0." in out
    assert ", target 0.600\n    Time/img: " in out
    metrics = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    profile = json.loads(figures.read_text())
    assert profile["accuracy"] == metrics["test_accuracy"]
    assert profile["block_usage"] == pytest.approx(sum(metrics["test_rates"]), abs=1e-3)
    assert metrics["test_rates"][0] == metrics["test_rates"][3] == 1
    assert len(metrics["test_rates_by_class"][0]) == 6
    assert profile["flops"] == pytest.approx(flops_by_hand(metrics["test_rates"]), rel=1e-4)
    status, out, _ = run("test", *common, "--load", whole, "--sample_gates")
    assert status == 0 and "    Gates: sampled\n    Execution rate: 0." in out
    assert profile["target_rate"] == pytest.approx(0.6)
    assert profile["execution_rate"] == pytest.approx(profile["block_usage"] / 6)
    status, _, err = run("test", *common, "--load", whole, "--sample_gates", "--time")
    assert status == 2 and "--time runs gates as they are deployed" in err


def test_rates_by_class_keep_their_places(run, cifar_dir, tmp_path, monkeypatch):
    """Also where a class has no image."""
    folder = shutil.copytree(cifar_dir, tmp_path / "data") / "cifar-10-batches-py"
    for path in folder.iterdir():
        batch = pickle.loads(path.read_bytes())
        batch["labels"] = [label if label != 3 else 4 for label in batch["labels"]]
        path.write_bytes(pickle.dumps(batch))
    options = ["--data_dir", tmp_path / "data", "--skip_data_check", "--batch_size", 40]
    status, _, err = run("aig_training", "--model", TINY_AIG, *options, "--max_epochs", 1,
                         "--cv_dir", tmp_path / "run")  # fmt: skip
    assert status == 0, err
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rates = json.loads(line)["test_rates_by_class"]
    assert len(rates) == 10 and rates[3] is None and all(len(r) == 6 for r in rates if r)


def flops_by_hand(rates):
    """A 14-layer gated ResNet's FLOPs, layer by layer, blocks weighted by how often they run."""
    stem, head = 2 * 9 * 3 * 16 * 32**2, 2 * 64 * 10
    shortcuts = 2 * 16 * 32 * 16**2 + 2 * 32 * 64 * 8**2
    # the gates of blocks 1, 2, 4 and 5 by their input's channels; 0 and 3 have none
    gates = [2 * (channels * 16 + 16 * 2) for channels in (16, 16, 32, 64)]
    blocks = []
    for channels, size in ((16, 32), (32, 16), (64, 8)):
        inner = 2 * 9 * channels**2 * size**2
        first = inner if channels == 16 else inner // 2
        blocks += [first + inner, 2 * inner]
    executed = sum(rate * cost for rate, cost in zip(rates, blocks, strict=True))
    return stem + head + shortcuts + sum(gates) + executed


def test_a_run_goes_on_with_other_targets(run, cifar_dir, tmp_path):
    options = ["--model", "AIG8_C10", "--data_dir", cifar_dir, "--skip_data_check"]
    options += ["--batch_size", 40, "--test_every", 1]
    first, second = tmp_path / "1", tmp_path / "2"
    begun = ["--max_epochs", 1, "--target", "0.5,0.5,0.5", "--cv_dir", first]
    assert run("aig_training", *options, *begun)[0] == 0
    more = ["--load", first, "--max_epochs", 2, "--target", "1,0.5,1", "--cv_dir", second]
    status, _, err = run("aig_training", *options, *more)
    assert status == 0, err
    rates = json.loads((second / "metrics.jsonl").read_text().splitlines()[-1])["train_rates"]
    assert rates[0] == rates[2] == 1 > rates[1]


class Convolved(aig.Gate):
    """A gate with a convolution in front of its pooling."""

    def __init__(self, channels):
        super().__init__(channels)
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)

    def forward(self, x):
        return super().forward(self.conv(x))


def test_gates_are_counted_at_the_size_that_they_see(monkeypatch):
    from engine import trained

    monkeypatch.setitem(
        models.registry.CIFAR_RESNETS, "AIGconv", models.resnet.ProjectedCifarResNet
    )
    monkeypatch.setitem(models.registry.GATES, "AIGconv", Convolved)
    net, _ = models.build("AIGconv8_C10")  # its name in letters of both kinds
    assert type(net.gates[0]) is Convolved
    size = 3, 32, 32
    found = trained.decision_flops(net, None, size)
    by_hand = [
        2 * (32 // (side * 2)) ** 2 * c * c * 9 + 2 * c * aig.HIDDEN + 2 * aig.HIDDEN * 2
        for c, side in ((16, 1), (16, 1), (32, 2))
    ]
    assert found == sum(by_hand)
    net.set_targets([1, 0.5, 0.5])
    assert trained.decision_flops(net, None, size) == sum(by_hand[1:])
    assert not any(gate._forward_pre_hooks for gate in net.gates)


def test_a_deployed_gate_shares_nothing_with_its_gate():
    class Scaled(aig.Gate):
        def __init__(self, channels):
            super().__init__(channels)
            self.scale = nn.Parameter(torch.ones(()))

        def pool(self, x, dtype):
            return (x.mean((2, 3)) * self.scale).to(dtype)

    torch.manual_seed(0)
    net = aig.GatedResNet(models.build("R8_C10")[0], Scaled).eval()
    for gate in net.gates:
        nn.init.normal_(gate.fc2.weight)
    fast, _ = models.deploy(net)
    images = torch.randn(8, 3, 32, 32)
    before = fast(images)[0]
    for gate in net.gates:
        gate.scale.data.fill_(-100.0)
    assert torch.equal(fast(images)[0], before)
