"""The data sets: publishers' formats, image folders, the split, augmentation and batches, and the files that
are refused in one line."""
import fcntl
import functools
import json
import math
import pickle
import re
import shutil
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import attacks
import datasets
import evaluate
import rank
import runs
import sat
import transfer
from common import UserError
from conftest import HERE, write_images, write_jpeg
from data import (DataSet, Split, augment, draw_augmentation, load_dataset, open_dataset,
                  plain_batches, selection_and_final, training_batches)
from image_files import ImageFiles


def refuses(name, root, message):
    """Asserts that the data set is refused in one line that matches `message`."""
    with pytest.raises(UserError, match=message) as e:
        load_dataset(name, root)
    assert "\n" not in str(e.value)


def test_digits():
    data = load_dataset("digits", "nowhere")
    assert (data.train.x.shape, data.test.x.shape) == ((1297, 1, 8, 8), (500, 1, 8, 8))
    assert data.train.x.max() == 255
    assert torch.bincount(data.train.y).tolist() == [128, 131, 128, 132, 130, 131, 130, 129, 128, 130]
    x = data.train.pixels(torch.arange(1297), "cpu")
    mean, std = data.mean_std()
    assert mean == pytest.approx([x.mean().item()], abs=1e-5)
    assert std == pytest.approx([x.std().item()], abs=1e-4)
    low, high = load_dataset("digits0-4", "nowhere"), load_dataset("digits5-9", "nowhere")
    assert len(low.train) + len(high.train) == 1297
    assert high.classes == ["5", "6", "7", "8", "9"]
    assert high.train.y.unique().tolist() == [0, 1, 2, 3, 4]
    assert low.fingerprint() != high.fingerprint()
    assert high.fingerprint() == load_dataset("digits5-9", "nowhere").fingerprint()


@pytest.mark.parametrize("n", [500, 10000, 1020, 15])
def test_selection_and_final_parts(n):
    select, final = selection_and_final(n)
    assert len(select) == round(0.1 * n)
    assert sorted([*select.tolist(), *final.tolist()]) == list(range(n))
    torch.manual_seed(n)  # the global generator plays no part
    assert torch.equal(select, selection_and_final(n)[0])


def test_a_batch_must_fit_the_training_set():
    args = SimpleNamespace(dataset="digits", data_dir="nowhere", side=224, workers=0, batch_size=1297)
    assert open_dataset(args, "cpu").name == "digits"
    args.batch_size = 1298
    with pytest.raises(UserError, match="--batch-size 1298 .* it must be 1 to 1297"):
        open_dataset(args, "cpu")


def test_augmentation_parameters():
    params = draw_augmentation(1000, (3, 32, 32), "full", False, torch.Generator().manual_seed(1))
    assert params["crop"].unique().tolist() == list(range(9))
    assert 0.75 <= params["factor"].min() < 0.76
    assert 1.24 < params["factor"].max() <= 1.25
    assert 0.45 < params["flip"].float().mean() < 0.55
    assert 1.9 < params["angle"].abs().max().rad2deg() <= 2.0001
    assert len(params["angle"].unique()) > 990, "each example has its own"
    assert len(params["order"].unique(dim=0)) == 6
    params = draw_augmentation(1000, (3, 224, 224), "full", True, torch.Generator().manual_seed(0))
    assert 0.9 <= params["factor"].min() < 0.91
    assert 1.09 < params["factor"].max() <= 1.1
    assert len(params["seed"].unique()) == 1000
    assert set(draw_augmentation(4, (1, 8, 8), "crop", False, None)) == {"crop"}
    assert draw_augmentation(4, (1, 8, 8), "none", False, None) == {}


