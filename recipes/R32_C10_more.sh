#!/bin/sh
# Beside the main checkpoints of R32_C10: its trade-off curve, static baselines.
# Run R32_C10.sh first, or name its results with OUT.
MODEL=R32_C10
. recipes/common.sh
LEARN="--base $OUT/base --distill 0.5 --schedule cosine --recalibrate"
POLICY="--pretrained $OUT/stage1/last.t7 --max_epochs 6 --batch_size 256 --lr 2e-4
    --resnet_lr 0.05 --alpha 0.9 --alpha_end 0.97"

for penalty in -1 -3 -10 -30; do
    stage "penalty$penalty" finetune $LEARN $POLICY --penalty $penalty
    profile "penalty$penalty" --load "$OUT/penalty$penalty"
done

# Static policies: as the base is, and after as many epochs as a point of the curve has.
for kind in first random distribute; do
    for keep in 10 9 8 7; do
        profile "$kind$keep" --base "$OUT/base" --policy $kind:$keep
    done
    stage "${kind}8_tuned" finetune $LEARN --policy $kind:8 --max_epochs 6 --batch_size 256 \
        --resnet_lr 0.05
    profile "${kind}8_tuned" --load "$OUT/${kind}8_tuned"
done

# One static policy for as long as the recipe trains the ResNet alone in its first round.
stage distribute7_long finetune $LEARN --policy distribute:7 --max_epochs 30 --batch_size 128 \
    --resnet_lr 0.1
profile distribute7_long --load "$OUT/distribute7_long"
table
