"""Compiled loops over pixels and pixel runs: everything between maps and labels.

Images that are labelled carry a border of one zero pixel on each side, so that no
loop asks whether a neighbour exists. A *run* is a maximal stretch ``[x0, x1)`` of equal
non-zero pixels in one row ``y``. All kernels release the GIL and are cached on disk.
They do not call kernels of other modules: the disk cache would not see those change.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.compiled import compiled

__all__ = [
    "Ints",
    "describe",
    "find_runs",
    "grow",
    "label_runs",
    "overlap_runs",
    "paint",
    "tally",
    "threshold_runs",
]

Ints = NDArray[Any]
"""An integer array; the docstring of each kernel says which."""


@compiled
def find_runs(image: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """List the maximal runs of equal non-zero pixels in raster order.

    Returns:
        ``y, x0, x1, value`` as int32, one entry a run.
    """
    height, width = image.shape
    y_of = np.empty(height * width, np.int32)
    start = np.empty(height * width, np.int32)
    stop = np.empty(height * width, np.int32)
    value = np.empty(height * width, np.int32)
    n = 0
    for y in range(height):
        x = 0
        while x < width:
            here = image[y, x]
            if here == 0:
                x += 1
                continue
            first = x
            while x < width and image[y, x] == here:
                x += 1
            y_of[n] = y
            start[n] = first
            stop[n] = x
            value[n] = here
            n += 1
    return y_of[:n].copy(), start[:n].copy(), stop[:n].copy(), value[:n].copy()


@compiled
def threshold_runs(
    inner: Ints, contour: Ints, inner_from: int, contour_below: int
) -> tuple[Ints, Ints, Ints]:
    """List the maximal runs of pixels with much of one probability and little of another.

    Args:
        inner: (H, W) uint8; a run's pixels have ``inner_from`` or more.
        contour: (H, W) uint8; they have less than ``contour_below``.
        inner_from: 0 to 256.
        contour_below: 0 to 256.

    Returns:
        ``y, x0, x1`` as int32, one entry a run, in raster order.
    """
    height, width = inner.shape
    # 16 bits: with more, fewer pixels fit an instruction.
    least, end = np.uint16(inner_from), np.uint16(contour_below)
    # A row with a zero behind it, where its last run ends; looked at eight pixels at a time.
    core = np.zeros((width // 8 + 1) * 8, np.uint8)
    eight, full = core.view(np.uint64), np.uint64(0x0101010101010101)
    y_of, edges = np.empty(64 * height, np.int32), np.empty(128 * height, np.int32)
    n = 0
    for y in range(height):
        inner_of, contour_of = inner[y], contour[y]
        for x in range(width):
            core[x] = (np.uint16(inner_of[x]) >= least) & (np.uint16(contour_of[x]) < end)
        if n + width + 2 > edges.size:
            edges = _lengthened(edges, n, 2 * (n + width + 2))
            y_of = _lengthened(y_of, n // 2, n + width + 2)
        first, before = n, np.uint8(0)
        for k in range(eight.size):
            if eight[k] == np.uint64(before) * full:
                continue
            for x in range(8 * k, 8 * k + 8):
                # Without a branch, which would be guessed wrong at each end of a run.
                edges[n] = x
                n += core[x] != before
                before = core[x]
        y_of[first // 2 : n // 2] = y
    return y_of[: n // 2].copy(), edges[:n:2].copy(), edges[1:n:2].copy()


@compiled
def _lengthened(array: Ints, kept: int, size: int) -> Ints:
    """Return a longer array with the same first entries."""
    longer = np.empty(size, array.dtype)
    longer[:kept] = array[:kept]
    return longer


@compiled
def _root(parent: Ints, i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@compiled
def label_runs(y: Ints, x0: Ints, x1: Ints, value: Ints, reach: int) -> tuple[Ints, int]:
    """Number the connected components of runs.

    Args:
        y: rows, sorted; within a row the runs are sorted and disjoint.
        x0: first columns.
        x1: columns behind the last.
        value: runs are joined only where their values are equal.
        reach: 0 joins runs that share a side (4-connected), 1 also corners (8-connected).

    Returns:
        (N,) int32 labels 1, 2, ... in raster order of each component's first run, and
        how many there are.
    """
    n = y.size
    parent = np.arange(n, dtype=np.int32)
    above, middle = 0, 0
    while middle < n:
        end = middle
        while end < n and y[end] == y[middle]:
            end += 1
        if above < middle and y[above] == y[middle] - 1:
            i, j = above, middle
            while i < middle and j < end:
                if x0[i] < x1[j] + reach and x0[j] < x1[i] + reach and value[i] == value[j]:
                    a, b = _root(parent, i), _root(parent, j)
                    # The smaller root wins: labels come out in raster order.
                    parent[max(a, b)] = min(a, b)
                if x1[i] < x1[j]:
                    i += 1
                else:
                    j += 1
        above, middle = middle, end
    labels = np.empty(n, np.int32)
    count = 0
    for i in range(n):
        root = _root(parent, i)
        if root == i:
            count += 1
            labels[i] = count
        else:
            labels[i] = labels[root]
    return labels, count


@compiled
def describe(y: Ints, x0: Ints, x1: Ints, labels: Ints, count: int) -> Ints:
    """Measure components given as runs in raster order.

    Returns:
        (count, 7) int64: area, left, top, right, bottom (half-open), and x and y of the
        raster-first pixel.
    """
    table = np.zeros((count, 7), np.int64)
    for i in range(y.size):
        row = table[labels[i] - 1]
        if row[0] == 0:
            row[1], row[2], row[3] = x0[i], y[i], x1[i]
            row[5], row[6] = x0[i], y[i]
        row[0] += x1[i] - x0[i]
        row[1] = min(row[1], x0[i])
        row[3] = max(row[3], x1[i])
        row[4] = y[i] + 1
    return table


@compiled
def paint(image: Ints, y: Ints, x0: Ints, x1: Ints, value: Ints, dx: int, dy: int) -> None:
    """Write runs into an image whose pixel (0, 0) lies at ``(dx, dy)``; the rest is cut off."""
    height, width = image.shape
    for i in range(y.size):
        row = y[i] - dy
        if 0 <= row < height:
            for x in range(max(x0[i] - dx, 0), min(x1[i] - dx, width)):
                image[row, x] = value[i]


_GROWN = 1 << 30
"""Added to the label of a pixel that has grown, while others still grow."""


@compiled
def _covered(label_at: Ints, pixel: int, label: int, offsets: Ints) -> bool:
    if offsets.size == 0:
        return True
    for k in range(offsets.size):  # noqa: SIM110 - numba compiles this, not any()
        if label_at[pixel + offsets[k]] == label:
            return True
    return False


@compiled
def _choose(
    target: int,
    label_at: Ints,
    inner_at: Ints,
    ground_at: Ints,
    owner: Ints,
    around: Ints,
    offsets: Ints,
) -> int:
    """Return the label that a free pixel takes; 0 if no neighbour may have it.

    ``label_at`` holds a core's label, that of a grown pixel and ``_GROWN``, or, below 0, one that
    is taken in this step and counts in the next.
    """
    best, value = 0, -1
    for k in range(4):
        source = target + around[k]
        if label_at[source] > 0 and int(inner_at[source]) > value:
            label = label_at[source] & (_GROWN - 1)
            wanted = owner[label]
            if (wanted == 0 or wanted == ground_at[target]) and _covered(
                label_at, target, label, offsets
            ):
                best, value = label, int(inner_at[source])
    return best


@compiled
def grow(
    labels: Ints, inner: Ints, ground: Ints, owner: Ints, offsets: Ints, steps: int, runs: Ints
) -> None:
    """Let labels spread over the ground, all at the same time, one pixel a step.

    An unlabelled pixel takes the label of that 4-neighbour with the largest ``inner``
    value; equal values are decided in the order north, west, east, south. Only what
    was labelled before a step counts in it, so the result at a pixel depends on
    nothing farther away than ``steps`` and does not depend on label numbers.

    Args:
        labels: (H, W) int32 below 2**30, wide zero border (at least 1, and the reach of
            ``offsets``); changed in place.
        inner: (H, W) uint8.
        ground: (H, W) uint8 or int32; zero where nothing may grow.
        owner: by label, the ground value it needs; 0 = any but zero.
        offsets: int64 flat offsets of a structuring element; a pixel is open to a label
            only if the label's original pixels meet the element there. Empty: no limit.
        steps: how many pixels far.
        runs: (3, N) int32, rows ``y, x0, x1``: where labelled pixels are.
    """
    width = labels.shape[1]
    label_at, inner_at, ground_at = labels.reshape(-1), inner.reshape(-1), ground.reshape(-1)
    around = np.array([-width, -1, 1, width])
    grown = np.empty(label_at.size if steps else 0, np.int64)
    begin, end = 0, 0
    for step in range(steps):
        sources = runs.shape[1] if step == 0 else end - begin
        first = end
        for s in range(sources):
            if step == 0:
                pixel = runs[0, s] * width + runs[1, s]
                stop = runs[0, s] * width + runs[2, s]
            else:
                pixel = grown[begin + s]
                stop = pixel + 1
            while pixel < stop:
                for k in range(4):
                    target = pixel + around[k]
                    if label_at[target] == 0 and ground_at[target] != 0:
                        label = _choose(
                            target, label_at, inner_at, ground_at, owner, around, offsets
                        )
                        # Negative: taken, but not yet a label that others can take.
                        label_at[target] = -label
                        grown[end] = target
                        end += label != 0
                pixel += 1
        for k in range(first, end):
            label_at[grown[k]] = _GROWN - label_at[grown[k]]
        begin = first
        if first == end:
            break
    for k in range(end):
        label_at[grown[k]] -= _GROWN


@compiled
def tally(
    labels: Ints,
    inner: Ints,
    classes: Ints,
    part: tuple[int, int, int, int],
    count: int,
    n_classes: int,
) -> tuple[Ints, Ints, Ints, Ints]:
    """List the runs of labels in a part of an image, and sum over the pixels of each label.

    Args:
        labels: (H, W) int32.
        inner: (H, W) uint8.
        classes: (h, w) uint8 class ids of the part; not read when ``n_classes`` is 0.
        part: left, top, right and bottom (half-open).
        count: number of labels.
        n_classes: number of classes.

    Returns:
        (3, N) int32 rows ``y, x0, x1`` of the image, in raster order; (N,) int32 labels;
        (count + 1, 2) int64 pixels and summed inner values; (count + 1, n_classes) int64 votes.
    """
    left, top, right, bottom = part
    # Memory that nothing is written to costs nothing.
    runs = np.empty((4, (right - left) * (bottom - top)), np.int32)
    sums = np.zeros((count + 1, 2), np.int64)
    votes = np.zeros((count + 1, n_classes), np.int64)
    n = 0
    for y in range(top, bottom):
        x = left
        while x < right:
            label = labels[y, x]
            if label == 0:
                x += 1
                continue
            first, total = x, np.int64(0)
            while x < right and labels[y, x] == label:
                total += inner[y, x]
                x += 1
            runs[0, n], runs[1, n], runs[2, n], runs[3, n] = y, first, x, label
            n += 1
            sums[label, 0] += x - first
            sums[label, 1] += total
            if n_classes:
                for k in range(first - left, x - left):
                    if classes[y - top, k] < n_classes:
                        votes[label, classes[y - top, k]] += 1
    return runs[:3, :n].copy(), runs[3, :n].copy(), sums, votes


@compiled
def overlap_runs(a: Ints, b: Ints, width: int) -> tuple[Ints, Ints]:
    """Intersect two sorted lists of disjoint runs of one image.

    Args:
        a: (3, N) int32 ``y, x0, x1``.
        b: (3, M) int32 ``y, x0, x1``.
        width: of the image.

    Returns:
        (3, K) int32 common runs, and for each the index of its run in ``b``.
    """
    n, m = a.shape[1], b.shape[1]
    common = np.empty((3, n + m), np.int32)
    which = np.empty(n + m, np.int64)
    i, j, k = 0, 0, 0
    while i < n and j < m:
        row_a, row_b = np.int64(a[0, i]) * width, np.int64(b[0, j]) * width
        start = max(row_a + a[1, i], row_b + b[1, j])
        stop = min(row_a + a[2, i], row_b + b[2, j])
        if start < stop:
            common[0, k] = a[0, i]
            common[1, k] = start - row_a
            common[2, k] = stop - row_a
            which[k] = j
            k += 1
        if row_a + a[2, i] < row_b + b[2, j]:
            i += 1
        else:
            j += 1
    return common[:, :k].copy(), which[:k].copy()
