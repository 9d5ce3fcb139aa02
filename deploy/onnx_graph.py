"""The networks as an ONNX graph for one image, in which a dropped block is not computed.

Blocks that may be dropped stand in the branch of an `If`, which ONNX Runtime and OpenVINO evaluate
for real. With several images an `If` could not tell them apart: batches are for `deploy`.
BatchNorm is folded into the convolutions. Needs the package onnx, so nothing that
trainings need imports this module.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

import utils
from models import Config, GatedResNet, PenaltyPolicy, ResNet, StaticPolicy
from models.aig import CLOSED, OPEN, Gate
from models.policy import SURELY_NOT, Halve
from models.resnet import PoolAndPad, SubsampleAndPad

from . import reading
from .int8 import Range, Ranges, weight_scales

OPSETS = range(13, 24)  # `Split` takes its sizes as an input from 13 on
DEFAULT_OPSET = 17

Fixed = Sequence[bool | None]  # for each block: always kept, never, or as the image decides

# A block's number and its input's name, to the name of a bool tensor of one element, or to a bool
# where the decision is known beforehand.
Decide = Callable[[int, str], str | bool]


def build(
    resnet: ResNet | GatedResNet,
    policy: nn.Module | None,
    config: Config,
    opset: int = DEFAULT_OPSET,
    ranges: Ranges | None = None,
    penalty_input: bool = False,
    fixed: Fixed | None = None,
) -> onnx.ModelProto:
    """An image, uint8 (1, H, W, 3) in RGB, to `logits` (1, classes) and its `policy` (1, K).

    With `penalty_input` there is a second input, `penalty`, float32 (1,), for which a
    `PenaltyPolicy` chooses, whatever its own is. It has no default: runtimes differ in whether a
    value that is given then counts. Blocks that are `fixed` are run or left out for every image,
    whatever decides for the others.
    The policy module decides, or ConvNet-AIG's gates, which take none: None. Blocks that a
    `StaticPolicy` drops are left out. Networks are read in evaluation mode. With `ranges` the
    convolutions that were observed compute in int8. Raises ValueError for an opset that lacks an
    operator.
    """
    if opset not in OPSETS:
        raise ValueError(f"opset {opset}: take one of {OPSETS[0]} to {OPSETS[-1]}")
    graph = Graph(ranges)
    with torch.no_grad(), utils.evaluating(resnet, policy):
        x = pixels(graph, config)
        if resnet.decides:
            logits, chosen = gated(graph, resnet, x, config.image_size, fixed)
        else:
            decide, chosen = decision(graph, policy, x, config.image_size, penalty_input, fixed)
            runs = runs_of(resnet, policy)
            logits = network(graph, resnet, x, config.image_size, decide, runs=runs)
    graph.add("Identity", logits, output="logits")
    graph.add("Identity", chosen, output="policy")
    size = config.image_size
    image = helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, [1, size, size, 3])
    outputs = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, columns])
        for name, columns in (("logits", config.num_classes), ("policy", config.num_blocks))
    ]
    inputs = [image]
    if penalty_input:
        inputs.append(helper.make_tensor_value_info("penalty", onnx.TensorProto.FLOAT, [1]))
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(
        graph.finish(config.name, inputs, outputs),
        opset_imports=imports,
        # the newest would shut out every runtime older than the package onnx
        ir_version=helper.find_min_ir_version_for(imports),
        producer_name="BlockDrop",
    )


class Graph:
    """Nodes and constants in the making; a branch of an `If` also sees its surroundings' names."""

    def __init__(self, ranges: Ranges | None = None, taken: set[str] | None = None):
        self.ranges = Ranges() if ranges is None else ranges
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.taken = {"image", "penalty", "logits", "policy"} if taken is None else taken

    def branch(self) -> "Graph":
        return Graph(self.ranges, self.taken)

    def name(self, wanted: str) -> str:
        """That name, with a number where it is taken: names differ across all branches."""
        name, number = wanted, 1
        while name in self.taken:
            name, number = f"{wanted}_{number}", number + 1
        self.taken.add(name)
        return name

    def add(self, kind: str, *inputs: str, output: str | None = None, **attributes) -> str:
        """A node of one output, whose name is returned."""
        output = output or self.name(kind.lower())
        self.add_several(kind, inputs, [output], **attributes)
        return output

    def add_several(
        self, kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes
    ) -> None:
        """A node of several outputs; it is called as the first of them."""
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=outputs[0], **attributes))

    def constant(self, value: Tensor | np.ndarray | float, name: str = "constant") -> str:
        value = value.numpy(force=True) if isinstance(value, Tensor) else np.asarray(value)
        value = value.astype(np.float32) if value.dtype == np.float64 else value
        name = self.name(name)
        value = np.asarray(value, order="C")  # not ascontiguousarray, which makes one axis of none
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def choose(
        self,
        condition: str,
        then: "Graph",
        kept: str,
        other: "Graph",
        dropped: str,
        shape: Sequence[int],
    ) -> str:
        """One of two branches, by a bool tensor of one element, with the output that it names, of
        this shape.
        """
        branches = {}
        for attribute, graph, output in (
            ("then_branch", then, kept),
            ("else_branch", other, dropped),
        ):
            value = helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, shape)
            branches[attribute] = graph.finish(self.name(attribute), [], [value])
        return self.add("If", condition, **branches)

    def finish(self, name: str, inputs: Sequence, outputs: Sequence) -> onnx.GraphProto:
        return helper.make_graph(self.nodes, name, inputs, outputs, self.constants)


