"""Weights of other codes, and checkpoints of the released one, load; anything else is named."""

import collections
import copy
import io
import json
import pickle
import re
import struct
from argparse import ArgumentTypeError

import numpy as np
import pytest
import torch
from conftest import TINY
from torch import nn

import engine
import models
from engine import bases


def images():
    torch.manual_seed(3)
    return torch.randn(2, 3, 32, 32)


def same_output(a, b):
    x = images()
    return torch.equal(a.eval()(x), b.eval()(x))


def without_counters(state):
    return {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}


def test_felixgwu_layout_loads():
    source, target = models.build(TINY)[0], models.build(TINY)[0]
    theirs = {}
    for name, tensor in without_counters(source.state_dict()).items():
        if name.startswith("blocks."):
            _, stage, rest = name.split(".", 2)
            name = f"layer{int(stage) + 1}.{rest}"
        theirs[f"module.{name}"] = tensor
    models.load_resnet(target, theirs)
    assert same_output(source, target)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: s.pop("blocks.1.0.conv1.weight"), "lacks the tensor blocks.1.0.conv1.weight"),
        (lambda s: s.update(surplus=torch.zeros(1)), "has the tensor surplus"),
        (lambda s: s.update({"fc.bias": torch.zeros(7)}), r"fc.bias has shape \(7,\), not \(10,\)"),
        (lambda s: s.update({"fc.bias": "text"}), "fc.bias is no tensor"),
    ],
)
def test_loading_is_strict_and_names_the_tensor(spoil, message):
    resnet, _ = models.build(TINY)
    state = resnet.state_dict()
    spoil(state)
    before = resnet.fc.weight.clone()
    with pytest.raises(ValueError, match=message):
        models.load_resnet(resnet, state)
    assert torch.equal(resnet.fc.weight, before)


