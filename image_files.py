"""Reads images on disk: image folders, and the files of streamed data sets."""
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common import UserError, progress, say

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
HIDDEN = ("@eaDir", "#recycle", "__MACOSX", "lost+found")  # of file servers, archives and disks; also .<name>
SMALL = 64  # the largest side of small images, in pixels


def open_image(path):
    """The image in a file as 8-bit RGB (PIL), as torchvision's data sets read it. UserError for a damaged
    file, or for a grey one of more than 8 bits, which PIL would clip."""
    from PIL import Image
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError("its grey has more than 8 bits")
            return image.convert("RGB")
    except Exception as e:  # PIL raises many kinds for damaged files
        reason = getattr(e, "strerror", None) or " ".join(str(e).split())[:80] or type(e).__name__
        raise UserError(f"{path} is not an image that can be read ({reason}): fix or delete it") from None


def visible(folder):
    """The entries of a folder, sorted by name, without hidden ones."""
    return sorted(path for path in folder.iterdir() if path.name[0] != "." and path.name not in HIDDEN)


def class_folders(folder):
    """The names of the class folders in `folder`, sorted. UserError for fewer than two."""
    names = [path.name for path in visible(folder) if path.is_dir()]
    if bad := [name for name in names if name != name.encode(errors="replace").decode()]:
        raise UserError(f"{folder} has a class folder whose name is not UTF-8, {bad[0]!r}: rename it")
    if len(names) < 2:
        raise UserError(f"{folder} has the class folders {names}: two or more are needed")
    return names


def class_files(folder, classes):
    """([path], labels) of the images in the class folders of `folder`, ordered as `classes`, and within a
    class by file name. A note counts the other files. UserError for a class without images."""
    paths, labels, others = [], [], []
    for label, name in enumerate(classes):
        entries = visible(folder / name) if (folder / name).is_dir() else []
        images = [path for path in entries if path.suffix.lower() in SUFFIXES]
        if not images:
            raise UserError(f"there are no images ({', '.join(SUFFIXES)}) in {folder / name}")
        others += sorted({*entries} - {*images})
        paths += images
        labels += [label] * len(images)
    if others:
        say(f"note: ignored {len(others):,} files or folders that are not images ({', '.join(SUFFIXES)}), "
            f"first {others[0]}")
    return paths, torch.tensor(labels)


def image_folder(root, classes=None):
    """(train, test, classes) of the image folder `root`, where train and test are (images, labels). Images
    that small_images() does not read are paths. `classes`: the class folders to read, by default all."""
    layout = "an image folder is train/<class>/* and test/<class>/* (or val/)"
    train_folder = root / "train"
    if not train_folder.is_dir():
        raise UserError(f"{root} lacks train/: {layout}")
    names = classes or class_folders(train_folder)
    # test/ or, if that has no folder of a class, as in ImageNet, val/
    folders = [root / part for part in ("test", "val") if (root / part).is_dir()]
    folders = [folder for folder in folders if not {*os.listdir(folder)}.isdisjoint(names)]
    if not folders:
        raise UserError(f"{root} has none of the classes of train/ in test/ or val/: {layout}")
    if folders[0].name == "val" and (root / "test").is_dir():
        say(f"note: {root / 'test'} has none of the class folders of train/: {folders[0]} is the test set")
    if classes is None and (extra := sorted({*class_folders(folders[0])} - {*names})):
        raise UserError(f"{folders[0]} has classes that {train_folder} lacks: {', '.join(extra[:10])}")
    (train, y), (test, y_test) = (class_files(folder, names) for folder in (train_folder, folders[0]))
    if (x := small_images([*train, *test])) is not None:
        train, test = x[:len(train)], x[len(train):]
    return (train, y), (test, y_test), names


def small_images(paths):
    """The images of `paths` as a uint8 tensor (N, 3, H, W), if all are square, of one size and at most SMALL.
    Else None, with a note if the first is small: they are streamed."""
    images, root = [], paths[0].parents[2]
    for path in progress(paths, desc=f"reading {root}", unit="image"):
        image = open_image(path)
        height, width = image.height, image.width
        if max(height, width) > SMALL or height != width or images and height != len(images[0]):
            if images or max(height, width) <= SMALL:
                say(f"note: {path} is {width}x{height} pixels. As the images of {root} are not all square, "
                    f"of one size and at most {SMALL}x{SMALL}, all are resized to --side")
            return None
        images.append(np.asarray(image))  # (H, W, 3)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


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
            yield from DataLoader(self, batch_sampler=batches, num_workers=self.workers,
                                  pin_memory=torch.device(device).type == "cuda")
        except UserError as e:  # from a worker, the message is a traceback
            raise UserError(str(e).splitlines()[-1].removeprefix("common.UserError: ")) from None

    def digest(self):
        """A hash of the names and sizes of the files."""
        sha256 = hashlib.sha256()
        for path in progress(self.paths, desc="identifying the images", unit="image"):
            name = "/".join(Path(path).parts[-2:])
            sha256.update(os.fsencode(f"{name}\n{os.stat(path).st_size}\n"))
        return sha256.digest()
