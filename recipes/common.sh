# What the recipes share. They are run from the repository's root, by `make reproduce MODEL=...`, and
# go on where they were interrupted when they are run again.
set -eu
PYTHON=${PYTHON:-python}
# bfloat16 halves the time where the processor multiplies it in hardware, and only there
PRECISION=${PRECISION:-$("$PYTHON" -c "from engine import device; print(device.fast_precision())")}
# another SEED has a directory of its own, and so has a rehearsal on the first SUBSET images
OUT=${OUT:-cv/reproduce/$MODEL${SEED:+_seed$SEED}${SUBSET:+_subset$SUBSET}}
ROWS=

# stage NAME SCRIPT OPTIONS...: one training, into $OUT/NAME; LIMIT is what runs it, where something does
stage() {
    name=$1 script=$2
    shift 2
    echo "== $name"
    ${LIMIT:-} "$PYTHON" "$script.py" --model "$MODEL" --precision "$PRECISION" --seed "${SEED:-0}" \
        --cv_dir "$OUT/$name" --resume ${SUBSET:+--subset "$SUBSET"} "$@"
}

# profile NAME OPTIONS...: test.py's figures, into $OUT/NAME.json and the next table
profile() {
    name=$1
    shift
    echo "== $name"
    "$PYTHON" test.py --model "$MODEL" --precision "$PRECISION" --json "$OUT/$name.json" --time \
        ${SUBSET:+--subset "$SUBSET"} "$@"
    ROWS="$ROWS $name=$OUT/$name.json"
}

# stages OPTIONS...: figures of the ResNet in $BASE and of both stages in $OUT
stages() {
    profile full --base "$BASE" "$@"
    profile stage1 --base "$BASE" --load "$OUT/stage1" "$@"
    profile stage2 --load "$OUT/stage2" "$@"
}

# table: everything profiled so far
table() {
    "$PYTHON" benchmarks/summary.py $ROWS
}
