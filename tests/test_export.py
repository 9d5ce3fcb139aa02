"""The exported file against the networks it was made from."""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, told
from PIL import Image

import engine
import models
import utils
from deploy import onnx_files
from engine import storage

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from deploy import int8, onnx_graph  # noqa: E402


def scatter(network, seed=0):
    """BatchNorm away from its initial values, so that folding it has something to do."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.6, 1.2)
            torch.nn.init.normal_(module.bias, 0, 0.2)
    return network.eval()


def pixels(name, images):
    """uint8 (N, H, W, 3) as the networks take them."""
    config = models.config(name)
    x = torch.as_tensor(images).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    return (x - mean) / std


@pytest.fixture(scope="module")
def images():
    """Bright and dark ones, (12, 32, 32, 3)."""
    generator = torch.Generator().manual_seed(0)
    shape = (12, 32, 32, 3)
    noise = torch.randint(0, 128, shape, generator=generator)
    return (noise + torch.linspace(0, 127, 12).long().view(-1, 1, 1, 1)).to(torch.uint8)


def stage2(path, images, name=TINY, size=None, extra=None):
    """Random networks of a policy that keeps each block for about half of the images."""
    torch.manual_seed(1)
    resnet, policy_net = (scatter(network) for network in models.build(name))
    if size:
        policy_net.look_at(size)
    with torch.no_grad():
        z = policy_net.logit(policy_net.features(policy_net.shrink(pixels(name, images))))
        scale = 3 / z.std(0)
        policy_net.logit.bias.copy_((policy_net.logit.bias - z.mean(0)) * scale)
        policy_net.logit.weight.mul_(scale[:, None])
    content = {"agent": policy_net.state_dict(), "resnet": resnet.state_dict(), "epoch": 1,
               "args": {"warm_start": 1}, **(extra or {})}  # fmt: skip
    if size:
        content["policy_size"] = size
    storage.write(content, path)
    return resnet, policy_net


@pytest.fixture
def export(run, cifar_dir, tmp_path):
    """export(options...) -> (status, output, error, file)."""

    def call(*options, model=TINY, data=("--data_dir", cifar_dir, "--skip_data_check")):
        file = tmp_path / "out.onnx"
        found = run("export", "--model", model, "--out", file, "--check", 8, *data, *options)
        return *found, file

    return call


def outputs(file, images):
    """Logits and policies that ONNX Runtime gives for uint8 images, one at a time."""
    session = onnxruntime.InferenceSession(file)
    rows = [session.run(["logits", "policy"], {"image": i[None].numpy()}) for i in images]
    return (torch.cat([torch.from_numpy(row[i]) for row in rows]) for i in (0, 1))


def openvino_outputs(file, images):
    """The same from OpenVINO."""
    openvino = pytest.importorskip("openvino")
    precise = {"INFERENCE_PRECISION_HINT": "f32"}
    network = openvino.Core().compile_model(str(file), "CPU", precise)
    rows = [network(image[None].numpy()) for image in images]
    return (torch.cat([torch.tensor(row[name]) for row in rows]) for name in ("logits", "policy"))


RUNTIMES = pytest.mark.parametrize("run_file", [outputs, openvino_outputs])


def kinds(file):
    """Operators of a file, those in branches included."""
    found = []

    def walk(graph):
        for node in graph.node:
            found.append(node.op_type)
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    walk(attribute.g)

    walk(onnx.load(file).graph)
    return found


def facts(file):
    return {entry.key: entry.value for entry in onnx.load(file).metadata_props}


@RUNTIMES
@pytest.mark.parametrize("name, size", [("R14_C100", 16), ("R32_C10", None)])
def test_blockdrop(images, tmp_path, name, size, run_file):
    """In double precision on the other side; R32_C10 normalises."""
    resnet, policy_net = stage2(tmp_path / "ckpt.t7", images, name, size)
    config = models.config(name)
    model = onnx_graph.build(resnet, models.GreedyPolicy(policy_net), config)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "out.onnx")
    logits, policy = run_file(tmp_path / "out.onnx", images)
    x = pixels(name, images).double()
    with torch.no_grad():
        expected_policy = policy_net.double()(x)[0].round()
        expected = resnet.double()(x, expected_policy)
    assert 0.2 < policy.mean() < 0.8 and policy.unique(dim=0).shape[0] > 2
    torch.testing.assert_close(policy, expected_policy, check_dtype=False)
    torch.testing.assert_close(logits, expected, check_dtype=False, rtol=1e-4, atol=1e-4)
    assert kinds(tmp_path / "out.onnx").count("If") == config.num_blocks


def test_a_dropped_block_is_not_run(images, tmp_path):
    """Its weights are no numbers: run and then discarded, they would show."""
    resnet, policy_net = stage2(tmp_path / "ckpt.t7", images)
    torch.nn.init.constant_(resnet.blocks[1][1].conv1.weight, float("nan"))
    model = onnx_graph.build(resnet, models.GreedyPolicy(policy_net), models.config(TINY))
    onnx.save(model, tmp_path / "out.onnx")
    logits, policy = outputs(tmp_path / "out.onnx", images)
    assert 0 < policy[:, 3].sum() < len(images)
    assert (logits.isnan().any(1) == policy[:, 3].bool()).all()


@RUNTIMES
def test_convnet_aig(images, tmp_path, run_file):
    torch.manual_seed(3)
    net = scatter(models.build("AIG14_C10")[0])
    net.set_targets([1, 0.5, 0.5, 0.5, 0.5, 0.5])
    with torch.no_grad():  # each gate opens for about half of the images that reach it
        for gate in net.gates:
            found = []
            hook = gate.register_forward_hook(lambda _, __, z, found=found: found.append(z))
            net(pixels("AIG14_C10", images))
            hook.remove()
            if found:
                gate.fc2.bias[1] -= (found[0][:, 1] - found[0][:, 0]).median() + 1e-4
        expected, gates = net(pixels("AIG14_C10", images))
    model = onnx_graph.build(net, None, models.config("AIG14_C10"))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "out.onnx")
    logits, policy = run_file(tmp_path / "out.onnx", images)
    assert 0.2 < gates[:, 1:].mean() < 0.8 and (gates[:, 0] == 1).all()
    torch.testing.assert_close(policy, gates)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert kinds(tmp_path / "out.onnx").count("If") == 5


@pytest.mark.parametrize("penalty", [-0.5, -5])
def test_a_policy_that_chooses_for_a_penalty(export, images, tmp_path, penalty):
    torch.manual_seed(2)
    head = models.Confidence(64, 10, utils.candidate_policies((2, 2, 2), lambda policy: 0.0))
    for layer in (head.classes, head.hidden, head.linear):
        torch.nn.init.normal_(layer.weight, 0, 1)
    torch.nn.init.normal_(head.linear.weight, 0, 0.05)  # no probability so near 0 that all tie
    resnet, policy_net = stage2(
        tmp_path / "ckpt.t7", images, extra={"correctness": head.state_dict()}
    )
    status, out, err, file = export("--load", tmp_path / "ckpt.t7", "--penalty", penalty)
    assert status == 0, err
    logits, policy = outputs(file, images)
    with torch.no_grad():
        x = pixels(TINY, images)
        expected = models.PenaltyPolicy(policy_net, head, penalty)(x)
        torch.testing.assert_close(policy, expected)
        torch.testing.assert_close(logits, resnet(x, expected), rtol=1e-4, atol=1e-4)
    assert facts(file)["penalty"] == str(float(penalty))


def test_one_candidate_leaves_nothing_to_choose(export, images, tmp_path):
    """As a warm start leaves R8, of one block a stage."""
    head = models.build_confidence(models.config("R8_C10"), models.build("R8_C10")[1])
    head.candidates = torch.ones(1, 3)
    head.linear = torch.nn.Linear(32, 1)
    stage2(tmp_path / "ckpt.t7", images, "R8_C10", extra={"correctness": head.state_dict()})
    content = storage.content(tmp_path / "ckpt.t7")
    storage.write(content, tmp_path / "ckpt.t7")
    found = storage.read(tmp_path / "ckpt.t7")
    assert len(found.candidates) == 1
    status, out, err, file = export("--load", tmp_path / "ckpt.t7", "--penalty", -5, model="R8_C10")
    assert status == 0 and "Block Usage: 3.000" in out, err
    _, policy = outputs(file, images)
    assert policy.eq(1).all()


@pytest.mark.parametrize("small", [1e-6, 1e-12, 0.0])
def test_a_bias_fits_where_weights_are_nearly_zero(images, small):
    """In steps of such weights it would not fit into int32."""
    resnet = scatter(models.build(TINY)[0])
    branch = resnet.blocks[1][1]
    with torch.no_grad():
        branch.conv1.weight[3] *= small
        branch.bn1.running_var[3], branch.bn1.bias[3] = 1.0, 3.0
        branch.bn1.weight[3], branch.bn1.running_mean[3] = 1.0, 0.0
    policy = models.StaticPolicy(torch.ones(6))
    x = pixels(TINY, images)
    ranges = int8.observe([resnet], resnet, [x])
    model = onnx_graph.build(resnet, policy, models.config(TINY), ranges=ranges)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found = torch.tensor(
        np.concatenate(
            [session.run(["logits"], {"image": image[None].numpy()})[0] for image in images]
        )
    )
    expected = resnet(x).detach()
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def chooser_head():
    """One that tells images apart."""
    torch.manual_seed(2)
    head = models.Confidence(64, 10, utils.candidate_policies((2, 2, 2), lambda policy: 0.0))
    for layer in (head.classes, head.hidden):
        torch.nn.init.normal_(layer.weight, 0, 1)
    torch.nn.init.normal_(head.linear.weight, 0, 0.3)
    return head


@pytest.fixture
def chooser(images, tmp_path):
    """A checkpoint that chooses for any penalty, and its networks."""
    head = chooser_head()
    extra = {"correctness": head.state_dict()}
    return *stage2(tmp_path / "ckpt.t7", images, extra=extra), head


@pytest.mark.parametrize("int8", [[], ["--int8"]])
def test_a_file_takes_its_penalty_as_an_input(export, images, tmp_path, chooser, int8):
    """It decides as files do that are exported for each penalty."""
    status, out, err, file = export("--load", tmp_path / "ckpt.t7", "--penalty", "input", *int8)
    assert status == 0, err
    given = onnx.load(file).graph.input
    assert [value.name for value in given] == ["image", "penalty"]
    assert given[1].type.tensor_type.shape.dim[0].dim_value == 1
    assert not any(c.name == "penalty" for c in onnx.load(file).graph.initializer)
    assert [line.strip() for line in out.splitlines() if "Penalty" in line] == [
        "Penalty -0.5:", "Penalty -5:", "Penalty -50:"
    ]  # fmt: skip
    known = facts(file)
    assert known["penalty"] == "input" and set(json.loads(known["mean_blocks"])) == {
        "-0.5", "-5.0", "-50.0"
    }  # fmt: skip
    session = onnxruntime.InferenceSession(file)
    with pytest.raises(ValueError, match="penalty"):
        session.run(None, {"image": images[:1].numpy()})
    resnet, policy_net, head = chooser
    kept = []
    for penalty in (-0.01, -0.5, -3.0, -20.0, -1000.0):
        feed = {"penalty": np.array([penalty], np.float32)}
        found = [
            session.run(["logits", "policy"], {"image": x[None].numpy(), **feed}) for x in images
        ]
        logits, policy = (torch.tensor(np.concatenate(part)) for part in zip(*found, strict=True))
        if not int8:
            status, _, err, file = export(
                "--load", tmp_path / "ckpt.t7", "--penalty", penalty, "--force"
            )
            assert status == 0, err
            its_logits, its_policy = outputs(file, images)
            assert torch.equal(policy, its_policy)
            torch.testing.assert_close(logits, its_logits, rtol=1e-5, atol=1e-5)
            with torch.no_grad():
                expected = models.PenaltyPolicy(policy_net, head, penalty)(pixels(TINY, images))
            assert torch.equal(policy, expected)
        kept.append(policy.sum().item())
    assert kept == sorted(kept) and kept[0] < kept[-1]


def biased(path, always=(), never=()):
    """Have the policy network of a checkpoint always keep, and never, some blocks."""
    content = storage.content(path)
    for blocks, bias in ((always, 9.0), (never, -9.0)):
        for k in blocks:
            content["agent"]["logit.weight"][k] = 0
            content["agent"]["logit.bias"][k] = bias
    storage.write(content, path)


def test_blocks_that_never_vary_may_be_fixed(export, images, tmp_path):
    path = tmp_path / "ckpt.t7"
    stage2(path, images)
    biased(path, always=[0, 3], never=[1, 2])
    status, out, err, file = export("--load", path)
    assert status == 0, err
    expected, size = tuple(outputs(file, images)), file.stat().st_size
    assert kinds(file).count("If") == 6
    counts = re.search(r"kept by so many images: ([\d ]+)", out)[1].split()
    assert counts[0] == counts[3] == "8" and counts[1] == counts[2] == "0"
    status, out, err, file = export("--load", path, "--fixed", "--force")
    assert status == 0, err
    found = tuple(outputs(file, images))
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert kinds(file).count("If") == 2 and file.stat().st_size < size
    assert "keeps blocks 0, 3 and drops 1, 2" in facts(file)["fixed"]
    assert facts(file)["checked_on"] == "test"


def test_what_is_counted_is_not_what_is_held_out(export, images, cifar_dir, tmp_path, monkeypatch):
    path = tmp_path / "ckpt.t7"
    stage2(path, images)
    biased(path, always=range(6))
    seen = []
    fixed_blocks = onnx_files.fixed_blocks

    def look(resnet, policy, batches):
        seen.extend(batches)
        return fixed_blocks(resnet, policy, seen)

    monkeypatch.setattr(onnx_files, "fixed_blocks", look)
    status, _, err, file = export("--load", path, "--fixed", "--val_split", 10)
    assert status == 0, err
    assert facts(file)["checked_on"] == "10 held-out training images"
    args = argparse.Namespace(data_dir=cifar_dir, skip_data_check=True, subset=None, batch_size=999,
                              val_split=50, seed=0)  # fmt: skip
    _, last = engine.data.load(models.config(TINY), args, torch.device("cpu"), training=False)
    (expected,) = (batch for batch, _, _ in last.epoch(0))
    assert torch.equal(torch.cat(seen)[-40:], expected[:40])


@RUNTIMES
def test_gates_may_be_fixed(images, tmp_path, run_file):
    net = scatter(models.build("AIG14_C10")[0])
    with torch.no_grad():
        for k, bias in ((0, 9.0), (2, -9.0), (3, -9.0)):  # the third changes the shape
            net.gates[k].fc2.weight.zero_()
            net.gates[k].fc2.bias.copy_(torch.tensor([-bias, bias]))
        x = pixels("AIG14_C10", images)
        fixed = onnx_files.fixed_blocks(net, None, [x[:7], x[7:]])
        expected, gates = net(x)
    assert fixed[0] is True and fixed[2] is False and fixed[3] is False
    model = onnx_graph.build(net, None, models.config("AIG14_C10"), fixed=fixed)
    onnx.save(model, tmp_path / "x.onnx")
    logits, policy = run_file(tmp_path / "x.onnx", images)
    assert torch.equal(policy, gates)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_fixed_block_that_a_test_image_wants_otherwise_is_refused(
    export, images, tmp_path, monkeypatch
):
    path = tmp_path / "ckpt.t7"
    stage2(path, images)
    monkeypatch.setattr(onnx_files, "fixed_blocks", lambda *_: [True] + [None] * 5)
    status, _, err, file = export("--load", path, "--fixed")
    assert status == 2 and "images decide otherwise about the blocks of --fixed" in err
    assert not file.exists()
    # int8 files have policies of their own, so PyTorch's are asked
    status, _, err, file = export("--load", path, "--fixed", "--int8")
    assert status == 2 and "images decide otherwise about the blocks of --fixed" in err
    assert not file.exists()


def test_the_file_says_how_many_images_fixed_its_blocks(export, images, tmp_path):
    path = tmp_path / "ckpt.t7"
    stage2(path, images)
    biased(path, always=range(6))
    status, _, err, file = export("--load", path, "--fixed")
    assert status == 0, err
    assert facts(file)["fixed"].startswith("as 119 training images all do")
    status, _, err, file = export("--load", path, "--fixed", "--val_split", 119, "--force")
    assert status == 2 and "--fixed has no training images to go by: there are 1" in err


@pytest.mark.parametrize("policy", ["first:3", "0-0-1-0", "2-1-0-2"])
def test_int8_of_a_dropped_projection(policy):
    """A kept one in front of it is fused with its sum, whose steps have to be scalars."""
    torch.manual_seed(0)
    config = replace(models.config("R18_Folder"), num_classes=3, image_size=64)
    resnet = scatter(models.build("R18_Folder", 3)[0])
    static = models.StaticPolicy(utils.static_policy(policy, config.stages))
    x = torch.randn(4, 3, 64, 64)
    ranges = int8.observe([resnet, static], lambda x: models.predict(resnet, static, x), [x])
    model = onnx_files.build(resnet, static, config, 17, ranges)
    onnx_files.session(model.SerializeToString())


def test_a_penalty_input_wants_a_policy_that_chooses(export, images, tmp_path):
    stage2(tmp_path / "ckpt.t7", images)
    status, _, err, _ = export("--load", tmp_path / "ckpt.t7", "--penalty", "input")
    assert status == 2 and "its policy cannot choose for another penalty" in err
    status, _, err, _ = export("--load", tmp_path / "ckpt.t7", "--penalty", "more")
    assert status == 2 and "0 or below" in err
    status, _, err, _ = export("--load", tmp_path / "ckpt.t7", "--penalty", "input", "--fixed")
    assert status == 2 and "do at another" in err


@pytest.mark.parametrize("name", ["R14_C10", "AIG14_C10", "R18_Folder", "R50_Folder"])
def test_the_form_that_other_runtimes_want(name, images):
    """Names, shapes and copies; each is what some runtime fails without."""
    torch.manual_seed(0)
    config = models.config(name)
    resnet, policy_net = models.build(name)
    policy = policy_net and models.GreedyPolicy(policy_net)
    model = onnx_graph.build(scatter(resnet), policy and scatter(policy), config)
    nodes, graphs = [], []

    def walk(graph):
        graphs.append(graph)
        for node in graph.node:
            nodes.append(node)
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    walk(attribute.g)

    walk(model.graph)
    names = [node.name for node in nodes]
    assert all(names) and len(set(names)) == len(names)
    assert len({graph.name for graph in graphs}) == len(graphs)
    assert not any(node.op_type == "MatMul" for node in nodes)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    shapes = {value.name: value.type.tensor_type.shape for value in inferred.graph.value_info}
    branches = graphs[1:]
    assert len(branches) == 2 * resnet.num_blocks
    for node in (n for n in nodes if n.op_type == "If"):
        then, other = (a.g for a in sorted(node.attribute, key=lambda a: a.name, reverse=True))
        for graph in (then, other):
            (output,) = graph.output
            dims = [d.dim_value for d in output.type.tensor_type.shape.dim]
            assert len(dims) == 4 and all(dims)
            assert [d.dim_value for d in shapes[node.output[0]].dim] == dims
            made = {name for n in graph.node for name in n.output}
            assert output.name in made
        made = {c.name for c in then.initializer} | {name for n in then.node for name in n.output}
        outer = [n for n in then.node if set(n.input) - made]
        assert all(n.op_type == "Identity" for n in outer)
        assert len({n.input[0] for n in outer}) == len(outer)
        assert then.node[-1].op_type == "Identity"
        assert then.initializer  # weights stay in their branch


@RUNTIMES
def test_blocks_that_all_candidates_treat_alike_share_an_if(images, tmp_path, run_file):
    torch.manual_seed(2)
    candidates = torch.tensor([[1, 0, 0, 0, 1, 1], [1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1.0]])
    head = models.Confidence(64, 10, candidates)
    resnet, policy_net = stage2(tmp_path / "ckpt.t7", images)
    chooser = models.PenaltyPolicy(policy_net, head, -5.0)
    assert onnx_graph.runs_of(resnet, chooser) == [1, 1, 2, 2]  # shortcuts begin runs
    assert onnx_graph.runs_of(resnet, models.GreedyPolicy(policy_net)) == [1] * 6
    file = tmp_path / "out.onnx"
    for best, candidate in enumerate(candidates):  # the others are hardly ever right
        head.linear.weight.data.zero_()
        head.linear.bias.data.copy_(torch.eye(3)[best] * 18 - 9)
        onnx.save(onnx_graph.build(resnet, chooser, models.config(TINY)), file)
        assert kinds(file).count("If") == 2  # the first and the last two are always kept
        logits, policy = run_file(file, images[:4])
        assert torch.equal(policy, candidate.expand(4, -1))
        expected = resnet(pixels(TINY, images[:4]), policy)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options, blocks", [(["--policy", "distribute:2"], 2), ([], 6)])
def test_a_static_policys_dropped_blocks_are_not_in_the_file(
    export, base_file, images, options, blocks
):
    status, out, err, file = export("--base", base_file, *options)
    assert status == 0 and f"Block Usage: {blocks}.000" in out, err
    found = kinds(file)
    assert "If" not in found and found.count("Conv") == 1 + 2 * blocks
    assert outputs(file, images[:1])
    assert facts(file)["policy"] == (options[1] if options else "full")


def test_the_file_says_what_it_is(export, images, tmp_path):
    path = tmp_path / "ckpt.t7"
    stage2(path, images)
    status, out, err, file = export("--load", path)
    assert status == 0, err
    known = facts(file)
    assert known["model"] == TINY and known["image"] == "uint8 RGB, 32x32"
    assert json.loads(known["classes"])[3] == "cat"
    assert known["checkpoint_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert known["checked_images"] == "8"
    assert f"Accuracy: {float(known['accuracy']):.3f} on 8 images" in out
    assert f"Block Usage: {float(known['mean_blocks']):.3f}" in out


def test_accuracy_and_blocks_are_those_of_test_py(export, run, images, cifar_dir, tmp_path):
    stage2(tmp_path / "ckpt.t7", images)
    options = ["--load", tmp_path / "ckpt.t7"]
    _, _, _, file = export(*options, "--check", 40)
    run("test", "--model", TINY, "--data_dir", cifar_dir, "--skip_data_check", *options, "--json",
        tmp_path / "test.json")  # fmt: skip
    figures = json.loads((tmp_path / "test.json").read_text())
    assert float(facts(file)["accuracy"]) == pytest.approx(figures["accuracy"], abs=1e-9)
    assert float(facts(file)["mean_blocks"]) == pytest.approx(figures["block_usage"], abs=1e-6)


def test_a_file_that_differs_is_not_kept(export, images, tmp_path, monkeypatch):
    stage2(tmp_path / "ckpt.t7", images)
    average = onnx_graph.average  # of the shortcuts that halve
    monkeypatch.setattr(
        onnx_graph, "average", lambda graph, x, side: graph.add("Neg", average(graph, x, side))
    )
    status, _, err, file = export("--load", tmp_path / "ckpt.t7")
    assert status == 2 and "differ on " in err and "nothing is written" in err
    assert told(err).count("\n") == 1 and not list(tmp_path.glob("*.onnx*"))


def test_decisions_that_may_fall_either_way_are_named(export, images, tmp_path):
    path = tmp_path / "ckpt.t7"
    stage2(path, images)
    content = storage.content(path)
    content["agent"]["logit.weight"][2] = 0
    content["agent"]["logit.bias"][2] = -1e-6
    storage.write(content, path)
    status, out, err, file = export("--load", path)
    assert status == 0, err
    assert "Not compared: 8 images" in out and "(0, 1, 2, 3, 4, 5, 6, 7)" in out


def test_pictures(export, tmp_path):
    """64 pixels: the policy network does not halve these."""
    rng = np.random.default_rng(0)
    for label in range(2):
        folder = tmp_path / "data" / "val" / f"class {label}"
        folder.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 255, (80, 96, 3), np.uint8)).save(folder / f"{i}.png")
    torch.manual_seed(0)
    resnet, policy_net = models.build("R18_Folder", 2)
    scatter(resnet), scatter(policy_net)
    path = tmp_path / "ckpt.t7"
    storage.write({"agent": policy_net.state_dict(), "resnet": resnet.state_dict()}, path)
    data = ("--data_dir", tmp_path / "data", "--image_size", 64, "--workers", 0)
    status, out, err, file = export("--load", path, model="R18_Folder", data=data)
    assert status == 0 and "on 6 images" in out, err
    known = facts(file)
    assert "64x64, short side resized to 73" in known["image"]
    assert json.loads(known["classes"]) == ["class 0", "class 1"]


def test_errors_are_one_line(export, images, tmp_path, monkeypatch):
    path = tmp_path / "ckpt.t7"
    stage2(path, images)

    def refused(*options, **settings):
        status, _, err, file = export(*options, **settings)
        assert status == 2 and told(err).count("\n") == 1, err
        return err

    assert "opset 9: take one of 13 to " in refused("--load", path, "--opset", 9)
    assert "--check says on how many" in refused("--load", path, "--subset", 5)
    assert "a file holds fp32" in refused("--load", path, "--precision", "bf16")
    assert "is for 6 blocks, not R32_C10" in refused("--load", path, model="R32_C10")
    assert "unknown model 'R7'" in refused("--load", path, model="R7")
    (tmp_path / "out.onnx").write_bytes(b"mine")
    assert "is there already: take another name, or --force" in refused("--load", path)
    status, _, err, file = export("--load", path, "--force")
    assert status == 0 and len(file.read_bytes()) > 4, err
    before = file.read_bytes()

    def no_room(number):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", no_room)
    assert "out.onnx: No space left on device" in refused("--load", path, "--force")
    assert file.read_bytes() == before and len(list(tmp_path.glob("*out.onnx*"))) == 1
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install -r requirements-export.txt" in refused("--load", path, "--force")


@pytest.mark.parametrize("opset", ["13", "18"])
def test_other_opsets(export, images, tmp_path, opset):
    stage2(tmp_path / "ckpt.t7", images)
    status, _, err, file = export("--load", tmp_path / "ckpt.t7", "--opset", opset)
    assert status == 0 and onnx.load(file).opset_import[0].version == int(opset), err


@pytest.mark.parametrize("name", [TINY, "AIG14_C10"])
def test_int8(images, name):
    """Whole numbers within the grids they are stored on, and nearly the same classes."""
    torch.manual_seed(1)
    resnet, policy_net = (n and scatter(n) for n in models.build(name))
    x = pixels(name, images)
    keep = torch.tensor([1.0, 1, 0, 1, 1, 1])
    run = resnet if policy_net is None else lambda x: (resnet(x, keep.expand(len(x), -1)),)
    ranges = int8.observe([resnet], run, [x])
    convs = [m for m in resnet.modules() if isinstance(m, torch.nn.Conv2d)]
    seen = sum(conv in ranges for conv in convs)
    assert seen == len(convs) - (3 if policy_net else 1)  # the stem and the dropped block
    config = models.config(name)
    policy = models.StaticPolicy(keep) if policy_net else None
    model = onnx_graph.build(resnet, policy, config, ranges=ranges)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    logits = torch.cat(
        [torch.tensor(session.run(["logits"], {"image": i[None].numpy()})[0]) for i in images]
    )
    with torch.no_grad():
        expected = run(x)[0]
    difference = (logits - expected).abs().amax(1) / expected.abs().amax(1)
    assert 1e-5 < difference.max() < 0.1, difference


def test_int8_looks_at_as_many_images_as_it_says(monkeypatch):
    seen = []

    def observe(networks, run, batches):
        seen.extend(len(images) for images in batches)

    monkeypatch.setattr(int8, "observe", observe)
    batches = [(torch.zeros(250), None, None)] * 4
    train = SimpleNamespace(batch_size=250, epoch=lambda epoch: iter(batches))
    onnx_files.calibrate(None, None, train)
    assert seen == [250, 250, onnx_files.CALIBRATION - 500]


def test_export_in_int8(export, images, tmp_path):
    stage2(tmp_path / "ckpt.t7", images)
    status, out, err, file = export("--load", tmp_path / "ckpt.t7", "--int8")
    assert status == 0 and "of the policies" in out, err
    assert "QuantizeLinear" in kinds(file) and facts(file)["arithmetic"] == "int8"


def test_a_poor_int8_file_is_not_kept(export, images, tmp_path, monkeypatch):
    stage2(tmp_path / "ckpt.t7", images)
    monkeypatch.setattr(int8.Range, "scale", lambda seen: (100.0, 0))
    status, _, err, file = export("--load", tmp_path / "ckpt.t7", "--int8")
    assert status == 2 and "nothing is written" in err and not file.exists()


def test_runtimes_are_timed_on_the_same_files(base_file, images, cifar_dir, tmp_path):
    """In a process of its own: one in which OpenVINO has started threads cannot be forked."""
    pytest.importorskip("openvino")
    stage2(tmp_path / "ckpt.t7", images)
    options = ["--model", TINY, "--data_dir", cifar_dir, "--skip_data_check", "--base", base_file,
               "--load", tmp_path / "ckpt.t7", "--threads", 1, "--repeats", 1, "--budget", 0.1,
               "--accuracy", 20, "--json", tmp_path / "out.json"]  # fmt: skip
    command = [sys.executable, storage.ROOT / "benchmarks" / "runtimes.py", *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    found = {(row["runtime"], row["arithmetic"]) for row in written["rows"]}
    exported = {
        (name, kind) for name in ("ONNX Runtime", "OpenVINO") for kind in ("float32", "int8")
    }
    assert exported | {("PyTorch, deployed", "float32")} <= found
    for row in written["rows"]:
        assert row["speed_up"] == pytest.approx(row["full_ms"] / row["ours_ms"])
        assert row["efficiency"] == pytest.approx(row["speed_up"] / row["flop_ratio"])
    assert set(written["accuracy"]) == {
        f"{w}, {a}" for w in ("full", "ours") for a in ("float32", "int8")
    }
    assert "ours, float32: accuracy" in done.stdout


def opencv_outputs(file, images):
    """The same from OpenCV's own engine."""
    cv2 = pytest.importorskip("cv2")
    net = cv2.dnn.readNetFromONNX(str(file))
    rows = []
    for image in images:
        net.setInput(image[None].numpy(), "image")
        rows.append(net.forward(["logits", "policy"]))
    return (torch.cat([torch.from_numpy(row[i].reshape(1, -1)) for row in rows]) for i in (0, 1))


