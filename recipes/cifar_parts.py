"""Carry CIFAR-10 to a machine without a network, in files below 50 MB.

    python recipes/cifar_parts.py pack FOLDER        where data/CIFAR10.pt is, into FOLDER
    python recipes/cifar_parts.py join FOLDER        there, from FOLDER into data/CIFAR10.pt

data/CIFAR10.pt is what any training leaves in its --data_dir. The parts may come one by one, `join`
says which are not there yet.
"""

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine  # noqa: E402
from engine import UserError, run_script  # noqa: E402

PART = 45_000_000  # bytes
LIST = "CIFAR10.json"  # the parts' names and SHA-256


def parse_args():
    parser = engine.options.Parser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("action", choices=("pack", "join"))
    add("folder", type=Path, help="of the parts")
    add("--file", type=Path, default=Path("data/CIFAR10.pt"), help="the data set")
    return parser.parse_args()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def pack(file: Path, folder: Path, size: int = PART) -> list[Path]:
    """Cut a file into parts of at most `size` bytes, beside a list of them."""
    with engine.user_errors(file):
        content = file.read_bytes()
    digests = {}
    with engine.user_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number, start in enumerate(range(0, len(content), size)):
            part = content[start : start + size]
            name = f"{file.name}.{number:02}"
            (folder / name).write_bytes(part)
            digests[name] = sha256(part)
        (folder / LIST).write_text(json.dumps(digests, indent=1) + "\n")
    return [folder / name for name in digests]


def join(folder: Path, file: Path) -> None:
    """Put the parts together. Raises UserError naming one that is missing or damaged."""
    with engine.user_errors(folder / LIST):
        digests = json.loads((folder / LIST).read_text())
    missing = [name for name in digests if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: {', '.join(missing)} of {len(digests)} parts not there yet")
    parts = {name: (folder / name).read_bytes() for name in digests}
    for name, part in parts.items():
        if sha256(part) != digests[name]:
            raise UserError(f"{folder / name}: damaged (SHA-256 differs): bring it again")
    with engine.user_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = file.with_name(f".{file.name}.tmp")
        whole.write_bytes(b"".join(parts.values()))
        whole.replace(file)


def main() -> None:
    args = parse_args()
    if args.action == "pack":
        for path in pack(args.file, args.folder):
            print(path)
    else:
        join(args.folder, args.file)
        print(args.file)


if __name__ == "__main__":
    run_script(main)
