"""The command line, configs, files of the user's own, and inputs that must be refused in one line.

    python -m pytest -q tests/test_cli.py
"""
import math
import os
import pickle
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import attacks
import config
from data import load_dataset
import evaluate
import flags
import rank
import runs
import sat
import subset
import train
import transfer
from common import UserError
from conftest import HERE
from small import (AUTOATTACK, CSAT, ONE_EPOCH, R, RANKING, SAT, Malicious, few, finished,  # noqa: F401
                   workplace, zipped)

TARGET = ["--config", str(HERE / "configs/transfer/digits5-9.yaml")]


def test_command_line_beats_yaml_beats_defaults():
    Path("c.yaml").write_text("dataset: digits\nlr: 5e-2\nepochs: 3\nrandom-start: true\nlr-decays: [1, 2]\n"
                              "classes: [1, 2]\n")
    words = ["--config", "c.yaml", "--split", "csat"]
    args = sat.command_line([*words, "--epochs", "4", "--lr", "0.05"])
    expected = {"lr": 0.05, "epochs": 4, "random_start": True, "lr_decays": [1, 2], "batch_size": 128,
                "classes": ["1", "2"], "split": "csat"}
    assert {k: getattr(args, k) for k in expected} == expected
    assert {k: args.base[k] for k in expected} == {**expected, "epochs": 3, "split": "esat"}
    assert args.typed == {"split", "epochs", "lr"}, "also a value that is the config's"
    args = sat.command_line([*words, "--no-random-start", "--lr-decays"])
    assert (args.random_start, args.lr_decays) == (False, [])
    assert args.typed == {"split", "random_start", "lr_decays"}


