"""The tables of the README: the paper's claims (a) to (f) with a verdict each, and the cost of a training step. report.py writes them.

A claim is tested on the runs of one data set. "holds" and "contradicted" need a 95 % interval of the difference that leaves out
0 (Newcombe 1998, from Wilson intervals; wider than need be, since all runs meet the same test examples); else "open". Of several
seeds of a run the mean counts, with the n of one: more seeds do not make more test examples.
"""
import statistics
from pathlib import Path

import common
import evaluate
import paper
from common import UserError
from rank import spearman

SPEED_PEERS = ("naive", "torchattacks PGDL2")  # others' steps that bench.py times


def contrast(*terms):
    """The sum of weight * accuracy over (weight, {"accuracy", "low", "high"}), in points: (value, low, high)."""
    off = lambda side: sum((w * (a["accuracy"] - a["low" if (w > 0) == (side < 0) else "high"]))**2 for w, a in terms) ** 0.5
    value = sum(w * a["accuracy"] for w, a in terms)
    return 100 * value, 100 * (value - off(-1)), 100 * (value + off(+1))


def difference(a, b):
    """a - b of two accuracies, in points: (value, low, high), Newcombe's method 10."""
    return contrast((1, a), (-1, b))


def verdict(value, low, high):
    """What an interval says of a claim that its value is above 0."""
    return "holds" if low > 0 else "contradicted" if high < 0 else "open"


def points(value, low, high):
    """A difference for people."""
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def percent(a):
    """An accuracy for people."""
    return f"{100 * a['accuracy']:.1f} [{100 * a['low']:.1f}, {100 * a['high']:.1f}]"


def accuracy(share, n):
    """{"accuracy", "low", "high", "n"} with Wilson's interval; None for no examples."""
    return {"accuracy": share, "n": n, **dict(zip(("low", "high"), evaluate.wilson(share * n, n)))} if n else None


def robust(runs, part="all", kind="robust"):
    """An accuracy of report.py's records of one run: the mean over its seeds."""
    found = [r["accuracy"][part][kind] for r in runs if r["accuracy"][part][kind]["n"]]
    return accuracy(statistics.mean(f["accuracy"] for f in found), found[0]["n"]) if found else None


def without(run, classes):
    """Robust accuracy of a record of report.py on all classes but these; None where nothing is left."""
    found = [v["robust"] for c, v in run["accuracy"]["classes"].items() if c not in classes and v["robust"]["n"]]
    n = sum(f["n"] for f in found)
    return accuracy(sum(f["accuracy"] * f["n"] for f in found) / n, n) if n else None


def pick(runs, **like):
    """The records that agree with `like`: the seeds of a run."""
    return [r for r in runs if all(r[k] == v for k, v in like.items())]


def seeds(*sides):
    """Says how many seeds a comparison rests on, where more than one."""
    return f" ({min(map(len, sides))} seeds)" if min(map(len, sides)) > 1 else ""


def single_class(runs, none, ranking):
    """Claims (a) and (b): what robustness a single attacked class gives to all others."""
    named = [r for r in runs if r["order"] == "named" and len(r["A_classes"]) == 1]
    single = {c: pick(named, A_classes=[c]) for r in named for c in r["A_classes"]}
    if not single or not none:
        return
    single = {c: rs for c, rs in single.items() if robust(rs, "B_val") and without(none[0], [c])}
    if not single:
        return
    found = {c: difference(robust(rs, "B_val"), without(none[0], [c])) for c, rs in single.items()}
    least, most = (f(found, key=lambda c: found[c][0]) for f in (min, max))
    said = [verdict(*d) for d in found.values()]
    said = said[0] if len(set(said)) == 1 else ", ".join(f"{v} for {said.count(v)}" for v in sorted(set(said), key=said.count)[::-1])
    yield ("(a) CSAT on a single class makes B_val robust, against no AT on the same classes", "+17.1 (car) to +37.8 (cat)",
           f"{points(*found[least])} ({least}) to {points(*found[most])} ({most})", said)
    order = [row["class"] for row in (ranking or {}).get("classes_hardest_first", []) if row["class"] in single]
    if len(order) > 2:
        hard, easy = single[order[0]], single[order[-1]]
        d = difference(robust(hard, "B_val"), robust(easy, "B_val"))
        rho = spearman([-i for i in range(len(order))], [robust(single[c], "B_val")["accuracy"] for c in order])
        yield ("(b) the hardest class gives B_val more than the easiest", "cat 37.8, car 17.1: +20.7",
               f"{order[0]} {percent(robust(hard, 'B_val'))}, {order[-1]} {percent(robust(easy, 'B_val'))}: {points(*d)}{seeds(hard, easy)}; "
               f"Spearman of difficulty and B_val over {len(order)} classes {rho:+.2f}", verdict(*d))


