"""ConvNet-AIG (Veit and Belongie, ECCV 2018, arXiv 1711.11503): gates decide on the way.

Where BlockDrop's policy network looks at the image once, here a tiny gate in front of every block
looks at what reaches the block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import execution
from .resnet import ResNet

HIDDEN = 16
CLOSED, OPEN = 0, 1  # the two outcomes of a gate, in the order of its logits


def gumbel_argmax(logits: Tensor, tau: float = 1.0) -> Tensor:
    """One outcome for each row of `logits` (B, n), drawn from softmax(logits).

    Returns (B, n) rows of one 1: argmax(logits + G) in the forward pass with Gumbel noise G, with
    the gradient of softmax((logits + G) / tau) in the backward pass (Jang et al. 2017).
    """
    # Not F.gumbel_softmax, which draws in the type of the logits. -log U is exponential. At its
    # extremes, 0 and inf, G would be infinite and the softmax of two infinities undefined: in
    # float32 and clamped, |G| stays below 90.
    exponential = torch.empty_like(logits, dtype=torch.float32).exponential_()
    gumbel = -exponential.clamp(1e-30, 1e30).log()
    soft = ((logits + gumbel) / tau).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return hard + (soft - soft.detach())  # exactly 0 or 1


class Gate(nn.Module):
    """Global average pool, two linear layers, two logits: skip and execute.

    A subclass may pool in another way; `registry.GATES` gives it to models of a name of its own.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, HIDDEN)
        self.fc1bn = nn.BatchNorm1d(HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, 2)
        nn.init.kaiming_normal_(self.fc1.weight, nonlinearity="relu")
        nn.init.zeros_(self.fc1.bias)
        nn.init.normal_(self.fc2.weight, std=0.001)
        # open with probability sigmoid(2 - 0.1) = 0.87 at first
        self.fc2.bias.data = torch.tensor([0.1, 2.0])

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W), the block's input. Returns logits (B, 2), float32 or wider."""
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            pooled = self.pool(x, wide).to(self.fc1.weight.dtype)
            return self.fc2(F.relu(self.normalise(self.fc1(pooled)))).to(wide)

    @staticmethod
    def pool(x: Tensor, dtype: torch.dtype) -> Tensor:
        """x: (B, C, H, W). Returns (B, C) in dtype."""
        return x.mean((2, 3), dtype=dtype)

    def normalise(self, hidden: Tensor) -> Tensor:
        """BatchNorm; a single image has no statistics and takes the running ones."""
        norm = self.fc1bn
        # ranks that share their statistics come to it together, one image or not
        if len(hidden) > 1 or not self.training or isinstance(norm, nn.SyncBatchNorm):
            return norm(hidden)
        running = norm.running_mean, norm.running_var
        return F.batch_norm(hidden, *running, norm.weight, norm.bias, eps=norm.eps)


class GatedResNet(nn.Module):
    """A ResNet whose blocks are gated one by one: x_{l+1} = relu(shortcut(x_l) + z_l F_l(x_l)).

    Gates sample in training mode and take the likelier outcome in evaluation mode, unless
    `sample_gates` is set. The gates of blocks in `always_on` are not asked. Training computes every
    block, since closed gates learn from what they left out; evaluation computes a block only for
    the images whose gate is open.
    """

    decides = True  # by itself which blocks an image runs

    def __init__(self, resnet: ResNet, gate: type[Gate] = Gate):
        super().__init__()
        self.resnet = resnet
        self.num_blocks = resnet.num_blocks
        self.gates = nn.ModuleList(gate(branch.conv1.in_channels) for branch, _ in resnet.units())
        self.sample_gates = False
        self.always_on: frozenset[int] = frozenset()

    def set_targets(self, targets: Sequence[float]) -> None:
        """Blocks with a target rate of 1 are executed always. targets: K rates, or none.

        Raises ValueError for another number of them.
        """
        if len(targets) not in (0, self.num_blocks):
            raise ValueError(f"{len(targets)} target rates for {self.num_blocks} blocks")
        self.always_on = frozenset(k for k, target in enumerate(targets) if target >= 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, 3, H, W). Returns logits (B, classes) and the gates (B, K), 0 or 1.

        In training mode the gates carry the gradient of their soft form.
        """
        x = self.resnet.stem(x)
        executed = []
        for k, (branch, shortcut) in enumerate(self.resnet.units()):
            if k in self.always_on:
                x = execution.block(branch, shortcut, x)
                executed.append(x.new_ones(len(x), dtype=torch.float32))
                continue
            gate = self.decide(self.gates[k](x))
            if self.training or self.resnet.execution == "masked":
                x = dense(branch, shortcut, x, gate)
            else:
                rows = execution.open_rows(gate, self.resnet.multiple())
                x = sparse(branch, shortcut, x, rows)
            executed.append(gate)
        return self.resnet.head(x), torch.stack(executed, 1)

    def decide(self, logits: Tensor) -> Tensor:
        """Whether each image executes the block: (B, 2) logits to (B,) of 0 and 1."""
        if self.training or self.sample_gates:
            return gumbel_argmax(logits)[:, OPEN]
        return (logits[:, OPEN] > logits[:, CLOSED]).to(logits.dtype)


def dense(branch: nn.Module, shortcut: nn.Module, x: Tensor, gate: Tensor) -> Tensor:
    """A gated block, computed for every image; gate (B,), differentiable."""
    gated = branch(x) * gate[:, None, None, None].to(x.dtype)
    return F.relu(gated + shortcut(x))


def sparse(branch: nn.Module, shortcut: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
    """The same, computed for the images whose gate is open; for evaluation."""
    x = execution.kept_block(branch, shortcut, x, rows)
    # a closed gate in front of a projection leaves shortcut(x), which may be negative
    return x if isinstance(shortcut, nn.Identity) else F.relu(x)
