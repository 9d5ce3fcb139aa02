"""One table from figures that test.py wrote: summary.py NAME=FILE.json [NAME=FILE.json ...]"""

import json
import sys
from pathlib import Path

from measure import table

COLUMNS = {
    "": "{name}",
    "accuracy": "{accuracy:.3f}",
    "blocks": "{block_usage:.2f} ± {block_usage_std:.2f}",
    "FLOPs/img": "{flops:.2E} ± {flops_std:.2E}",
    "policies": "{unique_policies}",
}
SPEED = {"images/s": "{images_per_second:.0f}"}
TIMED = {"ms/img": "{ms_per_image:.3f}", "speed-up": "{speed_up:.2f}"}  # of test.py --time


if __name__ == "__main__":
    pairs = [argument.partition("=")[::2] for argument in sys.argv[1:]]
    rows = [{"name": name, **json.loads(Path(file).read_text())} for name, file in pairs]
    columns = COLUMNS | (TIMED if all("speed_up" in row for row in rows) else SPEED)
    print(table(list(columns), [[form.format(**row) for form in columns.values()] for row in rows]))
