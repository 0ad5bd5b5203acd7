"""What becomes of a decoded tile: pixels of a band of windows, copied or resampled.

A tile is resampled while the processor still has it at hand, all but the pixels to which
its neighbours add::

    +-----------+-----------+
    |           |           |     tile by tile: grid pixels that lie in one tile
    |         ..|..         |     seams, when all tiles are there: grid pixels across an edge,
    +---------==+==---------+     from the few rows and columns of tile pixels beside the
    |         ..|..         |     edges, which are kept
    |           |           |
    +-----------+-----------+

So the tiles themselves are kept nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.geometry import Box
from wsi_pipeline.slide import kernels
from wsi_pipeline.slide.planes import Sampling
from wsi_pipeline.slide.resample import (
    AxisTaps,
    flat,
    most_taps,
    resample_columns,
    resample_part,
    whiten_around,
)
from wsi_pipeline.slide.rows import Row, canvas_box

__all__ = ["Band", "Painter", "painter_for", "painting_bytes"]

Pixels = NDArray[np.uint8]
Tile = tuple[int, int]
"""``(column, row)`` on the plane's lattice."""
Range = tuple[int, int]
"""Half-open."""

_LINES_A_JOB = 512
"""Enough work for a job to hide what handing it over costs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """A row of windows with its pixels."""

    row: Row
    pixels: Pixels
    """``(h, w, 3)``; the windows are parts of it."""
    corner: tuple[int, int]
    """Of the pixels; grid pixels."""
    done: set[Tile] = field(default_factory=set)
    """Tiles that are in the pixels."""


class Painter(Protocol):
    """Makes bands of tiles. The band before the last is painted over."""

    def begin(self, row: Row, previous: Band | None) -> Band:
        """Return a band that holds what lies outside the slide, and what the previous one had."""

    def put(self, band: Band, tile: Tile, pixels: Pixels | None) -> None:
        """Put a tile into a band; None is white. Several threads may."""

    def finish(self, band: Band) -> Sequence[Callable[[], None]]:
        """Return what is left to do when all tiles are put, in any order, by several threads."""


def painter_for(sampling: Sampling, rows: Sequence[Row]) -> Painter:
    """Return what makes bands of these rows, in this order."""
    return _Copier(sampling, rows) if sampling.shift is not None else _Resampler(sampling, rows)


def painting_bytes(sampling: Sampling, span: Box) -> int:
    """Return what a painter holds for rows of windows that span a box of the grid."""
    canvas = canvas_box(sampling, span)
    if sampling.shift is not None:
        return 2 * 3 * canvas.area
    width, height = sampling.plane.raster.tile_size
    beside = canvas.height // height * canvas.width + canvas.width // width * canvas.height
    seams = 2 * _margin(sampling) * beside
    return 2 * 3 * (span.width * (span.height + _lines_a_tile(sampling)) + seams)


class _Copier:
    """For a grid that agrees with the plane: a band is whole tiles, windows are views of it."""

    def __init__(self, sampling: Sampling, rows: Sequence[Row]) -> None:
        shift = sampling.shift
        assert shift is not None
        self._plane = sampling.plane
        self._shift = shift
        self._buffers = _Buffers(max(row.canvas.area for row in rows))

    def begin(self, row: Row, previous: Band | None) -> Band:
        band = Band(
            row=row,
            pixels=self._buffers.next(row.canvas),
            corner=(row.canvas.x - self._shift[0], row.canvas.y - self._shift[1]),
        )
        inside = row.canvas.intersect(self._plane.box).relative_to(row.canvas)
        whiten_around(band.pixels, (inside.x, inside.x1), (inside.y, inside.y1))
        if previous is not None and _same_columns(previous.row, row):
            before, now = previous.row.canvas, row.canvas
            shared = before.intersect(now)
            common = shared.intersect(self._plane.box)
            band.pixels[common.relative_to(now).slices] = previous.pixels[
                common.relative_to(before).slices
            ]
            height = self._plane.raster.tile_size[1]
            rows = range(shared.y // height, shared.y1 // height)
            band.done.update(tile for tile in previous.done if tile[1] in rows)
        return band

    def put(self, band: Band, tile: Tile, pixels: Pixels | None) -> None:
        box = self._plane.raster.tile_box(*tile)
        band.pixels[box.relative_to(band.row.canvas).slices] = 255 if pixels is None else pixels

    def finish(self, band: Band) -> Sequence[Callable[[], None]]:
        return ()


class _Cuts:
    """Which pixels of a band, along one axis, lie within a tile, and which across an edge."""

    def __init__(self, taps: AxisTaps, start: int, stop: int, side: int) -> None:
        edges = np.arange(start, stop + 1, side)
        inside = slice(*taps.inside)
        self._begin = (np.searchsorted(taps.first[inside], edges) + inside.start).tolist()
        self._end = (np.searchsorted(taps.ends[inside], edges, "right") + inside.start).tolist()
        within = [slice(*edges) for edges in zip(self._begin[:-1], self._end[1:], strict=True)]
        self.parts = [(part.start, (taps.first[part], taps.weights[part])) for part in within]
        """Those that a tile makes alone: the first, and the taps of all."""

    def across(self, index: int) -> Range:
        """Return those across the edge behind a tile."""
        return self._end[index + 1], self._begin[index + 1]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Columns:
    """The columns of all bands of a panel."""

    taps: AxisTaps
    cuts: _Cuts
    seams: NDArray[np.int32]
    """``(N,)`` of those across edges."""
    seam_taps: AxisTaps
    """Theirs, on the picture of what is kept beside edges."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _ResampledBand(Band):
    """A band, and what its seams are made of."""

    columns: _Columns
    taps: AxisTaps
    """Of its lines."""
    lines: _Cuts
    below: Pixels
    """``(rows of tiles, 2 m, 3 W)``: of the canvas, around the lower edge of each."""
    beside: Pixels
    """``(H, (columns of tiles - 1) 2 m, 3)``: around their edges, side by side."""


