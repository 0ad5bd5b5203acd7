"""Runs the slides of a batch on the workers of a Dask scheduler: the side that asks.

Slides are the tasks, never tiles. If workers offer the resources ``GPU`` and ``objects``, a slide
is two tasks: its maps on a worker of the first kind, then its tables on one of the second. This
process keeps the books: what the scheduler forgets is submitted again, and what the disk says
is done is done.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_pipeline.attempt import refuse
from wsi_pipeline.engines.child import Load
from wsi_pipeline.engines.connection import Lost, ask, first_client, next_client, require
from wsi_pipeline.engines.here import Only
from wsi_pipeline.engines.tasks import Receipt, Task, Word, give_up, pass_on, run_task
from wsi_pipeline.engines.turns import in_good_order
from wsi_pipeline.engines.watcher import Watcher
from wsi_pipeline.errors import Interrupted, SlideBusyError, WsiPipelineError
from wsi_pipeline.job import RunReport, SlideJob, finished_report
from wsi_pipeline.lease import DEAD_AFTER_S, HEARTBEAT_S

if TYPE_CHECKING:
    from distributed import Client, Future

__all__ = ["PATIENCE_S", "run_on_dask"]

log = logging.getLogger(__name__)

PATIENCE_S = 300.0
"""How long a scheduler that is gone is waited for."""
RECEIPT_S = 10.0
"""How long a receipt may take from its worker to here."""
LOOK_S = 0.5
"""How often to look whether the run is to stop, or the scheduler is gone."""
MOST_SUBMISSIONS = 8
"""A slide whose task was lost so often is given up. Dask blames all tasks that it had meant for
a worker that died, so most of them are innocent; those that kill fail by themselves earlier."""
OFFERS = {"maps": "GPU", None: "GPU", "objects": "objects"}
"""Resource that a task takes one of, where workers offer it."""


def run_on_dask(
    jobs: Iterable[SlideJob],
    load: Load,
    *,
    address: str,
    device: str = "auto",
    workers: int | None = None,
    watcher: Watcher,
    stop: Callable[[], bool],
    only: Only | None = None,
    overwrite: bool = False,
    retry_failed: bool = True,
    fail_fast: bool = False,
    patience_s: float | None = None,
) -> list[RunReport]:
    """Run slides on a Dask cluster; a slide that fails becomes a report and the others go on.

    Args:
        jobs: one a slide; slides and results must lie where all workers see them.
        load: loads the network on a worker, once a process; hashable.
        address: of the scheduler, such as ``tcp://10.0.0.1:8786``.
        device: of the workers, for ``load``.
        workers: threads that extract objects without a network; None: all of a worker's.
        watcher: told what goes on, from several threads.
        stop: polled often; once it is true, the workers interrupt their slides, keep finished
            blocks, and no further slide is begun.
        only: as of ``run_slides``.
        overwrite: as of ``run_slides``.
        retry_failed: as of ``run_slides``.
        fail_fast: begin no further slide after one has failed.
        patience_s: how long to wait for a scheduler that is gone; None: :data:`PATIENCE_S`.

    Returns:
        Reports in the order of ``jobs``. If the scheduler went and did not come back, slides
        that are left have the status ``interrupted``.

    Raises:
        JobError: Dask is not installed, or nobody answers; nothing was started.
    """
    patience_s = PATIENCE_S if patience_s is None else patience_s
    wanted = [_anywhere(job) for job in jobs]
    common = {"load": load, "device": device, "workers": workers}
    common |= {"overwrite": overwrite, "retry_failed": retry_failed}
    batch = _Batch(wanted, common, watcher, stop, only=only, fail_fast=fail_fast)
    client: Client | None = first_client(address)
    while client is not None:
        try:
            batch.run(client)
            break
        except Lost as error:
            log.warning("the scheduler at %s is gone: %s", address, error.__cause__ or error)
        finally:
            with suppress(Exception):  # whatever it says: it is not needed any more
                client.close(timeout=2)
        client = None if batch.closed else next_client(address, patience_s, stop)
        if client is None and not batch.closed and not stop():
            batch.leave(address, patience_s)
    return [batch.reports[job.slide_id] for job in wanted if job.slide_id in batch.reports]


class _Batch:
    """The books of a run: what is left, what is submitted, how it ended."""

    def __init__(
        self,
        jobs: list[SlideJob],
        common: dict[str, Any],
        watcher: Watcher,
        stop: Callable[[], bool],
        *,
        only: Only | None,
        fail_fast: bool,
    ) -> None:
        innocent, suspect = in_good_order(jobs)
        self.reports: dict[str, RunReport] = {}
        self.closed = False
        """Whether no further slide is to be begun."""
        self._run = f"wsi-{uuid.uuid4().hex}"
        self._left = {job.slide_id: job for job in (*innocent, *suspect)}
        self._rank = {slide_id: -rank for rank, slide_id in enumerate(self._left)}
        self._common = common
        self._before = {
            name: _finished(job) if common["overwrite"] else None
            for name, job in self._left.items()
        }
        self._watcher = watcher
        self._stop = stop
        self._only = only
        self._fail_fast = fail_fast
        self._offers: set[str] | None = None
        self._half: dict[str, Only | None] = {}
        self._futures: dict[str, Future] = {}
        self._ended: queue.SimpleQueue[tuple[str, Future]] = queue.SimpleQueue()
        self._submissions: Counter[str] = Counter()
        self._doomed: dict[str, tuple[Exception, float]] = {}
        self._begun: set[str] = set()
        self._absent: set[str] = set()
        self._telling = threading.Lock()

    def run(self, client: Client) -> None:
        """Submit what is left, and wait for it.

        Raises:
            Lost: the scheduler is gone; what is left can be run with another client.
        """
        self._futures.clear()
        client.subscribe_topic(self._run, self._hear)
        self._learn_offers(client)
        for slide_id, job in [] if self._stop() else list(self._left.items()):
            if slide_id not in self._doomed:
                self._submit(client, job)
        looked = time.monotonic()
        while self._futures or self._doomed:
            with suppress(queue.Empty):
                self._take(client, *self._ended.get(timeout=LOOK_S))
            if time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                self._look(client)

    def leave(self, address: str, waited_s: float) -> None:
        """Report what is left when the scheduler does not come back."""
        error = Interrupted(
            f"the Dask scheduler at {address} was gone and has not answered for {waited_s:.0f} s; "
            "finished slides and blocks are kept. Run the same command again to go on"
        )
        log.error("%s", error)
        for slide_id, job in list(self._left.items()):
            if not self._found_done(job):
                self.reports[slide_id] = replace(refuse(job, error), status="interrupted")

    def _learn_offers(self, client: Client) -> None:
        """Wait for a worker, and note what resources there are."""
        said = False
        while self._offers is None and not self._stop():
            require(client)
            # It has none at all when the scheduler goes at this very moment.
            workers = ask(client.scheduler_info, n_workers=-1).get("workers")
            if workers:
                self._offers = {name for worker in workers.values() for name in worker["resources"]}
                halves = self._only is None and self._offers >= {"GPU", "objects"}
                self._half = dict.fromkeys(self._left, "maps" if halves else self._only)
                return
            if not said:
                log.warning("no worker has come to the Dask scheduler yet; waiting for one")
            said = True
            time.sleep(LOOK_S)

    def _submit(self, client: Client, job: SlideJob) -> None:
        slide_id = job.slide_id
        if self._submissions[slide_id] and self._found_done(job):
            return
        self._submissions[slide_id] += 1
        half = self._half[slide_id]
        second = half == "objects" and self._only is None
        task = Task(
            run=self._run,
            job=job,
            only=half,
            replaces=self._before[slide_id],
            # Of a slide in halves, the first takes back what was there before.
            **{**self._common, **({"overwrite": False, "retry_failed": True} if second else {})},
        )
        resource = OFFERS[half]
        future = ask(
            client.submit,
            run_task,
            task,
            key=f"wsi-{half or 'slide'}-{slide_id}-{uuid.uuid4().hex[:8]}",
            resources={resource: 1} if resource in (self._offers or ()) else None,
            priority=self._rank[slide_id],
            pure=False,
        )
        self._futures[slide_id] = future
        future.add_done_callback(partial(self._note, slide_id))

    def _note(self, slide_id: str, future: Future) -> None:
        self._ended.put((slide_id, future))

    def _take(self, client: Client, slide_id: str, future: Future) -> None:
        """Deal with a task that has ended."""
        if slide_id not in self._futures or self._futures[slide_id] is not future:
            return  # of an earlier client, or not wanted any more
        del self._futures[slide_id]
        job = self._left[slide_id]
        try:
            receipt = future.result(timeout=RECEIPT_S)
        except Exception as error:  # of Dask; those of slides are in their reports
            require(client)
            if future.status not in ("finished", "error"):
                # It may be a new one already, at the same address.
                raise Lost("it has forgotten the tasks of this run") from error
            self._lose(client, job, error)
        else:
            self._settle(client, job, receipt)

    def _lose(self, client: Client, job: SlideJob, error: Exception) -> None:
        """Submit a slide again whose task was lost with its workers, a number of times."""
        from distributed import KilledWorker

        slide_id = job.slide_id
        killed = isinstance(error, KilledWorker | OSError)
        log.warning("%s: %s: %s", slide_id, type(error).__name__, error)
        if self.closed:
            return
        if killed and self._submissions[slide_id] < MOST_SUBMISSIONS:
            self._submit(client, job)
            return
        what = "its workers died again and again" if killed else "no worker could run its task"
        failure = WsiPipelineError(f"{what}: {type(error).__name__}: {error}")
        # A worker of another machine counts as dead when its lease is old enough.
        self._doomed[slide_id] = (failure, time.monotonic() + DEAD_AFTER_S + 2 * HEARTBEAT_S)

    def _settle(self, client: Client, job: SlideJob, receipt: Receipt) -> None:
        report = receipt.report
        # What has no job_id was refused: it waited for another process when it was stopped.
        unfinished = report is None or (
            receipt.stopped and (report.status == "interrupted" or not report.job_id)
        )
        if report is not None and report.left and self._only is None:
            self._half[job.slide_id] = "objects"
            unfinished = True
        if not unfinished or (self.closed and report is not None and not report.left):
            assert report is not None
            self._finish(job, report, skipped=receipt.skipped)
        elif not self.closed:
            # Its worker was leaving, or the second half is to be done.
            self._submissions[job.slide_id] -= 1
            self._submit(client, job)

    def _finish(self, job: SlideJob, report: RunReport, *, skipped: bool) -> None:
        with self._telling:
            self._left.pop(job.slide_id)
            self.reports[job.slide_id] = report
            if not skipped and job.slide_id not in self._begun:
                self._watcher.start(job)
            self._watcher.finish(job, report, skipped=skipped)

    def _found_done(self, job: SlideJob) -> bool:
        """Finish a slide that this run has done though nobody could say so."""
        report = finished_report(job)
        if report is None or (
            self._common["overwrite"] and report.started == self._before[job.slide_id]
        ):
            return False
        self._finish(job, report, skipped=False)
        return True

    def _hear(self, event: tuple[float, dict[str, Any]]) -> None:
        """Pass on what a worker tells, in Dask's own thread."""
        facts = event[1]
        with self._telling:
            job = self._left.get(facts["slide"])
            if job is None:
                return
            if job.slide_id not in self._begun:
                self._begun.add(job.slide_id)
                self._watcher.start(job)
            if facts["event"] == "advance":
                self._watcher.advance(job, facts["stage"], facts["done"], facts["total"])

    def _look(self, client: Client) -> None:
        """Look whether the run is to end, and after slides that nobody can report."""
        failed = self._fail_fast and any(not r.as_asked for r in self.reports.values())
        self.closed = self.closed or failed or self._stop()
        require(client)
        if self.closed:
            self._wind_up(client, "stop" if self._stop() else "close")
        for slide_id, (error, until) in list(self._doomed.items()):
            job = self._left[slide_id]
            if not self._found_done(job):
                try:
                    report = give_up(job, error)
                except (SlideBusyError, OSError):
                    if time.monotonic() < until and not self.closed:
                        continue
                    report = refuse(job, error)
                self._finish(job, report, skipped=False)
            del self._doomed[slide_id]

    def _wind_up(self, client: Client, word: Word) -> None:
        """Tell all workers, and forget the tasks that no worker has."""
        ask(client.run, pass_on, self._run, word, on_error="ignore")
        assigned = {key for keys in ask(client.processing).values() for key in keys}
        absent = {
            slide_id
            for slide_id, future in self._futures.items()
            if future.key not in assigned and not future.done()
        }
        # Absent twice: the word that a task has ended may just be on its way.
        for slide_id in absent & self._absent:
            self._futures.pop(slide_id).cancel()
        self._absent = absent


def _anywhere(job: SlideJob) -> SlideJob:
    """Return the same job for a process in another folder."""
    path = job.path if "://" in job.path else str(Path(job.path).absolute())
    mask = None if job.mask is None else job.mask.absolute()
    return replace(job, path=path, out=job.out.absolute(), mask=mask)


def _finished(job: SlideJob) -> str | None:
    """Return when the try began that has finished a slide."""
    report = finished_report(job)
    return None if report is None else report.started
