"""Networks that users changed: their copies for inference come out right, or are refused."""

from types import SimpleNamespace

import pytest
import torch
from test_deployment import random_norms
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import engine
import models
from deploy import onnx_graph
from deploy.onnx_files import Margins, session
from engine.trained import TrainedModel
from models.resnet import BasicBlock

CONFIG = models.config("R14_C10")
ONES = torch.ones(6)
NO_CLASSIFIER_BIAS = nn.Linear(64, 10, bias=False)


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


class TwiceConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class TwiceNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class TwiceBlock(BasicBlock):
    def forward(self, x):
        return 2 * super().forward(x)


class TwiceHead(models.resnet.CifarResNet):
    def head(self, x):
        return 2 * super().head(x)


class Opposite(models.GreedyPolicy):
    def forward(self, x):
        return 1 - super().forward(x)


def replaced(resnet, name, layer):
    setattr(resnet.blocks[1][1], name, layer)


def a_conv(**options):
    return nn.Conv2d(32, 32, **{"kernel_size": 3, "padding": 1} | options)


def loaded_weight_norm(resnet):
    """A weight whose parts were loaded after it was last made of them."""
    layer = nn.utils.weight_norm(resnet.blocks[1][1].conv1)
    layer.load_state_dict({n: 3 * tensor for n, tensor in layer.state_dict().items()})


def double(module, inputs, output):
    return 2 * output


def of_class(module, kind):
    module.__class__ = kind


RIGHT = {
    "pruned": lambda net: prune.l1_unstructured(net.blocks[1][1].conv1, "weight", 0.5),
    "parametrized": lambda net: parametrize.register_parametrization(
        net.blocks[1][1].conv1, "weight", Twice()
    ),
    "parametrized norm": lambda net: parametrize.register_parametrization(
        net.blocks[1][1].bn1, "weight", Twice()
    ),
    "weight norm": lambda net: parametrizations.weight_norm(net.blocks[0][0].conv2),
    "older weight norm": loaded_weight_norm,
    "no weights of the norm": lambda net: replaced(net, "bn1", nn.BatchNorm2d(32, affine=False)),
    "bias": lambda net: replaced(net, "conv2", a_conv()),
    "1x1": lambda net: replaced(net, "conv2", a_conv(kernel_size=1, padding=0)),
    "no bias of the classifier": lambda net: setattr(net, "fc", NO_CLASSIFIER_BIAS),
    "training mode": lambda net: net.train(),
}
REFUSED = {
    "TwiceConv.forward": lambda net: replaced(net, "conv1", TwiceConv(32, 32, 3, padding=1)),
    "TwiceNorm.forward": lambda net: replaced(net, "bn2", TwiceNorm(32)),
    "TwiceBlock.forward": lambda net: of_class(net.blocks[0][1], TwiceBlock),
    "TwiceHead.head": lambda net: of_class(net, TwiceHead),
    "Linear.forward": lambda net: setattr(net.fc, "forward", net.fc.forward),
    "GroupNorm.forward": lambda net: replaced(net, "bn1", nn.GroupNorm(4, 32)),
    "dilation": lambda net: replaced(net, "conv1", a_conv(dilation=2, padding=2)),
    "groups": lambda net: replaced(net, "conv1", a_conv(groups=4)),
    "padding_mode='circular'": lambda net: replaced(net, "conv1", a_conv(padding_mode="circular")),
    "padding='same'": lambda net: replaced(net, "conv1", a_conv(padding="same")),
    "running statistics": lambda net: replaced(
        net, "bn1", nn.BatchNorm2d(32, track_running_stats=False)
    ),
    "blocks of Identity": lambda net: net.blocks[0].__setitem__(1, nn.Identity()),
}


def changed(change):
    resnet = random_norms(models.build("R14_C10")[0]).float().eval()
    change(resnet)
    return resnet


@pytest.mark.parametrize("change", RIGHT.values(), ids=RIGHT)
def test_what_can_be_read_comes_out_right(change):
    resnet = changed(change)
    policy = torch.tensor([1.0, 0, 1, 1, 0, 1])
    picture = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    x = (picture / 255).permute(0, 3, 1, 2)
    # before the ResNet runs, which makes pruned and normed weights anew
    fast, _ = models.deploy(resnet)
    file = onnx_graph.build(resnet, models.StaticPolicy(policy), CONFIG)
    with torch.no_grad():
        expected = resnet.eval()(x, policy[None])
    assert (fast(x, policy[None]) - expected).abs().max() < 1e-5 * expected.abs().max()
    logits = torch.from_numpy(
        session(file.SerializeToString()).run(["logits"], {"image": picture.numpy()})[0]
    )
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("why", REFUSED)
def test_what_would_be_left_out_is_refused(why):
    resnet = changed(REFUSED[why])
    with pytest.raises(ValueError, match=why):
        models.deploy(resnet)
    with pytest.raises(ValueError, match=why):
        onnx_graph.build(resnet, models.StaticPolicy(ONES), CONFIG)


