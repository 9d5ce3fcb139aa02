"""Profile a checkpoint: accuracy, blocks used, FLOPs an image, distinct policies.

Without --load the pretrained ResNet runs with all its blocks.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import engine
import models
import utils
from engine import UserError, checkpoint, options

TIMED_BATCHES, TIMED_SECONDS = 200, 30.0  # --time stops at whichever comes first


def parse_args():
    parser = options.parser(__doc__)
    options.add_base(parser)
    options.add_static(parser)
    add = parser.add_argument
    add("--load", help="stage-1, stage-2 or AIG checkpoint, or the cv_dir that holds last.t7")
    add("--sample_gates", action="store_true", help="AIG: draw the gates, do not take the likelier")
    add("--batch_size", type=options.count, default=1000, help="images a step")
    add("--time", action="store_true", help="also time the deployed networks at this batch size")
    add("--json", type=Path, help="also write the figures, unrounded, to this file")
    return parser.parse_args()


def load_gated(args, spec) -> models.GatedResNet:
    """A ConvNet-AIG checkpoint's network, ours or the released code's."""
    if not args.load:
        raise UserError(f"{args.model} comes with no base: name its checkpoint with --load")
    if args.policy:
        raise UserError(f"{args.model} decides by its gates: leave --policy out")
    net, _ = models.build(args.model, spec.num_classes)
    content = checkpoint.read_for(spec, args.load)
    with engine.about(args.load):
        models.load_gated(net, checkpoint.resnet_weights(content, args.load))
    net.set_targets(content.get("targets", []))
    net.sample_gates = args.sample_gates
    return net


def load_networks(args, spec) -> tuple[models.ResNet, models.PolicyNet | None]:
    """The two networks a checkpoint stands for; the policy network is None where none is used.

    A static policy recorded in the checkpoint is put into args.policy, unless one is given.
    """
    resnet, policy_net = models.build(args.model, spec.num_classes)
    content = checkpoint.read_for(spec, args.load) if args.load else {}
    if "resnet" in content or "state_dict" in content:
        with engine.about(args.load):
            models.load_resnet(resnet, checkpoint.resnet_weights(content, args.load))
    else:
        checkpoint.load_base(spec, args.base, resnet, models.load_resnet)
    args.policy = args.policy or checkpoint.static_policy_of(content)
    if not args.load or args.policy or "state_dict" in content:
        return resnet, None
    with engine.about(args.load):
        models.load_policy(policy_net, checkpoint.policy_weights(content, args.load))
    if "resnet" not in content:
        checkpoint.check_base(content, args.load, resnet)
    return resnet, policy_net


def decide(policy_net, static: Tensor, images: Tensor) -> Tensor:
    """Policies (B, K) of a batch: the most probable, or without a policy network `static` (K,)."""
    if policy_net is None:
        return static.expand(len(images), -1)
    return utils.most_probable(policy_net(images)[0])


def run_under(resnet, policy_net, static: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of a batch and the policies (B, K) that its images ran under."""
    policy = decide(policy_net, static, images)
    return resnet(images, policy), policy


def flops_by_block(resnet, policy_net, input_size) -> tuple[int, Tensor]:
    """FLOPs of what every image runs, its decision included, and of each block; (K,)."""
    if isinstance(resnet, models.GatedResNet):
        fixed, per_block = utils.block_flops(resnet.resnet, input_size)
        for k, gate in enumerate(resnet.gates):
            if k not in resnet.always_on:
                fixed += utils.count_flops(gate, (gate.fc1.in_features, 1, 1))
        return fixed, per_block
    fixed, per_block = utils.block_flops(resnet, input_size)
    if policy_net is not None:
        fixed += utils.count_flops(policy_net, input_size)
    return fixed, per_block


