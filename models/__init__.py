"""What is trained: ResNets that run under a policy, policy networks, and their names."""

from .aig import GatedResNet
from .checkpoint import Checkpoint
from .policy import (
    POLICY_SIZES,
    Confidence,
    GreedyPolicy,
    PenaltyPolicy,
    PolicyNet,
    StaticPolicy,
    WithConfidence,
    predict,
)
from .registry import Config, build, build_confidence, config, names
from .resnet import CifarResNet, ResNet
from .weights import (
    for_pixels,
    load_fitting,
    load_gated,
    load_grown,
    load_policy,
    load_resnet,
    load_strictly,
    load_ungated,
    our_names,
)

__all__ = [
    "POLICY_SIZES",
    "Checkpoint",
    "CifarResNet",
    "Confidence",
    "Config",
    "GatedResNet",
    "GreedyPolicy",
    "PenaltyPolicy",
    "PolicyNet",
    "ResNet",
    "StaticPolicy",
    "WithConfidence",
    "build",
    "build_confidence",
    "config",
    "for_pixels",
    "load_fitting",
    "load_gated",
    "load_grown",
    "load_policy",
    "load_resnet",
    "load_strictly",
    "load_ungated",
    "names",
    "our_names",
    "predict",
]


def __getattr__(name: str):
    """`models.deploy` is a name of `deploy.deploy`, which stands a floor above."""
    if name == "deploy":
        from deploy import deploy

        return deploy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
