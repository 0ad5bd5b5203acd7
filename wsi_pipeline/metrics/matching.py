"""Which object is which: two label images, or two sets of objects, side by side.

All scores of objects by their pixels follow from one table: the area of each true object, of
each predicted object, and of each intersection. :func:`compare` makes it in one pass.

A label image is (H, W) of integers: 0 is background, any other number an object. Numbers
need not be consecutive, and no result depends on them: objects stand in raster order of
their first pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from wsi_pipeline.metrics.counts import DetectionCounts

__all__ = ["Matches", "Overlap", "compare", "one_to_one"]

Integers = NDArray[np.integer]
Indices = NDArray[np.intp]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Matches:
    """Pairs of a true and a predicted object; each object is in one pair at most."""

    n_true: int
    """Number of true objects."""
    n_pred: int
    """Number of predicted objects."""
    true_index: Indices
    """(k,) the true object of each pair."""
    pred_index: Indices
    """(k,) the predicted object of each pair."""

    def counts(self, *, excused: Bools | None = None) -> DetectionCounts:
        """Return how many were found.

        Args:
            excused: (n_pred,) predicted objects that lie where nobody annotated. Those
                without a true object are no false positives.
        """
        found = self.true_index.size
        false = self.n_pred - found
        if excused is not None:
            false = int(np.count_nonzero(~excused & ~self.pred_matched))
        return DetectionCounts(tp=found, fp=false, fn=self.n_true - found)

    @property
    def pred_matched(self) -> Bools:
        """(n_pred,) whether each predicted object has a true one."""
        matched = np.zeros(self.n_pred, bool)
        matched[self.pred_index] = True
        return matched

    @property
    def true_matched(self) -> Bools:
        """(n_true,) whether each true object has a predicted one."""
        matched = np.zeros(self.n_true, bool)
        matched[self.true_index] = True
        return matched


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Overlap:
    """Areas and intersections of the objects of two label images, in pixels.

    Only judged pixels count everywhere. Objects stand in raster order of their first pixel.
    """

    true_ids: NDArray[np.int64]
    """(n,) the true objects' numbers in the label image."""
    pred_ids: NDArray[np.int64]
    """(m,) the predicted objects' numbers."""
    true_areas: NDArray[np.int64]
    """(n,) pixels of each true object."""
    pred_areas: NDArray[np.int64]
    """(m,) pixels of each predicted object."""
    true_index: Indices
    """(k,) index of the true object of each pair that overlaps; ascending."""
    pred_index: Indices
    """(k,) index of its predicted object; ascending within a true object."""
    intersections: NDArray[np.int64]
    """(k,) pixels the two share, at least 1."""
    true_map: NDArray[np.int32]
    """(H, W): index of the true object + 1, 0 elsewhere and where nothing is judged."""
    pred_map: NDArray[np.int32]
    """(H, W): index of the predicted object + 1, else 0."""

    @property
    def unions(self) -> NDArray[np.int64]:
        """(k,) pixels of either object of each pair."""
        both = self.true_areas[self.true_index] + self.pred_areas[self.pred_index]
        return both - self.intersections

    @property
    def iou(self) -> NDArray[np.float64]:
        """(k,) intersection over union of each pair."""
        return self.intersections / self.unions

    def pairs(self, iou: float = 0.5) -> Indices:
        """Return which overlapping pairs match: one to one, with an IoU above ``iou``.

        From 0.5 on no object can be in two such pairs (Kirillov et al. 2019). Below, the
        pairs with the greatest sum of IoU are chosen (the Hungarian method).
        """
        above = np.flatnonzero(self.iou > iou)
        if iou >= 0.5:
            return above
        left, right = self.true_index[above], self.pred_index[above]
        return above[one_to_one(left, right, self.iou[above])]

    def matches(self, iou: float = 0.5) -> Matches:
        """Return :meth:`pairs` as matches, for scores that only count objects."""
        pairs = self.pairs(iou)
        return Matches(
            n_true=self.true_ids.size,
            n_pred=self.pred_ids.size,
            true_index=self.true_index[pairs],
            pred_index=self.pred_index[pairs],
        )

    def swapped(self) -> Overlap:
        """Return the same table with true and predicted exchanged."""
        order = np.lexsort((self.true_index, self.pred_index))
        return Overlap(
            true_ids=self.pred_ids,
            pred_ids=self.true_ids,
            true_areas=self.pred_areas,
            pred_areas=self.true_areas,
            true_index=self.pred_index[order],
            pred_index=self.true_index[order],
            intersections=self.intersections[order],
            true_map=self.pred_map,
            pred_map=self.true_map,
        )

    def best(self, merit: NDArray[np.float64] | NDArray[np.int64]) -> Indices:
        """Return each true object's pair of the greatest merit, -1 where it meets none.

        Args:
            merit: (k,) by pair. Of equals, the predicted object first in raster order.
        """
        order = np.lexsort((self.pred_index, -merit, self.true_index))
        owners, first = np.unique(self.true_index[order], return_index=True)
        chosen = np.full(self.true_ids.size, -1, np.intp)
        chosen[owners] = order[first]
        return chosen


