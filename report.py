"""Builds the tables and figures from every result.json below the results folder: CSAT (Fig. 5), ESAT (Fig. 6), S-SAT (Fig. 8).

    python report.py
Files in: results/**/result.json. Files out: results/tables.md, results/figures/{csat,esat,s-sat}.png.
"""
import statistics
from pathlib import Path

import common
from common import UserError, say

SECTIONS = {
    "csat": ("CSAT: A is made of whole classes (Sec. 4.1, Fig. 5)", ("all", "B_val")),
    "esat": ("ESAT: A is made of single examples (Sec. 4.2, Fig. 6)", ("all",)),
    "s-sat": ("S-SAT: transfer of frozen features to another data set (Sec. 4.3, Fig. 8)", ("all",)),
}
LOOKS = {"hardest": ("tab:blue", "-", "o"), "easiest": ("tab:blue", "--", "s"), "random": ("tab:red", "-", "D"),
         "named": ("tab:green", "", "^")}


def record(path, result):
    """One run in flat form: what it is (keys of identical meaning for SAT and for transferred runs) and its accuracies."""
    a, source = result["args"], result.get("source")
    made = source or result  # of a transferred network, A is its source's
    s, sa = result["settings"], made["args"]
    how = [f"{s['norm']} eps {s['eps']:g}", "AutoAttack" if len(s["attacks"]) == 4 else f"AutoAttack's {' and '.join(s['attacks'])}",
           f"n = {result['accuracy']['all']['robust']['n']}", a["arch"], f"{sa['epochs']} epochs"]
    return {"path": str(path.parent), "data": f"{source['dataset']} -> {a['dataset']}" if source else a["dataset"],
            "how": ", ".join(how), "transfer": bool(source), "split": sa["split"], "seed": sa["seed"],
            "order": "named" if sa["classes"] else sa["order"], "label": ", ".join(made["A_classes"] or []) if sa["classes"] else "",
            "variant": (sa["metric"], sa["weight"] if sa["weight_factor"] is None else f"w {sa['weight_factor']:g}", sa["attack"]),
            "A": made["A"], "N": made["N"], "w_A": made["w_A"], "accuracy": result["accuracy"]}


def records(results):
    """The records of all finished runs below the folder `results`."""
    found = []
    for path in sorted(Path(results).glob("**/result.json")):
        result = common.read_json(path)
        try:
            found.append(record(path, result))
        except (KeyError, TypeError) as e:
            raise UserError(f"{path} is not a result of this project (no {e}): move it away") from None
    return found


def mean(runs, part, kind):
    """Mean accuracy in percent over runs (seeds), its standard deviation, and None where the part does not exist."""
    values = [100 * r["accuracy"][part][kind]["accuracy"] for r in runs if r["accuracy"].get(part, {}).get(kind, {}).get("n")]
    return (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0) if values else None


def cell(runs, part, kind):
    """A table cell in percent: the 95 % Wilson interval of a single run, mean and standard deviation of several."""
    found = mean(runs, part, kind)
    if found is None:
        return "-"
    if len(runs) > 1:
        return f"{found[0]:.1f} ± {found[1]:.1f}"
    one = runs[0]["accuracy"][part][kind]
    return f"{found[0]:.1f} [{100 * one['low']:.1f}, {100 * one['high']:.1f}]"


def series(runs):
    """Groups runs that differ in their seed alone: {(order, variant, label): {|A|: [runs]}}, |A| ascending."""
    found = {}
    for r in sorted(runs, key=lambda r: (r["order"], r["variant"], r["A"], r["seed"])):
        found.setdefault((r["order"], r["variant"], r["label"]), {}).setdefault(r["A"], []).append(r)
    return found


def name(order, variant, label):
    """What a series is called: the order, or the classes by name, and what is not the default."""
    extra = [v for v, default in zip(variant, ("entropy", "vanilla", "pgd")) if v != default]
    return ", ".join([label or order, *extra])


