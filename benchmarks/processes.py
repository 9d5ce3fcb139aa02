"""Seconds an epoch of a training on a CPU, by how processes and threads share it, beside busy ones.

    python benchmarks/processes.py --model R32_C10 --data_dir data

The second of three epochs counts: the last has an evaluation. Busy processes only count, and take a
core each where they can.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import busy, machine, table, write

import engine
from engine import UserError, options

CORES = len(os.sched_getaffinity(0))
WAYS = {  # processes, threads of each
    f"{CORES} threads": (1, CORES),
    f"{CORES} processes of one thread": (CORES, 1),
    "one thread": (1, 1),
}
BUSY = (0, 1, 2)


def parse_args():
    parser = options.parser(__doc__)
    add = parser.add_argument
    add("--images", type=options.count, default=1280, help="of an epoch")
    add("--rounds", type=options.count, default=3, help="runs, of which the median counts")
    add("--json", type=Path, help="also write the figures to this file")
    parser.set_defaults(model="R32_C10", batch_size=128)
    return parser.parse_args()


def epoch(processes: int, threads: int, script: str, *words) -> dict[str, float]:
    """Seconds of a script's second epoch, and the peak MiB of the largest process so far."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *(torchrun if processes > 1 else [])]
        command += [engine.storage.ROOT / script, "--cv_dir", folder, "--device", "cpu"]
        command += ["--max_epochs", "3", "--test_every", "99", *words]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
        if done.returncode:
            raise UserError(f"{script}: {(done.stderr.splitlines() or ['failed'])[-1]}")
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
    return {"seconds": json.loads(lines[1])["seconds"], "peak": peak}


def main() -> None:
    args = parse_args()
    facts = machine()
    print(json.dumps(facts))
    common = ["--model", args.model, "--data_dir", args.data_dir, "--subset", args.images]
    common += ["--batch_size", args.batch_size, "--precision", args.precision]
    common += ["--seed", args.seed, *(["--skip_data_check"] if args.skip_data_check else [])]
    common += ["--image_size", args.image_size] if args.image_size else []
    seconds: dict[tuple[int, str], list[float]] = {}
    for _ in range(args.rounds):  # in turn, so that drift hits them all
        for others in BUSY:
            with busy(others):
                for name, way in WAYS.items():
                    found = epoch(*way, "pretrain.py", *common)
                    seconds.setdefault((others, name), []).append(found["seconds"])
    rows = [
        [others, *(f"{statistics.median(seconds[others, name]):.1f}" for name in WAYS)]
        for others in BUSY
    ]
    print(f"\n{table(['busy processes', *WAYS], rows)}")
    if args.json:
        kept = [{"busy": n, "way": name, "seconds": s} for (n, name), s in seconds.items()]
        write({"machine": facts, "rows": kept}, args.json)


if __name__ == "__main__":
    engine.run_script(main)
