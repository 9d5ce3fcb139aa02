"""What torch.compile, torch.export, AOTInductor and ExecuTorch make of block dropping.

    python benchmarks/compilers.py --model R32_C10 --load cv/R32_C10/stage2
    python benchmarks/compilers.py --model R32_C10 --load ... --cases sparse cond

Each case runs in a process of its own, without what an earlier one compiled. Logits are compared
with the plain network's, and times are of contenders in turn.
"""

import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measure import (
    add_network_that_decides,
    environment,
    interleaved,
    machine,
    random_policies,
    table,
    write,
)
from torch import Tensor, nn
from torch.nn import functional as F

import engine
from deploy import deploy
from engine import options
from engine.trained import TrainedModel

POLICIES = 8  # that a network is called with, one after the other
CHECKED = 4  # of them, for logits


def parse_args():
    parser = options.parser(__doc__, device="cpu")
    add_network_that_decides(parser)
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES), help="what to try")
    add("--seconds", type=options.positive, default=20.0, help="for each timed comparison")
    add("--json", type=Path, help="also write the figures to this file")
    add("--work", type=Path, default=Path("cv/compilers"), help="where ExecuTorch is")
    add("--report", type=Path, help="what a process of its own is called with; not for users")
    parser.set_defaults(policy=None)
    return parser.parse_args()


class Conditional(nn.Module):
    """A ResNet for one image whose blocks are each a torch.cond, for exporters.

    clone: whether a dropped block without a projection returns a copy of its input.
    """

    def __init__(self, resnet: nn.Module, clone: bool = True):
        super().__init__()
        self.resnet, self.clone = resnet, clone
        branches, shortcuts = zip(*resnet.units(), strict=True)
        self.branches, self.shortcuts = nn.ModuleList(branches), nn.ModuleList(shortcuts)

    def forward(self, x: Tensor, policy: Tensor) -> Tensor:
        x = self.resnet.stem(x)
        for k, (branch, shortcut) in enumerate(zip(self.branches, self.shortcuts, strict=True)):

            def kept(x: Tensor, branch=branch, shortcut=shortcut) -> Tensor:
                return F.relu(branch(x) + shortcut(x))

            def dropped(x: Tensor, shortcut=shortcut) -> Tensor:
                is_identity = isinstance(shortcut, nn.Identity)
                return x.clone() if is_identity and self.clone else shortcut(x)

            x = torch.cond(policy[0, k] > 0.5, kept, dropped, (x,))
        return self.resnet.head(x)


def difference(call: Callable, resnet: nn.Module, x: Tensor, policies: Tensor) -> float:
    """The largest difference of logits over policies (D, B, K), relative to the largest logit."""
    found = 0.0
    for policy in policies[:CHECKED]:
        expected = resnet(x, policy)
        error = (call(x, policy) - expected).abs().max() / expected.abs().max()
        found = max(found, error.item())
    return found


