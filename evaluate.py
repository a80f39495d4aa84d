"""Clean and AutoAttack accuracy of a checkpoint, in all and per class, on the 90 % of the test set that are
not used for selecting a checkpoint (Sec. 4, "Training and evaluation details").

    python evaluate.py results/digits/esat-hardest-0.5-seed0/best.pt

Flags of the threat model and of AutoAttack that are not given have the values of the checkpoint's run.
Files in: a checkpoint, the data. Files out: eval-<hash of weights and settings>.json beside the checkpoint.
"""
import argparse
import contextlib
import copy
import hashlib
import json
import logging
import math
import platform
import re
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import numpy
import torch

import attacks
import common
import flags
import runs
from common import UserError, process_count, process_index, say
from data import check_unchanged, load_dataset, selection_and_final
from models import load_model

VERSIONS = {"python": platform.python_version(), "cuda": torch.version.cuda,
            **{name: version(name) for name in ("torch", "torchvision", "numpy", "pyautoattack")}}


def wilson(k, n, z=1.959964):
    """The 95 % Wilson score interval (low, high) of k successes in n > 0 trials."""
    p, scale = k / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / scale, z / scale * math.sqrt(p * (1 - p) / n + (z / (2 * n))**2)
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy(right):
    """The accuracy of bool (n,), None if n = 0, with its 95 % Wilson interval, as fractions."""
    n, k = len(right), int(right.sum())
    low, high = wilson(k, n) if n else (0.0, 1.0)
    return {"n": n, "accuracy": k / n if n else None, "low": low, "high": high}


def accuracies(clean, robust, y, classes, A_classes=None):
    """The accuracies of `clean` and `robust`, bool (n,): {part: {"clean", "robust": accuracy()}}. The parts
    are "all" and, if A consists of the classes `A_classes`, "A_val" and "B_val". "classes" holds the same for
    each class, with "right": which of its examples were right, packed bits in hexadecimal, by which runs can
    be compared in pairs."""
    parts, kinds = {"all": torch.ones_like(clean)}, {"clean": clean, "robust": robust}
    if A_classes:
        parts["A_val"] = torch.isin(y, torch.tensor([classes.index(c) for c in A_classes]))
        parts["B_val"] = ~parts["A_val"]
    result = {part: {kind: accuracy(r[where]) for kind, r in kinds.items()} for part, where in parts.items()}
    result["classes"] = {c: {kind: {**accuracy(r[y == i]), "right": numpy.packbits(r[y == i]).tobytes().hex()}
                             for kind, r in kinds.items()} for i, c in enumerate(classes)}
    return result


def weights_hash(state):
    """A short hash of a state dict, equal for equal weights."""
    h = hashlib.sha256()
    for key, value in sorted(state.items()):
        h.update(key.encode())
        h.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]


def eval_settings(args, classes, prefix="eval"):
    """The settings on which AutoAttack's numbers depend besides network and data, from the flags --eval-* or
    --select-* (`prefix`). UserError for values that AutoAttack does not take."""
    try:
        usable = attacks.usable_attacks(getattr(args, f"{prefix}_attacks"), len(classes))
    except ValueError as e:
        raise UserError(f"--{prefix}-attacks: {e}") from None
    if args.norm == "linf" and args.eps > 1:
        raise UserError(f"--norm linf --eps {args.eps:g}: pixels are in [0, 1] (8/255 is --eps 0.0314)")
    settings = {"norm": args.norm, "eps": args.eps, "attacks": usable,
                "n": getattr(args, f"{prefix}_n"), "batch_size": args.eval_batch, "seed": 0}
    if prefix == "eval" and args.eval_precision == "tf32":
        if args.device != "cpu" and torch.cuda.is_available():
            settings["precision"] = "tf32"  # without this key it is float32
        else:
            say("note: --eval-precision tf32 has no effect on a CPU")
    return settings