def examples(runs, none, full):
    """Claims (c) and (d): ESAT."""
    esat = [r for r in runs if r["split"] == "esat" and r["metric"] == "entropy"]
    half = pick(esat, share=0.5, order="hardest")
    if half and none and full:
        gain, over = difference(robust(full), robust(none)), contrast((1, robust(half)), (-0.5, robust(none)), (-0.5, robust(full)))
        share = f"{100 * difference(robust(half), robust(none))[0] / gain[0]:.0f} %" if gain[1] > 0 else "AT gains nothing that is sure"
        yield ("(c) ESAT on the hardest half recovers most of (over half of) what AT gains in robustness", "66.4 of 69.0: 96 %",
               f"{percent(robust(half))} of {percent(robust(full))}: {share}; above the middle of no AT and AT by {points(*over)}",
               verdict(*over) if gain[1] > 0 else "open")
    for size in sorted({r["A"] for r in esat})[:1]:
        at = {order: pick(esat, A=size, order=order) for order in ("hardest", "easiest", "random")}
        if all(at.values()):
            hard, easy, any_ = (robust(at[order]) for order in ("hardest", "easiest", "random"))
            d, e = difference(hard, easy), contrast((1, any_), (-0.5, hard), (-0.5, easy))
            where = f"at \\|A\\|/N = {at['hardest'][0]['share']:.1f}"
            yield (f"(d) {where} hardest beats easiest", "52.1, 24.2: +27.9", f"{percent(hard)}, {percent(easy)}: {points(*d)}"
                   f"{seeds(at['hardest'], at['easiest'])}", verdict(*d))
            yield (f"(d) {where} random is nearer to hardest than to easiest (or above both)", "52.1, 48.5, 24.2: +10.4 above the middle",
                   f"{percent(any_)}: {points(*e)} above the middle{seeds(*at.values())}", verdict(*e))


def clean_against_robust(runs, none, full):
    """Claim (e): clean accuracy falls as robust accuracy rises."""
    if none and full:
        shown = [r for r in runs if r["split"] in ("none", "full", "esat")]
        plain, hardened = (robust(side, kind="clean") for side in (none, full))
        d = difference(plain, hardened)
        rho = spearman(*([robust([r], kind=kind)["accuracy"] for r in shown] for kind in ("robust", "clean")))
        yield ("(e) clean accuracy falls as robust accuracy rises (no AT minus AT)", "ESAT hardest 91.9 (10 %) to AT's 89.4 (90 %: 89.5)",
               f"{percent(plain)}, {percent(hardened)}: {points(*d)}{seeds(none, full)}; "
               f"Spearman of robust and clean over no AT, AT and ESAT ({len(shown)} runs) {rho:+.2f}", verdict(*d))


def transfers(runs):
    """Claim (f): in S-CSAT, the emphasis weight transfers better than vanilla."""
    csat = [r for r in runs if r["transfer"] and r["split"] == "csat" and r["order"] == "hardest"]
    for size in sorted({r["size"] for r in csat}):
        heavy, plain = (pick(csat, size=size, weight=w) for w in ("emphasis", "vanilla"))
        if heavy and plain:
            d = difference(robust(heavy), robust(plain))
            yield (f"(f) {heavy[0]['data'].replace('->', ' to ')}, {size} hardest classes: emphasis beats vanilla",
                   "emphasis above vanilla's 8" if abs(heavy[0]["share"] - 0.1) < 1e-6 else "emphasis above vanilla",
                   f"{percent(robust(heavy))}, {percent(robust(plain))}: {points(*d)}{seeds(heavy, plain)}", verdict(*d))


def claims(groups, ranks):
    """Rows (claim, the paper's numbers, ours, verdict) by group: {(data, how): rows}. groups: {(data, how): records of report.py};
    ranks: the contents of rank.json."""
    tables = {}
    for (data, how), runs in sorted(groups.items(), key=lambda group: "->" in group[0][0]):  # the transfer last
        if paper.base(data) not in ("cifar10", "cifar100->cifar10"):
            continue
        ranking = next((r for r in ranks if r["fingerprint"]["name"] == data), None)
        runs = [r for r in runs if r["attack"] == "pgd" and (r["weight"] == "vanilla" or r["transfer"])]
        none, full = (pick(runs, split=split, transfer=False) for split in ("none", "full"))
        rows = [*single_class(runs, none, ranking), *examples(runs, none, full)] if "->" not in data else []
        rows += clean_against_robust(runs, none, full) if "->" not in data else transfers(runs)
        if rows:
            tables[data, how] = rows
    return tables


def speed(results):
    """Rows of the cost of a training step from <results>/bench/*.json (bench.py --json), by setting: {setting: rows}. Several
    runs of a setting: medians, and the range of the ratios."""
    groups, tables = {}, {}
    for path in sorted(Path(results).glob("bench/*.json")):
        r = common.read_json(path)
        if not isinstance(r, dict) or not {"setting", "steps"} <= set(r):
            raise UserError(f"{path} was not written by bench.py --json: move it away")
        groups.setdefault(r["setting"], []).append({(s["step"], s["precision"], s["compile"]): s for s in r["steps"]})
    for setting, runs in groups.items():
        rows = []
        for key, first in runs[0].items():
            same = [r[key] for r in runs if key in r]
            of = lambda values: f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
            faster = {name: [s["faster_than"][name] for s in same if name in s["faster_than"]] for name in SPEED_PEERS}
            rows.append((f"{key[0]}{', --compile' * key[2]}".replace("|", "\\|"), key[1],
                         f"{statistics.median(s['images_per_s'] for s in same):.1f}", of([s["time_to_full"] for s in same]),
                         f"{first['model']:.2f}", *(of(values) if values else "-" for values in faster.values())))
        tables[f"{setting}; {len(runs)} run{'s' * (len(runs) > 1)}"] = rows
    return tables