@pytest.mark.parametrize("path", sorted((HERE / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_is_the_defaults_updated_by_the_file(path):
    texts, words = yaml.load(path.read_text(), yaml.BaseLoader), ["--config", str(path)]
    parsed = {name: config.parse(name, "", words) for name in ("sat.py", "rank.py")}
    if path.parent.name == "transfer":
        parsed = {"transfer.py": config.parse("transfer.py", "", ["x.pt", *words], "best.pt")}
    for name, args in parsed.items():
        for flag, default, *_ in (row for group in flags.SCRIPTS[name] for row in flags.FLAGS[group]):
            value, text = getattr(args, flags.dest(flag)), texts.get(flag[2:])
            if text is None:
                assert value == default, flag
            elif isinstance(text, list):
                assert value == [type(v)(t) for v, t in zip(value, text, strict=True)]
            else:
                assert value == type(default)(text), flag
            assert args.base[flags.dest(flag)] == value
        assert args.typed <= {"checkpoint"}


@pytest.mark.parametrize("row", """
cifar10      preactresnet18 200 128 0.1 100,150 5e-4 l2 0.5 0.1
cifar10-linf preactresnet18 200 128 0.1 100,150 5e-4 linf 0.031372549 0.0078431373
cifar100     preactresnet18 200 128 0.1 100,150 5e-4 l2 0.5 0.1
imagenet200  resnet50       150 256 0.1 50,100  1e-4 l2 3.0 0.5
transfer/cifar10    preactresnet18 40 128 0.1 20,30 5e-4 l2 0.5 -
transfer/svhn       preactresnet18 40 128 0.1 20,30 5e-4 l2 0.5 -
transfer/caltech256 resnet50      100 128 0.1 50,75 1e-4 l2 3.0 -
transfer/flowers102 resnet50      100 102 0.1 50,75 1e-4 l2 3.0 -
""".split("\n")[1:-1])
def test_configs_are_table_2(row):
    """Data set, network, epochs, batch size, lr, decays, L2 decay (Table 2); norm, eps, step size (A.1). Also
    of the same under the other common threat model, Linf 8/255 in steps of 2/255."""
    name, arch, epochs, batch_size, lr, decays, weight_decay, norm, eps, step_size = row.split()
    words = ["--config", str(HERE / f"configs/{name}.yaml")]
    expected = {"dataset": name.split("/")[-1].split("-")[0], "epochs": int(epochs), "lr": float(lr),
                "batch_size": int(batch_size), "lr_decays": [int(d) for d in decays.split(",")],
                "weight_decay": float(weight_decay), "norm": norm, "eps": float(eps), "augment": "full",
                "eval_attacks": list(attacks.STANDARD), "eval_n": 0, "select_n": 0}
    args = config.parse("transfer.py", "", ["x.pt", *words], "best.pt")
    if step_size != "-":
        args = sat.command_line([*words, "--split", "full"])
        expected |= {"attack": "pgd", "steps": 7, "step_size": float(step_size), "random_start": False}
    assert {k: getattr(args, k) for k in expected} == expected
    assert config.from_yaml(words[1])["arch"] == arch  # of a transfer, the source's


@pytest.mark.parametrize("main,words,part,absent", [
    (sat.main, [], "pixels in [0, 1] (default: 0.5)", "CHECKPOINT"),
    (sat.main, ["--config", str(HERE / "configs/cifar10-linf.yaml")], "(default: linf)", "(default: l2)"),
    (transfer.main, TARGET, "passes over the training set (default: 20)", "--arch"),
    (evaluate.main, [], "CHECKPOINT", "--lr"),
])
def test_help_shows_units_and_defaults(main, words, part, absent, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--help"])
    text = capsys.readouterr().out
    assert part in text
    assert absent not in text


def test_evaluate_takes_what_is_not_typed_from_the_checkpoints_run(finished):
    best = str(finished / "few/b/best.pt")
    args = evaluate.command_line([best, "--eval-n", "3"])
    assert (args.eval_n, args.eval_batch, args.eval_attacks, args.dataset) == (3, 5, ["apgd-ce"], "few")
    with pytest.raises(UserError, match="--norm linf needs an --eps of its own: the checkpoint's 0.5 is in"):
        evaluate.command_line([best, "--norm", "linf"])
    assert evaluate.command_line([best, "--norm", "linf", "--eps", "0.03"]).eps == 0.03


@pytest.mark.parametrize("words,idle,differ", [
    ("--weight-factor 3", "--weight emphasis", set()), ("--order random", "--metric svar", set()),
    ("--split full", "--order easiest --metric svar --weight balanced", set()),
    ("--split none", "--weight-factor 3 --attack fgsm-rs", set()),
    ("--split csat --classes 3", "--order random --metric svar", set()),
    ("--attack fgsm-rs", "--steps 3 --step-size 0.2", {"steps", "step_size"}),  # they part tables of results
])
def test_flags_without_effect_are_named_and_make_no_other_run(words, idle, differ, capsys):
    args = sat.command_line(words.split())
    assert capsys.readouterr().out == ""
    other = sat.command_line(f"{words} {idle}".split())
    notes = capsys.readouterr().out
    for flag in idle.split()[::2]:
        assert f"note: {flag} has no effect with --" in notes
    assert {k for k, v in runs.identity(args).items() if runs.identity(other)[k] != v} == differ
    if not differ:
        assert sat.run_folder(other) == sat.run_folder(args)


@pytest.mark.parametrize("words,amounts", [
    ("", [0.3, None, None]), ("--frac 0.4", [0.4, None, None]), ("--split csat", [0.3, None, None]),
    ("--size 40", [None, 40, None]), ("--size=40", [None, 40, None]), ("--split full", [None, None, None]),
    ("--split csat --classes 3", [None, None, ["3"]]), ("--split none", [None, None, None]),
])
def test_a_typed_amount_replaces_that_of_a_config(words, amounts):
    Path("c.yaml").write_text("dataset: digits\nfrac: 0.3\n")
    args = sat.command_line(["--config", "c.yaml", *words.split()])
    assert [args.frac, args.size, args.classes] == amounts


# --- what is refused ----------------------------------------------------------------------------------------

BAD = [  # words of sat.py, message
    ("--split full --dataset mnist", "no data set 'mnist'"), ("--dataset ../x", "'../x' is not a plain name"),
    ("--run ..", "'..' is not a plain name"), ("--run 'a\nb'", "is not a plain name"),
    ("--conf c.yaml", "unrecognized arguments: --conf"),
    ("--lrr 1", "unrecognized arguments: --lrr 1 (python sat.py --help lists what is valid)"),
    ("--config none.yaml", "cannot read the config none.yaml"), ("--split half", "invalid choice: 'half'"),
    ("--attack cw", "there is no attack 'cw'; valid: pgd, fgsm-rs, pgd-authors"),
    ("--lr 1e308", "'1e308' is not a finite number above 0 and at most 1e+30"),
    ("--lr fast", "'fast' is not a finite number above 0"), ("--eps nan", "'nan' is not a finite number of"),
    ("--epochs 0", "'0' is not a whole number of at least 1"), ("--seed 2147483648", "at most 2147483647"),
    ("--threads 10000", "'10000' is not a whole number of at least 0 and at most"),
    ("--frac 0", "above 0 and at most 1"), ("--frac 1.5", "'1.5' is not a finite number above 0 and at mo"),
    ("--split csat --frac 0.01", "comes to 0: choose 1 to 10"), ("--size 1298", "choose 1 to 1297"),
    ("--split full --batch-size 1298", "must be 1 to 1297"),
    ("--split csat --classes cat", "unknown class cat; valid: 0, 1, 2"),
    ("--split csat --order redrawn", "it goes with --split esat"),
    ("--split csat --classes 3 --size 1", "takes one of --frac, --size, --classes; given: size, classes"),
    ("--frac 0.4 --size 4", "--split esat takes one of --frac, --size; given: frac, size"),
    ("--classes 3", "--split esat takes no --classes"), ("--split full --size 3", "full takes no --size"),
    ("--split full --scores x.npy", "--split full takes no --scores"),
    ("--scores x.npy --order random", "--scores goes with --order hardest or easiest"),
    ("--scores x.npy --split csat --classes 3", "--scores goes with --order hardest or easiest, and without"),
    ("--scores x.npy", "--scores x.npy: [Errno 2] No such file"),
    ("--norm linf --step-size 0.01", "--norm linf needs --eps of its own"),
    ("--norm linf --eps=0.03", "--norm linf needs --step-size of its own"),
    ("--norm linf --eps 8 --step-size 2", "--eps 8: pixels are in [0, 1] (8/255 is --eps 0.0314)"),
    ("--split full --device cuda", "torch sees no GPU here; use --device cpu"),
    ("--split full --compile", "--compile needs a compiler"),
]
CONFIGS = [  # text of a config, message
    ("learning-rate: 1", "c.yaml: unknown key 'learning-rate'; valid keys: amp, arch"),
    ("lr: fast", "'fast' is not a finite number"), ("lr: true", "'true' is not a finite number"),
    ("split: half", "invalid choice: 'half'"), ("epochs: 1:30", "'1:30' is not a whole number"),
    ("random-start: 1", "random-start: '1' is not a value"), ("lr: ", "lr: '' is not a value"),
    ("lr: [0.1, 0.2]", "is not a value of this flag"), ("lr: {a: 1}", "is not a value"),
    ("lr: 0.1\nlr: 0.2", "lr is given twice"), ("- lr", "flat list"), ("lr: [", "cannot read the config c"),
    ("norm: linf\neps: 0.03", "c.yaml: norm linf needs --step-size of its own"),
    ("!!python/object/apply:os.system ['touch pwned']", "flat list"),
]
OTHERS = [
    (rank.main, "--split esat", "unrecognized arguments: --split esat", ""),
    (transfer.main, "x.pt --attack pgd", "unrecognized arguments: --attack pgd", ""),
    (evaluate.main, ".", ". is a folder: give the checkpoint in it, say best.pt", ""),
]


@pytest.mark.parametrize("main,words,message,text", [
    *OTHERS, *((sat.main, *row, "") for row in BAD),
    *((sat.main, "--config c.yaml", message, text) for text, message in CONFIGS)])
def test_bad_flags_and_configs(main, words, message, text, monkeypatch):
    Path("c.yaml").write_text(text)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(train, "training_batches", None)  # nothing is trained
    with pytest.raises(UserError) as e:
        main(shlex.split(words))
    assert message in str(e.value)
    assert not text or "c.yaml: " in str(e.value)
    assert "\n" not in str(e.value)
    assert sorted(os.listdir()) == ["c.yaml", "data"], "nothing is written"


@pytest.mark.parametrize("name,words", [
    ("sat.py", "--lr fast"), ("rank.py", "--lr fast"), ("transfer.py", "none.pt"), ("evaluate.py", "none.pt"),
    ("report.py", "--results no"), ("bench.py", "--fractions 2")])
def test_a_bad_input_is_one_line_and_exit_code_2(name, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, *words.split()])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(HERE / name), run_name="__main__")
    out, error = capsys.readouterr()
    assert e.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert out == ""


# --- files --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content,message", [
    ({"some": "thing"}, "lacks model"), (["no", "dict"], "lacks model"), (None, "there is no file"),
    (SimpleNamespace(), "x.pt is truncated or not a file of this project"),
    ({"model": Malicious()}, "x.pt is truncated or not a file of this project (UnpicklingError)"),
])
@pytest.mark.parametrize("main", [evaluate.main, transfer.main])
def test_files_that_are_no_checkpoints(main, content, message):
    if content is not None:
        torch.save(content, "x.pt")
    files = os.listdir()
    with pytest.raises(UserError) as e:
        main(["x.pt"])
    assert message in str(e.value)
    assert "\n" not in str(e.value)
    assert os.listdir() == files


