"""Defines the flags that scripts share, in groups. GROUPS lists the groups of each script."""
import argparse
import contextlib
import difflib
import os
import re
import sys
from pathlib import Path

from common import UserError

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
METRICS = ("entropy", "svar", "vog")
ORDERS = ("hardest", "easiest", "random", "redrawn")
WEIGHTS = ("vanilla", "balanced", "emphasis")
# The flags that can say how large A is, by --split.
AMOUNTS = {"none": (), "full": (), "esat": ("frac", "size", "subset"), "csat": ("frac", "size", "classes")}
ARCHS = ("preactresnet8", "preactresnet18", "preactresnet18-authors", "resnet50")


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError, so that an error in a YAML file is reported with the file's name. It
    takes flags with underscores, as --lr_decays, and says to which flag an unknown one is nearest."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_known_args(self, argv=None, namespace=None):
        """As argparse's, with underscores in flags read as hyphens."""
        words = [word.partition("=") for word in (sys.argv[1:] if argv is None else map(str, argv))]
        return super().parse_known_args([
            (name.replace("_", "-") if name.startswith("--") else name) + equals + value
            for name, equals, value in words], namespace)

    def parse_args(self, argv=None, namespace=None):
        """As argparse's. UserError for unknown flags, with the nearest one."""
        args, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{nearest(unknown[0], self.flags())}")
        return args

    def flags(self):
        """All flags that it knows."""
        return [flag for action in self._actions for flag in action.option_strings]

    def error(self, message):
        """Raises UserError where argparse would exit."""
        raise UserError(f"{message} (python {self.prog} --help lists what is valid)")


def nearest(name, valid):
    """The question "did you mean ...?" with the nearest of the valid names; empty if none is near."""
    near = difflib.get_close_matches(name.partition("=")[0], valid, 1)
    return f"; did you mean {near[0]}?" if near else ""


def number(cls, low, high=1e30, low_excluded=False):
    """A type for argparse: an int or a float in [low, high], or in (low, high] with `low_excluded`. A float
    may be a fraction, as 8/255. float32 can hold the default of `high`."""
    adjective = {int: "a whole", float: "a finite"}[cls]
    bound = "above" if low_excluded else "of at least"

    def convert(text):
        """The number that a text is. ArgumentTypeError, which argparse shows, for another text."""
        numerator, slash, denominator = text.partition("/")
        with contextlib.suppress(ValueError, ZeroDivisionError):
            value = float(numerator) / float(denominator) if slash and cls is float else cls(text)
            if low <= value <= high and not (low_excluded and value == low):
                return value
        raise argparse.ArgumentTypeError(
            f"{text!r} is not {adjective} number {bound} {low} and at most {high}")
    return convert


def file_path(text):
    """A type for argparse: a path. A ~ at its start means the home folder even where no shell expands
    it: in a config, and in --results=~/x."""
    return Path(os.path.expanduser(text))


