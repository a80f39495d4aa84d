"""The folders of runs: their names, locks, atomic files and checkpoints, and how a stopped run goes on. It
imports torch only where it reads or writes tensors."""
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pickle
import re
import shutil
import uuid
from pathlib import Path

from common import UserError, from_process_0, process_index, say

SAVE_SECONDS = 60  # between two saves of a training, whose epoch may take only a second on a GPU
# Attributes of args that say where and how fast a run is made: they change only rounding and random numbers.
NOT_IDENTITY = {"base", "typed", "config", "device", "threads", "amp", "compile", "workers", "data_dir",
                "results", "run", "force"}
# Flags with which a finished run is evaluated again.
EVALUATION = {"eval_attacks", "eval_n", "eval_batch", "eval_precision"}


def identity(args):
    """The flags that make a run and its result what they are: {dest: value} of plain types."""
    return {k: v for k, v in sorted(vars(args).items()) if k not in NOT_IDENTITY}


def run_name(args, first_words, in_first_words):
    """The name of a run: the words in `first_words`, every flag that differs from the config and is not in
    `in_first_words` (the flags that those words speak of), and the seed."""
    words = [str(word) for word in first_words]
    for dest, value in identity(args).items():
        if dest not in {*in_first_words, "seed", "dataset", "checkpoint"} and value != args.base.get(dest):
            value_text = "+".join(map(str, value)) if isinstance(value, list) else value
            words.append(f"{dest.replace('_', '-')}={value_text}")
    full_name = "-".join(words)
    name = re.sub(r"[^A-Za-z0-9_.+=-]+", "_", full_name)
    if name != full_name or len(name) > 180:  # names stay distinct, and below a file system's 255 letters
        name = f"{name[:160]}-{hashlib.sha256(full_name.encode()).hexdigest()[:8]}"
    return f"{name}-seed{args.seed}"


def run_folder(args, first_words, in_first_words):
    """The folder results/<dataset>/<name> of a run, and what is_finished says of it. See run_name."""
    name = args.run or run_name(args, first_words, {*in_first_words, *EVALUATION})
    folder = args.results / args.dataset / name
    return folder, is_finished(folder, args, "result.json")


def stored_flags(folder, final_file):
    """The identity() of the run in a folder, {} if there is none. A published run has no args.json."""
    for name, keys in (("args.json", ("dataset",)), (final_file, ("args",))):
        if (folder / name).exists():
            content = load(folder / name, keys)
            return content if name == "args.json" else content["args"]
    return {}


def is_finished(folder, args, final_file):
    """Whether the run has its `final_file` and is not to be repeated. UserError if the folder has a run,
    finished or begun, by other flags."""
    if args.force:
        return False
    if stored := stored_flags(folder, final_file):
        check_flags(folder, stored, args)
    return (folder / final_file).exists()


def flag_differences(stored, args):
    """The flags in which a run, whose identity() is `stored`, differs from `args`, as texts. Those of its
    evaluation do not count."""
    current = identity(args)
    return [f"{k}: {stored.get(k)!r} there, {current.get(k)!r} now"
            for k in sorted({*stored, *current} - EVALUATION) if stored.get(k) != current.get(k)]


def check_flags(path, stored, args):
    """UserError if `path` was made with other flags: `stored` is the identity() of its run."""
    if differences := flag_differences(stored, args):
        raise UserError(f"{path} was made with other flags ({'; '.join(differences)}): give another "
                        "--run, or --force")


def check_fingerprint(data, stored, path):
    """UserError unless `stored`, the fingerprint in the file `path`, is that of `data`."""
    differences = [f"{k}: {stored.get(k)} there, {v} here" for k, v in data.fingerprint().items()
                   if stored.get(k) != v]
    if differences:
        raise UserError(f"{path} belongs to other data ({'; '.join(differences)[:300]}): make it again "
                        "(a run: --force), or give the data's --data-dir")


