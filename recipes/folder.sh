#!/bin/sh
# All stages on a folder of pictures, here CIFAR-10 written out as PNG files: 23 minutes on two
# cores with other work beside it. The base starts from nothing, so that it runs without
# torchvision's weights; with pictures of your own leave --from_scratch, --policy_init and
# --image_size out.
MODEL=R18_Folder
. recipes/common.sh
PICTURES=$OUT/pictures
if [ ! -d "$PICTURES" ]; then
    rm -rf "$PICTURES.part"
    "$PYTHON" recipes/write_folder.py "$PICTURES.part" 1000 100
    mv "$PICTURES.part" "$PICTURES"
fi
GIVEN="--data_dir $PICTURES --image_size 64"

stage base pretrain $GIVEN --from_scratch --max_epochs 12 --batch_size 64 --lr 0.05 --routes
BASE=$OUT/base
stage stage1 cl_training $GIVEN --base "$BASE" --policy_init none --max_epochs 10 \
    --batch_size 64 --alpha 0.95 --schedule cosine
stage stage2 finetune $GIVEN --base "$BASE" --pretrained "$OUT/stage1/last.t7" --max_epochs 4 \
    --batch_size 64 --resnet_lr 0.005 --schedule cosine

stages $GIVEN --batch_size 100
table
"$PYTHON" visualize.py $GIVEN --base "$BASE" --load "$OUT/stage2" --out "$OUT/report" \
    --precision "$PRECISION" --batch_size 100
