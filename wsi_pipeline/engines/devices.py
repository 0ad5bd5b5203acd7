"""Runs the slides of a batch on several devices of this machine, one process a device.

All of them take their slides from one queue, the largest first; each runs them as
:func:`~wsi_pipeline.engines.here.run_slides` does, with the objects of a slide made while the
next is predicted, and the one after that made ready as long as there is one left for every
device. This process computes nothing.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from multiprocessing import connection
from types import TracebackType
from typing import Any

from wsi_pipeline.attempt import refuse
from wsi_pipeline.engines.child import Child, Load, Order
from wsi_pipeline.engines.here import MOST_DEATHS, Only
from wsi_pipeline.engines.turns import in_good_order
from wsi_pipeline.engines.watcher import Watcher
from wsi_pipeline.errors import JobError, WsiPipelineError
from wsi_pipeline.job import RunReport, SlideJob
from wsi_pipeline.redaction import LogLines

__all__ = ["run_on_devices"]

log = logging.getLogger(__name__)

LOOK_S = 0.2
"""How often to look whether the run is to stop."""
MOST_TRIES = MOST_DEATHS + 2
"""A slide whose process ended so often is not tried again, even if its log does not tell."""
MOST_IDLE_DEATHS = 3
"""A device whose processes died so often in a row without a slide in work is not used again."""


def run_on_devices(
    jobs: Iterable[SlideJob],
    load: Load,
    *,
    devices: Mapping[str, Mapping[str, str]],
    watcher: Watcher,
    stop: Callable[[], bool],
    only: Only | None = None,
    overwrite: bool = False,
    retry_failed: bool = True,
    fail_fast: bool = False,
) -> list[RunReport]:
    """Run slides on several devices; a slide that fails becomes a report and the others go on.

    A process that dies is started anew, and the slides that it had in work are done again at the
    end, each by a process of its own: so it is known which of them kills.

    Args:
        jobs: one a slide.
        load: loads the network, in the process of a device.
        devices: by name; the environment variables that its process gets, such as the one that
            lets it see no other device.
        watcher: told what goes on, in this thread.
        stop: polled often; once it is true, the processes interrupt their slides, keep finished
            blocks, and end.
        only: as of ``run_slides``.
        overwrite: as of ``run_slides``.
        retry_failed: as of ``run_slides``.
        fail_fast: begin no further slide after one has failed on whatever device.

    Returns:
        The reports of the slides that ended or were done before, in the order of ``jobs``.

    Raises:
        WsiPipelineError: no device can be used; nothing was started.
    """
    wanted = list(jobs)
    order = {
        "load": load,
        "only": only,
        "overwrite": overwrite,
        "retry_failed": retry_failed,
        "log_level": logging.getLogger().getEffectiveLevel(),
        "log_lines": _log_lines(),
    }
    with _Crew(wanted, devices, order, watcher, fail_fast=fail_fast) as crew:
        while crew.at_work:
            crew.listen(LOOK_S)
            if stop():
                crew.stop()
        crew.account_for_the_rest()
    return [crew.reports[job.slide_id] for job in wanted if job.slide_id in crew.reports]


class _Crew:
    """The processes of a run and the slides that wait for them."""

    def __init__(
        self,
        jobs: list[SlideJob],
        devices: Mapping[str, Mapping[str, str]],
        order: dict[str, Any],
        watcher: Watcher,
        *,
        fail_fast: bool,
    ) -> None:
        innocent, suspect = in_good_order(jobs)
        self.reports: dict[str, RunReport] = {}
        self._waiting, self._suspects = deque(innocent), deque(suspect)
        self._devices = dict(devices)
        self._order = order
        self._watcher = watcher
        self._fail_fast = fail_fast
        self._children: dict[connection.Connection, Child] = {}
        self._tries: Counter[str] = Counter()
        self._idle_deaths: Counter[str] = Counter()
        self._error: WsiPipelineError | None = None
        self._closed = False  # no further slide is to be begun
        self._stopping = False

    def __enter__(self) -> _Crew:
        self._hire()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        # A second Ctrl-C; otherwise all have ended.
        for child in self._children.values():
            child.end(kill=True)

    @property
    def at_work(self) -> bool:
        """Whether any process is left."""
        return bool(self._children)

    def stop(self) -> None:
        """Ask all processes to interrupt their slides."""
        if not self._stopping:
            self._stopping = self._closed = True
            for child in self._children.values():
                child.stop()

    def listen(self, seconds: float) -> None:
        """Deal with what the processes say within a time."""
        for link in connection.wait(list(self._children), timeout=seconds):
            child = self._children[link]  # type: ignore[index]
            try:
                message = child.link.recv()
            except (EOFError, OSError):  # perhaps in the middle of a message
                self._bury(child)
            else:
                self._hear(child, *message)

    def account_for_the_rest(self) -> None:
        """Report the slides for which no device was left.

        Raises:
            WsiPipelineError: there was none from the beginning.
        """
        rest = [] if self._closed else [*self._waiting, *self._suspects]
        error = self._error or JobError("the processes of all devices died; see their messages")
        if rest and not self.reports:
            raise error
        for job in rest:
            self._finish(job, refuse(job, error), skipped=False)

    def _hear(self, child: Child, kind: str, *facts: Any) -> None:  # noqa: ANN401 - see child
        if kind == "next":
            child.asks = True
        elif kind == "unable":
            (child.error,) = facts
        else:
            slide_id, *more = facts
            job = child.held[slide_id]
            child.hear_of(slide_id, kind, *more)
            if kind == "start":
                self._watcher.start(job)
            elif kind == "advance":
                self._watcher.advance(job, *more)
            else:
                self._idle_deaths[child.device] = 0
                report, skipped = more
                self._finish(job, report, skipped=skipped)
        # What a busy device made ready now, an idle one could not have.
        enough = len(self._waiting) >= len(self._devices)
        if child.asks and (enough or not child.predicting):
            child.give(self._next_for(child))

    def _next_for(self, child: Child) -> SlideJob | None:
        if self._closed:
            return None
        if self._waiting:
            return self._waiting.popleft()
        # Two at a time would make it unknown which of them kills.
        return self._suspects.popleft() if self._suspects and child.fresh else None

    def _finish(self, job: SlideJob, report: RunReport, *, skipped: bool) -> None:
        self.reports[job.slide_id] = report
        self._watcher.finish(job, report, skipped=skipped)
        if self._fail_fast and not report.as_asked and not self._closed:
            self._closed = True
            for child in self._children.values():
                child.close()

    def _bury(self, child: Child) -> None:
        """Take leave of a process that has ended, well or not."""
        del self._children[child.link]
        status = child.end()
        if child.error is not None:
            log.warning("%s is not used: %s", child.device, child.error)
            self._error = child.error
            del self._devices[child.device]
        elif status != 0 and not self._stopping:
            log.warning("%s: process %d ended with %d", child.device, child.pid, status)
            if not child.held:
                self._count_idle_death(child.device)
        for job in child.held.values():
            self._put_back(job)
        self._hire()

    def _count_idle_death(self, device: str) -> None:
        self._idle_deaths[device] += 1
        if self._idle_deaths[device] >= MOST_IDLE_DEATHS:
            log.warning("%s is not used any more: its processes die before any slide", device)
            del self._devices[device]

    def _put_back(self, job: SlideJob) -> None:
        self._tries[job.slide_id] += 1
        if self._tries[job.slide_id] < MOST_TRIES:
            self._suspects.append(job)
            return
        msg = f"its process died {MOST_TRIES} times in a row, and its log does not say where"
        self._finish(job, refuse(job, WsiPipelineError(msg)), skipped=False)

    def _hire(self) -> None:
        """Start a process for every device that has none, as long as there are slides."""
        busy = {child.device for child in self._children.values()}
        fresh = sum(child.fresh for child in self._children.values())
        for device, environment in self._devices.items():
            if self._closed or fresh >= len(self._waiting) + len(self._suspects):
                return
            if device not in busy:
                child = Child(Order(device=device, **self._order), environment)
                self._children[child.link] = child
                fresh += 1


def _log_lines() -> LogLines | None:
    """Return how this process writes its log, if that is a way of ours."""
    formatters = (handler.formatter for handler in logging.getLogger().handlers)
    return next((own for own in formatters if isinstance(own, LogLines)), None)
