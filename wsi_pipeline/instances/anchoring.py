"""Compiled loops of :mod:`wsi_pipeline.instances.anchors`: cores, whose they are, their growth.

Most of the time of a table goes by here. Where a branch would be guessed wrong every second time,
there is none: what is found is always written, and only counted if it holds. As in
:mod:`wsi_pipeline.instances.kernels`, images have a border of one pixel, kernels release the GIL,
and none calls those of other modules.
"""

from __future__ import annotations

import numpy as np

from wsi_pipeline.compiled import compiled
from wsi_pipeline.instances.kernels import Ints

__all__ = ["eroded_cores", "judge", "spread"]


@compiled
def eroded_cores(
    inner: Ints, contour: Ints, core_from: int, ground_from: int
) -> tuple[Ints, Ints, Ints, Ints]:
    """Threshold two probability maps, erode the foreground by the 3 x 3 cross, list its cores.

    Args:
        inner: (H, W) uint8; the outermost pixels only serve the erosion.
        contour: (H, W) uint8.
        core_from: smallest inner value of a core pixel.
        ground_from: smallest inner + contour of a foreground pixel.

    Returns:
        ``y, x0, x1`` of the maximal runs of core pixels in raster order, int32; and the eroded
        foreground, (H, W) uint8 0 or 1 with a zero border.
    """
    height, width = inner.shape
    ground = np.zeros((height, width), np.uint8)
    above = np.empty((3, width), np.uint8)
    # Zeros behind the row: it is looked at eight pixels at a time.
    core = np.zeros(-(-width // 8) * 8, np.uint8)
    eight = core.view(np.uint64)
    full = np.uint64(0x0101010101010101)
    # 16 bits all along: with more, fewer pixels fit an instruction.
    ground_least, core_least = np.uint16(ground_from), np.uint16(core_from)
    y_of = np.empty(64 * height, np.int32)
    ends = np.empty(2 * y_of.size, np.int32)
    n = 0
    for y in range(-1, height - 1):
        below, inside_of, contour_of = above[(y + 1) % 3], inner[y + 1], contour[y + 1]
        for x in range(width):
            total = np.uint16(np.uint16(inside_of[x]) + np.uint16(contour_of[x]))
            below[x] = total >= ground_least
        if y < 1:
            continue
        here, up, inside_of = above[y % 3], above[(y - 1) % 3], inner[y]
        for x in range(1, width - 1):
            inside = here[x] & up[x] & below[x] & here[x - 1] & here[x + 1]
            ground[y, x] = inside
            core[x] = inside & np.uint8(np.uint16(inside_of[x]) >= core_least)
        if n + width + 2 > ends.size:
            y_of, ends = _lengthened(y_of, n // 2, n + width), _lengthened(ends, n, 2 * (n + width))
        first, before = n, np.uint8(0)
        for k in range(eight.size):
            if eight[k] == np.uint64(before) * full:
                continue
            for x in range(8 * k, 8 * k + 8):
                # Without a branch, which would be guessed wrong at each end of a run.
                ends[n] = x
                n += before != core[x]
                before = core[x]
        y_of[first // 2 : n // 2] = y
    return y_of[: n // 2].copy(), ends[:n:2].copy(), ends[1:n:2].copy(), ground


@compiled
def judge(
    table: Ints, own: Ints, window: Ints, whole: Ints, margin: int, min_core: int, most: int
) -> tuple[Ints, Ints, Ints, bool]:
    """Tell which cores of a window are its own, and which of them it sees well enough.

    Args:
        table: (n, 7) as :func:`describe` returns it, in the coordinates of the boxes.
        own: (4,) int64 left, top, right, bottom of the tile whose cores are wanted.
        window: (4,) of what is seen.
        whole: (4,) of the map; where the window ends with it, nothing is cut off.
        margin: pixels around a core that must be seen.
        min_core: smaller cores do not count, unless they are cut off.
        most: largest side of the box of a core.

    Returns:
        Three (n,) bool: the cores that are kept or may be (``seeds``); those whose anchor is in
        ``own`` and that are seen well (``closed``); those that need a larger window (``open``).
        And whether a core with its anchor in ``own`` is too large, and left out.
    """
    n = table.shape[0]
    seeds, closed, open_ = np.zeros(n, np.bool_), np.zeros(n, np.bool_), np.zeros(n, np.bool_)
    doubtful = np.zeros(n, np.bool_)
    oversized = False
    for i in range(n):
        box = table[i, 1:5]
        room = np.int64(1) << 62  # to a side of the map nothing is cut off
        for side in range(4):
            if window[side] != whole[side]:
                room = min(room, abs(box[side] - window[side]))
        is_small = table[i, 0] < min_core
        doubtful[i] = is_small and room == 0
        seeds[i] = not is_small or doubtful[i]
        x, y = table[i, 5], table[i, 6]
        if seeds[i] and own[0] <= x < own[2] and own[1] <= y < own[3]:
            if not is_small and max(box[2] - box[0], box[3] - box[1]) > most:
                oversized = True
            else:
                closed[i] = room >= margin
                open_[i] = not closed[i]
    # Whether one that is cut off takes part in growth is not known: none may be near.
    for j in np.flatnonzero(doubtful):
        for i in range(n):
            if closed[i] and _gap(table[i, 1:5], table[j, 1:5]) <= margin:
                closed[i], open_[i] = False, True
    return seeds, closed, open_, oversized


@compiled
def _gap(a: Ints, b: Ints) -> int:
    """Return how many pixels lie between two boxes, along the axis where it is more."""
    along_x: int = max(a[0] - b[2], b[0] - a[2])
    along_y: int = max(a[1] - b[3], b[1] - a[3])
    return max(along_x, along_y)


@compiled
def spread(
    cells: Ints,
    shift: int,
    inner: Ints,
    ground: Ints,
    steps: int,
    runs: Ints,
    values: Ints,
    classes: Ints,
    count: int,
    n_classes: int,
) -> tuple[Ints, Ints, Ints]:
    """Paint labels, let them spread over the ground as :func:`grow` does, and sum over each.

    It is :func:`grow` without owners and offsets: the small objects' way, which costs a third.
    A cell holds a label and, above its bits, the pixel's ``inner`` value and one, so that one
    look at a neighbour tells both, and any label is more than none. Nothing here depends on a
    branch that is hard to guess.

    Args:
        cells: (H, W) int32 or int64 zeros; receives ``label | (inner + 1) << shift``.
        shift: bits of a cell that are a label; 9 more must remain for the rest, and a sign.
        inner: (H, W) uint8.
        ground: (H, W) uint8, 1 where labels may spread to, else 0, with a zero border; what
            is labelled is set to 0.
        steps: how many pixels far.
        runs: (3, N) int32, rows ``y, x0, x1``: the cores, none at the border.
        values: (N,) int32 label of each run; 0: none.
        classes: (H, W) uint8 class ids; not read when ``n_classes`` is 0.
        count: number of labels.
        n_classes: number of classes.

    Returns:
        (count + 1, 2) int64 pixels and summed inner values; (count + 1, n_classes) int64
        votes; (count + 1,) int64 flat index of the raster-first pixel.
    """
    sums = np.zeros((count + 1, 2), np.int64)
    votes = np.zeros((count + 1, n_classes), np.int64)
    first = np.full(count + 1, cells.size, np.int64)
    maps = cells.reshape(-1), inner.reshape(-1), ground.reshape(-1), classes.reshape(-1)
    tallies = sums, votes, first
    width = np.uint64(cells.shape[1])
    core_pixels = _settle(maps, width, shift, runs, values, tallies)
    if steps:
        # A core of one pixel has four neighbours, and one place more is written to in vain.
        taken = np.empty(4 * core_pixels + 1, np.int64)
        begin, end = 0, _take_around(maps[2], width, runs, values, taken)
        for step in range(1, steps + 1):
            reserve = 3 * (end - begin) + 1 if step < steps else 0
            if taken.size < end + reserve:
                taken = _lengthened(taken, end, 2 * end + reserve)
            chosen = _choose_cells(maps[0], width, shift, taken[begin:end])
            begin, end = end, _advance(maps, width, shift, taken, begin, chosen, tallies, reserve)
    return sums, votes, first


@compiled
def _settle(
    maps: tuple[Ints, Ints, Ints, Ints],
    width: np.uint64,
    shift: int,
    runs: Ints,
    values: Ints,
    tallies: tuple[Ints, Ints, Ints],
) -> np.int64:
    """Paint and count the cores; return how many pixels they have."""
    cell_at, inner_at, free_at, class_at = maps
    sums, votes, first = tallies
    pixels = np.int64(0)
    for i in range(values.size):
        label = np.int64(values[i])
        if label == 0:
            continue
        size = np.int64(runs[2, i] - runs[1, i])
        # Unsigned indices: a signed one is checked for being one from the end.
        start = np.uint64(runs[0, i]) * width + np.uint64(runs[1, i])
        total = np.int64(0)
        for pixel in range(start, start + np.uint64(size)):
            total += inner_at[pixel]
            cell_at[pixel] = label | (np.int64(inner_at[pixel]) + 1) << shift
            free_at[pixel] = 0
        if votes.shape[1]:
            for pixel in range(start, start + np.uint64(size)):
                if class_at[pixel] < votes.shape[1]:
                    votes[label, class_at[pixel]] += 1
        sums[label, 0] += size
        sums[label, 1] += total
        first[label] = min(first[label], np.int64(start))
        pixels += size
    return pixels


@compiled
def _take_around(free_at: Ints, width: np.uint64, runs: Ints, values: Ints, taken: Ints) -> int:
    """List the free pixels beside the cores; return how many there are."""
    one, end = np.uint64(1), 0
    for i in range(values.size):
        if values[i]:
            start = np.uint64(runs[0, i]) * width + np.uint64(runs[1, i])
            stop = start + np.uint64(runs[2, i] - runs[1, i])
            end = _take(free_at, start - one, taken, end)
            end = _take(free_at, stop, taken, end)
            for pixel in range(start - width, stop - width):
                end = _take(free_at, np.uint64(pixel), taken, end)
            for pixel in range(start + width, stop + width):
                end = _take(free_at, np.uint64(pixel), taken, end)
    return end


@compiled
def _take(free_at: Ints, pixel: np.uint64, taken: Ints, end: int) -> int:
    """List a pixel if it is free, which it then is no more; return the length of the list."""
    taken[end] = pixel
    end += free_at[pixel]
    free_at[pixel] = 0
    return end


@compiled
def _choose_cells(cell_at: Ints, width: np.uint64, shift: int, pixels: Ints) -> Ints:
    """Return the label that each pixel takes from its neighbours; none is given yet."""
    one, mask = np.uint64(1), (np.int64(1) << shift) - 1
    chosen = np.empty(pixels.size, np.int64)
    for k in range(pixels.size):
        pixel = np.uint64(pixels[k])
        north, south = np.int64(cell_at[pixel - width]), np.int64(cell_at[pixel + width])
        west, east = np.int64(cell_at[pixel - one]), np.int64(cell_at[pixel + one])
        best = _better(_better(_better(north, west, mask), east, mask), south, mask)
        chosen[k] = best & mask
    return chosen


@compiled
def _better(best: np.int64, cell: np.int64, mask: np.int64) -> np.int64:
    """Return the cell with the larger inner value, the first if they are equal; 0 is none."""
    return cell if cell | mask > best | mask else best


@compiled
def _advance(
    maps: tuple[Ints, Ints, Ints, Ints],
    width: np.uint64,
    shift: int,
    taken: Ints,
    begin: int,
    chosen: Ints,
    tallies: tuple[Ints, Ints, Ints],
    goes_on: int,
) -> int:
    """Give pixels their labels and count them; list the free pixels beside them, if it goes on."""
    cell_at, inner_at, free_at, class_at = maps
    sums, votes, first = tallies
    one, end = np.uint64(1), begin + chosen.size
    for k in range(chosen.size):
        label, pixel = chosen[k], np.uint64(taken[begin + k])
        value = np.int64(inner_at[pixel])
        cell_at[pixel] = label | (value + 1) << shift
        sums[label, 0] += 1
        sums[label, 1] += value
        first[label] = min(first[label], np.int64(pixel))
        if votes.shape[1] and class_at[pixel] < votes.shape[1]:
            votes[label, class_at[pixel]] += 1
        if goes_on:
            end = _take(free_at, pixel - width, taken, end)
            end = _take(free_at, pixel - one, taken, end)
            end = _take(free_at, pixel + one, taken, end)
            end = _take(free_at, pixel + width, taken, end)
    return end


@compiled
def _lengthened(array: Ints, kept: int, size: int) -> Ints:
    """Return a longer array with the same first entries."""
    longer = np.empty(size, array.dtype)
    longer[:kept] = array[:kept]
    return longer
