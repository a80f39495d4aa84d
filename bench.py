"""Times one training step of SAT on this machine for several |A|/N, and compares it with the cost model
3 + 14 |A|/N and with the steps of others.

    python bench.py --arch preactresnet18 --compile
Files in: none (random images). Prints a table; --json FILE also writes it. Timed in the same run, in turn
with ours: a naive baseline (attacks everything and computes weight gradients in the attack) and, if
installed, torchattacks' PGDL2.
"""
import argparse
import copy
import functools
import statistics
import time
from pathlib import Path

import common  # first, so that Ctrl-C while torch loads ends in one line
import torch
from torch.nn import functional as F

import attacks
import data as data_
import flags
import models
import sat
import runs
from common import UserError, say

NAIVE, PEER = "naive", "torchattacks PGDL2"


def command_line(argv=None):
    """Parses the command line."""
    parser = flags.Parser(prog="bench.py", usage="python bench.py [--flag VALUE ...]", description=__doc__,
                          formatter_class=flags.Help)
    parser.add_argument("--arch", choices=flags.ARCHS, default="preactresnet8", help="network")
    parser.add_argument("--batch-size", type=flags.count, default=128, help="examples a step")
    parser.add_argument("--side", type=flags.number(int, 8), default=32, help="side of the images, in pixels")
    parser.add_argument("--fractions", type=flags.number(float, 0, 1), nargs="+",
                        default=[0.0, 0.1, 0.5, 1.0], help="|A|/N")
    parser.add_argument("--steps", type=flags.count, default=7, help="PGD steps")
    parser.add_argument("--repeats", type=flags.count, default=7,
                        help="rounds over all kinds of steps; medians are printed")
    parser.add_argument("--compile", action="store_true",
                        help="time sat.py --compile's steps too, in the precision that it would use "
                             "(compiling takes minutes)")
    parser.add_argument(
        "--amp", choices=("auto", "off", "bf16"), default="auto",
        help="time the steps under bf16 autocast too; auto: where the hardware multiplies in bf16")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    flags.add_flags(parser, "machine")
    args = parser.parse_args(argv)
    if 1.0 not in args.fractions:
        raise UserError(f"--fractions {' '.join(map(str, args.fractions))} lacks 1, "
                        "to which the others are compared")
    return args


class Steps:
    """A network and a copy of it for the others' steps, with an optimizer each, random images, and the steps
    that are compared."""

    def __init__(self, args, device):
        self.args, self.device, g = args, device, torch.Generator().manual_seed(0)
        n, shape = 8 * args.batch_size, (3, args.side, args.side)
        x = torch.randint(0, 256, (n, *shape), generator=g, dtype=torch.uint8)
        self.split = data_.Split(x, torch.randint(0, 10, (n,), generator=g)).to(device)
        torch.manual_seed(0)
        self.model = models.build(args.arch, 10, [0.5] * 3, [0.25] * 3).to(device).train()
        # The others' code leaves its network in the default memory format.
        self.plain = copy.deepcopy(self.model).to(memory_format=torch.contiguous_format)
        self.optimizer = models.sgd(self.model, 0.01, 5e-4, device)
        self.plain_optimizer = models.sgd(self.plain, 0.01, 5e-4, device)
        self.todo, self.epoch = iter(()), 0
        how = {"attack": "pgd", "eps": 0.5, "step_size": 0.1, "steps": args.steps, "norm": "l2"}
        attack = lambda compile: sat.training_attack(
            self.model, argparse.Namespace(**how, compile=compile), device)
        # {compile: (the network that is trained, its attack)}; nothing is compiled before its first call.
        self.kinds = {False: (self.model, attack(False)),
                      True: (models.compiled(self.model, device), attack(True))}

    def batch(self):
        """The next batch, augmented as in training."""
        while (found := next(self.todo, None)) is None:
            self.todo = data_.training_batches(self.split, self.args.batch_size, 0, self.epoch, "full", self.device)
            self.epoch += 1
        return found

    def ours(self, share, compile, amp):
        """The step of sat.py, with the first `share` of the batch in A."""
        net, attack = self.kinds[compile]
        a = torch.arange(round(share * self.args.batch_size), device=self.device)
        w = torch.full((self.args.batch_size,), 1 / self.args.batch_size, device=self.device)
        x, y, _ = self.batch()
        with models.autocast(amp, self.device):
            sat.sat_step(net, self.optimizer, x, y, a, w, attack)

    def plain_step(self, x, y):
        """An ordinary training step on x."""
        self.plain.train()
        self.plain_optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.plain(x).float(), y).backward()
        self.plain_optimizer.step()

    def naive(self, amp):
        """A step that attacks the whole batch with loss.backward(), which computes the gradients of all
        weights in every step of the attack."""
        x, y, _ = self.batch()
        x = x.contiguous()
        self.plain.eval()
        delta = torch.zeros_like(x)
        with models.autocast(amp, self.device):
            for _ in range(self.args.steps):
                delta.requires_grad_()
                F.cross_entropy(self.plain(x + delta).float(), y).backward()
                delta = attacks.project(delta.detach() + 0.1 * attacks.ascent(delta.grad, "l2"), 0.5, "l2")
                delta = (x + delta).clamp(0, 1) - x
            self.plain_step(x + delta, y)

    def peer(self, amp, module):
        """A step that attacks the whole batch with torchattacks' PGDL2."""
        x, y, _ = self.batch()
        self.plain.eval()
        attack = module.PGDL2(self.plain, eps=0.5, alpha=0.1, steps=self.args.steps, random_start=False)
        with models.autocast(amp, self.device):
            self.plain_step(attack(x.contiguous(), y), y)

    def flops(self):
        """Floating-point operations of a forward pass of one example."""
        from torch.utils.flop_counter import FlopCounterMode
        with FlopCounterMode(display=False) as counter, torch.no_grad(), attacks.eval_mode(self.model):
            self.model(torch.zeros(1, 3, self.args.side, self.args.side, device=self.device))
        return counter.get_total_flops()


