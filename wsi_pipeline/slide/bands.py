"""Many overlapping windows, each tile of the file decoded once.

::

    panel (windows of a similar x)
    +---------------------------+   row of windows n: being looked at by the caller,
    |  [win][win]      [win]    |   views of canvas A
    |  - - - - - - - - - - - -  |   rows that both share are copied, not decoded again
    |  [win]     [win][win]     |   row n + 1: being decoded into canvas B meanwhile
    +---------------------------+

A canvas holds the whole tiles that its row of windows touches; tiles that no window
touches are never decoded. Two canvases are all the memory there is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.geometry import Box
from wsi_pipeline.slide.planes import Plane, Sampling
from wsi_pipeline.slide.resample import resample

__all__ = ["Fetch", "band_bytes", "decode_once", "read_bands"]

Fetch = Callable[[Plane, int, int], NDArray[np.uint8] | None]
"""Decode the tile of a plane at ``(column, row)``; None is white."""

_PANEL_PX = 20480
"""Rows of windows that together are wider than this are not put on one canvas."""
_TILES_A_JOB = 8
"""Enough work for a job to hide what handing it over costs."""
_LINES_A_JOB = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """Windows side by side, of one height."""

    boxes: tuple[Box, ...]
    """Grid pixels."""
    span: Box
    """The rows of these windows, the columns of their whole panel; grid pixels."""
    canvas: Box
    """The whole tiles that cover the span; plane pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Band:
    """A row of windows with its pixels."""

    row: _Row
    canvas: NDArray[np.uint8]
    done: set[tuple[int, int]] = field(default_factory=set)
    """``(column, row)`` of the tiles on the canvas."""
    windows: NDArray[np.uint8]
    """``(h, w, 3)`` pixels of the span, or of the canvas where grid and plane agree."""
    corner: tuple[int, int]
    """Of :attr:`windows` in grid pixels."""


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
        fetch: decodes a tile; called from several threads.
        threads: how many decode at once, besides one that plans ahead.
        stop: asked often; once true, the iteration ends.

    Yields:
        ``(H, W, 3)`` uint8, read-only, valid until the next is asked for.
    """
    rows = _plan(sampling, boxes)
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
                view = band.windows[box.shift(-band.corner[0], -band.corner[1]).slices]
                view.flags.writeable = False
                yield view


def band_bytes(sampling: Sampling, span: Box) -> int:
    """Return what :func:`read_bands` holds for rows of windows that span a box of the grid."""
    canvas = _canvas_box(sampling, span)
    resampled = 0 if sampling.shift is not None else span.area
    return 2 * 3 * (canvas.area + resampled)


def decode_once(
    sampling: Sampling, boxes: Sequence[Box], *, fetch: Fetch, threads: int
) -> list[tuple[int, int]]:
    """Decode each tile that some boxes need once, and drop it.

    The least that :func:`read_bands` can cost for the same boxes and threads.

    Returns:
        ``(column, row)`` of the tiles.
    """
    tiles = _touched(sampling, boxes)

    def work(job: Sequence[tuple[int, int]]) -> None:
        for column, row in job:
            fetch(sampling.plane, column, row)

    with ThreadPoolExecutor(max(1, threads), "decode") as pool:
        for future in [pool.submit(work, job) for job in _jobs(tiles)]:
            future.result()
    return sorted(tiles)


class _Crew:
    """The threads that fill canvases, and the two canvases they take turns to fill."""

    def __init__(
        self,
        sampling: Sampling,
        fetch: Fetch,
        threads: int,
        stop: Callable[[], bool],
        rows: Sequence[_Row],
    ) -> None:
        self._sampling = sampling
        self._fetch = fetch
        self._stop = stop
        self._stopped = threading.Event()
        self._rows = rows
        self._canvases = _pair(max(row.canvas.area for row in rows))
        resampled = 0 if sampling.shift is not None else max(row.span.area for row in rows)
        self._targets = _pair(resampled)
        self._workers = ThreadPoolExecutor(max(1, threads), "decode")
        self._foreman = ThreadPoolExecutor(1, "decode-ahead")

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._foreman.shutdown(wait=True, cancel_futures=True)
        self._workers.shutdown(wait=True, cancel_futures=True)

    def is_stopped(self) -> bool:
        """Tell whether the caller wants no more; asking once is enough."""
        if self._stop():
            self._stopped.set()
        return self._stopped.is_set()

    def start(self, index: int, previous: _Band | None) -> Future[_Band]:
        """Begin to fill the canvas of a row; the previous band stays readable meanwhile."""
        return self._foreman.submit(self._prepare, index, previous)

    def _prepare(self, index: int, previous: _Band | None) -> _Band:
        row, turn = self._rows[index], index % 2
        canvas = _shaped(self._canvases[turn], row.canvas)
        shift = self._sampling.shift
        band = _Band(
            row=row,
            canvas=canvas,
            windows=canvas if shift is not None else _shaped(self._targets[turn], row.span),
            corner=(
                (row.canvas.x - shift[0], row.canvas.y - shift[1])
                if shift is not None
                else (row.span.x, row.span.y)
            ),
        )
        _whiten_outside(canvas, row.canvas, self._sampling.plane.box)
        if previous is not None:
            _carry_over(previous, band, self._sampling.plane)
        missing = _touched(self._sampling, row.boxes) - band.done
        jobs = _jobs(missing)
        self._together(self._fill, [(band, job) for job in jobs])
        band.done.update(missing)
        if shift is None:
            strips = list(_strips(row, _keep_windows(previous, band)))
            self._together(self._resample, [(band, strip) for strip in strips])
        return band

    def _together(self, work: Callable[..., None], jobs: Sequence[tuple[_Band, object]]) -> None:
        futures = [self._workers.submit(work, *job) for job in jobs]
        for future in futures:
            future.result()

    def _fill(self, band: _Band, tiles: Sequence[tuple[int, int]]) -> None:
        for column, line in tiles:
            if self.is_stopped():
                return
            box = self._sampling.plane.raster.tile_box(column, line)
            pixels = self._fetch(self._sampling.plane, column, line)
            place = box.relative_to(band.row.canvas).slices
            band.canvas[place] = 255 if pixels is None else pixels

    def _resample(self, band: _Band, strip: Box) -> None:
        if self.is_stopped():
            return
        row = band.row
        lines = band.windows[strip.y - row.span.y : strip.y1 - row.span.y]
        corner = row.canvas.x, row.canvas.y
        resample(band.canvas, corner, self._sampling.taps(strip), lines, strip.x - row.span.x)


def _plan(sampling: Sampling, boxes: Sequence[Box]) -> list[_Row]:
    """Group windows into rows and rows into panels, and lay out their canvases."""
    lines: list[list[Box]] = []
    for box in boxes:
        last = lines[-1][-1] if lines else None
        is_beside = (
            last is not None
            and (box.y, box.height) == (last.y, last.height)
            and box.x >= last.x
            # the next panel may begin at the same height
            and box.x1 - lines[-1][0].x <= max(_PANEL_PX, box.width)
        )
        if is_beside:
            lines[-1].append(box)
        else:
            lines.append([box])
    spans = [_around(line) for line in lines]
    widest = max((box.width for box in boxes), default=0)
    panel: list[int] = []
    edges = (0, 0)
    rows: list[_Row] = []

    def finish() -> None:
        for index in panel:
            span = Box.from_edges(edges[0], spans[index].y, edges[1], spans[index].y1)
            canvas = _canvas_box(sampling, span)
            rows.append(_Row(boxes=tuple(lines[index]), span=span, canvas=canvas))

    for index, span in enumerate(spans):
        wider = min(edges[0], span.x), max(edges[1], span.x1)
        if panel and (span.y <= spans[panel[-1]].y or wider[1] - wider[0] > max(_PANEL_PX, widest)):
            finish()
            panel = []
        edges = wider if panel else (span.x, span.x1)
        panel.append(index)
    finish()
    return rows


def _touched(sampling: Sampling, boxes: Sequence[Box]) -> set[tuple[int, int]]:
    tiles: set[tuple[int, int]] = set()
    for box in boxes:
        tiles |= sampling.tiles(box)
    return tiles


def _jobs(tiles: set[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Cut tiles, row by row, into jobs for threads."""
    order = sorted(tiles, key=lambda tile: (tile[1], tile[0]))
    return [order[at : at + _TILES_A_JOB] for at in range(0, len(order), _TILES_A_JOB)]


