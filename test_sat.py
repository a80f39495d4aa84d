"""The method against oracles that are written out here: attacks, Eq. 2, rankings.

    python -m pytest -q test_sat.py
"""
import functools
import json
import logging
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import attacks
import common
import data as data_
import evaluate
import models
import rank
import sat
import subset
import runs
from common import UserError
from conftest import HERE, QUICK, net, images, GPU


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
        for kind in ("pgd", "pgd-random", "fgsm-rs", "pgd-authors"):
            yield norm, eps, kind


def run_attack(model, x, y, norm, eps, kind):
    if kind == "fgsm-rs":
        return attacks.fgsm_rs(model, x, y, eps=eps, norm=norm)
    if kind == "pgd-authors":
        return attacks.pgd_authors(model, x, y, eps=eps, step_size=eps / 2, norm=norm)
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


@pytest.mark.parametrize("norm,eps,step", [("l2", 0.5, 0.4), ("linf", 0.1, 0.09)])
def test_pgd_authors_keeps_the_iterate_of_the_highest_loss(norm, eps, step):
    model, (x, y) = net().eval(), images()
    iterates = [x, *(oracle_pgd(model, x, y, eps, step, k, norm) for k in range(1, 7))]
    losses = torch.stack([F.cross_entropy(model(z), y, reduction="none") for z in iterates]).detach()
    assert losses.argmax(0).unique().numel() > 1, "the highest is not always the last"
    expected = torch.stack([iterates[k][i] for i, k in enumerate(losses.argmax(0).tolist())])
    how = {"eps": eps, "step_size": step, "norm": norm}
    torch.testing.assert_close(attacks.pgd_authors(model, x, y, **how), expected, atol=2e-5, rtol=0)
    means = losses.mean(1)
    assert means[1] < means[2], "so that it stops at the third of seven"
    stopped = attacks.pgd_authors(model, x, y, limit=float(means[1:3].mean()), **how)
    best = torch.stack([iterates[k][i] for i, k in enumerate(losses[:2].argmax(0).tolist())])
    torch.testing.assert_close(stopped, best, atol=2e-5, rtol=0)
    assert torch.equal(attacks.pgd_authors(model, x, y, limit=0.0, **how), x), "the start is not left out"


def test_the_authors_attack_stops_by_the_weights_of_eq_2(monkeypatch):
    """One class of ten with w_A = |B|/|A| = 9: their weight of A is 5, so a mean cross-entropy of 2."""
    seen = []
    monkeypatch.setattr(attacks, "pgd_authors", lambda model, x, y, *, limit, **how: seen.append(limit) or x)
    args = sat.command_line(["--attack", "pgd-authors", "--epochs", "1", "--lr-decays"])
    x, y = torch.randint(0, 256, (640, 1, 8, 8), dtype=torch.uint8), torch.arange(10).repeat(64)
    for _ in sat.train(net(), data_.Split(x, y), y == 3, 9.0, args, torch.device("cpu")):
        pass
    assert seen == [pytest.approx(2.0)] * 10


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_start_outside_is_moved_into_the_ball_and_the_box(norm):
    (x, y), far = images(6), torch.full((6, 1, 8, 8), 3.0)
    for steps in (0, 1):
        adv = attacks.pgd(net(), x, y, eps=0.5, step_size=0.0, steps=steps, norm=norm, start=far)
        torch.testing.assert_close(adv, (x + attacks.project(far, 0.5, norm)).clamp(0, 1))


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
    # ||start|| = 0.04, against the step of 0.125
    adv = attacks.fgsm_rs(Linear(), x, y, eps=0.1, norm="l2", start=start)
    torch.testing.assert_close((adv - x).flatten(1).norm(dim=1), torch.full((3,), 0.125 - 0.04))


def test_random_start_is_uniform_in_the_ball():
    x = torch.zeros(4000, 1, 2, 2)
    g = torch.Generator().manual_seed(0)
    radius = attacks.random_start(x, 2.0, "l2", g).flatten(1).norm(dim=1) / 2
    assert abs((radius**4).mean() - 0.5) < 0.02, "in 4 dimensions r^4 is uniform in [0, 1]"
    flat = attacks.random_start(x, 0.3, "linf", g)
    assert flat.abs().max() <= 0.3 and abs(flat.mean()) < 0.01 and abs(flat.std() - 0.3 / math.sqrt(3)) < 0.01


@pytest.mark.parametrize("kind", ["pgd", "pgd-authors", "fgsm-rs", "autoattack"])
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
    assert ([m.training for m in model.modules()] == modes
            and [p.requires_grad for p in model.parameters()] == wants)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), \
        "batch-norm statistics included"
    assert all(p.grad is None if g is None else torch.equal(p.grad, g)
               for p, g in zip(model.parameters(), grads))


def test_an_examples_perturbation_does_not_depend_on_its_batch():
    model, (x, y) = net().eval(), images(8)
    whole = attacks.pgd(model, x, y, eps=0.5, step_size=0.1)
    torch.testing.assert_close(whole[2:5], attacks.pgd(model, x[2:5], y[2:5], eps=0.5, step_size=0.1),
                               atol=1e-5, rtol=0)


