"""Ranks the training examples by difficulty: trains a non-robust classifier and scores each example over its
epochs (Eq. 3, A.2).

    python rank.py --config configs/cifar10.yaml

Files in: the data. Files out, in results/<dataset>/rank-<arch>[-<flags>]-seed<seed>/: scores.pt (per example,
higher = harder), rank.json (scores per class, agreement of the metrics), args.json, log.jsonl, last.pt.
"""
import argparse
import hashlib
import itertools
import json
import time

import torch
from scipy.stats import spearmanr

import common
import config
import flags
import models
import runs
from common import UserError, from_process_0, process_index, say
from data import check_unchanged, open_dataset, plain_batches, process_part, selection_and_final
from subset import check_scores, class_means, ordering_scores, tensor_hash
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
    sums, whose memory does not grow with the epochs; each process holds those of its part of the examples, on
    `device`. `state`: what state() returned."""

    def __init__(self, examples, device, state=None):
        self.n, self.part = len(examples), process_part(torch.arange(len(examples)), 0)
        zeros = torch.zeros(()).expand(examples.x.shape)
        self.epochs, *sums = state or (0, zeros, zeros)
        self.mean, self.m2 = (s[self.part].to(device) for s in sums)

    def add(self, grad, index):
        """Adds the gradients (b, C, H, W) of the examples `index` (b,) in epoch self.epochs (from 1 on)."""
        i = index.to(grad.device) - int(self.part[0])
        deviation = grad.float() - self.mean[i]
        self.mean[i] += deviation / self.epochs
        self.m2[i] += deviation * (grad.float() - self.mean[i])

    def of_all_processes(self, tensor):
        """Puts a tensor of this process's examples together with those of the others, on the CPU."""
        whole = torch.zeros(self.n, *tensor.shape[1:], device=tensor.device)
        whole[self.part.to(tensor.device)] = tensor
        return common.all_reduce(whole).cpu()

    def state(self):
        """Epochs, means and sums of squared deviations of all examples, from which a stopped run goes on."""
        return self.epochs, self.of_all_processes(self.mean), self.of_all_processes(self.m2)

    def scores(self):
        """The raw scores (N,), which are normalised within each class before they order examples."""
        return self.of_all_processes((self.m2 / self.epochs).sqrt().flatten(1).mean(1))


def score(model, examples, device, metrics, vog=None):
    """One epoch's scores by entropy and svar, {metric: (N,)}, in eval mode on images without augmentation.
    Each process scores its part, and gets all. The same forward pass yields the gradients for `vog`."""
    functions = {"entropy": entropy, "svar": svar}
    scores = {m: torch.zeros(len(examples), dtype=torch.float64) for m in metrics if m != "vog"}
    if vog:
        vog.epochs += 1
    indices = process_part(torch.arange(len(examples)), 0)
    model.eval()
    for x, y, index in plain_batches(examples, indices, 500, device):
        # A GPU may use TF32: even bf16, which is coarser, hardly changes the order (results-published).
        with torch.set_grad_enabled(bool(vog)), torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            logits = model(x.requires_grad_(bool(vog)))
            if vog:
                vog.add(torch.autograd.grad(logits.gather(1, y[:, None]).sum(), x)[0], index)
        for m in scores:
            scores[m][index] = functions[m](logits.detach(), y).double().cpu()
    return {m: common.all_reduce(s.to(device)).cpu() for m, s in scores.items()}


def tables_of(scores, model, data, device):
    """The tables of rank.json: the classes hardest first (by the first metric), with clean errors on the 90 %
    part of the test set (None without examples), and Spearman's correlations between the metrics."""
    index = selection_and_final(len(data.test))[1]
    model.eval()
    with torch.no_grad():
        wrong = torch.cat([(model(x).argmax(1) != y).cpu()
                           for x, y, _ in plain_batches(data.test, index, 500, device)])
    means = {m: class_means(s, data.train.y, len(data.classes)) for m, s in scores.items()}
    rows = []
    for c in next(iter(means.values())).argsort(descending=True, stable=True).tolist():
        wrong_c = wrong[data.test.y[index] == c].float()
        rows.append({"class": data.classes[c], **{m: means[m][c].item() for m in scores},
                     "clean_error": wrong_c.mean().item() if len(wrong_c) else None, "n": len(wrong_c)})
    correlations = {}
    for a, b in itertools.combinations(scores, 2):
        constant = any(scores[m].min() == scores[m].max() for m in (a, b))  # its correlation is not defined
        correlations[f"{a} and {b}"] = 0.0 if constant else float(spearmanr(scores[a], scores[b]).statistic)
    return {"classes_hardest_first": rows, "spearman_of_examples": correlations}


