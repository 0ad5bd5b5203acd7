"""One judge a head: what the network found in each image, against its label.

A judge looks at images one by one, keeps the counts of each, and computes its scores for any
choice of them: all, those of a group, or the draws of a bootstrap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from wsi_pipeline.metrics import (
    DIGESTPATH_RATES,
    DetectionCounts,
    Froc,
    HausdorffSums,
    JaccardSums,
    ObjectDiceSums,
    Overlap,
    PanopticCounts,
    PixelCounts,
    ScoredDetections,
    TypedCounts,
    aggregated_jaccard,
    aggregated_jaccard_plus,
    average_precision,
    class_panoptic_counts,
    compare,
    confusion,
    froc,
    glas_detection,
    macro_auc,
    majority_classes,
    match_points,
    mean_defined,
    mean_pq,
    mpq,
    object_dice,
    object_hausdorff,
    panoptic_counts,
    pixel_counts,
    score_points,
    typed_counts,
)
from wsi_pipeline.metrics.counts import Counts
from wsi_pipeline.spec import AnchorRules, HeadSpec, ModelSpec, PeakRules
from wsi_pipeline.training.annotation import (
    AnnotatedImage,
    BoxLabel,
    ClassLabel,
    InstanceLabel,
    PatchLabel,
)
from wsi_pipeline.training.predicted import FoundObjects, ImageMaps, patch_probabilities
from wsi_pipeline.training.raster import fill_polygons

__all__ = ["MAIN_SCORES", "RADIUS_UM", "Judge", "Seen", "make_judge", "order_rows"]

RADIUS_UM = 3.0
"""A nucleus is found by a centre within this distance (12 px at 0.25 mpp, Graham et al. 2019)."""
CELL_RADIUS_UM = 8.0
"""The same for detect heads, whose cells are larger."""
MAIN_SCORES = {"instance": "pq", "class": "mpq_plus", "patch": "balanced_accuracy", "detect": "ap"}
"""By kind of head, the score by which one network is better than another."""

Rows = NDArray[np.intp]
C = TypeVar("C", bound=Counts)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """An image and what the network found in it; pixels are drawn and compared once."""

    image: AnnotatedImage
    """With its labels."""
    maps: ImageMaps
    """What the network said."""
    found: Mapping[str, FoundObjects]
    """By head that yields objects."""
    _drawn: dict[str, NDArray[np.int32]] = field(default_factory=dict)
    _overlaps: dict[str, Overlap] = field(default_factory=dict)

    def drawn(self, head: str) -> NDArray[np.int32]:
        """Return (H, W) numbers of a head's objects, 0 where there is none."""
        if head not in self._drawn:
            shape = self.image.image.shape
            self._drawn[head] = fill_polygons(self.found[head].polygons, shape)
        return self._drawn[head]

    def overlap(self, head: str, label: InstanceLabel) -> Overlap:
        """Return how a head's objects lie on those of its label."""
        if head not in self._overlaps:
            self._overlaps[head] = compare(label.ids, self.drawn(head))
        return self._overlaps[head]


class Judge(Protocol):
    """Scores of one head."""

    images: list[int]
    """Numbers of the images it has looked at."""

    def look(self, number: int, seen: Seen) -> None:
        """Judge an image if it is labelled for the head."""

    def scores(self, rows: Rows) -> dict[str, float]:
        """Return the scores of some of ``images``, by place in that list; NaN: undefined."""

    def details(self, rows: Rows) -> dict[str, Any]:
        """Return what is no score but worth keeping, for JSON."""


def make_judge(head: HeadSpec, spec: ModelSpec, *, watching: bool = False) -> Judge:
    """Return a judge for a head; one that only watches leaves out Hausdorff distances."""
    if head.kind == "instance":
        return _InstanceJudge(head, spec, watching=watching)
    if head.kind == "class":
        return _ClassJudge(head, spec)
    if head.kind == "patch":
        return _PatchJudge(head)
    return _DetectJudge(head, spec)


