"""What comes in: data sets in their publishers' formats, configs,
and inputs that must be refused in one line."""
import io
import json
import math
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import attacks
import bench
import evaluate
import flags
import picture
import rank
import report
import results
import sat
import subset
import transfer
import runs
from common import UserError
from conftest import HERE, QUICK, script, write_images


TABLE_2 = """
cifar10      preactresnet18 200 128 0.1 100,150 5e-4 0.5 0.1
cifar100     preactresnet18 200 128 0.1 100,150 5e-4 0.5 0.1
imagenet200  resnet50       150 256 0.1 50,100  1e-4 3.0 0.5
transfer/cifar10    preactresnet18 40 128 0.1 20,30 5e-4 0.5 -
transfer/svhn       preactresnet18 40 128 0.1 20,30 5e-4 0.5 -
transfer/caltech256 resnet50      100 128 0.1 50,75 1e-4 3.0 -
transfer/flowers102 resnet50      100 102 0.1 50,75 1e-4 3.0 -
"""  # data set, architecture, epochs, batch size, lr, decays, L2 decay; eps and step size of A.1


def test_flags_without_effect_are_named(capsys):
    fgsm = ["--attack", "fgsm-rs"]
    for argv, told in ((["--weight", "emphasis", "--weight-factor", "3"], "--weight has no effect with --w"),
                       (["--order", "random", "--metric", "svar"], "--metric has no effect with --order r"),
                       ([*fgsm, "--steps", "3"], "--steps has no effect with --attack fgsm-rs"),
                       (["--order", "random", "--steps", "3", "--weight", "balanced"], "")):
        args = sat.command_line(argv)
        assert told in capsys.readouterr().out if told else capsys.readouterr().out == ""
        assert args.metric == "entropy"


@pytest.mark.parametrize("split,idle", [
    ("full", ["--order", "easiest", "--metric", "svar", "--weight", "balanced"]),
    ("none", ["--weight-factor", "3", "--attack", "fgsm-rs"]),
    ("csat", ["--order", "random", "--metric", "svar"])])
def test_flags_without_effect_make_no_other_run(split, idle):
    argv = ["--split", split, *["--classes", "3"] * (split == "csat")]
    plain, same = sat.command_line(argv), sat.command_line([*argv, *idle])
    assert vars(plain) == vars(same) and sat.run_folder(plain) == sat.run_folder(same)


def test_two_configs_of_a_data_set_have_runs_of_their_own():
    name = lambda *argv: sat.run_folder(sat.command_line(["--config", *argv]))[0].name
    first, second = (str(HERE / f"configs/{name}.yaml") for name in ("cifar10", "cifar10-linf"))
    for more in ([], ["--dataset", "mine"]):
        assert name(first, *more) == "esat-hardest-0.5-seed0"
        assert name(second, *more) == "cifar10-linf-esat-hardest-0.5-seed0"


def test_steps_and_step_size_are_those_of_the_table():
    """Without AT and with FGSM-RS they have no effect, but runs that differ in them stand in other tables."""
    typed = ["--norm", "linf", "--eps", "0.03", "--step-size", "0.008", "--steps", "5", "--random-start"]
    settings = []
    for how in (["--split", "none"], ["--split", "full"], ["--split", "esat"], ["--attack", "fgsm-rs"]):
        kept = runs.identity(sat.command_line([*how, *typed]))
        settings.append({k: v for k, v in kept.items() if k not in results.SUBSET | results.NOT_SETTING})
    assert all(s == settings[0] for s in settings) and settings[0]["step_size"] == 0.008


