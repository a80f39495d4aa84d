"""Clean and AutoAttack accuracy of a checkpoint, in all and per class, on the 90 % of the test set that are
not used for selecting a checkpoint (Sec. 4, "Training and evaluation details").

    python evaluate.py results/digits/esat-hardest-0.5-seed0/best.pt

Files in: a checkpoint, the data. Files out: eval-<hash of the settings>.json beside the checkpoint.
"""
import argparse
import contextlib
import hashlib
import json
import logging
import math
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy
import torch

import attacks
import common
import flags
import runs
from common import UserError, process_count, process_index, say
from data import load_dataset, selection_and_final
from runs import load_model


def wilson(k, n, z=1.959964):
    """The 95 % Wilson score interval (low, high) of k successes in n > 0 trials."""
    p, d = k / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / d, z / d * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy(right):
    """The accuracy of bool (n,), None if n = 0, with its 95 % Wilson interval, as fractions."""
    n, k = len(right), int(right.sum())
    low, high = wilson(k, n) if n else (0.0, 1.0)
    return {"n": n, "accuracy": k / n if n else None, "low": low, "high": high}


def accuracies(clean, robust, y, classes, A_classes=None):
    """Clean and robust accuracy of bool (n,) each: {"all", A_val and B_val if A consists of the classes
    `A_classes`: {"clean", "robust": accuracy()}}, and "classes": {class: the same}. Each class also has which
    of its examples were right, as bits in hexadecimal, for paired comparisons of runs."""
    parts, right = {"all": torch.ones_like(clean)}, {"clean": clean, "robust": robust}
    if A_classes:
        parts["A_val"] = torch.isin(y, torch.tensor([classes.index(c) for c in A_classes]))
        parts["B_val"] = ~parts["A_val"]
    result = {part: {kind: accuracy(r[where]) for kind, r in right.items()} for part, where in parts.items()}
    result["classes"] = {c: {kind: {**accuracy(r[y == i]), "right": numpy.packbits(r[y == i]).tobytes().hex()}
                             for kind, r in right.items()} for i, c in enumerate(classes)}
    return result


def weights_hash(state):
    """A short hash of a state dict, equal for equal weights."""
    h = hashlib.sha256()
    for key, value in sorted(state.items()):
        h.update(key.encode())
        h.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]


def eval_settings(args, data, prefix="eval"):
    """What AutoAttack's numbers depend on besides network and data, by the flags --eval-* or --select-*
    (`prefix`). UserError for what AutoAttack does not take."""
    try:
        usable = attacks.usable_attacks(getattr(args, f"{prefix}_attacks"), len(data.classes))
    except ValueError as e:
        raise UserError(f"--{prefix}-attacks: {e}") from None
    if args.norm == "linf" and args.eps > 1:
        raise UserError(f"--norm linf --eps {args.eps:g}: pixels are in [0, 1] (8/255 is --eps 0.0314)")
    return {"norm": args.norm, "eps": args.eps, "attacks": usable,
            "n": getattr(args, f"{prefix}_n"), "batch_size": args.eval_batch, "seed": 0}


def evaluate(model, data, settings, folder, A_classes=None):
    """Evaluates on the 90 % of the test set that do not select a checkpoint. Returns the content of robust.pt
    and what the results of sat.py, transfer.py and evaluate.py have in common."""
    index = selection_and_final(len(data.test))[1][:settings["n"] or None]
    clean, robust = autoattack_accuracy(model, data, index, settings, folder)
    return {"index": index, "clean": clean, "robust": robust}, {
        "settings": settings, "fingerprint": data.fingerprint(), "weights": weights_hash(model.state_dict()),
        "versions": {name: version(name) for name in ("torch", "torchvision", "pyautoattack")},
        "accuracy": accuracies(clean, robust, data.test.y[index], data.classes, A_classes)}


