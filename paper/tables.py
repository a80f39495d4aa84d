"""The sections of the report. Each is a list of paragraphs, of which the first is the heading. Those that
have figures draw them, too, into the folder `figure_folder`."""
import functools
import statistics
from dataclasses import dataclass

import flags
from paper import claims, figures
from paper.published import (NAMES, comparable_dataset, differences_from_paper, fig2_accuracy,
                             numbers, published_accuracy)
from paper.results import grouped, pick, ranking_cautions, result_files
from paper.stats import cell, mean_sd, no_at_cell, seed_count
from runs import load

ROBUST, CLEAN = ("all", "robust"), ("all", "clean")
PARTS = [(part, kind) for kind in ("robust", "clean") for part in ("all", "A_val", "B_val")]
BASELINES = {"no AT": "none", "AT": "full"}  # line: --split


@dataclass(frozen=True)
class CurveFigure:
    """A figure of accuracy against |A|/N."""
    name: str
    title: str
    split: str
    panels: list          # [(part, kind)]
    line_attribute: str = "order"  # of runs: what differs between its lines
    transfer: bool = False


CURVE_FIGURES = [
    CurveFigure("fig5", "Fig. 4, 5 and 13: CSAT, A made of whole classes", "csat", PARTS),
    CurveFigure("fig6", "Fig. 6: ESAT, A made of single examples", "esat", [ROBUST, CLEAN]),
    CurveFigure("fig12", "Fig. 12: ESAT by several difficulty metrics", "esat", [ROBUST, CLEAN], "metric"),
    CurveFigure("fig7", "Fig. 7: three loss weights, S-CSAT", "csat",
                [("source A_val", "robust"), ("source B_val", "robust"), ROBUST, CLEAN], "weight",
                transfer=True),
    CurveFigure("fig8", "Fig. 8 and 14: transfer from S-ESAT", "esat", [ROBUST, CLEAN], transfer=True),
    CurveFigure("fig15", "Fig. 15: transfer from S-CSAT", "csat", [ROBUST, CLEAN], transfer=True),
    CurveFigure("fig16", "Fig. 16: PGD-7 and single-step FGSM-RS, S-ESAT", "esat", [ROBUST, CLEAN], "attack",
                transfer=True),
]


def markdown(head, rows):
    """A Markdown table. `head` and each of `rows` are lists of strings."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def lines_of(runs, attribute):
    """{line: {|A|: [runs of all seeds]}}, |A| (in classes or examples) ascending."""
    runs = sorted(runs, key=lambda r: (r.size, r.head_seed, r.seed))
    return {line: {size: same_size for (size,), same_size in grouped(line_runs, "size").items()}
            for (line,), line_runs in sorted(grouped(runs, attribute).items())}


def paper_cells(runs, part, kind, published):
    """Two cells: the paper's number, and the difference of ours from it."""
    ours = mean_sd(runs, part, kind)
    return ["-" if published is None else f"{published:.1f}",
            "-" if published is None or not ours else f"{ours[0] - published:+.1f}"]


def curve_table(figure, group):
    """The table of one group: our accuracies, and the paper's where it has a number."""
    rows = [(line, runs, float(line == "AT")) for line, runs in group.baselines.items() if runs]
    rows += [(line, runs, runs[0].share) for line, by_size in group.lines.items()
             for runs in by_size.values()]
    published = functools.partial(published_accuracy, figure.name, group.paper_dataset)
    kinds = [kind for kind in ("robust", "clean")
             if any(published(line, share, kind) is not None for line, _, share in rows)]
    head, body = [figure.line_attribute, "\\|A\\|", "\\|A\\|/N", "w_A", "seeds"], []
    head += [f"{kind} %" if part == "all" else f"{kind} {part} %" for part, kind in figure.panels]
    with_b_val = ("B_val", "robust") in figure.panels
    head += ["no AT on that B %"] if with_b_val else []
    for line, runs, share in rows:
        n = runs[0].size
        size = f"{n} class{'' if n == 1 else 'es'}" if runs[0].A_classes else f"{n:,}"
        row = [line, size, f"{share:.2f}", f"{runs[0].w_A:.3g}", str(seed_count(runs))]
        row += [cell(runs, *panel) for panel in figure.panels]
        row += [no_at_cell(group.baselines["no AT"], runs)] if with_b_val else []
        for kind in kinds:
            row += paper_cells(runs, "all", kind, published(line, share, kind))
        body.append(row)
    for kind in kinds:
        head += [f"paper {kind} %", "difference"]
    return markdown(head, body)