def test_autoattack_agrees_with_the_package(trained, monkeypatch):
    from pyautoattack import AutoAttack
    real = AutoAttack._set_version

    def set_version(self, version):  # standard AutoAttack with fewer iterations, to be quick
        real(self, version)
        self.square.n_queries = 100
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 10
    monkeypatch.setattr(AutoAttack, "_set_version", set_version)
    model, data = trained
    x, y = data.test.pixels(torch.arange(12), "cpu"), data.test.y[:12]
    clean, robust = attacks.autoattack(model, x, y, eps=0.25, batch_size=12, seed=3)
    package = AutoAttack(model, norm="L2", eps=0.25, version="standard", seed=3)
    x_adv, _ = package.run_standard_evaluation(x, y, batch_size=12)
    with torch.no_grad():
        assert (torch.equal(clean, model(x).argmax(1) == y)
                and torch.equal(robust, model(x_adv).argmax(1) == y))
    assert 0 < robust.sum() < clean.sum(), "both kinds occur, else this test says little"


def test_autoattack_chunks_resume_and_ranks(trained, tmp_path, monkeypatch):
    model, data = trained
    x, y = data.test.pixels(torch.arange(20), "cpu"), data.test.y[:20]
    setting = {"norm": "l2", "eps": 0.25, "attacks": ["apgd-ce"], "n": 20, "batch_size": 6, "seed": 0}
    evaluation = lambda: evaluate.attack(model, data, torch.arange(20), setting, tmp_path)
    whole, calls, real = evaluation(), [], attacks.attack_batch
    alone = attacks.autoattack(model, x, y, eps=0.25, attacks=["apgd-ce"], batch_size=6)
    assert all(map(torch.equal, whole, alone)), "kept in chunks, or all in one call"
    assert sorted(p.name for p in tmp_path.glob("*/*")) == [f"chunk0000{c}.pt" for c in range(4)]
    next(tmp_path.glob("*/chunk00002.pt")).unlink()
    monkeypatch.setattr(attacks, "attack_batch",
                        lambda m, x, *a, **k: calls.append((len(x), k["seed"])) or real(m, x, *a, **k))
    assert all(map(torch.equal, whole, evaluation())) and calls == [(6, 2)], "only what is missing"
    setting["eps"], setting["seed"] = 0.2, 5
    evaluation()
    assert calls[1:] == [(6, 5), (6, 6), (6, 7), (2, 8)], "another setting shares nothing; a seed a chunk"
    attacks.autoattack(model, x, y, eps=0.2, attacks=["apgd-ce"], batch_size=6, seed=5)
    assert calls[5:] == calls[1:5], "a seed a batch"


@pytest.mark.parametrize("n_classes,expected", [
    (2, ["apgd-ce", "fab-t", "square"]), (3, ["apgd-ce", "fab-t", "square"]), (5, list(attacks.STANDARD))])
def test_autoattack_with_fewer_than_ten_classes(n_classes, expected, caplog):
    assert attacks.usable(attacks.STANDARD, n_classes) == expected
    model, (x, y) = net(n_classes).eval(), images(4, n_classes=n_classes)
    quick = [a for a in attacks.STANDARD if a != "square"]
    clean, robust = attacks.autoattack(model, x, y, eps=0.1, attacks=quick)
    with torch.no_grad():
        assert torch.equal(clean, model(x).argmax(1) == y)
    assert "target classes" not in caplog.text and "DLR" not in caplog.text


def test_autoattack_refuses_logits_that_are_not_finite():
    model, (x, y) = net(), images()
    nn.init.constant_(model.head.bias, math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        attacks.autoattack(model, x, y, eps=0.1, attacks=["apgd-ce"])
    with pytest.raises(ValueError, match="labels 10 to 10 on 10 classes"):
        attacks.autoattack(net(), x, torch.full_like(y, 10), eps=0.1, attacks=["apgd-ce"])


@pytest.mark.parametrize("lie,message", [
    (lambda x, y: (x, y), r"leaves 6 of 6 right, more than the \d that were right"),
    (lambda x, y: ((x + 0.2).clamp(0, 1), y), "left the l2 ball of 0.1"),
    (lambda x, y: (x - 1e-3, y), r"or the box \[0, 1\]")])
def test_autoattack_is_not_believed_blindly(lie, message, monkeypatch):
    import pyautoattack
    model, (x, y) = net(), images()
    with torch.no_grad():
        y = torch.where(torch.arange(6) == 0, (model.eval()(x).argmax(1) + 1) % 10, y)  # one is wrong before
    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation",
                        lambda self, x, y, batch_size: lie(x, y))
    with pytest.raises(ArithmeticError, match=message):
        attacks.autoattack(model, x, y, eps=0.1)


