"""Networks: names, shapes, and a forward pass under a policy."""

import pytest
import torch
from conftest import TINY
from torch import nn
from torch.nn import functional as F

import models
import utils


def test_usual_names_build_with_their_number_of_blocks():
    expected = {"R32_C10": 15, "R110_C10": 54, "R32_C100": 15, "R110_C100": 54, "R101_ImgNet": 33}
    gated = {"AIG32_C10": 15, "AIG110_C10": 54, "AIG32_C100": 15, "AIG110_C100": 54}
    gated |= {"AIG50_ImgNet": 16, "AIG101_ImgNet": 33}
    assert {name: models.config(name).num_blocks for name in models.names()} == expected | gated
    for name in expected:
        resnet, policy_net = models.build(name)
        assert resnet.num_blocks == policy_net.num_blocks == expected[name]
    for name in gated:
        net, policy_net = models.build(name)
        assert net.num_blocks == gated[name] and policy_net is None


def test_any_cifar_depth_builds():
    resnet, _ = models.build("R56_C100")
    assert resnet.stages == (9, 9, 9)
    assert resnet(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize("name", ["R33_C10", "R2_C10", "R32_C20", "R77_ImgNet", "", "r32_c10"])
def test_unknown_names_list_the_known(name):
    with pytest.raises(ValueError, match="R32_C10, R110_C10"):
        models.build(name)


def test_only_r32_c10_normalises_its_pixels():
    assert models.config("R32_C10").mean == (125.3 / 255, 123.0 / 255, 113.9 / 255)
    assert models.config("R110_C10").mean == (0, 0, 0)
    assert models.config("R32_C100").std == (1, 1, 1)


def test_cifar_names_of_tensors():
    resnet, policy_net = models.build("R32_C10")
    names = set(resnet.state_dict())
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "fc.weight", "fc.bias"} | {f"bn1.{n}" for n in norm}
    for stage in range(3):
        for block in range(5):
            for i in (1, 2):
                expected.add(f"blocks.{stage}.{block}.conv{i}.weight")
                expected |= {f"blocks.{stage}.{block}.bn{i}.{n}" for n in norm}
    assert names == expected
    heads = {n for n in policy_net.state_dict() if not n.startswith("features.")}
    assert heads == {"logit.weight", "logit.bias", "vnet.weight", "vnet.bias"}
    assert "features.fc.weight" not in policy_net.state_dict()


def test_policy_network_size():
    assert sum(p.numel() for p in models.build("R32_C10")[1].parameters()) == 75_680


def test_imagenet_names_of_tensors_match_torchvision_after_renaming():
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.resnet101().state_dict()
    ours = models.build("R101_ImgNet")[0].state_dict()
    assert len(theirs) == len(ours)
    assert ours["ds.1.0.weight"].shape == theirs["layer2.0.downsample.0.weight"].shape
    assert ours["blocks.2.22.conv2.weight"].shape == theirs["layer3.22.conv2.weight"].shape


def test_weights_start_as_released():
    torch.manual_seed(0)
    conv = models.build("R110_C10")[0].blocks[2][3].conv1
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    norm = models.build("R32_C10")[0].bn1
    assert norm.weight.eq(1).all() and norm.bias.eq(0).all()


def one_image(resnet, x, kept):
    """The equations of the paper, one image and one block at a time."""
    x = F.relu(resnet.bn1(resnet.conv1(x)))
    k = 0
    for stage, branches in enumerate(resnet.blocks):
        for b, branch in enumerate(branches):
            passed = x
            if b == 0 and stage > 0:
                passed = F.avg_pool2d(x, 2)
                passed = torch.cat([passed, torch.zeros_like(passed)], dim=1)
            x = F.relu(passed + branch(x)) if kept[k] else passed
            k += 1
    return resnet.fc(x.mean((2, 3)))


def random_norms(resnet):
    """Give BatchNorm running statistics that a wrong order of operations cannot hide behind."""
    for module in resnet.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
    return resnet.double().eval()


