"""Subset Adversarial Training: trains on A and B, attacks A alone, selects by and reports AutoAttack accuracy
(Eq. 2).

    python sat.py --split esat --frac 0.5 --order hardest                     # the embedded digits, on a CPU
    python sat.py --config configs/cifar10.yaml --split csat --classes cat    # the paper's settings
Files in: the data, results/<dataset>/rank-<arch>-seed0/scores.pt (made when missing). Files out, in
results/<dataset>/<run>/: args.json, log.jsonl, last.pt, best.pt, robust.pt, result.json.
"""
import functools
import hashlib
import time

import common  # first: Ctrl-C while torch loads ends in one line
import torch
from torch.nn import functional as F

import attacks
import data as datasets
import evaluate
import flags
import models
import results
import subset
from common import UserError, all_sum, rank, say, world
from subset import choose_A, weight_A


def sat_loss(logits, y, w):
    """Eq. 2 on a batch: the sum of w_i loss_i, the weights being w_A for examples of A and 1 for B, divided
    by their sum."""
    if w.shape != y.shape:
        raise ValueError(f"the weights are {tuple(w.shape)}, the labels {tuple(y.shape)}: one weight an "
                         "example")
    return (w * F.cross_entropy(logits.float(), y, reduction="none")).sum()


def sat_step(net, optimizer, x, y, a, w, attack):
    """One SGD step on Eq. 2. Returns (loss, logits), detached.

    x (b, C, H, W) in [0, 1] and labels y (b,); a: the positions of A's examples in the batch, int64 (|A|,),
    perhaps none; w (b,): the weights, which sum to 1 (epoch_plan). attack(x, y) perturbs examples, say
    functools.partial(pgd, net, ...).
    """
    optimizer.zero_grad(set_to_none=True)  # before the attack, which can use the memory
    if len(a):
        x = x.clone().index_copy_(0, a, attack(x[a], y[a]))  # the inner maximisation, on A alone
    logits = net(x)
    loss = sat_loss(logits, y, w)  # Eq. 2
    loss.backward()
    optimizer.step()
    return loss.detach(), logits.detach()


def epoch_plan(order, A, w_A, device):
    """What the steps of an epoch need to know of A: for each batch of `order` (steps, b), in this process's
    part of it, the positions of A's examples, int64, and the weights of Eq. 2, (b / processes,). Two tuples
    of tensors on `device`.

    The weights of a batch sum to the number of processes, over which DistributedDataParallel averages the
    gradients.
    """
    in_A = A[order]
    w = torch.where(in_A, w_A, 1.0)
    w = w * world() / w.sum(1, keepdim=True)
    in_A, w = (t.tensor_split(world(), 1)[rank()] for t in (in_A, w))
    positions = in_A.nonzero()[:, 1].to(device)  # one copy an epoch: a step that copies makes a GPU wait
    return positions.split(in_A.sum(1).tolist()), w.to(device).unbind()


def training_attack(model, args, device):
    """The attack that the flags ask for, on the model: attack(x, y, start=None) -> adversarial examples."""
    step = compiled(attacks.pgd_step, device) if args.compile else attacks.pgd_step
    how = {"eps": args.eps, "norm": args.norm, "step": step, "values": False}  # data.py gives pixels
    if args.attack == "fgsm-rs":
        attack = functools.partial(attacks.fgsm_rs, model, **how)
    else:
        attack = functools.partial(attacks.pgd, model, step_size=args.step_size, steps=args.steps, **how)
    # CUDA graphs are recorded for each size of A; on CPUs one graph serves all sizes.
    return filled(attack) if args.compile and device.type == "cuda" else attack


def filled(attack, multiple=16):
    """`attack` on the examples and copies of the first, up to a multiple of 16, so that few sizes occur."""
    def on_more(x, y, start=None):
        """attack(x, y, start) on at most 15 more."""
        n = len(x)
        more = lambda t: None if t is None else torch.cat([t, t[:1].expand(-n % multiple, *t.shape[1:])])
        return attack(more(x), more(y), start=more(start))[:n]
    return on_more


def random_starts(args, x, a, draw, generator):
    """Where the attack on A's examples x[a] starts: uniform in the ball where the flags say so, or None for
    at x. Drawn for the global batch, seeded by `draw`, so that the number of processes changes nothing, nor a
    batch that lacks A."""
    if args.attack != "fgsm-rs" and not args.random_start:
        return None
    generator.manual_seed(draw)
    start = attacks.random_start(x.new_empty(args.batch_size, *x.shape[1:]), args.eps, args.norm, generator)
    return start.tensor_split(world())[rank()][a]


