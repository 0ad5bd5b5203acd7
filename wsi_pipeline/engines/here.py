"""Runs the slides of a batch, one after another, on this machine.

If the network runs on another device, the CPU draws the objects of a slide while its maps
are made, and finishes its tables while the next slide is predicted; meanwhile the one after
that is made ready.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from wsi_pipeline.attempt import Attempt, record, refuse, take_lease
from wsi_pipeline.durable import partial_path, remove_tree
from wsi_pipeline.engines.ahead import Ahead, Ready, put_back
from wsi_pipeline.engines.earlier import (
    clear,
    ended,
    failed_report,
    made_before_restart,
    require_maps,
    require_slide,
    sweep_up,
)
from wsi_pipeline.engines.folders import Folders
from wsi_pipeline.engines.watcher import Watcher
from wsi_pipeline.errors import SlideBusyError, WsiPipelineError
from wsi_pipeline.filling import Predictor
from wsi_pipeline.history import deaths, suspected
from wsi_pipeline.job import RunReport, SlideJob, finished_report
from wsi_pipeline.machine import pause, release_memory
from wsi_pipeline.pipeline import Predicted, Prepared, polygonize, predict, prepare, reopen

__all__ = ["Only", "run_slides"]

Only = Literal["maps", "objects"]
"""A half of the work: what needs the network, or what needs none."""
MOST_DEATHS = 3
"""A slide at which the process was killed so often in a row is given up."""
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
    closed: Callable[[], bool] = lambda: False,
    ahead: bool | None = None,
) -> list[RunReport]:
    """Run slides; a slide that fails becomes a report and the others go on.

    A slide that another process is at work on comes last, when that process has done with it.

    Args:
        jobs: one a slide; asked for one by one, when the next slide can be begun or, ahead of
            that, made ready; from a thread then.
        predictor: the network; None with ``only="objects"``.
        watcher: told what goes on.
        stop: polled often; once it is true, running slides are interrupted, keep their
            finished blocks, and no further slide is begun.
        only: ``maps`` ends each slide when its maps are complete, ``objects`` begins it there.
        workers: threads that extract objects.
        overwrite: do finished slides again, from the beginning.
        retry_failed: try slides again that failed before in the same way as asked now.
        fail_fast: begin no further slide after one has failed.
        closed: polled; once it is true, no further slide is begun.
        ahead: whether the next slide is opened, and its first windows are decoded, while one is
            predicted; None: where the network runs on a device of its own.

    Returns:
        The reports of the slides that ended or were done before, in the order of ``jobs``.
    """
    run = _Run(
        jobs=jobs,
        predictor=predictor,
        watcher=watcher,
        stop=stop,
        only=only,
        workers=workers,
        overwrite=overwrite,
        retry_failed=retry_failed,
        fail_fast=fail_fast,
        closed=closed,
        ahead=ahead,
    )
    # One slide at most waits for its tables, so memory stays bounded.
    allowed = 1 if run.beside else 0
    pending: deque[Future[None]] = deque()
    asked: list[str] = []
    with ThreadPoolExecutor(1, thread_name_prefix="objects") as objects:

        def begin(job: SlideJob) -> None:
            # What is known of a slide (a hundred megabytes of its maps) ends with this call and
            # its second half: the next slide must not find it in memory, nor in a cycle.
            half = run.first_half(job)
            if half is not None:
                pending.append(objects.submit(run.second_half, job, *half))

        with closing(run.slides):
            for job in run.in_turn():
                asked.append(job.slide_id)
                begin(job)
                while len(pending) > allowed:
                    pending.popleft().result()
                run.forget_failed()
                release_memory()
        for future in pending:
            future.result()
    return [run.reports[name] for name in dict.fromkeys(asked) if name in run.reports]


@dataclass(kw_only=True)
class _Run:
    """The state of one call of :func:`run_slides`."""

    jobs: Iterable[SlideJob]
    predictor: Predictor | None
    watcher: Watcher
    stop: Callable[[], bool]
    only: Only | None
    workers: int
    overwrite: bool
    retry_failed: bool
    fail_fast: bool
    closed: Callable[[], bool]
    ahead: bool | None
    reports: dict[str, RunReport] = field(default_factory=dict)
    has_failed: bool = False
    """Whether a slide has failed whose memory is not given back."""
    busy: dict[SlideJob, SlideBusyError] = field(default_factory=dict)
    waited: dict[SlideJob, str | None] = field(default_factory=dict)
    """Slides that another process was at, and when the try began that had finished them before."""

    def __post_init__(self) -> None:
        self.folders = Folders(
            waiting=lambda job, what: self.watcher.advance(job, f"waiting for {what}", 0, 0),
            stop=self.stop,
        )
        self.slides = Ahead(
            self.jobs,
            passes=lambda job: self._settled(job) is not None,
            make_ready=self._make_ready,
        )

    @property
    def beside(self) -> bool:
        """Whether objects are extracted while the network works, on a device of its own."""
        return self.predictor is not None and self.predictor.device != "cpu"

    @property
    def looks_ahead(self) -> bool:
        """Whether the next slide is made ready while one is predicted."""
        return self.only != "objects" and (self.beside if self.ahead is None else self.ahead)

    def enough(self) -> bool:
        """Whether no further slide is to be begun."""
        # A copy: the other thread may add a report meanwhile.
        failed = self.fail_fast and any(
            not report.as_asked for report in list(self.reports.values())
        )
        # Its device is of no use to this process any more: the other slides would fail, too.
        lost = getattr(self.predictor, "is_lost", False)
        return failed or lost or self.closed() or self.stop()

    def forget_failed(self) -> None:
        """Let slides go that failed since the last call: tracebacks hold them, and themselves."""
        if self.has_failed:
            self.has_failed = False
            gc.collect()

    def in_turn(self) -> Iterator[SlideJob]:
        """Yield the jobs that are to be begun; those of other processes once these let go."""
        for job in self.slides:
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
        suspect = bool(suspected(job))
        try:
            begun = self._begin(job)
        except SlideBusyError as error:
            self.busy[job] = error
            before = finished_report(job)
            self.waited.setdefault(job, before.started if before else None)
            self.watcher.advance(job, "waiting for another process", 0, 0)
            return None
        except (OSError, MemoryError, WsiPipelineError) as error:
            # Its files are of no use; other slides may go well.
            self._finish(job, refuse(job, error))
            return None
        if begun is None:
            return None
        attempt, prepared = begun
        # Beside one that may kill its process nothing is done, so that it is known which does.
        alone = suspect and prepared is None
        result: list[Predicted] = []

        def work() -> None:
            predicted = self._predict(attempt, prepared, alone=alone)
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

    def _predict(self, attempt: Attempt, prepared: Prepared | None, *, alone: bool) -> Predicted:
        stop = self._stop_for(attempt)
        if prepared is None:
            self._require_survivor(attempt.job)
        if self.predictor is None:
            return reopen(attempt, workers=self.workers, stop=stop)
        with prepared or prepare(attempt, self.predictor) as ready:
            if self.looks_ahead and not alone:
                self.slides.look()
            return predict(
                attempt,
                ready,
                self.predictor,
                workers=self.workers,
                beside=self.beside and self.only is None,
                stop=stop,
                advance=self._advance_for(attempt),
            )

    def _begin(self, job: SlideJob) -> tuple[Attempt, Prepared | None] | None:
        with ExitStack() as stack:
            ready = self.slides.take(job)
            if ready is not None:
                stack.callback(ready.put_back)
            self.folders.require(job)
            if ready is None and self._passed_over(job):
                return None
            require_slide(job)
            if self.only == "objects":
                require_maps(job)
            if ready is None:
                lease = take_lease(job)
                stack.callback(lease.release)
                # Another process may have done it between the first look and the lease.
                if self._passed_over(job):
                    return None
                attempt = Attempt(job, lease)
            else:
                attempt = ready.attempt
                attempt.begin()
            self.watcher.start(job)
            attempt.require_ours()
            if self.only != "objects":  # which replaces its tables when it has others
                clear(job, maps=self._is_anew(job))
            sweep_up(job)
            stack.pop_all()
        return attempt, ready.prepared if ready else None

    def _make_ready(self, job: SlideJob) -> Ready | None:
        """Make a slide ready for its turn; None where that is left to the turn.

        Results that it has stay until then, and so do maps: those that another try has begun are
        opened in its turn.

        Raises:
            Exception: whatever is wrong, which its turn will tell.
        """
        assert self.predictor is not None  # without a network, nothing is done ahead
        if suspected(job) or not self.folders.are_there(job):
            return None
        require_slide(job)
        with ExitStack() as stack:
            lease = take_lease(job)
            stack.callback(lease.release)
            anew = self._is_anew(job)
            maps = job.maps_path, partial_path(job.maps_path)
            if self._settled(job) is not None or (not anew and any(map(Path.exists, maps))):
                return None
            attempt = Attempt(job, lease, ahead=True)
            stack.callback(put_back, attempt, made_maps=not anew)
            prepared = prepare(attempt, self.predictor, anew=anew)
            attempt.stand_by()
            stack.pop_all()
        return Ready(attempt=attempt, prepared=prepared)

    def _is_anew(self, job: SlideJob) -> bool:
        """Whether a slide is begun without the maps that there are."""
        return self.overwrite and ended(job)

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
        failed = failed_report(job)
        if self.only == "objects" and failed is not None and not job.maps_path.exists():
            return failed  # why there are no maps is worth more than that there are none
        finished = finished_report(job)
        if self.overwrite and finished is not None:
            # What another process did while this run waited for it is as new as asked for.
            anew = job in self.waited and finished.started != self.waited[job]
            return finished if anew or made_before_restart(finished) else None
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
        self.has_failed = self.has_failed or report.error is not None
        self.watcher.finish(job, report, skipped=skipped)
