"""Nuclei by their stain alone: only those that are beyond doubt, and where the doubt is.

A teacher for networks, so a missed nucleus costs little as long as nobody takes its place for
background: what is dark and is no sure nucleus is *doubtful*. Pixels are 0.5 micrometres, and
stain is in multiples of the slide's own Otsu threshold; both come from a fit to the slide, since
a window without nuclei would call its fibres nuclei.

::

    RGB -> optical density -> haematoxylin, without blood and ink, smoothed
        -> components above each of 14 levels: a tree
        -> of each branch, the level at which objects are most like ellipses with sharp edges
        -> grown to half of their contrast, parted at their necks, without tails -> objects
        -> round, dark, well set off, not squeezed in, not lost in something dark? -> nuclei
           the rest, and whatever else is dark                                     -> doubtful
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import watershed

from workflows.weights.label_polygons import connected, polygons
from workflows.weights.slide_stain import Stain
from wsi_pipeline.geometry import PixelGrid

__all__ = ["find_nuclei"]

LEVELS = np.linspace(0.6, 2.6, 14, dtype=np.float32)
"""At which components are looked for; the last is half above the darkest nuclei."""
DEPTH = (0.06, 7.0)
"""What a pixel of distance to the edge counts for as stain, so that necks are low; up to here."""
HOLE_PX = 60
"""Smaller holes of a component are the pale inside of a nucleus."""
BACKGROUND_PX = 12
"""Standard deviation of the mean of what lies around nuclei."""
GROWTH_PX = 3
NECK_PX = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5)
"""Half widths of necks at which objects are parted, the narrowest first."""

AREA_PX = (45, 560)
"""11 to 140 square micrometres."""
TYPICAL_PX = 110
"""Area of a lymphocyte; larger ones must be better ellipses, since two that touch are not."""
ROUNDNESS = 0.93
LIKENESS = (0.8, 0.9)
"""IoU with an ellipse of the same moments: of typical objects, of those 1.8 times as large."""
WIDTH_PX = 5.0
STAINED = 0.9
PALE = (0.7, 0.9, 70)
"""An object may be paler than ``STAINED`` (to this) if it is this much like an ellipse and at
least this large."""
SOLIDITY = 0.94
"""Area over that of the convex hull: two in a row have a waist."""
CONTRAST = (0.5, 0.6, 70)
"""Mean stain over that of a ring from 1 to 3.5 pixels outside; more for objects smaller than
this: knots of fibres and mucus."""
TOUCHING = 0.5
"""Share of the edge at which other objects may lie."""
DARK = 0.75
"""Stain above which a pixel without a nucleus is doubtful."""
LOST = (61, 0.25, 0.86)
"""Nuclei are not believed where, within a square of this side, more than this share of the area
is doubtful and more than this share of what is dark: keratin, folds, blur."""
SPECK_PX = 12

Labels = NDArray[np.int32]
Image = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shapes:
    """Measures of the objects of a label image; entry 0 is of no object."""

    area: NDArray[np.float64]
    roundness: NDArray[np.float64]
    """Area over that of the ellipse of the same second moments; 1 for ellipses, less for others."""
    likeness: NDArray[np.float64]
    """IoU with that ellipse."""
    width: NDArray[np.float64]
    """Its short axis."""

    def good(self) -> Mask:
        """Tell which are shaped like one nucleus."""
        larger = np.clip((self.area / TYPICAL_PX - 1) / 0.8, 0, 1)
        least = LIKENESS[0] + (LIKENESS[1] - LIKENESS[0]) * larger
        return (self.roundness > ROUNDNESS) & (self.likeness >= least)


def find_nuclei(rgb: NDArray[np.uint8], stain: Stain) -> tuple[Labels, Mask]:
    """Find the nuclei of a window.

    Args:
        rgb: ``(H, W, 3)`` at 0.5 micrometres a pixel. The outermost 24 pixels are unreliable.
        stain: of the slide.

    Returns:
        ``(H, W)`` labels of the nuclei (0: none; 4-connected, not consecutive), and where it
        is doubtful whether there is one; what is neither is background.
    """
    dark = stain.nuclear(rgb)
    objects = connected(_without_tails(_parted(_grown(_of_tree(dark), dark))))
    sure = _sure(objects, dark)
    nuclei = np.where(sure[objects], objects, 0)
    doubtful = _doubtful(dark, nuclei > 0, (objects > 0) & (nuclei == 0))
    side, least, share = LOST
    around = ndimage.uniform_filter(doubtful.astype(np.float32), side)
    kept = ndimage.uniform_filter((nuclei > 0).astype(np.float32), side)
    lost = (around > least) * around / np.maximum(around + kept, 1e-3)
    gone = _means(lost, nuclei) > share
    doubtful |= (nuclei > 0) & gone[nuclei]
    return np.where(gone[nuclei], 0, nuclei).astype(np.int32), doubtful


def _of_tree(dark: Image) -> Labels:
    """Label, of the components above all levels, the disjoint ones that look best."""
    base = _filled(dark > 0.7)
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(base), 1)
    height = np.where(base, dark + DEPTH[0] * np.minimum(depth, DEPTH[1]), dark)
    slope = np.hypot(*np.gradient(dark))
    levels: list[Labels] = [ndimage.label(_filled(height > level))[0] for level in LEVELS]
    scores = [_scores(labels, slope) for labels in levels]
    parents = [_owners(low, high) for low, high in itertools.pairwise(levels)]
    # From the top: a component, or what its parts are worth on average.
    worth = scores[-1]
    chosen = [worth > 0]
    for k in range(len(levels) - 2, -1, -1):
        area = np.bincount(levels[k + 1].ravel())
        size = len(scores[k])
        total = np.bincount(parents[k][1:], (area * worth)[1:], size)
        parts = total / np.maximum(np.bincount(parents[k][1:], area[1:], size), 1)
        chosen.insert(0, (scores[k] >= parts) & (scores[k] > 0))
        worth = np.maximum(scores[k], parts)
    # From the bottom: the chosen ones that do not lie in another.
    found = np.zeros(dark.shape, np.int32)
    free = np.ones(len(scores[0]), np.bool_)
    for k, labels in enumerate(levels):
        if k:
            free = (free & ~chosen[k - 1])[parents[k - 1]]
        number = np.where(free & chosen[k], np.cumsum(free & chosen[k]) + found.max(), 0)
        found = np.where(number[labels] > 0, number[labels], found).astype(np.int32)
    return found


def _scores(labels: Labels, slope: Image) -> NDArray[np.float64]:
    """Rate components: like an ellipse, of a nucleus's size, with sharp edges."""
    shapes = _shapes(labels)
    like = np.clip((shapes.roundness - 0.84) / 0.12, 0, 1) ** 2
    size = np.clip((shapes.area - 20) / 25, 0, 1) * np.clip((650 - shapes.area) / 250, 0, 1)
    edge = np.where(ndimage.binary_erosion(labels > 0), 0, labels)
    scores = like * size * _means(slope, edge, shapes.area.size)
    scores[0] = 0
    return scores


