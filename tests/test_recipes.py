"""The recipes' commands: known options, and files that an earlier command has written."""

import json
import os
import subprocess
import sys

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
