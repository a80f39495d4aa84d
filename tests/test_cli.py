"""The command line, configs, files of the user's own, and inputs that must be refused in one line."""
import contextlib
import functools
import math
import os
import pickle
import runpy
import shlex
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import attacks
import evaluate
import flags
import models
import rank
import runs
import sat
import subset
import train
import transfer
from common import HERE, UserError
from conftest import AUTOATTACK, CSAT, ONE, ONE_EPOCH, RANK, RANKING, RANKING_1, SAT, R


def test_command_line_beats_yaml_beats_defaults():
    Path("c.yaml").write_text("{lr: 5e-2, epochs: 3, random-start: True, lr-decays: [1, 2], classes: [1, 2]}")
    words = ["--config", "c.yaml", "--split", "csat"]
    args = sat.command_line([*words, "--epochs", "4", "--lr", "0.05"])
    expected = {"lr": 0.05, "epochs": 4, "random_start": True, "lr_decays": [1, 2], "batch_size": 128,
                "classes": ["1", "2"], "split": "csat"}
    assert vars(args).items() >= expected.items()
    assert args.base.items() >= {**expected, "epochs": 3, "split": "esat"}.items()
    assert args.typed == {"split", "epochs", "lr"}, "also a value that is the config's"
    args = sat.command_line([*words, "--no-random-start", "--lr-decays"])
    assert (args.random_start, args.lr_decays) == (False, [])
    assert args.typed == {"split", "random_start", "lr_decays"}


@pytest.mark.parametrize("row", """
cifar10      preactresnet18 200 128 0.1 100,150 5e-4 l2 0.5 0.1 7
cifar10-linf preactresnet18 200 128 0.1 100,150 5e-4 linf 0.031372549 0.0078431373 7
cifar100     preactresnet18 200 128 0.1 100,150 5e-4 l2 0.5 0.1 7
imagenet200  resnet50       150 256 0.1 50,100  1e-4 l2 3.0 0.5 7
transfer/cifar10    preactresnet18 40 128 0.1 20,30 5e-4 l2 0.5 - -
transfer/svhn       preactresnet18 40 128 0.1 20,30 5e-4 l2 0.5 - -
transfer/caltech256 resnet50      100 128 0.1 50,75 1e-4 l2 3.0 - -
transfer/flowers102 resnet50      100 102 0.1 50,75 1e-4 l2 3.0 - -
""".split("\n")[1:-1])
def test_configs_are_table_2(row):
    name, *values = row.split()
    texts = yaml.load((HERE / f"configs/{name}.yaml").read_text(), yaml.BaseLoader)
    texts["lr-decays"] = ",".join(texts["lr-decays"])
    keys = "arch epochs batch-size lr lr-decays weight-decay norm eps step-size steps augment"  # and A.1
    assert [texts.get(key, "-") for key in keys.split()] == [*values, "full"]
    assert texts["dataset"] == name.split("/")[-1].split("-")[0]
    assert texts.keys() <= {*keys.split(), "dataset", "eval-batch", "workers"}
    assert flags.DEFAULTS.items() >= {"attack": "pgd", "random_start": False, "eval_n": 0, "select_n": 0,
                                      "eval_attacks": list(attacks.STANDARD), "eval_batch": 250,
                                      "weight_decay": 5e-4}.items()


def test_evaluate_takes_what_is_not_typed_from_the_checkpoints_run():
    sat.main(CSAT)
    best, folder = "results/few/b/best.pt", Path("results/few/b")
    evaluate.main([best, "--eval-n", "3"])
    path, = folder.glob("eval-*.json")
    assert runs.load(path)["settings"].items() >= {"n": 3, "batch_size": 5, "attacks": ["apgd-ce"]}.items()
    with pytest.raises(UserError, match="--norm linf needs an --eps of its own: the checkpoint's 0.5 is in"):
        evaluate.main([best, "--norm", "linf"])
    with pytest.raises(UserError, match="eps = 30.0: l2 takes 0 to 8, "):  # AutoAttack's ValueError
        evaluate.main([best, "--eps", "30"])
    evaluate.main([best, "--norm", "linf", "--eps", "0.03"])
    assert 0.03 in [runs.load(path)["settings"]["eps"] for path in folder.glob("eval-*.json")]


