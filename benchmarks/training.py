"""What a training step costs when dropped blocks are computed and masked, and when they are not.

    python benchmarks/training.py               one step of each stage: images/s, memory, parts
    python benchmarks/training.py --curriculum  stage 1 at every step of the curriculum
    python benchmarks/training.py --optimizers  the same step, its optimizer foreach and fused

The policy network runs and learns as ever, but its answer is replaced by policies that keep
`--keep` blocks drawn at random for each image, so that both contenders do the same work. Memory is
the peak, on a CPU what is resident in a process of its own, on a GPU what is allocated.
"""

import argparse
import importlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from measure import interleaved, machine, random_policies, table, timed, write
from torch import nn

import engine
import models
import utils
from engine import options

CONTENDERS = ("masked", "sparse")
STEPS = {"stage 1": ("cl_training", 2048), "stage 2": ("finetune", 256)}


def parse_args():
    parser = options.parser(__doc__)
    add = parser.add_argument
    add("--keep", type=options.count, default=18, help="blocks kept")
    add("--batch_sizes", type=options.count, nargs=2, default=[2048, 256], help="stage 1, stage 2")
    add("--repeats", type=options.count, default=5, help="rounds")
    add("--curriculum", action="store_true", help="time stage 1 at each step of the curriculum")
    add("--optimizers", action="store_true", help="compare forms of the optimizer's step")
    add("--json", type=Path, help="also write the figures to this file")
    add("--peak", nargs=2, metavar=("STAGE", "CONTENDER"), help="only print one step's peak memory")
    return parser.parse_args()


class Clock(nn.Module):
    """A module, or another callable, whose calls are timed."""

    def __init__(self, module):
        super().__init__()
        self.module, self.seconds = module, 0.0

    def forward(self, *inputs):
        outputs = []
        self.seconds += timed(lambda: outputs.append(self.module(*inputs)))
        return outputs[0]


class Steered(nn.Module):
    """A policy network that runs as ever and then says what it is told, gradients included."""

    def __init__(self, policy_net: nn.Module, policies: torch.Tensor):
        super().__init__()
        self.policy_net, self.certain = policy_net, 0.01 + 0.98 * policies

    def forward(self, x):
        probs, value = self.policy_net(x)
        return self.certain + 1e-3 * (probs - 0.5), value


class OneByOne(nn.Module):
    """A ResNet that takes several policies in as many passes, as the released code does."""

    def __init__(self, resnet: nn.Module):
        super().__init__()
        self.resnet = resnet

    def forward(self, x, policies):
        return torch.stack([self.resnet(x, policy) for policy in policies])


def training_step(
    args, config, stage: str, contender: str, batch: int, cl_step: int, **of_optimizer
):
    """A call that trains one batch, and the clocks of its two networks and of its optimizer."""
    script = importlib.import_module(STEPS[stage][0])
    device = engine.device.pick(args.device)
    torch.manual_seed(args.seed)
    resnet, policy_net = models.build(args.model)
    for network in (resnet, policy_net):
        engine.device.place(network, device).train()
    resnet.execution = contender
    shard = engine.Shard(0, batch, batch)
    settings = argparse.Namespace(alpha=1.0, beta=0.1, penalty=-5.0, samples=1)
    policies = random_policies(batch, config.num_blocks, args.keep, device)
    policy_clock = Clock(Steered(policy_net, policies))
    parameters = list(policy_net.parameters())
    if stage == "stage 1":
        resnet.requires_grad_(False).eval()
        mask = utils.curriculum_mask(config.num_blocks, cl_step, device)
        dtype = engine.device.dtype(args.precision)
        runner = (
            OneByOne(resnet) if contender == "masked" else models.deploy(resnet, dtype=dtype)[0]
        )
        resnet_clock = Clock(runner)
        step = partial(script.train_step, policy_clock, resnet_clock, mask=mask, args=settings)
    else:
        parameters += resnet.parameters()
        resnet_clock = Clock(resnet)
        step = partial(script.train_step, policy_clock, resnet_clock, args=settings)
    optimizer = torch.optim.Adam(parameters, lr=1e-4, **of_optimizer)
    x = torch.randn(batch, 3, config.image_size, config.image_size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, config.num_classes, (batch,), device=device)

    def call():
        with engine.device.autocast(device, args.precision):
            loss, _ = step(x, y, shard)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        update()

    update = Clock(optimizer.step)
    return call, (policy_clock, resnet_clock, update)


def print_peak(args, config, stage: str, contender: str) -> None:
    """Peak memory of two training steps, and of the process before them, in MiB."""
    batch = dict(zip(STEPS, args.batch_sizes, strict=True))[stage]
    call, _ = training_step(args, config, stage, contender, batch, config.num_blocks)
    before = peak_memory()
    call(), call()
    print(json.dumps({"peak": peak_memory(), "before": before}))


def peak_memory() -> float:
    """Peak MiB of this process so far, resident (Linux)."""
    # not getrusage, whose peak a child process takes over from its parent
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM"))


