"""Clean and AutoAttack accuracy of a checkpoint, in all and per class, on the 90 % of the test set that are
not used for selecting a checkpoint (Sec. 4, "Training and evaluation details").

    python evaluate.py results/digits/esat-hardest-0.5-seed0/best.pt

Files in: a checkpoint, the data. Files out: eval-<hash of the settings>.json beside the checkpoint. The other
scripts have the content of checkpoints from here.
"""
import contextlib
import hashlib
import json
import logging
import math
import re
import sys
from importlib.metadata import version
from pathlib import Path

import common  # first, so that Ctrl-C while torch loads ends in one line
import numpy
import torch

import attacks
import data as data_
import flags
import models
import runs
from common import UserError, process_index, say, process_count

SEED = 0  # AutoAttack's, the same for every run
CHECKPOINT_KEYS = ("model", "arch", "head", "classes", "args", "fingerprint", "A_classes", "epoch")


def wilson(k, n, z=1.959964):
    """The 95 % Wilson score interval (low, high) of k successes in n trials."""
    if n == 0:
        return 0.0, 1.0
    p, d = k / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / d, z / d * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy(right):
    """The accuracy of bool (n,), with its 95 % Wilson interval: {"n", "accuracy", "low", "high"}, fractions.
    It is None if n = 0."""
    n, k = len(right), int(right.sum())
    low, high = wilson(k, n)
    return {"n": n, "accuracy": k / n if n else None, "low": low, "high": high}


def summary(clean, robust, y, classes, A_classes=None):
    """Clean and robust accuracy on all examples, per class and, if A consists of the classes `A_classes`, on
    A_val and B_val. For each class also which examples were right, in their order, as bits in hexadecimal:
    paired comparisons of runs need them."""
    parts = {"all": torch.ones_like(clean)}
    if A_classes:
        parts["A_val"] = torch.isin(y, torch.tensor([classes.index(c) for c in A_classes]))
        parts["B_val"] = ~parts["A_val"]
    both = lambda part: {"clean": accuracy(clean[part]), "robust": accuracy(robust[part])}
    result = {name: both(part) for name, part in parts.items()}
    bits = lambda right: numpy.packbits(right.numpy()).tobytes().hex()
    by_class = {c: both(y == i) for i, c in enumerate(classes)}
    for i, found in enumerate(by_class.values()):
        found["clean"]["right"], found["robust"]["right"] = bits(clean[y == i]), bits(robust[y == i])
    return {**result, "classes": by_class}


def digest(state):
    """A short hash of a state dict: equal for equal weights."""
    h = hashlib.sha256()
    for key, value in sorted(state.items()):
        h.update(key.encode())
        h.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]


def settings(args, data, which="eval"):
    """What AutoAttack's numbers depend on besides network and data: threat model, attacks (those that exist
    for this many classes), number of examples, batch size and seed. `which`: "eval" or "select"."""
    try:
        usable = attacks.usable(getattr(args, f"{which}_attacks"), len(data.classes))
    except ValueError as e:
        raise UserError(f"--{which}-attacks: {e}") from None
    if args.norm == "linf" and args.eps > 1:
        raise UserError(f"--norm linf --eps {args.eps:g}: pixels are in [0, 1] (8/255 is --eps 0.0314)")
    return {"norm": args.norm, "eps": args.eps, "attacks": usable,
            "n": getattr(args, f"{which}_n"), "batch_size": args.eval_batch, "seed": SEED}


