#!/bin/sh
# fvcore 0.1.5.post20221221 counts by running a network in the mode that it is in, and does not say so:
# to count one that is being trained moves the running statistics of its BatchNorm layers, by whatever
# the example input is, zeros for instance. The step count moves as well. Seen: the running mean of a
# fresh layer is no longer zero afterwards; after torchinfo 1.8.0 it is.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet setuptools==80.9.0 wheel==0.45.1 torch==2.13.0 numpy==2.4.6 torchinfo==1.8.0
"$folder/venv/bin/pip" install --quiet --no-build-isolation fvcore==0.1.5.post20221221
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import sys
import warnings

import torch
from torch import nn

warnings.simplefilter("ignore")


def by_fvcore(net, x):
    from fvcore.nn import FlopCountAnalysis

    FlopCountAnalysis(net, (x,)).total()


def by_torchinfo(net, x):
    from torchinfo import summary

    summary(net, input_data=[x], verbose=0)


found = {}
for count in (by_fvcore, by_torchinfo):
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)).train()
    count(net, torch.zeros(2, 3, 8, 8))
    steps, mean = int(net[1].num_batches_tracked), net[1].running_mean.abs().max().item()
    found[count.__name__] = steps > 0 and mean > 0
    print(f"{count.__name__}: {steps} steps, running mean up to {mean:.3f}")
sys.exit(0 if found == {"by_fvcore": True, "by_torchinfo": False} else 1)
END
