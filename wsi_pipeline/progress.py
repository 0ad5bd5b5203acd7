"""What a person (or a log file) sees while slides run, and the table at the end."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console, Group
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from wsi_pipeline.job import RunReport, SlideJob
from wsi_pipeline.pace import duration

__all__ = ["BarWatcher", "LineWatcher", "describe", "final_table"]

_ORDER = {"done": 0, "interrupted": 1, "failed": 2}
LINE_EVERY_S = 30.0
"""How often a slide in progress gets a line where bars cannot be drawn."""


class LineWatcher:
    """One line an event, as text or JSON: for logs and array jobs."""

    def __init__(
        self, total: int, *, json_lines: bool = False, stream: TextIO | None = None
    ) -> None:
        self._total = total
        self._json = json_lines
        self._stream = stream or sys.stderr
        self._ended = 0
        self._worked = 0
        self._begun = time.monotonic()
        self._last_line = 0.0
        self._lock = threading.Lock()

    def start(self, job: SlideJob) -> None:
        """Name the slide that is begun."""
        self._say(f"{job.slide_id}: begun", event="start", slide_id=job.slide_id)

    def advance(self, job: SlideJob, stage: str, done: int, total: int) -> None:
        """Say how far the slide is, every now and then."""
        now = time.monotonic()
        with self._lock:
            if now - self._last_line < LINE_EVERY_S:
                return
            self._last_line = now
        of = f" of {total}" if total else ""
        self._say(
            f"{job.slide_id}: {stage} {done}{of}",
            event="progress",
            slide_id=job.slide_id,
            stage=stage,
            done=done,
            total=total,
        )

    def finish(self, job: SlideJob, report: RunReport, *, skipped: bool) -> None:
        """Say how the slide ended."""
        with self._lock:
            self._ended += 1
            self._worked += not skipped
            ended = self._ended
        # Slides that were done before say nothing about how long the others take.
        each = (time.monotonic() - self._begun) / max(1, self._worked)
        left = each * (self._total - ended) if self._worked else 0.0
        self._say(
            f"[{ended}/{self._total}] {describe(report, skipped=skipped)}"
            + (f", about {duration(left)} left" if left else ""),
            event="end",
            slide_id=job.slide_id,
            status=report.status,
            skipped=skipped,
            error=report.error,
            counts=report.counts,
            seconds=report.seconds.get("total"),
            seconds_left=round(left, 1),
        )

    def close(self) -> None:
        """Nothing to tidy up."""

    def _say(self, text: str, **facts: object) -> None:
        line = (json.dumps(facts) if self._json else text) + "\n"
        with self._lock:  # lines of several threads must not mix
            self._stream.write(line)
            self._stream.flush()


class BarWatcher:
    """A bar for the batch and one for each slide in work."""

    def __init__(self, total: int, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._batch = self._progress.add_task("slides", total=total)
        self._slides: dict[str, TaskID] = {}
        self._progress.start()

    def start(self, job: SlideJob) -> None:
        """Draw the bar of a slide."""
        self._slides[job.slide_id] = self._progress.add_task(f"{job.slide_id}: open", total=None)

    def advance(self, job: SlideJob, stage: str, done: int, total: int) -> None:
        """Move the bar of a slide."""
        task = self._slides.get(job.slide_id)
        if task is not None:
            self._progress.update(
                task, description=f"{job.slide_id}: {stage}", completed=done, total=total or None
            )

    def finish(self, job: SlideJob, report: RunReport, *, skipped: bool) -> None:
        """Replace the bar of a slide by a line, and move that of the batch."""
        task = self._slides.pop(job.slide_id, None)
        if task is not None:
            self._progress.remove_task(task)
        self._progress.advance(self._batch)
        colour = {"done": "green", "failed": "red", "interrupted": "yellow"}[report.status]
        line = describe(report, skipped=skipped)
        self._console.print(line, style=colour, markup=False, highlight=False)

    def close(self) -> None:
        """Take the bars away."""
        self._progress.stop()


def describe(report: RunReport, *, skipped: bool = False) -> str:
    """Return one line on how a slide ended."""
    if skipped and report.done:
        return f"{report.slide_id}: was done before"
    if not report.done:
        detail = f" ({report.reason})" if report.reason else ""
        return f"{report.slide_id}: {report.status}{detail}"
    counts = ", ".join(f"{number:,} {kind}" for kind, number in report.counts.items())
    warnings = "".join(f"; {warning['code']}" for warning in report.warnings)
    seconds = report.seconds["total"]
    area = f"{report.tissue_mm2:.2f} mm2"
    return f"{report.slide_id}: done, {counts}, {area} in {seconds:.1f} s{warnings}"


def final_table(reports: Sequence[RunReport]) -> Group:
    """Return the end of a run: a table with failed slides last, and below it their reasons."""
    ordered = sorted(reports, key=lambda r: _ORDER.get(r.status, len(_ORDER)))
    kinds = list(dict.fromkeys(kind for report in ordered for kind in report.counts))
    table = Table()
    table.add_column("slide", overflow="fold")
    table.add_column("state")
    for name in ("mm2", *kinds, "seconds"):
        table.add_column(name, justify="right")
    table.add_column("note", overflow="fold")
    for report in ordered:
        codes = [report.error["code"]] if report.error else [w["code"] for w in report.warnings]
        table.add_row(
            report.slide_id,
            report.status,
            f"{report.tissue_mm2:.2f}" if report.done else "",
            *(f"{report.counts[k]:,}" if k in report.counts else "" for k in kinds),
            f"{report.seconds['total']:.1f}",
            ", ".join(codes),
        )
    reasons = [Text(f"{r.slide_id}: {r.reason}") for r in ordered if r.reason]
    return Group(table, *reasons)
