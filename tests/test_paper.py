"""The paper's figures: their runs and what makes these; accuracies, contrasts, verdicts, tables, figures."""
import functools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import bench
import config
import evaluate
import report
import run_all
import sat
from common import UserError
from conftest import HERE
from paper import claims, experiments, figures, results, stats, tables
from paper.published import (comparable_data, differences_from_paper, numbers, published_accuracy,
                             published_setting)

CLASSES = experiments.CIFAR10
FIG6 = next(c for c in tables.CURVES if c.name == "fig6")


# --- synthetic runs -----------------------------------------------------------------------------------------

def counts(right):
    """An accuracy as result.json has it, of bool (n,)."""
    low, high = evaluate.wilson(int(right.sum()), len(right))
    return {"n": len(right), "accuracy": float(right.mean()), "low": low, "high": high,
            "right": np.packbits(right).tobytes().hex()}


SETTING = {"arch": "preactresnet18", "epochs": 200, "eps": 0.5, "norm": "l2", "N": 50000, "n": 100,
           "labels": "l", "eval_attacks": ["apgd-ce", "apgd-t", "fab-t", "square"]}


def run(split, right, clean=None, A=5000, A_classes=(), seed=0, **values):
    """A Run of CIFAR-10 with ten classes of equal size whose test examples are robust, and clean, where
    `right` and `clean` are."""
    both = {"robust": np.asarray(right),
            "clean": np.ones(len(right), bool) if clean is None else np.asarray(clean)}

    def part(rows):
        """The accuracies on some classes."""
        return {kind: counts(r.reshape(10, -1)[rows].ravel()) for kind, r in both.items()}

    accuracy = {"all": part(slice(None)), "classes": {c: part(i) for i, c in enumerate(CLASSES)}}
    if A_classes and not values.get("transfer"):
        accuracy["A_val"] = part([c in A_classes for c in CLASSES])
        accuracy["B_val"] = part([c not in A_classes for c in CLASSES])
    plain = {"path": f"{split}-{A}-{seed}", "data": "cifar10", "transfer": False, "setting": SETTING,
             "precision": "float32", "order": "hardest", "metric": "entropy", "weight": "vanilla",
             "attack": "pgd", "head_seed": 0, "N": 50000, "w_A": 1.0, "n_classes": 10, "cost": A,
             "ranking": "", "ranking_epochs": 0, "weights": f"{split}{A}{seed}", "group": "g"}
    return results.Run(split=split, A=A, A_classes=list(A_classes), seed=seed, accuracy=accuracy,
                       **plain | values)


def single(c, right, **values):
    """A Run of CSAT on the single class c."""
    return run("csat", right, A_classes=[c], order="named", **values)


