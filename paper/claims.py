"""Tests the paper's claims against our runs.

Each claim becomes a row with the paper's numbers, ours, and a verdict. It "holds" when the 95 % interval
(stats.contrast: noise of the test examples and of training) lies where the claim puts it, is "contradicted"
when it lies outside, and is "open" otherwise. It also stays open if any of the settings that it compares was
trained with one seed only.
"""
import collections
import math
import statistics

import numpy

from paper.published import (NAMES, comparable_data, fig2_accuracy, numbers,
                             published_accuracy)
from paper.results import counted, grouped, pick
from paper.stats import accuracy_on, contrast, mean, noise, points, seeds, spearman

# {--weight: its name in tables} of Fig. 2: the authors' config has the first, the paper's text the second.
FIG2 = {"balanced": "w_A = \\|B\\|/\\|A\\|", "vanilla": "w_A = 1"}
MARGIN = 3  # points that count as no difference ("competitive", "as robust as"); set before the runs


def verdict(rule, interval, *sides):
    """The verdict on an interval (value, low, high) that should lie "above" 0, "within" -MARGIN to MARGIN, or
    "not below" -MARGIN, as the rule says. sides: the runs on each side, each of which needs two seeds."""
    _, low, high = interval
    least, most = {"above": (0, math.inf), "within": (-MARGIN, MARGIN),
                   "not below": (-MARGIN, math.inf)}[rule]
    if min(map(seeds, sides)) < 2:
        return "open (one seed)"
    if least < low and high < most:
        return "holds"
    return "contradicted" if high < least or low > most else "open"


def compare(claim, published, one, other, pool, rule, kind="robust"):
    """The row of a claim on the accuracy of `one` minus that of `other`."""
    d = contrast([(1, one, None), (-1, other, None)], pool, kind)
    return claim, published, f"{means(one, other, kind)}: {points(*d)}", verdict(rule, d, one, other)


def means(one, other, kind="robust"):
    """Two mean accuracies (percent) as text."""
    return f"{mean(one, 'all', kind)[0]:.1f}, {mean(other, 'all', kind)[0]:.1f}"


def published_pair(figure, data, *points_of_lines, kind="robust"):
    """The paper's numbers at each (line, |A|/N), as text; "-" for one that it does not give."""
    values = [published_accuracy(figure, data, line, share, kind) for line, share in points_of_lines]
    return ", ".join("-" if value is None else f"{value:.1f}" for value in values)


def extremes(values):
    """The keys with the least and the greatest value; one, if they are the same."""
    return list(dict.fromkeys([min(values, key=values.get), max(values, key=values.get)]))


# --- Fig. 2: CSAT on a single class -------------------------------------------------------------------------

def single_classes(runs):
    """{class: runs} of the CSAT runs whose A is this single named class."""
    single = {}
    for r in pick(runs, order="named"):
        if len(r.A_classes) == 1:
            single.setdefault(r.A_classes[0], []).append(r)
    return single


def single_class_claims(runs, none, weight):
    """Claims (a) and (b): how robust the classes become that were never attacked, when one other class is,
    with --weight."""
    single = {c: rs for c, rs in single_classes(pick(runs, weight=weight)).items() if mean(rs, "B_val")}
    if not single or not none:
        return
    classes = [c for c, a in none[0].accuracy["classes"].items() if a["robust"]["n"]]
    others = {c: [k for k in classes if k != c] for c in single}
    gain = {c: contrast([(1, rs, others[c]), (-1, none, others[c])], runs) for c, rs in single.items()}
    verdicts = collections.Counter(verdict("above", gain[c], rs, none) for c, rs in single.items())
    bars = numbers()["fig2"]["robust_B_val"]
    yield ("(a) CSAT on a single class makes B_val robust (against no AT, on the same classes), "
           f"{FIG2[weight]}",
           " to ".join(f"{bars[c]:+.1f} ({c})" for c in extremes(bars)),
           " to ".join(f"{points(*gain[c])} ({c})" for c in extremes({c: d[0] for c, d in gain.items()})),
           ", ".join(f"{v}: {counted(n, 'class')}" for v, n in verdicts.items()))
    order = numbers()["class_order_hardest_first"]["cifar10"]
    hardest, easiest = (next((c for c in single if NAMES.get(c, c) == name), None)
                        for name in (order[0], order[-1]))
    # On the same classes, those that neither run attacked: with its own B_val, each would also be tested on
    # the other's class, and the easiest class is easier to make robust than the hardest.
    rest = [c for c in classes if c not in (hardest, easiest)]
    if hardest and easiest and rest:
        d = contrast([(1, single[hardest], rest), (-1, single[easiest], rest)], runs)
        published = [statistics.fmean(fig2_accuracy(a, c) for c in rest) for a in (hardest, easiest)]
        ours = [statistics.fmean(accuracy_on(r, rest) for r in single[a]) for a in (hardest, easiest)]
        yield (f"(b) the hardest class ({hardest}) gives the {len(rest)} classes that are in "
               f"neither A more than the easiest ({easiest}), {FIG2[weight]}",
               f"{published[0]:.1f}, {published[1]:.1f}: {published[0] - published[1]:+.1f}",
               f"{ours[0]:.1f}, {ours[1]:.1f}: {points(*d)}",
               verdict("above", d, single[hardest], single[easiest]))


