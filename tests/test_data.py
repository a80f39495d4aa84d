"""The data sets: formats, the split, augmentation and batches, and what is refused in one line."""
import functools
import itertools
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as T

import datasets
import evaluate
import rank
import runs
import sat
import transfer
from common import HERE, UserError
from data import (DataSet, Examples, augment, draw_augmentation, load_dataset, open_dataset, plain_batches,
                  selection_and_final, training_batches)
from image_files import ImageFiles, image_folder, open_image

black = functools.partial(torch.zeros, dtype=torch.uint8)


def write(path, pixels, **options):
    """An image of the array `pixels` at `path`, whose folders are made too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def random_pixels(*shape, seed=0):
    """uint8 pixels. `seed` may be a generator."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_images(root, train=6, test=3, classes=("cat", "dog"), side=32):
    """An image folder at `root`: `train` and `test` random PNGs of each class."""
    rng = np.random.default_rng(0)
    for part, n in (("train", train), ("test", test)):
        for c in classes:
            for i in range(n):
                write(root / part / c / f"{i}.png", random_pixels(side, side, 3, seed=rng))


def refuses(name, root, message):
    """Asserts that the data set is refused in one line that matches `message`."""
    with pytest.raises(UserError, match=message) as e:
        load_dataset(name, root)
    assert "\n" not in str(e.value)


def test_digits():
    data = open_dataset(sat.command_line(["--batch-size", "1297"]), "cpu")
    assert (data.train.x.shape, data.test.x.shape) == ((1297, 1, 8, 8), (500, 1, 8, 8))
    assert torch.bincount(data.train.y).tolist() == [128, 131, 128, 132, 130, 131, 130, 129, 128, 130]
    x, (mean, std) = data.train.pixels(torch.arange(1297), "cpu"), data.mean_std
    assert mean == pytest.approx([x.mean().item()], abs=1e-5)
    assert std == pytest.approx([x.std().item()], abs=1e-4)
    low, high, again, other = (load_dataset(f"digits{part}", "nowhere")
                               for part in ("0-4", "5-9", "5-9", "5-9"))
    assert len(low.train) + len(high.train) == 1297
    assert high.classes == ["5", "6", "7", "8", "9"]
    assert high.train.y.unique().tolist() == [0, 1, 2, 3, 4]
    assert low.fingerprint() != high.fingerprint()
    assert again.fingerprint() == high.fingerprint()
    other.test.x[-1, 0, 7, 7] += 1
    assert other.fingerprint() != high.fingerprint(), "it sees each pixel"


@pytest.mark.parametrize("n", [500, 10000, 1020, 15])
def test_selection_and_final_parts(n):
    select, final = selection_and_final(n)
    assert len(select) == round(0.1 * n)
    assert sorted([*select.tolist(), *final.tolist()]) == list(range(n))
    torch.manual_seed(n)  # the global generator plays no part
    assert torch.equal(select, selection_and_final(n)[0])


