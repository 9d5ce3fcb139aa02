"""Write a checkpoint, and the base ResNet it needs, as the released Python 2.7 code reads them.

    python recipes/to_released.py CHECKPOINT FOLDER               the base as test.py finds it
    python recipes/to_released.py CHECKPOINT FOLDER --base FILE

FOLDER gets the checkpoint and cv/pretrained/<model>/ with the base under the name that the released
code asks for. A checkpoint of ConvNet-AIG becomes one of its released code, without a base.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import engine  # noqa: E402
import models  # noqa: E402
from engine import UserError, bases, run_script, user_errors  # noqa: E402

# what get_model of the released utils.py opens
BASES = {
    "R32_C10": "pk_E_164_A_0.923.t7",
    "R110_C10": "pk_E_130_A_0.932.t7",
    "R32_C100": "pk_E_164_A_0.693.t7",
    "R110_C100": "pk_E_160_A_0.723.t7",
    "R101_ImgNet": "ImageNet_R101_224_76.464",
}


def parse_args():
    parser = engine.options.Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", help="of this code: stage 1, 2 or ConvNet-AIG, a file or a run's --cv_dir")
    add("folder", type=Path, help="where to write")
    add("--base", help="the base ResNet (default: the only one in cv/pretrained/<model>/)")
    return parser.parse_args()


def plain(network: nn.Module) -> dict[str, Tensor]:
    """A network's tensors in float32, without BatchNorm's step counts, which the reader of bases
    does not know.
    """
    return {
        name: tensor.to(torch.float32, copy=True)
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def layered(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A flat ResNet's tensors under the names of torchvision and of felixgwu's CIFAR ResNets."""

    def renamed(name: str) -> str:
        name = re.sub(r"^blocks\.(\d+)\.", lambda m: f"layer{int(m[1]) + 1}.", name)
        return re.sub(r"^ds\.(\d+)\.", lambda m: f"layer{int(m[1]) + 1}.0.downsample.", name)

    return {renamed(name): tensor for name, tensor in state.items()}


def gated_layers(net: models.GatedResNet) -> dict[str, Tensor]:
    """The tensors of a ConvNet-AIG as its released code saves them from nn.DataParallel."""
    resnet = layered(plain(net.resnet))
    found = {
        re.sub(r"^fc\.", "linear.", name.replace(".downsample.", ".shortcut.")): tensor
        for name, tensor in resnet.items()
    }
    places = [
        f"layer{s + 1}.{b}" for s, part in enumerate(net.resnet.blocks) for b in range(len(part))
    ]
    for place, gate in zip(places, net.gates, strict=True):
        for name, tensor in plain(gate).items():
            if tensor.ndim == 2:  # there the linear layers are 1x1 convolutions
                tensor = tensor[:, :, None, None]
            found[f"{place}.{name}"] = tensor
    return {f"module.{name}": tensor for name, tensor in found.items()}


def check(found: models.Checkpoint, config: models.Config) -> None:
    """Refuse what the released code cannot run. Raises UserError."""
    model, path = config.name, found.path
    if found.policy is None:
        what = "a static policy" if found.static_policy else "no policy network"
        raise UserError(f"{path}: has {what}, without which the released code runs nothing")
    if found.policy_size != 32 and not config.has_pictures:
        raise UserError(
            f"{path}: its policy network looks at {found.policy_size} pixels, the released one at "
            "32: train with --policy_size 32"
        )
    if model not in BASES:
        raise UserError(f"{model}: the released code knows {', '.join(BASES)}")
    if found.shortcuts != "pool":
        raise UserError(f"{path}: its shortcuts leave out pixels, the released ones average them")
    if found.normalisation not in (None, config.normalisation):
        raise UserError(
            f"{path}: learned from pixels normalised by {bases.shown_pixels(found.normalisation)}, "
            f"the released code has {bases.shown_pixels(config.normalisation)}"
        )


def save(content: dict, path: Path) -> None:
    """Write a file that torch before 1.6 reads."""
    with user_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path, _use_new_zipfile_serialization=False)
    print(path)


def write_gated(found: models.Checkpoint, config: models.Config, folder: Path) -> None:
    """A ConvNet-AIG."""
    net, _ = models.build(config.name, config.num_classes)
    bases.load_into(net, found)
    content = {"epoch": found.epoch + 1, "state_dict": gated_layers(net), "best_prec1": 0.0}
    save(content, folder / "checkpoint.pth.tar")
    if config.name not in ("AIG110_C10", "AIG50_ImgNet", "AIG101_ImgNet", "AIG152_ImgNet"):
        shape = ", ".join(map(str, config.stages))
        print(f"its own scripts build no such network: take ResNet_cifar(BasicBlock, [{shape}])")


def write_stage(
    found: models.Checkpoint, config: models.Config, folder: Path, base: str | None
) -> None:
    """A stage 1 or 2 of BlockDrop and its base."""
    check(found, config)
    resnet, policy_net = models.build(config.name, config.num_classes)
    bases.load_into(policy_net, found)
    content = {"agent": plain(policy_net), "epoch": found.epoch, "reward": 0.0, "acc": 0.0}
    if found.resnet is not None:
        bases.load_into(resnet, found)
        content["resnet"] = plain(resnet)
    if found.resnet is None or base:
        bases.load_base(config, base, resnet)
        if found.resnet is None:
            bases.check_base(found, resnet)
    save(content, folder / f"ckpt_E_{found.epoch}.t7")
    # of a stage 2 the released code reads a base as well, and overwrites it
    state = {"state_dict": layered(plain(resnet))}
    save(state, folder / "cv" / "pretrained" / config.name / BASES[config.name])


def main() -> None:
    args = parse_args()
    found = engine.storage.read(args.checkpoint)
    if found.stage == 0:
        raise UserError(f"{args.checkpoint}: a ResNet alone: name the checkpoint that runs on it")
    if found.model is None:
        raise UserError(
            f"{args.checkpoint}: names no model: is it one of the released code already?"
        )
    with user_errors(args.checkpoint):
        config = models.config(found.model)
    if found.stage == 3:
        write_gated(found, config, args.folder)
    else:
        write_stage(found, config, args.folder, args.base)


if __name__ == "__main__":
    run_script(main)
