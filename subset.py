"""Chooses A, the subset to attack: whole classes or single examples, at random or by difficulty scores, those
of rank.py or the user's own. Also the weight w_A of its loss (Sec. 3.2 and 3.3)."""
import hashlib

import numpy
import torch

import flags
from common import UserError, say


def subset_size(amount, n):
    """|A| from a fraction (float) of n classes or examples, or a number (int). UserError outside 1..n."""
    amount = getattr(amount, "item", lambda: amount)()  # of numpy or torch
    k = round(amount * n) if isinstance(amount, float) else amount
    if not isinstance(k, int) or not 1 <= k <= n:
        raise UserError(f"|A| = {amount} comes to {k} of {n}: give a --size of 1 to {n}, or a "
                        "--frac that comes to such a number")
    return k


def choose_A(split, y, classes, *, amount=None, names=None, subset=None, order="hardest", scores=None,
             seed=0):
    """The subset A as bool (N,), chosen once, before training (Sec. 3.3).

    y (N,): the labels. split: "none", "full", "esat" (examples) or "csat" (classes). amount: how many
    examples or classes, as a fraction (float) or a number (int). order: "hardest" or "easiest" by `scores`
    (N,), higher = harder; a class has the mean score of its examples (Eq. 3), ties go by index. Or "random",
    by `seed` ("redrawn" too: train() then draws another A every epoch). names: the classes of csat, in place
    of amount and order. subset: A itself, bool (N,) or indices, in place of these. Raises UserError for
    what cannot be chosen.
    """
    if split not in ("none", "full", "esat", "csat") or order not in flags.ORDERS:
        raise UserError(f"{split=}, {order=}: valid are none, full, esat, csat; {', '.join(flags.ORDERS)}")
    if split in ("none", "full"):
        return torch.full(y.shape, split == "full")
    if names:
        unknown = sorted(set(names) - set(classes))
        if unknown:
            raise UserError(f"unknown class {', '.join(unknown)}; valid: {', '.join(classes)} (by --dataset)")
        return torch.isin(y, torch.tensor([classes.index(c) for c in names]))
    if subset is not None:
        return subset_mask(subset, len(y))
    n, unit = (len(classes), "classes") if split == "csat" else (len(y), "examples")
    k = subset_size(amount, n)
    if order in ("random", "redrawn"):
        # A stream of its own: the batches of an epoch are dealt by a permutation drawn from the same seed.
        chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + 700_000))[:k]
    else:
        check_scores(scores, len(y))
        if split == "csat":
            scores = class_means(scores, y, n)
            if scores.isnan().any():
                raise UserError(f"{classes[int(scores.isnan().int().argmax())]} has no training example")
        descending = {"hardest": True, "easiest": False}[order]
        chosen = scores.double().argsort(descending=descending, stable=True)[:k]
        tied = scores == scores[chosen[-1]]
        if tied.sum() > tied[chosen].sum():
            say(f"note: {int(tied.sum()):,} {unit} share the score at the edge of A; of these the first "
                f"{int(tied[chosen].sum()):,}, by index, are in A")
    return torch.isin(y if split == "csat" else torch.arange(n), chosen)


def subset_mask(subset, n):
    """A subset of n examples, bool (n,) or indices, as bool (n,). UserError unless it fits and has any."""
    if subset.dtype == torch.bool and len(subset) != n:
        raise UserError(f"--subset is a mask of {len(subset):,} values: give one for each of {n:,} examples")
    if subset.dtype != torch.bool:
        if subset.is_floating_point() or len(subset.unique()) < len(subset):
            dtype = str(subset.dtype).removeprefix("torch.")
            raise UserError(f"--subset has {len(subset):,} numbers of {dtype}; valid: a bool mask, or whole "
                            "indices from 0, each once")
        if len(subset) == 0 or not 0 <= subset.min() <= subset.max() < n:
            ends = f" {int(subset.min())} to {int(subset.max())}" if len(subset) else ""
            raise UserError(f"--subset has {len(subset):,} indices{ends}; valid: one or more of 0 to "
                            f"{n - 1:,}")
        subset = torch.isin(torch.arange(n), subset)
    if not subset.any():
        raise UserError("--subset is a mask without any example: set one or more, or give --split none")
    return subset


def check_scores(scores, n, what="the scores"):
    """Raises UserError unless scores are a tensor of n finite numbers that are not all equal."""
    if not isinstance(scores, torch.Tensor):
        raise UserError(f"{what} are a {type(scores).__name__}: give a tensor with one for each example")
    finite = scores.double().isfinite()
    if finite.shape != (n,) or not finite.all():
        raise UserError(f"{what}: {int(finite.sum()):,} finite numbers in shape {tuple(finite.shape)}; there "
                        f"must be one for each of the {n:,} training examples, higher = harder")
    if n > 1 and scores.min() == scores.max():
        raise UserError(f"{what} are all {scores[0]:g}: they order nothing (vog needs two epochs or more)")


def tensor_hash(tensor):
    """A short hash of a tensor's values, by which results name their scores or indices, and last.pt its A."""
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


def class_means(scores, y, n_classes):
    """Mean score of each class (Eq. 3, right): (N,), (N,) -> (n_classes,) float64."""
    total = torch.zeros(n_classes, dtype=torch.float64).index_add(0, y, scores.double())
    return total / torch.bincount(y, minlength=n_classes)


