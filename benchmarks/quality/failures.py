"""Why objects count as wrong: missed, merged, split, outlined badly, or not there at all.

A true object without a match (IoU above 0.5) is the first of these that it fits:

merged      one predicted object covers most of it and most of another true object
split       two predicted objects or more lie mostly within it
too small   one predicted object lies mostly within it
too large   one predicted object covers most of it
shifted     predicted objects cover a fifth of it or more
missed      none of these

A predicted object without a match is false where less than a fifth of it lies on true objects;
otherwise it is part of one of the failures above. "Most" is half or more of the pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.metrics import Overlap
from wsi_pipeline.metrics.counts import Counts

__all__ = ["Failures", "count_failures"]

_MOST = 0.5
_SOME = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Failures(Counts):
    """How many objects of an image went wrong, and how; and the size of those that did not."""

    matched: int = 0
    """True objects with a match."""
    merged: int = 0
    """True objects that share their predicted one with another."""
    split: int = 0
    """True objects that were found in pieces."""
    too_small: int = 0
    """True objects of which too little was found."""
    too_large: int = 0
    """True objects of which too much was found."""
    shifted: int = 0
    """True objects that were met, but not well."""
    missed: int = 0
    """True objects that were not found."""
    false: int = 0
    """Predicted objects where there is none."""
    log_area: float = 0.0
    """Sum over the matched pairs of the logarithm of predicted over true area."""


def count_failures(overlap: Overlap) -> Failures:
    """Sort the objects of an image by what happened to them."""
    matches = overlap.matches()
    true, pred = overlap.true_index, overlap.pred_index
    of_true = overlap.intersections / overlap.true_areas[true]
    of_pred = overlap.intersections / overlap.pred_areas[pred]
    covers, within = of_true >= _MOST, of_pred >= _MOST
    n_true, n_pred = overlap.true_ids.size, overlap.pred_ids.size
    covered = _count(pred[covers], n_pred)  # true objects that a predicted one covers
    pieces = _count(true[within], n_true)
    shares_it = _count(true[covers & (covered[pred] >= 2)], n_true) > 0
    touched = np.bincount(true, weights=of_true, minlength=n_true) >= _SOME
    kinds = {
        "merged": shares_it,
        "split": pieces >= 2,
        "too_small": pieces == 1,
        "too_large": _count(true[covers], n_true) > 0,
        "shifted": touched,
        "missed": np.ones(n_true, bool),
    }
    left = ~matches.true_matched
    counts = {}
    for name, fits in kinds.items():
        counts[name] = int(np.count_nonzero(left & fits))
        left &= ~fits
    on_true = np.bincount(pred, weights=of_pred, minlength=n_pred)
    ratio = overlap.pred_areas[matches.pred_index] / overlap.true_areas[matches.true_index]
    return Failures(
        matched=int(matches.true_index.size),
        false=int(np.count_nonzero(~matches.pred_matched & (on_true < _SOME))),
        log_area=float(np.log(ratio).sum()),
        **counts,
    )


def _count(index: NDArray[np.intp], n: int) -> NDArray[np.intp]:
    return np.bincount(index, minlength=n)
