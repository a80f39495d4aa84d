"""Tests the paper's claims against our runs. A claim "holds" if the 95 % interval of stats.contrast lies
where the claim puts it, is "contradicted" if it lies outside, and is otherwise "open". "(one seed)" stands
beside the verdict if any setting that it compares has only one training seed. Such a claim is open unless
other settings of its group show the noise of training."""
import collections
import math

import numpy
from scipy.stats import spearmanr

from paper.published import NAMES, comparable_dataset, fig2_accuracy, numbers, published_accuracy
from paper.results import grouped, pick
from paper.stats import (Noise, accuracy_on, contrast, difference, estimate, interval_text, mean_sd,
                         seed_count)

# {--weight: its name in tables} of Fig. 2: the authors' config has the first, the paper's text the second.
FIG2 = {"balanced": "w_A = \\|B\\|/\\|A\\|", "vanilla": "w_A = 1"}
MARGIN = 3  # points that count as no difference ("competitive", "as robust as"); set before the runs


def verdict(rule, interval, sides, *pools, kind="robust", classes=None):
    """The verdict on an interval (value, low, high) that should lie "above" 0, "within" -MARGIN to MARGIN,
    "not below" -MARGIN or "below" -MARGIN, as the rule says. sides: the runs on each side. pools: the runs
    whose Noise, of this kind and on these classes, is in the interval. Without a typical Noise the interval
    is too narrow, and sides with one seed decide nothing."""
    _, low, high = interval
    least, most = {"above": (0, math.inf), "within": (-MARGIN, MARGIN), "not below": (-MARGIN, math.inf),
                   "below": (-math.inf, -MARGIN)}[rule]
    if least < low and high < most:
        decision = "holds"
    else:
        decision = "contradicted" if high < least or low > most else "open"
    if min(map(seed_count, sides)) > 1:
        return decision
    if not all(Noise(pool, kind, classes).is_typical for pool in pools):
        decision = "open"
    return f"{decision} (one seed)"


def compare(claim, published, runs, reference, noise_runs, rule, kind="robust", classes=None):
    """The row of a claim on the accuracy of `runs` minus that of `reference`, on `classes` (None: all)."""
    gain = contrast([(1, runs, classes), (-1, reference, classes)], noise_runs, kind)
    means = [estimate([(1, side, classes)], [], kind)[0] for side in (runs, reference)]
    ours = f"{means[0]:.1f}, {means[1]:.1f}: {interval_text(gain)}"
    decision = verdict(rule, gain, (runs, reference), noise_runs, kind=kind, classes=classes)
    return claim, published, ours, decision


def published_text(figure_name, dataset, share, *lines, kind="robust"):
    """The paper's accuracies on lines of a figure at |A|/N = share as text; "-" for one that it lacks."""
    values = [published_accuracy(figure_name, dataset, line, share, kind) for line in lines]
    return ", ".join("-" if value is None else f"{value:.1f}" for value in values)


def extremes(values, text="{:+.1f}".format):
    """The least and the greatest of {class: value} as text; one, if they are the same."""
    names = dict.fromkeys([min(values, key=values.get), max(values, key=values.get)])
    return " to ".join(f"{text(values[c])} ({c})" for c in names)


def single_classes(runs):
    """{class: runs} of the CSAT runs whose A is this single named class."""
    named = grouped(pick(runs, order="named"), "A_classes")
    return {A_classes[0]: class_runs for (A_classes,), class_runs in named.items() if len(A_classes) == 1}


def single_class_claims(runs, no_at, weight):
    """Claims (a) and (b), on Fig. 2: how robust attacks on a single class make the others, by --weight."""
    single = {c: rs for c, rs in single_classes(pick(runs, weight=weight)).items() if mean_sd(rs, "B_val")}
    if not single or not no_at:
        return
    classes = [c for c, a in no_at[0].accuracy["classes"].items() if a["robust"]["n"]]
    others = {c: [k for k in classes if k != c] for c in single}
    gains = {c: contrast([(1, rs, others[c]), (-1, no_at, others[c])], runs) for c, rs in single.items()}
    verdicts = collections.Counter(verdict("above", gains[c], (rs, no_at), runs, classes=others[c])
                                   for c, rs in single.items())
    yield ("(a) CSAT on a single class makes B_val robust (against no AT, on the same classes), "
           f"{FIG2[weight]}",
           extremes(numbers()["fig2"]["robust_B_val"]), extremes(gains, interval_text),
           ", ".join(f"{v}: {n} of {len(single)} classes" for v, n in verdicts.items()))
    papers_order = numbers()["class_order_hardest_first"]["cifar10"]
    our_names = {NAMES.get(c, c): c for c in single}
    hardest, easiest = extreme_classes = [our_names.get(papers_order[0]), our_names.get(papers_order[-1])]
    # On the same classes, those that neither run attacked: with its own B_val, each would also be tested on
    # the other's class, and the easiest class is easier to make robust than the hardest.
    in_neither = [c for c in classes if c not in extreme_classes]
    if all(extreme_classes) and in_neither:
        published = [numpy.mean([fig2_accuracy(a, c) for c in in_neither]) for a in extreme_classes]
        yield compare(f"(b) the hardest class ({hardest}) gives the {len(in_neither)} classes that are in "
                      f"neither A more than the easiest ({easiest}), {FIG2[weight]}",
                      f"{published[0]:.1f}, {published[1]:.1f}: {published[0] - published[1]:+.1f}",
                      single[hardest], single[easiest], runs, "above", classes=in_neither)


