"""Runs as processes: stopped, killed, resumed, several at once, and the list of all runs.

    python -m pytest -q test_runs.py
"""
import copy
import functools
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common
import data as data_
import flags
import models
import rank
import report
import results
import run_all
import sat
import subset
import transfer
import runs
from common import UserError
from conftest import HERE, QUICK, script, KILLER, CHAIN, run_stage, contents


def dry_run(*argv, **env):
    """The commands of ./run_all.sh --dry-run as [(script, argv)], and its summary
    {figure: [runs, transfers, new]}."""
    out = subprocess.run([str(HERE / "run_all.sh"), "--dry-run", *argv], capture_output=True, text=True,
                         check=True, env={**os.environ, **env}).stdout
    lines = [shlex.split(line) for line in out.splitlines() if not line.startswith("#")]
    counts = [line[2:].rsplit(maxsplit=4) for line in out.splitlines()
              if line.startswith("# ") and ":" in line.split("(")[0]]
    return [(Path(w[1]).name, w[2:]) for w in lines], {c[0].strip(): [int(v) for v in c[1:4]] for c in counts}


# [runs of sat.py, transfers], each: (hardest + easiest + random subsets) x nine sizes, unless said
COUNTS = {
    "cifar10: baselines": [2, 0], "cifar10: fig2": [10 + 2, 0],  # one run a class, and two with w_A = 1
    "cifar10: fig4": [9 * (2 + 10), 0], "cifar10: fig5": [9 * (2 + 10), 0],
    "cifar10: fig6": [9 * (2 + 10), 0], "cifar10: fig13": [9 * (2 + 10), 0],
    "cifar100: baselines": [2, 0], "cifar100: fig5": [9 * (2 + 5), 0], "cifar100: fig6": [9 * (2 + 5), 0],
    "cifar100: fig13": [9 * (2 + 5), 0],
    "cifar100: fig12": [9 * 3, 0],  # hardest, three metrics
    "imagenet200: baselines": [2, 0], "imagenet200: fig5": [9 * (2 + 3), 0],
    "imagenet200: fig6": [9 * (2 + 3), 0], "imagenet200: fig13": [9 * (2 + 3), 0],
    # hardest, three weights; + 2: the transfers of both baselines
    "cifar100 -> cifar10: fig7": [9 * 3, 9 * 3 + 2],
    "cifar100 -> cifar10: fig8": [9 * (2 + 5), 9 * (2 + 5) + 2],
    "cifar100 -> svhn: fig14": [9 * (2 + 5), 9 * (2 + 5) + 2],
    "cifar100 -> cifar10: fig15": [9 * (2 + 5), 9 * (2 + 5) + 2],
    "cifar100 -> cifar10: fig16": [9 * 2, 9 * 2 + 2],  # hardest, PGD-7 and FGSM-RS
    "imagenet200 -> caltech256 flowers102: fig8": [9 * (2 + 3), 2 * (9 * (2 + 3) + 2)],  # two targets
    "imagenet200 -> caltech256 flowers102: fig15": [9 * (2 + 3), 2 * (9 * (2 + 3) + 2)],
    "imagenet200 -> caltech256 flowers102: fig16": [9 * 2, 2 * (9 * 2 + 2)],
    "cifar10: ranking (fig3)": [1, 0], "cifar100: ranking (fig3)": [1, 0],
    "imagenet200: ranking (fig3)": [1, 0]}


NEW = {"cifar10: fig5": 0, "cifar10: fig13": 0, "cifar100: fig12": 18, "cifar100 -> cifar10: fig16": 9 + 9,
       "cifar100 -> svhn: fig14": 63 + 2, "cifar100 -> cifar10: fig7": 18 + 27 + 2,
       "cifar100 -> cifar10: fig15": 54 + 54}


