"""Many small objects, window by window, and yet the same as on the whole map.

An object belongs to the window whose tile holds its *anchor*, the raster-first pixel of
its core. A window sees its tile and a halo. A core that the window may not see whole, or
whose surroundings it may not see whole, is *open*: it is looked at again in a larger
window around its apparent anchor, until it is *closed* (and drawn) or turns out to have
another anchor (and belongs to another tile). Windows need not talk to each other.

::

    +------------- window ------------+     a  closed: complete, and farther than the
    |      +------ tile ------+       |        margin from each side
    |      |   (a)            |       |     b  open: touches a side of the window
    |     (c)             (b)=========|     c  its anchor is outside: not ours
    |      +------------------+       |
    +---------------------------------+

Why it is exact. The true anchor is the raster minimum of every visible part of its core
that holds it, so the tile with the true anchor always lists the core; every other tile
sees a cut part and loses it on the second look. A grown pixel hangs on a chain of at
most R steps, and each step reads maps and "is it labelled" one pixel farther: within
2R + 2 pixels of the core's box, all of which a closed core's window holds. Whether a
neighbour is labelled is uncertain only for cut cores that look too small; closed cores
have none near. All sums are integers relative to the anchor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wsi_pipeline.geometry import Box
from wsi_pipeline.instances.heads import HeadMaps, Objects, above
from wsi_pipeline.instances.kernels import (
    Ints,
    cores_and_ground,
    describe,
    find_runs,
    grow,
    label_runs,
    paint,
    tally,
)
from wsi_pipeline.instances.runs import Runs
from wsi_pipeline.instances.tracing import trace_labels
from wsi_pipeline.spec import AnchorRules

__all__ = ["AnchorFinder"]

_FIRST_RADIUS_PX = 64
"""How far a second look reaches at least; twice that on the third, and so on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cores:
    """The cores that a window sees."""

    runs: Ints
    """(3, N) int32 ``y, x0, x1`` in the window's array."""
    labels: Ints
    """(N,) int32 core of each run, from 1."""
    table: Ints
    """(n, 7) int64: area, box and anchor in the head's grid, see ``kernels.describe``."""
    seeds: Ints
    """(n,) bool: takes part in growth; cut cores do, whatever their visible size."""
    closed: Ints
    """(n,) bool: ours to draw here."""
    open: Ints
    """(n,) bool: may be ours, needs a larger window."""
    oversized: bool
    """Whether a core of the tile exceeds the largest diameter."""


