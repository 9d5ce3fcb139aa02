"""How fast dropped blocks are at inference: every contender in one process, medians, one table.

    python benchmarks/inference.py                              17 of 54 blocks, drawn at random
    python benchmarks/inference.py --load cv/x/ckpt.t7          the policies of a checkpoint
    python benchmarks/inference.py --busy 0 1 2                 beside other busy processes
    python benchmarks/inference.py --model R101_ImgNet --keep 24.8 --batch_sizes 1 8 32

`FLOP ratio` is the full network's FLOPs over the contender's: what the speed-up could at best be.
ONNX Runtime and OpenVINO take part where they are installed (requirements-dev.txt).
"""

import contextlib
import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path

import graphs
import numpy as np
import torch
import torchvision
from measure import (
    busy,
    conv_gflops,
    interleaved,
    machine,
    openvino_network,
    random_policies,
    table,
    under,
    write,
)
from torch import nn

import engine
import models
import utils
from engine import options
from engine.trained import TrainedModel, decision_flops

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
# Policies of a batch that are timed in turn. Always the same ones would make each block meet the
# same number of images again, for which its kernels are there.
DRAWS = 64
DEVIATION = 0.98  # of blocks an image, of the paper's policies for ResNet-101


def parse_args():
    parser = options.parser(__doc__)
    add = parser.add_argument
    add("--load", help="checkpoint whose policies and weights to time")
    options.add_base(parser)
    add(
        "--keep",
        type=options.positive,
        default=17,
        help="blocks kept of random policies; a fraction such as 24.8 is a mean, about which they "
        f"deviate by {DEVIATION} as the paper's do",
    )
    add(
        "--busy",
        type=options.amount,
        nargs="+",
        default=[0],
        metavar="N",
        help="time beside so many processes that keep a core busy",
    )
    add("--batch_sizes", type=options.count, nargs="+", default=[1, 8, 32, 64, 256, 1024])
    add("--precisions", choices=DTYPES, nargs="+", default=["fp32", "bf16"])
    add("--repeats", type=options.count, default=30, help="rounds of all contenders")
    add("--budget", type=options.positive, default=60.0, help="seconds a batch size and precision")
    add("--only", default="", metavar="WORD", help="contenders with this in their name alone")
    add("--no_compile", action="store_true", help="leave torch.compile out")
    add("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


class Plain(nn.Module):
    """The full network alone, for exporters that cannot pass over the policy argument."""

    def __init__(self, resnet: nn.Module):
        super().__init__()
        self.resnet = resnet

    def forward(self, x):
        return self.resnet(x)


def other_runtimes(resnet: nn.Module, x: torch.Tensor) -> dict:
    """The full network, exported, in ONNX Runtime and OpenVINO where they are installed."""
    calls = {}
    x = x.cpu().contiguous()
    export = None
    for name, start in (("ONNX Runtime", onnx_session), ("OpenVINO", openvino_call)):
        with contextlib.suppress(ImportError):
            if export is None:
                plain = Plain(copy.deepcopy(resnet)).cpu().eval()
                export = torch.onnx.export(plain, (x,), dynamo=True, verbose=False)
                content = export.model_proto.SerializeToString()
            calls[f"full, {name}"] = start(content, x.numpy())
    return calls


def onnx_session(content: bytes, x: np.ndarray):
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x}
    return lambda: session.run(None, feed)


def openvino_call(content: bytes, x: np.ndarray):
    run = openvino_network(content, "f32", torch.get_num_threads())
    return lambda: run([x])


def torchvision_contenders(name: str, x: torch.Tensor, autocast, compiled: bool) -> dict:
    """torchvision's own ResNet of this depth, as it is and compiled with its weights frozen."""
    net = {"R50_ImgNet": torchvision.models.resnet50, "R101_ImgNet": torchvision.models.resnet101}
    if name not in net:
        return {}
    plain = engine.device.place(net[name](), x.device).eval()

    def call(run):
        with torch.no_grad(), autocast():
            return run(x)

    calls = {"full, torchvision": partial(call, plain)}
    if compiled:
        frozen = torch.compile(plain, options={"freezing": True})
        calls["full, torchvision, compiled and frozen"] = partial(call, frozen)
    return calls


