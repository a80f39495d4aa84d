"""Times one training step of SAT on this machine for several |A|/N, and compares it with the cost model
3 + 14 |A|/N and with the steps of others.

    python bench.py --arch preactresnet18 --compile
Files in: none (random images). Prints a Markdown table; --json FILE also writes the numbers. Others' steps
attack everything: naively, with weight gradients in the attack, and, if installed, with torchattacks' PGDL2.
"""
import argparse
import contextlib
import copy
import functools
import itertools
import time
from pathlib import Path

import common  # first, so that Ctrl-C while torch loads ends in one line
import numpy
import torch
from torch.nn import functional as F

import attacks
import data as data_
import flags
import models
import sat
from common import say
from runs import write_json

SHARES = (0, 0.1, 0.5, 1)  # |A|/N
FULL, NAIVE, PEER = "|A|/N = 1", "naive", "torchattacks PGDL2"


def command_line(argv=None):
    """Parses the command line."""
    parser = flags.Parser(prog="bench.py", usage="python bench.py [--flag VALUE ...]", description=__doc__,
                          formatter_class=flags.Help)
    parser.add_argument("--arch", choices=flags.ARCHS, default="preactresnet8", help="network")
    parser.add_argument("--batch-size", type=flags.count, default=128, help="examples a step")
    parser.add_argument("--side", type=flags.number(int, 8), default=32, help="side of the images, in pixels")
    parser.add_argument("--steps", type=flags.count, default=7, help="PGD steps")
    parser.add_argument("--repeats", type=flags.count, default=7, help="rounds; medians are printed")
    parser.add_argument("--compile", action="store_true", help="time compiled steps, too (takes minutes)")
    parser.add_argument("--amp", choices=("auto", "off", "bf16"), default="auto",
                        help="time bf16 autocast, too; auto: where the hardware multiplies in bf16")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    flags.add_flags(parser, "machine")
    return parser.parse_args(argv)


def naive_attack(net, steps, x, y):
    """PGD with loss.backward(), which computes the gradients of all weights in every step."""
    delta = torch.zeros_like(x)
    for _ in range(steps):
        delta.requires_grad_()
        F.cross_entropy(net(x + delta).float(), y).backward()
        delta = attacks.project(delta.detach() + 0.1 * attacks.ascent(delta.grad, "l2"), 0.5, "l2")
        delta = (x + delta).clamp(0, 1) - x
    return x + delta


