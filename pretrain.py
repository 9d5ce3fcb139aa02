"""Stage 0: train a base ResNet, which the two policy stages then start from."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import engine
import models
from engine import Part, options


def parse_args():
    parser = options.parser(__doc__, model="R32_C10")
    options.add_training(parser, lr=0.4, wd=5e-4, max_epochs=160)
    add = parser.add_argument
    add("--pretrained", help="ResNet to start from; folders of pictures: torchvision's by default")
    add("--from_scratch", action="store_true", help="folders of pictures: start from nothing")
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


def drop_blocks(noise: Tensor, last: float) -> Tensor:
    """Policies of stochastic depth (Huang et al. 2016), P(drop block k) = last * k / K.

    noise: (B, K), uniform in [0, 1). Returns its shape.
    """
    num_blocks = noise.shape[1]
    drop = torch.arange(1, num_blocks + 1, device=noise.device) / num_blocks * last
    return (noise >= drop).float()


def load_start(resnet: models.ResNet, spec, args) -> None:
    """The weights to start from; a folder of pictures has a classifier of its own."""
    if args.pretrained:
        path = engine.checkpoint.find_base(args.model, args.pretrained)
        state = engine.checkpoint.resnet_weights(engine.checkpoint.read(path), path)
    elif spec.dataset == "Folder" and not args.from_scratch:
        way_out = "name a file with --pretrained, or start with --from_scratch"
        state = engine.published.resnet(spec.depth, way_out)
    else:
        return
    with engine.about(args.pretrained):
        if spec.dataset == "Folder":
            own = {f"fc.{n}": tensor for n, tensor in resnet.fc.state_dict().items()}
            state = {n: t for n, t in state.items() if n not in own} | own
        models.load_resnet(resnet, state)


def main() -> None:
    args = parse_args()
    spec = engine.data.spec_of(partial(models.config, gated=False), args)
    with engine.Run(args, 0, spec, engine.checkpoint.base_directory(args.model)) as run:
        if not args.load:  # a run killed right after its last evaluation may be gone on with
            engine.checkpoint.keep_base(run.cv_dir)
        train, test = engine.data.load(spec, args, run.device)
        resnet, _ = models.build(args.model, spec.num_classes)
        if not args.load:
            load_start(resnet, spec, args)
        run.place(resnet)
        optimizer = engine.optim.sgd(resnet, args.lr, args.wd)
        run.track("state_dict", resnet, models.load_resnet)
        run.track("optimizer", optimizer)
        learner = run.wrap(resnet)

        def train_step(images: Tensor, labels: Tensor, part: Part):
            progress = (epoch - 1 + part.step / len(train)) / args.max_epochs
            engine.optim.scale_lr(optimizer, engine.schedule.cosine(progress, args.warmup))
            policy = None
            if args.block_drop:
                noise = part.noise(spec.num_blocks, device=run.device)
                policy = drop_blocks(noise, args.block_drop)
            logits = learner(images, policy)
            losses = F.cross_entropy(
                logits, labels, reduction="none", label_smoothing=args.label_smoothing
            )
            return losses.sum() / part.total, {
                "correct": logits.argmax(1) == labels,
                "loss": losses,
            }

        def test_step(images: Tensor, labels: Tensor):
            return {"correct": resnet(images).argmax(1) == labels}

        for epoch in run.epochs():
            resnet.train()
            tally = run.train_epoch(train_step, [optimizer], train, clip_norm=args.clip_norm)
            accuracy = tally["correct"].double().mean().item()
            loss = tally["loss"].double().mean().item()
            run.logs.line(
                f"A: {accuracy:.3f} | L: {loss:.3f}", "train", accuracy=accuracy, loss=loss
            )
            if run.tests(epoch):
                resnet.eval()
                tally = run.evaluate(test_step, test)
                accuracy = tally["correct"].double().mean().item()
                run.logs.line(f"A: {accuracy:.4f}", "test", accuracy=accuracy)
            if epoch == args.max_epochs:
                run.save(f"pk_E_{epoch}_A_{accuracy:.3f}.t7", acc=accuracy)


if __name__ == "__main__":
    engine.run_script(main)
