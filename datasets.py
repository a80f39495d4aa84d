"""Finds and reads the data sets, each as (train, test, classes), where train and test are (images, labels).

Images are one uint8 tensor (N, C, H, W), or a list of paths if they are streamed. Labels are int64 (N,). The
digits are part of the repository. Any other data set is looked for under --data-dir as <name>.pt, then as an
image folder <name>/train/<class>/* with <name>/test or <name>/val, then as the files that torchvision reads,
and else is downloaded by torchvision; cifar10-small is made of the whole cifar10. Format of <name>.pt:
{"train": {"x": uint8 (N, C, H, W), "y": int64 (N,)}, "test": {...}, "classes": [str]}. Paper: Table 1.
"""
import contextlib
import fcntl
import hashlib

import numpy as np
import torch
from torch.nn import functional as F

from common import HERE, UserError, progress, say
from runs import load, save

DIGITS = {"digits": (0, 9), "digits0-4": (0, 4), "digits5-9": (5, 9)}  # first and last class
# {name: (the whole data set, training images of each class, test images of each class)}
SMALLER = {"cifar10-small": ("cifar10", 500, 100)}
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
SMALL = 64  # a folder of equal images of at most this side is kept in memory; any other is streamed
TABLE_1 = {  # classes, training images, test images
    "cifar10": (10, 50000, 10000), "cifar100": (100, 50000, 10000), "imagenet200": (200, 259906, 10000),
    "caltech256": (257, 24485, 6122), "flowers102": (102, 1020, 1020), "svhn": (10, 73257, 26032),
}
FILES = {"cifar10": "cifar-10-batches-py/ (of cifar-10-python.tar.gz)",
         "cifar100": "cifar-100-python/ (of cifar-100-python.tar.gz)",
         "svhn": "train_32x32.mat and test_32x32.mat",
         "flowers102": "flowers-102/ with jpg/, imagelabels.mat and setid.mat",
         "caltech256": "caltech256/256_ObjectCategories/",
         "imagenet200": "imagenet200/ (or imagenet/) with train/<wnid>/ and val/<wnid>/"}


def open_image(path):
    """The image in a file (PIL), converted to RGB. UserError for a file that cannot be read."""
    from PIL import Image
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as e:
        raise UserError(f"{path} is not an image that can be read ({' '.join(str(e).split())[:80]}): mend or "
                        "delete it; python data.py NAME --data-dir DIR finds all of them") from None


def digits(name):
    """The 8x8 digits in the repository: all of them, or only the classes 0-4 or 5-9 (relabelled from 0)."""
    low, high = DIGITS[name]
    with np.load(HERE / "data" / "digits.npz", allow_pickle=False) as f:
        parts = [(torch.from_numpy(f[f"{s}_x"])[:, None], torch.from_numpy(f[f"{s}_y"]))
                 for s in ("train", "test")]
    kept = [(x[(y >= low) & (y <= high)], y[(y >= low) & (y <= high)] - low) for x, y in parts]
    return *kept, [str(c) for c in range(low, high + 1)]


def smaller(name, root):
    """A part of a data set that is small enough for a CPU: from each class the images with the lowest SHA-256
    of their pixels, in that order, so that the part does not depend on the order of the publisher's files."""
    whole, *sizes = SMALLER[name]
    *splits, classes = find(whole, root)
    parts = []
    for (x, y), size in zip(splits, sizes):
        hashes = [hashlib.sha256(image.numpy().tobytes()).digest() for image in x]
        order = torch.tensor(sorted(range(len(y)), key=hashes.__getitem__))
        # The place of each image within its class: 1 for the first.
        place = F.one_hot(y[order], len(classes)).cumsum(0).gather(1, y[order][:, None]).squeeze(1)
        kept = order[place <= size]
        parts.append((x[kept], y[kept]))
    return *parts, classes


def packed(path):
    """The data set in a <name>.pt. UserError for a file that has another format."""
    found = load(path, ("train", "test", "classes"))
    parts, classes = [], found["classes"]
    if not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)
            and len(set(classes)) == len(classes) > 1):
        raise UserError(f"{path}: classes must be a list of two or more different names")
    for s in ("train", "test"):
        x, y = (found[s].get(k) if isinstance(found[s], dict) else None for k in "xy")
        if not (isinstance(x, torch.Tensor) and x.dtype == torch.uint8 and x.dim() == 4
                and isinstance(y, torch.Tensor) and y.dtype == torch.int64 and y.shape == x.shape[:1]
                and len(y)):
            raise UserError(f"{path}: {s} must hold x, uint8 (N, C, H, W), and y, int64 (N,)")
        if not 1 <= x.shape[1] <= 4 or x.shape[2] < 5:
            raise UserError(f"{path}: {s} has images of {x.shape[1]} channels and {x.shape[2]} x "
                            f"{x.shape[3]} pixels; valid: 1 to 4 channels, "
                            "5 x 5 pixels or more (AutoAttack's Square)")
        if y.min() < 0 or y.max() >= len(classes):
            raise UserError(f"{path}: {s} has labels outside 0..{len(classes) - 1}, its classes")
        if len(y.unique()) < len(classes) and s == "train":
            raise UserError(f"{path}: {len(classes) - len(y.unique())} of its {len(classes)} classes "
                            "have no training image")
        parts.append((x, y))
    if parts[0][0].shape[1:] != parts[1][0].shape[1:]:
        raise UserError(f"{path}: train has images {tuple(parts[0][0].shape[1:])} and test "
                        f"{tuple(parts[1][0].shape[1:])}; they must agree")
    return *parts, classes


