"""Runs that stop and go on: to the same bits, from the newest state, under their own options."""

import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ENV, ROOT, metrics, named, options_of, refused, told, trained
from faults import same

import engine
from engine import storage

FASTER = {  # than the released recipe: what the README offers, all at once
    "cl_training": ["--schedule", "cosine", "--alpha", 0.95, "--samples", 2, "--cl_blocks", 3],
    "finetune": ["--schedule", "cosine", "--alpha", 0.95, "--resnet_lr", 0.01,
                 "--distill", 0.5],
}  # fmt: skip


@pytest.mark.parametrize(
    "script, schedule",
    [
        ("pretrain", []),
        ("pretrain", ["--routes"]),
        ("cl_training", ["--epoch_step", 2]),
        ("cl_training", FASTER["cl_training"]),
        ("finetune", ["--epoch_step", 2]),
        ("finetune", FASTER["finetune"]),
    ],
)
def test_resumed_run_ends_bit_identical(
    script, schedule, run, common, base_file, stage_1, tmp_path
):
    options = options_of(script, common, base_file, stage_1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    schedule = [*schedule, "--test_every", 2, "--seed", 5]
    assert run(script, *options, *schedule, "--cv_dir", whole, "--max_epochs", 3)[0] == 0

    # stop after the first epoch, as a crash would, and go on in a new process's state
    command = [*options, *schedule, "--cv_dir", parts, "--max_epochs", 3]
    for _ in range(10):  # on a busy machine, tiny runs may end before they are killed
        shutil.rmtree(parts, ignore_errors=True)
        process = start(script, command)
        wait_for_epoch(process, parts, 1)
        process.send_signal(signal.SIGKILL)
        if process.wait() != 0:
            break
    assert process.returncode == -signal.SIGKILL  # before its end, so in mid-epoch
    done = storage.content(parts)["epoch"]
    assert done < 3
    status, out, err = run(script, *options, *schedule, "--load", parts, "--max_epochs", 3)
    assert status == 0, err
    assert same(trained(whole), trained(parts)), done
    assert metrics(whole) == metrics(parts)


def start(script, options):
    def hear_interrupts():  # where a shell started the tests in the background, none are heard
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = [sys.executable, ROOT / f"{script}.py", *options]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV,
        preexec_fn=hear_interrupts,
    )  # fmt: skip


def wait_for_epoch(process, folder, epoch):
    """Until the run has finished an epoch, or all."""
    for _ in range(6000):
        if process.poll() is not None:
            return
        path = folder / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= epoch:
            return
        time.sleep(0.01)
    raise AssertionError("the run never got there")


def test_a_restart_goes_on_from_the_newest_state(run, common, base_file, tmp_path, monkeypatch):
    """Also where the command names an older checkpoint, or that of another directory."""
    options = [*common, "--base", base_file, "--batch_size", 40, "--test_every", 1]
    first, other = tmp_path / "first", tmp_path / "other"
    assert run("cl_training", *options, "--cv_dir", first, "--max_epochs", 2)[0] == 0
    older = named(first)[0]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    status, out, err = run("cl_training", *options, "--load", older, "--max_epochs", 3)
    assert status == 0 and out.startswith("E: 3 |"), err
    for epochs in (2, 3):
        status, out, err = run("cl_training", *options, "--load", older, "--cv_dir", other,
                               "--max_epochs", epochs)  # fmt: skip
        assert status == 0 and out.startswith(f"E: {epochs} |"), err
        assert [line["epoch"] for line in metrics(other)] == list(range(1, epochs + 1))


def test_inside_an_epoch_the_batches_stay_as_they_were(run, common, base_file, tmp_path):
    options = [*common, "--base", base_file, "--max_epochs", 2]
    assert run("cl_training", *options, "--batch_size", 40, "--cv_dir", tmp_path)[0] == 0
    content = storage.content(tmp_path)
    content |= {"epoch": 1, "steps_done": 2, "partial": {}}
    storage.write(content, tmp_path / "last.t7")
    refused(run("cl_training", *options, "--batch_size", 20, "--load", tmp_path),
            "inside an epoch of --batch_size 40")  # fmt: skip


def test_a_run_first_writes_where_it_begins(run, common, base_file, tmp_path):
    """Inside an epoch, and in place of a newer state of its own directory."""
    options = [*common, "--base", base_file, "--batch_size", 40, "--test_every", 1]
    assert run("cl_training", *options, "--cv_dir", tmp_path / "a", "--max_epochs", 2)[0] == 0
    content = storage.content(tmp_path / "a")
    storage.write(content | {"epoch": 1, "steps_done": 2, "partial": {}}, tmp_path / "part.t7")
    first = {}

    def stop(run, loader):
        first.update(storage.content(run.cv_dir))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Run, "batches", stop)
        options += ["--max_epochs", 3]
        run("cl_training", *options, "--load", tmp_path / "part.t7", "--cv_dir", tmp_path / "b")
        assert (first["epoch"], first["steps_done"]) == (1, 2)
        run("cl_training", *options, "--load", named(tmp_path / "a")[0])
        assert (first["epoch"], first["steps_done"]) == (1, 0)
        assert storage.content(tmp_path / "a")["epoch"] == 1


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_a_run_that_goes_on(number, status, run, common, base_file, tmp_path):
    options = [*common, "--base", base_file, "--cv_dir", tmp_path, "--batch_size", 5]
    process = start("cl_training", [*options, "--max_epochs", 1000])
    wait_for_epoch(process, tmp_path, 1)
    process.send_signal(number)
    err = told(process.communicate(timeout=30)[1])
    assert process.returncode == status
    assert err.count("\n") == 1 and f"go on with --load {tmp_path}/last.t7" in err
    done = storage.content(tmp_path)["epoch"]
    code, out, err = run(
        "cl_training", *common, "--base", base_file, "--batch_size", 5, "--load", tmp_path,
        "--max_epochs", done + 1,
    )  # fmt: skip
    assert code == 0 and out.startswith(f"E: {done + 1} |"), err


