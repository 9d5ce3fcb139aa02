"""What the pictures show, against plain loops, and whole reports of odd checkpoints."""

import argparse
import json
import pickle
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, refused, script_module

import engine
import models
from engine import storage
from engine.data import DATA_SETS
from visual import facts, figures, page


@pytest.fixture
def seen():
    """Policies, labels and correctness of 60 images; class 3 of 5 has none."""
    rng = np.random.default_rng(0)
    policies = (rng.random((60, 4)) < [0.9, 0.5, 0.5, 0.1]).astype(np.uint8)
    labels = rng.choice([0, 1, 2, 4], 60)
    return policies, labels, rng.random(60) < 0.7


def test_distinct_policies(seen):
    policies, _, _ = seen
    rows, counts, which = facts.distinct(policies)
    expected = Counter(map(tuple, policies.tolist()))
    assert {tuple(r): c for r, c in zip(rows.tolist(), counts.tolist(), strict=True)} == expected
    assert list(counts) == sorted(expected.values(), reverse=True)
    assert np.array_equal(rows[which], policies)


def test_paths_of_a_class(seen):
    policies, labels, _ = seen
    found = facts.paths_of_class(policies, labels, 2, paths=3, examples=2)
    counts = Counter(tuple(p) for p, y in zip(policies.tolist(), labels, strict=True) if y == 2)
    assert [count for _, count, _ in found] == [c for _, c in counts.most_common(3)]
    for policy, count, images in found:
        takers = [i for i in range(60) if labels[i] == 2 and (policies[i] == policy).all()]
        assert counts[tuple(policy.tolist())] == count == len(takers)
        assert images.tolist() == takers[:2]
    assert facts.paths_of_class(policies, labels, 3, 3, 2) == []


def test_easy_and_hard(seen):
    policies, labels, correct = seen
    easy, hard = facts.easy_and_hard(policies, labels, correct, 1, 4)
    right = [i for i in range(60) if labels[i] == 1 and correct[i]]
    blocks = {i: int(policies[i].sum()) for i in right}
    assert easy.tolist() == sorted(right, key=lambda i: (blocks[i], i))[:4]
    assert hard.tolist() == sorted(right, key=lambda i: (-blocks[i], i))[:4]
    assert [len(a) for a in facts.easy_and_hard(policies, labels, correct, 3, 4)] == [0, 0]


def test_rates_and_accuracies_by_class_and_blocks(seen):
    policies, labels, correct = seen
    overall, by_class = facts.keep_rates(policies, labels, 5)
    accuracies = facts.accuracy_by_class(correct, labels, 5)
    groups = facts.blocks_by_class(policies, labels, 5)
    for k in range(4):
        assert overall[k] == pytest.approx(sum(policies[:, k].tolist()) / 60)
    for c in range(5):
        rows = [i for i in range(60) if labels[i] == c]
        assert groups[c].tolist() == [sum(policies[i].tolist()) for i in rows]
        if not rows:
            assert np.isnan(by_class[c]).all() and np.isnan(accuracies[c])
            continue
        assert accuracies[c] == pytest.approx(sum(correct[i] for i in rows) / len(rows))
        for k in range(4):
            assert by_class[c, k] == pytest.approx(sum(policies[i, k] for i in rows) / len(rows))
    numbers, counts, found = facts.accuracy_by_blocks(policies, correct)
    for number, count, accuracy in zip(numbers, counts, found, strict=True):
        rows = [i for i in range(60) if policies[i].sum() == number]
        assert len(rows) == count
        assert accuracy == pytest.approx(sum(correct[i] for i in rows) / count)
    assert facts.coverage(np.array([5, 3, 2])).tolist() == pytest.approx([0.5, 0.8, 1.0])


def test_extremes_leave_out_what_is_unknown():
    values = np.array([0.5, np.nan, 0.1, 0.9, 0.3, 0.7])
    assert facts.extremes(values, 2).tolist() == [2, 4, 5, 3]
    assert facts.extremes(values, 3).tolist() == [2, 4, 0, 5, 3]


def test_superclasses_are_the_data_sets_own():
    """Against the coarse labels of the published files, by number of the fine label."""
    coarse = """4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12
        14 16 9 11 5 5 19 8 8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2
        10 0 1 16 12 9 13 15 13 16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13"""
    data_set = DATA_SETS["CIFAR100"]
    found = facts.groups_of_classes(data_set.classes, data_set.superclasses)
    assert found.tolist() == [int(number) for number in coarse.split()]
    assert facts.groups_of_classes(["a", "b"], {"x": ["b"]}).tolist() == [-1, 0]


