"""What a run survives: kills, stops, full disks, damaged files; a table of what was tried.

    python tests/faults.py                  everything, a quarter of an hour
    python tests/faults.py --short          what the test suite runs of it
    python tests/faults.py --only kills     one part; see FAULTS at the end

Each part raises AssertionError where something was lost, and returns what it saw.
"""

import argparse
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import TINY, write_base, write_cifar  # noqa: E402

from engine import UserError, storage  # noqa: E402

# without the second, restarted processes meet what those before them left in torchrun's store
ENV = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


class Bench:
    """A small data set, a base ResNet and a stage-1 checkpoint in a scratch directory."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self.data, self.base = write_cifar(folder / "data"), write_base(folder / "pk_E_1_A_0.1.t7")
        self.count = 0
        self.stage_1 = self.fresh()
        self.run("cl_training", "--cv_dir", self.stage_1)

    def fresh(self) -> Path:
        self.count += 1
        return self.folder / f"run{self.count}"

    def command(self, script: str, *options) -> list[str]:
        model = TINY.replace("R", "AIG") if script == "aig_training" else TINY
        given = ["--model", model, "--data_dir", self.data, "--skip_data_check"]
        given += ["--batch_size", 20, "--max_epochs", 3, "--test_every", 1]
        if script in ("cl_training", "finetune"):
            given += ["--base", self.base]
        if script == "finetune" and "--load" not in options:
            given += ["--pretrained", self.stage_1 / storage.LAST]
        return [str(part) for part in (ROOT / f"{script}.py", *given, *options)]

    def run(self, script: str, *options, status: int = 0) -> str:
        """Run a script to its end; what it wrote to standard error."""
        command = [sys.executable, *self.command(script, *options)]
        result = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
        assert result.returncode == status, (options, result.returncode, result.stderr)
        # without what a run says of its base
        return "".join(line for line in result.stderr.splitlines(True) if "ResNet's" not in line)

    def start(self, script: str, *options, prefix=(sys.executable,)) -> subprocess.Popen:
        return subprocess.Popen(
            [*prefix, *self.command(script, *options)], env=ENV, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def whole(self, script: str, *options) -> tuple[Path, float]:
        """An uninterrupted run, and how long it took."""
        folder, start = self.fresh(), time.monotonic()
        self.run(script, "--cv_dir", folder, *options)
        return folder, time.monotonic() - start


def differing(a, b, name: str = "") -> list[str]:
    """Where two nested states are not equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [name]
    if isinstance(a, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict):
        missing = [f"{name}/{key}" for key in a.keys() ^ b.keys()]
        return sum((differing(a[k], b[k], f"{name}/{k}") for k in a.keys() & b.keys()), missing)
    return [] if a == b else [name]


def same(a, b) -> bool:
    """Whether two nested states are equal to the last bit."""
    return not differing(a, b)


def ended_alike(a: Path, b: Path) -> bool:
    """Whether two runs ended in the same weights, optimizer states and epoch."""
    contents = [storage.content(folder) for folder in (a, b)]
    for content in contents:
        content.pop("args")
    return same(*contents)


def wait_for_epoch(folder: Path) -> None:
    """Until a run in a directory has finished its first epoch."""
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists():
        assert time.monotonic() < deadline, f"no epoch in {folder}"
        time.sleep(0.01)


def kills(bench: Bench, short: bool) -> str:
    """SIGKILL at random moments, last.t7 written as often as can be; then --resume."""
    tries = 1 if short else 20
    often = ("--save_minutes", 0.0001)
    killed = partway = 0
    for script in ("pretrain", "cl_training", "finetune", "aig_training"):
        expected, seconds = bench.whole(script)
        for _ in range(tries):
            folder = bench.fresh()
            process = bench.start(script, "--cv_dir", folder, *often)
            time.sleep(bench.random.uniform(0.5, 1.0) * seconds)
            process.kill()
            process.communicate()
            last = folder / storage.LAST
            if process.returncode == -signal.SIGKILL:
                killed += 1
                # none, or a whole one
                partway += last.exists() and "steps_done" in storage.content(last)
            bench.run(script, "--cv_dir", folder, *often, "--resume")
            assert ended_alike(expected, folder), (script, folder)
    return (
        f"{killed} of {4 * tries} runs killed ({partway} inside an epoch), all ended bit-identical"
    )


