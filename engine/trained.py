"""A checkpoint to be looked at: its networks, what they decide, what that costs."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor, nn

import models
import utils
from deploy import deploy
from models import Checkpoint, Config, GreedyPolicy, PenaltyPolicy, StaticPolicy

from . import bases, device, loop, options, ranks
from .data import Loader
from .process import UserError, user_errors

# of --time; so many batches are timed however long they take
WARM_UP_SECONDS, TIMED_SECONDS, TIMED_PASSES, TIMED_BATCHES = 10.0, 30.0, 5, 5
TIMED_BYTES = 2**29  # of images that are held meanwhile


def decision_flops(resnet: nn.Module, policy: nn.Module | None, input_size) -> int:
    """FLOPs an image of the policy, or of the gates that are not always open."""
    if not resnet.decides:
        is_static = policy is None or isinstance(policy, StaticPolicy)
        return 0 if is_static else utils.count_flops(policy, input_size)
    seen: dict[nn.Module, tuple] = {}  # by the gates that are asked
    hooks = [
        gate.register_forward_pre_hook(lambda gate, given: seen.update({gate: given[0].shape[1:]}))
        for gate in resnet.gates
    ]
    utils.count_flops(resnet, input_size)
    for hook in hooks:
        hook.remove()
    return sum(utils.count_flops(gate, shape) for gate, shape in seen.items())


class TrainedModel:
    """The networks that options name with --model, --load, --base and --policy, to be evaluated.

    `policy` decides for `resnet`; it is None for ConvNet-AIG, whose ResNet decides by itself.
    `policy_name` is that of a static policy, if it has one. `candidates` (C, K) are what its policy
    network learned to choose among, if it had a warm start.
    """

    def __init__(self, args, config: Config):
        self.args, self.config = args, config
        self.device = device.pick(args.device)
        device.set_up(args.precision)
        device.tell_if_slow(self.device, args.precision)
        found = Checkpoint()
        if args.load:
            found = bases.read_for(config, args.load, args.base_pixels)
        self.resnet, policy_net = models.build(args.model, config.num_classes)
        self.candidates = found.candidates
        self.brings_resnet = found.resnet is not None
        targets = found.targets
        self.target_rate = sum(targets) / len(targets) if targets else None
        self.policy_name = utils.with_seed(args.policy, args.seed) or found.static_policy
        if config.gated:
            self.policy = None
            self._load_gated(found)
        else:
            self.policy = self._load(found, policy_net)
        for network in filter(None, (self.resnet, self.policy)):
            device.place(network, self.device).eval()

    def _load_gated(self, found: Checkpoint) -> None:
        """ConvNet-AIG: the gates decide, so nothing else may."""
        if self.args.penalty is not None:
            raise UserError("--penalty: there is no policy network here that could choose by it")
        if not self.args.load:
            model = self.args.model
            raise UserError(f"{model} comes with no base: name its checkpoint with --load")
        if self.args.policy:
            raise UserError(f"{self.args.model} decides by its gates: leave --policy out")
        bases.load_into(self.resnet, found)

    def _load(self, found: Checkpoint, policy_net: models.PolicyNet) -> nn.Module:
        """BlockDrop, or the base ResNet alone. Returns who decides."""
        if found.resnet is not None:
            bases.load_into(self.resnet, found)
        else:
            bases.load_base(self.config, self.args.base, self.resnet, self.args.base_pixels)
        static = options.static_policy(self.policy_name, self.config, self.args.seed)
        if found.policy is not None and static is None:
            bases.load_into(policy_net, found)
            if found.resnet is None:
                bases.check_base(found, self.resnet)
        with user_errors():
            return found.policy_module(self.config, policy_net, static, self.args.penalty)

    @property
    def looks(self) -> bool:
        """Whether a policy network looks at the images."""
        return isinstance(self.policy, (GreedyPolicy, PenaltyPolicy))

    def base(self) -> "TrainedModel":
        """The base ResNet alone, under the same options. Raises UserError where there is none."""
        args = argparse.Namespace(**vars(self.args) | {"load": None, "penalty": None})
        return TrainedModel(args, self.config)

    @property
    def plain(self) -> models.ResNet:
        """The ResNet without what decides."""
        return self.resnet.resnet if self.resnet.decides else self.resnet

    def tell_accuracy(self, loader: Loader) -> None:
        """Say so where the ResNet without what decides is near chance; one that was finetuned under
        a static policy may be.
        """
        if self.policy_name is None:
            accuracy, _ = loop.first_accuracy(self.plain, loader, self.args.precision)
            if ranks.is_main() and (told := loop.near_chance(accuracy, self.config.num_classes)):
                print(told, file=sys.stderr)

    @property
    def kind(self) -> str:
        """By what decides: "ConvNet-AIG", "static", "BlockDrop", else "full ResNet"."""
        if self.resnet.decides:
            return "ConvNet-AIG"
        return "static" if self.policy_name else "BlockDrop" if self.looks else "full ResNet"

    def run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) of a batch and the policies (B, K) that its images ran under."""
        return models.predict(self.resnet, self.policy, images)

    def flops(self) -> tuple[int, Tensor]:
        """FLOPs of what every image runs, its decision included, and of each block, (K,)."""
        fixed, per_block = self.resnet_flops()
        return fixed + self.decision_flops(), per_block

    def resnet_flops(self) -> tuple[int, Tensor]:
        """The same of the ResNet alone, without what decides."""
        return utils.block_flops(self.plain, self.input_size)

    def decision_flops(self) -> int:
        """FLOPs an image of what decides; see the function of this name."""
        return decision_flops(self.resnet, self.policy, self.input_size)

    @property
    def input_size(self) -> tuple[int, int, int]:
        return 3, self.config.image_size, self.config.image_size

    def deployed(self) -> tuple[Callable[[Tensor], object], Callable[[Tensor], object]]:
        """What images (B, 3, H, W) go through in use, decision included, and the full ResNet.

        Raises UserError naming the part that `deploy` does not know.
        """
        with user_errors():
            fast, policy = deploy(self.resnet, self.policy, device.dtype(self.args.precision))
        full = fast.resnet if self.resnet.decides else fast
        return partial(models.predict, fast, policy), full

    def time(self, test, batch_size: int) -> dict[str, float]:
        """Medians over batches: milliseconds an image, and the speed-up over the full ResNet.

        Both run deployed, in turn on the same images. A pass that is not timed comes first, or ten
        seconds of one: kernels are made anew for each size that occurs.
        """
        ours, full = self.deployed()
        size = min(batch_size, test.num_images)
        test = Held(test, size)
        for images in whole_batches(test, size, 1, WARM_UP_SECONDS):
            ours(images), full(images)
        seconds, full_seconds = [], []
        for images in whole_batches(test, size, TIMED_PASSES, TIMED_SECONDS, TIMED_BATCHES):
            seconds.append(device.timed(partial(ours, images), images.device))
            full_seconds.append(device.timed(partial(full, images), images.device))
        full_speed = speed(full_seconds, full_seconds, size)
        return {
            "batch_size": size,
            "full_ms_per_image": full_speed["ms_per_image"],
            **speed(seconds, full_seconds, size),
        }


