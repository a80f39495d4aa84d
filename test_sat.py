"""All tests: plain pytest on the CPU, against oracles written out here.    python -m pytest -q test_sat.py"""
import json
import math
import os
import pickle
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

import attacks
import common
import data as datasets
import evaluate
import models
import rank
import report
import sat
import transfer
from common import UserError

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)  # the tensors are tiny
QUICK = ["--epochs", "2", "--lr-decays", "--eval-attacks", "apgd-ce", "--eval-n", "24", "--select-attacks", "apgd-ce",
         "--select-n", "8"]


def net(n_classes=10, channels=1, seed=0, arch="preactresnet8"):
    torch.manual_seed(seed)
    return models.build(arch, n_classes, [0.3] * channels, [0.35] * channels)


def images(n=6, channels=1, side=8, n_classes=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, channels, side, side, generator=g)
    x[: n // 2] = x[: n // 2].round()  # half of them on the edge of the box
    return x, torch.randint(0, n_classes, (n,), generator=g)


def script(name, *argv, cwd=None, env=None):
    return subprocess.run([sys.executable, str(HERE / name), *map(str, argv)], capture_output=True, text=True, cwd=cwd,
                          env={**os.environ, **(env or {})})


# --- attacks -----------------------------------------------------------------------------------------------------------

def oracle_pgd(model, x, y, eps, step, steps, norm):
    """Eq. 1's inner maximisation, one example at a time, written from the definition."""
    out = []
    for x_i, y_i in zip(x, y):
        delta = torch.zeros_like(x_i)
        for _ in range(steps):
            z = (x_i + delta).clone().requires_grad_()
            g = torch.autograd.grad(-model(z[None]).log_softmax(1)[0, y_i], z)[0]
            if norm == "l2":
                delta = delta + (step * g / g.norm() if g.norm() > 0 else 0)
                delta = delta if delta.norm() <= eps else delta * eps / delta.norm()
            else:
                delta = (delta + step * g.sign()).clamp(-eps, eps)
            delta = (x_i + delta).clamp(0, 1) - x_i
        out.append(x_i + delta)
    return torch.stack(out)


@pytest.mark.parametrize("norm,eps,step", [("l2", 0.5, 0.1), ("l2", 0.5, 0.4), ("linf", 0.1, 0.03)])
def test_pgd_is_its_definition(norm, eps, step):
    model, (x, y) = net().eval(), images()
    mine = attacks.pgd(model, x, y, eps=eps, step_size=step, steps=5, norm=norm)
    torch.testing.assert_close(mine, oracle_pgd(model, x, y, eps, step, 5, norm), atol=2e-5, rtol=0)


def every_attack():
    for norm, eps in (("l2", 0.5), ("linf", 0.1)):
        for kind in ("pgd", "pgd-random", "fgsm-rs"):
            yield norm, eps, kind


def run_attack(model, x, y, norm, eps, kind):
    if kind == "fgsm-rs":
        return attacks.fgsm_rs(model, x, y, eps=eps, norm=norm)
    start = attacks.random_start(x, eps, norm) if kind == "pgd-random" else None
    return attacks.pgd(model, x, y, eps=eps, step_size=eps / 2, steps=7, norm=norm, start=start)


@pytest.mark.parametrize("norm,eps,kind", list(every_attack()))
def test_ball_and_box(norm, eps, kind):
    model, (x, y) = net(), images(20)
    adv = run_attack(model, x, y, norm, eps, kind)
    size = (adv - x).flatten(1).norm(dim=1) if norm == "l2" else (adv - x).flatten(1).abs().amax(1)
    assert adv.min() >= 0 and adv.max() <= 1
    assert size.max() <= eps + 1e-6 and size.min() > 0.1 * eps, "it moves, and stays in the ball"
    model.eval()
    assert F.cross_entropy(model(adv), y) > F.cross_entropy(model(x), y)
    assert not adv.requires_grad
    assert torch.equal(run_attack(model, x, y, norm, 0.0, kind), x), "eps = 0"
    assert run_attack(model, x[:0], y[:0], norm, eps, kind).shape == (0, 1, 8, 8), "a batch of none"


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_zero_gradient_gives_a_zero_step(norm):
    class Constant(nn.Module):
        def forward(self, x):
            return 0 * x.flatten(1)[:, :10]
    x, y = images()
    assert torch.equal(attacks.pgd(Constant(), x, y, eps=0.5, step_size=0.1, norm=norm), x)


def test_fgsm_rs_is_one_step_of_1_25_eps():
    class Linear(nn.Module):  # the gradient of its loss has one direction whatever x is
        def forward(self, x):
            s = x.flatten(1).sum(1, keepdim=True)
            return torch.cat([s, -s], 1)
    x, y = torch.full((3, 1, 4, 4), 0.5), torch.zeros(3, dtype=torch.int64)
    start = torch.full_like(x, 0.01)
    adv = attacks.fgsm_rs(Linear(), x, y, eps=0.1, norm="linf", start=start)
    torch.testing.assert_close(adv, torch.full_like(x, 0.5 - 0.1)), "0.01 - 0.125 is projected to -0.1"
    adv = attacks.fgsm_rs(Linear(), x, y, eps=0.1, norm="l2", start=0 * start)
    torch.testing.assert_close((adv - x).flatten(1).norm(dim=1), torch.full((3,), 0.1))
    adv = attacks.fgsm_rs(Linear(), x, y, eps=0.1, norm="l2", start=start)  # ||start|| = 0.04, against the step of 0.125
    torch.testing.assert_close((adv - x).flatten(1).norm(dim=1), torch.full((3,), 0.125 - 0.04))


def test_random_start_is_uniform_in_the_ball():
    x = torch.zeros(4000, 1, 2, 2)
    g = torch.Generator().manual_seed(0)
    radius = attacks.random_start(x, 2.0, "l2", g).flatten(1).norm(dim=1) / 2
    assert abs((radius**4).mean() - 0.5) < 0.02, "in 4 dimensions r^4 is uniform in [0, 1]"
    flat = attacks.random_start(x, 0.3, "linf", g)
    assert flat.abs().max() <= 0.3 and abs(flat.mean()) < 0.01 and abs(flat.std() - 0.3 / math.sqrt(3)) < 0.01


@pytest.mark.parametrize("kind", ["pgd", "fgsm-rs", "autoattack"])
def test_attacks_leave_the_model_as_it_was(kind):
    model, (x, y) = net(), images()
    model.train()
    model.features[1].bn1.eval()  # a mixture of modes must come back as a mixture
    model.head.bias.requires_grad_(False)
    F.cross_entropy(model(x), y).backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes, wants = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    if kind == "autoattack":
        attacks.autoattack(model, x, y, eps=0.3, attacks=["apgd-ce", "fab-t"])
    else:
        run_attack(model, x, y, "l2", 0.5, kind)
    assert [m.training for m in model.modules()] == modes and [p.requires_grad for p in model.parameters()] == wants
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "batch-norm statistics included"
    assert all(p.grad is None if g is None else torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads))


