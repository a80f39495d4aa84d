"""What finished runs say: reads and checks them, groups those that may be compared, pools seeds, contrasts
settings with an interval, and looks up the paper's numbers. report.py and figures.py show it. Loads no torch.

Files in: result.json and rank.json below a results folder, configs/paper.json, configs/*.yaml (the paper's
settings).
"""
import collections
import functools
import hashlib
import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import numpy

import common
import flags
from common import HERE, UserError, say

# vary in a table
SUBSET = {"split", "frac", "size", "classes", "order", "metric", "scores", "weight", "weight_factor",
          "attack", "seed"}
NOT_SETTING = {"dataset", "eval_batch", "side", "source", "source_weights", "checkpoint", "seed"}
DESCRIBED = {"norm", "eps", "eval_attacks", "arch", "epochs", "N", "n"}  # in every group's name
NAMES = {"airplane": "plane", "automobile": "car"}  # CIFAR-10's classes as the paper calls them


# --- the paper ----------------------------------------------------------------------------------------------

@functools.cache
def published():
    """configs/paper.json as it stands: percent unless said."""
    return json.loads((HERE / "configs" / "paper.json").read_text(encoding="utf-8"))


def base(data):
    """The paper's data set of which ours is a smaller part: cifar10 for cifar10-small, on either side of an
    arrow."""
    return data.replace("-small", "")


def theirs(figure, data, line, share, kind):
    """The paper's accuracy (percent) in a figure, or None where it has no number.

    data: a data set, or source->target. line: what the line is called in our figure; "AT" and "no AT" are the
    baselines, which belong to no figure. share: |A|/N. kind: robust or clean.
    """
    found = published()["curves"].get("baselines" if line in ("AT", "no AT") else figure, {})
    found = found.get(base(data), {}).get(kind, {}).get(line)
    if not isinstance(found, dict):
        return found
    return next((v for f, v in found.items() if abs(float(f) - share) < 0.004), None)


@functools.cache
def papers_setting(data):
    """The values of the flags in the paper's runs on `data` (a data set, or source->target), from configs/;
    {} for others."""
    source, target = base(data).split("->")[0], base(data).split("->")[-1]
    if source not in published()["data sets"]:
        return {}
    defaults = {flag[2:].replace("-", "_"): default for group in flags.FLAGS.values()
                for flag, default, *_ in group}
    found = {**defaults, **flags.from_yaml(HERE / "configs" / f"{source}.yaml")}
    if source != target and not (HERE / "configs" / "transfer" / f"{target}.yaml").exists():
        return {}
    if source != target:
        target = {**defaults, **flags.from_yaml(HERE / "configs" / "transfer" / f"{target}.yaml")}
        found |= {f"target's {k}": v for k, v in target.items()}
    return found


def not_the_papers(data, setting):
    """A sentence that names every setting of ours that is not the paper's, or nothing for data that the paper
    lacks."""
    paper = papers_setting(data)
    plain = lambda v: " ".join(map(str, v)) or "none" if isinstance(v, list) else v
    differ = [f"{k.replace('_', ' ')} {plain(v)} ({plain(paper[k])})" for k, v in setting.items()
              if k in paper and paper[k] != v]
    if setting.get("N") != published()["data sets"].get(base(data).split("->")[0], {}).get("train") and paper:
        differ.insert(0, f"N {setting['N']:,} "
                         f"({published()['data sets'][base(data).split('->')[0]]['train']:,})")
    if not differ:
        return ""
    return ("Not the paper's setting, so the differences from it are no reproduction. "
            f"Ours (the paper's): {', '.join(differ)}.")


# --- runs ---------------------------------------------------------------------------------------------------

@dataclass
class Run:
    """A finished run of sat.py or transfer.py. Of a transferred network, A and how it was made are its
    source's."""
    path: str
    data: str          # a data set, or source->target
    transfer: bool
    setting: dict      # what must agree for two runs to stand in one table
    precision: str     # of training: float32 or bf16
    split: str
    order: str         # hardest, easiest, random, or named
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
    weights: str
    # {part: {kind: {"n", "accuracy", "low", "high"}}}, and "classes": {class: the same and "right"}
    accuracy: dict
    group: str = field(default="")  # what the runs of its table have in common, for people

    @property
    def size(self):
        """|A| in classes, or in examples."""
        return len(self.A_classes) or self.A

    @property
    def share(self):
        """|A|/N, of classes or of examples."""
        return len(self.A_classes) / self.n_classes if self.A_classes else self.A / self.N

    @property
    def kind(self):
        """What it is but for the seed: the runs of a kind are pooled."""
        names = tuple(self.A_classes) if self.order == "named" else ()
        return (self.data, self.group, self.transfer, self.split, self.order, self.metric, self.weight,
                self.attack, self.size, names)

    def right(self, kind, c):
        """Which test examples of class c were right: bool (n,), in their order; None where the run did not
        keep them."""
        a = self.accuracy["classes"][c][kind]
        if "right" not in a:
            return None
        return numpy.unpackbits(numpy.frombuffer(bytes.fromhex(a["right"]),
                                                 numpy.uint8))[:a["n"]].astype(bool)