class Steps:
    """The steps that are compared, on random images: ours on one network, the others' on a copy of it."""

    def __init__(self, args, device):
        self.args, self.device, g = args, device, torch.Generator().manual_seed(0)
        shape = 8 * args.batch_size, 3, args.side, args.side
        x = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
        split = data_.Split(x, torch.randint(0, 10, (len(x),), generator=g)).to(device)
        self.batches = (batch for epoch in itertools.count() for batch in data_.training_batches(
            split, args.batch_size, 0, epoch, "full", device))
        torch.manual_seed(0)
        self.model = models.build(args.arch, 10, [0.5] * 3, [0.25] * 3).to(device).train()
        # The others' code leaves its network in the default memory format.
        self.plain = copy.deepcopy(self.model).to(memory_format=torch.contiguous_format)
        self.optimizer = models.sgd(self.model, 0.01, 5e-4, device)
        self.plain_optimizer = models.sgd(self.plain, 0.01, 5e-4, device)

    @functools.cache
    def net_and_attack(self, compile):
        """The network and the attack of our steps."""
        settings = argparse.Namespace(attack="pgd", eps=0.5, step_size=0.1, steps=self.args.steps, norm="l2",
                                      compile=compile)
        net = models.compiled(self.model, self.device) if compile else self.model
        return net, sat.training_attack(self.model, settings, self.device)

    def ours(self, share, compile, amp):
        """A step of sat.py with the first `share` of the batch in A."""
        (net, attack), (x, y, _) = self.net_and_attack(compile), next(self.batches)
        a = torch.arange(round(share * len(x)), device=self.device)
        w = torch.full((len(x),), 1 / len(x), device=self.device)
        with models.autocast(amp, self.device):
            sat.sat_step(net, self.optimizer, x, y, a, w, attack)

    def others(self, attack, amp):
        """A step on a batch that attack(x, y) perturbs as a whole, with the copy of the network."""
        x, y, _ = next(self.batches)
        self.plain.eval()
        with models.autocast(amp, self.device):
            x = attack(x.contiguous(), y)
            self.plain.train()
            self.plain_optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(self.plain(x).float(), y).backward()
        self.plain_optimizer.step()

    def variants(self):
        """Yields (variant, step, forward passes by the cost model, a function that does the step)."""
        n, precision = self.args.steps, models.precision(self.args.amp, self.device)
        # A naive attack step also computes the weights' gradients: one forward pass and two backward passes.
        others = [(NAIVE, 3 + 3 * n, functools.partial(naive_attack, self.plain, n))]
        with contextlib.suppress(ImportError):
            import torchattacks
            others.append((PEER, 3 + 2 * n, torchattacks.PGDL2(self.plain, 0.5, 0.1, n, random_start=False)))
        kinds = [(kind, amp, False) for kind, amp in {"float32": "off", precision: self.args.amp}.items()]
        if self.args.compile:
            kinds.append((f"{precision}, --compile", self.args.amp, True))
        for variant, amp, compile in kinds:
            for share in SHARES:
                yield (variant, f"|A|/N = {share:g}", 3 + 2 * n * share,
                       functools.partial(self.ours, share, compile, amp))
            for name, passes, attack in others if not compile else ():
                yield variant, name, passes, functools.partial(self.others, attack, amp)


def timed(run, device):
    """Seconds of one step. A GPU runs behind Python, so there 20 steps are timed between two waits for it."""
    n, wait = 20 if device.type == "cuda" else 1, getattr(torch, device.type).synchronize
    wait()
    began = time.perf_counter()
    for _ in range(n):
        run()
    wait()
    return (time.perf_counter() - began) / n


def measure(steps, args, device):
    """Times the steps in turn, round after round, so that a drift of the machine's speed affects all alike.
    Returns a row for each: {column: median over the rounds}."""
    todo, rows = list(steps.variants()), []
    times = numpy.array([[timed(run, device) for *_, run in todo]
                         for _ in common.progress(range(args.repeats + 1), desc="rounds")])
    seconds = {(variant, step): times[1:, i] for i, (variant, step, *_) in enumerate(todo)}  # 0 warms up
    for variant, step, passes, _ in todo:
        own = seconds[variant, step]
        row = {"images/s": args.batch_size / numpy.median(own),
               f"time relative to {FULL}": numpy.median(own / seconds[variant, FULL]),
               "cost model": passes / (3 + 2 * args.steps)}
        row |= {f"times as fast as {name} in float32": numpy.median(seconds["float32", name] / own)
                for name in (NAIVE, PEER) if ("float32", name) in seconds}
        rows.append({"step": f"{step}, {variant}"} | {k: round(float(v), 3) for k, v in row.items()})
    return rows


def main(argv=None):
    """Times the steps, prints the table, and writes it with --json."""
    args = command_line(argv)
    device = common.set_up(args)
    setting = (f"{args.arch}, batch {args.batch_size}, {args.side}x{args.side}, PGD-{args.steps}, "
               f"augmentation included, {common.device_name(device)}")
    say(f"one training step: {setting}, medians of {args.repeats} rounds\n")
    rows = measure(Steps(args, device), args, device)
    for line in (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)):
        say(f"| {' | '.join(map(str, line))} |".replace("|A|", "\\|A\\|"))
    if args.json:
        write_json(args.json, {"setting": setting, "torch": torch.__version__, "steps": rows})


if __name__ == "__main__":
    common.script(main)
