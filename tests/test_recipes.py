"""The recipes: commands with known options and files that exist, and one short chain that runs."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ENV, ROOT, refused, script_module

RECIPES = ["R32_C10", "static", "R32_C100", "R110_C10", "R110_C100", "paper", "AIG32_C10", "folder"]

# Takes Python's place: notes a command and which of its files are not there, shipped ones among
# them, and leaves those that it would write.
RECORDER = f"""#!{sys.executable}
import json, os, pathlib, sys
out, arguments = os.environ["OUT"], sys.argv[1:]
missing = []
for option, value in zip(arguments, arguments[1:]):
    path = pathlib.Path(value.partition("=")[2] or value)
    if not str(path).startswith((out, "cv/")):
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
    needs = ["R32_C10"] if recipe == "static" else []
    calls = commands(*needs, recipe)
    assert [arguments[0] for arguments, _ in calls].count("benchmarks/summary.py") == len(needs) + 1
    for arguments, missing in calls:
        assert not missing, arguments
        if "--model" in arguments:
            monkeypatch.setattr(sys, "argv", arguments)
            script_module(arguments[0].removesuffix(".py")).parse_args()


@pytest.mark.parametrize("recipe", ["R32_C10", "R32_C100"])
def test_a_chain_begins_from_nothing_or_as_what_from_names(recipe, commands, monkeypatch):
    (plain, _), (base, _) = commands(recipe)[:2]
    assert "--pretrained" not in plain and "--routes" not in plain
    assert base[base.index("--pretrained") + 1] == plain[plain.index("--cv_dir") + 1]
    before = len(commands())
    monkeypatch.setenv("FROM", "cv/pretrained/R8_C10")
    first, _ = commands(recipe)[before]
    assert first[first.index("--pretrained") + 1] == "cv/pretrained/R8_C10"


def test_the_table_and_the_picture_of_figures(tmp_path):
    """Rows of one checkpoint under several penalties make a curve; the others are points."""
    plain = {"model": "R32_C10", "load": None, "policy": None, "penalty": None, "accuracy": 0.9,
             "block_usage": 15.0, "block_usage_std": 0.0, "flops": 1.4e8, "flops_std": 0.0,
             "unique_policies": 1, "images_per_second": 9.0}  # fmt: skip
    other = {"accuracy": 0.8, "blocks": 7.0, "flops": 7e7}
    names = ("own", "shuffled", "most_frequent", "static", "static_same_flops")
    rows = [plain, plain | {"load": "a", "policy": "first:8"}]
    rows += [
        plain | {"load": "b", "penalty": penalty, "unique_policies": 3, "flops": flops,
                 "dependence": dict.fromkeys(names, other)}
        for penalty, flops in ((-1, 6e7), (-5, 8e7))
    ]  # fmt: skip
    given = []
    for name, row in zip("wxyz", rows, strict=True):
        given.append(f"{name}={tmp_path / name}.json")
        (tmp_path / f"{name}.json").write_text(json.dumps(row))
    command = [sys.executable, "benchmarks/summary.py", *given]
    command += ["--picture", str(tmp_path / "picture.svg")]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    lines = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines()]
    assert [line[1] for line in lines[2:]] == ["w", "x", "y", "z"]
    assert lines[2][-4:-1] == ["", "", ""]
    assert lines[4][-4:-1] == ["0.800", "0.800 at 7", "0.800 at 7.0"]
    picture = (tmp_path / "picture.svg").read_text()
    for words in ("one network", "shuffled over the images", "static, same network", "MSDNet"):
        assert words in picture