def first(share, n=100):
    """bool (n,): of each class the first `share` is right."""
    return np.tile(np.arange(n // 10) < round(share * n / 10), 10)


def half_width(interval):
    """Half the width of (value, low, high)."""
    return (interval[2] - interval[1]) / 2


# --- accuracies and contrasts -------------------------------------------------------------------------------

def test_right_reads_what_evaluate_wrote():
    g = torch.Generator().manual_seed(0)
    clean, y = torch.rand(50, generator=g) < 0.8, torch.randint(0, 3, (50,), generator=g)
    robust = clean & (torch.rand(50, generator=g) < 0.5)
    one = run("full", first(0.5))
    one.accuracy = evaluate.accuracies(clean, robust, y, ["a", "b", "c"])
    for i, c in enumerate("abc"):
        assert one.right("clean", c).tolist() == clean[y == i].tolist()
        assert one.right("robust", c).tolist() == robust[y == i].tolist()
    del one.accuracy["classes"]["a"]["clean"]["right"]
    assert one.right("clean", "a") is None


def test_paired_contrast_by_hand():
    """Two single runs: the paired interval from the differences example by example."""
    rng = np.random.default_rng(0)
    a, b = rng.random(100) < 0.6, rng.random(100) < 0.4
    interval = stats.contrast([(1, [run("full", a)], None), (-1, [run("none", b)], None)], [])
    d = a.astype(float) - b
    assert interval[0] == pytest.approx(100 * d.mean())
    assert half_width(interval) == pytest.approx(100 * 1.98422 * d.std(ddof=1) / 10, rel=1e-3)
    others = [c for c in CLASSES if c != "cat"]  # only the examples of these count
    interval = stats.contrast([(1, [run("full", a)], others), (-1, [run("none", b)], others)], [])
    rest = np.delete(d.reshape(10, 10), 3, 0)
    assert interval[0] == pytest.approx(100 * rest.mean())
    assert half_width(interval) == pytest.approx(100 * 1.984 * rest.std() / math.sqrt(90), rel=0.02)


def test_contrast_of_seeds_by_hand():
    """Three seeds: the noise between seeds and that of the test examples, with Satterthwaite's degrees of
    freedom."""
    three = [run("full", first(s), seed=i) for i, s in enumerate((0.4, 0.5, 0.6))]
    noise = stats.noise(three)
    assert noise.variance == pytest.approx(100)
    assert noise.df == 2
    assert noise.spread == [[40, 50, 60]]
    test = 1e4 * np.mean([first(s) for s in (0.4, 0.5, 0.6)], axis=0).var(ddof=1) / 100
    df = (100 / 3 + test)**2 / ((100 / 3)**2 / 2 + test**2 / 99)
    assert half_width(stats.contrast([(1, three, None)], three)) == pytest.approx(
        scipy.stats.t.ppf(0.975, df) * math.sqrt(100 / 3 + test), rel=1e-6)


def test_the_noise_of_training_is_that_of_the_same_classes():
    """Two settings whose seeds differ on cat alone: a contrast without cat has no noise of training, one on
    cat has all of it, that on all classes a tenth of the deviation."""
    def three(split):
        """Three seeds that are right on half of each class, of cat on 0.3, 0.5 and 0.7."""
        grids = [first(0.5, 1000).reshape(10, 100) for _ in range(3)]
        for share, grid in zip((0.3, 0.5, 0.7), grids):
            grid[3] = np.arange(100) < 100 * share
        return [run(split, grid.ravel(), seed=i) for i, grid in enumerate(grids)]

    a, b = three("full"), three("none")
    others = [c for c in CLASSES if c != "cat"]
    deviations = [stats.noise([*a, *b], classes=classes).variance**0.5
                  for classes in (others, ["cat"], CLASSES)]
    assert deviations == [0, pytest.approx(20), pytest.approx(2)]
    intervals = [stats.contrast([(1, a, classes), (-1, b, classes)], [*a, *b])
                 for classes in (others, ["cat"], None)]
    t = scipy.stats.t.ppf(0.975, 4)
    assert intervals[0] == (pytest.approx(0), pytest.approx(0), pytest.approx(0))
    assert intervals[1][2] == pytest.approx(t * 20 * math.sqrt(2 / 3))
    assert intervals[2][2] == pytest.approx(t * 2 * math.sqrt(2 / 3))


def clean_and_robust():
    """Two settings of three seeds: robust accuracy is always 50 %, clean accuracy has a deviation of 10."""
    return [[run(split, first(0.5, 1000), clean=first(middle + 0.1 * (seed - 1), 1000), seed=seed)
             for seed in range(3)] for split, middle in (("full", 0.7), ("none", 0.4))]


@pytest.mark.parametrize("kind,between", [("robust", 0), ("clean", 100)])
def test_a_contrast_has_its_own_noise_and_squared_weights(kind, between):
    a, b = clean_and_robust()
    rights = [np.mean([np.concatenate([r.right(kind, c) for c in CLASSES]) for r in runs], axis=0)
              for runs in (a, b)]
    difference = rights[0] - 0.5 * rights[1]
    test, training = 1e4 * np.var(difference, ddof=1) / 1000, 1.25 * between / 3
    df = (test + training)**2 / (training**2 / 4 + test**2 / 999)
    assert half_width(stats.contrast([(1, a, None), (-0.5, b, None)], [*a, *b], kind)) == pytest.approx(
        scipy.stats.t.ppf(0.975, df) * math.sqrt(test + training))


def test_classes_without_examples_and_runs_without_their_bits():
    a, _ = clean_and_robust()
    whole = stats.contrast([(1, a, None)], [])
    for r in a:
        r.accuracy["classes"]["none"] = {"robust": {"n": 0, "accuracy": None, "right": ""}}
    assert stats.contrast([(1, a, None)], []) == whole
    assert stats.noise(a).spread == [[50, 50, 50]]
    del a[0].accuracy["classes"]["cat"]["robust"]["right"]
    assert half_width(stats.contrast([(1, a, None)], [])) == pytest.approx(
        1.96234 * math.sqrt(1e4 * 0.25 / 1000), rel=1e-4), "not paired: the variance of a proportion"


def test_heads_on_one_network_are_no_seeds():
    heads = [run("full", first(share, 1000), seed=source, head_seed=head, transfer=True)
             for source, share in enumerate((0.4, 0.6)) for head in range(2)]
    assert stats.noise(heads).df == 1
    assert stats.noise(heads).variance == pytest.approx(200)
    assert stats.contrast([(1, heads, None)], heads) == pytest.approx(
        stats.contrast([(1, heads[::2], None)], heads)), "no tighter than with a head each"
    two = [run("full", first(share), head_seed=k, transfer=True) for k, share in enumerate((0.4, 0.6))]
    assert stats.mean(two) == (pytest.approx(50), 0.0)
    assert stats.cell(two) == "50.0 (2 heads)"


def test_settings_near_0_count_only_if_no_other_has_several_seeds():
    low = [run("esat", first(share, 1000), seed=seed) for seed, share in enumerate((0.01, 0.03))]
    high = [run("full", first(share, 1000), A=50000, seed=seed) for seed, share in enumerate((0.5, 0.6))]
    assert stats.noise(low).variance == pytest.approx(2)
    assert stats.noise(low).df == 1
    assert stats.noise([*low, *high]).variance == pytest.approx(50)


# --- verdicts and claims ------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("truth,training,test,least,most", [
    (0.0, 0.03, 0.0, 0, 50), (0.0, 0.003, 0.4, 0, 50), (0.1, 0.01, 0.1, 800, 1000)])
def test_verdicts_on_synthetic_results_whose_truth_is_known(truth, training, test, least, most):
    """1,000 draws of nine settings with three seeds: "holds" comes up in at most 5 % of them where the true
    difference is 0, and in at least 80 % where it is 10 points.

    Each draw has a new test set. `training` is the deviation between seeds, `test` that of how often a
    setting gets a single example right, and each of the two decides once. Every other draw compares other
    nine of the ten classes on each side, so that pairing removes less."""
    rng, holds, n = np.random.default_rng(1), 0, 500

    def three(A, shift, easy):
        """Three seeds of a setting."""
        own = easy + rng.normal(0, test, n)
        return [run("esat", rng.random(n) < own + shift + rng.normal(0, training), seed=s, A=A)
                for s in range(3)]

    for draw in range(1000):
        easy = rng.uniform(0.2, 0.8, n)  # the same for all settings
        sides = three(1, truth, easy), three(2, 0.0, easy)
        if draw % 5 == 0:  # new ones for every draw would take long
            others = [r for A in range(3, 10) for r in three(A, 0.0, easy)]
        one, other = (CLASSES[1:], CLASSES[:-1]) if draw % 2 else (None, None)
        pool = [*sides[0], *sides[1], *others]
        interval = stats.contrast([(1, sides[0], one), (-1, sides[1], other)], pool)
        holds += claims.verdict("above", interval, *sides) == "holds"
    assert least <= holds <= most


@pytest.mark.parametrize("rule,interval,expected", [
    ("above", (1, 0.1, 2), "holds"), ("above", (0, -1, 1), "open"), ("above", (-1, -2, -0.1), "contradicted"),
    ("within", (0, -2.9, 2.9), "holds"), ("within", (2, 1, 3.1), "open"),
    ("within", (5, 3.1, 7), "contradicted"), ("within", (-5, -7, -3.1), "contradicted"),
    ("not below", (9, -2.9, 20), "holds"), ("not below", (-4, -5, -3.1), "contradicted")])