POLICIES = {
    "random": torch.tensor([[1, 0, 1, 1, 0, 0], [0, 1, 0, 1, 1, 1], [0, 0, 1, 0, 0, 1]]),
    "all dropped": torch.zeros(3, 6),
    "all kept": torch.ones(3, 6, dtype=torch.bool),
    "one image": torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 1.0]]),
}


@pytest.mark.parametrize("execution", ["sparse", "masked"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_each_image_runs_exactly_its_kept_blocks(execution, policy):
    torch.manual_seed(0)
    resnet = random_norms(models.build(TINY)[0])
    resnet.execution = execution
    x = torch.randn(len(policy), 3, 32, 32, dtype=torch.float64)
    labels = torch.arange(len(policy))
    leaf = x.clone().requires_grad_()
    logits = resnet(leaf, policy)
    F.cross_entropy(logits, labels).backward()
    gradients = [p.grad for p in resnet.parameters()]
    resnet.zero_grad()
    other = x.clone().requires_grad_()
    expected = torch.cat([one_image(resnet, other[i : i + 1], policy[i]) for i in range(len(x))])
    F.cross_entropy(expected, labels).backward()
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-10, atol=1e-13)
    for ours, parameter in zip(gradients, resnet.parameters(), strict=True):
        theirs = parameter.grad
        if ours is None or theirs is None:  # a block that nobody keeps
            assert ours is None or ours.eq(0).all()
            assert theirs is None or theirs.eq(0).all()
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_convolutional_shortcuts_under_a_policy():
    torch.manual_seed(0)
    resnet = random_norms(models.build("R18_ImgNet")[0])
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    policy = (torch.rand(3, 8) < 0.5).float()
    sparse = resnet(x, policy)
    resnet.execution = "masked"
    torch.testing.assert_close(sparse, resnet(x, policy), rtol=1e-12, atol=1e-12)


def test_no_policy_runs_all_blocks():
    torch.manual_seed(0)
    resnet = random_norms(models.build(TINY)[0])
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(resnet(x), one_image(resnet, x, [1] * 6))


def test_a_policy_of_the_wrong_shape_is_refused():
    resnet, _ = models.build(TINY)
    with pytest.raises(ValueError, match=r"\(2, 5\), not \(2, 6\)"):
        resnet(torch.zeros(2, 3, 32, 32), torch.ones(2, 5))


def test_training_with_a_block_that_one_image_keeps():
    resnet, _ = models.build(TINY)
    policy = torch.ones(4, 6)
    policy[1:, 2] = 0
    policy[:, 3] = 0
    loss = resnet.train()(torch.randn(4, 3, 32, 32), policy).square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in resnet.parameters() if p.grad is not None)


def test_policy_network_gives_probabilities():
    for name, size in (("R32_C10", 32), ("R101_ImgNet", 224)):
        _, policy_net = models.build(name)
        probs, value = policy_net.eval()(torch.randn(2, 3, size, size))
        assert probs.shape == (2, models.config(name).num_blocks) and value.shape == (2, 1)
        assert (probs > 0).all() and (probs < 1).all()


def conv_flops(in_channels, out_channels, kernel, size):
    return 2 * in_channels * out_channels * kernel**2 * size**2


