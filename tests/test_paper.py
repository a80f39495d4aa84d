"""The paper's figures: their runs and what makes these; accuracies, contrasts, verdicts, tables, figures."""
import functools
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import bench
import config
import evaluate
import report
import sat
from common import HERE, UserError
from paper import claims, experiments, figures, published, results, short, stats, tables
from runs import load

CLASSES = experiments.CIFAR10
FIG5, FIG6, *_ = tables.CURVE_FIGURES
MOVED = {"transfer": True, "dataset": "cifar100->cifar10", "n_classes": 100}
SETTING = {**published.published_setting("cifar10"), "n": 1000}


def published_run(name, source=(), **args):
    """A published Run with these flags in place of its own and, in a transfer, of its source's."""
    path = HERE / f"results-published/cifar10/{name}/result.json"
    result = load(path)
    result["args"] |= args
    result.get("source", result)["args"] |= source
    return results.Run(path, result)


def run(split, robust, clean=1.0, n=1000, **values):
    """A Run on CIFAR-10 with n test examples in ten equal classes. robust, clean: the share of them that is
    right, one or ten numbers, or which of them are, bool (n,)."""
    y, place, right = np.arange(n) // (n // 10), np.arange(n) % (n // 10), []
    for shares in (clean, robust):
        shares = shares if np.size(shares) == n else np.broadcast_to(shares, 10)[y]
        right.append(torch.from_numpy(place < np.rint(np.multiply(shares, n // 10))))
    A_classes = None if values.get("transfer") else values.get("A_classes")
    one = published_run("cpu-full-seed0")
    vars(one).update({"split": split, "setting": SETTING, "group_name": "g", "n_A": 5000,
                      "accuracy": evaluate.accuracies(*right, torch.from_numpy(y), CLASSES, A_classes),
                      "order": "named" if A_classes else "hardest", "last_accuracies": None, **values})
    return one


def three(split, robust, clean=0.9, **values):
    """Three seeds of a setting, a point apart."""
    return [run(split, np.add(robust, shift), np.add(clean, shift), seed=seed, **values)
            for seed, shift in enumerate((-0.01, 0.0, 0.01))]


@pytest.mark.parametrize("kind,classes,between", [
    ("robust", CLASSES, 0), ("robust", CLASSES[1:], 0), ("clean", CLASSES, 81), ("clean", CLASSES[1:], 100)])
def test_a_contrast_by_hand(kind, classes, between):
    """From the differences example by example. Between seeds robust accuracy is the same, and clean accuracy
    deviates by 10 points on all classes but the first. Degrees of freedom are Satterthwaite's."""
    draws = np.random.default_rng(0).permuted(np.tile(np.arange(100) / 100, (20, 1)), axis=1).reshape(2, 1000)
    shift, seeds = 0.1 * (np.arange(1000) >= 100), range(3)
    a, b = ([run(split, draw < 0.5, draw < middle + (seed - 1) * shift - 1e-9, seed=seed) for seed in seeds]
            for draw, split, middle in zip(draws, ("full", "none"), (0.7, 0.4)))
    rights = [np.mean([np.concatenate([r.right(kind, c) for c in classes]) for r in runs], axis=0)
              for runs in (a, b)]
    difference, training = 100 * (rights[0] - 0.5 * rights[1]), 1.25 * between / 3
    test = np.var(difference, ddof=1) / len(difference)
    df = (test + training)**2 / (training**2 / 4 + test**2 / 999)
    assert stats.Noise([*a, *b], kind, classes).variance == pytest.approx(between)
    value, low, high = stats.contrast([(1, a, classes), (-0.5, b, classes)], [*a, *b], kind)
    assert value == pytest.approx(difference.mean())
    assert (high - low) / 2 == pytest.approx(scipy.stats.t.ppf(0.975, df) * (test + training)**0.5, rel=1e-4)


def test_classes_without_examples():
    single = [run("csat", x, A_classes=(c,)) for x, c in ((0.2, "cat"), (0.3, "automobile"), (0.4, "dog"))]
    none, empty = three("none", 0.1), {"n": 0, "accuracy": None, "right": ""}
    for r in (*single, *none):
        r.accuracy["classes"]["frog"] = {"robust": empty}
    (rows, _), = claims.claims([*single, *none]).values()
    assert "gives the 7 classes" in rows[1][0]
    assert " 24 cells " in claims.agreement_with_fig2(CLASSES, claims.single_classes(single))


@pytest.mark.slow
@pytest.mark.parametrize("truth,training,test,least,most", [
    (0.0, 0.03, 0.0, 0, 11), (0.0, 0.003, 0.4, 0, 11), (0.1, 0.01, 0.1, 160, 200)])
def test_verdicts_on_synthetic_results_whose_truth_is_known(truth, training, test, least, most):
    """How many of 200 draws of nine settings with three seeds "hold". `training`: the deviation between
    seeds, `test`: that of how often a setting gets a single example right. Each of the two decides once."""
    def setting(A, shift):
        chances = easy + shift + rng.normal(0, test, n)
        return [run("esat", rng.random(n) < chances + rng.normal(0, training), n=n, seed=seed, n_A=A)
                for seed in range(3)]
    rng, holds, n = np.random.default_rng(1), 0, 500
    for draw in range(200):
        easy = rng.uniform(0.2, 0.8, n)  # of a new test set, the same for all settings
        one, other = setting(1, truth), setting(2, 0.0)
        if draw % 5 == 0:  # new ones for every draw would take long
            pool = [r for A in range(3, 10) for r in setting(A, 0.0)]
        classes = (CLASSES[1:], CLASSES[:-1]) if draw % 2 else (None, None)  # other classes pair less well
        interval = stats.contrast([(1, one, classes[0]), (-1, other, classes[1])], [*one, *other, *pool])
        holds += claims.verdict("above", interval, (one, other), one) == "holds"
    assert least <= holds <= most


@pytest.mark.parametrize("rule,interval,expected", [
    ("above", (1, 0.1, 2), "holds"), ("above", (0, -1, 1), "open"), ("above", (-1, -2, -0.1), "contradicted"),
    ("within", (0, -2.9, 2.9), "holds"), ("within", (2, 1, 3.1), "open"),
    ("within", (5, 3.1, 7), "contradicted"), ("within", (-5, -7, -3.1), "contradicted"),
    ("not below", (9, -2.9, 20), "holds"), ("not below", (-4, -5, -3.1), "contradicted"),
    ("below", (-9, -20, -3.1), "holds"), ("below", (-4, -5, -2.9), "open"),
    ("below", (0, -2.9, 20), "contradicted")])
def test_verdict_rules(rule, interval, expected):
    """With one seed a claim is decided where other settings show the noise of training. No AT, near 0 %,
    varies too little for that."""
    runs, near_0 = three("full", 0.5), three("none", 0.02)
    assert claims.verdict(rule, interval, (runs, runs), runs) == expected
    assert claims.verdict(rule, interval, (runs[:1], runs), runs) == f"{expected} (one seed)"
    for pool in (runs[:1], near_0):
        assert claims.verdict(rule, interval, (runs[:1], runs), pool) == "open (one seed)"
        assert claims.verdict(rule, interval, (runs, runs[:1]), runs, pool) == "open (one seed)"


def everything():
    """Runs of three seeds with a clear order, as the paper has it. CSAT differs on its own class."""
    runs = [*three("none", 0.02, 0.95, n_A=0), *three("full", 0.60, 0.85, n_A=50000)]
    for A, *values in ((5000, 0.45, 0.20, 0.45), (25000, 0.59, 0.50, 0.58)):
        for order, robust in zip(("hardest", "easiest", "random"), values):
            runs += three("esat", robust, n_A=A, order=order)
    for c, weight, own, others in (("cat", "balanced", 0.1, 0.38), ("automobile", "balanced", 0.9, 0.17),
                                   ("cat", "vanilla", 0.15, 0.15), ("automobile", "vanilla", 0.15, 0.15)):
        runs += three("csat", np.where(np.array(CLASSES) == c, own, others), A_classes=(c,), weight=weight)
    for weight, robust in (("vanilla", 0.1), ("balanced", 0.3), ("emphasis", 0.37)):
        runs += three("csat", robust, A_classes=tuple("abcdefghij"), weight=weight, **MOVED)
    return [*runs, *three("full", 0.40, n_A=50000, **MOVED),
            *three("esat", 0.42, n_A=15000, weight="emphasis", **MOVED)]


def test_claims_get_the_verdict_of_their_interval():
    runs = everything()
    (rows, noise), (transferred, _) = claims.claims(runs).values()
    balanced = claims.FIG2["balanced"].split()[-1]
    verdicts = {f"{row[0][:3]} {row[0].split()[-1]}": row[3] for row in [*rows, *transferred]}
    assert verdicts == {
        f"(a) {balanced}": "holds: 2 of 2 classes", "(a) 1": "holds: 2 of 2 classes",
        f"(b) {balanced}": "holds", "(b) 1": "open", "(c) robustness": "holds", "(d) easiest": "holds",
        "(d) hardest": "holds", "(h) 0.5)": "holds", "(e) clean)": "holds", "(f) balanced": "holds",
        "(f) vanilla": "holds", "(g) less)": "holds"}
    assert noise.df == 22, "eleven settings of three seeds; no AT, at 2 %, has no room for noise"
    assert noise.variance == pytest.approx(1)
    assert stats.Noise(runs[:3]).variance == pytest.approx(1), "no AT alone"
    random_classes = three("csat", 0.3, order="random", A_classes=("cat",), weight="vanilla")
    random_classes[0].A_classes = ("dog",)
    assert stats.Noise([*runs, *random_classes]).df == stats.Noise(runs).df, "other classes are no noise"
    assert "+25.0, +9.0: +16.0 [" in rows[-1][2]
    assert "42.0, 40.0: +2.0 [" in transferred[-1][2]
    plain, others = results.pick(runs, transfer=False), [c for c in CLASSES if c not in ("cat", "automobile")]
    cat, car = (results.pick(plain, A_classes=(c,), weight="balanced") for c in ("cat", "automobile"))
    for row, one, other, classes in ((rows[0], cat, runs[:3], [*others, "automobile"]),
                                     (rows[2], cat, car, others)):
        interval = stats.contrast([(1, one, classes), (-1, other, classes)], plain)
        assert stats.interval_text(interval) in row[2]
    (rows, noise), _ = claims.claims([r for r in runs if r.seed == 0]).values()
    assert {row[3] for row in rows} == {"open (one seed)", "open (one seed): 2 of 2 classes"}
    assert noise.df == 0
    hardest, easiest = three("esat", 0.2), three("esat", 0.45, order="easiest")
    for random, decision in ((0.45, "holds"), (0.1, "contradicted")):  # far above or below the hardest
        (rows, _), = claims.claims([*hardest, *easiest, *three("esat", random, order="random")]).values()
        assert [row[3] for row in rows] == ["contradicted", decision]
    (rows, _), = claims.claims([*hardest, easiest[0]]).values()
    assert [row[3] for row in rows] == ["contradicted (one seed)"]


def test_a_contrast_refuses_a_run_in_two_terms():
    runs = three("full", 0.5)
    with pytest.raises(ValueError, match="a run is given twice"):
        stats.contrast([(1, runs, CLASSES[:5]), (-1, runs[:1], CLASSES[5:])], runs)


def test_a_difference_of_two_test_sets_by_hand():
    """Variances 4 and 1 with 10 and 5 degrees of freedom."""
    value, low, high = stats.difference((5.0, 4.0, 10), (2.0, 1.0, 5))
    assert value == 3
    assert (high - low) / 2 == pytest.approx(scipy.stats.t.ppf(0.975, 25 / (16 / 10 + 1 / 5)) * 5**0.5)


def test_hard_and_easy_examples_on_two_data_sets():
    """Claim (i): only for groups of the same conditions, and not without both orders on both."""
    def rows(other):
        return [row for row in claims.claims([*ours, *other])["cifar10", "g"][0] if row[0][:3] == "(i)"]
    ours = [*three("esat", 0.45), *three("esat", 0.20, order="easiest")]
    hard = three("esat", 0.24, dataset="cifar100")
    easy = three("esat", 0.15, order="easiest", dataset="cifar100")
    excess = stats.difference(*(stats.estimate([(1, one, None), (-1, other, None)], [*one, *other])
                                for one, other in ((ours[:3], ours[3:]), (hard, easy))))
    (_, *row), = rows([*hard, *easy])
    assert row == ["+27.9, +9.9: +18.0", f"+25.0, +9.0: {stats.interval_text(excess)}", "holds"]
    assert rows(hard) == []
    for r in hard:
        r.setting = {**SETTING, "epochs": 3}
    assert rows([*hard, *easy]) == []


def test_the_authors_attack_gets_the_verdict_that_was_predicted():
    """(j): A_val of cat falls, that of automobile stays."""
    def csat(c, own, **values):
        robust = np.where(np.array(CLASSES) == c, own, 0.3)
        return three("csat", robust, A_classes=(c,), weight="balanced", **values)
    pgd = [*csat("cat", 0.79), *csat("automobile", 0.92)]
    for cat, car, decisions in ((0.5, 0.92, ["holds", "holds"]), (0.79, 0.5, ["contradicted"] * 2)):
        authors = [*csat("cat", cat, attack="pgd-authors"), *csat("automobile", car, attack="pgd-authors")]
        (rows, noise), = claims.claims([*pgd, *authors]).values()
        assert noise.df == 4, "of PGD alone"
        assert [row[3] for row in rows] == decisions
        assert [row[1] for row in rows] == ["50 (cat)", "94 (automobile)"]
        assert rows[0][2].startswith(f"{100 * cat:.1f}, 79.0: {100 * cat - 79:+.1f} [")
        assert rows[1][2].startswith(f"{100 * car:.1f}, 92.0: {100 * car - 92:+.1f} [")


def test_clean_accuracies_at_different_learning_rates_are_not_compared():
    """Claim (e): no AT was selected after one decay, one seed of AT after two."""
    runs = [run("none", 0.0, 0.9, decays=1, epoch=9), run("full", 0.4, 0.8, decays=1, epoch=9),
            run("full", 0.4, 0.8, decays=2, epoch=12, seed=1)]
    assert claims.why_e_is_undecided(runs[:2]) == ""
    assert [row[0][:3] for row in claims.claims(runs[:2])["cifar10", "g"][0]] == ["(e)"]
    assert claims.claims(runs) == {}
    start = ("(e) has no row: the checkpoints were selected at different learning rates, "
             "of no AT at epoch 9, of AT at epoch 9, 12")
    end = "and the accuracies after the last epoch are not known."
    assert claims.why_e_is_undecided(runs) == f"{start}, {end}"
    for r, clean in zip(runs, (0.9, 0.8, 0.7)):
        r.last_accuracies = {"n": 250, "clean": clean, "robust": 0.1}
    assert claims.why_e_is_undecided(runs) == (
        f"{start}. After the last epoch, clean accuracy on the 250 examples that select a checkpoint was "
        "90.0 % of no AT, 75.0 % of AT.")


@pytest.mark.parametrize("least,some,most,expected", [(20, 40, 60, "contradicted"), (25, 56.5, 60, "open")])
def test_recovering_90_percent(least, some, most, expected):
    """Claim (c): the interval of a ratio by the delta method, and a verdict that counts no AT."""
    none, half, full = (three(split, x / 100, n=10000, n_A=A) for split, x, A in (
        ("none", least, 0), ("esat", some, 25000), ("full", most, 50000)))
    pool, share = [*none, *half, *full], (some - least) / (most - least)
    _, *ends = stats.contrast([(1, half, None), (-share, full, None), (share - 1, none, None)], pool)
    low, high = (100 * (share + end / (most - least)) for end in ends)
    row = claims.recovery_claim(pool, none, half, full, "cifar10")
    behind = stats.interval_text(stats.contrast([(1, half, None), (-1, full, None)], pool))
    assert row[2].endswith(f": {100 * share:.0f} % [{low:.0f}, {high:.0f}]; half minus AT {behind}")
    assert row[3] == expected


@pytest.mark.parametrize("sign", [1, -1])
def test_fig2_is_compared_with_the_papers_by_rank(sign):
    ours = {c: [run("csat", [0.5 + sign * (v - 50) / 100 for v in row], A_classes=(c,))]
            for c, row in zip(CLASSES, published.numbers()["fig2"]["robust_rows_are_A"])}
    text = claims.agreement_with_fig2(CLASSES, ours)
    assert f"of what A gives to any other class {sign:.2f}. " in text
    assert " 90 cells " in text
    assert claims.agreement_with_fig2(CLASSES, dict(list(ours.items())[:2])) == "", "too few classes"
    assert claims.agreement_with_fig2(CLASSES, {f"own {c}": rs for c, rs in ours.items()}) == ""
    cells = {(a, c): 2 * "abc".index(a) + 10 * "abcd".index(c) for a in "abc" for c in "abcd" if a != c}
    assert claims.effects_of_A(cells) == pytest.approx({"a": -2, "b": 0, "c": 2})


def test_a_cifar10_with_classes_of_other_names_has_no_numbers_of_the_paper(tmp_path):
    rows = [{"class": str(c), "entropy": 0.1 * c, "clean_error": None, "n": 0} for c in range(3)]
    ranking = {"fingerprint": {"name": "cifar10", "classes": list("012")}, "args": {"arch": "a"}, "epochs": 1,
               "classes_hardest_first": rows, "spearman_of_examples": {}}
    three_paths = [tmp_path / folder / "rank/rank.json" for folder in "abc"]
    text = "\n".join(tables.difficulty_section(dict.fromkeys(three_paths, ranking), tmp_path))
    assert text.count("| 2 | 0.2000 | - | 0 | - | - |") == 3
    titles = [line for line in text.splitlines() if line.startswith("### ")]
    assert len(set(titles)) == 3, "folders of one name"
    single = {c: [run("csat", robust, A_classes=(c,))] for c, robust in zip(CLASSES, (0.4, 0.5, 0.6))}
    assert claims.agreement_with_fig2(CLASSES, single)
    for r in single[CLASSES[0]]:
        r.accuracy["B_val"]["robust"]["n"] = 0
    assert claims.agreement_with_fig2(CLASSES, single) == "", "two classes with a B_val are too few"


def test_class_order_is_compared_with_the_papers():
    order = [{"plane": "airplane", "car": "automobile"}.get(c, c)
             for c in published.numbers()["class_order_hardest_first"]["cifar10"]]
    for name, classes, scores, expected in (
            ("cifar10", order, range(10, 0, -1), (pytest.approx(1), 10)),
            ("cifar10", order[::-1], range(10, 0, -1), (pytest.approx(-1), 10)),
            ("cifar10", order, [1] * 10, None), ("digits", "012", [3, 2, 1], None),
            ("cifar100", ["road", "otter", "none such", "bee"], [4, 3, 2, 1], (pytest.approx(-0.5), 3))):
        rows = [{"class": c, "entropy": score} for c, score in zip(classes, scores)]
        ranking = {"fingerprint": {"name": name, "classes": list(classes)}, "classes_hardest_first": rows}
        assert claims.class_order_correlation(ranking, "entropy") == expected


@pytest.mark.parametrize("figure,data,line,share,kind,expected", [
    ("fig6", "cifar10", "hardest", 0.5, "robust", 66.4), ("fig6", "cifar10", "random", 0.1, "clean", 92.9),
    ("fig6", "cifar10", "AT", 1.0, "robust", 69.0), ("fig6", "cifar10", "hardest", 0.5004, "robust", 66.4),
    ("fig6", "cifar10", "hardest", 0.504, "robust", None),
    ("fig8", "cifar100->svhn", "hardest", 0.3, "robust", 22),
    ("fig12", "cifar100", "vog", 0.1, "robust", 21.9),
    ("fig16", "imagenet200->flowers102", "fgsm-rs", 0.1, "robust", 34.9),
    ("fig7", "cifar100->cifar10", "vanilla", 0.2, "robust", None),
    ("fig5", "digits", "hardest", 0.5, "robust", None), ("fig5", "cifar10", "no AT", 0.0, "robust", 0)])
def test_the_papers_numbers(figure, data, line, share, kind, expected):
    assert published.published_accuracy(figure, data, line, share, kind) == expected


def test_every_setting_that_is_not_the_papers_is_named():
    ours = published.published_setting("cifar100->cifar10")
    for data in ("cifar100->cifar10", "cifar100->own", "digits"):  # the paper lacks two of them
        assert published.differences_from_paper(data, ours) == ""
    for key, value, text in (
            ("lr_decays", [10], "lr decays 10 (100 150)"), ("step_size", 0.2, "step size 0.2 (0.1)"),
            ("lr_decays", [], "lr decays none (100 150)"), ("norm", "linf", "norm linf (l2)"),
            ("target's epochs", 3, "target's epochs 3 (40)"), ("N", 5000, "N 5000 (50000)")):
        assert text in published.differences_from_paper("cifar100->cifar10", {**ours, key: value})
    one = published_run("cifar100-cpu-full-seed0-seed0", source={"eps": 2.0})
    assert "source's eps 2.0 (0.5)" in published.differences_from_paper(one.dataset, one.setting)
    assert published.comparable_dataset(one.dataset, one.setting) == ""
    for other, data in (({}, "cifar10"), ({"norm": "linf"}, ""), ({"eps": 1.0}, "")):
        assert published.comparable_dataset("cifar10", {**SETTING, **other}) == data


def test_repeats_are_no_seeds_and_groups_are_named_by_what_differs(capsys):
    """Of runs with the same flags and seeds the float32 one counts, of heads on one network the first."""
    runs = [run("full", 0.5, seed=s, precision=p) for s in range(3) for p in ("bf16", "float32")]
    assert results.without_repeats(runs) == runs[1::2]
    heads = [published_run("cifar100-cpu-full-seed0-seed0", source={"seed": source}, seed=head)
             for source, head in ((0, 1), (0, 0), (1, 1))]
    assert results.without_repeats(heads) == heads[1:]
    subsets = [run("csat", 0.5, order="random", A_classes=tuple(names), n_A=A, seed=seed)  # two classes each
               for names, A, seed in ((["cat", "dog"], 250, 0), (["cat", "ship"], 260, 1))]
    assert tables.lines_of(subsets, "order") == {"random": {2: subsets}}
    assert "note: 3 runs have the flags and seed of another" in capsys.readouterr().out
    runs = [published_run("cpu-full-seed0", **args) for args in ({}, {}, {"lr": 0.7})]
    runs[1].precision = runs[2].precision = "bf16"
    results.name_groups(runs)
    name = results.setting_as_text(runs[0].setting)
    assert runs[0].group_name == runs[1].group_name == f"{name}, lr 0.1, 1 of 2 runs trained in bf16"
    assert runs[2].group_name == f"{name}, lr 0.7, trained in bf16"


def test_groups_are_named_by_what_parts_them_from_those_of_the_same_name():
    runs = [published_run("cpu-full-seed0", **args) for args in ({}, {"lr": 0.7}, {"epochs": 3, "steps": 9})]
    results.name_groups(runs)
    names = [results.setting_as_text(r.setting) for r in runs]
    assert [r.group_name for r in runs] == [f"{names[0]}, lr 0.1", f"{names[1]}, lr 0.7", names[2]]


def test_the_order_of_the_attacks_parts_no_groups():
    """Else the seeds of one setting would stand in two groups, or a repeat count as a seed."""
    path = HERE / "results-published/cifar10/cpu-full-seed0/result.json"
    result = load(path)
    turned = {**result, "settings": {**result["settings"], "attacks": result["settings"]["attacks"][::-1]}}
    assert results.Run(path, turned).group_name == results.Run(path, result).group_name


def test_tables_of_curves(tmp_path):
    runs = [run("full", 0.7, n_A=50000), run("esat", 0.6, n_A=25000, scores_hash="x"),
            run("esat", 0.5, scores_hash="y"), run("esat", 0.4, n_A=25000, order="random"),
            run("esat", 0.6, n_A=25000, order="random", seed=1)]
    text = "\n".join(tables.curve_section(runs, tmp_path, FIG6, {}))
    assert "Missing runs of these lines: random at |A| = 5,000, the baseline no AT." in text
    assert "the runs by entropy used 2 different rankings" in text
    assert "Not the paper's setting" not in text
    assert figures.PALE in (tmp_path / "fig6.svg").read_text()
    own, linf = np.isin(CLASSES, ["cat", "dog"]), {"setting": {**SETTING, "norm": "linf", "eps": 8 / 255}}
    runs = [run("none", 0.1 * ~own, **linf),
            run("csat", 0.2 + 0.3 * own, A_classes=("cat", "dog"), order="hardest", **linf)]
    text = "\n".join(tables.curve_section(runs, tmp_path, FIG5, {}))
    line = r"(?m)hardest \| 2 classes \| 0.20 \| 1 \| 1 \| 26.0 .* 20.0 .* 100.0 .* \| 10.0 \|$"
    assert re.search(line, text)
    assert figures.PALE not in (tmp_path / "fig5.svg").read_text()


def test_in_short(tmp_path):
    """Of the largest group on CIFAR-10. AT costs 100 or, before a transfer, 200."""
    runs = [*three("full", 0.42, 0.65, cost=100), *three("esat", 0.20, 0.75, cost=26),
            run("esat", 0.9, n_A=25000, group_name="small"),
            *three("full", 0.3, n_A=50000, cost=200, **MOVED),
            *three("esat", 0.25, n_A=15000, w_A=9.33, weight="emphasis", cost=84, **MOVED)]
    assert short.section(runs, tmp_path)[2].splitlines()[2:] == [
        "| hardest 10 % | 26 | 20.0 ± 1.0 | 75.0 ± 1.0 | 52.1 |",
        "| everything (AT) | 100 | 42.0 ± 1.0 | 65.0 ± 1.0 | 69.0 |",
        "| transfer: hardest 30 %, w_A 9.33 (emphasis) | 42 | 25.0 ± 1.0 | 90.0 ± 1.0 | 41.8 |",
        "| transfer: everything | 100 | 30.0 ± 1.0 | 90.0 ± 1.0 | 42.8 |"]


@pytest.mark.slow
def test_readme_is_made_from_the_published_results():
    """So are docs/RESULTS.md and, beside the results, tables.md and runs.csv."""
    files = ["README.md", "docs/RESULTS.md", "results-published/tables.md", "results-published/runs.csv"]
    shutil.copytree(HERE / "results-published", "results-published",
                    ignore=shutil.ignore_patterns("tables.md", "runs.csv"))
    Path("docs").mkdir()
    for file in files[:2]:  # its tables are emptied
        text = (HERE / file).read_text()
        Path(file).write_text(re.sub(r"(?s)(<!-- table.*?\n).*?(<!-- end -->)", r"\1\2", text))
    report.main(["--results", "results-published", "--into", *files[:2]])
    for file in files:
        assert Path(file).read_bytes() == (HERE / file).read_bytes(), \
            "python report.py --results results-published --into README.md docs/RESULTS.md"
    with pytest.raises(UserError, match="asks for the table .*; there are: U"):
        report.fill_in(Path("README.md"), [["## U", "x"]])


def test_the_report_and_the_list_of_runs_need_no_torch():
    code = "import sys, report, run_all; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)


@pytest.fixture(scope="module")
def listed():
    """All stages with their parsed arguments, repeats included."""
    parsers = {"sat.py": sat.command_line,
               "transfer.py": functools.partial(config.parse, "transfer.py", "", checkpoint_help="x"),
               "rank.py": functools.partial(config.parse, "rank.py", "")}
    with pytest.MonkeyPatch.context() as patch:  # a thousand commands share a few configs
        patch.setattr("config.from_yaml", functools.cache(config.from_yaml))
        return [(stage, parsers[stage.script](stage.arguments))
                for stage in experiments.stages(experiments.SECTIONS, [], "results", {})]


def test_every_run_of_the_paper_is_listed(listed):
    expected = {  # [sat.py, transfers, new ones]; of sat.py: (hardest + easiest + random) x nine sizes
        "cifar10: baselines": [2, 0, 2], "cifar10: fig4": [9 * (2 + 10), 0, 108],
        "cifar10: fig5": [108, 0, 0], "cifar10: fig13": [108, 0, 0],
        "cifar100 -> cifar10: fig7": [9 * 3, 27 + 2, 18 + 27 + 2],  # three weights; + 2: the baselines
        "cifar100 -> cifar10: fig15": [63, 63 + 2, 54 + 54], "cifar100 -> svhn: fig14": [63, 63 + 2, 63 + 2],
        "cifar100 -> cifar10: fig16": [9 * 2, 18 + 2, 9 + 9],  # hardest, PGD-7 and FGSM-RS
        "imagenet200 -> caltech256 flowers102: fig16": [9 * 2, 2 * (18 + 2), 9 + 18]}  # two targets
    rows = [row[2:].rsplit(maxsplit=7) for row in experiments.overview([stage for stage, _ in listed])[5:]]
    assert expected.items() <= {row[0].strip(): [int(v) for v in row[1:4]] for row in rows}.items()
    kinds = {}
    for stage, r in listed:
        if stage.script == "sat.py" and r.run is None:  # those of the paper's size
            kind = (r.dataset, r.split, "named" if r.classes else r.order, r.metric, r.weight, r.attack)
            kinds.setdefault(kind, set()).add((r.classes[0] if r.classes else r.frac or r.size, r.seed))
    tenths, both = [k / 10 for k in range(1, 10)], ("vanilla", "emphasis")
    for data, seeds, sizes, weights in (("cifar10", 10, range(1, 10), ("vanilla",)),
                                        ("cifar100", 5, range(10, 100, 10), both),
                                        ("imagenet200", 3, range(20, 200, 20), both)):
        for weight, split in itertools.product(weights, ("esat", "csat")):
            for order, n in (("hardest", 1), ("easiest", 1), ("random", seeds)):
                amounts = itertools.product(tenths if split == "esat" else sizes, range(n))
                assert kinds[data, split, order, "entropy", weight, "pgd"] == set(amounts)
    for kind, amounts in (("cifar100 esat hardest entropy emphasis fgsm-rs", tenths),
                          ("imagenet200 esat hardest entropy emphasis fgsm-rs", tenths),
                          ("cifar100 csat hardest entropy balanced pgd", range(10, 100, 10)),
                          ("cifar100 esat hardest svar vanilla pgd", tenths),
                          ("cifar100 esat hardest vog vanilla pgd", tenths),
                          ("cifar10 csat named entropy balanced pgd", CLASSES),
                          ("cifar10 csat named entropy vanilla pgd", ["automobile", "cat"])):
        assert kinds[tuple(kind.split())] == {(amount, 0) for amount in amounts}


def test_stages_come_in_order_and_their_folders_are_those_of_the_scripts(listed):
    made, sources = set(), {}
    for stage, args in listed:
        name = f"rank-{args.arch}-seed0" if stage.script == "rank.py" else args.run
        if stage.script == "transfer.py":
            assert stage.needs == args.checkpoint.parent.as_posix()
            sources.setdefault(args.dataset, set()).add(args.checkpoint.parent.name)
        elif stage.script == "sat.py":
            name = name or sat.run_folder(args)[0].name
            by_ranking = args.split in ("esat", "csat") and not args.classes and args.order != "random"
            assert stage.needs == (f"results/{args.dataset}/rank-{args.arch}-seed0" if by_ranking else "")
        assert stage.needs in made or not stage.needs
        assert stage.folder == f"results/{args.dataset}/{name}"
        made.add(stage.folder)
    assert sources["svhn"] == {r for r in sources["cifar10"] if r.startswith(("none", "full", "esat"))
                               and "fgsm" not in r}
    assert all("emphasis" in r or r.startswith(("none", "full")) for r in sources["caltech256"])
    assert sources["caltech256"] == sources["flowers102"]


def test_costs_are_those_of_the_cost_model_and_of_the_measured_rates():
    """Passes of an example and epoch, ms of a step (an epoch has 390.6), passes of AutoAttack."""
    def costs(section, **extra):
        return {s.folder.removeprefix("r/"): s.cost for s in experiments.stages([section], [], "r", extra)}
    cifar10, transfer = costs("cifar10", eval_n=1000, select_attacks=["apgd-ce"]), costs("transfer")
    quick, esat = costs("transfer", epochs=2, steps=1), "cifar100/esat-hardest-0.8-emphasis"
    autoattack = 12000 * (202 + 0.5 * 9555)  # 3 candidates on 1,000, 1 on 9,000
    for one, passes, ms, evaluation in (
            (cifar10["cifar10/none-seed0"], 3, 6.5, 4000 * 202),
            (cifar10["cifar10/rank-preactresnet18-seed0"], 4, 6.5 * 4 / 3, 0),
            (transfer[f"{esat}-seed0"], 3 + 14 * 0.8, 12.86, autoattack),
            (transfer[f"{esat}-attack=fgsm-rs-seed0"], 3 + 2 * 0.8, 6.5 + 6.36 / 7, autoattack),
            (transfer["cifar10/cifar100-full-seed0-seed0"], 1 / 5, 6.5 / 3 / 5, autoattack)):
        assert one.passes == pytest.approx((50000 * 200 * passes, evaluation))
        assert one.hours == pytest.approx((200 * 390.625 * ms / 3.6e6, evaluation / 24400 / 3600))
    assert quick[f"{esat}-seed0"].passes[0] == pytest.approx(50000 * 2 * (3 + 2 * 0.8))
    assert quick["cifar10/cifar100-full-seed0-seed0"].passes[0] == 50000 * 2
    for unmeasured in (costs("imagenet200"), costs("cifar10-cpu"), costs("cifar10", device="cpu"),
                       costs("cifar10", amp="off"), costs("cifar10", batch_size=64)):
        assert {one.hours for one in unmeasured.values()} == {(None, None)}
    lines = experiments.overview(list(experiments.stages(["cifar100", "imagenet200"], ["fig6"], "r", {})))
    assert {line.split()[-1] == "-" for line in lines[5:]} == {True, False}
    arch, = (stage.folder for stage in experiments.stages(["digits"], ["fig3"], "r", {"arch": "resnet50"}))
    assert arch == "r/digits/rank-resnet50-seed0"


@pytest.mark.slow
def test_bench_counts_by_the_cost_model(capsys):
    bench.main("--image-side 8 --batch-size 8 --epochs 2 --steps 2 --threads 1".split())
    out = capsys.readouterr().out
    assert "compile off, cpu" in out, "not auto: what it comes to"
    lines = [line.strip("| ").split(" | ") for line in out.splitlines() if "| " in line]
    rows = {float(row[0]): [float(v) for v in row[1:]] for row in lines[2:]}  # ms, images/s, relative, model
    assert list(rows) == [0, 0.1, 0.5, 1]
    assert [row[3] for row in rows.values()] == [0.43, 0.49, 0.71, 1.0], "(3 + 2 * 2 share) / 7"
    assert rows[1.0][2] == 1
    assert rows[0.0][1] == pytest.approx(8000 / rows[0.0][0], rel=0.02)


def test_a_contrast_has_the_fewest_degrees_of_freedom_of_its_terms():
    """On cat only one setting is between 5 and 95 %, with 2 degrees of freedom; on the others both are."""
    is_cat, others = np.array(CLASSES) == "cat", [c for c in CLASSES if c != "cat"]
    a, b = ([run(split, np.where(is_cat, cat, rest) + shift, seed=seed)
             for seed, shift in enumerate((-0.02, 0.0, 0.02))]
            for split, cat, rest in (("full", 0.5, 0.7), ("none", 0.02, 0.4)))
    pool, terms = [*a, *b], [(1, a, ["cat"]), (-1, b, others)]
    assert [stats.Noise(pool, classes=classes).df for _, _, classes in terms] == [2, 4]
    for pairs in (terms, terms[::-1]):
        _, test, _ = stats.estimate(pairs, [])  # without the noise of training
        _, variance, df = stats.estimate(pairs, pool)
        assert df == pytest.approx(variance**2 / ((variance - test)**2 / 2 + test**2 / 999))


@pytest.mark.parametrize("other", [
    {"metric": "svar"}, {"attack": "fgsm-rs"}, {"weight": "emphasis"},
    {**MOVED, "weight": "emphasis", "metric": "svar"}, {**MOVED, "weight": "emphasis", "order": "random"},
    {**MOVED, "weight": "emphasis", "order": "easiest"}])
def test_claims_are_of_pgd_and_entropy_and_the_papers_weights(other):
    """Of the hardest in transfers. Runs of another kind, with other accuracies, change no value."""
    def values(runs):
        rows = [row for rows, _ in claims.claims(runs).values() for row in rows]
        return [row[2].split(" [")[0] for row in rows if row[0][:3] in ("(c)", "(d)", "(f)", "(g)", "(h)")]
    more = three("csat", 0.9, A_classes=tuple(CLASSES), **other)
    for A, (order, robust) in itertools.product((5000, 15000, 25000), (
            ("hardest", 0.1), ("easiest", 0.3), ("random", 0.7))):
        more += three("esat", robust, **{"n_A": A, "order": order, **other})
    before = values(everything())
    assert len(before) == 7
    assert values([*everything(), *more]) == before
    assert values([*more, *everything()]) == before


def test_the_ranking_of_a_transfer_is_sought_among_those_of_its_source():
    moved = run("esat", 0.5, transfer=True, dataset="cifar100->cifar10", scores_hash="x")
    for data, scores, caution in (("cifar100", "y", True), ("cifar100", "x", False), ("cifar10", "y", False)):
        ranking = {"fingerprint": {"name": data}, "scores": {"entropy": scores}}
        text = results.ranking_cautions([moved], {"rank.json": ranking})
        assert ("the ranking of 1 of these runs is no longer there" in text) == caution


def test_runs_on_different_images_are_named():
    pair = [run("full", 0.4, seed=seed, scores_hash="") for seed in (0, 1)]
    for images, caution in (((None, "a"), False), (("a", "a"), False), (("a", "b"), True)):
        pair[0].images_hash, pair[1].images_hash = images
        assert ("made on different images" in results.ranking_cautions(pair, {})) == caution


def test_the_table_of_evaluations_has_clean_accuracy_before_robust(tmp_path):
    result = load(HERE / "results-published/cifar10/cpu-full-seed0/result.json")
    (tmp_path / "eval-1.json").write_text(json.dumps({**result, "checkpoint": "best.pt"}))
    clean, robust = (100 * result["accuracy"]["all"][kind]["accuracy"] for kind in ("clean", "robust"))
    table = tables.evaluation_section(tmp_path)[1]
    assert re.search(rf"\| 1,000 \| {clean:.1f} \[.*\] \| {robust:.1f} \[.*\] \|$", table)
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert tables.evaluation_section(tmp_path)[1] == table
    (tmp_path / "result.json").write_text(json.dumps({**result, "weights": "of a later best.pt"}))
    assert tables.evaluation_section(tmp_path) == []


def test_a_baseline_with_random_start_is_in_the_group_of_its_runs():
    assert sat.command_line(["--random-start", "--split", "none"]).random_start
    names = {published_run(name, random_start=True).group_name
             for name in ("cpu-none-seed0", "cpu-full-seed0")}
    assert len(names) == 1


def test_one_eps_is_one_group():
    name = "cpu-linf-full-seed0"
    path = HERE / f"results-published/cifar10/{name}/result.json"
    result = load(path)
    typed = json.loads(json.dumps(result).replace("0.031372549", str(8 / 255)))
    assert typed != result
    assert results.Run(path, typed).group_name == results.Run(path, result).group_name


def test_one_run_with_examples_of_a_part_has_the_interval_of_one():
    runs = [run("csat", 0.5), run("csat", 0.7, seed=1)]
    for r, n in zip(runs, (50, 0)):
        r.accuracy["B_val"] = {"robust": {"n": n, "accuracy": 0.5 if n else None, "low": 0.4, "high": 0.6}}
    assert stats.cell(runs, "B_val") == "50.0 [40.0, 60.0]"
    assert stats.cell(runs[1:], "B_val") == "-"


def test_a_broken_log_is_one_line(tmp_path):
    folder = tmp_path / "cifar10/r"
    shutil.copytree(HERE / "results-published/cifar10/cpu-csat-cat-balanced-attack=pgd-authors-seed0", folder)
    log = folder / "log.jsonl"
    log.write_text(log.read_text()[:-20])
    with pytest.raises(UserError, match="r/result.json is not a result of this project .*JSONDecodeError"):
        results.read_runs(tmp_path)


def test_a_verdict_asks_for_the_noise_that_is_in_its_interval():
    """Clean accuracies vary between 5 and 95 % here, robust ones are near 0, where seeds hardly differ."""
    pool = [run("esat", 0.01 + 0.001 * seed, clean=0.5 + 0.02 * seed, seed=seed) for seed in range(3)]
    one, other = run("none", 0.01, clean=0.9), run("full", 0.01, clean=0.5)
    rows = [claims.compare("", "", [one], [other], pool, "above", kind)[-1] for kind in ("clean", "robust")]
    assert rows == ["holds (one seed)", "open (one seed)"]


def test_evaluations_in_tf32_say_so(tmp_path):
    evaluation = {"fingerprint": {"name": "d"}, "checkpoint": "best.pt", "accuracy": {"all": {
        kind: {"n": 10, "accuracy": 0.5, "low": 0.2, "high": 0.8} for kind in ("clean", "robust")}}}
    for i, more in enumerate(({}, {"precision": "tf32"})):
        settings = {"norm": "l2", "eps": 0.5, "attacks": ["apgd-ce"], **more}
        (tmp_path / f"eval-{i}.json").write_text(json.dumps({**evaluation, "settings": settings}))
    rows = tables.evaluation_section(tmp_path)[1].splitlines()[2:]
    assert [row.split(" | ")[3] for row in rows] == ["apgd-ce", "apgd-ce in TF32"]


def test_no_authors_claim_without_examples_of_the_class():
    names = "cpu-csat-cat-balanced-attack=pgd-authors-seed0", "cpu-csat-cat-balanced-seed0"
    authors, pgd = map(published_run, names)
    assert len(list(claims.authors_attack_claims([pgd], [authors]))) == 1
    for r in (authors, pgd):
        r.accuracy["classes"]["cat"]["robust"] |= {"n": 0, "accuracy": None, "right": ""}
    assert list(claims.authors_attack_claims([pgd], [authors])) == []


def test_hard_and_easy_are_compared_at_the_smallest_share_that_has_both():
    pool = [*three("esat", 0.5), *three("esat", 0.4, order="easiest"), run("esat", 0.3, n_A=2500)]
    row, = claims.esat_claims(pool, [], [], "cifar10")
    assert row[0] == "(d) at \\|A\\|/N = 0.1 hardest beats easiest"
    assert row[3] == "holds"


def test_other_attacks_do_not_undecide_claim_e():
    """An AT by fgsm-rs is not in (e), whatever its checkpoint's epoch."""
    none, at, other = (published_run(name) for name in ("cpu-none-seed0", "cpu-full-seed0", "cpu-full-seed1"))
    other.attack, other.decays = "fgsm-rs", 1
    results.name_groups([none, at, other])
    text = "\n".join(tables.claims_section([none, at, other], {}))
    assert "(e) AT costs clean accuracy" in text
    assert "(e) has no row" not in text


def test_results_below_a_folder_that_force_put_aside(tmp_path):
    (tmp_path / ".old-r/.old-r").mkdir(parents=True)
    for folder in (".old-r", ".old-r/.old-r"):
        (tmp_path / folder / "result.json").touch()
    assert results.result_files(tmp_path, "result.json") == []
    assert len(results.result_files(tmp_path / ".old-r", "result.json")) == 1


def test_a_linked_folder_of_a_data_set_is_read(tmp_path):
    (tmp_path / "disk/cifar10/r").mkdir(parents=True)
    (tmp_path / "disk/cifar10/r/result.json").touch()
    (tmp_path / "results").mkdir()
    (tmp_path / "results/cifar10").symlink_to(tmp_path / "disk/cifar10")
    assert results.result_files(tmp_path / "results", "result.json") == [
        tmp_path / "results/cifar10/r/result.json"]


def test_runs_that_no_figure_has_are_in_a_table(tmp_path):
    """Those of the user's own subset and weight, by another attack, and baselines on their own."""
    others = [run("esat", 0.3, order="named", n_A=700, metric="own mask.npy 1234"),
              run("esat", 0.3, weight="w_A 5"), run("csat", 0.3, attack="fgsm-rs"), run("full", 0.4)]
    in_figure = run("esat", 0.2, path="results/in-figure")
    for group in ([in_figure], [*others, in_figure]):
        for r in group:
            r.in_table = False
        for figure in tables.CURVE_FIGURES:
            tables.curve_section(group, tmp_path, figure, {})
    rows = tables.other_section([*others, in_figure])[1].splitlines()[2:]
    assert len(rows) == 3, "AT is beside the run of Fig. 6"
    assert in_figure.path not in "".join(rows)
    assert tables.other_section([in_figure]) == []


def test_runs_by_several_processes_are_no_seeds_of_runs_by_one():
    """Batch statistics are each process's own."""
    path = HERE / "results-published/cifar10/cpu-none-seed0/result.json"
    result = load(path)
    one, four = (results.Run(path, {**result, "processes": n}) for n in (1, 4))
    assert one.group_name != four.group_name
    results.name_groups([one, four])
    assert four.group_name.endswith(", processes 4")
    path = HERE / "results-published/cifar10/cifar100-cpu-none-seed0-seed0/result.json"
    result = load(path)
    moved = [results.Run(path, {**result, "source": {**result["source"], "processes": n}}) for n in (1, 4)]
    assert moved[0].group_name != moved[1].group_name, "of the source's training"


def test_a_transfer_whose_source_was_made_again_is_named():
    moved, sources = ([run("esat", 0.3, **values, seed=seed, weights_hash=str(seed), scores_hash="")
                       for seed in range(3)] for values in (MOVED, {}))
    for n, cautions in ((3, ""), (2, "the source of 1 of these transfers is no longer there"), (0, "")):
        for r in moved:
            r.accuracy = {k: v for k, v in r.accuracy.items() if not k.startswith("source")}
        results.add_source_accuracies([*moved, *sources[:n]])
        assert cautions in (text := results.ranking_cautions(moved, {}))
        assert bool(text) == bool(cautions)
