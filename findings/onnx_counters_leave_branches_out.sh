#!/bin/sh
# Two counters of ONNX files at an If. onnx_opcounter 0.0.4 takes as many multiply-adds for it as its output
# has numbers, whatever its branches compute, and prints that the operator is unsupported; parameters are
# counted in full. onnx-tool 1.0.1 raises NotImplementedError. Seen: a convolution of 589,824 multiply-adds
# counts so where it stands in the graph, and 8,192 where it is the branch of an If that the image takes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6 onnx-tool==1.0.1 onnx_opcounter==0.0.4 tabulate==0.9.0
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import sys

import numpy as np
import onnx
import onnx_tool
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx_opcounter import calculate_macs, calculate_params

rng = np.random.default_rng(0)
shape = [1, 8, 32, 32]


def value(name, *sizes):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)


def weight(name, *sizes):
    return numpy_helper.from_array(rng.standard_normal(sizes).astype(np.float32), name)


def conv(x, w, y):
    return helper.make_node("Conv", [x, w], [y], pads=[1] * 4, kernel_shape=[3, 3])


def written(name, *middle, more=()):
    given, out = value("image", 1, 3, 32, 32), value("y", *shape)
    nodes = [conv("image", "w0", "x"), *middle]
    weights = [weight("w0", 8, 3, 3, 3), weight("w1", 8, 8, 3, 3), *more]
    graph = helper.make_graph(nodes, "g", [given], [out], weights)
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(file, full_check=True)
    onnx.save(file, name)
    onnxruntime.InferenceSession(name).run(None, {"image": image})
    return file


image = np.ones((1, 3, 32, 32), np.float32)
then = helper.make_graph([conv("x", "w1", "kept")], "then", [], [value("kept", *shape)])
pass_on = helper.make_node("Identity", ["x"], ["dropped"])
otherwise = helper.make_graph([pass_on], "else", [], [value("dropped", *shape)])
keep = numpy_helper.from_array(np.array(True), "keep")
choose = helper.make_node("If", ["keep"], ["y"], then_branch=then, else_branch=otherwise)
flat = written("flat.onnx", conv("x", "w1", "y"))
chooses = written("chooses.onnx", choose, more=[keep])


def profiled(name):
    try:
        onnx_tool.model_profile(name, {"image": image}, None, hidden_ops=None)
        return True
    except NotImplementedError as error:
        print(error)
        return False


counted = [int(calculate_macs(file)) for file in (flat, chooses)]
weights = [int(calculate_params(file)) for file in (flat, chooses)]
found = counted, weights, profiled("flat.onnx"), profiled("chooses.onnx")
print(found)
stem, block, numbers = 3 * 8 * 9 * 1024, 8 * 8 * 9 * 1024, 8 * 1024
expected = ([stem + block, stem + numbers], [792, 793], True, False)
sys.exit(0 if found == expected else 1)
END
