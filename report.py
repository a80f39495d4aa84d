"""Builds the paper's tables and figures from every result.json and rank.json below the results folder, ours beside the paper's.

    python report.py
Files in: results/**/result.json and rank.json, results/bench/*.json, configs/paper.json. Files out: results/tables.md,
results/figures/*.png.
"""
import json
import re
import statistics
from pathlib import Path

import common
import figures
import findings
import flags
import paper
from common import UserError, say

ROBUST, CLEAN = ("all", "robust"), ("all", "clean")
PARTS = [(part, kind) for kind in ("robust", "clean") for part in ("all", "A_val", "B_val")]
# Figures that show accuracy against |A|: (name, title, what the runs agree in, in what the lines differ, panels).
PLAIN = {"metric": "entropy", "weight": "vanilla", "attack": "pgd", "transfer": False}
SSAT = {**PLAIN, "weight": "emphasis", "transfer": True}  # Sec. 4.3: every transfer, but for Fig. 7
CURVES = [
    ("fig5", "Fig. 4 and 5: CSAT, A made of whole classes", {**PLAIN, "split": "csat"}, "order", [ROBUST, ("B_val", "robust"), CLEAN]),
    ("fig13", "Fig. 13: CSAT on all parts", {**PLAIN, "split": "csat"}, "order", PARTS),
    ("fig6", "Fig. 6: ESAT, A made of single examples", {**PLAIN, "split": "esat"}, "order", [ROBUST, CLEAN]),
    ("fig12", "Fig. 12: ESAT by three difficulty metrics", {**PLAIN, "split": "esat", "order": "hardest"}, "metric", [ROBUST, CLEAN]),
    ("fig7", "Fig. 7: three loss weights, S-CSAT", {**SSAT, "split": "csat", "order": "hardest"}, "weight",
     [("source A_val", "robust"), ("source B_val", "robust"), ROBUST, CLEAN]),
    ("fig8", "Fig. 8 and 14: transfer from S-ESAT", {**SSAT, "split": "esat"}, "order", [ROBUST, CLEAN]),
    ("fig15", "Fig. 15: transfer from S-CSAT", {**SSAT, "split": "csat"}, "order", [ROBUST, CLEAN]),
    ("fig16", "Fig. 16: PGD-7 and single-step FGSM-RS, S-ESAT", {**SSAT, "split": "esat", "order": "hardest"}, "attack", [ROBUST, CLEAN]),
]
SUBSET = ("split", "frac", "size", "classes", "order", "metric", "weight", "weight_factor", "attack", "seed")  # may differ in a table


# --- runs --------------------------------------------------------------------------------------------------------------

def record(path, result):
    """One run in flat form. Of a transferred network, A and how it was made are its source's."""
    source = result.get("source")
    made = source or result
    a, made_args, s = result["args"], made["args"], result["settings"]
    attack = "AutoAttack" if len(set(s["attacks"])) == 4 else f"AutoAttack's {' and '.join(s['attacks'])}"
    key = {k: v for k, v in made_args.items() if k not in SUBSET}
    if source:
        key |= {f"target's {k}": v for k, v in a.items() if k not in ("source", "source_weights", "seed")}
    n = result["accuracy"]["all"]["robust"]["n"]
    how = f"{s['norm']} eps {s['eps']:g}, {attack}, n = {n}, {a['arch']}, {made_args['epochs']} epochs, N = {made['N']:,}"
    setting = (made["N"], a["arch"], made_args["epochs"], s["eps"], len(set(s["attacks"])), n)
    classes = made["A_classes"] or []
    return {"path": str(path.parent), "data": f"{source['dataset']}->{a['dataset']}" if source else a["dataset"], "how": how, "key": key, "setting": setting,
            "transfer": bool(source), "split": made_args["split"], "order": "named" if made_args["classes"] else made_args["order"],
            "metric": made_args["metric"] if made_args["order"] != "random" else "entropy", "attack": made_args["attack"],
            "weight": f"w_A {made_args['weight_factor']:g}" if made_args["weight_factor"] else made_args["weight"],
            "seed": made_args["seed"], "A": made["A"], "N": made["N"], "w_A": made["w_A"], "A_classes": classes,
            "size": len(classes) or made["A"],  # |A| in classes or in examples
            "share": len(classes) / len(made["fingerprint"]["classes"]) if classes else made["A"] / made["N"],
            "cost": made["cost"]["forward_equivalents"], "weights": made["weights"], "accuracy": result["accuracy"]}