def run_of(path, result):
    """The Run of a result.json's content."""
    source = result.get("source")
    made, target, s = source or result, result["args"], result["settings"]
    args = made["args"]
    setting = {"N": made["N"], **{k: v for k, v in args.items() if k not in SUBSET | NOT_SETTING},
               "n": result["accuracy"]["all"]["robust"]["n"],
               "eval_attacks": s["attacks"], "norm": s["norm"], "eps": s["eps"],
               "labels": result["fingerprint"]["labels"]}
    if source:
        setting |= {f"target's {k}": v for k, v in target.items() if k not in NOT_SETTING}
    return Run(
        path=str(path.parent), data=f"{source['dataset']}->{target['dataset']}"
        if source else target["dataset"],
        transfer=bool(source), setting=setting, precision=result.get("precision", "float32"),
        split=args["split"],
        order="named" if args["classes"] else args["order"],
        metric="entropy" if args["order"] in ("random", "redrawn") else f"own {args['scores']}"
        if args.get("scores") else args["metric"], attack=args["attack"],
        weight=f"w_A {args['weight_factor']:g}" if args["weight_factor"] else args["weight"],
        seed=args["seed"] + (2**31 * target["seed"] if source else 0), A=made["A"], N=made["N"],
        w_A=made["w_A"],
        A_classes=made["A_classes"] or [], n_classes=len(made["fingerprint"]["classes"]),
        cost=made["cost"]["forward_equivalents"], ranking=(made.get("ranking") or {}).get("scores", ""),
        weights=made["weights"], accuracy=result["accuracy"])


def found(results, name):
    """The files of that name (a pattern) below the folder, but for those put aside by --force."""
    return [p for p in sorted(Path(results).glob(f"**/{name}"))
            if not any(part.startswith(".old-") for part in p.parts)]


def read(results):
    """Every Run below the folder `results`, repeats included."""
    runs = []
    for path in found(results, "result.json"):
        try:
            runs.append(run_of(path, common.read_json(path)))
        except (KeyError, TypeError, AttributeError, IndexError) as e:
            why = f"{type(e).__name__}: {e}"
            raise UserError(f"{path} is not a result of this project ({why}): move it away") from None
    return runs


def shown(runs):
    """The runs without those that repeat another's flags and seed, which would count as seeds: of each one is
    kept, in float32 if there is one, and that is said. They get their group's name, and transfers their
    source's accuracies, "source ..."."""
    kept = {}
    for r in sorted(runs, key=lambda r: r.precision != "float32"):
        key = json.dumps([r.kind, r.setting, r.seed], sort_keys=True)
        if key in kept:
            say(f"note: {r.path} ({r.precision}) repeats {kept[key].path} ({kept[key].precision}), which is "
                "shown")
        kept.setdefault(key, r)
    runs = [r for r in runs if any(r is k for k in kept.values())]
    for same in grouped(runs, "data").values():
        name_groups(same)
    sources = {r.weights: r.accuracy for r in runs if not r.transfer}
    for r in runs:
        if r.transfer:
            r.accuracy = {**r.accuracy, **{f"source {k}": v for k, v in sources.get(r.weights, {}).items()}}
    return runs


def name_groups(runs):
    """Gives runs of one data set their group's name: the settings that people ask for, and those in which
    groups differ."""
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
    """The threat model, the attack and the size of a run's setting, for people."""
    s = run.setting
    attack = "AutoAttack"
    if len(set(s["eval_attacks"])) < 4:
        attack = f"AutoAttack's {' and '.join(s['eval_attacks'])}"
    return (f"{s['norm']} eps {s['eps']:g}, {attack}, n = {s['n']:,}, {s['arch']}, {s['epochs']} epochs, "
            f"N = {s['N']:,}")


def grouped(runs, *keys):
    """{(values of the attributes): [runs]}, in the order of the runs."""
    found = {}
    for r in runs:
        found.setdefault(tuple(getattr(r, k) for k in keys), []).append(r)
    return found


def pick(runs, **like):
    """The runs that agree with `like`."""
    return [r for r in runs if all(getattr(r, k) == v for k, v in like.items())]


