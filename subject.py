"""A checkpoint to be looked at: its networks, what they decide, what that costs."""

import statistics
import time
from functools import partial

import torch
from torch import Tensor, nn

import engine
import models
import utils
from engine import UserError, checkpoint, options

TIMED_BATCHES, TIMED_SECONDS = 200, 30.0  # timing stops at whichever comes first


def decision_flops(resnet: nn.Module, policy_net: nn.Module | None, input_size) -> int:
    """FLOPs an image of the policy network, or of the gates that are not always open."""
    if policy_net is not None:
        return utils.count_flops(policy_net, input_size)
    gates = getattr(resnet, "gates", [])
    asked = (gate for k, gate in enumerate(gates) if k not in resnet.always_on)
    return sum(utils.count_flops(gate, (gate.fc1.in_features, 1, 1)) for gate in asked)


class Subject:
    """The networks that options name with --model, --load, --base and --policy, to be evaluated.

    policy_net is None where all images get the policy `static` (K,), and for ConvNet-AIG, whose
    gates are in `resnet`.
    """

    def __init__(self, args, spec):
        self.args, self.spec = args, spec
        self.device = engine.device.pick()
        self.policy = args.policy  # static, by name
        self.resnet, self.policy_net = self._load_gated() if spec.gated else self._load()
        static = options.static_policy(
            self.policy, args.seed, spec.stages, utils.static_policy, self.device
        )
        self.is_static = static is not None
        ones = torch.ones(spec.num_blocks, device=self.device)
        self.static = ones if static is None else static
        for network in filter(None, (self.resnet, self.policy_net)):
            engine.device.place(network, self.device).eval()

    def _load_gated(self) -> tuple[models.GatedResNet, None]:
        """A ConvNet-AIG checkpoint's network, ours or the released code's."""
        args = self.args
        if not args.load:
            raise UserError(f"{args.model} comes with no base: name its checkpoint with --load")
        if args.policy:
            raise UserError(f"{args.model} decides by its gates: leave --policy out")
        net, _ = models.build(args.model, self.spec.num_classes)
        content = checkpoint.read_for(self.spec, args.load)
        with engine.about(args.load):
            models.load_gated(net, checkpoint.resnet_weights(content, args.load))
        net.set_targets(content.get("targets", []))
        return net, None

    def _load(self) -> tuple[models.ResNet, models.PolicyNet | None]:
        """A BlockDrop checkpoint's networks, or the base ResNet's where there is none."""
        args = self.args
        resnet, policy_net = models.build(args.model, self.spec.num_classes)
        content = checkpoint.read_for(self.spec, args.load) if args.load else {}
        if "resnet" in content or "state_dict" in content:
            with engine.about(args.load):
                models.load_resnet(resnet, checkpoint.resnet_weights(content, args.load))
        else:
            checkpoint.load_base(self.spec, args.base, resnet, models.load_resnet)
        self.policy = args.policy or checkpoint.static_policy_of(content)
        if not args.load or self.policy or "state_dict" in content:
            return resnet, None
        with engine.about(args.load):
            models.load_policy(policy_net, checkpoint.policy_weights(content, args.load))
        if "resnet" not in content:
            checkpoint.check_base(content, args.load, resnet)
        return resnet, policy_net

    @property
    def plain(self) -> models.ResNet:
        """The ResNet without what decides."""
        return self.resnet.resnet if self.spec.gated else self.resnet

    def decide(self, policy_net, images: Tensor) -> Tensor:
        """Policies (B, K) of a batch: the most probable, or the static one."""
        if policy_net is None:
            return self.static.expand(len(images), -1)
        return utils.most_probable(policy_net(images)[0])

    def run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) of a batch and the policies (B, K) that its images ran under."""
        if self.spec.gated:
            return self.resnet(images)
        policy = self.decide(self.policy_net, images)
        return self.resnet(images, policy), policy

    def flops(self) -> tuple[int, Tensor]:
        """FLOPs of what every image runs, its decision included, and of each block, (K,)."""
        size = (3, self.spec.image_size, self.spec.image_size)
        fixed, per_block = utils.block_flops(self.plain, size)
        return fixed + decision_flops(self.resnet, self.policy_net, size), per_block

    def time(self, test, batch_size: int) -> dict[str, float]:
        """Medians over batches: milliseconds an image, and the speed-up over the full ResNet.

        Both run deployed, in turn on the same images, ours with what decides.
        """
        dtype = engine.device.dtype(self.args.precision)
        fast, fast_policy = models.deploy(self.resnet, self.policy_net, dtype)
        full = fast.resnet if self.spec.gated else fast

        def ours():
            return (
                fast(images) if self.spec.gated else fast(images, self.decide(fast_policy, images))
            )

        seconds, full_seconds = [], []
        start = time.perf_counter()
        for images, _, _ in test.epoch(0):
            if len(images) < min(batch_size, test.num_images) or len(seconds) == TIMED_BATCHES:
                break
            if not seconds:
                ours(), full(images)
            seconds.append(engine.device.timed(ours, images.device))
            full_seconds.append(engine.device.timed(partial(full, images), images.device))
            if len(seconds) >= 5 and time.perf_counter() - start > TIMED_SECONDS:
                break
        median = statistics.median(seconds)
        return {
            "batch_size": batch_size,
            "ms_per_image": median / min(batch_size, test.num_images) * 1e3,
            "speed_up": statistics.median(full_seconds) / median,
        }
