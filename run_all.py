"""Makes every run of the paper's figures, then the report. Finished runs are skipped: it can be stopped at
any time and started again.

    ./run_all.sh digits                    each figure in small, on the embedded data, on a CPU
    ./run_all.sh cifar10-cpu               the paper's claims on all of CIFAR-10 and -100, at a size for a CPU
    ./run_all.sh cifar10 fig2 fig6         some figures of a section, at the paper's settings
    ./run_all.sh --dry-run all             print every command, the runs of each figure and their cost

Sections: cifar10 cifar100 imagenet200 transfer cifar10-cpu digits, or all. Environment: RESULTS and DATA
(folders), PYTHON, NPROC (GPUs or processes of a run), EXTRA (flags for all runs, as EXTRA="--epochs 2", but
not those by which runs differ). Several copies may share a results folder, one per GPU, also on several
machines if its file system has flock: each run is made once, and a run whose copy died is taken over.
"""
import fcntl
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import common
import flags
from common import HERE, UserError
from paper.experiments import FIGURES, SECTIONS, overview, stages
from runs import lock_exclusively

# The flags by which the runs differ, and those with a variable of their own: EXTRA may not have them.
OWN = ("--dataset", "--split", "--frac", "--size", "--classes", "--order", "--metric", "--scores",
       "--weight", "--weight-factor", "--attack", "--seed", "--run", "--results", "--data-dir")
# glibc keeps freed memory. Else it gives that of each large tensor back to the kernel, which has to zero it
# page by page for the next one: a sixth of the time of a training step of PreActResNet-8 on a CPU.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def make(stage, command, results, wait=False):
    """Runs the command of a stage unless it is finished. Returns whether there is nothing left to do.

    A copy of this script makes a stage while it holds the lock on its log. The kernel drops the lock when the
    last process that holds it ends, the stage's own included: the run of a killed copy is neither lost nor
    made twice. `wait` waits for a copy that makes this stage or its source; for rankings make() always waits.
    """
    source_result = Path(stage.arguments[0]).with_name("result.json")
    if stage.script == "transfer.py" and not wait and not source_result.exists():
        return False
    path = Path(results, "logs", os.path.relpath(stage.folder, results).replace("/", "_") + ".log")
    with open(path, "a", buffering=1) as log:  # a line at a time
        try:
            lock_exclusively(log, 0 if wait or stage.script == "rank.py" else fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if Path(stage.folder, stage.final_file).exists():
            return True
        print(f"\n> {shlex.join(command)}", flush=True)
        has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
        environment = dict(os.environ) if has_gpu else KEEP_MEMORY | os.environ  # the user's own values win
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   errors="replace", env=environment, pass_fds=[log.fileno()])
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
        if process.wait() in (130, 143, -2, -15):
            sys.exit(130)  # the stage was stopped
    return True


def command_line(argv):
    """Parses the words of the command line and EXTRA. Returns args with the lists `sections` and `figures`,
    with `extra`, the words of EXTRA, and `values`, what these give, {dest: value}."""
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
        args.extra = shlex.split(os.environ.get("EXTRA", ""))
        args.values = vars(flags.script_parser("sat.py", "", flags.DEFAULTS).parse_args(args.extra))
    except ValueError as e:  # UserError too
        raise UserError(f"EXTRA: {e}") from None
    if forbidden := [flag for flag in OWN if flags.dest(flag) in args.values]:
        raise UserError(f"EXTRA: {forbidden[0]} differs between the runs, so run_all.sh sets it")
    return args


def main(argv=None):
    """Lists the stages, then either prints their commands or makes them and the report."""
    args = command_line(argv)
    results = os.path.expanduser(os.environ.get("RESULTS", "results"))
    python = os.environ.get("PYTHON", sys.executable)
    launcher, nproc = [python], os.environ.get("NPROC", "1")
    if not re.fullmatch("[1-9][0-9]*|auto|cpu|gpu", nproc):
        raise UserError(f"NPROC={nproc}: give the number of processes, 1 or more")
    if nproc != "1":
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", nproc, "--"]
    all_stages = list(stages(args.sections, args.figures, results, args.values))
    todo = {}  # {folder: (stage, command)}
    for stage in all_stages:
        words = [*stage.arguments, *flags.only_flags_of(args.extra, stage.script)]
        if args.extra and stage.script == "sat.py" and "--run" not in words:
            words += ["--run", Path(stage.folder).name]  # sat.py would put the extra flags into the name
        words += ["--results", results, "--data-dir", os.environ.get("DATA", "data")]
        todo.setdefault(stage.folder, (stage, [*launcher, str(HERE / stage.script), *words]))
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
    todo = sorted(todo.values(), key=lambda item: int(re.search(r"-seed(\d+)", Path(item[0].folder).name)[1]))
    busy = []  # made by other copies
    for stage, command in todo:
        if not make(stage, command, results):
            busy.append((stage, command))
    for stage, command in busy:
        make(stage, command, results, wait=True)  # then the stage is finished, or taken over
    code = subprocess.run(report).returncode
    missing = [stage.folder for stage, _ in todo if not Path(stage.folder, stage.final_file).exists()]
    if missing:
        sys.exit("\n  ".join([f"\n{len(missing)} missing (see their logs):", *missing]))
    sys.exit(code)


if __name__ == "__main__":
    common.script(main)