def weight_A(weight, n_A, n):
    """w_A of Eq. 2, with w_B = 1, for |A| = n_A of N = n examples (Sec. 3.2 and 4.3).

    weight: "vanilla" (1), "balanced" (|B|/|A|), "emphasis" ((1 + 10 |A|/N) |B|/|A|, which is 2 |B|/|A| at
    10 % and 10 |B|/|A| at 90 %), or w_A as a number. 1 if A or B is empty.
    """
    if not 0 <= n_A <= n:
        raise ValueError(f"|A| = {n_A} of {n} examples")
    if n_A in (0, n):
        return 1.0
    balanced = (n - n_A) / n_A
    named = {"vanilla": 1.0, "balanced": balanced, "emphasis": (1 + 10 * n_A / n) * balanced}
    if isinstance(weight, str) and weight not in named:
        raise ValueError(f"weight {weight!r}: {', '.join(named)}, or a number")
    return named.get(weight, weight)


def ordering_scores(scores, metric, split, y):
    """The scores by which A is chosen. For esat, vog is normalised within each class, since the size of the
    gradients depends on the class (Agarwal et al. 2022); csat averages raw scores. metric: None for the
    user's own scores."""
    return normalised_within_classes(scores, y) if metric == "vog" and split == "esat" else scores


def normalised_within_classes(scores, y):
    """Scores (N,) normalised to mean 0 and standard deviation 1 within each class of y."""
    mean = class_means(scores, y, int(y.max()) + 1)
    std = class_means((scores.double() - mean[y])**2, y, len(mean)).sqrt()
    return (scores.double() - mean[y]) / std[y].clamp_min(1e-12)


REBUILD = numpy.zeros(0).__reduce__()[0]  # by which arrays are unpickled; numpy 1 had another name for it
ARRAY = [REBUILD, (REBUILD, "numpy.core.multiarray._reconstruct"), numpy.ndarray, numpy.dtype,
         *(type(numpy.dtype(code)) for code in ("?", "u1", "i2", "i4", "i8", "f2", "f4", "f8"))]

FILES = {  # {flag: (numpy's kinds of numbers that its file may hold, what is valid)}
    "scores": ("iuf", "N numbers, or a scores.pt of rank.py,"),
    "ranking": ("iu", "the N indices from 0, hardest first,"),
    "subset": ("iub", "a bool mask (N,), or indices,")}


def read_file(flag, path, metric):
    """Reads the FILE of --scores, --ranking or --subset. Returns scores, higher = harder, float64 (N,), also
    for a ranking; or a subset, bool (N,) or ascending int64 indices; and the data's fingerprint, if it is a
    scores.pt of rank.py (`metric` picks its scores), else None. UserError for other content."""
    kinds, valid = FILES[flag]
    fingerprint = None
    try:
        if path.suffix in (".pt", ".pth"):
            with torch.serialization.safe_globals(ARRAY):  # the authors' rankings are pickled arrays
                content = torch.load(path, weights_only=True, map_location="cpu")
        elif path.exists() and path.suffix not in (".npy", ".npz"):
            raise ValueError(f"its name ends in {path.suffix!r}")
        else:
            content = numpy.load(path, allow_pickle=False)
        if isinstance(content, numpy.lib.npyio.NpzFile):
            if len(content) != 1:
                raise ValueError(f"it holds {len(content)} arrays, not one")
            content, = content.values()
        if isinstance(content, dict) and "fingerprint" in content:
            if flag != "scores":
                raise ValueError("it holds scores: give it with --scores")
            if metric not in content:
                raise ValueError(f"it has no {metric} scores: give another --metric")
            content, fingerprint = content[metric], content["fingerprint"]
        if isinstance(content, torch.Tensor):  # perhaps with a gradient, or bfloat16, which numpy lacks
            content = content.detach().float() if content.dtype == torch.bfloat16 else content.detach()
        content = numpy.atleast_1d(numpy.asarray(content).squeeze())
        if content.ndim != 1 or content.dtype.kind not in kinds:
            raise ValueError(f"it holds {content.dtype} {content.shape}")
        is_order = numpy.array_equal(numpy.sort(content), numpy.arange(len(content)))
        if flag == "ranking" and not is_order:
            raise ValueError("its numbers are not 0 to N - 1, each once")
    except Exception as e:  # numpy and torch raise many kinds on foreign files
        reason = " ".join(str(e).split()).partition(". ")[0][:100]  # torch adds advice on its own flags
        raise UserError(f"--{flag} {path}: {reason}; valid: {valid} in a .pt or .pth, .npy, .npz") from None
    if flag == "ranking":
        content = len(content) - numpy.argsort(content)  # argsort of an order: the places
    elif flag == "scores" and is_order and len(content) > 1:
        say(f"note: {path} holds each of 0 to {len(content) - 1:,} once, read as scores, higher = harder; "
            "for indices, hardest first, use --ranking")
    elif flag == "subset":
        content = content if content.dtype.kind == "b" else numpy.sort(content.astype(numpy.int64))
        return torch.from_numpy(content), None
    return torch.from_numpy(content.astype(numpy.float64)), fingerprint
