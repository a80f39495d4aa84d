"""Reads images on disk: image folders, and the files of streamed data sets."""
import contextlib
import hashlib
import os
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common import UserError, progress, say

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
HIDDEN = ("@eaDir", "#recycle", "__MACOSX", "lost+found")  # of file servers, archives and disks; also .<name>
SMALL = 64  # the largest side of small images, in pixels


def open_image(path):
    """The image in a file as 8-bit RGB (PIL), turned as its EXIF data say, on white where it is transparent.
    UserError for a file that cannot be read."""
    from PIL import Image
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(image)
    except Exception as e:  # PIL raises many kinds for damaged files
        if isinstance(e, OSError) and e.errno:  # the file system's
            raise cannot_read(path, e) from None
        reason = " ".join(str(e).split())[:80] or type(e).__name__
        raise UserError(f"{path} is not an image that can be read ({reason}): fix or delete it") from None


def to_rgb(image):
    """See open_image. ValueError for more than 16 bits a channel. (torchvision's readers ignore EXIF data; of
    the paper's data sets, this concerns a few photographs of ImageNet.)"""
    from PIL import Image, ImageOps
    with contextlib.suppress(Exception):  # damaged EXIF data
        ImageOps.exif_transpose(image, in_place=True)
    # Grey of 16 bits, which PIL would clip at 255. Older versions open it in mode I, from PNG.
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("it has 32 bits per pixel; valid: 8 or 16")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def cannot_read(path, error):
    """The UserError for a file that the file system does not give."""
    return UserError(f"cannot read {path}: {error.strerror}. When this is fixed, the same command goes on")


def unicode_name(name):
    """A file's name in Unicode's form NFC: macOS writes "é" as two characters, Linux as one."""
    return unicodedata.normalize("NFC", name)


def visible(folder, ignored):
    """The sorted [(name, os.DirEntry)] of a folder. Hidden entries are put on ignored["hidden"],
    a list of paths."""
    rows = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = unicode_name(entry.name)
            if name.startswith(".") or name in HIDDEN:
                ignored["hidden"].append(entry.path)
            else:
                rows.append((name, entry))
    return sorted(rows, key=lambda row: (row[0], row[1].name))


def class_folders(folder, ignored):
    """The class folders in `folder`, sorted: {name: path}. Other entries are put on ignored["other"]."""
    folders = {}
    for name, entry in visible(folder, ignored):
        if not entry.is_dir():
            ignored["other"].append(entry.path)
        elif name != name.encode(errors="replace").decode():
            raise UserError(f"{folder} has a class folder whose name is not UTF-8, {name!r}: rename it")
        elif name in folders:
            raise UserError(f"{folder} has two class folders {name!r}, in two forms of Unicode (NFC, NFD): "
                            "move their images into one")
        else:
            folders[name] = Path(entry.path)
    return folders


def class_files(folder, folders, classes, ignored):
    """([path], labels) of the images in the class folders {name: path} of `folder`, ordered as `classes`, and
    within a class by file name. Other entries are put on ignored["other"]."""
    paths, labels = [], []
    for label, name in enumerate(classes):
        images = []
        for _, entry in visible(folders[name], ignored) if name in folders else ():
            is_image = Path(entry.name).suffix.lower() in SUFFIXES and not entry.is_dir()
            (images if is_image else ignored["other"]).append(entry.path)
        if not images:
            raise UserError(f"there are no images ({', '.join(SUFFIXES)}) in {folder / name}")
        paths += map(Path, images)
        labels += [label] * len(images)
    return paths, torch.tensor(labels)


def note_ignored(root, ignored):
    """Notes how many entries under `root` were left out, with an example."""
    suffixes = ", ".join(SUFFIXES)
    descriptions = {"hidden": "hidden files and folders",
                    "other": f"entries that are not images ({suffixes}) in a class folder"}
    for reason, description in descriptions.items():
        if ignored[reason]:
            say(f"note: {description} are ignored: {len(ignored[reason]):,} under {root}, for example "
                f"{os.path.relpath(min(ignored[reason]), root)!r}")


