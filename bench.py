"""Times a training step on this machine for several |A|/N, beside the cost model 3 + 2 steps |A|/N (17 for AT
with PGD-7), in units of |A| = N.

    python bench.py --arch preactresnet18 --compile

Files in: none (random images). Prints a Markdown table; --json FILE also writes the numbers.
"""
import argparse
import statistics
from pathlib import Path

import torch

import common
import flags
import models
import runs
from common import say
from data import Split
from train import train

STEPS = 20  # in an epoch, which is timed as a whole: a GPU runs behind Python


def command_line(argv=None):
    """Parses the command line."""
    parser = flags.script_parser("bench.py", __doc__, flags.DEFAULTS)
    parser.add_argument("--image-side", type=flags.number(int, 8, 1024), default=32, help="in pixels")
    parser.add_argument("--fractions", type=flags.number(float, 0, 1), nargs="+", default=[0.0, 0.1, 0.5],
                        help="|A|/N, besides 1")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    defaults = {**flags.DEFAULTS, "epochs": 5, "order": "random", "augment": "full", "lr": 0.01}
    return argparse.Namespace(**{**defaults, **vars(parser.parse_args(argv))})


def measure(args, device):
    """Seconds of a step, {|A|/N: median over epochs}. The first epoch, in which --compile compiles, does not
    count. The epochs of all |A|/N alternate, so that a drift of the machine's speed affects all alike."""
    n, g = STEPS * args.batch_size, torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 3, args.image_side, args.image_side), generator=g, dtype=torch.uint8)
    split = Split(x, torch.randint(0, 10, (n,), generator=g)).to(device)
    trainings, seconds = {}, {}
    for share in sorted({*args.fractions, 1.0}):
        model = models.build(args.arch, 10, [0.5] * 3, [0.25] * 3).to(device)
        A = torch.arange(n) < round(share * n)
        trainings[share], seconds[share] = train(model, split, A, 1.0, args, device), []
    for epoch in common.progress(range(args.epochs), desc="epochs"):
        for share, training in trainings.items():
            row = next(training)["row"]
            if epoch > 0:
                seconds[share].append(row["seconds"] / STEPS)
    return {share: statistics.median(s) for share, s in seconds.items()}


def main(argv=None):
    """Times the steps and prints the table."""
    args = command_line(argv)
    device = common.set_up(args)
    compiled = ", compiled" if args.compile else ""
    setting = (f"{args.arch}, batch {args.batch_size}, {args.image_side}x{args.image_side}, {args.attack}, "
               f"{models.precision(args.amp, device)}{compiled}, {common.device_name(device)}")
    say(f"one training step, augmentation included: {setting}; medians of {args.epochs - 1} epochs")
    seconds = measure(args, device)
    rows = [{"share": share, "seconds": s, "images_per_s": args.batch_size / s,
             "time_to_full": s / seconds[1.0], "model": (3 + 2 * args.steps * share) / (3 + 2 * args.steps)}
            for share, s in seconds.items()]
    say("\n| \\|A\\|/N | ms a step | images/s | time relative to \\|A\\| = N | cost model |\n"
        "| --- | --- | --- | --- | --- |")
    for r in rows:
        say(f"| {r['share']:g} | {1000 * r['seconds']:.1f} | {r['images_per_s']:.1f} "
            f"| {r['time_to_full']:.2f} | {r['model']:.2f} |")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(args.json, {"setting": setting, "torch": torch.__version__, "steps": rows})


if __name__ == "__main__":
    common.script(main)
