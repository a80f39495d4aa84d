"""What a command means: a run is what its flags say, a file is what its flag says, a mistake is one line."""
import errno
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import attacks
import common
import config
import evaluate
import rank
import report
import runs
import sat
import subset
import train
import transfer
from common import HERE, UserError
from conftest import CSAT, ONE, ONE_EPOCH, RANK, RANKING_1, SAT, R
from data import Examples, load_dataset
from paper import experiments

BY_RANKING = [*SAT, *ONE, "--frac", "0.3"]


def trained(monkeypatch):
    """A list that receives the model of each call of train() from now on."""
    models, real = [], train.train
    for module in (sat, rank):
        monkeypatch.setattr(module, "train", lambda model, *a: models.append(model) or real(model, *a))
    return models


def test_a_ranking_is_that_of_the_run_s_own_training(monkeypatch):
    """Another number of epochs makes another ranking, in another folder; another seed makes none."""
    names = []
    for more in ([], ["--epochs", "2"], ["--seed", "3"], ["--arch", "preactresnet18"]):
        args = rank.ranking_args(sat.command_line([*SAT, *more]))
        names.append(rank.ranking_folder(args).name)
    name = "rank-preactresnet8-batch-size=32-epochs={}-lr-decays=1-seed0"
    assert names == [name.format(3), name.format(2), name.format(3), name.format(3).replace("8", "18", 1)]
    assert rank.ranking_folder(rank.ranking_args(sat.command_line([]))).name == "rank-preactresnet8-seed0"


def test_run_all_and_rank_py_name_a_ranking_alike():
    path = HERE / "configs/cifar10-cpu.yaml"
    for words, values in (([], {}), (["--epochs", "2", "--lr", "0.2"], {"epochs": 2, "lr": 0.2})):
        args = config.parse("rank.py", "", ["--config", str(path), *words])
        assert experiments.ranking_name(path, values) == rank.ranking_folder(args).name


def test_a_ranking_of_another_config_with_the_same_name_is_left_alone():
    args = config.parse("rank.py", "", RANK)
    folder = rank.ranking_folder(args)
    for name, content in (("args.json", {**runs.identity(args), "epochs": 9}),
                          ("rank.json", {"args": {**runs.identity(args), "epochs": 9}})):
        folder.mkdir(parents=True)
        runs.write_json(folder / name, content)
        assert rank.ranking_folder(args).name.startswith("rank-preactresnet8-")
        assert rank.ranking_folder(args) != folder
        shutil.rmtree(folder)


def test_a_run_whose_ranking_was_made_again_is_made_again(monkeypatch, capsys):
    first = sat.main(BY_RANKING)
    sat.main(BY_RANKING)
    assert "is finished" in capsys.readouterr().out
    path, = Path("results/few").glob("rank-*/scores.pt")
    content = runs.load(path)
    content["entropy"] = content["entropy"].flip(0)
    runs.save(path, content)
    table = runs.load(path.with_name("rank.json"))
    table["scores"]["entropy"] = subset.tensor_hash(content["entropy"])
    runs.write_json(path.with_name("rank.json"), table)
    report.main([])
    tables = Path("results/tables.md").read_text()
    assert "Caution: the ranking of 1 of these runs is no longer there" in tables
    capsys.readouterr()
    second = sat.main(BY_RANKING)
    out = capsys.readouterr().out
    assert "was made again since" in out
    assert "epoch 1:" in out
    assert second["ranking"]["scores"] != first["ranking"]["scores"]
    assert second["weights"] != first["weights"]


def test_another_evaluation_of_a_finished_run_trains_nothing(monkeypatch, capsys):
    first = sat.main(BY_RANKING)
    models = trained(monkeypatch)
    next(Path("results/few").glob("esat*/last.pt")).unlink()  # it takes best.pt
    other = [*BY_RANKING, "--eval-n", "6"]
    result = sat.main(other)
    assert models == []
    assert result["accuracy"]["all"]["clean"]["n"] == 6
    assert result["weights"] == first["weights"]
    path, = Path("results/few").glob("esat*/eval-*.json")
    assert {**first, **runs.load(path)} == result
    out = capsys.readouterr().out
    assert re.findall(r"AutoAttack: (.*) done, .* robust; .* left", out)[-2:] == [
        "5 of 6 examples", "6 of 6 examples"]
    assert sat.main(other)["accuracy"] == result["accuracy"]
    assert f"{path} is there already" in capsys.readouterr().out
    assert sat.main(BY_RANKING)["accuracy"] == first["accuracy"], "the run keeps its own result"


