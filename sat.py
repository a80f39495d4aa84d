"""Subset Adversarial Training (Eq. 2): trains on A and B, attacks only A, reports AutoAttack accuracy.

    python sat.py --split esat --frac 0.5 --order hardest                     # the embedded digits, on a CPU
    python sat.py --config configs/cifar10.yaml --split csat --size 4         # the paper's settings

Files in: the data; results/<dataset>/rank-<arch>-seed0/scores.pt, made if it is missing, or --scores.
Files out, in results/<dataset>/<run>/: args.json, log.jsonl, last.pt, best.pt, robust.pt, result.json.
"""
import collections
import functools
import hashlib
import time

import common  # first, so that Ctrl-C while torch loads ends in one line
import torch
from torch.nn import functional as F

import attacks
import data as data_
import evaluate
import flags
import models
import subset
import runs
from common import UserError, all_sum, process_index, say, process_count
from subset import choose_A, weight_A

# A checkpoint's accuracies on the selection examples, and its epoch. The largest tuple is selected (Sec. 4).
Best = collections.namedtuple("Best", "robust clean epoch")


def sat_loss(logits, y, w):
    """Eq. 2 on a batch: the sum of w_i loss_i. The weights w (b,) are w_A for examples of A and 1 for those
    of B, divided by their sum (under torchrun as in epoch_plan)."""
    if w.shape != y.shape:
        raise ValueError(f"the weights are {tuple(w.shape)}, the labels {tuple(y.shape)}: they must agree")
    return (w * F.cross_entropy(logits.float(), y, reduction="none")).sum()


def sat_step(net, optimizer, x, y, a, w, attack):
    """One SGD step on Eq. 2. Returns (loss, logits), detached.

    x: images (b, C, H, W) in [0, 1]; y: labels (b,); a: the positions of A's examples in the batch, int64,
    perhaps none; w (b,): the weights, which sum to 1 (under torchrun: see epoch_plan). attack(x, y) returns
    adversarial examples, as functools.partial(attacks.pgd, net, eps=0.5, step_size=0.1) does. It must leave
    nothing in .grad: use torch.autograd.grad, not backward().
    """
    optimizer.zero_grad(set_to_none=True)  # before the attack, so that it can use the memory
    if len(a):
        x = x.clone().index_copy_(0, a, attack(x[a], y[a]))  # the inner maximisation, on A alone
    logits = net(x)
    loss = sat_loss(logits, y, w)  # Eq. 2
    loss.backward()
    optimizer.step()
    return loss.detach(), logits.detach()


def epoch_plan(order, A, w_A, device):
    """Works out once an epoch what each step needs to know of A, for the batches `order`, (steps, b).

    Returns two tuples of `steps` tensors on `device`: the positions of A's examples in this process's part of
    the batch, int64, and the weights of Eq. 2, (b / processes,). The weights of a batch sum to the number
    of processes, because DistributedDataParallel averages gradients over the processes.
    """
    in_A = A[order]
    w = torch.where(in_A, w_A, 1.0)
    w = w * process_count() / w.sum(1, keepdim=True)
    in_A, w = (t.tensor_split(process_count(), 1)[process_index()] for t in (in_A, w))
    positions = in_A.nonzero()[:, 1].to(device)  # one copy an epoch: a step that copies makes a GPU wait
    return positions.split(in_A.sum(1).tolist()), w.to(device).unbind()


def training_attack(model, args, device, limit=10.0):
    """The attack on `model` that the flags ask for: attack(x, y, start=None) -> adversarial examples. limit:
    that of pgd_authors."""
    step = attacks.authors_step if args.attack == "pgd-authors" else attacks.pgd_step
    step = models.compiled(step, device) if args.compile else step
    how = {"eps": args.eps, "norm": args.norm, "step": step, "values": False}  # data.py gives [0, 1]
    attack = {
        "pgd": functools.partial(attacks.pgd, model, step_size=args.step_size, steps=args.steps, **how),
        "fgsm-rs": functools.partial(attacks.fgsm_rs, model, **how),
        "pgd-authors": functools.partial(attacks.pgd_authors, model, step_size=args.step_size,
                                         steps=args.steps, limit=limit, **how),
    }[args.attack]
    # On CPUs one graph serves all sizes of A.
    return filled(attack) if args.compile and device.type == "cuda" else attack


