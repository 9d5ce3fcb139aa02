"""Copy what belongs into the repository from a finished run: the checkpoint without optimizer
states, its options, command and figures.

    python recipes/release.py RUN FOLDER     RUN is a --cv_dir
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import UserError, checkpoint, run_script  # noqa: E402

LEFT_OUT = ("optimizer", "resnet_optimizer", "steps_done", "partial")


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("expected RUN FOLDER: a finished run's --cv_dir and where to copy it")
    run, folder = map(Path, sys.argv[1:])
    last = checkpoint.read(run)
    named = [p for p in run.glob("*.t7") if f"_E_{last['epoch']}_" in p.name]
    if len(named) != 1:
        raise UserError(f"{run}: no checkpoint of its last epoch, or several")
    content = checkpoint.read(named[0])
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: part for name, part in content.items() if name not in LEFT_OUT}
    checkpoint.write(kept, folder / named[0].name)
    for name in ("args.txt", "command.txt", "metrics.jsonl"):
        shutil.copy(run / name, folder / name)
    print(folder / named[0].name)


if __name__ == "__main__":
    run_script(main)
