"""What comes in: data sets in their publishers' formats, configs,
and inputs that must be refused in one line."""
import fcntl
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
import common
import data as data_
import evaluate
import flags
import picture
import rank
import report
import results
import sat
import datasets
import subset
import transfer
import runs
from common import UserError
from conftest import HERE, QUICK, script, write_images, write_jpeg


def test_digits():
    data = data_.load_dataset("digits", "nowhere")
    assert (data.train.x.shape == (1297, 1, 8, 8) and data.test.x.shape == (500, 1, 8, 8)
            and data.train.x.max() == 255)
    assert torch.bincount(data.train.y).tolist() == [128, 131, 128, 132, 130, 131, 130, 129, 128, 130]
    low, high = data_.load_dataset("digits0-4", "nowhere"), data_.load_dataset("digits5-9", "nowhere")
    assert (len(low.train) + len(high.train) == 1297 and high.classes == ["5", "6", "7", "8", "9"]
            and high.train.y.unique().tolist() == [0, 1, 2, 3, 4])
    assert low.fingerprint() != high.fingerprint() == data_.load_dataset("digits5-9", "nowhere").fingerprint()
    x = data.train.pixels(torch.arange(1297), "cpu")
    mean, std = data.mean_std()
    assert (mean == pytest.approx([x.mean().item()], abs=1e-5)
            and std == pytest.approx([x.std().item()], abs=1e-4))


def test_selection_and_final_parts():
    for n in (500, 10000, 1020, 15):
        select, final = data_.selection_and_final(n)
        assert len(select) == round(0.1 * n) and sorted([*select.tolist(), *final.tolist()]) == list(range(n))
        torch.manual_seed(n)  # the global generator plays no part
        assert torch.equal(select, data_.selection_and_final(n)[0])


def test_augmentation_against_torchvision():
    from torchvision.transforms import functional as T
    g = torch.Generator().manual_seed(1)
    x = torch.rand(40, 3, 32, 32, generator=g)
    params = data_.draw_augmentation(40, x.shape, "full", False, g)
    assert (params["crop"].min() == 0 and params["crop"].max() == 8
            and 0.75 <= params["factor"].min() < params["factor"].max() <= 1.25)
    assert (params["flip"].any() and not params["flip"].all()
            and 0 < params["angle"].abs().max() <= math.radians(2))
    assert (len(params["angle"].unique()) == 40
            and len({tuple(o) for o in params["order"].tolist()}) == 6), "each example its own"
    mine = data_.augment(x, params)
    for i in range(40):
        row, column = params["crop"][i].tolist()
        one = T.pad(x[i], 4)[:, row:row + 32, column:column + 32]
        one = T.hflip(one) if params["flip"][i] else one
        for op in params["order"][i].tolist():
            adjust = (T.adjust_brightness, T.adjust_contrast, T.adjust_saturation)[op]
            one = adjust(one, params["factor"][i, op].item())
        one = T.rotate(one, math.degrees(params["angle"][i].item()))
        differ = ((mine[i] - one).abs() > 1e-3).float().mean()
        assert differ < 0.01, "torchvision may round a pixel's origin the other way"
    assert torch.equal(data_.augment(x, {"crop": torch.full((40, 2), 4)}), x), "a crop from the middle"


def test_batches_are_slices_of_one_global_batch(monkeypatch):
    data = data_.load_dataset("digits", "data")
    everything = list(data_.training_batches(data.train, 64, 0, 3, "crop", "cpu"))
    assert (len(everything) == 1297 // 64
            and len(set(torch.cat([i for _, _, i in everything]).tolist())) == 64 * 20)
    again, other = (list(data_.training_batches(data.train, 64, 0, e, "crop", "cpu")) for e in (3, 4))
    assert torch.equal(everything[5][0], again[5][0]) and not torch.equal(everything[5][2], other[5][2])
    for r in range(3):
        monkeypatch.setenv("RANK", str(r)), monkeypatch.setenv("WORLD_SIZE", "3")
        for k, mine in enumerate(data_.training_batches(data.train, 64, 0, 3, "crop", "cpu")):
            assert all(torch.equal(a, b.tensor_split(3)[r]) for a, b in zip(mine, everything[k]))


