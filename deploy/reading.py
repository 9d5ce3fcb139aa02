"""What copies for inference read out of a network.

They take its weights and leave behind whatever else its modules do. So each module is looked at
first: one that computes otherwise than is known of its kind is refused by name.
"""

import sys
import warnings
from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from models import GatedResNet, GreedyPolicy, PenaltyPolicy, PolicyNet, ResNet
from models.aig import Gate
from models.policy import Confidence
from models.resnet import FREE_SHORTCUTS, BasicBlock, Bottleneck

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)

# Hooks that make a module's weight out of other tensors, and do nothing else.
WEIGHT_HOOKS = (BasePruningMethod, WeightNorm, SpectralNorm)


def check(
    module: nn.Module,
    kinds: type | tuple[type, ...],
    parts: Container[str] = (),
    methods: Iterable[str] = ("forward",),
) -> None:
    """Raise ValueError unless a module computes as one of `kinds` does, of these parts alone."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    own = type(module).__name__
    for name, child in module.named_children():
        if name not in parts and name != "parametrizations":  # these make a weight
            raise ValueError(f"deploy does not know {name} ({type(child).__name__}) of a {own}")
    for method in methods:
        known = [getattr(kind, method) for kind in kinds]
        if getattr(type(module), method, None) not in known or method in vars(module):
            raise ValueError(f"deploy does not know {own}.{method}")
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        if isinstance(hook, WEIGHT_HOOKS):
            hook(module, None)  # the weight may be older than what it is made of
        else:
            warnings.warn(f"a deployed copy leaves out the forward hooks of a {own}", stacklevel=2)


def folded(
    conv: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with its BatchNorm folded in.

    In `dtype`, or their own, float32 at least.
    """
    dtype = dtype or torch.promote_types(conv.weight.dtype, torch.float32)
    check(conv, nn.Conv2d)
    for name, usual in {"dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}.items():
        if (value := getattr(conv, name)) != usual:
            raise ValueError(f"deploy does not know a Conv2d with {name}={value!r}")
    if isinstance(conv.padding, str):
        raise ValueError(f"deploy does not know a Conv2d with padding={conv.padding!r}")
    return fuse_conv_bn_weights(*tensors(conv, dtype), *normalisation(norm, dtype))


def linear(layer: nn.Linear, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias, which may be zeros; in `dtype`, or their own."""
    check(layer, nn.Linear)
    weight, bias = tensors(layer, dtype)
    return weight, weight.new_zeros(len(weight)) if bias is None else bias


def tensors(layer: nn.Module, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, if it has one."""
    return cast(layer.weight, dtype), None if layer.bias is None else cast(layer.bias, dtype)


def normalisation(norm: nn.Module, dtype: torch.dtype | None):
    """A BatchNorm's mean, variance, eps, weight and bias."""
    loaded = sys.modules.get("torchvision.ops.misc")
    check(norm, (*NORMS, loaded.FrozenBatchNorm2d) if loaded else NORMS)
    if norm.running_mean is None:
        raise ValueError(f"deploy does not know a {type(norm).__name__} without running statistics")
    mean, variance = cast(norm.running_mean, dtype), cast(norm.running_var, dtype)
    if norm.weight is None:
        return mean, variance, norm.eps, torch.ones_like(mean), torch.zeros_like(mean)
    return mean, variance, norm.eps, *tensors(norm, dtype)


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)


def convolutions(branch: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Those of a residual branch, in order."""
    if not isinstance(branch, (BasicBlock, Bottleneck)):
        raise ValueError(f"deploy does not know blocks of {type(branch).__name__}")
    numbers = range(1, 3 if isinstance(branch, BasicBlock) else 4)
    pairs = [(f"conv{i}", f"bn{i}") for i in numbers]
    check(branch, (BasicBlock, Bottleneck), {name for pair in pairs for name in pair})
    return [(getattr(branch, conv), getattr(branch, norm)) for conv, norm in pairs]


def shortcut_layers(shortcut: nn.Module) -> tuple[nn.Conv2d, nn.BatchNorm2d] | None:
    """A projection's layers; None of a shortcut without parameters."""
    if isinstance(shortcut, (nn.Identity, *FREE_SHORTCUTS.values())):
        check(shortcut, (nn.Identity, *FREE_SHORTCUTS.values()))
        return None
    if not isinstance(shortcut, nn.Sequential):
        raise ValueError(f"deploy does not know shortcuts of {type(shortcut).__name__}")
    check(shortcut, nn.Sequential, ("0", "1"))
    return shortcut[0], shortcut[1]


def gate_layers(
    gate: Gate, dtype: torch.dtype | None = None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Weight and bias of a gate's two linear layers, BatchNorm folded into the first."""
    check(gate, Gate, ("fc1", "fc1bn", "fc2"), ("forward", "normalise"))
    first, norm = linear(gate.fc1, dtype), normalisation(gate.fc1bn, dtype)
    return fuse_linear_bn_weights(*first, *norm), linear(gate.fc2, dtype)


def check_resnet(resnet: ResNet) -> None:
    """Of a ResNet what is not in its blocks, shortcuts and classifier."""
    parts = ("conv1", "bn1", "stem_pool", "blocks", "ds", "fc")
    check(resnet, ResNet, parts, ("forward", "units", "run", "stem", "head"))


def check_gated(net: GatedResNet) -> None:
    """Of a gated ResNet what is not in its ResNet and its gates."""
    check(net, GatedResNet, ("resnet", "gates"), ("forward", "decide"))


def check_policy(policy: GreedyPolicy | PenaltyPolicy) -> None:
    """Of a policy module what is not in its ResNet and its linear layers."""
    if isinstance(policy, PenaltyPolicy):
        check(policy, PenaltyPolicy, ("policy_net", "confidence"), ("forward", "choose"))
        layers = ("classes", "hidden", "linear")
        check(policy.confidence, Confidence, layers, ("forward", "of_classes"))
    else:
        check(policy, GreedyPolicy, ("policy_net",))
    heads = ("shrink", "features", "logit", "vnet")
    check(policy.policy_net, PolicyNet, heads, ("forward", "look", "heads"))