@pytest.mark.parametrize("row", TABLE_2.split("\n")[1:-1])
def test_configs_are_table_2(row):
    name, arch, epochs, batch, lr, decays, decay, eps, step = row.split()
    argv = ["--config", str(HERE / f"configs/{name}.yaml")]
    args = (transfer.command_line(["x.pt", *argv]) if "/" in name
            else sat.command_line([*argv, "--split", "full"]))
    assert (args.dataset, args.epochs, args.batch_size, args.lr) == (
        name.split("/")[-1], int(epochs), int(batch), float(lr))
    assert flags.from_yaml(argv[1])["arch"] == arch  # of a transfer, the source's: report.py compares
    assert (args.lr_decays, args.weight_decay, args.eps) == (
        [int(d) for d in decays.split(",")], float(decay), float(eps))
    assert (args.norm, args.augment, args.eval_attacks, args.eval_n, args.select_n) == (
        "l2", "full", list(attacks.STANDARD), 0, 0)
    if step != "-":
        assert (args.attack, args.steps, args.step_size, args.random_start, args.weight) == (
            "pgd", 7, float(step), False, "vanilla")


def test_command_line_beats_yaml_beats_defaults(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("dataset: digits\nlr: 5e-2\nepochs: 3\nrandom-start: true\nlr-decays: [1, 2]\n"
                      "classes: [1, 2]\n")
    args = sat.command_line(["--config", str(config), "--split", "csat", "--epochs", "4"])
    assert (args.lr, args.epochs, args.random_start, args.lr_decays, args.batch_size) == (
        0.05, 4, True, [1, 2], 128)
    assert args.classes == ["1", "2"]
    args = sat.command_line(["--config", str(config), "--split", "csat", "--no-random-start"])
    assert args.random_start is False


BAD = {
    "unknown dataset": (["--split", "full", "--dataset", "mnist"], "no data set 'mnist'"),
    "dataset is a path": (["--dataset", "../x"], "not a plain name"),
    "no such flag": (["--split", "full", "--lrr", "1"], "unrecognized arguments"),
    "wrong type": (["--split", "full", "--lr", "fast"], "'fast' is not a finite number above 0"),
    "negative": (["--split", "full", "--epochs", "0"], "whole number of at least 1"),
    "wrong choice": (["--split", "half"], "invalid choice: 'half'"),
    "unknown class": (["--split", "csat", "--classes", "cat"], "unknown class cat; valid: 0, 1, 2"),
    "frac 0": (["--split", "esat", "--frac", "0"], "'0' is not a finite number above 0 and at most 1"),
    "frac above 1": (["--split", "esat", "--frac", "1.5"],
                     "'1.5' is not a finite number above 0 and at most 1"),
    "frac of no class": (["--split", "csat", "--frac", "0.01"], "makes 0; it must be 1 to 10"),
    "size above N": (["--split", "esat", "--size", "1298"], "it must be 1 to 1297"),
    "too many classes": (["--split", "csat", "--size", "11"], "it must be 1 to 10"),
    "redrawn classes": (["--split", "csat", "--order", "redrawn"], "it goes with --split esat"),
    "scores for full": (["--split", "full", "--scores", "x.npy"], "takes no --scores"),
    "scores at random": (["--scores", "x.npy", "--order", "random"],
                         "--scores goes with --order hardest or easiest"),
    "scores that are missing": (["--scores", "x.npy"], "--scores x.npy: [Errno 2] No such file"),
    "norm without eps": (["--norm", "linf", "--step-size", "0.01"], "--norm linf needs --eps of its own"),
    "norm without a step size": (["--norm", "linf", "--eps=0.03"],
                                 "--norm linf needs --step-size of its own"),
    "huge lr": (["--lr", "1e308"], "'1e308' is not a finite number above 0 and at most 1e+30"),
    "huge weight": (["--weight-factor", "1e300"], "at most 1e+30"),
    "threads of no machine": (["--threads", "10000"],
                              "'10000' is not a whole number of at least 0 and at most"),
    "results nowhere": (["--results", ""], "an empty text is no folder"),
    "two sizes": (["--split", "esat", "--frac", "0.5", "--size", "3"], "given: frac, size"),
    "classes for esat": (["--split", "esat", "--classes", "3"], "takes no --classes"),
    "size for full": (["--split", "full", "--size", "3"], "takes no --size"),
    "batch above N": (["--split", "full", "--batch-size", "1298"], "must be 1 to 1297"),
    "run is a path": (["--split", "full", "--run", "a/b"], "not a plain name"),
    "no config": (["--config", "none.yaml", "--split", "full"], "cannot read the config none.yaml"),
    "abbreviated flag": (["--split", "full", "--conf", "configs/cifar10.yaml"],
                         "unrecognized arguments: --conf"),
    "cuda without a GPU": (["--split", "full", "--device", "cuda"], "sees no GPU"),
    "negative eps": (["--eps", "-1"], "'-1' is not a finite number of at least 0"),
    "eps is no number": (["--eps", "nan"], "'nan' is not a finite number"),
    "eps is empty": (["--eps", ""], "'' is not a finite number"),
    "infinite lr": (["--lr", "inf"], "'inf' is not a finite number"),
    "frac is no number": (["--frac", "nan"], "'nan' is not a finite number above 0 and at most 1"),
    "seed of 32 bits": (["--seed", "2147483648"], "at most 2147483647"),
    "decay before the start": (["--lr-decays", "-1"], "'-1' is not a whole number of at least 0"),
    "Linf in pixels of 255": (["--norm", "linf", "--eps", "8", "--step-size", "2"],
                              "--norm linf --eps 8: pixels are in [0, 1] (8/255 is --eps 0.0314)"),
    "another norm": (["--norm", "l1"], "invalid choice: 'l1' (choose from l2, linf)|"
                                       "invalid choice: 'l1' (choose from 'l2', 'linf')"),
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
    "transfer attacks nothing": (transfer.main, ["x.pt", "--attack", "pgd"],
                                 "unrecognized arguments: --attack pgd"),
    "evaluate nothing": (evaluate.main, [], "the following arguments are required: checkpoint"),
    "evaluate a folder": (evaluate.main, ["."], ". is a folder: give the checkpoint in it, say best.pt"),
    "a picture of text": (picture.main, ["x.pt", "--out", "x.txt"], "'x.txt' is not the name of a PNG file"),
    "report of nothing": (report.main, ["--results", "nowhere"], "nowhere"),
    "bench without 1": (bench.main, ["--fractions", "0.5"], "lacks 1"),
    "bench of 2": (bench.main, ["--fractions", "2"],
                   "'2' is not a finite number of at least 0 and at most 1"),
}


@pytest.mark.parametrize("case", [*BAD, *OTHERS])
def test_bad_flags(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    main, argv, messages = OTHERS[case] if case in OTHERS else (sat.main, *BAD[case])
    with pytest.raises(UserError) as e:
        main(argv)
    assert any(message in str(e.value) for message in messages.split("|")), str(e.value)
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir()), "one line, and nothing is written"


def test_every_bad_input_is_one_line_and_exit_code_2(tmp_path):
    """What script() makes of a UserError, for one of each script; the inputs above and below
    are more than 60."""
    for name, *argv in (("sat.py", "--lr", "fast"), ("rank.py", "--lr", "fast"), ("transfer.py",),
                        ("evaluate.py", "none.pt"), ("report.py", "--results", "no"),
                        ("bench.py", "--fractions", "2")):
        done = script(name, *argv, cwd=tmp_path)
        assert (done.returncode == 2 and done.stderr.startswith("error: ")
                and done.stderr.count("\n") == 1 and not done.stdout), done.stderr
    assert len(BAD) + len(OTHERS) >= 60 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text,message", [
    ("learning-rate: 1", "unknown key 'learning-rate'; valid keys: amp, arch"),
    ("lr: fast", "lr: 'fast' is not a finite number|'fast' is not a finite number"),
    ("epochs: 2.5", "'2.5' is not a whole number"), ("split: half", "invalid choice: 'half'"),
    ("lr: true", "lr: 'true' is not a finite number|'true' is not a finite number"),
    ("random-start: 1", "random-start: '1' is not a value"), ("lr: ", "lr: '' is not a value"),
    ("lr: 0.1\nlr: 0.2", "lr stands there more than once"),
    ("epochs: 1:30", "'1:30' is not a whole number"),
    ("norm: linf\neps: 0.03", "norm linf needs --step-size of its own"), ("lr: {a: 1}", "is not a value"),
    ("- lr", "flat list"), ("lr: [", "cannot read the config"),
    ("!!python/object/apply:os.system ['touch pwned']", "flat list"),
    ("lr: [0.1, 0.2]", "is not a value of this flag"),
])
def test_bad_config(text, message, tmp_path, monkeypatch):
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


