"""The data sets: formats, the split, augmentation and batches, and what is refused in one line."""
import functools
import pickle
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.transforms import functional as T

import datasets
import evaluate
import rank
import runs
import sat
import transfer
from common import HERE, UserError
from data import (DataSet, Split, augment, draw_augmentation, load_dataset, open_dataset, plain_batches,
                  selection_and_final, training_batches)
from image_files import ImageFiles

black = functools.partial(torch.zeros, dtype=torch.uint8)


def write_images(root, train=6, test=3, classes=("cat", "dog"), side=32):
    """An image folder at `root`: `train` and `test` random PNGs of each class."""
    rng = np.random.default_rng(0)
    for part, n in (("train", train), ("test", test)):
        for c in classes:
            (root / part / c).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / c / f"{i}.png")


def write_jpeg(path, colour=(200, 30, 90), size=(80, 60), mode="RGB"):
    """A JPEG of one colour at `path`, whose folders are made too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


def refuses(name, root, message):
    """Asserts that the data set is refused in one line that matches `message`."""
    with pytest.raises(UserError, match=message) as e:
        load_dataset(name, root)
    assert "\n" not in str(e.value)


def test_digits():
    data = open_dataset(sat.command_line(["--batch-size", "1297"]), "cpu")
    assert (data.train.x.shape, data.test.x.shape) == ((1297, 1, 8, 8), (500, 1, 8, 8))
    assert torch.bincount(data.train.y).tolist() == [128, 131, 128, 132, 130, 131, 130, 129, 128, 130]
    x, (mean, std) = data.train.pixels(torch.arange(1297), "cpu"), data.mean_std()
    assert mean == pytest.approx([x.mean().item()], abs=1e-5)
    assert std == pytest.approx([x.std().item()], abs=1e-4)
    low, high, again = (load_dataset(f"digits{part}", "nowhere") for part in ("0-4", "5-9", "5-9"))
    assert len(low.train) + len(high.train) == 1297
    assert high.classes == ["5", "6", "7", "8", "9"]
    assert high.train.y.unique().tolist() == [0, 1, 2, 3, 4]
    assert low.fingerprint() != high.fingerprint()
    assert again.fingerprint() == high.fingerprint()


@pytest.mark.parametrize("n", [500, 10000, 1020, 15])
def test_selection_and_final_parts(n):
    select, final = selection_and_final(n)
    assert len(select) == round(0.1 * n)
    assert sorted([*select.tolist(), *final.tolist()]) == list(range(n))
    torch.manual_seed(n)  # the global generator plays no part
    assert torch.equal(select, selection_and_final(n)[0])


@pytest.mark.parametrize("streamed,strength,key,n", [(False, 0.25, "crop", 9), (True, 0.1, "seed", 1000)])
def test_augmentation_parameters(streamed, strength, key, n):
    params = draw_augmentation(1000, (3, 32, 32), "full", streamed, torch.Generator())
    assert len(params[key].unique()) == n
    assert params["factor"].aminmax() == pytest.approx((1 - strength, 1 + strength), abs=0.01)
    assert 0.45 < params["flip"].float().mean() < 0.55
    assert 1.9 < params["angle"].abs().max().rad2deg() <= 2.0001
    assert len(params["angle"].unique()) > 990, "each example has its own"
    assert len(params["order"].unique(dim=0)) == 6


def test_augmentation_against_torchvision():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(40, 3, 32, 32, generator=generator)
    params = draw_augmentation(40, x.shape, "full", False, generator)
    augmented, adjusts = augment(x, params), (T.adjust_brightness, T.adjust_contrast, T.adjust_saturation)
    for i in range(40):
        row, column = params["crop"][i].tolist()
        expected = T.pad(x[i], 4)[:, row:row + 32, column:column + 32]
        expected = T.hflip(expected) if params["flip"][i] else expected
        for op in params["order"][i].tolist():
            expected = adjusts[op](expected, params["factor"][i, op].item())
        expected = T.rotate(expected, params["angle"][i].rad2deg().item())
        differ = ((augmented[i] - expected).abs() > 1e-3).float().mean()
        assert differ < 0.01, "torchvision may round a pixel's origin the other way"
    assert torch.equal(augment(x, {"crop": torch.full((40, 2), 4)}), x), "a crop from the middle"


def test_batches():
    split = load_dataset("digits", "data").train
    batches, again, other = (list(training_batches(split, 64, 0, e, "crop", "cpu")) for e in (3, 3, 4))
    index = torch.cat([index for _, _, index in batches])
    assert len(index.unique()) == len(index) == 64 * (1297 // 64)
    assert torch.equal(batches[5][0], again[5][0])
    assert not torch.equal(batches[5][2], other[5][2])
    few = torch.tensor([7, 3, 499, 0, 7])
    for index, parts in ((index, training_batches(split, 64, 0, 3, "none", "cpu")),
                         (few, plain_batches(split, few, 2, "cpu"))):
        for values, expected in zip(zip(*parts), (split.x[index] / 255, split.y[index], index), strict=True):
            assert torch.equal(torch.cat(values), expected)


def test_a_folder_of_small_images(tmp_path):
    write_images(tmp_path / "pets")
    folder = load_dataset("pets", tmp_path)
    assert folder.classes == ["cat", "dog"]
    assert folder.train.y.tolist() == [0] * 6 + [1] * 6
    assert folder.test.y.tolist() == [0] * 3 + [1] * 3
    for x, name in ((folder.train.x[8], "train/dog/2.png"), (folder.test.x[3], "test/dog/0.png")):
        assert np.array_equal(x.permute(1, 2, 0).numpy(), np.asarray(Image.open(tmp_path / "pets" / name)))
    assert not (tmp_path / "pets.pt").exists()
    for size in ((65, 65), (32, 31)):
        write_jpeg(tmp_path / "pets" / "test" / "dog" / "other.jpg", size=size)
        data = load_dataset("pets", tmp_path)
        assert data.train.streamed
        assert data.test.streamed


def test_the_fingerprint_sees_every_image():
    data, other = load_dataset("digits", "data"), load_dataset("digits", "data")
    other.test.x[499, 0, 7, 7] += 1
    assert other.fingerprint() != data.fingerprint()
    splits = [Split(ImageFiles([Path("a", name)]), torch.zeros(1)) for name in ("1", "1", "\udcff")]
    hashes = [DataSet("streamed", split, split, []).images_hash for split in splits]
    assert hashes[0] == hashes[1], "streamed images count by their names"
    assert hashes[1] != hashes[2], "also one that is no UTF-8"


@pytest.fixture
def no_checksums(monkeypatch):
    """torchvision does not compare the publishers' files with the sums of the real ones."""
    for module in ("cifar", "svhn", "flowers102"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *a: True)


