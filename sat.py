"""Chooses A, trains on A and B with attacks on A alone (train.py, Eq. 2), selects a checkpoint and reports
its AutoAttack accuracy.

    python sat.py --split esat --frac 0.5 --order hardest                     # the embedded digits, on a CPU
    python sat.py --config configs/cifar10.yaml --split csat --size 4         # the paper's settings

Files in: the data; results/<dataset>/rank-<arch>-seed0/scores.pt, made if it is missing, or --scores.
Files out, in results/<dataset>/<run>/: args.json, log.jsonl, last.pt, best.pt, robust.pt, result.json.
"""
import hashlib
import inspect
from typing import NamedTuple

import torch

import common
import config
import evaluate
import flags
import models
import rank
import runs
from attacks import ATTACKS
from common import UserError, process_count, process_index, say
from data import open_dataset, selection_and_final
from subset import choose_A, read_scores, scores_hash, subset_size, weight_A
from train import train


class Best(NamedTuple):
    """A checkpoint's accuracies on the selection examples, and its epoch. The largest is selected (Sec. 4):
    the most robust; of these the one with the highest clean accuracy; of these the latest."""
    robust: float = -1
    clean: float = -1
    epoch: int = 0


def fit(folder, model, data, A, w_A, args, device, A_classes=None, **more):
    """Trains, selects a checkpoint on 10 % of the test set, evaluates it on the other 90 %. Returns the
    content of result.json, into which `more` is written too. Goes on from last.pt if there is one.

    The checkpoint is selected by AutoAttack's robust accuracy one epoch after each decay and at the end
    (Sec. 4).
    """
    select, final = selection_and_final(len(data.test))
    select, final = select[:args.select_n or None], final[:args.eval_n or None]
    settings = evaluate.eval_settings(args, data, "select")
    candidates = {decay + 1 for decay in args.lr_decays} | {args.epochs}
    hash_of_A = hashlib.sha256(A.numpy().tobytes()).hexdigest()[:16]
    state, log, best = resume(folder, args, data, hash_of_A)
    for state in train(model, data.train, A, w_A, args, device, state):
        row, epoch = state["row"], state["epoch"]
        say("epoch {epoch}: lr {lr:g}, loss {loss:.3f}, training accuracy {train_accuracy:.3f}, {attacked} "
            "attacked, {seconds:.1f} s".format(**row))
        if epoch in candidates:
            right = evaluate.autoattack_accuracy(model, data, select, settings, folder / "chunks")
            clean, robust = (r.float().mean().item() for r in right)
            row["selection"] = {"n": len(select), "clean": clean, "robust": robust}
            say(f"  selection: robust {robust:.3f}, clean {clean:.3f} on {len(select)} examples")
            best = max(best, Best(robust, clean, epoch))
        log = [*log, row]
        if process_index() == 0:
            ckpt = runs.checkpoint(model, data, args, epoch, A_classes, A=hash_of_A)
            runs.save_epoch(folder, {**ckpt, "optimizer": state["optimizer"], "log": log, "best": list(best)})
            if best.epoch == epoch:
                runs.save(folder / "best.pt", ckpt)
    common.barrier()
    model.load_state_dict(runs.load(folder / "best.pt")["model"])
    return evaluate_and_save(folder, model, data, final, args, log, {
        "N": len(A), "A": int(A.sum()), "A_classes": A_classes, "w_A": w_A, "epoch": best.epoch,
        "selection": {**settings, "n": len(select)}, "device": common.device_name(device),
        "precision": "+".join(sorted({row.get("precision", "float32") for row in log})), **more})


def resume(folder, args, data, hash_of_A):
    """Where a stopped run goes on: (its last.pt, log, Best), or (None, [], Best()) if it has not begun.
    UserError if it was made with another A, flags or data."""
    state = runs.resume(folder, args, data, ("A", "best"))
    if state is None:
        return None, [], Best()
    if state["A"] != hash_of_A:
        raise UserError(f"{folder / 'last.pt'} was trained with another A: name this run with --run, or "
                        "--force")
    log, best = state.pop("log"), Best(*(state.pop("best") or Best()))
    if 0 < best.epoch < state["epoch"] and not (folder / "best.pt").exists():
        raise UserError(f"{folder / 'best.pt'}, of epoch {best.epoch}, is missing: --force repeats the run")
    if best.epoch == state["epoch"] and process_index() == 0:  # perhaps it stopped before it wrote best.pt
        runs.save(folder / "best.pt", {k: v for k, v in state.items() if k != "optimizer"})
    return state, log, best


