"""The method of BlockDrop (Wu et al., CVPR 2018, arXiv 1711.08393) as pure functions of tensors.

B is the number of images in a batch, K the number of residual blocks. A policy is a (B, K) tensor
of 0 (drop) and 1 (keep).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode


def bound(probs: Tensor, alpha: float) -> Tensor:
    """Keep probabilities away from 0 and 1, so that sampling goes on exploring (section 3.3).

    Maps (B, K) probabilities s to alpha * s + (1 - alpha) * (1 - s), in [1 - alpha, alpha].
    """
    return alpha * probs + (1 - alpha) * (1 - probs)


def greedy(probs: Tensor) -> Tensor:
    """The self-critical baseline's policy: 1 where the keep probability is at least one half."""
    return (probs >= 0.5).to(probs.dtype)


most_probable = greedy  # an older name, for code that has it


def sample(probs: Tensor, noise: Tensor | None = None) -> Tensor:
    """One policy an image, each block drawn from its own Bernoulli distribution (Eq. 1).

    noise: uniform in [0, 1), (..., B, K) for probs (B, K), drawn here if not given. Returns its
    shape.
    """
    # not torch.bernoulli, which stops a GPU for good at a NaN; here the loss shows it
    noise = torch.rand_like(probs) if noise is None else noise
    return (noise < probs).to(probs.dtype)


def curriculum_step(epoch: int, first_step: int = 1, blocks_per_step: int = 1) -> int:
    """How many blocks are learned in an epoch, counted from 1: some more each epoch."""
    return first_step + (epoch - 1) * blocks_per_step


def curriculum_mask(
    num_blocks: int, cl_step: int, device: torch.device | str | None = None
) -> Tensor:
    """Blocks whose actions are learned at this step of the curriculum (Alg. 1).

    The last `cl_step` blocks are learned, all earlier ones stay on.
    Returns a (num_blocks,) bool tensor, all true once cl_step >= num_blocks.
    """
    return torch.arange(num_blocks, device=device) >= num_blocks - cl_step


def force_on(policy: Tensor, mask: Tensor) -> Tensor:
    """The policy with every block that the curriculum does not yet learn switched on."""
    return policy.masked_fill(~mask, 1)


def reward_if_right(policy: Tensor) -> Tensor:
    """What a policy (..., K) earns where the class is right (Eq. 3): 1 - (|u| / K)^2, (...)."""
    usage = policy.sum(-1) / policy.shape[-1]
    return 1 - usage**2