class _Column(Generic[C]):
    """The counts of all images, as an array: pooling them is a sum."""

    def __init__(self, kind: type[C]) -> None:
        self._kind = kind
        self._names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        self._rows: list[list[float]] = []

    def add(self, counts: C) -> None:
        self._rows.append([getattr(counts, name) for name in self._names])

    def pool(self, rows: Rows) -> C:
        summed = np.array(self._rows, np.float64)[rows].sum(axis=0)
        return self._kind(**dict(zip(self._names, summed.tolist(), strict=True)))


class _InstanceJudge:
    """Objects by their pixels, and for small ones by their centres."""

    def __init__(self, head: HeadSpec, spec: ModelSpec, *, watching: bool) -> None:
        self.images: list[int] = []
        self._name = head.name
        self._mpp = spec.mpp
        self._watching = watching
        self._by_image: dict[str, list[float]] = {"pq": [], "aji": [], "dice": []}
        self._points = isinstance(head.rules, AnchorRules)
        self._panoptic = _Column(PanopticCounts)
        self._aji = _Column(JaccardSums)
        self._aji_plus = _Column(JaccardSums)
        self._dice = _Column(ObjectDiceSums)
        self._hausdorff = _Column(HausdorffSums)
        self._glas = _Column(DetectionCounts)
        self._pixels = _Column(PixelCounts)
        self._centres = _Column(DetectionCounts)

    def look(self, number: int, seen: Seen) -> None:
        label = seen.image.labels.get(self._name)
        if not isinstance(label, InstanceLabel):
            return
        self.images.append(number)
        own, pred = seen.found[self._name], seen.drawn(self._name)
        overlap = seen.overlap(self._name, label)
        panoptic, jaccard = panoptic_counts(overlap), aggregated_jaccard(overlap)
        self._panoptic.add(panoptic)
        self._aji.add(jaccard)
        self._aji_plus.add(aggregated_jaccard_plus(overlap))
        self._dice.add(object_dice(overlap))
        if not self._watching:
            self._hausdorff.add(object_hausdorff(overlap))
        self._glas.add(glas_detection(overlap))
        pixels = pixel_counts(label.ids > 0, pred > 0, ignore=label.ids < 0)
        self._pixels.add(pixels)
        for name, value in (("pq", panoptic.pq), ("aji", jaccard.aji), ("dice", pixels.dice)):
            self._by_image[name].append(value)
        if self._points:
            true = _centres(overlap.true_map, overlap.true_ids.size)
            matches = match_points(true * self._mpp, own.centres * self._mpp, radius=RADIUS_UM)
            self._centres.add(matches.counts(excused=_inside(label.ids < 0, own.centres)))

    def scores(self, rows: Rows) -> dict[str, float]:
        panoptic, pixels = self._panoptic.pool(rows), self._pixels.pool(rows)
        scores = {
            "pq": panoptic.pq,
            "dq": panoptic.dq,
            "sq": panoptic.sq,
            "f1": panoptic.f1,
            "precision": panoptic.precision,
            "recall": panoptic.recall,
            "aji": self._aji.pool(rows).aji,
            "aji_plus": self._aji_plus.pool(rows).aji,
            "object_dice": self._dice.pool(rows).dice,
            "glas_f1": self._glas.pool(rows).f1,
            "dice": pixels.dice,
            "jaccard": pixels.jaccard,
            "pixel_precision": pixels.precision,
            "pixel_recall": pixels.recall,
            "pixel_specificity": pixels.specificity,
        }
        for name, values in self._by_image.items():
            scores[f"{name}_mean_of_images"] = mean_defined(values[row] for row in rows)
        if not self._watching:
            distance_px = self._hausdorff.pool(rows).found_distance_px
            scores["object_hausdorff_um"] = distance_px * self._mpp
        if self._points:
            scores["detection_f1"] = self._centres.pool(rows).f1
        return scores

    def details(self, rows: Rows) -> dict[str, Any]:
        counts = self._panoptic.pool(rows)
        details: dict[str, Any] = {
            "true": int(counts.tp + counts.fn),
            "found": int(counts.tp + counts.fp),
            "matched": int(counts.tp),
        }
        if not self._watching:
            lone_um2 = self._hausdorff.pool(rows).lone_area * self._mpp**2
            # The Hausdorff distance leaves these out, as they have none.
            details["area_um2_without_counterpart_in_the_image"] = round(lone_um2, 1)
        return details


