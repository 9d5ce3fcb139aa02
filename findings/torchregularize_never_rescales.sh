#!/bin/sh
# torchregularize 0.1.0: StochasticDepth drops residual branches in training and scales nothing, neither in
# training by 1 / survival_prob (as torchvision's) nor in evaluation by survival_prob (as Huang et al. 2016).
# DropBlock2D does not scale what it leaves either. A network trained with them sees larger sums in
# evaluation than it ever learned with. Seen, a branch of ones: in training 0.5 on average at survival_prob
# 0.5 and 1 in evaluation; behind DropBlock2D(3, 0.3) 0.73 to 0.78 and 1.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchregularize==0.1.0
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import sys

import torch
from torchregularize import DropBlock2D, StochasticDepth

torch.manual_seed(0)
zeros, ones = torch.zeros(1, 1, 32, 32), torch.ones(1, 1, 32, 32)


def means(layer, *given):
    training = torch.stack([layer.train()(*given).mean() for _ in range(4000)]).mean().item()
    return round(training, 3), layer.eval()(*given).mean().item()


depth = means(StochasticDepth(0.5), zeros, ones)
block = means(DropBlock2D(3, 0.3), ones)
print("training, evaluation: StochasticDepth", depth, "DropBlock2D", block)
sys.exit(0 if 0.45 < depth[0] < 0.55 and 0.7 < block[0] < 0.8 and depth[1] == block[1] == 1 else 1)
END
