"""Ranks the training examples by difficulty: trains a non-robust classifier and scores each example over its
epochs (Eq. 3, A.2).

    python rank.py --config configs/cifar10.yaml

Files in: the data. Files out, in results/<dataset>/rank-<arch>-seed<seed>/: scores.pt (per example, higher =
harder), rank.json (scores per class, agreement of the metrics), args.json, log.jsonl, last.pt.
"""
import argparse
import itertools

import torch
from scipy.stats import spearmanr

import common
import config
import flags
import models
import runs
from common import UserError, from_process_0, process_count, process_index, say
from data import open_dataset, plain_batches, selection_and_final
from subset import check_scores, class_means, scores_hash, within_class
from train import train


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

    The data set has `shape` (n, C, H, W). This process holds the sums of the consecutive examples `part`, on
    `device`. `state`: what state() returned.
    """

    def __init__(self, shape, part, device, state=None):
        self.shape, self.part = shape, part
        if state:
            self.epochs, *sums = state
            self.mean, self.m2 = (s[part].to(device) for s in sums)
        else:
            self.epochs = 0
            self.mean, self.m2 = (torch.zeros(len(part), *shape[1:], device=device) for _ in range(2))

    def add(self, grad, index):
        """Adds the gradients (b, C, H, W) of the examples `index` (b,) in epoch self.epochs (from 1 on)."""
        i = index.to(grad.device) - int(self.part[0])
        off = grad.float() - self.mean[i]
        self.mean[i] += off / self.epochs
        self.m2[i] += off * (grad.float() - self.mean[i])

    def of_all_processes(self, tensor):
        """Puts a tensor of this process's examples together with those of the others, on the CPU."""
        whole = torch.zeros(self.shape[0], *tensor.shape[1:], device=tensor.device)
        whole[self.part.to(tensor.device)] = tensor
        return common.all_sum(whole).cpu()

    def state(self):
        """Epochs, means and sums of squares of all examples, from which a stopped run goes on."""
        return self.epochs, self.of_all_processes(self.mean), self.of_all_processes(self.m2)

    def scores(self):
        """The raw scores (N,), which are normalised within each class before they order examples."""
        return self.of_all_processes((self.m2 / self.epochs).sqrt().flatten(1).mean(1))


def score(model, split, device, metrics, vog=None):
    """One epoch's scores by entropy and svar, {metric: (N,)}, in eval mode on images without augmentation.
    Each process scores its part. The same forward pass yields the gradients for `vog`."""
    functions = {"entropy": entropy, "svar": svar}
    scores = {m: torch.zeros(len(split), dtype=torch.float64) for m in metrics if m != "vog"}
    if vog:
        vog.epochs += 1
    model.eval()
    for x, y, index in plain_batches(split, part_of(split), 500, device):
        # GPUs may use TF32 in convolutions: even bf16, which is coarser, hardly changes the order
        # (results-published/README.md).
        tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=True)
        with torch.set_grad_enabled(vog is not None), tf32:
            logits = model(x.requires_grad_(vog is not None))
            if vog:
                vog.add(torch.autograd.grad(logits.gather(1, y[:, None]).sum(), x)[0], index)
        for m in scores:
            scores[m][index] = functions[m](logits.detach(), y).double().cpu()
    return {m: common.all_sum(s.to(device)).cpu() for m, s in scores.items()}


def part_of(split):
    """The consecutive training examples that this process scores."""
    return torch.arange(len(split)).tensor_split(process_count())[process_index()]


def class_errors(model, data, device):
    """[(clean error, n)] of each class on the 90 % part of the test set. The error is None if n = 0."""
    index = selection_and_final(len(data.test))[1]
    model.eval()
    with torch.no_grad():
        wrong = torch.cat([(model(x).argmax(1) != y).cpu()
                           for x, y, _ in plain_batches(data.test, index, 500, device)])
    y = data.test.y[index]
    n = torch.bincount(y, minlength=len(data.classes))
    return [(wrong[y == c].float().mean().item() if n[c] else None, int(n[c])) for c in range(len(n))]