def effects_of_A(cells):
    """How much robustness each class, as A, gives to any other, in points above the mean: {A: points}. Least
    squares fits each of the cells {(A, tested class): robust accuracy (percent)} by an effect of A plus an
    effect of the tested class. (The mean of a row also depends on which class is missing from B.)"""
    attacked, tested = (sorted({pair[i] for pair in cells}) for i in (0, 1))
    design = [[*(a == k for k in attacked), *(c == k for k in tested)] for a, c in cells]
    effects = numpy.linalg.lstsq(numpy.array(design, float), list(cells.values()), rcond=None)[0]
    return dict(zip(attacked, effects[:len(attacked)] - effects[:len(attacked)].mean()))


def agreement_with_fig2(classes, single):
    """How well our Fig. 2, {class A: runs}, agrees with the paper's, as sentences with Spearman's
    correlations. Empty if the paper does not have these classes, or fewer than three of them have runs."""
    bars = [(mean_sd(rs, "B_val")[0], fig2_accuracy(a, "B_val")) for a, rs in single.items()
            if fig2_accuracy(a, "B_val") is not None and mean_sd(rs, "B_val")]
    if len(bars) < 3:
        return ""
    cells = [(a, c) for a, rs in single.items() for c in classes
             if c != a and rs[0].accuracy["classes"][c]["robust"]["n"]]
    ours = effects_of_A({(a, c): numpy.mean([accuracy_on(r, [c]) for r in single[a]]) for a, c in cells})
    published = effects_of_A({(a, c): fig2_accuracy(a, c) for a, c in cells})
    of_bars = spearmanr(*zip(*bars)).statistic
    of_effects = spearmanr(list(ours.values()), list(published.values())).statistic
    return (f"Spearman's correlation with the paper's numbers: of B_val {of_bars:.2f} ({len(bars)} classes), "
            f"of what A gives to any other class {of_effects:.2f}. For the latter, a model fits the "
            f"{len(cells)} cells off the diagonal by an effect of A plus an effect of the tested class. "
            f"The effect of A goes from {extremes(ours)} points, in the paper from {extremes(published)}.")


def class_order_correlation(ranking, metric):
    """Spearman's correlation of a ranking's class order by a metric with the paper's (Fig. 4, 10, 11):
    (correlation, number of classes). None if all classes have one score, or the paper lists fewer than three.
    """
    published = numbers()["class_order_hardest_first"].get(ranking["fingerprint"]["name"], [])
    position = ranking["fingerprint"]["classes"].index  # breaks ties
    rows = sorted(ranking["classes_hardest_first"], key=lambda r: (-r[metric], position(r["class"])))
    names = [NAMES.get(r["class"], r["class"]) for r in rows]
    ranks = [published.index(name) for name in names if name in published]
    if len(ranks) < 3 or len({r[metric] for r in rows}) < 2:
        return None
    return spearmanr(range(len(ranks)), ranks).statistic, len(ranks)


def recovery_claim(runs, no_at, half, at, dataset):
    """Claim (c): how much of AT's gain in robustness ESAT on the hardest half recovers."""
    ours, decision = "no significant gain of AT", "open"
    published = "-"
    papers_half, papers_at = (published_accuracy("fig6", dataset, line, 0.5, "robust")
                              for line in ("hardest", "AT"))
    if papers_half and papers_at:
        published = f"{papers_half:.1f} of {papers_at:.1f}: {100 * papers_half / papers_at:.0f} %"
    gain, gain_low, _ = contrast([(1, at, None), (-1, no_at, None)], runs)
    if gain_low > 0:  # the interval of a ratio of contrasts, by the delta method
        recovered = (mean_sd(half)[0] - mean_sd(no_at)[0]) / gain
        _, low, high = contrast([(1, half, None), (-recovered, at, None), (recovered - 1, no_at, None)], runs)
        percent_interval = f"[{100 * (recovered + low / gain):.0f}, {100 * (recovered + high / gain):.0f}]"
        behind_at = contrast([(1, half, None), (-1, at, None)], runs)
        ours = (f"{mean_sd(half)[0]:.1f}, {mean_sd(at)[0]:.1f}: {100 * recovered:.0f} % {percent_interval}; "
                f"half minus AT {interval_text(behind_at)}")
        above_90 = contrast([(1, half, None), (-0.9, at, None), (-0.1, no_at, None)], runs)
        decision = verdict("above", above_90, (half, no_at, at), runs)
    return ("(c) ESAT on the hardest half recovers at least 90 % of what AT gains in robustness",
            published, ours, decision)


