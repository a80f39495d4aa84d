"""Times a training step on this machine for several |A|/N, beside the cost model 3 + 2 steps |A|/N (17 for AT
with PGD-7), relative to |A| = N.

    python bench.py --arch preactresnet18 --compile on

Files in and out: none (random images). Prints a Markdown table.
"""
import argparse
import statistics

import torch

import common
import flags
import models
from attacks import ATTACKS
from common import say
from data import Examples
from train import train

SHARES = 0.0, 0.1, 0.5, 1.0  # |A|/N
STEPS = 20  # in an epoch, which is timed as a whole: a GPU runs behind Python


def measure(args, device):
    """Seconds per step, {|A|/N: median over all epochs but the first, which includes compilation}. The epochs
    of all |A|/N alternate, so that a drift of the machine's speed affects all alike."""
    n, g = STEPS * args.batch_size, torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 3, args.image_side, args.image_side), generator=g, dtype=torch.uint8)
    examples = Examples(x.to(device), torch.randint(0, 10, (n,), generator=g))
    trainings, seconds = {}, {}
    for share in SHARES:
        model = models.build(args.arch, 10, [0.5] * 3, [0.25] * 3).to(device)
        A = torch.arange(n) < round(share * n)
        trainings[share], seconds[share] = train(model, examples, A, 1.0, args, device), []
    for _ in common.progress(range(args.epochs), desc="epochs"):
        for share, training in trainings.items():
            seconds[share].append(next(training)["row"]["seconds"] / STEPS)
    return {share: statistics.median(s[1:]) for share, s in seconds.items()}


def main(argv=None):
    """Parses the command line, times the steps and prints the table."""
    defaults = {**flags.DEFAULTS, "epochs": 4, "lr": 0.01}
    parser = flags.script_parser("bench.py", __doc__, defaults)
    parser.add_argument("--image-side", type=flags.number(int, 8, 1024), default=32, help="in pixels")
    args = argparse.Namespace(**{**defaults, **vars(parser.parse_args(argv))})
    args.epochs += 1  # the first warms up
    device = common.set_up(args)
    args.compile = models.choose_compilation(args.compile, device, 10**6, args.attack)  # as if long
    say(f"one training step, augmentation included: {args.arch}, batch {args.batch_size}, "
        f"{args.image_side}x{args.image_side}, {args.attack}, {models.precision(args.amp, device)}, "
        f"compile {args.compile}, {common.device_name(device)}; medians of {args.epochs - 1} epochs\n\n"
        "| \\|A\\|/N | ms a step | images/s | time relative to \\|A\\| = N | cost model |\n"
        "| --- | --- | --- | --- | --- |")
    step_seconds = measure(args, device)
    gradient_steps = ATTACKS[args.attack].gradient_steps or args.steps
    for share, seconds in step_seconds.items():
        predicted = (3 + 2 * gradient_steps * share) / (3 + 2 * gradient_steps)
        say(f"| {share:g} | {1000 * seconds:.1f} | {args.batch_size / seconds:.1f} | "
            f"{seconds / step_seconds[1.0]:.2f} | {predicted:.2f} |")


if __name__ == "__main__":
    common.script(main)
