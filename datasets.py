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
    has_folder = (folder / "train" if name in TABLE_1 else folder).is_dir() and name != "imagenet200"
    if name in DIGITS:
        return digits(name)
    if path.exists():
        train, test, classes = tensor_file(path)
    elif has_folder:
        train, test, classes = image_folder(folder)
    else:
        train, test, classes = publisher(name, root)
    check(name, root, train, test, classes)
    if isinstance(train[0], torch.Tensor) and not path.exists() and not has_folder:
        parts = {"train": train, "test": test}
        try:
            save(path, {**{part: {"x": x, "y": y} for part, (x, y) in parts.items()}, "classes": classes})
            say(f"wrote {path}, which is read from now on")
        except UserError as e:
            say(f"warning: {e}; the publisher's files will be read again next time")
    return train, test, classes


def check(name, root, train, test, classes):
    """UserError if labels or images are not as promised, if small images are not square, or if a set of Table
    1 has another number of classes. Warns if such a set has another number of images."""
    x, y = train
    for images, labels in (train, test):
        in_memory = isinstance(images, torch.Tensor)
        if len(images) != len(labels) or in_memory and (images.dtype != torch.uint8 or images.dim() != 4) \
                or not 0 <= labels.min() <= labels.max() < len(classes):
            raise UserError(f"{name} under {root} is damaged: {len(images)} images, {len(labels)} labels "
                            f"from {labels.min()} to {labels.max()} of {len(classes)} classes")
    if isinstance(x, torch.Tensor) and x.shape[2] != x.shape[3]:
        raise UserError(f"{name} under {root} has images of {x.shape[2]} x {x.shape[3]} pixels: "
                        "small images must be square")
    if name in TABLE_1:
        n_classes, n_train, n_test = TABLE_1[name]
        if len(classes) != n_classes:
            raise UserError(f"{name} under {root} has {len(classes)} classes, not {n_classes}: "
                            "give other data another name")
        if (len(y), len(test[1])) != (n_train, n_test):
            say(f"warning: {name} here has {len(y):,} / {len(test[1]):,} images, the paper's (Table 1) "
                f"{n_train:,} / {n_test:,}")


def digits(name):
    """The 8x8 digits in the repository: all of them, or only the classes 0-4 or 5-9 (relabelled from 0)."""
    low, high = DIGITS[name]
    parts = []
    with np.load(HERE / "data" / "digits.npz", allow_pickle=False) as arrays:
        for part in ("train", "test"):
            x, y = torch.from_numpy(arrays[f"{part}_x"])[:, None], torch.from_numpy(arrays[f"{part}_y"])
            chosen = (y >= low) & (y <= high)
            parts.append((x[chosen], y[chosen] - low))
    return *parts, [str(c) for c in range(low, high + 1)]


def tensor_file(path):
    """The data set in a <name>.pt. UserError for a file that has another format."""
    content = load(path, ("train", "test", "classes"))
    if "folder" in content:
        raise UserError(f"{path} is a copy of an image folder that an earlier version made: delete it; the "
                        "folder itself is read now")
    classes = content["classes"]
    if not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)
            and len(set(classes)) == len(classes) > 1):
        raise UserError(f"{path}: classes must be a list of two or more different names")
    train, test = (tensor_part(path, part, content[part], len(classes)) for part in ("train", "test"))
    if missing := len(classes) - len(train[1].unique()):
        raise UserError(f"{path}: {missing} of its {len(classes)} classes have no training image")
    shape, test_shape = tuple(train[0].shape[1:]), tuple(test[0].shape[1:])
    if shape != test_shape:
        raise UserError(f"{path}: train has images {shape} and test {test_shape}; they must agree")
    return train, test, classes


def tensor_part(path, part, content, n_classes):
    """(x, y) of `content`, which is the "train" or "test" of a <name>.pt. UserError if it cannot be used."""
    x, y = (content.get(key) if isinstance(content, dict) else None for key in "xy")
    if not (isinstance(x, torch.Tensor) and x.dtype == torch.uint8 and x.dim() == 4
            and isinstance(y, torch.Tensor) and y.dtype == torch.int64 and y.shape == x.shape[:1] and len(y)):
        raise UserError(f"{path}: {part} must hold x, uint8 (N, C, H, W), and y, int64 (N,)")
    if not 1 <= x.shape[1] <= 4 or x.shape[2] < 5:
        raise UserError(f"{path}: {part} has images of {x.shape[1]} channels and {x.shape[2]} x {x.shape[3]} "
                        "pixels; valid: 1 to 4 channels, 5 x 5 pixels or more (AutoAttack's Square)")
    if y.min() < 0 or y.max() >= n_classes:
        raise UserError(f"{path}: {part} has labels outside 0..{n_classes - 1}, its classes")
    return x, y


