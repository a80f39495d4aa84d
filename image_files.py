"""Reads images on disk: image folders, and the files of streamed data sets."""
import os

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common import UserError, progress

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
SMALL = 64  # the largest side of small images, in pixels


def open_image(path):
    """The image in a file (PIL), converted to RGB. UserError for a file that cannot be read."""
    from PIL import Image
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as e:
        reason = " ".join(str(e).split())[:80]
        raise UserError(f"{path} is not an image that can be read ({reason}): fix or delete it") from None


def class_folders(folder):
    """The sorted names of the class folders in `folder`."""
    names = sorted(d.name for d in folder.iterdir() if d.is_dir())
    if len({"".join(name.casefold().split()) for name in names}) < max(2, len(names)):
        raise UserError(f"{folder} has the class folders {names}: two or more are needed, whose names differ "
                        "in more than case and spaces")
    return names


def class_files(folder, classes):
    """([path], labels) of <folder>/<class>/*, ordered as `classes`, and within a class by file name."""
    paths, labels = [], []
    for label, name in enumerate(classes):
        images = sorted(p for p in (folder / name).glob("*") if p.suffix.lower() in IMAGES)
        if not images:
            raise UserError(f"there are no images ({', '.join(IMAGES)}) in {folder / name}")
        paths += images
        labels += [label] * len(images)
    return paths, torch.tensor(labels)


def image_folder(root, classes=None):
    """(train, test, classes) of the image folder `root`, where train and test are (images, labels). Images
    that small_images() does not read are paths. `classes`: the class folders to read, by default all."""
    train_folder = root / "train"
    test_folder = root / "test" if (root / "test").is_dir() else root / "val"
    if not (train_folder.is_dir() and test_folder.is_dir()):
        raise UserError(f"{root} lacks train/, or test/ and val/: an image folder is train/<class>/* and "
                        "test/<class>/* (or val/)")
    if classes is None:
        classes = class_folders(train_folder)
        if extra := sorted(set(class_folders(test_folder)) - set(classes)):
            raise UserError(f"{test_folder} has classes that {train_folder} lacks: {', '.join(extra[:10])}")
    (train, y), (test, y_test) = class_files(train_folder, classes), class_files(test_folder, classes)
    if (x := small_images([*train, *test])) is not None:
        train, test = x[:len(train)], x[len(train):]
    return (train, y), (test, y_test), classes


def small_images(paths):
    """The images of `paths` as a uint8 tensor (N, 3, H, W), or None unless they are small and of one size."""
    images = []
    for path in progress(paths, desc=f"reading {paths[0].parents[2]}", unit="image"):
        image = np.asarray(open_image(path))  # (H, W, 3)
        if max(image.shape) > SMALL or (images and image.shape != images[0].shape):
            return None
        images.append(image)
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

    def load(self, batches):
        """Yields a uint8 tensor (n, 3, side, side) for each list of (position, seed) in `batches`."""
        try:
            yield from DataLoader(self, batch_sampler=batches, num_workers=self.workers,
                                  pin_memory=torch.cuda.is_available())
        except UserError as e:  # from a worker, the message is a traceback
            raise UserError(str(e).splitlines()[-1].removeprefix("common.UserError: ")) from None
