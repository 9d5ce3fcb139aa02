"""What is computed: ResNets that run under a policy, policy networks, and their names."""

from .aig import GatedResNet
from .deployment import DeployedResNet, deploy
from .graphs import record
from .policy import (
    POLICY_SIZES,
    Correctness,
    Decider,
    PolicyAtPenalty,
    PolicyNet,
    WithCorrectness,
    decider,
)
from .registry import Config, build, build_correctness, config, names
from .resnet import ResNet
from .weights import (
    for_pixels,
    load_fitting,
    load_gated,
    load_grown,
    load_policy,
    load_resnet,
    load_strictly,
    load_ungated,
)

__all__ = [
    "POLICY_SIZES",
    "Config",
    "Correctness",
    "Decider",
    "DeployedResNet",
    "GatedResNet",
    "PolicyAtPenalty",
    "PolicyNet",
    "ResNet",
    "WithCorrectness",
    "build",
    "build_correctness",
    "config",
    "decider",
    "deploy",
    "for_pixels",
    "load_fitting",
    "load_gated",
    "load_grown",
    "load_policy",
    "load_resnet",
    "load_strictly",
    "load_ungated",
    "names",
    "record",
]
