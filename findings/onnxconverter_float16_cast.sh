#!/bin/sh
# onnxconverter-common 1.16.0: convert_float_to_float16 makes an invalid file of a valid model whose
# graph casts to float32, such as one that takes bytes: it declares what the Cast gives as float16
# and leaves the Cast's attribute at float32. ONNX Runtime 1.32.0 then refuses to load it. Seen: a
# model of Cast (uint8 to float32) and Mul is refused with a type error on the output of the Cast;
# with "Cast" added to op_block_list it loads and its figures are right.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxconverter-common==1.16.0 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'END'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxconverter_common import float16

graph = helper.make_graph(
    [
        helper.make_node("Cast", ["bytes"], ["floats"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["out"], "mul"),
    ],
    "g",
    [helper.make_tensor_value_info("bytes", TensorProto.UINT8, [4])],
    [helper.make_tensor_value_info("out", TensorProto.FLOAT, [4])],
    [numpy_helper.from_array(np.array([0.5], np.float32), "scale")],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
onnx.checker.check_model(model, full_check=True)
given = {"bytes": np.arange(4, dtype=np.uint8)}


def runs(**options):
    half = float16.convert_float_to_float16(model, **options)
    try:
        session = onnxruntime.InferenceSession(half.SerializeToString())
    except Exception as error:
        print(str(error).splitlines()[0])
        return False
    print(session.run(None, given)[0])
    return True


plain = runs()
blocked = runs(op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, "Cast"])
sys.exit(0 if blocked and not plain else 1)
END
