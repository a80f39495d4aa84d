"""The data sets, the augmentation of Fig. 9, the fixed 10 % / 90 % split of the test set, batches of (x, y, index).

A data set is looked for under --data-dir as <name>.pt, then as an image folder <name>/train/<class>/* with <name>/test or
<name>/val, then as torchvision's own files, then downloaded by torchvision. Format of <name>.pt:
{"train": {"x": uint8 (N, C, H, W), "y": int64 (N,)}, "test": {...}, "classes": [str]}.
"""
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from common import HERE, UserError, barrier, load, progress, rank, save, say, world

SPLIT_SEED = 90622  # of the one permutation of the test set; never a run's own seed
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}


@dataclass
class Split:
    """Images x, uint8 (N, C, H, W), with labels y, int64 (N,)."""
    x: torch.Tensor
    y: torch.Tensor

    def __len__(self):
        return len(self.y)

    def pixels(self, index, device):
        """The images of `index` (on the CPU) as float32 in [0, 1] on `device`."""
        return self.x[index.to(self.x.device)].to(device).float().div_(255)

    def to(self, device):
        """The same with the images on `device`; labels and indices stay on the CPU, where batches are dealt."""
        return Split(self.x.to(device), self.y)


@dataclass
class DataSet:
    """A training and a test split with the names of the classes."""
    name: str
    train: Split
    test: Split
    classes: list

    def fingerprint(self):
        """What must agree for scores and checkpoints to belong to this data: counts, classes, hash of the labels."""
        labels = hashlib.sha256(self.train.y.numpy().tobytes() + self.test.y.numpy().tobytes()).hexdigest()[:16]
        return {"name": self.name, "train": len(self.train), "test": len(self.test), "classes": list(self.classes),
                "labels": labels}

    def mean_std(self):
        """Per-channel mean and standard deviation of the training pixels, two lists of C, for the model's first layer."""
        x = self.train.x
        counts = torch.stack([torch.bincount(x[:, c].flatten().int(), minlength=256) for c in range(x.shape[1])]).double()
        values, total = torch.arange(256, dtype=torch.float64) / 255, counts.sum(1)
        mean = (counts * values).sum(1) / total
        std = ((counts * values**2).sum(1) / total - mean**2).clamp_min(1e-12).sqrt()
        return mean.tolist(), std.tolist()


def digits(name):
    """The embedded 8x8 digits, or their classes 0-4 or 5-9 alone (relabelled from 0)."""
    with np.load(HERE / "data" / "digits.npz", allow_pickle=False) as f:
        parts = {s: (torch.from_numpy(f[f"{s}_x"])[:, None], torch.from_numpy(f[f"{s}_y"])) for s in ("train", "test")}
    low, high = {"digits": (0, 9), "digits0-4": (0, 4), "digits5-9": (5, 9)}[name]
    keep = {s: (y >= low) & (y <= high) for s, (_, y) in parts.items()}
    train, test = (Split(x[keep[s]], y[keep[s]] - low) for s, (x, y) in parts.items())
    return DataSet(name, train, test, [str(c) for c in range(low, high + 1)])


def packed(name, path):
    """A data set from its <name>.pt."""
    found = load(path, ("train", "test", "classes"))
    splits = []
    for s in ("train", "test"):
        x, y = (found[s].get(k) if isinstance(found[s], dict) else None for k in "xy")
        if not (isinstance(x, torch.Tensor) and x.dtype == torch.uint8 and x.dim() == 4 and isinstance(y, torch.Tensor)
                and y.dtype == torch.int64 and y.shape == x.shape[:1] and len(y)):
            raise UserError(f"{path}: {s} must hold x, uint8 (N, C, H, W), and y, int64 (N,)")
        if y.min() < 0 or y.max() >= len(found["classes"]):
            raise UserError(f"{path}: {s} has labels outside 0..{len(found['classes']) - 1}, its classes")
        splits.append(Split(x, y))
    return DataSet(name, *splits, [str(c) for c in found["classes"]])


