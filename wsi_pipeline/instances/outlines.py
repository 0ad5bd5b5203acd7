"""Polygons of many objects in a few flat arrays, with what was measured along their rings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wsi_pipeline.compiled import compiled
from wsi_pipeline.geometry import PixelGrid
from wsi_pipeline.instances.kernels import Ints

__all__ = ["MEASURES", "Outlines"]

MEASURES = (
    "area",  # pixels of the region: filled holes in, open holes out
    "x",  # sums over the region's pixels, relative to the anchor
    "y",
    "xx",
    "xy",
    "yy",
    "steps_x",  # steps of one pixel along x, along y, and half-pixel diagonals
    "steps_y",
    "steps_diagonal",
    "hull",  # area of the outer ring's convex hull, in eighths of a pixel
    "left",  # extent in half-pixels
    "top",
    "right",
    "bottom",
)
"""Columns of :attr:`Outlines.measures`."""

_LEFT, _COUNT = MEASURES.index("left"), len(MEASURES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlines:
    """Rings and measures of objects on one pixel grid."""

    measures: Ints
    """(N, 14) int64, see :data:`MEASURES`; float64 for boxes, whose edges may halve pixels."""
    vertices: Ints
    """(V, 2) int32 ring vertices in half-pixels of the grid; rings are not closed."""
    ring_ends: Ints
    """(R,) int64: where each ring ends in ``vertices``."""
    object_ends: Ints
    """(N,) int64: where each object ends in ``ring_ends``; its first ring is the outer one."""

    @classmethod
    def concatenate(cls, parts: list[Outlines]) -> Outlines:
        """Join outlines on the same grid."""
        rings = np.cumsum([0, *(part.ring_ends.size for part in parts)])
        vertices = np.cumsum([0, *(len(part.vertices) for part in parts)])
        return cls(
            measures=np.concatenate([part.measures for part in parts]),
            vertices=np.concatenate([part.vertices for part in parts]),
            ring_ends=np.concatenate(
                [part.ring_ends + start for part, start in zip(parts, vertices, strict=False)]
            ),
            object_ends=np.concatenate(
                [part.object_ends + start for part, start in zip(parts, rings, strict=False)]
            ),
        )

    def column(self, name: str) -> Ints:
        """Return one measure of all objects."""
        return self.measures[:, MEASURES.index(name)]

    @property
    def ring_counts(self) -> Ints:
        """Rings of each object; one without open holes."""
        return np.diff(self.object_ends, prepend=0)

    def bounds(self, grid: PixelGrid) -> Ints:
        """Return the (N, 4) float64 extents in level-0 pixels: left, top, right, bottom."""
        half = self.measures[:, _LEFT:_COUNT].astype(np.float64) * 0.5
        bounds: Ints = half * (*grid.spacing, *grid.spacing) + (*grid.origin, *grid.origin)
        return bounds

    def wkb(self, grid: PixelGrid) -> tuple[Ints, Ints]:
        """Encode the polygons in level-0 pixels.

        Returns:
            (N + 1,) int32 offsets and the uint8 bytes: the two buffers of an Arrow array.
        """
        return _encode_wkb(
            self.vertices, self.ring_ends, self.object_ends, *grid.spacing, *grid.origin
        )


@compiled
def _encode_wkb(
    vertices: Ints,
    ring_ends: Ints,
    object_ends: Ints,
    spacing_x: float,
    spacing_y: float,
    origin_x: float,
    origin_y: float,
) -> tuple[Ints, Ints]:
    n_objects, n_rings = object_ends.size, ring_ends.size
    offsets = np.empty(n_objects + 1, np.int32)
    data = np.empty(9 * n_objects + 20 * n_rings + 16 * vertices.shape[0], np.uint8)
    point = np.empty(2, np.float64)
    count = np.empty(1, np.uint32)
    point_bytes, count_bytes = point.view(np.uint8), count.view(np.uint8)
    at, ring, vertex = 0, 0, 0
    for i in range(n_objects):
        offsets[i] = at
        data[at] = 1  # little-endian
        data[at + 1] = 3  # Polygon
        data[at + 2 : at + 5] = 0
        count[0] = object_ends[i] - ring
        data[at + 5 : at + 9] = count_bytes
        at += 9
        while ring < object_ends[i]:
            size = ring_ends[ring] - vertex
            count[0] = size + 1
            data[at : at + 4] = count_bytes
            at += 4
            for k in range(size + 1):
                v = vertex + (k if k < size else 0)
                point[0] = vertices[v, 0] * 0.5 * spacing_x + origin_x
                point[1] = vertices[v, 1] * 0.5 * spacing_y + origin_y
                for b in range(16):
                    data[at + b] = point_bytes[b]
                at += 16
            vertex = ring_ends[ring]
            ring += 1
    offsets[n_objects] = at
    return offsets, data[:at]
