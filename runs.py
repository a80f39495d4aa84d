"""The folders of runs: their names, locks, atomic files and checkpoints, and how a stopped run goes on.

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

from common import UserError, barrier, from_process_0, process_index, say

LOCKS = {}  # {folder: lock file} of the runs that this process is making
# Attributes of args that say where a run is made and how fast, not what it is.
NOT_IDENTITY = {"base", "typed", "config", "device", "threads", "amp", "compile", "workers", "data_dir",
                "results", "run", "force"}
CHECKPOINT_KEYS = ("model", "arch", "head", "classes", "args", "fingerprint", "A_classes", "epoch")


def identity(args):
    """The flags that make a run what it is: {dest: value} of plain types."""
    return {k: v for k, v in sorted(vars(args).items()) if k not in NOT_IDENTITY}


def run_folder(args, lead, named, done="result.json"):
    """The folder results/<dataset>/<name> of a run, and whether it is finished (has the file `done`).

    The name consists of the words in `lead`, of every flag that differs from the config and is not in `named`
    (those that `lead` speaks of), and of the seed. Raises UserError if the folder was made with other flags.
    """
    words = [str(word) for word in lead]
    for dest, value in identity(args).items():
        if dest not in {*named, "seed", "dataset", "checkpoint"} and value != args.base.get(dest):
            text = "+".join(map(str, value)) if isinstance(value, list) else value
            words.append(f"{dest.replace('_', '-')}={text}")
    plain = "-".join(words)
    name = re.sub(r"[^A-Za-z0-9_.+=-]+", "_", plain)
    if name != plain or len(name) > 180:  # names stay distinct, and below a file system's 255 letters
        name = f"{name[:160]}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"
    folder = args.results / args.dataset / (args.run or f"{name}-seed{args.seed}")
    check_folder(folder, args)
    return folder, not args.force and (folder / done).exists()


def check_folder(folder, args):
    """UserError if the run's folder was made with other flags, unless --force."""
    if not args.force and (folder / "args.json").exists():
        check_flags(folder, read_json(folder / "args.json", ("dataset",)), args)


def check_flags(path, stored, args):
    """UserError if `path` was made with other flags: `stored` is the identity() of its run."""
    here = json.loads(json.dumps(identity(args)))
    differ = [k for k in sorted({*stored, *here}) if stored.get(k) != here.get(k)]
    if differ:
        text = "; ".join(f"{k}: {stored.get(k)!r} there, {here.get(k)!r} now" for k in differ)
        raise UserError(f"{path} was made with other flags ({text}): name this run with --run, or --force")


def check_fingerprint(data, stored, path):
    """UserError unless `stored`, the fingerprint in the file `path`, is that of `data`."""
    differ = [f"{k}: {stored.get(k)} there, {v} here" for k, v in data.fingerprint().items()
              if stored.get(k) != v]
    if differ:
        raise UserError(f"{path} belongs to other data ({'; '.join(differ)[:300]}): make it again from this "
                        "data, or find its data")


def start_run(folder, args, done="result.json"):
    """Locks the run's folder and makes it, with args.json, in process 0. Waits while another process makes
    the same run. Returns whether that process has finished it.

    With --force an earlier run is kept as .old-<run> until end_run: a repeat that fails loses nothing.
    """
    finished = False
    if process_index() == 0:
        lock_run(folder)
        check_folder(folder, args)
        finished = (folder / done).exists() and not args.force
        if finished:
            unlock_run(folder)
        else:
            if (folder / done).exists():
                old = folder.with_name(f".old-{folder.name}")
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
            elif args.force and folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("*.part"):  # of a killed process
                path.unlink(missing_ok=True)
            write_json(folder / "args.json", identity(args))
    return from_process_0(finished)


def end_run(folder):
    """Deletes the earlier run that start_run kept and unlocks the folder, in process 0: the run is whole."""
    if process_index() == 0:
        shutil.rmtree(folder.with_name(f".old-{folder.name}"), ignore_errors=True)
        unlock_run(folder)


