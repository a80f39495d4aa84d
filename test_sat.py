"""The method against oracles that are written out here: attacks, Eq. 2, subsets, scores, selection.

    python -m pytest -q test_sat.py
"""
import functools
import json
import logging
import math

import pyautoattack
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import attacks
import evaluate
import models
import rank
import runs
import sat
import subset
import train
import transfer
from common import UserError
from conftest import (CPU, HERE, QUICK, arguments, digits, every, images, log_of, net,
                      trained)  # noqa: F401 (a fixture)
from data import Split, epoch_order, load_dataset, training_batches

close = functools.partial(torch.testing.assert_close, atol=2e-5, rtol=0)


@pytest.fixture(scope="module", autouse=True)
def short_autoattack():
    """In this file AutoAttack has fewer iterations, to be quick."""
    set_version = pyautoattack.AutoAttack._set_version

    def set_shorter(self, version):
        set_version(self, version)
        self.square.n_queries = 100
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyautoattack.AutoAttack, "_set_version", set_shorter)
        yield


def length(delta, norm="l2"):
    """The length of each perturbation in its norm: (N, C, H, W) -> (N,)."""
    return delta.flatten(1).norm(dim=1) if norm == "l2" else delta.flatten(1).abs().amax(1)


# --- attacks ------------------------------------------------------------------------------------------------

def oracle_pgd(model, x, y, eps, step, steps, norm="l2", start=0.0):
    """The inner maximisation of Eq. 1 from delta = `start` in each pixel, one example at a time, written from
    the definition."""
    def inside(x_i, delta):
        """The nearest point of the ball, then of the box."""
        delta = delta.clamp(-eps, eps) if norm == "linf" else delta * min(1, eps / (delta.norm() + 1e-12))
        return (x_i + delta).clamp(0, 1) - x_i
    out = []
    for x_i, y_i in zip(x, y):
        delta = inside(x_i, torch.full_like(x_i, start))
        for _ in range(steps):
            z = (x_i + delta).clone().requires_grad_()
            g = torch.autograd.grad(-model(z[None]).log_softmax(1)[0, y_i], z)[0]
            delta = inside(x_i, delta + step * (g.sign() if norm == "linf" else g / (g.norm() + 1e-12)))
        out.append(x_i + delta)
    return torch.stack(out)


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


def run_attack(kind, model, x, y, eps, norm="l2"):
    """One of the training attacks; pgd-random is pgd from a random start."""
    if kind == "fgsm-rs":
        return attacks.fgsm_rs(model, x, y, eps=eps, norm=norm)
    if kind == "pgd-authors":
        return attacks.pgd_authors(model, x, y, eps=eps, step_size=eps / 2, norm=norm)
    start = attacks.random_start(x, eps, norm) if kind == "pgd-random" else None
    return attacks.pgd(model, x, y, eps=eps, step_size=eps / 2, norm=norm, start=start)


@pytest.mark.parametrize("norm,eps", [("l2", 0.5), ("linf", 0.1)])
@pytest.mark.parametrize("kind", ["pgd", "pgd-random", "fgsm-rs", "pgd-authors"])
def test_ball_and_box(norm, eps, kind):
    model, (x, y) = net(), images(20)
    x_adv = run_attack(kind, model, x, y, eps, norm)
    assert torch.equal(x_adv, x_adv.clamp(0, 1))
    assert length(x_adv - x, norm).max() <= eps + 1e-6
    assert length(x_adv - x, norm).min() > 0.1 * eps, "every example moves"
    assert not x_adv.requires_grad
    assert F.cross_entropy(model.eval()(x_adv), y) > F.cross_entropy(model(x), y)
    assert torch.equal(run_attack(kind, model, x, y, 0.0, norm), x), "eps = 0"
    assert run_attack(kind, model, x[:0], y[:0], eps, norm).shape == (0, 1, 8, 8), "an empty batch"
    if kind in ("pgd", "pgd-authors"):  # without random numbers
        close(run_attack(kind, model, x[2:5], y[2:5], eps, norm), x_adv[2:5])


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


def test_the_authors_attack_stops_by_the_weights_of_eq_2(monkeypatch):
    """With one class of ten and w_A = |B|/|A| = 9 the authors' weight of A is 5. Their limit of 10 for the
    weighted loss is then 2 for the mean cross-entropy."""
    attack = train.training_attack(net(), every(10, 160), 9.0, arguments("--attack", "pgd-authors"), CPU)
    assert attack.keywords["limit"] == pytest.approx(2.0)


