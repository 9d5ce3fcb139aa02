#!/bin/sh
# onnx2tf 1.29.24: to convert a model whose input is a picture it fetches sample pictures from GitHub,
# which it wants for comparing its layers with ONNX's, and fails where it cannot: no option of the
# conversion says so. A file of the sample's name in the working directory is taken instead. Seen: with
# a proxy that answers nothing the conversion of one convolution on (1, 3, 16, 16) ends with a
# connection error; with zeros in calibration_image_sample_data_20x128x128x3_float32.npy it succeeds.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx2tf==1.29.24
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

graph = helper.make_graph(
    [helper.make_node("Conv", ["x", "w"], ["y"], "conv", kernel_shape=[3, 3])],
    "g",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 14, 14])],
    [numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")],
)
opset = [helper.make_opsetid("", 17)]
onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), "conv.onnx")
END
export HTTPS_PROXY=http://127.0.0.1:9 HTTP_PROXY=http://127.0.0.1:9
convert() { PATH="$folder/venv/bin:$PATH" onnx2tf -i conv.onnx -o "$1" > "$1.log" 2>&1; }
cp conv.onnx keep.onnx  # it writes over the file that it is given
if convert alone; then echo "it converts without the network"; exit 1; fi
grep -q "calibration_image_sample_data_20x128x128x3_float32.npy" alone.log
grep -o "[A-Za-z]*ProxyError\|[A-Za-z]*ConnectionError" alone.log | sort -u | tail -n 1
cp keep.onnx conv.onnx
venv/bin/python -c "
import numpy
numpy.save('calibration_image_sample_data_20x128x128x3_float32.npy', numpy.zeros((20, 128, 128, 3), 'f'))"
convert beside
echo "with a file of that name beside it: status $?"
