"""Early exits on a base ResNet beside our curve: accuracy against FLOPs, and by the clock.

    pip install -r requirements-peers.txt
    python benchmarks/early_exits.py --model R32_C10 --load cv/R32_C10/curve --time

earlyon puts heads behind stages or blocks of the frozen base that ours runs on, trains them on
training images without the last 5,000, fits temperatures on half of these, and on the other half
calibrates thresholds for what accuracy may be lost. Test images are looked at once, at the end.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from measure import machine, table, timed, write
from torch import Tensor, nn
from torch.nn import functional as F

import engine
import utils
from engine import UserError, options, process
from engine.data import Loader
from engine.trained import TrainedModel

LEFT_OUT = 5000  # training images that calibrate
DROPS = (0.005, 0.01, 0.02, 0.05, 0.1)  # of accuracy that may be lost on those images
PENALTIES = (-0.5, -1.0, -2.0, -5.0, -15.0, -50.0)
TIMED = {1: 150, 256: 4}  # batches of a size


def parse_args():
    parser = options.parser(__doc__, device="cpu", model="R32_C10")
    add = parser.add_argument
    options.add_base(parser)
    add("--load", required=True, help="our curve on the same base, of a warm start")
    add("--epochs", type=options.count, default=10, help="that the heads learn for")
    add("--time", action="store_true", help="also milliseconds an image, at batch 1 and 256")
    add("--work", type=Path, default=Path("cv/early_exits"), help="heads are kept here and reused")
    add("--picture", type=Path, help="also draw accuracy against FLOPs to this file")
    add("--json", type=Path, help="also write the figures to this file")
    parser.set_defaults(policy=None, penalty=None, batch_size=128)
    return parser.parse_args()


class Block(nn.Module):
    """A residual block of ours as a plain module."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.branch = branch
        # of its own: earlyon counts nothing where a module is run twice
        self.shortcut = nn.Identity() if isinstance(shortcut, nn.Identity) else shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class Stages(nn.Module):
    """Our ResNet in full, its stages and blocks named: stages.0.3 is the fourth of the first."""

    def __init__(self, resnet: nn.Module):
        super().__init__()
        # earlyon counts in the order in which modules stand here, each by the first of its names
        self.whole = (resnet,)
        self.conv1, self.bn1 = resnet.conv1, resnet.bn1
        blocks = [Block(*unit) for unit in resnet.units()]
        starts = [sum(resnet.stages[:i]) for i in range(len(resnet.stages))]
        self.stages = nn.Sequential(
            *(nn.Sequential(*blocks[s : s + n]) for s, n in zip(starts, resnet.stages, strict=True))
        )
        self.fc = resnet.fc

    def forward(self, x: Tensor) -> Tensor:
        (resnet,) = self.whole
        return resnet.head(self.stages(resnet.stem(x)))


class Batches:
    """A loader of ours as earlyon takes it: each pass is another epoch of images and labels."""

    def __init__(self, loader: Loader):
        self.loader, self.epoch = loader, 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.epoch += 1
        for images, labels, _ in self.loader.epoch(self.epoch):
            yield images, labels


def exit_layers(stages: tuple[int, ...]) -> dict[str, list[str]]:
    """Where exits are put; the ResNet's own head stays the last."""
    behind = [f"stages.{i}" for i in range(len(stages) - 1)]
    blocks = [f"stages.{i}.{k}" for i, n in enumerate(stages) for k in range(1, n, 2)]
    return {"behind stages": behind, "behind every second block": blocks}


def exit_flops(model, layers: list[str], input_size: tuple[int, int, int]) -> Tensor:
    """FLOPs of an image that leaves at each exit, (E + 1,), all heads it passed counted."""
    (resnet,) = model.backbone.whole
    fixed, per_block = utils.block_flops(resnet, input_size)
    starts = [sum(resnet.stages[:i]) for i in range(len(resnet.stages))]
    # stem, shortcuts and the ResNet's own head: the last two are little, and counted in full
    heads, found = 0.0, []
    for point, layer in zip(model.config.exit_points, layers, strict=True):
        _, stage, *block = layer.split(".")
        last = int(block[0]) if block else resnet.stages[int(stage)] - 1
        done = starts[int(stage)] + last + 1
        heads += utils.count_flops(model.exit_heads[point.name], (point.in_channels, 1, 1))
        found.append(fixed + per_block[:done].sum().item() + heads)
    return torch.tensor([*found, fixed + per_block.sum().item() + heads], dtype=torch.float64)


