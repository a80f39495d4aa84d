"""Tests the paper's claims against our runs, and bf16 against float32. report.py shows the result.

Each claim becomes a row with the paper's numbers, ours, and a verdict. It "holds" when the 95 % interval
(stats.contrast: noise of the test examples and of training) lies where the claim puts it, is "contradicted"
when it lies outside, and is "open" otherwise. It also stays open if any of the settings that it compares was
trained with one seed only.
"""
import collections
import json
import statistics
from dataclasses import replace

import numpy

import paper
import results
from paper import theirs
from results import grouped, pick
from stats import accuracy_on, contrast, mean, noise, points, spearman

# {--weight: its name in tables} of Fig. 2: the authors' config has the first, the paper's text the second.
FIG2 = {"balanced": "w_A = \\|B\\|/\\|A\\|", "vanilla": "w_A = 1"}
MARGIN = 3  # points that count as no difference ("competitive", "as robust as"); set before the runs


def verdict(rule, interval, *sides):
    """The verdict on an interval (value, low, high) that should lie "above" 0, "within" -MARGIN to MARGIN, or
    "not below" -MARGIN, as the rule says. `sides`: the runs on each side, which must be trainings with two
    seeds or more."""
    _, low, high = interval
    holds = {"above": low > 0, "within": -MARGIN < low and high < MARGIN, "not below": low > -MARGIN}[rule]
    fails = {"above": high < 0, "within": low > MARGIN or high < -MARGIN, "not below": high < -MARGIN}[rule]
    if min(len(grouped(side, "training_seed")) for side in sides) < 2:
        return "open (one seed)"
    return "holds" if holds else "contradicted" if fails else "open"


def number(figure, data, line, share, kind="robust"):
    """The number that the paper gives, as text, or "-"."""
    found = theirs(figure, data, line, share, kind)
    return "-" if found is None else f"{found:.1f}"


def shares(runs):
    """{|A|/N: {order: runs}} of ESAT runs, with ascending |A|/N."""
    found = {}
    for r in sorted(runs, key=lambda r: r.share):
        found.setdefault(round(r.share, 3), {}).setdefault(r.order, []).append(r)
    return found


def single_class_claims(runs, none, weight):
    """Claims (a) and (b): how robust the classes become that were never attacked, when one other class is,
    with --weight."""
    single = {c: rs for c, rs in single_classes(pick(runs, weight=weight)).items() if mean(rs, "B_val")}
    if not single or not none:
        return
    classes = [c for c, a in none[0].accuracy["classes"].items() if a["robust"]["n"]]
    bars = paper.published()["fig2"]["robust_B_val"]
    others = {c: [k for k in classes if k != c] for c in single}
    gain = {c: contrast([(1, rs, others[c]), (-1, none, others[c])], runs) for c, rs in single.items()}
    verdicts = collections.Counter(verdict("above", gain[c], rs, none) for c, rs in single.items())
    low, high = (f(bars, key=bars.get) for f in (min, max))
    ends = dict.fromkeys(f(gain, key=lambda c: gain[c][0]) for f in (min, max))  # one, if there is one class
    yield ("(a) CSAT on a single class makes B_val robust (against no AT, on the same classes), "
           f"{FIG2[weight]}",
           f"{bars[low]:+.1f} ({low}) to {bars[high]:+.1f} ({high})",
           " to ".join(f"{points(*gain[c])} ({c})" for c in ends),
           ", ".join(f"{v}: {n} class{'es' * (n > 1)}" for v, n in verdicts.items()))
    order = paper.published()["class_order_hardest_first"]["cifar10"]
    pair = [next((c for c in single if paper.NAMES.get(c, c) == name), None)
            for name in (order[0], order[-1])]
    if all(pair) and (rest := [c for c in classes if c not in pair]):
        # On the same classes, those that neither run attacked: with its own B_val, each would also be tested
        # on the other's class, and the easiest class is easier to make robust than the hardest.
        d = contrast([(1, single[pair[0]], rest), (-1, single[pair[1]], rest)], runs)
        theirs_on_rest = [statistics.fmean(paper.fig2(a, c) for c in rest) for a in pair]
        ours = [statistics.fmean(accuracy_on(r, rest) for r in single[c]) for c in pair]
        yield (f"(b) the hardest class ({pair[0]}) gives the {len(rest)} classes that are in "
               f"neither A more than the easiest ({pair[1]}), {FIG2[weight]}",
               "{:.1f}, {:.1f}: {:+.1f}".format(*theirs_on_rest, theirs_on_rest[0] - theirs_on_rest[1]),
               f"{ours[0]:.1f}, {ours[1]:.1f}: {points(*d)}", verdict("above", d, *(single[c] for c in pair)))


def single_classes(runs):
    """{class: runs} of the CSAT runs whose A is this single named class."""
    found = {}
    for r in runs:
        if r.order == "named" and len(r.A_classes) == 1:
            found.setdefault(r.A_classes[0], []).append(r)
    return found


