"""Polygons that come from elsewhere: made valid, turned one way round, measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import shapely
from numpy.typing import NDArray

__all__ = ["shape_columns", "valid_polygons"]

Floats = NDArray[np.float64]
Geometries = NDArray[np.object_]

_MITRE_LIMIT = 1.5
"""Right angles stay right, sharper ones are cut."""


def valid_polygons(rings: Sequence[Floats], *, grow: float) -> tuple[Geometries, int]:
    """Make a valid, counter-clockwise polygon without holes around each ring.

    A ring that touches or crosses itself falls into parts: the largest is kept. One without
    area, a point or a line, has some after it was grown.

    Args:
        rings: ``(N, 2)`` points each, first and last different or not.
        grow: how far the outline is moved outwards, corners as they are.

    Returns:
        A polygon for each ring, None where it has no points; and how many rings were mended.
    """
    polygons: Geometries = np.full(len(rings), None, object)
    usable = [number for number, ring in enumerate(rings) if len(ring)]
    if not usable:
        return polygons, 0
    # A ring needs three points, its first once more not counted.
    padded = [np.resize(rings[number], (max(len(rings[number]), 3), 2)) for number in usable]
    owner = np.repeat(np.arange(len(usable)), [len(ring) for ring in padded])
    made = shapely.polygons(shapely.linearrings(np.concatenate(padded), indices=owner))
    broken = np.flatnonzero(~shapely.is_valid(made))
    mended = 0
    for at in broken.tolist():
        largest = max(shapely.get_parts(shapely.make_valid(made[at])), key=shapely.area)
        mended += largest.area > 0
        # A hull of points in a line is the line.
        made[at] = largest if largest.area else shapely.MultiPoint(padded[at]).convex_hull
    made = shapely.buffer(
        made, grow, cap_style="square", join_style="mitre", mitre_limit=_MITRE_LIMIT
    )
    outer = shapely.get_exterior_ring(made)
    turned = ~shapely.is_ccw(outer)
    outer[turned] = shapely.reverse(outer[turned])
    polygons[usable] = shapely.polygons(outer)
    return polygons, mended


def shape_columns(polygons: Geometries, pixel_size: tuple[float, float]) -> dict[str, Floats]:
    """Measure polygons; the axes are those of the ellipse with the same second moments.

    Args:
        polygons: (N,) with area, without holes, in level-0 pixels.
        pixel_size: micrometres per level-0 pixel, x and y.

    Returns:
        (N,) columns of the objects table: area, perimeter, axes, solidity, centroid.
    """
    scaled = shapely.transform(polygons, lambda points: points * pixel_size)
    area = shapely.area(scaled)
    centre = shapely.get_coordinates(shapely.centroid(polygons))
    xx, xy, yy = _second_moments(scaled, centre * pixel_size) / area
    spread = np.sqrt((xx - yy) ** 2 + 4 * xy**2)
    return {
        "area_um2": area,
        "perimeter_um": shapely.length(scaled),
        "major_axis_um": 4 * np.sqrt((xx + yy + spread) / 2),
        "minor_axis_um": 4 * np.sqrt(np.maximum(xx + yy - spread, 0) / 2),
        "solidity": area / shapely.area(shapely.convex_hull(scaled)),
        "centroid_x": centre[:, 0],
        "centroid_y": centre[:, 1],
    }


def _second_moments(polygons: Geometries, centre: Floats) -> Floats:
    """Return (3, N): the integrals of xx, xy and yy about each centre (Green's theorem)."""
    points, owner = shapely.get_coordinates(shapely.get_exterior_ring(polygons), return_index=True)
    x, y = (points - centre[owner]).T
    same = owner[:-1] == owner[1:]
    (x0, y0), (x1, y1) = (x[:-1][same], y[:-1][same]), (x[1:][same], y[1:][same])
    cross = x0 * y1 - x1 * y0
    terms = (
        (x0 * x0 + x0 * x1 + x1 * x1) / 12,
        (2 * x0 * y0 + x0 * y1 + x1 * y0 + 2 * x1 * y1) / 24,
        (y0 * y0 + y0 * y1 + y1 * y1) / 12,
    )
    count = len(polygons)
    return np.stack([np.bincount(owner[:-1][same], cross * term, count) for term in terms])
