"""Pixels: those inside a polygon (by their centres), and those beyond an image."""

from __future__ import annotations

import math

import numpy as np
import shapely
from numpy.typing import NDArray

from wsi_pipeline.geometry import PixelGrid

__all__ = ["fill_polygons", "mirrored", "number_pixels", "on_grid"]


def fill_polygons(polygons: NDArray[np.object_], shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Draw polygons as a label image.

    The outlines that the pipeline draws run along the edges of pixels, so they come back as
    exactly the pixels they were drawn around.

    Args:
        polygons: (N,) shapely polygons or multipolygons in pixels of the image; (0, 0) is the
            corner of the first pixel.
        shape: (H, W).

    Returns:
        (H, W): number of the polygon + 1, 0 where there is none. Where polygons overlap the
        later one wins.
    """
    ids = np.zeros(shape[:2], np.int32)
    for number, shape_ in enumerate(polygons, start=1):
        for part in shapely.get_parts(shape_):
            rings = [np.asarray(ring.coords) for ring in (part.exterior, *part.interiors)]
            _fill(ids, rings, number)
    return ids


def number_pixels(polygons: NDArray[np.object_], shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Number the pixels whose centres a polygon holds; the smaller of two covers the larger.

    Args:
        polygons: in pixels of the mask.
        shape: (H, W).

    Returns:
        (H, W): 0, or 1 + the polygon's index.
    """
    ids = np.zeros(shape, np.int32)
    for index in np.argsort(-shapely.area(polygons), kind="stable"):
        polygon = polygons[index]
        x0, y0, x1, y1 = shapely.bounds(polygon)
        left, top = max(0, math.floor(x0)), max(0, math.floor(y0))
        right, bottom = min(shape[1], math.ceil(x1)), min(shape[0], math.ceil(y1))
        if left >= right or top >= bottom:
            continue
        shapely.prepare(polygon)
        x, y = np.meshgrid(np.arange(left, right) + 0.5, np.arange(top, bottom) + 0.5)
        ids[top:bottom, left:right][shapely.contains_xy(polygon, x, y)] = index + 1
    return ids


def on_grid(polygons: NDArray[np.object_], grid: PixelGrid) -> NDArray[np.object_]:
    """Move polygons from level-0 pixels to those of a grid."""
    moved: NDArray[np.object_] = shapely.transform(polygons, grid.from_level0)
    return moved


def mirrored(positions: NDArray[np.intp], length: int) -> NDArray[np.intp]:
    """Fold positions of any distance back into an axis that is mirrored at its ends."""
    turned = positions % (2 * length)
    return np.minimum(turned, 2 * length - 1 - turned)


def _fill(ids: NDArray[np.int32], rings: list[NDArray[np.float64]], number: int) -> None:
    """Number the pixels inside an odd number of rings: from left to right, a crossing is a turn."""
    left, top = np.maximum(np.floor(rings[0].min(axis=0)).astype(int), 0)
    right, bottom = np.minimum(np.ceil(rings[0].max(axis=0)).astype(int), ids.shape[::-1])
    if left >= right or top >= bottom:
        return
    size = bottom - top, right - left + 1
    turns = np.zeros(size, np.intp)
    for ring in rings:
        rows, x = _crossings(ring, top, bottom)
        # The first pixel whose centre is not left of the crossing.
        columns = np.clip(np.ceil(x - 0.5).astype(int), left, right)
        places = (rows - top) * size[1] + columns - left
        turns += np.bincount(places, minlength=turns.size).reshape(size)
    inside = np.cumsum(turns, axis=1)[:, :-1] % 2 == 1
    ids[top:bottom, left:right][inside] = number


def _crossings(
    ring: NDArray[np.float64], top: int, bottom: int
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return where the middles of the rows from ``top`` to ``bottom`` meet a ring: rows and x."""
    low, high = np.sort([ring[:-1, 1], ring[1:, 1]], axis=0)
    # An edge owns its upper end, not its lower one, so that a corner is met once.
    first, end = (np.clip(np.ceil(y - 0.5).astype(int), top, bottom) for y in (low, high))
    counts = end - first
    edge = np.repeat(np.arange(len(counts)), counts)
    rows = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - first, counts)
    (x0, y0), (x1, y1) = ring[edge].T, ring[edge + 1].T
    return rows, x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
