"""Runs: resumed, stopped, killed, several at once, and the folders they live in."""
import json
import math
import os
import random
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import attacks
import common
import evaluate
import models
import rank
import runs
import sat
import train
from common import HERE, UserError
from conftest import AUTOATTACK, ONE, ONE_EPOCH, RANK, RANKING, RANKING_1, SAT, R
from data import Examples, load_dataset, open_dataset
from paper import results

KILLER = """
import importlib, json, os, signal, sys
phase, moment, with_signal, stage, *argv = sys.argv[1:]
import attacks, common, runs, train
seen, runs.SAVE_SECONDS = {}, 0

def kill_after(module, function, where):  # the call of the function that is the moment of this phase
    def call(*a, **k):
        result = real(*a, **k)
        seen[where] += 1
        if where == phase and seen[where] == int(moment):
            os.kill(os.getpid(), getattr(signal, with_signal))
        return result
    real, seen[where] = getattr(module, function), 0
    setattr(module, function, call)

kill_after(train, "sat_step", "epoch")        # the step is done, the epoch is not saved
kill_after(attacks, "attack_batch", "chunk")  # the chunk is done and not saved
kill_after(os, "fsync", "save")               # the file is written beside its place, and not yet in it
common.script(lambda: importlib.import_module(stage).main(argv))
print("SEEN", json.dumps(seen))
"""
CHAIN = [  # stage, its arguments, what it can be killed in
    ("rank", RANK, ("epoch", "save")),
    ("sat", [*SAT, "--frac", "0.3", "--random-start", "--run", "a"], ("epoch", "chunk", "save")),
    ("evaluate", ["few/a/best.pt", "--eps", "0.3"], ("chunk", "save")),
    ("transfer", ["few/a/best.pt", "--config", str(HERE / "configs/transfer/digits5-9.yaml"),
                  *RANK[2:6], *SAT[10:], "--run", "t"], ("epoch", "chunk", "save"))]


