"""The method against oracles written out here, and fast training against plain; on a GPU -k "cuda or gpu"."""
import contextlib
import functools
import logging
import math
import re
import time
from unittest import mock

import numpy as np
import pyautoattack
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import attacks
import evaluate
import models
import rank
import report
import runs
import sat
import subset
import train
import transfer
from common import HERE, UserError
from conftest import QUICK
from data import Examples, epoch_order, load_dataset, training_batches
from paper.results import Run

CPU = torch.device("cpu")
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
ATTACKS = [functools.partial(attacks.pgd, step_size=0.1), attacks.fgsm_rs,
           functools.partial(attacks.pgd_authors, step_size=0.1)]
close = functools.partial(torch.testing.assert_close, atol=2e-5, rtol=0)


def net(n_classes=10, channels=1, arch="preactresnet8"):
    torch.manual_seed(0)
    return models.build(arch, n_classes, [0.3] * channels, [0.35] * channels)


def images(n=6, channels=1, n_classes=10):
    """Random images (n, channels, 8, 8), half of them on the edge of the box, and labels (n,)."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(n, channels, 8, 8, generator=g)
    x[: n // 2] = x[: n // 2].round()
    return x, torch.randint(0, n_classes, (n,), generator=g)


def arguments(*argv):
    return sat.command_line([*QUICK, *argv])


def digits(n):
    examples = load_dataset("digits", "data").train
    return Examples(examples.x[:n], examples.y[:n])


@functools.cache
def trained():
    """A network after two epochs of ordinary training on digits, and the data set."""
    model, data = net(), load_dataset("digits", "data")
    list(train.train(model, data.train, data.train.y < 0, 1.0, arguments(), CPU))
    return model.eval(), data


@pytest.fixture(autouse=True)
def short_autoattack(monkeypatch):
    def set_shorter(self, version):
        set_version(self, version)
        self.square.n_queries = 100
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 10
    set_version = pyautoattack.AutoAttack._set_version
    monkeypatch.setattr(pyautoattack.AutoAttack, "_set_version", set_shorter)


def length(delta, norm="l2"):
    return delta.flatten(1).norm(dim=1) if norm == "l2" else delta.flatten(1).abs().amax(1)


def oracle_pgd(model, x, y, eps, step, steps, norm="l2", start=0.0):
    """The inner maximisation of Eq. 1 from delta = `start` in each pixel, one example at a time."""
    def inside(x_i, delta):
        delta = delta.clamp(-eps, eps) if norm == "linf" else delta * min(1, eps / (delta.norm() + 1e-12))
        return (x_i + delta).clamp(0, 1) - x_i
    x_adv = x.clone()
    for x_i, y_i in zip(x_adv, y):
        delta = inside(x_i, torch.full_like(x_i, start))
        for _ in range(steps):
            z = (x_i + delta).clone().requires_grad_()
            g = torch.autograd.grad(-model(z[None]).log_softmax(1)[0, y_i], z)[0]
            delta = inside(x_i, delta + step * (g.sign() if norm == "linf" else g / (g.norm() + 1e-12)))
        x_i += delta
    return x_adv


@pytest.mark.parametrize("start", [0.0, 0.03, 3.0])  # the last one is outside of the ball
@pytest.mark.parametrize("norm,eps,step", [("l2", 0.5, 0.1), ("l2", 0.5, 0.4), ("linf", 0.1, 0.03)])
def test_pgd_and_fgsm_rs_are_their_definitions(norm, eps, step, start):
    model, (x, y), same = net().eval(), images(), {"eps": eps, "norm": norm}
    delta = torch.full_like(x, start)
    for steps in (0, 5):
        x_adv = attacks.pgd(model, x, y, **same, step_size=step, steps=steps, start=delta)
        close(x_adv, oracle_pgd(model, x, y, eps, step, steps, norm, start))
    x_adv = attacks.fgsm_rs(model, x, y, **same, start=delta)
    close(x_adv, oracle_pgd(model, x, y, eps, 1.25 * eps, 1, norm, start))
    nn.init.zeros_(model.head.weight)
    assert torch.equal(attacks.pgd(model, x, y, **same, step_size=step), x), "a zero gradient is a zero step"


@pytest.mark.parametrize("norm,eps", [("l2", 0.5), ("linf", 0.1)])
@pytest.mark.parametrize("attack", ATTACKS)
def test_ball_and_box(norm, eps, attack):
    model, (x, y), same = net(), images(20), {"eps": eps, "norm": norm}
    x_adv = attack(model, x, y, **same)
    assert torch.equal(x_adv, x_adv.clamp(0, 1))
    assert length(x_adv - x, norm).max() <= eps + 1e-6
    assert length(x_adv - x, norm).min() > 0.1 * eps, "every example moves"
    assert not x_adv.requires_grad
    assert F.cross_entropy(model.eval()(x_adv), y) > F.cross_entropy(model(x), y)
    assert torch.equal(attack(model, x, y, eps=0.0, norm=norm), x)
    assert attack(model, x[:0], y[:0], **same).shape == (0, 1, 8, 8), "an empty batch"
    if attack is not attacks.fgsm_rs:  # which draws random numbers
        close(attack(model, x[2:5], y[2:5], **same), x_adv[2:5])


@pytest.mark.parametrize("norm,eps,step", [("l2", 0.5, 0.4), ("linf", 0.1, 0.09)])
def test_pgd_authors_keeps_the_iterate_of_the_highest_loss(norm, eps, step):
    model, (x, y) = net().eval(), images()
    iterates = torch.stack([x, *(oracle_pgd(model, x, y, eps, step, k, norm) for k in range(1, 7))])
    losses = torch.stack([F.cross_entropy(model(z), y, reduction="none") for z in iterates]).detach()
    highest, means, each = losses.argmax(0), losses.mean(1), torch.arange(len(x))
    attack = functools.partial(attacks.pgd_authors, model, x, y, eps=eps, step_size=step, norm=norm)
    assert highest.unique().numel() > 1, "the highest is not always the last"
    close(attack(), iterates[highest, each])
    assert means[1] < means[2], "so that the next limit is exceeded by the third of seven iterates"
    close(attack(limit=means[1:3].mean().item()), iterates[losses[:2].argmax(0), each])
    assert torch.equal(attack(limit=0.0), x), "the start is not left out"
    A, args = torch.arange(160) % 10 == 0, arguments("--attack", "pgd-authors")
    attack = train.training_attack(model, A, 9.0, args, CPU)
    assert attack.keywords["limit"] == pytest.approx(10 / 5), "w_A is 5 if the weights have the mean 1"


def test_random_start_is_uniform_in_the_ball():
    x, g = torch.zeros(4000, 1, 2, 2), torch.Generator().manual_seed(0)
    radius = length(attacks.random_start(x, 2.0, "l2", g)) / 2
    assert (radius**4).mean().item() == pytest.approx(0.5, abs=0.02), "in 4 dimensions r^4 is uniform"
    delta = attacks.random_start(x, 0.3, "linf", g)
    assert delta.abs().max() <= 0.3
    assert delta.mean().item() == pytest.approx(0, abs=0.01)
    assert delta.std().item() == pytest.approx(0.3 / math.sqrt(3), abs=0.01)


@pytest.mark.parametrize("attack", [*ATTACKS, attacks.autoattack])
def test_attacks_leave_the_model_as_it_was(attack):
    def everything():
        return [*(value.tolist() for value in model.state_dict().values()),
                *((p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in model.parameters()),
                *(module.training for module in model.modules())]
    model, (x, y) = net().train(), images()
    model.features[1].bn1.eval()  # a mixture of modes must come back as a mixture
    model.head.bias.requires_grad_(False)
    F.cross_entropy(model(x), y).backward()
    before = everything()
    attack(model, x, y, eps=0.5)
    assert everything() == before


@pytest.mark.slow
def test_autoattack_agrees_with_the_package():
    model, data = trained()
    x, y = data.test.pixels(torch.arange(12), "cpu"), data.test.y[:12]
    clean, robust = attacks.autoattack(model, x, y, eps=0.25, batch_size=12, seed=3)
    package = pyautoattack.AutoAttack(model, norm="L2", eps=0.25, version="standard", seed=3)
    x_adv, _ = package.run_standard_evaluation(x, y, batch_size=12)
    assert clean.tolist() == (model(x).argmax(1) == y).tolist()
    assert robust.tolist() == (model(x_adv).argmax(1) == y).tolist()
    assert 0 < robust.sum() < clean.sum(), "all three kinds occur, or this test says little"


def test_autoattack_goes_on_after_the_chunks_that_are_there(tmp_path, monkeypatch):
    def attack_batch(model, x, y, seed, **settings):
        calls.append((len(x), seed))
        return y > 4, y > 4 + seed

    def evaluated(eps=0.25, seed=0, bias=0.0):
        settings = {"norm": "l2", "eps": eps, "attacks": ["apgd-ce"], "n": 20, "batch_size": 6, "seed": seed}
        model = net()
        model.head.bias.data += bias
        return torch.stack(evaluate.autoattack_accuracy(model, data, index, settings, tmp_path)[:2])
    data, index, calls = load_dataset("digits", "data"), torch.arange(20), []
    x, y = data.test.pixels(index, "cpu"), data.test.y[:20]
    monkeypatch.setattr(attacks, "attack_batch", attack_batch)
    whole = torch.stack(attacks.autoattack(net(), x, y, eps=0.25, batch_size=6))
    assert torch.equal(whole, torch.stack([y > 4, y > 4 + index // 6])), "each batch has a seed of its own"
    assert torch.equal(evaluated(), whole)
    assert calls[4:] == calls[:4] == [(6, 0), (6, 1), (6, 2), (2, 3)]
    first, _, third, _ = sorted(tmp_path.glob("*/chunk*.pt"))
    torch.save({"right": torch.zeros(2, 5), "warnings": []}, first)
    third.unlink()
    assert torch.equal(evaluated(), whole)
    assert calls[8:] == [(6, 0), (6, 2)], "only the chunks that are missing or have another shape"
    for other in ({"eps": 0.2}, {"bias": 1.0}, {"seed": 5}):
        evaluated(**other)
    assert calls[10:18] == 2 * calls[:4], "other settings and other weights share nothing"
    assert calls[18:] == [(6, 5), (6, 6), (6, 7), (2, 8)]
    monkeypatch.setattr(evaluate, "VERSIONS", {"torch": "0"})
    evaluated()
    assert calls[22:] == calls[:4], "nor do other versions"


@pytest.mark.parametrize("n_classes,unusable", [(2, {"apgd-t"}), (3, {"apgd-t"}), (5, set())])
def test_autoattack_with_fewer_than_ten_classes(n_classes, unusable, caplog):
    assert {*attacks.STANDARD} - {*attacks.usable_attacks(attacks.STANDARD, n_classes)} == unusable
    model, (x, y) = net(n_classes, channels=3).eval(), images(4, 3, n_classes)
    clean, _ = attacks.autoattack(model, x.contiguous(memory_format=torch.channels_last), y, eps=0.1)
    assert torch.equal(clean, model(x).argmax(1) == y)
    assert "target classes" not in caplog.text
    assert "DLR" not in caplog.text


@pytest.mark.parametrize("result,message", [
    (lambda x, y: (x, y), "6 right after AutoAttack, 5 before"),
    (lambda x, y: ((x + 0.2).clamp(0, 1), y), "left the l2 ball of 0.1"),
    (lambda x, y: (x - 1e-3, y), r"or the box \[0, 1\]")])
def test_autoattack_is_not_trusted_blindly(result, message, monkeypatch):
    model, (x, _), method = net().eval(), images(), "run_standard_evaluation"
    y, first = model(x).argmax(1), torch.arange(6) == 0
    y[0] = (y[0] + 1) % 10  # wrong already without an attack
    monkeypatch.setattr(pyautoattack.AutoAttack, method, lambda self, x, y, batch_size: result(x, y))
    with pytest.raises(ArithmeticError, match=message):
        attacks.autoattack(model, x, y, eps=0.1)
    monkeypatch.setattr(pyautoattack.AutoAttack, method, lambda self, x, y, batch_size: (x, y + ~first))
    assert not attacks.autoattack(model, x, y, eps=0.1)[1].any(), "what was wrong is not robust"


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("CUDA error: out of memory"),
                                   RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED")])
def test_a_full_gpu_is_not_taken_for_a_network_that_does_not_fit(error):
    model, (x, y) = net(), images()
    model.forward = mock.Mock(side_effect=error)
    with pytest.raises(RuntimeError, match="^CUDA|^cuDNN"):
        attacks.pgd(model, x, y, eps=0.1, step_size=0.1)
    model.forward.side_effect = RuntimeError("Input type (torch.cuda.FloatTensor) and weight type "
                                             "(CUDABFloat16Type) should be the same")
    with pytest.raises(ValueError, match="the model does not take"):
        attacks.pgd(model, x, y, eps=0.1, step_size=0.1)


def chosen(split, **options):
    """The indices of A among seven examples. Class a has the highest sum of scores, c the highest mean."""
    y, scores = torch.tensor([0, 1, 2, 0, 1, 2, 0]), torch.tensor([0.7, 0.1, 0.9, 0.7, 0.2, 0.9, 0.7])
    A = subset.choose_A(split, y, ["a", "b", "c"], scores=scores, **options)
    return "".join(str(i) for i in range(7) if A[i])


@pytest.mark.parametrize("split,options,expected", [
    ("none", {}, ""), ("full", {}, "0123456"), ("esat", {"amount": 1.0}, "0123456"),
    ("esat", {"amount": 3}, "025"),                      # of three equal scores the lowest index
    ("esat", {"amount": 3, "order": "easiest"}, "014"),  # ties by index here too
    ("esat", {"amount": 5}, "02356"), ("csat", {"names": ["b", "a"]}, "01346"),
    ("esat", {"amount": 0.5}, "0235"),                   # round(3.5) = 4
    ("csat", {"amount": 0.5}, "02356"),                  # round(1.5) = 2 classes: c, then a
    ("csat", {"amount": 1}, "25"), ("csat", {"amount": 1, "order": "easiest"}, "14")])
def test_choose_A(split, options, expected, capsys):
    assert chosen(split, **options) == expected
    n = len({*"036"} & {*expected})  # of the three equal ones
    note = f"note: 3 examples share the score at the edge of A; of these the first {n}, by index, are in A\n"
    assert capsys.readouterr().out == (note if n in (1, 2) else "")


def test_random_A_is_drawn_by_its_seed_and_spread_over_the_batches():
    draws = [chosen("csat", amount=1, order="random", seed=seed) for seed in range(20)]
    assert {*draws} == {"036", "14", "25"}, "whole classes, each of them for some seed"
    for seed in range(3):  # the permutation that picks A must not be the one that deals the first batches
        A = subset.choose_A("esat", torch.zeros(1280), [], amount=0.5, order="random", seed=seed)
        assert A.sum() == 640
        shares = A[epoch_order(1280, 64, seed, 0)[0]].float().mean(1)
        assert 0.25 < shares.min() <= shares.max() < 0.75


@pytest.mark.parametrize("weight,n_A,expected", [
    ("vanilla", 10, 1), ("balanced", 20, 4), (3.5, 10, 3.5),
    ("emphasis", 10, 2 * 90 / 10), ("emphasis", 90, 10 * 10 / 90),  # 2 |B|/|A| and 10 |B|/|A| (Sec. 4.3)
    *((weight, n_A, 1) for weight in ("balanced", "emphasis", 7.0) for n_A in (0, 100))])
def test_weights_of_the_paper(weight, n_A, expected):
    assert subset.weight_A(weight, n_A, 100) == pytest.approx(expected)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_batches_of_an_epoch(processes, monkeypatch):
    args = arguments("--batch-size", "8", "--augment", "crop", "--random-start")
    examples, A, order = digits(40), torch.arange(40) % 7 == 0, epoch_order(40, 8, args.seed, 1)[0]
    whole, parts = list(train.epoch_batches(examples, A, 5.0, args, 1, CPU)), []
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    for process in range(processes):
        monkeypatch.setenv("RANK", str(process))
        parts.append(list(train.epoch_batches(examples, A, 5.0, args, 1, CPU)))
    for index, batch, *batches in zip(order, whole, *parts, strict=True):
        x, y, positions, w, w_sums, starts, counts = zip(*batches)
        assert sum(counts) == A[index].sum()
        assert torch.equal(torch.cat(x), batch[0]), "augmented as in one process"
        assert torch.equal(torch.cat(y), examples.y[index])
        assert torch.cat(w).tolist() == [5.0 if A[i] else 1.0 for i in index]
        close(torch.stack(w_sums), torch.full((processes,), torch.cat(w).sum().item() / processes))
        assert torch.equal(torch.cat(starts), batch[5]), "drawn for the whole batch"
        for part, a in zip(index.tensor_split(processes), positions):
            assert a.tolist() == [i for i, example in enumerate(part) if A[example]]
    assert processes == 1 or 0 in [len(batch[2]) for part in parts for batch in part], "a part without A"


@pytest.mark.parametrize("factor", [1, 100])
def test_a_step_on_a_notebooks_own_tensors(factor):
    """Of docs/EXTEND.md. Larger weights are no other learning rate; channels_last, which is fast, stays."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10))
    last, (x, _), y, layouts = torch.channels_last, images(8, channels=3), torch.arange(8), []
    x, w = x.contiguous(memory_format=last), torch.tensor([1.0, 1, 3, 1, 1, 3, 1, 1])
    a, x_adv, before = torch.tensor([2, 5]), x.clone(), x.clone()
    x_adv[a] = oracle_pgd(model, x[a], y[a], 0.5, 0.1, 7)
    expected = (w * F.cross_entropy(model(x_adv), y, reduction="none")).sum() / 12
    gradients = torch.autograd.grad(expected, [*model.parameters()])
    stepped = [p - 0.1 * gradient for p, gradient in zip(model.parameters(), gradients)]
    model.register_forward_pre_hook(lambda _, x: layouts.append(x[0].is_contiguous(memory_format=last)))
    attack = functools.partial(attacks.pgd, model, eps=0.5, step_size=0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss, _ = train.sat_step(model, optimizer, x, y, a, factor * w, attack)
    close(loss, expected.detach())
    assert torch.equal(x, before), "the caller's images are not changed"
    assert layouts == [True] * 9, "of the look at the output, seven steps of the attack, the training step"
    close([*model.parameters()], stepped)


def oracle_training(model, examples, A, w_A, args):
    """Training on Eq. 2 as one would write it. Returns the loss and training accuracy of each epoch."""
    optimizer, steps = torch.optim.SGD(model.parameters(), args.lr, 0.9, weight_decay=args.weight_decay), []
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, args.lr_decays)
    for epoch in range(args.epochs):
        for x, y, index in training_batches(examples, args.batch_size, args.seed, epoch, args.augment, "cpu"):
            a, b = A[index], ~A[index]
            x[a] = oracle_pgd(model.eval(), x[a], y[a], args.eps, args.step_size, args.steps)
            logits = model.train()(x)
            losses = F.cross_entropy(logits, y, reduction="none")
            loss = (w_A * losses[a].sum() + losses[b].sum()) / (w_A * a.sum() + b.sum())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append([loss.item(), (logits.argmax(1) == y).float().mean().item()])
        schedule.step()
    return torch.tensor(steps).view(args.epochs, -1, 2).mean(1)


