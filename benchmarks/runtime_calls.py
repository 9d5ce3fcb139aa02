"""How each tool runs an exported file. Runs in the tool's own environment: numpy alone is shared.

    python runtime_calls.py TOOL FOLDER

FOLDER has model.onnx and asked.npz (`images`, `logits`, `policy` as ONNX Runtime gives them, and
`few` and `most`: the rows of the images that keep fewest and most blocks). Writes found.json.
"""

import contextlib
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

# a call takes one image (1, H, W, 3) uint8 and returns logits and policy
Call = Callable[[np.ndarray], tuple]
OUTPUTS = ["logits", "policy"]
TIMED = 1.0  # seconds for each of the two timed images


def onnxruntime(file: Path) -> Call:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file))
    return lambda image: session.run(OUTPUTS, {"image": image})


def onnxruntime_ort(file: Path) -> Call:
    """The ORT format, made for this machine."""
    converter = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort"]
    command(*converter, file, "--target_platform", "amd64", "--optimization_style", "Fixed")
    return onnxruntime(file.with_suffix(".ort"))


def onnxruntime_float16(file: Path) -> Call:
    import onnx
    from onnxconverter_common import float16

    # a Cast to float32 would be said to give float16, and stay one to float32
    blocked = [*float16.DEFAULT_OP_BLOCK_LIST, "Cast"]
    half = float16.convert_float_to_float16(onnx.load(file), op_block_list=blocked)
    onnx.save(half, file.with_suffix(".half.onnx"))
    return onnxruntime(file.with_suffix(".half.onnx"))


def onnx_reference(file: Path) -> Call:
    from onnx.reference import ReferenceEvaluator

    network = ReferenceEvaluator(str(file))
    return lambda image: network.run(OUTPUTS, {"image": image})


def openvino(file: Path) -> Call:
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    network = openvino.Core().compile_model(str(file), "CPU", settings)

    def call(image):
        found = network(image)
        return found["logits"], found["policy"]

    return call


def opencv(file: Path) -> Call:
    import cv2

    net = cv2.dnn.readNetFromONNX(str(file))

    def call(image):
        net.setInput(image, "image")
        return net.forward(OUTPUTS)

    return call


def mnn(file: Path) -> Call:
    import MNN.expr as expr
    import MNN.nn as networks

    converted = str(file.with_suffix(".mnn"))
    options = ["-f", "ONNX", "--modelFile", file, "--MNNModel", converted, "--bizCode", "x"]
    command(sys.executable, "-c", "from MNN.tools import mnnconvert; mnnconvert.main()", *options)
    network = networks.load_module_from_file(converted, ["image"], OUTPUTS)

    def call(image):
        given = expr.placeholder(list(image.shape), expr.NCHW, expr.uint8)
        given.write(image)
        return [np.array(part.read()) for part in network.forward([given])]

    return call


def iree(file: Path) -> Call:
    import iree.runtime

    programs = Path(sys.executable).parent
    graph, compiled = file.with_suffix(".mlir"), file.with_suffix(".vmfb")
    command(programs / "iree-import-onnx", file, "-o", graph)
    target = ["--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu"]
    target.append("--iree-llvmcpu-target-cpu=host")
    command(programs / "iree-compile", graph, "-o", compiled, *target)
    module = iree.runtime.load_vm_flatbuffer_file(str(compiled), driver="local-task")
    name = next(n for n in module.vm_module.function_names if n[0] != "_" and "$" not in n)
    run = getattr(module, name)
    return lambda image: [part.to_host() for part in run(image)]


def tvm(file: Path) -> Call:
    import onnx
    import tvm
    from tvm.relax.frontend.onnx import from_onnx

    module = from_onnx(onnx.load(file))
    machine = tvm.relax.VirtualMachine(tvm.compile(module, target="llvm"), tvm.cpu())

    def call(image):
        return [part.numpy() for part in machine["main"](tvm.runtime.tensor(image))]

    return call


def litert(file: Path) -> Call:
    """By onnx2tf, which writes over the file that it is given."""
    from ai_edge_litert.interpreter import Interpreter

    # pictures that it would fetch from GitHub to compare its layers with ONNX's
    samples = np.zeros((20, 128, 128, 3), np.float32)
    np.save(file.parent / "calibration_image_sample_data_20x128x128x3_float32.npy", samples)
    options = ["-i", file, "-o", file.parent / "tf", "-kat", "image", "-n"]
    command(Path(sys.executable).parent / "onnx2tf", *options)
    network = Interpreter(str(next((file.parent / "tf").glob("*_float32.tflite"))))
    network.allocate_tensors()
    (given,) = network.get_input_details()

    def call(image):
        network.set_tensor(given["index"], image)
        network.invoke()
        found = [network.get_tensor(part["index"]) for part in network.get_output_details()]
        return sorted(found, key=lambda part: set(np.unique(part)) <= {0.0, 1.0})

    return call


def tinygrad(file: Path) -> Call:
    from tinygrad import Tensor
    from tinygrad.nn.onnx import OnnxRunner

    network = OnnxRunner(file)

    def call(image):
        found = network({"image": Tensor(image)})
        return [found[name].numpy() for name in OUTPUTS]

    return call