def test_two_runs_that_want_one_ranking_wait_for_each_other(monkeypatch):
    def lock(file, options=0):
        if options:
            raise BlockingIOError
    args = rank.ranking_args(sat.command_line(ONE_EPOCH))
    monkeypatch.setattr(runs, "lock_exclusively", lock)
    with runs.making(rank.ranking_folder(args), args, "rank.json") as is_finished:
        assert not is_finished


@pytest.mark.parametrize("typed", [set(), {"force"}])
def test_an_outdated_run_is_repeated_once_by_two_commands(typed, monkeypatch):
    """The second has waited for the first. A --force that was typed counts."""
    def lock(file, options=0):
        if options:
            runs.write_json(folder / "result.json", {"args": runs.identity(args)})
            raise BlockingIOError
    args = sat.command_line(ONE_EPOCH)
    args.force, args.typed, folder = True, typed, R
    folder.mkdir(parents=True)
    monkeypatch.setattr(runs, "lock_exclusively", lock)
    with runs.making(folder, args) as is_finished:
        assert is_finished is (typed == set())


def test_a_metric_that_a_stopped_ranking_lacks_is_refused_before_the_ranking(monkeypatch):
    args = sat.command_line([*SAT, "--metric", "svar"])
    folder = rank.ranking_folder(rank.ranking_args(args))
    folder.mkdir(parents=True)
    runs.write_json(folder / "args.json", {**runs.identity(rank.ranking_args(args)), "metrics": ["entropy"]})
    models = trained(monkeypatch)
    with pytest.raises(UserError, match="begun with --metrics entropy, without svar"):
        sat.main([*SAT, "--metric", "svar"])
    assert models == []


def test_main_returns_the_result_and_load_model_a_network_in_eval_mode(monkeypatch):
    def attack_batch(*a, **k):
        logging.getLogger("auto-attack").warning("zero gradient on 3 of 5 points")
        return real(*a, **k)
    real = attacks.attack_batch
    monkeypatch.setattr(attacks, "attack_batch", attack_batch)
    result = sat.main(ONE_EPOCH)
    assert result == runs.load(R / "result.json")
    assert result["versions"].keys() >= {"python", "numpy", "cuda", "torch", "torchvision", "pyautoattack"}
    assert result["warnings"] == ["zero gradient on 3 of 5 points"]
    model, _ = evaluate.load_model(str(R / "best.pt"))
    assert not any(module.training for module in model.modules())


ORDER = np.array([2, 3, 0, 1])  # hardest first


@pytest.mark.parametrize("flag,content,A", [
    ("scores", ORDER.astype(float), [0, 1]), ("scores", ORDER, [0, 1]), ("scores", ORDER + 1, [0, 1]),
    ("scores", torch.tensor([0.1, 0.4, 0.3, 0.2]), [1, 2]), ("ranking", ORDER, [2, 3]),
    ("ranking", torch.from_numpy(ORDER), [2, 3]), ("subset", np.array([True, False, False, True]), [0, 3]),
    ("subset", torch.tensor([3, 1]), [1, 3]), ("subset", np.array([0, 1]), [0, 1])])
def test_files_of_ones_own(flag, content, A):
    """Scores are never an order: higher = harder. Of four examples, A has two."""
    torch.save(content, "file.pt")
    args = sat.command_line([f"--{flag}", "file.pt", *([] if flag == "subset" else ["--size", "2"])])
    from_file = sat.read_file_of_A(args)
    chosen = subset.choose_A("esat", torch.zeros(4, dtype=torch.int64), ["a"], amount=args.size,
                             subset=from_file.get("subset"), scores=from_file.get("scores"))
    assert chosen.nonzero()[:, 0].tolist() == A


