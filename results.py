"""Reads the results of finished runs, checks them, pools seeds, and compares settings with 95 % intervals.

claims.py, report.py and figures.py show what it returns; intervals and Spearman's correlation are here for
all scripts. It does not import torch. Files in: result.json and rank.json below a results folder.
"""
import collections
import hashlib
import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import numpy

import common
from common import UserError, say

# Flags in which the runs of one table may differ.
SUBSET = {"split", "frac", "size", "classes", "order", "metric", "scores", "weight", "weight_factor",
          "attack", "seed"}
# Flags that are not compared when runs are sorted into tables.
NOT_SETTING = {"dataset", "eval_batch", "source", "source_weights", "checkpoint", "seed"}
DESCRIBED = {"norm", "eps", "eval_attacks", "arch", "epochs", "N", "n"}  # in the name of every group


# --- runs ---------------------------------------------------------------------------------------------------

@dataclass
class Run:
    """A finished run of sat.py or transfer.py. In a transfer, the fields about A and about the training with
    attacks are those of the source run."""
    path: str
    data: str          # a data set, or source->target
    transfer: bool
    setting: dict      # what must agree for two runs to stand in one table
    precision: str     # of training: float32 or bf16
    split: str
    order: str         # hardest, easiest, random, redrawn, or named
    metric: str
    weight: str
    attack: str
    seed: int
    A: int
    N: int
    w_A: float
    A_classes: list
    n_classes: int
    cost: float        # of training, in forward passes
    ranking: str       # hash of the scores that chose A, or ""
    weights: str       # hash of the network's weights (in a transfer, of the source's)
    # {part: {kind: {"n", "accuracy", "low", "high"}}}, "classes": {class: {kind: the same and "right"}}
    accuracy: dict
    group: str = field(default="")  # what the runs of its table have in common, for people

    @property
    def size(self):
        """|A|, counted in classes or in examples."""
        return len(self.A_classes) or self.A

    @property
    def share(self):
        """|A|/N, counted in classes or in examples."""
        return len(self.A_classes) / self.n_classes if self.A_classes else self.A / self.N

    @property
    def training_seed(self):
        """The seed of the training with attacks. Transfers of one network share it, however many heads it
        got: they are no independent seeds."""
        return self.seed % 2**31

    @property
    def kind(self):
        """Everything that identifies the run except its seed: runs of one kind are pooled."""
        names = tuple(self.A_classes) if self.order == "named" else ()
        return (self.data, self.group, self.transfer, self.split, self.order, self.metric, self.weight,
                self.attack, self.size, names)

    def right(self, kind, c):
        """Which test examples of class c were classified correctly, as bool (n,) in their order; None if the
        run did not save it."""
        a = self.accuracy["classes"][c][kind]
        if "right" not in a:
            return None
        bits = numpy.unpackbits(numpy.frombuffer(bytes.fromhex(a["right"]), numpy.uint8))
        return bits[:a["n"]].astype(bool)


def run_of(path, result):
    """The Run that the content of a result.json describes."""
    source = result.get("source")
    made, target, s = source or result, result["args"], result["settings"]
    args, data = made["args"], target["dataset"]
    setting = {"N": made["N"], **{k: v for k, v in args.items() if k not in SUBSET | NOT_SETTING},
               "n": result["accuracy"]["all"]["robust"]["n"], "eval_attacks": s["attacks"], "norm": s["norm"],
               "eps": s["eps"], "labels": result["fingerprint"]["labels"]}
    if source:
        setting |= {f"target's {k}": v for k, v in target.items() if k not in NOT_SETTING}
        data = f"{source['dataset']}->{data}"
    metric = f"own {args['scores']}" if args.get("scores") else args["metric"]
    if args["order"] in ("random", "redrawn"):
        metric = "entropy"  # no metric is used; this value puts them beside the runs ordered by entropy
    return Run(
        path=str(path.parent), data=data, transfer=bool(source), setting=setting,
        precision=result.get("precision", "float32"), split=args["split"],
        order="named" if args["classes"] else args["order"], metric=metric, attack=args["attack"],
        weight=f"w_A {args['weight_factor']:g}" if args["weight_factor"] else args["weight"],
        seed=args["seed"] + (2**31 * target["seed"] if source else 0), A=made["A"], N=made["N"],
        w_A=made["w_A"], A_classes=made["A_classes"] or [], n_classes=len(made["fingerprint"]["classes"]),
        cost=made["cost"]["forward_equivalents"], ranking=(made.get("ranking") or {}).get("scores", ""),
        weights=made["weights"], accuracy=result["accuracy"])


def found(results, name):
    """The files below the folder that match the pattern `name`, except those that --force put aside and those
    in a folder with a file .separate, which is a report of its own (results-published/precision)."""
    root = Path(results)
    others = {path.parent for path in root.glob("*/**/.separate")}
    return [path for path in sorted(root.glob(f"**/{name}"))
            if not others & set(path.parents) and not any(part.startswith(".old-") for part in path.parts)]


