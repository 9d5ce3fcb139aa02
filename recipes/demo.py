"""Both stages in short on real CIFAR-10, on any processor: what `make demo` runs.

On the base that comes along, the warm start of stage 1 learns one policy network for every penalty,
and stage 2 trains both networks for one, by policy gradient. The curriculum is left out, for time.
Sizes are fixed: on a slow or busy machine the result is as good, but later.
"""

import os
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import models  # noqa: E402
from engine import Shard, UserError, device, options, run_script, user_errors  # noqa: E402
from finetune import train_step  # noqa: E402

MODEL = "R32_C10"
TRAINING = "--subset 20000 --batch_size 128 --schedule cosine --penalty -10".split()
POLICY = "--policy_size 16 --policy_init cv/pretrained/R8_C10".split()
STAGE_1 = "--max_epochs 8 --warm_start 8 --test_every 8 --lr 3e-3".split()
STAGE_2 = "--max_epochs 3 --test_every 3 --resnet_lr 0.005 --alpha 0.95".split()
PENALTIES = (-0.5, -5, -50)  # that stage 1's one network is asked to choose for
SHUFFLED_AT = -5  # the one of them whose policies are shuffled over the images as well

BATCH, STEPS = 128, 3  # of the measurement
# of the whole: seconds that it takes at any pace (test.py --time), and images that cost the rest
FIXED, IMAGES = 240, 150_000
say = partial(print, flush=True)  # in order with what the scripts say


def measure(place: torch.device, precision: str) -> dict[int, float]:
    """Images a second of steps like stage 2's, under one thread and under all."""
    resnet, policy_net = (device.place(network, place) for network in models.build(MODEL, 10))
    images = torch.randn(BATCH, 3, 32, 32, device=place)
    labels, args = images.new_zeros(BATCH).long(), Namespace(penalty=-10, alpha=0.8)

    def step(number: int) -> None:
        shard = Shard(0, BATCH, BATCH, step=number)
        with device.autocast(place, precision):
            train_step(policy_net, resnet, images, labels, shard, args)[0].backward()

    every = torch.get_num_threads()
    seconds = {1: [], every: []} if place.type == "cpu" else {every: []}  # a GPU needs no choice
    for number in range(1 + STEPS):  # in turn, so that other work disturbs both alike
        for threads, spent in seconds.items():
            torch.set_num_threads(threads)
            spent.append(device.timed(partial(step, number), place))
    return {n: STEPS * BATCH / sum(spent[1:]) for n, spent in seconds.items()}  # the first warms up


def plan(paces: dict[int, float]) -> tuple[int, bool, float]:
    """The fastest number of threads, whether the machine is busy, and the forecast in seconds.

    Threads wait for each other in every kernel, also for one that other work holds up. So where
    one is as fast as all, the machine is busy, and one is better.
    """
    threads = max(sorted(paces), key=paces.get)
    return threads, threads < max(paces), FIXED + IMAGES / paces[threads]


def main() -> None:
    began = time.perf_counter()
    parser = options.Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("cv/demo"), help="directory to write into")
    parser.add_argument("--device", type=options.device_name, help="cpu, cuda or cuda:N")
    args, rest = parser.parse_known_args()  # what is left over goes to every script
    rest += ["--device", args.device] if args.device else []
    with user_errors(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    common = ["--model", MODEL, "--precision", device.fast_precision()]
    threads, busy, forecast = plan(measure(device.pick(args.device), common[-1]))
    if busy:
        say("This machine is busy: one thread is as fast as all of them.")
    say(f"forecast: {forecast / 60:.1f} minutes with OMP_NUM_THREADS={threads}")

    def call(*words: object) -> None:
        command = [str(word) for word in words]
        say("$ python " + shlex.join(command))
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        if status := subprocess.run([sys.executable, *command], cwd=ROOT, env=env).returncode:
            raise UserError(f"{command[0]} ended with status {status}")  # it has said why

    def profile(name: str, *words: object) -> str:
        figures = args.out / f"{name.replace(' ', '')}.json"
        call("test.py", *common, "--time", *words, "--json", figures, *rest)
        return f"{name}={figures}"

    say("== the full ResNet-32, as it comes with the repository")
    rows = [profile("full")]
    say("== stage 1: one policy network for every penalty")
    policy, tuned = args.out / "stage1", args.out / "stage2"
    call("cl_training.py", *common, *TRAINING, *POLICY, *STAGE_1, "--cv_dir", policy, *rest)
    for penalty in PENALTIES:
        owed = ["--dependence"] if penalty == SHUFFLED_AT else []
        rows.append(profile(f"penalty {penalty}", "--load", policy, "--penalty", penalty, *owed))
    say("== stage 2: both networks for one penalty")
    where = ["--pretrained", policy, "--cv_dir", tuned]
    call("finetune.py", *common, *TRAINING, *STAGE_2, *where, *rest)
    rows.append(profile("stage 2", "--load", tuned, "--dependence"))
    call("benchmarks/summary.py", *rows)
    say(f"took {(time.perf_counter() - began) / 60:.1f} minutes, forecast {forecast / 60:.1f}")


if __name__ == "__main__":
    run_script(main)