def test_files_of_a_run_that_somebody_has_edited(finished):
    """One line, never a traceback or a number; as are the sources that transfer.py does not take."""
    shutil.copytree(finished, "results")
    best = Path("results/few/b/best.pt")
    ckpt, content, model = runs.load(best), best.read_bytes(), evaluate.load_model(best)[0]
    for key, value in (("args", []), ("args", {}), ("classes", 3), ("A_classes", ["zebra"]), ("epoch", None),
                       ("model", {}), ("arch", "vgg")):
        torch.save({**ckpt, key: value}, "edited.pt")
        with pytest.raises(UserError, match="edited.pt is not a checkpoint of this project"):
            evaluate.main(["edited.pt"])
    few_data = load_dataset("few", "data")
    runs.save("frozen.pt", runs.checkpoint(model.transfer(10), few_data, sat.command_line(CSAT), 1))
    ckpt["model"]["head.bias"] += 1
    torch.save(ckpt, best.with_name("other.pt"))
    shutil.copy(RANKING / "last.pt", "last.pt")
    Path("cut.pt").write_bytes(content[:len(content) // 2])
    for path, message in (("frozen.pt", "is itself a transferred network; give the best.pt of a run of sat"),
                          ("last.pt", "result.json is missing beside .*last.pt: give the best.pt of a fini"),
                          (best.with_name("other.pt"), "result.json was not made by .*other.pt: give the b"),
                          ("cut.pt", "cut.pt is truncated or not a file of this project")):
        with pytest.raises(UserError, match=message):
            transfer.main([str(path), *TARGET])
    for text in ("[]", "{}", "null", '{"settings": 1, "accuracy": 2}', "{"):
        best.with_name("result.json").write_text(text)
        for main, words in ((sat.main, CSAT), (transfer.main, [str(best), *TARGET])):
            with pytest.raises(UserError, match="result.json"):
                main(words)
    assert not Path("results/digits5-9").exists()


@pytest.mark.parametrize("change,message", [
    ({"entropy": torch.arange(96) * math.nan}, "its entropy: 0 finite numbers .* of the 96 training ex"),
    ({"entropy": torch.arange(9.0)}, "its entropy: 9 finite numbers .* of the 96 training ex"),
    ({"entropy": torch.ones(96)}, "its entropy are all 1: they order nothing"),
    ({"fingerprint": {"name": "digits"}}, "scores.pt belongs to other data .name: digits there, few here"),
    ({"entropy": ...}, "has no entropy: make it again with rank.py --force"),
])
def test_rankings_that_are_refused(change, message, finished):
    ranking = runs.load(finished / "few/rank-preactresnet8-seed0/scores.pt")
    RANKING.mkdir(parents=True)
    torch.save({k: v for k, v in {**ranking, **change}.items() if v is not ...}, RANKING / "scores.pt")
    with pytest.raises(UserError, match=message):
        sat.main([*SAT, "--run", "r"])
    assert not R.exists()


def test_a_ranking_of_other_flags_is_named(finished, capsys):
    shutil.copytree(finished, "results")
    few_data = load_dataset("few", "data")
    rank.scores_for(sat.command_line([*CSAT, "--seed", "4"]), few_data, "cpu")
    assert capsys.readouterr().out == ""
    rank.scores_for(sat.command_line([*CSAT, "--lr", "0.2"]), few_data, "cpu")
    assert "scores.pt was made with other flags (lr 0.1 there, 0.2 here)" in capsys.readouterr().out


def test_scores_of_ones_own():
    values, order = np.array([0.3, -1.0, 7.0, 2.5]), np.array([2, 3, 0, 1])  # hardest first
    np.save("a.npy", values)
    np.savez("a.npz", scores=values)
    torch.save(torch.from_numpy(values), "a.pt")
    np.save("order.npy", order)
    torch.save(order, "order.pth")
    # As numpy 1 pickled it, and the authors of the paper their rankings.
    old = pickle.dumps(order, 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    Path("old.pth").write_bytes(zipped("order.pth", old))
    for name in ("a.npy", "a.npz", "a.pt", "order.npy", "order.pth", "old.pth"):
        scores = subset.read_scores(Path(name))
        assert scores.argsort(descending=True).tolist() == order.tolist()
        assert scores.dtype == torch.float64
    np.savez("two.npz", a=values, b=values)
    np.save("objects.npy", np.array([{}]), allow_pickle=True)
    np.save("matrix.npy", np.ones((2, 2)))
    for name, content in (("dict", {"a": 3}), ("bad", Malicious()), ("worse", np.array([Malicious()]))):
        torch.save(content, f"{name}.pt")
    Path("foreign.pt").write_bytes(bytes(range(256)))
    for name in ("two.npz", "objects.npy", "matrix.npy", "dict.pt", "bad.pt", "worse.pt", "foreign.pt"):
        with pytest.raises(UserError, match=f"{name}: (?!.*weights_only).*; valid: N numbers in a .pt or"):
            subset.read_scores(Path(name))
    assert not Path("pwned").exists()
    for values in (order + 1, order + 1.0, order.astype(float)):
        np.save("ranks.npy", values)
        with pytest.raises(UserError, match="holds each of . to . once: an order or ranks"):
            subset.read_scores(Path("ranks.npy"))


def test_a_run_by_scores_of_ones_own():
    """What the file holds, not its name, is in the run's identity; no ranking is made."""
    scores = torch.arange(96) % 7 + torch.arange(96) / 1e4
    folders = []
    for name, values in (("a", scores), ("same", scores), ("b", -scores)):
        torch.save(values, f"{name}.pt")
        args = sat.command_line(["--scores", f"{name}.pt"])
        sat.own_scores(args)
        folders.append(sat.run_folder(args)[0].name)
    assert folders[0] == folders[1]
    assert folders[0] != folders[2]
    assert "-scores=" in folders[0]
    sat.main([*SAT, "--epochs", "1", "--lr-decays", "--scores", "a.pt", "--size", "40", "--run", "r"])
    result = runs.read_json(R / "result.json")
    assert result["A"] == 40
    assert result["ranking"] == {"scores": result["args"]["scores"], "file": "a.pt"}
    assert not RANKING.exists()
    torch.save(scores[:9], "short.pt")
    with pytest.raises(UserError, match="each of the 96 training"):
        sat.main([*SAT, "--scores", "short.pt"])


# --- called from code ---------------------------------------------------------------------------------------

X, Y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
BATCH = {"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), "x": X, "y": Y, "eps": 0.5}
VALID = {  # arguments that each function takes
    attacks.pgd: {**BATCH, "step_size": 0.1}, attacks.fgsm_rs: BATCH,
    attacks.autoattack: {**BATCH, "attacks": ["apgd-ce"]},
    attacks.usable_attacks: {"attacks": ["apgd-t"], "n_classes": 4},
    attacks.project: {"delta": X, "eps": 0.5, "norm": "l2"},
    attacks.random_start: {"x": X, "eps": 0.5, "norm": "l2"},
    subset.choose_A: {"split": "esat", "y": Y, "classes": ["a", "b"], "amount": 2, "scores": torch.rand(4)},
    subset.weight_A: {"kind": "balanced", "n_A": 1, "n": 3},
    subset.check_scores: {"scores": torch.rand(4), "n": 4},
    train.sat_loss: {"logits": torch.rand(4, 3), "y": Y, "w": torch.ones(4)}}
INVALID = [(attack, *row) for attack in list(VALID)[:3] for row in (
    ({"x": 255 * X}, "not in [0, 1]: give pixels, and put the normalisation into the model"),
    ({"x": X - 0.5}, "not in [0, 1]"), ({"x": X * math.nan}, "not in [0, 1]"), ({"eps": -0.1}, "eps = -0.1"),
    ({"eps": math.inf}, "eps = inf"), ({"norm": "l1"}, "'l1'"), ({"y": Y.float()}, "int64"),
    ({"y": Y[:3]}, "a label for each"), ({"x": X[0], "y": Y[:1]}, "(N, C, H, W)"))]
INVALID += [(attacks.pgd, *row) for row in (
    ({"x": (255 * X).byte()}, "as floats"), ({"x": X.numpy()}, "give images"), ({"eps": "0.5"}, "eps = 0.5"),
    ({"start": X[:2]}, "start is"), ({"steps": -1}, "0 or more"), ({"steps": 2.5}, "0 or more"),
    ({"step_size": -0.1}, "0 or more"), ({"step_size": math.nan}, "0 or more"))]
INVALID += [(attacks.autoattack, {"attacks": names}, "on 5 classes: valid are") for names in ([], ["pgd"])]
INVALID += [(subset.choose_A, *row) for row in (
    ({"split": "ESAT"}, "valid are none"), ({"order": "hard"}, "valid are none"), ({"scores": None}, "one"),
    ({"scores": torch.rand(5)}, "one for each"), ({"scores": X[0, 0, 0, :4] / 0}, "one for each"),
    ({"scores": torch.full((4,), 2.0)}, "are all 2: they order nothing"), ({"amount": "2"}, "|A| = 2 of 4"),
    ({"amount": None}, "|A| = None of 4"))]
INVALID += [
    (attacks.project, {"norm": "l1"}, "'l1': l2 or linf"), (subset.weight_A, {"n_A": 5}, "5 of 3"),
    (attacks.random_start, {"norm": "l1"}, "'l1': l2 or linf"),
    (subset.weight_A, {"kind": "Balanced"}, "'Balanced': vanilla, balanced, emphasis"),
    (subset.check_scores, {"scores": torch.zeros(0)}, "0 finite numbers"),
    (attacks.usable_attacks, {"n_classes": 2}, "apgd-t on 2 classes: valid are apgd-ce fab-t square"),
    (train.sat_loss, {"w": torch.ones(4, 1)}, "they must agree")]


@pytest.mark.parametrize("function,change,message", INVALID)
def test_functions_refuse_what_they_would_misread(function, change, message, monkeypatch):
    monkeypatch.setattr(attacks, "attack_batch", AUTOATTACK)
    with pytest.raises(ValueError) as e:
        function(**{**VALID[function], **change})
    assert message in str(e.value)


@pytest.mark.parametrize("gradient_steps,passes", [(3, 3), (None, 2)])
def test_an_attack_of_ones_own_is_one_more_line_of_the_table(gradient_steps, passes, monkeypatch):
    """It gets those of the settings that it has parameters for; gradient_steps = None counts --steps."""
    batches = []

    def brighter(model, x, y, *, eps):
        batches.append(len(x))
        return (x + eps / 8).clamp(0, 1)
    monkeypatch.setitem(attacks.ATTACKS, "brighter", attacks.Attack(brighter, gradient_steps))
    words = [*ONE_EPOCH, "--split", "full", "--attack", "brighter"]
    sat.main(words)
    assert batches == [32, 32, 32]
    cost = runs.read_json(R / "result.json")["cost"]
    assert cost["attacked"] == 96
    assert cost["forward"] == cost["backward"]
    assert cost["forward"] == 96 * (1 + passes)
    assert cost["forward_equivalents"] == 96 * (3 + 2 * passes)
    with pytest.raises(UserError, match="--attack brighter takes no start: it goes without --random-start"):
        sat.main([*words, "--random-start", "--force"])
