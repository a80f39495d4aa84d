"""PGD and FGSM-RS for L2 and Linf, and the one wrapper of AutoAttack. Needs torch (and pyautoattack for the
last) alone.

Images x are float (N, C, H, W) in [0, 1], labels y int64 (N,), eps and step sizes in the same pixel units.
`model` maps images to logits. Paper: Eq. 1 and 2 (the inner maximisation), Sec. A.1 (PGD-7), Sec. A.5
(FGSM-RS).
"""
import contextlib
import logging
import os
from pathlib import Path

import torch
from torch.nn import functional as F

TINY = 1e-12  # keeps 0 / 0 out of the norms: a zero gradient gives a zero step
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")  # standard AutoAttack


@contextlib.contextmanager
def eval_mode(model):
    """Puts every module of the model into eval mode, and those that were training back at the end."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def fixed_weights(model):
    """No parameter asks for a gradient inside: backward passes go to the input alone, and .grad stays as it
    was."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_()


def l2_norm(delta):
    """(N, C, H, W) -> (N, 1, 1, 1): the L2 norm of each example."""
    return delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def check_norm(norm):
    """ValueError for a norm that is none of ours."""
    if norm not in ("l2", "linf"):
        raise ValueError(f"norm {norm!r}: l2 or linf")


def project(delta, eps, norm):
    """The nearest point of the eps-ball: ||delta||_2 <= eps, or |delta| <= eps for linf."""
    check_norm(norm)
    if norm == "linf":
        return delta.clamp(-eps, eps)
    return delta * (eps / l2_norm(delta).clamp_min(TINY)).clamp_max(1)


def ascent(grad, norm):
    """The direction of steepest ascent of length 1 in `norm`: g / ||g||_2, or sign(g). Zero where the
    gradient is."""
    return grad.sign() if norm == "linf" else grad / l2_norm(grad).clamp_min(TINY)


def random_start(x, eps, norm, generator=None):
    """A uniform draw from the eps-ball, of x's shape; `generator` must live on x's device."""
    check_norm(norm)
    how = {"generator": generator, "device": x.device, "dtype": x.dtype}
    if norm == "linf":
        return (2 * torch.rand(x.shape, **how) - 1) * eps
    direction = ascent(torch.randn(x.shape, **how), "l2")
    radius = torch.rand((len(x), 1, 1, 1), **how) ** (1 / max(1, x[0].numel() if len(x) else 1))
    return direction * radius * eps


def pgd_step(model, x, y, delta, eps, step_size, norm):
    """One iteration of PGD: delta (N, C, H, W), which must ask for a gradient, after a step of steepest
    ascent on the cross-entropy, the projection onto the eps-ball and the clamp of x + delta to [0, 1]."""
    # Summed, not averaged: an example's gradient must not depend on the batch around it.
    loss = F.cross_entropy(model(x + delta).float(), y, reduction="sum")
    # with respect to the input alone: no weight gradients are computed
    grad, = torch.autograd.grad(loss, delta)
    delta = project(delta.detach() + step_size * ascent(grad, norm), eps, norm)
    return (x + delta).clamp(0, 1) - x


def pgd(model, x, y, *, eps, step_size, steps=7, norm="l2", start=None, step=pgd_step, values=True):
    """Projected gradient ascent on the cross-entropy (Madry et al. 2018; paper, A.1). Returns the last
    iterate x + delta.

    It starts at delta = `start` (say random_start(x, eps, norm)), or at 0. The model is attacked in eval
    mode; its mode, parameters and their .grad are left as they were. An empty batch, eps = 0 and zero
    gradients are valid. `step`: what does one iteration, say a compiled pgd_step. Raises ValueError as
    check() does (`values` as there).
    """
    check(x, y, norm, eps, values)
    if start is not None and start.shape != x.shape:
        raise ValueError(f"start is {tuple(start.shape)}, x {tuple(x.shape)}: a perturbation for each image")
    if not isinstance(steps, int) or steps < 0 or not isinstance(step_size, (int, float)) \
            or not 0 <= step_size < float("inf"):
        raise ValueError(f"{steps} steps of {step_size}: 0 or more, of a finite size")
    x = x.detach()
    if len(x) == 0:
        return x
    delta = torch.zeros_like(x) if start is None else (x + project(start, eps, norm)).clamp(0, 1) - x
    with eval_mode(model), torch.enable_grad():
        for _ in range(steps):
            delta = step(model, x, y, delta.requires_grad_(), eps, step_size, norm)
    return (x + delta).clamp(0, 1)


def fgsm_rs(model, x, y, *, eps, step_size=None, norm="l2", start=None, step=pgd_step, values=True):
    """FGSM from a random start (Wong et al. 2020; paper, A.5): one step of 1.25 eps (or `step_size`),
    projected."""
    check(x, y, norm, eps, values)
    start = random_start(x, eps, norm) if start is None else start
    step_size = 1.25 * eps if step_size is None else step_size
    return pgd(model, x, y, eps=eps, step_size=step_size, steps=1, norm=norm, start=start, step=step,
               values=False)


class Watch(logging.Handler):
    """Turns what pyautoattack logs into progress (debug lines) and into warnings, each kind of which is
    passed on once."""

    def __init__(self, progress, warn):
        super().__init__()
        self.progress, self.warn, self.warned = progress, warn, set()

    def emit(self, record):
        """Called by logging with every record of the package."""
        text = record.getMessage()
        kind = "".join(c for c in text if not c.isdigit())
        if record.levelno < logging.WARNING:
            self.progress(text)
        elif kind not in self.warned:
            self.warned.add(kind)
            self.warn(f"AutoAttack warns: {text}")


