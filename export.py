"""Write a trained network as one ONNX file that runs one image and skips the blocks it drops.

Where an image decides, each block stands in the branch of an `If`; under a static policy dropped
blocks are not in the file. Takes bytes as a decoder gives them, (1, H, W, 3) in RGB. The file is
run against PyTorch on test images, and kept only if both agree.
"""

import hashlib
import json
from pathlib import Path

from torch import nn

import engine
from deploy import onnx_files
from engine import UserError, options, process
from engine.trained import TrainedModel

TOLERANCE = 1e-4  # of logits, relative to an image's largest
NEAR = 1e-5  # a decision this near to the other outcome may fall either way
SHOWN = 10  # images that are named
LEAST_SAME = 0.9  # of the images get PyTorch's class from an int8 file, or it is not kept


def parse_args():
    parser = options.parser(__doc__)
    options.add_trained(parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the file to write")
    add("--force", action="store_true", help="write over --out")
    add("--check", type=options.count, default=64, help="test images that the file is tried on")
    add(
        "--int8",
        action="store_true",
        help=f"convolve in int8, with scales from {onnx_files.CALIBRATION} training images",
    )
    add("--opset", type=options.count, default=17, help="version of ONNX's operators")
    add("--batch_size", type=options.count, default=250, help="images a step in PyTorch")
    parser.set_defaults(device="cpu")
    return parser.parse_args()


def refuse(args) -> None:
    """What can be known before any work is done."""
    if args.precision != "fp32":
        raise UserError(f"--precision {args.precision}: a file holds fp32, a runtime may round it")
    if args.subset:
        raise UserError("--subset: --check says on how many images the file is tried")
    if args.out.exists() and not args.force:
        raise UserError(f"{args.out} is there already: take another name, or --force")
    if not args.out.parent.is_dir():
        raise UserError(f"{args.out}: there is no directory {args.out.parent}")


def check(content: bytes, trained: TrainedModel, test, int8: bool = False) -> dict:
    """Compare the file with PyTorch, and say what it gives.

    Raises UserError where policies differ, or logits by more than TOLERANCE; images with a decision
    within NEAR of the other outcome are not compared, but named. An int8 file is another network:
    it has to find PyTorch's classes on most images.
    """
    found = onnx_files.compare(content, trained.resnet, trained.policy, test)
    count = len(found["policy"])
    near = (found["margin"] < NEAR) & (not int8)
    if int8:
        wrong = ~found["same_class"]
        allowed = (1 - LEAST_SAME) * count
    else:
        wrong = ~(found["same_policy"] & (found["difference"] <= TOLERANCE)) & ~near
        allowed = 0
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
    }


def named(rows: list[int]) -> str:
    """Test images by their numbers, the first few."""
    return ", ".join(map(str, rows[:SHOWN])) + (", ..." if len(rows) > SHOWN else "")


def metadata(args, trained: TrainedModel, class_names: list[str], figures: dict) -> dict[str, str]:
    """What the file says of itself."""
    config, side = trained.config, trained.config.image_size
    image = f"uint8 RGB, {side}x{side}"
    if config.has_pictures:
        image += f", short side resized to {side * 256 // 224} with antialiasing, centre crop"
    networks = nn.ModuleList(filter(None, (trained.resnet, trained.policy)))
    facts = {
        "model": config.name,
        "image": image,
        "policy": trained.policy_name or ("full" if is_full(trained) else "each image's own"),
        "penalty": args.penalty,
        "arithmetic": "int8" if args.int8 else "float32",
        "classes": json.dumps(list(class_names)),
        "weights_sha256": engine.bases.fingerprint(networks),
        "checked_images": figures["images"],
        "accuracy": figures["accuracy"],
        "mean_blocks": figures["mean_blocks"],
    }
    if args.load:
        path = engine.storage.newest(Path(args.load))
        facts["checkpoint"] = path.name
        facts["checkpoint_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {name: str(value) for name, value in facts.items() if value is not None}


def is_full(trained: TrainedModel) -> bool:
    return not (trained.policy_name or trained.looks or trained.resnet.decides)


def main() -> None:
    args = parse_args()
    engine.ranks.refuse_several("export.py")
    refuse(args)
    process.need("onnx", "onnxruntime")
    config = engine.data.config_of(args)
    engine.seed_everything(args.seed)
    trained = TrainedModel(args, config)
    ranges = None
    if args.int8:
        train, _ = engine.data.load(config, args, trained.device)
        ranges = onnx_files.calibrate(trained.resnet, trained.policy, train)
    with engine.user_errors(args.model):
        model = onnx_files.build(trained.resnet, trained.policy, config, args.opset, ranges)
    args.subset = args.check
    _, test = engine.data.load(config, args, trained.device, training=False)
    trained.tell_accuracy(test)
    figures = check(model.SerializeToString(), trained, test, args.int8)
    for key, value in metadata(args, trained, test.class_names, figures).items():
        model.metadata_props.add(key=key, value=value)
    content = model.SerializeToString()
    engine.storage.write_whole(content, args.out)
    print(
        f"    {args.out}: {len(content) / 2**20:.1f} MiB\n"
        f"    Accuracy: {figures['accuracy']:.3f} on {figures['images']} images\n"
        f"    Block Usage: {figures['mean_blocks']:.3f}"
    )
    if args.int8:
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