class _ClassJudge:
    """Classes of the objects of the head that is classified."""

    def __init__(self, head: HeadSpec, spec: ModelSpec) -> None:
        self.images: list[int] = []
        assert head.classifies is not None
        self._name, self._objects = head.name, head.classifies
        self._classes = head.classes
        self._panoptic: list[tuple[PanopticCounts, ...]] = []
        self._typed = [_Column(TypedCounts) for _ in head.classes[1:]]
        self._columns = [_Column(PanopticCounts) for _ in head.classes[1:]]

    def look(self, number: int, seen: Seen) -> None:
        objects, label = seen.image.labels.get(self._objects), seen.image.labels.get(self._name)
        if not isinstance(label, ClassLabel) or not isinstance(objects, InstanceLabel):
            return
        self.images.append(number)
        own = seen.found[self._objects]
        overlap = seen.overlap(self._objects, objects)
        true = majority_classes(
            overlap.true_map,
            label.ids,
            n_objects=overlap.true_ids.size,
            n_classes=len(self._classes),
        )
        true = np.where(true == 0, -1, true)  # an object without a class is not classified
        pred = self._pred_classes(overlap, own)
        wanted = range(1, len(self._classes))
        counts = class_panoptic_counts(overlap, true, pred, classes=wanted)
        self._panoptic.append(counts)
        typed = typed_counts(overlap.matches(), true, pred, classes=wanted)
        for column, value in zip(self._columns, counts, strict=True):
            column.add(value)
        for typed_column, typed_value in zip(self._typed, typed, strict=True):
            typed_column.add(typed_value)

    def _pred_classes(self, overlap: Overlap, own: FoundObjects) -> NDArray[np.int64]:
        ids = {name: i for i, name in enumerate(self._classes)}
        by_object = np.array([0 if c is None else ids[c] for c in own.classes], np.int64)
        return by_object[overlap.pred_ids - 1] if len(by_object) else np.zeros(0, np.int64)

    def scores(self, rows: Rows) -> dict[str, float]:
        pooled = [column.pool(rows) for column in self._columns]
        typed = [column.pool(rows) for column in self._typed]
        right = sum(own.tp for own in typed)
        wrong = sum(own.fn_class for own in typed)
        scores = {
            "mpq": mpq([self._panoptic[row] for row in rows]),
            "mpq_plus": mean_pq(pooled),
            "accuracy_of_found": right / (right + wrong) if right + wrong else float("nan"),
            "macro_f1": mean_defined(own.f1 for own in typed if own.tp + own.fn + own.fn_class),
        }
        for name, panoptic, counts in zip(self._classes[1:], pooled, typed, strict=True):
            scores[f"pq {name}"] = panoptic.pq
            scores[f"f1 {name}"] = counts.f1
        return scores

    def details(self, rows: Rows) -> dict[str, Any]:
        pooled = [column.pool(rows) for column in self._columns]
        true = {n: int(p.tp + p.fn) for n, p in zip(self._classes[1:], pooled, strict=True)}
        return {"true": true}