@contextlib.contextmanager
def tf32_convolutions():
    """A context in which GPUs convolve float32 tensors in TF32, torch's own default."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def in_default_format(model):
    """A copy of the network in torch's default memory format, in which GPUs convolve float32 faster than in
    channels_last."""
    model = copy.deepcopy(model)
    for p in model.parameters():  # .to() would leave 1x1 weights in channels_last, and so their outputs
        p.data = p.data.clone(memory_format=torch.contiguous_format)
    return model


def evaluate(model, data, settings, chunk_folder, A_classes=None):
    """Evaluates on the 90 % of the test set that do not select a checkpoint. Returns the content of robust.pt
    and what the results of sat.py, transfer.py and evaluate.py have in common."""
    index = selection_and_final(len(data.test))[1][:settings["n"] or None]
    clean, robust, warnings = autoattack_accuracy(model, data, index, settings, chunk_folder)
    return {"index": index, "clean": clean, "robust": robust}, {
        "settings": settings, "fingerprint": data.fingerprint(), "weights": weights_hash(model.state_dict()),
        "versions": VERSIONS,
        "warnings": warnings,
        "accuracy": accuracies(clean, robust, data.test.y[index], data.classes, A_classes)}


def autoattack_accuracy(model, data, index, settings, folder):
    """AutoAttack on the test examples `index`: clean and robust, bool (n,), and its warnings. settings: from
    eval_settings. The processes share the examples in chunks of a batch; chunk c has the seed seed + c. A
    stopped evaluation resumes from the finished chunks, saved in `folder` under a hash of weights, examples,
    settings, data (without pixels, which the callers have checked) and versions."""
    without_images = {k: v for k, v in data.fingerprint().items() if k != "images"}  # checked before
    parts_of_key = [weights_hash(model.state_dict()), without_images, index.tolist(), settings, VERSIONS]
    key = json.dumps(parts_of_key, sort_keys=True)
    folder = Path(folder) / hashlib.sha256(key.encode()).hexdigest()[:16]
    chunks = list(enumerate(index.split(settings["batch_size"])))[process_index()::process_count()]
    device = next(model.parameters()).device
    right = torch.zeros(2, len(index), dtype=torch.int32, device=device)  # clean, robust
    if device.type == "cuda":
        model = in_default_format(model)
    precision = tf32_convolutions if settings.get("precision") == "tf32" else contextlib.nullcontext
    with Watch(settings["attacks"], sum(len(indices) for _, indices in chunks)) as watch:
        for c, indices in chunks:
            path, chunk = folder / f"chunk{c:05d}.pt", {}
            with contextlib.suppress(UserError):  # one that is missing or cannot be read is made again
                chunk = runs.load(path, ("right", "warnings"))
            is_new = "right" not in chunk or chunk["right"].shape != (2, len(indices))
            if is_new:
                try:
                    chunk = {"right": torch.stack(attacks.autoattack(
                        model, data.test.pixels(indices, "cpu"), data.test.y[indices], eps=settings["eps"],
                        norm=settings["norm"], attacks=settings["attacks"], batch_size=len(indices),
                        seed=settings["seed"] + c, precision=precision)), "warnings": watch.new_warnings}
                except (ArithmeticError, ValueError) as e:
                    raise UserError(str(e)) from None
                folder.mkdir(parents=True, exist_ok=True)  # an equal evaluation deletes it at its end
                runs.save(path, chunk)
            first = c * settings["batch_size"]
            right[:, first:first + len(indices)] = chunk["right"].to(device)
            watch.count(chunk, is_new)
    clean, robust = common.all_reduce(right).bool().cpu()
    return clean, robust, common.all_texts(list(watch.warnings.values()))


class Watch:
    """A context in which people see what AutoAttack does: the examples done and the time that remains, in a
    bar or, if stderr is no terminal, in lines; each kind of its warnings once."""

    def __init__(self, attack_names, total):
        self.bar = common.progress(None, total=total, unit="example",
                                   desc=f"AutoAttack ({' '.join(attack_names)})")
        self.total, self.n_done, self.n_attacked, self.n_robust = total, 0, 0, 0
        self.of_total = f"{total:,}" + (" (process 0's)" if process_count() > 1 else "")
        self.new_warnings = []  # since the last chunk
        self.warnings = {}      # {text without its numbers: text}, each kind once
        self.start_time, self.log = time.perf_counter(), logging.getLogger("auto-attack")
        self.level = self.log.level

    def __enter__(self):
        self.log.setLevel(logging.DEBUG)
        self.log.addFilter(self.show)
        return self

    def __exit__(self, *error):
        self.log.removeFilter(self.show)
        self.log.setLevel(self.level)
        self.bar.close()

    def show(self, record):
        """Shows a log record of the package. Returns False, so that logging does not print it as well."""
        text = record.getMessage()
        match = re.match(r"robust accuracy after ([^:]+): ([\d.]+)%", text)
        if record.levelno < logging.WARNING:
            self.bar.set_postfix_str(text[:60])
            if self.bar.disable and match:
                say(f"  AutoAttack, batch from example {self.n_done + 1:,} of {self.of_total}: "
                    f"{float(match[2]):.1f} % robust after {match[1]}")
        else:
            self.warn(text)
            self.new_warnings.append(text)
        return False

    def warn(self, text):
        """Shows and keeps a warning, unless one that differs only in numbers has been shown."""
        kind = re.sub(r"\d", "", text)
        if kind not in self.warnings:
            self.warnings[kind] = text
            say(f"AutoAttack warns: {text}")

    def count(self, chunk, is_new):
        """Counts a chunk as done, and keeps its warnings. `is_new`: it was not read from a file."""
        for text in chunk["warnings"]:
            self.warn(text)
        self.new_warnings = []
        n = chunk["right"].shape[1]
        self.n_done, self.n_robust = self.n_done + n, self.n_robust + int(chunk["right"][1].sum())
        self.n_attacked += n if is_new else 0
        self.bar.update(n)
        if self.bar.disable and self.n_attacked:
            seconds = (time.perf_counter() - self.start_time) / self.n_attacked
            remaining = common.duration(seconds * (self.total - self.n_done))
            say(f"  AutoAttack: {self.n_done:,} of {self.of_total} examples done, "
                f"{self.n_robust / self.n_done:.1%} robust; {remaining} left")


def accuracy_lines(result):
    """The accuracies of a result for people: with n, interval, attacks and threat model."""
    settings = result["settings"]
    name = f"AutoAttack's {' and '.join(settings['attacks'])}"
    if set(settings["attacks"]) == set(attacks.STANDARD):
        name = "standard AutoAttack"
    if "precision" in settings:
        name += " in TF32, checked in float32"
    lines = [f"{name}, {settings['norm']} eps {settings['eps']:g}; 95 % Wilson intervals"]
    for part in [part for part in ("all", "A_val", "B_val") if part in result["accuracy"]]:
        texts = [f"{kind} {100 * a['accuracy']:.1f} % [{100 * a['low']:.1f}, {100 * a['high']:.1f}]"
                 if a["n"] else f"{kind} -" for kind, a in result["accuracy"][part].items()]
        lines.append(f"{part:>6}: {', '.join(texts)}  (n = {result['accuracy'][part]['clean']['n']})")
    return "\n".join(lines)


def result_of_finished_run(folder, args):
    """Prints the result of a finished run and returns it. With other flags of evaluation than the run's, its
    best.pt is evaluated again. UserError if its data have changed (see check_unchanged)."""
    result = runs.load(folder / "result.json", ("args", "settings", "accuracy", "fingerprint"))
    check_unchanged(args, result["fingerprint"], folder / "result.json")
    settings, stored = eval_settings(args, result["fingerprint"]["classes"]), result["settings"]
    # Of the precision the flags are compared, since the setting depends on whether there is a GPU.
    settings["precision"] = args.eval_precision or "float32"
    if settings == {**stored, "precision": result["args"].get("eval_precision") or "float32"}:
        say(f"{folder} is finished (--force repeats it)\n{accuracy_lines(result)}")
        return result
    say(f"{folder} is finished (--force repeats it); evaluating its best.pt with the new flags")
    path = folder / "best.pt"
    again = argparse.Namespace(**{**vars(args), "force": False})  # it repeats a run, not an evaluation
    return {**result, **evaluate_checkpoint(path, *load_model(path), again)}


def evaluate_checkpoint(path, model, ckpt, args):
    """Attacks the network of a checkpoint, writes the result beside it, prints it and returns it. `model`,
    `ckpt`: of load_model. args.force: repeat an evaluation that is already there."""
    device = common.set_up(args)
    data = load_dataset(args.dataset, args.data_dir, device, args.side, args.workers)
    runs.check_fingerprint(data, ckpt["fingerprint"], path)
    settings, weights = eval_settings(args, data.classes), weights_hash(ckpt["model"])
    key = hashlib.sha256(json.dumps([weights, settings], sort_keys=True).encode()).hexdigest()[:8]
    file, chunk_folder = (path.with_name(f"eval-{key}{end}") for end in (".json", "-chunks"))
    if file.exists() and not args.force:
        result = runs.load(file, ("settings", "accuracy"))
        say(f"{file} is there already (evaluate.py --force repeats it)\n{accuracy_lines(result)}")
        return result
    say(f"evaluating {path} ({data.name}, epoch {ckpt['epoch']}) on {device}")
    _, result = evaluate(model.to(device), data, settings, chunk_folder, ckpt["A_classes"])
    result = {"checkpoint": path.name, "epoch": ckpt["epoch"], **result}
    if process_index() == 0:
        runs.write_json(file, result)
        shutil.rmtree(chunk_folder, ignore_errors=True)
    say(f"{accuracy_lines(result)}\nwrote {file}")
    return result


def main(argv=None):
    """Evaluates the checkpoint."""
    of_machine = {k: flags.DEFAULTS[k] for k in ("device", "threads", "workers")}
    parser = flags.script_parser("evaluate.py", __doc__, of_machine, "best.pt or last.pt of a run")
    parser.add_argument("--force", action="store_true", help="repeat a finished evaluation, overwriting it")
    parser.add_argument("--data-dir", type=flags.file_path, default=Path("data"),
                        help="folder that holds the data sets")
    given = vars(parser.parse_args(argv))
    model, ckpt = load_model(given["checkpoint"])
    base = {**flags.DEFAULTS, **ckpt["args"]}
    if given.get("norm", base["norm"]) != base["norm"] and "eps" not in given:
        raise UserError(f"--norm {given['norm']} needs an --eps of its own: the checkpoint's {base['eps']} "
                        f"is in {base['norm']} (linf: 0.0314 is 8/255)")
    args = argparse.Namespace(**{**base, **given})
    return evaluate_checkpoint(args.checkpoint, model, ckpt, args)


if __name__ == "__main__":
    common.script(main)