def test_verdict_rules(rule, interval, expected):
    a, b = (run("full", first(0.5), seed=seed) for seed in (0, 1))
    assert claims.verdict(rule, interval, [a, b], [a, b]) == expected
    head = run("full", first(0.5), head_seed=1)
    for one in ([a], [a, head]):  # two heads on the features of one training are one training
        assert claims.verdict(rule, interval, one, [a, b]) == "open (one seed)"


BALANCED = claims.FIG2["balanced"].split()[-1]


def everything():
    """Runs of three seeds with a clear order, as the paper has it."""
    runs = []
    for seed in range(3):
        fixed = functools.partial(lambda seed, share: first(share + 0.01 * (seed - 1), 1000), seed)
        runs += [run("none", fixed(0.02), clean=fixed(0.95), seed=seed, A=0),
                 run("full", fixed(0.60), clean=fixed(0.85), seed=seed, A=50000)]
        for share, *values in ((0.1, 0.45, 0.20, 0.45), (0.5, 0.59, 0.50, 0.58)):
            for order, robust in zip(("hardest", "easiest", "random"), values):
                runs.append(run("esat", fixed(robust), clean=fixed(0.9), seed=seed, A=int(share * 50000),
                                order=order))
        for c, weight, robust in (("cat", "balanced", 0.38), ("cat", "vanilla", 0.15),
                                  ("automobile", "balanced", 0.17), ("automobile", "vanilla", 0.15)):
            runs.append(single(c, fixed(robust), seed=seed, weight=weight))
        to = {"transfer": True, "data": "cifar100->cifar10", "n_classes": 100, "seed": seed}
        for weight, robust in (("vanilla", 0.1), ("balanced", 0.3), ("emphasis", 0.37)):
            ten = [f"c{i}" for i in range(10)]
            runs.append(run("csat", fixed(robust), A_classes=ten, weight=weight, **to))
        runs += [run("full", fixed(0.42), A=50000, **to),
                 run("esat", fixed(0.42), A=15000, weight="emphasis", **to)]
    return runs


def by_claim(rows, column):
    """{first and last word of a claim: a column of its row}."""
    return {f"{row[0][:3]} {row[0].split()[-1]}": row[column] for row in rows}


def test_claims_get_the_verdict_of_their_interval():
    (rows, noise), (transferred, _) = (claims.claims(everything())[data, "g"]
                                       for data in ("cifar10", "cifar100->cifar10"))
    assert by_claim([*rows, *transferred], 3) == {
        f"(a) {BALANCED}": "holds: 2 classes", "(a) 1": "holds: 2 classes",
        f"(b) {BALANCED}": "holds", "(b) 1": "open", "(c) robustness": "holds",
        "(d) easiest": "holds", "(d) hardest": "holds", "(h) 0.5)": "holds", "(e) clean)": "holds",
        "(f) balanced": "holds", "(f) vanilla": "holds", "(g) less)": "holds"}
    assert noise.df == 22, "eleven settings of three seeds; no AT, at 2 %, has no room for noise"
    assert noise.variance == pytest.approx(1)
    assert "34.8, 18.9: +15.9" in rows[2][1]
    assert "66.4 of 69.0: 96 %" in rows[4][1]


def test_claims_of_one_seed_stay_open_and_reversed_ones_are_contradicted():
    one = [r for r in everything() if r.seed == 0]
    (rows, noise), _ = claims.claims(one).values()
    assert {row[3] for row in rows} == {"open (one seed)", "open (one seed): 2 classes"}
    assert noise.df == 0
    swapped = everything()
    for r in swapped:
        r.order = {"hardest": "easiest", "easiest": "hardest"}.get(r.order, r.order)
    verdicts = [row[3] for row in claims.claims(swapped)["cifar10", "g"][0] if row[0].startswith("(d)")]
    assert verdicts == ["contradicted", "contradicted"], "random is far above hardest"


def test_claims_show_the_contrasts_that_they_speak_of():
    """(a), (b) and (g), with the noise of all runs of their table."""
    runs = [r for r in everything() if not r.transfer]
    cat, car = (results.pick(runs, A_classes=[c], weight="balanced") for c in ("cat", "automobile"))
    for of_class, c, share in ((cat, "cat", 0.0), (car, "automobile", 0.9)):
        for r in of_class:
            r.accuracy["classes"][c]["robust"] = counts(first(share, 1000)[:100])
    ours = by_claim(claims.claims(runs)["cifar10", "g"][0], 2)
    none, rest = results.pick(runs, split="none"), [c for c in CLASSES if c != "cat"]
    assert stats.points(*stats.contrast([(1, cat, rest), (-1, none, rest)], runs)) in ours[f"(a) {BALANCED}"]
    rest.remove("automobile")
    assert stats.points(*stats.contrast([(1, cat, rest), (-1, car, rest)], runs)) in ours[f"(b) {BALANCED}"]
    moved = [r for r in everything() if r.transfer]
    terms = [(1, results.pick(moved, split="esat"), None), (-1, results.pick(moved, split="full"), None)]
    ours = by_claim(claims.claims(moved)["cifar100->cifar10", "g"][0], 2)
    assert stats.points(*stats.contrast(terms, moved)) in ours["(g) less)"]


@pytest.mark.parametrize("least,some,most,expected", [(20, 40, 60, "contradicted"), (25, 56.5, 60, "open")])
def test_recovering_90_percent(least, some, most, expected):
    """Claim (c): the interval of a ratio by the delta method, and a verdict that counts no AT."""
    none, half, full = sides = [
        [run(split, first(x / 100 + 0.01 * (seed - 1), 10000), A=A, seed=seed) for seed in range(3)]
        for split, x, A in (("none", least, 0), ("esat", some, 25000), ("full", most, 50000))]
    pool, share = sum(sides, []), (some - least) / (most - least)
    row, = [row for row in claims.claims(pool)["cifar10", "g"][0] if row[0].startswith("(c)")]
    _, *ends = stats.contrast([(1, half, None), (-share, full, None), (share - 1, none, None)], pool)
    low, high = (100 * (share + end / (most - least)) for end in ends)
    assert f"{100 * share:.0f} % [{low:.0f}, {high:.0f}]" in row[2]
    assert row[3] == expected