SERVER = """
import json, os, sys
import torch._dynamo, attacks, common, evaluate, rank, sat, transfer  # once, not in each of the processes
for line in sys.stdin:
    folder, *words = json.loads(line)
    if os.fork() == 0:
        os.chdir(folder)
        for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
            os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        code, killer, sys.argv = 0, sys.argv[1], ["", *words]
        try:
            exec(killer, {})
        except SystemExit as e:
            code = e.code
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture
def serve():
    """Runs a stage under KILLER, with results in `folder`, in a child of a process that has imported all
    modules. Returns its exit code."""
    def run(folder, stage, argv, phase="none", moment=0, signal="SIGKILL"):
        folder.mkdir(exist_ok=True)
        if stage != "evaluate":
            argv = [*argv, "--results", ".", "--amp", os.environ.get("KILLS_AMP", "off")]
        argv = [*argv, "--data-dir", str(Path("data").resolve())]
        words = [str(folder), phase, str(moment), signal, stage, *argv]
        server.stdin.write(json.dumps(words) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())
    with subprocess.Popen([sys.executable, "-c", SERVER, KILLER], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(HERE)}) as server:
        yield run


def differences(folder, expected):
    """The files below two folders that differ, bit by bit but without times, or that one of them lacks."""
    texts = {}
    for root in (folder, expected):
        for path in root.rglob("*"):
            if path.suffix in (".json", ".jsonl", ".pt"):
                content = path.read_text() if path.suffix == ".jsonl" else runs.load(path)
                text = json.dumps(content, default=lambda tensor: tensor.numpy().tobytes().hex())
                texts.setdefault(path.relative_to(root), []).append(re.sub(r'seconds\\*": [^,}]+', "", text))
    return [path for path, pair in texts.items() if len(pair) == 1 or pair[0] != pair[1]]


def stop_in(main, argv, function):
    """Runs main(argv) until the function of runs.py has been called."""
    def call_and_stop(*a):
        real(*a)
        raise KeyboardInterrupt
    real = getattr(runs, function)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, function, call_and_stop)
        main(argv)


@pytest.mark.parametrize("main,argv", [
    (sat.main, [*SAT, "--order", "redrawn", "--frac", "0.3", "--random-start"]), (rank.main, RANK)])
def test_a_resumed_run_is_the_run_that_was_never_stopped(main, argv, capsys):
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
    main([*argv, "--results", "parts"])
    assert "going on after epoch 3" in capsys.readouterr().out
    assert differences(Path("parts"), Path("whole")) == []
    assert not list(Path("parts").rglob("*.part"))


@pytest.mark.parametrize("key,value,message", [
    ("args", {"seed": 1}, "seed: 1 there, 0 now"),
    ("args", {"flag_of_old": 3}, "flag_of_old: 3 there, None now"),
    ("fingerprint", {"images": "f"}, "belongs to other data .images: f there, "),
    ("best", [0.5, 0.5, 1], "best.pt, of epoch 1, is missing: --force repeats the run")])
def test_last_pt_of_another_run_is_refused(key, value, message):
    args, data = sat.command_line([]), load_dataset("digits", "data")
    state = {"A": "a", "fingerprint": data.fingerprint(), "args": runs.identity(args), "optimizer": {},
             "log": [{"epoch": 1}], "epoch": 2, "best": [-1, -1, 0]}
    runs.save("last.pt", {**state, key: {**state[key], **value} if isinstance(value, dict) else value})
    with pytest.raises(UserError, match=message):
        sat.resume_fit(Path(), args, data, "a")


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(monkeypatch):
    factors, real = iter([1, 1, 1, 1, math.nan, 1]), train.sat_loss  # three steps an epoch
    monkeypatch.setattr(train, "sat_loss", lambda *a: real(*a) * next(factors))
    with pytest.raises(UserError, match="not finite in epoch 2: stopped"):
        sat.main([*ONE_EPOCH, "--epochs", "3"])
    last = runs.load(R / "last.pt")
    assert last["epoch"] == 1
    assert all(v.isfinite().all() for v in last["model"].values())


@pytest.mark.parametrize("words,name", [
    ("--order random --size 40 --weight-factor 3", "digits/esat-random-40-w3.0-seed0"),
    ("--metric svar --epochs 30 --seed 3", "digits/esat-hardest-0.5-svar-seed3"),
    ("--split csat --classes 3 1 --weight emphasis --seed 2", "digits/csat-1-3-emphasis-seed2"),
    ("--split full --eps 1 --lr-decays 1 2", "digits/full-eps=1.0-lr-decays=1+2-seed0"),
    ("--split none --dataset mine --device cpu --threads 1 --workers 0 --amp bf16 --compile on --data-dir d "
     "--force", "mine/none-seed0"),
    ("--split none --run mine --epochs 7", "digits/mine"),
    (f"--config {HERE}/configs/cifar10.yaml", "cifar10/esat-hardest-0.5-seed0"),
    (f"--config {HERE}/configs/cifar10-linf.yaml --dataset x", "x/cifar10-linf-esat-hardest-0.5-seed0")])
def test_run_names(words, name):
    args = sat.command_line([*words.split(), "--results", "r"])
    assert sat.run_folder(args)[0] == Path("r") / name


def test_folders_of_names_in_other_scripts_stay_distinct():
    names = ["猫", "犬", "a b", "a/b", "a_b", "été", "../../../x", "x" * 200, "x" * 201]
    folders = [sat.run_folder(sat.command_line(["--split", "csat", "--classes", name]))[0] for name in names]
    assert len(set(folders)) == len(names)
    assert folders[4].name == "csat-a_b-seed0"
    for folder in folders:
        assert folder.parent == Path("results/digits")
        assert folder.name.isascii()
        assert len(folder.name) < 255


def test_other_flags_are_refused_and_force_keeps_the_old_run_until_the_new_one_is_whole(capsys):
    stop_in(sat.main, ONE_EPOCH, "save_epoch")
    words, before = [*ONE_EPOCH, "--lr", "0.2"], (R / "args.json").read_bytes()
    for make in (lambda: sat.main(words), runs.making(R, sat.command_line(words)).__enter__):
        with pytest.raises(UserError, match=r"other flags \(lr: 0.1 there, 0.2 now\): give another --run"):
            make()
    assert (R / "args.json").read_bytes() == before
    sat.main([*words, "--force"])
    assert "going on" not in capsys.readouterr().out, "one that is not finished starts again"
    old, before = R.with_name(".old-r"), {p.name: p.read_bytes() for p in R.iterdir()}
    sat.main(words)
    assert "results/few/r is finished (--force repeats it)\nAutoAttack's apgd-ce" in capsys.readouterr().out
    stop_in(sat.main, [*words, "--force"], "save")
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before
    assert not (R / "result.json").exists()
    assert results.read_runs("results") == [], "what is put aside is in no report"
    sat.main(words)  # the repeat goes on without --force
    assert (R / "result.json").exists()
    assert not old.exists()


def test_locks_end_with_their_runs(monkeypatch):
    def locked(folder):
        lock = f"results/.locks/few-{folder.name}"
        return subprocess.run(["flock", "--nonblock", lock, "true"]).returncode == 1

    def batches(*a):
        locks.append((locked(RANKING_1), locked(R)))
        duplicates.extend(os.dup(int(path.name)) for path in list(Path("/proc/self/fd").iterdir())
                          if ".locks" in os.path.realpath(path))  # as a loader process has them
        return real(*a)
    real, locks, duplicates = train.training_batches, [], []
    monkeypatch.setattr(train, "training_batches", batches)
    sat.main([*SAT, *ONE, "--run", "r", "--seed", "3"])
    assert locks == [(True, False), (False, True)], "while sat.py makes the ranking, and while it trains"
    assert not locked(R)
    assert duplicates
    for duplicate in duplicates:
        os.close(duplicate)


@pytest.mark.slow
def test_two_equal_commands_at_once_make_one_run(capsys):
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


def test_full_disk_and_a_folder_that_cannot_be_written():
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
    with pytest.raises(UserError, match="cannot write .*: Not a directory; give another --results"):
        sat.main([*ONE_EPOCH, "--results", str(R / "result.json/r")])


@pytest.mark.slow
@pytest.mark.parametrize("name,code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_a_run_in_one_line(name, code, serve, capsys):
    assert serve(Path("parts"), "rank", RANK, "epoch", 4, name) == code
    error = Path("parts/stderr.txt").read_text()
    assert error.startswith("stopped: repeat the command to resume from the last ")
    assert error.count("\n") == 1
    rank.main([*RANK, "--results", "parts"])
    assert "going on after epoch 1 of" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_at_any_moment_ends_with_the_same_result(serve):
    """SIGKILL once in each stage, at a random moment of a phase (three seeds hit every phase of every stage),
    then the same command again: bit-identical to an undisturbed chain. KILLS=20 [KILLS_AMP=bf16]: more."""
    whole, moments = Path("whole"), {}
    for stage, argv, _ in CHAIN:
        assert serve(whole, stage, argv) == 0, (whole / "stderr.txt").read_text()
        moments[stage] = json.loads((whole / "stdout.txt").read_text().rsplit("SEEN", 1)[1])
    for seed in range(int(os.environ.get("KILLS", 3))):
        chance, folder = random.Random(seed), Path(f"killed-{seed}")
        for i, (stage, argv, phases) in enumerate(CHAIN):
            phase = phases[(seed + i) % len(phases)]
            moment = chance.randint(1, moments[stage][phase])
            assert serve(folder, stage, argv, phase, moment) == -9
            if phase == "save":
                assert list(folder.rglob("*.part")), "killed with the file beside its place"
            assert serve(folder, stage, argv) == 0, (folder / "stderr.txt").read_text()
        assert differences(folder, whole) == [], seed


def processes(code, *words):
    """Runs Python code with two processes under torchrun."""
    Path("code.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--",
               "code.py", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={
        **os.environ, "PYTHONPATH": f"{HERE / 'tests'}:{HERE}", "OMP_NUM_THREADS": "1"})


def train_without_batch_norm(name, start=None):
    """Two epochs of training, each saved as <name>-<epoch>."""
    args = sat.command_line(["--split", "full", "--epochs", "2", "--lr-decays", "1", "--batch-size", "63",
                             "--steps", "2", "--random-start"])
    device, digits = common.set_up(args), load_dataset("digits", "data")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    model.frozen = False
    A = torch.arange(300) % 29 == 0  # so few that batches of a process often hold none
    examples = Examples(digits.train.x[:300], digits.train.y[:300])
    for state in train.train(model, examples, A, 5.0, args, device, start):
        if common.process_index() == 0:
            torch.save(state, f"{name}-{state['epoch']}")


def vog_scores(name):
    """VoG of 97 examples, by two networks in place of two epochs, saved as `name`."""
    device, digits = common.set_up(sat.command_line([])), load_dataset("digits", "data")
    examples = Examples(digits.train.x[:97], digits.train.y[:97])
    vog = rank.Vog(examples, device)
    for seed in (0, 1):
        torch.manual_seed(seed)
        rank.score(models.build("preactresnet8", 10, [0.3], [0.35]), examples, device, ["vog"], vog)
    scores = vog.scores()
    texts = common.all_texts(["all", f"of {common.process_index()}"])
    if common.process_index() == 0:
        torch.save(scores, name)
        assert texts == ["all", *(f"of {i}" for i in range(common.process_count()))]


@pytest.mark.slow
def test_two_processes_equal_one(monkeypatch):
    """The weights (so the gradients) of training, also of two processes that become one after an epoch. Then
    both make a run and its ranking: one process takes the same A, and gets the same numbers from best.pt."""
    stage, again = [*SAT, *ONE, "--frac", "0.3", "--run", "r"], [str(R / "best.pt"), "--eval-batch", "3"]
    done = processes("import common, evaluate, sat, test_runs\n"
                     "common.script(lambda: [test_runs.train_without_batch_norm('two'), "
                     f"test_runs.vog_scores('vog-two'), sat.main({stage}), evaluate.main({again})])")
    assert done.returncode == 0, done.stderr
    train_without_batch_norm("one")
    vog_scores("vog-one")
    train_without_batch_norm("rest", runs.load("two-1"))
    one, *others = (runs.load(f"{name}-2") for name in ("one", "two", "rest"))
    assert one["row"]["attacked"] > 0
    for other in others:
        for k, v in one["model"].items():
            torch.testing.assert_close(other["model"][k], v, atol=1e-5, rtol=1e-4)
        for k in ("loss", "train_accuracy", "attacked", "forward_equivalents"):
            assert other["row"][k] == pytest.approx(one["row"][k], rel=1e-4)
    torch.testing.assert_close(runs.load("vog-two"), runs.load("vog-one"), rtol=1e-4, atol=1e-6)
    for line in ("ranking the examples first", "class, hardest first", "SAT on few", "evaluating results"):
        assert done.stdout.count(line) == 1, line
    ranking, last = (runs.load(RANKING_1 / f"{name}.pt") for name in ("scores", "last"))
    data = load_dataset("few", "data")
    model = models.build("preactresnet8", 10, *data.mean_std)
    model.load_state_dict(last["model"])
    for metric, scores in rank.score(model, data.train, torch.device("cpu"), ["entropy", "svar"]).items():
        torch.testing.assert_close(ranking[metric], scores.float(), rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(attacks, "attack_batch", AUTOATTACK)
    path, = R.glob("eval-*.json")
    evaluated, two, last = (runs.load(p) for p in (path, R / "result.json", R / "last.pt"))
    evaluate.main([*again, "--force"])
    assert runs.load(path) == evaluated, "chunks of 3, dealt to two"
    sat.main([*stage, "--force"])
    one = runs.load(R / "result.json")
    assert (two["processes"], one["processes"]) == (2, 1)
    assert runs.load(R / "last.pt")["A"] == last["A"]
    for key in ("A", "ranking", "N", "w_A", "settings", "args", "fingerprint"):
        assert one[key] == two[key], key


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job(capsys):
    code = KILLER.replace("if where == phase", "if common.process_index() == 1 and where == phase")
    done = processes(code, "epoch", 5, "SIGKILL", "rank", *RANK)
    assert done.returncode != 0
    assert "exitcode  : -9" in done.stderr
    assert "[rank0]: Traceback" not in done.stderr
    assert runs.load(RANKING / "last.pt")["epoch"] == 1
    assert not (RANKING / "scores.pt").exists()
    rank.main(RANK)
    assert "going on after epoch 1" in capsys.readouterr().out
    assert (RANKING / "scores.pt").exists()
    done = processes("import common, sat; common.script(lambda: sat.main(['--order', 'hardst']))")
    assert done.stderr.count("error: argument --order: invalid choice: 'hardst'") == 2, "ours, torchrun's"


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
    with pytest.raises(UserError, match="last.pt was trained with another A: give another --run"):
        sat.main(argv)