def esat_by_share(runs):
    """{|A|/N: {order: ESAT runs by entropy or without a ranking}}, |A|/N ascending."""
    by_share = {}
    for r in sorted(pick(runs, split="esat", metric="entropy"), key=lambda r: r.share):
        by_share.setdefault(round(r.share, 3), {}).setdefault(r.order, []).append(r)
    return by_share


def esat_claims(runs, no_at, at, dataset):
    """Claims (c), (d), (e) and (h), on ESAT, and on AT, which is ESAT with A = everything."""
    by_share = esat_by_share(runs)
    half = by_share.get(0.5, {}).get("hardest")
    if half and no_at and at:
        yield recovery_claim(runs, no_at, half, at, dataset)
    for line, reference, rule, text in (("hardest", "easiest", "above", "hardest beats easiest"),
                                        ("random", "hardest", "not below", "random is competitive: at "
                                         f"most {MARGIN} points below hardest")):
        shares = [share for share, by_order in by_share.items() if {line, reference} <= set(by_order)]
        for share in shares[:1]:  # the smallest that both have
            yield compare(f"(d) at \\|A\\|/N = {share:g} {text}",
                          published_text("fig6", dataset, share, line, reference),
                          by_share[share][line], by_share[share][reference], runs, rule)
    both = [by_order for by_order in by_share.values() if {"hardest", "easiest"} <= set(by_order)]
    if len(both) > 1:
        sides = [by_order[order] for by_order in (both[0], both[-1]) for order in ("hardest", "easiest")]
        shrinkage = contrast([(sign, side, None) for sign, side in zip((1, -1, -1, 1), sides)], runs)
        ours = [mean_sd(side)[0] for side in sides]
        values = [published_accuracy("fig6", dataset, r.order, r.share, "robust") for r, *_ in sides]
        yield ("(h) the gain of hard over easy shrinks as \\|A\\| grows "
               f"({sides[0][0].share:g} against {sides[2][0].share:g})",
               f"{values[0] - values[1]:+.1f}, {values[2] - values[3]:+.1f}" if all(values) else "-",
               f"{ours[0] - ours[1]:+.1f}, {ours[2] - ours[3]:+.1f}: {interval_text(shrinkage)}",
               verdict("above", shrinkage, sides, runs))
    if no_at and at and not why_e_is_undecided([*no_at, *at]):
        low, high = (published_text("fig6", dataset, share, "hardest", kind="clean") for share in (0.1, 0.9))
        yield compare("(e) AT costs clean accuracy (no AT minus AT, clean)",
                      f"only for ESAT hardest: {low} (10 %), {high} (90 %)",
                      no_at, at, runs, "above", "clean")


def why_e_is_undecided(runs):
    """Why claim (e) is not decided on these runs of no AT and AT, as a sentence. Empty if there is no
    such pair, or it is decided: all checkpoints were selected after equally many learning-rate decays."""
    runs_by_line, lines = grouped(runs, "split"), {"none": "no AT", "full": "AT"}
    if len(runs_by_line) < 2 or len({r.decays for r in runs}) == 1:
        return ""
    epochs = [f"of {lines[split]} at epoch {', '.join(map(str, sorted({r.epoch for r in line_runs})))}"
              for (split,), line_runs in runs_by_line.items()]
    text = f"(e) has no row: the checkpoints were selected at different learning rates, {', '.join(epochs)}"
    if not all(r.last_accuracies for r in runs):
        return f"{text}, and the accuracies after the last epoch are not known."
    clean = [f"{100 * numpy.mean([r.last_accuracies['clean'] for r in line_runs]):.1f} % of {lines[split]}"
             for (split,), line_runs in runs_by_line.items()]
    n = runs[0].last_accuracies["n"]
    return (f"{text}. After the last epoch, clean accuracy on the {n} examples that select a checkpoint was "
            f"{', '.join(clean)}.")


