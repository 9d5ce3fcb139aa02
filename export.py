"""Write a trained network as one ONNX file that runs one image and skips the blocks it drops.

Where an image decides, each block stands in the branch of an `If`; under a static policy dropped
blocks are not in the file. Takes bytes as a decoder gives them, (1, H, W, 3) in RGB. The file is
run against PyTorch on test images, and kept only if both agree.
"""

import hashlib
import json
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import engine
import models
import utils
from engine import UserError, options
from engine.trained import TrainedModel

TOLERANCE = 1e-4  # of logits, relative to an image's largest
NEAR = 1e-5  # a decision this near to the other outcome may fall either way
SHOWN = 10  # images that are named


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
    args.subset = args.check
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


def onnx_of(trained: TrainedModel, opset: int):
    """The ONNX model of what was trained; see `models.onnx_graph.build`."""
    import onnx

    from models import onnx_graph

    networks = trained.resnet, trained.policy_net, trained.static
    with engine.user_errors("--opset"):
        model = onnx_graph.build(*networks, trained.config, opset)
    onnx.checker.check_model(model, full_check=True)
    return model


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


def check(content: bytes, trained: TrainedModel, test) -> dict:
    """Run the file and PyTorch on the same images, and say what the file gives.

    Raises UserError where policies differ, or logits by more than TOLERANCE; images with a decision
    within NEAR of the other outcome are not compared, but named.
    """
    run, margins = session(content), Margins(trained)
    rows = {name: [] for name in ("policy", "correct", "difference", "same", "margin")}
    done = 0
    for images, labels, _ in test.epoch(0):
        with torch.no_grad():
            logits, policy = trained.run(images)
        theirs = [
            run.run(["logits", "policy"], {"image": test.picture(done + row)[None]})
            for row in range(len(images))
        ]
        done += len(images)
        file_logits, file_policy = (
            torch.from_numpy(np.concatenate(part)) for part in zip(*theirs, strict=True)
        )
        rows["policy"].append(file_policy)
        rows["correct"].append(file_logits.argmax(1) == labels)
        difference = (file_logits - logits).abs().amax(1) / logits.abs().amax(1)
        rows["difference"].append(difference)
        rows["same"].append((file_policy == policy).all(1) & (difference <= TOLERANCE))
        rows["margin"].append(margins.take(len(images)))
    found = {name: torch.cat(parts) for name, parts in rows.items()}
    near = found["margin"] < NEAR
    wrong = (~found["same"] & ~near).nonzero()[:, 0].tolist()
    if wrong:
        raise UserError(
            f"ONNX Runtime and PyTorch differ on {len(wrong)} of {done} images ({named(wrong)}): "
            "nothing is written"
        )
    compared = found["difference"][~near]
    return {
        "images": done,
        "accuracy": found["correct"].double().mean().item(),
        "mean_blocks": found["policy"].sum(1).double().mean().item(),
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
    model = onnx_of(trained, args.opset)
    _, test = engine.data.load(config, args, trained.device, training=False)
    figures = check(model.SerializeToString(), trained, test)
    for key, value in metadata(args, trained, test.class_names, figures).items():
        model.metadata_props.add(key=key, value=value)
    content = model.SerializeToString()
    engine.checkpoint.write_whole(content, args.out)
    print(
        f"    {args.out}: {len(content) / 2**20:.1f} MiB\n"
        f"    Accuracy: {figures['accuracy']:.3f} on {figures['images']} images\n"
        f"    Block Usage: {figures['mean_blocks']:.3f}\n"
        f"    Logits differ by at most {figures['largest_difference']:.1E} from PyTorch's"
    )
    if figures["near"]:
        print(
            f"    Not compared: {len(figures['near'])} images whose decisions are within {NEAR} of "
            f"falling otherwise ({named(figures['near'])})"
        )


if __name__ == "__main__":
    engine.run_script(main)
