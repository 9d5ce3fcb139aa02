"""The whole method on real CIFAR-10 within minutes, on any processor: what `make demo` runs.

From a shipped base that serves every route, stage 1 learns one policy network for every penalty,
and stage 2 trains both networks for one. A rehearsal on a few images tells how fast this machine
is. From that follows on how many images the stages are trained, and a forecast, which the last line
sets beside the time it took.
"""

import json
import math
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import UserError, device, options, run_script, user_errors  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
BASE = "cv/pretrained/R32_C10"  # serves every route
CLASSIFIER = "cv/pretrained/R8_C10"  # what the policy network starts from
PENALTIES = (-0.5, -2, -5, -15, -50)  # that stage 1's one network is asked to choose for
TEST_IMAGES = 10_000
REHEARSED = 1024  # images an epoch of a rehearsal
FEWEST = 512  # images an epoch, however slow the machine
DEALT_AT = -5  # the one of them whose policies are dealt to other images as well
DEALT = 13  # evaluations more that test.py --dependence takes, as a rule
RESERVE = 0.9  # of the time left is planned for


@dataclass
class Stage:
    """One training: its command, and how many images it learns from where there is time enough."""

    name: str
    command: list[str]
    images: int
    epochs: int
    test_every: int


@dataclass
class Pace:
    """How fast this machine is at one stage, in seconds."""

    start: float  # until the first epoch begins, and after the last
    image: float  # learned from once


def stages() -> list[Stage]:
    base = ["--base", BASE, "--batch_size", "128", "--schedule", "cosine"]
    policy = ["--policy_size", "16", "--policy_init", CLASSIFIER]
    return [
        Stage(
            "stage 1",
            ["cl_training.py", *base, *policy, *"--warm_start 8 --lr 3e-3 --penalty -10".split()],
            images=20_000,
            epochs=8,
            test_every=8,
        ),
        Stage(
            "stage 2",
            ["finetune.py", *base, "--resnet_lr", "0.005", "--penalty", "-10", "--pretrained"],
            images=20_000,
            epochs=3,
            test_every=3,
        ),
    ]


def size(stage: Stage, share: float) -> int:
    """Images an epoch at a share of the stage's whole size."""
    return max(FEWEST, round(stage.images * share))


def seconds_of(stage: Stage, pace: Pace, images: int, test_image: float) -> float:
    tests = math.ceil(stage.epochs / stage.test_every)
    # under the policies, and dealt in two ways; --subset cuts test images too
    evaluation = 3 * tests * min(images, TEST_IMAGES) * test_image
    return pace.start + stage.epochs * images * pace.image + evaluation


def plan(
    todo: list[Stage], paces: list[Pace], test_image: float, left: float
) -> tuple[list[int], float]:
    """How many images each stage learns from in an epoch, and the forecast in seconds.

    test_image: seconds to evaluate an image. left: seconds to plan for. All stages are cut by the
    same share, none below FEWEST images, whose time the forecast tells all the same.
    """

    def total(share: float) -> float:
        return sum(
            seconds_of(stage, pace, size(stage, share), test_image)
            for stage, pace in zip(todo, paces, strict=True)
        )

    share = next(
        (percent / 100 for percent in range(100, 0, -1) if total(percent / 100) <= left), 0
    )
    return [size(stage, share) for stage in todo], total(share)


