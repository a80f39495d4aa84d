"""Serves the data sets to the scripts: the fixed 10 % / 90 % split of the test set, the augmentation of
Fig. 9, and batches.

    python data.py NAME --data-dir DIR    # lists unreadable images; saves small images as <name>.pt
Files in: those that datasets.py describes. Batches are (x, y, index): images in [0, 1], labels, positions in
the training set.
"""
import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import common  # first, so that Ctrl-C while torch loads ends in one line
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import flags
import datasets
from common import UserError, barrier, process_index, say, process_count

SPLIT_SEED = 90622  # of the only permutation of the test set, which does not depend on the seed of a run
# Mean and standard deviation of ImageNet, for streamed images, because reading all of them would take long.
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


class Files(Dataset):
    """Images on disk, read by (index, seed) as uint8 (3, side, side), as in Fig. 9. With a seed: a random
    crop, resized as in torchvision's RandomResizedCrop. With None, the test view: for side 224, the shortest
    side is resized to 256 and the centre is cropped."""

    def __init__(self, paths, side=224, workers=0):
        self.paths, self.side, self.shape = paths, side, (len(paths), 3, side, side)
        self.workers, self.loader, self.todo = min(workers, os.cpu_count()), None, []

    def __len__(self):
        return len(self.paths)

    def __getstate__(self):
        return {**self.__dict__, "loader": None}  # for workers that are not forked and get a pickled copy

    def __getitem__(self, item):
        from torchvision.transforms import RandomResizedCrop
        from torchvision.transforms import functional as T
        index, seed = item
        image = datasets.open_image(self.paths[index])
        if seed is None:
            image = T.center_crop(T.resize(image, round(self.side * 256 / 224)), [self.side, self.side])
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                box = RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
            image = T.resized_crop(image, *box, [self.side, self.side])
        return T.pil_to_tensor(image)

    def load(self, batches):
        """Yields a uint8 tensor (n, 3, side, side) for each list of (index, seed) in `batches`. The workers
        read ahead. They are kept for later calls, because starting them takes seconds."""
        if self.loader is None:
            self.loader = DataLoader(
                self, batch_sampler=self.todo, num_workers=self.workers, persistent_workers=self.workers > 0,
                pin_memory=torch.cuda.is_available())
        self.todo[:] = batches
        try:
            yield from self.loader
        except UserError as e:  # the message of a worker's error is its traceback
            self.loader = None
            raise UserError(str(e).splitlines()[-1].removeprefix("common.UserError: ")) from None


@dataclass
class Split:
    """Images x, a uint8 tensor (N, C, H, W) or Files, and labels y, int64 (N,)."""
    x: object
    y: torch.Tensor

    def __len__(self):
        return len(self.y)

    @property
    def streamed(self):
        """Whether the images are read from disk as they are needed."""
        return isinstance(self.x, Files)

    def pixels(self, index, device):
        """The un-augmented images of `index` (on the CPU) as float32 (n, C, H, W) in [0, 1] on `device`."""
        if self.streamed:
            found = torch.cat(list(self.x.load([[(i, None)] for i in index.tolist()])))
        else:
            found = self.x[index.to(self.x.device)]
        return found.to(device).float().div_(255)

    def to(self, device):
        """The split with images in memory moved to `device`. Labels and indices stay on the CPU, where the
        batches are made."""
        return self if self.streamed else Split(self.x.to(device), self.y)


@dataclass
class DataSet:
    """A training and a test split, and the names of the classes."""
    name: str
    train: Split
    test: Split
    classes: list

    @functools.cached_property
    def images(self):
        """A hash of all pixels, or of the file names of streamed images."""
        h = hashlib.sha256()
        for x in (self.train.x, self.test.x):
            names = "\n".join("/".join(Path(p).parts[-2:]) for p in getattr(x, "paths", ()))
            h.update(x.cpu().contiguous().numpy() if isinstance(x, torch.Tensor) else os.fsencode(names))
        return h.hexdigest()[:16]

    def fingerprint(self):
        """What must agree for scores and checkpoints to belong to these data: name, counts, classes and
        hashes of the labels and images."""
        labels = self.train.y.numpy().tobytes() + self.test.y.numpy().tobytes()
        labels = hashlib.sha256(labels).hexdigest()[:16]
        return {"name": self.name, "train": len(self.train), "test": len(self.test),
                "classes": list(self.classes), "labels": labels, "images": self.images}

    def mean_std(self):
        """Mean and standard deviation of the training pixels in each channel, two lists of C, for the first
        layer of the network."""
        if self.train.streamed:
            return IMAGENET
        x = self.train.x
        counts = [torch.bincount(x[:, c].flatten().int(), minlength=256) for c in range(x.shape[1])]
        counts = torch.stack(counts).double().cpu()
        values, total = torch.arange(256, dtype=torch.float64) / 255, counts.sum(1)
        mean = (counts * values).sum(1) / total
        std = ((counts * values**2).sum(1) / total - mean**2).clamp_min(1e-12).sqrt()
        return mean.tolist(), std.tolist()


