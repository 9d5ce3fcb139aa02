#!/bin/sh
# MNN 3.6.1 (Python): Var.read() gives a numpy array that is a view of memory which the network's next
# forward writes over. Outputs gathered in a list so, image by image, all end up as the last image's,
# in silence. Seen: of a network y = 2 x the array that was read for x = 1 says 6 after forward(x = 3);
# a copy still says 2.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet MNN==3.6.1 onnx==1.23.2 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import subprocess
import sys

import MNN.expr as expr
import MNN.nn as nn
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

graph = helper.make_graph(
    [helper.make_node("Mul", ["x", "two"], ["y"], "twice")],
    "g",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
    [numpy_helper.from_array(np.array([2], np.float32), "two")],
)
opset = [helper.make_opsetid("", 17)]
onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), "twice.onnx")
convert = "from MNN.tools import mnnconvert; mnnconvert.main()"
options = "-f ONNX --modelFile twice.onnx --MNNModel twice.mnn --bizCode x".split()
subprocess.run([sys.executable, "-c", convert, *options], check=True, capture_output=True)
net = nn.load_module_from_file("twice.mnn", ["x"], ["y"])


def run(value):
    x = expr.placeholder([1, 4], expr.NCHW, expr.float)
    x.write(np.full((1, 4), value, np.float32))
    return net.forward([x])[0].read()


first = run(1.0)
copy = first.copy()
run(3.0)
print(f"read for x = 1: {copy[0, 0]:g}, the same array after x = 3: {first[0, 0]:g}")
sys.exit(0 if copy[0, 0] == 2 and first[0, 0] != 2 else 1)
END
