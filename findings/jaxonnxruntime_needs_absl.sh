#!/bin/sh
# jaxonnxruntime 0.3.0: installed alone it cannot be imported, for it imports absl and does not name
# absl-py among what it requires. Seen: ModuleNotFoundError after pip install jaxonnxruntime; with
# absl-py it imports.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jaxonnxruntime==0.3.0 jax==0.10.2 jaxlib==0.10.2 onnx==1.23.2 numpy==2.4.6
import="import jaxonnxruntime.backend"
said=$("$folder/venv/bin/python" -c "$import" 2>&1 | tail -n 1 || true)
"$folder/venv/bin/pip" install --quiet absl-py==2.3.1
"$folder/venv/bin/python" -c "$import"
echo "alone: $said; with absl-py it imports"
test "$said" = "ModuleNotFoundError: No module named 'absl'"