@pytest.mark.parametrize("streamed,strength,key,n", [(False, 0.25, "crop", 9), (True, 0.1, "seed", 2000)])
def test_augmentation_parameters(streamed, strength, key, n):
    params = draw_augmentation(2000, (3, 32, 32), "full", streamed, torch.Generator())
    assert len(params[key].unique()) == n
    assert params["factor"].aminmax() == pytest.approx((1 - strength, 1 + strength), abs=0.01)
    assert params["flip"].float().mean() == pytest.approx(0.5, abs=0.05)
    assert params["angle"].rad2deg().aminmax() == pytest.approx((-2, 2), abs=0.05)
    assert len(params["angle"].unique()) > 1980, "each example has its own"
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
    examples = load_dataset("digits", "data").train
    batches, again = (list(training_batches(examples, 64, 0, 3, "crop", "cpu")) for _ in range(2))
    index = torch.cat([index for _, _, index in batches])
    assert len(index.unique()) == len(index) == 64 * (1297 // 64)
    assert torch.equal(batches[5][0], again[5][0])
    few = torch.tensor([7, 3, 499, 0, 7])
    for index, parts in ((index, training_batches(examples, 64, 0, 3, "none", "cpu")),
                         (few, plain_batches(examples, few, 2, "cpu"))):
        whole = examples.x[index] / 255, examples.y[index], index
        for values, expected in zip(zip(*parts), whole, strict=True):
            assert torch.equal(torch.cat(values), expected)


def test_a_folder_of_small_images(tmp_path):
    write_images(tmp_path / "pets", side=64)
    write_images(tmp_path / "large", side=65)
    assert load_dataset("large", tmp_path).train.streamed, "64 is the largest side of small images"
    folder = load_dataset("pets", tmp_path)
    assert folder.classes == ["cat", "dog"]
    assert folder.train.y.tolist() == [0] * 6 + [1] * 6
    assert folder.test.y.tolist() == [0] * 3 + [1] * 3
    for x, name in ((folder.train.x[8], "train/dog/2.png"), (folder.test.x[3], "test/dog/0.png")):
        assert np.array_equal(x.permute(1, 2, 0).numpy(), np.asarray(Image.open(tmp_path / "pets" / name)))
    assert not (tmp_path / "pets.pt").exists()


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
        write(folder / "jpg" / f"image_{i:05d}.jpg", np.full((60, 80, 3), (2 * i, 0, 0), dtype=np.uint8))
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
    names = ["001.ak47", "002.american-flag", "257.clutter"]
    for name in names:
        for i in range(1, 6):
            shape = (60, 80) if i == 2 else (60, 80, 3)
            write(folder / name / f"{name[:3]}_{i:04d}.jpg", random_pixels(*shape))
    (folder / "001.ak47" / "RENAME2").write_text("a stray file of the real archive")
    data = load_dataset("caltech256", tmp_path)
    assert data.classes == ["ak47", "american-flag", "clutter"]
    assert (len(data.train), len(data.test)) == (12, 3)
    for examples in (data.train, data.test):
        assert [path.parent.name for path in examples.x.paths] == [names[label] for label in examples.y]
    assert not set(data.train.x.paths) & set(data.test.x.paths)
    assert data.train.x.paths == load_dataset("caltech256", tmp_path).train.x.paths
    assert data.train.pixels(torch.arange(12), "cpu").shape == (12, 3, 224, 224), "grey images become RGB"
    (folder / "258.empty").mkdir()
    refuses("caltech256", tmp_path, "^there are no images .* in .*/258.empty$")


def test_imagenet200_is_200_wnids_of_an_imagenet_tree(tmp_path):
    wnids = re.findall(r"(?m)^n\d+", (HERE / "configs/imagenet200_wnids.txt").read_text())
    for wnid in [*wnids, "n99999999"]:
        for part in ("train", "val"):
            write(tmp_path / "imagenet" / part / wnid / "a.JPEG", black(80, 80, 3).numpy())
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
        examples = load_dataset("ramps", tmp_path, workers=workers).train
        return torch.cat([x for x, _, _ in training_batches(examples, size, 0, epoch, augmentation, "cpu")])
    ramp = np.zeros((300, 400, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, 400)[None], np.linspace(0, 255, 300)[:, None]
    for i in range(8):
        write(tmp_path / "ramps" / ("train" if i < 6 else "test") / "ab"[i % 2] / f"{i}.png", ramp)
    data = load_dataset("ramps", tmp_path)
    assert data.mean_std == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), "ImageNet's"
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
            ("b", ["test/emu"], "test has classes that .*train lacks: emu"),
            ("c", ["test/emu", "train/emu"], "there are no images .*emu")):
        write_images(tmp_path / name, train=1, test=1)
        for folder in folders:
            (tmp_path / name / folder).mkdir()
        refuses(name, tmp_path, message)
    for name, classes, message in (
            ("svhn", ("cat", "dog"), "has 2 classes, not 10"), ("one", ("cat",), "'cat'.: two or more are"),
            ("bytes", ("caf\udce9", "cat"), r"not UTF-8, 'caf\\udce9': rename it"),
            ("digits", ("cat", "dog"), "digits is built in, and .* has a data set of this name: rename")):
        write_images(tmp_path / name, classes=classes)
        refuses(name, tmp_path, message)
    (tmp_path / "none" / "train").mkdir(parents=True)
    refuses("none", tmp_path, "none/train has the class folders ..: two or more are")
    write_images(tmp_path / "tiny", side=4)
    refuses("tiny", tmp_path, r"tiny under .*: train has images \(3, 4, 4\); valid: .* 5 pixels or more")


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
    ({"train": {"x": black(8, 3, 8, 8)}}, "no pixel of train is above 1; valid: 0 to 255"),
    ({"test": {"x": black(8, 3, 8, 8) + 1}}, "no pixel of test is above 1; valid: 0 to 255")])
