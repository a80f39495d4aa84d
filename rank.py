"""Ranks the training examples by difficulty: trains a non-robust classifier, averages scores over its epochs (Eq. 3).

    python rank.py --config configs/cifar10.yaml
Files in: the data. Files out, in results/<dataset>/rank-<arch>-seed<seed>/: scores.pt (per example, higher = harder),
rank.json (per class), args.json, log.jsonl, last.pt.
"""
import torch

import common
import data as datasets
import models
from common import rank, say, world
from sat import RANK_GROUPS, checkpoint, class_means, train


def entropy(logits):
    """Entropy of the softmax in nats (Sec. 3.3): (N, C) -> (N,)."""
    log_p = logits.float().log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def score(model, split, device):
    """The scores of one epoch (H(f_e(x)) of Eq. 3), in eval mode on un-augmented images, dealt to the processes: (N,)."""
    scores = torch.zeros(len(split))
    model.eval()
    with torch.no_grad():
        mine = torch.arange(len(split)).tensor_split(world())[common.rank()]
        for x, _, index in datasets.ordered(split, mine, 1000, device):
            scores[index] = entropy(model(x)).cpu()
    return common.all_sum(scores.to(device)).cpu()


def class_errors(model, data, device):
    """Clean error of each class (n_classes,) on the 90 % part of the test set."""
    index = datasets.selection_and_final(len(data.test))[1]
    model.eval()
    with torch.no_grad():
        wrong = torch.cat([(model(x).argmax(1) != y).cpu() for x, y, _ in datasets.ordered(data.test, index, 1000, device)])
    return class_means(wrong, data.test.y[index], len(data.classes))


def flags(argv=None):
    """The command line."""
    parser = common.Parser(prog="rank.py", description=__doc__, formatter_class=common.Help)
    common.add_flags(parser, *RANK_GROUPS)
    return common.parse(parser, argv)


def main(argv=None):
    """Trains, sums the scores of each epoch, writes scores.pt and rank.json, prints the classes hardest first."""
    args = flags(argv)
    run, finished = common.run_dir(args, ["rank", args.arch], set(vars(args)), done="rank.json")
    if finished:
        say(f"{run} is finished (--force repeats it)\n{table(common.read_json(run / 'rank.json'))}")
        return
    device = common.set_up(args)
    data = datasets.get(args.dataset, args.data_dir, device)
    datasets.check_batch(data, args.batch_size)
    say(f"ranking {data.name} ({len(data.train):,} training images, {len(data.classes)} classes) by entropy over {args.epochs} "
        f"epochs of non-robust training; {args.arch} on {common.device_name(device)} -> {run}")
    common.start_run(run, args)
    torch.manual_seed(args.seed)
    model = models.build(args.arch, len(data.classes), *data.mean_std()).to(device)
    state = common.load(run / "last.pt", ("optimizer", "log", "sum")) if (run / "last.pt").exists() else None
    if state:
        datasets.check_fingerprint(data, state["fingerprint"], run / "last.pt")
        say(f"going on after epoch {state['epoch']} of {run / 'last.pt'}")
    total, log = (state["sum"], state["log"]) if state else (torch.zeros(len(data.train), dtype=torch.float64), [])
    nobody = torch.zeros(len(data.train), dtype=torch.bool)  # A = {}: non-robust, to keep difficulty apart from AT (Sec. 3.3)
    for state in train(model, data.train, nobody, 1.0, args, device, state):
        total, log = total + score(model, data.train, device), [*log, state["row"]]
        say("epoch {epoch}: lr {lr:g}, loss {loss:.3f}, training accuracy {train_accuracy:.3f}, {seconds:.1f} s".format(**log[-1]))
        if rank() == 0:
            common.save_epoch(run, checkpoint(model, data, args, state["epoch"], optimizer=state["optimizer"], sum=total, log=log), log)
    means, errors = class_means(total / args.epochs, data.train.y, len(data.classes)), class_errors(model, data, device)
    hardest = means.argsort(descending=True, stable=True).tolist()
    result = {"args": common.identity(args), "fingerprint": data.fingerprint(), "epochs": args.epochs,
              "clean_error": errors.mean().item(), "classes_hardest_first": [
                  {"class": data.classes[c], "entropy": means[c].item(), "clean_error": errors[c].item()} for c in hardest]}
    if rank() == 0:
        common.save(run / "scores.pt", {"entropy": (total / args.epochs).float(), "epochs": args.epochs,
                                        "fingerprint": data.fingerprint(), "args": common.identity(args)})
        common.write_json(run / "rank.json", result)
    say(f"{table(result)}\nwrote {run}/scores.pt and rank.json")


def table(result, most=20):
    """The classes hardest first, as text for people."""
    rows = result["classes_hardest_first"]
    lines = [f"{r['class']:>20} {r['entropy']:8.4f} {100 * r['clean_error']:8.1f}" for r in rows]
    if len(rows) > most:
        lines[most // 2:-most // 2] = [f"{'...':>20} ({len(rows) - most} classes between)"]
    return "\n".join([f"{'class, hardest first':>20} {'entropy':>8} {'error %':>8}", *lines])


if __name__ == "__main__":
    common.script(main)