def _canvas_box(sampling: Sampling, span: Box) -> Box:
    """Return the whole tiles, inside the plane or not, that cover the pixels of a span."""
    width, height = sampling.plane.raster.tile_size
    # where grid and plane agree, windows are views: the canvas must reach as far as they do
    shift = sampling.shift
    need = span.shift(*shift) if shift is not None else sampling.source(span)
    return Box.from_edges(
        need.x // width * width,
        need.y // height * height,
        -(-need.x1 // width) * width,
        -(-need.y1 // height) * height,
    )


def _around(boxes: Sequence[Box]) -> Box:
    return Box.from_edges(
        min(box.x for box in boxes),
        min(box.y for box in boxes),
        max(box.x1 for box in boxes),
        max(box.y1 for box in boxes),
    )


def _merged(boxes: Sequence[Box]) -> list[tuple[int, int]]:
    """Return the columns of windows side by side as few disjoint ranges."""
    ranges: list[tuple[int, int]] = []
    for box in boxes:
        if ranges and box.x <= ranges[-1][1]:
            ranges[-1] = ranges[-1][0], max(ranges[-1][1], box.x1)
        else:
            ranges.append((box.x, box.x1))
    return ranges


def _keep_windows(previous: _Band | None, band: _Band) -> dict[tuple[int, int], int]:
    """Copy the resampled lines that two rows of windows share.

    Returns:
        For the ranges of columns that the previous row had as well: the first new line.
    """
    if previous is None:
        return {}
    before, now = previous.row.span, band.row.span
    shared = before.intersect(now)
    if (before.x, before.width) != (now.x, now.width) or not shared.area:
        return {}
    kept: dict[tuple[int, int], int] = {}
    had = _merged(previous.row.boxes)
    if shared.y == now.y:
        for x0, x1 in _merged(band.row.boxes):
            if any(a <= x0 and x1 <= b for a, b in had):
                part = Box.from_edges(x0, shared.y, x1, shared.y1)
                band.windows[part.relative_to(now).slices] = previous.windows[
                    part.relative_to(before).slices
                ]
                kept[x0, x1] = shared.y1
    return kept


def _strips(row: _Row, kept: dict[tuple[int, int], int]) -> Iterator[Box]:
    """Cut what is still to be resampled into strips, no pixel twice."""
    for x0, x1 in _merged(row.boxes):
        for y in range(kept.get((x0, x1), row.span.y), row.span.y1, _LINES_A_JOB):
            yield Box.from_edges(x0, y, x1, min(y + _LINES_A_JOB, row.span.y1))


def _pair(pixels: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    return np.empty(pixels * 3, np.uint8), np.empty(pixels * 3, np.uint8)


def _shaped(flat: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    return flat[: box.area * 3].reshape(box.height, box.width, 3)


def _whiten_outside(canvas: NDArray[np.uint8], box: Box, plane: Box) -> None:
    inside = box.intersect(plane).relative_to(box)
    rows, columns = inside.slices
    if not inside.area:
        canvas[:] = 255
        return
    canvas[: rows.start] = canvas[rows.stop :] = 255
    canvas[:, : columns.start] = canvas[:, columns.stop :] = 255


def _carry_over(previous: _Band, band: _Band, plane: Plane) -> None:
    """Copy the tiles that both canvases hold; panels share nothing."""
    before, now = previous.row.canvas, band.row.canvas
    shared = before.intersect(now)
    if (before.x, before.width) != (now.x, now.width) or not shared.area:
        return
    common = shared.intersect(plane.box)
    band.canvas[common.relative_to(now).slices] = previous.canvas[common.relative_to(before).slices]
    height = plane.raster.tile_size[1]
    rows = range(shared.y // height, shared.y1 // height)
    band.done.update(tile for tile in previous.done if tile[1] in rows)