def test_image_folder_and_tensor_file_agree(tmp_path):
    from PIL import Image
    write_images(tmp_path / "mine")
    folder = data_.load_dataset("mine", tmp_path)
    assert ((tmp_path / "mine.pt").exists() and folder.classes == ["cat", "dog"]
            and folder.train.y.tolist() == [0] * 6 + [1] * 6)
    pixel = np.asarray(Image.open(tmp_path / "mine" / "train" / "dog" / "2.png"))
    assert np.array_equal(folder.train.x[8].permute(1, 2, 0).numpy(), pixel)
    packed = data_.load_dataset("mine", tmp_path)
    assert torch.equal(packed.test.x, folder.test.x) and packed.fingerprint() == folder.fingerprint()


def test_the_fingerprint_sees_every_image(tmp_path):
    data, other = data_.load_dataset("digits", "data"), data_.load_dataset("digits", "data")
    other.test.x = other.test.x.clone()
    other.test.x[499, 0, 7, 7] += 1
    with pytest.raises(UserError, match="scores.pt belongs to other data .images: "):
        data_.check_fingerprint(other, data.fingerprint(), "scores.pt")
    streamed = lambda name: data_.Split(data_.Files([Path("a", name)]), torch.zeros(1))
    one, same, two = (data_.DataSet("f", *[streamed(name)] * 2, []).images for name in "11\udcff")
    assert one == same != two


def test_cifar_in_its_publishers_format(tmp_path, monkeypatch):
    from torchvision.datasets import cifar
    monkeypatch.setattr(cifar, "check_integrity", lambda *a: True)  # the sums of the real files
    rng, blocks = np.random.default_rng(0), {}
    for folder, files, key in (
            ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], "labels"),
            ("cifar-100-python", ["train", "test"], "fine_labels")):
        (tmp_path / folder).mkdir()
        for name in files:
            block = {"data": rng.integers(0, 255, (4, 3072), dtype=np.uint8), key: [0, 1, 2, 3]}
            blocks[name] = block["data"]
            (tmp_path / folder / name).write_bytes(pickle.dumps(block))
        meta = {"label_names" if key == "labels" else "fine_label_names":
                [str(c) for c in range(10 if key == "labels" else 100)]}
        (tmp_path / folder / ("batches.meta" if key == "labels" else "meta")).write_bytes(pickle.dumps(meta))
    ten, hundred = data_.load_dataset("cifar10", tmp_path), data_.load_dataset("cifar100", tmp_path)
    assert (len(ten.train), len(ten.test), len(hundred.train)) == (20, 4, 4) and len(ten.classes) == 10
    assert np.array_equal(ten.train.x[5].numpy(), blocks["data_batch_2"][1].reshape(3, 32, 32))
    assert (np.array_equal(hundred.test.x[3].numpy(), blocks["test"][3].reshape(3, 32, 32))
            and hundred.test.y[3] == 3)


@pytest.fixture
def table_1(monkeypatch):
    """Lets a test have data sets of its own sizes without the check of the number of classes."""
    return lambda name, n_classes: monkeypatch.setitem(datasets.TABLE_1, name, (n_classes, 1, 1))


def test_svhn_in_its_publishers_format(tmp_path, monkeypatch, capsys):
    from scipy.io import savemat
    from torchvision.datasets import svhn
    monkeypatch.setattr(svhn, "check_integrity", lambda *a: True)  # the sums of the real files
    rng = np.random.default_rng(0)
    x = {s: rng.integers(0, 255, (32, 32, 3, n), dtype=np.uint8) for s, n in (("train", 12), ("test", 5))}
    for s in x:
        savemat(tmp_path / f"{s}_32x32.mat",
                {"X": x[s], "y": np.arange(1, x[s].shape[3] + 1, dtype=np.uint8)[:, None] % 10 + 1})
    data = data_.load_dataset("svhn", tmp_path)
    assert (data.classes == list("0123456789")
            and np.array_equal(data.train.x[7].permute(1, 2, 0).numpy(), x["train"][..., 7]))
    assert data.train.y.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3], \
        "the publisher's label 10 is digit 0"
    assert "12 / 5 images, the paper's (Table 1) 73,257 / 26,032" in capsys.readouterr().out
    (tmp_path / "svhn.pt").unlink()
    savemat(tmp_path / "train_32x32.mat", {"X": x["train"][:16], "y": np.ones((12, 1))})
    with pytest.raises(UserError, match="train_32x32.mat is not SVHN's cropped digits"):
        data_.load_dataset("svhn", tmp_path)


