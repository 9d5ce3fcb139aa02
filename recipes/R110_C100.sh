#!/bin/sh
# R110_C100 by recipes/chain.sh. Its base begins as ResNet-32's, shipped or
# SHALLOW=cv/reproduce/R32_C100/base, whose further blocks add nothing at first.
MODEL=R110_C100 ROUTES=6 WARM=8 GRADIENT=3 TUNE=4 FREED=18
SHALLOW=${SHALLOW:-cv/R32_C100/base}
. recipes/chain.sh
table
