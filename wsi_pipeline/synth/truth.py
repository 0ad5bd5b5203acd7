"""The exact truth beside a synthetic slide, as GeoParquet in level-0 pixels."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from wsi_pipeline.compiled import compiled
from wsi_pipeline.geometry import Box
from wsi_pipeline.synth.glands import outline
from wsi_pipeline.synth.nuclei import CLASS, CLASSES, GLAND, VACUOLE, X, Y, boundary_point
from wsi_pipeline.synth.world import Scene, World

__all__ = ["TRUTH_SCHEMA", "TruthPart", "TruthWriter", "make_truth"]

_VERTICES = 32
_ROW_GROUP = 16384

TRUTH_SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("class", pa.string()),
        pa.field("parent_id", pa.int64()),
        pa.field("obscured", pa.bool_(), nullable=False),
        pa.field("geometry", pa.binary(), nullable=False),
    ]
)
"""``kind`` is nucleus, gland or lumen; ``parent_id`` the gland around it; ``obscured`` tells
that the centre lies under the pen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TruthPart:
    """The objects that one block of the slide owns."""

    kind: list[str]
    """Kind of each object; a gland comes before what lies in it."""
    name: list[str | None]
    """Class of each nucleus."""
    parent: list[int | None]
    """Row, within this part, of the gland around the object."""
    obscured: list[bool]
    """Whether the pen hides it."""
    geometry: NDArray[np.object_]
    """Shapely polygons in level-0 pixels."""


@compiled
def _outlines(nuclei: NDArray[np.float64], points: NDArray[np.float64]) -> None:
    vertices = points.shape[1]
    for k in range(nuclei.shape[0]):
        for v in range(vertices):
            angle = 2.0 * math.pi * v / vertices
            points[k, v, 0], points[k, v, 1] = boundary_point(nuclei[k], angle, 0.0)


def make_truth(world: World, scene: Scene, box: Box, size: tuple[int, int]) -> TruthPart:
    """Return the objects whose centre lies in a box of level-0 pixels.

    A crypt brings its lumen and its epithelial nuclei along. The blocks at the slide's
    border also own what lies beyond it. Everything is clipped to the slide.
    """
    sites, outer, lumen = scene.glands
    mine = np.flatnonzero(_owned(sites[:, 0], sites[:, 1], box, size, world.mpp))
    kind: list[str] = []
    name: list[str | None] = []
    parent: list[int | None] = []
    shapes: list[shapely.Polygon] = []
    centres: list[tuple[float, float]] = []
    row_of = np.full(len(sites) + 1, -1, np.int64)
    for g in mine:
        row_of[g] = len(kind)
        for what, radii in (("gland", outer), ("lumen", lumen)):
            kind.append(what)
            name.append(None)
            parent.append(None if what == "gland" else int(row_of[g]))
            shapes.append(shapely.Polygon(outline(sites[g], radii[g]) / world.mpp))
            centres.append((sites[g, 0], sites[g, 1]))
    nuclei = scene.nuclei[scene.nuclei[:, CLASS] != VACUOLE]
    gland = nuclei[:, GLAND].astype(np.int64)
    inside = _owned(nuclei[:, X], nuclei[:, Y], box, size, world.mpp)
    nuclei = nuclei[np.where(gland >= 0, row_of[gland] >= 0, inside)]
    points = np.empty((len(nuclei), _VERTICES, 2))
    _outlines(nuclei, points)
    for k in range(len(nuclei)):
        row = int(row_of[int(nuclei[k, GLAND])])
        kind.append("nucleus")
        name.append(CLASSES[int(nuclei[k, CLASS])])
        parent.append(row if row >= 0 else None)
        centres.append((nuclei[k, X], nuclei[k, Y]))
    geometry = np.concatenate([np.array(shapes, object), shapely.polygons(points / world.mpp)])
    xy = np.array(centres, np.float64).reshape(-1, 2)
    hidden = world.pen.covers(np.ascontiguousarray(xy[:, 0]), np.ascontiguousarray(xy[:, 1]))
    part = TruthPart(
        kind=kind, name=name, parent=parent, obscured=hidden.tolist(), geometry=geometry
    )
    return _clip(part, size)


def _owned(
    x_um: NDArray[np.float64],
    y_um: NDArray[np.float64],
    box: Box,
    size: tuple[int, int],
    mpp: float,
) -> NDArray[np.bool_]:
    left = -math.inf if box.x <= 0 else box.x * mpp
    top = -math.inf if box.y <= 0 else box.y * mpp
    right = math.inf if box.x1 >= size[0] else box.x1 * mpp
    bottom = math.inf if box.y1 >= size[1] else box.y1 * mpp
    return (x_um >= left) & (x_um < right) & (y_um >= top) & (y_um < bottom)


def _clip(part: TruthPart, size: tuple[int, int]) -> TruthPart:
    """Cut objects at the slide's border; the largest piece stays, objects outside go."""
    bounds = shapely.bounds(part.geometry).reshape(-1, 4)
    cut = (bounds[:, :2] < 0).any(1) | (bounds[:, 2] > size[0]) | (bounds[:, 3] > size[1])
    if not cut.any():
        return part
    slide = shapely.box(0, 0, *size)
    geometry = part.geometry.copy()
    for k in np.flatnonzero(cut):
        found = shapely.get_parts(shapely.intersection(geometry[k], slide))
        pieces = [piece for piece in found if piece.geom_type == "Polygon"]
        geometry[k] = max(pieces, key=shapely.area, default=shapely.Polygon())
    keep = np.flatnonzero(shapely.area(geometry) > 0.5)
    new_row = {int(old): new for new, old in enumerate(keep)}
    return TruthPart(
        kind=[part.kind[k] for k in keep],
        name=[part.name[k] for k in keep],
        parent=[new_row.get(-1 if (p := part.parent[k]) is None else p) for k in keep],
        obscured=[part.obscured[k] for k in keep],
        geometry=geometry[keep],
    )


class TruthWriter:
    """Writes parts as they come, in row groups of bounded size."""

    def __init__(self, path: Path) -> None:
        geo = {
            "version": "1.1.0",
            "primary_column": "geometry",
            "columns": {
                "geometry": {"encoding": "WKB", "geometry_types": ["Polygon"], "crs": None}
            },
        }
        schema = TRUTH_SCHEMA.with_metadata({"geo": json.dumps(geo)})
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._waiting: list[pa.RecordBatch] = []
        self._next_id = 1

    def write(self, part: TruthPart) -> None:
        """Append one part; ids count up in the order of writing."""
        count = len(part.kind)
        first = self._next_id
        self._next_id += count
        columns = [
            pa.array(np.arange(first, first + count)),
            pa.array(part.kind, pa.string()),
            pa.array(part.name, pa.string()),
            pa.array([None if p is None else first + p for p in part.parent], pa.int64()),
            pa.array(part.obscured, pa.bool_()),
            pa.array(shapely.to_wkb(part.geometry).tolist(), pa.binary()),
        ]
        self._waiting.append(pa.RecordBatch.from_arrays(columns, schema=self._writer.schema))
        if sum(batch.num_rows for batch in self._waiting) >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            table = pa.Table.from_batches(self._waiting)
            self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self._waiting = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._flush()
        finally:
            self._writer.close()