def attack(model, data, index, setting, folder):
    """AutoAttack on the test examples `index`: bool (n,) clean and robust.

    They are dealt to the processes in chunks of a batch, chunk c with the seed seed + c. Finished chunks are
    kept in `folder`, under a hash of all that they depend on: a stopped evaluation goes on from there.
    """
    same = {k: v for k, v in data.fingerprint().items() if k != "images"}  # these were checked before
    what = json.dumps([digest(model.state_dict()), same, index.tolist(), setting], sort_keys=True)
    folder = Path(folder) / hashlib.sha256(what.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    chunks = list(enumerate(index.split(setting["batch_size"])))[process_index()::process_count()]
    device = next(model.parameters()).device
    right = torch.zeros(2, len(index), dtype=torch.int32, device=device)  # clean, robust
    with common.progress(None, total=sum(len(part) for _, part in chunks), unit="example",
                         desc=f"AutoAttack ({' '.join(setting['attacks'])})") as bar, watched(bar):
        for c, part in chunks:
            kept, found = folder / f"chunk{c:05d}.pt", None
            with contextlib.suppress(UserError):  # one that is missing or cannot be read is made again
                found = runs.load(kept)
            if not isinstance(found, torch.Tensor) or found.shape != (2, len(part)):
                found = attack_chunk(model, data.test, part, setting, c)
                runs.save(kept, found)
            at = c * setting["batch_size"]
            right[:, at:at + len(part)] = found.to(device)
            bar.n += len(part)
    return tuple(common.all_sum(right).bool().cpu())


def attack_chunk(model, test, part, setting, c):
    """AutoAttack on the examples `part`, chunk c of an evaluation: clean and robust, bool (2, n)."""
    try:
        return torch.stack(attacks.autoattack(
            model, test.pixels(part, "cpu"), test.y[part], eps=setting["eps"], norm=setting["norm"],
            attacks=setting["attacks"], batch_size=len(part), seed=setting["seed"] + c))
    except ArithmeticError as e:  # FloatingPointError too
        raise UserError(str(e)) from None


class Watch(logging.Handler):
    """Shows what pyautoattack logs: its progress in `bar` or, if stderr is no terminal, in a line after each
    attack; each kind of its warnings once."""

    def __init__(self, bar):
        super().__init__()
        self.bar, self.known = bar, set()

    def emit(self, record):
        """Called by logging with every record of the package."""
        text = record.getMessage()
        kind = re.sub(r"\d", "", text)  # warnings of one kind differ in their numbers
        if record.levelno >= logging.WARNING and kind not in self.known:
            self.known.add(kind)
            say(f"AutoAttack warns: {text}")
        elif record.levelno < logging.WARNING:
            self.bar.set_postfix_str(text[:60])
            after = re.match(r"robust accuracy after ([^:]+): ([\d.]+)%", text)
            if self.bar.disable and after:
                say(f"  AutoAttack, {self.bar.n} of {self.bar.total} examples done; this batch after "
                    f"{after[1]}: {float(after[2]):.1f} % robust")


@contextlib.contextmanager
def watched(bar):
    """Inside, what pyautoattack logs goes to a Watch alone; then its logger is as it was."""
    log, watch = logging.getLogger("auto-attack"), Watch(bar)
    level, propagate = log.level, log.propagate
    log.addHandler(watch)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(watch)
        log.setLevel(level)
        log.propagate = propagate


def head_line(result):
    """The accuracies of a result for people: with n, interval, attacks and threat model."""
    s, text = result["settings"], []
    for part in ("all", "A_val", "B_val"):
        if part in result["accuracy"]:
            shown = [f"{kind} {100 * a['accuracy']:.1f} % [{100 * a['low']:.1f}, {100 * a['high']:.1f}]"
                     if a["n"] else f"{kind} -"
                     for kind, a in result["accuracy"][part].items()]
            text.append(f"{part:>6}: {', '.join(shown)}  (n = {result['accuracy'][part]['clean']['n']})")
    standard = set(s["attacks"]) == set(attacks.STANDARD)
    aa = "standard AutoAttack" if standard else f"AutoAttack's {' and '.join(s['attacks'])}"
    return "\n".join([f"{aa}, {s['norm']} eps {s['eps']}; 95 % Wilson intervals", *text])


def finished(run):
    """The lines that are printed for a run that is finished."""
    result = runs.read_json(run / "result.json", ("settings", "accuracy"))
    try:
        return f"{run} is finished (--force repeats it)\n{head_line(result)}"
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{run / 'result.json'} is not a result of this project ({type(e).__name__}): "
                        "--force makes its run again") from None


def versions():
    """The versions of the packages on which the numbers depend."""
    return {name: version(name) for name in ("torch", "torchvision", "pyautoattack")}


def checkpoint(model, data, args, epoch, A_classes=None, **more):
    """The content of a checkpoint: the weights, and all that is needed to use them without the configs."""
    return {"model": model.state_dict(), "arch": args.arch, "head": "mlp" if model.frozen else "linear",
            "classes": data.classes, "fingerprint": data.fingerprint(), "args": runs.identity(args),
            "epoch": epoch, "A_classes": A_classes, **more}