def compiled(function, device):
    """A function or network compiled by torch; on GPUs in CUDA graphs, which reuse the memory of what they
    return."""
    # the gradient with respect to delta is a part of pgd_step's graph
    torch._dynamo.config.trace_autograd_ops = True
    if device.type != "cuda":
        return torch.compile(function, fullgraph=True)
    graph = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    return graph if isinstance(function, torch.nn.Module) else lambda *args: graph(*args).clone()


def sgd(model, lr, weight_decay, device):
    """The optimizer of Table 2: SGD with momentum 0.9 on what is trained of the model, in one kernel on
    GPUs."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr, 0.9, weight_decay=weight_decay, fused=device.type == "cuda")


def precision(amp, device):
    """The arithmetic of training, "bf16" (autocast) or "float32", that the flag --amp ("auto", "off" or
    "bf16") asks for; auto: bf16 where the hardware multiplies in it. (On a CPU without such units bf16 takes
    some ten times as long.)"""
    if device.type == "cuda":
        units = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        units = units and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # heeds ONEDNN_MAX_CPU_ISA
    return "bf16" if amp == "bf16" or amp == "auto" and units else "float32"


def autocast(amp, device):
    """The autocast in which a step runs. Loss, gradient norms, projection and the weights themselves stay
    float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(amp, device) == "bf16")


def train(model, split, A, w_A, args, device, state=None):
    """Minimises Eq. 2 by SGD. Yields once an epoch {"epoch": epochs done, "model", "optimizer", "row": the
    epoch's log}.

    A: bool (N,); A = {} is ordinary training, A = everything is adversarial training. `state`: an earlier
    yield, from which to go on. Every process must consume every yield. Raises UserError when the loss is not
    finite.
    """
    optimizer = sgd(model, args.lr, args.weight_decay, device)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    attack = training_attack(model, args, device) if A.any() else None
    net = compiled(model, device) if args.compile else model
    if world() > 1:
        net = torch.nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    generator, amp = torch.Generator(device), autocast(args.amp, device)
    for epoch in range(state["epoch"] if state else 0, args.epochs):
        began, lr = time.perf_counter(), args.lr * 0.1 ** sum(epoch >= d for d in args.lr_decays)
        for group in optimizer.param_groups:
            group["lr"] = lr
        order, generator_of_A = datasets.epoch_order(len(split), args.batch_size, args.seed, epoch)
        now = A
        if A.any() and args.order == "redrawn":  # a control at equal cost: other random examples every epoch
            now = A[torch.randperm(len(A), generator=generator_of_A)]
        plan, steps = zip(*epoch_plan(order, now, w_A, device)), len(order)
        todo = datasets.batches(split, args.batch_size, args.seed, epoch, args.augment, device)
        todo = common.progress(zip(todo, plan), total=steps, desc=f"epoch {epoch + 1}/{args.epochs}",
                               unit="step")
        sums = torch.zeros(2, device=device)  # loss and hits
        bad = torch.full((), steps, device=device)  # the first step that is not finite, kept on the device
        model.train()
        for step, ((x, y, _), (a, w)) in enumerate(todo):
            draw = ((args.seed * 1_000_003 + epoch) * 100_003 + step) % 2**63
            on_a = attack
            if len(a):
                on_a = functools.partial(attack, start=random_starts(args, x, a, draw, generator))
            with amp:
                loss, logits = sat_step(net, optimizer, x, y, a, w, on_a)
            sums += torch.stack([loss / world(), (logits.argmax(1) == y).sum()])
            bad = torch.where((bad == steps) & ~(loss.isfinite() & logits.isfinite().all()), step, bad)
        loss, hits = all_sum(sums).tolist()
        if (first := int(all_sum(bad, "MIN"))) < steps:
            raise UserError(f"the loss or the logits are not finite in epoch {epoch + 1}, step {first + 1}: "
                            f"stopped; the last good checkpoint is kept. {suspects(args)}")
        if world() > 1:
            for buffer in model.buffers():  # each process has batch statistics of its own
                torch.distributed.broadcast(buffer, 0)
        row = {"epoch": epoch + 1, "precision": precision(args.amp, device), "lr": lr, "loss": loss / steps,
               "train_accuracy": hits / order.numel(),
               **cost(args, order.numel(), int(now[order].sum()), model.frozen),
               "seconds": time.perf_counter() - began}
        yield {"epoch": epoch + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
               "row": row}


def suspects(args):
    """What to do about a loss that is not finite: the flags that differ from the config, or else the learning
    rate."""
    names = ("lr", "weight_decay", "batch_size", "weight_factor", "eps", "step_size", "steps", "amp", "arch")
    differ = [f"--{k.replace('_', '-')} {getattr(args, k)} (config: {args.base.get(k)})" for k in names
              if getattr(args, k, None) != args.base.get(k)]
    return (f"Suspect {', '.join(differ) or f'--lr {args.lr}'}; give the mended run another name with --run, "
            "or --force")


