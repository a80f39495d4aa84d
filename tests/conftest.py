"""What the tests share: an empty working folder with a data set of 96 digits, and runs of a second on it."""
import os
from pathlib import Path

import pytest
import torch

import attacks
import data
import runs

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the scripts, and here: the tensors are tiny
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

QUICK = "--epochs 2 --eval-attacks apgd-ce --eval-n 24 --select-attacks apgd-ce --select-n 8".split()
ONE = ["--epochs", "1", "--lr-decays"]
RANK = ["--dataset", "few", "--epochs", "3", "--lr-decays", "1", "--batch-size", "32"]
SAT = [*RANK, "--steps", "2", "--eval-attacks", "apgd-ce", "--eval-n", "8", "--eval-batch", "5",
       "--select-attacks", "apgd-ce", "--select-n", "4"]
ONE_EPOCH = [*SAT, "--split", "none", *ONE, "--run", "r"]
CSAT = [*SAT, "--split", "csat", "--size", "2", *ONE, "--run", "b"]
R = Path("results/few/r")
RANKING = Path("results/few/rank-preactresnet8-batch-size=32-epochs=3-lr-decays=1-seed0")  # of RANK
RANKING_1 = Path("results/few/rank-preactresnet8-batch-size=32-epochs=1-lr-decays=-seed0")  # of an epoch
AUTOATTACK, PGD = attacks.attack_batch, attacks.pgd


def one_step(model, x, y, *, eps, norm, attacks, seed, precision):
    """In place of attacks.attack_batch: one step of PGD."""
    adversarial = PGD(model, x, y, eps=eps, norm=norm, step_size=eps, steps=1)
    clean = model(x).argmax(1) == y
    return clean, clean & (model(adversarial).argmax(1) == y)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty working folder with the data set "few", whose epoch is three steps. AutoAttack is one step."""
    monkeypatch.setattr(attacks, "attack_batch", one_step)
    monkeypatch.setattr(runs, "SAVE_SECONDS", 0)  # after every epoch
    monkeypatch.chdir(tmp_path)
    digits = data.load_dataset("digits", "data")
    parts = {part: {"x": split.x[:n].clone(), "y": split.y[:n].clone()}
             for part, split, n in (("train", digits.train, 96), ("test", digits.test, 40))}
    Path("data").mkdir()
    torch.save({**parts, "classes": digits.classes}, "data/few.pt")
