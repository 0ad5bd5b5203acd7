"""Few large objects of any extent: labelled over the whole slide from pixel runs.

1. Each tile gives its core runs; joined, they are the runs of the whole slide, which are
   labelled at once. Cores inside a parent object are split by parent before that.
2. Each tile grows the known labels (a local operation) and gives its label runs and sums.
3. Joined again, they are the objects; holes are found from the gaps between the runs.
4. Objects are drawn one by one, when the table wants them.

No step depends on how the tiles were cut: runs join to the same maximal runs, growth
reads a halo as wide as it can be influenced from, and sums are integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from wsi_pipeline.geometry import Box
from wsi_pipeline.instances.heads import HeadMaps, Objects, above
from wsi_pipeline.instances.kernels import Ints, grow, label_runs, paint, tally, threshold_runs
from wsi_pipeline.instances.parallel import ordered_map
from wsi_pipeline.instances.runs import Runs
from wsi_pipeline.instances.tracing import trace_runs
from wsi_pipeline.spec import RunRules

__all__ = ["Regions", "core_runs", "element_offsets", "find_regions", "lay_tiles"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Regions:
    """All objects of one head, on the whole slide, as runs."""

    runs: Runs
    """Pixels of the objects, holes filled; values are labels 1..n in raster order of anchors."""
    anchors: Ints
    """(n, 2) int64 x, y of each core's raster-first pixel."""
    sums: Ints
    """(n, 2) int64: pixels of the label, summed inner values."""
    votes: Ints
    """(n, C) int64: pixels of the label by class id."""
    parents: Ints | None
    """(n,) int32 labels of the regions the objects were confined to, if they were."""
    places: Ints
    """(3, M) int32 ``y, x0, x1`` of the runs sorted by object."""
    ends: Ints
    """(n,) int64 where each object ends in ``places``."""

    def __len__(self) -> int:
        return len(self.anchors)

    def objects(self, index: Ints) -> Objects:
        """Draw some objects.

        Args:
            index: (k,) int64 label - 1 of each.
        """
        begins = self.ends[index] - np.diff(self.ends, prepend=0)[index]
        pieces = [
            self.places[:, begin:end] for begin, end in zip(begins, self.ends[index], strict=True)
        ]
        anchors = np.ascontiguousarray(self.anchors[index])
        ends = np.cumsum([piece.shape[1] for piece in pieces], dtype=np.int64)
        return Objects(
            anchors=anchors,
            outlines=trace_runs(np.concatenate(pieces, axis=1), ends, anchors),
            sums=self.sums[index],
            votes=self.votes[index],
            parents=None if self.parents is None else self.parents[index],
        )


def find_regions(
    maps: HeadMaps,
    rules: RunRules,
    cores: Runs,
    parent: Regions | None,
    *,
    window_px: int,
    workers: int,
    stop: Callable[[], bool],
) -> Regions:
    """Find all objects of a head that has :class:`RunRules`.

    Args:
        maps: the head's maps.
        rules: thresholds and sizes.
        cores: the joined :func:`core_runs` of tiles that cover the map.
        parent: the objects that confine these, on the same grid; None: nothing does.
        window_px: side of the tiles; any value gives the same objects.
        workers: threads.
        stop: asked between tiles.

    Raises:
        Interrupted: ``stop()`` was true.
    """
    tiles = lay_tiles(maps.grid.box, window_px)
    width = maps.grid.size[0]
    if parent is not None:
        cores = cores.intersect(parent.runs)
    labels, count = cores.components()
    table = cores.describe(labels, count)
    owners = np.zeros(count + 1, np.int32)
    if parent is not None:
        owners[labels] = cores.values
    keep = table[:, 0] >= maps.area_px(rules.min_core_um2)
    number = np.concatenate([[0], np.where(keep, np.cumsum(keep), 0)]).astype(np.int32)
    cores = cores.relabel(number[labels])
    owners = np.concatenate([[0], owners[1:][keep]]).astype(np.int32)

    element = element_offsets(maps.length_px(rules.grow_um))
    growth = _Growth(maps=maps, cores=cores, element=element, parent=parent, owners=owners)
    sums = np.zeros((owners.size, 2), np.int64)
    votes = np.zeros((owners.size, maps.n_classes), np.int64)
    parts = []
    for piece in ordered_map(growth.grow, tiles, workers=workers, stop=stop):
        parts.append((piece.places, piece.values))
        sums[piece.ids] += piece.sums
        votes[piece.ids] += piece.votes
    runs = Runs.join(width, parts)
    limit = math.inf if rules.fill_holes_um2 is None else maps.area_px(rules.fill_holes_um2)
    runs = Runs.join(
        width, [(runs.places, runs.values), _holes_to_fill(runs, limit, parent, owners)]
    )
    places, ends = runs.by_value()
    return Regions(
        runs=runs,
        anchors=np.ascontiguousarray(table[keep, 5:7]),
        sums=sums[1:],
        votes=votes[1:],
        parents=None if parent is None else owners[1:],
        places=places,
        ends=ends,
    )