class _Resampler:
    """For any other grid: a band is the windows' own lines, and those that tiles complete."""

    def __init__(self, sampling: Sampling, rows: Sequence[Row]) -> None:
        self._sampling = sampling
        self._raster = sampling.plane.raster
        self._margin = _margin(sampling)
        self._buffers = _Buffers(max(self._largest(row).area for row in rows))

    def begin(self, row: Row, previous: Band | None) -> Band:
        (width, height), canvas, box = self._raster.tile_size, row.canvas, self._largest(row)
        before = previous if isinstance(previous, _ResampledBand) else None
        if before is not None and not _same_columns(before.row, row):
            before = None
        columns = self._columns(row) if before is None else before.columns
        y = self._sampling.axis_taps(1, box.y, box.y1)
        # What is complete here is made now: the next row of windows will not have these tiles.
        complete = int(np.searchsorted(y.ends[slice(*y.inside)], canvas.y1, "right"))
        y = y.only(0, max(row.span.height, y.inside[0] + complete))
        box = Box(x=box.x, y=box.y, width=box.width, height=len(y.first))
        around = 2 * self._margin
        edges = max(0, canvas.width // width - 1)
        band = _ResampledBand(
            row=row,
            pixels=self._buffers.next(box),
            corner=(box.x, box.y),
            columns=columns,
            taps=y,
            lines=_Cuts(y, canvas.y, canvas.y1, height),
            below=np.empty((canvas.height // height, around, canvas.width * 3), np.uint8),
            beside=np.empty((canvas.height, edges * around, 3), np.uint8),
        )
        whiten_around(band.pixels, columns.taps.inside, y.inside)
        if before is not None:
            self._carry_over(before, band)
        return band

    def put(self, band: Band, tile: Tile, pixels: Pixels | None) -> None:
        assert isinstance(band, _ResampledBand)
        (width, height), canvas = self._raster.tile_size, band.row.canvas
        if pixels is None:
            pixels = np.full((*self._raster.tile_box(*tile).size[::-1], 3), 255, np.uint8)
        x, y = tile[0] * width, tile[1] * height
        left, columns = band.columns.cuts.parts[tile[0] - canvas.x // width]
        top, lines = band.lines.parts[tile[1] - canvas.y // height]
        # in one call, and made ready before: there are thousands of tiles
        kernels.paint(
            flat(pixels),
            (x, y),
            columns,
            lines,
            flat(band.pixels),
            (left, top),
            (x - canvas.x, y - canvas.y),
            self._raster.tile_size,
            self._margin,
            band.below,
            flat(band.beside),
        )

    def finish(self, band: Band) -> Sequence[Callable[[], None]]:
        assert isinstance(band, _ResampledBand)
        jobs = [partial(self._across_rows, band)]
        if band.columns.seams.size:
            start, stop = band.taps.inside
            for line in range(start, stop, _LINES_A_JOB):
                lines = line, min(line + _LINES_A_JOB, stop)
                jobs.append(partial(self._across_columns, band, lines))
        return jobs

    def _across_rows(self, band: _ResampledBand) -> None:
        canvas, height = band.row.canvas, self._raster.tile_size[1]
        taps = band.columns.taps, band.taps
        for edge, lines in enumerate(band.below[:-1]):  # below the last one lies no tile yet
            source = lines.reshape(len(lines), canvas.width, 3)
            corner = canvas.x, canvas.y + (edge + 1) * height - self._margin
            part = taps[0].inside, band.lines.across(edge)
            resample_part(source, corner, taps, *part, band.pixels)

    def _across_columns(self, band: _ResampledBand, lines: Range) -> None:
        columns = band.columns
        corner, taps = (0, band.row.canvas.y), (columns.seam_taps, band.taps)
        resample_columns(band.beside, corner, taps, lines, band.pixels, columns.seams)

    def _columns(self, row: Row) -> _Columns:
        canvas, margin, width = row.canvas, self._margin, self._raster.tile_size[0]
        taps = self._sampling.axis_taps(0, row.span.x, row.span.x1)
        cuts = _Cuts(taps, canvas.x, canvas.x1, width)
        edges = range(canvas.width // width - 1)
        seams = [np.arange(*cuts.across(edge), dtype=np.int32) for edge in edges]
        first = [
            taps.first[across] + (2 * margin * edge + margin - canvas.x - (edge + 1) * width)
            for edge, across in enumerate(seams)
        ]
        none = np.empty(0, np.int32)
        across = np.concatenate([none, *seams])
        return _Columns(
            taps=taps,
            cuts=cuts,
            seams=across,
            seam_taps=AxisTaps(
                first=np.concatenate([none, *first]).astype(np.int32), weights=taps.weights[across]
            ),
        )

    def _carry_over(self, previous: _ResampledBand, band: _ResampledBand) -> None:
        before, now = previous.row.canvas, band.row.canvas
        shared = before.intersect(now)
        height = self._raster.tile_size[1]
        rows = range(shared.y // height, shared.y1 // height)
        # Where tiles are lower than the margin, edges above shared rows look beyond these, into
        # tiles that the previous band did not have: nothing is shared then.
        if not rows or self._margin > height:
            return
        band.done.update(tile for tile in previous.done if tile[1] in rows)
        first, count = band.corner[1] - previous.corner[1], len(previous.pixels)
        lines = min(count - first, len(band.pixels))
        if lines > 0:
            band.pixels[:lines] = previous.pixels[first : first + lines]
        old, new = rows.start - before.y // height, rows.start - now.y // height
        band.below[new : new + len(rows)] = previous.below[old : old + len(rows)]
        old, new = shared.y - before.y, shared.y - now.y
        band.beside[new : new + shared.height] = previous.beside[old : old + shared.height]

    def _largest(self, row: Row) -> Box:
        """Return the most that the band of a row may cover; grid pixels."""
        most = row.span.y1 + _lines_a_tile(self._sampling)
        bottom = max(row.span.y1, min(row.until, most))
        return Box.from_edges(row.span.x, row.span.y, row.span.x1, bottom)


class _Buffers:
    """Memory for two bands, used in turn."""

    def __init__(self, pixels: int) -> None:
        self._flat = _pair(pixels)
        self._turn = 0

    def next(self, box: Box) -> Pixels:
        """Return the one that was used longer ago, ``(h, w, 3)``."""
        self._turn = 1 - self._turn
        return self._flat[self._turn][: box.area * 3].reshape(box.height, box.width, 3)


def _pair(pixels: int) -> tuple[Pixels, Pixels]:
    return np.empty(pixels * 3, np.uint8), np.empty(pixels * 3, np.uint8)


def _margin(sampling: Sampling) -> int:
    """Return how far from an edge pixels matter across it."""
    return max(most_taps(scale) for scale in sampling.scale) - 1


def _lines_a_tile(sampling: Sampling) -> int:
    """Return the most lines of the grid that begin in a tile."""
    return math.ceil(sampling.plane.raster.tile_size[1] / sampling.scale[1]) + 1


def _same_columns(previous: Row, row: Row) -> bool:
    """Tell whether two rows are of one panel, the second below the first; others share nothing."""
    return previous.span.y < row.span.y and all(
        (before.x, before.width) == (now.x, now.width)
        for before, now in ((previous.canvas, row.canvas), (previous.span, row.span))
    )
