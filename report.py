"""Builds the paper's tables and figures from all results below the results folder, with the paper's numbers
beside ours.

    python report.py
Files in: results/**/result.json, rank.json and eval-*.json, results/bench/*.json, configs/. Files out:
results/tables.md, results/figures/*.png and *.svg, and the tables in the files of --into.
"""
import re
import statistics
from pathlib import Path

import claims
import common
import figures
import flags
import paper
import results
from common import UserError, say
from runs import atomic, read_json
from paper import theirs
from results import grouped, pick
from stats import cell, mean, without_at

ROBUST, CLEAN = ("all", "robust"), ("all", "clean")
PARTS = [(part, kind) for kind in ("robust", "clean") for part in ("all", "A_val", "B_val")]
PLAIN = {"metric": "entropy", "weight": "vanilla", "attack": "pgd", "transfer": False}
SSAT = {**PLAIN, "weight": "emphasis", "transfer": True}  # Sec. 4.3: all transfers except those of Fig. 7
# The figures of accuracy against |A|: (name, title, what its runs have in common, what differs between its
# lines, panels).
CURVES = [
    ("fig5", "Fig. 4 and 5: CSAT, A made of whole classes", {**PLAIN, "split": "csat"}, "order",
     [ROBUST, ("B_val", "robust"), CLEAN]),
    ("fig13", "Fig. 13: CSAT on all parts", {**PLAIN, "split": "csat"}, "order", PARTS),
    ("fig6", "Fig. 6: ESAT, A made of single examples", {**PLAIN, "split": "esat"}, "order", [ROBUST, CLEAN]),
    ("fig12", "Fig. 12: ESAT by several difficulty metrics", {**PLAIN, "split": "esat", "order": "hardest"},
     "metric", [ROBUST, CLEAN]),
    ("fig7", "Fig. 7: three loss weights, S-CSAT", {**SSAT, "split": "csat", "order": "hardest"}, "weight",
     [("source A_val", "robust"), ("source B_val", "robust"), ROBUST, CLEAN]),
    ("fig8", "Fig. 8 and 14: transfer from S-ESAT", {**SSAT, "split": "esat"}, "order", [ROBUST, CLEAN]),
    ("fig15", "Fig. 15: transfer from S-CSAT", {**SSAT, "split": "csat"}, "order", [ROBUST, CLEAN]),
    ("fig16", "Fig. 16: PGD-7 and single-step FGSM-RS, S-ESAT", {**SSAT, "split": "esat", "order": "hardest"},
     "attack", [ROBUST, CLEAN]),
]
# What a figure does not show alone: these runs are in Fig. 6, 8 or 15.
ALONE = {"metric": {"entropy"}, "attack": {"pgd"}, "weight": {"emphasis"}}
BASELINES = {"no AT": "none", "AT": "full"}  # line: --split
SPEED_PEERS = ("naive", "torchattacks PGDL2")  # the steps that bench.py times beside ours


def markdown(head, rows):
    """A Markdown table. `head` and each of `rows` are lists of strings."""
    return "\n".join(f"| {' | '.join(r)} |" for r in [head, ["---"] * len(head), *rows])


def lines_of(group, vary):
    """{line: {|A|: [runs of all seeds]}} without the baselines, |A| (in classes or examples) ascending."""
    runs = sorted((r for r in group if r.split not in BASELINES.values()), key=lambda r: (r.size, r.seed))
    lines = sorted(grouped(runs, vary).items())
    return {line: {size: rs for (size,), rs in grouped(found, "size").items()} for (line,), found in lines}


def amount(run):
    """|A| of a run as text, in classes or in examples."""
    return f"{run.size:,} class{'es' * (run.size > 1)}" if run.A_classes else f"{run.size:,}"


def beside(runs, part, kind, told):
    """Two cells: the paper's number, and the difference of ours from it."""
    ours = mean(runs, part, kind)
    return ["-" if told is None else f"{told:.1f}",
            "-" if told is None or not ours else f"{ours[0] - told:+.1f}"]


