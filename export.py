"""Write a trained network as one ONNX file that runs one image and skips the blocks it drops.

Where an image decides, each block stands in the branch of an `If`; under a static policy dropped
blocks are not in the file. Takes bytes as a decoder gives them, (1, H, W, 3) in RGB. The file is
run against PyTorch on test images, and kept only if both agree.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import engine
from deploy import onnx_files
from engine import UserError, options, process
from engine.trained import TrainedModel
from visual import browser

TOLERANCE = 1e-4  # of logits, relative to an image's largest
NEAR = 1e-5  # a decision this near to the other outcome may fall either way
COUNTED = 5000  # training images by which --fixed goes
RUNTIME, RUNTIME_BYTES = "onnxruntime-web@1.30.0", 130_000_000
RUNTIME_FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
)
ON_PAGE = 60  # test images
SHOWN = 10  # images that are named
INPUT = "input"
TRIED = (-0.5, -5.0, -50.0)  # penalties at which a file with an input for it is tried
LEAST_SAME = 0.9  # of the images get PyTorch's class from an int8 file, or it is not kept


def penalty(text: str) -> float | str:
    """An argparse type: a penalty, or "input"."""
    return text if text == INPUT else options.no_reward(text)


def parse_args():
    parser = options.parser(__doc__, device="cpu")
    options.add_trained(parser, penalty, "; input: the file has an input for it")
    add = parser.add_argument
    add("--out", type=Path, help="the file to write")
    add(
        "--page",
        type=Path,
        help="also make this folder a page that runs the file in a browser, with npm's "
        f"{RUNTIME}; serve it by python -m http.server",
    )
    add("--force", action="store_true", help="write over --out")
    add("--check", type=options.count, default=64, help="test images that the file is tried on")
    add(
        "--int8",
        action="store_true",
        help=f"convolve in int8, with scales from {onnx_files.CALIBRATION} training images",
    )
    add(
        "--fixed",
        action="store_true",
        help=f"blocks that {COUNTED} training images all keep, or all drop, are run, or left out, "
        "for every image",
    )
    add("--opset", type=options.count, default=17, help="version of ONNX's operators")
    add("--batch_size", type=options.count, default=250, help="images a step in PyTorch")
    args = parser.parse_args()
    if args.page and not args.out:
        args.out = args.page / "model.onnx"
    args.penalties = (args.penalty,)
    if args.penalty == INPUT:
        args.penalty, args.penalties = TRIED[0], TRIED
    args.penalty_input = len(args.penalties) > 1
    return args


def refuse(args) -> None:
    """What can be known before any work is done."""
    if args.precision != "fp32":
        raise UserError(f"--precision {args.precision}: a file holds fp32, a runtime may round it")
    if args.subset:
        raise UserError("--subset: --check says on how many images the file is tried")
    if args.fixed and args.penalty_input:
        raise UserError("--fixed: blocks that do not vary at one penalty do at another")
    if args.out is None:
        raise UserError("name the file to write with --out, or a folder for a page with --page")
    if args.page and args.int8:
        raise UserError("--page shows the float32 file: leave --int8 out")
    if args.out.exists() and not args.force:
        raise UserError(f"{args.out} is there already: take another name, or --force")
    if args.page:
        with engine.user_errors(args.page):
            args.page.mkdir(parents=True, exist_ok=True)
    if not args.out.parent.is_dir():
        raise UserError(f"{args.out}: there is no directory {args.out.parent}")


def check(
    content: bytes,
    trained: TrainedModel,
    test,
    int8: bool = False,
    penalty: float | None = None,
    fixed: Sequence[bool | None] = (),
) -> dict:
    """Compare the file, at a penalty if it has an input for it, with PyTorch; say what it gives.

    Raises UserError where policies differ, or logits by more than TOLERANCE; images with a decision
    within NEAR of the other outcome are not compared, but named. An int8 file is another network:
    it has to find PyTorch's classes on most images. Of no image PyTorch may decide otherwise about
    the blocks that are `fixed`.
    """
    found = onnx_files.compare(content, trained.resnet, trained.policy, test, penalty)
    count = len(found["policy"])
    near = (found["margin"] < NEAR) & (not int8)
    if int8:
        wrong = ~found["same_class"]
        allowed = (1 - LEAST_SAME) * count
    else:
        wrong = ~(found["same_policy"] & (found["difference"] <= TOLERANCE)) & ~near
        allowed = 0
    otherwise = onnx_files.against_fixed(found.pop("pytorch_policy"), fixed) & ~near
    if otherwise.any():
        raise UserError(
            f"{otherwise.sum()} of {count} images decide otherwise about the blocks of --fixed "
            f"({named(otherwise.nonzero()[:, 0].tolist())}): nothing is written"
        )
    if wrong.sum() > allowed:
        rows = wrong.nonzero()[:, 0].tolist()
        raise UserError(
            f"ONNX Runtime and PyTorch differ on {len(rows)} of {count} images ({named(rows)}): "
            "nothing is written"
        )
    means = {name: part.double().mean().item() for name, part in found.items() if part.ndim == 1}
    compared = found["difference"][~near]
    return {
        "images": count,
        "accuracy": means["correct"],
        "mean_blocks": found["policy"].sum(1).double().mean().item(),
        "same_classes": means["same_class"],
        "same_policies": means["same_policy"],
        "largest_difference": compared.max().item() if len(compared) else 0.0,
        "near": near.nonzero()[:, 0].tolist(),
        "kept": found["policy"].long().sum(0).tolist(),
    }


def named(rows: list[int]) -> str:
    """Test images by their numbers, the first few."""
    return ", ".join(map(str, rows[:SHOWN])) + (", ..." if len(rows) > SHOWN else "")


def metadata(
    args,
    trained: TrainedModel,
    class_names: list[str],
    figures: Sequence[dict],
    fixed: Sequence[bool | None] | None = None,
    seen: int = 0,
) -> dict[str, str]:
    """What the file says of itself; with an input for the penalty its figures are by penalty.

    fixed: by so many training images as were `seen`.
    """
    config, side = trained.config, trained.config.image_size
    image = f"uint8 RGB, {side}x{side}"
    if config.has_pictures:
        image += f", short side resized to {side * 256 // 224} with antialiasing, centre crop"
    is_full = trained.kind == "full ResNet"
    networks = nn.ModuleList(filter(None, (trained.resnet, trained.policy)))
    facts = {
        "model": config.name,
        "image": image,
        "policy": trained.policy_name or ("full" if is_full else "each image's own"),
        "penalty": INPUT if args.penalty_input else args.penalty,
        "arithmetic": "int8" if args.int8 else "float32",
        "classes": json.dumps(list(class_names)),
        "weights_sha256": engine.bases.fingerprint(networks),
        "checked_images": figures[0]["images"],
        "checked_on": f"{args.val_split} held-out training images" if args.val_split else "test",
    }
    if fixed is not None:
        facts["fixed"] = (
            f"as {seen} training images all do, every image keeps blocks "
            f"{numbers(fixed, True)} and drops {numbers(fixed, False)}, counted from 0"
        )
    for name in ("accuracy", "mean_blocks"):
        values = [found[name] for found in figures]
        by_penalty = dict(zip(map(str, args.penalties), values, strict=True))
        facts[name] = json.dumps(by_penalty) if args.penalty_input else values[0]
    if args.load:
        path = engine.storage.newest(Path(args.load))
        facts["checkpoint"] = path.name
        facts["checkpoint_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {name: str(value) for name, value in facts.items() if value is not None}


def training_images(config, args, trained: TrainedModel, last: int) -> Iterator[Tensor]:
    """Batches of so many of the last training images, as an evaluation sees them, without those
    that `--val_split` holds out.
    """
    held_out = args.val_split or 0
    asked = argparse.Namespace(**vars(args) | {"val_split": last + held_out})
    _, counted = engine.data.load(config, asked, trained.device, training=False)
    left = last
    for images, _, _ in counted.epoch(0):
        yield images[:left]
        left -= len(images)
        if left <= 0:  # what --val_split holds out comes last
            return


def numbers(fixed: Sequence[bool | None], value: bool) -> str:
    return ", ".join(str(k) for k, known in enumerate(fixed) if known is value) or "none"


def main() -> None:
    args = parse_args()
    engine.ranks.refuse_several("export.py")
    refuse(args)
    process.need("onnx", "onnxruntime")
    config = engine.data.config_of(args)
    engine.seed_everything(args.seed)
    trained = TrainedModel(args, config)
    if args.int8 or args.fixed:
        train, _ = engine.data.load(config, args, trained.device)
    ranges = fixed = None
    seen = 0
    if args.int8:
        tried = args.penalties if args.penalty_input else ()
        ranges = onnx_files.calibrate(trained.resnet, trained.policy, train, tried)
    if args.fixed:
        seen = min(COUNTED, train.num_images - 1)
        if seen < 1:
            there = train.num_images
            raise UserError(f"--fixed has no training images to go by: there are {there}")
        batches = training_images(config, args, trained, seen)
        fixed = onnx_files.fixed_blocks(trained.resnet, trained.policy, batches)
    with engine.user_errors(args.model):
        model = onnx_files.build(
            trained.resnet, trained.policy, config, args.opset, ranges, args.penalty_input, fixed
        )
    args.subset = args.check
    _, test = engine.data.load(config, args, trained.device, training=False)
    trained.tell_accuracy(test)
    content = model.SerializeToString()
    asked = args.penalties if args.penalty_input else (None,)
    figures = [check(content, trained, test, args.int8, penalty, fixed or ()) for penalty in asked]
    for key, value in metadata(args, trained, test.class_names, figures, fixed, seen).items():
        model.metadata_props.add(key=key, value=value)
    content = model.SerializeToString()
    engine.storage.write_whole(content, args.out)
    print(f"    {args.out}: {len(content) / 2**20:.1f} MiB")
    if args.page:
        write_page(args, trained, test, content)
    for penalty, found in zip(asked, figures, strict=True):
        if penalty is not None:
            print(f"    Penalty {penalty:g}:")
        tell(found, args.int8)


def write_page(args, trained: TrainedModel, test, content: bytes) -> None:
    """A folder with a page that runs the file in the browser, and all that the page loads."""
    config, rows = trained.config, range(min(ON_PAGE, test.num_images))
    fixed, per_block = trained.flops()
    resnet_fixed, _ = trained.resnet_flops()
    labels = torch.cat([labels for _, labels, _ in test.epoch(0)])[: len(rows)]
    facts = {
        "about": f"Trained on {config.dataset}. It runs in this browser: no picture leaves it.",
        "classes": list(test.class_names),
        "size": config.image_size,
        "resized": config.image_size * 256 // 224 if config.has_pictures else config.image_size,
        "stages": config.stages,
        "penalty_input": args.penalty_input,
        "fixed_flops": fixed,
        "block_flops": per_block.tolist(),
        "full_flops": resnet_fixed + per_block.sum().item(),
    }
    images = np.stack([test.picture(row) for row in rows])
    title = f"{config.name}: blocks that a picture needs"
    page = browser.page(title, facts, images, labels.tolist(), config.image_size <= 64)
    with engine.user_errors(args.page):
        (args.page / "ort").mkdir(parents=True, exist_ok=True)
        (args.page / "index.html").write_text(page)
        if args.out != args.page / "model.onnx":
            engine.storage.write_whole(content, args.page / "model.onnx")
        if not all((args.page / "ort" / name).exists() for name in RUNTIME_FILES):
            with engine.npm.unpacked(RUNTIME, RUNTIME_BYTES, args.page) as package:
                for name in RUNTIME_FILES:
                    shutil.copy(package / "dist" / name, args.page / "ort" / name)
    print(f"    {args.page}: python -m http.server --directory {args.page}")


def tell(figures: dict, int8: bool) -> None:
    """Print what a file gives."""
    print(
        f"    Accuracy: {figures['accuracy']:.3f} on {figures['images']} images\n"
        f"    Block Usage: {figures['mean_blocks']:.3f}"
    )
    print(f"    Blocks kept by so many images: {' '.join(map(str, figures['kept']))}")
    if int8:
        print(
            f"    As in PyTorch: {figures['same_classes']:.3f} of the classes, "
            f"{figures['same_policies']:.3f} of the policies"
        )
    else:
        print(f"    Logits differ by at most {figures['largest_difference']:.1E} from PyTorch's")
    if figures["near"]:
        print(
            f"    Not compared: {len(figures['near'])} images whose decisions are within {NEAR} of "
            f"falling otherwise ({named(figures['near'])})"
        )


if __name__ == "__main__":
    engine.run_script(main)
