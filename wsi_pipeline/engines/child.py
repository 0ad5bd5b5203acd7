"""A process that runs slides for another one, its parent, on a device of its own.

They talk through a pipe that only the two of them hold, so one that is killed leaves no lock::

    parent -> child    an Order; then slides, None when there are no more; "close" (begin none of
                       those that you have), or "stop"
    child  -> parent   "next", and what a Watcher is told; or "unable" and why

A child asks for the next slide while it predicts one, to make it ready. It may have to wait for
the answer until it has predicted that one, so that other devices get what is left.

The child heeds no signal: a terminal's Ctrl-C and a cluster's SIGTERM reach parent and children
alike, and it is the parent who decides what they mean. When the parent is gone, the child keeps
its finished blocks and ends.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from wsi_pipeline.engines.here import Only, run_slides
from wsi_pipeline.errors import JobError, WsiPipelineError
from wsi_pipeline.filling import Predictor
from wsi_pipeline.job import RunReport, SlideJob
from wsi_pipeline.machine import use_few_heaps
from wsi_pipeline.redaction import LogLines

__all__ = ["Child", "Load", "Order", "serve"]

Load = Callable[[str], Predictor]
"""Loads the network on a device; it is sent to another process, so it must be small."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_STOP, _CLOSE = "stop", "close"


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a child is told first: what all its slides have in common."""

    device: str
    load: Load
    only: Only | None
    overwrite: bool
    retry_failed: bool
    log_level: int
    log_lines: LogLines | None
    """How the parent writes its log; the child's goes to the same place."""


class Child:
    """A child as its parent sees it."""

    def __init__(self, order: Order, environment: Mapping[str, str]) -> None:
        """Start a process; it begins to load the network at once.

        It is a fresh interpreter: CUDA does not survive a fork, and a caller's script is not run
        again, as it is by ``multiprocessing``.

        Args:
            order: what its slides have in common.
            environment: variables that it has beside those of this process.
        """
        self.device = order.device
        self.held: dict[str, SlideJob] = {}
        """Slides that it was given and that have not ended."""
        self.predicting: set[str] = set()
        """Those of them that it has begun and whose maps are not known to be complete."""
        self.asks = False
        """Whether it waits for a slide."""
        self.fresh = True
        """Whether it was never given a slide."""
        self.error: WsiPipelineError | None = None
        """Why it cannot work at all."""
        self.link, theirs = Pipe()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from wsi_pipeline.engines.child import serve; serve({theirs.fileno()})"
        )
        # A signal that comes before the child has its say would kill it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
                pass_fds=[theirs.fileno()],
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self._send(order)

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def give(self, job: SlideJob | None) -> None:
        """Hand it a slide, or say that there are no more."""
        self.fresh = self.asks = False
        if job is not None:
            self.held[job.slide_id] = job
        self._send(job)

    def hear_of(self, slide_id: str, kind: str, *facts: object) -> None:
        """Note what it says of a slide: the arguments are those of a Watcher."""
        if kind == "start":
            self.predicting.add(slide_id)
        elif kind == "finish":
            del self.held[slide_id]
            self.predicting.discard(slide_id)
        else:
            stage, done, total = facts
            if stage != "predict" or done == total:
                self.predicting.discard(slide_id)

    def close(self) -> None:
        """Ask it to begin no further slide."""
        self._send(_CLOSE)

    def stop(self) -> None:
        """Ask it to keep its finished blocks and end."""
        self._send(_STOP)

    def end(self, *, kill: bool = False) -> int:
        """Wait for its end, or bring it about; return its exit status, negative for a signal."""
        if kill:
            self._process.kill()
        status = self._process.wait()
        self.link.close()
        return status

    def _send(self, message: object) -> None:
        with suppress(OSError):  # it has ended, and the parent will hear of it
            self.link.send(message)


def serve(descriptor: int) -> None:
    """Be a child: the whole life of its process.

    Args:
        descriptor: of its end of the pipe.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    use_few_heaps()
    parent = _Parent(Connection(descriptor))
    order = parent.order
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(order.log_lines or logging.Formatter(logging.BASIC_FORMAT))
    logging.basicConfig(level=order.log_level, handlers=[handler])
    try:
        predictor = order.load(order.device)
    except WsiPipelineError as error:
        parent.tell("unable", error)
        return
    except Exception as error:  # of CUDA, say, whose errors cannot be sent
        parent.tell("unable", JobError(f"{order.device}: {type(error).__name__}: {error}"))
        return
    run_slides(
        parent.jobs(),
        predictor,
        watcher=parent,
        stop=parent.stopped.is_set,
        only=order.only,
        workers=predictor.extractors,
        overwrite=order.overwrite,
        retry_failed=order.retry_failed,
        closed=parent.closed.is_set,
    )


class _Parent:
    """The parent as a child sees it: where slides come from, and who watches."""

    def __init__(self, link: Connection) -> None:
        self.stopped = threading.Event()
        self.closed = threading.Event()
        self.order: Order = link.recv()
        self._link = link
        self._sending = threading.Lock()
        self._jobs: queue.SimpleQueue[SlideJob | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="parent", daemon=True).start()

    def jobs(self) -> Iterator[SlideJob]:
        """Yield slides as long as there are any, each when it is asked for."""
        while not self.stopped.is_set():
            self.tell("next")
            job = self._jobs.get()
            if job is None:
                return
            yield job

    def start(self, job: SlideJob) -> None:
        """A slide is begun."""
        self.tell("start", job.slide_id)

    def advance(self, job: SlideJob, stage: str, done: int, total: int) -> None:
        """A stage of a slide has come further."""
        self.tell("advance", job.slide_id, stage, done, total)

    def finish(self, job: SlideJob, report: RunReport, *, skipped: bool) -> None:
        """A slide has ended."""
        self.tell("finish", job.slide_id, report, skipped)

    def tell(self, *message: object) -> None:
        """Send a message, from whichever thread."""
        with self._sending, suppress(OSError):  # nobody is left to be told
            self._link.send(message)

    def _listen(self) -> None:
        while True:
            try:
                message = self._link.recv()
            except (EOFError, OSError):
                message = _STOP
            if message == _STOP:
                self.stopped.set()
                self._jobs.put(None)
                return
            if message == _CLOSE:
                self.closed.set()
            else:
                self._jobs.put(message)
