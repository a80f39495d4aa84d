"""Defines every flag of the scripts, in groups of which each script takes some, and reads their values.

A config is one flat YAML file of flag values. They pass through argparse as if they were typed on the command
line: same types, same choices, same errors.
"""
import argparse
import os
import re
import shutil
import sys
from pathlib import Path

import yaml

from common import HERE, UserError, say

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
METRICS = ("entropy", "svar", "vog")
ORDERS = ("hardest", "easiest", "random", "redrawn")
# The flags that can say how large A is, by --split.
AMOUNTS = {"none": (), "full": (), "esat": ("frac", "size"), "csat": ("frac", "size", "classes")}
# The attacks of training (--attack), with their gradient steps on an example (None: --steps), by which costs
# are counted.
ATTACK_STEPS = {"pgd": None, "fgsm-rs": 1, "pgd-authors": None}
ARCHS = ("preactresnet8", "preactresnet18", "preactresnet18-authors", "resnet50")


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError, so that an error in a YAML file is reported with the file's name."""

    def __init__(self, **how):
        # An abbreviated --config would be parsed as the flag, but parse() would not find its file.
        super().__init__(allow_abbrev=False, **how)

    def error(self, message):
        """Raises UserError where argparse would exit."""
        raise UserError(f"{message} (python {self.prog} --help lists what is valid)")


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows descriptions as they stand in the docstring, at least 110 columns wide, and adds to each help
    text its default, if there is one."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=32, width=max(110, shutil.get_terminal_size().columns - 2))

    def _get_help_string(self, action):
        shown = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        plain = action.default is None or action.default is False or action.default in ([], argparse.SUPPRESS)
        return action.help if plain else f"{action.help} (default: {shown})"


def number(kind, low, high=None, open_low=False):
    """A type for argparse: an int or a float in [low, high], or in (low, high] with open_low. Without `high`,
    floats are at most 1e30, which float32 can hold."""
    unlimited = 1e30 if kind is float else float("inf")
    most = unlimited if high is None else high

    def convert(text):
        """The function that argparse calls on the text of a value."""
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not (low < value <= most if open_low else low <= value <= most):
            what = "a whole number" if kind is int else "a finite number"
            limit = most if kind is int else f"{most:g}"
            bound = f"{'above' if open_low else 'of at least'} {low}"
            bound += f" and at most {limit}" * (most < float("inf"))
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {bound}")
        return value
    return convert


def folder(text):
    """A type for argparse: a folder. An empty text is an error."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty text is no folder (the current one is .)")
    return Path(text)


def threads(text):
    """A type for argparse: a number of CPU threads, 0 to the number of cores."""
    return number(int, 0, max(1, os.cpu_count() or 1))(text)


def plain_name(text):
    """A type for argparse: the name of a data set or a run. It names a folder, so it must not be a path."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a plain name (letters, digits, . _ + = -)")
    return text


count, positive = number(int, 1), number(float, 0, open_low=True)

# {group: [(flag, default, kind, help)]}. kind: a type, a tuple of choices, or bool for a switch; a tuple that
# ends in "+" or "*" takes a list, of a type or of choices.
FLAGS = {
    "network": [
        ("--arch", "preactresnet8", ARCHS, "network (README, Deviations, on preactresnet18-authors)"),
    ],
    "data": [
        ("--dataset", "digits", plain_name,
         "one of the paper's, digits, digits0-4, digits5-9, or one of your own in --data-dir"),
        ("--data-dir", Path("data"), folder, "folder that holds (or receives) the data sets"),
        ("--side", 224, number(int, 32),
         "side of the images of streamed sets, in pixels; small images keep theirs"),
        ("--augment", "full", ("none", "crop", "full"),
         "training images: none; pad an eighth and crop; or all of Fig. 9"),
    ],
    "subset A (Sec. 3)": [
        ("--split", "esat", ("none", "csat", "esat", "full"),
         "A = nothing, whole classes, single examples, everything"),
        ("--frac", None, number(float, 0, 1, open_low=True),
         "|A| as a fraction: of the classes (csat), of the examples (esat); 0.5 if no amount is given"),
        ("--size", None, count, "|A| as a number, in place of --frac: of classes (csat), of examples (esat)"),
        ("--classes", None, (str, "+"), "csat: the classes of A by name, in place of a size and an order"),
        ("--order", "hardest", ORDERS,
         "which come into A first; random ones by --seed; redrawn: other random ones every epoch"),
        ("--metric", "entropy", METRICS, "difficulty score that orders them (written by rank.py)"),
        ("--scores", None, Path, "scores of your own in place of rank.py's: .pt, .npy or .npz, N numbers, "
         "higher = harder, or an order of the indices, hardest first"),
        ("--weight", "vanilla", ("vanilla", "balanced", "emphasis"),
         "w_A of Eq. 2: 1, |B|/|A|, (1 + 10|A|/N)|B|/|A|; w_B = 1"),
        ("--weight-factor", None, positive, "w_A as a number, in place of --weight"),
    ],
    "threat model": [
        ("--norm", "l2", ("l2", "linf"), "norm of the perturbation"),
        ("--eps", 0.5, number(float, 0), "its radius, pixels in [0, 1]"),
    ],
    "attack in training": [
        ("--attack", "pgd", tuple(ATTACK_STEPS),
         "attack on A; fgsm-rs: one step of 1.25 eps from a random start; pgd-authors: the iterate of the "
         "highest loss, as in the authors' code"),
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
        ("--eval-attacks", list(ATTACKS), (ATTACKS, "+"),
         "attacks of the reported numbers; all four = standard AutoAttack"),
        ("--eval-n", 0, number(int, 0), "examples of the 90 %% part to report on; 0 = all"),
        ("--eval-batch", 250, count,
         "AutoAttack's batch and unit of resume, in examples; changes its random numbers"),
    ],
    "selection of the checkpoint": [
        ("--select-attacks", list(ATTACKS), (ATTACKS, "+"), "attacks that select it"),
        ("--select-n", 0, number(int, 0), "examples of the 10 %% part that select it; 0 = all"),
    ],
    "ranking": [
        ("--metrics", None, (METRICS, "+"),
         "scores to write (default: all; of streamed images entropy and svar). vog keeps 8 bytes a pixel"),
    ],
    "machine": [
        ("--device", "auto", ("auto", "cpu", "cuda"), "auto: a GPU when there is one"),
        ("--threads", 0, threads, "CPU threads of a process; 0 = torch's choice"),
        ("--workers", 4, number(int, 0), "loader processes (224x224 sets only)"),
    ],
    "the run": [
        ("--amp", "auto", ("auto", "off", "bf16"),
         "bf16 autocast in training; auto: where the hardware multiplies in bf16. Evaluation is float32"),
        ("--compile", False, bool, "torch.compile the attack and the network for training: one to two "
         "minutes at the start, then faster (README, Speed)"),
        ("--results", Path("results"), folder, "folder that receives every run"),
        ("--run", None, plain_name, "name of the run's folder, in place of the one made from the flags"),
        ("--force", False, bool, "repeat a finished run; the old one is kept until the new one is whole"),
    ],
}

