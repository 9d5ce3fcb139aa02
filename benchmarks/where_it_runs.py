"""Where an exported file runs, and whether dropped blocks are skipped there.

    python benchmarks/where_it_runs.py --model R32_C10 --load cv/R32_C10/stage2
    python benchmarks/where_it_runs.py --model R32_C10 --load ... --tools opencv mnn

Each tool gets an environment of its own with pinned packages, below --work, and is given the file
and, beside it, one of a static policy, which has no If. Its logits and policies are compared with
ONNX Runtime's, and the image that keeps the fewest blocks is timed against the one with the most.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from measure import add_network_that_decides, machine, table, write

import engine
from deploy import onnx_files
from engine import options, process
from engine.trained import TrainedModel

OPSET = 17
IMAGES = 20  # that are compared
AMONG = 500  # test images, in which those with fewest and most blocks are looked for
SECONDS = 1500  # a tool may take to load, compile and run a file
SAME = 5e-3  # logits, relative to an image's largest; float16 is there
SKIPS = 0.85  # what few blocks take of the time of most, where dropped ones are skipped


@dataclass
class Tool:
    """A row: `call` is its function in runtime_calls.py, `packages` its pinned requirements."""

    title: str
    call: str
    packages: tuple[str, ...]
    npm: str = ""
    basic: tuple[str, ...] = ("numpy==2.4.6", "onnx==1.23.2")


TOOLS = [
    Tool("ONNX Runtime", "onnxruntime", ("onnxruntime==1.32.0",)),
    Tool("ONNX Runtime, ORT format", "onnxruntime_ort", ("onnxruntime==1.32.0",)),
    Tool(
        "ONNX Runtime, float16 by onnxconverter-common",
        "onnxruntime_float16",
        ("onnxruntime==1.32.0", "onnxconverter-common==1.16.0"),
    ),
    Tool("onnxruntime-node", "node", (), "onnxruntime-node@1.30.0"),
    Tool("onnxruntime-web", "web", (), "onnxruntime-web@1.30.0"),
    Tool("OpenVINO", "openvino", ("openvino==2026.4.1",)),
    Tool("OpenCV", "opencv", ("opencv-python-headless==5.0.0.93",)),
    Tool("MNN", "mnn", ("MNN==3.6.1",)),
    Tool("IREE", "iree", ("iree-base-compiler[onnx]==3.13.0", "iree-base-runtime==3.13.0")),
    Tool("onnx.reference", "onnx_reference", ()),
    Tool("TVM", "tvm", ("apache-tvm==0.27.0.post1",)),
    Tool("LiteRT, by onnx2tf", "litert", ("onnx2tf==1.29.24",), basic=()),  # it pins the others
    Tool("tinygrad", "tinygrad", ("tinygrad==0.14.0",)),
    Tool("emx-onnx-cgen", "emx_onnx_cgen", ("emx-onnx-cgen==1.4.0",)),
    Tool("tract", "tract", ("tract==0.23.9",)),
    Tool("ncnn, by pnnx", "ncnn", ("ncnn==1.0.20261020", "pnnx==20261020")),
    Tool("onnx2torch", "onnx2torch", ("onnx2torch==1.5.15",)),
    Tool(
        "jaxonnxruntime",
        "jaxonnxruntime",
        ("jaxonnxruntime==0.3.0", "jax==0.10.2", "jaxlib==0.10.2", "absl-py==2.3.1"),
    ),
]


def parse_args():
    parser = options.parser(__doc__, device="cpu")
    add_network_that_decides(parser)
    add = parser.add_argument
    add("--static", default="distribute:7", help="the static policy of the file beside it")
    add("--tools", nargs="+", metavar="NAME", help="of: " + " ".join(t.call for t in TOOLS))
    add("--work", type=Path, default=Path("cv/where_it_runs"), help="where the environments are")
    add("--json", type=Path, help="also write the figures to this file")
    parser.set_defaults(policy=None, batch_size=250, subset=AMONG)
    args = parser.parse_args()
    unknown = set(args.tools or ()) - {tool.call for tool in TOOLS}
    if unknown:
        raise engine.UserError(f"--tools {' '.join(unknown)}: see --help for the names")
    return args


def write_case(folder: Path, trained: TrainedModel, pictures: list[np.ndarray]) -> None:
    """A folder with the file, images, and what ONNX Runtime makes of them."""
    folder.mkdir(parents=True, exist_ok=True)
    model = onnx_files.build(trained.resnet, trained.policy, trained.config, OPSET)
    content = model.SerializeToString()
    (folder / "model.onnx").write_bytes(content)
    run = onnx_files.session(content).run
    found = [run(["logits", "policy"], {"image": picture[None]}) for picture in pictures]
    logits, policy = (np.concatenate(part) for part in zip(*found, strict=True))
    blocks = policy.sum(1)
    few, most = int(blocks.argmin()), int(blocks.argmax())
    rows = [few, most, *(row for row in range(IMAGES) if row not in (few, most))][:IMAGES]
    np.savez(
        folder / "asked.npz",
        images=np.stack([pictures[row] for row in rows]),
        logits=logits[rows],
        policy=policy[rows],
        few=0,
        most=1,
    )


def environment(tool: Tool, work: Path) -> Path:
    """A folder with the tool's packages; made once. Raises CalledProcessError."""
    folder = work / tool.call
    ready = folder / "ready"
    wanted = "\n".join((*tool.basic, *tool.packages, tool.npm))
    if ready.exists() and ready.read_text() == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    quiet = {"check": True, "stdout": sys.stderr}
    subprocess.run([sys.executable, "-m", "venv", folder], **quiet)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *tool.basic, *tool.packages], **quiet)
    if tool.npm:
        # scripts of onnxruntime-node would fetch CUDA's libraries
        npm = ["npm", "install", "--silent", "--ignore-scripts", "--prefix", folder]
        subprocess.run([*npm, tool.npm], **quiet)
    ready.write_text(wanted)
    return folder