def test_flowers102_in_its_publishers_format(tmp_path, monkeypatch, capsys):
    from scipy.io import savemat
    from torchvision.datasets import flowers102
    monkeypatch.setattr(flowers102, "check_integrity", lambda *a: True)
    folder = tmp_path / "flowers-102"
    for i in range(1, 8):
        write_jpeg(folder / "jpg" / f"image_{i:05d}.jpg", (10 * i, 0, 0))
    savemat(folder / "imagelabels.mat", {"labels": np.array([[5, 102, 1, 7, 7, 2, 3]])})
    savemat(folder / "setid.mat", {"trnid": np.array([[2, 4, 6]]), "valid": np.array([[1, 7]]),
                                   "tstid": np.array([[3, 5]])})
    data = data_.load_dataset("flowers102", tmp_path)
    assert (data.train.y.tolist() == [101, 6, 1] and data.test.y.tolist() == [4, 2]
            and len(data.classes) == 102)
    assert (data.train.streamed
            and abs(data.train.pixels(torch.tensor([1]), "cpu")[0, 0].mean() - 40 / 255) < 0.02), "image 4"
    assert "1,020 / 1,020" in capsys.readouterr().out


def test_caltech256_in_its_publishers_format(tmp_path, table_1):
    table_1("caltech256", 3)
    for c, name in enumerate(("001.ak47", "002.american-flag", "257.clutter")):
        for i in range(1, 6):
            write_jpeg(tmp_path / "caltech256" / "256_ObjectCategories" / name / f"{c + 1:03d}_{i:04d}.jpg",
                       mode="L" if i == 2 else "RGB")
    (tmp_path / "caltech256" / "256_ObjectCategories" / "001.ak47" / "RENAME2").write_text(
        "a stray file of the real archive")
    data = data_.load_dataset("caltech256", tmp_path)
    assert (data.classes == ["ak47", "american-flag", "clutter"]
            and (len(data.train), len(data.test)) == (12, 3))
    assert (not set(data.train.x.paths) & set(data.test.x.paths)
            and data.train.x.paths == data_.load_dataset("caltech256", tmp_path).train.x.paths)
    assert data.train.pixels(torch.arange(12), "cpu").shape == (12, 3, 224, 224), "grey images become RGB"


def test_caltech256_after_a_download_that_failed(tmp_path, monkeypatch):
    import urllib.request
    def refuse(*a, **k):
        raise OSError("no route to host")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    for _ in range(2):  # torchvision leaves an empty caltech256/ behind, which is no image folder
        with pytest.raises(UserError, match="no caltech256 under .* put caltech256/256_ObjectCategories/"):
            data_.load_dataset("caltech256", tmp_path)


def test_imagenet200_is_200_wnids_of_an_imagenet_tree(tmp_path):
    lines = (HERE / "configs" / "imagenet200_wnids.txt").read_text().splitlines()[1:]
    wnids = [line.split("\t")[0] for line in lines]
    assert len(wnids) == 200
    for wnid in [*wnids, "n99999999"]:
        for part in ("train", "val"):
            write_jpeg(tmp_path / "imagenet" / part / wnid / "a.JPEG")
    data = data_.load_dataset("imagenet200", tmp_path)
    assert len(data.train) == len(data.test) == 200 and data.train.streamed and len(set(data.classes)) == 200
    assert data.classes[0] == "stingray" and data.train.x.paths[0].parent.name == wnids[0]
    shutil.rmtree(tmp_path / "imagenet" / "val" / wnids[3])
    with pytest.raises(UserError, match=f"val lacks 1 class folders: {wnids[3]}"):
        data_.load_dataset("imagenet200", tmp_path)


