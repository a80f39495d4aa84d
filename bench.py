"""Times one training step of SAT for several |A|/N against the cost model 3 + 14 |A|/N, AutoAttack and the loader, on this machine.

    python bench.py --arch preactresnet18 --batch-size 128
Files in: none (random images). Prints tables; --json FILE also writes them. Beside ours, in the same run and interleaved:
a naive baseline (attack everything, weight gradients computed in the attack) and, if installed, torchattacks' PGDL2.
"""
import argparse
import copy
import resource
import statistics
import tempfile
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
    parser.add_argument("--chunks", type=flags.count, nargs="+", default=[250], help="AutoAttack's batch sizes to compare")
    parser.add_argument("--loader", type=flags.number(int, 0), default=0, help="JPEGs (500x375) for the loader's timing at 224; 0: none")
    parser.add_argument("--compile", action="store_true", help="time sat.py --compile's steps too (compiling takes minutes)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--amp", choices=("auto", "off", "bf16"), default="auto", help="bf16 autocast; auto: on GPUs")
    flags.add_flags(parser, "machine")
    args = parser.parse_args(argv)
    if 1.0 not in args.fractions:
        raise UserError(f"--fractions {' '.join(map(str, args.fractions))} lacks 1, to which the others are compared")
    return args


# --- clocks and memory -------------------------------------------------------------------------------------------------

def sync(device):
    """Waits for the device, so that a clock read is true."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory(device):
    """Peak memory in MiB since the last call: the GPU's tensors, or on a CPU the whole process (where the kernel cannot forget
    an earlier peak, since the start)."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        return peak
    try:
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def medians(kinds, repeats, device):
    """Times every function of `kinds` {name: function} in turn, `repeats` rounds after one warm-up:
    {name: (median seconds, peak MiB)}, and {name: [seconds]}. Interleaved, so that a drift of the machine meets all alike."""
    times, peaks = {name: [] for name in kinds}, {}
    for r in common.progress(range(repeats + 1), desc="rounds"):
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


def bf16_peak(device):
    """FLOP/s of a large bf16 matrix product on a GPU, or None on a CPU."""
    if device.type != "cuda":
        return None
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    found, _ = medians({"matmul": lambda: [a @ a for _ in range(10)]}, 5, device)
    return 10 * 2 * 8192**3 / found["matmul"][0]


# --- one training step -------------------------------------------------------------------------------------------------

class Bench:
    """One network, optimizer and data set of random images on a device, and the steps that are compared."""

    def __init__(self, args, device):
        self.args, self.device, g = args, device, torch.Generator().manual_seed(0)
        n = 8 * args.batch_size
        self.split = datasets.Split(torch.randint(0, 256, (n, 3, args.side, args.side), generator=g, dtype=torch.uint8).to(device),
                                    torch.randint(0, 10, (n,), generator=g))
        torch.manual_seed(0)
        self.model = models.build(args.arch, 10, [0.5] * 3, [0.25] * 3).to(device)
        self.plain = copy.deepcopy(self.model)  # in the default memory format, as the others' code has it
        self.model = self.model.to(memory_format=torch.channels_last).train()
        self.optimizer, self.plain_optimizer = (sat.sgd(m, 0.01, 5e-4, device) for m in (self.model, self.plain))
        self.compiled = sat.compiled(self.model, device)  # lazily: nothing is compiled before it is called
        self.how = argparse.Namespace(attack="pgd", eps=0.5, step_size=0.1, steps=args.steps, norm="l2", random_start=False,
                                      batch_size=args.batch_size, compile=False)
        self.amp = sat.autocast(args.amp, device)
        self.todo, self.epoch = iter(()), 0

    def batch(self):
        """The next augmented batch, as training gets it."""
        while (found := next(self.todo, None)) is None:
            self.todo = datasets.batches(self.split, self.args.batch_size, 0, self.epoch, "full", self.device)
            self.epoch += 1
        return found

    def ours(self, share, compiled=False):
        """sat.py's step with the first `share` of the batch in A."""
        x, y, _ = self.batch()
        in_A = torch.arange(len(x)) < round(share * len(x))
        net, self.how.compile = self.compiled if compiled else self.model, compiled
        self.model.train()
        sat.sat_step(net, net, self.optimizer, x, y, in_A, torch.ones(len(x), device=self.device), self.how, self.amp)

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


def steps_table(bench, args, device):
    """Times all kinds of steps; returns rows [{"step", "images_per_s", "time_to_full", "model", ...}]."""
    kinds = {f"|A|/N = {f:g}": (lambda f=f: bench.ours(f), 3 + 2 * args.steps * f) for f in sorted(set(args.fractions))}
    if args.compile:
        kinds |= {f"{name}, --compile": (lambda f=f: bench.ours(f, True), kinds[name][1])
                  for f in sorted(set(args.fractions)) for name in [f"|A|/N = {f:g}"]}
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


def show_steps(rows):
    """Prints the rows of steps_table."""
    say(f"{'step':<34} {'images/s':>9} {'time to full':>13} {'cost model':>11} {'GFLOP/s':>9} {'of peak':>8} {'peak MiB':>9}")
    for r in rows:
        peak = "-" if r["share_of_bf16_peak"] is None else f"{r['share_of_bf16_peak']:.1%}"
        say(f"{r['step']:<34} {r['images_per_s']:9.1f} {r['time_to_full']:13.3f} {r['model']:11.3f} {r['GFLOP_per_s']:9.1f} {peak:>8} {r['peak_MiB']:9.0f}")


# --- memory over a run, the loader, AutoAttack -------------------------------------------------------------------------