def pixels(graph: Graph, config: Config) -> str:
    """The image (1, H, W, 3) of bytes as the networks want it, normalised, (1, 3, H, W)."""
    mean, std = (torch.tensor(v) * 255 for v in (config.mean, config.std))
    x = graph.add("Cast", "image", to=onnx.TensorProto.FLOAT)
    x = graph.add("Sub", x, graph.constant(mean)) if mean.any() else x
    x = graph.add("Div", x, graph.constant(std))
    return graph.add("Transpose", x, perm=[0, 3, 1, 2])


def conv(graph: Graph, x: str, layer: nn.Conv2d, norm: nn.BatchNorm2d, sums: bool = False) -> str:
    """A convolution with its BatchNorm folded in, in double precision.

    In int8 where its ranges are known. Runtimes fuse it with what rounds its output: that is the
    next convolution, or, where the output goes into a sum (`sums`), a rounding of its own.
    """
    weight, bias = reading.folded(layer, norm, torch.float64)
    pads, strides = list(layer.padding) * 2, list(layer.stride)
    geometry = {"kernel_shape": list(layer.kernel_size), "pads": pads, "strides": strides}
    if layer not in graph.ranges:
        weight, bias = graph.constant(weight, "weight"), graph.constant(bias, "bias")
        return graph.add("Conv", x, weight, bias, **geometry)
    step, _ = graph.ranges[layer].scale()
    steps = weight_scales(weight, bias, step)
    weight = stored(graph, weight, steps, np.int8)
    bias = stored(graph, bias, steps * step, np.int32)
    x = graph.add("Conv", rounded(graph, x, graph.ranges[layer]), weight, bias, **geometry)
    return rounded(graph, x, graph.ranges[norm]) if sums else x


def rounded(graph: Graph, x: str, seen: Range) -> str:
    """Numbers rounded to uint8, as what they stand for."""
    step, zero = seen.scale()
    scale = graph.constant(np.float32(step), "step"), graph.constant(np.uint8(zero), "zero")
    return graph.add("DequantizeLinear", graph.add("QuantizeLinear", x, *scale), *scale)