def table(group, parts):
    """The Markdown table of one group: baselines first, then each series by |A|."""
    head = ["A", "\\|A\\|", "\\|A\\|/N", "w_A", "seeds", "clean %", "robust %", *(f"robust {p} %" for p in parts[1:])]
    rows = []
    for split, text in (("none", "no AT (A = {})"), ("full", "AT (A = all)")):
        runs = [r for r in group if r["split"] == split]
        rows.append((text, runs) if runs else (f"{text}: no such run yet", []))
    for key, sizes in series([r for r in group if r["split"] not in ("none", "full")]).items():
        rows += [(name(*key), runs) for runs in sizes.values()]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for text, runs in rows:
        sizes = [f"{runs[0]['A']:,}", f"{runs[0]['A'] / runs[0]['N']:.2f}", f"{runs[0]['w_A']:.3g}", str(len(runs))] if runs else ["-"] * 4
        cells = [text, *sizes, cell(runs, "all", "clean"), *(cell(runs, p, "robust") for p in parts)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def panel(axis, group, part, kind):
    """One panel: accuracy (%) against |A|, a line an order with a band of one standard deviation, baselines across."""
    for split, text, colour in (("full", "AT", "grey"), ("none", "no AT", "tab:orange")):
        found = mean([r for r in group if r["split"] == split], "all", kind)
        if found:
            axis.axhline(found[0], color=colour, linewidth=1.5, label=f"{text} (all)" if part != "all" else text)
    for key, sizes in series([r for r in group if r["split"] not in ("none", "full")]).items():
        at = [(size, *m) for size, runs in sizes.items() if (m := mean(runs, part, kind))]
        if not at:
            continue
        colour, line, marker = LOOKS[key[0]]
        x, y, std = zip(*at)
        axis.plot(x, y, linestyle=line, marker=marker, color=colour, markersize=4, label=name(*key))
        if any(std):
            axis.fill_between(x, [m - s for m, s in zip(y, std)], [m + s for m, s in zip(y, std)], color=colour, alpha=0.2, linewidth=0)
    axis.set_ylabel(f"{kind} accuracy{'' if part == 'all' else f' on {part}'} (%)")
    axis.grid(alpha=0.3)


def figure(path, title, groups, parts):
    """A column a group; a row for robust accuracy on each part and one for clean accuracy."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows = [(p, "robust") for p in parts] + [("all", "clean")]
    fig, axes = pyplot.subplots(len(rows), len(groups), figsize=(5.2 * len(groups), 3 * len(rows)), squeeze=False, sharex="col")
    for column, ((data, how), group) in enumerate(groups.items()):
        for axis, (part, kind) in zip(axes[:, column], rows):
            panel(axis, group, part, kind)
        axes[0, column].set_title(f"{data}\n{how}", fontsize=8)
        axes[-1, column].set_xlabel("|A| (training examples)")
        axes[0, column].legend(fontsize=7)
    fig.suptitle(title, fontsize=10)
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    pyplot.close(fig)


def groups_of(found, section):
    """The runs of a section by (data, how they were made and measured): only what agrees in both can be compared."""
    split = {"csat": "csat", "esat": "esat"}.get(section)
    groups = {}
    for r in found:
        if r["transfer"] == (section == "s-sat") and (split is None or r["split"] in (split, "none", "full")):
            groups.setdefault((r["data"], r["how"]), []).append(r)
    return {key: group for key, group in groups.items() if any(r["split"] not in ("none", "full") for r in group)}


def main(argv=None):
    """Reads all results, writes a table and a figure for each section."""
    parser = common.Parser(prog="report.py", description=__doc__, formatter_class=common.Help)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the runs")
    results = parser.parse_args(argv).results
    found = records(results)
    if not found:
        raise UserError(f"no result.json below {results}: first run sat.py, or ./run_all.sh digits")
    text = ["# Results", "Accuracies in percent. One run: value [95 % Wilson interval]; several seeds: mean ± standard deviation. "
            "Robust: correct, and still correct under the attack named above each table, on test examples that selected nothing."]
    for section, (title, parts) in SECTIONS.items():
        groups = groups_of(found, section)
        text.append(f"## {title}")
        if not groups:
            text.append("No runs yet.")
            continue
        figure(results / "figures" / f"{section}.png", title, groups, parts)
        text.append(f"![{section}](figures/{section}.png)")
        text += [f"### {data}: {how}\n\n{table(group, parts)}" for (data, how), group in groups.items()]
    common.atomic(results / "tables.md", lambda f: f.write(("\n\n".join(text) + "\n").encode()))
    say(f"{len(found)} runs -> {results / 'tables.md'} and {results / 'figures'}/")


if __name__ == "__main__":
    common.script(main)
