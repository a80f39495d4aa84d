"""Makes every run of the paper's figures, then the report. Finished runs are skipped: it can be stopped at
any time and started again.

    ./run_all.sh digits                    each figure in small, on the embedded data, on a CPU
    ./run_all.sh cifar10-cpu               the paper's claims on all of CIFAR-10 and -100, at a size for a CPU
    ./run_all.sh cifar10 fig2 fig6         some figures of a section, at the paper's settings
    JOBS=4 ./run_all.sh cifar10            four runs at once, spread over the machine's GPUs, or its cores
    ./run_all.sh --dry-run all             print every command, the runs of each figure and their cost

Sections: cifar10 cifar100 imagenet200 transfer cifar10-cpu digits, or all. Environment: RESULTS and DATA
(folders), PYTHON, JOBS (runs at once, with their output in RESULTS/logs), NPROC (GPUs or processes of a run),
EXTRA (flags for all runs, as EXTRA="--epochs 2", but not those by which runs differ). Several copies may
share a results folder, also on several machines if its file system has flock: each run is made once, and a
run whose copy died is taken over.
"""
import fcntl
import glob
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import common
import flags
from common import HERE, UserError
from paper.experiments import FIGURES, SECTIONS, overview, stages
from runs import lock_exclusively

# The flags by which the runs differ, and those with a variable of their own: EXTRA may not have them.
NOT_IN_EXTRA = ("--dataset", "--split", "--frac", "--size", "--classes", "--order", "--metric", "--scores",
                "--ranking", "--subset", "--weight", "--weight-factor", "--attack", "--seed", "--run",
                "--results", "--data-dir")
# Makes glibc keep freed memory. By default it returns a large tensor's memory to the kernel, which must zero
# it page by page for the next one: a sixth of the time of a training step of PreActResNet-8 on a CPU.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
GPU_FILES = "/dev/nvidia[0-9]*"
STOPPED = (130, 143, -2, -15)  # exit codes of a stage that Ctrl-C or SIGTERM has ended
LOOK = 2  # seconds between looks for what other copies have finished or given up


def is_made(folder):
    """Whether the stage that writes this folder is finished, here or in another copy."""
    return Path(folder, "result.json").exists() or Path(folder, "rank.json").exists()


def start_next(left, ended, results, environment, to_log):
    """Starts the first stage that can be made now. Returns (folder, process, log), or None if there is no
    such stage. Removes it from `left`, {folder: (stage, command)}. Stages that another copy has finished, or
    that need a failed one, move from there to `ended`, {folder: exit code}.

    The log is also the stage's lock, which the process holds too: the run of a copy that was killed is
    neither lost nor made twice. to_log: whether the output goes there, or to the terminal."""
    for folder, (stage, command) in list(left.items()):
        if is_made(folder):
            ended[folder] = 0
            del left[folder]
        elif ended.get(stage.needs) and not is_made(stage.needs):
            print(f"{folder} is left out, since {stage.needs} failed", flush=True)
            ended[folder] = 1
            del left[folder]
        elif not stage.needs or stage.needs in ended or is_made(stage.needs):
            name = os.path.relpath(folder, results).replace("/", "_")
            log = open(Path(results, "logs", f"{name}.log"), "ab")
            try:
                lock_exclusively(log, fcntl.LOCK_NB)
                if not is_made(folder):  # in the meantime
                    del left[folder]
                    output = {"stdout": log, "stderr": subprocess.STDOUT} if to_log else {}
                    print(f"> {folder}, see {log.name}" if to_log else f"\n> {shlex.join(command)}",
                          flush=True)
                    return folder, subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment,
                                                    pass_fds=[log.fileno()], **output), log
            except BlockingIOError:
                pass  # another copy makes it
            log.close()
    return None


def make_all(todo, results, environments):
    """Makes the stages {folder: (stage, command)}: as many at once as there are environments, in this order,
    except that those that have to wait for another one, here or in another copy, are put off."""
    left = {folder: item for folder, item in todo.items() if not is_made(folder)}
    unit = "passes" if any(None in stage.cost.hours for stage, _ in left.values()) else "hours"
    work = {folder: sum(getattr(stage.cost, unit)) for folder, (stage, _) in left.items()}
    ended, jobs = dict.fromkeys(todo.keys() - left.keys(), 0), {}  # jobs: {index of the environment: job}
    start_time, next_look, is_waiting = time.monotonic(), 0, False
    try:
        while left or jobs:
            for slot, (folder, process, log) in list(jobs.items()):
                code = process.poll()
                if code in STOPPED:
                    raise KeyboardInterrupt(signal.SIGINT)
                if code is not None:
                    ended[folder] = code
                    jobs.pop(slot)
                    log.close()
                    print(f"{folder} {f'failed (exit code {code})' if code else 'is finished'}; "
                          f"{progress_text(len(todo), ended, work, start_time)}", flush=True)
                    next_look = 0
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + LOOK
                for slot in range(len(environments)):
                    if slot not in jobs and (job := start_next(left, ended, results, environments[slot],
                                                               to_log=len(environments) > 1)):
                        jobs[slot] = job
                if left and not jobs and not is_waiting:
                    print(f"waiting for another run_all.sh, which makes some of the {len(left)} stages left",
                          flush=True)
                is_waiting = not jobs
            time.sleep(0.1)
    finally:
        stop([process for _, process, _ in jobs.values()])


def progress_text(n_stages, ended, work, start_time):
    """How many stages are done, and the time that remains by the work since the start. work: {folder: cost}
    of the stages that were not finished then; ended: {folder: exit code}."""
    n_failed = sum(code != 0 for code in ended.values())
    text = f"{len(ended) - n_failed} of {n_stages} done" + (f", {n_failed} failed" if n_failed else "")
    work_done = sum(cost for folder, cost in work.items() if ended.get(folder) == 0)
    work_left = sum(cost for folder, cost in work.items() if folder not in ended)
    if work_done:
        remaining = common.duration((time.monotonic() - start_time) * work_left / work_done)
        text += f", about {remaining} to go"
    return text


