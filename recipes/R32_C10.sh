#!/bin/sh
# R32_C10 by recipes/chain.sh, begun from nothing, or as the ResNet that FROM names. Its base is
# shipped in cv/pretrained/R32_C10, and its curve, stage1, stage2 and penalties in cv/R32_C10. That
# base began as a plain network of 118 epochs that is not kept, and had RATE=0.05.
MODEL=R32_C10 PLAIN=42 ROUTES=24 WARM=16 GRADIENT=4 TUNE=6 FREED=5
. recipes/chain.sh
table