# --- sections: each is a list of paragraphs, of which the first is the heading ------------------------------

def curve_table(name, comparable, group, vary, panels):
    """The table of one data set in a figure of curves: our accuracies, and the paper's on the data
    `comparable` (paper.comparable) with the difference where the paper has a number."""
    rows = [(line, pick(group, split=split), float(line == "AT")) for line, split in BASELINES.items()]
    for line, sizes in lines_of(group, vary).items():
        rows += [(line, runs, runs[0].share) for runs in sizes.values()]
    told = [{kind: theirs(name, comparable, line, share, kind) for kind in ("robust", "clean")}
            for line, _, share in rows]
    kinds = [k for k in ("robust", "clean") if any(t[k] is not None for t in told)]
    bare = ["no AT on that B %"] * (("B_val", "robust") in panels)
    head = [vary, "\\|A\\|", "\\|A\\|/N", "w_A", "seeds",
            *(f"{k} %" if p == "all" else f"{k} {p} %" for p, k in panels), *bare]
    head += [text for k in kinds for text in (f"paper {k} %", "difference")]
    text = []
    for (line, runs, share), their in zip(rows, told):
        sizes = ["no run yet", f"{share:.0f}", "-", "0"]
        if runs:
            sizes = [amount(runs[0]), f"{share:.2f}", f"{runs[0].w_A:.3g}",
                     str(len(grouped(runs, "training_seed")))]
        text.append([line, *sizes, *(cell(runs, *p) for p in panels),
                     *(without_at(group, runs) for _ in bare),
                     *(c for k in kinds for c in beside(runs, "all", k, their[k]))])
    return markdown(head, text)


def gaps(group, vary):
    """A sentence that lists the missing baselines, and the sizes that only other lines of the table have; may
    be empty."""
    lines = lines_of(group, vary)
    sizes = sorted({size for found in lines.values() for size in found})
    missing = [f"{line} at |A| = {size:,}" for line, found in lines.items() for size in sizes
               if size not in found]
    missing += [f"the baseline {line}" for line, split in BASELINES.items() if not pick(group, split=split)]
    return f"Missing runs of these lines: {', '.join(missing)}." if missing else ""


def curve_section(runs, out, name, title, same, vary, panels):
    """Text and figure of one of CURVES, of the runs that agree in `same`, except in what the lines `vary`."""
    mine = pick(runs, **{k: v for k, v in same.items() if k != vary})
    mine = [r for r in mine if r.order != "named" and r.split not in BASELINES.values()]
    bases = [r for r in pick(runs, transfer=same["transfer"], attack="pgd") if r.split in BASELINES.values()]
    groups = {k: [r for r in bases if (r.data, r.group) == k] + found
              for k, found in grouped(mine, "data", "group").items()
              if set(lines_of(found, vary)) - ALONE.get(vary, set())}
    if not groups:
        return [f"## {title}", "No runs yet." if vary == "order" else "No runs yet that compare them."]
    drawn = {k: (pick(g, split="none"), pick(g, split="full"), lines_of(g, vary),
                 paper.comparable(k[0], g[0].setting)) for k, g in groups.items()}
    figures.curves(out / name, title, name, drawn, panels)
    text = [f"## {title}", f"![{title}](figures/{name}.png)"]
    for (data, name_of_group), group in groups.items():
        comparable = drawn[data, name_of_group][-1]
        text += [f"### {data}: {name_of_group}", curve_table(name, comparable, group, vary, panels),
                 paper.not_the_papers(data, group[0].setting), results.rankings_to_doubt(group),
                 gaps(group, vary)]
    return text