@pytest.mark.parametrize("thirds", [0, 1, 3])
def test_training_is_sgd_on_eq_2(thirds):
    args = arguments("--batch-size", "32", "--lr", "0.05", "--lr-decays", "1", "--steps", "3")
    examples, A = digits(96), torch.arange(96) % 3 < thirds
    model, oracle, opposite = net().eval(), net(), net()
    log = [state["row"] for state in train.train(model, examples, A, 5.0, args, CPU)]
    expected_log = oracle_training(oracle, examples, A, 5.0, args)
    oracle_training(opposite, examples, ~A, 5.0, args)
    for actual, expected in zip(model.state_dict().values(), oracle.state_dict().values()):
        # One rounding at a kink of ReLU, which differs from CPU to CPU, grows to 1e-4 in six steps.
        close(actual, expected, atol=2e-4, rtol=1e-4)
    assert (opposite.features[0].weight - model.features[0].weight).abs().max() > 3e-3, "A matters"
    close(torch.tensor([[row["loss"], row["train_accuracy"]] for row in log]), expected_log, atol=1e-3)
    assert [row["lr"] for row in log] == pytest.approx([0.05, 0.005])


LINF = ["--norm", "linf", "--eps", "0.1", "--step-size", "0.05"]


@pytest.mark.parametrize("flags,n_A,gradients,trained_images", [
    ([], 0, 0, 128), ([], 43, 7, 128), (["--attack", "pgd-authors"], 43, 7, 128),
    (["--random-start"], 43, 7, 128), (["--attack", "fgsm-rs"], 43, 1, 128), (LINF, 43, 7, 128),
    ([*LINF, "--attack", "fgsm-rs"], 43, 1, 128), ([*LINF, "--attack", "pgd-authors"], 43, 7, 128),
    ([], 0, 0, 0)])  # frozen features only go forward
