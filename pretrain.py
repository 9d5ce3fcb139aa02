"""Stage 0: train a base ResNet, which the two policy stages then start from."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import engine
import models
import utils
from engine import Shard, bases, options, schedule


def parse_args():
    parser = options.parser(__doc__, model="R32_C10")
    options.add_training(parser, lr=0.4, wd=5e-4, max_epochs=160, cv_dir="cv/pretrained/<model>/")
    add = parser.add_argument
    add(
        "--pretrained",
        help="ResNet to start from, which may have fewer blocks; folders of pictures: "
        "torchvision's by default",
    )
    options.add_base_pixels(parser, "--pretrained")
    add("--from_scratch", action="store_true", help="folders of pictures: start from nothing")
    add("--warmup", type=options.fraction, default=0.1, help="part of the epochs with rising lr")
    add("--label_smoothing", type=options.fraction, default=0.05, help="of the cross entropy")
    add("--clip_norm", type=options.positive, default=5.0, help="largest gradient norm of a step")
    add(
        "--routes",
        action="store_true",
        help="beside each full pass one under a random policy, which learns from the full one as "
        "well; makes a base that serves every route",
    )
    add("--route_flip", type=options.fraction, default=0.1, help="of a route's blocks, see utils")
    add(
        "--route_distill",
        type=options.fraction,
        default=0.7,
        help="weight of learning a route's classes from the full pass, out of 1 with the labels",
    )
    add("--temperature", type=options.positive, default=2.0, help="of the softmax in distillation")
    parser.set_defaults(schedule="cosine")
    return parser.parse_args()


def full_and_route(
    shard: Shard, stages: Sequence[int], flip: float, device: torch.device
) -> Tensor:
    """Policies (2, n, K): every block, and one random route for the whole batch.

    One route costs no gathering of images. Both go through the network together, so BatchNorm
    normalises every route by the statistics that it will have in an evaluation.
    """
    noise = shard.common_noise(len(stages) + 1 + sum(stages))
    route = engine.device.send(utils.random_route(noise, stages, flip), device)
    policies = torch.stack([torch.ones_like(route), route])
    return policies[:, None].expand(-1, shard.stop - shard.start, -1)


def load_start(run: engine.Run, resnet: models.ResNet) -> None:
    """The weights to start from; a folder of pictures has a classifier of its own."""
    args, config = run.args, run.config
    if args.pretrained:
        start = bases.pretrained(config, args.pretrained, args.base_pixels)
        path, state = start.path, start.resnet
        if isinstance(resnet, models.CifarResNet):
            resnet.take_shortcuts(start.shortcuts)
    elif config.dataset == "Folder" and not args.from_scratch:
        way_out = "name a file with --pretrained, or start with --from_scratch"
        path, state = None, bases.torchvision_resnet(config.depth, way_out)
    else:
        return
    if config.dataset == "Folder":
        own = {f"fc.{n}": tensor for n, tensor in resnet.fc.state_dict().items()}
        known = models.our_names(state)
        state = {n: t for n, t in known.items() if not n.startswith("fc.")} | own
    with engine.user_errors(path):
        num_blocks = models.load_grown(resnet, state)
    if num_blocks < config.num_blocks:
        run.note(f"{path}: {num_blocks} of {config.num_blocks} blocks, the others add nothing yet")


def train_step(
    resnet: nn.Module, images: Tensor, labels: Tensor, shard: Shard, stages: Sequence[int], args
):
    """Part of a batch's loss, and what became of its images (B, 3, H, W)."""
    policy = None
    if args.routes:
        policy = full_and_route(shard, stages, args.route_flip, images.device)
    logits = resnet(images, policy)
    logits, routed = logits if args.routes else (logits, None)
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=args.label_smoothing)
    loss = losses.sum() / shard.total
    if args.routes:
        loss = loss + shard.share * utils.route_loss(
            routed, logits, labels, args.route_distill, args.temperature
        )
    return loss, {"correct": logits.argmax(1) == labels, "loss": losses}


def main() -> None:
    args = parse_args()
    config = engine.data.config_of(args, gated=False, told_by=["load"])
    with engine.Run(args, 0, config, bases.base_directory(args.model)) as run:
        if not args.load:  # a run killed right after its last evaluation may be gone on with
            bases.keep_base(run.cv_dir)
        train, test = engine.data.load(config, args, run.device)
        resnet, _ = models.build(args.model, config.num_classes)
        if not args.load:
            load_start(run, resnet)
        run.place(resnet)
        if args.pretrained and not args.load and config.dataset != "Folder":
            run.tell_accuracy(resnet, test)
        optimizer = schedule.sgd(resnet, args.lr, args.wd)
        learner = run.wrap(resnet)
        run.restore(state_dict=resnet, optimizer=optimizer)

        def test_step(images: Tensor, labels: Tensor):
            return {"correct": resnet(images).argmax(1) == labels}

        for epoch in run.epochs():
            resnet.train()
            for images, labels, shard in run.batches(train):
                epochs_done = epoch - 1 + shard.step / len(train)
                schedule.scale_lr(optimizer, schedule.lr_factor(args, epochs_done))
                with run.autocast():
                    loss, outcome = train_step(learner, images, labels, shard, config.stages, args)
                run.step(loss, outcome, args.clip_norm)
            accuracy, loss = (run.results[n].double().mean().item() for n in ("correct", "loss"))
            run.logs.line(
                f"A: {accuracy:.3f} | L: {loss:.3f}", "train", accuracy=accuracy, loss=loss
            )
            if run.tests(epoch):
                resnet.eval()
                results = run.evaluate(test_step, test)
                accuracy = results["correct"].double().mean().item()
                run.logs.line(f"A: {accuracy:.4f}", "test", accuracy=accuracy)
            if epoch == args.max_epochs:
                run.save(f"pk_E_{epoch}_A_{accuracy:.3f}.t7", acc=accuracy)


if __name__ == "__main__":
    engine.run_script(main)
