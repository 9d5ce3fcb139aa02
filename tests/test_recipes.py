"""The recipes' commands: known options, and files that an earlier command has written."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import script_module

from engine.checkpoint import ROOT

RECIPES = ["R32_C10", "R110_C10", "R32_C10_more", "AIG32_C10", "folder"]

# Takes Python's place: notes a command and which of its files are not there, and leaves those that
# it would write.
RECORDER = f"""#!{sys.executable}
import json, os, pathlib, sys
out, arguments = os.environ["OUT"], sys.argv[1:]
missing = []
for option, value in zip(arguments, arguments[1:]):
    path = pathlib.Path(value.partition("=")[2] or value)
    if not str(path).startswith(out):
        continue
    if option == "--cv_dir":
        path.mkdir(parents=True, exist_ok=True)
        (path / "last.t7").touch()
        (path / "pk_E_1_A_0.100.t7").touch()
    elif option == "--json":
        path.touch()
    elif option == "recipes/write_folder.py":
        path.mkdir(parents=True)
    elif option != "--out" and not path.exists():
        missing.append(value)
with open(os.environ["COMMANDS"], "a") as file:
    file.write(json.dumps([arguments, missing]) + "\\n")
"""


@pytest.fixture
def commands(tmp_path):
    """commands(recipe, ...) -> (arguments, files not there) of each command they give."""
    recorder = tmp_path / "recorder"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    log = tmp_path / "commands"
    where = {"OUT": tmp_path / "out", "COMMANDS": log, "PYTHON": recorder, "PRECISION": "fp32"}

    def call(*recipes):
        env = os.environ | {name: str(value) for name, value in where.items()}
        for recipe in recipes:
            subprocess.run(["sh", f"recipes/{recipe}.sh"], cwd=ROOT, env=env, check=True)
        return [json.loads(line) for line in log.read_text().splitlines()]

    return call


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe, commands, monkeypatch):
    needs = ["R32_C10"] if recipe == "R32_C10_more" else []
    calls = commands(*needs, recipe)
    assert [arguments[0] for arguments, _ in calls].count("benchmarks/summary.py") == len(needs) + 1
    for arguments, missing in calls:
        assert not missing, arguments
        if "--model" in arguments:
            monkeypatch.setattr(sys, "argv", arguments)
            script_module(arguments[0].removesuffix(".py")).parse_args()


def test_rehearsal(commands, monkeypatch):
    monkeypatch.setenv("SUBSET", "64")
    for arguments, _ in commands("R32_C10"):
        if "--model" in arguments:
            assert arguments[arguments.index("--subset") + 1] == "64"


@pytest.fixture
def demo():
    return script_module("recipes/demo")


@pytest.mark.parametrize("slower", [1, 3, 10, 1000])
def test_the_demo_fits_its_sizes_to_the_machine(slower, demo):
    todo = demo.stages()
    paces = [demo.Pace(4.0, slower / 1000), demo.Pace(5.0, slower / 700)]
    images, forecast = demo.plan(todo, paces, slower / 8000, left=600)
    for stage, count in zip(todo, images, strict=True):
        assert demo.FEWEST <= count <= stage.images
    fixed = sum(pace.start for pace in paces)
    train = sum(
        stage.epochs * count * pace.image
        for stage, pace, count in zip(todo, paces, images, strict=True)
    )
    test = slower / 8000 * (3 * min(images[0], 10_000) + 4 * min(images[1], 10_000))
    assert forecast == pytest.approx(fixed + train + test)
    if slower == 1:
        assert images == [stage.images for stage in todo] and forecast < 600
    elif slower < 1000:
        assert 500 < forecast <= 600  # all that the time allows
        assert images[1] / images[0] == pytest.approx(2.5, rel=0.01)
    else:
        assert images == [demo.FEWEST] * 2 and forecast > 600  # and it says so


def test_the_demo_runs_every_stage(demo, cifar_dir, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(demo, "REHEARSED", 24)
    monkeypatch.setattr(demo, "FEWEST", 24)
    small = [replace(stage, images=40, epochs=2, test_every=1) for stage in demo.stages()]
    monkeypatch.setattr(demo, "stages", lambda: small)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["demo.py", "--out", tmp_path, "--data_dir", cifar_dir, "--skip_data_check"]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    demo.main()
    out = capfd.readouterr().out
    table = [line.split("|") for line in out.splitlines() if line.startswith("|")]
    assert [row[1].strip() for row in table[2:]] == ["shipped", "full", "stage 1", "stage 2"]
    assert "forecast: " in out and out.splitlines()[-1].startswith("took ")
    assert len((tmp_path / "stage2" / "metrics.jsonl").read_text().splitlines()) == 2
