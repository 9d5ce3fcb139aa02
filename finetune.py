"""Stage 2: finetune the policy network and the ResNet together, starting from stage 1.

With --penalties or, for the paper's static baselines, --policy the ResNet learns alone.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import engine
import models
import utils
from engine import Shard, UserError, bases, options, schedule


def parse_args():
    parser = options.parser(__doc__)
    options.add_base(parser)
    options.add_training(parser, lr=1e-4, wd=0.0, max_epochs=2000)
    options.add_policy_stage(parser, epoch_step=1600, penalty=-5.0)
    options.add_static(parser)
    add = parser.add_argument
    add("--pretrained", help="checkpoint to start from: of stage 1, or of stage 2 with its ResNet")
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
    add(
        "--penalties",
        nargs=2,
        type=options.negative,
        metavar=("MILD", "HARSH"),
        help="train the ResNet alone, for every penalty between: beside each full pass one under "
        "the policies that --pretrained chooses for a penalty drawn for the batch, which learns "
        "by --distill from the full pass",
    )
    add("--temperature", type=options.positive, default=2.0, help="of the softmax in distillation")
    args = parser.parse_args()
    args.policy = utils.with_seed(args.policy, args.seed)
    if not (args.pretrained or args.load or args.policy):
        raise UserError("stage 2 starts from a stage-1 checkpoint: name one with --pretrained")
    if args.pretrained and args.policy:
        raise UserError("--policy takes no policy network: leave --pretrained out")
    if args.penalties and args.policy:
        raise UserError("--penalties has policies of its own: leave --policy out")
    return args


def load_start(
    run: engine.Run, resnet: models.ResNet, policy_net: models.PolicyNet
) -> models.Checkpoint:
    """The pretrained ResNet and the stage-1 policy; a stage-2 checkpoint brings both.

    Returns what --pretrained holds.
    """
    path = run.args.pretrained
    start = bases.read_for(run.config, path) if path else models.Checkpoint()
    if start.stage == 2:
        bases.load_into(resnet, start)
    else:
        run.load_base(resnet)
    if path:
        if start.stage != 2 and not bases.is_of_base(start, resnet):
            run.note(f"{path}: its policy was learned on another base ResNet than this")
        bases.load_into(policy_net, start)
    return start


def load_teacher(run: engine.Run) -> nn.Module:
    """The full base ResNet, deployed: images (B, 3, H, W) to logits."""
    teacher, _ = models.build(run.args.model, run.config.num_classes)
    run.load_base(teacher)
    run.place(teacher)
    return run.frozen(teacher.requires_grad_(False).eval())


def task_loss(logits: Tensor, images: Tensor, labels: Tensor, args, teacher=None) -> Tensor:
    """Mean cross entropy, and what `--distill` asks for of the agreement with the teacher."""
    if teacher is None:
        return F.cross_entropy(logits, labels)
    return utils.route_loss(logits, teacher(images), labels, args.distill, args.temperature)


def train_step(
    policy_net: nn.Module,
    resnet: nn.Module,
    images: Tensor,
    labels: Tensor,
    shard: Shard,
    args,
    teacher=None,
):
    """Part of a batch's loss, and what became of its images (B, 3, H, W) under sampled policies.

    As released, the policy's part is a sum over images and the ResNet's a mean.
    """
    probs, _ = policy_net(images)
    policy_map = utils.greedy(probs)
    probs = utils.bound(probs, args.alpha)
    policy = utils.sample(probs, shard.noise(probs.shape[1], device=probs.device))
    score = partial(utils.reward, penalty=args.penalty)
    with torch.no_grad():
        _, reward_map, _ = utils.rollout(resnet, images, labels, policy_map, score)
    logits, reward, correct = utils.rollout(resnet, images, labels, policy, score)
    loss = utils.policy_gradient_loss(probs, policy, reward - reward_map)
    loss = loss + shard.share * task_loss(logits, images, labels, args, teacher)
    return loss, {"policy": policy, "reward": reward, "correct": correct}


def resnet_train_step(
    decide: nn.Module,
    resnet: nn.Module,
    images: Tensor,
    labels: Tensor,
    shard: Shard,
    args,
    teacher=None,
):
    """As `train_step` where only the ResNet learns, under the policies of `decide(images)`."""
    with torch.no_grad():
        policy = decide(images)
    score = partial(utils.reward, penalty=args.penalty)
    logits, reward, correct = utils.rollout(resnet, images, labels, policy, score)
    results = {"policy": policy, "reward": reward, "correct": correct}
    return shard.share * task_loss(logits, images, labels, args, teacher), results


def penalties_train_step(
    decide: models.PenaltyPolicy,
    resnet: nn.Module,
    images: Tensor,
    labels: Tensor,
    shard: Shard,
    args,
):
    """As `resnet_train_step` under the policies that are best for a penalty drawn for the batch,
    beside a full pass, so that the ResNet bends neither to one policy nor away from its full
    accuracy.
    """
    decide.penalty = utils.penalty_between(shard.common_noise(1), *args.penalties)
    with torch.no_grad():
        policy = decide(images)
    policies = torch.stack((torch.ones_like(policy), policy))
    score = partial(utils.reward, penalty=decide.penalty)
    logits, reward, correct = utils.rollout(resnet, images, labels, policies, score)
    loss = F.cross_entropy(logits[0], labels)
    loss = loss + utils.route_loss(logits[1], logits[0], labels, args.distill, args.temperature)
    return shard.share * loss, {"policy": policy, "reward": reward[1], "correct": correct[1]}


def test_step(decide: nn.Module, resnet: nn.Module, images: Tensor, labels: Tensor, args):
    """What becomes of a batch under the policies that `decide(images)` gives."""
    policy = decide(images)
    score = partial(utils.reward, penalty=args.penalty)
    _, reward, correct = utils.rollout(resnet, images, labels, policy, score)
    return {"policy": policy, "reward": reward, "correct": correct, "label": labels}


def main() -> None:
    args = parse_args()
    config = engine.data.config_of(args, gated=False)
    with engine.Run(args, 2, config) as run:
        args.policy = args.policy or run.loaded.static_policy
        static = options.static_policy(args.policy, config, args.seed)
        train, test = engine.data.load(config, args, run.device)
        resnet, policy_net = models.build(args.model, config.num_classes)
        start = run.loaded if args.load else load_start(run, resnet, policy_net)
        run.place(resnet, policy_net)
        if not args.load:
            run.tell_accuracy(resnet, test)
        resnet.execution = args.execution
        teacher = load_teacher(run) if args.distill and not args.penalties else None
        parts = {"resnet": resnet} | ({"agent": policy_net} if static is None else {})
        if static is not None:
            decide = models.StaticPolicy(static.to(run.device))
        elif args.penalties:
            with engine.user_errors():
                confidence = start.confidence_head(config, policy_net)
            run.place(confidence)
            parts["correctness"] = confidence
            decide = models.PenaltyPolicy(policy_net, confidence, args.penalty)
        else:
            decide = models.GreedyPolicy(policy_net)
        policy_learns = static is None and not args.penalties
        learned = [] if args.resnet_lr else list(resnet.parameters())
        if policy_learns:
            learned += policy_net.parameters()
            policy_learner = run.wrap(policy_net)
        resnet_learner = run.wrap(resnet, drops=True)
        optimizers = {}
        if learned:
            optimizers["optimizer"] = torch.optim.Adam(learned, args.lr, weight_decay=args.wd)
        if args.resnet_lr:
            sgd = schedule.sgd(resnet, args.resnet_lr, args.resnet_wd)
            optimizers["resnet_optimizer"] = sgd
        run.restore(**parts, **optimizers)

        for epoch in run.epochs():
            for optimizer in optimizers.values():
                schedule.scale_lr(optimizer, schedule.lr_factor(args, epoch - 1))
            resnet.train(), policy_net.train(policy_learns)
            for images, labels, shard in run.batches(train):
                batch = (resnet_learner, images, labels, shard)
                with run.autocast():
                    if policy_learns:
                        loss, outcome = train_step(policy_learner, *batch, args, teacher)
                    elif args.penalties:
                        loss, outcome = penalties_train_step(decide, *batch, args)
                    else:
                        loss, outcome = resnet_train_step(decide, *batch, args, teacher)
                run.step(loss, outcome)
            run.log_policies("train", run.results)
            if run.tests(epoch):
                resnet.eval(), policy_net.eval()
                if args.penalties:
                    decide.penalty = args.penalty
                results = run.evaluate(partial(test_step, decide, resnet, args=args), test)
                run.log_policies("test", results)
                run.logs.kept(results["policy"], results["label"])
                if static is None:
                    run.dependence(resnet, results, test)
                run.save_evaluated()


if __name__ == "__main__":
    engine.run_script(main)
