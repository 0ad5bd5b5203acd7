"""Object Hausdorff distance: how far outlines stray, in pixels.

The distance of two objects is the greatest distance of any pixel of one to the nearest
pixel of the other, whichever side is worse; pixels are the points at their centres. As in
the GlaS contest (Sirinukunwattana et al. 2017), an object's counterpart is the one it shares
most pixels with, and, where it shares none, the one at the smallest Hausdorff distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects
from scipy.spatial import KDTree

from wsi_pipeline.metrics.counts import Counts, ratio
from wsi_pipeline.metrics.matching import Overlap

__all__ = ["HausdorffSums", "object_hausdorff"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HausdorffSums(Counts):
    """Distances of each object to its counterpart, weighted by the object's area."""

    true_distance: float = 0.0
    """Sum over true objects with a counterpart of area x distance, in pixels."""
    true_area: int = 0
    """Pixels of those objects."""
    pred_distance: float = 0.0
    """The same over predicted objects."""
    pred_area: int = 0
    """Pixels of those objects."""
    lone_area: int = 0
    """Pixels of objects in images whose other side is empty: they have no counterpart."""

    @property
    def distance_px(self) -> float:
        """Object Hausdorff distance.

        NaN without objects. Infinite as soon as an object has no counterpart, as the
        contest defines it.
        """
        return math.inf if self.lone_area else self.found_distance_px

    @property
    def found_distance_px(self) -> float:
        """The same over the objects that have a counterpart; NaN where none has."""
        true = ratio(self.true_distance, self.true_area)
        return (true + ratio(self.pred_distance, self.pred_area)) / 2


def object_hausdorff(overlap: Overlap) -> HausdorffSums:
    """Return the sums behind the object Hausdorff distance of one image.

    Multiply the distance by the images' mpp for micrometres.
    """
    if not (overlap.true_ids.size and overlap.pred_ids.size):
        alone = overlap.true_areas.sum() + overlap.pred_areas.sum()
        return HausdorffSums(lone_area=int(alone))
    true, pred = _Shapes(overlap.true_map), _Shapes(overlap.pred_map)
    known: dict[tuple[int, int], float] = {}
    forth = _weighted(overlap, true, pred, known)
    # The two objects of a pair often are each other's counterpart: measure it once.
    known = {(second, first): distance for (first, second), distance in known.items()}
    back = _weighted(overlap.swapped(), pred, true, known)
    return HausdorffSums(
        true_distance=forth,
        true_area=int(overlap.true_areas.sum()),
        pred_distance=back,
        pred_area=int(overlap.pred_areas.sum()),
    )


class _Shapes:
    """The objects of a renumbered label image: boxes at once, outlines when asked."""

    def __init__(self, numbers: NDArray[np.int32]) -> None:
        self.numbers = numbers
        places = find_objects(numbers)
        self.boxes = np.array([[y.start, x.start, y.stop, x.stop] for y, x in places])
        """(n, 4): top, left, bottom, right."""
        self._outlines: dict[int, NDArray[np.int64]] = {}

    def mask(self, index: int, box: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return the object's pixels within a box."""
        top, left, bottom, right = box
        return np.asarray(self.numbers[top:bottom, left:right] == index + 1)

    def outline(self, index: int) -> NDArray[np.int64]:
        """Return (n, 2) row and column of the pixels that touch another object or none."""
        if index not in self._outlines:
            box = self.boxes[index]
            mask = self.mask(index, box)
            self._outlines[index] = np.argwhere(mask & ~binary_erosion(mask)) + box[:2]
        return self._outlines[index]


def _weighted(
    overlap: Overlap, own: _Shapes, other: _Shapes, known: dict[tuple[int, int], float]
) -> float:
    """Return the sum of area x distance over the true objects of the table."""
    best = overlap.best(overlap.intersections)
    total = 0.0
    for index, pair in enumerate(best):
        if pair < 0:
            distance = _to_nearest(own, index, other)
        else:
            key = (index, int(overlap.pred_index[pair]))
            if key not in known:
                known[key] = _distance(own, index, other, key[1])
            distance = known[key]
        total += float(overlap.true_areas[index]) * distance
    return total


def _to_nearest(own: _Shapes, index: int, other: _Shapes) -> float:
    """Return the smallest Hausdorff distance to any object of the other side."""
    # No distance is below that of like sides of the boxes: the outermost pixel of one
    # object has no pixel of the other within less.
    bounds = np.abs(other.boxes - own.boxes[index]).max(axis=1)
    nearest = math.inf
    for candidate in np.argsort(bounds, kind="stable"):
        if bounds[candidate] >= nearest:
            break
        nearest = min(nearest, _distance(own, index, other, int(candidate)))
    return nearest


def _distance(own: _Shapes, index: int, other: _Shapes, counterpart: int) -> float:
    """Return the Hausdorff distance of two objects in pixels."""
    first, second = own.boxes[index], other.boxes[counterpart]
    box = np.concatenate([np.minimum(first, second)[:2], np.maximum(first, second)[2:]])
    if (box[2:] - box[:2] < (first + second)[2:] - (first + second)[:2]).all():
        a, b = own.mask(index, box), other.mask(counterpart, box)
        return max(_furthest(a, b), _furthest(b, a))
    # Boxes apart: along the gap an inner pixel always has a neighbour that is further away
    # and one that is nearer, so outlines are enough.
    one, two = own.outline(index), other.outline(counterpart)
    return float(max(KDTree(two).query(one)[0].max(), KDTree(one).query(two)[0].max()))


def _furthest(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Return the greatest distance of a pixel of ``a`` to the nearest of ``b``."""
    astray = a & ~b
    if not astray.any():
        return 0.0
    return float(distance_transform_edt(~b)[astray].max())
