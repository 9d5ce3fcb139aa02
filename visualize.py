"""See what a policy has learned: a report of pictures from one or several checkpoints.

The first checkpoint is looked into; all take part in the trade-off of accuracy and cost.
"""

import html
from pathlib import Path

import numpy as np
from torch import Tensor

import engine
import models
import utils
from engine import UserError, options
from engine.predictions import Predictions
from visual import facts, figures, page
from visual.published import PAPER

MANY = 40  # classes, of which a picture does not show each in a line of its own


def parse_args():
    parser = options.parser(__doc__)
    options.add_base(parser)
    options.add_chosen_penalty(parser)
    add = parser.add_argument
    add("--load", nargs="+", required=True, help="checkpoints, or the cv_dirs that hold last.t7")
    add("--out", type=Path, default=Path("report"), help="directory of the report")
    add("--classes", nargs="+", help="names or numbers of classes to show (default: ten)")
    add("--paths", type=options.count, default=3, help="policies shown of each class")
    add("--examples", type=options.count, default=6, help="images shown of each")
    add("--batch_size", type=options.count, default=500, help="images a step")
    add("--time", action="store_true", help="also measure the time of each checkpoint")
    return parser.parse_args()


def chosen_classes(args, names: list[str], predicted: Predictions) -> list[int]:
    """The classes that --classes names, by name or number.

    Without it all of ten; of more, ten from those with the fewest blocks to those with the most.
    """
    if not args.classes:
        _, by_class = facts.keep_rates(predicted.policies, predicted.labels, len(names))
        shown = figures.by_blocks_kept(by_class)
        if len(names) <= 10:
            return sorted(shown)
        return list(shown[np.linspace(0, len(shown) - 1, min(10, len(shown))).round().astype(int)])
    numbers = []
    for given in args.classes:
        if given in names:
            numbers.append(names.index(given))
        elif given.isdigit() and int(given) < len(names):
            numbers.append(int(given))
        else:
            raise UserError(f"--classes {given}: no such class among {', '.join(names[:10])} ...")
    return numbers


class Report:
    """Sections of pictures, each drawn to a PNG file and put on the page."""

    def __init__(self, out: Path):
        self.out = out
        self.sections: list[tuple[str, str, str]] = []
        with engine.user_errors(out):
            out.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, title: str, text: str, figure, behind: str = "") -> None:
        path = self.out / f"{name}.png"
        with engine.user_errors(path):
            figure.savefig(path, dpi=160)
        figures.plt.close(figure)
        is_wide = figure.get_figwidth() > 7
        content = page.section(name, title, text, path, behind, is_wide)
        self.sections.append((name, title, content))

    def write(self, title: str, head: str) -> Path:
        path = self.out / "report.html"
        with engine.user_errors(path):
            path.write_text(page.page(title, head, self.sections))
        return path


def percent(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.1%}"


def add_paths(report: Report, predicted: Predictions, classes, names, args) -> None:
    rows, behind = [], []
    for label in classes:
        total = int((predicted.labels == label).sum())
        for policy, count, images in facts.paths_of_class(
            predicted.policies, predicted.labels, label, args.paths, args.examples
        ):
            pictures = [predicted.test.picture(int(i)) for i in images]
            rows.append((names[label], count / total, policy, pictures))
            kept = "".join(map(str, policy.astype(int)))
            behind.append([names[label], f"{count / total:.1%}", int(policy.sum()), kept])
    if rows:
        figure = figures.paths(rows, predicted.config.stages, args.examples)
        table = page.table(["class", "images", "blocks", "policy"], behind)
        report.add("paths", "Paths",
            "The most frequent policies of each class, a filled square for a block that is kept, "
            "with images that take them.", figure, table)  # fmt: skip


def add_easy_and_hard(report: Report, predicted: Predictions, classes, names, args) -> None:
    rows, blocks = [], predicted.policies.sum(1).astype(int)
    for label in classes:
        groups = facts.easy_and_hard(
            predicted.policies, predicted.labels, predicted.correct, label, args.examples
        )
        if len(groups[0]):
            shown = (
                [(predicted.test.picture(int(i)), blocks[i]) for i in group] for group in groups
            )
            rows.append((names[label], *shown))
    if rows:
        report.add("easy_hard", "Easy and hard",
            "Of each class the rightly recognised images that got the fewest and the most blocks; "
            "the number below an image is its blocks.",
            figures.easy_hard(rows, args.examples))  # fmt: skip


