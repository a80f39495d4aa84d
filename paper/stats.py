"""Accuracies of settings with several seeds: means, the noise of training, contrasts with 95 % intervals.

It takes Runs of results.py. All accuracies are in percent, all differences in points.
"""
import math
import statistics
from dataclasses import dataclass

import numpy

from paper.results import counted, grouped, pick


def spearman(a, b):
    """Spearman's rank correlation of two sequences; 0 if one is constant, where it is not defined."""
    from scipy.stats import spearmanr
    if min(len(set(map(float, a))), len(set(map(float, b)))) < 2:
        return 0.0
    return float(spearmanr(a, b).statistic)


def seeds(runs):
    """The number of training seeds. Several heads on one network are no independent seeds."""
    return len({r.seed for r in runs})


def mean(runs, part="all", kind="robust"):
    """The mean accuracy over training seeds and its standard deviation (0 for one seed), or None if no run
    has an example of the part. Several heads on one network are averaged first."""
    having = [r for r in runs if r.accuracy.get(part, {}).get(kind, {}).get("n")]
    if not having:
        return None
    values = [statistics.fmean(100 * r.accuracy[part][kind]["accuracy"] for r in heads)
              for heads in grouped(having, "seed").values()]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def cell(runs, part="all", kind="robust"):
    """An accuracy as text: of one run with its 95 % Wilson interval, of several seeds as mean ± standard
    deviation."""
    value = mean(runs, part, kind)
    if value is None:
        return "-"
    if seeds(runs) > 1:
        return f"{value[0]:.1f} ± {value[1]:.1f}"
    if len(runs) > 1:
        return f"{value[0]:.1f} ({len(runs)} heads)"
    one = runs[0].accuracy[part][kind]
    return f"{value[0]:.1f} [{100 * one['low']:.1f}, {100 * one['high']:.1f}]"


def accuracy_on(run, classes, kind="robust"):
    """A run's accuracy on the test examples of `classes` together."""
    parts = [run.accuracy["classes"][c][kind] for c in classes]
    return 100 * sum(a["accuracy"] * a["n"] for a in parts if a["n"]) / sum(a["n"] for a in parts)


def no_at_on_b_val(group, runs):
    """A cell: what B reaches without any help from A. It is the mean robust accuracy of the networks of
    `group` that were trained without AT, on the classes in B_val of `runs`."""
    values = []
    for r in runs:
        for none in pick(group, split="none") if r.A_classes else []:
            rest = [c for c, a in none.accuracy["classes"].items()
                    if c not in r.A_classes and a["robust"]["n"]]
            if rest:
                values.append(accuracy_on(none, rest))
    return f"{statistics.fmean(values):.1f}" if values else "-"


@dataclass
class Noise:
    """The noise of training: how far accuracies differ between seeds, pooled over settings."""
    spread: list  # of each setting with two or more seeds, their accuracies

    @property
    def df(self):
        """Degrees of freedom."""
        return sum(len(v) - 1 for v in self.spread)

    @property
    def variance(self):
        """The pooled variance between seeds; 0 if no setting has several seeds."""
        return sum((len(v) - 1) * statistics.variance(v) for v in self.spread) / max(1, self.df)

    def __str__(self):
        if not self.df:
            return "No setting has several seeds: the intervals cover the noise of the test set alone."
        text = (f"Between seeds, the robust accuracy on all examples has a standard deviation of "
                f"{self.variance**0.5:.2f} points, with {counted(self.df, 'degree')} of freedom")
        if len(self.spread) > 1:
            deviations, test = [statistics.stdev(v) for v in self.spread], ""
            if min(deviations) > 0:
                from scipy.stats import bartlett
                test = f"; Bartlett's test of equal variances p = {bartlett(*self.spread).pvalue:.2f}"
            text += (f", pooled over {len(deviations)} settings "
                     f"({min(deviations):.2f} to {max(deviations):.2f}{test})")
        return f"{text}."


def noise(runs, kind="robust", classes=None):
    """The Noise of the accuracy on the test examples of `classes` (None: all), of runs of one group.

    Settings near 0 or 100 % vary little and would bias the pooled variance; they count only if no other has
    several seeds.
    """
    if classes is None:
        classes = [c for r in runs[:1] for c in r.accuracy["classes"]]
    spread = [[statistics.fmean(accuracy_on(r, classes, kind) for r in heads)
               for heads in grouped(same, "seed").values()]
              for same in grouped(runs, "kind").values() if seeds(same) > 1]
    return Noise([v for v in spread if 5 <= statistics.fmean(v) <= 95] or spread)


def contrast(terms, pool, kind="robust"):
    """The sum of weight * accuracy over terms with its 95 % interval: (value, low, high).

    terms: [(weight, runs, classes)], where accuracy is the mean over runs (the seeds of a kind) on the test
    examples of `classes` (None: all). pool: the runs whose noise() is that of training.

    Two variances are added. Training: the pooled variance between seeds of the accuracy on the same classes,
    divided by the number of seeds of each term (Bouthillier et al. 2021 explain why seeds count); it is 0 if
    no kind has several seeds. Test examples: see test_variance. Single examples that change between seeds
    count in both, so the interval is rather too wide. It is Student's, with Satterthwaite's (1946) degrees of
    freedom; the noises on different classes count as one estimate.
    """
    from scipy.stats import t
    sizes = {c: a[kind]["n"] for c, a in terms[0][1][0].accuracy["classes"].items() if a[kind]["n"]}
    terms = [(weight, runs, [c for c in sizes if only is None or c in only]) for weight, runs, only in terms]
    value = sum(weight * statistics.fmean(accuracy_on(r, classes, kind) for r in runs)
                for weight, runs, classes in terms)
    noises = [noise(pool, kind, classes) for _, _, classes in terms]
    training = sum(weight**2 * between.variance / seeds(runs)
                   for (weight, runs, _), between in zip(terms, noises))
    test, df = test_variance(terms, sizes, kind), max(1, sum(sizes.values()) - 1)
    if training:
        df = (test + training)**2 / (training**2 / min(n.df for n in noises) + test**2 / df)
    half = float(t.ppf(0.975, df)) * math.sqrt(test + training)
    return value, value - half, value + half


def test_variance(terms, sizes, kind):
    """The variance of a contrast that comes from the choice of test examples.

    All runs are tested on the same examples, so differences are paired, example by example, after the mean
    over seeds. A term with a run that did not save its examples counts as unpaired.
    """
    n, unpaired = sum(sizes.values()), 0.0
    influence = {c: numpy.zeros(size) for c, size in sizes.items()}
    for weight, runs, classes in terms:
        m = sum(sizes[c] for c in classes)
        accuracy = statistics.fmean(accuracy_on(r, classes, kind) / 100 for r in runs)
        if any(r.right(kind, c) is None for r in runs for c in classes):
            unpaired += weight**2 * accuracy * (1 - accuracy) / m
            continue
        for c in classes:
            right = numpy.mean([r.right(kind, c) for r in runs], axis=0)
            influence[c] += weight * (right - accuracy) * n / m
    return 1e4 * (sum((z**2).sum() for z in influence.values()) / n / max(1, n - 1) + unpaired)


def points(value, low, high):
    """A contrast as text."""
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