def outcome(tool: Tool, work: Path, case: Path) -> dict:
    """What the tool makes of a case, in a process and a copy of its own."""
    folder = environment(tool, work)
    own = folder / case.name  # below the environment, where node looks for its packages
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(case, own)
    script = Path(__file__).with_name("runtime_calls.py")
    python = (folder / "bin" / "python").absolute()
    try:
        done = subprocess.run(
            [python, script, tool.call, own],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env={**os.environ, "PYTHONPATH": ""},
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {SECONDS} s"}
    found = own / "found.json"
    if not found.exists():
        last = (done.stderr.strip().splitlines() or [""])[-1][:200]
        return {"error": f"the process ended by {-done.returncode or 'itself'}: {last}"}
    return json.loads(found.read_text())


def verdict(found: dict) -> str:
    """In words: what a user may expect."""
    if "error" in found:
        return "does not run"
    if found["same_policies"] < 1 or not found["difference"] < SAME:
        return "other numbers"
    return "skips" if found["few"] < SKIPS * found["most"] else "computes every block"


def version(tool: Tool) -> str:
    return tool.npm.rpartition("@")[2] or (tool.packages or tool.basic[1:])[0].partition("==")[2]


def row(tool: Tool, found: dict, static: dict) -> list[str]:
    """A line of the table: the file that decides, and beside it the one without an If."""
    timed = f"{found['few'] / found['most']:.2f}" if "few" in found else ""
    took = f"{found['most'] * 1e3:.2f}" if "most" in found else ""
    differs = f"{found['difference']:.0E}" if "difference" in found else ""
    right = "right" if verdict(static) in ("skips", "computes every block") else verdict(static)
    why = found.get("error", "")
    return [tool.title, version(tool), verdict(found), timed, took, differs, right, why]


def main() -> None:
    args = parse_args()
    process.need("onnx", "onnxruntime")
    config = engine.data.config_of(args)
    engine.seed_everything(args.seed)
    trained = TrainedModel(args, config)
    _, test = engine.data.load(config, args, trained.device, training=False)
    pictures = [test.picture(index) for index in range(min(AMONG, test.num_images))]
    write_case(args.work / "decides", trained, pictures)
    asked = argparse.Namespace(**vars(args) | {"load": None, "policy": args.static})
    write_case(args.work / "static", TrainedModel(asked, config), pictures)
    facts = machine()
    print(json.dumps(facts))
    rows, figures = [], {}
    for tool in TOOLS:
        if args.tools and tool.call not in args.tools:
            continue
        try:
            found = outcome(tool, args.work, args.work / "decides")
            static = outcome(tool, args.work, args.work / "static")
        except subprocess.CalledProcessError as error:
            found = static = {"error": f"does not install: {error}"}
        rows.append(row(tool, found, static))
        figures[tool.title] = {**asdict(tool), "decides": found, "static": static}
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    head = ["tool", "version", "file that decides", "few / most", "most, ms", "logits differ by"]
    print(table([*head, "static file", "because"], rows))
    if args.json:
        write({"machine": facts, "rows": figures}, args.json)


if __name__ == "__main__":
    engine.run_script(main)
