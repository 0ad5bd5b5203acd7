"""Blocks on their way to the disk: written by several threads, committed by one, in groups.

::

    hand -> writers: compress, write, let go of the pixels
                |
                v  what was written while the disk was busy with one group is the next one
            committer: waits for the disk, marks them all

So the slower the disk, the larger the groups, and a lone block is committed at once. Neither
whoever hands blocks over nor the writers wait for the disk, unless it is far behind.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

from wsi_pipeline.durable import sync_threads

__all__ = ["Writers"]

MOST_WRITTEN = 64
"""Blocks that wait for the disk or are being committed, at most, but for one a writer: what a crash
may cost. Of their pixels none are kept."""

Block = TypeVar("Block")
Written = TypeVar("Written")


class Writers(Generic[Block, Written]):
    """Threads that write blocks, and one that commits them; use it in a ``with``.

    When that ends, well or not, each block is committed, or an error was raised.
    """

    def __init__(
        self,
        write: Callable[[Block], Written],
        commit: Callable[[list[Written], Executor], None],
        *,
        threads: int,
    ) -> None:
        """Prepare.

        Args:
            write: a block; called in several threads.
            commit: what ``write`` has returned, in some order, and threads to sync with; called
                in one thread. When it raises, nothing more is written or committed.
            threads: that write.
        """
        self._write = write
        self._commit = commit
        self._room = threads + 1
        self._handed: deque[Future[None]] = deque()
        self._changed = threading.Condition()
        self._written: list[Written] = []
        self._with_disk = 0
        self._is_last = False
        self._error: BaseException | None = None
        self._writers = ThreadPoolExecutor(threads, thread_name_prefix="writer")
        self._committer = threading.Thread(target=self._commit_groups, name="committer")

    def hand(self, block: Block) -> None:
        """Hand a block over; wait while more than one wait for a writer.

        Raises:
            Exception: what has befallen a block that was handed over before.
        """
        self._handed.append(self._writers.submit(self._pass_on, block))
        while len(self._handed) > self._room:
            self._handed.popleft().result()

    def __enter__(self) -> Self:
        self._committer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writers.shutdown()  # every block is written, or has failed
        with self._changed:
            self._is_last = True
            self._changed.notify_all()
        self._committer.join()
        if error is not None and not isinstance(error, Exception):
            return  # asked to end at once: nothing is more telling
        if self._error is not None:
            raise self._error
        for written in self._handed:
            written.result()

    def _pass_on(self, block: Block) -> None:
        self._require_sound()
        written = self._write(block)
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._uncommitted < MOST_WRITTEN)
            self._require_sound()
            self._written.append(written)
            self._changed.notify_all()

    @property
    def _uncommitted(self) -> int:
        return len(self._written) + self._with_disk

    def _require_sound(self) -> None:
        if self._error is not None:
            raise self._error

    def _commit_groups(self) -> None:
        try:
            with sync_threads() as threads:
                while group := self._next_group():
                    self._commit(group, threads)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next_group(self) -> list[Written]:
        """Wait for blocks; return all that are there, none when no more will come."""
        with self._changed:
            self._with_disk = 0
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._written or self._is_last)
            group, self._written = self._written, []
            self._with_disk = len(group)
            self._changed.notify_all()
            return group
