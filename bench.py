"""Times one training step of SAT for several |A|/N against the cost model 3 + 14 |A|/N, and AutoAttack, on this machine.

    python bench.py --arch preactresnet18 --batch-size 128
Files in: none (random images). Prints a table; --json FILE also writes it. Beside ours, in the same run and interleaved:
a naive baseline (attack everything, weight gradients computed in the attack) and, if installed, torchattacks' PGDL2.
"""
import argparse
import copy
import json
import resource
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F

import attacks
import common
import data as datasets
import flags
import models
import sat
from common import UserError, say


def command_line(argv=None):
    """The command line."""
    parser = flags.Parser(prog="bench.py", usage="python bench.py [--flag VALUE ...]", description=__doc__, formatter_class=flags.Help)
    parser.add_argument("--arch", choices=models.ARCHS, default="preactresnet8", help="network")
    parser.add_argument("--batch-size", type=flags.count, default=128, help="examples a step")
    parser.add_argument("--side", type=flags.number(int, 8), default=32, help="side of the images, in pixels")
    parser.add_argument("--fractions", type=flags.number(float, 0, 1), nargs="+", default=[0.0, 0.1, 0.5, 1.0], help="|A|/N")
    parser.add_argument("--steps", type=flags.count, default=7, help="PGD steps")
    parser.add_argument("--repeats", type=flags.count, default=7, help="timed steps of each kind; medians are printed")
    parser.add_argument("--grow", type=flags.number(int, 0), default=0, help="steps of a run whose memory is watched, e.g. 2000; 0: none")
    parser.add_argument("--autoattack", type=flags.number(int, 0), default=0, help="examples for AutoAttack's timing; 0: none")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--amp", choices=("auto", "off", "bf16"), default="auto", help="bf16 autocast; auto: on GPUs")
    flags.add_flags(parser, "machine")
    return parser.parse_args(argv)


def sync(device):
    """Waits for the device, so that a clock read is true."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory(device):
    """Peak memory in MiB since the last call: the GPU's own, or the process's largest so far on a CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def medians(kinds, repeats, device):
    """Times every function of `kinds` {name: function} in turn, `repeats` rounds after one warm-up:
    {name: (median seconds, peak MiB)}, and {name: [seconds]}. Interleaved, so that a drift of the machine meets all alike."""
    times, peaks = {name: [] for name in kinds}, {}
    for r in range(repeats + 1):
        for name, run in kinds.items():
            memory(device)
            sync(device)
            began = time.perf_counter()
            run()
            sync(device)
            if r:
                times[name].append(time.perf_counter() - began)
            peaks[name] = memory(device)
    return {name: (statistics.median(t), peaks[name]) for name, t in times.items()}, times


class Bench:
    """One network, optimizer and data set of random images on a device, and the steps that are compared."""

    def __init__(self, args, device):
        self.args, self.device, g = args, device, torch.Generator().manual_seed(0)
        n = 4 * args.batch_size
        self.split = datasets.Split(torch.randint(0, 256, (n, 3, args.side, args.side), generator=g, dtype=torch.uint8).to(device),
                                    torch.randint(0, 10, (n,), generator=g))
        torch.manual_seed(0)
        self.model = models.build(args.arch, 10, [0.5] * 3, [0.25] * 3).to(device)
        self.plain = copy.deepcopy(self.model)  # in the default memory format, as the others' code has it
        self.model = self.model.to(memory_format=torch.channels_last).train()
        self.optimizer, self.plain_optimizer = (torch.optim.SGD(m.parameters(), 0.01, 0.9, weight_decay=5e-4) for m in (self.model, self.plain))
        self.how = argparse.Namespace(attack="pgd", eps=0.5, step_size=0.1, steps=args.steps, norm="l2", random_start=False, batch_size=args.batch_size, compile=False)
        bf16 = args.amp == "bf16" or (args.amp == "auto" and device.type == "cuda")
        self.amp = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        self.epoch = 0

    def batch(self):
        """The next augmented batch, as training gets it."""
        self.epoch += 1
        return next(datasets.batches(self.split, self.args.batch_size, 0, self.epoch, "full", self.device))

    def ours(self, share):
        """sat.py's step with the first `share` of the batch in A."""
        x, y, _ = self.batch()
        in_A = torch.arange(len(x)) < round(share * len(x))
        sat.sat_step(self.model, self.model, self.optimizer, x, y, in_A, torch.ones(len(x), device=self.device), self.how, self.amp)

    def plain_step(self, x, y):
        """A plain training step on x."""
        self.plain.train()
        self.plain_optimizer.zero_grad(set_to_none=True)
        with self.amp:
            logits = self.plain(x)
        F.cross_entropy(logits.float(), y).backward()
        self.plain_optimizer.step()

    def naive(self):
        """Attacks everything with loss.backward(), which computes the gradients of all weights in every attack step."""
        x, y, _ = self.batch()
        x = x.contiguous()
        self.plain.eval()
        delta = torch.zeros_like(x)
        for _ in range(self.args.steps):
            delta.requires_grad_()
            with self.amp:
                loss = F.cross_entropy(self.plain(x + delta).float(), y)
            loss.backward()
            delta = attacks.project(delta.detach() + 0.1 * attacks.ascent(delta.grad, "l2"), 0.5, "l2")
            delta = (x + delta).clamp(0, 1) - x
        self.plain_step(x + delta, y)

    def torchattacks(self, module):
        """The same step with torchattacks' PGDL2 on everything."""
        x, y, _ = self.batch()
        self.plain.eval()
        attack = module.PGDL2(self.plain, eps=0.5, alpha=0.1, steps=self.args.steps, random_start=False)
        with self.amp:
            x = attack(x.contiguous(), y)
        self.plain_step(x, y)

    def flops(self):
        """Floating-point operations of one forward pass of one example."""
        from torch.utils.flop_counter import FlopCounterMode
        with FlopCounterMode(display=False) as counter, torch.no_grad(), attacks.eval_mode(self.model):
            self.model(torch.zeros(1, 3, self.args.side, self.args.side, device=self.device))
        return counter.get_total_flops()


