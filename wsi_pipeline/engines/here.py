"""Runs the slides of a batch, one after another, on this machine.

If the network runs on another device, the CPU draws the objects of a slide while its maps
are made, and finishes its tables while the next slide is predicted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Literal

from wsi_pipeline.attempt import Attempt, record, refuse, take_lease
from wsi_pipeline.durable import partial_path, remove_tree, sweep
from wsi_pipeline.engines.folders import Folders
from wsi_pipeline.engines.watcher import Watcher
from wsi_pipeline.errors import (
    DiskFullError,
    OutOfMemoryError,
    SlideBusyError,
    SlideError,
    StoreError,
    WsiPipelineError,
)
from wsi_pipeline.filling import Predictor
from wsi_pipeline.history import deaths
from wsi_pipeline.job import RunReport, SlideJob, finished_report, read_report
from wsi_pipeline.lease import slurm_job
from wsi_pipeline.machine import pause
from wsi_pipeline.pipeline import Predicted, polygonize, predict, reopen
from wsi_pipeline.store import PredictionStore

__all__ = ["Only", "run_slides"]

Only = Literal["maps", "objects"]
"""A half of the work: what needs the network, or what needs none."""
MOST_DEATHS = 3
"""A slide at which the process was killed so often in a row is given up."""
LACKS = DiskFullError.code, OutOfMemoryError.code
"""Errors that tell nothing of what was made before them."""
ASK_AGAIN_S = 1.0
"""How often to look whether another process has done with a slide."""


def run_slides(
    jobs: Iterable[SlideJob],
    predictor: Predictor | None,
    *,
    watcher: Watcher,
    stop: Callable[[], bool],
    only: Only | None = None,
    workers: int = 1,
    overwrite: bool = False,
    retry_failed: bool = True,
    fail_fast: bool = False,
) -> list[RunReport]:
    """Run slides; a slide that fails becomes a report and the others go on.

    A slide that another process is at work on comes last, when that process has done with it.

    Args:
        jobs: one a slide; asked for one by one, when the next slide can be begun.
        predictor: the network; None with ``only="objects"``.
        watcher: told what goes on.
        stop: polled often; once it is true, running slides are interrupted, keep their
            finished blocks, and no further slide is begun.
        only: ``maps`` ends each slide when its maps are complete, ``objects`` begins it there.
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
        only=only,
        workers=workers,
        overwrite=overwrite,
        retry_failed=retry_failed,
        fail_fast=fail_fast,
    )
    # One slide at most waits for its tables, so memory stays bounded.
    allowed = 1 if run.beside else 0
    pending: deque[Future[None]] = deque()
    asked: list[str] = []
    with ThreadPoolExecutor(1, thread_name_prefix="objects") as objects:
        for job in run.in_turn(jobs):
            asked.append(job.slide_id)
            half = run.first_half(job)
            if half is not None:
                pending.append(objects.submit(run.second_half, job, *half))
            while len(pending) > allowed:
                pending.popleft().result()
        for future in pending:
            future.result()
    return [run.reports[name] for name in dict.fromkeys(asked) if name in run.reports]