def test_autoattacks_progress_and_warnings_are_shown_once(capsys, caplog):
    class Softmax(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return self.net(x).softmax(1)
    x, y = images()
    bar = SimpleNamespace(n=0, total=6, disable=True, set_postfix_str=lambda text: None)
    with evaluate.watched(bar):
        attacks.autoattack(Softmax(), x, y, eps=0.1, attacks=["apgd-ce"], batch_size=2)
        for text in ("3 points with zero gradient", "5 points with zero gradient", "other"):
            logging.getLogger("auto-attack").warning(text)
    shown = capsys.readouterr().out
    assert shown.count("probability distribution") == 1
    assert "this batch after APGD-CE: 50.0 % robust" in shown
    assert shown.endswith("AutoAttack warns: 3 points with zero gradient\nAutoAttack warns: other\n")
    assert not caplog.text
    attacks.autoattack(Softmax(), x, y, eps=0.1, attacks=["apgd-ce"], batch_size=2)
    assert "probability distribution" in caplog.text, "the logger is as before"
    assert not capsys.readouterr().out


def test_cost_of_an_epoch():
    """By ATTACK_STEPS, of which an attack that is not in it has no cost; frozen features are not trained."""
    count = lambda flags_, attacked, frozen=False: sat.cost(sat.command_line(flags_), 100, attacked, frozen)
    assert count([], 0) == {"attacked": 0, "forward": 100, "backward": 100, "forward_equivalents": 300}
    assert count([], 50)["forward_equivalents"] == 300 + 50 * 14
    assert count(["--attack", "fgsm-rs"], 50)["forward_equivalents"] == 300 + 50 * 2
    assert count([], 0, frozen=True)["forward_equivalents"] == 100
    with pytest.raises(KeyError):
        sat.cost(SimpleNamespace(attack="mine", steps=7), 100, 50, False)


def test_a_learning_rate_that_never_falls_is_said(capsys):
    data = data_.load_dataset("digits", "data")
    for epochs, said in (("1", True), ("16", False)):  # the config's first decay is after epoch 15
        args = sat.command_line(["--split", "none", "--epochs", epochs])
        nobody = torch.zeros(1297, dtype=torch.bool)
        next(sat.train(net(), data.train, nobody, 1.0, args, torch.device("cpu")))
        assert ("does not fall within 1 epochs (--lr-decays 15 25)" in capsys.readouterr().out) == said


def test_choose_A(capsys):
    y, classes = torch.tensor([0, 1, 2, 0, 1, 2, 0]), ["a", "b", "c"]
    scores = torch.tensor([0.5, 0.1, 0.9, 0.5, 0.2, 0.9, 0.5])
    pick = lambda split, **how: sat.choose_A(
        split, y, classes, scores=scores, **how).nonzero().flatten().tolist()
    assert pick("none") == [] and pick("full") == list(range(7))
    assert pick("esat", amount=3) == [0, 2, 5], "of three equal scores the lowest index"
    assert capsys.readouterr().out == ("note: 3 examples share the score at the edge of A; of these the "
                                       "first 1, by index, are in A\n")
    assert pick("esat", amount=5) == [0, 2, 3, 5, 6] and not capsys.readouterr().out, "all equal ones are in"
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


def test_random_A_is_spread_over_the_batches():
    """The permutation that picks A must not be the one that deals the first epoch's batches."""
    data = data_.load_dataset("digits", "data")
    for seed in range(3):
        A = sat.choose_A("esat", data.train.y, data.classes, amount=0.5, order="random", seed=seed)
        shares = [A[index].float().mean().item()
                  for _, _, index in data_.training_batches(data.train, 64, seed, 0, "none", "cpu")]
        assert 0.25 < min(shares) and max(shares) < 0.75


def test_class_order_is_by_mean_not_sum():
    y, scores = torch.tensor([0, 0, 0, 1]), torch.tensor([0.4, 0.4, 0.4, 0.5])
    assert subset.class_means(scores, y, 2).tolist() == pytest.approx([0.4, 0.5])
    A = sat.choose_A("csat", y, ["a", "b"], amount=1, scores=scores)
    assert A.tolist() == [False, False, False, True]


def test_weights_of_the_paper():
    assert sat.weight_A("vanilla", 10, 100) == 1
    assert sat.weight_A("balanced", 20, 100) == 4
    assert sat.weight_A("emphasis", 10, 100) == pytest.approx(2 * 90 / 10), "2 |B|/|A| at 10 % (Sec. 4.3)"
    assert sat.weight_A("emphasis", 90, 100) == pytest.approx(10 * 10 / 90), "10 |B|/|A| at 90 %"
    assert sat.weight_A(3.5, 10, 100) == 3.5
    assert {sat.weight_A(k, n, 100) for k in ("balanced", "emphasis", 7.0) for n in (0, 100)} == {1.0}


def test_loss_by_hand():
    logits, y = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]), torch.tensor([0, 0])
    w = torch.tensor([4.0, 1.0])
    expected = (4 * math.log(2) + 1 * math.log(4 / 3)) / 5
    assert sat.sat_loss(logits, y, w / w.sum()).item() == pytest.approx(expected)
    halves = [sat.sat_loss(logits[i:i + 1], y[i:i + 1], w[i:i + 1] / 5).item() for i in (0, 1)]
    assert sum(halves) == pytest.approx(expected), "the shares of two processes"


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_epoch_plan(processes, monkeypatch):
    """Positions and weights of every process's part of each batch, against a loop over the batches."""
    A = torch.arange(40) % 7 == 0
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:32].view(4, 8)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    parts = []
    for r in range(processes):
        monkeypatch.setenv("RANK", str(r))
        parts.append(list(zip(*sat.epoch_plan(order, A, 5.0, torch.device("cpu")))))
    for step, batch in enumerate(order):
        w = torch.tensor([5.0 if A[i] else 1.0 for i in batch])
        torch.testing.assert_close(torch.cat([part[step][1] for part in parts]), processes * w / w.sum())
        for part, index in zip(parts, batch.tensor_split(processes)):
            assert part[step][0].tolist() == [i for i, e in enumerate(index) if A[e]]
    assert (any(len(part[step][0]) == 0 for part in parts for step in range(4))
            or processes == 1), "a process without A in a batch"