def effects_of_A(cells):
    """How many points more than the mean class each class as A gives to any other: {A: points}.

    cells: {(A, tested class): robust accuracy (percent)}. By least squares, each cell is the sum of an effect
    of A and one of the tested class. (The mean of a row also depends on which class is missing from B.)
    """
    attacked, tested = (sorted({pair[i] for pair in cells}) for i in (0, 1))
    design = [[*(a == k for k in attacked), *(c == k for k in tested)] for a, c in cells]
    effects = numpy.linalg.lstsq(numpy.array(design, float), list(cells.values()), rcond=None)[0]
    return dict(zip(attacked, effects[:len(attacked)] - effects[:len(attacked)].mean()))


def agreement_with_fig2(classes, single):
    """How well our Fig. 2, {class A: runs}, agrees with the paper's, as sentences with Spearman's
    correlations. Empty if the paper does not have these classes, or fewer than three of them have runs."""
    bars = [(mean(rs, "B_val")[0], fig2_accuracy(a, "B_val")) for a, rs in single.items()
            if fig2_accuracy(a, "B_val") is not None]
    if len(bars) < 3:
        return ""
    cells = [(a, c) for a, rs in single.items() for c in classes
             if c != a and rs[0].accuracy["classes"][c]["robust"]["n"]]
    ours = effects_of_A({(a, c): statistics.fmean(accuracy_on(r, [c]) for r in single[a]) for a, c in cells})
    published = effects_of_A({(a, c): fig2_accuracy(a, c) for a, c in cells})
    our_range, published_range = (" to ".join(f"{effects[a]:+.1f} ({a})" for a in extremes(effects))
                                  for effects in (ours, published))
    return (f"Spearman's correlation with the paper's numbers: of B_val {spearman(*zip(*bars)):.2f} "
            f"({len(bars)} classes), of what A gives to any other class "
            f"{spearman(list(ours.values()), list(published.values())):.2f}. The latter is the effect of A "
            f"when the {len(cells)} cells off the diagonal are fitted by one of A and one of the tested "
            f"class. It goes from {our_range} points, in the paper from {published_range}.")


def class_order_correlation(ranking, metric):
    """Spearman's correlation of a ranking's class order by a metric with the paper's (Fig. 4, 10, 11):
    (correlation, number of classes), or None if the paper lists fewer than three of the classes."""
    published = numbers()["class_order_hardest_first"].get(ranking["fingerprint"]["name"], [])
    position = ranking["fingerprint"]["classes"].index  # breaks ties
    rows = sorted(ranking["classes_hardest_first"], key=lambda r: (-r[metric], position(r["class"])))
    names = [NAMES.get(r["class"], r["class"]) for r in rows]
    listed = [name for name in names if name in published]
    if len(listed) < 3:
        return None
    return spearman(range(len(listed)), [published.index(name) for name in listed]), len(listed)


# --- the other claims ---------------------------------------------------------------------------------------

def recovery_claim(runs, none, half, full, data):
    """Claim (c): how much of AT's gain in robustness ESAT on the hardest half recovers."""
    values = [published_accuracy("fig6", data, line, 0.5, "robust") for line in ("hardest", "AT")]
    gain = contrast([(1, full, None), (-1, none, None)], runs)
    published, ours, decision = "-", "AT gains nothing that is sure", "open"
    if all(values):
        published = f"{values[0]:.1f} of {values[1]:.1f}: {100 * values[0] / values[1]:.0f} %"
    if gain[1] > 0:  # the interval of a ratio of contrasts, by the delta method
        part = contrast([(1, half, None), (-1, none, None)], runs)[0] / gain[0]
        _, low, high = contrast([(1, half, None), (-part, full, None), (part - 1, none, None)], runs)
        least, most = part + low / gain[0], part + high / gain[0]
        ours = f"{means(half, full)}: {100 * part:.0f} % [{100 * least:.0f}, {100 * most:.0f}]"
        over = contrast([(1, half, None), (-0.9, full, None), (-0.1, none, None)], runs)
        decision = verdict("above", over, half, none, full)
    return ("(c) ESAT on the hardest half recovers at least 90 % of what AT gains in robustness",
            published, ours, decision)


