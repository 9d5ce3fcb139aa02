"""Command-line options that the scripts share."""

import argparse
import re
from collections.abc import Callable

from torch import Tensor

import models
import utils
from models import Config

from .process import UserError, user_errors


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that tells the defaults of the options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default is None or "(default" in (action.help or "")
        return action.help if told else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage text."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Help, allow_abbrev=False, **kwargs)
        # argparse takes -1e-1 for an option otherwise
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.I)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists all options)")


def number(kind: type, accepts: Callable[[float], bool], needed: str) -> Callable[[str], float]:
    """An argparse type: a number of a kind, within limits that `needed` puts in words."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {needed}")
        return value

    return parse


def device_name(text: str) -> str:
    """An argparse type: cpu, cuda or one GPU by its number."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or cuda:N")
    return text


def normalisation(text: str) -> list[list[float]]:
    """An argparse type: mean and deviation of three channels, in [0, 1]."""
    known = {"imagenet": "R50_ImgNet", "none": "R110_C10"}
    if text in known:
        return models.config(known[text]).normalisation
    try:
        mean, deviation = ([float(v) for v in part.split(",")] for part in text.split("/"))
        if len(mean) == len(deviation) == 3 and all(0 < v <= 1 for v in deviation):
            if all(0 <= v <= 1 for v in mean):
                return [mean, deviation]
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(
        f"{text!r} is not imagenet, none or R,G,B/R,G,B with numbers in [0, 1]"
    )


