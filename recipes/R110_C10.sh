#!/bin/sh
# All stages of R110_C10 from nothing.
MODEL=R110_C10
. recipes/common.sh

# A plain ResNet, then stochastic depth, so that it tolerates missing blocks.
stage plain pretrain --max_epochs 30 --batch_size 256 --lr 0.3
stage base pretrain --max_epochs 18 --batch_size 128 --lr 0.1 --block_drop 0.5 \
    --pretrained "$OUT/plain"
BASE=$OUT/base

# The policy network starts from a classifier of its own size.
stage classifier pretrain --model R8_C10 --max_epochs 25 --batch_size 256 --lr 0.4

# Stage 1: all 54 blocks are learned from the sixth epoch on. Wrong predictions cost less and less,
# which brings the policies down to fewer blocks.
CURRICULUM="--base $BASE --samples 2 --cl_blocks 9 --policy_init $(ls "$OUT"/classifier/pk_*.t7)"
stage gentle cl_training $CURRICULUM --max_epochs 11 --batch_size 256 --schedule cosine \
    --beta_end 0.01 --alpha_end 0.95 --penalty -2 --penalty_end -0.4
stage stage1 cl_training $CURRICULUM --load "$OUT/gentle" --max_epochs 14 --batch_size 128 \
    --beta 0.01 --alpha 0.93 --alpha_end 0.9625 --penalty -0.1

# Stage 2, the ResNet alone: what it lost under these policies comes back.
RESNET="--batch_size 128 --resnet_lr 0.1 --schedule cosine --recalibrate"
ALONE="--freeze_policy $RESNET"
stage stage2 finetune $ALONE --base "$BASE" --pretrained "$OUT/stage1/last.t7" --max_epochs 10 \
    --penalty -0.1

# Then the policy alone, on the ResNet that has adapted to it, and the ResNet once more.
TUNED=$OUT/stage2/last.t7
AGAIN="--batch_size 128 --samples 2 --cl_step 54 --lr 5e-4 --beta 0.01"
stage again cl_training $AGAIN --base "$TUNED" --policy_init "$TUNED" --max_epochs 2 \
    --penalty -2 --alpha 0.96 --alpha_end 0.98
stage again2 cl_training $AGAIN --base "$TUNED" --load "$OUT/again" --max_epochs 3 \
    --penalty -2 --alpha 0.98
stage again3 cl_training $AGAIN --base "$TUNED" --load "$OUT/again2" --max_epochs 4 \
    --penalty -1 --alpha 0.98
stage final finetune $ALONE --base "$TUNED" --pretrained "$OUT/again3/last.t7" --max_epochs 28 \
    --penalty -1

# A third time both, now with a teacher: the base after more epochs that drop fewer blocks.
stage base2 pretrain --max_epochs 13 --batch_size 128 --lr 0.1 --block_drop 0.2 --pretrained "$BASE"
FINAL=$OUT/final/last.t7
stage policy3 cl_training $AGAIN --base "$FINAL" --policy_init "$FINAL" --max_epochs 3 \
    --penalty -1 --alpha 0.96 --alpha_end 0.98
stage resnet3 finetune $ALONE --base "$FINAL" --pretrained "$OUT/policy3/last.t7" --penalty -1 \
    --max_epochs 9 --distill 0.9 --teacher "$OUT/base2"

# Static policies of as many blocks as stages 1 and 2 keep: on the base, and after as many epochs as
# stage 2 has.
for kind in first random distribute; do
    stage "${kind}18_tuned" finetune --base "$BASE" --policy $kind:18 --max_epochs 10 $RESNET
done

stages
profile again --base "$TUNED" --load "$OUT/again3"
profile final --load "$OUT/final"
profile base2 --base "$OUT/base2"
profile policy3 --base "$FINAL" --load "$OUT/policy3"
profile resnet3 --load "$OUT/resnet3"
for kind in first random distribute; do
    profile "${kind}18" --base "$BASE" --policy $kind:18
    profile "${kind}18_tuned" --load "$OUT/${kind}18_tuned"
done
table
