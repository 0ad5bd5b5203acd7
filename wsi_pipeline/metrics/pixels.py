"""How well classes agree pixel by pixel: Dice, Jaccard, precision, recall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.metrics.counts import Counts, check_classes, mean_defined, ratio

__all__ = ["PixelCounts", "class_pixel_counts", "mean_dice", "mean_jaccard", "pixel_counts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelCounts(Counts):
    """Pixels by what they are and what they were called, for one class against the rest.

    Dice and Jaccard are 1 where no pixel is true and none is predicted: that is complete
    agreement. The other scores are NaN where they would divide by zero.
    """

    tp: int = 0
    """Of the class, and called so."""
    fp: int = 0
    """Not of the class, but called so."""
    fn: int = 0
    """Of the class, but not called so."""
    tn: int = 0
    """Neither."""

    @property
    def dice(self) -> float:
        """Dice coefficient, which is F1 of the pixels."""
        return ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn, empty=1.0)

    @property
    def jaccard(self) -> float:
        """Intersection over union."""
        return ratio(self.tp, self.tp + self.fp + self.fn, empty=1.0)

    @property
    def precision(self) -> float:
        """Share of the pixels called so that are of the class."""
        return ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """Share of the class's pixels that were called so."""
        return ratio(self.tp, self.tp + self.fn)

    @property
    def specificity(self) -> float:
        """Share of the other pixels that were not called so."""
        return ratio(self.tn, self.tn + self.fp)

    @property
    def accuracy(self) -> float:
        """Share of all pixels that were called what they are."""
        return ratio(self.tp + self.tn, self.tp + self.fp + self.fn + self.tn)


def pixel_counts(
    true: NDArray[np.bool_],
    pred: NDArray[np.bool_],
    *,
    ignore: NDArray[np.bool_] | None = None,
) -> PixelCounts:
    """Return the counts of one class.

    Args:
        true: (H, W) pixels of the class.
        pred: (H, W) pixels called so.
        ignore: (H, W) pixels that do not count.

    Raises:
        ValueError: the arrays are not masks of one size.
    """
    for name, mask in (("true", true), ("pred", pred)):
        if mask.dtype != bool:
            raise ValueError(f"{name}: a mask of bool wanted, not {mask.dtype}")
    ids = (true.astype(np.uint8), pred.astype(np.uint8))
    return class_pixel_counts(*ids, n_classes=2, ignore=ignore)[1]


def class_pixel_counts(
    true: NDArray[np.integer],
    pred: NDArray[np.integer],
    *,
    n_classes: int,
    ignore: NDArray[np.bool_] | None = None,
) -> tuple[PixelCounts, ...]:
    """Return the counts of each class against the rest, by class id from 0.

    Args:
        true: (H, W) class ids.
        pred: (H, W) class ids.
        n_classes: number of classes.
        ignore: (H, W) pixels that do not count; their ids may be anything.

    Raises:
        ValueError: the sizes differ, or an id of a pixel that counts is out of range.
    """
    for name, other in (("pred", pred), ("ignore", ignore)):
        if other is not None and other.shape != true.shape:
            raise ValueError(f"{name} is {other.shape}, true is {true.shape}")
    if ignore is not None:
        true, pred = true[~ignore], pred[~ignore]
    check_classes("true", true, n_classes)
    check_classes("pred", pred, n_classes)
    codes = true.astype(np.int64).ravel() * n_classes + pred.ravel()
    table = np.bincount(codes, minlength=n_classes**2).reshape(n_classes, n_classes)
    total, hits = int(table.sum()), table.diagonal()
    of_class, called = table.sum(axis=1), table.sum(axis=0)
    return tuple(
        PixelCounts(
            tp=int(hits[i]),
            fp=int(called[i] - hits[i]),
            fn=int(of_class[i] - hits[i]),
            tn=total - int(of_class[i] + called[i] - hits[i]),
        )
        for i in range(n_classes)
    )


def mean_dice(classes: Sequence[PixelCounts]) -> float:
    """Return the mean Dice of the classes that occur, true or predicted; NaN where none."""
    return mean_defined(counts.dice for counts in classes if _occurs(counts))


def mean_jaccard(classes: Sequence[PixelCounts]) -> float:
    """Return the mean Jaccard of the classes that occur, true or predicted; NaN where none."""
    return mean_defined(counts.jaccard for counts in classes if _occurs(counts))


def _occurs(counts: PixelCounts) -> bool:
    return counts.tp + counts.fp + counts.fn > 0
