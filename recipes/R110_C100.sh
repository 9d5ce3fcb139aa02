#!/bin/sh
# R110_C100 by recipes/chain.sh. Its base begins as ResNet-32's, shipped or
# FROM=cv/reproduce/R32_C100/base, whose further blocks add nothing at first;
# the base that is shipped began as a ResNet-32 of 24 plain epochs and 10 of --routes, not kept.
MODEL=R110_C100 ROUTES=6 WARM=8 GRADIENT=3 TUNE=4 FREED=18
FROM=${FROM:-cv/pretrained/R32_C100}
. recipes/chain.sh
table
