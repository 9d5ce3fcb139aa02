#!/bin/sh
# torchdistill 1.1.5: KDLoss is documented as alpha * CE + (1 - alpha) * tau^2 * KL, but with alpha = 0, or
# without labels, it is KL alone: tau^2 is left out, and beta as well. Pure distillation at tau = 4 so
# learns at a sixteenth of the learning rate that alpha = 1e-6 has, without a word. And alpha=None, its own
# default, raises a TypeError where beta is not given. Seen: the loss at alpha 1e-6 is 16.0 times that at 0.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --no-deps torchdistill==1.1.5
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import sys

import torch
from torchdistill.losses.mid_level import KDLoss

torch.manual_seed(0)
student = {"fc": {"output": torch.randn(32, 10, dtype=torch.float64)}}
teacher = {"fc": {"output": torch.randn(32, 10, dtype=torch.float64)}}
labels = torch.randint(0, 10, (32,))


def loss(alpha, **more):
    return KDLoss("fc", "output", "fc", "output", temperature=4.0, alpha=alpha, **more)(student, teacher, labels)


ratio = (loss(1e-6) / loss(0)).item()
beta_ignored = torch.equal(loss(0, beta=5.0), loss(0))
try:
    loss(None)
    default = "works"
except TypeError as error:
    default = str(error)
print("alpha 1e-6 / alpha 0:", round(ratio, 3), "beta ignored:", beta_ignored, "alpha=None:", default)
sys.exit(0 if abs(ratio - 16) < 0.01 and beta_ignored and default != "works" else 1)
END