def test_attacks_refuse_what_they_would_misread():
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    calls = [lambda x, y, **how: attacks.pgd(model, x, y, **{"eps": 0.5, "step_size": 0.1, **how}),
             lambda x, y, **how: attacks.fgsm_rs(model, x, y, **{"eps": 0.5, **how}),
             lambda x, y, **how: attacks.autoattack(
                 model, x, y, **{"eps": 0.5, "attacks": ["apgd-ce"], **how})]
    for call in calls:
        for bad in (255 * x, x - 0.5, x * float("nan")):
            with pytest.raises(ValueError, match=r"not in \[0, 1\]: give pixels, "
                                                 "and put the normalisation into the model"):
                call(bad, y)
        for images, labels, how, message in (
                (x, y, {"eps": -0.1}, "eps = -0.1"), (x, y, {"eps": math.inf}, "eps = inf"),
                (x, y, {"norm": "l1"}, "'l1'"), ((255 * x).byte(), y, {}, "as floats"),
                (x, y.float(), {}, "int64"), (x, y[:3], {}, "a label for each"),
                (x[0], y[:1], {}, r"\(N, C, H, W\)")):
            if call is not calls[2] or images.is_floating_point():  # AutoAttack's wrapper converts
                with pytest.raises(ValueError, match=message):
                    call(images, labels, **how)
    for how in ({"steps": -1}, {"steps": 2.5}, {"step_size": -0.1}, {"step_size": math.nan},
                {"step_size": None}):
        with pytest.raises(ValueError, match="0 or more"):
            calls[0](x, y, **how)
    for how, message in (({"eps": "0.5"}, "eps = 0.5"), ({"eps": None}, "eps = None"),
                         ({"start": x[:2]}, "start is")):
        with pytest.raises(ValueError, match=message):
            calls[0](x, y, **how)
    with pytest.raises(ValueError, match="give images"):
        calls[0](x.numpy(), y)
    for helper in (attacks.project, attacks.random_start):
        with pytest.raises(ValueError, match="'l1': l2 or linf"):
            helper(x, 0.5, "l1")
    with pytest.raises(ValueError, match="'Balanced': vanilla, balanced, emphasis"):
        subset.weight_A("Balanced", 1, 3)
    with pytest.raises(ValueError, match="5 of 3"):
        subset.weight_A("balanced", 5, 3)
    for n_classes, chosen in ((3, ["apgd-t"]), (5, []), (5, ["pgd"])):
        with pytest.raises(ValueError, match="valid are apgd-ce"):
            attacks.autoattack(nn.Sequential(nn.Flatten(), nn.Linear(64, n_classes)), x, y,
                               eps=0.5, attacks=chosen)


