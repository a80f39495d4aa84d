"""What the scripts share besides mathematics: run folders and their locks, atomic files, torchrun, errors."""
import contextlib
import ctypes
import datetime
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path


def quiet(kind, value, trace, before=sys.excepthook):
    """An excepthook of the scripts: Ctrl-C while they are still importing ends in one line."""
    if kind is KeyboardInterrupt:
        print("stopped before anything was done", file=sys.stderr)
    else:
        before(kind, value, trace)


HERE = Path(__file__).resolve().parent
SCRIPT = Path(sys.argv[0]).resolve()
if SCRIPT.parent == HERE and SCRIPT.is_file():  # not in other people's programs
    sys.excepthook = quiet
LOCKS = {}  # {path: file} of the runs that this process makes
# Flags that say where a run is made and how fast, not what it is.
NOT_IDENTITY = {"config", "device", "threads", "amp", "compile", "workers", "data_dir", "results", "run",
                "force", "own_scores"}


class UserError(ValueError):
    """A mistake that the user can mend: the scripts print it as one line and exit with 2. For code that
    imports them it is a ValueError."""


def identity(args):
    """The flags that make a run what it is: {dest: value} of plain types."""
    return {k: v for k, v in sorted(vars(args).items()) if k != "base" and k not in NOT_IDENTITY}


def run_dir(args, lead, told, done="result.json"):
    """The folder results/<dataset>/<name> of a run, and whether it is finished (has the file `done`).

    The name consists of the words in `lead`, of every flag that differs from the config and is not in `told`
    (those that `lead` speaks of), and of the seed. Raises UserError if the folder was made with other flags.
    """
    text = lambda v: "+".join(map(str, v)) if isinstance(v, list) else v
    extra = [f"{k.replace('_', '-')}={text(v)}" for k, v in identity(args).items()
             if k not in {*told, "seed", "dataset", "checkpoint"} and v != args.base.get(k)]
    plain = "-".join([*map(str, lead), *extra])
    name = re.sub(r"[^A-Za-z0-9_.+=-]+", "_", plain)
    if name != plain or len(name) > 180:  # names stay distinct, and below a file system's 255 letters
        name = f"{name[:160]}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"
    folder = args.results / args.dataset / (args.run or f"{name}-seed{args.seed}")
    check_flags(folder, args)
    return folder, not args.force and (folder / done).exists()


def check_flags(folder, args):
    """UserError for a run's folder that was made with other flags, unless --force."""
    if not args.force and (folder / "args.json").exists():
        if differ := differing(read_json(folder / "args.json", ("dataset",)), identity(args)):
            raise UserError(f"{folder} was made with other flags ({differ}): name this run with --run, or "
                            "--force")


def differing(there, now):
    """The flags in which the identities of two runs differ, as text."""
    now = json.loads(json.dumps(now))
    differ = [k for k in sorted({*there, *now}) if there.get(k) != now.get(k)]
    return "; ".join(f"{k}: {there.get(k)!r} there, {now.get(k)!r} now" for k in differ)


def lock_run(folder):
    """Locks a run's folder for as long as this process lives, so that two equal commands do not both write
    to it. Waits for another process that has it; under torchrun that is a UserError."""
    path = folder.parents[1] / ".locks" / f"{folder.parent.name}-{folder.name}"
    if path in LOCKS:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = LOCKS[path] = open(path, "w")  # closed, and so unlocked, with the process
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; name another folder with --results") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if world() > 1:
            raise UserError(f"{folder} is being made by another process: wait for it, or name this run with "
                            "--run") from None
        say(f"{folder} is being made by another process: waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)


def start_run(folder, args, done="result.json"):
    """Locks and makes the run's folder with its args.json, on rank 0. Returns whether another process has
    finished the run meanwhile.

    With --force an earlier run is kept as .old-<run> until end_run: a repeat that fails loses nothing.
    """
    if rank() == 0:
        lock_run(folder)
        check_flags(folder, args)
        if (folder / done).exists() and not args.force:
            if world() > 1:  # the other processes are past this question
                raise UserError(f"{folder} was finished by another process meanwhile: give the command again")
            return True
        old = folder.with_name(f".old-{folder.name}")
        if (folder / done).exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        elif args.force and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.part"):  # of a killed process
            path.unlink(missing_ok=True)
        write_json(folder / "args.json", identity(args))
    barrier()
    return False


def end_run(folder):
    """Deletes the earlier run that start_run kept, on rank 0: the new one is whole."""
    if rank() == 0:
        shutil.rmtree(folder.with_name(f".old-{folder.name}"), ignore_errors=True)


def atomic(path, write):
    """Calls write(file) on a temporary file beside `path`, syncs it to disk and puts it in the place of
    `path`."""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(e, (OSError, RuntimeError)):  # torch.save turns the first into the second
            named = getattr(e, "strerror", None) or getattr(e.__context__, "strerror", None)
            why = named or " ".join(str(e).split())[:100]
            raise UserError(f"cannot write {path}: {why} (finished work is kept: mend it and start "
                            "again)") from None
        raise


def write_json(path, value):
    """Writes plain types as indented JSON, atomically."""
    atomic(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))


