"""Draws the figures of the report, laid out like the paper's: PNG for web pages, SVG for print."""
import textwrap
from dataclasses import dataclass

import matplotlib
import numpy
from matplotlib.figure import Figure

from flags import METRICS
from paper.published import published_accuracy
from paper.stats import mean_sd
from runs import atomic

STYLE = {"font.size": 7.5, "axes.titlesize": "medium", "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.alpha": 0.25, "lines.markersize": 4, "svg.hashsalt": "sat",
         "svg.fonttype": "none"}
LOOKS = {  # line: (colour, line style, marker)
    "hardest": ("tab:blue", "-", "o"), "easiest": ("tab:cyan", "--", "s"),
    "random": ("tab:red", "-", "D"), "redrawn": ("tab:pink", ":", "v"),
    "entropy": ("tab:blue", "-", "o"), "svar": ("tab:purple", "--", "s"), "vog": ("tab:red", ":", "D"),
    "vanilla": ("tab:blue", "-", "o"), "balanced": ("tab:green", ":", "s"),
    "emphasis": ("tab:purple", "--", "P"), "pgd": ("tab:blue", "-", "o"), "fgsm-rs": ("tab:green", ":", "s"),
    "AT": ("dimgrey", "-", "*"), "no AT": ("tab:orange", "-", "X"),
    "CSAT": ("tab:green", "", "s"), "ESAT": ("tab:blue", "", "o"),
}
OTHERS = [("tab:brown", "-", "x"), ("tab:olive", "--", "^"), ("black", ":", "v"), ("tab:pink", "-.", "<")]
BARS, PALE = "± standard deviation", "the paper's (pale)"  # the last entries of a legend


@dataclass
class Group:
    """The runs of one group in a figure of accuracy against |A|/N."""
    dataset: str        # a data set, or source->target
    name: str
    lines: dict         # {line: {|A|: runs}}
    baselines: dict     # {"no AT": runs, "AT": runs}
    paper_dataset: str  # published.comparable_dataset