def complexity_claims(cifar10, cifar100):
    """Claim (i), on runs of CIFAR-10 and of CIFAR-100, which are independent test sets."""
    orders, esat = ("hardest", "easiest"), [esat_by_share(pool) for pool in (cifar10, cifar100)]
    for share in (0.1, 0.5):
        pairs = [[by_share.get(share, {}).get(order) for order in orders] for by_share in esat]
        if not all(map(all, pairs)):
            continue
        gains = [estimate([(1, hard, None), (-1, easy, None)], pool)
                 for (hard, easy), pool in zip(pairs, (cifar10, cifar100))]
        published = [hard - easy for hard, easy in (
            [published_accuracy("fig6", dataset, order, share, "robust") for order in orders]
            for dataset in ("cifar10", "cifar100"))]
        excess = difference(*gains)
        yield ("(i) abstract, (ii): hard examples beat easy ones by less \"with increasing complexity of "
               f"datasets\" (CIFAR-10 minus CIFAR-100), at \\|A\\|/N = {share:g}",
               f"{published[0]:+.1f}, {published[1]:+.1f}: {published[0] - published[1]:+.1f}",
               f"{gains[0][0]:+.1f}, {gains[1][0]:+.1f}: {interval_text(excess)}",
               verdict("above", excess, [*pairs[0], *pairs[1]], cifar10, cifar100))


def authors_attack_claims(runs, authors_runs):
    """Claims (j), predictions made before the runs of CSAT on a single class: the training attack of the
    authors' code lowers A_val of cat, which by PGD is far above the paper's, and leaves that of automobile as
    it is."""
    single, by_authors = (single_classes(pick(rs, weight="balanced")) for rs in (runs, authors_runs))
    for c, rule, text in (("cat", "below", f"lowers A_val of cat by more than {MARGIN} points"),
                          ("automobile", "within", f"leaves A_val of automobile within {MARGIN} points")):
        sides = by_authors.get(c), single.get(c)
        if all(sides) and sides[0][0].accuracy["classes"][c]["robust"]["n"]:
            yield compare(f"(j) the authors' training attack {text} (against PGD), {FIG2['balanced']}",
                          f"{fig2_accuracy(c, c)} ({c})", *sides, runs, rule, classes=[c])


def transfer_claims(runs, dataset):
    """Claims (f), on the weights in S-CSAT, and (g), on S-ESAT with 30 % against full AT."""
    csat = pick(runs, split="csat", order="hardest", metric="entropy")
    for (share,), same_size in sorted(grouped(csat, "share").items()):
        for more, less in (("emphasis", "balanced"), ("balanced", "vanilla")):
            heavier, lighter = pick(same_size, weight=more), pick(same_size, weight=less)
            if heavier and lighter:
                yield compare(f"(f) {same_size[0].size} hardest classes: {more} transfers more robustness "
                              f"than {less}", published_text("fig7", dataset, share, more, less),
                              heavier, lighter, runs, "above")
    at = pick(runs, split="full")
    at_30_percent = [r for r in pick(runs, split="esat", order="hardest", weight="emphasis", metric="entropy")
                     if round(r.share, 3) == 0.3]
    if at_30_percent and at:
        yield compare(f"(g) S-ESAT on the hardest 30 % transfers as robustly as AT (at most {MARGIN} points "
                      "less)", published_text("fig8", dataset, 0.3, "hardest", "AT"), at_30_percent, at, runs,
                      "not below")


def with_pgd(runs):
    """The runs that the claims are about, whose Noise is pooled: trained with PGD, by the paper's weights."""
    return [r for r in pick(runs, attack="pgd")
            if r.transfer or r.weight == "vanilla" or r.order == "named" and r.weight in FIG2]


def claims(runs):
    """{(dataset, group_name): (rows (claim, paper, ours, verdict), Noise)}, for CIFAR-10 and transfers to it.
    """
    tables, groups = {}, grouped(runs, "dataset", "group_name")
    for dataset, group_name in sorted(groups, key=lambda names: "->" in names[0]):
        pool = with_pgd(groups[dataset, group_name])
        no_at, at, rows = pick(pool, split="none"), pick(pool, split="full"), []
        if dataset == "cifar100->cifar10":
            rows += transfer_claims(pool, dataset)
        elif dataset == "cifar10":
            rows += [row for weight in FIG2 for row in single_class_claims(pool, no_at, weight)]
            rows += esat_claims(pool, no_at, at, dataset)
            rows += complexity_claims(pool, [r for r in with_pgd(pick(runs, dataset="cifar100"))
                                             if r.conditions in [one.conditions for one in pool[:1]]])
            rows += authors_attack_claims(pool, pick(groups[dataset, group_name], attack="pgd-authors"))
        if rows and not comparable_dataset(dataset, pool[0].setting):
            rows = [(claim, "-", ours, decision) for claim, _, ours, decision in rows]
        if rows:
            tables[dataset, group_name] = sorted(rows, key=lambda row: row[0][:3]), Noise(pool)
    return tables