def load_dataset(name, data_dir, device="cpu", side=224, workers=0):
    """The data set `name`, with images in memory on `device`. Rank 0 reads (or downloads) it first; then the
    others read what it saved."""
    if process_index() > 0:
        barrier()
    train, test, classes = datasets.find(name, Path(data_dir))
    if process_index() == 0:
        barrier()
    splits = (Split(x if isinstance(x, torch.Tensor) else Files(x, side, workers), y).to(device)
              for x, y in (train, test))
    return DataSet(name, *splits, classes)


def open_dataset(args, device):
    data = load_dataset(args.dataset, args.data_dir, device, args.side, args.workers)
    check_batch_size(data, args.batch_size)
    return data


def check_fingerprint(data, other, what):
    """UserError unless `other`, the fingerprint stored in `what`, equals that of `data`."""
    mine = data.fingerprint()
    differ = [f"{k}: {other.get(k)} there, {v} here" for k, v in mine.items() if other.get(k) != v]
    if differ:
        raise UserError(f"{what} belongs to other data ({'; '.join(differ)[:300]}): "
                        "remake it from this data, or find its data")


def check_batch_size(data, batch_size):
    """UserError unless the training set holds a whole batch, each process gets a part of it, and the test set
    can be split."""
    selection_and_final(len(data.test))
    if not process_count() <= batch_size <= len(data.train):
        raise UserError(f"--batch-size {batch_size} with {process_count()} processes and {len(data.train)} training "
                        f"images of {data.name}: it must be {process_count()} to {len(data.train)}")


def selection_and_final(n):
    """Indices of the 10 % of the n test examples that select checkpoints, and of the other 90 %, on which
    accuracies are reported (Sec. 4)."""
    if n < 2:
        raise UserError(f"the test set has {n} image: at least 2 are needed, "
                        "to select a checkpoint and to report on")
    order, k = torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED)), max(1, round(0.1 * n))
    return order[:k], order[k:]


def draw_augmentation(b, shape, how, streamed, generator):
    """Augmentation parameters of b examples of `shape` (..., H, W), drawn on the CPU, as {name: tensor (b,
    ...)}. `how`: "full" (Fig. 9), "crop" (only the crop) or "none" ({}).

    Streamed images are cropped when they are read, each by a "seed", and jittered less (Fig. 9, right).
    """
    pad = shape[-1] // 8  # 4 for 32x32 (Fig. 9), 1 for 8x8
    if how == "none":
        return {}
    if streamed:
        params = {"seed": torch.randint(0, 2**62, (b,), generator=generator)}
    else:
        params = {"crop": torch.randint(0, 2 * pad + 1, (b, 2), generator=generator)}
    if how == "full":
        params["flip"] = torch.rand(b, generator=generator) < 0.5
        params["factor"] = 1 + (0.1 if streamed else 0.25) * (2 * torch.rand(b, 3, generator=generator) - 1)
        params["order"] = torch.rand(b, 3, generator=generator).argsort(1)
        params["angle"] = torch.deg2rad(2 * (2 * torch.rand(b, generator=generator) - 1))
    return params


def jitter(x, factor, order):
    """Colour jitter of x (N, C, H, W): brightness, contrast and saturation by factor (N, 3), for each example
    in its own order (N, 3). Each is a blend f x + (1 - f) base, where base is black for brightness, the mean
    grey of the example for contrast, and its grey image for saturation."""
    luma = (0.299, 0.587, 0.114) if x.shape[1] == 3 else (1 / x.shape[1],) * x.shape[1]
    for step in range(3):
        kind = order[:, step].view(-1, 1, 1, 1)
        f = factor.gather(1, order[:, step:step + 1]).view(-1, 1, 1, 1)
        # A sum over the channels: a tensor of weights would make the GPU wait until it is copied there.
        grey = sum(w * x[:, c:c + 1] for c, w in enumerate(luma))
        base = torch.where(kind == 1, grey.mean((2, 3), keepdim=True), 0.0)
        base = torch.where(kind == 2, grey, base)
        x = (f * x + (1 - f) * base).clamp(0, 1)
    return x