def halves(images: Tensor, labels: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
    middle = len(images) // 2
    parts = (slice(0, middle), slice(middle, None))
    return [list(zip(images[p].split(500), labels[p].split(500), strict=True)) for p in parts]


def whole(loader: Loader) -> tuple[Tensor, Tensor]:
    batches = [(images, labels) for images, labels, _ in loader.epoch(0)]
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def exits(args, layers: list[str], train: Loader, held: Loader, test: Loader, config):
    """A calibrated model and its figures for each loss that is allowed."""
    from earlyon.core import thresholds
    from earlyon.models import custom_ee
    from earlyon.training import stage2_train_exits

    base = TrainedModel(argparse.Namespace(**vars(args) | {"load": None}), config)
    backbone = Stages(base.resnet).eval()
    images, labels = whole(test)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images[:64]), base.resnet(images[:64]))
    engine.seed_everything(args.seed)
    model = custom_ee(backbone, layers, config.num_classes, input_shape=(1, *base.input_size))
    kept = args.work / f"{config.name}_{len(layers)}_exits_{args.epochs}_epochs.pt"
    if kept.exists():
        model.exit_heads.load_state_dict(torch.load(kept, weights_only=True))
    else:
        stage2_train_exits(model, Batches(train), epochs=args.epochs)
        args.work.mkdir(parents=True, exist_ok=True)
        torch.save(model.exit_heads.state_dict(), kept)
    model.eval()
    if not model.flops_estimate.reliable:
        raise UserError(f"earlyon estimates no FLOPs here: {model.flops_estimate.notes}")
    fit, choose = halves(*whole(held))
    cost = exit_flops(model, layers, base.input_size)
    seen = thresholds.collect_head_logits(
        model, list(zip(images.split(500), labels.split(500), strict=True)), "cpu"
    )
    rows = []
    for drop in DROPS:
        # temperatures do not depend on the setting, and stay with the model
        fitting = {"fit_temperature": not rows, "temperature_loader": fit}
        thresholds.calibrate_thresholds(model, choose, drop, **fitting)
        tested = thresholds.simulate_policy(seen, model)
        shares = [tested.exit_distribution.get(f"exit_{i}", 0.0) for i in range(len(layers))]
        shares = torch.tensor([*shares, tested.exit_distribution.get("final", 0.0)])
        rows.append({
            "setting": f"{drop:.1%} lost",
            "accuracy": tested.accuracy,
            "flops": (shares.double() @ cost).item(),
            "thresholds": list(model.config.confidence_thresholds),
            "enabled": list(model.config.enabled_exits),
            "temperatures": dict(model.config.temperatures),
        })  # fmt: skip
    return model, rows


def ours(args, test: Loader, config) -> list[dict]:
    """Our curve: the same figures at each penalty."""
    rows = []
    for penalty in PENALTIES:
        trained = TrainedModel(argparse.Namespace(**vars(args) | {"penalty": penalty}), config)
        fixed, per_block = trained.flops()
        correct = flops = count = 0.0
        for images, labels, _ in test.epoch(0):
            with torch.inference_mode():
                logits, policy = trained.run(images)
            correct += (logits.argmax(1) == labels).sum().item()
            flops += (fixed + policy.double() @ per_block).sum().item()
            count += len(images)
        rows.append(
            {
                "setting": f"--penalty {penalty:g}",
                "accuracy": correct / count,
                "flops": flops / count,
            }
        )
    return rows


def set_exits(model, row: dict) -> None:
    model.config.confidence_thresholds = row["thresholds"]
    model.config.enabled_exits = row["enabled"]
    model.config.temperatures = row["temperatures"]


