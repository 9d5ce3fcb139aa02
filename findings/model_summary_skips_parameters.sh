#!/bin/sh
# pytorch-model-summary 0.1.2: "Total params" are those of the layers that the forward came to. A layer
# that it leaves out, such as a dropped block, has none, also among the trainable ones. Seen: 216 of a
# network's 792 parameters; where the layer runs, 792.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6 pytorch-model-summary==0.1.2
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import re
import sys

import torch
from pytorch_model_summary import summary
from torch import nn


class Network(nn.Module):
    def __init__(self, keeps):
        super().__init__()
        self.keeps = keeps
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.block = nn.Conv2d(8, 8, 3, padding=1, bias=False)

    def forward(self, x):
        x = self.stem(x)
        return x + self.block(x) if self.keeps else x


def totals(net):
    text = summary(net, torch.randn(1, 3, 8, 8))
    return [int(n.replace(",", "")) for n in re.findall(r"(?:Total|Trainable) params: (\S+)", text)]


found = {}
for keeps in (True, False):
    net = Network(keeps)
    found[keeps] = sum(p.numel() for p in net.parameters()), totals(net)
    print("block kept:", keeps, "parameters and summary:", found[keeps])
expected = {True: (792, [792, 792]), False: (792, [216, 216])}
sys.exit(0 if found == expected else 1)
END
