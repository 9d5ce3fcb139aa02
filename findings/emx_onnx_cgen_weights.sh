#!/bin/sh
# emx-onnx-cgen 1.4.0: the C source that `compile` writes runs without its weights, in silence. Above
# a size (--large-weight-threshold) it leaves weights out of the source and writes them to a .bin
# beside it, which model_load(path) reads. A program that calls model() alone, as small models may,
# compiles, links, and gets figures of weights that are zero. Seen: a product with a 256 x 256 matrix of
# ones gives 0 in place of 256; after model_load, or compiled with --large-weight-threshold 0, 256.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet emx-onnx-cgen==1.4.0 onnx==1.23.2 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

size = 256
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
    "g",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, size])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, size])],
    [numpy_helper.from_array(np.ones((size, size), np.float32), "w")],
)
opset = [helper.make_opsetid("", 17)]
onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), "product.onnx")
END
cat > main.c <<'END'
#include <stdint.h>
#include <stdbool.h>
#include <stdio.h>
void model(const float *x, float *y);
#ifdef LOAD
_Bool model_load(const char *path);
#endif
int main(void) {
    static float x[256], y[256];
    for (int i = 0; i < 256; i++) x[i] = 1;
#ifdef LOAD
    if (!model_load("model.bin")) return 1;
#endif
    model(x, y);
    printf("%g\n", y[0]);
    return 0;
}
END
venv/bin/emx-onnx-cgen compile product.onnx product.c > /dev/null
gcc -O1 main.c product.c -lm -o alone
gcc -O1 -DLOAD main.c product.c -lm -o loaded
venv/bin/emx-onnx-cgen compile --large-weight-threshold 0 product.onnx product.c > /dev/null
gcc -O1 main.c product.c -lm -o inside
echo "weights not loaded: $(./alone), loaded: $(./loaded), in the source: $(./inside)"
test "$(./alone)" = 0 && test "$(./loaded)" = 256 && test "$(./inside)" = 256
