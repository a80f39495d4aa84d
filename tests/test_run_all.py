"""run_all.py: its words, the commands it makes, several runs and several copies at once."""
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import run_all
import sat
from common import HERE, UserError
from paper import experiments


@pytest.mark.parametrize("argv,env,expected", [
    (["digits", "fig99"], {}, "no section or figure 'fig99'; valid: cifar10"), ([], {}, "name a section"),
    (["cifar10", "fig7"], {}, "cifar10 has no fig7; it is in: transfer cifar10-cpu"),
    (["digits"], {"EXTRA": "--epoch 2"}, "EXTRA: unrecognized arguments: --epoch 2"),
    (["digits"], {"EXTRA": "--seed=5"}, "EXTRA: --seed differs between the runs"),
    (["digits"], {"EXTRA": "--subset a.npy"}, "EXTRA: --subset differs between the runs"),
    (["digits"], {"EXTRA": "--ranking a.npy"}, "EXTRA: --ranking differs between the runs"),
    (["digits"], {"EXTRA": "--run 'x"}, "EXTRA: No closing quotation"),
    (["digits"], {"NPROC": "0"}, "NPROC=0: give the number of processes"),
    (["digits"], {"JOBS": "0", "NPROC": ""}, "JOBS=0: give the number of runs at once"),
    (["digits"], {"JOBS": "two"}, "JOBS=two: give the number of runs at once"),
    (["digits"], {"JOBS": "2", "NPROC": "4"}, "JOBS=2 and NPROC=4: give one of them")])
def test_mistakes_in_the_words_of_run_all(argv, env, expected, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as e:
        run_all.main(["--dry-run", *argv])
    assert expected in str(e.value)
    assert "\n" not in str(e.value)


def test_every_stage_of_sat_py_has_the_name_that_the_list_expects(monkeypatch, capsys):
    """Else the stage would stay missing."""
    monkeypatch.delenv("EXTRA", raising=False)
    run_all.main(["--dry-run", "cifar10", "fig6"])
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if "sat.py" in line]
    assert len(commands) > 50
    names = {words[words.index("--run") + 1] for words in commands}
    assert names == {Path(f).name for f in folders_of("cifar10", "fig6") if "rank-" not in f}


def test_commands_with_extra_flags_on_several_processes(monkeypatch, capsys):
    """A variable that is empty is none."""
    monkeypatch.setenv("EXTRA", "--epochs 40 --steps 3 --batch_size 64 --no_random_start")
    monkeypatch.setenv("NPROC", "4")
    for name in ("RESULTS", "DATA", "JOBS", "PYTHON"):
        monkeypatch.setenv(name, "")
    run_all.main(["--dry-run", "cifar10", "transfer", "fig2", "fig7"])
    lines = capsys.readouterr().out.splitlines()
    others = [line for line in lines if "rank.py" in line or "transfer.py" in line]
    assert all("--epochs 40 --batch_size 64" in line for line in others)
    assert not any("--steps" in line or "random_start" in line for line in others)
    commands = [shlex.split(line) for line in lines if "sat.py" in line]
    assert {tuple(words[:8]) for words in commands} == {
        (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "--",
         str(HERE / "sat.py"))}
    assert {tuple(words[-4:]) for words in commands} == {("--results", "results", "--data-dir", "data")}
    assert all("--no_random_start" in words for words in commands)
    parsed = [sat.command_line(words[8:]) for words in commands]
    assert [args.run for args in parsed[:3]] == ["none-seed0", "full-seed0", "csat-airplane-balanced-seed0"]
    assert {(args.epochs, args.steps, args.batch_size) for args in parsed} == {(40, 3, 64)}


# In place of a Python: notes its call, fails or waits for some runs, and writes the result of a stage.
STUB = f"""#!{sys.executable}
import os, sys, time
from pathlib import Path
script, *words = sys.argv[1:]
with open("reports" if "report.py" in script else "calls", "a") as f:
    f.write(" ".join(sys.argv[1:]) + chr(10))
if "report.py" in script:
    sys.exit()
values = dict(zip(words, words[1:]))
run = values.get("--run", "rank-preactresnet8-seed0")
print("glibc keeps", os.environ.get("MALLOC_MMAP_MAX_"), "blocks", flush=True)
if run == os.environ.get("FAILS"):
    sys.exit("no such luck")
dataset = "digits5-9" if "digits5-9.yaml" in str(words) else values.get("--dataset", "digits")
folder = Path("results", dataset, run)
assert "transfer.py" not in script or Path(words[0]).with_name("result.json").exists()
if values.get("--order") in ("hardest", "easiest"):
    assert folder.with_name("rank-preactresnet8-seed0").joinpath("rank.json").exists()
time.sleep(float(os.environ.get("SECONDS", 3)) if run in os.environ.get("WAITS", "").split() else 0.02)
folder.mkdir(parents=True)  # a second one would fail
(folder / ("rank.json" if "rank.py" in script else "result.json")).write_text("")
"""
FIG2 = [Path(f"results/digits/quick-csat-{c}-balanced-seed0") for c in range(10)]


