"""Weights from this code, the authors' code and other ResNet codes, into our networks, strictly."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .aig import GatedResNet
from .policy import PolicyNet
from .resnet import ResNet

State = Mapping[str, Tensor]

STEM = "conv1.weight"
# words in the prefix of a network that follows another
FOLLOWERS = re.compile(r"(^|[._])(k|ema|swa|averaged|momentum|teacher|target)([._]|$)")
FIRST_BLOCKS = ("layer1.0.", "blocks.0.0.")
CLASSIFIERS = ("fc.", "linear.")
RENAMES = (
    (r"^layer(\d+)\.0\.(downsample|shortcut)\.", lambda m: f"ds.{int(m[1]) - 1}."),
    (r"^layer(\d+)\.", lambda m: f"blocks.{int(m[1]) - 1}."),
    (r"^linear\.", "fc."),
)

# a layer of Hugging Face's ResNets: of the stem, of a block, of its shortcut
TRANSFORMERS = (
    r"(?:embedder\.embedder|encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:layer\.(\d+)|shortcut))"
    r"\.(convolution|normalization)\."
)


def has_stem(state: State, anchor: str = STEM) -> bool:
    return any(f".{name}".endswith(f".{anchor}") for name in map(torchvision_name, state))


def torchvision_name(name: str) -> str:
    """A tensor's name in torchvision's ResNets, from that in Hugging Face's transformers."""

    def place(match: re.Match) -> str:
        stage, block, layer, kind = match.groups()
        is_conv = kind == "convolution"
        own = f"{'conv' if is_conv else 'bn'}{int(layer or 0) + 1}."
        if stage is None:
            return own
        own = f"downsample.{0 if is_conv else 1}." if layer is None else own
        return f"layer{int(stage) + 1}.{block}.{own}"

    return re.sub(r"(^|\.)classifier\.1\.", r"\1fc.", re.sub(TRANSFORMERS, place, name))


def unwrapped(state: State, anchor: str = STEM) -> State:
    """Tensors without what wrappers put before their names: nn.DataParallel, torch.compile, a model
    with a backbone, MoCo with two encoders.

    anchor: a tensor of the network itself. What lies elsewhere is left out, but for a classifier
    that stands beside its backbone. Raises ValueError where there are several of equal standing.
    """
    state = {torchvision_name(name): tensor for name, tensor in state.items()}
    found = [n.removesuffix(anchor) for n in state if f".{n}".endswith(f".{anchor}")]
    # of a network and the copy that follows it, the network
    first = [prefix for prefix in found if not FOLLOWERS.search(prefix)] or found
    whole = [p for p in first if any(f"{p}{block}conv1.weight" in state for block in FIRST_BLOCKS)]
    prefix = min(whole or first, key=lambda prefix: (len(prefix), prefix), default="")
    if others := [other for other in whole if not other.startswith(prefix)]:
        raise ValueError(
            f"holds several ResNets, under {prefix} and {others[0]}: save the one that is meant"
        )
    if not prefix:
        return state
    inside = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    beside: dict[str, Tensor] = {}
    parts = prefix.split(".")[:-1]
    for outer in ("".join(f"{part}." for part in parts[:depth]) for depth in range(len(parts))):
        ends = tuple(f"{outer}{classifier}" for classifier in CLASSIFIERS)
        beside |= {n.removeprefix(outer): t for n, t in state.items() if n.startswith(ends)}
    return beside | inside


def our_names(state: State, anchor: str = STEM) -> dict[str, Tensor]:
    """Rename tensors of other ResNet codes, such as felixgwu/img_classification_pk, torchvision,
    transformers and akamaster/pytorch_resnet_cifar10, to ours. anchor: see `unwrapped`.
    """
    renamed = {}
    for name, tensor in unwrapped(state, anchor).items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def has_names_of(module: nn.Module, state: State) -> bool:
    """Whether tensors are named as the module's are, so that no other code's names are meant."""
    return set(state) == set(module.state_dict())


def load_resnet(resnet: ResNet, state: State) -> None:
    """Load ResNet weights in any known layout. Raises ValueError naming a tensor that is wrong."""
    names = state if has_names_of(resnet, state) else our_names(state)
    if resnet.shortcuts and any(name.startswith("ds.") for name in names):
        raise ValueError(
            "its shortcuts are 1x1 convolutions, as the ResNets of ConvNet-AIG have them: "
            "aig_training.py --pretrained takes it, for this model it is no base"
        )
    load_strictly(resnet, names)


def subsamples(state: State) -> bool:
    """Whether a ResNet is known by its names to have the shortcuts of akamaster's."""
    names = unwrapped(state)
    free = not any(re.search(r"\.(downsample|shortcut)\.", name) for name in names)
    return free and "linear.weight" in names and any(n.startswith("layer1.0.") for n in names)


