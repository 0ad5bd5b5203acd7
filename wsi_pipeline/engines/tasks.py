"""What a Dask worker does with a slide: run it, say how far it is, return a receipt.

Results are files that the task writes itself; what goes back over the scheduler is the slide's
report. So nothing is lost with a worker but what it had in work, and a task that is run again
finds what is done.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from wsi_pipeline.attempt import Attempt, record, refuse
from wsi_pipeline.engines.child import Load
from wsi_pipeline.engines.here import Only, run_slides
from wsi_pipeline.errors import JobError, SlideBusyError
from wsi_pipeline.filling import Predictor
from wsi_pipeline.job import RunReport, SlideJob, finished_report
from wsi_pipeline.machine import available_cpus

__all__ = ["Receipt", "Task", "Word", "give_up", "pass_on", "run_task"]

Word = Literal["close", "stop"]
"""For all workers of a run: begin no further slide; or interrupt those in work, too."""
SAY_EVERY_S = 1.0
"""How often a slide in work says how far it is."""

_words: dict[str, Word] = {}
_loading = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Task:
    """A slide, or half of its work, for a worker."""

    run: str
    """Which run it belongs to; its events have this topic."""
    job: SlideJob
    load: Load
    """Equal for all tasks of a run, so that a worker keeps the network."""
    device: str
    """On which device of the worker it runs."""
    only: Only | None
    workers: int | None
    """Threads that extract objects without a network; None: all processors of the worker."""
    overwrite: bool
    replaces: str | None
    """With ``overwrite``: when the finished try began that is to be done again. A finished one
    that began at another time is of this run."""
    retry_failed: bool


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """How a task ended."""

    report: RunReport | None
    """None: it was not begun."""
    skipped: bool = False
    """Whether the slide was done before."""
    stopped: bool = False
    """Whether the task was told to stop, or its worker is going away."""


def run_task(task: Task) -> Receipt:
    """Run a slide on this Dask worker; never raises for what is wrong with a slide."""
    teller = _Teller(task)
    if task.run in _words or teller.leaving():
        return Receipt(report=None, stopped=True)
    job = task.job
    if not job.out.is_dir():
        msg = (
            f"{socket.gethostname()} does not see the results folder {job.out}; it must lie on a "
            "disk that all workers and this command share"
        )
        return Receipt(report=refuse(job, JobError(msg)))
    try:
        predictor = None if task.only == "objects" else _network(task.load, task.device)
    except Exception as error:  # whatever is wrong with this machine: not with the slide
        return _unable(task, error)
    extractors = task.workers or available_cpus()
    reports = run_slides(
        [job],
        predictor,
        watcher=teller,
        stop=teller.stop,
        only=task.only,
        workers=predictor.extractors if predictor else extractors,
        overwrite=_again(task),
        retry_failed=task.retry_failed,
    )
    return Receipt(
        report=reports[0] if reports else None, skipped=teller.skipped, stopped=teller.stop()
    )


def pass_on(run: str, word: Word) -> None:
    """Let the tasks of a run know a word, in this worker's process."""
    _words[run] = word


def give_up(job: SlideJob, error: Exception) -> RunReport:
    """Put on record that a slide has failed where no try of it could say so itself.

    Raises:
        SlideBusyError: a process is at work on it, or has died on another machine just now.
        OSError: the results folder is of no use.
    """
    attempt = Attempt(job)

    def fail() -> None:
        raise error

    report = record(attempt, fail, last=True)
    assert report is not None  # the last part always ends in a report
    return report


class _Teller:
    """Tells the run's watcher, far away, and asks whether to stop, near by."""

    def __init__(self, task: Task) -> None:
        from distributed import get_worker

        self.skipped = False
        self._run = task.run
        self._worker = get_worker()
        self._said = 0.0

    def leaving(self) -> bool:
        """Whether this worker closes: its time is over, or its scheduler is gone."""
        return self._worker.status.name not in ("init", "running", "paused")

    def stop(self) -> bool:
        """Whether to interrupt the slide."""
        return _words.get(self._run) == "stop" or self.leaving()

    def start(self, job: SlideJob) -> None:
        """A slide is begun."""
        self._say(slide=job.slide_id, event="start")

    def advance(self, job: SlideJob, stage: str, done: int, total: int) -> None:
        """A stage of a slide has come further."""
        now = time.monotonic()
        if now - self._said > SAY_EVERY_S:
            self._said = now
            self._say(slide=job.slide_id, event="advance", stage=stage, done=done, total=total)

    def finish(self, job: SlideJob, report: RunReport, *, skipped: bool) -> None:
        """A slide has ended; the receipt tells how."""
        self.skipped = skipped

    def _say(self, **facts: object) -> None:
        with suppress(Exception):  # a scheduler that is gone must not fail the slide
            self._worker.log_event(self._run, facts)


def _network(load: Load, device: str) -> Predictor:
    with _loading:  # a worker may have several threads
        return _kept(load, device)


@lru_cache(maxsize=1)
def _kept(load: Callable[[str], Any], device: str) -> Predictor:
    """Return a network that stays in this process; of another run, it makes room."""
    predictor: Predictor = load(device)
    return predictor


def _again(task: Task) -> bool:
    """Tell whether a slide is to be done again though it is done."""
    done = finished_report(task.job) if task.overwrite else None
    return task.overwrite and (done is None or done.started == task.replaces)


def _unable(task: Task, error: Exception) -> Receipt:
    """Return the receipt of a slide for which this worker has no network."""
    done = finished_report(task.job)
    if done is not None:
        again = _again(task)
        return Receipt(report=refuse(task.job, error) if again else done, skipped=not again)
    try:
        return Receipt(report=give_up(task.job, error))
    except (SlideBusyError, OSError):
        return Receipt(report=refuse(task.job, error))
