"""Threads whose results come back in the order in which the work was given."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from wsi_pipeline.errors import Interrupted

__all__ = ["check_stop", "ordered_map"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    stop: Callable[[], bool],
) -> Generator[Result, None, None]:
    """Apply a function in threads; yield the results in order, a bounded number ahead.

    Args:
        function: must release the GIL for threads to help.
        items: taken as they are needed.
        workers: number of threads; 1 runs everything in the caller's.
        stop: asked before each item.

    Raises:
        Interrupted: ``stop()`` was true.
    """
    if workers < 1:
        msg = f"workers must be 1 or more, not {workers}"
        raise ValueError(msg)
    if workers == 1:
        for item in items:
            check_stop(stop)
            yield function(item)
        return
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                check_stop(stop)
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                check_stop(stop)
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def check_stop(stop: Callable[[], bool]) -> None:
    """Raise Interrupted if ``stop()`` is true."""
    if stop():
        raise Interrupted("asked to stop while the objects were drawn; run the command again")
