#!/bin/sh
# R32_C10 from nothing: a ResNet for every route, one policy network for every penalty on it, and the
# paper's two stages. Shipped are all but the stage 2 of this recipe; that one, and the rows of older
# stages, come from another base, cv/README.md has their commands.
MODEL=R32_C10
. recipes/common.sh

# Stage 0: a plain ResNet, then one that serves every route.
stage plain pretrain --max_epochs 42 --batch_size 256 --lr 0.4
stage base pretrain --routes --pretrained "$OUT/plain" --max_epochs 20 --batch_size 128 --lr 0.1
BASE=$OUT/base

# The policy network starts from a classifier of its own size.
stage classifier pretrain --model R8_C10 --max_epochs 25 --batch_size 256 --lr 0.4

# Stage 1: one policy network for every penalty, then the curriculum and the policy gradient for one.
WARM="--base $BASE --batch_size 128 --policy_size 16 --warm_start 16
    --policy_init $(ls "$OUT"/classifier/pk_*.t7)"
stage curve cl_training $WARM --max_epochs 16 --schedule cosine --lr 3e-3 --penalty -5
stage stage1 cl_training $WARM --load "$OUT/curve" --max_epochs 20 --penalty -5 --lr 2e-4 \
    --cl_step 5 --cl_blocks 5 --samples 2 --alpha 0.95 --beta 0.01

# Stage 2: the ResNet for every penalty, and the paper's form, both networks for one penalty.
TUNE="--base $BASE --batch_size 128 --schedule cosine --resnet_lr 0.02 --distill 0.5 --max_epochs 6"
stage penalties finetune $TUNE --pretrained "$OUT/curve/last.t7" --penalty -5 --penalties -0.5 -50
stage stage2 finetune $TUNE --pretrained "$OUT/stage1/last.t7" --penalty -5

for penalty in -0.5 -2 -5 -15 -50; do
    profile "curve$penalty" --base "$BASE" --load "$OUT/curve" --penalty $penalty --dependence
    profile "penalties$penalty" --load "$OUT/penalties" --penalty $penalty --dependence
done
stages --dependence
table