def _owners(low: Labels, high: Labels) -> NDArray[np.int64]:
    """Return which component of a lower level each of a higher one lies in."""
    owner = np.zeros(int(high.max()) + 1, np.int64)
    owner[high.ravel()] = low.ravel()
    owner[0] = 0
    return owner


def _grown(labels: Labels, dark: Image) -> Labels:
    """Add the pixels around objects that are darker than halfway to what is around them."""
    light = ~ndimage.binary_dilation(labels > 0, iterations=2) & (dark < 1)
    weight = light.astype(np.float32)
    around = ndimage.gaussian_filter(weight * dark, BACKGROUND_PX)
    around /= np.maximum(ndimage.gaussian_filter(weight, BACKGROUND_PX), 1e-3)
    mean = _means(dark, labels)
    for _ in range(GROWTH_PX):
        distance, (rows, columns) = ndimage.distance_transform_edt(labels == 0, return_indices=True)
        nearest = labels[rows, columns]
        near = (distance > 0) & (distance <= 1)
        labels = np.where(near & (dark > (mean[nearest] + around) / 2), nearest, labels)
    return labels


def _parted(labels: Labels) -> Labels:
    """Cut objects that are not shaped like one nucleus at their necks."""
    depth, shapes = _depth(labels), _shapes(labels)
    for half in NECK_PX:
        odd = ~shapes.good() & (shapes.area > 60)
        odd[0] = False
        cores, count = ndimage.label(odd[labels] & (depth > half))
        large = np.bincount(cores.ravel(), minlength=count + 1) >= 5
        large[0] = False
        falls = np.bincount(_owners(labels, cores)[large], minlength=odd.size) > 1
        if not falls.any():
            continue
        within = falls[labels]
        pieces = watershed(-depth, np.where(large[cores] & within, cores, 0), mask=within)
        labels = np.where(within, odd.size + pieces, labels)
        there = np.bincount(labels.ravel()) > 0
        labels = (np.cumsum(there) - 1)[labels].astype(np.int32)
        depth, shapes = _depth(labels), _shapes(labels)
    return labels


def _without_tails(labels: Labels) -> Labels:
    """Open every object by itself with a disc of about two pixels."""
    core = (labels > 0) & (_depth(labels) >= 2.5)
    distance, (rows, columns) = ndimage.distance_transform_edt(~core, return_indices=True)
    return np.where((labels[rows, columns] == labels) & (distance <= 2.3), labels, 0)