def growth(bench, steps, device):
    """Peak memory in MiB of the second tenth and of the last tenth of a run of `steps` with half of each batch in A."""
    peaks, tenth = [], max(1, steps // 10)
    for s in common.progress(range(steps), desc="memory"):
        bench.ours(0.5)
        if (s + 1) % tenth == 0:
            peaks.append(memory(device))
    found = {"steps": steps, "second_tenth_MiB": peaks[min(1, len(peaks) - 1)], "last_tenth_MiB": peaks[-1]}
    found["text"] = ("Peak memory of a run of {steps:,} steps with |A|/N = 0.5: {second_tenth_MiB:.1f} MiB in its second tenth, "
                     "{last_tenth_MiB:.1f} MiB in its last.".format(**found))
    return found


def loader_rates(bench, args, device):
    """Images a second at 224: the loader alone (decoding, crop), loader and augmentation, training on one batch, and all
    together, which comes near the slower of the two when the loader works ahead of the step."""
    from PIL import Image
    with tempfile.TemporaryDirectory() as folder:
        g, paths = torch.Generator().manual_seed(0), []
        for i in range(args.loader):  # smooth noise, about as many bytes a file as ImageNet's
            noise = F.interpolate(torch.rand(1, 3, 75, 100, generator=g), size=(375, 500), mode="bicubic").clamp(0, 1)[0]
            paths.append(Path(folder) / f"{i}.jpg")
            Image.fromarray((255 * noise).byte().permute(1, 2, 0).numpy()).save(paths[-1], quality=95)
        split = datasets.Split(datasets.Files(paths, 224, args.workers), torch.zeros(args.loader, dtype=torch.int64))
        size = min(args.batch_size, max(1, args.loader // 4))
        list(split.x.load([[(0, 0)]]))  # start the workers
        order = [[(i, i) for i in range(j, j + size)] for j in range(0, args.loader - size + 1, size)]
        read = lambda epoch: datasets.batches(split, size, 0, epoch, "full", device)

        def train(todo):
            """SAT steps with A = {} on the batches of `todo`."""
            for x, y, _ in todo:
                bench.model.train()
                nothing = torch.zeros(len(x), dtype=torch.bool)
                sat.sat_step(bench.model, bench.model, bench.optimizer, x, y, nothing, torch.ones(len(x), device=device), bench.how, bench.amp)

        one = next(read(0))
        runs = {"decode": lambda: list(split.x.load(order)), "decode and augment": lambda: [None for _ in read(1)],
                "train": lambda: train([one] * len(order)), "all together": lambda: train(read(2))}
        found, _ = medians(runs, args.repeats, device)
    rates = {name: len(order) * size / seconds for name, (seconds, _) in found.items()}
    said = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
    return {**rates, "text": f"Images/s of JPEGs of 500x375 at 224, {split.x.workers} loader workers, no attack, batch {size}: {said}."}


def autoattack_rates(bench, n, size, device):
    """Examples a second of standard AutoAttack, ours and the plain package's on the same n examples, both in chunks of `size`
    with the same seeds, and whether their flags agree."""
    from pyautoattack import AutoAttack
    x = torch.rand(n, 3, bench.args.side, bench.args.side, generator=torch.Generator().manual_seed(0)).to(device)
    model = bench.model.eval().requires_grad_(False)
    with torch.no_grad():
        y = model(x).argmax(1)  # all right, so that all are attacked
    robust, seconds = {}, {}

    def plain():
        """The package's own call, chunk by chunk."""
        parts = [AutoAttack(model, norm="L2", eps=0.05, version="standard", device=device, seed=c).run_standard_evaluation(
            x[i:i + size], y[i:i + size], batch_size=size)[1] for c, i in enumerate(range(0, n, size))]
        robust["package"] = torch.cat(parts).cpu() == y.cpu()

    runs = {"ours": lambda: robust.update(ours=attacks.autoattack(model, x, y, eps=0.05, batch_size=size)[1]), "package": plain}
    for name, run in runs.items():
        began = time.perf_counter()
        run()
        sync(device)
        seconds[name] = time.perf_counter() - began
    bench.model.requires_grad_(True)
    found = {"n": n, "chunk": size, **{f"{k}_examples_per_s": n / s for k, s in seconds.items()}, "robust": int(robust["ours"].sum()),
             "flags_agree": torch.equal(robust["ours"], robust["package"])}
    found["text"] = ("Standard AutoAttack on {n} examples of random pixels in chunks of {chunk} ({robust} robust), examples/s: ours {ours_examples_per_s:.2f}, "
                     "the package alone {package_examples_per_s:.2f}; equal flags: {flags_agree}.".format(**found))
    return found


def main(argv=None):
    """Times, prints, writes."""
    args = command_line(argv)
    device = common.set_up(args)
    bench = Bench(args, device)
    setting = (f"{args.arch}, batch {args.batch_size}, {args.side}x{args.side}, PGD-{args.steps}, augmentation included, "
               f"{'bf16 autocast' if bench.amp._enabled else 'float32'}, "
               f"{common.device_name(device)}, medians of {args.repeats}")
    say(f"one training step: {setting}")
    result = {"setting": setting, "torch": torch.__version__, "steps": steps_table(bench, args, device)}
    show_steps(result["steps"])
    if args.grow:
        result["growth"] = growth(bench, args.grow, device)
    if args.loader:
        result["loader"] = loader_rates(bench, args, device)
    if args.autoattack:
        result["autoattack"] = [autoattack_rates(bench, args.autoattack, size, device) for size in args.chunks]
    result["said"] = [part["text"] for key in ("growth", "loader") if (part := result.get(key))] + [part["text"] for part in result.get("autoattack", [])]
    for text in result["said"]:
        say(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        common.write_json(args.json, result)


if __name__ == "__main__":
    common.script(main)