def profile(run: Callable, test, fixed: int, per_block: Tensor, precision: str) -> dict:
    """Run every image by `run(images) -> (logits, policy)`; the figures that test.py prints."""

    def test_step(images: Tensor, labels: Tensor):
        logits, policy = run(images)
        reward, correct = utils.reward(logits, labels, policy, penalty=0.0)
        return {"policy": policy, "reward": reward, "correct": correct}

    outcome = engine.evaluate(test_step, test, precision)
    policies, rewards, correct = outcome.of_policies()
    accuracy, _, blocks, deviation, unique = utils.performance_stats(policies, rewards, correct)
    flops = fixed + policies.double() @ per_block
    return {
        "accuracy": accuracy,
        "block_usage": blocks,
        "block_usage_std": deviation,
        "flops": flops.mean().item(),
        "flops_std": flops.std().item() if len(flops) > 1 else 0.0,
        "unique_policies": len(unique),
        "images": len(policies),
        "images_per_second": len(policies) / outcome.seconds,
    }


def time_deployed(resnet, policy_net, static: Tensor, test, args) -> dict:
    """Medians over batches: milliseconds an image, and the speed-up over the full ResNet.

    Both run deployed, in turn on the same images, our side with the policy network or the gates.
    """
    fast, fast_policy = models.deploy(resnet, policy_net, engine.device.dtype(args.precision))
    full = fast

    def ours():
        return run_under(fast, fast_policy, static, images)

    if isinstance(resnet, models.GatedResNet):
        full = fast.resnet

        def ours():
            return fast(images)

    seconds, full_seconds = [], []
    start = time.perf_counter()
    for images, _, _ in test.epoch(0):
        if len(images) < min(args.batch_size, test.num_images) or len(seconds) == TIMED_BATCHES:
            break
        if not seconds:
            ours(), full(images)
        seconds.append(engine.device.timed(ours, images.device))
        full_seconds.append(engine.device.timed(partial(full, images), images.device))
        if len(seconds) >= 5 and time.perf_counter() - start > TIMED_SECONDS:
            break
    median = statistics.median(seconds)
    return {
        "batch_size": args.batch_size,
        "ms_per_image": median / min(args.batch_size, test.num_images) * 1e3,
        "speed_up": statistics.median(full_seconds) / median,
    }


def main() -> None:
    args = parse_args()
    spec = engine.data.spec_of(models.config, args)
    engine.ranks.start()
    device = engine.device.pick()
    engine.device.keep_freed_memory()
    resnet, policy_net = (load_gated(args, spec), None) if spec.gated else load_networks(args, spec)
    static = options.static_policy(args, spec.stages, utils.static_policy, device)
    if static is None:
        static = torch.ones(spec.num_blocks, device=device)
    _, test = engine.data.load(spec, args, device, training=False)
    for network in filter(None, (resnet, policy_net)):
        engine.device.place(network, device).eval()
    run = resnet if spec.gated else partial(run_under, resnet, policy_net, static)
    costs = flops_by_block(resnet, policy_net, (3, spec.image_size, spec.image_size))
    figures = profile(run, test, *costs, args.precision)
    if not engine.ranks.is_main():
        return
    if args.subset:
        print(f"first {figures['images']} images only", file=sys.stderr)
    print(
        f"    Accuracy: {figures['accuracy']:.3f}\n"
        f"    Block Usage: {figures['block_usage']:.3f} ± {figures['block_usage_std']:.3f}\n"
        f"    FLOPs/img: {figures['flops']:.2E} ± {figures['flops_std']:.2E}\n"
        f"    Unique Policies: {figures['unique_policies']}"
    )
    if spec.gated:
        print(f"    Gates: {'sampled' if args.sample_gates else 'argmax'}")
    if args.time:
        figures |= time_deployed(resnet, policy_net, static, test, args)
        print(
            f"    Time/img: {figures['ms_per_image']:.3f} ms\n"
            f"    Speed-up: {figures['speed_up']:.2f} over the full ResNet, batch {args.batch_size}"
        )
    if args.json:
        figures |= {name: getattr(args, name) for name in ("model", "load", "policy", "precision")}
        with engine.about(args.json):
            args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    engine.run_script(main)