def read_folder(folder, classes):
    """The images of <folder>/<class>/*, all of one size, as a Split."""
    from PIL import Image
    files = [(path, label) for label, c in enumerate(classes) for path in sorted((folder / c).iterdir())
             if path.suffix.lower() in IMAGES]
    images = []
    for path, _ in progress(files, desc=f"reading {folder}"):
        try:
            images.append(np.asarray(Image.open(path).convert("RGB")))
        except OSError as e:
            raise UserError(f"{path} is not an image that can be read ({e}): mend or delete it") from None
        if images[-1].shape != images[0].shape:
            raise UserError(f"{path} is {images[-1].shape[:2]} pixels, {files[0][0]} {images[0].shape[:2]}: one size is needed")
    if not files:
        raise UserError(f"{folder} holds no images ({', '.join(IMAGES)}) in its class folders")
    return Split(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor([y for _, y in files]))


def image_folder(name, root):
    """A data set from <root>/train/<class>/* and <root>/test/<class>/* (or val/)."""
    parts = [root / "train", root / "test" if (root / "test").is_dir() else root / "val"]
    for part in parts:
        if not part.is_dir():
            raise UserError(f"{root} lacks {'train/' if part == parts[0] else 'test/ or val/'}: an image folder is "
                            f"{name}/train/<class>/* and {name}/test/<class>/* (or val/)")
    classes, other = (sorted(d.name for d in part.iterdir() if d.is_dir()) for part in parts)
    if classes != other or not classes:
        odd = sorted(set(classes) ^ set(other)) or ["none at all"]
        raise UserError(f"{parts[0]} and {parts[1]} must hold the same class folders; not in both: {', '.join(odd[:10])}")
    return DataSet(name, *(read_folder(part, classes) for part in parts), classes)