def mark_as_shown(runs):
    """Notes that these runs are in a table."""
    for r in runs:
        r.in_table = True


def curve_section(runs, figure_folder, figure, rankings):
    """A figure of accuracy against |A|/N and its tables, one for each group of runs."""
    usual = {"order": "hardest", "metric": "entropy", "attack": "pgd",
             "weight": "emphasis" if figure.transfer else "vanilla"}  # Sec. 4.3
    usual_line = usual.pop(figure.line_attribute)
    candidates = [r for r in runs if r.order != "named"]
    groups, paragraphs = [], [f"## {figure.title}", f"![{figure.title}](figures/{figure.name}.png)"]
    selected = pick(candidates, split=figure.split, transfer=figure.transfer, **usual)
    for (dataset, name), in_group in grouped(selected, "dataset", "group_name").items():
        lines, setting = lines_of(in_group, figure.line_attribute), in_group[0].setting
        if figure.line_attribute != "order" and set(lines) == {usual_line}:
            continue  # these runs are in Fig. 6, 8 or 15
        baselines = {line: pick(runs, dataset=dataset, group_name=name, attack="pgd", split=split)
                     for line, split in BASELINES.items()}
        groups.append(figures.Group(dataset, name, lines, baselines, comparable_dataset(dataset, setting)))
        mark_as_shown([*in_group, *baselines["AT"], *baselines["no AT"]])
        sizes = sorted({size for by_size in lines.values() for size in by_size})
        missing = [f"{line} at |A| = {size:,}" for line, by_size in lines.items() for size in sizes
                   if size not in by_size]
        missing += [f"the baseline {line}" for line in baselines if not baselines[line]]
        paragraphs += [f"### {dataset}: {name}", curve_table(figure, groups[-1]),
                       differences_from_paper(dataset, setting),
                       ranking_cautions([*in_group, *baselines["AT"], *baselines["no AT"]], rankings),
                       f"Missing runs of these lines: {', '.join(missing)}." if missing else ""]
    if not groups:
        return [paragraphs[0], "No runs yet."]
    figures.curves(figure_folder / figure.name, figure.title, figure.name, groups, figure.panels)
    return paragraphs


def class_cells(runs, a, classes, comparable):
    """Fig. 2's robust accuracies on each class of runs with the class `a` as A, or of "AT" or "no AT". If
    `comparable`, with the paper's in brackets."""
    cells = []
    for c in classes:
        values = [r.accuracy["classes"][c]["robust"]["accuracy"] for r in runs]
        cells.append("-" if None in values else f"{100 * statistics.fmean(values):.0f}")
        if comparable and fig2_accuracy(a, c) is not None:
            cells[-1] += f" ({fig2_accuracy(a, c)})"
    return cells


def matrix_table(group_runs, classes, single, comparable):
    """Fig. 2's table, with a row for each class A that has runs. If `comparable`, the paper's numbers stand
    in brackets."""
    rows = []
    for a in (c for c in classes if c in single):
        runs = single[a]
        rows.append([a, str(len(runs)), cell(runs, "A_val"), cell(runs, "B_val"),
                     no_at_cell(pick(group_runs, split="none"), runs),
                     *paper_cells(runs, "B_val", "robust", fig2_accuracy(a, "B_val") if comparable else None),
                     cell(runs), *class_cells(runs, a, classes, comparable)])
    for line, split in BASELINES.items():
        if baseline := pick(group_runs, split=split):
            rows.append([line, str(len(baseline)), *["-"] * 5, cell(baseline),
                         *class_cells(baseline, line, classes, comparable)])
    head = ["A", "seeds", "robust A_val %", "robust B_val %", "no AT on that B %", "paper B_val %",
            "difference", "robust all %"]
    return markdown([*head, *(f"on {c} %" for c in classes)], rows)