def bf16_peak(device):
    """FLOP/s of a large bf16 matrix product on a GPU, or None on a CPU."""
    if device.type != "cuda":
        return None
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    found, _ = medians({"matmul": lambda: [a @ a for _ in range(10)]}, 5, device)
    return 10 * 2 * 8192**3 / found["matmul"][0]


def steps_table(bench, args, device):
    """Times all kinds of steps; returns rows [{"step", "images_per_s", "time_to_full", "model", ...}]."""
    kinds = {f"|A|/N = {f:g}": (lambda f=f: bench.ours(f), 3 + 2 * args.steps * f) for f in sorted(set(args.fractions))}
    kinds["naive, all attacked"] = bench.naive, 3 + 3 * args.steps  # its attack steps compute the weights' gradients too
    try:
        import torchattacks
        kinds["torchattacks PGDL2, all attacked"] = lambda: bench.torchattacks(torchattacks), 3 + 2 * args.steps
    except ImportError:
        say("torchattacks is not installed: no comparison with it")
    found, times = medians({name: run for name, (run, _) in kinds.items()}, args.repeats, device)
    flops, peak, rows = bench.flops(), bf16_peak(device), []
    for name, (_, passes) in kinds.items():
        seconds, mib = found[name]
        ratio = statistics.median(t / u for t, u in zip(times[name], times["|A|/N = 1"]))  # pair by pair
        rate = args.batch_size * passes * flops / seconds
        rows.append({"step": name, "seconds": seconds, "images_per_s": args.batch_size / seconds, "time_to_full": ratio,
                     "model": passes / (3 + 2 * args.steps), "GFLOP_per_s": rate / 1e9, "share_of_bf16_peak": peak and rate / peak, "peak_MiB": mib})
    return rows


def growth(bench, steps, device):
    """Memory in MiB after a tenth of a run of `steps` and at its end."""
    memory(device)
    for s in common.progress(range(steps), desc="memory"):
        bench.ours(0.5)
        if s == steps // 10:
            early = memory(device)
    return {"steps": steps, "MiB_at_a_tenth": early, "MiB_at_the_end": memory(device)}


def autoattack_rates(bench, n, device):
    """Examples a second of our wrapper and of the plain package on the same n examples, and whether their flags agree."""
    from pyautoattack import AutoAttack
    x, y = bench.split.pixels(torch.arange(n), device), bench.split.y[:n]
    with torch.no_grad(), attacks.eval_mode(bench.model):
        y = bench.model(x).argmax(1)  # all right, so that all are attacked
    bench.model.eval().requires_grad_(False)
    flags_of, seconds = {}, {}

    def plain():
        aa = AutoAttack(bench.model, norm="L2", eps=0.5, version="standard", device=device, seed=0)
        flags_of["package"] = aa.run_standard_evaluation(x, y, batch_size=n)[1].cpu() == y.cpu()

    runs = {"ours": lambda: flags_of.update(ours=attacks.autoattack(bench.model, x, y, eps=0.5, batch_size=n)[1]), "package": plain}
    for name, run in runs.items():
        began = time.perf_counter()
        run()
        sync(device)
        seconds[name] = time.perf_counter() - began
    return {"n": n, **{f"{k}_examples_per_s": n / s for k, s in seconds.items()}, "flags_agree": torch.equal(flags_of["ours"], flags_of["package"])}


def main(argv=None):
    """Times, prints, writes."""
    args = command_line(argv)
    if 1.0 not in args.fractions:
        raise UserError(f"--fractions {' '.join(map(str, args.fractions))} lacks 1, to which the others are compared")
    device = common.set_up(args)
    bench = Bench(args, device)
    say(f"one training step, {args.arch}, batch {args.batch_size}, {args.side}x{args.side}, PGD-{args.steps}, augmentation included, "
        f"{'bf16' if bench.amp._enabled else 'float32'}, {common.device_name(device)}; medians of {args.repeats}")
    result = {"args": {k: str(v) for k, v in vars(args).items()}, "device": common.device_name(device), "steps": steps_table(bench, args, device)}
    say(f"{'step':<34} {'images/s':>9} {'time to full':>13} {'cost model':>11} {'GFLOP/s':>9} {'of peak':>8} {'peak MiB':>9}")
    for r in result["steps"]:
        peak = "-" if r["share_of_bf16_peak"] is None else f"{r['share_of_bf16_peak']:.1%}"
        say(f"{r['step']:<34} {r['images_per_s']:9.1f} {r['time_to_full']:13.3f} {r['model']:11.3f} {r['GFLOP_per_s']:9.1f} {peak:>8} {r['peak_MiB']:9.0f}")
    if args.grow:
        result["growth"] = growth(bench, args.grow, device)
        say("memory after a tenth of {steps} steps {MiB_at_a_tenth:.0f} MiB, at the end {MiB_at_the_end:.0f} MiB".format(**result["growth"]))
    if args.autoattack:
        result["autoattack"] = autoattack_rates(bench, args.autoattack, device)
        say("AutoAttack on {n} examples: ours {ours_examples_per_s:.2f}/s, the package {package_examples_per_s:.2f}/s, equal flags: "
            "{flags_agree}".format(**result["autoattack"]))
    if args.json:
        common.write_json(args.json, json.loads(json.dumps(result)))


if __name__ == "__main__":
    common.script(main)