def test_only_A_is_attacked_and_costs_are_counted(flags, n_A, gradients, trained_images, monkeypatch):
    monkeypatch.setattr(attacks, "check", None)  # training must not look at its images: a GPU would wait
    model, examples = net() if trained_images else net().transfer(10), digits(128)
    A, seen = torch.arange(128) % 3 == (0 if n_A else 3), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]) if model.training else None)
    args = arguments("--augment", "none", "--epochs", "1", *flags)
    row, = [state["row"] for state in train.train(model, examples, A, 2.0, args, CPU)]
    for x, (clean, _, index) in zip(seen, training_batches(examples, 64, 0, 0, "none", "cpu"), strict=True):
        assert torch.equal(length(x - clean) > 0.2, A[index]), "in linf too, so outside of the ball of L2"
        assert torch.equal(length(x - clean) == 0, ~A[index])
        assert length(x - clean, args.norm).max() <= args.eps + 1e-6
    assert row["attacked"] == n_A
    assert row["forward"] == 128 + gradients * n_A
    assert row["backward"] == trained_images + gradients * n_A
    assert row["forward_equivalents"] == 128 + 2 * trained_images + 2 * gradients * n_A


@pytest.mark.parametrize("norm,eps", [("l2", 0.4), ("linf", 0.1)])
def test_every_epoch_redraws_A_and_every_step_draws_other_starts(norm, eps):
    examples, attacked, starts = digits(192), [], []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        args = arguments(*f"--order redrawn --attack fgsm-rs --norm {norm} --eps {eps} --seed {seed}".split())
        batches = list(train.epoch_batches(examples, torch.arange(192) < 48, 1.0, args, epoch, CPU))
        order = epoch_order(192, 64, seed, epoch)[0]
        attacked.append({i for batch, index in zip(batches, order) for i in index[batch[2]].tolist()})
        starts += [batch[5] for batch in batches]
    assert [len(examples) for examples in attacked] == [48] * 4
    assert len(attacked[0] & attacked[1]) < 24
    assert attacked[3] == attacked[0], "the same in a repeat"
    assert len(torch.cat(starts).flatten(1).unique(dim=0)) == 3 * 48
    assert 0.9 * eps < length(torch.cat(starts), norm).max() <= eps + 1e-6, "in the ball"