def rankings(results):
    """{path: content} of every rank.json below the folder `results`."""
    ranks = {path: common.read_json(path) for path in found(results, "rank.json")}
    for path, r in ranks.items():
        if not isinstance(r, dict) or not {"classes_hardest_first", "spearman_of_examples", "fingerprint",
                                           "args"} <= set(r):
            raise UserError(f"{path} is not a ranking of this project: move it away, or repeat it with "
                            "rank.py --force")
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
    """Spearman's rank correlation of two sequences; 0 where one of them is constant and none is defined."""
    from scipy.stats import spearmanr
    return float(spearmanr(a, b).statistic) if len(set(map(float, a))) > 1 < len(set(map(float, b))) else 0.0


def values(runs, part, kind):
    """The accuracies (percent) of runs on a part, where it exists and has examples."""
    return [100 * a["accuracy"] for r in runs if (a := r.accuracy.get(part, {}).get(kind, {})).get("n")]


def mean(runs, part="all", kind="robust"):
    """Mean accuracy in percent over runs (seeds), and its standard deviation (0 of one); None where there is
    none."""
    found = values(runs, part, kind)
    return (statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0) if found else None


def cell(runs, part="all", kind="robust"):
    """An accuracy for people, in percent: with the 95 % Wilson interval of a single run, or as mean ±
    deviation of seeds."""
    found = mean(runs, part, kind)
    if found is None:
        return "-"
    if len(runs) > 1:
        return f"{found[0]:.1f} ± {found[1]:.1f}"
    one = runs[0].accuracy[part][kind]
    return f"{found[0]:.1f} [{100 * one['low']:.1f}, {100 * one['high']:.1f}]"


@dataclass
class Noise:
    """The spread between seeds (variance in points squared) pooled over the kinds of runs that have three or
    more."""
    variance: float
    df: int
    deviations: list   # of the kinds
    p: float           # Bartlett's test that the kinds have one variance; nan of fewer than two kinds


def noise(runs, kind="robust"):
    """The Noise of the accuracy on all test examples, over runs that may be pooled (of one data set and
    group)."""
    kinds = [values(same, "all", kind) for same in grouped(runs, "kind").values()]
    spread = [v for v in kinds if len(v) > 1]
    df = sum(len(v) - 1 for v in spread)
    variance = sum((len(v) - 1) * statistics.variance(v) for v in spread) / df if df else 0.0
    p = math.nan
    if len(spread) > 1 and all(len(set(v)) > 1 for v in spread):
        from scipy.stats import bartlett
        p = float(bartlett(*spread).pvalue)
    return Noise(variance, df, [statistics.stdev(v) for v in spread], p)


def contrast(terms, seeds, kind="robust"):
    """The sum of weight * accuracy over terms, in points, with its 95 % interval: (value, low, high).

    terms: [(weight, runs, classes)]: the mean over runs (the seeds of a kind) of the accuracy on the test
    examples of `classes` (None: all). seeds: the Noise of such runs. Two sources of variance are added. Test
    examples: all runs meet the same ones, so the differences are paired, example by example, after the mean
    over seeds. Training: the pooled variance between seeds, over the number of seeds of each term
    (Bouthillier et al. 2021 on why seeds count). The interval is Student's with Satterthwaite's (1946)
    degrees of freedom. Without several seeds anywhere the second part is missing.
    """
    classes = list(terms[0][1][0].accuracy["classes"])
    sizes = {c: terms[0][1][0].accuracy["classes"][c][kind]["n"] for c in classes}
    n, value, unpaired, training = sum(sizes.values()), 0.0, 0.0, 0.0
    influence = {c: numpy.zeros(sizes[c]) for c in classes}
    for weight, runs, only in terms:
        part = [c for c in classes if (only is None or c in only) and sizes[c]]
        m = sum(sizes[c] for c in part)
        accuracy = statistics.fmean(sum(r.accuracy["classes"][c][kind]["accuracy"] * sizes[c]
                                        for c in part) / m for r in runs)
        value += weight * accuracy
        training += weight**2 * seeds.variance / len(runs)
        if any(r.right(kind, c) is None for r in runs for c in part):
            unpaired += weight**2 * accuracy * (1 - accuracy) / m
            continue
        for c in part:
            right = numpy.mean([r.right(kind, c) for r in runs], axis=0)
            influence[c] += weight * (right - accuracy) * n / m
    test = 1e4 * (sum((z**2).sum() for z in influence.values()) / n / max(1, n - 1) + unpaired)
    from scipy.stats import t
    df = (test + training)**2 / (training**2 / seeds.df + test**2 / max(1, n - 1)) if training else max(1,
                                                                                                        n - 1)
    half = float(t.ppf(0.975, df)) * math.sqrt(test + training)
    return 100 * value, 100 * value - half, 100 * value + half


def points(value, low, high):
    """A contrast for people."""
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def scores_hash(values):
    """The short hash by which a result.json names the scores (N,), float32, that chose its A."""
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]
