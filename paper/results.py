"""Reads the results of finished runs, checks them, and groups those that may stand in one table.

Files in: result.json and rank.json below a results folder.
"""
import collections
import json
from dataclasses import dataclass
from pathlib import Path

import numpy

from common import UserError, say
from runs import read_json

# Flags in which the runs of one table may differ.
SUBSET = {"split", "frac", "size", "classes", "order", "metric", "scores", "weight", "weight_factor",
          "attack", "seed"}
# Flags that are not compared when runs are grouped.
NOT_SETTING = {"dataset", "eval_batch", "source", "source_weights", "checkpoint", "seed"}
DESCRIBED = {"norm", "eps", "eval_attacks", "arch", "epochs", "N", "n"}  # in the name of every group


@dataclass
class Run:
    """A finished run of sat.py or transfer.py. What is said of A and of training is, in a transfer, its
    source's."""
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
    seed: int          # of the training on A and B
    head_seed: int     # of a transfer's head; 0 in other runs
    A: int
    N: int
    w_A: float
    A_classes: list
    n_classes: int
    cost: float        # of training, in forward passes
    ranking: str       # hash of the scores that chose A, or ""
    ranking_epochs: int  # of the network that made them; 0 for scores from a file
    weights: str       # hash of the network's weights (in a transfer, of the source's)
    # {part: {kind: {"n", "accuracy", "low", "high"}}}, "classes": {class: {kind: the same and "right"}}
    accuracy: dict
    group: str = ""    # what the runs of its table have in common, for people

    @property
    def size(self):
        """|A|, counted in classes or in examples."""
        return len(self.A_classes) or self.A

    @property
    def share(self):
        """|A|/N, counted in classes or in examples."""
        return len(self.A_classes) / self.n_classes if self.A_classes else self.A / self.N

    @property
    def kind(self):
        """Everything that identifies the run except its seeds. Runs of one kind are pooled."""
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
    training, target, evaluation = source or result, result["args"], result["settings"]
    args, data = training["args"], target["dataset"]
    setting = {"N": training["N"], **{k: v for k, v in args.items() if k not in SUBSET | NOT_SETTING},
               "n": result["accuracy"]["all"]["robust"]["n"], "eval_attacks": evaluation["attacks"],
               "norm": evaluation["norm"], "eps": evaluation["eps"],
               "labels": result["fingerprint"]["labels"]}
    if source:
        setting |= {f"target's {k}": v for k, v in target.items() if k not in NOT_SETTING}
        setting |= {f"source's {k}": args[k] for k in ("norm", "eps")}  # norm and eps are the evaluation's
        data = f"{source['dataset']}->{data}"
    ranking = training.get("ranking") or {}
    metric = f"own {args['scores']}" if args.get("scores") else args["metric"]
    if args["order"] in ("random", "redrawn"):
        metric = "entropy"  # no metric is used; this value puts them beside the runs ordered by entropy
    return Run(
        path=str(path.parent), data=data, transfer=bool(source), setting=setting,
        precision=result.get("precision", "float32"), split=args["split"],
        order="named" if args["classes"] else args["order"], metric=metric, attack=args["attack"],
        weight=f"w_A {args['weight_factor']:g}" if args["weight_factor"] else args["weight"],
        seed=args["seed"], head_seed=target["seed"] if source else 0, A=training["A"], N=training["N"],
        w_A=training["w_A"], A_classes=training["A_classes"] or [],
        n_classes=len(training["fingerprint"]["classes"]), cost=training["cost"]["forward_equivalents"],
        ranking=ranking.get("scores", ""), ranking_epochs=ranking.get("epochs", 0),
        weights=training["weights"], accuracy=result["accuracy"])


def result_files(folder, name):
    """The files below `folder` that match the pattern `name`, except those that --force put aside."""
    return [path for path in sorted(Path(folder).glob(f"**/{name}"))
            if not any(part.startswith(".old-") for part in path.parts)]


def read_runs(folder):
    """All Runs below `folder`, repeated ones included."""
    runs = []
    for path in result_files(folder, "result.json"):
        try:
            runs.append(run_of(path, read_json(path)))
        except (KeyError, TypeError, AttributeError, IndexError) as e:
            why = f"{type(e).__name__}: {e}"
            raise UserError(f"{path} is not a result of this project ({why}): move it away") from None
    return runs


