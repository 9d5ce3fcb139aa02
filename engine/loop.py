"""One epoch of training or evaluation, around a step that the stage script defines."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .data import Loader
from .device import autocast
from .errors import UserError
from .tally import Tally

TrainStep = Callable[[Tensor, Tensor], tuple[Tensor, Mapping[str, Tensor]]]
TestStep = Callable[[Tensor, Tensor], Mapping[str, Tensor]]


def train_epoch(
    step: TrainStep,
    optimizers: Sequence[torch.optim.Optimizer],
    loader: Loader,
    epoch: int,
    precision: str,
    clip_norm: float | None = None,
) -> Tally:
    """Minimise the loss that `step(images, labels) -> (loss, results)` gives, batch by batch.

    Raises UserError with the step's figures, before touching a weight, when the loss or a gradient
    is not finite.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"]]
    tally = Tally(loader, epoch, f"epoch {epoch}")
    for number, (images, labels) in enumerate(tally, 1):
        with autocast(images.device, precision):
            loss, results = step(images, labels)
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not torch.isfinite(loss.detach() + norm):
            figures = {name: value.float().mean().item() for name, value in results.items()}
            raise UserError(
                f"the loss is {loss.item():.4g} and its gradient's norm {norm.item():.4g} in epoch "
                f"{epoch}, step {number} of {len(loader)} ("
                + ", ".join(f"mean {name} {value:.4g}" for name, value in figures.items())
                + f", lr {groups[0]['lr']:.3g}): lower --lr or use --precision fp32"
            )
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        for optimizer in optimizers:
            optimizer.step()
        tally.add(**results)
    return tally


@torch.no_grad()
def evaluate(step: TestStep, loader: Loader, precision: str, label: str = "evaluating") -> Tally:
    """Gather what `step(images, labels) -> results` says of every image, in order."""
    tally = Tally(loader, 0, label)
    for images, labels in tally:
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
    before = [(n.momentum, n.running_mean.clone(), n.running_var.clone()) for n in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
    network.train()
    tally = Tally(loader, epoch, "recalibrating")
    for images, _ in tally:
        with autocast(images.device, precision):
            forward(images)
        tally.bar.update(len(images))
    network.eval()
    for norm, (momentum, mean, var) in zip(norms, before, strict=True):
        norm.momentum = momentum
        if norm.num_batches_tracked == 0:
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