def lock_exclusively(file, options=0):
    """Locks an open file. BlockingIOError if another process has the lock and the options are LOCK_NB. On a
    file system without locks, as some networks have, a warning takes the lock's place."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | options)
    except OSError as e:
        if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        say(f"warning: {file.name} cannot be locked ({e.strerror}): do not start the same run twice at once")


@contextlib.contextmanager
def making(folder, args, final_file="result.json"):
    """A context that locks the run's folder and makes it, with args.json, in process 0, after waiting for a
    process that makes the same run. Yields whether the run is finished. With --force the finished run is kept
    as .old-<run> until the body has succeeded."""
    if process_index() > 0:
        yield from_process_0(None)
        return
    old = folder.with_name(f".old-{folder.name}")
    lock = folder.parents[1] / ".locks" / f"{folder.parent.name}-{folder.name}"  # --force moves the folder
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock_file = open(lock, "w")
    except OSError as e:
        raise UserError(f"cannot write {lock}: {e.strerror}; give another --results") from None
    with lock_file:
        try:
            try:
                lock_exclusively(lock_file, fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{folder} is being made by another process: waiting for it")
                lock_exclusively(lock_file)
                args.force &= "force" in args.typed  # else sat.py set it, for a run just repeated
            finished = is_finished(folder, args, final_file)
            if not finished:
                if (folder / final_file).exists():
                    shutil.rmtree(old, ignore_errors=True)
                    folder.rename(old)
                elif args.force and folder.exists():
                    shutil.rmtree(folder)
                folder.mkdir(parents=True, exist_ok=True)
                for temporary in folder.glob("*.part"):  # of a killed process
                    temporary.unlink(missing_ok=True)
                write_json(folder / "args.json", identity(args))
            yield from_process_0(finished)
            for leftover in (old, folder / "chunks"):
                shutil.rmtree(leftover, ignore_errors=True)
        finally:  # closing is not enough while a loader process has the file, too
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock_file, fcntl.LOCK_UN)


def resume(folder, args, data, keys):
    """The content of last.pt, from which a stopped run goes on; None if there is none. UserError if it
    belongs to other data or other flags, or lacks one of `keys`."""
    path = folder / "last.pt"
    if not path.exists():
        return None
    state = load(path, ("args", "fingerprint", "epoch", "optimizer", "log", *keys))
    check_fingerprint(data, state["fingerprint"], path)
    check_flags(path, state["args"], args)
    say(f"going on after epoch {state['epoch']} of {path}")
    return state


def atomic(path, write):
    """Calls write(file) on a temporary file beside `path`, syncs it to disk and puts it in the place of
    `path`. UserError if that fails."""
    temporary = Path(f"{path}.{uuid.uuid4().hex[:12]}.part")  # unique, since machines may share a disk
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save turns the first into the second
        reason = getattr(e, "strerror", None) or getattr(e.__context__, "strerror", None)
        raise UserError(f"cannot write {path}: {reason or ' '.join(str(e).split())[:100]} (finished work is "
                        "kept: fix the cause and start again)") from None
    finally:
        with contextlib.suppress(OSError):  # it is there after a failure; a read-only disk refuses even this
            temporary.unlink()


def write_json(path, value):
    """Writes plain types as indented JSON, atomically."""
    atomic(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))


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
    """The content of a .json file, or of a .pt file of plain types and tensors, on the CPU. UserError for one
    that is missing, truncated, foreign, or not a dict with `keys`."""
    try:
        if Path(path).suffix == ".json":
            value = json.loads(Path(path).read_text(encoding="utf-8"))
        else:
            import torch
            value = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except PermissionError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} is damaged, or holds more than plain types and torch tensors (numpy arrays: "
                        "give torch.from_numpy of them)") from None
    except Exception as e:  # torch raises many kinds on a truncated or foreign file
        raise UserError(f"{path} is truncated or not a file of this project ({type(e).__name__})") from None
    missing = [k for k in keys if not isinstance(value, dict) or k not in value]
    if missing:
        raise UserError(f"{path} is incomplete (it lacks {', '.join(missing)}): make it again")
    return value


def checkpoint(model, data, args, epoch, A_classes=None, **more):
    """The content of a checkpoint: the weights, and all that is needed to use them without the configs."""
    return {"model": model.state_dict(), "arch": args.arch, "head": "mlp" if model.frozen else "linear",
            "classes": data.classes, "fingerprint": data.fingerprint(), "args": identity(args),
            "epoch": epoch, "A_classes": A_classes, **more}