class Python2Pickler(pickle._Pickler):
    """Pickles as Python 2.7 with torch 0.3: byte strings, `_rebuild_tensor`, old OrderedDict."""

    dispatch = dict(pickle._Pickler.dispatch)

    def __init__(self, file, storages):
        super().__init__(file, protocol=2)
        self.storages = storages

    def save_byte_string(self, text):
        raw = text.encode()
        self.write(pickle.SHORT_BINSTRING + bytes([len(raw)]) + raw)
        self.memoize(text)

    dispatch[str] = save_byte_string

    def persistent_id(self, value):
        if not isinstance(value, torch.UntypedStorage):
            return None
        key = str(94000000 + value.data_ptr())
        self.storages[key] = value
        return ("storage", torch.FloatStorage, key, "cuda:0", value.nbytes() // 4, None)

    def reducer_override(self, value):
        if isinstance(value, torch.Tensor):
            rebuild = (value.untyped_storage(), value.storage_offset(), value.shape, value.stride())
            return torch._utils._rebuild_tensor, (*rebuild[:2], tuple(rebuild[2]), rebuild[3])
        if isinstance(value, collections.OrderedDict):
            return collections.OrderedDict, ([[k, v] for k, v in value.items()],)
        return NotImplemented


def save_as_torch_0_3(content, path):
    """The format before zip files: magic number, version, system, pickle, keys, raw storages."""
    with open(path, "wb") as file:
        for header in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            file.write(pickle.dumps(header, protocol=2))
        body, storages = io.BytesIO(), {}
        Python2Pickler(body, storages).dump(content)
        file.write(body.getvalue())
        file.write(pickle.dumps(sorted(storages), protocol=2))
        for key in sorted(storages):
            storage = storages[key]
            file.write(struct.pack("<q", storage.nbytes() // 4))
            file.write(bytes(storage))


def old_state(module, prefix="module."):
    state = without_counters(module.state_dict())
    return collections.OrderedDict((prefix + n, t.clone().contiguous()) for n, t in state.items())


@pytest.mark.parametrize("key", ["agent", "net"])
def test_released_stage_1_checkpoint_loads(tmp_path, key, run, cifar_dir, base_file):
    _, source = models.build(TINY)
    state = old_state(source)
    state["module.features.fc.weight"] = torch.zeros(10, 64)
    state["module.features.fc.bias"] = torch.zeros(10)
    path = tmp_path / "ckpt_E_730_A_0.754_R_1.10E-01_S_20.10_#_7787.t7"
    save_as_torch_0_3({key: state, "epoch": 730, "reward": 0.11, "acc": 0.754}, path)
    found = engine.storage.read(path)
    assert (found.epoch, found.stage, found.resnet) == (730, 1, None)
    _, target = models.build(TINY)
    found.load_into(target)
    assert torch.equal(source.eval()(images())[0], target.eval()(images())[0])
    status, out, err = run(
        "test", "--model", TINY, "--load", path, "--base", base_file,
        "--data_dir", cifar_dir, "--skip_data_check",
    )  # fmt: skip
    assert status == 0 and "Block Usage" in out, err


def test_released_stage_2_checkpoint_loads(tmp_path, run, cifar_dir):
    resnet, policy_net = models.build(TINY)
    path = tmp_path / "ckpt_E_2000.t7"
    content = {"agent": old_state(policy_net, ""), "resnet": old_state(resnet), "epoch": 2000}
    save_as_torch_0_3(content, path)
    found = engine.storage.read(path)
    target, _ = models.build(TINY)
    assert found.stage == 2
    found.load_into(target)
    assert same_output(resnet, target)
    status, out, err = run(
        "test", "--model", TINY, "--load", path, "--data_dir", cifar_dir, "--skip_data_check"
    )
    assert status == 0 and "Unique Policies" in out, err


def test_an_imagenet_policy_network_starts_from_resnet_18():
    import torchvision

    torch.manual_seed(0)
    published = torchvision.models.resnet18().state_dict()
    _, policy_net = models.build("R50_ImgNet")
    fitted = models.load_fitting(policy_net.features, published)
    assert fitted == len(list(policy_net.features.parameters()))
    features = policy_net.features
    assert torch.equal(features.blocks[2][0].conv2.weight, published["layer3.0.conv2.weight"])
    assert torch.equal(features.ds[1][0].weight, published["layer2.0.downsample.0.weight"])
    assert models.load_fitting(models.build("R32_C10")[1].features, published) == 0


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("depth", [18, 101])
def test_a_converted_network_is_torchvisions(depth, dtype, tolerance):
    import torchvision

    torch.manual_seed(0)
    theirs = torchvision.models.get_model(f"resnet{depth}").to(dtype)
    x = torch.randn(2, 3, 64, 64, dtype=dtype)
    theirs(x)  # statistics that are not those of initialisation
    theirs.eval()
    ours = models.build(f"R{depth}_ImgNet")[0].to(dtype)
    models.load_resnet(ours, theirs.state_dict())
    ours.eval()
    with torch.no_grad():
        expected = theirs(x)
        scale = expected.abs().max()
        for policy in (None, torch.ones(2, ours.num_blocks)):
            assert (ours(x, policy) - expected).abs().max() <= tolerance * scale


@pytest.mark.parametrize("small, large", [("R8_C10", TINY), ("R18_ImgNet", "R34_ImgNet")])
def test_a_deeper_resnet_begins_as_the_shallower_one(small, large):
    torch.manual_seed(0)
    source, target = (models.build(name)[0].double().eval() for name in (small, large))
    for norm in (m for m in source.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_(), norm.weight.data.uniform_(0.5, 1.5)
    assert models.load_grown(target, source.state_dict()) == source.num_blocks
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    assert torch.equal(source(x), target(x))
    both = zip(source.stages, target.stages, strict=True)
    first = [float(i < n) for n, depth in both for i in range(depth)]
    policy = torch.tensor(first).expand(3, -1)
    assert torch.equal(source(x), target(x, policy))
    target(x).square().sum().backward()  # what adds nothing can learn to
    assert all(blocks[-1].bn2.weight.grad.any() for blocks in target.blocks)
    assert models.load_grown(source, source.state_dict()) == source.num_blocks
    for wrong, message in (
        ({n: t for n, t in source.state_dict().items() if "blocks.1.0." not in n}, "lacks"),
        (target.state_dict(), "which the network does not"),
    ):
        with pytest.raises(ValueError, match=message):
            models.load_grown(source, wrong)


def test_pretrain_starts_from_a_shallower_resnet(run, cifar_dir, tmp_path):
    options = ["--data_dir", cifar_dir, "--skip_data_check", "--max_epochs", 1, "--batch_size", 40]
    for model, start in (("R8_C10", []), (TINY, ["--pretrained", tmp_path / "R8_C10"])):
        command = ["pretrain", "--model", model, *options, "--cv_dir", tmp_path / model, *start]
        status, _, err = run(*command)
        assert status == 0, err
    assert "3 of 6 blocks, the others add nothing yet" in err
    status, _, err = run(*command[:-4], "--cv_dir", tmp_path / "x", "--pretrained", tmp_path / TINY)
    assert status == 0 and "add nothing" not in err


def test_weights_for_pixels_that_are_normalised_in_another_way(tmp_path):
    """The same answers but for the border, where zeros stand for another colour."""
    torch.manual_seed(0)
    ours, theirs = models.config("R32_C10"), models.config("R14_C10")
    assert ours.mean != theirs.mean
    source, _ = models.build("R14_C10")
    with torch.no_grad():
        source.bn1.running_mean.normal_(), source.bn1.running_var.uniform_(0.5, 2)
    source.double().eval()
    content = {"state_dict": source.state_dict(), "model": "R14_C10"}
    target = copy.deepcopy(source)
    models.load_resnet(target, bases.for_pixels(ours, models.Checkpoint.of(content, "a.t7")).resnet)
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (ours.mean, ours.std))

    def stem(resnet, x):
        return resnet.bn1(resnet.conv1(x))[:, :, 1:-1, 1:-1]

    with torch.no_grad():
        expected, found = stem(source, images), stem(target, (images - mean) / std)
        assert (stem(source, (images - mean) / std) - expected).abs().max() > 0.1
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    same = bases.for_pixels(theirs, models.Checkpoint.of(content, "a.t7")).resnet
    assert all(torch.equal(same[n], t) for n, t in source.state_dict().items())
    for name in ("conv1.weight", "bn1.running_mean"):
        state = {n: t for n, t in source.state_dict().items() if n != name}
        with pytest.raises(engine.UserError, match="b.t7"):
            bases.for_pixels(ours, models.Checkpoint.of(content | {"state_dict": state}, "b.t7"))


class Subsampling(nn.Module):
    """A CIFAR ResNet as a widely used code has it: another shape-changing shortcut, and names."""

    def __init__(self, depth=2):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        before = 16
        for stage, width in enumerate((16, 32, 64), 1):
            blocks = []
            for _ in range(depth):
                block = nn.Module()
                block.conv1 = nn.Conv2d(before, width, 3, width // before, 1, bias=False)
                block.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
                block.bn1, block.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
                blocks.append(block)
                before = width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x, policy=None):
        x = self.bn1(self.conv1(x)).relu()
        blocks = [block for layer in (self.layer1, self.layer2, self.layer3) for block in layer]
        for k, block in enumerate(blocks):
            shortcut = x
            if block.conv1.stride == (2, 2):
                rows = x[:, :, range(0, x.shape[2], 2)][..., range(0, x.shape[3], 2)]
                zeros = torch.zeros_like(rows[:, : rows.shape[1] // 2])
                shortcut = torch.cat([zeros, rows, zeros], 1)
            branch = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
            kept = (branch + shortcut).relu()
            if policy is None:
                x = kept
            else:
                x = torch.where(policy[:, k, None, None, None].bool(), kept, shortcut)
        return self.linear(x.mean((2, 3)))


@pytest.fixture
def subsampling():
    torch.manual_seed(0)
    network = Subsampling()
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.2), norm.weight.data.uniform_(0.5, 1.5)
    return network.eval()


def foreign(network, **more):
    """As its code writes it: wrapped, without BatchNorm's counters."""
    state = {f"module.{n}": t for n, t in without_counters(network.state_dict()).items()}
    return {"state_dict": state, "best_prec1": 92.63, **more}


def test_a_base_of_other_shortcuts_computes_what_it_did(subsampling, tmp_path):
    config = models.config(TINY)
    torch.save(foreign(subsampling, normalisation=config.normalisation), tmp_path / "x.th")
    found = engine.storage.read(tmp_path / "x.th")
    resnet, _ = models.build(TINY)
    found.load_into(resnet)
    subsampling.double(), resnet.double().eval()
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    policy = (torch.rand(5, 6) < 0.5).float()
    fast, _ = models.deploy(resnet, dtype=torch.float64)
    for given in (None, policy, torch.zeros(5, 6), torch.ones(5, 6)):
        expected = subsampling(x, given)
        for network in (resnet, fast):
            torch.testing.assert_close(network(x, given), expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(models.build(TINY)[0].double()(x), expected)


def test_other_shortcuts_go_from_stage_to_stage(subsampling, tmp_path, run, cifar_dir):
    """Through training, evaluation and export."""
    onnx = pytest.importorskip("onnxruntime")
    torch.save(foreign(subsampling), tmp_path / "x.th")
    common = ["--model", TINY, "--data_dir", cifar_dir, "--skip_data_check", "--batch_size", 40]
    base = ["--base", tmp_path / "x.th"]
    once = ["--max_epochs", 1, "--cv_dir"]
    steps = (
        ("cl_training", [*base, *once, tmp_path / "1"]),
        ("finetune", [*base, *once, tmp_path / "2", "--pretrained", tmp_path / "1"]),
        ("test", ["--load", tmp_path / "2", "--json", tmp_path / "2.json"]),
        ("pretrain", ["--pretrained", tmp_path / "x.th", *once, tmp_path / "0"]),
        ("export", ["--load", tmp_path / "2", "--out", tmp_path / "2.onnx"]),
        ("export", [*base, "--out", tmp_path / "x.onnx"]),
    )
    for script, options in steps:
        status, _, err = run(script, *common, *options)
        assert status == 0, err
    for folder in ("2", "0"):
        found = engine.storage.read(tmp_path / folder)
        assert found.shortcuts == "subsample"
        resnet, _ = models.build(TINY)
        found.load_into(resnet)
        assert resnet.shortcuts == "subsample"
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    logits = onnx.InferenceSession(tmp_path / "x.onnx").run(["logits"], {"image": images})[0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in models.config("R50_ImgNet").normalisation)
    pixels = (torch.tensor(images).permute(0, 3, 1, 2) / 255 - mean) / std
    inside = Subsampling.forward(subsampling, pixels)  # but for the border of zeros
    assert (torch.tensor(logits) - inside).abs().max() < 0.5 * inside.abs().max()


def test_the_same_weights_with_other_shortcuts_are_another_base():
    resnet, _ = models.build(TINY)
    before = bases.fingerprint(resnet)
    resnet.take_shortcuts("subsample")
    assert bases.fingerprint(resnet) != before
    resnet.take_shortcuts("pool")
    assert bases.fingerprint(resnet) == before
    with pytest.raises(ValueError, match="'maxpool': only pool and subsample"):
        resnet.take_shortcuts("maxpool")


WRAPPERS = {
    "data parallel": lambda s: {"state_dict": {f"module.{n}": t for n, t in s.items()}},
    "torch.compile": lambda s: {"state_dict": {f"_orig_mod.{n}": t for n, t in s.items()}},
    "both": lambda s: {"model": {f"module._orig_mod.{n}": t for n, t in s.items()}},
    "net": lambda s: {"net": s, "acc": 92.1, "epoch": 3},
    "lightning": lambda s: {"state_dict": {f"model.{n}": t for n, t in s.items()} | {
        "loss.weight": torch.ones(10)}},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}},
    "a name of its own": lambda s: {"model_ema": s, "scaler": {"scale": 1.0}},
    "deeper": lambda s: {"checkpoint": {"weights": s}, "step": 7},
    "moco": lambda s: {"state_dict": {f"module.encoder_q.{n}": t for n, t in s.items()} | {
        f"module.encoder_k.{n}": t + 1 for n, t in s.items()} | {"module.queue": torch.ones(3)}},
    "a backbone and a classifier": lambda s: {
        n if n.startswith("fc.") else f"backbone.{n}": t for n, t in s.items()},
    "linear": lambda s: {n.replace("fc.", "linear."): t for n, t in s.items()},
    "bare": dict,
}  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_found_by_what_is_in_them(wrapper, tmp_path):
    torch.manual_seed(1)
    source, target = models.build(TINY)[0], models.build(TINY)[0]
    torch.save(WRAPPERS[wrapper](source.state_dict()), tmp_path / "x.pt")
    bases.read_for(models.config(TINY), tmp_path / "x.pt").load_into(target)
    assert same_output(source, target)


def test_shortcuts_of_another_kind_are_said_to_be_that(tmp_path):
    gated, _ = models.build("AIG14_C10")
    state = gated.resnet.state_dict()
    theirs = {re.sub(r"^ds\.(\d)\.", lambda m: f"layer{int(m[1]) + 1}.0.downsample.", n): t
              for n, t in state.items()}  # fmt: skip
    theirs = {re.sub(r"^blocks\.(\d)\.", lambda m: f"layer{int(m[1]) + 1}.", n): t
              for n, t in theirs.items()}  # fmt: skip
    for content in (state, theirs, {"model": theirs}):
        torch.save(dict(content), tmp_path / "x.th")
        found = engine.storage.read(tmp_path / "x.th")
        with pytest.raises(ValueError, match="x.th: its shortcuts are 1x1.*aig_training.py"):
            found.load_into(models.build(TINY)[0])
        again, _ = models.build("AIG14_C10")
        models.load_ungated(again, found.resnet)
        assert torch.equal(again.resnet.ds[1][0].weight, gated.resnet.ds[1][0].weight)


def test_a_missing_name_is_shown_beside_one_that_is_there():
    resnet, _ = models.build(TINY)
    state = {n.replace("bn1", "norm1"): t for n, t in resnet.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"lacks 28 tensors.*0.bn1.weight, and has .*0.norm1.weight"
    ):
        models.load_resnet(resnet, state)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value, base_file, run, common, tmp_path):
    content = engine.storage.content(base_file)
    for name in ("blocks.1.0.conv2.weight", "bn1.running_var", "fc.bias"):
        spoilt = {n: t.clone() for n, t in content["state_dict"].items()}
        spoilt[name].view(-1)[3] = value
        engine.storage.write({"state_dict": spoilt}, tmp_path / "x.t7")
        options = ("--base", tmp_path / "x.t7", "--max_epochs", 1, "--cv_dir", tmp_path / "run")
        for script in ("test", "cl_training"):
            given = options[:2] if script == "test" else options
            status, _, err = run(script, *common, *given)
            assert status == 2 and f"x.t7: {name} is not finite" in err


def test_the_pixels_of_a_foreign_base_are_told_by_an_option(tmp_path):
    torch.manual_seed(0)
    config = models.config(TINY)
    resnet, _ = models.build(TINY)
    torch.save(resnet.state_dict(), tmp_path / "x.pth")
    given = [[0.5, 0.4, 0.3], [0.2, 0.3, 0.25]]
    assert engine.options.normalisation("0.5,0.4,0.3/0.2,0.3,0.25") == given
    target = models.build(TINY)[0].double()
    bases.load_base(config, str(tmp_path / "x.pth"), target, given)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in given)
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    resnet.double().eval(), target.eval()

    def stem(network, x):
        return network.bn1(network.conv1(x))[:, :, 1:-1, 1:-1]

    expected = stem(resnet, (images - mean) / std)
    torch.testing.assert_close(stem(target, images), expected, rtol=1e-5, atol=1e-6)
    wrongs = "cifar 1,2,3 0.5,0.5,0.5/0,1,1 0.5,0.5/0.5,0.5 2,0,0/1,1,1 a,b,c/1,1,1".split()
    for wrong in wrongs:
        with pytest.raises(ArgumentTypeError, match="is not imagenet, none or R,G,B/R,G,B"):
            engine.options.normalisation(wrong)


def test_of_a_network_and_its_follower_the_network_is_taken(tmp_path):
    """In whatever order they stand: safetensors sorts names."""
    from safetensors.torch import save_file

    torch.manual_seed(1)
    source, other = models.build(TINY)[0], models.build(TINY)[0]
    for first, second in (("module.encoder_q", "module.encoder_k"), ("model", "ema"),
                          ("student.net", "teacher")):  # fmt: skip
        state = {f"{second}.{n}": t.clone() for n, t in other.state_dict().items()}
        state |= {f"{first}.{n}": t.clone() for n, t in source.state_dict().items()}
        save_file(state, tmp_path / "x.safetensors")
        target, _ = models.build(TINY)
        bases.read_for(models.config(TINY), tmp_path / "x.safetensors").load_into(target)
        assert same_output(source, target)


def test_pixels_are_told_of_a_resnet_under_load_as_well(tmp_path, run, common):
    torch.manual_seed(0)
    torch.save(models.build(TINY)[0].state_dict(), tmp_path / "x.pth")
    figures = []
    for option in ("--base", "--load"):
        path = tmp_path / f"{option}.json"
        given = [option, tmp_path / "x.pth", "--base_pixels", "imagenet", "--json", path]
        assert run("test", *common, *given)[0] == 0
        figures.append(json.loads(path.read_text()))
    for name in ("accuracy", "flops"):
        assert figures[0][name] == figures[1][name]
    plain = tmp_path / "plain.json"
    assert run("test", *common, "--load", tmp_path / "x.pth", "--json", plain)[0] == 0


def test_sparse_weights_are_named(tmp_path, run, common):
    state = dict(models.build(TINY)[0].state_dict())
    state["blocks.1.0.conv2.weight"] = state["blocks.1.0.conv2.weight"].to_sparse()
    torch.save(state, tmp_path / "x.pth")
    status, _, err = run("test", *common, "--base", tmp_path / "x.pth")
    assert status == 2 and "blocks.1.0.conv2.weight is sparse: save it as .to_dense()" in err


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_pixels_are_converted_in_float32_at_least(dtype):
    state = {n: t.to(dtype) for n, t in models.build(TINY)[0].state_dict().items()}
    told = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25)), ((0.0,) * 3, (1.0,) * 3)
    found = models.for_pixels(state, *told)
    expected = models.for_pixels({n: t.double() for n, t in state.items()}, *told)
    for name in ("conv1.weight", "bn1.running_mean"):
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-5)