def test_streamed_views(tmp_path):
    """Training crops are RandomResizedCrop's, drawn per example and epoch; test images are resized to
    256, cropped to 224."""
    from PIL import Image
    ramp = np.zeros((300, 400, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, 400)[None], np.linspace(0, 255, 300)[:, None]
    for i in range(8):
        path = tmp_path / "mine" / ("train" if i < 6 else "test") / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ramp).save(path)
    data = data_.load_dataset("mine", tmp_path)
    x = data.test.pixels(torch.arange(2), "cpu")
    # The shortest side 300 becomes 256, so 400 becomes 341; the centre 224 of each are left.
    assert x.shape == (2, 3, 224, 224)
    assert (x[0, 1, 0].mean().item() == pytest.approx(16 / 256, abs=0.01)
            and x[0, 0, :, 0].mean().item() == pytest.approx(58.5 / 341, abs=0.01))
    first, again, other = (next(data_.training_batches(data.train, 6, 0, e, "full", "cpu"))[0] for e in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == (6, 3, 224, 224)
    half = next(data_.training_batches(data.train, 3, 0, 0, "full", "cpu"))[0]
    width = [(c[0].amax() - c[0].amin()).item()
             for c in next(data_.training_batches(data.train, 6, 0, 2, "crop", "cpu"))[0]]
    assert len({round(w, 3) for w in width}) == 6 and min(width) > 0.1 and max(width) < 1.01, \
        "each example has a crop of its own"
    params = data_.draw_augmentation(1000, (3, 224, 224), "full", True, torch.Generator().manual_seed(0))
    assert (0.9 <= params["factor"].min() < 0.91 and 1.09 < params["factor"].max() <= 1.1
            and "crop" not in params)
    data.train.x.workers, data.train.x.loader = 2, None
    for _ in range(2):  # the same workers twice, the first time left before the epoch's end
        assert torch.equal(next(data_.training_batches(data.train, 3, 0, 0, "full", "cpu"))[0], half), \
            "workers change nothing"
    assert [len(x) for x, _, _ in data_.training_batches(data.train, 3, 0, 0, "full", "cpu")] == [3, 3]


def test_small_cifar_is_the_same_whatever_the_order_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "SMALLER", {"few": ("many", 3, 2)})
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 256, (60, 3, 8, 8), generator=g, dtype=torch.uint8), torch.arange(60) % 4
    for folder, order in ((tmp_path / "a", torch.arange(60)),
                          (tmp_path / "b", torch.randperm(60, generator=g))):
        folder.mkdir()
        torch.save({"train": {"x": x[order], "y": y[order]}, "test": {"x": x[order], "y": y[order]},
                    "classes": list("abcd")}, folder / "many.pt")
    a, b = (data_.load_dataset("few", tmp_path / f) for f in "ab")
    assert (torch.equal(a.train.x, b.train.x) and a.fingerprint() == b.fingerprint()
            and (tmp_path / "a" / "few.pt").exists())
    assert a.train.y.bincount().tolist() == [3] * 4 and a.test.y.bincount().tolist() == [2] * 4
    import hashlib
    digests = [hashlib.sha256(i.numpy().tobytes()).hexdigest() for i in x[y == 2]]
    assert ({hashlib.sha256(i.numpy().tobytes()).hexdigest() for i in a.train.x[a.train.y == 2]}
            == set(sorted(digests)[:3]))