@pytest.fixture
def start():
    """Starts run_all.py, with the stub in place of Python, without GPUs, as the first of a process group."""
    def popen(*words, **env):
        return subprocess.Popen([sys.executable, HERE / "run_all.py", *words], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0,
                                env={**os.environ, "PYTHON": "./python", "CUDA_VISIBLE_DEVICES": "", **env})
    Path("python").write_text(STUB)
    Path("python").chmod(0o755)
    return popen


def calls():
    """The commands that the stubs were given."""
    return Path("calls").read_text().splitlines() if Path("calls").exists() else []


def wait_for_calls_of(*folders):
    """Waits until the runs in these folders have been started."""
    while not all(any(f"--run {folder.name} " in call for call in calls()) for folder in folders):
        time.sleep(0.05)


def folders_of(*words):
    """The folders of the stages of a section, or of figures of it."""
    return {stage.folder for stage in experiments.stages(words[:1], words[1:], "results", {})}


@pytest.mark.slow
def test_several_run_alls_make_each_run_once_and_name_those_that_fail(start):
    """Of three copies one is killed with -9, its run going on: another waits for that run."""
    FIG2[0].mkdir(parents=True)
    (FIG2[0] / "result.json").write_text("{}")
    killed = start("digits", WAITS=FIG2[3].name)
    wait_for_calls_of(FIG2[3])
    killed.kill()
    for process in [start("digits"), start("digits", JOBS="2")]:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert len(calls()) == len(set(calls())) == len(folders_of("digits") - {str(FIG2[0])})
    assert FIG2[0].name not in " ".join(calls()), "it was finished"
    assert Path("reports").exists()
    shutil.rmtree(FIG2[2])
    log = Path(f"results/logs/digits_{FIG2[2].name}.log")
    outputs = []
    for jobs in ("1", "2"):
        shutil.rmtree(FIG2[9])
        log.unlink()
        process = start("digits", JOBS=jobs, FAILS=FIG2[2].name, WAITS=FIG2[9].name, SECONDS="1")
        out, errors = process.communicate(timeout=300)
        outputs.append(out)
        assert process.returncode == 1
        assert re.search(f"1 missing:\n.*{FIG2[2]}", errors)
        assert (FIG2[9] / "result.json").exists(), "it goes on after a failure"
        assert ("no such luck" in log.read_text()) == (jobs == "2")
        assert ("no such luck" in errors) == (jobs == "1"), "one stage at a time writes to the terminal"
        assert f"{FIG2[2]} failed (exit code 1); " in out
        n = len(folders_of("digits"))
        assert f"{FIG2[9]} is finished; {n - 1} of {n} done, 1 failed, about 0 s to go\n" in out
    assert "glibc keeps 0 blocks" in outputs[0], "on CPUs alone"
    assert f"> {FIG2[2]}, see {log}\n" in outputs[1]


@pytest.mark.slow
def test_a_run_never_waits_in_a_slot_for_what_another_makes(start):
    """While one copy makes the ranking and a source, another one makes AT and its transfer."""
    slow = "rank-preactresnet8-seed0 quick-none-seed0"
    process = start("digits", "fig7", JOBS="2", WAITS=slow, SECONDS="10")
    while len(calls()) < 2:
        time.sleep(0.05)
    other = start("digits", "fig7")
    _, errors = process.communicate(timeout=300)
    _, other_errors = other.communicate(timeout=300)
    assert [process.returncode, other.returncode] == [0, 0], errors + other_errors
    transferred = Path("results/digits5-9/digits0-4-quick-full-seed0-seed0/result.json")
    ranking = Path("results/digits0-4/rank-preactresnet8-seed0/rank.json")
    assert transferred.stat().st_mtime < ranking.stat().st_mtime
    assert len(calls()) == len(set(calls())) == len(folders_of("digits", "fig7"))


