"""The list of runs behind each figure of the paper, as the commands that make them.

SECTIONS says which figures are made on which data, FIGURES which runs a figure shows, and DATA how many there
are.
"""
import functools
import itertools
from dataclasses import dataclass, field

from common import HERE
from config import from_yaml

CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
ENDS = ["cat", "automobile"]  # CIFAR-10's hardest and easiest class
SHORT_EVALUATION = "--eval-attacks apgd-ce apgd-t --eval-n 200 --select-attacks apgd-ce"
read_config = functools.cache(from_yaml)  # a thousand stages share a few files
LINF = "--norm linf --eps 0.031372549 --step-size 0.0078431373"


def once(amounts):
    """{amount: one training seed}."""
    return dict.fromkeys(amounts, 1)


@dataclass(frozen=True)
class Data:
    """The runs on one data set. An amount of A is a fraction of the examples or a number of classes."""
    config: str
    dataset: str
    n_classes: int
    random: int = 1               # seeds of each random subset
    baselines: int = 1            # seeds of AT and no AT
    esat: dict = field(default_factory=lambda: once(k / 10 for k in range(1, 10)))  # {amount: seeds}
    csat: dict = field(default_factory=dict)
    single: tuple = ()            # Fig. 2 (the authors' has balanced): (--weight, --attack, {class: seeds})
    metrics: str = "entropy svar"  # of the ranking
    prefix: str = ""              # of the runs' names
    flags: str = ""


DATA = {
    "cifar10": Data("cifar10", "cifar10", 10, random=10, csat=once(range(1, 10)),
                    single=(("balanced", "pgd", once(CIFAR10)), ("vanilla", "pgd", once(ENDS)))),
    "cifar100": Data("cifar100", "cifar100", 100, random=5, csat=once(range(10, 100, 10)),
                     metrics="entropy svar vog"),
    "imagenet200": Data("imagenet200", "imagenet200", 200, random=3, csat=once(range(20, 200, 20))),
    "digits": Data("digits", "digits", 10, random=2, esat=once((0.1, 0.3, 0.5)), csat=once((3, 5, 7)),
                   single=(("balanced", "pgd", once("0123456789")),), metrics="entropy svar vog",
                   prefix="quick-", flags=SHORT_EVALUATION),
    "digits0-4": Data("digits", "digits0-4", 5, random=2, esat=once((0.1, 0.3, 0.5)), csat=once((1, 2, 3)),
                      prefix="quick-", flags=SHORT_EVALUATION),
    # Three seeds where a verdict depends on them.
    "cifar10-cpu": Data("cifar10-cpu", "cifar10", 10, baselines=3, esat={0.1: 3, 0.5: 3, 0.3: 1},
                        single=(("balanced", "pgd", {c: 3 if c in ENDS else 1 for c in [*ENDS, *CIFAR10]}),
                                ("vanilla", "pgd", {c: 3 for c in ENDS}),
                                ("balanced", "pgd-authors", {c: 3 for c in ENDS})), prefix="cpu-"),
    "cifar100-cpu": Data("cifar10-cpu", "cifar100", 100, esat={0.3: 1, 0.1: 1}, csat={10: 3, 30: 3},
                         metrics="entropy", prefix="cpu-"),
    # Another threat model, Linf 8/255, with one seed.
    "cifar10-cpu-linf": Data("cifar10-cpu", "cifar10", 10, esat={0.5: 1}, prefix="cpu-linf-", flags=LINF),
}
# Training images, by which costs are counted.
IMAGES = {"cifar10": 50000, "cifar100": 50000, "imagenet200": 259906, "svhn": 73257, "caltech256": 24485,
          "flowers102": 1020, "digits": 1297, "digits0-4": 649, "digits5-9": 648}


ORDERS = ["hardest", "easiest", "random"]
FIGURES = {  # what the runs of a figure are: every combination of these values of flags, for each amount of A
    "fig2": {"split": "single"},   # CSAT on a single class
    "fig3": {"split": "ranking"},  # no runs
    "fig5": {"split": "csat", "order": ORDERS},
    "fig6": {"split": "esat", "order": ORDERS},
    "fig7": {"split": "csat", "order": ["hardest"], "weight": ["vanilla", "balanced", "emphasis"]},
    "fig8": {"split": "esat", "order": ORDERS, "weight": ["emphasis"]},
    "fig12": {"split": "esat", "order": ["hardest"], "metric": ["entropy", "svar", "vog"]},
    "fig15": {"split": "csat", "order": ORDERS, "weight": ["emphasis"]},
    "fig16": {"split": "esat", "order": ["hardest"], "weight": ["emphasis"], "attack": ["fgsm-rs", "pgd"]},
}
FIGURES |= {"fig4": FIGURES["fig5"], "fig13": FIGURES["fig5"], "fig14": FIGURES["fig8"]}  # of the same runs
SECTIONS = {  # section: [(source, targets of the transfer, figures)]
    "cifar10": [("cifar10", "", "fig2 fig3 fig4 fig5 fig6 fig13")],
    "cifar100": [("cifar100", "", "fig5 fig6 fig12 fig13")],
    "imagenet200": [("imagenet200", "", "fig5 fig6 fig13")],
    "transfer": [("cifar100", "cifar10", "fig7 fig8 fig15 fig16"), ("cifar100", "svhn", "fig14"),
                 ("imagenet200", "caltech256 flowers102", "fig8 fig15 fig16")],
    "cifar10-cpu": [("cifar10-cpu", "", "fig2 fig3 fig6"), ("cifar100-cpu", "cifar10-cpu", "fig7 fig8"),
                    ("cifar10-cpu-linf", "", "fig6")],
    "digits": [("digits", "", "fig2 fig3 fig4 fig5 fig6 fig12 fig13"),
               ("digits0-4", "digits5-9", "fig7 fig8 fig14 fig15 fig16")],
}