def test_scores_pt_of_rank_py_with_a_metric(monkeypatch):
    sat.main(CSAT)
    path, = Path("results/few").glob("rank-*/scores.pt")
    ranking = runs.load(path)
    argv = [*SAT, *ONE, "--scores", str(path), "--metric", "svar", "--size", "40", "--run", "r"]
    assert sat.main(argv)["ranking"]["metric"] == "svar"
    models = trained(monkeypatch)
    sat.main(argv)
    assert models == [], "its scores are the file's, whatever rank.json says"
    ranking["fingerprint"]["images"] = "others"
    torch.save(ranking, "other.pt")
    with pytest.raises(UserError, match="other.pt belongs to other data"):
        sat.main([*SAT, "--scores", "other.pt"])


@pytest.mark.parametrize("flag,content,message", [
    ("ranking", ORDER + 1, "its numbers are not 0 to N - 1, each once; valid: the N indices from 0"),
    ("ranking", ORDER.astype(float), r"it holds float64 \(4,\); valid: the N indices"),
    ("ranking", np.array([0, 0, 1, 2]), "its numbers are not 0 to N - 1, each once"),
    ("ranking", {"fingerprint": 1, "svar": torch.rand(4)}, "it holds scores: give it with --scores; valid"),
    ("scores", np.array([True, False]), "it holds bool .*; valid: N numbers"),
    ("scores", {"fingerprint": 1, "svar": 2}, "it has no entropy scores: give another --metric; valid: "),
    ("subset", np.array([0.0, 1.0]), "it holds float64 .*; valid: a bool mask"),
    ("subset", np.array([0, 0, 1]), "3 numbers of int64; valid: a bool mask"),
    ("subset", np.array([96]), "valid: one or more of 0 to 95"),
    ("subset", np.array([-1, 4]), "valid: one or more of 0 to 95"),
    ("subset", np.array([True] * 95), "a mask of 95 values: give one for each of 96"),
    ("subset", np.array([False] * 96), "a mask without any example")])
def test_files_of_ones_own_that_are_refused(flag, content, message):
    torch.save(content, "file.pt")
    with pytest.raises(UserError, match=message):
        sat.main([*SAT, *ONE, f"--{flag}", "file.pt"])


@pytest.mark.parametrize("flag,one,same,other,more", [
    ("subset", torch.arange(96) < 3, torch.tensor([2, 0, 1]), torch.arange(96) < 4, []),
    ("ranking", torch.arange(96), np.arange(96), torch.arange(96).flip(0), ["--size", "4"])])
def test_a_run_is_named_by_what_a_file_of_ones_own_holds(flag, one, same, other, more):
    names, words = [], [*SAT, *ONE, f"--{flag}", "file.pt", *more]
    for content in (one, same, other):
        torch.save(content, "file.pt")
        args = sat.command_line(words)
        sat.read_file_of_A(args)
        names.append(sat.run_folder(args)[0].name)
    assert names[0] == names[1]
    assert names[0] != names[2]
    assert sat.main(words)["A"] == 4


@pytest.mark.parametrize("words,note", [
    ("--step-size 0.05 --eps 0.5", "7 steps of 0.05 cannot reach --eps 0.5"),
    ("--attack pgd-authors --steps 5", "4 steps of 0.1 cannot reach --eps 0.5"),
    ("--norm linf --eps 8/255 --step-size 0.1", "each --step-size 0.1 crosses the whole ball"),
    ("--epochs 15", "the learning rate does not fall within 15 epochs (--lr-decays 15 25)")])
def test_flags_that_are_hardly_meant_are_named(words, note, capsys):
    sat.command_line(words.split())
    assert note in capsys.readouterr().out
    sat.command_line(["--step-size", "0.1", "--epochs", "16"])
    assert capsys.readouterr().out == ""