def test_a_name_may_stand_where_this_code_has_a_network(tmp_path):
    source, target = models.build(TINY)[0], models.build(TINY)[0]
    content = {"state_dict": source.state_dict(), "net": "resnet14", "acc": 92.9}
    torch.save(content, tmp_path / "x.pth")
    bases.read_for(models.config(TINY), tmp_path / "x.pth").load_into(target)
    assert same_output(source, target)


def in_transformers(name):
    """A tensor's name in Hugging Face's ResNetForImageClassification, from torchvision's."""
    name = re.sub(r"^fc\.", "classifier.1.", name)
    parts = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}
    name = re.sub(r"^(conv|bn)1\.", lambda m: f"embedder.embedder.{parts[m[1]]}.", name)

    def in_a_block(match):
        stage, block, kind, number, shortcut = match.groups()
        place = "shortcut" if shortcut else f"layer.{int(number or 0) - 1}"
        stage = f"encoder.stages.{int(stage) - 1}.layers.{block}"
        return f"{stage}.{place}.{parts[kind or shortcut]}."

    name = re.sub(r"^layer(\d)\.(\d)\.(?:(conv|bn)(\d)|downsample\.(\d))\.", in_a_block, name)
    return name if name.startswith("classifier.") else f"resnet.{name}"


@pytest.mark.parametrize("depth", [18, 50])
def test_weights_of_transformers(depth, tmp_path):
    import torchvision

    published = torchvision.models.get_model(f"resnet{depth}").state_dict()
    theirs = {in_transformers(name): tensor for name, tensor in published.items()}
    # as its own files have them
    assert {
        "resnet.embedder.embedder.normalization.running_mean",
        "resnet.encoder.stages.1.layers.0.shortcut.convolution.weight",
        "resnet.encoder.stages.3.layers.1.layer.1.normalization.bias",
        "classifier.1.weight",
    } <= set(theirs)
    expected, _ = models.build(f"R{depth}_ImgNet")
    models.load_resnet(expected, published)
    for prefix in ("", "module.", "model._orig_mod."):
        torch.save({f"{prefix}{n}": t for n, t in theirs.items()}, tmp_path / "x.pt")
        resnet, _ = models.build(f"R{depth}_ImgNet")
        found = models.Checkpoint.read(tmp_path / "x.pt")
        found.load_into(resnet)
        assert found.num_blocks == resnet.num_blocks
        own = resnet.state_dict()
        assert all(torch.equal(tensor, own[name]) for name, tensor in expected.state_dict().items())