@pytest.mark.slow
@pytest.mark.parametrize("jobs,kill,code", [
    (1, subprocess.Popen.terminate, 143), (2, subprocess.Popen.terminate, 143),
    (2, lambda process: os.killpg(process.pid, signal.SIGINT), 130)])  # as Ctrl-C does
def test_a_signal_stops_all_stages(start, jobs, kill, code):
    begin, waiting = time.monotonic(), FIG2[3:3 + jobs]
    process = start("digits", "fig2", JOBS=str(jobs), SECONDS="120", WAITS=" ".join(f.name for f in waiting))
    wait_for_calls_of(*waiting)
    kill(process)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code
    assert re.fullmatch("stopped: repeat the command to resume .*\n", errors)
    assert time.monotonic() - begin < 100
    n = len(calls())
    process = start("digits", "fig2", JOBS=str(jobs))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert len(calls()) == len(folders_of("digits", "fig2")) + jobs == n + 10 - 3
    assert all((folder / "result.json").exists() for folder in FIG2)


@pytest.mark.parametrize("visible,values,jobs,expected", [
    (None, {}, 1, [None]), (None, {}, 3, ["0", "1", "0"]), ("5,7", {}, 3, ["5", "7", "5"]),
    ("GPU-a", {}, 2, ["GPU-a"] * 2), ("", {}, 2, [""] * 2), ("-1", {}, 2, ["-1"] * 2),
    ("5,7", {"device": "cpu"}, 2, ["5,7"] * 2), ("", {}, 9, [""] * 9)])
def test_gpus_and_cores_are_divided(monkeypatch, tmp_path, visible, values, jobs, expected):
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    monkeypatch.setattr(run_all, "GPU_FILES", f"{tmp_path}/nvidia[0-9]*")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(5))
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    environments = run_all.stage_environments(jobs, values)
    assert [environment.get("CUDA_VISIBLE_DEVICES") for environment in environments] == expected
    threads = {1: None, 2: "2", 3: "1", 9: "1"}[jobs]  # of five cores
    assert {environment.get("OMP_NUM_THREADS") for environment in environments} == {threads}
    on_cpus = visible in ("", "-1") or values != {}
    assert {"MALLOC_MMAP_MAX_" in environment for environment in environments} == {on_cpus}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert run_all.stage_environments(jobs, values)[0]["OMP_NUM_THREADS"] == "3", "the user's own value wins"


@pytest.mark.slow
def test_what_needs_a_failed_stage_is_left_out(start):
    failed = "rank-preactresnet8-seed0"
    process = start("digits", "fig6", FAILS=failed)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "esat-hardest-0.1-seed0 is left out, since results/digits/rank-preactresnet8-seed0 failed\n" in out
    assert not any("hardest" in call or "easiest" in call for call in calls())
    assert any("--order random" in call for call in calls())
    assert "esat-hardest-0.1-seed0" in errors.partition("missing:")[2]


@pytest.mark.parametrize("code,is_made,starts", [
    (0, False, True),  # rank.py made it in another folder, as another config's ranking has its name
    (3, False, False), (3, True, True)])  # another copy made it after it failed here
def test_what_needs_a_stage_is_started_unless_that_failed(code, is_made, starts):
    left, ended = {"results/a": (SimpleNamespace(needs="results/rank"), ["true"])}, {"results/rank": code}
    Path("results/logs").mkdir(parents=True)
    if is_made:
        Path("results/rank").mkdir()
        Path("results/rank/rank.json").touch()
    job = run_all.start_next(left, ended, "results", dict(os.environ), to_log=True)
    assert (job is not None) == starts
    assert ended.get("results/a") == (None if starts else 1)
    assert left == {}
    if job:
        _, process, log = job
        assert process.wait() == 0
        log.close()


def test_the_time_that_remains():
    """Of stages that cost 1, 3 and 4, those of 1 and 3 were done in 100 s; one was finished before."""
    work, ended = {"a": 1, "b": 3, "c": 4, "d": 9}, {"before": 0, "a": 0, "b": 0, "d": 2}
    text = run_all.progress_text(5, ended, work, time.monotonic() - 100)
    assert text == "3 of 5 done, 1 failed, about 2 min to go"
