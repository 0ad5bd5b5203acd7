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
from wsi_pipeline.instances.anchoring import eroded_cores, judge, spread
from wsi_pipeline.instances.heads import HeadMaps, Objects, above
from wsi_pipeline.instances.kernels import Ints, describe, label_runs
from wsi_pipeline.instances.runs import Runs
from wsi_pipeline.instances.tracing import trace_labels
from wsi_pipeline.spec import AnchorRules

__all__ = ["AnchorFinder"]

_FIRST_RADIUS_PX = 64
"""How far a second look reaches at least; twice that on the third, and so on."""


_FEW_BITS, _MANY_BITS = 22, 40
"""Of a label in a cell of 32 bits, and of 64. The 10 others of the 32 are a sign and a probability
of 0 to 255, plus one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """A window of the maps."""

    read: Box
    """What was read, on the head's grid: the window and a border of one pixel."""
    runs: Ints
    """(3, N) int32 ``y, x0, x1`` of the cores, in the arrays below."""
    ground: Ints
    """(H, W) uint8, 1 where objects may be."""
    inner: Ints
    """(H, W) uint8 probability of an object's inside."""


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
        seen = self._threshold(tile)
        y, x0, x1 = seen.runs
        labels, count = label_runs(y, x0, x1, np.ones_like(y), 0)
        table = describe(y, x0, x1, labels, count)
        # The map has a border of one pixel around the tile.
        cut = (table[:, 1:3] <= 1).any(axis=1)
        cut |= (table[:, 3] > tile.width) | (table[:, 4] > tile.height)
        kept = (cut | self._too_large(table))[labels - 1]
        places = np.stack([y + (tile.y - 1), x0 + (tile.x - 1), x1 + (tile.x - 1)])
        return places[:, kept], np.ones(np.count_nonzero(kept), np.int32)

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

    def _threshold(self, window: Box) -> _Seen:
        """Read a window, with a border of one pixel, and find the runs of its cores."""
        read = window.pad(1)
        inner, contour = self.maps.probabilities(read)
        outside = read.intersect(self.maps.grid.box).relative_to(read)
        seen = inner
        if outside.size != read.size:
            # Beyond the slide counts as foreground: its border does not erode.
            seen = np.full_like(inner, 255)
            seen[outside.slices] = inner[outside.slices]
        y, x0, x1, ground = eroded_cores(seen, contour, self._core_from, self._ground_from)
        return _Seen(read=read, runs=np.stack([y, x0, x1]), ground=ground, inner=inner)

    def _look(self, own: Box, window: Box) -> tuple[Objects | None, list[tuple[int, int]], bool]:
        window = window.intersect(self.maps.grid.box)
        seen = self._threshold(window)
        y, x0, x1 = seen.runs
        if y.size == 0:
            return None, [], False
        labels, count = label_runs(y, x0, x1, np.ones_like(y), 0)
        table = describe(y, x0, x1, labels, count)
        table[:, [1, 3, 5]] += seen.read.x
        table[:, [2, 4, 6]] += seen.read.y
        seeds, closed, open_, oversized = judge(
            table,
            _sides(own),
            _sides(window),
            _sides(self.maps.grid.box),
            self._margin,
            self._min_core_px,
            self._max_px,
        )
        open_anchors = [(int(x), int(y)) for x, y in table[open_, 5:7]]
        if not closed.any():
            return None, open_anchors, oversized
        labels[~seeds[labels - 1]] = 0
        ids = np.flatnonzero(closed) + 1
        anchors = np.ascontiguousarray(table[ids - 1, 5:7])
        return self._draw(seen, labels, count, ids, anchors), open_anchors, oversized

    def _draw(self, seen: _Seen, labels: Ints, count: int, ids: Ints, anchors: Ints) -> Objects:
        """Let the cores with a label grow, and draw some of them."""
        n_classes = self.maps.n_classes
        bits, cell = (_FEW_BITS, np.int32) if count < 1 << _FEW_BITS else (_MANY_BITS, np.int64)
        cells = np.zeros(seen.inner.shape, cell)
        classes = self.maps.classes(seen.read)
        sums, votes, first = spread(
            cells,
            bits,
            seen.inner,
            seen.ground,
            self._steps,
            seen.runs,
            labels,
            classes,
            count,
            n_classes,
        )
        kept, outlines = trace_labels(
            cells,
            ids,
            first[ids],
            sums[ids, 0],
            anchors,
            label_bits=bits,
            origin=(seen.read.x, seen.read.y),
            min_area_px=self._min_area_px,
        )
        ids = ids[kept]
        return Objects(anchors=anchors[kept], outlines=outlines, sums=sums[ids], votes=votes[ids])


def _sides(box: Box) -> Ints:
    return np.array([box.x, box.y, box.x1, box.y1])
