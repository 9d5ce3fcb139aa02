#!/bin/sh
# R32_C10 by recipes/chain.sh, begun as the plain ResNet-32 that comes with the repository. Its base,
# curve, stage1, stage2 and penalties are in cv/R32_C10. `FROM= make reproduce MODEL=R32_C10` begins
# from nothing.
MODEL=R32_C10 PLAIN=42 ROUTES=24 WARM=16 GRADIENT=4 TUNE=6 FREED=5
FROM=${FROM-cv/pretrained/R32_C10}
. recipes/chain.sh
table
