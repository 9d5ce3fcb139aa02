"""Stage 2: finetune the policy network and the ResNet together, starting from stage 1.

With --freeze_policy or, for the paper's static baselines, --policy the ResNet learns alone.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import engine
import models
import utils
from engine import Part, UserError, options


def parse_args():
    parser = options.parser(__doc__)
    options.add_base(parser)
    options.add_training(parser, lr=1e-4, wd=0.0, max_epochs=2000)
    options.add_steps(parser, epoch_step=1600, penalty=-5.0)
    options.add_static(parser)
    add = parser.add_argument
    add("--pretrained", help="stage-1 checkpoint to start from")
    add(
        "--resnet_lr",
        type=options.positive,
        help="train the ResNet by SGD with momentum at this rate, as pretrain.py does, not by Adam",
    )
    add("--resnet_wd", type=options.weight, default=5e-4, help="weight decay under --resnet_lr")
    add(
        "--distill",
        type=options.fraction,
        default=0.0,
        help="weight of learning the classes from the full base ResNet, out of 1 with the labels",
    )
    add("--teacher", help="another full ResNet for --distill to learn from")
    add(
        "--freeze_policy",
        action="store_true",
        help="train the ResNet alone, under the most probable policies of --pretrained",
    )
    add("--temperature", type=options.positive, default=2.0, help="of the softmax in distillation")
    add(
        "--recalibrate",
        action="store_true",
        help="before an evaluation, take BatchNorm's statistics anew, over the training images "
        "under their most probable policies",
    )
    args = parser.parse_args()
    if not (args.pretrained or args.load or args.policy):
        raise UserError("stage 2 starts from a stage-1 checkpoint: name one with --pretrained")
    if args.pretrained and args.policy:
        raise UserError("--policy takes no policy network: leave --pretrained out")
    if args.freeze_policy and args.policy:
        raise UserError("--policy takes no policy network: leave --freeze_policy out")
    if args.teacher and not args.distill:
        raise UserError("nothing is learned from --teacher: give --distill a weight")
    return args


def load_start(run: engine.Run, resnet: models.ResNet, policy_net: models.PolicyNet) -> None:
    """The pretrained ResNet and the stage-1 policy; a stage-2 checkpoint brings both."""
    path = run.args.pretrained
    start = engine.checkpoint.read_for(run.spec, path) if path else {}
    if "resnet" in start:
        with engine.about(path):
            models.load_resnet(resnet, start["resnet"])
    else:
        run.load_base(resnet, models.load_resnet)
    if path:
        if not engine.checkpoint.is_of_base(start, resnet) and "resnet" not in start:
            run.note(f"{path}: its policy was learned on another base ResNet than this")
        with engine.about(path):
            models.load_policy(policy_net, engine.checkpoint.policy_weights(start, path))


def load_teacher(run: engine.Run) -> nn.Module:
    """The full base ResNet, or --teacher, deployed: images (B, 3, H, W) to logits."""
    teacher, _ = models.build(run.args.model, run.spec.num_classes)
    if run.args.teacher:
        engine.checkpoint.load_base(run.spec, run.args.teacher, teacher, models.load_resnet)
    else:
        run.load_base(teacher, models.load_resnet)
    run.place(teacher)
    return models.deploy(teacher, dtype=engine.device.dtype(run.args.precision))[0]


def task_loss(logits: Tensor, images: Tensor, labels: Tensor, args, teacher=None) -> Tensor:
    """Mean cross entropy, and what `--distill` asks for of the agreement with the teacher."""
    loss = F.cross_entropy(logits, labels)
    if teacher is None:
        return loss
    agreement = utils.distillation(logits, teacher(images), args.temperature)
    return (1 - args.distill) * loss + args.distill * agreement


def train_step(
    policy_net: nn.Module,
    resnet: nn.Module,
    images: Tensor,
    labels: Tensor,
    part: Part,
    args,
    teacher=None,
):
    """Part of a batch's loss, and what became of its images (B, 3, H, W) under sampled policies."""
    probs, _ = policy_net(images)
    policy_map = utils.most_probable(probs)
    probs = utils.bound(probs, args.alpha)
    policy = utils.sample(probs, part.noise(probs.shape[1], device=probs.device))
    with torch.no_grad():
        logits_map = resnet(images, policy_map)
    logits = resnet(images, policy)
    reward_map, _ = utils.reward(logits_map, labels, policy_map, args.penalty)
    reward, correct = utils.reward(logits, labels, policy, args.penalty)
    loss = utils.policy_gradient_loss(probs, policy, reward - reward_map)
    loss = loss + part.share * task_loss(logits, images, labels, args, teacher)
    return loss, {"policy": policy, "reward": reward, "correct": correct}


