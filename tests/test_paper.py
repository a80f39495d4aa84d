"""The paper's figures: their runs and what makes these; accuracies, contrasts, verdicts, tables, figures."""
import copy
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
import transfer
from common import UserError
from conftest import HERE
from paper import claims, experiments, figures, results, stats, tables
from paper.published import (comparable_data, differences_from_paper, numbers, published_accuracy,
                             published_setting)
from runs import read_json

CLASSES = experiments.CIFAR10
FIG6 = next(c for c in tables.CURVES if c.name == "fig6")
SETTING = {**published_setting("cifar10"), "n": 1000}


def published_run(name, path="folder/result.json", source=(), **args):
    """A published Run with these flags in place of its own and, in a transfer, of its source's."""
    result = read_json(HERE / "results-published/cifar10" / name / "result.json")
    result["args"] |= args
    if source:
        result["source"]["args"] |= source
    return results.Run(Path(path), result)


def examples(right, n):
    """bool (n,) of n examples in ten equal classes. right: a share of each class, ten shares, or bool (n,)."""
    right = np.asarray(right)
    if right.dtype != bool:
        right = np.arange(n // 10) < np.rint(right * n / 10).reshape(-1, 1) * np.ones((10, 1))
    return torch.as_tensor(right).flatten()


def run(split, robust, clean=1.0, n=1000, **values):
    """A Run on CIFAR-10 that is right, and robust, on these examples."""
    A_classes = None if values.get("transfer") else values.get("A_classes")
    accuracy = evaluate.accuracies(examples(clean, n), examples(robust, n),
                                   torch.arange(10).repeat_interleave(n // 10), CLASSES, A_classes)
    one = copy.copy(BASE)
    vars(one).update({"split": split, "accuracy": accuracy, "setting": SETTING, "group": "g", "A": 5000,
                      "order": "named" if A_classes else "hardest", **values})
    return one


def three(split, robust, clean=0.9, **values):
    """Three seeds of a setting, a point apart."""
    return [run(split, np.add(robust, shift), np.add(clean, shift), seed=seed, **values)
            for seed, shift in enumerate((-0.01, 0.0, 0.01))]


BASE = published_run("cpu-full-seed0")


def half_width(interval):
    """Half the width of (value, low, high)."""
    return (interval[2] - interval[1]) / 2


def test_right_reads_what_evaluate_wrote():
    robust, clean = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0)) < 0.5
    one = run("full", robust.numpy(), clean.numpy())
    for i, c in enumerate(CLASSES):
        assert one.right("clean", c).tolist() == clean.view(10, 100)[i].tolist()
        assert one.right("robust", c).tolist() == robust.view(10, 100)[i].tolist()


def test_paired_contrast_by_hand():
    """Two single runs: the paired interval from the differences example by example."""
    a, b = np.random.default_rng(0).random((2, 1000)) < [[0.6], [0.4]]
    differences, others = a.astype(float) - b, [c for c in CLASSES if c != "cat"]
    for classes, d in ((None, differences), (others, np.delete(differences.reshape(10, 100), 3, 0).ravel())):
        interval = stats.contrast([(1, [run("full", a)], classes), (-1, [run("none", b)], classes)], [])
        assert interval[0] == pytest.approx(100 * d.mean())
        assert half_width(interval) == pytest.approx(196.234 * d.std(ddof=1) / math.sqrt(len(d)), rel=1e-4)


def test_the_noise_of_training_is_that_of_the_same_classes():
    """Two settings whose seeds differ on cat alone: a contrast without cat has no noise of training, one on
    cat has all of it, that on all classes a tenth of the deviation."""
    a, b = ([run(split, [0.5, 0.5, 0.5, cat, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], seed=seed)
             for seed, cat in enumerate((0.3, 0.5, 0.7))] for split in ("full", "none"))
    others, t = [c for c in CLASSES if c != "cat"], scipy.stats.t.ppf(0.975, 4)
    for classes, deviation in ((others, 0), (["cat"], 20), (None, 2)):
        assert stats.Noise([*a, *b], classes=classes).variance**0.5 == pytest.approx(deviation)
        interval = stats.contrast([(1, a, classes), (-1, b, classes)], [*a, *b])
        assert half_width(interval) == pytest.approx(t * deviation * math.sqrt(2 / 3))


@pytest.mark.parametrize("kind,between", [("robust", 0), ("clean", 100)])
def test_a_contrast_has_its_own_noise_and_squared_weights(kind, between):
    """Two settings of three seeds: robust accuracy is always 50 %, clean accuracy has a deviation of 10. The
    degrees of freedom are Satterthwaite's."""
    a, b = ([run(split, 0.5, middle + 0.1 * (seed - 1), seed=seed) for seed in range(3)]
            for split, middle in (("full", 0.7), ("none", 0.4)))
    noise = stats.Noise([*a, *b], kind)
    assert noise.variance == pytest.approx(between)
    assert noise.df == 4
    rights = [np.mean([np.concatenate([r.right(kind, c) for c in CLASSES]) for r in runs], axis=0)
              for runs in (a, b)]
    difference = rights[0] - 0.5 * rights[1]
    test, training = 1e4 * np.var(difference, ddof=1) / 1000, 1.25 * between / 3
    df = (test + training)**2 / (training**2 / 4 + test**2 / 999)
    value, low, high = stats.contrast([(1, a, None), (-0.5, b, None)], [*a, *b], kind)
    assert value == pytest.approx(100 * difference.mean())
    assert (high - low) / 2 == pytest.approx(scipy.stats.t.ppf(0.975, df) * math.sqrt(test + training))


def test_settings_near_0_count_only_if_no_other_has_several_seeds():
    low = [run("esat", share, seed=seed) for seed, share in enumerate((0.01, 0.03))]
    high = [run("full", share, seed=seed) for seed, share in enumerate((0.5, 0.6))]
    assert stats.Noise(low).variance == pytest.approx(2)
    assert stats.Noise(low).df == 1
    assert stats.Noise([*low, *high]).variance == pytest.approx(50)


def test_classes_without_examples():
    single = [run("csat", 0.3, A_classes=(c,)) for c in ("cat", "automobile", "dog")]
    none, empty = run("none", 0.1), {"n": 0, "accuracy": None, "low": None, "high": None, "right": ""}
    for r in (*single, none):
        r.accuracy["classes"]["frog"] = {"robust": empty}
    rows = list(claims.single_class_claims([*single, none], [none], "vanilla"))
    assert "gives the 7 classes" in rows[1][0]
    assert " 24 cells " in claims.agreement_with_fig2(CLASSES, claims.single_classes(single))
    others = [c for c in CLASSES if c != "frog"]
    assert stats.contrast([(1, [none], None)], []) == stats.contrast([(1, [none], others)], [])
    assert stats.Noise(three("none", 0.5)).spread == [pytest.approx([49, 50, 51])]


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

    def setting(A, shift, easy):
        """Three seeds of a setting."""
        own = easy + rng.normal(0, test, n)
        return [run("esat", rng.random(n) < own + shift + rng.normal(0, training), n=n, seed=s, A=A)
                for s in range(3)]

    for draw in range(1000):
        easy = rng.uniform(0.2, 0.8, n)  # the same for all settings
        one, other = setting(1, truth, easy), setting(2, 0.0, easy)
        if draw % 5 == 0:  # new ones for every draw would take long
            pool = [r for A in range(3, 10) for r in setting(A, 0.0, easy)]
        classes = (CLASSES[1:], CLASSES[:-1]) if draw % 2 else (None, None)
        interval = stats.contrast([(1, one, classes[0]), (-1, other, classes[1])], [*one, *other, *pool])
        holds += claims.verdict("above", interval, one, other) == "holds"
    assert least <= holds <= most


@pytest.mark.parametrize("rule,interval,expected", [
    ("above", (1, 0.1, 2), "holds"), ("above", (0, -1, 1), "open"), ("above", (-1, -2, -0.1), "contradicted"),
    ("within", (0, -2.9, 2.9), "holds"), ("within", (2, 1, 3.1), "open"),
    ("within", (5, 3.1, 7), "contradicted"), ("within", (-5, -7, -3.1), "contradicted"),
    ("not below", (9, -2.9, 20), "holds"), ("not below", (-4, -5, -3.1), "contradicted")])
def test_verdict_rules(rule, interval, expected):
    runs = three("full", 0.5)
    assert claims.verdict(rule, interval, runs, runs) == expected
    assert claims.verdict(rule, interval, runs[:1], runs) == "open (one seed)"


BALANCED = claims.FIG2["balanced"].split()[-1]


def everything():
    """Runs of three seeds with a clear order, as the paper has it."""
    runs = [*three("none", 0.02, 0.95, A=0), *three("full", 0.60, 0.85, A=50000)]
    for A, *values in ((5000, 0.45, 0.20, 0.45), (25000, 0.59, 0.50, 0.58)):
        for order, robust in zip(("hardest", "easiest", "random"), values):
            runs += three("esat", robust, A=A, order=order)
    for c, weight, robust in (("cat", "balanced", 0.38), ("cat", "vanilla", 0.15),
                              ("automobile", "balanced", 0.17), ("automobile", "vanilla", 0.15)):
        runs += three("csat", robust, A_classes=(c,), weight=weight)
    to = {"transfer": True, "data": "cifar100->cifar10", "n_classes": 100}
    for weight, robust in (("vanilla", 0.1), ("balanced", 0.3), ("emphasis", 0.37)):
        runs += three("csat", robust, A_classes=tuple("abcdefghij"), weight=weight, **to)
    return [*runs, *three("full", 0.42, A=50000, **to),
            *three("esat", 0.42, A=15000, weight="emphasis", **to)]


def by_claim(rows, column):
    """{first and last word of a claim: a column of its row}."""
    return {f"{row[0][:3]} {row[0].split()[-1]}": row[column] for row in rows}


def test_claims_get_the_verdict_of_their_interval():
    (rows, noise), (transferred, _) = claims.claims(everything()).values()
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
    (rows, noise), _ = claims.claims([r for r in everything() if r.seed == 0]).values()
    assert {row[3] for row in rows} == {"open (one seed)", "open (one seed): 2 classes"}
    assert noise.df == 0
    swapped = everything()
    for r in swapped:
        r.order = {"hardest": "easiest", "easiest": "hardest"}.get(r.order, r.order)
    verdicts = [row[3] for row in claims.claims(swapped)["cifar10", "g"][0] if row[0].startswith("(d)")]
    assert verdicts == ["contradicted", "contradicted"], "random is far above hardest"


def test_claims_show_the_contrasts_that_they_speak_of():
    """(a), (b) and (g), with the noise of all runs of their table. On its own class each of two runs of CSAT
    differs from the other classes."""
    cat = three("csat", [0.4, 0.4, 0.4, 0.0, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4], A_classes=("cat",))
    car = three("csat", [0.2, 0.9, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2], A_classes=("automobile",))
    runs, none = [*cat, *car, *three("none", 0.02)], three("none", 0.02)
    ours, rest = by_claim(claims.claims(runs)["cifar10", "g"][0], 2), [c for c in CLASSES if c != "cat"]
    assert stats.points(stats.contrast([(1, cat, rest), (-1, none, rest)], runs)) in ours["(a) 1"]
    rest.remove("automobile")
    assert stats.points(stats.contrast([(1, cat, rest), (-1, car, rest)], runs)) in ours["(b) 1"]
    moved = results.pick(everything(), transfer=True)
    terms = [(1, results.pick(moved, split="esat"), None), (-1, results.pick(moved, split="full"), None)]
    ours = by_claim(claims.claims(moved)["cifar100->cifar10", "g"][0], 2)
    assert stats.points(stats.contrast(terms, moved)) in ours["(g) less)"]


@pytest.mark.parametrize("least,some,most,expected", [(20, 40, 60, "contradicted"), (25, 56.5, 60, "open")])
def test_recovering_90_percent(least, some, most, expected):
    """Claim (c): the interval of a ratio by the delta method, and a verdict that counts no AT."""
    none, half, full = (three(split, x / 100, n=10000, A=A) for split, x, A in (
        ("none", least, 0), ("esat", some, 25000), ("full", most, 50000)))
    pool, share = [*none, *half, *full], (some - least) / (most - least)
    row, = [row for row in claims.claims(pool)["cifar10", "g"][0] if row[0].startswith("(c)")]
    _, *ends = stats.contrast([(1, half, None), (-share, full, None), (share - 1, none, None)], pool)
    low, high = (100 * (share + end / (most - least)) for end in ends)
    assert f"{100 * share:.0f} % [{low:.0f}, {high:.0f}]" in row[2]
    assert row[3] == expected


@pytest.mark.parametrize("sign", [1, -1])
def test_fig2_is_compared_with_the_papers_by_rank(sign):
    ours = {c: [run("csat", [0.5 + sign * (v - 50) / 100 for v in row], A_classes=(c,))]
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


def test_class_order_is_compared_with_the_papers():
    def correlation(name, classes, scores=range(10, 0, -1)):
        """That of a ranking with these classes, hardest first."""
        rows = [{"class": c, "entropy": s} for c, s in zip(classes, scores)]
        return claims.class_order_correlation({"fingerprint": {"name": name, "classes": list(classes)},
                                               "classes_hardest_first": rows}, "entropy")

    order = numbers()["class_order_hardest_first"]["cifar10"]
    order = [{"plane": "airplane", "car": "automobile"}.get(c, c) for c in order]
    assert correlation("cifar10", order) == (pytest.approx(1), 10)
    assert correlation("cifar10", order[::-1]) == (pytest.approx(-1), 10)
    assert correlation("cifar10", order, [1] * 10) == (pytest.approx(1), 10), "ties"
    assert correlation("cifar100", ["road", "otter", "none such", "bee"])[1] == 3
    assert correlation("digits", "012") is None


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
    ours = published_setting("cifar100->cifar10")
    for data in ("cifar100->cifar10", "cifar100->mine", "digits"):  # the paper lacks two of them
        assert differences_from_paper(data, ours) == ""
    for key, value, text in (("norm", "linf", "norm linf (l2)"), ("steps", 10, "steps 10 (7)"),
                             ("lr_decays", [10], "lr decays 10 (100 150)"), ("augment", "crop", "augment crop"),
                             ("step_size", 0.2, "step size 0.2 (0.1)"), ("N", 5000, "N 5000 (50000)"),
                             ("target's epochs", 3, "target's epochs 3 (40)"), ("lr_decays", [], "none (100")):
        assert text in differences_from_paper("cifar100->cifar10", {**ours, key: value})


@pytest.mark.parametrize("norm,eps,beside", [("l2", 0.5, True), ("linf", 8 / 255, False), ("l2", 1.0, False)])
def test_another_threat_model_is_not_put_beside_the_papers_numbers(tmp_path, norm, eps, beside):
    other = {"setting": {**SETTING, "norm": norm, "eps": eps}}
    runs = [run("full", 0.7, A=50000, **other), run("none", 0.0, A=0, **other),
            run("esat", 0.6, A=25000, **other)]
    (rows, _), = claims.claims(runs).values()
    assert {row[0][:3]: row[1] != "-" for row in rows} == {"(c)": beside, "(e)": beside}
    text = "\n".join(tables.curve_section(runs, tmp_path, FIG6))
    assert ("paper robust %" in text) == beside
    assert (figures.PALE in (tmp_path / "fig6.svg").read_text()) == beside


def test_random_classes_are_grouped_by_their_number():
    """Random subsets of two classes differ in |A|: they are still seeds of one point."""
    runs = [run("csat", 0.5, order="random", A_classes=tuple(names), A=A, seed=seed) for names, A, seed in (
        (["cat", "dog"], 250, 0), (["cat", "ship"], 260, 1))]
    assert tables.lines_of(runs, "order") == {"random": {2: runs}}
    assert runs[0].kind == runs[1].kind


def test_other_settings_are_apart_and_repeats_are_no_seeds(capsys):
    runs = [published_run("cpu-full-seed0", f"{name}/result.json", **args) for name, args in (
        ("one", {}), ("twin", {}), ("seed", {"seed": 1}), ("lr", {"lr": 0.7}))]
    runs = results.without_repeats(runs)
    results.name_groups(runs)
    assert [(r.path, ", lr 0.7" in r.group) for r in runs] == [("one", False), ("seed", False), ("lr", True)]
    assert runs[0].group == runs[1].group
    assert "twin" in capsys.readouterr().out


def test_float32_wins_over_bf16_and_groups_name_bf16():
    runs = [run("full", 0.5, seed=s, precision=p) for s in range(3) for p in ("bf16", "float32")]
    assert results.without_repeats(runs) == runs[1::2]
    for some, text in (([runs[0], runs[2], runs[5]], "2 of 3 runs trained in bf16"),
                       (runs[::2], "trained in bf16")):
        results.name_groups(some)
        assert {r.group for r in some} == {f"{results.setting_as_text(SETTING)}, {text}"}


def test_heads_on_one_network_are_no_seeds():
    runs = [published_run("cifar100-cpu-full-seed0-seed0", source={"seed": source}, seed=head)
            for source, head in ((0, 1), (0, 0), (1, 1))]
    assert results.without_repeats(runs) == runs[1:]
    assert stats.seeds(runs) == 2


def test_a_sources_threat_model_is_part_of_the_setting():
    one, other = (published_run("cifar100-cpu-full-seed0-seed0", source={"eps": eps}) for eps in (0.5, 2.0))
    assert one.setting != other.setting
    assert one.setting["eps"] == other.setting["eps"] == 0.5
    assert comparable_data(one.data, one.setting) == "cifar100->cifar10"
    assert comparable_data(other.data, other.setting) == ""


def test_different_rankings_are_named():
    one, other, chance = (run("esat", 0.5, ranking=ranking) for ranking in ("x", "y", ""))
    assert results.ranking_cautions([one, chance]) == ""
    assert "by entropy used 2 different rankings" in results.ranking_cautions([one, other, chance])


def test_tables_of_curves(tmp_path):
    runs = [run("full", 0.7, A=50000), run("esat", 0.6, A=25000), run("esat", 0.5),
            *(run("esat", share, A=25000, order="random", seed=seed) for seed, share in enumerate((0.4, 0.6)))]
    text = "\n".join(tables.curve_section(runs, tmp_path, FIG6))
    for line in ("| hardest | 25,000 | 0.50 | 1 | 1 | 60.0 [56.9, 63.0] | 100.0 [99.6, 100.0] "
                 "| 66.4 | -6.4 | 89.3 | +10.7 |",
                 "| random | 25,000 | 0.50 | 1 | 2 | 50.0 ± 14.1 | 100.0 ± 0.0 | 64.5 | -14.5 | 91.0 |",
                 "| AT | 50,000 | 1.00 | 1 | 1 | 70.0 [67.1, 72.8] |", "| no AT | no run yet |",
                 "Missing runs of these lines: random at |A| = 5,000, the baseline no AT."):
        assert line in text
    assert "Not the paper's setting" not in text


def test_the_authors_attack_stands_beside_pgd_and_in_no_other_table(tmp_path):
    """Neither the claims nor the pooled noise nor Fig. 2's own table change."""
    plain = [*three("none", 0.02), *three("csat", 0.38, A_classes=("cat",), weight="balanced")]
    more = three("csat", 0.8, A_classes=("cat",), weight="balanced", attack="pgd-authors")
    assert tables.claims_section(plain + more) == tables.claims_section(plain)
    before, after = (tables.matrix_section(runs, tmp_path) for runs in (plain, plain + more))
    added = [text for text in after if text not in before]
    assert [text for text in after if text in before] == before
    assert "| cat | pgd | 3 | 38.0 ± 1.0 | 38.0 ± 1.0 | 38.0 ± 1.0 |" in added[1]
    assert "| cat | pgd-authors | 3 | 80.0 ± 1.0 | 80.0 ± 1.0 | 80.0 ± 1.0 |" in added[1]
    assert tables.matrix_section(more, tmp_path) == ["## Fig. 2: CSAT on a single class", "No runs yet."]


def test_pale_baselines_alone_are_named_in_the_legend(tmp_path):
    name = "linf eps 0.0313725, AutoAttack's apgd-ce and apgd-t, n = 1,000"  # 60 columns end after "n ="
    group = figures.Group("cifar10", name, [], {}, {"no AT": [], "AT": []}, "cifar10")
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


@pytest.mark.slow
def test_readme_is_made_from_the_published_results(tmp_path):
    shutil.copytree(HERE / "results-published", tmp_path / "r")
    shutil.copy(HERE / "README.md", tmp_path / "README.md")
    report.main(["--results", str(tmp_path / "r"), "--into", str(tmp_path / "README.md")])
    assert (tmp_path / "README.md").read_text() == (HERE / "README.md").read_text(), \
        "python report.py --results results-published --into README.md"
    assert (tmp_path / "r" / "tables.md").read_text() == (HERE / "results-published/tables.md").read_text()


def test_report_of_a_pipeline(pipeline):
    text = (pipeline / "tables.md").read_text()
    accuracy = read_json(pipeline / "digits0-4/b/result.json")["accuracy"]["B_val"]["robust"]
    robust, low, high = (100 * accuracy[k] for k in ("accuracy", "low", "high"))
    row = f"\\| hardest \\| 2 classes \\| 0.40 \\| .* \\| {robust:.1f} \\[{low:.1f}, {high:.1f}\\] \\|"
    assert re.search(row, text.split("## Fig. 4 and 5")[1].split("## Fig. 13")[0])
    for line in ("Missing runs of these lines: the baseline AT.", "runs of these tables used it.",
                 "digits0-4->digits5-9", "AutoAttack's apgd-ce, n = 24", "## Fig. 2"):
        assert line in text
    assert re.search(r"\| digits0-4/b \| best\.pt \| l2 eps", text.split("## Evaluations under other")[1])
    assert sorted(path.stem for path in (pipeline / "figures").glob("*.png")) == [
        "cost", "fig13", "fig3", "fig5", "fig8"]
    assert (pipeline / "figures" / "fig5.svg").exists()


def test_the_report_and_the_list_of_runs_need_no_torch():
    code = "import sys, report, run_all; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert done.stdout == "False\n"


@pytest.fixture(scope="module")
def listed():
    """All stages, repeats included, and {folder: (stage, its parsed arguments)}."""
    parsers = {"sat.py": sat.command_line, "transfer.py": transfer.command_line,
               "rank.py": functools.partial(config.parse, "rank.py", "")}
    with pytest.MonkeyPatch.context() as patch:  # a thousand commands share a few configs
        patch.setattr("config.from_yaml", functools.cache(config.from_yaml))
        stages = list(experiments.stages(experiments.SECTIONS, [], "results", {}))
        return stages, {stage.folder: (stage, parsers[stage.script](stage.arguments))
                        for stage in {stage.folder: stage for stage in stages[::-1]}.values()}


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


def test_every_run_of_the_paper_is_listed_once(listed):
    rows = [line[2:].rsplit(maxsplit=4) for line in experiments.overview(listed[0])[1:]]
    assert COUNTS.items() <= {row[0].strip(): [int(v) for v in row[1:4]] for row in rows}.items()
    runs = [args for stage, args in listed[1].values() if stage.script == "sat.py" and args.run is None]
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


def test_sources_and_rankings_are_made_before_they_are_used(listed):
    made, sources = set(), {}
    for folder in dict.fromkeys(stage.folder for stage in listed[0]):
        stage, args = listed[1][folder]
        made.add(folder)
        if stage.script == "transfer.py":
            assert args.checkpoint.parent.as_posix() in made
            sources.setdefault(args.dataset, set()).add(args.checkpoint.parent.name)
        elif stage.script == "sat.py" and args.split not in ("none", "full") and not args.classes:
            assert f"results/{args.dataset}/rank-{args.arch}-seed0" in made
    assert sources["svhn"] == {r for r in sources["cifar10"] if r.startswith(("none", "full", "esat"))
                               and "fgsm" not in r}
    assert all("emphasis" in r or r.startswith(("none", "full")) for r in sources["caltech256"])
    assert sources["caltech256"] == sources["flowers102"]


def test_the_folders_are_those_that_the_scripts_make(listed):
    for folder, (stage, args) in listed[1].items():
        name = f"rank-{args.arch}-seed0" if stage.script == "rank.py" else args.run
        if name is None:
            name = sat.run_folder(args)[0].name
        assert folder == f"results/{args.dataset}/{name}"


def dry_run(*argv, **env):
    """Runs ./run_all.sh --dry-run with these words, and `env` added to the environment."""
    return subprocess.run([str(HERE / "run_all.sh"), "--dry-run", *argv], capture_output=True, text=True,
                          env={**os.environ, **env})


def test_nproc_starts_torchrun():
    from torch.distributed.run import parse_args
    lines = [line for line in dry_run("digits", "fig2", NPROC="4").stdout.splitlines() if "sat.py" in line]
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
    done = dry_run(*argv, **env)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*\n", done.stderr)
    assert expected in done.stderr


def test_extra_flags_change_costs_and_not_the_names(monkeypatch, capsys):
    monkeypatch.setenv("EXTRA", "--epochs 40")
    run_all.main(["--dry-run", "cifar10", "fig2"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "sat.py" in line]
    parsed = [sat.command_line(shlex.split(line)[2:]) for line in lines]
    assert [args.run for args in parsed[:3]] == ["none-seed0", "full-seed0", "csat-airplane-balanced-seed0"]
    assert all(args.epochs == 40 for args in parsed)
    plain, other = ({s.folder: s.cost for s in experiments.stages(["transfer"], ["fig16"], "r", extra)}
                    for extra in ({}, {"epochs": 2, "steps": 1}))
    assert plain["r/cifar100/esat-hardest-0.5-emphasis-seed0"] == 50000 * 200 * 10
    assert other["r/cifar100/esat-hardest-0.5-emphasis-seed0"] == 50000 * 2 * 4
    assert plain["r/cifar100/esat-hardest-0.5-emphasis-attack=fgsm-rs-seed0"] == 50000 * 200 * 4
    assert plain["r/cifar10/cifar100-none-seed0-seed0"] == 50000 * 40
    assert other["r/cifar10/cifar100-none-seed0-seed0"] == 50000 * 2
    arch, = (stage.folder for stage in experiments.stages(["digits"], ["fig3"], "r", {"arch": "resnet50"}))
    assert arch == "r/digits/rank-resnet50-seed0"


# In place of a Python: notes its call, fails or waits for some runs, and writes the result of a stage.
STUB = f"""#!{sys.executable}
import os, sys, time
from pathlib import Path
script, *words = sys.argv[1:]
with open("calls", "a") as f:
    f.write(" ".join(sys.argv[1:]) + chr(10))
if "report.py" in script:
    sys.exit()
values = dict(zip(words, words[1:]))
if values.get("--run", "") == os.environ.get("FAILS"):
    sys.exit("no such luck")
if values.get("--run", "") == os.environ.get("WAITS"):
    time.sleep(3)
dataset = "digits5-9" if "digits5-9.yaml" in str(words) else values.get("--dataset", "digits")
folder = Path("results", dataset, values.get("--run", "rank-preactresnet8-seed0"))
assert "transfer.py" not in script or Path(words[0]).with_name("result.json").exists()
folder.mkdir(parents=True)  # a second one would fail
time.sleep(0.02)
(folder / ("rank.json" if "rank.py" in script else "result.json")).write_text("")
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that starts run_all.py with STUB, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("python").write_text(STUB)
    Path("python").chmod(0o755)
    return lambda *argv, **env: subprocess.Popen(
        [sys.executable, str(HERE / "run_all.py"), *argv], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHON": "./python", **env})


def calls():
    """The calls that the stub noted, but for that of the report."""
    return [line for line in Path("calls").read_text().splitlines() if "report.py" not in line]


@pytest.mark.slow
def test_finished_stages_are_skipped_and_missing_ones_named(start):
    folder = Path("results/digits/quick-csat-0-balanced-seed0")
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    process = start("digits", "fig2", FAILS="quick-csat-2-balanced-seed0")
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "csat-0-balanced-seed0" not in " ".join(calls())
    assert "csat-9-balanced-seed0" in " ".join(calls())
    assert "report.py" in Path("calls").read_text()
    assert re.search("1 missing.*\n.*digits/quick-csat-2-balanced-seed0", errors)
    assert "no such luck" in out
    assert "no such luck" in Path("results/logs/digits_quick-csat-2-balanced-seed0.log").read_text()


@pytest.mark.slow
def test_two_run_alls_at_once(start, listed):
    """Every run of a section exactly once, whichever of two copies makes it; a transfer after its source."""
    for process in [start("digits"), start("digits")]:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    digits = [folder for folder in listed[1] if folder.startswith("results/digits")]
    assert len(calls()) == len(set(calls())) == len(digits)


@pytest.mark.slow
def test_run_all_that_was_killed_is_taken_over_at_once(start):
    """Killed with -9, its run going on: a second copy waits for that run, does not start it again, and makes
    the rest."""
    one = start("digits", "fig2", WAITS="quick-csat-3-balanced-seed0")
    while not Path("calls").exists() or "csat-3-balanced-seed0" not in Path("calls").read_text():
        time.sleep(0.05)
    one.kill()
    process = start("digits", "fig2")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert len(calls()) == len(set(calls())) == 12


def test_glibc_keeps_memory_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr(run_all.Path, "glob", lambda self, pattern: iter(()))  # no GPU
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "7")
    assert run_all.environment()["MALLOC_MMAP_MAX_"] == "0"
    assert run_all.environment()["MALLOC_TRIM_THRESHOLD_"] == "7"


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
