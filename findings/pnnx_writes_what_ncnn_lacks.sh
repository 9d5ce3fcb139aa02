#!/bin/sh
# pnnx 20261020 and ncnn 1.0.20261020: pnnx ends with status 0 and writes a .ncnn.param that ncnn
# cannot load: a Cast of bytes to float becomes a layer "Tensor.to", of which ncnn has none. A script
# that goes by the exit status ships a file that never loads. Seen: status 0; Net.load_param gives -1.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ncnn==1.0.20261020 pnnx==20261020 onnx==1.23.2 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import subprocess
import sys
from pathlib import Path

import ncnn
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

graph = helper.make_graph(
    [
        helper.make_node("Cast", ["x"], ["f"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Conv", ["f", "w"], ["y"], "conv", kernel_shape=[3, 3]),
    ],
    "g",
    [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 3, 8, 8])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 6, 6])],
    [numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")],
)
opset = [helper.make_opsetid("", 17)]
onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), "bytes.onnx")
pnnx = Path(sys.executable).with_name("pnnx")
done = subprocess.run([pnnx, "bytes.onnx", "inputshape=[1,3,8,8]u8"], capture_output=True)
layers = [line.split()[0] for line in Path("bytes.ncnn.param").read_text().splitlines()[2:]]
loaded = ncnn.Net().load_param("bytes.ncnn.param")
print(f"pnnx: status {done.returncode}, layers {layers}; ncnn: load_param gives {loaded}")
sys.exit(0 if done.returncode == 0 and "Tensor.to" in layers and loaded else 1)
END
