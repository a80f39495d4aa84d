"""Reads the flags of a script: command line > config > defaults.

A config is one flat YAML file of flag values. They pass through argparse as if they were typed on the command
line: same types, same choices, same errors.
"""
import argparse
import inspect
from pathlib import Path

import yaml

from common import HERE, UserError, say
from flags import AMOUNTS, DEFAULTS, FLAGS, Parser, add_flags, dests, file_path, nearest, script_parser

SWITCH_PREFIXES = {"true": "--", "false": "--no-"}  # YAML's True is true


def config_paths(folder=""):
    """The paths of the configs in configs/ or in a folder of it, as text."""
    files = sorted((HERE / "configs" / folder).glob("*.yaml"))
    return " ".join(str(path.relative_to(HERE)) for path in files)


def from_yaml(path):
    """The flag values {dest: value} of a flat YAML file, converted and checked by argparse as on the command
    line. UserError, with the file's name, for anything else."""
    parser, values = Parser(add_help=False), {}
    add_flags(parser, FLAGS)
    flag_types = {flag[2:]: value_type for group in FLAGS.values() for flag, _, value_type, _ in group}
    try:  # Nodes hold scalars as text: YAML itself reads 010 as 8, 1:30 as 90 and 5e-4 as a string.
        document = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.BaseLoader)
        if not isinstance(document, yaml.MappingNode):
            raise UserError("a config is a flat list of 'flag: value' lines")
        for name, node in document.value:
            key = str(name.value).replace("_", "-")
            if key not in flag_types:
                raise UserError(f"unknown key {key!r}{nearest(key, flag_types)}; valid keys: "
                                f"{', '.join(sorted(flag_types))}")
            if key.replace("-", "_") in values:
                raise UserError(f"{key} is given twice")
            values |= vars(parser.parse_args(words_of(key, node, flag_types[key])))
    except FileNotFoundError:
        paths = f"{config_paths()} {config_paths('transfer')}"
        raise UserError(f"there is no config {path}; there are {paths}") from None
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise UserError(f"cannot read the config {path}: {' '.join(str(e).split())}") from None
    return values


def words_of(key, node, value_type):
    """A line of a config as words of a command line: lr: 0.1 -> --lr=0.1. value_type: of FLAGS."""
    is_list = isinstance(node, yaml.SequenceNode)
    items = [item.value for item in (node.value if is_list else [node])]
    unusable = any(not isinstance(item, str) or item in ("", "~", "null") for item in items)
    if unusable or is_list and not isinstance(value_type, tuple):
        raise UserError(f"{key}: not a value (empty, nested or a list): give one as --help shows")
    if value_type is bool:
        if items[0].lower() not in SWITCH_PREFIXES:
            raise UserError(f"{key}: {items[0]!r} is not a value of this switch; valid: true, false")
        return [SWITCH_PREFIXES[items[0].lower()] + key]
    return [f"--{key}", *items] if is_list else [f"--{key}={items[0]}"]


def parse(script, doc, argv=None, checkpoint_help=None):
    """The arguments of a script with a config: command line > YAML (--config) > defaults.

    args.base holds their values without the command line: a run's name tells what differs from these.
    args.typed: the attributes that were typed.
    """
    finder = Parser(add_help=False, prog=script)
    finder.add_argument("--config", type=file_path, default=HERE / "configs" / "digits.yaml", metavar="YAML",
                        help="file of flag values; the command line wins (default: configs/digits.yaml)")
    path = finder.parse_known_args(argv)[0].config
    is_of_transfer = path.resolve().parent == HERE / "configs" / "transfer"
    if is_of_transfer and script != "transfer.py":
        raise UserError(f"{path} is a config of transfer.py; {script} takes one of {config_paths()}")
    from_config = from_yaml(path)
    parser = script_parser(script, doc, {**DEFAULTS, **from_config}, checkpoint_help, parents=[finder])
    typed = vars(parser.parse_args(argv))
    config = typed.pop("config")
    if script == "transfer.py" and config == finder.get_default("config") and "dataset" not in typed:
        raise UserError("no target data set: give --dataset, or --config with one of "
                        f"{config_paths('transfer')}")
    base = {k: from_config.get(k, DEFAULTS[k]) for k in dests(script)}
    args = argparse.Namespace(**{**base, **typed}, config=config, base=base, typed=set(typed))
    if "norm" in base:
        check_norm_has_eps(args, from_config)
    if len(set(args.lr_decays)) < len(args.lr_decays):
        raise UserError(f"--lr-decays {' '.join(map(str, args.lr_decays))} has an epoch twice, after which "
                        "the learning rate would fall a hundredfold: give each once")
    if args.lr_decays and min(args.lr_decays) >= args.epochs:
        say(f"note: the learning rate does not fall within {args.epochs} epochs (--lr-decays "
            f"{' '.join(map(str, args.lr_decays))})")
    return args