def table(folder):
    """The classes hardest first and the correlations of a finished ranking, as text."""
    result = runs.load(folder / "rank.json", ("classes_hardest_first", "spearman_of_examples"))
    rows = result["classes_hardest_first"]
    metrics = [m for m in flags.METRICS if m in rows[0]]
    lines = [f"{'class, hardest first':>20} {' '.join(f'{m:>9}' for m in metrics)} {'clean error %':>14}"]
    for r in rows:
        error = "-" if r["clean_error"] is None else f"{100 * r['clean_error']:.1f}"
        lines.append(f"{r['class'][:20]:>20} {' '.join(f'{r[m]:9.4f}' for m in metrics)} {error:>14}")
    return "\n".join(lines + [f"Spearman of {pair}, over examples: {rho:.3f}"
                              for pair, rho in result["spearman_of_examples"].items()])


def check_metrics(metrics, data):
    """UserError for vog on streamed images."""
    if "vog" in metrics and data.train.streamed:
        raise UserError(f"the metric vog takes 8 bytes a pixel, too much for {data.name}; valid: entropy, "
                        "svar")


def rank_examples(folder, args, data, device):
    """Makes the ranking in `folder`, going on from last.pt if there is one: trains without attacks, averages
    the scores of all epochs (Eq. 3), writes scores.pt and rank.json. args: rank.py's flags."""
    asked = args.metrics or [m for m in flags.METRICS if m != "vog" or not data.train.streamed]
    metrics = [m for m in flags.METRICS if m in asked]  # in the order of all tables
    check_metrics(metrics, data)
    say(f"ranking {data.name} ({len(data.train):,} training images, {len(data.classes)} classes) by "
        f"{', '.join(metrics)} over {args.epochs} epochs of non-robust training; {args.arch} on "
        f"{common.device_name(device)} -> {folder}")
    with runs.making(folder, args, "rank.json") as is_finished:
        if is_finished:
            return say(f"{folder} is finished (--force repeats it)\n{table(folder)}")
        torch.manual_seed(args.seed)
        model = models.build(args.arch, len(data.classes), *data.mean_std).to(device)
        state = runs.resume(folder, args, data, ("sums", "vog"))
        sums, log = (state["sums"], state["log"]) if state else ({}, [])
        vog = Vog(data.train, device, state and state["vog"]) if "vog" in metrics else None
        save_time = time.monotonic()
        # A = {}: a non-robust classifier: difficulty does not depend on adversarial training (Sec. 3.3).
        empty_A = torch.zeros(len(data.train), dtype=torch.bool)
        for state in train(model, data.train, empty_A, 1.0, args, device, state):
            sums = {m: s + sums.get(m, 0) for m, s in score(model, data.train, device, metrics, vog).items()}
            log = [*log, state["row"]]
            say("epoch {epoch}: lr {lr:g}, loss {loss:.3f}, training accuracy {train_accuracy:.3f}, "
                "{seconds:.1f} s".format(**log[-1]))
            is_due = time.monotonic() - save_time >= runs.SAVE_SECONDS
            if from_process_0(is_due) or state["epoch"] == args.epochs:  # vog.state() is of all processes
                more = {"optimizer": state["optimizer"], "sums": sums, "log": log, "vog": vog and vog.state()}
                if process_index() == 0:
                    runs.save_epoch(folder, runs.checkpoint(model, data, args, state["epoch"], **more))
                save_time = time.monotonic()
        scores = {m: (vog.scores() if m == "vog" else sums[m] / args.epochs).float() for m in metrics}
        if any(m != "vog" and s.min() == s.max() for m, s in scores.items()):
            raise UserError("all examples have the same score, so that nothing can be ranked: training "
                            f"diverged (loss {log[-1]['loss']:.3g}, accuracy "
                            f"{log[-1]['train_accuracy']:.3f}); lower --lr")
        scoring_passes = len(data.train) * args.epochs * (2 if vog else 1)  # VoG also goes back to the pixels
        provenance = {"args": runs.identity(args), "fingerprint": data.fingerprint(), "epochs": args.epochs}
        result = {**provenance, "cost": sum(row["forward_equivalents"] for row in log) + scoring_passes,
                  "scores": {m: tensor_hash(s) for m, s in scores.items()},
                  **tables_of(scores, model, data, device)}
        if process_index() == 0:
            runs.save(folder / "scores.pt", {**scores, **provenance})
            runs.write_json(folder / "rank.json", result)
    common.barrier()  # the files are there for all processes
    say(f"{table(folder)}\nwrote {folder}/scores.pt and rank.json")