def filled(attack, multiple=16):
    """Pads the batches of `attack` to a multiple of 16 with copies of their first example, so that CUDA
    graphs are recorded for few sizes."""
    def padded(x, y, start=None):
        """Attacks the padded batch, returns the first n."""
        n = len(x)
        more = lambda t: None if t is None else torch.cat([t, t[:1].expand(-n % multiple, *t.shape[1:])])
        return attack(more(x), more(y), start=more(start))[:n]
    return padded


def random_starts(args, x, a, draw, generator):
    """Random starts of the attack on x[a], uniform in the eps-ball, or None if the flags ask for none.

    They are drawn for the global batch, seeded by `draw`: neither the number of processes nor a batch without
    examples of A changes them.
    """
    if args.attack != "fgsm-rs" and not args.random_start:
        return None
    generator.manual_seed(draw)
    start = attacks.random_start(x.new_empty(args.batch_size, *x.shape[1:]), args.eps, args.norm, generator)
    return start.tensor_split(process_count())[process_index()][a]


def train(model, split, A, w_A, args, device, state=None):
    """Minimises Eq. 2 by SGD. Yields after each epoch {"epoch": epochs done, "model", "optimizer", "row"}.

    model: a models.Classifier, which the attack uses directly, not compiled or distributed. A: bool (N,). All
    False, it makes this ordinary training; all True, adversarial training. `state`: an earlier yield, from
    which training goes on. "row": the epoch's line of the log. Raises UserError when the loss or the logits
    are not finite.
    """
    if args.lr_decays and min(args.lr_decays) >= args.epochs:
        say(f"note: the learning rate does not fall within {args.epochs} epochs (--lr-decays "
            f"{' '.join(map(str, args.lr_decays))})")
    optimizer = models.sgd(model, args.lr, args.weight_decay, device, state and state["optimizer"])
    if state:
        model.load_state_dict(state["model"])
    limit = 10 * (1 + (w_A - 1) * A.double().mean().item()) / w_A  # as in the authors' code
    attack = training_attack(model, args, device, limit) if A.any() else None
    if attack and device.type == "cuda" and not args.compile:
        say("note: on a GPU --compile makes this several times as fast (README, Speed)")
    net = models.compiled(model, device) if args.compile else model
    if process_count() > 1:
        net = torch.nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    for epoch in range(state["epoch"] if state else 0, args.epochs):
        began, lr = time.perf_counter(), args.lr * 0.1 ** sum(epoch >= d for d in args.lr_decays)
        for group in optimizer.param_groups:
            group["lr"] = lr
        order, generator_of_A = data_.epoch_order(len(split), args.batch_size, args.seed, epoch)
        now = A
        if A.any() and args.order == "redrawn":  # a control at equal cost: another random A every epoch
            now = A[torch.randperm(len(A), generator=generator_of_A)]
        plan = zip(*epoch_plan(order, now, w_A, device))
        batches = data_.training_batches(split, args.batch_size, args.seed, epoch, args.augment, device)
        model.train()
        loss, hits = train_epoch(net, optimizer, attack, zip(batches, plan), len(order), args, epoch, device)
        if process_count() > 1:
            for buffer in model.buffers():  # each process has batch statistics of its own
                torch.distributed.broadcast(buffer, 0)
        row = {"epoch": epoch + 1, "precision": models.precision(args.amp, device), "lr": lr, "loss": loss,
               "train_accuracy": hits / order.numel(),
               **cost(args, order.numel(), int(now[order].sum()), model.frozen),
               "seconds": time.perf_counter() - began}
        yield {"epoch": epoch + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
               "row": row}


