"""How well objects agree by their pixels: PQ, AJI, object Dice, and their kin.

=================  =============================  =====================================
score              pairs                          source
=================  =============================  =====================================
DQ, SQ, PQ         IoU above 0.5, one to one      Kirillov et al. 2019; Graham et al. 2019
mPQ, mPQ+          the same, within a class       Gamper et al. 2020; Graham et al. 2021
AJI                best IoU, may repeat           Kumar et al. 2017
AJI+               greatest total IoU, 1 to 1     Graham et al. 2019
object Dice, F1    greatest intersection          Sirinukunwattana et al. 2017 (GlaS)
ensemble Dice      all that overlap               Vu et al. 2019 ("Dice 2")
=================  =============================  =====================================

Where no object is true and none is predicted, each score is NaN and belongs in no mean.
Where only one side is empty, each is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.metrics.counts import (
    Counts,
    DetectionCounts,
    check_classes,
    mean_defined,
    pooled_classes,
    ratio,
)
from wsi_pipeline.metrics.matching import Overlap, one_to_one

__all__ = [
    "EnsembleDiceSums",
    "JaccardSums",
    "ObjectDiceSums",
    "PanopticCounts",
    "aggregated_jaccard",
    "aggregated_jaccard_plus",
    "class_panoptic_counts",
    "ensemble_dice",
    "glas_detection",
    "majority_classes",
    "mean_pq",
    "mpq",
    "mpq_plus",
    "object_dice",
    "panoptic_counts",
]

Classes = NDArray[np.integer]


@dataclass(frozen=True, kw_only=True, slots=True)
class PanopticCounts(DetectionCounts):
    """Objects found, and how well their outlines agree."""

    iou_sum: float = 0.0
    """Sum of the IoU of the matched pairs."""

    @property
    def dq(self) -> float:
        """Detection quality: F1 of the objects."""
        return self.f1

    @property
    def sq(self) -> float:
        """Segmentation quality: mean IoU of the matched pairs; NaN where there is none."""
        return ratio(self.iou_sum, self.tp)

    @property
    def pq(self) -> float:
        """Panoptic quality, DQ x SQ; 0 where objects exist and none match."""
        return ratio(2 * self.iou_sum, 2 * self.tp + self.fp + self.fn)


@dataclass(frozen=True, kw_only=True, slots=True)
class JaccardSums(Counts):
    """Pixels of an aggregated Jaccard index."""

    intersection: int = 0
    """Pixels that the paired objects share."""
    union: int = 0
    """Pixels of the paired objects' unions and of all unpaired objects."""

    @property
    def aji(self) -> float:
        """The index; NaN where there are no objects."""
        return ratio(self.intersection, self.union)


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectDiceSums(Counts):
    """Dice of each object and its counterpart, weighted by the object's area."""

    true_dice: float = 0.0
    """Sum over true objects of area x Dice."""
    true_area: int = 0
    """Pixels of the true objects."""
    pred_dice: float = 0.0
    """Sum over predicted objects of area x Dice."""
    pred_area: int = 0
    """Pixels of the predicted objects."""

    @property
    def dice(self) -> float:
        """Object Dice: mean of both sides' weighted means; NaN where there are no objects."""
        if not self.true_area and not self.pred_area:
            return ratio(0, 0)
        true = ratio(self.true_dice, self.true_area, empty=0.0)
        return (true + ratio(self.pred_dice, self.pred_area, empty=0.0)) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class EnsembleDiceSums(Counts):
    """Pixels of all pairs that overlap."""

    intersection: int = 0
    """Pixels the pairs share."""
    area: int = 0
    """Pixels of both objects of each pair; an object in two pairs counts twice."""
    objects: int = 0
    """Objects on either side."""

    @property
    def dice(self) -> float:
        """Ensemble Dice; 0 where objects exist and none overlap, NaN without objects."""
        return ratio(2 * self.intersection, self.area, empty=0.0 if self.objects else np.nan)