@dataclass(frozen=True)
class Stage:
    """One command: a run of sat.py, a transfer of it, or a ranking."""
    figure: str
    script: str
    folder: str
    done: str        # the file that a finished stage has
    cost: float      # in forward passes
    arguments: list


USUAL = {"weight": "vanilla", "metric": "entropy", "attack": "pgd"}  # what a figure does not say


def runs_of(data, figure):
    """Yields the runs of a figure, each as its flags of sat.py {flag: value}, baselines left out."""
    split = figure["split"]
    if split == "single":
        for weight, attack, classes in data.single:
            others = {} if attack == "pgd" else {"attack": attack}
            for c, n in classes.items():
                for seed in range(n):
                    yield {"split": "csat", "classes": c, "weight": weight, "seed": seed, **others}
        return
    amounts, amount_flag = (data.csat, "size") if split == "csat" else (data.esat, "frac")
    for values in itertools.product(*(figure.get(flag, [usual]) for flag, usual in USUAL.items())):
        others = {flag: value for flag, value in zip(USUAL, values) if value != USUAL[flag]}
        for amount, n in amounts.items():
            for order in figure["order"]:
                for seed in range(max(n, data.random) if order == "random" else n):
                    yield {"split": split, amount_flag: amount, "order": order, "seed": seed, **others}


def run_name(run):
    """The name that sat.py gives to a run with these flags."""
    parts = [run[flag] for flag in ("split", "classes", "order", "frac", "size") if flag in run]
    parts += [run[flag] for flag in ("metric", "weight") if run.get(flag, USUAL[flag]) != USUAL[flag]]
    parts += [f"attack={run['attack']}"] if "attack" in run else []
    return "-".join(map(str, [*parts, f"seed{run['seed']}"]))


def passes_per_example(run, n_classes, steps):
    """The forward passes that a run trains with, on an example and epoch, by the cost model."""
    share = {"none": 0, "full": 1}.get(run["split"], run.get("frac"))
    if run["split"] == "csat":
        share = run.get("size", 1) / n_classes
    return 3 + 2 * share * (1 if run.get("attack") == "fgsm-rs" else steps)


def stages(sections, figures, results, extra):
    """Yields the stages of the figures in the sections (of all, if `figures` is empty), repeats included.

    results: the folder of results. extra: the flag values {dest: value} that EXTRA gives to all stages.
    """
    for section in sections:
        for source, targets, listed in SECTIONS[section]:
            for name in listed.split():
                if not figures or name in figures:
                    yield from figure_stages(source, targets, name, results, extra)


def figure_stages(source, targets, name, results, extra):
    """Yields the stages of a figure: the ranking, baselines, runs, and the transfers of each run."""
    data, figure = DATA[source], FIGURES[name]
    path = HERE / f"configs/{data.config}.yaml"
    setting = read_config(path) | extra
    base = ["--config", str(path)]
    base += ["--dataset", data.dataset] if data.dataset != setting["dataset"] else []
    evaluation, images = data.flags.split(), IMAGES[data.dataset] * setting["epochs"]
    title = f"{source} -> {targets}: {name}" if targets else f"{source}: {name}"
    if figure["split"] != "single":
        yield Stage(f"{source}: ranking (fig3)", "rank.py",
                    f"{results}/{data.dataset}/rank-{setting['arch']}-seed0", "rank.json",
                    images * (5 if "vog" in data.metrics else 4), [*base, "--metrics", *data.metrics.split()])
    if figure["split"] == "ranking":
        return
    baselines = [{"split": split, "seed": seed} for split in ("none", "full")
                 for seed in range(data.baselines)]
    for run in [*baselines, *runs_of(data, figure)]:
        name = data.prefix + run_name(run)
        folder = f"{results}/{data.dataset}/{name}"
        words = ["--run", name] if data.prefix else []
        words += [word for flag, value in run.items() for word in (f"--{flag}", str(value))]
        yield Stage(f"{source}: baselines" if run in baselines else title, "sat.py", folder, "result.json",
                    images * passes_per_example(run, data.n_classes, setting["steps"]),
                    [*base, *words, *evaluation])
        for target in targets.split():
            path = HERE / f"configs/transfer/{target}.yaml"
            onto, transfer = read_config(path) | extra, f"{data.dataset}-{name}-seed0"
            yield Stage(title, "transfer.py", f"{results}/{onto['dataset']}/{transfer}", "result.json",
                        IMAGES[onto["dataset"]] * onto["epochs"],
                        [f"{folder}/best.pt", "--config", str(path), "--run", transfer, *evaluation])


def overview(listed):
    """The runs, transfers, new runs and forward passes of every figure, as --dry-run prints them."""
    rows, seen = {}, set()
    for stage in listed:
        row = rows.setdefault(stage.figure, {"runs": set(), "transfers": set(), "new": 0, "cost": 0.0})
        row["transfers" if stage.script == "transfer.py" else "runs"].add(stage.folder)
        if stage.folder not in seen:
            seen.add(stage.folder)
            row["new"], row["cost"] = row["new"] + 1, row["cost"] + stage.cost
    return [f"# {'figure':<42} {'runs':>6} {'transfers':>9} {'new':>6} forward passes of the new ones, "
            "evaluation not counted",
            *(f"# {figure:<42} {len(r['runs']):6d} {len(r['transfers']):9d} {r['new']:6d} {r['cost']:10.3g}"
              for figure, r in sorted(rows.items()))]
