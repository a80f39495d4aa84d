"""Makes every run of the paper's figures, then the report. Finished runs are skipped: it can be stopped at
any time and started again.

    ./run_all.sh digits                    each figure in small, on the embedded data, on a CPU
    ./run_all.sh cifar10-cpu               the paper's claims on all of CIFAR-10 and -100, at a size for a CPU
    ./run_all.sh cifar10 fig2 fig6         some figures of a section, at the paper's settings
    ./run_all.sh --dry-run all             print every command, the runs of each figure and their cost
    NPROC=4 ./run_all.sh cifar10           each run on 4 GPUs (or processes) of this machine, by torchrun

Sections: cifar10 cifar100 imagenet200 transfer cifar10-cpu digits, or all. Figures of them may follow;
without any, all are made. Environment: RESULTS and DATA (folders), NPROC, PYTHON, EXTRA (flags for all runs,
for instance EXTRA="--epochs 2", except those by which runs differ). Several copies may share a results
folder, one a GPU, also on several machines if its file system has flock: each run is made once, a transfer
waits for its source, and a run whose copy died is taken over.
"""
import fcntl
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import flags

HERE = Path(__file__).resolve().parent
TEN = "airplane automobile bird cat deer dog frog horse ship truck".split()
ENDS = ["cat", "automobile"]  # the hardest and the easiest class
TENTHS = {k / 10: 1 for k in range(1, 10)}

# The runs on each data set. esat, csat: {amount: training seeds}, the amount of A being a fraction of the
# examples or a number of classes. single: {weight: {class: training seeds}}; Fig. 2 is "balanced" in the
# authors' config. random: seeds of each random subset. baselines: seeds of AT and no AT. metrics: of the
# ranking. config: if it is not the data set's name. prefix: of the runs' names.
PAPER = {"esat": TENTHS, "baselines": 1, "metrics": "entropy svar", "prefix": ""}
DIGITS = {**PAPER, "config": "digits", "random": 2, "prefix": "quick-", "esat": {0.1: 1, 0.3: 1, 0.5: 1},
          "flags": "--eval-attacks apgd-ce apgd-t --eval-n 200 --select-attacks apgd-ce"}
CPU = {**PAPER, "config": "cifar10-cpu", "random": 1, "prefix": "cpu-"}
DATASETS = {
    "cifar10": {**PAPER, "n_classes": 10, "random": 10,
                "csat": {k: 1 for k in range(1, 10)},
                "single": {"balanced": {c: 1 for c in TEN}, "vanilla": {c: 1 for c in ENDS}}},
    "cifar100": {**PAPER, "n_classes": 100, "random": 5, "metrics": "entropy svar vog",
                 "csat": {k: 1 for k in range(10, 100, 10)}},
    "imagenet200": {**PAPER, "n_classes": 200, "random": 3, "csat": {k: 1 for k in range(20, 200, 20)}},
    "digits": {**DIGITS, "n_classes": 10, "metrics": "entropy svar vog",
               "csat": {3: 1, 5: 1, 7: 1}, "single": {"balanced": {str(c): 1 for c in range(10)}}},
    "digits0-4": {**DIGITS, "n_classes": 5, "csat": {1: 1, 2: 1, 3: 1}},
    # Three seeds where a verdict depends on them.
    "cifar10-cpu": {**CPU, "dataset": "cifar10", "n_classes": 10, "baselines": 3,
                    "esat": {0.1: 3, 0.5: 3, 0.3: 1},
                    "single": {"balanced": {c: 3 if c in ENDS else 1 for c in [*ENDS, *TEN]},
                               "vanilla": {c: 3 for c in ENDS}}},
    "cifar100-cpu": {**CPU, "dataset": "cifar100", "n_classes": 100, "metrics": "entropy",
                     "csat": {10: 3, 30: 3}, "esat": {0.3: 1, 0.1: 1}},
    # Another threat model, Linf 8/255, with one seed.
    "cifar10-cpu-linf": {**CPU, "dataset": "cifar10", "n_classes": 10, "esat": {0.5: 1},
                         "prefix": "cpu-linf-",
                         "flags": "--norm linf --eps 0.031372549 --step-size 0.0078431373"},
}
# Training images, by which costs are counted.
IMAGES = {"cifar10": 50000, "cifar100": 50000, "imagenet200": 259906, "svhn": 73257, "caltech256": 24485,
          "flowers102": 1020, "digits": 1297, "digits0-4": 649, "digits5-9": 648}
