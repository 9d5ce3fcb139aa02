"""One image at a time: the exported files in ONNX Runtime and OpenVINO, and PyTorch beside them.

    python benchmarks/runtimes.py --model R110_C10 --load cv/R110_C10/stage2
    python benchmarks/runtimes.py --model R110_C10 --load ... --accuracy 10000

The full network is the base ResNet (--base), ConvNet-AIG's own; ours comes with what decides.
`FLOPs allow` is what the speed-up over the full network could at best be. int8 is beside float32:
convolutions with scales from training images.
"""

import copy
import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from measure import (
    add_network_that_decides,
    interleaved,
    machine,
    openvino_network,
    table,
    write,
)

import engine
import models
from deploy import onnx_files
from engine import options, process
from engine.trained import TrainedModel

IMAGES = 64  # whose policies are timed, in turn
OPSET = 17


def parse_args():
    parser = options.parser(__doc__, device="cpu")
    add_network_that_decides(parser)
    add = parser.add_argument
    add("--threads", type=options.count, nargs="+", default=[1, 2])
    add("--repeats", type=options.count, default=30, help="rounds of all contenders")
    add("--budget", type=options.positive, default=120.0, help="seconds a number of threads")
    add("--accuracy", type=options.count, help="also each file's accuracy on the first N images")
    add("--json", type=Path, help="also write the figures to this file")
    parser.set_defaults(policy=None, batch_size=250)
    return parser.parse_args()


def full_of(trained: TrainedModel) -> TrainedModel:
    """The network that runs all its blocks."""
    if trained.config.gated:
        full = copy.copy(trained)
        full.resnet = trained.resnet.resnet
        full.policy = models.StaticPolicy(torch.ones(trained.config.num_blocks))
        return full
    return trained.base()


def files(trained: TrainedModel, train) -> dict[str, bytes]:
    """The four exported files, by name."""
    made = {}
    for name, network in (("full", full_of(trained)), ("ours", trained)):
        networks = network.resnet, network.policy
        model = onnx_files.build(*networks, network.config, OPSET)
        made[f"{name}, float32"] = model.SerializeToString()
        ranges = onnx_files.calibrate(*networks, train)
        model = onnx_files.build(*networks, network.config, OPSET, ranges)
        made[f"{name}, int8"] = model.SerializeToString()
    return made


def deployed(trained: TrainedModel, precision: str, full: bool) -> Callable:
    """PyTorch's call on one normalised image."""
    dtype = engine.device.dtype(precision)
    network, policy = models.deploy(trained.resnet, trained.policy, dtype)
    if full:
        return network.resnet if network.decides else network
    return partial(models.predict, network, policy)


def contenders(made: dict[str, bytes], trained: TrainedModel, arrays, tensors, threads: int):
    """Name -> a call without arguments, which runs the next image."""
    fast = models.capabilities.bf16_onednn()
    calls = {}

    def add(name: str, call: Callable, images) -> None:
        turn = cycle(images)
        calls[name] = lambda: call(next(turn))

    feeds = [{"image": array} for array in arrays]
    for which in ("full", "ours"):
        for precision in ("fp32", "bf16") if fast else ("fp32",):
            title = {"fp32": "float32", "bf16": "bfloat16"}[precision]
            call = deployed(trained, precision, which == "full")
            add(f"PyTorch, deployed | {which}, {title}", call, tensors)
        for arithmetic in ("float32", "int8"):
            content = made[f"{which}, {arithmetic}"]
            run = onnx_files.session(content).run
            add(f"ONNX Runtime | {which}, {arithmetic}", lambda x, run=run: run(None, x), feeds)
            call = openvino_network(content, "f32", threads)
            add(f"OpenVINO | {which}, {arithmetic}", call, feeds)
        if fast:
            call = openvino_network(made[f"{which}, float32"], "bf16", threads)
            add(f"OpenVINO | {which}, bfloat16", call, feeds)
    return calls


def rows_of(seconds: dict[str, float], ratio: float, threads: int) -> list[dict]:
    """One row for a runtime and arithmetic: ours over the full network in the same."""
    rows = []
    for name, full in seconds.items():
        runtime, contender = name.split(" | ")
        which, arithmetic = contender.split(", ")
        if which == "full":
            ours = seconds[f"{runtime} | ours, {arithmetic}"]
            rows.append(
                {
                    "threads": threads,
                    "runtime": runtime,
                    "arithmetic": arithmetic,
                    "full_ms": full * 1e3,
                    "ours_ms": ours * 1e3,
                    "speed_up": full / ours,
                    "flop_ratio": ratio,
                    "efficiency": full / ours / ratio,
                }
            )
    return sorted(rows, key=lambda row: (row["runtime"], row["arithmetic"]))


def flop_ratio(trained: TrainedModel, tensors) -> float:
    """The full network's FLOPs over ours on the timed images, decision included."""
    with torch.no_grad():
        policy = torch.cat([trained.run(x)[1] for x in tensors]).double()
    fixed, per_block = trained.resnet_flops()
    ours = fixed + trained.decision_flops() + (policy @ per_block).mean().item()
    return (fixed + per_block.sum().item()) / ours


def main() -> None:
    args = parse_args()
    process.need("onnx", "onnxruntime", "openvino")
    config = engine.data.config_of(args)
    engine.seed_everything(args.seed)
    trained = TrainedModel(args, config)
    train, test = engine.data.load(config, args, trained.device)
    made = files(trained, train)
    images, _, _ = next(iter(test.epoch(0)))
    count = min(IMAGES, len(images))
    tensors = [images[row : row + 1] for row in range(count)]
    arrays = [test.picture(row)[None] for row in range(count)]
    ratio = flop_ratio(trained, tensors)
    facts = machine()
    print(json.dumps(facts))
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        calls = contenders(made, trained, arrays, tensors, threads)
        rows += rows_of(interleaved(calls, args.repeats, args.budget), ratio, threads)
        print(file=sys.stderr, end=".", flush=True)
    header = ["threads", "runtime", "arithmetic", "full, ms", "ours, ms", "speed-up",
              "FLOPs allow", "quotient"]  # fmt: skip
    print(
        table(
            header,
            [[f"{v:.2f}" if isinstance(v, float) else v for v in row.values()] for row in rows],
        )
    )
    accuracy = {}
    if args.accuracy:
        args.subset = args.accuracy
        _, test = engine.data.load(config, args, trained.device, training=False)
        for name, content in made.items():
            network = full_of(trained) if name.startswith("full") else trained
            found = onnx_files.compare(content, network.resnet, network.policy, test)
            accuracy[name] = found["correct"].double().mean().item()
            blocks = found["policy"].sum(1).mean().item()
            print(f"{name}: accuracy {accuracy[name]:.4f}, {blocks:.2f} blocks")
    if args.json:
        content = {"machine": facts, "rows": rows, "accuracy": accuracy}
        write(content, args.json)


if __name__ == "__main__":
    engine.run_script(main)
