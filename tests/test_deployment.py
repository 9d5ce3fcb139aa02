"""The inference-only twins compute what the originals compute."""

import copy
from functools import partial

import pytest
import torch
from test_models import random_norms
from torch import nn

import models
import utils
from deploy import block as deployed_block
from deploy import onnx_graph, twin
from models import GreedyPolicy, capabilities, execution

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 8 images, so that batches of 10 cross from one to the next."""
    monkeypatch.setattr(twin, "CPU_CHUNK", 8)


@pytest.fixture(params=["R14_C10", "R18_ImgNet", "R50_ImgNet"])
def pair(request):
    torch.manual_seed(0)
    resnet, policy_net = models.build(request.param)
    size = 32 if "C10" in request.param else 64
    return random_norms(resnet), random_norms(policy_net), size


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_outputs_equal_the_originals(pair, dtype):
    resnet, policy_net, size = pair
    fast, fast_policy = models.deploy(resnet, GreedyPolicy(policy_net), dtype)
    x = torch.randn(10, 3, size, size, dtype=torch.float64)
    policy = (torch.rand(10, resnet.num_blocks) < 0.5).float()
    policy[3], policy[9] = 0, 1
    ours = x if dtype == torch.float64 else x.float()
    for given in (None, policy, policy[:1].expand(10, -1), torch.zeros_like(policy).bool()):
        close(fast(ours, given), resnet(x, given), dtype)
    close(fast(ours[:1], policy[:1]), resnet(x[:1], policy[:1]), dtype)
    for found, expected in zip(fast_policy.policy_net(ours), policy_net(x), strict=True):
        close(found, expected, dtype)
    if dtype == torch.float64:
        assert torch.equal(fast_policy(ours), GreedyPolicy(policy_net)(x))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_nested_policies_need_no_gathering(pair, dtype, monkeypatch):
    """But of the blocks that an image with a policy of its own keeps."""
    resnet, _, size = pair
    fast, _ = models.deploy(resnet, dtype=dtype)
    gathered = []
    scatter = deployed_block.Batch.scatter_

    def watched(self, rows, kept):
        gathered.append(not isinstance(rows, range))
        scatter(self, rows, kept)

    monkeypatch.setattr(deployed_block.Batch, "scatter_", watched)
    x = torch.randn(2 * 8, 3, size, size, dtype=torch.float64)
    ours = x if dtype == torch.float64 else x.float()
    depth = torch.randint(resnet.num_blocks + 1, (len(x), 1))
    nested = (torch.arange(resnet.num_blocks) >= resnet.num_blocks - depth).float()
    close(fast(ours, nested), resnet(x, nested), dtype)
    assert gathered and not any(gathered)
    several = torch.stack((nested, nested.flip(0)))
    close(fast(ours, several), torch.stack([resnet(x, policy) for policy in several]), dtype)
    assert not any(gathered)
    nested[3] = (torch.arange(resnet.num_blocks) % 2).float()
    close(fast(ours, nested), resnet(x, nested), dtype)
    assert any(gathered) and not all(gathered)


@pytest.mark.skipif(not capabilities.fused_convolutions(torch.float32), reason="needs oneDNN")
def test_large_parts_of_a_batch_run_in_few_sizes(pair, monkeypatch):
    """For each size that is new oneDNN makes its kernels anew."""
    resnet, _, size = pair
    fast, _ = models.deploy(resnet)
    monkeypatch.setattr(twin, "CPU_CHUNK", 32)
    monkeypatch.setattr(deployed_block, "TILE", 4)
    sizes = set()
    monkeypatch.setattr(
        deployed_block.Block, "run", lambda self, x, shortcut, run=deployed_block.Block.run: (
            sizes.add(len(x)), run(self, x, shortcut)
        )[1],
    )  # fmt: skip
    x = torch.randn(32, 3, size, size)
    for seed in range(5):
        torch.manual_seed(seed)
        policy = (torch.rand(32, resnet.num_blocks) < 0.6).float()
        close(fast(x, policy), resnet(x.double(), policy), torch.float32)
    assert max(sizes) >= 16
    assert all(size <= 8 or size % 4 == 0 for size in sizes)


def test_no_image_gives_no_logits(pair):
    """As a micro-batch may have none: not of every image is asked what it earns."""
    resnet, _, size = pair
    fast, _ = models.deploy(resnet)
    policy = torch.ones(2, 0, resnet.num_blocks)
    assert fast(torch.zeros(0, 3, size, size), policy).shape[:2] == (2, 0)


def test_an_order_for_nested_policies():
    nested = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 1.0]])
    order = execution.nested_order(nested)
    assert order.tolist() == [1, 3, 0, 2]
    spans = execution.kept_spans(nested[order], execution.kept_counts(nested))
    assert spans == [range(1), range(2), range(3)]
    apart = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 0.0]])
    assert execution.nested_order(apart) is None
    counts = execution.kept_counts(apart)
    assert execution.kept_spans(apart, counts) == [None, range(1, 2), range(1)]
    assert execution.nested_order(torch.ones(3, 2)) is None  # nothing to gain


def close(found, expected, dtype):
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = (found.double() - expected).abs().max() / expected.abs().max().clamp_min(0.1)
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("execution", ["sparse", "masked", "deployed"])
def test_several_policies_in_one_pass(pair, execution):
    resnet, _, size = pair
    x = torch.randn(10, 3, size, size, dtype=torch.float64)
    policies = (torch.rand(2, 10, resnet.num_blocks) < 0.5).double()
    policies[..., :3] = 1  # what the curriculum forces on
    expected = torch.stack([resnet(x, policy) for policy in policies])
    if execution == "deployed":
        resnet, _ = models.deploy(resnet, dtype=torch.float64)
    else:
        resnet.execution = execution
    torch.testing.assert_close(resnet(x, policies), expected, rtol=1e-10, atol=1e-10)


def test_deploying_leaves_the_originals_as_they_were():
    resnet, policy_net = models.build("R14_C10")
    before = {n: t.clone() for n, t in resnet.state_dict().items()}
    x = torch.randn(4, 3, 32, 32)
    fast, _ = models.deploy(resnet.train(), GreedyPolicy(policy_net).train())
    first = fast(x, torch.ones(4, 6))
    assert resnet.bn1.training and policy_net.features.bn1.training
    assert all(torch.equal(before[n], t) for n, t in resnet.state_dict().items())
    with torch.no_grad():
        resnet.conv1.weight.zero_()
    assert torch.equal(first, fast(x, torch.ones(4, 6)))


def test_the_input_is_left_as_it_was():
    resnet, _ = models.build("R14_C10")
    fast, _ = models.deploy(resnet)
    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    fast(x, torch.ones(4, 6)), fast(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "where, name",
    [
        (lambda resnet, policy_net: resnet.blocks[0][1], "se"),
        (lambda resnet, policy_net: resnet, "dropout"),
        (lambda resnet, policy_net: policy_net, "attention"),
        (lambda resnet, policy_net: policy_net.features.blocks[0][0], "extra"),
    ],
)
def test_a_module_without_a_twin_is_refused_by_name(where, name):
    pair = models.build("R14_C10")
    where(*pair).add_module(name, nn.Conv2d(16, 16, 1))
    resnet, policy_net = pair
    with pytest.raises(ValueError, match=f"does not know {name} .Conv2d"):
        models.deploy(resnet, GreedyPolicy(policy_net))


def test_a_policy_network_alone_is_no_policy():
    with pytest.raises(
        ValueError, match="not a CifarPolicy: wrap a policy network in GreedyPolicy"
    ):
        models.deploy(*models.build("R14_C10"))


def test_a_static_policy_is_deployed_as_it_is():
    resnet, _ = models.build("R14_C10")
    kept = torch.tensor([1.0, 0, 1, 1, 0, 1])
    fast, policy = models.deploy(random_norms(resnet), models.StaticPolicy(kept), torch.float64)
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    logits, chosen = models.predict(fast, policy, x)
    assert torch.equal(chosen, kept.expand(5, -1))
    torch.testing.assert_close(logits, resnet(x, kept.expand(5, -1)).detach())


def test_a_shortcut_or_gate_without_a_twin_is_refused():
    resnet, _ = models.build("R14_C10")
    resnet.ds[1] = nn.Conv2d(16, 32, 1, 2)
    with pytest.raises(ValueError, match="shortcuts of Conv2d"):
        models.deploy(resnet)
    gated, _ = models.build("AIG14_C10")
    gated.gates[2].add_module("fc3", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="does not know fc3"):
        models.deploy(gated)


class Upside(models.aig.Gate):
    def forward(self, x):
        return -super().forward(x)


def test_a_gate_of_the_same_parts_and_another_forward_is_refused():
    gated = models.GatedResNet(models.build("AIG14_C10")[0].resnet, Upside)
    with pytest.raises(ValueError, match="does not know Upside.forward"):
        models.deploy(gated)
    with pytest.raises(ValueError, match="no ONNX form of Upside"):
        onnx_graph.build(gated, None, models.config("AIG14_C10"))


@pytest.mark.parametrize("name", ["R14_C10", "AIG14_C10"])
@pytest.mark.parametrize("deployed", [False, True])
def test_logits_are_float32_under_autocast(name, deployed):
    resnet, policy_net = models.build(name)
    policy = policy_net and GreedyPolicy(policy_net).eval()
    resnet.eval()
    if deployed:
        resnet, policy = models.deploy(resnet, policy, torch.bfloat16)
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = resnet(x)
        logits = out[0] if isinstance(out, tuple) else out
        assert logits.dtype == torch.float32
        if policy:
            assert policy.policy_net(x)[0].dtype == torch.float32


@pytest.mark.parametrize("kind, multiple", [("eager", 4), ("deployed", 8)])
def test_padded_rows_change_nothing_but_their_number(pair, kind, multiple, monkeypatch):
    """Twelve images, in one chunk where they are deployed; a block that all keep, one that none."""
    monkeypatch.setattr(twin, "CPU_CHUNK", 12)
    resnet, _, size = pair
    x = torch.randn(12, 3, size, size, dtype=torch.float64)
    policies = (torch.rand(2, 12, resnet.num_blocks) < 0.4).double()
    policies[..., 0], policies[0, :, 1], policies[1, :11, 2] = 1, 0, 1
    policies[1, 11, 2] = 0
    expected = torch.stack([resnet(x, policy) for policy in policies]).detach()
    resnet.row_multiple = multiple
    if kind == "deployed":
        resnet, _ = models.deploy(resnet, dtype=torch.float64)
    sizes = rows_computed(monkeypatch)
    with torch.no_grad():
        for found in (torch.stack([resnet(x, policy) for policy in policies]), resnet(x, policies)):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    kept = {int(n) for n in (*policies.sum(1).flatten(), *policies.sum((0, 1)))}
    assert any(n % multiple for n in kept)
    for size in sizes:
        assert size % multiple == 0 or size in (11, 12, 23, 24)


def rows_computed(monkeypatch):
    """The numbers of rows that blocks are run on, as they come."""
    sizes = []
    kept_rows = execution.kept_rows

    def note(*args):
        rows = kept_rows(*args)
        sizes.extend(map(len, rows))
        return rows

    monkeypatch.setattr(execution, "kept_rows", note)
    return sizes


def test_rows_are_not_padded_where_they_would_count_twice(monkeypatch):
    """In BatchNorm's statistics and in gradients."""
    resnet, _ = models.build("R14_C10")
    resnet.row_multiple = 8
    sizes = rows_computed(monkeypatch)
    policy = torch.zeros(10, 6)
    policy[:3] = 1
    with torch.no_grad():
        resnet.train()(torch.randn(10, 3, 32, 32), policy)
    resnet.eval()(torch.randn(10, 3, 32, 32), policy)
    assert set(sizes) == {3}
    with torch.no_grad():
        resnet(torch.randn(10, 3, 32, 32), policy)
    assert set(sizes[-6:]) == {8}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["R14_C10", "AIG14_C10"])
