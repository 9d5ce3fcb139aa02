"""Profile a checkpoint: accuracy, blocks used, FLOPs an image, distinct policies.

Without --load the pretrained ResNet runs with all its blocks.
"""

import json
import sys
from pathlib import Path

from torch import Tensor

import engine
import utils
from engine import UserError, options
from engine.trained import TrainedModel


def parse_args():
    parser = options.parser(__doc__)
    options.add_trained(parser)
    add = parser.add_argument
    add("--sample_gates", action="store_true", help="AIG: draw the gates, do not take the likelier")
    add("--batch_size", type=options.count, default=1000, help="images a step")
    add(
        "--row_multiple",
        type=options.count,
        default=1,
        help="run each block on a multiple of so many images, some of them twice: other batch "
        "sizes than these may be slow on a GPU; changes no result",
    )
    add("--time", action="store_true", help="also time the deployed networks at this batch size")
    add(
        "--dependence",
        action="store_true",
        help="also say what the policies owe to the image: accuracy where they are shuffled over "
        "the images, where all get the most frequent one, and under static ones",
    )
    add("--json", type=Path, help="also write the figures, unrounded, to this file")
    return parser.parse_args()


def profile(trained: TrainedModel, test, dependence: bool = False) -> dict:
    """Run every image and gather the figures that this script prints."""

    def test_step(images: Tensor, labels: Tensor):
        logits, policy = trained.run(images)
        return {"policy": policy, "correct": logits.argmax(1) == labels}

    results = engine.evaluate(test_step, test, trained.args.precision)
    policies, correct = results["policy"], results["correct"]
    accuracy, _, blocks, deviation, unique = utils.performance_stats(policies, correct, correct)
    fixed, per_block = trained.flops()
    flops = fixed + policies.double() @ per_block
    figures = {
        "accuracy": accuracy,
        "block_usage": blocks,
        "block_usage_std": deviation,
        "flops": flops.mean().item(),
        "flops_std": flops.std(correction=0).item(),  # numpy's, as released
        "unique_policies": unique,
        "images": len(policies),
        "images_per_second": len(policies) / results.seconds,
    }
    if dependence:
        figures["dependence"] = engine.dependence.measure(trained, test, policies, correct)
    return figures


# options that the figures depend on
ASKED = ("model", "load", "base", "penalty", "precision", "val_split", "subset", "seed")

DEPENDENCE = {
    "own": "own",
    "shuffled": "shuffled",
    "most_frequent": "most frequent",
    "static": "static, as many blocks",
    "static_same_flops": "static, same FLOPs",
}


def print_dependence(figures: dict) -> None:
    for name, title in DEPENDENCE.items():
        row = figures[name]
        print(
            f"    {title + ':':24}{row['accuracy']:.3f} | {row['blocks']:.2f} blocks"
            f" | {row['flops']:.2E} FLOPs"
        )
    print(f"    Blocks where the full network is {engine.dependence.by_difficulty(figures)}")


def main() -> None:
    args = parse_args()
    config = engine.data.config_of(args)
    if args.sample_gates and not config.gated:
        raise UserError(f"--sample_gates is for ConvNet-AIG: {args.model} has no gates")
    engine.ranks.start(device=args.device)
    if args.time and args.sample_gates:
        raise UserError("--time runs gates as they are deployed, deterministic: leave one out")
    if args.time and engine.ranks.world() > 1:
        raise UserError("--time measures one process: run it without torchrun")
    engine.seed_everything(args.seed)
    engine.device.keep_freed_memory()
    trained = TrainedModel(args, config)
    if config.gated:
        trained.resnet.sample_gates = args.sample_gates
    trained.plain.row_multiple = args.row_multiple
    _, test = engine.data.load(config, args, trained.device, training=False)
    if args.base and trained.brings_resnet:
        print(f"--base is not used: {args.load} holds a ResNet of its own", file=sys.stderr)
    if args.dependence and not trained.looks:
        raise UserError("--dependence asks of a policy network: there is none here")
    if args.time:
        trained.deployed()  # what cannot be timed is refused before images run
    trained.tell_accuracy(test)
    figures = profile(trained, test, args.dependence)
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
    if args.dependence:
        print_dependence(figures["dependence"])
    if config.gated:
        print(f"    Gates: {'sampled' if args.sample_gates else 'argmax'}")
        figures["execution_rate"] = figures["block_usage"] / config.num_blocks
        figures["target_rate"] = trained.target_rate
        if trained.target_rate is not None:
            print(
                f"    Execution rate: {figures['execution_rate']:.3f}, target "
                f"{trained.target_rate:.3f}"
            )
    if args.time:
        figures |= trained.time(test, args.batch_size)
        print(
            f"    Time/img: {figures['ms_per_image']:.3f} ms\n"
            f"    Speed-up: {figures['speed_up']:.2f} over the full ResNet,"
            f" batch {figures['batch_size']}"
        )
    if args.json:
        figures |= {name: getattr(args, name) for name in ASKED}
        figures |= {"policy": trained.policy_name, "kind": trained.kind}
        with engine.user_errors(args.json):
            args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    engine.run_script(main)
