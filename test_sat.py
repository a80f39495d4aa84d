"""All tests: plain pytest on the CPU, against oracles written out here.    python -m pytest -q test_sat.py"""
import functools
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
import bench
import common
import data as datasets
import evaluate
import findings
import flags
import models
import paper
import picture
import rank
import report
import sat
import sources
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
    args, data = sat.command_line(["--split", "none", *QUICK]), datasets.get("digits", "data")
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
    with torch.no_grad():
        assert torch.equal(clean, model(x).argmax(1) == y)
    assert not [w for w in warnings if "target classes" in w or "DLR" in w]


def test_autoattack_refuses_logits_that_are_not_finite():
    model, (x, y) = net(), images()
    nn.init.constant_(model.head.bias, math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        attacks.autoattack(model, x, y, eps=0.1, attacks=["apgd-ce"])


@pytest.mark.parametrize("lie,message", [
    (lambda x, y: (x, y), r"leaves 6 of 6 right, more than the \d that were right"),
    (lambda x, y: ((x + 0.2).clamp(0, 1), y), "left the l2 ball of 0.1"), (lambda x, y: (x - 1e-3, y), r"or the box \[0, 1\]")])
def test_autoattack_is_not_believed_blindly(lie, message, monkeypatch):
    import pyautoattack
    model, (x, y) = net(), images()
    with torch.no_grad():
        y = torch.where(torch.arange(6) == 0, (model.eval()(x).argmax(1) + 1) % 10, y)  # one is wrong before
    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", lambda self, x, y, batch_size: lie(x, y))
    with pytest.raises(ArithmeticError, match=message):
        attacks.autoattack(model, x, y, eps=0.1)


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


def test_random_A_is_spread_over_the_batches():
    """The permutation that picks A must not be the one that deals the first epoch's batches."""
    data = datasets.get("digits", "data")
    for seed in range(3):
        A = sat.choose_A("esat", data.train.y, data.classes, amount=0.5, order="random", seed=seed)
        shares = [A[index].float().mean().item() for _, _, index in datasets.batches(data.train, 64, seed, 0, "none", "cpu")]
        assert 0.25 < min(shares) and max(shares) < 0.75


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
    assert sat.sat_loss(logits, y, w / w.sum()).item() == pytest.approx(expected)
    halves = [sat.sat_loss(logits[i:i + 1], y[i:i + 1], w[i:i + 1] / 5).item() for i in (0, 1)]
    assert sum(halves) == pytest.approx(expected), "the shares of two processes"


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_epoch_plan(processes, monkeypatch):
    """Positions and weights of every process's part of each batch, against a loop over the batches."""
    A, order = torch.arange(40) % 7 == 0, torch.randperm(40, generator=torch.Generator().manual_seed(0))[:32].view(4, 8)
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
    assert any(len(part[step][0]) == 0 for part in parts for step in range(4)) or processes == 1, "a process without A in a batch"


def test_a_step_on_a_notebooks_own_tensors():
    """README's example: Eq. 2 on a network, a batch and a subset of one's own, against autograd on the loss written out."""
    model, other = (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    (x, y), in_A = images(8), torch.tensor([True, False, True, False, False, False, False, False])
    x = x.contiguous(memory_format=torch.channels_last)
    w, before = torch.where(in_A, 3.0, 1.0), x.clone()
    attack = functools.partial(attacks.pgd, model, eps=0.5, step_size=0.1)
    x_adv = torch.where(in_A.view(-1, 1, 1, 1), attacks.pgd(other, x, y, eps=0.5, step_size=0.1), x)
    loss, logits = sat.sat_step(model, torch.optim.SGD(model.parameters(), 0.1), x, y, in_A.nonzero().squeeze(1), w / w.sum(), attack)
    expected = (w * F.cross_entropy(other(x_adv), y, reduction="none")).sum() / w.sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and logits.shape == (8, 10) and torch.equal(x, before)
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p, q - 0.1 * q.grad)


def test_the_step_keeps_channels_last():
    """Convolutions are slower on another layout, and compiled twice: index_copy alone would return another."""
    seen, x = [], images(4, channels=3)[0].contiguous(memory_format=torch.channels_last)
    model = net(channels=3)
    model.features.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last)))
    attack = functools.partial(attacks.pgd, model, eps=0.5, step_size=0.1, steps=2)
    optimizer = sat.sgd(model, 0.1, 0.0, torch.device("cpu"))
    sat.sat_step(model, optimizer, x, torch.zeros(4, dtype=torch.int64), torch.tensor([1, 2]), torch.full((4,), 0.25), attack)
    assert seen == [True] * 3, "two attack steps and the training step"


def test_amp_auto_asks_the_hardware(monkeypatch):
    """bf16 where the CPU has units for it, float32 elsewhere and where ONEDNN_MAX_CPU_ISA forbids them."""
    cpu = torch.device("cpu")
    for avx512, amx, onednn, expected in ((0, 0, 1, "float32"), (1, 0, 1, "bf16"), (0, 1, 1, "bf16"), (1, 1, 0, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bool(onednn))
        assert sat.precision("auto", cpu) == expected
        assert (sat.precision("off", cpu), sat.precision("bf16", cpu)) == ("float32", "bf16")
        assert sat.autocast("auto", cpu)._enabled == (expected == "bf16")


def test_amp_auto_is_float32_without_bf16_units():
    code = "import sat, torch; print(sat.precision('auto', torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert done.stdout == "float32\n", done.stderr


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
    args = sat.command_line(["--split", "none", *QUICK, "--lr", "0.05", "--lr-decays", "1", "--steps", "3"])
    data = datasets.get("digits", "data")
    data.train = datasets.Split(data.train.x[:192], data.train.y[:192])
    mine, other, opposite = net(), net(), net()
    rows = [s["row"] for s in sat.train(mine, data.train, torch.full((192,), everything), 9.0, args, torch.device("cpu"))]
    oracle_training(other, data, args, attack=everything)
    oracle_training(opposite, data, args, attack=not everything)
    for (k, a), b in zip(mine.state_dict().items(), other.state_dict().values()):
        # One rounding at a kink of ReLU, which differs from CPU to CPU, grows to 1e-4 in six steps.
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4, msg=k)
    assert (opposite.features[0].weight - mine.features[0].weight).abs().max() > 3e-3, "AT is not vanilla training"
    assert (mine.head.weight - net().head.weight).abs().max() > 1e-2, "it did train"
    n_attacked = 192 * everything
    assert [(r["attacked"], r["forward_equivalents"]) for r in rows] == [(n_attacked, 3 * 192 + 2 * 3 * n_attacked)] * 2
    assert [r["lr"] for r in rows] == pytest.approx([0.05, 0.005])


GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


