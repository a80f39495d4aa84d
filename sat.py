"""Chooses A, trains on A and B with attacks on A alone (train.py, Eq. 2), selects a checkpoint and reports
its AutoAttack accuracy.

    python sat.py --split esat --frac 0.5 --order hardest                     # the embedded digits, on a CPU
    python sat.py --config configs/cifar10.yaml --split csat --size 4         # the paper's settings

Files in: the data; results/<dataset>/rank-<arch>-seed0/scores.pt, made if it is missing, or --scores.
Files out, in results/<dataset>/<run>/: args.json, log.jsonl, last.pt, best.pt, robust.pt, result.json.
"""
import hashlib
import inspect
from collections import namedtuple

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

# A checkpoint's accuracies on the selection examples, and its epoch. The largest is selected: the most robust
# (Sec. 4); of these the one with the highest clean accuracy; of these the latest.
Best = namedtuple("Best", "robust clean epoch", defaults=(-1, -1, 0))
COUNTED = ("attacked", "forward", "backward", "forward_equivalents", "seconds")  # summed over the epochs


def fit(folder, model, data, A, w_A, args, device, settings, A_classes=None, **more):
    """Makes the run in `folder`, or goes on with it: trains, selects a checkpoint by AutoAttack on 10 % of
    the test set, one epoch after each decay and at the end (Sec. 4), evaluates it on the other 90 %, and
    prints the result. `more` is written into result.json too."""
    if runs.start_run(folder, args):
        return say(evaluate.finished(folder))
    chunk_folder = folder / "chunks"
    selected = selection_and_final(len(data.test))[0][:args.select_n or None]
    candidates = {decay + 1 for decay in args.lr_decays} | {args.epochs}
    hash_of_A = hashlib.sha256(A.numpy().tobytes()).hexdigest()[:16]
    state, log, best = resume(folder, args, data, hash_of_A)
    for state in train(model, data.train, A, w_A, args, device, state):
        row, epoch = state["row"], state["epoch"]
        say("epoch {epoch}: lr {lr:g}, loss {loss:.3f}, training accuracy {train_accuracy:.3f}, {attacked} "
            "attacked, {seconds:.1f} s".format(**row))
        if epoch in candidates:
            right = evaluate.autoattack_accuracy(model, data, selected, settings["select"], chunk_folder)
            clean, robust = (r.float().mean().item() for r in right)
            row["selection"] = {"n": len(selected), "clean": clean, "robust": robust}
            say(f"  selection: robust {robust:.3f}, clean {clean:.3f} on {len(selected)} examples")
            best = max(best, Best(robust, clean, epoch))
        log = [*log, row]
        if process_index() == 0:
            ckpt = runs.checkpoint(model, data, args, epoch, A_classes, A=hash_of_A)
            runs.save_epoch(folder, {**ckpt, "optimizer": state["optimizer"], "log": log, "best": list(best)})
            if best.epoch == epoch:
                runs.save(folder / "best.pt", ckpt)
    common.barrier()
    model.load_state_dict(runs.load(folder / "best.pt")["model"])
    right, evaluation = evaluate.evaluate(model, data, settings["eval"], chunk_folder, A_classes)
    result = {"args": runs.identity(args), "N": len(A), "A": int(A.sum()), "A_classes": A_classes, "w_A": w_A,
              "epoch": best.epoch, "selection": {**settings["select"], "n": len(selected)},
              "device": common.device_name(device), "processes": process_count(),
              "precision": "+".join(sorted({row.get("precision", "float32") for row in log})),
              "cost": {k: sum(row[k] for row in log) for k in COUNTED}, **more, **evaluation}
    if process_index() == 0:
        runs.save(folder / "robust.pt", right)
        runs.write_json(folder / "result.json", result)
    runs.end_run(folder)
    say(f"{evaluate.accuracy_lines(result)}\nwrote {folder}/result.json")


def resume(folder, args, data, hash_of_A):
    """Where a stopped run goes on: (its last.pt, log, Best), or (None, [], Best()) if it has not begun.
    UserError if it was made with another A, flags or data."""
    state = runs.resume(folder, args, data, ("A", "best"))
    if state is None:
        return None, [], Best()
    if state["A"] != hash_of_A:
        raise UserError(f"{folder}/last.pt was trained with another A: name this run with --run, or --force")
    log, best = state.pop("log"), Best(*(state.pop("best") or Best()))
    if 0 < best.epoch < state["epoch"] and not (folder / "best.pt").exists():
        raise UserError(f"{folder}/best.pt, of epoch {best.epoch}, is missing: --force repeats the run")
    if best.epoch == state["epoch"] and process_index() == 0:  # perhaps it stopped before it wrote best.pt
        runs.save(folder / "best.pt", {k: v for k, v in state.items() if k != "optimizer"})
    return state, log, best


def command_line(argv=None):
    """Parses the command line, and checks what needs more than one flag."""
    args = config.parse("sat.py", __doc__, argv)
    args.classes = sorted(set(args.classes or [])) or None
    check_amount(args)
    reset_flags_without_effect(args)
    if args.order == "redrawn" and args.split == "csat":
        raise UserError("--order redrawn draws single examples: it goes with --split esat")
    if args.scores and (args.classes or args.order not in ("hardest", "easiest")):
        raise UserError("--scores goes with --order hardest or easiest, and without --classes")
    if args.random_start and "start" not in inspect.signature(ATTACKS[args.attack].function).parameters:
        raise UserError(f"--attack {args.attack} takes no start: it goes without --random-start")
    return args


