"""The list of runs behind each figure of the paper, as the commands that make them, and their cost. SECTIONS
says which figures are made on which data, FIGURES which runs a figure shows, DATA how many there are, and
RATES how fast a GPU is."""
import argparse
import itertools
from dataclasses import dataclass, field

import runs
from common import HERE
from config import from_yaml
from flags import DEFAULTS, dests, script_parser

CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
EXTREMES = ["cat", "automobile"]  # CIFAR-10's hardest and easiest class
SHORT_EVALUATION = "--eval-attacks apgd-ce apgd-t --eval-n 200 --select-attacks apgd-ce"
LINF = "--norm linf --eps 0.031372549 --step-size 0.0078431373"  # 8/255 and 2/255


@dataclass(frozen=True)
class Data:
    """The runs on one data set. An amount of A is a fraction of the examples or a number of classes."""
    config: str
    dataset: str
    n_classes: int
    seeds: dict = field(default_factory=dict)  # {order, baseline, amount or class: seeds}, where not one
    esat: tuple = tuple(k / 10 for k in range(1, 10))  # amounts
    csat: tuple = ()
    single: tuple = ()             # Fig. 2 (the authors' has balanced): (--weight, --attack, classes)
    metrics: str = "entropy svar"  # of the ranking
    prefix: str = ""               # of the runs' names
    flags: str = ""                # more of them, for all runs


DATA = {
    "cifar10": Data("cifar10", "cifar10", 10, {"random": 10}, csat=range(1, 10),
                    single=(("balanced", "pgd", CIFAR10), ("vanilla", "pgd", EXTREMES))),
    "cifar100": Data("cifar100", "cifar100", 100, {"random": 5}, csat=range(10, 100, 10),
                     metrics="entropy svar vog"),
    "imagenet200": Data("imagenet200", "imagenet200", 200, {"random": 3}, csat=range(20, 200, 20)),
    "digits": Data("digits", "digits", 10, {"random": 2}, esat=(0.1, 0.3, 0.5), csat=(3, 5, 7),
                   single=(("balanced", "pgd", "0123456789"),), metrics="entropy svar vog", prefix="quick-",
                   flags=SHORT_EVALUATION),
    "digits0-4": Data("digits", "digits0-4", 5, {"random": 2}, esat=(0.1, 0.3, 0.5), csat=(1, 2, 3),
                      prefix="quick-", flags=SHORT_EVALUATION),
    # Three seeds where a verdict depends on them.
    "cifar10-cpu": Data("cifar10-cpu", "cifar10", 10, dict.fromkeys(["none", "full", 0.1, 0.5, *EXTREMES], 3),
                        esat=(0.1, 0.5, 0.3), prefix="cpu-",
                        single=(("balanced", "pgd", dict.fromkeys([*EXTREMES, *CIFAR10])),
                                ("vanilla", "pgd", EXTREMES), ("balanced", "pgd-authors", EXTREMES))),
    "cifar100-cpu": Data("cifar10-cpu", "cifar100", 100, {10: 3, 30: 3}, esat=(0.3, 0.1), csat=(10, 30),
                         metrics="entropy", prefix="cpu-"),
    "cifar10-cpu-linf": Data("cifar10-cpu", "cifar10", 10, esat=(0.5,), prefix="cpu-linf-", flags=LINF),
}
IMAGES = {  # training images, test images, pixels of a side
    "cifar10": (50000, 10000, 32), "cifar100": (50000, 10000, 32), "imagenet200": (259906, 10000, 224),
    "svhn": (73257, 26032, 32), "caltech256": (24485, 6122, 224), "flowers102": (1020, 1020, 224),
    "digits": (1297, 500, 8), "digits0-4": (649, 252, 8), "digits5-9": (648, 248, 8)}

MACHINE = "one NVIDIA H200 (PreActResNet-18, 32x32; bf16 and --compile in training)"
# What was measured on it: {(arch, side, batch size): ({|A|/N: ms of a training step with PGD-7}, passes of
# AutoAttack a second)}. The latter: all of AutoAttack takes about an hour for 9,000 robust examples.
RATES = {("preactresnet18", 32, 128): ({0: 6.5, 0.1: 11.3, 0.5: 11.3, 1: 13.9}, 24400)}
# Forward passes of an attack of AutoAttack on an example that stays robust. The first breaks most others.
PASSES = {"apgd-ce": 202, "apgd-t": 1818, "fab-t": 2737, "square": 5000}
ASSUMED_ROBUST_SHARE = 0.5  # of the test examples; without AT it is 0

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
USUAL = {"weight": "vanilla", "metric": "entropy", "attack": "pgd"}  # what a figure does not say
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
    title: str
    script: str
    folder: str
    needs: str       # the folder of the stage that must be made before, "" if there is none
    cost: "Cost"
    arguments: list


