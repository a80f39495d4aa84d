"""Makes every run of the paper's figures, then the report. Finished runs are skipped: it can be stopped at
any time and started again.

    ./run_all.sh digits                    each figure in small, on the embedded data, on a CPU
    ./run_all.sh cifar10-cpu               the paper's claims on all of CIFAR-10 and -100, at a size for a CPU
    ./run_all.sh cifar10 fig2 fig6         some figures of a section, at the paper's settings
    JOBS=4 ./run_all.sh cifar10            four runs at once, spread over the machine's GPUs, or its cores
    ./run_all.sh --dry-run all             print every command, the runs of each figure and their cost

Sections: cifar10 cifar100 imagenet200 transfer cifar10-cpu digits, or all. Environment: RESULTS and DATA
(folders), PYTHON, JOBS (runs at once; their output is in RESULTS/logs), NPROC (GPUs or processes of a run),
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
# glibc keeps freed memory. Else it gives that of each large tensor back to the kernel, which has to zero it
# page by page for the next one: a sixth of the time of a training step of PreActResNet-8 on a CPU.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
GPU_FILES = "/dev/nvidia[0-9]*"
STOPPED = (130, 143, -2, -15)  # exit codes of a stage that Ctrl-C or SIGTERM has ended
LOOK = 2  # seconds between looks for what other copies have finished or given up


class Job:
    """A stage that this copy makes: a process that writes the stage's log and holds the lock on it. The
    kernel drops the lock when the last process that holds it ends, the stage's own included: the run of a
    copy that was killed is neither lost nor made twice."""

    def __init__(self, stage, command, log, environment):
        self.stage, self.command, self.log, self.start_time = stage, command, log, time.monotonic()
        self.n_shown = os.fstat(log.fileno()).st_size
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, env=environment,
                                        stderr=subprocess.STDOUT, pass_fds=[log.fileno()])

    def show(self):
        """Prints what is new in the log."""
        while text := os.pread(self.log.fileno(), 2**16, self.n_shown):
            self.n_shown += len(text)
            sys.stdout.buffer.write(text)
            sys.stdout.flush()

    def seconds(self):
        """How long it has been running."""
        return time.monotonic() - self.start_time


class Display:
    """What people see: the output of the stages if one is made at a time, else one line about all of them,
    rewritten in place on a terminal and printed when its numbers change elsewhere.

    stages: those that are not finished. n_done: how many are. n_slots: how many are made at once."""

    def __init__(self, stages, n_done, n_slots):
        unit = "passes" if any(None in stage.cost.hours for stage in stages) else "hours"
        self.work = {stage.folder: sum(getattr(stage.cost, unit)) for stage in stages}
        self.n_stages, self.n_slots, self.start_time = len(stages) + n_done, n_slots, time.monotonic()
        self.line, self.n_failed, self.work_here, self.seconds_here = "", 0, 0, 0

    def started(self, job):
        """Shows the command of a job."""
        if self.n_slots == 1:
            print(f"\n> {shlex.join(job.command)}", flush=True)

    def ended(self, job, code):
        """Counts a job that has ended, and says that it failed. code: its exit code."""
        if self.n_slots == 1:
            job.show()
        elif code:
            clear_line = "\r\x1b[K" if sys.stdout.isatty() else ""
            print(f"{clear_line}{job.stage.folder} failed (exit code {code}): see {job.log.name}", flush=True)
        if code:
            self.n_failed += 1
            self.work[job.stage.folder] = 0  # none was done
        else:
            self.work_here += self.work[job.stage.folder]
            self.seconds_here += job.seconds()

    def update(self, left, jobs):
        """Shows how the jobs go on. left: the stages that are not started, by folder."""
        if self.n_slots == 1:
            for job in jobs:
                job.show()
            return
        n_done = self.n_stages - len(left) - len(jobs) - self.n_failed
        line = f"{n_done} done, {len(jobs)} running, {len(left)} left"
        line += f", {self.n_failed} failed" if self.n_failed else ""
        if sys.stdout.isatty():
            print(f"\r{line}{self.time_left(left, jobs)}\x1b[K", end="", flush=True)
        elif line != self.line:
            print(f"{line}{self.time_left(left, jobs)}", flush=True)
        self.line = line

    def time_left(self, left, jobs):
        """The time that remains, as text: by the time of this copy's stages or, where several copies are
        faster, by what all have finished since the start. Empty while no stage has been finished."""
        if not self.work_here:
            return ""
        slot_speed = self.work_here / self.seconds_here
        not_done = [*left, *(job.stage.folder for job in jobs)]
        work_done = sum(self.work.values()) - sum(self.work[folder] for folder in not_done)
        speed = max(slot_speed * self.n_slots, work_done / (time.monotonic() - self.start_time))
        work = sum(self.work[folder] for folder in left)
        work += sum(max(self.work[job.stage.folder] - slot_speed * job.seconds(), 0) for job in jobs)
        return f"; about {common.duration(work / speed)} to go"


def stage_is_finished(stage):
    """Whether a stage has been made."""
    return Path(stage.folder, stage.final_file).exists()


def start_next(left, ended, results, environment):
    """Starts the first stage that can be made now. Returns its Job, or None if there is no such stage. Takes
    it, and what other copies have finished, out of `left`, {folder: (stage, command)}. ended: the folders of
    the stages that are finished, or that failed here."""
    for folder, (stage, command) in list(left.items()):
        if stage_is_finished(stage):
            ended.add(folder)
            del left[folder]
        elif not stage.needs or stage.needs in ended:
            name = os.path.relpath(folder, results).replace("/", "_")
            log = open(Path(results, "logs", f"{name}.log"), "ab+")
            try:
                lock_exclusively(log, fcntl.LOCK_NB)
                if not stage_is_finished(stage):  # in the meantime
                    del left[folder]
                    return Job(stage, command, log, environment)
            except BlockingIOError:
                pass  # another copy makes it
            log.close()
    return None


def make_all(todo, results, environments):
    """Makes the stages {folder: (stage, command)}: as many at once as there are environments, in this order,
    except that those that have to wait for another one, here or in another copy, are put off."""
    left = {folder: item for folder, item in todo.items() if not stage_is_finished(item[0])}
    ended, jobs, next_look = todo.keys() - left.keys(), {}, 0  # jobs: {index of the environment: Job}
    display = Display([stage for stage, _ in left.values()], len(ended), len(environments))
    try:
        while left or jobs:
            for slot, job in list(jobs.items()):
                code = job.process.poll()
                if code in STOPPED:
                    raise KeyboardInterrupt(signal.SIGINT)
                if code is not None:
                    display.ended(job, code)
                    ended.add(job.stage.folder)
                    jobs.pop(slot).log.close()
                    next_look = 0
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + LOOK
                for slot in range(len(environments)):
                    if slot not in jobs and (job := start_next(left, ended, results, environments[slot])):
                        jobs[slot] = job
                        display.started(job)
            display.update(left, jobs.values())
            time.sleep(0.1)
    finally:
        if sys.stdout.isatty() and len(environments) > 1:
            print()
        stop(jobs.values())
        if len(environments) == 1:
            display.update(left, jobs.values())


def stop(jobs):
    """Ends the jobs, which can be resumed. Ctrl-C and a cluster's signals reach them too. Only those
    that still run after 5 seconds get SIGTERM, as a second signal would interrupt a clean end."""
    deadline = time.monotonic() + 5
    while any(job.process.poll() is None for job in jobs) and time.monotonic() < deadline:
        time.sleep(0.1)
    for job in jobs:
        if job.process.poll() is None:
            job.process.terminate()
    for job in jobs:
        job.process.wait()


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
        raise UserError(f"EXTRA: {forbidden[0]} differs between the runs, so run_all.sh sets it")
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
    missing = [folder for folder, (stage, _) in todo.items() if not stage_is_finished(stage)]
    if missing:
        sys.exit("\n  ".join([f"\n{len(missing)} missing (see their logs):", *missing]))
    sys.exit(code)


if __name__ == "__main__":
    common.script(main)