def test_choosing_A_refuses_what_it_would_misread():
    y, good = torch.arange(6) % 2, torch.rand(6)
    for how in ({"split": "ESAT"}, {"order": "hard"}, {"scores": good[:5]}, {"scores": good * math.nan},
                {"scores": good / 0}, {"scores": None}, {"amount": None}, {"amount": "2"}):
        with pytest.raises(ValueError):
            subset.choose_A(**{"split": "esat", "y": y, "classes": ["a", "b"], "amount": 2,
                               "scores": good, **how})
    with pytest.raises(ValueError, match="they must agree"):
        sat.sat_loss(torch.rand(4, 3), torch.zeros(4, dtype=torch.int64), torch.ones(4, 1))


def test_no_attack_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    part = {"x": torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8), "y": torch.arange(8) % 2}
    torch.save({"train": part, "test": part, "classes": ["a", "b"]}, tmp_path / "two.pt")
    data = ["--dataset", "two", "--data-dir", ".", "--split", "full", "--augment", "none",
            "--batch-size", "4"]
    for flag in ("--eval-attacks", "--select-attacks"):
        with pytest.raises(UserError, match=f"{flag}: apgd-t on 2 classes: valid are apgd-ce fab-t square"):
            sat.main([*data, flag, "apgd-t"])
    assert not (tmp_path / "results").exists()