def test_corrupt_and_doubled(tmp_path, capsys):
    for part, n in (("train", 3), ("test", 2)):
        for i in range(n):
            for c in ("cat", "dog"):
                write_jpeg(tmp_path / "mine" / part / c / f"{i}.jpg")
    (tmp_path / "mine" / "train" / "dog" / "1.jpg").write_bytes(b"\xff\xd8 no jpeg")
    data = data_.load_dataset("mine", tmp_path, workers=1)
    with pytest.raises(UserError, match="dog/1.jpg is not an image .* python data.py NAME") as e:
        list(data_.plain_batches(data.train, torch.arange(6), 2, "cpu"))
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="1 images of mine cannot be read"):
        data_.main(["mine", "--data-dir", str(tmp_path)])
    assert "dog/1.jpg" in capsys.readouterr().out
    (tmp_path / "mine" / "train" / "Cat").mkdir()
    with pytest.raises(UserError, match="holds the class folder 'Cat' twice, also as 'cat'"):
        data_.load_dataset("mine", tmp_path)
    with pytest.raises(UserError, match="has 2 classes, not 10"):
        (tmp_path / "mine" / "train" / "Cat").rmdir()
        (tmp_path / "mine").rename(tmp_path / "svhn")
        data_.load_dataset("svhn", tmp_path)


def test_resnet50_through_every_stage(tmp_path, monkeypatch, capsys):
    """A two-class tree of JPEGs through rank, sat, evaluate and transfer, one epoch each
    (images of 32, to be quick)."""
    from pyautoattack import AutoAttack
    rng = np.random.default_rng(0)
    for name in ("pets", "other"):
        for part, n in (("train", 4), ("val", 10)):
            for c, colour in (("cat", (220, 40, 40)), ("dog", (40, 40, 220))):
                for i in range(n):
                    write_jpeg(tmp_path / "data" / name / part / c / f"{i}.jpg",
                               tuple(int(v) for v in np.clip(rng.normal(colour, 20), 0, 255)))
    (tmp_path / "c.yaml").write_text(
        "arch: resnet50\naugment: full\neps: 3.0\nstep-size: 0.5\nsteps: 1\nepochs: 1\nbatch-size: 4\n"
        "lr: 0.01\nside: 32\nworkers: 0\neval-attacks: [apgd-ce]\nselect-attacks: [apgd-ce]\n"
        "eval-n: 2\nselect-n: 1\n")
    monkeypatch.chdir(tmp_path)
    real = AutoAttack._set_version

    def set_version(self, version):  # AutoAttack with fewer iterations, to be quick
        real(self, version)
        self.apgd.n_iter = 10
    monkeypatch.setattr(AutoAttack, "_set_version", set_version)
    rank.main(["--config", "c.yaml", "--dataset", "pets"])
    # By svar, because after two steps the entropies are all 0.
    sat.main(["--config", "c.yaml", "--dataset", "pets", "--split", "esat", "--metric", "svar", "--run", "a"])
    evaluate.main(["results/pets/a/best.pt"])
    transfer.main(["results/pets/a/best.pt", "--config", "c.yaml", "--dataset", "other"])
    own, again = (json.loads(p.read_text()) for p in [
        Path("results/pets/a/result.json"), *Path("results/pets/a").glob("eval-*.json")])
    assert own["accuracy"] == again["accuracy"] and own["A"] == 4 and own["cost"]["attacked"] == 4
    target, = Path("results/other").glob("*/result.json")
    assert json.loads(target.read_text())["source"]["run"] == "a"
    with pytest.raises(UserError, match="vog keeps two numbers a pixel"):
        rank.main(["--config", "c.yaml", "--dataset", "pets", "--metrics", "vog", "--results", "other"])
    report.main([])
    assert ((tmp_path / "results" / "figures" / "fig8.png").exists() is False
            and "No runs yet" in (tmp_path / "results" / "tables.md").read_text())


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
    "data is a path": (data_.main, ["../x"], "not a plain name"),
    "data unknown": (data_.main, ["mnist"], "no data set 'mnist'"),
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
                        ("data.py", "mnist"), ("bench.py", "--fractions", "2")):
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


def pack(root, name, *, x=None, x_test=None, y=None, classes=("a", "b")):
    """<root>/<name>.pt of eight 3x8x8 images, but for what is given."""
    plain = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)
    y = torch.arange(8) % 2 if y is None else y
    parts = {"train": {"x": plain if x is None else x, "y": y},
             "test": {"x": plain if x_test is None else x_test, "y": torch.arange(8) % 2}}
    torch.save({**parts, "classes": list(classes) if isinstance(classes, tuple) else classes},
               root / f"{name}.pt")