@pytest.mark.parametrize("where", ["BasicBlock", "CifarResNet", "Conv2d"])
def test_hooks_stay_behind_with_a_warning(where):
    resnet = changed(lambda net: None)
    module = next(m for m in resnet.modules() if type(m).__name__ == where)
    module.register_forward_hook(double)
    module.register_forward_pre_hook(lambda module, inputs: None)
    for make in (
        models.deploy,
        lambda net: onnx_graph.build(net, models.StaticPolicy(ONES), CONFIG),
    ):
        with pytest.warns(UserWarning, match=f"leaves out the forward hooks of a {where}"):
            make(resnet)


def test_to_read_a_network_changes_nothing():
    resnet = changed(lambda net: parametrizations.spectral_norm(net.blocks[1][1].conv1)).train()
    resnet.bn1.eval()
    before = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    modes = [module.training for module in resnet.modules()]
    fast, _ = models.deploy(resnet)
    onnx_graph.build(resnet, models.StaticPolicy(ONES), CONFIG)
    assert all(torch.equal(tensor, before[n]) for n, tensor in resnet.state_dict().items())
    assert [module.training for module in resnet.modules()] == modes
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), resnet.eval()(x), rtol=1e-4, atol=1e-4)


def test_a_frozen_norm_is_read():
    from torchvision.ops import FrozenBatchNorm2d

    def freeze(net):
        frozen = FrozenBatchNorm2d(32)
        frozen.load_state_dict(net.blocks[1][1].bn1.state_dict(), strict=False)
        replaced(net, "bn1", frozen)

    resnet, x = changed(freeze), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = resnet(x)
        torch.testing.assert_close(models.deploy(resnet)[0](x), expected, rtol=1e-4, atol=1e-4)


def test_a_policy_that_decides_otherwise_is_refused():
    resnet, policy_net = models.build("R14_C10")
    for make in (models.deploy, lambda *both: onnx_graph.build(*both, CONFIG)):
        with pytest.raises(ValueError, match="does not know Opposite.forward"):
            make(resnet, Opposite(policy_net))


def test_a_file_has_no_form_of_another_pooling():
    resnet, _ = models.build("R14_C10")
    resnet.stem_pool = nn.Sequential(nn.AvgPool2d(3, 1, 1))
    with pytest.raises(
        ValueError, match=r"^no ONNX form of Sequential\( \(0\): AvgPool2d.* is known$"
    ):
        onnx_graph.build(resnet, models.StaticPolicy(ONES), CONFIG)
    fast, _ = models.deploy(resnet.eval())
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), resnet(x))


def test_margins_leave_no_hooks():
    net, _ = models.build("AIG14_C10")
    with Margins(net.eval(), None) as margins:
        net(torch.rand(3, 3, 32, 32))
    assert margins.nearest(3).shape == (3,)
    assert not any(module._forward_hooks for module in net.modules())


def test_a_frozen_resnet_that_deploy_does_not_know_runs_itself():
    torch.manual_seed(0)
    resnet = models.build("R8_C10")[0].eval()
    policy, images = torch.tensor([[1.0, 0, 1], [0, 1, 1]]), torch.randn(2, 3, 32, 32)
    told = []
    run = SimpleNamespace(args=SimpleNamespace(precision="fp32"), note=told.append)
    fast = engine.Run.frozen(run, resnet)
    assert fast is not resnet and not told
    torch.testing.assert_close(fast(images, policy), resnet(images, policy), rtol=1e-4, atol=1e-4)
    resnet.blocks[1][0].__class__ = TwiceBlock
    assert engine.Run.frozen(run, resnet) is resnet
    (text,) = told
    assert "deploy does not know TwiceBlock.forward: the ResNet itself runs" in text
    trained = SimpleNamespace(resnet=resnet, policy=None, args=run.args)
    with pytest.raises(engine.UserError, match="deploy does not know TwiceBlock.forward"):
        TrainedModel.deployed(trained)