FIGURES = {  # --split, orders, and the flags whose values the figure compares
    "fig2": ("single", [], {}),
    "fig3": ("ranking", [], {}),
    "fig5": ("csat", ["hardest", "easiest", "random"], {}),
    "fig6": ("esat", ["hardest", "easiest", "random"], {}),
    "fig7": ("csat", ["hardest"], {"weight": ["vanilla", "balanced", "emphasis"]}),
    "fig8": ("esat", ["hardest", "easiest", "random"], {"weight": ["emphasis"]}),
    "fig12": ("esat", ["hardest"], {"metric": ["entropy", "svar", "vog"]}),
    "fig15": ("csat", ["hardest", "easiest", "random"], {"weight": ["emphasis"]}),
    "fig16": ("esat", ["hardest"], {"weight": ["emphasis"], "attack": ["fgsm-rs", "pgd"]}),
}
# The flags by which the runs differ, and those with a variable of their own: EXTRA may not have them.
OWN = ("--dataset", "--split", "--frac", "--size", "--classes", "--order", "--metric", "--metrics",
       "--scores", "--weight", "--weight-factor", "--attack", "--seed", "--run", "--results", "--data-dir")
SAME = {"fig4": "fig5", "fig13": "fig5", "fig14": "fig8"}  # figures that show the same runs
SECTIONS = {  # section: (source, targets of the transfer, figures)
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


def runs_of(d, name):
    """The runs of sat.py in a figure: (name, |A|/N, --attack, flags)."""
    split, orders, compared = FIGURES[name]
    if split == "single":
        tags = {weight: "" if weight == "vanilla" else f"-{weight}" for weight in d["single"]}
        return [(f"csat-{c}{tags[weight]}-seed{seed}", 1 / d["n_classes"], "pgd",
                 ["--split", "csat", "--classes", c, "--weight", weight, "--seed", str(seed)])
                for weight, classes in d["single"].items() for c, seeds in classes.items()
                for seed in range(seeds)]
    rows = []
    plain = {"weight": "vanilla", "metric": "entropy", "attack": "pgd"}
    weights, metrics, attacks = (compared.get(flag, [plain[flag]]) for flag in plain)
    for how in ({"weight": w, "metric": m, "attack": a} for w in weights for m in metrics for a in attacks):
        told = {flag: value for flag, value in how.items() if value != plain[flag]}
        tag = "".join(f"-{told[flag]}" for flag in ("metric", "weight") if flag in told)
        tag += f"-attack={told['attack']}" if "attack" in told else ""  # as sat.py names its runs
        for amount, seeds in d.get(split, {}).items():
            share, sized = (amount / d["n_classes"], "--size") if split == "csat" else (amount, "--frac")
            for order in orders:
                for seed in range(max(seeds, d["random"]) if order == "random" else seeds):
                    words = ["--split", split, sized, str(amount), "--order", order, "--seed", str(seed)]
                    words += [word for flag, value in told.items() for word in (f"--{flag}", value)]
                    rows.append((f"{split}-{order}-{amount}{tag}-seed{seed}", share, how["attack"], words))
    return rows


def stages(sections, wanted, results, extra={}):
    """Every stage of the figures, repeats included: (figure, script, folder, the file that a finished stage
    has, cost in forward passes, arguments). extra: the flag values that EXTRA gives to all of them."""
    for source, targets, figures in (part for s in sections for part in SECTIONS[s]):
        d = DATASETS[source]
        config, dataset, prefix = d.get("config", source), d.get("dataset", source), d["prefix"]
        base = ["--config", str(HERE / f"configs/{config}.yaml")]
        setting = {**flags.from_yaml(base[1]), **extra}
        base += [] if dataset == setting["dataset"] else ["--dataset", dataset]
        evaluation, seen = d.get("flags", "").split(), IMAGES[dataset] * setting["epochs"]

        def train(figure, name, share, attack, how):
            """A run of sat.py, and its transfers."""
            run = ["--run", prefix + name] if prefix else []
            passes = 3 + 2 * flags.attack_steps(attack, setting["steps"]) * share  # the cost model
            yield (figure, "sat.py", f"{results}/{dataset}/{prefix}{name}", "result.json",
                   seen * passes, [*base, *run, *how, *evaluation])
            for target in targets.split():
                path, folder = HERE / f"configs/transfer/{target}.yaml", f"{dataset}-{prefix}{name}-seed0"
                onto = {**flags.from_yaml(path), **extra}
                yield (figure, "transfer.py", f"{results}/{onto['dataset']}/{folder}", "result.json",
                       IMAGES[onto["dataset"]] * onto["epochs"],
                       [f"{results}/{dataset}/{prefix}{name}/best.pt", "--config", str(path), "--run", folder,
                        *evaluation])

        for shown in (f for f in figures.split() if not wanted or f in wanted):
            name, figure = SAME.get(shown, shown), f"{source}{' -> ' * bool(targets)}{targets}: {shown}"
            if name != "fig2":
                yield (f"{source}: ranking (fig3)", "rank.py",
                       f"{results}/{dataset}/rank-{setting['arch']}-seed0", "rank.json",
                       seen * (5 if "vog" in d["metrics"] else 4),
                       [*base, "--metrics", *d["metrics"].split()])
            if name != "fig3":
                for split, share in (("none", 0), ("full", 1)):
                    for seed in range(d["baselines"]):
                        for stage in train(figure, f"{split}-seed{seed}", share, "pgd",
                                           ["--split", split, "--seed", str(seed)]):
                            yield (f"{source}: baselines", *stage[1:]) if stage[1] == "sat.py" else stage
                for run in runs_of(d, name):
                    yield from train(figure, *run)


def summary(listed):
    """The runs, transfers, new runs and forward passes of every figure, as --dry-run prints them."""
    rows, seen = {}, set()
    for figure, script, folder, _, cost, _ in listed:
        row = rows.setdefault(figure, {"runs": set(), "transfers": set(), "new": 0, "cost": 0.0})
        row["transfers" if script == "transfer.py" else "runs"].add(folder)
        if folder not in seen:
            row["new"], row["cost"] = row["new"] + 1, row["cost"] + cost
        seen.add(folder)
    lines = [f"# {'figure':<42} {'runs':>6} {'transfers':>9} {'new':>6} forward passes of the new ones, "
             "evaluation not counted"]
    return lines + [f"# {f:<42} {len(r['runs']):6d} {len(r['transfers']):9d} {r['new']:6d} {r['cost']:10.3g}"
                    for f, r in sorted(rows.items())]


class Stage:
    """A stage, which is made by the copy of this script that first locks its log, results/logs/<folder>.log.

    The kernel drops the lock when the last process that holds it ends, the stage's own included: the run of a
    copy that was killed is neither lost nor made twice.
    """

    def __init__(self, results, folder, done, command, source=None):
        self.done, self.command = Path(folder, done), command
        self.source = source and Path(source).with_name("result.json")
        self.seed = int(re.search(r"-seed(\d+)", folder)[1])  # of a transfer its source's
        self.log = Path(results, "logs", str(Path(folder).relative_to(results)).replace("/", "_") + ".log")

    def make(self, wait=False):
        """Runs the command unless the stage is finished. When another copy makes this stage or its source, it
        waits for that copy if told to `wait`, else returns False. It always waits for rankings."""
        if self.source and not self.source.exists() and not wait:
            return False
        wait = wait or self.done.name == "rank.json"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return False
            if self.done.exists():
                return True
            print(f"\n> {shlex.join(self.command)}", flush=True)
            process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                       pass_fds=[log.fileno()])
            for line in process.stdout:
                sys.stdout.buffer.write(line)
                sys.stdout.flush()
                log.write(line)
                log.flush()
            if process.wait() in (130, 143, -2, -15):
                raise KeyboardInterrupt
        return True


