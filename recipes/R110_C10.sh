#!/bin/sh
# R110_C10 by recipes/chain.sh, shorter than ResNet-32. Its base begins as ResNet-32's, shipped or
# SHALLOW=cv/reproduce/R32_C10/base, whose further blocks add nothing at first.
MODEL=R110_C10 ROUTES=6 WARM=8 GRADIENT=3 TUNE=4 FREED=18
SHALLOW=${SHALLOW:-cv/R32_C10/base}
. recipes/chain.sh
table