@pytest.mark.parametrize("name,folder,files,meta,labels,n_classes", [
    ("cifar10", "cifar-10-batches-py", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"],
     "batches.meta", "label", 10),
    ("cifar100", "cifar-100-python", ["train", "test"], "meta", "fine_label", 100)])
def test_cifar_in_its_publishers_format(name, folder, files, meta, labels, n_classes, tmp_path, no_checksums):
    rng, pixels, folder = np.random.default_rng(0), [], tmp_path / folder
    folder.mkdir()
    for file in files:
        pixels.append(rng.integers(0, 255, (n_classes, 3072), dtype=np.uint8))
        (folder / file).write_bytes(pickle.dumps({"data": pixels[-1], f"{labels}s": [*range(n_classes)]}))
    names = [str(c) for c in range(n_classes)]
    (folder / meta).write_bytes(pickle.dumps({f"{labels}_names": names}))
    data = load_dataset(name, tmp_path)
    assert data.classes == names
    assert np.array_equal(data.train.x.numpy(), np.concatenate(pixels[:-1]).reshape(-1, 3, 32, 32))
    assert np.array_equal(data.test.x.numpy(), pixels[-1].reshape(-1, 3, 32, 32))
    assert data.train.y.tolist() == [*range(n_classes)] * (len(files) - 1)


def test_svhn_in_its_publishers_format(tmp_path, no_checksums, capsys):
    rng, pixels = np.random.default_rng(0), {}
    for part, n in (("train", 12), ("test", 5)):
        pixels[part] = rng.integers(0, 255, (32, 32, 3, n), dtype=np.uint8)
        labels = np.arange(1, n + 1, dtype=np.uint8)[:, None] % 10 + 1
        scipy.io.savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels[part], "y": labels})
    data = load_dataset("svhn", tmp_path)
    assert data.classes == list("0123456789")
    assert np.array_equal(data.train.x[7].permute(1, 2, 0).numpy(), pixels["train"][..., 7])
    assert data.train.y.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3], "label 10 is digit 0"
    assert "12 / 5 images here, and 73,257 / 26,032 in the paper (Table 1)" in capsys.readouterr().out
    (tmp_path / "svhn.pt").rename(tmp_path / "copy.pt")
    assert torch.equal(load_dataset("copy", tmp_path).test.x, data.test.x)