@pytest.mark.parametrize("how,message", [
    ({"x_test": torch.zeros(8, 1, 8, 8, dtype=torch.uint8)}, "train has images (3, 8, 8) and test (1, 8, 8)"),
    ({"x_test": torch.zeros(8, 3, 16, 16, dtype=torch.uint8)},
     "train has images (3, 8, 8) and test (3, 16, 16)"),
    ({"x": torch.zeros(8, 3, 0, 0, dtype=torch.uint8)},
     "0 x 0 pixels; valid: 1 to 4 channels, 5 x 5 pixels or more"),
    ({"classes": ("a", "a")}, "two or more different names"),
    ({"classes": "ab"}, "two or more different names"),
    ({"classes": 3}, "two or more different names"),
    ({"classes": ("a",), "y": torch.zeros(8, dtype=torch.int64)}, "two or more different names"),
    ({"y": torch.arange(8) % 3}, "labels outside 0..1"),
    ({"y": torch.arange(8) % 2 - 1}, "labels outside 0..1"),
])
def test_bad_packs(how, message, tmp_path):
    pack(tmp_path, "good"), pack(tmp_path, "bad", **how)
    assert len(datasets.find("good", tmp_path)[2]) == 2
    with pytest.raises(UserError, match=re.escape(message)):
        datasets.find("bad", tmp_path)


def test_a_folder_that_has_changed_is_read_again(tmp_path, capsys):
    write_images(tmp_path / "pets")
    assert datasets.find("pets", tmp_path)[2] == ["cat", "dog"] and (tmp_path / "pets.pt").exists()
    capsys.readouterr()
    datasets.find("pets", tmp_path)
    assert "reading it again" not in capsys.readouterr().out
    for part in ("train", "test"):
        shutil.copytree(tmp_path / "pets" / part / "dog", tmp_path / "pets" / part / "emu")
    assert (datasets.find("pets", tmp_path)[2] == ["cat", "dog", "emu"]
            and "has changed" in capsys.readouterr().out)


def test_small_images_of_unequal_sizes_are_streamed(tmp_path):
    write_images(tmp_path / "mixed", side=32)
    write_jpeg(tmp_path / "mixed" / "train" / "cat" / "large.jpg", size=(80, 60))
    (train, _), (test, _), _ = datasets.find("mixed", tmp_path)
    assert isinstance(train, list) and isinstance(test, list) and not (tmp_path / "mixed.pt").exists()


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
    pack(tmp_path, "two", x=torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8))
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


def test_no_network_and_no_data(tmp_path, monkeypatch):
    import urllib.request
    def refuse(*a, **k):
        raise OSError("no route to host")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(UserError, match="no cifar10 under .* put cifar-10-batches-py/ .* "
                                        "or image folders cifar10/train"):
        sat.main(["--dataset", "cifar10", "--data-dir", str(tmp_path / "d"),
                  "--results", str(tmp_path / "r"), "--split", "full"])
    assert not (tmp_path / "r").exists()


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


def test_unreadable_images_of_a_small_folder_are_all_named(tmp_path, capsys):
    write_images(tmp_path / "bad")
    for name in ("0.png", "2.png"):
        (tmp_path / "bad" / "train" / "dog" / name).write_bytes(b"no image")
    with pytest.raises(UserError, match="2 images of bad cannot be read"):
        data_.main(["bad", "--data-dir", str(tmp_path)])
    assert capsys.readouterr().out.count("is not an image") == 2 and not (tmp_path / "bad.pt").exists()


def test_a_folder_of_one_class_is_refused(tmp_path):
    write_images(tmp_path / "one", classes=("cat",))
    with pytest.raises(UserError, match="has the class cat alone"):
        datasets.find("one", tmp_path)


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


def test_downloads_are_locked(tmp_path, monkeypatch):
    def read(name, root, download):
        if not download:
            raise RuntimeError("not found")
        with open(root / f".{name}.lock") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return "data"
    monkeypatch.setattr(datasets, "cifar", read)
    assert datasets.publisher("cifar10", tmp_path / "new") == "data"
