"""hubconf.py as torch.hub loads it, from programs that have modules of our names as well."""

import copy
import importlib.util
import subprocess
import sys

import pytest
import torch

import models
from deploy.classifier import Classifier
from engine import bases, storage
from engine.storage import ROOT


@pytest.fixture(scope="module")
def hub():
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=generator)


def normalised(name, images):
    config = models.config(name)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    return (images / 255 - mean) / std


def test_every_entry_is_shipped(hub):
    entries = [name for name in dir(hub) if callable(getattr(hub, name)) and name[0] != "_"]
    assert sorted(entries) == sorted(hub._SHIPPED)
    for name, *patterns in hub._SHIPPED.values():
        # by their whole names: a run that goes on leaves another checkpoint beside it
        assert all((ROOT / path).is_file() for path in patterns)
        models.config(name)


@pytest.mark.parametrize("entry", ["R32_C10", "R32_C10_late8", "R110_C10_full", "AIG32_C10"])
def test_an_entry_is_its_checkpoint(entry, images):
    """Against the networks themselves, loaded as the scripts load them."""
    net = torch.hub.load(str(ROOT), entry, pretrained=True, source="local")
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    hub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hub)
    name, pattern = hub._SHIPPED[entry]
    (path,) = ROOT.glob(pattern)
    found = storage.read(path)
    resnet, policy_net = models.build(name)
    bases.load_into(resnet.eval(), found)
    x = normalised(name, images)
    with torch.no_grad():
        if entry == "AIG32_C10":
            expected, policy = resnet(x)
        else:
            policy = torch.ones(len(x), resnet.num_blocks)
            if entry == "R32_C10":
                bases.load_into(policy_net.eval(), found)
                policy = (policy_net(x)[0] >= 0.5).float()
            elif entry == "R32_C10_late8":
                policy[:] = torch.tensor([1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0])
            expected = resnet(x, policy)
    assert not net.training
    torch.testing.assert_close(net.policy(images), policy)
    torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net(images / 255), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("entry", ["R32_C10_anytime", "R110_C10_anytime"])
def test_one_network_serves_every_budget(entry, hub):
    images = torch.rand(64, 3, 32, 32)
    name, *patterns = hub._SHIPPED[entry]
    (path,) = ROOT.glob(patterns[-1])  # of the ResNet, by itself for R110_C10
    resnet, _ = models.build(name)
    bases.load_into(resnet.eval(), storage.read(path))
    kept = []
    for penalty in (-0.5, -5.0, -50.0):
        net = getattr(hub, entry)(penalty=penalty)
        policy = net.policy(images)
        at = net.policy_module
        assert at.penalty == penalty
        with torch.no_grad():
            torch.testing.assert_close(policy, at(net._pixels(images)))
            expected = resnet(net._pixels(images), policy)
        torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-4)
        kept.append(policy.sum().item())
    assert kept == sorted(kept) and kept[0] < kept[-1]


def test_without_pretrained_weights_are_random(hub, images):
    torch.manual_seed(0)
    first, second = hub.R32_C10(pretrained=False), hub.R32_C10(pretrained=False)
    assert not torch.equal(first(images), second(images))
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(first(images), second(images))


PROGRAM = """
import sys, torch
{before}
net = torch.hub.load({root!r}, "R32_C10", source="local")
assert not any({root!r} == entry for entry in sys.path)
images = torch.zeros(2, 3, 32, 32)
assert net(images).shape == (2, 10) and net.policy(images).shape == (2, 15)
again = torch.hub.load({root!r}, "R32_C10", source="local")
assert torch.equal(net(images), again(images))
import utils, models, models.net
assert utils.mine and models.mine and models.net.mine
assert "engine" not in sys.modules
"""