def _sure(labels: Labels, dark: Image) -> Mask:
    """Tell which objects are nuclei beyond doubt."""
    shapes = _shapes(labels)
    size = shapes.area.size
    drawn = np.array(polygons(labels, PixelGrid.level0(labels.shape[::-1])), object)
    solidity = shapely.area(drawn) / shapely.area(shapely.convex_hull(drawn))
    distance, (rows, columns) = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    ring = np.where((distance > 1) & (distance <= 3.5), labels[rows, columns], 0)
    mean = _means(dark, labels)
    contrast = mean - _means(dark, ring, size)
    highest = ndimage.maximum_filter(labels, 3)
    lowest = ndimage.minimum_filter(np.where(labels > 0, labels, size), 3)
    touching = (labels > 0) & ((highest != labels) | (lowest != labels))
    edge = np.where((highest != labels) | (ndimage.minimum_filter(labels, 3) != labels), labels, 0)
    pale = (shapes.likeness > PALE[1]) & (shapes.area >= PALE[2])
    sure: Mask = (
        shapes.good()
        & (shapes.area >= AREA_PX[0])
        & (shapes.area <= AREA_PX[1])
        & (shapes.width > WIDTH_PX)
        & (np.append(0, solidity) > SOLIDITY)
        & (mean > np.where(pale, PALE[0], STAINED))
        & (contrast > np.where(shapes.area < CONTRAST[2], CONTRAST[1], CONTRAST[0]))
        & (_means(touching.astype(np.float32), edge, size) < TOUCHING)
    )
    sure[0] = False
    return sure


def _doubtful(dark: Image, nuclei: Mask, refused: Mask) -> Mask:
    """Mark refused objects and other dark pixels, but not the blurred rims of nuclei."""
    rim = ndimage.binary_dilation(nuclei, iterations=2)
    seeds = ((dark > DARK) & ~(rim & (dark < 1))) | refused
    doubtful = ndimage.binary_dilation(seeds & ~nuclei)
    doubtful = _filled(doubtful, 80) & ~nuclei & ~(rim & (dark < 0.6) & ~refused)
    pieces = ndimage.label(doubtful)[0]
    return np.asarray(doubtful & (np.bincount(pieces.ravel()) > SPECK_PX)[pieces])


def _filled(mask: Mask, largest: int = HOLE_PX) -> Mask:
    """Fill holes of fewer pixels than this."""
    holes = ndimage.label(~mask)[0]
    return np.asarray(mask | (np.bincount(holes.ravel()) < largest)[holes])


def _depth(labels: Labels) -> Image:
    """Return how far inside its object (or the background) a pixel's centre lies; 0.5 at least."""
    edge = np.zeros(labels.shape, np.bool_)
    for axis in (0, 1):
        across = np.diff(labels, axis=axis) != 0
        before, after = [slice(None)] * 2, [slice(None)] * 2
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        edge[tuple(before)] |= across
        edge[tuple(after)] |= across
    return np.asarray(ndimage.distance_transform_edt(~edge) + 0.5, np.float32)


def _means(values: Image, labels: Labels, size: int = 0) -> NDArray[np.float64]:
    """Return the mean of every label, 0 for those without pixels."""
    flat = labels.ravel()
    count = np.bincount(flat, minlength=size)
    return np.asarray(np.bincount(flat, values.ravel(), size) / np.maximum(count, 1), np.float64)


def _shapes(labels: Labels) -> _Shapes:
    size = int(labels.max()) + 1
    place = np.flatnonzero(labels)
    own = labels.ravel()[place]
    y, x = np.divmod(place, labels.shape[1])
    count = np.bincount(own, minlength=size)
    area = np.maximum(count, 1).astype(np.float64)
    dx = x - (np.bincount(own, x, size) / area)[own]
    dy = y - (np.bincount(own, y, size) / area)[own]
    # A pixel is a square, not a point: its own moment is 1/12.
    xx = np.bincount(own, dx * dx, size) / area + 1 / 12
    yy = np.bincount(own, dy * dy, size) / area + 1 / 12
    xy = np.bincount(own, dx * dy, size) / area
    det = np.maximum(xx * yy - xy * xy, 1e-6)
    ellipse = 4 * np.pi * np.sqrt(det)
    within = (yy[own] * dx * dx - 2 * xy[own] * dx * dy + xx[own] * dy * dy) / det[own] <= 4
    shared = np.bincount(own[within], minlength=size)
    half = (xx + yy) / 2
    short = np.maximum(half - np.sqrt(np.maximum(half * half - det, 0)), 0)
    return _Shapes(
        area=count.astype(np.float64),
        roundness=area / ellipse,
        likeness=shared / (area + ellipse - shared),
        width=4 * np.sqrt(short),
    )