def test_run_all_lists_every_run_of_the_paper(monkeypatch):
    # a thousand commands share a few configs
    monkeypatch.setattr(flags, "from_yaml", functools.cache(flags.from_yaml))
    commands, counts = dry_run("cifar10", "cifar100", "imagenet200", "transfer")
    assert {k: v[:2] for k, v in counts.items()} == COUNTS
    assert {k: counts[k][2] for k in NEW} == NEW
    runs = [sat.command_line(argv) for name, argv in commands if name == "sat.py"]
    assert len({sat.run_folder(r)[0] for r in runs}) == len(runs), "each run once"
    kinds = {}
    for r in runs:
        how = (r.dataset, r.split, "named" if r.classes else r.order, r.metric, r.weight, r.attack)
        kinds.setdefault(how, set()).add((r.frac or r.size, r.seed))
        folder = sat.run_folder(r)[0].name
        assert (r.run is None and folder.endswith(f"-seed{r.seed}")
                and (r.weight == "emphasis") == ("-emphasis" in folder))
    tenths = [k / 10 for k in range(1, 10)]
    for dataset, seeds, sizes in (("cifar10", 10, range(1, 10)), ("cifar100", 5, range(10, 100, 10)),
                                  ("imagenet200", 3, range(20, 200, 20))):
        for split, steps in (("esat", tenths), ("csat", sizes)):
            for weight in ("vanilla",) if dataset == "cifar10" else ("vanilla", "emphasis"):
                assert kinds[dataset, split, "hardest", "entropy", weight, "pgd"] == {(s, 0) for s in steps}
                assert kinds[dataset, split, "easiest", "entropy", weight, "pgd"] == {(s, 0) for s in steps}
                assert kinds[dataset, split, "random", "entropy", weight, "pgd"] == {
                    (s, k) for s in steps for k in range(seeds)}
        if dataset != "cifar10":
            assert kinds[dataset, "esat", "hardest", "entropy", "emphasis", "fgsm-rs"] == {
                (s, 0) for s in tenths}
    assert kinds["cifar100", "csat", "hardest", "entropy", "balanced", "pgd"] == {
        (s, 0) for s in range(10, 100, 10)}
    assert kinds["cifar100", "esat", "hardest", "vog", "vanilla", "pgd"] == {(s, 0) for s in tenths}
    one_class = lambda weight: sorted(r.classes[0] for r in runs if r.classes and r.weight == weight)
    assert one_class("balanced") == "airplane automobile bird cat deer dog frog horse ship truck".split()
    assert one_class("vanilla") == ["automobile", "cat"]


def test_every_command_of_run_all_parses_in_order(monkeypatch):
    monkeypatch.setattr(flags, "from_yaml", functools.cache(flags.from_yaml))
    commands, _ = dry_run("all")
    made = set()
    for name, argv in commands:
        if name == "rank.py":
            args = rank.command_line(argv)
            made.add((args.dataset, args.arch))
        elif name == "sat.py":
            args = sat.command_line(argv)
            made.add((sat.run_folder(args)[0] / "best.pt").as_posix())
            assert ((args.dataset, args.arch) in made or args.split in ("none", "full")
                    or args.classes), "the ranking comes first"
        elif name == "transfer.py":
            args = transfer.command_line(argv)
            assert args.checkpoint.as_posix() in made, "its source was trained before"
    source = lambda target: {Path(argv[0]).parent.name for name, argv in commands
                             if name == "transfer.py" and f"{target}.yaml" in " ".join(argv)}
    assert source("svhn") == {r for r in source("cifar10")
                              if r.startswith(("none", "full", "esat")) and "fgsm" not in r}
    assert (all("emphasis" in r for r in source("caltech256") if not r.startswith(("none", "full")))
            and source("caltech256") == source("flowers102"))