def mistake(text):
    """Ends the script with one line on a user's mistake."""
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def command_line(argv):
    """Parses the words: (sections, figures, whether it only prints). Exits with one line on a mistake."""
    words = [w for w in argv if w != "--dry-run"]
    known = [*SECTIONS, "all", *FIGURES, *SAME]
    unknown = [w for w in words if w not in known]
    sections = [s for w in words for s in (SECTIONS if w == "all" else [w]) if s in SECTIONS]
    if "--help" in words or "-h" in words:
        print(__doc__.strip())
        sys.exit(0)
    if unknown or not sections:
        wrong = f"there is no section or figure {unknown[0]!r}" if unknown else "name a section"
        figures = " ".join([*FIGURES, *SAME])
        mistake(f"{wrong}; valid: {' '.join(SECTIONS)} all, then {figures}, and --dry-run")
    for figure in (w for w in words if w in FIGURES or w in SAME):
        having = [name for name, parts in SECTIONS.items() if any(figure in p[2].split() for p in parts)]
        if not set(having) & set(sections):
            mistake(f"{' '.join(sections)} has no {figure}; it is in: {' '.join(having)}")
    return list(dict.fromkeys(sections)), [w for w in words if w in FIGURES or w in SAME], "--dry-run" in argv


def extra_flags(text):
    """The words of EXTRA, and the values {dest: value} that they give. Exits with one line on a mistake."""
    parser = flags.Parser(prog="sat.py", add_help=False)
    flags.add_flags(parser, *flags.FLAGS)
    try:
        words = shlex.split(text)
        args = parser.parse_args(words)
    except ValueError as e:  # UserError too
        mistake(f"EXTRA: {e}")
    if own := [flag for flag in OWN if flags.given(words, flag)]:
        mistake(f"EXTRA: {own[0]} differs between the runs, so run_all.sh sets it (folders: RESULTS, DATA)")
    return words, {k: v for k, v in vars(args).items() if flags.given(words, f"--{k.replace('_', '-')}")}


