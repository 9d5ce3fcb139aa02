"""Milliseconds an image of several checkpoints, timed in turn on the same images.

    python benchmarks/checkpoints.py full="--model R32_C10" "stage 2"="--load cv/R32_C10/stage2"

A row is a name and options of test.py that say what to load. Rows of one table are comparable,
whatever else the machine does: each batch passes through all of them, deployed and with what
decides, and the speed-up over the first row is the median of the batches' ratios.
"""

import copy
import json
import shlex
from functools import cached_property, partial
from pathlib import Path

from measure import machine, table, timed, write

import engine
from engine import UserError, options
from engine.trained import Held, TrainedModel, speed, whole_batches


def parse_args():
    parser = options.parser(__doc__, model="R32_C10")
    add = parser.add_argument
    add("rows", nargs="+", metavar="NAME=OPTIONS", help="what to load, as test.py takes it")
    add("--batch_size", type=options.count, default=1000, help="images a step")
    add("--passes", type=options.count, default=5, help="passes over the images")
    add("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


class Row:
    """One row: its call, and its data, which a model may want normalised in its own way."""

    def __init__(self, text: str, args):
        self.name, _, given = text.partition("=")
        if not given:
            raise UserError(f"{text}: expected NAME=OPTIONS")
        parser = options.Parser()
        parser.add_argument("--model", default=args.model)
        options.add_trained(parser)
        with engine.user_errors(text):  # quotes that do not close are a ValueError
            own = parser.parse_args(shlex.split(given), copy.copy(args))
        self.config = engine.data.config_of(own)
        self.trained = TrainedModel(own, self.config)
        self.call, _ = self.trained.deployed()

    @cached_property
    def test(self):
        return engine.data.load(self.config, self.trained.args, self.trained.device, False)[1]


def rows_of(args) -> list[Row]:
    """Raises UserError where rows could not be told apart, or not be compared."""
    rows = [Row(text, args) for text in args.rows]
    if len({row.name for row in rows}) < len(rows):
        raise UserError("two rows have the same name")
    if len({(row.config.dataset, row.config.image_size) for row in rows}) > 1:
        raise UserError("rows of different data sets cannot be compared")
    return rows


def measure(rows: list[Row], size: int, passes: int) -> list[dict]:
    """What main prints of each; the first pass, in which kernels are made, is not timed."""
    seconds = [[] for _ in rows]
    held = [Held(row.test, size) for row in rows]
    batches = [whole_batches(test, size, 1 + passes) for test in held]
    for done, all_images in enumerate(zip(*batches, strict=True)):
        for row, images, found in zip(rows, all_images, seconds, strict=True):
            spent = timed(partial(row.call, images))
            if done >= len(held[0].batches):
                found.append(spent)
    return [
        {"name": row.name, "batches": len(found), **speed(found, seconds[0], size)}
        for row, found in zip(rows, seconds, strict=True)
    ]


def main() -> None:
    args = parse_args()
    engine.device.keep_freed_memory()
    rows = rows_of(args)
    size = min(args.batch_size, rows[0].test.num_images)
    facts = machine() | {"precision": args.precision, "batch_size": size}
    print(json.dumps(facts))
    found = measure(rows, size, args.passes)
    lines = [[r["name"], f"{r['ms_per_image']:.3f}", f"{r['speed_up']:.2f}"] for r in found]
    print(table(["", "ms/img", f"speed-up over {found[0]['name']}"], lines))
    if args.json:
        write({"machine": facts, "rows": found}, args.json)


if __name__ == "__main__":
    engine.run_script(main)
