# What the recipes share. They are run from the repository's root, by `make reproduce MODEL=...`, and
# go on where they were interrupted when they are run again.
set -eu
PYTHON=${PYTHON:-python}
# bfloat16 halves the time where the processor multiplies it in hardware, and only there
PRECISION=${PRECISION:-$(grep -qs bf16 /proc/cpuinfo && echo bf16 || echo fp32)}
# another SEED has a directory of its own
OUT=${OUT:-cv/reproduce/$MODEL${SEED:+_seed$SEED}}

# stage NAME SCRIPT OPTIONS...: one training, into $OUT/NAME
stage() {
    name=$1 script=$2
    shift 2
    echo "== $name"
    "$PYTHON" "$script.py" --model "$MODEL" --precision "$PRECISION" --seed "${SEED:-0}" \
        --cv_dir "$OUT/$name" --resume "$@"
}

# profile NAME OPTIONS...: test.py's figures, into $OUT/NAME.json
profile() {
    name=$1
    shift
    echo "== $name"
    "$PYTHON" test.py --model "$MODEL" --precision "$PRECISION" --json "$OUT/$name.json" "$@"
}