def matrix_table(group, classes, runs, known):
    """Fig. 2's table: one row for each class A. Its last columns are the matrix, with the paper's numbers in
    brackets if they are `known`."""
    rows, told = [], paper.fig2 if known else lambda a, c=None: None
    for a in classes:
        mine, cells = runs.get(a, []), []
        for c in classes:
            found = [r.accuracy["classes"][c]["robust"]["accuracy"] for r in mine]
            cells.append(f"{100 * statistics.fmean(found):.0f}" if found and None not in found else "-")
            if told(a, c) is not None:
                cells[-1] += f" ({told(a, c)})"
        rows.append([a if mine else f"{a}: no run yet", str(len(mine)), cell(mine, "A_val"),
                     cell(mine, "B_val"), without_at(group, mine), *beside(mine, "B_val", "robust", told(a)),
                     cell(mine), *cells])
    for line, split in BASELINES.items():
        base = pick(group, split=split)
        rows.append([line, str(len(base)), "-", "-", "-", "-", "-", cell(base), *["-"] * len(classes)])
    head = ["A", "seeds", "robust A_val %", "robust B_val %", "no AT on that B %", "paper B_val %",
            "difference", "robust all %"]
    return markdown([*head, *(f"on {c} %" for c in classes)], rows)


def matrix_section(runs, out):
    """Fig. 2: CSAT on a single class: bars for A_val and B_val, and the robust accuracies class by class."""
    title = "Fig. 2: CSAT on a single class"
    groups = grouped(pick(runs, transfer=False, attack="pgd"), "data", "group")
    shown = [(data, name, weight, group, single) for (data, name), group in groups.items()
             for weight in claims.FIG2 if (single := claims.single_classes(pick(group, weight=weight)))]
    text = [f"## {title}"]
    for i, (data, name, weight, group, single) in enumerate(shown):
        classes = list(group[0].accuracy["classes"])
        known = paper.base(paper.comparable(data, group[0].setting)) == "cifar10"
        file = f"fig2{f'-{i + 1}' * (i > 0)}"
        figures.matrix(out / file, f"{title}, {weight}\n{data}: {name}", classes, single,
                       pick(group, split="none"), pick(group, split="full"))
        text += [f"![{title}](figures/{file}.png)", f"### {data}: {claims.FIG2[weight]}; {name}",
                 "In brackets: the paper's." * known, matrix_table(group, classes, single, known),
                 claims.likeness(classes, single) * known, paper.not_the_papers(data, group[0].setting)]
    return text if len(text) > 1 else [*text, "No runs yet."]