def read_json(path, keys=()):
    """Reads a JSON file. Raises UserError if it is none, or not a dict with `keys`."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {e}") from None
    missing = [k for k in keys if not isinstance(value, dict) or k not in value]
    if missing:
        raise UserError(f"{path} is not a file of this kind: it lacks {', '.join(missing)}; --force makes "
                        "its run again")
    return value


def save(path, value):
    """torch.save of plain types and tensors, atomically."""
    import torch
    atomic(path, lambda f: torch.save(value, f))


def save_epoch(run, checkpoint):
    """Keeps an epoch: last.pt, from which the run goes on, and its "log" as log.jsonl, a line an epoch."""
    lines = "".join(json.dumps(row) + "\n" for row in checkpoint["log"])
    atomic(run / "log.jsonl", lambda f: f.write(lines.encode()))
    save(run / "last.pt", checkpoint)


def load(path, keys=()):
    """torch.load of plain types and tensors (weights_only, on the CPU). Raises UserError for a file that is
    missing, truncated, foreign, or not a dict with `keys`."""
    import torch
    try:
        value = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception as e:  # torch raises many kinds on a truncated or foreign file
        raise UserError(f"{path} is truncated or not a file of this project ({type(e).__name__}): check the "
                        "path, or make the file again, of plain types and torch tensors") from None
    missing = [k for k in keys if not isinstance(value, dict) or k not in value]
    if missing:
        raise UserError(f"{path} is not a file of this kind: it lacks {', '.join(missing)}")
    return value


def rank():
    """This process's number under torchrun, 0 without."""
    return int(os.environ.get("RANK", 0))


def world():
    """The number of processes under torchrun, 1 without."""
    return int(os.environ.get("WORLD_SIZE", 1))


def barrier():
    """Waits for all processes."""
    if world() > 1:
        import torch.distributed as dist
        if dist.is_initialized():
            dist.barrier()


def all_sum(tensor, op="SUM"):
    """Sums a tensor over the processes (or op="MIN"), in place, and returns it."""
    if world() > 1:
        import torch.distributed as dist
        dist.all_reduce(tensor, getattr(dist.ReduceOp, op))
    return tensor


def keep_memory():
    """Lets glibc keep freed memory. Else it gives that of each large tensor back to the kernel, which has to
    zero it page by page for the next one: a tenth of the time of a training step of PreActResNet-8."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large tensors lie in the heap, too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def set_up(args):
    """Sets the device, the threads and, under torchrun, the process group (nccl on GPUs, gloo on CPUs).
    Returns the device."""
    import torch
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    kind = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    device = torch.device("cpu")
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"{device.index + 1} processes on this machine and {torch.cuda.device_count()} "
                            "GPUs: start one a GPU, or --device cpu")
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32: robust accuracies are reported in it
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    if kind == "cuda":  # Triton compiles C
        compilers = [os.environ.get("CC", "gcc"), "clang"]
    if getattr(args, "compile", False) and not any(map(shutil.which, compilers)):
        raise UserError(f"--compile needs a compiler ({' or '.join(compilers)}), and there is none here: "
                        "install one, or give --no-compile")
    if kind == "cpu":
        keep_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    if world() > 1 and not torch.distributed.is_initialized():
        # The others wait while rank 0 downloads data, and for the slowest chunk of AutoAttack: hours.
        how = {"backend": "nccl", "device_id": device} if kind == "cuda" else {"backend": "gloo"}
        torch.distributed.init_process_group(**how, timeout=datetime.timedelta(hours=12))
    return device


def device_name(device):
    """The device's name, as results give it. On a CPU its vector instructions, on which rounding depends."""
    import torch
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"


def remove(folder):
    """Deletes a folder, on rank 0 and when all processes are through."""
    barrier()
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)


def say(text):
    """Prints a line, only on rank 0."""
    if rank() == 0:
        print(text, flush=True)


def progress(steps, **how):
    """A tqdm bar over `steps`, shown on rank 0 when stderr is a terminal."""
    from tqdm import tqdm
    terminal = sys.stderr and sys.stderr.isatty()
    return tqdm(steps, disable=rank() != 0 or not terminal, leave=False, dynamic_ncols=True, **how)


class Stopped(KeyboardInterrupt):
    """Raised by SIGTERM and Ctrl-C. Its argument is the signal's number."""


def stop(number, frame):
    """A signal handler that raises Stopped."""
    raise Stopped(number)


def outcome(main):
    """Runs main() and returns the exit code. A user's mistake (2), a signal (128 + its number) and a lost
    process (1) end in one line on stderr."""
    who = f"[rank {rank()}] " if rank() else ""
    try:
        main()
        barrier()
        return 0
    except (UserError, OSError) as e:
        if rank():  # a mistake that all processes find is told by rank 0; torchrun then ends the others
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        print(f"error: {who}{e}", file=sys.stderr)
        return 2
    except Stopped as e:
        if rank() == 0:
            print("stopped: the same command, without --force, goes on from the last whole epoch or "
                  "AutoAttack chunk", file=sys.stderr)
        return 128 + e.args[0]
    except RuntimeError as e:
        lost = ("gloo", "NCCL", "Connection closed", "Connection reset")
        if world() == 1 or not any(word in str(e) for word in lost):
            raise
        why = " ".join(str(e).split())[:100]
        print(f"error: {who}another process of this run is gone, or was never reached ({why}); the same "
              "command goes on from the last whole epoch", file=sys.stderr)
        return 1


def script(main):
    """Runs a script's main() and exits with its outcome()."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    code = outcome(main)
    if world() > 1:  # at once: gloo's threads now and then abort a process while Python shuts down
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)
