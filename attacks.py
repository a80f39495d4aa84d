"""PGD, FGSM-RS, AutoAttack for L2 and Linf. Copy this file: it needs torch, and pyautoattack for AutoAttack.

Images x are float (N, C, H, W) in [0, 1], labels y int64 (N,); eps and step sizes have the unit of pixels.
`model`, a torch.nn.Module, maps images to logits. Paper: Eq. 1 and 2 (the inner maximisation), A.1, A.5.
"""
import contextlib
import functools
import logging
import numbers
import warnings
from typing import Callable, NamedTuple, Optional

import torch
from torch.nn import functional as F

TINY = 1e-12  # the smallest norm that is divided by: a zero gradient gives a zero step
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")  # standard AutoAttack


@contextlib.contextmanager
def eval_mode(model):
    """Puts the model into eval mode, then each module back into its own. ValueError for a function."""
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training:  # parents first
            if module.training != was_training:
                module.train(was_training)  # not only a flag: LoRA layers merge their weights in it


def l2_norm(delta):
    """The L2 norm of each example: (N, C, H, W) -> (N, 1, 1, 1). Half precision is converted to float32: in
    half precision TINY is 0 and squares overflow."""
    return delta.flatten(1).to(torch.promote_types(delta.dtype, torch.float32)).norm(dim=1).view(-1, 1, 1, 1)


def check_norm(norm):
    """Raises ValueError unless norm is l2 or linf."""
    if norm not in ("l2", "linf"):
        raise ValueError(f"norm {norm!r}: l2 or linf")


def project(delta, eps, norm):
    """The nearest point of the eps-ball: ||delta||_2 <= eps, or |delta| <= eps for linf."""
    check_norm(norm)
    if norm == "linf":
        return delta.clamp(-eps, eps)
    return (delta * (eps / l2_norm(delta).clamp_min(TINY)).clamp_max(1)).to(delta.dtype)


def ascent(grad, norm):
    """The steepest ascent in `norm`: g / ||g||_2, shorter than 1 if ||g||_2 < TINY, or sign(g); 0 for 0."""
    return grad.sign() if norm == "linf" else (grad / l2_norm(grad).clamp_min(TINY)).to(grad.dtype)


def random_start(x, eps, norm, generator=None):
    """A uniform draw from the eps-ball, of x's shape; `generator` must live on x's device."""
    check_norm(norm)
    like_x = {"generator": generator, "device": x.device, "dtype": x.dtype}
    if norm == "linf":
        return (2 * torch.rand(x.shape, **like_x) - 1) * eps
    direction = ascent(torch.randn(x.shape, **like_x), "l2")
    radius = torch.rand((len(x), 1, 1, 1), **like_x) ** (1 / x.shape[1:].numel())
    return direction * radius * eps


def check_logits(model, x, y):
    """Raises ValueError unless the model gives logits (N, C) of two classes or more for images like x, and
    the labels y are among these classes. It runs the model on the first image alone."""
    try:
        with eval_mode(model), torch.no_grad():
            logits = model(x[:1])
    except RuntimeError as e:
        if isinstance(e, torch.cuda.OutOfMemoryError) or "CUDA error" in str(e) or "CUDNN_STATUS" in str(e):
            raise
        raise ValueError(f"the model does not take {x.dtype} images {tuple(x.shape[1:])} on {x.device} "
                         f"({str(e).splitlines()[0]}); for autoattack make it float32: model.float()") from e
    shape = tuple(getattr(logits, "shape", ()))
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(f"the model's output for an image is a {type(logits).__name__} of shape {shape}: it "
                         "must be logits (N, C) of two classes or more (for a single logit z give [0, z])")
    if not 0 <= y.min() <= y.max() < shape[1]:
        raise ValueError(f"labels {int(y.min())} to {int(y.max())} on {shape[1]} classes: give 0 to C - 1")


