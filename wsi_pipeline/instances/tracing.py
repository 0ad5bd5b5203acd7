"""Labels to polygons: outlines along pixel cracks, valid by construction.

The tracer walks along the cracks between pixels with the object on its right (as seen
on the screen) and emits the midpoint of each crack where the direction changes: the
0.5 contour of marching squares, in whole half-pixels. Neighbouring objects share their
borders exactly.

Labels are 4-connected, and at a corner where two pixels of a label meet diagonally the
walk turns towards the other pixel (8-connected turn rule). The two pixels are joined by
a 4-path, which with the diagonal separates the two background pixels; these therefore
lie on different rings, every ring is simple, and no ring touches another. Outer rings
come out counter-clockwise in numeric x, y; holes clockwise.

The same walk sums area and moments (Green's theorem, in integers relative to a pixel
that does not depend on any window), so filled holes cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wsi_pipeline.compiled import compiled
from wsi_pipeline.geometry import PixelGrid
from wsi_pipeline.instances.kernels import Ints

__all__ = ["MEASURES", "Outlines", "trace_labels", "trace_runs"]

MEASURES = (
    "area",  # pixels of the region: filled holes in, open holes out
    "x",  # sums over the region's pixels, relative to the anchor
    "y",
    "xx",
    "xy",
    "yy",
    "steps_x",  # steps of one pixel along x, along y, and half-pixel diagonals
    "steps_y",
    "steps_diagonal",
    "hull",  # area of the outer ring's convex hull, in eighths of a pixel
    "left",  # extent in half-pixels
    "top",
    "right",
    "bottom",
)
"""Columns of :attr:`Outlines.measures`."""

_LEFT, _COUNT = MEASURES.index("left"), len(MEASURES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlines:
    """Rings and measures of objects on one pixel grid."""

    measures: Ints
    """(N, 14) int64, see :data:`MEASURES`; float64 for boxes, whose edges may halve pixels."""
    vertices: Ints
    """(V, 2) int32 ring vertices in half-pixels of the grid; rings are not closed."""
    ring_ends: Ints
    """(R,) int64: where each ring ends in ``vertices``."""
    object_ends: Ints
    """(N,) int64: where each object ends in ``ring_ends``; its first ring is the outer one."""

    @classmethod
    def concatenate(cls, parts: list[Outlines]) -> Outlines:
        """Join outlines on the same grid."""
        rings = np.cumsum([0, *(part.ring_ends.size for part in parts)])
        vertices = np.cumsum([0, *(len(part.vertices) for part in parts)])
        return cls(
            measures=np.concatenate([part.measures for part in parts]),
            vertices=np.concatenate([part.vertices for part in parts]),
            ring_ends=np.concatenate(
                [part.ring_ends + start for part, start in zip(parts, vertices, strict=False)]
            ),
            object_ends=np.concatenate(
                [part.object_ends + start for part, start in zip(parts, rings, strict=False)]
            ),
        )

    def column(self, name: str) -> Ints:
        """Return one measure of all objects."""
        return self.measures[:, MEASURES.index(name)]

    @property
    def ring_counts(self) -> Ints:
        """Rings of each object; one without open holes."""
        return np.diff(self.object_ends, prepend=0)

    def bounds(self, grid: PixelGrid) -> Ints:
        """Return the (N, 4) float64 extents in level-0 pixels: left, top, right, bottom."""
        half = self.measures[:, _LEFT:_COUNT].astype(np.float64) * 0.5
        bounds: Ints = half * (*grid.spacing, *grid.spacing) + (*grid.origin, *grid.origin)
        return bounds

    def wkb(self, grid: PixelGrid) -> tuple[Ints, Ints]:
        """Encode the polygons in level-0 pixels.

        Returns:
            (N + 1,) int32 offsets and the uint8 bytes: the two buffers of an Arrow array.
        """
        return _encode_wkb(
            self.vertices, self.ring_ends, self.object_ends, *grid.spacing, *grid.origin
        )


def trace_labels(
    labels: Ints,
    ids: Ints,
    first: Ints,
    anchors: Ints,
    *,
    origin: tuple[int, int],
    min_area_px: int,
) -> tuple[Ints, Outlines]:
    """Trace the outer rings of some labels of an image.

    Args:
        labels: (H, W) int32 with a zero border; marked, so of no use afterwards.
        ids: (N,) the labels to trace.
        first: (N,) int64 flat index of each label's raster-first pixel.
        anchors: (N, 2) int64 x, y of the pixel that the moments are relative to.
        origin: position x, y of the image's first pixel.
        min_area_px: objects with fewer pixels (holes filled) are left out.

    Returns:
        (N,) bool which objects are kept, and their outlines.
    """
    kept, *arrays = _trace_labels(labels, ids, first, anchors, *origin, min_area_px)
    return kept, _outlines(*arrays)


def trace_runs(runs: Ints, ends: Ints, anchors: Ints) -> Outlines:
    """Trace all rings of objects that are given as runs.

    Args:
        runs: (3, M) int32 rows ``y, x0, x1``; object by object, each in raster order.
        ends: (N,) int64 where each object ends in ``runs``.
        anchors: (N, 2) int64 x, y of the pixel that the moments are relative to.
    """
    return _outlines(*_trace_runs(runs, ends, anchors))


def _outlines(measures: Ints, vertices: Ints, ring_ends: Ints, object_ends: Ints) -> Outlines:
    return Outlines(
        measures=measures, vertices=vertices, ring_ends=ring_ends, object_ends=object_ends
    )


@compiled
def _with_room(vertices: Ints, n: int) -> Ints:
    """Return the vertices, moved to a larger array if row ``n`` would not fit."""
    if n < vertices.shape[0]:
        return vertices
    larger = np.empty((2 * n, 2), np.int32)
    larger[:n] = vertices
    return larger


@compiled
def _add_line(row: Ints, sign: int, west: int, line: int) -> None:
    """Count the pixels west of a vertical crack in (+1) or out (-1): Green's theorem."""
    sum_x = west * (west - 1) // 2
    row[0] += sign * west
    row[1] += sign * sum_x
    row[2] += sign * west * line
    row[3] += sign * ((west - 1) * west * (2 * west - 1) // 6)
    row[4] += sign * sum_x * line
    row[5] += sign * west * line * line


@compiled
def _turn(label_at: Ints, corner: int, direction: int, label: int, visited: int, width: int) -> int:
    """Return the next direction: left before straight on before right."""
    # The pixel ahead on the left, as an offset from the corner; the one ahead on the
    # right is the same entry one direction on.
    ahead = (-width - 1, -width, 0, -1)
    if (label_at[corner + ahead[direction]] & (visited - 1)) == label:
        return (direction + 3) & 3
    if (label_at[corner + ahead[(direction + 1) & 3]] & (visited - 1)) == label:
        return direction
    return (direction + 1) & 3


@compiled
def _follow(
    labels: Ints,
    start: int,
    visited: int,
    vertices: Ints,
    n: int,
    row: Ints,
    origin: tuple[int, int],
    anchor: Ints,
) -> tuple[Ints, int]:
    """Walk one ring from the left crack of a pixel; add to ``vertices`` and ``row``.

    Directions: 0 up, 1 right, 2 down, 3 left. ``row`` has the columns of ``MEASURES``.
    """
    width = labels.shape[1]
    label_at = labels.reshape(-1)
    label = label_at[start] & (visited - 1)
    dx, dy = (0, 1, 0, -1), (-1, 0, 1, 0)
    first_x, first_y = start % width, start // width
    x, y, direction, before, closed = first_x, first_y, 0, -1, False
    while True:
        corner = y * width + x
        after = _turn(label_at, corner, direction, label, visited, width)
        if before >= 0:
            if before != after:
                vertices = _with_room(vertices, n)
                vertices[n, 0] = 2 * (x + origin[0]) - dx[direction]
                vertices[n, 1] = 2 * (y + origin[1]) - dy[direction]
                n += 1
            if direction != after:
                row[8] += 1
            elif direction & 1:
                row[6] += 1
            else:
                row[7] += 1
            if not direction & 1:
                line = (y if direction == 0 else y - 1) + origin[1] - anchor[1]
                _add_line(row, direction - 1, x + origin[0] - anchor[0], line)
                if direction == 0:
                    label_at[corner] |= visited
            if closed:
                return vertices, n
        before, direction = direction, after
        x += dx[direction]
        y += dy[direction]
        closed = direction == 0 and x == first_x and y == first_y


@compiled
def _measure_outer(ring: Ints, row: Ints) -> None:
    """Add extent and hull of an outer ring: one scan, since rings are lists of rows."""
    row[10], row[11] = ring[:, 0].min(), ring[:, 1].min()
    row[12], row[13] = ring[:, 0].max(), ring[:, 1].max()
    height = row[13] - row[11] + 1
    low = np.full(height, row[12] + 1, np.int64)
    high = np.full(height, row[10] - 1, np.int64)
    for k in range(ring.shape[0]):
        line = ring[k, 1] - row[11]
        low[line] = min(low[line], ring[k, 0])
        high[line] = max(high[line], ring[k, 0])
    chain_x, chain_y = np.empty(height, np.int64), np.empty(height, np.int64)
    area = 0
    for side in (-1, 1):
        edge = low if side < 0 else high
        n = 0
        for line in range(height):
            if low[line] > high[line]:
                continue
            while n > 1:
                ax, ay = chain_x[n - 2], chain_y[n - 2]
                turn = (chain_x[n - 1] - ax) * (line - ay) - (edge[line] - ax) * (
                    chain_y[n - 1] - ay
                )
                if turn * side > 0:
                    break
                n -= 1
            chain_x[n], chain_y[n] = edge[line], line
            n += 1
        for k in range(1, n):
            area += side * (chain_x[k - 1] + chain_x[k]) * (chain_y[k] - chain_y[k - 1])
    row[9] = area


@compiled
def _trace_labels(
    labels: Ints, ids: Ints, first: Ints, anchors: Ints, left: int, top: int, min_area: int
) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    count = ids.size
    kept = np.zeros(count, np.bool_)
    measures = np.zeros((count, 14), np.int64)
    ring_ends = np.empty(count, np.int64)
    vertices = np.empty((1024 + 24 * count, 2), np.int32)
    k, n = 0, 0
    for i in range(count):
        measures[k] = 0
        begin = n
        vertices, n = _follow(
            labels, first[i], 1 << 30, vertices, n, measures[k], (left, top), anchors[i]
        )
        if measures[k, 0] < min_area:
            n = begin
            continue
        _measure_outer(vertices[begin:n], measures[k])
        ring_ends[k] = n
        kept[i] = True
        k += 1
    return (
        kept,
        measures[:k].copy(),
        vertices[:n].copy(),
        ring_ends[:k].copy(),
        np.arange(1, k + 1),
    )


@compiled
def _trace_runs(runs: Ints, ends: Ints, anchors: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    count = ends.size
    measures = np.zeros((count, 14), np.int64)
    # Every ring holds the left crack of some run: a bound on the number of rings.
    ring_ends = np.empty(runs.shape[1], np.int64)
    object_ends = np.empty(count, np.int64)
    vertices = np.empty((1024 + 2 * runs.shape[1], 2), np.int32)
    r, n, begin = 0, 0, 0
    for i in range(count):
        own = runs[:, begin : ends[i]]
        begin = ends[i]
        top, left = own[0, 0] - 1, own[1].min() - 1
        width = own[2].max() - left + 1
        mask = np.zeros((own[0, -1] - top + 2, width), np.uint8)
        for k in range(own.shape[1]):
            mask[own[0, k] - top, own[1, k] - left : own[2, k] - left] = 1
        pixels = mask.reshape(-1)
        for k in range(own.shape[1]):
            start = (own[0, k] - top) * width + own[1, k] - left
            if pixels[start] == 1:
                ring = n
                vertices, n = _follow(
                    mask, start, 1 << 6, vertices, n, measures[i], (left, top), anchors[i]
                )
                ring_ends[r] = n
                r += 1
                if k == 0:
                    # The raster-first pixel's left crack is on the outer ring.
                    _measure_outer(vertices[ring:n], measures[i])
        object_ends[i] = r
    return measures, vertices[:n].copy(), ring_ends[:r].copy(), object_ends


@compiled
def _encode_wkb(
    vertices: Ints,
    ring_ends: Ints,
    object_ends: Ints,
    spacing_x: float,
    spacing_y: float,
    origin_x: float,
    origin_y: float,
) -> tuple[Ints, Ints]:
    n_objects, n_rings = object_ends.size, ring_ends.size
    offsets = np.empty(n_objects + 1, np.int32)
    data = np.empty(9 * n_objects + 20 * n_rings + 16 * vertices.shape[0], np.uint8)
    point = np.empty(2, np.float64)
    count = np.empty(1, np.uint32)
    point_bytes, count_bytes = point.view(np.uint8), count.view(np.uint8)
    at, ring, vertex = 0, 0, 0
    for i in range(n_objects):
        offsets[i] = at
        data[at] = 1  # little-endian
        data[at + 1] = 3  # Polygon
        data[at + 2 : at + 5] = 0
        count[0] = object_ends[i] - ring
        data[at + 5 : at + 9] = count_bytes
        at += 9
        while ring < object_ends[i]:
            size = ring_ends[ring] - vertex
            count[0] = size + 1
            data[at : at + 4] = count_bytes
            at += 4
            for k in range(size + 1):
                v = vertex + (k if k < size else 0)
                point[0] = vertices[v, 0] * 0.5 * spacing_x + origin_x
                point[1] = vertices[v, 1] * 0.5 * spacing_y + origin_y
                for b in range(16):
                    data[at + b] = point_bytes[b]
                at += 16
            vertex = ring_ends[ring]
            ring += 1
    offsets[n_objects] = at
    return offsets, data[:at]