@dataclass(frozen=True)
class Cost:
    """What a stage costs, each as (training, evaluation)."""
    passes: tuple  # forward passes
    hours: tuple   # of MACHINE; None where no rate was measured


def cost(flag_values, dataset, plain_passes, share=0.0, attack_steps=0, robust_share=None):
    """The Cost of training on a data set by `flag_values`, {dest: value}, and of AutoAttack on the result.
    plain_passes: of an example and epoch, without attacks. share: |A|/N. robust_share: of the test examples,
    None if nothing is evaluated."""
    (n, n_test, side), epochs, evaluation = IMAGES[dataset], flag_values["epochs"], 0
    if robust_share is not None:  # 10 % of the test set select one of the candidates, 90 % are reported
        candidates = {epochs} | {decay + 1 for decay in flag_values["lr_decays"] if decay < epochs}
        for prefix, test_share, times in (("select", 0.1, len(candidates)), ("eval", 0.9, 1)):
            first, *others = (PASSES[attack] for attack in flag_values[f"{prefix}_attacks"])
            examples = min(flag_values[f"{prefix}_n"] or n_test, round(test_share * n_test))
            evaluation += times * examples * (first + robust_share * sum(others))
    all_passes = (n * epochs * (plain_passes + 2 * share * attack_steps), evaluation)
    rates = RATES.get((flag_values["arch"], side, flag_values["batch_size"]))
    if rates is None or flag_values["device"] == "cpu" or "off" in map(flag_values.get, ("amp", "compile")):
        return Cost(all_passes, (None, None))
    step_ms, evaluation_rate = rates
    # A pass of a ranking or a transfer, which were not timed, counts as a third of a step without attacks.
    ms = step_ms[0] * plain_passes / 3 + (interpolate(step_ms, share) - step_ms[0]) * attack_steps / 7
    return Cost(all_passes, (n * epochs / flag_values["batch_size"] * ms / 3.6e6,
                             evaluation / evaluation_rate / 3600))


def interpolate(values, x):
    """Linear interpolation at x between the points {x: value}, whose x rise."""
    for (low, a), (high, b) in itertools.pairwise(values.items()):
        if x <= high:
            return a + (b - a) * (x - low) / (high - low)


def runs_of(plan, choices):
    """Yields the runs of a figure, each as its flags of sat.py {flag: value}, baselines left out. choices:
    the figure's, of FIGURES."""
    split = choices["split"]
    if split == "single":
        for weight, attack, classes in plan.single:
            others = {} if attack == "pgd" else {"attack": attack}
            for c in classes:
                for seed in range(plan.seeds.get(c, 1)):
                    yield {"split": "csat", "classes": c, "weight": weight, "seed": seed, **others}
        return
    amounts, amount_flag = (plan.csat, "size") if split == "csat" else (plan.esat, "frac")
    for values in itertools.product(*(choices.get(flag, [usual]) for flag, usual in USUAL.items())):
        others = {flag: value for flag, value in zip(USUAL, values) if value != USUAL[flag]}
        for amount, order in itertools.product(amounts, choices["order"]):
            for seed in range(max(plan.seeds.get(amount, 1), plan.seeds.get(order, 1))):
                yield {"split": split, amount_flag: amount, "order": order, "seed": seed, **others}


def name_of(run):
    """The name that sat.py gives to a run of runs_of."""
    parts = [run[flag] for flag in ("split", "classes", "order", "frac", "size") if flag in run]
    parts += [run[flag] for flag in ("metric", "weight") if run.get(flag, USUAL[flag]) != USUAL[flag]]
    parts += [f"attack={run['attack']}"] if "attack" in run else []
    return "-".join(map(str, [*parts, f"seed{run['seed']}"]))


def ranking_name(config, extra_values):
    """The name of the ranking that rank.py makes with a config and further flags."""
    flag_values = DEFAULTS | from_yaml(config)
    base = {dest: flag_values[dest] for dest in dests("rank.py")}
    values = {dest: extra_values.get(dest, value) for dest, value in base.items()}
    args = argparse.Namespace(**{**values, "seed": 0, "base": base})
    return runs.run_name(args, ["rank", args.arch], {"arch", "metrics"})