def evaluate_and_save(folder, model, data, index, args, log, about):
    """Evaluates the selected model on the test examples `index`; writes robust.pt and result.json. Returns
    the content of result.json."""
    settings = evaluate.eval_settings(args, data)
    clean, robust = evaluate.autoattack_accuracy(model, data, index, settings, folder / "chunks")
    counted = ("attacked", "forward", "backward", "forward_equivalents", "seconds")
    result = {"args": runs.identity(args), "fingerprint": data.fingerprint(), "versions": evaluate.versions(),
              **about, "settings": settings,
              "accuracy": evaluate.accuracies(clean, robust, data.test.y[index], data.classes,
                                              about["A_classes"]),
              "cost": {k: sum(row[k] for row in log) for k in counted},
              "weights": evaluate.weights_hash(model.state_dict()), "processes": process_count()}
    if process_index() == 0:
        runs.save(folder / "robust.pt", {"index": index, "clean": clean, "robust": robust})
        runs.write_json(folder / "result.json", result)
    runs.remove(folder / "chunks")
    runs.end_run(folder)
    return result


def command_line(argv=None):
    """Parses the command line, and checks what needs more than one flag."""
    args = config.parse("sat.py", __doc__, argv)
    if args.classes:
        args.classes = sorted(set(args.classes))
    replace_amounts(args)
    amounts = [name for name in flags.AMOUNTS["csat"] if getattr(args, name) is not None]
    has_subset = args.split in ("esat", "csat")
    not_taken = [name for name in (*amounts, "scores") if getattr(args, name) is not None and not has_subset]
    if args.split == "esat" and args.classes:
        not_taken = ["classes"]
    if not_taken:
        raise UserError(f"--split {args.split} takes no --{not_taken[-1]}")
    if len(amounts) > 1:
        valid = ", ".join(f"--{name}" for name in flags.AMOUNTS[args.split])
        raise UserError(f"--split {args.split} takes one of {valid}; given: {', '.join(amounts)}")
    if has_subset and not amounts:
        args.frac = 0.5
    reset_flags_without_effect(args)
    if args.order == "redrawn" and args.split == "csat":
        raise UserError("--order redrawn draws single examples: it goes with --split esat")
    if args.scores and (args.classes or args.order not in ("hardest", "easiest")):
        raise UserError("--scores goes with --order hardest or easiest, and without --classes")
    if args.random_start and "start" not in inspect.signature(ATTACKS[args.attack].function).parameters:
        raise UserError(f"--attack {args.attack} takes no start: it goes without --random-start")
    return args


def replace_amounts(args):
    """Drops what a config says of the amount of A if the command line says another, or a --split that takes
    none of this kind."""
    amounts = flags.AMOUNTS[args.split]
    for name in {*flags.AMOUNTS["csat"], "scores"} - args.typed:
        replaced = name != "scores" and args.typed & {*flags.AMOUNTS["csat"]}
        not_taken = name not in amounts and not (name == "scores" and amounts)
        if replaced or not_taken and "split" in args.typed:
            setattr(args, name, None)


def flags_without_effect(args):
    """The flags of sat.py that have no effect beside others: [(the other flag, their names)]."""
    rules = [
        (f"--split {args.split}", args.split in ("none", "full"), "order metric weight weight_factor"),
        ("--split none", args.split == "none", "attack"),
        ("--classes", args.classes, "order metric"),
        ("--scores", args.scores, "metric"),
        (f"--order {args.order}", args.order in ("random", "redrawn"), "metric"),
        ("--weight-factor", args.weight_factor, "weight"),
        ("--attack fgsm-rs", args.attack == "fgsm-rs", "steps step_size"),
    ]
    return [(other, names.split()) for other, holds, names in rules if holds]


