"""What is computed: ResNets that run under a policy, policy networks, and their names."""

from .aig import GatedResNet
from .deployment import deploy
from .policy import PolicyNet
from .registry import Config, build, config, names
from .resnet import ResNet
from .weights import load_fitting, load_gated, load_policy, load_resnet, load_ungated

__all__ = [
    "Config",
    "GatedResNet",
    "PolicyNet",
    "ResNet",
    "build",
    "config",
    "deploy",
    "load_fitting",
    "load_gated",
    "load_policy",
    "load_resnet",
    "load_ungated",
    "names",
]
