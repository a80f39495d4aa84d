"""What the tests share: images, a pipeline that ran once, stages that can be killed."""
import json
import os
import subprocess
import sys

import pytest
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are tiny; set for the scripts as well
import torch  # noqa: E402
from common import HERE  # noqa: E402

QUICK = "--epochs 2 --eval-attacks apgd-ce --eval-n 24 --select-attacks apgd-ce --select-n 8".split()


def write_images(root, train=6, test=3, classes=("cat", "dog"), side=32):
    """An image folder at `root`: `train` and `test` random PNGs of each class."""
    from PIL import Image
    g = torch.Generator().manual_seed(0)
    for part, n in (("train", train), ("test", test)):
        for c in classes:
            (root / part / c).mkdir(parents=True)
            for i in range(n):
                pixels = torch.randint(0, 256, (side, side, 3), generator=g, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / part / c / f"{i}.png")


def write_jpeg(path, colour=(200, 30, 90), size=(80, 60), mode="RGB"):
    """A JPEG of one colour at `path`, whose folders are made too."""
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """Every stage once, in subprocesses, as a user runs them; the folder of results."""
    cwd = tmp_path_factory.mktemp("user")
    source = ["--dataset", "digits0-4", *QUICK, "--epochs", "4", "--lr-decays", "2"]
    for script, *argv in (
            ["sat.py", *source, "--frac", "0.5", "--weight", "emphasis", "--run", "a"],
            ["sat.py", *source, "--split", "csat", "--size", "2", "--run", "b"],
            ["sat.py", *source, "--split", "none", "--run", "none"],
            ["evaluate.py", "results/digits0-4/b/best.pt"],
            ["transfer.py", "results/digits0-4/a/best.pt",
             "--config", HERE / "configs/transfer/digits5-9.yaml", *QUICK],
            ["report.py"]):
        done = subprocess.run([sys.executable, HERE / script, *argv], capture_output=True, text=True, cwd=cwd)
        assert done.returncode == 0, done.stderr + done.stdout
    return cwd / "results"


KILLER = """
import importlib, json, os, pathlib, signal, sys
marker, phase, moment, stage, *argv = sys.argv[1:]
import attacks, common, train
seen = {"epoch": 0, "chunk": 0, "save": 0}
real_batches, real_chunk, real_fsync = train.training_batches, attacks.attack_batch, os.fsync

def at(where):  # kills this process at its moment
    seen[where] += 1
    if where == phase and seen[where] == int(moment):
        pathlib.Path(marker).write_text(f"{where} {seen[where]}")
        os.kill(os.getpid(), getattr(signal, os.environ.get("WITH", "SIGKILL")))

def batches(*a):
    for batch in real_batches(*a):
        yield batch
        at("epoch")  # the step is done, the epoch is not saved

def attack_batch(*a, **k):
    right = real_chunk(*a, **k)
    at("chunk")  # the chunk is done and not saved
    return right

def fsync(file):
    at("save")  # written beside its place, and not yet in it
    real_fsync(file)

train.training_batches, attacks.attack_batch, os.fsync = batches, attack_batch, fsync
common.script(lambda: importlib.import_module(stage).main(argv))
print("SEEN", json.dumps(seen))
"""

SHORT = ("--dataset digits0-4 --epochs 3 --lr-decays 1 --steps 2 --eval-attacks apgd-ce --eval-n 30 "
         "--eval-batch 10 --select-attacks apgd-ce --select-n 10").split()
CHAIN = [  # stage, its arguments, what it can be killed in
    ("rank", [*SHORT[:6], "--batch-size", "64"], ("epoch", "save")),
    ("sat", [*SHORT, "--frac", "0.3", "--random-start", "--run", "a"], ("epoch", "chunk", "save")),
    ("evaluate", ["{results}/digits0-4/a/best.pt", "--eps", "0.3"], ("chunk", "save")),
    ("transfer", ["{results}/digits0-4/a/best.pt", "--config", str(HERE / "configs/transfer/digits5-9.yaml"),
                  *SHORT[2:6], *SHORT[8:], "--run", "t"], ("epoch", "chunk", "save"))]


def run_stage(folder, stage, argv, phase="none", moment=0):
    """Runs a stage under KILLER. Returns the finished process and the text of its marker: where it died."""
    argv, marker = [word.replace("{results}", str(folder)) for word in argv], folder / "marker"
    if stage != "evaluate":
        argv += ["--results", str(folder), "--amp", os.environ.get("KILLS_AMP", "off")]
    marker.write_text("")
    done = subprocess.run([sys.executable, "-c", KILLER, marker, phase, str(moment), stage, *argv], text=True,
                          capture_output=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(HERE)})
    return done, marker.read_text()


def contents(folder):
    """All that a chain of stages wrote, without times and with tensors as bytes: {path: content}."""
    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k != "seconds"}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value
    read = {".json": lambda p: json.loads(p.read_text()), ".pt": lambda p: torch.load(p, weights_only=True),
            ".jsonl": lambda p: [json.loads(line) for line in p.read_text().splitlines()]}
    return {p.relative_to(folder).as_posix(): plain(read[p.suffix](p))
            for p in folder.rglob("*") if p.suffix in read}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """What CHAIN writes when nothing kills it, and how many moments each phase of each stage has."""
    folder, moments = tmp_path_factory.mktemp("whole"), {}
    for stage, argv, _ in CHAIN:
        done, _ = run_stage(folder, stage, argv)
        assert done.returncode == 0, done.stderr
        moments[stage] = json.loads(done.stdout.rsplit("SEEN", 1)[1])
    return contents(folder), moments