FOLLOWERS = ("momentum_backbone.", "backbone_momentum.", "backbone_ema.", "swa_model.module.",
             "averaged_model.", "target_network.", "module.encoder_k.", "teacher.net.")  # fmt: skip


@pytest.mark.parametrize("copy", FOLLOWERS)
def test_what_follows_a_network_is_not_taken(copy, tmp_path):
    state = models.build(TINY)[0].state_dict()
    both = {f"net_that_learns.{name}": tensor for name, tensor in state.items()}
    torch.save(both | {f"{copy}{n}": t + 1 for n, t in state.items()}, tmp_path / "x.pt")
    target, _ = models.build(TINY)
    models.Checkpoint.read(tmp_path / "x.pt").load_into(target)
    assert torch.equal(target.conv1.weight, state["conv1.weight"])


def test_a_classifier_beside_its_backbone_behind_a_prefix(tmp_path):
    state = models.build(TINY)[0].state_dict()
    content = {f"module.{n}" if n.startswith("fc.") else f"module.backbone.{n}": t
               for n, t in state.items()}  # fmt: skip
    torch.save(content, tmp_path / "x.pt")
    target, _ = models.build(TINY)
    models.Checkpoint.read(tmp_path / "x.pt").load_into(target)
    assert torch.equal(target.fc.weight, state["fc.weight"])


