"""Draws the figures of the report, laid out like the paper's: PNG for web pages, SVG for print."""
import statistics
import textwrap
from dataclasses import dataclass

import matplotlib
import numpy
from matplotlib import font_manager, ft2font
from matplotlib.figure import Figure

from paper.published import published_accuracy
from paper.stats import mean
from runs import atomic

STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7.5,
         "xtick.labelsize": 7.5, "ytick.labelsize": 7.5, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.alpha": 0.25, "lines.markersize": 4,
         "svg.hashsalt": "sat", "svg.fonttype": "none"}
LOOKS = {  # line: (colour, line style, marker)
    "hardest": ("tab:blue", "-", "o"), "easiest": ("tab:cyan", "--", "s"),
    "random": ("tab:red", "-", "D"), "redrawn": ("tab:pink", ":", "v"),
    "entropy": ("tab:blue", "-", "o"), "svar": ("tab:purple", "--", "s"), "vog": ("tab:red", ":", "D"),
    "vanilla": ("tab:blue", "-", "o"), "balanced": ("tab:green", ":", "s"),
    "emphasis": ("tab:purple", "--", "P"), "pgd": ("tab:blue", "-", "o"), "fgsm-rs": ("tab:green", ":", "s"),
}
OTHERS = [("tab:brown", "-", "x"), ("tab:olive", "--", "^"), ("black", ":", "v"), ("tab:pink", "-.", "<")]
SPLITS = {"none": ("X", "tab:orange", "no AT"), "full": ("*", "dimgrey", "AT"),  # marker, colour, label
          "csat": ("s", "tab:green", "CSAT"), "esat": ("o", "tab:blue", "ESAT")}
COLOURS = {"AT": "dimgrey", "no AT": "tab:orange"}
BARS, PALE = "±1 deviation of seeds", "the paper's (pale)"  # the last entries of a legend


@dataclass
class Group:
    """The runs of one group in a figure of accuracy against |A|/N."""
    data: str        # a data set, or source->target
    name: str
    runs: list       # of the lines
    lines: dict      # {line: {|A|: runs}}
    baselines: dict  # {"no AT": runs, "AT": runs}
    published: str   # published.comparable_data


def canvas(rows, columns, width, height, **options):
    """A grid of panels of `width` x `height` inches each: (figure, axes (rows, columns))."""
    matplotlib.rcParams.update(STYLE)
    fig = Figure(figsize=(width * columns, height * rows + 0.5), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False, **options)


