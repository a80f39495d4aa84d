"""Reads the results of finished runs, result.json and rank.json, checks them, and groups those that may stand
in one table."""
import csv
import glob
import io
import itertools
import json
from pathlib import Path

import numpy

from common import UserError, say
from runs import atomic, load

# Flags in which the runs of one table may differ, and those that change no more than a run's random numbers.
NOT_SETTING = {"split", "frac", "size", "classes", "order", "metric", "scores", "ranking", "subset", "weight",
               "weight_factor", "attack", "seed", "dataset", "eval_batch", "eval_precision", "source",
               "source_weights", "checkpoint"}
DESCRIBED = {"norm", "eps", "eval_attacks", "arch", "epochs", "N", "n"}  # in the name of every group


class Run:
    """A finished run of sat.py or transfer.py, from the content of its result.json. In a transfer, what is
    said of A and of training is its source's."""

    def __init__(self, path, result):
        source, target, evaluation = result.get("source"), result["args"], result["settings"]
        training = source or result
        args, ranking = training["args"], training.get("ranking") or {}
        self.path = str(path.parent)
        self.transfer = bool(source)
        self.dataset = target["dataset"]  # or source->target
        # Of training: float32, bf16 or bf16+float32. Older transfers say only the head's.
        self.precision = training.get("precision", result.get("precision", "float32"))
        self.seed = args["seed"]
        self.head_seed = target["seed"] if source else 0
        self.split, self.attack = args["split"], args["attack"]
        self.metric = args["metric"]  # or "own <file> <its hash>"
        self.weight = args["weight"]  # or "w_A <number>"
        # --order, or "named" if A was given by class names or a file.
        self.order = "named" if args["classes"] or args.get("subset") else args["order"]
        if self.order in ("random", "redrawn"):
            self.metric = "entropy"  # no metric is used; this value puts them beside the runs by entropy
        elif file_hash := args.get("scores") or args.get("ranking") or args.get("subset"):
            self.metric = f"own {ranking.get('file', 'file')} {file_hash}"
        if args["weight_factor"]:
            self.weight = f"w_A {args['weight_factor']:g}"
        self.n_A, self.N, self.w_A = training["A"], training["N"], training["w_A"]
        self.A_classes = tuple(training["A_classes"] or ())
        self.n_classes = len(training["fingerprint"]["classes"])
        self.cost = training["cost"]["forward_equivalents"]
        self.weights_hash = training["weights"]  # hash of the network's
        self.scores_hash = ranking.get("scores", "")  # hash of the scores that chose A
        self.images_hash = result["fingerprint"].get("images")  # old results lack it
        self.epoch = result["epoch"]  # of the checkpoint that was selected
        self.decays = sum(self.epoch > decay for decay in target["lr_decays"])  # of the learning rate, so far
        self.last_accuracies = last_accuracies(path.parent, result)
        self.in_table = False  # of the report; tables.py sets it
        # {part: {kind: {"n", "accuracy", "low", "high"}}}, "classes": {class: {kind: the same and "right"}}
        self.accuracy = result["accuracy"]
        # What must agree for two runs to stand in one table, {flag: value} with N, n, "labels" (a hash) and,
        # in a transfer, "target's <flag>"; `group_name` is its text.
        self.setting = {"N": self.N, **{k: v for k, v in args.items() if k not in NOT_SETTING},
                        "n": self.accuracy["all"]["robust"]["n"], "norm": evaluation["norm"],
                        "eps": evaluation["eps"], "eval_attacks": sorted(evaluation["attacks"]),
                        "labels": result["fingerprint"]["labels"]}
        if "precision" in evaluation:  # it is float32 in results that lack it
            self.setting["eval_precision"] = evaluation["precision"]
        if training.get("processes", 1) > 1:  # each has batch statistics of its own
            self.setting["processes"] = training["processes"]
        if source:
            self.dataset = f"{source['dataset']}->{self.dataset}"
            self.setting |= {f"target's {k}": v for k, v in target.items() if k not in NOT_SETTING}
            self.setting |= {f"source's {k}": args[k] for k in ("norm", "eps")}
        # 8/255 and 0.031372549 are one eps.
        self.setting = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in self.setting.items()}
        self.group_name = json.dumps(self.setting, sort_keys=True)

    @property
    def size(self):
        """|A|, counted in classes or in examples."""
        return len(self.A_classes) or self.n_A

    @property
    def share(self):
        """|A|/N, counted in classes or in examples."""
        return len(self.A_classes) / self.n_classes if self.A_classes else self.n_A / self.N

    @property
    def conditions(self):
        """The setting without the labels' hash: what must agree before runs on two data sets are compared."""
        return {k: v for k, v in self.setting.items() if k != "labels"}

    @property
    def configuration(self):
        """Everything that identifies the run except its seeds, over which results are averaged."""
        names = self.A_classes if self.order == "named" else ()
        return (self.dataset, self.group_name, self.transfer, self.split, self.order, self.metric,
                self.weight, self.attack, self.size, names)

    def right(self, kind, c):
        """Which test examples of class c were classified correctly, as bool (n,), in their order."""
        a = self.accuracy["classes"][c][kind]
        packed = numpy.frombuffer(bytes.fromhex(a["right"]), numpy.uint8)
        return numpy.unpackbits(packed, count=a["n"]).astype(bool)


