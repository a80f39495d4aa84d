"""Accuracies of settings with several seeds: means, the noise of training, and contrasts with 95 % intervals.

claims.py, report.py and figures.py show what it returns. It takes Runs of results.py, and does not import
torch.
"""
import math
import statistics
from dataclasses import dataclass

import numpy

from results import grouped, pick


def spearman(a, b):
    """Spearman's rank correlation of two sequences; 0 if one is constant, where it is not defined."""
    from scipy.stats import spearmanr
    return float(spearmanr(a, b).statistic) if len(set(map(float, a))) > 1 < len(set(map(float, b))) else 0.0


def values(runs, part, kind):
    """The accuracies (percent) on a part, for each training seed of the runs that have this part with at
    least one example. (Several heads on one network are averaged: they are no independent seeds.)"""
    having = [r for r in runs if r.accuracy.get(part, {}).get(kind, {}).get("n")]
    return [statistics.fmean(100 * r.accuracy[part][kind]["accuracy"] for r in same)
            for same in grouped(having, "training_seed").values()]


def mean(runs, part="all", kind="robust"):
    """Mean accuracy (percent) over runs (seeds) and its standard deviation (0 for one run); None if no run
    has the part."""
    found = values(runs, part, kind)
    return (statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0) if found else None


def cell(runs, part="all", kind="robust"):
    """An accuracy (percent) as text: of a single run with its 95 % Wilson interval, of several seeds as
    mean ± standard deviation."""
    found = mean(runs, part, kind)
    if found is None:
        return "-"
    if len(grouped(runs, "training_seed")) > 1:
        return f"{found[0]:.1f} ± {found[1]:.1f}"
    if len(runs) > 1:
        return f"{found[0]:.1f} ({len(runs)} heads)"
    one = runs[0].accuracy[part][kind]
    return f"{found[0]:.1f} [{100 * one['low']:.1f}, {100 * one['high']:.1f}]"


def accuracy_on(run, classes, kind="robust"):
    """A run's accuracy (percent) on the test examples of `classes` together."""
    parts = [run.accuracy["classes"][c][kind] for c in classes]
    return 100 * sum(a["accuracy"] * a["n"] for a in parts if a["n"]) / sum(a["n"] for a in parts)


def without_at(group, runs):
    """A cell: the mean robust accuracy of networks trained without AT on the classes in B_val of `runs`, so
    what B reaches without any help from A."""
    found = []
    for r, none in ((r, none) for r in runs if r.A_classes for none in pick(group, split="none")):
        rest = [c for c, a in none.accuracy["classes"].items() if c not in r.A_classes and a["robust"]["n"]]
        if rest:
            found.append(accuracy_on(none, rest))
    return f"{statistics.fmean(found):.1f}" if found else "-"


@dataclass
class Noise:
    """The noise of training: how far accuracies (percent) differ between seeds, pooled over settings."""
    spread: list  # of each setting with two or more seeds, their accuracies

    @property
    def df(self):
        """Degrees of freedom."""
        return sum(len(v) - 1 for v in self.spread)

    @property
    def variance(self):
        """The pooled variance between seeds (points squared); 0 if no setting has several seeds."""
        return sum((len(v) - 1) * statistics.variance(v) for v in self.spread) / max(1, self.df)

    def __str__(self):
        if not self.df:
            return "No setting has several seeds: the intervals cover the noise of the test set alone."
        text = (f"Between seeds, the robust accuracy on all examples has a standard deviation of "
                f"{self.variance**0.5:.2f} points, with {self.df} degree{'s' * (self.df > 1)} of freedom")
        if len(self.spread) > 1:
            each, test = [statistics.stdev(v) for v in self.spread], ""
            if min(each) > 0:
                from scipy.stats import bartlett
                test = f"; Bartlett's test of equal variances p = {bartlett(*self.spread).pvalue:.2f}"
            text += f", pooled over {len(each)} settings ({min(each):.2f} to {max(each):.2f}{test})"
        return f"{text}."


def noise(runs, kind="robust", classes=None):
    """The Noise of the accuracy on the test examples of `classes` (None: all). The runs must be of one data
    set and group. Means below 5 % or above 95 %, as that of no AT often is, have little room for noise and
    would make that of the others look small: they count only if there are no others."""
    classes = [c for r in runs[:1] for c in r.accuracy["classes"]] if classes is None else classes
    several = [[statistics.fmean(accuracy_on(r, classes, kind) for r in one)
                for one in grouped(same, "training_seed").values()]
               for same in grouped(runs, "kind").values()]
    several = [v for v in several if len(v) > 1]
    return Noise([v for v in several if 5 <= statistics.fmean(v) <= 95] or several)


def contrast(terms, pool, kind="robust"):
    """The sum of weight * accuracy over terms, in points, with its 95 % interval: (value, low, high).

    terms: [(weight, runs, classes)], where accuracy is the mean over runs (the seeds of a kind) on the test
    examples of `classes` (None: all). pool: the runs whose noise() is that of training. Two variances are
    added. Test examples: all runs are tested on the same ones, so the differences are paired, example by
    example, after the mean over seeds. Training: the variance between seeds of the accuracy on the same
    classes, pooled, divided by the number of seeds of each term (Bouthillier et al. 2021 explain why seeds
    count); it is missing if no kind has several seeds. Single examples that change between seeds are counted
    in both, so that the interval is rather too wide. It is Student's, with Satterthwaite's (1946) degrees of
    freedom; the noises on different classes count as one estimate.
    """
    sizes = {c: a[kind]["n"] for c, a in terms[0][1][0].accuracy["classes"].items() if a[kind]["n"]}
    n, value, unpaired, training, freedom = sum(sizes.values()), 0.0, 0.0, 0.0, []
    influence = {c: numpy.zeros(sizes[c]) for c in sizes}
    for weight, runs, only in terms:
        part = [c for c in sizes if only is None or c in only]
        m = sum(sizes[c] for c in part)
        accuracy = statistics.fmean(accuracy_on(r, part, kind) / 100 for r in runs)
        value += weight * accuracy
        between = noise(pool, kind, part)
        training += weight**2 * between.variance / len(grouped(runs, "training_seed"))
        freedom.append(between.df)
        if any(r.right(kind, c) is None for r in runs for c in part):
            unpaired += weight**2 * accuracy * (1 - accuracy) / m
            continue
        for c in part:
            right = numpy.mean([r.right(kind, c) for r in runs], axis=0)
            influence[c] += weight * (right - accuracy) * n / m
    test = 1e4 * (sum((z**2).sum() for z in influence.values()) / n / max(1, n - 1) + unpaired)
    from scipy.stats import t
    df = max(1, n - 1)
    if training:
        df = (test + training)**2 / (training**2 / min(freedom) + test**2 / df)
    half = float(t.ppf(0.975, df)) * math.sqrt(test + training)
    return 100 * value, 100 * value - half, 100 * value + half


def points(value, low, high):
    """A contrast as text."""
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
