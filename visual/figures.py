"""The pictures: matplotlib figures, readable in print and by the colour-blind."""

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator, PercentFormatter  # noqa: E402
from matplotlib.transforms import Bbox  # noqa: E402
from numpy import ndarray  # noqa: E402

# Okabe and Ito's colours, told apart with any colour vision
BLUE, ORANGE, GREEN, PURPLE, GRAY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
plt.rcParams.update({
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
})  # fmt: skip


def stage_lines(ax, stages: Sequence[int], label: bool = True) -> None:
    """Mark where the network's stages begin along a horizontal axis of blocks."""
    edges = np.cumsum([0, *stages])
    for edge in edges[1:-1]:
        ax.axvline(edge - 0.5, color="black", linewidth=1)
    if label:
        for number, (start, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True), 1):
            ax.annotate(f"stage {number}", ((start + stop - 1) / 2, 1), xytext=(0, 3),
                        xycoords=ax.get_xaxis_transform(), textcoords="offset points",
                        ha="center", fontsize=8)  # fmt: skip


def draw_path(ax, policy: ndarray, stages: Sequence[int]) -> None:
    """One policy as a row of squares, filled where the block is kept, a gap between stages."""
    stage = np.repeat(np.arange(len(stages)), stages)
    left = np.arange(len(policy)) + 0.6 * stage
    colours = [BLUE if keep else "#dfe6ec" for keep in policy]
    ax.bar(left, 1, width=0.88, color=colours)
    ax.set(xticks=[], yticks=[], ylim=(-0.35, 1.35), xlim=(-0.6, left[-1] + 0.6))
    ax.spines[:].set_visible(False)


def paths(rows, stages: Sequence[int], examples: int) -> Figure:
    """Frequent policies of classes with images that take them (paper, Figure 4).

    rows: (class name, share, policy (K,), pictures) a path.
    """
    figure, axes = plt.subplots(
        len(rows), examples + 1, figsize=(10, 0.62 * len(rows) + 0.2), squeeze=False,
        gridspec_kw={"width_ratios": [5] + [0.62] * examples},
    )  # fmt: skip
    previous = None
    for line, (name, share, policy, pictures) in zip(axes, rows, strict=True):
        draw_path(line[0], policy, stages)
        head = name if name != previous else ""
        previous = name
        line[0].set_ylabel(f"{head}\n{share:.0%}, {int(policy.sum())} blocks", rotation=0,
                           ha="right", va="center", fontsize=8)  # fmt: skip
        for ax, picture in zip(line[1:], pictures, strict=False):
            ax.imshow(picture)
        for ax in line[1:]:
            ax.axis("off")
    return figure


def easy_hard(rows, examples: int) -> Figure:
    """Images with the fewest and the most blocks (paper, Figure 5).

    rows: (class name, easy, hard), each of these a list of (picture, blocks).
    """
    figure, axes = plt.subplots(
        len(rows), 2 * examples + 1, figsize=(10, 0.85 * len(rows) + 0.5), squeeze=False,
        gridspec_kw={"width_ratios": [1] * examples + [0.3] + [1] * examples},
    )  # fmt: skip
    for line, (name, easy, hard) in zip(axes, rows, strict=True):
        for ax in line:
            ax.set(xticks=[], yticks=[])
            ax.axis("off")
        for first, group in ((0, easy), (examples + 1, hard)):
            for ax, (picture, blocks) in zip(line[first:], group, strict=False):
                ax.imshow(picture)
                ax.text(0.5, -0.02, f"{blocks}", transform=ax.transAxes, ha="center", va="top",
                        fontsize=8)  # fmt: skip
        line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center",
                     fontsize=9)  # fmt: skip
    for column, title in ((0, "fewest blocks"), (examples + 1, "most blocks")):
        axes[0][column].set_title(title)
    return figure


def distribution(
    groups: Sequence[ndarray], names: Sequence[str], num_blocks: int, members=()
) -> Figure:
    """Blocks kept, by class: quartiles as a box, the mean as a dot, 2 to 98 % as whiskers.

    members: of each group, where the groups are superclasses, the means of its classes; small
    strokes.
    """
    order = sorted((i for i in range(len(names)) if len(groups[i])), key=lambda i: groups[i].mean())
    figure, ax = plt.subplots(figsize=(6.5, 0.3 * len(order) + 1.1))
    boxes = ax.boxplot(
        [groups[i] for i in order], orientation="horizontal", whis=(2, 98), showfliers=False,
        showmeans=True, patch_artist=True, widths=0.6,
        meanprops={"marker": "o", "markerfacecolor": ORANGE, "markeredgecolor": ORANGE,
                   "markersize": 5},
        medianprops={"color": "black"},
    )  # fmt: skip
    for box in boxes["boxes"]:
        box.set(facecolor="#cfe2f0", edgecolor=BLUE)
    for row, i in enumerate(order, 1):
        if len(members):
            ax.plot(members[i], np.full(len(members[i]), row), "|", color=ORANGE, markersize=9)
    ax.set_yticks(range(1, len(order) + 1), [names[i] for i in order])
    ax.invert_yaxis()  # from the fewest blocks down to the most, as in the heat maps
    ax.set(xlabel="blocks kept", xlim=(-0.5, num_blocks + 0.5))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


