#!/bin/sh
# grad-cam 1.5.5 (GradCAM) and captum 0.9.0 (LayerGradCam) take a layer's output for the whole batch. Of
# a layer that a part of the images passes through, as in networks that skip layers by the image, they
# give as many maps as images reached it, without a word and without saying which: paired with the
# images in order, maps stand beside the wrong ones. torchcam 0.5.0 raises a ValueError about its class
# indices instead. Seen: a residual layer for images of positive mean; of three images with the means
# -1, 1, 1 both give two maps, which are those of the second and the third alone.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 torchvision==0.29.2 grad-cam==1.5.5 captum==0.9.0 torchcam==0.5.0
"$folder/venv/bin/python" - <<'END'
import numpy as np
import torch
from captum.attr import LayerGradCam
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torchcam.methods import GradCAM as TorchCam


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        rows = (x.mean((1, 2, 3)) > 0).nonzero().flatten()
        x = self.stem(x)
        x = x.index_add(0, rows, self.layer(x[rows]))
        return self.fc(x.mean((2, 3)))


def grad_cam(images):
    with GradCAM(model=net, target_layers=[net.layer]) as cam:
        return cam(input_tensor=images, targets=[ClassifierOutputTarget(0)] * len(images))


def captum(images):
    maps = LayerGradCam(net, net.layer).attribute(images, target=[0] * len(images))
    return maps.detach().numpy()[:, 0]


torch.manual_seed(0)
net = Skipping().eval()
images = torch.randn(3, 3, 16, 16) / 10 + torch.tensor([-1.0, 1, 1])[:, None, None, None]
for tool in (grad_cam, captum):
    maps = tool(images)
    alone = np.concatenate([tool(images[row : row + 1]) for row in (1, 2)])
    assert len(maps) == 2 and np.allclose(maps, alone, atol=1e-4), (tool.__name__, maps.shape)
    print(tool.__name__, len(images), "images,", len(maps), "maps: those of images 1 and 2")
with TorchCam(net, ["layer"]) as cam:
    out = net(images)
    try:
        cam([0] * 3, out)
        raise SystemExit("torchcam gave maps")
    except ValueError as error:
        print("torchcam:", error)
END
