"""What test_runs.py and test_cli.py share: a data set of 96 digits, and runs of a second on it."""
import fcntl
import io
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import attacks
import common
import data
import runs
import sat
from conftest import HERE
from train import train as train_epochs

RANK = ["--dataset", "few", "--epochs", "3", "--lr-decays", "1", "--batch-size", "32"]
SAT = [*RANK, "--steps", "2", "--eval-attacks", "apgd-ce", "--eval-n", "8", "--eval-batch", "5",
       "--select-attacks", "apgd-ce", "--select-n", "4"]
ONE_EPOCH = [*SAT, "--split", "none", "--epochs", "1", "--lr-decays", "--run", "r"]
CSAT = [*SAT, "--split", "csat", "--size", "2", "--epochs", "1", "--lr-decays", "--run", "b"]
STAGE = [*SAT, "--epochs", "1", "--lr-decays", "--frac", "0.3", "--run", "r"]
R, RANKING = Path("results/few/r"), Path("results/few/rank-preactresnet8-seed0")
AGAIN = [str(R / "best.pt"), "--eval-batch", "3"]
AUTOATTACK, PGD = attacks.attack_batch, attacks.pgd


def one_step(model, x, y, *, eps, norm, attacks, seed):
    """In place of attacks.attack_batch: one step of PGD."""
    adversarial = PGD(model, x, y, eps=eps, norm=norm, step_size=eps, steps=1)
    clean = model(x).argmax(1) == y
    return clean, clean & (model(adversarial).argmax(1) == y)


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """The folder of the data set "few", 96 and 40 digits: an epoch is three steps."""
    digits, folder = data.load_dataset("digits", "data"), tmp_path_factory.mktemp("data")
    train_set = {"x": digits.train.x[:96].clone(), "y": digits.train.y[:96].clone()}
    test_set = {"x": digits.test.x[:40].clone(), "y": digits.test.y[:40].clone()}
    torch.save({"train": train_set, "test": test_set, "classes": digits.classes}, folder / "few.pt")
    return folder


@pytest.fixture(autouse=True)
def workplace(few, tmp_path, monkeypatch):
    """An empty working folder with few's data. AutoAttack is one step in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(attacks, "attack_batch", one_step)
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(few)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    while runs.LOCKS:
        runs.LOCKS.popitem()[1].close()


@pytest.fixture(scope="session")
def finished(few, tmp_path_factory):
    """A folder of results with a finished run of CSAT, and its ranking."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attacks, "attack_batch", one_step)
        sat.main([*CSAT, "--data-dir", str(few), "--results", str(folder)])
    return folder


class Malicious:
    """Unpickled, it would run a command."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def zipped(path, pickled):
    """The bytes of the torch file at `path` with another pickle in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))
    return out.getvalue()


def stop_in(main, argv, function, after=True, when=lambda *a: True):
    """Runs main(argv) until the function of runs.py has been called (or, with after=False, is to be called)
    with arguments of which `when` is true."""
    real = getattr(runs, function)

    def call_and_stop(*a):
        if after or not when(*a):
            real(*a)
        if when(*a):
            raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, function, call_and_stop)
        main(argv)


def locked(folder):
    """Whether a process that opens the lock of the run in `folder` would have to wait."""
    folder = Path(folder)
    with open(folder.parents[1] / ".locks" / f"{folder.parent.name}-{folder.name}", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def processes(n, code, *words):
    """Runs Python code with n processes under torchrun."""
    Path("code.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n),
               "--", "code.py", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={
        **os.environ, "PYTHONPATH": f"{HERE / 'tests'}:{HERE}", "OMP_NUM_THREADS": "1"})


CASES = {"weighted": (5.0, []), "random-start": (1.0, ["--random-start"])}


def train(case, name, start=None):
    """Two epochs of training without batch norm, each saved as <name>-<case>-<epoch>."""
    w_A, argv = CASES[case]
    args = sat.command_line(["--split", "full", "--epochs", "2", "--lr-decays", "1", "--batch-size", "63",
                             "--steps", "2", *argv])
    device, digits = common.set_up(args), data.load_dataset("digits", "data")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    model.frozen = False
    A = torch.arange(300) % 29 == 0  # so few that batches of a process often hold none
    split = data.Split(digits.train.x[:300], digits.train.y[:300])
    for state in train_epochs(model, split, A, w_A, args, device, start):
        if common.process_index() == 0:
            torch.save(state, f"{name}-{case}-{state['epoch']}")
