#!/bin/sh
# onnx 1.23.2: of an If, extract_model() and merge_models() with a prefix forget what its branches read
# from the graph around them. The first leaves out the nodes and initializers that only a branch reads,
# the second gives them a new name and not the reader. Both end in the checker's error about nodes that
# are not sorted, which says nothing of this. Seen: a valid file that ONNX Runtime 1.32.0 runs, whose
# branch reads a tensor and a weight from outside, is refused by both; merge_models without a prefix
# gives a file that runs.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, compose, helper, numpy_helper


def tensor(name, shape=(1, 4), kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def model(graph):
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(content):
    session = onnxruntime.InferenceSession(content.SerializeToString())
    names = [given.name for given in session.get_inputs()]
    x = np.array([[1, -2, 3, -4]], np.float32)
    return session.run(None, dict(zip(names, (x, np.array([True])))))[0].tolist()


weight = numpy_helper.from_array(np.full((1, 4), 2, np.float32), "weight")
then = helper.make_graph(
    [helper.make_node("Mul", ["outer", "weight"], ["kept"], "mul")], "then", [], [tensor("kept")]
)
pass_on = helper.make_node("Identity", ["outer"], ["dropped"], "pass")
otherwise = helper.make_graph([pass_on], "else", [], [tensor("dropped")])
choose = helper.make_node("If", ["keep"], ["y"], "if", then_branch=then, else_branch=otherwise)
inputs = [tensor("x"), tensor("keep", [1], TensorProto.BOOL)]
relu = helper.make_node("Relu", ["x"], ["outer"], "relu")
chooses = model(helper.make_graph([relu, choose], "g", inputs, [tensor("y")], [weight]))
abs_node = helper.make_node("Abs", ["i"], ["o"], "abs")
after = model(helper.make_graph([abs_node], "after", [tensor("i")], [tensor("o")]))
onnx.checker.check_model(chooses, full_check=True)
onnx.save(chooses, "chooses.onnx")


def refused(call):
    try:
        call()
    except onnx.checker.ValidationError as error:
        print(str(error).splitlines()[0])
        return True
    return False


def extract():
    onnx.utils.extract_model("chooses.onnx", "part.onnx", ["x", "keep"], ["y"])


def merge(prefix=None):
    return compose.merge_models(chooses, after, [("y", "i")], prefix1=prefix)


plain = run(chooses) == run(merge()) == [[2, 0, 6, 0]]
sys.exit(0 if plain and refused(extract) and refused(lambda: merge("a_")) else 1)
END
