"""Images in, logits out: what decides and what computes, in one module."""

import torch
from torch import Tensor, nn

import models
from models import GatedResNet, PenaltyPolicy, ResNet

from .twin import deploy
from .watch import Watch


class Classifier(nn.Module):
    """A network with its policy, called with pixels.

    In evaluation mode it computes with deployed copies (`deploy`), made anew at the first call
    after weights, their device, their dtype or a setting such as `look_at` have changed, also
    inside its parts; call `eval()` after a part was replaced or written into through `.data`. In
    training mode it computes with the networks themselves, whose gates then sample.
    `policy_module` decides, a policy module as `deploy` takes, or None where the ResNet decides by
    itself; the penalty of a `PenaltyPolicy` may be set anew at any time.
    """

    def __init__(
        self, resnet: ResNet | GatedResNet, policy: nn.Module | None, config: models.Config
    ):
        super().__init__()
        self.resnet, self.policy_module = resnet, policy
        self.num_blocks, self.class_names = resnet.num_blocks, list(config.class_names)
        for name, value in (("mean", config.mean), ("std", config.std)):
            value = torch.tensor(value, dtype=torch.float32).view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)
        self._made: tuple | None = None  # deployed copies, of which tensors, under which settings

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), uint8 or float in [0, 1], RGB. Returns logits (B, classes)."""
        return models.predict(*self._networks(), self._pixels(images))[0]

    def policy(self, images: Tensor) -> Tensor:
        """Which blocks each image runs, (B, K) of 0 and 1."""
        resnet, policy = self._networks()
        x = self._pixels(images)
        return models.predict(resnet, policy, x)[1] if self.resnet.decides else policy(x)

    def _pixels(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(images.shape)}, not (B, 3, H, W)")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}, not uint8 or float in [0, 1]")
        dtype = next(self.resnet.parameters()).dtype
        wide = torch.promote_types(dtype, torch.float32)
        x = images.to(wide) / 255 if images.dtype == torch.uint8 else images
        return ((x.to(wide) - self.mean.to(wide)) / self.std.to(wide)).to(dtype)

    def _networks(self) -> tuple[nn.Module, nn.Module | None]:
        if self.training:
            return self.resnet, self.policy_module
        settings, made = self._set(), self._made  # other threads may call as well
        if made is None or made[2] != settings or not made[1].unchanged():
            watch, dtype = Watch(self), next(self.resnet.parameters()).dtype
            self._made = made = deploy(self.resnet, self.policy_module, dtype), watch, settings
        resnet, policy = made[0]
        if isinstance(policy, PenaltyPolicy):
            policy.penalty = self.policy_module.penalty
        return resnet, policy

    def _set(self) -> tuple:
        """Settings of the networks that are no tensors."""
        policy_net = getattr(self.policy_module, "policy_net", None)
        names = ((self.resnet, "always_on"), (self.resnet, "shortcuts"), (policy_net, "size"))
        return tuple(getattr(network, name, None) for network, name in names)

    def _forget(self) -> None:
        """What follows may change the weights."""
        self._made = None

    def _apply(self, fn, recurse=True):
        self._forget()
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> "Classifier":
        self._forget()
        return super().train(mode)

    def load_state_dict(self, *args, **options):
        self._forget()
        return super().load_state_dict(*args, **options)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_made": None}  # made anew where it is wanted