def test_logits_that_are_not_finite_stop_although_the_loss_is_finite():
    examples, model = digits(192), net(11)
    nn.init.constant_(model.head.bias[10:], -math.inf)  # of a class that never occurs: each loss is finite
    with pytest.raises(UserError, match="the logits are not finite in epoch 1: stopped"):
        list(train.train(model, examples, examples.y < 0, 1.0, arguments(), CPU))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A ranking and a CSAT run on the digits 0-4, its evaluation and its transfer to 5-9: their folder."""
    root = tmp_path_factory.mktemp("results")
    best, config = str(root / "digits0-4/run/best.pt"), str(HERE / "configs/transfer/digits5-9.yaml")
    sat.main(["--dataset", "digits0-4", *QUICK, "--split", "csat", "--size", "2", "--weight", "emphasis",
              "--results", str(root), "--run", "run"])
    evaluate.main([best])
    transfer.main([best, "--config", config, *QUICK, "--results", str(root)])
    return root


def test_scores_are_means_over_the_epochs_of_training_without_attacks(results):
    """Eq. 3 and A.2 from their definitions: the same training again, and the predictions of every epoch."""
    data, flags = load_dataset("digits0-4", "data"), ["--dataset", "digits0-4", "--results", str(results)]
    y, entropy, svar, gradient = data.train.y, 0, 0, []
    torch.manual_seed(0)
    model = models.build("preactresnet8", 5, *data.mean_std)
    for _ in train.train(model, data.train, y < 0, 1.0, arguments(*flags), CPU):
        x = data.train.pixels(torch.arange(len(y)), "cpu").requires_grad_()
        logits = model.eval()(x)
        gradient.append(torch.autograd.grad(logits[torch.arange(len(y)), y].sum(), x)[0])
        p = logits.detach().double().softmax(1)
        entropy = entropy - (p * p.clamp_min(1e-30).log()).sum(1) / 2
        svar = svar + torch.where(p.argmax(1) == y, -1, 1) * ((p - 0.2)**2).mean(1) / 2
    vog = torch.stack(gradient).std(0, unbiased=False).flatten(1).mean(1)
    scores = runs.load(*results.glob("digits0-4/rank-*/scores.pt"))
    for metric, expected in (("entropy", entropy), ("svar", svar), ("vog", vog)):
        close(scores[metric].double(), expected.double(), atol=1e-4, rtol=1e-3)
    csat, esat = (arguments(*flags, "--metric", "vog", "--split", split) for split in ("csat", "esat"))
    assert torch.equal(rank.scores_for(csat, data, CPU)[0], scores["vog"])
    for c in range(5):
        v, z = scores["vog"][y == c].double(), rank.scores_for(esat, data, CPU)[0][y == c]
        close(z, (v - v.mean()) / v.std(unbiased=False))
    assert rank.entropy(torch.tensor([[0.0, 0.0, -1e4]])).item() == pytest.approx(math.log(2)), "0 log 0 = 0"


def test_a_run_on_the_hardest_classes_its_evaluation_its_transfer_and_the_report(results):
    run, (transferred,) = results / "digits0-4/run", (results / "digits5-9").iterdir()
    (ranking,), y = (results / "digits0-4").glob("rank-*"), load_dataset("digits0-4", "data").train.y
    entropy = runs.load(ranking / "scores.pt")["entropy"].double()
    rows = runs.load(ranking / "rank.json")["classes_hardest_first"]
    means = {str(c): entropy[y == c].mean().item() for c in range(5)}
    hardest, result = sorted(means, key=means.get, reverse=True), runs.load(run / "result.json")
    assert [row["class"] for row in rows] == hardest
    assert [row["entropy"] for row in rows] == pytest.approx([means[c] for c in hardest], abs=1e-6)
    assert sorted(result["A_classes"]) == sorted(hardest[:2])
    assert result["A"] == sum(str(c) in hardest[:2] for c in y.tolist())
    assert result["w_A"] == subset.weight_A("emphasis", result["A"], len(y))
    evaluation, target = runs.load(*run.glob("eval-*.json")), runs.load(transferred / "result.json")
    for key in ("accuracy", "settings", "weights"):
        assert evaluation[key] == result[key]
    before, after = (runs.load(path / "best.pt")["model"] for path in (run, transferred))
    backbone = [k for k in before if not k.startswith("head")]
    assert not [k for k in backbone if not torch.equal(before[k], after[k])], "it is frozen"
    assert [tuple(after[f"head.{k}.weight"].shape) for k in (0, 2)] == [(64, 64), (5, 64)]
    assert target["A"] == 0
    assert [target["source"][k] for k in ("dataset", "run", "A")] == ["digits0-4", "run", result["A"]]
    report.main(["--results", str(results)])
    robust, low, high = (100 * target["accuracy"]["all"]["robust"][k] for k in ("accuracy", "low", "high"))
    for text in ("| hardest | 2 classes | 0.40 |", f"| 1 | {robust:.1f} [{low:.1f}, {high:.1f}] |",
                 "| digits0-4/run | best.pt | l2 eps 0.5 |"):
        assert text in (results / "tables.md").read_text()


def test_selection_takes_the_most_robust_then_cleanest_then_latest(tmp_path, monkeypatch):
    def autoattack_accuracy(model, data, index, settings, folder):
        epoch = next(epochs)
        indices[epoch], weights[epoch] = {*index.tolist()}, evaluate.weights_hash(model.state_dict())
        return *(torch.arange(len(index)) < n for n in accuracies.get(epoch, (1, 0))), []
    accuracies = {2: (5, 3), 3: (7, 4), 5: (6, 4), 6: (7, 4), 7: (8, 3)}  # {epoch: (clean, robust) of ten}
    epochs, indices, weights, folder = iter([*accuracies, "final"]), {}, {}, tmp_path / "digits0-4" / "run"
    monkeypatch.setattr(evaluate, "autoattack_accuracy", autoattack_accuracy)
    sat.main(["--dataset", "digits0-4", "--split", "none", *QUICK, "--epochs", "7", "--select-n", "10",
              "--lr-decays", "1", "2", "4", "5", "--results", str(tmp_path), "--run", "run"])
    result, best = runs.load(folder / "result.json"), runs.load(folder / "best.pt")
    selections = [row["epoch"] for row in runs.load(folder / "last.pt")["log"] if "selection" in row]
    assert selections == [2, 3, 5, 6, 7], "after decays, at the end"
    assert result["epoch"] == best["epoch"] == 6, "robust 4 three times, then clean 7 twice, then the later"
    assert evaluate.weights_hash(best["model"]) == weights[6] == weights["final"]
    assert not indices[2] & indices["final"]
    assert torch.backends.cpu.get_cpu_capability() in result["device"], "AVX2 and AVX512 round otherwise"


def trained_bits(*flags, n=136):
    """The weights after two epochs of SAT on some digits, as one vector, and the lines of the log."""
    args = arguments("--epochs", "2", "--lr-decays", "1", "--batch-size", "32", "--steps", "1", "--augment",
                     "full", *flags)
    torch.manual_seed(0)
    model, examples = net(), digits(n)
    A = (torch.arange(n) % 5 == 0) & (args.split != "none")
    rows = [state["row"] for state in train.train(model, examples, A, 3.0, args, CPU)]
    for row in rows:
        del row["seconds"], row["compile"]
    return torch.cat([tensor.double().flatten() for tensor in model.state_dict().values()]), rows


@pytest.mark.parametrize("flags", [
    [], ["--random-start"], ["--attack", "fgsm-rs"], ["--order", "redrawn"], ["--attack", "pgd-authors"]])
def test_padding_A_and_augmenting_batches_together_change_nothing(flags, monkeypatch):
    """Not a bit; but a convolution may round otherwise in a batch of another size, as A's with padding is."""
    weights, rows = trained_bits(*flags)
    for function, value in (("data.batches_together", 3), ("models.size_multiple", 16)):
        monkeypatch.setattr(function, lambda *a: value)
        other_weights, other_rows = trained_bits(*flags)
        close(other_weights, weights)
        assert [row["attacked"] for row in other_rows] == [row["attacked"] for row in rows]
        if function == "data.batches_together":
            assert torch.equal(other_weights, weights)
            assert other_rows == rows


