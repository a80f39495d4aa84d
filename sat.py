"""Chooses A, trains on A and B with attacks on A alone (train.py, Eq. 2), selects a checkpoint and reports
its AutoAttack accuracy.

    python sat.py --split esat --frac 0.5 --order hardest                     # the embedded digits, on a CPU
    python sat.py --config configs/cifar10.yaml --split csat --size 4         # the paper's settings

Files in: the data; the file of --scores, --ranking or --subset, or else the scores.pt of a ranking with the
same training flags, which is made if it is missing.
Files out, in results/<dataset>/<run>/: args.json, log.jsonl, last.pt, best.pt, robust.pt, result.json.
"""
import inspect
import time
from collections import namedtuple

import torch

import common
import config
import evaluate
import models
import rank
import runs
from attacks import ATTACKS
from common import UserError, from_process_0, process_count, process_index, say
from data import open_dataset, selection_and_final
from subset import choose_A, ordering_scores, read_file, subset_size, tensor_hash, weight_A
from train import train

# A checkpoint's accuracies on the selection examples, and its epoch. The largest is selected: highest robust
# accuracy (Sec. 4), then highest clean accuracy, then latest epoch.
Best = namedtuple("Best", "robust clean epoch", defaults=(-1, -1, 0))
SUMMED = ("attacked", "forward", "backward", "forward_equivalents", "seconds")  # over epochs: a run's cost


def fit(folder, model, data, A, w_A, args, device, settings, A_classes=None, **more):
    """Makes the run in `folder`, unless it is finished, and prints and returns the result, to which `more` is
    added."""
    with runs.making(folder, args) as is_finished:
        if not is_finished:
            result = train_and_evaluate(folder, model, data, A, w_A, args, device, settings, A_classes, more)
    if is_finished:
        return evaluate.result_of_finished_run(folder, args)
    say(f"{evaluate.accuracy_lines(result)}\nwrote {folder}/result.json")
    return result


def train_and_evaluate(folder, model, data, A, w_A, args, device, settings, A_classes, more):
    """Trains, or goes on from last.pt, selects a checkpoint by AutoAttack on 10 % of the test set (Sec. 4),
    and evaluates it on the other 90 %. Writes and returns the result."""
    chunk_folder = folder / "chunks"
    select_index = selection_and_final(len(data.test))[0][:args.select_n or None]
    # One epoch after each decay, and at the end.
    candidates = {decay + 1 for decay in args.lr_decays} | {args.epochs}
    hash_of_A = tensor_hash(A)
    state, log, best = resume_fit(folder, args, data, hash_of_A)
    save_time = time.monotonic()
    for state in train(model, data.train, A, w_A, args, device, state):
        row, epoch = state["row"], state["epoch"]
        say("epoch {epoch}: lr {lr:g}, loss {loss:.3f}, training accuracy {train_accuracy:.3f}, "
            "{attacked} attacked, {seconds:.1f} s".format(**row))
        if epoch in candidates:
            clean_right, robust_right, _ = evaluate.autoattack_accuracy(
                model, data, select_index, settings["select"], chunk_folder)
            clean, robust = clean_right.float().mean().item(), robust_right.float().mean().item()
            row["selection"] = {"n": len(select_index), "clean": clean, "robust": robust}
            say(f"  selection: robust {robust:.3f}, clean {clean:.3f} on {len(select_index)} examples")
            best = max(best, Best(robust, clean, epoch))
        log = [*log, row]
        is_due = time.monotonic() - save_time >= runs.SAVE_SECONDS
        if process_index() == 0 and (epoch in candidates or is_due):
            ckpt = runs.checkpoint(model, data, args, epoch, A_classes, A=hash_of_A)
            runs.save_epoch(folder, {**ckpt, "optimizer": state["optimizer"], "log": log,
                                     "best": list(best)})
            save_time = time.monotonic()
            if best.epoch == epoch:
                runs.save(folder / "best.pt", ckpt)
    common.barrier()
    model.load_state_dict(runs.load(folder / "best.pt")["model"])
    per_example, evaluation = evaluate.evaluate(model, data, settings["eval"], chunk_folder, A_classes)
    result = {"args": runs.identity(args), "N": len(A), "A": int(A.sum()), "A_classes": A_classes,
              "w_A": w_A, "epoch": best.epoch,
              "selection": {**settings["select"], "n": len(select_index)},
              "device": common.device_name(device), "processes": process_count(),
              "precision": "+".join(sorted({row["precision"] for row in log})),
              "compile": "+".join(sorted({row["compile"] for row in log})),
              "cost": {k: sum(row[k] for row in log) for k in SUMMED}, **more, **evaluation}
    if process_index() == 0:
        runs.save(folder / "robust.pt", per_example)
        runs.write_json(folder / "result.json", result)
    return result