def clock(args, config, model, exit_rows: list[dict], test: Loader) -> list[dict]:
    """Milliseconds an image of both at two batch sizes, in turn on the same images."""
    images, _ = whole(test)
    base = TrainedModel(argparse.Namespace(**vars(args) | {"load": None}), config)
    contenders: list[tuple[str, Callable[[int], Callable], Callable]] = []

    def exit_call(row, size):
        set_exits(model, row)
        return partial(model, mode="inference") if size == 1 else model.forward_inference_batched

    plain, deployed = base.resnet, base.deployed()[0]
    contenders.append(("full, plain module", lambda size: plain, None))
    contenders.append(("full, deployed", lambda size: deployed, None))
    for row in exit_rows:
        name = f"early exits, {row['setting']}"
        contenders.append((name, partial(exit_call, row), row))
    for penalty in PENALTIES:
        given = argparse.Namespace(**vars(args) | {"penalty": penalty})
        call = TrainedModel(given, config).deployed()[0]
        contenders.append((f"ours, --penalty {penalty:g}", lambda size, call=call: call, None))
    found = [{"what": name} for name, *_ in contenders]
    for size, count in TIMED.items():
        seconds: list[list[float]] = [[] for _ in contenders]
        for number in range(-3, count):  # some to warm up
            start = max(number, 0) * size % (len(images) - size + 1)
            batch = images[start : start + size].contiguous(memory_format=torch.channels_last)
            for k, (_, prepare, _) in enumerate(contenders):
                call = prepare(size)
                with torch.inference_mode():
                    took = timed(partial(call, batch))
                if number >= 0:
                    seconds[k].append(took)
        for row, taken in zip(found, seconds, strict=True):
            row[f"batch {size}"] = statistics.mean(taken) / size * 1e3
            row[f"batch {size}, median"] = statistics.median(taken) / size * 1e3
    return found


def draw(figures: dict, path: Path) -> None:
    """Ours and the exits, accuracy against FLOPs."""
    from visual.figures import trade_off

    def line(rows: list[dict]) -> list[tuple[float, float]]:
        return [(row["flops"], row["accuracy"]) for row in rows]

    curves = {"one network, six penalties": line(figures["ours"])}
    for where, found in figures.items():
        if "exits" in found:
            curves[f"early exits {where}"] = line(found["exits"])
    with engine.user_errors(path):
        trade_off([], "FLOPs an image", curves).savefig(path, dpi=120)


def cells(who: str, row: dict) -> list[str]:
    return [who, row["setting"], f"{row['accuracy']:.3f}", f"{row['flops']:.2E}"]


def main() -> None:
    args = parse_args()
    process.need("earlyon")
    config = engine.data.config_of(args)
    facts = machine()
    print(json.dumps(facts))
    left_out = argparse.Namespace(**vars(args) | {"val_split": LEFT_OUT})
    train, held = engine.data.load(config, left_out, engine.device.pick("cpu"))
    _, test = engine.data.load(config, args, engine.device.pick("cpu"), training=False)
    figures: dict = {"machine": facts, "ours": ours(args, test, config)}
    rows, made = [cells("ours", row) for row in figures["ours"]], {}
    for where, layers in exit_layers(config.stages).items():
        made[where], found = exits(args, layers, train, held, test, config)
        figures[where] = {"exits": found}
        rows += [cells(where, row) for row in found]
    print(table(["exits", "calibrated for", "accuracy", "FLOPs/img"], rows), flush=True)
    if args.picture:
        draw(figures, args.picture)
    for where, model in made.items() if args.time else ():
        found = clock(args, config, model, figures[where]["exits"], test)
        figures[where]["clock"] = found
        columns = list(found[0])
        lines = [[row["what"], *(f"{row[c]:.3f}" for c in columns[1:])] for row in found]
        print(f"\n{where}, ms an image\n\n{table(columns, lines)}", flush=True)
    if args.json:
        write(figures, args.json)


if __name__ == "__main__":
    engine.run_script(main)