def zipped(path, pickled):
    """The bytes of the torch file at `path` with another pickle in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as there, zipfile.ZipFile(out, "w") as now:
        for name in there.namelist():
            now.writestr(name, pickled if name.endswith("data.pkl") else there.read(name))
    return out.getvalue()


def test_scores_of_ones_own(tmp_path):
    values = np.array([0.3, -1.0, 7.0, 2.5])
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "a.npz", scores=values)
    torch.save(torch.from_numpy(values), tmp_path / "a.pt")
    order = np.array([2, 3, 0, 1])  # hardest first
    np.save(tmp_path / "order.npy", order)
    torch.save(order, tmp_path / "order.pth")
    # As numpy 1 pickled it, and the authors of the paper their rankings.
    old = pickle.dumps(order, 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "old.pth").write_bytes(zipped(tmp_path / "order.pth", old))
    for name in ("a.npy", "a.npz", "a.pt", "order.npy", "order.pth", "old.pth"):
        scores = subset.read_scores(tmp_path / name)
        assert scores.argsort(descending=True).tolist() == order.tolist() and scores.dtype == torch.float64
    np.savez(tmp_path / "two.npz", a=values, b=values)
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "matrix.npy", np.ones((2, 2)))
    torch.save({"entropy": torch.ones(3)}, tmp_path / "dict.pt")
    torch.save(Malicious(tmp_path), tmp_path / "bad.pt")
    torch.save(np.array([Malicious(tmp_path)]), tmp_path / "bad.pth")
    (tmp_path / "foreign.pt").write_bytes(bytes(range(256)))
    for name in ("two.npz", "objects.npy", "matrix.npy", "dict.pt", "bad.pt", "bad.pth", "foreign.pt"):
        with pytest.raises(UserError, match=f"{name}: (?!.*weights_only).*; valid: N numbers in a .pt or"):
            subset.read_scores(tmp_path / name)
    assert not (tmp_path / "pwned").exists()
    np.save(tmp_path / "none.npy", np.zeros(0))
    with pytest.raises(UserError, match="0 finite numbers"):
        subset.check_scores(subset.read_scores(tmp_path / "none.npy"), 4)
    for values in (order + 1, order + 1.0, order.astype(float)):
        np.save(tmp_path / "ranks.npy", values)
        with pytest.raises(UserError, match="holds each of . to . once: an order or ranks"):
            subset.read_scores(tmp_path / "ranks.npy")
    with pytest.raises(UserError, match="the scores are all 2: they order nothing"):
        sat.choose_A("esat", torch.arange(4), list("abcd"), amount=2, scores=torch.full((4,), 2.0))


def test_a_run_by_scores_of_ones_own(tmp_path, monkeypatch):
    """What the file holds, not its name, is in the run's identity; no ranking is trained."""
    monkeypatch.chdir(tmp_path)
    scores = torch.arange(1297) % 100 + torch.arange(1297) / 1e4
    for name, values in (("mine", scores), ("same", scores), ("other", -scores), ("short", scores[:9])):
        torch.save(values, f"{name}.pt")
    folders = [sat.run_folder(sat.command_line(["--scores", f"{name}.pt"]))[0]
               for name in ("mine", "same", "other")]
    assert folders[0] == folders[1] != folders[2] and "scores=" in folders[0].name
    sat.main(["--scores", "mine.pt", "--size", "40", *QUICK, "--epochs", "1"])
    result = json.loads(next(Path("results").glob("digits/*/result.json")).read_text())
    assert (result["A"] == 40 and result["ranking"]["scores"] == result["args"]["scores"]
            and result["ranking"]["file"] == "mine.pt" and not list(Path("results").glob("*/rank*")))
    with pytest.raises(UserError, match="each of the 1,297 training"):
        sat.main(["--scores", "short.pt", *QUICK])