def test_later_changes_of_the_originals_do_not_reach_the_copies(name, dtype):
    resnet, policy_net = models.build(name)
    policy = None
    if policy_net is not None:
        head = models.build_confidence(models.config(name), policy_net)
        policy = models.PenaltyPolicy(policy_net, head, -5.0)
    fast, decide = models.deploy(resnet.to(dtype), policy and policy.to(dtype), dtype)
    x = torch.rand(3, 3, 32, 32, dtype=dtype)
    before = models.predict(fast, decide, x)
    modules = [module for module in (resnet, policy) if module is not None]
    with torch.no_grad():
        for tensor in (t for m in modules for t in (*m.parameters(), *m.buffers())):
            tensor.add_(1)
    assert all(map(torch.equal, before, models.predict(fast, decide, x)))


def test_a_policy_of_another_shape_is_refused():
    fast, _ = models.deploy(models.build("R14_C10")[0])
    for shape in ((4, 5), (4, 7), (3, 6), (4, 1), (6,), (2, 3, 6), (1, 2, 4, 6)):
        with pytest.raises(ValueError, match="one row an image, one column a block"):
            fast(torch.zeros(4, 3, 32, 32), torch.ones(shape))


@pytest.mark.parametrize("name", ["R14_C10", "AIG14_C10"])
def test_logits_may_go_into_a_network_that_learns(name):
    fast, policy = models.deploy(*of_greedy(name))
    logits, chosen = models.predict(fast, policy, torch.rand(2, 3, 32, 32))
    assert not logits.is_inference() and not chosen.is_inference()
    probe = nn.Linear(10, 2)
    probe(logits).sum().backward()
    assert probe.weight.grad.any()