def test_a_step_on_a_notebooks_own_tensors():
    """README's example: Eq. 2 on a network, a batch and a subset of one's own,
    against autograd on the loss written out."""
    model, other = (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    (x, y), in_A = images(8), torch.tensor([True, False, True, False, False, False, False, False])
    x = x.contiguous(memory_format=torch.channels_last)
    w, before = torch.where(in_A, 3.0, 1.0), x.clone()
    attack = functools.partial(attacks.pgd, model, eps=0.5, step_size=0.1)
    x_adv = torch.where(in_A.view(-1, 1, 1, 1), attacks.pgd(other, x, y, eps=0.5, step_size=0.1), x)
    loss, logits = sat.sat_step(model, torch.optim.SGD(model.parameters(), 0.1), x, y,
                                in_A.nonzero().squeeze(1), w / w.sum(), attack)
    expected = (w * F.cross_entropy(other(x_adv), y, reduction="none")).sum() / w.sum()
    expected.backward()
    assert (loss.item() == pytest.approx(expected.item(), rel=1e-5) and logits.shape == (8, 10)
            and torch.equal(x, before))
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p, q - 0.1 * q.grad)


def test_the_step_keeps_channels_last():
    """Convolutions are slower on another layout, and compiled twice:
    index_copy alone would return another."""
    seen, x = [], images(4, channels=3)[0].contiguous(memory_format=torch.channels_last)
    model = net(channels=3)
    model.features.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last)))
    attack = functools.partial(attacks.pgd, model, eps=0.5, step_size=0.1, steps=2)
    optimizer = models.sgd(model, 0.1, 0.0, torch.device("cpu"))
    sat.sat_step(model, optimizer, x, torch.zeros(4, dtype=torch.int64), torch.tensor([1, 2]),
                 torch.full((4,), 0.25), attack)
    assert seen == [True] * 3, "two attack steps and the training step"


def test_amp_auto_asks_the_hardware(monkeypatch):
    """bf16 where the CPU has units for it, float32 elsewhere and where ONEDNN_MAX_CPU_ISA forbids them."""
    cpu = torch.device("cpu")
    for avx512, amx, onednn, expected in (
            (0, 0, 1, "float32"), (1, 0, 1, "bf16"), (0, 1, 1, "bf16"), (1, 1, 0, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bool(onednn))
        assert models.precision("auto", cpu) == expected
        assert (models.precision("off", cpu), models.precision("bf16", cpu)) == ("float32", "bf16")
        assert models.autocast("auto", cpu)._enabled == (expected == "bf16")


def test_amp_auto_is_float32_without_bf16_units():
    code = "import models, torch; print(models.precision('auto', torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE,
                          env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert done.stdout == "float32\n", done.stderr


def oracle_training(model, data, args, attack):
    """Vanilla training, or Madry et al.'s AT, as one would write it: no subsets, no weights."""
    momentum = {}
    for epoch in range(args.epochs):
        lr = args.lr * 0.1 ** len([d for d in args.lr_decays if d <= epoch])
        for x, y, _ in data_.training_batches(data.train, args.batch_size, args.seed, epoch, args.augment, "cpu"):
            model.eval()
            delta = torch.zeros_like(x)
            for _ in range(args.steps if attack else 0):
                z = (x + delta).requires_grad_()
                g, = torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)
                norm = g.flatten(1).norm(dim=1).clamp_min(1e-12)
                delta = delta + args.step_size * g / norm[:, None, None, None]
                factor = (args.eps / delta.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp_max(1)
                delta = delta * factor[:, None, None, None]
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
    args = sat.command_line(["--split", "full", *QUICK, "--lr", "0.05", "--lr-decays", "1", "--steps", "3"])
    data = data_.load_dataset("digits", "data")
    data.train = data_.Split(data.train.x[:192], data.train.y[:192])
    mine, other, opposite = net(), net(), net()
    rows = [s["row"] for s in sat.train(mine, data.train, torch.full((192,), everything), 9.0,
                                        args, torch.device("cpu"))]
    oracle_training(other, data, args, attack=everything)
    oracle_training(opposite, data, args, attack=not everything)
    for (k, a), b in zip(mine.state_dict().items(), other.state_dict().values()):
        # One rounding at a kink of ReLU, which differs from CPU to CPU, grows to 1e-4 in six steps.
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4, msg=k)
    assert (opposite.features[0].weight - mine.features[0].weight).abs().max() > 3e-3, \
        "AT is not vanilla training"
    assert (mine.head.weight - net().head.weight).abs().max() > 1e-2, "it did train"
    n_attacked = 192 * everything
    assert ([(r["attacked"], r["forward_equivalents"]) for r in rows]
            == [(n_attacked, 3 * 192 + 2 * 3 * n_attacked)] * 2)
    assert [r["lr"] for r in rows] == pytest.approx([0.05, 0.005])


