"""Subset Adversarial Training: the loss (Eq. 2), one step on it, and the loop of training.

Training is on A and B; only A is attacked. With A = {} this is ordinary training, which rank.py and
transfer.py run; with A = everything it is adversarial training. sat.py chooses A.
"""
import functools
import inspect
import math
import time

import torch
from torch.nn import functional as F

import attacks
import models
from common import UserError, all_reduce, process_count, process_index, progress
from data import epoch_order, process_part, training_batches


def sat_loss(logits, y, w, w_sum=None):
    """Eq. 2 on a batch: the mean of the losses with the weights w (b,), w_A for examples of A and 1 for those
    of B. `w_sum`: the divisor, if it is not their sum (under torchrun, see epoch_batches)."""
    if w.shape != y.shape:
        raise ValueError(f"weights of shape {tuple(w.shape)}, labels of {tuple(y.shape)}: they must agree")
    losses = F.cross_entropy(logits.float(), y, reduction="none")
    return (w * losses).sum() / (w.sum() if w_sum is None else w_sum)


def sat_step(net, optimizer, x, y, a, w, attack, w_sum=None):
    """One SGD step on Eq. 2. Returns (loss, logits), detached.

    x: images (b, C, H, W) in [0, 1]; y: labels (b,); a: the positions of A's examples in the batch, int64,
    which may be none, or repeat one; w (b,), w_sum: as in sat_loss. attack(x, y) returns adversarial
    examples: functools.partial(attacks.pgd, net, eps=0.5, step_size=0.1), say, or of net.module if net is
    distributed. It must not write to .grad.
    """
    optimizer.zero_grad(set_to_none=True)  # before the attack, so that it can use the memory
    if len(a):
        x = x.clone().index_copy_(0, a, attack(x[a], y[a]))  # the inner maximisation, on A alone
    logits = net(x)
    loss = sat_loss(logits, y, w, w_sum)  # Eq. 2
    loss.backward()
    optimizer.step()
    return loss.detach(), logits.detach()