@dataclass(kw_only=True)
class _Run:
    """The state of one call of :func:`run_slides`."""

    predictor: Predictor | None
    watcher: Watcher
    stop: Callable[[], bool]
    only: Only | None
    workers: int
    overwrite: bool
    retry_failed: bool
    fail_fast: bool
    reports: dict[str, RunReport] = field(default_factory=dict)
    busy: dict[SlideJob, SlideBusyError] = field(default_factory=dict)
    waited: dict[SlideJob, str | None] = field(default_factory=dict)
    """Slides that another process was at, and when the try began that had finished them before."""

    def __post_init__(self) -> None:
        self.folders = Folders(
            waiting=lambda job, what: self.watcher.advance(job, f"waiting for {what}", 0, 0),
            stop=self.stop,
        )

    @property
    def beside(self) -> bool:
        """Whether objects are extracted while the network works, on a device of its own."""
        return self.predictor is not None and self.predictor.device != "cpu"

    def enough(self) -> bool:
        """Whether no further slide is to be begun."""
        # A copy: the other thread may add a report meanwhile.
        failed = self.fail_fast and any(
            not report.as_asked for report in list(self.reports.values())
        )
        return failed or self.stop()

    def in_turn(self, jobs: Iterable[SlideJob]) -> Iterator[SlideJob]:
        """Yield the jobs that are to be begun; those of other processes once these let go."""
        for job in jobs:
            if self.enough():
                return
            yield job
        while self.busy and not self.enough():
            pause(ASK_AGAIN_S)
            for job in list(self.busy):
                if self.enough():
                    break
                self.watcher.advance(job, "waiting for another process", 0, 0)
                del self.busy[job]
                yield job
        for job, error in self.busy.items():
            self._finish(job, refuse(job, error))

    def first_half(self, job: SlideJob) -> tuple[Attempt, Predicted] | None:
        """Predict a slide; None when it has ended: settled before, failed or interrupted."""
        try:
            attempt = self._begin(job)
        except SlideBusyError as error:
            self.busy[job] = error
            before = finished_report(job)
            self.waited.setdefault(job, before.started if before else None)
            return None
        except (OSError, MemoryError, WsiPipelineError) as error:
            # Its files are of no use; other slides may go well.
            self._finish(job, refuse(job, error))
            return None
        if attempt is None:
            return None
        result: list[Predicted] = []

        def work() -> None:
            self._require_survivor(job)
            predicted = self._predict(attempt)
            if self.only == "maps":
                with attempt.stage("write"):
                    attempt.require_ours()
                    predicted.seal()
                attempt.report.left = "objects"
            result.append(predicted)

        report = record(attempt, work, last=False)
        if report is None and self.only == "maps":
            report = attempt.close("interrupted")
        if report is not None:
            self._finish(job, report)
            return None
        return attempt, result[0]

    def _predict(self, attempt: Attempt) -> Predicted:
        stop = self._stop_for(attempt)
        if self.predictor is None:
            return reopen(attempt, workers=self.workers, stop=stop)
        return predict(
            attempt,
            self.predictor,
            workers=self.workers,
            beside=self.beside and self.only is None,
            stop=stop,
            advance=self._advance_for(attempt),
        )

    def _begin(self, job: SlideJob) -> Attempt | None:
        self.folders.require(job)
        if self._passed_over(job):
            return None
        _require_slide(job)
        if self.only == "objects":
            _require_maps(job)
        with ExitStack() as stack:
            lease = take_lease(job)
            stack.callback(lease.release)
            # Another process may have done it between the first look and the lease.
            if self._passed_over(job):
                return None
            attempt = Attempt(job, lease)
            self.watcher.start(job)
            attempt.require_ours()
            if self.only != "objects":  # which replaces its tables when it has others
                _clear(job, maps=self.overwrite and _ended(job))
            _sweep(job)
            stack.pop_all()
        return attempt

    def _passed_over(self, job: SlideJob) -> bool:
        """Whether nothing is left to be done on a slide; says so."""
        settled = self._settled(job)
        if settled is None:
            return False
        if job.lease_path.exists():  # of a process that was killed after its last word
            with suppress(SlideBusyError, OSError):
                take_lease(job).release()
        if not job.keep_maps:
            remove_tree(job.maps_path)
        self._finish(job, settled, skipped=True)
        return True

    def _settled(self, job: SlideJob) -> RunReport | None:
        """Return the report of a slide on which nothing is left to be done."""
        failed = _failed_report(job)
        if self.only == "objects" and failed is not None and not job.maps_path.exists():
            return failed  # why there are no maps is worth more than that there are none
        finished = finished_report(job)
        if self.overwrite and finished is not None:
            # What another process did while this run waited for it is as new as asked for.
            anew = job in self.waited and finished.started != self.waited[job]
            return finished if anew or _made_before_restart(finished) else None
        return finished or (None if self.retry_failed or self.overwrite else failed)

    def _require_survivor(self, job: SlideJob) -> None:
        # This try has left its own "start" in the log.
        died = deaths(job) - 1
        if died >= MOST_DEATHS:
            msg = (
                f"the process was killed {died} times in a row while it was at this slide, and "
                "left no word: often that is the system, for want of memory (give the job more, "
                "or use --memory), or a fault of a library. Its log says where it was. Run the "
                "same command again to try it again."
            )
            raise WsiPipelineError(msg)

    def _stop_for(self, attempt: Attempt) -> Callable[[], bool]:
        return lambda: self.stop() or attempt.lost

    def _advance_for(self, attempt: Attempt) -> Callable[[str, int, int], None]:
        def advance(stage: str, done: int, total: int) -> None:
            attempt.advance(stage, done, total)
            self.watcher.advance(attempt.job, stage, done, total)

        return advance

    def second_half(self, job: SlideJob, attempt: Attempt, predicted: Predicted) -> None:
        """Write the tables of a predicted slide."""

        def work() -> None:
            polygonize(attempt, predicted, advance=self._advance_for(attempt))

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


def _made_before_restart(report: RunReport) -> bool:
    """Whether an earlier start of the same Slurm job did this: it is not overwritten again."""
    number, restart = slurm_job()
    return restart > 0 and report.batch_job == number


def _require_slide(job: SlideJob) -> None:
    """Refuse to take back what is done for a slide that nobody can see now.

    A disk may not be mounted, or the slide was removed to make room.

    Raises:
        SlideError: the slide is done, and its file or its mask is not there.
    """
    report = read_report(job.report_path)
    missing = job.missing_input()
    if report is not None and report.done and missing is not None:
        msg = (
            f"{missing} is not there or cannot be read, so it cannot be told whether it is still "
            "the slide whose results are in the folder; they stay as they are. Bring it back, or "
            "leave it out."
        )
        raise SlideError(msg)


def _require_maps(job: SlideJob) -> None:
    """Refuse to report on a slide that is done what can only be that there are no maps of it.

    Raises:
        StoreError: the maps that this job asks for are not there.
    """
    report = read_report(job.report_path)
    if report is None or not report.done:
        return  # whose report may say so
    try:
        store = PredictionStore.open(job.maps_path)
        if store.meta["made"].get("job") != job.job_id:
            raise StoreError(f"{job.maps_path} was made by other options, or of another slide.")
    except StoreError as error:
        msg = (
            f"{error} The tables that were made of it stay as they are; to make them again, run "
            "with --overwrite and without --only."
        )
        raise StoreError(msg) from error


def _ended(job: SlideJob) -> bool:
    """Whether the last try at this job came to an end that --overwrite throws away.

    One that was interrupted goes on, and so does one that lacked room: its maps are good.
    """
    failed = _failed_report(job)
    lacked = failed is not None and (failed.error or {}).get("code") in LACKS
    return finished_report(job) is not None or (failed is not None and not lacked)


def _clear(job: SlideJob, *, maps: bool) -> None:
    """Take back the claim and the tables.

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


def _sweep(job: SlideJob) -> None:
    """Sweep up after processes that were killed."""
    for path in (
        job.objects_path,
        job.tissue_path,
        job.preview_path,
        job.maps_path,
        job.report_path,
        job.lease_path,
        job.log_path,
    ):
        sweep(path)
