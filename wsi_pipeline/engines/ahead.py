"""The next slide of a run, made ready while the network works on the present one.

::

    network   | slide 1 . . . . . . | slide 2 . . . . . . | slide 3
    ahead        slide 2: open, tissue,   slide 3: ...
                 tiles, first batches

A slide that is ready is held by this process, and begun when its turn comes. If that does not
come, because the run stops, it is put back as if nobody had touched it. What cannot be made ready
is left to its turn, which says why: nothing that fails ahead is told to anyone.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from wsi_pipeline.attempt import Attempt
from wsi_pipeline.durable import partial_path, remove_tree
from wsi_pipeline.errors import MaskError, SlideBusyError, SlideError
from wsi_pipeline.job import SlideJob
from wsi_pipeline.pipeline import Prepared

__all__ = ["Ahead", "Ready", "put_back"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A slide that can be given to the network at once."""

    attempt: Attempt
    prepared: Prepared

    @property
    def is_sound(self) -> bool:
        """Whether it is still this process's, and its windows can be decoded."""
        feed = self.prepared.feed
        return not self.attempt.lost and (feed is None or not feed.failed)

    def put_back(self) -> None:
        """Close the slide and let others at it."""
        with suppress(Exception), self.prepared:  # that it was changed, its turn will tell
            pass
        put_back(self.attempt, made_maps=self.prepared.store is not None)


class Ahead:
    """The slides of a run in their order, the next of them made ready while one is at work.

    Not more than one slide is ready or being made so, which bounds the memory.
    """

    def __init__(
        self,
        jobs: Iterable[SlideJob],
        *,
        passes: Callable[[SlideJob], bool],
        make_ready: Callable[[SlideJob], Ready | None],
    ) -> None:
        """Begin; nothing is done before :meth:`look`.

        Args:
            jobs: asked for one by one; also from a thread, never from two at a time.
            passes: whether nothing is to be done on a slide, so that another is the next.
            make_ready: makes a slide ready; None, or raises, where that is left to its turn.
        """
        self._jobs = iter(jobs)
        self._passes = passes
        self._make_ready = make_ready
        self._seen: deque[SlideJob] = deque()
        self._ready: Ready | None = None
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None
        self._changing = threading.Lock()
        self._closed = False
        self._working = False

    def __iter__(self) -> Iterator[SlideJob]:
        """Yield the slides, each when its turn has come."""
        while True:
            self._wait()
            job = self._seen.popleft() if self._seen else next(self._jobs, None)
            if job is None:
                return
            yield job

    def look(self) -> None:
        """Begin to make the next slide ready; to be called while another is at work."""
        if self._thread is None and self._ready is None:
            thread = threading.Thread(target=self._look, name="ahead", daemon=True)
            with suppress(RuntimeError):  # no memory for another thread
                thread.start()
                self._thread = thread

    def take(self, job: SlideJob) -> Ready | None:
        """Return a slide whose turn has come, if it is ready."""
        ready = self._ready
        if ready is None or ready.attempt.job is not job:
            return None
        self._ready = None
        if ready.is_sound:
            return ready
        ready.put_back()
        return None

    def close(self) -> None:
        """Put back what is ready; no slide is begun any more."""
        with self._changing:
            self._closed = True
            working = self._working
        if working:  # who only asks for a slide may have to wait for long
            self._wait()
        ready, self._ready = self._ready, None
        if ready is not None:
            ready.put_back()

    def _wait(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def _look(self) -> None:
        try:
            while self._may(working=False):
                job = next(self._jobs, None)
                if job is None or not self._may(working=True):
                    return
                self._seen.append(job)
                if not self._is_passed(job):
                    return
        except BaseException as problem:
            self._problem = problem
        finally:
            self._working = False

    def _may(self, *, working: bool) -> bool:
        """Go on, if the run does."""
        with self._changing:
            self._working = working and not self._closed
            return not self._closed

    def _is_passed(self, job: SlideJob) -> bool:
        """Make a slide ready, if that can be; tell whether the one after it is the next."""
        try:
            if self._passes(job):
                return True
            self._ready = self._make_ready(job)
        except (SlideBusyError, SlideError, MaskError):  # it comes last, or fails in its turn
            return True
        except Exception as error:
            log.info("%s is left to its turn: %s", job.slide_id, error)
        return False


def put_back(attempt: Attempt, *, made_maps: bool) -> None:
    """Let others at a slide that was only made ready.

    Args:
        attempt: the try that ends so.
        made_maps: whether it has laid out maps, which are empty.
    """
    if made_maps and not attempt.lost:
        with suppress(OSError):
            remove_tree(partial_path(attempt.job.maps_path))
    attempt.put_back()
