"""Boxes around peaks: a pixel whose heat is the highest of its surroundings is an object.

::

    heat      . 1 2 1 . . .        a pixel is a peak if no pixel of the disc around it has
              1 5 9 4 1 3 1        more heat, and no earlier one (row by row) as much
              . 2 4 2 1 2 .
                  |                9 is one; 3 is one if 9 is farther than the disc reaches
                  +- the object: the box of the size stated here, centred on this pixel

Whether a pixel is a peak hangs on its disc alone, and two peaks are never within one disc. So
each window finds the peaks of its own tile, and a margin as wide as the disc makes it exact.

Peaks and stated sizes are those of CenterNet (Zhou et al., "Objects as Points", 2019), with a
disc in micrometres instead of 3 x 3 pixels: a map at full resolution has broad peaks.
"""

from __future__ import annotations

import math

import numpy as np

from wsi_pipeline.compiled import compiled
from wsi_pipeline.geometry import Box
from wsi_pipeline.instances.heads import HeadMaps, Objects, above
from wsi_pipeline.instances.kernels import Ints
from wsi_pipeline.instances.outlines import MEASURES, Outlines
from wsi_pipeline.spec import PeakRules

__all__ = ["PeakFinder"]


class PeakFinder:
    """Finds the objects of one head that has :class:`PeakRules`."""

    def __init__(self, maps: HeadMaps, rules: PeakRules) -> None:
        self.maps = maps
        self._heat_from = above(rules.threshold)
        self._disc = _disc(rules.min_distance_um, maps.mpp)
        self.margin_px = int(np.abs(self._disc).max(initial=0))
        # Pixels that the value 255 of a size channel stands for, x and y.
        self._largest_px = tuple(rules.max_size_um / mpp for mpp in maps.mpp)

    def find(self, tile: Box) -> Objects | None:
        """Draw the objects whose peak lies in a tile.

        Args:
            tile: a box of the head's grid.

        Returns:
            The objects in raster order, or None where there are none.
        """
        window = tile.pad(self.margin_px)
        heat, width, height = self.maps.probabilities(window)
        offsets = self._disc[:, 1] * window.width + self._disc[:, 0]
        found = _peaks(heat, self._heat_from, self.margin_px, offsets)
        if not found.size:
            return None
        y, x = np.divmod(found, window.width)
        peaks = np.stack([x + window.x, y + window.y], axis=1)
        sides = np.stack([width[y, x], height[y, x]], axis=1) / 255 * self._largest_px
        return Objects(
            anchors=peaks,
            outlines=_boxes(peaks, sides, self.maps.grid.size),
            sums=np.stack([np.ones(found.size, np.int64), heat[y, x].astype(np.int64)], axis=1),
            votes=np.zeros((found.size, self.maps.n_classes), np.int64),
        )


def _disc(radius_um: float, mpp: tuple[float, float]) -> Ints:
    """Return the pixels (n, 2) int64 x, y around the middle one, the nearest first.

    The nearest first, since a pixel on a slope has a hotter neighbour: one look is enough.
    """
    reach = [math.floor(radius_um / side + 1e-6) for side in mpp]
    x, y = np.meshgrid(*(np.arange(-r, r + 1) for r in reach))
    distance = np.hypot(x * mpp[0], y * mpp[1])
    inside = (distance <= radius_um * (1 + 1e-6)) & (distance > 0)
    order = np.argsort(distance[inside], kind="stable")
    return np.stack([x[inside], y[inside]], axis=1)[order].astype(np.int64)


@compiled
def _peaks(heat: Ints, heat_from: int, margin: int, offsets: Ints) -> Ints:
    """Return the flat indices of the peaks within the margin, in raster order.

    Args:
        heat: (H, W) uint8.
        heat_from: smallest value of a peak.
        margin: pixels at each side that are no candidates; as far as the offsets reach.
        offsets: (n,) int64 flat offsets of the other pixels of the disc. As none reaches
            beyond the margin, a negative one is earlier in raster order.
    """
    height, width = heat.shape
    heat_at = heat.reshape(-1)
    found = np.empty((height - 2 * margin) * (width - 2 * margin), np.int64)
    n = 0
    for y in range(margin, height - margin):
        for pixel in range(y * width + margin, (y + 1) * width - margin):
            here = heat_at[pixel]
            if here < heat_from:
                continue
            highest = True
            for k in range(offsets.size):
                other = heat_at[pixel + offsets[k]]
                if other > here or (other == here and offsets[k] < 0):
                    highest = False
                    break
            if highest:
                found[n] = pixel
                n += 1
    return found[:n].copy()


def _boxes(peaks: Ints, sides: Ints, size: tuple[int, int]) -> Outlines:
    """Draw a box around each peak, clipped to the map.

    Sides are rounded to whole pixels, at least one: a box centred on a pixel then has its
    corners at whole half-pixels.

    Args:
        peaks: (n, 2) int64 x, y.
        sides: (n, 2) float64 widths and heights in pixels.
        size: width and height of the map.
    """
    whole = np.maximum(np.floor(sides + 0.5), 1).astype(np.int64)
    low = np.maximum(2 * peaks + 1 - whole, 0)
    high = np.minimum(2 * peaks + 1 + whole, 2 * np.array(size))
    (left, top), (right, bottom) = low.T, high.T
    n = len(peaks)
    corners = np.stack([left, top, right, top, right, bottom, left, bottom], axis=1)
    return Outlines(
        measures=_measures(peaks, low, high),
        vertices=corners.reshape(4 * n, 2).astype(np.int32),
        ring_ends=np.arange(4, 4 * n + 1, 4),
        object_ends=np.arange(1, n + 1),
    )


def _measures(peaks: Ints, low: Ints, high: Ints) -> Ints:
    """Measure boxes given by their corners in half-pixels, as if their area were pixels.

    The variance of a side ``w`` is ``w * w / 12``, of which each pixel has 1/12 to itself
    (``rows.py`` adds it): the sums hold the rest.
    """
    width, height = ((high - low) / 2).T
    mean_x, mean_y = ((low + high) / 4 - 0.5 - peaks).T
    area = width * height
    columns = {
        "area": area,
        "x": area * mean_x,
        "y": area * mean_y,
        "xx": area * (mean_x * mean_x + (width * width - 1) / 12),
        "xy": area * mean_x * mean_y,
        "yy": area * (mean_y * mean_y + (height * height - 1) / 12),
        "steps_x": 2 * width,
        "steps_y": 2 * height,
        "steps_diagonal": np.zeros_like(area),
        "hull": 8 * area,
        "left": low[:, 0],
        "top": low[:, 1],
        "right": high[:, 0],
        "bottom": high[:, 1],
    }
    return np.stack([columns[name] for name in MEASURES], axis=1)