def publisher(name, root):
    """A data set of the paper from its publisher's files, which torchvision downloads if they are missing."""
    if name not in TABLE_1:
        raise UserError(f"no data set {name!r}: {root} has neither {name}.pt nor {name}/train and "
                        f"{name}/test; built in are {', '.join([*DIGITS, *TABLE_1])}")
    if name == "imagenet200":
        return imagenet200(root)
    read, files = READERS[name]
    try:
        try:
            return read(root, download=False)
        except RuntimeError:  # torchvision's error for files that are missing or have a wrong checksum
            root.mkdir(parents=True, exist_ok=True)
            with open(root / f".{name}.lock", "w") as lock:  # run_all.sh starts several processes at once
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(lock, fcntl.LOCK_EX)
                say(f"downloading {name} to {root}")
                return read(root, download=True)
    except UserError:  # which is a ValueError too
        raise
    except (OSError, RuntimeError, KeyError, ValueError) as e:
        raise UserError(f"no {name} under {root} and no download ({' '.join(str(e).split())[:80]}): put "
                        f"{files}, or {name}.pt, or image folders {name}/train/<class>/ and "
                        f"{name}/test/<class>/ there, or name their folder with --data-dir") from None


def cifar(name, root, download):
    """CIFAR-10 or CIFAR-100, read by torchvision."""
    import torchvision
    reader = getattr(torchvision.datasets, name)
    sets = [reader(root, train=train, download=download) for train in (True, False)]
    parts = [(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets))
             for s in sets]
    return *parts, list(sets[0].classes)


def svhn(root, download):
    """SVHN, read by torchvision. The digit 0 is class 0."""
    from torchvision.datasets import SVHN
    sets = [SVHN(root, split=part, download=download) for part in ("train", "test")]
    parts = [(torch.from_numpy(np.ascontiguousarray(s.data)), torch.from_numpy(s.labels)) for s in sets]
    return *parts, [str(c) for c in range(10)]


def flowers102(root, download):
    """Oxford Flowers-102. Its splits train and valid (1,020 images each) are the paper's train and test."""
    from torchvision.datasets import Flowers102
    sets = [Flowers102(root, split=part, download=download) for part in ("train", "val")]
    parts = [(list(s._image_files), torch.tensor(s._labels)) for s in sets]
    return *parts, list(getattr(sets[0], "classes", [f"flower {c}" for c in range(1, 103)]))


def caltech256(root, download):
    """Caltech-256, split by a fixed permutation into 80 % train and 20 % test. The counts are the paper's,
    which does not publish its split."""
    from torchvision.datasets import Caltech256
    Caltech256(root, download=download)  # only finds or downloads the files, which are listed below
    folder = root / "caltech256" / "256_ObjectCategories"
    classes = class_folders(folder)
    paths, y = class_files(folder, classes)
    order, n_train = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)), int(0.8 * len(y))
    indices = (order[:n_train].sort().values, order[n_train:].sort().values)
    parts = [([paths[i] for i in index.tolist()], y[index]) for index in indices]
    return *parts, [c.split(".", 1)[-1] for c in classes]


def imagenet200(root):
    """The 200 classes of ImageNet-A, picked by their wnids from the folders of ImageNet."""
    lines = (HERE / "configs" / "imagenet200_wnids.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    folder = root / "imagenet200"
    if not (folder / "train").is_dir() and (root / "imagenet" / "train").is_dir():
        folder = root / "imagenet"
    train, test, _ = image_folder(folder, [row[0] for row in rows])
    return train, test, [row[2] for row in rows]


READERS = {  # each with the files that it reads
    "cifar10": (functools.partial(cifar, "CIFAR10"), "cifar-10-batches-py/ (of cifar-10-python.tar.gz)"),
    "cifar100": (functools.partial(cifar, "CIFAR100"), "cifar-100-python/ (of cifar-100-python.tar.gz)"),
    "svhn": (svhn, "train_32x32.mat and test_32x32.mat"),
    "flowers102": (flowers102, "flowers-102/ with jpg/, imagelabels.mat and setid.mat"),
    "caltech256": (caltech256, "caltech256/256_ObjectCategories/")}
