"""The method of BlockDrop (Wu et al., CVPR 2018, arXiv 1711.08393) as pure functions of tensors.

B is the number of images in a batch, K the number of residual blocks. A policy is a (B, K) tensor
of 0 (drop) and 1 (keep).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode


def bound(probs: Tensor, alpha: float) -> Tensor:
    """Keep probabilities away from 0 and 1, so that sampling goes on exploring (section 3.3).

    Maps (B, K) probabilities s to alpha * s + (1 - alpha) * (1 - s), in [1 - alpha, alpha].
    """
    return alpha * probs + (1 - alpha) * (1 - probs)


def most_probable(probs: Tensor) -> Tensor:
    """The self-critical baseline's policy: 1 where the keep probability is at least one half."""
    return (probs >= 0.5).to(probs.dtype)


def sample(probs: Tensor, noise: Tensor | None = None) -> Tensor:
    """One policy an image, each block drawn from its own Bernoulli distribution (Eq. 1).

    noise: uniform in [0, 1), (..., B, K) for probs (B, K), drawn here if not given. Returns its
    shape.
    """
    # not torch.bernoulli, which stops a GPU for good at a NaN; here the loss shows it
    noise = torch.rand_like(probs) if noise is None else noise
    return (noise < probs).to(probs.dtype)


def curriculum_step(
    epoch: int, first_step: int = 1, epochs_per_step: int = 1, blocks_per_step: int = 1
) -> int:
    """How many blocks are learned in an epoch, counted from 1: some more every so many epochs."""
    return first_step + (epoch - 1) // epochs_per_step * blocks_per_step


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


def reward(logits: Tensor, labels: Tensor, policy: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Reward of each image's policy (Eq. 3): 1 - (|u| / K)^2 if the class is right, else `penalty`.

    logits: (B, classes). labels: (B,). policy: (B, K). penalty: -gamma of the paper.
    Returns (B,) reward and (B,) bool, whether the class is right. With logits (P, B, classes) and
    policy (P, B, K), several policies an image, both are (P, B).
    """
    correct = logits.argmax(-1) == labels
    usage = policy.sum(-1) / policy.shape[-1]
    return torch.where(correct, 1 - usage**2, penalty), correct


def leave_one_out(reward: Tensor) -> Tensor:
    """Baseline of each of an image's P >= 2 policies: the mean reward of its others.

    reward: (P, B). Returns (P, B). Two policies are each other's baseline.
    """
    return (reward.sum(0) - reward) / (len(reward) - 1)


def policy_gradient_loss(
    probs: Tensor, policy: Tensor, advantage: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Loss whose gradient is the policy gradient (Eq. 6), summed over the batch.

    probs: (B, K) the probabilities that `policy`, (B, K) or (P, B, K), was drawn from. advantage:
    (B,) or (P, B), taken as a constant. mask: (K,) bool, true for the blocks that count.
    Returns a scalar.
    """
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
) -> tuple[float, float, float, float, set[tuple[int, ...]]]:
    """What the logs show of N images: policies (N, K), rewards (N,), correct (N,).

    Returns accuracy, mean reward, mean blocks kept (sparsity), their standard deviation
    (variance, as the released code names it) and the set of distinct policies.
    """
    blocks = policies.double().sum(1)
    variance = blocks.std().item() if len(blocks) > 1 else 0.0
    policy_set = {tuple(row) for row in policies.to(torch.int8).unique(dim=0).tolist()}
    accuracy = correct.double().mean().item()
    return accuracy, rewards.double().mean().item(), blocks.mean().item(), variance, policy_set


def static_policy(kind: str, keep: int, stages: Sequence[int], seed: int = 0) -> Tensor:
    """The paper's static baselines: the same `keep` of K blocks for every image (section 4.2).

    kind: "first" keeps the first blocks, "random" as many drawn with `seed`, "distribute" the
    first ones of each stage, shared as evenly as the stages allow, earlier stages first.
    Returns a (K,) float tensor. Raises ValueError when K has no `keep` blocks or kind is unknown.
    """
    num_blocks = sum(stages)
    if not 0 <= keep <= num_blocks:
        raise ValueError(f"a static policy keeps 0 to {num_blocks} blocks, not {keep}")
    policy = torch.zeros(num_blocks)
    if kind == "first":
        policy[:keep] = 1
    elif kind == "random":
        generator = torch.Generator().manual_seed(seed)
        policy[torch.randperm(num_blocks, generator=generator)[:keep]] = 1
    elif kind == "distribute":
        shares = [0] * len(stages)
        while sum(shares) < keep:
            open_stages = [i for i, depth in enumerate(stages) if shares[i] < depth]
            shares[min(open_stages, key=lambda i: (shares[i], i))] += 1
        for start, share in zip(_stage_starts(stages), shares, strict=True):
            policy[start : start + share] = 1
    else:
        raise ValueError(f"no static policy {kind!r}: take first, random or distribute")
    return policy


def _stage_starts(stages: Sequence[int]) -> list[int]:
    return [sum(stages[:i]) for i in range(len(stages))]


def count_flops(module: nn.Module, input_size: Sequence[int], *args: Tensor) -> int:
    """FLOPs of one image, (C, H, W) = input_size, through a module in evaluation mode.

    2 per multiply-add in convolutions and linear layers; further inputs may follow the image.
    """
    parameter = next(module.parameters())
    image = torch.zeros(1, *input_size, dtype=parameter.dtype, device=parameter.device)
    training = module.training
    module.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(image, *args)
    module.train(training)
    return counter.get_total_flops()


def block_flops(resnet: nn.Module, input_size: Sequence[int]) -> tuple[int, Tensor]:
    """FLOPs of one image through what always runs (stem, shortcuts, head) and through each block.

    Returns an int and a (K,) float64 tensor; an image's FLOPs are fixed + policy @ per_block.
    """
    device = next(resnet.parameters()).device
    policies = torch.eye(resnet.num_blocks, device=device)
    fixed = count_flops(resnet, input_size, torch.zeros_like(policies[:1]))
    alone = [count_flops(resnet, input_size, policy[None]) for policy in policies]
    return fixed, torch.tensor(alone, dtype=torch.float64) - fixed
