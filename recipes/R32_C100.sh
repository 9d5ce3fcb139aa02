#!/bin/sh
# R32_C100 by recipes/chain.sh, and beside it, as long as its stage 2, a specialist for one static
# policy and ConvNet-AIG. Begun as the base that `FROM= ROUTES=10 make reproduce MODEL=R32_C100`
# makes from nothing. CIFAR-100 lies in data/, docs/data.md says in which forms.
MODEL=R32_C100 PLAIN=24 ROUTES=${ROUTES:-16} WARM=12 GRADIENT=4 TUNE=6 FREED=5
FROM=${FROM-cv/R32_C100/base_older}
. recipes/chain.sh

stage static8 finetune $FINETUNE --policy late:8
profile static8 --load "$OUT/static8"
MODEL=AIG32_C100
stage AIG aig_training --pretrained "$BASE" --target 0.6 --max_epochs $((2 * TUNE)) --batch_size 128 \
    --lr 0.05 --schedule cosine
profile AIG --load "$OUT/AIG"
table