def class_files(folder, classes):
    """([path], labels) of <folder>/<class>/*, ordered as `classes`, and within a class by file name."""
    files = []
    for label, c in enumerate(classes):
        inside = sorted(p for p in (folder / c).iterdir() if p.suffix.lower() in IMAGES)
        if not inside:
            raise UserError(f"{folder / c} holds no images ({', '.join(IMAGES)}): fill it, or remove the "
                            "class in train/ and test/")
        files += [(path, label) for path in inside]
    return [path for path, _ in files], torch.tensor([label for _, label in files])


def in_memory(paths):
    """The images of `paths`, all of one size, as a uint8 tensor (N, 3, H, W)."""
    bar = progress(paths, desc=f"reading {paths[0].parent.parent}", unit="image")
    images = [np.asarray(open_image(p)) for p in bar]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def class_folders(folder):
    """The sorted names of the class folders in `folder`, or None if it does not exist. UserError for two
    names that differ only in case or spaces."""
    if not folder.is_dir():
        return None
    names = sorted(d.name for d in folder.iterdir() if d.is_dir())
    seen = {}
    for n in names:
        if (twin := seen.setdefault("".join(n.casefold().split()), n)) != n:
            raise UserError(f"{folder} holds the class folder {twin!r} twice, also as {n!r}: merge them")
    return names


def image_folder(root, wanted=None, titles=None):
    """The data set in <root>/train/<class>/* and <root>/test/<class>/* (or val/). `wanted`: read only these
    class folders. `titles`: names of the classes, if they are not the names of the folders."""
    parts = [root / "train", root / "test" if (root / "test").is_dir() else root / "val"]
    names = [class_folders(part) for part in parts]
    for part, found in zip(parts, names):
        if found is None:
            raise UserError(f"{root} lacks {'train/' if part == parts[0] else 'test/ or val/'}: an image "
                            f"folder is {root.name}/train/<class>/* and {root.name}/test/<class>/* (or val/)")
        missing = sorted(set(wanted or names[0]) - set(found))
        if not found:
            raise UserError(f"{part} has no class folders: put images into {part}/<class>/")
        if missing:
            raise UserError(f"{part} lacks {len(missing)} class folders: {', '.join(missing[:10])}")
    if not wanted and names[0] != names[1]:
        raise UserError(f"{parts[1]} has class folders that {parts[0]} lacks: "
                        f"{', '.join(sorted(set(names[1]) - set(names[0]))[:10])}")
    classes = wanted or names[0]
    if len(classes) < 2:
        raise UserError(f"{parts[0]} has the class {classes[0]} alone: two or more are needed")
    (train, y), (test, y_test) = (class_files(part, classes) for part in parts)
    side = open_image(train[0]).size
    if max(side) <= SMALL and all(open_image(path).size == side for path in [*train, *test]):
        train, test = in_memory(train), in_memory(test)
    return (train, y), (test, y_test), titles or classes


def listing(folder):
    """A hash of the names and sizes of the images in a folder, which tells whether it has changed since its
    <name>.pt was written."""
    files = sorted((p.relative_to(folder).as_posix(), p.stat().st_size) for p in folder.rglob("*")
                   if p.suffix.lower() in IMAGES)
    return hashlib.sha256(repr(files).encode()).hexdigest()


def svhn(root, download):
    """SVHN from its publisher's .mat files, read by torchvision. The digit 0 is class 0."""
    from torchvision.datasets import SVHN
    parts = []
    for s in ("train", "test"):
        d = SVHN(root, split=s, download=download)
        if d.data.dtype != np.uint8 or d.data.shape[1:] != (3, 32, 32) or d.labels.shape != d.data.shape[:1]:
            raise UserError(f"{root / d.filename} is not SVHN's cropped digits: X {d.data.shape} "
                            f"{d.data.dtype}, y {d.labels.shape}")
        parts.append((torch.from_numpy(np.ascontiguousarray(d.data)),
                      torch.from_numpy(np.asarray(d.labels, dtype=np.int64))))
    return *parts, [str(c) for c in range(10)]