def test_bad_tensor_files(changes, message, tmp_path):
    good = {"x": black(8, 3, 8, 8) + 255, "y": torch.arange(8) % 2}
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


@pytest.mark.parametrize("level", [0, 77, 255])
def test_a_constant_channel_is_not_scaled(level, capsys):
    x = torch.from_numpy(random_pixels(20, 4, 8, 8))
    x[:, 3] = level
    x[0, 3, 0, 0] = abs(level - 1)  # nearly constant
    examples = Examples(x, torch.zeros(20))
    data = DataSet("rgba", examples, examples, ["a"])
    (mean, std), _ = data.mean_std, data.mean_std
    assert std[3] == 1
    assert std[:3] == pytest.approx(x[:, :3].div(255).std((0, 2, 3), unbiased=False).tolist(), abs=1e-6)
    assert mean[3] == pytest.approx(level / 255, abs=0.004)
    note = "note: rgba has (nearly) constant channels, which are not scaled: 3, counted from 0"
    assert capsys.readouterr().out.count(note) == 1


def test_a_copy_to_the_cpu_is_waited_for(monkeypatch):
    copies, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda *args, **more: copies.append(more) or to(*args, **more))
    list(Examples(black(20, 3, 8, 8), torch.zeros(20)).read([torch.arange(20)], "cpu"))
    assert not any(options.get("non_blocking") for options in copies)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_images_come_back_whole_from_the_gpu():
    x = torch.from_numpy(random_pixels(4000, 3, 32, 32))
    examples = Examples(x.to("cuda"), torch.zeros(4000))
    for index in torch.arange(4000).split(500):
        assert torch.equal(examples.pixels(index, "cpu"), x[index].float() / 255)


def test_images_of_more_than_8_bits_are_refused(tmp_path):
    """PIL would clip them."""
    for name, dtype in (("16.png", np.uint16), ("16.tif", np.uint16), ("32.tif", np.int32),
                        ("float.tif", np.float32)):
        write(tmp_path / name, random_pixels(8, 8).astype(dtype))
        with pytest.raises(UserError, match=f"{name} is not an image .*grey has more than 8 bits"):
            open_image(tmp_path / name)


@pytest.fixture
def photos(tmp_path):
    """The folder of a streamed data set `photos`: 6 training and 3 test images of "cat" and "dog"."""
    write_images(tmp_path / "photos", side=80)
    return tmp_path / "photos"


def test_the_fingerprint_of_streamed_images(photos, tmp_path):
    def fingerprint(name="photos"):
        return {**load_dataset(name, tmp_path).fingerprint(), "name": ""}
    first, path = fingerprint(), photos / "test" / "cat" / "0.png"
    shutil.copytree(photos, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "test" / "cat" / "0.png", (0, 0))
    assert fingerprint("copy") == first, "folder and times play no part"
    path.rename(path.with_name("0\udcff.png"))
    assert fingerprint() != first, "a file has another name, which is no UTF-8"
    path.with_name("0\udcff.png").rename(path)
    with open(photos / "train" / "cat" / "0.png", "ab") as file:
        file.write(b"0")
    assert fingerprint() != first, "a training image has another size"


@pytest.mark.parametrize("link", ["train", "test", "train/cat", "test/cat", "train/cat/0.png"])
def test_links_in_image_folders(link, photos, tmp_path):
    fingerprint = load_dataset("photos", tmp_path).fingerprint()
    (photos / link).rename(tmp_path / "elsewhere")
    (photos / link).symlink_to(tmp_path / "elsewhere")
    assert load_dataset("photos", tmp_path).fingerprint() == fingerprint
    (tmp_path / "elsewhere").rename(tmp_path / "lost")
    with pytest.raises(UserError):
        load_dataset("photos", tmp_path)


