"""What a run goes on from, decided without a run."""

from argparse import Namespace

import pytest
from conftest import refused

import models
from engine import UserError, resume, storage

CONFIG = models.config("R14_C10")


def options(**given):
    plain = {"load": None, "cv_dir": None, "resume": False, "max_epochs": 5, "penalty": -1.0}
    plain |= {"batch_size": 20, "subset": None, "val_split": 0, "seed": 0}
    return Namespace(**plain | {"precision": "fp32", "micro_batch": None} | given)


@pytest.fixture
def begun(tmp_path):
    """A directory that holds a run of stage 1 with two epochs done, inside the third."""
    _, policy_net = models.build("R14_C10")
    content = {"agent": policy_net.state_dict(), "stage": 1, "epoch": 2, "model": "R14_C10"}
    content |= {"args": vars(options()), "base": "a base", "steps_done": 3, "partial": {}}
    storage.write(content, tmp_path / storage.LAST)
    return tmp_path


def test_a_new_run_begins_where_it_is_told(tmp_path):
    plan = resume.plan(options(cv_dir=str(tmp_path)), 1, CONFIG, "cv/tmp/")
    assert (plan.cv_dir, plan.load, plan.source) == (tmp_path, None, None)
    assert plan.progress() == (0, 0, {}) and plan.extras() == {} and plan.notes == ()
    assert str(resume.plan(options(), 1, CONFIG, "cv/tmp/").cv_dir) == "cv/tmp"


@pytest.mark.parametrize("how", ["load", "resume", "restart"])
def test_a_run_goes_on_in_its_directory(begun, how):
    given = {"load": {"load": str(begun)}, "resume": {"cv_dir": str(begun), "resume": True}}
    args = options(**given.get(how, {"cv_dir": str(begun)}))
    plan = resume.plan(args, 1, CONFIG, "cv/tmp/", was_restarted=how == "restart")
    assert (plan.cv_dir, plan.load, plan.source) == (begun, str(begun), begun)
    assert plan.progress() == (2, 3, {}) and plan.extras() == {"base": "a base"}


def test_another_directory_tells_what_is_changed(begun, tmp_path):
    args = options(load=str(begun), cv_dir=str(tmp_path / "new"), penalty=-3.0, precision="bf16")
    plan = resume.plan(args, 1, CONFIG, "cv/tmp/")
    assert plan.cv_dir == tmp_path / "new" and plan.source == begun
    assert plan.notes == ("--penalty -3.0 (was -1.0)", "--precision bf16 (was fp32)")


@pytest.mark.parametrize(
    "given, stage, why",
    [
        ({"load": "HERE", "penalty": -3.0}, 1, "was begun with --penalty -1.0, not -3.0"),
        ({"load": "HERE", "batch_size": 40, "cv_dir": "new"}, 1, "inside an epoch of --batch_size"),
        ({"load": "HERE"}, 2, "a stage-1 checkpoint cannot be continued here"),
        ({"cv_dir": "HERE"}, 1, "already holds a run"),
    ],
)
def test_what_would_lose_something_is_refused(begun, given, stage, why):
    given = {name: str(begun) if value == "HERE" else value for name, value in given.items()}
    with pytest.raises(UserError, match=why):
        resume.plan(options(**given), stage, CONFIG, "cv/tmp/")
    assert [path.name for path in begun.iterdir()] == [storage.LAST]


@pytest.mark.parametrize("schedule, told", [("cosine", ("--max_epochs 9 (was 5)",)), ("step", ())])
@pytest.mark.parametrize("place", ["here", "elsewhere"])
def test_another_end_of_a_cosine_is_told(begun, tmp_path, schedule, told, place):
    content = storage.content(begun)
    content["args"]["schedule"] = schedule
    storage.write(content, begun / storage.LAST)
    given = {"cv_dir": str(tmp_path / "new")} if place == "elsewhere" else {}
    args = options(load=str(begun), max_epochs=9, schedule=schedule, **given)
    assert resume.plan(args, 1, CONFIG, "cv/tmp/").notes == told


def test_a_finished_run_is_only_told_of(begun):
    plan = resume.plan(options(load=str(begun), max_epochs=2, penalty=-9.0), 1, CONFIG, "cv/tmp/")
    assert plan.progress()[0] == 2 and plan.notes == ()


def test_checkpoints_without_a_last_one_are_not_written_over(run, common, base_file, tmp_path):
    """As what is shipped, or a run whose last.t7 was damaged and deleted."""
    folder = tmp_path / "cl"
    folder.mkdir()
    (folder / "ckpt_E_1_A_0.900_R_1.00E-01_S_2.00_#_1.t7").touch()
    (folder / "metrics.jsonl").write_text("kept")
    given = [*common, "--base", base_file, "--cv_dir", folder, "--max_epochs", 1]
    for more in ([], ["--resume"]):
        refused(run("cl_training", *given, *more), "holds checkpoints and no last.t7", "--load")
    assert (folder / "metrics.jsonl").read_text() == "kept"