def read_rankings(folder):
    """{path: content} of every rank.json below `folder`."""
    rankings = {path: read_json(path) for path in result_files(folder, "rank.json")}
    needed = {"classes_hardest_first", "spearman_of_examples", "fingerprint", "args"}
    for path, ranking in rankings.items():
        if not isinstance(ranking, dict) or not needed <= set(ranking):
            raise UserError(f"{path} is not a ranking of this project: move it away, "
                            "or repeat it with rank.py --force")
    return rankings


def without_repeats(runs):
    """The runs without those that have the flags and seeds of another, which would count as several seeds. A
    float32 run is preferred. A note names the first that is left out."""
    first, repeats = {}, []
    for r in sorted(runs, key=lambda r: r.precision != "float32"):
        same = first.setdefault(json.dumps([r.kind, r.setting, r.seed, r.head_seed], sort_keys=True), r)
        if same is not r:
            repeats.append(f"{r.path} ({r.precision}) repeats {same.path} ({same.precision})")
    if repeats:
        say(f"note: {len(repeats)} runs have the flags and seed of another and are left out; the first: "
            f"{repeats[0]}")
    chosen = {id(r) for r in first.values()}
    return [r for r in runs if id(r) in chosen]


def name_groups(runs):
    """Names the group of each run: by the most important settings, and by those in which groups of the same
    data and name differ."""
    for same_data in grouped(runs, "data").values():
        groups = {}
        for r in same_data:
            groups.setdefault(json.dumps(r.setting, sort_keys=True), []).append(r)
        settings = [group[0].setting for group in groups.values()]
        uses = collections.Counter(map(setting_as_text, settings))
        for group in groups.values():
            setting = group[0].setting
            name = setting_as_text(setting)
            if uses[name] > 1:
                name += "".join(f", {k.replace('_', ' ')} {v}" for k, v in setting.items()
                                if k not in DESCRIBED and any(other.get(k) != v for other in settings))
            bf16 = sum(r.precision != "float32" for r in group)
            if bf16 == len(group):
                name += ", trained in bf16"
            elif bf16:
                name += f", {bf16} of {len(group)} runs trained in bf16"
            for r in group:
                r.group = name


def setting_as_text(setting):
    """The threat model, the attacks and the size of a setting."""
    attack, attacks = "AutoAttack", setting["eval_attacks"]
    if len(set(attacks)) < 4:
        attack = f"AutoAttack's {' and '.join(attacks)}"
    return (f"{setting['norm']} eps {setting['eps']:g}, {attack}, n = {setting['n']:,}, {setting['arch']}, "
            f"{setting['epochs']} epochs, N = {setting['N']:,}")


def add_source_accuracies(runs):
    """Gives each transfer the accuracies of its source, as parts "source ..."."""
    sources = {r.weights: r.accuracy for r in runs if not r.transfer}
    for r in runs:
        if r.transfer:
            source = sources.get(r.weights, {})
            r.accuracy = r.accuracy | {f"source {part}": accuracy for part, accuracy in source.items()}


def grouped(runs, *keys):
    """{(values of the attributes `keys`): [runs]}, in the order of the runs."""
    groups = {}
    for r in runs:
        groups.setdefault(tuple(getattr(r, k) for k in keys), []).append(r)
    return groups


def pick(runs, **values):
    """The runs whose attributes have these values."""
    return [r for r in runs if all(getattr(r, k) == v for k, v in values.items())]


def ranking_cautions(runs):
    """Sentences on runs of one setting that used different rankings by one metric, or a ranking by a network
    that was trained for other epochs than the runs. May be empty."""
    cautions = []
    for (metric,), same in grouped([r for r in runs if r.ranking], "metric").items():
        if (n := len({r.ranking for r in same})) > 1:
            cautions.append(f"Caution: the runs by {metric} used {n} different rankings.")
        epochs = same[0].setting["epochs"]
        cautions += [f"Caution: a ranking by {metric} is of a network of {k} epochs, its runs are of "
                     f"{epochs}." for k in sorted({r.ranking_epochs for r in same} - {0, epochs})]
    return " ".join(cautions)


def counted(n, noun):
    """A number of things as text: 1 class, 2 classes."""
    if n == 1:
        return f"{n:,} {noun}"
    return f"{n:,} {noun}es" if noun.endswith("s") else f"{n:,} {noun}s"