def test_linf_config_is_cifar10s_under_another_threat_model():
    plain, linf = (flags.from_yaml(HERE / "configs" / f"{name}.yaml") for name in ("cifar10", "cifar10-linf"))
    assert ({k for k in linf if linf[k] != plain.get(k)} == {"norm", "eps", "step_size"}
            and set(linf) == set(plain))
    assert (linf["eps"], linf["step_size"]) == pytest.approx((8 / 255, 2 / 255))


def test_evaluate_under_another_norm_needs_its_own_eps(pipeline):
    best = str(pipeline / "digits0-4" / "b" / "best.pt")
    with pytest.raises(UserError, match="--norm linf needs an --eps of its own: "
                                        "the checkpoint's 0.5 is in l2"):
        evaluate.main([best, "--norm", "linf"])


def test_edited_results_and_checkpoints(pipeline, tmp_path):
    """A finished run's files that somebody has edited: one line, never a traceback or a number."""
    argv = ["--dataset", "digits0-4", *QUICK, "--epochs", "4", "--lr-decays", "2",
            "--split", "csat", "--size", "2", "--run", "b"]
    for text in ("[]", "{}", "null", '{"settings": 1, "accuracy": 2}', "{"):
        shutil.rmtree(tmp_path / "digits0-4", ignore_errors=True)
        shutil.copytree(pipeline / "digits0-4" / "b", tmp_path / "digits0-4" / "b")
        (tmp_path / "digits0-4" / "b" / "result.json").write_text(text)
        with pytest.raises(UserError):
            sat.main([*argv, "--results", str(tmp_path)])
        with pytest.raises(UserError):
            transfer.main([str(tmp_path / "digits0-4" / "b" / "best.pt"),
                           "--config", str(HERE / "configs/transfer/digits5-9.yaml")])
    best = torch.load(pipeline / "digits0-4" / "b" / "best.pt", weights_only=True)
    for key, value in (("args", []), ("args", {}), ("classes", 3), ("A_classes", ["zebra"]), ("epoch", None),
                       ("model", {}), ("arch", "vgg"), ("head", 7)):
        torch.save({**best, key: value}, tmp_path / "edited.pt")
        if key != "head":
            with pytest.raises(UserError):
                evaluate.main([str(tmp_path / "edited.pt")])


def test_scores_that_are_not_finite(pipeline, tmp_path):
    argv = ["--dataset", "digits0-4", *QUICK, "--epochs", "4", "--lr-decays", "2",
            "--split", "esat", "--results", str(tmp_path)]
    shutil.copytree(pipeline / "digits0-4" / "rank-preactresnet8-seed0",
                    tmp_path / "digits0-4" / "rank-preactresnet8-seed0")
    path = tmp_path / "digits0-4" / "rank-preactresnet8-seed0" / "scores.pt"
    found = torch.load(path, weights_only=True)
    for entropy in (found["entropy"] * math.nan, found["entropy"] / 0, found["entropy"][:9]):
        torch.save({**found, "entropy": entropy}, path)
        with pytest.raises(UserError, match="scores.pt: its entropy: .* for each of the 649 training"):
            sat.main(argv)