@pytest.mark.parametrize("flags", [[], ["--random-start"], ["--split", "none"]])
def test_graphs_of_whole_steps_replay_the_plain_steps(flags, monkeypatch):
    """With a stub that records calls in place of kernels: a graph for each learning rate and size of A, from
    the third step of its kind on. What is recorded is done only when it is replayed."""
    def record(self, inputs):
        recorded.append((self.get_lr(), len(inputs[2])))
        return lambda: replayed.append(len(inputs[2])) or self.step(*inputs)
    weights, rows = trained_bits(*flags)
    recorded, replayed = [], []
    monkeypatch.setattr(models, "choose_compilation", lambda *a: "step")
    monkeypatch.setattr(models, "compiled", lambda function, *a: function)
    monkeypatch.setattr(models, "size_multiple", lambda *a: 16)
    monkeypatch.setattr(models.GraphedStep, "record", record)
    for name in ("Stream", "current_stream", "stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    other_weights, other_rows = trained_bits(*flags)
    assert torch.equal(other_weights, weights)
    assert other_rows == rows
    assert len(recorded) == len(set(recorded)), "each kind once"
    assert {size for _, size in recorded} == ({0} if "none" in flags else {16})
    assert [rate for rate, _ in recorded] == pytest.approx([0.1, 0.01])
    assert len(replayed) == 2 * 4 - 2 * len(recorded)


@pytest.mark.parametrize("mode,device,steps,count,compiler,expected", [
    ("auto", "cpu", 10**6, 1, True, "off"), ("auto", "cuda", 10**6, 1, True, "on"),
    ("auto", "cuda", 600, 1, True, "off"), ("auto", "cuda", 10**6, 1, False, "off"),
    ("off", "cuda", 10**6, 1, True, "off"), ("on", "cpu", 1, 1, True, "on"),
    ("step", "cpu", 1, 1, True, "on"), ("step", "cuda", 1, 1, True, "step"),
    ("step", "cuda", 1, 2, True, "on")])
def test_what_compile_comes_to(mode, device, steps, count, compiler, expected, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(count))
    monkeypatch.setattr(models, "can_compile", lambda device: compiler)
    assert models.choose_compilation(mode, torch.device(device), steps) == expected
    if mode == "step":
        assert models.choose_compilation(mode, torch.device(device), steps, "pgd-authors") == "on"


def short_training(device, compiled=False, amp="off", k=3, blocks=1):
    """Four steps of SAT with every k-th example in A: the change of all weights, and the line of the log."""
    torch.backends.cudnn.allow_tf32 = False  # as in common.set_up
    args = arguments("--epochs", "1", "--batch-size", "40", "--steps", "3", "--step-size", "0.5", "--eps",
                     "1.5", "--lr", "0.05", "--amp", amp, "--compile", "on" if compiled else "off")
    torch.manual_seed(0)
    features = models.preactresnet(1, (8, 8), blocks)
    model = models.Classifier(features, nn.Linear(8, 10), [0.3], [0.35]).to(device)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    examples, A = digits(160), torch.arange(160) % k == 0
    examples.x = examples.x.to(device)
    state, = train.train(model, examples, A, 2.0, args, torch.device(device))
    assert not [key for key in model.state_dict() if "_orig_mod" in key], "as of an uncompiled network"
    return (nn.utils.parameters_to_vector(model.parameters()).detach() - before).cpu(), state["row"]


@pytest.mark.parametrize("device,compiled,amp,alike", [
    pytest.param("cpu", True, "off", 0.9999, marks=pytest.mark.slow), ("cpu", False, "bf16", 0.97),
    *(pytest.param("cuda", *case, marks=GPU.marks)
      for case in ((True, "off", 0.9999), (False, "bf16", 0.97), (True, "bf16", 0.97)))])
def test_compiled_and_bf16_training_are_the_plain_one_to_rounding(device, compiled, amp, alike):
    """As float32 on a CPU does (on GPUs A is also padded), and not as training with hardly an attack."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    blocks = 0 if compiled and device == "cpu" else 1  # a CPU compiles for a minute more with one
    plain, plain_row = short_training("cpu", blocks=blocks)
    fast, fast_row = short_training(device, compiled, amp, blocks=blocks)
    other, _ = short_training("cpu", k=160, blocks=blocks)
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2) == compiled, "of network and attack"
    assert plain_row["attacked"] == fast_row["attacked"] == 54
    assert fast_row["loss"] == pytest.approx(plain_row["loss"], rel=0.02)
    assert F.cosine_similarity(fast, plain, dim=0) > alike > F.cosine_similarity(other, plain, dim=0)
    assert (fast.norm() / plain.norm()).item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("device", [GPU])
def test_no_step_waits_for_the_gpu(device, request):
    device, A = torch.device(device), torch.arange(256) % 2 == 0
    args, examples = arguments("--augment", "full", "--random-start"), digits(256)
    examples.x = examples.x.to(device)
    model, sums = net().to(device).train(), train.EpochSums(device)
    optimizer = models.sgd(model, 0.1, 0.0, device)
    attack = train.training_attack(model, A, 2.0, args, device)
    request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
    sums.reset()
    for x, y, a, w, w_sum, start, _ in train.epoch_batches(examples, A, 2.0, args, 0, device):
        with torch.autocast(device.type, torch.bfloat16):
            from_start = functools.partial(attack, start=start)
            loss, logits = train.sat_step(model, optimizer, x, y, a, w, from_start, w_sum)
        sums.add(loss, logits, y)
        torch.cuda.set_sync_debug_mode("error")  # from the second step on: the first one sets libraries up


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_the_attack_under_bf16_keeps_images_and_projection_in_float32(device):
    model, data = trained()
    x, y = data.test.pixels(torch.arange(64), "cpu"), data.test.y[:64]
    exact = attacks.pgd(model, x, y, eps=0.5, step_size=0.1)
    with torch.autocast(device, torch.bfloat16):
        x_adv = attacks.pgd(model.to(device), x.to(device), y.to(device), eps=0.5, step_size=0.1).cpu()
    model.cpu()
    delta = (x_adv - x).flatten(1)
    assert x_adv.dtype == torch.float32
    assert torch.equal(x_adv, x_adv.clamp(0, 1))
    assert delta.norm(dim=1).max() <= 0.5 + 1e-6, "a bfloat16 norm would miss the ball by 1e-3"
    assert F.cosine_similarity(delta, (exact - x).flatten(1)).mean() > 0.98
    clean, loss, exact_loss = (F.cross_entropy(model(z), y).item() for z in (x, x_adv, exact))
    assert loss - clean == pytest.approx(exact_loss - clean, rel=0.02)


@pytest.mark.parametrize("arch,parameters,flop", [
    ("preactresnet18", 11.17e6, 1.11e9), ("preactresnet18-authors", 21.33e6, 3.64e9)])
def test_networks_have_the_sizes_that_the_authors_and_the_field_report(arch, parameters, flop):
    from torch.utils.flop_counter import FlopCounterMode
    model = net(channels=3, arch=arch).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-3)
    assert counter.get_total_flops() == pytest.approx(flop, rel=1e-2)


def linear(weight=1.0, bias=0.0):
    """A network of two classes whose first logit is the sum of the pixels times `weight`, plus `bias`."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    nn.init.zeros_(model[1].weight)
    nn.init.constant_(model[1].weight[0], weight)
    model[1].bias.data = torch.tensor([bias, 0.0])
    return model


@pytest.mark.parametrize("side", [5, 9, 11, 12, 13, 14, 18, 19, 20, 24])
def test_sizes_that_square_does_not_take(side):
    """In L2 its tiles overrun some, which the package tells by a RuntimeError."""
    x, y = torch.full((2, 1, side, side), 0.5), torch.zeros(2, dtype=torch.int64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(side * side, 2))
    nn.init.zeros_(model[1].weight)
    model[1].bias.data = torch.tensor([1.0, 0.0])
    if side in (12, 14, 18, 19, 24):
        with pytest.raises(ValueError, match=f"^AutoAttack's square takes no images of {side}x{side} pixels"):
            attacks.autoattack(model, x, y, eps=0.5, attacks=["square"])
        with mock.patch.object(attacks, "square_takes", return_value=True), pytest.raises(RuntimeError):
            attacks.autoattack(model, x, y, eps=0.5, attacks=["square"])
    else:
        assert attacks.autoattack(model, x, y, eps=0.5, attacks=["square"])[1].all()


def test_modules_whose_train_and_eval_do_more_are_put_back():
    """As LoRA layers, which merge their weights in eval()."""
    class Merging(nn.Flatten):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)
    model = nn.Sequential(Merging(), nn.Dropout().eval(), nn.Linear(64, 2), Merging().eval())
    x, y = torch.full((2, 1, 8, 8), 0.5), torch.zeros(2, dtype=torch.int64)
    attacks.pgd(model, x, y, eps=0.5, step_size=0.1)
    assert [module.training for module in model] == [True, False, True, False]
    assert [model[0].merged, model[3].merged] == [False, True]