def resume_fit(folder, args, data, hash_of_A):
    """Where a stopped run goes on: (what last.pt holds, log, Best), (None, [], Best()) if it has not begun.
    UserError if it was made with another A, flags or data."""
    state = runs.resume(folder, args, data, ("A", "best"))
    if state is None:
        return None, [], Best()
    if state["A"] != hash_of_A:
        raise UserError(f"{folder}/last.pt was trained with another A: give another --run, or --force")
    log, best = state.pop("log"), Best(*state.pop("best"))
    if 0 < best.epoch < state["epoch"] and not (folder / "best.pt").exists():
        raise UserError(f"{folder}/best.pt, of epoch {best.epoch}, is missing: --force repeats the run")
    if best.epoch == state["epoch"] and process_index() == 0:  # perhaps it stopped before it wrote best.pt
        runs.save(folder / "best.pt", {k: v for k, v in state.items() if k != "optimizer"})
    return state, log, best


def command_line(argv=None):
    """Parses the command line, and checks what needs more than one flag."""
    args = config.parse("sat.py", __doc__, argv)
    args.classes = sorted(set(args.classes or [])) or None
    if "weight_factor" not in args.typed and "weight" in args.typed:  # a typed --weight beats the config's
        args.weight_factor = None
    config.settle_amount(args)
    config.reset_flags_without_effect(args)
    if args.order == "redrawn" and args.split == "csat":
        raise UserError("--order redrawn draws single examples: it goes with --split esat")
    files = [name for name in ("scores", "ranking", "subset") if getattr(args, name)]
    if len(files) > 1:
        raise UserError(f"--{files[0]} and --{files[1]}: give one of them")
    if files and files != ["subset"] and (args.classes or args.order not in ("hardest", "easiest")):
        raise UserError(f"--{files[0]} goes with --order hardest or easiest, and without --classes")
    check_attack(args)
    return args


def check_attack(args):
    """UserError, or a note, for flags of the training attack that do not go together."""
    parameters = inspect.signature(ATTACKS[args.attack].function).parameters
    if args.random_start and "start" not in parameters:
        raise UserError(f"--attack {args.attack} takes no start: it goes without --random-start")
    if args.split == "none" or "step_size" not in parameters:
        return
    steps = args.steps - (args.attack == "pgd-authors")  # it returns an iterate before the last
    if steps * args.step_size < args.eps:
        say(f"note: {steps} steps of {args.step_size:g} cannot reach --eps {args.eps:g} from the start: "
            "a larger --step-size, or more --steps, make a stronger attack")
    elif args.norm == "linf" and args.step_size > 2 * args.eps > 0:
        say(f"note: each --step-size {args.step_size:g} crosses the whole ball of --eps {args.eps:g}")


def read_file_of_A(args):
    """The content of the file of --scores, --ranking or --subset: {"scores": (N,)} or {"subset": bool (N,) or
    indices}, with "chosen_by" (what result.json says of it), "path" and "fingerprint" (of the data of a
    scores.pt of rank.py, else None). {} without such a flag. In args a hash of the content, which identifies
    the run, replaces the path."""
    for flag in ("scores", "ranking", "subset"):
        if path := getattr(args, flag):
            content, fingerprint = read_file(flag, path, args.metric)
            # Of a mask the indices, so that both forms of a subset are one run.
            content_hash = tensor_hash(content.nonzero()[:, 0] if content.dtype == torch.bool else content)
            setattr(args, flag, content_hash)
            key = "subset" if flag == "subset" else "scores"
            chosen_by = {key: content_hash, "file": path.name}
            if fingerprint:
                chosen_by["metric"] = args.metric
            elif flag == "scores":
                if "metric" in args.typed:
                    say("note: --metric has no effect with a file that holds one set of scores")
                args.metric = args.base["metric"]
            return {key: content, "chosen_by": chosen_by, "path": path, "fingerprint": fingerprint}
    return {}


