"""Names such as R110_C10, what they stand for, and how to build them."""

import re
from dataclasses import dataclass, replace

import torch

import utils

from .aig import Gate, GatedResNet
from .policy import CifarPolicy, Confidence, ImageNetPolicy, PolicyNet
from .resnet import (
    BasicBlock,
    Bottleneck,
    CifarResNet,
    ImageNetResNet,
    ProjectedCifarResNet,
    ResNet,
)

BLOCKDROP = ("R32_C10", "R110_C10", "R32_C100", "R110_C100", "R101_ImgNet")
AIG = ("AIG32_C10", "AIG110_C10", "AIG32_C100", "AIG110_C100", "AIG50_ImgNet", "AIG101_ImgNet")
USUAL = BLOCKDROP + AIG

# Data set, number of classes and pixels a side, by what a name ends in.
CIFAR = {"C10": ("CIFAR10", 10, 32), "C100": ("CIFAR100", 100, 32)}

CLASS_NAMES = {
    "CIFAR10": "airplane automobile bird cat deer dog frog horse ship truck".split(),
    "CIFAR100": """
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge
        bus butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud
        cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox
        girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man
        maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree
        pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
        road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel
        streetcar sunflower sweet_pepper table tank telephone television tiger tractor train
        trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split(),
}

PICTURES = {"ImgNet": "ImageNet", "Folder": "Folder"}

# By the letters that a name begins with; AIG are the ResNets of ConvNet-AIG.
CIFAR_RESNETS = {"R": CifarResNet, "AIG": ProjectedCifarResNet}

# Those of them that are gated, and their gates.
GATES = {"AIG": Gate}

IMAGENET = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}

Colour = tuple[float, float, float]

# Mean and standard deviation of pixels in [0, 1], by kind of model and data, as the released codes
# have them: of BlockDrop's CIFAR models one normalises, the others take [0, 1].
NORMALISATION: dict[tuple[str, str], tuple[Colour, Colour]] = {
    ("R32", "C10"): (
        tuple(v / 255 for v in (125.3, 123.0, 113.9)),
        tuple(v / 255 for v in (63.0, 62.1, 66.7)),
    ),
    ("AIG", "C10"): ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    ("AIG", "C100"): ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    **dict.fromkeys(
        [(method, data) for method in ("R", "AIG") for data in PICTURES],
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ),
}
AS_THEY_ARE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@dataclass(frozen=True)
class Config:
    """A registered name spelt out: the data it is for and the shape of its network."""

    name: str
    depth: int
    dataset: str
    num_classes: int
    image_size: int
    stages: tuple[int, ...]
    gated: bool = False  # ConvNet-AIG
    mean: Colour = AS_THEY_ARE[0]
    std: Colour = AS_THEY_ARE[1]
    class_names: tuple[str, ...] = ()  # of pictures they are those of the folders, known later

    @property
    def has_pictures(self) -> bool:
        """Whether its data are picture files in folders, ImageNet's or a user's."""
        return self.dataset in PICTURES.values()

    @property
    def num_blocks(self) -> int:
        return sum(self.stages)

    @property
    def normalisation(self) -> list[list[float]]:
        """Mean and standard deviation of pixels in [0, 1], a number a channel."""
        return [list(self.mean), list(self.std)]


def names() -> list[str]:
    """The usual models, AIG those of ConvNet-AIG.

    Any CIFAR depth 6n+2 and ImageNet depth of torchvision builds as well, and with _Folder in
    place of _ImgNet for a folder of pictures.
    """
    return list(USUAL)


def config(name: str, gated: bool | None = None) -> Config:
    """Parse a model name. Raises ValueError, listing the names, for one that means nothing.

    `gated` says which method is asked for, ConvNet-AIG or BlockDrop; the other's names are refused.
    """
    spec = parse(name)
    if gated is not None and spec.gated != gated:
        method = "ConvNet-AIG, trained by aig_training.py" if spec.gated else "BlockDrop"
        usual = ", ".join(AIG if gated else BLOCKDROP)
        raise ValueError(f"{name} is a model of {method}: here take one of {usual}")
    return spec


def letters(name: str) -> str:
    """Those that a model's name begins with: its kind."""
    return re.match(r"\D*", name)[0]


def parse(name: str) -> Config:
    match = re.fullmatch(
        rf"({'|'.join(CIFAR_RESNETS)})(\d+)_({'|'.join([*CIFAR, *PICTURES])})", name
    )
    method, depth, data = (match[1], int(match[2]), match[3]) if match else ("", 0, "")
    gated = method in GATES
    by_method = NORMALISATION.get(("AIG" if gated else method, data), AS_THEY_ARE)
    mean, std = NORMALISATION.get((f"{method}{depth}", data), by_method)
    if data in PICTURES and depth in IMAGENET:
        return Config(
            name,
            depth,
            dataset=PICTURES[data],
            num_classes=1000,
            image_size=224,
            stages=IMAGENET[depth][1],
            gated=gated,
            mean=mean,
            std=std,
        )
    if data in CIFAR and depth >= 8 and depth % 6 == 2:
        dataset, num_classes, size = CIFAR[data]
        stages = ((depth - 2) // 6,) * 3
        names = tuple(CLASS_NAMES.get(dataset, ()))
        return Config(name, depth, dataset, num_classes, size, stages, gated, mean, std, names)
    raise ValueError(
        f"unknown model {name!r}: take one of {', '.join(USUAL)}, another CIFAR depth 6n+2 "
        f"such as R56_C10, or another ImageNet depth ({', '.join(f'R{d}' for d in IMAGENET)}); "
        "R50_Folder is for pictures of your own"
    )


def build(
    name: str, num_classes: int | None = None
) -> tuple[ResNet | GatedResNet, PolicyNet | None]:
    """The ResNet and its policy network, weights initialised, nothing loaded.

    ConvNet-AIG's gates are part of its ResNet, and there is no policy network: None.
    num_classes: other than the data set's own. Raises ValueError for an unknown name.
    """
    spec = config(name)
    spec = replace(spec, num_classes=spec.num_classes if num_classes is None else num_classes)
    if spec.gated:
        return GatedResNet(ungated(spec), GATES[letters(name)]), None
    if spec.has_pictures:
        return ungated(spec), ImageNetPolicy(spec.num_blocks)
    return ungated(spec), CifarPolicy(spec.num_blocks)


def build_confidence(spec: Config, policy_net: PolicyNet) -> Confidence:
    """The head by which a policy network chooses for any penalty, weights initialised.

    Its candidates all keep every block until others are found or loaded.
    """
    candidates = torch.ones(len(utils.candidate_depths(spec.stages)), spec.num_blocks)
    return Confidence(policy_net.features.num_features, spec.num_classes, candidates)


def ungated(spec: Config) -> ResNet:
    if spec.has_pictures:
        block, stages = IMAGENET[spec.depth]
        return ImageNetResNet(block, stages, spec.num_classes)
    return CIFAR_RESNETS[letters(spec.name)](spec.stages, spec.num_classes)
