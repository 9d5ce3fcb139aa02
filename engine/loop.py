"""Batches of training and what is done with their losses; evaluations; what each image got."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from itertools import zip_longest

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import ranks
from .data import Loader
from .device import autocast, send
from .process import UserError
from .shard import Shard, derived_seed

Network = Callable[[Tensor, Tensor], Tensor]  # images and policies to logits
TestStep = Callable[[Tensor, Tensor], Mapping[str, Tensor]]


STEPS_OF_PACE, SLOWED_DOWN = 9, 3  # steps whose median is compared with the best such median
LOOKED_AT = 500  # images of a quick look at a ResNet
SECONDS_BETWEEN_LOOKS = 1.0  # at the figures in the bar
SHOWN = {"correct": "acc", "reward": "reward", "policy": "blocks", "loss": "loss"}


class Results:
    """Gathers (B, ...) results by name, of so many images in all.

    `known` are results of an earlier run and `done` the images that they are of. The bar shows
    running means of this process; it is quiet where the output is no terminal.
    """

    def __init__(
        self,
        num_images: int,
        label: str,
        known: Mapping[str, Tensor] | None = None,
        done: int = 0,
    ):
        # what is known already stands once, though every rank may have read it
        self.known = {n: t if ranks.is_main() else t[:0] for n, t in (known or {}).items()}
        self.results: dict[str, list[Tensor]] = {}
        self.start, self.seconds = time.perf_counter(), 0.0
        self.next_look = 0.0
        quiet = None if ranks.is_main() else True
        total = -(-num_images // ranks.world())
        self.bar = tqdm(total=total, desc=label, unit="img", disable=quiet, leave=False)
        self.bar.update(done // ranks.world())

    def add(self, num_images: int, results: Mapping[str, Tensor]) -> None:
        """Keep what so many images got; a policy is kept as bytes, the rest as it comes."""
        for name, value in results.items():
            value = value.detach()
            if name == "policy":
                value = value.round().to(torch.uint8)
            self.results.setdefault(name, []).append(value)
        if not self.bar.disable:
            self._show()
            self.bar.update(num_images)

    def close(self) -> None:
        """There is no more to add."""
        self.bar.close()
        self.seconds = time.perf_counter() - self.start

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


class Pace:
    """How fast steps follow one another."""

    def __init__(self):
        self.last: float | None = None
        self.seconds: deque[float] = deque(maxlen=STEPS_OF_PACE)
        self.best, self.told = float("inf"), False

    def fell(self) -> bool:
        """Whether the last steps took SLOWED_DOWN times as long as the fastest as many did; true
        once. To be asked after each step.
        """
        now = time.perf_counter()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now
        if self.told or len(self.seconds) < STEPS_OF_PACE:
            return False
        typical = statistics.median(self.seconds)
        self.best = min(self.best, typical)
        self.told = typical > SLOWED_DOWN * self.best
        return self.told


class Training:
    """The batches of an epoch, and what is done with the loss of each.

        for images, labels, shard in training.batches(loader, epoch):
            loss, outcome = ...  # the shard's part of the batch's loss; what became of its images
            training.step(loss, outcome)

    modules: what is trained, wrapped by `ranks.wrap`. A batch comes in parts of at most
    `micro_batch` images. `results` gathers the outcomes of the epoch.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        micro_batch: int | None = None,
    ):
        self.modules, self.optimizers, self.micro_batch = modules, optimizers, micro_batch
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.parameters = [p for group in groups for p in group["params"]]
        self.world = ranks.world()

    def batches(
        self,
        loader: Loader,
        epoch: int,
        skip: int = 0,
        known: Mapping[str, Tensor] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Shard]]:
        """This rank's images, labels and shards, the first `skip` batches left out, of which
        results are `known`.
        """
        done = skip * loader.batch_size
        self.results = Results(loader.num_images, f"epoch {epoch}", known, done)
        self.epoch, self.steps = epoch, len(loader)
        for images, labels, shard in loader.epoch(epoch, skip):
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            self.loss = torch.zeros((), device=images.device)
            # as many on every rank, so that they stay in step
            count = -(-(shard.total // self.world) // self.micro_batch) if self.micro_batch else 1
            parts = list(shard.split(count))
            for rows, part in parts:
                # for what a network draws by itself; what a shard draws is seeded on its own
                torch.manual_seed(derived_seed(*part.seed, part.step, part.start))
                self.shard, self.is_last = part, part is parts[-1][1]
                self.is_due = True
                with self._unsynchronised():
                    yield images[rows], labels[rows], part
        self.results.close()

    def _unsynchronised(self):
        """Gradients of all parts but a batch's last add up, and are not averaged yet."""
        if self.is_last or self.world == 1:
            return nullcontext()
        return ranks.unsynchronised(self.modules)

    def step(
        self, loss: Tensor, outcome: Mapping[str, Tensor], clip_norm: float | None = None
    ) -> None:
        """Learn from a shard's part of the loss; the weights change with a batch's last part.

        Raises UserError with the step's figures, before touching a weight, when the loss or a
        gradient is not finite; RuntimeError at a second step on a shard, whose images and gradients
        would count twice.
        """
        if not self.is_due:
            raise RuntimeError(
                "a second step on the same images: methods that take several, such as PPO, step an "
                "optimizer of their own"
            )
        self.is_due = False
        # gradients are averaged over the ranks, whose losses add up
        (loss * self.world).backward()
        self.loss += loss.detach()
        self.results.add(self.shard.stop - self.shard.start, outcome)
        if not self.is_last:
            return
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.parameters if p.grad is not None]
        )
        if not torch.isfinite(self.loss + norm):  # the one wait for a GPU in a step
            figures = {name: value.float().mean().item() for name, value in outcome.items()}
            rate = self.optimizers[0].param_groups[0]["lr"]
            raise UserError(
                f"the loss is {self.loss.item():.4g} and its gradient's norm {norm.item():.4g} in "
                f"epoch {self.epoch}, step {self.shard.step + 1} of {self.steps} ("
                + ", ".join(f"mean {name} {value:.4g}" for name, value in figures.items())
                + f", lr {rate:.3g}): lower --lr or use --precision fp32"
            )
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, clip_norm, norm)
        for optimizer in self.optimizers:
            optimizer.step()