def decide(policy_net: nn.Module, images: Tensor) -> Tensor:
    """The most probable policies (B, K) of a batch."""
    return utils.most_probable(policy_net(images)[0])


def decide_alike(static: Tensor, images: Tensor) -> Tensor:
    """The same policy (K,) for every image of a batch, (B, K)."""
    return static.expand(len(images), -1)


def resnet_train_step(
    decide: Callable,
    resnet: nn.Module,
    images: Tensor,
    labels: Tensor,
    part: Part,
    args,
    teacher=None,
):
    """The same where only the ResNet learns, under the policies that `decide(images)` gives."""
    with torch.no_grad():
        policy = decide(images)
    logits = resnet(images, policy)
    reward, correct = utils.reward(logits, labels, policy, args.penalty)
    results = {"policy": policy, "reward": reward, "correct": correct}
    return part.share * task_loss(logits, images, labels, args, teacher), results


def test_step(decide: Callable, resnet: nn.Module, images: Tensor, labels: Tensor, args):
    """What becomes of a batch under the policies that `decide(images)` gives."""
    policy = decide(images)
    reward, correct = utils.reward(resnet(images, policy), labels, policy, args.penalty)
    return {"policy": policy, "reward": reward, "correct": correct, "label": labels}


def main() -> None:
    args = parse_args()
    spec = engine.data.spec_of(partial(models.config, gated=False), args)
    with engine.Run(args, 2, spec) as run:
        args.policy = args.policy or engine.checkpoint.static_policy_of(run.loaded)
        args.policy = options.named_static(args.policy, args.seed)
        static = options.static_policy(
            args.policy, args.seed, spec.stages, utils.static_policy, run.device
        )
        train, test = engine.data.load(spec, args, run.device)
        resnet, policy_net = models.build(args.model, spec.num_classes)
        if not args.load:
            load_start(run, resnet, policy_net)
        run.place(resnet, policy_net)
        resnet.execution = args.execution
        teacher = load_teacher(run) if args.distill else None
        run.track("resnet", resnet, models.load_resnet)
        learned = [] if args.resnet_lr else list(resnet.parameters())
        if static is None:
            run.track("agent", policy_net, models.load_policy)
            policies = partial(decide, policy_net)
        else:
            policies = partial(decide_alike, static)
        policy_learns = static is None and not args.freeze_policy
        if policy_learns:
            learned += policy_net.parameters()
            step = partial(train_step, run.wrap(policy_net), run.wrap(resnet), teacher=teacher)
        else:
            step = partial(resnet_train_step, policies, run.wrap(resnet), teacher=teacher)
        optimizers = {}
        if learned:
            optimizers["optimizer"] = torch.optim.Adam(learned, args.lr, weight_decay=args.wd)
        if args.resnet_lr:
            sgd = engine.optim.sgd(resnet, args.resnet_lr, args.resnet_wd)
            optimizers["resnet_optimizer"] = sgd
        for name, optimizer in optimizers.items():
            run.track(name, optimizer)
        optimizers = list(optimizers.values())

        for epoch in run.epochs():
            now = engine.schedule.at(args, epoch)
            for optimizer in optimizers:
                engine.optim.scale_lr(optimizer, engine.schedule.lr_factor(args, epoch))
            resnet.train(), policy_net.train(policy_learns)
            outcome = run.train_epoch(partial(step, args=now), optimizers, train)
            run.logs.policies("train", *utils.performance_stats(*outcome.of_policies()))
            if run.tests(epoch):
                resnet.eval(), policy_net.eval()
                if args.recalibrate:
                    run.recalibrate(lambda x: resnet(x, policies(x)), resnet, train)
                outcome = run.evaluate(partial(test_step, policies, resnet, args=now), test)
                run.logs.policies("test", *utils.performance_stats(*outcome.of_policies()))
                run.logs.kept(outcome["policy"], outcome["label"])
                run.save_evaluated()


if __name__ == "__main__":
    engine.run_script(main)
