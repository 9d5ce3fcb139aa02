#!/bin/sh
# calflops 0.3.2: while it counts it puts functions of its own in place of those in
# torch.nn.functional. Where the network's forward raises, they stay there for the rest of the program,
# and every later call goes through them. It also leaves a network that was in training mode in
# evaluation mode. Seen: after a forward that raises ValueError, torch.nn.functional.relu is another
# function than before; after a count that succeeds, training is False.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 calflops==0.3.2 transformers==4.57.1
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import sys

import torch
import torch.nn.functional as functional
from calflops import calculate_flops
from torch import nn


class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x):
        raise ValueError(f"no {tuple(self.conv(x).shape)}")


quiet = {"print_results": False, "output_as_string": False}
x, relu = torch.randn(1, 3, 8, 8), functional.relu
net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()).train()
calculate_flops(net, args=[x], **quiet)
restored = functional.relu is relu
try:
    calculate_flops(Raises(), args=[x], **quiet)
except ValueError:
    pass
stays = functional.relu is not relu
print(f"after a count: restored {restored}, training {net.training}; after an error: patched {stays}")
sys.exit(0 if restored and stays and not net.training else 1)
END