def train(model, examples, A, w_A, args, device, state=None):
    """Minimises Eq. 2 by SGD. Yields after each epoch {"epoch": epochs done, "model", "optimizer", "row"},
    where "row" is the epoch's line of the log. The next epoch changes its tensors: save or copy them.

    model: a models.Classifier. examples: data.Examples. A: bool (N,). args: sat.py's flags. state: an earlier
    yield, from which training goes on. Raises UserError when the loss or the logits are not finite.
    """
    optimizer = models.sgd(model, args.lr, args.weight_decay, device, state and state["optimizer"])
    if state:
        model.load_state_dict(state["model"])
    n_steps = args.epochs * len(examples) // args.batch_size
    attack_name = args.attack if A.any() else None  # rank.py and transfer.py attack nothing
    compilation = models.choose_compilation(args.compile, device, n_steps, attack_name)
    attack = training_attack(model, A, w_A, args, device, compilation) if A.any() else None
    net, sums = models.training_network(model, device, compilation), EpochSums(device)
    precision = models.precision(args.amp, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def step(x, y, a, w, w_sum, start):  # as epoch_batches yields them; returns nothing: see GraphedStep
        attack_from = attack if start is None else functools.partial(attack, start=start)
        with autocast:
            loss, logits = sat_step(net, optimizer, x, y, a, w, attack_from, w_sum)
        sums.add(loss, logits, y)
    if compilation == "step":  # one CUDA graph of it for each learning rate and each size of `a`
        step = models.GraphedStep(step, get_lr=lambda: optimizer.param_groups[0]["lr"])
    for epoch in range(state["epoch"] if state else 0, args.epochs):
        start_time = time.perf_counter()
        lr = args.lr * 0.1 ** sum(epoch >= decay for decay in args.lr_decays)  # a tenth after each decay
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.train()
        sums.reset()
        for *batch, n_attacked in epoch_batches(examples, A, w_A, args, epoch, device, compilation):
            step(*batch)
            sums.attacked += n_attacked
        models.share_batch_statistics(model)
        row = {"epoch": epoch + 1, "precision": precision, "compile": compilation, "lr": lr,
               **sums.row(epoch, model, args), "seconds": time.perf_counter() - start_time}
        yield {"epoch": epoch + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
               "row": row}


def epoch_batches(examples, A, w_A, args, epoch, device, compilation="off"):
    """The batches of an epoch: (x, y, a, w, w_sum, start, n_attacked), this process's part. See sat_step;
    start: the random starts of an attack that has them, else None.

    w_sum: the global batch's sum of weights / processes (DistributedDataParallel averages gradients). What
    depends only on A and the order is computed once per epoch: a copy from the CPU makes a GPU wait. A CUDA
    graph has a fixed size: `a` is padded with its first element to a multiple of 16 (not in n_attacked).
    """
    order, generator = epoch_order(len(examples), args.batch_size, args.seed, epoch)  # (steps, batch size)
    if A.any() and args.order == "redrawn":  # a control at equal cost: another random A every epoch
        A = A[torch.randperm(len(A), generator=generator)]
    in_A = A[order]
    w = torch.where(in_A, w_A, 1.0)
    w_sums = (w.sum(1) / process_count()).to(device)
    in_A, w = process_part(in_A), process_part(w)
    counts = in_A.sum(1).tolist()
    positions = in_A.nonzero()[:, 1].split(counts)
    if A.any() and args.attack != "pgd-authors":  # its limit is on a mean over `a`
        multiple = models.size_multiple(device, compilation)
        positions = [torch.cat([a, a[:1].expand(-len(a) % multiple)]) for a in positions]
    positions = torch.cat(positions).to(device).split([len(a) for a in positions])
    batches = training_batches(examples, args.batch_size, args.seed, epoch, args.augment, device)
    steps = progress(zip(batches, positions, counts, w.to(device), w_sums), total=len(order), unit="step",
                     desc=f"epoch {epoch + 1}/{args.epochs}")
    draws_start = A.any() and (args.random_start or attacks.ATTACKS[args.attack].random_start)
    generator = torch.Generator(device)
    for step, ((x, y, _), a, n_attacked, w, w_sum) in enumerate(steps):
        start = None
        if draws_start:  # drawn for the whole batch, whatever the number of processes and of examples of A
            generator.manual_seed(((args.seed * 1_000_003 + epoch) * 100_003 + step) % 2**63)
            start = x.new_empty(args.batch_size, *x.shape[1:])
            start = attacks.random_start(start, args.eps, args.norm, generator)
            start = start.tensor_split(process_count())[process_index()][a]
        yield x, y, a, w, w_sum, start, n_attacked


def training_attack(model, A, w_A, args, device, compilation="off"):
    """The attack on `model` that the flags ask for: attack(x, y, start=None) -> adversarial examples."""
    entry = attacks.ATTACKS[args.attack]
    kwargs = {"eps": args.eps, "norm": args.norm, "step_size": args.step_size, "steps": args.steps,
              "limit": 10 * (w_A * A.sum().item() + (~A).sum().item()) / (len(A) * w_A),  # see pgd_authors
              "check_input": False}
    if compilation != "off":
        kwargs["step_function"] = models.compiled(attacks.pgd_step, device, compilation)
    parameters = inspect.signature(entry.function).parameters
    return functools.partial(entry.function, model, **{k: v for k, v in kwargs.items() if k in parameters})


class EpochSums:
    """Sums over an epoch, updated in place on the device: to read one would make the GPU wait, and a CUDA
    graph always writes to the same memory."""

    def __init__(self, device):
        self.totals = torch.zeros(3, device=device)  # loss, right predictions, steps

    def reset(self):
        """Starts an epoch."""
        self.attacked = 0  # examples
        self.totals.zero_()

    def add(self, loss, logits, y):
        """Adds a step. Its loss counts as nan if a logit is not finite."""
        loss = torch.where(logits.isfinite().all(), loss / process_count(), torch.nan)
        right = (logits.argmax(1) == y).sum()
        self.totals += torch.stack([loss, right, torch.ones_like(loss)])

    def row(self, epoch, model, args):
        """The epoch's loss, training accuracy and cost, over all processes. An attack step counts 2 forward
        passes; a training step 3, or 1 if the features are frozen, since a head costs next to nothing."""
        steps = int(self.totals[2])
        loss, right, _ = all_reduce(self.totals).tolist()
        if not math.isfinite(loss):
            raise UserError(f"the loss or the logits are not finite in epoch {epoch + 1}: stopped. Lower "
                            "--lr (and change --run, if you gave it); the last good checkpoint is kept")
        attacked, n = torch.tensor(self.attacked, device=self.totals.device), steps * args.batch_size
        attacked = all_reduce(attacked).item()
        gradients = attacked * (attacks.ATTACKS[args.attack].gradient_steps or args.steps) if attacked else 0
        n_updated = 0 if model.frozen else n  # whose gradients train all layers
        return {"loss": loss / steps, "train_accuracy": right / n, "attacked": attacked,
                "forward": n + gradients, "backward": n_updated + gradients,
                "forward_equivalents": n + 2 * n_updated + 2 * gradients}
