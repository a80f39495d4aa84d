"""Accuracies of settings with several seeds: means, the noise of training, contrasts with 95 % intervals.

It takes Runs of results.py. All accuracies are in percent, all differences in points.
"""
import math
import statistics

import numpy
import scipy.stats

from paper.results import grouped


def seed_count(runs):
    """The number of training seeds."""
    return len({r.seed for r in runs})


def mean_sd(runs, part="all", kind="robust"):
    """The mean accuracy over runs and its standard deviation (0 for one run), or None if no run has an
    example of the part."""
    values = [100 * r.accuracy[part][kind]["accuracy"] for r in runs
              if part in r.accuracy and r.accuracy[part][kind]["n"]]
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def cell(runs, part="all", kind="robust"):
    """An accuracy as text: of one run with its 95 % Wilson interval, of several seeds as mean ± standard
    deviation."""
    runs = [r for r in runs if part in r.accuracy and r.accuracy[part][kind]["n"]]
    value = mean_sd(runs, part, kind)
    if value is None:
        return "-"
    if len(runs) > 1:
        return f"{value[0]:.1f} ± {value[1]:.1f}"
    one = runs[0].accuracy[part][kind]
    return f"{value[0]:.1f} [{100 * one['low']:.1f}, {100 * one['high']:.1f}]"


def accuracy_on(run, classes, kind="robust"):
    """A run's accuracy on the test examples of `classes` together."""
    parts = [run.accuracy["classes"][c][kind] for c in classes]
    return 100 * sum(a["accuracy"] * a["n"] for a in parts if a["n"]) / sum(a["n"] for a in parts)


def no_at_cell(no_at, runs):
    """A cell: what B reaches without any help from A. It is the mean robust accuracy of the runs without AT,
    `no_at`, on the classes in B_val of `runs`."""
    values = []
    for run in no_at:
        tested = [c for c, a in run.accuracy["classes"].items() if a["robust"]["n"]]
        parts_of_B = [[c for c in tested if c not in r.A_classes] for r in runs if r.A_classes]
        values += [accuracy_on(run, classes) for classes in parts_of_B if classes]
    return f"{statistics.fmean(values):.1f}" if values else "-"


class Noise:
    """The noise of training: how far the accuracies on the test examples of `classes` (None: all) differ
    between seeds, pooled over the settings of one group of runs.

    Settings near 0 or 100 % vary little and would bias the pooled variance; they count only if no other has
    several seeds. CSAT of random classes does not count: its seeds choose other classes.
    """

    def __init__(self, runs, kind="robust", classes=None):
        if classes is None:
            classes = [c for r in runs[:1] for c in r.accuracy["classes"]]
        several = [[accuracy_on(r, classes, kind) for r in seeds]
                   for seeds in grouped(runs, "configuration").values()
                   if len(seeds) > 1 and (seeds[0].order != "random" or not seeds[0].A_classes)]
        inside = [v for v in several if 5 <= statistics.fmean(v) <= 95]
        self.is_typical = bool(inside)  # so that it may stand for settings that have one seed
        self.accuracies = inside or several  # of each setting, those of its seeds
        self.df = sum(len(v) - 1 for v in self.accuracies)  # degrees of freedom
        self.variance = sum((len(v) - 1) * statistics.variance(v) for v in self.accuracies) / max(1, self.df)

    def __str__(self):
        if not self.df:
            return "No setting has several seeds: the intervals cover only the noise of the test set."
        text = (f"Between seeds, the robust accuracy on all examples has a standard deviation of "
                f"{self.variance**0.5:.2f} points (degrees of freedom: {self.df})")
        if len(self.accuracies) > 1:
            deviations = [statistics.stdev(v) for v in self.accuracies]
            text += (f", pooled over {len(deviations)} settings "
                     f"({min(deviations):.2f} to {max(deviations):.2f})")
        return f"{text}."


def estimate(terms, noise_runs, kind="robust"):
    """The sum of weight * accuracy over terms: (value, its variance, degrees of freedom of the variance).

    terms: [(weight, runs, classes)], where accuracy is the mean over runs (seeds of one setting) on the test
    examples of `classes` (None: all). No run may be in two terms. noise_runs: the runs whose Noise is that of
    training.

    Two variances are added. Training: the pooled variance between seeds of the accuracy on the same classes,
    divided by the seeds of each term; 0 if no setting has several seeds. Test examples: all runs are tested
    on the same ones, so differences are paired, after the mean over seeds. Examples that change between
    seeds count in both, so the variance is rather too large. The variances of training on different classes
    are treated as one estimate, with the fewest degrees of freedom among them.
    """
    all_runs = [r for _, runs, _ in terms for r in runs]
    if len(set(all_runs)) < len(all_runs):
        raise ValueError("a run is given twice in one contrast, whose covariance with itself is not counted")
    sizes = {c: a[kind]["n"] for c, a in all_runs[0].accuracy["classes"].items() if a[kind]["n"]}
    influence, n = {c: numpy.zeros(size) for c, size in sizes.items()}, sum(sizes.values())
    value, training_variance, training_df = 0.0, 0.0, math.inf
    for weight, runs, classes in terms:
        classes = [c for c in sizes if classes is None or c in classes]
        accuracy = statistics.fmean(accuracy_on(r, classes, kind) for r in runs)
        value += weight * accuracy
        noise = Noise(noise_runs, kind, classes)
        training_variance += weight**2 * noise.variance / seed_count(runs)
        training_df = min(training_df, noise.df)
        for c in classes:
            percent_right = 100 * numpy.mean([r.right(kind, c) for r in runs], axis=0)
            influence[c] += weight * (percent_right - accuracy) * n / sum(sizes[k] for k in classes)
    test_df = max(1, n - 1)
    test_variance = sum((z**2).sum() for z in influence.values()) / n / test_df
    df = satterthwaite((test_variance, test_df), (training_variance, training_df))
    return value, test_variance + training_variance, df


def satterthwaite(*variances):
    """The degrees of freedom of a sum of independent variances, each (variance, df); Satterthwaite (1946)."""
    inverse = sum(variance**2 / df for variance, df in variances if variance)
    return sum(variance for variance, _ in variances)**2 / inverse if inverse else math.inf


def interval(value, variance, df):
    """A value with its 95 % interval by Student's distribution: (value, low, high)."""
    half = float(scipy.stats.t.ppf(0.975, df)) * math.sqrt(variance)
    return value, value - half, value + half


def contrast(terms, noise_runs, kind="robust"):
    """The sum of weight * accuracy over terms, [(weight, runs, classes)], as (value, low, high) with its 95 %
    interval. See estimate."""
    return interval(*estimate(terms, noise_runs, kind))


def difference(one, other):
    """One estimate minus another with its 95 % interval: (value, low, high). Their variances add, since they
    are independent: of other runs on another test set."""
    return interval(one[0] - other[0], one[1] + other[1], satterthwaite(one[1:], other[1:]))


def interval_text(interval):
    """A contrast as text."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*interval)