def test_fractions_underscores_and_nearest_names():
    args = sat.command_line("--eps 8/255 --norm linf --step_size 2/255 --lr_decays 3 4".split())
    assert (args.eps, args.step_size, args.lr_decays) == (8 / 255, 2 / 255, [3, 4])
    Path("c.yaml").write_text("dataset: digits\nlr_decays: [1]\neps: 1/2\n")
    args = sat.command_line(["--config", "c.yaml"])
    assert (args.lr_decays, args.eps) == ([1], 0.5)
    for words, message in (("--eps 1/0", "'1/0' is not"), ("--epochs 1/2", "'1/2' is not"),
                           ("--weight 5", "a number is given as --weight-factor"),
                           ("--config digit.yml", "there are configs/cifar10-cpu.yaml"),
                           (f"--config {HERE}/configs/transfer/svhn.yaml", "svhn.yaml is a config of tr")):
        with pytest.raises(UserError) as e:
            sat.command_line(words.split())
        assert message in str(e.value)
    Path("c.yaml").write_text("weightdecay: 1\n")
    with pytest.raises(UserError, match="'weightdecay'; did you mean weight-decay"):
        sat.command_line(["--config", "c.yaml"])
    with pytest.raises(UserError, match="no target data set: give --dataset, or --config with one of co"):
        transfer.main(["best.pt"])


def test_a_ranking_that_orders_nothing_is_not_kept(monkeypatch):
    monkeypatch.setattr(rank, "score", lambda *a: {"entropy": torch.zeros(96), "svar": torch.zeros(96)})
    with pytest.raises(UserError, match="all examples have the same score.*training diverged.*lower --lr"):
        rank.main([*RANK, "--metrics", "entropy", "svar"])
    assert not list(Path("results").rglob("scores.pt"))


