"""Serves the data sets: the fixed 10 % / 90 % split of the test set, the augmentation of Fig. 9, and batches.

Batches are (x, y, index): images (b, C, H, W) in [0, 1], labels (b,) and positions in the data set (b,).
"""
import functools
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

import attacks
from common import UserError, barrier, process_count, process_index, say
from datasets import DIGITS, TABLE_1, read_dataset
from flags import DEFAULTS
from image_files import ImageFiles
from runs import check_fingerprint

SPLIT_SEED = 90622  # of the permutation of the test set, which is the same in every run
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # mean and standard deviation of the channels


@dataclass
class Examples:
    """Images x, a uint8 tensor (N, C, H, W) or ImageFiles, and labels y, int64 (N,)."""
    x: object
    y: torch.Tensor

    def __len__(self):
        return len(self.y)

    @property
    def streamed(self):
        """Whether the images are read from disk as they are needed."""
        return isinstance(self.x, ImageFiles)

    def read(self, batches, device, crop_seeds=None):
        """Yields the images of each index tensor (n,) in `batches` as float32 (n, C, H, W) in [0, 1] on
        `device`. `crop_seeds`: for each batch a list with a seed for the crop of each streamed image."""
        if self.streamed:
            crop_seeds = crop_seeds or [[None] * len(index) for index in batches]
            items = [list(zip(index.tolist(), seeds)) for index, seeds in zip(batches, crop_seeds)]
            images = self.x.load(items, device)
        else:
            images = (self.x[index.to(self.x.device)] for index in batches)
        to_gpu = torch.device(device).type == "cuda"
        for x in images:  # a copy to the CPU must be waited for: until it ends, the memory holds anything
            yield x.to(device, non_blocking=to_gpu).float().div_(255)

    def pixels(self, index, device):
        """The images `index` (on the CPU), not augmented, as float32 (n, C, H, W) in [0, 1] on `device`."""
        batches = index.split(1) if self.streamed else [index]  # one image each, so that all workers read
        return torch.cat(list(self.read(batches, device)))


@dataclass
class DataSet:
    """The training and the test examples, and the names of the classes."""
    name: str
    train: Examples
    test: Examples
    classes: list

    @functools.cached_property
    def images_hash(self):
        """A hash of all pixels; of streamed images, of the names and sizes of the files."""
        sha256 = hashlib.sha256()
        for part in (self.train, self.test):
            if part.streamed:
                sha256.update(part.x.digest())
            else:
                sha256.update(part.x.cpu().contiguous().numpy())
        return sha256.hexdigest()[:16]

    def fingerprint(self):
        """What must agree for scores and checkpoints to belong to these data."""
        labels = self.train.y.numpy().tobytes() + self.test.y.numpy().tobytes()
        return {"name": self.name, "train": len(self.train), "test": len(self.test),
                "classes": list(self.classes), "labels": hashlib.sha256(labels).hexdigest()[:16],
                "images": self.images_hash}

    @functools.cached_property
    def mean_std(self):
        """Mean and standard deviation of the training pixels in each channel, two lists of C numbers.
        Streamed images get ImageNet's, since reading them all takes long. A (nearly) constant channel gets
        the standard deviation 1: dividing by its own would multiply the attack."""
        if self.train.streamed:
            return IMAGENET
        counts = [torch.bincount(x.flatten().int(), minlength=256) for x in self.train.x.transpose(0, 1)]
        counts = torch.stack(counts).double().cpu()  # (C, 256)
        values, total = torch.arange(256, dtype=torch.float64) / 255, counts.sum(1)
        mean = (counts * values).sum(1) / total
        std = ((counts * values**2).sum(1) / total - mean**2).clamp_min(0).sqrt()
        constant = std < 1 / 255
        if constant.any():
            say(f"note: {self.name} has (nearly) constant channels, which are not scaled: "
                f"{', '.join(map(str, constant.nonzero().flatten().tolist()))}, counted from 0")
        std[constant] = 1
        return mean.tolist(), std.tolist()