RATES = {"cmap": "cividis", "vmin": 0, "vmax": 1, "aspect": "auto", "interpolation": "none"}


def heat_map(overall: ndarray, by_class: ndarray, names: Sequence[str], stages) -> Figure:
    """How often each block is kept, all images and by class, along the network."""
    classes = [i for i in range(len(names)) if not np.isnan(by_class[i]).any()]
    values = np.vstack([overall[None], by_class[classes]])
    figure, ax = plt.subplots(figsize=(10, 0.26 * len(values) + 1.2))
    image = ax.imshow(values, **RATES)
    ax.set_yticks(range(len(values)), ["all", *(names[i] for i in classes)])
    ax.axhline(0.5, color="white", linewidth=3)
    stage_lines(ax, stages)
    ax.set(xlabel="block")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=ax, label="images that keep it", format="{x:.0%}", pad=0.01)
    return figure


def sorted_heat_map(
    overall: ndarray,
    by_group: ndarray,
    groups: Sequence[str],
    by_class: ndarray,
    names: Sequence[str],
    stages: Sequence[int],
) -> Figure:
    """As heat_map where there are many classes: superclasses, of which there may be none, above
    all classes, both from the fewest blocks to the most.
    """
    above, below = by_blocks_kept(by_group), by_blocks_kept(by_class)
    heights = [0.26 * (1 + len(above)), min(0.085 * len(below), 9)]
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(10, sum(heights) + 1.8), height_ratios=heights, sharex=True
    )
    image = top.imshow(np.vstack([overall[None], by_group[above]]), **RATES)
    top.set_yticks(range(1 + len(above)), ["all", *(groups[i] for i in above)])
    top.axhline(0.5, color="white", linewidth=3)
    bottom.imshow(by_class[below], **RATES)
    bottom.set_yticks([])
    bottom.set(xlabel="block", ylabel="" if len(below) <= 120 else f"{len(below)} classes")
    if len(below) <= 120:  # names fit, every other one on the right
        for ax, first in ((bottom, 0), (bottom.twinx(), 1)):
            rows = range(first, len(below), 2)
            ax.set_yticks(rows, [names[below[row]] for row in rows], fontsize=8)
            ax.set_ylim(len(below) - 0.5, -0.5)
    for ax in (top, bottom):
        stage_lines(ax, stages, label=ax is top)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=[top, bottom], location="top", shrink=0.5, aspect=40, pad=0.01,
                    anchor=(0, 0.5), label="images that keep it", format="{x:.0%}")  # fmt: skip
    return figure


def by_blocks_kept(rates: ndarray) -> ndarray:
    """Rows of keep rates (C, K) from the fewest blocks to the most; those of NaN left out."""
    blocks = rates.sum(1)
    return np.argsort(blocks, kind="stable")[: np.count_nonzero(~np.isnan(blocks))]


def policies(counts: ndarray, covered: ndarray) -> Figure:
    """How much of the data the most frequent policies cover."""
    figure, ax = plt.subplots(figsize=(6, 3))
    ranks = np.arange(1, len(counts) + 1)
    ax.plot(ranks, covered, color=BLUE, marker="o" if len(counts) < 30 else None, markersize=4)
    if len(counts) > 20:
        ax.set_xscale("log")
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="most frequent policies", ylabel="images they cover", ylim=(0, 1.03))
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.grid(alpha=0.3)
    return figure