def test_random_start_is_uniform_in_the_ball():
    x, g = torch.zeros(4000, 1, 2, 2), torch.Generator().manual_seed(0)
    radius = length(attacks.random_start(x, 2.0, "l2", g)) / 2
    assert (radius**4).mean().item() == pytest.approx(0.5, abs=0.02), "in 4 dimensions r^4 is uniform"
    delta = attacks.random_start(x, 0.3, "linf", g)
    assert delta.abs().max() <= 0.3
    assert delta.mean().item() == pytest.approx(0, abs=0.01)
    assert delta.std().item() == pytest.approx(0.3 / math.sqrt(3), abs=0.01)


@pytest.mark.parametrize("kind", ["pgd", "pgd-authors", "fgsm-rs", "autoattack"])
def test_attacks_leave_the_model_as_it_was(kind):
    model, (x, y) = net().train(), images()
    model.features[1].bn1.eval()  # a mixture of modes must come back as a mixture
    model.head.bias.requires_grad_(False)
    F.cross_entropy(model(x), y).backward()

    def everything():
        """All that an attack could change, batch-norm statistics included."""
        return [*(value.tolist() for value in model.state_dict().values()),
                *((p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in model.parameters()),
                *(module.training for module in model.modules())]
    before = everything()
    if kind == "autoattack":
        attacks.autoattack(model, x, y, eps=0.3, attacks=["apgd-ce", "fab-t"])
    else:
        run_attack(kind, model, x, y, 0.5)
    assert everything() == before


def test_autoattack_agrees_with_the_package(trained):  # noqa: F811
    model, data = trained
    x, y = data.test.pixels(torch.arange(12), "cpu"), data.test.y[:12]
    clean, robust = attacks.autoattack(model, x, y, eps=0.25, batch_size=12, seed=3)
    package = pyautoattack.AutoAttack(model, norm="L2", eps=0.25, version="standard", seed=3)
    x_adv, _ = package.run_standard_evaluation(x, y, batch_size=12)
    with torch.no_grad():
        assert clean.tolist() == (model(x).argmax(1) == y).tolist()
        assert robust.tolist() == (model(x_adv).argmax(1) == y).tolist()
    assert 0 < robust.sum() < clean.sum(), "all three kinds occur, or this test says little"


def test_autoattack_goes_on_after_the_chunks_that_are_there(trained, tmp_path, monkeypatch):  # noqa: F811
    (model, data), attack_batch, index, calls = trained, attacks.attack_batch, torch.arange(20), []
    settings = {"norm": "l2", "eps": 0.25, "attacks": ["apgd-ce"], "n": 20, "batch_size": 6, "seed": 0}

    def watched(model, x, *args, **settings):
        calls.append((len(x), settings["seed"]))
        return attack_batch(model, x, *args, **settings)

    def evaluated(**changes):
        """Clean and robust, (2, n), by the evaluation with other settings."""
        changed = {**settings, **changes}
        return torch.stack(evaluate.autoattack_accuracy(model, data, index, changed, tmp_path))
    monkeypatch.setattr(attacks, "attack_batch", watched)
    x, y = data.test.pixels(index, "cpu"), data.test.y[index]
    whole = torch.stack(attacks.autoattack(model, x, y, eps=0.25, attacks=["apgd-ce"], batch_size=6))
    assert calls == [(6, 0), (6, 1), (6, 2), (2, 3)], "each batch has a seed of its own"
    assert torch.equal(evaluated(), whole)
    assert calls[4:] == calls[:4]
    next(tmp_path.glob("*/chunk00002.pt")).unlink()
    assert torch.equal(evaluated(), whole)
    assert calls[8:] == [(6, 2)], "only the chunk that is missing"
    evaluated(eps=0.2, seed=5)
    assert calls[9:] == [(6, 5), (6, 6), (6, 7), (2, 8)], "other settings share nothing"


@pytest.mark.parametrize("n_classes,expected", [
    (2, ["apgd-ce", "fab-t", "square"]), (3, ["apgd-ce", "fab-t", "square"]), (5, list(attacks.STANDARD))])
def test_autoattack_with_fewer_than_ten_classes(n_classes, expected, caplog):
    assert attacks.usable_attacks(attacks.STANDARD, n_classes) == expected
    model, (x, y) = net(n_classes).eval(), images(4, n_classes=n_classes)
    clean, _ = attacks.autoattack(model, x, y, eps=0.1)
    assert torch.equal(clean, model(x).argmax(1) == y)
    assert "target classes" not in caplog.text
    assert "DLR" not in caplog.text


def test_autoattack_refuses_logits_that_are_not_finite_and_labels_that_are_no_classes():
    model, (x, y) = net(), images()
    with pytest.raises(ValueError, match="labels 10 to 10 on 10 classes"):
        attacks.autoattack(model, x, torch.full_like(y, 10), eps=0.1, attacks=["apgd-ce"])
    nn.init.constant_(model.head.bias, math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        attacks.autoattack(model, x, y, eps=0.1, attacks=["apgd-ce"])


@pytest.mark.parametrize("result,message", [
    (lambda x, y: (x, y), "leaves 6 of 6 right, more than the 5 that were right"),
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


def test_autoattacks_progress_and_warnings_are_printed_once(capsys, caplog):
    model, (x, y) = net(), images()
    model.head = nn.Sequential(model.head, nn.Softmax(1))  # of which AutoAttack warns
    with evaluate.Watch(tqdm(total=6, disable=True)):
        attacks.autoattack(model, x, y, eps=0.1, attacks=["apgd-ce"], batch_size=2)
        for text in ("3 points with zero gradient", "5 points with zero gradient", "other"):
            logging.getLogger("auto-attack").warning(text)
    printed = capsys.readouterr().out
    assert printed.count("probability distribution") == 1
    assert "this batch after APGD-CE: 50.0 % robust" in printed
    assert printed.endswith("AutoAttack warns: 3 points with zero gradient\nAutoAttack warns: other\n")
    assert not caplog.text
    logging.getLogger("auto-attack").warning("afterwards")
    assert "afterwards" in caplog.text, "the logger is as before"


# --- the subset and its weights -----------------------------------------------------------------------------

def chosen(split, **options):
    """The indices of A among seven examples. Class a has the highest sum of scores, c the highest mean."""
    y, scores = torch.tensor([0, 1, 2, 0, 1, 2, 0]), torch.tensor([0.7, 0.1, 0.9, 0.7, 0.2, 0.9, 0.7])
    A = subset.choose_A(split, y, ["a", "b", "c"], scores=scores, **options)
    return "".join(str(i) for i in range(7) if A[i])


@pytest.mark.parametrize("split,options,expected", [
    ("none", {}, ""), ("full", {}, "0123456"),
    ("esat", {"amount": 3}, "025"),                      # of three equal scores the lowest index
    ("esat", {"amount": 3, "order": "easiest"}, "014"),  # ties by index here too
    ("esat", {"amount": 5}, "02356"), ("esat", {"amount": 1.0}, "0123456"),
    ("esat", {"amount": 0.5}, "0235"),                   # round(3.5) = 4
    ("csat", {"amount": 0.5}, "02356"),                  # round(1.5) = 2 classes: c, then a
    ("csat", {"amount": 1}, "25"), ("csat", {"amount": 1, "order": "easiest"}, "14"),
    ("csat", {"names": ["b", "a"]}, "01346")])
def test_choose_A(split, options, expected, capsys):
    assert chosen(split, **options) == expected
    n = len({*"036"} & {*expected})  # of the three equal ones
    note = f"note: 3 examples share the score at the edge of A; of these the first {n}, by index, are in A\n"
    assert capsys.readouterr().out == (note if n in (1, 2) else "")


def test_random_A_is_drawn_by_its_seed_and_spread_over_the_batches():
    draws = [chosen("csat", amount=1, order="random", seed=seed) for seed in range(20)]
    assert {*draws} == {"036", "14", "25"}, "whole classes, each of them for some seed"
    assert draws == [chosen("csat", amount=1, order="random", seed=seed) for seed in range(20)]
    for seed in range(3):  # the permutation that picks A must not be the one that deals the first batches
        A = subset.choose_A("esat", torch.zeros(1280), [], amount=0.5, order="random", seed=seed)
        assert A.sum() == 640
        shares = A[epoch_order(1280, 64, seed, 0)[0]].float().mean(1)
        assert 0.25 < shares.min() <= shares.max() < 0.75


@pytest.mark.parametrize("kind,n_A,expected", [
    ("vanilla", 10, 1), ("balanced", 20, 4), (3.5, 10, 3.5),
    ("emphasis", 10, 2 * 90 / 10), ("emphasis", 90, 10 * 10 / 90),  # 2 |B|/|A| and 10 |B|/|A| (Sec. 4.3)
    *((kind, n_A, 1) for kind in ("balanced", "emphasis", 7.0) for n_A in (0, 100))])
def test_weights_of_the_paper(kind, n_A, expected):
    assert subset.weight_A(kind, n_A, 100) == pytest.approx(expected)


# --- Eq. 2 and training on it -------------------------------------------------------------------------------

def test_sat_loss_by_hand():
    logits, y = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]), torch.tensor([0, 0])
    w, expected = torch.tensor([4.0, 1.0]), (4 * math.log(2) + 1 * math.log(4 / 3)) / 5
    assert train.sat_loss(logits, y, w).item() == pytest.approx(expected)
    assert train.sat_loss(logits, y, 100 * w).item() == pytest.approx(expected), "no other learning rate"
    assert train.sat_loss(logits, y, w, w_sum=2.5).item() == pytest.approx(2 * expected)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_batches_of_an_epoch(processes, monkeypatch):
    """The parts of one, two and three processes, against one loop over the batches."""
    args = arguments("--batch-size", "8", "--augment", "none", "--random-start")
    split, A, order = digits(40), every(7, 40), epoch_order(40, 8, args.seed, 1)[0]
    whole, parts = list(train.epoch_batches(split, A, 5.0, args, 1, CPU)), []
    logits = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    for process in range(processes):
        monkeypatch.setenv("RANK", str(process))
        parts.append(list(train.epoch_batches(split, A, 5.0, args, 1, CPU)))
    for index, batch, *batches in zip(order, whole, *parts, strict=True):
        x, y, positions, w, w_sums, starts = zip(*batches)
        assert torch.equal(torch.cat(x), split.pixels(index, "cpu"))
        assert torch.equal(torch.cat(y), split.y[index])
        assert torch.cat(w).tolist() == [5.0 if A[i] else 1.0 for i in index]
        assert torch.equal(torch.cat(starts), batch[5]), "drawn for the whole batch"
        for part, a in zip(index.tensor_split(processes), positions):
            assert a.tolist() == [i for i, example in enumerate(part) if A[example]]
        losses = map(train.sat_loss, logits.tensor_split(processes), y, w, w_sums)
        expected = train.sat_loss(logits, split.y[index], torch.cat(w))
        close(sum(losses) / processes, expected, atol=1e-6)  # DistributedDataParallel averages
    assert processes == 1 or 0 in [len(batch[2]) for part in parts for batch in part], "a part without A"


@pytest.mark.parametrize("factor", [1, 100])
def test_a_step_on_a_notebooks_own_tensors(factor):
    """README's example: Eq. 2 on a network, a batch and a subset of one's own, against autograd on the loss
    written out. Weights of another size are no other learning rate."""
    model, oracle = (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10)) for _ in range(2))
    oracle.load_state_dict(model.state_dict())
    (x, _), y, a = images(8), torch.arange(8), torch.tensor([2, 5])
    w, x_adv, before = torch.tensor([1.0, 1, 3, 1, 1, 3, 1, 1]), x.clone(), x.clone()
    x_adv[2], x_adv[5] = oracle_pgd(oracle, x[[2, 5]], y[[2, 5]], 0.5, 0.1, 7)
    attack = functools.partial(attacks.pgd, model, eps=0.5, step_size=0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss, logits = train.sat_step(model, optimizer, x, y, a, factor * w, attack)
    expected_logits = oracle(x_adv)
    expected = (w * F.cross_entropy(expected_logits, y, reduction="none")).sum() / 12
    expected.backward()
    close(loss, expected.detach())
    close(logits, expected_logits.detach())
    assert torch.equal(x, before), "the caller's images are not changed"
    for p, q in zip(model.parameters(), oracle.parameters()):
        close(p, q - 0.1 * q.grad)


def oracle_training(model, split, args, attacked):
    """Ordinary training, or AT by Madry et al., as one would write it: no subsets, no weights."""
    optimizer = torch.optim.SGD(model.parameters(), args.lr, 0.9, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, args.lr_decays)
    for epoch in range(args.epochs):
        for x, y, _ in training_batches(split, args.batch_size, args.seed, epoch, args.augment, "cpu"):
            if attacked:
                x = oracle_pgd(model.eval(), x, y, args.eps, args.step_size, args.steps)
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x), y).backward()
            optimizer.step()
        schedule.step()