def open_dataset(args, device):
    """The DataSet that the flags ask for. UserError unless it suits the batch size, an l2 eps, the attacks
    and the split of the test set."""
    data = load_dataset(args.dataset, args.data_dir, device, args.side, args.workers)
    selection_and_final(len(data.test))
    n, least = len(data.train), 2 * process_count()
    if not least <= args.batch_size <= n:
        raise UserError(f"--batch-size {args.batch_size} with {process_count()} processes and {n} training "
                        f"images of {data.name}: give {least} to {n} (batch norm needs 2 images per process)")
    largest = math.prod(data.train.x.shape[1:])**0.5  # the distance from black to white
    if getattr(args, "norm", None) == "l2" and args.eps > largest:
        raise UserError(f"--eps {args.eps:g}: l2 reaches {largest:.4g} on images of {data.name}, as pixels "
                        "are in [0, 1] (divide an eps for pixels up to 255 by 255)")
    names = {*getattr(args, "select_attacks", ()), *getattr(args, "eval_attacks", ())}
    height, width = data.train.x.shape[2:]
    if "square" in names and not attacks.square_takes(height, width, args.norm):
        raise UserError(f"AutoAttack's square takes no images of {height}x{width} pixels in l2: give "
                        "--select-attacks and --eval-attacks without it, or resize the images")
    if n % args.batch_size >= 0.05 * n:
        say(f"note: each epoch leaves out {n % args.batch_size} of the {n:,} training images, new ones each "
            f"time: they do not fill a batch of {args.batch_size} (--batch-size)")
    return data


def check_unchanged(args, fingerprint, path):
    """UserError if `fingerprint`, of the finished run in `path`, is not that of the user's own data set, or
    of the one in a typed --data-dir, as it is now. The data sets of the paper are taken not to change, and
    one that is gone, or is not NAME.pt or NAME/, is not compared."""
    name, root = args.dataset, args.data_dir
    is_there = (root / f"{name}.pt").exists() or (root / name).is_dir()
    if is_there and (name not in (*DIGITS, *TABLE_1) or "data_dir" in args.typed):
        check_fingerprint(load_dataset(name, root, "cpu", args.side), fingerprint, path)


def load_dataset(name, data_dir, device="cpu", side=DEFAULTS["side"], workers=0):
    """The DataSet `name`, its images on `device` or streamed. Process 0 is first: it alone downloads. `side`:
    of streamed images."""
    if process_index() > 0:
        barrier()
    train, test, classes = read_dataset(name, Path(data_dir))
    if process_index() == 0:
        barrier()
    parts = [Examples(x.to(device) if isinstance(x, torch.Tensor) else ImageFiles(x, side, workers), y)
             for x, y in (train, test)]
    return DataSet(name, *parts, classes)


def selection_and_final(n):
    """Indices of the 10 % of the n test examples that select checkpoints, and of the other 90 %, on which
    accuracies are reported (Sec. 4)."""
    if n < 2:
        raise UserError(f"the test set has {n} image: it takes 2 or more, one of them to select a checkpoint")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED))
    n_selection = max(1, round(0.1 * n))
    return order[:n_selection], order[n_selection:]


def draw_augmentation(n, shape, augmentation, streamed, generator):
    """Augmentation parameters of n examples of `shape` (..., H, W), on the CPU: {name: tensor (n, ...)}.
    `augmentation`: "full" (Fig. 9), "crop" or "none". Streamed images are cropped when they are read, each by
    a "seed", and jittered less (Fig. 9, right)."""
    if augmentation == "none":
        return {}
    if streamed:
        params = {"seed": torch.randint(0, 2**62, (n,), generator=generator)}
    else:
        pad = shape[-1] // 8  # 4 for 32x32 (Fig. 9), 1 for 8x8
        params = {"crop": torch.randint(0, 2 * pad + 1, (n, 2), generator=generator)}
    if augmentation == "full":
        strength = 0.1 if streamed else 0.25
        params["flip"] = torch.rand(n, generator=generator) < 0.5
        params["factor"] = 1 + strength * (2 * torch.rand(n, 3, generator=generator) - 1)
        params["order"] = torch.rand(n, 3, generator=generator).argsort(1)
        params["angle"] = torch.deg2rad(2 * (2 * torch.rand(n, generator=generator) - 1))
    return params


