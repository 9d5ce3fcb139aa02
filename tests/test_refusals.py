"""What users can get wrong: one line, exit status 2, nothing lost."""

import signal
import subprocess
import sys

import pytest
from conftest import ENV, ROOT, TINY, named, refused, told

from engine import storage


@pytest.mark.parametrize("script", ["pretrain", "cl_training", "finetune", "test"])
def test_unknown_models_list_the_known(script, run):
    options = ["--pretrained", "x"] if script == "finetune" else []
    refused(run(script, "--model", "R31_C10", *options), f"{script}.py: ", "R31_C10", "R110_C10")


@pytest.mark.parametrize(
    "options",
    [
        ("--alpha", 0.5), ("--alpha", 1.1), ("--alpha", "nan"), ("--batch_size", 0),
        ("--cl_step", 0), ("--max_epochs", -1), ("--lr", 0), ("--lr", "inf"), ("--beta", -1),
        ("--penalty", "nan"), ("--seed", 2**63), ("--precision", "fp16"),
        ("--no_such_flag",), ("--cl_blocks", 0.5),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(run, options, tmp_path):
    result = run("cl_training", "--cv_dir", tmp_path / "run", *options)
    refused(result, options[0])
    assert not (tmp_path / "run").exists()


def test_negative_numbers_may_have_an_exponent(run):
    refused(run("cl_training", "--penalty", "-1e-1", "--model", "R31_C10"), "R31_C10")


@pytest.mark.parametrize("script", ["visualize", "export"])
def test_scripts_of_one_process_say_so(script, run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(run(script, "--load", "none.t7", "--out", "none.onnx"), "without torchrun")


def test_bad_checkpoints_are_refused(run, common, base_file, stage_1, tmp_path):
    base = ["--base", base_file]
    good = named(stage_1)[0]
    broken = tmp_path / "broken.t7"
    broken.write_bytes(good.read_bytes()[:5000])
    for script in ("cl_training", "finetune", "test"):
        refused(run(script, *common, *base, "--load", tmp_path / "none.t7"), "none.t7: no such")
        refused(run(script, *common, *base, "--load", broken), "broken.t7: ", "damaged")
        refused(run(script, *common[2:], "--model", "R20_C10", "--load", good), good, "not R20_C10")
    refused(run("finetune", *common, *base, "--pretrained", broken), "broken.t7")
    refused(run("finetune", *common, *base, "--load", good), "stage-1", "--pretrained")
    refused(run("finetune", *common, *base), "--pretrained")
    refused(run("cl_training", *common, *base, "--load", base_file), "pretrained ResNet", "--base")
    refused(run("test", *common, "--base", good), "stage-1", "no ResNet")
    refused(run("pretrain", *common, "--load", good), "stage-1")


def test_a_policy_learned_on_another_base_is_refused(run, common, stage_1, tmp_path, base_file):
    other = storage.content(base_file)
    other["state_dict"]["fc.bias"] += 1
    storage.write(other, tmp_path / "other.t7")
    refused(
        run("test", *common, "--load", named(stage_1)[0], "--base", tmp_path / "other.t7"),
        "another base",
    )


def test_a_used_directory_is_not_written_over(run, common, base_file, stage_1):
    before = (stage_1 / "metrics.jsonl").read_bytes()
    refused(run("cl_training", *common, "--base", base_file, "--cv_dir", stage_1),
            "already holds a run", "--load")  # fmt: skip
    assert (stage_1 / "metrics.jsonl").read_bytes() == before


def test_a_second_base_is_not_put_beside_the_first(run, common, tmp_path):
    (tmp_path / "pk_E_1_A_0.100.t7").write_text("mine")
    refused(run("pretrain", *common, "--cv_dir", tmp_path), "pk_E_1_A_0.100.t7 is there already")
    assert (tmp_path / "pk_E_1_A_0.100.t7").read_text() == "mine"


def test_resuming_into_another_runs_directory_is_refused(run, common, base_file, stage_1, tmp_path):
    (tmp_path / "last.t7").write_text("another")
    refused(
        run("cl_training", *common, "--base", base_file, "--load", stage_1, "--cv_dir", tmp_path),
        "already holds a run",
    )


def test_a_directory_that_cannot_be_made_is_told(run, common, base_file, tmp_path):
    (tmp_path / "file").touch()
    refused(run("cl_training", *common, "--base", base_file, "--cv_dir", tmp_path / "file" / "x"),
            tmp_path / "file", "Not a directory")  # fmt: skip


def test_missing_data_is_told(run, base_file, tmp_path):
    refused(
        run("test", "--model", TINY, "--base", base_file, "--data_dir", tmp_path / "no",
            "--skip_data_check"),
        "no such directory",
    )  # fmt: skip


@pytest.mark.parametrize("policy", ["first", "last:3", "first:-1", "first:x", "first:7"])
def test_impossible_static_policies_are_refused(run, common, base_file, policy):
    refused(run("test", *common, "--base", base_file, "--policy", policy), policy)


def test_options_that_would_do_nothing_are_refused(run, common, base_file, stage_1):
    load = ["--base", base_file, "--load", stage_1]
    refused(run("test", *common, *load, "--sample_gates"), "ConvNet-AIG: R14_C10 has no gates")
    refused(run("visualize", *common, *load, "--penalty", -2), "no checkpoint of --load can")
    chosen = ["--penalties", -0.5, -50, "--policy", "first:2"]
    refused(run("finetune", *common, *chosen), "policies of its own")


def test_a_policy_stays_as_the_run_began(run, common, base_file, stage_1, tmp_path):
    """Neither the pixels that its network looks at nor a static one is changed by --load."""
    options = [*common, "--base", base_file, "--batch_size", 40]
    more = ["--load", stage_1, "--max_epochs", 3, "--policy_size", 16]
    refused(run("cl_training", *options, *more, "--cv_dir", tmp_path / "new"), "looks at 32 pixels")
    once = ["--max_epochs", 1, "--cv_dir", tmp_path / "static"]
    assert run("finetune", *options, "--policy", "random:3", *once)[0] == 0
    more = ["--max_epochs", 2, "--load", tmp_path / "static"]
    refused(run("finetune", *options, "--policy", "first:3", *more), "begun with --policy random:3")
    for policy in (["--policy", "random:3"], []):
        assert run("finetune", *options, *more, *policy)[0] == 0


def test_a_reader_that_has_had_enough_is_no_error(common, base_file):
    command = [sys.executable, ROOT / "test.py", *common, "--base", base_file]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV
    )
    process.stdout.close()
    assert told(process.stderr.read()) == "" and process.wait() == 128 + signal.SIGPIPE
