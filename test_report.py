"""What goes out: accuracies, contrasts, verdicts, tables, figures and the bench."""
import functools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch

import attacks
import bench
import claims
import evaluate
import figures
import paper
import picture
import report
import results
import stats
import transfer
from common import UserError
from conftest import HERE, script
from run_all import TEN


def test_wilson_interval():
    assert evaluate.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert (evaluate.wilson(0, 10)[0] == 0 and evaluate.wilson(10, 10)[1] == pytest.approx(1)
            and evaluate.wilson(0, 0) == (0, 1))


def test_summary():
    clean, robust = torch.tensor([1, 1, 0, 1]).bool(), torch.tensor([1, 0, 0, 0]).bool()
    found = evaluate.summary(clean, robust, torch.tensor([0, 0, 1, 2]), ["a", "b", "c"], ["b", "c"])
    pairs = {k: (v["clean"]["accuracy"], v["robust"]["accuracy"], v["clean"]["n"])
             for k, v in found.items() if k != "classes"}
    assert pairs == {"all": (0.75, 0.25, 4), "A_val": (0.5, 0.0, 2), "B_val": (1.0, 0.5, 2)}
    assert (found["classes"]["a"]["robust"]["accuracy"] == 0.5
            and found["classes"]["b"]["clean"]["accuracy"] == 0)
    assert set(evaluate.summary(clean, robust, torch.zeros(4), ["a"])) == {"all", "classes"}


def test_tables_into_a_file(tmp_path):
    file = tmp_path / "R.md"
    file.write_text("a\n<!-- table: T -->\nold | x\n<!-- end -->\nb\n")
    report.into(file, [["## T", "![f](f.png)", "| new |"], []])
    assert file.read_text() == "a\n<!-- table: T -->\n\n| new |\n\n<!-- end -->\nb\n"
    with pytest.raises(UserError, match="asks for the table 'T'; there are: U"):
        report.into(file, [["## U", "x"]])


