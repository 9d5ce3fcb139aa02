#!/bin/sh
# onnxruntime 1.32.0: quantize_static() does not look into the branches of an If (nor says so): their
# convolutions stay in float32, while those outside get QuantizeLinear and DequantizeLinear. A network
# whose work is in branches is hardly quantized. Seen: of two equal convolutions the one outside has an
# int8 weight afterwards, the one in the branch a float32 weight and no QuantizeLinear beside it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static

shape = [1, 4, 8, 8]
rng = np.random.default_rng(0)


def convolution(source, target, weight):
    tensor = numpy_helper.from_array(rng.standard_normal((4, 4, 3, 3)).astype(np.float32), weight)
    node = helper.make_node("Conv", [source, weight], [target], target, pads=[1, 1, 1, 1])
    return node, tensor


def output(name):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


inner, inner_weight = convolution("outer", "kept", "inner_weight")
outer, outer_weight = convolution("x", "outer", "outer_weight")
then = helper.make_graph([inner], "then", [], [output("kept")], [inner_weight])
pass_on = helper.make_node("Identity", ["outer"], ["dropped"], "dropped")
otherwise = helper.make_graph([pass_on], "else", [], [output("dropped")])
choose = helper.make_node("If", ["keep"], ["y"], "if", then_branch=then, else_branch=otherwise)
inputs = [
    helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
    helper.make_tensor_value_info("keep", TensorProto.BOOL, [1]),
]
graph = helper.make_graph([outer, choose], "g", inputs, [output("y")], [outer_weight])
opset = [helper.make_opsetid("", 17)]
onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), "in.onnx")


class Pictures(CalibrationDataReader):
    def __init__(self):
        self.left = 20

    def get_next(self):
        self.left -= 1
        feed = {"x": rng.standard_normal(shape).astype(np.float32), "keep": np.array([True])}
        return feed if self.left >= 0 else None


quantize_static("in.onnx", "out.onnx", Pictures())
graph = onnx.load("out.onnx").graph
branch = next(
    attribute.g
    for node in graph.node if node.op_type == "If"
    for attribute in node.attribute if attribute.name == "then_branch"
)
kinds = TensorProto.DataType.Name
outside = {kinds(t.data_type) for t in graph.initializer if "outer_weight_q" in t.name}
inside = {kinds(t.data_type) for t in branch.initializer if "inner_weight" in t.name}
nodes = sorted(node.op_type for node in branch.node)
print("outside:", outside, "in the branch:", inside, nodes)
sys.exit(0 if outside == {"INT8"} and inside == {"FLOAT"} and "Conv" in nodes
         and "QuantizeLinear" not in nodes else 1)
END