class Demo:
    """Runs the scripts in turn, as a user would, and keeps what they leave."""

    def __init__(self, out: Path, common: list[str]):
        self.out, self.common = out, common

    def run(self, command: list[str], quiet: bool = False) -> float:
        """One script under the options of all; its seconds."""
        return self.call([command[0], *self.common, *command[1:]], quiet)

    def call(self, command: list[str], quiet: bool = False) -> float:
        """One script; its seconds. Raises UserError where it fails."""
        print("$ python " + shlex.join(command), flush=True)
        start = time.perf_counter()
        result = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL if quiet else None
        )
        if result.returncode:  # it has said why
            raise UserError(f"{command[0]} ended with status {result.returncode}")
        return time.perf_counter() - start

    def figures(self, name: str) -> Path:
        return self.out / f"{name.replace(' ', '')}.json"

    def profile(self, name: str, *where: str) -> tuple[float, dict]:
        """test.py's figures, and the seconds it took."""
        path = self.figures(name)
        seconds = self.run(["test.py", *where, "--json", str(path)])
        return seconds, json.loads(path.read_text())

    def train(self, stage: Stage, before: Path, images: int, rehearsal: bool = False) -> Path:
        folder = self.out / ("rehearsal" if rehearsal else "") / stage.name.replace(" ", "")
        command = [*stage.command]
        if command[-1] == "--pretrained":
            command.append(str(before / "last.t7"))
        command += ["--cv_dir", str(folder), "--subset", str(images)]
        epochs, test_every = (2, 1000) if rehearsal else (stage.epochs, stage.test_every)
        command += ["--max_epochs", str(epochs), "--test_every", str(test_every)]
        self.run(command, quiet=rehearsal)
        return folder

    def rehearse(self, stage: Stage, before: Path, test_image: float) -> tuple[Path, Pace]:
        """Two epochs of a few images; the first also warms up."""
        began = time.perf_counter()
        folder = self.train(stage, before, REHEARSED, rehearsal=True)
        whole = time.perf_counter() - began
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        epochs = [json.loads(line)["seconds"] for line in lines]
        trained = max(epochs[-1] - 3 * REHEARSED * test_image, 0.5 * epochs[-1])
        return folder, Pace(whole - sum(epochs), trained / REHEARSED)


def parse_args():
    parser = options.Parser(description=__doc__)
    add = parser.add_argument
    add("--minutes", type=options.positive, default=11.0, help="to plan for, set-up not included")
    add("--out", type=Path, default=Path("cv/demo"), help="directory that the demo writes into")
    return parser.parse_known_args()  # what is left over goes to every script


def main() -> None:
    began = time.perf_counter()
    args, rest = parse_args()
    with user_errors(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    demo = Demo(args.out, ["--model", "R32_C10", "--precision", device.fast_precision(), *rest])

    print("== the full ResNet-32, as it comes with the repository", flush=True)
    test_seconds, full = demo.profile("full", "--base", BASE)
    test_image = 1 / full["images_per_second"]

    print("== how fast is this machine? Both stages on a few images", flush=True)
    todo, paces, before = stages(), [], args.out
    for stage in todo:
        before, pace = demo.rehearse(stage, before, test_image)
        paces.append(pace)
        print(f"   {stage.name}: {1 / pace.image:.0f} images/s", flush=True)
    spent = time.perf_counter() - began
    tests = (len(PENALTIES) + 1) * test_seconds + 2 * DEALT * full["images"] * test_image
    left = 60 * args.minutes - spent - tests
    images, trainings = plan(todo, paces, test_image, RESERVE * left)
    forecast = spent + trainings + tests
    for stage, count in zip(todo, images, strict=True):
        print(f"   {stage.name}: {stage.epochs} epochs of {count} images")
    print(f"   forecast: {forecast / 60:.1f} minutes in all, {spent / 60:.1f} of them gone")

    warm, joint = todo
    print("== stage 1: one policy network for every penalty", flush=True)
    policy = demo.train(warm, args.out, images[0])
    names = ["full"]
    for penalty in PENALTIES:
        names.append(f"penalty {penalty}")
        where = ["--base", BASE, "--load", str(policy), "--penalty", str(penalty)]
        demo.profile(names[-1], *where, *(["--dependence"] if penalty == DEALT_AT else []))
    print("== stage 2: both networks for one penalty", flush=True)
    tuned = demo.train(joint, policy, images[1])
    demo.profile("stage 2", "--load", str(tuned), "--dependence")
    names.append("stage 2")
    rows = [f"{name}={demo.figures(name)}" for name in names]
    demo.call(["benchmarks/summary.py", *rows])
    took = time.perf_counter() - began
    print(f"took {took / 60:.1f} minutes, forecast {forecast / 60:.1f}")


if __name__ == "__main__":
    run_script(main)
