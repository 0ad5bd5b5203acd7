"""The Snakemake workflow, run by Snakemake itself: here, and as Slurm jobs."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from slide_fixtures import picture, write_slide

from benchmarks.cluster import Cluster, missing_programs

WORKFLOW = Path(__file__).parents[1] / "workflows" / "snakemake"
OWN = Path(sys.prefix)

INTERRUPTED_ONCE = """#!/bin/bash
# The first try at b is interrupted with half of its maps made.
half=results/maps/.b.zarr.partial/half
if [[ "$*" == *"--shard 1/3"* ]]; then
  if [ ! -e tried ]; then mkdir -p "${half%/*}"; touch tried "$half"; exit 75; fi
  if [ -e "$half" ]; then mv "$half" kept; fi
fi
exec wsi-run "$@"
"""


@pytest.fixture(scope="module")
def snakemake():
    """The program; the Makefile puts it into an environment of its own."""
    found = shutil.which("snakemake", path=f"{OWN}/snakemake/bin") or shutil.which("snakemake")
    if found is None:
        pytest.skip("snakemake is not installed: make .venv/snakemake/.installed")
    return found


@pytest.fixture
def cohort(tmp_path):
    """Two slides, and a file that is none."""
    (tmp_path / "slides").mkdir()
    for seed, name in enumerate("ab"):
        write_slide(tmp_path / "slides" / f"{name}.svs", picture(256, 256, seed))
    (tmp_path / "slides" / "c.svs").write_text("no slide")
    (tmp_path / "list.csv").write_text("path\nslides/c.svs\nslides/a.svs\nslides/b.svs\n")
    return tmp_path


def call(snakemake, cohort, *options, config=(), environment=None):
    command = [
        *(snakemake, "--snakefile", WORKFLOW / "Snakefile", "--nocolor", *options),
        *("--config", "slides=list.csv", "options=--model stain-baseline", "threads=1", *config),
    ]
    path = f"{OWN}/bin{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command,
        cwd=cohort,
        env={
            **os.environ,
            "XDG_CACHE_HOME": f"{cohort}/cache",
            "PATH": path,
            **(environment or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def states(cohort):
    """What the reports say, a slide each."""
    reports = map(Path.read_text, sorted((cohort / "results" / "reports").glob("*.json")))
    return {report["slide_id"]: report["status"] for report in map(json.loads, reports)}


def receipts(cohort):
    return {
        path.stem: path.stat().st_mtime_ns
        for path in (cohort / "results" / "receipts").glob("*.json")
    }


def test_a_cohort_with_a_broken_slide_is_done_as_far_as_possible_and_goes_on(snakemake, cohort):
    wrapper = cohort / "once.sh"
    wrapper.write_text(INTERRUPTED_ONCE)
    wrapper.chmod(0o755)
    here = ("--cores", "2", "--retries", "1")
    first = call(snakemake, cohort, *here, config=[f"wsi_run={wrapper}"])
    assert first.returncode == 1, first.stdout
    assert states(cohort) == {"a": "done", "b": "done", "c": "failed"}
    assert (cohort / "kept").exists(), "the retry did not find the half-done maps"
    before = receipts(cohort)
    assert before.keys() == {"a", "b"}
    summary = pd.read_csv(cohort / "results" / "summary.csv").set_index("slide_id")
    assert summary.status.to_dict() == {"a": "done", "b": "done", "c": "failed"}

    # What is to be done: c, for it failed; a, whose report is gone; aa, which is new. The others
    # get another number by that, which is no reason to do them again.
    shutil.copy(cohort / "slides" / "a.svs", cohort / "slides" / "c.svs")
    shutil.copy(cohort / "slides" / "b.svs", cohort / "slides" / "aa.svs")
    report = cohort / "results" / "reports" / "a.json"
    report.rename(cohort / "a.json")
    longer = "# all\nslides/c.svs\nslides/a.svs\n\nslides/b.svs\nslides/aa.svs\n"
    (cohort / "list.txt").write_text(longer)
    plan = call(snakemake, cohort, "--cores", "2", "--dry-run", config=["slides=list.txt"])
    wanted = re.findall(r"wildcards: slide_id=(\w+)", plan.stdout)
    assert sorted(wanted) == ["a", "aa", "c"], plan.stdout

    (cohort / "a.json").rename(report)
    shutil.copy(report, cohort / "results" / "receipts" / "a.json")
    again = call(snakemake, cohort, *here)
    assert again.returncode == 0, again.stdout
    assert states(cohort) == dict.fromkeys("abc", "done")
    assert receipts(cohort).keys() == {"a", "b", "c"}
    assert receipts(cohort)["b"] == before["b"]
    summary = pd.read_parquet(cohort / "results" / "summary.parquet")
    assert set(summary.status) == {"done"}


STANDS_FOR_WSI_RUN = """#!/bin/bash
# Slide number I of the list has failed if its file is absent.
while [ "$1" != --shard ]; do shift; done
names=(a b gone) name=${names[${2%/*}]}
mkdir -p results/reports
[ -e slides/$name.svs ] || exit 1
echo $name >> ran
echo "{\\"status\\": \\"done\\", \\"slide_id\\": \\"$name\\"}" > results/reports/$name.json
"""


def test_a_slide_that_is_absent_does_not_stop_the_others(snakemake, cohort):
    (cohort / "list.csv").write_text("path\nslides/gone.svs\nslides/a.svs\nslides/b.svs\n")
    script = cohort / "run.sh"
    script.write_text(STANDS_FOR_WSI_RUN)
    script.chmod(0o755)
    here = ("--cores", "1", "--retries", "0")
    config = [f"wsi_run={script}", "wsi=true"]
    first = call(snakemake, cohort, *here, config=config)
    assert first.returncode == 1, first.stdout
    assert receipts(cohort).keys() == {"a", "b"}
    # a was removed to make room, and is done; b is another slide by now.
    (cohort / "slides" / "a.svs").unlink()
    os.utime(cohort / "slides" / "b.svs", (time.time() + 9, time.time() + 9))
    plan = call(snakemake, cohort, *here, "--dry-run", config=config)
    assert sorted(re.findall(r"wildcards: slide_id=(\w+)", plan.stdout)) == ["b", "gone"]


def test_slides_are_slurm_jobs_with_the_profile(snakemake, cohort):
    if missing_programs():
        pytest.skip(f"not installed: {', '.join(missing_programs())}")
    (cohort / "list.csv").write_text("path\nslides/a.svs\nslides/c.svs\n")
    with Cluster(cohort / "cluster", cpus=4) as cluster:
        # Inside a job the plugin forgets which cluster it belongs to; a real one has a default.
        srun = cohort / "bin" / "srun"
        srun.parent.mkdir()
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={cluster.conf} exec {shutil.which("srun")} "$@"\n')
        srun.chmod(0o755)
        path = f"{srun.parent}:{OWN}/bin:{cluster.environment['PATH']}"
        run = call(
            snakemake,
            cohort,
            *("--profile", WORKFLOW / "profiles" / "slurm", "--retries", "0"),
            *("--slurm-status-command", "squeue", "--slurm-no-account"),
            *("--slurm-init-seconds-before-status-checks", "2", "--latency-wait", "5"),
            config=["mem_mb=1000"],
            environment={**cluster.environment, "PATH": path},
        )
        jobs = cluster.tasks()
    assert run.returncode == 1, run.stdout
    assert sorted(job.state for job in jobs) == ["COMPLETED", "FAILED"]
    assert states(cohort) == {"a": "done", "c": "failed"}
    assert receipts(cohort).keys() == {"a"}
    summary = pd.read_csv(cohort / "results" / "summary.csv").set_index("slide_id")
    assert summary.status.to_dict() == {"a": "done", "c": "failed"}