@pytest.mark.parametrize("prefix", ["backbone.", "head."])
def test_of_several_resnets_none_is_taken(prefix, tmp_path):
    state = models.build(TINY)[0].state_dict()
    both = {f"{p}{name}": tensor for p in ("aux.", prefix) for name, tensor in state.items()}
    for content in (both, {"state_dict": both}):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=f"x.pt: holds several ResNets, under .*{prefix}"):
            models.Checkpoint.read(tmp_path / "x.pt")
    # what has a convolution of that name and is no ResNet does no harm
    both = {n: t for n, t in both.items() if not n.startswith("aux.")}
    torch.save(both | {"aux.conv1.weight": torch.ones(3)}, tmp_path / "x.pt")
    found = models.Checkpoint.read(tmp_path / "x.pt").resnet
    assert torch.equal(models.our_names(found)["conv1.weight"], state["conv1.weight"])


def test_gates_are_loaded_with_their_targets(tmp_path):
    net, _ = models.build("AIG14_C10")
    content = {"state_dict": net.state_dict(), "targets": [1.0, 0.5, 1.0, 0.5, 0.5, 0.5]}
    torch.save(content, tmp_path / "x.pt")
    other, _ = models.build("AIG14_C10")
    models.Checkpoint.read(tmp_path / "x.pt").load_into(other)
    assert other.always_on == {0, 2}


