"""What is computed: ResNets that run under a policy, policy networks, and their names."""

from .deployment import deploy
from .policy import PolicyNet
from .registry import Config, build, config, names
from .resnet import ResNet
from .weights import load_policy, load_resnet

__all__ = [
    "Config",
    "PolicyNet",
    "ResNet",
    "build",
    "config",
    "deploy",
    "load_policy",
    "load_resnet",
    "names",
]
