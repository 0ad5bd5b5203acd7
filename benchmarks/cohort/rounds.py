"""The cohort on a Slurm cluster: submitted, and submitted again until nothing is left to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.cluster import Cluster
from benchmarks.cohort.faults import Faults
from benchmarks.cohort.places import ReadErrors, SmallDisk
from benchmarks.cohort.slides import Cohort

__all__ = ["Round", "clear", "prepare_path", "run_disturbed", "run_undisturbed"]

SUBMIT = Path(__file__).parents[2] / "workflows" / "slurm" / "submit"
OPTIONS = ("--model", "stain-baseline", "--tile-size", "256", "--workers", "1", "--no-progress")
SKEW_S = 5 * 3600
"""How far the clocks of some tasks are off, either way."""
MOST_ROUNDS = 8
ROUND_LIMIT_S = 1800.0
FAKETIME = "/usr/lib/*/faketime/libfaketime.so.1"

_WRAPPER = """\
#!/bin/bash
# Notes how long wsi-run takes, gives some tasks a clock that is wrong, and lets reads fail.
begun=$(date +%s.%N)
skew=()
preload={strike}
if [ -n "${{SLURM_ARRAY_TASK_ID:-}}" ] && [ -n "{library}" ]; then
  case $(( (SLURM_ARRAY_TASK_ID + ${{SLURM_RESTART_COUNT:-0}}) % 4 )) in
    0) skew=(FAKETIME=+{skew}s FAKETIME_DONT_FAKE_MONOTONIC=1) preload={library}:$preload ;;
    1) skew=(FAKETIME=-{skew}s FAKETIME_DONT_FAKE_MONOTONIC=1) preload={library}:$preload ;;
  esac
fi
env LD_PRELOAD="$preload" WSI_READ_ERRORS={flag} "${{skew[@]}}" {python} {script} "$@" &
worker=$!
trap 'kill -USR1 $worker' USR1
trap 'kill -TERM $worker' TERM
while :; do
  wait $worker; code=$?
  kill -0 $worker 2>/dev/null || break
done
echo "$begun $(date +%s.%N) $code" >> {times}
exit $code
"""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One submission and what became of it."""

    seconds: float
    """From the submission to the end of the gather."""
    tasks: int
    """Of the array."""
    restarts: int
    """How often Slurm started a task again."""
    states: dict[str, int]
    """How many slides are done, failed, ... at its end."""


def prepare_path(
    folder: Path, *, skewed: bool, reading: ReadErrors | None = None
) -> dict[str, str]:
    """Write a ``wsi-run`` that notes its times; return an environment in which it is found."""
    strike = reading.environment if reading else {}
    library = next(iter(map(str, Path("/").glob(FAKETIME.lstrip("/")))), "") if skewed else ""
    folder.mkdir(parents=True, exist_ok=True)
    own = Path(sys.executable).parent
    wrapper = folder / "wsi-run"
    wrapper.write_text(
        _WRAPPER.format(
            library=library,
            skew=SKEW_S,
            strike=strike.get("LD_PRELOAD", ""),
            flag=strike.get("WSI_READ_ERRORS", ""),
            python=sys.executable,
            script=own / "wsi-run",
            times=folder / "times.txt",
        )
    )
    wrapper.chmod(0o755)
    path = os.pathsep.join((str(folder), str(own), os.environ["PATH"]))
    return {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run_undisturbed(
    cluster: Cluster, cohort: Cohort, results: Path, *, tasks: int, environment: dict[str, str]
) -> Round:
    """Run the cohort once; nothing goes wrong but the broken slides."""
    return _submit(cluster, cohort, results, tasks=tasks, environment=environment)


def run_disturbed(
    cluster: Cluster,
    cohort: Cohort,
    results: SmallDisk,
    reading: ReadErrors,
    *,
    tasks: int,
    environment: dict[str, str],
    every_s: float,
    rng: np.random.Generator,
) -> tuple[list[Round], Faults]:
    """Run the cohort while faults are injected; submit again until nothing is left to do.

    Faults come until three quarters of the slides are done, and in every round that began before.

    Raises:
        RuntimeError: after ``MOST_ROUNDS`` there are still healthy slides that are not done.
    """
    second = [
        str(Path(environment["PATH"].partition(os.pathsep)[0]) / "wsi-run"),
        str(cohort.folder),
        "--out",
        str(results.folder),
        *OPTIONS,
    ]
    faults = Faults(
        cluster=cluster,
        slides=cohort.folder,
        results=results,
        reading=reading,
        command=second,
        every_s=every_s,
        rng=rng,
    )
    rounds: list[Round] = []
    faults.start()
    try:
        while len(rounds) < MOST_ROUNDS:
            rounds.append(
                _submit(cluster, cohort, results.folder, tasks=tasks, environment=environment)
            )
            done = rounds[-1].states.get("done", 0)
            print(f"  round {len(rounds)}: {rounds[-1].states}", flush=True)
            if done >= len(cohort.healthy) * 0.75 and faults.is_alive():
                faults.end()
            if done == len(cohort.healthy):
                return rounds, faults
    finally:
        if faults.is_alive():
            faults.end()
    raise RuntimeError(f"after {len(rounds)} rounds slides are left: {rounds[-1].states}")


def _submit(
    cluster: Cluster, cohort: Cohort, results: Path, *, tasks: int, environment: dict[str, str]
) -> Round:
    begun = time.monotonic()
    call = [str(SUBMIT), str(cohort.folder), "--out", str(results), "--tasks", str(tasks)]
    call += ["--sbatch", "--time=30 --cpus-per-task=1 --mem=0", *OPTIONS]
    jobs = _until_submitted(cluster, call, environment)
    array, gather = jobs["array"], jobs["gather"]
    ended = cluster.wait(array, gather, timeout_s=ROUND_LIMIT_S)
    of_array = [task for task in ended if task.job == array]
    return Round(
        seconds=time.monotonic() - begun,
        tasks=len(of_array),
        restarts=sum(task.restarts for task in of_array),
        states=_states(results, environment),
    )


def _until_submitted(
    cluster: Cluster, call: list[str], environment: dict[str, str]
) -> dict[str, int]:
    """Submit; while the cluster is down or a folder is gone, try again as a person would."""
    for _ in range(20):
        done = subprocess.run(
            call,
            env={**os.environ, **cluster.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            lines = [line.split() for line in done.stdout.splitlines()]
            jobs = {line[0]: int(line[1]) for line in lines if line and line[0] in _KINDS}
            if "array" in jobs:
                return jobs
        time.sleep(2)
    raise RuntimeError(f"submit ended with {done.returncode}: {done.stdout}{done.stderr}")


_KINDS = {"array", "objects", "gather"}


def _states(results: Path, environment: dict[str, str]) -> dict[str, int]:
    """Count the slides by state, as the reports say."""
    counts: dict[str, int] = {}
    for path in sorted(results.glob("reports/*.json")):
        status = json.loads(path.read_text())["status"]
        counts[status] = counts.get(status, 0) + 1
    return counts


def clear(folder: Path) -> None:
    """Remove what an earlier rehearsal left in a folder."""
    if folder.exists():
        shutil.rmtree(folder)