def short_training(device, compile=False, amp="off", attack=True):
    """Four steps of SAT on digits with A = every third example: the change of all weights as one vector,
    and the log's row."""
    torch.backends.cudnn.allow_tf32 = False  # as common.set_up has it
    args = sat.command_line(["--split", "full", *QUICK, "--epochs", "1", "--batch-size", "40", "--steps", "3",
                             "--step-size", "0.5", "--eps", "1.5", "--lr", "0.05", "--amp", amp,
                             "--compile" if compile else "--no-compile"])
    data = data_.load_dataset("digits", "data", device)
    torch.manual_seed(0)
    model = models.Classifier(models.preactresnet(1, (8, 8), 1), nn.Linear(8, 10), [0.3], [0.35]).to(device)
    before = [p.detach().clone() for p in model.parameters()]
    split, A = data_.Split(data.train.x[:160], data.train.y[:160]), torch.arange(160) % 3 == 0
    row, = [s["row"] for s in sat.train(model, split, A & attack, 2.0 if attack else 1.0,
                                        args, torch.device(device))]
    assert not [k for k in model.state_dict() if "_orig_mod" in k], \
        "a checkpoint of a compiled network is like any other"
    return torch.cat([(p - q).flatten().cpu() for p, q in zip(model.parameters(), before)]), row


FAST = [(True, "off", 0.9999), (False, "bf16", 0.97), (True, "bf16", 0.97)]


# Not the last on CPUs, where compiling takes a minute.
@pytest.mark.parametrize("device,compile,amp,alike",
                         [*(("cpu", *how) for how in FAST[:2]),
                          *(pytest.param("cuda", *how, marks=GPU.marks) for how in FAST)])
