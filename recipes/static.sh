#!/bin/sh
# What R32_C10's policies are compared with, after recipes/R32_C10.sh: specialists for one static
# policy, finetuned as long as stage 2 from the same base, and a plain smaller ResNet.
MODEL=R32_C10
. recipes/common.sh
BASE=$OUT/base

TUNE="--base $BASE --batch_size 128 --schedule cosine --resnet_lr 0.02 --distill 0.5"
for keep in 6 8 10; do
    stage "static$keep" finetune $TUNE --policy late:$keep --max_epochs 6
    profile "static$keep" --load "$OUT/static$keep"
done

# As many epochs as the base of recipes/R32_C10.sh: 42, and 24 of a full and a shorter pass each. The
# base that is shipped has learned longer.
stage R20 pretrain --model R20_C10 --max_epochs 66 --batch_size 128 --lr 0.1
profile R20 --model R20_C10 --base "$OUT/R20"
table
