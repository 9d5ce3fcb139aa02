"""What a checkpoint file holds, read without running its code."""

import argparse
import hashlib
import pathlib
import pickle
import re
import types
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

LAST = "last.t7"
CHECKSUM = "checksum"
NETWORKS = ("agent", "net", "resnet", "state_dict", "correctness")
# of this code's entries; in a file of another one they are left out where they are of another kind
KINDS = {
    "epoch": int,
    "args": Mapping,
    "stage": int,
    "base": str,
    "targets": list,
    "class_names": list,
    "normalisation": list,
    "policy_size": int,
    "shortcuts": str,
    "steps_done": int,
    "partial": Mapping,
}
SAVE_ALONE = "where it was written, save the weights alone: torch.save(model.state_dict(), FILE)"


def harmless() -> list:
    """Classes that other programs' files hold beside the weights, and that do nothing by being
    made; torch.load refuses them otherwise.
    """
    paths = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    pure = {n: pathlib.PurePosixPath if "Posix" in n else pathlib.PureWindowsPath for n in paths}
    scalar = np.float64(0).__reduce__()[0]
    return [
        *(argparse.Namespace, types.SimpleNamespace),
        (plain, "collections.defaultdict"),  # into which torch.load would put nothing
        *(list, dict, set, tuple, int, float, str),  # of which it would make its values
        # under the names of all versions, and as paths that this system can hold
        *((kind, f"{module}.{n}") for n, kind in pure.items()
          for module in ("pathlib", "pathlib._local")),
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
        *(np.dtype, *(getattr(np.dtypes, name) for name in np.dtypes.__all__)),
    ]  # fmt: skip


def plain(*_: object) -> dict:
    return {}


def content(path: str | Path) -> dict[str, Any]:
    """What a file holds, in torch's zip or pre-zip format or in that of safetensors, on the CPU.

    Raises ValueError naming the file and what is wrong.
    """
    path = newest(Path(path))
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        with open(path, "rb") as file:
            begin = file.read(9)
        if begin[8:] == b"{":  # after the header's length
            return {"state_dict": safe_tensors(path)}
        if begin[:4] in (b"\x03\0\0\0", b"\x04\0\0\0"):  # a table, an object
            raise ValueError(f"{path}: a file of Lua's Torch7: convert it, as with torchfile")
        with warnings.catch_warnings():  # of pickle protocols, which other programs' files have
            warnings.simplefilter("ignore")
            with torch.serialization.safe_globals(harmless()):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise ValueError(f"{path}: may not be read (permission denied)") from error
    except ValueError:
        raise
    except Exception as error:  # torch.load raises anything at all on damaged files
        raise ValueError(f"{path}: {reason(path, error)}") from error
    if not is_well_formed(content):
        raise ValueError(f"{path}: readable, but no checkpoint of this method or of a ResNet")
    content = dict(content)
    written = content.pop(CHECKSUM, None)
    if written is not None and written != digest(content):
        raise ValueError(f"{path}: damaged, its content does not match its checksum")
    return content


def reason(path: Path, error: Exception) -> str:
    """Why torch.load does not read a file."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any("/code/" in name for name in archive.namelist()):
                return f"a TorchScript program, not weights: {SAVE_ALONE}"
    if isinstance(error, pickle.UnpicklingError):
        named = re.search(r"GLOBAL\s+(\S+)|[Uu]nsupported (?:class|operand)\s+(\S+)", str(error))
        if named:
            wanted = named[1] or named[2]
            return f"its pickle wants to run code ({wanted}), which is never done: {SAVE_ALONE}"
        return "no checkpoint, or a damaged one"
    return "truncated, damaged or no checkpoint"


def safe_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file. Raises ValueError where it is damaged or the package is missing."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError(f"{path}: to read it, pip install safetensors") from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, damaged or no checkpoint ({error})") from error


def newest(path: Path) -> Path:
    """The file that a run's directory stands for: the last.t7 in it or, where there is none, as in
    those that come with the repository, its only checkpoint. It may not be there. A file is itself.
    """
    if not path.is_dir():
        return path
    last = path / LAST
    named = [] if last.exists() else [*path.glob("ckpt_*.t7"), *path.glob("pk_*.t7")]
    return named[0] if len(named) == 1 else last


def is_well_formed(content: Any) -> bool:
    """Whether what stands under the names of a checkpoint is of the kind it has to be."""
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        return False
    own = KINDS if "agent" in content else {}
    if not all(isinstance(content[name], kind) for name, kind in own.items() if name in content):
        return False
    return all(
        is_state(content[name])
        for name in NETWORKS
        if name in content
        # where other codes may have a network's name
        and not (name == "net" and isinstance(content[name], str))
    )


def is_state(value: Any) -> bool:
    """Whether a value is a state dict: tensors by name."""
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    )


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
