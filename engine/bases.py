"""From a file to a network: find a base, refuse another model's, fetch published weights."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import models
from models import Checkpoint, Config

from . import ranks, storage
from .process import UserError, user_errors

WEIGHTS = {".t7", ".pt", ".pth", ".ckpt", ".bin", ".safetensors"}  # endings of files

Normalisation = Sequence[Sequence[float]]  # mean and deviation of three channels


def base_directory(model: str) -> Path:
    """Where the pretrained ResNets of a model are kept."""
    return storage.ROOT / "cv" / "pretrained" / model


def find_base(
    model: str, given: str | None, is_published: bool = False, option: str = "--base"
) -> Path | None:
    """The pretrained ResNet: the one given, or the only one in cv/pretrained/<model>/, named as
    `pretrain.py` does or in any way.

    None where there is none but torchvision publishes one. Raises UserError, saying how to get
    one, when there is none at all or a choice, by `option`, is needed.
    """
    if given is not None and not is_pretrained_directory(Path(given)):
        return Path(given)
    folder = Path(given or base_directory(model))
    found = sorted(folder.glob("pk_E_*_A_*.t7"))
    if not found and not (folder / storage.LAST).exists():  # of no run that is under way
        found = sorted(path for path in folder.glob("*") if path.suffix in WEIGHTS)
    if not found and is_published and given is None:
        return None
    if not found:
        raise UserError(
            f"no pretrained ResNet for {model} in {shown(folder)}: train one with "
            f"`python pretrain.py --model {model}`, or name a file with {option}"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"several ResNets in {shown(folder)} ({names}): choose with {option}")
    return found[0]


def is_pretrained_directory(path: Path) -> bool:
    """Whether a directory holds pretrained ResNets, or nothing, and no run."""
    if not path.is_dir() or (path / storage.LAST).exists():
        return False
    return any(path.glob("pk_E_*_A_*.t7")) or not any(path.glob("*.t7"))


def keep_base(folder: str | Path) -> None:
    """Refuse to train a base where there is one already: the stages could not tell them apart."""
    found = sorted(Path(folder).glob("pk_E_*_A_*.t7"))
    if found:
        raise UserError(f"{shown(found[0])} is there already: train another in its own --cv_dir")


def shown(path: Path) -> Path:
    """A path as a user would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def pretrained(config: Config, given: str, pixels: Normalisation | None) -> Checkpoint:
    """The ResNet that `--pretrained` names, of any number of classes; see `for_pixels`."""
    plain = f"R{config.depth}_{config.name.partition('_')[2]}"  # what pretrain.py makes
    path = find_base(plain, given, option="--pretrained")
    return for_pixels(config, storage.read(path), pixels)


def for_pixels(
    config: Config, found: Checkpoint, pixels: Normalisation | None = None
) -> Checkpoint:
    """A ResNet as a model's pixels want it, where it learned from pixels normalised in another way.

    pixels: mean and deviation of those, where the file does not say or says something else.
    """
    if found.resnet is None:
        raise UserError(found.without_resnet)
    theirs = pixels or found.normalisation
    if theirs in (None, config.normalisation):
        return found
    try:
        state = models.for_pixels(found.resnet, theirs, config.normalisation)
    except (KeyError, RuntimeError):  # no such tensor, or one of another shape
        raise UserError(f"{found.path}: holds no ResNet for images of three channels") from None
    return replace(found, resnet=state, normalisation=config.normalisation)


def read_for(config: Config, path: str | Path, pixels: Normalisation | None = None) -> Checkpoint:
    """Read a checkpoint of a model, and say so where it learned from other pixels.

    A ResNet alone is changed for this model's; see `for_pixels`, also for `pixels`.
    """
    found = read_model(config, path)
    tell_other_size(config, found)
    if found.policy is None and found.stage != 3:
        return for_pixels(config, found, pixels)
    tell_other_pixels(config, found)
    return found


def read_model(config: Config, path: str | Path) -> Checkpoint:
    """Read a checkpoint and refuse it when it says, or its tensors show, that it is for another
    model.
    """
    found = storage.read(path)
    blocks = found.num_blocks or config.num_blocks
    if (found.model or config.name) != config.name or blocks != config.num_blocks:
        named = f"{found.model} ({blocks} blocks)" if found.model else f"{blocks} blocks"
        raise UserError(f"{path} is for {named}, not {config.name} ({config.num_blocks})")
    return found


def tell_other_size(config: Config, found: Checkpoint) -> None:
    """Say so where a file's network learned from a folder's pictures at another --image_size."""
    given = found.args
    if config.dataset != "Folder" or "image_size" not in given or not ranks.is_main():
        return
    theirs = given["image_size"] or models.config(config.name).image_size
    if theirs != config.image_size:
        print(
            f"{found.path}: learned from pictures of {theirs} x {theirs} pixels, looks at "
            f"{config.image_size} x {config.image_size} here: --image_size {theirs} is its own",
            file=sys.stderr,
        )


def tell_other_pixels(config: Config, found: Checkpoint) -> None:
    """Say so where a file's network learned from pixels that were normalised in another way."""
    own, theirs = config.normalisation, found.normalisation
    if theirs not in (None, own) and ranks.is_main():
        print(
            f"{found.path}: learned from pixels of mean and deviation {shown_pixels(theirs)}, "
            f"where {config.name} has {shown_pixels(own)}: it starts from less than it knew",
            file=sys.stderr,
        )


def load_into(network: nn.Module, found: Checkpoint) -> None:
    """See `Checkpoint.load_into`. Raises UserError."""
    with user_errors():
        found.load_into(network)


def shown_pixels(normalisation: list[list[float]]) -> str:
    return " / ".join(",".join(f"{value:.3g}" for value in values) for values in normalisation)


def load_base(
    config: Config, given: str | None, resnet: models.ResNet, pixels: Normalisation | None = None
) -> None:
    """Load the base ResNet from `given` or from cv/pretrained/; pixels: see `for_pixels`.

    An ImageNet model without one takes torchvision's.
    """
    path = find_base(config.name, given, config.dataset == "ImageNet")
    if path is None:
        folder = shown(base_directory(config.name))
        way_out = f"name a file with --base, or put one into {folder}"
        models.load_resnet(resnet, torchvision_resnet(config.depth, way_out))
    else:
        load_into(resnet, for_pixels(config, read_model(config, path), pixels))


def check_base(found: Checkpoint, resnet: nn.Module) -> None:
    """Refuse a stage-1 checkpoint whose policy was learned on another base ResNet."""
    if not is_of_base(found, resnet):
        raise UserError(
            f"{found.path}: its policy was learned on another base ResNet: name it with --base"
        )


def is_of_base(found: Checkpoint, resnet: nn.Module) -> bool:
    """Whether a policy was learned on this base ResNet, as far as its checkpoint says."""
    return found.base in (None, fingerprint(resnet))


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over the names and bytes of all tensors: the same weights, the same fingerprint.

    Shortcuts without weights count where they are not the usual ones.
    """
    kinds = {getattr(part, "shortcuts", None) for part in module.modules()} - {None, "pool"}
    digest = hashlib.sha256("".join(kinds).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def torchvision_resnet(depth: int, way_out: str) -> dict[str, torch.Tensor]:
    """ResNet weights IMAGENET1K_V1, from torch's cache or downloaded into it.

    Raises UserError, ending in `way_out`, where they cannot be had.
    """
    from torchvision.models import get_model_weights  # slow to import, and CIFAR does without

    weights = get_model_weights(f"resnet{depth}").IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"torchvision's ResNet-{depth} weights cannot be fetched ({reason}): {way_out}"
        ) from error
