"""Ranks the training examples by difficulty: trains a non-robust classifier, scores each example over its
epochs (Eq. 3, A.2).

    python rank.py --config configs/cifar10.yaml
Files in: the data. Files out, in results/<dataset>/rank-<arch>-seed<seed>/: scores.pt (per example, higher =
harder), rank.json (per class; agreement of the metrics), args.json, log.jsonl, last.pt.
"""
import common  # first: Ctrl-C while torch loads ends in one line
import torch

import data as datasets
import flags
import models
import results
from common import UserError, rank, say, world
from results import spearman
from sat import checkpoint, train
from subset import class_means


# of rank.json
KEYS = ("classes_hardest_first", "spearman_of_examples", "spearman_of_classes_with_paper", "fingerprint",
        "args")


def entropy(logits, y=None):
    """Entropy of the softmax in nats (Sec. 3.3): (N, C) -> (N,)."""
    log_p = logits.float().log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def svar(logits, y):
    """Minus the signed variance of the softmax vector over the classes, positive when the prediction is right
    (A.2; Hua et al. 2021): (N, C), (N,) -> (N,), higher = harder."""
    variance = logits.float().softmax(1).var(1, unbiased=False)
    return torch.where(logits.argmax(1) == y, -variance, variance)


class Vog:
    """Variance of gradients (A.2; Agarwal et al. 2022): the standard deviation over epochs of the gradient of
    the true class's logit with respect to the pixels, averaged over the pixels. Welford's sums, so memory
    does not grow with epochs.

    It holds the examples of this process, `mine` (consecutive), of the n of `shape` (n, C, H, W), on
    `device`.
    """

    def __init__(self, shape, mine, device, state=None):
        self.shape, self.mine = shape, mine
        self.epochs, *sums = state or (0, None, None)
        self.mean, self.m2 = (torch.zeros(len(mine), *shape[1:], device=device)
                              if s is None else s[mine].to(device) for s in sums)

    def add(self, grad, index):
        """Takes in the gradients (b, C, H, W) of the examples `index` (b,) in the epoch numbered
        self.epochs."""
        i = index.to(grad.device) - int(self.mine[0])
        off = grad.float() - self.mean[i]
        self.mean[i] += off / self.epochs
        self.m2[i] += off * (grad.float() - self.mean[i])

    def whole(self, part):
        """A tensor of this process's examples as one of all processes' examples, on the CPU."""
        full = torch.zeros(self.shape[0], *part.shape[1:], device=part.device)
        full[self.mine.to(part.device)] = part
        return common.all_sum(full).cpu()

    def state(self):
        """Epochs, means and sums of squares of all processes' examples, from which a stopped run goes on."""
        return self.epochs, self.whole(self.mean), self.whole(self.m2)

    def scores(self):
        """(N,), raw: sat.py normalises within each class before it orders examples."""
        return self.whole((self.m2 / self.epochs).sqrt().flatten(1).mean(1))


def score(model, split, device, metrics, vog=None):
    """One epoch's scores by entropy and svar, {metric: (N,)}, in eval mode on un-augmented images, dealt to
    the processes; the same forward pass gives the Vog its gradients."""
    found = {m: torch.zeros(len(split), dtype=torch.float64) for m in metrics if m != "vog"}
    if vog:
        vog.epochs += 1
    model.eval()
    for x, y, index in datasets.ordered(split, part_of(split), 500, device):
        # On GPUs convolutions may round to TF32: even bf16, which is coarser, gives the same order (README).
        tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=True)
        with torch.set_grad_enabled(vog is not None), tf32:
            logits = model(x.requires_grad_(vog is not None))
            if vog:
                vog.add(torch.autograd.grad(logits.gather(1, y[:, None]).sum(), x)[0], index)
        for m in found:
            found[m][index] = {"entropy": entropy, "svar": svar}[m](logits.detach(), y).double().cpu()
    return {m: common.all_sum(s.to(device)).cpu() for m, s in found.items()}


