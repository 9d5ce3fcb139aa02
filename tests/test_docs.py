"""The commands of README and docs/: run on a few images, or parsed where they are long."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import script_module

from engine.storage import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ("pretrain", "cl_training", "finetune", "aig_training", "test", "visualize", "export")
# what makes a long command short; the last value of an option holds
SHORT = {
    "pretrain": ["--max_epochs", "1", "--batch_size", "10"],
    "cl_training": ["--max_epochs", "1", "--batch_size", "10"],
    "finetune": ["--max_epochs", "1", "--batch_size", "10"],
}


def commands(page):
    """The command lines of our scripts in a page's code blocks."""
    text = page.read_text()
    for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"\b(\w+)\.py (--[^#]*)", line)
            if found and found[1] in SCRIPTS:
                yield found[1], shlex.split(found[2])


ALL = [(page.name, *command) for page in PAGES for command in commands(page)]


def test_there_are_commands():
    assert {name for name, _, _ in ALL} >= {"README.md", "aig.md", "clusters.md", "pictures.md"}


@pytest.mark.parametrize("page, script, options", ALL, ids=lambda value: str(value)[:60])
def test_options_exist(page, script, options, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *options])
    script_module(script).parse_args()


def test_the_readmes_commands_run_in_order(run, cifar_dir, tmp_path, monkeypatch):
    """On the first ten images; the paper's R110_C10 on the base that comes along."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "cv" / "R32_C10", tmp_path / "cv" / "R32_C10")
    few = ["--data_dir", cifar_dir, "--skip_data_check", "--subset", 10]
    done = []
    for script, options in commands(ROOT / "README.md"):
        options = [str(next(tmp_path.glob(o), o)) if "*" in o else o for o in options]
        status, out, err = run(script, *options, *few, *SHORT.get(script, []))
        assert status == 0, (script, options, err)
        done.append(script)
    assert set(done) >= {"pretrain", "cl_training", "finetune", "test", "visualize"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_the_readme_is_of_one_sitting():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_work_tree_is_light():
    """A clone is small, and no file of it large."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("no git work tree")
    names = listed.stdout.decode().split("\0")[:-1]
    sizes = {n: (ROOT / n).stat().st_size for n in names if (ROOT / n).exists()}
    assert sum(sizes.values()) < 40 * 10**6
    assert max(sizes.values()) < 8 * 2**20, max(sizes, key=sizes.get)
