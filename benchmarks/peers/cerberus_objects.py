"""Objects from Cerberus' maps as the original finds them: the rules, and what they cost.

Each object is looked up with ``labels == number`` over the whole label map, because that is
what the original does and what its time goes into. Maps are probabilities (H, W), labels int32
with 0 for none, numbers 4-connected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import watershed

Map = NDArray[np.float32]
Labels = NDArray[np.int32]
Record = dict[str, Any]

CROSS = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
MIN_NUCLEUS_PX, MIN_SEED_PX = 8, 4


@dataclass(frozen=True)
class RegionRules:
    """Constants of glands and lumina at 0.5 micrometres a pixel."""

    threshold: float
    min_px: int
    widened_px: int


GLAND = RegionRules(threshold=0.55, min_px=1000, widened_px=10)
LUMEN = RegionRules(threshold=0.5, min_px=150, widened_px=2)


def label_nuclei(inner: Map, contour: Map) -> Labels:
    """Label nuclei: a watershed of the interior probability, from what is surely inside."""
    foreground = cv2.erode(((inner + contour) > 0.5).astype(np.uint8), CROSS)
    if not foreground.any():
        return np.zeros(inner.shape, np.int32)
    within = _large(ndimage.label(foreground)[0], MIN_NUCLEUS_PX)
    seeds = ndimage.binary_fill_holes(_large(ndimage.label(inner > 0.5)[0], MIN_SEED_PX))
    labels: Labels = watershed(-inner, ndimage.label(seeds)[0], mask=within).astype(np.int32)
    return labels


def label_regions(inner: Map, contour: Map, rules: RegionRules, *, scale: float) -> Labels:
    """Label glands or lumina: what is inside and no contour, widened, without holes.

    Args:
        inner: interior probability.
        contour: contour probability.
        rules: which of the two.
        scale: 0.5 micrometres over the maps' pixel size.
    """
    width = int(rules.widened_px * scale)
    core = (inner - (contour > 0.5)) > rules.threshold
    cores, number = ndimage.label(_large(ndimage.label(core)[0], int(rules.min_px * scale * scale)))
    labels = np.zeros(inner.shape, np.int32)
    for label in range(1, number + 1):
        box = _padded(bounding_box(cores == label), 2 * width, inner.shape)
        shape = (cores[box] == label).astype(np.uint8)
        if width > 1:
            shape = cv2.dilate(shape, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width)))
        labels[box][ndimage.binary_fill_holes(shape)] = label
    return labels


def describe(labels: Labels, types: NDArray[Any] | None) -> dict[int, Record]:
    """Return a record an object: box, centroid and contour as (x, y), and its class.

    Args:
        labels: the objects.
        types: class of each pixel; None where there are none.
    """
    numbers = np.unique(labels)
    records = {}
    for number in numbers[numbers > 0]:
        box = bounding_box(labels == number)
        record = _describe_one((labels[box] == number).astype(np.uint8), box)
        if record is None:
            continue
        if types is not None:
            record |= _vote(types[box][labels[box] == number])
        records[int(number)] = record
    return records


def bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Return the rows and columns that a mask takes up."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _describe_one(shape: NDArray[np.uint8], box: tuple[slice, slice]) -> Record | None:
    ring = cv2.findContours(shape, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0][0][:, 0]
    if len(ring) < 3:
        return None
    rows, columns = box
    corner = np.array([columns.start, rows.start])
    moments = cv2.moments(shape)
    middle = np.array([moments["m10"], moments["m01"]]) / moments["m00"]
    return {
        "box": np.array([columns.start, rows.start, columns.stop, rows.stop]),
        "centroid": middle + corner,
        "contour": ring + corner,
    }


def _vote(types: NDArray[Any]) -> Record:
    """Most frequent class; 0 is none, and wins only unopposed."""
    classes, votes = np.unique(types, return_counts=True)
    order = np.argsort(-votes, kind="stable")
    best = order[1] if classes[order[0]] == 0 and len(order) > 1 else order[0]
    return {"type": int(classes[best]), "prob": float(votes[best] / votes.sum())}


def _large(labels: NDArray[np.int32], min_px: int) -> NDArray[np.bool_]:
    enough = np.bincount(labels.ravel()) >= min_px
    enough[0] = False
    large: NDArray[np.bool_] = enough[labels]
    return large


def _padded(box: tuple[slice, slice], by: int, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Widen a box by as much on each side; a side that would leave the map stays."""
    rows, columns = (
        slice(
            side.start - by if side.start >= by else side.start,
            side.stop + by if side.stop + by <= length else side.stop,
        )
        for side, length in zip(box, shape, strict=True)
    )
    return rows, columns