def panoptic_counts(overlap: Overlap, *, iou: float = 0.5) -> PanopticCounts:
    """Return the counts behind DQ, SQ and PQ, whatever the objects' classes.

    Args:
        overlap: of one image.
        iou: a pair matches above this; see :meth:`Overlap.pairs` for values below 0.5.
    """
    pairs = overlap.pairs(iou)
    return PanopticCounts(
        tp=pairs.size,
        fp=overlap.pred_ids.size - pairs.size,
        fn=overlap.true_ids.size - pairs.size,
        iou_sum=float(overlap.iou[pairs].sum()),
    )


def class_panoptic_counts(
    overlap: Overlap, true_classes: Classes, pred_classes: Classes, *, classes: Sequence[int]
) -> tuple[PanopticCounts, ...]:
    """Return the counts of each class, as if each class had label images of its own.

    Args:
        overlap: of one image.
        true_classes: (n,) class of each true object. Negative: unknown; then neither the
            object nor a predicted one that matches it counts in any class.
        pred_classes: (m,) class of each predicted object.
        classes: the classes to count, usually 1 and up.
    """
    _check_classes(overlap, true_classes, pred_classes)
    pairs = overlap.pairs(0.5)
    true, pred = true_classes[overlap.true_index[pairs]], pred_classes[overlap.pred_index[pairs]]
    iou = overlap.iou[pairs]
    counts = []
    for label in classes:
        hit = (true == label) & (pred == label)
        excused = np.count_nonzero((true < 0) & (pred == label))
        found = int(np.count_nonzero(hit))
        counts.append(
            PanopticCounts(
                tp=found,
                fp=int(np.count_nonzero(pred_classes == label)) - found - int(excused),
                fn=int(np.count_nonzero(true_classes == label)) - found,
                iou_sum=float(iou[hit].sum()),
            )
        )
    return tuple(counts)


def mean_pq(classes: Sequence[PanopticCounts]) -> float:
    """Return the mean PQ of the classes that have true objects, NaN where none has.

    A class without true objects is left out even where some are predicted, as the
    published scores of PanNuke do (Gamper et al. 2020).
    """
    return mean_defined(counts.pq for counts in classes if counts.tp + counts.fn)


def mpq(images: Sequence[Sequence[PanopticCounts]]) -> float:
    """Return mPQ: the mean over classes within each image, then the mean over images.

    Args:
        images: by image, the counts of each class.
    """
    return mean_defined(mean_pq(classes) for classes in images)


def mpq_plus(images: Sequence[Sequence[PanopticCounts]]) -> float:
    """Return mPQ+: counts summed over images for each class, then the mean over classes.

    The score of Lizard and CoNIC (Graham et al. 2021); no image weighs more for having
    few objects of a class.

    Args:
        images: by image, the counts of each class.
    """
    return mean_pq(pooled_classes(images))


def aggregated_jaccard(overlap: Overlap) -> JaccardSums:
    """Return the sums behind AJI (Kumar et al. 2017).

    Each true object takes the predicted one of the best IoU, of equals the one that shares
    more pixels. Two true objects may take the same one, as in the authors' own scores.
    """
    order = np.lexsort((overlap.intersections, overlap.iou))
    rank = np.empty(order.size, np.int64)
    rank[order] = np.arange(order.size)
    best = overlap.best(rank)
    return _jaccard(overlap, best[best >= 0])


def aggregated_jaccard_plus(overlap: Overlap) -> JaccardSums:
    """Return the sums behind AJI+ (Graham et al. 2019): pairs of the greatest total IoU.

    Of pairings with equal totals the one that shares more pixels counts.
    """
    # The share of the pixels is too small to outweigh any but equal totals.
    weight = overlap.iou + 1e-7 * overlap.intersections / overlap.true_map.size
    return _jaccard(overlap, one_to_one(overlap.true_index, overlap.pred_index, weight))


def object_dice(overlap: Overlap) -> ObjectDiceSums:
    """Return the sums behind object Dice (GlaS contest, Sirinukunwattana et al. 2017).

    An object's counterpart is the one it shares most pixels with; without any its Dice is 0.
    """
    true_dice, true_area = _weighted_dice(overlap)
    pred_dice, pred_area = _weighted_dice(overlap.swapped())
    return ObjectDiceSums(
        true_dice=true_dice, true_area=true_area, pred_dice=pred_dice, pred_area=pred_area
    )


