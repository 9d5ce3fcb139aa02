"""Copy what belongs into the repository from a finished run: the checkpoint without optimizer
states, its options, command and figures.

    python recipes/release.py RUN FOLDER                  RUN is a --cv_dir
    python recipes/release.py RUN FOLDER --half           weights in half precision
    python recipes/release.py RUN FOLDER --base FILE      of stage 1, where its base is halved
"""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine  # noqa: E402
import models  # noqa: E402
from engine import UserError, bases, run_script, storage, user_errors  # noqa: E402

LEFT_OUT = ("optimizer", "resnet_optimizer", "steps_done", "partial")
NETWORKS = ("agent", "resnet", "state_dict")


def parse_args():
    parser = engine.options.Parser(description=__doc__)
    add = parser.add_argument
    add("run", type=Path, help="a finished run's --cv_dir")
    add("folder", type=Path, help="where to copy it")
    add("--half", action="store_true", help="keep convolutions and linear layers in half precision")
    add("--base", help="the base ResNet as it is shipped, which a stage-1 checkpoint then names")
    return parser.parse_args()


def halved(content: Mapping[str, Any]) -> dict[str, Any]:
    """The weights that fill a file in half precision; BatchNorm and biases as they are, whose
    ranges it would not hold.
    """

    def half(state):
        return {
            n: t.half() if t.ndim > 1 and t.is_floating_point() else t for n, t in state.items()
        }

    return {n: half(part) if n in NETWORKS else part for n, part in content.items()}


def named_base(content: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A stage-1 checkpoint that names the base ResNet in `path` as its own."""
    resnet, _ = models.build(content["model"])
    bases.load_into(resnet, storage.read(path))
    return {**content, "base": bases.fingerprint(resnet)}


def main() -> None:
    args = parse_args()
    last = storage.read(args.run)
    named = [p for p in args.run.glob("*.t7") if f"_E_{last.epoch}_" in p.name]
    if len(named) != 1:
        raise UserError(f"{args.run}: no checkpoint of its last epoch, or several")
    content = storage.content(named[0])
    kept = {name: part for name, part in content.items() if name not in LEFT_OUT}
    kept = halved(kept) if args.half else kept
    kept = named_base(kept, args.base) if args.base else kept
    with user_errors(args.folder):
        args.folder.mkdir(parents=True, exist_ok=True)
        for name in ("args.txt", "command.txt", "metrics.jsonl"):
            shutil.copy(args.run / name, args.folder / name)
    storage.write(kept, args.folder / named[0].name)
    print(args.folder / named[0].name)


if __name__ == "__main__":
    run_script(main)
