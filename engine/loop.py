"""One epoch of training or evaluation, around a step that the stage script defines."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .data import Loader
from .device import autocast
from .errors import UserError
from .tally import Tally

TrainStep = Callable[[Tensor, Tensor], tuple[Tensor, Mapping[str, Tensor]]]
TestStep = Callable[[Tensor, Tensor], Mapping[str, Tensor]]


def train_epoch(
    step: TrainStep,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    epoch: int,
    precision: str,
    clip_norm: float | None = None,
) -> Tally:
    """Minimise the loss that `step(images, labels) -> (loss, results)` gives, batch by batch.

    Raises UserError with the step's figures, before touching a weight, when the loss or a gradient
    is not finite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tally = Tally(loader, epoch, f"epoch {epoch}")
    for number, (images, labels) in enumerate(tally, 1):
        with autocast(images.device, precision):
            loss, results = step(images, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not torch.isfinite(loss.detach() + norm):
            figures = {name: value.float().mean().item() for name, value in results.items()}
            raise UserError(
                f"the loss is {loss.item():.4g} and its gradient's norm {norm.item():.4g} in epoch "
                f"{epoch}, step {number} of {len(loader)} ("
                + ", ".join(f"mean {name} {value:.4g}" for name, value in figures.items())
                + f", lr {optimizer.param_groups[0]['lr']:.3g}): lower --lr or use --precision fp32"
            )
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
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


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