def stored(graph: Graph, value: Tensor, steps: Tensor, kind: type) -> str:
    """Weights kept as whole numbers, with a step for each output channel."""
    whole = (value / steps.view(-1, *[1] * (value.ndim - 1))).round()
    whole = graph.constant(whole.numpy(force=True).astype(kind), "whole")
    zeros = graph.constant(np.zeros(len(steps), kind), "zeros")
    return graph.add("DequantizeLinear", whole, graph.constant(steps, "steps"), zeros, axis=0)


def linear(graph: Graph, x: str, layer: tuple[Tensor, Tensor]) -> str:
    """A linear layer of this weight and bias."""
    weight, bias = graph.constant(layer[0], "weight"), graph.constant(layer[1], "bias")
    return graph.add("Gemm", x, weight, bias, transB=1)


def average(graph: Graph, x: str, side: int) -> str:
    return graph.add("AveragePool", x, kernel_shape=[side] * 2, strides=[side] * 2)


def refuse_others(module: nn.Module, *known: nn.Module) -> None:
    """Raise ValueError for a pooling that is none of those known."""
    if repr(module) not in map(repr, known):
        raise ValueError(f"no ONNX form of {' '.join(repr(module).split())} is known")
    reading.check(module, tuple(type(other) for other in known))


def shortcut_of(graph: Graph, x: str, shortcut: nn.Module) -> str:
    projection = reading.shortcut_layers(shortcut)
    if isinstance(shortcut, nn.Identity):
        return x
    if isinstance(shortcut, PoolAndPad):
        pads = np.array([0, 0, 0, 0, 0, shortcut.extra_channels, 0, 0])
        return graph.add("Pad", average(graph, x, 2), graph.constant(pads, "pads"))
    if isinstance(shortcut, SubsampleAndPad):
        pads = np.array([0, shortcut.before, 0, 0, 0, shortcut.behind, 0, 0])
        # a mean of one pixel each: every runtime knows that kernel
        x = graph.add("AveragePool", x, kernel_shape=[1, 1], strides=[2, 2])
        return graph.add("Pad", x, graph.constant(pads, "pads"))
    return conv(graph, x, *projection, sums=True)


def kept(graph: Graph, x: str, shortcut: str, branch: nn.Module) -> str:
    """relu(shortcut + F(x))."""
    *first, last = reading.convolutions(branch)
    for layers in first:
        x = graph.add("Relu", conv(graph, x, *layers))
    x = conv(graph, x, *last, sums=True)
    return graph.add("Relu", graph.add("Add", x, shortcut))


def kept_run(graph: Graph, x: str, shortcut: str, branches: Sequence[nn.Module]) -> str:
    """Blocks one after another, all but the first with an identity for a shortcut."""
    x = kept(graph, x, shortcut, branches[0])
    for branch in branches[1:]:
        x = kept(graph, x, x, branch)
    return x


def runs_of(resnet: ResNet, policy: nn.Module) -> list[int]:
    """Lengths of the runs of blocks that are always kept or dropped together.

    An `If` costs as much as a small convolution, and one serves a whole run. Blocks are alike in
    all candidates of a policy that chooses among some. A shortcut that computes begins a run.
    """
    runs: list[int] = []
    chooses = isinstance(policy, PenaltyPolicy)
    for k, (_, shortcut) in enumerate(resnet.units()):
        alike = k > 0 and chooses and isinstance(shortcut, nn.Identity)
        if alike and policy.confidence.candidates[:, k - 1 : k + 1].diff().eq(0).all():
            runs[-1] += 1
        else:
            runs.append(1)
    return runs