def took(call: Callable) -> tuple[object, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def under(policies: Tensor, call: Callable, x: Tensor) -> Callable:
    """A call without arguments that runs x under all policies."""

    def run():
        for policy in policies:
            call(x, policy)

    return run


class Subject:
    """The network, images and policies that all cases look at."""

    def __init__(self, args):
        config = engine.data.config_of(args)
        engine.seed_everything(args.seed)
        self.args, self.config = args, config
        self.resnet = TrainedModel(args, config).plain.eval()
        self.size = config.image_size

    def batch(self, images: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and policies (D, B, K) that keep half of the blocks."""
        x = torch.randn(images, 3, self.size, self.size)
        half = self.config.num_blocks // 2
        drawn = [random_policies(images, self.config.num_blocks, half, x.device)
                 for _ in range(POLICIES)]  # fmt: skip
        return x, torch.stack(drawn)

    def ratios(self, contenders: dict[str, Callable], reference: str) -> dict[str, float]:
        """Seconds of each, and how many times as fast as the reference it is."""
        seconds = interleaved(contenders, 50, self.args.seconds)
        return {f"{n} over {reference}": seconds[reference] / s for n, s in seconds.items()}


@torch.no_grad()
def compiled(subject: Subject, execution: str) -> dict:
    """torch.compile of the ResNet under policies, at batch 8."""
    x, policies = subject.batch(8)
    subject.resnet.execution = execution
    other = TrainedModel(subject.args, subject.config).plain.eval()
    # a graph for each size of a block's part of the batch: beyond the limit it would fall back
    torch._dynamo.config.recompile_limit = 10_000
    torch._dynamo.config.accumulated_recompile_limit = 10_000
    call = torch.compile(subject.resnet)
    _, seconds = took(lambda: [call(x, policy) for policy in policies])
    compare = {"eager sparse": other, execution + " compiled": call}
    return {
        "seconds to compile": seconds,
        "logits differ by": difference(call, other, x, policies),
        **subject.ratios({n: under(policies, c, x) for n, c in compare.items()}, "eager sparse"),
    }


@torch.no_grad()
def full(subject: Subject) -> dict:
    """The full network plain, deployed, compiled and by AOTInductor, frozen, at batch 1."""
    import torch._inductor.config as inductor

    x, _ = subject.batch(1)
    resnet = subject.resnet
    inductor.freezing = True
    call = torch.compile(resnet)
    _, seconds = took(lambda: call(x))
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "full.pt2"
        program = torch.export.export(resnet, (x,))
        _, packed = took(
            lambda: torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        )
        ahead = torch._inductor.aoti_load_package(str(package))
        calls = {"deployed": deploy(resnet)[0], "plain": resnet, "compiled": call, "AOT": ahead}
        expected = resnet(x)
        worst = max(((c(x) - expected).abs().max() / expected.abs().max()).item()
                    for c in calls.values())  # fmt: skip
        return {
            "seconds to compile": seconds,
            "seconds to package": packed,
            "logits differ by": worst,
            **subject.ratios({n: partial(c, x) for n, c in calls.items()}, "deployed"),
        }


@torch.no_grad()
def cond(
    subject: Subject,
    layout: bool = True,
    clone: bool = True,
    memory: torch.memory_format = torch.contiguous_format,
) -> dict:
    """A torch.cond a block: exported, then packed by AOTInductor, batch 1.

    layout: AOTInductor's `layout_optimization`, on by default. memory: of weights and image.
    """
    import torch._inductor.config as inductor

    inductor.layout_optimization = layout
    x, policies = subject.batch(1)
    x = x.contiguous(memory_format=memory)
    net = Conditional(subject.resnet, clone).eval().to(memory_format=memory)
    program, seconds = took(lambda: torch.export.export(net, (x, policies[0])))
    found = {
        "seconds to export": seconds,
        "exported differs by": difference(program.module(), subject.resnet, x, policies),
    }
    with tempfile.TemporaryDirectory() as folder:
        package = str(Path(folder) / "cond.pt2")
        pack = partial(torch._inductor.aoti_compile_and_package, program, package_path=package)
        _, found["seconds to package"] = took(pack)
        call = torch._inductor.aoti_load_package(package)
        found["package differs by"] = difference(call, subject.resnet, x, policies)
        calls = {"package": call, "deployed": deploy(subject.resnet)[0]}
        timed = {n: under(policies, c, x) for n, c in calls.items()}
        found |= subject.ratios(timed, "deployed")
    return found


def autograd(subject: Subject) -> dict:
    """Gradients through a torch.cond a block, in evaluation and in training mode."""
    x, policies = subject.batch(1)
    net, parameters = Conditional(subject.resnet), list(subject.resnet.parameters())
    expected = torch.autograd.grad(
        subject.resnet(x, policies[0]).sum(), parameters, allow_unused=True
    )
    given = torch.autograd.grad(net(x, policies[0]).sum(), parameters, allow_unused=True)
    pairs = [(a, b) for a, b in zip(expected, given, strict=True) if a is not None]
    worst = max(((a - b).norm() / (a.norm() + 1e-12)).item() for a, b in pairs)
    found: dict = {"gradients in evaluation mode differ by": worst}
    x, policies = subject.batch(2)
    try:
        net.train()(x, policies[0]).sum().backward()
        found["in training mode"] = "runs"
    except Exception as error:  # torch raises anything at all
        found["in training mode"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return found


class Chain(nn.Module):
    """`length` torch.conds in a row on one tensor: the smallest program of this kind."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def forward(self, x: Tensor, policy: Tensor) -> Tensor:
        for k in range(self.length):
            x = torch.cond(policy[k] > 0.5, lambda x: 2 * x + 1, lambda x: x.clone(), (x,))
        return x


@torch.no_grad()
def executorch(_: Subject) -> dict:
    """Chains of conds in ExecuTorch's portable runtime."""
    from executorch.exir import to_edge
    from executorch.runtime import Runtime

    found = {}
    for length in (1, 2, 3):
        net, x = Chain(length), torch.ones(2)
        program = torch.export.export(net, (x, torch.ones(length)))
        method = to_edge(program).to_executorch()
        run = Runtime.get().load_program(method.buffer).load_method("forward")
        wrong = 0
        for number in range(2**length):
            policy = torch.tensor([float(number >> k & 1) for k in range(length)])
            wrong += not torch.equal(run.execute((x, policy))[0], net(x, policy))
        found[f"{length} in a row, wrong"] = f"{wrong} of {2**length} policies"
    return found


CASES: dict[str, Callable[[Subject], dict]] = {
    "sparse": partial(compiled, execution="sparse"),
    "masked": partial(compiled, execution="masked"),
    "full": full,
    "cond": cond,
    "cond_layout_off": partial(cond, layout=False),
    "cond_channels_last": partial(cond, memory=torch.channels_last),
    "cond_without_clone": partial(cond, layout=False, clone=False),
    "autograd": autograd,
    "executorch": executorch,
}

PACKAGES = {"executorch": ("executorch==1.5.1",)}


def outcome(name: str, args) -> dict:
    """What a case gives, in a process and with a cache of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        asked = ["--cases", name, "--report", file, "--seconds", args.seconds]
        asked += ["--model", args.model, "--load", args.load]
        python = environment(PACKAGES.get(name, ()), args.work)
        words = [str(word) for word in (python, Path(__file__), *asked)]
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        done = subprocess.run(words, capture_output=True, text=True, env=env)
        if file.exists():
            return json.loads(file.read_text())
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"[\w.]*Error", line)]
        return {"fails": (errors or lines or ["no word"])[-1][:200]}


def main() -> None:
    args = parse_args()
    if args.report:
        return write(CASES[args.cases[0]](Subject(args)), args.report)
    facts = machine()
    print(json.dumps(facts))
    figures: dict = {"machine": facts}
    for name in args.cases:
        figures[name] = found = outcome(name, args)
        cells = [[k, f"{v:.2G}" if isinstance(v, float) else v] for k, v in found.items()]
        print(f"\n{name}\n\n{table(['what', 'value'], cells)}", flush=True)
    if args.json:
        write(figures, args.json)


if __name__ == "__main__":
    engine.run_script(main)