def image_folder(root, classes=None, side=None):
    """(train, test, classes) of the image folder `root`, where train and test are (images, labels). Images
    that small_images() does not read are paths. `classes`: the class folders to read, by default all. `side`:
    that of streamed images, if the user gave one."""
    train_folder, ignored = root / "train", {"hidden": [], "other": []}
    if not (train_folder.is_dir() and ((root / "test").is_dir() or (root / "val").is_dir())):
        raise UserError(f"{root} lacks train/, or test/ and val/: an image folder is train/<class>/* and "
                        "test/<class>/* (or val/)")
    folders = class_folders(train_folder, ignored)
    test_folder = choose_test_folder(root, folders)
    test_folders = class_folders(test_folder, ignored)
    if classes is None:
        classes = list(folders)
        check_classes(train_folder, classes)
        if extra := sorted(test_folders.keys() - folders.keys()):
            raise UserError(f"{test_folder} has classes that {train_folder} lacks: {', '.join(extra[:10])}")
    train, y = class_files(train_folder, folders, classes, ignored)
    test, y_test = class_files(test_folder, test_folders, classes, ignored)
    note_ignored(root, ignored)
    if (x := small_images([*train, *test], side)) is not None:
        train, test = x[:len(train)], x[len(train):]
    return (train, y), (test, y_test), classes


def choose_test_folder(root, train_folders):
    """The folder test/. If there is val/, and test/ is missing or has none of the classes (as in ImageNet,
    whose test images have no labels), val/."""
    test, val = root / "test", root / "val"
    if not val.is_dir():
        return test
    if test.is_dir():
        if not {unicode_name(name) for name in os.listdir(test)}.isdisjoint(train_folders):
            return test
        say(f"note: {test} has none of the class folders of train/: {val} is the test set")
    return val


def check_classes(folder, classes):
    """UserError unless there are two classes or more. Notes names that are easily taken for each other."""
    if len(classes) < 2:
        raise UserError(f"{folder} has the class folders {classes}: two or more are needed")
    first = {}
    for name in classes:
        other = first.setdefault("".join(name.casefold().split()), name)
        if other != name:
            say(f"note: the classes {other!r} and {name!r} of {folder} differ only in case or spaces")