def test_augmentation_against_torchvision():
    from torchvision.transforms import functional as T
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(40, 3, 32, 32, generator=generator)
    params = draw_augmentation(40, x.shape, "full", False, generator)
    augmented = augment(x, params)
    for i in range(40):
        row, column = params["crop"][i].tolist()
        expected = T.pad(x[i], 4)[:, row:row + 32, column:column + 32]
        expected = T.hflip(expected) if params["flip"][i] else expected
        for op in params["order"][i].tolist():
            adjust = (T.adjust_brightness, T.adjust_contrast, T.adjust_saturation)[op]
            expected = adjust(expected, params["factor"][i, op].item())
        expected = T.rotate(expected, math.degrees(params["angle"][i].item()))
        differ = ((augmented[i] - expected).abs() > 1e-3).float().mean()
        assert differ < 0.01, "torchvision may round a pixel's origin the other way"
    assert torch.equal(augment(x, {"crop": torch.full((40, 2), 4)}), x), "a crop from the middle"


def test_batches_are_slices_of_one_global_batch(monkeypatch):
    split = load_dataset("digits", "data").train
    batches, again, other = (list(training_batches(split, 64, 0, e, "crop", "cpu")) for e in (3, 3, 4))
    index = torch.cat([index for _, _, index in batches])
    assert len(index.unique()) == len(index) == 64 * (1297 // 64)
    assert torch.equal(torch.cat([y for _, y, _ in batches]), split.y[index])
    assert torch.equal(batches[5][0], again[5][0])
    assert not torch.equal(batches[5][2], other[5][2])
    monkeypatch.setenv("WORLD_SIZE", "3")
    for process in range(3):
        monkeypatch.setenv("RANK", str(process))
        for k, part in enumerate(training_batches(split, 64, 0, 3, "crop", "cpu")):
            for values, global_values in zip(part, batches[k]):
                assert torch.equal(values, global_values.tensor_split(3)[process])
        assert k == len(batches) - 1


def test_plain_batches_are_the_images_asked_for():
    split = load_dataset("digits", "data").test
    index = torch.tensor([7, 3, 499, 0, 7])
    batches = list(plain_batches(split, index, 2, "cpu"))
    assert [len(x) for x, _, _ in batches] == [2, 2, 1]
    for values, expected in zip(zip(*batches), (split.x[index] / 255, split.y[index], index)):
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
    train, test = ({"x": split.x, "y": split.y} for split in (folder.train, folder.test))
    torch.save({"train": train, "test": test, "classes": ["cat", "dog"]}, tmp_path / "packed.pt")
    packed = load_dataset("packed", tmp_path)
    assert torch.equal(packed.test.x, folder.test.x)
    assert packed.fingerprint() == {**folder.fingerprint(), "name": "packed"}


@pytest.mark.parametrize("size", [(80, 60), (65, 65)])
def test_small_images_of_unequal_sizes_are_streamed(tmp_path, size):
    write_images(tmp_path / "mixed", side=32)
    write_jpeg(tmp_path / "mixed" / "test" / "dog" / "large.jpg", size=size)
    data = load_dataset("mixed", tmp_path)
    assert data.train.streamed
    assert data.test.streamed


def test_the_fingerprint_sees_every_image():
    data, other = load_dataset("digits", "data"), load_dataset("digits", "data")
    other.test.x = other.test.x.clone()
    other.test.x[499, 0, 7, 7] += 1
    runs.check_fingerprint(data, data.fingerprint(), "scores.pt")
    with pytest.raises(UserError, match="scores.pt belongs to other data .images: "):
        runs.check_fingerprint(other, data.fingerprint(), "scores.pt")
    hashes = []  # streamed images count by their names
    for name in ("1", "1", "\udcff"):  # the last is a name that is no UTF-8
        split = Split(ImageFiles([Path("a", name)]), torch.zeros(1))
        hashes.append(DataSet("streamed", split, split, []).images_hash)
    assert hashes[0] == hashes[1]
    assert hashes[1] != hashes[2]


def write_cifar(root, folder, files, meta, labels, n_classes):
    """CIFAR's files of four random images each, in the publisher's format; {file name: pixels}."""
    rng, pixels = np.random.default_rng(0), {}
    (root / folder).mkdir()
    for name in files:
        pixels[name] = rng.integers(0, 255, (4, 3072), dtype=np.uint8)
        (root / folder / name).write_bytes(pickle.dumps({"data": pixels[name], labels: [0, 1, 2, 3]}))
    names = [str(c) for c in range(n_classes)]
    (root / folder / meta).write_bytes(pickle.dumps({labels.replace("labels", "label_names"): names}))
    return pixels


def test_cifar_in_its_publishers_format(tmp_path, monkeypatch):
    from torchvision.datasets import cifar
    monkeypatch.setattr(cifar, "check_integrity", lambda *a: True)  # the sums of the real files
    files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    pixels = write_cifar(tmp_path, "cifar-10-batches-py", files, "batches.meta", "labels", 10)
    data = load_dataset("cifar10", tmp_path)
    assert (len(data.train), len(data.test)) == (20, 4)
    assert np.array_equal(data.train.x[5].numpy(), pixels["data_batch_2"][1].reshape(3, 32, 32))
    pixels = write_cifar(tmp_path, "cifar-100-python", ["train", "test"], "meta", "fine_labels", 100)
    data = load_dataset("cifar100", tmp_path)
    assert np.array_equal(data.test.x[3].numpy(), pixels["test"][3].reshape(3, 32, 32))
    assert data.test.y[3] == 3


def test_svhn_in_its_publishers_format(tmp_path, monkeypatch, capsys):
    from scipy.io import savemat
    from torchvision.datasets import svhn
    monkeypatch.setattr(svhn, "check_integrity", lambda *a: True)  # the sums of the real files
    rng, pixels = np.random.default_rng(0), {}
    for part, n in (("train", 12), ("test", 5)):
        pixels[part] = rng.integers(0, 255, (32, 32, 3, n), dtype=np.uint8)
        labels = np.arange(1, n + 1, dtype=np.uint8)[:, None] % 10 + 1
        savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels[part], "y": labels})
    data = load_dataset("svhn", tmp_path)
    assert data.classes == list("0123456789")
    assert np.array_equal(data.train.x[7].permute(1, 2, 0).numpy(), pixels["train"][..., 7])
    assert data.train.y.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3], "label 10 is digit 0"
    assert "12 / 5 images, the paper's (Table 1) 73,257 / 26,032" in capsys.readouterr().out
    (tmp_path / "svhn.pt").rename(tmp_path / "copy.pt")
    assert torch.equal(load_dataset("copy", tmp_path).test.x, data.test.x)


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
    data = load_dataset("flowers102", tmp_path)
    assert data.train.y.tolist() == [101, 6, 1]
    assert data.test.y.tolist() == [4, 2]
    red = data.train.pixels(torch.tensor([1]), "cpu")[0, 0].mean()
    assert red == pytest.approx(40 / 255, abs=0.02), "image 4"
    assert "1,020 / 1,020" in capsys.readouterr().out


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
    lines = (HERE / "configs" / "imagenet200_wnids.txt").read_text().splitlines()
    wnids = [line.split("\t")[0] for line in lines[1:]]
    for wnid in [*wnids, "n99999999"]:
        for part in ("train", "val"):
            write_jpeg(tmp_path / "imagenet" / part / wnid / "a.JPEG")
    data = load_dataset("imagenet200", tmp_path)
    assert (len(data.train), len(data.test)) == (200, 200)
    assert data.train.streamed
    assert len(set(data.classes)) == 200
    assert data.classes[0] == "stingray"
    assert data.train.x.paths[0].parent.name == wnids[0]
    shutil.rmtree(tmp_path / "imagenet" / "val" / wnids[3])
    refuses("imagenet200", tmp_path, f"val lacks 1 class folders: {wnids[3]}")


