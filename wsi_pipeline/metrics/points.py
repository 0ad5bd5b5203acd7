"""How many objects were found by their centres, and how many of those got the right class.

Points are (N, 2), x and y, in any unit; the radius is in the same. Use micrometres: a
radius in pixels means another thing at each pixel size. Published radii: 12 px at 0.25 mpp,
3 micrometres, for nuclei (Graham et al. 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from wsi_pipeline.metrics.counts import Counts, ratio
from wsi_pipeline.metrics.matching import Matches, one_to_one

__all__ = ["TypedCounts", "match_points", "neighbours", "typed_counts"]

Points = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True, slots=True)
class TypedCounts(Counts):
    """What happened to the objects of one class."""

    tp: int = 0
    """Found, and called so rightly."""
    fp_class: int = 0
    """Found, and called so wrongly."""
    fn_class: int = 0
    """Of the class, found, and called something else."""
    fp: int = 0
    """Called so, but no object at all."""
    fn: int = 0
    """Of the class, but not found."""

    @property
    def f1(self) -> float:
        """F1 of the class as a detection of its own: an object called wrongly is a miss."""
        wrong = self.fp_class + self.fn_class + self.fp + self.fn
        return ratio(2 * self.tp, 2 * self.tp + wrong)

    @property
    def f1_hovernet(self) -> float:
        """F_c of Graham et al. 2019: as their scores compute it, a wrong class weighs double.

        2 TP / (2 TP + 2 FP_c + 2 FN_c + FP_d + FN_d), with FP_d and FN_d of the class
        alone, and no true negatives. Their F_d is :attr:`DetectionCounts.f1`.
        """
        wrong = 2 * (self.fp_class + self.fn_class) + self.fp + self.fn
        return ratio(2 * self.tp, 2 * self.tp + wrong)


def neighbours(
    true: Points, pred: Points, *, radius: float
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """Return all pairs at most ``radius`` apart: true index, predicted index, distance.

    Raises:
        ValueError: the points are not (N, 2), or the radius is not positive.
    """
    for name, points in (("true", true), ("pred", pred)):
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"{name}: points (N, 2) wanted, not {points.shape}")
    if not radius > 0:
        raise ValueError(f"the radius must be positive, not {radius}")
    if not (len(true) and len(pred)):
        none = np.zeros(0, np.intp)
        return none, none, np.zeros(0)
    pairs = KDTree(true).sparse_distance_matrix(KDTree(pred), radius, output_type="ndarray")
    pairs = pairs[np.lexsort((pairs["j"], pairs["i"]))]
    return pairs["i"], pairs["j"], pairs["v"]


def match_points(true: Points, pred: Points, *, radius: float) -> Matches:
    """Pair points one to one within a radius.

    As many pairs as there can be, and of all ways to have so many the one with the smallest
    total distance. (Published code often minimises the distance over all points first and
    drops the far pairs afterwards, which can lose pairs.)

    Args:
        true: (N, 2) x, y.
        pred: (M, 2) x, y.
        radius: greatest distance of a pair, inclusive, in the points' unit.

    Raises:
        ValueError: the points are not (N, 2), or the radius is not positive.
    """
    left, right, distance = neighbours(true, pred, radius=radius)
    # One pair more must outweigh any distance that the others can save.
    pair_worth = radius * (min(len(true), len(pred)) + 1)
    chosen = one_to_one(left, right, (pair_worth - distance) / pair_worth)
    return Matches(
        n_true=len(true), n_pred=len(pred), true_index=left[chosen], pred_index=right[chosen]
    )


def typed_counts(
    matches: Matches,
    true_classes: NDArray[np.integer],
    pred_classes: NDArray[np.integer],
    *,
    classes: Sequence[int],
) -> tuple[TypedCounts, ...]:
    """Return the counts of each class, of objects paired whatever their class.

    Args:
        matches: by :func:`match_points` or by :meth:`Overlap.matches`.
        true_classes: (n_true,). Negative: unknown; then neither the object nor a predicted
            one that found it counts.
        pred_classes: (n_pred,).
        classes: the classes to count, usually 1 and up.

    Raises:
        ValueError: the classes are not one an object.
    """
    if (true_classes.shape, pred_classes.shape) != ((matches.n_true,), (matches.n_pred,)):
        msg = f"{matches.n_true} true and {matches.n_pred} predicted objects, but classes "
        raise ValueError(msg + f"{true_classes.shape} and {pred_classes.shape}")
    true, pred = true_classes[matches.true_index], pred_classes[matches.pred_index]
    missed = true_classes[~matches.true_matched]
    false = pred_classes[~matches.pred_matched]
    return tuple(
        TypedCounts(
            tp=_count((true == label) & (pred == label)),
            fp_class=_count((true != label) & (true >= 0) & (pred == label)),
            fn_class=_count((true == label) & (pred != label)),
            fp=_count(false == label),
            fn=_count(missed == label),
        )
        for label in classes
    )


def _count(mask: NDArray[np.bool_]) -> int:
    return int(np.count_nonzero(mask))
