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

    put("scontrol", "exit 1")
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


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("code", [0, 1, 2])
def test_it_passes_arguments_and_exit_codes_on(tools, code):
    folder, put = tools
    put("wsi-run", f"exit {code}")
    process = start(folder, "my slides", "out", "--mpp", "0.5", "--overwrite")
    assert process.wait(20) == code
    expected = "wsi-run my slides --out out --shard auto --no-progress --mpp 0.5 --overwrite"
    assert calls(folder) == [expected]


def test_a_restart_does_not_overwrite_again(tools):
    folder, put = tools
    put("wsi-run", "exit 0")
    arguments = ("slides", "out", "--overwrite", "--mpp", "0.5")
    assert start(folder, *arguments, SLURM_RESTART_COUNT="1").wait(20) == 0
    assert calls(folder) == ["wsi-run slides --out out --shard auto --no-progress --mpp 0.5"]


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
    assert ("scontrol requeue 7_3" in calls(folder)) == requeued


def test_it_says_how_it_is_used(tools):
    process = start(tools[0], "slides")
    assert process.wait(20) == 2
    assert "usage" in process.stderr.read()
