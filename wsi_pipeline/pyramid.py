"""Ever coarser copies of a map, for viewers, made chunk by chunk as the map is filled.

::

    map    +--+--+--+--+     a chunk of a coarser level is made from the four below it,
           |  |  |  |  |     by whoever finishes the last of them
           +--+--+--+--+
    2x     |     |     |
           |     |     |
           +-----+-----+
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from wsi_pipeline.chunks import ChunkFiles
from wsi_pipeline.compiled import compiled
from wsi_pipeline.geometry import Box
from wsi_pipeline.machine import available_cpus
from wsi_pipeline.memory import HALVES
from wsi_pipeline.ome import create_arrays, oddity

__all__ = ["Pyramid"]

COARSEST_PX = 512
"""A pyramid stops when its longer side is at most this."""

KEPT_BYTES = HALVES
"""Of halved chunks that the pyramid of a map keeps until their neighbours are there; others are
read again."""

Pixels = NDArray[np.uint8]
Shape = tuple[int, ...]


class Pyramid:
    """The copies ``<key>_2x``, ``_4x``, ... of one map. Safe in threads."""

    def __init__(self, folder: Path, group: zarr.Group, key: str, *, average: bool) -> None:
        """Make the arrays, or find those that were made before.

        Args:
            folder: of the group.
            group: the group that holds the map.
            key: path of the map.
            average: mean of 2 x 2 pixels (probabilities) instead of every second pixel (ids).
        """
        self._halve = _mean_of_cells if average else _first_of_cells
        finest = _array(group, key)
        layout = _coarser(key, finest.shape, finest.chunks)
        found = {name: _found(group, name, *how) for name, how in layout.items()}
        absent = {name: how for name, how in layout.items() if found[name] is None}
        levels = {**found, **create_arrays(group, absent)}
        self.levels = [finest, *(level for level in levels.values() if level is not None)]
        """The map itself, then ever coarser ones."""
        self._files = [
            ChunkFiles(folder / level.path, shape=level.shape, chunks=level.chunks)
            for level in self.levels
        ]
        # By level and chunk: whether something will be below it, how many of the chunks below
        # it are not there yet, and whether it is made.
        grids = [level.cdata_shape[-2:] for level in self.levels]
        self._filled = [np.zeros(grid, np.bool_) for grid in grids]
        self._waits = [np.zeros(grid, np.int64) for grid in grids]
        self._made = [np.zeros(grid, np.bool_) for grid in grids]
        self._lock = threading.Lock()
        self._halves: dict[tuple[int, int, int], Pixels] = {}
        """By level, row and column: of chunks that are written, for those above them."""
        self._halves_bytes = 0
        self._even = all(side % 2 == 0 for side in self.levels[0].chunks[-2:])

    def expect(self, written: Sequence[Box], missing: Sequence[Box]) -> None:
        """Note all blocks of the map; the others stay empty.

        Args:
            written: those that are there, each of whole chunks.
            missing: those for which :meth:`update` will be called.
        """
        for box in (*written, *missing):
            self._filled[0][self._chunks(box)] = True
        for box in missing:
            self._waits[0][self._chunks(box)] = 1
        for level in range(1, len(self.levels)):
            self._filled[level] = np.any(_fours(self._filled[level - 1]), axis=0)
            # Of chunks, those with blocks still to come; of coarser ones, all: those below which
            # everything is written may never have been made, and finish() makes them first.
            below = self._waits[0] if level == 1 else self._filled[level - 1]
            self._waits[level] = (_fours(below) > 0).sum(axis=0)

    def update(self, box: Box, pixels: Pixels) -> None:
        """Make the coarser chunks that wait for nothing but this block.

        Args:
            box: where it is on the map.
            pixels: what was written there.
        """
        (high, wide), (rows, columns) = self.levels[0].chunks[-2:], self._chunks(box)
        for row in range(rows.start, rows.stop):
            for column in range(columns.start, columns.stop):
                y, x = row * high - box.y, column * wide - box.x
                self._keep(0, row, column, pixels[..., y : y + high, x : x + wide])
                self._climb(row, column)

    def finish(self) -> list[zarr.Array[Any]]:
        """Make all chunks that are not made yet; return all levels, the map itself first."""
        with ThreadPoolExecutor(available_cpus(), thread_name_prefix="pyramid") as pool:
            for level in range(1, len(self.levels)):
                left = np.argwhere(self._filled[level] & ~self._made[level]).tolist()
                list(pool.map(lambda at, level=level: self._make(level, *at), left))
        return self.levels

    def _climb(self, row: int, column: int) -> None:
        for level in range(1, len(self.levels)):
            row, column = row // 2, column // 2
            with self._lock:
                self._waits[level][row, column] -= 1
                if self._waits[level][row, column]:
                    return
            self._make(level, row, column)

    def _make(self, level: int, row: int, column: int) -> None:
        coarse = self._files[level]
        if self._even:
            pixels = self._of_halves(level, row, column)
        else:
            pixels = self._halve(self._joined(level, row, column))
        coarse.write(row, column, pixels)
        self._keep(level, row, column, pixels)
        self._made[level][row, column] = True

    def _of_halves(self, level: int, row: int, column: int) -> Pixels:
        coarse = self._files[level]
        (high, wide), (height, width) = coarse.chunks[-2:], coarse.shape[-2:]
        size = min(high, height - row * high), min(wide, width - column * wide)
        pixels = np.zeros((*coarse.shape[:-2], *size), np.uint8)
        for down, along in np.ndindex(2, 2):
            half = self._half(level - 1, 2 * row + down, 2 * column + along)
            if half is not None:
                y, x = down * high // 2, along * wide // 2
                pixels[..., y : y + half.shape[-2], x : x + half.shape[-1]] = half
        return pixels

    def _joined(self, level: int, row: int, column: int) -> Pixels:
        """Return the four chunks below one: of odd sides, so that cells lie across them."""
        finer, coarse = self._files[level - 1], self._files[level]
        (high, wide), (height, width) = coarse.chunks[-2:], finer.shape[-2:]
        box = Box(x=2 * column * wide, y=2 * row * high, width=2 * wide, height=2 * high)
        box = box.intersect(Box(x=0, y=0, width=width, height=height))
        pixels = np.zeros((*finer.shape[:-2], box.height, box.width), np.uint8)
        for down, along in np.ndindex(2, 2):
            chunk = finer.read(2 * row + down, 2 * column + along)
            if chunk is not None:
                y, x = down * high, along * wide
                pixels[..., y : y + chunk.shape[-2], x : x + chunk.shape[-1]] = chunk
        return pixels

    def _keep(self, level: int, row: int, column: int, pixels: Pixels) -> None:
        """Halve a chunk that was just written, for the coarser one, as long as there is room."""
        if level + 1 == len(self.levels) or not self._even:
            return
        half = self._halve(pixels)
        with self._lock:
            self._forget(level, row, column)
            if self._halves_bytes + half.nbytes <= KEPT_BYTES:
                self._halves_bytes += half.nbytes
                self._halves[level, row, column] = half

    def _forget(self, level: int, row: int, column: int) -> Pixels | None:
        half = self._halves.pop((level, row, column), None)
        self._halves_bytes -= 0 if half is None else half.nbytes
        return half

    def _half(self, level: int, row: int, column: int) -> Pixels | None:
        """Return a chunk halved, as it was kept or from its file; None where it has none."""
        with self._lock:
            half = self._forget(level, row, column)
        if half is None:
            chunk = self._files[level].read(row, column)
            half = None if chunk is None else self._halve(chunk)
        return half

    def _chunks(self, box: Box) -> tuple[slice, slice]:
        high, wide = self.levels[0].chunks[-2:]
        return slice(box.y // high, -(-box.y1 // high)), slice(box.x // wide, -(-box.x1 // wide))


def _array(group: zarr.Group, key: str) -> zarr.Array[Any]:
    array = group[key]
    if not isinstance(array, zarr.Array):
        raise TypeError(f"{key} is not an array")
    return array


def _coarser(key: str, shape: Shape, chunks: Shape) -> dict[str, tuple[Shape, Shape]]:
    """Return names, shapes and chunks of the copies of a map."""
    layout: dict[str, tuple[Shape, Shape]] = {}
    while max(shape[-2:]) > COARSEST_PX:
        shape = (*shape[:-2], *(-(-side // 2) for side in shape[-2:]))
        layout[f"{key}_{2 ** (len(layout) + 1)}x"] = shape, chunks
    return layout


def _found(group: zarr.Group, key: str, shape: Shape, chunks: Shape) -> zarr.Array[Any] | None:
    """Return an array that was made before; None where it is absent, another, or torn."""
    try:
        # Asked first: zarr's error for what is absent is held by its own traceback, and with it
        # whoever asked, which is a store with all its chunks.
        if key not in group:
            return None
        array = _array(group, key)
    except (KeyError, ValueError, TypeError):
        return None
    return None if oddity(array, shape, chunks) else array


def _fours(grid: NDArray[Any]) -> NDArray[Any]:
    """Return (4, ceil(h / 2), ceil(w / 2)): the cells of each 2 x 2 cell, 0 beyond the grid."""
    height, width = grid.shape
    even = np.pad(grid, ((0, height % 2), (0, width % 2)))
    return np.stack([even[::2, ::2], even[::2, 1::2], even[1::2, ::2], even[1::2, 1::2]])


def _first_of_cells(pixels: Pixels) -> Pixels:
    return np.ascontiguousarray(pixels[..., ::2, ::2])  # a view would keep all of them alive


def _mean_of_cells(pixels: Pixels) -> Pixels:
    """Return the rounded mean of each 2 x 2 cell; odd sides repeat their last row or column."""
    height, width = pixels.shape[-2:]
    planes = np.ascontiguousarray(pixels).reshape(-1, height, width)
    means = np.empty((len(planes), -(-height // 2), -(-width // 2)), np.uint8)
    _average_cells(planes, means)
    return means.reshape(*pixels.shape[:-2], *means.shape[1:])


def _average_cells_loops(planes: Pixels, means: Pixels) -> None:
    count, height, width = planes.shape
    for plane in range(count):
        for j in range(means.shape[1]):
            upper = planes[plane, 2 * j]
            lower = planes[plane, min(2 * j + 1, height - 1)]
            line = means[plane, j]
            for i in range(width // 2):
                k = 2 * i
                total = np.int32(upper[k]) + upper[k + 1] + lower[k] + lower[k + 1]
                line[i] = (total + 2) >> 2
            if width % 2:
                line[width // 2] = (np.int32(upper[width - 1]) + lower[width - 1] + 1) >> 1


_average_cells = compiled(_average_cells_loops)
