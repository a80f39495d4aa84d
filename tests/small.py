"""What test_runs.py and test_cli.py share: a data set of 96 digits, and runs of a second on it."""
import io
import os
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

ONE = ["--epochs", "1", "--lr-decays"]
RANK = ["--dataset", "few", "--epochs", "3", "--lr-decays", "1", "--batch-size", "32"]
SAT = [*RANK, "--steps", "2", "--eval-attacks", "apgd-ce", "--eval-n", "8", "--eval-batch", "5",
       "--select-attacks", "apgd-ce", "--select-n", "4"]
ONE_EPOCH = [*SAT, "--split", "none", *ONE, "--run", "r"]
CSAT = [*SAT, "--split", "csat", "--size", "2", *ONE, "--run", "b"]
STAGE = [*SAT, *ONE, "--frac", "0.3", "--run", "r"]
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
    parts = {part: {"x": split.x[:n].clone(), "y": split.y[:n].clone()}
             for part, split, n in (("train", digits.train, 96), ("test", digits.test, 40))}
    torch.save({**parts, "classes": digits.classes}, folder / "few.pt")
    return folder


@pytest.fixture(autouse=True)
def workplace(few, tmp_path, monkeypatch):
    """An empty working folder with few's data. AutoAttack is one step in this process."""
    monkeypatch.setattr(attacks, "attack_batch", one_step)
    monkeypatch.setattr(runs, "LOCKS", {})
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(few)


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


def stop_in(main, argv, function):
    """Runs main(argv) until the function of runs.py has been called."""
    real = getattr(runs, function)

    def call_and_stop(*a):
        real(*a)
        raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, function, call_and_stop)
        main(argv)


def locked(folder):
    """Whether another process would have to wait for the lock of the run in `folder`."""
    lock = folder.parents[1] / ".locks" / f"{folder.parent.name}-{folder.name}"
    return subprocess.run(["flock", "--nonblock", lock, "true"]).returncode == 1


def processes(code, *words):
    """Runs Python code with two processes under torchrun."""
    Path("code.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--",
               "code.py", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={
        **os.environ, "PYTHONPATH": f"{HERE / 'tests'}:{HERE}", "OMP_NUM_THREADS": "1"})


def train(name, start=None):
    """Two epochs of training without batch norm, each saved as <name>-<epoch>."""
    args = sat.command_line(["--split", "full", "--epochs", "2", "--lr-decays", "1", "--batch-size", "63",
                             "--steps", "2", "--random-start"])
    device, digits = common.set_up(args), data.load_dataset("digits", "data")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    model.frozen = False
    A = torch.arange(300) % 29 == 0  # so few that batches of a process often hold none
    split = data.Split(digits.train.x[:300], digits.train.y[:300])
    for state in train_epochs(model, split, A, 5.0, args, device, start):
        if common.process_index() == 0:
            torch.save(state, f"{name}-{state['epoch']}")