def test_only_rows_of_one_checkpoint_make_a_curve(monkeypatch, tmp_path):
    from visual import figures

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    summary = script_module("benchmarks/summary")
    drawn = {}
    made = figures.trade_off

    def trade_off(points, unit, curves):
        drawn.update(points=points, curves=curves)
        return made(points, unit, curves)

    monkeypatch.setattr(figures, "trade_off", trade_off)
    other = {"accuracy": 0.8, "blocks": 7.0, "flops": 7e7}

    def row(model, load, penalty, accuracy):
        return {"name": "x", "model": model, "load": load, "base": None, "policy": None,
                "kind": "BlockDrop", "penalty": penalty, "accuracy": accuracy, "flops": 1e8,
                "unique_policies": 1, "dependence": {"shuffled": other}}  # fmt: skip

    rows = [
        row("R32_C10", "cv/R32_C10/curve", -1, 0.91),
        row("R32_C10", "cv/R32_C10/curve", -5, 0.92),
        row("R110_C10", "cv/R110_C10/curve", -5, 0.93),
        row("R110_C10", "cv/other/curve", -5, 0.94),
        row("R110_C10", "cv/R110_C10/stage2", None, 0.95),
    ]
    summary.draw(rows, tmp_path / "picture.svg")
    curves = {name: points for name, points in drawn["curves"].items() if "published" not in name}
    assert {name: len(points) for name, points in curves.items()} == {
        "one network, R32_C10 curve": 2,
        "shuffled over the images, R32_C10 curve": 2,
        "one network, R110_C10, cv/R110_C10/curve": 1,
        "shuffled over the images, R110_C10, cv/R110_C10/curve": 1,
        "one network, R110_C10, cv/other/curve": 1,
        "shuffled over the images, R110_C10, cv/other/curve": 1,
    }
    # one policy for all images does not make it the full network
    assert [point[0] for point in drawn["points"]] == ["BlockDrop"]


