"""Ranks the training examples by difficulty: trains a non-robust classifier and scores each example over its
epochs (Eq. 3, A.2).

    python rank.py --config configs/cifar10.yaml
Files in: the data. Files out, in results/<dataset>/rank-<arch>-seed<seed>/: scores.pt (per example, higher =
harder), rank.json (scores per class, agreement of the metrics), args.json, log.jsonl, last.pt.
"""
import itertools

import common  # first, so that Ctrl-C while torch loads ends in one line
import torch

import data as data_
import flags
import models
import paper
import runs
from common import UserError, process_index, say, process_count
from evaluate import checkpoint
from sat import train
from stats import spearman
from subset import class_means, scores_hash


def entropy(logits, y=None):
    """Entropy of the softmax in nats (Sec. 3.3): (N, C) -> (N,)."""
    log_p = logits.float().log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def svar(logits, y):
    """Minus the signed variance of the softmax vector over the classes, whose sign is positive if the
    prediction is right (A.2; Hua et al. 2021): (N, C), (N,) -> (N,), higher = harder."""
    variance = logits.float().softmax(1).var(1, unbiased=False)
    return torch.where(logits.argmax(1) == y, -variance, variance)


class Vog:
    """Variance of gradients (A.2; Agarwal et al. 2022): the standard deviation over epochs of the gradient of
    the true class's logit with respect to the pixels, averaged over the pixels. Kept as Welford's running
    sums, whose memory does not grow with the epochs.

    The data set has `shape` (n, C, H, W). This process holds the sums of its consecutive examples `mine`, on
    `device`. `state`: what state() returned.
    """

    def __init__(self, shape, mine, device, state=None):
        self.shape, self.mine = shape, mine
        if state:
            self.epochs, *sums = state
            self.mean, self.m2 = (s[mine].to(device) for s in sums)
        else:
            self.epochs = 0
            self.mean, self.m2 = (torch.zeros(len(mine), *shape[1:], device=device) for _ in range(2))

    def add(self, grad, index):
        """Adds the gradients (b, C, H, W) of the examples `index` (b,) in epoch self.epochs (from 1 on)."""
        i = index.to(grad.device) - int(self.mine[0])
        off = grad.float() - self.mean[i]
        self.mean[i] += off / self.epochs
        self.m2[i] += off * (grad.float() - self.mean[i])

    def whole(self, part):
        """Puts a tensor of this process's examples together with those of all others, on the CPU."""
        full = torch.zeros(self.shape[0], *part.shape[1:], device=part.device)
        full[self.mine.to(part.device)] = part
        return common.all_sum(full).cpu()

    def state(self):
        """Epochs, means and sums of squares of all examples, from which a stopped run goes on."""
        return self.epochs, self.whole(self.mean), self.whole(self.m2)

    def scores(self):
        """The raw scores (N,), which subset.py normalises within each class before it orders examples."""
        return self.whole((self.m2 / self.epochs).sqrt().flatten(1).mean(1))


def score(model, split, device, metrics, vog=None):
    """One epoch's scores by entropy and svar, {metric: (N,)}, in eval mode on images without augmentation.
    Each process scores its part. The same forward pass yields the gradients for `vog`."""
    found = {m: torch.zeros(len(split), dtype=torch.float64) for m in metrics if m != "vog"}
    if vog:
        vog.epochs += 1
    model.eval()
    for x, y, index in data_.plain_batches(split, part_of(split), 500, device):
        # GPUs may use TF32 in convolutions: even bf16, which is coarser, hardly changes the order
        # (results-published/README.md).
        tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=True)
        with torch.set_grad_enabled(vog is not None), tf32:
            logits = model(x.requires_grad_(vog is not None))
            if vog:
                vog.add(torch.autograd.grad(logits.gather(1, y[:, None]).sum(), x)[0], index)
        for m in found:
            found[m][index] = {"entropy": entropy, "svar": svar}[m](logits.detach(), y).double().cpu()
    return {m: common.all_sum(s.to(device)).cpu() for m, s in found.items()}


def part_of(split):
    """The consecutive training examples that this process scores."""
    return torch.arange(len(split)).tensor_split(process_count())[process_index()]


def class_errors(model, data, device):
    """[(clean error, n)] of each class on the 90 % part of the test set. The error is None if n = 0."""
    index = data_.selection_and_final(len(data.test))[1]
    model.eval()
    with torch.no_grad():
        wrong = torch.cat([(model(x).argmax(1) != y).cpu()
                           for x, y, _ in data_.plain_batches(data.test, index, 500, device)])
    y = data.test.y[index]
    n = torch.bincount(y, minlength=len(data.classes))
    return [(wrong[y == c].float().mean().item() if n[c] else None, int(n[c])) for c in range(len(n))]


def with_paper(name, hardest_first):
    """Spearman's correlation of a class order with the paper's (Fig. 4, 10, 11), on the n classes that the
    paper lists: {"rho", "n"}, or None if they are fewer than three."""
    theirs = paper.published()["class_order_hardest_first"].get(paper.base(name), [])
    mine = [c for c in (paper.NAMES.get(c, c) for c in hardest_first) if c in theirs]
    if len(mine) < 3:
        return None
    return {"rho": spearman(range(len(mine)), [theirs.index(c) for c in mine]), "n": len(mine)}