def read_checkpoint(path):
    """The content of a checkpoint, checked as far as that goes without building the network. Raises UserError
    for a foreign file."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the checkpoint in it, say {path / 'best.pt'}")
    ckpt = runs.load(path, CHECKPOINT_KEYS)
    args, classes, a = ckpt["args"], ckpt["classes"], ckpt["A_classes"]
    if not (isinstance(args, dict) and {"dataset", "side"} <= set(args)
            and isinstance(ckpt["fingerprint"], dict)
            and isinstance(classes, list) and all(isinstance(c, str) for c in classes)
            and isinstance(ckpt["epoch"], int)
            and (a is None or isinstance(a, list) and set(a) <= set(classes))
            and isinstance(ckpt["model"], dict)):
        raise UserError(f"{path} is not a checkpoint of this project: its args, classes or fingerprint are "
                        "not as sat.py writes them")
    return ckpt


def load_model(path):
    """The Classifier of a checkpoint and the checkpoint's content. Raises UserError for a foreign file."""
    ckpt = read_checkpoint(path)
    try:
        mean, std = (ckpt["model"][k].flatten().tolist() for k in ("mean", "std"))
        model = models.build(ckpt["arch"], len(ckpt["classes"]), mean, std)
        if ckpt["head"] == "mlp":
            model.transfer(len(ckpt["classes"]))
        model.load_state_dict(ckpt["model"], strict=True)
    except (KeyError, RuntimeError, ValueError, AttributeError, TypeError) as e:
        why = " ".join(str(e).split())[:200]
        raise UserError(f"{path} is not a checkpoint of this project: {why}") from None
    return model, ckpt


def command_line(argv):
    """Parses the command line. Flags that it leaves out have their values of the checkpoint's run."""
    usage = "python evaluate.py CHECKPOINT [--flag VALUE ...]"
    parser = flags.Parser(prog="evaluate.py", usage=usage, description=__doc__, formatter_class=flags.Help)
    parser.add_argument("checkpoint", type=Path, help="best.pt or last.pt of a run")
    flags.add_flags(parser, *flags.SCRIPTS["evaluate.py"])
    parser.add_argument("--force", action="store_true", help="repeat a finished evaluation, overwriting it")
    parser.add_argument("--data-dir", type=Path, default=Path("data"),
                        help="folder that holds the data sets")
    words, theirs = sys.argv[1:] if argv is None else argv, {}
    told = [word for word in words if word not in ("-h", "--help")]
    try:
        ckpt, valid = read_checkpoint(parser.parse_args(told).checkpoint), {a.dest for a in parser._actions}
        theirs = {k: v for k, v in ckpt["args"].items() if k in valid}
    except UserError:
        if told == words:
            raise  # else --help shows the defaults without a checkpoint
    parser.set_defaults(**theirs)
    args = parser.parse_args(words)
    if args.norm != theirs.get("norm", args.norm) and not flags.given(argv, "--eps"):
        raise UserError(f"--norm {args.norm} needs an --eps of its own: the checkpoint's {theirs['eps']} is "
                        f"in {theirs['norm']} (linf: 0.0314 is 8/255)")
    return args


def main(argv=None):
    """Loads the checkpoint, attacks it, writes the numbers beside it."""
    args = command_line(argv)
    device = common.set_up(args)
    model, ckpt = load_model(args.checkpoint)
    data = data_.load_dataset(ckpt["args"]["dataset"], args.data_dir, device, ckpt["args"]["side"], args.workers)
    data_.check_fingerprint(data, ckpt["fingerprint"], args.checkpoint)
    setting = settings(args, data)
    key = hashlib.sha256(json.dumps([digest(ckpt["model"]), setting],
                                    sort_keys=True).encode()).hexdigest()[:8]
    out = args.checkpoint.parent / f"eval-{key}.json"
    if out.exists() and not args.force:
        say(f"{out} is there already (--force repeats it)\n{head_line(runs.read_json(out))}")
        return
    say(f"evaluating {args.checkpoint} ({data.name}, epoch {ckpt['epoch']}) on {device}")
    index = data_.selection_and_final(len(data.test))[1][:args.eval_n or None]
    folder = args.checkpoint.parent / f"eval-{key}-chunks"
    clean, robust = attack(model.to(device), data, index, setting, folder)
    result = {"checkpoint": args.checkpoint.name, "epoch": ckpt["epoch"], "settings": setting,
              "versions": versions(), "fingerprint": ckpt["fingerprint"], "weights": digest(ckpt["model"]),
              "accuracy": summary(clean, robust, data.test.y[index], data.classes, ckpt["A_classes"])}
    if process_index() == 0:
        runs.write_json(out, result)
    common.remove(folder)
    say(f"{head_line(result)}\nwrote {out}")


if __name__ == "__main__":
    common.script(main)