@pytest.mark.parametrize("classes", [100, 1000])
def test_keep_rates_of_many_classes_are_sorted_by_their_blocks(classes):
    rates = np.random.default_rng(0).random((classes, 4))
    rates[7] = np.nan  # a class without images
    names = [f"class {i}" for i in range(classes)]
    groups, by_group = (["x", "y"], rates[:2]) if classes == 100 else ([], rates[:0])
    figure = figures.sorted_heat_map(rates[0], by_group, groups, rates, names, (2, 2))
    expected = sorted((i for i in range(classes) if i != 7), key=lambda i: rates[i].sum())
    top, bottom = figure.axes[:2]
    assert np.array_equal(bottom.images[0].get_array(), rates[expected])
    blocks = top.images[0].get_array().sum(1)[1:]
    assert len(blocks) == len(groups) and list(blocks) == sorted(blocks)
    shown = [text for ax in figure.axes[1:3] for text in ax.get_yticklabels()]
    by_row = {text.get_position()[1]: text.get_text() for text in shown}
    in_order = [names[i] for i in expected]
    assert [by_row[row] for row in sorted(by_row)] == (in_order if classes == 100 else [])
    assert figure.get_figheight() < 20
    figures.plt.close(figure)


def test_training_curves(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"epoch": 1, "train_accuracy": 0.5, "test_rates": [1]}, {"epoch": 2, "x": 3}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert facts.training_curves(path) == {"train_accuracy": ([1], [0.5]), "x": ([2], [3])}


def test_the_end_of_the_curriculum():
    end = script_module("visualize").curriculum_end
    given = {"cl_step": 1, "max_epochs": 15}
    assert end(given, 15) == 15 and end(given, 16) is None
    assert end(given | {"cl_blocks": 5, "cl_step": 5, "warm_start": 4}, 15) == 7
    assert end(given | {"warm_start": 15}, 15) is None


def test_the_page_escapes_and_fetches_nothing(tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"png")
    section = page.section("a", "<b>", "x & y", picture, page.table(["<i>"], [["<u>"]]))
    text = page.page("<t>", "", [("a", "<b>", section)])
    for tag in ("<b>", "<i>", "<u>", "<t>"):
        assert tag not in text
    assert not re.search(r"(src|href)=\"(?!data:|#)", text) and "http" not in text


@pytest.fixture
def common(cifar_dir, base_file):
    return ["--data_dir", cifar_dir, "--skip_data_check", "--base", base_file]


def stage_2(path, bias, base_file):
    """A checkpoint whose policy is the same for every image: all kept or all dropped."""
    _, policy_net = models.build(TINY)
    with torch.no_grad():
        policy_net.logit.bias.fill_(bias)
        policy_net.logit.weight.zero_()
    content = {"agent": policy_net.state_dict(), "model": TINY, "stage": 2, "epoch": 1}
    storage.write(content | {"resnet": storage.content(base_file)["state_dict"]}, path)
    return path


