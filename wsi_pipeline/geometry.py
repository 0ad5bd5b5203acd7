"""Boxes and pixel grids: the only place where coordinates are converted.

Every raster lies on a :class:`PixelGrid`; every vector is in level-0 pixels.
Tuples are ``(x, y)`` and ``(width, height)``; arrays are indexed ``[y, x]``.

::

    level-0 frame, origin at the top-left corner of the top-left pixel
    +----------------------------------------> x
    |   origin
    |     +-------+-------+-------+
    |     | 0,0   | 1,0   |       |     one grid pixel spans spacing[0] x spacing[1]
    |     +-------+-------+-------+     level-0 pixels; grid point (0, 0) is the
    |     | 0,1   |       |       |     corner of its first pixel, (0.5, 0.5) its centre
    v     +-------+-------+-------+
    y
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Box", "PixelGrid"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """A half-open rectangle of whole pixels on some grid."""

    x: int
    """Left edge."""
    y: int
    """Top edge."""
    width: int
    """Columns; zero is allowed, negative is not."""
    height: int
    """Rows."""

    def __post_init__(self) -> None:
        if self.width < 0 or self.height < 0:
            msg = f"a box cannot have a negative size: {self.width} x {self.height}"
            raise ValueError(msg)

    @classmethod
    def from_edges(cls, x0: int, y0: int, x1: int, y1: int) -> Box:
        """Make a box from its half-open edges; crossed edges give an empty box."""
        return cls(x=x0, y=y0, width=max(0, x1 - x0), height=max(0, y1 - y0))

    @property
    def x1(self) -> int:
        """Right edge, exclusive."""
        return self.x + self.width

    @property
    def y1(self) -> int:
        """Bottom edge, exclusive."""
        return self.y + self.height

    @property
    def area(self) -> int:
        """Number of pixels."""
        return self.width * self.height

    @property
    def size(self) -> tuple[int, int]:
        """``(width, height)``."""
        return self.width, self.height

    @property
    def slices(self) -> tuple[slice, slice]:
        """``(rows, columns)`` to cut this box out of an array at the grid's origin."""
        return slice(self.y, self.y1), slice(self.x, self.x1)

    def shift(self, dx: int, dy: int) -> Box:
        """Move the box."""
        return Box(x=self.x + dx, y=self.y + dy, width=self.width, height=self.height)

    def relative_to(self, other: Box) -> Box:
        """Express the box in a frame whose origin is the other's corner."""
        return self.shift(-other.x, -other.y)

    def pad(self, margin: int) -> Box:
        """Grow (or with a negative margin shrink) the box on all four sides."""
        return Box.from_edges(self.x - margin, self.y - margin, self.x1 + margin, self.y1 + margin)

    def intersect(self, other: Box) -> Box:
        """Return the common part; empty (area 0) where there is none."""
        return Box.from_edges(
            max(self.x, other.x),
            max(self.y, other.y),
            min(self.x1, other.x1),
            min(self.y1, other.y1),
        )

    def contains(self, other: Box) -> bool:
        """Tell whether the other box lies wholly inside this one."""
        return (
            self.x <= other.x and self.y <= other.y and other.x1 <= self.x1 and other.y1 <= self.y1
        )

    def coarsen(self, stride: int) -> Box:
        """Return the smallest box on a grid ``stride`` times coarser that covers this one."""
        return Box.from_edges(
            self.x // stride, self.y // stride, -(-self.x1 // stride), -(-self.y1 // stride)
        )

    def refine(self, stride: int) -> Box:
        """Return the same box on a grid ``stride`` times finer."""
        return Box.from_edges(self.x * stride, self.y * stride, self.x1 * stride, self.y1 * stride)


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelGrid:
    """Where a raster lies on the slide."""

    origin: tuple[float, float]
    """Level-0 position of the corner of the first pixel."""
    spacing: tuple[float, float]
    """Level-0 pixels that one grid pixel spans, in x and y."""
    size: tuple[int, int]
    """``(width, height)`` in grid pixels."""

    def __post_init__(self) -> None:
        if not all(math.isfinite(s) and s > 0 for s in self.spacing):
            msg = f"grid spacing must be positive and finite, not {self.spacing}"
            raise ValueError(msg)
        if min(self.size) < 0:
            msg = f"grid size cannot be negative: {self.size}"
            raise ValueError(msg)

    @classmethod
    def level0(cls, size: tuple[int, int]) -> PixelGrid:
        """Return the frame of the slide itself."""
        return cls(origin=(0.0, 0.0), spacing=(1.0, 1.0), size=size)

    @property
    def box(self) -> Box:
        """The whole grid as a box on itself."""
        return Box(x=0, y=0, width=self.size[0], height=self.size[1])

    def to_level0(self, xy: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map grid points to the level-0 frame.

        Args:
            xy: ``(N, 2)`` points in this grid; (0, 0) is the first pixel's corner.

        Returns:
            ``(N, 2)`` float64 points in level-0 pixels.
        """
        return np.asarray(xy, np.float64) * self.spacing + self.origin

    def from_level0(self, xy: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map level-0 points to this grid; the inverse of :meth:`to_level0`."""
        return (np.asarray(xy, np.float64) - self.origin) / self.spacing

    def coarsen(self, stride: int) -> PixelGrid:
        """Return the grid ``stride`` times coarser that covers this one from the same origin."""
        return PixelGrid(
            origin=self.origin,
            spacing=(self.spacing[0] * stride, self.spacing[1] * stride),
            size=(-(-self.size[0] // stride), -(-self.size[1] // stride)),
        )

    def window(self, box: Box) -> PixelGrid:
        """Return the grid of the raster that a box of this grid cuts out."""
        return PixelGrid(
            origin=(
                self.origin[0] + box.x * self.spacing[0],
                self.origin[1] + box.y * self.spacing[1],
            ),
            spacing=self.spacing,
            size=box.size,
        )

    def cover(self, other: PixelGrid, box: Box) -> Box:
        """Return the smallest box of this grid that covers a box of another grid.

        The result may reach beyond this grid; intersect it with :attr:`box` where
        that matters. Edges within a millionth of a pixel of a whole number count
        as lying on it, so that equal grids map boxes to themselves.
        """
        corners = np.array([[box.x, box.y], [box.x1, box.y1]], np.float64)
        (x0, y0), (x1, y1) = self.from_level0(other.to_level0(corners))
        tolerance = 1e-6
        return Box.from_edges(
            math.floor(x0 + tolerance),
            math.floor(y0 + tolerance),
            math.ceil(x1 - tolerance),
            math.ceil(y1 - tolerance),
        )