def test_streamed_views(tmp_path):
    """Test images are resized to 256 and cropped to 224; training crops are drawn per example and epoch."""
    ramp = np.zeros((300, 400, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, 400)[None], np.linspace(0, 255, 300)[:, None]
    for i in range(8):
        path = tmp_path / "ramps" / ("train" if i < 6 else "test") / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ramp).save(path)
    data = load_dataset("ramps", tmp_path)
    x = data.test.pixels(torch.arange(2), "cpu")
    assert x.shape == (2, 3, 224, 224)
    # The shortest side 300 becomes 256, so 400 becomes 341; the centre 224 of each are left.
    assert x[0, 1, 0].mean().item() == pytest.approx(16 / 256, abs=0.01)
    assert x[0, 0, :, 0].mean().item() == pytest.approx(58.5 / 341, abs=0.01)
    first, again, other = (next(training_batches(data.train, 6, 0, e, "full", "cpu"))[0] for e in (0, 0, 1))
    assert first.shape == (6, 3, 224, 224)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    x = next(training_batches(data.train, 6, 0, 2, "crop", "cpu"))[0]
    widths = [(image[0].amax() - image[0].amin()).item() for image in x]
    assert len({round(width, 3) for width in widths}) == 6, "each example has its own crop"
    assert 0.1 < min(widths) < max(widths) < 1.01
    split = load_dataset("ramps", tmp_path, workers=2).train
    for _ in range(2):  # the same workers serve both passes, of which the first ends early
        assert torch.equal(next(training_batches(split, 6, 0, 0, "full", "cpu"))[0], first)
    halves = [x for x, _, _ in training_batches(split, 3, 0, 0, "full", "cpu")]
    assert torch.equal(torch.cat(halves), first), "neither workers nor the batch size change anything"