def ranking_args(args):
    """The flags of the ranking by which sat.py, run with `args`, chooses A: its flags of training, seed 0."""
    values = {dest: getattr(args, dest, None) for dest in flags.dests("rank.py")}
    return argparse.Namespace(**{**values, "seed": 0, "run": None, "force": False, "base": args.base,
                                 "typed": args.typed})


def ranking_folder(args):
    """The folder of the ranking that these flags describe, named as a run is: results/<dataset>/rank-<arch>,
    the flags that differ from the config, the seed. If a ranking by other flags has that name, a hash takes
    their place."""
    name = args.run or runs.run_name(args, ["rank", args.arch], {"arch", "metrics"})
    folder = args.results / args.dataset / name
    stored = runs.stored_flags(folder, "rank.json")
    with_its_metrics = argparse.Namespace(**{**vars(args), "metrics": stored.get("metrics")})
    if args.run or not stored or not runs.flag_differences(stored, with_its_metrics):
        return folder
    flags_text = json.dumps({k: v for k, v in runs.identity(args).items() if k != "metrics"})
    short_hash = hashlib.sha256(flags_text.encode()).hexdigest()[:8]
    return folder.with_name(f"rank-{args.arch}-{short_hash}-seed{args.seed}")


def metrics_of(folder):
    """The --metrics with which the ranking in a folder was begun, or made; None for none."""
    return runs.stored_flags(folder, "rank.json").get("metrics")


def scores_for(args, data, device):
    """The scores (N,) by which sat.py's flags `args` choose A, and what result.json says of them. Makes the
    ranking if it is missing."""
    rank_args = ranking_args(args)
    folder = ranking_folder(rank_args)
    path = folder / "scores.pt"
    check_metrics([args.metric], data)
    if not from_process_0(path.exists()):
        rank_args.metrics = metrics_of(folder)
        if args.metric not in (rank_args.metrics or flags.METRICS):  # refused before it is trained, not after
            raise UserError(f"{folder} was begun with --metrics {' '.join(rank_args.metrics)}, without "
                            f"{args.metric}: make it again with rank.py --force")
        say(f"there is no {path}: ranking the examples first")
        rank_examples(folder, rank_args, data, device)
    if not path.exists():
        raise UserError(f"{folder} has a rank.json, but no scores.pt: make it again with rank.py --force")
    ranking = runs.load(path, ("fingerprint", "args", "epochs"))
    runs.check_fingerprint(data, ranking["fingerprint"], path)
    if args.metric not in ranking:
        raise UserError(f"{path} has no {args.metric}: make it again with rank.py --force")
    scores = ranking[args.metric]
    check_scores(scores, len(data.train), f"{path}: its {args.metric} scores")
    chosen_by = {"metric": args.metric, "epochs": ranking["epochs"], "scores": tensor_hash(scores)}
    return ordering_scores(scores, args.metric, args.split, data.train.y), chosen_by


def main(argv=None):
    """Makes the ranking that the flags describe, unless it is finished."""
    args = config.parse("rank.py", __doc__, argv)
    folder = ranking_folder(args)
    if not args.force:  # a ranking begun with --metrics can be resumed without repeating them
        args.metrics = args.metrics or metrics_of(folder)
    device = common.set_up(args)
    if from_process_0(runs.is_finished(folder, args, "rank.json")):
        check_unchanged(args, runs.load(folder / "rank.json", ("fingerprint",))["fingerprint"], folder)
        return say(f"{folder} is finished (--force repeats it)\n{table(folder)}")
    rank_examples(folder, args, open_dataset(args, device), device)


if __name__ == "__main__":
    common.script(main)
