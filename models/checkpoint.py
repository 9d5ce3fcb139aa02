"""A checkpoint file, read and checked once, whoever wrote it."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import utils

from .aig import GatedResNet
from .files import KINDS, content, is_state
from .policy import Confidence, GreedyPolicy, PenaltyPolicy, PolicyNet, StaticPolicy
from .registry import Config, build_confidence, config
from .resnet import CifarResNet
from .weights import (
    State,
    has_stem,
    load_gated,
    load_policy,
    load_resnet,
    load_strictly,
    subsamples,
    torchvision_name,
)

STAGES = (0, 1, 2, 3)
OPTIMIZERS = ("optimizer", "resnet_optimizer")
# under which a ResNet's tensors stand: this code's names, then what other codes take
RESNETS = ("state_dict", "resnet", "model", "net", "model_state_dict")
# of this code, under the names of `Checkpoint`
AS_WRITTEN = (
    *("targets", "class_names", "policy_size", "base", "args"),
    *("epoch", "steps_done", "partial"),
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a file holds. `Checkpoint()` is that of no file.

    stage: 0 a ResNet, 1 a policy network, 2 both, 3 ConvNet-AIG. resnet, policy, confidence: state
    dicts as they were written, the ResNet's with its gates in stage 3. targets: of the gates.
    class_names: in the order of the logits. base: fingerprint of the ResNet that the policy learned
    on. policy_size: pixels that the policy network looks at. shortcuts: those without parameters,
    as `CifarResNet.take_shortcuts` has them.
    epoch, steps_done, partial: how far the run was, and what the steps of the
    unfinished epoch gave. Methods raise ValueError that begins with the path.
    """

    path: Path | None = None
    stage: int | None = None
    model: str | None = None
    resnet: State | None = None
    policy: State | None = None
    confidence: State | None = None
    optimizers: Mapping[str, Any] = field(default_factory=dict)
    targets: Sequence[float] = ()
    class_names: Sequence[str] = ()
    normalisation: Sequence[Sequence[float]] | None = None
    policy_size: int = 32
    shortcuts: str = "pool"
    base: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    epoch: int = 0
    steps_done: int = 0
    partial: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> "Checkpoint":
        """A checkpoint of this code, of the released ones, or a ResNet of another code.

        A directory stands for the file that `newest` names. Raises ValueError as `content` does.
        """
        return cls.of(content(path), path)

    @classmethod
    def of(cls, content: Mapping[str, Any], path: str | Path) -> "Checkpoint":
        """The same of what `content` returned. Raises ValueError for several ResNets in one."""
        own = {n: content[n] for n, kind in KINDS.items() if isinstance(content.get(n), kind)}
        if own.get("stage") not in STAGES:
            own.pop("stage", None)
        if not all(isinstance(name, str) for name in own.get("class_names", [])):
            del own["class_names"]
        policy = content.get("agent")
        if policy is None and is_state(net := content.get("net")) and head_bias(net) is not None:
            policy = content["net"]  # as older released files have it
        resnet = resnet_in(content, policy)
        stage = 0 if policy is None else 1 if resnet is None else 2
        model = content.get("model")
        model = model if isinstance(model, str) else None
        normalisation = own.get("normalisation")
        if normalisation is None and model:
            with suppress(ValueError):  # another code's name
                normalisation = config(model).normalisation
        shortcuts = own.get("shortcuts", "pool")
        try:
            subsampling = resnet is not None and subsamples(resnet)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if subsampling:
            shortcuts = "subsample"
            normalisation = normalisation or config("R50_ImgNet").normalisation  # as its code has
        return cls(
            path=Path(path),
            stage=own.get("stage", stage),
            model=model,
            resnet=resnet,
            policy=policy,
            confidence=content.get("correctness"),
            optimizers={name: content[name] for name in OPTIMIZERS if name in content},
            normalisation=normalisation,
            shortcuts=shortcuts,
            **{name: own[name] for name in AS_WRITTEN if name in own},
        )

    @property
    def num_blocks(self) -> int:
        """The number of residual blocks that the tensors show; 0 where they show none."""
        bias = head_bias(self.policy or {})
        if bias is not None:
            return bias.numel()
        names = map(torchvision_name, self.resnet or ())
        found = (re.search(r"(?:blocks\.|layer)(\d+\.\d+)\.conv1", name) for name in names)
        return len({match[1] for match in found if match})

    @property
    def static_policy(self) -> str | None:
        """The static policy, such as first:10, that the ResNet was finetuned under."""
        if self.stage != 2:
            return None
        return utils.with_seed(self.args.get("policy"), self.args.get("seed", 0))

    @property
    def candidates(self) -> torch.Tensor | None:
        """The policies (C, K) that the policy network learned to choose among, if it did."""
        return (self.confidence or {}).get("candidates")

    @property
    def can_choose(self) -> bool:
        """Whether the policy network chooses for any penalty: the head for that is there, and the
        policy network has not gone on since they learned together.
        """
        begun = self.epoch + bool(self.steps_done)  # an epoch that is not finished has changed it
        return bool(self.confidence) and begun <= self.args.get("warm_start", float("inf"))

    @property
    def without_resnet(self) -> str:
        """What to say of a file without a ResNet."""
        if self.policy is not None:
            return f"{self.path}: a stage-1 checkpoint, which holds no ResNet"
        return f"{self.path}: holds no ResNet (neither state_dict nor resnet)"

    def load_into(self, network: nn.Module) -> None:
        """Load a network, by what kind of network it is, with its settings: the pixels that a
        policy network looks at, a ResNet's shortcuts, the target rates of gates.

        Raises ValueError naming the tensor that is missing, extra or wrongly shaped.
        """
        if isinstance(network, Confidence):
            load, state = load_strictly, self.confidence
            missing = f"{self.path}: holds no confidence head"
        elif isinstance(network, PolicyNet):
            load, state = load_policy, self.policy
            what = "no BlockDrop checkpoint" if self.resnet is None else "a pretrained ResNet"
            missing = f"{self.path}: {what}, without a policy network (neither agent nor net)"
            if network.size is not None:
                network.look_at(self.policy_size)
        else:
            load = load_gated if isinstance(network, GatedResNet) else load_resnet
            state, missing = self.resnet, self.without_resnet
            if isinstance(network, CifarResNet):
                network.take_shortcuts(self.shortcuts)
        if state is None:
            raise ValueError(missing)
        try:
            load(network, state)
            if isinstance(network, GatedResNet):
                network.set_targets(self.targets)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def policy_module(
        self,
        config: Config,
        policy_net: PolicyNet,
        static: torch.Tensor | None = None,
        penalty: float | None = None,
    ) -> nn.Module:
        """Who decides: a static policy (K,) where one is given, every block where a ResNet stands
        alone, else the policy network, or what it chooses for a penalty.

        Raises ValueError where it cannot choose for one.
        """
        if static is None and self.policy is None:
            static = torch.ones(config.num_blocks)
        if penalty is not None:
            if static is not None:
                raise ValueError("there is no policy network here that could choose for a penalty")
            return PenaltyPolicy(policy_net, self.confidence_head(config, policy_net), penalty)
        return GreedyPolicy(policy_net) if static is None else StaticPolicy(static)

    def confidence_head(self, config: Config, policy_net: PolicyNet) -> Confidence:
        """The head by which the policy network chooses for any penalty.

        Raises ValueError where there is none, or one that the policy network has gone on from.
        """
        if not self.can_choose:
            why = "has gone on since it could" if self.confidence else "cannot"
            raise ValueError(
                f"{self.path}: its policy {why} choose for another penalty: take the checkpoint of "
                "the last epoch of cl_training.py --warm_start, or one of finetune.py --penalties"
            )
        head = build_confidence(config, policy_net)
        self.load_into(head)
        return head


def resnet_in(content: Mapping[str, Any], policy: State | None) -> State | None:
    """A ResNet's tensors: under a name that is known, under any other, or bare as torchvision
    publishes them; None where there are none.
    """
    for name in RESNETS:
        if is_state(content.get(name)) and content[name] is not policy:
            return content[name]
    if policy is not None:
        return None
    if content and is_state(content):
        return content
    others = (part for part in content.values() if isinstance(part, Mapping))
    found = (
        part if is_state(part) and has_stem(part) else resnet_in(part, None) for part in others
    )
    return next((part for part in found if part is not None and has_stem(part)), None)


def head_bias(state: State) -> torch.Tensor | None:
    """The bias of a policy network's head, one number a block; None of another network."""
    return next((tensor for name, tensor in state.items() if name.endswith("logit.bias")), None)