def test_an_examples_perturbation_does_not_depend_on_its_batch():
    model, (x, y) = net().eval(), images(8)
    whole = attacks.pgd(model, x, y, eps=0.5, step_size=0.1)
    torch.testing.assert_close(whole[2:5], attacks.pgd(model, x[2:5], y[2:5], eps=0.5, step_size=0.1), atol=1e-5, rtol=0)


# --- AutoAttack --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def trained():
    """A digits network after two epochs, and 12 test images of which it gets most right."""
    args, data = sat.parse(["--split", "none", *QUICK]), datasets.get("digits", "data")
    torch.manual_seed(0)
    model = models.build("preactresnet8", 10, *data.mean_std())
    for _ in sat.train(model, data.train, torch.zeros(1297, dtype=torch.bool), 1.0, args, torch.device("cpu")):
        pass
    return model.eval(), data


def test_autoattack_agrees_with_the_package(trained):
    from pyautoattack import AutoAttack
    model, data = trained
    x, y = data.test.pixels(torch.arange(12), "cpu"), data.test.y[:12]
    clean, robust = attacks.autoattack(model, x, y, eps=0.25, batch_size=12, seed=3)
    x_adv, _ = AutoAttack(model, norm="L2", eps=0.25, version="standard", seed=3).run_standard_evaluation(x, y, batch_size=12)
    with torch.no_grad():
        assert torch.equal(clean, model(x).argmax(1) == y) and torch.equal(robust, model(x_adv).argmax(1) == y)
    assert 0 < robust.sum() < clean.sum(), "both kinds occur, else this test says little"


def test_autoattack_chunks_resume_and_ranks(trained, tmp_path, monkeypatch):
    model, data = trained
    x, y = data.test.pixels(torch.arange(20), "cpu"), data.test.y[:20]
    how = {"eps": 0.25, "attacks": ["apgd-ce"], "batch_size": 6}
    whole, calls, real = attacks.autoattack(model, x, y, folder=tmp_path, **how), [], attacks.attack_chunk
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"chunk0000{c}.pt" for c in range(4)]
    (tmp_path / "chunk00002.pt").unlink()
    monkeypatch.setattr(attacks, "attack_chunk", lambda m, x, *a, **k: calls.append(len(x)) or real(m, x, *a, **k))
    seen = []
    again = attacks.autoattack(model, x, y, folder=tmp_path, progress=lambda done, robust, text: seen.append(done), **how)
    assert calls == [6] and seen[-1] == 20 and all(map(torch.equal, whole, again))
    parts = [attacks.autoattack(model, x, y, rank=r, world=3, **how) for r in range(3)]
    assert all(torch.equal(sum(p[k].int() for p in parts).bool(), whole[k]) for k in (0, 1))


@pytest.mark.parametrize("n_classes,expected", [(2, ["apgd-ce", "fab-t", "square"]), (3, ["apgd-ce", "fab-t", "square"]),
                                                (5, list(attacks.STANDARD))])
def test_autoattack_with_fewer_than_ten_classes(n_classes, expected):
    assert attacks.usable(attacks.STANDARD, n_classes) == expected
    model, (x, y) = net(n_classes).eval(), images(4, n_classes=n_classes)
    warnings = []
    quick = [a for a in attacks.STANDARD if a != "square"]
    clean, robust = attacks.autoattack(model, x, y, eps=0.1, attacks=quick, warn=warnings.append)
    assert not (robust & ~clean).any() and not [w for w in warnings if "target classes" in w or "DLR" in w]


