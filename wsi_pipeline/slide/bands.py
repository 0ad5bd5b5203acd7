"""Many overlapping windows, each tile of the file decoded once.

::

    panel (windows of a similar x)
    +---------------------------+   row of windows n: being looked at by the caller,
    |  [win][win]      [win]    |   views of band A
    |  - - - - - - - - - - - -  |   what both share is copied, not decoded again
    |  [win]     [win][win]     |   row n + 1: being decoded into band B meanwhile
    +---------------------------+

Tiles that no window touches are never decoded. Two bands are all the memory there is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.geometry import Box
from wsi_pipeline.slide.painting import Band, painter_for
from wsi_pipeline.slide.planes import Plane, Sampling
from wsi_pipeline.slide.rows import Row, plan_rows, touched

__all__ = ["Fetch", "decode_once", "read_bands"]

Fetch = Callable[[Plane, int, int], NDArray[np.uint8] | None]
"""Decode the tile of a plane at ``(column, row)``; None is white."""

_TILES_A_JOB = 8
"""Enough work for a job to hide what handing it over costs."""


def read_bands(
    sampling: Sampling,
    boxes: Sequence[Box],
    *,
    fetch: Fetch,
    threads: int,
    stop: Callable[[], bool],
) -> Iterator[NDArray[np.uint8]]:
    """Yield the pixels of each box, in order.

    Args:
        sampling: from the grid of the boxes to the file.
        boxes: panel by panel, row by row, left to right; rows may have gaps.
        fetch: decodes a tile; called from each of the threads.
        threads: how many decode at once. One more plans ahead for them; one alone does both.
        stop: asked often; once true, the iteration ends.

    Yields:
        ``(H, W, 3)`` uint8, read-only, valid until the next is asked for.
    """
    rows = plan_rows(sampling, boxes)
    if not rows:
        return
    with _Crew(sampling, fetch, threads, stop, rows) as crew:
        ahead = crew.start(0, None)
        for index in range(len(rows)):
            band = ahead.result()
            if index + 1 < len(rows):
                ahead = crew.start(index + 1, band)
            for box in band.row.boxes:
                if crew.is_stopped():
                    return
                view = band.pixels[box.shift(-band.corner[0], -band.corner[1]).slices]
                view.flags.writeable = False
                yield view


def decode_once(
    sampling: Sampling, boxes: Sequence[Box], *, fetch: Fetch, threads: int
) -> list[tuple[int, int]]:
    """Decode each tile that some boxes need once, and drop it.

    The least that :func:`read_bands` can cost for the same boxes and threads.

    Returns:
        ``(column, row)`` of the tiles.
    """
    tiles = touched(sampling, boxes)

    def work(job: Sequence[tuple[int, int]]) -> None:
        for column, row in job:
            fetch(sampling.plane, column, row)

    with ThreadPoolExecutor(max(1, threads), "decode") as pool:
        for future in [pool.submit(work, job) for job in _jobs(tiles)]:
            future.result()
    return sorted(tiles)


class _Crew:
    """The threads that decode tiles and put them into bands, one band ahead."""

    def __init__(
        self,
        sampling: Sampling,
        fetch: Fetch,
        threads: int,
        stop: Callable[[], bool],
        rows: Sequence[Row],
    ) -> None:
        self._sampling = sampling
        self._fetch = fetch
        self._stop = stop
        self._stopped = threading.Event()
        self._rows = rows
        self._painter = painter_for(sampling, rows)
        self._foreman = ThreadPoolExecutor(1, "decode-ahead")
        # One worker would only make the foreman wait, and be handed each job.
        self._workers = ThreadPoolExecutor(threads, "decode") if threads > 1 else None

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._foreman.shutdown(wait=True, cancel_futures=True)
        if self._workers is not None:
            self._workers.shutdown(wait=True, cancel_futures=True)

    def is_stopped(self) -> bool:
        """Tell whether the caller wants no more; asking once is enough."""
        if self._stop():
            self._stopped.set()
        return self._stopped.is_set()

    def start(self, index: int, previous: Band | None) -> Future[Band]:
        """Begin to make the band of a row; the previous one stays readable meanwhile."""
        return self._foreman.submit(self._prepare, index, previous)

    def _prepare(self, index: int, previous: Band | None) -> Band:
        row = self._rows[index]
        band = self._painter.begin(row, previous)
        missing = touched(self._sampling, row.boxes) - band.done
        self._together([partial(self._put, band, job) for job in _jobs(missing)])
        band.done.update(missing)
        self._together(self._painter.finish(band))
        return band

    def _together(self, jobs: Sequence[Callable[[], None]]) -> None:
        if self._workers is None:
            for job in jobs:
                job()
            return
        for future in [self._workers.submit(job) for job in jobs]:
            future.result()

    def _put(self, band: Band, tiles: Sequence[tuple[int, int]]) -> None:
        for tile in tiles:
            if self.is_stopped():
                return
            self._painter.put(band, tile, self._fetch(self._sampling.plane, *tile))


def _jobs(tiles: set[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Cut tiles, row by row, into jobs for threads."""
    order = sorted(tiles, key=lambda tile: (tile[1], tile[0]))
    return [order[at : at + _TILES_A_JOB] for at in range(0, len(order), _TILES_A_JOB)]
