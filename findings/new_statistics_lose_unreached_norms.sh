#!/bin/sh
# Two tools that take BatchNorm's statistics anew, for averaged weights or for more exact ones, forget
# those of a layer that no batch reaches, as of a block that is skipped for all these images, without a
# word: torch.optim.swa_utils.update_bn (torch 2.13.0) leaves mean 0 and variance 1, fvcore
# 0.1.5.post20221221's update_bn_stats leaves mean 0 and variance 0, so that the layer then multiplies by
# 1 / sqrt(eps), here 316. Of a layer that a part of each batch reaches, update_bn takes the mean of the
# batches' means, whatever their sizes; fvcore weights them by size. Seen: a BatchNorm for images of
# positive mean, of mean 3 and variance 4 before; and with one such image of mean 5 in the first batch
# and seven of mean 1 in the second, whose mean is 1.5, update_bn gives 3 and update_bn_stats 1.5.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 fvcore==0.1.5.post20221221
"$folder/venv/bin/python" -W ignore - <<'END'
import torch
from fvcore.nn.precise_bn import update_bn_stats
from torch import nn
from torch.optim.swa_utils import update_bn


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.norm.running_mean.fill_(3)
        self.norm.running_var.fill_(4)

    def forward(self, x):
        rows = (x.mean((1, 2, 3)) > 0).nonzero().flatten()
        return x.index_add(0, rows, self.norm(x[rows])) if len(rows) else x


def images(*means):
    """(B, 1, 2, 2), each with a variance of its own."""
    noise = torch.tensor([[0.1, -0.1], [-0.1, 0.1]])
    return torch.tensor(means).view(-1, 1, 1, 1) + noise


def with_torch(batches):
    network = Skipping().train()
    update_bn(batches, network)
    return network.norm


def with_fvcore(batches):
    network = Skipping().train()
    update_bn_stats(network, batches, len(batches), progress=None)
    return network.norm


easy = [images(-1.0, -2.0), images(-3.0, -1.0)]
uneven = [images(5.0, *[-1.0] * 7), images(*[1.0] * 7, -1.0)]
for update, left, mean in ((with_torch, (0, 1), 3), (with_fvcore, (0, 0), 1.5)):
    norm = update(easy)
    found = norm.running_mean.item(), norm.running_var.item()
    taken = update(uneven).running_mean.item()
    print(update.__name__, "unreached: mean and variance", found, "- uneven: mean", taken)
    assert found == left and abs(taken - mean) < 1e-5
    if found[1] == 0:
        print("then multiplies by", factor := norm.eval()(torch.ones(1, 1, 1, 1)).item())
        assert abs(factor - 316.2) < 0.1
END