@pytest.mark.parametrize("norm,eps,step_size,warns", [
    ("l2", 0.5, 0.0, True), ("linf", 0.1, 0.3, True), ("linf", 0.0, 0.1, False), ("l2", 0.0, 0.0, False),
    ("l2", 0.5, 2.0, False), ("linf", 1.0, 2.0, False)])
def test_a_step_that_is_hardly_meant_is_warned_of(norm, eps, step_size, warns, recwarn):
    x, y = images(n_classes=2)
    attacks.pgd(linear(), x, y, eps=eps, norm=norm, step_size=step_size)
    messages = [str(warning.message) for warning in recwarn]
    assert [message.partition(":")[0] for message in messages] == [f"step_size = {step_size}"] * warns
    assert all(warning.filename == __file__ for warning in recwarn), "the line that called pgd"


@pytest.mark.parametrize("attack", ATTACKS)
def test_half_precision(attack):
    """Gradients and norms that half precision rounds to 0 made the images nan."""
    x, y = images(20, n_classes=2)
    for weight in (0.1, 2.0):  # unsure and sure: most gradients of the latter are 0 in half precision
        x_adv = attack(linear(weight).half(), x.half(), y, eps=0.5, start=0 * x.half())
        assert x_adv.dtype == torch.float16
        assert torch.equal(x_adv, x_adv.clamp(0, 1)), "not of nan"
        assert length((x_adv - x.half()).float()).max() < 0.505, "0.5, but for rounding"
        if weight == 0.1:
            close(x_adv.float(), attack(linear(weight), x, y, eps=0.5, start=0 * x), atol=2e-3)
    tiny = torch.full((1, 1, 8, 8), 2.0**-20, dtype=torch.float16)
    close(length(attacks.ascent(tiny, "l2").float()), torch.ones(1), atol=1e-3)
    close(length(attacks.project(300 * tiny.sign(), 0.5, "l2").float()), torch.tensor([0.5]), atol=1e-3)


def test_autoattack_takes_a_network_without_parameters():
    x, y = images()
    clean, _ = attacks.autoattack(nn.Flatten(), x, y, eps=0.1, attacks=["apgd-ce"])  # each pixel is a logit
    assert torch.equal(clean, x.flatten(1).argmax(1) == y)


@pytest.mark.parametrize("attack", attacks.STANDARD)
def test_logits_that_are_not_finite_are_refused_before_an_attack(attack):
    model, (x, _) = net(), images()
    model.head.bias.data[3] = math.nan  # which is the largest to argmax: every 3 is right
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        attacks.autoattack(model, x, torch.full((6,), 3), eps=0.1, attacks=[attack])


@pytest.mark.parametrize("factor,names,warnings", [
    (1000, ["apgd-ce"], 1), (1, ["apgd-ce"], 0), (1000, ["apgd-ce", "square"], 0)])
def test_a_saturated_softmax_is_named_once_if_cross_entropy_is_the_only_loss(factor, names, warnings, caplog):
    """At a linear network all of whose examples are right."""
    x, y = torch.rand(12, 1, 8, 8), torch.zeros(12, dtype=torch.int64)
    model = linear(weight=factor, bias=-factor * x.sum((1, 2, 3)).min().item() + 0.1 * factor)
    clean, _ = attacks.autoattack(model, x, y, eps=0.5, attacks=names, batch_size=4)
    assert clean.all()
    texts = [text for text in caplog.messages if "gradient masking" in text]
    assert len(texts) == warnings
    assert not warnings or "is 0 at 12 of the 12 right examples" in texts[0]