class AnchorFinder:
    """Finds the objects of one head that has :class:`AnchorRules`."""

    def __init__(self, maps: HeadMaps, rules: AnchorRules) -> None:
        self.maps = maps
        self._core_from = above(rules.inner_threshold)
        self._ground_from = above(rules.foreground_threshold)
        self._min_core_px = maps.area_px(rules.min_core_um2)
        self._min_area_px = maps.area_px(rules.min_area_um2)
        self._steps = maps.length_px(rules.grow_um)
        self._max_px = maps.length_px(rules.max_diameter_um)
        self._margin = 2 * self._steps + 2

    def find(self, tile: Box, halo_px: int) -> tuple[Objects | None, bool]:
        """Draw the objects whose anchor lies in a tile.

        Args:
            tile: a box of the head's grid.
            halo_px: margin of the first window; any value gives the same objects.

        Returns:
            The objects, or None where there are none, and whether cores were dropped
            because they exceed the largest diameter.
        """
        found: list[Objects] = []
        oversized = False
        todo = [(tile, halo_px)]
        while todo:
            own, halo = todo.pop()
            objects, open_anchors, dropped = self._look(own, own.pad(halo))
            oversized |= dropped
            if objects is not None:
                found.append(objects)
            wider = max(2 * halo, 2 * self._margin, _FIRST_RADIUS_PX)
            todo += [(Box(x=x, y=y, width=1, height=1), wider) for x, y in open_anchors]
        return (Objects.concatenate(found) if found else None), oversized

    def core_runs(self, tile: Box) -> tuple[Ints, Ints]:
        """Return runs of the cores in a tile that may be part of an oversized one.

        A core that lies within the tile and is not too large by itself never is; without
        those, few runs are left to be joined over the slide.

        Returns:
            ``(places, values)`` as ``Runs.join`` wants them.
        """
        core, _, _ = self._threshold(tile)
        y, x0, x1, value = find_runs(core)
        labels, count = label_runs(y, x0, x1, value, 0)
        table = describe(y, x0, x1, labels, count)
        # The map has a border of one pixel around the tile.
        cut = (table[:, 1:3] <= 1).any(axis=1)
        cut |= (table[:, 3] > tile.width) | (table[:, 4] > tile.height)
        kept = (cut | self._too_large(table))[labels - 1]
        places = np.stack([y + (tile.y - 1), x0 + (tile.x - 1), x1 + (tile.x - 1)])
        return places[:, kept], value[kept]

    def count_oversized(self, parts: list[tuple[Ints, Ints]]) -> int:
        """Count the cores of the whole map that exceed the largest diameter.

        Args:
            parts: :meth:`core_runs` of tiles that cover the map.
        """
        runs = Runs.join(self.maps.grid.size[0], parts)
        labels, count = runs.components()
        table = runs.describe(labels, count)
        return int(np.count_nonzero(self._too_large(table) & (table[:, 0] >= self._min_core_px)))

    def _too_large(self, table: Ints) -> Ints:
        extent = np.maximum(table[:, 3] - table[:, 1], table[:, 4] - table[:, 2])
        return np.asarray(extent > self._max_px)

    def _threshold(self, window: Box) -> tuple[Ints, Ints, Ints]:
        """Return cores, foreground and inner map of a window, with a border of one pixel."""
        read = window.pad(1)
        inner, contour = self.maps.probabilities(read)
        outside = read.intersect(self.maps.grid.box).relative_to(read)
        seen = inner
        if outside.size != read.size:
            # Beyond the slide counts as foreground: its border does not erode.
            seen = np.full_like(inner, 255)
            seen[outside.slices] = inner[outside.slices]
        return *cores_and_ground(seen, contour, self._core_from, self._ground_from), inner

    def _look(self, own: Box, window: Box) -> tuple[Objects | None, list[tuple[int, int]], bool]:
        window = window.intersect(self.maps.grid.box)
        core, ground, inner = self._threshold(window)
        y, x0, x1, value = find_runs(core)
        if y.size == 0:
            return None, [], False
        labels, count = label_runs(y, x0, x1, value, 0)
        table = describe(y, x0, x1, labels, count)
        table[:, [1, 3, 5]] += window.x - 1
        table[:, [2, 4, 6]] += window.y - 1
        cores = self._judge(np.stack([y, x0, x1]), labels, table, own, window)
        open_anchors = [(int(x), int(y)) for x, y in table[cores.open, 5:7]]
        objects = self._draw(cores, ground, inner, window) if cores.closed.any() else None
        return objects, open_anchors, cores.oversized

    def _judge(self, runs: Ints, labels: Ints, table: Ints, own: Box, window: Box) -> _Cores:
        area, box, anchor = table[:, 0], table[:, 1:5], table[:, 5:7]
        slide = self.maps.grid.box
        sides = np.array([window.x, window.y, window.x1, window.y1])
        real = sides == [slide.x, slide.y, slide.x1, slide.y1]
        # Distance of each box to each side; a side of the slide is infinitely far.
        room = np.where(real, np.iinfo(np.int64).max, np.abs(box - sides))
        cut = (room == 0).any(axis=1)
        small = area < self._min_core_px
        oversized = self._too_large(table) & ~small
        mine = (
            (anchor >= [own.x, own.y]).all(axis=1)
            & (anchor < [own.x1, own.y1]).all(axis=1)
            & (cut | ~small)
        )
        listed = mine & ~oversized
        closed = listed & (room >= self._margin).all(axis=1)
        for other in box[cut & small]:
            gap = np.maximum(box[:, :2] - other[2:], other[:2] - box[:, 2:]).max(axis=1)
            closed &= gap > self._margin
        return _Cores(
            runs=runs,
            labels=labels,
            table=table,
            seeds=cut | ~small,
            closed=closed,
            open=listed & ~closed,
            oversized=bool((mine & oversized).any()),
        )

    def _draw(self, cores: _Cores, ground: Ints, inner: Ints, window: Box) -> Objects:
        count = len(cores.table)
        image = np.zeros(inner.shape, np.int32)
        value = np.where(cores.seeds[cores.labels - 1], cores.labels, 0).astype(np.int32)
        y, x0, x1 = cores.runs
        paint(image, y, x0, x1, value, 0, 0)
        runs = np.ascontiguousarray(cores.runs[:, value > 0])
        free = np.zeros(count + 1, np.int32)
        grown = grow(image, inner, ground, free, np.empty(0, np.int64), self._steps, runs)
        classes = self.maps.classes(window.pad(1))
        sums, votes, first = tally(image, inner, classes, runs, grown, count, self.maps.n_classes)
        ids = np.flatnonzero(cores.closed) + 1
        anchors = np.ascontiguousarray(cores.table[ids - 1, 5:7])
        kept, outlines = trace_labels(
            image,
            ids,
            first[ids],
            anchors,
            origin=(window.x - 1, window.y - 1),
            min_area_px=self._min_area_px,
        )
        ids = ids[kept]
        return Objects(anchors=anchors[kept], outlines=outlines, sums=sums[ids], votes=votes[ids])
