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

stage stage1 cl_training --base "$BASE" --max_epochs 10 --batch_size 256 --penalty -1 \
    --alpha_end 0.95 --beta_end 0.01 --schedule cosine --cl_blocks 3
stage stage2 finetune --base "$BASE" --pretrained "$OUT/stage1/last.t7" --max_epochs 12 \
    --lr 3e-4 --resnet_lr 0.05 --distill 0.5 --penalty -2 --penalty_end -6 --alpha_end 0.98 \
    --schedule cosine --recalibrate

profile full --base "$BASE" --time
profile stage1 --base "$BASE" --load "$OUT/stage1" --time
profile stage2 --load "$OUT/stage2" --time
"$PYTHON" benchmarks/summary.py "full=$OUT/full.json" "stage 1=$OUT/stage1.json" \
    "stage 2=$OUT/stage2.json"
