"""The section "In short" of the report: the main results in one table and one figure."""
import functools
import statistics

from paper import claims, figures
from paper.published import comparable_dataset, fig2_accuracy, published_accuracy
from paper.results import grouped, pick
from paper.stats import cell
from paper.tables import BASELINES, CLEAN, ROBUST, lines_of, markdown

MOVED = "cifar100->cifar10"
NOTES = ("±: standard deviation over seeds; [ ]: 95 % interval, one seed. Cost: passes of training, without "
         "rankings and new heads. w_A: 1 where none is given. Clean: all classes. Transfer (S-SAT): from "
         "CIFAR-100 to CIFAR-10.")


def largest_group(runs, dataset):
    """Of the groups of runs on `dataset` the one with the most runs by PGD. May be empty."""
    return max(grouped(pick(runs, dataset=dataset, attack="pgd"), "group_name").values(), key=len, default=[])


def rows_of_runs(group, paper_dataset):
    """Yields (name of A, runs, the paper's robust accuracy) on CIFAR-10. paper_dataset: of
    comparable_dataset."""
    published = functools.partial(published_accuracy, "fig6", paper_dataset, kind="robust")
    yield "nothing (no AT)", pick(group, split="none"), published("no AT", 0)
    by_share = claims.esat_by_share(pick(group, weight="vanilla"))
    for share, orders in ((0.1, ("easiest", "hardest", "random")), (0.5, ("hardest", "random"))):
        for order in orders:
            runs = by_share.get(share, {}).get(order, [])
            yield f"{order} {100 * share:.0f} %", runs, published(order, share)
    yield "everything (AT)", pick(group, split="full"), published("AT", 1)
    single = claims.single_classes(pick(group, weight="balanced"))
    for name, c in (("hardest", "cat"), ("easiest", "automobile")):
        yield f"{name} class ({c})", single.get(c, []), fig2_accuracy(c, "B_val") if paper_dataset else None


def transfer_rows(moved, paper_dataset):
    """Like rows_of_runs, for transfers from CIFAR-100 to CIFAR-10."""
    esat = pick(moved, split="esat", order="hardest", metric="entropy", weight="emphasis")
    for name, line, share, runs in (
            ("hardest 30 %", "hardest", 0.3, [r for r in esat if round(r.share, 3) == 0.3]),
            ("everything", "AT", 1, pick(moved, split="full"))):
        yield f"transfer: {name}", runs, published_accuracy("fig8", paper_dataset, line, share, "robust")


def body_of_table(rows, at):
    """The rows of the table, without those that have no runs. at: the runs of AT, whose training costs 100 %.
    """
    body, full_cost = [], statistics.fmean(r.cost for r in at) if at else None
    for name, runs, published in rows:
        if not runs:
            continue
        if runs[0].w_A != 1:
            name += f", w_A {runs[0].w_A:.3g} ({runs[0].weight})"
        cost = f"{100 * statistics.fmean(r.cost for r in runs) / full_cost:.0f}" if at else "-"
        robust, paper = cell(runs), "-" if published is None else f"{published:.1f}"
        if len(runs[0].A_classes) == 1:
            robust, paper = f"{cell(runs, 'B_val')} on B", f"{paper} on B"
        body.append([name, cost, robust, cell(runs, *CLEAN), paper])
    return body


def section(runs, figure_folder):
    """The section, of the largest groups of runs on CIFAR-10 and of transfers to it. Empty without rows."""
    group, moved = largest_group(runs, "cifar10"), largest_group(runs, MOVED)
    if not group:
        return []
    baselines = {line: pick(group, split=split) for line, split in BASELINES.items()}
    paper_dataset = comparable_dataset("cifar10", group[0].setting)
    body = body_of_table(rows_of_runs(group, paper_dataset), baselines["AT"])
    if moved:
        body += body_of_table(transfer_rows(moved, comparable_dataset(MOVED, moved[0].setting)),
                              pick(moved, split="full"))
    if not body:
        return []
    head = ["A", "cost, % of AT", "robust %", "clean %", "paper's robust %"]
    paragraphs = ["## In short", markdown(head, body), NOTES]
    lines = lines_of(pick(group, split="esat", metric="entropy", weight="vanilla"), "order")
    if lines:
        title = "ESAT: accuracy by the share of the examples that are attacked"
        drawn = figures.Group("cifar10", group[0].group_name, lines, baselines, paper_dataset)
        figures.curves(figure_folder / "short", title, "fig6", [drawn], [ROBUST, CLEAN])
        paragraphs.insert(1, f"![{title}](figures/short.png)")
    return paragraphs
