"""What the scripts share besides mathematics: processes (torchrun), the device, progress, signals, errors."""
import datetime
import json
import os
import shutil
import signal
import sys
import sysconfig
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


class UserError(ValueError):
    """A mistake that the user can fix: the scripts print it as one line and exit with 2."""


def process_index():
    """This process's number under torchrun, 0 without."""
    return int(os.environ.get("RANK", 0))


def process_count():
    """The number of processes under torchrun, 1 without."""
    return int(os.environ.get("WORLD_SIZE", 1))


def barrier():
    """Waits for all processes."""
    if process_count() > 1:
        import torch.distributed as dist
        if dist.is_initialized():
            dist.barrier()


def all_reduce(tensor):
    """The sum of a tensor over the processes, in place. Returns it."""
    if process_count() > 1:
        import torch.distributed as dist
        dist.all_reduce(tensor)
    return tensor


def all_texts(texts):
    """The distinct texts of all processes, sorted."""
    lists = [texts]
    if process_count() > 1:
        import torch.distributed as dist
        lists = [None] * process_count()
        dist.all_gather_object(lists, texts)
    return sorted(set(sum(lists, [])))


def from_process_0(value):
    """Process 0's value, in all processes: they must agree on what to do next."""
    values = [value]
    if process_count() > 1:
        import torch.distributed as dist
        dist.broadcast_object_list(values, 0)
    return values[0]


def check_environment():
    """UserError if torchrun's variables are incomplete, unless they say that there is one process: variables
    left in a shell by a finished job would make a script wait for processes that do not exist."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = {name: os.environ[name] for name in names if name in os.environ}
    alone = values.get("RANK", "0") == "0" and values.get("WORLD_SIZE", "1") == "1"
    numbers = (values.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    complete = len(values) == len(names) and all(number.isdecimal() for number in numbers)
    if not alone and not (complete and int(values["RANK"]) < int(values["WORLD_SIZE"])):
        for name in values:
            del os.environ[name]  # this process is alone
        text = ", ".join(f"{name}={values[name]}" if name in values else f"no {name}" for name in names)
        raise UserError(f"the environment has {text}, which is not what torchrun sets: start with torchrun, "
                        f"or unset {' '.join(values)}")


def can_compile(device):
    """Whether torch.compile finds Python.h and a compiler: of C for a GPU (Triton), of C++ for a CPU."""
    if device.type == "cuda":
        compilers = [os.environ.get("CC", "gcc"), "clang"]
    else:
        compilers = [os.environ.get("CXX", "g++"), "clang++"]
    return any(map(shutil.which, compilers)) and Path(sysconfig.get_path("include"), "Python.h").exists()


def set_up(args):
    """Sets the device, the threads and, under torchrun, the process group. Returns the device."""
    import torch
    default = torch.tensor(0.0)
    if (default.dtype, default.device.type) != (torch.float32, "cpu"):
        raise UserError(f"torch makes {default.dtype} on {default.device} here; valid: float32 on the CPU, "
                        "by torch.set_default_dtype(torch.float32) and torch.set_default_device('cpu')")
    if not torch.is_grad_enabled():
        raise UserError("torch computes no gradients here: train outside of torch.no_grad() and "
                        "torch.inference_mode(), or call torch.set_grad_enabled(True)")
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    if args.device == "cuda" and not on_gpu:
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if process_count() > 1 else 0)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"{device.index + 1} processes on this machine and {torch.cuda.device_count()} "
                            "GPUs: start one per GPU, or give --device cpu")
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32: robust accuracies are reported in it
    if getattr(args, "compile", "off") in ("on", "step") and not can_compile(device):
        raise UserError(f"--compile {args.compile} needs a compiler (gcc, g++ or clang) and Python.h: "
                        "install them, or give --compile off")
    if args.threads:
        torch.set_num_threads(args.threads)
    if process_count() > 1 and not torch.distributed.is_initialized():
        # The others wait while process 0 downloads data, and for the slowest chunk of AutoAttack: hours.
        backend = {"backend": "nccl", "device_id": device} if on_gpu else {"backend": "gloo"}
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            say(f"waiting for {process_count()} processes (WORLD_SIZE is set in the environment)")
        handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python handles none while it waits
        torch.distributed.init_process_group(**backend, timeout=datetime.timedelta(hours=12))
        signal.signal(signal.SIGINT, handler)
    return device


def device_name(device):
    """The device's name, as results give it. On a CPU its vector instructions and threads, on which rounding
    depends."""
    import torch
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"


def say(text, file=None):
    """Prints a line, in process 0 only."""
    if process_index() == 0:
        print(text, file=file, flush=True)


def duration(seconds):
    """A time for people: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def progress(iterable, **options):
    """A tqdm bar over an iterable, which process 0 shows on a terminal. `options`: tqdm's own arguments."""
    from tqdm import tqdm
    return tqdm(iterable, disable=process_index() > 0 or None, leave=False, dynamic_ncols=True, **options)


def process_prefix():
    """The prefix of lines that a process other than 0 prints."""
    return f"[process {process_index()}] " if process_index() else ""


def tell_torchrun(text):
    """Makes torchrun, if it is there, end its own report of a failure with `text`."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": text, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": details}}))


def script(main):
    """Runs a script's main(). A user's mistake (exit code 2), a signal (128 + its number) and a lost process
    (1) end in one line on stderr."""
    def stop(signal_number, frame):
        """Handles a signal."""
        raise KeyboardInterrupt(signal_number)
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, stop)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed (2>&-): tqdm would fail, and a file get its descriptor
            setattr(sys, name, open(os.devnull, "w"))
    sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal's encoding lacks
    code = 0
    try:
        check_environment()
        main()
        barrier()
    except BrokenPipeError:  # the reader of the output has ended, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except (UserError, OSError) as e:
        if process_index():  # process 0 prints a mistake that all of them find; torchrun then ends the others
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        print(f"error: {process_prefix()}{e}", file=sys.stderr)
        tell_torchrun(f"error: {e}")
        code = 2
    except KeyboardInterrupt as e:
        say("stopped: repeat the command to resume from the last saved epoch or AutoAttack chunk (without "
            "--force, if it trains)", sys.stderr)
        code = 128 + e.args[0]
    except RuntimeError as e:
        if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = " ".join(str(e).split())[:200]
            sys.exit(f"error: torch.compile failed ({reason}): give --compile off")
        if type(e).__name__ == "OutOfMemoryError" or "CUDA error: out of memory" in str(e):
            sys.exit(f"error: {process_prefix()}the GPU's memory is full: free some, or lower --batch-size "
                     "(training) or --eval-batch (AutoAttack)")
        signs_of_loss = ["DataLoader worker"]
        advice = "repeat the command to resume"
        if "DataLoader worker" in str(e):
            advice += ", with --workers 0 if this happens again"
        if process_count() > 1:
            signs_of_loss += ["gloo", "remote process exit", "Connection closed", "Connection reset"]
        if not any(word in str(e) for word in signs_of_loss):
            raise
        reason = " ".join(str(e).split())[:100]
        print(f"error: {process_prefix()}another process is gone ({reason}); {advice}", file=sys.stderr)
        code = 1
    if process_count() > 1:  # at once: gloo's threads now and then abort a process while Python shuts down
        sys.stdout.flush()
        os._exit(code)
    if code:
        sys.exit(code)
