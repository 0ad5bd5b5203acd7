"""Scored detections at all thresholds: FROC and average precision.

Within an image detections take true objects in the order of their scores, each the nearest
(or best overlapping) that is still free; what comes too late is a false positive, as in COCO.
So the matches above a threshold do not depend on what lies below it, and one pass serves all
thresholds. Detections of equal score stand or fall together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.metrics.counts import ratio
from wsi_pipeline.metrics.points import neighbours

__all__ = [
    "CAMELYON_RATES",
    "DIGESTPATH_RATES",
    "Froc",
    "ScoredDetections",
    "average_precision",
    "froc",
    "score_boxes",
    "score_points",
]

CAMELYON_RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives per image at which the CAMELYON16 challenge reads sensitivities."""
DIGESTPATH_RATES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""The same of DigestPath 2019, per image without signet-ring cells."""

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoredDetections:
    """The detections of one image, and which are true."""

    n_true: int
    """True objects in the image."""
    scores: NDArray[np.float64]
    """(n,) of the detections that count."""
    hits: Bools
    """(n,) whether each found a true object of its own."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Froc:
    """Sensitivity against false positives per image: a step for each distinct score."""

    thresholds: NDArray[np.float64]
    """(k,) descending; detections of this score and above count."""
    false_positives: NDArray[np.float64]
    """(k,) mean number per image."""
    sensitivity: NDArray[np.float64]
    """(k,) share of the true objects that were found; NaN where there are none."""
    none_found: float
    """Sensitivity above all thresholds: 0, or NaN where there are no true objects."""

    def sensitivity_at(self, rate: float) -> float:
        """Return the sensitivity of the lowest threshold with at most ``rate`` false positives.

        A threshold that exists is read, nothing is interpolated. 0 where each threshold has
        more; NaN without true objects.
        """
        return float(self._read(np.array([rate]))[0])

    def mean_sensitivity(self, rates: Sequence[float] = CAMELYON_RATES) -> float:
        """Return the mean of :meth:`sensitivity_at` over some rates, "the FROC score"."""
        return float(self._read(np.array(rates)).mean())

    def area(self, max_rate: float) -> float:
        """Return the area under the steps from 0 to ``max_rate``, over ``max_rate``: 0 to 1."""
        below = self.false_positives[self.false_positives < max_rate]
        edges = np.concatenate([[0.0], below, [max_rate]])
        return float((np.diff(edges) * self._read(edges[:-1])).sum() / max_rate)

    def _read(self, rates: NDArray[np.float64]) -> NDArray[np.float64]:
        steps = np.searchsorted(self.false_positives, rates, side="right")
        return np.concatenate([[self.none_found], self.sensitivity])[steps]


def score_points(
    true: Floats,
    pred: Floats,
    scores: Floats,
    *,
    radius: float,
    excused: Bools | None = None,
) -> ScoredDetections:
    """Judge the points detected in one image.

    Args:
        true: (N, 2) x, y of the true objects' centres.
        pred: (M, 2) x, y of the detections.
        scores: (M,).
        radius: greatest distance, in the points' unit; use micrometres.
        excused: (M,) detections where nobody annotated: without a true object they are
            left out.

    Raises:
        ValueError: shapes disagree, a score is NaN, or the radius is not positive.
    """
    _check_scores(pred, scores, excused)
    left, right, distance = neighbours(true, pred, radius=radius)
    return _judged(len(true), left, right, distance, scores, excused)


def score_boxes(
    true: Floats, pred: Floats, scores: Floats, *, iou: float = 0.5, excused: Bools | None = None
) -> ScoredDetections:
    """Judge the boxes detected in one image.

    Args:
        true: (N, 4) left, top, right, bottom of the true objects.
        pred: (M, 4) of the detections.
        scores: (M,).
        iou: least intersection over union, above 0.
        excused: (M,) detections where nobody annotated: without a true object they are
            left out.

    Raises:
        ValueError: shapes disagree, a score is NaN, or ``iou`` is not in 0..1.
    """
    for name, boxes in (("true", true), ("pred", pred)):
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{name}: boxes (N, 4) wanted, not {boxes.shape}")
    if not 0 < iou <= 1:
        raise ValueError(f"iou must be above 0 and at most 1, not {iou}")
    _check_scores(pred, scores, excused)
    overlap = _box_iou(true, pred)
    left, right = np.nonzero(overlap >= iou)
    return _judged(len(true), left, right, -overlap[left, right], scores, excused)