def speed(seconds: list[float], reference: list[float], size: int) -> dict[str, float]:
    """Medians over batches of this size: milliseconds an image, speed-up over a reference.

    seconds, reference: what each batch took, the same batches in both.
    """
    return {
        "ms_per_image": statistics.median(seconds) / size * 1e3,
        "speed_up": statistics.median(b / a for a, b in zip(seconds, reference, strict=True)),
    }


class Held:
    """The first images of a data set, in memory: its workers decode none while others are timed."""

    def __init__(self, test, size: int):
        self.batches: list[Tensor] = []
        for images, _, _ in test.epoch(0):
            if len(images) < size or sum(b.nbytes for b in self.batches) > TIMED_BYTES:
                break
            self.batches.append(images)

    def epoch(self, _: int) -> Iterator[tuple[Tensor, None, None]]:
        return ((images, None, None) for images in self.batches)


def whole_batches(
    test, size: int, passes: int, seconds: float = float("inf"), least: int = 1
) -> Iterator[Tensor]:
    """Images of the batches of this size, for so many passes, or so many seconds and batches."""
    start, count = time.perf_counter(), 0
    for _ in range(passes):
        for images, _, _ in test.epoch(0):
            if len(images) < size:
                break
            yield images
            count += 1
            if count >= least and time.perf_counter() - start > seconds:
                return
