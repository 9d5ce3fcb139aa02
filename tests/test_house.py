"""Who may import whom: only downwards, and visual knows nobody."""

import ast

import pytest

from engine.storage import ROOT

FLOORS = ["utils", "models", "deploy", "engine"]
LATE = {("models/__init__.py", "deploy")}  # the name models.deploy, looked up when it is asked for


def imported(path):
    """Top-level names that a file imports, its own package left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("floor", [*FLOORS, "visual"])
def test_imports_go_down(floor):
    allowed = FLOORS[: FLOORS.index(floor)] if floor in FLOORS else []
    files = [ROOT / "utils.py"] if floor == "utils" else sorted((ROOT / floor).glob("*.py"))
    assert files
    scripts = [path.stem for path in ROOT.glob("*.py") if path.stem != "utils"]
    house = {*FLOORS, "visual", "benchmarks", "recipes", *scripts} - {floor}
    for path in files:
        name = str(path.relative_to(ROOT))
        wrong = {n for n in imported(path) if n in house and n not in allowed}
        assert not {n for n in wrong if (name, n) not in LATE}, name
