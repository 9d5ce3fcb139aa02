"""One epoch of training or evaluation, around a step that the stage script defines."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import ranks
from .data import Loader
from .device import autocast, derived_seed
from .errors import UserError
from .part import Part
from .tally import Tally

TrainStep = Callable[[Tensor, Tensor, Part], tuple[Tensor, Mapping[str, Tensor]]]
TestStep = Callable[[Tensor, Tensor], Mapping[str, Tensor]]


def train_epoch(
    step: TrainStep,
    modules: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    tally: Tally,
    precision: str,
    clip_norm: float | None = None,
    micro_batch: int | None = None,
    after_step: Callable[[int], None] = lambda number: None,
) -> None:
    """Minimise the loss of an epoch's batches.

    step(images, labels, part) -> (loss, results) gives the part's contribution to the loss of the
    whole batch. `modules` are what it trains, wrapped by `ranks.wrap`. After each batch
    `after_step` gets the number of batches done. Raises UserError with the step's figures, before
    touching a weight, when the loss or a gradient is not finite.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"]]
    for images, labels, part in tally:
        for parameter in parameters:
            parameter.grad = None
        total = torch.zeros((), device=images.device)
        # as many on every rank, so that they stay in step
        count = -(-(part.total // ranks.world()) // micro_batch) if micro_batch else 1
        pieces = list(part.split(count))
        for rows, piece in pieces:
            # for what a network draws by itself; what `part` draws is seeded on its own
            torch.manual_seed(derived_seed(*piece.seed, piece.step, piece.start))
            waiting = modules if piece is not pieces[-1][1] else ()
            with ranks.unsynchronised(waiting), autocast(images.device, precision):
                loss, results = step(images[rows], labels[rows], piece)
                # gradients are averaged over the ranks, whose losses add up
                (loss * ranks.world()).backward()
            total += loss.detach()
            tally.add(**results)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not torch.isfinite(total + norm):
            figures = {name: value.float().mean().item() for name, value in results.items()}
            raise UserError(
                f"the loss is {total.item():.4g} and its gradient's norm {norm.item():.4g} in "
                f"epoch {tally.epoch}, step {part.step + 1} of {len(tally.loader)} ("
                + ", ".join(f"mean {name} {value:.4g}" for name, value in figures.items())
                + f", lr {groups[0]['lr']:.3g}): lower --lr or use --precision fp32"
            )
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        for optimizer in optimizers:
            optimizer.step()
        after_step(part.step + 1)


@torch.no_grad()
def evaluate(step: TestStep, loader: Loader, precision: str, label: str = "evaluating") -> Tally:
    """Gather what `step(images, labels) -> results` says of every image, in order."""
    tally = Tally(loader, 0, label)
    for images, labels, _ in tally:
        with autocast(images.device, precision):
            results = step(images, labels)
        tally.add(**results)
    return tally


@torch.no_grad()
def recalibrate(
    forward: Callable[[Tensor], object],
    network: nn.Module,
    loader: Loader,
    epoch: int,
    precision: str,
) -> None:
    """Take BatchNorm's running statistics of a network anew, as means over an epoch's batches.

    forward(images) runs the network, which comes back in evaluation mode. A BatchNorm that saw no
    image keeps what it had.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    before = [(n, n.momentum, {k: b.clone() for k, b in n.named_buffers()}) for n in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
    network.train()
    try:
        tally = Tally(loader, epoch, "recalibrating")
        for images, _, _ in tally:
            with autocast(images.device, precision):
                forward(images)
            tally.bar.update(len(images))
    except BaseException:  # a stop saves the network, which has to be as it was
        for norm, _, buffers in before:
            restore(norm, buffers)
        raise
    finally:
        network.eval()
        for norm, momentum, _ in before:
            norm.momentum = momentum
    for norm, _, buffers in before:
        batches = ranks.total(norm.num_batches_tracked.double())
        if batches == 0:
            restore(norm, buffers)
        elif ranks.world() > 1:
            share = norm.num_batches_tracked / batches
            norm.running_mean.copy_(ranks.total(norm.running_mean * share))
            norm.running_var.copy_(ranks.total(norm.running_var * share))


def restore(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])