def summary(scores, data, errors):
    """The tables of rank.json: the classes hardest first (by the first metric), and Spearman's correlations
    between the metrics and with the paper's class order."""
    means = {m: class_means(s, data.train.y, len(data.classes)) for m, s in scores.items()}
    order = {m: [data.classes[c] for c in s.argsort(descending=True, stable=True).tolist()]
             for m, s in means.items()}
    rows = []
    for name in order[next(iter(scores))]:
        c = data.classes.index(name)
        error, n = errors[c]
        rows.append({"class": name, **{m: means[m][c].item() for m in scores}, "clean_error": error, "n": n})
    return {"classes_hardest_first": rows,
            "spearman_of_examples": {f"{a} and {b}": spearman(scores[a], scores[b])
                                     for a, b in itertools.combinations(scores, 2)},
            "spearman_of_classes_with_paper": {m: with_paper(data.name, order[m]) for m in scores}}


def table(result, most=20):
    """The classes hardest first and the correlations, as text."""
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
    head = f"{'class, hardest first':>20} {' '.join(f'{m:>9}' for m in metrics)} {'error %':>8}"
    return "\n".join([head, *lines, *said])


def command_line(argv=None):
    """Parses the command line and the config."""
    parser = flags.Parser(prog="rank.py", usage="python rank.py [--flag VALUE ...]", description=__doc__,
                          formatter_class=flags.Help)
    flags.add_flags(parser, *flags.SCRIPTS["rank.py"])
    return flags.parse(parser, argv)


def rank_epochs(run, model, data, metrics, args, device):
    """Trains without attacks, going on from last.pt if there is one, and scores every epoch. Returns {metric:
    (N,)} averaged over the epochs (Eq. 3), and the cost in forward passes."""
    state, path = None, run / "last.pt"
    if path.exists():
        state = runs.load(path, ("args", "fingerprint", "optimizer", "log", "sums", "vog"))
        data_.check_fingerprint(data, state["fingerprint"], path)
        if differ := runs.differing(state["args"], runs.identity(args)):
            raise UserError(f"{path} was trained with other flags ({differ}): "
                            "name this run with --run, or --force")
        say(f"going on after epoch {state['epoch']} of {path}")
    sums, log = (state["sums"], state["log"]) if state else ({}, [])
    # For a large data set VoG's sums are gigabytes, so that the state is saved only after every tenth epoch.
    every = 10 if "vog" in metrics and data.train.x.numel() > 10**7 else 1
    vog = None
    if "vog" in metrics:
        vog = Vog(tuple(data.train.x.shape), part_of(data.train), device, state and state["vog"])
    # A = {}: a non-robust classifier, so that difficulty does not depend on adversarial training (Sec. 3.3).
    nobody = torch.zeros(len(data.train), dtype=torch.bool)
    for state in train(model, data.train, nobody, 1.0, args, device, state):
        sums = {m: s + sums.get(m, 0) for m, s in score(model, data.train, device, metrics, vog).items()}
        log = [*log, state["row"]]
        say("epoch {epoch}: lr {lr:g}, loss {loss:.3f}, training accuracy {train_accuracy:.3f}, "
            "{seconds:.1f} s".format(**log[-1]))
        if state["epoch"] % every == 0 or state["epoch"] == args.epochs:
            kept = {"optimizer": state["optimizer"], "sums": sums, "log": log, "vog": vog and vog.state()}
            if process_index() == 0:
                runs.save_epoch(run, checkpoint(model, data, args, state["epoch"], **kept))
    scoring = len(data.train) * args.epochs * (2 if vog else 1)  # VoG also goes back to the pixels
    cost = sum(row["forward_equivalents"] for row in log) + scoring
    return {m: (vog.scores() if m == "vog" else sums[m] / args.epochs).float() for m in metrics}, cost


def main(argv=None):
    """Trains, scores, writes scores.pt and rank.json, and prints the classes hardest first."""
    args = command_line(argv)
    run, finished = runs.run_dir(args, ["rank", args.arch], set(vars(args)), done="rank.json")
    needed = ("classes_hardest_first", "spearman_of_examples", "spearman_of_classes_with_paper")
    told = lambda: say(f"{run} is finished (--force repeats it)\n"
                       f"{table(runs.read_json(run / 'rank.json', needed))}")
    if finished:
        return told()
    device = common.set_up(args)
    data = data_.load_dataset(args.dataset, args.data_dir, device, args.side, args.workers)
    data_.check_batch_size(data, args.batch_size)
    metrics = args.metrics or [m for m in flags.METRICS if m != "vog" or not data.train.streamed]
    if "vog" in metrics and data.train.streamed:
        raise UserError(f"--metrics vog keeps two numbers a pixel, too much for {data.name}'s streamed "
                        "images; valid here: entropy svar")
    say(f"ranking {data.name} ({len(data.train):,} training images, {len(data.classes)} classes) by "
        f"{', '.join(metrics)} over {args.epochs} epochs of non-robust training; {args.arch} on "
        f"{common.device_name(device)} -> {run}")
    if runs.start_run(run, args, "rank.json"):
        return told()
    torch.manual_seed(args.seed)
    model = models.build(args.arch, len(data.classes), *data.mean_std()).to(device)
    scores, cost = rank_epochs(run, model, data, metrics, args, device)
    errors = class_errors(model, data, device)
    result = {"args": runs.identity(args), "fingerprint": data.fingerprint(), "epochs": args.epochs,
              "cost": cost, "scores": {m: scores_hash(s) for m, s in scores.items()},
              **summary(scores, data, errors)}
    if process_index() == 0:
        runs.save(run / "scores.pt", {**scores, "epochs": args.epochs, "fingerprint": data.fingerprint(),
                                        "args": runs.identity(args)})
        runs.write_json(run / "rank.json", result)
    runs.end_run(run)
    say(f"{table(result)}\nwrote {run}/scores.pt and rank.json")


if __name__ == "__main__":
    common.script(main)