def by_blocks(numbers: ndarray, counts: ndarray, accuracies: ndarray) -> Figure:
    """Accuracy of the images that keep as many blocks, and how many these are."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(6, 3.6), sharex=True, height_ratios=[2, 1])
    sizes = 20 + 180 * counts / counts.max()
    top.scatter(numbers, accuracies, s=sizes, color=BLUE, alpha=0.8)
    top.set(ylabel="accuracy", ylim=(min(0.5, accuracies.min()) - 0.05, 1.05))
    top.yaxis.set_major_formatter("{x:.0%}")
    top.grid(alpha=0.3)
    bottom.bar(numbers, counts, color=GRAY)
    bottom.set(xlabel="blocks kept", ylabel="images")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def class_change(ours: ndarray, full: ndarray, names: Sequence[str]) -> Figure:
    """What classes gain or lose against the full ResNet, in points of accuracy."""
    known = [i for i in range(len(names)) if not np.isnan(ours[i])]
    order = sorted(known, key=lambda i: ours[i] - full[i])
    change = [100 * (ours[i] - full[i]) for i in order]
    figure, ax = plt.subplots(figsize=(6.5, 0.28 * len(order) + 1.1))
    ax.barh(range(len(order)), change, color=[BLUE if c >= 0 else ORANGE for c in change])
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(order)), [f"{names[i]}  {ours[i]:.1%}" for i in order])
    ax.set(xlabel="points of accuracy gained or lost against the full ResNet")
    ax.grid(axis="x", alpha=0.3)
    return figure


MARKERS = {
    "full ResNet": ("s", "black"),
    "BlockDrop": ("o", BLUE),
    "shuffled": ("v", BLUE),
    "static": ("^", ORANGE),
    "ConvNet-AIG": ("D", GREEN),
    "published": ("*", PURPLE),
}


OTHER_WAYS = {  # what `test.py --dependence` compares with, one network's other ways to decide
    "shuffled": "shuffled over the images",
    "most_frequent": "most frequent policy for all",
    "static_same_flops": "static, same network",
}
LINES = {  # what a curve's label begins with -> its style
    "one network": ("o-", BLUE),
    OTHER_WAYS["shuffled"]: ("v--", BLUE),
    OTHER_WAYS["most_frequent"]: ("s:", BLUE),
    OTHER_WAYS["static_same_flops"]: ("^-", ORANGE),
    "early exits behind stages": ("D-", GREEN),
    "early exits": ("d--", GREEN),
    "published: MSDNet": ("*--", PURPLE),
    "published": ("x--", GRAY),
}


def trade_off(points, unit: str, curves=()) -> Figure:
    """Accuracy against cost. points: (kind, label, cost, accuracy), kinds as in MARKERS.

    curves: label -> [(cost, accuracy), ...], labels that begin as those in LINES.
    """
    figure, ax = plt.subplots(figsize=(6.5, 4.2) if not curves else (7.5, 5.5))
    for label in curves:
        style, colour = next(LINES[start] for start in LINES if label.startswith(start))
        ax.plot(*zip(*sorted(curves[label]), strict=True), style, color=colour, label=label,
                markersize=4, linewidth=1.2)  # fmt: skip
    for kind, (marker, colour) in MARKERS.items():
        chosen = [(cost, accuracy) for k, _, cost, accuracy in points if k == kind]
        if chosen:
            ax.scatter(*zip(*chosen, strict=True), marker=marker, color=colour, label=kind, s=55,
                       zorder=3)  # fmt: skip
    ax.set(xlabel=unit, ylabel="accuracy")
    ax.margins(0.12)
    ax.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))  # no 90.25 %, to be rounded
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.grid(alpha=0.3)
    columns = 3 if curves else len(MARKERS)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    label_apart(ax, [(cost, accuracy, label) for _, label, cost, accuracy in points])
    return figure


SIDES = [  # offset in points, alignment
    ((6, 4), "left", "bottom"), ((6, -4), "left", "top"), ((-6, 4), "right", "bottom"),
    ((-6, -4), "right", "top"), ((0, 8), "center", "bottom"), ((0, -8), "center", "top"),
    ((6, 14), "left", "bottom"), ((6, -14), "left", "top"), ((-6, 14), "right", "bottom"),
    ((-6, -14), "right", "top"),
]  # fmt: skip


def label_apart(ax, points) -> None:
    """Write labels on that side of their points where they meet the fewest others.

    points: (x, y, label). The axes' limits have to be final.
    """
    ax.figure.draw_without_rendering()  # the layout, which says where a pixel is
    corners = ax.transData.transform([(x, y) for x, y, _ in points])
    taken = [Bbox([corner - 8, corner + 8]) for corner in corners]
    frame = ax.get_window_extent()
    for x, y, label in sorted(points):
        text = ax.annotate(label, (x, y), (0, 0), textcoords="offset points", fontsize=8)

        def place(side, text=text) -> Bbox:
            text.xyann, across, along = side
            text.set(ha=across, va=along)
            return text.get_window_extent()

        def meets(side, place=place) -> int:
            box = place(side)
            leaves = Bbox.union([box, frame]).bounds != frame.bounds
            return box.count_overlaps(taken) + len(points) * leaves

        taken.append(place(min(SIDES, key=meets)))


PANELS = {
    "accuracy": ("accuracy", PercentFormatter(1)),
    "reward": ("mean reward", None),
    "sparsity": ("blocks kept", None),
    "unique_policies": ("distinct policies", None),
    "loss": ("loss", None),
}


def curves(data, curriculum_end: int | None) -> Figure:
    """Training and evaluation figures over epochs, the end of the curriculum marked."""
    panels = [name for name in PANELS if f"train_{name}" in data or f"test_{name}" in data]
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(9, 2.4 * rows), squeeze=False)
    for ax, name in zip(axes.flat, panels, strict=False):
        for split, colour, style in (("train", GRAY, "-"), ("test", BLUE, "o-")):
            if f"{split}_{name}" in data:
                ax.plot(*data[f"{split}_{name}"], style, color=colour, label=split, markersize=4)
        title, form = PANELS[name]
        ax.set(title=title, xlabel="epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if form:
            ax.yaxis.set_major_formatter(form)
        if name == "unique_policies":
            ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        if curriculum_end:
            ax.axvline(curriculum_end, color=ORANGE, linestyle="--", linewidth=1,
                       label="all blocks learned")  # fmt: skip
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    axes.flat[0].legend(fontsize=8)
    return figure