def add_blocks(report: Report, predicted: Predictions, names: list[str]) -> None:
    """Blocks by class; with many classes by superclass, or of the classes at both ends."""
    policies, labels = predicted.policies, predicted.labels
    groups = facts.blocks_by_class(policies, labels, len(names))
    means = np.array([g.mean() if len(g) else np.nan for g in groups])
    behind = page.table(
        ["class", "images", "blocks", "deviation", "fewest", "most"],
        [[names[i], len(g), f"{g.mean():.2f}", f"{g.std():.2f}", int(g.min()), int(g.max())]
         for i, g in enumerate(groups) if len(g)],
    )  # fmt: skip
    title, things, more, members = "Blocks by class", "class", "", ()
    if len(names) > MANY and predicted.superclasses:
        of_class = facts.groups_of_classes(names, predicted.superclasses)
        members = [means[of_class == i] for i in range(len(predicted.superclasses))]
        groups = facts.blocks_by_class(policies, of_class[labels], len(members))
        names, title, things = list(predicted.superclasses), "Blocks by superclass", "superclass"
        more = " Strokes are the means of its classes."
    elif len(names) > MANY:
        ends = facts.extremes(means, MANY // 2)
        groups, names = [groups[i] for i in ends], [names[i] for i in ends]
        more = f" The {MANY // 2} classes with the fewest blocks and the {MANY // 2} with the most."
    report.add("blocks", title,
        f"Half of a {things}'s images lie in its box, 96 % between the whiskers; the line is the "
        f"median, the dot the mean.{more}",
        figures.distribution(groups, names, predicted.config.num_blocks, members),
        behind)  # fmt: skip


def add_keep_rates(report: Report, predicted: Predictions, names: list[str]) -> None:
    policies, labels, stages = predicted.policies, predicted.labels, predicted.config.stages
    overall, by_class = facts.keep_rates(policies, labels, len(names))
    rows = [("all", overall), *zip(names, by_class, strict=True)]
    text = "Along the network, by class."
    if len(names) > MANY:
        groups = list(predicted.superclasses)
        of_class = facts.groups_of_classes(names, predicted.superclasses)
        _, by_group = facts.keep_rates(policies, of_class[labels], len(groups))
        rows += zip(groups, by_group, strict=True)
        figure = figures.sorted_heat_map(overall, by_group, groups, by_class, names, stages)
        text = "Along the network, by class, from the classes with the fewest blocks to the most."
        text = text.replace("by class", "by superclass and by class", 1) if groups else text
    else:
        figure = figures.heat_map(overall, by_class, names, stages)
    behind = page.table(
        ["class", *range(len(overall))],
        [[name, *(f"{r:.2f}" for r in rates)] for name, rates in rows if not np.isnan(rates).any()],
    )
    report.add("keep_rates", "How often each block is kept", text, figure, behind)


def add_class_change(report: Report, predicted: Predictions, names: list[str]) -> None:
    ours = facts.accuracy_by_class(predicted.correct, predicted.labels, len(names))
    full = facts.accuracy_by_class(predicted.full_correct, predicted.labels, len(names))
    behind = page.table(
        ["class", "accuracy", "full ResNet"],
        [[names[i], percent(ours[i]), percent(full[i])]
         for i in range(len(names)) if not np.isnan(ours[i])],
    )  # fmt: skip
    text = "Against the same weights with every block kept; beside the name the class's accuracy."
    if len(names) > MANY:
        ends = facts.extremes(ours - full, MANY // 2)
        ours, full, names = ours[ends], full[ends], [names[i] for i in ends]
        text += f" The {MANY // 2} classes that lose most and the {MANY // 2} that gain most."
    report.add("classes", "Which classes gain and lose", text,
        figures.class_change(ours, full, names), behind)  # fmt: skip


def add_policies(report: Report, predicted: Predictions) -> None:
    policies = predicted.policies
    rows, counts, _ = facts.distinct(policies)
    covered = facts.coverage(counts)
    behind = page.table(
        ["rank", "images", "covered", "blocks", "policy"],
        [[i + 1, int(counts[i]), f"{covered[i]:.1%}", int(rows[i].sum()),
          "".join(map(str, rows[i].astype(int)))] for i in range(min(20, len(rows)))],
    )  # fmt: skip
    half = int(np.searchsorted(covered, 0.5)) + 1
    most = f"the most frequent one covers {covered[0]:.0%} of the images"
    if half > 1:
        most += f", the {half} most frequent {covered[half - 1]:.0%}"
    report.add("policies", "Distinct policies", f"{len(rows)} in all; {most}.",
        figures.policies(counts, covered), behind)  # fmt: skip

    numbers, counts, accuracies = facts.accuracy_by_blocks(policies, predicted.correct)
    behind = page.table(
        ["blocks", "images", "accuracy"],
        [[int(n), int(c), f"{a:.1%}"] for n, c, a in zip(numbers, counts, accuracies, strict=True)],
    )  # fmt: skip
    report.add("accuracy_by_blocks", "Accuracy by blocks kept",
        "It falls where the harder images get more blocks. The size of a dot grows with the number "
        "of images.", figures.by_blocks(numbers, counts, accuracies), behind)  # fmt: skip


def published(predicted: Predictions) -> list[tuple[str, float, float]]:
    """The paper's points as (label, FLOPs, accuracy); FLOPs from mean blocks if need be.

    These are of the paper's policy network, which looks at all of CIFAR's pixels.
    """
    known = PAPER.get(predicted.config.name, [])
    if not known:
        return []
    fixed, per_block = predicted.trained.resnet_flops()
    _, policy_net = models.build(predicted.config.name)
    fixed += utils.count_flops(policy_net, predicted.trained.input_size)
    mean = float(per_block.mean())
    return [
        (f"paper, {label}", flops or fixed + blocks * mean, accuracy)
        for label, blocks, flops, accuracy in known
    ]


def add_points(
    report: Report, name: str, title: str, text: str, points: list, unit: str, form: str
) -> None:
    """Accuracy against a cost; points: (kind, label, cost, accuracy), costs shown by `form`."""
    behind = page.table(
        ["", "kind", "accuracy", unit],
        [[label, kind, f"{accuracy:.2%}", form.format(cost)]
         for kind, label, cost, accuracy in points],
    )  # fmt: skip
    report.add(name, title, text, figures.trade_off(points, unit), behind)


def add_trade_off(report: Report, all_predicted: list[Predictions], args) -> None:
    first = all_predicted[0]
    full = base_accuracy(first)
    points = [("full ResNet", "full", first.full_flops, full)] if full else []
    points += [
        (predicted.kind, predicted.folder.name, predicted.flops, predicted.accuracy)
        for predicted in all_predicted
    ]
    points += [("published", *point) for point in published(first)]
    add_points(report, "trade_off", "Accuracy and FLOPs",
        "A multiply-add counts two; policy networks and gates are included. Published points "
        "without FLOPs are placed by their mean number of blocks and the paper's policy network.",
        points, "FLOPs an image", "{:.3g}")  # fmt: skip
    if not args.time:
        return
    points = []
    for predicted in all_predicted:
        times = predicted.trained.time(predicted.test, predicted.test.batch_size)
        if predicted is first and full:
            points.append(("full ResNet", "full", times["full_ms_per_image"], full))
        own = times["ms_per_image"], predicted.accuracy
        points.append((predicted.kind, predicted.folder.name, *own))
    add_points(report, "time", "Accuracy and time",
        f"Milliseconds an image, networks deployed, batch {times['batch_size']}.",
        points, "milliseconds an image", "{:.3f}")  # fmt: skip


def add_dependence(report: Report, predicted: Predictions) -> None:
    """Accuracy and FLOPs under other ways to decide, for the same network."""
    found = predicted.dependence
    if not found:
        return
    rows = {name: found[name] for name in ("own", "shuffled", "most_frequent", "static")}
    rows["static, same FLOPs"] = found["static_same_flops"]
    by_difficulty = engine.dependence.by_difficulty(found)
    kinds = {"own": "BlockDrop", "shuffled": "shuffled", "most_frequent": "shuffled"}
    points = [
        (kinds.get(name, "static"), name, row["flops"], row["accuracy"])
        for name, row in rows.items()
    ]
    add_points(report, "dependence", "What the decisions owe to the image",
        "Own: each image under its own policy. Shuffled: the same, over other images. "
        "Most frequent: that policy for all. Static: the best one of DistributeK, LateK and "
        "the policy network's candidates with as many blocks, and with what deciding costs spent "
        "on blocks as well. All on the same network. "
        f"Mean blocks of images that the full network gets {by_difficulty}.",
        points, "FLOPs an image", "{:.3g}")  # fmt: skip


def base_accuracy(predicted: Predictions) -> float | None:
    """The base ResNet's accuracy; None for ConvNet-AIG, and where there is no base."""
    if predicted.config.gated:
        return None
    try:
        base = predicted.trained.base()
    except UserError:
        if predicted.trained.args.base:  # one that was asked for
            raise
        return None

    def step(images: Tensor, labels: Tensor):
        return {"correct": base.run(images)[0].argmax(1) == labels}

    results = engine.evaluate(step, predicted.test, base.args.precision, "the full ResNet")
    return results["correct"].double().mean().item()


def add_curves(report: Report, predicted: Predictions) -> None:
    metrics = predicted.folder / "metrics.jsonl"
    if metrics.exists():
        given = predicted.made_with
        end = curriculum_end(given, predicted.config.num_blocks) if "cl_step" in given else None
        figure = figures.curves(facts.training_curves(metrics), end)
        report.add("curves", "Training", "Figures over epochs.", figure)


def curriculum_end(given: dict, num_blocks: int) -> int | None:
    """The first epoch in which all blocks are learned, by the options of a stage-1 run; None where
    it ended before.
    """
    pace, start = (given["cl_step"], given.get("cl_blocks", 1)), given.get("warm_start", 0)
    epochs = range(start + 1, given["max_epochs"] + 1)
    return next((e for e in epochs if utils.curriculum_step(e - start, *pace) >= num_blocks), None)


def main() -> None:
    args = parse_args()
    engine.ranks.refuse_several("visualize.py")
    engine.device.keep_freed_memory()
    chooses = (engine.storage.read(path).can_choose for path in args.load)
    if args.penalty is not None and not any(chooses):
        raise UserError("--penalty: no checkpoint of --load can choose for one")
    all_predicted = [Predictions(path, args) for path in args.load]
    predicted = all_predicted[0]
    names = predicted.test.class_names
    classes = chosen_classes(args, names, predicted)

    report = Report(args.out)
    add_paths(report, predicted, classes, names, args)
    add_easy_and_hard(report, predicted, classes, names, args)
    add_blocks(report, predicted, names)
    add_keep_rates(report, predicted, names)
    add_policies(report, predicted)
    add_class_change(report, predicted, names)
    add_dependence(report, predicted)
    add_trade_off(report, all_predicted, args)
    add_curves(report, predicted)
    blocks = predicted.policies.sum(1)
    head = page.table(
        ["", "accuracy", "blocks", "FLOPs/img", "policies", "images"],
        [[predicted.folder.name, f"{predicted.accuracy:.2%}",
          f"{blocks.mean():.2f} ± {blocks.std():.2f} of {predicted.config.num_blocks}",
          f"{predicted.flops:.3g}", len(facts.distinct(predicted.policies)[0]), len(blocks)]],
    )  # fmt: skip
    part = f", --subset {args.subset}: the first images only" if args.subset else ""
    penalty = predicted.trained.args.penalty  # None where this one cannot choose for it
    if args.penalty is not None:
        part = f"{', others at' if penalty is None else ','} --penalty {args.penalty:g}{part}"
    source = f"<code>{html.escape(str(predicted.path))}</code>, {predicted.kind}{part}"
    head = f'<p class="soft">{source}</p>{head}'
    print(report.write(f"{predicted.config.name}: what the policy has learned", head))


if __name__ == "__main__":
    engine.run_script(main)