class Steered:
    """A deployed gate that runs as ever and then says what it is told, in order of the batch."""

    def __init__(self, gate, columns: Iterator[torch.Tensor]):
        self.gate, self.columns, self.rest = gate, columns, ()

    def __call__(self, x):
        self.gate(x)
        if len(self.rest) == 0:
            self.rest = next(self.columns)
        told, self.rest = self.rest[: len(x)], self.rest[len(x) :]
        return told


def gated_contenders(net, x, policies, precision) -> dict:
    """ConvNet-AIG's, its gates steered to the policies of `contenders`."""
    net.always_on = frozenset()
    fast, _ = models.deploy(net, None, DTYPES[precision])
    fast.gates = [
        Steered(gate, cycle(policies[..., k].bool())) for k, gate in enumerate(fast.gates)
    ]
    autocast = partial(engine.device.autocast, x.device, precision)

    def eager():
        with torch.no_grad(), autocast():
            return net.resnet(x)

    return {
        "full, eager": eager,
        "full, deployed": lambda: fast.resnet(x),
        "ours, deployed, with gates": lambda: fast(x),
    }


def contenders(resnet, policy, x, policies, precision, args) -> dict:
    """Name -> a call without arguments, for one batch in one precision.

    policies: (D, B, K), see `measure.under`.
    """
    dtype = DTYPES[precision]
    fast, fast_policy = models.deploy(resnet, policy, dtype)
    autocast = partial(engine.device.autocast, x.device, precision)

    def eager(execution):
        def run(x, policy):
            resnet.execution = execution
            with torch.no_grad(), autocast():
                return resnet(x, policy)

        return run

    calls = {
        "full, eager": lambda: eager("sparse")(x, None),
        "full, deployed": lambda: fast(x),
        "full, deployed, all threads": torch.inference_mode()(lambda: fast.part(x)),
        "masked, eager": under(policies, eager("masked"), x),
        "ours, eager": under(policies, eager("sparse"), x),
        "ours, deployed": under(policies, fast, x),
    }
    if fast_policy is not None:
        calls["ours, deployed, with policy net"] = under(policies, fast, x, fast_policy)
    if not args.no_compile:
        compiled = torch.compile(Plain(resnet))

        def compiled_call():
            with torch.no_grad(), autocast():
                return compiled(x)

        calls["full, torch.compile"] = compiled_call
    if x.device.type == "cuda":
        calls |= graphs.contenders(fast, fast_policy, x, policies)
    if dtype == torch.float32 and x.device.type == "cpu":
        calls |= other_runtimes(resnet, x)
    return calls | torchvision_contenders(args.model, x, autocast, not args.no_compile)


def rows_of(resnet, policy, config, policies, x, precision, args) -> list[dict]:
    """Time one batch in one precision; one row a contender and number of busy processes."""
    if config.gated:
        calls = gated_contenders(resnet, x, policies, precision)
    else:
        calls = contenders(resnet, policy, x, policies, precision, args)
    calls = {name: call for name, call in calls.items() if args.only in name}
    if "full, deployed" not in calls:
        raise engine.UserError(f"--only {args.only} leaves nothing to compare with: try deployed")
    size = (3, config.image_size, config.image_size)
    fixed, per_block = utils.block_flops(resnet.resnet if config.gated else resnet, size)
    full = fixed + per_block.sum().item()
    kept = fixed + (policies.cpu().double() @ per_block).mean().item()
    # masked execution leaves out the blocks that no image of a batch keeps
    masked = fixed + (policies.cpu().amax(1).double() @ per_block).mean().item()
    decision = decision_flops(resnet, policy, size)
    gflops = None if config.has_pictures else conv_gflops(len(x), DTYPES[precision], x.device)
    rows = []
    for processes in args.busy:
        with busy(processes):
            seconds = interleaved(calls, args.repeats, args.budget)
        best_full = min(s for name, s in seconds.items() if name.startswith("full"))
        # the better of a part a thread and all threads a kernel
        deployed = min(s for name, s in seconds.items() if name.startswith("full, deployed"))
        for name, value in seconds.items():
            flops = kept if "ours" in name else masked if "masked" in name else full
            flops += decision if "with" in name else 0
            reference = deployed if "deployed" in name else seconds.get("full, eager", best_full)
            rows.append(
                {
                    "busy": processes,
                    "precision": precision,
                    "batch": len(x),
                    "contender": name,
                    "ms": value * 1e3,
                    "speed_up": reference / value,
                    "flop_ratio": full / flops,
                    "efficiency": reference / value / (full / flops),
                    "over_fastest_full": best_full / value,
                    "gflops": flops * len(x) / value / 1e9,
                    "conv_gflops": gflops,
                }
            )
    return rows