def of_greedy(name):
    resnet, policy_net = models.build(name)
    return resnet, policy_net and GreedyPolicy(policy_net)


@pytest.mark.parametrize("name", ["R14_C10", "AIG14_C10"])
def test_a_copy_is_not_converted_and_not_saved_in_silence(name):
    fast, policy = models.deploy(*of_greedy(name))
    for network in filter(None, (fast, policy)):
        for change in (network.double, network.half, network.cpu, partial(network.to, "cpu")):
            with pytest.raises(TypeError, match="deploy that"):
                change()
        with pytest.raises(TypeError, match="save the original's"):
            network.state_dict()


@pytest.mark.parametrize("name", ["R14_C10", "AIG14_C10"])
def test_a_copy_is_copied_also_after_its_first_call(name):
    pair = models.deploy(*of_greedy(name))
    x = torch.rand(2, 3, 32, 32)
    expected = models.predict(*pair, x)
    again = copy.deepcopy(pair)
    assert all(map(torch.equal, expected, models.predict(*again, x)))


@pytest.mark.parametrize("name", ["R14_C10", "AIG14_C10"])
def test_torch_compile_leaves_a_copy_as_it_is(name):
    compiled = []

    def backend(graph, example):
        compiled.append(graph)
        return graph

    torch._dynamo.reset()
    fast, _ = models.deploy(models.build(name)[0])
    after = torch.compile(nn.Sequential(nn.Identity(), Last(fast)), backend=backend)
    x = torch.rand(4, 3, 32, 32)
    for seed in range(6):
        torch.manual_seed(seed)
        policy = (torch.rand(4, 6) < 0.5).float()
        given = (x,) if fast.decides else (x, policy)
        expected = fast(*given)
        expected = expected[0] if fast.decides else expected
        torch.testing.assert_close(after(given), expected + 1)
    operators = {node.target for graph in compiled for node in graph.graph.nodes}
    assert not any("conv" in str(operator) for operator in operators)