def emx_onnx_cgen(file: Path) -> Call:
    source, library = file.with_suffix(".c"), file.with_suffix(".so")
    compiler = [Path(sys.executable).parent / "emx-onnx-cgen", "compile"]
    command(*compiler, "--large-weight-threshold", "0", file, source)  # weights in the source
    command("gcc", "-O3", "-march=native", "-shared", "-fPIC", source, "-o", library, "-lm")
    run = ctypes.CDLL(str(library)).model
    with np.load(file.parent / "asked.npz") as asked:
        logits, policy = (np.zeros_like(asked[name][:1]) for name in OUTPUTS)

    def call(image):
        run(*(array.ctypes.data_as(ctypes.c_void_p) for array in (image, logits, policy)))
        return logits.copy(), policy.copy()

    return call


def tract(file: Path) -> Call:
    import tract

    network = tract.onnx().load(str(file)).into_model().into_runnable()
    return lambda image: [part.to_numpy() for part in network.run([image])]


def ncnn(file: Path) -> Call:
    import ncnn

    size = np.load(file.parent / "asked.npz")["images"].shape[1]
    pnnx = [Path(sys.executable).parent / "pnnx", file, f"inputshape=[1,{size},{size},3]u8"]
    command(*pnnx, "fp16=0")
    network = ncnn.Net()
    for load, name in ((network.load_param, "param"), (network.load_model, "bin")):
        if load(str(file.parent / f"model.ncnn.{name}")):
            raise RuntimeError(f"model.ncnn.{name} does not load")

    def call(image):
        run = network.create_extractor()
        run.input("in0", ncnn.Mat(image[0].astype(np.float32)))
        return [np.array(run.extract(name)[1])[None] for name in ("out0", "out1")]

    return call


def onnx2torch(file: Path) -> Call:
    import onnx2torch
    import torch

    network = onnx2torch.convert(str(file)).eval()

    @torch.inference_mode()
    def call(image):
        return [part.numpy() for part in network(torch.from_numpy(image))]

    return call


def jaxonnxruntime(file: Path) -> Call:
    import jax
    import onnx
    from jaxonnxruntime.backend import Backend

    network = Backend.prepare(onnx.load(file))
    return lambda image: [np.asarray(jax.device_get(x)) for x in network.run({"image": image})]


def node(file: Path) -> Call:
    return in_node(file, "onnxruntime-node")


def web(file: Path) -> Call:
    return in_node(file, "onnxruntime-web")


def in_node(file: Path, package: str) -> Call:
    """A process of node's that answers a line with an image by a line with what it gives."""
    script = """
    import { createInterface } from "node:readline";
    const ort = await import(process.argv[1]);
    const session = await ort.InferenceSession.create(process.argv[2]);
    console.log("ready");
    for await (const line of createInterface({ input: process.stdin })) {
      const { dims, bytes, times } = JSON.parse(line);
      const image = new ort.Tensor("uint8", Uint8Array.from(bytes), dims);
      const start = performance.now();
      let found;
      for (let i = 0; i < times; i++) found = await session.run({ image });
      const seconds = (performance.now() - start) / 1000 / times;
      const { logits, policy } = found;
      console.log(JSON.stringify({ logits: [...logits.data], policy: [...policy.data], seconds }));
    }"""
    command = ["node", "--input-type=module", "-e", script, package, str(file)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if process.stdout.readline() != "ready\n":
        raise RuntimeError(process.stderr.read().strip())

    def ask(image, times: int) -> dict:
        asked = {"dims": image.shape, "bytes": image.ravel().tolist(), "times": times}
        print(json.dumps(asked), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    def call(image):
        found = ask(image, 1)
        return [np.array(found[name], np.float32)[None] for name in OUTPUTS]

    call.seconds = lambda image: ask(image, 200)["seconds"]
    return call


def command(*parts) -> None:
    """Run a program. Raises RuntimeError with what it says where it fails."""
    done = subprocess.run(list(map(str, parts)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or done.stdout.strip() or f"exit {done.returncode}")


def seconds(call: Call, image: np.ndarray) -> float:
    """The median of as many calls as fit into TIMED, or the caller's own measure."""
    if hasattr(call, "seconds"):
        return call.seconds(image)
    taken: list[float] = []
    while sum(taken) < TIMED:
        start = time.perf_counter()
        call(image)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def reason(error: BaseException) -> str:
    """The line of an error that says most: the last that speaks of one, without paths."""
    text = str(error).partition("Stack backtrace")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [repr(error)]
    told = [line for line in lines if "error" in line.lower() or "unsupported" in line.lower()]
    return f"{type(error).__name__}: {(told or lines)[-1][:200]}"


def look(tool: str, folder: Path) -> dict:
    """Load the file, compare all images, time two of them."""
    asked = dict(np.load(folder / "asked.npz"))
    try:
        call = globals()[tool](folder / "model.onnx")
        found = [call(image[None]) for image in asked["images"]]
    except Exception as error:
        return {"error": reason(error)}
    logits, policy = (
        np.concatenate([np.asarray(pair[i], np.float64).reshape(1, -1) for pair in found])
        for i in (0, 1)
    )
    largest = np.abs(asked["logits"]).max(1)
    answer = {
        "same_policies": float((policy == asked["policy"]).all(1).mean()),
        "difference": float((np.abs(logits - asked["logits"]).max(1) / largest).max()),
    }
    few, most = (asked["images"][asked[which]][None] for which in ("few", "most"))
    call(few), call(most)
    rounds = [(seconds(call, few), seconds(call, most)) for _ in range(3)]  # in turn, against drift
    answer["few"], answer["most"] = map(statistics.median, zip(*rounds, strict=True))
    return answer


if __name__ == "__main__":
    tool, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    os.chdir(folder)  # some tools leave files where they run
    with contextlib.redirect_stdout(sys.stderr):
        answer = look(tool, folder)
    (folder / "found.json").write_text(json.dumps(answer))
