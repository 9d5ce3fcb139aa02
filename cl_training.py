"""Stage 1: curriculum learning of the policy network, the pretrained ResNet frozen (Alg. 1)."""

from functools import partial

import torch
from torch import Tensor, nn

import engine
import models
import utils
from engine import Part, UserError, options


def parse_args():
    parser = options.parser(__doc__)
    options.add_base(parser)
    options.add_training(parser, lr=1e-3, wd=0.0, max_epochs=10000)
    options.add_steps(parser, epoch_step=10000, penalty=-1.0)
    add = parser.add_argument
    add("--beta", type=options.weight, default=0.1, help="weight of the entropy term")
    add("--beta_end", type=options.weight, help="beta moves there in a line until the last epoch")
    add("--cl_step", type=options.count, default=1, help="blocks learned in the first epoch")
    add("--cl_every", type=options.count, default=1, help="epochs until more blocks are learned")
    add("--cl_blocks", type=options.count, default=1, help="blocks added each time")
    add(
        "--policy_init",
        help="start of the policy network: a ResNet's file, another policy's, resnet18 "
        "(torchvision's, what pictures begin with) or none (what CIFAR begins with)",
    )
    add("--samples", type=options.count, default=1, help="policies sampled for each image")
    return parser.parse_args()


def start_policy(policy_net: nn.Module, source: str) -> None:
    """Give the policy network those weights of another ResNet that fit, or a whole policy's."""
    if source == "none":
        return
    if source == "resnet18":
        way_out = "name a file with --policy_init, or begin with --policy_init none"
        state = engine.published.resnet(18, way_out)
    else:
        content = engine.checkpoint.read(source)
        if engine.checkpoint.policy_bias(content) is not None:
            with engine.about(source):
                models.load_policy(policy_net, engine.checkpoint.policy_weights(content, source))
            return
        state = engine.checkpoint.resnet_weights(content, source)
    if not models.load_fitting(policy_net.features, state):
        raise UserError(f"{source}: not one tensor fits the policy network")


def train_step(
    policy_net: nn.Module,
    resnet: nn.Module,
    images: Tensor,
    labels: Tensor,
    part: Part,
    mask: Tensor,
    args,
):
    """Part of a batch's loss, and what became of its images under the first sampled policies.

    images (B, 3, H, W), labels (B,), mask (K,) of the blocks that are learned by now.
    """
    probs, _ = policy_net(images)
    policy_map = utils.most_probable(probs)
    probs = utils.bound(probs, args.alpha)
    noise = part.noise(args.samples, probs.shape[1], device=probs.device).transpose(0, 1)
    policies = utils.force_on(torch.cat((utils.sample(probs, noise), policy_map[None])), mask)
    with torch.no_grad():
        logits = resnet(images, policies)
    reward, correct = utils.reward(logits, labels, policies, args.penalty)
    advantage = (reward - utils.leave_one_out(reward))[:-1]  # one sample: the self-critical one
    loss = utils.policy_gradient_loss(probs, policies[:-1], advantage, mask) / args.samples
    loss = loss - args.beta * utils.entropy(probs)
    return loss / part.total, {"policy": policies[0], "reward": reward[0], "correct": correct[0]}


def test_step(
    policy_net: nn.Module, resnet: nn.Module, images: Tensor, labels: Tensor, mask: Tensor, args
):
    """What becomes of a batch under the most probable policies of this step of the curriculum."""
    policy = utils.force_on(utils.most_probable(policy_net(images)[0]), mask)
    reward, correct = utils.reward(resnet(images, policy), labels, policy, args.penalty)
    return {"policy": policy, "reward": reward, "correct": correct, "label": labels}


def main() -> None:
    args = parse_args()
    spec = engine.data.spec_of(partial(models.config, gated=False), args)
    with engine.Run(args, 1, spec) as run:
        train, test = engine.data.load(spec, args, run.device)
        resnet, policy_net = models.build(args.model, spec.num_classes)
        run.load_base(resnet, models.load_resnet)
        if not args.load:  # as released: pictures from a ResNet-18, CIFAR from nothing
            start_policy(
                policy_net, args.policy_init or ("resnet18" if spec.has_pictures else "none")
            )
        run.place(resnet.requires_grad_(False).eval(), policy_net)
        learner = run.wrap(policy_net)
        optimizer = torch.optim.Adam(policy_net.parameters(), args.lr, weight_decay=args.wd)
        run.track("agent", policy_net, models.load_policy)
        run.track("optimizer", optimizer)
        resnet.execution = args.execution
        if args.execution == "sparse":  # it never changes, so its inference-only twin will do
            resnet, _ = models.deploy(resnet, dtype=engine.device.dtype(args.precision))

        for epoch in run.epochs():
            now = engine.schedule.at(args, epoch)
            engine.optim.scale_lr(optimizer, engine.schedule.lr_factor(args, epoch))
            cl_step = utils.curriculum_step(epoch, args.cl_step, args.cl_every, args.cl_blocks)
            mask = utils.curriculum_mask(spec.num_blocks, cl_step, run.device)
            policy_net.train()
            step = partial(train_step, learner, resnet, mask=mask, args=now)
            outcome = run.train_epoch(step, [optimizer], train)
            run.logs.policies("train", *utils.performance_stats(*outcome.of_policies()))
            if run.tests(epoch):
                policy_net.eval()
                step = partial(test_step, policy_net, resnet, mask=mask, args=now)
                outcome = run.evaluate(step, test)
                run.logs.policies("test", *utils.performance_stats(*outcome.of_policies()))
                run.logs.kept(outcome["policy"], outcome["label"])
                run.save_evaluated()


if __name__ == "__main__":
    engine.run_script(main)
