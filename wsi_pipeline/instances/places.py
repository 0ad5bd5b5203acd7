"""The order of rows: by where objects lie, so that row groups are small windows of the slide.

    head (as the model lists them), panel (column of 8192 px), cell (2048 px; row by
    row within the panel), ``object_id``

Windows are walked panel by panel, so only the cells of one row of windows are held.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from wsi_pipeline.geometry import Box
from wsi_pipeline.instances.heads import HeadMaps
from wsi_pipeline.instances.kernels import Ints
from wsi_pipeline.instances.rows import ID_BITS

__all__ = ["cell_side", "lay_panels", "place_order", "split_rows"]

PANEL_PX = 8192
"""Width of a panel, in pixels of the working grid."""
CELL_PX = 2048
"""Side of a cell, in pixels of the working grid."""


def lay_panels(maps: HeadMaps) -> Iterator[Box]:
    """Yield the panels of a head's grid, left to right."""
    side = _panel_side(maps)
    width, height = maps.grid.size
    for x in range(0, width, side):
        yield Box(x=x, y=0, width=min(side, width - x), height=height)


def cell_side(maps: HeadMaps) -> int:
    """Return the side of a cell on a head's grid."""
    return max(1, CELL_PX // maps.head.stride)


def _panel_side(maps: HeadMaps) -> int:
    return max(1, PANEL_PX // maps.head.stride)


def place_order(maps: HeadMaps, x: Ints, y: Ints) -> Ints:
    """Return the order of rows by panel, cell and id."""
    panel = _panel_side(maps)
    cell = cell_side(maps)
    return np.lexsort((x, y, x // cell, y // cell, x // panel))


def split_rows(
    maps: HeadMaps, batches: list[pa.RecordBatch], done_y: int
) -> tuple[list[pa.RecordBatch], list[pa.RecordBatch]]:
    """Sort rows by place; return those with anchors above ``done_y``, and the others."""
    ids = np.concatenate([batch.column("object_id").to_numpy() for batch in batches])
    y, x = np.divmod(ids & ((1 << ID_BITS) - 1), maps.grid.size[0])
    if not (y < done_y).any():
        return [], batches
    table = pa.concat_batches(batches)
    order = place_order(maps, x, y)
    ready = table.take(pa.array(order[y[order] < done_y]))
    rest = table.take(pa.array(np.flatnonzero(y >= done_y)))
    return ([ready] if len(ready) else []), ([rest] if len(rest) else [])
