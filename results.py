"""Reads the results of finished runs, checks them, and sorts them into tables, for claims.py and report.py.

It does not import torch. Files in: result.json and rank.json below a results folder.
"""
import collections
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from common import UserError, say
from runs import read_json

# Flags in which the runs of one table may differ.
SUBSET = {"split", "frac", "size", "classes", "order", "metric", "scores", "weight", "weight_factor",
          "attack", "seed"}
# Flags that are not compared when runs are sorted into tables.
NOT_SETTING = {"dataset", "eval_batch", "source", "source_weights", "checkpoint", "seed"}
DESCRIBED = {"norm", "eps", "eval_attacks", "arch", "epochs", "N", "n"}  # in the name of every group


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
    ranking_epochs: int  # of the network that made them; 0 for scores from a file
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
        setting |= {f"source's {k}": args[k] for k in ("norm", "eps")}  # norm and eps are the evaluation's
        data = f"{source['dataset']}->{data}"
    ranking = made.get("ranking") or {}
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
        cost=made["cost"]["forward_equivalents"], ranking=ranking.get("scores", ""),
        ranking_epochs=ranking.get("epochs", 0), weights=made["weights"], accuracy=result["accuracy"])


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
            runs.append(run_of(path, read_json(path)))
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


def rankings_to_doubt(runs):
    """Sentences on runs of one setting: on different rankings by one metric, and on a ranking by a network
    that was trained for other epochs than the runs. May be empty."""
    said = []
    for (metric,), same in grouped([r for r in runs if r.ranking], "metric").items():
        if (n := len({r.ranking for r in same})) > 1:
            said.append(f"Caution: the runs by {metric} used {n} different rankings.")
        epochs = same[0].setting["epochs"]
        said += [f"Caution: a ranking by {metric} is of a network of {k} epochs, its runs are of {epochs}."
                 for k in sorted({r.ranking_epochs for r in same} - {0, epochs})]
    return " ".join(said)


def rankings(results):
    """{path: content} of every rank.json below the folder `results`."""
    ranks = {path: read_json(path) for path in found(results, "rank.json")}
    needed = {"classes_hardest_first", "spearman_of_examples", "fingerprint", "args"}
    for path, r in ranks.items():
        if not isinstance(r, dict) or not needed <= set(r):
            raise UserError(f"{path} is not a ranking of this project: move it away, "
                            "or repeat it with rank.py --force")
    return ranks
