"""Chooses the subset A, which is attacked: by class, at random, or by difficulty scores, which are rank.py's
or the user's own. Also the weight w_A of its loss (Sec. 3.2 and 3.3)."""
import hashlib

import numpy
import torch

import flags
from common import UserError, say

REBUILD = numpy.zeros(0).__reduce__()[0]  # by which arrays are unpickled; numpy 1 had another name for it
ARRAY = [REBUILD, (REBUILD, "numpy.core.multiarray._reconstruct"), numpy.ndarray, numpy.dtype,
         *(type(numpy.dtype(kind)) for kind in ("i4", "i8", "f4", "f8"))]


def subset_size(amount, n, unit):
    """|A| from a fraction (float) of n, or a number (int). Raises UserError outside 1..n."""
    k = round(amount * n) if isinstance(amount, float) else amount
    if not isinstance(k, int) or not 1 <= k <= n:
        raise UserError(f"|A| = {amount} of {n} {unit} comes to {k}: choose 1 to {n} with --size or --frac")
    return k


def choose_A(split, y, classes, *, amount=None, names=None, order="hardest", scores=None, seed=0):
    """The subset A as bool (N,), chosen once, before training (Sec. 3.3).

    y (N,): the labels. split: "none", "full", "esat" (examples) or "csat" (classes). amount: how many
    examples or classes, as a fraction (float) or a number (int). order: "hardest" or "easiest" by `scores`
    (N,), higher = harder; a class has the mean score of its examples (Eq. 3), ties go by index. Or "random",
    by `seed` ("redrawn" too: train() then draws another A every epoch). names: the classes of csat, in place
    of amount and order. Raises UserError for what cannot be chosen.
    """
    if split not in ("none", "full", "esat", "csat") or order not in flags.ORDERS:
        raise UserError(f"{split!r}, {order!r}: valid are none, full, esat, csat; {', '.join(flags.ORDERS)}")
    if split in ("none", "full"):
        return torch.full(y.shape, split == "full")
    if names:
        unknown = sorted(set(names) - set(classes))
        if unknown:
            raise UserError(f"unknown class {', '.join(unknown)}; valid: {', '.join(classes)} (by --dataset)")
        return torch.isin(y, torch.tensor([classes.index(c) for c in names]))
    n, unit = (len(classes), "classes") if split == "csat" else (len(y), "examples")
    k = subset_size(amount, n, unit)
    if order in ("random", "redrawn"):
        # A stream of its own: the batches of an epoch are dealt by a permutation drawn from the same seed.
        chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + 700_000))[:k]
    else:
        check_scores(scores, len(y))
        if split == "csat":
            scores = class_means(scores, y, n)
        descending = {"hardest": True, "easiest": False}[order]
        chosen = scores.double().argsort(descending=descending, stable=True)[:k]
        tied = scores == scores[chosen[-1]]
        if tied.sum() > tied[chosen].sum():
            say(f"note: {int(tied.sum()):,} {unit} share the score at the edge of A; of these the first "
                f"{int(tied[chosen].sum()):,}, by index, are in A")
    return torch.isin(y if split == "csat" else torch.arange(n), chosen)


def check_scores(scores, n, what="the scores"):
    """Raises UserError unless scores are n finite numbers that are not all equal."""
    is_finite = scores.double().isfinite() if isinstance(scores, torch.Tensor) else torch.zeros(0)
    if is_finite.shape != (n,) or not is_finite.all():
        raise UserError(f"{what}: {int(is_finite.sum()):,} finite numbers in shape {tuple(is_finite.shape)}; "
                        f"there must be one for each of the {n:,} training examples, higher = harder")
    if n > 1 and scores.min() == scores.max():
        raise UserError(f"{what} are all {scores[0]:g}: they order nothing (vog needs two epochs or more)")


def scores_hash(scores):
    """The short hash by which a result.json names the scores (N,) that chose its A."""
    return hashlib.sha256(scores.numpy().tobytes()).hexdigest()[:16]


def class_means(scores, y, n_classes):
    """Mean score of each class (Eq. 3, right): (N,), (N,) -> (n_classes,) float64."""
    total = torch.zeros(n_classes, dtype=torch.float64).index_add(0, y, scores.double())
    return total / torch.bincount(y, minlength=n_classes)


def weight_A(kind, n_A, n):
    """w_A of Eq. 2, with w_B = 1, for |A| = n_A of N = n examples (Sec. 3.2 and 4.3).

    kind: "vanilla" (1), "balanced" (|B|/|A|), "emphasis" ((1 + 10 |A|/N) |B|/|A|, which is 2 |B|/|A| at 10 %
    and 10 |B|/|A| at 90 %), or w_A as a number. 1 if A or B is empty.
    """
    if not 0 <= n_A <= n:
        raise ValueError(f"|A| = {n_A} of {n} examples")
    if n_A in (0, n):
        return 1.0
    balanced = (n - n_A) / n_A
    named = {"vanilla": 1.0, "balanced": balanced, "emphasis": (1 + 10 * n_A / n) * balanced}
    if isinstance(kind, str) and kind not in named:
        raise ValueError(f"weight {kind!r}: {', '.join(named)}, or a number")
    return named.get(kind, kind)


def within_class(scores, y):
    """Scores (N,) normalised to mean 0 and standard deviation 1 within each class of y."""
    mean = class_means(scores, y, int(y.max()) + 1)
    std = class_means((scores.double() - mean[y])**2, y, len(mean)).sqrt()
    return (scores.double() - mean[y]) / std[y].clamp_min(1e-12)


def read_scores(path):
    """The scores of --scores FILE, N numbers in a tensor or an array, higher = harder, as float64 (N,). A
    permutation of the integers 0 to N - 1 is read as an order of the examples, hardest first. One of
    1 to N, or of floats, could be an order or ranks: UserError, as for anything else."""
    try:
        if path.suffix in (".pt", ".pth"):
            with torch.serialization.safe_globals(ARRAY):  # the authors' rankings are pickled arrays
                numbers = torch.load(path, weights_only=True, map_location="cpu")
        else:
            numbers = numpy.load(path, allow_pickle=False)
        if isinstance(numbers, numpy.lib.npyio.NpzFile):
            numbers, = numbers.values()
        numbers = numpy.asarray(numbers).squeeze()
        if numbers.ndim != 1 or numbers.dtype.kind not in "iuf":
            raise ValueError(f"it holds {numbers.dtype} {numbers.shape}")
    except Exception as e:  # numpy and torch raise many kinds on foreign files
        reason = " ".join(str(e).split()).partition(". ")[0][:100]  # torch adds advice on its own flags
        raise UserError(f"--scores {path}: {reason}; valid: N numbers in a .pt or .pth, .npy, .npz") from None
    n, ascending = len(numbers), numpy.sort(numbers)
    is_order, is_ranks = (n > 0 and numpy.array_equal(ascending, numpy.arange(n) + k) for k in (0, 1))
    if is_ranks or is_order and numbers.dtype.kind == "f":
        raise UserError(f"--scores {path} holds each of {ascending[0]:g} to {ascending[-1]:g} once: an order "
                        "or ranks? Give an order as integers from 0, hardest first, or scores not all whole")
    if is_order:
        say(f"{path} is read as an order of the indices, hardest first (scores must not all be whole)")
        numbers = n - numpy.argsort(numbers)  # argsort of an order: the place of each example in it
    return torch.from_numpy(numbers.astype(numpy.float64))