@pytest.mark.parametrize("sign", [1, -1])
def test_fig2_is_compared_with_the_papers_by_rank(sign):
    ours = {c: [single(c, np.concatenate([first(0.5 + sign * (v - 50) / 100, 1000)[:100] for v in row]))]
            for c, row in zip(CLASSES, numbers()["fig2"]["robust_rows_are_A"])}
    text = claims.agreement_with_fig2(CLASSES, ours)
    assert f"of what A gives to any other class {sign:.2f}. " in text
    assert " 90 cells " in text
    our_range, published = re.search(r"goes from (.*) points, in the paper from (.*)\.", text).groups()
    turned = " to ".join(published.translate(str.maketrans("+-", "-+")).split(" to ")[::-1])
    assert our_range == {1: published, -1: turned}[sign]
    rho = float(re.search(r"of B_val (\S+) \(10 classes\)", text)[1])
    assert sign * rho > 0.95, "the mean of a row is nearly its bar"
    assert claims.agreement_with_fig2(CLASSES, dict(list(ours.items())[:2])) == "", "too few classes"
    assert claims.agreement_with_fig2(CLASSES, {f"own {c}": rs for c, rs in ours.items()}) == ""


def test_effects_of_A_are_those_of_an_additive_table():
    cells = {(a, c): 2 * "abc".index(a) + 10 * "abcd".index(c) for a in "abc" for c in "abcd" if a != c}
    assert claims.effects_of_A(cells) == pytest.approx({"a": -2, "b": 0, "c": 2})


def test_claims_on_classes_without_examples():
    three = [single(c, first(0.3)) for c in ("cat", "automobile", "dog")]
    none = [run("none", first(0.1), A=0)]
    for r in (*three, *none):
        r.accuracy["classes"]["frog"]["robust"] = {"n": 0, "accuracy": None, "low": None, "high": None,
                                                   "right": ""}
    rows = list(claims.single_class_claims([*three, *none], none, "vanilla"))
    assert "gives the 7 classes" in rows[1][0]
    assert " 24 cells " in claims.agreement_with_fig2(CLASSES, claims.single_classes(three))


def ranking(name, hardest_first, scores=None):
    """A rank.json of some classes."""
    scores = scores or range(len(hardest_first), 0, -1)
    return {"fingerprint": {"name": name, "classes": list(hardest_first)},
            "classes_hardest_first": [{"class": c, "entropy": s} for c, s in zip(hardest_first, scores)]}


def test_class_order_is_compared_with_the_papers():
    order = [{"plane": "airplane", "car": "automobile"}.get(c, c)
             for c in numbers()["class_order_hardest_first"]["cifar10"]]
    correlation = claims.class_order_correlation
    assert correlation(ranking("cifar10", order), "entropy") == (pytest.approx(1), 10)
    assert correlation(ranking("cifar10", order[::-1]), "entropy") == (pytest.approx(-1), 10)
    assert correlation(ranking("cifar10", order, [1] * 10), "entropy") == (pytest.approx(1), 10), "ties"
    assert correlation(ranking("cifar100", ["road", "otter", "none such", "bee"]), "entropy")[1] == 3
    assert correlation(ranking("digits", "012"), "entropy") is None


# --- the paper's numbers and settings -----------------------------------------------------------------------

@pytest.mark.parametrize("figure,data,line,share,kind,expected", [
    ("fig6", "cifar10", "hardest", 0.5, "robust", 66.4), ("fig6", "cifar10", "random", 0.1, "clean", 92.9),
    ("fig6", "cifar10", "AT", 1.0, "robust", 69.0), ("fig6", "cifar10", "hardest", 0.55, "robust", None),
    ("fig8", "cifar100->cifar10", "easiest", 0.3, "robust", 29.0),
    ("fig8", "cifar100->svhn", "hardest", 0.3, "robust", 22),
    ("fig16", "imagenet200->flowers102", "fgsm-rs", 0.1, "robust", 34.9),
    ("fig12", "cifar100", "vog", 0.1, "robust", 21.9),
    ("fig7", "cifar100->cifar10", "vanilla", 0.1, "robust", 8),
    ("fig7", "cifar100->cifar10", "vanilla", 0.2, "robust", None),
    ("fig5", "digits", "hardest", 0.5, "robust", None), ("fig5", "cifar10", "no AT", 0.0, "robust", 0)])
def test_the_papers_numbers(figure, data, line, share, kind, expected):
    assert published_accuracy(figure, data, line, share, kind) == expected


def test_every_setting_that_is_not_the_papers_is_named():
    ours = {**published_setting("cifar100->cifar10"), "N": 50000}
    assert differences_from_paper("cifar100->cifar10", ours) == ""
    assert differences_from_paper("digits", ours) == ""
    for key, value in (("norm", "linf"), ("steps", 10), ("step_size", 0.2), ("augment", "crop"),
                       ("lr_decays", [10]), ("target's epochs", 3)):
        text = f"{key.replace('_', ' ')} {10 if value == [10] else value} ("
        assert text in differences_from_paper("cifar100->cifar10", {**ours, key: value})
    assert "N 5,000 (50,000)" in differences_from_paper("cifar10", {"N": 5000})


@pytest.mark.parametrize("norm,eps,beside", [("l2", 0.5, True), ("linf", 8 / 255, False), ("l2", 1.0, False)])
def test_another_threat_model_is_not_put_beside_the_papers_numbers(tmp_path, norm, eps, beside):
    other = {"setting": {**SETTING, "norm": norm, "eps": eps}}
    runs = [run("full", first(0.7), A=50000, **other), run("none", first(0.0), A=0, **other),
            run("esat", first(0.6), A=25000, **other)]
    (rows, _), = claims.claims(runs).values()
    assert {row[0][:3]: row[1] != "-" for row in rows} == {"(c)": beside, "(e)": beside}
    text = "\n".join(tables.curve_section(runs, tmp_path, FIG6))
    assert ("paper robust %" in text) == beside
    assert (figures.PALE in (tmp_path / "fig6.svg").read_text()) == beside