def test_autoattack_refuses_logits_that_are_not_finite():
    model, (x, y) = net(), images()
    nn.init.constant_(model.head.bias, math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        attacks.autoattack(model, x, y, eps=0.1, attacks=["apgd-ce"])


def test_autoattacks_warnings_are_shown_once():
    class Softmax(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return self.net(x).softmax(1)
    warnings, (x, y) = [], images()
    attacks.autoattack(Softmax(), x, y, eps=0.1, attacks=["apgd-ce"], batch_size=2, warn=warnings.append)
    assert sum("probability distribution" in w for w in warnings) == 1


# --- Eq. 2: A, weights, loss, training ---------------------------------------------------------------------------------

def test_choose_A():
    y, classes = torch.tensor([0, 1, 2, 0, 1, 2, 0]), ["a", "b", "c"]
    scores = torch.tensor([0.5, 0.1, 0.9, 0.5, 0.2, 0.9, 0.5])
    pick = lambda split, **how: sat.choose_A(split, y, classes, scores=scores, **how).nonzero().flatten().tolist()
    assert pick("none") == [] and pick("full") == list(range(7))
    assert pick("esat", amount=3) == [0, 2, 5], "of three equal scores the lowest index"
    assert pick("esat", amount=3, order="easiest") == [0, 1, 4], "ties by index here too"
    assert pick("esat", amount=0.5) == [0, 2, 3, 5], "round(3.5) = 4"
    assert pick("esat", amount=1.0) == list(range(7))
    assert pick("csat", amount=1) == [2, 5] and pick("csat", amount=1, order="easiest") == [1, 4]
    assert pick("csat", amount=0.5) == [0, 2, 3, 5, 6], "round(1.5) = 2 classes: c, then a"
    assert pick("csat", names=["b", "a"]) == [0, 1, 3, 4, 6]
    first, again, other = (pick("esat", amount=3, order="random", seed=s) for s in (1, 1, 2))
    assert first == again != other and len(first) == 3
    randoms = {tuple(pick("csat", amount=1, order="random", seed=s)) for s in range(20)}
    assert randoms == {(0, 3, 6), (1, 4), (2, 5)}, "whole classes, each of them for some seed"
    for amount in (8, 0.01):
        with pytest.raises(UserError, match="it must be 1 to 7"):
            pick("esat", amount=amount)
    with pytest.raises(UserError, match="unknown class z; valid: a, b, c"):
        pick("csat", names=["z"])


def test_class_order_is_by_mean_not_sum():
    y, scores = torch.tensor([0, 0, 0, 1]), torch.tensor([0.4, 0.4, 0.4, 0.5])
    assert sat.class_means(scores, y, 2).tolist() == pytest.approx([0.4, 0.5])
    assert sat.choose_A("csat", y, ["a", "b"], amount=1, scores=scores).tolist() == [False, False, False, True]


def test_weights_of_the_paper():
    assert sat.weight_A("vanilla", 10, 100) == 1
    assert sat.weight_A("balanced", 20, 100) == 4
    assert sat.weight_A("emphasis", 10, 100) == pytest.approx(2 * 90 / 10), "2 |B|/|A| at 10 % (Sec. 4.3)"
    assert sat.weight_A("emphasis", 90, 100) == pytest.approx(10 * 10 / 90), "10 |B|/|A| at 90 %"
    assert sat.weight_A(3.5, 10, 100) == 3.5
    assert {sat.weight_A(k, n, 100) for k in ("balanced", "emphasis", 7.0) for n in (0, 100)} == {1.0}


def test_loss_by_hand():
    logits, y, w = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]), torch.tensor([0, 0]), torch.tensor([4.0, 1.0])
    expected = (4 * math.log(2) + 1 * math.log(4 / 3)) / 5
    assert sat.sat_loss(logits, y, w).item() == pytest.approx(expected)
    halves = [sat.sat_loss(logits[i:i + 1], y[i:i + 1], w[i:i + 1], torch.tensor(5.0)).item() for i in (0, 1)]
    assert sum(halves) == pytest.approx(expected), "the shares of two processes"


def oracle_training(model, data, args, attack):
    """Vanilla training, or Madry et al.'s AT, as one would write it: no subsets, no weights."""
    momentum = {}
    for epoch in range(args.epochs):
        lr = args.lr * 0.1 ** len([d for d in args.lr_decays if d <= epoch])
        for x, y, _ in datasets.batches(data.train, args.batch_size, args.seed, epoch, args.augment, "cpu"):
            model.eval()
            delta = torch.zeros_like(x)
            for _ in range(args.steps if attack else 0):
                z = (x + delta).requires_grad_()
                g, = torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)
                delta = delta + args.step_size * g / g.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]
                delta = delta * (args.eps / delta.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp_max(1)[:, None, None, None]
                delta = (x + delta).clamp(0, 1) - x
            model.train()
            model.zero_grad()
            F.cross_entropy(model(x + delta), y).backward()
            with torch.no_grad():
                for p in model.parameters():  # SGD with momentum 0.9 and L2 decay
                    g = p.grad + args.weight_decay * p
                    momentum[p] = g if p not in momentum else 0.9 * momentum[p] + g
                    p -= lr * momentum[p]


@pytest.mark.parametrize("everything", [False, True])
def test_empty_A_is_vanilla_training_and_full_A_is_AT(everything):
    args, data = sat.parse(["--split", "none", *QUICK, "--lr-decays", "1", "--steps", "3"]), datasets.get("digits", "data")
    data.train = datasets.Split(data.train.x[:192], data.train.y[:192])
    mine, other = (net().to(memory_format=torch.channels_last) for _ in range(2))
    rows = [s["row"] for s in sat.train(mine, data.train, torch.full((192,), everything), 9.0, args, torch.device("cpu"))]
    oracle_training(other, data, args, attack=everything)
    for (k, a), b in zip(mine.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=k)
    assert (mine.head.weight - net().head.weight).abs().max() > 1e-2, "it did train"
    n_attacked = 192 * everything
    assert [(r["attacked"], r["forward_equivalents"]) for r in rows] == [(n_attacked, 3 * 192 + 2 * 3 * n_attacked)] * 2
    assert [r["lr"] for r in rows] == pytest.approx([0.1, 0.01])


def test_only_A_is_attacked(trained):
    model, data = trained
    args = sat.parse(["--split", "none", *QUICK])
    x, y = data.train.pixels(torch.arange(64), "cpu"), data.train.y[:64]
    in_A = torch.arange(64) % 3 == 0
    for flags in ({}, {"random_start": True}, {"attack": "fgsm-rs"}):
        how = SimpleNamespace(**{**vars(args), "batch_size": 64, **flags})
        out = sat.perturb(model, x, y, in_A, how, torch.Generator().manual_seed(0))
        moved = (out - x).flatten(1).norm(dim=1)
        assert (moved[in_A] > 0.1).all() and (moved[~in_A] == 0).all()
        assert torch.equal(sat.perturb(model, x, y, torch.zeros(64, dtype=torch.bool), how, torch.Generator()), x), "no A in the batch"


def test_train_uses_w_A():
    """One SGD step with weights, against autograd on the weighted loss written out."""
    data = datasets.get("digits", "data")
    split = datasets.Split(data.train.x[:64], data.train.y[:64])
    args = sat.parse(["--split", "none", *QUICK, "--epochs", "1", "--eps", "0", "--augment", "none", "--weight-decay", "0"])
    A, model, other = torch.arange(64) < 16, *(net().to(memory_format=torch.channels_last) for _ in range(2))
    for _ in sat.train(model, split, A, 5.0, args, torch.device("cpu")):
        pass
    other.train()
    (x, y, index), = datasets.batches(split, 64, 0, 0, "none", "cpu")  # in this order: another would round, and ReLU has kinks
    loss = F.cross_entropy(other(x), y, reduction="none")
    ((5 * loss[index < 16].sum() + loss[index >= 16].sum()) / (5 * 16 + 48)).backward()
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p, q - args.lr * q.grad, atol=1e-5, rtol=1e-4)