def cost(args, seen, attacked, frozen):
    """What an epoch costs that saw `seen` examples and attacked so many: forward passes, backward passes, and
    both in units of a forward pass: an attack step is 2, a training step 3 (1 on frozen features, whose head
    costs next to nothing)."""
    steps = 0 if attacked == 0 else 1 if args.attack == "fgsm-rs" else args.steps
    trained = 0 if frozen else seen
    return {"attacked": attacked, "forward": seen + steps * attacked, "backward": trained + steps * attacked,
            "forward_equivalents": seen + 2 * trained + 2 * steps * attacked}


def checkpoint(model, data, args, epoch, A_classes=None, **more):
    """What a checkpoint file holds: weights and all that is needed to use them without this project's
    configs."""
    return {"model": model.state_dict(), "arch": args.arch, "head": "mlp" if model.frozen else "linear",
            "classes": data.classes,
            "fingerprint": data.fingerprint(), "args": common.identity(args), "epoch": epoch,
            "A_classes": A_classes, **more}


def fit(run, model, data, A, w_A, args, device, A_classes=None, **more):
    """Trains, selects the checkpoint on the 10 % part, evaluates it on the 90 % part; returns result.json's
    content.

    Selection: AutoAttack robust accuracy one epoch after each decay and at the end (Sec. 4); ties go to the
    higher clean accuracy, then to the later epoch. Goes on from last.pt. `more` is written into result.json.
    """
    select, final = datasets.selection_and_final(len(data.test))
    select, final = select[:args.select_n or None], final[:args.eval_n or None]
    when = {d + 1 for d in args.lr_decays if d < args.epochs} | {args.epochs}
    mark = {"A": hashlib.sha256(A.numpy().tobytes()).hexdigest()[:16], "fingerprint": data.fingerprint()}
    last, keys = run / "last.pt", (*mark, "args", "optimizer", "log", "best")
    state = common.load(last, keys) if last.exists() else None
    differ = common.differing(state["args"], common.identity(args)) if state else ""
    if state and (differ or any(state[k] != v for k, v in mark.items())):
        raise UserError(f"{last} was trained with another A, other data or other flags "
                        f"({differ or 'the same'}): name this run with --run, or --force")
    log, best = (state["log"], state["best"]) if state else ([], None)
    if state:
        say(f"going on after epoch {state['epoch']} of {run / 'last.pt'}")
        if best and best[2] == state["epoch"] and rank() == 0:  # perhaps stopped between last.pt and best.pt
            common.save(run / "best.pt", {k: v for k, v in state.items()
                                          if k not in ("optimizer", "log", "best")})
    for state in train(model, data.train, A, w_A, args, device, state):
        row, epoch = state["row"], state["epoch"]
        say("epoch {epoch}: lr {lr:g}, loss {loss:.3f}, training accuracy {train_accuracy:.3f}, {attacked} "
            "attacked, {seconds:.1f} s".format(**row))
        if epoch in when:
            setting = evaluate.settings(args, data, "select")
            clean, robust = (f.float().mean().item()
                             for f in evaluate.attack(model, data, select, setting, run / "chunks"))
            row["selection"] = {"n": len(select), "clean": clean, "robust": robust}
            say(f"  selection: robust {robust:.3f}, clean {clean:.3f} on {len(select)} examples")
            if best is None or (robust, clean, epoch) >= tuple(best):
                best = [robust, clean, epoch]
        log = [*log, row]
        if rank() == 0:
            kept = checkpoint(model, data, args, epoch, A_classes, **mark)
            common.save_epoch(run, {**kept, "optimizer": state["optimizer"], "log": log, "best": best}, log)
            if best and best[2] == epoch:
                common.save(run / "best.pt", kept)
    common.barrier()
    model.load_state_dict(common.load(run / "best.pt")["model"])
    return conclude(run, model, data, final, args, log, {
        "N": len(A), "A": int(A.sum()), "A_classes": A_classes, "w_A": w_A, "epoch": best[2],
        "selection": {**evaluate.settings(args, data, "select"), "n": len(select)},
        "device": common.device_name(device),
        "precision": "+".join(sorted({row.get("precision", "float32") for row in log})), **more})


