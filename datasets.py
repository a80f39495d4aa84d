"""Reads the data sets (paper, Table 1) as (train, test, classes), where train and test are (images, labels).

Images are a uint8 tensor (N, C, H, W), or a list of paths if they are streamed. Labels are int64 (N,). The
digits are part of the repository. Every other data set is looked for under --data-dir, in this order:

1. <name>.pt: {"train": {"x": uint8 (N, C, H, W), "y": int64 (N,)}, "test": {...}, "classes": [str]}
2. an image folder: <name>/train/<class>/* and <name>/test/<class>/* (or <name>/val/<class>/*)
3. the publisher's files, which torchvision reads or downloads; small images are then saved as <name>.pt
"""
import contextlib
import fcntl
import functools

import numpy as np
import torch

from common import HERE, UserError, say
from image_files import class_files, class_folders, image_folder
from runs import load, save

DIGITS = {"digits": (0, 9), "digits0-4": (0, 4), "digits5-9": (5, 9)}  # first and last class
TABLE_1 = {  # classes, training images, test images
    "cifar10": (10, 50000, 10000), "cifar100": (100, 50000, 10000), "imagenet200": (200, 259906, 10000),
    "caltech256": (257, 24485, 6122), "flowers102": (102, 1020, 1020), "svhn": (10, 73257, 26032)}


def read_dataset(name, root):
    """(train, test, classes) of the data set `name` under the folder `root`. UserError if it is not there or
    cannot be used. A publisher's small images are saved as <name>.pt."""
    path, folder = root / f"{name}.pt", root / name
    # The paper's sets need train/: torchvision has a folder caltech256/ as well.
    is_image_folder = (folder / "train" if name in TABLE_1 else folder).is_dir() and name != "imagenet200"
    if name in DIGITS:
        if path.exists() or folder.exists():
            raise UserError(f"{name} is built in, and {root} has a data set of this name: rename that one")
        return digits(name)
    if path.exists():
        train, test, classes = tensor_file(path)
    elif is_image_folder:
        train, test, classes = image_folder(folder)
    else:
        train, test, classes = publisher(name, root)
    check_dataset(name, root, train, test, classes)
    if isinstance(train[0], torch.Tensor) and not path.exists() and not is_image_folder:
        parts = {part: {"x": x, "y": y} for part, (x, y) in (("train", train), ("test", test))}
        try:
            save(path, {**parts, "classes": classes})
            say(f"wrote {path}, which is read from now on")
        except UserError as e:
            say(f"warning: {e}; the publisher's files will be read again next time")
    return train, test, classes


def check_dataset(name, root, train, test, classes):
    """UserError if a data set cannot be used. Warns if one of Table 1 has another number of images."""
    title = f"{name} under {root}"
    for part, (x, y) in (("train", train), ("test", test)):
        if len(x) != len(y) or y.min() < 0 or y.max() >= len(classes):
            raise UserError(f"{title}: {part} has {len(x)} images and {len(y)} labels, from {y.min()} to "
                            f"{y.max()}; valid: a label for each, in 0..{len(classes) - 1}")
        if isinstance(x, torch.Tensor) and not (x.shape[1] in (1, 2, 3, 4) and 5 <= x.shape[2] == x.shape[3]
                                                and x.shape[1:] == train[0].shape[1:]):
            raise UserError(f"{title}: {part} has images {tuple(x.shape[1:])}; valid: 1 to 4 channels, "
                            "square, 5 pixels or more (AutoAttack's Square), test as train")
    if missing := len(classes) - len(train[1].unique()):
        raise UserError(f"{title}: {missing} of its {len(classes)} classes have no training image")
    for part, (x, _) in (("train", train), ("test", test)):
        if isinstance(x, torch.Tensor) and x.max() <= 1:
            raise UserError(f"{title}: no pixel of {part} is above 1; valid: 0 to 255. Multiply floats in "
                            "[0, 1] by 255 before they become uint8")
    if name in TABLE_1:
        n_classes, n_train, n_test = TABLE_1[name]
        if len(classes) != n_classes:
            raise UserError(f"{title} has {len(classes)} classes, not {n_classes}: give it another name")
        if (len(train[1]), len(test[1])) != (n_train, n_test):
            say(f"warning: {name} has {len(train[1]):,} / {len(test[1]):,} images here, and {n_train:,} / "
                f"{n_test:,} in the paper (Table 1)")


def digits(name):
    """The 8x8 digits in the repository: all of them, or only the classes 0-4 or 5-9 (relabelled from 0)."""
    (low, high), parts = DIGITS[name], []
    with np.load(HERE / "data" / "digits.npz", allow_pickle=False) as arrays:
        for part in ("train", "test"):
            x, y = torch.from_numpy(arrays[f"{part}_x"])[:, None], torch.from_numpy(arrays[f"{part}_y"])
            chosen = (y >= low) & (y <= high)
            parts.append((x[chosen], y[chosen] - low))
    return *parts, [str(c) for c in range(low, high + 1)]