def short_training(device, compile=False, amp="off", attack=True):
    """Four steps of SAT on digits with A = every third example: the change of all weights as one vector, and the log's row."""
    torch.backends.cudnn.allow_tf32 = False  # as common.set_up has it
    args = sat.command_line(["--split", "none", *QUICK, "--epochs", "1", "--batch-size", "40", "--steps", "3", "--step-size", "0.5", "--eps", "1.5",
                             "--lr", "0.05", "--amp", amp, "--compile" if compile else "--no-compile"])
    data = datasets.get("digits", "data", device)
    torch.manual_seed(0)
    model = models.Classifier(models.preactresnet(1, (8, 8), 1), nn.Linear(8, 10), [0.3], [0.35]).to(device)
    before = [p.detach().clone() for p in model.parameters()]
    split, A = datasets.Split(data.train.x[:160], data.train.y[:160]), torch.arange(160) % 3 == 0
    row, = [s["row"] for s in sat.train(model, split, A & attack, 2.0 if attack else 1.0, args, torch.device(device))]
    assert not [k for k in model.state_dict() if "_orig_mod" in k], "a checkpoint of a compiled network is like any other"
    return torch.cat([(p - q).flatten().cpu() for p, q in zip(model.parameters(), before)]), row


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("compile,amp,alike", [(True, "off", 0.9999), (False, "bf16", 0.97), (True, "bf16", 0.97)])
def test_compiled_and_bf16_training_are_the_plain_one_to_rounding(device, compile, amp, alike):
    """--compile (A filled up to 16 and 32 examples) and bf16 autocast, against float32 on the CPU: the same change of the
    weights, which training without the attack does not give."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    (plain, row), (fast, row2), (other, _) = short_training("cpu"), short_training(device, compile, amp), short_training("cpu", attack=False)
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2) == compile, "a graph of the step, one or two of the attack"
    assert row2["attacked"] == row["attacked"] == 54 and row2["loss"] == pytest.approx(row["loss"], rel=0.02)
    same = F.cosine_similarity(fast, plain, dim=0)
    assert same > alike > F.cosine_similarity(other, plain, dim=0) and (fast.norm() / plain.norm()).item() == pytest.approx(1, abs=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_step_waits_for_the_gpu(request):
    args, device = sat.command_line(["--split", "none", *QUICK, "--augment", "full", "--batch-size", "64", "--random-start"]), torch.device("cuda")
    g = torch.Generator().manual_seed(0)
    split = datasets.Split(torch.randint(0, 256, (256, 3, 32, 32), generator=g, dtype=torch.uint8), torch.randint(0, 10, (256,), generator=g)).to(device)
    model, generator = net(channels=3).to(device).train(), torch.Generator(device)
    optimizer, attack = sat.sgd(model, 0.1, 0.0, device), sat.training_attack(model, args, device)
    plan = list(zip(*sat.epoch_plan(datasets.epoch_order(256, 64, 0, 0)[0], torch.arange(256) % 2 == 0, 2.0, device)))
    request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
    for i, (x, y, _) in enumerate(datasets.batches(split, 64, 0, 0, "full", device)):
        a, w = plan[i]
        start = sat.random_starts(args, x, a, i, generator)
        with sat.autocast("bf16", device):
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
    x, y, args = data.train.pixels(torch.arange(64), "cpu"), data.train.y[:64], vars(sat.command_line(["--split", "none"]))
    for n_A, flags in ((1, {}), (16, {}), (21, {"random_start": True}), (64, {"attack": "fgsm-rs"})):
        seen, a = [], torch.randperm(64, generator=torch.Generator().manual_seed(n_A))[:n_A]
        watched = lambda z: seen.append(len(z)) or model(z)
        watched.modules, watched.parameters, watched.eval = model.modules, model.parameters, model.eval
        how = SimpleNamespace(**{**args, "batch_size": 64, **flags})
        attack, start = sat.training_attack(watched, how, torch.device("cpu")), sat.random_starts(how, x, a, 0, torch.Generator())
        plain, filled = (f(x[a], y[a], start=start) for f in (attack, sat.filled(attack)))
        torch.testing.assert_close(plain, filled, atol=1e-5, rtol=0)
        assert set(seen) == {n_A, -(-n_A // 16) * 16}


def test_only_A_is_attacked(trained):
    model, data = trained
    args = sat.command_line(["--split", "none", *QUICK])
    x, y = data.train.pixels(torch.arange(64), "cpu"), data.train.y[:64]
    in_A, optimizer, w = torch.arange(64) % 3 == 0, torch.optim.SGD(model.parameters(), 0.0), torch.full((64,), 1 / 64)
    for flags in ({}, {"random_start": True}, {"attack": "fgsm-rs"}):
        how, seen = SimpleNamespace(**{**vars(args), "batch_size": 64, **flags}), []
        attack = sat.training_attack(model, how, torch.device("cpu"))
        for subset in (in_A, torch.zeros(64, dtype=torch.bool)):
            a = subset.nonzero().squeeze(1)
            start = sat.random_starts(how, x, a, 0, torch.Generator())
            sat.sat_step(lambda z: seen.append(z) or model(z), optimizer, x, y, a, w, functools.partial(attack, start=start))
        moved = (seen[0] - x).flatten(1).norm(dim=1)  # what the network was trained on
        assert (moved[in_A] > 0.1).all() and (moved[~in_A] == 0).all()
        assert torch.equal(seen[1], x), "no A in the batch"


def test_train_uses_w_A():
    """One SGD step with weights, against autograd on the weighted loss written out."""
    data = datasets.get("digits", "data")
    split = datasets.Split(data.train.x[:64], data.train.y[:64])
    args = sat.command_line(["--split", "none", *QUICK, "--epochs", "1", "--eps", "0", "--augment", "none", "--weight-decay", "0"])
    A, model, other = torch.arange(64) < 16, *(net().to(memory_format=torch.channels_last) for _ in range(2))
    for _ in sat.train(model, split, A, 5.0, args, torch.device("cpu")):
        pass
    other.train()
    (x, y, index), = datasets.batches(split, 64, 0, 0, "none", "cpu")  # in this order: another would round, and ReLU has kinks
    loss = F.cross_entropy(other(x), y, reduction="none")
    ((5 * loss[index < 16].sum() + loss[index >= 16].sum()) / (5 * 16 + 48)).backward()
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p, q - args.lr * q.grad, atol=1e-5, rtol=1e-4)


def test_selection_takes_the_most_robust_then_cleanest_then_latest(tmp_path, monkeypatch):
    scripted = {2: (5, 3), 3: (7, 4), 5: (6, 4), 6: (7, 4), 7: (8, 3)}  # epochs done: (clean, robust) of ten
    argv = ["--split", "none", *QUICK, "--epochs", "7", "--lr-decays", "1", "2", "4", "5", "--select-n", "10", "--results", str(tmp_path), "--run", "r"]
    seen, epochs = [], iter([*scripted, "final"])
    def attack(model, data, index, setting, folder):
        at = next(epochs)
        clean, robust = scripted.get(at, (1, 0))
        seen.append((at, index, {k: v.clone() for k, v in model.state_dict().items()}))
        return torch.arange(len(index)) < clean, torch.arange(len(index)) < robust
    monkeypatch.setattr(evaluate, "attack", attack)
    sat.main(argv)
    result, best = common.read_json(tmp_path / "digits" / "r" / "result.json"), common.load(tmp_path / "digits" / "r" / "best.pt")
    rows = [json.loads(r) for r in open(tmp_path / "digits" / "r" / "log.jsonl")]
    assert [r["epoch"] for r in rows if "selection" in r] == list(scripted), "one epoch after each decay, and at the end"
    assert result["epoch"] == best["epoch"] == 6, "robust 4 twice, then clean 7 twice, then the later"
    assert all(torch.equal(v, seen[3][2][k]) for k, v in best["model"].items()) and all(torch.equal(v, seen[-1][2][k]) for k, v in best["model"].items())
    assert not set(seen[0][1].tolist()) & set(seen[-1][1].tolist())


def test_best_is_mended_when_stopped_before_it_was_written(tmp_path, monkeypatch):
    argv = ["--split", "none", *QUICK, "--results", str(tmp_path), "--run", "r"]
    real = common.save
    def stop(path, value):
        if path.name == "best.pt":
            raise KeyboardInterrupt
        real(path, value)
    with monkeypatch.context() as m:
        m.setattr(common, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            sat.main(argv)
    assert (tmp_path / "digits" / "r" / "last.pt").exists() and not (tmp_path / "digits" / "r" / "best.pt").exists()
    sat.main(argv)
    assert common.load(tmp_path / "digits" / "r" / "best.pt")["epoch"] == 2


TWO = """
import sys, torch, common, data, sat
from torch import nn
torch.set_num_threads(1)
out, w_A, start, epochs, *flags = sys.argv[1:]
def main():
  args = sat.command_line(["--split", "none", "--epochs", epochs, "--lr-decays", "1", "--batch-size", "63", "--steps", "2", *flags])
  device = common.set_up(args)
  digits = data.get("digits", "data")
  digits.train = data.Split(digits.train.x[:300], digits.train.y[:300])
  torch.manual_seed(0)
  model = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))  # no batch norm
  model.frozen = False
  A = torch.arange(300) % 29 == 0  # so few that batches of a process often hold none
  state = common.load(start) if start != "-" else None
  for state in sat.train(model, digits.train, A, float(w_A), args, device, state):
      pass
  if common.rank() == 0:
      torch.save(state, out)
common.script(main)
"""


def processes(n, *command):
    """Runs a Python script with n processes under torchrun, or alone."""
    launch = [] if n == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "--"]
    return subprocess.run([sys.executable, *launch, *map(str, command)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("w_A,flags_", [(5.0, []), (1.0, ["--random-start"])])
def test_two_processes_equal_one(tmp_path, w_A, flags_):
    """The same weights (so the same gradients), loss and counts from 1 process, from 2, and from 2 that become 1 after an epoch."""
    (tmp_path / "two.py").write_text(TWO)
    for name, n, start, epochs in (("one", 1, "-", 2), ("two", 2, "-", 2), ("half", 2, "-", 1), ("rest", 1, tmp_path / "half", 2)):
        done = processes(n, tmp_path / "two.py", tmp_path / name, w_A, start, epochs, *flags_)
        assert done.returncode == 0, done.stderr
    one, *others = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two", "rest"))
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
    sat.main(["--dataset", "digits0-4", "--epochs", "2", "--lr-decays", "--eval-attacks", "apgd-ce", "--eval-n", "24", "--select-attacks", "apgd-ce",
              "--select-n", "8", "--split", "esat", "--frac", "0.3", "--run", "n", "--results", results])
    evaluate.main([other, "--eval-batch", "7"])
common.script(main)
"""


def test_stages_with_two_processes(pipeline, tmp_path):
    """Given the same scores.pt: the same A, n and keys from sat.py; the same flags of one checkpoint from evaluate.py."""
    import shutil
    (tmp_path / "stages.py").write_text(STAGES)
    for n in (1, 2):
        scores = tmp_path / f"{n}" / "digits0-4" / "rank-preactresnet8-seed0"
        shutil.copytree(pipeline / "digits0-4" / "rank-preactresnet8-seed0", scores)
        shutil.copytree(pipeline / "digits0-4" / "b", tmp_path / f"b{n}", ignore=shutil.ignore_patterns("eval*"))
        done = processes(n, tmp_path / "stages.py", tmp_path / f"{n}", tmp_path / f"b{n}" / "best.pt")
        assert done.returncode == 0 and done.stdout.count("SAT on digits0-4") == 1, done.stderr + done.stdout
    one, two = (common.read_json(tmp_path / f"{n}" / "digits0-4" / "n" / "result.json") for n in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2) and one["A"] == two["A"] == round(0.3 * 649)
    masks = [common.load(tmp_path / f"{n}" / "digits0-4" / "n" / "last.pt")["A"] for n in (1, 2)]
    assert masks[0] == masks[1], "the hash of A"
    shape = lambda v: {k: shape(w) for k, w in v.items()} if isinstance(v, dict) else None
    assert shape(one) == shape(two) and {k: v["clean"]["n"] for k, v in one["accuracy"].items() if k != "classes"} == {"all": 24}
    assert one["cost"]["attacked"] == two["cost"]["attacked"] > 0 and one["ranking"] == two["ranking"]
    evals = [common.read_json(*(tmp_path / f"b{n}").glob("eval-*.json")) for n in (1, 2)]
    assert evals[0] == evals[1], "AutoAttack in chunks of 7, dealt to two"


