"""Write a trained network as one ONNX file that runs one image and skips the blocks it drops.

Where an image decides, each block stands in the branch of an `If`; under a static policy dropped
blocks are not in the file. Takes bytes as a decoder gives them, (1, H, W, 3) in RGB. The file is
run against PyTorch on test images, and kept only if both agree.
"""

import hashlib
import json
from importlib import import_module
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import engine
import models
import utils
from engine import UserError, options
from engine.trained import TrainedModel
from models import quantization

TOLERANCE = 1e-4  # of logits, relative to an image's largest
NEAR = 1e-5  # a decision this near to the other outcome may fall either way
SHOWN = 10  # images that are named
CALIBRATION = 512  # training images that show int8 its scales
LEAST_SAME = 0.9  # of the images get PyTorch's class from an int8 file, or it is not kept


def parse_args():
    parser = options.parser(__doc__)
    options.add_base(parser)
    options.add_static(parser)
    add = parser.add_argument
    add("--load", help="stage-1, stage-2 or AIG checkpoint, or the cv_dir that holds last.t7")
    add(
        "--penalty",
        type=options.finite,
        help="choose policies for this reward of a wrong prediction, where the checkpoint comes "
        "from cl_training.py --warm_start",
    )
    add("--out", type=Path, required=True, help="the file to write")
    add("--force", action="store_true", help="write over --out")
    add("--check", type=options.count, default=64, help="test images that the file is tried on")
    add(
        "--int8",
        action="store_true",
        help=f"convolve in int8, with scales from {CALIBRATION} training images",
    )
    add("--opset", type=options.count, default=17, help="version of ONNX's operators")
    add("--batch_size", type=options.count, default=250, help="images a step in PyTorch")
    parser.set_defaults(device="cpu")
    args = parser.parse_args()
    if args.precision != "fp32":
        raise UserError(f"--precision {args.precision}: a file holds fp32, a runtime may round it")
    if args.out.exists() and not args.force:
        raise UserError(f"{args.out} is there already: take another name, or --force")
    if not args.out.parent.is_dir():
        raise UserError(f"{args.out}: there is no directory {args.out.parent}")
    return args


def need(*packages: str) -> None:
    """Refuse to go on without packages that training does without."""
    for package in packages:
        try:
            import_module(package)
        except ImportError:
            raise UserError(
                f"the package {package} is not there: pip install -r requirements-export.txt"
            ) from None


def onnx_of(trained: TrainedModel, opset: int, ranges=None):
    """The ONNX model of what was trained; see `models.onnx_graph.build`."""
    import onnx

    from models import onnx_graph

    networks = trained.resnet, trained.policy_net, trained.static
    with engine.user_errors("--opset"):
        model = onnx_graph.build(*networks, trained.config, opset, ranges)
    onnx.checker.check_model(model, full_check=True)
    return model