def plain_name(text):
    """A type for argparse: the name of a data set or a run. It names a folder, so it must not be a path."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a plain name (letter, digit or _, then also .+=-)")
    return text


def weight_name(text):
    """A type for argparse: the name of a weight w_A."""
    if text not in WEIGHTS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(WEIGHTS)}; a number is given as "
                                         "--weight-factor NUMBER")
    return text


def attack_name(text):
    """A type for argparse: a name in attacks.ATTACKS."""
    from attacks import ATTACKS  # imported here, because report.py and run_all.py do without torch
    if text not in ATTACKS:
        raise argparse.ArgumentTypeError(f"there is no attack {text!r}; valid: {', '.join(ATTACKS)}")
    return text


count, positive = number(int, 1, 10**9), number(float, 0, low_excluded=True)
not_negative, whole = number(float, 0), number(int, 0, 10**9)

# {group: [(flag, default, value_type, help)]}. value_type: a type, a tuple of choices, or bool for a switch;
# a tuple that ends in "+" or "*" takes a list, of a type or of choices.
FLAGS = {
    "network": [("--arch", "preactresnet8", ARCHS, "network (docs/DEVIATIONS.md: preactresnet18-authors)")],
    "data": [
        ("--dataset", "digits", plain_name, "one of the paper's, digits, digits0-4, digits5-9, or your own"),
        ("--data-dir", Path("data"), file_path, "folder that holds (or receives) the data sets"),
        ("--side", 224, number(int, 32, 10**4), "side in pixels of streamed images (where not all are square,"
         " of one size and at most 64)"),
        ("--augment", "full", ("none", "crop", "full"), "none; pad an eighth and crop; or all of Fig. 9"),
    ],
    "subset A (Sec. 3)": [
        ("--split", "esat", ("none", "csat", "esat", "full"), "A: nothing, classes, examples, everything"),
        ("--frac", None, number(float, 0, 1, low_excluded=True),
         "|A| as a fraction (0.5 if no flag gives the size of A)"),
        ("--size", None, count, "|A| as a number of classes (csat) or examples (esat), in place of --frac"),
        ("--classes", None, (str, "+"), "csat: the classes of A by name, in place of a size and an order"),
        ("--order", "hardest", ORDERS, "which are in A; random: by --seed; redrawn: anew every epoch"),
        ("--metric", "entropy", METRICS, "difficulty score that orders them (written by rank.py)"),
        ("--scores", None, file_path, "file of N numbers, higher = harder, in place of rank.py's scores (or "
         "a scores.pt of rank.py): .pt, .npy or .npz"),
        ("--ranking", None, file_path, "file of the N indices from 0, hardest first, in place of scores"),
        ("--subset", None, file_path,
         "esat: file with A itself, a bool mask (N,) or the indices of its examples"),
        ("--weight", "vanilla", weight_name,
         "w_A of Eq. 2: vanilla 1, balanced |B|/|A|, emphasis (1 + 10|A|/N)|B|/|A|; w_B = 1"),
        ("--weight-factor", None, positive, "w_A as a number, in place of --weight"),
    ],
    "threat model": [
        ("--norm", "l2", ("l2", "linf"), "norm of the perturbation"),
        ("--eps", 0.5, not_negative, "its radius, pixels in [0, 1]"),
    ],
    "attack in training": [
        ("--attack", "pgd", attack_name, "pgd; fgsm-rs, one step of 1.25 eps from a random start; "
         "pgd-authors, the iterate of the highest loss; or one of your own (attacks.py, ATTACKS)"),
        ("--steps", 7, count, "PGD steps"),
        ("--step-size", 0.1, not_negative, "PGD step, in the units of --eps"),
        ("--random-start", False, bool, "start PGD uniformly in the ball, not at 0"),
    ],
    "training": [
        ("--epochs", 30, count, "passes over the training set"),
        ("--batch-size", 128, count, "examples a step, over all processes together"),
        ("--lr", 0.1, positive, "learning rate of SGD (momentum 0.9)"),
        ("--lr-decays", [], (whole, "*"), "epochs after which the learning rate falls tenfold"),
        ("--weight-decay", 5e-4, not_negative, "L2 decay"),
        ("--seed", 0, number(int, 0, 2**31 - 1), "seed of weights, batches, augmentation and random subsets"),
    ],
    "evaluation (AutoAttack)": [
        ("--eval-attacks", list(STANDARD), (STANDARD, "+"), "attacks of the reported numbers"),
        ("--eval-n", 0, whole, "examples of the 90 %% part to report on; 0 = all"),
        ("--eval-batch", 250, count, "examples a batch; AutoAttack resumes by batch; changes random numbers"),
        ("--eval-precision", None, ("float32", "tf32"), "tf32: attack in TF32 on a GPU; every example that "
         "breaks is checked, and if need be attacked again, in float32"),
    ],
    "selection of the checkpoint": [
        ("--select-attacks", list(STANDARD), (STANDARD, "+"), "attacks that select it"),
        ("--select-n", 0, whole, "examples of the 10 %% part that select it; 0 = all"),
    ],
    "ranking": [("--metrics", None, (METRICS, "+"),
                 "scores to write (default: all; of streamed images not vog, which keeps 8 bytes a pixel)")],
    "machine": [
        ("--device", "auto", ("auto", "cpu", "cuda"), "auto: a GPU when there is one"),
        ("--threads", 0, number(int, 0, os.cpu_count()), "CPU threads of a process; 0 = torch's choice"),
        ("--workers", 4, whole, "loader processes (streamed images only)"),
    ],
    "speed of training": [
        ("--amp", "auto", ("auto", "off", "bf16"), "bf16 autocast in training; auto: where hardware has it"),
        ("--compile", "auto", ("auto", "off", "on", "step"), "torch.compile, minutes at the start, then "
         "faster; auto: on GPUs in long trainings; step: a whole step as one CUDA graph (no GPU has run it)"),
    ],
    "the run": [
        ("--results", Path("results"), file_path, "folder that receives every run"),
        ("--run", None, plain_name, "name of the run's folder, in place of the one made from the flags"),
        ("--force", False, bool, "repeat a finished run; the old one is kept until the new one is whole"),
    ],
}
GROUPS = {  # script: the groups of FLAGS that it has
    "sat.py": [group for group in FLAGS if group != "ranking"],
    "rank.py": ["network", "data", "training", "machine", "speed of training", "the run", "ranking"],
    "transfer.py": ["data", "threat model", "training", "evaluation (AutoAttack)",
                    "selection of the checkpoint", "machine", "speed of training", "the run"],
    "evaluate.py": ["threat model", "evaluation (AutoAttack)", "machine"],
    "bench.py": ["network", "threat model", "attack in training", "training", "machine", "speed of training"],
}


def dest(flag):
    """The attribute of args that holds a flag: lr_decays for --lr-decays."""
    return flag[2:].replace("-", "_")


def dests(script):
    """The attributes of args that hold the flags of a script."""
    return [dest(flag) for group in GROUPS[script] for flag, *_ in FLAGS[group]]


DEFAULTS = {dest(flag): default for group in FLAGS.values() for flag, default, *_ in group}


def only_flags_of(argv, script):
    """The words of a command line (flags and values) without the flags that the script does not have."""
    names = {flag for group in GROUPS[script] for flag, *_ in FLAGS[group]}
    selected, keep = [], True
    for word in argv:
        if word.startswith("--"):
            keep = word.split("=")[0].replace("_", "-").replace("--no-", "--") in names
        if keep:
            selected.append(word)
    return selected


def add_flags(parser, groups, defaults=DEFAULTS):
    """Adds the flags of the named groups of FLAGS to an argparse parser. Their help shows `defaults` as the
    defaults; parse_args returns what is typed, and no more."""
    for title in groups:
        group = parser.add_argument_group(title)
        for flag, _, value_type, help_text in FLAGS[title]:
            value = defaults.get(dest(flag))
            if value not in (None, []) and value is not False:
                default = " ".join(map(str, value)) if isinstance(value, list) else value
                help_text += f" (default: {default})".replace("%", "%%")  # argparse formats it
            options = {"default": argparse.SUPPRESS, "help": help_text}
            if isinstance(value_type, tuple) and value_type[-1] in ("+", "*"):
                value_type, options["nargs"] = value_type
            if value_type is bool:
                options["action"] = argparse.BooleanOptionalAction
            else:
                options["choices" if isinstance(value_type, tuple) else "type"] = value_type
            group.add_argument(flag, **options)


def script_parser(script, doc, defaults, checkpoint_help=None, **options):
    """The parser of a script: its flags, with `defaults` as their defaults. `checkpoint_help`: that
    of its argument CHECKPOINT, if it has one. `options` are passed on to argparse."""
    usage = "CHECKPOINT [--flag VALUE ...]" if checkpoint_help else "[--flag VALUE ...]"
    parser = Parser(prog=script, usage=f"python {script} {usage}", description=doc, **options)
    if checkpoint_help:
        parser.add_argument("checkpoint", type=file_path, help=checkpoint_help)
    add_flags(parser, GROUPS[script], defaults)
    return parser
