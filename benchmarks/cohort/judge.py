"""Whether a disturbed run ended as an undisturbed one."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.cohort.slides import Cohort
from wsi_pipeline.job import file_digest, folder_facts

__all__ = ["judge"]


def judge(cohort: Cohort, results: Path, reference: Path) -> list[str]:
    """Return what is wrong with the results of a disturbed run; nothing if all is well.

    Args:
        cohort: the slides, and what is to become of each.
        results: of the disturbed run.
        reference: results of an undisturbed run.
    """
    return [
        *_wrong_ends(cohort, results, reference),
        *_done_more_than_once(cohort, results),
        *_other_bytes(cohort, results, reference),
        *_orphans(results),
        *_wrong_summary(cohort, results, reference),
    ]


def _report(results: Path, name: str) -> dict[str, Any]:
    path = results / "reports" / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"status": "missing"}
    return found


def _wrong_ends(cohort: Cohort, results: Path, reference: Path) -> list[str]:
    wrong = []
    for name in cohort.healthy:
        report, undisturbed = _report(results, name), _report(reference, name)
        # A slide that is done may bear a warning, that it is all glass.
        if report["status"] != "done" or report["error"] != undisturbed["error"]:
            wrong.append(f"{name}: {report['status']}, {report.get('error')}, should be done")
    for name, code in cohort.broken.items():
        error = _report(results, name).get("error") or {}
        if error.get("code") != code:
            wrong.append(f"{name}: {error}, should be {code}")
    return wrong


def _done_more_than_once(cohort: Cohort, results: Path) -> list[str]:
    """Find slides that were begun again after they were done, by their logs."""
    wrong = []
    for name in cohort.healthy:
        job, mine, done = _report(results, name).get("job_id"), False, 0
        for path in sorted(results.glob(f"logs/{name}.jsonl*"), reverse=True):
            for line in path.read_text(errors="replace").splitlines():
                event = _parsed(line)
                if event.get("event") == "start":
                    mine = event.get("job_id") == job
                    if mine and done:
                        wrong.append(f"{name}: begun again after it was done")
                done += mine and event.get("event") == "end" and event.get("status") == "done"
        if done > 1:
            wrong.append(f"{name}: done {done} times")
    return wrong


def _parsed(line: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:  # torn by a kill
        return {}
    return event if isinstance(event, dict) else {}


def _other_bytes(cohort: Cohort, results: Path, reference: Path) -> list[str]:
    wrong = []
    for name in cohort.healthy:
        for part in (f"objects/{name}.parquet", f"tissue/{name}.parquet", f"previews/{name}.png"):
            ours, theirs = results / part, reference / part
            if not ours.exists() or file_digest(ours) != file_digest(theirs):
                wrong.append(f"{part}: other bytes than undisturbed")
        maps = f"maps/{name}.zarr"
        if folder_facts(results / maps) != folder_facts(reference / maps):
            files = ", ".join(_other_files(results / maps, reference / maps)[:5])
            wrong.append(f"{maps}: other bytes than undisturbed: {files}")
    return wrong


def _other_files(results: Path, reference: Path) -> list[str]:
    ours, theirs = (
        {path.relative_to(root): file_digest(path) for path in root.rglob("*") if path.is_file()}
        for root in (results, reference)
    )
    names = ours.keys() | theirs.keys()
    return sorted(str(name) for name in names if ours.get(name) != theirs.get(name))


def _orphans(results: Path) -> list[str]:
    """Find what nobody will use: temporary files, leases, files of no slide."""
    wrong = [
        f"{path.relative_to(results)}: left behind"
        for path in results.rglob("*")
        if path.suffix in {".partial", ".lease"} or path.name.startswith(".")
    ]
    folders = {"objects", "tissue", "maps", "previews", "reports", "logs", "slurm"}
    files = {"run.json", "summary.parquet", "summary.csv"}
    for path in results.iterdir():
        if path.name not in folders | files:
            wrong.append(f"{path.name}: nobody knows what this is")
    return wrong


def _wrong_summary(cohort: Cohort, results: Path, reference: Path) -> list[str]:
    def totals(folder: Path) -> Counter[str]:
        counts: Counter[str] = Counter()
        with (folder / "summary.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                counts[f"slides {row['status']}"] += 1
                for key, value in row.items():
                    if key.startswith("n_") and value:
                        counts[key] += int(float(value))
        return counts

    ours, theirs = totals(results), totals(reference)
    wrong = []
    if ours != theirs:
        wrong.append(f"summary: {dict(ours)}, undisturbed {dict(theirs)}")
    if ours["slides done"] != len(cohort.healthy) or ours["slides failed"] != len(cohort.broken):
        wrong.append(f"summary: {dict(ours)} of {len(cohort.healthy)} + {len(cohort.broken)}")
    return wrong