def test_a_process_that_dies_ends_the_job(undisturbed, tmp_path):
    """Rank 1 is killed in the second epoch: the job ends with a message, and one process takes the run to its end."""
    stage, argv, _ = CHAIN[0]
    command = [f"{tmp_path}/marker", "epoch", str(undisturbed[1]["rank"]["epoch"] // 2), stage, *argv, "--results", str(tmp_path)]
    (tmp_path / "killer.py").write_text(KILLER.replace("if where == phase", "if common.rank() == 1 and where == phase"))
    done = processes(2, tmp_path / "killer.py", *command)
    assert done.returncode != 0 and "exitcode  : -9" in done.stderr and "[rank0]: Traceback" not in done.stderr
    folder = tmp_path / "digits0-4" / "rank-preactresnet8-seed0"
    assert common.load(folder / "last.pt")["epoch"] == 1 and not (folder / "scores.pt").exists()
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
    kept = common.load(tmp_path / "digits" / "r" / "last.pt")
    assert kept["epoch"] == 1 and all(v.isfinite().all() for v in kept["model"].values())


def test_logits_that_are_not_finite_stop_although_the_loss_is_finite():
    data, args = datasets.get("digits", "data"), sat.command_line(["--split", "none", *QUICK, "--batch-size", "64"])
    split, model = datasets.Split(data.train.x[data.train.y > 0], data.train.y[data.train.y > 0]), net()
    with torch.no_grad():
        model.head.bias[0] = -math.inf  # of a class that never occurs: each example's loss is finite
        assert F.cross_entropy(model(split.pixels(torch.arange(64), "cpu")), split.y[:64]).isfinite()
    with pytest.raises(UserError, match="the logits are not finite in epoch 1, step 1"):
        list(sat.train(model, split, torch.zeros(len(split), dtype=torch.bool), 1.0, args, torch.device("cpu")))


# --- ranking -----------------------------------------------------------------------------------------------------------

def test_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(2), 0.0, 0.0, -1e4], [1e4, 0.0, 0.0, 0.0]])
    assert rank.entropy(logits).tolist() == pytest.approx([math.log(4), 0.5 * math.log(2) + 2 * 0.25 * math.log(4), 0.0], abs=1e-6)


def test_svar_by_hand():
    logits, y = torch.tensor([[math.log(2), 0.0, 0.0], [math.log(2), 0.0, 0.0]]), torch.tensor([0, 1])
    variance = ((0.5 - 1 / 3)**2 + 2 * (0.25 - 1 / 3)**2) / 3  # of the softmax 1/2, 1/4, 1/4
    assert rank.svar(logits, y).tolist() == pytest.approx([-variance, variance]), "wrong is harder than right"


def test_vog_by_hand():
    """A linear network whose weights change by epoch: the gradient of the true class's logit is that class's weight row."""
    split = datasets.Split(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 0]))
    rows, vog = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0)), rank.Vog((3, 1, 2, 2), torch.arange(3), "cpu")
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
    z = sat.within_class(scores, y)
    assert z[:3].tolist() == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)])
    assert z[3:].mean().item() == pytest.approx(0, abs=1e-9) and z[3:].var(unbiased=False).item() == pytest.approx(1)


def test_class_order_is_compared_with_the_papers():
    theirs = ["cat", "dog", "bird", "airplane", "deer", "frog", "horse", "ship", "truck", "automobile"]
    assert rank.with_paper("cifar10", theirs) == {"rho": pytest.approx(1), "n": 10}
    assert rank.with_paper("cifar10", theirs[::-1])["rho"] == pytest.approx(-1)
    assert rank.with_paper("cifar100", ["road", "otter", "none such", "bee"])["n"] == 3 and rank.with_paper("digits", ["0", "1", "2"]) is None


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
    params = datasets.draw(40, x.shape, "full", False, g)
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
        meta = {"label_names" if key == "labels" else "fine_label_names": [str(c) for c in range(10 if key == "labels" else 100)]}
        (tmp_path / folder / ("batches.meta" if key == "labels" else "meta")).write_bytes(pickle.dumps(meta))
    ten, hundred = datasets.get("cifar10", tmp_path), datasets.get("cifar100", tmp_path)
    assert (len(ten.train), len(ten.test), len(hundred.train)) == (20, 4, 4) and len(ten.classes) == 10
    assert np.array_equal(ten.train.x[5].numpy(), blocks["data_batch_2"][1].reshape(3, 32, 32))
    assert np.array_equal(hundred.test.x[3].numpy(), blocks["test"][3].reshape(3, 32, 32)) and hundred.test.y[3] == 3


@pytest.fixture
def table_1(monkeypatch):
    """Lets a test have data sets of its own sizes without the check of the number of classes."""
    return lambda name, n_classes: monkeypatch.setitem(sources.TABLE_1, name, (n_classes, 1, 1))


def write_jpeg(path, colour=(200, 30, 90), size=(80, 60), mode="RGB"):
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


def test_svhn_in_its_publishers_format(tmp_path, monkeypatch, capsys):
    from scipy.io import savemat
    from torchvision.datasets import svhn
    monkeypatch.setattr(svhn, "check_integrity", lambda *a: True)  # the sums of the real files
    rng = np.random.default_rng(0)
    x = {s: rng.integers(0, 255, (32, 32, 3, n), dtype=np.uint8) for s, n in (("train", 12), ("test", 5))}
    for s in x:
        savemat(tmp_path / f"{s}_32x32.mat", {"X": x[s], "y": np.arange(1, x[s].shape[3] + 1, dtype=np.uint8)[:, None] % 10 + 1})
    data = datasets.get("svhn", tmp_path)
    assert data.classes == list("0123456789") and np.array_equal(data.train.x[7].permute(1, 2, 0).numpy(), x["train"][..., 7])
    assert data.train.y.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3], "the publisher's label 10 is digit 0"
    assert "12 / 5 images, the paper's (Table 1) 73,257 / 26,032" in capsys.readouterr().out
    (tmp_path / "svhn.pt").unlink()
    savemat(tmp_path / "train_32x32.mat", {"X": x["train"][:16], "y": np.ones((12, 1))})
    with pytest.raises(UserError, match="train_32x32.mat is not SVHN's cropped digits"):
        datasets.get("svhn", tmp_path)


def test_flowers102_in_its_publishers_format(tmp_path, monkeypatch, capsys):
    from scipy.io import savemat
    from torchvision.datasets import flowers102
    monkeypatch.setattr(flowers102, "check_integrity", lambda *a: True)
    folder = tmp_path / "flowers-102"
    for i in range(1, 8):
        write_jpeg(folder / "jpg" / f"image_{i:05d}.jpg", (10 * i, 0, 0))
    savemat(folder / "imagelabels.mat", {"labels": np.array([[5, 102, 1, 7, 7, 2, 3]])})
    savemat(folder / "setid.mat", {"trnid": np.array([[2, 4, 6]]), "valid": np.array([[1, 7]]), "tstid": np.array([[3, 5]])})
    data = datasets.get("flowers102", tmp_path)
    assert data.train.y.tolist() == [101, 6, 1] and data.test.y.tolist() == [4, 2] and len(data.classes) == 102
    assert data.train.streamed and abs(data.train.pixels(torch.tensor([1]), "cpu")[0, 0].mean() - 40 / 255) < 0.02, "image 4"
    assert "1,020 / 1,020" in capsys.readouterr().out


def test_caltech256_in_its_publishers_format(tmp_path, table_1):
    table_1("caltech256", 3)
    for c, name in enumerate(("001.ak47", "002.american-flag", "257.clutter")):
        for i in range(1, 6):
            write_jpeg(tmp_path / "caltech256" / "256_ObjectCategories" / name / f"{c + 1:03d}_{i:04d}.jpg", mode="L" if i == 2 else "RGB")
    (tmp_path / "caltech256" / "256_ObjectCategories" / "001.ak47" / "RENAME2").write_text("a stray file of the real archive")
    data = datasets.get("caltech256", tmp_path)
    assert data.classes == ["ak47", "american-flag", "clutter"] and (len(data.train), len(data.test)) == (12, 3)
    assert not set(data.train.x.paths) & set(data.test.x.paths) and data.train.x.paths == datasets.get("caltech256", tmp_path).train.x.paths
    assert data.train.pixels(torch.arange(12), "cpu").shape == (12, 3, 224, 224), "grey images become RGB"


def test_caltech256_after_a_download_that_failed(tmp_path, monkeypatch):
    import urllib.request
    def refuse(*a, **k):
        raise OSError("no route to host")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    for _ in range(2):  # torchvision leaves an empty caltech256/ behind, which is no image folder
        with pytest.raises(UserError, match="no caltech256 under .* put caltech256/256_ObjectCategories/"):
            datasets.get("caltech256", tmp_path)


def test_imagenet200_is_200_wnids_of_an_imagenet_tree(tmp_path):
    wnids = [line.split("\t")[0] for line in (HERE / "configs" / "imagenet200_wnids.txt").read_text().splitlines()[1:]]
    assert len(wnids) == 200
    for wnid in [*wnids, "n99999999"]:
        for part in ("train", "val"):
            write_jpeg(tmp_path / "imagenet" / part / wnid / "a.JPEG")
    data = datasets.get("imagenet200", tmp_path)
    assert len(data.train) == len(data.test) == 200 and data.train.streamed and len(set(data.classes)) == 200
    assert data.classes[0] == "stingray" and data.train.x.paths[0].parent.name == wnids[0]
    import shutil
    shutil.rmtree(tmp_path / "imagenet" / "val" / wnids[3])
    with pytest.raises(UserError, match=f"val lacks 1 class folders: {wnids[3]}"):
        datasets.get("imagenet200", tmp_path)