def lock_run(folder):
    """Locks a run until unlock_run or the end of this process, so that two equal commands do not both write
    to it. Waits for another process that has it. The lock is outside the folder, which --force moves."""
    path = folder.parents[1] / ".locks" / f"{folder.parent.name}-{folder.name}"
    if folder in LOCKS:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = LOCKS[folder] = open(path, "w")  # closed, and so unlocked, with the process
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; name another folder with --results") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"{folder} is being made by another process: waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)


def unlock_run(folder):
    """Releases the lock of a run."""
    lock = LOCKS.pop(folder)
    fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough while a loader process has the file, too
    lock.close()


def resume(folder, args, data, keys=()):
    """The content of last.pt, from which a stopped run goes on; None if there is none. Raises UserError if it
    belongs to other data or other flags."""
    path = folder / "last.pt"
    if not path.exists():
        return None
    state = load(path, ("args", "fingerprint", "epoch", "optimizer", "log", *keys))
    check_fingerprint(data, state["fingerprint"], path)
    check_flags(path, state["args"], args)
    say(f"going on after epoch {state['epoch']} of {path}")
    return state


def remove(folder):
    """Deletes a folder, in process 0, when all processes are through with it."""
    barrier()
    if process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)


def atomic(path, write):
    """Calls write(file) on a temporary file beside `path`, syncs it to disk and puts it in the place of
    `path`. UserError if that fails."""
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
            reason = getattr(e, "strerror", None) or getattr(e.__context__, "strerror", None)
            reason = reason or " ".join(str(e).split())[:100]
            raise UserError(f"cannot write {path}: {reason} (finished work is kept: fix it and start "
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
    return require(value, keys, path)


def save(path, value):
    """torch.save of plain types and tensors, atomically."""
    import torch
    atomic(path, lambda f: torch.save(value, f))


def save_epoch(folder, state):
    """Saves an epoch: last.pt, from which the run goes on, and its "log" as log.jsonl, one line per epoch."""
    lines = "".join(json.dumps(row) + "\n" for row in state["log"])
    atomic(folder / "log.jsonl", lambda f: f.write(lines.encode()))
    save(folder / "last.pt", state)


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
    return require(value, keys, path)


def require(value, keys, path):
    """The content `value` of the file `path`. UserError if it is not a dict with `keys`."""
    missing = [k for k in keys if not isinstance(value, dict) or k not in value]
    if missing:
        raise UserError(f"{path} is not a file of this kind: it lacks {', '.join(missing)}; --force makes its "
                        "run again")
    return value


def checkpoint(model, data, args, epoch, A_classes=None, **more):
    """The content of a checkpoint: the weights, and all that is needed to use them without the configs."""
    return {"model": model.state_dict(), "arch": args.arch, "head": "mlp" if model.frozen else "linear",
            "classes": data.classes, "fingerprint": data.fingerprint(), "args": identity(args),
            "epoch": epoch, "A_classes": A_classes, **more}


def read_checkpoint(path):
    """The content of a checkpoint, checked as far as that goes without building the network. Raises UserError
    for a foreign file."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the checkpoint in it, say {path / 'best.pt'}")
    ckpt = load(path, CHECKPOINT_KEYS)
    args, classes, A_classes = ckpt["args"], ckpt["classes"], ckpt["A_classes"]
    if not (isinstance(args, dict) and {"dataset", "side"} <= set(args)
            and isinstance(ckpt["fingerprint"], dict)
            and isinstance(classes, list) and all(isinstance(c, str) for c in classes)
            and isinstance(ckpt["epoch"], int)
            and (A_classes is None or isinstance(A_classes, list) and set(A_classes) <= set(classes))
            and isinstance(ckpt["model"], dict)):
        raise UserError(f"{path} is not a checkpoint of this project: its args, classes or fingerprint are "
                        "not as sat.py writes them")
    return ckpt
