"""Names such as R110_C10, what they stand for, and how to build them."""

import re
from dataclasses import dataclass

from .policy import CifarPolicy, ImageNetPolicy, PolicyNet
from .resnet import BasicBlock, Bottleneck, CifarResNet, ImageNetResNet, ResNet

USUAL = ("R32_C10", "R110_C10", "R32_C100", "R110_C100", "R101_ImgNet")

CIFAR = {"C10": ("CIFAR10", 10), "C100": ("CIFAR100", 100)}

IMAGENET = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Config:
    """A registered name spelt out: the data it is for and the shape of its network."""

    name: str
    depth: int
    dataset: str
    num_classes: int
    image_size: int
    stages: tuple[int, ...]
    mean: Colour = (0.0, 0.0, 0.0)
    std: Colour = (1.0, 1.0, 1.0)

    @property
    def num_blocks(self) -> int:
        return sum(self.stages)


def names() -> list[str]:
    """The usual models. Any CIFAR depth 6n+2 and ImageNet depth of torchvision builds as well."""
    return list(USUAL)


def config(name: str) -> Config:
    """Parse a model name. Raises ValueError, listing the names, for one that means nothing."""
    match = re.fullmatch(r"R(\d+)_(C10|C100|ImgNet)", name)
    depth = int(match[1]) if match else 0
    if match and match[2] == "ImgNet" and depth in IMAGENET:
        return Config(
            name,
            depth,
            dataset="ImageNet",
            num_classes=1000,
            image_size=224,
            stages=IMAGENET[depth][1],
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        )
    if match and match[2] in CIFAR and depth >= 8 and depth % 6 == 2:
        dataset, num_classes = CIFAR[match[2]]
        colours = {}
        if name == "R32_C10":  # the one CIFAR model of the released code that normalises its pixels
            colours["mean"] = tuple(v / 255 for v in (125.3, 123.0, 113.9))
            colours["std"] = tuple(v / 255 for v in (63.0, 62.1, 66.7))
        return Config(name, depth, dataset, num_classes, 32, ((depth - 2) // 6,) * 3, **colours)
    raise ValueError(
        f"unknown model {name!r}: take one of {', '.join(USUAL)}, another CIFAR depth 6n+2 "
        f"such as R56_C10, or another ImageNet depth ({', '.join(f'R{d}' for d in IMAGENET)})"
    )


def build(name: str) -> tuple[ResNet, PolicyNet]:
    """The ResNet and its policy network, weights initialised, nothing loaded.

    Raises ValueError for an unknown name.
    """
    spec = config(name)
    if spec.dataset == "ImageNet":
        block, stages = IMAGENET[spec.depth]
        return ImageNetResNet(block, stages, spec.num_classes), ImageNetPolicy(spec.num_blocks)
    return CifarResNet(spec.stages, spec.num_classes), CifarPolicy(spec.num_blocks)