# --- results, groups, tables --------------------------------------------------------------------------------

def copies(pipeline, tmp_path, name, **changes):
    """Runs whose result.json are copies of one of the pipeline, each with other flags: {folder: flags}."""
    result = json.loads((pipeline / "digits0-4" / name / "result.json").read_text())
    for folder, change in changes.items():
        changed = {**result, "A": change.pop("A", result["A"]), "args": {**result["args"], **change}}
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "result.json").write_text(json.dumps(changed))
    runs = results.without_repeats(results.read_runs(tmp_path))
    results.name_groups(runs)
    return runs


def test_random_classes_are_grouped_by_their_number(pipeline, tmp_path):
    """Random subsets of two classes differ in |A|: they are still seeds of one point."""
    runs = copies(pipeline, tmp_path, "b", a={"order": "random", "seed": 0, "A": 250},
                  b={"order": "random", "seed": 1, "A": 260})
    lines = tables.lines_of(runs, "order")
    assert {line: list(sizes) for line, sizes in lines.items()} == {"random": [2]}
    assert len(lines["random"][2]) == 2


def test_other_settings_are_apart_and_repeats_are_no_seeds(pipeline, tmp_path, capsys):
    runs = copies(pipeline, tmp_path, "a", one={}, twin={}, seed={"seed": 1}, lr={"lr": 0.7})
    groups = {name: len(group) for (name,), group in results.grouped(runs, "group").items()}
    assert sorted((", lr 0.7" in name, n) for name, n in groups.items()) == [(False, 2), (True, 1)]
    assert "twin" in capsys.readouterr().out


def test_float32_wins_over_bf16_and_groups_name_bf16():
    runs = [run("full", first(0.5), seed=s, precision=p, A=50000)
            for s in range(3) for p in ("bf16", "float32")]
    assert {r.precision for r in results.without_repeats(runs)} == {"float32"}
    mixed = [runs[0], runs[2], runs[5]]
    results.name_groups(mixed)
    assert {r.group for r in mixed} == {f"{results.setting_as_text(SETTING)}, 2 of 3 runs trained in bf16"}


def published_transfer():
    """The path and the content of a published transfer's result.json."""
    path = HERE / "results-published/cifar10/cifar100-cpu-full-seed0-seed0/result.json"
    return path, json.loads(path.read_text())