def test_rows_of_other_images_make_no_curve(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    summary = script_module("benchmarks/summary")
    one = "R32_C10", "cv/curve", None
    ways = ["10000 images, fp32", "40 images of --val_split, fp32", "40 images, bf16"]
    assert summary.names({(*one, way) for way in ways}) == {
        (*one, way): f", R32_C10, {way}" for way in ways
    }
    row = {"name": "x", "model": "R32_C10", "load": "a", "block_usage": 5.0, "block_usage_std": 1.0,
           "accuracy": 0.9, "flops": 5e7, "flops_std": 1e7, "unique_policies": 3}  # fmt: skip
    assert summary.checkpoint(row | {"images": 40}) != summary.checkpoint(row | {"images": 50})
    summary.print_table([row | {"images": 40}, row | {"images": 50}])
    assert "images" in capsys.readouterr().out
    summary.print_table([row | {"images": 40}, row | {"images": 40}])
    assert "images" not in capsys.readouterr().out


def test_figures_that_are_none_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    (tmp_path / "text.json").write_text("no figures")
    (tmp_path / "other.json").write_text("{}")
    for row, words in (
        ("x", "expected NAME=FILE.json"),
        (f"x={tmp_path}/none.json", "none.json: No such file"),
        (f"x={tmp_path}/text.json", "text.json: "),
        (f"x={tmp_path}/other.json", "other.json: no figures of test.py --json"),
    ):
        refused(run("benchmarks/summary", row), words)


CHAIN = """
MODEL=R14_C10 PLAIN=1 ROUTES=1 WARM=1 GRADIENT=1 TUNE=1 FREED=3 PENALTIES=-5
. recipes/chain.sh
table
"""


def test_the_chain_runs_to_its_table(cifar_dir, tmp_path):
    """As the recipes of one network for every penalty do, but small, and on few images."""
    given = f"--data_dir {cifar_dir} --skip_data_check"
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
        case $1 in
        -c | benchmarks/*) ;;
        *) set -- "$@" {given} ;;
        esac
        exec {sys.executable} "$@"
        """
    )
    python.chmod(0o755)
    recipe = tmp_path / "recipe.sh"
    recipe.write_text(CHAIN)
    env = ENV | {"OUT": str(tmp_path / "out"), "PYTHON": str(python), "SUBSET": "64"}
    done = subprocess.run(["sh", recipe], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line[:1] == "|"]
    assert rows[2:] == ["curve-5", "penalties-5", "full", "stage1", "stage2"]


@pytest.mark.parametrize("recipe", ["R32_C10", "R32_C100", "paper"])
def test_rehearsal(recipe, commands, monkeypatch):
    monkeypatch.setenv("SUBSET", "64")
    for arguments, _ in commands(recipe):
        if "--model" in arguments:
            assert arguments[arguments.index("--subset") + 1] == "64"


def test_the_papers_lengths(commands):
    trainings = [arguments for arguments, _ in commands("paper") if "--max_epochs" in arguments]
    lengths = [arguments[arguments.index("--max_epochs") + 1] for arguments in trainings]
    assert lengths == ["5000", "2000"]
    assert all("--resume" in arguments for arguments in trainings)
    assert trainings[0][trainings[0].index("--batch_size") + 1] == "2048"


# A training that would never end, and that leaves a checkpoint when it is stopped.
ENDLESS = """#!/bin/sh
trap 'echo stopped >> "$COMMANDS"; kill $!; exit 143' TERM
echo "$1" >> "$COMMANDS"
sleep 60 & wait
"""


def paper(tmp_path, *options):
    (tmp_path / "endless").write_text(ENDLESS)
    (tmp_path / "endless").chmod(0o755)
    env = os.environ | {"PYTHON": str(tmp_path / "endless"), "PRECISION": "fp32"}
    env |= {"OUT": str(tmp_path / "out"), "COMMANDS": str(tmp_path / "log")}
    # minutes of a second
    recipe = (ROOT / "recipes" / "paper.sh").read_text().replace("60 * ", "1 * ")
    (tmp_path / "paper.sh").write_text(recipe)
    done = subprocess.run(
        ["sh", tmp_path / "paper.sh", *options], cwd=ROOT, env=env, capture_output=True, text=True
    )
    log = tmp_path / "log"
    return done.returncode, done.stderr, log.read_text().split() if log.exists() else []


def test_the_papers_recipe_stops_when_its_time_is_over(tmp_path):
    status, err, log = paper(tmp_path, "--max_minutes", "1")
    assert status == 0 and log == ["cl_training.py", "stopped"]
    assert (
        err.splitlines()[-1] == "paper.sh: 1 minutes are over in stage1: the same command goes on"
    )


@pytest.mark.parametrize("options", [["--max_minutes", "x"], ["--max_minutes"], ["--hours", "3"]])
def test_the_papers_recipe_takes_minutes(tmp_path, options):
    status, err, log = paper(tmp_path, *options)
    assert status == 2 and len(err.splitlines()) == 1 and options[0] in err and not log


@pytest.fixture
def demo():
    return script_module("recipes/demo")


@pytest.mark.parametrize(
    "paces, threads, busy",
    [
        ({1: 100.0, 2: 180.0}, 2, False),
        ({1: 100.0, 2: 100.0}, 1, True),  # as fast: the other thread only waits
        ({1: 60.0, 2: 20.0}, 1, True),
        ({1: 100.0}, 1, False),  # one core, of which nothing can be told
        ({16: 9000.0}, 16, False),  # a GPU
    ],
)
def test_the_demo_takes_the_faster_number_of_threads(paces, threads, busy, demo):
    forecast = demo.FIXED + demo.IMAGES / paces[threads]
    assert demo.plan(paces) == (threads, busy, pytest.approx(forecast))


def test_the_demo_measures_both_numbers_of_threads(demo, monkeypatch):
    monkeypatch.setattr(demo, "BATCH", 4)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        paces = demo.measure(torch.device("cpu"), "fp32")
    finally:
        torch.set_num_threads(before)
    assert sorted(paces) == [1, 2] and all(pace > 0 for pace in paces.values())


def test_the_demo_runs_every_stage(demo, cifar_dir, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(demo, "BATCH", 4)
    monkeypatch.setattr(demo, "PENALTIES", (-1, -50))
    monkeypatch.setattr(demo, "SHUFFLED_AT", -1)
    arguments = ["demo.py", "--out", tmp_path, "--subset", 40]
    arguments += ["--data_dir", cifar_dir, "--skip_data_check", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    demo.main()
    out = capfd.readouterr().out
    table = [
        [cell.strip() for cell in line.split("|")] for line in out.splitlines() if line[:1] == "|"
    ]
    rows = ["full", *(f"penalty {penalty}" for penalty in demo.PENALTIES), "stage 2"]
    assert [row[1] for row in table[2:]] == rows
    assert [row[-2] != "" for row in table[2:]] == [False, True, False, True]  # shuffled
    for name in ("ms/img", "speed-up"):
        assert all(float(row[table[0].index(name)]) > 0 for row in table[2:])
    assert "forecast: " in out and out.splitlines()[-1].startswith("took ")
    assert len((tmp_path / "stage2" / "metrics.jsonl").read_text().splitlines()) == 3