def effects_of_A(cells):
    """How many points more than the mean class each class as A gives to any other: {A: points}.

    cells: {(A, tested class): robust accuracy (percent)}. By least squares each cell is the sum of an effect
    of A and one of the tested class. (The mean of a row alone also tells which class is missing from B.)
    """
    attacked, tested = (sorted({pair[i] for pair in cells}) for i in (0, 1))
    design = [[*(a == k for k in attacked), *(c == k for k in tested)] for a, c in cells]
    found = numpy.linalg.lstsq(numpy.array(design, float), list(cells.values()), rcond=None)[0]
    return dict(zip(attacked, found[:len(attacked)] - found[:len(attacked)].mean()))


def likeness(classes, single):
    """How our Fig. 2, {class A: runs}, goes with the paper's, as sentences with Spearman's correlations.
    Empty if the paper does not have these classes, or fewer than three of them have runs."""
    bars = [(mean(rs, "B_val")[0], paper.fig2(a)) for a, rs in single.items() if paper.fig2(a) is not None]
    if len(bars) < 3:
        return ""
    cells = [(a, c) for a, rs in single.items() for c in classes
             if c != a and rs[0].accuracy["classes"][c]["robust"]["n"]]
    ours = effects_of_A({(a, c): statistics.fmean(accuracy_on(r, [c]) for r in single[a]) for a, c in cells})
    papers = effects_of_A({pair: paper.fig2(*pair) for pair in cells})
    ends = [f"{of[a]:+.1f} ({a})" for of in (ours, papers) for a in (f(of, key=of.get) for f in (min, max))]
    return (f"Spearman's correlation with the paper's numbers: of B_val {spearman(*zip(*bars)):.2f} "
            f"({len(bars)} classes), of what A gives to any other class "
            f"{spearman(list(ours.values()), list(papers.values())):.2f}. The latter is the effect of A when "
            f"the {len(cells)} cells off the diagonal are fitted by one of A and one of the tested class. "
            f"It goes from {ends[0]} to {ends[1]} points, in the paper from {ends[2]} to {ends[3]}.")


def two(one, other, part="all", kind="robust"):
    """Two mean accuracies (percent) as text."""
    return f"{mean(one, part, kind)[0]:.1f}, {mean(other, part, kind)[0]:.1f}"


def examples(runs, none, full, data):
    """Claims (c), (d) and (h), on ESAT."""
    at = shares([r for r in runs if r.split == "esat" and r.metric == "entropy"])
    half = at.get(0.5, {}).get("hardest")
    if half and none and full:
        gain = contrast([(1, full, None), (-1, none, None)], runs)
        part = contrast([(1, half, None), (-1, none, None)], runs)[0] / gain[0] if gain[1] > 0 else None
        if part is not None:  # the interval of a ratio of contrasts, by the delta method
            _, low, high = contrast([(1, half, None), (-part, full, None), (part - 1, none, None)], runs)
            least, most = part + low / gain[0], part + high / gain[0]
            said = f"{100 * part:.0f} % [{100 * least:.0f}, {100 * most:.0f}]"
        over = contrast([(1, half, None), (-0.9, full, None), (-0.1, none, None)], runs)
        known = [theirs("fig6", data, line, 0.5, "robust") for line in ("hardest", "AT")]
        yield ("(c) ESAT on the hardest half recovers at least 90 % of what AT gains in robustness",
               f"{known[0]:.1f} of {known[1]:.1f}: {100 * known[0] / known[1]:.0f} %" if all(known) else "-",
               f"{two(half, full)}: {said}" if part is not None else "AT gains nothing that is sure",
               verdict("above", over, half, none, full) if part is not None else "open")
    for share, orders in list(at.items())[:1]:
        hard, easy, chance = (orders.get(o) for o in ("hardest", "easiest", "random"))
        told = [number("fig6", data, line, share) for line in ("hardest", "easiest", "random")]
        if hard and easy:
            d = contrast([(1, hard, None), (-1, easy, None)], runs)
            yield (f"(d) at \\|A\\|/N = {share:g} hardest beats easiest", f"{told[0]}, {told[1]}",
                   f"{two(hard, easy)}: {points(*d)}", verdict("above", d, hard, easy))
        if hard and chance:
            e = contrast([(1, chance, None), (-1, hard, None)], runs)
            yield (f"(d) at \\|A\\|/N = {share:g} random is competitive: within {MARGIN} points of hardest",
                   f"{told[2]}, {told[0]}", f"{two(chance, hard)}: {points(*e)}",
                   verdict("within", e, chance, hard))
    both = [orders for orders in at.values() if {"hardest", "easiest"} <= set(orders)]
    if len(both) > 1:
        small, large = both[0], both[-1]
        sides = [small["hardest"], small["easiest"], large["hardest"], large["easiest"]]
        d = contrast([(w, rs, None) for w, rs in zip((1, -1, -1, 1), sides)], runs)
        a, b = (rs[0].share for rs in sides[::2])
        told = [[theirs("fig6", data, line, s, "robust") for line in ("hardest", "easiest")] for s in (a, b)]
        yield (f"(h) the gain of hard over easy shrinks as \\|A\\| grows ({a:.1f} against {b:.1f})",
               ", ".join(f"{x - y:+.1f}" for x, y in told) if all(map(all, told)) else "-",
               f"{mean(sides[0])[0] - mean(sides[1])[0]:+.1f}, {mean(sides[2])[0] - mean(sides[3])[0]:+.1f}: "
               f"{points(*d)}", verdict("above", d, *sides))


