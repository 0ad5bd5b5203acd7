"""What makes a Parquet file a GeoParquet 1.1 file of slide coordinates.

Coordinates are level-0 pixels, so the coordinate system is an *engineering* one with the
pixel as its unit, never a geographic one: without any, readers assume longitude and
latitude. Source: GeoParquet 1.1.0, PROJJSON 0.7.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["SIDES", "geo_metadata", "pixel_crs"]

SIDES = ("xmin", "ymin", "xmax", "ymax")
"""Fields of the covering ``bbox`` column, in the order the format wants."""


def geo_metadata(crs: Mapping[str, Any], extent: Sequence[float] | None) -> dict[str, Any]:
    """Return the ``geo`` metadata of GeoParquet 1.1.0."""
    column: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": ["Polygon"] if extent is not None else [],
        "crs": crs,
        "orientation": "counterclockwise",
        "edges": "planar",
        "covering": {"bbox": {side: ["bbox", side] for side in SIDES}},
    }
    if extent is not None:
        column["bbox"] = list(extent)
    return {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}


def pixel_crs(pixel_size: tuple[float, float]) -> dict[str, Any]:
    """Return the level-0 frame as an engineering CRS in PROJJSON, pixel size in metres."""

    def axis(name: str, direction: str, mpp: float) -> dict[str, Any]:
        unit = {"type": "LinearUnit", "name": "pixel", "conversion_factor": _metres(mpp)}
        return {
            "name": name,
            "abbreviation": name.lower(),
            "direction": direction,
            "unit": unit,
        }

    return {
        "$schema": "https://proj.org/schemas/v0.7/projjson.schema.json",
        "type": "EngineeringCRS",
        "name": "Slide level-0 pixels",
        "datum": {"type": "EngineeringDatum", "name": "Slide level-0 top-left corner"},
        "coordinate_system": {
            "subtype": "Cartesian",
            "axis": [axis("X", "east", pixel_size[0]), axis("Y", "south", pixel_size[1])],
        },
    }


def _metres(mpp: float) -> float:
    if not (math.isfinite(mpp) and mpp > 0):
        msg = f"the pixel size must be positive and finite, not {mpp}"
        raise ValueError(msg)
    return mpp * 1e-6
