#!/bin/sh
# All stages of R32_C10 from nothing.
MODEL=R32_C10
. recipes/common.sh

# A plain ResNet, then stochastic depth in two steps: strong, for a base that tolerates missing
# blocks, and weaker, for the accuracy of the full network.
stage plain pretrain --max_epochs 42 --batch_size 256 --lr 0.4
stage depth pretrain --max_epochs 36 --batch_size 128 --lr 0.1 --block_drop 0.4 \
    --pretrained "$OUT/plain"
stage base pretrain --max_epochs 40 --batch_size 128 --lr 0.1 --block_drop 0.25 \
    --pretrained "$OUT/depth"
BASE=$OUT/base

# The policy network starts from a classifier of its own size; one that knows classes is quicker to
# tell easy images from hard ones.
stage classifier pretrain --model R8_C10 --max_epochs 25 --batch_size 256 --lr 0.4
CURRICULUM="--base $BASE --batch_size 256 --samples 2 --cl_blocks 3 --schedule cosine
    --beta_end 0.01 --policy_init $(ls "$OUT"/classifier/pk_*.t7)"

# Stage 1 begins with a harsh penalty and goes on with a milder one, down to fewer blocks.
stage gentle cl_training $CURRICULUM --max_epochs 12 --penalty -3 --alpha_end 0.95
stage stage1 cl_training $CURRICULUM --load "$OUT/gentle" --max_epochs 20 --penalty -2.6 \
    --alpha_end 0.97
stage thrifty cl_training $CURRICULUM --load "$OUT/gentle" --max_epochs 24 --penalty -0.4 \
    --alpha_end 0.97

# Stage 2: both networks, until 6.9 blocks are left, then the ResNet alone.
LEARN="--distill 0.5 --teacher $BASE --penalty -1 --recalibrate"
stage joint finetune $LEARN --base "$BASE" --pretrained "$OUT/thrifty/last.t7" --max_epochs 4 \
    --batch_size 256 --lr 2e-4 --resnet_lr 0.1 --alpha 0.9 --alpha_end 0.921
ALONE="$LEARN --freeze_policy --batch_size 128 --schedule cosine"
stage alone finetune $ALONE --pretrained "$OUT/joint/last.t7" --max_epochs 30 --resnet_lr 0.1
stage alone2 finetune $ALONE --pretrained "$OUT/alone/last.t7" --max_epochs 20 --resnet_lr 0.05
stage stage2 finetune $ALONE --pretrained "$OUT/alone2/last.t7" --max_epochs 20 --resnet_lr 0.05

# Then the policy alone, on the ResNet that has adapted to it, and the ResNet once more.
TUNED=$OUT/stage2/last.t7
stage again cl_training --base "$TUNED" --policy_init "$TUNED" --max_epochs 2 --batch_size 128 \
    --samples 2 --cl_step 15 --lr 5e-4 --penalty -5 --alpha 0.96 --alpha_end 0.98 --beta 0.01
stage final finetune $ALONE --base "$TUNED" --pretrained "$OUT/again/last.t7" --max_epochs 10 \
    --resnet_lr 0.05

stages
profile again --base "$TUNED" --load "$OUT/again"
profile final --load "$OUT/final"
table