def mnn_outputs(file, images):
    """The same from MNN, whose converter writes a file of its own first."""
    pytest.importorskip("MNN")
    import MNN.expr as expr
    import MNN.nn as networks

    converted = str(file.with_suffix(".mnn"))
    command = "from MNN.tools import mnnconvert; mnnconvert.main()"
    options = ["-f", "ONNX", "--modelFile", file, "--MNNModel", converted, "--bizCode", "x"]
    done = subprocess.run([sys.executable, "-c", command, *map(str, options)], capture_output=True)
    assert done.returncode == 0, done.stderr
    network = networks.load_module_from_file(converted, ["image"], ["logits", "policy"])
    rows = []
    for image in images:
        given = expr.placeholder(list(image[None].shape), expr.NCHW, expr.uint8)
        given.write(image[None].numpy())
        rows.append([part.read() for part in network.forward([given])])
    return (torch.cat([torch.tensor(row[i].reshape(1, -1)) for row in rows]) for i in (0, 1))


@pytest.mark.parametrize("other", [opencv_outputs, mnn_outputs])
@pytest.mark.parametrize("name", [TINY, "AIG14_C10"])
def test_other_runtimes_give_the_same(images, tmp_path, name, other):
    """Where requirements-runtimes.txt is installed."""
    file = tmp_path / "x.onnx"
    if name == TINY:
        resnet, policy_net = stage2(tmp_path / "ckpt.t7", images)
        policy = models.GreedyPolicy(policy_net)
    else:
        torch.manual_seed(3)
        resnet, policy = scatter(models.build(name)[0]), None
        for gate in resnet.gates:
            torch.nn.init.normal_(gate.fc2.weight)
    onnx.save(onnx_graph.build(resnet, policy, models.config(name)), file)
    logits, kept = outputs(file, images)
    found, its_kept = other(file, images)
    assert torch.equal(its_kept, kept) and 0 < kept.mean() < 1
    torch.testing.assert_close(found, logits, rtol=1e-3, atol=1e-3)
