"""Stage 1: curriculum learning of the policy network, the pretrained ResNet frozen (Alg. 1)."""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import engine
import models
import utils
from engine import Shard, UserError, bases, options, schedule

TABLE_EVERY = 8  # images a candidate table is computed for one of: the head has few weights


def parse_args():
    parser = options.parser(__doc__)
    options.add_base(parser)
    options.add_training(parser, lr=1e-3, wd=0.0, max_epochs=10000)
    options.add_policy_stage(parser, epoch_step=10000, penalty=-1.0)
    add = parser.add_argument
    add("--beta", type=options.weight, default=0.1, help="weight of the entropy term")
    add("--cl_step", type=options.count, default=1, help="blocks learned in the first epoch")
    add("--cl_blocks", type=options.count, default=1, help="blocks added each epoch")
    add(
        "--policy_init",
        help="start of the policy network: a ResNet's file, another policy's, resnet18 "
        "(torchvision's, what pictures begin with) or none (what CIFAR begins with)",
    )
    add(
        "--policy_size",
        type=int,
        choices=models.POLICY_SIZES,
        help="pixels that the policy network of a CIFAR model looks at; 16 cost a quarter "
        "(default: 32, or those of --load)",
    )
    add(
        "--warm_start",
        type=options.amount,
        default=0,
        help="before the curriculum, learn for so many of the epochs under which of a few nested "
        "policies the ResNet is right, and to take the one of largest expected reward",
    )
    add("--samples", type=options.count, default=1, help="policies sampled for each image")
    return parser.parse_args()


def start_policy(
    policy_net: models.PolicyNet,
    confidence: models.Confidence | None,
    source: str,
    config: models.Config,
) -> None:
    """Give the policy network those weights of another ResNet that fit, or a whole policy's.

    A ResNet's classes are those of the head that knows classes, where they are as many.
    """
    if source == "none":
        return
    if source == "resnet18":
        way_out = "name a file with --policy_init, or begin with --policy_init none"
        state = bases.torchvision_resnet(18, way_out)
    else:
        start = engine.storage.read(source)
        if start.policy is not None:
            bases.tell_other_pixels(config, start)
            bases.load_into(policy_net, start)
            return
        state = bases.for_pixels(config, start).resnet
    if not models.load_fitting(policy_net.features, state):
        raise UserError(f"{source}: not one tensor fits the policy network")
    if confidence is not None:
        classes = {
            name.removeprefix("fc."): state[name] for name in state if name.startswith("fc.")
        }
        models.load_fitting(confidence.classes, classes)


def train_step(
    policy_net: nn.Module,
    resnet: nn.Module,
    images: Tensor,
    labels: Tensor,
    shard: Shard,
    mask: Tensor,
    args,
):
    """Part of a batch's loss, and what became of its images under the first sampled policies.

    images (B, 3, H, W), labels (B,), mask (K,) of the blocks that are learned by now.
    """
    probs, *_ = policy_net(images)
    policy_map = utils.greedy(probs)
    probs = utils.bound(probs, args.alpha)
    noise = shard.noise(args.samples, probs.shape[1], device=probs.device).transpose(0, 1)
    policies = utils.force_on(torch.cat((utils.sample(probs, noise), policy_map[None])), mask)
    with torch.no_grad():
        _, reward, correct = utils.rollout(
            resnet, images, labels, policies, partial(utils.reward, penalty=args.penalty)
        )
    advantage = (reward - utils.leave_one_out(reward))[:-1]  # one sample: the self-critical one
    loss = utils.policy_gradient_loss(probs, policies[:-1], advantage, mask) / args.samples
    loss = loss - args.beta * utils.entropy(probs)
    return loss / shard.total, {"policy": policies[0], "reward": reward[0], "correct": correct[0]}


