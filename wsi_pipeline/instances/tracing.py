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

import numpy as np

from wsi_pipeline.compiled import compiled
from wsi_pipeline.instances.kernels import Ints
from wsi_pipeline.instances.outlines import Outlines

__all__ = ["trace_labels", "trace_runs"]


def trace_labels(
    cells: Ints,
    ids: Ints,
    first: Ints,
    areas: Ints,
    anchors: Ints,
    *,
    label_bits: int,
    origin: tuple[int, int],
    min_area_px: int,
) -> tuple[Ints, Outlines]:
    """Trace the outer rings of some labels of an image.

    Args:
        cells: (H, W) int32 or int64 with a zero border; the lower bits are the label.
        ids: (N,) the labels to trace.
        first: (N,) int64 flat index of each label's raster-first pixel.
        areas: (N,) int64 pixels of each label.
        anchors: (N, 2) int64 x, y of the pixel that the moments are relative to.
        label_bits: how many bits of a cell are the label.
        origin: position x, y of the image's first pixel.
        min_area_px: objects with fewer pixels (holes filled) are left out.

    Returns:
        (N,) bool which objects are kept, and their outlines.
    """
    mask = (1 << label_bits) - 1
    kept, *arrays = _trace_labels(cells, mask, ids, first, areas, anchors, *origin, min_area_px)
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
def _walk_of(width: int) -> tuple[Ints, Ints, Ints, Ints]:
    """Return, by direction (0 up, 1 right, 2 down, 3 left), what a walk in an image needs.

    Returns:
        Pixel ahead on the left, relative to the corner the walk has come to (the one ahead on
        the right is the next entry); steps along x and y; and both as one flat offset.
    """
    ahead = np.array([-width - 1, -width, 0, -1, -width - 1])
    return ahead, np.array([0, 1, 0, -1]), np.array([-1, 0, 1, 0]), np.array([-width, 1, width, -1])


@compiled
def _follow(
    label_at: Ints,
    width: int,
    start: int,
    label: int,
    mask: int,
    visited: int,
    walk: tuple[Ints, Ints, Ints, Ints],
    vertices: Ints,
    n: int,
    measures: Ints,
    k: int,
    origin: tuple[int, int],
    anchor_x: int,
    anchor_y: int,
) -> int:
    """Walk one ring from the left crack of a pixel; add to ``vertices`` and ``measures[k]``.

    The way turns left before it goes straight on before it turns right. Nothing but the end
    of the walk is decided by a branch: at a crack, a branch would be guessed wrong every second
    time, and cost more than all that is computed.

    Args:
        label_at: flat image.
        width: of the image.
        start: flat index of the pixel.
        label: of the ring's pixels,
        mask: under this mask.
        visited: is set in pixels whose left crack is walked along; 0: nothing is.
        walk: see :func:`_walk_of`.
        vertices: with room for the ring and one more.
        n: vertices that are there.
        measures: with the columns of ``MEASURES``.
        k: row to add to; all but extent and hull.
        origin: position of the image's first pixel.
        anchor_x: what moments are relative to,
        anchor_y: and its line.

    Returns:
        Vertices that are there now.
    """
    ahead, step_x, step_y, step = walk
    x = start % width + origin[0] - anchor_x
    y = start // width + origin[1] - anchor_y
    area = sum_x = sum_y = sum_xx = sum_xy = sum_yy = 0
    cracks = vertical_pairs = turns = np.int64(0)
    corner, before, direction, after = np.int64(start), np.int64(0), np.int64(0), np.int64(0)
    is_first = True
    while True:
        on_left = np.int64((label_at[corner + ahead[direction]] & mask) == label)
        on_right = np.int64((label_at[corner + ahead[direction + 1]] & mask) == label)
        after = (direction + 3 * on_left + (1 - on_left) * (1 - on_right)) & 3
        if is_first:
            is_first = False  # where the walk ends, too: this crack is its last
        else:
            vertices[n, 0] = 2 * (x + anchor_x) - step_x[direction]
            vertices[n, 1] = 2 * (y + anchor_y) - step_y[direction]
            n += before != after
            is_straight = np.int64(direction == after)
            cracks += 1
            turns += 1 - is_straight
            vertical_pairs += is_straight & (1 - (direction & 1))
            # Green's theorem: the pixels west of a vertical crack count in or out.
            line = y - (direction >> 1)
            west = step_y[direction] * x
            west_x = west * (x - 1)  # twice the sum of their x
            area += west
            sum_x += west_x
            sum_y += west * line
            sum_xx += west_x * (2 * x - 1)
            sum_xy += west_x * line
            sum_yy += west * line * line
            if visited and direction == 0:
                label_at[corner] |= visited
            if direction == 0 and corner == start:
                break
        before, direction = direction, after
        x += step_x[direction]
        y += step_y[direction]
        corner += step[direction]
    row = measures[k]
    row[0] += area
    row[1] += sum_x // 2
    row[2] += sum_y
    row[3] += sum_xx // 6
    row[4] += sum_xy // 2
    row[5] += sum_yy
    row[6] += cracks - turns - vertical_pairs
    row[7] += vertical_pairs
    row[8] += turns
    return n