def test_run_all_with_torchrun_and_a_wrong_section():
    from torch.distributed.run import parse_args as torchrun
    out = subprocess.run([str(HERE / "run_all.sh"), "--dry-run", "digits", "fig2"], capture_output=True,
                         text=True, env={**os.environ, "NPROC": "4"}).stdout
    stages = [line for line in out.splitlines() if "report.py" not in line and not line.startswith("#")]
    assert len(stages) == 2 + 10
    for line in stages:
        words = shlex.split(line)
        assert words[1:3] == ["-m", "torch.distributed.run"]
        args = torchrun(words[3:])  # torchrun's own parser
        assert args.nproc_per_node == "4" and Path(args.training_script).name == "sat.py"
        assert sat.command_line(args.training_script_args).run.startswith("quick-")
    done = subprocess.run([str(HERE / "run_all.sh"), "--help"], capture_output=True, text=True, check=True)
    assert "cifar10-cpu" in done.stdout
    for argv, env, told in ((["mnist"], {}, "no section or figure 'mnist'; valid: cifar10"),
                            (["digits", "fig99"], {}, "'fig99'; valid: cifar10"), ([], {}, "name a section"),
                            (["cifar10", "fig7"], {}, "cifar10 has no fig7; it is in: transfer cifar10-cpu"),
                            (["digits"], {"EXTRA": "--epoch 2"}, "EXTRA: unrecognized arguments: --epoch 2"),
                            (["digits"], {"EXTRA": "--epochs two"}, "--epochs: 'two' is not a whole"),
                            (["digits"], {"EXTRA": "epochs 2"}, "EXTRA: unrecognized arguments: epochs 2"),
                            (["digits"], {"EXTRA": "--seed=5"}, "EXTRA: --seed differs between the runs"),
                            (["digits"], {"EXTRA": "--run 'x"}, "EXTRA: No closing quotation"),
                            (["digits"], {"NPROC": "0"}, "NPROC=0: give the number of processes")):
        done = subprocess.run([str(HERE / "run_all.sh"), *argv, "--dry-run"], capture_output=True, text=True,
                              env={**os.environ, **env})
        assert done.returncode == 2 and done.stderr.startswith("error: ") and told in done.stderr
        assert done.stderr.count("\n") == 1


def test_folders_that_run_all_expects_are_those_that_the_scripts_make(monkeypatch):
    monkeypatch.setattr(flags, "from_yaml", functools.cache(flags.from_yaml))
    for _, kind, folder, done, _, argv in run_all.stages(run_all.SECTIONS, [], "results"):
        if kind == "sat.py":
            assert sat.run_folder(sat.command_line(argv))[0].as_posix() == folder
        elif kind == "transfer.py":
            args = transfer.command_line(argv)
            assert (args.results / args.dataset / args.run).as_posix() == folder and "result.json" == done
        else:
            args = rank.command_line(argv)
            assert f"results/{args.dataset}/rank-{args.arch}-seed0" == folder and done == "rank.json"


def stub(tmp_path, body):
    """A Python that notes its calls in tmp_path/calls and runs `body` in place of a script;
    how to start run_all with it."""
    python = tmp_path / "python"
    python.write_text(f"""#!{sys.executable}
import sys, time
from pathlib import Path
words = sys.argv[1:]
flag = lambda name, default: words[words.index(name) + 1] if name in words else default
dataset = flag("--dataset", "digits5-9" if "digits5-9.yaml" in str(words) else "digits")
name = flag("--run", f"rank-preactresnet8-seed{{flag('--seed', 0)}}")
folder = Path("{tmp_path}/results", dataset, name)
with open("{tmp_path}/calls", "a") as f:
    f.write(" ".join(words) + chr(10))
{body}
""")
    python.chmod(0o755)
    env = {"PYTHON": str(python), "RESULTS": str(tmp_path / "results")}
    return lambda *argv, start=subprocess.run, **more: start(
        [sys.executable, str(HERE / "run_all.py"), *argv], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, **env, **more})


MAKES = """
if "report.py" not in words[0]:
    assert "transfer.py" not in words[0] or Path(words[1]).with_name("result.json").exists()
    folder.mkdir(parents=True)  # a second one would fail
    time.sleep(0.02)
    (folder / ("rank.json" if "rank.py" in words[0] else "result.json")).write_text("")
"""


def test_run_all_skips_what_is_finished_and_says_what_is_missing(tmp_path):
    go = stub(tmp_path, """
if "csat-2-balanced-seed0" in name:
    print("no such luck", file=sys.stderr)
    sys.exit(2)""" + MAKES)
    (tmp_path / "results" / "digits" / "quick-csat-0-balanced-seed0").mkdir(parents=True)
    (tmp_path / "results" / "digits" / "quick-csat-0-balanced-seed0" / "result.json").write_text("{}")
    done, calls = go("digits", "fig2"), (tmp_path / "calls").read_text()
    assert "csat-0-balanced-seed0" not in calls and "csat-9-balanced-seed0" in calls and "report.py" in calls
    failed = "digits/quick-csat-2-balanced-seed0"
    assert done.returncode == 1 and "1 missing" in done.stderr and failed in done.stderr
    log = tmp_path / "results" / "logs" / f"{failed.replace('/', '_')}.log"
    assert "no such luck" in log.read_text() and "no such luck" in done.stdout


