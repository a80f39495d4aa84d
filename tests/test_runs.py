"""Runs: resumed, stopped, killed, several at once, and the folders they live in.

    python -m pytest -q tests/test_runs.py                   # KILLS=20 [KILLS_AMP=bf16]: more kill chains
"""
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import attacks
import common
from data import load_dataset
import evaluate
import models
import rank
import runs
import sat
import small
import train
from common import UserError
from conftest import CHAIN, HERE, KILLER, contents, run_stage
from small import (AUTOATTACK, ONE_EPOCH, RANK, RANKING, SAT, R, few, locked, processes,  # noqa: F401
                   stop_in, workplace)


# --- going on -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("main,argv,selections", [
    (sat.main, [*SAT, "--split", "full", "--random-start"], [2, 3]),  # after the decay, at the end
    (sat.main, [*SAT, "--order", "redrawn", "--frac", "0.3"], [2, 3]),
    (rank.main, RANK, []),
], ids=["random start", "redrawn", "ranking"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(main, argv, selections, capsys):
    main([*argv, "--results", "whole"])
    for epoch in (1, 2):
        stop_in(main, [*argv, "--results", "parts"], "save_epoch")
        path, = Path("parts").glob("few/*/last.pt")
        state = runs.load(path)
        assert state["epoch"] == epoch
        state["optimizer"]["param_groups"][0]["fused"] = True  # as the checkpoint of a GPU has it
        torch.save(state, path)
        torch.rand(100)  # the state of the global generator plays no part
    main([*argv, "--results", "parts"])
    assert "going on after epoch 2" in capsys.readouterr().out
    assert [row["epoch"] for row in runs.load(path)["log"] if "selection" in row] == selections
    whole, parts = contents(Path("whole")), contents(Path("parts"))
    assert set(parts) == set(whole)
    for path in whole:
        assert parts[path] == whole[path], path


def test_best_pt_is_written_by_the_run_that_goes_on():
    argv = [*ONE_EPOCH, "--epochs", "2"]
    stop_in(sat.main, argv, "save", after=False, when=lambda path, _: path.name == "best.pt")
    assert (R / "last.pt").exists()
    assert not (R / "best.pt").exists()
    (R / "last.pt.123.part").write_text("left by a killed process")
    sat.main(argv)
    best, last = runs.load(R / "best.pt"), runs.load(R / "last.pt")
    assert best["epoch"] == 2
    assert evaluate.weights_hash(best["model"]) == evaluate.weights_hash(last["model"])
    assert not list(R.glob("*.part"))


@pytest.fixture
def last_pt(tmp_path):
    """What resume() reads in last.pt: (function that changes it and resumes, the state)."""
    args, data = sat.command_line([]), load_dataset("digits", "data")
    state = {"A": "a", "fingerprint": data.fingerprint(), "args": runs.identity(args), "optimizer": {},
             "log": [{"epoch": 1}], "epoch": 2, "best": [-1, -1, 0]}

    def resume(key, value):
        changed = {**state[key], **value} if isinstance(value, dict) else value
        runs.save(tmp_path / "last.pt", {**state, key: changed})
        return sat.resume(tmp_path, args, data, "a")
    return resume


def test_a_run_goes_on_before_the_first_selection(last_pt):
    for best in (None, [-1, -1, 0]):  # None in files of an earlier version
        state, log, best = last_pt("best", best)
        assert state["epoch"] == 2
        assert log == [{"epoch": 1}]
        assert best == (-1, -1, 0)


@pytest.mark.parametrize("key,value,message", [
    ("A", "b", "last.pt was trained with another A: name this run with --run, or --force"),
    ("args", {"seed": 1}, "seed: 1 there, 0 now"),
    ("args", {"lr": 0.01}, "lr: 0.01 there, 0.1 now"),
    ("args", {"flag_of_old": 3}, "flag_of_old: 3 there, None now"),
    ("fingerprint", {"train": 7}, "belongs to other data .train: 7 there, 1297 here"),
    ("fingerprint", {"images": "f"}, "belongs to other data .images: f there, "),
    ("best", [0.5, 0.5, 1], "best.pt, of epoch 1, is missing: --force repeats the run"),
])
def test_last_pt_of_another_run_is_refused(key, value, message, last_pt):
    with pytest.raises(UserError, match=message):
        last_pt(key, value)


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(monkeypatch):
    factors, real = iter([1, 1, 1, 1, math.nan, 1]), train.sat_loss  # three steps an epoch
    monkeypatch.setattr(train, "sat_loss", lambda *a: real(*a) * next(factors))
    with pytest.raises(UserError, match="not finite in epoch 2, step 2"):
        sat.main([*ONE_EPOCH, "--epochs", "3"])
    last = runs.load(R / "last.pt")
    assert last["epoch"] == 1
    assert all(v.isfinite().all() for v in last["model"].values())


# --- one run, one folder ------------------------------------------------------------------------------------

def folder_of(*argv):
    """The folder of the run that these words describe."""
    return sat.run_folder(sat.command_line(argv))[0]


@pytest.mark.parametrize("words,name", [
    ("--split esat --frac 0.5 --order hardest", "digits/esat-hardest-0.5-seed0"),
    ("--order random --size 40 --weight-factor 3", "digits/esat-random-40-w3.0-seed0"),
    ("--metric svar --seed 3", "digits/esat-hardest-0.5-svar-seed3"),
    ("--split csat --classes 3 1 --weight emphasis --seed 2", "digits/csat-1-3-emphasis-seed2"),
    ("--split full --eps 1 --lr-decays 1 2", "digits/full-eps=1.0-lr-decays=1+2-seed0"),
    ("--split none --dataset mine --device cpu --workers 0", "mine/none-seed0"),
    ("--split none --run mine --epochs 7", "digits/mine"),
    (f"--config {HERE}/configs/cifar10.yaml", "cifar10/esat-hardest-0.5-seed0"),
    (f"--config {HERE}/configs/cifar10-linf.yaml", "cifar10/cifar10-linf-esat-hardest-0.5-seed0"),
    (f"--config {HERE}/configs/cifar10-linf.yaml --dataset x", "x/cifar10-linf-esat-hardest-0.5-seed0"),
])
def test_run_names(words, name):
    assert folder_of(*words.split(), "--results", "r") == Path("r") / name


def test_folders_of_names_in_other_scripts_stay_distinct():
    names = ["猫", "犬", "a b", "a/b", "a_b", "été", "../../../x", "x" * 200, "x" * 201]
    folders = [folder_of("--split", "csat", "--classes", name) for name in names]
    assert len(set(folders)) == len(names)
    assert folders[4].name == "csat-a_b-seed0"
    for folder in folders:
        assert folder.parent == Path("results/digits")
        assert folder.name.isascii()
        assert len(folder.name) < 255


def test_machine_and_folders_are_no_part_of_a_runs_identity():
    words = ("--device cpu --threads 1 --workers 0 --amp bf16 --compile --data-dir d --results r --run x "
             "--force")
    plain = runs.identity(sat.command_line([]))
    assert runs.identity(sat.command_line(words.split())) == plain
    assert set(plain) & {"config", "base", "typed"} == set()
    assert {"seed", "lr", "split", "dataset", "eps"} <= set(plain)


def test_a_folder_made_with_other_flags_is_refused():
    runs.start_run(R, sat.command_line(ONE_EPOCH))
    before = (R / "args.json").read_bytes()
    other = sat.command_line([*ONE_EPOCH, "--lr", "0.2"])
    for call in (lambda: sat.run_folder(other), lambda: runs.start_run(R, other)):
        with pytest.raises(UserError, match=r"made with other flags \(lr: 0.1 there, 0.2 now\): name this"):
            call()
    assert (R / "args.json").read_bytes() == before
    other.force = True
    assert runs.start_run(R, other) is False
    assert runs.read_json(R / "args.json")["lr"] == 0.2


def test_force_keeps_the_old_run_until_the_new_one_is_whole(capsys):
    sat.main(ONE_EPOCH)
    old = R.with_name(".old-r")
    before = {p.name: p.read_bytes() for p in R.iterdir()}
    sat.main(ONE_EPOCH)
    assert "results/few/r is finished (--force repeats it)\nAutoAttack's apgd-ce" in capsys.readouterr().out
    stop_in(sat.main, [*ONE_EPOCH, "--force"], "save")
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before
    assert not (R / "result.json").exists()
    sat.main(ONE_EPOCH)  # the repeat goes on without --force
    assert (R / "result.json").exists()
    assert not old.exists()


def test_force_repeats_an_unfinished_run_from_the_start(capsys):
    stop_in(sat.main, ONE_EPOCH, "save_epoch")
    sat.main([*ONE_EPOCH, "--force"])
    assert "going on" not in capsys.readouterr().out


def test_locks_end_with_their_runs(monkeypatch, capsys):
    """That of the ranking, which sat.py makes first, before the training begins: a second process of a run
    waits as long as the run takes, and no longer."""
    real, seen = train.training_batches, []

    def batches(*a):
        seen.append((locked(RANKING), locked(R), [os.dup(f.fileno()) for f in runs.LOCKS.values()]))
        return real(*a)  # a loader process has the lock's file too, as the duplicate does
    monkeypatch.setattr(train, "training_batches", batches)
    sat.main([*SAT, "--epochs", "1", "--lr-decays", "--run", "r", "--seed", "3"])
    assert [s[:2] for s in seen] == [(True, False), (False, True)]
    assert runs.LOCKS == {}
    assert not locked(R)
    sat.main([*ONE_EPOCH, "--run", "s"])
    assert not locked(R.with_name("s"))
    for _, _, files in seen:
        os.close(*files)
    rank.main([*RANK, "--epochs", "1", "--lr-decays"])
    assert f"{RANKING} is finished" in capsys.readouterr().out, "sat.py's ranking is rank.py's own"


def test_two_equal_commands_at_once_make_one_run(capsys):
    """This process finds the other at work, waits for it, and shows its result."""
    argv = [*ONE_EPOCH, "--epochs", "9", "--eval-n", "2", "--select-n", "2"]
    other = subprocess.Popen([sys.executable, HERE / "sat.py", *argv], stdout=subprocess.PIPE, text=True)
    while not (R / "args.json").exists():
        assert other.poll() is None
        time.sleep(0.1)
    sat.main(argv)
    out = capsys.readouterr().out
    assert other.wait(300) == 0
    assert "epoch 9:" in other.stdout.read()
    assert "epoch" not in out
    assert f"{R} is being made by another process: waiting for it" in out
    assert f"{R} is finished" in out


# --- the machine --------------------------------------------------------------------------------------------

def test_results_that_cannot_be_written():
    """A results folder below a file stands for a read-only one."""
    Path("file").write_text("")
    with pytest.raises(UserError, match="cannot write file/r/.*: Not a directory; name another .* --results"):
        sat.main([*ONE_EPOCH, "--results", "file/r"])


def test_full_disk():
    """A limit on the size of files stands for it. No file is half written, and the run goes on later."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UserError, match="last.pt: File too large .finished work is kept"):
            sat.main(ONE_EPOCH)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name for p in R.iterdir() if p.is_file()} == {"args.json", "log.jsonl"}
    sat.main(ONE_EPOCH)
    assert (R / "result.json").exists()


def test_a_write_that_is_cut_off_leaves_the_old_file():
    runs.write_json("a.json", 1)
    with pytest.raises(ZeroDivisionError):
        runs.atomic("a.json", lambda file: file.write(b"2") / 0)
    assert runs.read_json("a.json") == 1
    assert sorted(os.listdir()) == ["a.json", "data"]


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_in_one_line(number, code, monkeypatch, capsys):
    real, epochs = train.training_batches, []

    def batches(*a):
        epochs.append(1)
        for batch in real(*a):
            yield batch
            if len(epochs) == 2:
                os.kill(os.getpid(), number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(train, "training_batches", batches)
        common.script(lambda: rank.main(RANK))
    assert stopped.value.code == code
    error = capsys.readouterr().err
    assert error.startswith("stopped: the same command, without --force, goes on from the last whole epoch")
    assert error.count("\n") == 1
    rank.main(RANK)
    assert "going on after epoch 1 of" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("KILLS", 3))))
def test_killed_at_any_moment_ends_with_the_same_result(undisturbed, tmp_path, seed):
    """SIGKILL once in each stage, at a random moment of a phase that changes with the seed (three seeds hit
    every phase of every stage), then the same command again: all that was written is bit-identical to the
    undisturbed chain's."""
    chance, (expected, moments) = random.Random(seed), undisturbed
    for i, (stage, argv, phases) in enumerate(CHAIN):
        phase = phases[(seed + i) % len(phases)]
        moment = chance.randint(1, moments[stage][phase])
        done, marker = run_stage(tmp_path, stage, argv, phase, moment)
        print(f"{stage} killed in {phase} {moment} of {moments[stage][phase]}")
        assert done.returncode == -9, done.stderr
        assert marker == f"{phase} {moment}"
        if phase == "save":
            assert list(tmp_path.rglob("*.part")), "killed with the file beside its place"
        done, _ = run_stage(tmp_path, stage, argv)
        assert done.returncode == 0, done.stderr
    written = contents(tmp_path)
    assert set(written) == set(expected)
    for path in expected:
        assert written[path] == expected[path], path


# --- torchrun -----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_two_processes_equal_one():
    """The same weights (so the same gradients), loss and counts from 1 process, from 2,
    and from 2 that become 1 after an epoch."""
    code = "import common, small; common.script(lambda: [small.train(case, 'two') for case in small.CASES])"
    done = processes(2, code)
    assert done.returncode == 0, done.stderr
    for case in small.CASES:
        small.train(case, "one")
        small.train(case, "rest", runs.load(f"two-{case}-1"))
        one, *others = (runs.load(f"{name}-{case}-2") for name in ("one", "two", "rest"))
        assert one["row"]["attacked"] > 0
        for other in others:
            for k, v in one["model"].items():
                torch.testing.assert_close(other["model"][k], v, atol=1e-5, rtol=1e-4)
            for k in ("loss", "train_accuracy", "attacked", "forward_equivalents"):
                assert other["row"][k] == pytest.approx(one["row"][k], rel=1e-4)


@pytest.mark.slow
def test_stages_with_two_processes(monkeypatch):
    """sat.py makes its ranking, too, with both processes. One process then takes the same A from it, and
    gets the same numbers from one checkpoint."""
    code = ("import common, evaluate, sat, small\n"
            "common.script(lambda: [sat.main(small.STAGE), evaluate.main(small.AGAIN)])")
    done = processes(2, code)
    assert done.returncode == 0, done.stderr
    for line in ("ranking the examples first", "class, hardest first", "SAT on few", "evaluating results"):
        assert done.stdout.count(line) == 1, line
    ranking, last = (runs.load(RANKING / f"{name}.pt") for name in ("scores", "last"))
    few = load_dataset("few", "data")
    model = models.build("preactresnet8", 10, *few.mean_std())
    model.load_state_dict(last["model"])
    for metric, scores in rank.score(model, few.train, torch.device("cpu"), ["entropy", "svar"]).items():
        torch.testing.assert_close(ranking[metric], scores.float(), rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(attacks, "attack_batch", AUTOATTACK)
    path, = R.glob("eval-*.json")
    evaluated, two, last = runs.read_json(path), runs.read_json(R / "result.json"), runs.load(R / "last.pt")
    evaluate.main([*small.AGAIN, "--force"])
    assert runs.read_json(path) == evaluated, "chunks of 3, dealt to two"
    sat.main([*small.STAGE, "--force"])
    one = runs.read_json(R / "result.json")
    assert (two["processes"], one["processes"]) == (2, 1)
    assert two["A"] == round(0.3 * 96)
    assert two["cost"]["attacked"] == two["A"]
    assert runs.load(R / "last.pt")["A"] == last["A"]
    for key in ("A", "ranking", "N", "w_A", "settings", "args", "fingerprint"):
        assert one[key] == two[key], key


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job(capsys):
    """Process 1 is killed in the second epoch: the job ends with a message, and one process takes the run to
    its end."""
    code = KILLER.replace("if where == phase", "if common.process_index() == 1 and where == phase")
    done = processes(2, code, "marker", "epoch", 5, "rank", *RANK)
    assert done.returncode != 0
    assert "exitcode  : -9" in done.stderr
    assert "[rank0]: Traceback" not in done.stderr
    assert runs.load(RANKING / "last.pt")["epoch"] == 1
    assert not (RANKING / "scores.pt").exists()
    rank.main(RANK)
    assert "going on after epoch 1" in capsys.readouterr().out
    assert (RANKING / "scores.pt").exists()