def run_folder(args):
    """The folder of the run that these flags describe, and whether it is finished."""
    first_words = [*config.run_name_prefix(args), args.split]
    if args.classes:
        first_words += args.classes
    elif args.subset:
        first_words.append(f"subset={args.subset}")
    elif args.split in ("csat", "esat"):
        first_words += [args.order, args.size or args.frac]
        if args.scores or args.ranking:
            first_words.append(f"scores={args.scores}" if args.scores else f"ranking={args.ranking}")
        if args.order in ("hardest", "easiest") and args.metric != "entropy":
            first_words.append(args.metric)
    weight = f"w{args.weight_factor}" if args.weight_factor else args.weight
    if weight != "vanilla":
        first_words.append(weight)
    return runs.run_folder(args, first_words, {"split", "frac", "size", "classes", "order", "metric",
                                               "scores", "ranking", "subset", "weight", "weight_factor"})


def is_outdated(folder, args):
    """Whether the ranking by which the finished run in `folder` chose A has been made again, with other
    scores. Then the run is repeated, and a line says so."""
    ranking_used = runs.load(folder / "result.json", ("args",)).get("ranking") or {}
    path = rank.ranking_folder(rank.ranking_args(args)) / "rank.json"
    if "metric" not in ranking_used or "file" in ranking_used or not path.exists():
        return False
    scores_hash = runs.load(path, ("scores",))["scores"].get(ranking_used["metric"])
    if scores_hash in (None, ranking_used["scores"]):
        return False
    say(f"{path} was made again since {folder} was finished: its scores have changed, so the run is repeated")
    return True


def choose_subset(args, data, from_file, device):
    """A, bool (N,), and "ranking" of result.json: which scores or file chose A. from_file: of
    read_file_of_A."""
    if from_file.get("fingerprint"):
        runs.check_fingerprint(data, from_file["fingerprint"], from_file["path"])
    y, amount = data.train.y, args.frac or args.size
    scores, chosen_by = from_file.get("scores"), from_file.get("chosen_by")
    if amount and args.order in ("hardest", "easiest"):
        n = len(data.classes) if args.split == "csat" else len(y)
        subset_size(amount, n)  # an impossible amount is refused before a ranking is made
        if scores is None:
            scores, chosen_by = rank.scores_for(args, data, device)
        else:
            scores = ordering_scores(scores, chosen_by.get("metric"), args.split, y)
    A = choose_A(args.split, y, data.classes, amount=amount, names=args.classes, order=args.order,
                 subset=from_file.get("subset"), scores=scores, seed=args.seed)
    return A, chosen_by


def main(argv=None):
    """Chooses A, trains on A and B, writes, prints and returns the result."""
    args = command_line(argv)
    from_file = read_file_of_A(args)
    device = common.set_up(args)
    folder, is_finished = from_process_0(run_folder(args))  # another command may just be finishing the run
    if is_finished and not is_outdated(folder, args):
        return evaluate.result_of_finished_run(folder, args)
    data = open_dataset(args, device)
    args.force |= is_finished  # of an outdated run
    settings = {prefix: evaluate.eval_settings(args, data.classes, prefix) for prefix in ("select", "eval")}
    A, chosen_by = choose_subset(args, data, from_file, device)
    w_A = weight_A(args.weight_factor or args.weight, int(A.sum()), len(A))
    A_classes = [data.classes[c] for c in data.train.y[A].unique()] if args.split == "csat" else None
    names_of_A = f" in {', '.join(A_classes)}" if A_classes and len(A_classes) <= 10 else ""
    say(f"SAT on {data.name} ({len(A):,} training images, {len(data.classes)} classes): "
        f"|A| = {int(A.sum()):,} ({A.float().mean():.1%}){names_of_A}, w_A {w_A:.3g}; "
        f"{args.attack} {args.norm} eps {args.eps:g}; {args.arch} on {common.device_name(device)}, "
        f"seed {args.seed} -> {folder}")
    torch.manual_seed(args.seed)  # after the ranking, which draws from it too
    model = models.build(args.arch, len(data.classes), *data.mean_std).to(device)
    return fit(folder, model, data, A, w_A, args, device, settings, A_classes, ranking=chosen_by)


if __name__ == "__main__":
    common.script(main)