@pytest.mark.parametrize("attack", ["apgd-ce", "fab-t", "square"])
def test_autoattack_attacks_in_its_norm(attack):
    """A margin of 2, which falls by 6.4 in the ball of linf and by 0.8 in that of L2."""
    x, y = torch.full((4, 1, 8, 8), 0.5), torch.zeros(4, dtype=torch.int64)
    for norm, expected in (("l2", True), ("linf", False)):
        clean, robust = attacks.autoattack(linear(bias=-30), x, y, eps=0.1, norm=norm, attacks=[attack])
        assert clean.all()
        assert robust.tolist() == [expected] * 4


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A function that runs a script up to its training: (A, w_A, a hash of the first weights)."""
    def stop(model, examples, A, w_A, *rest):
        seen.append((A.tolist(), w_A, evaluate.weights_hash(model.state_dict())))
        raise KeyboardInterrupt

    def run(main, *words):
        with pytest.raises(KeyboardInterrupt):
            main([*words, "--results", str(tmp_path)])
        return seen[-1]
    seen = []
    for module in (rank, sat):  # sat.fit trains the head of a transfer
        monkeypatch.setattr(module, "train", stop)
    return run


def test_training_gets_the_weight_of_the_flags(started):
    ratio = 1167 / 130  # |B|/|A|
    for words, expected in (("", 1.0), ("--weight-factor 5", 5.0), ("--weight balanced", ratio),
                            ("--weight emphasis", (1 + 1300 / 1297) * ratio)):
        A, w_A, _ = started(sat.main, "--order", "random", "--frac", "0.1", *words.split())
        assert sum(A) == 130
        assert w_A == pytest.approx(expected)


def test_random_subsets_and_first_weights_depend_on_the_seed(started, results):
    best, config = results / "digits0-4/run/best.pt", HERE / "configs/transfer/digits5-9.yaml"
    for main, words, is_random in (
            (sat.main, "--split esat --size 100 --order random", True), (rank.main, "", False),
            (sat.main, "--split csat --size 4 --order random", True),
            (transfer.main, f"{best} --config {config}", False)):
        one, other, again = (started(main, *words.split(), "--seed", seed) for seed in ("1", "2", "1"))
        assert (one[0] != other[0]) == is_random
        assert one[2] != other[2]
        assert one == again


def test_class_errors_of_a_ranking_are_of_the_90_percent_and_count_what_is_wrong():
    model, data = net(), load_dataset("digits", "data")
    nn.init.constant_(model.head.bias[0], 100.0)  # it says 0 of every image
    scores = {"entropy": torch.rand(len(data.train))}
    rows = rank.tables_of(scores, model, data, CPU)["classes_hardest_first"]
    assert sum(row["n"] for row in rows) == 450
    assert {row["class"]: row["clean_error"] for row in rows} == {"0": 0.0, **dict.fromkeys("123456789", 1.0)}


def batch_norm(x, layer):
    """Batch norm in eval mode, by its definition."""
    mean, var, weight, bias = (t.view(1, -1, 1, 1) for t in (
        layer.running_mean, layer.running_var, layer.weight, layer.bias))
    return (x - mean) / (var + layer.eps).sqrt() * weight + bias


@pytest.mark.parametrize("c_out,stride,always", [(4, 1, False), (4, 1, True), (8, 2, False)])
def test_a_block_is_that_of_he_et_al(c_out, stride, always):
    """A convolution of the shortcut takes what the first convolution takes: bn1(x) after ReLU."""
    torch.manual_seed(0)
    block, x = models.PreActBlock(4, c_out, stride, always).eval(), torch.randn(3, 4, 8, 8)
    for layer in (block.bn1, block.bn2):
        for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias):
            nn.init.uniform_(t, 0.5, 2.0)
    out = batch_norm(x, block.bn1).clamp_min(0)
    residual = F.conv2d(out, block.conv1.weight, stride=stride, padding=1)
    residual = F.conv2d(batch_norm(residual, block.bn2).clamp_min(0), block.conv2.weight, padding=1)
    is_identity = c_out == 4 and not always
    shortcut = x if is_identity else F.conv2d(out, block.shortcut.weight, stride=stride)
    close(block(x.clone()), residual + shortcut, atol=1e-4)


def test_a_classifier_divides_by_std_and_a_transferred_head_has_one_hidden_layer():
    (x, _), (mean, std) = images(channels=2), ([0.2, 0.5], [0.25, 4.0])
    model = models.Classifier(nn.Sequential(nn.Flatten()), nn.Linear(128, 10), mean, std)
    normalised = torch.cat([(x[:, :1] - 0.2) / 0.25, (x[:, 1:] - 0.5) / 4], 1).flatten(1)
    close(model(x), normalised @ model.head.weight.T + model.head.bias)
    hidden, _, last = model.transfer(3).head
    features = (normalised @ hidden.weight.T + hidden.bias).clamp_min(0)
    close(model(x), features @ last.weight.T + last.bias)


def test_people_see_the_progress_of_a_resumed_evaluation_and_each_kind_of_warning_once(capsys, caplog):
    log, (x, y) = logging.getLogger("auto-attack"), images()
    with evaluate.Watch(["apgd-ce"], 20) as watch:
        watch.count({"right": torch.zeros(2, 10), "warnings": ["3 points"]}, is_new=False)
        attacks.autoattack(net(), x, y, eps=0.1, attacks=["apgd-ce"])
        for text in ("5 points", "other", "other"):
            log.warning(text)
        watch.start_time = time.perf_counter() - 30  # half a minute of attacks on five examples
        watch.count({"right": torch.zeros(2, 5), "warnings": watch.new_warnings}, is_new=True)
    log.warning("afterwards")
    assert [record.message for record in caplog.records] == ["afterwards"], "the logger is as before"
    assert [*watch.warnings.values()] == ["3 points", "other"], "as in an evaluation that was not stopped"
    assert watch.new_warnings == [], "those of a saved chunk belong to no other"
    out = capsys.readouterr().out
    assert out.startswith("AutoAttack warns: 3 points\n")
    assert out.count("AutoAttack warns") == 2
    assert re.search(r"AutoAttack, batch from example 11 of 20: \d+\.\d % robust after APGD-CE\n", out)
    assert "15 of 20 examples done, 0.0% robust; 30 s left" in out


def test_a_step_of_another_process_that_is_not_finite_stops_all(monkeypatch):
    monkeypatch.setattr(train, "all_reduce", lambda tensor: tensor + torch.nan)  # the sum with its nan
    sums = train.EpochSums(CPU)
    sums.reset()
    with pytest.raises(UserError, match="not finite in epoch 1: stopped"):
        sums.row(0, net(), arguments())


def test_costs_are_summed_over_the_epochs(results):
    """Two epochs of ten batches of 64. VoG takes two passes an example, forward and back to the pixels."""
    run, n = results / "digits0-4/run", len(load_dataset("digits0-4", "data").train)
    cost, log = runs.load(run / "result.json")["cost"], runs.load(run / "last.pt")["log"]
    assert cost["attacked"] == sum(row["attacked"] for row in log) > log[0]["attacked"]
    assert cost["forward_equivalents"] == 3 * 2 * 640 + 2 * 7 * cost["attacked"]
    assert runs.load(*results.glob("digits0-4/rank-*/rank.json"))["cost"] == 3 * 2 * 640 + 2 * 2 * n


def test_scores_pt_in_a_file_choose_what_the_ranking_chooses(results):
    """By vog too, which is normalised within each class."""
    data, (path,) = load_dataset("digits0-4", "data"), results.glob("digits0-4/rank-*/scores.pt")
    words = ["--dataset", "digits0-4", "--results", str(results), "--metric", "vog", "--size", "100"]
    args, by_file = arguments(*words), arguments(*words, "--scores", str(path))
    A, _ = sat.choose_subset(by_file, data, sat.read_file_of_A(by_file), CPU)
    assert torch.equal(A, sat.choose_subset(args, data, {}, CPU)[0])


def less_exact(model, x):
    """A context in which the network misjudges all near x[::4], and what is near x[1::4] but moved."""
    def forward(images):
        distance = (images[:, None] - x).flatten(2).norm(dim=2)
        distance[:, 1::4][distance[:, 1::4] < 0.05] = 1
        wrong = (distance.view(len(images), -1, 4)[:, :, :2] < 0.3).any(2).any(1)
        logits = exact(images)
        return torch.where(wrong[:, None], logits.roll(1, 1), logits)
    exact = model.forward
    return mock.patch.object(model, "forward", forward)


@pytest.mark.parametrize("names", [["apgd-ce"], ["apgd-ce", "square"]])
def test_what_a_less_exact_attack_breaks_is_checked_and_attacked_again(names, short_autoattack):
    model, data = trained()
    x, y = data.test.pixels(torch.arange(40), "cpu"), data.test.y[:40]
    attack = functools.partial(attacks.autoattack, model, x, y, eps=0.25, attacks=names)
    clean, robust = attack(batch_size=40)
    entered = []

    def context(changes):
        entered.append(changes)
        return less_exact(model, x) if changes else contextlib.nullcontext()
    for changes in (False, True):
        less_clean, less_robust = attack(batch_size=40, precision=lambda: context(changes))
        assert torch.equal(less_clean, clean), "clean accuracy is not of the context"
        assert torch.equal(less_robust, robust), "all that it misjudges is attacked again"
    assert entered == [False, True], "the second attack is not in the context"
    for misjudged in (robust[::4], robust[1::4]):
        assert misjudged.sum() > 3, "without the check they would be counted as broken"


@pytest.mark.parametrize("gpu", [False, True])
def test_evaluation_has_settings_of_its_own_among_them_tf32_on_gpus_alone(gpu, monkeypatch, capsys):
    def settings(*words, prefix="eval"):
        args = arguments("--select-attacks", "square", "--select-n", "5", "--eval-n", "6", *words)
        return evaluate.eval_settings(args, list(range(10)), prefix)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    plain, tf32 = settings(), ["--eval-precision", "tf32"]
    assert (plain["attacks"], plain["n"]) == (["apgd-ce"], 6)
    assert "precision" not in plain, "as in the results that are there"
    assert settings("--eval-precision", "float32") == plain
    assert settings(*tf32, prefix="select") == {**plain, "attacks": ["square"], "n": 5}
    assert settings(*tf32) == ({**plain, "precision": "tf32"} if gpu else plain)
    notes = capsys.readouterr().out.count("note: --eval-precision tf32 has no effect on a CPU")
    assert notes == (0 if gpu else 1)


@pytest.mark.parametrize("precision", [{}, {"precision": "tf32"}])
def test_an_evaluation_attacks_as_its_settings_say(precision, tmp_path, monkeypatch):
    """TF32 is on during the attack alone."""
    def attack_batch(model, x, y, precision, **arguments):
        assert arguments == settings
        assert (precision is contextlib.nullcontext) == (not is_tf32)
        with precision():
            assert torch.backends.cudnn.allow_tf32 == is_tf32
        assert not torch.backends.cudnn.allow_tf32
        return y >= 0, y >= 0
    settings, is_tf32 = {"norm": "linf", "eps": 0.1, "attacks": ["square"], "seed": 7}, bool(precision)
    monkeypatch.setattr(attacks, "attack_batch", attack_batch)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as common.set_up does on a GPU
    all_settings = {**settings, **precision, "n": 4, "batch_size": 4}
    data = load_dataset("digits", "data")
    assert evaluate.autoattack_accuracy(net(), data, torch.arange(4), all_settings, tmp_path)[1].all()


def test_results_from_before_a_flag_are_in_the_group_of_those_without_it(results):
    path = next(results.glob("**/result.json"))
    result = runs.load(path)
    setting = Run(path, result).setting
    assert "eval_precision" not in setting
    before = {k: v for k, v in result["args"].items() if k != "eval_precision"}
    assert Run(path, {**result, "args": before}).setting == setting
    tf32 = {**result["settings"], "precision": "tf32"}
    assert Run(path, {**result, "settings": tf32}).setting == {**setting, "eval_precision": "tf32"}
    args = arguments()
    assert not runs.flag_differences({k: v for k, v in runs.identity(args).items() if k != "eval_precision"},
                                     args)


@pytest.mark.parametrize("arch", ["preactresnet8", "resnet50"])
def test_a_network_in_the_default_format_computes_in_it(arch):
    model, x, seen = net(channels=3, arch=arch).eval(), torch.rand(2, 3, 32, 32), []
    copy = evaluate.in_default_format(model)
    for module in copy.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, out: seen.append(out.is_contiguous()))
    close(copy(x), model(x))
    assert seen.count(True) == len(seen) > 8
    assert all(p.stride() == torch.empty(p.shape).stride() for p in copy.parameters())
    assert any(p.stride() != torch.empty(p.shape).stride() for p in model.parameters()), "that is unchanged"


X, Y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
LINEAR = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))


def test_autoattack_leaves_torchs_random_numbers_alone():
    """The package seeds torch: a training of one's own would see the same order after each evaluation."""
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    attacks.autoattack(LINEAR, X, LINEAR(X).argmax(1), eps=0.1, attacks=["apgd-ce"])
    assert torch.equal(torch.rand(3), expected)