@pytest.mark.parametrize("everything", [False, True])
def test_empty_A_is_ordinary_training_and_full_A_is_AT(everything):
    args = arguments("--batch-size", "32", "--lr", "0.05", "--lr-decays", "1", "--steps", "3")
    split, model, oracle, opposite = digits(96), net().eval(), net(), net()
    log = log_of(model, split, torch.full((96,), everything), 9.0, args)
    oracle_training(oracle, split, args, attacked=everything)
    oracle_training(opposite, split, args, attacked=not everything)
    for actual, expected in zip(model.state_dict().values(), oracle.state_dict().values()):
        # One rounding at a kink of ReLU, which differs from CPU to CPU, grows to 1e-4 in six steps.
        close(actual, expected, atol=2e-4, rtol=1e-4)
    assert (opposite.features[0].weight - model.features[0].weight).abs().max() > 3e-3, "AT is different"
    assert (model.head.weight - net().head.weight).abs().max() > 1e-2, "it did train"
    assert [row["lr"] for row in log] == pytest.approx([0.05, 0.005])


def test_train_uses_w_A():
    """One SGD step with weights, against autograd on the weighted loss written out."""
    args = arguments("--epochs", "1", "--eps", "0", "--augment", "none", "--weight-decay", "0")
    split, A, model, oracle = digits(64), every(4, 64), net(), net().train()
    row, = log_of(model, split, A, 5.0, args)
    (x, y, index), = training_batches(split, 64, 0, 0, "none", "cpu")  # in this order: another would round
    logits = oracle(x)
    losses = F.cross_entropy(logits, y, reduction="none")
    loss = (5 * losses[A[index]].sum() + losses[~A[index]].sum()) / (5 * 16 + 48)
    loss.backward()
    for p, q in zip(model.parameters(), oracle.parameters()):
        close(p, q - args.lr * q.grad, atol=1e-5, rtol=1e-4)
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["train_accuracy"] == (logits.argmax(1) == y).float().mean().item()


