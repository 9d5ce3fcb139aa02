"""The scripts in findings/ can be run again by anybody; they themselves are not run here."""

import os
import re

import pytest
from conftest import ROOT

FOLDER = ROOT / "findings"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
OWN = ["models", "utils", "engine", "deploy", "visual", "benchmarks", "recipes", "hubconf"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_finding_stands_alone(path):
    text = path.read_text()
    lines = text.splitlines()
    assert os.access(path, os.X_OK) and lines[0] == "#!/bin/sh" and lines[1].startswith("# ")
    assert "Seen:" in text or "Seen," in text
    code = [line for line in lines if not line.startswith("#")]
    # it makes and removes its own folder
    assert code[:3] == ["set -eu", "folder=$(mktemp -d)", "trap 'rm -rf \"$folder\"' EXIT"]
    # every package is pinned
    installs = [line for line in code if re.search(r"\b(pip|npm)\b.* install ", line)]
    assert installs
    for line in installs:
        packages = [word for word in line.partition(" install ")[2].split() if word[0] != "-"]
        assert packages and all(re.fullmatch(r"\S+(==|@)\d\S*", word) for word in packages), line
    # nothing of this project is imported or read
    imported = re.findall(r"^\s*(?:from|import)\s+(\w+)", "\n".join(code), re.MULTILINE)
    assert not set(imported) & set(OWN)
    assert "BASH_SOURCE" not in text and "$0" not in text and "../" not in text


def test_the_list_names_every_script():
    listed = re.findall(r"`(\w+\.sh)`", (FOLDER / "README.md").read_text())
    assert listed == [path.name for path in SCRIPTS] and len(SCRIPTS) >= 6