def test_flops_of_resnet_110_by_hand():
    resnet, policy_net = models.build("R110_C10")
    stem, head = conv_flops(3, 16, 3, 32), 2 * 64 * 10
    blocks = []
    for width, size in ((16, 32), (32, 16), (64, 8)):
        before = max(width // 2, 16)
        blocks.append(conv_flops(before, width, 3, size) + conv_flops(width, width, 3, size))
        blocks += [2 * conv_flops(width, width, 3, size)] * 17
    fixed, per_block = utils.block_flops(resnet, (3, 32, 32))
    assert fixed == stem + head
    assert per_block.tolist() == blocks
    assert utils.count_flops(resnet, (3, 32, 32)) == stem + head + sum(blocks)
    policy_blocks = [blocks[0], blocks[18], blocks[36]]
    expected = stem + sum(policy_blocks) + 2 * 64 * (54 + 1)
    assert utils.count_flops(policy_net, (3, 32, 32)) == expected


def test_counting_leaves_each_part_in_its_mode():
    resnet, _ = models.build("R8_C10")
    resnet.train()
    resnet.bn1.eval()  # frozen
    before = [part.training for part in resnet.modules()]
    utils.count_flops(resnet, (3, 32, 32))
    assert [part.training for part in resnet.modules()] == before and not resnet.bn1.training


def test_flops_of_resnet_101_by_hand():
    resnet, _ = models.build("R101_ImgNet")
    total, in_channels, size = conv_flops(3, 64, 7, 112), 64, 56
    for depth, width in ((3, 64), (4, 128), (23, 256), (3, 512)):
        out = 4 * width
        stride = 1 if width == 64 else 2
        for block in range(depth):
            total += conv_flops(in_channels, width, 1, size)
            if block == 0:
                size //= stride
                total += conv_flops(in_channels, out, 1, size)
            total += conv_flops(width, width, 3, size) + conv_flops(width, out, 1, size)
            in_channels = out
    total += 2 * 2048 * 1000
    fixed, per_block = utils.block_flops(resnet, (3, 224, 224))
    assert fixed + per_block.sum().item() == total
    assert f"{total:.2E}" == "1.56E+10"  # published


def test_flops_follow_each_policy():
    resnet, _ = models.build(TINY)
    fixed, per_block = utils.block_flops(resnet, (3, 32, 32))
    policy = torch.tensor([[1.0, 0, 1, 0, 0, 1]])
    assert utils.count_flops(resnet, (3, 32, 32), policy) == fixed + per_block[[0, 2, 5]].sum()


def test_counting_flops_leaves_the_network_as_it_was():
    resnet, _ = models.build(TINY)
    before = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    resnet.train()
    utils.block_flops(resnet, (3, 32, 32))
    assert resnet.training and resnet.bn1.training
    assert all(torch.equal(before[name], t) for name, t in resnet.state_dict().items())


def test_a_policy_network_may_look_at_fewer_pixels():
    torch.manual_seed(0)
    _, policy_net = models.build("R14_C10")
    random_norms(policy_net)
    x = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    whole, names = utils.count_flops(policy_net, (3, 32, 32)), set(policy_net.state_dict())
    policy_net.look_at(16)
    assert set(policy_net.state_dict()) == names
    assert whole / utils.count_flops(policy_net, (3, 32, 32)) == pytest.approx(4, rel=0.01)
    means = x.unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean((3, 5))
    features = policy_net.features(means)
    expected = torch.sigmoid(policy_net.logit(features))
    torch.testing.assert_close(policy_net(x)[0], expected)
    policy = models.GreedyPolicy(policy_net)
    _, fast = models.deploy(models.build("R14_C10")[0], policy, torch.float64)
    torch.testing.assert_close(fast.policy_net(x)[0], expected)
    with pytest.raises(ValueError, match="32 or 16 pixels, not 8"):
        policy_net.look_at(8)


@pytest.mark.parametrize("execution", ["sparse", "masked"])
def test_a_block_that_every_image_drops_learns_nothing(execution):
    torch.manual_seed(0)
    resnet = models.build(TINY)[0].double().train()
    resnet.execution = execution
    before = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    policy = torch.ones(4, 6)
    policy[:, 2], policy[0, 4] = 0, 0  # a shape-changing block, and one that some images keep
    resnet(torch.rand(4, 3, 32, 32, dtype=torch.float64), policy).sum().backward()
    changed = {n for n, tensor in resnet.state_dict().items() if not torch.equal(tensor, before[n])}
    assert not any(name.startswith("blocks.1.0.") for name in changed)
    assert {"blocks.0.0.bn1.running_var", "blocks.2.0.bn2.running_mean"} <= changed
    assert resnet.blocks[1][0].conv1.weight.grad is None


@pytest.mark.parametrize("name", ["R14_C10", "R18_Folder", "AIG14_C10"])
@pytest.mark.parametrize("dropped", [False, True])
def test_hooks_of_blocks_keep_what_they_saw(name, dropped):
    torch.manual_seed(0)
    net, _ = models.build(name, 10) if name == "R18_Folder" else models.build(name)
    net = random_norms(net).eval()
    resnet = net.resnet if net.decides else net
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    policy = torch.ones(3, resnet.num_blocks)
    policy[0] = 0
    call = (x, policy) if dropped and not net.decides else (x,)
    unhooked = net(*call)
    seen, gradients = [], []

    def see(block, inputs, output):
        seen.append((block, inputs[0], output))

    for branch, _ in resnet.units():
        branch.register_forward_hook(see)
        branch.register_full_backward_hook(lambda *of: gradients.append(of[0]))
    out = net(*call)
    logits, unhooked = (y[0] if net.decides else y for y in (out, unhooked))
    assert torch.equal(logits, unhooked)
    logits.sum().backward()
    blocks = [block for block, _, _ in seen]
    assert gradients == blocks[::-1] and (net.decides or len(blocks) == resnet.num_blocks)
    for block, given, output in seen:
        assert len(output) == (2 if len(call) == 2 else 3) or net.decides
        assert torch.equal(block.forward(given), output)


def test_global_hooks_and_blocks_of_ones_own_keep_what_they_saw():
    class Keeping(models.resnet.BasicBlock):
        def forward(self, x):
            self.last = super().forward(x).relu()
            return self.last

    torch.manual_seed(0)
    resnet = random_norms(models.build("R14_C10")[0]).eval()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    seen = []

    def see(module, inputs, output):
        if isinstance(module, models.resnet.BasicBlock):
            seen.append((output, output.clone()))

    with nn.modules.module.register_module_forward_hook(see):
        resnet(x)
    assert len(seen) == 6 and all(torch.equal(output, then) for output, then in seen)
    block = resnet.blocks[1][1]
    block.__class__ = Keeping
    with block.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0])):
        resnet(x).sum().backward()
    assert torch.equal(block.last, models.resnet.BasicBlock.forward(block, seen[-1]).relu())
    # what is called before the gradient of a block's output is known
    block.__class__ = models.resnet.BasicBlock
    block.register_full_backward_pre_hook(lambda block, gradients: seen.append(gradients))
    resnet(x).sum().backward()
    assert seen[-1][0].shape == block.last.shape


