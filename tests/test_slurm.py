"""The Slurm workflow on a real cluster: slurmctld, slurmd and munge, started by the tests.

Twenty slides go through an array while one thing after another happens to it; in the end every
good slide is done exactly once, with the bytes of a run that nothing happened to.
"""

import csv
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import zarr

from benchmarks.cluster import URGENT, Cluster, missing_programs
from wsi_pipeline.synth import write_slide

SLURM = Path(__file__).parents[1] / "workflows" / "slurm"
BIN = Path(sys.executable).parent
RUN = ("--model", "stain-baseline", "--device", "cpu", "--workers", "1", "--tile-size", "256")
SLIDES, BAD = 20, "s09"
TASKS, AT_ONCE = 5, 2
FEW_BLOCKS = 4
"""Of the nine of a slide: a worker that has written more may have predicted all of them."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PATH": os.pathsep.join((str(BIN), os.environ["PATH"])),
    "WSI_MAX_RESTARTS": "12",
}
pytestmark = pytest.mark.skipif(
    bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    with Cluster(folder, cpus=4, gpus=2, grace_s=60, max_array=64) as running:
        yield running


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """A cohort of four sights; one slide is no slide."""
    folder = tmp_path_factory.mktemp("cohort") / "my slides"
    folder.mkdir()
    for number in range(SLIDES):
        path = folder / f"s{number:02}.svs"
        if path.stem == BAD:
            path.write_bytes(b"no slide at all" * 200)
        elif number < 4:
            write_slide(path, width=700, height=600, mpp=0.5, seed=number, truth=False)
        else:
            shutil.copy(folder / f"s{number % 4:02}.svs", path)
    return folder


@pytest.fixture(scope="module")
def beginning(slides, tmp_path_factory):
    """An undisturbed run of the same slides in one process, on its way."""
    out = tmp_path_factory.mktemp("quiet")
    call = [BIN / "wsi-run", slides, "--out", out, "--no-progress", *RUN]
    with open(out / "said", "w") as said:
        process = subprocess.Popen(call, env={**os.environ, **ENVIRONMENT}, stderr=said)
    yield out, process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def quiet(beginning):
    """What an undisturbed run made of the slides."""
    out, process = beginning
    assert process.wait(900) == 1, (out / "said").read_text()  # the bad slide
    return out


def program(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def submit(cluster, *arguments, cwd=None):
    """Call workflows/slurm/submit; return its exit code, what it says, and its jobs by kind."""
    done = subprocess.run(
        [sys.executable, SLURM / "submit", *map(str, arguments)],
        env={**os.environ, **cluster.environment, **ENVIRONMENT},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    words = [line.split() for line in done.stdout.splitlines()]
    jobs = {w[0]: int(w[1]) for w in words if len(w) > 1 and w[0] in ("array", "objects", "gather")}
    return done.returncode, done.stdout + done.stderr, jobs


def events(out, slide_id, *names):
    lines = (out / "logs" / f"{slide_id}.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] in names]


def digests(out, folder="objects"):
    files = sorted((out / folder).glob("*.parquet"))
    return {file.stem: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def reports(out):
    files = sorted((out / "reports").glob("*.json"))
    return {file.stem: json.loads(file.read_text()) for file in files}


def unfinished(out):
    return [path for path in out.rglob("*") if path.name.endswith(".partial")]


def blocks(store):
    """Return the files of blocks that are marked as finished, with their inodes."""
    marks = zarr.open_array(store / "blocks", mode="r")[:]
    files = store / "nuclei" / "prob" / "c" / "0"
    return {(y, x): (files / f"{y}/{x}").stat().st_ino for y, x in np.argwhere(marks).tolist()}


@dataclass(kw_only=True)
class Caught:
    """A worker held in the middle of a slide."""

    slide_id: str
    pid: int
    task: int
    blocks: dict

    @property
    def started(self):
        return self.pid, "start"

    def has_pending(self, number):
        """Whether a signal waits for the worker to go on."""
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines()
        )
        return bool(int(status["ShdPnd"], 16) >> (number - 1) & 1)

    def go_on(self):
        os.kill(self.pid, signal.SIGCONT)


@dataclass
class Disturbed:
    """A run to which things happened."""

    out: Path
    jobs: dict
    tasks: list
    caught: dict = field(default_factory=dict)
    most_at_once: int = 0


def catch(cluster, out, job, timeout_s=300):
    """Stop a worker that has written some blocks of a slide and not all, and return it."""
    end, tasks_at = time.monotonic() + timeout_s, 0.0
    while time.monotonic() < end:
        for store in (out / "maps").glob(".*.zarr.partial"):
            slide_id = store.name.removeprefix(".").removesuffix(".zarr.partial")
            caught = hold(cluster, out, store, slide_id)
            if caught is not None:
                return caught
        if time.monotonic() - tasks_at > 1:
            cluster.nudge(cluster.tasks(job))
            tasks_at = time.monotonic()
        time.sleep(0.02)
    raise TimeoutError("no worker was in the middle of a slide")


def hold(cluster, out, store, slide_id):
    """Stop the worker of an unfinished store; None if it has none, or no block yet."""
    try:
        pid = events(out, slide_id, "start")[-1]["pid"]
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"SLURM_CONF={cluster.conf}".encode() not in variables or not blocks(store):
            return None  # somebody else's: the worker of this slide is gone
        os.kill(pid, signal.SIGSTOP)
    except (OSError, LookupError):
        return None
    task = next(int(v[20:]) for v in variables if v.startswith(b"SLURM_ARRAY_TASK_ID="))
    if store.exists() and len(written := blocks(store)) <= FEW_BLOCKS:
        return Caught(slide_id=slide_id, pid=pid, task=task, blocks=written)
    os.kill(pid, signal.SIGCONT)
    return None


def pending(caught, cluster, job):
    """Wait until the request to stop has come to a worker, and let it go on."""
    cluster.until(lambda _: caught.has_pending(signal.SIGUSR1), job, timeout_s=300)
    caught.go_on()


@pytest.fixture(scope="module")
def disturbed(cluster, slides, beginning, tmp_path_factory):
    """Submit the cohort, and let one thing after another happen to it."""
    home = tmp_path_factory.mktemp("home")
    out = home / "my results"
    limits = "--cpus-per-task=1 --mem=1G --time=60 --signal=B:USR1@180"
    own = ("--tasks", TASKS, "--at-once", AT_ONCE, "--sbatch", limits)
    code, said, jobs = submit(cluster, "--out", out.name, *own, *RUN, slides / "*.svs", cwd=home)
    assert code == 0, said
    assert "s09 will fail: unreadable_slide" in said or "s09 will fail: unsupported" in said
    assert list(jobs) == ["array", "gather"]
    job = jobs["array"]
    story = Disturbed(out=out, jobs=jobs, tasks=[])
    take = functools.partial(catch, cluster, out, job)

    story.caught["killed"] = take()
    os.kill(story.caught["killed"].pid, signal.SIGKILL)
    again = story.caught["killed"].task
    cluster.until(lambda tasks: any(t.index == again and t.restarts for t in tasks), job)

    # It writes down what it knows within seconds; killed sooner, it starts a job twice.
    time.sleep(6)
    cluster.kill_controller()
    cluster.start_controller()

    story.caught["preempted"] = held = take()
    urgent = cluster.sbatch(
        f"--partition={URGENT}", "--cpus-per-task=4", "--output=/dev/null", "--wrap=true"
    )
    pending(held, cluster, job)
    cluster.wait(urgent)

    story.caught["node"] = take()
    cluster.kill_node()
    cluster.start_node()

    story.caught["limit"] = held = take()
    # Slurm looks twice a minute whose limit is less than these three minutes away.
    name = f"{job}_{held.task}"
    ran = cluster.command("squeue", "--noheader", "--format=%M", f"--jobs={name}").strip()
    limit = int(ran.split(":")[-2]) + 3
    cluster.command("scontrol", "update", f"JobId={name}", f"TimeLimit={limit}")
    pending(held, cluster, job)

    def ended(tasks):
        running = sum(task.state == "RUNNING" for task in tasks)
        story.most_at_once = max(story.most_at_once, running)
        return all(task.ended for task in tasks)

    story.tasks = cluster.until(ended, job, timeout_s=900)
    cluster.wait(jobs["gather"])
    return story


def test_every_good_slide_is_done_exactly_once(disturbed):
    ends = {
        f"s{number:02}": [e["status"] for e in events(disturbed.out, f"s{number:02}", "end")]
        for number in range(SLIDES)
    }
    assert {s for s, e in ends.items() if e.count("done") == 1 and e[-1] == "done"} == {
        *ends.keys() - {BAD}
    }
    assert set(ends[BAD]) == {"failed"}
    by_status = {s: r["status"] for s, r in reports(disturbed.out).items()}
    assert by_status == {s: "failed" if s == BAD else "done" for s in ends}


def test_tables_are_those_of_an_undisturbed_run(disturbed, quiet):
    for folder in ("objects", "tissue"):
        assert digests(disturbed.out, folder) == digests(quiet, folder)
    assert len(digests(quiet)) == SLIDES - 1
    error = reports(disturbed.out)[BAD]["error"]
    assert error["code"] == reports(quiet)[BAD]["error"]["code"]


def test_nothing_unfinished_is_left(disturbed):
    assert unfinished(disturbed.out) == []


@pytest.mark.parametrize("what", ["killed", "preempted", "node", "limit"])
def test_finished_blocks_are_kept(disturbed, what):
    caught = disturbed.caught[what]
    assert caught.blocks
    finished = blocks(disturbed.out / "maps" / f"{caught.slide_id}.zarr")
    assert caught.blocks.items() <= finished.items()
    tries = events(disturbed.out, caught.slide_id, "start", "end")
    after = next(n for n, e in enumerate(tries, 1) if (e["pid"], e["event"]) == caught.started)
    # A request to stop ends a try in words; a kill does not.
    asked = what in ("preempted", "limit")
    assert tries[after].get("status") == ("interrupted" if asked else None)
    assert tries[after]["event"] == ("end" if asked else "start")


def test_tasks_are_requeued_but_not_for_a_bad_slide(disturbed):
    by_index = {task.index: task for task in disturbed.tasks}
    assert sorted(by_index) == [*range(TASKS)]
    bad = int(BAD[1:]) % TASKS
    assert {t.state for i, t in by_index.items() if i != bad} == {"COMPLETED"}
    assert (by_index[bad].state, by_index[bad].exit_code) == ("FAILED", 1)
    # Preemption and the loss of the node struck all tasks that were running then.
    assert sum(task.restarts for task in disturbed.tasks) >= len(disturbed.caught)


def test_no_more_tasks_run_than_allowed(disturbed):
    assert 1 <= disturbed.most_at_once <= AT_ONCE


def test_the_gather_has_all_slides_and_says_that_one_is_not_done(disturbed, cluster):
    (gather,) = cluster.tasks(disturbed.jobs["gather"])
    assert (gather.state, gather.exit_code) == ("FAILED", 1)
    with open(disturbed.out / "summary.csv", newline="") as file:
        rows = {row["slide_id"]: row["status"] for row in csv.DictReader(file)}
    assert rows == {s: r["status"] for s, r in reports(disturbed.out).items()}
    (log,) = (disturbed.out / "slurm" / "logs").glob("gather-*.log")
    assert "20 slides: 19 done, 0 running, 0 interrupted, 0 missing, 1 failed" in log.read_text()


def test_the_same_line_again_does_what_is_left(disturbed, quiet, cluster, slides):
    assert quiet  # it has seen the bad slide
    (slides / f"{BAD}.svs").write_bytes((slides / "s01.svs").read_bytes())
    before = {p.name: p.stat().st_ino for p in (disturbed.out / "objects").glob("*.parquet")}
    own = ("--sbatch", "--cpus-per-task=1 --mem=1G")
    code, said, jobs = submit(cluster, slides / "*.svs", f"--out={disturbed.out}", *RUN, *own)
    assert code == 0, said
    assert "1 slides in 1 tasks" in said
    tasks = cluster.wait(*jobs.values())
    assert {(task.state, task.exit_code) for task in tasks} == {("COMPLETED", 0)}
    after = {p.name: p.stat().st_ino for p in (disturbed.out / "objects").glob("*.parquet")}
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {f"{BAD}.parquet"}
    code, said, jobs = submit(cluster, slides, "--out", disturbed.out, *RUN)
    assert (code, jobs) == (0, {})
    assert "All 20 slides are done" in said


STUBBORN = """#!/bin/bash
trap 'exit 75' TERM USR1
touch "ready $SLURM_ARRAY_TASK_ID ${SLURM_RESTART_COUNT:-0}"
case $SLURM_ARRAY_TASK_ID in
  0) kill -KILL $$ ;;
  1) [ -z "${SLURM_RESTART_COUNT-}" ] || exit 0 ;;
