# What the recipes share. A recipe goes on where it was interrupted when it is run again.
set -eu
PYTHON=${PYTHON:-python}
# bfloat16 halves the time where the processor multiplies it in hardware, and only there
PRECISION=${PRECISION:-$(grep -qs bf16 /proc/cpuinfo && echo bf16 || echo fp32)}
OUT=${OUT:-cv/reproduce/$MODEL}

# stage NAME SCRIPT OPTIONS...: one training, into $OUT/NAME
stage() {
    name=$1 script=$2
    shift 2
    echo "== $name"
    "$PYTHON" "$script.py" --model "$MODEL" --precision "$PRECISION" --cv_dir "$OUT/$name" --resume "$@"
}

# profile NAME OPTIONS...: test.py's figures, into $OUT/NAME.json
profile() {
    name=$1
    shift
    echo "== $name"
    "$PYTHON" test.py --model "$MODEL" --precision "$PRECISION" --json "$OUT/$name.json" "$@"
}

# the one ResNet that a pretrain stage left
base_of() {
    echo "$OUT/$1"/pk_E_*_A_*.t7
}