def test_only_known_executions_are_taken():
    resnet, _ = models.build(TINY)
    with pytest.raises(ValueError, match="'mask': only sparse and masked are known"):
        resnet.execution = "mask"
    assert resnet.execution == "sparse"


@pytest.mark.parametrize(
    "head, outputs",
    [(nn.Identity(), 64), (nn.Sequential(nn.Dropout(), nn.Linear(64, 5)), 5), (None, 64)],
)
def test_any_head_may_follow(head, outputs):
    torch.manual_seed(0)
    resnet = models.build(TINY)[0].eval()
    resnet.fc = head
    x, policy = torch.rand(3, 3, 32, 32), torch.tensor([[1.0, 0, 1, 0, 1, 1]] * 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert resnet(x, policy).shape == (3, outputs)
        assert resnet(x).dtype == (torch.bfloat16 if head is None else torch.float32)


@pytest.mark.parametrize("name", ["R14_C10", "AIG14_C10"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_in_half_precision(name, dtype):
    torch.manual_seed(0)
    net, _ = models.build(name)
    net = net.eval()
    x = torch.rand(3, 3, 32, 32)
    expected = net(x)
    logits = net.to(dtype)(x.to(dtype))
    if net.decides:
        assert torch.equal(logits[1].float(), expected[1])
        assert net.gates[0](torch.rand(2, 16, 8, 8, dtype=dtype)).dtype == torch.float32
        logits, expected = logits[0], expected[0]
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)


def test_masked_policies_of_inference_mode():
    resnet = models.build(TINY)[0].train()
    resnet.execution = "masked"
    with torch.inference_mode():
        policy = torch.ones(4, 6, dtype=torch.bool)
        policy[0, 2] = False
    resnet(torch.rand(4, 3, 32, 32), policy).sum().backward()
    assert resnet.conv1.weight.grad is not None


def test_gated_networks_may_be_masked():
    torch.manual_seed(0)
    net = random_norms(models.build("AIG14_C10")[0]).eval()
    x = torch.randn(16, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        gate = net.gates[3]
        gate.fc2.bias.zero_()
        given = []
        with gate.register_forward_hook(lambda _, __, z: given.append(z.diff().median())):
            net(x)
        gate.fc2.bias[models.aig.OPEN] = -given[0]  # open for half of the images
        logits, gates = net(x)
        some = next(k for k, count in enumerate(gates.sum(0).tolist()) if 0 < count < 16)
        seen = []
        branch, _ = net.resnet.units()[some]
        branch.register_forward_hook(lambda *of: seen.append(len(of[2])))
        net(x)
        net.resnet.execution = "masked"
        masked, same = net(x)
    torch.testing.assert_close(masked, logits, rtol=1e-12, atol=1e-12)
    assert torch.equal(same, gates) and seen == [gates[:, some].sum(), 16]


def test_a_network_that_was_pickled_before_executions_were_checked():
    resnet, _ = models.build(TINY)
    state = resnet.__getstate__()
    state["execution"] = state.pop("_execution")
    older = models.resnet.CifarResNet.__new__(models.resnet.CifarResNet)
    older.__setstate__(state)
    assert older.eval()(torch.rand(2, 3, 32, 32), torch.eye(6)[:2]).shape == (2, 10)


def test_as_many_target_rates_as_blocks():
    net, _ = models.build("AIG14_C10")
    with pytest.raises(ValueError, match="20 target rates for 6 blocks"):
        net.set_targets([1.0] * 20)
    net.set_targets([])
    assert not net.always_on


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("size, halves", [(30, "15x15"), (33, "33x33")])
def test_images_that_cannot_be_halved(size, halves, deployed):
    resnet = models.build(TINY)[0].eval()
    network = models.deploy(resnet)[0] if deployed else resnet
    with pytest.raises(ValueError, match=f"{halves} cannot be halved: .* multiples of 4"):
        network(torch.rand(2, 3, size, size), torch.zeros(2, 6))


def test_flops_that_cannot_be_counted_leave_the_mode():
    resnet = models.build(TINY)[0].train()
    with pytest.raises(ValueError, match="policy has shape"):
        utils.count_flops(resnet, (3, 32, 32), torch.ones(1, 5))
    assert resnet.training
    with pytest.raises(ValueError, match="DeployedResNet has no parameters: count what"):
        utils.block_flops(models.deploy(resnet)[0], (3, 32, 32))


@pytest.mark.parametrize("name", ["R8_C10", "R18_Folder"])
@pytest.mark.parametrize("second", ["grad", "backward"])
def test_second_derivatives_are_those_of_masked_execution(name, second):
    torch.manual_seed(0)
    resnet = random_norms(models.build(name, 10)[0]).eval()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    policy = torch.randint(0, 2, (4, resnet.num_blocks))
    policy[0], policy[1] = 0, 1
    weight, found = resnet.conv1.weight, {}
    for execution in ("sparse", "masked"):
        resnet.execution = execution
        (gradient,) = torch.autograd.grad(
            resnet(x, policy).logsumexp(1).sum(), x, create_graph=True
        )
        penalty = gradient.square().sum()
        if second == "grad":
            (found[execution],) = torch.autograd.grad(penalty, weight)
        else:
            weight.grad = None
            penalty.backward()
            found[execution] = weight.grad
    assert found["masked"].abs().max() > 0
    torch.testing.assert_close(found["sparse"], found["masked"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("execution", ["sparse", "masked"])
def test_a_policy_with_a_gradient_is_refused(execution):
    resnet, _ = models.build("R8_C10")
    resnet.execution = execution
    policy, images = torch.ones(2, 3, requires_grad=True), torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="the policy has a gradient"):
        resnet(images, policy)
    with torch.no_grad():
        resnet(images, policy)
    resnet(images, policy.detach())