def tables_of(scores, data, errors):
    """The tables of rank.json: the classes hardest first (by the first metric), and Spearman's correlations
    between the metrics."""
    means = {m: class_means(s, data.train.y, len(data.classes)) for m, s in scores.items()}
    rows = []
    for c in next(iter(means.values())).argsort(descending=True, stable=True).tolist():
        error, n = errors[c]
        rows.append({"class": data.classes[c], **{m: means[m][c].item() for m in scores},
                     "clean_error": error, "n": n})
    correlations = {}
    for a, b in itertools.combinations(scores, 2):
        constant = any(scores[m].min() == scores[m].max() for m in (a, b))  # its correlation is not defined
        correlations[f"{a} and {b}"] = 0.0 if constant else float(spearmanr(scores[a], scores[b]).statistic)
    return {"classes_hardest_first": rows, "spearman_of_examples": correlations}


def table(result, most=20):
    """The classes hardest first and the correlations, as text."""
    rows = result["classes_hardest_first"]
    metrics = [m for m in flags.METRICS if m in rows[0]]
    lines = [f"{'class, hardest first':>20} {' '.join(f'{m:>9}' for m in metrics)} {'error %':>8}"]
    for i, r in enumerate(rows):
        error = "-" if r["clean_error"] is None else f"{100 * r['clean_error']:.1f}"
        if len(rows) <= most or not most // 2 <= i < len(rows) - most // 2:
            lines.append(f"{r['class'][:20]:>20} {' '.join(f'{r[m]:9.4f}' for m in metrics)} {error:>8}")
        elif i == most // 2:
            lines.append(f"{'...':>20} ({len(rows) - most} classes between)")
    return "\n".join(lines + [f"Spearman of {pair}, over examples: {rho:.3f}"
                              for pair, rho in result["spearman_of_examples"].items()])


def finished(folder):
    """The lines that are printed for a ranking that is finished."""
    result = runs.read_json(folder / "rank.json", ("classes_hardest_first", "spearman_of_examples"))
    return f"{folder} is finished (--force repeats it)\n{table(result)}"


def rank_examples(folder, args, data, device):
    """Makes the ranking in `folder`: trains, scores, writes scores.pt and rank.json, and prints the classes
    hardest first. args: rank.py's flags."""
    metrics = args.metrics or [m for m in flags.METRICS if m != "vog" or not data.train.streamed]
    if "vog" in metrics and data.train.streamed:
        raise UserError(f"--metrics vog keeps two numbers per pixel, too much for {data.name}'s streamed "
                        "images; valid here: entropy svar")
    say(f"ranking {data.name} ({len(data.train):,} training images, {len(data.classes)} classes) by "
        f"{', '.join(metrics)} over {args.epochs} epochs of non-robust training; {args.arch} on "
        f"{common.device_name(device)} -> {folder}")
    if runs.start_run(folder, args, "rank.json"):
        return say(finished(folder))
    torch.manual_seed(args.seed)
    model = models.build(args.arch, len(data.classes), *data.mean_std()).to(device)
    scores, cost = rank_epochs(folder, model, data, metrics, args, device)
    result = {"args": runs.identity(args), "fingerprint": data.fingerprint(), "epochs": args.epochs,
              "cost": cost, "scores": {m: scores_hash(s) for m, s in scores.items()},
              **tables_of(scores, data, class_errors(model, data, device))}
    if process_index() == 0:
        runs.save(folder / "scores.pt", {**scores, "epochs": args.epochs, "fingerprint": data.fingerprint(),
                                         "args": runs.identity(args)})
        runs.write_json(folder / "rank.json", result)
    runs.end_run(folder)
    common.barrier()  # the files are there for all processes
    say(f"{table(result)}\nwrote {folder}/scores.pt and rank.json")


