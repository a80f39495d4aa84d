"""Reads the flags of a script: command line > config > defaults.

A config is one flat YAML file of flag values. They pass through argparse as if they were typed on the command
line: same types, same choices, same errors.
"""
import argparse
from pathlib import Path

import yaml

from common import HERE, UserError, say
from flags import DEFAULTS, FLAGS, SCRIPTS, Parser, add_flags, dest, script_parser, takes_list

BOOLS = {"true": "--", "false": "--no-"}  # what stands before the name of a switch


class Text(yaml.BaseLoader):
    """Reads every scalar as text, which argparse then converts (YAML itself reads 010 as 8, 1:30 as 90, off
    as false and 5e-4 as a string). A repeated key is an error."""

    def construct_mapping(self, node, deep=False):
        """As in yaml.BaseLoader, except that a repeated key is an error."""
        keys = [key.value for key, _ in node.value]
        twice = sorted({str(k) for k in keys if keys.count(k) > 1})
        if twice:
            raise yaml.YAMLError(f"{', '.join(twice)} is given twice")
        return super().construct_mapping(node, deep)


def from_yaml(path):
    """The flag values {dest: value} of a flat YAML file, converted and checked by argparse as on the command
    line. UserError, with the file's name, for anything else."""
    try:
        config = yaml.load(Path(path).read_text(encoding="utf-8"), Text) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UserError(f"cannot read the config {path}: {' '.join(str(e).split())}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: a config is a flat list of 'flag: value' lines")
    parser, values = Parser(add_help=False), {}
    add_flags(parser, FLAGS)
    kinds = {flag[2:]: kind for group in FLAGS.values() for flag, _, kind, _ in group}
    for key, value in config.items():
        if key not in kinds:
            raise UserError(f"{path}: unknown key {key!r}; valid keys: {', '.join(sorted(kinds))}")
        try:
            values |= vars(parser.parse_args(words_of(key, value, kinds[key])))
        except UserError as e:
            raise UserError(f"{path}: {e}") from None
    return values


def words_of(key, value, kind):
    """A line of a config as words of a command line: lr: 0.1 -> --lr=0.1."""
    items = value if isinstance(value, list) else [value]
    empty = any(not isinstance(item, str) or item in ("", "~", "null") for item in items)
    if empty or isinstance(value, list) and not takes_list(kind) or kind is bool and value not in BOOLS:
        raise UserError(f"{key}: {value!r} is not a value of this flag (python sat.py --help shows its type)")
    if kind is bool:
        return [BOOLS[value] + key]
    return [f"--{key}", *items] if takes_list(kind) else [f"--{key}={value}"]


def add_config(parser):
    """Adds --config to a parser."""
    parser.add_argument("--config", type=Path, default=HERE / "configs" / "digits.yaml", metavar="YAML",
                        help="file of flag values; the command line wins over it (default: "
                             "configs/digits.yaml)")


def parse(script, doc, argv=None, checkpoint=None):
    """The arguments of a script with a config: command line > YAML (--config) > defaults.

    args.base holds their values without the command line: a run's name tells what differs from these.
    args.typed: the attributes that were typed.
    """
    finder = Parser(add_help=False, prog=script)
    add_config(finder)
    config = finder.parse_known_args(argv)[0].config
    from_config = from_yaml(config)
    parser = script_parser(script, doc, {**DEFAULTS, **from_config}, checkpoint)
    add_config(parser)
    typed = vars(parser.parse_args(argv))
    del typed["config"]
    dests = [dest(flag) for group in SCRIPTS[script] for flag, *_ in FLAGS[group]]
    base = {k: from_config.get(k, DEFAULTS[k]) for k in dests}
    args = argparse.Namespace(**{**base, **typed}, config=config, base=base, typed=set(typed))
    check_norm(args, from_config)
    if args.lr_decays and min(args.lr_decays) >= args.epochs:
        say(f"note: the learning rate does not fall within {args.epochs} epochs (--lr-decays "
            f"{' '.join(map(str, args.lr_decays))})")
    return args


def check_norm(args, from_config):
    """UserError if a norm is chosen without an eps and a step size of its own: their values for another norm
    mean something else."""
    if "norm" not in args.base:
        return
    if "norm" in args.typed and args.norm != args.base["norm"]:
        source, given = "--norm", args.typed
    elif from_config.get("norm", "l2") != "l2":
        source, given = f"{args.config}: norm", {*from_config, *args.typed}
    else:
        return
    needed = ["eps"]
    if "step_size" in args.base and args.attack != "fgsm-rs":  # whose step is always 1.25 eps
        needed.append("step_size")
    missing = [f"--{name}".replace("_", "-") for name in needed if name not in given]
    if missing:
        raise UserError(f"{source} {args.norm} needs {' and '.join(missing)} of its own (linf: say --eps "
                        "0.0314 --step-size 0.0078, which are 8/255 and 2/255; l2 on 32x32: 0.5 and 0.1)")


def config_prefix(args):
    """The first words of a run's name: the config's name if it is not its data set's, as cifar10-linf.yaml,
    whose runs need names of their own; else none."""
    return [] if args.config.stem == args.base["dataset"] else [args.config.stem]