def check(model, x, y, norm, eps, start=None, steps=0, step_size=0.0):
    """Raises ValueError for invalid arguments. Warns of step sizes that are probably mistakes."""
    check_norm(norm)
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode() forbids the gradients of an attack: use torch.no_grad()")
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        raise ValueError(f"x is a {type(x).__name__}, y a {type(y).__name__}: give images, labels as tensors")
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x is {tuple(x.shape)}, {x.dtype}: give images (N, C, H, W) as floats")
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise ValueError(f"y is {tuple(y.shape)}, {y.dtype}: give a label for each image, (N,) int64")
    if len(x) and not (x.amin() >= 0 and x.amax() <= 1):  # false for nan too
        raise ValueError("x is not in [0, 1]: give pixels, and put the normalisation into the model")
    largest = 1 if norm == "linf" else x.shape[1:].numel()**0.5  # the distance from black to white
    if not isinstance(eps, (numbers.Real, torch.Tensor)) or not 0 <= eps <= largest:
        raise ValueError(f"eps = {eps}: {norm} takes 0 to {largest:.4g}, since pixels are in [0, 1]")
    if start is not None and (start.shape != x.shape or not start.isfinite().all()):
        raise ValueError(f"start is {tuple(start.shape)}: give finite numbers in x's shape {tuple(x.shape)}")
    if not isinstance(steps, numbers.Integral) or steps < 0 or not 0 <= step_size < float("inf"):
        raise ValueError(f"{steps} steps of {step_size}: give whole steps and a finite step_size, 0 or more")
    if steps and eps > 0 and (step_size == 0 or norm == "linf" and step_size > 2 * eps):
        warnings.warn(f"step_size = {step_size}: 0 changes nothing, and in linf more than 2 eps = {2 * eps} "
                      "leads to a corner of the ball; give a size between them", stacklevel=3)
    if len(x):
        check_logits(model, x, y)


def pgd_step(model, x, y, delta, eps, step_size, norm):
    """One iteration of PGD: a step of steepest ascent on the cross-entropy, the projection onto the eps-ball,
    the clamp of x + delta to [0, 1]. Returns the new delta (N, C, H, W) and the cross-entropies (N,) before
    the step. `delta` must require a gradient."""
    losses = F.cross_entropy(model(x + delta).float(), y, reduction="none")
    # Summed, not averaged: an example's gradient must not depend on the batch around it.
    grad, = torch.autograd.grad(losses.sum(), delta)  # only of the input: no weight gradients are computed
    delta = project(delta.detach() + step_size * ascent(grad, norm), eps, norm)
    return (x + delta).clamp(0, 1) - x, losses.detach()


def first_delta(x, start, eps, norm):
    """The delta from which an attack starts: `start`, moved into the ball and the box, or 0 for None."""
    delta = torch.zeros_like(x) if start is None else project(start.detach().to(x), eps, norm)
    return (x + delta).clamp(0, 1) - x


def pgd(model, x, y, *, eps, step_size, steps=7, norm="l2", start=None, step_function=pgd_step,
        check_input=True):
    """Projected gradient ascent on the cross-entropy (Madry et al. 2018; A.1). Returns the last x + delta.

    It starts at delta = `start`, for instance random_start(x, eps, norm), or at 0. The model is attacked in
    eval mode; its mode, parameters and their .grad are left as they were. `step_function` does one iteration,
    say a compiled pgd_step. Raises ValueError as check() does; check_input=False saves the wait for a GPU.
    """
    if check_input:
        check(model, x, y, norm, eps, start, steps, step_size)
    x = x.detach()
    if len(x) == 0:
        return x
    delta = first_delta(x, start, eps, norm)
    with eval_mode(model), torch.enable_grad():
        for _ in range(steps):
            delta, _ = step_function(model, x, y, delta.requires_grad_(), eps, step_size, norm)
    return (x + delta).clamp(0, 1)


def fgsm_rs(model, x, y, *, eps, norm="l2", start=None, step_function=pgd_step, check_input=True):
    """FGSM from a random start (Wong et al. 2020; A.5): one projected step of 1.25 eps. `start`: drawn
    uniformly from the ball if it is None. The rest is as in pgd."""
    if check_input:
        check(model, x, y, norm, eps, start)
    start = random_start(x, eps, norm) if start is None else start
    return pgd(model, x, y, eps=eps, step_size=1.25 * eps, steps=1, norm=norm, start=start,
               step_function=step_function, check_input=False)