def measured_peak(args, stage: str, contender: str) -> dict:
    command = [sys.executable, __file__, "--peak", stage, contender, "--model", args.model]
    command += ["--keep", str(args.keep), "--precision", args.precision]
    command += ["--batch_sizes", *map(str, args.batch_sizes)]
    command += ["--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def peak_on_gpu(call) -> dict:
    """The same of one step on a GPU, which can count anew: MiB allocated."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return {"peak": torch.cuda.max_memory_allocated() / 2**20, "before": before / 2**20}


def compare_steps(args, config) -> list[dict]:
    """Both stages, both contenders: images per second, peak memory and where the time goes."""
    rows = []
    for (stage, _), batch in zip(STEPS.items(), args.batch_sizes, strict=True):
        made = {
            name: training_step(args, config, stage, name, batch, config.num_blocks)
            for name in CONTENDERS
        }
        seconds = interleaved({n: call for n, (call, _) in made.items()}, args.repeats, 1e9)
        for name, (call, clocks) in made.items():
            for clock in clocks:
                clock.seconds = 0.0
            call()
            policy, resnet, _ = (clock.seconds for clock in clocks)
            on_gpu = engine.device.pick(args.device).type == "cuda"
            memory = peak_on_gpu(call) if on_gpu else measured_peak(args, stage, name)
            rows.append(
                {
                    "stage": stage,
                    "batch": batch,
                    "contender": name,
                    "seconds": seconds[name],
                    "images_per_second": batch / seconds[name],
                    "over_masked": seconds["masked"] / seconds[name],
                    "peak_mib": memory["peak"],
                    "step_mib": memory["peak"] - memory["before"],
                    "policy_forward": policy,
                    "resnet_forward": resnet,
                    "backward_and_update": seconds[name] - policy - resnet,
                }
            )
    return rows


def compare_curriculum(args, config) -> list[dict]:
    """Stage 1 at every step of the curriculum, in turn masked and not."""
    rows = []
    for cl_step in range(1, config.num_blocks + 1):
        calls = {
            name: training_step(args, config, "stage 1", name, args.batch_sizes[0], cl_step)[0]
            for name in CONTENDERS
        }
        for call in calls.values():
            call()
        seconds = {name: timed(call) for name, call in calls.items()}
        rows.append({"cl_step": cl_step, **seconds})
        print(f"{cl_step} {seconds['masked'] / seconds['sparse']:.2f}", file=sys.stderr)
    return rows


# on a CPU torch steps tensor by tensor unless told otherwise
FORMS = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def compare_optimizers(args, config) -> list[dict]:
    """A step of each stage, in turn with each form of Adam's step: seconds, and those of it."""
    rows = []
    for (stage, _), batch in zip(STEPS.items(), args.batch_sizes, strict=True):
        made = {
            form: training_step(args, config, stage, "sparse", batch, config.num_blocks, **given)
            for form, given in FORMS.items()
        }
        seconds = interleaved({n: call for n, (call, _) in made.items()}, args.repeats, 1e9)
        for form, (call, (*_, update)) in made.items():
            update.seconds = 0.0
            for _ in range(args.repeats):
                call()
            gain = seconds["default"] / seconds[form]
            alone = update.seconds / args.repeats
            rows.append({"stage": stage, "batch": batch, "form": form, "seconds": seconds[form],
                         "over_default": gain, "update_seconds": alone})  # fmt: skip
    return rows


def main() -> None:
    args = parse_args()
    with engine.user_errors():
        config = models.config(args.model, gated=False)  # no data are looked at
    engine.device.keep_freed_memory()
    engine.device.set_up(args.precision)
    if args.peak:
        return print_peak(args, config, *args.peak)
    facts = machine()
    print(json.dumps(facts))
    if args.curriculum:
        rows = compare_curriculum(args, config)
        totals = {name: sum(row[name] for row in rows) for name in CONTENDERS}
        print(f"\ntotal of {len(rows)} steps: masked {totals['masked']:.1f} s, ", end="")
        print(f"sparse {totals['sparse']:.1f} s, {totals['masked'] / totals['sparse']:.2f} times")
    elif args.optimizers:
        rows = compare_optimizers(args, config)
        header = ["stage", "batch", "Adam", "step s", "times as fast", "of it the update, ms"]
        cells = [
            [r["stage"], r["batch"], r["form"], f"{r['seconds']:.3f}", f"{r['over_default']:.3f}",
             f"{r['update_seconds'] * 1e3:.2f}"] for r in rows
        ]  # fmt: skip
        print("\n" + table(header, cells))
    else:
        rows = compare_steps(args, config)
        header = [
            "stage", "batch", "contender", "images/s", "over masked", "peak MiB", "step MiB",
            "policy forward s", "ResNet forward s", "backward and update s",
        ]  # fmt: skip
        cells = [
            [
                r["stage"], r["batch"], r["contender"], f"{r['images_per_second']:.3g}",
                f"{r['over_masked']:.2f}", f"{r['peak_mib']:.0f}", f"{r['step_mib']:.0f}",
                f"{r['policy_forward']:.2f}", f"{r['resnet_forward']:.2f}",
                f"{r['backward_and_update']:.2f}",
            ]
            for r in rows
        ]  # fmt: skip
        print("\n" + table(header, cells))
    if args.json:
        write({"machine": facts, "rows": rows}, args.json)


if __name__ == "__main__":
    engine.run_script(main)
