"""Timing several contenders in turn in one process, and telling the machine they ran on."""

import io
import json
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine  # noqa: E402
from engine import options  # noqa: E402

timed = partial(engine.device.timed, device=engine.device.pick())


def add_network_that_decides(parser: options.Parser) -> None:
    """--load, and what it may want beside it."""
    options.add_base(parser)
    options.add_chosen_penalty(parser)
    what = "checkpoint of the network that decides"
    parser.add_argument("--load", required=True, help=what)


def environment(packages: Sequence[str], work: Path) -> Path:
    """A Python that has these pinned packages over those that run this, in a folder below `work`;
    made once. Raises CalledProcessError where one does not install.
    """
    if not packages:
        return Path(sys.executable)
    folder = (work / "-".join(name.replace("==", "_") for name in packages)).absolute()
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        shutil.rmtree(folder, ignore_errors=True)
        quiet = {"check": True, "stdout": sys.stderr}
        subprocess.run([sys.executable, "-m", "venv", folder], **quiet)
        own = next(folder.glob("lib/python*/site-packages"))
        (own / "beneath.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "setuptools==80.9.0", "wheel==0.45.1"], **quiet)
        # some want to see torch while they are built
        subprocess.run([*pip, "--no-build-isolation", *packages], **quiet)
        ready.touch()
    return python


def openvino_network(content: bytes, precision: str, threads: int) -> Callable:
    """A compiled network's call on {"image": array}."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
    }
    core = openvino.Core()
    network = core.compile_model(core.read_model(io.BytesIO(content)), "CPU", settings)
    return network.create_infer_request().infer


def interleaved(contenders: dict[str, Callable], repeats: int, budget: float) -> dict[str, float]:
    """Median seconds of one call of each contender, called in turn so that drift hits them all.

    Each is warmed up first; `repeats` rounds are run, fewer when `budget` seconds are used up, and
    a call that takes little is repeated within its turn until it can be timed.
    """
    calls = {}
    for name, call in contenders.items():
        call(), call()
        calls[name] = max(1, round(0.02 / timed(call)))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - start > budget:
            break
        for name, call in contenders.items():
            time.sleep(0.02)  # until the worker threads of the one before have stopped spinning
            if calls[name] > 1:
                call()
            seconds[name].append(timed(call, times=calls[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def conv_gflops(batch: int, dtype: torch.dtype, device: torch.device, repeats: int = 15) -> float:
    """The machine's best GFLOP/s on the 3x3 convolutions of a CIFAR ResNet's three stages."""
    calls = {}
    for channels, size in ((16, 32), (32, 16), (64, 8)):
        x = torch.randn(batch, channels, size, size, device=device, dtype=dtype)
        w = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
        calls[channels] = lambda x=x, w=w: F.conv2d(x, w, padding=1)
    with torch.inference_mode():
        seconds = interleaved(calls, repeats, budget=10)
    flops = 2 * batch * 9 * 16 * 16 * 32 * 32  # the same for each of the three shapes
    return 3 * flops / sum(seconds.values()) / 1e9


def machine() -> dict[str, str | int]:
    """What a reader has to know to place the figures."""
    facts = {
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def commit() -> str:
    """Which code was measured, where git can tell; a copy may have come without it."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(
                line.split(":")[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def random_policies(
    batch: int, num_blocks: int, keep: float, device: torch.device, deviation: float = 0
) -> Tensor:
    """(B, K) policies that keep `keep` blocks, chosen at random for every image; in the mean, with
    a standard deviation among images.
    """
    order = torch.rand(batch, num_blocks, device=device).argsort(1)
    number = keep + deviation * torch.randn(batch, 1, device=device)
    return (order < number.round()).float()


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Inside, so many other processes keep a core busy each."""
    count = [sys.executable, "-c", "while True: pass"]
    started = [subprocess.Popen(count) for _ in range(processes)]
    try:
        if started:
            time.sleep(0.5)  # until they have come up
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def under(policies: Tensor, run: Callable, x: Tensor, decide: Callable | None = None) -> Callable:
    """A call without arguments that runs a batch x under the next of the policies (D, B, K).

    Before it does so it calls `decide`, if given, on x. After the last policies the first follow.
    """
    coming = cycle(policies)

    def call():
        if decide is not None:
            decide(x)
        return run(x, next(coming))

    return call


def write(content: dict, path: Path) -> None:
    """Figures as JSON. Raises UserError where they cannot be written."""
    with engine.user_errors(path):
        path.write_text(json.dumps(content, indent=1) + "\n")


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table with aligned columns."""
    cells = [header] + [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
