"""Draws report.py's figures (matplotlib, PNG), laid out like the paper's. No numbers are made here."""
import textwrap

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend comes first)

LOOKS = {"hardest": ("tab:blue", "-", "o"), "easiest": ("tab:blue", "--", "s"), "random": ("tab:red", "-", "D"),
         "entropy": ("tab:olive", "-", "o"), "svar": ("tab:purple", "-", "s"), "vog": ("tab:red", "-", "D"),
         "vanilla": ("tab:blue", "-", "o"), "balanced": ("tab:green", ":", "s"), "emphasis": ("tab:purple", "--", "P"),
         "pgd": ("tab:blue", "-", "o"), "fgsm-rs": ("tab:green", ":", "s")}
BASELINES = {"AT": "grey", "no AT": "tab:orange"}


def canvas(rows, columns, width=4.6, height=2.7, **how):
    """A grid of panels: (figure, axes (rows, columns))."""
    return pyplot.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, **how)


def write(fig, path, title):
    """Writes a figure as PNG."""
    fig.suptitle("\n".join(textwrap.fill(line, 26 * round(fig.get_figwidth() / 2)) for line in title.splitlines()), fontsize=10)
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    pyplot.close(fig)


def short(data, how):
    """A panel's title: the data set, and how it was measured on lines of their own."""
    return f"{data.replace('->', ' → ')}\n{textwrap.fill(how, 70)}"


def curves(path, title, groups, panels, lines_of, baseline, mean, paper):
    """Accuracy against |A|/N: a column a data set, a row a panel; the band is one standard deviation over seeds, thin
    lines are the paper's, horizontal lines the baselines."""
    fig, axes = canvas(len(panels), len(groups), sharex="col")
    for column, ((data, how), group) in zip(axes.T, groups.items()):
        for axis, (part, kind) in zip(column, panels):
            for line, colour in BASELINES.items():
                source = part.startswith("source")
                found = mean(baseline(group, line), "source all" if source else "all", kind)
                if found:
                    axis.axhline(found[0], color=colour, label=line if part == "all" else f"{line} (all)")
            for line, sizes in lines_of(group).items():
                points = [(runs[0]["share"], *m) for runs in sizes.values() if (m := mean(runs, part, kind))]
                colour, style, marker = LOOKS.get(line, ("tab:brown", "-", "x"))
                if points:
                    x, y, std = zip(*points)
                    axis.plot(x, y, linestyle=style, marker=marker, color=colour, markersize=4, label=line)
                    band = [[m + sign * s for m, s in zip(y, std)] for sign in (-1, 1)]
                    axis.fill_between(x, *band, color=colour, alpha=0.2, linewidth=0)
                theirs = [(f / 10, v) for f in range(1, 10) if part == "all" and (v := paper(data, line, f / 10, kind)) is not None]
                if theirs:
                    axis.plot(*zip(*theirs), linestyle=style, color=colour, alpha=0.4, linewidth=0.8, label=f"{line}, paper")
            axis.set_ylabel(f"{kind} accuracy{'' if part == 'all' else f', {part}'} (%)", fontsize=8)
            axis.grid(alpha=0.3)
        column[0].set_title(short(data, how), fontsize=6.5)
        column[0].legend(fontsize=6.5)
        column[-1].set_xlabel("|A| / N")
    write(fig, path, title)