def glas_detection(overlap: Overlap) -> DetectionCounts:
    """Return the counts behind the GlaS contest's F1.

    A predicted object is right when it covers more than half of the true object it shares
    most pixels with (Sirinukunwattana et al. 2017).
    """
    table = overlap.swapped()
    best = table.best(table.intersections)
    best = best[best >= 0]
    covered = 2 * table.intersections[best] > table.pred_areas[table.pred_index[best]]
    found = int(np.count_nonzero(covered))
    return DetectionCounts(
        tp=found, fp=overlap.pred_ids.size - found, fn=overlap.true_ids.size - found
    )


def ensemble_dice(overlap: Overlap) -> EnsembleDiceSums:
    """Return the sums behind the ensemble Dice, "Dice 2" (Vu et al. 2019)."""
    areas = overlap.true_areas[overlap.true_index] + overlap.pred_areas[overlap.pred_index]
    return EnsembleDiceSums(
        intersection=int(overlap.intersections.sum()),
        area=int(areas.sum()),
        objects=overlap.true_ids.size + overlap.pred_ids.size,
    )


def majority_classes(
    numbers: NDArray[np.int32],
    class_map: NDArray[np.integer],
    *,
    n_objects: int,
    n_classes: int,
    unknown: int = 255,
) -> NDArray[np.int64]:
    """Return each object's class: the most frequent one above 0 among its pixels.

    Args:
        numbers: (H, W) :attr:`Overlap.true_map` or :attr:`Overlap.pred_map`.
        class_map: (H, W) class ids, 0 none.
        n_objects: number of objects in ``numbers``.
        n_classes: number of classes, "none" included.
        unknown: the id in ``class_map`` of pixels that nobody annotated.

    Returns:
        (n_objects,): 0 where all known pixels are of class 0, -1 where all are unknown. Of
        equally frequent classes the lower.

    Raises:
        ValueError: the sizes differ or a class id is out of range.
    """
    if numbers.shape != class_map.shape:
        raise ValueError(f"the class map is {class_map.shape}, the objects {numbers.shape}")
    known = (numbers > 0) & (class_map != unknown)
    ids = class_map[known].astype(np.int64)
    check_classes("class map", ids, n_classes)
    codes = (numbers[known].astype(np.int64) - 1) * n_classes + ids
    votes = np.bincount(codes, minlength=n_objects * n_classes).reshape(n_objects, n_classes)
    winner = np.where(votes[:, 1:].any(axis=1), votes[:, 1:].argmax(axis=1) + 1, 0)
    return np.where(votes.any(axis=1), winner, -1)


def _jaccard(overlap: Overlap, pairs: NDArray[np.intp]) -> JaccardSums:
    lone_true = np.ones(overlap.true_ids.size, bool)
    lone_pred = np.ones(overlap.pred_ids.size, bool)
    lone_true[overlap.true_index[pairs]] = False
    lone_pred[overlap.pred_index[pairs]] = False
    alone = overlap.true_areas[lone_true].sum() + overlap.pred_areas[lone_pred].sum()
    return JaccardSums(
        intersection=int(overlap.intersections[pairs].sum()),
        union=int(overlap.unions[pairs].sum() + alone),
    )


def _weighted_dice(overlap: Overlap) -> tuple[float, int]:
    """Return the sum of area x Dice over the true objects, and the sum of their areas."""
    pairs = overlap.best(overlap.intersections)
    pairs = pairs[pairs >= 0]
    true = overlap.true_areas[overlap.true_index[pairs]]
    pred = overlap.pred_areas[overlap.pred_index[pairs]]
    dice = 2 * overlap.intersections[pairs] / (true + pred)
    return float((true * dice).sum()), int(overlap.true_areas.sum())


def _check_classes(overlap: Overlap, true_classes: Classes, pred_classes: Classes) -> None:
    wanted = (overlap.true_ids.shape, overlap.pred_ids.shape)
    if (true_classes.shape, pred_classes.shape) != wanted:
        msg = f"one class an object wanted, {wanted}, not {true_classes.shape}, "
        raise ValueError(msg + f"{pred_classes.shape}")