def part_of(split):
    """The training examples that this process scores, consecutive."""
    return torch.arange(len(split)).tensor_split(world())[rank()]


def class_errors(model, data, device):
    """[(clean error, n)] of each class on the 90 % part of the test set; the error is None at n = 0."""
    index = datasets.selection_and_final(len(data.test))[1]
    model.eval()
    with torch.no_grad():
        wrong = torch.cat([(model(x).argmax(1) != y).cpu()
                           for x, y, _ in datasets.ordered(data.test, index, 500, device)])
    y = data.test.y[index]
    n = torch.bincount(y, minlength=len(data.classes))
    return [(wrong[y == c].float().mean().item() if n[c] else None, int(n[c]))
            for c in range(len(data.classes))]


def with_paper(name, hardest_first):
    """Spearman's correlation of a class order with the paper's (Fig. 4, 10, 11) on the classes that the paper
    lists: {"rho", "n"}, or None for a data set that it does not list."""
    theirs = results.published()["class_order_hardest_first"].get(results.base(name), [])
    mine = [c for c in (results.NAMES.get(c, c) for c in hardest_first) if c in theirs]
    return {"rho": spearman(range(len(mine)), [theirs.index(c) for c in mine]),
            "n": len(mine)} if len(mine) > 2 else None


def summary(scores, data, errors):
    """rank.json's tables: the classes hardest first, Spearman between the metrics and with the paper's class
    order."""
    means = {m: class_means(s, data.train.y, len(data.classes)) for m, s in scores.items()}
    order = {m: [data.classes[c] for c in s.argsort(descending=True, stable=True).tolist()]
             for m, s in means.items()}
    first = next(iter(scores))
    rows = [{"class": c, **{m: means[m][data.classes.index(c)].item() for m in scores},
             "clean_error": errors[data.classes.index(c)][0],
             "n": errors[data.classes.index(c)][1]} for c in order[first]]
    pairs = [(a, b) for i, a in enumerate(scores) for b in list(scores)[i + 1:]]
    return {"classes_hardest_first": rows,
            "spearman_of_examples": {f"{a} and {b}": spearman(scores[a], scores[b]) for a, b in pairs},
            "spearman_of_classes_with_paper": {m: with_paper(data.name, order[m]) for m in scores}}


