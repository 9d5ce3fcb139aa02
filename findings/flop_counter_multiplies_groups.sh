#!/bin/sh
# torch 2.13.0: FlopCounterMode counts the weight gradient of a grouped convolution as many times as
# there are groups; forward and input gradient are right. Training a depthwise 3x3 convolution of 16
# channels then "costs" 18 forward passes, where it costs 3. Seen: for 1, 2, 4 and 16 groups the backward
# pass counts 2, 3, 5 and 17 times the forward one.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

images = torch.randn(2, 16, 32, 32, requires_grad=True)


def count(layer, backward):
    with FlopCounterMode(display=False) as counter:
        out = layer(images)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


seen = []
for groups in (1, 2, 4, 16):
    layer = torch.nn.Conv2d(16, 16, 3, padding=1, groups=groups, bias=False)
    forward = count(layer, False)
    # one multiply-add, so 2, for each output and each weight behind it
    assert forward == 2 * images.numel() * layer.weight[0].numel()
    seen.append((count(layer, True) - forward) / forward)
print("backward / forward:", seen)
sys.exit(0 if seen == [2, 3, 5, 17] else 1)
END
