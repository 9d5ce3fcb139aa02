#!/bin/sh
# R32_C10 from nothing, by recipes/chain.sh. Shipped are all but plain and stage 2; the latter and
# the rows of older stages, come from another base; each folder's command.txt has how.
MODEL=R32_C10 PLAIN=42 ROUTES=20 WARM=16 GRADIENT=4 TUNE=6 FREED=5
. recipes/chain.sh
table