def last_accuracies(folder, result):
    """A run's accuracies after the last epoch, {"n", "clean", "robust"}, on the examples that select a
    checkpoint, from its log.jsonl. None if there is no log."""
    log = folder / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return {row["epoch"]: row.get("selection") for row in rows}.get(result["args"]["epochs"])


def result_files(folder, name):
    """The files below `folder` that match the pattern `name`, through links to folders too, except those in
    hidden folders: .old-<run>, which --force put aside."""
    return sorted(Path(folder, path) for path in glob.glob(f"**/{name}", root_dir=folder, recursive=True))


def read_runs(folder):
    """All Runs below `folder`, repeated ones included."""
    runs = []
    for path in result_files(folder, "result.json"):
        try:
            runs.append(Run(path, load(path)))
        except UserError:  # which is a ValueError too
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as e:  # or its log.jsonl
            raise UserError(f"{path} is not a result of this project ({e!r}): move its folder away") from None
    return runs


def read_rankings(folder):
    """{path: content} of every rank.json below `folder`."""
    keys = ("classes_hardest_first", "spearman_of_examples", "scores", "fingerprint", "args")
    return {path: load(path, keys) for path in result_files(folder, "rank.json")}


def without_repeats(runs):
    """The runs without those that have the flags and seed of another, which would count as several seeds. The
    float32 run is preferred; of several heads on one network, the one with the least seed."""
    runs_by_worth = sorted(runs, key=lambda r: (r.precision != "float32", r.head_seed))
    equal_runs = grouped(runs_by_worth, "configuration", "seed").values()
    repeats = {r: first for first, *others in equal_runs for r in others}
    if repeats:
        r, first = next(iter(repeats.items()))
        say(f"note: {len(repeats)} runs have the flags and seed of another and are left out; the first: "
            f"{r.path} ({r.precision}) repeats {first.path} ({first.precision})")
    return [r for r in runs if r not in repeats]


def name_groups(runs):
    """Makes the name of each run's group readable: its most important settings, and those in which it differs
    from other groups of the same data and name."""
    for data_runs in grouped(runs, "dataset").values():
        groups = list(grouped(data_runs, "group_name").values())
        settings = [group[0].setting for group in groups]
        names = [setting_as_text(setting) for setting in settings]
        for group, setting, name in zip(groups, settings, names):
            same_name = [other for other, its_name in zip(settings, names) if its_name == name]
            name += "".join(f", {k.replace('_', ' ')} {v}" for k, v in setting.items()
                            if k not in DESCRIBED and any(other.get(k) != v for other in same_name))
            n_bf16 = sum(r.precision != "float32" for r in group)
            if n_bf16:
                count_text = f"{n_bf16} of {len(group)} runs " if n_bf16 < len(group) else ""
                name += f", {count_text}trained in bf16"
            for r in group:
                r.group_name = name


def setting_as_text(setting):
    """The threat model, the attacks and the size of a setting."""
    attack, attacks = "AutoAttack", setting["eval_attacks"]
    if len(set(attacks)) < 4:
        attack = f"AutoAttack's {' and '.join(attacks)}"
    return (f"{setting['norm']} eps {setting['eps']:g}, {attack}, n = {setting['n']:,}, {setting['arch']}, "
            f"{setting['epochs']} epochs, N = {setting['N']:,}")


