"""The programs of docs/deployment.md, on one picture and an untrained network."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import models
from engine.storage import ROOT

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

PAGE = (ROOT / "docs" / "deployment.md").read_text()
# where `npm install onnxruntime-web` was run
NODE_MODULES = os.environ.get("NODE_MODULES", ROOT / "node_modules")


def program(language, word):
    """The one code block in a language that has a word in it."""
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    (found,) = (block for block in blocks if word in block)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with R110_C10.onnx and picture.png."""
    from deploy import onnx_graph

    folder = tmp_path_factory.mktemp("deployment")
    torch.manual_seed(0)
    resnet, policy_net = (network.eval() for network in models.build("R110_C10"))
    torch.nn.init.normal_(policy_net.logit.bias)
    config = models.config("R110_C10")
    model = onnx_graph.build(resnet, models.GreedyPolicy(policy_net), config)
    names = [f"class {k}" for k in range(10)]
    model.metadata_props.add(key="classes", value=str(names).replace("'", '"'))
    onnx.save(model, folder / "R110_C10.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    session = onnxruntime.InferenceSession(folder / "R110_C10.onnx")
    logits, policy = session.run(["logits", "policy"], {"image": pixels[None]})
    return folder, pixels, logits.argmax(), int(policy.sum())


def output(command, folder, **options):
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


@pytest.fixture
def printed(capsys, monkeypatch):
    """printed(word, folder) -> what the Python program with that word prints there."""

    def call(word, folder):
        monkeypatch.chdir(folder)
        exec(program("python", word), {})
        return capsys.readouterr().out.strip()

    return call


def test_onnx_runtime(place, printed):
    folder, _, best, blocks = place
    assert printed("onnxruntime.InferenceSession", folder) == f"class {best} {blocks} blocks"


def test_openvino(place, printed):
    pytest.importorskip("openvino")
    folder, _, best, blocks = place
    assert printed("openvino.Core", folder) == f"{best} {blocks} blocks"


def test_pytorch(printed):
    assert printed("models.deploy", ROOT) == "torch.Size([64])"
    assert re.fullmatch(r"tensor\(.*\) tensor\(.*\)", printed("hub.load", ROOT))


def test_cpp(place):
    openvino = pytest.importorskip("openvino")
    libraries = os.path.join(openvino.__path__[0], "libs")
    if not shutil.which("g++") or not os.path.isdir(libraries):
        pytest.skip("no compiler, or a package of OpenVINO without its libraries")
    folder, pixels, best, blocks = place
    (folder / "classify.cpp").write_text(program("cpp", "openvino.hpp"))
    build = program("sh", "g++").replace("-O2", "-O0").replace("python", sys.executable)
    output(["sh", "-ec", build], folder)
    found = output(["./classify", "R110_C10.onnx"], folder, input=pixels.tobytes())
    assert found == f"class {best}, {blocks} blocks"


def test_browser(place):
    """In node, with the package that browsers take."""
    folder, pixels, best, blocks = place
    if not shutil.which("node") or not os.path.isdir(f"{NODE_MODULES}/onnxruntime-web"):
        pytest.skip("no node, or no onnxruntime-web: npm install onnxruntime-web")
    if not (folder / "node_modules").exists():
        (folder / "node_modules").symlink_to(NODE_MODULES)
    rgba = np.concatenate([pixels, np.full((32, 32, 1), 255, np.uint8)], 2)
    (folder / "classify.mjs").write_text(program("js", "classify"))
    (folder / "main.mjs").write_text(
        'import { classify, session } from "./classify.mjs";\n'
        f"const rgba = Uint8ClampedArray.from({rgba.flatten().tolist()});\n"
        "console.log(JSON.stringify(await classify(session, rgba)));\n"
    )
    assert output(["node", "main.mjs"], folder) == f'{{"best":{best},"blocks":{blocks}}}'