def table(result, most=20):
    """The classes hardest first and the correlations, as text for people."""
    rows = result["classes_hardest_first"]
    metrics = [m for m in flags.METRICS if m in rows[0]]
    error = lambda r: "-" if r["clean_error"] is None else f"{100 * r['clean_error']:.1f}"
    lines = [f"{r['class'][:20]:>20} {' '.join(f'{r[m]:9.4f}' for m in metrics)} {error(r):>8}" for r in rows]
    if len(rows) > most:
        lines[most // 2:-most // 2] = [f"{'...':>20} ({len(rows) - most} classes between)"]
    said = [f"Spearman of {pair}, over examples: {rho:.3f}"
            for pair, rho in result["spearman_of_examples"].items()]
    said += [f"Spearman of {m} with the paper's class order: {found['rho']:.3f} ({found['n']} classes)"
             for m, found in result["spearman_of_classes_with_paper"].items() if found]
    return "\n".join([f"{'class, hardest first':>20} {' '.join(f'{m:>9}' for m in metrics)} {'error %':>8}",
                      *lines, *said])


def command_line(argv=None):
    """The command line."""
    parser = flags.Parser(prog="rank.py", usage="python rank.py [--flag VALUE ...]", description=__doc__,
                          formatter_class=flags.Help)
    flags.add_flags(parser, *flags.SCRIPTS["rank.py"])
    return flags.parse(parser, argv)


def rank_epochs(run, model, data, metrics, args, device):
    """Trains without attacks from last.pt on, scoring every epoch; returns {metric: (N,)} averaged over the
    epochs (Eq. 3), and the cost in forward passes."""
    state = common.load(run / "last.pt", ("args", "fingerprint", "optimizer", "log", "sums",
                                          "vog")) if (run / "last.pt").exists() else None
    if state:
        datasets.check_fingerprint(data, state["fingerprint"], run / "last.pt")
        if differ := common.differing(state["args"], common.identity(args)):
            raise UserError(f"{run / 'last.pt'} was trained with other flags ({differ}): name this run with "
                            "--run, or --force")
        say(f"going on after epoch {state['epoch']} of {run / 'last.pt'}")
    sums, log = (state["sums"], state["log"]) if state else ({}, [])
    # VoG's sums of a large set are gigabytes: kept after every tenth epoch, from which a stopped run goes on.
    every = 10 if "vog" in metrics and data.train.x.numel() > 10**7 else 1
    vog = Vog(tuple(data.train.x.shape), part_of(data.train), device,
              state and state["vog"]) if "vog" in metrics else None
    # A = {}: non-robust, to keep difficulty apart from AT (Sec. 3.3)
    nobody = torch.zeros(len(data.train), dtype=torch.bool)
    for state in train(model, data.train, nobody, 1.0, args, device, state):
        sums = {m: s + sums.get(m, 0) for m, s in score(model, data.train, device, metrics, vog).items()}
        log = [*log, state["row"]]
        say("epoch {epoch}: lr {lr:g}, loss {loss:.3f}, training accuracy {train_accuracy:.3f}, "
            "{seconds:.1f} s".format(**log[-1]))
        if state["epoch"] % every == 0 or state["epoch"] == args.epochs:
            kept = {"optimizer": state["optimizer"], "sums": sums, "log": log, "vog": vog and vog.state()}
            if rank() == 0:
                common.save_epoch(run, checkpoint(model, data, args, state["epoch"], **kept), log)
    scoring = len(data.train) * args.epochs * (2 if vog else 1)  # VoG goes back to the pixels too
    cost = sum(row["forward_equivalents"] for row in log) + scoring
    return {m: (vog.scores() if m == "vog" else sums[m] / args.epochs).float() for m in metrics}, cost


def main(argv=None):
    """Trains, scores, writes scores.pt and rank.json, prints the classes hardest first."""
    args = command_line(argv)
    run, finished = common.run_dir(args, ["rank", args.arch], set(vars(args)), done="rank.json")
    told = lambda: say(f"{run} is finished (--force repeats "
                       f"it)\n{table(common.read_json(run / 'rank.json', KEYS))}")
    if finished:
        return told()
    device = common.set_up(args)
    data = datasets.get(args.dataset, args.data_dir, device, args.side, args.workers)
    datasets.check_batch(data, args.batch_size)
    metrics = args.metrics or [m for m in flags.METRICS if m != "vog" or not data.train.streamed]
    if "vog" in metrics and data.train.streamed:
        raise UserError(f"--metrics vog keeps two numbers a pixel, too much for {data.name}'s streamed "
                        "images; valid here: entropy svar")
    say(f"ranking {data.name} ({len(data.train):,} training images, {len(data.classes)} classes) by "
        f"{', '.join(metrics)} over "
        f"{args.epochs} epochs of non-robust training; {args.arch} on {common.device_name(device)} -> {run}")
    if common.start_run(run, args, "rank.json"):
        return told()
    torch.manual_seed(args.seed)
    model = models.build(args.arch, len(data.classes), *data.mean_std()).to(device)
    scores, cost = rank_epochs(run, model, data, metrics, args, device)
    errors = class_errors(model, data, device)
    result = {"args": common.identity(args), "fingerprint": data.fingerprint(), "epochs": args.epochs,
              "cost": cost,
              "scores": {m: results.scores_hash(s.numpy()) for m, s in scores.items()},
              **summary(scores, data, errors)}
    if rank() == 0:
        common.save(run / "scores.pt", {**scores, "epochs": args.epochs, "fingerprint": data.fingerprint(),
                                        "args": common.identity(args)})
        common.write_json(run / "rank.json", result)
    common.end_run(run)
    say(f"{table(result)}\nwrote {run}/scores.pt and rank.json")


if __name__ == "__main__":
    common.script(main)
