"""Reading and writing checkpoint files."""

import hashlib
import io
import os
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import published
from .errors import UserError, about
from .spec import Spec

ROOT = Path(__file__).resolve().parent.parent
LAST = "last.t7"
CHECKSUM = "checksum"
NETWORKS = ("agent", "net", "resnet", "state_dict")


def read(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint, in torch's zip or pre-zip format, onto the CPU without running its code.

    A directory stands for the last.t7 in it. Raises UserError naming the file and what is wrong.
    """
    path = Path(path)
    if path.is_dir():
        path = path / LAST
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
    """Write a checkpoint so that at any moment the file is the old one or the new one, whole.

    Raises UserError when it cannot be written; the old file then stays as it was.
    """
    path = Path(path)
    buffer = io.BytesIO()
    torch.save({**content, CHECKSUM: digest(content)}, buffer)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with about(path):
        try:
            with open(partial, "wb") as file:
                file.write(buffer.getbuffer())
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


def base_directory(model: str) -> Path:
    """Where the pretrained ResNets of a model are kept."""
    return ROOT / "cv" / "pretrained" / model


def find_base(model: str, given: str | None, is_published: bool = False) -> Path | None:
    """The pretrained ResNet: the one given, or the only one in cv/pretrained/<model>/.

    None where there is none but torchvision publishes one. Raises UserError, saying how to get
    one, when there is none at all or a choice is needed.
    """
    if given is not None and not is_pretrained_directory(Path(given)):
        return Path(given)
    folder = Path(given or base_directory(model))
    found = sorted(folder.glob("pk_E_*_A_*.t7"))
    if not found and is_published:
        return None
    if not found:
        raise UserError(
            f"no pretrained ResNet for {model} in {shown(folder)}: train one with "
            f"`python pretrain.py --model {model}`, or name a file with --base"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"several ResNets in {shown(folder)} ({names}): choose with --base")
    return found[0]


def is_pretrained_directory(path: Path) -> bool:
    """Whether a directory holds pretrained ResNets and no run."""
    return path.is_dir() and not (path / LAST).exists()


def keep_base(folder: str | Path) -> None:
    """Refuse to train a base where there is one already: the stages could not tell them apart."""
    found = sorted(Path(folder).glob("pk_E_*_A_*.t7"))
    if found:
        raise UserError(f"{shown(found[0])} is there already: train another in its own --cv_dir")


def shown(path: Path) -> Path:
    """A path as a user would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def resnet_weights(content: Mapping[str, Any], path: str | Path) -> Mapping[str, torch.Tensor]:
    """The ResNet's tensors in a pretrained file or stage-2 checkpoint."""
    for key in ("state_dict", "resnet", "model"):
        if is_state(content.get(key)):
            return content[key]
    if content and is_state(content):
        return content  # bare, as torchvision publishes it
    if "agent" in content:
        raise UserError(f"{path}: a stage-1 checkpoint, which holds no ResNet")
    raise UserError(f"{path}: holds no ResNet (neither state_dict nor resnet)")


def policy_weights(content: Mapping[str, Any], path: str | Path) -> Mapping[str, torch.Tensor]:
    """The policy network's tensors, under the released code's newer or older key."""
    for key in ("agent", "net"):
        if key in content:
            return content[key]
    what = "a pretrained ResNet" if "state_dict" in content else "no BlockDrop checkpoint"
    raise UserError(f"{path}: {what}, without a policy network (neither agent nor net)")


def read_for(spec: Spec, path: str | Path) -> dict[str, Any]:
    """Load a checkpoint and refuse it when it says, or its policy shows, that it is for another
    model than `spec`.
    """
    content = read(path)
    other = content.get("model")
    other = other if isinstance(other, str) else None
    blocks = blocks_of(content) or spec.num_blocks
    if (other or spec.name) != spec.name or blocks != spec.num_blocks:
        named = f"{other} ({blocks} blocks)" if other else f"{blocks} blocks"
        raise UserError(f"{path} is for {named}, not {spec.name} ({spec.num_blocks})")
    return content


def policy_bias(content: Mapping[str, Any]) -> torch.Tensor | None:
    """The bias of a policy network's head, one number a block; None where there is no such network,
    as in files of other codes, which keep a ResNet under `net`.
    """
    policy = content.get("agent") or content.get("net") or {}
    return next((t for n, t in policy.items() if n.endswith("logit.bias")), None)


def blocks_of(content: Mapping[str, Any]) -> int:
    """The number of residual blocks that a checkpoint's tensors show; 0 where they show none."""
    bias = policy_bias(content)
    if bias is not None:
        return bias.numel()
    names = content.get("state_dict") or content.get("resnet") or content
    found = (re.search(r"(?:blocks\.|layer)(\d+\.\d+)\.conv1", str(name)) for name in names)
    return len({match[1] for match in found if match})


def load_base(spec: Spec, given: str | None, resnet: nn.Module, load: Callable) -> None:
    """Load the base ResNet by `load(resnet, tensors)`, from `given` or from cv/pretrained/.

    An ImageNet model without one takes torchvision's.
    """
    path = find_base(spec.name, given, spec.dataset == "ImageNet")
    if path is None:
        way_out = f"name a file with --base, or put one into {shown(base_directory(spec.name))}"
        load(resnet, published.resnet(spec.depth, way_out))
        return
    content = read_for(spec, path)
    with about(path):
        load(resnet, resnet_weights(content, path))


def is_of_base(content: Mapping[str, Any], resnet: nn.Module) -> bool:
    """Whether a policy was learned on this base ResNet, as far as its checkpoint says."""
    return content.get("base") in (None, fingerprint(resnet))


def check_base(content: Mapping[str, Any], path: str | Path, resnet: nn.Module) -> None:
    """Refuse a stage-1 checkpoint whose policy was learned on another base ResNet."""
    if not is_of_base(content, resnet):
        raise UserError(
            f"{path}: its policy was learned on another base ResNet: name that one with --base"
        )


def static_policy_of(content: Mapping[str, Any]) -> str | None:
    """The static policy, such as first:10, that a checkpoint was finetuned under."""
    return content.get("args", {}).get("policy")


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over the names and bytes of all tensors: the same weights, the same fingerprint."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