def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    argv = ["--split", "none", *QUICK, "--results", str(tmp_path), "--run", "r"]
    real, calls = sat.sat_loss, []
    def poisoned(*a):
        calls.append(1)
        return real(*a) * (math.nan if len(calls) == 25 else 1)  # 20 steps an epoch: the 5th of the second
    monkeypatch.setattr(sat, "sat_loss", poisoned)
    with pytest.raises(UserError, match="not finite in epoch 2, step 5"):
        sat.main(argv)
    kept = common.load(tmp_path / "digits" / "r" / "last.pt")
    assert kept["epoch"] == 1 and all(v.isfinite().all() for v in kept["model"].values())


# --- ranking -----------------------------------------------------------------------------------------------------------

def test_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(2), 0.0, 0.0, -1e4], [1e4, 0.0, 0.0, 0.0]])
    assert rank.entropy(logits).tolist() == pytest.approx([math.log(4), 0.5 * math.log(2) + 2 * 0.25 * math.log(4), 0.0], abs=1e-6)


# --- data --------------------------------------------------------------------------------------------------------------

def test_digits():
    data = datasets.get("digits", "nowhere")
    assert data.train.x.shape == (1297, 1, 8, 8) and data.test.x.shape == (500, 1, 8, 8) and data.train.x.max() == 255
    assert torch.bincount(data.train.y).tolist() == [128, 131, 128, 132, 130, 131, 130, 129, 128, 130]
    low, high = datasets.get("digits0-4", "nowhere"), datasets.get("digits5-9", "nowhere")
    assert len(low.train) + len(high.train) == 1297 and high.classes == ["5", "6", "7", "8", "9"] and high.train.y.unique().tolist() == [0, 1, 2, 3, 4]
    assert low.fingerprint() != high.fingerprint() == datasets.get("digits5-9", "nowhere").fingerprint()
    x = data.train.pixels(torch.arange(1297), "cpu")
    mean, std = data.mean_std()
    assert mean == pytest.approx([x.mean().item()], abs=1e-5) and std == pytest.approx([x.std().item()], abs=1e-4)


def test_selection_and_final_parts():
    for n in (500, 10000, 1020, 15):
        select, final = datasets.selection_and_final(n)
        assert len(select) == round(0.1 * n) and sorted([*select.tolist(), *final.tolist()]) == list(range(n))
        torch.manual_seed(n)  # the global generator plays no part
        assert torch.equal(select, datasets.selection_and_final(n)[0])


def test_augmentation_against_torchvision():
    from torchvision.transforms import functional as T
    g = torch.Generator().manual_seed(1)
    x = torch.rand(40, 3, 32, 32, generator=g)
    params = datasets.draw(40, 32, "full", g)
    assert params["crop"].min() == 0 and params["crop"].max() == 8 and 0.75 <= params["factor"].min() < params["factor"].max() <= 1.25
    assert params["flip"].any() and not params["flip"].all() and 0 < params["angle"].abs().max() <= math.radians(2)
    assert len(params["angle"].unique()) == 40 and len({tuple(o) for o in params["order"].tolist()}) == 6, "each example its own"
    mine = datasets.augment(x, params)
    for i in range(40):
        row, column = params["crop"][i].tolist()
        one = T.pad(x[i], 4)[:, row:row + 32, column:column + 32]
        one = T.hflip(one) if params["flip"][i] else one
        for op in params["order"][i].tolist():
            adjust = (T.adjust_brightness, T.adjust_contrast, T.adjust_saturation)[op]
            one = adjust(one, params["factor"][i, op].item())
        one = T.rotate(one, math.degrees(params["angle"][i].item()))
        differ = ((mine[i] - one).abs() > 1e-3).float().mean()
        assert differ < 0.01, "torchvision may round a pixel's origin the other way"
    assert torch.equal(datasets.augment(x, {"crop": torch.full((40, 2), 4)}), x), "a crop from the middle"


def test_batches_are_slices_of_one_global_batch(monkeypatch):
    data = datasets.get("digits", "data")
    everything = list(datasets.batches(data.train, 64, 0, 3, "crop", "cpu"))
    assert len(everything) == 1297 // 64 and len(set(torch.cat([i for _, _, i in everything]).tolist())) == 64 * 20
    again, other = (list(datasets.batches(data.train, 64, 0, e, "crop", "cpu")) for e in (3, 4))
    assert torch.equal(everything[5][0], again[5][0]) and not torch.equal(everything[5][2], other[5][2])
    for r in range(3):
        monkeypatch.setenv("RANK", str(r)), monkeypatch.setenv("WORLD_SIZE", "3")
        for k, mine in enumerate(datasets.batches(data.train, 64, 0, 3, "crop", "cpu")):
            assert all(torch.equal(a, b.tensor_split(3)[r]) for a, b in zip(mine, everything[k]))


