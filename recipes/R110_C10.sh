#!/bin/sh
# R110_C10 from nothing, by recipes/chain.sh, shorter than ResNet-32. The base that is shipped starts
# from cv/R110_C10/base2; `penalties` on it was finetuned for 3 epochs, stage 2 for 4.
MODEL=R110_C10 PLAIN=30 ROUTES=8 WARM=8 GRADIENT=3 TUNE=4 FREED=18
. recipes/chain.sh
table