def test_a_loss_that_is_not_finite_stops_the_run(run, common, tmp_path):
    status, out, err = run(
        "pretrain", *common, "--cv_dir", tmp_path, "--max_epochs", 30, "--batch_size", 40,
        "--lr", 1e30, "--clip_norm", 1e30, "--warmup", 0,
    )  # fmt: skip
    assert status == 2
    assert re.search(r"the loss is (nan|inf) .* in epoch \d+, step \d+ of 3 .*lower --lr", err)
    assert err.count("\n") == 1 and f"go on with --load {tmp_path}" in err
    assert all(t.isfinite().all() for t in storage.content(tmp_path)["state_dict"].values())


def test_a_finished_run_is_left_alone(run, common, base_file, stage_1):
    before = {p: p.read_bytes() for p in stage_1.iterdir() if p.is_file()}
    status, out, err = run("cl_training", *common, "--base", base_file, "--load", stage_1,
                           "--max_epochs", 2)  # fmt: skip
    assert status == 0 and "all 2 epochs are done" in out
    assert before == {p: p.read_bytes() for p in stage_1.iterdir() if p.is_file()}


def test_a_run_killed_after_its_base_was_written_goes_on(run, common, tmp_path):
    options = [*common, "--max_epochs", 2, "--batch_size", 40, "--test_every", 1]
    assert run("pretrain", *options, "--cv_dir", tmp_path)[0] == 0
    (saved,) = tmp_path.glob("pk_E_2_*.t7")
    before = storage.content(saved)
    content = storage.content(tmp_path)
    assert run("pretrain", *options[:-6], "--max_epochs", 1, "--batch_size", 40,
               "--test_every", 1, "--cv_dir", tmp_path / "one")[0] == 0  # fmt: skip
    (tmp_path / "last.t7").write_bytes((tmp_path / "one" / "last.t7").read_bytes())
    status, out, err = run("pretrain", *options, "--load", tmp_path)
    assert status == 0, err
    assert storage.content(tmp_path)["epoch"] == content["epoch"] == 2
    assert storage.content(saved).keys() == before.keys()


def test_a_run_goes_on_under_its_own_options(run, common, base_file, tmp_path):
    options = [*common, "--base", base_file, "--batch_size", 40, "--test_every", 1]
    first = tmp_path / "first"
    assert run("cl_training", *options, "--cv_dir", first, "--max_epochs", 1)[0] == 0
    refused(run("cl_training", *options, "--load", first, "--max_epochs", 2, "--penalty", -4),
            "begun with --penalty -1.0, not -4.0", "--cv_dir")  # fmt: skip
    status, _, err = run("cl_training", *options, "--load", first, "--cv_dir", tmp_path / "other",
                         "--max_epochs", 2, "--penalty", -4)  # fmt: skip
    assert status == 0 and "--penalty -4.0 (was -1.0)" in err
    status, _, err = run("cl_training", *options, "--load", first, "--max_epochs", 2,
                         "--micro_batch", 20, "--precision", "bf16")  # fmt: skip
    assert status == 0 and "--precision bf16 (was fp32)" in err, err


def test_a_network_that_the_checkpoint_lacks_is_said(run, common, base_file, stage_1, tmp_path):
    options = ["--base", base_file, "--batch_size", 40, "--cv_dir", tmp_path, "--max_epochs", 1]
    pretrained = ["--pretrained", named(stage_1)[0]]
    assert run("finetune", *common, *options, *pretrained)[0] == 0
    content = storage.content(tmp_path)
    # the released code calls the policy network net
    for name, rest in (("agent", {"net": content["agent"]}), ("resnet", {})):
        kept = {n: value for n, value in content.items() if n != name} | rest
        storage.write(kept | {"stage": 2}, tmp_path / "last.t7")
        result = run("finetune", *common, *options[:-1], 2, "--load", tmp_path)
        if rest:
            assert result[0] == 0, result[2]
        else:
            refused(result, "holds no ResNet")


def test_a_run_begun_with_an_option_that_is_gone_goes_on_elsewhere(
    run, common, base_file, tmp_path
):
    options = [*common, "--base", base_file, "--batch_size", 20]
    old = tmp_path / "old"
    assert run("cl_training", *options, "--cv_dir", old, "--max_epochs", 1)[0] == 0
    content = storage.content(old)
    content["args"]["alpha_end"] = 0.95
    storage.write(content, old / "last.t7")
    go_on = [*options, "--load", old, "--max_epochs", 2]
    refused(run("cl_training", *go_on), "--alpha_end, which there is no more")
    status, _, err = run("cl_training", *go_on, "--cv_dir", tmp_path / "new")
    assert status == 0, err