@pytest.mark.parametrize("variables,message", [
    ("RANK=1", "has RANK=1, no LOCAL_RANK, .* not what torchrun sets: start with torchrun, or unset RANK"),
    ("RANK=0 WORLD_SIZE=2", "has RANK=0, no LOCAL_RANK, WORLD_SIZE=2, no MASTER_ADDR, no MASTER_PORT"),
    ("RANK=0 LOCAL_RANK=x WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "LOCAL_RANK=x"),
    ("RANK=x LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "RANK=x"),
    ("RANK=2 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "RANK=2"),
    ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "RANK=1"),  # all would take the first GPU
    ("RANK=1 LOCAL_RANK=1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", ""), ("RANK=0 WORLD_SIZE=1", ""),
    ("MASTER_ADDR=a", ""), ("", "")])
def test_variables_of_torchrun_that_were_left_behind(variables, message, monkeypatch):
    environment = dict(word.split("=") for word in variables.split())
    monkeypatch.setattr(os, "environ", environment.copy())
    if message:
        with pytest.raises(UserError, match=message):
            common.check_environment()
        assert os.environ == {}
    else:
        common.check_environment()
        assert os.environ == environment


def test_head_ends_quietly():
    command = f"PYTHON={sys.executable} {HERE}/run_all.sh --dry-run all | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[1] == "141"


def test_a_file_system_without_locks(monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("fcntl.flock", flock)
    assert sat.main(ONE_EPOCH)["A"] == 0
    assert "few-r cannot be locked (No locks available): do not start" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("environment,closed,printed", [
    ({}, "2>&-", "caf\u00e9 \u9ce5 3\n".encode()), ({}, ">&-", b""),
    ({"PYTHONIOENCODING": "latin-1"}, "", b"caf\xe9 \\u9ce5 3\n")])
def test_closed_streams_and_terminals_of_another_encoding(environment, closed, printed):
    code = ("import common; common.script(lambda: common.say('caf\\u00e9 \\u9ce5 '"
            "+ str(len(list(common.progress(range(3)))))))")
    done = subprocess.run(["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, code], capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(HERE), "PYTHONUTF8": "1", **environment})
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


@pytest.mark.parametrize("main,argv", [(sat.main, ONE_EPOCH), (rank.main, [*RANK, *ONE])])
def test_a_finished_run_of_data_that_have_changed_is_not_printed(main, argv):
    main(argv)
    main(argv)
    parts = runs.load("data/few.pt")
    parts["train"]["y"] = parts["train"]["y"].flip(0)
    torch.save(parts, "data/few.pt")
    with pytest.raises(UserError, match="belongs to other data .labels: .*--force"):
        main(argv)
    Path("data/few.pt").unlink()
    main(argv)


def test_a_finished_run_is_not_printed_for_the_data_of_another_folder(monkeypatch):
    monkeypatch.setattr("data.TABLE_1", {"few": (10, 96, 40)})
    sat.main(ONE_EPOCH)
    parts = runs.load("data/few.pt")
    Path("other").mkdir()
    torch.save({**parts, "test": {**parts["test"], "x": 255 - parts["test"]["x"]}}, "other/few.pt")
    sat.main(ONE_EPOCH)
    with pytest.raises(UserError, match="belongs to other data .images: "):
        sat.main([*ONE_EPOCH, "--data-dir", "other"])


def test_a_published_run_is_found_by_its_own_flags_alone():
    """It has no args.json."""
    first = sat.main(ONE_EPOCH)
    (R / "args.json").unlink()
    assert sat.main(ONE_EPOCH) == first
    with pytest.raises(UserError, match="r was made with other flags .split: 'none' there, 'full' now"):
        sat.main([*ONE_EPOCH, "--split", "full"])


def test_a_ranking_begun_with_other_metrics_is_finished_with_them():
    args = rank.ranking_args(sat.command_line(BY_RANKING))
    args.metrics = ["svar", "entropy"]
    with runs.making(RANKING_1, args, "rank.json"):
        pass  # stopped in its first epoch
    sat.main(BY_RANKING)
    assert runs.load(RANKING_1 / "rank.json")["args"]["metrics"] == ["svar", "entropy"]
    rank.main([*RANK, *ONE])  # finished
    (RANKING_1 / "scores.pt").unlink()
    with pytest.raises(UserError, match="a rank.json, but no scores.pt: make it again with rank.py --force"):
        sat.main([*BY_RANKING, "--seed", "1"])
    rank.main([*RANK, *ONE, "--force"])
    assert runs.load(RANKING_1 / "rank.json")["args"]["metrics"] is None


def test_vog_of_streamed_images_is_refused_before_a_ranking_is_made(monkeypatch):
    monkeypatch.setattr(Examples, "streamed", True)
    args = sat.command_line([*BY_RANKING, "--metric", "vog"])
    with pytest.raises(UserError, match="vog takes 8 bytes a pixel, too much for few"):
        rank.scores_for(args, load_dataset("few", "data"), torch.device("cpu"))
    assert not RANKING_1.parent.exists()


def test_a_flag_without_effect_is_named_once(capsys):
    sat.command_line("--split full --order random --metric svar --weight balanced --weight-factor 2".split())
    notes = capsys.readouterr().out.splitlines()
    assert notes == [f"note: --{name} has no effect with --split full"
                     for name in ("order", "metric", "weight", "weight-factor")]


def test_an_evaluation_in_tf32_is_not_repeated_without_a_gpu(capsys):
    argv = [*ONE_EPOCH, "--eval-precision", "tf32"]
    sat.main(argv)
    result = runs.load(R / "result.json")
    runs.write_json(R / "result.json", {**result, "settings": {**result["settings"], "precision": "tf32"}})
    sat.main(argv)
    assert "r is finished" in capsys.readouterr().out
    assert not list(R.glob("eval-*"))


def test_a_full_or_read_only_disk_is_one_line(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match="cannot write x.json: Read-only file system"):
        runs.write_json("x.json", {})


def test_the_table_of_a_ranking_is_in_the_order_of_its_first_column(capsys):
    rank.main([*RANK, *ONE, "--metrics", "svar", "entropy"])
    scores = [row["entropy"] for row in runs.load(RANKING_1 / "rank.json")["classes_hardest_first"]]
    assert scores == sorted(scores, reverse=True)


def test_a_run_that_is_stopped_in_a_notebook_is_unlocked(monkeypatch):
    def stop(*args):
        locked.append(subprocess.run(lock).returncode)
        raise KeyboardInterrupt
    lock, locked = ["flock", "--nonblock", "results/.locks/few-r", "true"], []
    monkeypatch.setattr(sat, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        sat.main(ONE_EPOCH)
    assert locked == [1]
    assert subprocess.run(lock).returncode == 0


def test_the_order_of_decays_does_not_rename_a_run():
    """run_all.py and configs name runs by what is given."""
    args = sat.command_line(["--lr-decays", "25", "15"])
    assert args.lr_decays == [25, 15]