def reward(logits: Tensor, labels: Tensor, policy: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Reward of each image's policy (Eq. 3): 1 - (|u| / K)^2 if the class is right, else `penalty`.

    logits: (B, classes). labels: (B,). policy: (B, K). penalty: -gamma of the paper.
    Returns (B,) reward and (B,) bool, whether the class is right. With logits (P, B, classes) and
    policy (P, B, K), several policies an image, both are (P, B).
    """
    correct = logits.argmax(-1) == labels
    return torch.where(correct, reward_if_right(policy), penalty), correct


def rollout(
    resnet: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    policy: Tensor,
    reward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run images under their policies, and say what these earned.

    images: (B, 3, H, W). labels: (B,). policy: (B, K) or (P, B, K). reward(logits, labels, policy)
    gives reward and correctness. Returns logits, (B, classes) or (P, B, classes), reward and
    correctness, (B,) or (P, B).
    """
    logits = resnet(images, policy)
    with torch.autocast(policy.device.type, enabled=False):  # a reward may weigh blocks by a matrix
        return logits, *reward(logits, labels, policy)


def leave_one_out(reward: Tensor) -> Tensor:
    """Baseline of each of an image's P >= 2 policies: the mean reward of its others.

    reward: (P, B). Returns (P, B). Two policies are each other's baseline. Raises ValueError where
    an image has one policy alone.
    """
    if len(reward) < 2:
        raise ValueError("an image's only policy has no others to be its baseline")
    return (reward.sum(0) - reward) / (len(reward) - 1)


def policy_gradient_loss(
    probs: Tensor, policy: Tensor, advantage: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Loss whose gradient is the policy gradient (Eq. 6), summed over the batch.

    probs: (B, K) the probabilities that `policy`, (B, K) or (P, B, K), was drawn from. advantage:
    (B,) or (P, B), taken as a constant. mask: (K,) bool, true for the blocks that count.
    Returns a scalar. Raises ValueError for advantages of another shape, which would be spread over
    images that they do not belong to.
    """
    if advantage.shape != policy.shape[:-1]:
        shapes = f"{tuple(advantage.shape)} for policies {tuple(policy.shape)}"
        raise ValueError(f"advantages have shape {shapes}: one number a policy")
    likelihood = torch.where(policy.bool(), probs, 1 - probs)
    # alpha = 1 allows a probability of exactly 0, whose logarithm would be infinite
    log_probs = likelihood.clamp_min(torch.finfo(probs.dtype).eps).log()
    if mask is not None:
        log_probs = log_probs * mask
    return -(advantage.detach()[..., None] * log_probs).sum()


def distillation(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Cross entropy with the teacher's softened classes, less its minimum; a mean over the batch.

    logits, teacher_logits: (B, classes). Scaled by temperature^2, so that gradients keep their size
    (Hinton, Vinyals and Dean 2015, arXiv 1503.02531). Returns a scalar, 0 where both agree.
    """
    log_probs = F.log_softmax(logits / temperature, 1)
    target = F.log_softmax(teacher_logits.detach() / temperature, 1)
    divergence = F.kl_div(log_probs, target, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def route_loss(
    logits: Tensor, full_logits: Tensor, labels: Tensor, weight: float, temperature: float
) -> Tensor:
    """Mean loss of images under a route, which learns by `weight` from the full network's classes
    and by the rest from labels: the sandwich rule of slimmable networks (Yu and Huang 2019,
    arXiv 1903.05134).

    logits, full_logits: (B, classes). labels: (B,). Returns a scalar; the full network learns
    nothing from it.
    """
    agreement = distillation(logits, full_logits, temperature)
    return (1 - weight) * F.cross_entropy(logits, labels) + weight * agreement


def entropy(probs: Tensor) -> Tensor:
    """Sum over all entries of -p log p: the released code's term, not the full binary entropy."""
    return -(probs * probs.clamp_min(torch.finfo(probs.dtype).eps).log()).sum()


def target_rate_loss(rates: Tensor, targets: Tensor) -> Tensor:
    """ConvNet-AIG's loss: squared distance of each block's execution rate from its target.

    rates: (K,), the means of the gates over a batch. targets: (K,); blocks with target 1 are left
    out. Returns the sum over blocks divided by K, as the released code does, a scalar.
    """
    distance = (rates - targets) ** 2
    return distance.masked_fill(targets >= 1, 0).mean()


def performance_stats(
    policies: Tensor, rewards: Tensor, correct: Tensor
) -> tuple[float, float, float, float, int]:
    """What the logs show of N images: policies (N, K), rewards (N,), correct (N,).

    Returns accuracy, mean reward, mean blocks kept (sparsity), their standard deviation
    (variance, as the released code names it) and the number of distinct policies.
    """
    # in pieces, because a sum first widens every entry
    blocks = torch.cat([rows.sum(1) for rows in policies.split(2**16)]).double()
    variance = blocks.std().item() if len(blocks) > 1 else 0.0
    accuracy = correct.double().mean().item()
    unique = num_distinct(policies)
    return accuracy, rewards.double().mean().item(), blocks.mean().item(), variance, unique


def num_distinct(policies: Tensor) -> int:
    """How many of N policies (N, K) differ, in memory of some 8-byte words an image."""
    return int(numbered(policies).max()) + 1 if len(policies) else 0


def numbered(policies: Tensor) -> Tensor:
    """The number (N,) of each of N policies (N, K), equal ones alike, in the order they sort in."""
    ids = torch.zeros(len(policies), dtype=torch.long, device=policies.device)
    for columns in policies.split(32, dim=1):
        for column in columns.unbind(1):
            ids = 2 * ids + column.bool()
        # numbered anew, so that the next 32 bits fit beside them
        _, ids = ids.unique(return_inverse=True)
    return ids


def shuffled(policies: Tensor, seed: int) -> Tensor:
    """The same policies (N, K) for other images at random: a permutation of the rows.

    What a policy's accuracy loses by it is what its decisions owe to the image.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(policies), generator=generator, device="cpu")
    return policies[order.to(policies.device)]


def most_frequent(policies: Tensor) -> Tensor:
    """The policy (K,) that most of N images (N, K) got; of several the one that sorts first."""
    ids = numbered(policies)  # not unique(dim=0), whose time is that of sorting rows
    return policies[(ids == ids.bincount().argmax()).nonzero()[0, 0]]


def with_seed(name: str | None, seed: int) -> str | None:
    """A static policy's name; a random one's with the seed that it is drawn with."""
    return f"{name}:{seed}" if name and re.fullmatch(r"random:\d+", name) else name


def static_policy(name: str, stages: Sequence[int], seed: int = 0) -> Tensor:
    """The paper's static baselines, and two more: the same N of K blocks for every image
    (section 4.2).

    name: "first:N" keeps the first blocks, "random:N" as many drawn with `seed`, "random:N:SEED"
    with its own, "distribute:N" the first ones of each stage, shared as evenly as the stages allow,
    earlier stages first. Not the paper's are "late:N", which shares them among the later stages,
    the last one first, and leaves the first stage one block until those are full, and "2-3-5", so
    many first blocks of each stage. Returns a (K,) float tensor. Raises ValueError when there are
    no such blocks or the name means nothing.
    """
    if re.fullmatch(r"\d+(-\d+)+", name):
        return first_blocks(spelt_shares(name, stages), stages)
    spelt = re.fullmatch(r"(?:(first|distribute|late):(\d+))|(random):(\d+)(?::(\d+))?", name)
    if not spelt:
        raise ValueError(
            f"{name!r} is not first:N, random:N, random:N:SEED, distribute:N or late:N, N blocks "
            "to keep, nor N-N-N, those of each stage"
        )
    kind, keep = spelt[1] or spelt[3], int(spelt[2] or spelt[4])
    seed = int(spelt[5] or seed)
    num_blocks = sum(stages)
    if not 0 <= keep <= num_blocks:
        raise ValueError(f"a static policy keeps 0 to {num_blocks} blocks, not {keep}")
    policy = torch.zeros(num_blocks)
    if kind == "first":
        policy[:keep] = 1
    elif kind == "random":
        generator = torch.Generator("cpu").manual_seed(seed)
        policy[torch.randperm(num_blocks, generator=generator, device="cpu")[:keep]] = 1
    else:
        shares = [0] * len(stages)
        while sum(shares) < keep:
            open_stages = [i for i, depth in enumerate(stages) if shares[i] < depth]
            shares[min(open_stages, key=lambda i: turn(kind, i, shares[i]))] += 1
        policy = first_blocks(shares, stages)
    return policy


def spelt_shares(name: str, stages: Sequence[int]) -> list[int]:
    """The numbers of a static policy such as "2-3-5". Raises ValueError where they do not fit."""
    shares = [int(share) for share in name.split("-")]
    if len(shares) != len(stages) or any(n > k for n, k in zip(shares, stages, strict=True)):
        raise ValueError(f"{name!r}: the stages have {'-'.join(map(str, stages))} blocks")
    return shares


def turn(kind: str, stage: int, share: int) -> tuple[int, ...]:
    """Sorts stages by who is given the next block, where they have `share` blocks so far."""
    if kind == "distribute":
        return share, stage
    return stage == 0 and share > 0, share, -stage


MAX_CANDIDATES = 10


def candidate_depths(stages: Sequence[int]) -> list[int]:
    """Numbers of blocks, each larger than the last by about the same factor: from one block a stage
    to all K, ten where there are as many.
    """
    few, num_blocks = len(stages), sum(stages)
    count = min(MAX_CANDIDATES, num_blocks - few + 1)
    depths = [few]
    for i in range(1, count):
        depths.append(max(depths[-1] + 1, round(few * (num_blocks / few) ** (i / (count - 1)))))
    return depths


def candidate_policies(stages: Sequence[int], loss: Callable[[Tensor], float]) -> Tensor:
    """A few nested policies to choose among, (C, K), of as many blocks as `candidate_depths` says.

    Of each stage the first blocks are kept. Beginning with one a stage, the next ones, an eighth as
    many as there are, go to the stage where loss(policy), of a policy (K,), comes out lowest.
    """
    shares, found = [1] * len(stages), []
    for depth in candidate_depths(stages):
        while (missing := depth - sum(shares)) > 0:
            more = max(1, min(missing, sum(shares) // 8))
            grown = [
                [min(n + more * (i == j), stages[j]) for j, n in enumerate(shares)]
                for i in range(len(stages))
                if shares[i] < stages[i]
            ]
            shares = min(grown, key=lambda longer: loss(first_blocks(longer, stages)))
        found.append(first_blocks(shares, stages))
    return torch.stack(found)


def first_blocks(shares: Sequence[int], stages: Sequence[int]) -> Tensor:
    """The policy (K,) that keeps the first blocks of each stage, so many of each."""
    kept = [torch.arange(depth) < share for share, depth in zip(shares, stages, strict=True)]
    return torch.cat(kept).float()


def shares_of(policy: Tensor, stages: Sequence[int]) -> str:
    """How many blocks of each stage a policy (K,) keeps, such as "1-2-3"."""
    return "-".join(str(int(part.sum())) for part in policy.split(list(stages)))


def expected_reward(right: Tensor, candidates: Tensor, penalty: float) -> Tensor:
    """Expected reward (Eq. 3) of C candidates (C, K), from how probably the class is right.

    right: (B, C) probabilities. Returns (B, C).
    """
    return right * reward_if_right(candidates) + (1 - right) * penalty


def penalty_between(noise: Tensor, mild: float, harsh: float) -> float:
    """A penalty between two negative ones, its logarithm uniform. noise: a scalar in [0, 1)."""
    return mild * (harsh / mild) ** noise.item()


def random_route(noise: Tensor, stages: Sequence[int], flip: float) -> Tensor:
    """A random policy near nested depths, for a ResNet that is to serve every route.

    Of each stage the first blocks are kept, their number uniform from 1 to all; in every second
    route each block is then flipped with probability `flip`. noise: (S + 1 + K,), uniform in
    [0, 1), for S stages of K blocks in all. Returns (K,).
    """
    depth = torch.tensor(stages, device=noise.device)
    shares = 1 + (noise[: len(stages)] * depth).floor()
    position = torch.cat([torch.arange(n, device=noise.device) for n in stages])
    policy = position < shares.repeat_interleave(depth)
    flipped = (noise[len(stages)] < 0.5) & (noise[len(stages) + 1 :] < flip)
    return (policy ^ flipped).to(noise.dtype)


@contextmanager
def evaluating(*networks: nn.Module | None) -> Iterator[None]:
    """Inside, networks are in evaluation mode, part by part: a frozen one stays as it was."""
    modules = (module for network in networks if network for module in network.modules())
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def count_flops(module: nn.Module, input_size: Sequence[int], *args: Tensor) -> int:
    """FLOPs of one image, (C, H, W) = input_size, through a module in evaluation mode.

    2 per multiply-add in convolutions and linear layers; further inputs may follow the image.
    """
    parameter = first_parameter(module)
    image = torch.zeros(1, *input_size, dtype=parameter.dtype, device=parameter.device)
    with torch.no_grad(), evaluating(module), FlopCounterMode(display=False) as counter:
        module(image, *args)
    return counter.get_total_flops()


def first_parameter(module: nn.Module) -> Tensor:
    """Raises ValueError for a module that has none."""
    for parameter in module.parameters():
        return parameter
    raise ValueError(f"a {type(module).__name__} has no parameters: count what it was made of")


def block_flops(resnet: nn.Module, input_size: Sequence[int]) -> tuple[int, Tensor]:
    """FLOPs of one image through what always runs (stem, shortcuts, head) and through each block.

    Returns an int and a (K,) float64 tensor; an image's FLOPs are fixed + policy @ per_block.
    """
    policies = torch.eye(resnet.num_blocks, device=first_parameter(resnet).device)
    fixed = count_flops(resnet, input_size, torch.zeros_like(policies[:1]))
    alone = [count_flops(resnet, input_size, policy[None]) for policy in policies]
    return fixed, torch.tensor(alone, dtype=torch.float64) - fixed