def rows_of(steps, args, device):
    """What to time: [{"step", "precision", "compile", "passes": by the cost model, "run": does the step}]."""
    found, amps = [], ["off", "bf16"] if models.precision(args.amp, device) == "bf16" else ["off"]
    for amp in amps:
        row = {"precision": models.precision(amp, device), "compile": False}
        for compile in [False, True] if args.compile and amp == amps[-1] else [False]:  # compiling takes long
            for share in sorted(set(args.fractions)):
                found.append({**row, "step": f"|A|/N = {share:g}", "compile": compile,
                              "passes": 3 + 2 * args.steps * share,
                              "run": functools.partial(steps.ours, share, compile, amp)})
        # A naive attack step also computes the weights' gradients: one forward pass and two backward passes.
        found.append({**row, "step": NAIVE, "passes": 3 + 3 * args.steps,
                      "run": functools.partial(steps.naive, amp)})
        try:
            import torchattacks
            found.append({**row, "step": PEER, "passes": 3 + 2 * args.steps,
                          "run": functools.partial(steps.peer, amp, torchattacks)})
        except ImportError:
            say("torchattacks is not installed: no comparison with it")
    return found


def timed(run, device):
    """Seconds of one step. A GPU runs behind Python, so there 20 steps are timed between two waits for it."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    n = 20 if device.type == "cuda" else 1
    sync()
    began = time.perf_counter()
    for _ in range(n):
        run()
    sync()
    return (time.perf_counter() - began) / n


def measure(rows, steps, args, device):
    """Times the rows in turn, round after round, so that a drift of the machine's speed affects all alike.

    Adds to each row: seconds (median), images_per_s, GFLOP_per_s; as medians over the rounds time_to_full
    (relative to |A| = N of the same precision and compile) and faster_than (how many times as fast as the
    naive and the peer's step, both in float32); and model, what the cost model says of time_to_full.
    """
    times = [[] for _ in rows]
    for r in common.progress(range(args.repeats + 1), desc="rounds"):
        for row, seconds in zip(rows, times):
            elapsed = timed(row["run"], device)
            if r > 0:  # the first round warms up
                seconds.append(elapsed)
    kind = lambda row: (row["step"], row["precision"], row["compile"])
    by_kind = {kind(row): seconds for row, seconds in zip(rows, times)}
    flops = steps.flops()
    ratio = lambda one, other: statistics.median(t / u for t, u in zip(one, other))
    for row, seconds in zip(rows, times):
        del row["run"]
        full = by_kind["|A|/N = 1", row["precision"], row["compile"]]
        others = {name: by_kind[key] for name in (NAIVE, PEER)
                  if (key := (name, "float32", False)) in by_kind}
        row["seconds"] = statistics.median(seconds)
        row["images_per_s"] = args.batch_size / row["seconds"]
        row["GFLOP_per_s"] = args.batch_size * row["passes"] * flops / row["seconds"] / 1e9
        row["time_to_full"], row["model"] = ratio(seconds, full), row["passes"] / (3 + 2 * args.steps)
        row["faster_than"] = {name: ratio(other, seconds) for name, other in others.items()}
    return rows


def show(rows):
    """Prints the rows as a table."""
    say(f"{'step':<34} {'images/s':>9} {'of |A|=N':>9} {'model':>6} {'GFLOP/s':>9}  "
        "times as fast as, in float32")
    for r in rows:
        name = f"{r['step']}, {r['precision']}{', --compile' * r['compile']}"
        faster = ", ".join(f"{other} {x:.2f}" for other, x in r["faster_than"].items())
        say(f"{name:<34} {r['images_per_s']:9.1f} {r['time_to_full']:9.3f} {r['model']:6.3f} "
            f"{r['GFLOP_per_s']:9.1f}  {faster}")


def main(argv=None):
    """Times the steps, prints the table, and writes it with --json."""
    args = command_line(argv)
    device = common.set_up(args)
    setting = (f"{args.arch}, batch {args.batch_size}, {args.side}x{args.side}, PGD-{args.steps}, "
               f"augmentation included, {common.device_name(device)}")
    say(f"one training step: {setting}, medians of {args.repeats} rounds")
    steps = Steps(args, device)
    result = {"setting": setting, "rounds": args.repeats, "torch": torch.__version__,
              "steps": measure(rows_of(steps, args, device), steps, args, device)}
    if device.type == "cuda":
        result["peak_MiB"] = torch.cuda.max_memory_allocated() / 2**20
    show(result["steps"])
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(args.json, result)


if __name__ == "__main__":
    common.script(main)