def augment(x, params):
    """Augments x (N, C, H, W) in [0, 1] by draw_augmentation()'s parameters, each example by its own: crop,
    flip, colour jitter and rotation (Fig. 9). Jitter changes brightness, contrast and saturation in each
    example's own order: to f x + (1 - f) base, where base is black, its mean grey, or its grey image."""
    n, channels, h, _ = x.shape
    if "crop" in params:
        pad, offsets = h // 8, torch.arange(h, device=x.device)
        example = torch.arange(n, device=x.device)[:, None, None]
        rows, columns = params["crop"][:, :1] + offsets, params["crop"][:, 1:] + offsets  # (N, H), (N, W)
        x = F.pad(x, (pad,) * 4)[example, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if "flip" in params:
        x = torch.where(params["flip"].view(-1, 1, 1, 1), x.flip(3), x)
    if "factor" in params:
        luma = (0.299, 0.587, 0.114) if channels == 3 else (1 / channels,) * channels
        for kind in params["order"].T[:, :, None, None, None]:  # (N, 1, 1, 1)
            f = params["factor"].gather(1, kind.view(-1, 1)).view_as(kind)
            # A sum over the channels: a tensor of weights would make the GPU wait until it is copied there.
            grey = sum(weight * x[:, c:c + 1] for c, weight in enumerate(luma))
            base = torch.where(kind == 1, grey.mean((2, 3), keepdim=True), 0.0)
            x = (f * x + (1 - f) * torch.where(kind == 2, grey, base)).clamp(0, 1)
        cos, sin, zero = params["angle"].cos(), params["angle"].sin(), torch.zeros_like(params["angle"])
        rotation = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(n, 2, 3)
        grid = F.affine_grid(rotation, x.shape, align_corners=False)
        x = F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return x


def epoch_order(n, batch_size, seed, epoch):
    """The full batches of an epoch as positions in the training set, (steps, batch_size), and the generator
    that drew them from (seed, epoch)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(n, generator=generator)[:n // batch_size * batch_size]
    return order.view(-1, batch_size), generator


def process_part(values, dim=1):
    """This process's part of `values` along `dim`, by default of each batch in (steps, batch size, ...)."""
    return values.tensor_split(process_count(), dim)[process_index()]


def batches_together(examples, device):
    """How many batches are augmented at a time: 32 on a GPU, which launches kernels more slowly than it runs
    them. Streamed images come one batch at a time."""
    return 1 if examples.streamed or torch.device(device).type == "cpu" else 32


def training_batches(examples, batch_size, seed, epoch, augmentation, device):
    """Yields the training batches of an epoch, (x, y, index): x, augmented, on `device` and in channels_last,
    in which convolutions are fastest; y on `device`; index on the CPU.

    Order and augmentation are drawn from (seed, epoch) for the whole epoch, and each process takes its part
    of every batch: a resumed run, or one with another number of processes, sees the same batches.
    """
    order, generator = epoch_order(len(examples), batch_size, seed, epoch)
    params = draw_augmentation(order.numel(), examples.x.shape, augmentation, examples.streamed, generator)
    # Copied to the device once an epoch: a small copy in every step would make a GPU wait for the CPU.
    params = {name: process_part(v.view(*order.shape, *v.shape[1:])).to(device) for name, v in params.items()}
    order = process_part(order)
    y, crop_seeds = examples.y[order].to(device), params.pop("seed").tolist() if "seed" in params else None
    together = batches_together(examples, device)
    chunks = [slice(step, step + together) for step in range(0, len(order), together)]
    index = order if examples.streamed else order.to(device)
    images = examples.read([index[steps].flatten() for steps in chunks], device, crop_seeds)
    for steps, x in zip(chunks, images):
        x = augment(x, {name: v[steps].flatten(0, 1) for name, v in params.items()})
        x = x.contiguous(memory_format=torch.channels_last)
        yield from zip(x.split(order.shape[1]), y[steps], order[steps])


def plain_batches(examples, index, batch_size, device):
    """Batches (x, y, index) of the examples `index`, in that order and not augmented."""
    batches = index.split(batch_size)
    for x, positions in zip(examples.read(batches, device), batches):
        yield x, examples.y[positions].to(device), positions