def rank_epochs(folder, model, data, metrics, args, device):
    """Trains without attacks, going on from last.pt if there is one, and scores every epoch. Returns {metric:
    (N,)} averaged over the epochs (Eq. 3), and the cost in forward passes."""
    state = runs.resume(folder, args, data, ("sums", "vog"))
    sums, log = (state["sums"], state["log"]) if state else ({}, [])
    # For a large data set VoG's sums are gigabytes, so that the state is saved only after every tenth epoch.
    every = 10 if "vog" in metrics and data.train.x.numel() > 10**7 else 1
    vog = None
    if "vog" in metrics:
        vog = Vog(tuple(data.train.x.shape), part_of(data.train), device, state and state["vog"])
    # A = {}: a non-robust classifier, so that difficulty does not depend on adversarial training (Sec. 3.3).
    empty_A = torch.zeros(len(data.train), dtype=torch.bool)
    for state in train(model, data.train, empty_A, 1.0, args, device, state):
        sums = {m: s + sums.get(m, 0) for m, s in score(model, data.train, device, metrics, vog).items()}
        log = [*log, state["row"]]
        say("epoch {epoch}: lr {lr:g}, loss {loss:.3f}, training accuracy {train_accuracy:.3f}, "
            "{seconds:.1f} s".format(**log[-1]))
        if state["epoch"] % every == 0 or state["epoch"] == args.epochs:
            more = {"optimizer": state["optimizer"], "sums": sums, "log": log, "vog": vog and vog.state()}
            if process_index() == 0:
                runs.save_epoch(folder, runs.checkpoint(model, data, args, state["epoch"], **more))
    scoring = len(data.train) * args.epochs * (2 if vog else 1)  # VoG also goes back to the pixels
    cost = sum(row["forward_equivalents"] for row in log) + scoring
    return {m: (vog.scores() if m == "vog" else sums[m] / args.epochs).float() for m in metrics}, cost


def scores_for(args, data, device):
    """The scores (N,) by which sat.py's flags `args` choose A, and what result.json says of them. Makes the
    ranking of this data and network if it is missing. One that was made with other flags, such as another
    number of epochs, is used, and a note says so."""
    folder = args.results / args.dataset / f"rank-{args.arch}-seed0"
    path = folder / "scores.pt"
    if not from_process_0(path.exists()):
        say(f"there is no {path}: ranking the examples first")
        rank_examples(folder, ranking_args(args), data, device)
    ranking = runs.load(path, ("fingerprint", "args", "epochs"))
    runs.check_fingerprint(data, ranking["fingerprint"], path)
    differ = [f"{k} {v} there, {getattr(args, k)} here" for k, v in ranking["args"].items()
              if k not in ("seed", "metrics") and getattr(args, k) != v]
    if differ:
        say(f"note: {path} was made with other flags ({'; '.join(differ)}); rank.py --force with those of "
            "this run makes it again")
    if args.metric not in ranking:
        raise UserError(f"{path} has no {args.metric}: make it again with rank.py --force (it then has all "
                        "metrics)")
    scores = ranking[args.metric]
    check_scores(scores, len(data.train), f"{path}: its {args.metric}")
    about = {"metric": args.metric, "epochs": ranking["epochs"], "scores": scores_hash(scores)}
    if args.metric == "vog" and args.split == "esat":  # gradients of classes differ in size (Agarwal et al.)
        scores = within_class(scores, data.train.y)
    return scores, about


def ranking_args(args):
    """rank.py's flags for the ranking that sat.py's flags `args` ask for."""
    dests = [flags.dest(flag) for group in flags.SCRIPTS["rank.py"] for flag, *_ in flags.FLAGS[group]]
    same = {k: getattr(args, k) for k in dests if k != "metrics"}
    return argparse.Namespace(**{**same, "seed": 0, "run": None, "force": False, "metrics": None})


def main(argv=None):
    """Makes the ranking that the flags describe, unless it is finished."""
    args = config.parse("rank.py", __doc__, argv)
    folder, is_finished = runs.run_folder(args, ["rank", args.arch], set(vars(args)), done="rank.json")
    if is_finished:
        return say(finished(folder))
    device = common.set_up(args)
    rank_examples(folder, args, open_dataset(args, device), device)


if __name__ == "__main__":
    common.script(main)
