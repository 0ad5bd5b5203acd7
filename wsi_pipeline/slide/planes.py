"""From a pixel grid to the pixels of the file that make it.

::

    level l of the file --- reduction r (1, 2, 4, ...) ---> Plane: whole tiles, reduced
    Plane --- scale and offset along each axis ---> the pixel grid that was asked for

Scale 1 and a whole offset need no arithmetic: windows are then views of the plane.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from wsi_pipeline.geometry import Box, PixelGrid
from wsi_pipeline.slide.reader import RasterLevel
from wsi_pipeline.slide.resample import AxisTaps, axis_taps

__all__ = ["MPP_TOLERANCE", "Plane", "Sampling", "fitting_grid", "sampling_for"]

MPP_TOLERANCE = 0.03
"""Networks do not notice a pixel size that is wrong by this share; resampling costs more."""
_SAME = 1e-6
"""Pixels; grids that differ by less are the same grid."""
_MAX_REDUCTION = 1 << 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Plane:
    """One level of the file, every tile of it reduced by the same power of two."""

    level: int
    """Index of the level."""
    reduction: int
    """A power of two that divides the tile's sides."""
    raster: RasterLevel
    """Size and tile size in pixels of this plane."""
    spacing: tuple[float, float]
    """Level-0 pixels that one pixel of this plane spans."""

    @property
    def box(self) -> Box:
        """The whole plane."""
        return Box(x=0, y=0, width=self.raster.size[0], height=self.raster.size[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the pixels of a grid come from those of a plane.

    Grid position g lies at ``g * scale + offset`` of the plane, along each axis.
    """

    plane: Plane
    scale: tuple[float, float]
    """Plane pixels a grid pixel."""
    offset: tuple[float, float]
    """Plane position of the grid's corner."""

    @property
    def shift(self) -> tuple[int, int] | None:
        """Whole plane pixels from grid to plane where that is all there is; else None."""
        shift = round(self.offset[0]), round(self.offset[1])
        length = max(self.plane.raster.size)
        is_same = all(abs(scale - 1) * length < _SAME for scale in self.scale) and all(
            abs(a - b) < _SAME for a, b in zip(self.offset, shift, strict=True)
        )
        return shift if is_same else None

    def axis_taps(self, axis: int, start: int, stop: int) -> AxisTaps:
        """Return the taps of a range of grid pixels in x (0) or y (1)."""
        return axis_taps(
            start,
            stop,
            scale=self.scale[axis],
            offset=self.offset[axis],
            size=self.plane.raster.size[axis],
        )

    def source(self, box: Box) -> Box:
        """Return the pixels of the plane that a grid box needs, all inside the plane."""
        if self.shift is not None:
            return box.shift(*self.shift).intersect(self.plane.box)
        edges = (box.x, box.x1), (box.y, box.y1)
        (x0, x1), (y0, y1) = (
            _span(*edges[axis], self.scale[axis], self.offset[axis], self.plane.raster.size[axis])
            for axis in (0, 1)
        )
        return Box.from_edges(x0, y0, x1, y1)

    def tiles(self, box: Box) -> set[tuple[int, int]]:
        """Return the ``(column, row)`` of the plane's tiles that a grid box needs."""
        width, height = self.plane.raster.tile_size
        need = self.source(box)
        if not need.area:
            return set()
        columns = range(need.x // width, -(-need.x1 // width))
        return {
            (column, row)
            for row in range(need.y // height, -(-need.y1 // height))
            for column in columns
        }


@lru_cache(maxsize=4096)
def _span(start: int, stop: int, scale: float, offset: float, size: int) -> tuple[int, int]:
    """Return the source pixels that some target pixels need; windows repeat, so it is kept."""
    return axis_taps(start, stop, scale=scale, offset=offset, size=size).span


def fitting_grid(
    levels: Sequence[tuple[tuple[int, int], tuple[float, float]]], target: tuple[float, float]
) -> PixelGrid:
    """Return the whole slide at about the wanted spacing.

    A power-of-two reduction of a level that lies within 3 % of the target on both axes is
    used as it is, the coarsest such level first, since that is the cheapest; otherwise the
    spacing is exactly the target.

    Args:
        levels: ``(size, downsample)`` of each level, finest first.
        target: wanted level-0 pixels a grid pixel, in x and y.
    """
    for size, downsample in reversed(levels):
        nearest = round(math.log2(math.sqrt(math.prod(target) / math.prod(downsample))))
        reduction = 1 << max(0, nearest)
        spacing = downsample[0] * reduction, downsample[1] * reduction
        if all(abs(s / t - 1) <= MPP_TOLERANCE for s, t in zip(spacing, target, strict=True)):
            cells = -(-size[0] // reduction), -(-size[1] // reduction)
            return PixelGrid(origin=(0.0, 0.0), spacing=spacing, size=cells)
    width, height = levels[0][0]
    # a last pixel of which only a rounding error lies on the slide is not part of it
    cells = math.ceil(width / target[0] - _SAME), math.ceil(height / target[1] - _SAME)
    return PixelGrid(origin=(0.0, 0.0), spacing=target, size=cells)


def sampling_for(
    grid: PixelGrid,
    rasters: Sequence[RasterLevel],
    downsamples: Sequence[tuple[float, float]],
) -> Sampling:
    """Choose the cheapest plane that is fine enough for a grid.

    That is the coarsest level, and of it the largest reduction, whose pixels are no
    larger than the grid's (within 3 %).

    Args:
        grid: any grid on the slide.
        rasters: the levels, finest first.
        downsamples: level-0 pixels a pixel of each level, in x and y.
    """
    limit = tuple(spacing * (1 + MPP_TOLERANCE) for spacing in grid.spacing)
    level = max(
        index
        for index, downsample in enumerate(downsamples)
        if index == 0 or (downsample[0] <= limit[0] and downsample[1] <= limit[1])
    )
    raster, downsample = rasters[level], downsamples[level]
    reduction = 1
    while reduction < _MAX_REDUCTION and _reduces(raster, downsample, reduction * 2, limit):
        reduction *= 2
    spacing = downsample[0] * reduction, downsample[1] * reduction
    reduced = RasterLevel(
        size=(-(-raster.size[0] // reduction), -(-raster.size[1] // reduction)),
        tile_size=(raster.tile_size[0] // reduction, raster.tile_size[1] // reduction),
    )
    return Sampling(
        plane=Plane(level=level, reduction=reduction, raster=reduced, spacing=spacing),
        scale=(grid.spacing[0] / spacing[0], grid.spacing[1] / spacing[1]),
        offset=(grid.origin[0] / spacing[0], grid.origin[1] / spacing[1]),
    )


def _reduces(
    raster: RasterLevel, downsample: tuple[float, float], reduction: int, limit: tuple[float, ...]
) -> bool:
    fits = all(side % reduction == 0 for side in raster.tile_size)
    return fits and all(d * reduction <= most for d, most in zip(downsample, limit, strict=True))
