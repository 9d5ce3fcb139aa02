#!/bin/sh
# R32_C10 from nothing, by recipes/chain.sh. In cv/R32_C10 are a base, curve, stage1, stage2 and
# penalties that it made, before the candidates of a warm start were found on the base itself.
MODEL=R32_C10 PLAIN=42 ROUTES=20 WARM=16 GRADIENT=4 TUNE=6 FREED=5
. recipes/chain.sh
table