def evenly(values, n=200):
    """About n values of a list (n to 2n, or all), at equal distances."""
    return values[::max(1, len(values) // n)]


def sizes_of_sample(paths):
    """The sizes (W, H) of a sample of images. Notes that transparent pixels become white, if some can be."""
    from PIL import Image
    sizes, with_alpha = [], []
    for path in evenly(paths):
        with contextlib.suppress(Exception), Image.open(path) as image:  # a damaged file is named when read
            sizes.append(image.size)
            if image.has_transparency_data:
                with_alpha.append(path)
    if with_alpha:
        say(f"note: {str(with_alpha[0])!r} has an alpha channel: transparent pixels become white")
    return sizes


def small_images(paths, side):
    """The images of `paths` as a uint8 tensor (N, 3, H, W). None if they are to be streamed: if most are
    larger than SMALL, or if a `side` is given and they are not all square and of one size. Without a `side`,
    small images that are not all square and of one size are a UserError."""
    sizes = sorted(sizes_of_sample(paths), key=max)
    median = sizes[(len(sizes) - 1) // 2] if sizes else (0, 0)  # of the sample, by the longer side
    if max(median) > SMALL or (side and median[0] != median[1]):
        return None
    advice = f"or give --side {max(32, *median)}: all are then resized to it and augmented as photographs are"
    if median[0] != median[1]:
        raise UserError(f"{paths[0].parents[2]} has images of {median[0]}x{median[1]} pixels; small images "
                        f"must be square: crop or pad them, {advice}")
    images = []
    for path in progress(paths, desc=f"reading {paths[0].parents[2]}", unit="image"):
        image = open_image(path)
        if image.size != median:
            if side:
                return None
            raise UserError(f"{path} is {image.width}x{image.height} pixels, others are {median[0]}x"
                            f"{median[1]}; small images must have one size: fix this file, {advice}")
        images.append(np.asarray(image))  # (H, W, 3)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def file_stat(path):
    """os.stat. UserError if it fails."""
    try:
        return os.stat(path)
    except OSError as e:
        raise cannot_read(path, e) from None


def file_hash(path):
    """The SHA-256 of a file. UserError if it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).digest()
    except OSError as e:
        raise cannot_read(path, e) from None


def file_keys(train, test, limit=2**28):
    """A key for each path of two lists, equal for links to one file, and for copies of it whose contents are
    compared: of files as large as one of a sample, if all these together have at most `limit` bytes."""
    stats = [file_stat(path) for path in [*train, *test]]
    count = Counter(s.st_size for s in stats)
    sample = [*evenly(stats[:len(train)]), *evenly(stats[len(train):])]
    sizes = {s.st_size for s in sample if count[s.st_size] > 1}
    if sum(size * count[size] for size in sizes) > limit:
        sizes = set()
    keys = [file_hash(path) if s.st_size in sizes else (s.st_dev, s.st_ino)
            for path, s in zip([*train, *test], stats)]
    return keys[:len(train)], keys[len(train):]


class ImageFiles(Dataset):
    """Images on disk, read by (position, seed) as uint8 (3, side, side), as in Fig. 9, right. With a seed: a
    random crop, resized as in torchvision's RandomResizedCrop. With None, the test view: for side 224, the
    shortest side is resized to 256 and the centre is cropped."""

    def __init__(self, paths, side=224, workers=0):
        self.paths, self.side, self.shape = paths, side, (len(paths), 3, side, side)
        self.workers = min(workers, os.cpu_count())

    def __getitem__(self, item):
        from torchvision.transforms import RandomResizedCrop
        from torchvision.transforms import functional as T
        position, seed = item
        image = open_image(self.paths[position])
        if seed is None:
            image = T.center_crop(T.resize(image, round(self.side * 256 / 224)), [self.side, self.side])
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                box = RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
            image = T.resized_crop(image, *box, [self.side, self.side])
        return T.pil_to_tensor(image)

    def load(self, batches, device):
        """Yields a uint8 tensor (n, 3, side, side) for each list of (position, seed) in `batches`, on the CPU
        (for a GPU as `device` in memory that is copied fast)."""
        try:
            with contextlib.ExitStack() as stack:  # as many files as the processes need, or torch would print
                for _ in range(10 * self.workers):  # a traceback of its own
                    stack.enter_context(open(os.devnull))
            yield from DataLoader(self, batch_sampler=batches, num_workers=self.workers,
                                  pin_memory=torch.device(device).type == "cuda")
        except UserError as e:  # from a worker, the message is a traceback
            raise UserError(str(e).splitlines()[-1].removeprefix("common.UserError: ")) from None
        except (OSError, RuntimeError) as e:
            if not self.workers or "CUDA" in str(e):
                raise
            reason = getattr(e, "strerror", None) or str(e).strip().rpartition("\n")[2][:100]
            raise UserError(f"the loader processes failed ({reason}): with --workers 0, which needs none, "
                            "the same command goes on") from None

    def digest(self, contents):
        """A hash of the names and sizes of the files, and of their contents if `contents`."""
        sha256 = hashlib.sha256()
        for path in progress(self.paths, desc="identifying the images", unit="image"):
            name = unicode_name("/".join(Path(path).parts[-2:]))
            sha256.update(os.fsencode(f"{name}\n{file_stat(path).st_size}\n"))
            if contents:
                sha256.update(file_hash(path))
        return sha256.digest()
