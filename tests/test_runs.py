"""Runs: resumed, stopped, killed, several at once, and the folders they live in.

    python -m pytest -q tests/test_runs.py                   # KILLS=20 [KILLS_AMP=bf16]: more kill chains
"""
import math
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import attacks
import evaluate
import models
import rank
import runs
import sat
import small
import train
from common import UserError
from conftest import CHAIN, HERE, KILLER, contents, run_stage
from data import load_dataset, open_dataset
from small import (AUTOATTACK, ONE, ONE_EPOCH, RANK, RANKING, SAT, R, few, locked, processes,  # noqa: F401
                   stop_in, workplace)


def differences(written, expected):
    """The files in which what contents() returned differs."""
    return [path for path in {**written, **expected} if written.get(path) != expected.get(path)]


@pytest.mark.parametrize("main,argv,selections", [
    (sat.main, [*SAT, "--split", "full", "--random-start"], [2, 3]),  # after the decay, at the end
    (sat.main, [*SAT, "--order", "redrawn", "--frac", "0.3"], [2, 3]),
    (rank.main, RANK, []),
], ids=["random start", "redrawn", "ranking"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(main, argv, selections, capsys):
    main([*argv, "--results", "whole"])
    for epoch in (1, 2, 3):
        stop_in(main, [*argv, "--results", "parts"], "save_epoch")
        path, = Path("parts").glob("few/*/last.pt")
        state = runs.load(path)
        assert state["epoch"] == epoch
        if epoch < 3:
            state["optimizer"]["param_groups"][0]["fused"] = True  # as the checkpoint of a GPU has it
            torch.save(state, path)
        Path(f"{path}.123.part").write_text("left by a killed process")
        torch.rand(100)  # the state of the global generator plays no part
    if selections:
        assert path.with_name("best.pt").exists(), "of epoch 2, which stopped before it wrote best.pt"
    main([*argv, "--results", "parts"])
    assert "going on after epoch 3" in capsys.readouterr().out
    assert [row["epoch"] for row in runs.load(path)["log"] if "selection" in row] == selections
    assert differences(contents(Path("parts")), contents(Path("whole"))) == []
    assert not list(Path("parts").rglob("*.part"))


@pytest.mark.parametrize("key,value,message", [
    ("A", "b", "last.pt was trained with another A: name this run with --run, or --force"),
    ("args", {"seed": 1}, "seed: 1 there, 0 now"),
    ("args", {"flag_of_old": 3}, "flag_of_old: 3 there, None now"),
    ("fingerprint", {"train": 7}, "belongs to other data .train: 7 there, 1297 here"),
    ("fingerprint", {"images": "f"}, "belongs to other data .images: f there, "),
    ("best", [0.5, 0.5, 1], "best.pt, of epoch 1, is missing: --force repeats the run"),
])
def test_last_pt_of_another_run_is_refused(key, value, message):
    args, data = sat.command_line([]), load_dataset("digits", "data")
    state = {"A": "a", "fingerprint": data.fingerprint(), "args": runs.identity(args), "optimizer": {},
             "log": [{"epoch": 1}], "epoch": 2, "best": [-1, -1, 0]}
    runs.save("last.pt", {**state, key: {**state[key], **value} if isinstance(value, dict) else value})
    with pytest.raises(UserError, match=message):
        sat.resume(Path(), args, data, "a")


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(monkeypatch):
    factors, real = iter([1, 1, 1, 1, math.nan, 1]), train.sat_loss  # three steps an epoch
    monkeypatch.setattr(train, "sat_loss", lambda *a: real(*a) * next(factors))
    with pytest.raises(UserError, match="not finite in epoch 2, step 2"):
        sat.main([*ONE_EPOCH, "--epochs", "3"])
    last = runs.load(R / "last.pt")
    assert last["epoch"] == 1
    assert all(v.isfinite().all() for v in last["model"].values())


def folder_of(*argv):
    """The folder of the run that these words describe."""
    return sat.run_folder(sat.command_line(argv))[0]


@pytest.mark.parametrize("words,name", [
    ("--split esat --frac 0.5 --order hardest", "digits/esat-hardest-0.5-seed0"),
    ("--order random --size 40 --weight-factor 3", "digits/esat-random-40-w3.0-seed0"),
    ("--metric svar --seed 3", "digits/esat-hardest-0.5-svar-seed3"),
    ("--split csat --classes 3 1 --weight emphasis --seed 2", "digits/csat-1-3-emphasis-seed2"),
    ("--split full --eps 1 --lr-decays 1 2", "digits/full-eps=1.0-lr-decays=1+2-seed0"),
    ("--split none --dataset mine --device cpu --threads 1 --workers 0 --amp bf16 --compile --data-dir d "
     "--force", "mine/none-seed0"),
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


def test_a_folder_made_with_other_flags_is_refused():
    runs.start_run(R, sat.command_line(ONE_EPOCH))
    before = (R / "args.json").read_bytes()
    other = sat.command_line([*ONE_EPOCH, "--lr", "0.2"])
    for function, *words in ((sat.run_folder, other), (runs.start_run, R, other)):
        with pytest.raises(UserError, match=r"made with other flags \(lr: 0.1 there, 0.2 now\): name this"):
            function(*words)
    assert (R / "args.json").read_bytes() == before
    other.force = True
    assert runs.start_run(R, other) is False
    assert runs.load(R / "args.json")["lr"] == 0.2


def test_force_keeps_the_old_run_until_the_new_one_is_whole(capsys):
    stop_in(sat.main, ONE_EPOCH, "save_epoch")
    sat.main([*ONE_EPOCH, "--force"])
    assert "going on" not in capsys.readouterr().out, "one that is not finished starts again"
    old, before = R.with_name(".old-r"), {p.name: p.read_bytes() for p in R.iterdir()}
    sat.main(ONE_EPOCH)
    assert "results/few/r is finished (--force repeats it)\nAutoAttack's apgd-ce" in capsys.readouterr().out
    stop_in(sat.main, [*ONE_EPOCH, "--force"], "save")
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before
    assert not (R / "result.json").exists()
    sat.main(ONE_EPOCH)  # the repeat goes on without --force
    assert (R / "result.json").exists()
    assert not old.exists()


def test_locks_end_with_their_runs(monkeypatch, capsys):
    """That of the ranking, which sat.py makes first, before the training begins: a second process of a run
    waits as long as the run takes, and no longer."""
    real, locks, duplicates = train.training_batches, [], []

    def batches(*a):
        locks.append((locked(RANKING), locked(R)))
        duplicates.extend(os.dup(f.fileno()) for f in runs.LOCKS.values())  # as a loader process has them
        return real(*a)
    monkeypatch.setattr(train, "training_batches", batches)
    sat.main([*SAT, *ONE, "--run", "r", "--seed", "3"])
    assert locks == [(True, False), (False, True)]
    assert runs.LOCKS == {}
    assert not locked(R)
    for duplicate in duplicates:
        os.close(duplicate)
    rank.main([*RANK, *ONE])
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
    assert f"{R} is being made by another process: waiting for it\n{R} is finished" in out


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
    assert runs.load("a.json") == 1
    assert sorted(os.listdir()) == ["a.json", "data"]


@pytest.mark.parametrize("name,code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_a_run_in_one_line(name, code, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WITH", name)
    done, _ = run_stage(tmp_path, "rank", RANK, "epoch", 4)
    assert done.returncode == code
    assert done.stderr.startswith("stopped: the same command, without --force, goes on from the last whole")
    assert done.stderr.count("\n") == 1
    rank.main([*RANK, "--results", str(tmp_path)])
    assert "going on after epoch 1 of" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("KILLS", 3))))
def test_killed_at_any_moment_ends_with_the_same_result(undisturbed, tmp_path, seed):
    """SIGKILL once in each stage, at a random moment of a phase (three seeds hit every phase of every stage),
    then the same command again: what was written is bit-identical to the undisturbed chain's."""
    chance, (expected, moments) = random.Random(seed), undisturbed
    for i, (stage, argv, phases) in enumerate(CHAIN):
        phase = phases[(seed + i) % len(phases)]
        moment = chance.randint(1, moments[stage][phase])
        done, marker = run_stage(tmp_path, stage, argv, phase, moment)
        assert done.returncode == -9, done.stderr
        assert marker == f"{phase} {moment}"
        if phase == "save":
            assert list(tmp_path.rglob("*.part")), "killed with the file beside its place"
        done, _ = run_stage(tmp_path, stage, argv)
        assert done.returncode == 0, done.stderr
    assert differences(contents(tmp_path), expected) == []


@pytest.mark.slow
def test_two_processes_equal_one():
    """The same weights (so the same gradients), loss and counts from one process, from two, and from two that
    become one after an epoch."""
    done = processes("import common, small; common.script(lambda: small.train('two'))")
    assert done.returncode == 0, done.stderr
    small.train("one")
    small.train("rest", runs.load("two-1"))
    one, *others = (runs.load(f"{name}-2") for name in ("one", "two", "rest"))
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
    done = processes("import common, evaluate, sat, small\n"
                     "common.script(lambda: [sat.main(small.STAGE), evaluate.main(small.AGAIN)])")
    assert done.returncode == 0, done.stderr
    for line in ("ranking the examples first", "class, hardest first", "SAT on few", "evaluating results"):
        assert done.stdout.count(line) == 1, line
    ranking, last = (runs.load(RANKING / f"{name}.pt") for name in ("scores", "last"))
    data = load_dataset("few", "data")
    model = models.build("preactresnet8", 10, *data.mean_std())
    model.load_state_dict(last["model"])
    for metric, scores in rank.score(model, data.train, torch.device("cpu"), ["entropy", "svar"]).items():
        torch.testing.assert_close(ranking[metric], scores.float(), rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(attacks, "attack_batch", AUTOATTACK)
    path, = R.glob("eval-*.json")
    evaluated, two, last = (runs.load(p) for p in (path, R / "result.json", R / "last.pt"))
    evaluate.main([*small.AGAIN, "--force"])
    assert runs.load(path) == evaluated, "chunks of 3, dealt to two"
    sat.main([*small.STAGE, "--force"])
    one = runs.load(R / "result.json")
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
    done = processes(code, "marker", "epoch", 5, "rank", *RANK)
    assert done.returncode != 0
    assert "exitcode  : -9" in done.stderr
    assert "[rank0]: Traceback" not in done.stderr
    assert runs.load(RANKING / "last.pt")["epoch"] == 1
    assert not (RANKING / "scores.pt").exists()
    rank.main(RANK)
    assert "going on after epoch 1" in capsys.readouterr().out
    assert (RANKING / "scores.pt").exists()


@pytest.mark.parametrize("size,count,valid", [("1", "1", "2 to 96"), ("3", "2", "4 to 96")])
def test_a_process_with_one_image_is_refused(size, count, valid, monkeypatch):
    """Batch norm: of one value per channel, on maps of 1x1, torch takes no variance."""
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(UserError, match=f"--batch-size {size} .*: give {valid} .batch norm needs 2 images"):
        open_dataset(sat.command_line([*SAT, "--batch-size", size]), "cpu")


@pytest.mark.parametrize("words", """--arch preactresnet18|--side 64|--augment none|--split full|--frac 0.3
--size 40|--split csat --classes 3|--order easiest|--order random|--order redrawn|--metric svar
--weight emphasis|--weight-factor 3|--norm linf --eps 0.5 --step-size 0.1|--eps 0.4|--attack fgsm-rs
--attack pgd-authors|--steps 3|--step-size 0.2|--random-start|--epochs 3|--batch-size 32|--lr 0.2
--lr-decays 5|--weight-decay 0|--seed 1|--select-n 5|--select-attacks square""".replace("\n", "|").split("|"))
def test_a_flag_that_changes_training_changes_name_and_identity(words):
    plain, other = sat.command_line([]), sat.command_line(words.split())
    assert sat.run_folder(other)[0] != sat.run_folder(plain)[0]
    assert runs.identity(other) != runs.identity(plain)


def test_a_run_does_not_go_on_with_the_A_of_another_ranking():
    argv = [*SAT, "--frac", "0.3", "--run", "r"]
    rank.main(RANK)
    stop_in(sat.main, argv, "save_epoch")
    ranking = runs.load(RANKING / "scores.pt")
    torch.save({**ranking, "entropy": -ranking["entropy"]}, RANKING / "scores.pt")
    with pytest.raises(UserError, match="last.pt was trained with another A: name this run with --run"):
        sat.main(argv)


SCORES = """
import sys, torch, common, data, models, rank, sat

def main():
    device, digits = common.set_up(sat.command_line([])), data.load_dataset("digits", "data")
    split = data.Split(digits.train.x[:97], digits.train.y[:97])
    vog = rank.Vog(split, device)
    for seed in (0, 1):  # in place of two epochs
        torch.manual_seed(seed)
        model = models.build("preactresnet8", 10, [0.3], [0.35])
        scores = rank.score(model, split, device, ["entropy", "svar", "vog"], vog)
    scores["vog"] = vog.scores()
    if common.process_index() == 0:
        torch.save(scores, sys.argv[1])
common.script(main)
"""


@pytest.mark.slow
def test_two_processes_score_as_one():
    done = processes(SCORES, "two.pt")
    assert done.returncode == 0, done.stderr
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    subprocess.run([sys.executable, "code.py", "one.pt"], check=True, env=environment)
    one, two = runs.load("one.pt"), runs.load("two.pt")
    for metric in ("entropy", "svar", "vog"):
        torch.testing.assert_close(two[metric], one[metric], atol=1e-6, rtol=1e-4)
        assert (two[metric] != 0).all(), metric
