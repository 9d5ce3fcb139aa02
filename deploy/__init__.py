"""Inference only: twins that run fast, CUDA graphs, ONNX and int8 of trained networks."""

from .graphs import record
from .twin import DeployedResNet, deploy

__all__ = ["DeployedResNet", "deploy", "record"]