class Squeezed(models.resnet.BasicBlock):
    """A block with GroupNorm, a squeeze and a name that other codes have elsewhere."""

    def __init__(self, *shape):
        super().__init__(*shape)
        channels = self.conv2.out_channels
        self.bn1, self.bn2 = nn.GroupNorm(4, channels), nn.GroupNorm(4, channels)
        self.linear = nn.Linear(channels, channels)

    def forward(self, x):
        out = super().forward(x)
        return out * self.linear(out.mean((2, 3))).sigmoid()[:, :, None, None]


def own_resnet(stages):
    """A base of a user's own, whose stem has another name."""
    resnet = models.CifarResNet(stages, 10)
    for blocks in resnet.blocks:
        for i, block in enumerate(blocks):
            channels = block.conv1.in_channels, block.conv1.out_channels
            blocks[i] = Squeezed(*channels, block.conv1.stride[0])
    resnet.first = resnet.conv1
    resnet.linear = nn.Linear(2, 2)
    del resnet.conv1
    return resnet


def test_own_names_are_no_other_codes(tmp_path):
    resnet, other = own_resnet([1, 1, 1]), own_resnet([1, 1, 1])
    torch.save({"resnet": resnet.state_dict(), "stage": 0}, tmp_path / "last.t7")
    models.Checkpoint.read(tmp_path / "last.t7").load_into(other)
    assert torch.equal(other.first.weight, resnet.first.weight)
    assert torch.equal(other.linear.weight, resnet.linear.weight)
    _, policy_net = models.build("R8_C10")
    policy_net.features.fc = nn.Linear(2, 2)
    state = {name: tensor + 1 for name, tensor in policy_net.state_dict().items()}
    models.weights.load_policy(policy_net, state)
    assert torch.equal(policy_net.features.fc.weight, state["features.fc.weight"])


def test_blocks_with_other_norms_grow():
    def make(depth):
        resnet = models.CifarResNet([depth] * 3, 10).eval()
        for block, _ in resnet.units():
            block.bn1 = nn.GroupNorm(4, block.conv1.out_channels)
            block.bn2 = nn.GroupNorm(4, block.conv1.out_channels)
        return resnet

    small, large = make(1), make(2)
    assert models.weights.load_grown(large, small.state_dict()) == 3
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(large(images), small(images))
    for block, _ in large.units():
        block.bn1, block.bn2 = nn.Identity(), nn.Identity()
    state = {n: t for n, t in small.state_dict().items() if ".bn" not in n or n.startswith("bn1")}
    with pytest.raises(ValueError, match="a BasicBlock has no norm"):
        models.weights.load_grown(large, state)