def authors_attack_table(by_authors, by_pgd):
    """CSAT by the authors' training attack beside PGD, each {class A: runs}. The accuracies after the last
    epoch, of runs with a log, stand beside those of the selected checkpoint."""
    head = ["A", "training attack", "seeds", "robust A_val %", "robust B_val %", "robust all %", "clean %"]
    sets_of_runs = [(a, attack, by_class[a]) for a in by_authors
                    for attack, by_class in (("pgd", by_pgd), ("pgd-authors", by_authors)) if a in by_class]
    rows = [[a, attack, str(seed_count(runs)), *(cell(runs, part) for part in ("A_val", "B_val", "all")),
             cell(runs, "all", "clean")] for a, attack, runs in sets_of_runs]
    n = {r.last_accuracies["n"] for _, _, runs in sets_of_runs for r in runs if r.last_accuracies}
    if n:
        head += ["epochs selected"] + [f"{kind} % after the last epoch, on {max(n):,} selection examples"
                                       for kind in ("robust", "clean")]
        for row, (_, _, runs) in zip(rows, sets_of_runs):
            row.append(" ".join(str(r.epoch) for r in runs))
            for kind in ("robust", "clean"):
                values = [f"{100 * r.last_accuracies[kind]:.1f}" for r in runs if r.last_accuracies]
                row.append(" ".join(values) or "-")
    return markdown(head, rows)


def matrix_section(runs, figure_folder):
    """Fig. 2: bars for A_val and B_val, and the robust accuracies class by class."""
    title, paragraphs, i = "Fig. 2: CSAT on a single class", [], 0
    for (dataset, name), in_group in grouped(pick(runs, transfer=False), "dataset", "group_name").items():
        group = pick(in_group, attack="pgd")
        for weight, formula in claims.FIG2.items():
            single, by_authors = (claims.single_classes(pick(in_group, weight=weight, attack=attack))
                                  for attack in ("pgd", "pgd-authors"))
            if not single:
                continue
            mark_as_shown([*sum([*single.values(), *by_authors.values()], []), *pick(group, split="none"),
                           *pick(group, split="full")])
            i += 1
            file = "fig2" if i == 1 else f"fig2-{i}"
            classes, setting = list(group[0].accuracy["classes"]), group[0].setting
            comparable = comparable_dataset(dataset, setting) == "cifar10"
            missing = [f"A = {c}" for c in classes if c not in single]
            missing += [f"the baseline {line}" for line, split in BASELINES.items()
                        if not pick(group, split=split)]
            figures.matrix(figure_folder / file, f"{title}, {weight}", dataset, name, classes, single,
                           pick(group, split="none"), pick(group, split="full"))
            paragraphs += [f"![{title}](figures/{file}.png)", f"### {dataset}: {formula}; {name}",
                           "In brackets: the paper's." if comparable else "",
                           matrix_table(group, classes, single, comparable),
                           f"Missing runs: {', '.join(missing)}." if missing else "",
                           claims.agreement_with_fig2(classes, single) if comparable else "",
                           differences_from_paper(dataset, setting)]
            if by_authors:
                paragraphs += ["With the training attack of the authors' code, beside PGD:",
                               authors_attack_table(by_authors, single)]
    return [f"## {title}", *(paragraphs or ["No runs yet."])]


def difficulty_section(rankings, figure_folder):
    """Fig. 3: mean score and clean error of each class, from every rank.json, for CIFAR-10 with the paper's
    numbers beside ours. A long table has its two ends only."""
    title, paragraphs, drawn, fig3 = "Fig. 3: class entropy and class error", [], {}, numbers()["fig3"]
    fig3_by_class = dict(zip(fig3["classes"], zip(fig3["mean_entropy_nats"], fig3["error_fraction"])))
    for path, ranking in rankings.items():
        rows, dataset = ranking["classes_hardest_first"], ranking["fingerprint"]["name"]
        name = f"{dataset}: {ranking['args']['arch']}, {ranking['epochs']} epochs"
        name += f" ({path.parent})" if name in drawn else ""
        drawn[name] = rows
        metrics = [m for m in flags.METRICS if m in rows[0]]
        head, body = ["class, hardest first", *metrics, "clean error %", "n"], []
        head += ["paper entropy", "paper error %"] if dataset == "cifar10" else []
        for r in rows if len(rows) <= 20 else rows[:10] + rows[-10:]:
            error = "-" if r["clean_error"] is None else f"{100 * r['clean_error']:.1f}"
            body.append([r["class"], *(f"{r[m]:.4f}" for m in metrics), error, str(r["n"])])
            if dataset == "cifar10":
                published = fig3_by_class.get(NAMES.get(r["class"], r["class"]))
                body[-1] += [f"{published[0]:.4f}", f"{100 * published[1]:.1f}"] if published else ["-", "-"]
        notes = [f"Spearman's correlation of {pair} over examples: {rho:.3f}."
                 for pair, rho in ranking["spearman_of_examples"].items()]
        for metric in metrics:
            if correlation := claims.class_order_correlation(ranking, metric):
                notes.append(f"Of {metric} with the paper's class order: {correlation[0]:.3f} "
                             f"({correlation[1]} classes).")
        paragraphs += [f"### {name}{f' (20 of {len(rows)} classes)' if len(rows) > 20 else ''}",
                       markdown(head, body), " ".join(notes)]
    if not drawn:
        return [f"## {title}", "No rankings yet."]
    figures.difficulty(figure_folder / "fig3", title, drawn)
    return [f"## {title}", f"![{title}](figures/fig3.png)", *paragraphs]