@pytest.mark.parametrize("before", ["import utils, models.net", ""], ids=["before", "after"])
def test_a_program_keeps_its_own_utils_and_models(tmp_path, before):
    for file in ("utils.py", "models/__init__.py", "models/net.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("mine = True\n")
    (tmp_path / "program.py").write_text(PROGRAM.format(root=str(ROOT), before=before))
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_classifier_follows_its_weights(images):
    """Deployed copies are made anew where the weights were changed, moved, or trained."""
    torch.manual_seed(0)
    resnet, policy_net = models.build("R14_C10")
    net = Classifier(resnet, models.GreedyPolicy(policy_net), models.config("R14_C10")).eval()
    before = net(images)
    assert torch.equal(copy.deepcopy(net)(images), before)
    assert net.double()(images).dtype == torch.float64
    torch.testing.assert_close(net(images), before, check_dtype=False, rtol=1e-4, atol=1e-4)
    net.float().train()
    assert net(images).requires_grad
    with torch.no_grad():
        net.resnet.fc.bias += 1
    trained = net.eval()(images)
    anew = Classifier(net.resnet, net.policy_module, models.config("R14_C10")).eval()
    assert not torch.allclose(trained, before, atol=0.1)
    torch.testing.assert_close(trained, anew(images))
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state["resnet.fc.bias"] += 1
    net.load_state_dict(state)
    torch.testing.assert_close(net(images), trained + 1, rtol=1e-4, atol=1e-4)


def test_a_classifier_follows_its_parts(images):
    """Weights that change inside a part, and a penalty that is set anew."""
    torch.manual_seed(0)
    config = models.config("R14_C10")
    resnet, policy_net = models.build("R14_C10")
    head = models.build_confidence(config, policy_net)
    head.candidates.copy_(torch.ones(len(head.candidates), 6).tril())
    head.linear.bias.data.copy_(torch.linspace(0, 1, len(head.candidates)))
    net = Classifier(resnet, models.PenaltyPolicy(policy_net, head, -1e-6), config).eval()
    logits, policy = net(images), net.policy(images)
    net.policy_module.penalty = -1e6
    assert not torch.equal(net.policy(images), policy)
    net.policy_module.penalty = -1e-6
    assert torch.equal(net.policy(images), policy) and torch.equal(net(images), logits)
    other, _ = models.build("R14_C10")
    changes = (
        lambda: resnet.fc.bias.add_(1),
        lambda: resnet.load_state_dict(other.state_dict()),
        lambda: resnet.blocks[0][0].load_state_dict(other.blocks[0][1].state_dict()),
        lambda: resnet.bn1.running_mean.add_(1),
    )
    for change in changes:
        with torch.no_grad():
            change()
        anew = Classifier(resnet, net.policy_module, config).eval()(images)
        assert not torch.allclose(anew, logits)
        logits = net(images)
        torch.testing.assert_close(logits, anew)


def prune_classifier(net):
    torch.nn.utils.prune.l1_unstructured(net.resnet.fc, "weight", 0.9)


def fused_step(net):
    net.resnet.fc.weight.grad = torch.ones_like(net.resnet.fc.weight)
    torch.optim.SGD([net.resnet.fc.weight], lr=1.0, fused=True).step()


def assigned(net):
    net.resnet.fc.load_state_dict(
        {name: 2 * tensor for name, tensor in net.resnet.fc.state_dict().items()}, assign=True
    )


CHANGES = {
    "pruned": prune_classifier,
    "a fused optimizer": fused_step,
    "assigned": assigned,
    "data": lambda net: setattr(net.resnet.fc.weight, "data", 2 * net.resnet.fc.weight.data),
    "shortcuts": lambda net: net.resnet.take_shortcuts("subsample"),
    "pixels of the policy": lambda net: net.policy_module.policy_net.look_at(16),
    "dtype of a part": lambda net: net.resnet.double(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_classifier_follows_what_leaves_no_trace_in_a_tensor(images, change):
    torch.manual_seed(0)
    config = models.config("R14_C10")
    net = Classifier(*decided(*models.build("R14_C10")), config).eval()
    before = net(images), net.policy(images)
    deployed = net._networks()[0]
    assert net._networks()[0] is deployed
    change(net)
    anew = Classifier(net.resnet, net.policy_module, config).eval()
    torch.testing.assert_close(net(images), anew(images))
    assert torch.equal(net.policy(images), anew.policy(images))
    is_same = torch.equal(net(images), before[0]) and torch.equal(net.policy(images), before[1])
    assert not is_same or net._networks()[0] is not deployed


def decided(resnet, policy_net):
    """With a policy that differs between images."""
    with torch.no_grad():
        policy_net.logit.weight.mul_(100)
    return resnet, models.GreedyPolicy(policy_net)


def test_a_classifier_called_functionally_forgets_again(images):
    torch.manual_seed(0)
    net = Classifier(*decided(*models.build("R14_C10")), models.config("R14_C10")).eval()
    zeros = {f"resnet.fc.{n}": torch.zeros_like(t) for n, t in net.resnet.fc.named_parameters()}
    for _ in range(2):  # as the first call, and behind one
        assert torch.func.functional_call(net, zeros, (images,)).abs().max() == 0
        assert net(images).abs().max() > 0


def test_a_classifier_follows_target_rates(images):
    torch.manual_seed(0)
    net = Classifier(models.build("AIG14_C10")[0], None, models.config("AIG14_C10")).eval()
    with torch.no_grad():
        for gate in net.resnet.gates:
            gate.fc2.bias.copy_(torch.tensor([3.0, 0.0]))
    assert net.policy(images).sum() == 0
    net.resnet.set_targets([1.0] * 6)
    assert net.policy(images).all()


@pytest.mark.parametrize("training", [False, True])
def test_a_classifiers_logits_may_go_into_a_network_that_learns(images, training):
    resnet, policy_net = models.build("R14_C10")
    net = Classifier(resnet, models.GreedyPolicy(policy_net), models.config("R14_C10"))
    probe = torch.nn.Linear(10, 2)
    probe(net.train(training)(images)).sum().backward()
    assert probe.weight.grad is not None


def test_other_shapes_are_refused(images):
    resnet, policy_net = models.build("R14_C10")
    policy = models.GreedyPolicy(policy_net)
    net = Classifier(resnet, policy, models.config("R14_C10")).eval()
    with pytest.raises(ValueError, match=r"\(6, 32, 32, 3\), not \(B, 3, H, W\)"):
        net(images.permute(0, 2, 3, 1))


def test_integers_that_are_no_bytes_are_refused(images, hub):
    net = hub.R32_C10()
    for dtype in (torch.int64, torch.int32, torch.bool):
        with pytest.raises(ValueError, match="not uint8 or float in"):
            net(images.to(dtype))


def test_a_classifier_works_in_inference_mode(hub, images):
    expected = hub.R32_C10()(images)
    with torch.inference_mode():
        made_inside = hub.R32_C10()
        torch.testing.assert_close(made_inside(images), expected)
        torch.testing.assert_close(made_inside.double()(images), expected, check_dtype=False,
                                   rtol=1e-4, atol=1e-4)  # fmt: skip


THREADS = """
import sys, threading, torch, models, utils
def load():
    torch.hub.load({root!r}, "R32_C10_full", pretrained=False, source="local", verbose=False)
    loaded.append(1)
for _ in range(5):
    loaded = []
    threads = [threading.Thread(target=load) for _ in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert len(loaded) == 4
assert sys.modules["models"] is models and sys.modules["utils"] is utils
assert models.mine and utils.mine
"""


def test_threads_may_load_at_the_same_time(tmp_path):
    for name in ("utils.py", "models.py"):
        (tmp_path / name).write_text("mine = True\n")
    (tmp_path / "program.py").write_text(THREADS.format(root=str(ROOT)))
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr


def test_loads_share_their_modules():
    """Else each would leave its threads and its hook on optimizers behind."""
    first, second = (
        torch.hub.load(str(ROOT), "R32_C10_full", pretrained=False, source="local", verbose=False)
        for _ in range(2)
    )
    assert type(first.resnet) is type(second.resnet)
    hooks = sys.modules["torch.optim.optimizer"]._global_optimizer_post_hooks
    before = len(hooks)
    torch.hub.load(str(ROOT), "R32_C10_full", pretrained=False, source="local", verbose=False)
    assert len(hooks) == before


def test_the_first_call_is_counted():
    script = f"""
import torch
from torch.utils.flop_counter import FlopCounterMode
net = torch.hub.load({str(ROOT)!r}, "R32_C10_full", source="local", verbose=False)
with FlopCounterMode(display=False) as counter, torch.no_grad():
    net(torch.zeros(1, 3, 32, 32))
print(counter.get_total_flops())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert f"{int(done.stdout):.2E}" == "1.38E+08"


def test_a_classifier_sees_hooks_that_come_later(hub, images):
    net = hub.R32_C10_full(pretrained=False)
    net(images)
    hook = net.resnet.blocks[0][0].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="leaves out the forward hooks of a BasicBlock"):
        net(images)
    net(images)
    hook.remove()
    net(images)


def test_pixels_are_normalised_as_widely_as_the_weights(hub, images):
    net = hub.R32_C10_full().double()
    mean, std = net.mean.double(), net.std.double()
    with torch.no_grad():
        expected = net.resnet((images.double() / 255 - mean) / std)
    torch.testing.assert_close(net(images), expected, rtol=0, atol=1e-12)
