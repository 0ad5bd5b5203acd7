"""What is measured on an image: counts that are kept by image and pooled for any choice of them.

The scores of objects are those of the package's own judges; see ``wsi_pipeline/metrics``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.failures import Failures, count_failures
from wsi_pipeline.metrics import compare, mean_defined
from wsi_pipeline.spec import ModelSpec
from wsi_pipeline.training.annotation import InstanceLabel
from wsi_pipeline.training.judges import Seen, make_judge
from wsi_pipeline.training.predicted import FoundObjects

__all__ = [
    "CalledArea",
    "Measure",
    "Objects",
    "OneGland",
    "known_only",
    "whole_only",
]

Rows = NDArray[np.intp]
UNKNOWN_SHARE = 0.4
"""A predicted lumen with more than this share of its pixels unknown is left out."""


class Measure(Protocol):
    """Scores of one kind, on the images of a set that they can be had on."""

    images: list[int]
    """Numbers of the images that were looked at."""

    def look(self, number: int, seen: Seen) -> None:
        """Measure an image, if it is labelled for this."""

    def scores(self, rows: Rows) -> dict[str, float]:
        """Return the scores of some of ``images``, by place in that list; NaN: undefined."""

    def details(self, rows: Rows) -> dict[str, Any]:
        """Return counts that are no scores."""


class Objects:
    """Objects of one head against those of its label."""

    def __init__(
        self, spec: ModelSpec, head: str, change: Callable[[Seen, str], Seen] | None = None
    ) -> None:
        """Prepare to look.

        Args:
            spec: of the network.
            head: which objects.
            change: what is done to an image before it is judged; see :func:`known_only`.
        """
        self._judge = make_judge(spec.head(head), spec, watching=True)
        self._head = head
        self._change = change
        self._failures: list[Failures] = []

    @property
    def images(self) -> list[int]:
        """Numbers of the images that were looked at."""
        return self._judge.images

    def look(self, number: int, seen: Seen) -> None:
        """Judge an image that is labelled for the head."""
        label = seen.image.labels.get(self._head)
        if not isinstance(label, InstanceLabel):
            return
        if self._change is not None:
            seen = self._change(seen, self._head)
            label = seen.image.labels[self._head]
            assert isinstance(label, InstanceLabel)
        self._judge.look(number, seen)
        self._failures.append(count_failures(seen.overlap(self._head, label)))

    def scores(self, rows: Rows) -> dict[str, float]:
        """Return the judge's scores."""
        return self._judge.scores(rows)

    def details(self, rows: Rows) -> dict[str, Any]:
        """Return how many there are, and what became of them."""
        names = [field.name for field in fields(Failures)]
        total = {name: sum(getattr(self._failures[row], name) for row in rows) for name in names}
        area = total.pop("log_area")
        size = float(np.exp(area / total["matched"])) if total["matched"] else float("nan")
        return {
            **self._judge.details(rows),
            "true_objects": total,
            "area_of_matched_over_true": round(size, 3),
        }


class OneGland:
    """Crops of which one gland is annotated, whole, and nothing else.

    What lies outside its outline is not this gland, but may be another one. So three scores,
    each a mean over crops:

    coverage      share of the gland's pixels that are called gland, by whichever object. A
                  network that calls everything gland has 1.
    best_dice     Dice of the gland and of the predicted object that has the highest; 0 where none
                  meets it. Pixels outside the gland count against the object: merging the
                  gland with its neighbour or with stroma costs.
    crop_dice     Dice of the gland and of all that is called gland in the crop, as if nothing
                  else were gland: a lower bound, as neighbours count as errors.

    ``found`` is the share of glands whose best object has an IoU above 0.5.
    """

    def __init__(self, head: str) -> None:
        self.images: list[int] = []
        self._head = head
        self._rows: list[dict[str, float]] = []

    def look(self, number: int, seen: Seen) -> None:
        """Measure a crop."""
        label = seen.image.labels.get(self._head)
        if isinstance(label, InstanceLabel) and (label.ids > 0).any():
            self.images.append(number)
            self._rows.append(one_gland(label.ids > 0, seen.drawn(self._head)))

    def scores(self, rows: Rows) -> dict[str, float]:
        """Return means over crops."""
        return {name: mean_defined(self._rows[row][name] for row in rows) for name in self._rows[0]}

    def details(self, rows: Rows) -> dict[str, Any]:
        """Return how many crops."""
        return {"glands": len(rows)}


