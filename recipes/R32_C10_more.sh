#!/bin/sh
# Beside the main checkpoints of R32_C10: its trade-off curve, a second seed, static baselines.
# Run R32_C10.sh first, or name its results with OUT.
MODEL=R32_C10
. recipes/common.sh
BASE=$OUT/base
TRAIN="--max_epochs 12 --resnet_lr 0.05 --distill 0.5 --schedule cosine --recalibrate"
POLICY="--pretrained $OUT/stage1/last.t7 --lr 3e-4 --alpha_end 0.98"

for penalty in -1 -3 -10 -30; do
    stage "penalty$penalty" finetune --base "$BASE" $TRAIN $POLICY --penalty $penalty
    profile "penalty$penalty" --load "$OUT/penalty$penalty"
done
stage seed1 finetune --base "$BASE" $TRAIN $POLICY --penalty -2 --penalty_end -6 --seed 1
profile seed1 --load "$OUT/seed1"

for kind in first random distribute; do
    for keep in 10 7; do
        profile "$kind$keep" --base "$BASE" --policy $kind:$keep
    done
    stage "${kind}7_tuned" finetune --base "$BASE" $TRAIN --policy $kind:7
    profile "${kind}7_tuned" --load "$OUT/${kind}7_tuned"
done