def test_an_unreadable_streamed_image_is_named(tmp_path):
    write_images(tmp_path / "pets", side=80)
    (tmp_path / "pets" / "train" / "dog" / "1.png").write_bytes(b"\x89PNG not")
    data = load_dataset("pets", tmp_path, workers=1)
    for _ in range(2):  # after the error, new workers are started
        with pytest.raises(UserError, match="^[^\n]*dog/1.png is not an image [^\n]*: fix or delete it$"):
            list(plain_batches(data.train, torch.arange(12), 2, "cpu"))


def test_bad_image_folders(tmp_path):
    write_images(tmp_path / "pets")
    train, test = tmp_path / "pets" / "train", tmp_path / "pets" / "test"
    (train / "Cat").mkdir()
    refuses("pets", tmp_path, "holds the class folder 'Cat' twice, also as 'cat'")
    (train / "Cat").rmdir()
    (test / "emu").mkdir()
    refuses("pets", tmp_path, "test has class folders that .*train lacks: emu")
    (train / "emu").mkdir()
    refuses("pets", tmp_path, "emu holds no images")
    (train / "emu").rmdir()
    (test / "emu").rmdir()
    (train / "dog" / "2.png").write_bytes(b"no image")
    refuses("pets", tmp_path, "dog/2.png is not an image .*: fix or delete it$")
    (train / "dog" / "2.png").unlink()
    (tmp_path / "pets").rename(tmp_path / "svhn")
    refuses("svhn", tmp_path, "has 2 classes, not 10")
    write_images(tmp_path / "one", classes=("cat",))
    refuses("one", tmp_path, "has the class cat alone")
    (tmp_path / "none" / "train").mkdir(parents=True)
    refuses("none", tmp_path, "none lacks test/ or val/")


black = functools.partial(torch.zeros, dtype=torch.uint8)
GOOD = {"x": black(8, 3, 8, 8), "y": torch.arange(8) % 2}