def test_flowers102_in_its_publishers_format(tmp_path, no_checksums):
    folder, labels = tmp_path / "flowers-102", np.arange(1, 107)[None] % 102 + 1
    for i in range(1, 107):
        write_jpeg(folder / "jpg" / f"image_{i:05d}.jpg", (2 * i, 0, 0))
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": labels})
    scipy.io.savemat(folder / "setid.mat", {"trnid": np.arange(2, 104)[None], "valid": np.array([[1, 105]]),
                                            "tstid": np.array([[104, 106]])})
    data = load_dataset("flowers102", tmp_path)
    assert data.train.y.tolist() == [*range(2, 102), 0, 1]
    assert data.test.y.tolist() == [1, 3]
    image_80 = data.train.pixels(torch.tensor([78]), "cpu")
    assert image_80[0, 0].mean() == pytest.approx(160 / 255, abs=0.02)


def test_caltech256_in_its_publishers_format(tmp_path, monkeypatch):
    monkeypatch.setitem(datasets.TABLE_1, "caltech256", (3, 12, 3))
    folder = tmp_path / "caltech256" / "256_ObjectCategories"
    for c, name in enumerate(("001.ak47", "002.american-flag", "257.clutter")):
        for i in range(1, 6):
            write_jpeg(folder / name / f"{c + 1:03d}_{i:04d}.jpg", mode="L" if i == 2 else "RGB")
    (folder / "001.ak47" / "RENAME2").write_text("a stray file of the real archive")
    data = load_dataset("caltech256", tmp_path)
    assert data.classes == ["ak47", "american-flag", "clutter"]
    assert (len(data.train), len(data.test)) == (12, 3)
    assert not set(data.train.x.paths) & set(data.test.x.paths)
    assert data.train.x.paths == load_dataset("caltech256", tmp_path).train.x.paths
    assert data.train.pixels(torch.arange(12), "cpu").shape == (12, 3, 224, 224), "grey images become RGB"


def test_imagenet200_is_200_wnids_of_an_imagenet_tree(tmp_path):
    wnids = re.findall(r"(?m)^n\d+", (HERE / "configs/imagenet200_wnids.txt").read_text())
    for wnid in [*wnids, "n99999999"]:
        for part in ("train", "val"):
            write_jpeg(tmp_path / "imagenet" / part / wnid / "a.JPEG")
    data = load_dataset("imagenet200", tmp_path)
    assert [path.parent.name for path in data.train.x.paths] == wnids
    assert len(data.test) == len(set(data.classes)) == 200
    assert data.classes[0] == "stingray"
    (tmp_path / "imagenet").rename(tmp_path / "imagenet200")
    assert load_dataset("imagenet200", tmp_path).classes == data.classes
    (tmp_path / "imagenet200" / "val" / wnids[3]).rename(tmp_path / "elsewhere")
    refuses("imagenet200", tmp_path, f"no images .* in .*val/{wnids[3]}")


def test_streamed_views(tmp_path):
    def batch(epoch, workers=0, size=6, augmentation="full"):
        split = load_dataset("ramps", tmp_path, workers=workers).train
        return torch.cat([x for x, _, _ in training_batches(split, size, 0, epoch, augmentation, "cpu")])
    ramp = np.zeros((300, 400, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, 400)[None], np.linspace(0, 255, 300)[:, None]
    for i in range(8):
        path = tmp_path / "ramps" / ("train" if i < 6 else "test") / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ramp).save(path)
    data = load_dataset("ramps", tmp_path)
    x = data.test.pixels(torch.arange(2), "cpu")
    # The shortest side 300 becomes 256, so 400 becomes 341; the centre 224 of each are left.
    assert x[0, 1, 0].mean().item() == pytest.approx(16 / 256, abs=0.01)
    assert x[0, 0, :, 0].mean().item() == pytest.approx(58.5 / 341, abs=0.01)
    first = batch(0)
    assert not torch.equal(batch(1), first)
    assert torch.equal(batch(0, workers=2, size=3), first)
    widths = [(image[0].amax() - image[0].amin()).item() for image in batch(2, augmentation="crop")]
    assert len({round(width, 3) for width in widths}) == 6, "each example has its own crop"
    assert 0.1 < min(widths) < max(widths) < 1.01


def test_bad_image_folders(tmp_path):
    for name, folders, message in (
            ("a", ["train/Cat"], "'Cat', 'cat', 'dog'.*: two or more are needed, whose names differ in more"),
            ("b", ["test/emu"], "test has classes that .*train lacks: emu"),
            ("c", ["test/emu", "train/emu"], "there are no images .*emu")):
        write_images(tmp_path / name, train=1, test=1)
        for folder in folders:
            (tmp_path / name / folder).mkdir()
        refuses(name, tmp_path, message)
    for name, classes in (("svhn", ("cat", "dog")), ("one", ("cat",))):
        write_images(tmp_path / name, classes=classes)
    refuses("svhn", tmp_path, "has 2 classes, not 10")
    refuses("one", tmp_path, "'cat'.: two or more are needed")
    (tmp_path / "none" / "train").mkdir(parents=True)
    refuses("none", tmp_path, "none lacks train/, or test/ and val/")
    for side in (32, 80):
        write_images(tmp_path / f"pets{side}", side=side)
        (tmp_path / f"pets{side}" / "train" / "dog" / "1.png").write_bytes(b"\x89PNG not")
    refuses("pets32", tmp_path, "dog/1.png is not an image .*: fix or delete it$")
    data = load_dataset("pets80", tmp_path, workers=1)
    for _ in range(2):  # after the error, new workers are started
        with pytest.raises(UserError, match="^[^\n]*dog/1.png is not an image [^\n]*: fix or delete it$"):
            list(plain_batches(data.train, torch.arange(12), 2, "cpu"))


