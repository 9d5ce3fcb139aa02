#!/bin/sh
# R110_C10 by recipes/chain.sh. Its base begins as ResNet-32's, shipped or
# FROM=cv/reproduce/R32_C10/base, whose further blocks add nothing at first. The base that is shipped
# began as a ResNet-32 of 20 epochs of --routes with this BATCH and RATE, not kept. Beside it a specialist for one static
# policy, finetuned as long as stage 2, and a ResNet-44 that begins as the same ResNet-32.
MODEL=R110_C10 ROUTES=15 BATCH=256 RATE=0.1 WARM=8 GRADIENT=3 TUNE=4 FREED=18
FROM=${FROM:-cv/pretrained/R32_C10}
. recipes/chain.sh

stage static14 finetune $FINETUNE --policy distribute:14
profile static14 --load "$OUT/static14"
MODEL=R44_C10
stage R44 pretrain --pretrained "$FROM" --max_epochs 20 --batch_size "$BATCH" --lr "$RATE"
profile R44 --base "$OUT/R44"
table