def test_files_of_other_suffixes_are_images_or_counted(tmp_path, capsys):
    write_images(tmp_path / "pets")
    for suffix in (".jfif", ".tif", ".TIFF", ".ppm"):
        write(tmp_path / "pets" / "train" / "cat" / f"x{suffix}", random_pixels(32, 32, 3))
    load_dataset("pets", tmp_path)
    assert "note" not in capsys.readouterr().out
    train = tmp_path / "pets" / "train"
    (train / "cat" / "young").mkdir()
    for path in ("cat/young/0.png", "cat/7", "dog/1.gif", "labels.csv", "cat/.DS_Store", ".git/config",
                 "dog/.\udcff.png", "dog/@eaDir/1.png", ".ipynb_checkpoints/1.png", "@eaDir/1.png",
                 "__MACOSX/._1.png"):
        (train / path).parent.mkdir(exist_ok=True)
        (train / path).touch()
    data, out = load_dataset("pets", tmp_path), capsys.readouterr().out
    assert data.classes == ["cat", "dog"]
    assert len(data.train) == 12 + 4
    assert out.count("note") == 1
    assert re.search("note: ignored 3 files or folders that are not images .*, first .*train/cat/7\n", out)


@pytest.mark.parametrize("size", [(200, 90), (24, 24), (20, 24)])
def test_small_images_of_two_sizes_are_streamed(size, tmp_path, capsys):
    write_images(tmp_path / "pets", side=20)
    write(tmp_path / "pets" / "test" / "cat" / "0.png", random_pixels(*size, 3))
    data = load_dataset("pets", tmp_path, side=40)
    assert data.train.pixels(torch.arange(12), "cpu").shape == (12, 3, 40, 40)
    assert re.search(f"note: .*cat/0.png is {size[1]}x{size[0]} pixels. .* resized to --side\n",
                     capsys.readouterr().out)


def test_a_size_that_square_does_not_take(tmp_path):
    write_images(tmp_path / "pets", side=24)
    words = ["--dataset", "pets", "--data-dir", str(tmp_path), "--batch-size", "4"]
    for more in ([], ["--eval-attacks", "apgd-ce", "--select-attacks", "square"]):
        with pytest.raises(UserError, match="square takes no images of 24x24 pixels in l2: give --select"):
            open_dataset(sat.command_line([*words, *more]), "cpu")
    for more in (["--eval-attacks", "apgd-ce", "--select-attacks", "apgd-ce"],
                 ["--norm", "linf", "--eps", "0.1", "--step-size", "0.1"]):
        open_dataset(sat.command_line([*words, *more]), "cpu")


@pytest.mark.parametrize("batch,noted", [(128, True), (100, True), (60, False), (43, False)])
def test_images_left_out_of_each_epoch(batch, noted, tmp_path, capsys):
    x, y = torch.from_numpy(random_pixels(180, 1, 8, 8)), torch.arange(180) % 2
    torch.save({"train": {"x": x, "y": y}, "test": {"x": 255 - x, "y": y}, "classes": ["a", "b"]},
               tmp_path / "few.pt")
    args = ["--dataset", "few", "--data-dir", str(tmp_path), "--batch-size", str(batch)]
    open_dataset(sat.command_line(args), "cpu")
    note = f"each epoch leaves out {180 % batch} of the 180 training images, .* batch of {batch} "
    assert bool(re.search(note, capsys.readouterr().out)) == noted


def huge(content):
    """The bytes of a PNG that now says that it has 20000 x 9000 pixels."""
    header = b"IHDR" + struct.pack(">II", 20000, 9000) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


@pytest.mark.parametrize("side", [32, 80])
@pytest.mark.parametrize("name,damage", [
    ("0.png", huge), ("0.png", lambda content: b""),
    ("0.bmp", lambda content: content[:18] + b"\xff\xff\xff\x7f" * 2 + content[26:]),
    ("0.webp", lambda content: content[:40]), ("0.jpg", lambda content: content[:-40]),
    ("0.tif", lambda content: content[:60])])