def difficulty_table(ranking):
    """Fig. 3's table: the classes hardest first (of a long list both ends), for CIFAR-10 with the paper's
    numbers beside ours."""
    rows, most, told = ranking["classes_hardest_first"], 20, paper.published()["fig3"]
    metrics = [m for m in flags.METRICS if m in rows[0]]
    known = paper.base(ranking["fingerprint"]["name"]) == "cifar10"
    body = []
    for r in rows if len(rows) <= most else rows[:most // 2] + rows[-most // 2:]:
        error = "-" if r["clean_error"] is None else f"{100 * r['clean_error']:.1f}"
        body.append([r["class"], *(f"{r[m]:.4f}" for m in metrics), error, str(r["n"])])
        name = paper.NAMES.get(r["class"], r["class"])
        if known and name in told["classes"]:
            i = told["classes"].index(name)
            body[-1] += [f"{told['mean_entropy_nats'][i]:.4f}", f"{100 * told['error_fraction'][i]:.1f}"]
        elif known:
            body[-1] += ["-", "-"]
    head = ["class, hardest first", *metrics, "clean error %", "n"]
    return markdown([*head, *["paper entropy", "paper error %"] * known], body)


def difficulty_section(ranks, runs, out):
    """Fig. 3: mean entropy and clean error of each class, from every rank.json."""
    title = "Fig. 3: class entropy and class error"
    text, drawn = [f"## {title}", *([] if ranks else ["No rankings yet."])], {}
    for path, r in ranks.items():
        n = len(r["classes_hardest_first"])
        name = f"{r['fingerprint']['name']}: {r['args']['arch']}, {r['epochs']} epochs"
        name += f" ({path.parent.name})" if name in drawn else ""
        drawn[name] = r["classes_hardest_first"]
        said = [f"Spearman's correlation of {pair} over examples: {rho:.3f}."
                for pair, rho in r["spearman_of_examples"].items()]
        for metric, found in r["spearman_of_classes_with_paper"].items():
            if found:
                said += [f"Of {metric} with the paper's class order: {found['rho']:.3f} "
                         f"({found['n']} classes)."]
        used = sum(run.ranking in r.get("scores", {}).values() for run in runs)
        said += [f"{used} run{'s' * (used > 1)} of these tables used it."] if used else []
        text += [f"### {name}{f' (20 of {n} classes)' if n > 20 else ''}", difficulty_table(r),
                 " ".join(said)]
    if drawn:
        figures.difficulty(out / "fig3", title, drawn)
        text.insert(1, f"![{title}](figures/fig3.png)")
    return text


def claims_section(runs):
    """The paper's claims on CIFAR-10 and on transfers to it, each with a verdict."""
    text = ["## The paper's claims"]
    for (data, group), (rows, seeds) in claims.claims(runs).items():
        text += [f"### {data}: {group}", markdown(["claim", "paper", "ours", "verdict"], rows), str(seeds)]
    return text if len(text) > 1 else []


def precision_section(runs):
    """How training in bf16 changes the accuracy."""
    text = ["## Training in bf16 against float32"]
    head = ["setting", "seeds", "accuracy", "float32 %", "bf16 %", "bf16 minus float32"]
    for (data, group), rows in claims.precisions(runs).items():
        text += [f"### {data}: {group}", markdown(head, rows)]
    return text if len(text) > 1 else []


def evaluation_section(folder):
    """What evaluate.py measured with other threat models or attacks."""
    rows = []
    for path in results.found(folder, "eval-*.json"):
        r = read_json(path)
        try:
            s, a = r["settings"], r["accuracy"]["all"]
            shown = [f"{100 * a[k]['accuracy']:.1f} [{100 * a[k]['low']:.1f}, {100 * a[k]['high']:.1f}]"
                     for k in ("clean", "robust")]
            rows.append([f"{r['fingerprint']['name']}/{path.parent.name}", r["checkpoint"],
                         f"{s['norm']} eps {s['eps']:g}", " ".join(s["attacks"]), f"{a['clean']['n']:,}",
                         *shown])
        except (KeyError, TypeError):
            raise UserError(f"{path} was not written by evaluate.py: move it away") from None
    head = ["run", "checkpoint", "threat model", "attacks", "n", "clean %", "robust %"]
    return ["## Evaluations under other settings (evaluate.py)", markdown(head, rows)] if rows else []


def cost_section(runs, ranks, out):
    """Robust accuracy against the cost of training, for all runs of a data set: what SAT saves."""
    title = "Robust accuracy against the cost of training"
    price = {h: r["cost"] for r in ranks.values() for h in r.get("scores", {}).values()}
    groups = {k: g for k, g in grouped(pick(runs, transfer=False), "data", "group").items()
              if len({r.split for r in g}) > 1}
    if not groups:
        return [f"## {title}", "No runs yet."]
    figures.cost(out / "cost", title, groups, price)
    return [f"## {title}",
            "In forward passes: an attack step counts 2, a training step 3. Evaluation is not counted. "
            "Hollow marks: with the ranking that chose A, which is needed once a data set.",
            f"![{title}](figures/cost.png)"]


def speed_section(folder):
    """What bench.py measured: medians over the runs of a setting, the ratios also with their range. Ordinary
    training, and others' steps in float32, with which the rest is compared, have no row."""
    groups, text = {}, ["## The cost of a training step"]
    for path in sorted(folder.glob("bench/*.json")):
        r = read_json(path)
        try:
            steps = {(s["step"], s["precision"], s["compile"]): s for s in r["steps"]}
            arch, batch, shared = r["setting"].split(", ", 2)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{path} was not written by bench.py --json: move it away") from None
        groups.setdefault(shared, {}).setdefault(f"{arch}, {batch}", []).append(steps)
    spread = lambda v: f"{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})" if v else "-"
    for shared, settings in groups.items():
        rows = []
        for setting, found in settings.items():
            for (step, precision, compile), first in found[0].items():
                if step == "|A|/N = 0" or step in SPEED_PEERS and precision == "float32":
                    continue
                same = [r[step, precision, compile] for r in found if (step, precision, compile) in r]
                rate = statistics.median(s["images_per_s"] for s in same)
                faster = [spread([s["faster_than"][p] for s in same if p in s["faster_than"]])
                          for p in SPEED_PEERS]
                name = f"{step}{', --compile' * compile}, {precision}".replace("|", "\\|")
                rows.append([f"{setting} (runs: {len(found)})", name, f"{rate:.1f}",
                             spread([s["time_to_full"] for s in same]), f"{first['model']:.2f}", *faster])
        head = ["network", "step", "images/s", "time relative to \\|A\\|/N = 1", "cost model",
                *(f"times as fast as {p} in float32" for p in SPEED_PEERS)]
        text += [f"### {shared}", markdown(head, rows)]
    return text if len(text) > 1 else []


def into(path, sections):
    """Copies the text of sections, without their figures, into a Markdown file: each section between its
    marks <!-- table: TITLE --> and <!-- end -->."""
    bodies = {text[0][3:]: "\n\n".join(t for t in text[1:] if t and not t.startswith("!"))
              for text in sections if text}

    def body(match):
        """The two marks with the text of their section between them."""
        if match[2] not in bodies:
            raise UserError(f"{path} asks for the table {match[2]!r}; there are: {', '.join(bodies)}")
        return f"{match[1]}\n{bodies[match[2]]}\n\n{match[3]}"

    before = path.read_text(encoding="utf-8")
    after = re.sub(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", body, before, flags=re.S)
    atomic(path, lambda f: f.write(after.encode()))


def main(argv=None):
    """Reads all results; writes the figures, and tables.md with a section for each figure of the paper."""
    usage = "python report.py [--results DIR] [--into FILE ...]"
    parser = flags.Parser(prog="report.py", usage=usage, description=__doc__, formatter_class=flags.Help)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the runs")
    parser.add_argument("--into", type=Path, metavar="FILE", nargs="+", default=[],
                        help="also put tables into these Markdown files, at their <!-- table: TITLE -->")
    args = parser.parse_args(argv)
    found, ranks, out = results.read(args.results), results.rankings(args.results), args.results / "figures"
    if not found and not ranks:
        raise UserError(f"no result.json or rank.json below {args.results}: "
                        "first run sat.py, or ./run_all.sh digits")
    precision, runs = precision_section(found), results.shown(found)
    sections = [claims_section(runs), matrix_section(runs, out), difficulty_section(ranks, runs, out)]
    sections += [curve_section(runs, out, *figure) for figure in CURVES]
    sections += [cost_section(runs, ranks, out), evaluation_section(args.results), precision,
                 speed_section(args.results)]
    text = ["# Results",
            "Accuracies in percent. One run: value [95 % Wilson interval]; several seeds: mean ± standard "
            "deviation over seeds. Robust: right, and still right under the attack that each table names, on "
            "test examples that were not used for selecting a checkpoint. Runs that differ in threat model, "
            "attack, n, network or epochs are in tables of their own."]
    text += [t for section in sections for t in section if t]
    atomic(args.results / "tables.md", lambda f: f.write(("\n\n".join(text) + "\n").encode()))
    for path in args.into:
        into(path, sections)
    say(f"{len(runs)} runs -> {args.results / 'tables.md'} and {out}/")


if __name__ == "__main__":
    common.script(main)
