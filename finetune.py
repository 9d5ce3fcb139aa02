"""Stage 2: finetune the policy network and the ResNet together, starting from stage 1.

With --policy the ResNet is finetuned under one of the paper's static baselines instead.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import engine
import models
import utils
from engine import UserError, options


def parse_args():
    parser = options.parser(__doc__)
    options.add_base(parser)
    options.add_training(parser, lr=1e-4, wd=0.0, max_epochs=2000)
    options.add_steps(parser, epoch_step=1600, penalty=-5.0)
    options.add_static(parser)
    parser.add_argument("--pretrained", help="stage-1 checkpoint to start from")
    args = parser.parse_args()
    if not (args.pretrained or args.load or args.policy):
        raise UserError("stage 2 starts from a stage-1 checkpoint: name one with --pretrained")
    if args.pretrained and args.policy:
        raise UserError("--policy takes no policy network: leave --pretrained out")
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


def train_step(policy_net: nn.Module, resnet: nn.Module, images: Tensor, labels: Tensor, args):
    """Loss of one batch, and what became of its images (B, 3, H, W) under the sampled policies."""
    probs, _ = policy_net(images)
    policy_map = utils.most_probable(probs)
    probs = utils.bound(probs, args.alpha)
    policy = utils.sample(probs)
    with torch.no_grad():
        logits_map = resnet(images, policy_map)
    logits = resnet(images, policy)
    reward_map, _ = utils.reward(logits_map, labels, policy_map, args.penalty)
    reward, correct = utils.reward(logits, labels, policy, args.penalty)
    loss = utils.policy_gradient_loss(probs, policy, reward - reward_map)
    loss = loss + F.cross_entropy(logits, labels)
    return loss, {"policy": policy, "reward": reward, "correct": correct}


def decide(policy_net: nn.Module, images: Tensor) -> Tensor:
    """The most probable policies (B, K) of a batch."""
    return utils.most_probable(policy_net(images)[0])


def decide_alike(static: Tensor, images: Tensor) -> Tensor:
    """The same policy (K,) for every image of a batch, (B, K)."""
    return static.expand(len(images), -1)


def static_train_step(static: Tensor, resnet: nn.Module, images: Tensor, labels: Tensor, args):
    """The same where every image gets the same policy (K,) and only the ResNet learns."""
    policy = decide_alike(static, images)
    logits = resnet(images, policy)
    reward, correct = utils.reward(logits, labels, policy, args.penalty)
    results = {"policy": policy, "reward": reward, "correct": correct}
    return F.cross_entropy(logits, labels), results


def test_step(decide: Callable, resnet: nn.Module, images: Tensor, labels: Tensor, args):
    """What becomes of a batch under the policies that `decide(images)` gives."""
    policy = decide(images)
    reward, correct = utils.reward(resnet(images, policy), labels, policy, args.penalty)
    return {"policy": policy, "reward": reward, "correct": correct}


def main() -> None:
    args = parse_args()
    spec = engine.named(models.config, args.model)
    with engine.Run(args, 2, spec) as run:
        args.policy = args.policy or engine.checkpoint.static_policy_of(run.loaded)
        static = options.static_policy(args, spec.stages, utils.static_policy, run.device)
        train, test = engine.data.load(spec, args, run.device)
        resnet, policy_net = models.build(args.model)
        if not args.load:
            load_start(run, resnet, policy_net)
        run.place(resnet, policy_net)
        resnet.execution = args.execution
        run.track("resnet", resnet, models.load_resnet)
        parameters = list(resnet.parameters())
        if static is None:
            run.track("agent", policy_net, models.load_policy)
            parameters += policy_net.parameters()
        optimizer = torch.optim.Adam(parameters, args.lr, weight_decay=args.wd)
        run.track("optimizer", optimizer)

        if static is None:
            train_batch = partial(train_step, policy_net, resnet, args=args)
            test_batch = partial(test_step, partial(decide, policy_net), resnet, args=args)
        else:
            train_batch = partial(static_train_step, static, resnet, args=args)
            test_batch = partial(test_step, partial(decide_alike, static), resnet, args=args)

        for epoch in run.epochs():
            engine.set_lr(optimizer, options.step_lr(args, epoch))
            resnet.train(), policy_net.train()
            outcome = run.train_epoch(train_batch, optimizer, train)
            run.log_policies("train", *utils.performance_stats(*outcome.of_policies()))
            if run.tests(epoch):
                resnet.eval(), policy_net.eval()
                outcome = run.evaluate(test_batch, test)
                run.log_policies("test", *utils.performance_stats(*outcome.of_policies()))
                run.save_evaluated()


if __name__ == "__main__":
    engine.run_script(main)
