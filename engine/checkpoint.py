"""Reading and writing checkpoint files."""

import hashlib
import io
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .process import UserError, user_errors

ROOT = Path(__file__).resolve().parent.parent
LAST = "last.t7"
CHECKSUM = "checksum"
NETWORKS = ("agent", "net", "resnet", "state_dict", "correctness")


def read(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint, in torch's zip or pre-zip format, onto the CPU without running its code.

    A directory stands for the last.t7 in it or, where there is none, as in those that come with the
    repository, for its only checkpoint. Raises UserError naming the file and what is wrong.
    """
    path = newest(Path(path))
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with warnings.catch_warnings():  # of pickle protocols, which other programs' files have
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"{path}: may not be read (permission denied)") from error
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL\s+(\S+)|[Uu]nsupported (?:class|operand)\s+(\S+)", str(error))
        if named:
            reason = f"its pickle wants to run code ({named[1] or named[2]}), which is never done"
        else:
            reason = "no checkpoint, or a damaged one"
        raise UserError(f"{path}: {reason}") from error
    except Exception as error:  # torch.load raises anything at all on damaged files
        raise UserError(f"{path}: truncated, damaged or no checkpoint") from error
    if not well_formed(content):
        raise UserError(f"{path}: readable, but no checkpoint of this method or of a ResNet")
    content = dict(content)
    written = content.pop(CHECKSUM, None)
    if written is not None and written != digest(content):
        raise UserError(f"{path}: damaged, its content does not match its checksum")
    return content


def newest(path: Path) -> Path:
    """The file that a run's directory stands for, which may not be there; a file is itself."""
    if not path.is_dir():
        return path
    last = path / LAST
    named = [] if last.exists() else [*path.glob("ckpt_*.t7"), *path.glob("pk_*.t7")]
    return named[0] if len(named) == 1 else last


def well_formed(content: Any) -> bool:
    """Whether what stands under the names of a checkpoint is of the kind it has to be."""
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        return False
    kinds = {
        "epoch": int,
        "args": Mapping,
        "stage": int,
        "base": str,
        "targets": list,
        "normalisation": list,
        "policy_size": int,
        "steps_done": int,
        "partial": Mapping,
    }
    if not all(isinstance(content[name], kind) for name, kind in kinds.items() if name in content):
        return False
    networks = [content[name] for name in NETWORKS if name in content]
    return all(is_state(network) for network in networks)


def is_state(value: Any) -> bool:
    """Whether a value is a state dict: tensors by name."""
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    )


def write(content: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint; see `write_whole`."""
    buffer = io.BytesIO()
    torch.save({**content, CHECKSUM: digest(content)}, buffer)
    write_whole(buffer.getbuffer(), path)


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


def digest(value: Any) -> str:
    """SHA-256 of nested mappings, sequences, tensors and plain values."""
    hasher = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            hasher.update(f"{value.dtype}{tuple(value.shape)}".encode())
            raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            hasher.update(raw.numpy().data)
        elif isinstance(value, Mapping):
            for key, part in value.items():
                hasher.update(f"{key!r}:".encode())
                add(part)
        elif isinstance(value, (list, tuple)):
            for part in value:
                add(part)
        else:
            hasher.update(repr(value).encode())

    add(value)
    return hasher.hexdigest()