def clean_against_robust(runs, none, full, data):
    """Claim (e): AT, the end at which all is attacked, costs clean accuracy."""
    if none and full:
        d = contrast([(1, none, None), (-1, full, None)], runs, "clean")
        told = [number("fig6", data, "hardest", s, "clean") for s in (0.1, 0.9)]
        yield ("(e) AT costs clean accuracy (no AT minus AT, clean)",
               f"of ESAT hardest alone: {told[0]} (10 %), {told[1]} (90 %)",
               f"{two(none, full, kind='clean')}: {points(*d)}", verdict("above", d, none, full))


def transfers(runs, data):
    """Claims (f), on the weights in S-CSAT, and (g), on S-ESAT with 30 % against full AT."""
    csat = pick(runs, split="csat", order="hardest", metric="entropy")
    for (share,), found in sorted(grouped(csat, "share").items()):
        by = {w: pick(found, weight=w) for w in ("emphasis", "balanced", "vanilla")}
        for more, less in (("emphasis", "balanced"), ("balanced", "vanilla")):
            if by[more] and by[less]:
                d = contrast([(1, by[more], None), (-1, by[less], None)], runs)
                yield (f"(f) {found[0].size} hardest classes: {more} transfers more robustness than {less}",
                       f"{number('fig7', data, more, share)}, {number('fig7', data, less, share)}",
                       f"{two(by[more], by[less])}: {points(*d)}", verdict("above", d, by[more], by[less]))
    full = pick(runs, split="full")
    part = [r for r in pick(runs, split="esat", order="hardest", weight="emphasis", metric="entropy")
            if abs(r.share - 0.3) < 0.004]
    if part and full:
        d = contrast([(1, part, None), (-1, full, None)], runs)
        yield (f"(g) S-ESAT on the hardest 30 % transfers as robustly as AT (at most {MARGIN} points less)",
               f"{number('fig8', data, 'hardest', 0.3)}, {number('fig8', data, 'AT', 1)}",
               f"{two(part, full)}: {points(*d)}", verdict("not below", d, part, full))


def claims(runs):
    """{(data, group): (rows (claim, paper, ours, verdict), Noise)} of the runs on CIFAR-10 or its smaller
    part, and of the transfers from CIFAR-100 to it."""
    tables = {}
    transfers_last = sorted(grouped(runs, "data", "group").items(), key=lambda item: "->" in item[0][0])
    for (data, group), all_ in transfers_last:
        told = paper.base(data)
        if told not in ("cifar10", "cifar100->cifar10"):
            continue
        mine = [r for r in all_ if r.attack == "pgd"
                and (r.transfer or r.weight == "vanilla" or r.order == "named" and r.weight in FIG2)]
        none, full = pick(mine, split="none"), pick(mine, split="full")
        if "->" in data:
            rows = list(transfers(mine, told))
        else:
            rows = [*(row for weight in FIG2 for row in single_class_claims(mine, none, weight)),
                    *examples(mine, none, full, told),
                    *clean_against_robust(mine, none, full, told)]
        if not paper.comparable(data, all_[0].setting):
            rows = [(claim, "-", ours, said) for claim, _, ours, said in rows]
        if rows:
            tables[data, group] = sorted(rows, key=lambda row: row[0][:3]), noise(mine)
    return tables


def precisions(runs):
    """{(data, setting as text): rows (run, seeds, kind, float32, bf16, bf16 minus float32)} of the runs that
    were trained in both precisions."""
    tables = {}
    both = [replace(r, group=r.precision) for r in runs]
    for (data, _), same in by_setting(both).items():
        rows = []
        for pair in grouped([replace(r, group="") for r in same], "kind").values():
            full, half = (pick(pair, precision=p) for p in ("float32", "bf16"))
            if not full or not half:
                continue
            one = pair[0]
            name = {"none": "no AT", "full": "AT"}.get(one.split, f"{one.split} {one.order} {one.share:.2g}")
            for kind in ("robust", "clean"):
                d = contrast([(1, half, None), (-1, full, None)], same, kind)
                rows.append((name, f"{len(full)} and {len(half)}", kind,
                             *(f"{mean(rs, 'all', kind)[0]:.1f}" for rs in (full, half)), points(*d)))
        if rows:
            tables[data, results.described(same[0])] = rows
    return tables


def by_setting(runs):
    """{(data, the setting as JSON): runs}."""
    found = {}
    for r in runs:
        found.setdefault((r.data, json.dumps(r.setting, sort_keys=True)), []).append(r)
    return found