def terms(bench: Bench, short: bool) -> str:
    """SIGTERM inside an epoch: exit within 10 s, and --load goes on."""
    slowest, options = 0.0, ("--max_epochs", 12)  # long enough not to end before the signal
    for script in ("cl_training",) if short else ("pretrain", "cl_training", "finetune"):
        expected, _ = bench.whole(script, *options)
        folder = bench.fresh()
        process = bench.start(script, "--cv_dir", folder, *options)
        wait_for_epoch(folder)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate()
        slowest = max(slowest, time.monotonic() - start)
        assert process.returncode == 143 and "go on with --load" in error, error
        bench.run(script, "--load", folder, *options)
        assert ended_alike(expected, folder)
    assert slowest < 10
    return f"exit after at most {slowest:.1f} s, resumed runs ended bit-identical"


def workers(bench: Bench, short: bool) -> str:
    """SIGKILL one of two workers under torchrun --max-restarts: the job goes on by itself."""
    pair = [*TORCHRUN, "--nproc_per_node=2", "--max-restarts=3", "--monitor-interval=0.1"]
    expected, folder = bench.fresh(), bench.fresh()
    options = ("--max_epochs", 12)
    process = bench.start("cl_training", "--cv_dir", expected, *options, prefix=pair)
    assert process.wait() == 0, process.communicate()[1]
    process = bench.start("cl_training", "--cv_dir", folder, *options, prefix=pair)
    wait_for_epoch(folder)
    victim = bench.random.choice(children(process.pid))
    os.kill(victim, signal.SIGKILL)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert ended_alike(expected, folder)
    return "one worker of two killed, restarted by torchrun, ended bit-identical"


ADDRESSES = ("10.199.0.1", "10.199.0.2")


@contextmanager
def two_hosts():
    """Two network namespaces joined by a virtual cable; how to run a command in each."""
    names = [f"faults{os.getpid()}{side}" for side in "ab"]
    cable = [f"veth{os.getpid() % 100000}{side}" for side in "ab"]
    ip = partial(subprocess.run, check=True)
    try:
        ip(["ip", "link", "add", cable[0], "type", "veth", "peer", "name", cable[1]])
        for name, end, address in zip(names, cable, ADDRESSES, strict=True):
            ip(["ip", "netns", "add", name])
            ip(["ip", "link", "set", end, "netns", name])
            inside = ["ip", "netns", "exec", name, "ip"]
            ip([*inside, "addr", "add", f"{address}/24", "dev", end])
            ip([*inside, "link", "set", end, "up"])
            ip([*inside, "link", "set", "lo", "up"])
        # gloo asks the system which interface the host's name is on
        yield [
            ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={end}"]
            for name, end in zip(names, cable, strict=True)
        ]
    finally:
        for name in names:
            halt(name)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def halt(name: str) -> None:
    """Kill every process of a network namespace, as if its host had lost power."""
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    for pid in listed.stdout.split():
        os.kill(int(pid), signal.SIGKILL)