def augment(x, params):
    """Applies draw_augmentation()'s parameters to x (N, C, H, W) in [0, 1], to each example its own: crop, flip, colour
    jitter and rotation, in this order (Fig. 9)."""
    n, _, h, w = x.shape
    each = torch.arange(n, device=x.device)[:, None, None]
    if "crop" in params:
        pad, at = h // 8, torch.arange(h, device=x.device)
        rows, columns = params["crop"][:, :1] + at, params["crop"][:, 1:] + at
        x = F.pad(x, (pad,) * 4)[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if "flip" in params:
        x = torch.where(params["flip"].view(-1, 1, 1, 1), x.flip(3), x)
    if "factor" in params:
        x = jitter(x, params["factor"], params["order"])
        cos, sin, zero = params["angle"].cos(), params["angle"].sin(), torch.zeros_like(params["angle"])
        turn = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(n, 2, 3)
        grid = F.affine_grid(turn, x.shape, align_corners=False)
        x = F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return x


def epoch_order(n, batch_size, seed, epoch):
    """The batches of an epoch as positions in the training set, (steps, batch_size), without an incomplete
    last batch; and the generator that drew them from (seed, epoch)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(n, generator=generator)[:n // batch_size * batch_size]
    return order.view(-1, batch_size), generator


def training_batches(split, batch_size, seed, epoch, how, device):
    """The training batches of an epoch (epoch_order): x (b, C, H, W), augmented, on `device` and in
    channels_last, in which convolutions are fastest; y (b,), on `device` too; index (b,), on the CPU.

    Order and augmentation are drawn from (seed, epoch) for the whole epoch, and each process takes its slice
    of every batch: a resumed run, or one with another number of processes, sees the same batches.
    """
    order, generator = epoch_order(len(split), batch_size, seed, epoch)
    n, order = order.numel(), order.flatten()
    params = draw_augmentation(n, split.x.shape, how, split.streamed, generator)
    # (steps, b): the places of this process's slice of each batch in `order`
    mine = torch.arange(n).view(-1, batch_size).tensor_split(process_count(), 1)[process_index()]
    if split.streamed:
        seeds = params.pop("seed")[mine].tolist() if params else [[None] * mine.shape[1]] * len(mine)
        read = split.x.load([list(zip(index.tolist(), s)) for index, s in zip(order[mine], seeds)])
    # What was drawn is copied once an epoch: a small copy in every step would make a GPU wait for the CPU.
    y, params = split.y[order].to(device), {k: v.to(device) for k, v in params.items()}
    there = order.to(device)
    for part in mine:
        i = slice(int(part[0]), int(part[-1]) + 1)
        x = next(read).to(device, non_blocking=True) if split.streamed else split.x[there[i]]
        x = x.float().div_(255)
        x = augment(x, {k: v[i] for k, v in params.items()}) if params else x
        yield x.contiguous(memory_format=torch.channels_last), y[i], order[i]


def plain_batches(split, index, batch_size, device):
    """Batches (x, y, index) of the examples `index`, in that order and not augmented."""
    parts = index.split(batch_size)
    read = split.x.load([[(i, None) for i in part.tolist()] for part in parts]) if split.streamed else None
    for part in parts:
        x = next(read).to(device).float().div_(255) if split.streamed else split.pixels(part, device)
        yield x, split.y[part].to(device), part


def check_images(paths, name):
    """Reads every image and prints those that cannot be read; UserError if there are any."""
    bad = 0
    for path in common.progress(paths, desc=f"checking {name}", unit="image"):
        try:
            datasets.open_image(path)
        except UserError as e:
            bad += 1
            say(f"{e}")
    if bad:
        raise UserError(f"{bad} images of {name} cannot be read; they are named above")


def main(argv=None):
    """Reads every image of a data set, prints those that cannot be read, and the counts."""
    parser = flags.Parser(prog="data.py", usage="python data.py NAME [--data-dir DIR]", description=__doc__,
                          formatter_class=flags.Help)
    parser.add_argument("name", type=flags.plain_name, help="the data set")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder that holds the data sets")
    args = parser.parse_args(argv)
    files = sorted(p for p in (args.data_dir / args.name).rglob("*") if p.suffix.lower() in datasets.IMAGES)
    check_images(files, args.name)
    data = load_dataset(args.name, args.data_dir)
    if not files:  # its images may be in folders of the publisher, which load_dataset() knows
        check_images([p for s in (data.train, data.test) if s.streamed for p in s.x.paths], args.name)
    say(f"{data.name}: {len(data.train):,} training and {len(data.test):,} test images, {len(data.classes)} "
        f"classes, {'streamed' if data.train.streamed else 'in memory'}")


if __name__ == "__main__":
    common.script(main)