def records(results):
    """The records of all finished runs below the folder `results`; those of transfers get their source's accuracies too."""
    found = []
    for path in sorted(Path(results).glob("**/result.json")):
        try:
            found.append(record(path, common.read_json(path)))
        except (KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{path} is not a result of this project ({e}): move it away") from None
    found = without_repeats(found)
    for same in grouped(found, "data", "how").values():  # say in what alike-looking runs differ
        odd = sorted({k for r in same for k in r["key"] if r["key"][k] != same[0]["key"].get(k)})
        for r in same:
            r["how"] += "".join(f", {k} {r['key'].get(k)}" for k in odd)
    sources = {r["weights"]: r["accuracy"] for r in found if not r["transfer"]}
    for r in found:
        if r["transfer"]:
            r["accuracy"] = {**r["accuracy"], **{f"source {k}": v for k, v in sources.get(r["weights"], {}).items()}}
    return found


def without_repeats(runs):
    """The runs without those that repeat another one's flags, which are named: they would count as seeds."""
    kept = {}
    for r in runs:
        what = json.dumps([r["data"], r["key"], r["A_classes"] if r["order"] == "named" else 0,
                           *(r[k] for k in ("transfer", "split", "order", "metric", "weight", "attack", "seed", "size"))], sort_keys=True)
        if what in kept:
            say(f"note: {r['path']} repeats {kept[what]['path']}, which is shown")
        kept.setdefault(what, r)
    return list(kept.values())


def grouped(runs, *keys):
    """{(values of keys): [runs]} in the order of the runs."""
    found = {}
    for r in runs:
        found.setdefault(tuple(r[k] for k in keys), []).append(r)
    return found


def mean(runs, part, kind):
    """Mean accuracy in percent over runs (seeds), and its standard deviation; None where the part does not exist."""
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


# --- tables ------------------------------------------------------------------------------------------------------------

def markdown(head, rows):
    """A Markdown table of strings."""
    return "\n".join(f"| {' | '.join(r)} |" for r in [head, ["---"] * len(head), *rows])


def lines_of(group, vary):
    """{line: {|A|: [runs of all seeds]}}, |A| (in classes or examples) ascending, without the baselines."""
    runs = sorted((r for r in group if r["split"] not in ("none", "full")), key=lambda r: (r["size"], r["seed"]))
    return {line: {size: rs for (size,), rs in grouped(found, "size").items()} for (line,), found in sorted(grouped(runs, vary).items())}


def baseline(group, line):
    """The runs of a baseline, "AT" or "no AT"."""
    return [r for r in group if r["split"] == {"AT": "full", "no AT": "none"}[line]]


def amount(run):
    """|A| of a run, for people: in classes or in examples."""
    return f"{run['size']:,} class{'es' * (run['size'] > 1)}" if run["A_classes"] else f"{run['size']:,}"


def without_at(group, runs):
    """A cell: robust accuracy without AT on the very classes of B_val, over the runs: what B would have anyway."""
    base = baseline(group, "no AT")
    found = [findings.without(base[0], r["A_classes"]) for r in runs if base and r["A_classes"]]
    return f"{100 * statistics.mean(f['accuracy'] for f in found if f):.1f}" if any(found) else "-"


def beside(runs, part, kind, theirs):
    """Two cells: the paper's number, and ours minus it."""
    ours = mean(runs, part, kind)
    return ["-" if theirs is None else f"{theirs:.1f}", "-" if theirs is None or not ours else f"{ours[0] - theirs:+.1f}"]


def curve_table(name, data, group, vary, panels):
    """The table of one data set in a figure of curves: ours, the paper's and the difference where the paper has a number."""
    rows = [(line, baseline(group, line), {"AT": 1.0, "no AT": 0.0}[line]) for line in ("no AT", "AT")]
    for line, sizes in lines_of(group, vary).items():
        rows += [(line, runs, runs[0]["share"]) for runs in sizes.values()]
    theirs = [{kind: paper.value(name, data, line, share, kind) for kind in ("robust", "clean")} for line, _, share in rows]
    kinds = [k for k in ("robust", "clean") if any(t[k] is not None for t in theirs)]
    bare = ["no AT on that B %"] * (("B_val", "robust") in panels)
    head = [vary, "\\|A\\|", "\\|A\\|/N", "w_A", "seeds", *(f"{kind} %" if part == "all" else f"{kind} {part} %" for part, kind in panels), *bare,
            *(text for k in kinds for text in (f"paper {k} %", "difference"))]
    text = []
    for (line, runs, share), their in zip(rows, theirs):
        sizes = ["no run yet", f"{share:.0f}", "-", "0"]
        if runs:
            sizes = [amount(runs[0]), f"{share:.2f}", f"{runs[0]['w_A']:.3g}", str(len(runs))]
        text.append([line, *sizes, *(cell(runs, *p) for p in panels), *(without_at(group, runs) for _ in bare), *(c for k in kinds for c in beside(runs, "all", k, their[k]))])
    return markdown(head, text)


def gaps(group, vary):
    """A sentence on the runs that other lines have and a line lacks, or nothing."""
    lines = lines_of(group, vary)
    sizes = sorted({size for found in lines.values() for size in found})
    missing = [f"{line} at |A| = {size:,}" for line, found in lines.items() for size in sizes if size not in found]
    missing += [f"the baseline {line}" for line in ("no AT", "AT") if not baseline(group, line)]
    return f"Missing runs (gaps in the figure): {', '.join(missing)}." if missing else ""


def curve_section(found, out, name, title, same, vary, panels):
    """Section text, and figure, of one of CURVES: runs that agree in `same`, but for what the lines `vary` in."""
    mine = lambda r: all(r[k] == v for k, v in same.items() if k != vary) and r["order"] != "named"
    base = lambda r: r["transfer"] == same["transfer"] and r["split"] in ("none", "full") and r["attack"] == "pgd"
    groups = {k: g for k, g in grouped([r for r in found if mine(r) or base(r)], "data", "how").items() if any(map(mine, g))}
    if not groups:
        return [f"## {title}", "No runs yet."]
    figures.curves(out / f"{name}.png", title, groups, panels, lambda g: lines_of(g, vary), baseline, mean,
                   lambda data, line, share, kind: paper.value(name, data, line, share, kind))
    text = [f"## {title}", f"![{title}](figures/{name}.png)"]
    for (data, how), group in groups.items():
        text += [f"### {data}: {how}", curve_table(name, data, group, vary, panels), paper.caution(data, group[0]["setting"]), gaps(group, vary)]
    return text


def matrix_table(group, classes, runs, theirs):
    """Fig. 2's table: a row a class A; the last columns are the matrix, the paper's in brackets. `theirs`: {} or the paper's."""
    column = {c: theirs["classes"].index(paper.NAMES.get(c, c)) for c in classes if paper.NAMES.get(c, c) in theirs.get("classes", [])}
    rows = []
    for a in classes:
        mine = [runs[a]] if a in runs else []
        cells = []
        for c in classes:
            found = mine and mine[0]["accuracy"]["classes"][c]["robust"]["accuracy"]
            cells.append("-" if found in ([], None) else f"{100 * found:.0f}")
            if {a, c} <= set(column):
                cells[-1] += f" ({theirs['robust_per_class_rows_are_A'][column[a]][column[c]]})"
        b = theirs["robust_B_val"][paper.NAMES.get(a, a)] if a in column else None
        rows.append([a if mine else f"{a}: no run yet", *(cell(mine, p, "robust") for p in ("A_val", "B_val")), without_at(group, mine), *beside(mine, "B_val", "robust", b),
                     cell(mine, "all", "robust"), *cells])
    for line in ("no AT", "AT"):
        rows.append([line, "-", "-", "-", "-", "-", cell(baseline(group, line), "all", "robust"), *["-"] * len(classes)])
    head = ["A", "robust A_val %", "robust B_val %", "no AT on that B %", "paper B_val %", "difference", "robust all %"]
    return markdown([*head, *(f"on {c} %" for c in classes)], rows)


def matrix_section(found, out):
    """Fig. 2: single-class CSAT, as bars of A_val and B_val, and as the matrix of robust accuracies class by class."""
    title = "Fig. 2: CSAT on a single class"
    plain = [r for r in found if not r["transfer"] and r["weight"] == "vanilla" and r["attack"] == "pgd"]
    single = [r for r in plain if r["order"] == "named" and len(r["A_classes"]) == 1]
    text = [f"## {title}", *([] if single else ["No runs yet."])]
    for i, ((data, how), mine) in enumerate(grouped(single, "data", "how").items()):
        group = [r for r in plain if (r["data"], r["how"]) == (data, how)]
        runs = {r["A_classes"][0]: r for r in mine if r["seed"] == min(q["seed"] for q in mine)}
        classes = list(mine[0]["accuracy"]["classes"])
        file = f"fig2{'' if i == 0 else f'-{i + 1}'}.png"
        lines = {line: mean(baseline(group, line), "all", "robust") for line in ("AT", "no AT")}
        figures.matrix(out / file, f"{title}\n{data}: {how}", classes, runs, lines)
        theirs = paper.published()["fig2_single_class_csat_cifar10"] if paper.base(data) == "cifar10" else {}
        text += [f"![{title}](figures/{file})", f"### {data}: {how}", "In brackets: the paper's." if theirs else "",
                 matrix_table(group, classes, runs, theirs), paper.caution(data, group[0]["setting"])]
    return text


def difficulty_table(ranking):
    """Fig. 3's table: the classes hardest first (the ends of a long list), the paper's numbers for CIFAR-10 beside ours."""
    rows, most, theirs = ranking["classes_hardest_first"], 20, paper.published()["fig3_class_difficulty_cifar10"]
    metrics, known = [m for m in flags.METRICS if m in rows[0]], paper.base(ranking["fingerprint"]["name"]) == "cifar10"
    body = []
    for r in rows if len(rows) <= most else rows[:most // 2] + rows[-most // 2:]:
        error = "-" if r["clean_error"] is None else f"{100 * r['clean_error']:.1f}"
        body.append([r["class"], *(f"{r[m]:.4f}" for m in metrics), error, str(r["n"])])
        if known:
            name = paper.NAMES.get(r["class"], r["class"])
            i = theirs["classes"].index(name) if name in theirs["classes"] else None
            body[-1] += ["-", "-"] if i is None else [f"{theirs['mean_entropy_nats'][i]:.4f}", f"{100 * theirs['error_fraction'][i]:.1f}"]
    return markdown(["class, hardest first", *metrics, "clean error %", "n", *["paper entropy", "paper error %"] * known], body)


def rankings(results):
    """{path: content} of every rank.json below the folder `results`."""
    ranks = {path: common.read_json(path) for path in sorted(results.glob("**/rank.json"))}
    for path, r in ranks.items():
        if not isinstance(r, dict) or not {"classes_hardest_first", "spearman_of_examples", "fingerprint"} <= set(r):
            raise UserError(f"{path} is not a ranking of this project: move it away, or repeat it with rank.py --force")
    return ranks


def difficulty_section(ranks, out):
    """Fig. 3: mean entropy and clean error of each class, from every rank.json."""
    title = "Fig. 3: class entropy and class error"
    text, shown = [f"## {title}", *([] if ranks else ["No rankings yet."])], {}
    for r in ranks.values():
        name, n = f"{r['fingerprint']['name']}: {r['args']['arch']}, {r['epochs']} epochs", len(r["classes_hardest_first"])
        shown[name] = r["classes_hardest_first"]
        said = [f"Spearman's correlation of {pair} over examples: {rho:.3f}." for pair, rho in r["spearman_of_examples"].items()]
        for metric, found in r["spearman_of_classes_with_paper"].items():
            said += [f"Of {metric} with the paper's class order: {found['rho']:.3f} ({found['n']} classes)."] if found else []
        text += [f"### {name}{f' (20 of {n} classes)' if n > 20 else ''}", difficulty_table(r), " ".join(said)]
    if shown:
        figures.difficulty(out / "fig3.png", title, shown)
        text.insert(1, f"![{title}](figures/fig3.png)")
    return text


def claims_section(found, ranks):
    """The paper's claims on CIFAR-10, and to it, each with a verdict."""
    text, groups = ["## The paper's claims"], grouped(found, "data", "how")
    for (data, how), rows in findings.claims(groups, ranks).items():
        text += [f"### {data}: {how}", markdown(["claim", "paper", "ours", "verdict"], rows), paper.caution(data, groups[data, how][0]["setting"])]
    return text if len(text) > 1 else []


def speed_section(results):
    """What bench.py measured."""
    text = ["## The cost of a training step"]
    for setting, rows in findings.speed(results).items():
        head = ["step", "arithmetic", "images/s", "time, of \\|A\\|/N = 1", "cost model",
                *(f"times as fast as {name} in float32" for name in findings.SPEED_PEERS)]
        text += [f"### {setting}", markdown(head, rows)]
    return text if len(text) > 1 else []


def cost_section(found, out):
    """Robust accuracy against what training cost, for all runs of a data set: what SAT saves."""
    title = "Robust accuracy against the cost of training"
    groups = {k: g for k, g in grouped([r for r in found if not r["transfer"]], "data", "how").items() if len(g) > 2}
    if not groups:
        return [f"## {title}", "No runs yet."]
    figures.cost(out / "cost.png", title, groups, mean)
    return [f"## {title}", "Forward-pass equivalents of the whole training: an attack step counts 2, a training step 3. Evaluation is not counted.",
            f"![{title}](figures/cost.png)"]


def into(path, sections):
    """Puts the tables of sections (their figures left out) into a Markdown file, between <!-- table: TITLE --> and <!-- end -->."""
    bodies = {text[0][3:]: "\n\n".join(t for t in text[1:] if t and not t.startswith("!")) for text in sections if text}
    def body(match):
        """The marks of one table with its rows between them."""
        if match[2] not in bodies:
            raise UserError(f"{path} asks for the table {match[2]!r}; there are: {', '.join(bodies)}")
        return f"{match[1]}\n{bodies[match[2]]}\n\n{match[3]}"
    before = path.read_text(encoding="utf-8")
    after = re.sub(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", body, before, flags=re.S)
    common.atomic(path, lambda f: f.write(after.encode()))


def main(argv=None):
    """Reads all results, writes a section with a table and a figure for each figure of the paper."""
    parser = flags.Parser(prog="report.py", usage="python report.py [--results DIR]", description=__doc__, formatter_class=flags.Help)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the runs")
    parser.add_argument("--into", type=Path, metavar="FILE", help="also put tables into this Markdown file, where it has <!-- table: TITLE -->")
    args = parser.parse_args(argv)
    results = args.results
    found, out = records(results), results / "figures"
    if not found:
        raise UserError(f"no result.json below {results}: first run sat.py, or ./run_all.sh digits")
    text = ["# Results", "Accuracies in percent. One run: value [95 % Wilson interval]; several seeds: mean ± standard deviation over seeds. "
            "Robust: right, and still right under the attack that each table names, on test examples that selected nothing. Runs that differ "
            "in threat model, attack, n, network or epochs are in tables of their own."]
    ranks = rankings(results)
    sections = [claims_section(found, ranks.values()), matrix_section(found, out), difficulty_section(ranks, out)]
    sections += [curve_section(found, out, *figure) for figure in CURVES] + [cost_section(found, out), speed_section(results)]
    text += [t for section in sections for t in section if t]
    common.atomic(results / "tables.md", lambda f: f.write(("\n\n".join(text) + "\n").encode()))
    if args.into:
        into(args.into, sections)
    say(f"{len(found)} runs -> {results / 'tables.md'} and {out}/")


if __name__ == "__main__":
    common.script(main)
