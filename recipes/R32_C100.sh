#!/bin/sh
# R32_C100 by recipes/chain.sh, and beside it, as long as its stage 2, a specialist for one static
# policy and ConvNet-AIG. Begun from nothing, or as the ResNet that FROM names. The base that is
# shipped began as one of 24 plain epochs and 10 of --routes that is not kept, and had RATE=0.05.
# CIFAR-100 lies in data/, docs/data.md says in which forms.
MODEL=R32_C100 PLAIN=24 ROUTES=16 WARM=12 GRADIENT=4 TUNE=6 FREED=5
. recipes/chain.sh

stage static8 finetune $FINETUNE --policy late:8
profile static8 --load "$OUT/static8"
MODEL=AIG32_C100
stage AIG aig_training --pretrained "$BASE" --target 0.6 --max_epochs $((2 * TUNE)) --batch_size 128 \
    --lr 0.05 --schedule cosine
profile AIG --load "$OUT/AIG"
table