SCRIPTS = {  # script: the groups whose flags it has
    "sat.py": [group for group in FLAGS if group != "ranking"],
    "rank.py": ["network", "data", "training", "machine", "the run", "ranking"],
    "transfer.py": ["data", "threat model", "training", "evaluation (AutoAttack)",
                    "selection of the checkpoint", "machine", "the run"],
    "evaluate.py": ["threat model", "evaluation (AutoAttack)", "machine"],
}


def known(words, script):
    """The words of a command line (flags and values) without those flags that the script does not have."""
    names = {flag for group in SCRIPTS[script] for flag, *_ in FLAGS[group]}
    found, take = [], True
    for word in words:
        if word.startswith("--"):
            name = word.split("=")[0]
            take = name in names or name.replace("--no-", "--") in names
        found += [word] * take
    return found


def add_flags(parser, *groups):
    """Adds the flags of the named groups of FLAGS to an argparse parser, with their defaults and help."""
    for title in groups:
        group = parser.add_argument_group(title)
        for flag, default, kind, text in FLAGS[title]:
            how = {"default": default, "help": text}
            name = flag[2:].split("-")[-1].upper()
            if kind is bool:
                how["action"] = argparse.BooleanOptionalAction
            elif isinstance(kind, tuple) and kind[-1] in ("+", "*"):
                how["nargs"] = kind[-1]
                how["choices" if isinstance(kind[0], tuple) else "type"] = kind[0]
                how["metavar"] = re.sub("E?S$" if flag.endswith("sses") else "S$", "", name)  # the singular
            elif isinstance(kind, tuple):
                how["choices"] = kind
            else:
                how.update(type=kind, metavar=name)
            group.add_argument(flag, **how)


class Text(yaml.BaseLoader):
    """Reads every scalar as text, which argparse then converts (YAML itself reads 010 as 8, 1:30 as 90, off
    as false and 5e-4 as a string). A repeated key is an error."""

    def construct_mapping(self, node, deep=False):
        """As in yaml.BaseLoader, except that a repeated key is an error."""
        keys = [key.value for key, _ in node.value]
        twice = sorted({str(k) for k in keys if keys.count(k) > 1})
        if twice:
            raise yaml.YAMLError(f"{', '.join(twice)} stands there more than once")
        return super().construct_mapping(node, deep)


