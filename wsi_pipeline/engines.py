"""Runs the slides of a batch, one after another, on this machine.

If the network runs on another device, the CPU draws the objects of a slide while its maps
are made, and finishes its tables while the next slide is predicted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from wsi_pipeline.attempt import Attempt, record, refuse
from wsi_pipeline.durable import partial_path, remove_tree, sweep
from wsi_pipeline.errors import JobError
from wsi_pipeline.filling import Predictor
from wsi_pipeline.job import RunReport, SlideJob, finished_report, read_report
from wsi_pipeline.pipeline import Predicted, polygonize, predict

__all__ = ["Watcher", "run_slides"]


class Watcher(Protocol):
    """Told what goes on, from whichever thread it happens in."""

    def start(self, job: SlideJob) -> None:
        """A slide is begun."""

    def advance(self, job: SlideJob, stage: str, done: int, total: int) -> None:
        """A stage of a slide has come further; total 0 means unknown."""

    def finish(self, job: SlideJob, report: RunReport, *, skipped: bool) -> None:
        """A slide has ended, or was done before (skipped)."""


def run_slides(
    jobs: Sequence[SlideJob],
    predictor: Predictor,
    *,
    watcher: Watcher,
    stop: Callable[[], bool],
    workers: int = 1,
    overwrite: bool = False,
    retry_failed: bool = True,
    fail_fast: bool = False,
) -> list[RunReport]:
    """Run slides; a slide that fails becomes a report and the others go on.

    Args:
        jobs: one a slide.
        predictor: the network.
        watcher: told what goes on.
        stop: polled often; once it is true, running slides are interrupted, keep their
            finished blocks, and no further slide is begun.
        workers: threads that extract objects.
        overwrite: do finished slides again, from the beginning.
        retry_failed: try slides again that failed before in the same way as asked now.
        fail_fast: begin no further slide after one has failed.

    Returns:
        The reports of the slides that ended or were done before, in the order of ``jobs``.
    """
    run = _Run(
        predictor=predictor,
        watcher=watcher,
        stop=stop,
        workers=workers,
        overwrite=overwrite,
        retry_failed=retry_failed,
        fail_fast=fail_fast,
    )
    # One slide at most waits for its tables, so memory stays bounded.
    allowed = 1 if run.beside else 0
    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="objects") as objects:
        for job in jobs:
            if run.enough():
                break
            half = run.first_half(job)
            if half is not None:
                pending.append(objects.submit(run.second_half, job, *half))
            while len(pending) > allowed:
                pending.popleft().result()
        for future in pending:
            future.result()
    return [run.reports[job.slide_id] for job in jobs if job.slide_id in run.reports]


@dataclass(kw_only=True)
class _Run:
    """The state of one call of :func:`run_slides`."""

    predictor: Predictor
    watcher: Watcher
    stop: Callable[[], bool]
    workers: int
    overwrite: bool
    retry_failed: bool
    fail_fast: bool
    reports: dict[str, RunReport] = field(default_factory=dict)

    @property
    def beside(self) -> bool:
        """Whether objects are extracted while the network works, on a device of its own."""
        return self.predictor.device != "cpu"

    def enough(self) -> bool:
        """Whether no further slide is to be begun."""
        # A copy: the other thread may add a report meanwhile.
        failed = self.fail_fast and any(not report.done for report in list(self.reports.values()))
        return failed or self.stop()

    def first_half(self, job: SlideJob) -> tuple[Attempt, Predicted] | None:
        """Predict a slide; None when it has ended: settled before, failed or interrupted."""
        try:
            attempt = self._begin(job)
        except (OSError, MemoryError, JobError) as error:
            # Its files are of no use, or another process is at it; other slides may go well.
            self._finish(job, refuse(job, error))
            return None
        if attempt is None:
            return None
        result: list[Predicted] = []

        def work() -> None:
            advance = partial(self.watcher.advance, job)
            predicted = predict(
                attempt,
                self.predictor,
                workers=self.workers,
                beside=self.beside,
                stop=self.stop,
                advance=advance,
            )
            result.append(predicted)

        report = record(attempt, work, last=False)
        if report is not None:
            self._finish(job, report)
            return None
        return attempt, result[0]

    def _begin(self, job: SlideJob) -> Attempt | None:
        finished = finished_report(job)
        if not self.overwrite:
            settled = finished or (None if self.retry_failed else _failed_report(job))
            if settled is not None:
                if not job.keep_maps:
                    remove_tree(job.maps_path)
                self._finish(job, settled, skipped=True)
                return None
        self.watcher.start(job)
        attempt = Attempt(job)
        # Only what was finished is thrown away: an interrupted --overwrite goes on.
        _clear(job, maps=self.overwrite and finished is not None)
        return attempt

    def second_half(self, job: SlideJob, attempt: Attempt, predicted: Predicted) -> None:
        """Write the tables of a predicted slide."""

        def work() -> None:
            advance = partial(self.watcher.advance, job)
            polygonize(attempt, predicted, advance=advance)

        report = record(attempt, work, last=True)
        assert report is not None  # the last part always ends in a report
        self._finish(job, report)

    def _finish(self, job: SlideJob, report: RunReport, *, skipped: bool = False) -> None:
        self.reports[job.slide_id] = report
        self.watcher.finish(job, report, skipped=skipped)


def _failed_report(job: SlideJob) -> RunReport | None:
    """Return the report of this very job, if it has failed."""
    report = read_report(job.report_path)
    same = report is not None and report.job_id == job.job_id and report.status == "failed"
    return report if same else None


def _clear(job: SlideJob, *, maps: bool) -> None:
    """Take back the claim and the tables, and sweep up after processes that were killed.

    Args:
        job: what is begun.
        maps: whether finished and half-finished maps go, too.
    """
    job.report_path.unlink(missing_ok=True)
    for path in (job.objects_path, job.tissue_path, job.preview_path):
        # A table of another pixel size or mask must not outlive its report.
        path.unlink(missing_ok=True)
    if maps:
        remove_tree(partial_path(job.maps_path))
        remove_tree(job.maps_path)
    for path in (
        job.objects_path,
        job.tissue_path,
        job.preview_path,
        job.maps_path,
        job.report_path,
    ):
        sweep(path.parent, job.slide_id)