def stages(sections, figures, results, extra_values):
    """Yields the stages of the figures in the sections (of all, if `figures` is empty), repeats included: for
    each its ranking, baselines, runs, and the transfers of these. results: their folder. extra_values: the
    flag values {dest: value} that EXTRA gives to all stages.
    """
    wanted = [(source, targets, name) for section in sections for source, targets, names in SECTIONS[section]
              for name in names.split() if not figures or name in figures]
    for source, targets, figure_name in wanted:
        plan, kind = DATA[source], FIGURES[figure_name]["split"]
        path = HERE / f"configs/{plan.config}.yaml"
        more_flags = plan.flags.split()
        more_values = vars(script_parser("sat.py", "", DEFAULTS).parse_args(more_flags)) | extra_values
        flag_values = DEFAULTS | from_yaml(path) | more_values
        base_flags = ["--config", str(path)]
        base_flags += ["--dataset", plan.dataset] if plan.dataset != flag_values["dataset"] else []
        ranking = f"{results}/{plan.dataset}/{ranking_name(path, extra_values)}"
        if kind != "single":
            passes = 5 if "vog" in plan.metrics else 4
            yield Stage(f"{source}: ranking (fig3)", "rank.py", ranking, "",
                        cost(flag_values, plan.dataset, passes),
                        [*base_flags, "--metrics", *plan.metrics.split()])
        if kind == "ranking":
            continue
        target_paths = [HERE / f"configs/transfer/{target}.yaml" for target in targets.split()]
        target_values = [DEFAULTS | from_yaml(path) | more_values for path in target_paths]
        baselines = [{"split": split, "seed": seed} for split in ("none", "full")
                     for seed in range(plan.seeds.get(split, 1))]
        title = f"{source} -> {targets}: {figure_name}" if targets else f"{source}: {figure_name}"
        for run in [*baselines, *runs_of(plan, FIGURES[figure_name])]:
            name = plan.prefix + name_of(run)
            folder = f"{results}/{plan.dataset}/{name}"
            words = ["--run", name] if plan.prefix else []
            words += [word for flag, value in run.items() for word in (f"--{flag}", str(value))]
            share = {"none": 0, "full": 1, "esat": run.get("frac"),
                     "csat": run.get("size", 1) / plan.n_classes}[run["split"]]
            steps = 1 if run.get("attack") == "fgsm-rs" else flag_values["steps"]
            robust_share = ASSUMED_ROBUST_SHARE if share else 0
            needs = ranking if run.get("order") in ("hardest", "easiest") else ""
            yield Stage(f"{source}: baselines" if run in baselines else title, "sat.py", folder,
                        needs, cost(flag_values, plan.dataset, 3, share, steps, robust_share),
                        [*base_flags, *words, *more_flags])
            for target_path, values in zip(target_paths, target_values):
                target, target_name = values["dataset"], f"{plan.dataset}-{name}-seed0"
                words = ["--config", str(target_path), "--run", target_name]
                yield Stage(title, "transfer.py", f"{results}/{target}/{target_name}", folder,
                            cost(values, target, 1, robust_share=robust_share),
                            [f"{folder}/best.pt", *words, *more_flags])


def overview(all_stages):
    """The runs (rankings too) and transfers of every figure, and the cost of the new ones, which no figure
    that comes before in SECTIONS has, as --dry-run prints them."""
    folders, new_costs, seen = {}, {}, set()
    for stage in all_stages:
        for title in (stage.title, "all"):
            of_title = folders.setdefault(title, {"runs": set(), "transfers": set()})
            of_title["transfers" if stage.script == "transfer.py" else "runs"].add(stage.folder)
            new_costs.setdefault(title, []).extend([] if stage.folder in seen else [stage.cost])
        seen.add(stage.folder)
    lines = [f"# GPU-hours: by the rates of {MACHINE}.",
             "# -: no rate was measured for this network and these images.",
             f"# AutoAttack: assumes {ASSUMED_ROBUST_SHARE:.0%} of the examples robust, none without AT.",
             f"# {'':<65} {'training':>18} {'evaluation':>18}",
             f"# {'figure':<42} {'runs':>6} {'transfers':>9} {'new':>5}" + " {:>8} {:>9}".format(
                 "passes", "GPU-hours") * 2]
    for title in [*sorted(folders.keys() - {"all"}), "all"]:
        n_runs, n_transfers = (len(folders[title][column]) for column in ("runs", "transfers"))
        line = f"# {title:<42} {n_runs:6d} {n_transfers:9d} {len(new_costs[title]):5d}"
        for phase in (0, 1):  # training, evaluation
            hours = [stage_cost.hours[phase] for stage_cost in new_costs[title]]
            text = "-" if None in hours else f"{sum(hours):.1f}"
            line += f" {sum(stage_cost.passes[phase] for stage_cost in new_costs[title]):8.3g} {text:>9}"
        lines.append(line)
    return lines