def test_two_run_alls_at_once(tmp_path):
    """Every run of a section exactly once, whichever of two copies makes it; a transfer after its source."""
    go = stub(tmp_path, MAKES)
    for one in [go("digits", start=subprocess.Popen) for _ in range(2)]:
        _, errors = one.communicate(timeout=300)
        assert one.returncode == 0, errors
    calls = [line for line in (tmp_path / "calls").read_text().splitlines() if "report.py" not in line]
    assert len(calls) == len(set(calls)) == len(dry_run("digits")[0]) - 1


def test_run_all_that_was_killed_is_taken_over_at_once(tmp_path):
    """Killed with -9, its run going on: a second copy waits for that run, does not start it again,
    and makes the rest."""
    go = stub(tmp_path, 'if "csat-3-balanced-seed0" in name: time.sleep(3)' + MAKES)
    first = go("digits", "fig2", start=subprocess.Popen)
    calls = tmp_path / "calls"
    while not calls.exists() or "csat-3-balanced-seed0" not in calls.read_text():
        time.sleep(0.05)
    first.kill()
    done = go("digits", "fig2")
    made = [line for line in calls.read_text().splitlines() if "report.py" not in line]
    assert done.returncode == 0 and len(made) == len(set(made)) == 12, done.stderr


def test_extra_flags_reach_the_scripts_that_have_them(tmp_path):
    go = stub(tmp_path, MAKES)
    assert go("digits", "fig8", "fig6",
              EXTRA="--epochs 2 --eval-n 20 --no-compile").returncode == 0
    for line in (tmp_path / "calls").read_text().splitlines()[:-1]:
        assert "--epochs 2" in line and "--no-compile" in line
        assert ("--eval-n 20" in line) == ("rank.py" not in line)


@pytest.mark.parametrize("command", [["run_all.py", "digits", "fig3"]])
def test_results_that_cannot_be_written(tmp_path, command):
    """A results folder below a file stands for a read-only one."""
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "r"
    env = {"RESULTS": str(folder)} if command[0] == "run_all.py" else {}
    done = script(*command, *([] if env else [folder]), env=env)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert ("RESULTS=" if env else "--results") in done.stderr, "says what to do"


def test_a_lone_ranking_is_reported(tmp_path):
    rank.main([*QUICK[:3], "--results", str(tmp_path)])
    report.main(["--results", str(tmp_path)])
    assert "digits: preactresnet8, 2 epochs" in (tmp_path / "tables.md").read_text()


def test_extra_flags_do_not_change_the_names_that_run_all_waits_for(monkeypatch, capsys):
    monkeypatch.setenv("EXTRA", "--epochs 40")
    assert run_all.main(["--dry-run", "cifar10", "fig2"]) == 0
    for line in capsys.readouterr().out.splitlines():
        if "sat.py" in line:
            words = shlex.split(line)[2:]
            folder = sat.run_folder(sat.command_line(words))[0].name
            assert folder in ("none-seed0", "full-seed0") or "-seed0" in words[words.index("--run") + 1]
            assert "epochs=40" not in folder
    cost = lambda extra: {stage[2]: stage[4] for stage in run_all.stages(["transfer"], ["fig16"], "r", extra)}
    plain, other = cost({}), cost({"epochs": 2, "steps": 1})
    assert (plain["r/cifar100/esat-hardest-0.5-emphasis-seed0"] == 50000 * 200 * 10
            and other["r/cifar100/esat-hardest-0.5-emphasis-seed0"] == 50000 * 2 * 4
            and plain["r/cifar10/cifar100-none-seed0-seed0"] == 50000 * 40
            and other["r/cifar10/cifar100-none-seed0-seed0"] == 50000 * 2)
    monkeypatch.setenv("EXTRA", "--arch resnet50")
    monkeypatch.setattr(run_all, "summary", lambda listed: [folder for _, _, folder, *_ in listed])
    assert run_all.main(["--dry-run", "digits", "fig3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "results/digits/rank-resnet50-seed0"
