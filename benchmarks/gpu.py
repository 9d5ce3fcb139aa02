"""All that a GPU has to settle, in ten minutes and one file: tests, timings, short trainings.

    make gpu                                      or: python benchmarks/gpu.py
    python benchmarks/gpu.py --max_minutes 30     longer

It runs with the Python it is started with and asks nothing of a network. The steps stand in order
of weight, and what does not fit into the time is left out and named. Into --out go gpu.json and
gpu.md, whose tables are for benchmarks/README.md. CIFAR-10 is used where it is in --data_dir, see
recipes/cifar_parts.py.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

try:
    import torch
except ImportError:
    print("make gpu: this Python has no torch: name one that has, PYTHON=...", file=sys.stderr)
    sys.exit(2)

from measure import machine, table
from measure import write as write_json

from engine import options, run_script
from engine.process import UserError, user_errors
from engine.storage import ROOT
from models import capabilities

OLDEST = (2, 11)  # of torch, as in requirements.txt
NEEDED = ("numpy", "tqdm", "pytest", "PIL", "filelock", "torchvision")
TENSORBOARD = ("tensorboardX", "tensorboard")  # one of them
PRECISIONS = ("fp32", "tf32", "bf16")
BATCHES = (1, 32, 256, 1024, 4096)
ENOUGH = 20.0  # seconds that a step must have left to be begun


@dataclass
class Step:
    """One command, and where it leaves figures."""

    name: str
    command: list[str]
    file: Path | None = None
    env: dict[str, str] = field(default_factory=dict)


def parse_args() -> argparse.Namespace:
    parser = options.Parser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--max_minutes", type=options.positive, default=10.0, help="for all of it")
    add("--out", type=Path, default=Path("cv/gpu"), help="where figures and logs go")
    add("--data_dir", type=Path, default=Path("data"), help="where CIFAR-10 is, if it is")
    add("--model", default="R110_C10", help="what is timed and trained")
    return parser.parse_args()


def check() -> None:
    """Raise UserError where there is no GPU, or something that the steps need."""
    if not capabilities.gpu():
        raise UserError("PyTorch sees no GPU here, and there is nothing else to measure")
    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if version < OLDEST:
        raise UserError(f"torch {torch.__version__}: 2.11 or newer is needed")
    missing = [name for name in NEEDED if not importlib.util.find_spec(name)]
    if not any(importlib.util.find_spec(name) for name in TENSORBOARD):
        missing.append(" or ".join(TENSORBOARD))
    if missing:
        raise UserError(f"{sys.executable} lacks {', '.join(missing)}")


def steps(args: argparse.Namespace) -> list[Step]:
    """What is to be done, the most important first."""
    out, python = args.out, sys.executable
    todo = [
        Step(
            "test_cuda.py",
            [python, "-m", "pytest", "tests/test_cuda.py", f"--junitxml={out / 'tests.xml'}"],
            env={"OMP_NUM_THREADS": "4"},
        )
    ]

    def inference(name: str, *more: str) -> Step:
        file = out / f"{name.replace(', ', '_').replace(' ', '_')}.json"
        command = [python, "benchmarks/inference.py", "--model", args.model, "--json", str(file)]
        return Step(name, [*command, "--repeats", "7", "--budget", "5", *more], file)

    def training(precision: str, *batches: int) -> Step:
        file = out / f"training_{precision}_{batches[0]}.json"
        command = [python, "benchmarks/training.py", "--model", args.model, "--json", str(file)]
        command += ["--precision", precision, "--batch_sizes", *map(str, batches)]
        return Step(f"training {precision} {batches[0]}", command, file)

    sizes = list(map(str, BATCHES))
    for precision in reversed(PRECISIONS):
        given = ["--precisions", precision, "--batch_sizes", *sizes, "--no_compile"]
        todo.append(inference(f"inference {precision}", *given))
    todo += [training(precision, 2048, 256) for precision in reversed(PRECISIONS)]
    todo += stages(args)
    compiled = ["--precisions", "bf16", "--batch_sizes", "1", "256"]
    todo.append(inference("inference bf16 compiled", *compiled))
    for batch in (4096, 1024, 256, 32, 1):
        todo += [training(precision, batch, batch) for precision in reversed(PRECISIONS)]
    return todo


def stages(args: argparse.Namespace) -> list[Step]:
    """Short trainings of both stages and what they come to, where the data set is there."""
    names = ("CIFAR10.pt", "cifar-10-batches-py")
    base = ROOT / "cv" / "pretrained" / args.model
    if not any((args.data_dir / name).exists() for name in names) or not base.exists():
        return []
    out, python = args.out, sys.executable
    common = ["--model", args.model, "--data_dir", str(args.data_dir), "--precision", "bf16"]
    train = [*common, "--batch_size", "2048", "--resume", "--base", str(base)]
    file = out / "stage2.json"
    return [
        Step("stage 1, 3 epochs", [python, "cl_training.py", *train, "--max_epochs", "3",
             "--cv_dir", str(out / "stage1")]),
        Step("stage 2, 1 epoch", [python, "finetune.py", *train, "--max_epochs", "1",
             "--pretrained", str(out / "stage1" / "last.t7"), "--cv_dir", str(out / "stage2")]),
        Step("test.py", [python, "test.py", *common, "--load", str(out / "stage2"), "--time",
             "--json", str(file)], file),
    ]  # fmt: skip


def run(step: Step, seconds: float, log: Path) -> dict:
    """Run a step for at most so many seconds; how it ended, and the figures that it left."""
    began = time.perf_counter()
    env = os.environ | step.env
    if step.file:
        step.file.unlink(missing_ok=True)
    with open(log, "ab") as file:
        file.write(f"\n== {step.name}: {' '.join(step.command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True
        )
        try:
            status = process.wait(seconds)
            ending = "done" if status == 0 else f"failed, status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            process.wait()
            ending = "cut off by the time"
    found = {"step": step.name, "ending": ending, "seconds": time.perf_counter() - began}
    if not step.file:
        found["said"] = last_lines(log, 1)
    if step.file and step.file.exists():
        found["figures"] = json.loads(step.file.read_text())
    return found


def last_lines(log: Path, count: int) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])


def report(facts: dict, done: list[dict], left_out: list[str]) -> str:
    """Markdown: what ran, inference and training as in benchmarks/README.md."""
    where = ", ".join(f"{name} {value}" for name, value in facts.items())
    text = [f"# On a GPU\n\n{where}.\n"]
    text.append(table(["step", "ending", "seconds", ""],
                [[d["step"], d["ending"], f"{d['seconds']:.0f}", d.get("said", "")]
                 for d in done]))  # fmt: skip
    if left_out:
        text.append(f"\nLeft out, there was no time: {', '.join(left_out)}.")
    by_step = {d["step"]: d["figures"] for d in done if "figures" in d}
    inference = [r for n, f in by_step.items() if n.startswith("inference") for r in f["rows"]]
    if inference:
        text.append("\n## Inference, milliseconds a batch\n")
        text.append(inference_table(inference))
        header = ["precision", "batch", "contender", "speed-up", "FLOP ratio", "quotient",
                  "over the fastest full"]  # fmt: skip
        ours = [r for r in inference if r["contender"].startswith("ours, deployed")]
        text.append("\n## Inference, against the deployed full network\n")
        text.append(table(header, [
            [r["precision"], r["batch"], r["contender"], f"{r['speed_up']:.2f}",
             f"{r['flop_ratio']:.2f}", f"{r['efficiency']:.2f}", f"{r['over_fastest_full']:.2f}"]
            for r in ours]))  # fmt: skip
    training = [(n.split()[1], r) for n, f in by_step.items() if n.startswith("training")
                for r in f["rows"]]  # fmt: skip
    if training:
        header = ["precision", "stage", "batch", "", "images/s", "over masked", "peak MiB"]
        text.append("\n## Training, one step\n")
        text.append(table(header, [
            [precision, r["stage"], r["batch"], r["contender"], f"{r['images_per_second']:.0f}",
             f"{r['over_masked']:.2f}", f"{r['peak_mib']:.0f}"]
            for precision, r in training]))  # fmt: skip
    if "test.py" in by_step:
        figures = by_step["test.py"]
        text.append(f"\nAfter the short stages: accuracy {figures['accuracy']:.3f}, "
                    f"{figures['block_usage']:.2f} blocks, {figures['ms_per_image']:.4f} ms an "
                    f"image, speed-up {figures['speed_up']:.2f}.")  # fmt: skip
    return "\n".join(text) + "\n"


def inference_table(rows: list[dict]) -> str:
    """A line for each precision and batch, a column for each contender."""
    names = list(dict.fromkeys(r["contender"] for r in rows))
    lines: dict[tuple, dict[str, float]] = {}
    for r in rows:
        lines.setdefault((r["precision"], r["batch"]), {})[r["contender"]] = r["ms"]
    cells = [
        [f"{precision}, {batch}", *(f"{ms[name]:.3g}" if name in ms else "–" for name in names)]
        for (precision, batch), ms in lines.items()
    ]
    return table(["precision, batch", *names], cells)


def write(out: Path, facts: dict, done: list[dict], left_out: list[str]) -> str:
    """Both files; returns the Markdown."""
    content = {"machine": facts, "steps": done, "left_out": left_out}
    write_json(content, out / "gpu.json")
    text = report(facts, done, left_out)
    with user_errors(out / "gpu.md"):
        (out / "gpu.md").write_text(text)
    return text


def main() -> None:
    began = time.monotonic()
    args = parse_args()
    check()
    args.out, args.data_dir = args.out.resolve(), args.data_dir.resolve()
    with user_errors(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "gpu.log"
    log.unlink(missing_ok=True)
    for stage in ("stage1", "stage2"):  # else their steps would find all epochs done
        shutil.rmtree(args.out / stage, ignore_errors=True)
    facts, done, left_out = machine(), [], []
    todo = steps(args)
    for number, step in enumerate(todo, 1):
        left = began + 60 * args.max_minutes - time.monotonic()
        if left < ENOUGH:
            left_out.append(step.name)
            continue
        print(f"{number}/{len(todo)} {step.name}", end=" ", flush=True)
        done.append(run(step, left, log))
        print(f"{done[-1]['ending']}, {done[-1]['seconds']:.0f} s", flush=True)
        if done[-1]["ending"].startswith("failed"):
            print(last_lines(log, 20), file=sys.stderr)
        write(args.out, facts, done, left_out)  # should something end this from outside
    print("\n" + write(args.out, facts, done, left_out))
    if any(d["ending"].startswith("failed") for d in done):
        raise UserError(f"some steps failed: {log} says why")


if __name__ == "__main__":
    run_script(main)