def bad_files(root):
    """name -> (main, argv, message) over files in `root`."""
    write_images(root / "a" / "no_test", classes=("x",))
    write_images(root / "a" / "uneven")
    write_images(root / "a" / "torn")
    shutil.rmtree(root / "a" / "no_test" / "test"), shutil.rmtree(root / "a" / "uneven" / "test" / "dog")
    (root / "a" / "torn" / "train" / "cat" / "1.png").write_bytes(b"\x89PNG not")
    (root / "a" / "short.pt").write_bytes(b"PK\x03\x04 short")
    torch.save({"train": {"x": torch.zeros(2, 3, 8, 8), "y": torch.zeros(2)}, "test": {},
                "classes": ["a", "b"]}, root / "a" / "floats.pt")
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
    yield ("truncated data", sat.main, [*data, "--dataset", "short"],
           "short.pt is truncated or not a file of this project")
    x, y = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1])
    torch.save({"train": {"x": x[:, :, :6], "y": y}, "test": {"x": x[:, :, :6], "y": y},
                "classes": ["a", "b"]}, root / "a" / "oblong.pt")
    torch.save({"train": {"x": x, "y": y}, "test": {"x": x, "y": y}, "classes": ["a", "b", "c"]},
               root / "a" / "empty.pt")
    torch.save({"train": {"x": x, "y": y}, "test": {"x": x[:1], "y": y[:1]}, "classes": ["a", "b"]},
               root / "a" / "one.pt")
    scores = root / "results" / "digits" / "rank-preactresnet8-seed0" / "scores.pt"
    scores.parent.mkdir(parents=True)
    torch.save({"entropy": torch.zeros(3)}, scores)
    yield ("scores of something", sat.main, ["--split", "esat", "--frac", "0.5"],
           "scores.pt is not a file of this kind: it lacks fingerprint")
    yield ("not square", sat.main, [*data, "--dataset", "oblong"],
           "images of 6 x 8 pixels: small images must be square")
    yield ("a class without images", sat.main, [*data, "--dataset", "empty"],
           "1 of its 3 classes have no training image")
    yield ("one test image", sat.main, [*data, "--dataset", "one", "--arch", "preactresnet8"],
           "the test set has 1 image")
    yield "float data", sat.main, [*data, "--dataset", "floats"], "train must hold x, uint8"
    yield ("malicious data", sat.main, [*data, "--dataset", "malicious"],
           "malicious.pt is truncated or not a file of this project")
    for name, message in (
            ("foreign", "lacks model"), ("list", "lacks model"), ("pickle", "truncated or not a file"),
            ("none", "no file"),
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


def test_scores_of_another_data_set(pipeline, tmp_path):
    folder = tmp_path / "digits" / "rank-preactresnet8-seed0"
    folder.mkdir(parents=True)
    (folder / "scores.pt").write_bytes(
        (pipeline / "digits0-4" / "rank-preactresnet8-seed0" / "scores.pt").read_bytes())
    with pytest.raises(UserError, match="scores.pt belongs to other data .*digits0-4 there, digits here"):
        sat.main(["--split", "esat", "--frac", "0.5", "--results", str(tmp_path)])
    assert not (tmp_path / "digits" / "esat-hardest-0.5-seed0").exists()


def test_run_directory_made_with_other_flags(pipeline):
    argv = ["--dataset", "digits0-4", *QUICK, "--epochs", "4", "--lr-decays", "2",
            "--split", "csat", "--size", "2", "--run", "b"]
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


def test_transfer_of_an_unfinished_run(pipeline, tmp_path):
    (tmp_path / "last.pt").write_bytes(
        (pipeline / "digits0-4" / "rank-preactresnet8-seed0" / "last.pt").read_bytes())
    with pytest.raises(UserError, match="result.json is missing beside .*last.pt: "
                                        "give the best.pt of a finished run"):
        transfer.main([str(tmp_path / "last.pt"), "--config", str(HERE / "configs/transfer/digits5-9.yaml"),
                       "--results", str(tmp_path)])


def test_a_typed_amount_replaces_that_of_a_config(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("dataset: digits\nfrac: 0.3\n")
    amount = lambda *words: [getattr(sat.command_line(["--config", str(config), *words]), name)
                             for name in ("frac", "size", "classes")]
    assert amount() == [0.3, None, None] and amount("--frac", "0.4") == [0.4, None, None]
    assert amount("--split", "csat") == [0.3, None, None]
    assert amount("--size", "40") == amount("--size=40") == [None, 40, None]
    assert amount("--split", "csat", "--classes", "3") == [None, None, ["3"]]
    assert amount("--split", "full") == amount("--split", "none") == [None] * 3
    with pytest.raises(UserError, match="takes one of --frac, --size"):
        amount("--frac", "0.4", "--size", "4")
    config.write_text("dataset: digits\nsplit: full\nfrac: 0.3\n")
    with pytest.raises(UserError, match="--split full takes no --frac"):
        amount()