def test_streamed_views(tmp_path):
    """Training crops are RandomResizedCrop's, drawn per example and epoch; test images are resized to 256, cropped to 224."""
    from PIL import Image
    ramp = np.zeros((300, 400, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, 400)[None], np.linspace(0, 255, 300)[:, None]
    for i in range(8):
        path = tmp_path / "mine" / ("train" if i < 6 else "test") / "a" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ramp).save(path)
    data = datasets.get("mine", tmp_path)
    x = data.test.pixels(torch.arange(2), "cpu")
    # The shortest side 300 becomes 256, so 400 becomes 341; the centre 224 of each are left.
    assert x.shape == (2, 3, 224, 224)
    assert x[0, 1, 0].mean().item() == pytest.approx(16 / 256, abs=0.01) and x[0, 0, :, 0].mean().item() == pytest.approx(58.5 / 341, abs=0.01)
    first, again, other = (next(datasets.batches(data.train, 6, 0, e, "full", "cpu"))[0] for e in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == (6, 3, 224, 224)
    half = next(datasets.batches(data.train, 3, 0, 0, "full", "cpu"))[0]
    width = [(c[0].amax() - c[0].amin()).item() for c in (next(datasets.batches(data.train, 6, 0, 2, "crop", "cpu"))[0])]
    assert len({round(w, 3) for w in width}) == 6 and min(width) > 0.1 and max(width) < 1.01, "each example has a crop of its own"
    params = datasets.draw(1000, (3, 224, 224), "full", True, torch.Generator().manual_seed(0))
    assert 0.9 <= params["factor"].min() < 0.91 and 1.09 < params["factor"].max() <= 1.1 and "crop" not in params
    data.train.x.workers, data.train.x.loader = 2, None
    for _ in range(2):  # the same workers twice, the first time left before the epoch's end
        assert torch.equal(next(datasets.batches(data.train, 3, 0, 0, "full", "cpu"))[0], half), "workers change nothing"
    assert [len(x) for x, _, _ in datasets.batches(data.train, 3, 0, 0, "full", "cpu")] == [3, 3]


def test_small_cifar_is_the_same_whatever_the_order_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SMALLER", {"few": ("many", 3, 2)})
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 256, (60, 3, 8, 8), generator=g, dtype=torch.uint8), torch.arange(60) % 4
    for folder, order in ((tmp_path / "a", torch.arange(60)), (tmp_path / "b", torch.randperm(60, generator=g))):
        folder.mkdir()
        torch.save({"train": {"x": x[order], "y": y[order]}, "test": {"x": x[order], "y": y[order]}, "classes": list("abcd")}, folder / "many.pt")
    a, b = (datasets.get("few", tmp_path / f) for f in "ab")
    assert torch.equal(a.train.x, b.train.x) and a.fingerprint() == b.fingerprint() and (tmp_path / "a" / "few.pt").exists()
    assert a.train.y.bincount().tolist() == [3] * 4 and a.test.y.bincount().tolist() == [2] * 4
    import hashlib
    digests = [hashlib.sha256(i.numpy().tobytes()).hexdigest() for i in x[y == 2]]
    assert {hashlib.sha256(i.numpy().tobytes()).hexdigest() for i in a.train.x[a.train.y == 2]} == set(sorted(digests)[:3])


def test_corrupt_and_doubled(tmp_path, capsys):
    for part, n in (("train", 3), ("test", 2)):
        for i in range(n):
            for c in ("cat", "dog"):
                write_jpeg(tmp_path / "mine" / part / c / f"{i}.jpg")
    (tmp_path / "mine" / "train" / "dog" / "1.jpg").write_bytes(b"\xff\xd8 no jpeg")
    data = datasets.get("mine", tmp_path, workers=1)
    with pytest.raises(UserError, match="dog/1.jpg is not an image .* python data.py NAME") as e:
        list(datasets.ordered(data.train, torch.arange(6), 2, "cpu"))
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="1 images of mine cannot be read"):
        datasets.main(["mine", "--data-dir", str(tmp_path)])
    assert "dog/1.jpg" in capsys.readouterr().out
    (tmp_path / "mine" / "train" / "Cat").mkdir()
    with pytest.raises(UserError, match="holds the class folder 'Cat' twice, also as 'cat'"):
        datasets.get("mine", tmp_path)
    with pytest.raises(UserError, match="has 2 classes, not 10"):
        (tmp_path / "mine" / "train" / "Cat").rmdir()
        (tmp_path / "mine").rename(tmp_path / "svhn")
        datasets.get("svhn", tmp_path)


def test_resnet50_through_every_stage(tmp_path, monkeypatch, capsys):
    """A two-class tree of JPEGs through rank, sat, evaluate and transfer, one epoch each (images of 64, to be quick)."""
    rng = np.random.default_rng(0)
    for name in ("pets", "other"):
        for part, n in (("train", 4), ("val", 10)):
            for c, colour in (("cat", (220, 40, 40)), ("dog", (40, 40, 220))):
                for i in range(n):
                    write_jpeg(tmp_path / "data" / name / part / c / f"{i}.jpg", tuple(int(v) for v in np.clip(rng.normal(colour, 20), 0, 255)))
    (tmp_path / "c.yaml").write_text("arch: resnet50\naugment: full\neps: 3.0\nstep-size: 0.5\nsteps: 1\nepochs: 1\nbatch-size: 4\nlr: 0.01\nside: 64\n"
                                     "workers: 0\neval-attacks: [apgd-ce]\nselect-attacks: [apgd-ce]\neval-n: 2\nselect-n: 1\n")
    monkeypatch.chdir(tmp_path)
    rank.main(["--config", "c.yaml", "--dataset", "pets"])
    sat.main(["--config", "c.yaml", "--dataset", "pets", "--split", "esat", "--frac", "0.5", "--run", "a"])
    evaluate.main(["results/pets/a/best.pt"])
    transfer.main(["results/pets/a/best.pt", "--config", "c.yaml", "--dataset", "other"])
    own, again = (json.loads(p.read_text()) for p in [Path("results/pets/a/result.json"), *Path("results/pets/a").glob("eval-*.json")])
    assert own["accuracy"] == again["accuracy"] and own["A"] == 4 and own["cost"]["attacked"] == 4
    target, = Path("results/other").glob("*/result.json")
    assert json.loads(target.read_text())["source"]["run"] == "a"
    with pytest.raises(UserError, match="vog keeps two numbers a pixel"):
        rank.main(["--config", "c.yaml", "--dataset", "pets", "--metrics", "vog", "--results", "other"])
    report.main([])
    assert (tmp_path / "results" / "figures" / "fig8.png").exists() is False and "No runs yet" in (tmp_path / "results" / "tables.md").read_text()


# --- configs and command line ------------------------------------------------------------------------------------------

TABLE_2 = """
cifar10      preactresnet18 200 128 0.1 100,150 5e-4 0.5 0.1
cifar100     preactresnet18 200 128 0.1 100,150 5e-4 0.5 0.1
imagenet200  resnet50       150 256 0.1 50,100  1e-4 3.0 0.5
transfer/cifar10    preactresnet18 40 128 0.1 20,30 5e-4 0.5 -
transfer/svhn       preactresnet18 40 128 0.1 20,30 5e-4 0.5 -
transfer/caltech256 resnet50      100 128 0.1 50,75 1e-4 3.0 -
transfer/flowers102 resnet50      100 102 0.1 50,75 1e-4 3.0 -
"""  # data set, architecture, epochs, batch size, lr, decays, L2 decay; eps and step size of A.1


@pytest.mark.parametrize("row", TABLE_2.split("\n")[1:-1])
def test_configs_are_table_2(row):
    name, arch, epochs, batch, lr, decays, decay, eps, step = row.split()
    argv = ["--config", str(HERE / f"configs/{name}.yaml")]
    args = transfer.command_line(["x.pt", *argv]) if "/" in name else sat.command_line([*argv, "--split", "full"])
    assert (args.dataset, args.arch, args.epochs, args.batch_size, args.lr) == (name.split("/")[-1], arch, int(epochs), int(batch), float(lr))
    assert (args.lr_decays, args.weight_decay, args.eps) == ([int(d) for d in decays.split(",")], float(decay), float(eps))
    assert (args.norm, args.augment, args.eval_attacks, args.eval_n, args.select_n) == ("l2", "full", list(attacks.STANDARD), 0, 0)
    if step != "-":
        assert (args.attack, args.steps, args.step_size, args.random_start, args.weight) == ("pgd", 7, float(step), False, "vanilla")


