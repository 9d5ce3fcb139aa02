#!/bin/sh
# R110_C10 at the paper's own lengths, a day or more of a GPU: 5,000 epochs of the policy alone and
# 2,000 of both networks, on the base that comes with the repository, or another in BASE.
#
#     sh recipes/paper.sh                      goes on where it was stopped
#     SUBSET=64 sh recipes/paper.sh            on so few images, as many epochs
#     sh recipes/paper.sh --max_minutes 600    stops by itself after so long
MODEL=R110_C10
MINUTES=
if [ $# -eq 2 ] && [ "$1" = --max_minutes ]; then
    MINUTES=$2
elif [ $# -gt 0 ]; then
    echo "paper.sh: takes --max_minutes N and nothing else, not $*" >&2
    exit 2
fi
case $MINUTES in
*[!0-9]*)
    echo "paper.sh: --max_minutes $MINUTES is no whole number" >&2
    exit 2
    ;;
esac
END=$(($(date +%s) + 60 * ${MINUTES:-0}))
OUT=${OUT:-cv/paper/$MODEL${SEED:+_seed$SEED}${SUBSET:+_subset$SUBSET}}
. recipes/common.sh
BASE=${BASE:-cv/pretrained/$MODEL}

stop() {
    echo "paper.sh: $MINUTES minutes are over in $1: the same command goes on" >&2
    exit 0
}

# limited NAME SCRIPT OPTIONS...: a stage that gets SIGTERM when the time is over, and so leaves a
# checkpoint to go on from
limited() {
    if [ -n "$MINUTES" ]; then
        left=$((END - $(date +%s)))
        [ "$left" -gt 0 ] || stop "$1"
        LIMIT="timeout --foreground --signal=TERM $left"  # so that Ctrl-C reaches it
    fi
    status=0
    stage "$@" || status=$?
    case $status in
    0) ;;
    124) stop "$1" ;;
    *) exit "$status" ;;
    esac
}

limited stage1 cl_training --base "$BASE" --lr 1e-3 --batch_size 2048 --max_epochs 5000 \
    --test_every 100
limited stage2 finetune --base "$BASE" --pretrained "$OUT/stage1/last.t7" --lr 1e-4 --penalty -10 \
    --max_epochs 2000 --test_every 100

stages
table