def lay_tiles(box: Box, side_px: int) -> list[Box]:
    """Cut a box into tiles, row by row."""
    if side_px < 1:
        msg = f"the window must be at least one pixel wide, not {side_px}"
        raise ValueError(msg)
    return [
        Box(x=x, y=y, width=side_px, height=side_px).intersect(box)
        for y in range(box.y, box.y1, side_px)
        for x in range(box.x, box.x1, side_px)
    ]


def element_offsets(diameter_px: int) -> list[tuple[int, int]]:
    """Return the pixels of an elliptical structuring element relative to its anchor.

    The element is OpenCV's ``MORPH_ELLIPSE``: in the row ``dy`` from the anchor (at
    ``diameter // 2``) it reaches ``round(r * sqrt(1 - (dy / r) ** 2))`` to both sides,
    cut off at the element's box, so even sizes lean to the upper left.

    Returns:
        ``(dx, dy)`` of each pixel; nothing for a diameter of one or less.
    """
    if diameter_px <= 1:
        return []
    radius = diameter_px // 2
    offsets = []
    for row in range(diameter_px):
        dy = row - radius
        reach = round(radius * math.sqrt((radius * radius - dy * dy) / (radius * radius)))
        for column in range(max(radius - reach, 0), min(radius + reach + 1, diameter_px)):
            offsets.append((column - radius, dy))
    return offsets


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """What one tile contributes."""

    places: Ints
    """(3, N) int32 label runs in the head's grid."""
    values: Ints
    """(N,) int32 labels."""
    ids: Ints
    """(m,) labels seen."""
    sums: Ints
    """(m, 2) pixels and summed inner values of these."""
    votes: Ints
    """(m, C) votes of these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Growth:
    """Widens labelled cores by a structuring element, tile by tile."""

    maps: HeadMaps
    cores: Runs
    element: list[tuple[int, int]]
    parent: Regions | None
    owners: Ints

    def grow(self, tile: Box) -> _Piece:
        """Return label runs and sums of the pixels of a tile.

        As many steps are taken as the element's farthest pixel is away, so that a
        lone core grows to exactly its dilation.
        """
        steps = max((abs(dx) + abs(dy) for dx, dy in self.element), default=0)
        seen = tile.pad(2 * steps + 2).intersect(self.maps.grid.box)
        (y, x0, x1), values = self.cores.window(seen)
        if not values.size:
            return self._nothing()
        # Nothing grows farther than this.
        around = Box.from_edges(int(x0.min()), int(y.min()), int(x1.max()), int(y.max()) + 1).pad(
            steps
        )
        window = seen.intersect(around)
        part = tile.intersect(window)
        if not part.area:
            return self._nothing()
        # The border is as wide as the element reaches: flat offsets never wrap around.
        read = window.pad(steps + 1)
        inner, _ = self.maps.probabilities(read)
        image = np.zeros(inner.shape, np.int32)
        ids, local = np.unique(values, return_inverse=True)
        paint(image, y, x0, x1, (local + 1).astype(np.int32), read.x, read.y)
        ground = self._ground(read, window)
        flat = np.array([dy * read.width + dx for dx, dy in self.element], np.int64)
        owner = np.concatenate([[0], self.owners[ids]]).astype(np.int32)
        runs = np.stack([y - read.y, x0 - read.x, x1 - read.x]).astype(np.int32)
        grow(image, inner, ground, owner, flat, steps, runs)
        return self._collect(part, read, image, inner, ids)

    def _nothing(self) -> _Piece:
        return _Piece(
            places=np.empty((3, 0), np.int32),
            values=np.empty(0, np.int32),
            ids=np.empty(0, np.int32),
            sums=np.empty((0, 2), np.int64),
            votes=np.empty((0, self.maps.n_classes), np.int64),
        )

    def _ground(self, read: Box, window: Box) -> Ints:
        if self.parent is None:
            ground = np.zeros((read.height, read.width), np.uint8)
            ground[window.relative_to(read).slices] = 1
            return ground
        ground = np.zeros((read.height, read.width), np.int32)
        (y, x0, x1), values = self.parent.runs.window(window)
        paint(ground, y, x0, x1, values, read.x, read.y)
        return ground

    def _collect(self, part: Box, read: Box, image: Ints, inner: Ints, ids: Ints) -> _Piece:
        inside = part.relative_to(read)
        (y, x0, x1), labels, sums, votes = tally(
            image,
            inner,
            self.maps.classes(part),
            (inside.x, inside.y, inside.x1, inside.y1),
            ids.size,
            self.maps.n_classes,
        )
        return _Piece(
            places=np.stack([y + read.y, x0 + read.x, x1 + read.x]).astype(np.int32),
            values=ids[labels - 1].astype(np.int32),
            ids=ids,
            sums=sums[1:],
            votes=votes[1:],
        )


def core_runs(maps: HeadMaps, rules: RunRules, tile: Box) -> tuple[Ints, Ints]:
    """Return the runs of the cores in a tile: ``(places, values)`` as ``Runs.join`` wants."""
    inner, contour = maps.probabilities(tile)
    y, x0, x1 = threshold_runs(
        inner, contour, above(rules.inner_threshold), above(rules.contour_threshold)
    )
    places = np.stack([y + tile.y, x0 + tile.x, x1 + tile.x]).astype(np.int32)
    return places, np.ones(y.size, np.int32)


def _holes_to_fill(
    runs: Runs, limit: float, parent: Regions | None, owners: Ints
) -> tuple[Ints, Ints]:
    """Return the runs, with the label around them, of the holes that are to be filled.

    A hole is a component of the gaps of one object (8-connected, as the object is
    4-connected) that does not reach around it. It is filled if it is smaller than the
    limit, holds no pixel of another object, and does not leave the object's parent.
    """
    if not len(runs):
        return runs.places, runs.values
    (y, x0, x1), label, outside = _gaps(runs)
    hole = ~outside
    y, x0, x1, label = y[hole], x0[hole], x1[hole], label[hole]
    component, count = label[:, 1], int(label[:, 1].max(initial=0)) + 1
    starts = y.astype(np.int64) * runs.width + x0
    stops = starts + (x1 - x0)
    bad = runs.overlaps(starts, stops)
    if parent is not None:
        own = owners[label[:, 0]]
        bad |= parent.runs.at(x1 - 1, y) != own
        # And one run of the parent from end to end.
        index = np.searchsorted(parent.runs.starts, starts, side="right")
        bad |= index != np.searchsorted(parent.runs.starts, stops - 1, side="right")
    area = np.bincount(component, weights=x1 - x0, minlength=count)
    spoilt = np.bincount(component, weights=bad, minlength=count) > 0
    fill = (~spoilt & (area < limit))[component]
    places = np.stack([y[fill], x0[fill], x1[fill]]).astype(np.int32)
    return places, label[fill, 0].astype(np.int32)


def _gaps(runs: Runs) -> tuple[tuple[Ints, Ints, Ints], Ints, Ints]:
    """Return the gaps around and within every object, labelled in one go.

    Each object gets a frame of its own, one pixel wider than its box, in a tall strip of
    frames; so one pass labels the gaps of all objects.

    Returns:
        ``y, x0, x1`` of the gaps in the slide; (K, 2) object and component of each; and
        (K,) bool whether it reaches around its object.
    """
    (y, x0, x1), ends = runs.by_value()
    begins = np.concatenate([[0], ends[:-1]])
    size = ends - begins
    owner = np.repeat(np.arange(ends.size), size)
    top, bottom = y[begins], y[ends - 1]
    left = np.minimum.reduceat(x0, begins) - 1
    right = np.maximum.reduceat(x1, begins) + 1
    height = bottom - top + 4  # rows above and below, and one between frames
    shift = np.cumsum(height) - height - (top - 1)

    opens = np.ones(y.size, np.bool_)
    opens[1:] = (owner[1:] != owner[:-1]) | (y[1:] != y[:-1])
    closes = np.roll(opens, -1)
    behind = np.where(closes, right[owner], np.roll(x0, -1))
    whole = np.arange(ends.size)
    object_of = np.concatenate([owner, owner[opens], whole, whole])
    row = np.concatenate([y, y[opens], top - 1, bottom + 1]) + shift[object_of]
    start = np.concatenate([x1, left[owner[opens]], left, left])
    stop = np.concatenate([behind, x0[opens], right, right])
    order = np.lexsort((start, row))
    object_of, row, start, stop = (a[order] for a in (object_of, row, start, stop))
    component, _ = label_runs(row, start, stop, np.zeros(row.size, np.int32), 1)
    first = np.searchsorted(row, top - 1 + shift)
    outside = component == component[first][object_of]
    labels = np.stack([object_of + 1, component], axis=1)
    return (row - shift[object_of], start, stop), labels, outside
