"""The section "In short" of the report: the main results in one table and one figure."""
import statistics

from paper import claims, figures
from paper.published import comparable_data, fig2_accuracy, published_accuracy, published_setting
from paper.results import grouped, pick
from paper.stats import cell, seed_count
from paper.tables import BASELINES, CLEAN, ROBUST, costs_of_rankings, lines_of, markdown

MOVED = "cifar100->cifar10"


def largest_group(runs, data):
    """Of the groups of runs on `data` the one with the most runs by PGD. May be empty."""
    return max(grouped(pick(runs, data=data, attack="pgd"), "group").values(), key=len, default=[])


def rows_of_runs(group, data):
    """Yields (what is attacked, runs, the paper's robust accuracy) for runs on CIFAR-10. data: see
    comparable_data."""
    yield "nothing (no AT)", pick(group, split="none"), published_accuracy("fig6", data, "no AT", 0, "robust")
    lines = claims.esat_by_share(pick(group, weight="vanilla"))
    for share in (0.1, 0.5):
        for order, name in (("easiest", "the easiest"), ("hardest", "the hardest"), ("random", "random")):
            yield (f"{name} {100 * share:.0f} % of the examples", lines.get(share, {}).get(order, []),
                   published_accuracy("fig6", data, order, share, "robust"))
    yield "everything (AT)", pick(group, split="full"), published_accuracy("fig6", data, "AT", 1, "robust")
    single = claims.single_classes(pick(group, weight="balanced"))
    for c in ("cat", "automobile"):
        yield f"the class {c}", single.get(c, []), fig2_accuracy(c, "B_val") if data else None


def transfer_rows(moved, data):
    """Yields the same for transfers from CIFAR-100 to CIFAR-10."""
    hardest, start = pick(moved, order="hardest", metric="entropy"), "transfer from CIFAR-100: "
    esat = [r for r in pick(hardest, split="esat", weight="emphasis") if round(r.share, 3) == 0.3]
    yield (f"{start}the hardest 30 % of the examples", esat,
           published_accuracy("fig8", data, "hardest", 0.3, "robust"))
    for weight in ("vanilla", "emphasis"):
        yield (f"{start}the 10 hardest classes", pick(hardest, split="csat", weight=weight, size=10),
               published_accuracy("fig7", data, weight, 0.1, "robust"))
    yield (f"{start}everything (AT)", pick(moved, split="full"),
           published_accuracy("fig8", data, "AT", 1, "robust"))


def body_of_table(rows, at):
    """The table's rows, of those that have runs. at: the runs of AT, whose training costs 100 %."""
    body, full_cost = [], statistics.fmean(r.cost for r in at) if at else None
    for attacked, runs, published in rows:
        if not runs:
            continue
        if runs[0].w_A != 1:
            attacked += f", with weight {runs[0].w_A:.3g}"
        robust, papers = cell(runs), "-" if published is None else f"{published:.1f}"
        if len(runs[0].A_classes) == 1:
            robust += f"; on the other classes {cell(runs, 'B_val')}"
            if published is not None:
                papers += " on the other classes"
        cost = f"{100 * statistics.fmean(r.cost for r in runs) / full_cost:.0f}" if at else "-"
        body.append([attacked, cost, str(seed_count(runs)), robust, cell(runs, *CLEAN), papers])
    return body


def notes(group, moved, at, rankings):
    """What one needs to know to read the table."""
    paper, costs = published_setting("cifar10"), costs_of_rankings(rankings)
    data_of_setting = {}
    for r in (group[0], *moved[:1]):
        data_of_setting.setdefault(r.group, []).append(r.data.replace("->", " to "))
    text = [f"{' and '.join(data)}: {setting}." for setting, data in data_of_setting.items()]
    text += [f"The paper's: {paper['arch']}, {paper['epochs']} epochs, all of AutoAttack.",
             "Passes: forward passes of training, in percent of AT's (of the source, in a transfer)."]
    ranked = [costs[r.ranking] for r in group if r.ranking in costs]
    if ranked and at:
        share = 100 * ranked[0] / statistics.fmean(r.cost for r in at)
        text.append(f"The ranking that says which examples are hard, made once, costs {share:.0f} % more.")
    text.append("Weight: of an attacked example in the loss, 1 where none is given. Several seeds: mean ± "
                "standard deviation; one seed: [95 % interval].")
    return " ".join(text)


def section(runs, rankings, figure_folder):
    """The section, of the largest groups of runs on CIFAR-10 and of transfers to it. Empty without runs."""
    group, moved = largest_group(runs, "cifar10"), largest_group(runs, MOVED)
    if not group:
        return []
    baselines = {line: pick(group, split=split) for line, split in BASELINES.items()}
    data = comparable_data("cifar10", group[0].setting)
    body = body_of_table(rows_of_runs(group, data), baselines["AT"])
    if moved:
        body += body_of_table(transfer_rows(moved, comparable_data(MOVED, moved[0].setting)),
                              pick(moved, split="full"))
    head = ["attacked in training", "passes %", "seeds", "robust %", "clean %", "paper robust %"]
    paragraphs = ["## In short", markdown(head, body), notes(group, moved, baselines["AT"], rankings)]
    lines = lines_of(pick(group, split="esat", metric="entropy", weight="vanilla"), "order")
    if lines:
        title = "ESAT: accuracy by the share of the examples that are attacked"
        figures.curves(figure_folder / "short", title, "fig6",
                       [figures.Group("cifar10", group[0].group, lines, baselines, data)], [ROBUST, CLEAN])
        paragraphs.insert(1, f"![{title}](figures/short.png)")
    return paragraphs
