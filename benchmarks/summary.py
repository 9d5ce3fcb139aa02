"""Figures that test.py wrote, as one table and, if wanted, one picture.

    python benchmarks/summary.py NAME=FILE.json [NAME=FILE.json ...] [--picture FILE]

Rows with --time say how fast they run deployed, each beside the full network on the same images;
those with --dependence, what the policies owe to the image. In the picture, accuracy against FLOPs
an image, the rows of one checkpoint under several penalties make a curve.
"""

import json
from collections import Counter
from pathlib import Path

from measure import table

from engine import UserError, options, run_script, user_errors

COLUMNS = {
    "": "{name}",
    "accuracy": "{accuracy:.3f}",
    "blocks": "{block_usage:.2f} ± {block_usage_std:.2f}",
    "FLOPs/img": "{flops:.2E} ± {flops_std:.2E}",
    "policies": "{unique_policies}",
}
IMAGES = {"images": "{images}"}
TIMED = {"ms/img": "{ms_per_image:.3f}", "speed-up": "{speed_up:.2f}"}  # of test.py --time
DEPENDENCE = {  # of test.py --dependence
    "shuffled": "{shuffled[accuracy]:.3f}",
    "most frequent": "{most_frequent[accuracy]:.3f} at {most_frequent[blocks]:.0f}",
    "static, same FLOPs": "{static_same_flops[accuracy]:.3f} at {static_same_flops[blocks]:.1f}",
}


def parse_args():
    parser = options.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="+", metavar="NAME=FILE.json")
    parser.add_argument("--picture", type=Path, help="also draw them, into this file")
    return parser.parse_args()


def cells(form: dict[str, str], figures: dict | None) -> list[str]:
    """One row's part of the table, empty where it has no such figures."""
    return [text.format(**figures) if figures else "" for text in form.values()]


def print_table(rows: list[dict]) -> None:
    counted = {row.get("images") for row in rows}
    parts = [
        (COLUMNS, rows),
        (IMAGES, [row if len(counted) > 1 and row.get("images") else None for row in rows]),
        (TIMED, [row if "speed_up" in row else None for row in rows]),
        (DEPENDENCE, [row.get("dependence") for row in rows]),
    ]
    parts = [(form, found) for form, found in parts if any(found)]
    header = [title for form, _ in parts for title in form]
    lines = [sum((cells(form, found[i]) for form, found in parts), []) for i in range(len(rows))]
    print(table(header, lines))


def kind(row: dict) -> str:
    """The kind of a row, as the picture's legend names it."""
    if "kind" in row:
        return row["kind"]
    if row["model"].startswith("AIG"):
        return "ConvNet-AIG"
    if row["policy"]:
        return "static"
    return "BlockDrop" if row["load"] else "full ResNet"


def checkpoint(row: dict) -> tuple[str | None, ...]:
    """What has to be the same in rows that make a curve."""
    of = " of --val_split" if row.get("val_split") else ""
    images = f"{row.get('images')} images{of}, {row.get('precision', 'fp32')}"
    return row["model"], row["load"], row.get("base"), images


def names(checkpoints: set[tuple[str | None, ...]]) -> dict[tuple, str]:
    """What stands behind a curve's label: nothing of a single one, else what tells them apart."""
    if len(checkpoints) == 1:
        return dict.fromkeys(checkpoints, "")
    short = {one: f", {one[0]} {Path(one[1]).name}" for one in checkpoints}
    counts = Counter(short.values())
    alike = [one for one in checkpoints if counts[short[one]] > 1]
    telling = [i for i, parts in enumerate(zip(*alike, strict=True)) if i and len(set(parts)) > 1]
    return {
        one: name
        if counts[name] == 1
        else ", ".join(["", one[0], *filter(None, (one[i] for i in telling))])
        for one, name in short.items()
    }


def draw(rows: list[dict], path: Path) -> None:
    """Points of all rows, curves of those that share a checkpoint."""
    from visual import figures, published

    of_penalties = [row for row in rows if row.get("penalty") is not None]
    called = names({checkpoint(row) for row in of_penalties})
    curves, points = {}, []
    for row in rows:
        if row not in of_penalties:
            points.append((kind(row), row["name"], row["flops"], row["accuracy"]))
            continue
        whose = called[checkpoint(row)]
        curves.setdefault(f"one network{whose}", []).append((row["flops"], row["accuracy"]))
        for name, found in row.get("dependence", {}).items():
            if name in figures.OTHER_WAYS:
                point = found["flops"], found["accuracy"]
                curves.setdefault(f"{figures.OTHER_WAYS[name]}{whose}", []).append(point)
    if all(row["model"].endswith("_C10") for row in rows):
        curves |= published.ANYTIME
    figures.trade_off(points, "FLOPs an image", curves).savefig(path, dpi=160)


def read(argument: str) -> dict:
    """The row that NAME=FILE.json means."""
    name, _, file = argument.partition("=")
    if not file:
        raise UserError(f"{argument}: expected NAME=FILE.json")
    with user_errors(file):  # a file that is no JSON is a ValueError
        figures = json.loads(Path(file).read_text())
    if not isinstance(figures, dict) or "unique_policies" not in figures:
        raise UserError(f"{file}: no figures of test.py --json")
    return {"name": name, **figures}


def main() -> None:
    args = parse_args()
    rows = [read(argument) for argument in args.rows]
    print_table(rows)
    if args.picture:
        with user_errors(args.picture):
            draw(rows, args.picture)


if __name__ == "__main__":
    run_script(main)
