"""From a file to a network: find a base, read known layouts, fetch published weights."""

import hashlib
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

import models
from models import Config

from . import checkpoint, options, ranks
from .process import UserError, user_errors


def base_directory(model: str) -> Path:
    """Where the pretrained ResNets of a model are kept."""
    return checkpoint.ROOT / "cv" / "pretrained" / model


def find_base(
    model: str, given: str | None, is_published: bool = False, option: str = "--base"
) -> Path | None:
    """The pretrained ResNet: the one given, or the only one in cv/pretrained/<model>/.

    None where there is none but torchvision publishes one. Raises UserError, saying how to get
    one, when there is none at all or a choice, by `option`, is needed.
    """
    if given is not None and not is_pretrained_directory(Path(given)):
        return Path(given)
    folder = Path(given or base_directory(model))
    found = sorted(folder.glob("pk_E_*_A_*.t7"))
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
    """Whether a directory holds pretrained ResNets and no run."""
    return path.is_dir() and not (path / checkpoint.LAST).exists()


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
        if checkpoint.is_state(content.get(key)):
            return content[key]
    if content and checkpoint.is_state(content):
        return content  # bare, as torchvision publishes it
    if "agent" in content:
        raise UserError(f"{path}: a stage-1 checkpoint, which holds no ResNet")
    raise UserError(f"{path}: holds no ResNet (neither state_dict nor resnet)")


def pretrained_weights(config: Config, given: str) -> tuple[Path, Mapping[str, torch.Tensor]]:
    """The ResNet that `--pretrained` names, of any number of classes: its file and tensors."""
    plain = config.name.replace("AIG", "R")  # what pretrain.py makes
    path = find_base(plain, given, option="--pretrained")
    return path, start_weights(config, checkpoint.read(path), path)


def start_weights(
    config: Config, content: Mapping[str, Any], path: str | Path
) -> Mapping[str, torch.Tensor]:
    """A ResNet's tensors to start a model from, whose pixels may be normalised in another way."""
    state, theirs = resnet_weights(content, path), pixels_of(content)
    if theirs in (None, pixels(config)):
        return state
    try:
        return models.for_pixels(state, theirs, pixels(config))
    except (KeyError, RuntimeError):  # no such tensor, or one of another shape
        raise UserError(f"{path}: holds no ResNet for images of three channels") from None


def policy_weights(content: Mapping[str, Any], path: str | Path) -> Mapping[str, torch.Tensor]:
    """The policy network's tensors, under the released code's newer or older key."""
    for key in ("agent", "net"):
        if key in content:
            return content[key]
    what = "a pretrained ResNet" if "state_dict" in content else "no BlockDrop checkpoint"
    raise UserError(f"{path}: {what}, without a policy network (neither agent nor net)")


def read_for(config: Config, path: str | Path) -> dict[str, Any]:
    """Load a checkpoint and refuse it when it says, or its policy shows, that it is for another
    model.
    """
    content = checkpoint.read(path)
    other = content.get("model")
    other = other if isinstance(other, str) else None
    blocks = blocks_of(content) or config.num_blocks
    if (other or config.name) != config.name or blocks != config.num_blocks:
        named = f"{other} ({blocks} blocks)" if other else f"{blocks} blocks"
        raise UserError(f"{path} is for {named}, not {config.name} ({config.num_blocks})")
    tell_other_pixels(config, content, path)
    tell_other_size(config, content, path)
    return content


def tell_other_size(config: Config, content: Mapping[str, Any], path: str | Path) -> None:
    """Say so where a file's network learned from a folder's pictures at another --image_size."""
    given = content.get("args", {})
    if config.dataset != "Folder" or "image_size" not in given or not ranks.is_main():
        return
    theirs = given["image_size"] or models.config(config.name).image_size
    if theirs != config.image_size:
        print(
            f"{path}: learned from pictures of {theirs} x {theirs} pixels, looks at "
            f"{config.image_size} x {config.image_size} here: --image_size {theirs} is its own",
            file=sys.stderr,
        )


def tell_other_pixels(config: Config, content: Mapping[str, Any], path: str | Path) -> None:
    """Say so where a file's network learned from pixels that were normalised in another way."""
    own, theirs = pixels(config), pixels_of(content)
    if theirs not in (None, own) and ranks.is_main():
        print(
            f"{path}: learned from pixels of mean and deviation {shown_pixels(theirs)}, where "
            f"{config.name} has {shown_pixels(own)}: it starts from less than it knew",
            file=sys.stderr,
        )


def pixels(config: Config) -> list[list[float]]:
    """Mean and standard deviation by which a model's pixels are normalised."""
    return [list(config.mean), list(config.std)]


def pixels_of(content: Mapping[str, Any]) -> list[list[float]] | None:
    """The same of a file's network; None where it says nothing."""
    theirs = content.get("normalisation")
    if theirs is None and isinstance(content.get("model"), str):
        with suppress(ValueError):  # another code's name
            theirs = pixels(models.config(content["model"]))
    return theirs


def shown_pixels(normalisation: list[list[float]]) -> str:
    return " / ".join(",".join(f"{value:.3g}" for value in values) for values in normalisation)


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


def load_into(network: nn.Module, content: Mapping[str, Any], path: str | Path) -> None:
    """Load a network from a checkpoint's content, by what kind of network it is.

    Raises UserError naming the file and the tensor that is missing, extra or wrongly shaped.
    """
    if isinstance(network, models.Confidence):
        load, state = models.load_strictly, content["correctness"]
    elif isinstance(network, models.PolicyNet):
        load, state = models.load_policy, policy_weights(content, path)
        if network.size is not None:
            with user_errors(path):
                network.look_at(content.get("policy_size", 32))  # files before it say nothing
    else:
        gated = isinstance(network, models.GatedResNet)
        load = models.load_gated if gated else models.load_resnet
        state = resnet_weights(content, path)
    with user_errors(path):
        load(network, state)


def can_choose(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's policy network chooses for any penalty: it holds the head for that,
    and has not gone on since they learned together.
    """
    last = content.get("args", {}).get("warm_start", float("inf"))
    return "correctness" in content and content.get("epoch", 0) <= last


def load_confidence(
    config: Config, content: Mapping[str, Any], path: str | Path, policy_net: models.PolicyNet
) -> models.Confidence:
    """The head by which a policy network chooses for any penalty.

    Raises UserError where the checkpoint has none, or one that the policy network has gone on from.
    """
    way_out = (
        "take the checkpoint of the last epoch of cl_training.py --warm_start, or one of "
        "finetune.py --penalties"
    )
    if "correctness" not in content:
        raise UserError(f"{path}: its policy cannot choose for another penalty: {way_out}")
    if not can_choose(content):
        raise UserError(
            f"{path}: its policy has gone on since it could choose for another penalty: {way_out}"
        )
    head = models.build_confidence(config, policy_net)
    load_into(head, content, path)
    return head


def load_base(config: Config, given: str | None, resnet: models.ResNet) -> None:
    """Load the base ResNet from `given` or from cv/pretrained/.

    An ImageNet model without one takes torchvision's.
    """
    path = find_base(config.name, given, config.dataset == "ImageNet")
    if path is None:
        folder = shown(base_directory(config.name))
        way_out = f"name a file with --base, or put one into {folder}"
        models.load_resnet(resnet, torchvision_resnet(config.depth, way_out))
    else:
        load_into(resnet, read_for(config, path), path)


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
    args = content.get("args", {})
    return options.with_seed(args.get("policy"), args.get("seed", 0))


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over the names and bytes of all tensors: the same weights, the same fingerprint."""
    digest = hashlib.sha256()
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
