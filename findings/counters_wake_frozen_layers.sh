#!/bin/sh
# thop 0.1.1.post2209072238 and torchinfo 1.8.0 put a network back into its mode as a whole after they
# counted it: a layer that was frozen by eval() inside a network in training mode is in training mode
# afterwards, and its BatchNorm statistics move from then on. thop also leaves two buffers at the
# network, which then stand in every state dict. Seen: the frozen layer's `training` is True after both;
# new keys total_ops and total_params after thop; neither after torch's own counter without eval().
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 thop==0.1.1.post2209072238 torchinfo==1.8.0
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import sys

import torch
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.norm.eval()

    def forward(self, x):
        return self.norm(self.conv(x))


def by_thop(net, x):
    from thop import profile

    profile(net, (x,), verbose=False)


def by_torchinfo(net, x):
    from torchinfo import summary

    summary(net, input_data=[x], verbose=0)


def by_torch(net, x):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False):
        net(x)


found = {}
for count in (by_thop, by_torchinfo, by_torch):
    net, x = Network(), torch.randn(2, 3, 8, 8)
    names = set(net.state_dict())
    count(net, x)
    found[count.__name__] = net.norm.training, sorted(set(net.state_dict()) - names)
    print(count.__name__, "frozen layer trains:", found[count.__name__][0], found[count.__name__][1])
expected = {
    "by_thop": (True, ["total_ops", "total_params"]),
    "by_torchinfo": (True, []),
    "by_torch": (False, []),
}
sys.exit(0 if found == expected else 1)
END
