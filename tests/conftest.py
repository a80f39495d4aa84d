"""What the tests share: small networks and images, the scripts run as a user runs them,
and a pipeline that ran once."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are tiny; set for the scripts as well
import torch  # noqa: E402

import common  # noqa: E402
import data as data_  # noqa: E402
import models  # noqa: E402
import sat  # noqa: E402
import runs

HERE = Path(__file__).resolve().parents[1]  # the repository

QUICK = ["--epochs", "2", "--lr-decays", "--eval-attacks", "apgd-ce", "--eval-n", "24",
         "--select-attacks", "apgd-ce", "--select-n", "8"]


def net(n_classes=10, channels=1, seed=0, arch="preactresnet8"):
    """An untrained network; its input statistics are 0.3 and 0.35 in each channel."""
    torch.manual_seed(seed)
    return models.build(arch, n_classes, [0.3] * channels, [0.35] * channels)


def images(n=6, channels=1, side=8, n_classes=10, seed=0):
    """Random images (n, channels, side, side) and labels (n,)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, channels, side, side, generator=g)
    x[: n // 2] = x[: n // 2].round()  # half of them on the edge of the box
    return x, torch.randint(0, n_classes, (n,), generator=g)


def script(name, *argv, cwd=None, env=None):
    """Runs a script of the repository to its end, in `cwd` and with `env` added to the environment."""
    return subprocess.run([sys.executable, str(HERE / name), *map(str, argv)], capture_output=True, text=True,
                          cwd=cwd, env={**os.environ, **(env or {})})


@pytest.fixture(scope="session")
def trained():
    """A digits network after two epochs, and 12 test images of which it gets most right."""
    args, data = sat.command_line(["--split", "none", *QUICK]), data_.load_dataset("digits", "data")
    torch.manual_seed(0)
    model = models.build("preactresnet8", 10, *data.mean_std())
    for _ in sat.train(model, data.train, torch.zeros(1297, dtype=torch.bool), 1.0,
                       args, torch.device("cpu")):
        pass
    return model.eval(), data


GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


def write_images(root, train=6, test=3, classes=("cat", "dog"), side=32):
    """An image folder at `root`: `train` and `test` random PNGs of each class."""
    from PIL import Image
    rng = np.random.default_rng(0)
    for part, n in (("train", train), ("test", test)):
        for c in classes:
            (root / part / c).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / c / f"{i}.png")


def write_jpeg(path, colour=(200, 30, 90), size=(80, 60), mode="RGB"):
    """A JPEG of one colour at `path`, whose folders are made too."""
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """Every stage once, in subprocesses, as a user runs them; the folder of results."""
    cwd = tmp_path_factory.mktemp("user")
    def ok(name, *argv):
        """The output of a script that must end well."""
        done = script(name, *argv, cwd=cwd)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr + done.stdout
        return done.stdout
    source = ["--dataset", "digits0-4", *QUICK, "--epochs", "4", "--lr-decays", "2"]
    first = ok("sat.py", *source, "--split", "esat", "--frac", "0.5", "--order", "hardest",
               "--weight", "emphasis", "--run", "a")
    assert "ranking the examples first" in first and "class, hardest first" in first
    ok("sat.py", *source, "--split", "csat", "--size", "2", "--run", "b")
    ok("sat.py", *source, "--split", "none", "--run", "none")
    results = cwd / "results"
    ok("evaluate.py", results / "digits0-4" / "b" / "best.pt")
    ok("transfer.py", results / "digits0-4" / "a" / "best.pt",
       "--config", HERE / "configs/transfer/digits5-9.yaml", *QUICK)
    ok("report.py")
    assert "is finished" in ok("sat.py", *source, "--split", "csat", "--size", "2", "--run", "b")
    return results


KILLER = """
import importlib, os, signal, sys, torch
marker, phase, moment, stage, *argv = sys.argv[1:]
import attacks, common, train
seen = {"epoch": 0, "chunk": 0, "save": 0}
real_batches, real_chunk, real_fsync = train.training_batches, attacks.attack_batch, os.fsync

def at(where):
    seen[where] += 1
    if where == phase and seen[where] == int(moment):
        with open(marker, "w") as f:
            f.write(f"{where} {seen[where]}")
        os.kill(os.getpid(), getattr(signal, os.environ.get("WITH", "SIGKILL")))

def batches(*a):
    for batch in real_batches(*a):
        yield batch
        at("epoch")  # the step is done, the epoch is not saved

def attack_batch(model, *a, **k):
    watch = model.register_forward_pre_hook(lambda *_: at("chunk"))
    try:
        return real_chunk(model, *a, **k)
    finally:
        watch.remove()

def fsync(file):
    at("save")  # written beside its place, and not yet in it
    real_fsync(file)

train.training_batches, attacks.attack_batch, os.fsync = batches, attack_batch, fsync
common.script(lambda: importlib.import_module(stage).main(argv))
print("SEEN", seen["epoch"], seen["chunk"], seen["save"])
"""


SHORT = ["--dataset", "digits0-4", "--epochs", "3", "--lr-decays", "1", "--steps", "2",
         "--eval-attacks", "apgd-ce", "--eval-n", "30", "--eval-batch", "10",
         "--select-attacks", "apgd-ce", "--select-n", "10"]


CHAIN = [  # stage, its arguments, what it can be killed in
    ("rank", [*SHORT[:6], "--batch-size", "64"], ("epoch", "save")),
    ("sat", [*SHORT, "--split", "esat", "--frac", "0.3", "--random-start", "--run", "a"],
     ("epoch", "chunk", "save")),
    ("evaluate", ["{results}/digits0-4/a/best.pt", "--eps", "0.3"], ("chunk", "save")),
    ("transfer", ["{results}/digits0-4/a/best.pt", "--config", str(HERE / "configs/transfer/digits5-9.yaml"),
                  *SHORT[2:6], *SHORT[8:], "--run", "t"],
     ("epoch", "chunk", "save"))]


def run_stage(folder, stage, argv, phase="none", moment=0, **env):
    """A stage under KILLER; its process and what its marker says."""
    argv = [word.replace("{results}", str(folder)) for word in argv]
    if stage != "evaluate":
        argv += ["--results", str(folder), "--amp", os.environ.get("KILLS_AMP", "off")]
    (folder / "marker").unlink(missing_ok=True)
    command = [sys.executable, "-c", KILLER, str(folder / "marker"), phase, str(moment), stage, *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder,
                          env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", **env})
    return done, (folder / "marker").read_text() if (folder / "marker").exists() else ""


def contents(folder):
    """Everything a chain of stages wrote, times aside: {path: content}."""
    def plain(value):
        """The value without times, its tensors as bytes."""
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k != "seconds"}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value
    read = {".json": runs.read_json, ".pt": lambda p: torch.load(p, weights_only=True),
            ".jsonl": lambda p: [json.loads(r) for r in open(p)]}
    return {p.relative_to(folder).as_posix(): plain(read[p.suffix](p))
            for p in folder.rglob("*") if p.suffix in read}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """What CHAIN writes when nothing happens, and how many moments each phase of each stage has."""
    folder, moments = tmp_path_factory.mktemp("whole"), {}
    for stage, argv, _ in CHAIN:
        done, _ = run_stage(folder, stage, argv)
        assert done.returncode == 0, done.stderr
        moments[stage] = dict(zip(("epoch", "chunk", "save"),
                                  map(int, done.stdout.rsplit("SEEN", 1)[1].split())))
    return contents(folder), moments
