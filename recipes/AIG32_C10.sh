#!/bin/sh
# ConvNet-AIG beside BlockDrop's R32_C10: its blocks start from the same base ResNet, the
# convolutions in its shortcuts and its gates from nothing. The checkpoints in cv/AIG32_C10 began as a
# plain ResNet-32 of 118 epochs that is not kept.
MODEL=AIG32_C10
. recipes/common.sh
BASE=${BASE:-cv/pretrained/R32_C10}

for target in 0.6 0.4; do
    stage "target$target" aig_training --pretrained "$BASE" --target $target --max_epochs 12 \
        --batch_size 128 --lr 0.05 --schedule cosine
    profile "target$target" --load "$OUT/target$target"
done
table