def test_transfers_keep_the_seeds_of_source_and_target_apart():
    path, result = published_transfer()
    runs = []
    for source, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        result["source"]["args"]["seed"], result["args"]["seed"] = source, head
        runs.append(results.run_of(path, result))
    assert [(r.seed, r.head_seed) for r in runs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len(results.without_repeats(runs)) == 4
    assert stats.seeds(runs) == 2
    assert differences_from_paper("cifar100->mine", runs[0].setting) == "", "a target that the paper lacks"


def test_a_sources_threat_model_is_part_of_the_setting():
    path, result = published_transfer()
    one = results.run_of(path, result)
    result["source"]["args"]["eps"] = 2.0
    other = results.run_of(path, result)
    assert one.setting != other.setting
    assert one.setting["eps"] == other.setting["eps"] == 0.5
    assert comparable_data(one.data, one.setting) == "cifar100->cifar10"
    assert comparable_data(other.data, other.setting) == ""


def test_doubtful_rankings_are_named():
    one, other, chance = (run("esat", first(0.5), A=a, ranking=r)
                          for a, r in ((9, "x"), (99, "y"), (999, "")))
    assert results.ranking_cautions([one, chance]) == ""
    assert "by entropy used 2 different rankings" in results.ranking_cautions([one, other, chance])
    one.ranking_epochs = 1  # SETTING has other epochs
    assert "of 1 epochs, its runs are of 200" in results.ranking_cautions([one, chance])
    one.ranking_epochs = 200
    assert results.ranking_cautions([one, chance]) == ""


def test_tables_of_curves(tmp_path):
    runs = [run("full", first(0.7), A=50000), run("esat", first(0.6), A=25000),
            run("esat", first(0.4), A=25000, order="random"),
            run("esat", first(0.6), A=25000, order="random", seed=1), run("esat", first(0.5))]
    text = "\n".join(tables.curve_section(runs, tmp_path, FIG6))
    for line in ("| hardest | 25,000 | 0.50 | 1 | 1 | 60.0 [50.2, 69.1] | 100.0 [96.3, 100.0] "
                 "| 66.4 | -6.4 | 89.3 | +10.7 |",
                 "| random | 25,000 | 0.50 | 1 | 2 | 50.0 ± 14.1 | 100.0 ± 0.0 | 64.5 | -14.5 | 91.0 |",
                 "| AT | 50,000 | 1.00 | 1 | 1 | 70.0 [60.4, 78.1] |", "| no AT | no run yet |",
                 "Missing runs of these lines: random at |A| = 5,000, the baseline no AT."):
        assert line in text
    assert "Not the paper's setting" not in text


def test_the_authors_attack_stands_beside_pgd_and_in_no_other_table(tmp_path):
    """Neither the claims nor the pooled noise nor Fig. 2's own table change."""
    plain = [r for r in everything() if not r.transfer]
    more = [single("cat", first(0.9, 1000), weight="balanced", attack="pgd-authors", seed=s)
            for s in range(3)]
    assert claims.claims(plain + more) == claims.claims(plain)
    before, after = (tables.matrix_section(runs, tmp_path) for runs in (plain, plain + more))
    added = [text for text in after if text not in before]
    assert [text for text in after if text in before] == before
    assert "| cat | pgd | 3 | 38.0 ± 1.0 | 38.0 ± 1.0 | 38.0 ± 1.0 |" in added[1]
    assert "| cat | pgd-authors | 3 | 90.0 ± 0.0 | 90.0 ± 0.0 | 90.0 ± 0.0 |" in added[1]
    assert tables.matrix_section(more, tmp_path) == ["## Fig. 2: CSAT on a single class", "No runs yet."]


def test_pale_baselines_alone_are_named_in_the_legend(tmp_path):
    name = "linf eps 0.0313725, AutoAttack's apgd-ce and apgd-t, n = 1,000"  # 60 columns end after "n ="
    group = figures.Group("cifar10", name, {}, {"no AT": [], "AT": []}, "cifar10")
    figures.curves(tmp_path / "f", "title", "none", [group], [("all", "robust")])
    drawn = (tmp_path / "f.svg").read_text()
    assert figures.PALE in drawn
    assert ">n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}1,000<" in drawn


def test_tables_into_a_file(tmp_path):
    file = tmp_path / "R.md"
    file.write_text("a\n<!-- table: T -->\nold | x\n<!-- end -->\nb\n")
    report.fill_in(file, [["## T", "![f](f.png)", "| new |"], []])
    assert file.read_text() == "a\n<!-- table: T -->\n\n| new |\n\n<!-- end -->\nb\n"
    with pytest.raises(UserError, match="asks for the table 'T'; there are: U"):
        report.fill_in(file, [["## U", "x"]])


def test_readme_is_made_from_the_published_results(tmp_path):
    shutil.copytree(HERE / "results-published", tmp_path / "r")
    shutil.copy(HERE / "README.md", tmp_path / "README.md")
    report.main(["--results", str(tmp_path / "r"), "--into", str(tmp_path / "README.md")])
    assert (tmp_path / "README.md").read_text() == (HERE / "README.md").read_text(), \
        "python report.py --results results-published --into README.md"
    assert (tmp_path / "r" / "tables.md").read_text() == (HERE / "results-published/tables.md").read_text()


def table(text, section, until):
    """The rows of the first table of a section, as dicts."""
    rows = [[c.strip() for c in line.split("|")[1:-1]]
            for line in text.replace("\\|", "").split(section)[1].split(until)[0].splitlines()
            if line.startswith("|")]
    return [dict(zip(rows[0], r)) for r in rows[2:]]


def test_report_of_a_pipeline(pipeline):
    text, folder = (pipeline / "tables.md").read_text(), pipeline / "digits0-4"
    robust = json.loads((folder / "b" / "result.json").read_text())["accuracy"]["B_val"]["robust"]
    row, = [r for r in table(text, "## Fig. 4 and 5", "## Fig. 13") if r["order"] == "hardest"]
    assert row["robust B_val %"] == (f"{100 * robust['accuracy']:.1f} "
                                     f"[{100 * robust['low']:.1f}, {100 * robust['high']:.1f}]")
    assert row["A"] == "2 classes"
    assert row["A/N"] == "0.40"
    for line in ("Missing runs of these lines: the baseline AT.", "runs of these tables used it.",
                 "digits0-4->digits5-9", "AutoAttack's apgd-ce, n = 24", "## Fig. 2"):
        assert line in text
    evaluation = table(text, "## Evaluations under other settings", "\n## ")[0]
    assert evaluation["run"].startswith("digits0-4/")
    assert evaluation["threat model"].startswith("l2 eps")
    drawn = {path.name for path in (pipeline / "figures").iterdir()}
    assert {f"{name}.{ending}" for name in ("fig3", "fig5", "fig8", "fig13")
            for ending in ("png", "svg")} <= drawn
    assert "fig2.png" not in drawn


def test_the_report_and_the_list_of_runs_need_no_torch():
    code = "import sys, report, run_all; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert done.stdout == "False\n"


# --- the list of runs ---------------------------------------------------------------------------------------

def run_all_sh(*argv, **env):
    """./run_all.sh with these words, and `env` added to the environment."""
    return subprocess.run([str(HERE / "run_all.sh"), *argv], capture_output=True, text=True,
                          env={**os.environ, **env})


def dry_run(*argv, **env):
    """The commands of ./run_all.sh --dry-run as [(script, argv)], and {figure: [runs, transfers, new]}."""
    lines = run_all_sh("--dry-run", *argv, **env).stdout.splitlines()
    commands = [shlex.split(line) for line in lines if not line.startswith("#")]
    rows = [line[2:].rsplit(maxsplit=4) for line in lines if line.startswith("# ") and ":" in line]
    return ([(Path(words[1]).name, words[2:]) for words in commands[:-1]],
            {row[0].strip(): [int(v) for v in row[1:4]] for row in rows})


# [runs of sat.py, transfers, new ones]. Runs: (hardest + easiest + random subsets) x nine sizes.
COUNTS = {
    "cifar10: baselines": [2, 0, 2],
    "cifar10: fig2": [10 + 2, 0, 12],  # one run a class, and two with w_A = 1
    "cifar10: fig4": [9 * (2 + 10), 0, 108], "cifar10: fig5": [108, 0, 0], "cifar10: fig13": [108, 0, 0],
    "cifar100: fig6": [9 * (2 + 5), 0, 63],
    "cifar100: fig12": [9 * 3, 0, 18],  # hardest, three metrics
    "imagenet200: fig6": [9 * (2 + 3), 0, 45],
    "cifar100 -> cifar10: fig7": [9 * 3, 27 + 2, 18 + 27 + 2],  # hardest, three weights; + 2: the baselines
    "cifar100 -> cifar10: fig15": [63, 63 + 2, 54 + 54],
    "cifar100 -> cifar10: fig16": [9 * 2, 18 + 2, 9 + 9],  # hardest, PGD-7 and FGSM-RS
    "cifar100 -> svhn: fig14": [63, 63 + 2, 63 + 2],
    "imagenet200 -> caltech256 flowers102: fig16": [9 * 2, 2 * (18 + 2), 9 + 18]}  # two targets


@pytest.fixture
def fast_configs(monkeypatch):
    """Reads each config once: a thousand commands share a few."""
    monkeypatch.setattr("config.from_yaml", functools.cache(sat.config.from_yaml))


def test_every_run_of_the_paper_is_listed_once(fast_configs):
    commands, rows = dry_run("cifar10", "cifar100", "imagenet200", "transfer")
    assert {k: rows[k] for k in COUNTS} == COUNTS
    runs = [sat.command_line(argv) for name, argv in commands if name == "sat.py"]
    assert len({sat.run_folder(r)[0] for r in runs}) == len(runs)
    assert all(r.run is None for r in runs)
    kinds = {}
    for r in runs:
        kind = (r.dataset, r.split, "named" if r.classes else r.order, r.metric, r.weight, r.attack)
        kinds.setdefault(kind, set()).add((r.frac or r.size, r.seed))
    tenths = [k / 10 for k in range(1, 10)]
    for data, seeds, sizes in (("cifar10", 10, range(1, 10)), ("cifar100", 5, range(10, 100, 10)),
                               ("imagenet200", 3, range(20, 200, 20))):
        for split, amounts in (("esat", tenths), ("csat", sizes)):
            for weight in ("vanilla",) if data == "cifar10" else ("vanilla", "emphasis"):
                for order, n in (("hardest", 1), ("easiest", 1), ("random", seeds)):
                    assert kinds[data, split, order, "entropy", weight, "pgd"] == {
                        (amount, seed) for amount in amounts for seed in range(n)}
        if data != "cifar10":
            assert kinds[data, "esat", "hardest", "entropy", "emphasis", "fgsm-rs"] == {
                (s, 0) for s in tenths}
    assert kinds["cifar100", "csat", "hardest", "entropy", "balanced", "pgd"] == {
        (s, 0) for s in range(10, 100, 10)}
    assert kinds["cifar100", "esat", "hardest", "vog", "vanilla", "pgd"] == {(s, 0) for s in tenths}
    named = {weight: sorted(r.classes[0] for r in runs if r.classes and r.weight == weight)
             for weight in ("balanced", "vanilla")}
    assert named == {"balanced": CLASSES, "vanilla": ["automobile", "cat"]}


def test_sources_and_rankings_are_made_before_they_are_used(fast_configs):
    made, sources = set(), {}
    for name, argv in dry_run("all")[0]:
        if name == "rank.py":
            args = config.parse("rank.py", "", argv)
            made.add((args.dataset, args.arch))
        elif name == "sat.py":
            args = sat.command_line(argv)
            made.add((sat.run_folder(args)[0] / "best.pt").as_posix())
            if args.split not in ("none", "full") and not args.classes:
                assert (args.dataset, args.arch) in made
        else:
            args = config.parse("transfer.py", "", argv, "best.pt")
            assert args.checkpoint.as_posix() in made
            sources.setdefault(args.dataset, set()).add(args.checkpoint.parent.name)
    assert sources["svhn"] == {r for r in sources["cifar10"] if r.startswith(("none", "full", "esat"))
                               and "fgsm" not in r}
    assert all("emphasis" in r or r.startswith(("none", "full")) for r in sources["caltech256"])
    assert sources["caltech256"] == sources["flowers102"]


def test_the_folders_are_those_that_the_scripts_make(fast_configs):
    for stage in experiments.stages(experiments.SECTIONS, [], "results", {}):
        if stage.script == "sat.py":
            folder = sat.run_folder(sat.command_line(stage.arguments))[0].as_posix()
        elif stage.script == "transfer.py":
            args = config.parse("transfer.py", "", stage.arguments, "best.pt")
            folder = f"results/{args.dataset}/{args.run}"
        else:
            args = config.parse("rank.py", "", stage.arguments)
            folder = f"results/{args.dataset}/rank-{args.arch}-seed0"
        assert stage.folder == folder


def test_nproc_starts_torchrun():
    from torch.distributed.run import parse_args
    out = run_all_sh("--dry-run", "digits", "fig2", NPROC="4").stdout
    lines = [line for line in out.splitlines() if "report.py" not in line and not line.startswith("#")]
    assert len(lines) == 2 + 10
    for words in map(shlex.split, lines):
        assert words[1:3] == ["-m", "torch.distributed.run"]
        args = parse_args(words[3:])  # torchrun's own parser
        assert args.nproc_per_node == "4"
        assert Path(args.training_script).name == "sat.py"
        assert sat.command_line(args.training_script_args).run.startswith("quick-")


@pytest.mark.parametrize("argv,env,expected", [
    (["mnist"], {}, "no section or figure 'mnist'; valid: cifar10"),
    (["digits", "fig99"], {}, "'fig99'; valid: cifar10"), ([], {}, "name a section"),
    (["cifar10", "fig7"], {}, "cifar10 has no fig7; it is in: transfer cifar10-cpu"),
    (["digits"], {"EXTRA": "--epoch 2"}, "EXTRA: unrecognized arguments: --epoch 2"),
    (["digits"], {"EXTRA": "--epochs two"}, "--epochs: 'two' is not a whole"),
    (["digits"], {"EXTRA": "--seed=5"}, "EXTRA: --seed differs between the runs"),
    (["digits"], {"EXTRA": "--run 'x"}, "EXTRA: No closing quotation"),
    (["digits"], {"NPROC": "0"}, "NPROC=0: give the number of processes")])
def test_mistakes_in_the_words_of_run_all(argv, env, expected):
    done = run_all_sh(*argv, "--dry-run", **env)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*\n", done.stderr)
    assert expected in done.stderr


def test_extra_flags_change_costs_and_not_the_names(monkeypatch, capsys, fast_configs):
    monkeypatch.setenv("EXTRA", "--epochs 40")
    run_all.main(["--dry-run", "cifar10", "fig2"])
    words = [shlex.split(line)[2:] for line in capsys.readouterr().out.splitlines() if "sat.py" in line]
    folders = [sat.run_folder(sat.command_line(w))[0].name for w in words]
    assert folders[:3] == ["none-seed0", "full-seed0", "csat-airplane-balanced-seed0"]
    assert all(sat.command_line(w).epochs == 40 for w in words)
    plain, other = ({s.folder: s.cost for s in experiments.stages(["transfer"], ["fig16"], "r", extra)}
                    for extra in ({}, {"epochs": 2, "steps": 1}))
    assert plain["r/cifar100/esat-hardest-0.5-emphasis-seed0"] == 50000 * 200 * 10
    assert other["r/cifar100/esat-hardest-0.5-emphasis-seed0"] == 50000 * 2 * 4
    assert plain["r/cifar100/esat-hardest-0.5-emphasis-attack=fgsm-rs-seed0"] == 50000 * 200 * 4
    assert plain["r/cifar10/cifar100-none-seed0-seed0"] == 50000 * 40
    assert other["r/cifar10/cifar100-none-seed0-seed0"] == 50000 * 2
    arch, = (stage.folder for stage in experiments.stages(["digits"], ["fig3"], "r", {"arch": "resnet50"}))
    assert arch == "r/digits/rank-resnet50-seed0"


# --- making the runs ----------------------------------------------------------------------------------------

MAKES = """
if "report.py" not in words[0]:
    assert "transfer.py" not in words[0] or Path(words[1]).with_name("result.json").exists()
    folder.mkdir(parents=True)  # a second one would fail
    time.sleep(0.02)
    (folder / ("rank.json" if "rank.py" in words[0] else "result.json")).write_text("")
"""


def stub(tmp_path, before=""):
    """Returns a function that starts run_all with a Python that notes its calls in tmp_path/calls and, in
    place of a script, runs `before` and writes its result file."""
    python = tmp_path / "python"
    python.write_text(f"""#!{sys.executable}
import os, sys, time
from pathlib import Path
words = sys.argv[1:]
flag = lambda name, default: words[words.index(name) + 1] if name in words else default
dataset = flag("--dataset", "digits5-9" if "digits5-9.yaml" in str(words) else "digits")
name = flag("--run", f"rank-preactresnet8-seed{{flag('--seed', 0)}}")
folder = Path("{tmp_path}/results", dataset, name)
with open("{tmp_path}/calls", "a") as f:
    f.write(" ".join(words) + chr(10))
{before}{MAKES}""")
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "RESULTS": str(tmp_path / "results")}
    return lambda *argv, start=subprocess.run, **more: start(
        [sys.executable, str(HERE / "run_all.py"), *argv], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**env, **more})