def one_gland(gland: NDArray[np.bool_], found: NDArray[np.int32]) -> dict[str, float]:
    """Return the scores of one crop; see :class:`OneGland`.

    Args:
        gland: (H, W) the annotated gland, not empty.
        found: (H, W) numbers of the predicted objects, 0 elsewhere.
    """
    overlap = compare(gland.astype(np.int32), found)
    common, area = overlap.intersections, int(gland.sum())
    dice = 2 * common / (area + overlap.pred_areas[overlap.pred_index])
    covered, called = int(common.sum()), int((found > 0).sum())
    return {
        "best_dice": float(dice.max(initial=0.0)),
        "coverage": covered / area,
        "found": float((overlap.iou > 0.5).any()),
        "crop_dice": 2 * covered / (area + called),
    }


class CalledArea:
    """Share of the area that is called an object, in images that have none."""

    def __init__(self, head: str) -> None:
        self.images: list[int] = []
        self._head = head
        self._rows: list[tuple[int, int, int]] = []

    def look(self, number: int, seen: Seen) -> None:
        """Measure an image that is labelled for the head and has no object."""
        label = seen.image.labels.get(self._head)
        if not isinstance(label, InstanceLabel) or (label.ids > 0).any():
            return
        known, found = label.ids == 0, seen.drawn(self._head)
        if known.any():
            self.images.append(number)
            objects = np.unique(found[known & (found > 0)]).size
            self._rows.append((int((known & (found > 0)).sum()), int(known.sum()), objects))

    def scores(self, rows: Rows) -> dict[str, float]:
        """Return the share of the known pixels of all images together."""
        called, known, _ = np.array(self._rows)[rows].sum(axis=0)
        return {"called_share": float(called / known)}

    def details(self, rows: Rows) -> dict[str, Any]:
        """Return how many objects were found where there are none."""
        return {"objects": int(np.array(self._rows)[rows, 2].sum())}


def known_only(seen: Seen, head: str) -> Seen:
    """Leave out predicted objects of which more than 0.4 lies where nobody annotated."""
    label = seen.image.labels[head]
    assert isinstance(label, InstanceLabel)
    found = seen.drawn(head)
    total = np.bincount(found.ravel(), minlength=len(seen.found[head].polygons) + 1)
    unknown = np.bincount(found[label.ids < 0], minlength=total.size)
    return _with_objects(seen, head, unknown[1:] <= UNKNOWN_SHARE * total[1:])


def whole_only(seen: Seen, head: str) -> Seen:
    """Judge only objects that the image's edge does not cut.

    True objects at the edge become unknown. A predicted object at the edge is left out unless it
    matches (IoU above 0.5) a true one that is not.
    """
    label = seen.image.labels[head]
    assert isinstance(label, InstanceLabel)
    cut = _at_edge(label.ids)
    ids = np.where(np.isin(label.ids, cut[cut > 0]), -1, label.ids).astype(np.int32)
    overlap = compare(np.maximum(ids, 0), seen.drawn(head))
    matched = overlap.pred_ids[overlap.pred_index[overlap.pairs(0.5)]]
    edge = np.setdiff1d(_at_edge(seen.drawn(head)), matched)
    kept = ~np.isin(np.arange(1, len(seen.found[head].polygons) + 1), edge)
    labels: Mapping[str, Any] = {**seen.image.labels, head: InstanceLabel(ids=ids)}
    changed = _with_objects(seen, head, kept)
    return Seen(image=replace(seen.image, labels=labels), maps=seen.maps, found=changed.found)


def _at_edge(ids: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.unique(np.concatenate([ids[0], ids[-1], ids[:, 0], ids[:, -1]]))


def _with_objects(seen: Seen, head: str, kept: NDArray[np.bool_]) -> Seen:
    """Return the same image with some of a head's objects."""
    own = seen.found[head]
    found = FoundObjects(
        polygons=own.polygons[kept],
        classes=tuple(name for name, keep in zip(own.classes, kept, strict=True) if keep),
        scores=own.scores[kept],
        centres=own.centres[kept],
    )
    return Seen(image=seen.image, maps=seen.maps, found={**seen.found, head: found})
