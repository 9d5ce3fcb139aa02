#!/bin/sh
# R110_C100 by recipes/chain.sh. Its base begins as ResNet-32's, shipped or
# FROM=cv/reproduce/R32_C100/base, whose further blocks add nothing at first;
# cv/R110_C100/base began as cv/R32_C100/base_older.
MODEL=R110_C100 ROUTES=6 WARM=8 GRADIENT=3 TUNE=4 FREED=18
FROM=${FROM:-cv/R32_C100/base}
. recipes/chain.sh
table