def train_epoch(net, optimizer, attack, todo, steps, args, epoch, device):
    """The steps of an epoch, on `todo`: ((x, y, index), (positions of A's examples, weights)) for each batch.
    Returns the mean loss and the number of training examples classified correctly, over all processes."""
    generator, amp = torch.Generator(device), models.autocast(args.amp, device)
    sums = torch.zeros(2, device=device)  # of the loss, and of right predictions
    bad = torch.full((), steps, device=device)  # the first step that is not finite, kept on the device
    todo = common.progress(todo, total=steps, desc=f"epoch {epoch + 1}/{args.epochs}", unit="step")
    for step, ((x, y, _), (a, w)) in enumerate(todo):
        draw = ((args.seed * 1_000_003 + epoch) * 100_003 + step) % 2**63
        on_a = attack and functools.partial(attack, start=random_starts(args, x, a, draw, generator))
        with amp:
            loss, logits = sat_step(net, optimizer, x, y, a, w, on_a)
        sums += torch.stack([loss / process_count(), (logits.argmax(1) == y).sum()])
        bad = torch.where((bad == steps) & ~(loss.isfinite() & logits.isfinite().all()), step, bad)
    loss, hits = all_sum(sums).tolist()
    if (first := int(all_sum(bad, "MIN"))) < steps:
        raise UserError(f"the loss or the logits are not finite in epoch {epoch + 1}, step {first + 1}: "
                        f"stopped; the last good checkpoint is kept. {suspects(args)}")
    return loss / steps, hits


def suspects(args):
    """Advice on a loss that is not finite: the flags that differ from the config, else the learning rate."""
    names = ("lr", "weight_decay", "batch_size", "weight_factor", "eps", "step_size", "steps", "amp", "arch")
    differ = [f"--{k.replace('_', '-')} {getattr(args, k)} (config: {args.base.get(k)})" for k in names
              if getattr(args, k, None) != args.base.get(k)]
    return (f"Suspect {', '.join(differ) or f'--lr {args.lr}'}; give the mended run another name with --run, "
            "or --force")


def cost(args, seen, attacked, frozen):
    """The cost of an epoch that saw `seen` examples and attacked `attacked`: forward and backward passes, and
    both in units of a forward pass. An attack step costs 2; a training step 3, or 1 on frozen features, whose
    head costs next to nothing."""
    steps = flags.attack_steps(args.attack, args.steps) if attacked else 0
    trained = 0 if frozen else seen
    return {"attacked": attacked, "forward": seen + steps * attacked, "backward": trained + steps * attacked,
            "forward_equivalents": seen + 2 * trained + 2 * steps * attacked}


def go_on(run, data, args, A):
    """Where a stopped run goes on: (its last.pt, log, Best), or (None, [], Best(-1, -1, 0)) without one.
    Raises UserError if last.pt belongs to another A (by its hash), other data or other flags."""
    path = run / "last.pt"
    if not path.exists():
        return None, [], Best(-1, -1, 0)
    state = runs.load(path, ("A", "fingerprint", "args", "optimizer", "log", "best"))
    data_.check_fingerprint(data, state["fingerprint"], path)
    differ = runs.differing(state["args"], runs.identity(args))
    if differ or state["A"] != A:
        raise UserError(f"{path} was trained with {differ and 'other flags' or 'another A'} "
                        f"({differ or 'the flags agree'}): name this run with --run, or --force")
    say(f"going on after epoch {state['epoch']} of {path}")
    log, best = state.pop("log"), Best(*(state.pop("best") or (-1, -1, 0)))
    if 0 < best.epoch < state["epoch"] and not (run / "best.pt").exists():
        raise UserError(f"{run / 'best.pt'}, of epoch {best.epoch}, is missing: --force repeats the run")
    if best.epoch == state["epoch"] and process_index() == 0:  # it may have stopped between last.pt and best.pt
        runs.save(run / "best.pt", {k: v for k, v in state.items() if k != "optimizer"})
    return state, log, best