def test_damaged_images_are_named(side, name, damage, tmp_path):
    write_images(tmp_path / "pets", side=side)
    path = tmp_path / "pets" / "train" / "dog" / name
    write(path, random_pixels(side, side, 3))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"^[^\n]*dog/{name} is not an image [^\n]*: fix or delete it$"):
        data = load_dataset("pets", tmp_path, workers=side // 80)
        data.train.pixels(torch.arange(12), "cpu")


def test_val_beside_a_flat_test_folder(tmp_path, capsys):
    write_images(tmp_path / "pets")
    expected = load_dataset("pets", tmp_path)
    (tmp_path / "pets" / "test").rename(tmp_path / "pets" / "val")
    write(tmp_path / "pets" / "test" / "0.png", random_pixels(32, 32, 3))
    assert torch.equal(load_dataset("pets", tmp_path).test.x, expected.test.x)
    out = capsys.readouterr().out
    assert re.search("note: .*/test has none of the class folders of train/: .*/val is the test set", out)
    (tmp_path / "pets" / "val").rename(tmp_path / "pets" / "other")
    refuses("pets", tmp_path, "pets has none of the classes of train/ in test/ or val/: ")


def test_a_loader_process_that_is_killed_between_two_batches():
    code = """import common
def main(): raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
common.script(main)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 1
    assert re.fullmatch("error: another process is gone .*pid 7.*; .* with --workers 0 .*\n", done.stderr)


def test_labels_follow_the_order_of_the_training_classes(tmp_path):
    levels = {"cat": 50, "ant": 100, "dog": 200}
    for part, names in (("train", ("cat", "ant", "dog")), ("test", ("dog", "cat", "ant"))):
        for name in names:  # in this order: a folder lists its entries in any
            write(tmp_path / "pets" / part / name / "0.png", np.full((8, 8, 3), levels[name], dtype=np.uint8))
    for order in (None, ["dog", "ant", "cat"]):
        train, test, classes = image_folder(tmp_path / "pets", order)
        assert classes == (order or ["ant", "cat", "dog"])
        for x, y in (train, test):
            assert x[:, 0, 0, 0].tolist() == [levels[classes[label]] for label in y]


def test_random_crops_are_torchvisions(tmp_path):
    write(tmp_path / "a.png", random_pixels(90, 120, 3))
    files, image = ImageFiles([tmp_path / "a.png"], side=32), Image.open(tmp_path / "a.png")
    for seed in range(10):
        torch.manual_seed(seed)
        expected = RandomResizedCrop(32, scale=(0.08, 1), ratio=(3 / 4, 4 / 3))(image)
        assert torch.equal(files[0, seed], T.pil_to_tensor(expected))


def test_the_test_view_of_a_smaller_side_shows_as_much(tmp_path):
    ramp = np.add.outer(np.arange(300) / 3, np.arange(400) / 3).astype(np.uint8)  # a pixel of 32 is 6 levels
    write(tmp_path / "ramp.png", ramp)
    large, small = (ImageFiles([tmp_path / "ramp.png"], side)[0, None].float() for side in (224, 32))
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(large, 7), small, atol=6, rtol=0)


def test_a_tensor_file_comes_before_a_folder_and_test_before_val(tmp_path):
    root = tmp_path / "pets"
    write_images(root)
    shutil.copytree(root / "train", root / "val")
    assert len(load_dataset("pets", tmp_path).test) == 6, "not the 12 of val/"
    x, y = torch.from_numpy(random_pixels(8, 1, 8, 8)), torch.arange(8) % 2
    torch.save({"train": {"x": x, "y": y}, "test": {"x": 255 - x, "y": y}, "classes": ["a", "b"]},
               tmp_path / "pets.pt")
    assert load_dataset("pets", tmp_path).classes == ["a", "b"]


def test_order_and_augmentation_depend_on_seed_and_epoch():
    image = torch.from_numpy(random_pixels(1, 1, 8, 8))
    examples = Examples(image.expand(64, -1, -1, -1), torch.arange(64))  # of one image: x shows the crops
    batches = [next(training_batches(examples, 64, seed, epoch, "crop", "cpu"))
               for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for (x, _, index), (other_x, _, other_index) in itertools.combinations(batches, 2):
        assert not torch.equal(x, other_x)
        assert not torch.equal(index, other_index)
