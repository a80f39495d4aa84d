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
    yield ("not square", sat.main, [*data, "--dataset", "oblong"],
           "images of 6 x 8 pixels: small images must be square")
    yield ("a class without images", sat.main, [*data, "--dataset", "empty"],
           "1 of its 3 classes have no training image")
    yield ("one test image", sat.main, [*data, "--dataset", "one", "--arch", "preactresnet8"],
           "the test set has 1 image")
    yield "float data", sat.main, [*data, "--dataset", "floats"], "train must hold x, uint8"
    yield ("malicious data", sat.main, [*data, "--dataset", "malicious"],
           "malicious.pt is truncated or not a file of this project")


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


def test_downloads_are_locked(tmp_path, monkeypatch):
    def read(name, root, download):
        if not download:
            raise RuntimeError("not found")
        with open(root / f".{name}.lock") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return "data"
    monkeypatch.setattr(datasets, "cifar", read)
    assert datasets.publisher("cifar10", tmp_path / "new") == "data"