def stop(processes):
    """Ends the stages, which can be resumed. Ctrl-C and a cluster's signals reach them too. Only those
    that still run after 5 seconds get SIGTERM, as a second signal would interrupt a clean end."""
    deadline = time.monotonic() + 5
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        process.wait()


def stage_environments(n, extra_values):
    """The environment variables of the stages, for each of the `n` that are made at once: a GPU of those that
    are visible, or a part of the cores. The user's values win. extra_values: the flag values of EXTRA."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(len(glob.glob(GPU_FILES))))))
    gpus = [gpu for gpu in gpus.split(",") if gpu not in ("", "-1")]
    if not glob.glob(GPU_FILES) or extra_values.get("device") == "cpu":
        gpus = []
    defaults = {} if gpus else dict(KEEP_MEMORY)
    if n > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        defaults["OMP_NUM_THREADS"] = str(max(cores // n, 1))
    environment = defaults | os.environ
    if not gpus or n == 1:
        return [environment] * n
    return [{**environment, "CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} for slot in range(n)]


def command_line(argv):
    """Parses the words of the command line and EXTRA. Returns args with the lists `sections` and `figures`,
    with `extra_words`, those of EXTRA, and `extra_values`, what they give, {dest: value}."""
    parser = flags.Parser(prog="run_all.py", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="a section, or a figure of the sections")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run none")
    args = parser.parse_intermixed_args(argv)
    args.sections = [name for name in SECTIONS if name in args.words or "all" in args.words]
    args.figures = [word for word in args.words if word in FIGURES]
    valid = f"valid: {' '.join(SECTIONS)} all, then {' '.join(FIGURES)}"
    for word in args.words:
        if word not in (*SECTIONS, "all", *FIGURES):
            raise UserError(f"there is no section or figure {word!r}; {valid}")
    if not args.sections:
        raise UserError(f"name a section; {valid}")
    for figure in args.figures:
        its_sections = [name for name, parts in SECTIONS.items()
                        if any(figure in figures.split() for _, _, figures in parts)]
        if not set(its_sections) & set(args.sections):
            raise UserError(f"{' '.join(args.sections)} has no {figure}; it is in: {' '.join(its_sections)}")
    try:
        args.extra_words = shlex.split(os.environ.get("EXTRA", ""))
        parser = flags.script_parser("sat.py", "", flags.DEFAULTS)
        args.extra_values = vars(parser.parse_args(args.extra_words))
    except ValueError as e:  # UserError too
        raise UserError(f"EXTRA: {e}") from None
    if forbidden := [flag for flag in NOT_IN_EXTRA if flags.dest(flag) in args.extra_values]:
        raise UserError(f"EXTRA: {forbidden[0]} differs between the runs or is set by RESULTS/DATA: drop it")
    return args


def stages_to_make(args, all_stages, results, launcher):
    """The stages as {folder: (stage, command)}, each once, in the order in which they are made."""
    todo = {}
    for stage in all_stages:
        words = [*stage.arguments, *flags.only_flags_of(args.extra_words, stage.script)]
        # Without --run, EXTRA would be in the name.
        if stage.script == "sat.py" and "--run" not in words:
            words += ["--run", Path(stage.folder).name]
        words += ["--results", results, "--data-dir", os.environ.get("DATA") or "data"]
        todo.setdefault(stage.folder, (stage, [*launcher, str(HERE / stage.script), *words]))
    return todo


def main(argv=None):
    """Lists the stages, then either prints their commands or makes them and the report."""
    args = command_line(argv)
    results = os.path.expanduser(os.environ.get("RESULTS") or "results")
    python = os.environ.get("PYTHON") or sys.executable
    launcher, nproc, n_jobs = [python], os.environ.get("NPROC") or "1", os.environ.get("JOBS") or "1"
    if not re.fullmatch("[1-9][0-9]*|auto|cpu|gpu", nproc):
        raise UserError(f"NPROC={nproc}: give the number of processes, 1 or more, or auto, cpu or gpu")
    if not re.fullmatch("[1-9][0-9]{0,3}", n_jobs):
        raise UserError(f"JOBS={n_jobs}: give the number of runs at once, from 1 to 9999")
    if nproc != "1":
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", nproc, "--"]
        if n_jobs != "1":
            raise UserError(f"JOBS={n_jobs} and NPROC={nproc}: give one of them (JOBS: several runs at once, "
                            "NPROC: several processes for one run)")
    all_stages = list(stages(args.sections, args.figures, results, args.extra_values))
    todo = stages_to_make(args, all_stages, results, launcher)
    report = [python, str(HERE / "report.py"), "--results", results]
    if args.dry_run:
        commands = [command for _, command in todo.values()]
        print("\n".join([*map(shlex.join, [*commands, report]), *overview(all_stages)]))
        return
    try:
        Path(results, "logs").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{e} (RESULTS=FOLDER names another folder for the results)") from None
    # By training seed, so that a list that is cut short has one seed of everything.
    todo = dict(sorted(todo.items(), key=lambda item: int(re.search(r"-seed(\d+)", Path(item[0]).name)[1])))
    make_all(todo, results, stage_environments(int(n_jobs), args.extra_values))
    code = subprocess.run(report).returncode
    missing = [folder for folder in todo if not is_made(folder)]
    if missing:
        sys.exit("\n  ".join([f"\n{len(missing)} missing:", *missing]))
    sys.exit(code)


if __name__ == "__main__":
    common.script(main)
