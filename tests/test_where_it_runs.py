"""The bench that runs an exported file in other tools, with the one that is always there."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, script_module

pytest.importorskip("onnxruntime")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return script_module("benchmarks/where_it_runs")


@pytest.mark.parametrize(
    "found, said",
    [
        ({"error": "no"}, "does not run"),
        ({"same_policies": 1.0, "difference": 1e-6, "few": 1.0, "most": 2.0}, "skips"),
        (
            {"same_policies": 1.0, "difference": 1e-6, "few": 1.0, "most": 1.01},
            "computes every block",
        ),
        ({"same_policies": 0.9, "difference": 1e-6, "few": 1.0, "most": 2.0}, "other numbers"),
        ({"same_policies": 1.0, "difference": 0.1, "few": 1.0, "most": 2.0}, "other numbers"),
        (
            {"same_policies": 1.0, "difference": float("nan"), "few": 1.0, "most": 2.0},
            "other numbers",
        ),
    ],
)
def test_what_a_tool_does_is_said_in_words(bench, found, said):
    assert bench.verdict(found) == said


def test_every_tool_has_a_call_and_pinned_packages(bench):
    calls = script_module("benchmarks/runtime_calls")
    for tool in bench.TOOLS:
        assert callable(getattr(calls, tool.call))
        assert all("==" in package for package in (*tool.packages, *tool.basic))
        assert bench.version(tool)[0].isdigit()


def test_a_file_is_compared_and_timed_in_a_process_of_its_own(tmp_path, monkeypatch):
    """In this environment instead of the tool's; wrong figures and errors are told apart."""
    import onnx
    from onnx import TensorProto, helper

    names = {"image": (TensorProto.UINT8, [1, 2, 2, 3]), "logits": (TensorProto.FLOAT, [1, 12])}
    names["policy"] = names["logits"]
    infos = {name: helper.make_tensor_value_info(name, *kind) for name, kind in names.items()}
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["logits"], "flatten"),
        helper.make_node("Sub", ["logits", "logits"], ["policy"], "none"),
    ]
    graph = helper.make_graph(nodes, "g", [infos["image"]], [infos["logits"], infos["policy"]])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "model.onnx")
    images = np.random.default_rng(0).integers(0, 256, (3, 2, 2, 3), dtype=np.uint8)
    logits = images.reshape(3, 12).astype(np.float32)
    script = ROOT / "benchmarks" / "runtime_calls.py"

    def found(factor):
        np.savez(
            tmp_path / "asked.npz", images=images, logits=factor * logits,
            policy=np.zeros((3, 12), np.float32), few=0, most=1,
        )  # fmt: skip
        command = [sys.executable, script, "onnxruntime", tmp_path]
        subprocess.run(list(map(str, command)), check=True, timeout=120)
        return json.loads((tmp_path / "found.json").read_text())

    right = found(1)
    assert right["same_policies"] == 1 and right["difference"] == 0
    assert right["few"] > 0 and right["most"] > 0
    assert found(2)["difference"] == 0.5
    (tmp_path / "model.onnx").write_bytes(b"no model")
    assert "error" in found(1)