def main(argv):
    """Lists the stages, then either prints them or makes them and the report."""
    sections, wanted, dry = command_line(argv)
    results, data = os.environ.get("RESULTS", "results"), os.environ.get("DATA", "data")
    python, nproc = os.environ.get("PYTHON", sys.executable), os.environ.get("NPROC", "1")
    extra, values = extra_flags(os.environ.get("EXTRA", ""))
    listed = list(stages(sections, wanted, results, values))
    if not re.fullmatch("[1-9][0-9]*|auto|cpu|gpu", nproc):
        mistake(f"NPROC={nproc}: give the number of processes, 1 or more")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", nproc, "--"]
    torchrun = [] if nproc == "1" else torchrun
    todo = {}
    for _, script, folder, done, _, how in listed:  # each once, where it is first needed
        how = [*how, *flags.known(extra, script)]
        if extra and script == "sat.py" and "--run" not in how:  # sat.py would put them into the name
            how += ["--run", Path(folder).name]
        command = [python, *torchrun, str(HERE / script), *how, "--results", results, "--data-dir", data]
        todo.setdefault(folder, Stage(results, folder, done, command,
                                      how[0] if script == "transfer.py" else None))
    report = [python, str(HERE / "report.py"), "--results", results]
    if dry:
        print("\n".join([*(shlex.join(stage.command) for stage in todo.values()), shlex.join(report),
                         *summary(listed)]))
        return 0
    in_order = sorted(todo.values(), key=lambda stage: stage.seed)  # cut short, it has one seed of everything
    for stage in [stage for stage in in_order if not stage.make()]:
        stage.make(wait=True)  # when the other copy is through, the stage is finished, or taken over
    return finish(listed, report)


def finish(listed, report):
    """Makes the report; says which stages are missing. Returns the exit code."""
    code = subprocess.run(report).returncode
    missing = {folder: done for _, _, folder, done, *_ in listed if not Path(folder, done).exists()}
    if missing:
        print(f"\n{len(missing)} missing (what each said is in its log):", *(f"  {f}" for f in missing),
              sep="\n", file=sys.stderr)
    return 1 if missing or code else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("stopped; started again, it goes on from here", file=sys.stderr)
        sys.exit(130)
    except OSError as e:
        print(f"error: {e} (RESULTS=FOLDER names another folder for the results)", file=sys.stderr)
        sys.exit(2)
