"""One table from figures that test.py wrote: summary.py NAME=FILE.json [NAME=FILE.json ...]"""

import json
import sys
from pathlib import Path

COLUMNS = {
    "": "{name}",
    "accuracy": "{accuracy:.3f}",
    "blocks": "{block_usage:.2f} ± {block_usage_std:.2f}",
    "FLOPs/img": "{flops:.2E} ± {flops_std:.2E}",
    "policies": "{unique_policies}",
    "images/s": "{images_per_second:.0f}",
}


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table, columns aligned."""
    cells = [list(COLUMNS)] + [[form.format(**row) for form in COLUMNS.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


if __name__ == "__main__":
    pairs = [argument.partition("=")[::2] for argument in sys.argv[1:]]
    print(table([{"name": name, **json.loads(Path(file).read_text())} for name, file in pairs]))