def test_numbers_and_starts_of_other_types():
    start = torch.full_like(X, 0.01, dtype=torch.float64).requires_grad_()
    x_adv = attacks.pgd(LINEAR, X, Y, eps=np.float32(0.5), step_size=0.1, steps=np.int64(0), start=start)
    assert not x_adv.requires_grad
    assert torch.equal(x_adv, (X + 0.01).clamp(0, 1))


class Margin(nn.Module):
    """Logits that differ by `margin`, and hardly depend on the image."""

    def __init__(self, margin):
        super().__init__()
        self.margin = margin

    def forward(self, x):
        z = self.margin + 0.01 * x.mean((1, 2, 3))
        return torch.stack([z, -z], 1) / 2


@pytest.mark.parametrize("margin,masked", [(5.0, False), (40.0, True)])
def test_gradients_too_small_for_a_step_are_masked(margin, masked):
    assert attacks.has_zero_gradient(Margin(margin), X, Y).tolist() == [masked] * 4


def test_resnet50_takes_images_of_three_channels():
    with pytest.raises(UserError, match="3 channels, not of 1"):
        models.build("resnet50", 10, [0.5], [0.5])


def test_watch_gives_the_logger_its_level_back():
    log = logging.getLogger("auto-attack")
    log.setLevel(logging.WARNING)
    with evaluate.Watch(["square"], 10):
        pass
    assert log.level == logging.WARNING


def test_a_class_without_examples_has_no_mean_score():
    with pytest.raises(UserError, match="d has no training example"):
        subset.choose_A("csat", torch.tensor([0, 1, 2]), list("abcd"), amount=1, scores=torch.rand(3))


def test_amounts_of_numpy_and_torch():
    for amount in (np.int64(5), torch.tensor(5), np.float32(0.25), torch.tensor(0.25)):
        assert subset.subset_size(amount, 20) == 5