count = number(int, lambda n: n >= 1, "a whole number of 1 or more")
amount = number(int, lambda n: n >= 0, "a whole number of 0 or more")
seed = number(int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2^63 - 1")
side = number(int, lambda n: n >= 64, "a whole number of 64 or more")
positive = number(float, lambda v: 0 < v < float("inf"), "a number above 0")
weight = number(float, lambda v: 0 <= v < float("inf"), "a number of 0 or more")
no_reward = number(
    float, lambda v: float("-inf") < v <= 0, "a number of 0 or below, what a wrong class earns"
)
negative = number(float, lambda v: float("-inf") < v < 0, "a number below 0")
fraction = number(float, lambda v: 0 <= v < 1, "a number in [0, 1)")
alpha = number(float, lambda v: 0.5 < v <= 1, "in (0.5, 1]")


def parser(description: str, model: str = "R110_C10", device: str | None = None) -> Parser:
    """A parser with what every script takes: model, data, device, arithmetic, quick looks."""
    options = Parser(description=description)
    add = options.add_argument
    add("--model", default=model, help=f"network and data set, such as {model}")
    add("--data_dir", default="data/", help="where the data set is, or is to be downloaded to")
    add(
        "--precision",
        choices=("fp32", "tf32", "bf16"),
        default="fp32",
        help="arithmetic; tf32 is fp32 in which GPUs round what they multiply, bf16 autocasts",
    )
    where = "a GPU if there is one" if device is None else device
    add(
        "--device", type=device_name, default=device, help=f"cpu, cuda or cuda:N (default: {where})"
    )
    add(
        "--workers",
        type=amount,
        help="processes that read picture files (default: a processor each, 16 at most, shared by "
        "the ranks of a host)",
    )
    add("--seed", type=seed, default=0, help="seed of all random numbers")
    add("--subset", type=count, help="train and evaluate on the first N images, for a quick look")
    add(
        "--val_split",
        type=amount,
        default=0,
        help="evaluate on the last N training images (pictures: N drawn once) and leave them out "
        "of training",
    )
    add("--image_size", type=side, help="side of the pictures of a _Folder model (default: 224)")
    add(
        "--skip_data_check",
        action="store_true",
        help="accept CIFAR files that are not the published data set, such as a relabelled copy",
    )
    return options


def add_base(options: Parser) -> None:
    options.add_argument(
        "--base", help="pretrained ResNet (default: the one in cv/pretrained/<model>/)"
    )
    add_base_pixels(options, "--base")


def add_base_pixels(options: Parser, file: str) -> None:
    options.add_argument(
        "--base_pixels",
        type=normalisation,
        metavar="MEAN/DEVIATION",
        help=f"how pixels were normalised for a ResNet of other code in {file}: imagenet, none "
        "([0, 1]), or six numbers R,G,B/R,G,B",
    )


def add_static(options: Parser) -> None:
    options.add_argument(
        "--policy",
        help="static baseline first:K, random:K[:SEED], distribute:K, late:K or, by stages, 2-3-5, "
        "not the policy network",
    )


def add_chosen_penalty(options: Parser, kind: Callable = no_reward, more: str = "") -> None:
    options.add_argument(
        "--penalty",
        type=kind,
        help="choose policies for this reward of a wrong prediction, where the checkpoint comes "
        f"from cl_training.py --warm_start or finetune.py --penalties{more}",
    )


def add_trained(options: Parser, penalty: Callable = no_reward, more: str = "") -> None:
    """What names a trained network; see `engine.trained.TrainedModel`.

    penalty: the type of --penalty, of which `more` is said.
    """
    add_base(options)
    add_static(options)
    add_chosen_penalty(options, penalty, more)
    options.add_argument(
        "--load", help="stage-1, stage-2 or AIG checkpoint, or the cv_dir that holds last.t7"
    )


def static_policy(name: str | None, config: Config, seed: int) -> Tensor | None:
    """The (K,) policy that --policy names; None without a name."""
    if name is None:
        return None
    with user_errors(f"--policy {name}"):
        return utils.static_policy(name, config.stages, seed)


def add_training(
    options: Parser, lr: float, wd: float, max_epochs: int, cv_dir: str = "cv/tmp/"
) -> None:
    """What every training script takes, and what it says of the default of --cv_dir."""
    add = options.add_argument
    add("--lr", type=positive, default=lr, help="learning rate")
    add("--wd", type=weight, default=wd, help="weight decay")
    add("--load", help="continue this run: a checkpoint, or the run's directory")
    add("--cv_dir", help=f"where checkpoints and logs go (default: that of --load, or {cv_dir})")
    add("--batch_size", type=count, default=256, help="images a step")
    add("--max_epochs", type=count, default=max_epochs, help="epochs in all, resumed ones included")
    add(
        "--parallel",
        action="store_true",
        help="use all GPUs of this machine, or without one a process a core, as torchrun would",
    )
    add("--sync_bn", action="store_true", help="BatchNorm over the images of all GPUs")
    add(
        "--deterministic",
        action="store_true",
        help="have a GPU compute the same bits each time, as a CPU does, which costs time",
    )
    add("--micro_batch", type=count, help="images at a time on each device, to save memory")
    add("--resume", action="store_true", help="go on with the run in --cv_dir if there is one")
    add("--save_minutes", type=positive, default=10, help="write last.t7 that often in an epoch")
    add("--test_every", type=count, default=10, help="evaluate and save every so many epochs")


def add_policy_stage(options: Parser, epoch_step: int, penalty: float) -> None:
    """The schedule of the two policy stages, and what their reward needs."""
    options.set_defaults(lr_steps=None, warmup=0.0)
    add = options.add_argument
    add(
        "--schedule",
        choices=("step", "cosine"),
        default="step",
        help="of the learning rate: steps as released, or a cosine to zero behind the last epoch",
    )
    add("--penalty", type=no_reward, default=penalty, help="reward of a wrong prediction, -gamma")
    add(
        "--epoch_step",
        type=count,
        default=epoch_step,
        help="epochs between learning-rate steps, in stage 1 from the end of a warm start",
    )
    add("--lr_decay_ratio", type=positive, default=0.1, help="learning-rate factor at a step")
    add(
        "--execution",
        choices=("sparse", "masked"),
        default="sparse",
        help="compute blocks for the images that keep them, or for all and mask, as released",
    )
    add("--alpha", type=alpha, default=0.8, help="keeps probabilities within [1 - alpha, alpha]")
