"""How time and memory grow: with blocks, the batch, the images of an evaluation, and processes.

    python benchmarks/scaling.py --data_dir data --picture scaling.png

Each point is a process of its own, so that its peak of memory is its own. Images of an evaluation
are invented and its network costs nothing: what grows there is the bookkeeping. Processes share one
machine, as torchrun starts them, a thread each where there are no more cores. The slope is that of
a line through the logarithms: 1 where a cost doubles with its cause.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from measure import machine, table, timed, write
from processes import CORES, epoch
from torch import Tensor
from training import peak_memory, training_step

import engine
import models
import utils
from engine import Shard, options

DEPTHS = (20, 32, 56, 110, 218)
BATCHES = (32, 128, 512, 2048)
IMAGES = (10_000, 40_000, 160_000, 640_000, 1_280_000)
PROCESSES = (1, 2, 4)
BATCH = 128  # where it is not what grows
TRAINED_ON = 2048  # images, by processes
WHAT = ("blocks", "batch", "images", "processes")


def parse_args():
    parser = options.parser(__doc__, device="cpu")
    add = parser.add_argument
    add("--what", nargs="+", choices=WHAT, default=list(WHAT), help="what is to grow")
    add("--repeats", type=options.count, default=5, help="calls, of which the fastest counts")
    add("--picture", type=Path, help="also draw it to this file")
    add("--json", type=Path, help="also write the figures to this file")
    add("--point", nargs=2, metavar=("WHAT", "N"), help="only print this one's figures")
    parser.set_defaults(model="R32_C10")
    return parser.parse_args()


def fastest(call: Callable[[], object], repeats: int) -> float:
    call()
    return min(timed(call) for _ in range(repeats))


def steps(args, model: str, batch: int) -> dict[str, float]:
    """A step of each stage, and an evaluation of as many images under the policy network."""
    config = models.config(model)
    given = argparse.Namespace(**vars(args) | {"model": model, "keep": config.num_blocks // 3})
    found = {}
    for stage in ("stage 1", "stage 2"):
        call, _ = training_step(given, config, stage, "sparse", batch, config.num_blocks)
        found[f"{stage}, step, ms"] = fastest(call, args.repeats) * 1e3
        del call
    resnet, policy_net = (network.eval() for network in models.build(model))
    decided = models.deploy(resnet, models.GreedyPolicy(policy_net))
    x = torch.randn(batch, 3, config.image_size, config.image_size)

    def evaluate():
        with torch.inference_mode():
            models.predict(*decided, x)

    return {**found, "evaluation, ms": fastest(evaluate, args.repeats) * 1e3}


class NoCost:
    """A network under policies (B, K) whose classes are at random and cost nothing."""

    num_blocks, decides = 33, False

    def __call__(self, x: Tensor, policy: Tensor) -> Tensor:
        return torch.rand(len(x), 10)

    def eval(self):
        return self


class Invented:
    """A loader of so many images of one pixel."""

    def __init__(self, num_images: int, batch_size: int = 1000):
        self.num_images, self.batch_size = num_images, batch_size

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def epoch(self, epoch: int, skip: int = 0):
        for start in range(0, self.num_images, self.batch_size):
            stop = min(start + self.batch_size, self.num_images)
            shard = Shard(start, stop, stop - start)
            yield torch.zeros(stop - start, 3, 1, 1), torch.zeros(stop - start).long(), shard


def bookkeeping(num_images: int) -> dict[str, float]:
    """What an evaluation does beside the network: results, statistics, dependence."""
    config, loader, network = models.config("R101_ImgNet"), Invented(num_images), NoCost()
    probs = torch.linspace(0, 1, config.num_blocks)

    def step(images: Tensor, labels: Tensor):
        policy = (torch.rand(len(images), config.num_blocks) < probs).float()
        correct = network(images, policy).argmax(1) == labels
        return {"policy": policy, "correct": correct, "reward": correct.float()}

    start = time.perf_counter()
    results = engine.evaluate(step, loader, "fp32")
    utils.performance_stats(*results.of_policies())
    gathered = time.perf_counter()
    trained = SimpleNamespace(
        resnet=network,
        config=config,
        candidates=None,
        args=SimpleNamespace(precision="fp32"),
        resnet_flops=lambda: (1.0, torch.ones(config.num_blocks, dtype=torch.float64)),
        decision_flops=lambda: 1.0,
    )
    engine.dependence.measure(trained, loader, results["policy"], results["correct"])
    return {
        "results and statistics, ms": (gathered - start) * 1e3,
        "dependence, ms": (time.perf_counter() - gathered) * 1e3,
    }


def shared(args, number: int) -> dict[str, float]:
    """An epoch of stage 1, its batches shared by so many processes."""
    words = ["--model", args.model, "--data_dir", args.data_dir, "--subset", TRAINED_ON]
    words += ["--batch_size", 256, "--cl_step", models.config(args.model).num_blocks]
    found = epoch(number, max(1, CORES // number), "cl_training.py", *words)
    return {"an epoch, ms": found["seconds"] * 1e3, "peak of one process, MiB": found["peak"]}


def point(args, what: str, size: int) -> dict[str, float]:
    """The figures of one size; peak memory is that of this process."""
    if what == "processes":
        return shared(args, size)
    if what == "images":
        found = bookkeeping(size)
    elif what == "blocks":
        found = steps(args, f"R{6 * size // 3 + 2}_C10", BATCH)
    else:
        found = steps(args, args.model, size)
    return {**found, "peak, MiB": peak_memory()}


def measured(args, what: str, size: int) -> dict[str, float]:
    """A point, in a process of its own."""
    command = [sys.executable, __file__, "--point", what, str(size), "--model", args.model]
    command += ["--data_dir", str(args.data_dir), "--repeats", str(args.repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def slope(sizes: list[int], costs: list[float]) -> float:
    """Of a line through the logarithms of costs over sizes."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def draw(found: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """A panel for each cause, costs over sizes on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 3.4), squeeze=False,
                                layout="constrained")  # fmt: skip
    for ax, (what, points) in zip(axes[0], found.items(), strict=True):
        sizes = list(points)
        for name in next(iter(points.values())):
            costs = [points[size][name] for size in sizes]
            style = "o--" if "MiB" in name else "o-"
            ax.plot(sizes, costs, style, label=f"{name} ({slope(sizes, costs):.2f})")
        ax.set(xscale="log", yscale="log", xlabel=what)
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=7, rotation=20)
        ax.set_xticks([], minor=True)
        ax.legend(fontsize=7, title="in brackets: slope", title_fontsize=7)
    with engine.user_errors(path):
        figure.savefig(path, dpi=120)


def main() -> None:
    args = parse_args()
    engine.seed_everything(args.seed)
    if args.point:
        what, size = args.point
        return print(json.dumps(point(args, what, int(size))))
    facts = machine()
    print(json.dumps(facts))
    sizes = {
        "blocks": [3 * ((depth - 2) // 6) for depth in DEPTHS],
        "batch": BATCHES,
        "images": IMAGES,
        "processes": PROCESSES,
    }
    found = {what: {n: measured(args, what, n) for n in sizes[what]} for what in args.what}
    for what, points in found.items():
        names = list(next(iter(points.values())))
        rows = [[n, *(f"{costs[name]:.0f}" for name in names)] for n, costs in points.items()]
        slopes = [f"{slope(list(points), [c[n] for c in points.values()]):.2f}" for n in names]
        print(f"\n{table([what, *names], [*rows, ['slope', *slopes]])}", flush=True)
    if args.picture:
        draw(found, args.picture)
    if args.json:
        write({"machine": facts, "points": found}, args.json)


if __name__ == "__main__":
    engine.run_script(main)
