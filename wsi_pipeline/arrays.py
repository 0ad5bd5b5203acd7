"""The arrays of a store of maps: how they are laid out, made, checked, and kept in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from wsi_pipeline.errors import StoreError
from wsi_pipeline.geometry import PixelGrid
from wsi_pipeline.ome import create_arrays, oddity
from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.tiling import TileGrid

__all__ = ["BLOCKS", "ChunkCache", "make_template", "open_arrays"]

Pixels = NDArray[np.uint8]
Shape = tuple[int, ...]

BLOCKS = "blocks"
"""Name of the record of what is written."""
CHUNK_PX = 1024
"""Largest side of a chunk, in pixels of the working grid."""
MOST_TILES = 1 << 26
"""Glass of 300 x 300 mm at 0.1 um a pixel has 35 million tiles of 512."""


def make_template(
    path: Path, spec: ModelSpec, tiles: TileGrid, meta: Mapping[str, Any]
) -> zarr.Group:
    """Make the empty arrays of a store; ``meta`` is written last, and says that it is complete."""
    group = zarr.create_group(path, zarr_format=3)
    create_arrays(group, _layout(spec, tiles.grid, tiles.tile_px))
    group.attrs["wsi_pipeline"] = dict(meta)
    return group


def _layout(spec: ModelSpec, grid: PixelGrid, tile_px: int) -> dict[str, tuple[Shape, Shape]]:
    """Return the shape and the chunks of each array of a store, the record of blocks included.

    Raises:
        StoreError: a head's stride does not divide the tiles, or they are too many.
    """
    chunk_px = _chunk_px(tile_px)
    layout: dict[str, tuple[Shape, Shape]] = {}
    for key, head in spec.maps.items():
        if chunk_px % head.stride:
            msg = f"head {head.name!r}: tile size {tile_px} is no multiple of its stride"
            raise StoreError(msg)
        width, height = grid.coarsen(head.stride).size
        channels = (len(head.prob_channels),) if key.endswith("/prob") else ()
        side = chunk_px // head.stride
        layout[key] = (*channels, height, width), (*channels, side, side)
    columns, rows = TileGrid(grid=grid, tile_px=tile_px, halo_px=0, tiles=()).shape
    if columns * rows > MOST_TILES:
        msg = f"{columns:,} x {rows:,} tiles of {tile_px} px are more than any slide has"
        raise StoreError(msg)
    layout[BLOCKS] = (rows, columns), (1, max(1, columns))
    return layout


def open_arrays(
    group: zarr.Group, spec: ModelSpec, grid: PixelGrid, tile_px: int
) -> tuple[dict[str, zarr.Array[Any]], zarr.Array[Any]]:
    """Return the maps and the record of blocks, if they are laid out as a template is.

    Raises:
        StoreError: they are not.
    """
    arrays = {
        key: _array(group, key, shape, chunks)
        for key, (shape, chunks) in _layout(spec, grid, tile_px).items()
    }
    return arrays, arrays.pop(BLOCKS)


def _chunk_px(tile_px: int) -> int:
    """Return the largest multiple of 16 up to CHUNK_PX that divides a tile.

    Where that would be tiny, and files without number, a chunk is a whole tile.
    """
    if tile_px < 16:
        raise StoreError(f"tiles have at least 16 px a side, not {tile_px}")
    sides = (side for side in range(16, min(tile_px, CHUNK_PX) + 1, 16) if tile_px % side == 0)
    side = max(sides)
    return side if side >= CHUNK_PX // 4 else tile_px


def _array(group: zarr.Group, key: str, shape: Shape, chunks: Shape) -> zarr.Array[Any]:
    array = group[key]
    if not isinstance(array, zarr.Array):
        raise StoreError(f"{key} is not an array")
    if odd := oddity(array, shape, chunks):
        raise StoreError(f"{key} {odd}")
    return array


class ChunkCache:
    """The most recently used decoded chunks, up to a number of bytes."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._bytes = 0
        self._chunks: OrderedDict[object, Pixels | None] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: object, load: Callable[[], Pixels | None]) -> Pixels | None:
        """Return a chunk, loaded now if it is not kept; None where it is empty."""
        with self._lock:
            if key in self._chunks:
                self._chunks.move_to_end(key)
                return self._chunks[key]
        chunk = load()
        with self._lock:
            if key not in self._chunks:
                self._chunks[key] = chunk
                self._bytes += 0 if chunk is None else chunk.nbytes
            while self._bytes > self._capacity and len(self._chunks) > 1:
                _, old = self._chunks.popitem(last=False)
                self._bytes -= 0 if old is None else old.nbytes
        return chunk