def tensor_file(path):
    """The data set in a <name>.pt. UserError for a file that has another format."""
    content, parts = load(path, ("train", "test", "classes")), []
    classes = content["classes"]
    if not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)
            and len(set(classes)) == len(classes) > 1):
        raise UserError(f"{path}: classes must be a list of two or more different names")
    for part in ("train", "test"):
        x, y = (content[part].get(key) if isinstance(content[part], dict) else None for key in "xy")
        if not (isinstance(x, torch.Tensor) and x.dtype == torch.uint8 and x.dim() == 4
                and isinstance(y, torch.Tensor) and y.dtype == torch.int64 and y.dim() == 1 and len(y)):
            raise UserError(f"{path}: {part} must hold x, uint8 (N, C, H, W), and y, int64 (N,)")
        parts.append((x, y))
    return *parts, classes


def publisher(name, root):
    """A data set of the paper from its publisher's files, which torchvision downloads if they are missing."""
    if name not in TABLE_1:
        raise UserError(f"no data set {name!r}: {root} has neither {name}.pt nor {name}/train and "
                        f"{name}/test; built in are {', '.join([*DIGITS, *TABLE_1])}")
    if name == "imagenet200":
        return imagenet200(root)
    read, files = READERS[name]
    try:
        with contextlib.suppress(RuntimeError):  # torchvision's, for files that are missing or damaged
            return read(root, download=False)
        root.mkdir(parents=True, exist_ok=True)
        with open(root / f".{name}.lock", "w") as lock:  # run_all.sh starts several processes at once
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            say(f"downloading {name} to {root}")
            return read(root, download=True)
    except UserError:  # which is a ValueError too
        raise
    except (OSError, RuntimeError, KeyError, ValueError) as e:
        raise UserError(f"no {name} under {root} and no download ({' '.join(str(e).split())[:200]}): put "
                        f"{files}, or {name}.pt, or image folders {name}/train/<class>/ and "
                        f"{name}/test/<class>/ there, or name their folder with --data-dir") from None


def cifar(name, root, download):
    """CIFAR-10 or CIFAR-100, read by torchvision."""
    import torchvision
    reader = getattr(torchvision.datasets, name)
    sets = [reader(root, train=is_train, download=download) for is_train in (True, False)]
    parts = [(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets))
             for s in sets]
    return *parts, list(sets[0].classes)


def svhn(root, download):
    """SVHN, read by torchvision. The digit 0 is class 0."""
    from torchvision.datasets import SVHN
    sets = [SVHN(root, split=part, download=download) for part in ("train", "test")]
    parts = [(torch.from_numpy(s.data).contiguous(), torch.from_numpy(s.labels)) for s in sets]
    return *parts, [str(c) for c in range(10)]


def flowers102(root, download):
    """Oxford Flowers-102. Its splits train and valid (1,020 images each) are the paper's train and test."""
    from torchvision.datasets import Flowers102
    sets = [Flowers102(root, split=part, download=download) for part in ("train", "val")]
    parts = [(list(s._image_files), torch.tensor(s._labels)) for s in sets]
    return *parts, list(sets[0].classes)


def caltech256(root, download):
    """Caltech-256, split by a fixed permutation into 80 % train and 20 % test, as many as in the paper."""
    from torchvision.datasets import Caltech256
    Caltech256(root, download=download)  # only to find or download the files
    folder = root / "caltech256" / "256_ObjectCategories"
    classes = class_folders(folder)
    paths, y = class_files(folder, classes)
    order, n_train = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)), int(0.8 * len(y))
    train, test = order[:n_train].sort().values, order[n_train:].sort().values
    parts = [([paths[i] for i in index.tolist()], y[index]) for index in (train, test)]
    return *parts, [c.split(".", 1)[-1] for c in classes]


def imagenet200(root):
    """The 200 classes of ImageNet-A, picked by their wnids from the folders of ImageNet."""
    lines = (HERE / "configs" / "imagenet200_wnids.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    folder = root / "imagenet200" if (root / "imagenet200").is_dir() else root / "imagenet"
    train, test, _ = image_folder(folder, [row[0] for row in rows])
    return train, test, [row[2] for row in rows]


READERS = {  # each with the files that it reads
    "cifar10": (functools.partial(cifar, "CIFAR10"), "cifar-10-batches-py/ (of cifar-10-python.tar.gz)"),
    "cifar100": (functools.partial(cifar, "CIFAR100"), "cifar-100-python/ (of cifar-100-python.tar.gz)"),
    "svhn": (svhn, "train_32x32.mat and test_32x32.mat"),
    "flowers102": (flowers102, "flowers-102/ with jpg/, imagelabels.mat and setid.mat"),
    "caltech256": (caltech256, "caltech256/256_ObjectCategories/")}