def main() -> None:
    args = parse_args()
    with engine.user_errors():  # random policies need no data
        config = engine.data.config_of(args) if args.load else models.config(args.model)
    if not args.load:
        config = replace(config, image_size=args.image_size or config.image_size)
        if args.keep > config.num_blocks:
            raise engine.UserError(
                f"--keep {args.keep:g}: {args.model} has {config.num_blocks} blocks"
            )
    device = engine.device.pick(args.device)
    engine.device.keep_freed_memory()
    torch.manual_seed(args.seed)
    resnet, policy_net = models.build(args.model)
    policy = policy_net and models.GreedyPolicy(policy_net)
    if args.load:
        args.policy = args.penalty = None
        trained = TrainedModel(args, config)
        resnet, policy = trained.resnet, trained.policy if trained.looks else None
        args.batch_size = max(args.batch_sizes)
        _, test = engine.data.load(config, args, device, training=False)
        images, _, _ = next(iter(test.epoch(0)))
        with torch.no_grad():
            pool = trained.run(images)[1]
    for network in filter(None, (resnet, policy)):
        engine.device.place(network, device).eval()
    facts = machine()
    print(json.dumps(facts))
    rows = []
    for precision in args.precisions:
        engine.device.set_up(precision)
        for batch in args.batch_sizes:
            if args.load:
                x = images[:batch]
                drawn = torch.randint(len(pool), (DRAWS, len(x)), device=device)
                policies = pool[drawn]
            else:
                x = torch.randn(batch, 3, config.image_size, config.image_size, device=device)
                x = x.contiguous(memory_format=torch.channels_last)
                deviation = 0 if args.keep == int(args.keep) else DEVIATION
                number = DRAWS * batch
                policies = random_policies(number, config.num_blocks, args.keep, device, deviation)
                policies = policies.unflatten(0, (DRAWS, batch))
            torch.compiler.reset()
            rows += rows_of(resnet, policy, config, policies, x, precision, args)
            print(file=sys.stderr, end=".", flush=True)
    header = [
        "busy", "precision", "batch", "contender", "ms", "speed-up over the same full",
        "FLOP ratio", "speed-up / FLOP ratio", "over the fastest full", "GFLOP/s",
        "of the convolutions' best",
    ]  # fmt: skip
    print()
    print(
        table(
            header,
            [
                [
                    r["busy"], r["precision"], r["batch"], r["contender"], f"{r['ms']:.2f}",
                    f"{r['speed_up']:.2f}", f"{r['flop_ratio']:.2f}", f"{r['efficiency']:.2f}",
                    f"{r['over_fastest_full']:.2f}", f"{r['gflops']:.0f}",
                    f"{r['gflops'] / r['conv_gflops']:.2f}" if r["conv_gflops"] else "",
                ]
                for r in rows
            ],
        )
    )  # fmt: skip
    if args.json:
        write({"machine": facts, "rows": rows}, args.json)


if __name__ == "__main__":
    engine.run_script(main)
