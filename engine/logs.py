"""What a run leaves for people to read: lines, metrics.jsonl, TensorBoard, its options."""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import ranks
from .process import user_errors

PIXELS = 8  # a block's side in TensorBoard's picture of keep rates


def summary_writer(folder: Path, purge_step: int | None):
    """TensorBoard's writer: tensorboardX's or, where that is not installed, PyTorch's own."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        from torch.utils.tensorboard import SummaryWriter
    # written within a second: `flush` leaves out what its thread has not taken up yet
    return SummaryWriter(str(folder), purge_step=purge_step, flush_secs=1)


class Logs:
    """The lines and figures of a run, epoch by epoch; only rank 0 prints and writes.

    `metrics` holds the figures of the epoch that runs, as they will stand in metrics.jsonl.
    """

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.folder, self.args = folder, args
        self.metrics: dict[str, Any] = {}
        self.writer = None
        self.start = 0.0

    def open(self, done: int, source: Path | None) -> None:
        """Write down the options and the command of a run that begins, or goes on after epoch
        `done` of the one in `source`, whose figures until then come along.
        """
        if not ranks.is_main():
            return
        goes_on = source is not None
        with user_errors(self.folder):
            lines = [f"{name}: {value}" for name, value in sorted(vars(self.args).items())]
            (self.folder / "args.txt").write_text("\n".join(lines) + "\n")
            with open(self.folder / "command.txt", "a" if goes_on else "w") as file:
                file.write(shlex.join(["python", *sys.argv]) + "\n")
            self._keep_until(done, source)
            purge_step = done + 1 if goes_on else None
            self.writer = summary_writer(self.folder / "log", purge_step)

    def _keep_until(self, epoch: int, source: Path | None) -> None:
        """Begin metrics.jsonl with those lines of the source's that will not be written again."""
        before = source / "metrics.jsonl" if source else None
        lines = before.read_text().splitlines(keepends=True) if before and before.exists() else []
        kept = [
            line for line in lines if line.endswith("\n") and json.loads(line)["epoch"] <= epoch
        ]
        path = self.folder / "metrics.jsonl"
        if kept or path.exists():
            partial = path.with_suffix(".tmp")
            partial.write_text("".join(kept))
            partial.replace(path)

    def close(self) -> None:
        if self.writer:
            self.writer.close()

    def begin(self, epoch: int) -> None:
        self.metrics = {"epoch": epoch}
        self.start = time.perf_counter()

    def end(self) -> None:
        """Write the epoch's line of metrics.jsonl."""
        self.metrics["seconds"] = round(time.perf_counter() - self.start, 3)
        if ranks.is_main():
            with user_errors(self.folder), open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(self.metrics) + "\n")

    def line(self, line: str, split: str, begin: str = "TS", **figures: float) -> None:
        """Print a line behind its epoch or, at an evaluation, behind `begin`.

        As in the released code an evaluation has one line that begins with `TS`. The figures go
        into metrics.jsonl and TensorBoard as <split>_<name>.
        """
        epoch = self.metrics["epoch"]
        self.metrics |= {f"{split}_{name}": value for name, value in figures.items()}
        if not ranks.is_main():
            return
        line = f"E: {epoch} | {line}" if split == "train" else f"{begin} - {line}"
        if self.args.subset:
            line += f" | --subset {self.args.subset}"
        tqdm.write(line)
        sys.stdout.flush()
        for name, value in figures.items():
            self.writer.add_scalar(f"{split}_{name}", value, epoch)

    def policies(
        self,
        split: str,
        accuracy: float,
        reward: float,
        sparsity: float,
        variance: float,
        unique: int,
    ) -> None:
        """Log `utils.performance_stats` in the released code's format."""
        self.line(
            f"A: {accuracy:.3f} | R: {reward:.2E} | S: {sparsity:.3f} | V: {variance:.3f} "
            f"| #: {unique}",
            split,
            accuracy=accuracy,
            reward=reward,
            sparsity=sparsity,
            variance=variance,
            unique_policies=unique,
        )

    def rates(self, split: str, rates: torch.Tensor) -> None:
        """Put how often each block was executed, (K,), into metrics.jsonl and TensorBoard."""
        self.metrics[f"{split}_rates"] = [round(rate, 4) for rate in rates.tolist()]
        for k, rate in enumerate(rates.tolist() if ranks.is_main() else []):
            self.writer.add_scalar(f"{split}_rate/block_{k:02d}", rate, self.metrics["epoch"])

    def kept(self, policies: torch.Tensor, labels: torch.Tensor) -> None:
        """Show in TensorBoard how often blocks are kept, by class, and how many an image keeps.

        policies: (N, K), labels: (N,). The picture has the blocks from left to right, all images
        in its first row and then one class a row, black for never and white for always.
        """
        if not ranks.is_main():
            return
        classes = labels.unique() if labels.max() < 100 else labels[:0]
        groups = [policies, *(policies[labels == label] for label in classes)]
        rates = torch.stack([group.double().mean(0) for group in groups])
        picture = rates.repeat_interleave(PIXELS, 0).repeat_interleave(PIXELS, 1)
        epoch = self.metrics["epoch"]
        self.writer.add_image("test_keep_rates", picture.numpy(), epoch, dataformats="HW")
        self.writer.add_histogram("test_blocks", policies.long().sum(1).numpy(), epoch)
