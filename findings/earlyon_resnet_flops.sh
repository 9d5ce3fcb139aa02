#!/bin/sh
# earlyon 0.3.0 knows no FLOPs of its own resnet18_ee and resnet50_ee: torchvision's blocks run one ReLU
# module two or three times, at which its estimate falls back to equal steps. Thresholds that are
# calibrated for a budget of FLOPs are then calibrated for something else; a RuntimeWarning says so.
# Seen, of resnet18_ee, an exit behind layer2: 0.333 of the FLOPs by earlyon, 0.55 by torch's counter.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 torchvision==0.29.2 numpy==2.4.6 earlyon==0.3.0
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import sys
import warnings

import torch
from torch.utils.flop_counter import FlopCounterMode

warnings.simplefilter("ignore")
from earlyon.models import resnet18_ee

model = resnet18_ee(num_classes=1000, pretrained=False).eval()
estimate, backbone = model.flops_estimate, model.backbone


def counted(call, x):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y = call(x)
    return counter.get_total_flops(), y


x = torch.randn(1, 3, 224, 224)
whole, total = x, 0
for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2"):
    flops, whole = counted(getattr(backbone, name), whole)
    total += flops
model.config.enabled_exits = [False] * len(model.config.exit_points)
full, _ = counted(lambda x: model(x, mode="inference"), x)
share = total / full
print(f"behind layer2: earlyon {estimate.fractions['layer2']:.3f} ({estimate.method}), counted {share:.3f}")
wrong = abs(estimate.fractions["layer2"] - share) > 0.1
sys.exit(0 if wrong and not estimate.reliable else 1)
END
