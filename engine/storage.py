"""Checkpoint files for scripts: what is wrong with one is told in a line, and none is half written.

`models.checkpoint` says what a file holds.
"""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from models import Checkpoint, files
from models.files import CHECKSUM, LAST, digest, newest

from .process import user_errors

__all__ = ["LAST", "ROOT", "Checkpoint", "content", "digest", "newest", "read", "write"]

ROOT = Path(__file__).resolve().parent.parent


def read(path: str | Path) -> Checkpoint:
    """See `Checkpoint.read`. Raises UserError."""
    with user_errors():
        return Checkpoint.read(path)


def content(path: str | Path) -> dict[str, Any]:
    """What a file that `write` wrote holds; see `models.files.content`. Raises UserError."""
    with user_errors():
        return files.content(path)


def write(content: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint; see `write_whole`."""
    buffer = io.BytesIO()
    torch.save({**content, CHECKSUM: digest(content)}, buffer)
    with buffer.getbuffer() as view:  # let go of before an error is told, as Python 3.13 wants it
        write_whole(view, path)


def write_whole(content: bytes | memoryview, path: str | Path) -> None:
    """Write a file so that at any moment it is the old one or the new one, whole.

    Raises UserError when it cannot be written; the old file then stays as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with user_errors(path):
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