esac
while :; do sleep 0.05; done
"""
"""A wsi-run that is killed at each start (task 0), or works until it is asked to stop."""


def test_kills_are_bounded_preemption_goes_on_and_cancelled_tasks_stay_so(cluster, tmp_path):
    program(tmp_path / "bin" / "wsi-run", STUBBORN)
    path = os.pathsep.join((str(tmp_path / "bin"), os.environ["PATH"]))
    few = {"PATH": path, "WSI_MAX_RESTARTS": "1"}
    limits = ("--cpus-per-task=1", "--mem=100M", "--time=10", f"--output={tmp_path}/%a.log")
    script = (SLURM / "array.sbatch", "slides", "out")
    # No grace: the signal is TERM, and Slurm itself requeues.
    cluster.command("scontrol", "update", "PartitionName=preemptible", "GraceTime=0")
    job = cluster.sbatch(*limits, "--array=0-1", *script, cwd=tmp_path, environment=few)
    cluster.until(lambda _: (tmp_path / "ready 1 0").exists(), job)
    urgent = cluster.sbatch(
        f"--partition={URGENT}", "--cpus-per-task=4", "--output=/dev/null", "--wrap=true"
    )
    cluster.wait(urgent)
    killed, preempted = cluster.wait(job)
    assert (killed.state, killed.exit_code, killed.restarts) == ("FAILED", 137, 1)
    assert (preempted.state, preempted.restarts) == ("COMPLETED", 1)

    other = cluster.sbatch(*limits, "--array=2", *script, cwd=tmp_path, environment=few)
    cluster.until(lambda _: (tmp_path / "ready 2 0").exists(), other)
    cluster.command("scancel", str(other))
    cluster.until(lambda _: "start 1:" in (tmp_path / "2.log").read_text(), other)
    (cancelled,) = cluster.wait(other)
    assert (cancelled.state, cancelled.restarts) == ("CANCELLED", 0)


def test_one_array_predicts_and_another_makes_the_tables(cluster, slides, quiet, tmp_path):
    ids = ("s00", "s01", "s02", "s03")
    own = ("--split", "--tasks", 2, "--sbatch", "--cpus-per-task=1 --mem=1G")
    gpu = ("--sbatch-array", "--gres=gpu:1")
    names = [slides / f"{slide_id}.svs" for slide_id in ids]
    bad = tmp_path / "zz.svs"
    bad.write_bytes(b"no slide at all")
    out = tmp_path / "out"
    code, said, jobs = submit(cluster, *names, bad, "--out", out, *RUN, *own, *gpu)
    assert code == 0, said
    # A slide that fails keeps nobody from their tables, and the second array tells of it.
    maps = cluster.wait(jobs["array"])
    assert [(task.state, task.exit_code) for task in maps] == [("COMPLETED", 0)] * 2
    tables = cluster.wait(jobs["objects"])
    assert [(task.state, task.exit_code) for task in tables] == [("FAILED", 1), ("COMPLETED", 0)]
    cluster.wait(jobs["gather"])
    assert digests(out) == {s: d for s, d in digests(quiet).items() if s in ids}
    assert {s for s, r in reports(out).items() if r["status"] == "done"} == {*ids}
    assert unfinished(out) == []