def test_compiled_and_bf16_training_are_the_plain_one_to_rounding(device, compile, amp, alike):
    """--compile (A filled up to 16 and 32 examples) and bf16 autocast, against float32 on the CPU: the same
    change of the weights, which training without the attack does not give."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    (plain, row), (fast, row2) = short_training("cpu"), short_training(device, compile, amp)
    other, _ = short_training("cpu", attack=False)
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2) == compile, \
        "a graph of the step, one or two of the attack"
    assert row2["attacked"] == row["attacked"] == 54 and row2["loss"] == pytest.approx(row["loss"], rel=0.02)
    same = F.cosine_similarity(fast, plain, dim=0)
    assert (same > alike > F.cosine_similarity(other, plain, dim=0)
            and (fast.norm() / plain.norm()).item() == pytest.approx(1, abs=0.02))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_step_waits_for_the_gpu(request):
    device = torch.device("cuda")
    args = sat.command_line(["--split", "full", *QUICK, "--augment", "full",
                             "--batch-size", "64", "--random-start"])
    g = torch.Generator().manual_seed(0)
    split = data_.Split(torch.randint(0, 256, (256, 3, 32, 32), generator=g, dtype=torch.uint8),
                           torch.randint(0, 10, (256,), generator=g)).to(device)
    model, generator = net(channels=3).to(device).train(), torch.Generator(device)
    optimizer, attack = models.sgd(model, 0.1, 0.0, device), sat.training_attack(model, args, device)
    plan = list(zip(*sat.epoch_plan(data_.epoch_order(256, 64, 0, 0)[0],
                                    torch.arange(256) % 2 == 0, 2.0, device)))
    request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
    for i, (x, y, _) in enumerate(data_.training_batches(split, 64, 0, 0, "full", device)):
        a, w = plan[i]
        start = sat.random_starts(args, x, a, i, generator)
        with models.autocast("bf16", device):
            sat.sat_step(model, optimizer, x, y, a, w, functools.partial(attack, start=start))
        torch.cuda.set_sync_debug_mode("error")  # from the second step on: the first one sets libraries up


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_the_attack_under_bf16_keeps_images_and_projection_in_float32(trained, device):
    model, data = trained
    x, y = data.test.pixels(torch.arange(64), "cpu"), data.test.y[:64]
    exact = attacks.pgd(model, x, y, eps=0.5, step_size=0.1)
    with torch.autocast(device, torch.bfloat16):
        adv = attacks.pgd(model.to(device), x.to(device), y.to(device), eps=0.5, step_size=0.1).cpu()
    model.cpu()
    assert adv.dtype == torch.float32 and adv.min() >= 0 and adv.max() <= 1
    size = (adv - x).flatten(1).norm(dim=1)
    assert size.max() <= 0.5 + 1e-6, "a bfloat16 norm would miss the ball by 1e-3"
    assert F.cosine_similarity((adv - x).flatten(1), (exact - x).flatten(1)).mean() > 0.98
    with torch.no_grad():
        gain = [(F.cross_entropy(model(a), y) - F.cross_entropy(model(x), y)).item() for a in (adv, exact)]
    assert gain[0] == pytest.approx(gain[1], rel=0.02) and gain[1] > 0.5


def test_filling_A_up_to_16_changes_nothing(trained):
    model, data = trained
    x, y = data.train.pixels(torch.arange(64), "cpu"), data.train.y[:64]
    args = vars(sat.command_line(["--split", "full"]))
    for n_A, flags in ((1, {}), (16, {}), (21, {"random_start": True}), (64, {"attack": "fgsm-rs"})):
        seen, a = [], torch.randperm(64, generator=torch.Generator().manual_seed(n_A))[:n_A]
        watched = lambda z: seen.append(len(z)) or model(z)
        watched.modules, watched.parameters, watched.eval = model.modules, model.parameters, model.eval
        how = SimpleNamespace(**{**args, "batch_size": 64, **flags})
        attack = sat.training_attack(watched, how, torch.device("cpu"))
        start = sat.random_starts(how, x, a, 0, torch.Generator())
        plain, filled = (f(x[a], y[a], start=start) for f in (attack, sat.filled(attack)))
        torch.testing.assert_close(plain, filled, atol=1e-5, rtol=0)
        assert set(seen) == {n_A, -(-n_A // 16) * 16}


def test_an_attack_that_training_does_not_know():
    args = SimpleNamespace(attack="mine", eps=0.5, norm="l2", step_size=0.1, steps=7, compile=False)
    with pytest.raises(KeyError, match="mine"):
        sat.training_attack(None, args, torch.device("cpu"))


def test_only_A_is_attacked(trained):
    model, data = trained
    args = sat.command_line(["--split", "full", *QUICK])
    x, y = data.train.pixels(torch.arange(64), "cpu"), data.train.y[:64]
    in_A, w = torch.arange(64) % 3 == 0, torch.full((64,), 1 / 64)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    for flags in ({}, {"random_start": True}, {"attack": "fgsm-rs"}):
        how, seen = SimpleNamespace(**{**vars(args), "batch_size": 64, **flags}), []
        attack = sat.training_attack(model, how, torch.device("cpu"))
        for part in (in_A, torch.zeros(64, dtype=torch.bool)):
            a = part.nonzero().squeeze(1)
            start = sat.random_starts(how, x, a, 0, torch.Generator())
            sat.sat_step(lambda z: seen.append(z) or model(z), optimizer, x, y, a, w,
                         functools.partial(attack, start=start))
        moved = (seen[0] - x).flatten(1).norm(dim=1)  # what the network was trained on
        assert (moved[in_A] > 0.1).all() and (moved[~in_A] == 0).all()
        assert torch.equal(seen[1], x), "no A in the batch"


def test_train_uses_w_A():
    """One SGD step with weights, against autograd on the weighted loss written out."""
    data = data_.load_dataset("digits", "data")
    split = data_.Split(data.train.x[:64], data.train.y[:64])
    args = sat.command_line(["--split", "full", *QUICK, "--epochs", "1", "--eps", "0",
                             "--augment", "none", "--weight-decay", "0"])
    A, model, other = torch.arange(64) < 16, *(net().to(memory_format=torch.channels_last) for _ in range(2))
    for _ in sat.train(model, split, A, 5.0, args, torch.device("cpu")):
        pass
    other.train()
    # in this order: another would round, and ReLU has kinks
    (x, y, index), = data_.training_batches(split, 64, 0, 0, "none", "cpu")
    loss = F.cross_entropy(other(x), y, reduction="none")
    ((5 * loss[index < 16].sum() + loss[index >= 16].sum()) / (5 * 16 + 48)).backward()
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p, q - args.lr * q.grad, atol=1e-5, rtol=1e-4)


def test_selection_takes_the_most_robust_then_cleanest_then_latest(tmp_path, monkeypatch):
    scripted = {2: (5, 3), 3: (7, 4), 5: (6, 4), 6: (7, 4), 7: (8, 3)}  # epochs done: (clean, robust) of ten
    argv = ["--split", "none", *QUICK, "--epochs", "7", "--lr-decays", "1", "2", "4", "5",
            "--select-n", "10", "--results", str(tmp_path), "--run", "r"]
    seen, epochs = [], iter([*scripted, "final"])
    def attack(model, data, index, setting, folder):
        at = next(epochs)
        clean, robust = scripted.get(at, (1, 0))
        seen.append((at, index, {k: v.clone() for k, v in model.state_dict().items()}))
        return torch.arange(len(index)) < clean, torch.arange(len(index)) < robust
    monkeypatch.setattr(evaluate, "attack", attack)
    sat.main(argv)
    folder = tmp_path / "digits" / "r"
    result, best = runs.read_json(folder / "result.json"), runs.load(folder / "best.pt")
    rows = [json.loads(r) for r in open(folder / "log.jsonl")]
    assert [r["epoch"] for r in rows if "selection" in r] == list(scripted), \
        "one epoch after each decay, and at the end"
    assert result["epoch"] == best["epoch"] == 6, "robust 4 twice, then clean 7 twice, then the later"
    assert (all(torch.equal(v, seen[3][2][k]) for k, v in best["model"].items())
            and all(torch.equal(v, seen[-1][2][k]) for k, v in best["model"].items()))
    assert not set(seen[0][1].tolist()) & set(seen[-1][1].tolist())
    assert torch.backends.cpu.get_cpu_capability() in result["device"], "AVX2 and AVX512 round otherwise"


def test_logits_that_are_not_finite_stop_although_the_loss_is_finite():
    data = data_.load_dataset("digits", "data")
    args = sat.command_line(["--split", "full", *QUICK, "--batch-size", "64"])
    split, model = data_.Split(data.train.x[data.train.y > 0], data.train.y[data.train.y > 0]), net()
    with torch.no_grad():
        model.head.bias[0] = -math.inf  # of a class that never occurs: each example's loss is finite
        assert F.cross_entropy(model(split.pixels(torch.arange(64), "cpu")), split.y[:64]).isfinite()
    with pytest.raises(UserError, match="the logits are not finite in epoch 1, step 1"):
        list(sat.train(model, split, torch.zeros(len(split), dtype=torch.bool), 1.0,
                       args, torch.device("cpu")))


def test_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(2), 0.0, 0.0, -1e4], [1e4, 0.0, 0.0, 0.0]])
    assert rank.entropy(logits).tolist() == pytest.approx(
        [math.log(4), 0.5 * math.log(2) + 2 * 0.25 * math.log(4), 0.0], abs=1e-6)


def test_svar_by_hand():
    logits, y = torch.tensor([[math.log(2), 0.0, 0.0], [math.log(2), 0.0, 0.0]]), torch.tensor([0, 1])
    variance = ((0.5 - 1 / 3)**2 + 2 * (0.25 - 1 / 3)**2) / 3  # of the softmax 1/2, 1/4, 1/4
    assert rank.svar(logits, y).tolist() == pytest.approx([-variance, variance]), "wrong is harder than right"


def test_vog_by_hand():
    """A linear network whose weights change by epoch: the gradient of the true class's logit is
    that class's weight row."""
    split = data_.Split(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 0]))
    rows = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0))
    vog = rank.Vog((3, 1, 2, 2), torch.arange(3), "cpu")
    for w in rows:
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        model[1].weight.data = w.clone()
        rank.score(model, split, "cpu", ["entropy", "vog"], vog)
        vog = rank.Vog((3, 1, 2, 2), torch.arange(3), "cpu", vog.state())  # as a resumed run has it
        assert model[1].weight.grad is None
    expected = rows.std(0, unbiased=False).mean(1)  # over epochs, then over pixels
    torch.testing.assert_close(vog.scores(), expected[split.y])