def test_picture_of_A_and_B(pipeline, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(picture.figures, "perturbations",
                        lambda path, title, rows, magnify: seen.append((path, title, rows)))
    picture.main([str(pipeline / "digits0-4" / "b" / "best.pt"), "--out", str(tmp_path / "p.png")])
    (path, title, rows), = seen
    in_A = json.loads((pipeline / "digits0-4" / "b" / "result.json").read_text())["A_classes"]
    assert rows["A"]["class"] in in_A and rows["B"]["class"] not in in_A and "l2 eps 0.5" in title
    for r in rows.values():
        assert (r["before"][0] == r["class"] and torch.equal(r["x"] + r["delta"], r["adv"])
                and 0.4 < r["delta"].norm() <= 0.5 + 1e-6)
    picture.main([str(pipeline / "digits0-4" / "none" / "best.pt"), "--out", str(tmp_path / "p.png")])
    assert list(seen[1][2]) == ["B"]
    monkeypatch.undo()
    picture.main([str(pipeline / "digits0-4" / "none" / "best.pt"), "--out", str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").stat().st_size > 5000
    folder, = (pipeline / "digits5-9").iterdir()
    for path in (pipeline / "digits0-4" / "a" / "best.pt",
                 pipeline / "digits0-4" / "rank-preactresnet8-seed0" / "last.pt", folder / "best.pt"):
        with pytest.raises(UserError, match="give the best.pt of sat.py --split csat"):
            picture.main([str(path)])


def test_help_shows_units_and_defaults(pipeline, capsys):
    done = script("sat.py", "--help")
    assert done.returncode == 0 and "default: 0.5" in done.stdout and "pixels in [0, 1]" in done.stdout
    for argv, expected in ((["--help"], "(default: 0)"),
                           ([str(pipeline / "digits0-4" / "b" / "best.pt"), "--help"], "(default: 24)")):
        with pytest.raises(SystemExit, match="0"):
            evaluate.main(argv)
        line, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  --eval-n"))
        assert line.endswith(expected), "the checkpoint's own value, where there is a checkpoint"
    with pytest.raises(SystemExit):
        transfer.main(["--help"])
    assert "--arch" not in capsys.readouterr().out, "the network is the source's"


def test_bench_counts_by_the_cost_model(tmp_path, capsys, monkeypatch):
    """Runs every kind of step once, in float32 and in bf16: the table's shape and the model's numbers,
    never a duration."""
    class PGDL2:
        """torchattacks' interface."""
        def __init__(self, model, eps, alpha, steps, random_start):
            self.attack = functools.partial(attacks.pgd, model, eps=eps, step_size=alpha, steps=steps)

        def __call__(self, x, y):
            return self.attack(x, y)

    monkeypatch.setitem(sys.modules, "torchattacks", SimpleNamespace(PGDL2=PGDL2))
    bench.main(["--side", "8", "--batch-size", "8", "--repeats", "1", "--fractions", "0.5", "1",
                "--amp", "bf16", "--threads", "1", "--json", str(tmp_path / "bench" / "b.json")])
    found = json.loads((tmp_path / "bench" / "b.json").read_text())
    expected = {"|A|/N = 0.5": 10 / 17, "|A|/N = 1": 1, bench.NAIVE: 24 / 17, bench.PEER: 1}
    model = {(r["step"], r["precision"]): r["model"] for r in found["steps"]}
    assert model == {(step, p): pytest.approx(v) for step, v in expected.items() for p in ("float32", "bf16")}
    for r in found["steps"]:
        assert (set(r["faster_than"]) == {bench.NAIVE, bench.PEER}
                and r["images_per_s"] == pytest.approx(8 / r["seconds"]))
    one = {r["step"]: r for r in found["steps"] if r["precision"] == "float32"}
    assert one["|A|/N = 1"]["time_to_full"] == one[bench.NAIVE]["faster_than"][bench.NAIVE] == 1
    assert one[bench.NAIVE]["time_to_full"] == pytest.approx(one["|A|/N = 1"]["faster_than"][bench.NAIVE])
    assert "|A|/N = 0.5, bf16" in capsys.readouterr().out
    _, setting, rows = report.speed_section(tmp_path)
    assert setting.startswith("### 8x8, PGD-7") and len(rows.splitlines()) == 2 + 6
    assert all(row.startswith("| preactresnet8, batch 8 (runs: 1) |") for row in rows.splitlines()[2:])
    with pytest.raises(UserError, match="lacks 1"):
        bench.main(["--fractions", "0.5"])


# --- runs, contrasts and verdicts ---------------------------------------------------------------------------

def counts(right):
    """An accuracy as result.json has it, of bool (n,)."""
    low, high = evaluate.wilson(int(right.sum()), len(right))
    return {"n": len(right), "accuracy": float(right.mean()), "low": low, "high": high,
            "right": np.packbits(right).tobytes().hex()}


SETTING = {"arch": "preactresnet18", "epochs": 200, "eps": 0.5, "norm": "l2", "N": 50000, "n": 100,
           "labels": "l", "eval_attacks": ["apgd-ce", "apgd-t", "fab-t", "square"]}


def run(split, right, clean=None, A=5000, A_classes=(), seed=0, **made):
    """A Run of CIFAR-10 with ten classes of equal size whose test examples are robust, and clean,
    where `right` and `clean` are."""
    both = {"robust": np.asarray(right),
            "clean": np.ones(len(right), bool) if clean is None else np.asarray(clean)}
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    of = lambda part: {kind: counts(r.reshape(10, -1)[part].ravel()) for kind, r in both.items()}
    accuracy = {"all": of(slice(None)), "classes": {c: of(i) for i, c in enumerate(names)}}
    if A_classes and not made.get("transfer"):
        accuracy["A_val"], accuracy["B_val"] = (
            of([(c in A_classes) == inside for c in names]) for inside in (True, False))
    plain = {"path": f"{split}-{A}-{seed}", "data": "cifar10", "transfer": False, "setting": SETTING,
             "precision": "float32", "order": "hardest", "metric": "entropy", "weight": "vanilla",
             "attack": "pgd", "N": 50000, "w_A": 1.0, "n_classes": 10, "cost": A, "ranking": "",
             "ranking_epochs": 0,
             "weights": f"{split}{A}{seed}", "group": "g"}
    return results.Run(split=split, A=A, A_classes=list(A_classes), seed=seed, accuracy=accuracy,
                       **{**plain, **made})


def first(share, n=100):
    """bool (n,): of each class the first `share` is right."""
    return np.tile(np.arange(n // 10) < round(share * n / 10), 10)


def test_right_reads_what_evaluate_wrote():
    g = torch.Generator().manual_seed(0)
    clean, y = torch.rand(50, generator=g) < 0.8, torch.randint(0, 3, (50,), generator=g)
    robust = clean & (torch.rand(50, generator=g) < 0.5)
    one = run("full", first(0.5))
    one.accuracy = evaluate.summary(clean, robust, y, ["a", "b", "c"])
    for i, c in enumerate("abc"):
        assert (one.right("clean", c).tolist() == clean[y == i].tolist()
                and one.right("robust", c).tolist() == robust[y == i].tolist())
    del one.accuracy["classes"]["a"]["clean"]["right"]
    assert one.right("clean", "a") is None


def test_contrast_by_hand():
    """Two single runs: the paired interval from the differences example by example;
    of parts, a difference of two means."""
    rng = np.random.default_rng(0)
    a, b = rng.random(100) < 0.6, rng.random(100) < 0.4
    value, low, high = stats.contrast([(1, [run("full", a)], None), (-1, [run("none", b)], None)], [])
    d = a.astype(float) - b
    assert (value == pytest.approx(100 * d.mean())
            and (high - low) / 2 == pytest.approx(100 * 1.98422 * d.std(ddof=1) / 10, rel=1e-3))
    # The same runs on B_val of a class: only those examples count.
    others = [c for c in run("full", a).accuracy["classes"] if c != "cat"]
    value, low, high = stats.contrast([(1, [run("full", a)], others), (-1, [run("none", b)], others)], [])
    kept = np.delete(d.reshape(10, 10), 3, 0)
    assert (value == pytest.approx(100 * kept.mean())
            and (high - low) / 2 == pytest.approx(100 * 1.984 * kept.std() / math.sqrt(90), rel=0.02))
    # Training noise: three seeds each, all of it between seeds, none between examples.
    seeds = [run("full", first(s), seed=i) for i, s in enumerate((0.4, 0.5, 0.6))]
    found = stats.noise(seeds)
    assert (found.variance, found.df, found.spread) == (pytest.approx(100), 2, [[40, 50, 60]])
    value, low, high = stats.contrast([(1, seeds, None)], seeds)
    test = np.mean([first(s) for s in (0.4, 0.5, 0.6)], axis=0).var(ddof=1)
    total = 100 / 3 + 1e4 * test / 100
    df = total**2 / ((100 / 3)**2 / 2 + (1e4 * test / 100)**2 / 99)
    assert (high - low) / 2 == pytest.approx(scipy.stats.t.ppf(0.975, df) * math.sqrt(total), rel=1e-6)


def test_the_noise_of_training_is_that_of_the_same_classes():
    """Two settings whose seeds differ on cat alone: a contrast without cat has no noise of training, one on
    cat has all of it, that on all classes a tenth of the deviation."""
    def seeds(split):
        """Three seeds that are right on half of each class, of cat on 0.3, 0.5 and 0.7."""
        grids = [first(0.5, 1000).reshape(10, 100) for _ in range(3)]
        for share, grid in zip((0.3, 0.5, 0.7), grids):
            grid[3] = np.arange(100) < 100 * share
        return [run(split, grid.ravel(), seed=i) for i, grid in enumerate(grids)]
    a, b = seeds("full"), seeds("none")
    others = [c for c in a[0].accuracy["classes"] if c != "cat"]
    deviation = {tuple(classes): stats.noise([*a, *b], classes=classes).variance**0.5
                 for classes in (others, ["cat"], [*others, "cat"])}
    assert list(deviation.values()) == [0, pytest.approx(20), pytest.approx(2)]
    of = lambda classes: stats.contrast([(1, a, classes), (-1, b, classes)], [*a, *b])
    assert of(others) == (pytest.approx(0), pytest.approx(0), pytest.approx(0))
    t = scipy.stats.t.ppf(0.975, 4)
    assert of(["cat"])[2] == pytest.approx(t * 20 * math.sqrt(2 / 3))
    assert of(None)[2] == pytest.approx(t * 2 * math.sqrt(2 / 3))


def test_the_parts_of_a_contrast():
    """The clean accuracy's own noise, squared weights, a class without examples, a run without its bits, and
    several heads on one training."""
    half = lambda found: (found[2] - found[1]) / 2
    a, b = ([run(split, first(0.5, 1000), clean=first(share, 1000), seed=i)
             for i, share in enumerate((middle - 0.1, middle, middle + 0.1))]
            for split, middle in (("full", 0.7), ("none", 0.4)))
    for kind, between in (("robust", 0), ("clean", 100)):
        test = 1e4 * np.var(sum(w * np.mean([np.concatenate([r.right(kind, c) for c in r.accuracy["classes"]])
                                             for r in rs], axis=0) for w, rs in ((1, a), (-0.5, b))), ddof=1)
        test, training = test / 1000, 1.25 * between / 3
        df = (test + training)**2 / (training**2 / 4 + test**2 / 999)
        assert half(stats.contrast([(1, a, None), (-0.5, b, None)], [*a, *b], kind)) == pytest.approx(
            scipy.stats.t.ppf(0.975, df) * math.sqrt(test + training))
    whole = stats.contrast([(1, a, None)], [])
    for r in a:
        r.accuracy["classes"]["none"] = {"robust": {"n": 0, "accuracy": None, "right": ""}}
    assert stats.contrast([(1, a, None)], []) == whole, "a class without examples"
    assert stats.noise(a).spread == [[50, 50, 50]]
    del a[0].accuracy["classes"]["cat"]["robust"]["right"]
    assert half(stats.contrast([(1, a, None)], [])) == pytest.approx(
        1.96234 * math.sqrt(1e4 * 0.25 / 1000), rel=1e-4), "not paired: the variance of a proportion"
    heads = [run("full", first(share, 1000), seed=source + 2**31 * head, transfer=True)
             for source, share in enumerate((0.4, 0.6)) for head in range(2)]
    found = stats.noise(heads)
    assert found.df == 1 and found.variance == pytest.approx(200)
    assert stats.contrast([(1, heads, None)], heads) == pytest.approx(
        stats.contrast([(1, heads[::2], None)], heads)), "no tighter than with a head each"


@pytest.mark.parametrize("truth,training,test,least,most", [
    (0.0, 0.03, 0.0, 0, 50), (0.0, 0.003, 0.4, 0, 50), (0.1, 0.01, 0.1, 800, 1000)])
def test_verdicts_on_synthetic_results_whose_truth_is_known(truth, training, test, least, most):
    """1,000 draws of nine settings with three seeds: "holds" comes up in at most 5 % of them where the true
    difference is 0, and in at least 80 % where it is 10 points.

    Each draw has a new test set. `training` is the deviation between seeds, `test` that of how often a
    setting gets a single example right, and each of the two decides once. Every other draw compares other
    nine of the ten classes on each side, so that pairing removes less."""
    rng, holds, n = np.random.default_rng(1), 0, 500
    def seeds(A, shift, easy):
        own = easy + rng.normal(0, test, n)
        return [run("esat", rng.random(n) < own + shift + rng.normal(0, training), seed=s, A=A)
                for s in range(3)]
    for draw in range(1000):
        easy = rng.uniform(0.2, 0.8, n)  # the same for all settings
        sides = seeds(1, truth, easy), seeds(2, 0.0, easy)
        if draw % 5 == 0:  # new ones for every draw would take long
            others = [r for A in range(3, 10) for r in seeds(A, 0.0, easy)]
        names = list(sides[0][0].accuracy["classes"])
        one, other = (names[1:], names[:-1]) if draw % 2 else (None, None)
        found = stats.contrast([(1, sides[0], one), (-1, sides[1], other)], [*sides[0], *sides[1], *others])
        holds += claims.verdict("above", found, *sides) == "holds"
    assert least <= holds <= most, holds


def test_verdict_rules():
    a, b = (run("full", first(0.5), seed=seed) for seed in (0, 1))
    two, head = [[a, b], [a, b]], run("full", first(0.5), seed=2**31)
    cases = {("above", 1, 0.1, 2): "holds", ("above", 0, -1, 1): "open",
             ("above", -1, -2, -0.1): "contradicted", ("within", 0, -2.9, 2.9): "holds",
             ("within", 2, 1, 3.1): "open", ("within", 5, 3.1, 7): "contradicted",
             ("within", -5, -7, -3.1): "contradicted", ("not below", 9, -2.9, 20): "holds",
             ("not below", -4, -5, -3.1): "contradicted"}
    for (rule, *interval), expected in cases.items():
        assert claims.verdict(rule, interval, *two) == expected
        for one in ([a], [a, head]):  # two heads on the features of one training are one training
            assert claims.verdict(rule, interval, one, [a, b]) == "open (one seed)"


BALANCED = claims.FIG2["balanced"].split()[-1]


def everything():
    """Runs of three seeds with a clear order, as the paper has it."""
    runs = []
    for seed in range(3):
        fixed = lambda share: first(share + 0.01 * (seed - 1), 1000)
        runs += [run("none", fixed(0.02), clean=fixed(0.95), seed=seed, A=0),
                 run("full", fixed(0.60), clean=fixed(0.85), seed=seed, A=50000)]
        for share, hard, easy, chance in ((0.1, 0.45, 0.20, 0.45), (0.5, 0.59, 0.50, 0.58)):
            for order, robust in (("hardest", hard), ("easiest", easy), ("random", chance)):
                runs.append(run("esat", fixed(robust), clean=fixed(0.9), seed=seed,
                                A=int(share * 50000), order=order))
        for c, robust, less in (("cat", 0.38, 0.15), ("automobile", 0.17, 0.15)):
            for weight, share in (("balanced", robust), ("vanilla", less)):
                runs.append(run("csat", fixed(share), seed=seed, A_classes=[c], order="named", weight=weight))
        to = {"transfer": True, "data": "cifar100->cifar10", "n_classes": 100, "seed": seed}
        for weight, robust in (("vanilla", 0.1), ("balanced", 0.3), ("emphasis", 0.37)):
            runs.append(run("csat", fixed(robust), A_classes=[f"c{i}" for i in range(10)],
                            weight=weight, **to))
        runs += [run("full", fixed(0.42), A=50000, **to),
                 run("esat", fixed(0.42), A=15000, weight="emphasis", **to)]
    return runs


def test_claims_get_the_verdict_of_their_interval():
    tables = claims.claims(everything())
    (rows, seeds), (transferred, _) = tables["cifar10", "g"], tables["cifar100->cifar10", "g"]
    verdicts = {row[0][:3] + " " + row[0].split()[-1]: row[3] for row in [*rows, *transferred]}
    assert verdicts == {
        f"(a) {BALANCED}": "holds: 2 classes", "(a) 1": "holds: 2 classes",
        f"(b) {BALANCED}": "holds", "(b) 1": "open", "(c) robustness": "holds",
        "(d) easiest": "holds", "(d) hardest": "holds", "(h) 0.5)": "holds", "(e) clean)": "holds",
        "(f) balanced": "holds", "(f) vanilla": "holds", "(g) less)": "holds"}
    # Eleven settings of three seeds; no AT, at 2 %, has no room for noise and is not counted.
    assert (seeds.df == 22 and seeds.variance == pytest.approx(1) and "34.8, 18.9: +15.9" in rows[2][1]
            and "66.4 of 69.0: 96 %" in rows[4][1])
    one = [r for r in everything() if r.seed == 0]
    (rows, seeds), _ = claims.claims(one).values()
    assert {row[3] for row in rows} == {"open (one seed)", "open (one seed): 2 classes"} and seeds.df == 0
    swapped = everything()
    for r in swapped:
        r.order = {"hardest": "easiest", "easiest": "hardest"}.get(r.order, r.order)
    found = [row[3] for row in claims.claims(swapped)["cifar10", "g"][0] if row[0].startswith("(d)")]
    assert found == ["contradicted", "contradicted"], "the order is reversed, and random is far above hardest"


def test_claims_show_the_contrasts_that_they_speak_of():
    """(a), (b) and (g), with the noise of all runs of their table."""
    runs = [r for r in everything() if not r.transfer]
    pick = lambda **like: results.pick(runs, **like)
    cat, car = (pick(A_classes=[c], weight="balanced") for c in ("cat", "automobile"))
    for r, c, share in ((r, c, share) for rs, c, share in ((cat, "cat", 0.0), (car, "automobile", 0.9))
                        for r in rs):
        r.accuracy["classes"][c]["robust"] = counts(first(share, 1000)[:100])
    rows = claims.claims(runs)["cifar10", "g"][0]
    rows = {row[0][:3] + " " + row[0].split()[-1]: row[2] for row in rows}
    none, but = pick(split="none"), lambda name: [c for c in cat[0].accuracy["classes"] if c != name]
    of = lambda *terms: stats.points(*stats.contrast(terms, runs))
    assert of((1, cat, but("cat")), (-1, none, but("cat"))) in rows[f"(a) {BALANCED}"]
    both = [c for c in but("cat") if c != "automobile"]
    assert of((1, cat, both), (-1, car, both)) in rows[f"(b) {BALANCED}"], "on the classes in neither A"
    moved = [r for r in everything() if r.transfer]
    third, all_of_it = results.pick(moved, split="esat"), results.pick(moved, split="full")
    assert stats.points(*stats.contrast([(1, third, None), (-1, all_of_it, None)], moved)) in next(
        row[2] for row in claims.claims(moved)["cifar100->cifar10", "g"][0] if row[0].startswith("(g)"))


def test_fig2_is_compared_with_the_papers_by_rank():
    told = paper.published()["fig2"]
    for sign, expected in ((1, "1.00"), (-1, "-1.00")):
        of = {c: [run("csat", np.concatenate([first(0.5 + sign * (v - 50) / 100, 1000)[:100] for v in row]),
                      A_classes=[c], order="named", weight="balanced")]
              for c, row in zip(TEN, told["robust_rows_are_A"])}
        text = claims.likeness(TEN, of)
        assert f"of what A gives to any other class {expected}. " in text and " 90 cells " in text
        ours, papers = re.search(r"goes from (.*) points, in the paper from (.*)\.", text).groups()
        turned = " to ".join(papers.translate(str.maketrans("+-", "-+")).split(" to ")[::-1])
        assert ours == (papers if sign == 1 else turned)
        rho = float(re.search(r"of B_val (\S+) \(10 classes\)", text)[1])
        assert sign * rho > 0.95, "the mean of a row is nearly its bar"
    assert claims.likeness(TEN, dict(list(of.items())[:2])) == ""
    known = {(a, c): 2 * "abc".index(a) + 10 * "abcd".index(c) for a in "abc" for c in "abcd" if a != c}
    assert claims.effects_of_A(known) == pytest.approx({"a": -2, "b": 0, "c": 2})
    assert claims.likeness(TEN, {f"own {c}": rs for c, rs in of.items()}) == "", "classes of other data"


def test_recovering_90_percent():
    """Claim (c): the interval of a ratio by the delta method, and a verdict that counts no AT."""
    for least, some, most, expected in ((20, 40, 60, "contradicted"), (25, 56.5, 60, "open")):
        sides = [[run(split, first(x / 100 + 0.01 * (seed - 1), 10000), A=A, seed=seed) for seed in range(3)]
                 for split, x, A in (("none", least, 0), ("esat", some, 25000), ("full", most, 50000))]
        (none, half, full), share = sides, (some - least) / (most - least)
        pool = [*none, *half, *full]
        row, = [row for row in claims.claims(pool)["cifar10", "g"][0] if row[0].startswith("(c)")]
        _, *ends = stats.contrast([(1, half, None), (-share, full, None), (share - 1, none, None)], pool)
        low, high = (100 * (share + end / (most - least)) for end in ends)
        assert f"{100 * share:.0f} % [{low:.0f}, {high:.0f}]" in row[2] and row[3] == expected


def test_bf16_against_float32():
    runs = [run("full", first(0.5 + 0.01 * s, 1000), seed=s, precision=p, A=50000)
            for s in range(3) for p in ("float32", "bf16")]
    ((data, _), rows), = claims.precisions([*runs, run("none", first(0.1))]).items()
    assert data == "cifar10" and [row[:5] for row in rows] == [
        ("AT", "3 and 3", "robust", "51.0", "51.0"), ("AT", "3 and 3", "clean", "100.0", "100.0")]
    assert rows[0][5].startswith("+0.0 [-")
    assert {r.precision for r in results.shown(runs)} == {"float32"}, "the others are repeats, not seeds"
    for r in runs[:3]:
        r.precision = "bf16"
    mixed = results.shown([runs[0], runs[2], runs[4]])
    assert {r.group for r in mixed} == {results.described(runs[0]) + ", 2 of 3 runs trained in bf16"}, \
        "pooled, and said"


def test_the_papers_numbers():
    value = paper.theirs
    assert (value("fig6", "cifar10", "hardest", 0.5, "robust") == 66.4
            and value("fig6", "cifar10", "random", 0.1, "clean") == 92.9)
    assert (value("fig6", "cifar10", "AT", 1.0, "robust") == 69.0
            and value("fig6", "cifar10", "hardest", 0.55, "robust") is None)
    assert (value("fig8", "cifar100->cifar10", "easiest", 0.3, "robust") == 29.0
            and value("fig8", "cifar100->svhn", "hardest", 0.3, "robust") == 22)
    assert (value("fig16", "imagenet200->flowers102", "fgsm-rs", 0.1, "robust") == 34.9
            and value("fig12", "cifar100", "vog", 0.1, "robust") == 21.9)
    assert (value("fig7", "cifar100->cifar10", "vanilla", 0.1, "robust") == 8
            and value("fig7", "cifar100->cifar10", "vanilla", 0.2, "robust") is None)
    assert (value("fig5", "digits", "hardest", 0.5, "robust") is None
            and value("fig5", "cifar10", "no AT", 0.0, "robust") == 0)


def test_every_setting_that_is_not_the_papers_is_named():
    theirs = paper.setting_on("cifar100->cifar10")
    ours = {**{k: v for k, v in theirs.items()}, "N": 50000}
    assert (paper.not_the_papers("cifar100->cifar10", ours) == ""
            and paper.not_the_papers("digits", ours) == "")
    for key, value in (("norm", "linf"), ("steps", 10), ("step_size", 0.2), ("augment", "crop"),
                       ("lr_decays", [10]), ("target's epochs", 3)):
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        assert (f"{key.replace('_', ' ')} {shown} ("
                in paper.not_the_papers("cifar100->cifar10", {**ours, key: value}))
    assert "N 5,000 (50,000)" in paper.not_the_papers("cifar10", {"N": 5000})


# --- tables and figures -------------------------------------------------------------------------------------

def table(text, section, until):
    """The rows of the first table of a section, as dicts."""
    rows = [[c.strip() for c in line.split("|")[1:-1]]
            for line in text.replace("\\|", "").split(section)[1].split(until)[0].splitlines()
            if line.startswith("|")]
    return [dict(zip(rows[0], r)) for r in rows[2:]]


def test_report(pipeline):
    text = (pipeline / "tables.md").read_text()
    result = json.loads((pipeline / "digits0-4" / "b" / "result.json").read_text())
    robust = result["accuracy"]["B_val"]["robust"]
    row, = [r for r in table(text, "## Fig. 4 and 5", "## Fig. 13") if r["order"] == "hardest"]
    assert row["robust B_val %"] == (f"{100 * robust['accuracy']:.1f} "
                                     f"[{100 * robust['low']:.1f}, {100 * robust['high']:.1f}]")
    ranked = json.loads((pipeline / "digits0-4" / "rank-preactresnet8-seed0" / "rank.json").read_text())
    assert (row["A"] == "2 classes" and row["A/N"] == "0.40"
            and result["ranking"]["scores"] in ranked["scores"].values())
    assert ("Missing runs of these lines: the baseline AT." in text
            and "runs of these tables used it." in text)
    assert "digits0-4->digits5-9" in text and "AutoAttack's apgd-ce, n = 24" in text
    evals = table(text, "## Evaluations under other settings", "\n## ")
    assert (evals and evals[0]["run"].startswith("digits0-4/")
            and evals[0]["threat model"].startswith("l2 eps"))
    for name in ("fig3", "fig5", "fig8", "fig13"):
        assert ((pipeline / "figures" / f"{name}.png").stat().st_size > 5000
                and (pipeline / "figures" / f"{name}.svg").exists())
    assert not (pipeline / "figures" / "fig2.png").exists() and "## Fig. 2" in text


def copies(pipeline, tmp_path, run, **changes):
    """A results folder of copies of a run's result.json, each with other flags: {name: flags}."""
    result = json.loads((pipeline / "digits0-4" / run / "result.json").read_text())
    for name, change in changes.items():
        (tmp_path / name).mkdir()
        changed = {**result, "A": change.pop("A", result["A"]), "args": {**result["args"], **change}}
        (tmp_path / name / "result.json").write_text(json.dumps(changed))
    return results.shown(results.read(tmp_path))


def test_report_groups_random_classes_by_their_number(pipeline, tmp_path):
    """Random subsets of two classes differ in |A|: they are still seeds of one point."""
    runs = copies(pipeline, tmp_path, "b", a={"order": "random", "seed": 0, "A": 250},
                  b={"order": "random", "seed": 1, "A": 260})
    lines = report.lines_of(runs, "order")
    assert list(lines) == ["random"] and list(lines["random"]) == [2] and len(lines["random"][2]) == 2


def test_report_keeps_other_settings_apart(pipeline, tmp_path, capsys):
    runs = copies(pipeline, tmp_path, "a", one={}, twin={}, seed={"seed": 1}, lr={"lr": 0.7})
    groups = results.grouped(runs, "data", "group")
    assert sorted((", lr 0.7" in name, len(g)) for (_, name), g in groups.items()) == [(False, 2), (True, 1)]
    assert "twin" in capsys.readouterr().out, "a repeated run is named, not counted as a seed"


def test_another_threat_model_is_not_put_beside_the_papers_numbers(tmp_path):
    curve = next(c for c in report.CURVES if c[0] == "fig6")
    for norm, eps, beside in (("l2", 0.5, True), ("linf", 8 / 255, False), ("l2", 1.0, False)):
        how = {"setting": {**SETTING, "norm": norm, "eps": eps}}
        runs = [run("full", first(0.7), A=50000, **how), run("none", first(0.0), A=0, **how),
                run("esat", first(0.6), A=25000, **how)]
        (rows, _), = claims.claims(runs).values()
        assert {row[0][:3]: row[1] != "-" for row in rows} == {"(c)": beside, "(e)": beside}
        text = "\n".join(report.curve_section(runs, tmp_path, *curve))
        assert ("paper robust %" in text) == beside
        svg = (tmp_path / "fig6.svg").read_text()
        assert ("the paper's (pale)" in svg) == beside


def test_tables_of_curves(tmp_path):
    runs = [run("full", first(0.7), A=50000), run("esat", first(0.6), A=25000),
            run("esat", first(0.4), A=25000, order="random"),
            run("esat", first(0.6), A=25000, order="random", seed=1), run("esat", first(0.5))]
    text = "\n".join(report.curve_section(runs, tmp_path, *next(c for c in report.CURVES if c[0] == "fig6")))
    assert ("| hardest | 25,000 | 0.50 | 1 | 1 | 60.0 [50.2, 69.1] | 100.0 [96.3, 100.0] "
            "| 66.4 | -6.4 | 89.3 | +10.7 |") in text
    assert ("| random | 25,000 | 0.50 | 1 | 2 | 50.0 ± 14.1 | 100.0 ± 0.0 "
            "| 64.5 | -14.5 | 91.0 | +9.0 |") in text
    assert "| AT | 50,000 | 1.00 | 1 | 1 | 70.0 [60.4, 78.1] |" in text and "| no AT | no run yet |" in text
    assert ("Missing runs of these lines: random at |A| = 5,000, the baseline no AT." in text
            and "Not the paper's setting" not in text)
    assert (tmp_path / "fig6.png").stat().st_size > 5000


def test_names_that_the_font_lacks_are_drawn_as_numbers(tmp_path):
    assert figures.drawable(["cat", "猫", "été"]) == ["cat", "#1", "été"]


def test_pale_baselines_alone_are_named_in_the_legend(tmp_path):
    group = "linf eps 0.0313725, AutoAttack's apgd-ce and apgd-t, n = 1,000"  # 60 columns end after "n ="
    figures.curves(tmp_path / "f", "title", "none", {("cifar10", group): ([], [], {}, "cifar10")},
                   [("all", "robust")])
    drawn = (tmp_path / "f.svg").read_text()
    assert figures.PALE in drawn and ">n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}1,000<" in drawn


def test_readme_is_made_from_the_published_results(tmp_path):
    published = HERE / "results-published"
    shutil.copytree(published, tmp_path / "r")
    shutil.copy(HERE / "README.md", tmp_path / "README.md")
    copies = [tmp_path / "README.md", tmp_path / "r" / "README.md"]
    report.main(["--results", str(tmp_path / "r"), "--into", *map(str, copies)])
    for copy, path in zip(copies, (HERE / "README.md", published / "README.md")):
        assert copy.read_text() == path.read_text(), \
            "report.py --results results-published --into README.md results-published/README.md"
    report.main(["--results", str(tmp_path / "r" / "precision")])  # a report of its own
    for tables in ("tables.md", "precision/tables.md"):
        assert (tmp_path / "r" / tables).read_text() == (published / tables).read_text()
    text = (HERE / "README.md").read_text()
    assert "| (a) CSAT on a single class" in text and "torchattacks PGDL2" in copies[1].read_text()
    for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (HERE / image).stat().st_size < 1_000_000


def test_a_line_alone_is_shown_where_no_other_figure_shows_it(tmp_path):
    figure = next(c for c in report.CURVES if c[0] == "fig12")
    shown = lambda metric: report.curve_section([run("esat", first(0.5), metric=metric)], tmp_path, *figure)
    assert shown("entropy")[1] == "No runs yet that compare them." and "| svar |" in "\n".join(shown("svar"))
    assert "| own 0f25 |" in "\n".join(shown("own 0f25"))


def test_a_foreign_bench_file(tmp_path):
    (tmp_path / "bench").mkdir()
    for text in ("[]", '{"setting": "x", "steps": []}', '{"setting": "a, b, c", "steps": [{"step": 1}]}'):
        (tmp_path / "bench" / "b.json").write_text(text)
        with pytest.raises(UserError, match="not written by bench.py"):
            report.speed_section(tmp_path)


def test_a_separate_folder_is_another_report(tmp_path):
    for name in ("cifar10/a", ".old-a", "precision/cifar10/a", "precision/bf16/a"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "result.json").write_text("{}")
    (tmp_path / "cifar10" / "tables.md").write_text("")  # a report on a part separates nothing
    (tmp_path / "precision" / ".separate").write_text("")
    assert results.found(tmp_path, "result.json") == [tmp_path / "cifar10/a/result.json"]
    assert len(results.found(tmp_path / "precision", "result.json")) == 2


def test_a_report_needs_no_torch():
    code = "import sys, report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert done.stdout == "False\n"


def test_groups_of_other_settings_have_other_names():
    """Digits that also stand elsewhere in a name do not make two settings one."""
    runs = [run("full", first(0.5), setting={**SETTING, "steps": steps}, A=50000) for steps in (1, 5)]
    assert len({r.group for r in results.shown(runs)}) == 2


def test_transfers_keep_the_seeds_of_source_and_target_apart():
    made = {"args": {"split": "full", "classes": None, "order": "hardest", "metric": "entropy",
                     "attack": "pgd", "weight": "vanilla", "weight_factor": None, "seed": 1,
                     "arch": "a", "epochs": 1, "norm": "l2", "eps": 0.5},
            "N": 9, "A": 9, "w_A": 1, "A_classes": None, "fingerprint": {"classes": ["a"], "labels": "l"},
            "cost": {"forward_equivalents": 1}, "weights": "w", "dataset": "cifar100"}
    accuracy = run("full", first(0.5)).accuracy
    result = {"source": made, "settings": {"attacks": ["apgd-ce"], "norm": "l2", "eps": 0.5},
              "fingerprint": {"labels": "l"}, "accuracy": accuracy}
    seeds = [(0, 0), (0, 1), (1, 0), (1, 1)]
    found = [results.run_of(Path("x"), {**result, "args": {"dataset": "mine", "seed": t},
                                        "source": {**made, "args": {**made["args"], "seed": s}}})
             for s, t in seeds]
    assert len({r.seed for r in found}) == 4 and len(results.shown(found)) == 4
    assert paper.not_the_papers("cifar100->mine", found[0].setting) == "", "a target that the paper lacks"


def test_two_seeds_count_their_spread():
    pair = [run("full", first(s, 1000), seed=i) for i, s in enumerate((0.4, 0.6))]
    assert stats.noise(pair).df == 1 and stats.noise(pair).variance == pytest.approx(200)


def test_lines_of_different_rankings_are_told():
    one, other, chance = (run("esat", first(0.5), A=a, ranking=r)
                          for a, r in ((9, "x"), (99, "y"), (999, "")))
    assert results.rankings_to_doubt([one, chance]) == ""
    assert "by entropy used 2 different rankings" in results.rankings_to_doubt([one, other, chance])
    one.ranking_epochs = 1  # SETTING has other epochs
    assert f"of 1 epochs, its runs are of {SETTING['epochs']}" in results.rankings_to_doubt([one, chance])
    one.ranking_epochs = SETTING["epochs"]
    assert results.rankings_to_doubt([one, chance]) == ""


def test_a_sources_threat_model_is_part_of_the_setting():
    path = HERE / "results-published/cifar10/cifar100-cpu-full-seed0-seed0/result.json"
    result = json.loads(path.read_text())
    one = results.run_of(path, result)
    result["source"]["args"]["eps"] = 2.0
    other = results.run_of(path, result)
    assert one.setting != other.setting and one.setting["eps"] == other.setting["eps"] == 0.5
    assert paper.comparable(one.data, one.setting) and not paper.comparable(other.data, other.setting)


def test_heads_on_one_network_are_no_seeds():
    heads = [run("full", first(share), seed=2**31 * k, transfer=True) for k, share in enumerate((0.4, 0.6))]
    assert stats.mean(heads) == (pytest.approx(50), 0.0) and stats.cell(heads) == "50.0 (2 heads)"


def test_classes_without_examples_end_in_no_error():
    single = [run("csat", first(0.3), A=5000, A_classes=[c], order="named")
              for c in ("cat", "automobile", "dog")]
    none = [run("none", first(0.1), A=0)]
    for r in (*single, *none):
        r.accuracy["classes"]["frog"]["robust"] = {"n": 0, "accuracy": None, "low": None, "high": None,
                                                   "right": ""}
    rows = list(claims.single_class_claims([*single, *none], none, "vanilla"))
    assert "gives the 7 classes" in rows[1][0]
    assert " 24 cells " in claims.likeness(list(none[0].accuracy["classes"]),
                                           claims.single_classes(single))


def test_noise_is_counted_where_no_setting_has_room_for_it():
    low = [run("esat", first(share, 1000), seed=seed) for seed, share in enumerate((0.01, 0.03))]
    high = [run("full", first(share, 1000), A=50000, seed=seed) for seed, share in enumerate((0.5, 0.6))]
    assert stats.noise(low).variance == pytest.approx(2) and stats.noise(low).df == 1
    assert stats.noise([*low, *high]).variance == pytest.approx(50), "only where there is room for it"