def two_columns(n, width, height):
    """A canvas of n panels in at most two columns: (figure, axes (n,))."""
    columns = min(2, n)
    fig, axes = canvas(-(-n // columns), columns, width, height)
    for axis in axes.flat[n:]:
        axis.set_visible(False)
    return fig, axes.flat[:n]


def wrapped(text, width):
    """A text as lines of at most `width` characters, which do not break within "n = 1,000"."""
    return textwrap.wrap(text.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"), width)


def write(fig, path, title):
    """Writes a figure as <path>.png and <path>.svg."""
    width = round(15 * fig.get_figwidth())  # of the title, in characters
    fig.suptitle("\n".join(part for line in title.splitlines() for part in wrapped(line, width)), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic(f"{path}.png", lambda f: fig.savefig(f, format="png", dpi=120))
    atomic(f"{path}.svg", lambda f: fig.savefig(f, format="svg", metadata={"Date": None}))


def drawable(names):
    """The names; one with a letter that the font lacks becomes # and its position in the list."""
    font = ft2font.FT2Font(font_manager.findfont("DejaVu Sans"))
    return [n if all(font.get_char_index(ord(c)) for c in n) else f"#{i}" for i, n in enumerate(names)]


def legend_below(fig, axes):
    """One legend below all panels, in which each label stands once; BARS and PALE come last."""
    handles = {}
    for axis in numpy.ravel(axes):
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    if handles:
        labels = sorted(handles, key=lambda label: label in (BARS, PALE))
        columns = max(1, min(len(labels), round(fig.get_figwidth() / 1.15)))
        fig.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=columns,
                   frameon=False)


def curves(path, title, name, groups, panels):
    """Accuracy against |A|/N: one row of panels for each Group, two rows if there are more than three panels.

    panels: [(part, kind)]. Bars are one standard deviation over seeds. Panels that show the accuracy on all
    examples also have the baselines, as horizontal lines, and the paper's numbers, pale.
    """
    rows_of_group = 1 if len(panels) <= 3 else 2
    columns = -(-len(panels) // rows_of_group)
    fig, axes = canvas(len(groups) * rows_of_group, columns, 4 if columns == 2 else 3, 2.5)
    for g, group in enumerate(groups):
        rows = axes[g * rows_of_group:(g + 1) * rows_of_group]
        heading = "\n".join([group.data.replace("->", " → "), *wrapped(group.name, 60)])
        rows[0, 0].set_title(heading, loc="left", fontsize=7)
        for axis, (part, kind) in zip(rows.flat, panels):
            if part == "all":
                draw_baselines(axis, group, kind)
            for line, sizes in group.lines.items():
                draw_line(axis, line, sizes, part, kind)
                if part == "all":
                    draw_published(axis, name, group.published, line, kind)
            ylabel = f"{kind} accuracy (%)" if part == "all" else f"{kind}, {part} (%)"
            axis.set(xlabel="|A| / N", ylabel=ylabel, xlim=(0, 1.02))
            highest = axis.dataLim.y1 if axis.has_data() else 100
            axis.set_ylim(0, min(100, 1.05 * max(highest, 1)))
    legend_below(fig, axes)
    write(fig, path, title)


def draw_baselines(axis, group, kind):
    """Draws AT and no AT as horizontal lines, the paper's as pale ones."""
    for label, share in (("AT", 1.0), ("no AT", 0.0)):
        if ours := mean(group.baselines[label], "all", kind):
            axis.axhline(ours[0], color=COLOURS[label], linewidth=1, label=label)
        published = published_accuracy("", group.published, label, share, kind)
        if published is not None:
            axis.axhline(published, color=COLOURS[label], alpha=0.45, linewidth=0.8)
            explain_pale(axis)


def draw_line(axis, line, sizes, part, kind):
    """Draws one of our lines, with a bar of one standard deviation where there are several seeds."""
    points = [(runs[0].share, *m) for runs in sizes.values() if (m := mean(runs, part, kind))]
    if points:
        x, y, _ = zip(*points)
        colour, style, marker = look(line)
        axis.plot(x, y, linestyle=style, marker=marker, color=colour, label=line, clip_on=False)
    several = [point for point in points if point[2] > 0]
    if several:
        bars = {"fmt": "none", "capsize": 3, "elinewidth": 1}
        axis.errorbar(*zip(*several), ecolor=colour, **bars)
        axis.errorbar([], [], [], ecolor="grey", label=BARS, **bars)


def draw_published(axis, name, data, line, kind):
    """Draws the paper's line or point, pale."""
    tenths = [k / 10 for k in range(1, 10)]
    points = [(f, v) for f in tenths if (v := published_accuracy(name, data, line, f, kind)) is not None]
    if points:
        colour, style, marker = look(line)
        axis.plot(*zip(*points), linestyle=style, marker=marker if len(points) == 1 else "", color=colour,
                  alpha=0.45, linewidth=0.8)
        explain_pale(axis)


def explain_pale(axis):
    """Names the paper's pale lines and points in the legend."""
    axis.plot([], [], color="grey", alpha=0.6, linewidth=0.8, label=PALE)


def look(line):
    """Colour, line style and marker of a line. One that LOOKS lacks gets the next of OTHERS, and keeps it."""
    return LOOKS.setdefault(line, OTHERS[len(LOOKS) % len(OTHERS)])


def matrix(path, title, classes, single, none, full):
    """Fig. 2. Left: robust accuracy on A_val and B_val, as bars. Right: robust accuracy class by class, as a
    heat map. single: {class A: runs}."""
    names, rows = drawable(classes), [c for c in classes if c in single]
    fig, axes = canvas(1, 2, 4.6, 0.33 * max(3, len(rows)) + 1.4, width_ratios=(1, 1.3))
    left, right = axes[0]
    for part, shift, colour in (("A_val", -0.2, "tab:blue"), ("B_val", 0.2, "tab:green")):
        means = {i: m[0] for i, c in enumerate(rows) if (m := mean(single[c], part))}
        bars = left.barh([i + shift for i in means], list(means.values()), 0.4, color=colour, label=part)
        left.bar_label(bars, fmt="%.0f", fontsize=6.5, padding=2)
    for label, runs in (("AT", full), ("no AT", none)):
        if ours := mean(runs):
            left.axvline(ours[0], color=COLOURS[label], label=f"{label} (all classes)", linewidth=1)
    left.set(yticks=range(len(rows)), yticklabels=[names[classes.index(c)] for c in rows],
             xlabel="robust accuracy (%)", ylabel="A")
    left.margins(x=0.12)
    left.invert_yaxis()
    left.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, columnspacing=1,
                handlelength=1.2)
    grid = [[100 * statistics.fmean(r.accuracy["classes"][c]["robust"]["accuracy"] or 0 for r in single[a])
             for c in classes] for a in rows]
    right.imshow(grid, cmap="Greens", vmin=0, vmax=100, aspect="auto")
    for i, a in enumerate(rows):
        for j, c in enumerate(classes):
            box = {"facecolor": "tab:blue", "pad": 1.5, "linewidth": 0} if a == c else None
            right.text(j, i, f"{grid[i][j]:.0f}", ha="center", va="center", fontsize=7, bbox=box,
                       color="white" if grid[i][j] > 60 or a == c else "black")
    right.set(xticks=range(len(classes)), yticks=range(len(rows)),
              yticklabels=[names[classes.index(c)] for c in rows], xlabel="robust accuracy on (%)")
    right.grid(False)
    right.set_xticklabels(names, rotation=45, ha="right")
    write(fig, path, title)


def difficulty(path, title, rankings):
    """Fig. 3: one panel for each ranking, with its classes hardest first: clean error (left axis) and mean
    score, the entropy if there is one (right axis)."""
    fig, axes = two_columns(len(rankings), 4.4, 2.8)
    for axis, (name, rows) in zip(axes, rankings.items()):
        metric = next(m for m in ("entropy", "svar", "vog") if m in rows[0])
        at, other, few = range(len(rows)), axis.twinx(), len(rows) <= 20
        error, score = [100 * (r["clean_error"] or 0) for r in rows], [r[metric] for r in rows]
        if few:
            axis.bar([i - 0.2 for i in at], error, 0.4, color="tab:blue")
            other.bar([i + 0.2 for i in at], score, 0.4, color="tab:green")
            axis.set_xticks(at, drawable([r["class"] for r in rows]), rotation=45, ha="right")
        else:  # bars of 100 classes would be too thin to see
            axis.plot(at, error, ".", color="tab:blue")
            other.plot(at, score, color="tab:green")
            axis.set_xlabel("class, hardest first")
        axis.set_ylim(bottom=0)
        axis.set_ylabel("clean error (%)", color="tab:blue")
        unit = " (nats)" if metric == "entropy" else ""
        other.set_ylabel(f"mean {metric}{unit}", color="tab:green")
        other.set_ylim(bottom=min(0, *score))
        other.spines["right"].set_visible(True)
        other.grid(False)
        axis.set_title(name)
    write(fig, path, title)


def cost(path, title, groups, ranking_costs):
    """Robust accuracy of each run against the forward passes of its training, one panel for each group of
    runs. ranking_costs: {hash of scores: cost of the ranking}, which is added for the hollow marks."""
    fig, axes = two_columns(len(groups), 4.2, 2.9)
    for axis, ((data, group), runs) in zip(axes, groups.items()):
        for split, (marker, colour, label) in SPLITS.items():
            points = [(r.cost, mean([r])[0], ranking_costs.get(r.ranking, 0))
                      for r in runs if r.split == split]
            if points:
                axis.scatter([x for x, *_ in points], [y for _, y, _ in points], marker=marker, color=colour,
                             label=label, s=24)
            ranked = [(x + ranking, y) for x, y, ranking in points if ranking]
            if ranked:
                axis.scatter(*zip(*ranked), marker=marker, facecolors="none", edgecolors=colour, s=24,
                             label=f"{label}, with its ranking")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0), useMathText=True)
        axis.set(xlabel="training, in forward passes", ylabel="robust accuracy (%)", xlim=(0, None),
                 ylim=(0, None))
        axis.set_title("\n".join([data, *wrapped(group, 60)]), fontsize=7)
    legend_below(fig, axes)
    write(fig, path, title)
