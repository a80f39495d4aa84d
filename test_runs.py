"""Runs as processes: stopped, killed, resumed, several at once, and the list of all runs.

    python -m pytest -q test_runs.py
"""
import copy
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
import models
import rank
import report
from paper import results
import sat
import subset
import runs
from common import UserError
from conftest import HERE, QUICK, script, KILLER, CHAIN, run_stage, contents


def test_best_is_mended_when_stopped_before_it_was_written(tmp_path, monkeypatch):
    argv = ["--split", "none", *QUICK, "--results", str(tmp_path), "--run", "r"]
    real = runs.save
    def stop(path, value):
        if path.name == "best.pt":
            raise KeyboardInterrupt
        real(path, value)
    with monkeypatch.context() as m:
        m.setattr(common, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            sat.main(argv)
    assert ((tmp_path / "digits" / "r" / "last.pt").exists()
            and not (tmp_path / "digits" / "r" / "best.pt").exists())
    sat.main(argv)
    assert runs.load(tmp_path / "digits" / "r" / "best.pt")["epoch"] == 2


def test_going_on_without_a_best_checkpoint(tmp_path):
    """Before the first selection there is none (None in files of an earlier version);
    a lost one is noticed before the rest is trained."""
    args, digits = sat.command_line([]), data_.load_dataset("digits", "data")
    state = {"A": "a", "fingerprint": digits.fingerprint(), "args": runs.identity(args), "optimizer": {},
             "log": [], "epoch": 2}
    for best in (None, [-1, -1, 0]):
        runs.save(tmp_path / "last.pt", {**state, "best": best})
        assert sat.go_on(tmp_path, digits, args, "a")[2] == (-1, -1, 0)
    runs.save(tmp_path / "last.pt", {**state, "best": [0.5, 0.5, 1]})
    with pytest.raises(UserError, match="best.pt, of epoch 1, is missing: --force repeats the run"):
        sat.go_on(tmp_path, digits, args, "a")


TWO = """
import sys, torch, common, data, sat
from torch import nn
torch.set_num_threads(1)
folder, name, start = sys.argv[1:]
def train(case, w_A, flags):
    args = sat.command_line(["--split", "full", "--epochs", "2", "--lr-decays", "1", "--batch-size", "63",
                             "--steps", "2", *flags])
    device = common.set_up(args)
    digits = data.get("digits", "data")
    digits.train = data.Split(digits.train.x[:300], digits.train.y[:300])
    torch.manual_seed(0)
    # no batch norm
    model = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    model.frozen = False
    A = torch.arange(300) % 29 == 0  # so few that batches of a process often hold none
    state = runs.load(f"{folder}/{start}-{case}-1") if start != "-" else None
    for state in sat.train(model, digits.train, A, w_A, args, device, state):
        if common.process_index() == 0:
            torch.save(state, f"{folder}/{name}-{case}-{state['epoch']}")
def main():
    train("weighted", 5.0, [])
    train("random-start", 1.0, ["--random-start"])
common.script(main)
"""


def processes(n, *command):
    """Runs a Python script with n processes under torchrun, or alone."""
    launch = [] if n == 1 else ["-m", "torch.distributed.run", "--standalone",
                                "--nproc-per-node", str(n), "--"]
    return subprocess.run([sys.executable, *launch, *map(str, command)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})


def test_two_processes_equal_one(tmp_path):
    """The same weights (so the same gradients), loss and counts from 1 process, from 2,
    and from 2 that become 1 after an epoch."""
    (tmp_path / "two.py").write_text(TWO)
    for name, n, start in (("one", 1, "-"), ("two", 2, "-"), ("rest", 1, "two")):
        done = processes(n, tmp_path / "two.py", tmp_path, name, start)
        assert done.returncode == 0, done.stderr
    for case in ("weighted", "random-start"):
        one, *others = (torch.load(tmp_path / f"{name}-{case}-2", weights_only=True)
                        for name in ("one", "two", "rest"))
        for other in others:
            for k, v in one["model"].items():
                torch.testing.assert_close(other["model"][k], v, atol=1e-5, rtol=1e-4)
            for k in ("loss", "train_accuracy", "attacked", "forward_equivalents"):
                assert other["row"][k] == pytest.approx(one["row"][k], rel=1e-4)
        assert one["row"]["attacked"] > 0


STAGES = """
import sys, common, evaluate, sat
results, other = sys.argv[1:]
def main():
    sat.main(["--dataset", "digits0-4", "--epochs", "2", "--lr-decays", "--eval-attacks", "apgd-ce",
              "--eval-n", "24", "--select-attacks", "apgd-ce", "--select-n", "8",
              "--split", "esat", "--frac", "0.3", "--run", "n", "--results", results])
    evaluate.main([other, "--eval-batch", "7"])
common.script(main)
"""


def test_stages_with_two_processes(pipeline, tmp_path):
    """Given the same scores.pt: the same A, n and keys from sat.py;
    the same flags of one checkpoint from evaluate.py."""
    (tmp_path / "stages.py").write_text(STAGES)
    for n in (1, 2):
        scores = tmp_path / f"{n}" / "digits0-4" / "rank-preactresnet8-seed0"
        shutil.copytree(pipeline / "digits0-4" / "rank-preactresnet8-seed0", scores)
        shutil.copytree(pipeline / "digits0-4" / "b", tmp_path / f"b{n}",
                        ignore=shutil.ignore_patterns("eval*"))
        done = processes(n, tmp_path / "stages.py", tmp_path / f"{n}", tmp_path / f"b{n}" / "best.pt")
        assert done.returncode == 0 and done.stdout.count("SAT on digits0-4") == 1, done.stderr + done.stdout
    one, two = (runs.read_json(tmp_path / f"{n}" / "digits0-4" / "n" / "result.json") for n in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2) and one["A"] == two["A"] == round(0.3 * 649)
    masks = [runs.load(tmp_path / f"{n}" / "digits0-4" / "n" / "last.pt")["A"] for n in (1, 2)]
    assert masks[0] == masks[1], "the hash of A"
    shape = lambda v: {k: shape(w) for k, w in v.items()} if isinstance(v, dict) else None
    evaluated = {k: v["clean"]["n"] for k, v in one["accuracy"].items() if k != "classes"}
    assert shape(one) == shape(two) and evaluated == {"all": 24}
    assert one["cost"]["attacked"] == two["cost"]["attacked"] > 0 and one["ranking"] == two["ranking"]
    evals = [runs.read_json(*(tmp_path / f"b{n}").glob("eval-*.json")) for n in (1, 2)]
    assert evals[0] == evals[1], "AutoAttack in chunks of 7, dealt to two"


def test_a_process_that_dies_ends_the_job(undisturbed, tmp_path):
    """Rank 1 is killed in the second epoch: the job ends with a message,
    and one process takes the run to its end."""
    stage, argv, _ = CHAIN[0]
    command = [f"{tmp_path}/marker", "epoch", str(undisturbed[1]["rank"]["epoch"] // 2), stage, *argv,
               "--results", str(tmp_path)]
    (tmp_path / "killer.py").write_text(
        KILLER.replace("if where == phase", "if common.process_index() == 1 and where == phase"))
    done = processes(2, tmp_path / "killer.py", *command)
    assert (done.returncode != 0 and "exitcode  : -9" in done.stderr
            and "[rank0]: Traceback" not in done.stderr)
    folder = tmp_path / "digits0-4" / "rank-preactresnet8-seed0"
    assert runs.load(folder / "last.pt")["epoch"] == 1 and not (folder / "scores.pt").exists()
    done, _ = run_stage(tmp_path, stage, argv)
    assert done.returncode == 0 and "going on after epoch 1" in done.stdout
    assert set(contents(tmp_path)) == {p for p in undisturbed[0] if "/rank-" in p}


def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    argv = ["--split", "none", *QUICK, "--results", str(tmp_path), "--run", "r"]
    real, calls = sat.sat_loss, []
    def poisoned(*a):
        calls.append(1)
        return real(*a) * (math.nan if len(calls) == 25 else 1)  # 20 steps an epoch: the 5th of the second
    monkeypatch.setattr(sat, "sat_loss", poisoned)
    with pytest.raises(UserError, match="not finite in epoch 2, step 5"):
        sat.main(argv)
    kept = runs.load(tmp_path / "digits" / "r" / "last.pt")
    assert kept["epoch"] == 1 and all(v.isfinite().all() for v in kept["model"].values())


def test_run_names():
    name = lambda *argv: sat.run_folder(sat.command_line([*argv]))[0].as_posix()
    assert (name("--split", "esat", "--frac", "0.5", "--order", "hardest")
            == "results/digits/esat-hardest-0.5-seed0")
    assert (name("--split", "csat", "--classes", "3", "1", "--weight", "emphasis", "--seed", "2")
            == "results/digits/csat-1-3-emphasis-seed2")
    assert (name("--split", "full", "--eps", "1", "--results", "r")
            == "results/digits/full-eps=1.0-seed0".replace("results", "r"))
    escape = sat.run_folder(sat.command_line(["--split", "csat", "--classes", "../../../x"]))[0]
    assert escape.parent == Path("results/digits") and ".." not in escape.parts


def test_resumed_run_is_bit_identical(tmp_path, monkeypatch):
    argv = ["--split", "full", *QUICK, "--epochs", "3", "--steps", "2", "--random-start", "--results"]
    sat.main([*argv, str(tmp_path / "whole")])
    real = runs.save_epoch
    def stop(*a):
        real(*a)
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(common, "save_epoch", stop)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                sat.main([*argv, str(tmp_path / "parts")])
            torch.rand(100)  # the state of the global generator plays no part
    sat.main([*argv, str(tmp_path / "parts")])
    whole, parts = (next((tmp_path / d / "digits").iterdir()) for d in ("whole", "parts"))
    for name in ("best.pt", "last.pt"):
        a, b = runs.load(whole / name)["model"], runs.load(parts / name)["model"]
        assert all(torch.equal(a[k], b[k]) for k in a)
    drop = lambda r: {k: v for k, v in r.items() if k not in ("cost", "args")}
    assert drop(runs.read_json(whole / "result.json")) == drop(runs.read_json(parts / "result.json"))


# KILLS=20 [KILLS_AMP=bf16] python -m pytest -k killed
@pytest.mark.parametrize("seed", range(int(os.environ.get("KILLS", 3))))
def test_killed_at_any_moment_ends_with_the_same_result(undisturbed, tmp_path, seed):
    """SIGKILL once in each stage, at a random moment of a phase that changes with the seed (three seeds hit
    every phase of every stage), then the same command again: all that was written is bit-identical to the
    undisturbed chain's."""
    import random
    chance, (expected, moments) = random.Random(seed), undisturbed
    for i, (stage, argv, phases) in enumerate(CHAIN):
        phase = phases[(seed + i) % len(phases)]
        moment = chance.randint(1, moments[stage][phase])
        done, marker = run_stage(tmp_path, stage, argv, phase, moment)
        print(f"{stage} killed in {phase} {moment} of {moments[stage][phase]}")
        assert done.returncode == -9 and marker == f"{phase} {moment}", (stage, phase, moment, done.stderr)
        assert list(tmp_path.rglob("*.part")) or phase != "save", "killed with the file beside its place"
        done, _ = run_stage(tmp_path, stage, argv)
        assert done.returncode == 0, done.stderr
    found = contents(tmp_path)
    assert set(found) == set(expected)
    for path in expected:
        assert found[path] == expected[path], path


@pytest.mark.parametrize("name,code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_sigterm_and_ctrl_c(undisturbed, tmp_path, name, code):
    stage, argv, _ = CHAIN[0]
    done, marker = run_stage(tmp_path, stage, argv, "epoch", undisturbed[1]["rank"]["epoch"] // 2, WITH=name)
    assert done.returncode == code and marker
    assert done.stderr.splitlines()[-1].startswith("stopped: the same command, without --force, goes on")
    kept = runs.load(tmp_path / "digits0-4" / "rank-preactresnet8-seed0" / "last.pt")
    assert "Traceback" not in done.stderr and len(kept["log"]) == 1
    done, _ = run_stage(tmp_path, stage, argv)
    assert "going on after epoch 1" in done.stdout
    assert all(undisturbed[0][path] == value for path, value in contents(tmp_path).items())


def test_torchrun_users_mistake_is_one_line_of_ours(tmp_path):
    """torchrun adds a report of its own, which a worker cannot prevent."""
    done = processes(2, HERE / "sat.py", "--order", "hardst", "--results", tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("error: argument --order: invalid choice: 'hardst'") == 1
    assert "sat.py\", line" not in done.stderr, "no traceback through our files"


@pytest.mark.parametrize("command", [["sat.py", "--split", "none", "--results"],
                                     ["run_all.py", "digits", "fig3"]])
def test_results_that_cannot_be_written(tmp_path, command):
    """A results folder below a file stands for a read-only one."""
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "r"
    env = {"RESULTS": str(folder)} if command[0] == "run_all.py" else {}
    done = script(*command, *([] if env else [folder]), env=env)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert ("RESULTS=" if env else "--results") in done.stderr, "says what to do"


def test_full_disk(undisturbed, tmp_path):
    """A file-size limit stands for a full disk: one line, no half-written file,
    and the run goes on when there is room."""
    stage, argv, _ = CHAIN[0]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
    folder = tmp_path / "r"
    command = [sys.executable, "-c", limit + f"import common, {stage}; common.script({stage}.main)", *argv,
               "--results", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(HERE)})
    assert (done.returncode == 2 and done.stderr.count("\n") == 1
            and "last.pt: File too large (finished work is kept" in done.stderr), done.stderr
    left = {p.name for p in folder.rglob("*") if p.is_file() and ".locks" not in p.parts}
    assert left == {"args.json", "log.jsonl"}
    assert run_stage(folder, stage, argv)[0].returncode == 0


# --- one run, one folder ------------------------------------------------------------------------------------

def test_force_keeps_the_old_run_until_the_new_one_is_whole(tmp_path, monkeypatch):
    argv = ["--split", "none", *QUICK, "--results", str(tmp_path), "--run", "r"]
    sat.main(argv)
    folder, old = tmp_path / "digits" / "r", tmp_path / "digits" / ".old-r"
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    real = runs.save
    def full_disk(path, value):
        raise UserError(f"cannot write {path}: the disk is full")
    monkeypatch.setattr(common, "save", full_disk)
    with pytest.raises(UserError, match="disk is full"):
        sat.main([*argv, "--force"])
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before and not (folder / "result.json").exists()
    assert not results.result_files(tmp_path, "result.json"), "neither is reported"
    monkeypatch.setattr(common, "save", real)
    sat.main(argv)  # the repeat goes on without --force
    assert (folder / "result.json").exists() and not old.exists()


def test_two_equal_commands_at_once_make_one_run(tmp_path):
    command = [sys.executable, str(HERE / "sat.py"), "--split", "none", *QUICK, "--results", str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)]
    said = [p.communicate(timeout=300) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    out = "".join(o for o, _ in said)
    assert (out.count("epoch 2:") == 1
            and out.count("is being made by another process: waiting for it") == 1
            and out.count("is finished") == 1)


def test_a_checkpoint_of_other_flags_is_not_continued(tmp_path, monkeypatch):
    """last.pt of another seed, network or learning rate, put into a run's folder: refused."""
    argv = ["--split", "none", *QUICK, "--results", str(tmp_path)]
    real = sat.conclude
    monkeypatch.setattr(sat, "conclude", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    for run, how in (("a", []), ("b", ["--seed", "1"]), ("c", ["--lr", "0.01"])):
        with pytest.raises(KeyboardInterrupt):
            sat.main([*argv, "--run", run, *how])
    monkeypatch.setattr(sat, "conclude", real)
    for run, differs in (("b", "seed: 1 there, 0 now"), ("c", "lr: 0.01 there, 0.1 now")):
        shutil.copy(tmp_path / "digits" / run / "last.pt", tmp_path / "digits" / "a" / "last.pt")
        with pytest.raises(UserError, match=differs):
            sat.main([*argv, "--run", "a"])


def test_folders_of_names_in_other_scripts_stay_distinct():
    folder = lambda name: sat.run_folder(sat.command_line(["--split", "csat", "--classes", name]))[0].name
    names = ["猫", "犬", "a b", "a/b", "a_b", "été"]
    assert len({folder(n) for n in names}) == len(names) and folder("a_b") == "csat-a_b-seed0"
    assert all("/" not in folder(n) and folder(n).isascii() for n in names)


def test_a_loss_that_is_not_finite_names_the_flags_that_differ(tmp_path):
    for how, suspect in ((["--weight-decay", "1e30", "--steps", "3"],
                          "--weight-decay 1e+30 (config: 0.0005), --steps 3 (config: 7)"),
                         (["--lr", "1e30"], "--lr 1e+30 (config: 0.1)")):
        with pytest.raises(UserError, match="not finite") as e:
            sat.main(["--split", "full", *QUICK, "--results", str(tmp_path), "--run", "r", "--force", *how])
        assert f"Suspect {suspect}; give the mended run another name with --run, or --force" in str(e.value)


def test_a_lone_ranking_is_reported(tmp_path):
    rank.main([*QUICK[:3], "--results", str(tmp_path)])
    report.main(["--results", str(tmp_path)])
    assert "digits: preactresnet8, 2 epochs" in (tmp_path / "tables.md").read_text()


def test_sat_py_asks_for_its_ranking_in_rank_pys_words():
    """Every flag that differs from the config is handed on, switches too."""
    args = sat.command_line(["--compile", "--epochs", "3", "--lr-decays", "1", "2",
                             "--run", "x", "--seed", "5"])
    made = rank.command_line(subset.rank_command(args))
    assert (made.compile, made.epochs, made.lr_decays, made.run, made.seed) == (True, 3, [1, 2], None, 0)
    plain = sat.command_line(["--no-compile", "--random-start"])
    assert not rank.command_line(subset.rank_command(plain)).compile


def test_a_resumed_redrawn_run_is_the_run_that_was_never_stopped():
    data = data_.load_dataset("digits", "data")
    split = data_.Split(data.train.x[:192], data.train.y[:192])
    args = sat.command_line([*QUICK, "--epochs", "3", "--order", "redrawn", "--steps", "1"])
    A, cpu = sat.choose_A("esat", split.y, data.classes, amount=48, order="redrawn"), torch.device("cpu")
    model = lambda: (torch.manual_seed(0), models.build("preactresnet8", 10, [0.3], [0.35]))[1]
    whole = list(sat.train(model(), split, A, 1.0, args, cpu))[-1]
    stopped = sat.train(model(), split, A, 1.0, args, cpu)
    next(stopped)
    state = copy.deepcopy(next(stopped))
    state["optimizer"]["param_groups"][0]["fused"] = True  # as the checkpoint of a GPU has it
    *_, resumed = sat.train(model(), split, A, 1.0, args, cpu, state)
    assert (resumed["epoch"] == 3 and not resumed["optimizer"]["param_groups"][0]["fused"]
            and all(torch.equal(v, resumed["model"][k]) for k, v in whole["model"].items()))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
def test_ctrl_c_while_torch_is_loading(tmp_path):
    process = subprocess.Popen([sys.executable, str(HERE / "sat.py"), "--split", "none"], cwd=tmp_path,
                               stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while process.poll() is None and "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode != 0 and errors.startswith("stopped") and errors.count("\n") == 1, errors
    assert sys.excepthook is not common.quiet, "programs that import a script keep their own"


def test_closed_stderr_changes_nothing(tmp_path):
    command = shlex.join([sys.executable, str(HERE / "sat.py"), "--split", "none", *QUICK, "--epochs", "1",
                          "--results", str(tmp_path)])
    done = subprocess.run(["bash", "-c", f"{command} 2>&-"], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0 and "wrote" in done.stdout


def test_memory_of_large_tensors_is_kept():
    """Else the kernel zeroes 12,800 pages for each of these tensors."""
    code = ("import resource, common, torch\n"
            "common.keep_memory()\n"
            "for i in range(40):\n"
            "    if i == 20: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "    torch.ones(2**20 * 13)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000