def matrix(path, title, classes, runs, baselines):
    """Fig. 2: left, bars of robust accuracy on A_val and B_val with the baselines; right, class by class as a heat map."""
    fig, (left, right) = pyplot.subplots(1, 2, figsize=(12, 0.42 * len(classes) + 2), width_ratios=(1, 1.5))
    for part, shift, colour in (("A_val", -0.2, "tab:blue"), ("B_val", 0.2, "tab:green")):
        shown = {i: 100 * runs[a]["accuracy"][part]["robust"]["accuracy"] for i, a in enumerate(classes)
                 if a in runs and runs[a]["accuracy"][part]["robust"]["n"]}
        bars = left.barh([i + shift for i in shown], list(shown.values()), 0.4, color=colour, label=part)
        left.bar_label(bars, fmt="%.0f", fontsize=7)
    for line, found in baselines.items():
        if found:
            left.axvline(found[0], color=BASELINES[line], label=f"{line} (all)")
    left.set(yticks=range(len(classes)), yticklabels=classes, xlabel="robust accuracy (%)", ylabel="A")
    left.invert_yaxis()
    left.legend(fontsize=7, ncol=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    grid = [[100 * (runs[a]["accuracy"]["classes"][c]["robust"]["accuracy"] or 0) if a in runs else float("nan") for c in classes] for a in classes]
    right.imshow(grid, cmap="Greens", vmin=0, vmax=100, aspect="auto")
    for i, a in enumerate(classes):
        for j in range(len(classes)):
            if a in runs:
                right.text(j, i, f"{grid[i][j]:.0f}", ha="center", va="center", fontsize=8, color="white" if grid[i][j] > 60 else "black",
                           bbox={"facecolor": "tab:blue", "pad": 2, "linewidth": 0} if i == j else None)
    right.set(xticks=range(len(classes)), yticks=range(len(classes)), yticklabels=classes, xlabel="robust accuracy on (%)", ylabel="A")
    right.set_xticklabels(classes, rotation=45, ha="right")
    write(fig, path, title)


def difficulty(path, title, rankings):
    """Fig. 3: error (left axis) and mean entropy (right axis) of each class, hardest first; a panel a ranking."""
    fig, axes = canvas(1, len(rankings), width=5.5, height=3.4)
    for axis, (name, rows) in zip(axes[0], rankings.items()):
        at, other = range(len(rows)), axis.twinx()
        axis.bar([i - 0.2 for i in at], [100 * (r["clean_error"] or 0) for r in rows], 0.4, color="tab:blue")
        metric = next(m for m in ("entropy", "svar", "vog") if m in rows[0])
        other.bar([i + 0.2 for i in at], [r[metric] for r in rows], 0.4, color="tab:green")
        axis.set_ylabel("clean error (%)", color="tab:blue")
        other.set_ylabel(f"mean {metric}{' (nats)' * (metric == 'entropy')}", color="tab:green")
        axis.set_title(name, fontsize=8)
        axis.set_xticks(at if len(rows) <= 20 else [])
        if len(rows) <= 20:
            axis.set_xticklabels([r["class"] for r in rows], rotation=45, ha="right", fontsize=8)
    write(fig, path, title)


def cost(path, title, groups, mean):
    """Robust accuracy of every run against the forward passes of its training; a panel a data set."""
    fig, axes = canvas(1, len(groups), height=3.4)
    markers = {"none": ("x", "tab:orange"), "full": ("*", "grey"), "csat": ("s", "tab:green"), "esat": ("o", "tab:blue")}
    for axis, ((data, how), group) in zip(axes[0], groups.items()):
        for split, (marker, colour) in markers.items():
            points = [(r["cost"], mean([r], "all", "robust")[0]) for r in group if r["split"] == split]
            if points:
                name = {"none": "no AT", "full": "AT"}.get(split, split.upper())
                axis.scatter(*zip(*points), marker=marker, color=colour, label=name, s=22)
        axis.set(xlabel="training, in forward passes", ylabel="robust accuracy (%)")
        axis.set_title(short(data, how), fontsize=6.5)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    write(fig, path, title)


def perturbations(path, title, rows, magnify):
    """A row for an example of A and one of B: clean image, perturbation times `magnify` around grey, adversarial image."""
    fig, axes = canvas(len(rows), 3, width=2.3, height=2.6)
    for line, (part, r) in zip(axes, rows.items()):
        shown = (("clean", r["x"], r["before"]), (f"perturbation × {magnify:g}", (0.5 + magnify * r["delta"]).clamp(0, 1), None), ("adversarial", r["adv"], r["after"]))
        for axis, (name, image, said) in zip(line, shown):
            axis.imshow(image.permute(1, 2, 0).squeeze(2).numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_title(name, fontsize=8)
            axis.set_xlabel(f"{said[0]}, {100 * said[1]:.0f} %" if said else f"L2 norm {float(r['delta'].norm()):.2f}", fontsize=8)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(f"{part}: {r['class']}", fontsize=9)
    write(fig, path, title)
