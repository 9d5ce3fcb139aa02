#!/bin/sh
# onnxruntime 1.31.1: in a profile the time of an If holds the times of the nodes in its branch, which are
# listed as well, side by side and with the same category. A table of times by operator, as is usually made
# of a profile, so adds up to nearly twice the run. Seen: two matrix products in the branch of an If, the
# nodes' times add up to 1.9 to 2.0 times model_run.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import json
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

SIZE = 1000


def tensor(name, kind=TensorProto.FLOAT, shape=(64, SIZE)):
    return helper.make_tensor_value_info(name, kind, shape)


weight = numpy_helper.from_array(np.ones((SIZE, SIZE), np.float32), "weight")
first = helper.make_node("MatMul", ["x", "weight"], ["between"], "first")
second = helper.make_node("MatMul", ["between", "weight"], ["kept"], "second")
then = helper.make_graph([first, second], "then", [], [tensor("kept")])
otherwise = helper.make_graph([helper.make_node("Identity", ["x"], ["dropped"])], "else", [], [tensor("dropped")])
choose = helper.make_node("If", ["keep"], ["y"], "if", then_branch=then, else_branch=otherwise)
inputs = [tensor("x"), tensor("keep", TensorProto.BOOL, [1])]
graph = helper.make_graph([choose], "g", inputs, [tensor("y")], [weight])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
onnx.checker.check_model(model, full_check=True)

options = onnxruntime.SessionOptions()
options.enable_profiling = True
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(model.SerializeToString(), options)
for _ in range(5):
    session.run(None, {"x": np.ones((64, SIZE), np.float32), "keep": np.array([True])})
with open(session.end_profiling()) as file:
    events = json.load(file)
nodes = [event for event in events if event.get("cat") == "Node"]
names = {event["args"]["op_name"] for event in nodes}
run = sum(event["dur"] for event in events if event["name"] == "model_run")
ratio = sum(event["dur"] for event in nodes) / run
print(sorted(names), "nodes / run:", round(ratio, 2))
sys.exit(0 if names == {"If", "MatMul"} and 1.8 < ratio < 2.05 else 1)
END