@compiled
def _measure_outer(vertices: Ints, begin: int, end: int, row: Ints, scratch: Ints) -> Ints:
    """Add extent and hull of an outer ring: one scan, since rings are lists of rows.

    Args:
        vertices: of which rows ``begin`` to ``end`` are the ring.
        begin: first vertex.
        end: one past the last.
        row: of the measures.
        scratch: (4, S) int64.

    Returns:
        The scratch, or a larger one.
    """
    left = right = vertices[begin, 0]
    top = bottom = vertices[begin, 1]
    for k in range(begin, end):
        left, right = min(left, vertices[k, 0]), max(right, vertices[k, 0])
        top, bottom = min(top, vertices[k, 1]), max(bottom, vertices[k, 1])
    row[10], row[11], row[12], row[13] = left, top, right, bottom
    height = row[13] - row[11] + 1
    if height > scratch.shape[1]:
        scratch = np.empty((4, 2 * height), np.int64)
    low, high, chain_x, chain_y = scratch
    low[:height] = row[12] + 1
    high[:height] = row[10] - 1
    for k in range(begin, end):
        line = vertices[k, 1] - row[11]
        low[line] = min(low[line], vertices[k, 0])
        high[line] = max(high[line], vertices[k, 0])
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
    return scratch


@compiled
def _trace_labels(
    cells: Ints,
    mask: int,
    ids: Ints,
    first: Ints,
    areas: Ints,
    anchors: Ints,
    left: int,
    top: int,
    min_area: int,
) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    count, width = ids.size, cells.shape[1]
    label_at, walk = cells.reshape(-1), _walk_of(width)
    kept = np.zeros(count, np.bool_)
    measures = np.zeros((count, 14), np.int64)
    ring_ends = np.empty(count, np.int64)
    vertices = np.empty((1024 + 24 * count, 2), np.int32)
    scratch = np.empty((4, 256), np.int64)
    k, n = 0, 0
    for i in range(count):
        # The outline of n pixels that hang together has 2 n + 2 cracks at most.
        vertices = _with_room(vertices, n, n + 2 * areas[i] + 3)
        measures[k] = 0
        end = _follow(
            label_at, width, first[i], ids[i], mask, 0, walk, vertices, n, measures, k,
            (left, top), anchors[i, 0], anchors[i, 1],
        )  # fmt: skip
        if measures[k, 0] >= min_area:
            scratch = _measure_outer(vertices, n, end, measures[k], scratch)
            ring_ends[k] = n = end
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
def _with_room(vertices: Ints, n: int, size: int) -> Ints:
    """Return the first ``n`` vertices with room for others."""
    if size <= vertices.shape[0]:
        return vertices
    larger = np.empty((2 * size, 2), np.int32)
    larger[:n] = vertices[:n]
    return larger


@compiled
def _trace_runs(runs: Ints, ends: Ints, anchors: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    count = ends.size
    measures = np.zeros((count, 14), np.int64)
    # Every ring holds the left crack of some run: a bound on the number of rings.
    ring_ends = np.empty(runs.shape[1], np.int64)
    object_ends = np.empty(count, np.int64)
    # A run has two vertical cracks, between each two of which are two vertices at most.
    vertices = np.empty((6 * runs.shape[1] + 1, 2), np.int32)
    scratch = np.empty((4, 4096), np.int64)
    r, n, begin = 0, 0, 0
    for i in range(count):
        own = runs[:, begin : ends[i]]
        begin = ends[i]
        top, left = own[0, 0] - 1, own[1].min() - 1
        width = own[2].max() - left + 1
        mask = np.zeros((own[0, -1] - top + 2, width), np.uint8)
        for k in range(own.shape[1]):
            mask[own[0, k] - top, own[1, k] - left : own[2, k] - left] = 1
        pixels, walk = mask.reshape(-1), _walk_of(width)
        for k in range(own.shape[1]):
            start = (own[0, k] - top) * width + own[1, k] - left
            if pixels[start] == 1:
                ring = n
                n = _follow(
                    pixels, width, start, 1, 63, 64, walk, vertices, n, measures, i,
                    (left, top), anchors[i, 0], anchors[i, 1],
                )  # fmt: skip
                ring_ends[r] = n
                r += 1
                if k == 0:
                    # The raster-first pixel's left crack is on the outer ring.
                    scratch = _measure_outer(vertices, ring, n, measures[i], scratch)
        object_ends[i] = r
    return measures, vertices[:n].copy(), ring_ends[:r].copy(), object_ends