def check_norm_has_eps(args, from_config):
    """UserError if a norm is chosen without an eps and a step size of its own: their values for another norm
    mean something else."""
    norms = {args.norm, args.base["norm"]}
    if norms == {"l2"}:
        return
    source, given = f"{args.config}: norm", {*from_config, *args.typed}
    if len(norms) > 1:
        source, given = "--norm", args.typed
    needed = ["eps"]
    if "step_size" in args.base:
        from attacks import ATTACKS  # imported here, as in flags.attack_name
        if "step_size" in inspect.signature(ATTACKS[args.attack].function).parameters:
            needed.append("step_size")
    missing = [f"--{name}".replace("_", "-") for name in needed if name not in given]
    if missing:
        usual = {"--eps": "8/255 in linf, 0.5 in l2 on 32x32", "--step-size": "2/255 in linf, 0.1 in l2"}
        raise UserError(f"{source} {args.norm} needs {' and '.join(missing)} of its own (usual: "
                        f"{'; '.join(f'{flag} {usual[flag]}' for flag in missing)})")


def settle_amount(args):
    """Settles the size of A: half, if no flag gives it. UserError if several do, or one that --split does not
    take. A config's value is dropped if a flag that replaces it, or a --split that excludes it, is typed."""
    amounts, sources = {"frac", "size", "classes", "subset"}, {"scores", "ranking", "subset", "classes"}
    if "order" in args.typed and args.order in ("random", "redrawn"):
        sources.add("order")
    valid = AMOUNTS[args.split]
    for name, in_its_place in {"frac": amounts, "size": amounts, "classes": amounts, "scores": sources,
                               "ranking": sources, "subset": amounts | sources - {"order"}}.items():
        is_valid = name in valid or name in ("scores", "ranking") and bool(valid)
        replaced = bool(args.typed & in_its_place)
        if name not in args.typed and (replaced or "split" in args.typed and not is_valid):
            setattr(args, name, None)
        if getattr(args, name) is not None and not is_valid:
            raise UserError(f"--split {args.split} takes no --{name}: drop it, or give another --split")
    given = [name for name in valid if getattr(args, name) is not None]
    if len(given) > 1:
        raise UserError(f"--split {args.split} takes one of {', '.join(f'--{name}' for name in valid)}; "
                        f"given: {', '.join(given)}")
    if valid and not given:
        args.frac = 0.5


def reset_flags_without_effect(args):
    """Resets flags that other flags make ineffective, so that they do not make another run; a note names each
    that was typed. Steps, step size and random start are not reset: the report groups runs by them."""
    for cause, applies, names in [
            (f"--split {args.split}", args.split in ("none", "full"), "order metric weight weight_factor"),
            ("--split none", args.split == "none", "attack steps step_size random_start"),
            ("--classes", args.classes, "order metric"),
            ("--subset", args.subset, "order metric"),
            ("--ranking", args.ranking, "metric"),
            (f"--order {args.order}", args.order in ("random", "redrawn"), "metric"),
            ("--weight-factor", args.weight_factor, "weight"),
            ("--attack fgsm-rs", args.attack == "fgsm-rs", "steps step_size random_start")]:
        for name in names.split() if applies else ():
            if name in args.typed:
                args.typed.remove(name)  # so that one note names it
                say(f"note: --{name.replace('_', '-')} has no effect with {cause}")
            if name not in ("steps", "step_size", "random_start"):
                setattr(args, name, DEFAULTS[name])


def run_name_prefix(args):
    """The first words of a run's name: none if the config is named after its data set; else the config's
    name, since runs of, say, cifar10-linf.yaml need names of their own."""
    return [] if args.config.stem == args.base["dataset"] else [args.config.stem]