def shrinking_claim(runs, small, large, data):
    """Claim (h): the gain of hard over easy at two sizes of A. small, large: {order: runs}."""
    sides = [small["hardest"], small["easiest"], large["hardest"], large["easiest"]]
    d = contrast([(weight, side, None) for weight, side in zip((1, -1, -1, 1), sides)], runs)
    a, b = sides[0][0].share, sides[2][0].share
    values = [published_accuracy("fig6", data, line, s, "robust") for s in (a, b)
              for line in ("hardest", "easiest")]
    published = f"{values[0] - values[1]:+.1f}, {values[2] - values[3]:+.1f}" if all(values) else "-"
    ours = [mean(side)[0] for side in sides]
    return (f"(h) the gain of hard over easy shrinks as \\|A\\| grows ({a:.1f} against {b:.1f})", published,
            f"{ours[0] - ours[1]:+.1f}, {ours[2] - ours[3]:+.1f}: {points(*d)}", verdict("above", d, *sides))


def esat_claims(runs, none, full, data):
    """Claims (c), (d) and (h), on ESAT."""
    by_share = {}
    for r in sorted(pick(runs, split="esat", metric="entropy"), key=lambda r: r.share):
        by_share.setdefault(round(r.share, 3), {}).setdefault(r.order, []).append(r)
    half = by_share.get(0.5, {}).get("hardest")
    if half and none and full:
        yield recovery_claim(runs, none, half, full, data)
    for share, orders in list(by_share.items())[:1]:
        hard, easy, chance = (orders.get(order) for order in ("hardest", "easiest", "random"))
        if hard and easy:
            yield compare(f"(d) at \\|A\\|/N = {share:g} hardest beats easiest",
                          published_pair("fig6", data, ("hardest", share), ("easiest", share)),
                          hard, easy, runs, "above")
        if hard and chance:
            yield compare(f"(d) at \\|A\\|/N = {share:g} random is competitive: within {MARGIN} points of "
                          "hardest", published_pair("fig6", data, ("random", share), ("hardest", share)),
                          chance, hard, runs, "within")
    both = [orders for orders in by_share.values() if {"hardest", "easiest"} <= set(orders)]
    if len(both) > 1:
        yield shrinking_claim(runs, both[0], both[-1], data)


def clean_claim(runs, none, full, data):
    """Claim (e): AT, the end at which everything is attacked, costs clean accuracy."""
    if none and full:
        low, high = (published_pair("fig6", data, ("hardest", s), kind="clean") for s in (0.1, 0.9))
        yield compare("(e) AT costs clean accuracy (no AT minus AT, clean)",
                      f"of ESAT hardest alone: {low} (10 %), {high} (90 %)",
                      none, full, runs, "above", "clean")


def transfer_claims(runs, data):
    """Claims (f), on the weights in S-CSAT, and (g), on S-ESAT with 30 % against full AT."""
    csat = pick(runs, split="csat", order="hardest", metric="entropy")
    for (share,), same_size in sorted(grouped(csat, "share").items()):
        for more, less in (("emphasis", "balanced"), ("balanced", "vanilla")):
            heavier, lighter = pick(same_size, weight=more), pick(same_size, weight=less)
            if heavier and lighter:
                yield compare(f"(f) {same_size[0].size} hardest classes: {more} transfers more robustness "
                              f"than {less}", published_pair("fig7", data, (more, share), (less, share)),
                              heavier, lighter, runs, "above")
    full = pick(runs, split="full")
    part = [r for r in pick(runs, split="esat", order="hardest", weight="emphasis", metric="entropy")
            if abs(r.share - 0.3) < 0.004]
    if part and full:
        yield compare(f"(g) S-ESAT on the hardest 30 % transfers as robustly as AT (at most {MARGIN} points "
                      "less)", published_pair("fig8", data, ("hardest", 0.3), ("AT", 1)),
                      part, full, runs, "not below")


def claims(runs):
    """{(data, group): (rows (claim, paper, ours, verdict), Noise)} of the runs on CIFAR-10 and of the
    transfers from CIFAR-100 to it."""
    tables = {}
    transfers_last = sorted(grouped(runs, "data", "group").items(), key=lambda item: "->" in item[0][0])
    for (data, group), in_group in transfers_last:
        if data not in ("cifar10", "cifar100->cifar10"):
            continue
        pool = [r for r in pick(in_group, attack="pgd")
                if r.transfer or r.weight == "vanilla" or r.order == "named" and r.weight in FIG2]
        none, full = pick(pool, split="none"), pick(pool, split="full")
        if "->" in data:
            rows = list(transfer_claims(pool, data))
        else:
            rows = [*(row for weight in FIG2 for row in single_class_claims(pool, none, weight)),
                    *esat_claims(pool, none, full, data), *clean_claim(pool, none, full, data)]
        if not comparable_data(data, in_group[0].setting):
            rows = [(claim, "-", ours, decision) for claim, _, ours, decision in rows]
        if rows:
            tables[data, group] = sorted(rows, key=lambda row: row[0][:3]), noise(pool)
    return tables
