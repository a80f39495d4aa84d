"""What decides the design for GPUs, one JSON line a result. Without a GPU it runs in small, to try it out.

    python results-published/bench/gpu_check.py PART [|A|/N ...] [--flag VALUE ...]

Parts: env (launch costs), busy (the GPU's own time of a step), train (ms a step, epoch by epoch), same (plain
against compiled and whole-step graphs), eval (formats and precisions), flips (verdicts that TF32 changes).
"""
import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import attacks  # noqa: E402
import common  # noqa: E402
import models  # noqa: E402
import sat  # noqa: E402
import train  # noqa: E402
from data import Examples  # noqa: E402

CPU = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if CPU else "cuda")
N, ARCH = (640, "preactresnet8") if CPU else (50_000, "preactresnet18")


def tell(**values):
    """Prints a result as a line of JSON."""
    print(json.dumps(values), flush=True)


def synchronize():
    """Waits for the GPU, if there is one."""
    if not CPU:
        torch.cuda.synchronize()


def setting(*flags, n=N):
    """Arguments, random images and a network."""
    args = sat.command_line(["--config", str(common.HERE / "configs/cifar10.yaml"), "--arch", ARCH, "--split",
                             "full", "--lr-decays", "--epochs", "3", "--lr", "0.01", *flags])
    g = torch.Generator().manual_seed(0)
    examples = Examples(torch.randint(0, 256, (n, 3, 32, 32), generator=g, dtype=torch.uint8).to(DEVICE),
                        torch.randint(0, 10, (n,), generator=g))
    torch.manual_seed(0)
    return args, examples, models.build(ARCH, 10, [0.5] * 3, [0.25] * 3).to(DEVICE)


def subset(share, n=N):
    """A random A, bool (n,), with |A|/N near `share`."""
    return torch.rand(n, generator=torch.Generator().manual_seed(1)) < share


def time_training(shares, flags):
    """ms a step of train() in each of three epochs, for each |A|/N; compilation is in the first."""
    for share in shares:
        args, examples, model = setting(*flags)
        rows = [state["row"] for state in train.train(model, examples, subset(share), 1.0, args, DEVICE)]
        tell(part="train", share=share, flags=flags, compile=rows[-1]["compile"], loss=rows[-1]["loss"],
             ms=[round(1e3 * row["seconds"] / (N // 128), 3) for row in rows],
             MiB=0 if CPU else torch.cuda.max_memory_allocated() >> 20)


def environment():
    """Microseconds to launch a kernel, and a node of a CUDA graph."""
    x = torch.zeros(1, device=DEVICE)
    synchronize()
    start = time.perf_counter()
    for _ in range(2000):
        x.add_(1)
    queued = time.perf_counter() - start
    synchronize()
    tell(part="env", torch=torch.__version__, device=common.device_name(DEVICE), cpus=os.cpu_count(),
         us_a_launch=500 * queued)
    if CPU:
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(1000):
            x.add_(1)
    graph.replay()
    synchronize()
    start = time.perf_counter()
    for _ in range(20):
        graph.replay()
    synchronize()
    tell(part="env", us_a_node=1e6 * (time.perf_counter() - start) / 20_000)


def busy(shares, flags):
    """Five steps are queued behind a sleeping GPU, so that the time between the events is the GPU's alone."""
    first = 2 if CPU else 200
    for share in shares:
        args, examples, model = setting("--epochs", "1", *flags)
        marks, real = [], train.training_batches

        def batches(*a):
            for step, batch in enumerate(real(*a)):
                if not CPU and step in (first, first + 5):
                    if step == first:
                        torch.cuda.synchronize()
                        torch.cuda._sleep(int(4e8))
                    marks.append(torch.cuda.Event(enable_timing=True))
                    marks[-1].record()
                if step > first + 5:
                    return
                yield batch
        train.training_batches = batches
        for _ in train.train(model, examples, subset(share), 1.0, args, DEVICE):
            pass
        train.training_batches = real
        synchronize()
        tell(part="busy", share=share, flags=flags,
             gpu_ms=None if CPU else marks[0].elapsed_time(marks[1]) / 5)


def same():
    """The change of all weights in twelve steps: plain, compiled, as whole-step graphs."""
    changes, n = {}, 128 * 12
    for mode in ("off", "on", "step"):
        args, examples, model = setting("--compile", mode, "--epochs", "1", "--amp", "off", n=n)
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        for state in train.train(model, examples, subset(0.3, n), 1.0, args, DEVICE):
            tell(part="same", mode=mode, loss=state["row"]["loss"], accuracy=state["row"]["train_accuracy"])
        changes[mode] = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    for mode in ("on", "step"):
        tell(part="same", mode=mode, cosine=F.cosine_similarity(changes["off"], changes[mode], dim=0).item(),
             norms=[changes["off"].norm().item(), changes[mode].norm().item()])


def evaluation():
    """ms of a forward pass and of a gradient of the pixels."""
    repeats, formats = 1 if CPU else 15, (("float32 channels_last", False, torch.channels_last),
                                          ("float32 contiguous", False, torch.contiguous_format),
                                          ("TF32 channels_last", True, torch.channels_last))
    batches = (8,) if CPU else (250, 1000, 2000)
    for batch, (name, tf32, memory_format) in itertools.product(batches, formats):
        model = setting()[2].to(memory_format=memory_format).eval().requires_grad_(False)
        x = torch.rand(batch, 3, 32, 32, device=DEVICE)
        y, ms = torch.zeros(batch, dtype=torch.int64, device=DEVICE), {}

        def gradient():
            z = x.clone().requires_grad_()
            torch.autograd.grad(F.cross_entropy(model(z), y), z)

        def forward():
            with torch.no_grad():
                model(x)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            for kind, function in (("gradient", gradient), ("forward", forward)):
                for _ in range(3):
                    function()
                synchronize()
                start = time.perf_counter()
                for _ in range(repeats):
                    function()
                synchronize()
                ms[kind] = 1e3 * (time.perf_counter() - start) / repeats
        tell(part="eval", kind=name, batch=batch, ms=ms)


def flips():
    """After two epochs of AT: the examples on which AutoAttack's verdict depends on TF32."""
    args, examples, model = setting("--epochs", "2", "--steps", "1" if CPU else "7")
    for _ in train.train(model, examples, subset(1.0), 1.0, args, DEVICE):
        pass
    n, right = 6 if CPU else 500, {}
    x, y = examples.x[:n].float().cpu() / 255, examples.y[:n]
    for tf32 in (False, True):
        start = time.perf_counter()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            right[tf32] = attacks.autoattack(model, x, y, eps=0.5, attacks=["apgd-ce", "apgd-t"],
                                             batch_size=n)
        tell(part="flips", tf32=tf32, seconds=time.perf_counter() - start,
             right=[int(verdicts.sum()) for verdicts in right[tf32]])
    tell(part="flips", differ=[int((a != b).sum()) for a, b in zip(right[False], right[True])])


if __name__ == "__main__":
    part, *words = sys.argv[1:]
    numbers = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    shares, flags = [float(word) for word in words[:numbers]] or [0.1], words[numbers:]
    common.set_up(argparse.Namespace(device="auto", threads=0, compile="off"))
    {"env": environment, "same": same, "eval": evaluation, "flips": flips,
     "busy": lambda: busy(shares, flags), "train": lambda: time_training(shares, flags)}[part]()