def usable(attacks, n_classes):
    """The attacks that exist for this many classes: apgd-t's loss needs four (AutoAttack, DLR loss). Raises
    ValueError for none, and for names that are not in STANDARD."""
    found = [a for a in attacks if n_classes >= 4 or a != "apgd-t"]
    if not found or not set(attacks) <= set(STANDARD):
        raise ValueError(f"{' '.join(attacks) or 'no attack'} on {n_classes} classes: valid are "
                         f"{' '.join(usable(STANDARD, n_classes))}")
    return found


def check(x, y, norm, eps, values=True):
    """ValueError unless x, y, norm and eps are what an attack takes. `values`: that x lies in [0, 1] too, for
    which a GPU must be waited for."""
    check_norm(norm)
    if not isinstance(eps, (int, float, torch.Tensor)) or not 0 <= eps < float("inf"):
        raise ValueError(f"eps = {eps}: a finite number of 0 or more, pixels in [0, 1]")
    if not isinstance(x, torch.Tensor) or x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x is {tuple(x.shape)}, {x.dtype}: give images (N, C, H, W) as floats")
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise ValueError(f"y is {tuple(y.shape)}, {y.dtype}: give a label for each of the {len(x)} images, "
                         "int64")
    if values and len(x) and not (x.amin() >= 0 and x.amax() <= 1):  # false of nan too
        raise ValueError("x is not in [0, 1]: give pixels, and put the normalisation into the model")


def attack_chunk(model, x, y, *, eps, norm, attacks, seed):
    """AutoAttack on one batch: (x_adv, clean, robust), clean and robust being bool (N,).

    Raises FloatingPointError for logits that are not finite (the package would count them as robust),
    ArithmeticError for an adversarial example outside the ball or the box and for a robust accuracy above the
    clean one.
    """
    from pyautoattack import AutoAttack
    check(x, y, norm, eps)
    with torch.no_grad():
        logits = model(x)
    aa = AutoAttack(model, norm={"l2": "L2", "linf": "Linf"}[norm], eps=eps, version="standard",
                    device=x.device, seed=seed)
    aa.attacks_to_run = usable(attacks, logits.shape[1])
    aa.apgd_targeted.n_target_classes = aa.fab.n_target_classes = min(9, logits.shape[1] - 1)
    x_adv, predicted = aa.run_standard_evaluation(x, y, batch_size=len(x))
    with torch.no_grad():
        finite = logits.isfinite().all() and model(x_adv).isfinite().all()
    if not finite:
        raise FloatingPointError("the network's logits are not finite: no robust accuracy can be given")
    size = l2_norm(x_adv - x) if norm == "l2" else (x_adv - x).abs()
    if size.max() > eps + 1e-5 or x_adv.min() < 0 or x_adv.max() > 1:
        raise ArithmeticError(f"AutoAttack left the {norm} ball of {eps} or the box [0, 1] (it reached "
                              f"{size.max():.6f})")
    clean, right = logits.argmax(1) == y, predicted == y
    if right.sum() > clean.sum():
        raise ArithmeticError(f"AutoAttack leaves {int(right.sum())} of {len(y)} right, more than the "
                              f"{int(clean.sum())} that were right "
                              f"before: the network does not give the same logits twice")
    return x_adv, clean, clean & right


@contextlib.contextmanager
def listening(watch):
    """Sends what pyautoattack logs to `watch` alone, and restores the logger."""
    log = logging.getLogger("auto-attack")
    before = log.level, log.propagate
    log.addHandler(watch)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(watch)
        log.setLevel(before[0])
        log.propagate = before[1]


def keep(path, value):
    """torch.save, whole or not at all: to a temporary file beside `path`, synced, and put in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            torch.save(value, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # torch.save turns the first into the second
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {e}") from None


def autoattack(model, x, y, *, eps, norm="l2", attacks=STANDARD, batch_size=250, seed=0, folder=None, rank=0,
               world=1,
               progress=lambda done, robust, text: None, warn=print):
    """AutoAttack (Croce and Hein 2020): which examples are right (clean) and stay right (robust), two bool
    (N,) on the CPU.

    x: images, or anything whose slices x[i:j] are images. The examples are attacked in fixed chunks of
    `batch_size`, chunk c seeded by seed + c: batch size and seed change the result, and belong beside it.
    `folder` keeps finished chunks, from which a later call goes on: it belongs to this model, data and
    settings alone. Of several processes, number `rank` of `world` does every world-th chunk; the flags of the
    other chunks are False, so that a sum over the processes gives all. `progress(examples done, robust, what
    is going on)`. Errors: as attack_chunk.
    """
    flags = torch.zeros(2, len(y), dtype=torch.bool)  # clean, robust
    device, done = next(model.parameters()).device, 0
    watch = Watch(lambda text: progress(done, int(flags[1].sum()), text), warn)
    chunks = list(enumerate(range(0, len(y), batch_size)))[rank::world]
    with listening(watch), fixed_weights(model), eval_mode(model):
        for c, i in chunks:
            part, kept = slice(i, i + batch_size), folder and Path(folder) / f"chunk{c:05d}.pt"
            if kept and kept.exists():
                try:
                    flags[:, part] = torch.load(kept, weights_only=True)
                except Exception as e:  # torch raises many kinds on a truncated file
                    why = type(e).__name__
                    raise OSError(f"{kept} is not a chunk of this evaluation ({why}): delete it") from None
            else:
                x_c, y_c = x[part].to(device, torch.float32), y[part].to(device)
                _, clean, robust = attack_chunk(model, x_c, y_c, eps=eps, norm=norm, attacks=attacks,
                                                seed=seed + c)
                flags[:, part] = torch.stack([clean, robust]).cpu()
                if kept:
                    keep(kept, flags[:, part].clone())
            done += len(y[part])
            progress(done, int(flags[1].sum()), "chunk done")
    return flags[0], flags[1]