@pytest.mark.parametrize("flags,n_A,gradients,trained_images", [
    ([], 0, 0, 128), ([], 43, 7, 128), (["--attack", "pgd-authors"], 43, 7, 128),
    (["--random-start"], 43, 7, 128), (["--attack", "fgsm-rs"], 43, 1, 128),
    ([], 0, 0, 0)])  # frozen features only go forward
def test_only_A_is_attacked_and_costs_are_counted(flags, n_A, gradients, trained_images, monkeypatch):
    def check(*args, **settings):
        raise AssertionError("training must not look at its images: a GPU would wait")
    monkeypatch.setattr(attacks, "check", check)
    model, split, A, seen = net(), digits(128), every(3, 128) & (n_A > 0), []
    model = model if trained_images else model.transfer(10)
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]) if model.training else None)
    row, = log_of(model, split, A, 2.0, arguments("--augment", "none", "--epochs", "1", *flags))
    for x, (clean, _, index) in zip(seen, training_batches(split, 64, 0, 0, "none", "cpu"), strict=True):
        assert torch.equal(length(x - clean) > 0.05, A[index])
        assert torch.equal(length(x - clean) == 0, ~A[index])
    assert row["attacked"] == n_A
    assert row["forward"] == 128 + gradients * n_A
    assert row["forward_equivalents"] == 128 + 2 * trained_images + 2 * gradients * n_A


