"""One epoch of training or evaluation, around a step that the stage script defines.

`Results` goes through its batches with a progress bar and keeps what each image got.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import zip_longest

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import ranks
from .data import Loader
from .device import autocast, derived_seed, send
from .process import UserError
from .shard import Shard

Network = Callable[[Tensor, Tensor], Tensor]  # images and policies to logits
TrainStep = Callable[[Tensor, Tensor, Shard], tuple[Tensor, Mapping[str, Tensor]]]
TestStep = Callable[[Tensor, Tensor], Mapping[str, Tensor]]


SECONDS_BETWEEN_LOOKS = 1.0  # at the figures in the bar
SHOWN = {"correct": "acc", "reward": "reward", "policy": "blocks", "loss": "loss"}


class Results:
    """Iterates over an epoch's batches and gathers (B, ...) results by name.

    `skip` batches are left out, of which `results` are known already. The bar shows running means
    of this process; it is quiet where the output is no terminal.
    """

    def __init__(
        self,
        loader: Loader,
        epoch: int,
        label: str,
        skip: int = 0,
        results: Mapping[str, Tensor] | None = None,
    ):
        self.loader, self.epoch, self.skip = loader, epoch, skip
        # what is known already stands once, though every rank may have read it
        self.known = {n: t if ranks.is_main() else t[:0] for n, t in (results or {}).items()}
        self.results: dict[str, list[Tensor]] = {}
        self.seconds = 0.0
        self.next_look = 0.0
        quiet = None if ranks.is_main() else True
        self.bar = tqdm(
            total=-(-loader.num_images // ranks.world()), desc=label, unit="img", disable=quiet,
            leave=False,
        )  # fmt: skip

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Shard]]:
        start = time.perf_counter()
        with self.bar:
            self.bar.update(self.skip * self.loader.batch_size // ranks.world())
            for images, labels, shard in self.loader.epoch(self.epoch, self.skip):
                yield images, labels, shard
                self.bar.update(len(images))
        self.seconds = time.perf_counter() - start

    def add(self, **results: Tensor) -> None:
        """Keep one batch's results; a policy is kept as bytes, the rest as it comes."""
        for name, value in results.items():
            value = value.detach()
            if name == "policy":
                value = value.round().to(torch.uint8)
            self.results.setdefault(name, []).append(value)
        if not self.bar.disable:
            self._show()

    def _show(self) -> None:
        """Put the running means into the bar, but not at every step: a GPU is waited for."""
        names = [name for name in self.results if name in SHOWN]
        if not names or time.monotonic() < self.next_look:
            return
        means = torch.stack([mean(name, self.results[name]) for name in names]).tolist()
        shown = {SHOWN[name]: f"{value:.3f}" for name, value in zip(names, means, strict=True)}
        self.bar.set_postfix(shown, refresh=False)
        self.next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS

    def __getitem__(self, name: str) -> Tensor:
        """All images' results of one name, once there is no more to add."""
        return self.final[name]

    @cached_property
    def final(self) -> dict[str, Tensor]:
        """What `gather` gives once there is no more to add; every rank has to ask."""
        return self.gather()

    def of_policies(self) -> tuple[Tensor, Tensor, Tensor]:
        """Policies (N, K), rewards (N,) and correctness (N,), as `utils.performance_stats` asks."""
        return self["policy"], self["reward"], self["correct"]

    def gather(self) -> dict[str, Tensor]:
        """All images' results by name, on the CPU, those of all ranks in the loader's order."""
        own = {name: [tensor] for name, tensor in self.known.items()}
        for name, tensors in self.results.items():
            together = torch.cat(tensors).cpu()  # one wait for a GPU, not one a batch
            own.setdefault(name, []).extend(together.split([len(t) for t in tensors]))
        if ranks.world() == 1:
            return {name: torch.cat(tensors) for name, tensors in own.items()}
        # copies, because a part of a tensor is sent with all of it
        own = {name: [tensor.clone() for tensor in tensors] for name, tensors in own.items()}
        everyones = ranks.gather(own)
        return {
            name: torch.cat([
                tensor
                for batch in zip_longest(*(rank.get(name, []) for rank in everyones))
                for tensor in batch if tensor is not None
            ])
            for name in everyones[0]
        }  # fmt: skip


def mean(name: str, batches: list[Tensor]) -> Tensor:
    """What the bar shows: the mean over the last batches, blocks counted a policy at a time."""
    recent = torch.cat(batches[-20:]).float()
    return (recent.sum(1) if name == "policy" else recent).mean()


def train_epoch(
    step: TrainStep,
    modules: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    outcome: Results,
    precision: str,
    clip_norm: float | None = None,
    micro_batch: int | None = None,
    after_step: Callable[[int], None] = lambda number: None,
) -> None:
    """Minimise the loss of an epoch's batches.

    step(images, labels, shard) -> (loss, results) gives the shard's contribution to the loss of the
    whole batch. `modules` are what it trains, wrapped by `ranks.wrap`. After each batch
    `after_step` gets the number of batches done. Raises UserError with the step's figures, before
    touching a weight, when the loss or a gradient is not finite.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"]]
    for images, labels, shard in outcome:
        for optimizer in optimizers:
            optimizer.zero_grad()
        total = torch.zeros((), device=images.device)
        # as many on every rank, so that they stay in step
        count = -(-(shard.total // ranks.world()) // micro_batch) if micro_batch else 1
        pieces = list(shard.split(count))
        for rows, piece in pieces:
            # for what a network draws by itself; what `shard` draws is seeded on its own
            torch.manual_seed(derived_seed(*piece.seed, piece.step, piece.start))
            waiting = modules if piece is not pieces[-1][1] else ()
            with ranks.unsynchronised(waiting):
                with autocast(images.device, precision):
                    loss, results = step(images[rows], labels[rows], piece)
                # gradients are averaged over the ranks, whose losses add up
                (loss * ranks.world()).backward()
            total += loss.detach()
            outcome.add(**results)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not torch.isfinite(total + norm):  # the loop's one wait for a GPU in a step
            figures = {name: value.float().mean().item() for name, value in results.items()}
            raise UserError(
                f"the loss is {total.item():.4g} and its gradient's norm {norm.item():.4g} in "
                f"epoch {outcome.epoch}, step {shard.step + 1} of {len(outcome.loader)} ("
                + ", ".join(f"mean {name} {value:.4g}" for name, value in figures.items())
                + f", lr {groups[0]['lr']:.3g}): lower --lr or use --precision fp32"
            )
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        for optimizer in optimizers:
            optimizer.step()
        after_step(shard.step + 1)


@torch.no_grad()
def evaluate(step: TestStep, loader: Loader, precision: str, label: str = "evaluating") -> Results:
    """Gather what `step(images, labels) -> results` says of every image, in order."""
    outcome = Results(loader, 0, label)
    for images, labels, _ in outcome:
        with autocast(images.device, precision):
            results = step(images, labels)
        outcome.add(**results)
    return outcome


def correct_under(
    resnet: Network,
    policies: Tensor,
    loader: Loader,
    precision: str,
    label: str = "evaluating",
) -> Tensor:
    """Whether each image is recognised under the policy that is given for it.

    policies: (N, K), in the loader's order. Returns (N,) bool.
    """
    outcome = Results(loader, 0, label)
    with torch.no_grad():
        for images, labels, shard in outcome:
            first = shard.step * loader.batch_size
            policy = send(policies[first + shard.start : first + shard.stop], images.device)
            with autocast(images.device, precision):
                outcome.add(correct=resnet(images, policy).argmax(1) == labels)
    return outcome["correct"]