def network(
    graph: Graph,
    resnet: ResNet,
    x: str,
    side: int,
    decide: Decide | None = None,
    relu_dropped: bool = False,
    runs: Sequence[int] | None = None,
) -> str:
    """Logits (1, classes), or pooled features where there is no classifier, of an image's name.

    side: of the image, in pixels.
    `relu_dropped`: a dropped block's shortcut is followed by a relu (ConvNet-AIG). The first block
    of each run decides for the others.
    """
    reading.check_resnet(resnet)
    refuse_others(resnet.stem_pool, nn.Identity(), nn.MaxPool2d(3, 2, 1))
    x = graph.add("Relu", conv(graph, x, resnet.conv1, resnet.bn1))
    side = -(-side // resnet.conv1.stride[0])
    if isinstance(resnet.stem_pool, nn.MaxPool2d):
        x = graph.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        side = -(-side // 2)
    units = list(resnet.units())
    first = 0
    for run in runs or [1] * len(units):
        keep = True if decide is None else decide(first, x)
        s = shortcut_of(graph, x, units[first][1])
        branches = [branch for branch, _ in units[first : first + run]]
        first += run
        convs = [part for part in branches[0].children() if isinstance(part, nn.Conv2d)]
        side = -(-side // math.prod(layer.stride[0] for layer in convs))
        has_relu = relu_dropped and s != x
        if isinstance(keep, bool):
            dropped = graph.add("Relu", s) if has_relu and not keep else s
            x = kept_run(graph, x, s, branches) if keep else dropped
            continue
        then, other = graph.branch(), graph.branch()
        # some runtimes read what lies outside a branch once, and want its output made inside
        inside = {name: then.add("Identity", name) for name in dict.fromkeys((x, s))}
        computed = then.add("Identity", kept_run(then, inside[x], inside[s], branches))
        dropped = other.add("Relu" if has_relu else "Identity", s)
        shape = (1, convs[-1].out_channels, side, side)
        x = graph.choose(keep, then, computed, other, dropped, shape)
    x = graph.add("Flatten", graph.add("GlobalAveragePool", x))
    return x if resnet.fc is None else linear(graph, x, reading.linear(resnet.fc))


def decision(
    graph: Graph,
    policy: nn.Module,
    x: str,
    size: int,
    penalty_input: bool = False,
    fixed: Fixed | None = None,
) -> tuple[Decide, str]:
    """How each block is decided before the ResNet begins, and the name of the policy (1, K)."""
    if isinstance(policy, StaticPolicy):
        kept = policy.policy.bool().tolist()
        return lambda k, x: kept[k], graph.constant(policy.policy.float()[None], "static")
    reading.check_policy(policy)
    policy_net = policy.policy_net
    looked_at, side = shrunk(graph, x, policy_net.shrink, size)
    features = network(graph, policy_net.features, looked_at, side)
    count = policy_net.num_blocks
    known = list(fixed or [None] * count)
    if isinstance(policy, PenaltyPolicy):
        chosen = best_candidate(graph, features, policy, penalty_input)
        keep = graph.add("Cast", chosen, to=onnx.TensorProto.BOOL)
        always = policy.confidence.candidates.bool().all(0).tolist()
        known = [True if kept else value for kept, value in zip(always, known, strict=True)]
    else:  # the most probable policy: sigmoid(z) >= 1/2
        z = linear(graph, features, reading.linear(policy_net.logit))
        keep = graph.add("GreaterOrEqual", z, graph.constant(np.float32(0), "zero"))
        chosen = graph.add("Cast", keep, to=onnx.TensorProto.FLOAT)
    blocks = [graph.name(f"keep_{k}") for k in range(count)]
    flat = graph.add("Reshape", keep, graph.constant(np.array([count]), "shape"))
    sizes = graph.constant(np.ones(count, np.int64), "sizes")
    graph.add_several("Split", [flat, sizes], blocks)
    if fixed is not None:  # the policy tells what runs
        varies = graph.constant(np.array([[value is None for value in fixed]]), "varies")
        instead = graph.constant(np.array([[float(bool(value)) for value in fixed]], np.float32))
        chosen = graph.add("Where", varies, chosen, instead)
    return lambda k, x: blocks[k] if known[k] is None else known[k], chosen


def shrunk(graph: Graph, x: str, shrink: nn.Module, size: int) -> tuple[str, int]:
    """The image as the policy network looks at it, and its side."""
    refuse_others(shrink, nn.Identity(), nn.AvgPool2d(2), Halve())
    halves = isinstance(shrink, nn.AvgPool2d) or (isinstance(shrink, Halve) and size > 112)
    return (average(graph, x, 2), size // 2) if halves else (x, size)


def best_candidate(
    graph: Graph, features: str, policy: PenaltyPolicy, penalty_input: bool = False
) -> str:
    """The policy (1, K) of largest expected reward (Eq. 3) at the policy's penalty, or at the one
    that is given with the image.
    """
    head, penalty = policy.confidence, policy.penalty
    classes = linear(graph, features, reading.linear(head.classes))
    largest = graph.constant(np.array([head.largest]), "largest")
    sure, order = graph.name("sure"), graph.name("order")
    log_probs = graph.add("LogSoftmax", classes, axis=1)
    graph.add_several("TopK", [log_probs, largest], [sure, order])
    sure = graph.add("Max", sure, graph.constant(np.float32(SURELY_NOT), "surely_not"))
    hidden = graph.add("Relu", linear(graph, sure, reading.linear(head.hidden)))
    right = graph.add("Sigmoid", linear(graph, hidden, reading.linear(head.linear)))
    # the expected reward is linear in the probability of being right
    right_earns = utils.reward_if_right(head.candidates)
    if penalty_input:
        wrong_earns = "penalty"
        gain = graph.add("Sub", graph.constant(right_earns, "reward"), "penalty")
    else:
        wrong_earns = graph.constant(torch.full_like(right_earns, penalty), "floor")
        gain = graph.constant(right_earns - penalty, "gain")
    reward = graph.add("Add", graph.add("Mul", right, gain), wrong_earns)
    chosen = graph.add("ArgMax", reward, axis=1, keepdims=0)
    return graph.add("Gather", graph.constant(head.candidates.float(), "candidates"), chosen)


def gated(
    graph: Graph, net: GatedResNet, x: str, side: int, fixed: Fixed | None = None
) -> tuple[str, str]:
    """Logits and the gates (1, K) of a ConvNet-AIG; each gate looks at its block's input."""
    reading.check_gated(net)
    gates: list[str] = []

    def decide(k: int, x: str) -> str | bool:
        known = True if k in net.always_on else fixed[k] if fixed else None
        if known is not None:
            gates.append(graph.constant(np.array([known]), "known"))
            return known
        gates.append(is_open(graph, net.gates[k], x))
        return gates[-1]

    logits = network(graph, net.resnet, x, side, decide, relu_dropped=True)
    keep = graph.add("Concat", *gates, axis=0)
    row = graph.constant(np.array([1, net.num_blocks]), "shape")
    policy = graph.add("Cast", keep, to=onnx.TensorProto.FLOAT)
    return logits, graph.add("Reshape", policy, row)


def is_open(graph: Graph, gate: Gate, x: str) -> str:
    """Whether the logit of executing is the larger one: bool (1,), as OpenVINO wants it."""
    if type(gate) is not Gate:
        raise ValueError(f"no ONNX form of {type(gate).__name__} is known")
    first, (weight, bias) = reading.gate_layers(gate, torch.float64)
    pooled = graph.add("Flatten", graph.add("GlobalAveragePool", x))
    hidden = graph.add("Relu", linear(graph, pooled, first))
    weight = graph.constant((weight[OPEN] - weight[CLOSED])[None], "weight")
    # not a product with a vector, which not all runtimes know
    z = graph.add("Gemm", hidden, weight, transB=1)
    z = graph.add("Reshape", z, graph.constant(np.array([1]), "shape"))
    bound = graph.constant((bias[CLOSED] - bias[OPEN]).view(1), "bound")
    return graph.add("Greater", z, bound)