def from_torchvision(name, data_dir):
    """A data set from torchvision's files under data_dir, downloaded when they are not there."""
    from torchvision import datasets
    kind = getattr(datasets, TORCHVISION[name])
    try:
        try:
            both = [kind(data_dir, train=train) for train in (True, False)]
        except RuntimeError:  # not there, or not whole: torchvision checks their sums
            say(f"downloading {name} to {data_dir}")
            both = [kind(data_dir, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as e:
        raise UserError(
            f"no {name} under {data_dir} and no download ({' '.join(str(e).split())[:80]}): put {kind.base_folder}/ "
            f"(the unpacked {kind.filename}), or {name}.pt, or image folders {name}/train/<class>/ and {name}/test/<class>/ "
            f"there, or name their folder with --data-dir") from None
    splits = [Split(torch.from_numpy(d.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(d.targets)) for d in both]
    return DataSet(name, *splits, list(both[0].classes))


def find(name, data_dir):
    """Finds a data set in the order that this file's first lines state, and keeps what is slow to read as <name>.pt."""
    path = data_dir / f"{name}.pt"
    if name in ("digits", "digits0-4", "digits5-9"):
        return digits(name)
    if path.exists():
        return packed(name, path)
    if (data_dir / name).is_dir():
        found = image_folder(name, data_dir / name)
    elif name in TORCHVISION:
        found = from_torchvision(name, data_dir)
    else:
        raise UserError(f"no data set {name!r}: {data_dir} has neither {name}.pt nor {name}/train and {name}/test; known by "
                        f"name: digits, digits0-4, digits5-9, {', '.join(TORCHVISION)}")
    save(path, {"train": vars(found.train), "test": vars(found.test), "classes": found.classes})
    say(f"wrote {path}, which is read from now on (delete it when the images change)")
    return found


def get(name, data_dir, device="cpu"):
    """The data set `name`, its images on `device`. Rank 0 finds (or downloads) it first, the others read what it wrote."""
    data_dir = Path(data_dir)
    if rank() > 0:
        barrier()
    data = find(name, data_dir)
    if rank() == 0:
        barrier()
    data.train, data.test = data.train.to(device), data.test.to(device)
    return data


def check_fingerprint(data, other, what):
    """UserError unless `other`, the fingerprint found in `what`, is that of `data`."""
    mine = data.fingerprint()
    differ = [f"{k}: {other.get(k)} there, {v} here" for k, v in mine.items() if other.get(k) != v]
    if differ:
        raise UserError(f"{what} belongs to other data ({'; '.join(differ)[:300]}): remake it from this data, or find its data")


def check_batch(data, batch_size):
    """UserError unless a whole batch fits into the training set and each process gets a part of it."""
    if not world() <= batch_size <= len(data.train):
        raise UserError(f"--batch-size {batch_size} with {world()} processes and {len(data.train)} training images of "
                        f"{data.name}: it must be {world()} to {len(data.train)}")


def selection_and_final(n):
    """Indices of the 10 % of the n test examples that select checkpoints, and of the 90 % that are reported (Sec. 4)."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED))
    return order[:round(0.1 * n)], order[round(0.1 * n):]


def draw(b, side, how, generator):
    """Augmentation parameters of b examples, drawn on the CPU: a dict of tensors whose first dimension is b."""
    pad = side // 8  # 4 for 32x32 (Fig. 9), 1 for 8x8
    params = {"crop": torch.randint(0, 2 * pad + 1, (b, 2), generator=generator)}
    if how == "full":
        params["flip"] = torch.rand(b, generator=generator) < 0.5
        params["factor"] = 1 + 0.25 * (2 * torch.rand(b, 3, generator=generator) - 1)
        params["order"] = torch.rand(b, 3, generator=generator).argsort(1)
        params["angle"] = torch.deg2rad(2 * (2 * torch.rand(b, generator=generator) - 1))
    return params


def jitter(x, factor, order):
    """Colour jitter of x (N, C, H, W): brightness, contrast and saturation by factor (N, 3), in each example's own order
    (N, 3). Each is the blend f x + (1 - f) base, with base black, the example's mean grey and its grey image."""
    luma = x.new_tensor([0.299, 0.587, 0.114] if x.shape[1] == 3 else [1 / x.shape[1]] * x.shape[1]).view(1, -1, 1, 1)
    for step in range(3):
        kind = order[:, step].view(-1, 1, 1, 1)
        f = factor.gather(1, order[:, step:step + 1]).view(-1, 1, 1, 1)
        grey = (x * luma).sum(1, keepdim=True)
        base = torch.where(kind == 2, grey, torch.where(kind == 1, grey.mean((2, 3), keepdim=True), 0.0))
        x = (f * x + (1 - f) * base).clamp(0, 1)
    return x


def augment(x, params):
    """Applies draw()'s parameters to x (N, C, H, W) in [0, 1], each example its own: crop, flip, jitter, rotation (Fig. 9)."""
    n, _, h, w = x.shape
    pad, at = h // 8, torch.arange(h, device=x.device)
    rows, columns = params["crop"][:, :1] + at, params["crop"][:, 1:] + at
    if "flip" in params:
        columns = torch.where(params["flip"][:, None], columns.flip(1), columns)
    each = torch.arange(n, device=x.device)[:, None, None]
    x = F.pad(x, (pad,) * 4)[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if "factor" in params:
        x = jitter(x, params["factor"], params["order"])
        cos, sin, zero = params["angle"].cos(), params["angle"].sin(), torch.zeros_like(params["angle"])
        turn = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(n, 2, 3)
        grid = F.affine_grid(turn, x.shape, align_corners=False)
        x = F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return x


def batches(split, batch_size, seed, epoch, how, device):
    """The training batches of an epoch: x (b, C, H, W) augmented and on `device`, y (b,) there too, index (b,) on the CPU.

    Order and augmentation are drawn from (seed, epoch) for the whole global batch, of which each process takes its slice:
    a resumed run, or another number of processes, sees the same. An incomplete last batch is dropped.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(split), generator=generator)
    for i in range(0, len(order) - batch_size + 1, batch_size):
        params = None if how == "none" else draw(batch_size, split.x.shape[2], how, generator)
        mine = torch.arange(batch_size).tensor_split(world())[rank()]
        index = order[i:i + batch_size][mine]
        x = split.pixels(index, device)
        if params is not None:
            x = augment(x, {k: v[mine].to(device, non_blocking=True) for k, v in params.items()})
        yield x, split.y[index].to(device, non_blocking=True), index


def ordered(split, index, batch_size, device):
    """Un-augmented batches (x, y, index) of the examples `index`, in that order."""
    for part in index.split(batch_size):
        yield split.pixels(part, device), split.y[part].to(device), part