def cifar(name, root, download):
    """CIFAR-10 or CIFAR-100, read by torchvision."""
    from torchvision import datasets
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    both = [kind(root, train=train, download=download) for train in (True, False)]
    parts = [(torch.from_numpy(d.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(d.targets))
             for d in both]
    return *parts, list(both[0].classes)


def flowers102(root, download):
    """Oxford Flowers-102. Its splits train and valid (1,020 images each) are the paper's train and test."""
    from torchvision.datasets import Flowers102
    both = [Flowers102(root, split=s, download=download) for s in ("train", "val")]
    parts = [(list(d._image_files), torch.tensor(d._labels)) for d in both]
    for files, y in parts:
        if not all(0 <= label < 102 for label in y.tolist()):
            raise UserError(f"{root}/flowers-102/imagelabels.mat has labels outside 1..102")
    return *parts, list(getattr(both[0], "classes", [f"flower {c}" for c in range(1, 103)]))


def caltech256(root, download):
    """Caltech-256, split by a fixed permutation into 80 % train and 20 % test. The counts are the paper's,
    which does not publish its split."""
    from torchvision.datasets import Caltech256
    Caltech256(root, download=download)  # only finds or downloads the files, which are listed below
    folder = root / "caltech256" / "256_ObjectCategories"
    classes = class_folders(folder)
    files, y = class_files(folder, classes)
    order, cut = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)), int(0.8 * len(y))
    indices = (order[:cut].sort().values, order[cut:].sort().values)
    parts = [([files[i] for i in index.tolist()], y[index]) for index in indices]
    return *parts, [c.split(".", 1)[-1] for c in classes]


def imagenet200(root):
    """The 200 classes of ImageNet-A, picked by their wnids from the folders of ImageNet."""
    lines = (HERE / "configs" / "imagenet200_wnids.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    folder = next((root / n for n in ("imagenet200", "imagenet") if (root / n / "train").is_dir()),
                  root / "imagenet200")
    return image_folder(folder, [row[0] for row in rows], [row[2] for row in rows])


def publisher(name, root):
    """A data set of the paper from its publisher's files, which torchvision downloads if they are missing."""
    if name == "imagenet200":
        return imagenet200(root)
    readers = {"svhn": svhn, "flowers102": flowers102, "caltech256": caltech256}
    read = readers.get(name, lambda *how: cifar(name, *how))
    try:
        try:
            return read(root, False)
        except RuntimeError:  # torchvision's error for files that are missing or have a wrong checksum
            root.mkdir(parents=True, exist_ok=True)
            with open(root / f".{name}.lock", "w") as lock:  # copies of run_all.sh start at the same time
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(lock, fcntl.LOCK_EX)
                say(f"downloading {name} to {root}")
                return read(root, True)
    except UserError:  # which is a ValueError too
        raise
    except (OSError, RuntimeError, KeyError, ValueError) as e:
        raise UserError(f"no {name} under {root} and no download ({' '.join(str(e).split())[:80]}): put "
                        f"{FILES[name]}, or {name}.pt, or image folders {name}/train/<class>/ and "
                        f"{name}/test/<class>/ there, or name their folder with --data-dir") from None


def find(name, root):
    """(train, test, classes) of the data set `name` under the folder `root`. Images that are kept in memory
    are saved as <name>.pt, which is read faster next time."""
    path, folder = root / f"{name}.pt", root / name
    if name in DIGITS:
        return digits(name)
    # The paper's sets need train/: without it, the folder may be one that torchvision reads.
    needed = folder / "train" if name in TABLE_1 else folder
    has_folder = name != "imagenet200" and needed.is_dir()
    listed = listing(folder) if has_folder else ""
    stale = path.exists() and has_folder and load(path, ("classes",)).get("folder", listed) != listed
    if stale:
        say(f"{folder} has changed since {path} was made of it: reading it again")
    if path.exists() and not stale:
        found = packed(path)
    elif has_folder:
        found = image_folder(folder)
    elif name in SMALLER:
        found = smaller(name, root)
    elif name in TABLE_1:
        found = publisher(name, root)
    else:
        raise UserError(f"no data set {name!r}: {root} has neither {name}.pt nor {name}/train and "
                        f"{name}/test; known by name: {', '.join([*DIGITS, *TABLE_1, *SMALLER])}")
    (x, y), (x_test, y_test), classes = found
    if name in TABLE_1:
        n_classes, *counts = TABLE_1[name]
        if len(classes) != n_classes:
            raise UserError(f"{name} under {root} has {len(classes)} classes, not {n_classes}: "
                            "give other data another name")
        if [len(y), len(y_test)] != counts:
            say(f"warning: {name} here has {len(y):,} / {len(y_test):,} images, the paper's (Table 1) "
                f"{counts[0]:,} / {counts[1]:,}")
    if isinstance(x, torch.Tensor) and x.shape[2] != x.shape[3]:
        raise UserError(f"{name} under {root} has images of {x.shape[2]} x {x.shape[3]} pixels: "
                        "small images must be square")
    if (stale or not path.exists()) and isinstance(x, torch.Tensor):
        try:
            kept = {"train": {"x": x, "y": y}, "test": {"x": x_test, "y": y_test}, "classes": classes}
            save(path, {**kept, "folder": listed} if has_folder else kept)
            say(f"wrote {path}, which is read from now on")
        except UserError as e:
            say(f"warning: {e}; the images will be read one by one again next time")
    return found