class Last(nn.Module):
    """A network and something after it, which is compiled."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, given):
        logits = self.network(*given)
        return (logits[0] if isinstance(logits, tuple) else logits) + 1


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("name", ["R14_C10", "AIG14_C10"])
def test_what_depends_on_the_image_is_not_traced(name, deployed):
    network = models.build(name)[0].eval()
    network = models.deploy(network)[0] if deployed else network
    x = torch.rand(2, 3, 32, 32)
    given = (x,) if network.decides else (x, torch.ones(2, 6))
    with pytest.raises(RuntimeError, match="wrong for every other policy"):
        torch.jit.trace(network, given)


def test_masked_execution_is_traced_for_every_policy():
    resnet = random_norms(models.build("R14_C10")[0]).float().eval()
    resnet.execution = "masked"
    x = torch.rand(3, 3, 32, 32)
    traced = torch.jit.trace(resnet, (x, torch.zeros(3, 6)))
    for policy in (torch.ones(3, 6), (torch.rand(3, 6) < 0.5).float()):
        torch.testing.assert_close(traced(x, policy), resnet(x, policy))


@pytest.mark.parametrize("name", ["R14_C10", "R50_ImgNet"])
def test_torchs_counter_counts_a_copys_flops(name):
    from torch.utils.flop_counter import FlopCounterMode

    resnet, _ = models.build(name)
    resnet.eval()
    fast, _ = models.deploy(resnet)
    x = torch.rand(2, 3, 32, 32)
    policy = torch.ones(2, resnet.num_blocks)
    policy[0, 1::2] = 0
    found = []
    for network in (resnet, fast):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x, policy)
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 1e6


def test_sizes_of_images_do_not_add_up():
    resnet, _ = models.build("R14_C10")
    fast, _ = models.deploy(resnet.eval())
    if not fast.conv1.onednn:
        pytest.skip("no fused convolutions here")
    with torch.no_grad():
        for side in range(8, 96, 4):
            x = torch.rand(2, 3, side, side)
            torch.testing.assert_close(fast(x), resnet(x), rtol=1e-4, atol=1e-4)
    assert len(fast.conv1.packed) == len(fast.blocks[3].convs[0].packed) == deployed_block.PACKINGS


def test_a_copy_shares_no_pooling():
    resnet, policy_net = models.build("R18_Folder", 10)
    fast, policy = models.deploy(resnet.eval(), GreedyPolicy(policy_net))
    x = torch.rand(2, 3, 64, 64)
    before, chosen = fast(x), policy(x)
    resnet.stem_pool.stride = 1
    assert torch.equal(fast(x), before) and torch.equal(policy(x), chosen)
    resnet, policy_net = models.build("R14_C10")
    policy_net.look_at(16)
    fast, policy = models.deploy(resnet.eval(), GreedyPolicy(policy_net), torch.float64)
    x = torch.rand(2, 3, 32, 32)
    before, chosen = fast(x), policy.policy_net(x)[0]
    resnet.ds[1].extra_channels = 0
    policy_net.shrink.kernel_size = 1
    assert torch.equal(fast(x), before) and torch.equal(policy.policy_net(x)[0], chosen)


def test_a_wrapped_network_is_named():
    resnet, _ = models.build("R14_C10")
    with pytest.raises(ValueError, match="not a DataParallel: of a wrapped one its .module"):
        models.deploy(nn.DataParallel(resnet))


def test_a_default_device_changes_nothing():
    resnet, _ = models.build("R14_C10")
    fast, _ = models.deploy(resnet.eval())
    x, policy = torch.rand(4, 3, 32, 32), torch.eye(6)[:4]
    expected = fast(x, policy)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.device("meta"):
            assert torch.equal(fast(x, policy), expected)
            assert not utils.shuffled(policy, 0).is_meta
    finally:
        torch.set_num_threads(threads)


def test_half_precision_is_folded_in_float32():
    torch.manual_seed(0)
    resnet = random_norms(models.build("R14_C10")[0]).bfloat16().eval()
    exact = copy.deepcopy(resnet).double()
    fast, _ = models.deploy(resnet)
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(fast(x).double(), exact(x.double()), rtol=1e-4, atol=1e-4)
