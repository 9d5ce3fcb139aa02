"""What FLOP counters report of our networks, over what these compute.

    python benchmarks/counters.py --model R32_C10 --load cv/R32_C10/stage2
    python benchmarks/counters.py --model R32_C10 --load ... --tools fvcore thop

Each tool gets an environment of its own with pinned packages, below --work, over the packages that
run this, and a process of its own. What our networks compute is counted as in test.py: 2 FLOPs a
multiply-add of convolutions and linear layers, nothing else.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import (
    add_network_that_decides,
    environment,
    machine,
    random_policies,
    table,
    write,
)
from torch import Tensor, nn

import engine
from deploy import deploy
from deploy.classifier import Classifier
from engine import UserError, options
from engine.trained import TrainedModel

BATCH = 8


@dataclass(frozen=True)
class Counter:
    """A row: count(network, inputs) gives what the tool reports."""

    title: str
    count: Callable[[nn.Module, Sequence[Tensor]], float]
    packages: tuple[str, ...] = ()


def by_torch(network: nn.Module, inputs: Sequence[Tensor]) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        network(*inputs)
    return counter.get_total_flops()


def by_profiler(network: nn.Module, inputs: Sequence[Tensor]) -> float:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        network(*inputs)
    return sum(event.flops for event in profiler.key_averages())


def by_fvcore(network: nn.Module, inputs: Sequence[Tensor]) -> float:
    from fvcore.nn import FlopCountAnalysis

    return FlopCountAnalysis(network, tuple(inputs)).total()


def by_thop(network: nn.Module, inputs: Sequence[Tensor]) -> float:
    from thop import profile

    return profile(network, tuple(inputs), verbose=False)[0]


def by_ptflops(backend: str) -> Callable[[nn.Module, Sequence[Tensor]], float]:
    def count(network: nn.Module, inputs: Sequence[Tensor]) -> float:
        from ptflops import get_model_complexity_info

        names = ("x", "policy")[: len(inputs)]
        counted, _ = get_model_complexity_info(
            network,
            tuple(inputs[0].shape[1:]),
            input_constructor=lambda _: dict(zip(names, inputs, strict=True)),
            as_strings=False,
            print_per_layer_stat=False,
            backend=backend,
        )
        return counted

    return count


def by_torchinfo(network: nn.Module, inputs: Sequence[Tensor]) -> float:
    from torchinfo import summary

    return summary(network, input_data=list(inputs), verbose=0).total_mult_adds


def by_calflops(network: nn.Module, inputs: Sequence[Tensor]) -> float:
    from calflops import calculate_flops

    return calculate_flops(network, args=list(inputs), print_results=False, output_as_string=False)[
        0
    ]


def by_deepspeed(network: nn.Module, inputs: Sequence[Tensor]) -> float:
    from deepspeed.profiling.flops_profiler import get_model_profile

    return get_model_profile(
        network, args=list(inputs), print_profile=False, as_string=False, warm_up=0
    )[0]


def by_torchprofile(network: nn.Module, inputs: Sequence[Tensor]) -> float:
    from torchprofile import profile_macs

    return profile_macs(network, tuple(inputs))


COUNTERS = {
    "torch": Counter("torch.utils.flop_counter", by_torch),
    "profiler": Counter("torch.profiler", by_profiler),
    "fvcore": Counter("fvcore", by_fvcore, ("fvcore==0.1.5.post20221221",)),
    "thop": Counter("thop", by_thop, ("thop==0.1.1.post2209072238",)),
    "ptflops": Counter("ptflops, pytorch", by_ptflops("pytorch"), ("ptflops==0.7.5",)),
    "ptflops_aten": Counter("ptflops, aten", by_ptflops("aten"), ("ptflops==0.7.5",)),
    "torchinfo": Counter("torchinfo", by_torchinfo, ("torchinfo==1.8.0",)),
    "calflops": Counter("calflops", by_calflops, ("calflops==0.3.2", "transformers==4.57.1")),
    "deepspeed": Counter("DeepSpeed", by_deepspeed, ("deepspeed==0.19.8",)),
    "torchprofile": Counter("torchprofile", by_torchprofile, ("torchprofile==0.1.0",)),
}


def parse_args():
    parser = options.parser(__doc__, device="cpu")
    add_network_that_decides(parser)
    add = parser.add_argument
    add("--tools", nargs="+", choices=COUNTERS, default=list(COUNTERS), help="which counters")
    add("--work", type=Path, default=Path("cv/counters"), help="where the packages are")
    add("--json", type=Path, help="also write the figures to this file")
    add("--report", type=Path, help="what a process of its own is called with; not for users")
    parser.set_defaults(policy=None)
    return parser.parse_args()


def cases(args) -> dict[str, Callable[[], tuple[nn.Module, list[Tensor], float]]]:
    """By name what makes a network, its inputs, and the FLOPs that it computes on these."""
    config = engine.data.config_of(args)
    engine.seed_everything(args.seed)
    x = torch.randn(BATCH, 3, config.image_size, config.image_size)
    policies = random_policies(BATCH, config.num_blocks, config.num_blocks // 2, x.device)

    def resnet(execution: str = "sparse"):
        trained = TrainedModel(args, config)
        trained.plain.execution = execution
        return trained.plain.eval(), *trained.resnet_flops()

    def full():
        network, fixed, per_block = resnet()
        return network, [x[:1]], fixed + per_block.sum()

    def under_policies(execution: str, images: int):
        network, fixed, per_block = resnet(execution)
        kept = policies[:images].double()
        if execution == "masked":  # what one image of the batch keeps is computed for all
            kept = kept.amax(0).expand(images, -1)
        return network, [x[:images], policies[:images]], (fixed + kept @ per_block).sum()

    def twin():
        network, fixed, per_block = resnet()
        flops = (fixed + policies.double() @ per_block).sum()
        return deploy(network)[0], [x, policies], flops

    def hub():
        trained = TrainedModel(args, config)
        network = Classifier(trained.resnet, trained.policy, config).eval()
        image = x[:1].sigmoid()
        fixed, per_block = trained.flops()
        flops = (fixed + network.policy(image).double() @ per_block).sum()
        return network, [image], flops

    return {
        "full": full,
        "sparse, 1 image": lambda: under_policies("sparse", 1),
        f"sparse, {BATCH} images": lambda: under_policies("sparse", BATCH),
        f"masked, {BATCH} images": lambda: under_policies("masked", BATCH),
        f"deployed, {BATCH} images": twin,
        "as torch.hub has it, 1 image": hub,
    }


def report(args) -> None:
    """Count all networks by the one tool that is asked for; written to `--report`."""
    count = COUNTERS[args.tools[0]].count
    found = {}
    for name, make in cases(args).items():
        network, inputs, flops = make()
        try:
            with torch.no_grad():
                found[name] = float(count(network, inputs)) / float(flops)
        except Exception as error:  # a tool raises anything at all
            found[name] = f"{type(error).__name__}: {error}"
    write(found, args.report)


def outcome(name: str, args) -> dict[str, float | str]:
    """What a tool reports over what was computed, or how it fails, by case."""
    python = environment(COUNTERS[name].packages, args.work)
    args.work.mkdir(parents=True, exist_ok=True)
    file = (args.work / f"{name}.json").absolute()
    file.unlink(missing_ok=True)
    asked = ["--tools", name, "--report", file, "--model", args.model, "--load", args.load]
    command = [str(word) for word in (python, Path(__file__), *asked)]
    done = subprocess.run(command, capture_output=True, text=True)
    if not file.exists():
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"full": f"the process ended by {done.returncode}: {last}"}
    return json.loads(file.read_text())


def shown(value: float | str | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else "raises"


def main() -> None:
    args = parse_args()
    if args.report:
        return report(args)
    facts = machine()
    print(json.dumps(facts))
    rows, figures = [], {}
    for name in args.tools:
        counter = COUNTERS[name]
        try:
            found = outcome(name, args)
        except subprocess.CalledProcessError as error:
            raise UserError(f"{counter.title} does not install: {error}") from None
        figures[counter.title] = {"packages": counter.packages, "found": found}
        version = counter.packages[0].partition("==")[2] if counter.packages else torch.__version__
        rows.append([counter.title, version, *map(shown, found.values())])
        columns = ["tool", "version", *found]
        for case, value in found.items():
            if isinstance(value, str):
                print(f"{counter.title}, {case}: {value.splitlines()[0][:200]}", file=sys.stderr)
    print(table(columns, rows))
    if args.json:
        write({"machine": facts, "rows": figures}, args.json)


if __name__ == "__main__":
    engine.run_script(main)
