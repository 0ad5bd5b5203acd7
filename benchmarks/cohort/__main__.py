"""Command line of the rehearsal."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cluster import Cluster
from benchmarks.cohort.judge import judge
from benchmarks.cohort.places import ReadErrors, SmallDisk
from benchmarks.cohort.projection import project
from benchmarks.cohort.rounds import clear, prepare_path, run_disturbed, run_undisturbed
from benchmarks.cohort.scale import time_commands
from benchmarks.cohort.slides import Cohort, make_cohort

SLIDES_SEED = 1


def rehearse(
    folder: Path, *, slides: int, tasks: int, seed: int, every_s: float, disk_mb: int
) -> tuple[dict[str, Any], list[str]]:
    """Run a cohort twice, the second time while faults are injected.

    Args:
        folder: for slides, results, and the cluster's state.
        slides: how many.
        tasks: of the array.
        seed: of the faults; the slides are always the same.
        every_s: seconds between faults, on average.
        disk_mb: of the disk for the disturbed results.

    Returns:
        What was measured, and what is wrong with the results.
    """
    cohort = make_cohort(folder / "slides", slides, seed=SLIDES_SEED)
    reference, results = folder / "undisturbed", folder / "disturbed"
    for old in (folder / "rough", folder / "cluster"):
        clear(old)
    print(f"{slides} slides, {len(cohort.broken)} of them broken", flush=True)
    with Cluster(folder / "cluster", cpus=2, max_array=1001) as cluster:
        calm = _undisturbed(cluster, cohort, reference, tasks=tasks)
        print(f"undisturbed: {calm['states']} in {calm['seconds']:.0f} s", flush=True)
        reading = ReadErrors(folder / "rough")
        if not reading.available:
            print("no C compiler (cc): there will be no read errors", flush=True)
        environment = prepare_path(folder / "rough", skewed=True, reading=reading)
        with SmallDisk(results, disk_mb) as disk:
            rounds, faults = run_disturbed(
                cluster,
                cohort,
                disk,
                reading,
                tasks=tasks,
                environment=environment,
                every_s=every_s,
                rng=np.random.default_rng(seed),
            )
            wrong = judge(cohort, results, reference)
    measured = {
        "slides": slides,
        "broken": len(cohort.broken),
        "seed": seed,
        "undisturbed": calm,
        "rounds": [asdict(one) for one in rounds],
        "faults": dict(faults.counts),
        "killed_or_stopped_runs": _ended_badly(folder / "rough" / "times.txt"),
        "wrong": len(wrong),
    }
    return measured, wrong


def _undisturbed(
    cluster: Cluster, cohort: Cohort, reference: Path, *, tasks: int
) -> dict[str, Any]:
    """Run the cohort undisturbed, or take what an earlier rehearsal of the same slides left."""
    place = reference.with_name("calm")
    kept, asked = place / "measured.json", (cohort.folder / "cohort.json").read_text()
    if kept.exists():
        measured = json.loads(kept.read_text())
        if measured.pop("cohort") == asked:
            return dict(measured)
    for old in (reference, place):
        clear(old)
    environment = prepare_path(place, skewed=False)
    calm = run_undisturbed(cluster, cohort, reference, tasks=tasks, environment=environment)
    measured = {**asdict(calm), **_overhead(cohort, reference, place)}
    kept.write_text(json.dumps({**measured, "cohort": asked}))
    return measured


def _times(path: Path) -> list[tuple[float, int]]:
    """Return how long each run of wsi-run took in a job, and its exit code."""
    lines = [line.split() for line in path.read_text().splitlines()]
    return [(float(end) - float(begun), int(code)) for begun, end, code in lines]


def _ended_badly(path: Path) -> int:
    return sum(code not in (0, 1) for _, code in _times(path))


def _overhead(cohort: Cohort, results: Path, place: Path) -> dict[str, float]:
    """Return what was spent beside the slides themselves, in seconds a slide."""
    worked = 0.0
    for name in (*cohort.healthy, *cohort.broken):
        report = json.loads((results / "reports" / f"{name}.json").read_text())
        worked += report["seconds"]["total"]
    # submit's own listing of the slides is no task, but ours, too.
    ran = sum(seconds for seconds, _ in _times(place / "times.txt"))
    number = len(cohort.healthy) + len(cohort.broken)
    return {
        "slide_seconds": round(worked / number, 3),
        "own_overhead_s_per_slide": round((ran - worked) / number, 3),
    }


def main() -> None:
    """Rehearse, project or time; print what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cohort", description=__doc__)
    parser.add_argument("--slides", type=int, default=599)
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=float, default=6.0, help="seconds between faults")
    parser.add_argument("--disk-mb", type=int, default=2000)
    parser.add_argument("--folder", type=Path, default=Path("rehearsal"))
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    parser.add_argument("--project", type=Path, nargs="+", metavar="RESULTS")
    parser.add_argument("--scale", type=int, metavar="SLIDES")
    asked = parser.parse_args()
    wrong: list[str] = []
    # So that daemons and mounts do not outlive a rehearsal that is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if asked.project:
        measured = project(asked.project)
    elif asked.scale:
        measured = time_commands(asked.folder, asked.scale)
    else:
        measured, wrong = rehearse(
            asked.folder.absolute(),
            slides=asked.slides,
            tasks=asked.tasks,
            seed=asked.seed,
            every_s=asked.every,
            disk_mb=asked.disk_mb,
        )
    for line in wrong[:50]:
        print(f"WRONG  {line}")
    print(json.dumps(measured, indent=2))
    if asked.json:
        asked.json.write_text(json.dumps(measured, indent=2) + "\n")
    if not (asked.project or asked.scale):
        print(f"nothing lost: {'NO' if wrong else 'yes'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
