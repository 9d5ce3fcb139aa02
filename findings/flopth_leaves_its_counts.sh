#!/bin/sh
# flopth 0.1.6 leaves a counted network changed: in evaluation mode, and with a buffer `flops` at every
# layer, which from then on stands in its state dict, so that a fresh network refuses to load it. A layer
# that the forward calls twice counts once. Seen: `training` is False afterwards, the keys first.flops,
# twice.flops and fc.flops are new, load_state_dict raises, and of 2 x 147,456 multiply-adds of the layer
# that is called twice 147,456 are counted.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 torchvision==0.29.2 numpy==2.4.6 flopth==0.1.6
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import sys

import torch
from flopth import flopth
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.twice = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.fc = nn.Linear(8, 10, bias=False)

    def forward(self, x):
        return self.fc(self.twice(self.twice(self.first(x))).mean((2, 3)))


side = 16
net = Network()
names = set(net.state_dict())
counted, _ = flopth(net, in_size=((3, side, side),), show_detail=False, bare_number=True)
layer = 8 * 8 * 9 * side**2
full = 3 * 8 * 9 * side**2 + 2 * layer + 80
left = sorted(set(net.state_dict()) - names)
print("counted", counted, "of", full, "training:", net.training, "left:", left)
try:
    Network().load_state_dict(net.state_dict())
    loads = True
except RuntimeError:
    loads = False
changed = not net.training and left == ["fc.flops", "first.flops", "twice.flops"] and not loads
sys.exit(0 if changed and counted == full - layer else 1)
END
