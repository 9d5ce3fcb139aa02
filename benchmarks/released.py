"""The released codes beside ours: the same files, images and random numbers through both.

    python benchmarks/released.py --blockdrop DIR --python27 P --aig DIR --python37 P

DIR are checkouts of Tushar-N/blockdrop and andreasveit/convnet-aig, P interpreters with torch 1.1.0
and torchvision 0.3.0; the first wants tqdm as well. Either pair may be left out. Networks are
trained here in a minute where none with a policy network at 32 pixels comes with the repository.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from measure import machine, table, write
from torch import Tensor, nn

import aig_training
import cl_training
import engine
import finetune
import models
import utils
from engine import UserError, bases, options, storage
from models import files, weights

MODELS = ("R32_C10", "R110_C10")
GATED = "AIG32_C10", storage.ROOT / "cv" / "AIG32_C10" / "target0.6"
BATCH = 64  # of the steps that are compared
FEW = 256  # images that the released code trains on
GATED_IMAGES = 500
ALL_BLOCKS = 100  # images that run in full, which say nothing new
FIGURES = ("Accuracy", "Block Usage", "FLOPs/img", "Unique Policies")


def parse_args():
    parser = options.Parser(description=__doc__)
    add = parser.add_argument
    add("--blockdrop", type=Path, help="checkout of BlockDrop's code")
    add("--python27", type=Path, help="Python 2.7 to run it by")
    add("--aig", type=Path, help="checkout of ConvNet-AIG's code")
    add("--python37", type=Path, help="Python 3.7 to run it by")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="of BlockDrop")
    add("--images", type=options.count, default=10000, help="test images to profile")
    add("--data_dir", type=Path, default=Path("data"), help="where CIFAR-10 is or is fetched to")
    add("--work", type=Path, default=Path("cv/released"), help="a new folder for its files")
    add("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    for checkout, python in (("blockdrop", "python27"), ("aig", "python37")):
        if (getattr(args, checkout) is None) != (getattr(args, python) is None):
            raise UserError(f"--{checkout} and --{python} go together")
    if args.blockdrop is None and args.aig is None:
        raise UserError("name a checkout by --blockdrop or --aig")
    if args.work.exists():
        raise UserError(f"{args.work} is there already: take it away, or name another --work")
    return args


def command(*words, **env) -> str:
    """What a program prints. Raises UserError with its last line where it fails."""
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **env},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise UserError(f"{' '.join(str(word) for word in words[1:3])}: {last}")
    return done.stdout


def ours(script: str, *arguments) -> str:
    return command(sys.executable, storage.ROOT / script, *arguments)


class Released:
    """One of the released codes, in a folder that has its scripts beside files of ours."""

    def __init__(self, call: str, checkout: Path, python: Path, folder: Path):
        self.call, self.checkout, self.python = call, checkout.resolve(), python.absolute()
        self.folder = folder
        folder.mkdir(parents=True)
        for part in checkout.resolve().iterdir():
            if part.suffix == ".py" or part.name == "models":
                (folder / part.name).symlink_to(part)

    def run(self, given: dict[str, np.ndarray], *arguments) -> tuple[str, dict[str, np.ndarray]]:
        """What a call prints and what it finds, the arrays at hand."""
        given_to, out = self.folder / "given.npz", self.folder / "found.npz"
        np.savez(given_to, **given)
        calls = Path(__file__).with_name("released_calls.py")
        words = [self.python, calls, self.call, self.checkout, given_to.name, out.name, *arguments]
        # found beside it, not below this code's own models/
        shown = command("env", "-C", self.folder.absolute(), *words)
        with np.load(out) as found:
            return shown, dict(found)


def lines(printed: str) -> dict[str, str]:
    """The four figures that test.py prints, as they are printed."""
    found = {name: re.search(rf"{name}: *(.*?) *$", printed, re.M) for name in FIGURES}
    return {name: match[1] for name, match in found.items() if match}


def row(what: str, theirs: dict[str, str], own: dict[str, str]) -> dict:
    return {"what": what, "theirs": theirs, "ours": own, "same": theirs == own}


def normalised(images: Tensor, config: models.Config) -> Tensor:
    """Bytes (N, H, W, 3) as a network gets them, (N, 3, H, W)."""
    mean, std = (torch.tensor(values)[:, None, None] for values in config.normalisation)
    return (images.permute(0, 3, 1, 2) / 255 - mean) / std


class FixedNoise(engine.Shard):
    """A whole batch whose random numbers are given."""

    def noise(self, *sizes: int, device: torch.device | None = None) -> Tensor:
        return self.given.reshape(self.total, *sizes)


def whole_batch(noise: Tensor | None, size: int) -> FixedNoise:
    shard = FixedNoise(0, size, size)
    object.__setattr__(shard, "given", noise)
    return shard


def relative(theirs: Mapping[str, np.ndarray | Tensor], own: dict[str, Tensor]) -> float:
    """Norm of the difference of all tensors of a kind over that of theirs."""
    if theirs.keys() != own.keys():
        raise UserError(f"other tensors: {sorted(theirs.keys() ^ own.keys())[:3]}")
    flat = [torch.as_tensor(theirs[name]).double().flatten() for name in theirs]
    mine = [own[name].detach().double().flatten() for name in theirs]
    flat, mine = torch.cat(flat), torch.cat(mine)
    return ((flat - mine).norm() / flat.norm()).item()


def of_kind(found: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {n.removeprefix(prefix): a for n, a in found.items() if n.startswith(prefix)}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in module.state_dict().items() if "running_" in n}


def compare(found: dict, loss: Tensor, **networks: nn.Module) -> dict[str, float]:
    """How far loss, gradients and running statistics are from theirs, relative."""
    theirs = found["losses"][-1]
    differs = {"loss": abs(loss.item() - theirs) / abs(theirs)}
    for name, network in networks.items():
        grads = of_kind(found, f"gradient/{name}/")
        if grads:
            differs[f"gradient, {name}"] = relative(grads, gradients(network))
        differs[f"statistics, {name}"] = relative(
            of_kind(found, f"buffer/{name}/"), statistics(network)
        )
    return differs


def networks(model: str, path: Path, base: Path):
    """The frozen or finetuned ResNet and the policy network of a checkpoint of ours."""
    config = models.config(model)
    found = storage.read(path)
    resnet, policy_net = models.build(model)
    bases.load_into(policy_net, found)
    if found.resnet is not None:
        bases.load_into(resnet, found)
    else:
        bases.load_base(config, str(base), resnet)
    return resnet, policy_net


def with_epoch(path: Path, epoch: int) -> Path:
    """A copy of a checkpoint in the old format that says to be of this epoch."""
    copy = path.with_name(f"epoch_{epoch}.t7")
    content = {**files.content(path), "epoch": epoch}
    torch.save(content, copy, _use_new_zipfile_serialization=False)
    return copy


class BlockDrop:
    """One model of BlockDrop: files of ours and theirs, profiled and trained a step in both."""

    def __init__(self, model: str, args):
        self.model, self.args = model, args
        self.config = models.config(model)
        self.folder = args.work / model
        self.released = Released("blockdrop", args.blockdrop, args.python27, self.folder)
        data = engine.data.DATA_SETS[self.config.dataset].read(args.data_dir, True)
        self.test = {
            "images": data["test_images"].numpy()[: args.images],
            "labels": data["test_labels"].numpy()[: args.images],
        }
        self.few = {n: data[f"train_{n}"].numpy()[:FEW] for n in ("images", "labels")}
        self.base = bases.find_base(model, None)

    def profile(self, what: str, theirs: Sequence, own: Sequence, images: int) -> dict:
        given = {name: array[:images] for name, array in self.test.items()}
        printed, _ = self.released.run(given, "test.py", "--model", self.model, *theirs)
        common = ["--model", self.model, "--data_dir", self.args.data_dir, "--device", "cpu"]
        mine = ours("test.py", *common, "--subset", images, *own)
        return {**row(what, lines(printed), lines(mine)), "images": images}

    def train_ours(self) -> tuple[Path, Path]:
        """A stage 1 and a stage 2, no longer than it takes to have policies that differ."""
        common = ["--model", self.model, "--data_dir", self.args.data_dir, "--device", "cpu"]
        common += ["--subset", 1024, "--batch_size", 128, "--policy_init", self.base]
        first, second = self.folder / "ours1", self.folder / "ours2"
        some = -(-self.config.num_blocks // 3)
        curriculum = ["--cl_step", some, "--cl_blocks", some, "--max_epochs", 6]
        ours("cl_training.py", *common, *curriculum, "--cv_dir", first)
        ours(
            *("finetune.py", *common[:-2], "--max_epochs", 1),
            *("--pretrained", first, "--cv_dir", second),
        )
        return first, second

    def handed_over(self, run: Path, name: str) -> Path:
        """Write a run of ours for the released code, its base where that looks for it."""
        written = self.folder / name
        ours("recipes/to_released.py", run, written, "--base", self.base)
        shutil.copytree(written / "cv", self.folder / "cv", dirs_exist_ok=True)
        return next(written.glob("ckpt_*.t7"))

    def train_theirs(self) -> tuple[Path, Path]:
        """The same by the released code: 11 epochs of curriculum, one of finetuning."""
        found = []
        for script, start, epochs in (("cl_training.py", None, 10), ("finetune.py", 0, 0)):
            out = self.folder / f"theirs{len(found) + 1}"
            given = ["--pretrained", found[start].absolute()] if start is not None else []
            few = ["--batch_size", 64, "--max_epochs", epochs, "--cv_dir", out.absolute()]
            self.released.run(self.few, script, "--model", self.model, *few, *given)
            found.append(sorted(out.glob("ckpt_*.t7"), key=lambda path: path.stat().st_mtime)[-1])
        return found[0], found[1]

    def step(self, stage: int, run: Path, written: Path, epoch: int, execution: str) -> dict:
        """One step of a stage, on a batch and noise that both get."""
        images = normalised(torch.from_numpy(self.few["images"][:BATCH]), self.config)
        labels = torch.from_numpy(self.few["labels"][:BATCH])
        generator = torch.Generator().manual_seed(stage)
        noise = torch.rand(BATCH, self.config.num_blocks, generator=generator)
        given = {"images": images.numpy(), "labels": labels.numpy(), "noise": noise.numpy()}
        script = {1: "cl_training.py", 2: "finetune.py"}[stage]
        out = self.folder / f"step{stage}_{epoch}"
        options = ["--batch_size", BATCH, "--max_epochs", 0, "--cv_dir", out.absolute()]
        start = ["--load", with_epoch(written, epoch).absolute()]
        _, found = self.released.run(given, script, "--model", self.model, *options, *start)

        resnet, policy_net = networks(self.model, run, self.base)
        resnet.execution = execution
        shard, labels = whole_batch(noise, BATCH), labels.long()
        images = images.contiguous(memory_format=torch.channels_last)
        policy_net.train()
        with mock.patch.object(sys, "argv", [script, *(["--pretrained", "-"] * (stage == 2))]):
            args = {1: cl_training, 2: finetune}[stage].parse_args()
        batch = (policy_net, resnet, images, labels, shard)
        if stage == 1:
            resnet.eval().requires_grad_(False)
            mask = utils.curriculum_mask(self.config.num_blocks, epoch + 2)
            loss, _ = cl_training.train_step(*batch, mask, args)
        else:
            resnet.train()
            loss, _ = finetune.train_step(*batch, args)
        loss.backward()
        return compare(found, loss, agent=policy_net, resnet=resnet)

    def measure(self) -> tuple[list[dict], dict[str, dict[str, float]]]:
        first, second = self.train_ours()
        written = self.handed_over(first, "written1"), self.handed_over(second, "written2")
        base, images = ["--base", self.base], self.args.images
        rows = [
            self.profile("stage 1, trained by ours", ["--load", written[0].absolute()],
                         ["--load", first, *base], images),
            self.profile("stage 2, trained by ours", ["--load", written[1].absolute()],
                         ["--load", second], images),
        ]  # fmt: skip
        theirs = self.train_theirs()
        for stage, path in enumerate(theirs, 1):
            what = f"stage {stage}, trained by the released code"
            load = ["--load", path.absolute()]
            rows.append(self.profile(what, load, load + base * (stage == 1), images))
        what = f"no --load: all blocks, {min(ALL_BLOCKS, images)} images"
        rows.append(self.profile(what, [], base, min(ALL_BLOCKS, images)))
        late = self.config.num_blocks + 8  # not a tenth epoch, in which it would test
        late += late % 10 == 9
        steps = {
            "stage 1, all blocks learned": self.step(1, first, written[0], late, "sparse"),
            "stage 1, the last 8 blocks": self.step(1, first, written[0], 6, "sparse"),
            "stage 2, --execution masked": self.step(2, second, written[1], late, "masked"),
            "stage 2, sparse": self.step(2, second, written[1], late, "sparse"),
        }
        return rows, steps


def measure_gated(args) -> dict[str, float]:
    """ConvNet-AIG: gates and logits in evaluation, and a training step under the same noise."""
    model, checkpoint = GATED
    config = models.config(model)
    folder = args.work / model
    released = Released("aig", args.aig, args.python37, folder)
    ours("recipes/to_released.py", checkpoint, folder)
    data = engine.data.DATA_SETS[config.dataset].read(args.data_dir, True)
    images = normalised(data["test_images"][:GATED_IMAGES], config)
    labels = data["test_labels"][:GATED_IMAGES].long()
    generator = torch.Generator().manual_seed(3)
    uniform = torch.rand(config.num_blocks, len(images), 2, generator=generator)
    noise = -(-uniform.clamp_min(1e-10).log()).log()
    given = {"images": images, "labels": labels, "noise": noise, "target": torch.tensor(0.6)}
    # in float32 rounding grows to 0.8 % of the first layers' gradients
    double = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    given = {name: tensor.numpy() for name, tensor in double.items()}
    stages = ",".join(map(str, config.stages))
    words = ["checkpoint.pth.tar", stages, config.num_classes]
    _, found = released.run(given, *words)

    net, _ = models.build(model)
    bases.load_into(net, storage.read(checkpoint))
    net, images, noise = net.double(), images.double(), noise.double()
    coming: list[Tensor] = []
    exponential = mock.patch.object(
        torch.Tensor, "exponential_", lambda self: self.copy_((-coming.pop(0)).exp())
    )
    differs = {}
    with exponential, torch.no_grad():
        net.eval()
        for kind in ("argmax", "sampled"):
            coming[:] = list(noise)
            net.sample_gates = kind == "sampled"
            logits, gates = net(images)
            other = torch.from_numpy(found[f"{kind}/gates"]) != gates
            differs[f"gates that differ, {kind}"] = int(other.sum())
            distance = (torch.from_numpy(found[f"{kind}/logits"]) - logits).abs().max().item()
            differs[f"largest distance of logits, {kind}"] = distance
    with exponential:
        net.train()
        coming[:] = list(noise)
        with mock.patch.object(sys, "argv", ["aig_training.py", "--model", model]):
            train_args = aig_training.parse_args()
        aig_training.fill_in(train_args, config)
        targets = torch.full((config.num_blocks,), 0.6, dtype=torch.float64)
        batch = (images, labels, whole_batch(None, len(images)), targets, train_args)
        loss, _ = aig_training.train_step(net, *batch)
        loss.backward()
    theirs = found["losses"][-1]
    differs["loss of a step"] = abs(loss.item() - theirs) / abs(theirs)

    for kind, prefix, own in (
        ("gradient", "gradient/resnet/", gradients(net)),
        ("statistics", "buffer/resnet/", statistics(net)),
    ):
        tensors = {n: torch.from_numpy(a) for n, a in of_kind(found, prefix).items()}
        differs[kind] = relative(weights.our_gated_names(tensors, config.stages), own)
    return differs


def show(model: str, rows: list[dict], steps: dict[str, dict[str, float]]) -> None:
    """Print a model's tables."""
    print(f"\n{model}: what test.py prints, {rows[0]['images']} images\n")
    cells = [
        [r["what"], who, *(r[side].get(name, "") for name in FIGURES)]
        for r in rows
        for who, side in (("released", "theirs"), ("ours", "ours"))
    ]
    print(table(["checkpoint", "by", *FIGURES], cells))
    print(f"\n{model}: one step, {BATCH} images, relative differences\n")
    kinds = list(dict.fromkeys(kind for step in steps.values() for kind in step))
    cells = [[what, *(f"{s[k]:.1E}" if k in s else "" for k in kinds)] for what, s in steps.items()]
    print(table(["step", *kinds], cells))


def main() -> None:
    args = parse_args()
    facts = machine()
    print(json.dumps(facts))
    figures: dict[str, object] = {"machine": facts}
    for model in args.models if args.blockdrop else ():
        rows, steps = BlockDrop(model, args).measure()
        show(model, rows, steps)
        figures[model] = {"profiles": rows, "steps": steps}
    if args.aig:
        figures[GATED[0]] = found = measure_gated(args)
        print(f"\n{GATED[0]}, {GATED_IMAGES} images\n")
        print(table(["what", "value"], [[k, f"{v:.1E}" if v else "0"] for k, v in found.items()]))
    if args.json:
        write(figures, args.json)


if __name__ == "__main__":
    engine.run_script(main)
