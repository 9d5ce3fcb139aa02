"""ConvNet-AIG: train a ResNet together with the gates that decide, block by block, what it runs."""

import re
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import engine
import models
import utils
from engine import Results, Shard, UserError, bases, options, ranks, schedule

RECIPES = {  # the released code's
    "CIFAR": {"target": "0.6", "loss_factor": 2.0, "wd": 5e-4, "max_epochs": 350,
              "lr_steps": [150, 250]},
    "pictures": {"target": "0.7", "loss_factor": 1.0, "wd": 1e-4, "max_epochs": 100,
                 "lr_steps": [30, 60, 90]},
}  # fmt: skip

PUBLISHED = {  # per-block target rates, t standing for the one that is given
    "resnet50": "1 1 0.8 1 t t t 1 t t t t t 1 0.7 1",
    "resnet101": " ".join(["1"] * 8 + ["t"] * 25),
}


def parse_args():
    parser = options.parser(__doc__, model="AIG110_C10")
    options.add_training(parser, lr=0.1, wd=None, max_epochs=None)
    add = parser.add_argument
    add(
        "--target",
        help="how often a block is to be executed: one rate, K rates with commas between, or a "
        "published schedule with its rate, resnet50:0.5 or resnet101:0.3 (default: CIFAR 0.6, "
        "pictures 0.7)",
    )
    add("--loss_factor", type=options.weight, help="of the target loss (default: CIFAR 2, else 1)")
    add("--gate_lr", type=options.positive, default=1.0,
        help="learning-rate factor of the gates' last layer")  # fmt: skip
    add("--lr_steps", type=options.count, nargs="+",
        help="epochs after which the rate falls to a tenth (default: CIFAR 150 250, "
        "pictures 30 60 90)")  # fmt: skip
    add("--schedule", choices=("step", "cosine"), default="step",
        help="steps as released, or a rise in the first tenth and a cosine to zero")  # fmt: skip
    add("--pretrained", help="ResNet to start from; its gates start anew")
    options.add_base_pixels(parser, "--pretrained")
    parser.set_defaults(warmup=0.1, lr_decay_ratio=0.1)
    return parser.parse_args()


def fill_in(args, config: models.Config) -> None:
    """The released code's options for this kind of data, where none are given."""
    for name, value in RECIPES["pictures" if config.has_pictures else "CIFAR"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def target_rates(text: str, num_blocks: int) -> Tensor:
    """The (K,) target rates that `--target` spells. Raises UserError where it spells none."""
    name, _, rate = text.rpartition(":")
    if name and name not in PUBLISHED:
        raise UserError(f"--target {text}: no schedule {name}, only {', '.join(PUBLISHED)}")
    spelt = PUBLISHED[name].replace("t", rate) if name else rate
    try:
        rates = [float(part) for part in re.split(r"[,\s]+", spelt.strip())]
    except ValueError:
        raise UserError(f"--target {text}: {spelt!r} are no numbers") from None
    rates = rates * num_blocks if len(rates) == 1 else rates
    if len(rates) != num_blocks or not all(0 <= rate <= 1 for rate in rates):
        raise UserError(f"--target {text}: one rate or {num_blocks}, in [0, 1]")
    return torch.tensor(rates)


def make_optimizer(net: models.GatedResNet, args) -> torch.optim.SGD:
    """SGD with momentum, as released; the gates' last layers may learn at a rate of their own."""
    last = [p for gate in net.gates for p in gate.fc2.parameters()]
    rest = [p for p in net.parameters() if all(p is not q for q in last)]
    groups = [
        {"params": rest, "initial_lr": args.lr},
        {"params": last, "initial_lr": args.lr * args.gate_lr},
    ]
    return torch.optim.SGD(groups, args.lr, momentum=0.9, weight_decay=args.wd)


def train_step(net, images: Tensor, labels: Tensor, shard: Shard, targets: Tensor, args):
    """Part of a batch's cross entropy, and how far its execution rates are from their targets."""
    logits, executed = net(images)
    losses = F.cross_entropy(logits, labels, reduction="none")
    rates = executed.mean(0)
    if shard.world > 1:  # over all ranks; a micro-batch keeps to its own rates
        share = torch.full((), shard.share, device=images.device)
        rates = ranks.total(share * rates) / ranks.total(share)
    loss = losses.mean() + args.loss_factor * utils.target_rate_loss(rates, targets)
    return shard.share * loss, {
        "policy": executed,
        "correct": logits.argmax(1) == labels,
        "loss": losses,
    }


def test_step(net, images: Tensor, labels: Tensor):
    logits, executed = net(images)
    return {"policy": executed, "correct": logits.argmax(1) == labels, "label": labels}


def log(run: engine.Run, split: str, results: Results) -> None:
    """The line of an epoch or of an evaluation, without a reward, and the rates of all blocks."""
    policies, correct = results["policy"], results["correct"]
    accuracy, _, blocks, deviation, unique = utils.performance_stats(policies, correct, correct)
    run.logs.line(
        f"A: {accuracy:.3f} | S: {blocks:.3f} | V: {deviation:.3f} | #: {unique}",
        split,
        accuracy=accuracy,
        sparsity=blocks,
        variance=deviation,
        unique_policies=unique,
    )
    run.logs.rates(split, policies.double().mean(0))
    if split == "test":
        labels = results["label"]
        run.logs.kept(policies, labels)
        of_class = (policies[labels == c] for c in range(run.config.num_classes))
        run.logs.metrics["test_rates_by_class"] = [  # null of a class without an image
            [round(rate, 4) for rate in rows.double().mean(0).tolist()] if len(rows) else None
            for rows in of_class
        ]


def main() -> None:
    args = parse_args()
    config = engine.data.config_of(args, gated=True)
    fill_in(args, config)
    targets = target_rates(args.target, config.num_blocks)
    with engine.Run(args, 3, config) as run:
        train, test = engine.data.load(config, args, run.device)
        net, _ = models.build(args.model, config.num_classes)
        if args.pretrained and not args.load:
            start = bases.pretrained(config, args.pretrained, args.base_pixels)
            with engine.user_errors(start.path):
                models.load_ungated(net, start.resnet)
        run.place(net)
        run.extras["targets"] = targets.tolist()
        targets = targets.to(run.device)
        learner = run.wrap(net, drops=bool((targets >= 1).any()))  # whose gates are not asked
        optimizer = make_optimizer(net, args)
        run.restore(state_dict=net, optimizer=optimizer)
        net.set_targets(run.extras["targets"])  # which may be others than those of --load

        for epoch in run.epochs():
            # the rate that an epoch has in its middle
            schedule.scale_lr(optimizer, schedule.lr_factor(args, epoch - 0.5))
            net.train()
            for images, labels, shard in run.batches(train):
                with run.autocast():
                    loss, outcome = train_step(learner, images, labels, shard, targets, args)
                run.step(loss, outcome)
            log(run, "train", run.results)
            if run.tests(epoch):
                net.eval()
                log(run, "test", run.evaluate(partial(test_step, net), test))
                run.save_evaluated()


if __name__ == "__main__":
    engine.run_script(main)