@pytest.mark.parametrize("words,idle", [
    ("--weight-factor 3", "--weight emphasis"), ("--split none", "--weight-factor 3 --attack fgsm-rs"),
    ("--split full", "--order easiest --metric svar --weight balanced"),
    ("--attack fgsm-rs --norm linf --eps 0.03", "--steps 3 --step-size 0.2"),
    ("--order random", "--metric svar"), ("--split csat --classes 3", "--order random --metric svar"),
    ("--subset a.pt", "--order easiest --metric svar"), ("--ranking a.pt", "--metric svar")])
def test_flags_without_effect_are_named_and_make_no_other_run(words, idle, capsys):
    differ = {"steps", "step_size"} if "--steps" in idle else set()  # these part tables of results
    args = sat.command_line(words.split())
    assert capsys.readouterr().out == ""
    other = sat.command_line(f"{words} {idle}".split())
    notes = capsys.readouterr().out
    for flag in idle.split()[::2]:
        assert f"note: {flag} has no effect with --" in notes
    assert {k for k, v in runs.identity(args).items() if runs.identity(other)[k] != v} == differ
    assert differ or sat.run_folder(other) == sat.run_folder(args)


AMOUNT, OTHERS = "frac: 0.3", "order: redrawn\nweight-factor: 3"
SCORES = "split: csat\nsize: 2\nscores: s.pt\norder: easiest"


@pytest.mark.parametrize("text,words,expected", [
    (AMOUNT, "", {"frac": 0.3, "size": None, "classes": None}), (AMOUNT, "--frac 0.4", {"frac": 0.4}),
    (AMOUNT, "--split csat", {"frac": 0.3}), (AMOUNT, "--size 40", {"frac": None, "size": 40}),
    (AMOUNT, "--split csat --classes 3", {"frac": None, "classes": ["3"]}),
    (AMOUNT, "--split full", {"frac": None}), (AMOUNT, "--split none", {"frac": None}),
    (SCORES, "--classes 3", {"scores": None, "classes": ["3"]}), (SCORES, "--order random", {"scores": None}),
    (SCORES, "--ranking r.npy", {"scores": None, "order": "easiest"}), (SCORES, "", {"scores": Path("s.pt")}),
    ("subset: m.npy", "--scores s.npy", {"subset": None, "scores": Path("s.npy"), "frac": 0.5}),
    (OTHERS, "--subset A.npy", {"order": "hardest"}),  # redrawn would draw other examples in each epoch
    (OTHERS, "--split csat --classes 3", {"order": "hardest"}),
    (OTHERS, "--weight emphasis", {"weight": "emphasis", "weight_factor": None}),
    (OTHERS, "--weight emphasis --weight-factor 2", {"weight": "vanilla", "weight_factor": 2}),
    (OTHERS, "--split none --random-start", {"random_start": True, "weight_factor": None})])
def test_what_is_typed_beats_what_a_config_says_of_another_flag(text, words, expected):
    Path("c.yaml").write_text(f"dataset: digits\n{text}\n")
    assert vars(sat.command_line(["--config", "c.yaml", *words.split()])).items() >= expected.items()