def test_a_report_of_many_classes_groups_them(run, tmp_path):
    """Two images a class of CIFAR-100, under a policy network as it is initialised."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        pixels = rng.integers(0, 256, (200, 3072), dtype=np.uint8)
        batch = {"data": pixels, "fine_labels": [i // 2 for i in range(200)]}
        (folder / split).write_bytes(pickle.dumps(batch, protocol=2))
    torch.manual_seed(0)
    resnet, policy_net = models.build("R8_C100")
    content = {"agent": policy_net.state_dict(), "model": "R8_C100", "stage": 2, "epoch": 1}
    path = tmp_path / "ckpt.t7"
    storage.write(content | {"resnet": resnet.state_dict()}, path)
    out = tmp_path / "report"
    options = ["--data_dir", tmp_path, "--skip_data_check", "--load", path, "--out", out]
    options += ["--paths", 1, "--examples", 1]
    status, _, err = run("visualize", *options)
    assert status == 0, err
    text = (out / "report.html").read_text()
    assert "Blocks by superclass" in text and "20 classes that lose most" in text
    for name in ("fruit and vegetables", "sweet_pepper"):
        assert f"<td>{name}</td>" in text  # the figures behind have every row
    tall = [p.name for p in out.glob("*.png") if figures.plt.imread(p).shape[0] > 20 * 160]
    assert not tall


@pytest.mark.parametrize("bias", [50.0, -50.0])
def test_reports_of_a_single_policy(run, common, base_file, tmp_path, bias):
    path = stage_2(tmp_path / "ckpt.t7", bias, base_file)
    out = tmp_path / "report"
    options = [*common, "--load", path, "--out", out, "--subset", 7]  # classes without images
    status, text, err = run("visualize", *options)
    assert status == 0, err
    assert text.strip() == str(out / "report.html")
    pictures = {p.stem for p in out.glob("*.png")}
    shown = {"blocks", "keep_rates", "policies", "accuracy_by_blocks", "classes", "trade_off"}
    assert pictures >= shown | {"paths", "dependence"}
    assert "1 in all" in (out / "report.html").read_text()


def test_a_base_that_is_asked_for_and_missing_is_told(run, common, base_file, tmp_path):
    path = stage_2(tmp_path / "ckpt.t7", 50.0, base_file)
    options = [*common[:-1], tmp_path / "none.t7", "--load", path, "--out", tmp_path / "report"]
    refused(run("visualize", *options), "none.t7: no such")


def test_a_second_report_uses_the_first_ones_predictions(
    run, common, base_file, tmp_path, monkeypatch
):
    path = stage_2(tmp_path / "ckpt.t7", 50.0, base_file)
    options = [*common, "--load", path, "--out", tmp_path / "report"]
    assert run("visualize", *options)[0] == 0
    cached = storage.content(tmp_path / "ckpt.predictions.pt")
    assert cached["policy"].shape == (40, 6)

    forward = models.PolicyNet.forward
    batches = []

    def counted(self, x):
        batches.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(models.PolicyNet, "forward", counted)
    assert run("visualize", *options)[0] == 0
    assert max(batches, default=0) <= 1  # only FLOPs are counted, on one image
    assert run("visualize", *options, "--subset", 20)[0] == 0
    assert max(batches) == 20  # other images: predicted anew


def test_reports_of_gates_and_of_several_checkpoints(run, common, base_file, tmp_path):
    aig = tmp_path / "aig"
    train = ["--model", "AIG14_C10", *common[:3], "--cv_dir", aig, "--max_epochs", 1]
    assert run("aig_training", *train, "--batch_size", 40)[0] == 0
    other = stage_2(tmp_path / "ckpt.t7", -50.0, base_file)
    for load in ([aig, other], [other, aig]):
        options = [*common, "--load", *load, "--out", tmp_path / "report", "--time"]
        status, _, err = run("visualize", *options)
        assert status == 0, err
    assert (tmp_path / "report" / "time.png").exists()
    page = (tmp_path / "report" / "report.html").read_text()  # of the one that was given first
    assert "What the decisions owe" in page and "static, same FLOPs" in page
    status, _, err = run("visualize", *common, "--load", other, "--classes", "unicorn")
    assert status == 2 and "--classes unicorn: no such class" in err and err.count("\n") == 1


@pytest.mark.parametrize("load", ["stage2", "late8"])
def test_the_papers_points_do_not_depend_on_what_is_loaded(load):
    args = argparse.Namespace(model="R32_C10", load=str(ROOT / "cv" / "R32_C10" / load), base=None,
                              policy=None, penalty=None, seed=0, device="cpu", precision="fp32",
                              base_pixels=None)  # fmt: skip
    config = models.config("R32_C10")
    predicted = SimpleNamespace(config=config, trained=engine.TrainedModel(args, config))
    found = {label: flops for label, flops, _ in script_module("visualize").published(predicted)}
    # stem, shortcuts and classifier, 9.4 blocks of 9.14E+06, and 2.45E+07 of the policy network
    assert found["paper, stage 1"] == pytest.approx(1.11e8, rel=0.005)
    assert found["paper, stage 2"] == pytest.approx(8.83e7, rel=0.005)


def test_ticks_of_accuracy_differ():
    data = {"train_accuracy": ([1, 2], [0.933, 0.93]), "test_accuracy": ([2], [0.91])}
    figure = figures.curves(data, None)
    figure.canvas.draw()
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert len(set(labels)) == len(labels) and all(label.endswith("%") for label in labels)