def warm_step(
    learner: nn.Module,
    resnet: nn.Module,
    images: Tensor,
    labels: Tensor,
    shard: Shard,
    candidates: Tensor,
    args,
):
    """Part of a batch's loss where a policy's reward can be known: the ResNet is frozen.

    The policy network learns the class, by which it comes to know which images are hard; the head,
    from a part of the images, how often the ResNet is right about such an image under each of the
    candidates (C, K); and the policy, to take the one whose expected reward is largest by that.
    """
    probs, predicted, classes = learner(images)
    expected = utils.expected_reward(predicted.detach().float().sigmoid(), candidates, args.penalty)
    chosen = expected.argmax(1)
    policy = candidates[chosen]
    likelihood = utils.policy_gradient_loss(probs, policy, torch.ones_like(expected[:, 0]))
    loss = F.cross_entropy(classes, labels, reduction="sum") + likelihood / policy.shape[1]
    loss = loss / shard.total

    rows = slice(-shard.start % TABLE_EVERY, None, TABLE_EVERY)
    policies = candidates[:, None].expand(-1, len(images[rows]), -1)
    with torch.no_grad():
        right = (resnet(images[rows], policies).argmax(-1) == labels[rows]).T
    found = right.to(predicted.dtype)
    error = F.binary_cross_entropy_with_logits(predicted[rows], found, reduction="sum")
    loss = loss + error / (math.ceil(shard.total / TABLE_EVERY) * len(candidates))
    policy, correct = policy[rows], right.gather(1, chosen[rows, None])[:, 0]
    reward = torch.where(correct, utils.reward_if_right(policy), args.penalty)
    return loss, {"policy": policy, "reward": reward, "correct": correct}


def test_step(
    decide: nn.Module, resnet: nn.Module, images: Tensor, labels: Tensor, mask: Tensor, args
):
    """What becomes of a batch under the greedy policies of this step of the curriculum."""
    policy = utils.force_on(decide(images), mask)
    reward = partial(utils.reward, penalty=args.penalty)
    _, reward, correct = utils.rollout(resnet, images, labels, policy, reward)
    return {"policy": policy, "reward": reward, "correct": correct, "label": labels}


def main() -> None:
    args = parse_args()
    config = engine.data.config_of(args, gated=False)
    with engine.Run(args, 1, config) as run:
        train, test = engine.data.load(config, args, run.device)
        resnet, policy_net = models.build(args.model, config.num_classes)
        run.load_base(resnet)
        confidence = models.build_confidence(config, policy_net) if args.warm_start else None
        if args.policy_size and policy_net.size is None:
            raise UserError(f"--policy_size is for CIFAR: {args.model} has a size")
        if not args.load:  # as released: pictures from a ResNet-18, CIFAR from nothing
            default = "resnet18" if config.has_pictures else "none"
            start_policy(policy_net, confidence, args.policy_init or default, config)
            if args.policy_size:
                policy_net.look_at(args.policy_size)
        run.place(resnet.requires_grad_(False).eval(), policy_net)
        run.tell_accuracy(resnet, test)
        learner, heads = policy_net, {}
        if confidence is not None:
            run.place(confidence)
            learner = models.WithConfidence(policy_net, confidence)
            heads = {"correctness": confidence}  # the file's name for it
        learner = run.wrap(learner, drops=confidence is not None)  # after the warm start
        optimizer = torch.optim.Adam(learner.parameters(), args.lr, weight_decay=args.wd)
        run.restore(agent=policy_net, **heads, optimizer=optimizer)
        if args.policy_size not in (None, policy_net.size):
            raise UserError(
                f"--policy_size {args.policy_size}: the policy network of {args.load} looks at "
                f"{policy_net.size} pixels: leave --policy_size out"
            )
        resnet.execution = args.execution
        if args.execution == "sparse":  # it never changes, so its inference-only twin will do
            resnet = run.frozen(resnet)
        if confidence is not None and not args.load:
            found = engine.candidates.find(resnet, train, config.stages, args.precision)
            confidence.candidates.copy_(found)
            shown = " ".join(utils.shares_of(policy, config.stages) for policy in found)
            run.note(f"--warm_start chooses how many first blocks of each stage to keep: {shown}")

        for epoch in run.epochs():
            schedule.scale_lr(optimizer, schedule.lr_factor(args, epoch - 1))
            is_warm = epoch <= args.warm_start
            cl_step = utils.curriculum_step(epoch - args.warm_start, args.cl_step, args.cl_blocks)
            cl_step = config.num_blocks if is_warm else cl_step
            mask = utils.curriculum_mask(config.num_blocks, cl_step, run.device)
            policy_net.train()
            for images, labels, shard in run.batches(train):
                batch = (learner, resnet, images, labels, shard)
                with run.autocast():
                    if is_warm:
                        loss, outcome = warm_step(*batch, confidence.candidates, args)
                    else:
                        loss, outcome = train_step(*batch, mask, args)
                run.step(loss, outcome)
            run.log_policies("train", run.results)
            if run.tests(epoch):
                policy_net.eval()
                decide = models.GreedyPolicy(policy_net)
                step = partial(test_step, decide, resnet, mask=mask, args=args)
                results = run.evaluate(step, test)
                run.log_policies("test", results)
                run.logs.kept(results["policy"], results["label"])
                run.dependence(resnet, results, test)
                run.save_evaluated()


if __name__ == "__main__":
    engine.run_script(main)
