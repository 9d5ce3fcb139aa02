"""Profile a checkpoint: accuracy, blocks used, FLOPs an image, distinct policies.

Without --load the pretrained ResNet runs with all its blocks.
"""

import json
import sys
from pathlib import Path

from torch import Tensor

import engine
import models
import utils
from engine import UserError, options
from subject import Subject


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


def profile(subject: Subject, test) -> dict:
    """Run every image and gather the figures that this script prints."""

    def test_step(images: Tensor, labels: Tensor):
        logits, policy = subject.run(images)
        reward, correct = utils.reward(logits, labels, policy, penalty=0.0)
        return {"policy": policy, "reward": reward, "correct": correct}

    outcome = engine.evaluate(test_step, test, subject.args.precision)
    policies, rewards, correct = outcome.of_policies()
    accuracy, _, blocks, deviation, unique = utils.performance_stats(policies, rewards, correct)
    fixed, per_block = subject.flops()
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


def main() -> None:
    args = parse_args()
    spec = engine.data.spec_of(models.config, args)
    engine.ranks.start()
    if args.time and engine.ranks.world() > 1:
        raise UserError("--time measures one process: run it without torchrun")
    engine.device.seed_everything(args.seed)
    engine.device.keep_freed_memory()
    subject = Subject(args, spec)
    if spec.gated:
        subject.resnet.sample_gates = args.sample_gates
    _, test = engine.data.load(spec, args, subject.device, training=False)
    figures = profile(subject, test)
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
        figures |= subject.time(test, args.batch_size)
        print(
            f"    Time/img: {figures['ms_per_image']:.3f} ms\n"
            f"    Speed-up: {figures['speed_up']:.2f} over the full ResNet, batch {args.batch_size}"
        )
    if args.json:
        figures |= {name: getattr(args, name) for name in ("model", "load", "precision")}
        figures["policy"] = subject.policy
        with engine.about(args.json):
            args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    engine.run_script(main)