@pytest.mark.parametrize("changes,message", [
    ({"test": {"x": black(8, 1, 8, 8)}}, "train has images (3, 8, 8) and test (1, 8, 8)"),
    ({"test": {"x": black(8, 3, 16, 16)}}, "train has images (3, 8, 8) and test (3, 16, 16)"),
    ({"train": {"x": black(8, 3, 0, 0)}}, "0 x 0 pixels; valid: 1 to 4 channels, 5 x 5 pixels or more"),
    ({"train": {"x": black(8, 3, 6, 8)}, "test": {"x": black(8, 3, 6, 8)}}, "small images must be square"),
    ({"train": {"x": torch.zeros(8, 3, 8, 8)}}, "train must hold x, uint8"),
    ({"test": {"x": None}}, "test must hold x, uint8"),
    ({"classes": ["a", "a"]}, "two or more different names"),
    ({"classes": "ab"}, "two or more different names"),
    ({"classes": ["a"], "train": {"y": torch.zeros(8, dtype=torch.int64)}}, "two or more different names"),
    ({"train": {"y": torch.arange(8) % 3}}, "labels outside 0..1"),
    ({"train": {"y": torch.arange(8) % 2 - 1}}, "labels outside 0..1"),
    ({"train": {"y": torch.zeros(8, dtype=torch.int64)}}, "1 of its 2 classes have no training image"),
    ({"folder": "0123"}, "is a copy of an image folder that an earlier version made: delete it"),
])
def test_bad_tensor_files(changes, message, tmp_path):
    good = {"train": GOOD, "test": GOOD, "classes": ["a", "b"]}
    parts = {part: {**GOOD, **changes.get(part, {})} for part in ("train", "test")}
    torch.save({**good, **changes, **parts}, tmp_path / "bad.pt")
    refuses("bad", tmp_path, re.escape(message))


def test_no_network_and_no_data(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    refuses("cifar10", tmp_path / "new", "no cifar10 under .* put cifar-10-batches-py/ .*, or cifar10.pt, "
                                         "or image folders cifar10/train")
    for _ in range(2):  # torchvision leaves an empty caltech256/, which is no image folder
        refuses("caltech256", tmp_path, "no caltech256 under .* put caltech256/256_ObjectCategories/")
    refuses("imagenet200", tmp_path, "imagenet200 lacks train/")
    refuses("mnist", tmp_path, "no data set 'mnist'")


def test_downloads_are_locked(tmp_path, monkeypatch):
    def read(root, download):
        if not download:
            raise RuntimeError("not there")
        with open(root / ".cifar10.lock") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return "the data"
    monkeypatch.setitem(datasets.READERS, "cifar10", (read, "files"))
    assert datasets.publisher("cifar10", tmp_path / "new") == "the data"


@pytest.mark.slow
def test_resnet50_through_every_stage(tmp_path, monkeypatch):
    """Two classes of photographs through rank, sat, evaluate and transfer, an epoch each, at 32 x 32."""
    for folder, n in (("pets/train", 4), ("pets/val", 10), ("other/train", 4), ("other/val", 10)):
        for c, colour in (("cat", (220, 40, 40)), ("dog", (40, 40, 220))):
            for i in range(n):
                shade = tuple(v + 3 * i for v in colour)
                write_jpeg(tmp_path / "data" / folder / c / f"{i}.jpg", shade)
    (tmp_path / "c.yaml").write_text(
        "arch: resnet50\naugment: full\neps: 3\nstep-size: 0.5\nsteps: 1\nepochs: 1\nbatch-size: 4\n"
        "lr: 0.001\nside: 32\nworkers: 0\neval-attacks: apgd-ce\nselect-attacks: apgd-ce\neval-n: 2\n")
    monkeypatch.chdir(tmp_path)

    def clean_alone(model, x, y, **settings):
        """In place of AutoAttack, which takes minutes on this network."""
        right = model(x).argmax(1) == y
        return right, right
    monkeypatch.setattr(attacks, "attack_batch", clean_alone)
    flags = ["--config", "c.yaml", "--dataset"]
    # By svar, because after two steps all entropies are 0.
    sat.main([*flags, "pets", "--split", "esat", "--metric", "svar", "--run", "a"])
    evaluate.main(["results/pets/a/best.pt"])
    transfer.main(["results/pets/a/best.pt", *flags, "other"])
    files = ("pets/a/result.json", "pets/a/eval-*.json", "other/*/result.json")
    result, again, target = (json.loads(next(Path("results").glob(f)).read_text()) for f in files)
    assert result["accuracy"] == again["accuracy"]
    assert (result["A"], result["cost"]["attacked"]) == (4, 4)
    assert target["source"]["run"] == "a"
    with pytest.raises(UserError, match="vog"):
        rank.main([*flags, "pets", "--metrics", "vog", "--results", "other"])
