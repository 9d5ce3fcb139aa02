#!/bin/sh
# onnx 1.23.2: the version converter takes Hardmax from opset 12 to 13 as it stands, though its meaning
# changed there: before, the axes from `axis` on are one row with one winner; after, `axis` alone is. The
# file is valid and chooses otherwise, without a word. Softmax and LogSoftmax, which changed in the same
# way, are converted rightly. Seen, in ONNX Runtime 1.31.1: of a 1x2x2 tensor one winner before, two after.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, version_converter

x = np.array([[[1, 2], [3, 4]]], np.float32)


def tensor(name):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape)


def run(model):
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0].round(3).tolist()


def before_and_after(kind):
    graph = helper.make_graph([helper.make_node(kind, ["x"], ["y"])], "g", [tensor("x")], [tensor("y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 12)], ir_version=7)
    return run(model), run(version_converter.convert_version(model, 13))


seen = {kind: before_and_after(kind) for kind in ("Softmax", "LogSoftmax", "Hardmax")}
for kind, (before, after) in seen.items():
    print(kind, before, after)
same = [before == after for before, after in seen.values()]
wrong = seen["Hardmax"] == ([[[0, 0], [0, 1]]], [[[0, 1], [0, 1]]])
sys.exit(0 if same == [True, True, False] and wrong else 1)
END