def calls(tmp_path):
    """The calls that a stub noted, but for that of the report."""
    return [line for line in (tmp_path / "calls").read_text().splitlines() if "report.py" not in line]


@pytest.mark.slow
def test_finished_stages_are_skipped_and_missing_ones_named(tmp_path):
    go = stub(tmp_path, 'if "csat-2-balanced-seed0" in name: sys.exit("no such luck")')
    folder = tmp_path / "results" / "digits" / "quick-csat-0-balanced-seed0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    done, made = go("digits", "fig2"), " ".join(calls(tmp_path))
    assert "csat-0-balanced-seed0" not in made
    assert "csat-9-balanced-seed0" in made
    assert "report.py" in (tmp_path / "calls").read_text()
    assert done.returncode == 1
    assert re.search("1 missing.*\n.*digits/quick-csat-2-balanced-seed0", done.stderr)
    assert "no such luck" in done.stdout
    log = tmp_path / "results" / "logs" / "digits_quick-csat-2-balanced-seed0.log"
    assert "no such luck" in log.read_text()


@pytest.mark.slow
def test_two_run_alls_at_once(tmp_path):
    """Every run of a section exactly once, whichever of two copies makes it; a transfer after its source."""
    go = stub(tmp_path)
    for one in [go("digits", start=subprocess.Popen) for _ in range(2)]:
        _, errors = one.communicate(timeout=300)
        assert one.returncode == 0, errors
    assert len(calls(tmp_path)) == len(set(calls(tmp_path))) == len(dry_run("digits")[0])