def autoattack_accuracy(model, data, index, settings, folder):
    """AutoAttack on the test examples `index`: bool (n,) clean and robust. settings: of eval_settings. The
    examples are dealt to the processes in chunks of a batch, chunk c with the seed seed + c. Finished chunks
    are saved in `folder`, under a hash of all they depend on: a stopped evaluation goes on from there."""
    same = {k: v for k, v in data.fingerprint().items() if k != "images"}  # these were checked before
    key = json.dumps([weights_hash(model.state_dict()), same, index.tolist(), settings], sort_keys=True)
    folder = Path(folder) / hashlib.sha256(key.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    chunks = list(enumerate(index.split(settings["batch_size"])))[process_index()::process_count()]
    device = next(model.parameters()).device
    right = torch.zeros(2, len(index), dtype=torch.int32, device=device)  # clean, robust
    with common.progress(None, total=sum(len(part) for _, part in chunks), unit="example",
                         desc=f"AutoAttack ({' '.join(settings['attacks'])})") as bar, Watch(bar):
        for c, part in chunks:
            path, chunk = folder / f"chunk{c:05d}.pt", None
            with contextlib.suppress(UserError):  # one that is missing or cannot be read is made again
                chunk = runs.load(path)
            if not isinstance(chunk, torch.Tensor) or chunk.shape != (2, len(part)):
                try:
                    chunk = torch.stack(attacks.autoattack(
                        model, data.test.pixels(part, "cpu"), data.test.y[part], eps=settings["eps"],
                        norm=settings["norm"], attacks=settings["attacks"], batch_size=len(part),
                        seed=settings["seed"] + c))
                except (ArithmeticError, ValueError) as e:
                    raise UserError(str(e)) from None
                runs.save(path, chunk)
            first = c * settings["batch_size"]
            right[:, first:first + len(part)] = chunk.to(device)
            bar.n += len(part)
    return tuple(common.all_sum(right).bool().cpu())


class Watch:
    """A context in which what pyautoattack logs is shown: its progress in `bar` or, if stderr is no terminal,
    in a line after each attack; each kind of its warnings once."""

    def __init__(self, bar):
        self.bar, self.warned, self.log = bar, set(), logging.getLogger("auto-attack")

    def __enter__(self):
        self.log.setLevel(logging.DEBUG)
        self.log.addFilter(self.show)

    def __exit__(self, *error):
        self.log.removeFilter(self.show)

    def show(self, record):
        """Shows a record of the package. Returns False, so that logging does not."""
        text = record.getMessage()
        kind = re.sub(r"\d", "", text)  # warnings of one kind differ in their numbers
        after = re.match(r"robust accuracy after ([^:]+): ([\d.]+)%", text)
        if record.levelno < logging.WARNING:
            self.bar.set_postfix_str(text[:60])
            if self.bar.disable and after:
                say(f"  AutoAttack, {self.bar.n} of {self.bar.total} examples done; this batch after "
                    f"{after[1]}: {float(after[2]):.1f} % robust")
        elif kind not in self.warned:
            self.warned.add(kind)
            say(f"AutoAttack warns: {text}")
        return False


def accuracy_lines(result):
    """The accuracies of a result for people: with n, interval, attacks and threat model."""
    settings = result["settings"]
    name = f"AutoAttack's {' and '.join(settings['attacks'])}"
    if set(settings["attacks"]) == set(attacks.STANDARD):
        name = "standard AutoAttack"
    lines = [f"{name}, {settings['norm']} eps {settings['eps']}; 95 % Wilson intervals"]
    for part in [part for part in ("all", "A_val", "B_val") if part in result["accuracy"]]:
        texts = [f"{kind} {100 * a['accuracy']:.1f} % [{100 * a['low']:.1f}, {100 * a['high']:.1f}]"
                 if a["n"] else f"{kind} -" for kind, a in result["accuracy"][part].items()]
        lines.append(f"{part:>6}: {', '.join(texts)}  (n = {result['accuracy'][part]['clean']['n']})")
    return "\n".join(lines)


def finished(folder):
    """The lines that are printed for a run that is finished."""
    result = runs.load(folder / "result.json", ("args", "settings", "accuracy"))
    return f"{folder} is finished (--force repeats it)\n{accuracy_lines(result)}"


def main(argv=None):
    """Loads the checkpoint, attacks it, writes the numbers beside it. Flags that the command line leaves out
    have the values of the checkpoint's run."""
    parser = flags.script_parser("evaluate.py", __doc__, flags.DEFAULTS, "best.pt or last.pt of a run")
    parser.add_argument("--force", action="store_true", help="repeat a finished evaluation, overwriting it")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder that holds the data sets")
    typed = vars(parser.parse_args(argv))
    model, ckpt = load_model(typed["checkpoint"])
    base = {**flags.DEFAULTS, **ckpt["args"]}
    if typed.get("norm", base["norm"]) != base["norm"] and "eps" not in typed:
        raise UserError(f"--norm {typed['norm']} needs an --eps of its own: the checkpoint's {base['eps']} "
                        f"is in {base['norm']} (linf: 0.0314 is 8/255)")
    args = argparse.Namespace(**{**base, **typed})
    device = common.set_up(args)
    data = load_dataset(args.dataset, args.data_dir, device, args.side, args.workers)
    runs.check_fingerprint(data, ckpt["fingerprint"], args.checkpoint)
    settings, weights = eval_settings(args, data), weights_hash(ckpt["model"])
    key = hashlib.sha256(json.dumps([weights, settings], sort_keys=True).encode()).hexdigest()[:8]
    path, chunks = (args.checkpoint.with_name(f"eval-{key}{end}") for end in (".json", "-chunks"))
    if path.exists() and not args.force:
        return say(f"{path} is there already (--force repeats it)\n{accuracy_lines(runs.load(path))}")
    say(f"evaluating {args.checkpoint} ({data.name}, epoch {ckpt['epoch']}) on {device}")
    _, result = evaluate(model.to(device), data, settings, chunks, ckpt["A_classes"])
    if process_index() == 0:
        runs.write_json(path, {"checkpoint": args.checkpoint.name, "epoch": ckpt["epoch"], **result})
        shutil.rmtree(chunks, ignore_errors=True)
    say(f"{accuracy_lines(result)}\nwrote {path}")


if __name__ == "__main__":
    common.script(main)
