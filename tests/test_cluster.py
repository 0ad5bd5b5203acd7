"""The pretended cluster itself: what it reads from Slurm, and that two of them do not meet."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.cluster import DEFAULT_CONF, Cluster, missing_programs
from benchmarks.cluster.tasks import parse_tasks, task_indices

ROOT = Path(__file__).parent.parent

needs_slurm = pytest.mark.skipif(
    bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can pretend GPUs")


@pytest.mark.parametrize(
    ("text", "indices"),
    [("7", [7]), ("0-3", [0, 1, 2, 3]), ("0-1,5,8-12:2%4", [0, 1, 5, 8, 10, 12])],
)
def test_lists_of_tasks(text, indices):
    assert task_indices(text) == indices


def test_a_list_that_was_cut_short_is_no_list():
    with pytest.raises(ValueError, match="no list of array tasks"):
        task_indices("0,2,4,...")


def test_tasks_that_wait_as_one_are_told_one_by_one():
    line = (
        "JobId=9 ArrayJobId=9 ArrayTaskId=2-3%1 JobName=a b JobState=PENDING "
        "Reason=JobArrayTaskLimit Restarts=0 ExitCode=0:0 Comment=x"
    )
    assert [(task.name, task.state, task.ended) for task in parse_tasks(line)] == [
        ("9_2", "PENDING", False),
        ("9_3", "PENDING", False),
    ]
    ended = "JobId=4 JobState=FAILED Reason=NonZeroExitCode Restarts=2 ExitCode=137:0"
    (task,) = parse_tasks(ended)
    assert (task.name, task.ended, task.exit_code, task.restarts) == ("4", True, 137, 2)
    assert parse_tasks("No jobs in the system") == []


@needs_slurm
@needs_root
def test_two_clusters_run_beside_each_other(tmp_path):
    before = DEFAULT_CONF.exists()
    with (
        Cluster(tmp_path / "one", cpus=3, gpus=2) as one,
        Cluster(tmp_path / "two", cpus=2) as two,
    ):
        show = "--wrap=echo $SLURM_CONF $CUDA_VISIBLE_DEVICES; sleep 1"
        first = one.sbatch("--array=0-1", "--gres=gpu:1", "--output=%a", show)
        second = two.sbatch("--output=said", show)
        assert {task.state for task in one.wait(first)} == {"COMPLETED"}
        assert [task.state for task in two.wait(second)] == ["COMPLETED"]
        assert len(two.tasks()) == 1
        with pytest.raises(RuntimeError, match="sbatch"):
            two.sbatch("--gres=gpu:1", show)
    said = {(one.folder / name).read_text().strip() for name in ("0", "1")}
    assert said == {f"{one.conf} 0", f"{one.conf} 1"}
    assert (two.folder / "said").read_text().strip() == str(two.conf)
    assert DEFAULT_CONF.exists() == before


def processes_of(folder):
    """Processes whose command line or environment names a cluster's folder."""
    found = []
    for process in psutil.process_iter():
        try:
            words = (*process.cmdline(), *process.environ().values())
        except psutil.Error:
            continue  # it has ended, or is none of ours
        if any(str(folder) in word for word in words):
            found.append(process)
    return found


def still_there(folder):
    """Those that do not end within seconds: a helper of slurmctld's ends after it."""
    return psutil.wait_procs(processes_of(folder), timeout=10)[1]


@needs_slurm
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_the_command_leaves_no_daemon_when_it_is_told_to_end(tmp_path, number):
    folder = tmp_path / "cluster"
    command = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.cluster", folder, "--cpus", "2"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        # Under nohup, tests are begun with this one ignored, and so would the command be.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    try:
        assert command.stdout.readline() == f"export SLURM_CONF={folder}/slurm.conf\n"
        names = {process.name() for process in processes_of(folder)}
        assert names >= {"munged", "slurmctld", "slurmd"}
        command.send_signal(number)
        assert command.wait(60) == 0
        assert still_there(folder) == []
    finally:
        for process in processes_of(folder):
            process.kill()
        command.stdout.close()


@needs_slurm
def test_told_to_end_while_it_starts_it_leaves_no_daemon_either(tmp_path):
    folder = tmp_path / "cluster"
    command = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.cluster", folder], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    try:
        while command.poll() is None and not (folder / "munged.log").exists():
            time.sleep(0.005)  # until the first daemon is about to be started
        command.send_signal(signal.SIGTERM)
        assert command.wait(60) == 0
        assert still_there(folder) == []
    finally:
        for process in processes_of(folder):
            process.kill()