@pytest.mark.slow
def test_run_all_that_was_killed_is_taken_over_at_once(tmp_path):
    """Killed with -9, its run going on: a second copy waits for that run, does not start it again, and makes
    the rest."""
    go = stub(tmp_path, 'if "csat-3-balanced-seed0" in name: time.sleep(3)')
    one = go("digits", "fig2", start=subprocess.Popen)
    noted = tmp_path / "calls"
    while not noted.exists() or "csat-3-balanced-seed0" not in noted.read_text():
        time.sleep(0.05)
    one.kill()
    done = go("digits", "fig2")
    assert done.returncode == 0, done.stderr
    assert len(calls(tmp_path)) == len(set(calls(tmp_path))) == 12


def test_glibc_keeps_memory_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr(run_all.Path, "glob", lambda self, pattern: iter(()))  # no GPU
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "7")
    assert run_all.environment()["MALLOC_MMAP_MAX_"] == "0"
    assert run_all.environment()["MALLOC_TRIM_THRESHOLD_"] == "7"
    code = ("import resource, torch\n"
            "for i in range(40):\n"
            "    if i == 20: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "    torch.ones(2**20 * 13)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | run_all.KEEP_MEMORY)
    assert int(done.stdout) < 1000, "else the kernel zeroes 12,800 pages for each of these tensors"


def test_bench_counts_by_the_cost_model(tmp_path, capsys):
    path = tmp_path / "new" / "bench.json"
    bench.main(["--image-side", "8", "--batch-size", "8", "--epochs", "2", "--steps", "2", "--threads", "1",
                "--json", str(path)])
    rows = {r["share"]: r for r in json.loads(path.read_text())["steps"]}
    assert list(rows) == [0, 0.1, 0.5, 1]
    assert rows[0.5]["model"] == pytest.approx((3 + 2 * 2 * 0.5) / (3 + 2 * 2))
    assert rows[1.0]["time_to_full"] == 1
    assert rows[0.0]["images_per_s"] == pytest.approx(8 / rows[0.0]["seconds"])
    assert "| 0.5 | " in capsys.readouterr().out
