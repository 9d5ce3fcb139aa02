#!/bin/sh
# thop 0.1.1.post2209072238 and torchinfo 1.8.0 count a transposed convolution of stride 2 as if each
# pixel of its output had the whole kernel: four times what it computes, so that the decoder of a
# segmentation network seems to cost four times as much. ptflops 0.7.5 and torch's own counter are
# right. Seen, multiply-adds of a kernel of 2x2, stride 2, 4 to 4 channels, on 8x8 pixels: 16384 by the
# first two, 4096 by the other two (8 x 8 x 4 x 4 x 2 x 2).
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 thop==0.1.1.post2209072238 torchinfo==1.8.0 ptflops==0.7.5
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import sys
import warnings

import torch
from torch import nn

warnings.simplefilter("ignore")
net, x = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, stride=2, bias=False)), torch.randn(1, 4, 8, 8)


def by_thop():
    from thop import profile

    return profile(net, (x,), verbose=False)[0]


def by_torchinfo():
    from torchinfo import summary

    return summary(net, input_data=[x], verbose=0).total_mult_adds


def by_ptflops():
    from ptflops import get_model_complexity_info

    return get_model_complexity_info(
        net, (4, 8, 8), as_strings=False, print_per_layer_stat=False, backend="pytorch"
    )[0]


def by_torch():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        net(x)
    return counter.get_total_flops() / 2


counts = [by_torch, by_ptflops, by_torchinfo, by_thop]
found = [int(count()) for count in counts]
print(dict(zip((count.__name__ for count in counts), found)))
sys.exit(0 if found == [4096, 4096, 16384, 16384] else 1)
END