def test_redrawn_attacks_other_examples_every_epoch():
    """The control at equal cost: as many examples as a fixed random A, the same in a repeat."""
    split, args = digits(192), arguments("--order", "redrawn", "--augment", "none")

    def attacked(epoch):
        """The examples that are attacked in an epoch."""
        batches = train.epoch_batches(split, every(4, 192), 1.0, args, epoch, CPU)
        order = epoch_order(192, 64, 0, epoch)[0]
        return {i for batch, index in zip(batches, order) for i in index[batch[2]].tolist()}
    first, second = attacked(0), attacked(1)
    assert len(first) == len(second) == 48
    assert len(first & second) < 24
    assert attacked(0) == first


@pytest.mark.parametrize("flags", [["--random-start"], ["--attack", "fgsm-rs"]])
def test_every_step_draws_random_starts_of_its_own(flags):
    def starts(seed):
        """The starts of three steps in each of two epochs."""
        args = arguments(*flags, "--seed", str(seed), "--eps", "0.4")
        return [batch[5] for epoch in (0, 1)
                for batch in train.epoch_batches(digits(192), every(1, 192), 1.0, args, epoch, CPU)]
    draws = torch.stack(starts(0) + starts(1))
    assert len(draws.flatten(1).unique(dim=0)) == 12
    assert torch.equal(torch.stack(starts(1)), draws[6:]), "the same in a repeat"
    assert 0.35 < length(draws.flatten(0, 1)).max() <= 0.4 + 1e-6, "in the ball"