def write_images(root, train=6, test=3, classes=("cat", "dog"), side=32):
    from PIL import Image
    rng = np.random.default_rng(0)
    for part, n in (("train", train), ("test", test)):
        for c in classes:
            (root / part / c).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(root / part / c / f"{i}.png")


def test_image_folder_and_tensor_file_agree(tmp_path):
    from PIL import Image
    write_images(tmp_path / "mine")
    folder = datasets.get("mine", tmp_path)
    assert (tmp_path / "mine.pt").exists() and folder.classes == ["cat", "dog"] and folder.train.y.tolist() == [0] * 6 + [1] * 6
    pixel = np.asarray(Image.open(tmp_path / "mine" / "train" / "dog" / "2.png"))
    assert np.array_equal(folder.train.x[8].permute(1, 2, 0).numpy(), pixel)
    packed = datasets.get("mine", tmp_path)
    assert torch.equal(packed.test.x, folder.test.x) and packed.fingerprint() == folder.fingerprint()


def test_cifar_in_its_publishers_format(tmp_path, monkeypatch):
    from torchvision.datasets import cifar
    monkeypatch.setattr(cifar, "check_integrity", lambda *a: True)  # the sums of the real files
    rng, blocks = np.random.default_rng(0), {}
    for folder, files, key in (("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], "labels"),
                               ("cifar-100-python", ["train", "test"], "fine_labels")):
        (tmp_path / folder).mkdir()
        for name in files:
            block = {"data": rng.integers(0, 255, (4, 3072), dtype=np.uint8), key: [0, 1, 2, 3]}
            blocks[name] = block["data"]
            (tmp_path / folder / name).write_bytes(pickle.dumps(block))
        meta = {"label_names" if key == "labels" else "fine_label_names": ["a", "b", "c", "d"]}
        (tmp_path / folder / ("batches.meta" if key == "labels" else "meta")).write_bytes(pickle.dumps(meta))
    ten, hundred = datasets.get("cifar10", tmp_path), datasets.get("cifar100", tmp_path)
    assert (len(ten.train), len(ten.test), len(hundred.train)) == (20, 4, 4) and ten.classes == ["a", "b", "c", "d"]
    assert np.array_equal(ten.train.x[5].numpy(), blocks["data_batch_2"][1].reshape(3, 32, 32))
    assert np.array_equal(hundred.test.x[3].numpy(), blocks["test"][3].reshape(3, 32, 32)) and hundred.test.y[3] == 3


# --- configs and command line ------------------------------------------------------------------------------------------

def test_configs_are_table_2():
    conventional = {"arch": "preactresnet18", "epochs": 200, "batch_size": 128, "lr": 0.1, "lr_decays": [100, 150],
                    "weight_decay": 5e-4, "eps": 0.5, "step_size": 0.1, "steps": 7, "norm": "l2", "attack": "pgd", "augment": "full"}
    for name in ("cifar10", "cifar100"):
        args = sat.parse(["--config", str(HERE / f"configs/{name}.yaml"), "--split", "full"])
        assert {k: getattr(args, k) for k in conventional} == conventional and args.dataset == name
    head = {"arch": "preactresnet18", "epochs": 40, "batch_size": 128, "lr": 0.1, "lr_decays": [20, 30], "weight_decay": 5e-4, "eps": 0.5}
    args = transfer.flags(["x.pt", "--config", str(HERE / "configs/transfer/cifar10.yaml")])
    assert {k: getattr(args, k) for k in head} == head and args.dataset == "cifar10"


def test_command_line_beats_yaml_beats_defaults(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("dataset: digits\nlr: 5e-2\nepochs: 3\nrandom-start: true\nlr-decays: [1, 2]\nclasses: [1, 2]\n")
    args = sat.parse(["--config", str(config), "--split", "csat", "--epochs", "4"])
    assert (args.lr, args.epochs, args.random_start, args.lr_decays, args.batch_size) == (0.05, 4, True, [1, 2], 128)
    assert args.classes == ["1", "2"]
    assert sat.parse(["--config", str(config), "--split", "csat", "--no-random-start"]).random_start is False


def test_run_names():
    name = lambda *argv: sat.run_folder(sat.parse([*argv]))[0].as_posix()
    assert name("--split", "esat", "--frac", "0.5", "--order", "hardest") == "results/digits/esat-hardest-0.5-seed0"
    assert name("--split", "csat", "--classes", "3", "1", "--weight", "emphasis", "--seed", "2") == "results/digits/csat-1-3-emphasis-seed2"
    assert name("--split", "full", "--eps", "1", "--results", "r") == "results/digits/full-eps=1.0-seed0".replace("results", "r")
    escape = sat.run_folder(sat.parse(["--split", "csat", "--classes", "../../../x"]))[0]
    assert escape.parent == Path("results/digits") and ".." not in escape.parts


def test_every_command_of_run_all_parses():
    out = subprocess.run([str(HERE / "run_all.sh"), "--dry-run", "all"], capture_output=True, text=True, check=True).stdout
    parsers = {"sat.py": sat.parse, "rank.py": rank.flags, "transfer.py": transfer.flags}
    seen, made = set(), set()
    for line in out.splitlines():
        words = shlex.split(line)
        name, argv = Path(words[1]).name, words[2:]
        if name in parsers:
            args = parsers[name](argv)
            if name == "sat.py":
                made.add((sat.run_folder(args)[0] / "best.pt").as_posix())
            if name == "transfer.py":
                assert args.checkpoint.as_posix() in made, "its source was trained before"
            seen.add(name)
    assert seen == set(parsers)
    torchrun = subprocess.run([str(HERE / "run_all.sh"), "--dry-run", "digits"], capture_output=True, text=True, check=True,
                              env={**os.environ, "NPROC": "4"}).stdout.splitlines()
    assert all("torch.distributed.run --standalone --nproc-per-node 4" in line for line in torchrun[:-1])


def test_wilson_interval():
    assert evaluate.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert evaluate.wilson(0, 10)[0] == 0 and evaluate.wilson(10, 10)[1] == pytest.approx(1) and evaluate.wilson(0, 0) == (0, 1)


def test_summary():
    clean, robust = torch.tensor([1, 1, 0, 1]).bool(), torch.tensor([1, 0, 0, 0]).bool()
    found = evaluate.summary(clean, robust, torch.tensor([0, 0, 1, 2]), ["a", "b", "c"], ["b", "c"])
    pairs = {k: (v["clean"]["accuracy"], v["robust"]["accuracy"], v["clean"]["n"]) for k, v in found.items() if k != "classes"}
    assert pairs == {"all": (0.75, 0.25, 4), "A_val": (0.5, 0.0, 2), "B_val": (1.0, 0.5, 2)}
    assert found["classes"]["a"]["robust"]["accuracy"] == 0.5 and found["classes"]["b"]["clean"]["accuracy"] == 0
    assert set(evaluate.summary(clean, robust, torch.zeros(4), ["a"])) == {"all", "classes"}


# --- the whole pipeline ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """Every stage once, in subprocesses, as a user runs them; the folder of results."""
    cwd = tmp_path_factory.mktemp("user")
    def ok(name, *argv):
        done = script(name, *argv, cwd=cwd)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr + done.stdout
        return done.stdout
    source = ["--dataset", "digits0-4", *QUICK, "--epochs", "4", "--lr-decays", "2"]
    first = ok("sat.py", *source, "--split", "esat", "--frac", "0.5", "--order", "hardest", "--weight", "emphasis", "--run", "a")
    assert "ranking the examples first" in first and "class, hardest first" in first
    ok("sat.py", *source, "--split", "csat", "--size", "2", "--run", "b")
    ok("sat.py", *source, "--split", "none", "--run", "none")
    results = cwd / "results"
    ok("evaluate.py", results / "digits0-4" / "b" / "best.pt")
    ok("transfer.py", results / "digits0-4" / "a" / "best.pt", "--config", HERE / "configs/transfer/digits5-9.yaml", *QUICK)
    ok("report.py")
    assert "is finished" in ok("sat.py", *source, "--split", "csat", "--size", "2", "--run", "b")
    return results


def test_pipeline_files(pipeline):
    for run in ("a", "b", "none"):
        folder = pipeline / "digits0-4" / run
        assert {p.name for p in folder.iterdir() if not p.name.startswith("eval-")} == {
            "args.json", "log.jsonl", "last.pt", "best.pt", "robust.pt", "result.json"}
        result, rows = json.loads((folder / "result.json").read_text()), [json.loads(r) for r in open(folder / "log.jsonl")]
        n = 649
        assert result["N"] == n and result["A"] == {"a": round(0.5 * n), "none": 0}.get(run, result["A"])
        assert [r["epoch"] for r in rows] == [1, 2, 3, 4] and [("selection" in r) for r in rows] == [False, False, True, True]
        assert result["cost"]["attacked"] == sum(r["attacked"] for r in rows)
        per_example = common.load(folder / "robust.pt")
        assert not (per_example["robust"] & ~per_example["clean"]).any()
        assert result["accuracy"]["all"]["robust"]["accuracy"] == pytest.approx(per_example["robust"].float().mean().item())
        select, final = datasets.selection_and_final(len(datasets.get("digits0-4", "data").test))
        assert torch.equal(per_example["index"], final[:24])
    b = json.loads((pipeline / "digits0-4" / "b" / "result.json").read_text())
    classes = b["accuracy"]
    assert len(b["A_classes"]) == 2 and classes["A_val"]["clean"]["n"] + classes["B_val"]["clean"]["n"] == 24
    a = json.loads((pipeline / "digits0-4" / "a" / "result.json").read_text())
    assert a["w_A"] == pytest.approx((1 + 10 * a["A"] / 649) * (649 - a["A"]) / a["A"])


def test_pipeline_ranking(pipeline):
    folder = pipeline / "digits0-4" / "rank-preactresnet8-seed0"
    scores, ranked = common.load(folder / "scores.pt"), json.loads((folder / "rank.json").read_text())
    y = datasets.get("digits0-4", "data").train.y
    assert scores["entropy"].shape == y.shape and 0 < scores["entropy"].min() and scores["entropy"].max() <= math.log(5)
    hardest = ranked["classes_hardest_first"]
    for row in hardest:
        assert row["entropy"] == pytest.approx(scores["entropy"][y == int(row["class"])].double().mean().item(), abs=1e-6)
    assert [r["entropy"] for r in hardest] == sorted((r["entropy"] for r in hardest), reverse=True)
    b = json.loads((pipeline / "digits0-4" / "b" / "result.json").read_text())
    assert sorted(b["A_classes"]) == sorted(r["class"] for r in hardest[:2])


def test_ranking_averages_the_epochs(tmp_path):
    """Eq. 3 from the definition: train again, and average the entropy of every epoch's eval-mode predictions."""
    rank.main([*QUICK[:3], "--results", str(tmp_path)])
    data, args = datasets.get("digits", "data"), rank.flags([*QUICK[:3]])
    torch.manual_seed(0)
    model, total = models.build("preactresnet8", 10, *data.mean_std()), 0
    for _ in sat.train(model, data.train, torch.zeros(1297, dtype=torch.bool), 1.0, args, torch.device("cpu")):
        model.eval()
        with torch.no_grad():
            p = model(data.train.pixels(torch.arange(1297), "cpu")).softmax(1).double()
        total = total - (p * p.clamp_min(1e-30).log()).sum(1)
        model.train()
    scores = common.load(tmp_path / "digits" / "rank-preactresnet8-seed0" / "scores.pt")
    torch.testing.assert_close(scores["entropy"].double(), total / 2, atol=1e-4, rtol=1e-3)


def test_evaluate_repeats_the_runs_own_numbers(pipeline):
    own = json.loads((pipeline / "digits0-4" / "b" / "result.json").read_text())
    found, = (pipeline / "digits0-4" / "b").glob("eval-*.json")
    again = json.loads(found.read_text())
    assert again["accuracy"] == own["accuracy"] and again["settings"] == own["settings"] and again["weights"] == own["weights"]


def test_transfer_leaves_the_backbone_unchanged(pipeline):
    folder, = (pipeline / "digits5-9").iterdir()
    source, target = common.load(pipeline / "digits0-4" / "a" / "best.pt"), common.load(folder / "best.pt")
    shared = [k for k in source["model"] if not k.startswith("head")]
    assert shared and all(torch.equal(source["model"][k], target["model"][k]) for k in shared)
    assert any("running_mean" in k for k in shared)
    assert [tuple(target["model"][f"head.{k}"].shape) for k in ("0.weight", "2.weight")] == [(64, 64), (5, 64)]
    result = json.loads((folder / "result.json").read_text())
    assert result["A"] == 0 and result["source"]["run"] == "a" and result["source"]["A"] == 324 and result["source"]["dataset"] == "digits0-4"


def test_report(pipeline):
    text = (pipeline / "tables.md").read_text()
    for section in report.SECTIONS:
        assert (pipeline / "figures" / f"{section}.png").stat().st_size > 5000
    result = json.loads((pipeline / "digits0-4" / "a" / "result.json").read_text())
    robust = result["accuracy"]["all"]["robust"]
    shown = f"{100 * robust['accuracy']:.1f} [{100 * robust['low']:.1f}, {100 * robust['high']:.1f}]"
    row, = [line for line in text.splitlines() if line.startswith("| hardest, emphasis") and "| 0.50 |" in line and shown in line][:1]
    assert row.split("|")[2].strip() == "324"
    assert "AT (A = all): no such run yet" in text, "a missing baseline is said"
    assert "digits0-4 -> digits5-9" in text and "AutoAttack's apgd-ce, n = 24" in text


def test_report_averages_over_seeds():
    runs = [{"accuracy": {"all": {"robust": {"n": 50, "accuracy": a, "low": 0, "high": 1}}}} for a in (0.4, 0.6)]
    assert report.cell(runs, "all", "robust") == f"50.0 ± {100 * math.sqrt(0.02):.1f}"
    assert report.cell(runs, "B_val", "robust") == "-"


def test_resumed_run_is_bit_identical(tmp_path, monkeypatch):
    argv = ["--split", "full", *QUICK, "--epochs", "3", "--steps", "2", "--random-start", "--results"]
    sat.main([*argv, str(tmp_path / "whole")])
    real = common.save_epoch
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
        a, b = common.load(whole / name)["model"], common.load(parts / name)["model"]
        assert all(torch.equal(a[k], b[k]) for k in a)
    drop = lambda r: {k: v for k, v in r.items() if k not in ("cost", "args")}
    assert drop(common.read_json(whole / "result.json")) == drop(common.read_json(parts / "result.json"))


# --- bad input: one line that says what is valid, nothing written ------------------------------------------------------

BAD = {
    "unknown dataset": (["--split", "full", "--dataset", "mnist"], "no data set 'mnist'"),
    "dataset is a path": (["--dataset", "../x"], "not a plain name"),
    "no such flag": (["--split", "full", "--lrr", "1"], "unrecognized arguments"),
    "wrong type": (["--split", "full", "--lr", "fast"], "'fast' is not a number above 0"),
    "negative": (["--split", "full", "--epochs", "0"], "whole number of at least 1"),
    "wrong choice": (["--split", "half"], "invalid choice: 'half'"),
    "unknown class": (["--split", "csat", "--classes", "cat"], "unknown class cat; valid: 0, 1, 2"),
    "frac 0": (["--split", "esat", "--frac", "0"], "'0' is not a number above 0 and at most 1"),
    "frac above 1": (["--split", "esat", "--frac", "1.5"], "'1.5' is not a number above 0 and at most 1"),
    "frac of no class": (["--split", "csat", "--frac", "0.01"], "makes 0; it must be 1 to 10"),
    "size above N": (["--split", "esat", "--size", "1298"], "it must be 1 to 1297"),
    "too many classes": (["--split", "csat", "--size", "11"], "it must be 1 to 10"),
    "no size": (["--split", "esat"], "needs one of --frac, --size"),
    "two sizes": (["--split", "esat", "--frac", "0.5", "--size", "3"], "given: frac, size"),
    "classes for esat": (["--split", "esat", "--classes", "3"], "takes no --classes"),
    "size for full": (["--split", "full", "--size", "3"], "takes no --size"),
    "batch above N": (["--split", "full", "--batch-size", "1298"], "must be 1 to 1297"),
    "run is a path": (["--split", "full", "--run", "a/b"], "not a plain name"),
    "no config": (["--config", "none.yaml", "--split", "full"], "cannot read the config none.yaml"),
    "cuda without a GPU": (["--split", "full", "--device", "cuda"], "sees no GPU"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv, message = BAD[case]
    with pytest.raises(UserError) as e:
        sat.main(argv)
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize("text,message", [
    ("learning-rate: 1", "unknown key 'learning-rate'; valid keys: amp, arch"), ("lr: fast", "lr: 'fast' is not a number|'fast' is not a number"),
    ("epochs: 2.5", "'2.5' is not a whole number"), ("split: half", "invalid choice: 'half'"), ("lr: true", "lr: True is not a value"),
    ("random-start: 1", "random-start: 1 is not a value"), ("lr: ", "lr: None is not a value"), ("lr: {a: 1}", "is not a value"),
    ("- lr", "flat list"), ("lr: [", "cannot read the config"), ("!!python/object/apply:os.system ['touch pwned']", "cannot read the config"),
    ("lr: [0.1, 0.2]", "unrecognized arguments"),
])
def test_bad_config(text, message, tmp_path, monkeypatch):
    import re
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=re.compile("|".join(map(re.escape, message.split("|"))))) as e:
        sat.main(["--config", "c.yaml", "--split", "full"])
    assert "c.yaml" in str(e.value) and "\n" not in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


def bad_files(root):
    """name -> (main, argv, message) over files in `root`."""
    write_images(root / "a" / "no_test", classes=("x",)), write_images(root / "a" / "uneven"), write_images(root / "a" / "torn")
    import shutil
    shutil.rmtree(root / "a" / "no_test" / "test"), shutil.rmtree(root / "a" / "uneven" / "test" / "dog")
    (root / "a" / "torn" / "train" / "cat" / "1.png").write_bytes(b"\x89PNG not")
    (root / "a" / "short.pt").write_bytes(b"PK\x03\x04 short")
    torch.save({"train": {"x": torch.zeros(2, 3, 8, 8), "y": torch.zeros(2)}, "test": {}, "classes": ["a"]}, root / "a" / "floats.pt")
    torch.save({"some": "thing"}, root / "foreign.pt")
    torch.save(["no", "dict"], root / "list.pt")
    with open(root / "pickle.pt", "wb") as f:
        pickle.dump(SimpleNamespace(), f)
    data = ["--data-dir", str(root / "a"), "--split", "full", "--augment", "none", "--batch-size", "2"]
    yield "folder without test", sat.main, [*data, "--dataset", "no_test"], "lacks test/ or val/"
    yield "uneven classes", sat.main, [*data, "--dataset", "uneven"], "not in both: dog"
    yield "corrupt image", sat.main, [*data, "--dataset", "torn"], "1.png is not an image"
    yield "truncated data", sat.main, [*data, "--dataset", "short"], "short.pt is truncated or not a file of this project"
    yield "float data", sat.main, [*data, "--dataset", "floats"], "train must hold x, uint8"
    for name, message in (("foreign", "lacks model"), ("list", "lacks model"), ("pickle", "truncated or not a file"), ("none", "no file")):
        yield f"evaluate {name}", evaluate.main, [str(root / f"{name}.pt")], message
        yield f"transfer {name}", transfer.main, [str(root / f"{name}.pt")], message


def test_bad_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for case, main, argv, message in list(bad_files(tmp_path)):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError) as e:
            main(argv)
        assert message in str(e.value) and "\n" not in str(e.value), case
        assert sorted(tmp_path.rglob("*")) == before, case


def test_no_network_and_no_data(tmp_path, monkeypatch):
    import urllib.request
    def refuse(*a, **k):
        raise OSError("no route to host")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(UserError, match="no cifar10 under .* put cifar-10-batches-py/ .* or image folders cifar10/train"):
        sat.main(["--dataset", "cifar10", "--data-dir", str(tmp_path / "d"), "--results", str(tmp_path / "r"), "--split", "full"])
    assert not (tmp_path / "r").exists()


def test_scores_of_another_data_set(pipeline, tmp_path):
    folder = tmp_path / "digits" / "rank-preactresnet8-seed0"
    folder.mkdir(parents=True)
    (folder / "scores.pt").write_bytes((pipeline / "digits0-4" / "rank-preactresnet8-seed0" / "scores.pt").read_bytes())
    with pytest.raises(UserError, match="scores.pt belongs to other data .*digits0-4 there, digits here"):
        sat.main(["--split", "esat", "--frac", "0.5", "--results", str(tmp_path)])
    assert not (tmp_path / "digits" / "esat-hardest-0.5-seed0").exists()


def test_run_directory_made_with_other_flags(pipeline):
    argv = ["--dataset", "digits0-4", *QUICK, "--epochs", "4", "--lr-decays", "2", "--split", "csat", "--size", "2", "--run", "b"]
    before = (pipeline / "digits0-4" / "b" / "result.json").read_bytes()
    with pytest.raises(UserError, match=r"made with other flags \(lr: 0.1 there, 0.2 now\)"):
        sat.main([*argv, "--lr", "0.2", "--results", str(pipeline)])
    assert (pipeline / "digits0-4" / "b" / "result.json").read_bytes() == before


def test_truncated_checkpoint(pipeline, tmp_path):
    whole = (pipeline / "digits0-4" / "a" / "best.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    for name in ("evaluate.py", "transfer.py"):
        done = script(name, tmp_path / "cut.pt", cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: ") and "truncated" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["cut.pt"]


def test_transfer_of_a_transferred_network(pipeline):
    folder, = (pipeline / "digits5-9").iterdir()
    with pytest.raises(UserError, match="is itself a transferred network"):
        transfer.main([str(folder / "best.pt"), "--results", str(pipeline)])


def test_help_shows_units_and_defaults():
    done = script("sat.py", "--help")
    assert done.returncode == 0 and "default: 0.5" in done.stdout and "pixels in [0, 1]" in done.stdout