def reset_flags_without_effect(args):
    """Gives flags that have no effect the config's values back, so that they make no other run of the same,
    and names those that were typed. Steps and step size stay as they are, because only runs that agree in
    these stand in one table."""
    for other, names in flags_without_effect(args):
        for name in names:
            if name in args.typed:
                say(f"note: --{name.replace('_', '-')} has no effect with {other}")
            if name not in ("steps", "step_size"):
                setattr(args, name, args.base[name])


def own_scores(args):
    """The scores (N,) in the user's file, and what result.json says of them; (None, None) without --scores.
    Their hash replaces the file in args: a run is what the file holds, not where it lies."""
    if not args.scores:
        return None, None
    file, scores = args.scores.name, read_scores(args.scores)
    args.scores = scores_hash(scores)
    return scores, {"scores": args.scores, "file": file}


def run_folder(args):
    """The folder of the run that these flags describe, and whether it is finished."""
    lead = [*config.config_prefix(args), args.split]
    if args.classes:
        lead += args.classes
    elif args.split in ("csat", "esat"):
        lead += [args.order, args.size or args.frac]
        if args.scores:
            lead.append(f"scores={args.scores}")
        elif args.order in ("hardest", "easiest") and args.metric != "entropy":
            lead.append(args.metric)
    if args.weight_factor:
        lead.append(f"w{args.weight_factor}")
    elif args.weight != "vanilla":
        lead.append(args.weight)
    return runs.run_folder(args, lead, {"split", "frac", "size", "classes", "order", "metric", "scores",
                                        "weight", "weight_factor"})


def subset_of(args, data, device, scores, ranking):
    """A as bool (N,), and what result.json says of the scores that chose it. Makes the ranking if A needs one
    and there are no `scores` of the user's."""
    y, amount = data.train.y, args.frac or args.size
    if amount and args.order in ("hardest", "easiest"):
        n, unit = (len(data.classes), "classes") if args.split == "csat" else (len(y), "examples")
        subset_size(amount, n, unit)  # an impossible amount is refused before a ranking is made
        if scores is None:
            scores, ranking = rank.scores_for(args, data, device)
    A = choose_A(args.split, y, data.classes, amount=amount, names=args.classes, order=args.order,
                 scores=scores, seed=args.seed)
    return A, ranking


def main(argv=None):
    """Chooses A, trains on A and B, writes and prints the result."""
    args = command_line(argv)
    scores, ranking = own_scores(args)
    folder, is_finished = run_folder(args)
    if is_finished:
        return say(evaluate.finished(folder))
    device = common.set_up(args)
    data = open_dataset(args, device)
    evaluate.check_settings(args, data)
    A, ranking = subset_of(args, data, device, scores, ranking)
    w_A = weight_A(args.weight_factor or args.weight, int(A.sum()), len(A))
    A_classes, names = None, ""
    if args.split == "csat":
        A_classes = [data.classes[c] for c in data.train.y[A].unique()]
        names = f" in {', '.join(A_classes)}" if len(A_classes) <= 10 else ""
    say(f"SAT on {data.name} ({len(A):,} training images, {len(data.classes)} classes): "
        f"|A| = {int(A.sum()):,} ({A.float().mean():.1%}){names}, w_A {w_A:.3g}; "
        f"{args.attack} {args.norm} eps {args.eps:g}; {args.arch} on {common.device_name(device)}, "
        f"seed {args.seed} -> {folder}")
    if device.type == "cuda" and not args.compile and A.any():
        say("note: on a GPU --compile makes this several times as fast (README, Speed)")
    if runs.start_run(folder, args):
        return say(evaluate.finished(folder))
    torch.manual_seed(args.seed)  # after the ranking, which draws from it too
    model = models.build(args.arch, len(data.classes), *data.mean_std()).to(device)
    result = fit(folder, model, data, A, w_A, args, device, A_classes, ranking=ranking)
    say(f"{evaluate.accuracy_lines(result)}\nwrote {folder}/result.json")


if __name__ == "__main__":
    common.script(main)