@pytest.mark.parametrize("changes,message", [
    ({"test": {"x": black(8, 1, 8, 8)}}, "(1, 8, 8)"), ({"test": {"x": black(8, 3, 9, 9)}}, "(3, 9, 9)"),
    ({"train": {"x": black(8, 3, 0, 0)}}, "(3, 0, 0)"), ({"train": {"x": black(8, 5, 8, 8)}}, "(5, 8, 8)"),
    ({"train": {"x": black(8, 3, 4, 4)}, "test": {"x": black(8, 3, 4, 4)}}, "train has images (3, 4, 4)"),
    ({"train": {"x": black(8, 3, 6, 8)}, "test": {"x": black(8, 3, 6, 8)}}, "train has images (3, 6, 8)"),
    ({"train": {"x": torch.zeros(8, 3, 8, 8)}}, "train must hold"), ({"test": {"x": None}}, "test must hold"),
    ({"test": {"x": black(9, 3, 8, 8)}}, "a label for each"), ({"classes": "ab"}, "two or more different"),
    ({"classes": ["a", "a"]}, "two or more different"), ({"classes": ["a"]}, "two or more different"),
    ({"train": {"y": torch.arange(8) % 3}}, "0 to 2; valid"), ({"test": {"y": -torch.arange(8)}}, "-7 to 0;"),
    ({"train": {"y": torch.zeros(8, dtype=torch.int64)}}, "1 of its 2 classes have no training image"),
    ({"folder": "a hash"}, "is a copy of an image folder by an earlier version: delete it")])
def test_bad_tensor_files(changes, message, tmp_path):
    good = {"x": black(8, 3, 8, 8), "y": torch.arange(8) % 2}
    parts = {part: {**good, **changes.get(part, {})} for part in ("train", "test")}
    torch.save({"classes": ["a", "b"], **changes, **parts}, tmp_path / "bad.pt")
    refuses("bad", tmp_path, re.escape(message))


def test_downloads_are_locked_and_may_fail(tmp_path, monkeypatch):
    def urlopen(*args, **kwargs):
        codes.append(subprocess.run(["flock", "--nonblock", lock, "true"]).returncode)
        raise OSError("no route to host")
    lock, codes = tmp_path / "new/.cifar10.lock", []
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    refuses("cifar10", tmp_path / "new", "no cifar10 under .* put cifar-10-batches-py/ .* folders cifar10/tr")
    assert codes[0] == 1, "another process would wait"
    for _ in range(2):  # torchvision leaves an empty caltech256/, which is no image folder
        refuses("caltech256", tmp_path, "no caltech256 under .* put caltech256/256_ObjectCategories/")
    refuses("imagenet200", tmp_path, "imagenet lacks train/")
    refuses("mnist", tmp_path, "no data set 'mnist'")


@pytest.mark.slow
def test_resnet50_through_every_stage():
    """Streamed images through every script, by svar: after two steps all entropies are 0."""
    for name in ("pets", "other"):
        write_images(Path("data", name), train=4, test=10, side=80)
    Path("c.yaml").write_text(
        "{arch: resnet50, eps: 3, step-size: 0.5, steps: 1, epochs: 1, batch-size: 4, lr: 0.001, side: 32, "
        "workers: 0, eval-attacks: [apgd-ce], select-attacks: [apgd-ce], eval-n: 2}")
    flags = ["--config", "c.yaml", "--dataset"]
    sat.main([*flags, "pets", "--split", "esat", "--metric", "svar", "--run", "a"])
    evaluate.main(["results/pets/a/best.pt"])
    transfer.main(["results/pets/a/best.pt", *flags, "other"])
    result, again = (runs.load(*Path("results/pets/a").glob(f)) for f in ("result.json", "eval-*.json"))
    assert result["accuracy"] == again["accuracy"]
    assert (result["A"], result["cost"]["attacked"]) == (4, 4)
    with pytest.raises(UserError, match="vog"):
        rank.main([*flags, "pets", "--metrics", "vog", "--results", "other"])
