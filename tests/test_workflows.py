"""The Slurm script with stand-ins for wsi-run and scontrol: arguments, signals, exit codes."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "workflows" / "slurm" / "array.sbatch"


@pytest.fixture
def tools(tmp_path):
    """A folder with stand-ins that write down how they are called."""

    def put(name: str, body: str) -> None:
        path = tmp_path / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> "{tmp_path}/calls"\n{body}\n')
        path.chmod(0o755)

    put("scontrol", "echo 'JobId=9 JobState=RUNNING Reason=None'")
    put("sleep", "")  # requeued tasks wait to be killed, and refused requests to be made again
    return tmp_path, put


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    return subprocess.Popen(
        ["bash", SCRIPT, *arguments],
        env={**os.environ, **array, **environment, "PATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )


def calls(folder: Path, *, of: str = "") -> list[str]:
    lines = (folder / "calls").read_text().splitlines()
    return [line for line in lines if line.startswith(of)]


REQUEUE = "scontrol requeue 7_3"


@pytest.mark.parametrize("code", [0, 1, 2])
def test_it_passes_arguments_and_exit_codes_on(tools, code):
    folder, put = tools
    put("wsi-run", f"exit {code}")
    process = start(folder, "my slides", "out", "--mpp", "0.5", "--overwrite")
    assert process.wait(20) == code
    expected = "wsi-run my slides --out out --shard auto --no-progress --mpp 0.5 --overwrite"
    assert calls(folder, of="wsi-run") == [expected]
    assert REQUEUE not in calls(folder)


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (("--metrics-file", "/p 5%a/x_%a.prom"), ["--metrics-file", "/p 5%a/x_3.prom"]),
        (("--metrics-file=p%a/x_%a.prom",), ["--metrics-file=p%a/x_3.prom"]),
        (("--metrics-file", "%a"), ["--metrics-file", "3"]),
        (("--model", "model 50%apples", "-v"), ["--model", "model 50%apples", "-v"]),
        (("--mask-dir=50%a",), ["--mask-dir=50%a"]),
        (("--metrics-file=%a", "50%a"), ["--metrics-file=3", "50%a"]),
        ((), []),
    ],
)
def test_the_number_of_the_task_gets_into_the_name_of_its_metrics_alone(tools, given, passed):
    folder, put = tools
    put("wsi-run", f'shift 6; for w; do echo "$w" >> {folder}/words; done; touch {folder}/words')
    assert start(folder, "slides", "out %a", *given).wait(20) == 0
    assert (folder / "words").read_text().splitlines() == passed
    assert "--out out %a" in calls(folder, of="wsi-run")[0]


@pytest.mark.parametrize(("restarts", "requeued"), [("0", True), ("5", False)])
def test_a_signal_reaches_the_worker_and_75_is_requeued(tools, restarts, requeued):
    folder, put = tools
    put("wsi-run", f'trap "exit 75" USR1\ntouch {folder}/ready\nwhile :; do sleep 0.05; done')
    process = start(folder, "slides", "out", SLURM_RESTART_COUNT=restarts)
    deadline = time.monotonic() + 20
    while not (folder / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 75
    assert (REQUEUE in calls(folder)) == requeued


@pytest.mark.parametrize(("restarts", "requeued"), [("0", True), ("2", False)])
def test_a_killed_worker_is_requeued_a_bounded_number_of_times(tools, restarts, requeued):
    folder, put = tools
    put("wsi-run", "kill -KILL $$")
    process = start(folder, "slides", "out", SLURM_RESTART_COUNT=restarts, WSI_MAX_RESTARTS="2")
    assert process.wait(20) == 137
    assert (REQUEUE in calls(folder)) == requeued
    assert "killed by signal 9" in process.stderr.read()


@pytest.mark.parametrize(("end", "requeued"), [("exit 75", True), ("kill -KILL $$", False)])
def test_a_stop_after_long_work_may_always_go_on_and_a_kill_may_not(tools, end, requeued):
    folder, put = tools
    put("wsi-run", end)
    process = start(folder, "slides", "out", SLURM_RESTART_COUNT="99", WSI_SHORT_START_S="0")
    assert process.wait(20) in (75, 137)
    assert (REQUEUE in calls(folder)) == requeued


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING", "TIMEOUT"])
def test_what_slurm_has_ended_is_not_requeued(tools, state):
    folder, put = tools
    put("scontrol", f"echo 'JobId=9 JobState={state} Reason=None'")
    put("wsi-run", "exit 75")
    assert start(folder, "slides", "out").wait(20) == 75
    assert REQUEUE not in calls(folder)


def test_ctrl_c_is_not_requeued(tools):
    folder, put = tools
    put("wsi-run", "exit 130")
    assert start(folder, "slides", "out").wait(20) == 130
    assert REQUEUE not in calls(folder)


def test_a_controller_that_restarts_is_asked_again(tools):
    folder, put = tools
    put("wsi-run", "exit 75")
    put("scontrol", f'n=$(grep -c requeue {folder}/calls); [ "$1" = requeue ] && [ "$n" -gt 2 ]')
    assert start(folder, "slides", "out").wait(20) == 75
    assert len(calls(folder, of=REQUEUE)) == 3
    put("scontrol", "exit 1")
    process = start(folder, "slides", "out")
    assert process.wait(20) == 75
    assert "could not be requeued" in process.stderr.read()


@pytest.mark.parametrize(
    ("options", "code"),
    [(("--only", "maps"), 0), (("--only=maps",), 0), (("--only", "objects"), 1), ((), 1)],
)
def test_a_failed_slide_does_not_keep_the_others_from_their_tables(tools, options, code):
    folder, put = tools
    put("wsi-run", "exit 1")
    assert start(folder, "slides", "out", *options).wait(20) == code
    assert calls(folder, of="wsi-run")[0].endswith(" ".join(("--no-progress", *options)))


@pytest.mark.parametrize("code", [0, 1])
def test_the_gather_makes_the_summary_and_tells_how_all_ended(tools, code):
    folder, put = tools
    put("wsi", f'[ "$1" = summary ] && exit {code}; echo 2 slides')
    process = subprocess.run(
        ["bash", SCRIPT.with_name("gather.sbatch"), "my out"],
        env={**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stdout) == (code, "2 slides\n")
    assert calls(folder) == ["wsi summary my out --check", "wsi status my out"]


def test_it_says_how_it_is_used(tools):
    process = start(tools[0], "slides")
    assert process.wait(20) == 2
    assert "usage" in process.stderr.read()