def test_vog_orders_within_classes_and_averages_raw():
    y, scores = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([1.0, 2, 3, 10, 20, 60])
    z = subset.within_class(scores, y)
    assert z[:3].tolist() == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)])
    assert (z[3:].mean().item() == pytest.approx(0, abs=1e-9)
            and z[3:].var(unbiased=False).item() == pytest.approx(1))


def test_class_order_is_compared_with_the_papers():
    theirs = ["cat", "dog", "bird", "airplane", "deer", "frog", "horse", "ship", "truck", "automobile"]
    assert rank.with_paper("cifar10", theirs) == {"rho": pytest.approx(1), "n": 10}
    assert rank.with_paper("cifar10", theirs[::-1])["rho"] == pytest.approx(-1)
    assert (rank.with_paper("cifar100", ["road", "otter", "none such", "bee"])["n"] == 3
            and rank.with_paper("digits", ["0", "1", "2"]) is None)


def test_pipeline_ranking(pipeline):
    folder = pipeline / "digits0-4" / "rank-preactresnet8-seed0"
    scores, ranked = runs.load(folder / "scores.pt"), json.loads((folder / "rank.json").read_text())
    y = data_.load_dataset("digits0-4", "data").train.y
    assert (scores["entropy"].shape == y.shape and 0 < scores["entropy"].min()
            and scores["entropy"].max() <= math.log(5))
    hardest = ranked["classes_hardest_first"]
    for row in hardest:
        mean = scores["entropy"][y == int(row["class"])].double().mean().item()
        assert row["entropy"] == pytest.approx(mean, abs=1e-6)
    assert [r["entropy"] for r in hardest] == sorted((r["entropy"] for r in hardest), reverse=True)
    b = json.loads((pipeline / "digits0-4" / "b" / "result.json").read_text())
    assert sorted(b["A_classes"]) == sorted(r["class"] for r in hardest[:2])
    data = data_.load_dataset("digits0-4", "data")
    by_vog = lambda split: subset.ranking(sat.command_line(
        ["--dataset", "digits0-4", "--metric", "vog", "--split", split, "--results", str(pipeline)]), data)[0]
    assert torch.equal(by_vog("esat"), subset.within_class(scores["vog"], y)), "comparable between classes"
    assert torch.equal(by_vog("csat"), scores["vog"])