def add_source_accuracies(runs):
    """Gives each transfer the accuracies of its source, as parts "source ..."."""
    sources = {r.weights_hash: r.accuracy for r in pick(runs, transfer=False)}
    for r in pick(runs, transfer=True):
        of_source = sources.get(r.weights_hash, {})
        r.accuracy |= {f"source {part}": accuracy for part, accuracy in of_source.items()}


def grouped(runs, *keys):
    """{(values of the attributes `keys`): [runs]}, in the order of the runs."""
    groups = {}
    for r in runs:
        groups.setdefault(tuple(getattr(r, k) for k in keys), []).append(r)
    return groups


def pick(runs, **values):
    """The runs whose attributes have these values."""
    return [r for r in runs if all(getattr(r, k) == v for k, v in values.items())]


def ranking_cautions(runs, rankings):
    """Cautions, one sentence each: runs were made on different images; the runs by a metric used different
    rankings; runs used a ranking that is missing although their data have others; some transfers, but not
    all, lack their source among the runs. May be empty. rankings: from read_rankings."""
    by_metric = grouped([r for r in runs if r.scores_hash], "metric")
    cautions = []
    if len({(r.dataset, r.images_hash) for r in runs if r.images_hash}) > len({r.dataset for r in runs}):
        cautions.append("Caution: these runs were made on different images, which only have the same labels.")
    for (metric,), metric_runs in by_metric.items():
        n_rankings = len({r.scores_hash for r in metric_runs})
        if n_rankings > 1:
            cautions.append(f"Caution: the runs by {metric} used {n_rankings} different rankings.")
    hashes = {}  # {data set: the hashes of its scores that are there}
    for ranking in rankings.values():
        hashes.setdefault(ranking["fingerprint"]["name"], set()).update(ranking["scores"].values())
    outdated = [r for r in runs if r.scores_hash and not r.metric.startswith("own")
                and r.scores_hash not in hashes.get(r.dataset.split("->")[0], {r.scores_hash})]
    if outdated:
        cautions.append(f"Caution: the ranking of {len(outdated)} of these runs is no longer there "
                        f"(the first: {outdated[0].path}).")
    lost = [r for r in runs if r.transfer and "source all" not in r.accuracy]
    if 0 < len(lost) < sum(r.transfer for r in runs):
        cautions.append(f"Caution: the source of {len(lost)} of these transfers is no longer there, as after "
                        f"--force (the first: {lost[0].path}).")
    return " ".join(cautions)


def write_csv(path, runs):
    """Writes a tidy row for each run, as pandas.read_csv wants it. Accuracies in percent."""
    rows = []
    for r in runs:
        ordered = r.split in ("csat", "esat")
        by_scores = ordered and r.order in ("hardest", "easiest")
        row = {"run": r.path, "data": r.dataset, "split": r.split, "A": r.n_A, "N": r.N, "share": r.share,
               "order": r.order if ordered else "", "classes": ";".join(r.A_classes),
               "metric": r.metric if by_scores or r.metric.startswith("own") else "",
               "weight": r.weight if ordered else "", "w_A": r.w_A, "attack": r.attack if r.n_A else "",
               "seed": r.seed, "head_seed": r.head_seed if r.transfer else "",
               **{k: r.setting.get(k, "") for k in ("arch", "epochs", "norm", "eps", "n")},
               "head_epochs": r.setting.get("target's epochs", ""),
               "eval_attacks": " ".join(r.setting["eval_attacks"]), "precision": r.precision,
               "forward_passes": r.cost, "selected_epoch": r.epoch,
               **{f"last_epoch_{k}": "" for k in ("n", "robust", "clean")}}
        if r.last_accuracies:  # in percent, as all accuracies
            row |= {f"last_epoch_{k}": v if k == "n" else round(100 * v, 4)
                    for k, v in r.last_accuracies.items()}
        for part, kind in itertools.product(("all", "A_val", "B_val"), ("robust", "clean")):
            accuracy = r.accuracy.get(part, {}).get(kind, {"accuracy": None})
            name = kind if part == "all" else f"{kind}_{part}"
            row[name] = "" if accuracy["accuracy"] is None else round(100 * accuracy["accuracy"], 4)
            if part == "all":
                row |= {f"{kind}_{end}": round(100 * accuracy[end], 4) for end in ("low", "high")}
        rows.append(row)
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    atomic(path, lambda f: f.write(text.getvalue().encode()))