def test_command_line_beats_yaml_beats_defaults(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("dataset: digits\nlr: 5e-2\nepochs: 3\nrandom-start: true\nlr-decays: [1, 2]\nclasses: [1, 2]\n")
    args = sat.command_line(["--config", str(config), "--split", "csat", "--epochs", "4"])
    assert (args.lr, args.epochs, args.random_start, args.lr_decays, args.batch_size) == (0.05, 4, True, [1, 2], 128)
    assert args.classes == ["1", "2"]
    assert sat.command_line(["--config", str(config), "--split", "csat", "--no-random-start"]).random_start is False


def test_run_names():
    name = lambda *argv: sat.run_folder(sat.command_line([*argv]))[0].as_posix()
    assert name("--split", "esat", "--frac", "0.5", "--order", "hardest") == "results/digits/esat-hardest-0.5-seed0"
    assert name("--split", "csat", "--classes", "3", "1", "--weight", "emphasis", "--seed", "2") == "results/digits/csat-1-3-emphasis-seed2"
    assert name("--split", "full", "--eps", "1", "--results", "r") == "results/digits/full-eps=1.0-seed0".replace("results", "r")
    escape = sat.run_folder(sat.command_line(["--split", "csat", "--classes", "../../../x"]))[0]
    assert escape.parent == Path("results/digits") and ".." not in escape.parts


def dry_run(*argv, **env):
    """The commands of ./run_all.sh --dry-run as [(script, argv)], and its summary {figure: [runs, transfers, new]}."""
    out = subprocess.run([str(HERE / "run_all.sh"), "--dry-run", *argv], capture_output=True, text=True, check=True,
                         env={**os.environ, **env}).stdout
    lines = [shlex.split(line) for line in out.splitlines() if not line.startswith("#")]
    counts = [line[2:].rsplit(maxsplit=4) for line in out.splitlines() if line.startswith("# ") and ":" in line.split("(")[0]]
    return [(Path(w[1]).name, w[2:]) for w in lines], {c[0].strip(): [int(v) for v in c[1:4]] for c in counts}


COUNTS = {  # [runs of sat.py, transfers], each: (hardest + easiest + random subsets) x nine sizes, unless said
    "cifar10: baselines": [2, 0], "cifar10: fig2": [10, 0],  # one run a class
    "cifar10: fig4": [9 * (2 + 10), 0], "cifar10: fig5": [9 * (2 + 10), 0], "cifar10: fig6": [9 * (2 + 10), 0], "cifar10: fig13": [9 * (2 + 10), 0],
    "cifar100: baselines": [2, 0], "cifar100: fig5": [9 * (2 + 5), 0], "cifar100: fig6": [9 * (2 + 5), 0], "cifar100: fig13": [9 * (2 + 5), 0],
    "cifar100: fig12": [9 * 3, 0],  # hardest, three metrics
    "imagenet200: baselines": [2, 0], "imagenet200: fig5": [9 * (2 + 3), 0], "imagenet200: fig6": [9 * (2 + 3), 0], "imagenet200: fig13": [9 * (2 + 3), 0],
    "cifar100 -> cifar10: fig7": [9 * 3, 9 * 3 + 2],  # hardest, three weights; + 2: the transfers of both baselines
    "cifar100 -> cifar10: fig8": [9 * (2 + 5), 9 * (2 + 5) + 2], "cifar100 -> svhn: fig14": [9 * (2 + 5), 9 * (2 + 5) + 2],
    "cifar100 -> cifar10: fig15": [9 * (2 + 5), 9 * (2 + 5) + 2],
    "cifar100 -> cifar10: fig16": [9 * 2, 9 * 2 + 2],  # hardest, PGD-7 and FGSM-RS
    "imagenet200 -> caltech256 flowers102: fig8": [9 * (2 + 3), 2 * (9 * (2 + 3) + 2)],  # two targets
    "imagenet200 -> caltech256 flowers102: fig15": [9 * (2 + 3), 2 * (9 * (2 + 3) + 2)],
    "imagenet200 -> caltech256 flowers102: fig16": [9 * 2, 2 * (9 * 2 + 2)],
    "cifar10: ranking (fig3)": [1, 0], "cifar100: ranking (fig3)": [1, 0], "imagenet200: ranking (fig3)": [1, 0]}
NEW = {"cifar10: fig5": 0, "cifar10: fig13": 0, "cifar100: fig12": 18, "cifar100 -> cifar10: fig16": 9 + 9,
       "cifar100 -> svhn: fig14": 63 + 2, "cifar100 -> cifar10: fig7": 18 + 27 + 2, "cifar100 -> cifar10: fig15": 54 + 54}


def test_run_all_lists_every_run_of_the_paper(monkeypatch):
    monkeypatch.setattr(flags, "from_yaml", functools.cache(flags.from_yaml))  # a thousand commands share a few configs
    commands, counts = dry_run("cifar10", "cifar100", "imagenet200", "transfer")
    assert {k: v[:2] for k, v in counts.items()} == COUNTS
    assert {k: counts[k][2] for k in NEW} == NEW
    runs = [sat.command_line(argv) for name, argv in commands if name == "sat.py"]
    assert len({(r.dataset, r.run) for r in runs}) == len(runs), "each run once"
    kinds = {}
    for r in runs:
        how = (r.dataset, r.split, "named" if r.classes else r.order, r.metric, r.weight, r.attack)
        kinds.setdefault(how, set()).add((r.frac or r.size, r.seed))
        assert r.run.endswith(f"-seed{r.seed}") and (r.weight == "emphasis") == ("-emphasis" in r.run)
    tenths, pgd = [k / 10 for k in range(1, 10)], ("entropy", "vanilla", "pgd")
    for dataset, seeds, sizes in (("cifar10", 10, range(1, 10)), ("cifar100", 5, range(10, 100, 10)), ("imagenet200", 3, range(20, 200, 20))):
        for split, steps in (("esat", tenths), ("csat", sizes)):
            for weight in ("vanilla",) if dataset == "cifar10" else ("vanilla", "emphasis"):
                assert kinds[dataset, split, "hardest", "entropy", weight, "pgd"] == {(s, 0) for s in steps}
                assert kinds[dataset, split, "easiest", "entropy", weight, "pgd"] == {(s, 0) for s in steps}
                assert kinds[dataset, split, "random", "entropy", weight, "pgd"] == {(s, k) for s in steps for k in range(seeds)}
        if dataset != "cifar10":
            assert kinds[dataset, "esat", "hardest", "entropy", "emphasis", "fgsm-rs"] == {(s, 0) for s in tenths}
    assert kinds["cifar100", "csat", "hardest", "entropy", "balanced", "pgd"] == {(s, 0) for s in range(10, 100, 10)}
    assert kinds["cifar100", "esat", "hardest", "vog", "vanilla", "pgd"] == {(s, 0) for s in tenths}
    assert sorted(c for r in runs if r.classes for c in r.classes) == sorted("airplane automobile bird cat deer dog frog horse ship truck".split())


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
            assert (args.dataset, args.arch) in made or args.split in ("none", "full") or args.classes, "the ranking comes first"
        elif name == "transfer.py":
            args = transfer.command_line(argv)
            assert args.checkpoint.as_posix() in made, "its source was trained before"
    source = lambda target: {Path(argv[0]).parent.name for name, argv in commands if name == "transfer.py" and f"{target}.yaml" in " ".join(argv)}
    assert source("svhn") == {r for r in source("cifar10") if r.startswith(("none", "full", "esat")) and "fgsm" not in r}
    assert all("emphasis" in r for r in source("caltech256") if not r.startswith(("none", "full"))) and source("caltech256") == source("flowers102")


def test_run_all_with_torchrun_and_a_wrong_section():
    from torch.distributed.run import parse_args as torchrun
    out = subprocess.run([str(HERE / "run_all.sh"), "--dry-run", "digits", "fig2"], capture_output=True, text=True, env={**os.environ, "NPROC": "4"}).stdout
    stages = [line for line in out.splitlines() if "report.py" not in line and not line.startswith("#")]
    assert len(stages) == 2 + 10
    for line in stages:
        words = shlex.split(line)
        assert words[1:3] == ["-m", "torch.distributed.run"]
        args = torchrun(words[3:])  # torchrun's own parser
        assert args.nproc_per_node == "4" and Path(args.training_script).name == "sat.py"
        assert sat.command_line(args.training_script_args).run.startswith("quick-")
    for argv in (["mnist"], ["digits", "fig99"], []):
        done = subprocess.run([str(HERE / "run_all.sh"), *argv], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "cifar10" in done.stderr


def test_run_all_claims(tmp_path):
    """A finished run is skipped, one that another copy has claimed too; a failure is listed and does not stop the rest."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho \"$@\" >> {tmp_path}/calls\ncase \"$*\" in *csat-2-*) echo no such luck >&2; exit 2;; esac\n")
    python.chmod(0o755)
    results = tmp_path / "results"
    (results / "digits" / "quick-csat-0-seed0").mkdir(parents=True)
    (results / "digits" / "quick-csat-0-seed0" / "result.json").write_text("{}")
    claim = results / "claims" / f"{results}_digits_quick-csat-1-seed0".replace("/", "_")
    claim.mkdir(parents=True)
    go = lambda: subprocess.run([str(HERE / "run_all.sh"), "digits", "fig2"], capture_output=True, text=True,
                                env={**os.environ, "PYTHON": str(python), "RESULTS": str(results)})
    done, calls = go(), lambda: (tmp_path / "calls").read_text()
    assert "csat-0-seed0" not in calls() and "csat-1-seed0" not in calls() and "csat-9-seed0" in calls() and "report.py" in calls()
    assert done.returncode == 1 and "1 failed:" in done.stderr and "csat-2-seed0" in done.stderr
    log = done.stderr.split("(its output: ")[1].split(")")[0]
    assert "no such luck" in Path(log).read_text() and "no such luck" in done.stdout
    assert [p.name for p in (results / "claims").iterdir()] == [claim.name], "its own claims are given back"
    os.utime(claim, (1, 1))  # a copy that died long ago
    go()
    assert "csat-1-seed0" in calls()


def test_two_run_alls_at_once(tmp_path):
    """Every run of a section exactly once, whichever of two copies makes it; a transfer after its source."""
    python, results = tmp_path / "python", tmp_path / "results"
    python.write_text(f"""#!{sys.executable}
import sys, time
from pathlib import Path
words = sys.argv[1:]
with open("{tmp_path}/calls", "a") as f:
    f.write(" ".join(words) + chr(10))
if "--run" in words:
    config = words[words.index("--config") + 1]
    data = words[words.index("--dataset") + 1] if "--dataset" in words else Path(config).stem
    if "transfer.py" in words[0]:
        assert Path(words[1]).with_name("result.json").exists()
    folder = Path("{results}") / data / words[words.index("--run") + 1]
    folder.mkdir(parents=True)  # a second one would fail
    time.sleep(0.02)
    (folder / "result.json").write_text("")
elif "rank.py" in words[0]:
    folder = Path("{results}") / (words[words.index("--dataset") + 1] if "--dataset" in words else "digits") / "rank-preactresnet8-seed0"
    folder.mkdir(parents=True)
    (folder / "rank.json").write_text("")
""")
    python.chmod(0o755)
    copies = [subprocess.Popen([str(HERE / "run_all.sh"), "digits"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHON": str(python), "RESULTS": str(results)}) for _ in range(2)]
    for copy in copies:
        _, errors = copy.communicate(timeout=300)
        assert copy.returncode == 0, errors
    calls = [line for line in (tmp_path / "calls").read_text().splitlines() if "report.py" not in line]
    commands, _ = dry_run("digits")
    assert len(calls) == len(set(calls)) == len(commands) - 1 and not list((results / "claims").iterdir())


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
        assert per_example["clean"].sum() > per_example["robust"].sum() > 0
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
    data, args = datasets.get("digits", "data"), rank.command_line([*QUICK[:3]])
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
    result = json.loads((pipeline / "digits0-4" / "b" / "result.json").read_text())
    robust = result["accuracy"]["B_val"]["robust"]
    shown = f"{100 * robust['accuracy']:.1f} [{100 * robust['low']:.1f}, {100 * robust['high']:.1f}]"
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.replace("\\|", "").split("## Fig. 4 and 5")[1].split("## Fig. 13")[0].splitlines() if line.startswith("|")]
    row, = [dict(zip(rows[0], r)) for r in rows if r[0] == "hardest"]
    assert row["robust B_val %"] == shown and row["A"] == "2 classes" and row["A/N"] == "0.40"
    assert "Missing runs (gaps in the figure): the baseline AT." in text
    assert "digits0-4->digits5-9" in text and "AutoAttack's apgd-ce, n = 24" in text
    for name in ("fig3", "fig5", "fig8", "fig13"):
        assert (pipeline / "figures" / f"{name}.png").stat().st_size > 5000
    assert not (pipeline / "figures" / "fig2.png").exists() and "## Fig. 2" in text


def test_report_groups_random_classes_by_their_number(pipeline, tmp_path):
    """Random subsets of two classes differ in |A|: they are still seeds of one point."""
    result = json.loads((pipeline / "digits0-4" / "b" / "result.json").read_text())
    for seed, n in ((0, 250), (1, 260)):
        folder = tmp_path / f"r{seed}"
        folder.mkdir()
        args = {**result["args"], "order": "random", "seed": seed}
        (folder / "result.json").write_text(json.dumps({**result, "args": args, "A": n}))
    lines = report.lines_of(report.records(tmp_path), "order")
    assert list(lines) == ["random"] and list(lines["random"]) == [2] and len(lines["random"][2]) == 2


def test_report_shows_the_papers_numbers():
    value = paper.value
    assert value("fig6", "cifar10", "hardest", 0.5, "robust") == 66.4 and value("fig6", "cifar10", "random", 0.1, "clean") == 92.9
    assert value("fig6", "cifar10", "AT", 1.0, "robust") == 69.0 and value("fig6", "cifar10", "hardest", 0.55, "robust") is None
    assert value("fig8", "cifar100->cifar10", "easiest", 0.3, "robust") == 29.0 and value("fig8", "cifar100->svhn", "hardest", 0.3, "robust") == 22
    assert value("fig16", "imagenet200->flowers102", "fgsm-rs", 0.1, "robust") == 34.9 and value("fig12", "cifar100", "vog", 0.1, "robust") == 21.9
    assert value("fig7", "cifar100->cifar10", "vanilla", 0.1, "robust") == 8 and value("fig7", "cifar100->cifar10", "vanilla", 0.2, "robust") is None
    assert value("fig5", "digits", "hardest", 0.5, "robust") is None and value("fig5", "cifar10", "no AT", 0.0, "robust") == 0


def fake_run(split, A, order="hardest", seed=0, robust=0.5, data="cifar10", **made):
    part = {"clean": evaluate.accuracy(torch.ones(10)), "robust": evaluate.accuracy(torch.arange(10) < round(10 * robust))}
    return {"transfer": False, "split": split, "order": order, "metric": "entropy", "weight": "vanilla", "attack": "pgd", "seed": seed, "A": A, "N": 50000, "path": f"{split}-{order}-{A}-{seed}", "key": {}, "setting": (50000, "preactresnet18", 200, 0.5, 4, 9000),
            "size": A, "share": A / 50000, "w_A": 1.0, "A_classes": [], "cost": A, "weights": str((A, order, seed)), "data": data, "how": "h", "accuracy": {"all": part}, **made}


def test_report_keeps_other_settings_apart(pipeline, tmp_path, capsys):
    result = json.loads((pipeline / "digits0-4" / "a" / "result.json").read_text())
    for name, change in (("one", {}), ("twin", {}), ("seed", {"seed": 1}), ("lr", {"lr": 0.7})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps({**result, "args": {**result["args"], **change}}))
    groups = report.grouped(report.records(tmp_path), "data", "how")
    assert sorted((how.endswith(", lr 0.7"), len(g)) for (_, how), g in groups.items()) == [(False, 2), (True, 1)]
    assert "twin" in capsys.readouterr().out, "a repeated run is named, not counted as a seed"


def test_report_tables(tmp_path):
    runs = [fake_run("full", 50000, robust=0.7), fake_run("esat", 25000, robust=0.6), fake_run("esat", 25000, "random", 0, 0.4),
            fake_run("esat", 25000, "random", 1, 0.6), fake_run("esat", 5000, robust=0.5)]
    text = "\n".join(report.curve_section(runs, tmp_path, *next(c for c in report.CURVES if c[0] == "fig6")))
    assert "| hardest | 25,000 | 0.50 | 1 | 1 | 60.0 [31.3, 83.2] | 100.0 [72.2, 100.0] | 66.4 | -6.4 | 89.3 | +10.7 |" in text
    assert "| random | 25,000 | 0.50 | 1 | 2 | 50.0 ± 14.1 | 100.0 ± 0.0 | 64.5 | -14.5 | 91.0 | +9.0 |" in text
    assert "| AT | 50,000 | 1.00 | 1 | 1 | 70.0 [39.7, 89.2] |" in text and "| no AT | no run yet |" in text
    assert "Missing runs (gaps in the figure): random at |A| = 5,000, the baseline no AT." in text and "Not the paper's setting" not in text
    assert "The paper: N = 50,000, preactresnet18, 200 epochs, eps 0.5" in paper.caution("cifar10", (5000, "preactresnet18", 200, 0.5, 4, 9000))
    assert paper.caution("digits", ()) == ""
    assert paper.FINAL == {name: len(datasets.selection_and_final(n_test)[1]) for name, (_, _, n_test) in sources.TABLE_1.items()}
    assert (tmp_path / "fig6.png").stat().st_size > 5000


def test_report_averages_over_seeds():
    runs = [{"accuracy": {"all": {"robust": {"n": 50, "accuracy": a, "low": 0, "high": 1}}}} for a in (0.4, 0.6)]
    assert report.cell(runs, "all", "robust") == f"50.0 ± {100 * math.sqrt(0.02):.1f}"
    assert report.cell(runs, "B_val", "robust") == "-"


# --- the paper's claims ------------------------------------------------------------------------------------------------

def wilson_of(right, n):
    low, high = evaluate.wilson(right, n)
    return {"accuracy": right / n, "low": low, "high": high, "n": n}


def test_difference_is_newcombes():
    """Newcombe (1998), Table II, method 10: 56 of 70 against 48 of 80, and 9 of 10 against 3 of 10."""
    assert findings.difference(wilson_of(56, 70), wilson_of(48, 80)) == pytest.approx((20, 5.24, 33.39), abs=0.01)
    assert findings.difference(wilson_of(9, 10), wilson_of(3, 10)) == pytest.approx((60, 17.05, 80.90), abs=0.01)
    assert [findings.verdict(*d) for d in ((1, 0.1, 2), (0, -1, 1), (-1, -2, -0.1))] == ["holds", "open", "contradicted"]
    a, b = wilson_of(56, 70), wilson_of(48, 80)
    assert findings.contrast((1, a), (-0.5, b), (-0.5, b))[0] == pytest.approx(20) and findings.contrast((-1, a)) == pytest.approx((-80, -100 * a["high"], -100 * a["low"]))


def claim_run(split, robust, clean=80, n=100, **made):
    """A record of CIFAR-10 with classes cat (attacked if A is classes) and car, robust on `robust` of n."""
    accuracy = {part: {"robust": wilson_of(robust, n), "clean": wilson_of(clean, n)} for part in ("all", "A_val", "B_val")}
    accuracy["classes"] = {c: {"robust": wilson_of(robust, n), "clean": wilson_of(clean, n)} for c in ("cat", "truck", "car")}
    return {**fake_run(split, made.pop("A", 5000)), "order": "hardest", "accuracy": accuracy, "data": "cifar10-small", **made}


def claims_of(runs, ranks):
    return findings.claims(report.grouped(runs, "data", "how"), ranks)


def test_claims_get_the_verdict_of_their_interval():
    runs = [claim_run("none", 2, 95), claim_run("full", 60, 70)]
    runs += [claim_run("csat", r, order="named", A_classes=[c]) for c, r in (("cat", 40), ("truck", 15), ("car", 20))]
    runs += [claim_run("esat", 55, share=0.5, A=25000), *(claim_run("esat", r, order=o, share=0.1) for o, r in (("hardest", 45), ("easiest", 20), ("random", 50)))]
    ranks = [{"fingerprint": {"name": "cifar10-small"}, "classes_hardest_first": [{"class": c} for c in ("cat", "truck", "car")]}]
    (_, rows), = claims_of(runs, ranks).items()
    verdicts = {row[0][:3] + row[0].split()[-1]: row[3] for row in rows}
    assert verdicts == {"(a)classes": "holds", "(b)easiest": "holds", "(c)robustness": "holds", "(d)easiest": "holds", "(d)both)": "holds", "(e)AT)": "holds"}
    assert "cat 40.0 [30.9, 49.8], car 20.0" in rows[1][2] and "+0.50" in rows[1][2], "difficulty 3 2 1, B_val 40 15 20"
    assert "55.0 [45.2, 64.4] of 60.0 [50.2, 69.1]: 91 %; above the middle of no AT and AT by +24.0 [" in rows[2][2]
    (_, pooled), = claims_of([*runs, claim_run("esat", 15, order="hardest", share=0.1, seed=1), claim_run("esat", 60, order="easiest", share=0.1, seed=1)], ranks).items()
    assert pooled[3][2].startswith("30.0 [21.9, 39.6], 40.0 [30.9, 49.8]: -10.0 [") and "(2 seeds)" in pooled[3][2], "the mean, with the n of one"
    assert pooled[3][3] == "open"
    weak = [claim_run("none", 20, 95), claim_run("full", 20, 70), claim_run("esat", 55, share=0.5, A=25000)]
    (_, rows_), = claims_of(weak, ranks).items()
    assert rows_[0][3] == "open" and "AT gains nothing that is sure" in rows_[0][2]
    others = [claim_run("csat", 90, order="named", A_classes=["cat"], weight="emphasis"), claim_run("full", 90, attack="fgsm-rs")]
    assert claims_of([*runs, *others], ranks) == {k: v for k, v in claims_of(runs, ranks).items()}, "other weights and attacks are no seeds"
    for r in runs:
        if r["order"] == "named" and r["A_classes"] == ["cat"]:
            r["accuracy"]["B_val"]["robust"] = wilson_of(3, 100)
    (_, rows), = claims_of(runs, ranks).items()
    assert rows[0][3] == "holds for 2, open for 1" and rows[1][3] == "contradicted", "none is softened"


def test_claim_of_the_transfer():
    both = [claim_run("csat", r, weight=w, size=10, share=0.1, transfer=True, data="cifar100->cifar10", A_classes=["x"] * 10) for w, r in (("vanilla", 20), ("emphasis", 15))]
    (_, rows), = claims_of(both, []).items()
    assert rows[0][3] == "open" and rows[0][2].startswith("15.0 [") and "-5.0 [" in rows[0][2]


def test_tables_into_a_file(tmp_path):
    file = tmp_path / "R.md"
    file.write_text("a\n<!-- table: T -->\nold | x\n<!-- end -->\nb\n")
    report.into(file, [["## T", "![f](f.png)", "| new |"], []])
    assert file.read_text() == "a\n<!-- table: T -->\n\n| new |\n\n<!-- end -->\nb\n"
    with pytest.raises(UserError, match="asks for the table 'T'; there are: U"):
        report.into(file, [["## U", "x"]])


def test_readme_is_made_from_the_published_results(tmp_path):
    import re
    import shutil
    published = HERE / "results-published"
    shutil.copytree(published, tmp_path / "r")
    shutil.copy(HERE / "README.md", tmp_path / "README.md")
    report.main(["--results", str(tmp_path / "r"), "--into", str(tmp_path / "README.md")])
    assert (tmp_path / "README.md").read_text() == (HERE / "README.md").read_text(), "report.py --results results-published --into README.md"
    assert (tmp_path / "r" / "tables.md").read_text() == (published / "tables.md").read_text()
    text = (HERE / "README.md").read_text()
    assert "| (a) CSAT on a single class" in text and "| (f) cifar100-small to cifar10-small" in text and "torchattacks PGDL2" in text
    for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (HERE / image).stat().st_size < 1_000_000
    levers = json.loads((published / "levers.json").read_text())
    for lever in ("no_weight_gradients_in_the_attack", "channels_last"):
        for ratio in levers[lever].values():
            assert f"{ratio}" in text


def test_picture_of_A_and_B(pipeline, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(picture.figures, "perturbations", lambda path, title, rows, magnify: seen.append((path, title, rows)))
    picture.main([str(pipeline / "digits0-4" / "b" / "best.pt"), "--out", str(tmp_path / "p.png")])
    (path, title, rows), = seen
    in_A = json.loads((pipeline / "digits0-4" / "b" / "result.json").read_text())["A_classes"]
    assert rows["A"]["class"] in in_A and rows["B"]["class"] not in in_A and "l2 eps 0.5" in title
    for r in rows.values():
        assert r["before"][0] == r["class"] and torch.equal(r["x"] + r["delta"], r["adv"]) and 0.4 < r["delta"].norm() <= 0.5 + 1e-6
    picture.main([str(pipeline / "digits0-4" / "none" / "best.pt"), "--out", str(tmp_path / "p.png")])
    assert list(seen[1][2]) == ["B"]
    monkeypatch.undo()
    picture.main([str(pipeline / "digits0-4" / "none" / "best.pt"), "--out", str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").stat().st_size > 5000
    folder, = (pipeline / "digits5-9").iterdir()
    for path in (pipeline / "digits0-4" / "a" / "best.pt", pipeline / "digits0-4" / "rank-preactresnet8-seed0" / "last.pt", folder / "best.pt"):
        with pytest.raises(UserError, match="give the best.pt of sat.py --split csat"):
            picture.main([str(path)])


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


KILLER = """
import importlib, os, signal, sys, torch
marker, phase, moment, stage, *argv = sys.argv[1:]
import attacks, common, data
seen = {"epoch": 0, "chunk": 0, "save": 0}
real_batches, real_chunk, real_fsync = data.batches, attacks.attack_chunk, os.fsync

def at(where):
    seen[where] += 1
    if where == phase and seen[where] == int(moment):
        with open(marker, "w") as f:
            f.write(f"{where} {seen[where]}")
        os.kill(os.getpid(), getattr(signal, os.environ.get("WITH", "SIGKILL")))

def batches(*a):
    for batch in real_batches(*a):
        yield batch
        at("epoch")  # the step is done, the epoch is not saved

def attack_chunk(model, *a, **k):
    watch = model.register_forward_pre_hook(lambda *_: at("chunk"))
    try:
        return real_chunk(model, *a, **k)
    finally:
        watch.remove()

def fsync(file):
    at("save")  # written beside its place, and not yet in it
    real_fsync(file)

data.batches, attacks.attack_chunk, os.fsync = batches, attack_chunk, fsync
common.script(lambda: importlib.import_module(stage).main(argv))
print("SEEN", seen["epoch"], seen["chunk"], seen["save"])
"""
SHORT = ["--dataset", "digits0-4", "--epochs", "3", "--lr-decays", "1", "--steps", "2", "--eval-attacks", "apgd-ce", "--eval-n", "30",
         "--eval-batch", "10", "--select-attacks", "apgd-ce", "--select-n", "10"]
CHAIN = [  # stage, its arguments, what it can be killed in
    ("rank", [*SHORT[:6], "--batch-size", "64"], ("epoch", "save")),
    ("sat", [*SHORT, "--split", "esat", "--frac", "0.3", "--random-start", "--run", "a"], ("epoch", "chunk", "save")),
    ("evaluate", ["{results}/digits0-4/a/best.pt", "--eps", "0.3"], ("chunk", "save")),
    ("transfer", ["{results}/digits0-4/a/best.pt", "--config", str(HERE / "configs/transfer/digits5-9.yaml"), *SHORT[2:6], *SHORT[8:], "--run", "t"],
     ("epoch", "chunk", "save"))]


def run_stage(folder, stage, argv, phase="none", moment=0, **env):
    """A stage under KILLER; its process and what its marker says."""
    argv = [word.replace("{results}", str(folder)) for word in argv] + ([] if stage == "evaluate" else ["--results", str(folder)])
    (folder / "marker").unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "-c", KILLER, str(folder / "marker"), phase, str(moment), stage, *argv], capture_output=True, text=True,
                          cwd=folder, env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", **env})
    return done, (folder / "marker").read_text() if (folder / "marker").exists() else ""


def contents(folder):
    """Everything a chain of stages wrote, times aside: {path: content}."""
    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k != "seconds"}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value.numpy().tobytes() if isinstance(value, torch.Tensor) else value
    read = {".json": common.read_json, ".pt": lambda p: torch.load(p, weights_only=True), ".jsonl": lambda p: [json.loads(r) for r in open(p)]}
    return {p.relative_to(folder).as_posix(): plain(read[p.suffix](p)) for p in folder.rglob("*") if p.suffix in read}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """What CHAIN writes when nothing happens, and how many moments each phase of each stage has."""
    folder, moments = tmp_path_factory.mktemp("whole"), {}
    for stage, argv, _ in CHAIN:
        done, _ = run_stage(folder, stage, argv)
        assert done.returncode == 0, done.stderr
        moments[stage] = dict(zip(("epoch", "chunk", "save"), map(int, done.stdout.rsplit("SEEN", 1)[1].split())))
    return contents(folder), moments


@pytest.mark.parametrize("seed", range(int(os.environ.get("KILLS", 3))))  # KILLS=20 python -m pytest -k killed
def test_killed_at_any_moment_ends_with_the_same_result(undisturbed, tmp_path, seed):
    """SIGKILL once in each stage, at a random moment of a phase that changes with the seed (three seeds hit every phase of every stage), then
    the same command again: all that was written is bit-identical to the undisturbed chain's."""
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
    assert done.returncode == code and marker and done.stderr.splitlines()[-1].startswith("stopped: the same command, without --force, goes on")
    assert "Traceback" not in done.stderr and len(common.load(tmp_path / "digits0-4" / "rank-preactresnet8-seed0" / "last.pt")["log"]) == 1
    done, _ = run_stage(tmp_path, stage, argv)
    assert "going on after epoch 1" in done.stdout
    assert all(undisturbed[0][path] == value for path, value in contents(tmp_path).items())


def test_full_disk(undisturbed, tmp_path):
    """A file-size limit stands for a full disk: one line, no half-written file, and the run goes on when there is room."""
    stage, argv, _ = CHAIN[0]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
    folder = tmp_path / "r"
    command = [sys.executable, "-c", limit + f"import common, {stage}; common.script({stage}.main)", *argv, "--results", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "last.pt: File too large (finished work is kept" in done.stderr, done.stderr
    assert {p.name for p in folder.rglob("*") if p.is_file()} == {"args.json", "log.jsonl"}
    assert run_stage(folder, stage, argv)[0].returncode == 0
    (tmp_path / "file").write_text("")
    done = script("rank.py", *argv, "--results", tmp_path / "file" / "r")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# --- bad input: one line that says what is valid, nothing written ------------------------------------------------------

BAD = {
    "unknown dataset": (["--split", "full", "--dataset", "mnist"], "no data set 'mnist'"),
    "dataset is a path": (["--dataset", "../x"], "not a plain name"),
    "no such flag": (["--split", "full", "--lrr", "1"], "unrecognized arguments"),
    "wrong type": (["--split", "full", "--lr", "fast"], "'fast' is not a finite number above 0"),
    "negative": (["--split", "full", "--epochs", "0"], "whole number of at least 1"),
    "wrong choice": (["--split", "half"], "invalid choice: 'half'"),
    "unknown class": (["--split", "csat", "--classes", "cat"], "unknown class cat; valid: 0, 1, 2"),
    "frac 0": (["--split", "esat", "--frac", "0"], "'0' is not a finite number above 0 and at most 1"),
    "frac above 1": (["--split", "esat", "--frac", "1.5"], "'1.5' is not a finite number above 0 and at most 1"),
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
    "abbreviated flag": (["--split", "full", "--conf", "configs/cifar10.yaml"], "unrecognized arguments: --conf"),
    "cuda without a GPU": (["--split", "full", "--device", "cuda"], "sees no GPU"),
    "negative eps": (["--eps", "-1"], "'-1' is not a finite number of at least 0"),
    "eps is no number": (["--eps", "nan"], "'nan' is not a finite number"),
    "eps is empty": (["--eps", ""], "'' is not a finite number"),
    "infinite lr": (["--lr", "inf"], "'inf' is not a finite number"),
    "frac is no number": (["--frac", "nan"], "'nan' is not a finite number above 0 and at most 1"),
    "seed of 32 bits": (["--seed", "2147483648"], "at most 2147483647"),
    "decay before the start": (["--lr-decays", "-1"], "'-1' is not a whole number of at least 0"),
    "another norm": (["--norm", "l1"], "invalid choice: 'l1' (choose from l2, linf)|invalid choice: 'l1' (choose from 'l2', 'linf')"),
    "another attack in training": (["--attack", "cw"], "invalid choice: 'cw'"),
    "another AutoAttack": (["--eval-attacks", "apgd"], "invalid choice: 'apgd'"),
    "another metric": (["--metric", "loss"], "invalid choice: 'loss'"),
    "another order": (["--order", "hard"], "invalid choice: 'hard'"),
    "another network": (["--arch", "vgg"], "invalid choice: 'vgg'"),
    "another precision": (["--amp", "fp16"], "invalid choice: 'fp16'"),
    "another augmentation": (["--augment", "mixup"], "invalid choice: 'mixup'"),
    "weight factor 0": (["--weight-factor", "0"], "'0' is not a finite number above 0"),
    "no class named": (["--split", "csat", "--classes"], "expected at least one argument"),
    "classes and size": (["--split", "csat", "--classes", "3", "--size", "1"], "given: size, classes"),
    "run name empty": (["--split", "full", "--run", ""], "not a plain name"),
    "run name climbs": (["--split", "full", "--run", ".."], "not a plain name"),
    "run name with a line": (["--split", "full", "--run", "a\nb"], "not a plain name"),
    "dataset empty": (["--dataset", ""], "not a plain name"),
    "small side": (["--side", "8"], "'8' is not a whole number of at least 32"),
    "half a batch": (["--batch-size", "0.5"], "'0.5' is not a whole number"),
    "no steps": (["--steps", "0"], "'0' is not a whole number of at least 1"),
    "negative threads": (["--threads", "-2"], "'-2' is not a whole number of at least 0"),
    "a word too many": (["results/a/best.pt"], "unrecognized arguments: results/a/best.pt"),
    "config is a folder": (["--config", "."], "cannot read the config ."),
    "config without a name": (["--config"], "expected one argument"),
    "compile without a compiler": (["--split", "full", "--compile"], "--compile needs a compiler"),
}
OTHERS = {  # main, arguments, message
    "rank takes no split": (rank.main, ["--split", "esat"], "unrecognized arguments: --split esat"),
    "rank by nothing": (rank.main, ["--metrics"], "expected at least one argument"),
    "rank by loss": (rank.main, ["--metrics", "loss"], "invalid choice: 'loss'"),
    "transfer of nothing": (transfer.main, [], "the following arguments are required: checkpoint"),
    "transfer attacks nothing": (transfer.main, ["x.pt", "--attack", "pgd"], "unrecognized arguments: --attack pgd"),
    "evaluate nothing": (evaluate.main, [], "the following arguments are required: checkpoint"),
    "evaluate a folder": (evaluate.main, ["."], ". is truncated or not a file of this project"),
    "report of nothing": (report.main, ["--results", "nowhere"], "nowhere"),
    "data is a path": (datasets.main, ["../x"], "not a plain name"),
    "data unknown": (datasets.main, ["mnist"], "no data set 'mnist'"),
    "bench without 1": (bench.main, ["--fractions", "0.5"], "lacks 1"),
    "bench of 2": (bench.main, ["--fractions", "2"], "'2' is not a finite number of at least 0 and at most 1"),
}


@pytest.mark.parametrize("case", [*BAD, *OTHERS])
def test_bad_flags(case, tmp_path, monkeypatch):
    import shutil
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    main, argv, messages = OTHERS[case] if case in OTHERS else (sat.main, *BAD[case])
    with pytest.raises(UserError) as e:
        main(argv)
    assert any(message in str(e.value) for message in messages.split("|")), str(e.value)
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir()), "one line, and nothing is written"


def test_every_bad_input_is_one_line_and_exit_code_2(tmp_path):
    """What script() makes of a UserError, for one of each script; the inputs above and below are more than 60."""
    for name, *argv in (("sat.py", "--lr", "fast"), ("rank.py", "--lr", "fast"), ("transfer.py",), ("evaluate.py", "none.pt"), ("report.py", "--results", "no"),
                        ("data.py", "mnist"), ("bench.py", "--fractions", "2")):
        done = script(name, *argv, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not done.stdout, done.stderr
    assert len(BAD) + len(OTHERS) >= 60 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text,message", [
    ("learning-rate: 1", "unknown key 'learning-rate'; valid keys: amp, arch"), ("lr: fast", "lr: 'fast' is not a finite number|'fast' is not a finite number"),
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


class Malicious:
    """Unpickled, it would run a command."""

    def __init__(self, root):
        self.root = root

    def __reduce__(self):
        return os.system, (f"touch {self.root}/pwned",)


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
    torch.save({"model": Malicious(root), "arch": "preactresnet8"}, root / "malicious.pt")
    torch.save({"train": Malicious(root), "test": {}, "classes": []}, root / "a" / "malicious.pt")
    data = ["--data-dir", str(root / "a"), "--split", "full", "--augment", "none", "--batch-size", "2"]
    yield "folder without test", sat.main, [*data, "--dataset", "no_test"], "lacks test/ or val/"
    yield "uneven classes", sat.main, [*data, "--dataset", "uneven"], "lacks 1 class folders: dog"
    yield "corrupt image", sat.main, [*data, "--dataset", "torn"], "1.png is not an image"
    yield "truncated data", sat.main, [*data, "--dataset", "short"], "short.pt is truncated or not a file of this project"
    x, y = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1])
    torch.save({"train": {"x": x[:, :, :6], "y": y}, "test": {"x": x[:, :, :6], "y": y}, "classes": ["a", "b"]}, root / "a" / "oblong.pt")
    torch.save({"train": {"x": x, "y": y}, "test": {"x": x, "y": y}, "classes": ["a", "b", "c"]}, root / "a" / "empty.pt")
    torch.save({"train": {"x": x, "y": y}, "test": {"x": x[:1], "y": y[:1]}, "classes": ["a", "b"]}, root / "a" / "one.pt")
    scores = root / "results" / "digits" / "rank-preactresnet8-seed0" / "scores.pt"
    scores.parent.mkdir(parents=True)
    torch.save({"entropy": torch.zeros(3)}, scores)
    yield "scores of something", sat.main, ["--split", "esat", "--frac", "0.5"], "scores.pt is not a file of this kind: it lacks fingerprint"
    yield "not square", sat.main, [*data, "--dataset", "oblong"], "images of 6 x 8 pixels: small images must be square"
    yield "a class without images", sat.main, [*data, "--dataset", "empty"], "1 of its 3 classes have no training image"
    yield "one test image", sat.main, [*data, "--dataset", "one", "--arch", "preactresnet8"], "the test set has 1 image"
    yield "float data", sat.main, [*data, "--dataset", "floats"], "train must hold x, uint8"
    yield "malicious data", sat.main, [*data, "--dataset", "malicious"], "malicious.pt is truncated or not a file of this project"
    for name, message in (("foreign", "lacks model"), ("list", "lacks model"), ("pickle", "truncated or not a file"), ("none", "no file"),
                          ("malicious", "malicious.pt is truncated or not a file of this project (UnpicklingError)")):
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


def test_bench_counts_by_the_cost_model(tmp_path, capsys, monkeypatch):
    """Runs every kind of step once, in float32 and in bf16: the table's shape and the model's numbers, never a duration."""
    class PGDL2:
        """torchattacks' interface."""
        def __init__(self, model, eps, alpha, steps, random_start):
            self.attack = functools.partial(attacks.pgd, model, eps=eps, step_size=alpha, steps=steps)

        def __call__(self, x, y):
            return self.attack(x, y)

    monkeypatch.setitem(sys.modules, "torchattacks", SimpleNamespace(PGDL2=PGDL2))
    bench.main(["--side", "8", "--batch-size", "8", "--repeats", "1", "--fractions", "0.5", "1", "--amp", "bf16", "--threads", "1",
                "--json", str(tmp_path / "bench" / "b.json")])
    found = json.loads((tmp_path / "bench" / "b.json").read_text())
    expected = {"|A|/N = 0.5": 10 / 17, "|A|/N = 1": 1, bench.NAIVE: 24 / 17, bench.PEER: 1}
    model = {(r["step"], r["precision"]): r["model"] for r in found["steps"]}
    assert model == {(step, p): pytest.approx(v) for step, v in expected.items() for p in ("float32", "bf16")}
    for r in found["steps"]:
        assert set(r["faster_than"]) == {bench.NAIVE, bench.PEER} and r["images_per_s"] == pytest.approx(8 / r["seconds"])
    one = {r["step"]: r for r in found["steps"] if r["precision"] == "float32"}
    assert one["|A|/N = 1"]["time_to_full"] == one[bench.NAIVE]["faster_than"][bench.NAIVE] == 1
    assert one[bench.NAIVE]["time_to_full"] == pytest.approx(one["|A|/N = 1"]["faster_than"][bench.NAIVE])
    assert "|A|/N = 0.5, bf16" in capsys.readouterr().out
    (setting, rows), = findings.speed(tmp_path).items()
    assert setting.startswith("preactresnet8, batch 8, 8x8, PGD-7") and len(rows) == 8 and {len(row) for row in rows} == {7}
    with pytest.raises(UserError, match="lacks 1"):
        bench.main(["--fractions", "0.5"])


def test_transfer_of_an_unfinished_run(pipeline, tmp_path):
    (tmp_path / "last.pt").write_bytes((pipeline / "digits0-4" / "rank-preactresnet8-seed0" / "last.pt").read_bytes())
    with pytest.raises(UserError, match="result.json is missing beside .*last.pt: give the best.pt of a finished run"):
        transfer.main([str(tmp_path / "last.pt"), "--config", str(HERE / "configs/transfer/digits5-9.yaml"), "--results", str(tmp_path)])