def from_yaml(path):
    """The flag values {dest: value} of a flat YAML file, converted and checked by argparse as on the command
    line. UserError, with the file's name, for anything else."""
    try:
        found = yaml.load(Path(path).read_text(encoding="utf-8"), Text) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UserError(f"cannot read the config {path}: {' '.join(str(e).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: a config is a flat list of 'flag: value' lines")
    parser, values = Parser(add_help=False), {}
    add_flags(parser, *FLAGS)
    kinds = {flag[2:]: kind for group in FLAGS.values() for flag, _, kind, _ in group}
    for key, value in found.items():
        if key not in kinds:
            raise UserError(f"{path}: unknown key {key!r}; valid keys: {', '.join(sorted(kinds))}")
        items = value if isinstance(value, list) else [value]
        a_list = isinstance(kinds[key], tuple) and kinds[key][-1] in ("+", "*")
        empty = any(not isinstance(v, str) or v in ("", "~", "null") for v in items)
        no_bool = kinds[key] is bool and value not in ("true", "false")
        if empty or no_bool or (isinstance(value, list) and not a_list):
            raise UserError(f"{path}: {key}: {value!r} is not a value of this flag "
                            "(python sat.py --help shows its type)")
        if kinds[key] is bool:
            tokens = [f"--{key}" if value == "true" else f"--no-{key}"]
        else:
            tokens = [f"--{key}", *items] if a_list else [f"--{key}={value}"]
        try:
            dest = key.replace("-", "_")
            values[dest] = getattr(parser.parse_args(tokens), dest)
        except UserError as e:
            raise UserError(f"{path}: {e}") from None
    return values


def parse(parser, argv=None):
    """Parses with the precedence command line > YAML (--config) > defaults. Returns the arguments;
    `args.base` holds their values without the command line: a run's name tells what differs from these."""
    parser.add_argument(
        "--config", type=Path, metavar="YAML",
        help="file of flag values; the command line wins over it (default: configs/digits.yaml)")
    finder = Parser(add_help=False, prog=parser.prog)
    finder.add_argument("--config", type=Path, default=HERE / "configs" / "digits.yaml")
    config = finder.parse_known_args(argv)[0].config
    dests = {action.dest for action in parser._actions}
    values = from_yaml(config)
    parser.set_defaults(**{k: v for k, v in values.items() if k in dests})
    args = parser.parse_args(argv)
    args.config = config
    args.base = {dest: parser.get_default(dest) for dest in dests}
    check_norm(args, argv, values)
    return args


def attack_steps(attack, steps):
    """The gradient steps of an attack in training on an example, if --steps is `steps`."""
    fixed = ATTACK_STEPS[attack]
    return steps if fixed is None else fixed


def second_config(args):
    """[The config's name] if it is not its data set's, as cifar10-linf.yaml, whose runs need names of their
    own; else []."""
    return [args.config.stem] * (args.config.stem != args.base["dataset"])


def given(argv, flag):
    """Whether the command line has the flag."""
    words = sys.argv[1:] if argv is None else argv
    return any(word == flag or word.startswith(f"{flag}=") for word in words)


def replace_amounts(args, argv):
    """Drops what a config says of the amount of A if the command line says another, or a --split that takes
    none of this kind."""
    typed = {name for name in (*AMOUNTS["csat"], "scores") if given(argv, f"--{name}")}
    taken = AMOUNTS[args.split] + ("scores",) * bool(AMOUNTS[args.split])
    for name in {*AMOUNTS["csat"], "scores"} - typed:
        replaced = name != "scores" and typed - {"scores"}
        if replaced or name not in taken and given(argv, "--split"):
            setattr(args, name, None)


def without_idle(args, argv):
    """Names the typed flags of sat.py that have no effect beside others. Those that choose A and its loss get
    the config's values back, so that they make no other run of the same. Steps and step size stay, because
    only runs that agree in these stand in one table."""
    for other, holds, idle in (
            (f"--split {args.split}", args.split in ("none", "full"), "order metric weight weight_factor"),
            ("--split none", args.split == "none", "attack"),
            ("--classes", args.classes, "order metric"),
            ("--scores", args.scores, "metric"),
            (f"--order {args.order}", args.order in ("random", "redrawn"), "metric"),
            ("--weight-factor", args.weight_factor, "weight"),
            (f"--attack {args.attack}", ATTACK_STEPS[args.attack] is not None, "steps"),
            ("--attack fgsm-rs", args.attack == "fgsm-rs", "step_size")):
        for name in idle.split() if holds else ():
            flag = f"--{name.replace('_', '-')}"
            if given(argv, flag):
                say(f"note: {flag} has no effect with {other}")
            if name not in ("steps", "step_size"):
                setattr(args, name, args.base[name])


def check_norm(args, argv, values):
    """UserError if a norm is chosen without an eps and a step size, because their values for another norm
    mean something else."""
    typed = {d for d in ("norm", "eps", "step_size") if given(argv, f"--{d.replace('_', '-')}")}
    if not hasattr(args, "norm"):
        return
    if "norm" in typed and args.norm != args.base["norm"]:
        where, has = "--norm", typed
    elif values.get("norm", "l2") != "l2":
        where, has = f"{args.config}: norm", {*values, *typed}
    else:
        return
    one_step = getattr(args, "attack", "") == "fgsm-rs"  # its step is always 1.25 eps
    needed = ["eps"] if one_step else ["eps", "step_size"]
    lacks = [f"--{d.replace('_', '-')}" for d in needed if hasattr(args, d) and d not in has]
    if lacks:
        raise UserError(f"{where} {args.norm} needs {' and '.join(lacks)} of its own (linf: say --eps 0.0314 "
                        "--step-size 0.0078, which are 8/255 and 2/255; l2 on 32x32: 0.5 and 0.1)")