def compare(true: Integers, pred: Integers, *, ignore: Bools | None = None) -> Overlap:
    """Return the table of two label images.

    A pixel is not judged where ``ignore`` is set and where ``true`` is negative (nobody
    annotated). Such pixels count for nothing, and of objects that lie mostly there:

    - a true object with more than half of its pixels unjudged is left out, and the rest of
      its pixels is not judged either;
    - a predicted object with more than half of its pixels unjudged is left out unless the
      rest of it matches a true object (IoU above 0.5); the rule of Kirillov et al. 2019
      for void regions.

    Args:
        true: (H, W) label image of the annotation; negative numbers: unknown.
        pred: (H, W) label image of the prediction.
        ignore: (H, W) True where nothing is judged.

    Raises:
        ValueError: the arrays are not label images of one size, or ``pred`` is negative
            somewhere.
    """
    _check(true, pred, ignore)
    unknown = true < 0
    if ignore is not None:
        unknown |= ignore
    true_map, true_ids = _numbered(np.maximum(true, 0))
    pred_map, pred_ids = _numbered(pred)
    if not unknown.any():
        return _tabulate(true_map, pred_map, true_ids, pred_ids)
    unknown |= _mostly(unknown, true_map)[true_map]
    hidden = _mostly(unknown, pred_map)
    judged_true, judged_pred = np.where(unknown, 0, true_map), np.where(unknown, 0, pred_map)
    table = _renumbered(judged_true, judged_pred, true_ids, pred_ids)
    matched = table.pred_ids[table.pred_index[table.pairs(0.5)]]
    hidden[1:] &= ~np.isin(pred_ids, matched)
    judged_pred[hidden[judged_pred]] = 0
    return _renumbered(judged_true, judged_pred, true_ids, pred_ids)


def one_to_one(left: Indices, right: Indices, weight: NDArray[np.float64]) -> Indices:
    """Return the pairs of the greatest total weight in which nobody occurs twice.

    The assignment problem on a sparse graph; everybody may also stay alone.

    Args:
        left: (k,) index of one partner of each possible pair; no pair twice.
        right: (k,) index of the other.
        weight: (k,) positive.

    Returns:
        Ascending indices into the possible pairs.
    """
    if not left.size:
        return np.zeros(0, np.intp)
    lefts, rights = int(left.max()) + 1, int(right.max()) + 1
    # The solver wants a partner for all: each has a stand-in of its own. A constant on
    # every edge changes no comparison and keeps stand-ins apart from absent edges.
    alone = np.arange(lefts)
    values = np.concatenate([weight + 1.0, np.ones(lefts)])
    rows = np.concatenate([left, alone])
    columns = np.concatenate([right, rights + alone])
    graph = coo_array((values, (rows, columns)), shape=(lefts, rights + lefts)).tocsr()
    row, column = min_weight_full_bipartite_matching(graph, maximize=True)
    partner = np.empty(lefts, np.intp)
    partner[row] = column
    return np.flatnonzero(partner[left] == right)


def _check(true: Integers, pred: Integers, ignore: Bools | None) -> None:
    for name, labels in (("true", true), ("pred", pred)):
        if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
            msg = f"{name}: a label image (H, W) of integers wanted, not {labels.shape} "
            raise ValueError(msg + f"{labels.dtype}")
    if ignore is not None and ignore.dtype != bool:
        raise ValueError(f"ignore: an array of bool wanted, not {ignore.dtype}")
    for name, other in (("pred", pred), ("ignore", ignore)):
        if other is not None and other.shape != true.shape:
            raise ValueError(f"{name} is {other.shape}, true is {true.shape}")
    if pred.size and int(pred.min()) < 0:
        raise ValueError("pred holds negative numbers: only the annotation may be unknown")


def _numbered(labels: Integers) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Renumber objects 1, 2, ... in raster order; return the image and the old numbers."""
    flat = labels.ravel()
    places = np.flatnonzero(flat)
    numbers = np.zeros(flat.size, np.int32)
    if not places.size:
        return numbers.reshape(labels.shape), np.zeros(0, np.int64)
    codes = flat[places].astype(np.int64)
    names: NDArray[np.int64] | None = None
    if codes.max() > 16 * flat.size:  # too large for a table by number
        names, codes = np.unique(codes, return_inverse=True)
    first = np.full(int(codes.max()) + 1, flat.size)
    np.minimum.at(first, codes, places)
    found = np.flatnonzero(first < flat.size)
    order = found[np.argsort(first[found])]
    table = np.zeros(first.size, np.int32)
    table[order] = np.arange(1, order.size + 1)
    numbers[places] = table[codes]
    return numbers.reshape(labels.shape), order if names is None else names[order]


def _mostly(unknown: Bools, numbers: NDArray[np.int32]) -> Bools:
    """Return by number whether more than half of the object's pixels are unknown."""
    total = np.bincount(numbers.ravel(), minlength=1)
    hidden = 2 * np.bincount(numbers[unknown], minlength=total.size) > total
    hidden[0] = False
    return hidden


def _renumbered(
    true: NDArray[np.int32],
    pred: NDArray[np.int32],
    true_ids: NDArray[np.int64],
    pred_ids: NDArray[np.int64],
) -> Overlap:
    true_map, true_kept = _numbered(true)
    pred_map, pred_kept = _numbered(pred)
    return _tabulate(true_map, pred_map, true_ids[true_kept - 1], pred_ids[pred_kept - 1])


def _tabulate(
    true_map: NDArray[np.int32],
    pred_map: NDArray[np.int32],
    true_ids: NDArray[np.int64],
    pred_ids: NDArray[np.int64],
) -> Overlap:
    both = (true_map > 0) & (pred_map > 0)
    width = np.int64(pred_ids.size + 1)
    codes, shared = np.unique(true_map[both] * width + pred_map[both], return_counts=True)
    return Overlap(
        true_ids=true_ids,
        pred_ids=pred_ids,
        true_areas=np.bincount(true_map.ravel(), minlength=true_ids.size + 1)[1:],
        pred_areas=np.bincount(pred_map.ravel(), minlength=pred_ids.size + 1)[1:],
        true_index=codes // width - 1,
        pred_index=codes % width - 1,
        intersections=shared,
        true_map=true_map,
        pred_map=pred_map,
    )