def test_ranking_averages_the_epochs(tmp_path):
    """Eq. 3 from the definition: train again, and average the entropy
    of every epoch's eval-mode predictions."""
    rank.main([*QUICK[:3], "--results", str(tmp_path)])
    data, args = data_.load_dataset("digits", "data"), rank.command_line([*QUICK[:3]])
    torch.manual_seed(0)
    model, total = models.build("preactresnet8", 10, *data.mean_std()), 0
    for _ in sat.train(model, data.train, torch.zeros(1297, dtype=torch.bool), 1.0,
                       args, torch.device("cpu")):
        model.eval()
        with torch.no_grad():
            p = model(data.train.pixels(torch.arange(1297), "cpu")).softmax(1).double()
        total = total - (p * p.clamp_min(1e-30).log()).sum(1)
        model.train()
    scores = runs.load(tmp_path / "digits" / "rank-preactresnet8-seed0" / "scores.pt")
    torch.testing.assert_close(scores["entropy"].double(), total / 2, atol=1e-4, rtol=1e-3)


def test_evaluate_repeats_the_runs_own_numbers(pipeline):
    own = json.loads((pipeline / "digits0-4" / "b" / "result.json").read_text())
    found, = (pipeline / "digits0-4" / "b").glob("eval-*.json")
    again = json.loads(found.read_text())
    assert (again["accuracy"] == own["accuracy"] and again["settings"] == own["settings"]
            and again["weights"] == own["weights"])


def test_transfer_leaves_the_backbone_unchanged(pipeline):
    folder, = (pipeline / "digits5-9").iterdir()
    source, target = runs.load(pipeline / "digits0-4" / "a" / "best.pt"), runs.load(folder / "best.pt")
    shared = [k for k in source["model"] if not k.startswith("head")]
    assert shared and all(torch.equal(source["model"][k], target["model"][k]) for k in shared)
    assert any("running_mean" in k for k in shared)
    assert ([tuple(target["model"][f"head.{k}"].shape) for k in ("0.weight", "2.weight")]
            == [(64, 64), (5, 64)])
    result = json.loads((folder / "result.json").read_text())
    assert (result["A"] == 0 and result["source"]["run"] == "a" and result["source"]["A"] == 324
            and result["source"]["dataset"] == "digits0-4")


# --- what later work may want -------------------------------------------------------------------------------

def test_redrawn_attacks_other_examples_every_epoch(monkeypatch):
    """The control at equal cost: as many examples as a fixed random A, others in each epoch,
    the same in a repeat."""
    plans, real = [], sat.epoch_plan
    def watched(order, A, *a):
        plans.append(set(order.flatten()[A[order.flatten()]].tolist()))
        return real(order, A, *a)
    monkeypatch.setattr(sat, "epoch_plan", watched)
    data = data_.load_dataset("digits", "data")
    split = data_.Split(data.train.x[:192], data.train.y[:192])
    args = sat.command_line([*QUICK, "--order", "redrawn", "--steps", "1"])
    A = sat.choose_A("esat", split.y, data.classes, amount=48, order="redrawn")
    rows = [[s["row"]["attacked"] for s in sat.train(net(), split, A, 1.0, args, torch.device("cpu"))]
            for _ in range(2)]
    assert (rows == [[48, 48], [48, 48]] and plans[0] != plans[1] and plans[:2] == plans[2:]
            and len(plans[0] & plans[1]) < 24)


def test_every_step_draws_random_starts_of_its_own(monkeypatch):
    draws, real = [], sat.random_starts
    monkeypatch.setattr(sat, "random_starts", lambda *a: draws.append(a[3]) or real(*a))
    data = data_.load_dataset("digits", "data")
    split = data_.Split(data.train.x[:192], data.train.y[:192])
    for seed in ("0", "1", "1"):
        args = sat.command_line(["--split", "full", *QUICK, "--steps", "1", "--random-start", "--seed", seed])
        list(sat.train(net(), split, torch.ones(192, dtype=torch.bool), 1.0, args, torch.device("cpu")))
    assert len(draws) == 18 and len(set(draws)) == 12 and draws[6:12] == draws[12:], "2 epochs of 3 steps"


@pytest.mark.parametrize("arch,parameters,flop", [
    ("preactresnet18", 11.17e6, 1.11e9), ("preactresnet18-authors", 21.33e6, 3.64e9)])
def test_networks_have_the_sizes_that_the_authors_and_the_field_report(arch, parameters, flop):
    from torch.utils.flop_counter import FlopCounterMode
    model = net(channels=3, arch=arch).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-3)
    assert counter.get_total_flops() == pytest.approx(flop, rel=1e-2)