def other_section(runs):
    """The runs that are in no other table: sources of transfers, and A, weights or attacks that no figure of
    the paper has."""
    rows = []
    for same in grouped(pick(runs, in_table=False), "configuration").values():
        r = same[0]
        rows.append([r.path, r.dataset, f"{r.n_A:,}", f"{r.n_A / r.N:.2f}", f"{r.w_A:.3g}",
                     r.attack if r.n_A else "-", str(seed_count(same)), cell(same), cell(same, *CLEAN)])
    head = ["run, the first of its seeds", "data", "\\|A\\|", "\\|A\\|/N", "w_A", "training attack", "seeds",
            "robust %", "clean %"]
    return ["## Sources of transfers, and other runs", markdown(head, rows)] if rows else []


def claims_section(runs, rankings):
    """The paper's claims on CIFAR-10 and on transfers to it, each with a verdict."""
    paragraphs = ["## The paper's claims"]
    for (dataset, group_name), (rows, noise) in claims.claims(runs).items():
        of_claims = claims.with_pgd(pick(runs, dataset=dataset, group_name=group_name))
        baselines = [r for r in of_claims if r.split in BASELINES.values()]
        paragraphs += [f"### {dataset}: {group_name}", markdown(["claim", "paper", "ours", "verdict"], rows),
                       str(noise), "" if "->" in dataset else claims.why_e_is_undecided(baselines),
                       ranking_cautions(of_claims, rankings)]
    return paragraphs if len(paragraphs) > 1 else []


def evaluation_section(folder):
    """What evaluate.py measured, with whatever threat model and attacks."""
    rows = []
    for path in result_files(folder, "eval-*.json"):
        r = load(path, ["fingerprint", "checkpoint", "settings", "accuracy"])
        s, a, run = r["settings"], r["accuracy"]["all"], path.with_name("result.json")
        if r["checkpoint"] == "best.pt" and run.exists() and load(run).get("weights") != r["weights"]:
            continue  # of a best.pt that has been replaced
        attacks = " ".join(s["attacks"] + (["in TF32"] if "precision" in s else []))
        rows.append([f"{r['fingerprint']['name']}/{path.parent.name}", r["checkpoint"],
                     f"{s['norm']} eps {s['eps']:g}", attacks, f"{a['clean']['n']:,}",
                     *(f"{100 * a[k]['accuracy']:.1f} [{100 * a[k]['low']:.1f}, {100 * a[k]['high']:.1f}]"
                       for k in ("clean", "robust"))])
    head = ["run", "checkpoint", "threat model", "attacks", "n", "clean %", "robust %"]
    return ["## Evaluations under other settings (evaluate.py)", markdown(head, rows)] if rows else []


def cost_section(runs, rankings, figure_folder):
    """Robust accuracy against the cost of training, for all runs of a data set: what SAT saves."""
    title = "Robust accuracy against the cost of training"
    ranking_costs = {hash_of_scores: ranking["cost"] for ranking in rankings.values()
                     for hash_of_scores in ranking["scores"].values()}
    groups = {k: group for k, group in grouped(pick(runs, transfer=False), "dataset", "group_name").items()
              if len({r.split for r in group}) > 1}
    if not groups:
        return [f"## {title}", "No runs yet."]
    figures.draw_cost(figure_folder / "cost", title, groups, ranking_costs)
    return [f"## {title}",
            "In forward passes: an attack step counts 2, a training step 3. Evaluation is not counted. "
            "Hollow marks include the ranking that chose A, which is needed once per data set.",
            f"![{title}](figures/cost.png)"]