BAD = [  # words of sat.py, message
    ("--dataset mnist", "no data set 'mnist'"), ("--dataset ../x", "'../x' is not a plain name"),
    ("--run ..", "'..' is not a plain name"), ("--run 'a\nb'", "is not a plain name"),
    ("--conf c.yaml", "arguments: --conf c.yaml; did you mean --config? (python"), ("--eps nan", "'nan' is"),
    ("--config none.yaml", "there is no config none.yaml"), ("--attack cw", "no attack 'cw'; valid: pgd"),
    ("--lr 1e308", "not a finite number above 0 and at most 1e+30"), ("--threads 10000", "0 and at most"),
    ("--seed 2147483648", "at most 2147483647"), ("--epochs 0", "'0' is not a whole number of at least 1"),
    ("--frac 0", "above 0 and at most 1"), ("--frac 1.5", "'1.5' is not a finite number above 0"),
    ("--split csat --frac 0.01", "comes to 0 of 10: give a --size of 1 to 10,"),
    ("--size 1298", "comes to 1298 of 1297: give a --size of 1 to 1297,"),
    ("--split full --batch-size 1298", "give 2 to 1297"), ("--split none --scores x.npy", "no --scores"),
    ("--split csat --classes cat", "unknown class cat; valid: 0, 1, 2"), ("--classes 3", "takes no --class"),
    ("--frac 0.4 --size 4", "takes one of --frac, --size, --subset"), ("--split full --size 3", "no --size"),
    ("--split csat --order redrawn", "goes with --split esat"), ("--scores x.npy", "x.npy: [Errno 2] No su"),
    ("--scores x.npy --order random", "--scores goes with --order hardest or easiest"),
    ("--scores x.npy --split csat --classes 3", "--scores goes with --order hardest or easiest, and without"),
    ("--norm linf --step-size 0.01", "linf needs --eps"), ("--norm linf --eps=0.03", "linf needs --step"),
    ("--norm linf --eps 8 --step-size 2", "--eps 8: pixels are in [0, 1] (8/255 is --eps 0.0314)"),
    ("--split full --eps 128", "--eps 128: l2 reaches 8 on images of digits, as pixels"),
    ("--lr-decays 2 5 2", "2 5 2 has an epoch twice"), ("--split full --device cuda", "no GPU here"),
    ("--split full --compile on", "on needs a compiler (gcc")]
CONFIGS = [  # text of a config, message
    ("lr: true", "'true' is not a finite number"), ("epochs: 1:30", "'1:30' is not a whole number"),
    ("learning-rate: 1", "unknown key 'learning-rate'"), ("random-start: 1", "not a value of this switch"),
    ("lr: ", "lr: not a value"), ("lr: [0.1, 0.2]", "lr: not a value"), ("lr: {a: 1}", "lr: not a value"),
    ("lr: 0.1\nlr: 0.2", "lr is given twice"), ("lr: [", "cannot read the config c.yaml"), ("", "flat list"),
    ("norm: linf\neps: 1", "norm linf needs --step"), ("!!python/object/apply:os.system ['x']", "flat list")]


@pytest.mark.parametrize("main,words,message,text", [
    (transfer.main, "x.pt --attack pgd", "unrecognized arguments: --attack pgd", None),
    (evaluate.main, ".", ". is a folder: give the checkpoint in it, say best.pt", None),
    *((sat.main, *row, None) for row in BAD),
    *((sat.main, "--config c.yaml", message, text) for text, message in CONFIGS)])
