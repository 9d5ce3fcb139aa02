#!/bin/sh
# nncf 3.4.0 quantizes the branches of an If of an OpenVINO model, each with the calibration images
# that take it. Where none of them takes a branch that has a convolution, quantize() gives up the whole
# model with "Calibration dataset must not be empty", though its data set is not; the error names no
# node. A network that drops some block for every calibration image cannot be quantized. Seen: a
# convolution in the branch for images of positive mean; with four such images the branch has a
# FakeQuantize, with four of negative mean (openvino 2026.4.1) the error comes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet nncf==3.4.0 openvino==2026.4.1 onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" - "$folder/model.onnx" <<'END'
import sys

import nncf
import numpy as np
import onnx
import openvino
from onnx import TensorProto, helper, numpy_helper

SHAPE = [1, 3, 8, 8]


def branch(name, node):
    result = helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE)
    return helper.make_graph([node], name + "_branch", [], [result])


weight = np.random.default_rng(0).standard_normal((3, 3, 3, 3)).astype(np.float32)
kept = branch("kept", helper.make_node("Conv", ["image", "weight"], ["kept"], pads=[1, 1, 1, 1]))
dropped = branch("dropped", helper.make_node("Identity", ["image"], ["dropped"]))
graph = helper.make_graph(
    [
        helper.make_node("ReduceMean", ["image"], ["mean"], keepdims=0),
        helper.make_node("Greater", ["mean", "zero"], ["keep"]),
        helper.make_node("If", ["keep"], ["result"], then_branch=kept, else_branch=dropped),
    ],
    "block",
    [helper.make_tensor_value_info("image", TensorProto.FLOAT, SHAPE)],
    [helper.make_tensor_value_info("result", TensorProto.FLOAT, SHAPE)],
    [
        numpy_helper.from_array(weight, "weight"),
        numpy_helper.from_array(np.zeros((), np.float32), "zero"),
    ],
)
file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
onnx.checker.check_model(file, full_check=True)
onnx.save(file, sys.argv[1])


def quantized(sign):
    """How many FakeQuantize nodes the branch has, or the error."""
    model = openvino.Core().read_model(sys.argv[1])
    images = [np.full(SHAPE, sign, np.float32) for _ in range(4)]
    try:
        model = nncf.quantize(model, nncf.Dataset(images), subset_size=len(images))
    except nncf.ValidationError as error:
        return str(error)
    (node,) = (op for op in model.get_ops() if op.get_type_name() == "If")
    return sum(op.get_type_name() == "FakeQuantize" for op in node.get_function(0).get_ops())


taken, untaken = quantized(1), quantized(-1)
print("taken:", taken, "never taken:", untaken)
sys.exit(0 if taken == 1 and "Calibration dataset must not be empty" in str(untaken) else 1)
END