def hosts(bench: Bench, short: bool) -> str:
    """Two hosts with one process each; the second disappears and comes back."""
    if short or os.geteuid() != 0:
        return "not tried: needs root"
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
        "--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29511",
        "--monitor-interval=0.1",
    ]  # fmt: skip
    expected, folder, options = bench.fresh(), bench.fresh(), ("--max_epochs", 12, "--resume")

    def start(place: Path, host: list[str], address: str) -> subprocess.Popen:
        # both namespaces go by the same host name, from which torchrun would tell the leader
        leads = f"--rdzv-conf=is_host={int(address == ADDRESSES[0])}"
        prefix = [*host, *torchrun, f"--local-addr={address}", leads]
        return bench.start("cl_training", "--cv_dir", place, *options, prefix=prefix)

    with two_hosts() as commands:
        pairs = list(zip(commands, ADDRESSES, strict=True))
        running = [start(expected, *pair) for pair in pairs]
        assert [process.wait() for process in running] == [0, 0], running[0].communicate()[1]
        first, second = (start(folder, *pair) for pair in pairs)
        wait_for_epoch(folder)
        halt(commands[1][3])
        time.sleep(20)  # the others take three missed heartbeats of 5 s to notice
        second = start(folder, *pairs[1])
        errors = [process.communicate()[1] for process in (first, second)]
        assert [first.returncode, second.returncode] == [0, 0], errors
    assert ended_alike(expected, folder)
    return "the second host killed and started again: both went on and ended bit-identical"


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def directories(bench: Bench, short: bool) -> str:
    """Full disk, read-only directory, two runs in one place."""
    seen = []
    folder = bench.fresh()
    process = bench.start("cl_training", "--cv_dir", folder, "--max_epochs", 1000)
    wait_for_epoch(folder)
    error = bench.run("cl_training", "--cv_dir", folder, "--resume", status=2)
    assert "another run is writing here" in error, error
    process.kill()
    process.communicate()
    bench.run("cl_training", "--cv_dir", folder, "--resume")
    seen.append("a second run was refused")

    if os.geteuid() == 0:  # who may mount, and whom permissions do not stop
        small = bench.fresh()
        small.mkdir()
        # room for last.t7 and not for the one that replaces it
        size = int((bench.stage_1 / storage.LAST).stat().st_size * 1.6)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", small]
        if subprocess.run(mount, capture_output=True).returncode == 0:
            try:
                error = bench.run("cl_training", "--cv_dir", small, status=2)
                assert "No space left on device" in error and error.count("\n") == 1, error
                assert storage.content(small)["epoch"] == 0
                seen.append("a full disk left the old checkpoint")
                subprocess.run(["mount", "-o", "remount,ro", small], check=True)
                error = bench.run("cl_training", "--cv_dir", small, "--resume", status=2)
                assert "Read-only file system" in error and error.count("\n") == 1, error
                seen.append("a read-only one was refused")
            finally:
                subprocess.run(["umount", "-l", small], check=True)
    return ", ".join(seen)


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch code_was_run",)


def damaged(bench: Bench, short: bool) -> str:
    """Damaged and foreign files: an error in one line, or exactly what was written."""
    tries, refused = 40 if short else 200, 0
    path, bad = bench.stage_1 / storage.LAST, bench.folder / "bad.t7"
    whole, content = path.read_bytes(), storage.content(path)
    for number in range(tries):
        data, kind = bytearray(whole), number % 5
        at = bench.random.randrange(len(data))
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data[at] ^= 1 << bench.random.randrange(8)
        elif kind == 2:
            size = min(bench.random.choice([16, 512, 4096]), len(data) - at)
            data[at : at + size] = bytes(size)
        elif kind == 3:
            data = bytearray(bench.random.choice(foreign()))
        else:
            data = bytearray(pickle.dumps({"agent": RunsCode()}, protocol=number % 3 + 1))
        bad.write_bytes(data)
        try:
            read = storage.content(bad)
        except UserError as error:
            refused += 1
            assert str(bad) in str(error) and "\n" not in str(error)
        else:  # a flipped bit that nothing depends on, such as in a zip file's padding
            assert kind in (1, 2) and same(read, content), (kind, at)
    assert not Path("code_was_run").exists()
    return f"{refused} of {tries} refused in one line, the others loaded exactly; no code ran"


def foreign() -> list[bytes]:
    """Files of other programs."""
    buffers = [b"", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04" + bytes(100), b"{}\n"]
    return [*buffers, pickle.dumps([1, 2]), pickle.dumps({"agent": {"a": 1}}, protocol=2)]


FAULTS = {
    "kills": kills,
    "terms": terms,
    "workers": workers,
    "hosts": hosts,
    "directories": directories,
    "damaged": damaged,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="what the test suite runs")
    parser.add_argument("--only", choices=FAULTS, nargs="+", default=list(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.seed)
        print("| fault | outcome |\n|---|---|")
        for name in args.only:
            outcome = FAULTS[name](bench, args.short)
            print(f"| {FAULTS[name].__doc__.rstrip('.')} | {outcome} |", flush=True)


if __name__ == "__main__":
    main()