def fit(run, model, data, A, w_A, args, device, A_classes=None, **more):
    """Trains, selects a checkpoint on 10 % of the test set, evaluates it on the other 90 %. Returns the
    content of result.json, into which `more` is written too. Goes on from last.pt if there is one.

    The checkpoint is selected by AutoAttack's robust accuracy one epoch after each decay and at the end
    (Sec. 4). Ties go to the higher clean accuracy, then to the later epoch.
    """
    select, final = data_.selection_and_final(len(data.test))
    select, final = select[:args.select_n or None], final[:args.eval_n or None]
    when, how = {d + 1 for d in args.lr_decays} | {args.epochs}, evaluate.settings(args, data, "select")
    hash_of_A = hashlib.sha256(A.numpy().tobytes()).hexdigest()[:16]
    state, log, best = go_on(run, data, args, hash_of_A)
    for state in train(model, data.train, A, w_A, args, device, state):
        row, epoch = state["row"], state["epoch"]
        say("epoch {epoch}: lr {lr:g}, loss {loss:.3f}, training accuracy {train_accuracy:.3f}, {attacked} "
            "attacked, {seconds:.1f} s".format(**row))
        if epoch in when:
            right = evaluate.attack(model, data, select, how, run / "chunks")
            clean, robust = (r.float().mean().item() for r in right)
            row["selection"] = {"n": len(select), "clean": clean, "robust": robust}
            say(f"  selection: robust {robust:.3f}, clean {clean:.3f} on {len(select)} examples")
            best = max(best, Best(robust, clean, epoch))
        log = [*log, row]
        if process_index() == 0:
            kept = evaluate.checkpoint(model, data, args, epoch, A_classes, A=hash_of_A)
            runs.save_epoch(run, {**kept, "optimizer": state["optimizer"], "log": log, "best": list(best)})
            if best.epoch == epoch:
                runs.save(run / "best.pt", kept)
    common.barrier()
    model.load_state_dict(runs.load(run / "best.pt")["model"])
    return conclude(run, model, data, final, args, log, {
        "N": len(A), "A": int(A.sum()), "A_classes": A_classes, "w_A": w_A, "epoch": best.epoch,
        "selection": {**how, "n": len(select)}, "device": common.device_name(device),
        "precision": "+".join(sorted({row.get("precision", "float32") for row in log})), **more})


def conclude(run, model, data, index, args, log, about):
    """Evaluates the selected model on the test examples `index`; writes robust.pt and result.json. Returns
    the content of result.json."""
    setting = evaluate.settings(args, data)
    clean, robust = evaluate.attack(model, data, index, setting, run / "chunks")
    accuracy = evaluate.summary(clean, robust, data.test.y[index], data.classes, about["A_classes"])
    counted = ("attacked", "forward", "backward", "forward_equivalents", "seconds")
    result = {"args": runs.identity(args), "fingerprint": data.fingerprint(),
              "versions": evaluate.versions(), **about, "settings": setting, "accuracy": accuracy,
              "cost": {k: sum(row[k] for row in log) for k in counted},
              "weights": evaluate.digest(model.state_dict()), "processes": process_count()}
    if process_index() == 0:
        runs.save(run / "robust.pt", {"index": index, "clean": clean, "robust": robust})
        runs.write_json(run / "result.json", result)
    common.remove(run / "chunks")
    runs.end_run(run)
    return result


