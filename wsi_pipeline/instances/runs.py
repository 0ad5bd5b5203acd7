"""Pixel runs of a whole slide: a label image that fits into memory.

A tissue-sized label image of a slide takes gigabytes; its runs take megabytes, and they
are the same however the image was cut into tiles while they were collected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wsi_pipeline.geometry import Box
from wsi_pipeline.instances.kernels import Ints, describe, find_runs, label_runs, overlap_runs

__all__ = ["Runs"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Runs:
    """Disjoint labelled runs of one image in raster order."""

    width: int
    """Columns of the image."""
    places: Ints
    """(3, N) int32, rows ``y, x0, x1``."""
    values: Ints
    """(N,) int32 label of each run, never 0."""
    starts: Ints
    """(N,) int64 raster index of each run's first pixel; increasing."""

    @classmethod
    def of(cls, width: int, places: Ints, values: Ints) -> Runs:
        """Take runs that are already in raster order and maximal."""
        starts = places[0].astype(np.int64) * width + places[1]
        return cls(width=width, places=places, values=values, starts=starts)

    @classmethod
    def join(cls, width: int, parts: Sequence[tuple[Ints, Ints]]) -> Runs:
        """Sort pieces ``(places, values)`` and join what touches in a row with equal value.

        The result is the list of maximal runs of the image, whatever the pieces were.
        """
        places = np.concatenate([np.empty((3, 0), np.int32), *(part[0] for part in parts)], axis=1)
        values = np.concatenate([np.empty(0, np.int32), *(part[1] for part in parts)])
        order = np.argsort(places[0].astype(np.int64) * width + places[1], kind="stable")
        places, values = places[:, order], values[order]
        new = np.ones(values.size, np.bool_)
        new[1:] = (
            (places[0, 1:] != places[0, :-1])
            | (places[1, 1:] != places[2, :-1])
            | (values[1:] != values[:-1])
        )
        last = np.roll(new, -1)
        merged = np.stack([places[0, new], places[1, new], places[2, last]])
        return cls.of(width, np.ascontiguousarray(merged), values[new])

    @classmethod
    def of_image(cls, image: Ints) -> Runs:
        """Take the runs of equal non-zero pixels of a (H, W) integer image."""
        y, x0, x1, value = find_runs(image)
        return cls.of(image.shape[1], np.stack([y, x0, x1]), value)

    def __len__(self) -> int:
        return int(self.values.size)

    @property
    def stops(self) -> Ints:
        """(N,) int64 raster index behind each run's last pixel."""
        stops: Ints = self.starts + (self.places[2] - self.places[1])
        return stops

    def components(self) -> tuple[Ints, int]:
        """Number the 4-connected components of equal value in raster order, from 1."""
        y, x0, x1 = self.places
        return label_runs(y, x0, x1, self.values, 0)

    def relabel(self, values: Ints) -> Runs:
        """Give each run another value; runs that get 0 are left out.

        Runs of one row that touch must not get equal values.
        """
        keep = values > 0
        return Runs.of(self.width, np.ascontiguousarray(self.places[:, keep]), values[keep])

    def intersect(self, other: Runs) -> Runs:
        """Return the pixels common to both, with the other's values."""
        common, which = overlap_runs(self.places, other.places, self.width)
        return Runs.of(self.width, common, other.values[which])

    def window(self, box: Box) -> tuple[Ints, Ints]:
        """Return places and values of the runs inside a box, clipped to it."""
        first, last = np.searchsorted(self.places[0], [box.y, box.y1])
        places = self.places[:, first:last]
        inside = (places[2] > box.x) & (places[1] < box.x1)
        places = places[:, inside]
        places[1:] = np.clip(places[1:], box.x, box.x1)
        return np.ascontiguousarray(places), self.values[first:last][inside]

    def at(self, x: Ints, y: Ints) -> Ints:
        """Return the values at some pixels; 0 where there is no run."""
        if not len(self):
            return np.zeros(np.shape(x), np.int32)
        pixel = np.asarray(y, np.int64) * self.width + x
        index = np.maximum(np.searchsorted(self.starts, pixel, side="right") - 1, 0)
        inside = (self.starts[index] <= pixel) & (pixel < self.stops[index])
        return np.where(inside, self.values[index], 0)

    def overlaps(self, starts: Ints, stops: Ints) -> Ints:
        """Tell which raster ranges (each within one row) hold a pixel of some run."""
        if not len(self):
            return np.zeros(starts.shape, np.bool_)
        index = np.searchsorted(self.stops, starts, side="right")
        found: Ints = np.append(self.starts, np.iinfo(np.int64).max)[index] < stops
        return found

    def describe(self, labels: Ints, count: int) -> Ints:
        """Measure components, see :func:`wsi_pipeline.instances.kernels.describe`."""
        y, x0, x1 = self.places
        return describe(y, x0, x1, labels, count)

    def by_value(self) -> tuple[Ints, Ints]:
        """Return places sorted by value, then raster, and where each value ends.

        The values must be 1..n without gaps.
        """
        order = np.argsort(self.values, kind="stable")
        return np.ascontiguousarray(self.places[:, order]), np.cumsum(
            np.bincount(self.values)[1:], dtype=np.int64
        )