class _PatchJudge:
    """One class an image."""

    def __init__(self, head: HeadSpec) -> None:
        self.images: list[int] = []
        self._head = head
        self._true: list[int] = []
        self._prob: list[NDArray[np.float64]] = []

    def look(self, number: int, seen: Seen) -> None:
        label = seen.image.labels.get(self._head.name)
        if not isinstance(label, PatchLabel):
            return
        self.images.append(number)
        self._true.append(label.id)
        self._prob.append(patch_probabilities(seen.maps, self._head))

    def _chosen(self, rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        prob = np.array(self._prob).reshape(-1, len(self._head.classes))
        return np.array(self._true, np.int64)[rows], prob[rows]

    def scores(self, rows: Rows) -> dict[str, float]:
        true, prob = self._chosen(rows)
        table = confusion(true, prob.argmax(axis=1), n_classes=len(self._head.classes))
        scores = {
            "accuracy": table.accuracy,
            "balanced_accuracy": table.balanced_accuracy,
            "macro_f1": table.macro_f1,
            "macro_auc": macro_auc(true, prob),
        }
        return scores | {
            f"f1 {name}": float(value)
            for name, value in zip(self._head.classes, table.f1, strict=True)
        }

    def details(self, rows: Rows) -> dict[str, Any]:
        true, prob = self._chosen(rows)
        table = confusion(true, prob.argmax(axis=1), n_classes=len(self._head.classes))
        return {"classes": list(self._head.classes), "confusion": table.table.tolist()}


class _DetectJudge:
    """Objects by their centres, at all thresholds."""

    def __init__(self, head: HeadSpec, spec: ModelSpec) -> None:
        self.images: list[int] = []
        assert isinstance(head.rules, PeakRules)
        self._name = head.name
        self._threshold = head.rules.threshold
        self._mpp = spec.mpp
        self._detections: list[ScoredDetections] = []
        self._counts = _Column(DetectionCounts)

    def look(self, number: int, seen: Seen) -> None:
        label = seen.image.labels.get(self._name)
        if not isinstance(label, BoxLabel):
            return
        self.images.append(number)
        own = seen.found[self._name]
        true = (label.boxes[:, :2] + label.boxes[:, 2:]) / 2 * self._mpp
        pred = own.centres * self._mpp
        excused = None if label.ignore is None else _inside(label.ignore, own.centres)
        self._detections.append(
            score_points(true, pred, own.scores, radius=CELL_RADIUS_UM, excused=excused)
        )
        sure = own.scores > self._threshold
        matches = match_points(true, pred[sure], radius=CELL_RADIUS_UM)
        self._counts.add(matches.counts(excused=None if excused is None else excused[sure]))

    def _negatives(self, rows: Rows) -> list[ScoredDetections]:
        return [self._detections[row] for row in rows if not self._detections[row].n_true]

    def _curve(self, rows: Rows) -> Froc:
        # DigestPath 2019: positive images are not annotated completely.
        chosen = [self._detections[row] for row in rows]
        return froc(chosen, fp_images=self._negatives(rows) or None)

    def scores(self, rows: Rows) -> dict[str, float]:
        chosen = [self._detections[row] for row in rows]
        curve = self._curve(rows)
        counts = self._counts.pool(rows)
        return {
            "ap": average_precision(chosen),
            "froc": curve.mean_sensitivity(DIGESTPATH_RATES),
            "froc_area": curve.area(DIGESTPATH_RATES[-1]),
            "f1": counts.f1,
            "precision": counts.precision,
            "recall": counts.recall,
        }

    def details(self, rows: Rows) -> dict[str, Any]:
        curve = self._curve(rows)
        return {
            "radius_um": CELL_RADIUS_UM,
            "false_positives_counted_in": "images without objects"
            if self._negatives(rows)
            else "all images: none is without objects",
            "sensitivity_at_false_positives_per_image": {
                str(rate): curve.sensitivity_at(rate) for rate in DIGESTPATH_RATES
            },
        }


def _centres(numbers: NDArray[np.int32], count: int) -> NDArray[np.float64]:
    """Return (count, 2) x, y of the middles of numbered objects, in pixels."""
    y, x = np.nonzero(numbers)
    owner = numbers[y, x] - 1
    area = np.maximum(np.bincount(owner, minlength=count), 1)
    sums = [np.bincount(owner, along + 0.5, minlength=count) for along in (x, y)]
    return np.asarray(np.stack(sums, axis=1) / area[:, None])


def _inside(mask: NDArray[np.bool_], points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tell which points (x, y) lie on a pixel of the mask."""
    height, width = mask.shape
    x = np.clip(points[:, 0].astype(np.intp), 0, width - 1)
    y = np.clip(points[:, 1].astype(np.intp), 0, height - 1)
    return np.asarray(mask[y, x])


def order_rows(images: Sequence[int], chosen: Sequence[int]) -> Rows:
    """Return the places in a judge's list of the images that were chosen, with repeats."""
    places = {number: place for place, number in enumerate(images)}
    return np.array([places[number] for number in chosen if number in places], np.intp)
