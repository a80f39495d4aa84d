"""Makes every run of the paper's figures, then the report. Finished runs are skipped: it can be stopped at
any time and started again.

    ./run_all.sh digits                    each figure in small, on the embedded data, on a CPU
    ./run_all.sh cifar10-cpu               the paper's claims on all of CIFAR-10 and -100, at a size for a CPU
    ./run_all.sh cifar10 fig2 fig6         some figures of a section, at the paper's settings
    ./run_all.sh --dry-run all             print every command, the runs of each figure and their cost
    NPROC=4 ./run_all.sh cifar10           each run on 4 GPUs (or processes) of this machine, by torchrun

Sections: cifar10 cifar100 imagenet200 transfer cifar10-cpu digits, or all. Figures of them may follow;
without any, all are made. Environment: RESULTS and DATA (folders), NPROC, PYTHON, EXTRA (flags for all runs,
for instance EXTRA="--epochs 2", except those by which runs differ). Several copies may share a results
folder, one a GPU, also on several machines if its file system has flock: each run is made once, a transfer
waits for its source, and a run whose copy died is taken over.
"""
import fcntl
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import flags
from common import HERE, UserError
from paper.experiments import FIGURES, SECTIONS, overview, stages

# The flags by which the runs differ, and those with a variable of their own: EXTRA may not have them.
OWN = ("--dataset", "--split", "--frac", "--size", "--classes", "--order", "--metric", "--metrics",
       "--scores", "--weight", "--weight-factor", "--attack", "--seed", "--run", "--results", "--data-dir")
# glibc keeps freed memory. Else it gives that of each large tensor back to the kernel, which has to zero it
# page by page for the next one: a sixth of the time of a training step of PreActResNet-8 on a CPU.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def environment():
    """The environment of the stages: on a machine without a GPU, KEEP_MEMORY where the user set nothing."""
    return dict(os.environ) if any(Path("/dev").glob("nvidia[0-9]*")) else KEEP_MEMORY | os.environ


def make(stage, command, results, wait=False):
    """Runs the command of a stage unless it is finished. Returns whether there is nothing left to do.

    The copy of this script that first locks the stage's log, results/logs/<folder>.log, makes it. The kernel
    drops the lock when the last process that holds it ends, the stage's own included: the run of a copy that
    was killed is neither lost nor made twice. When another copy makes this stage or its source, make() waits
    for that copy if `wait` is set, else returns False. It always waits for rankings.
    """
    source = Path(stage.arguments[0]).with_name("result.json")
    if stage.script == "transfer.py" and not wait and not source.exists():
        return False
    path = Path(results, "logs", str(Path(stage.folder).relative_to(results)).replace("/", "_") + ".log")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | (0 if wait or stage.script == "rank.py" else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        if Path(stage.folder, stage.done).exists():
            return True
        print(f"\n> {shlex.join(command)}", flush=True)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   env=environment(), pass_fds=[log.fileno()])
        for line in process.stdout:
            sys.stdout.buffer.write(line)
            sys.stdout.flush()
            log.write(line)
            log.flush()
        if process.wait() in (130, 143, -2, -15):
            raise KeyboardInterrupt
    return True


def command_line(argv):
    """Parses the words: (sections, figures, whether it only prints)."""
    words = [w for w in argv if w != "--dry-run"]
    if "--help" in words or "-h" in words:
        print(__doc__.strip())
        sys.exit(0)
    valid = f"valid: {' '.join(SECTIONS)} all, then {' '.join(FIGURES)}, and --dry-run"
    for word in words:
        if word not in (*SECTIONS, "all", *FIGURES):
            raise UserError(f"there is no section or figure {word!r}; {valid}")
    sections = [s for w in words for s in (SECTIONS if w == "all" else [w]) if s in SECTIONS]
    figures = [w for w in words if w in FIGURES]
    if not sections:
        raise UserError(f"name a section; {valid}")
    for figure in figures:
        having = [name for name, parts in SECTIONS.items() if any(figure in p[2].split() for p in parts)]
        if not set(having) & set(sections):
            raise UserError(f"{' '.join(sections)} has no {figure}; it is in: {' '.join(having)}")
    return list(dict.fromkeys(sections)), figures, "--dry-run" in argv


def extra_flags(text):
    """The words of EXTRA, and the values {dest: value} that they give."""
    parser = flags.Parser(prog="sat.py", add_help=False)
    flags.add_flags(parser, flags.FLAGS)
    try:
        words = shlex.split(text)
        values = vars(parser.parse_args(words))
    except ValueError as e:  # UserError too
        raise UserError(f"EXTRA: {e}") from None
    for flag in OWN:
        if flags.dest(flag) in values:
            raise UserError(f"EXTRA: {flag} differs between the runs, so run_all.sh sets it (folders: "
                            "RESULTS, DATA)")
    return words, values


def commands(listed, extra, results):
    """[(stage, command)], each stage once, where it is first needed. extra: the words of EXTRA."""
    nproc = os.environ.get("NPROC", "1")
    if not re.fullmatch("[1-9][0-9]*|auto|cpu|gpu", nproc):
        raise UserError(f"NPROC={nproc}: give the number of processes, 1 or more")
    start = [os.environ.get("PYTHON", sys.executable)]
    if nproc != "1":
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", nproc, "--"]
    folders = ["--results", results, "--data-dir", os.environ.get("DATA", "data")]
    first = {}
    for stage in listed:
        if stage.folder not in first:
            words = [*stage.arguments, *flags.only_flags_of(extra, stage.script)]
            if extra and stage.script == "sat.py" and "--run" not in words:
                words += ["--run", Path(stage.folder).name]  # sat.py would put the extra flags into the name
            first[stage.folder] = stage, [*start, str(HERE / stage.script), *words, *folders]
    return list(first.values())


def main(argv):
    """Lists the stages, then either prints them or makes them and the report. Returns the exit code."""
    sections, figures, dry_run = command_line(argv)
    extra, values = extra_flags(os.environ.get("EXTRA", ""))
    results = os.environ.get("RESULTS", "results")
    listed = list(stages(sections, figures, results, values))
    todo = commands(listed, extra, results)
    report = [os.environ.get("PYTHON", sys.executable), str(HERE / "report.py"), "--results", results]
    if dry_run:
        lines = [shlex.join(command) for command in [*(command for _, command in todo), report]]
        print("\n".join([*lines, *overview(listed)]))
        return 0
    # By training seed, so that a list that is cut short has one seed of everything.
    todo.sort(key=lambda item: int(re.search(r"-seed(\d+)", Path(item[0].folder).name)[1]))
    for stage, command in [item for item in todo if not make(*item, results)]:
        make(stage, command, results, wait=True)  # then the stage is finished, or taken over
    code = subprocess.run(report).returncode
    missing = [stage.folder for stage, _ in todo if not Path(stage.folder, stage.done).exists()]
    if missing:
        print(f"\n{len(missing)} missing (see their logs):", *(f"  {folder}" for folder in missing),
              sep="\n", file=sys.stderr)
    return 1 if missing or code else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("stopped; started again, it goes on from here", file=sys.stderr)
        sys.exit(130)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        print(f"error: {e} (RESULTS=FOLDER names another folder for the results)", file=sys.stderr)
        sys.exit(2)