def pgd_authors(model, x, y, *, eps, step_size, steps=7, norm="l2", start=None,
                step_function=pgd_step, check_input=True, limit=10.0):
    """PGD as in the code of the paper's authors. Returns, for each example, what has the highest loss: the
    start (0 if it is None, as in pgd) or one of the first steps - 1 iterates.

    The attack ends for the whole batch at the first iterate whose mean cross-entropy exceeds `limit`, and
    leaves that iterate out (except the start). Their limit is 10 for the mean of the loss that they train
    with, in which the weights of Eq. 2 have the mean 1: limit = 10 (w_A |A| + |B|) / (N w_A).
    """
    if check_input:
        check(model, x, y, norm, eps, start, steps, step_size)
    x = x.detach()
    if len(x) == 0:
        return x
    delta = first_delta(x, start, eps, norm)
    best_delta, highest_loss = delta, torch.full((len(x),), -float("inf"), device=x.device)
    with eval_mode(model), torch.enable_grad():
        for _ in range(steps):
            next_delta, losses = step_function(model, x, y, delta.requires_grad_(), eps, step_size, norm)
            if not losses.mean() <= limit:  # true for nan too
                break
            better = losses > highest_loss
            best_delta = torch.where(better.view(-1, 1, 1, 1), delta.detach(), best_delta)
            highest_loss, delta = torch.where(better, losses, highest_loss), next_delta
    return (x + best_delta.detach()).clamp(0, 1)


class Attack(NamedTuple):
    """An attack that training can use: sat.py --attack NAME.

    function(model, x, y, **settings) returns adversarial images of x's shape. Of the settings
    eps, norm, step_size, steps, start, step_function, limit, check_input=False it gets those that it names.
    It must leave nothing in .grad: use torch.autograd.grad, not backward(). With --compile step it must not
    read the value of a tensor.
    """
    function: Callable
    gradient_steps: Optional[int] = None  # on an example, by which costs are counted; None: --steps
    random_start: bool = False            # it takes `start`, and always gets a random one


ATTACKS = {  # an attack of your own is one more line
    "pgd": Attack(pgd),
    "fgsm-rs": Attack(fgsm_rs, gradient_steps=1, random_start=True),
    "pgd-authors": Attack(pgd_authors),
}


def usable_attacks(attacks, n_classes):
    """Those of the attacks that exist for this many classes: apgd-t's DLR loss needs four. Raises ValueError
    if none is left, and for names that are not in STANDARD."""
    usable = [a for a in attacks if n_classes >= 4 or a != "apgd-t"]
    if not usable or not set(attacks) <= set(STANDARD):
        raise ValueError(f"{' '.join(attacks) or 'no attack'} on {n_classes} classes: valid are "
                         f"{' '.join(usable_attacks(STANDARD, n_classes))}")
    return usable