def read(results):
    """All Runs below the folder `results`, repeated ones included."""
    runs = []
    for path in found(results, "result.json"):
        try:
            runs.append(run_of(path, common.read_json(path)))
        except (KeyError, TypeError, AttributeError, IndexError) as e:
            why = f"{type(e).__name__}: {e}"
            raise UserError(f"{path} is not a result of this project ({why}): move it away") from None
    return runs


def shown(runs):
    """The runs to show. Runs with the same flags and seed would count as several seeds: only one of them is
    kept, a float32 run if there is one, and a note is printed. Sets each run's group name, and adds to each
    transfer the accuracies of its source, as parts "source ..."."""
    kept, repeats = {}, []
    for r in sorted(runs, key=lambda r: r.precision != "float32"):
        key = json.dumps([r.kind, r.setting, r.seed], sort_keys=True)
        if kept.setdefault(key, r) is not r:
            repeats.append(f"{r.path} ({r.precision}) repeats {kept[key].path} ({kept[key].precision})")
    if repeats:
        say(f"note: {len(repeats)} runs have the flags and seed of another and are left out; the first: "
            f"{repeats[0]}")
    runs = [r for r in runs if any(r is k for k in kept.values())]
    for same in grouped(runs, "data").values():
        name_groups(same)
    sources = {r.weights: r.accuracy for r in runs if not r.transfer}
    for r in runs:
        if r.transfer:
            r.accuracy = {**r.accuracy, **{f"source {k}": v for k, v in sources.get(r.weights, {}).items()}}
    return runs


def name_groups(runs):
    """Sets the group name of runs of one data set: the most important settings, and those in which groups of
    that name differ."""
    shown = {}
    for r in runs:
        shown.setdefault(json.dumps(r.setting, sort_keys=True), []).append(r)
    shared = collections.Counter(described(rs[0]) for rs in shown.values())
    for rs in shown.values():
        name, others = described(rs[0]), [o[0].setting for o in shown.values()]
        if shared[name] > 1:
            odd = [k for k, v in rs[0].setting.items()
                   if k not in DESCRIBED and any(o.get(k) != v for o in others)]
            name += "".join(f", {k.replace('_', ' ')} {rs[0].setting[k]}" for k in odd)
        bf16 = sum(r.precision != "float32" for r in rs)
        if bf16:
            name += ", trained in bf16" if bf16 == len(rs) else f", {bf16} of {len(rs)} runs trained in bf16"
        for r in rs:
            r.group = name


def described(run):
    """The threat model, the attack and the size of a run's setting, as text."""
    s = run.setting
    attack = "AutoAttack"
    if len(set(s["eval_attacks"])) < 4:
        attack = f"AutoAttack's {' and '.join(s['eval_attacks'])}"
    return (f"{s['norm']} eps {s['eps']:g}, {attack}, n = {s['n']:,}, {s['arch']}, "
            f"{s['epochs']} epochs, N = {s['N']:,}")


def grouped(runs, *keys):
    """{(values of the attributes `keys`): [runs]}, in the order of the runs."""
    found = {}
    for r in runs:
        found.setdefault(tuple(getattr(r, k) for k in keys), []).append(r)
    return found


def pick(runs, **like):
    """The runs whose attributes have the values in `like`."""
    return [r for r in runs if all(getattr(r, k) == v for k, v in like.items())]


def mixed_rankings(runs):
    """A sentence if runs by one metric used different rankings; else empty."""
    for (metric,), same in grouped([r for r in runs if r.ranking], "metric").items():
        if (n := len({r.ranking for r in same})) > 1:
            return f"Caution: the runs by {metric} used {n} different rankings."
    return ""


def rankings(results):
    """{path: content} of every rank.json below the folder `results`."""
    ranks = {path: common.read_json(path) for path in found(results, "rank.json")}
    needed = {"classes_hardest_first", "spearman_of_examples", "fingerprint", "args"}
    for path, r in ranks.items():
        if not isinstance(r, dict) or not needed <= set(r):
            raise UserError(f"{path} is not a ranking of this project: move it away, "
                            "or repeat it with rank.py --force")
    return ranks


# --- accuracies ---------------------------------------------------------------------------------------------

def wilson(k, n, z=1.959964):
    """The 95 % Wilson score interval (low, high) of k successes in n trials."""
    if n == 0:
        return 0.0, 1.0
    p, d = k / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / d, z / d * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def spearman(a, b):
    """Spearman's rank correlation of two sequences; 0 if one is constant, where it is not defined."""
    from scipy.stats import spearmanr
    return float(spearmanr(a, b).statistic) if len(set(map(float, a))) > 1 < len(set(map(float, b))) else 0.0


def values(runs, part, kind):
    """The accuracies (percent) on a part, of the runs that have this part with at least one example."""
    return [100 * a["accuracy"] for r in runs if (a := r.accuracy.get(part, {}).get(kind, {})).get("n")]


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
    if len(runs) > 1:
        return f"{found[0]:.1f} ± {found[1]:.1f}"
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


def scores_hash(values):
    """The short hash by which a result.json names the scores (N,), float32, that chose its A."""
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]