@torch.no_grad()
def evaluate(step: TestStep, loader: Loader, precision: str, label: str = "evaluating") -> Results:
    """Gather what `step(images, labels) -> results` says of every image, in order."""
    results = Results(loader.num_images, label)
    for images, labels, _ in loader.epoch(0):
        with autocast(images.device, precision):
            found = step(images, labels)
        results.add(len(images), found)
    results.close()
    return results


def first_batches(loader: Loader, count: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's part of the first images of an epoch that no training has, and their labels."""
    batches = []
    for images, labels, shard in loader.epoch(0):
        missing = count - shard.step * loader.batch_size
        wanted = max(0, missing - shard.start)  # all ranks together have the first `count`
        if wanted:
            batches.append((images[:wanted], labels[:wanted]))
        if missing <= loader.batch_size:
            break
    return batches


@torch.no_grad()
def first_accuracy(network: nn.Module, loader: Loader, precision: str) -> tuple[float, int]:
    """How often a ResNet with all its blocks is right about the first images, and how many."""
    training = network.training
    network.eval()
    counts = torch.zeros(2, dtype=torch.float64)
    for images, labels in first_batches(loader, LOOKED_AT):
        with autocast(images.device, precision):
            correct = network(images).argmax(1) == labels
        counts += torch.tensor([correct.sum().item(), len(correct)])
    network.train(training)
    right, count = ranks.total(counts).tolist()
    return right / max(count, 1), int(count)


def near_chance(accuracy: float, num_classes: int) -> str | None:
    """What to tell of a ResNet that knows hardly more than nothing, as with the weights or pixels
    of another network; None of a better one.
    """
    chance = 1 / num_classes
    if accuracy > chance + 0.1 * (1 - chance):
        return None
    return (
        f"the full ResNet's accuracy of {accuracy:.1%} is near chance: does it know these classes, "
        "and are its pixels normalised as it learned them (--base_pixels)?"
    )


@torch.no_grad()
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
    results = Results(loader.num_images, label)
    for images, labels, shard in loader.epoch(0):
        first = shard.step * loader.batch_size
        policy = send(policies[first + shard.start : first + shard.stop], images.device)
        with autocast(images.device, precision):
            correct = resnet(images, policy).argmax(1) == labels
        results.add(len(images), {"correct": correct})
    results.close()
    return results["correct"]
