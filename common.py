"""What the scripts share: flags from YAML and the command line, run directories, device, torchrun set-up, atomic files.

Admission rule for this file: three callers, no mathematics.
"""
import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
# Flags that say where and how fast, not what: they do not belong to a run's identity.
NOT_IDENTITY = {"config", "device", "threads", "amp", "compile", "workers", "data_dir", "results", "run", "force"}


class UserError(Exception):
    """A mistake the user can mend: printed as one line, exit code 2, no traceback."""


class Parser(argparse.ArgumentParser):
    """argparse, with errors as UserError, so that a wrong value in a YAML file can be reported with the file's name."""

    def error(self, message):
        """Raises UserError in place of argparse's exit."""
        raise UserError(f"{message} (python {self.prog} --help lists what is valid)")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as they stand in the docstring; a default after each help text that has one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, [], argparse.SUPPRESS) else super()._get_help_string(action)


def number(kind, low, high=float("inf"), open_low=False):
    """A type for argparse: an int or a float in [low, high], or in (low, high] with open_low."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not (low < value <= high if open_low else low <= value <= high) or value == float("inf"):
            what = "a whole number" if kind is int else "a number"
            bound = f"{'above' if open_low else 'of at least'} {low}" + (f" and at most {high}" if high < 1e9 else "")
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {bound}")
        return value
    return convert


def plain_name(text):
    """A type for argparse: a data set's or run's name, which becomes a folder's name, so no path."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a plain name (letters, digits, . _ + = -)")
    return text


count, positive = number(int, 1), number(float, 0, open_low=True)

# group -> (flag, default, type, choices or bool, help); a tuple (type, "+") takes a list.
FLAGS = {
    "data and network": [
        ("--dataset", "digits", plain_name, "digits, digits0-4, digits5-9, cifar10, cifar100 or a folder in --data-dir"),
        ("--data-dir", "data", Path, "folder that holds (or receives) the data sets"),
        ("--arch", "preactresnet8", ("preactresnet8", "preactresnet18", "resnet50"), "network"),
        ("--augment", "full", ("none", "crop", "full"), "training images: none; pad an eighth and crop; or all of Fig. 9"),
    ],
    "subset A (Sec. 3)": [
        ("--split", "esat", ("none", "csat", "esat", "full"), "A = nothing, whole classes, single examples, everything"),
        ("--frac", None, number(float, 0, 1, open_low=True), "|A| as a fraction: of the classes (csat), of the examples (esat)"),
        ("--size", None, count, "|A| as a number, in place of --frac: of classes (csat), of examples (esat)"),
        ("--classes", None, (str, "+"), "csat: the classes of A by name, in place of a size and an order"),
        ("--order", "hardest", ("hardest", "easiest", "random"), "which come into A first; random ones by --seed"),
        ("--metric", "entropy", ("entropy",), "difficulty score that orders them (written by rank.py)"),
        ("--weight", "vanilla", ("vanilla", "balanced", "emphasis"), "w_A of Eq. 2: 1, |B|/|A|, (1 + 10|A|/N)|B|/|A|; w_B = 1"),
        ("--weight-factor", None, positive, "w_A as a number, in place of --weight"),
    ],
    "threat model": [
        ("--norm", "l2", ("l2", "linf"), "norm of the perturbation"),
        ("--eps", 0.5, number(float, 0), "its radius, pixels in [0, 1]"),
    ],
    "attack in training": [
        ("--attack", "pgd", ("pgd", "fgsm-rs"), "attack on A; fgsm-rs: one step of 1.25 eps from a random start"),
        ("--steps", 7, count, "PGD steps"),
        ("--step-size", 0.1, number(float, 0), "PGD step, in the units of --eps"),
        ("--random-start", False, bool, "start PGD uniformly in the ball, not at 0"),
    ],
    "training": [
        ("--epochs", 30, count, "passes over the training set"),
        ("--batch-size", 128, count, "examples a step, over all processes together"),
        ("--lr", 0.1, positive, "learning rate of SGD (momentum 0.9)"),
        ("--lr-decays", [], (number(int, 0), "*"), "epochs after which the learning rate falls tenfold"),
        ("--weight-decay", 5e-4, number(float, 0), "L2 decay"),
        ("--seed", 0, number(int, 0, 2**31 - 1), "seed of weights, batches, augmentation and random subsets"),
    ],
    "evaluation (AutoAttack)": [
        ("--eval-attacks", list(ATTACKS), (ATTACKS, "+"), "attacks of the reported numbers; all four = standard AutoAttack"),
        ("--eval-n", 0, number(int, 0), "examples of the 90 %% part to report on; 0 = all"),
        ("--select-attacks", list(ATTACKS), (ATTACKS, "+"), "attacks that select the checkpoint"),
        ("--select-n", 0, number(int, 0), "examples of the 10 %% part that select it; 0 = all"),
        ("--eval-batch", 250, count, "AutoAttack's batch and unit of resume, in examples; changes its random numbers"),
    ],
    "machine": [
        ("--device", "auto", ("auto", "cpu", "cuda"), "auto: a GPU when there is one"),
        ("--threads", 0, number(int, 0), "CPU threads of a process; 0 = torch's choice"),
        ("--amp", "auto", ("auto", "off", "bf16"), "bf16 autocast in training; auto: on GPUs. Evaluation is float32"),
        ("--workers", 4, number(int, 0), "loader processes (224x224 sets only)"),
        ("--results", "results", Path, "folder that receives every run"),
        ("--run", None, plain_name, "name of the run's folder, in place of the one made from the flags"),
        ("--force", False, bool, "repeat a finished run, overwriting it"),
    ],
}