def test_bad_flags_and_configs(main, words, message, text, monkeypatch):
    Path("c.yaml").write_text(text or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(train, "training_batches", None)  # nothing is trained
    with pytest.raises(UserError) as e:
        main(shlex.split(words))
    assert message in str(e.value)
    assert text is None or "c.yaml: " in str(e.value)
    assert "\n" not in str(e.value)
    assert sorted(os.listdir()) == ["c.yaml", "data"], "nothing is written"


@pytest.mark.parametrize("line", ["sat.py --lr fast", "rank.py --lr fast", "transfer.py none.pt",
                                  "evaluate.py none.pt", "report.py --results no", "bench.py --image-side 2"])
def test_a_bad_input_is_one_line_and_exit_code_2(line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(HERE / sys.argv[0]), run_name="__main__")
    out, error = capsys.readouterr()
    assert (out, error[:7], error.count("\n")) == ("", "error: ", 1)


class Malicious:
    def __reduce__(self):  # unpickled, it would run a command
        return os.system, ("touch pwned",)


def test_files_of_a_run_that_somebody_has_edited():
    """One line, never a traceback or a number; as are the sources that transfer.py does not take."""
    sat.main(CSAT)
    best, target = Path("results/few/b/best.pt"), ["--dataset", "digits5-9"]
    ckpt, about = runs.load(best), best.with_name("result.json")
    frozen = models.build("preactresnet8", 10, [0.3], [0.35]).transfer(10).state_dict()
    edits = [("args", []), ("args", {}), ("classes", 3), ("classes", [*range(10)]), ("classes", ["x"] * 10),
             ("A_classes", ["zebra"]), ("epoch", None), ("model", {}), ("arch", "vgg")]
    for content, message in [
            (["no", "dict"], "lacks model"), ({"model": Malicious()}, "holds more than plain types"),
            ({**ckpt, "model": frozen, "head": "mlp"}, "is itself a transferred network; give the best.pt"),
            *(({**ckpt, "A_classes": None, key: value}, "is not a checkpoint of") for key, value in edits)]:
        torch.save(content, "edited.pt")
        with pytest.raises(UserError, match=f"^[^\n]*edited.pt [^\n]*{message}[^\n]*$"):
            transfer.main(["edited.pt", *target])
    ckpt["model"]["head.bias"] += 1
    torch.save(ckpt, best.with_name("other.pt"))
    Path("cut.pt").write_bytes(best.read_bytes()[:10000])
    for path, message in ((RANKING_1 / "last.pt", "result.json is missing, or not of .*last.pt: give the"),
                          (best.with_name("other.pt"), "result.json is missing, or not of .*other.pt: give"),
                          ("cut.pt", "cut.pt is truncated or not a file of this project")):
        with pytest.raises(UserError, match=message):
            transfer.main([str(path), *target])
    for text in ("null", '{"args": {}}', "{"):
        about.write_text(text)
        for main, words in ((sat.main, CSAT), (transfer.main, [str(best), *target])):
            with pytest.raises(UserError, match="result.json"):
                main(words)
    assert not Path("results/digits5-9").exists()
    assert not Path("pwned").exists()


def test_rankings_that_are_refused():
    rank.main(RANK)
    ranking = runs.load(RANKING / "scores.pt")
    for change, message in [
            ({"entropy": torch.arange(96) * math.nan}, "its entropy scores: 0 finite numbers .* of the 96 "),
            ({"entropy": torch.arange(9.0)}, "its entropy scores: 9 finite numbers .* of the 96 training"),
            ({"entropy": torch.ones(96)}, "all 1: they order nothing"), ({"entropy": ...}, "has no entropy"),
            ({"fingerprint": {"name": "digits"}}, "belongs to other data .name: digits there, few here")]:
        torch.save({k: v for k, v in {**ranking, **change}.items() if v is not ...}, RANKING / "scores.pt")
        with pytest.raises(UserError, match=f"scores.pt.* {message}"):
            sat.main([*SAT, "--run", "r"])
    assert not R.exists()


def test_scores_of_ones_own():
    scores = np.array([2, 3, 0, 1])
    np.save("s.npy", scores)
    np.savez("s.npz", scores=scores)
    torch.save(torch.tensor([2.0, 3, 0, 1], requires_grad=True), "gradient.pt")
    torch.save(torch.from_numpy(scores).bfloat16(), "bfloat16.pt")
    for kind in ("u1", "i2", "i4", "i8", "f2", "f4", ">f8"):
        torch.save(scores.astype(kind), f"{kind}.pth")
    old = pickle.dumps(scores, 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    with zipfile.ZipFile("i8.pth") as new, zipfile.ZipFile("old.pt", "w") as file:
        for name in new.namelist():  # as numpy 1 and the paper's authors pickled it
            file.writestr(name, old if name.endswith("data.pkl") else new.read(name))
    for path in Path().glob("*.*"):
        content, _ = subset.read_file("scores", path, "")
        assert content.tolist() == [2, 3, 0, 1]
        assert content.dtype == torch.float64


def test_files_that_hold_no_scores():
    np.save("matrix.npy", np.ones((2, 2)))
    np.savez("two.npz", a=[1], b=[2])
    torch.save({"a": 3}, "dict.pt")
    np.save("bad.npy", np.array([Malicious()]))
    torch.save(np.array([Malicious()]), "bad.pt")
    Path("s.csv").write_text("2\n3\n")
    for path in Path().glob("*.*"):
        with pytest.raises(UserError, match=f"{path}: (?!.*weights_only).*; valid: N numbers, or a scores"):
            subset.read_file("scores", path, "")
    assert not Path("pwned").exists()


def test_a_run_by_scores_of_ones_own_is_named_by_what_the_file_holds():
    names = []
    for i, scores in enumerate((torch.arange(96.0), np.arange(96), -torch.arange(96.0))):
        torch.save(scores, f"{i}.pt")
        args = sat.command_line(["--scores", f"{i}.pt"])
        sat.read_file_of_A(args)
        names.append(sat.run_folder(args)[0].name)
    assert names[0] == names[1]
    assert names[0] != names[2]
    assert "-scores=" in names[0]
    result = sat.main([*SAT, *ONE, "--scores", "0.pt", "--size", "40"])
    assert result["A"] == 40
    assert result["ranking"] == {"scores": result["args"]["scores"], "file": "0.pt"}
    assert not list(Path("results/few").glob("rank*"))


def linear(n_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, n_classes))


X, Y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
BATCH = {"model": linear(5), "x": X, "y": Y, "eps": 0.5}
IMAGES = [  # what is no batch for an attack, message
    ({"x": 255 * X}, "not in [0, 1]"), ({"x": X - 0.5}, "not in [0, 1]"), ({"x": X * math.nan}, "not in [0"),
    ({"x": X[0], "y": Y[:1]}, "(N, C, H, W)"), ({"y": Y[:3]}, "a label for"), ({"y": Y.float()}, "int64"),
    ({"norm": "l1"}, "'l1'"), ({"eps": -0.1}, "eps = -0.1"), ({"eps": math.inf}, "eps = inf"),
    ({"norm": "linf", "eps": 8}, "linf takes 0 to 1"), ({"eps": 128}, "l2 takes 0 to 8, since pixels"),
    *(({"y": torch.tensor([0, 0, 0, label])}, "on 5 classes: give 0 to") for label in (-100, -1, 5)),
    ({"model": lambda x: x.flatten(1)}, "model is a function: give a torch.nn.Module"),
    ({"model": linear(5).half()}, "model does not take torch.float32 images (1, 8, 8) on cpu ("),
    ({"model": linear(5).double()}, "for autoattack make it float32: model.float()"),
    ({"model": linear(1)}, "a Tensor of shape (1, 1): it must be logits (N, C) of two classes or more"),
    ({"model": nn.Sequential(linear(1), nn.Flatten(0))}, "a Tensor of shape (1,): it must be logits (N, C)"),
    ({"model": nn.Sequential(nn.Flatten(), nn.LSTM(64, 5))}, "a tuple of shape (): it must be logits")]


@pytest.mark.parametrize("function,valid,invalid", [
    (attacks.fgsm_rs, BATCH, IMAGES), *((attack, {**BATCH, "step_size": 0.1}, [
        *IMAGES, ({"x": (255 * X).byte()}, "floats"), ({"x": X.numpy()}, "images"), ({"eps": "0.5"}, "eps"),
        ({"start": X[:2]}, "start is"), ({"steps": -1}, "0 or more"), ({"steps": 2.5}, "0 or more"),
        ({"step_size": -0.1}, "0 or more"), ({"step_size": math.nan}, "0 or more")])
        for attack in (attacks.pgd, attacks.pgd_authors)),
    (attacks.autoattack, BATCH, [*IMAGES, ({"attacks": []}, "valid are"), ({"attacks": ["pgd"]}, "valid")]),
    (attacks.usable_attacks, {"attacks": ["apgd-t"]}, [({"n_classes": 2}, "are apgd-ce fab-t square")]),
    (attacks.project, {"delta": X, "eps": 0.5}, [({"norm": "l1"}, "'l1': l2 or linf")]),
    (attacks.random_start, {"x": X, "eps": 0.5}, [({"norm": "l1"}, "'l1': l2 or linf")]),
    (subset.choose_A, {"split": "esat", "y": Y, "classes": ["a"], "amount": 2, "scores": torch.rand(4)}, [
        ({"split": "ESAT"}, "valid are"), ({"order": "hard"}, "valid are"), ({"amount": None}, "None of 4"),
        ({"amount": "2"}, "2 of 4"), ({"scores": None}, "one for"), ({"scores": torch.rand(5)}, "one for"),
        ({"scores": X[0, 0, 0, :4] / 0}, "one for each"), ({"scores": Y.double() + 2}, "are all 2: they")]),
    (subset.weight_A, {"weight": "X", "n": 3}, [({"n_A": 5}, "5 of 3"), ({"n_A": 1}, "'X': vanilla, bala")]),
    (subset.check_scores, {"n": 4}, [({"scores": torch.zeros(0)}, "0 finite numbers")]),
    (train.sat_loss, {"logits": torch.rand(4, 3), "y": Y}, [({"w": torch.ones(4, 1)}, "they must agree")])])
def test_functions_refuse_what_they_would_misread(function, valid, invalid, monkeypatch):
    monkeypatch.setattr(attacks, "attack_batch", AUTOATTACK)
    for change, message in invalid:
        with pytest.raises(ValueError) as e:
            function(**{**valid, **change})
        assert message in str(e.value)


def test_an_attack_of_ones_own_is_one_more_line_of_the_table(monkeypatch):
    def brighter(model, x, y, *, eps):
        batches.append(len(x))
        return (x + eps / 8).clamp(0, 1)
    batches, words = [], [*ONE_EPOCH, "--split", "full", "--attack", "brighter"]
    monkeypatch.setitem(attacks.ATTACKS, "brighter", attacks.Attack(brighter, gradient_steps=3))
    sat.main(words)
    assert batches == [32, 32, 32]
    assert runs.load(R / "result.json")["cost"]["forward_equivalents"] == 3 * 96 + 2 * 96 * 3
    with pytest.raises(UserError, match="--attack brighter takes no start: it goes without --random-start"):
        sat.main([*words, "--random-start", "--force"])


def test_a_tilde_is_the_home_folder_in_a_config_too(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    Path("c.yaml").write_text("data-dir: ~/d\nrandom-start: false\n")
    args = sat.command_line(["--config", "c.yaml", "--results=~/r", "--scores=~/s.pt"])
    assert [args.data_dir, args.results, args.scores] == [Path("/home/me", p) for p in ("d", "r", "s.pt")]
    assert not args.random_start


def test_a_percent_sign_in_a_config_is_no_format_of_the_help(capsys):
    Path("c.yaml").write_text("data-dir: /disk/50%d/x\n")
    with pytest.raises(SystemExit):
        sat.command_line(["--config", "c.yaml", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: /disk/50%d/x)" in text
    assert "random subsets (default: 0)" in text, "a default of 0 is one"


def test_each_checkpoint_has_an_evaluation_of_its_own():
    sat.main(ONE_EPOCH)
    ckpt = runs.load(R / "last.pt")
    ckpt["model"]["head.bias"][3] = 100.0  # it says 3 of every image
    torch.save(ckpt, R / "last.pt")
    results = [evaluate.main([str(R / name), "--eval-n", "6"]) for name in ("best.pt", "last.pt")]
    assert [result["checkpoint"] for result in results] == ["best.pt", "last.pt"]
    assert len(list(R.glob("eval-*.json"))) == 2


@pytest.mark.parametrize("context,message", [
    (torch.no_grad, "no gradients here: train outside of"), (torch.inference_mode, "no gradients here: tr"),
    (contextlib.nullcontext, "makes torch.float64 on cpu here; valid: float32"),
    (functools.partial(torch.device, "meta"), "makes torch.float32 on meta here; valid")])
def test_settings_of_torch_under_which_nothing_can_be_trained(context, message, request):
    if "float64" in message:  # as in a notebook
        request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
        torch.set_default_dtype(torch.float64)
    with context(), pytest.raises(UserError, match=message):
        sat.main(ONE_EPOCH)


def test_attacks_need_gradients():
    with torch.no_grad():
        assert attacks.pgd(**BATCH, step_size=0.1).ne(X).any()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"use torch\.no_grad"):
        attacks.pgd(**BATCH, step_size=0.1)