def square_takes(height, width, norm):
    """Whether AutoAttack's Square takes this size. In L2 its first tiles overrun 12, 14, 18, 19 and 24."""
    tile = height // 5
    first = (height - 5 * tile) // 2
    fits = tile == 1 or tile > 1 and all(first + n // tile * tile <= n for n in (height, width))
    return norm == "linf" or fits


def finite_logits(model, x):
    """The logits (N, C) for x. Raises FloatingPointError unless all are finite."""
    with torch.no_grad():
        logits = model(x)
    if not logits.isfinite().all():
        raise FloatingPointError("the network's logits are not finite: no robust accuracy can be given")
    return logits


def has_zero_gradient(model, x, y):
    """Where the gradient of the cross-entropy with respect to the image is 0, to within TINY: bool (N,)."""
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        grad, = torch.autograd.grad(F.cross_entropy(model(x).float(), y, reduction="sum"), x)
    return l2_norm(grad).flatten() < TINY


def attack_batch(model, x, y, *, eps, norm, attacks, seed, precision=contextlib.nullcontext):
    """AutoAttack on one batch. Returns (clean, robust), bool (N,) each. `precision` is as in autoattack.

    Raises ValueError as check() does, and for sizes that square does not take; FloatingPointError for logits
    that are not finite (the package takes them for robust); ArithmeticError for images outside ball or box,
    or if more are right after it."""
    from pyautoattack import AutoAttack
    check(model, x, y, norm, eps)
    if "square" in attacks and not square_takes(*x.shape[2:], norm):
        raise ValueError(f"AutoAttack's square takes no images of {x.shape[2]}x{x.shape[3]} pixels in l2: "
                         "leave it out, or resize them")
    clean = finite_logits(model, x).argmax(1) == y
    with precision(), torch.random.fork_rng([x.device] if x.is_cuda else []):  # the package seeds torch
        logits = finite_logits(model, x)
        n_clean = int((logits.argmax(1) == y).sum())
        aa = AutoAttack(model, norm=norm.capitalize(), eps=eps, device=x.device, seed=seed)
        aa.attacks_to_run = usable_attacks(attacks, logits.shape[1])
        aa.apgd_targeted.n_target_classes = aa.fab.n_target_classes = min(9, logits.shape[1] - 1)
        aa.square.eta_rectangles = functools.cache(aa.square.eta_rectangles)  # else each query makes them
        x_adv, predicted = aa.run_standard_evaluation(x, y, batch_size=len(x))
    shift = l2_norm(x_adv - x) if norm == "l2" else (x_adv - x).abs()
    if shift.max() > eps + 1e-5 or x_adv.min() < 0 or x_adv.max() > 1:
        raise ArithmeticError(f"AutoAttack left the {norm} ball of {eps} or the box [0, 1] ({shift.max():g})")
    right = predicted == y
    if right.sum() > n_clean:
        raise ArithmeticError(f"{int(right.sum())} right after AutoAttack, {n_clean} before: is it random?")
    unbroken = clean & ~right & (finite_logits(model, x_adv).argmax(1) == y)  # not broken outside `precision`
    if precision is not contextlib.nullcontext and unbroken.any():
        right[unbroken] = attack_batch(model, x[unbroken], y[unbroken], eps=eps, norm=norm, attacks=attacks,
                                       seed=seed)[1]
    return clean, clean & right


def autoattack(model, x, y, *, eps, norm="l2", attacks=STANDARD, batch_size=250, seed=0,
               precision=contextlib.nullcontext):
    """AutoAttack (Croce and Hein 2020): which examples are right, and stay right, bool (N,) each on the CPU.

    The examples are attacked in batches of `batch_size`, batch b with the seed seed + b: report both, since
    they change the result. The package logs its progress and warnings to the logger "auto-attack". This
    function warns there if apgd-ce is the only attack and its gradient is 0 for more than 1 % of the right
    examples (a saturated softmax). With precision=f the attack runs in the context f(), say of TF32. Clean
    accuracy is measured outside it, and what breaks only inside it is attacked again. Raises as attack_batch.
    """
    if batch_size < 1 or len(x) != len(y):
        raise ValueError(f"{len(x)} images, {len(y)} labels, batch_size {batch_size}: give a label for each")
    clean, robust, zero_gradient = torch.zeros(3, len(y), dtype=torch.bool)
    with eval_mode(model):
        device = next(model.parameters(), x).device
        trainable = [p for p in model.parameters() if p.requires_grad]
        for p in trainable:  # backward passes go to the input alone, and .grad stays as it was
            p.requires_grad_(False)
        try:
            for b, i in enumerate(range(0, len(y), batch_size)):
                batch = slice(i, i + batch_size)
                # Contiguous: the package takes no image in channels_last, as permuted numpy arrays are.
                images, labels = x[batch].to(device, torch.float32).contiguous(), y[batch].to(device)
                clean[batch], robust[batch] = attack_batch(
                    model, images, labels, eps=eps, norm=norm, attacks=attacks, seed=seed + b,
                    precision=precision)
                if set(attacks) == {"apgd-ce"}:
                    zero_gradient[batch] = has_zero_gradient(model, images, labels).cpu() & clean[batch]
        finally:
            for p in trainable:
                p.requires_grad_()
    if zero_gradient.sum() > 0.01 * clean.sum():
        logging.getLogger("auto-attack").warning(
            f"gradient masking: the gradient is 0 at {int(zero_gradient.sum())} of the {int(clean.sum())} "
            "right examples. apgd-ce alone then overestimates: use standard AutoAttack")
    return clean, robust