def conclude(run, model, data, index, args, log, about):
    """Evaluates the selected model on the test examples `index`; writes robust.pt and result.json, whose
    content it returns."""
    setting = evaluate.settings(args, data)
    clean, robust = evaluate.attack(model, data, index, setting, run / "chunks")
    cost = {k: sum(row[k] for row in log) for k in ("attacked", "forward", "backward", "forward_equivalents",
                                                    "seconds")}
    result = {"args": common.identity(args), "fingerprint": data.fingerprint(),
              "versions": evaluate.versions(), **about,
              "settings": setting, "accuracy": evaluate.summary(clean, robust, data.test.y[index],
                                                                data.classes, about["A_classes"]),
              "cost": cost, "weights": evaluate.digest(model.state_dict()), "processes": world()}
    if rank() == 0:
        common.save(run / "robust.pt", {"index": index, "clean": clean, "robust": robust})
        common.write_json(run / "result.json", result)
    common.remove(run / "chunks")
    common.end_run(run)
    return result


def command_line(argv=None):
    """The command line, with the checks that need more than one flag."""
    parser = flags.Parser(prog="sat.py", usage="python sat.py [--flag VALUE ...]", description=__doc__,
                          formatter_class=flags.Help)
    flags.add_flags(parser, *flags.SCRIPTS["sat.py"])
    args = flags.parse(parser, argv)
    args.classes = args.classes and sorted(set(args.classes))
    sized = [f for f in ("frac", "size", "classes") if getattr(args, f) is not None]
    parted = args.split in ("esat", "csat")
    if not parted and (sized or args.scores) or args.split == "esat" and args.classes:
        raise UserError(f"--split {args.split} takes no --{[*sized, *['scores'] * bool(args.scores)][-1]}")
    if len(sized) > 1:
        raise UserError(f"--split {args.split} takes one of --frac, "
                        f"--size{' and --classes' * (args.split == 'csat')}; "
                        f"given: {', '.join(sized)}")
    if parted and not sized:
        args.frac = 0.5
    if args.order == "redrawn" and args.split == "csat":
        raise UserError("--order redrawn draws single examples: it goes with --split esat")
    if args.scores and (args.classes or args.order not in ("hardest", "easiest")):
        raise UserError("--scores goes with --order hardest or easiest, and without --classes")
    args.own_scores = subset.read_scores(args.scores) if args.scores else None
    # what it holds, not where it lies
    args.scores = args.scores and results.scores_hash(args.own_scores.numpy())
    return args


def run_folder(args):
    """The folder of the run that these flags describe, and whether it is finished."""
    lead, told = [args.split], {"split", "frac", "size", "classes", "order", "metric", "scores", "weight",
                                "weight_factor"}
    if args.classes:
        lead += args.classes
    elif args.split in ("csat", "esat"):
        by = [f"scores={args.scores}"] if args.scores else [args.metric] * (args.metric != "entropy")
        lead += [args.order, args.size or args.frac, *(by if args.order in ("hardest", "easiest") else [])]
    if args.weight_factor or args.weight != "vanilla":
        lead.append(f"w{args.weight_factor}" if args.weight_factor else args.weight)
    return common.run_dir(args, lead, told)


def main(argv=None):
    """Chooses A, trains on A and B, writes and prints the result."""
    args = command_line(argv)
    run, finished = run_folder(args)
    if finished:
        return say(evaluate.finished(run))
    device = common.set_up(args)
    data = datasets.get(args.dataset, args.data_dir, device, args.side, args.workers)
    datasets.check_batch(data, args.batch_size)
    evaluate.settings(args, data), evaluate.settings(args, data, "select")  # before the work
    y, amount, scores, ranked = data.train.y, args.frac or args.size, None, None
    if amount and args.order in ("hardest", "easiest"):
        # before the work
        subset.how_many(amount, *((len(data.classes), "classes")
                                  if args.split == "csat" else (len(y), "examples")))
        scores, ranked = (args.own_scores, {"scores": args.scores}) if args.scores else subset.ranking(args,
                                                                                                       data)
    A = choose_A(args.split, y, data.classes, amount=amount, names=args.classes, order=args.order,
                 scores=scores, seed=args.seed)
    w_A = weight_A(args.weight_factor or args.weight, int(A.sum()), len(A))
    A_classes = [data.classes[c] for c in y[A].unique()] if args.split == "csat" else None
    say(f"SAT on {data.name} ({len(y):,} training images, {len(data.classes)} classes): |A| = "
        f"{int(A.sum()):,} ({A.float().mean():.1%}), "
        f"w_A {w_A:.3g}; {args.attack} {args.norm} eps {args.eps:g}; {args.arch} on "
        f"{common.device_name(device)}, seed {args.seed} -> {run}")
    if common.start_run(run, args):
        return say(evaluate.finished(run))
    torch.manual_seed(args.seed)
    model = models.build(args.arch, len(data.classes), *data.mean_std()).to(device)
    result = fit(run, model, data, A, w_A, args, device, A_classes, ranking=ranked)
    say(f"{evaluate.head_line(result)}\nwrote {run}/result.json")


if __name__ == "__main__":
    common.script(main)