def load_grown(resnet: ResNet, state: State) -> int:
    """Load the weights of a ResNet with as many or fewer blocks in its stages; how many it has.

    Its blocks come first in each stage. The others stay as they are but for their last BatchNorm,
    whose weight and bias become 0: they add nothing, so that the deeper ResNet begins with what the
    shallower one knows, as Net2DeeperNet does (Chen et al. 2016, arXiv 1511.05641), and learns to
    use them. Raises ValueError as `load_resnet` does.
    """
    names, own = our_names(state), resnet.state_dict()
    blocks = [block for blocks in resnet.blocks for block in blocks]
    places = [f"blocks.{s}.{i}." for s, depth in enumerate(resnet.stages) for i in range(depth)]
    has = {re.sub(r"^(blocks\.\d+\.\d+\.).*", r"\1", name) for name in names}
    new = [place for place in places if place not in has]
    for place in new:
        if not place.endswith(".0."):  # a stage that is not there is an error
            names |= {name: tensor for name, tensor in own.items() if name.startswith(place)}
    load_strictly(resnet, names)
    for block, place in zip(blocks, places, strict=True):
        if place in new:
            kinds = (nn.BatchNorm2d, nn.GroupNorm)
            norms = [part for part in block.children() if isinstance(part, kinds)]
            if not norms:
                raise ValueError(f"a {type(block).__name__} has no norm to be closed by at first")
            nn.init.zeros_(norms[-1].weight), nn.init.zeros_(norms[-1].bias)
    return len(places) - len(new)


def for_pixels(
    state: State, old: Sequence[Sequence[float]], new: Sequence[Sequence[float]]
) -> dict[str, Tensor]:
    """A ResNet's tensors as they have to be where its pixels come normalised in another way.

    old, new: mean and standard deviation of three channels. Its answers stay the same in evaluation
    but for the border of zeros around the image, which stands for another colour.
    """
    names = our_names(state)
    weight = names["conv1.weight"]
    weight = weight.float() if weight.element_size() < 4 else weight
    (old_mean, old_std), (new_mean, new_std) = (
        weight.new_tensor(pixels)[:, :, None, None] for pixels in (old, new)
    )
    shift = weight * ((new_mean - old_mean) / old_std)
    names["conv1.weight"] = weight * (new_std / old_std)
    names["bn1.running_mean"] = names["bn1.running_mean"].to(shift) - shift.sum((1, 2, 3))
    return names


def load_policy(policy_net: PolicyNet, state: State) -> None:
    """Load policy weights, the released code's unused `features.fc` left out.

    Raises ValueError naming a tensor that is missing, extra or wrongly shaped.
    """
    if not has_names_of(policy_net, state):
        names = our_names(state, "logit.weight")
        state = {n: t for n, t in names.items() if not n.startswith("features.fc.")}
    load_strictly(policy_net, state)


def load_gated(net: GatedResNet, state: State) -> None:
    """Load ConvNet-AIG weights, ours or the released code's, whose blocks hold their gates.

    Raises ValueError naming a tensor that is missing, extra or wrongly shaped.
    """
    state = unwrapped(state, "resnet.conv1.weight")
    if not any(name.startswith("gates.") for name in state):
        state = our_gated_names(state, net.resnet.stages)
    load_strictly(net, state)


def our_gated_names(state: State, stages: Sequence[int]) -> dict[str, Tensor]:
    """Rename tensors of the released ConvNet-AIG to ours; stages: blocks of each."""
    starts = [sum(stages[:i]) for i in range(len(stages))]
    renamed = {gated_name(n, starts): t for n, t in our_names(state).items()}
    # its gates are 1x1 convolutions on pooled features
    return {n: t.flatten(1) if is_gate_weight(n, t) else t for n, t in renamed.items()}


def load_ungated(net: GatedResNet, state: State) -> None:
    """Load a plain ResNet's weights, leaving the gates alone; see `load_resnet`.

    A CIFAR ResNet of BlockDrop has no convolutions in its shortcuts: those stay as well.
    """
    own = net.resnet.state_dict()
    shortcuts = {name: tensor for name, tensor in own.items() if name.startswith("ds.")}
    load_strictly(net.resnet, shortcuts | our_names(state))


def gated_name(name: str, starts: Sequence[int]) -> str:
    """A tensor's name in a GatedResNet, from the released code's by way of `our_names`."""
    gate = re.fullmatch(r"blocks\.(\d+)\.(\d+)\.((?:fc1|fc1bn|fc2)\..*)", name)
    if gate and int(gate[1]) < len(starts):
        return f"gates.{starts[int(gate[1])] + int(gate[2])}.{gate[3]}"
    return f"resnet.{name}"


def is_gate_weight(name: str, tensor: Tensor) -> bool:
    return name.startswith("gates.") and name.endswith(".weight") and tensor.ndim == 4


def load_fitting(module: nn.Module, state: State) -> int:
    """Load those tensors that fit by name and shape; how many of the module's parameters did."""
    own, names = module.state_dict(), our_names(state)
    fitting = {n: t for n, t in names.items() if n in own and t.shape == own[n].shape}
    module.load_state_dict(fitting, strict=False)
    return sum(name in fitting for name, _ in module.named_parameters())


def load_strictly(module: nn.Module, state: State) -> None:
    """`load_state_dict` that forgives only BatchNorm counters, which torch 0.3 did not save."""
    own = module.state_dict()
    for name in own:
        if name.endswith("num_batches_tracked") and name not in state:
            state = {**state, name: own[name].new_zeros(())}
    missing = [name for name in own if name not in state]
    extra = [name for name in state if name not in own]
    if missing:
        shown = f", and has {extra[0]}" if extra else ""
        raise ValueError(f"lacks {count(missing)} {missing[0]}{shown}")
    if extra:
        raise ValueError(f"has {count(extra)} {extra[0]}, which the network does not")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is no tensor")
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, not {tuple(own[name].shape)}"
            )
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} is sparse: save it as .to_dense()")
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise ValueError(f"{name} is not finite: the training that wrote it has failed")
    module.load_state_dict(state)


def count(names: list[str]) -> str:
    return "the tensor" if len(names) == 1 else f"{len(names)} tensors, the first"