def calibrate(trained: TrainedModel, train) -> quantization.Ranges:
    """What the networks meet on some training images, under their own policies."""
    batches = -(-CALIBRATION // train.batch_size)
    images = (images for images, _, _ in islice(train.epoch(0), batches))
    networks = filter(None, (trained.resnet, trained.policy_net))
    return quantization.observe(networks, trained.run, images)


def session(content: bytes):
    """ONNX Runtime on a file's content, with as many threads as PyTorch has."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])


class Margins:
    """How near, in probability, each image's nearest decision is to the other outcome.

    Watches the networks while they run; `take` gives those of the last batch, (B,).
    """

    def __init__(self, trained: TrainedModel):
        self.found: list[Tensor] = []
        net = trained.policy_net
        if isinstance(trained.resnet, models.GatedResNet):
            for gate in trained.resnet.gates:
                self.watch(gate, lambda z: (z.softmax(1)[:, 1] - 0.5).abs())
        elif isinstance(net, models.PolicyAtPenalty):
            self.watch(net.correctness, lambda z: lead(z, net))
        elif net is not None:
            self.watch(net.logit, lambda z: (z.sigmoid() - 0.5).abs().amin(1))

    def watch(self, module: nn.Module, margin) -> None:
        module.register_forward_hook(lambda _, __, output: self.found.append(margin(output)))

    def take(self, count: int) -> Tensor:
        found, self.found = self.found, []
        return torch.stack(found).amin(0) if found else torch.ones(count)


def lead(logits: Tensor, net: models.PolicyAtPenalty) -> Tensor:
    """By how much the best candidate's expected reward leads, (B, C) to (B,)."""
    candidates = net.correctness.candidates
    best = utils.expected_reward(logits.sigmoid(), candidates, net.penalty).topk(2).values
    return best[:, 0] - best[:, 1]


def compare(content: bytes, trained: TrainedModel, test) -> dict[str, Tensor]:
    """Run the file and PyTorch on the same N images.

    Returns policies (N, K) and whether the class is right (N,) as the file has them; the largest
    difference of logits, relative to the largest logit, whether policy and class are the same, and
    the margins, all (N,).
    """
    run, margins = session(content), Margins(trained)
    parts: dict[str, list[Tensor]] = {}
    done = 0
    for images, labels, _ in test.epoch(0):
        with torch.no_grad():
            logits, policy = trained.run(images)
        rows = [
            run.run(["logits", "policy"], {"image": test.picture(done + row)[None]})
            for row in range(len(images))
        ]
        done += len(images)
        theirs, their_policy = (
            torch.from_numpy(np.concatenate(r)) for r in zip(*rows, strict=True)
        )
        found = {
            "policy": their_policy,
            "correct": theirs.argmax(1) == labels,
            "difference": (theirs - logits).abs().amax(1) / logits.abs().amax(1),
            "same_policy": (their_policy == policy).all(1),
            "same_class": theirs.argmax(1) == logits.argmax(1),
            "margin": margins.take(len(images)),
        }
        for name, part in found.items():
            parts.setdefault(name, []).append(part)
    return {name: torch.cat(part) for name, part in parts.items()}


def check(content: bytes, trained: TrainedModel, test, int8: bool = False) -> dict:
    """Compare the file with PyTorch, and say what it gives.

    Raises UserError where policies differ, or logits by more than TOLERANCE; images with a decision
    within NEAR of the other outcome are not compared, but named. An int8 file is another network:
    it has to find PyTorch's classes on most images.
    """
    found = compare(content, trained, test)
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
    networks = nn.ModuleList(filter(None, (trained.resnet, trained.policy_net)))
    facts = {
        "model": config.name,
        "image": image,
        "policy": trained.policy_name or ("full" if is_full(trained) else "each image's own"),
        "penalty": args.penalty,
        "arithmetic": "int8" if args.int8 else "float32",
        "classes": json.dumps(list(class_names)),
        "weights_sha256": engine.weights.fingerprint(networks),
        "checked_images": figures["images"],
        "accuracy": figures["accuracy"],
        "mean_blocks": figures["mean_blocks"],
    }
    if args.load:
        path = Path(args.load)
        path = path / engine.checkpoint.LAST if path.is_dir() else path
        facts["checkpoint"] = path.name
        facts["checkpoint_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {name: str(value) for name, value in facts.items() if value is not None}


def is_full(trained: TrainedModel) -> bool:
    return trained.policy_net is None and not trained.config.gated


def main() -> None:
    args = parse_args()
    need("onnx", "onnxruntime")
    config = engine.data.config_of(args)
    engine.device.seed_everything(args.seed)
    trained = TrainedModel(args, config)
    ranges = None
    if args.int8:
        train, _ = engine.data.load(config, args, trained.device)
        ranges = calibrate(trained, train)
    model = onnx_of(trained, args.opset, ranges)
    args.subset = args.check
    _, test = engine.data.load(config, args, trained.device, training=False)
    figures = check(model.SerializeToString(), trained, test, args.int8)
    for key, value in metadata(args, trained, test.class_names, figures).items():
        model.metadata_props.add(key=key, value=value)
    content = model.SerializeToString()
    engine.checkpoint.write_whole(content, args.out)
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
