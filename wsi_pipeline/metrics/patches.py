"""How well whole images are classified: accuracy, F1, confusion, area under the ROC curve."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from wsi_pipeline.metrics.counts import Counts, check_classes, mean_defined, ratio

__all__ = ["Confusion", "confusion", "macro_auc", "one_vs_rest_auc"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Confusion(Counts):
    """How often each class was taken for each."""

    table: NDArray[np.int64]
    """(C, C): true class by row, predicted class by column."""

    @property
    def accuracy(self) -> float:
        """Share that was classified rightly; NaN without images."""
        return ratio(float(self.table.trace()), float(self.table.sum()))

    @property
    def recall(self) -> NDArray[np.float64]:
        """(C,) share of each class that was recognised; NaN where it does not occur."""
        return _shares(self.table.diagonal(), self.table.sum(axis=1))

    @property
    def precision(self) -> NDArray[np.float64]:
        """(C,) share of what was called so that is; NaN where nothing was called so."""
        return _shares(self.table.diagonal(), self.table.sum(axis=0))

    @property
    def f1(self) -> NDArray[np.float64]:
        """(C,) F1 of each class; NaN where it neither occurs nor is predicted."""
        both = self.table.sum(axis=0) + self.table.sum(axis=1)
        return _shares(2 * self.table.diagonal(), both)

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that occur."""
        return mean_defined(self.recall.tolist())

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes that occur or are predicted."""
        return mean_defined(self.f1.tolist())


def confusion(true: NDArray[np.integer], pred: NDArray[np.integer], *, n_classes: int) -> Confusion:
    """Count how often each class was taken for each.

    Args:
        true: (N,) class ids.
        pred: (N,) class ids; ``scores.argmax(axis=1)`` where there are scores.
        n_classes: number of classes.

    Raises:
        ValueError: the lengths differ or an id is out of range.
    """
    if true.shape != pred.shape or true.ndim != 1:
        raise ValueError(f"true is {true.shape}, pred is {pred.shape}: one length wanted")
    check_classes("true", true, n_classes)
    check_classes("pred", pred, n_classes)
    codes = true.astype(np.int64) * n_classes + pred
    table = np.bincount(codes, minlength=n_classes**2).reshape(n_classes, n_classes)
    return Confusion(table=table)


def one_vs_rest_auc(true: NDArray[np.integer], scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return each class's area under the ROC curve, against all others.

    The area is the chance that a random member of the class scores above a random other
    image, ties counting half (the Mann-Whitney statistic).

    Args:
        true: (N,) class ids.
        scores: (N, C) any increasing measure of belief.

    Returns:
        (C,): NaN where all images or none are of the class.

    Raises:
        ValueError: the shapes disagree, an id is out of range or a score is NaN.
    """
    if scores.ndim != 2 or true.shape != scores.shape[:1]:
        raise ValueError(f"true is {true.shape}, scores are {scores.shape}: (N,), (N, C) wanted")
    check_classes("true", true, scores.shape[1])
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN")
    member = true[:, None] == np.arange(scores.shape[1])
    inside = member.sum(axis=0).astype(np.float64)
    outside = true.size - inside
    ranks = np.where(member, rankdata(scores, axis=0), 0.0).sum(axis=0)
    return _shares(ranks - inside * (inside + 1) / 2, inside * outside)


def macro_auc(true: NDArray[np.integer], scores: NDArray[np.floating]) -> float:
    """Return the mean of :func:`one_vs_rest_auc` over the classes for which it is defined."""
    return mean_defined(one_vs_rest_auc(true, scores).tolist())


def _shares(part: NDArray[np.generic], whole: NDArray[np.generic]) -> NDArray[np.float64]:
    """Divide, with NaN where the whole is zero."""
    result = np.full(part.shape, np.nan)
    np.divide(part, whole, out=result, where=whole.astype(bool))
    return result