def check_amount(args):
    """UserError unless at most one flag says how large A is, and --split takes it. What a config says gives
    way to another amount that is typed, and to a --split that is typed and takes none of its kind."""
    amounts, valid = flags.AMOUNTS["csat"], flags.AMOUNTS[args.split]
    for name in (*amounts, "scores"):
        is_valid = name in valid or name == "scores" and valid
        replaced = name != "scores" and args.typed.intersection(amounts)
        if name not in args.typed and (replaced or "split" in args.typed and not is_valid):
            setattr(args, name, None)
        if getattr(args, name) is not None and not is_valid:
            raise UserError(f"--split {args.split} takes no --{name}")
    given = [name for name in valid if getattr(args, name) is not None]
    if len(given) > 1:
        raise UserError(f"--split {args.split} takes one of {', '.join(f'--{name}' for name in valid)}; "
                        f"given: {', '.join(given)}")
    if valid and not given:
        args.frac = 0.5


def reset_flags_without_effect(args):
    """Resets flags that have no effect beside others to the config's values, so that they make no separate
    run, and names those that were typed. Steps and step size stay: runs that differ in them share no table.
    """
    for cause, applies, names in [
            (f"--split {args.split}", args.split in ("none", "full"), "order metric weight weight_factor"),
            ("--split none", args.split == "none", "attack"),
            ("--classes", args.classes, "order metric"),
            ("--scores", args.scores, "metric"),
            (f"--order {args.order}", args.order in ("random", "redrawn"), "metric"),
            ("--weight-factor", args.weight_factor, "weight"),
            ("--attack fgsm-rs", args.attack == "fgsm-rs", "steps step_size random_start")]:
        for name in names.split() if applies else ():
            if name in args.typed:
                say(f"note: --{name.replace('_', '-')} has no effect with {cause}")
            if name not in ("steps", "step_size"):
                setattr(args, name, args.base[name])


def own_scores(args):
    """The scores (N,) of --scores, and what result.json says of them; (None, None) without it. Their hash
    replaces the file in args: the content of the file identifies the run, not its path."""
    if not args.scores:
        return None, None
    file, scores = args.scores.name, read_scores(args.scores)
    args.scores = scores_hash(scores)
    return scores, {"scores": args.scores, "file": file}


def run_folder(args):
    """The folder of the run that these flags describe, and whether it is finished."""
    first_words = [*config.run_name_prefix(args), args.split]
    if args.classes:
        first_words += args.classes
    elif args.split in ("csat", "esat"):
        first_words += [args.order, args.size or args.frac]
        if args.scores:
            first_words.append(f"scores={args.scores}")
        elif args.order in ("hardest", "easiest") and args.metric != "entropy":
            first_words.append(args.metric)
    weight = f"w{args.weight_factor}" if args.weight_factor else args.weight
    if weight != "vanilla":
        first_words.append(weight)
    return runs.run_folder(args, first_words, {"split", "frac", "size", "classes", "order", "metric",
                                               "scores", "weight", "weight_factor"})


def main(argv=None):
    """Chooses A, trains on A and B, writes and prints the result."""
    args = command_line(argv)
    scores, ranking = own_scores(args)
    folder, is_finished = run_folder(args)
    if is_finished:
        return say(evaluate.finished(folder))
    device = common.set_up(args)
    data = open_dataset(args, device)
    settings = {kind: evaluate.eval_settings(args, data, kind) for kind in ("select", "eval")}
    y, amount = data.train.y, args.frac or args.size
    if amount and scores is None and args.order in ("hardest", "easiest"):
        n, unit = (len(data.classes), "classes") if args.split == "csat" else (len(y), "examples")
        subset_size(amount, n, unit)  # an impossible amount is refused before a ranking is made
        scores, ranking = rank.scores_for(args, data, device)
    A = choose_A(args.split, y, data.classes, amount=amount, names=args.classes, order=args.order,
                 scores=scores, seed=args.seed)
    w_A = weight_A(args.weight_factor or args.weight, int(A.sum()), len(A))
    A_classes, names_of_A = None, ""
    if args.split == "csat":
        A_classes = [data.classes[c] for c in y[A].unique()]
        names_of_A = f" in {', '.join(A_classes)}" if len(A_classes) <= 10 else ""
    say(f"SAT on {data.name} ({len(A):,} training images, {len(data.classes)} classes): "
        f"|A| = {int(A.sum()):,} ({A.float().mean():.1%}){names_of_A}, w_A {w_A:.3g}; "
        f"{args.attack} {args.norm} eps {args.eps:g}; {args.arch} on {common.device_name(device)}, "
        f"seed {args.seed} -> {folder}")
    if device.type == "cuda" and not args.compile and A.any():
        say("note: on a GPU --compile makes this several times as fast (README, Speed)")
    torch.manual_seed(args.seed)  # after the ranking, which draws from it too
    model = models.build(args.arch, len(data.classes), *data.mean_std()).to(device)
    fit(folder, model, data, A, w_A, args, device, settings, A_classes, ranking=ranking)


if __name__ == "__main__":
    common.script(main)