def add_flags(parser, *groups):
    """Adds the flags of the named groups of FLAGS to an argparse parser, each with its default in its help."""
    for title in groups:
        group = parser.add_argument_group(title)
        for flag, default, kind, text in FLAGS[title]:
            how = {"default": default, "help": text}
            if kind is bool:
                how["action"] = argparse.BooleanOptionalAction
            elif isinstance(kind, tuple) and kind[-1] in ("+", "*"):
                how["nargs"] = kind[-1]
                how["choices" if isinstance(kind[0], tuple) else "type"] = kind[0]
            elif isinstance(kind, tuple):
                how["choices"] = kind
            else:
                how.update(type=kind, metavar=flag[2:].split("-")[-1].upper())
            group.add_argument(flag, **how)


def from_yaml(path):
    """The flag values {dest: value} of a flat YAML file, converted and checked by argparse as on the command line."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UserError(f"cannot read the config {path}: {' '.join(str(e).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: a config is a flat list of 'flag: value' lines")
    parser, values = Parser(add_help=False, allow_abbrev=False), {}
    add_flags(parser, *FLAGS)
    kinds = {flag[2:]: kind for group in FLAGS.values() for flag, _, kind, _ in group}
    for key, value in found.items():
        if key not in kinds:
            raise UserError(f"{path}: unknown key {key!r}; valid keys: {', '.join(sorted(kinds))}")
        items = value if isinstance(value, list) else [value]
        if any(v is None or isinstance(v, (dict, list)) or isinstance(v, bool) != (kinds[key] is bool) for v in items):
            raise UserError(f"{path}: {key}: {value!r} is not a value of this flag (python sat.py --help shows its type)")
        if kinds[key] is bool:
            tokens = [f"--{key}" if value else f"--no-{key}"]
        else:
            tokens = [f"--{key}", *map(str, items)] if isinstance(value, list) else [f"--{key}={value}"]
        try:
            dest = key.replace("-", "_")
            values[dest] = getattr(parser.parse_args(tokens), dest)
        except UserError as e:
            raise UserError(f"{path}: {e}") from None
    return values


def parse(parser, argv=None):
    """Parses with the precedence command line > YAML (--config) > defaults. Returns the arguments; `args.base` holds
    what they would be without the command line, from which run names are made."""
    parser.add_argument("--config", type=Path, default=HERE / "configs" / "digits.yaml", metavar="YAML",
                        help="file of flag values; the command line wins over it")
    finder = Parser(add_help=False, allow_abbrev=False, prog=parser.prog)
    finder.add_argument("--config", type=Path, default=parser.get_default("config"))
    config = finder.parse_known_args(argv)[0].config
    dests = {action.dest for action in parser._actions}
    parser.set_defaults(**{k: v for k, v in from_yaml(config).items() if k in dests})
    args = parser.parse_args(argv)
    args.base = {dest: parser.get_default(dest) for dest in dests}
    return args


def identity(args):
    """The flags that make a run what it is: {dest: value} of plain types."""
    return {k: v for k, v in sorted(vars(args).items()) if k != "base" and k not in NOT_IDENTITY}


def run_dir(args, lead, told, done="result.json"):
    """The folder results/<dataset>/<name> of a run, and whether it is finished (the file `done` is there).

    The name is made of the words in `lead`, of every other flag that differs from the config, and of the seed; `told`
    are the flags that `lead` speaks of. Raises UserError when the folder was made with other flags.
    """
    text = lambda v: "+".join(map(str, v)) if isinstance(v, list) else v
    extra = [f"{k.replace('_', '-')}={text(v)}" for k, v in identity(args).items()
             if k not in {*told, "seed", "dataset", "checkpoint"} and v != args.base.get(k)]
    words = [*map(str, lead), *extra, f"seed{args.seed}"]
    folder = args.results / args.dataset / (args.run or re.sub(r"[^A-Za-z0-9_.+=-]+", "_", "-".join(words))[:200])
    if args.force or not (folder / "args.json").exists():
        return folder, False
    before, now = read_json(folder / "args.json"), json.loads(json.dumps(identity(args)))
    differ = [f"{k}: {before.get(k)!r} there, {now.get(k)!r} now" for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
    if differ:
        raise UserError(f"{folder} was made with other flags ({'; '.join(differ)}): name this run with --run, or --force")
    return folder, (folder / done).exists()


def start_run(folder, args):
    """Makes the run's folder (rank 0), emptied of an earlier run's files with --force, with its args.json."""
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if args.force:
            for name in ("result.json", "rank.json", "last.pt", "best.pt", "robust.pt", "scores.pt", "log.jsonl"):
                (folder / name).unlink(missing_ok=True)
        write_json(folder / "args.json", identity(args))
    barrier()


def atomic(path, write):
    """Calls write(file) on a temporary file beside `path`, syncs it to disk and puts it in the place of `path`."""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {e.strerror or e}") from None


def write_json(path, value):
    """Writes plain types as indented JSON, atomically."""
    atomic(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))


def read_json(path):
    """Reads a JSON file; UserError when it is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {e}") from None


