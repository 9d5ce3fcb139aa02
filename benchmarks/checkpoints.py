"""Milliseconds an image of several checkpoints, timed in turn on the same images.

    python benchmarks/checkpoints.py full="--model R32_C10" "stage 2"="--load cv/R32_C10/stage2"

A row is a name and options of test.py. Rows of one table are comparable, whatever else the machine
does: each batch passes through all of them, deployed and with what decides, and the speed-up over
the first row is the median of the batches' ratios.
"""

import json
import shlex
import statistics
from functools import partial
from pathlib import Path

from measure import machine, table, timed, write

import engine
from engine import UserError, options
from engine.trained import TrainedModel, whole_batches


def parse_args():
    parser = options.parser(__doc__, model="R32_C10")
    add = parser.add_argument
    add("rows", nargs="+", metavar="NAME=OPTIONS", help="options of test.py, --model included")
    add("--batch_size", type=options.count, default=1000, help="images a step")
    add("--passes", type=options.count, default=5, help="passes over the images")
    add("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def deployed(row: str, args):
    """A row's name and the call that runs a batch of images."""
    name, _, text = row.partition("=")
    if not text:
        raise UserError(f"{row}: expected NAME=OPTIONS")
    parser = options.parser(__doc__, model=args.model)
    options.add_trained(parser)
    parser.set_defaults(precision=args.precision, device=args.device, data_dir=args.data_dir)
    own = parser.parse_args(shlex.split(text))
    call, _ = TrainedModel(own, engine.data.config_of(own)).deployed()
    return name, call


def measure(calls: dict, test, args) -> list[dict]:
    """One row a call; the first pass over the images, which makes the kernels, is not timed."""
    size = min(args.batch_size, test.num_images)
    seconds = {name: [] for name in calls}
    for done, images in enumerate(whole_batches(test, size, 1 + args.passes, float("inf"))):
        for name, call in calls.items():
            spent = timed(partial(call, images))
            if done >= test.num_images // size:
                seconds[name].append(spent)
    first = next(iter(seconds.values()))
    return [
        {
            "name": name,
            "ms_per_image": statistics.median(values) / size * 1e3,
            "speed_up": statistics.median(a / b for a, b in zip(first, values, strict=True)),
            "batches": len(values),
        }
        for name, values in seconds.items()
    ]


def main() -> None:
    args = parse_args()
    engine.device.keep_freed_memory()
    calls = dict(deployed(row, args) for row in args.rows)
    config = engine.data.config_of(args)
    device = engine.device.pick(args.device)
    _, test = engine.data.load(config, args, device, training=False)
    facts = machine() | {"precision": args.precision, "batch_size": args.batch_size}
    print(json.dumps(facts))
    rows = measure(calls, test, args)
    lines = [[r["name"], f"{r['ms_per_image']:.3f}", f"{r['speed_up']:.2f}"] for r in rows]
    print(table(["", "ms/img", f"speed-up over {rows[0]['name']}"], lines))
    if args.json:
        write({"machine": facts, "rows": rows}, args.json)


if __name__ == "__main__":
    engine.run_script(main)
