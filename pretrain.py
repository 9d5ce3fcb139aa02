"""Stage 0: train a base ResNet, which the two policy stages then start from."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import engine
import models
from engine import options


def parse_args():
    parser = options.parser(__doc__, model="R32_C10")
    options.add_training(parser, lr=0.4, wd=5e-4, max_epochs=160)
    add = parser.add_argument
    add("--pretrained", help="ResNet to start from, instead of random weights")
    add("--warmup", type=options.fraction, default=0.1, help="part of the epochs with rising lr")
    add("--label_smoothing", type=options.fraction, default=0.05, help="of the cross entropy")
    add("--clip_norm", type=options.positive, default=5.0, help="largest gradient norm of a step")
    add(
        "--block_drop",
        type=options.fraction,
        default=0.0,
        help="stochastic depth: probability to drop the last block, falling linearly towards the "
        "first; makes a base that tolerates missing blocks",
    )
    return parser.parse_args()


def drop_blocks(num_images: int, num_blocks: int, last: float, device: torch.device) -> Tensor:
    """Policies (B, K) of stochastic depth (Huang et al. 2016): P(drop block k) = last * k / K."""
    drop = torch.arange(1, num_blocks + 1, device=device) / num_blocks * last
    return torch.bernoulli((1 - drop).expand(num_images, -1))


def main() -> None:
    args = parse_args()
    spec = engine.named(partial(models.config, gated=False), args.model)
    folder = engine.checkpoint.base_directory(args.model)
    if not args.load:  # a run killed right after its last evaluation may still be gone on with
        engine.checkpoint.keep_base(args.cv_dir or folder)
    with engine.Run(args, 0, spec, folder) as run:
        train, test = engine.data.load(spec, args, run.device)
        resnet, _ = models.build(args.model)
        if args.pretrained and not args.load:
            engine.checkpoint.load_base(spec, args.pretrained, resnet, models.load_resnet)
        run.place(resnet)
        optimizer = engine.optim.sgd(resnet, args.lr, args.wd)
        run.track("state_dict", resnet, models.load_resnet)
        run.track("optimizer", optimizer)
        step_number = 0

        def train_step(images: Tensor, labels: Tensor):
            nonlocal step_number
            progress = (epoch - 1 + step_number / len(train)) / args.max_epochs
            engine.optim.scale_lr(optimizer, engine.schedule.cosine(progress, args.warmup))
            step_number += 1
            policy = None
            if args.block_drop:
                policy = drop_blocks(len(images), spec.num_blocks, args.block_drop, run.device)
            logits = resnet(images, policy)
            losses = F.cross_entropy(
                logits, labels, reduction="none", label_smoothing=args.label_smoothing
            )
            return losses.mean(), {"correct": logits.argmax(1) == labels, "loss": losses}

        def test_step(images: Tensor, labels: Tensor):
            return {"correct": resnet(images).argmax(1) == labels}

        for epoch in run.epochs():
            resnet.train()
            step_number = 0
            tally = run.train_epoch(train_step, [optimizer], train, clip_norm=args.clip_norm)
            accuracy = tally["correct"].double().mean().item()
            loss = tally["loss"].double().mean().item()
            run.log(
                f"E: {epoch} | A: {accuracy:.3f} | L: {loss:.3f}",
                "train",
                accuracy=accuracy,
                loss=loss,
            )
            if run.tests(epoch):
                resnet.eval()
                tally = run.evaluate(test_step, test)
                accuracy = tally["correct"].double().mean().item()
                run.log(f"TS - A: {accuracy:.4f}", "test", accuracy=accuracy)
            if epoch == args.max_epochs:
                run.save(f"pk_E_{epoch}_A_{accuracy:.3f}.t7", acc=accuracy)


if __name__ == "__main__":
    engine.run_script(main)