def save(path, value):
    """torch.save of plain types and tensors, atomically."""
    import torch
    atomic(path, lambda f: torch.save(value, f))


def save_epoch(run, checkpoint, log):
    """Keeps an epoch: log.jsonl, a line for each row of `log`, and last.pt, from which the run goes on."""
    atomic(run / "log.jsonl", lambda f: f.write("".join(json.dumps(row) + "\n" for row in log).encode()))
    save(run / "last.pt", checkpoint)


def load(path, keys=()):
    """torch.load of plain types and tensors (weights_only, on the CPU): a dict that has `keys`, else a UserError."""
    import torch
    try:
        value = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception as e:  # torch raises many kinds on a truncated or foreign file
        raise UserError(f"{path} is truncated or not a file of this project ({type(e).__name__}): delete or remake it") from None
    missing = [k for k in keys if not isinstance(value, dict) or k not in value]
    if missing:
        raise UserError(f"{path} is not a file of this kind: it lacks {', '.join(missing)}")
    return value


def rank():
    """This process's number under torchrun, 0 without."""
    return int(os.environ.get("RANK", 0))


def world():
    """The number of processes under torchrun, 1 without."""
    return int(os.environ.get("WORLD_SIZE", 1))


def barrier():
    """Waits for all processes."""
    if world() > 1:
        import torch.distributed as dist
        dist.barrier()


def all_sum(tensor):
    """Sums a tensor over the processes, in place, and returns it."""
    if world() > 1:
        import torch.distributed as dist
        dist.all_reduce(tensor)
    return tensor


def set_up(args):
    """Device, threads and, under torchrun, the process group (nccl on GPUs, gloo on CPUs). Returns the device."""
    import torch
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    kind = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if world() > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    return device


def device_name(device):
    """What a result calls the device it ran on."""
    import torch
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"


def remove_chunks(folder):
    """Deletes the AutoAttack chunks that a finished evaluation no longer needs (rank 0, when all are through)."""
    barrier()
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)


def say(text):
    """Prints a line, on rank 0 alone."""
    if rank() == 0:
        print(text, flush=True)


def progress(steps, **how):
    """A tqdm bar over `steps`, shown on rank 0 when stderr is a terminal."""
    from tqdm import tqdm
    return tqdm(steps, disable=rank() != 0 or not sys.stderr.isatty(), leave=False, dynamic_ncols=True, **how)


def script(main):
    """Runs a script's main(): a user's mistake becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last whole epoch", file=sys.stderr)
        sys.exit(130)