def command_line(argv=None):
    """Parses the command line, and checks what needs more than one flag."""
    parser = flags.Parser(prog="sat.py", usage="python sat.py [--flag VALUE ...]", description=__doc__,
                          formatter_class=flags.Help)
    flags.add_flags(parser, *flags.SCRIPTS["sat.py"])
    args = flags.parse(parser, argv)
    args.classes = args.classes and sorted(set(args.classes))
    flags.replace_amounts(args, argv)
    sized = [f for f in flags.AMOUNTS["csat"] if getattr(args, f) is not None]
    parted = args.split in ("esat", "csat")
    if not parted and (sized or args.scores) or args.split == "esat" and args.classes:
        raise UserError(f"--split {args.split} takes no --{[*sized, *['scores'] * bool(args.scores)][-1]}")
    if len(sized) > 1:
        classes = " and --classes" * (args.split == "csat")
        given = ", ".join(sized)
        raise UserError(f"--split {args.split} takes one of --frac, --size{classes}; given: {given}")
    if parted and not sized:
        args.frac = 0.5
    flags.without_idle(args, argv)
    if args.order == "redrawn" and args.split == "csat":
        raise UserError("--order redrawn draws single examples: it goes with --split esat")
    if args.scores and (args.classes or args.order not in ("hardest", "easiest")):
        raise UserError("--scores goes with --order hardest or easiest, and without --classes")
    args.own_scores = None
    if args.scores:  # a run's identity is what the file holds, not where it lies
        args.own_scores = args.scores.name, subset.read_scores(args.scores)
        args.scores = subset.scores_hash(args.own_scores[1])
    return args


def run_folder(args):
    """The folder of the run that these flags describe, and whether it is finished."""
    lead = [*flags.second_config(args), args.split]
    told = {"split", "frac", "size", "classes", "order", "metric", "scores", "weight", "weight_factor"}
    if args.classes:
        lead += args.classes
    elif args.split in ("csat", "esat"):
        by = [f"scores={args.scores}"] if args.scores else [args.metric] * (args.metric != "entropy")
        lead += [args.order, args.size or args.frac, *(by if args.order in ("hardest", "easiest") else [])]
    if args.weight_factor or args.weight != "vanilla":
        lead.append(f"w{args.weight_factor}" if args.weight_factor else args.weight)
    return runs.run_dir(args, lead, told)


def main(argv=None):
    """Chooses A, trains on A and B, writes and prints the result."""
    args = command_line(argv)
    run, finished = run_folder(args)
    if finished:
        return say(evaluate.finished(run))
    device = common.set_up(args)
    data = data_.load_dataset(args.dataset, args.data_dir, device, args.side, args.workers)
    data_.check_batch_size(data, args.batch_size)
    evaluate.settings(args, data), evaluate.settings(args, data, "select")  # before the work
    y, amount, scores, ranked = data.train.y, args.frac or args.size, None, None
    if amount and args.order in ("hardest", "easiest"):
        n, unit = (len(data.classes), "classes") if args.split == "csat" else (len(y), "examples")
        subset.how_many(amount, n, unit)  # an impossible amount is refused before a ranking is made
        if args.scores:
            file, scores = args.own_scores
            ranked = {"scores": args.scores, "file": file}
        else:
            scores, ranked = subset.ranking(args, data)
    A = choose_A(args.split, y, data.classes, amount=amount, names=args.classes, order=args.order,
                 scores=scores, seed=args.seed)
    w_A = weight_A(args.weight_factor or args.weight, int(A.sum()), len(A))
    A_classes = [data.classes[c] for c in y[A].unique()] if args.split == "csat" else None
    names = f" in {', '.join(A_classes)}" if A_classes and len(A_classes) <= 10 else ""
    say(f"SAT on {data.name} ({len(y):,} training images, {len(data.classes)} classes): "
        f"|A| = {int(A.sum()):,} ({A.float().mean():.1%}){names}, w_A {w_A:.3g}; "
        f"{args.attack} {args.norm} eps {args.eps:g}; {args.arch} on {common.device_name(device)}, "
        f"seed {args.seed} -> {run}")
    if runs.start_run(run, args):
        return say(evaluate.finished(run))
    torch.manual_seed(args.seed)
    model = models.build(args.arch, len(data.classes), *data.mean_std()).to(device)
    result = fit(run, model, data, A, w_A, args, device, A_classes, ranking=ranked)
    say(f"{evaluate.head_line(result)}\nwrote {run}/result.json")


if __name__ == "__main__":
    common.script(main)
