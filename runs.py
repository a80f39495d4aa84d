"""The folders of runs: their names, locks, atomic files, checkpoints, and how a stopped run is resumed.

It imports torch only where it reads or writes tensors.
"""
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from common import UserError, barrier, process_count, process_index, say

LOCKS = {}  # {path: file} of the runs that this process makes
# Flags that say where a run is made and how fast, not what it is.
NOT_IDENTITY = {"config", "device", "threads", "amp", "compile", "workers", "data_dir", "results", "run",
                "force", "own_scores"}


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
        if process_count() > 1:
            raise UserError(f"{folder} is being made by another process: wait for it, or name this run with "
                            "--run") from None
        say(f"{folder} is being made by another process: waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)


def start_run(folder, args, done="result.json"):
    """Locks and makes the run's folder with its args.json, on rank 0. Returns whether another process has
    finished the run meanwhile.

    With --force an earlier run is kept as .old-<run> until end_run: a repeat that fails loses nothing.
    """
    if process_index() == 0:
        lock_run(folder)
        check_flags(folder, args)
        if (folder / done).exists() and not args.force:
            if process_count() > 1:  # the other processes are past this question
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
    if process_index() == 0:
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