def canvas(n, columns, width, height, **options):
    """n panels of `width` x `height` inches each, in columns: (figure, [axes])."""
    matplotlib.rcParams.update(STYLE)
    rows = -(-n // columns)
    fig = Figure(figsize=(width * columns, height * rows + 0.5), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, **options).ravel()
    for axis in axes[n:]:
        axis.set_visible(False)
    return fig, axes[:n]


def heading(dataset, name, width=60):
    """A group's title: `dataset`, and `name` in lines of `width` characters, unbroken within "n = 1,000"."""
    name = name.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
    return "\n".join([dataset.replace("->", " → "), *textwrap.wrap(name, width)])


def save(fig, path, title):
    """Writes a figure as <path>.png and <path>.svg, with one legend below all panels, in which each label
    stands once; BARS and PALE come last."""
    handles = {}
    for axis in fig.axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    if handles:
        labels = sorted(handles, key=lambda label: label in (BARS, PALE))
        fig.legend([handles[label] for label in labels], labels, loc="outside lower center", frameon=False,
                   columnspacing=1.3, ncols=max(1, min(len(labels), round(fig.get_figwidth()))))
    fig.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic(f"{path}.png", lambda f: fig.savefig(f, format="png", dpi=160))
    atomic(f"{path}.svg", lambda f: fig.savefig(f, format="svg", metadata={"Date": None}))


def look(line):
    """Colour, line style and marker of a line. One that LOOKS lacks gets the next of OTHERS, and keeps it."""
    return LOOKS.setdefault(line, OTHERS[len(LOOKS) % len(OTHERS)])


def curves(path, title, figure_name, groups, panels):
    """Accuracy against |A|/N, with one row of panels for each Group, or two if `panels`, [(part, kind)], has
    more than three. Those of all examples also show the baselines, as horizontal lines, and the paper's
    numbers, pale."""
    columns = len(panels) if len(panels) <= 3 else -(-len(panels) // 2)
    fig, axes = canvas(len(groups) * len(panels), columns, 3.5 if columns == 2 else 2.6, 2.4)
    for i, axis in enumerate(axes):
        group, (part, kind) = groups[i // len(panels)], panels[i % len(panels)]
        if i % len(panels) == 0:
            axis.set_title(heading(group.dataset, group.name), loc="left", fontsize=7)
        if part == "all":
            draw_published(axis, figure_name, group, kind)
            for line in ("AT", "no AT"):
                if ours := mean_sd(group.baselines[line], part, kind):
                    axis.axhline(ours[0], color=look(line)[0], linewidth=1, label=line)
        for line, by_size in group.lines.items():
            draw_line(axis, line, by_size, part, kind)
        ylabel = f"{kind} accuracy (%)" if part == "all" else f"{kind}, {part} (%)"
        axis.set(xlabel="|A| / N", ylabel=ylabel, xlim=(0, 1.02))
        axis.set_ylim(0, min(100, 1.05 * max(axis.dataLim.y1, 1)))
    save(fig, path, title)


def draw_line(axis, line, by_size, part, kind):
    """Draws one of our lines, with a bar of one standard deviation where there are several seeds."""
    share_mean_sd = [(runs[0].share, *m) for runs in by_size.values() if (m := mean_sd(runs, part, kind))]
    if share_mean_sd:
        x, y, _ = zip(*share_mean_sd)
        colour, style, marker = look(line)
        axis.plot(x, y, linestyle=style, marker=marker, color=colour, label=line, clip_on=False)
    several = [point for point in share_mean_sd if point[2] > 0]
    if several:
        axis.errorbar(*zip(*several), fmt="none", capsize=3, elinewidth=1, ecolor=colour, label=BARS)


def draw_published(axis, figure_name, group, kind):
    """Draws the paper's lines, points and baselines, pale."""
    pale = {"alpha": 0.45, "linewidth": 0.8, "label": PALE}
    for line in ("AT", "no AT", *group.lines):
        colour, style, marker = look(line)
        accuracies = {k / 10: published_accuracy(figure_name, group.paper_dataset, line, k / 10, kind)
                      for k in range(11)}
        points = [(share, accuracy) for share, accuracy in accuracies.items() if accuracy is not None]
        if line in group.baselines and points:
            axis.axhline(points[0][1], color=colour, **pale)
        elif points:
            axis.plot(*zip(*points), linestyle=style, marker=marker if len(points) == 1 else "", color=colour,
                      **pale)


def matrix(path, title, dataset, group_name, classes, single, no_at, at):
    """Fig. 2 of a group. Left: robust accuracy on A_val and B_val, as bars. Right: robust accuracy class by
    class, as a heat map. single: {class A: runs}."""
    rows = [c for c in classes if c in single]
    fig, (left, right) = canvas(2, 2, 4, 0.33 * max(3, len(rows)) + 1.4, width_ratios=(1, 1.3))
    for part, shift, colour in (("A_val", -0.2, "tab:blue"), ("B_val", 0.2, "tab:green")):
        means = {i: m[0] for i, c in enumerate(rows) if (m := mean_sd(single[c], part))}
        bars = left.barh([i + shift for i in means], list(means.values()), 0.4, color=colour, label=part)
        left.bar_label(bars, fmt="%.0f", fontsize=6.5, padding=2)
    for label, runs in (("AT", at), ("no AT", no_at)):
        if ours := mean_sd(runs):
            left.axvline(ours[0], color=look(label)[0], label=f"{label} (all classes)", linewidth=1)
    left.set(yticks=range(len(rows)), yticklabels=rows, xlabel="robust accuracy (%)", ylabel="A")
    left.margins(x=0.12)
    left.invert_yaxis()
    grid = [[100 * numpy.mean(numpy.array([r.accuracy["classes"][c]["robust"]["accuracy"] for r in single[a]],
                                          float)) for c in classes] for a in rows]  # nan without examples
    right.imshow(grid, cmap="Greens", vmin=0, vmax=100, aspect="auto")
    for i, a in enumerate(rows):
        for j, c in enumerate(classes):
            box = {"facecolor": "tab:blue", "pad": 1.5, "linewidth": 0} if a == c else None
            text = "-" if numpy.isnan(grid[i][j]) else f"{grid[i][j]:.0f}"
            right.text(j, i, text, ha="center", va="center", fontsize=7, bbox=box,
                       color="white" if grid[i][j] > 60 or a == c else "black")
    right.set(yticks=range(len(rows)), yticklabels=rows, xlabel="robust accuracy on (%)")
    right.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    right.grid(False)
    save(fig, path, heading(f"{title}, {dataset}", group_name, 120))


def difficulty(path, title, rankings):
    """Fig. 3: one panel for each ranking, with its classes hardest first: clean error (bars, left axis) and
    mean score, the entropy if there is one (line, right axis)."""
    fig, axes = canvas(len(rankings), min(2, len(rankings)), 4.4, 2.8)
    for axis, (name, rows) in zip(axes, rankings.items()):
        metric = next(m for m in METRICS if m in rows[0])
        positions, right_axis, score = range(len(rows)), axis.twinx(), [r[metric] for r in rows]
        axis.bar(positions, [100 * (r["clean_error"] or 0) for r in rows], color="tab:blue")
        right_axis.plot(positions, score, ".-", color="tab:green")
        if len(rows) <= 20:
            axis.set_xticks(positions, [r["class"] for r in rows], rotation=45, ha="right")
        else:
            axis.set_xlabel("class, hardest first")
        axis.set_ylabel("clean error (%)", color="tab:blue")
        unit = " (nats)" if metric == "entropy" else ""
        right_axis.set_ylabel(f"mean {metric}{unit}", color="tab:green")
        right_axis.set_ylim(bottom=min(0, *score))
        right_axis.spines["right"].set_visible(True)
        right_axis.grid(False)
        axis.set_title(name)
    save(fig, path, title)


def draw_cost(path, title, groups, ranking_costs):
    """Robust accuracy of each run against the forward passes of its training, one panel for each group of
    runs. ranking_costs: {hash of scores: cost of the ranking}, which is added for the hollow marks."""
    fig, axes = canvas(len(groups), min(2, len(groups)), 4.2, 2.9)
    for axis, ((dataset, group_name), runs) in zip(axes, groups.items()):
        for split, label in {"none": "no AT", "full": "AT", "csat": "CSAT", "esat": "ESAT"}.items():
            colour, _, marker = look(label)
            plain = [(r.cost, mean_sd([r])[0], r.scores_hash) for r in runs if r.split == split]
            ranked = [(x + ranking_costs[h], y, h) for x, y, h in plain if h in ranking_costs]
            for points, face, name in ((plain, colour, label),
                                       (ranked, "none", f"{label}, with its ranking")):
                if points:
                    x, y, _ = zip(*points)
                    axis.scatter(x, y, marker=marker, facecolors=face, edgecolors=colour, s=24, label=name)
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0), useMathText=True)
        axis.set(xlabel="training, in forward passes", ylabel="robust accuracy (%)", xlim=(0, None),
                 ylim=(0, None))
        axis.set_title(heading(dataset, group_name), fontsize=7)
    save(fig, path, title)