def test_logits_that_are_not_finite_stop_although_the_loss_is_finite():
    split, model = digits(192), net()
    split = Split(split.x[split.y > 0], split.y[split.y > 0])
    with torch.no_grad():
        model.head.bias[0] = -math.inf  # of a class that never occurs: each example's loss is finite
    assert F.cross_entropy(model(split.pixels(torch.arange(64), "cpu")), split.y[:64]).isfinite()
    with pytest.raises(UserError, match="the logits are not finite in epoch 1, step 1"):
        log_of(model, split, split.y < 0, 1.0, arguments())


# --- scores, and whole runs ---------------------------------------------------------------------------------

def test_scores_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(2), 0.0, 0.0, -1e4], [1e4, 0.0, 0.0, 0.0]])
    entropy = [math.log(4), 0.5 * math.log(2) + 2 * 0.25 * math.log(4), 0.0]
    assert rank.entropy(logits).tolist() == pytest.approx(entropy, abs=1e-6)
    variance = ((0.5 - 1 / 3)**2 + 2 * (0.25 - 1 / 3)**2) / 3  # of the softmax 1/2, 1/4, 1/4
    svar = rank.svar(torch.tensor([[math.log(2), 0.0, 0.0]] * 2), torch.tensor([0, 1]))
    assert svar.tolist() == pytest.approx([-variance, variance]), "wrong is harder than right"
    gradients, index = torch.randn(5, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    vog = rank.Vog((3, 1, 2, 2), index, "cpu")
    for vog.epochs, gradient in enumerate(gradients, 1):
        vog.add(gradient, index)
        vog = rank.Vog((3, 1, 2, 2), index, "cpu", vog.state())  # as in a resumed run
    close(vog.scores(), gradients.std(0, unbiased=False).flatten(1).mean(1))  # over epochs, then over pixels
    z = subset.within_class(torch.tensor([1.0, 2, 3, 10, 20, 60]), torch.tensor([0, 0, 0, 1, 1, 1]))
    assert z[:3].tolist() == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)])
    assert (z[3:] * math.sqrt(1400 / 3)).tolist() == pytest.approx([-20, -10, 30])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A ranking and a CSAT run on the digits 0-4, its evaluation and its transfer to 5-9: their folder."""
    root = tmp_path_factory.mktemp("results")
    best, config = root / "digits0-4" / "run" / "best.pt", HERE / "configs" / "transfer" / "digits5-9.yaml"
    sat.main(["--dataset", "digits0-4", *QUICK, "--split", "csat", "--size", "2", "--weight", "emphasis",
              "--results", str(root), "--run", "run"])
    evaluate.main([str(best)])
    transfer.main([str(best), "--config", str(config), *QUICK, "--results", str(root)])
    return root


def test_scores_are_means_over_the_epochs_of_training_without_attacks(results):
    """Eq. 3 and A.2 from their definitions: the same training again, and the predictions of every epoch."""
    data, flags = load_dataset("digits0-4", "data"), ["--dataset", "digits0-4", "--results", str(results)]
    y, entropy, svar, gradient = data.train.y, [], [], []
    torch.manual_seed(0)
    model = models.build("preactresnet8", 5, *data.mean_std())
    for _ in train.train(model, data.train, y < 0, 1.0, arguments(*flags), CPU):
        x = data.train.pixels(torch.arange(len(y)), "cpu").requires_grad_()
        logits = model.eval()(x)
        gradient.append(torch.autograd.grad(logits[torch.arange(len(y)), y].sum(), x)[0])
        p = logits.detach().double().softmax(1)
        entropy.append(-(p * p.clamp_min(1e-30).log()).sum(1))
        svar.append(torch.where(p.argmax(1) == y, -1, 1) * ((p - 0.2)**2).mean(1))
    vog = torch.stack(gradient).std(0, unbiased=False).flatten(1).mean(1)
    scores = runs.load(results / "digits0-4" / "rank-preactresnet8-seed0" / "scores.pt")
    for metric, expected in (("entropy", sum(entropy) / 2), ("svar", sum(svar) / 2), ("vog", vog)):
        close(scores[metric].double(), expected.double(), atol=1e-4, rtol=1e-3)
    for split, expected in (("csat", scores["vog"]), ("esat", subset.within_class(scores["vog"], y))):
        ordering, _ = rank.scores_for(arguments(*flags, "--metric", "vog", "--split", split), data, CPU)
        assert torch.equal(ordering, expected), "comparable between classes where it orders examples"


def test_a_run_on_the_hardest_classes_and_its_evaluation(results):
    folder, y = results / "digits0-4", load_dataset("digits0-4", "data").train.y
    ranking, run = folder / "rank-preactresnet8-seed0", folder / "run"
    entropy = runs.load(ranking / "scores.pt")["entropy"].double()
    rows = runs.read_json(ranking / "rank.json")["classes_hardest_first"]
    means = {str(c): entropy[y == c].mean().item() for c in range(5)}
    hardest, result = sorted(means, key=means.get, reverse=True), runs.read_json(run / "result.json")
    assert [row["class"] for row in rows] == hardest
    assert [row["entropy"] for row in rows] == pytest.approx([means[c] for c in hardest], abs=1e-6)
    assert sorted(result["A_classes"]) == sorted(hardest[:2])
    assert result["A"] == sum(str(c) in hardest[:2] for c in y.tolist())
    assert result["w_A"] == subset.weight_A("emphasis", result["A"], len(y))
    evaluation = runs.read_json(*run.glob("eval-*.json"))
    for key in ("accuracy", "settings", "weights"):
        assert evaluation[key] == result[key]


def test_transfer_leaves_the_backbone_unchanged(results):
    (folder,), source = (results / "digits5-9").iterdir(), results / "digits0-4" / "run"
    before, after = runs.load(source / "best.pt")["model"], runs.load(folder / "best.pt")["model"]
    backbone = [k for k in before if not k.startswith("head")]
    assert [k for k in backbone if "running_mean" in k]
    assert not [k for k in backbone if not torch.equal(before[k], after[k])]
    assert [tuple(after[f"head.{k}.weight"].shape) for k in (0, 2)] == [(64, 64), (5, 64)]
    result, about = (runs.read_json(path / "result.json") for path in (folder, source))
    assert result["A"] == 0
    assert [result["source"][k] for k in ("dataset", "run", "A")] == ["digits0-4", "run", about["A"]]


def test_selection_takes_the_most_robust_then_cleanest_then_latest(tmp_path, monkeypatch):
    accuracies = {2: (5, 3), 3: (7, 4), 5: (6, 4), 6: (7, 4), 7: (8, 3)}  # {epoch: (clean, robust) of ten}
    epochs, indices, weights, folder = iter([*accuracies, "final"]), {}, {}, tmp_path / "digits0-4" / "run"

    def autoattack_accuracy(model, data, index, settings, folder):
        epoch = next(epochs)
        indices[epoch], weights[epoch] = {*index.tolist()}, evaluate.weights_hash(model.state_dict())
        return [torch.arange(len(index)) < n for n in accuracies.get(epoch, (1, 0))]
    monkeypatch.setattr(evaluate, "autoattack_accuracy", autoattack_accuracy)
    sat.main(["--dataset", "digits0-4", "--split", "none", *QUICK, "--epochs", "7", "--select-n", "10",
              "--lr-decays", "1", "2", "4", "5", "--results", str(tmp_path), "--run", "run"])
    result, best = runs.read_json(folder / "result.json"), runs.load(folder / "best.pt")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in log if "selection" in row] == [2, 3, 5, 6, 7], "after decays, at the end"
    assert result["epoch"] == best["epoch"] == 6, "robust 4 three times, then clean 7 twice, then the later"
    assert evaluate.weights_hash(best["model"]) == weights[6] == weights["final"]
    assert not indices[2] & indices["final"]
    assert torch.backends.cpu.get_cpu_capability() in result["device"], "AVX2 and AVX512 round otherwise"