def froc(
    images: Sequence[ScoredDetections], *, fp_images: Sequence[ScoredDetections] | None = None
) -> Froc:
    """Return the free-response ROC curve of a set of images.

    Args:
        images: where sensitivity is read.
        fp_images: where false positives are counted; by default the same. DigestPath counts
            them in the images without signet-ring cells only.

    Raises:
        ValueError: there is no image to count false positives in.
    """
    counted = images if fp_images is None else fp_images
    if not counted:
        raise ValueError("no image to count false positives in")
    hits = _sorted([image.scores[image.hits] for image in images])
    false = _sorted([image.scores[~image.hits] for image in counted])
    thresholds = np.unique(np.concatenate([hits, false]))[::-1]
    n_true = sum(image.n_true for image in images)
    return Froc(
        thresholds=thresholds,
        false_positives=_at_least(false, thresholds) / len(counted),
        sensitivity=_share(_at_least(hits, thresholds), n_true),
        none_found=ratio(0, n_true),
    )


def average_precision(images: Sequence[ScoredDetections]) -> float:
    """Return the area under the precision-recall curve of all images' detections together.

    Precision at a recall is the best at that recall or above (Pascal VOC from 2010 on, all
    points). NaN without true objects, 0 without detections.
    """
    hits = _sorted([image.scores[image.hits] for image in images])
    false = _sorted([image.scores[~image.hits] for image in images])
    thresholds = np.unique(np.concatenate([hits, false]))[::-1]
    found, wrong = _at_least(hits, thresholds), _at_least(false, thresholds)
    recall = _share(found, sum(image.n_true for image in images))
    if not recall.size:
        return math.nan if not any(image.n_true for image in images) else 0.0
    precision = np.maximum.accumulate((found / (found + wrong))[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def _judged(
    n_true: int,
    left: NDArray[np.intp],
    right: NDArray[np.intp],
    distance: NDArray[np.float64],
    scores: Floats,
    excused: Bools | None,
) -> ScoredDetections:
    hits = np.zeros(len(scores), bool)
    taken = np.zeros(n_true, bool)
    for pair in np.lexsort((left, right, distance, -scores[right])):
        if not (hits[right[pair]] or taken[left[pair]]):
            hits[right[pair]] = taken[left[pair]] = True
    kept = np.ones(len(scores), bool) if excused is None else hits | ~excused
    return ScoredDetections(
        n_true=n_true, scores=np.asarray(scores[kept], np.float64), hits=hits[kept]
    )


def _box_iou(true: Floats, pred: Floats) -> NDArray[np.float64]:
    """Return (N, M) intersection over union of boxes."""
    first, second = true[:, None].astype(np.float64), pred[None].astype(np.float64)
    sides = np.minimum(first, second)[..., 2:] - np.maximum(first, second)[..., :2]
    shared = np.clip(sides, 0, None).prod(axis=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(axis=-1) for boxes in (first, second)]
    return np.asarray(shared / (areas[0] + areas[1] - shared))


def _check_scores(pred: Floats, scores: Floats, excused: Bools | None) -> None:
    for name, values in (("scores", scores), ("excused", excused)):
        if values is not None and values.shape != (len(pred),):
            raise ValueError(f"{name}: {len(pred)} values wanted, not {values.shape}")
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN")


def _sorted(parts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.sort(np.concatenate([np.zeros(0), *parts]))


def _at_least(values: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return how many of the ascending values are at or above each threshold."""
    return values.size - np.searchsorted(values, thresholds, side="left")


def _share(part: NDArray[np.intp], whole: int) -> NDArray[np.float64]:
    return part / whole if whole else np.full(part.shape, np.nan)
